//! The space map in memory: which blocks are free, and which will be.
//!
//! Invariants:
//!
//! 1. A block is allocatable only if no durable tree and no tree in memory refers to it: what a
//!    generation frees becomes allocatable when the checkpoint that freed it is durable.
//! 2. `free` of a group counts the bits of its bitmap, whether that is loaded or not.
//! 3. A bitmap is derived (gaps of the refcount tree, less `released_later`, less what was
//!    allocated since); a group with allocations since the last checkpoint stays loaded.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::error::{Error, Kind, Result};
use crate::ondisk::extent::{Extent, GROUP_BLOCKS};

use super::delta::Delta;

/// Words of a group's bitmap.
const WORDS: usize = (GROUP_BLOCKS / 64) as usize;
/// Groups that an allocation looks at for a run of the wanted length before it takes any run.
const GROUPS_TRIED: u64 = 8;
/// Blocks reserved for each staged block: its own, and its share of tree nodes that its mapping
/// changes (a leaf of the extent map, one of the refcounts, part of their parents).
pub(crate) const RESERVE_PER_BLOCK: u64 = 4;

/// Blocks of the aligned pieces in which freed space goes back to the host: 64 KiB, so that the
/// host's file does not fall to pieces.
pub(crate) const PIECE: u64 = 16;
const _: () = assert!(GROUP_BLOCKS.is_multiple_of(PIECE));
/// Runs that wait to be given back, at most: about 4 MiB. What is freed beyond that stays with
/// the pool until it is used and freed again.
const WAITING_MAX: usize = 64 * 1024;

/// Counters that are read and changed without the meta lock.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Allocatable blocks.
    free: AtomicU64,
    /// Blocks promised to writes that were acknowledged.
    reserved: AtomicU64,
    /// Blocks that only deleting, discarding and checkpoints may use.
    floor: AtomicU64,
    /// Dirty nodes of the current generation.
    dirty: AtomicUsize,
    /// Runs of blocks whose reference count changed in it.
    delta: AtomicUsize,
    /// Blocks in all.
    total: u64,
}

impl Counters {
    /// Promises space for `blocks` staged blocks: each with the worst case of its mapping.
    pub(crate) fn reserve(&self, blocks: u64) -> Result<()> {
        self.reserve_exactly(blocks * RESERVE_PER_BLOCK)
    }

    /// Promises `want` blocks.
    pub(crate) fn reserve_exactly(&self, want: u64) -> Result<()> {
        if want == 0 {
            return Ok(()); // also below the floor: deleting needs no promise
        }
        // The promise comes before the look: an allocation lowers `free` before it takes its
        // promise back, so whichever order this sees, nothing is promised twice.
        let before = self.reserved.fetch_add(want, Ordering::SeqCst);
        let free = self.free.load(Ordering::SeqCst);
        let floor = self.floor.load(Ordering::Relaxed);
        if free < before + want + floor {
            self.reserved.fetch_sub(want, Ordering::SeqCst);
            return Err(full());
        }
        Ok(())
    }

    /// Promises space for the few blocks that are rewritten so that others can be freed: these
    /// may use half of what is kept back.
    pub(crate) fn reserve_for_freeing(&self, blocks: u64) -> Result<()> {
        self.reserve(blocks).or_else(|error| {
            if self.free() < self.floor() / 2 {
                return Err(error);
            }
            self.reserve_anyway(blocks);
            Ok(())
        })
    }

    /// Promises without looking: replay does, for what was promised before the crash.
    pub(crate) fn reserve_anyway(&self, blocks: u64) {
        self.reserved
            .fetch_add(blocks * RESERVE_PER_BLOCK, Ordering::Relaxed);
    }

    /// Takes a promise back, because the blocks were allocated or are not needed.
    pub(crate) fn unreserve(&self, blocks: u64) {
        self.unreserve_exactly(blocks * RESERVE_PER_BLOCK);
    }

    /// Takes back what [`reserve_exactly`](Self::reserve_exactly) promised.
    pub(crate) fn unreserve_exactly(&self, want: u64) {
        let before = self.reserved.fetch_sub(want, Ordering::Relaxed);
        assert!(
            before >= want,
            "more space was given back than was reserved"
        );
    }

    /// Blocks that a user can still write.
    pub(crate) fn available(&self) -> u64 {
        let kept = self.reserved.load(Ordering::Relaxed) + self.floor.load(Ordering::Relaxed);
        self.free.load(Ordering::Relaxed).saturating_sub(kept)
    }

    /// Allocatable blocks, the floor included.
    pub(crate) fn free(&self) -> u64 {
        self.free.load(Ordering::Relaxed)
    }

    /// Dirty nodes of the current generation.
    pub(crate) fn dirty(&self) -> usize {
        self.dirty.load(Ordering::Relaxed)
    }

    /// Runs of blocks whose reference count changed in the current generation.
    pub(crate) fn delta(&self) -> usize {
        self.delta.load(Ordering::Relaxed)
    }

    /// Tells what the current generation has gathered.
    pub(crate) fn set_gathered(&self, nodes: usize, runs: usize) {
        self.dirty.store(nodes, Ordering::Relaxed);
        self.delta.store(runs, Ordering::Relaxed);
    }

    /// True if storing the changed reference counts could need more nodes than there is space
    /// for: at most one for each run, or as many as the refcount tree can have, whose leaves are
    /// at least a quarter full (63 records).
    pub(crate) fn is_tight(&self) -> bool {
        let leaves = (self.total - self.free().min(self.total)) / 64 + 2;
        let need = (self.delta() as u64).min(leaves);
        need > self.floor() / 2 + self.available()
    }

    /// Blocks that are kept back.
    pub(crate) fn floor(&self) -> u64 {
        self.floor.load(Ordering::Relaxed)
    }
}

/// The error of a pool without space.
pub(crate) fn full() -> Error {
    Error::new(Kind::NoSpace, "the pool is full: delete files or grow it")
}

/// One allocation group.
#[derive(Debug)]
struct Group {
    /// Allocatable blocks.
    free: u32,
    /// Blocks freed in this generation, allocatable after its checkpoint.
    later: u32,
    /// What the group tree says.
    stored: u32,
    /// Bit set: allocatable.
    bitmap: Option<Box<[u64; WORDS]>>,
    /// Generation of the last allocation.
    touched: u64,
}

/// Which cursor an allocation advances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Contents of files.
    Data,
    /// Tree nodes, kept together.
    Node,
}

/// The space map of a pool.
#[derive(Debug)]
pub(crate) struct Space {
    first: u64,
    end: u64,
    /// Groups that are not entirely free, or were looked at.
    groups: BTreeMap<u64, Group>,
    /// Groups whose record in the group tree may be out of date.
    changed: BTreeSet<u64>,
    /// Reference counts since the last checkpoint.
    pub(crate) delta: Delta,
    /// Runs (start, end) freed by the generation that is being written.
    released_later: Vec<(u64, u64)>,
    /// Free runs, first block to end, that may be given back to the host.
    to_discard: BTreeMap<u64, u64>,
    /// Next block to try, for data and for nodes.
    cursors: [u64; 2],
    pub(crate) counters: Arc<Counters>,
    /// Nodes are allocated from groups whose bitmap is loaded, as long as those have any.
    pub(crate) loaded_only: bool,
}

/// Where an allocation found no bitmap: the caller loads it and tries again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Allocated.
    Run(Extent),
    /// The bitmap of this group is needed.
    NeedsGroup(u64),
}

impl Space {
    /// The space from block `first` up to `end`, all of it free. `floor`: blocks kept back.
    pub(crate) fn new(first: u64, end: u64, floor: u64) -> Self {
        let counters = Counters {
            total: end - first,
            ..Counters::default()
        };
        counters.free.store(end - first, Ordering::Relaxed);
        counters.floor.store(floor, Ordering::Relaxed);
        let first_group = first / GROUP_BLOCKS;
        let last_group = (end - 1) / GROUP_BLOCKS;
        // Nodes at the front, data from the second group on, where there is one.
        let data = if last_group > first_group {
            (first_group + 1) * GROUP_BLOCKS
        } else {
            first
        };
        Self {
            first,
            end,
            groups: BTreeMap::new(),
            changed: BTreeSet::new(),
            delta: Delta::default(),
            released_later: Vec::new(),
            to_discard: BTreeMap::new(),
            cursors: [data, first],
            counters: Arc::new(counters),
            loaded_only: false,
        }
    }

    /// Blocks in all.
    pub(crate) fn total(&self) -> u64 {
        self.end - self.first
    }

    /// True if the whole run lies where blocks can be allocated.
    pub(crate) fn contains(&self, run: Extent) -> bool {
        self.contains_range(run.block, run.end())
    }

    /// True if all blocks `start` up to `end` can be allocated.
    pub(crate) fn contains_range(&self, start: u64, end: u64) -> bool {
        start >= self.first && end <= self.end
    }

    /// The blocks of group `group`.
    pub(crate) fn group_range(&self, group: u64) -> (u64, u64) {
        let start = (group * GROUP_BLOCKS).max(self.first);
        (start, ((group + 1) * GROUP_BLOCKS).min(self.end))
    }

    fn group(&mut self, group: u64) -> &mut Group {
        let (start, end) = self.group_range(group);
        let size = (end - start) as u32;
        self.groups.entry(group).or_insert_with(|| Group {
            free: size,
            later: 0,
            stored: size,
            bitmap: None,
            touched: 0,
        })
    }

    /// Tells what the group tree says, when the pool is opened.
    pub(crate) fn set_group(&mut self, group: u64, free: u32) -> Result<()> {
        let (start, end) = self.group_range(group.min(self.end / GROUP_BLOCKS));
        let size = end.saturating_sub(start);
        if group > (self.end - 1) / GROUP_BLOCKS || size == 0 || u64::from(free) > size {
            return Err(Error::corrupt(format!(
                "group is impossible: group={group} free={free}"
            )));
        }
        let entry = self.group(group);
        entry.free = free;
        entry.stored = free;
        self.counters
            .free
            .fetch_sub(size - u64::from(free), Ordering::Relaxed);
        Ok(())
    }

    /// Installs the bitmap of a group: `used` are the runs that the refcount tree knows.
    pub(crate) fn load_group(&mut self, group: u64, used: &[(u64, u64)]) -> Result<()> {
        let (start, end) = self.group_range(group);
        let base = group * GROUP_BLOCKS;
        let mut bitmap = Box::new([0; WORDS]);
        set_bits(&mut bitmap, start - base, end - base, true);
        for &(from, to) in used.iter().chain(&self.released_later) {
            let (from, to) = (from.max(start), to.min(end));
            if from < to {
                set_bits(&mut bitmap, from - base, to - base, false);
            }
        }
        let count: u32 = bitmap.iter().map(|word| word.count_ones()).sum();
        let entry = self.group(group);
        if count != entry.free {
            return Err(Error::corrupt(format!(
                "free blocks of a group do not add up: group={group} found={count} recorded={}",
                entry.free
            )));
        }
        entry.bitmap = Some(bitmap);
        Ok(())
    }

    /// Finds and takes a run of up to `want` blocks, or says which bitmap it needs first.
    pub(crate) fn find(&mut self, class: Class, want: u32, generation: u64) -> Result<Found> {
        assert!(want > 0);
        if self.loaded_only
            && class == Class::Node
            && let Some(run) = self.find_loaded(want, generation)
        {
            return Ok(Found::Run(run));
        }
        let cursor = self.cursors[class as usize];
        let first_group = self.first / GROUP_BLOCKS;
        let groups = (self.end - 1) / GROUP_BLOCKS - first_group + 1;
        let start = cursor.clamp(self.first, self.end - 1) / GROUP_BLOCKS - first_group;
        let other = self.cursors[1 - class as usize] / GROUP_BLOCKS;
        for pass in 0..3 {
            let tries = if pass == 0 {
                groups.min(GROUPS_TRIED)
            } else {
                groups
            };
            // The last step comes back to the first group, to the blocks before the cursor.
            for step in 0..=tries {
                let group = first_group + (start + step) % groups;
                let least = if pass == 0 { want } else { 1 };
                if (pass < 2 && groups > 2 && group == other) || self.group(group).free < least {
                    continue;
                }
                if self.group(group).bitmap.is_none() {
                    return Ok(Found::NeedsGroup(group));
                }
                let from = if step == 0 {
                    cursor.max(group * GROUP_BLOCKS)
                } else {
                    0
                };
                if let Some(run) = self.take_run(group, from, want, least, generation) {
                    self.cursors[class as usize] = run.end();
                    return Ok(Found::Run(run));
                }
            }
        }
        Err(Error::new(Kind::NoSpace, "the pool has no free block left"))
    }

    /// A run for nodes from the groups whose bitmap is loaded, that of the cursor first.
    fn find_loaded(&mut self, want: u32, generation: u64) -> Option<Extent> {
        let cursor = self.cursors[Class::Node as usize];
        let (own, has_room) = (cursor / GROUP_BLOCKS, |group: &Group| {
            group.bitmap.is_some() && group.free > 0
        });
        let groups = self
            .groups
            .iter()
            .filter(|(_, group)| has_room(group))
            .map(|(at, _)| *at);
        let first = self.groups.get(&own).is_some_and(has_room).then_some(own);
        let candidates: Vec<u64> = first.into_iter().chain(groups.take(2)).collect();
        for group in candidates {
            let from = if group == own { cursor } else { 0 };
            let run = self.take_run(group, from, want, 1, generation);
            if let Some(run) = run.or_else(|| self.take_run(group, 0, want, 1, generation)) {
                self.cursors[Class::Node as usize] = run.end();
                return Some(run);
            }
        }
        None
    }

    /// Free blocks of the groups whose bitmap is loaded.
    pub(crate) fn loaded_free(&self) -> u64 {
        let loaded = self.groups.values().filter(|group| group.bitmap.is_some());
        loaded.map(|group| u64::from(group.free)).sum()
    }

    /// A group with free blocks whose bitmap is not loaded.
    pub(crate) fn next_unloaded(&self) -> Option<u64> {
        let groups = self.first / GROUP_BLOCKS..=(self.end - 1) / GROUP_BLOCKS;
        groups.into_iter().find(|group| {
            let known = self.groups.get(group);
            known.is_none_or(|group| group.bitmap.is_none() && group.free > 0)
        })
    }

    fn take_run(
        &mut self,
        group: u64,
        from: u64,
        want: u32,
        least: u32,
        generation: u64,
    ) -> Option<Extent> {
        let base = group * GROUP_BLOCKS;
        let entry = self.groups.get_mut(&group)?;
        let bitmap = entry.bitmap.as_mut()?;
        let (at, len) = find_run(bitmap, from.saturating_sub(base), want, least)?;
        set_bits(bitmap, at, at + u64::from(len), false);
        entry.free -= len;
        entry.touched = generation;
        self.changed.insert(group);
        self.counters
            .free
            .fetch_sub(u64::from(len), Ordering::Relaxed);
        Some(Extent {
            block: base + at,
            len,
        })
    }

    /// The groups that a run touches, each with its part.
    fn parts(&self, start: u64, end: u64) -> Vec<(u64, u64, u64)> {
        let groups = start / GROUP_BLOCKS..=(end - 1) / GROUP_BLOCKS;
        groups
            .map(|g| {
                (
                    g,
                    start.max(g * GROUP_BLOCKS),
                    end.min((g + 1) * GROUP_BLOCKS),
                )
            })
            .collect()
    }

    /// Groups of a run whose bitmap is not loaded.
    pub(crate) fn missing_groups(&self, run: Extent) -> Vec<u64> {
        let groups = run.block / GROUP_BLOCKS..=(run.end() - 1) / GROUP_BLOCKS;
        groups.filter(|group| !self.is_loaded(*group)).collect()
    }

    /// Takes a certain run (replay does), whose bitmaps are loaded.
    ///
    /// # Errors
    /// `Corrupt` if any of it is in use.
    pub(crate) fn take_exact(&mut self, run: Extent, generation: u64) -> Result<()> {
        for (group, start, end) in self.parts(run.block, run.end()) {
            let base = group * GROUP_BLOCKS;
            let entry = self.group(group);
            let bitmap = entry
                .bitmap
                .as_mut()
                .expect("the caller loaded the bitmaps");
            if (start..end).any(|block| !bit(bitmap, block - base)) {
                return Err(Error::corrupt(format!(
                    "journal maps blocks that are in use: block={start} end={end}"
                )));
            }
            set_bits(bitmap, start - base, end - base, false);
            entry.free -= (end - start) as u32;
            entry.touched = generation;
            self.changed.insert(group);
            self.counters.free.fetch_sub(end - start, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Gives back a run that was allocated and never referred to.
    pub(crate) fn unalloc(&mut self, run: Extent) {
        self.set_free(run.block, run.end());
    }

    fn set_free(&mut self, start: u64, end: u64) {
        for (group, start, end) in self.parts(start, end) {
            let base = group * GROUP_BLOCKS;
            let entry = self.group(group);
            if let Some(bitmap) = entry.bitmap.as_mut() {
                assert!(
                    (start..end).all(|block| !bit(bitmap, block - base)),
                    "freed twice"
                );
                set_bits(bitmap, start - base, end - base, true);
            }
            entry.free += (end - start) as u32;
            self.changed.insert(group);
            self.counters.free.fetch_add(end - start, Ordering::Relaxed);
        }
    }

    /// Notes a run that no tree of this generation refers to any more. `stored`: it had records
    /// of its own in the refcount tree.
    ///
    /// # Errors
    /// `Corrupt` if any of it is free already.
    pub(crate) fn free_later(&mut self, start: u64, end: u64, stored: bool) -> Result<()> {
        for (group, start, end) in self.parts(start, end) {
            let base = group * GROUP_BLOCKS;
            let (group_start, group_end) = self.group_range(group);
            let size = (group_end - group_start) as u32;
            let count = (end - start) as u32;
            let entry = self.group(group);
            let in_use = match &entry.bitmap {
                Some(bitmap) => (start..end).all(|block| !bit(bitmap, block - base)),
                None => stored, // I3: what was allocated since has its bitmap
            };
            if !in_use || entry.free + entry.later + count > size {
                return Err(Error::corrupt(format!(
                    "blocks that are dropped are free already: block={start} end={end}"
                )));
            }
            entry.later += count;
            self.changed.insert(group);
        }
        match self.released_later.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => self.released_later.push((start, end)),
        }
        Ok(())
    }

    /// A group whose record is out of date, with the value it should have after the checkpoint.
    pub(crate) fn next_changed(&mut self) -> Option<(u64, u32)> {
        while let Some(group) = self.changed.pop_first() {
            let entry = self.group(group);
            let now = entry.free + entry.later;
            if now != entry.stored {
                entry.stored = now;
                return Some((group, now));
            }
        }
        None
    }

    /// Free blocks once the checkpoint being written is durable.
    pub(crate) fn free_after(&self) -> u64 {
        let later: u64 = self
            .released_later
            .iter()
            .map(|(start, end)| end - start)
            .sum();
        self.counters.free() + later
    }

    /// The checkpoint is durable: what it freed becomes allocatable.
    pub(crate) fn release(&mut self) {
        for (start, end) in std::mem::take(&mut self.released_later) {
            for (group, start, end) in self.parts(start, end) {
                self.group(group).later -= (end - start) as u32;
            }
            let changed = std::mem::take(&mut self.changed);
            self.set_free(start, end);
            self.changed = changed;
            self.wait_for_discard(start, end);
        }
    }

    /// Notes a free run to be given back to the host.
    fn wait_for_discard(&mut self, start: u64, end: u64) {
        let (mut start, mut end) = (start, end);
        if let Some((&at, &to)) = self.to_discard.range(..=start).next_back()
            && to >= start
        {
            self.to_discard.remove(&at);
            (start, end) = (at, end.max(to));
        }
        while let Some((&at, &to)) = self.to_discard.range(start..=end).next() {
            self.to_discard.remove(&at);
            end = end.max(to);
        }
        if self.to_discard.len() < WAITING_MAX {
            self.to_discard.insert(start, end);
        }
    }

    /// True if something waits to be given back.
    pub(crate) fn has_discards(&self) -> bool {
        !self.to_discard.is_empty()
    }

    /// Takes the next part of what waits to be given back, in one group and of up to `most`
    /// blocks: the group, and the run rounded outwards to whole pieces. Some of it may be in use
    /// again, or still.
    pub(crate) fn next_discard(&mut self, most: u64) -> Option<(u64, u64, u64)> {
        let (&at, &to) = self.to_discard.first_key_value()?;
        let group = at / GROUP_BLOCKS;
        let start = at / PIECE * PIECE;
        let end = (to.next_multiple_of(PIECE))
            .min((group + 1) * GROUP_BLOCKS)
            .min(start + most / PIECE * PIECE);
        if end <= start {
            return None;
        }
        self.to_discard.remove(&at);
        if end < to {
            self.to_discard.insert(end, to);
        }
        Some((group, start, end))
    }

    /// Takes the pieces of a run within one group, whose bitmap is loaded, that are entirely
    /// free. The caller puts them back.
    pub(crate) fn take_pieces(&mut self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let base = start / GROUP_BLOCKS * GROUP_BLOCKS;
        let entry = self.group(start / GROUP_BLOCKS);
        let bitmap = entry.bitmap.as_mut().expect("the caller loaded the bitmap");
        let mut taken = Vec::new();
        for at in (start..end).step_by(PIECE as usize) {
            if (at..at + PIECE).all(|block| bit(bitmap, block - base)) {
                set_bits(bitmap, at - base, at - base + PIECE, false);
                entry.free -= PIECE as u32;
                taken.push((at, at + PIECE));
            }
        }
        let count = taken.len() as u64 * PIECE;
        self.counters.free.fetch_sub(count, Ordering::Relaxed);
        taken
    }

    /// Puts back what [`take_pieces`](Self::take_pieces) took.
    pub(crate) fn put_back(&mut self, start: u64, end: u64) {
        self.set_free(start, end);
    }

    /// True if the bitmap of a group is in memory.
    pub(crate) fn is_loaded(&self, group: u64) -> bool {
        let found = self.groups.get(&group);
        found.is_some_and(|group| group.bitmap.is_some())
    }

    /// Drops bitmaps that can be derived again, beyond `keep` of them.
    pub(crate) fn trim(&mut self, keep: usize, generation: u64) {
        let mut loaded = self
            .groups
            .values()
            .filter(|group| group.bitmap.is_some())
            .count();
        for group in self.groups.values_mut() {
            if loaded <= keep {
                break;
            }
            // I3: only allocations of older generations are in the refcount tree.
            if group.bitmap.is_some() && group.touched < generation && group.later == 0 {
                group.bitmap = None;
                loaded -= 1;
            }
        }
    }
}

fn bit(bitmap: &[u64; WORDS], at: u64) -> bool {
    bitmap[(at / 64) as usize] >> (at % 64) & 1 == 1
}

fn set_bits(bitmap: &mut [u64; WORDS], from: u64, to: u64, value: bool) {
    let mut at = from;
    while at < to {
        let count = (64 - at % 64).min(to - at);
        let mask = (u64::MAX >> (64 - count)) << (at % 64);
        let word = &mut bitmap[(at / 64) as usize];
        *word = if value { *word | mask } else { *word & !mask };
        at += count;
    }
}

/// Finds a run of at least `least` set bits from `from` on and returns up to `want` of it.
fn find_run(bitmap: &[u64; WORDS], from: u64, want: u32, least: u32) -> Option<(u64, u32)> {
    let mut at = from;
    while at < GROUP_BLOCKS {
        let word = bitmap[(at / 64) as usize] >> (at % 64);
        if word == 0 {
            at = (at / 64 + 1) * 64;
            continue;
        }
        at += u64::from(word.trailing_zeros());
        let mut len = 0;
        while len < u64::from(want) && at + len < GROUP_BLOCKS {
            let pos = at + len;
            let ones = u64::from((bitmap[(pos / 64) as usize] >> (pos % 64)).trailing_ones());
            let ones = ones.min(64 - pos % 64);
            len += ones;
            if ones == 0 || ones < 64 - pos % 64 {
                break;
            }
        }
        if len >= u64::from(least) {
            return Some((at, len.min(u64::from(want)) as u32));
        }
        at += len;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(block: u64, len: u32) -> Extent {
        Extent { block, len }
    }

    #[test]
    fn runs_are_found_across_words() {
        let mut bitmap = [0; WORDS];
        set_bits(&mut bitmap, 60, 200, true);
        set_bits(&mut bitmap, 300, 310, true);
        assert_eq!(find_run(&bitmap, 0, 256, 1), Some((60, 140)));
        assert_eq!(find_run(&bitmap, 0, 100, 100), Some((60, 100)));
        assert_eq!(find_run(&bitmap, 0, 256, 141), None);
        assert_eq!(find_run(&bitmap, 201, 4, 1), Some((300, 4)));
    }

    #[test]
    fn only_pieces_that_are_wholly_free_are_discarded() {
        let mut space = Space::new(16, 1000, 0);
        space.load_group(0, &[]).unwrap();
        let Found::Run(all) = space.find(Class::Data, 984, 1).unwrap() else {
            panic!()
        };
        assert_eq!(all.len, 984);
        let free = |space: &mut Space, start, end| {
            space.free_later(start, end, false).unwrap();
            space.release();
            let mut taken = Vec::new();
            while let Some((_, start, end)) = space.next_discard(1 << 20) {
                taken.extend(space.take_pieces(start, end));
            }
            taken
                .iter()
                .for_each(|(start, end)| space.put_back(*start, *end));
            taken
        };
        // Two pieces whole, two in part; the rest of these comes later.
        assert_eq!(free(&mut space, 40, 90), [(48, 64), (64, 80)]);
        assert_eq!(free(&mut space, 32, 40), [(32, 48)]);
        assert_eq!(free(&mut space, 90, 96), [(80, 96)]);
        // The last piece reaches over the end of the space.
        assert_eq!(free(&mut space, 976, 1000), [(976, 992)]);
        assert_eq!(space.counters.free(), 64 + 24);
    }

    #[test]
    fn runs_that_wait_for_discard_are_joined() {
        let mut space = Space::new(16, 1000, 0);
        for (start, end) in [(100, 110), (120, 130), (110, 120), (90, 125), (300, 310)] {
            space.wait_for_discard(start, end);
        }
        assert_eq!(space.next_discard(64), Some((0, 80, 144)));
        assert_eq!(space.next_discard(8), None);
        assert_eq!(space.next_discard(16), Some((0, 288, 304)));
        assert_eq!(space.next_discard(16), Some((0, 304, 320)));
        assert_eq!(space.next_discard(16), None);
    }

    #[test]
    fn freed_blocks_come_back_only_after_release() {
        let mut space = Space::new(16, 1000, 0);
        space.load_group(0, &[]).unwrap();
        let Found::Run(all) = space.find(Class::Data, 984, 1).unwrap() else {
            panic!()
        };
        assert_eq!(all, run(16, 984));
        assert!(space.find(Class::Data, 1, 1).is_err());
        space.free_later(100, 110, false).unwrap();
        assert!(space.find(Class::Data, 1, 1).is_err());
        assert_eq!(space.free_after(), 10);
        space.release();
        assert_eq!(
            space.find(Class::Node, 4, 1).unwrap(),
            Found::Run(run(100, 4))
        );
    }
}
