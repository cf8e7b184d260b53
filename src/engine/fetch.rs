//! Reads data blocks from the device: few transfers for many blocks, each block checked, and one
//! transfer for all who want the same block at the same time.
//!
//! Invariants:
//!
//! 1. Bytes that are handed out were compared with their checksum, by this reader or by the one
//!    that read the block for both.
//! 2. A reader stays pinned until its last block has arrived and is in the cache.
//! 3. Whoever claims blocks has room for all of its buffers before, so that no reader waits for
//!    room while others wait for its blocks.
//! 4. Without a queue of the device everything happens on the thread of the caller, in an order
//!    that does not depend on time.
//! 5. A block that cannot be read is an error for those who want this block, and for nobody else.
//! 6. Memory that was used before is never shown: what nobody fills is zeros.

use std::io;
use std::ops::{Deref, Range};
use std::sync::{Arc, Weak};

use crate::device::{BlockDevice, Bounce, BouncePool, QueuedRead};
use crate::error::{Error, Result};
use crate::ondisk::{Page, crc32c};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, ranked};
use crate::units::BLOCK_SIZE;

use super::cache::{BlockCache, Held, Look, Pin, Waiter};
use super::counters::Counters;
use super::pieces::{Piece, Want, pieces};

const B: u64 = BLOCK_SIZE as u64;

/// Bytes of blocks that reads which nobody waits for may be reading at once: 12 requests of the
/// largest kind. With gaps and buffers that are larger than what they hold, up to four times as
/// much memory, in practice little more.
const ROOM: usize = 12 * 1024 * 1024; // 12 MiB
/// What a request takes of it at least: the smallest buffer.
const ROOM_MIN: usize = 16 * 1024; // 16 KiB

/// A range of a file, with what is known of it.
#[derive(Debug)]
pub(crate) struct Request {
    /// First byte, and the first one behind: not behind the end of the file.
    pub(crate) range: Range<u64>,
    /// Blocks in memory, by block of the file. What is nowhere is a hole.
    pub(crate) pages: Vec<(u64, Held)>,
    /// Blocks to read, in the order of the pool, other ones than those in `pages`.
    pub(crate) wants: Vec<Want>,
    /// What is read stays in the cache.
    pub(crate) keep: bool,
    /// Keeps the blocks from being used again.
    pub(crate) pin: Pin,
}

/// Called once with what was read.
pub(crate) type Done = Box<dyn FnOnce(Result<ReadBytes>) + Send>;

/// What was read of a file.
#[derive(Debug)]
pub struct ReadBytes {
    memory: Memory,
    range: Range<usize>,
}

#[derive(Debug)]
enum Memory {
    None,
    Block(Held),
    Bounce(Bounce),
    Heap(Vec<u8>),
}

impl ReadBytes {
    /// Nothing.
    pub(crate) fn none() -> Self {
        Self {
            memory: Memory::None,
            range: 0..0,
        }
    }

    /// A part of one block, which is not behind the end of the block.
    pub(crate) fn of_block(block: Held, range: Range<usize>) -> Self {
        Self {
            memory: Memory::Block(block),
            range,
        }
    }
}

impl Deref for ReadBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let memory = match &self.memory {
            Memory::None => &[][..],
            Memory::Block(block) => &block.bytes()[..],
            Memory::Bounce(bounce) => bounce,
            Memory::Heap(bytes) => bytes,
        };
        &memory[self.range.clone()]
    }
}

/// Reads. See the module.
#[derive(Debug)]
pub(crate) struct Fetcher {
    device: Arc<dyn BlockDevice>,
    desk: Arc<Desk>,
}

/// How a request is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// The caller is going to wait for it.
    Waits,
    /// The caller goes on.
    Later,
    /// Nobody wants the bytes yet: they go into the cache, or nothing is done if much else is being
    /// read.
    Ahead,
}

/// What requests under way share. They do not hold the device: it can go as soon as the pool does.
#[derive(Debug)]
struct Desk {
    cache: Arc<BlockCache>,
    buffers: BouncePool,
    counters: Arc<Counters>,
    /// Requests under way.
    busy: AtomicUsize,
    /// Bytes of [`ROOM`] in use. Rank 8.
    used: Mutex<usize>,
    freed: Condvar,
}

/// Room that a request has.
#[derive(Debug)]
struct Room {
    desk: Arc<Desk>,
    bytes: usize,
}

impl Drop for Room {
    fn drop(&mut self) {
        *self.desk.used.lock() -= self.bytes;
        self.desk.freed.notify_all();
    }
}

impl Fetcher {
    /// For blocks of `device`.
    pub(crate) fn new(
        device: &Arc<dyn BlockDevice>,
        cache: &Arc<BlockCache>,
        buffers: &BouncePool,
        counters: &Arc<Counters>,
    ) -> Self {
        Self {
            device: Arc::clone(device),
            desk: Arc::new(Desk {
                cache: Arc::clone(cache),
                buffers: buffers.clone(),
                counters: Arc::clone(counters),
                busy: AtomicUsize::new(0),
                used: ranked::mutex(8, 0),
                freed: Condvar::new(),
            }),
        }
    }

    /// True if something can be read that nobody waits for.
    pub(crate) fn can_read_ahead(&self) -> bool {
        self.device.queue().is_some()
    }

    /// Reads what a request wants, and calls `done`: before this returns, or later from another
    /// thread.
    pub(crate) fn fetch(&self, request: Request, how: How, done: Done) {
        let Request {
            range,
            mut pages,
            wants,
            keep,
            pin,
        } = request;
        let desk = &self.desk;
        if wants.is_empty() {
            return done(Ok(match how {
                How::Ahead => ReadBytes::none(),
                How::Waits | How::Later => desk.assemble(&range, pages, Vec::new()),
            }));
        }
        let queue = self.device.queue();
        let room = match (how, queue) {
            (How::Waits, _) | (How::Later, None) => None,
            (How::Later, Some(_)) => Some(desk.room(wants.len())), // I3
            (How::Ahead, _) => match desk.room_ahead(wants.len()).filter(|_| queue.is_some()) {
                Some(room) => Some(room),
                None => return done(Ok(ReadBytes::none())),
            },
        };
        let alone = desk.busy.fetch_add(1, Ordering::Relaxed) == 0;
        let job = Arc::new(Job {
            desk: Arc::clone(desk),
            range,
            how,
            keep,
            left: AtomicUsize::new(1),
            state: ranked::mutex(
                8,
                State {
                    pages: Vec::new(),
                    parts: Vec::new(),
                    error: None,
                    end: Some((done, pin, room)),
                },
            ),
        });
        let mut ours = Vec::with_capacity(wants.len());
        for want in wants {
            match desk.look(&job, &want) {
                Look::Here(page) => pages.push((want.at, Held::Cached(page))),
                Look::Ours => ours.push(want),
                Look::Theirs => {}
            }
        }
        job.state.lock().pages.append(&mut pages);
        let len_max = (desk.buffers.chunk_max() / BLOCK_SIZE) as u64;
        let mut pieces = pieces(ours, self.device.gap_max(), len_max);
        job.left.fetch_add(pieces.len(), Ordering::SeqCst);
        // One transfer that somebody waits for, or that nothing else is waiting behind, is quicker
        // where it is wanted.
        let here = match queue {
            None => pieces.len(),
            Some(_) if how == How::Ahead => 0,
            Some(queue) if queue.is_ring() => {
                usize::from(pieces.len() == 1 && (alone || how == How::Waits))
            }
            Some(_) => 1.min(pieces.len()),
        };
        let here = pieces.split_off(pieces.len() - here);
        if let (Some(queue), false) = (queue, pieces.is_empty()) {
            queue.submit(
                pieces
                    .into_iter()
                    .map(|piece| job.queued(piece, &self.device)),
            );
        }
        for piece in here {
            let mut buffer = desk.buffers.take(piece.len as usize * BLOCK_SIZE);
            let outcome = self.device.read_at(piece.first * B, &mut buffer);
            job.arrived(piece, outcome, buffer, Some(&*self.device));
        }
        job.step();
    }
}

impl Desk {
    fn room(self: &Arc<Self>, blocks: usize) -> Room {
        let bytes = (blocks * BLOCK_SIZE).max(ROOM_MIN);
        let mut used = self.used.lock();
        while *used > 0 && *used + bytes > ROOM {
            self.freed.wait(&mut used);
        }
        *used += bytes;
        Room {
            desk: Arc::clone(self),
            bytes,
        }
    }

    /// Room for what is read ahead: half of it all is for those who wait.
    fn room_ahead(self: &Arc<Self>, blocks: usize) -> Option<Room> {
        let bytes = (blocks * BLOCK_SIZE).max(ROOM_MIN);
        let mut used = self.used.lock();
        if *used + bytes > ROOM / 2 {
            return None;
        }
        *used += bytes;
        Some(Room {
            desk: Arc::clone(self),
            bytes,
        })
    }

    /// Looks for a block. Nobody waits for what is read ahead.
    fn look(&self, job: &Arc<Job>, want: &Want) -> Look {
        match job.how {
            How::Ahead => self.cache.look(want.block, || Box::new(|_| {})),
            How::Waits | How::Later => self.cache.look(want.block, || job.waiter(want.at)),
        }
    }

    /// Puts the range together.
    fn assemble(
        &self,
        range: &Range<u64>,
        mut pages: Vec<(u64, Held)>,
        mut parts: Vec<(Piece, Bounce)>,
    ) -> ReadBytes {
        let first = range.start / B;
        let blocks = range.end.div_ceil(B) - first;
        let len = (range.end - range.start) as usize;
        let skew = (range.start - first * B) as usize;
        if pages.is_empty()
            && let [(piece, _)] = &parts[..]
            && piece.wants.len() as u64 == blocks
            && piece.len == blocks
            && (first..).zip(&piece.wants).all(|(at, want)| want.at == at)
            && let Some((_, bounce)) = parts.pop()
        {
            return ReadBytes {
                memory: Memory::Bounce(bounce),
                range: skew..skew + len,
            };
        }
        if blocks == 1
            && parts.is_empty()
            && pages.len() == 1
            && let Some((_, block)) = pages.pop()
        {
            return ReadBytes::of_block(block, skew..skew + len);
        }
        let mut memory = if len <= self.buffers.chunk_max() {
            Memory::Bounce(self.buffers.take(len))
        } else {
            Memory::Heap(vec![0; len])
        };
        let target = match &mut memory {
            Memory::Bounce(bounce) => &mut bounce[..],
            Memory::Heap(bytes) => bytes,
            Memory::None | Memory::Block(_) => &mut [],
        };
        // I6: counting would not do, as a damaged map may name a block twice.
        let mut known = vec![false; blocks as usize];
        let wants = parts.iter().flat_map(|(piece, _)| &piece.wants);
        let wants = wants.map(|want| want.at);
        for at in wants.chain(pages.iter().map(|(at, _)| *at)) {
            if let Some(known) = known.get_mut(at.wrapping_sub(first) as usize) {
                *known = true;
            }
        }
        if known.contains(&false) {
            target.fill(0); // there are holes
        }
        for (at, page) in &pages {
            overlay(target, range.start, *at, page.bytes());
        }
        for (piece, bounce) in &parts {
            for want in &piece.wants {
                overlay(target, range.start, want.at, piece.bytes(bounce, want));
            }
        }
        ReadBytes {
            memory,
            range: 0..len,
        }
    }
}

/// Copies the overlap of a block at block `at` of the file into `out`, which begins at byte `start`.
fn overlay(out: &mut [u8], start: u64, at: u64, bytes: &[u8]) {
    let at = at * B;
    let (from, to) = (at.max(start), (at + B).min(start + out.len() as u64));
    if from >= to {
        return;
    }
    let target = &mut out[(from - start) as usize..(to - start) as usize];
    target.copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
}

/// A request under way.
#[derive(Debug)]
struct Job {
    desk: Arc<Desk>,
    range: Range<u64>,
    how: How,
    keep: bool,
    /// Pieces and blocks of others that have yet to arrive, and one for whoever starts it.
    left: AtomicUsize,
    /// Rank 8.
    state: Mutex<State>,
}

struct State {
    pages: Vec<(u64, Held)>,
    parts: Vec<(Piece, Bounce)>,
    /// The first thing that went wrong.
    error: Option<Error>,
    /// Gone once the end has come.
    end: Option<(Done, Pin, Option<Room>)>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "State({} parts)", self.parts.len())
    }
}

impl Job {
    /// Waits for a block that somebody else reads.
    fn waiter(self: &Arc<Self>, at: u64) -> Waiter {
        self.left.fetch_add(1, Ordering::SeqCst);
        let job = Arc::clone(self);
        Box::new(move |outcome| {
            match outcome {
                Ok(page) => job.state.lock().pages.push((at, Held::Cached(page))),
                Err(error) => job.failed(error),
            }
            job.step();
        })
    }

    /// The read of a piece. It does not keep the device.
    fn queued(self: &Arc<Self>, piece: Piece, device: &Arc<dyn BlockDevice>) -> QueuedRead {
        let job = Arc::clone(self);
        let device: Weak<dyn BlockDevice> = Arc::downgrade(device);
        QueuedRead {
            addr: piece.first * B,
            buffer: self.desk.buffers.take(piece.len as usize * BLOCK_SIZE),
            done: Box::new(move |outcome, buffer| {
                let device = outcome.is_err().then(|| device.upgrade()).flatten();
                job.arrived(piece, outcome, buffer, device.as_deref());
            }),
        }
    }

    /// Checks what was read, and tells those who wait for it.
    fn arrived(
        &self,
        piece: Piece,
        outcome: io::Result<()>,
        mut buffer: Bounce,
        device: Option<&dyn BlockDevice>,
    ) {
        let unread = match outcome {
            Ok(()) => Vec::new(),
            Err(error) => read_singly(&piece, error, &mut buffer, device), // I5
        };
        let mut unread = unread.into_iter();
        let mut damage = None;
        for want in &piece.wants {
            let checked = match unread.next().flatten() {
                Some(error) => Err(error),
                None => check_sum(&self.desk.counters, want, piece.bytes(&buffer, want)),
            };
            let cache = &self.desk.cache;
            cache.loaded(want.block, checked.as_ref().copied(), self.keep);
            if let Err(error) = checked {
                damage.get_or_insert(error);
            }
        }
        match damage {
            None if self.how == How::Ahead => drop(buffer),
            None => self.state.lock().parts.push((piece, buffer)),
            Some(error) => self.failed(error),
        }
        self.step();
    }

    fn failed(&self, error: Error) {
        self.state.lock().error.get_or_insert(error);
    }

    /// Something has arrived, or will not. The last one ends the request.
    fn step(&self) {
        if self.left.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        self.desk.busy.fetch_sub(1, Ordering::Relaxed);
        let (pages, parts, error, end) = {
            let state = &mut *self.state.lock();
            (
                std::mem::take(&mut state.pages),
                std::mem::take(&mut state.parts),
                state.error.take(),
                state.end.take(),
            )
        };
        let Some((done, pin, room)) = end else {
            return;
        };
        drop(pin); // I2
        done(match error {
            Some(error) => Err(error),
            None if self.how == How::Ahead => Ok(ReadBytes::none()),
            None => Ok(self.desk.assemble(&self.range, pages, parts)),
        });
        drop(room);
    }
}

/// Reads the blocks of a piece that could not be read as a whole one by one. Returns what is wrong
/// with each, in their order: a neighbour may be, or one in a gap between them.
fn read_singly(
    piece: &Piece,
    error: io::Error,
    buffer: &mut [u8],
    device: Option<&dyn BlockDevice>,
) -> Vec<Option<Error>> {
    let told = |block: u64, source| {
        let what = format!("cannot read the pool: block={block}");
        Error::io(what, source)
    };
    let Some(device) = device.filter(|_| piece.len > 1) else {
        let error = told(piece.first, error);
        let wants = piece.wants.iter();
        return wants.map(|_| Some(error.duplicate())).collect();
    };
    let mut unread = Vec::with_capacity(piece.wants.len());
    for want in &piece.wants {
        let outcome = device.read_at(want.block * B, &mut buffer[piece.place(want)]);
        unread.push(outcome.err().map(|source| told(want.block, source)));
    }
    unread
}

/// I1. The bytes are a whole block.
fn check_sum<'a>(counters: &Counters, want: &Want, bytes: &'a [u8]) -> Result<&'a Page> {
    if crc32c(bytes) == want.sum
        && let Ok(page) = bytes.try_into()
    {
        return Ok(page);
    }
    counters.damaged.fetch_add(1, Ordering::Relaxed);
    Err(Error::corrupt(format!(
        "a data block is not what was written: offset={} block={}; run scrub to find all files",
        want.at.saturating_mul(B),
        want.block
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_is_named_twice_shows_nothing_of_old_buffers_elsewhere() {
        let desk = Desk {
            cache: Arc::new(BlockCache::new(16)),
            buffers: BouncePool::default(),
            counters: Arc::default(),
            busy: AtomicUsize::new(0),
            used: ranked::mutex(8, 0),
            freed: Condvar::new(),
        };
        desk.buffers.take(2 * BLOCK_SIZE).fill(0xaa);
        let page = Arc::new([1; BLOCK_SIZE]);
        let pages = vec![
            (5, Held::Staged(Arc::clone(&page))),
            (5, Held::Staged(page)),
        ];
        let read = desk.assemble(&(5 * B..7 * B), pages, Vec::new());
        assert!(read[..BLOCK_SIZE] == [1; BLOCK_SIZE]);
        assert!(read[BLOCK_SIZE..] == [0; BLOCK_SIZE]);
    }
}
