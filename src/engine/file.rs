//! Contents of files: reading, and writing through the stage or directly to new blocks.
//!
//! Invariants:
//!
//! 1. Bytes behind the end of a file are zero wherever they are stored, so that a file can grow
//!    without touching them.
//! 2. A write of part of a block has the file for itself: two of them never lose each other's
//!    bytes. Writes of whole blocks share the file.
//! 3. What one call queues for the journal it queues at once, so that no crash separates it.

use std::collections::{BTreeMap, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::ondisk::extent::Extent;
use crate::ondisk::inode::{FILE_SIZE_MAX, FLAG_PINNED};
use crate::ondisk::record::Record;
use crate::ondisk::{Page, crc32c, is_zero};
use crate::sync::atomic::Ordering;
use crate::units::{BLOCK_SIZE, Ino, Time};

use super::apply::{apply, attr_of, blocks_of};
use super::counters::Counters;
use super::extents::Mapped;
use super::meta::Meta;
use super::pool::Pool;
use super::space::Class;
use super::stage::{BLOCK_COST, Stage, Staged, TOUCH_COST, record_cost};

/// Aligned writes of at least this many bytes go straight to new blocks: 64 KiB, where writing
/// twice costs more than the flush it saves.
const DIRECT_MIN: usize = 64 * 1024;
/// Runs of at least this many blocks are read past the cache: whoever reads 512 KiB at once
/// copies an image or scans it, and would only drive out what guests share.
const STREAM_BLOCKS: u32 = 128;
/// Most bytes of one direct step: one request of the kernel.
const DIRECT_MAX: usize = 1024 * 1024;

/// Blocks reserved for the tree nodes that one direct step changes: paths of extent map,
/// checksums, namespace and refcounts.
const DIRECT_NODES: u64 = 32;

const B: u64 = BLOCK_SIZE as u64;

/// The contents of a block, ready for the stage.
pub(crate) fn staged(bytes: &[u8]) -> Staged {
    if is_zero(bytes) {
        return Staged { data: None, crc: 0 };
    }
    let mut page: Arc<Page> = Arc::new([0; BLOCK_SIZE]);
    Arc::make_mut(&mut page).copy_from_slice(bytes);
    Staged {
        crc: crc32c(&page[..]),
        data: Some(page),
    }
}

/// Copies the overlap of a block at file offset `at` into `out`, which begins at `offset`.
fn overlay(out: &mut [u8], offset: u64, at: u64, page: Option<&Page>) {
    let (from, to) = (at.max(offset), (at + B).min(offset + out.len() as u64));
    if from >= to {
        return;
    }
    let target = &mut out[(from - offset) as usize..(to - offset) as usize];
    match page {
        Some(page) => target.copy_from_slice(&page[(from - at) as usize..(to - at) as usize]),
        None => target.fill(0),
    }
}

/// What a read found in memory, and what it must fetch.
struct Plan {
    size: u64,
    staged: BTreeMap<u64, Staged>,
    cached: Vec<(u64, Arc<Page>)>,
    missing: Vec<(Mapped, Vec<u32>)>,
}

/// What a write came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// It is in the stage, or in its place.
    Done,
    /// The file is a clone in pieces, which must end first.
    Pinned,
}

/// What an attempt to change something came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attempt<T> {
    /// It is done.
    Done(T),
    /// The queue for the journal has no room, and nothing was done: write it out first.
    QueueFull,
    /// This file is a clone in pieces, and nothing was done: it must end first.
    Pinned(Ino),
}

impl Pool {
    /// Appends up to `len` bytes from `offset` to `out`: fewer at the end of the file, none
    /// behind it.
    ///
    /// # Errors
    /// `Corrupt` if a block is not what was written; `Io` if the device cannot be read.
    pub fn read(&self, ino: Ino, offset: u64, len: usize, out: &mut Vec<u8>) -> Result<()> {
        self.read_shown(ino, offset, len, out, false)
    }

    /// Reads; `hidden`: also what lies behind the end of a clone in pieces.
    pub(crate) fn read_shown(
        &self,
        ino: Ino,
        offset: u64,
        len: usize,
        out: &mut Vec<u8>,
        hidden: bool,
    ) -> Result<()> {
        let _pin = self.readers.pin();
        let end = offset.saturating_add(len as u64).min(FILE_SIZE_MAX);
        if offset >= end {
            return Ok(());
        }
        let plan = self.plan_read(ino, offset / B, end.div_ceil(B), hidden)?;
        let end = end.min(plan.size);
        if offset >= end {
            return Ok(());
        }
        let start = out.len();
        out.resize(start + (end - offset) as usize, 0);
        let target = &mut out[start..];
        for (block, page) in &plan.cached {
            overlay(target, offset, block * B, Some(page));
        }
        for (part, sums) in &plan.missing {
            if let Err(error) = self.fetch(*part, sums, target, offset) {
                out.truncate(start);
                return Err(error);
            }
        }
        for (block, staged) in &plan.staged {
            overlay(target, offset, block * B, staged.data.as_deref());
        }
        Ok(())
    }

    /// Looks up blocks `from` to `to` in stage, extent map and cache.
    fn plan_read(&self, ino: Ino, from: u64, to: u64, hidden: bool) -> Result<Plan> {
        let (attr, staged) = {
            let stage = self.stage.lock();
            match stage.file(ino) {
                Some(file) => (Some(file.attr), file.range(from, to)),
                None => (None, BTreeMap::new()),
            }
        };
        let meta = self.meta.read();
        let inode = meta.file(ino)?;
        let size = attr.map_or(inode.size, |attr| attr.size);
        let size = if hidden { FILE_SIZE_MAX } else { size };
        let mut plan = Plan {
            size,
            staged,
            cached: Vec::new(),
            missing: Vec::new(),
        };
        let mut runs: Vec<Mapped> = Vec::new();
        let mut lost = None;
        meta.mapped(inode.root, from, to.min(blocks_of(size)), &mut |part| {
            for i in 0..part.extent.len {
                let (at, block) = (part.at + u64::from(i), part.extent.block + u64::from(i));
                if plan.staged.contains_key(&at) {
                    continue;
                }
                if part.extent.is_lost() {
                    lost = Some(at);
                    return ControlFlow::Break(());
                }
                if let Some(page) = self.cache.get(block) {
                    plan.cached.push((at, page));
                    continue;
                }
                match runs.last_mut() {
                    Some(last) if last.end() == at && last.extent.end() == block => {
                        last.extent.len += 1;
                    }
                    _ => runs.push(Mapped {
                        at,
                        extent: Extent { block, len: 1 },
                    }),
                }
            }
            ControlFlow::Continue(())
        })?;
        if let Some(at) = lost {
            return Err(Error::corrupt(format!(
                "this part of the file was lost, and a repair marked it: ino={ino} file block={at}; \
                 write it anew or punch a hole"
            )));
        }
        for run in runs {
            plan.missing.push((run, meta.sums(run.extent)?));
        }
        Ok(plan)
    }

    /// Reads a run that is not in the cache, or waits for whoever reads parts of it already.
    fn fetch(&self, part: Mapped, sums: &[u32], target: &mut [u8], offset: u64) -> Result<()> {
        if part.extent.len >= STREAM_BLOCKS {
            return self.fetch_run(part, sums, target, offset, false);
        }
        let blocks = part.extent.block..part.extent.end();
        let claimed = self.cache.claim(blocks.clone());
        let outcome = self.fetch_claimed(part, sums, &claimed, target, offset);
        self.cache.release(&claimed);
        outcome?;
        for block in blocks.filter(|block| !claimed.contains(block)) {
            let i = block - part.extent.block;
            let page = match self.cache.wait(block) {
                Some(page) => page,
                // Evicted at once, or the other reader failed.
                None => self.fetch_block(part.at + i, block, sums[i as usize])?,
            };
            overlay(target, offset, (part.at + i) * B, Some(&page));
        }
        Ok(())
    }

    fn fetch_claimed(
        &self,
        part: Mapped,
        sums: &[u32],
        claimed: &HashSet<u64>,
        target: &mut [u8],
        offset: u64,
    ) -> Result<()> {
        let mut i = 0;
        while i < part.extent.len {
            let run = (i..part.extent.len)
                .take_while(|i| claimed.contains(&(part.extent.block + u64::from(*i))))
                .count() as u32;
            if run == 0 {
                i += 1;
                continue;
            }
            let extent = part.extent.tail(i).head(run);
            let piece = Mapped {
                at: part.at + u64::from(i),
                extent,
            };
            self.fetch_run(
                piece,
                &sums[i as usize..(i + run) as usize],
                target,
                offset,
                true,
            )?;
            i += run;
        }
        Ok(())
    }

    /// Reads a run from the device, checks it, and copies what is wanted of it to `target`,
    /// which begins at file offset `offset`. `keep`: puts the blocks into the cache.
    fn fetch_run(
        &self,
        run: Mapped,
        sums: &[u32],
        target: &mut [u8],
        offset: u64,
        keep: bool,
    ) -> Result<()> {
        let step = self.buffers.chunk_max() / BLOCK_SIZE;
        for (n, sums) in sums.chunks(step).enumerate() {
            let skip = (n * step) as u64;
            let (at, first) = (run.at + skip, run.extent.block + skip);
            let mut buffer = self.buffers.take(sums.len() * BLOCK_SIZE);
            self.device
                .read_at(first * B, &mut buffer)
                .map_err(|source| {
                    Error::io(format!("cannot read the pool: block={first}"), source)
                })?;
            for (i, (bytes, sum)) in buffer.chunks_exact(BLOCK_SIZE).zip(sums).enumerate() {
                let block = first + i as u64;
                check_sum(&self.counters, at + i as u64, block, bytes, *sum)?;
                if keep {
                    let mut page: Arc<Page> = Arc::new([0; BLOCK_SIZE]);
                    Arc::make_mut(&mut page).copy_from_slice(bytes);
                    self.cache.put(block, page);
                }
            }
            // What of it lies within the target.
            let (start, end) = (at * B, at * B + buffer.len() as u64);
            let (from, to) = (start.max(offset), end.min(offset + target.len() as u64));
            if from < to {
                target[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&buffer[(from - start) as usize..(to - start) as usize]);
            }
        }
        Ok(())
    }

    fn fetch_block(&self, at: u64, block: u64, sum: u32) -> Result<Arc<Page>> {
        let mut page: Arc<Page> = Arc::new([0; BLOCK_SIZE]);
        let bytes = &mut Arc::make_mut(&mut page)[..];
        self.device
            .read_at(block * B, bytes)
            .map_err(|source| Error::io(format!("cannot read the pool: block={block}"), source))?;
        check_sum(&self.counters, at, block, bytes, sum)?;
        Ok(page)
    }

    /// The whole contents of one block of a file, zeros where there is nothing.
    pub(crate) fn read_block(&self, ino: Ino, block: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(BLOCK_SIZE);
        self.read(ino, block * B, BLOCK_SIZE, &mut bytes)?;
        bytes.resize(BLOCK_SIZE, 0);
        Ok(bytes)
    }

    /// Writes; grows the file as needed. Sets mtime and ctime.
    ///
    /// A write of up to 1 MiB that begins and ends on block borders happens wholly or not at
    /// all; of others each block does.
    ///
    /// # Errors
    /// `NoSpace` before anything of the failing part is acknowledged; `TooLarge`; `Poisoned`.
    pub fn write(&self, ino: Ino, offset: u64, data: &[u8], now: Time) -> Result<()> {
        self.check_writable()?;
        let end = offset
            .checked_add(data.len() as u64)
            .filter(|end| *end <= FILE_SIZE_MAX);
        if end.is_none() {
            return Err(Error::new(
                Kind::TooLarge,
                format!("file is too large: ino={ino}"),
            ));
        }
        let (mut offset, mut data) = (offset, data);
        while !data.is_empty() {
            let skew = (offset % B) as usize;
            let whole = data.len() / BLOCK_SIZE * BLOCK_SIZE;
            let step = if skew == 0 && whole >= DIRECT_MIN {
                let step = whole.min(DIRECT_MAX);
                self.write_direct(ino, offset, &data[..step], now)?;
                step
            } else {
                // Up to where blocks are whole again, if much follows.
                let head = (BLOCK_SIZE - skew) % BLOCK_SIZE;
                let most = if skew > 0 && data.len() >= head + DIRECT_MIN {
                    head
                } else {
                    data.len()
                };
                let step = most.min(self.limits.step_bytes);
                self.write_staged(ino, offset, &data[..step], now)?;
                step
            };
            offset += step as u64;
            data = &data[step..];
        }
        Ok(())
    }

    /// Runs `attempt` again after making room, in the queue for the journal or in the pool, as
    /// long as that helps. Called with no lock held.
    pub(crate) fn with_space<T>(
        &self,
        mut attempt: impl FnMut() -> Result<Attempt<T>>,
    ) -> Result<T> {
        let mut alone = None;
        loop {
            let outcome = attempt();
            let was_alone = alone.take().is_some();
            match outcome {
                Ok(Attempt::Done(value)) => return Ok(value),
                Ok(Attempt::QueueFull) => self.sync()?,
                Ok(Attempt::Pinned(ino)) => self.end_clone(ino)?,
                Err(error) if error.kind() == Kind::NoSpace && !was_alone => {
                    if self.is_host_full() {
                        return Err(error);
                    }
                    if !self.make_space()? {
                        // A discard takes free blocks for a while; one that ended before the
                        // look at the space makes no difference to it. So once without any.
                        alone = Some(self.checkpointing.lock());
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn write_staged(&self, ino: Ino, offset: u64, data: &[u8], now: Time) -> Result<()> {
        loop {
            self.throttle()?;
            self.check_host()?;
            let blocks = (offset % B + data.len() as u64).div_ceil(B);
            let alone = self.ask_for_rescue(blocks)?;
            match self.with_space(|| self.try_write_staged(ino, offset, data, alone, now))? {
                Step::Done => return Ok(()),
                Step::Pinned => self.end_clone(ino)?,
            }
        }
    }

    /// `alone`: see [`check_rescue`](Self::check_rescue).
    fn try_write_staged(
        &self,
        ino: Ino,
        offset: u64,
        data: &[u8],
        alone: bool,
        now: Time,
    ) -> Result<Attempt<Step>> {
        let end = offset + data.len() as u64;
        let partial = !offset.is_multiple_of(B) || !end.is_multiple_of(B);
        let (_shared, _owned) = if partial {
            (None, Some(self.own_file(ino))) // I2
        } else {
            (Some(self.share_file(ino)), None)
        };
        let mut blocks = Vec::new();
        for block in offset / B..end.div_ceil(B) {
            let (from, to) = (offset.max(block * B), end.min((block + 1) * B));
            let bytes = &data[(from - offset) as usize..(to - offset) as usize];
            if bytes.len() == BLOCK_SIZE {
                blocks.push((block, staged(bytes)));
            } else {
                let mut whole = self.read_block(ino, block)?;
                whole[(from % B) as usize..][..bytes.len()].copy_from_slice(bytes);
                blocks.push((block, staged(&whole)));
            }
        }
        self.check_rescue(blocks.len() as u64, alone)?;
        self.counters.reserve(blocks.len() as u64)?;
        let outcome = self.stage_blocks(ino, &blocks, end, now);
        if !matches!(outcome, Ok(Attempt::Done(Step::Done))) {
            self.counters.unreserve(blocks.len() as u64);
        }
        outcome
    }

    fn stage_blocks(
        &self,
        ino: Ino,
        blocks: &[(u64, Staged)],
        end: u64,
        now: Time,
    ) -> Result<Attempt<Step>> {
        let mut stage = self.stage.lock();
        if stage.file(ino).is_none() {
            drop(stage);
            let meta = self.meta.read();
            let inode = meta.file(ino)?;
            stage = self.stage.lock();
            stage.open(ino, attr_of(&inode)).pinned = inode.flags & FLAG_PINNED != 0;
        }
        if stage.file(ino).is_some_and(|file| file.pinned) {
            return Ok(Attempt::Done(Step::Pinned));
        }
        let bytes = blocks.len() * BLOCK_COST + TOUCH_COST;
        if !stage.has_room(bytes, self.limits.pending_bytes) {
            return Ok(Attempt::QueueFull);
        }
        for (block, staged) in blocks {
            stage.put(ino, *block, staged.clone());
        }
        grow_and_touch(&mut stage, ino, end, now);
        Ok(Attempt::Done(Step::Done))
    }

    /// Writes whole blocks to new places and maps them there.
    fn write_direct(&self, ino: Ino, offset: u64, data: &[u8], now: Time) -> Result<()> {
        loop {
            self.throttle()?;
            self.settle(ino)?;
            match self.with_space(|| self.try_write_direct(ino, offset, data, now))? {
                Step::Done => return Ok(()),
                Step::Pinned => {} // since a moment ago
            }
        }
    }

    fn try_write_direct(
        &self,
        ino: Ino,
        offset: u64,
        data: &[u8],
        now: Time,
    ) -> Result<Attempt<Step>> {
        let _gate = self.gate.read();
        let _shared = self.share_file(ino);
        let count = (data.len() / BLOCK_SIZE) as u64 + DIRECT_NODES;
        self.counters.reserve_exactly(count)?;
        let end = offset + data.len() as u64;
        let outcome = self
            .place(ino, offset / B, data, now)
            .and_then(|records| self.install(ino, records, end, now));
        self.counters.unreserve_exactly(count);
        outcome
    }

    /// Maps what was placed. If that cannot be, because the file is gone or there is no room in
    /// the queue, its blocks are free again.
    fn install(
        &self,
        ino: Ino,
        records: Vec<Record>,
        end: u64,
        now: Time,
    ) -> Result<Attempt<Step>> {
        let mut meta = self.meta.write();
        let mut stage = self.stage.lock();
        let cost = records.iter().map(record_cost).sum::<usize>() + TOUCH_COST;
        let inode = meta.file(ino);
        let refused = match &inode {
            Err(_) => None,
            Ok(inode) if inode.flags & FLAG_PINNED != 0 => Some(Attempt::Done(Step::Pinned)),
            Ok(_) if stage.has_room(cost, self.limits.pending_bytes) => None,
            Ok(_) => Some(Attempt::QueueFull),
        };
        if inode.is_err() || refused.is_some() {
            for record in &records {
                if let Record::Map { extent, .. } = record {
                    meta.space.unalloc(*extent);
                }
            }
        }
        let inode = inode?;
        if let Some(refused) = refused {
            return Ok(refused);
        }
        stage.open(ino, attr_of(&inode));
        for record in records {
            self.apply_or_poison(&mut meta, &mut stage, &record)?;
            stage.push(record); // I3: all under one lock of the stage
        }
        grow_and_touch(&mut stage, ino, end, now);
        Ok(Attempt::Done(Step::Done))
    }

    /// Writes the blocks of `data` that are not zero to new places. Returns the records that
    /// map them to file blocks from `first` on; zeros become holes.
    fn place(&self, ino: Ino, first: u64, data: &[u8], now: Time) -> Result<Vec<Record>> {
        let zero: Vec<bool> = data.chunks_exact(BLOCK_SIZE).map(is_zero).collect();
        let count = zero.iter().filter(|zero| !**zero).count() as u32;
        let runs = self.alloc_runs(Class::Data, count)?;
        let placed = self.place_in(&runs, ino, first, data, &zero, now);
        match &placed {
            Ok(_) if count > 0 => self.host_accepted(),
            Err(error) if error.kind() == Kind::NoSpace => self.free_unused(runs),
            _ => {}
        }
        placed
    }

    fn place_in(
        &self,
        runs: &[Extent],
        ino: Ino,
        first: u64,
        data: &[u8],
        zero: &[bool],
        now: Time,
    ) -> Result<Vec<Record>> {
        let mut runs = runs.to_vec();
        let mut records = Vec::new();
        let mut i = 0;
        while i < zero.len() {
            let len = zero[i..].iter().take_while(|is| **is == zero[i]).count();
            let at = first + i as u64;
            if zero[i] {
                records.push(Record::Punch {
                    ino,
                    block: at,
                    count: len as u64,
                    now,
                });
                i += len;
                continue;
            }
            let run = runs
                .first_mut()
                .expect("as many blocks as are not zero were allocated");
            let len = len.min(run.len as usize);
            let extent = run.head(len as u32);
            if run.len as usize == len {
                runs.remove(0);
            } else {
                *run = run.tail(len as u32);
            }
            let bytes = &data[i * BLOCK_SIZE..(i + len) * BLOCK_SIZE];
            for block in extent.block..extent.end() {
                self.cache.remove(block); // I1 of the cache
            }
            self.device_write(extent.block, bytes)?;
            let sums = bytes.chunks_exact(BLOCK_SIZE).map(crc32c).collect();
            records.push(Record::Map {
                ino,
                block: at,
                extent,
                sums,
            });
            i += len;
        }
        Ok(records)
    }

    /// Allocates `count` blocks, in as few runs as there are.
    pub(crate) fn alloc_runs(&self, class: Class, count: u32) -> Result<Vec<Extent>> {
        let mut runs: Vec<Extent> = Vec::new();
        let mut left = count;
        let mut meta = self.meta.write();
        while left > 0 {
            match meta.alloc(class, left) {
                Ok(run) => {
                    left -= run.len;
                    runs.push(run);
                }
                Err(error) => {
                    runs.into_iter().for_each(|run| meta.space.unalloc(run));
                    return Err(error);
                }
            }
        }
        Ok(runs)
    }

    /// Frees blocks that were allocated and are not referred to: the host had no space for what
    /// should be written to them.
    pub(crate) fn free_unused(&self, runs: Vec<Extent>) {
        let mut meta = self.meta.write();
        for run in runs.into_iter().rev() {
            (run.block..run.end()).for_each(|block| self.cache.remove(block));
            meta.space.unalloc_refused(run);
        }
    }

    /// Applies a record that was checked before; damage found now poisons the pool.
    pub(crate) fn apply_or_poison(
        &self,
        meta: &mut Meta,
        stage: &mut Stage,
        record: &Record,
    ) -> Result<()> {
        apply(meta, stage, record).inspect_err(|error| self.poison(error))
    }

    /// Ends a clone in pieces before its file is changed in another way.
    pub(crate) fn settle(&self, ino: Ino) -> Result<()> {
        let pinned = self.meta.read().file(ino)?.flags & FLAG_PINNED != 0;
        if pinned { self.end_clone(ino) } else { Ok(()) }
    }
}

/// `at`: the block of the file, for the message.
fn check_sum(counters: &Counters, at: u64, block: u64, bytes: &[u8], sum: u32) -> Result<()> {
    if crc32c(bytes) == sum {
        return Ok(());
    }
    counters.damaged.fetch_add(1, Ordering::Relaxed);
    Err(Error::corrupt(format!(
        "a data block is not what was written: offset={} block={block}; run scrub to find all files",
        at.saturating_mul(B)
    )))
}

/// The file was written up to `end`.
pub(crate) fn grow_and_touch(stage: &mut Stage, ino: Ino, end: u64, now: Time) {
    if let Some(file) = stage.file_mut(ino) {
        file.attr.size = file.attr.size.max(end);
        (file.attr.mtime, file.attr.ctime) = (now, now);
    }
    stage.touch(ino);
}
