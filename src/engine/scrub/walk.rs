//! How scrub walks trees that change meanwhile: a place at a time, by keys, so that a walk goes on
//! behind a damaged node and never holds the trees for long.
//!
//! Invariants:
//!
//! 1. A node whose keys leave the range that its parent gives it counts as damaged, so a tree that
//!    leads to a node again and again comes to an end.
//! 2. The key to go on with is always above the one asked for.

use std::collections::HashMap;
use std::sync::Arc;

use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::ondisk::extent::{GROUP_BLOCKS, NodeRef, Root};
use crate::ondisk::node::{Node, TreeKind};
use crate::units::BLOCK_SIZE;

use super::super::meta::Meta;

/// Where a descent ended: at the level asked for, or above it at a damaged node.
pub(super) struct Place {
    pub(super) at: NodeRef,
    pub(super) level: u8,
    pub(super) node: Result<Arc<Node>>,
    /// The range of keys of the node: the first one, and the first one behind it.
    pub(super) low: u128,
    pub(super) bound: Option<u128>,
    /// The nodes above it.
    pub(super) path: Vec<(NodeRef, u8)>,
}

/// Descends from `root`, which is not empty, to the node at `level` whose range holds `key`. A
/// root below that level is the node.
pub(super) fn seek(meta: &Meta, root: Root, kind: TreeKind, key: u128, level: u8) -> Place {
    let mut place = Place {
        at: root.node,
        level: root.level,
        node: Err(Error::corrupt("not read yet")),
        low: 0,
        bound: None,
        path: Vec::new(),
    };
    loop {
        // An error that does not come back is none.
        let node = meta.node(kind, place.level, place.at);
        let node = node.or_else(|_| meta.node(kind, place.level, place.at));
        place.node = node.and_then(|node| in_range(node, place.low, place.bound));
        let node = match &place.node {
            Ok(node) if place.level > level => Arc::clone(node),
            _ => return place,
        };
        place.path.push((place.at, place.level));
        let i = node.child_index(key);
        (place.low, place.bound) = child_range(&node, i, place.low, place.bound);
        place.at = node.child(i);
        place.level -= 1;
    }
}

/// The range of keys of child `i` of a node with the range `low` to `bound`. (I2)
pub(super) fn child_range(
    node: &Node,
    i: usize,
    low: u128,
    bound: Option<u128>,
) -> (u128, Option<u128>) {
    let next = (i + 1 < node.count()).then(|| node.key(i + 1));
    (low.max(node.key(i)), next.or(bound))
}

/// The node, if its keys are in its range. (I1)
pub(super) fn in_range(node: Arc<Node>, low: u128, bound: Option<u128>) -> Result<Arc<Node>> {
    let last = node.key(node.count() - 1);
    if node.key(0) < low || bound.is_some_and(|bound| last >= bound) {
        return Err(Error::corrupt(format!(
            "tree node is out of its range: block={} kind={:?}",
            node.addr(),
            node.kind()
        )));
    }
    Ok(node)
}

/// Reads a node from the device, whatever the cache holds.
pub(super) fn read_node(
    device: &dyn BlockDevice,
    pool: u64,
    kind: TreeKind,
    level: u8,
    at: NodeRef,
) -> Result<Node> {
    let mut page = Box::new([0; BLOCK_SIZE]);
    read_block(device, at.block, &mut page[..])?;
    Node::verify(page, kind, level, at, pool)
}

/// Reads one block from the device.
pub(super) fn read_block(device: &dyn BlockDevice, block: u64, bytes: &mut [u8]) -> Result<()> {
    let addr = block.checked_mul(BLOCK_SIZE as u64);
    let Some(addr) = addr.filter(|addr| *addr < device.len()) else {
        return Err(Error::corrupt(format!(
            "a tree refers to a block outside the pool: block={block}"
        )));
    };
    device
        .read_at(addr, bytes)
        .map_err(|source| Error::io(format!("cannot read the pool: block={block}"), source))
}

/// Words of the bitmap of a group.
const WORDS: usize = (GROUP_BLOCKS / 64) as usize;

/// A set of blocks: a bitmap of 4 KiB for each allocation group that has any.
#[derive(Debug, Default)]
pub(super) struct BlockSet {
    groups: HashMap<u64, Box<[u64; WORDS]>>,
}

impl BlockSet {
    /// Adds a block. False if it was there.
    pub(super) fn insert(&mut self, block: u64) -> bool {
        let group = self.groups.entry(block / GROUP_BLOCKS);
        let words = group.or_insert_with(|| Box::new([0; WORDS]));
        let at = (block % GROUP_BLOCKS) as usize;
        let before = words[at / 64];
        words[at / 64] |= 1 << (at % 64);
        before != words[at / 64]
    }

    pub(super) fn contains(&self, block: u64) -> bool {
        let at = (block % GROUP_BLOCKS) as usize;
        let group = self.groups.get(&(block / GROUP_BLOCKS));
        group.is_some_and(|words| words[at / 64] >> (at % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::BlockSet;

    #[test]
    fn sets_hold_what_was_put_in() {
        let mut set = BlockSet::default();
        for block in [0, 63, 64, 32_767, 32_768, 1 << 37] {
            assert!(!set.contains(block));
            assert!(set.insert(block));
            assert!(!set.insert(block) && set.contains(block));
        }
        assert!(!set.contains(1) && !set.contains(65_535));
    }
}
