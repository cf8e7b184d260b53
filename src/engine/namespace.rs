//! Inodes, directory entries, long values, orphans and detached extent maps in the namespace
//! tree.
//!
//! Invariants:
//!
//! 1. A directory's entries are found by a keyed hash of the name; names with one hash share a
//!    bucket. Buckets are never empty.
//! 2. An inode with no name (`nlink` 0), or with an unfinished clone in pieces, has an orphan
//!    record; nothing else has.
//! 3. A detached extent map belongs to no inode and only waits to be freed.

use std::borrow::Cow;
use std::hash::Hasher;

use siphasher::sip::SipHasher13;

use crate::error::{Error, Kind, Result};
use crate::ondisk::extent::Root;
use crate::ondisk::inode::{
    Entry, Inode, InodeKind, KeyType, NAME_MAX, NUMBER_MAX, REST_MAX, TARGET_MAX, XATTR_VALUE_MAX,
    decode_entries, decode_xattr, encode_entries, key, split_key,
};
use crate::ondisk::node::{TreeKind, VALUE_MAX};
use crate::units::Ino;

use super::meta::Meta;
use super::tree::Change;

/// Pieces of a long value that one key can count.
const PIECES: u64 = 1 << 16;

/// Longest value in pieces: an extended attribute with its name and two lengths.
const LONG_MAX: usize = XATTR_VALUE_MAX + NAME_MAX + 6;

/// Checks a name before it goes into a directory.
pub(crate) fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > NAME_MAX {
        return Err(Error::new(
            Kind::NameTooLong,
            format!("name is too long: len={}", name.len()),
        ));
    }
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0)
    {
        return Err(Error::new(
            Kind::Invalid,
            "name is empty, '.', '..', or has a '/' or NUL",
        ));
    }
    Ok(())
}

fn no_such(ino: Ino) -> Error {
    Error::new(Kind::NotFound, format!("no such inode: ino={ino}"))
}

fn check_number(ino: Ino) -> Result<()> {
    if ino.0 == 0 || ino.0 > REST_MAX {
        return Err(no_such(ino));
    }
    Ok(())
}

fn check_directory(ino: Ino, inode: &Inode) -> Result<()> {
    if inode.kind != InodeKind::Directory {
        return Err(Error::new(
            Kind::NotDirectory,
            format!("is not a directory: ino={ino}"),
        ));
    }
    Ok(())
}

impl Meta {
    fn put(&mut self, key: u128, value: &[u8]) -> Result<()> {
        self.change(key, &mut |_| Ok(Cow::Borrowed(value)))
    }

    fn change<'v>(&mut self, key: u128, change: &mut Change<'_, 'v>) -> Result<()> {
        let mut root = self.namespace;
        let done = self.update(&mut root, TreeKind::Namespace, key, change);
        self.namespace = root;
        done
    }

    fn delete(&mut self, key: u128) -> Result<bool> {
        let mut root = self.namespace;
        let done = self.remove(&mut root, TreeKind::Namespace, key);
        self.namespace = root;
        done
    }

    fn fetch(&self, key: u128) -> Result<Option<Vec<u8>>> {
        self.get(self.namespace, TreeKind::Namespace, key)
    }

    /// The record of an inode.
    pub(crate) fn inode(&self, ino: Ino) -> Result<Inode> {
        check_number(ino)?;
        let at = key(ino.0, KeyType::Inode, 0);
        match self.with(self.namespace, TreeKind::Namespace, at, Inode::decode)? {
            Some(inode) => inode,
            None => Err(no_such(ino)),
        }
    }

    /// True if there is an inode of this number.
    pub(crate) fn has_inode(&self, ino: Ino) -> Result<bool> {
        Ok(self.fetch(key(ino.0, KeyType::Inode, 0))?.is_some())
    }

    /// Moves the counters of inodes and of detached extent maps behind the numbers that are in
    /// use: a superblock that says otherwise must not make new files overwrite old ones.
    ///
    /// # Errors
    /// `Corrupt` if there is no number left.
    pub(crate) fn skip_taken_numbers(&mut self) -> Result<()> {
        let mut known = true;
        let mut last = |at: u128| match self.floor(self.namespace, TreeKind::Namespace, at) {
            Ok(found) => found.map(|(key, _)| split_key(key)),
            // That of an inode is looked at again before it is used; what can be read must open.
            Err(error) => {
                known = false;
                log::warn!("the last numbers in use are not known: {error}");
                None
            }
        };
        let ino = last(u128::MAX).map_or(0, |(ino, ..)| ino);
        let detached = last(key(0, KeyType::Detached, REST_MAX))
            .filter(|(_, kind, _)| *kind == KeyType::Detached.code())
            .map_or(0, |(.., id)| id);
        if ino >= NUMBER_MAX || detached >= NUMBER_MAX {
            return Err(Error::corrupt("the pool has no numbers left; run check"));
        }
        self.next_ino = self.next_ino.max(ino + 1);
        self.next_detached = self.next_detached.max(detached + 1);
        self.numbers_known = known;
        Ok(())
    }

    /// The record of a regular file.
    pub(crate) fn file(&self, ino: Ino) -> Result<Inode> {
        let inode = self.inode(ino)?;
        match inode.kind {
            InodeKind::Regular => Ok(inode),
            InodeKind::Directory => Err(Error::new(
                Kind::IsDirectory,
                format!("is a directory: ino={ino}"),
            )),
            _ => Err(Error::new(
                Kind::Invalid,
                format!("is not a regular file: ino={ino}"),
            )),
        }
    }

    /// The record of a directory.
    pub(crate) fn directory(&self, ino: Ino) -> Result<Inode> {
        let inode = self.inode(ino)?;
        check_directory(ino, &inode)?;
        Ok(inode)
    }

    /// Stores the record of an inode.
    pub(crate) fn put_inode(&mut self, ino: Ino, inode: &Inode) -> Result<()> {
        let value = inode.encode();
        let mut old = None;
        self.change(key(ino.0, KeyType::Inode, 0), &mut |before| {
            old = before.map(Inode::decode).transpose()?;
            Ok(Cow::Borrowed(&value))
        })?;
        match old {
            Some(old) => self.logical = self.logical.wrapping_sub(old.size),
            None => self.inodes += 1,
        }
        self.logical = self.logical.wrapping_add(inode.size);
        if !inode.root.is_empty() && self.is_dirty(inode.root.node.block) {
            self.changed_files.insert(ino.0); // I4 of `Meta`
        }
        self.publish();
        Ok(())
    }

    /// Changes the record of a directory, but for its size.
    pub(crate) fn change_directory(
        &mut self,
        dir: Ino,
        change: &mut dyn FnMut(&mut Inode),
    ) -> Result<()> {
        check_number(dir)?;
        self.change(key(dir.0, KeyType::Inode, 0), &mut |before| {
            let before = before.ok_or_else(|| no_such(dir))?;
            let mut inode = Inode::decode(before)?;
            check_directory(dir, &inode)?;
            change(&mut inode);
            Ok(Cow::Owned(inode.encode().to_vec()))
        })
    }

    /// Removes an inode with all that belongs to it; its extent map is detached.
    pub(crate) fn delete_inode(&mut self, ino: Ino) -> Result<()> {
        let inode = self.inode(ino)?;
        let mut keys = Vec::new();
        let range = (
            key(ino.0, KeyType::Inode, 0),
            key(ino.0 + 1, KeyType::Inode, 0),
        );
        self.scan(
            self.namespace,
            TreeKind::Namespace,
            range.0,
            range.1,
            &mut |key, _| {
                keys.push(key);
                Ok(true)
            },
        )?;
        for key in keys {
            self.delete(key)?;
        }
        self.delete(key(0, KeyType::Orphan, ino.0))?;
        self.inodes = self
            .inodes
            .checked_sub(1)
            .ok_or_else(|| Error::corrupt("there are more inodes than were counted"))?;
        self.logical = self.logical.wrapping_sub(inode.size);
        self.changed_files.remove(&ino.0);
        self.detach(inode.root)
    }

    /// Hands an extent map, which loses its owner, to the reaper.
    pub(crate) fn detach(&mut self, root: Root) -> Result<()> {
        if root.is_empty() {
            return Ok(());
        }
        if self.is_dirty(root.node.block) {
            // Nothing else refers to a dirty root by checksum; it is sealed with the rest.
            self.detached_dirty = true;
        }
        let id = self.next_detached;
        self.next_detached += 1;
        self.put(key(0, KeyType::Detached, id), &root.encode())
    }

    /// The first detached extent map, if any.
    pub(crate) fn first_detached(&self) -> Result<Option<(u64, Root)>> {
        let mut found = None;
        let range = (key(0, KeyType::Detached, 0), key(1, KeyType::Inode, 0));
        self.scan(
            self.namespace,
            TreeKind::Namespace,
            range.0,
            range.1,
            &mut |key, value| {
                found = Some((split_key(key).2, Root::decode(value)?));
                Ok(false)
            },
        )?;
        Ok(found)
    }

    /// All detached extent maps.
    pub(crate) fn all_detached(&self) -> Result<Vec<(u64, Root)>> {
        let mut found = Vec::new();
        let range = (key(0, KeyType::Detached, 0), key(1, KeyType::Inode, 0));
        self.scan(
            self.namespace,
            TreeKind::Namespace,
            range.0,
            range.1,
            &mut |key, value| {
                found.push((split_key(key).2, Root::decode(value)?));
                Ok(true)
            },
        )?;
        Ok(found)
    }

    /// Stores what is left of a detached extent map; an empty one is forgotten.
    pub(crate) fn put_detached(&mut self, id: u64, root: Root) -> Result<()> {
        if root.is_empty() {
            self.delete(key(0, KeyType::Detached, id))?;
            return Ok(());
        }
        self.detached_dirty = true;
        self.publish();
        self.put(key(0, KeyType::Detached, id), &root.encode())
    }

    /// Marks an inode as having no name.
    pub(crate) fn add_orphan(&mut self, ino: Ino) -> Result<()> {
        self.put(key(0, KeyType::Orphan, ino.0), &[])
    }

    /// The inode is no orphan (a clone in pieces has ended).
    pub(crate) fn remove_orphan(&mut self, ino: Ino) -> Result<()> {
        self.delete(key(0, KeyType::Orphan, ino.0))?;
        Ok(())
    }

    /// All inodes that recovery must look after: those without a name and clones in pieces.
    pub(crate) fn orphans(&self) -> Result<Vec<Ino>> {
        let mut found = Vec::new();
        let range = (key(0, KeyType::Orphan, 0), key(0, KeyType::Detached, 0));
        self.scan(
            self.namespace,
            TreeKind::Namespace,
            range.0,
            range.1,
            &mut |key, _| {
                found.push(Ino(split_key(key).2));
                Ok(true)
            },
        )?;
        Ok(found)
    }

    /// 48 bits of the keyed hash of a name, never 0.
    fn name_hash(&self, name: &[u8]) -> u64 {
        let mut hasher = SipHasher13::new_with_key(&self.hash_key);
        hasher.write(name);
        (hasher.finish() >> 16).max(1)
    }

    fn entries_key(&self, dir: Ino, name: &[u8]) -> u128 {
        key(dir.0, KeyType::Entries, self.name_hash(name) << 8)
    }

    /// The entry `name` of a directory.
    pub(crate) fn entry(&self, dir: Ino, name: &[u8]) -> Result<Option<Entry>> {
        let Some(bucket) = self.fetch(self.entries_key(dir, name))? else {
            return Ok(None);
        };
        Ok(decode_entries(&bucket)?
            .into_iter()
            .find(|entry| entry.name == name))
    }

    /// Adds an entry, or points an existing one elsewhere.
    pub(crate) fn put_entry(&mut self, dir: Ino, entry: Entry) -> Result<()> {
        let at = self.entries_key(dir, &entry.name);
        self.change(at, &mut |bucket| {
            let bucket = bucket.map(decode_entries).transpose()?;
            let mut bucket = bucket.unwrap_or_default();
            match bucket.iter_mut().find(|old| old.name == entry.name) {
                Some(old) => old.clone_from(&entry),
                None => bucket.push(entry.clone()),
            }
            Ok(Cow::Owned(encode_entries(&bucket)?))
        })
    }

    /// Removes an entry, which exists.
    pub(crate) fn remove_entry(&mut self, dir: Ino, name: &[u8]) -> Result<()> {
        let at = self.entries_key(dir, name);
        let mut bucket = match self.fetch(at)? {
            Some(bucket) => decode_entries(&bucket)?,
            None => return Ok(()),
        };
        bucket.retain(|entry| entry.name != name);
        if bucket.is_empty() {
            let mut root = self.namespace;
            let done = self.remove_known(&mut root, TreeKind::Namespace, at);
            self.namespace = root;
            return done;
        }
        self.put(at, &encode_entries(&bucket)?)
    }

    /// Up to `limit` entries behind `cookie`, each with its own cookie.
    pub(crate) fn entries(&self, dir: Ino, cookie: u64, limit: usize) -> Result<Vec<(u64, Entry)>> {
        let mut found = Vec::new();
        let from = cookie.min(REST_MAX) & !0xff;
        let range = (
            key(dir.0, KeyType::Entries, from),
            key(dir.0, KeyType::Xattr, 0),
        );
        self.scan(
            self.namespace,
            TreeKind::Namespace,
            range.0,
            range.1,
            &mut |key, value| {
                let hash = split_key(key).2;
                for (i, entry) in decode_entries(value)?.into_iter().enumerate() {
                    let at = hash | i as u64;
                    if at > cookie && found.len() < limit {
                        found.push((at, entry));
                    }
                }
                Ok(found.len() < limit)
            },
        )?;
        Ok(found)
    }

    /// Stores a long value in pieces behind `base`, a key whose low 16 bits are free. Fewer
    /// pieces than before leave none behind.
    fn put_long(&mut self, base: u128, value: &[u8]) -> Result<()> {
        self.delete_long(base)?;
        // An empty value has one empty piece, so that it exists.
        let pieces = value
            .chunks(VALUE_MAX)
            .map(<[u8]>::to_vec)
            .collect::<Vec<_>>();
        let pieces = if pieces.is_empty() {
            vec![Vec::new()]
        } else {
            pieces
        };
        assert!((pieces.len() as u64) < PIECES);
        for (i, piece) in pieces.iter().enumerate() {
            self.put(base + i as u128, piece)?;
        }
        Ok(())
    }

    fn delete_long(&mut self, base: u128) -> Result<bool> {
        let mut any = false;
        for i in 0..PIECES {
            if !self.delete(base + u128::from(i))? {
                break;
            }
            any = true;
        }
        Ok(any)
    }

    fn long(&self, base: u128) -> Result<Option<Vec<u8>>> {
        let mut value = None;
        let mut next = base;
        let too_long = || Error::corrupt("a value of many pieces is longer than any can be");
        self.scan(
            self.namespace,
            TreeKind::Namespace,
            base,
            base + u128::from(PIECES),
            &mut |key, piece| {
                if key != next {
                    return Ok(false);
                }
                next += 1;
                let value: &mut Vec<u8> = value.get_or_insert_default();
                value.extend_from_slice(piece);
                if value.len() > LONG_MAX {
                    return Err(too_long());
                }
                Ok(true)
            },
        )?;
        Ok(value)
    }

    /// Stores the target of a symlink.
    pub(crate) fn put_target(&mut self, ino: Ino, target: &[u8]) -> Result<()> {
        self.put_long(key(ino.0, KeyType::Symlink, 0), target)
    }

    /// The target of a symlink.
    pub(crate) fn target(&self, ino: Ino) -> Result<Vec<u8>> {
        match self.long(key(ino.0, KeyType::Symlink, 0))? {
            Some(target) if target.len() <= TARGET_MAX => Ok(target),
            Some(_) => Err(Error::corrupt(format!(
                "symlink has a target that is too long: ino={ino}"
            ))),
            None => Err(Error::corrupt(format!("symlink has no target: ino={ino}"))),
        }
    }

    fn xattr_key(&self, ino: Ino, name: &[u8]) -> u128 {
        // 40 bits of hash and 16 bits for the piece.
        key(ino.0, KeyType::Xattr, (self.name_hash(name) >> 8) << 16)
    }

    /// The value of an extended attribute.
    pub(crate) fn xattr(&self, ino: Ino, name: &[u8]) -> Result<Option<Vec<u8>>> {
        let Some(raw) = self.long(self.xattr_key(ino, name))? else {
            return Ok(None);
        };
        let (found, value) = decode_xattr(&raw)?;
        Ok((found == name).then(|| value.to_vec()))
    }

    /// Sets an extended attribute.
    pub(crate) fn put_xattr(&mut self, ino: Ino, name: &[u8], value: &[u8]) -> Result<()> {
        let at = self.xattr_key(ino, name);
        if let Some(raw) = self.long(at)?
            && decode_xattr(&raw)?.0 != name
        {
            return Err(Error::new(
                Kind::NoSpace,
                "two attribute names have the same hash",
            ));
        }
        let mut raw = (name.len() as u16).to_le_bytes().to_vec();
        raw.extend_from_slice(&(value.len() as u32).to_le_bytes());
        raw.extend_from_slice(name);
        raw.extend_from_slice(value);
        self.put_long(at, &raw)
    }

    /// Removes an extended attribute, which exists.
    pub(crate) fn delete_xattr(&mut self, ino: Ino, name: &[u8]) -> Result<()> {
        let at = self.xattr_key(ino, name);
        self.delete_long(at)?;
        Ok(())
    }

    /// Names and values of all extended attributes.
    pub(crate) fn xattrs(&self, ino: Ino) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut bases = Vec::new();
        let range = (
            key(ino.0, KeyType::Xattr, 0),
            key(ino.0, KeyType::Symlink, 0),
        );
        self.scan(
            self.namespace,
            TreeKind::Namespace,
            range.0,
            range.1,
            &mut |key, _| {
                if key & 0xffff == 0 {
                    bases.push(key);
                }
                Ok(true)
            },
        )?;
        let mut found = Vec::new();
        for base in bases {
            let raw = self.long(base)?.unwrap_or_default();
            let (name, value) = decode_xattr(&raw)?;
            found.push((name.to_vec(), value.to_vec()));
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::device::SimDevice;
    use crate::engine::{CreateOptions, NewNode, OpenOptions, Pool};
    use crate::units::{Ino, Time};

    #[test]
    fn a_number_that_may_be_taken_is_looked_at_before_it_is_used() {
        let device = Arc::new(SimDevice::new(12 * 1024 * 1024, 1));
        let options = CreateOptions {
            journal_size: Some(1024 * 1024),
            uuid: [1; 16],
            hash_key: [2; 16],
            uid: 0,
            gid: 0,
            time: Time::default(),
        };
        Pool::create(device.clone(), None, &options).expect("there is room");
        let pool = Pool::open(device, None, &OpenOptions::default()).expect("a new pool opens");
        let node = NewNode::regular(0o600);
        let create = |name| pool.create_node(Ino::ROOT, name, &node, Time::default());
        let made = create(b"a").expect("there is room");
        assert!(pool.meta.read().numbers_known);
        // As behind a superblock that lies, where the last number in use cannot be read.
        pool.meta.write().numbers_known = false;
        pool.meta.write().next_ino = made.ino.0;
        create(b"b").expect_err("it would take the inode of another file");
        let found = pool.lookup(Ino::ROOT, b"a").expect("it is still there");
        assert_eq!(found.ino, made.ino);
    }
}
