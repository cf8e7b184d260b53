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
//! | small writes, creating | refused while the last try of anybody failed |
//! | a checkpoint before its cut | given up |
//! | a checkpoint behind it | its nodes wait in memory; the next one writes them first |
//! | a commit (where overwriting takes space) | the batch is queued again, the caller gets `NoSpace` |

use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::sync::Instant;
use crate::sync::atomic::Ordering;
use crate::units::BLOCK_SIZE;

use super::pool::Pool;
use super::refusals::Times;
use super::space::{Class, PIECE};

/// How often it is said at most that the host is full.
const SAID_EVERY: Duration = Duration::from_secs(60);
/// How often writers ask a full host again.
const PROBE_EVERY: Duration = Duration::from_millis(250);
/// How long behind a refusal space is given back to the host as soon as there is any.
const PRESSED_FOR: Duration = Duration::from_secs(60);

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

    /// After the host refused something: fails if `blocks` more staged blocks would not fit where
    /// it keeps space for the pool, so that they could not be destaged if it refuses again, and no
    /// checkpoint could be written. An empty stage takes any one step.
    pub(crate) fn check_rescue(&self, blocks: u64) -> Result<()> {
        if !self.host.refused.load(Ordering::Relaxed) || !self.is_host_pressed() {
            return Ok(());
        }
        let room = self.meta.read().space.rescue_room();
        let staged = self.stage.lock().blocks() as u64;
        if staged > 0 && staged + blocks > room {
            return Err(host_full());
        }
        Ok(())
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

    /// Fails while the host has no space.
    pub(crate) fn check_host(&self) -> Result<()> {
        if self.is_host_full() {
            return Err(host_full());
        }
        Ok(())
    }

    /// What waits for a place gets it, or some free blocks are written.
    ///
    /// # Errors
    /// Those of the device but `NoSpace`.
    fn probe_host(&self) -> Result<()> {
        let tried = if self.stage.lock().blocks() > 0 {
            self.destage_all()
        } else {
            self.write_free_blocks()
        };
        match tried {
            Err(error) if error.kind() != Kind::NoSpace => Err(error),
            _ => Ok(()),
        }
    }

    fn write_free_blocks(&self) -> Result<()> {
        // A checkpoint of this instant would count these blocks as used, and nothing uses them.
        let _gate = self.gate.read();
        self.counters.reserve_exactly(PIECE)?;
        let runs = self.alloc_runs(Class::Data, PIECE as u32);
        self.counters.unreserve_exactly(PIECE);
        let runs = runs?;
        let written = runs.iter().try_for_each(|run| {
            (run.block..run.end()).for_each(|block| self.cache.remove(block)); // I1 of the cache
            self.device_write(run.block, &vec![0; run.len as usize * BLOCK_SIZE])
        });
        self.free_unused(runs);
        written.map(|()| self.host_accepted())
    }
}
