//! A device in memory that is as bad as the contract allows, and worse on request.
//!
//! It serves tests only, and lives here because it is the other implementation of the contract:
//! what it does to writes that were not synced is the definition of what a pool must survive.
//!
//! Invariants:
//!
//! 1. Everything that happens follows from the seed, the calls and their order: no clock, no
//!    threads, no other randomness.
//! 2. Two images: *live*, what reads see, and *durable*, what is there after a crash; every
//!    completed write that is in the first and not for certain in the second is *pending*.
//! 3. A fork shares all pages and copies nothing.

mod fault;
mod image;
mod rng;
mod trace;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::BlockDevice;
use crate::sys::block;
use crate::units::BLOCK_SIZE;

pub use fault::{Fault, FaultOp, Repeat};
pub use rng::SplitMix64;
pub use trace::{SimReplay, SimTrace};

use fault::Faults;
use image::{Image, Page, State};
use trace::Event;

/// Operations that a device was asked for, failed ones too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SimCounts {
    /// Calls of `read_at`.
    pub reads: u64,
    /// Calls of `write_at`.
    pub writes: u64,
    /// Calls of `sync`.
    pub syncs: u64,
    /// Calls of `discard`.
    pub discards: u64,
    /// Planned faults that happened, and writes for which the host had no room.
    pub faults: u64,
    /// Time that all of them took by [`SimDevice::latency`], whether somebody slept or not.
    pub waited: Duration,
}

/// The simulated device.
pub struct SimDevice {
    /// Bytes, a multiple of the block size. Changes under `inner` only.
    len: AtomicU64,
    /// Everything else. Held during a whole operation.
    inner: Mutex<Inner>,
}

struct Inner {
    state: State,
    rng: SplitMix64,
    faults: Faults,
    counts: SimCounts,
    ignore_sync: bool,
    /// Time of each operation, and whether the caller sleeps so long.
    latency: Vec<(FaultOp, Duration)>,
    sleeps: bool,
    trace: Option<SimTrace>,
    host: Option<Host>,
}

/// A host filesystem with a limit, on which the device is a sparse file.
#[derive(Debug)]
struct Host {
    /// Blocks that it can give to the device.
    blocks_max: u64,
    /// Blocks that it gave.
    allocated: BTreeSet<u64>,
}

impl Host {
    /// Allocates a range: its first blocks, as far as there is space. Returns how many.
    fn allocate(&mut self, addr: u64, len: u64) -> u64 {
        let first = addr / BLOCK_SIZE as u64;
        let count = len / BLOCK_SIZE as u64;
        for (done, block) in (first..first + count).enumerate() {
            let full = self.allocated.len() as u64 >= self.blocks_max;
            if full && !self.allocated.contains(&block) {
                return done as u64;
            }
            self.allocated.insert(block);
        }
        count
    }
}

impl SimDevice {
    /// A device of `len` bytes of zeros, all durable. `seed` decides what faults do in detail.
    pub fn new(len: u64, seed: u64) -> Self {
        assert!(len.is_multiple_of(BLOCK_SIZE as u64), "len={len}");
        Self::from_state(State::settled(len, Image::default()), seed)
    }

    /// The same device once more: contents and pending writes, but none of the faults, counts and
    /// recordings. O(1) for each 256 KiB ever written, and copies no data.
    pub fn fork(&self, seed: u64) -> Self {
        Self::from_state(self.inner.lock().state.clone(), seed)
    }

    /// The device after a crash now: each pending write, independently, is there, is not, or is
    /// torn at sectors; where they overlap any of them may have been the last.
    pub fn crash(&self, seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let (len, image) = self.inner.lock().state.crash(&mut rng);
        Self::from_state(State::settled(len, image), rng.next())
    }

    /// The device after a crash that spared every pending write.
    pub fn crash_all(&self) -> Self {
        let state = self.inner.lock().state.clone();
        Self::from_state(State::settled(state.len, state.live), 0)
    }

    /// The device after a crash that took every pending write.
    pub fn crash_none(&self) -> Self {
        let state = self.inner.lock().state.clone();
        Self::from_state(State::settled(state.durable_len, state.durable), 0)
    }

    /// Lets syncs say yes and make nothing durable, as a disk that lies does. A crash test that
    /// passes all the same proves nothing.
    pub fn ignore_sync(&self, on: bool) {
        self.inner.lock().ignore_sync = on;
    }

    /// Makes the `nth` operation of kind `op` from now on (1: the next one) go wrong, and with
    /// [`Repeat::Forever`] all behind it.
    pub fn fail(&self, op: FaultOp, nth: u64, fault: Fault, repeat: Repeat) {
        self.inner.lock().faults.plan(op, nth, fault, repeat);
    }

    /// Each operation of kind `op` takes `time` from now on. It is counted in
    /// [`SimCounts::waited`]; the caller waits for it only with `sleeps`, as a test with threads
    /// wants, because a simulation has no clock.
    pub fn latency(&self, op: FaultOp, time: Duration, sleeps: bool) {
        let inner = &mut *self.inner.lock();
        inner.latency.retain(|(other, _)| *other != op);
        inner.latency.push((op, time));
        inner.sleeps = sleeps;
    }

    /// Forgets all planned faults. What they did stays.
    pub fn heal(&self) {
        self.inner.lock().faults = Faults::default();
    }

    /// Flips one bit, counted from the lowest of the byte at `addr`, live and durable.
    pub fn flip(&self, addr: u64, bit: u32) {
        assert!(addr < self.len(), "addr={addr}");
        let inner = &mut *self.inner.lock();
        assert!(
            inner.trace.is_none(),
            "damage is not part of a recorded history"
        );
        for image in [&mut inner.state.live, &mut inner.state.durable] {
            image.flip(addr, bit);
        }
    }

    /// How many operations there were.
    pub fn counts(&self) -> SimCounts {
        self.inner.lock().counts
    }

    /// Addresses of the blocks that do not read as zeros, in order.
    pub fn used(&self) -> Vec<u64> {
        let inner = self.inner.lock();
        let used = inner.state.live.used();
        used.map(|block| block * BLOCK_SIZE as u64).collect()
    }

    /// Blocks that the host gave, of a device with [`limit_space`](Self::limit_space).
    pub fn taken(&self) -> u64 {
        let inner = self.inner.lock();
        inner
            .host
            .as_ref()
            .map_or(0, |host| host.allocated.len() as u64)
    }

    /// Writes and discards that a crash now could take.
    pub fn pending_len(&self) -> usize {
        self.inner.lock().state.pending_len()
    }

    /// Starts to record all writes, discards and syncs, from the present state.
    pub fn record(&self) {
        let inner = &mut *self.inner.lock();
        inner.trace = Some(SimTrace::new(inner.state.clone()));
    }

    /// Events recorded so far; 0 without [`record`](Self::record).
    pub fn recorded(&self) -> usize {
        self.inner.lock().trace.as_ref().map_or(0, SimTrace::len)
    }

    /// Ends the recording and returns it; empty without [`record`](Self::record).
    pub fn take_trace(&self) -> SimTrace {
        let inner = &mut *self.inner.lock();
        let state = &inner.state;
        inner
            .trace
            .take()
            .unwrap_or_else(|| SimTrace::new(state.clone()))
    }

    /// Makes the device a sparse file on a host that has `blocks` blocks for it from now on, what
    /// it holds included: a write to any other block fails with `ENOSPC`, and does as much as fits,
    /// as a host does. A discard gives blocks back. `None`: no limit. Of what is on the device
    /// already only what is not zero counts as allocated the first time this is called.
    pub fn limit_space(&self, blocks: Option<u64>) {
        let inner = &mut *self.inner.lock();
        inner.host = blocks.map(|blocks_max| {
            let before = inner.host.take().map(|host| host.allocated);
            Host {
                blocks_max,
                allocated: before.unwrap_or_else(|| inner.state.live.used().collect()),
            }
        });
    }

    fn from_state(state: State, seed: u64) -> Self {
        Self {
            len: AtomicU64::new(state.len),
            inner: Mutex::new(Inner {
                state,
                rng: SplitMix64::new(seed),
                faults: Faults::default(),
                counts: SimCounts::default(),
                ignore_sync: false,
                latency: Vec::new(),
                sleeps: false,
                trace: None,
                host: None,
            }),
        }
    }

    /// Lets the time of one operation pass, without the lock.
    fn wait(&self, op: FaultOp) {
        let sleep = {
            let inner = &mut *self.inner.lock();
            let found = inner.latency.iter().find(|(other, _)| *other == op);
            let Some(time) = found.map(|(_, time)| *time) else {
                return;
            };
            inner.counts.waited += time;
            inner.sleeps.then_some(time)
        };
        if let Some(time) = sleep {
            std::thread::sleep(time);
        }
    }

    fn check_range(&self, addr: u64, len: u64) -> io::Result<()> {
        let block = BLOCK_SIZE as u64;
        assert!(
            addr.is_multiple_of(block) && len.is_multiple_of(block),
            "unaligned transfer addr={addr} len={len}"
        );
        match addr.checked_add(len) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "transfer behind the end of the device",
            )),
        }
    }
}

impl Inner {
    fn apply(&mut self, event: Event) {
        self.state.apply(&event);
        if let Some(trace) = &mut self.trace {
            trace.push(event);
        }
    }

    /// What goes wrong with the next operation of this kind.
    fn fault(&mut self, op: FaultOp) -> Option<Fault> {
        let fault = self.faults.next(op);
        self.counts.faults += u64::from(fault.is_some());
        fault
    }

    /// Some block of a transfer.
    fn one_block<'a>(&mut self, buf: &'a mut [u8]) -> &'a mut [u8] {
        let blocks = (buf.len() / BLOCK_SIZE).max(1);
        let at = self.rng.index(blocks) * BLOCK_SIZE;
        let end = (at + BLOCK_SIZE).min(buf.len());
        &mut buf[at..end]
    }

    /// The block-aligned place where a misdirected transfer of `len` bytes goes.
    fn elsewhere(&mut self, device_len: u64, len: u64) -> u64 {
        let block = BLOCK_SIZE as u64;
        self.rng.below((device_len - len) / block + 1) * block
    }

    fn read(&mut self, device_len: u64, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        self.counts.reads += 1;
        match self.fault(FaultOp::Read) {
            None => self.state.live.read(addr, buf),
            Some(Fault::Io | Fault::NoSpace | Fault::Delayed) => return Err(block::io_error()),
            Some(Fault::Lost) => buf.fill(0),
            Some(Fault::Zeros) => {
                self.state.live.read(addr, buf);
                self.one_block(buf).fill(0);
            }
            Some(Fault::Garbage) => {
                self.state.live.read(addr, buf);
                let mut noise = SplitMix64::new(self.rng.next());
                fill_noise(self.one_block(buf), &mut noise);
            }
            Some(Fault::Misdirected) => {
                let wrong = self.elsewhere(device_len, buf.len() as u64);
                self.state.live.read(wrong, buf);
            }
            Some(Fault::Torn) => {
                self.state.live.read(addr, buf);
                let cut = self.rng.index(buf.len().max(1));
                buf[cut..].fill(0);
            }
            Some(Fault::FlipBit) => {
                self.state.live.read(addr, buf);
                if !buf.is_empty() {
                    buf[self.rng.index(buf.len())] ^= 1 << self.rng.below(8);
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, device_len: u64, addr: u64, data: &[u8]) -> io::Result<()> {
        self.counts.writes += 1;
        let mut pages: Vec<Option<Page>> = data.chunks(BLOCK_SIZE).map(image::page).collect();
        let mut addr = addr;
        let fault = self.fault(FaultOp::Write);
        if let (None, Some(host)) = (fault, &mut self.host) {
            let fits = host.allocate(addr, data.len() as u64) as usize;
            if fits < pages.len() {
                self.counts.faults += 1;
                pages.truncate(fits);
                if fits > 0 {
                    self.apply(Event::Write {
                        addr,
                        pages,
                        held: 0,
                    });
                }
                return Err(block::no_space_error());
            }
        }
        let mut held = 0;
        match fault {
            None => {}
            // More than one sync, or the write would have been lost in that crash anyway.
            Some(Fault::Delayed) => held = 2 + (self.rng.below(8) as u32),
            Some(Fault::Zeros | Fault::Garbage) if pages.is_empty() => {}
            Some(Fault::Zeros) => {
                let index = self.rng.index(pages.len());
                pages[index] = None;
            }
            Some(Fault::Garbage) => {
                let index = self.rng.index(pages.len());
                let mut noise = [0; BLOCK_SIZE];
                fill_noise(&mut noise, &mut self.rng);
                pages[index] = image::page(&noise);
            }
            Some(Fault::NoSpace) => return Err(block::no_space_error()),
            Some(Fault::Lost) => return Ok(()),
            Some(Fault::Misdirected) => addr = self.elsewhere(device_len, data.len() as u64),
            // A write that failed may have reached the medium: wholly, in part, or not.
            Some(Fault::Io) if self.rng.below(3) == 0 => return Err(block::io_error()),
            Some(Fault::Io) if self.rng.below(2) == 0 => {}
            Some(Fault::Io | Fault::Torn) => {
                self.state.live.tear(addr, &mut pages, &mut self.rng);
            }
            Some(Fault::FlipBit) => {
                let index = self.rng.index(pages.len().max(1));
                if let Some(page) = pages.get_mut(index) {
                    let byte = self.rng.index(BLOCK_SIZE);
                    image::flip(page, byte, u32::try_from(self.rng.below(8)).unwrap_or(0));
                }
            }
        }
        self.apply(Event::Write { addr, pages, held });
        match fault {
            Some(Fault::Io) => Err(block::io_error()),
            _ => Ok(()),
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        self.counts.syncs += 1;
        match self.fault(FaultOp::Sync) {
            Some(Fault::Lost) => return Ok(()),
            Some(fault) => {
                // As host kernels do: the pages count as clean from now on, whatever reached the
                // medium, and the next sync says yes.
                let seed = self.rng.next();
                self.apply(Event::FailedSync { seed });
                return Err(match fault {
                    Fault::NoSpace => block::no_space_error(),
                    _ => block::io_error(),
                });
            }
            None => {}
        }
        if !self.ignore_sync {
            self.apply(Event::Sync);
        }
        Ok(())
    }

    fn discard(&mut self, addr: u64, len: u64) -> io::Result<()> {
        self.counts.discards += 1;
        match self.fault(FaultOp::Discard) {
            Some(Fault::Lost) => return Ok(()),
            Some(_) => return Err(block::io_error()),
            None => {}
        }
        if let Some(host) = &mut self.host {
            let first = addr / BLOCK_SIZE as u64;
            for block in first..first + len / BLOCK_SIZE as u64 {
                host.allocated.remove(&block);
            }
        }
        self.apply(Event::Discard { addr, len });
        Ok(())
    }
}

fn fill_noise(bytes: &mut [u8], rng: &mut SplitMix64) {
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&rng.next().to_le_bytes()[..chunk.len()]);
    }
}

impl fmt::Debug for SimDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the contents, which nobody can read, and without the lock.
        write!(f, "SimDevice({} bytes)", self.len())
    }
}

impl BlockDevice for SimDevice {
    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    fn read_at(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check_range(addr, buf.len() as u64)?;
        self.wait(FaultOp::Read);
        self.inner.lock().read(self.len(), addr, buf)
    }

    fn gap_max(&self) -> u64 {
        4 // so that tests meet reads with gaps
    }

    fn write_at(&self, addr: u64, data: &[u8]) -> io::Result<()> {
        self.check_range(addr, data.len() as u64)?;
        self.wait(FaultOp::Write);
        self.inner.lock().write(self.len(), addr, data)
    }

    fn sync(&self) -> io::Result<()> {
        self.wait(FaultOp::Sync);
        self.inner.lock().sync()
    }

    fn discard(&self, addr: u64, len: u64) -> io::Result<()> {
        self.check_range(addr, len)?;
        self.wait(FaultOp::Discard);
        self.inner.lock().discard(addr, len)
    }

    fn grow(&self, len: u64) -> io::Result<()> {
        let inner = &mut *self.inner.lock();
        if len > inner.state.len {
            inner.apply(Event::Grow {
                len: len.next_multiple_of(BLOCK_SIZE as u64),
            });
            self.len.store(inner.state.len, Ordering::Release);
        }
        Ok(())
    }

    fn host_free(&self) -> io::Result<Option<u64>> {
        let inner = self.inner.lock();
        let block = BLOCK_SIZE as u64;
        Ok(inner.host.as_ref().map(|host| {
            let given = host.allocated.len() as u64;
            host.blocks_max.saturating_sub(given) * block
        }))
    }

    fn allocated(&self) -> io::Result<u64> {
        let inner = self.inner.lock();
        let given = inner.host.as_ref();
        Ok(given.map_or(inner.state.len, |host| {
            host.allocated.len() as u64 * BLOCK_SIZE as u64
        }))
    }

    fn preallocate(&self, addr: u64, len: u64) -> io::Result<()> {
        self.check_range(addr, len)?;
        let inner = &mut *self.inner.lock();
        let host = inner.host.as_mut();
        let done = host.map_or(u64::MAX, |host| host.allocate(addr, len));
        if done < len / BLOCK_SIZE as u64 {
            return Err(block::no_space_error());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
