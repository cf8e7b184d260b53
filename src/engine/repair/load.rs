//! Building trees bottom-up from sorted records, in free blocks only.
//!
//! Invariants:
//!
//! 1. Blocks are taken in ascending order from those to which nothing in the old state refers,
//!    so a build can be done twice with the same result: once to see what it comes to, without
//!    writing, and once for good.
//! 2. A node is written once, complete; nothing is ever read back or changed.

use crate::device::BlockDevice;
use crate::engine::check::ledger::{Counts, Ledger, SEGMENT_BLOCKS};
use crate::error::{Error, Kind, Result};
use crate::ondisk::extent::{NodeRef, Root};
use crate::ondisk::node::{Node, TreeKind};
use crate::units::BLOCK_SIZE;

/// Bytes of nodes written at once.
const WRITE_BYTES: usize = 1024 * 1024;
/// Children of a new interior node: some room is left, so that the first inserts split nothing.
pub(super) const FANOUT: usize = 150; // of 126 with long keys, 168 with short ones
/// Bytes of records in a new leaf, of 4032.
const LEAF_BYTES: usize = 3600;

/// Blocks to which nothing refers, in ascending order.
#[derive(Debug)]
pub(super) struct Free<'l> {
    old: &'l Ledger,
    /// Runs that are not taken although nothing refers to them, sorted.
    avoid: &'l [(u64, u64)],
    at: u64,
    end: u64,
    counts: Option<Counts>,
}

impl Clone for Free<'_> {
    fn clone(&self) -> Self {
        Self {
            counts: None,
            ..*self
        }
    }
}

impl<'l> Free<'l> {
    /// Blocks `start` up to `end` that are free by the ledger of the old state.
    pub(super) fn new(old: &'l Ledger, avoid: &'l [(u64, u64)]) -> Self {
        Self {
            old,
            avoid,
            at: old.start(),
            end: old.end(),
            counts: None,
        }
    }

    fn is_free(&mut self, block: u64) -> bool {
        let number = block / SEGMENT_BLOCKS;
        let first = number * SEGMENT_BLOCKS;
        if self
            .counts
            .as_ref()
            .is_none_or(|counts| counts.first != first)
        {
            self.counts = Some(self.old.counts(number));
        }
        let used = self
            .counts
            .as_ref()
            .is_some_and(|counts| counts.total((block - first) as usize) > 0);
        let i = self.avoid.partition_point(|run| run.1 <= block);
        !used && self.avoid.get(i).is_none_or(|run| run.0 > block)
    }
}

impl Iterator for Free<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        while self.at < self.end {
            let block = self.at;
            self.at += 1;
            if self.is_free(block) {
                return Some(block);
            }
        }
        None
    }
}

/// Where new nodes go.
#[derive(Debug)]
pub(super) struct Writer<'a> {
    /// `None`: nothing is written, it is only found out what would be.
    pub(super) device: Option<&'a dyn BlockDevice>,
    pub(super) generation: u64,
    pub(super) pool: u64,
    /// Nodes written so far.
    pub(super) nodes: u64,
    first: u64,
    buffer: Vec<u8>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(device: Option<&'a dyn BlockDevice>, generation: u64, pool: u64) -> Self {
        Self {
            device,
            generation,
            pool,
            nodes: 0,
            first: 0,
            buffer: Vec::new(),
        }
    }

    /// Writes a node to its block.
    pub(super) fn put(&mut self, mut node: Node) -> Result<NodeRef> {
        let crc = node.seal();
        let block = node.addr();
        self.nodes += 1;
        if self.device.is_some() {
            let next = self.first + (self.buffer.len() / BLOCK_SIZE) as u64;
            if next != block || self.buffer.len() >= WRITE_BYTES {
                self.flush()?;
                self.first = block;
            }
            self.buffer.extend_from_slice(&node.page()[..]);
        }
        Ok(NodeRef { block, crc })
    }

    /// Writes what waits.
    pub(super) fn flush(&mut self) -> Result<()> {
        if let Some(device) = self.device
            && !self.buffer.is_empty()
        {
            device
                .write_at(self.first * BLOCK_SIZE as u64, &self.buffer)
                .map_err(|source| Error::io("cannot write the repaired state", source))?;
        }
        self.buffer.clear();
        Ok(())
    }
}

/// What building needs: a writer and blocks for it.
#[derive(Debug)]
pub(super) struct Site<'a, 'l> {
    pub(super) writer: Writer<'a>,
    pub(super) free: Free<'l>,
}

impl Site<'_, '_> {
    /// A free block.
    pub(super) fn take(&mut self) -> Result<u64> {
        self.free.next().ok_or_else(|| {
            Error::new(
                Kind::NoSpace,
                "the pool has too few free blocks for a repair: enlarge its device and grow it",
            )
        })
    }

    /// An empty node in a free block.
    pub(super) fn node(&mut self, kind: TreeKind, level: u8) -> Result<Node> {
        let block = self.take()?;
        let (generation, pool) = (self.writer.generation, self.writer.pool);
        Ok(Node::new(kind, level, block, generation, pool))
    }
}

/// Builds one tree from records in ascending order.
pub(super) struct Loader {
    kind: TreeKind,
    /// The unfinished node of each level.
    open: Vec<Option<Node>>,
    /// Nodes of this tree.
    pub(super) blocks: Vec<u64>,
    /// Records of the leaves to come, where that is decided beforehand; the last one repeats.
    leaf_sizes: Vec<usize>,
    leaves: usize,
}

impl Loader {
    pub(super) fn new(kind: TreeKind) -> Self {
        Self {
            kind,
            open: Vec::new(),
            blocks: Vec::new(),
            leaf_sizes: Vec::new(),
            leaves: 0,
        }
    }

    /// With these numbers of records in its leaves.
    pub(super) fn with_leaves(kind: TreeKind, leaf_sizes: Vec<usize>) -> Self {
        Self {
            leaf_sizes,
            ..Self::new(kind)
        }
    }

    /// Appends a record.
    pub(super) fn push(&mut self, site: &mut Site<'_, '_>, key: u128, value: &[u8]) -> Result<()> {
        self.push_at(site, 0, key, value)
    }

    fn is_full(&self, level: usize, node: &Node, len: usize) -> bool {
        if level > 0 {
            return node.count() >= FANOUT || !node.fits(len);
        }
        match self.leaf_sizes.get(self.leaves) {
            Some(size) => node.count() >= *size,
            None => node.used() + len > LEAF_BYTES || !node.fits(len),
        }
    }

    fn push_at(
        &mut self,
        site: &mut Site<'_, '_>,
        level: usize,
        key: u128,
        value: &[u8],
    ) -> Result<()> {
        if self.open.len() <= level {
            self.open.push(None);
        }
        if let Some(node) = self.open[level].take() {
            if self.is_full(level, &node, value.len()) {
                self.close(site, level, node)?;
            } else {
                self.open[level] = Some(node);
            }
        }
        let mut node = match self.open[level].take() {
            Some(node) => node,
            None => site.node(self.kind, level as u8)?,
        };
        node.insert(node.count(), key, value);
        self.open[level] = Some(node);
        Ok(())
    }

    /// Writes a finished node and tells its parent.
    fn close(&mut self, site: &mut Site<'_, '_>, level: usize, node: Node) -> Result<()> {
        let key = node.key(0);
        self.leaves += usize::from(level == 0);
        self.blocks.push(node.addr());
        let at = site.writer.put(node)?;
        self.push_at(site, level + 1, key, &at.encode())
    }

    /// Writes the rest; the root of the tree.
    pub(super) fn finish(mut self, site: &mut Site<'_, '_>) -> Result<(Root, Vec<u64>)> {
        let mut level = 0;
        while level < self.open.len() {
            let top = level + 1 == self.open.len();
            match self.open[level].take() {
                Some(node) if top => {
                    self.blocks.push(node.addr());
                    let node = site.writer.put(node)?;
                    let level = level as u8;
                    return Ok((Root { node, level }, self.blocks));
                }
                Some(node) => self.close(site, level, node)?,
                None => {}
            }
            level += 1;
        }
        Ok((Root::default(), self.blocks))
    }
}

/// Nodes of a tree of `leaves` leaves with short keys, as [`Loader`] builds it.
pub(super) fn nodes_of(leaves: usize) -> usize {
    let (mut sum, mut level) = (leaves, leaves);
    while level > 1 {
        level = level.div_ceil(FANOUT);
        sum += level;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::SimDevice;
    use crate::engine::check::walk::{ALL, Event, Reader, walk};
    use crate::ondisk::extent::encode_group;
    use crate::ondisk::superblock::Superblock;
    use crate::units::Time;

    fn superblock() -> Superblock {
        let root = Root::default();
        Superblock {
            uuid: [7; 16],
            generation: 5,
            blocks: 8192,
            flags: 0,
            journal_start: 16,
            journal_blocks: 256,
            journal_seq: 1,
            journal_pos: 0,
            next_ino: 2,
            next_detached: 1,
            inodes: 0,
            logical: 0,
            free: 0,
            hash_key: [0; 16],
            created: Time::default(),
            namespace: root,
            refs: root,
            sums: root,
            groups: root,
        }
    }

    #[test]
    fn a_tree_of_any_size_holds_its_records_and_as_many_nodes_as_planned() {
        let sb = superblock();
        for count in [0_u64, 1, 224, 225, 33_000, 150 * 224, 150 * 224 + 1, 70_000] {
            let device = SimDevice::new(8192 * 4096, 1);
            let old = Ledger::new(sb.first_block(), sb.end_block(), usize::MAX);
            let mut site = Site {
                writer: Writer::new(Some(&device), 5, sb.pool_id()),
                free: Free::new(&old, &[]),
            };
            let mut loader = Loader::new(TreeKind::Groups);
            for key in 0..count {
                let value = encode_group(key as u32 % 1000);
                loader.push(&mut site, u128::from(key * 3), &value).unwrap();
            }
            let (root, blocks) = loader.finish(&mut site).unwrap();
            site.writer.flush().unwrap();
            assert_eq!(blocks.len() as u64, site.writer.nodes);
            let leaves = (count as usize).div_ceil(LEAF_BYTES / 16);
            assert_eq!(blocks.len(), nodes_of(leaves), "{count}");
            let reader = Reader {
                device: &device,
                sb: &sb,
            };
            let mut keys = Vec::new();
            walk(
                reader,
                &mut keys,
                root,
                TreeKind::Groups,
                ALL,
                &mut |keys, event| {
                    match event {
                        Event::Record { key, .. } => keys.push(key as u64),
                        Event::Node { .. } => {}
                        _ => panic!("a new tree is whole"),
                    }
                    true
                },
            );
            assert!(keys.iter().copied().eq((0..count).map(|key| key * 3)));
        }
    }
}
