//! Many ranges at once: sharing blocks of one file with another, and telling where two files
//! differ by their maps alone.
//!
//! Invariants:
//!
//! 1. Locks are held for a bounded number of ranges and extents at a time, and no record is about
//!    more; between two steps others go on, and the limits of the pool are kept.
//! 2. Nothing is read of the device but tree nodes, once both files have their blocks in place.
//! 3. A step has room for the nodes that it changes before it begins: it never ends half way.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use crate::error::{Error, Kind, Result};
use crate::ondisk::extent::Extent;
use crate::ondisk::inode::{FLAG_PINNED, Inode};
use crate::ondisk::record::Record;
use crate::units::{BLOCK_SIZE, Ino, Time};

use super::apply::{DETACH_ABOVE, attr_of, load};
use super::extents::Mapped;
use super::file::{Attempt, grow_and_touch};
use super::meta::Meta;
use super::pool::Pool;
use super::stage::{Stage, TOUCH_COST, record_cost};

const B: u64 = BLOCK_SIZE as u64;
/// Ranges that are shared under one hold of the locks.
const STEP_RANGES: usize = 64;
/// Extents of the source that are shared under one hold of the locks, which others wait for.
pub(crate) const STEP_EXTENTS: u64 = 512;
/// Extents of the destination that one record replaces: what is removed at once elsewhere.
const REPLACED_MAX: u64 = DETACH_ABOVE;
/// Blocks reserved for the nodes that a record changes however little it shares: the paths of both
/// its borders in the extent map, with splits, and that of the inode.
const RANGE_NODES: u64 = 16;
/// Extents for which one more node is reserved: those of a leaf that is hardly an eighth full.
const EXTENTS_PER_NODE: u64 = 32;
/// Extents of a file that one look at its map takes.
const LOOK: usize = 4096;

/// A range of blocks to share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// First block of the source.
    pub block: u64,
    /// First block of the destination.
    pub dst_block: u64,
    /// How many, at least 1.
    pub count: u64,
}

/// Where a file has data, or differs from another, as far as was looked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extents {
    /// First block and number of blocks, ascending, with gaps between.
    pub ranges: Vec<(u64, u64)>,
    /// The block where to go on. Equal to the end that was asked for: that is all.
    pub next: u64,
}

impl Pool {
    /// Shares whole blocks of `src` with `dst`, range after range, at no cost but their maps. All
    /// lie within the sizes of both files, which stay; both may be one file. A crash or an error
    /// leaves the ranges shared up to some point.
    ///
    /// # Errors
    /// `Invalid` for a range outside; `NoSpace`. What comes before it is done.
    pub fn share_ranges(&self, src: Ino, dst: Ino, ranges: &[Share], now: Time) -> Result<()> {
        let mut left = ranges.to_vec();
        left.reverse();
        while !left.is_empty() {
            self.begin_change()?;
            self.settle(dst)?;
            self.with_space(|| self.share_step(src, dst, &mut left, now))?;
        }
        Ok(())
    }

    /// Shares some of `left`, whose last one is the next, and takes it away there.
    fn share_step(
        &self,
        src: Ino,
        dst: Ino,
        left: &mut Vec<Share>,
        now: Time,
    ) -> Result<Attempt<()>> {
        self.with_files(src, dst, |meta, stage, inode| {
            let (from, to) = (load(meta, stage, src)?.size, load(meta, stage, dst)?.size);
            let mut budget = STEP_EXTENTS;
            let mut outcome = Ok(Attempt::Done(()));
            let mut any = false;
            for _ in 0..STEP_RANGES {
                let Some(range) = left.last_mut() else { break };
                if budget == 0 {
                    break;
                }
                let shared = check(src == dst, range, from, to)
                    .and_then(|()| self.share_some(meta, stage, (src, dst), range, budget));
                let (count, extents) = match shared {
                    Ok(Some(shared)) => shared,
                    Ok(None) => {
                        outcome = Ok(Attempt::QueueFull);
                        break;
                    }
                    Err(error) => {
                        outcome = Err(error);
                        break;
                    }
                };
                any = true;
                budget -= extents;
                if count == range.count {
                    left.pop();
                } else {
                    range.block += count;
                    range.dst_block += count;
                    range.count -= count;
                }
            }
            if any {
                stage.open(dst, attr_of(inode));
                grow_and_touch(stage, dst, 0, now);
                // What stopped it stops the next step as well, and that one has done nothing yet.
                return Ok(Attempt::Done(()));
            }
            outcome
        })
    }

    /// Does `change`, by which `dst` gets blocks of `src`: both are owned, the blocks of `src` have
    /// their places, and `dst`, whose inode is given, is no clone in pieces.
    pub(crate) fn with_files<T>(
        &self,
        src: Ino,
        dst: Ino,
        change: impl FnOnce(&mut Meta, &mut Stage, &Inode) -> Result<Attempt<T>>,
    ) -> Result<Attempt<T>> {
        let _gate = self.gate.read();
        let _owned = self.own_files(src, dst);
        self.destage_file(src)?;
        self.check_room()?;
        let mut meta = self.meta.write();
        let inode = meta.file(dst)?;
        if inode.flags & FLAG_PINNED != 0 {
            return Ok(Attempt::Pinned(dst));
        }
        let mut stage = self.stage.lock();
        change(&mut meta, &mut stage, &inode)
    }

    /// Shares the beginning of `range`, at most `most` extents of it, by one record. Returns how
    /// many blocks and extents that were; `None` if the queue has no room. The caller owns both files, and touches `dst`.
    pub(crate) fn share_some(
        &self,
        meta: &mut Meta,
        stage: &mut Stage,
        (src, dst): (Ino, Ino),
        range: &Share,
        most: u64,
    ) -> Result<Option<(u64, u64)>> {
        let (count, extents) = head(meta, src, range.block, range.count, most)?;
        let (count, _) = head(meta, dst, range.dst_block, count, REPLACED_MAX)?;
        let record = Record::CloneRange {
            src,
            block: range.block,
            dst,
            dst_block: range.dst_block,
            count,
        };
        if !stage.has_room(record_cost(&record) + TOUCH_COST, self.limits.pending_bytes) {
            return Ok(None);
        }
        let nodes = RANGE_NODES + extents / EXTENTS_PER_NODE;
        self.counters.reserve_exactly(nodes)?; // I3
        let applied = self.apply_or_poison(meta, stage, &record);
        self.counters.unreserve_exactly(nodes);
        applied?;
        stage.push(record);
        Ok(Some((count, extents)))
    }

    /// Where `ino` has data between two of its blocks; at most `most` ranges.
    ///
    /// # Errors
    /// As those of a read of its map.
    pub fn data_ranges(&self, ino: Ino, from: u64, to: u64, most: usize) -> Result<Extents> {
        let (parts, next) = self.look(ino, from, to)?;
        let runs = parts.iter().map(|part| (part.at, part.end()));
        Ok(join(runs, next, most))
    }

    /// Where `ino`, between two of its blocks, is not the same blocks of the pool as `other` is
    /// from `other_from` on: at most `most` ranges. Blocks that differ may have equal contents.
    ///
    /// # Errors
    /// As those of a read of both maps.
    pub fn differing_ranges(
        &self,
        (ino, from, to): (Ino, u64, u64),
        (other, other_from): (Ino, u64),
        most: usize,
    ) -> Result<Extents> {
        let (left, left_next) = self.look(ino, from, to)?;
        let other_to = other_from.saturating_add(to - from);
        let (mut right, right_next) = self.look(other, other_from, other_to)?;
        for part in &mut right {
            part.at = part.at - other_from + from;
        }
        let next = left_next.min(right_next - other_from + from);
        Ok(join(differing(&left, &right, next).into_iter(), next, most))
    }

    /// Extents of a file, and up to which block these are all. Staged blocks get their places
    /// first, unless nothing may be written: then they look like lost ones.
    fn look(&self, ino: Ino, from: u64, to: u64) -> Result<(Vec<Mapped>, u64)> {
        let _gate = self.gate.read();
        if self.check_writable().is_ok() {
            let _owned = self.own_file(ino);
            self.destage_file(ino)?;
        }
        let meta = self.meta.read();
        let root = meta.file(ino)?.root;
        let mut parts = Vec::new();
        meta.mapped(root, from, to, &mut |part| {
            parts.push(part);
            match parts.len() < LOOK {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        })?;
        let next = match parts.last() {
            Some(last) if parts.len() == LOOK => last.end(),
            _ => to,
        };
        // Where nothing may be written, and what was written meanwhile: nothing tells what these
        // blocks have in common with others.
        let stage = self.stage.lock();
        let staged = stage.file(ino).filter(|_| from < next);
        let staged = staged.map(|file| file.range(from, next));
        let staged = staged.into_iter().flat_map(BTreeMap::into_keys);
        Ok((overlay(parts, staged), next))
    }
}

/// How many of `count` blocks from `block` of a file on hold at most `most` extents (at least 1),
/// and how many they hold.
fn head(meta: &Meta, ino: Ino, block: u64, count: u64, most: u64) -> Result<(u64, u64)> {
    let mut end = block + count;
    let mut extents = 0;
    let root = meta.file(ino)?.root;
    meta.mapped(root, block, end, &mut |part| {
        if extents == most {
            end = part.at;
            return ControlFlow::Break(());
        }
        extents += 1;
        ControlFlow::Continue(())
    })?;
    Ok((end - block, extents))
}

fn check(same: bool, range: &Share, from: u64, to: u64) -> Result<()> {
    let within = |block: u64, size: u64| {
        let end = block.checked_add(range.count)?;
        (range.count > 0 && end <= size.div_ceil(B)).then_some(end)
    };
    let (Some(end), Some(dst_end)) = (within(range.block, from), within(range.dst_block, to))
    else {
        return Err(Error::new(
            Kind::Invalid,
            format!("a range lies outside of the file: {range:?}"),
        ));
    };
    // The last block of a file may be partial: it stays the last one, and as partial as it was.
    let (partial, dst_partial) = (end > from / B, dst_end > to / B);
    if partial != dst_partial || partial && from % B != to % B {
        return Err(Error::new(
            Kind::Invalid,
            "the last block of a file that is no whole one is not shared",
        ));
    }
    if same && range.block < dst_end && range.dst_block < end {
        return Err(Error::new(
            Kind::Invalid,
            "the ranges of a copy within a file overlap",
        ));
    }
    Ok(())
}

/// What is mapped, with blocks that have no place yet, ascending, as lost ones.
fn overlay(parts: Vec<Mapped>, staged: impl Iterator<Item = u64>) -> Vec<Mapped> {
    let mut staged = staged.peekable();
    let mut all = Vec::with_capacity(parts.len());
    let lost = |at| Mapped {
        at,
        extent: Extent { block: 0, len: 1 },
    };
    for mut part in parts {
        let mut left = true;
        while let Some(block) = staged.next_if(|block| *block < part.end()) {
            if block > part.at {
                let len = (block - part.at) as u32;
                let (at, extent) = (part.at, part.extent.head(len));
                all.push(Mapped { at, extent });
                part = Mapped {
                    at: block,
                    extent: part.extent.tail(len),
                };
            }
            all.push(lost(block));
            if block == part.at && part.extent.len == 1 {
                left = false;
                break;
            }
            if block == part.at {
                part = Mapped {
                    at: block + 1,
                    extent: part.extent.tail(1),
                };
            }
        }
        if left {
            all.push(part);
        }
    }
    all.extend(staged.map(lost));
    all
}

/// Joins what touches, and stops at `most` ranges.
fn join(runs: impl Iterator<Item = (u64, u64)>, next: u64, most: usize) -> Extents {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for (start, end) in runs.take_while(|run| run.0 < next) {
        let end = end.min(next);
        let full = ranges.len() == most;
        match ranges.last_mut() {
            Some(last) if last.0 + last.1 == start => last.1 += end - start,
            _ if full => {
                let next = start;
                return Extents { ranges, next };
            }
            _ => ranges.push((start, end - start)),
        }
    }
    Extents { ranges, next }
}

/// What of two maps is not the same, up to block `end`; `(start, end)` each.
fn differing(left: &[Mapped], right: &[Mapped], end: u64) -> Vec<(u64, u64)> {
    let (mut left, mut right) = (left.iter().peekable(), right.iter().peekable());
    let mut found = Vec::new();
    let mut at = 0;
    while at < end {
        while left.next_if(|part| part.end() <= at).is_some() {}
        while right.next_if(|part| part.end() <= at).is_some() {}
        // What begins at `at` on each side: the pool block, or nothing, and until where.
        let side = |part: Option<&&Mapped>| match part {
            Some(part) if part.at <= at => {
                let block = (!part.extent.is_lost()).then(|| part.extent.block + (at - part.at));
                (Some(block), part.end())
            }
            Some(part) => (None, part.at),
            None => (None, end),
        };
        let (a, a_end) = side(left.peek());
        let (b, b_end) = side(right.peek());
        let until = a_end.min(b_end).min(end);
        // Lost blocks are the same as nothing, not even as themselves: reading them tells.
        if a != b || a == Some(None) {
            found.push((at, until));
        }
        at = until;
    }
    found
}

#[cfg(test)]
mod tests;
