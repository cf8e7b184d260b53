//! Extent maps: what is damaged is cut out and marked as lost, what is whole is kept where it is,
//! and what clones share stays shared.
//!
//! Invariants:
//!
//! 1. A node that needs no change stays. One that does is written anew, and so are the nodes above
//!    it; the result is remembered by the old node, so that all files that share it share the new
//!    one.
//! 2. Lost ranges are marked, never left as holes: a hole would read as zeros.
//! 3. References are counted when a node becomes part of the new state, once for each node.

use std::collections::HashMap;
use std::rc::Rc;

use crate::engine::check::ledger::Ledger;
use crate::engine::check::seen::Seen;
use crate::engine::check::walk::{ALL, Range, Reader, child_end};
use crate::error::Result;
use crate::ondisk::extent::{
    EXTENT_BLOCKS_MAX, Extent, NodeRef, Root, decode_extent, encode_extent,
};
use crate::ondisk::node::{Node, TreeKind};

use super::load::{FANOUT, Site};

/// Ranges that are told of each file; the rest is one more.
const TOLD_MAX: usize = 32;

/// What becomes of a part of an extent map.
#[derive(Debug)]
enum Fate {
    /// It stays as it is.
    Keep,
    /// These nodes of the same level take its place, by their keys.
    Replace(Vec<(u128, NodeRef)>),
}

#[derive(Debug)]
struct Part {
    fate: Fate,
    mapped: u64,
    /// File blocks lost here now, first and end.
    lost: Vec<(u64, u64)>,
    /// Extents that were cut because others overlap them.
    cut: u64,
}

/// What became of a file's map.
#[derive(Debug)]
pub(super) struct Mended {
    pub(super) root: Root,
    pub(super) mapped: u64,
    /// File blocks that are lost, first and end; those behind many are not told one by one.
    pub(super) lost: Vec<(u64, u64)>,
    pub(super) cut: u64,
}

/// Mends extent maps.
pub(super) struct Maps<'a> {
    pub(super) reader: Reader<'a>,
    /// Data blocks that are not what was written, sorted runs.
    pub(super) bad: &'a [(u64, u64)],
    /// References of the new state.
    pub(super) new: Ledger,
    kept: Seen,
    /// By the old node, as it is referred to, and the end of its range.
    known: HashMap<(u64, u32, u8, u64), Rc<Part>>,
}

impl<'a> Maps<'a> {
    pub(super) fn new(reader: Reader<'a>, bad: &'a [(u64, u64)], new: Ledger) -> Self {
        Self {
            reader,
            bad,
            new,
            kept: Seen::default(),
            known: HashMap::new(),
        }
    }

    /// Mends the map of a file of `blocks` blocks; what lies behind them is dropped.
    pub(super) fn mend(
        &mut self,
        site: &mut Site<'_, '_>,
        root: Root,
        blocks: u64,
    ) -> Result<Mended> {
        if root.is_empty() {
            return Ok(Mended {
                root,
                mapped: 0,
                lost: Vec::new(),
                cut: 0,
            });
        }
        let part = self.below(site, root.level, root.node, ALL, blocks)?;
        let root = match &part.fate {
            Fate::Keep => {
                self.keep(root.level, root.node);
                root
            }
            Fate::Replace(nodes) => {
                let (mut nodes, mut level) = (nodes.clone(), root.level);
                while nodes.len() > 1 {
                    level += 1;
                    nodes = self.interior(site, level, &nodes)?;
                }
                nodes
                    .first()
                    .map_or(Root::default(), |(_, node)| Root { node: *node, level })
            }
        };
        if !root.is_empty() {
            self.new.add_node(root.node.block, TreeKind::Extents);
        }
        Ok(Mended {
            root,
            mapped: part.mapped,
            lost: part.lost.clone(),
            cut: part.cut,
        })
    }

    /// True if a map needs no change; nothing is done to it.
    pub(super) fn is_whole(&mut self, root: Root) -> bool {
        root.is_empty() || self.is_whole_below(root.level, root.node, ALL, &mut Seen::default())
    }

    fn is_whole_below(&self, level: u8, at: NodeRef, range: Range, seen: &mut Seen) -> bool {
        let Ok(node) = self.reader.node(TreeKind::Extents, level, at) else {
            return false;
        };
        if !seen.insert(at.block) {
            return false; // a map has no node twice
        }
        if level > 0 {
            return (0..node.count()).all(|i| {
                let part = (node.key(i), child_end(&node, i, range.1));
                part.0 >= range.0
                    && part.0 <= range.1
                    && self.is_whole_below(level - 1, node.child(i), part, seen)
            });
        }
        let (_, unchanged, _) = self.records(&node, range, u64::MAX >> 8);
        unchanged.is_some()
    }

    /// Takes over a map as it is, for a file or a detached map.
    pub(super) fn adopt(&mut self, root: Root) {
        if !root.is_empty() {
            self.new.add_node(root.node.block, TreeKind::Extents);
            self.keep(root.level, root.node);
        }
    }

    /// I3: an old node stays, with all below it.
    fn keep(&mut self, level: u8, at: NodeRef) {
        if !self.kept.insert(at.block) {
            return;
        }
        let Ok(node) = self.reader.node(TreeKind::Extents, level, at) else {
            return; // it was read a moment ago; the check at the end tells
        };
        for i in 0..node.count() {
            if level > 0 {
                let child = node.child(i);
                self.new.add_node(child.block, TreeKind::Extents);
                self.keep(level - 1, child);
            } else if let Ok(run) = decode_extent(node.value(i)) {
                self.count(run);
            }
        }
    }

    fn count(&mut self, run: Extent) {
        if !run.is_lost() {
            self.new.add_data(run.block, run.end());
        }
    }

    fn below(
        &mut self,
        site: &mut Site<'_, '_>,
        level: u8,
        at: NodeRef,
        range: Range,
        blocks: u64,
    ) -> Result<Rc<Part>> {
        let end = u64::try_from(range.1).map_or(blocks, |last| blocks.min(last.saturating_add(1)));
        let reference = (at.block, at.crc, level, end);
        if let Some(known) = self.known.get(&reference) {
            return Ok(known.clone());
        }
        let part = match self.reader.node(TreeKind::Extents, level, at) {
            Err(_) => self.lost_node(site, level, range, end)?,
            Ok(node) if level == 0 => self.leaf(site, &node, range, end)?,
            Ok(node) => self.children(site, &node, range, blocks)?,
        };
        let part = Rc::new(part);
        self.known.insert(reference, part.clone());
        Ok(part)
    }

    /// A node that cannot be read: all that its range could hold is lost.
    fn lost_node(
        &mut self,
        site: &mut Site<'_, '_>,
        level: u8,
        range: Range,
        end: u64,
    ) -> Result<Part> {
        let first = u64::try_from(range.0).unwrap_or(u64::MAX);
        let mut records = Vec::new();
        mark_lost(&mut records, first, end);
        let mut nodes = self.leaves(site, &records)?;
        for level in 1..=level {
            nodes = self.interior(site, level, &nodes)?;
        }
        if let Some(node) = nodes.first_mut() {
            node.0 = range.0;
        }
        Ok(Part {
            fate: Fate::Replace(nodes),
            mapped: end.saturating_sub(first),
            lost: if first < end {
                vec![(first, end)]
            } else {
                Vec::new()
            },
            cut: 0,
        })
    }

    /// The records of a leaf as they should be; `Some` mapped blocks if they are; extents cut.
    fn records(
        &self,
        node: &Node,
        range: Range,
        end: u64,
    ) -> (Vec<(u64, Extent)>, Option<u64>, u64) {
        let (mut records, mut changed, mut mapped, mut cut) = (Vec::new(), false, 0, 0);
        for i in 0..node.count() {
            let key = node.key(i);
            let at = key as u64;
            if key < range.0 || key > range.1 || at >= end {
                changed = true;
                continue;
            }
            let next = child_end(node, i, range.1);
            let limit = u64::try_from(next).map_or(end, |next| end.min(next.saturating_add(1)));
            let run = decode_extent(node.value(i)).ok();
            let sound = |run: &Extent| run.is_lost() || self.reader.holds(run.block, run.end());
            match run.filter(sound) {
                None => {
                    changed = true;
                    let len = run.map_or(u64::MAX, |run| u64::from(run.len));
                    mark_lost(&mut records, at, limit.min(at.saturating_add(len)));
                }
                Some(run) => {
                    let len = u64::from(run.len).min(limit - at) as u32;
                    let overlaps = len < run.len && limit < end;
                    cut += u64::from(overlaps);
                    changed |= len < run.len;
                    let before = records.len();
                    self.split_bad(&mut records, at, run.head(len));
                    changed |=
                        records.len() != before + 1 || records[before].1.is_lost() != run.is_lost();
                    mapped += u64::from(len);
                }
            }
        }
        (records, (!changed).then_some(mapped), cut)
    }

    /// Adds an extent without its bad blocks, which are marked as lost.
    fn split_bad(&self, records: &mut Vec<(u64, Extent)>, at: u64, run: Extent) {
        if run.is_lost() {
            return records.push((at, run));
        }
        let mut from = run.block;
        let start = self.bad.partition_point(|bad| bad.1 <= run.block);
        let file = |block: u64| at + (block - run.block);
        for bad in self.bad[start..].iter().take_while(|bad| bad.0 < run.end()) {
            let (first, end) = (bad.0.max(run.block), bad.1.min(run.end()));
            if first > from {
                let len = (first - from) as u32;
                records.push((file(from), Extent { block: from, len }));
            }
            mark_lost(records, file(first), file(end));
            from = end;
        }
        if from < run.end() {
            let len = (run.end() - from) as u32;
            records.push((file(from), Extent { block: from, len }));
        }
    }

    fn leaf(
        &mut self,
        site: &mut Site<'_, '_>,
        node: &Node,
        range: Range,
        end: u64,
    ) -> Result<Part> {
        let (records, unchanged, cut) = self.records(node, range, end);
        if let Some(mapped) = unchanged {
            return Ok(Part {
                fate: Fate::Keep,
                mapped,
                lost: Vec::new(),
                cut: 0,
            });
        }
        let was_lost = |at: u64| {
            node.find(u128::from(at))
                .is_ok_and(|i| decode_extent(node.value(i)).is_ok_and(|run| run.is_lost()))
        };
        let mut part = Part {
            fate: Fate::Replace(self.leaves(site, &records)?),
            mapped: records.iter().map(|record| u64::from(record.1.len)).sum(),
            lost: Vec::new(),
            cut,
        };
        for (at, run) in records {
            if run.is_lost() && !was_lost(at) {
                tell(&mut part.lost, (at, at + u64::from(run.len)));
            }
        }
        Ok(part)
    }

    fn children(
        &mut self,
        site: &mut Site<'_, '_>,
        node: &Node,
        range: Range,
        blocks: u64,
    ) -> Result<Part> {
        let mut parts = Vec::new();
        let mut changed = false;
        for i in 0..node.count() {
            let key = node.key(i);
            if key < range.0 || key > range.1 || key >= u128::from(blocks) {
                changed = true;
                continue;
            }
            let child = node.child(i);
            let below = (key, child_end(node, i, range.1));
            let part = self.below(site, node.level() - 1, child, below, blocks)?;
            changed |= matches!(part.fate, Fate::Replace(_));
            parts.push((key, child, part));
        }
        let mut sum = Part {
            fate: Fate::Keep,
            mapped: 0,
            lost: Vec::new(),
            cut: 0,
        };
        for (_, _, part) in &parts {
            sum.mapped += part.mapped;
            sum.cut += part.cut;
            part.lost
                .iter()
                .for_each(|range| tell(&mut sum.lost, *range));
        }
        if changed {
            let mut list = Vec::new();
            for (key, child, part) in parts {
                match &part.fate {
                    Fate::Keep => {
                        self.keep(node.level() - 1, child);
                        list.push((key, child));
                    }
                    Fate::Replace(nodes) => list.extend(nodes.iter().copied()),
                }
            }
            sum.fate = Fate::Replace(self.interior(site, node.level(), &list)?);
        }
        Ok(sum)
    }

    fn leaves(
        &mut self,
        site: &mut Site<'_, '_>,
        records: &[(u64, Extent)],
    ) -> Result<Vec<(u128, NodeRef)>> {
        let mut nodes = Vec::new();
        for chunk in records.chunks(FANOUT) {
            let mut node = site.node(TreeKind::Extents, 0)?;
            for (at, run) in chunk {
                node.insert(node.count(), u128::from(*at), &encode_extent(*run));
                self.count(*run);
            }
            nodes.push((u128::from(chunk[0].0), site.writer.put(node)?));
        }
        Ok(nodes)
    }

    fn interior(
        &mut self,
        site: &mut Site<'_, '_>,
        level: u8,
        children: &[(u128, NodeRef)],
    ) -> Result<Vec<(u128, NodeRef)>> {
        let mut nodes = Vec::new();
        for chunk in children.chunks(FANOUT) {
            let mut node = site.node(TreeKind::Extents, level)?;
            for (key, child) in chunk {
                node.insert(node.count(), *key, &child.encode());
                self.new.add_node(child.block, TreeKind::Extents);
            }
            nodes.push((chunk[0].0, site.writer.put(node)?));
        }
        Ok(nodes)
    }
}

/// Adds lost extents for the file blocks `from` up to `to`; joins them with one before.
fn mark_lost(records: &mut Vec<(u64, Extent)>, from: u64, to: u64) {
    let mut at = from;
    while at < to {
        let most = u64::from(EXTENT_BLOCKS_MAX);
        match records.last_mut() {
            Some((first, run))
                if run.is_lost()
                    && *first + u64::from(run.len) == at
                    && u64::from(run.len) < most =>
            {
                let more = (to - at).min(most - u64::from(run.len));
                run.len += more as u32;
                at += more;
            }
            _ => {
                let len = (to - at).min(most) as u32;
                records.push((at, Extent { block: 0, len }));
                at += u64::from(len);
            }
        }
    }
}

/// Adds a range to those that are told.
fn tell(told: &mut Vec<(u64, u64)>, range: (u64, u64)) {
    let full = told.len() >= TOLD_MAX;
    match told.last_mut() {
        // Where there are very many, the last one stands for all behind it.
        Some(last) if last.1 == range.0 || full => last.1 = range.1,
        _ => told.push(range),
    }
}
