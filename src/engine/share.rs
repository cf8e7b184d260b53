//! Many ranges at once: sharing blocks of one file with another, and telling where two files
//! differ by their maps alone.
//!
//! Invariants:
//!
//! 1. Locks are held for a bounded number of ranges at a time; between two steps others go on.
//! 2. Nothing is read of the device but tree nodes, once both files have their blocks in place.

use std::ops::ControlFlow;

use crate::error::{Error, Kind, Result};
use crate::ondisk::inode::FLAG_PINNED;
use crate::ondisk::record::Record;
use crate::units::{BLOCK_SIZE, Ino, Time};

use super::apply::{attr_of, load};
use super::extents::Mapped;
use super::file::{Attempt, grow_and_touch};
use super::pool::Pool;
use super::stage::{TOUCH_COST, record_cost};

const B: u64 = BLOCK_SIZE as u64;
/// Ranges that are shared under one hold of the locks: about a millisecond.
const STEP: usize = 64;
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
    /// `Invalid` for a range outside; `NoSpace`.
    pub fn share_ranges(&self, src: Ino, dst: Ino, ranges: &[Share], now: Time) -> Result<()> {
        self.begin_change()?;
        self.settle(dst)?;
        let mut done = 0;
        while done < ranges.len() {
            done += self.with_space(|| self.share_step(src, dst, &ranges[done..], now))?;
        }
        Ok(())
    }

    /// Shares the first of `ranges`; returns how many.
    fn share_step(
        &self,
        src: Ino,
        dst: Ino,
        ranges: &[Share],
        now: Time,
    ) -> Result<Attempt<usize>> {
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
        let (from, to) = (
            load(&meta, &stage, src)?.size,
            load(&meta, &stage, dst)?.size,
        );
        let mut done = 0;
        for range in ranges.iter().take(STEP) {
            check(src == dst, range, from, to)?;
            let record = Record::CloneRange {
                src,
                block: range.block,
                dst,
                dst_block: range.dst_block,
                count: range.count,
            };
            if !stage.has_room(record_cost(&record) + TOUCH_COST, self.limits.pending_bytes) {
                break;
            }
            self.apply_or_poison(&mut meta, &mut stage, &record)?;
            stage.push(record);
            done += 1;
        }
        if done == 0 {
            return Ok(Attempt::QueueFull);
        }
        stage.open(dst, attr_of(&inode));
        grow_and_touch(&mut stage, dst, 0, now);
        Ok(Attempt::Done(done))
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

    /// Extents of a file, and up to which block these are all.
    fn look(&self, ino: Ino, from: u64, to: u64) -> Result<(Vec<Mapped>, u64)> {
        let _gate = self.gate.read();
        {
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
        Ok((parts, next))
    }
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
mod tests {
    use super::*;
    use crate::ondisk::extent::Extent;

    fn mapped(at: u64, block: u64, len: u32) -> Mapped {
        Mapped {
            at,
            extent: Extent { block, len },
        }
    }

    #[test]
    fn maps_differ_where_blocks_do() {
        let left = [mapped(0, 100, 10), mapped(20, 300, 5)];
        let right = [mapped(0, 100, 4), mapped(4, 50, 2), mapped(6, 106, 4)];
        assert_eq!(differing(&left, &right, 30), [(4, 6), (20, 25)]);
        assert_eq!(differing(&right, &left, 30), [(4, 6), (20, 25)]);
        assert_eq!(differing(&left, &left, 30), []);
        assert_eq!(differing(&left, &right, 5), [(4, 5)]);
        assert_eq!(differing(&left, &[], 30), [(0, 10), (20, 25)]);
    }

    #[test]
    fn ranges_are_joined_and_come_by_pages() {
        let runs = [(0, 2), (2, 4), (6, 7), (9, 12)];
        let all = join(runs.into_iter(), 11, 9);
        assert_eq!(all.ranges, [(0, 4), (6, 1), (9, 2)]);
        assert_eq!(all.next, 11);
        let page = join(runs.into_iter(), 11, 2);
        assert_eq!((page.ranges.len(), page.next), (2, 9));
    }

    #[test]
    fn partial_blocks_are_shared_only_as_the_last_of_both() {
        let share = |block, dst_block, count| Share {
            block,
            dst_block,
            count,
        };
        let ok = |same, range, from, to| check(same, &range, from, to).is_ok();
        assert!(ok(false, share(0, 0, 2), 2 * B, 2 * B));
        assert!(ok(false, share(0, 5, 2), B + 512, 6 * B + 512));
        assert!(!ok(false, share(0, 5, 2), B + 512, 7 * B));
        assert!(!ok(false, share(0, 5, 2), 2 * B, 6 * B + 512));
        assert!(!ok(false, share(0, 0, 0), B, B));
        assert!(!ok(false, share(u64::MAX, 0, 2), B, B));
        assert!(!ok(true, share(0, 1, 2), 9 * B, 9 * B));
        assert!(ok(true, share(0, 2, 2), 9 * B, 9 * B));
    }
}
