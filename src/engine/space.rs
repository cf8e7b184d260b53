//! The space map in memory: which blocks are free, and which will be.
//!
//! Invariants:
//!
//! 1. A block is allocatable only if no durable tree and no tree in memory refers to it: what a
//!    generation frees becomes allocatable when the checkpoint that freed it is durable.
//! 2. `free` of a group counts the bits of its bitmap, whether that is loaded or not.
//! 3. The first blocks, as many as are kept back, are the *home* of tree nodes: the host has
//!    allocated them when the pool was made and they never go back to it. Data goes there only
//!    when there is no other place. So whatever else the host refuses, trees that fit their home
//!    can be written.
//! 4. A bitmap is derived (gaps of the refcount tree, less `released_later`, less what was
//!    allocated since); a group with allocations since the last checkpoint stays loaded.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::ondisk::extent::{Extent, GROUP_BLOCKS};
use crate::sync::atomic::Ordering;

use super::counters::Counters;
use super::delta::Delta;

mod held;

/// Words of a group's bitmap.
const WORDS: usize = (GROUP_BLOCKS / 64) as usize;
/// Groups that an allocation looks at for a run of the wanted length before it takes any run.
const GROUPS_TRIED: u64 = 8;
/// Blocks of the aligned pieces in which freed space goes back to the host: 64 KiB, so that the
/// host's file does not fall to pieces.
pub(crate) const PIECE: u64 = 16;
const _: () = assert!(GROUP_BLOCKS.is_multiple_of(PIECE));
/// Runs that wait to be given back, at most: about 4 MiB. What is freed beyond that stays with
/// the pool until it is used and freed again.
const WAITING_MAX: usize = 64 * 1024;

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
    /// Contents of files while the host has no space: to the home of the nodes (I3), of which a
    /// quarter stays theirs.
    Rescue,
}

/// The space map of a pool.
#[derive(Debug)]
pub(crate) struct Space {
    first: u64,
    end: u64,
    /// End of the home of the nodes, a multiple of `PIECE`.
    home: u64,
    /// What `end` will be when the checkpoint being written is durable.
    growing: Option<u64>,
    /// Groups that are not entirely free, or were looked at.
    groups: BTreeMap<u64, Group>,
    /// Groups whose record in the group tree may be out of date.
    changed: BTreeSet<u64>,
    /// Reference counts since the last checkpoint.
    pub(crate) delta: Delta,
    /// Runs (start, end) freed by the generation that is being written.
    released_later: Vec<(u64, u64)>,
    /// Runs within one group, first block to end, that the rest of the journal maps while it is
    /// replayed: nobody gets them, and on the device they count as free.
    held: BTreeMap<u64, u64>,
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
        let counters = Counters::default();
        counters.total.store(end - first, Ordering::Relaxed);
        counters.free.store(end - first, Ordering::Relaxed);
        counters.floor.store(floor, Ordering::Relaxed);
        let first_group = first / GROUP_BLOCKS;
        let last_group = (end - 1) / GROUP_BLOCKS;
        let home = home_end(first, end, floor);
        // Nodes at the front, data behind their home, from the second group on if there is one.
        let data = if last_group > first_group {
            home.max((first_group + 1) * GROUP_BLOCKS)
        } else {
            home
        };
        Self {
            first,
            end,
            home,
            growing: None,
            groups: BTreeMap::new(),
            changed: BTreeSet::new(),
            delta: Delta::default(),
            released_later: Vec::new(),
            held: BTreeMap::new(),
            to_discard: BTreeMap::new(),
            cursors: [data, first],
            counters: Arc::new(counters),
            loaded_only: false,
        }
    }

    /// The blocks that the host should allocate in advance: first and end of the home.
    pub(crate) fn home(&self) -> (u64, u64) {
        (self.first, self.home)
    }

    /// Makes the blocks from `end` up to `new_end` part of the checkpoint that is being written.
    /// They can be allocated when it is durable ([`release`](Self::release)): until then the
    /// superblock does not know them, and a journal that named them could not be replayed.
    pub(crate) fn begin_growth(&mut self, new_end: u64) {
        assert!(new_end > self.end);
        if let Some(planned) = self.growing.replace(new_end) {
            // The checkpoint that was to have that end did not come about.
            let (last, until) = self.growth_of_last_group(planned);
            self.group(last).later -= (until - self.end) as u32;
        }
        let (_, until) = self.growth_of_last_group(new_end);
        if until > self.end {
            let (last, count) = ((self.end - 1) / GROUP_BLOCKS, until - self.end);
            self.group(last).later += count as u32;
            self.changed.insert(last);
        }
    }

    /// The last group as it is, and up to where it will reach.
    fn growth_of_last_group(&self, new_end: u64) -> (u64, u64) {
        let last = (self.end - 1) / GROUP_BLOCKS;
        (last, ((last + 1) * GROUP_BLOCKS).min(new_end).max(self.end))
    }

    /// The checkpoint that has the new end is durable. `floor`: blocks kept back from now on.
    fn end_growth(&mut self, new_end: u64, floor: u64) {
        let (last, until) = self.growth_of_last_group(new_end);
        let (old_end, changed) = (self.end, std::mem::take(&mut self.changed));
        self.end = new_end;
        if until > old_end {
            self.group(last).later -= (until - old_end) as u32;
            self.set_free(old_end, until);
        }
        self.changed = changed;
        // Groups behind it are entirely free, which needs no record.
        self.counters
            .free
            .fetch_add(new_end - until, Ordering::Relaxed);
        self.counters
            .total
            .store(new_end - self.first, Ordering::Relaxed);
        self.counters.floor.store(floor, Ordering::Relaxed);
        self.home = home_end(self.first, new_end, floor);
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
        let held = self.held.range(start..end).map(|(from, to)| (*from, *to));
        let taken = used.iter().chain(&self.released_later).copied();
        for (from, to) in taken.chain(held) {
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
        if class == Class::Rescue && self.home_free() < u64::from(want) + self.home_len() / 4 {
            return Err(Error::new(
                Kind::NoSpace,
                "the reserve of the pool is used up",
            ));
        }
        if class != Class::Data
            && let Some(found) = self.find_home(want, generation)
        {
            return Ok(found);
        }
        if class == Class::Rescue {
            return Err(Error::new(
                Kind::NoSpace,
                "the reserve of the pool is used up",
            ));
        }
        if self.loaded_only
            && class == Class::Node
            && let Some(run) = self.find_loaded(want, generation)
        {
            return Ok(Found::Run(run));
        }
        let lowest = if class == Class::Data {
            self.home
        } else {
            self.first
        };
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
                if (pass < 2 && groups > 2 && group == other)
                    || (group + 1) * GROUP_BLOCKS <= lowest
                    || self.group(group).free < least
                {
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
                let range = (from.max(lowest), u64::MAX);
                if let Some(run) = self.take_run(group, range, want, least, generation) {
                    self.cursors[class as usize] = run.end();
                    return Ok(Found::Run(run));
                }
            }
        }
        // Nothing is left but the home.
        if let Some(found) = self.find_home(want, generation) {
            return Ok(found);
        }
        Err(Error::new(Kind::NoSpace, "the pool has no free block left"))
    }

    fn home_len(&self) -> u64 {
        self.home - self.first
    }

    /// Blocks of the home that may rescue staged data, as far as bitmaps are loaded.
    pub(crate) fn rescue_room(&self) -> u64 {
        self.home_free().saturating_sub(self.home_len() / 4)
    }

    /// Free blocks of the home, as far as bitmaps are loaded.
    fn home_free(&self) -> u64 {
        let parts = self.parts(self.first, self.home.max(self.first + 1));
        let free = parts.into_iter().map(|(group, start, end)| {
            let bitmap = self
                .groups
                .get(&group)
                .and_then(|group| group.bitmap.as_ref());
            let base = group * GROUP_BLOCKS;
            bitmap.map_or(0, |bitmap| count_bits(bitmap, start - base, end - base))
        });
        free.sum()
    }

    /// A run in the home of the nodes, behind the last one or before it.
    fn find_home(&mut self, want: u32, generation: u64) -> Option<Found> {
        let cursor = self.cursors[Class::Node as usize].clamp(self.first, self.home);
        for (from, to) in [(cursor, self.home), (self.first, cursor)] {
            if from >= to {
                continue;
            }
            for (group, from, to) in self.parts(from, to) {
                if self.group(group).free == 0 {
                    continue;
                }
                if !self.is_loaded(group) {
                    if self.loaded_only {
                        continue;
                    }
                    return Some(Found::NeedsGroup(group));
                }
                if let Some(run) = self.take_run(group, (from, to), want, 1, generation) {
                    self.cursors[Class::Node as usize] = run.end();
                    return Some(Found::Run(run));
                }
            }
        }
        None
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
            let (from, all) = (if group == own { cursor } else { 0 }, (0, u64::MAX));
            let run = self.take_run(group, (from, u64::MAX), want, 1, generation);
            if let Some(run) = run.or_else(|| self.take_run(group, all, want, 1, generation)) {
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

    /// Takes a run of up to `want` blocks of a group, within the blocks of `range`.
    fn take_run(
        &mut self,
        group: u64,
        range: (u64, u64),
        want: u32,
        least: u32,
        generation: u64,
    ) -> Option<Extent> {
        let base = group * GROUP_BLOCKS;
        let entry = self.groups.get_mut(&group)?;
        let bitmap = entry.bitmap.as_mut()?;
        let (from, to) = (range.0.saturating_sub(base), range.1.saturating_sub(base));
        let (at, len) = find_run(bitmap, (from, to.min(GROUP_BLOCKS)), want, least)?;
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

    /// Gives back a run that the host had no space for. What it allocated of it nevertheless is
    /// used next, or goes back.
    pub(crate) fn unalloc_refused(&mut self, run: Extent) {
        self.unalloc(run);
        if run.block >= self.home {
            self.cursors[Class::Data as usize] = run.block;
            self.wait_for_discard(run.block, run.end());
        }
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
            let (group_start, _) = self.group_range(group);
            let group_end = ((group + 1) * GROUP_BLOCKS).min(self.end_after());
            let size = (group_end - group_start) as u32;
            let count = (end - start) as u32;
            let entry = self.group(group);
            let in_use = match &entry.bitmap {
                Some(bitmap) => (start..end).all(|block| !bit(bitmap, block - base)),
                None => stored, // I4: what was allocated since has its bitmap
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
            let held = self.held_in(group);
            let entry = self.group(group);
            let now = entry.free + entry.later + held;
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
        let held: u64 = self.held.iter().map(|(start, end)| end - start).sum();
        let grown = self.growing.map_or(0, |new_end| new_end - self.end);
        self.counters.free() + later + held + grown
    }

    /// The end that the checkpoint being written will have.
    pub(crate) fn end_after(&self) -> u64 {
        self.growing.unwrap_or(self.end)
    }

    /// The checkpoint is durable: what it freed becomes allocatable, and what the pool grew by.
    /// `floor_of` tells the blocks to keep back of so many.
    pub(crate) fn release(&mut self, floor_of: impl Fn(u64) -> u64) {
        if let Some(new_end) = self.growing.take() {
            self.end_growth(new_end, floor_of(new_end - self.first));
        }
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

    /// Has all that is free given back to the host: what waited for it before a crash is not known.
    pub(crate) fn discard_all(&mut self) {
        self.wait_for_discard(self.first, self.end);
    }

    /// Notes a free run to be given back to the host.
    fn wait_for_discard(&mut self, start: u64, end: u64) {
        let (mut start, mut end) = (start.max(self.home), end); // I3
        if start >= end {
            return;
        }
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
            // I4: only allocations of older generations are in the refcount tree.
            if group.bitmap.is_some() && group.touched < generation && group.later == 0 {
                group.bitmap = None;
                loaded -= 1;
            }
        }
    }
}

/// End of the home of the nodes.
fn home_end(first: u64, end: u64, floor: u64) -> u64 {
    if floor == 0 {
        return first;
    }
    (first + floor)
        .next_multiple_of(PIECE)
        .min(end / PIECE * PIECE)
        .max(first)
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

fn count_bits(bitmap: &[u64; WORDS], from: u64, to: u64) -> u64 {
    let mut count = 0;
    let mut at = from;
    while at < to {
        let len = (64 - at % 64).min(to - at);
        let mask = (u64::MAX >> (64 - len)) << (at % 64);
        count += u64::from((bitmap[(at / 64) as usize] & mask).count_ones());
        at += len;
    }
    count
}

/// Finds a run of at least `least` set bits within a range and returns up to `want` of it.
fn find_run(
    bitmap: &[u64; WORDS],
    (from, to): (u64, u64),
    want: u32,
    least: u32,
) -> Option<(u64, u32)> {
    let mut at = from;
    while at < to {
        let word = bitmap[(at / 64) as usize] >> (at % 64);
        if word == 0 {
            at = (at / 64 + 1) * 64;
            continue;
        }
        at += u64::from(word.trailing_zeros());
        if at >= to {
            return None;
        }
        let mut len = 0;
        while len < u64::from(want) && at + len < to {
            let pos = at + len;
            let ones = u64::from((bitmap[(pos / 64) as usize] >> (pos % 64)).trailing_ones());
            let ones = ones.min(64 - pos % 64);
            len += ones;
            if ones == 0 || ones < 64 - pos % 64 {
                break;
            }
        }
        len = len.min(to - at);
        if len >= u64::from(least) {
            return Some((at, len.min(u64::from(want)) as u32));
        }
        at += len;
    }
    None
}

#[cfg(test)]
mod tests;
