//! Reading the contents of files: what of a range is staged, cached, or must be read.
//!
//! Invariants:
//!
//! 1. A read shows each block as it was at one moment between its beginning and its end: the stage
//!    is looked at before the extent map, and what leaves the stage is mapped before.
//! 2. A reader is pinned before it lets go of the trees with the place of anything that it is going
//!    to read: what they referred to then is not used again until it has ended. What is all in
//!    memory needs no pin: the cache holds a block as long as the trees refer to it.
//! 3. Nobody waits for the device with the lock of the trees held: a node that is not in memory is
//!    read without it, and the look begins anew.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ondisk::extent::Root;
use crate::ondisk::inode::FILE_SIZE_MAX;
use crate::sync::atomic::Ordering;
use crate::sync::{Condvar, Mutex};
use crate::units::{BLOCK_SIZE, Ino};

use super::ahead::Stream;
use super::apply::blocks_of;
use super::cache::{Held, Pin};
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
            Ok(Plan::Bytes(bytes)) => done(Ok(bytes)),
            Ok(Plan::Fetch(request)) => self.fetcher.fetch(request, How::Later, Box::new(done)),
            Err(error) => done(Err(error)),
        }
    }

    /// Brings a range into the cache. What goes wrong is told to whoever wants the bytes.
    fn read_ahead(&self, ino: Ino, range: &Range<u64>) {
        let len = (range.end - range.start) as usize;
        if let Ok(Plan::Fetch(mut request)) = self.plan_read(ino, range.start, len, false) {
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
        let request = match self.plan_read(ino, offset, len, hidden)? {
            Plan::Fetch(request) => request,
            Plan::Bytes(bytes) => {
                out.extend_from_slice(&bytes);
                return Ok(());
            }
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

    /// Looks a range up in stage, extent map and cache.
    fn plan_read(&self, ino: Ino, offset: u64, len: usize, hidden: bool) -> Result<Plan> {
        let end = offset.saturating_add(len as u64).min(FILE_SIZE_MAX);
        if offset >= end {
            return Ok(Plan::Bytes(ReadBytes::none()));
        }
        let mut pin = None;
        let mut tries = 0;
        loop {
            let seen = self.staged(ino, offset / B, end.div_ceil(B));
            let meta = self.meta.read(); // I1
            let find = || self.find(&meta, ino, offset..end, seen, hidden);
            let found = if tries >= ABSENT_MAX {
                Ok(find())
            } else {
                nodes::in_memory(find)
            };
            if let Ok(Ok(Found::Bytes(bytes))) = found {
                self.readers.note();
                return Ok(Plan::Bytes(bytes));
            }
            let pinned = pin.take().unwrap_or_else(|| self.readers.pin()); // I2
            match found {
                Ok(found) => return Ok(found?.pinned(pinned)),
                Err(absent) => {
                    let nodes = meta.nodes();
                    drop(meta);
                    // I2: pinned, so the node stays where it is, whatever happens to the tree.
                    nodes.get(absent.kind, absent.level, absent.at)?;
                    pin = Some(pinned);
                    tries += 1;
                }
            }
        }
    }

    /// What is staged of blocks `from` up to `to` of a file.
    fn staged(&self, ino: Ino, from: u64, to: u64) -> Seen {
        let stage = self.stage.lock();
        let Some(file) = stage.file(ino) else {
            return Seen::default();
        };
        let mut seen = Seen {
            attr: Some(file.attr),
            ..Seen::default()
        };
        if to - from > 1 {
            seen.blocks = file.range(from, to);
        } else if let Some(staged) = file.newest(from) {
            seen.only = Some(staged.clone());
        }
        seen
    }

    /// Looks a range up in the extent map and the cache, beside what is staged.
    fn find(
        &self,
        meta: &Meta,
        ino: Ino,
        range: Range<u64>,
        seen: Seen,
        hidden: bool,
    ) -> Result<Found> {
        let inode = meta.file(ino)?;
        let size = seen.attr.map_or(inode.size, |attr| attr.size);
        let size = if hidden { FILE_SIZE_MAX } else { size };
        let one = range.end.div_ceil(B) - range.start / B == 1;
        let range = range.start..range.end.min(size);
        if range.is_empty() {
            return Ok(Found::Bytes(ReadBytes::none()));
        }
        if one {
            return self.find_block(meta, (ino, inode.root), range, seen.only);
        }
        let (from, to) = (range.start / B, range.end.div_ceil(B));
        let staged = seen.blocks;
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
                    Some(page) => pages.push((at, Held::Cached(page))),
                    None => wants.push(Want { at, block, sum: 0 }),
                }
            }
            ControlFlow::Continue(())
        })?;
        if let Some(at) = lost {
            return Err(lost_block(ino, at));
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
        pages.extend(staged.map(|(at, staged)| (at, held(staged))));
        Ok(Found::Parts {
            range,
            pages,
            wants,
        })
    }

    /// Looks up a range within one block: what guests ask for most, and without allocating.
    fn find_block(
        &self,
        meta: &Meta,
        (ino, root): (Ino, Root),
        range: Range<u64>,
        staged: Option<Staged>,
    ) -> Result<Found> {
        let at = range.start / B;
        let within = (range.start % B) as usize..(range.end - at * B) as usize;
        let bytes = |block| Ok(Found::Bytes(ReadBytes::of_block(block, within)));
        if let Some(staged) = staged {
            return bytes(held(staged));
        }
        let Some(extent) = meta.mapped_block(root, at)? else {
            return bytes(Held::Zeros);
        };
        if extent.is_lost() {
            return Err(lost_block(ino, at));
        }
        if let Some(page) = self.cache.get(extent.block) {
            return bytes(Held::Cached(page));
        }
        let mut sums = Vec::with_capacity(1);
        meta.sums_of(&mut std::iter::once(extent.block), &mut sums)?;
        let wants = sums.into_iter().map(|sum| Want {
            at,
            block: extent.block,
            sum,
        });
        Ok(Found::Parts {
            range,
            pages: Vec::new(),
            wants: wants.collect(),
        })
    }
}

fn held(staged: Staged) -> Held {
    staged.data.map_or(Held::Zeros, Held::Staged)
}

fn lost_block(ino: Ino, at: u64) -> Error {
    Error::corrupt(format!(
        "this part of the file was lost, and a repair marked it: ino={ino} file block={at}; \
         write it anew or punch a hole"
    ))
}

/// What is staged of a range.
#[derive(Default)]
struct Seen {
    /// Size and times of the file, if it is being written.
    attr: Option<FileAttr>,
    /// The block, if the range is within one.
    only: Option<Staged>,
    /// The blocks, if there are several.
    blocks: BTreeMap<u64, Staged>,
}

/// What was found of a range.
enum Found {
    /// All that there is of it, in memory.
    Bytes(ReadBytes),
    /// Its parts.
    Parts {
        range: Range<u64>,
        pages: Vec<(u64, Held)>,
        wants: Vec<Want>,
    },
}

/// How a range comes to its reader.
enum Plan {
    /// It is here.
    Bytes(ReadBytes),
    /// By a request.
    Fetch(Request),
}

impl Found {
    fn pinned(self, pin: Pin) -> Plan {
        match self {
            Self::Bytes(bytes) => Plan::Bytes(bytes),
            Self::Parts {
                range,
                pages,
                wants,
            } => {
                let blocks = range.end.div_ceil(B) - range.start / B;
                Plan::Fetch(Request {
                    range,
                    pages,
                    wants,
                    keep: blocks < STREAM_BLOCKS,
                    pin,
                })
            }
        }
    }
}
