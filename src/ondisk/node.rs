//! A node of a copy-on-write B+tree: one block, used in memory in the form it has on disk.
//!
//! Invariants:
//!
//! 1. Keys ascend strictly. The key of an interior record is at most every key below it.
//! 2. A leaf of the namespace has variable-size values: a slot array that grows up and a heap
//!    that grows down; `heap` is the lowest used byte, `dead` the bytes of removed values.
//!    Every other node is a dense array of fixed-size records.
//! 3. [`Node::verify`] has checked counts, offsets, order, checksum, kind and address, so the
//!    accessors may index without failing.

use super::extent::{
    BLOCK_MAX, EXTENT_LEN, GROUP_LEN, LEVEL_MAX, NODE_REF_LEN, NodeRef, REFS_LEN, SUMS_LEN,
};
use super::{Page, check_reserved, get_u16, get_u32, get_u64, page_crc};
use super::{put_u16, put_u32, put_u64};
use crate::error::{Error, Result};
use crate::units::BLOCK_SIZE;

/// "NDPN": a node.
pub const NODE_MAGIC: u32 = 0x4e50_444e;
/// Offset of the magic number (u32).
pub const NODE_MAGIC_AT: usize = 0;
/// Offset of the kind (u8).
pub const NODE_KIND: usize = 4;
/// Offset of the level (u8): 0 for a leaf.
pub const NODE_LEVEL: usize = 5;
/// Offset of the number of records (u16).
pub const NODE_COUNT: usize = 6;
/// Offset of the node's own block number (u64).
pub const NODE_ADDR: usize = 8;
/// Offset of the generation it was written in (u64).
pub const NODE_GENERATION: usize = 16;
/// Offset of the CRC-32C (u32).
pub const NODE_CRC: usize = 24;
/// Offset of the lowest used heap byte (u16), variable leaves only, else 0.
pub const NODE_HEAP: usize = 28;
/// Offset of the number of dead heap bytes (u16), variable leaves only, else 0.
pub const NODE_DEAD: usize = 30;
/// Offset of the pool's identity, the first 8 bytes of its UUID (u64).
pub const NODE_POOL: usize = 32;
/// Offset of the first record.
pub const NODE_RECORDS: usize = 64;

/// Bytes of a slot of a variable leaf: key (16), offset (u16), length (u16).
pub const SLOT_LEN: usize = 20;
/// Largest value of a variable leaf. Four of them fit into a node, so splitting always works.
pub const VALUE_MAX: usize = 960;

const CAPACITY: usize = BLOCK_SIZE - NODE_RECORDS; // 4032 bytes

/// Which tree a node belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TreeKind {
    /// Inodes, directory entries, symlink targets, extended attributes, orphans.
    Namespace,
    /// The extents of one file. The only kind whose nodes are shared.
    Extents,
    /// Reference counts of blocks.
    Refs,
    /// Checksums of data blocks.
    Sums,
    /// Free blocks of each allocation group.
    Groups,
}

impl TreeKind {
    /// All kinds.
    pub const ALL: [TreeKind; 5] = [
        Self::Namespace,
        Self::Extents,
        Self::Refs,
        Self::Sums,
        Self::Groups,
    ];

    /// Its number on disk.
    pub fn code(self) -> u8 {
        match self {
            Self::Namespace => 1,
            Self::Extents => 2,
            Self::Refs => 3,
            Self::Sums => 4,
            Self::Groups => 5,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }

    /// Bytes of a key.
    pub fn key_len(self) -> usize {
        if self == Self::Namespace { 16 } else { 8 }
    }

    /// Bytes of a leaf value; `None` if it varies.
    pub fn value_len(self) -> Option<usize> {
        match self {
            Self::Namespace => None,
            Self::Extents => Some(EXTENT_LEN),
            Self::Refs => Some(REFS_LEN),
            Self::Sums => Some(SUMS_LEN),
            Self::Groups => Some(GROUP_LEN),
        }
    }
}

/// A tree node. See the module for what it keeps true.
#[derive(Clone)]
pub struct Node {
    page: Box<Page>,
    kind: TreeKind,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Node({:?} level={} count={} addr={} generation={})",
            self.kind,
            self.level(),
            self.count(),
            self.addr(),
            self.generation()
        )
    }
}

impl Node {
    /// An empty node.
    pub fn new(kind: TreeKind, level: u8, addr: u64, generation: u64, pool: u64) -> Self {
        let mut node = Self {
            page: Box::new([0; BLOCK_SIZE]),
            kind,
        };
        put_u32(&mut node.page[..], NODE_MAGIC_AT, NODE_MAGIC);
        node.page[NODE_KIND] = kind.code();
        node.page[NODE_LEVEL] = level;
        put_u64(&mut node.page[..], NODE_POOL, pool);
        if node.is_variable() {
            put_u16(&mut node.page[..], NODE_HEAP, BLOCK_SIZE as u16);
        }
        node.relocate(addr, generation);
        node
    }

    /// Checks the bytes of a block that should be the node `at` of tree `kind` at `level`.
    ///
    /// # Errors
    /// `Corrupt`, with what is wrong.
    pub fn verify(
        page: Box<Page>,
        kind: TreeKind,
        level: u8,
        at: NodeRef,
        pool: u64,
    ) -> Result<Self> {
        let bad = |what: &str| {
            Err(Error::corrupt(format!(
                "tree node is damaged: {what} block={} kind={kind:?} level={level}",
                at.block
            )))
        };
        if get_u32(&page[..], NODE_MAGIC_AT) != NODE_MAGIC {
            return bad("no node is there");
        }
        let crc = page_crc(&page[..], NODE_CRC);
        if crc != get_u32(&page[..], NODE_CRC) {
            return bad("its checksum does not match");
        }
        if crc != at.crc {
            return bad("it is another version than its parent wrote");
        }
        if get_u64(&page[..], NODE_ADDR) != at.block {
            return bad("it belongs to another block");
        }
        if get_u64(&page[..], NODE_POOL) != pool {
            return bad("it belongs to another pool");
        }
        if TreeKind::from_code(page[NODE_KIND]) != Some(kind) {
            return bad("it belongs to another tree");
        }
        if page[NODE_LEVEL] != level || level > LEVEL_MAX {
            return bad("it is on another level");
        }
        check_reserved(&page[NODE_POOL + 8..NODE_RECORDS], "node header")?;
        let node = Self { page, kind };
        if !node.is_well_formed() {
            return bad("its records are malformed");
        }
        Ok(node)
    }

    /// The node that a block holds by its own account: sound, and at its place. Whether it is the
    /// newest one there only its parent tells.
    ///
    /// # Errors
    /// `Corrupt` if the block holds no such node.
    pub fn at_block(page: Box<Page>, block: u64, pool: u64) -> Result<Self> {
        let Some(kind) = TreeKind::from_code(page[NODE_KIND]) else {
            return Err(Error::corrupt(format!("no node is there: block={block}")));
        };
        let (level, crc) = (page[NODE_LEVEL], get_u32(&page[..], NODE_CRC));
        Self::verify(page, kind, level, NodeRef { block, crc }, pool)
    }

    fn is_well_formed(&self) -> bool {
        let count = self.count();
        if count == 0 || count * self.stride() > CAPACITY {
            return false;
        }
        if (1..count).any(|i| self.key(i - 1) >= self.key(i)) {
            return false;
        }
        if self.level() > 0 {
            // Block numbers in range, reserved bytes zero.
            return (0..count).all(|i| {
                let child = self.child(i);
                (1..=BLOCK_MAX).contains(&child.block) && child.encode() == self.value(i)
            });
        }
        if !self.is_variable() {
            return true;
        }
        let heap = usize::from(get_u16(&self.page[..], NODE_HEAP));
        if heap > BLOCK_SIZE || heap < NODE_RECORDS + count * SLOT_LEN {
            return false;
        }
        let mut live = 0;
        for i in 0..count {
            let (at, len) = self.slot(i);
            if at < heap || at + len > BLOCK_SIZE || len > VALUE_MAX {
                return false;
            }
            live += len;
        }
        live + usize::from(get_u16(&self.page[..], NODE_DEAD)) == BLOCK_SIZE - heap
    }

    /// The bytes as they go to the device.
    pub fn page(&self) -> &Page {
        &self.page
    }

    /// Which tree it belongs to.
    pub fn kind(&self) -> TreeKind {
        self.kind
    }

    /// 0 for a leaf.
    pub fn level(&self) -> u8 {
        self.page[NODE_LEVEL]
    }

    /// Number of records.
    pub fn count(&self) -> usize {
        usize::from(get_u16(&self.page[..], NODE_COUNT))
    }

    /// Its own block.
    pub fn addr(&self) -> u64 {
        get_u64(&self.page[..], NODE_ADDR)
    }

    /// The generation it was made or changed in.
    pub fn generation(&self) -> u64 {
        get_u64(&self.page[..], NODE_GENERATION)
    }

    /// The stored checksum; valid after [`seal`](Self::seal).
    pub fn crc(&self) -> u32 {
        get_u32(&self.page[..], NODE_CRC)
    }

    /// Computes and stores the checksum; the node must not change afterwards.
    pub fn seal(&mut self) -> u32 {
        let crc = page_crc(&self.page[..], NODE_CRC);
        put_u32(&mut self.page[..], NODE_CRC, crc);
        crc
    }

    /// Gives a copy its own place.
    pub(crate) fn relocate(&mut self, addr: u64, generation: u64) {
        put_u64(&mut self.page[..], NODE_ADDR, addr);
        put_u64(&mut self.page[..], NODE_GENERATION, generation);
        put_u32(&mut self.page[..], NODE_CRC, 0);
    }

    fn is_variable(&self) -> bool {
        self.level() == 0 && self.kind.value_len().is_none()
    }

    /// Bytes from one record (or slot) to the next.
    fn stride(&self) -> usize {
        match (self.level(), self.kind.value_len()) {
            (0, Some(len)) => self.kind.key_len() + len,
            (0, None) => SLOT_LEN,
            _ => self.kind.key_len() + NODE_REF_LEN,
        }
    }

    /// Key of record `i`.
    pub fn key(&self, i: usize) -> u128 {
        let at = NODE_RECORDS + i * self.stride();
        let low = u128::from(get_u64(&self.page[..], at));
        if self.kind.key_len() == 8 {
            low
        } else {
            low | u128::from(get_u64(&self.page[..], at + 8)) << 64
        }
    }

    /// Position of `key`, or where it would be inserted.
    pub fn find(&self, key: u128) -> std::result::Result<usize, usize> {
        if self.kind.key_len() == 16 {
            // Both halves in one: they are little-endian, and the lower one comes first.
            return self.search::<16, _>(|bytes| u128::from_le_bytes(bytes).cmp(&key));
        }
        match u64::try_from(key) {
            Ok(key) => self.search::<8, _>(|bytes| u64::from_le_bytes(bytes).cmp(&key)),
            Err(_) => Err(self.count()),
        }
    }

    /// Searches keys of `LEN` bytes, which `compare` compares with the one that is wanted.
    fn search<const LEN: usize, F>(&self, compare: F) -> std::result::Result<usize, usize>
    where
        F: Fn([u8; LEN]) -> std::cmp::Ordering,
    {
        let stride = self.stride();
        let (mut low, mut high) = (0, self.count());
        while low < high {
            let mid = (low + high) / 2;
            let mut bytes = [0; LEN];
            let at = NODE_RECORDS + mid * stride;
            bytes.copy_from_slice(&self.page[at..at + LEN]);
            match compare(bytes) {
                std::cmp::Ordering::Equal => return Ok(mid),
                std::cmp::Ordering::Less => low = mid + 1,
                std::cmp::Ordering::Greater => high = mid,
            }
        }
        Err(low)
    }

    /// Position of the child whose range holds `key` (the first one for smaller keys).
    pub fn child_index(&self, key: u128) -> usize {
        match self.find(key) {
            Ok(i) => i,
            Err(i) => i.saturating_sub(1),
        }
    }

    fn slot(&self, i: usize) -> (usize, usize) {
        let at = NODE_RECORDS + i * SLOT_LEN + 16;
        (
            usize::from(get_u16(&self.page[..], at)),
            usize::from(get_u16(&self.page[..], at + 2)),
        )
    }

    /// Value of record `i`: of a leaf what was inserted, of an interior node a node reference.
    pub fn value(&self, i: usize) -> &[u8] {
        assert!(i < self.count());
        if self.is_variable() {
            let (at, len) = self.slot(i);
            return &self.page[at..at + len];
        }
        let at = NODE_RECORDS + i * self.stride();
        &self.page[at + self.kind.key_len()..at + self.stride()]
    }

    /// Child `i` of an interior node.
    pub fn child(&self, i: usize) -> NodeRef {
        assert!(self.level() > 0);
        NodeRef::decode(self.value(i))
    }

    /// Points child `i` elsewhere.
    pub(crate) fn set_child(&mut self, i: usize, child: NodeRef) {
        assert!(self.level() > 0);
        self.set_value(i, &child.encode());
    }

    /// Changes the key of record `i`; the order must stay.
    pub(crate) fn set_key(&mut self, i: usize, key: u128) {
        let at = NODE_RECORDS + i * self.stride();
        self.put_key(at, key);
    }

    fn put_key(&mut self, at: usize, key: u128) {
        put_u64(&mut self.page[..], at, key as u64);
        if self.kind.key_len() == 16 {
            put_u64(&mut self.page[..], at + 8, (key >> 64) as u64);
        } else {
            assert!(key >> 64 == 0);
        }
    }

    fn set_count(&mut self, count: usize) {
        put_u16(&mut self.page[..], NODE_COUNT, count as u16);
    }

    /// Bytes of records, slots and live values.
    pub(crate) fn used(&self) -> usize {
        let fixed = self.count() * self.stride();
        if self.is_variable() {
            let heap = usize::from(get_u16(&self.page[..], NODE_HEAP));
            fixed + BLOCK_SIZE - heap - usize::from(get_u16(&self.page[..], NODE_DEAD))
        } else {
            fixed
        }
    }

    /// True if another record with a value of `value_len` bytes fits.
    pub fn fits(&self, value_len: usize) -> bool {
        let more = if self.is_variable() {
            SLOT_LEN + value_len
        } else {
            self.stride()
        };
        self.used() + more <= CAPACITY
    }

    /// True if all records of `other` fit as well.
    pub(crate) fn fits_all(&self, other: &Self) -> bool {
        self.used() + other.used() <= CAPACITY
    }

    /// Inserts a record at position `i`. It must fit and keep the order.
    pub fn insert(&mut self, i: usize, key: u128, value: &[u8]) {
        let count = self.count();
        assert!(i <= count && self.fits(value.len()));
        assert!(i == 0 || self.key(i - 1) < key);
        assert!(i == count || key < self.key(i));
        let stride = self.stride();
        if self.is_variable() {
            assert!(value.len() <= VALUE_MAX);
            let heap = usize::from(get_u16(&self.page[..], NODE_HEAP));
            if heap < NODE_RECORDS + (count + 1) * SLOT_LEN + value.len() {
                self.compact();
            }
        }
        let at = NODE_RECORDS + i * stride;
        self.page
            .copy_within(at..NODE_RECORDS + count * stride, at + stride);
        self.put_key(at, key);
        if self.is_variable() {
            let heap = usize::from(get_u16(&self.page[..], NODE_HEAP)) - value.len();
            self.page[heap..heap + value.len()].copy_from_slice(value);
            put_u16(&mut self.page[..], NODE_HEAP, heap as u16);
            put_u16(&mut self.page[..], at + 16, heap as u16);
            put_u16(&mut self.page[..], at + 18, value.len() as u16);
        } else {
            let from = at + self.kind.key_len();
            assert_eq!(value.len(), at + stride - from);
            self.page[from..at + stride].copy_from_slice(value);
        }
        self.set_count(count + 1);
    }

    /// Replaces the value of record `i`. False, and nothing changed, if it does not fit.
    pub fn set_value(&mut self, i: usize, value: &[u8]) -> bool {
        assert!(i < self.count());
        if !self.is_variable() {
            let end = NODE_RECORDS + (i + 1) * self.stride();
            self.page[end - value.len()..end].copy_from_slice(value);
            return true;
        }
        let (at, len) = self.slot(i);
        if len == value.len() {
            self.page[at..at + len].copy_from_slice(value);
            return true;
        }
        if self.used() - len + value.len() > CAPACITY {
            return false;
        }
        let key = self.key(i);
        self.remove(i);
        self.insert(i, key, value);
        true
    }

    /// Removes record `i`.
    pub fn remove(&mut self, i: usize) {
        let count = self.count();
        assert!(i < count);
        let stride = self.stride();
        if self.is_variable() {
            let dead = get_u16(&self.page[..], NODE_DEAD) + self.slot(i).1 as u16;
            put_u16(&mut self.page[..], NODE_DEAD, dead);
        }
        let at = NODE_RECORDS + i * stride;
        let end = NODE_RECORDS + count * stride;
        self.page.copy_within(at + stride..end, at);
        self.page[end - stride..end].fill(0);
        self.set_count(count - 1);
    }

    /// Moves the live values together, so that the free bytes are in one piece.
    fn compact(&mut self) {
        let old = self.page.clone();
        let mut heap = BLOCK_SIZE;
        for i in 0..self.count() {
            let (at, len) = self.slot(i);
            heap -= len;
            self.page[heap..heap + len].copy_from_slice(&old[at..at + len]);
            put_u16(
                &mut self.page[..],
                NODE_RECORDS + i * SLOT_LEN + 16,
                heap as u16,
            );
        }
        let slots_end = NODE_RECORDS + self.count() * SLOT_LEN;
        self.page[slots_end..heap].fill(0);
        put_u16(&mut self.page[..], NODE_HEAP, heap as u16);
        put_u16(&mut self.page[..], NODE_DEAD, 0);
    }

    /// Moves the records from position `from` on to `right`, an empty node.
    pub fn split_into(&mut self, from: usize, right: &mut Self) {
        assert!(right.count() == 0);
        for i in from..self.count() {
            right.insert(i - from, self.key(i), self.value(i));
        }
        for i in (from..self.count()).rev() {
            self.remove(i);
        }
        if self.is_variable() {
            self.compact();
        }
    }

    /// Appends all records of `right`, which must fit and follow.
    pub fn append(&mut self, right: &Self) {
        for i in 0..right.count() {
            self.insert(self.count(), right.key(i), right.value(i));
        }
    }

    /// Where to split so that both halves hold about the same number of bytes.
    pub fn middle(&self) -> usize {
        if !self.is_variable() {
            return self.count() / 2;
        }
        let half = self.used() / 2;
        let mut sum = 0;
        for i in 0..self.count() {
            sum += SLOT_LEN + self.slot(i).1;
            if sum >= half {
                return (i + 1).min(self.count() - 1).max(1);
            }
        }
        self.count() / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(mut node: Node) -> (Box<Page>, NodeRef) {
        let crc = node.seal();
        (
            node.page.clone(),
            NodeRef {
                block: node.addr(),
                crc,
            },
        )
    }

    #[test]
    fn variable_leaf_inserts_replaces_and_compacts() {
        let mut node = Node::new(TreeKind::Namespace, 0, 7, 1, 9);
        for key in 0..20_u128 {
            let i = node.find(key << 64 | 1).unwrap_err();
            node.insert(i, key << 64 | 1, &[key as u8; 100]);
        }
        for key in (0..20_u128).step_by(2) {
            let i = node.find(key << 64 | 1).unwrap();
            node.remove(i);
        }
        assert!(node.fits(900));
        node.insert(0, 0, &[5; 900]);
        let i = node.find(3 << 64 | 1).unwrap();
        assert!(node.set_value(i, &[1, 2, 3]));
        let (page, at) = sealed(node);
        let node = Node::verify(page, TreeKind::Namespace, 0, at, 9).unwrap();
        assert_eq!(node.count(), 11);
        assert_eq!(node.value(node.find(3 << 64 | 1).unwrap()), &[1, 2, 3]);
        assert_eq!(node.value(node.find(19 << 64 | 1).unwrap()), &[19; 100]);
    }

    #[test]
    fn every_flipped_bit_is_detected() {
        let mut node = Node::new(TreeKind::Extents, 0, 7, 1, 9);
        node.insert(0, 5, &[1; EXTENT_LEN]);
        let (page, at) = sealed(node);
        for bit in 0..BLOCK_SIZE * 8 {
            let mut damaged = page.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(
                Node::verify(damaged, TreeKind::Extents, 0, at, 9).is_err(),
                "bit {bit}"
            );
        }
    }

    #[test]
    fn wrong_kind_place_level_or_pool_is_refused() {
        let mut node = Node::new(TreeKind::Refs, 0, 7, 1, 9);
        node.insert(0, 5, &[1; REFS_LEN]);
        let (page, at) = sealed(node);
        let verify = |kind, level, at, pool| Node::verify(page.clone(), kind, level, at, pool);
        assert!(verify(TreeKind::Refs, 0, at, 9).is_ok());
        assert!(verify(TreeKind::Groups, 0, at, 9).is_err());
        assert!(verify(TreeKind::Refs, 1, at, 9).is_err());
        assert!(verify(TreeKind::Refs, 0, NodeRef { block: 8, ..at }, 9).is_err());
        assert!(verify(TreeKind::Refs, 0, at, 10).is_err());
    }
}
