//! All trees of a pool in memory: dirty nodes, the space map, and the counters of the
//! superblock. Everything that changes metadata holds it exclusively.
//!
//! Invariants:
//!
//! 1. A node of the current generation is dirty, in `dirty`, and private to this generation; it
//!    may change in place if nothing shares it (its reference count is 1).
//! 2. Every other node is immutable: changing it means shadowing it.
//! 3. References to dirty nodes carry no valid checksum before the checkpoint seals them.
//! 4. An inode whose extent map has a dirty root is in `changed_files`.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ondisk::extent::{
    Extent, NodeRef, Root, decode_extent, decode_group, decode_refs_run, encode_refs,
};
use crate::ondisk::node::{Node, TreeKind};
use crate::ondisk::superblock::Superblock;

use super::nodes::{BlockMap, NodeCache};
use super::space::{Class, Found, Space};

/// Free blocks of loaded groups before a merge: for each of its runs a path of the refcount tree.
const MERGE_ROOM: u64 = 4096;

/// Blocks from the first up to the second, and their reference count.
type Run = (u64, u64, i64);

/// Longest run of one refcount record, in blocks.
const RUN_MAX: u64 = 1 << 31;
/// Refcount records that are changed in one step.
const MERGE_RECORDS: usize = 1024;

/// The run that begins at `at`, of runs in order.
fn find_run(runs: &[Run], at: u64) -> Option<Run> {
    let i = runs.binary_search_by_key(&at, |run| run.0).ok()?;
    Some(runs[i])
}

/// Fails if a node that a tree refers to is not of that tree.
fn belongs(node: &Node, kind: TreeKind, level: u8) -> Result<()> {
    if node.kind() == kind && node.level() == level {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "tree refers to a node of another tree: block={}",
        node.addr()
    )))
}

/// A node that is looked at.
#[derive(Debug)]
pub(crate) enum Look<'a> {
    /// Of this generation, or of the one that a checkpoint is writing.
    Unwritten(&'a Node),
    /// From the cache.
    Clean(Arc<Node>),
}

impl std::ops::Deref for Look<'_> {
    type Target = Node;

    fn deref(&self) -> &Node {
        match self {
            Self::Unwritten(node) => node,
            Self::Clean(node) => node,
        }
    }
}

/// The trees of a pool. See the module for what it keeps true.
#[derive(Debug)]
pub(crate) struct Meta {
    nodes: Arc<NodeCache>,
    /// The generation being built: one more than that of the newest checkpoint.
    pub(crate) generation: u64,
    /// Nodes of this generation.
    dirty: BlockMap<Arc<Node>>,
    /// Nodes of the generation that a checkpoint is writing.
    writing: Arc<BlockMap<Arc<Node>>>,
    pub(crate) space: Space,
    pub(crate) namespace: Root,
    pub(crate) refs: Root,
    pub(crate) sums: Root,
    pub(crate) groups: Root,
    pub(crate) next_ino: u64,
    pub(crate) next_detached: u64,
    /// Both of these are known to lie behind all numbers in use.
    pub(crate) numbers_known: bool,
    pub(crate) inodes: u64,
    pub(crate) logical: u64,
    pub(crate) hash_key: [u8; 16],
    pub(crate) changed_files: BTreeSet<u64>,
    /// A detached extent map has a dirty root.
    pub(crate) detached_dirty: bool,
}

/// Blocks kept back for deletes and checkpoints in a pool with `total` usable blocks: a fiftieth,
/// at least 96 (the trees of a tiny pool), at most 64 Ki (256 MiB).
pub(crate) fn floor_blocks(total: u64) -> u64 {
    (total / 50).clamp(96, 64 * 1024)
}

impl Meta {
    /// The trees that a superblock names.
    pub(crate) fn open(sb: &Superblock, nodes: Arc<NodeCache>) -> Result<Self> {
        let (first, end) = (sb.first_block(), sb.end_block());
        let mut meta = Self {
            nodes,
            generation: sb.generation + 1,
            dirty: BlockMap::default(),
            writing: Arc::default(),
            space: Space::new(first, end, floor_blocks(end - first)),
            namespace: sb.namespace,
            refs: sb.refs,
            sums: sb.sums,
            groups: sb.groups,
            next_ino: sb.next_ino,
            next_detached: sb.next_detached,
            numbers_known: false,
            inodes: sb.inodes,
            logical: sb.logical,
            hash_key: sb.hash_key,
            changed_files: BTreeSet::new(),
            detached_dirty: false,
        };
        let mut groups = Vec::new();
        meta.scan(
            meta.groups,
            TreeKind::Groups,
            0,
            u128::MAX,
            &mut |key, value| {
                groups.push((key as u64, decode_group(value)?));
                Ok(true)
            },
        )?;
        for (group, free) in groups {
            meta.space.set_group(group, free)?;
        }
        Ok(meta)
    }

    /// Where clean nodes are.
    pub(crate) fn nodes(&self) -> Arc<NodeCache> {
        Arc::clone(&self.nodes)
    }

    /// Reads of nodes that were not what had been written.
    pub(crate) fn damaged_nodes(&self) -> u64 {
        self.nodes
            .damaged
            .load(crate::sync::atomic::Ordering::Relaxed)
    }

    /// The node that `at` refers to.
    pub(crate) fn node(&self, kind: TreeKind, level: u8, at: NodeRef) -> Result<Arc<Node>> {
        match self.unwritten(at.block) {
            Some(node) => belongs(node, kind, level).map(|()| node.clone()),
            None => self.nodes.get(kind, level, at),
        }
    }

    /// As [`node`](Self::node), for a short look: a node of this generation is borrowed.
    pub(crate) fn look(&self, kind: TreeKind, level: u8, at: NodeRef) -> Result<Look<'_>> {
        match self.unwritten(at.block) {
            Some(node) => belongs(node, kind, level).map(|()| Look::Unwritten(node)),
            None => self.nodes.get(kind, level, at).map(Look::Clean),
        }
    }

    /// A dirty node, to change it.
    pub(crate) fn node_mut(&mut self, block: u64) -> &mut Node {
        let node = self
            .dirty
            .get_mut(&block)
            .expect("only shadowed nodes are changed");
        Arc::make_mut(node)
    }

    /// Tells the counters what this generation has gathered.
    pub(crate) fn publish(&self) {
        let (nodes, runs) = (self.dirty.len(), self.space.delta.len());
        self.space.counters.set_gathered(nodes, runs);
    }

    /// A new, empty node.
    pub(crate) fn new_node(&mut self, kind: TreeKind, level: u8) -> Result<u64> {
        let block = self.alloc(Class::Node, 1)?.block;
        self.space.delta.add(Extent { block, len: 1 }, 1);
        let node = Node::new(kind, level, block, self.generation, self.nodes.pool);
        self.dirty.insert(block, Arc::new(node));
        self.publish();
        Ok(block)
    }

    /// Makes the node that `at` refers to private to this generation and returns its block:
    /// the same one, or that of a copy.
    pub(crate) fn shadow(&mut self, kind: TreeKind, level: u8, at: NodeRef) -> Result<u64> {
        let shared = kind == TreeKind::Extents && self.refcount(at.block)? > 1;
        // I1: a private node of this generation changes in place.
        if !shared && let Some(node) = self.dirty.get(&at.block) {
            return belongs(node, kind, level).map(|()| at.block);
        }
        let node = self.node(kind, level, at)?;
        let block = self.alloc(Class::Node, 1)?.block;
        if shared {
            // The copy refers to the same children as the original, which stays.
            self.inc_children(&node)?;
        }
        self.space.delta.add(Extent { block, len: 1 }, 1);
        self.space.delta.add(
            Extent {
                block: at.block,
                len: 1,
            },
            -1,
        );
        let mut copy = (*node).clone();
        copy.relocate(block, self.generation);
        self.dirty.insert(block, Arc::new(copy));
        self.publish();
        Ok(block)
    }

    fn inc_children(&mut self, node: &Node) -> Result<()> {
        for i in 0..node.count() {
            let run = if node.level() == 0 {
                decode_extent(node.value(i))?
            } else {
                Extent {
                    block: node.child(i).block,
                    len: 1,
                }
            };
            self.space.delta.add(run, 1);
        }
        Ok(())
    }

    /// Drops the reference to a private, now empty or merged node.
    pub(crate) fn free_node(&mut self, block: u64) {
        self.space.delta.add(Extent { block, len: 1 }, -1);
        self.dirty.remove(&block);
    }

    /// Adds a reference to a node (a clone does, to the root).
    pub(crate) fn inc_node(&mut self, block: u64) {
        self.space.delta.add(Extent { block, len: 1 }, 1);
    }

    /// Drops a reference to a node that may be shared.
    pub(crate) fn dec_node(&mut self, block: u64) {
        self.space.delta.add(Extent { block, len: 1 }, -1);
    }

    /// How many references a block has.
    pub(crate) fn refcount(&self, block: u64) -> Result<u64> {
        let mut count = self.space.delta.get(block);
        if let Some((at, value)) = self.floor(self.refs, TreeKind::Refs, u128::from(block))? {
            let (_, end, stored) = decode_refs_run(at, &value)?;
            if block < end {
                count += i64::from(stored);
            }
        }
        u64::try_from(count)
            .map_err(|_| Error::corrupt(format!("refcount is negative: block={block}")))
    }

    /// The reference count of a block, and up to where (not beyond `end`) it is the same.
    pub(crate) fn refcount_run(&self, block: u64, end: u64) -> Result<(u64, u64)> {
        let (change, mut until) = self.space.delta.get_run(block, end);
        let mut count = change;
        let mut covered = false;
        if let Some((at, value)) = self.floor(self.refs, TreeKind::Refs, u128::from(block))? {
            let (_, stored_end, stored) = decode_refs_run(at, &value)?;
            if block < stored_end {
                count += i64::from(stored);
                until = until.min(stored_end);
                covered = true;
            }
        }
        if !covered {
            // Allocated since the last checkpoint, up to where the next record begins.
            let range = (u128::from(block) + 1, u128::from(until));
            self.scan(self.refs, TreeKind::Refs, range.0, range.1, &mut |at, _| {
                until = at as u64;
                Ok(false)
            })?;
        }
        let count = u64::try_from(count)
            .map_err(|_| Error::corrupt(format!("refcount is negative: block={block}")))?;
        Ok((count, until))
    }

    /// Allocates a run of up to `want` blocks.
    pub(crate) fn alloc(&mut self, class: Class, want: u32) -> Result<Extent> {
        loop {
            match self.space.find(class, want, self.generation)? {
                Found::Run(run) => return Ok(run),
                Found::NeedsGroup(group) => self.load_group(group)?,
            }
        }
    }

    /// Takes a certain run that replay is going to map.
    pub(crate) fn hold(&mut self, run: Extent) -> Result<()> {
        if run.len == 0
            || run.block.checked_add(u64::from(run.len)).is_none()
            || !self.space.contains(run)
        {
            return Err(Error::corrupt(format!(
                "journal maps blocks outside the pool: block={} len={}",
                run.block, run.len
            )));
        }
        for group in self.space.missing_groups(run) {
            self.load_group(group)?;
        }
        self.space.hold(run, self.generation)
    }

    /// Loads the bitmap of a group that has none in memory.
    pub(crate) fn ensure_group(&mut self, group: u64) -> Result<()> {
        if self.space.is_loaded(group) {
            return Ok(());
        }
        self.load_group(group)
    }

    fn load_group(&mut self, group: u64) -> Result<()> {
        let (start, end) = self.space.group_range(group);
        let mut used = Vec::new();
        let mut note = |at: u128, value: &[u8]| {
            let (start, end, _) = decode_refs_run(at, value)?;
            used.push((start, end));
            Ok(true)
        };
        if let Some((at, value)) = self.floor(self.refs, TreeKind::Refs, u128::from(start))? {
            note(at, &value)?;
        }
        let range = (u128::from(start), u128::from(end));
        self.scan(self.refs, TreeKind::Refs, range.0, range.1, &mut note)?;
        self.space.load_group(group, &used)
    }

    /// Merges up to `max` changed runs of reference counts into the refcount tree. True if more
    /// is left (also what the merge itself changed).
    pub(crate) fn merge_refs(&mut self, max: usize) -> Result<bool> {
        self.load_room()?;
        self.space.loaded_only = true;
        let runs = self.space.delta.take(max);
        let merged = runs
            .into_iter()
            .try_for_each(|(start, end, change)| self.merge_run(start, end, change));
        self.space.loaded_only = false;
        merged?;
        Ok(!self.space.delta.is_empty())
    }

    /// Loads bitmaps until there is room for the nodes of one merge: while records of the
    /// refcount tree change one by one, no bitmap can be derived from it.
    fn load_room(&mut self) -> Result<()> {
        while self.space.loaded_free() < MERGE_ROOM {
            match self.space.next_unloaded() {
                Some(group) => self.load_group(group)?,
                None => break,
            }
        }
        Ok(())
    }

    fn merge_run(&mut self, start: u64, end: u64, change: i64) -> Result<()> {
        if !self.space.contains_range(start, end) {
            return Err(Error::corrupt(format!(
                "a tree refers to blocks outside the pool: block={start} end={end}"
            )));
        }
        // The records that overlap or touch the run, from the one at or before its left edge.
        let mut old: Vec<Run> = Vec::new();
        let left = u128::from(start.saturating_sub(1));
        let mut note = |at: u128, value: &[u8]| -> Result<bool> {
            let (at, to, count) = decode_refs_run(at, value)?;
            if to >= start {
                old.push((at, to, i64::from(count)));
            }
            Ok(old.len() < MERGE_RECORDS)
        };
        if let Some((at, value)) = self.floor(self.refs, TreeKind::Refs, left)? {
            note(at, &value)?;
        }
        self.scan(
            self.refs,
            TreeKind::Refs,
            left + 1,
            u128::from(end) + 1,
            &mut note,
        )?;
        let mut end = end;
        if old.len() >= MERGE_RECORDS
            && let Some(&(_, last, _)) = old.last()
            && last < end
        {
            // The rest comes back as a run of its own.
            self.space.delta.add_range(last, end, change);
            end = last;
        }
        let new = self.merged_runs(&old, start, end, change)?;
        // The new ones from behind, and only then those that go: at every moment the records
        // cover all that is in use, so that a bitmap loaded in the middle of it is right.
        for &(at, to, count) in new.iter().rev() {
            if find_run(&old, at) == Some((at, to, count)) {
                continue;
            }
            let count = u32::try_from(count)
                .map_err(|_| Error::corrupt(format!("refcount is too high: block={at}")))?;
            let value = encode_refs((to - at) as u32, count);
            let mut root = self.refs;
            let inserted = self.insert(&mut root, TreeKind::Refs, u128::from(at), &value);
            self.refs = root;
            inserted?;
        }
        for &(at, ..) in &old {
            if find_run(&new, at).is_none() {
                let mut root = self.refs;
                let removed = self.remove(&mut root, TreeKind::Refs, u128::from(at));
                self.refs = root;
                if !removed? {
                    return Err(Error::corrupt(format!(
                        "refcount record is misplaced: block={at}"
                    )));
                }
            }
        }
        Ok(())
    }

    /// What the records become; runs whose count reaches 0 are freed.
    fn merged_runs(&mut self, old: &[Run], start: u64, end: u64, change: i64) -> Result<Vec<Run>> {
        let mut edges: Vec<u64> = old.iter().flat_map(|run| [run.0, run.1]).collect();
        edges.extend([start, end]);
        edges.sort_unstable();
        edges.dedup();
        let mut new: Vec<Run> = Vec::new();
        let mut old = old.iter().peekable();
        for (from, to) in edges.iter().zip(&edges[1..]).map(|(from, to)| (*from, *to)) {
            while old.next_if(|run| run.1 <= from).is_some() {}
            let before = old
                .peek()
                .filter(|run| run.0 <= from)
                .map_or(0, |run| run.2);
            let inside = from >= start && to <= end;
            let count = if inside { before + change } else { before };
            if count < 0 {
                return Err(Error::corrupt(format!(
                    "refcount is negative: block={from}"
                )));
            }
            if count == 0 {
                // Also a block that this generation allocated and dropped again.
                if inside {
                    self.space.free_later(from, to, before > 0)?;
                }
                continue;
            }
            match new.last_mut() {
                Some(last) if last.1 == from && last.2 == count && to - last.0 <= RUN_MAX => {
                    last.1 = to;
                }
                _ => {
                    let mut at = from;
                    while at < to {
                        let next = to.min(at + RUN_MAX);
                        new.push((at, next, count));
                        at = next;
                    }
                }
            }
        }
        Ok(new)
    }

    /// Dirty nodes of this generation.
    pub(crate) fn dirty_count(&self) -> usize {
        self.dirty.len()
    }

    /// True if `block` is a dirty node of this generation.
    pub(crate) fn is_dirty(&self, block: u64) -> bool {
        self.dirty.contains_key(&block)
    }

    /// The node at `block`, if it is one that the device does not hold yet.
    pub(crate) fn unwritten(&self, block: u64) -> Option<&Arc<Node>> {
        let found = self.dirty.get(&block);
        found.or_else(|| self.writing.get(&block))
    }

    /// Identity of the pool, which every node carries.
    pub(crate) fn pool_id(&self) -> u64 {
        self.nodes.pool
    }

    /// Hands the sealed nodes of this generation to a checkpoint and begins the next one.
    pub(crate) fn next_generation(&mut self) {
        assert!(self.writing.is_empty(), "one checkpoint at a time");
        self.writing = Arc::new(std::mem::take(&mut self.dirty));
        self.publish();
        self.generation += 1;
        self.changed_files.clear();
        self.detached_dirty = false;
    }

    /// The nodes that a checkpoint is writing.
    pub(crate) fn being_written(&self) -> Arc<BlockMap<Arc<Node>>> {
        Arc::clone(&self.writing)
    }

    /// The nodes of the last generation are durable: from now on they come from the cache.
    pub(crate) fn written(&mut self) {
        for node in self.writing.values() {
            self.nodes.put(node.clone());
        }
        self.writing = Arc::default();
    }
}
