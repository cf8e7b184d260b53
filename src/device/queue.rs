//! Reads that nobody waits for: they are handed over, and whoever handed them over is called when
//! they have ended.
//!
//! Invariants:
//!
//! 1. Each read that was submitted ends with one call, also when the queue goes.
//! 2. The call is made without a lock held, on a thread of the queue, which nobody may make wait
//!    for another read of the same queue.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use super::Bounce;
use crate::sync::{Condvar, Mutex};
use crate::sys::memory::Aligned;
use crate::sys::ring::{Bell, Finished, Ring};

/// Reads of one ring under way at once: more than the device of one machine works on.
const RING_READS_MAX: u32 = 256;
/// Most rings, each with a thread that also answers whoever waits: one could not keep up with
/// several disks' worth of large reads.
const RINGS_MAX: usize = 4;
/// Threads that read where there is no ring.
const THREADS: usize = 4;
/// Calls in a row that a ring may fail, and the time in between: about a second, for memory that is
/// short to come back.
const FAILURES_MAX: u32 = 100;
const FAILURE_PAUSE: Duration = Duration::from_millis(10);

/// Called with the outcome and the buffer.
pub type ReadDone = Box<dyn FnOnce(io::Result<()>, Bounce) + Send>;

/// A read to be done.
pub struct QueuedRead {
    /// Where, in bytes, a multiple of the block size.
    pub addr: u64,
    /// What is filled, whole.
    pub buffer: Bounce,
    /// Who is told.
    pub done: ReadDone,
}

impl std::fmt::Debug for QueuedRead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "QueuedRead({} bytes at {})",
            self.buffer.asked(),
            self.addr
        )
    }
}

/// How a thread reads: whole or an error.
type Read = dyn Fn(u64, &mut [u8]) -> io::Result<()> + Send + Sync;

/// Threads that read.
#[derive(Debug)]
pub struct ReadQueue {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    is_ring: bool,
}

#[derive(Debug, Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    /// Wakes threads without a ring, or whose ring has failed.
    more: Condvar,
}

#[derive(Debug, Default)]
struct Inbox {
    reads: VecDeque<QueuedRead>,
    /// Wakes threads of rings that sleep: one for each submission, as those that work look here
    /// again before they sleep.
    sleeps: Vec<Bell>,
    stop: bool,
}

impl Inbox {
    /// Wakes somebody for reads that are left.
    fn bell_for_rest(&mut self) -> Option<Bell> {
        match self.reads.is_empty() {
            true => None,
            false => self.sleeps.pop(),
        }
    }
}

impl ReadQueue {
    /// Reads of `file` by `io_uring`.
    ///
    /// # Errors
    /// Where the kernel does not have it or forbids it.
    pub(crate) fn ring(file: Arc<File>) -> io::Result<Self> {
        let mut queue = Self {
            shared: Arc::default(),
            threads: Vec::new(),
            is_ring: true,
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..cores.min(RINGS_MAX) {
            let thread = Self::ring_thread(&file, &queue.shared)?;
            queue.threads.push(thread);
        }
        Ok(queue)
    }

    /// A thread with a ring of its own.
    fn ring_thread(file: &Arc<File>, shared: &Arc<Shared>) -> io::Result<JoinHandle<()>> {
        let (tell, told) = mpsc::channel();
        let thread = {
            let (file, shared) = (Arc::clone(file), Arc::clone(shared));
            // The ring belongs to the thread that makes it.
            let run = move || match Ring::new(Arc::clone(&file), RING_READS_MAX) {
                Ok(ring) => {
                    drop(tell.send(Ok(())));
                    serve_ring(ring, &file, &shared);
                }
                Err(error) => drop(tell.send(Err(error))),
            };
            Builder::new().name("nodupe-read".to_owned()).spawn(run)?
        };
        told.recv()
            .unwrap_or_else(|_| Err(io::Error::other("the thread ended")))?;
        Ok(thread)
    }

    /// Reads by a few threads that call `read`.
    ///
    /// # Errors
    /// If a thread cannot be made.
    pub fn threads(
        read: impl Fn(u64, &mut [u8]) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let read: Arc<Read> = Arc::new(read);
        let mut queue = Self {
            shared: Arc::default(),
            threads: Vec::new(),
            is_ring: false,
        };
        for _ in 0..THREADS {
            let (shared, read) = (Arc::clone(&queue.shared), Arc::clone(&read));
            let thread = Builder::new().name("nodupe-read".to_owned());
            let thread = thread.spawn(move || serve_thread(&shared, &*read))?;
            queue.threads.push(thread);
        }
        Ok(queue)
    }

    /// True if a read costs the thread that submits it next to nothing, and no other thread sleeps
    /// for it.
    pub fn is_ring(&self) -> bool {
        self.is_ring
    }

    /// Begins reads.
    pub fn submit(&self, reads: impl IntoIterator<Item = QueuedRead>) {
        let mut inbox = self.shared.inbox.lock();
        inbox.reads.extend(reads);
        let bell = inbox.sleeps.pop();
        drop(inbox);
        if let Some(bell) = bell {
            bell.ring();
        }
        self.shared.more.notify_all();
    }
}

impl Drop for ReadQueue {
    fn drop(&mut self) {
        let mut inbox = self.shared.inbox.lock();
        inbox.stop = true;
        let bells = std::mem::take(&mut inbox.sleeps);
        drop(inbox);
        bells.iter().for_each(Bell::ring);
        self.shared.more.notify_all();
        let this = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // The last user of a device may be the call at the end of a read: that thread ends by
            // itself, and does not wait for itself.
            if thread.thread().id() != this && thread.join().is_err() {
                log::error!("a thread that reads panicked");
            }
        }
    }
}

fn serve_thread(shared: &Shared, read: impl Fn(u64, &mut [u8]) -> io::Result<()>) {
    let mut inbox = shared.inbox.lock();
    loop {
        if let Some(mut next) = inbox.reads.pop_front() {
            drop(inbox);
            let outcome = read(next.addr, &mut next.buffer);
            (next.done)(outcome, next.buffer);
            inbox = shared.inbox.lock();
        } else if inbox.stop {
            return;
        } else {
            shared.more.wait(&mut inbox);
        }
    }
}

/// A read whose memory is lent to the ring.
struct Flight {
    addr: u64,
    buffer: Bounce,
    done: ReadDone,
}

/// What a thread with a ring has in hand.
struct Rider {
    ring: Ring,
    bell: Bell,
    flights: Vec<Option<Flight>>,
    /// Places in `flights`, as many as the ring has room for.
    free: Vec<usize>,
}

impl Rider {
    fn new(ring: Ring) -> Self {
        Self {
            bell: ring.bell(),
            ring,
            flights: (0..RING_READS_MAX).map(|_| None).collect(),
            free: (0..RING_READS_MAX as usize).collect(),
        }
    }

    /// Takes as many reads as the ring has room for. The rest is for another one, or for this one
    /// later. True if the queue goes.
    fn take(&mut self, shared: &Shared) -> bool {
        let (reads, other, stop) = {
            let mut inbox = shared.inbox.lock();
            let count = inbox.reads.len().min(self.free.len());
            let reads: Vec<QueuedRead> = inbox.reads.drain(..count).collect();
            let other = inbox.bell_for_rest();
            // From now on whoever submits rings.
            inbox.sleeps.push(self.bell.clone());
            (reads, other, inbox.stop)
        };
        if let Some(other) = other {
            other.ring();
        }
        for mut read in reads {
            let tag = self.free.pop().expect("there is a place for each");
            let memory = read.buffer.lend();
            self.ring.push(tag, read.addr, memory, read.buffer.asked());
            self.flights[tag] = Some(Flight {
                addr: read.addr,
                buffer: read.buffer,
                done: read.done,
            });
        }
        stop
    }

    /// Serves until the queue goes: true, or until the ring has failed for good: false.
    fn serve(&mut self, file: &File, shared: &Shared) -> bool {
        let mut finished = Vec::new();
        let mut failures = 0;
        loop {
            // A ring that fails takes nothing: others may do better.
            if failures == 0 && self.take(shared) && self.ring.under_way() == 0 {
                return true;
            }
            let outcome = self.ring.wait(&mut finished);
            let mut inbox = shared.inbox.lock();
            inbox.sleeps.retain(|other| !other.is(&self.bell));
            let other = match outcome {
                Ok(()) => None,
                Err(_) => inbox.bell_for_rest(),
            };
            drop(inbox);
            match outcome {
                Ok(()) => failures = 0,
                Err(error) if failures == FAILURES_MAX => {
                    log::error!("io_uring fails, ordinary reads take its place: {error}");
                    return false;
                }
                Err(_) => {
                    failures += 1;
                    other.iter().for_each(Bell::ring);
                    std::thread::sleep(FAILURE_PAUSE);
                }
            }
            for read in finished.drain(..) {
                if let Some(flight) = self.flights.get_mut(read.tag).and_then(Option::take) {
                    self.free.push(read.tag);
                    end(flight, read, file);
                }
            }
        }
    }
}

fn serve_ring(ring: Ring, file: &File, shared: &Shared) {
    let mut rider = Rider::new(ring);
    if rider.serve(file, shared) {
        return;
    }
    for mut flight in rider.flights.drain(..).flatten() {
        // The memory that was lent stays with the ring: the kernel may yet write to it.
        flight.buffer.restore(Aligned::new(flight.buffer.asked()));
        let outcome = file.read_exact_at(&mut flight.buffer, flight.addr);
        (flight.done)(outcome, flight.buffer);
    }
    serve_thread(shared, |addr, buf: &mut [u8]| file.read_exact_at(buf, addr));
}

fn end(mut flight: Flight, read: Finished, file: &File) {
    flight.buffer.restore(read.memory);
    let outcome = match read.read {
        Ok(bytes) if bytes == flight.buffer.len() => Ok(()),
        // A part of it, as any read may give: the rest in the ordinary way.
        Ok(bytes) => file.read_exact_at(&mut flight.buffer[bytes..], flight.addr + bytes as u64),
        // A signal, memory that is short, something that only reads of rings run into, or the
        // device: an ordinary read tells which.
        Err(_) => file.read_exact_at(&mut flight.buffer, flight.addr),
    };
    (flight.done)(outcome, flight.buffer);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::BouncePool;
    use crate::units::BLOCK_SIZE;

    /// A file of `blocks` blocks, each full of its own number.
    fn file(blocks: u8) -> Arc<File> {
        let file = tempfile::tempfile().expect("a file can be made");
        let bytes: Vec<u8> = (0..blocks).flat_map(|block| [block; BLOCK_SIZE]).collect();
        file.write_all_at(&bytes, 0).expect("there is room");
        Arc::new(file)
    }

    #[test]
    fn a_read_that_the_ring_gives_up_is_tried_once_more() {
        let file = file(4);
        for (addr, good) in [(2, true), (3, false)] {
            let (tell, told) = mpsc::channel();
            let mut buffer = BouncePool::default().take(2 * BLOCK_SIZE);
            let memory = buffer.lend();
            let flight = Flight {
                addr: addr * BLOCK_SIZE as u64,
                buffer,
                done: Box::new(move |outcome, buffer| {
                    tell.send((outcome, buffer.to_vec())).expect("it is heard");
                }),
            };
            let read = Err(io::Error::other("the ring says no"));
            let tag = 0;
            end(flight, Finished { tag, memory, read }, &file);
            let (outcome, bytes) = told.recv().expect("it is told");
            assert_eq!(outcome.is_ok(), good, "{outcome:?}");
            if good {
                assert_eq!((bytes[0], bytes[BLOCK_SIZE]), (2, 3));
            }
        }
    }

    /// Reads of one block each, of a file as above of `blocks` blocks, which tell what they read.
    fn reads(
        count: usize,
        blocks: u8,
        tell: &mpsc::Sender<(u8, io::Result<u8>)>,
    ) -> Vec<QueuedRead> {
        let buffers = BouncePool::default();
        let read = |i: usize| {
            let (block, tell) = ((i % usize::from(blocks)) as u8, tell.clone());
            QueuedRead {
                addr: u64::from(block) * BLOCK_SIZE as u64,
                buffer: buffers.take(BLOCK_SIZE),
                done: Box::new(move |outcome, buffer| {
                    let read = outcome.map(|()| buffer[BLOCK_SIZE - 1]);
                    tell.send((block, read)).expect("it is heard");
                }),
            }
        };
        (0..count).map(read).collect()
    }

    fn check(told: &mpsc::Receiver<(u8, io::Result<u8>)>, count: usize) {
        for _ in 0..count {
            let (block, read) = told.recv().expect("each is told");
            assert_eq!(read.expect("the file is sound"), block);
        }
    }

    /// None where the kernel or a container forbids it, which is told.
    fn ring(file: &Arc<File>) -> Option<Ring> {
        Ring::new(Arc::clone(file), RING_READS_MAX)
            .inspect_err(|error| eprintln!("cannot run: io_uring is not available here: {error}"))
            .ok()
    }

    #[test]
    fn a_ring_takes_what_it_has_room_for_and_wakes_another() {
        let file = file(8);
        let (Some(ours), Some(theirs)) = (ring(&file), ring(&file)) else {
            return;
        };
        let (tell, told) = mpsc::channel();
        let shared = Shared::default();
        let count = RING_READS_MAX as usize + 50;
        shared.inbox.lock().reads.extend(reads(count, 8, &tell));
        shared.inbox.lock().sleeps.push(theirs.bell());
        let mut rider = Rider::new(ours);
        assert!(!rider.take(&shared));
        {
            let mut inbox = shared.inbox.lock();
            assert_eq!(inbox.reads.len(), 50);
            assert!(matches!(&inbox.sleeps[..], [one] if one.is(&rider.bell)));
            inbox.sleeps.clear();
            inbox.stop = true;
        }
        assert!(rider.serve(&file, &shared));
        check(&told, count);
    }

    #[test]
    fn reads_of_a_ring_that_fails_are_done_in_the_ordinary_way() {
        for is_short in [false, true] {
            let (file, shared) = (file(8), Arc::<Shared>::default());
            if ring(&file).is_none() {
                return;
            }
            let (tell, told) = mpsc::channel();
            shared.inbox.lock().reads.extend(reads(300, 8, &tell));
            let thread = {
                let (file, shared) = (Arc::clone(&file), Arc::clone(&shared));
                std::thread::spawn(move || {
                    let ring = ring(&file).expect("there was one before");
                    ring.fail(is_short);
                    serve_ring(ring, &file, &shared);
                })
            };
            check(&told, 300);
            // It goes on to serve.
            shared.inbox.lock().reads.extend(reads(10, 8, &tell));
            shared.more.notify_all();
            check(&told, 10);
            shared.inbox.lock().stop = true;
            shared.more.notify_all();
            thread.join().expect("it ends well");
        }
    }
}
