//! Who does the background work and when: destage, checkpoints, reclaiming; and what writers do
//! when a limit is reached.
//!
//! Without threads (`start` was not called) the caller's thread does the work itself, which
//! makes the engine deterministic: the simulation relies on it.
//!
//! Limits and what happens at them:
//!
//! | limit | at half | at the limit |
//! |---|---|---|
//! | queue for the journal | at a quarter the commit thread commits it | the writer commits it |
//! | staged blocks | destage begins | writers wait for it |
//! | journal, and the time that its replay takes (`work.rs`) | a checkpoint begins | commits wait for it |
//! | dirty nodes, changed reference counts | - | a checkpoint begins; at twice the limit writers wait |
//! | free blocks | - | below the floor: `NoSpace`, but deleting goes on |

use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::sync::atomic::Ordering;
use crate::sync::{Instant, thread};

use super::counters::full;
use super::pool::{Pool, Wake};
use super::work::PENDING_MAX;

/// How long an acknowledged write may stay out of the journal when nobody asks for durability:
/// `sync(2)` does not reach a FUSE daemon.
const COMMIT_INTERVAL: Duration = Duration::from_secs(1);
/// How long changed trees may stay in memory when nothing else forces a checkpoint.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(30);
/// How long a waiting writer sleeps before it looks again by itself.
const PATIENCE: Duration = Duration::from_millis(100);
/// Share of the queue for the journal at which it is committed in the background: a quarter. Large
/// enough for the device to be at its full speed, and blocks that are written again take their
/// earlier place in the queue for as long as the timer lets them.
const EARLY: usize = 4;
/// Blocks that must be available before anything is created.
const ROOM: u64 = 16;

/// What a background thread does until it is told to stop.
type Work = fn(&Pool);

/// Without its background threads a pool would hang; with a poisoned one everybody is told.
struct PoisonOnPanic<'a>(&'a Pool);

impl Drop for PoisonOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let error = Error::new(Kind::Poisoned, "a background thread of the pool panicked");
            self.0.poison(&error);
            self.0.commit_failed(&error);
        }
    }
}

impl Pool {
    /// Starts the background threads: commits unflushed writes each second, destages,
    /// checkpoints, reclaims.
    ///
    /// # Errors
    /// `Io` if no thread can be made.
    pub fn start(self: &Arc<Self>) -> Result<()> {
        if self.read_only || self.threaded.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        if self.was_left_open {
            // What waited for a discard when the daemon died is not known.
            self.meta.write().space.discard_all();
        }
        let mut workers = self.workers.lock();
        let works = [
            ("nodupe-commit", Pool::commit_loop as Work),
            ("nodupe-worker", Pool::work_loop),
        ];
        for (name, work) in works {
            let pool = Arc::clone(self);
            let thread = thread::Builder::new()
                .name(name.into())
                .spawn(move || work(&pool));
            workers.push(thread.map_err(|source| Error::io("cannot start a thread", source))?);
        }
        Ok(())
    }

    /// Ends the background threads: first the commit thread, which may wait for a checkpoint that
    /// only the worker writes. Whoever else waits is answered by the checkpoint of the close.
    pub(crate) fn stop_workers(&self) {
        let workers = std::mem::take(&mut *self.workers.lock());
        let stops: [fn(&mut Wake); 2] =
            [|wake| wake.stop_commit = true, |wake| wake.stop_work = true];
        for (worker, stop) in workers.into_iter().zip(stops) {
            stop(&mut self.wake.lock());
            self.wake_signal.notify_all();
            if worker.join().is_err() {
                log::error!("a background thread of the pool panicked");
            }
        }
        self.threaded.store(false, Ordering::SeqCst);
    }

    fn commit_loop(&self) {
        let _panics = PoisonOnPanic(self);
        let mut until = Instant::now() + COMMIT_INTERVAL;
        loop {
            let mut wake = self.wake.lock();
            while !(wake.stop_commit || wake.commit || wake.commit_early) && Instant::now() < until
            {
                self.wake_signal.wait_until(&mut wake, until);
            }
            if wake.stop_commit {
                return;
            }
            if std::mem::take(&mut wake.commit) {
                drop(wake);
                self.commit_waiting();
                continue;
            }
            wake.commit_early = false;
            drop(wake);
            until = Instant::now() + COMMIT_INTERVAL;
            if self.is_unsynced()
                && let Err(error) = self.sync()
            {
                log::debug!("cannot commit: {error}"); // said once, when the pool was poisoned
            }
        }
    }

    fn work_loop(&self) {
        let _panics = PoisonOnPanic(self);
        let mut last = Instant::now();
        loop {
            let mut wake = self.wake.lock();
            if !wake.asked && !wake.stop_work {
                self.wake_signal.wait_for(&mut wake, COMMIT_INTERVAL);
            }
            if wake.stop_work {
                return;
            }
            let asked = std::mem::take(&mut wake.checkpoint);
            wake.asked = false;
            drop(wake);
            if let Err(error) = self.work(asked, &mut last) {
                log::debug!("background work failed: {error}");
                if asked || self.poisoned().is_some() {
                    // Nobody writes the checkpoint that they wait for.
                    self.checkpoint_failed(&error);
                }
                self.relief.notify_all();
                thread::sleep(PATIENCE);
            }
        }
    }

    fn work(&self, asked: bool, last: &mut Instant) -> Result<()> {
        self.check_poison()?;
        let journal_half = self.journal.lock().is_over(2);
        let many_dirty = self.excess() > 0;
        let staged = self.stage.lock().blocks();
        let stale = last.elapsed() > CHECKPOINT_INTERVAL;
        let changed = staged > 0 || self.counters.dirty() > 0;
        let mut waits = self.unfinished.lock().is_some();
        self.ask_full_host()?;
        if self.is_host_pressed() {
            // What was deleted can go back to the host.
            waits |= self.counters.dirty() > 0;
        }
        if asked || journal_half || many_dirty || waits || (stale && changed) {
            self.checkpoint_as(false)?;
            *last = Instant::now();
        } else if staged > self.limits.staged_blocks / 2 {
            self.destage_all()?;
        }
        // A slice at a time, so that more urgent work is not kept waiting.
        if self.reap()? | self.discard_some()? {
            self.wake_worker();
        }
        Ok(())
    }

    /// Tells the commit thread that somebody waits and nobody leads. Without threads whoever
    /// writes the checkpoint leads at its end.
    pub(crate) fn wake_committer(&self) {
        self.wake.lock().commit = true;
        self.wake_signal.notify_all();
    }

    /// Tells the commit thread that much waits for the journal, so that no writer has to write it.
    fn commit_early(&self) {
        let mut wake = self.wake.lock();
        if !std::mem::replace(&mut wake.commit_early, true) {
            drop(wake);
            self.wake_signal.notify_all();
        }
    }

    /// Tells the worker to look around.
    pub(crate) fn wake_worker(&self) {
        let mut wake = self.wake.lock();
        if !std::mem::replace(&mut wake.asked, true) {
            drop(wake);
            self.wake_signal.notify_all();
        }
    }

    /// Asks for a checkpoint: of the worker, or does it.
    pub(crate) fn request_checkpoint(&self) {
        if self.is_threaded() {
            let mut wake = self.wake.lock();
            wake.asked = true;
            wake.checkpoint = true;
            drop(wake);
            self.wake_signal.notify_all();
            return;
        }
        if let Err(error) = self.checkpoint_as(false) {
            log::debug!("cannot write a checkpoint: {error}"); // those who wait were told
        }
    }

    /// Waits a little for the worker.
    pub(crate) fn wait_for_relief(&self) {
        let mut wake = self.wake.lock();
        wake.asked = true;
        self.wake_signal.notify_all();
        self.relief.wait_for(&mut wake, PATIENCE);
    }

    /// How many times what the current generation has gathered exceeds its limit.
    pub(crate) fn excess(&self) -> usize {
        let nodes = self.counters.dirty() / self.limits.dirty_nodes;
        nodes.max(self.counters.delta() / self.limits.delta_runs)
    }

    /// Called before every change, with no lock held.
    pub(crate) fn begin_change(&self) -> Result<()> {
        self.check_writable()?;
        self.throttle()
    }

    /// Keeps the limits. Called with no lock held.
    pub(crate) fn throttle(&self) -> Result<()> {
        self.ask_full_host()?;
        self.keep_rescue()?;
        loop {
            self.check_poison()?;
            let (pending, work, staged) = {
                let stage = self.stage.lock();
                (stage.pending_bytes(), stage.work, stage.blocks())
            };
            if pending >= self.limits.pending_bytes || work >= PENDING_MAX {
                self.sync()?;
                continue;
            }
            let excess = self.excess();
            let dirty = self.counters.dirty() > 0;
            let low = self.counters.free() < self.counters.floor() / 2 && dirty;
            let tight = self.counters.is_tight();
            if !self.is_threaded() {
                let journal_half = self.journal.lock().is_over(2);
                let done = if journal_half || excess > 0 || low || tight {
                    self.checkpoint_as(false)
                } else if staged >= self.limits.staged_blocks {
                    self.destage_all()
                } else {
                    Ok(())
                };
                return match done {
                    // Deleting goes on as long as the journal has room.
                    Err(error) if error.kind() == Kind::NoSpace && self.is_host_full() => Ok(()),
                    done => done,
                };
            }
            if self.is_host_full() {
                // No checkpoint and no destage would help: whoever writes is refused, deleting goes
                // on as long as the journal has room.
                return Ok(());
            }
            if pending >= self.limits.pending_bytes / EARLY || work >= PENDING_MAX / EARLY as u64 {
                self.commit_early();
            }
            if low || tight || excess > 1 {
                self.request_checkpoint();
                self.wait_for_relief();
                if low && self.counters.dirty() > 0 && self.counters.free() >= 32 {
                    return Ok(()); // below the floor, but deleting must go on
                }
                continue;
            }
            if staged >= self.limits.staged_blocks {
                self.wait_for_relief();
                continue;
            }
            if staged >= self.limits.staged_blocks / 2 || excess > 0 {
                self.wake_worker();
            }
            return Ok(());
        }
    }

    /// Fails if nothing more should be created.
    pub(crate) fn check_room(&self) -> Result<()> {
        self.check_host()?;
        if self.counters.available() < ROOM {
            return Err(full());
        }
        Ok(())
    }

    /// Fails if `blocks` more staged blocks could not get their place.
    pub(crate) fn check_room_for(&self, blocks: u64) -> Result<()> {
        self.counters.reserve(blocks)?;
        self.counters.unreserve(blocks);
        Ok(())
    }

    /// Tries to make space after a `NoSpace`: frees what waits to be freed. True if there is
    /// more than before. Called with no lock held.
    pub(crate) fn make_space(&self) -> Result<bool> {
        let before = self.counters.available();
        while self.reap()? {}
        self.checkpoint_as(false)?;
        Ok(self.counters.available() > before)
    }
}
