//! Records of the namespace tree: keys, inodes, directory buckets, pieces of long values.
//!
//! A key is (inode number, type and rest). Everything that belongs to an inode lies together,
//! and a directory's entries are ordered by a keyed hash of their names.

use super::extent::{ROOT_LEN, Root};
use super::node::VALUE_MAX;
use super::{TIME_LEN, check_reserved, get_time, get_u16, get_u32, get_u64};
use super::{put_time, put_u16, put_u32, put_u64};
use crate::error::{Error, Result};
use crate::units::{BLOCK_SIZE, Ino, Time};

/// What a key of the namespace tree is about: bits 56 to 63 of its lower half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyType {
    /// The inode record.
    Inode,
    /// A bucket of directory entries; the rest is the hash of their names (48 bits) times 256.
    Entries,
    /// A piece of an extended attribute: hash of the name (40 bits) times 65536, plus the piece.
    Xattr,
    /// A piece of the target of a symlink.
    Symlink,
    /// Inode 0: an inode without a name; the rest is its number.
    Orphan,
    /// Inode 0: an extent map that waits to be freed; the rest is a serial number.
    Detached,
}

impl KeyType {
    /// Its number on disk.
    pub fn code(self) -> u8 {
        match self {
            Self::Inode => 1,
            Self::Entries => 2,
            Self::Xattr => 3,
            Self::Symlink => 4,
            Self::Orphan => 5,
            Self::Detached => 6,
        }
    }

    /// The type with number `code`.
    pub fn from_code(code: u8) -> Option<Self> {
        [
            Self::Inode,
            Self::Entries,
            Self::Xattr,
            Self::Symlink,
            Self::Orphan,
            Self::Detached,
        ]
        .into_iter()
        .find(|kind| kind.code() == code)
    }
}

/// Largest rest of a key, and so the largest inode number.
pub const REST_MAX: u64 = (1 << 56) - 1;

/// The key of a namespace record.
pub fn key(ino: u64, kind: KeyType, rest: u64) -> u128 {
    assert!(rest <= REST_MAX);
    u128::from(ino) << 64 | u128::from(u64::from(kind.code()) << 56 | rest)
}

/// Inode number, type code and rest of a key.
pub fn split_key(key: u128) -> (u64, u8, u64) {
    let low = key as u64;
    ((key >> 64) as u64, (low >> 56) as u8, low & REST_MAX)
}

/// Largest file, in bytes: 2^55, so that block numbers and sums never overflow.
pub const FILE_SIZE_MAX: u64 = 1 << 55;
/// Blocks of the largest file.
pub const FILE_BLOCKS_MAX: u64 = FILE_SIZE_MAX / BLOCK_SIZE as u64;
/// Largest number of an inode, or of a detached extent map: half of what a key holds, so that
/// there is always a next one.
pub const NUMBER_MAX: u64 = REST_MAX / 2;

/// Size of an inode record.
pub const INODE_LEN: usize = 160;
/// Offset of the kind (u8): 1 regular, 2 directory, 3 symlink, 4 fifo, 5 socket, 6 character
/// device, 7 block device.
pub const INODE_KIND: usize = 0;
/// Offset of the flags (u8): 1 = a clone in pieces, its map reaches beyond its size.
pub const INODE_FLAGS: usize = 1;
/// Offset of the mode, the low 12 bits of `st_mode` (u16).
pub const INODE_MODE: usize = 2;
/// Offset of the number of hard links (u32).
pub const INODE_NLINK: usize = 4;
/// Offset of the owner (u32).
pub const INODE_UID: usize = 8;
/// Offset of the group (u32).
pub const INODE_GID: usize = 12;
/// Offset of the device number (u32).
pub const INODE_RDEV: usize = 16;
/// Offset of the generation it was created in (u64).
pub const INODE_GENERATION: usize = 24;
/// Offset of the size in bytes (u64).
pub const INODE_SIZE: usize = 32;
/// Offset of the number of mapped blocks (u64).
pub const INODE_MAPPED: usize = 40;
/// Offset of the parent directory of a directory, else 0 (u64).
pub const INODE_PARENT: usize = 48;
/// Offset of the root of the extent map.
pub const INODE_ROOT: usize = 56;
/// Offset of the time of the last access.
pub const INODE_ATIME: usize = INODE_ROOT + ROOT_LEN;
/// Offset of the time of the last change of the contents.
pub const INODE_MTIME: usize = INODE_ATIME + TIME_LEN;
/// Offset of the time of the last change.
pub const INODE_CTIME: usize = INODE_MTIME + TIME_LEN;
/// Offset of the time of creation.
pub const INODE_BTIME: usize = INODE_CTIME + TIME_LEN;
/// Offset of the inode it is a clone of, 0 if none (u64).
pub const INODE_ORIGIN: usize = INODE_BTIME + TIME_LEN;
/// Offset of the generation of that inode (u64).
pub const INODE_ORIGIN_GENERATION: usize = INODE_ORIGIN + 8;
/// Offset of the time of the clone.
pub const INODE_ORIGIN_TIME: usize = INODE_ORIGIN_GENERATION + 8;
const INODE_END: usize = INODE_ORIGIN_TIME + TIME_LEN;
const _: () = assert!(INODE_END <= INODE_LEN && INODE_LEN <= VALUE_MAX);

/// A clone in pieces whose map reaches beyond its size.
pub const FLAG_PINNED: u8 = 1;

/// Kind of an inode on disk; the numbers are those of [`INODE_KIND`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum InodeKind {
    Regular,
    Directory,
    Symlink,
    Fifo,
    Socket,
    CharDevice,
    BlockDevice,
}

impl InodeKind {
    const ALL: [Self; 7] = [
        Self::Regular,
        Self::Directory,
        Self::Symlink,
        Self::Fifo,
        Self::Socket,
        Self::CharDevice,
        Self::BlockDevice,
    ];

    /// Its number on disk.
    pub fn code(self) -> u8 {
        match self {
            Self::Regular => 1,
            Self::Directory => 2,
            Self::Symlink => 3,
            Self::Fifo => 4,
            Self::Socket => 5,
            Self::CharDevice => 6,
            Self::BlockDevice => 7,
        }
    }

    /// The kind with number `code`.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }
}

/// An inode record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    /// What it is.
    pub kind: InodeKind,
    /// [`FLAG_PINNED`] or 0.
    pub flags: u8,
    /// Permission, set-id and sticky bits.
    pub mode: u16,
    /// Hard links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number.
    pub rdev: u32,
    /// Generation it was created in.
    pub generation: u64,
    /// Size in bytes.
    pub size: u64,
    /// Mapped blocks.
    pub mapped: u64,
    /// Parent of a directory.
    pub parent: u64,
    /// Extent map of a regular file.
    pub root: Root,
    /// Last access.
    pub atime: Time,
    /// Last change of the contents.
    pub mtime: Time,
    /// Last change.
    pub ctime: Time,
    /// Creation.
    pub btime: Time,
    /// Inode it is a clone of, or 0.
    pub origin: u64,
    /// Generation of the origin.
    pub origin_generation: u64,
    /// Time of the clone.
    pub origin_time: Time,
}

impl Inode {
    /// Encodes the record.
    pub fn encode(&self) -> [u8; INODE_LEN] {
        let mut b = [0; INODE_LEN];
        b[INODE_KIND] = self.kind.code();
        b[INODE_FLAGS] = self.flags;
        put_u16(&mut b, INODE_MODE, self.mode);
        put_u32(&mut b, INODE_NLINK, self.nlink);
        put_u32(&mut b, INODE_UID, self.uid);
        put_u32(&mut b, INODE_GID, self.gid);
        put_u32(&mut b, INODE_RDEV, self.rdev);
        put_u64(&mut b, INODE_GENERATION, self.generation);
        put_u64(&mut b, INODE_SIZE, self.size);
        put_u64(&mut b, INODE_MAPPED, self.mapped);
        put_u64(&mut b, INODE_PARENT, self.parent);
        b[INODE_ROOT..INODE_ROOT + ROOT_LEN].copy_from_slice(&self.root.encode());
        put_time(&mut b, INODE_ATIME, self.atime);
        put_time(&mut b, INODE_MTIME, self.mtime);
        put_time(&mut b, INODE_CTIME, self.ctime);
        put_time(&mut b, INODE_BTIME, self.btime);
        put_u64(&mut b, INODE_ORIGIN, self.origin);
        put_u64(&mut b, INODE_ORIGIN_GENERATION, self.origin_generation);
        put_time(&mut b, INODE_ORIGIN_TIME, self.origin_time);
        b
    }

    /// Decodes a record.
    ///
    /// # Errors
    /// `Corrupt` for a wrong length, unknown kind or flags, an impossible size, or reserved bytes
    /// in use.
    pub fn decode(b: &[u8]) -> Result<Self> {
        if b.len() != INODE_LEN {
            return Err(Error::corrupt(format!(
                "inode record has a wrong length: len={}",
                b.len()
            )));
        }
        let Some(kind) = InodeKind::from_code(b[INODE_KIND]) else {
            return Err(Error::corrupt(format!(
                "inode has an unknown kind: kind={}",
                b[INODE_KIND]
            )));
        };
        if b[INODE_FLAGS] & !FLAG_PINNED != 0 {
            return Err(Error::corrupt(format!(
                "inode has unknown flags: {}",
                b[INODE_FLAGS]
            )));
        }
        check_reserved(&b[INODE_RDEV + 4..INODE_GENERATION], "inode record")?;
        check_reserved(&b[INODE_END..], "inode record")?;
        let (size, mapped) = (get_u64(b, INODE_SIZE), get_u64(b, INODE_MAPPED));
        if size > FILE_SIZE_MAX || mapped > FILE_BLOCKS_MAX {
            return Err(Error::corrupt(format!(
                "inode has an impossible size: size={size} mapped={mapped}"
            )));
        }
        Ok(Self {
            kind,
            flags: b[INODE_FLAGS],
            mode: get_u16(b, INODE_MODE),
            nlink: get_u32(b, INODE_NLINK),
            uid: get_u32(b, INODE_UID),
            gid: get_u32(b, INODE_GID),
            rdev: get_u32(b, INODE_RDEV),
            generation: get_u64(b, INODE_GENERATION),
            size,
            mapped,
            parent: get_u64(b, INODE_PARENT),
            root: Root::decode(&b[INODE_ROOT..INODE_ROOT + ROOT_LEN])?,
            atime: get_time(b, INODE_ATIME),
            mtime: get_time(b, INODE_MTIME),
            ctime: get_time(b, INODE_CTIME),
            btime: get_time(b, INODE_BTIME),
            origin: get_u64(b, INODE_ORIGIN),
            origin_generation: get_u64(b, INODE_ORIGIN_GENERATION),
            origin_time: get_time(b, INODE_ORIGIN_TIME),
        })
    }
}

/// Longest name of a directory entry or extended attribute, in bytes.
pub const NAME_MAX: usize = 255;
/// Longest value of an extended attribute, in bytes: the limit of Linux.
pub const XATTR_VALUE_MAX: usize = 64 * 1024;
/// Longest target of a symlink, in bytes.
pub const TARGET_MAX: usize = 4095;

/// One entry of a bucket: inode (u64), kind (u8), length of the name (u8), name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The inode.
    pub ino: Ino,
    /// Its kind.
    pub kind: InodeKind,
    /// The name.
    pub name: Vec<u8>,
}

const ENTRY_HEAD: usize = 10;

/// Encodes a bucket: the entries whose names have one hash.
///
/// # Errors
/// `NoSpace` if they do not fit: names chosen to collide.
pub fn encode_entries(entries: &[Entry]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for entry in entries {
        assert!(!entry.name.is_empty() && entry.name.len() <= NAME_MAX);
        out.extend_from_slice(&entry.ino.0.to_le_bytes());
        out.push(entry.kind.code());
        out.push(entry.name.len() as u8);
        out.extend_from_slice(&entry.name);
    }
    if out.len() > VALUE_MAX {
        return Err(Error::new(
            crate::error::Kind::NoSpace,
            "too many names of one directory have the same hash",
        ));
    }
    Ok(out)
}

/// True if a directory entry can have this name: 1 to 255 bytes, no '/', no NUL, not "." or "..".
pub fn is_name(name: &[u8]) -> bool {
    (1..=NAME_MAX).contains(&name.len())
        && !name.contains(&b'/')
        && !name.contains(&0)
        && name != b"."
        && name != b".."
}

/// Decodes a bucket.
///
/// # Errors
/// `Corrupt` for an empty or cut bucket, an unknown kind, or a name that cannot be one.
pub fn decode_entries(mut b: &[u8]) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    while !b.is_empty() {
        let bad = || Error::corrupt("directory entry is malformed");
        if b.len() < ENTRY_HEAD || b.len() < ENTRY_HEAD + usize::from(b[9]) || b[9] == 0 {
            return Err(bad());
        }
        let (entry, rest) = b.split_at(ENTRY_HEAD + usize::from(b[9]));
        let name = entry[ENTRY_HEAD..].to_vec();
        let kind = InodeKind::from_code(entry[8]).ok_or_else(bad)?;
        if !is_name(&name) {
            return Err(bad());
        }
        entries.push(Entry {
            ino: Ino(get_u64(entry, 0)),
            kind,
            name,
        });
        b = rest;
    }
    if entries.is_empty() {
        return Err(Error::corrupt("directory bucket is empty"));
    }
    Ok(entries)
}

/// Decodes an extended attribute, its pieces joined: lengths of name (u16) and value (u32), name,
/// value.
///
/// # Errors
/// `Corrupt` for lengths that do not add up, or that nobody can ask for.
pub fn decode_xattr(raw: &[u8]) -> Result<(&[u8], &[u8])> {
    let bad = || Error::corrupt("extended attribute is malformed");
    if raw.len() < 6 {
        return Err(bad());
    }
    let (name_len, value_len) = (usize::from(get_u16(raw, 0)), get_u32(raw, 2) as usize);
    if raw.len() != 6 + name_len + value_len
        || !(1..=NAME_MAX).contains(&name_len)
        || value_len > XATTR_VALUE_MAX
    {
        return Err(bad());
    }
    Ok(raw[6..].split_at(name_len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_round_trips_and_refuses_bad_names() {
        let entry = |name: &[u8]| Entry {
            ino: Ino(5),
            kind: InodeKind::Regular,
            name: name.into(),
        };
        let entries = vec![entry(b"gold.vhd"), entry(&[b'x'; 255])];
        let bytes = encode_entries(&entries).unwrap();
        assert_eq!(decode_entries(&bytes).unwrap(), entries);
        assert!(decode_entries(&bytes[..bytes.len() - 1]).is_err());
        for name in [&b".."[..], b"a/b", b"a\0b"] {
            let bytes = encode_entries(&[entry(name)]).unwrap();
            assert!(decode_entries(&bytes).is_err());
        }
    }
}
