//! The host under the pool has no space: a sparse file on a filesystem that is full, over its
//! quota, or a thin volume.
//!
//! This is not a failure of the device, and the pool goes on by itself once the host has space
//! again. Why that is safe although a failed write is never tried again elsewhere:
//!
//! 1. Every write but that of the ring and the superblock goes to blocks to which no durable tree
//!    refers, so whatever it left there means nothing. `ENOSPC` of a write says that the host did
//!    not take it; after `EIO` even blocks around it may have changed, and a retry that succeeds
//!    proves nothing.
//! 2. `ENOSPC` of a *sync* is different: the host took writes and lost some of them, nobody knows
//!    which. That poisons the pool like any failed sync.
//! 3. The ring, the superblocks and the home of the nodes (`space.rs`, I3) are allocated on the host
//!    in advance. So commits go on until the ring is full, and checkpoints of trees that fit their
//!    home succeed, with them deleting and discarding: the pool gives space back to a full host.
//!
//! Who meets a full host:
//!
//! | who | what happens |
//! |---|---|
//! | a large write | `NoSpace`, its blocks are free again |
//! | destage | blocks stay staged and in the journal, or go to the home of the nodes; tried again |
//! | small writes, creating | refused while the last try of anybody failed, or for a minute more than what could be destaged to the home, with the nodes that map it |
//! | a checkpoint before its cut | given up |
//! | a checkpoint behind it | its nodes wait in memory; the next one writes them first |
//! | a commit (where overwriting takes space) | the batch is queued again, the caller gets `NoSpace` |

use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::sync::Instant;
use crate::sync::atomic::Ordering;
use crate::units::BLOCK_SIZE;

use super::counters::RESERVE_PER_BLOCK;
use super::pool::Pool;
use super::refusals::Times;
use super::space::{Class, PIECE};

/// How often it is said at most that the host is full.
const SAID_EVERY: Duration = Duration::from_secs(60);
/// How often writers ask a full host again.
const PROBE_EVERY: Duration = Duration::from_millis(250);
/// How long behind a refusal space is given back to the host as soon as there is any.
const PRESSED_FOR: Duration = Duration::from_secs(60);

/// Staged blocks for which there is room for a rescue, or nothing new is taken.
const RESCUE_LEAST: u64 = 4;

/// What callers are told.
fn host_full() -> Error {
    Error::new(
        Kind::NoSpace,
        "the host has no space for the pool: free some on the filesystem that holds it",
    )
}

impl Pool {
    /// Notes that the host refused a write, and returns the error for its caller.
    pub(crate) fn host_refused(&self, error: Error) -> Error {
        self.host.full.store(true, Ordering::SeqCst);
        self.host.refused.store(true, Ordering::Relaxed);
        let mut times = self.host.times.lock();
        times.refused = Some(Instant::now());
        if Times::is_over(times.said, SAID_EVERY) {
            times.said = Some(Instant::now());
            times.is_open = true;
            log::error!(
                "the host has no space for the pool, new writes fail until it has: {error}; free \
                 some on the filesystem that holds the pool, or delete files in the pool"
            );
        }
        drop(times);
        self.relief.notify_all(); // who waits for a destage would wait for long
        error
    }

    /// Notes that the host took data.
    pub(crate) fn host_accepted(&self) {
        if self.host.full.swap(false, Ordering::SeqCst) {
            if std::mem::take(&mut self.host.times.lock().is_open) {
                log::warn!("the host has space for the pool again");
            }
            self.relief.notify_all();
        }
    }

    /// True if the host refused the last data written to a new place.
    pub fn is_host_full(&self) -> bool {
        self.host.full.load(Ordering::Relaxed)
    }

    /// True if the host refused something a while ago: whatever is free goes back to it at once.
    pub(crate) fn is_host_pressed(&self) -> bool {
        !Times::is_over(self.host.times.lock().refused, PRESSED_FOR)
    }

    /// True if `blocks` more staged blocks, with the nodes that map them, would not fit where the
    /// host keeps space for the pool, after it refused something: if it refuses again they could
    /// not be destaged, no checkpoint could be written, and deleting would not help any more.
    fn lacks_rescue(&self, blocks: u64) -> bool {
        if !self.host.refused.load(Ordering::Relaxed) || !self.is_host_pressed() {
            return false;
        }
        let room = self.meta.read().space.rescue_room();
        let staged = self.stage.lock().blocks() as u64;
        (staged + blocks) * RESERVE_PER_BLOCK > room
    }

    /// Keeps room for a rescue, by a checkpoint, or learns that the host has space for what does
    /// not fit. Otherwise new data and names are refused from here on, and deleting waits for the
    /// checkpoint a little. Called with no lock held.
    pub(crate) fn keep_rescue(&self) -> Result<()> {
        let mut crowded = self.lacks_rescue(RESCUE_LEAST);
        if crowded && (self.counters.dirty() > 0 || self.stage.lock().blocks() > 0) {
            self.relieve_rescue()?;
            crowded = self.lacks_rescue(RESCUE_LEAST);
        }
        if crowded && self.stage.lock().blocks() == 0 {
            // What lies there may stay, so that this would never end.
            crowded = !self.host_takes(RESCUE_LEAST)?;
        }
        self.host.crowded.store(crowded, Ordering::Relaxed);
        Ok(())
    }

    fn relieve_rescue(&self) -> Result<()> {
        if self.is_threaded() {
            self.request_checkpoint();
            self.wait_for_relief();
            return Ok(());
        }
        match self.checkpoint_as(false) {
            Err(error) if error.kind() != Kind::NoSpace => Err(error),
            _ => Ok(()),
        }
    }

    /// To be asked before `blocks` are staged, with no lock held. True if they may be although
    /// there is no room for their rescue, because the host took as much a moment ago.
    pub(crate) fn ask_for_rescue(&self, blocks: u64) -> Result<bool> {
        if !self.lacks_rescue(blocks) {
            return Ok(false);
        }
        self.relieve_rescue()?;
        Ok(self.lacks_rescue(blocks)
            && self.stage.lock().blocks() == 0
            && self.host_takes(blocks * RESERVE_PER_BLOCK)?)
    }

    /// Fails if `blocks` more staged blocks could not be rescued. `alone`: an empty stage takes
    /// them all the same.
    pub(crate) fn check_rescue(&self, blocks: u64, alone: bool) -> Result<()> {
        if !self.lacks_rescue(blocks) || alone && self.stage.lock().blocks() == 0 {
            return Ok(());
        }
        Err(host_full())
    }

    /// Asks a full host again, now and then. Called with no lock held.
    pub(crate) fn ask_full_host(&self) -> Result<()> {
        if !self.is_host_full() {
            return Ok(());
        }
        {
            let mut times = self.host.times.lock();
            if self.is_threaded() && !Times::is_over(times.probed, PROBE_EVERY) {
                return Ok(());
            }
            times.probed = Some(Instant::now());
        }
        self.probe_host()
    }

    /// Fails while the host has no space, or there is no room for a rescue.
    pub(crate) fn check_host(&self) -> Result<()> {
        if self.is_host_full() || self.host.crowded.load(Ordering::Relaxed) {
            return Err(host_full());
        }
        Ok(())
    }

    /// What waits for a place gets it, or some free blocks are written.
    ///
    /// # Errors
    /// Those of the device but `NoSpace`.
    fn probe_host(&self) -> Result<()> {
        if self.stage.lock().blocks() == 0 {
            return self.host_takes(PIECE).map(drop);
        }
        match self.destage_all() {
            Err(error) if error.kind() != Kind::NoSpace => Err(error),
            _ => Ok(()),
        }
    }

    /// Writes `count` free blocks: true if the host took them.
    ///
    /// # Errors
    /// Those of the device but `NoSpace`.
    fn host_takes(&self, count: u64) -> Result<bool> {
        match self.write_free_blocks(count) {
            Err(error) if error.kind() == Kind::NoSpace => Ok(false),
            written => written.map(|()| true),
        }
    }

    fn write_free_blocks(&self, count: u64) -> Result<()> {
        // A checkpoint of this instant would count these blocks as used, and nothing uses them.
        let _gate = self.gate.read();
        self.counters.reserve_exactly(count)?;
        let runs = self.alloc_runs(Class::Data, count as u32);
        self.counters.unreserve_exactly(count);
        let runs = runs?;
        let written = runs.iter().try_for_each(|run| {
            (run.block..run.end()).for_each(|block| self.cache.remove(block)); // I1 of the cache
            self.device_write(run.block, &vec![0; run.len as usize * BLOCK_SIZE])
        });
        self.free_unused(runs);
        written.map(|()| self.host_accepted())
    }
}
