//! Reads of one file through `io_uring`: many under way at once, by one thread.
//!
//! Invariants:
//!
//! 1. Memory that the kernel writes to belongs to the ring until the read has ended: it is moved in
//!    by [`Ring::push`] and comes out of [`Ring::wait`]. A ring that goes waits for all of it.
//! 2. A ring is used by the thread that made it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, opcode, types};

use super::memory::Aligned;

/// Marks the read of the bell among the completions.
const BELL: u64 = u64::MAX;
/// How often a ring that goes waits 10 ms for memory that is short.
const TRIES_MAX: u32 = 100;

/// Wakes the thread that waits in [`Ring::wait`], from any other.
#[derive(Clone, Debug)]
pub struct Bell(Arc<File>);

impl Bell {
    fn new() -> io::Result<Self> {
        // SAFETY: eventfd takes two integers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        Ok(Self(Arc::new(unsafe { File::from_raw_fd(fd) })))
    }

    /// True if both wake the same thread.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Wakes it, now or when it waits next.
    pub fn ring(&self) {
        // Any number will do that is not 0, so the order of bytes does not matter.
        if let Err(error) = (&*self.0).write_all(&1_u64.to_le_bytes()) {
            log::error!("a thread that reads was not woken: {error}");
        }
    }
}

/// A read that has ended.
#[derive(Debug)]
pub struct Finished {
    /// What it was pushed with.
    pub tag: usize,
    /// The memory.
    pub memory: Aligned,
    /// Bytes that were read, from the first one asked for: fewer than asked for at the end of the
    /// file, and now and then elsewhere.
    pub read: io::Result<usize>,
}

/// The ring. See the module.
pub struct Ring {
    ring: IoUring,
    file: Arc<File>,
    bell: Bell,
    /// Where the kernel puts the count of the bell: on the heap, so that it does not move.
    rung: Box<[u8; 8]>,
    /// The bell is being read.
    armed: bool,
    /// Reads under way, by slot: tag and memory.
    flights: Vec<Option<(usize, Aligned)>>,
    free: Vec<usize>,
    /// Error that the kernel is made to give.
    #[cfg(test)]
    broken: std::cell::Cell<Option<i32>>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring({} under way)", self.under_way())
    }
}

impl Ring {
    /// A ring for at most `reads_max` reads of `file` at once.
    ///
    /// # Errors
    /// Whatever the kernel says where it has no such thing or does not let us have it: containers
    /// often forbid it.
    pub fn new(file: Arc<File>, reads_max: u32) -> io::Result<Self> {
        let entries = reads_max + 1; // and the bell
        // Completions are then worked on where this thread waits, and interrupt nobody.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries)
            .or_else(|_| IoUring::new(entries))?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            ring,
            file,
            bell: Bell::new()?,
            rung: Box::new([0; 8]),
            armed: false,
            flights: (0..reads_max).map(|_| None).collect(),
            free: (0..reads_max as usize).collect(),
            #[cfg(test)]
            broken: std::cell::Cell::default(),
        })
    }

    /// What wakes the thread of this ring.
    pub fn bell(&self) -> Bell {
        self.bell.clone()
    }

    /// Reads under way, those included that [`wait`](Self::wait) has yet to submit.
    pub fn under_way(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// True if another read can be pushed.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Begins to read `len` bytes at `addr` into the beginning of `memory`, with the next
    /// [`wait`](Self::wait). There must be room.
    pub fn push(&mut self, tag: usize, addr: u64, mut memory: Aligned, len: usize) {
        let slot = self.free.pop().expect("whoever pushes asked for room");
        let bytes = memory.bytes_mut(len);
        let len = u32::try_from(bytes.len()).expect("reads are a few MiB at most");
        let entry = opcode::Read::new(types::Fd(self.file.as_raw_fd()), bytes.as_mut_ptr(), len)
            .offset(addr)
            .build()
            .user_data(slot as u64);
        self.flights[slot] = Some((tag, memory));
        // SAFETY: I1: the memory stays in `flights`, which keeps its heap where it is, until the
        // completion; `file` is kept as long as the ring.
        self.enter(&entry);
    }

    fn enter(&mut self, entry: &io_uring::squeue::Entry) {
        // SAFETY: callers push only entries whose memory and descriptors the ring keeps.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("there is an entry for each slot and the bell");
    }

    /// Submits what was pushed, and waits until a read has ended or the bell has rung. Adds the
    /// reads that have ended to `finished`.
    ///
    /// # Errors
    /// If the kernel refuses and no read has ended: what was pushed stays, and another call tries
    /// again. It may be that memory is short.
    pub fn wait(&mut self, finished: &mut Vec<Finished>) -> io::Result<()> {
        if !self.armed {
            let entry = opcode::Read::new(
                types::Fd(self.bell.0.as_raw_fd()),
                self.rung.as_mut_ptr(),
                self.rung.len() as u32,
            )
            .build()
            .user_data(BELL);
            self.enter(&entry);
            self.armed = true;
        }
        let outcome = match self.submit() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            outcome => outcome,
        };
        // Also if the kernel refused: its queue may be full of what has ended.
        let mut ended = 0;
        for entry in self.ring.completion() {
            ended += 1;
            if entry.user_data() == BELL {
                self.armed = false;
                continue;
            }
            let slot = entry.user_data() as usize;
            let Some((tag, memory)) = self.flights.get_mut(slot).and_then(Option::take) else {
                continue;
            };
            self.free.push(slot);
            let read = match entry.result() {
                error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
                read => Ok(read as usize),
            };
            finished.push(Finished { tag, memory, read });
        }
        if ended > 0 { Ok(()) } else { outcome }
    }

    fn submit(&self) -> io::Result<()> {
        #[cfg(test)]
        if let Some(error) = self.broken.get() {
            return Err(io::Error::from_raw_os_error(error));
        }
        self.ring.submit_and_wait(1).map(drop)
    }

    /// Makes the kernel refuse everything from now on, for want of memory or for good.
    #[cfg(test)]
    pub(crate) fn fail(&self, is_short: bool) {
        let error = if is_short { libc::EAGAIN } else { libc::EBADF };
        self.broken.set(Some(error));
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // I1: nothing of it may be freed while the kernel writes to it.
        self.bell.ring();
        let mut finished = Vec::new();
        let mut tries = 0;
        while self.under_way() > 0 || self.armed {
            if let Err(error) = self.wait_again(&mut finished) {
                tries += 1;
                let short = matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN));
                if short && tries < TRIES_MAX {
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                }
                log::error!("reads under way cannot be waited for: {error}");
                std::mem::forget(std::mem::take(&mut self.flights));
                std::mem::forget(std::mem::replace(&mut self.rung, Box::new([0; 8])));
                return;
            }
            finished.clear();
        }
    }
}

impl Ring {
    /// As [`wait`](Self::wait), but does not listen to the bell again.
    fn wait_again(&mut self, finished: &mut Vec<Finished>) -> io::Result<()> {
        if !self.armed {
            // Pretended, for the time of the call.
            self.armed = true;
            let outcome = self.wait(finished);
            self.armed = false;
            return outcome;
        }
        self.wait(finished)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// None where the kernel or a container forbids it, which is told.
    fn ring(bytes: &[u8], reads_max: u32) -> Option<Ring> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        match Ring::new(Arc::new(file), reads_max) {
            Ok(ring) => Some(ring),
            Err(error) => {
                eprintln!("cannot run: io_uring is not available here: {error}");
                None
            }
        }
    }

    #[test]
    fn reads_give_the_memory_back_with_what_was_read() {
        let bytes: Vec<u8> = (0..64 * 1024_u32).map(|i| (i / 4096) as u8).collect();
        let Some(mut ring) = ring(&bytes, 4) else {
            return;
        };
        for i in 0..4 {
            ring.push(i, (15 - i as u64) * 4096, Aligned::new(8192), 8192);
        }
        assert!(!ring.has_room());
        let mut finished = Vec::new();
        while ring.under_way() > 0 {
            ring.wait(&mut finished).unwrap();
        }
        finished.sort_by_key(|read| read.tag);
        for (i, read) in finished.iter().enumerate() {
            assert_eq!(read.tag, i);
            let len = *read.read.as_ref().unwrap();
            assert_eq!(len, if i == 0 { 4096 } else { 8192 }, "the file ends");
            assert_eq!(read.memory.bytes(1)[0], 15 - i as u8);
        }
    }

    #[test]
    fn the_bell_wakes_and_a_ring_goes_with_reads_under_way() {
        let Some(mut ring) = ring(&[7; 65536], 8) else {
            return;
        };
        let bell = ring.bell();
        let waker = std::thread::spawn(move || bell.ring());
        let mut finished = Vec::new();
        ring.wait(&mut finished).unwrap();
        assert!(finished.is_empty());
        waker.join().unwrap();
        for i in 0..8 {
            ring.push(i, 0, Aligned::new(65536), 65536);
        }
        drop(ring);
    }
}
