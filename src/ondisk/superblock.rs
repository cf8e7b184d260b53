//! The superblock: the root of trust. Two slots and a copy of each; the newest valid one wins.

use super::extent::{ROOT_LEN, Root};
use super::inode::NUMBER_MAX;
use super::{Page, TIME_LEN, check_reserved, get_time, get_u32, get_u64, page_crc};
use super::{put_time, put_u32, put_u64};
use crate::error::{Error, Kind, Result};
use crate::units::{BLOCK_SIZE, Time};

/// First bytes of a pool: not text, with a line end that careless copies change.
pub const SB_MAGIC: [u8; 8] = *b"\x8aNODUPE\n";
/// Version of the format this program writes, and the newest it reads.
pub const SB_VERSION: u32 = 1;

/// Offset of the magic number.
pub const SB_MAGIC_AT: usize = 0;
/// Offset of the version (u32).
pub const SB_VERSION_AT: usize = 8;
/// Offset of the CRC-32C of the block, this field counted as zero (u32).
pub const SB_CRC: usize = 12;
/// Offset of the identity (16 bytes).
pub const SB_UUID: usize = 16;
/// Offset of the features without which the pool must not be opened (u64).
pub const SB_INCOMPAT: usize = 32;
/// Offset of the features without which it must not be written (u64).
pub const SB_RO_COMPAT: usize = 40;
/// Offset of the features that may be ignored (u64).
pub const SB_COMPAT: usize = 48;
/// Offset of the generation (u64): the number of this checkpoint.
pub const SB_GENERATION: usize = 56;
/// Offset of the size of the pool in blocks (u64).
pub const SB_BLOCKS: usize = 64;
/// Offset of the block size in bytes (u32).
pub const SB_BLOCK_SIZE: usize = 72;
/// Offset of the flags (u32): 1 closed cleanly, 2 journal on a device of its own, 4 allocated
/// on the host for good, 8 repaired.
pub const SB_FLAGS: usize = 76;
/// Offset of the first block of the journal ring, on its device (u64).
pub const SB_JOURNAL_START: usize = 80;
/// Offset of the blocks of the journal ring (u64).
pub const SB_JOURNAL_BLOCKS: usize = 88;
/// Offset of the sequence number of the first batch to replay (u64).
pub const SB_JOURNAL_SEQ: usize = 96;
/// Offset of its block in the ring (u64).
pub const SB_JOURNAL_POS: usize = 104;
/// Offset of the next inode number (u64).
pub const SB_NEXT_INO: usize = 112;
/// Offset of the next serial number of a detached extent map (u64).
pub const SB_NEXT_DETACHED: usize = 120;
/// Offset of the number of inodes (u64).
pub const SB_INODES: usize = 128;
/// Offset of the sum of the sizes of all files in bytes (u64).
pub const SB_LOGICAL: usize = 136;
/// Offset of the number of free blocks (u64).
pub const SB_FREE: usize = 144;
/// Offset of the secret key of the directory hash (16 bytes).
pub const SB_HASH_KEY: usize = 152;
/// Offset of the time of creation.
pub const SB_CREATED: usize = 168;
/// Offset of the root of the namespace tree.
pub const SB_NAMESPACE: usize = 184;
/// Offset of the root of the refcount tree.
pub const SB_REFS: usize = SB_NAMESPACE + ROOT_LEN;
/// Offset of the root of the checksum tree.
pub const SB_SUMS: usize = SB_REFS + ROOT_LEN;
/// Offset of the root of the group tree.
pub const SB_GROUPS: usize = SB_SUMS + ROOT_LEN;
const SB_END: usize = SB_GROUPS + ROOT_LEN;

/// The pool was closed cleanly.
pub const FLAG_CLEAN: u32 = 1;
/// A repair wrote this checkpoint: replay leaves out what has nothing to act on any more.
pub const FLAG_REPAIRED: u32 = 8;
/// The journal is on a device of its own.
pub const FLAG_EXTERNAL_JOURNAL: u32 = 2;

/// The host had allocated the whole pool when it was made: it stays so, nothing is given back.
pub const FLAG_PREALLOCATED: u32 = 4;

/// Block of slot A; slot B follows. Their copies are the last two blocks of the pool.
pub const SLOT_A: u64 = 0;
/// Number of superblock slots.
pub const SLOTS: u64 = 2;
/// Blocks before the journal or, if that is elsewhere, before the first usable block: the two
/// slots and room for what later versions need.
pub const HEAD_BLOCKS: u64 = 16;

/// Smallest pool the engine makes: 4 MiB.
pub const POOL_BLOCKS_MIN: u64 = 1024;
/// Largest pool: 1 PiB.
pub const POOL_BLOCKS_MAX: u64 = 1 << 38;
/// Smallest journal ring: 1 MiB.
pub const JOURNAL_BLOCKS_MIN: u64 = 256;

/// A superblock whose bytes were checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Identity of the pool.
    pub uuid: [u8; 16],
    /// Number of this checkpoint.
    pub generation: u64,
    /// Size of the pool in blocks.
    pub blocks: u64,
    /// [`FLAG_CLEAN`], [`FLAG_EXTERNAL_JOURNAL`], [`FLAG_PREALLOCATED`],
    /// [`FLAG_REPAIRED`].
    pub flags: u32,
    /// First block of the ring.
    pub journal_start: u64,
    /// Blocks of the ring.
    pub journal_blocks: u64,
    /// First batch to replay.
    pub journal_seq: u64,
    /// Its block in the ring.
    pub journal_pos: u64,
    /// Next inode number.
    pub next_ino: u64,
    /// Next serial number of a detached extent map.
    pub next_detached: u64,
    /// Inodes in the namespace.
    pub inodes: u64,
    /// Sum of all file sizes.
    pub logical: u64,
    /// Free blocks.
    pub free: u64,
    /// Key of the directory hash.
    pub hash_key: [u8; 16],
    /// When the pool was made.
    pub created: Time,
    /// Root of the namespace tree.
    pub namespace: Root,
    /// Root of the refcount tree.
    pub refs: Root,
    /// Root of the checksum tree.
    pub sums: Root,
    /// Root of the group tree.
    pub groups: Root,
}

impl Superblock {
    /// Identity as it stands in nodes and batches.
    pub fn pool_id(&self) -> u64 {
        get_u64(&self.uuid, 0)
    }

    /// First block that can be allocated.
    pub fn first_block(&self) -> u64 {
        if self.flags & FLAG_EXTERNAL_JOURNAL != 0 {
            HEAD_BLOCKS
        } else {
            self.journal_start + self.journal_blocks
        }
    }

    /// The block behind the last one that can be allocated: the copies of the superblock follow.
    pub fn end_block(&self) -> u64 {
        self.blocks - SLOTS
    }

    /// Encodes the block.
    pub fn encode(&self) -> Box<Page> {
        let mut b = Box::new([0; BLOCK_SIZE]);
        b[..8].copy_from_slice(&SB_MAGIC);
        put_u32(&mut b[..], SB_VERSION_AT, SB_VERSION);
        b[SB_UUID..SB_UUID + 16].copy_from_slice(&self.uuid);
        put_u64(&mut b[..], SB_GENERATION, self.generation);
        put_u64(&mut b[..], SB_BLOCKS, self.blocks);
        put_u32(&mut b[..], SB_BLOCK_SIZE, BLOCK_SIZE as u32);
        put_u32(&mut b[..], SB_FLAGS, self.flags);
        put_u64(&mut b[..], SB_JOURNAL_START, self.journal_start);
        put_u64(&mut b[..], SB_JOURNAL_BLOCKS, self.journal_blocks);
        put_u64(&mut b[..], SB_JOURNAL_SEQ, self.journal_seq);
        put_u64(&mut b[..], SB_JOURNAL_POS, self.journal_pos);
        put_u64(&mut b[..], SB_NEXT_INO, self.next_ino);
        put_u64(&mut b[..], SB_NEXT_DETACHED, self.next_detached);
        put_u64(&mut b[..], SB_INODES, self.inodes);
        put_u64(&mut b[..], SB_LOGICAL, self.logical);
        put_u64(&mut b[..], SB_FREE, self.free);
        b[SB_HASH_KEY..SB_HASH_KEY + 16].copy_from_slice(&self.hash_key);
        put_time(&mut b[..], SB_CREATED, self.created);
        for (at, root) in [
            (SB_NAMESPACE, self.namespace),
            (SB_REFS, self.refs),
            (SB_SUMS, self.sums),
            (SB_GROUPS, self.groups),
        ] {
            b[at..at + ROOT_LEN].copy_from_slice(&root.encode());
        }
        let crc = page_crc(&b[..], SB_CRC);
        put_u32(&mut b[..], SB_CRC, crc);
        b
    }

    /// Checks and decodes a block.
    ///
    /// # Errors
    /// `Corrupt` if it is no valid superblock; `Unsupported` if a newer program wrote it.
    pub fn decode(b: &Page) -> Result<Self> {
        if b[..8] != SB_MAGIC {
            return Err(Error::corrupt("no superblock is there"));
        }
        if get_u32(b, SB_CRC) != page_crc(b, SB_CRC) {
            return Err(Error::corrupt("superblock has a wrong checksum"));
        }
        let version = get_u32(b, SB_VERSION_AT);
        let features = get_u64(b, SB_INCOMPAT) | get_u64(b, SB_RO_COMPAT);
        if version != SB_VERSION || features != 0 {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "the pool has a format that this version does not know: format={version} \
                     features={features:#x} known={SB_VERSION}; use a newer nodupe"
                ),
            ));
        }
        check_reserved(&b[SB_CREATED + TIME_LEN..SB_NAMESPACE], "superblock")?;
        check_reserved(&b[SB_END..], "superblock")?;
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&b[SB_UUID..SB_UUID + 16]);
        let mut hash_key = [0; 16];
        hash_key.copy_from_slice(&b[SB_HASH_KEY..SB_HASH_KEY + 16]);
        let root = |at: usize| Root::decode(&b[at..at + ROOT_LEN]);
        let sb = Self {
            uuid,
            generation: get_u64(b, SB_GENERATION),
            blocks: get_u64(b, SB_BLOCKS),
            flags: get_u32(b, SB_FLAGS),
            journal_start: get_u64(b, SB_JOURNAL_START),
            journal_blocks: get_u64(b, SB_JOURNAL_BLOCKS),
            journal_seq: get_u64(b, SB_JOURNAL_SEQ),
            journal_pos: get_u64(b, SB_JOURNAL_POS),
            next_ino: get_u64(b, SB_NEXT_INO),
            next_detached: get_u64(b, SB_NEXT_DETACHED),
            inodes: get_u64(b, SB_INODES),
            logical: get_u64(b, SB_LOGICAL),
            free: get_u64(b, SB_FREE),
            hash_key,
            created: get_time(b, SB_CREATED),
            namespace: root(SB_NAMESPACE)?,
            refs: root(SB_REFS)?,
            sums: root(SB_SUMS)?,
            groups: root(SB_GROUPS)?,
        };
        sb.check_geometry(get_u32(b, SB_BLOCK_SIZE))?;
        Ok(sb)
    }

    fn check_geometry(&self, block_size: u32) -> Result<()> {
        let external = self.flags & FLAG_EXTERNAL_JOURNAL != 0;
        let start = if external { 0 } else { HEAD_BLOCKS };
        let known = FLAG_CLEAN | FLAG_EXTERNAL_JOURNAL | FLAG_PREALLOCATED | FLAG_REPAIRED;
        let fits = self.flags & !known == 0
            && block_size as usize == BLOCK_SIZE
            && (POOL_BLOCKS_MIN..=POOL_BLOCKS_MAX).contains(&self.blocks)
            && self.journal_start == start
            && (JOURNAL_BLOCKS_MIN..=POOL_BLOCKS_MAX).contains(&self.journal_blocks)
            && self.journal_pos < self.journal_blocks
            && self.first_block() + SLOTS < self.blocks
            && (2..=NUMBER_MAX).contains(&self.next_ino)
            && self.next_detached <= NUMBER_MAX
            && self.inodes <= NUMBER_MAX
            && self.generation < u64::MAX / 2
            && (1..u64::MAX / 2).contains(&self.journal_seq);
        if fits {
            Ok(())
        } else {
            Err(Error::corrupt("superblock describes an impossible pool"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_and_detects_every_flipped_bit() {
        let sb = Superblock {
            uuid: [3; 16],
            generation: 5,
            blocks: 4096,
            flags: FLAG_CLEAN,
            journal_start: HEAD_BLOCKS,
            journal_blocks: 256,
            journal_seq: 9,
            journal_pos: 4,
            next_ino: 2,
            next_detached: 1,
            inodes: 1,
            logical: 0,
            free: 100,
            hash_key: [1; 16],
            created: Time { secs: 1, nanos: 2 },
            namespace: Root::default(),
            refs: Root::default(),
            sums: Root::default(),
            groups: Root::default(),
        };
        let page = sb.encode();
        assert_eq!(Superblock::decode(&page).unwrap(), sb);
        for bit in 0..BLOCK_SIZE * 8 {
            let mut damaged = page.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::decode(&damaged).is_err(), "bit {bit}");
        }
    }
}
