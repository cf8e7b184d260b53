//! The namespace: what survives of it, made to agree with itself. Works on all records in memory;
//! nothing is written here.
//!
//! Invariants of the result:
//!
//! 1. Every inode with links has a name, every name an inode, every directory but the root one
//!    name, and the root is reached from it. Inodes that lost their names are in `lost+found`.
//! 2. Counts of links, kinds, parents and the list of orphans follow from the names.

use std::collections::{BTreeMap, BTreeSet};

use crate::engine::check::names::{name_hash, unreachable};
use crate::engine::types::Action;
use crate::error::Result;
use crate::ondisk::extent::Root;
use crate::ondisk::inode::{
    Entry, FLAG_PINNED, Inode, InodeKind, KeyType, decode_entries, encode_entries, key, split_key,
};
use crate::ondisk::node::VALUE_MAX;
use crate::ondisk::superblock::Superblock;
use crate::ondisk::{get_u16, get_u32};
use crate::units::{Ino, Time};

use super::act;

/// Name of the directory for what lost its name.
const LOST_FOUND: &[u8] = b"lost+found";

/// The surviving namespace, taken apart.
#[derive(Debug, Default)]
pub(super) struct Names {
    pub(super) inodes: BTreeMap<u64, Inode>,
    /// Entries of each directory.
    pub(super) dirs: BTreeMap<u64, Vec<Entry>>,
    /// Pieces of long values, by their keys.
    pub(super) pieces: BTreeMap<u128, Vec<u8>>,
    /// Detached maps by their serial numbers.
    pub(super) detached: BTreeMap<u64, Root>,
    pub(super) next_ino: u64,
    lost_found: Option<u64>,
    hash_key: [u8; 16],
    generation: u64,
    now: Time,
    pub(super) actions: Vec<Action>,
}

impl Names {
    pub(super) fn new(sb: &Superblock, now: Time) -> Self {
        Self {
            next_ino: sb.next_ino,
            hash_key: sb.hash_key,
            generation: sb.generation,
            now,
            ..Self::default()
        }
    }

    fn act(&mut self, code: u32, message: String) {
        self.actions.push(Action { code, message });
    }

    /// Takes in one record; what cannot be is dropped.
    pub(super) fn take(&mut self, at: u128, value: &[u8]) {
        let (ino, kind, rest) = split_key(at);
        let taken = match KeyType::from_code(kind) {
            Some(KeyType::Inode) if ino > 0 && rest == 0 => {
                let inode = Inode::decode(value).ok();
                self.inodes.extend(inode.map(|inode| (ino, inode)));
                inode.map(|_| ())
            }
            Some(KeyType::Entries) if ino > 0 => decode_entries(value)
                .ok()
                .map(|entries| self.dirs.entry(ino).or_default().extend(entries)),
            Some(KeyType::Xattr | KeyType::Symlink) if ino > 0 => {
                self.pieces.insert(at, value.to_vec());
                Some(())
            }
            Some(KeyType::Orphan) if ino == 0 => Some(()), // follows from the inodes
            Some(KeyType::Detached) if ino == 0 => match Root::decode(value) {
                Ok(root) if !root.is_empty() => {
                    self.detached.insert(rest, root);
                    Some(())
                }
                _ => None,
            },
            _ => None,
        };
        if taken.is_none() {
            let text = format!("drop a malformed record of inode {ino} from the namespace");
            self.act(act::RECORD, text);
        }
    }

    /// A path of an inode, for people.
    pub(super) fn path(&self, ino: u64) -> String {
        let (mut at, mut parts) = (ino, Vec::new());
        while at != Ino::ROOT.0 && parts.len() < 64 {
            let named = self.dirs.iter().find_map(|(dir, entries)| {
                let entry = entries.iter().find(|entry| entry.ino.0 == at)?;
                Some((*dir, String::from_utf8_lossy(&entry.name).into_owned()))
            });
            let Some((dir, name)) = named else {
                break;
            };
            parts.push(name);
            at = dir;
        }
        parts.reverse();
        match (at == Ino::ROOT.0, parts.is_empty()) {
            (true, _) => format!("/{}", parts.join("/")),
            (false, true) => format!("inode {ino}"),
            (false, false) => format!("?/{}", parts.join("/")),
        }
    }

    /// Makes everything agree.
    pub(super) fn mend(&mut self) {
        self.mend_root();
        self.mend_directories();
        self.mend_pieces();
        self.mend_inodes();
        self.mend_entries();
        self.mend_reach();
        self.name_the_nameless();
        self.mend_links();
        let last = self.inodes.keys().next_back().copied().unwrap_or(0);
        self.next_ino = self.next_ino.max(last + 1);
    }

    fn new_directory(&self, parent: u64) -> Inode {
        let (uid, gid) = self
            .inodes
            .get(&Ino::ROOT.0)
            .map_or((0, 0), |root| (root.uid, root.gid));
        Inode {
            kind: InodeKind::Directory,
            flags: 0,
            mode: 0o700,
            nlink: 2,
            uid,
            gid,
            rdev: 0,
            generation: self.generation,
            size: 0,
            mapped: 0,
            parent,
            root: Root::default(),
            atime: self.now,
            mtime: self.now,
            ctime: self.now,
            btime: self.now,
            origin: 0,
            origin_generation: 0,
            origin_time: Time::default(),
        }
    }

    fn mend_root(&mut self) {
        let root = Ino::ROOT.0;
        let is_dir = |inode: &Inode| inode.kind == InodeKind::Directory;
        if !self.inodes.get(&root).is_some_and(is_dir) {
            let inode = self.new_directory(root);
            self.inodes.insert(root, inode);
            self.act(act::DIRECTORY, "make the root directory anew".into());
        }
        if let Some(inode) = self.inodes.get_mut(&root) {
            inode.parent = root;
        }
    }

    /// Entries without a directory get one again: their names are worth more than its attributes.
    fn mend_directories(&mut self) {
        for dir in self.dirs.keys().copied().collect::<Vec<_>>() {
            match self.inodes.get(&dir).map(|inode| inode.kind) {
                Some(InodeKind::Directory) => {}
                None => {
                    let inode = self.new_directory(0);
                    self.inodes.insert(dir, inode);
                    let path = self.path(dir);
                    self.act(act::DIRECTORY, format!("make the directory {path} anew"));
                }
                Some(_) => {
                    self.dirs.remove(&dir);
                    let text = format!("drop the entries of {dir}, which is no directory");
                    self.act(act::ENTRY, text);
                }
            }
        }
    }

    /// Targets and attributes that are whole stay.
    fn mend_pieces(&mut self) {
        let mut targets = BTreeMap::new();
        let mut broken = Vec::new();
        // By inode, kind and name: the pieces of one value.
        let mut values: BTreeMap<u128, Vec<u128>> = BTreeMap::new();
        for at in self.pieces.keys() {
            values.entry(at >> 16 << 16).or_default().push(*at);
        }
        for (base, keys) in values {
            let (ino, kind, rest) = split_key(base);
            let joined = self.joined(base, &keys);
            let symlink = KeyType::from_code(kind) == Some(KeyType::Symlink);
            let whole = joined.as_ref().is_some_and(|value| match symlink {
                true => rest == 0,
                false => self.is_attribute(rest, value),
            });
            match joined {
                Some(value) if whole && symlink => drop(targets.insert(ino, value.len() as u64)),
                _ if whole => {}
                _ => broken.push((ino, symlink, keys)),
            }
        }
        for (ino, symlink, keys) in broken {
            keys.iter().for_each(|at| drop(self.pieces.remove(at)));
            if !symlink && self.inodes.contains_key(&ino) {
                let path = self.path(ino);
                self.act(act::VALUE, format!("remove a damaged attribute of {path}"));
            }
        }
        let cut = self.inodes.iter().filter(|(ino, inode)| {
            inode.kind == InodeKind::Symlink && targets.get(ino) != Some(&inode.size)
        });
        for ino in cut.map(|(ino, _)| *ino).collect::<Vec<_>>() {
            let path = self.path(ino);
            self.act(
                act::VALUE,
                format!("remove {path}, a symlink without target"),
            );
            self.inodes.remove(&ino);
        }
        let inodes = &self.inodes;
        self.pieces.retain(|at, _| {
            let (ino, kind, _) = split_key(*at);
            let symlink = KeyType::from_code(kind) == Some(KeyType::Symlink);
            let owner = inodes.get(&ino);
            owner.is_some_and(|inode| !symlink || inode.kind == InodeKind::Symlink)
        });
    }

    fn joined(&self, base: u128, keys: &[u128]) -> Option<Vec<u8>> {
        let mut value = Vec::new();
        for (i, at) in keys.iter().enumerate() {
            let piece = &self.pieces[at];
            let last = i + 1 == keys.len();
            if *at != base + i as u128 || (!last && piece.len() != VALUE_MAX) {
                return None;
            }
            value.extend_from_slice(piece);
        }
        Some(value)
    }

    fn is_attribute(&self, rest: u64, value: &[u8]) -> bool {
        if value.len() < 6 {
            return false;
        }
        let len = usize::from(get_u16(value, 0));
        value.len() as u64 == 6 + len as u64 + u64::from(get_u32(value, 2))
            && len > 0
            && (name_hash(&self.hash_key, &value[6..6 + len]) >> 8) << 16 == rest
    }

    fn mend_inodes(&mut self) {
        let generations: BTreeMap<u64, u64> = self
            .inodes
            .iter()
            .map(|(ino, inode)| (*ino, inode.generation))
            .collect();
        let (generation, next_ino) = (self.generation, self.next_ino);
        let mut changed = Vec::new();
        for (ino, inode) in &mut self.inodes {
            let before = *inode;
            inode.generation = inode.generation.min(generation);
            inode.mode &= 0o7777;
            if inode.kind != InodeKind::Regular {
                (inode.root, inode.mapped, inode.flags) = (Root::default(), 0, 0);
            }
            if inode.kind != InodeKind::Directory {
                inode.parent = 0;
            }
            let origin = generations.get(&inode.origin);
            let possible = inode.kind == InodeKind::Regular
                && inode.origin < next_ino
                && inode.origin_generation <= generation
                && origin.is_none_or(|origin| *origin == inode.origin_generation);
            if inode.origin == 0 || !possible {
                (inode.origin, inode.origin_generation) = (0, 0);
                inode.origin_time = Time::default();
            }
            if *inode != before {
                changed.push(*ino);
            }
        }
        for ino in changed {
            let path = self.path(ino);
            self.act(act::INODE, format!("correct the attributes of {path}"));
        }
    }

    /// Entries name inodes that are there, with their kind, and once; directories have one name.
    fn mend_entries(&mut self) {
        let mut named = BTreeSet::from([Ino::ROOT.0]);
        // The name that a directory agrees with comes first.
        let mut agreed = BTreeSet::new();
        for (dir, entries) in &self.dirs {
            for entry in entries {
                let inode = self.inodes.get(&entry.ino.0);
                if inode.is_some_and(|inode| inode.parent == *dir && entry.ino != Ino::ROOT) {
                    agreed.insert((entry.ino.0, *dir));
                }
            }
        }
        let owned: BTreeSet<u64> = agreed.iter().map(|pair| pair.0).collect();
        let mut dirs = std::mem::take(&mut self.dirs);
        let mut actions = Vec::new();
        for (dir, entries) in &mut dirs {
            let mut names = BTreeSet::new();
            entries.retain_mut(|entry| {
                let name = String::from_utf8_lossy(&entry.name).into_owned();
                let mut drop_it = |why: &str| {
                    let message = format!("remove the name \"{name}\" from directory {dir}: {why}");
                    let code = act::ENTRY;
                    actions.push(Action { code, message });
                    false
                };
                let Some(inode) = self.inodes.get(&entry.ino.0) else {
                    return drop_it("its inode is lost");
                };
                if !names.insert(entry.name.clone()) {
                    return drop_it("it is there twice");
                }
                if inode.kind == InodeKind::Directory {
                    let elsewhere =
                        owned.contains(&entry.ino.0) && !agreed.contains(&(entry.ino.0, *dir));
                    if elsewhere || !named.insert(entry.ino.0) {
                        return drop_it("the directory has another name");
                    }
                }
                if entry.kind != inode.kind {
                    entry.kind = inode.kind;
                    let message = format!("correct the kind of \"{name}\" in directory {dir}");
                    let code = act::INODE;
                    actions.push(Action { code, message });
                }
                true
            });
        }
        dirs.retain(|_, entries| !entries.is_empty());
        self.dirs = dirs;
        self.actions.extend(actions);
    }

    /// Directory and the one that names it, sorted.
    fn parents(&self) -> Vec<(u64, u64)> {
        let mut parents = vec![(Ino::ROOT.0, Ino::ROOT.0)];
        for (dir, entries) in &self.dirs {
            let below = entries
                .iter()
                .filter(|entry| entry.kind == InodeKind::Directory);
            parents.extend(below.map(|entry| (entry.ino.0, *dir)));
        }
        parents.sort_unstable();
        parents
    }

    /// Circles of directories are cut open: one of each loses its name.
    fn mend_reach(&mut self) {
        loop {
            let parents = self.parents();
            let lost: BTreeSet<u64> = unreachable(&parents).into_iter().collect();
            // Those below a directory without a name follow it into `lost+found`.
            let circle = parents
                .iter()
                .find(|(ino, _)| lost.contains(ino) && is_in_circle(*ino, &parents));
            let Some(&(ino, dir)) = circle else {
                return;
            };
            if let Some(entries) = self.dirs.get_mut(&dir) {
                entries.retain(|entry| entry.ino.0 != ino);
                if entries.is_empty() {
                    self.dirs.remove(&dir);
                }
            }
            let text = format!("take directory {ino} out of a circle of directories");
            self.act(act::ENTRY, text);
        }
    }

    fn links(&self) -> BTreeMap<u64, u32> {
        let mut links: BTreeMap<u64, u32> = BTreeMap::new();
        for entry in self.dirs.values().flatten() {
            *links.entry(entry.ino.0).or_default() += 1;
        }
        links
    }

    fn name_the_nameless(&mut self) {
        let links = self.links();
        let nameless: Vec<u64> = self
            .inodes
            .iter()
            .filter(|(ino, inode)| {
                let has_entries = self.dirs.contains_key(ino);
                **ino != Ino::ROOT.0 && !links.contains_key(ino) && (inode.nlink > 0 || has_entries)
            })
            .map(|(ino, _)| *ino)
            .collect();
        for ino in nameless {
            let dir = self.lost_found();
            let kind = self.inodes[&ino].kind;
            let entries = self.dirs.entry(dir).or_default();
            let mut name = format!("inode-{ino}").into_bytes();
            while entries.iter().any(|entry| entry.name == name) {
                name.push(b'_');
            }
            entries.push(Entry {
                ino: Ino(ino),
                kind,
                name,
            });
            let path = self.path(ino);
            self.act(act::LOST_FOUND, format!("give inode {ino} the name {path}"));
        }
    }

    /// The inode of `lost+found`, made if it is not there.
    fn lost_found(&mut self) -> u64 {
        if let Some(ino) = self.lost_found {
            return ino;
        }
        let root = self.dirs.entry(Ino::ROOT.0).or_default();
        let mut name = LOST_FOUND.to_vec();
        while let Some(entry) = root.iter().find(|entry| entry.name == name) {
            if entry.kind == InodeKind::Directory {
                self.lost_found = Some(entry.ino.0);
                return entry.ino.0;
            }
            name.push(b'_');
        }
        let last = self.inodes.keys().next_back().copied().unwrap_or(0);
        let ino = self.next_ino.max(last + 1);
        root.push(Entry {
            ino: Ino(ino),
            kind: InodeKind::Directory,
            name: name.clone(),
        });
        self.next_ino = ino + 1;
        let inode = self.new_directory(Ino::ROOT.0);
        self.inodes.insert(ino, inode);
        self.lost_found = Some(ino);
        let text = format!("make the directory /{}", String::from_utf8_lossy(&name));
        self.act(act::DIRECTORY, text);
        ino
    }

    fn mend_links(&mut self) {
        let links = self.links();
        let parents: BTreeMap<u64, u64> = self.parents().into_iter().collect();
        let mut subdirectories: BTreeMap<u64, u32> = BTreeMap::new();
        for (ino, dir) in &parents {
            if *ino != Ino::ROOT.0 {
                *subdirectories.entry(*dir).or_default() += 1;
            }
        }
        let mut changed = Vec::new();
        for (ino, inode) in &mut self.inodes {
            let (nlink, parent) = (inode.nlink, inode.parent);
            inode.nlink = links.get(ino).copied().unwrap_or(0);
            if inode.kind == InodeKind::Directory
                && let Some(dir) = parents.get(ino)
            {
                inode.parent = *dir;
                inode.nlink = 2 + subdirectories.get(ino).copied().unwrap_or(0);
            }
            if (nlink, parent) != (inode.nlink, inode.parent) {
                changed.push(*ino);
            }
        }
        for ino in changed {
            let path = self.path(ino);
            self.act(act::INODE, format!("correct links and parent of {path}"));
        }
    }

    /// Number of inodes and the sum of their sizes.
    pub(super) fn sums(&self) -> (u64, u64) {
        let logical = self
            .inodes
            .values()
            .fold(0_u64, |sum, inode| sum.wrapping_add(inode.size));
        (self.inodes.len() as u64, logical)
    }

    /// All records, in order.
    ///
    /// # Errors
    /// `NoSpace` if the names with one hash do not fit into a bucket.
    pub(super) fn records(&self) -> Result<BTreeMap<u128, Vec<u8>>> {
        let mut records: BTreeMap<u128, Vec<u8>> = BTreeMap::new();
        for (ino, inode) in &self.inodes {
            let at = key(*ino, KeyType::Inode, 0);
            records.insert(at, inode.encode().to_vec());
            if inode.nlink == 0 || inode.flags & FLAG_PINNED != 0 {
                records.insert(key(0, KeyType::Orphan, *ino), Vec::new());
            }
        }
        for (dir, entries) in &self.dirs {
            let mut buckets: BTreeMap<u64, Vec<Entry>> = BTreeMap::new();
            for entry in entries {
                let hash = name_hash(&self.hash_key, &entry.name) << 8;
                buckets.entry(hash).or_default().push(entry.clone());
            }
            for (hash, entries) in buckets {
                let at = key(*dir, KeyType::Entries, hash);
                records.insert(at, encode_entries(&entries)?);
            }
        }
        for (serial, root) in &self.detached {
            let at = key(0, KeyType::Detached, *serial);
            records.insert(at, root.encode().to_vec());
        }
        records.extend(self.pieces.iter().map(|(at, piece)| (*at, piece.clone())));
        Ok(records)
    }
}

/// True if going up from `ino` comes back to it.
fn is_in_circle(ino: u64, parents: &[(u64, u64)]) -> bool {
    let mut at = ino;
    for _ in 0..parents.len() {
        let Ok(i) = parents.binary_search_by_key(&at, |parent| parent.0) else {
            return false;
        };
        at = parents[i].1;
        if at == ino {
            return true;
        }
    }
    false
}
