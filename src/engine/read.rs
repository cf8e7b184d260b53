//! Reading the contents of files: what of a range is staged, cached, or must be read.
//!
//! Invariants:
//!
//! 1. A read shows each block as it was at one moment between its beginning and its end: the stage
//!    is looked at before the extent map, and what leaves the stage is mapped before.
//! 2. A reader is pinned before it looks at the extent map.
//! 3. Nobody waits for the device with the lock of the trees held: a node that is not in memory is
//!    read without it, and the look begins anew.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ondisk::Page;
use crate::ondisk::inode::FILE_SIZE_MAX;
use crate::sync::atomic::Ordering;
use crate::sync::{Condvar, Mutex};
use crate::units::{BLOCK_SIZE, Ino};

use super::ahead::Stream;
use super::apply::blocks_of;
use super::cache::Pin;
use super::fetch::{Done, How, ReadBytes, Request};
use super::meta::Meta;
use super::nodes;
use super::pieces::Want;
use super::pool::Pool;
use super::stage::{FileAttr, Staged};

/// Requests of at least this many blocks are read past the cache: whoever reads 512 KiB at once
/// copies an image or scans it, and would only drive out what guests share.
const STREAM_BLOCKS: u64 = 128;

/// Nodes that one look at a range fetches without the lock of the trees: as many as the paths of a
/// few trees have. A cache that does not hold those is too small to go on like that.
const ABSENT_MAX: u32 = 32;

const B: u64 = BLOCK_SIZE as u64;

/// What a waiting reader is told.
#[derive(Debug, Default)]
struct Outcome {
    /// Rank 8.
    told: Mutex<Option<Result<ReadBytes>>>,
    signal: Condvar,
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

    /// Reads as [`read`](Self::read) does, and calls `done` with the outcome: before this returns,
    /// or later from a thread that `done` must not make wait for another read. `stream`: what is
    /// known of the reader, to read ahead of it.
    pub fn read_with(
        &self,
        ino: Ino,
        offset: u64,
        len: usize,
        stream: Option<&Stream>,
        done: impl FnOnce(Result<ReadBytes>) + Send + 'static,
    ) {
        // Large requests keep the device busy by themselves, and the way through the cache costs
        // more than the wait that it saves.
        if let Some(stream) = stream
            && (len as u64) < STREAM_BLOCKS * B
            && self.fetcher.can_read_ahead()
            && let Some(range) =
                stream.note(offset, len as u64, self.ahead_max.load(Ordering::Relaxed))
        {
            self.read_ahead(ino, &range);
        }
        match self.plan_read(ino, offset, len, false) {
            Ok(None) => done(Ok(ReadBytes::none())),
            Ok(Some(request)) => self.fetcher.fetch(request, How::Later, Box::new(done)),
            Err(error) => done(Err(error)),
        }
    }

    /// Brings a range into the cache. What goes wrong is told to whoever wants the bytes.
    fn read_ahead(&self, ino: Ino, range: &Range<u64>) {
        let len = (range.end - range.start) as usize;
        if let Ok(Some(mut request)) = self.plan_read(ino, range.start, len, false) {
            request.keep = true;
            self.fetcher.fetch(request, How::Ahead, Box::new(|_| {}));
        }
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
        let Some(request) = self.plan_read(ino, offset, len, hidden)? else {
            return Ok(());
        };
        out.extend_from_slice(&self.fetch_now(request)?);
        Ok(())
    }

    /// Reads and waits for it.
    fn fetch_now(&self, request: Request) -> Result<ReadBytes> {
        let outcome = Arc::<Outcome>::default();
        let done: Done = {
            let outcome = Arc::clone(&outcome);
            Box::new(move |read| {
                *outcome.told.lock() = Some(read);
                outcome.signal.notify_all();
            })
        };
        self.fetcher.fetch(request, How::Waits, done);
        let mut told = outcome.told.lock();
        loop {
            match told.take() {
                Some(read) => return read,
                None => outcome.signal.wait(&mut told),
            }
        }
    }

    /// The contents of blocks of the pool, each with its checksum, one behind the other. Nothing
    /// stays in the cache. The caller has been pinned since it found them in the map of a file.
    pub(crate) fn read_places(&self, places: &[(u64, u32)]) -> Result<ReadBytes> {
        let place = |(at, (block, sum)): (u64, &(u64, u32))| Want {
            at,
            block: *block,
            sum: *sum,
        };
        let mut wants: Vec<Want> = (0..).zip(places).map(place).collect();
        wants.sort_unstable_by_key(|want| want.block);
        self.fetch_now(Request {
            range: 0..places.len() as u64 * B,
            pages: Vec::new(),
            wants,
            keep: false,
            pin: self.readers.pin(),
        })
    }

    /// The whole contents of one block of a file, zeros where there is nothing.
    pub(crate) fn read_block(&self, ino: Ino, block: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(BLOCK_SIZE);
        self.read(ino, block * B, BLOCK_SIZE, &mut bytes)?;
        bytes.resize(BLOCK_SIZE, 0);
        Ok(bytes)
    }

    /// Looks a range up in stage, extent map and cache. `None` if nothing of it is in the file.
    fn plan_read(
        &self,
        ino: Ino,
        offset: u64,
        len: usize,
        hidden: bool,
    ) -> Result<Option<Request>> {
        let pin = self.readers.pin(); // I2
        let end = offset.saturating_add(len as u64).min(FILE_SIZE_MAX);
        if offset >= end {
            return Ok(None);
        }
        let mut tries = 0;
        loop {
            let staged = self.staged(ino, offset / B, end.div_ceil(B));
            let meta = self.meta.read(); // I1
            let find = || self.find(&meta, ino, offset..end, staged, hidden);
            if tries >= ABSENT_MAX {
                return Ok(find()?.map(|found| found.pinned(pin)));
            }
            match nodes::in_memory(find) {
                Ok(found) => return Ok(found?.map(|found| found.pinned(pin))),
                Err(absent) => {
                    let nodes = meta.nodes();
                    drop(meta);
                    // I2: pinned, so the node stays where it is, whatever happens to the tree.
                    nodes.get(absent.kind, absent.level, absent.at)?;
                    tries += 1;
                }
            }
        }
    }

    fn staged(&self, ino: Ino, from: u64, to: u64) -> (Option<FileAttr>, BTreeMap<u64, Staged>) {
        let stage = self.stage.lock();
        match stage.file(ino) {
            Some(file) => (Some(file.attr), file.range(from, to)),
            None => (None, BTreeMap::new()),
        }
    }

    /// Looks a range up in the extent map and the cache, beside what is staged.
    fn find(
        &self,
        meta: &Meta,
        ino: Ino,
        range: Range<u64>,
        (attr, staged): (Option<FileAttr>, BTreeMap<u64, Staged>),
        hidden: bool,
    ) -> Result<Option<Found>> {
        let inode = meta.file(ino)?;
        let size = attr.map_or(inode.size, |attr| attr.size);
        let size = if hidden { FILE_SIZE_MAX } else { size };
        let range = range.start..range.end.min(size);
        if range.is_empty() {
            return Ok(None);
        }
        let (from, to) = (range.start / B, range.end.div_ceil(B));
        let mut pages = Vec::new();
        let mut wants: Vec<Want> = Vec::new();
        let mut lost = None;
        meta.mapped(inode.root, from, to.min(blocks_of(size)), &mut |part| {
            for i in 0..u64::from(part.extent.len) {
                let (at, block) = (part.at + i, part.extent.block + i);
                if !staged.is_empty() && staged.contains_key(&at) {
                    continue;
                }
                if part.extent.is_lost() {
                    lost = Some(at);
                    return ControlFlow::Break(());
                }
                match self.cache.get(block) {
                    Some(page) => pages.push((at, Some(page))),
                    None => wants.push(Want { at, block, sum: 0 }),
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
        if !wants.is_empty() {
            wants.sort_unstable_by_key(|want| want.block);
            let (mut blocks, mut sums) = (wants.iter().map(|want| want.block), Vec::new());
            meta.sums_of(&mut blocks, &mut sums)?;
            for (want, sum) in wants.iter_mut().zip(sums) {
                want.sum = sum;
            }
        }
        let staged = staged.into_iter().filter(|(at, _)| *at < to);
        pages.extend(staged.map(|(at, staged)| (at, staged.data)));
        Ok(Some(Found {
            range,
            pages,
            wants,
        }))
    }
}

/// What was found of a range.
struct Found {
    range: Range<u64>,
    pages: Vec<(u64, Option<Arc<Page>>)>,
    wants: Vec<Want>,
}

impl Found {
    fn pinned(self, pin: Pin) -> Request {
        let blocks = self.range.end.div_ceil(B) - self.range.start / B;
        Request {
            range: self.range,
            pages: self.pages,
            wants: self.wants,
            keep: blocks < STREAM_BLOCKS,
            pin,
        }
    }
}
