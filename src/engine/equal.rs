//! Sharing of what is equal: blocks of one file become those of another if their contents are the
//! same, byte by byte. And what the search for such blocks needs: where the blocks of a file are,
//! with their checksums.
//!
//! The contents of no file change by it, whoever writes meanwhile. Blocks of the pool are written
//! once, so two of them that were compared stay equal as long as neither is used again:
//!
//! 1. The thread is pinned from the look at both maps to the change of one of them, so that no
//!    block that it saw is used again. It takes locks meanwhile; whoever waits for the pinned holds
//!    none of these.
//! 2. Blocks are compared by their places, without locks. They are shared under the locks, and
//!    only where both maps still lead there and nothing is staged over it.
//! 3. Locks are held for at most [`STEP_BLOCKS`] blocks, and so many are in memory of each side.
//! 4. Nothing is read of the device under the lock of the stage, but for sharing. So what is staged
//!    is looked at before the maps: what gets its place in between is left out, and what is staged
//!    in between is seen by point 2.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use crate::error::{Error, Kind, Result};
use crate::units::{BLOCK_SIZE, Ino};

use super::apply::blocks_of;
use super::extents::Mapped;
use super::file::Attempt;
use super::meta::Meta;
use super::pool::Pool;
use super::share::{STEP_EXTENTS, Share};
use super::stage::{FileAttr, Stage};

/// Blocks that are compared and shared at a time: 1 MiB of each file.
pub(crate) const STEP_BLOCKS: u64 = 256;

/// A run of blocks of a file with their places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// First block of the file.
    pub at: u64,
    /// Its block of the pool; the others follow.
    pub block: u64,
    /// How many, at least 1.
    pub count: u64,
}

/// Where the blocks of a file are, as far as was looked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// In the order of the file.
    pub runs: Vec<Place>,
    /// Checksums of all their blocks (CRC-32C), if they were asked for.
    pub sums: Vec<u32>,
    /// The block where to go on. Equal to the end that was asked for: that is all.
    pub next: u64,
}

/// What was equal of two ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Equal {
    /// Blocks of the ranges, counted from their beginning: first and number, ascending. Those that
    /// were shared already are not among them.
    pub ranges: Vec<(u64, u64)>,
    /// Blocks of each side that were read and compared.
    pub compared: u64,
}

impl Equal {
    /// How many blocks were equal.
    pub fn blocks(&self) -> u64 {
        self.ranges.iter().map(|range| range.1).sum()
    }

    fn add(&mut self, at: u64, count: u64) {
        match self.ranges.last_mut() {
            Some(last) if last.0 + last.1 == at => last.1 += count,
            _ => self.ranges.push((at, count)),
        }
    }
}

/// Two blocks with different places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pair {
    /// Their number in the range.
    i: u64,
    /// Blocks of the pool: of the source, and of the destination.
    from: u64,
    to: u64,
}

impl Pool {
    /// Where file blocks `from` to `to` are, at most `runs_max` runs; with their checksums if
    /// `sums_max` says of how many blocks at most. What is written meanwhile may be missing.
    ///
    /// # Errors
    /// As those of a read of the map.
    pub fn places(
        &self,
        ino: Ino,
        (from, to): (u64, u64),
        runs_max: usize,
        sums_max: Option<u64>,
    ) -> Result<Places> {
        if from == 0 && self.check_writable().is_ok() {
            self.place_all(ino)?;
        }
        let staged = Over::of(&self.stage.lock(), ino, 0, 0); // I4
        let meta = self.meta.read();
        let size = staged.size(&meta, ino)?;
        let end = to.min(blocks_of(size));
        let mut left = sums_max.unwrap_or(u64::MAX);
        let mut found = Places {
            next: to,
            ..Places::default()
        };
        if from >= end {
            return Ok(found);
        }
        let root = meta.file(ino)?.root;
        meta.mapped(root, from, end, &mut |part| {
            if part.extent.is_lost() {
                return ControlFlow::Continue(());
            }
            let count = u64::from(part.extent.len).min(left);
            if count == 0 || found.runs.len() == runs_max {
                found.next = part.at;
                return ControlFlow::Break(());
            }
            found.runs.push(Place {
                at: part.at,
                block: part.extent.block,
                count,
            });
            left -= count;
            if count < u64::from(part.extent.len) {
                found.next = part.at + count;
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })?;
        if sums_max.is_some() {
            for run in &found.runs {
                let mut blocks = run.block..run.block + run.count;
                meta.sums_of(&mut blocks, &mut found.sums)?;
            }
        }
        Ok(found)
    }

    /// Compares two ranges of blocks, and where they are equal makes those of `dst` refer to the
    /// blocks of `src`. Contents, sizes and times stay as they are. Both may be one file; the
    /// ranges may reach behind the ends. What is being written is left alone. `dry`: only tells
    /// what would be shared.
    ///
    /// # Errors
    /// `Invalid` if the ranges overlap; `Corrupt` if a block is not what was written; `NoSpace`
    /// for the maps. What comes before it is done.
    pub fn share_equal(&self, src: Ino, dst: Ino, range: &Share, dry: bool) -> Result<Equal> {
        let ends = |block: u64| block.checked_add(range.count);
        let (Some(end), Some(dst_end)) = (ends(range.block), ends(range.dst_block)) else {
            return Err(Error::new(
                Kind::Invalid,
                format!("a range lies outside of the file: {range:?}"),
            ));
        };
        if src == dst && range.block < dst_end && range.dst_block < end {
            return Err(Error::new(
                Kind::Invalid,
                "the ranges to compare within a file overlap",
            ));
        }
        let left = |ino, block| -> Result<u64> {
            Ok(blocks_of(self.attr(ino)?.size).saturating_sub(block))
        };
        let count = left(src, range.block)?.min(left(dst, range.dst_block)?);
        let count = count.min(range.count);
        let mut equal = Equal::default();
        for at in (0..count).step_by(STEP_BLOCKS as usize) {
            let step = Share {
                block: range.block + at,
                dst_block: range.dst_block + at,
                count: STEP_BLOCKS.min(count - at),
            };
            if dry {
                let equals = self.compare(src, dst, &step, &mut equal)?;
                equals.iter().for_each(|pair| equal.add(at + pair.i, 1));
                continue;
            }
            self.begin_change()?;
            self.settle(dst)?;
            self.with_space(|| self.share_equal_step(src, dst, &step, at, &mut equal))?;
        }
        Ok(equal)
    }

    fn share_equal_step(
        &self,
        src: Ino,
        dst: Ino,
        step: &Share,
        at: u64,
        equal: &mut Equal,
    ) -> Result<Attempt<()>> {
        for (ino, block) in [(src, step.block), (dst, step.dst_block)] {
            if self.is_staged(ino, block, step.count) {
                self.place_all(ino)?;
            }
        }
        let _pin = self.readers.pin(); // I1
        let pairs = self.compare(src, dst, step, equal)?;
        match pairs.is_empty() {
            true => Ok(Attempt::Done(())),
            false => self.share_pairs((src, dst), step, at, pairs, equal),
        }
    }

    /// Shares what was found equal and is still where it was. The caller is pinned since it looked.
    fn share_pairs(
        &self,
        (src, dst): (Ino, Ino),
        step: &Share,
        at: u64,
        pairs: Vec<Pair>,
        equal: &mut Equal,
    ) -> Result<Attempt<()>> {
        self.with_files(src, dst, |meta, stage, _| {
            let over = Over::of_both(stage, src, dst, step);
            let now = differing_places(meta, &over, src, dst, step)?;
            let mut still = pairs.into_iter().filter(|pair| {
                let found = now.binary_search_by_key(&pair.i, |now| now.i);
                found.is_ok_and(|found| now[found] == *pair) // I2
            });
            let mut next = still.next();
            while let Some(first) = next {
                let mut count = 1;
                next = still.next();
                while next.is_some_and(|pair| pair.i == first.i + count) {
                    count += 1;
                    next = still.next();
                }
                let mut range = Share {
                    block: step.block + first.i,
                    dst_block: step.dst_block + first.i,
                    count,
                };
                while range.count > 0 {
                    let shared = self.share_some(meta, stage, (src, dst), &range, STEP_EXTENTS)?;
                    // What was done is not looked at again.
                    let Some((done, _)) = shared else {
                        return Ok(Attempt::QueueFull);
                    };
                    equal.add(at + range.dst_block - step.dst_block, done);
                    range.block += done;
                    range.dst_block += done;
                    range.count -= done;
                }
            }
            Ok(Attempt::Done(()))
        })
    }

    /// Pairs of blocks that have different places and equal contents. The caller is pinned if it
    /// is going to share them.
    fn compare(&self, src: Ino, dst: Ino, step: &Share, equal: &mut Equal) -> Result<Vec<Pair>> {
        let _pin = self.readers.pin(); // I1
        let (pairs, sums) = {
            let over = Over::of_both(&self.stage.lock(), src, dst, step); // I4
            let meta = self.meta.read();
            let pairs = differing_places(&meta, &over, src, dst, step)?;
            let mut blocks: Vec<u64> = pairs.iter().flat_map(|pair| [pair.from, pair.to]).collect();
            blocks.sort_unstable();
            blocks.dedup();
            let mut sums = Vec::with_capacity(blocks.len());
            meta.sums_of(&mut blocks.iter().copied(), &mut sums)?;
            let sums: BTreeMap<u64, u32> = blocks.into_iter().zip(sums).collect();
            (pairs, sums)
        };
        let sum = |block: u64| sums.get(&block).copied().unwrap_or_default();
        let mut pairs: Vec<Pair> = pairs
            .into_iter()
            .filter(|pair| sum(pair.from) == sum(pair.to))
            .collect();
        if pairs.is_empty() {
            return Ok(pairs);
        }
        let places = |side: fn(&Pair) -> u64| -> Vec<(u64, u32)> {
            let block = |pair| (side(pair), sum(side(pair)));
            pairs.iter().map(block).collect()
        };
        let left = self.read_places(&places(|pair| pair.from))?;
        let right = self.read_places(&places(|pair| pair.to))?;
        equal.compared += pairs.len() as u64;
        let mut same = left
            .chunks(BLOCK_SIZE)
            .zip(right.chunks(BLOCK_SIZE))
            .map(|(left, right)| left == right);
        pairs.retain(|_| same.next() == Some(true));
        Ok(pairs)
    }

    /// Gives all blocks of a file their places.
    fn place_all(&self, ino: Ino) -> Result<()> {
        let _gate = self.gate.read();
        let _owned = self.own_file(ino);
        self.destage_file(ino)
    }

    fn is_staged(&self, ino: Ino, block: u64, count: u64) -> bool {
        let stage = self.stage.lock();
        let file = stage.file(ino);
        file.is_some_and(|file| !file.range(block, block + count).is_empty())
    }
}

/// What is staged over a range of a file.
struct Over {
    attr: Option<FileAttr>,
    blocks: Vec<u64>,
}

impl Over {
    fn of(stage: &Stage, ino: Ino, block: u64, count: u64) -> Self {
        let file = stage.file(ino);
        let blocks = file.map(|file| file.range(block, block + count));
        Self {
            attr: file.map(|file| file.attr),
            blocks: blocks.unwrap_or_default().into_keys().collect(),
        }
    }

    fn of_both(stage: &Stage, src: Ino, dst: Ino, step: &Share) -> [Self; 2] {
        [
            Self::of(stage, src, step.block, step.count),
            Self::of(stage, dst, step.dst_block, step.count),
        ]
    }

    /// The size of the file, in bytes.
    fn size(&self, meta: &Meta, ino: Ino) -> Result<u64> {
        let inode = meta.inode(ino)?;
        Ok(self.attr.map_or(inode.size, |attr| attr.size))
    }
}

/// Blocks of a step that both files have, in different places.
fn differing_places(
    meta: &Meta,
    [over_src, over_dst]: &[Over; 2],
    src: Ino,
    dst: Ino,
    step: &Share,
) -> Result<Vec<Pair>> {
    let from = places_of(meta, over_src, src, step.block, step.count)?;
    let to = places_of(meta, over_dst, dst, step.dst_block, step.count)?;
    let pair = |(i, from, to): (u64, &Option<u64>, &Option<u64>)| {
        let (from, to) = ((*from)?, (*to)?);
        (from != to).then_some(Pair { i, from, to })
    };
    let both = (0..).zip(&from).zip(&to);
    Ok(both
        .filter_map(|((i, from), to)| pair((i, from, to)))
        .collect())
}

/// The place of each of `count` blocks of a file, if it has one and nothing is staged over it.
fn places_of(
    meta: &Meta,
    over: &Over,
    ino: Ino,
    block: u64,
    count: u64,
) -> Result<Vec<Option<u64>>> {
    let size = over.size(meta, ino)?;
    let root = meta.file(ino)?.root;
    let mut places = vec![None; count as usize];
    // What a clone in pieces does not show yet is not looked at.
    let end = (block + count).min(blocks_of(size)).max(block);
    meta.mapped(root, block, end, &mut |part: Mapped| {
        if !part.extent.is_lost() {
            for i in 0..u64::from(part.extent.len) {
                places[(part.at + i - block) as usize] = Some(part.extent.block + i);
            }
        }
        ControlFlow::Continue(())
    })?;
    for at in &over.blocks {
        places[(at - block) as usize] = None;
    }
    Ok(places)
}

#[cfg(test)]
mod tests;
