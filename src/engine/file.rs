//! Contents of files: reading, and writing through the stage or directly to new blocks.
//!
//! Invariants:
//!
//! 1. Bytes behind the end of a file are zero wherever they are stored, so that a file can grow
//!    without touching them.
//! 2. A write of part of a block has the file for itself: two of them never lose each other's
//!    bytes. Writes of whole blocks share the file.
//! 3. What one call queues for the journal it queues at once, so that no crash separates it.

use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::ondisk::extent::Extent;
use crate::ondisk::inode::{FILE_SIZE_MAX, FLAG_PINNED};
use crate::ondisk::record::Record;
use crate::ondisk::{Page, crc32c, is_zero};
use crate::units::{BLOCK_SIZE, Ino, Time};

use super::apply::{apply, attr_of};
use super::meta::Meta;
use super::pool::Pool;
use super::space::Class;
use super::stage::{BLOCK_COST, Stage, Staged, TOUCH_COST, record_cost};

/// Aligned writes of at least this many bytes go straight to new blocks: 64 KiB, where writing
/// twice costs more than the flush it saves.
const DIRECT_MIN: usize = 64 * 1024;
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
    // By way of a slice: an array would be cleared first, and moved.
    let page: std::result::Result<Arc<Page>, _> = Arc::<[u8]>::from(bytes).try_into();
    let page = page.unwrap_or_else(|_| panic!("a block is staged len={}", bytes.len()));
    Staged {
        crc: crc32c(&page[..]),
        data: Some(page),
    }
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
            let sums = self.write_copied(extent.block, bytes)?;
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

    /// Writes blocks from `first` of the pool on, and returns their checksums. The bytes of
    /// a request lie anywhere in memory: they are copied to where direct I/O takes them, and each
    /// block is summed up while the processor still has it at hand.
    fn write_copied(&self, first: u64, bytes: &[u8]) -> Result<Vec<u32>> {
        let mut sums = Vec::with_capacity(bytes.len() / BLOCK_SIZE);
        let mut at = first;
        for piece in bytes.chunks(self.buffers.chunk_max()) {
            let mut buffer = self.buffers.take(piece.len());
            for (to, from) in buffer
                .chunks_exact_mut(BLOCK_SIZE)
                .zip(piece.chunks_exact(BLOCK_SIZE))
            {
                to.copy_from_slice(from);
                sums.push(crc32c(to));
            }
            self.device_write(at, &buffer)?;
            at += (piece.len() / BLOCK_SIZE) as u64;
        }
        Ok(sums)
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

/// The file was written up to `end`.
pub(crate) fn grow_and_touch(stage: &mut Stage, ino: Ino, end: u64, now: Time) {
    if let Some(file) = stage.file_mut(ino) {
        file.attr.size = file.attr.size.max(end);
        (file.attr.mtime, file.attr.ctime) = (now, now);
    }
    stage.touch(ino);
}
