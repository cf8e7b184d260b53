//! Values of the small fixed-size trees: extents, refcounts, groups; and references to nodes.

use super::{get_u32, get_u64, put_u32, put_u64};
use crate::error::{Error, Result};

/// A run of blocks of the pool; or of lost ones, which have no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First block; 0: what was here is lost, and reading it is an error.
    pub block: u64,
    /// Number of blocks, at least 1.
    pub len: u32,
}

impl Extent {
    /// True if a repair found nothing of what was here: no block of the pool belongs to it.
    pub fn is_lost(&self) -> bool {
        self.block == 0
    }

    /// The first block behind the run.
    pub fn end(&self) -> u64 {
        self.block + u64::from(self.len)
    }

    /// The part of the run that starts `skip` blocks into it.
    pub(crate) fn tail(&self, skip: u32) -> Self {
        assert!(skip < self.len);
        let block = match self.is_lost() {
            true => 0,
            false => self.block + u64::from(skip),
        };
        Self {
            block,
            len: self.len - skip,
        }
    }

    /// The first `len` blocks of the run.
    pub(crate) fn head(&self, len: u32) -> Self {
        assert!(len >= 1 && len <= self.len);
        Self {
            block: self.block,
            len,
        }
    }
}

/// Size of an extent value: block (48 bits) and flags (16 bits), length, bytes on the pool.
pub const EXTENT_LEN: usize = 16;
/// Offset of the pool block and the flags: the low 48 bits are the block.
pub const EXTENT_BLOCK: usize = 0;
/// Offset of the length in blocks.
pub const EXTENT_COUNT: usize = 8;
/// Offset of the length in bytes of a transformed (compressed, encrypted) extent; 0: plain.
pub const EXTENT_STORED: usize = 12;

/// Flag, above the block number: what was here is lost; the block number is 0.
pub const EXTENT_FLAG_LOST: u64 = 1 << 48;

/// Largest block number: 2^48 blocks of 4 KiB are 1 EiB.
pub const BLOCK_MAX: u64 = (1 << 48) - 1;
/// Longest extent, in blocks: sums of two lengths do not overflow.
pub const EXTENT_BLOCKS_MAX: u32 = 1 << 30;

/// Encodes the value of an extent record; its key is the first file block.
pub fn encode_extent(extent: Extent) -> [u8; EXTENT_LEN] {
    assert!(extent.block <= BLOCK_MAX && extent.len > 0 && extent.len <= EXTENT_BLOCKS_MAX);
    let mut value = [0; EXTENT_LEN];
    let flags = if extent.is_lost() {
        EXTENT_FLAG_LOST
    } else {
        0
    };
    put_u64(&mut value, EXTENT_BLOCK, extent.block | flags);
    put_u32(&mut value, EXTENT_COUNT, extent.len);
    value
}

/// Decodes the value of an extent record.
///
/// # Errors
/// `Corrupt` for flags this version does not know, an empty or too long run, one at block 0 that
/// is not lost, or a lost one elsewhere.
pub fn decode_extent(value: &[u8]) -> Result<Extent> {
    if value.len() != EXTENT_LEN {
        return Err(Error::corrupt(format!(
            "extent has a wrong length: len={}",
            value.len()
        )));
    }
    let raw = get_u64(value, EXTENT_BLOCK);
    let extent = Extent {
        block: raw & BLOCK_MAX,
        len: get_u32(value, EXTENT_COUNT),
    };
    let flags = raw & !BLOCK_MAX;
    if flags & !EXTENT_FLAG_LOST != 0 || get_u32(value, EXTENT_STORED) != 0 {
        return Err(Error::corrupt(format!(
            "extent has unknown flags: flags={}",
            raw >> 48
        )));
    }
    let misplaced = extent.is_lost() != (flags == EXTENT_FLAG_LOST);
    if extent.len == 0 || extent.len > EXTENT_BLOCKS_MAX || misplaced {
        return Err(Error::corrupt(format!(
            "extent is empty, too long or at block 0: block={} len={}",
            extent.block, extent.len
        )));
    }
    Ok(extent)
}

/// Size of a refcount value: length of the run and its count; the key is its first block.
pub const REFS_LEN: usize = 8;

/// Encodes a refcount value.
pub fn encode_refs(len: u32, count: u32) -> [u8; REFS_LEN] {
    assert!(len > 0 && count > 0);
    let mut value = [0; REFS_LEN];
    put_u32(&mut value, 0, len);
    put_u32(&mut value, 4, count);
    value
}

/// Decodes a refcount value into length and count.
///
/// # Errors
/// `Corrupt` for an empty run or a count of zero (free blocks have no record).
pub fn decode_refs(value: &[u8]) -> Result<(u32, u32)> {
    if value.len() != REFS_LEN {
        return Err(Error::corrupt("refcount record has a wrong length"));
    }
    let (len, count) = (get_u32(value, 0), get_u32(value, 4));
    if len == 0 || count == 0 {
        return Err(Error::corrupt(format!(
            "refcount record is empty: len={len} count={count}"
        )));
    }
    Ok((len, count))
}

/// Decodes a refcount record: first block, the block behind the last one, count.
///
/// # Errors
/// As [`decode_refs`]; also `Corrupt` for blocks that cannot be.
pub(crate) fn decode_refs_run(key: u128, value: &[u8]) -> Result<(u64, u64, u32)> {
    let (len, count) = decode_refs(value)?;
    match u64::try_from(key) {
        Ok(start) if start <= BLOCK_MAX => Ok((start, start + u64::from(len), count)),
        _ => Err(Error::corrupt(format!(
            "refcount record is of a block that cannot be: block={key}"
        ))),
    }
}

/// Size of a group value: free blocks of the group and a reserved word.
pub const GROUP_LEN: usize = 8;
/// Blocks of an allocation group: 128 MiB, so that its bitmap in memory is one block.
pub const GROUP_BLOCKS: u64 = 32 * 1024;

/// Encodes a group value.
pub fn encode_group(free: u32) -> [u8; GROUP_LEN] {
    let mut value = [0; GROUP_LEN];
    put_u32(&mut value, 0, free);
    value
}

/// Decodes a group value into the number of free blocks.
///
/// # Errors
/// `Corrupt` for more free blocks than a group has, or reserved bytes in use.
pub fn decode_group(value: &[u8]) -> Result<u32> {
    if value.len() != GROUP_LEN || get_u32(value, 4) != 0 {
        return Err(Error::corrupt("group record is malformed"));
    }
    let free = get_u32(value, 0);
    if u64::from(free) > GROUP_BLOCKS {
        return Err(Error::corrupt(format!(
            "group has too many free blocks: free={free}"
        )));
    }
    Ok(free)
}

/// Data blocks whose checksums stand in one record of the checksum tree.
pub const SUMS_PER_RECORD: u64 = 64;
/// Size of a checksum record: one CRC-32C for each block.
pub const SUMS_LEN: usize = 256; // 64 * 4 bytes

/// A pointer to a tree node together with the checksum it must have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeRef {
    /// Block of the node; 0: none.
    pub block: u64,
    /// CRC-32C of the node. Not kept up to date while the node is dirty in memory.
    pub crc: u32,
}

/// Size of a node reference: block, CRC, reserved word.
pub const NODE_REF_LEN: usize = 16;

impl NodeRef {
    pub(crate) fn encode(self) -> [u8; NODE_REF_LEN] {
        let mut value = [0; NODE_REF_LEN];
        put_u64(&mut value, 0, self.block);
        put_u32(&mut value, 8, self.crc);
        value
    }

    pub(crate) fn decode(value: &[u8]) -> Self {
        Self {
            block: get_u64(value, 0),
            crc: get_u32(value, 8),
        }
    }
}

/// The root of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Root {
    /// The root node; block 0: the tree is empty.
    pub node: NodeRef,
    /// Level of the root node: 0 if it is a leaf.
    pub level: u8,
}

/// Size of a root: block, CRC, level, three reserved bytes.
pub const ROOT_LEN: usize = 16;

/// Deepest tree that is followed. Fan-out is at least 4, so 2^48 blocks fit far below it.
pub const LEVEL_MAX: u8 = 20;

impl Root {
    /// True if the tree has no node.
    pub fn is_empty(&self) -> bool {
        self.node.block == 0
    }

    /// Encodes the root.
    pub fn encode(&self) -> [u8; ROOT_LEN] {
        let mut value = [0; ROOT_LEN];
        put_u64(&mut value, 0, self.node.block);
        put_u32(&mut value, 8, self.node.crc);
        value[12] = self.level;
        value
    }

    /// Decodes a root.
    ///
    /// # Errors
    /// `Corrupt` for an impossible level or block, or reserved bytes in use.
    pub fn decode(value: &[u8]) -> Result<Self> {
        if value.len() != ROOT_LEN
            || value[12] > LEVEL_MAX
            || value[13..16] != [0; 3]
            || get_u64(value, 0) > BLOCK_MAX
        {
            return Err(Error::corrupt("tree root is malformed"));
        }
        let node = NodeRef {
            block: get_u64(value, 0),
            crc: get_u32(value, 8),
        };
        Ok(Self {
            node,
            level: value[12],
        })
    }
}
