//! Group commit: whoever needs durability becomes the leader, writes one batch for everybody
//! who waits, flushes once, and answers them all.
//!
//! Invariants:
//!
//! 1. There is one leader at a time; only the leader takes batches and appends to the journal.
//! 2. `durable` counts pushes to the stage, and never moves back. A waiter is answered `Ok` only
//!    when everything pushed before it asked is durable.
//! 3. After a failed write or sync nothing is ever answered `Ok` again: the pool is poisoned. Only
//!    if the host had no space for a batch it stays queued, and a later round may write it.
//! 4. The cut of a checkpoint goes before everybody who waits: a leader steps down for it, and
//!    nobody else leads. Whoever it left waiting is led for by the commit thread.
//! 5. What was written ahead is durable only with the next round of a leader, which makes it so
//!    before anything else.
//! 6. Nobody waits for a leader in name: while the batch of a cut is held because the host refused
//!    its checkpoint, syncs are refused at once.

use crate::error::{Error, Kind, Result};
use crate::sync::atomic::Ordering;
use crate::sync::mpsc;

use super::journal::{Cut, Journal};
use super::pool::Pool;
use super::stage::{Batch, Stage};
use super::waiters::Done;

/// Rounds in a row after which one writer that syncs each write is expected to go on like that. One
/// for the model checker, whose worlds are short.
const ALONE: u32 = if cfg!(feature = "shuttle") { 1 } else { 3 };
/// More than this in a batch was not one write of a guest: 64 KiB.
const SMALL_ITEMS: usize = 16;

/// What a round of the leader came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    /// Everything up to this push is durable.
    Durable(u64),
    /// The journal has no room: a checkpoint must come first.
    Full,
}

/// Which bounds of the journal a round keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bounds {
    /// All: beyond them a checkpoint comes first.
    All,
    /// That of its bytes: there is no checkpoint to wait for.
    Bytes,
    /// None but its size: the round is the cut of a checkpoint.
    Cut,
}

impl Pool {
    /// Makes everything acknowledged so far durable: group commit of the journal.
    ///
    /// # Errors
    /// `Poisoned` or `Io` if the device failed; what was not durable may be lost.
    pub fn sync(&self) -> Result<()> {
        let (sender, receiver) = mpsc::channel();
        self.sync_with(Box::new(move |outcome| {
            if sender.send(outcome).is_err() {
                log::debug!("nobody waits for a sync any more");
            }
        }));
        receiver
            .recv()
            .unwrap_or_else(|_| Err(Error::new(Kind::Poisoned, "the pool was closed")))
    }

    /// As [`sync`](Self::sync), but calls `done` when it is: at once, or later on another thread.
    pub fn sync_with(&self, done: Done) {
        if let Err(error) = self.check_writable_or_read_only() {
            return done(Err(error));
        }
        let pushed = self.stage.lock().pushed;
        if !self.is_threaded() && self.commit.state.lock().held {
            self.request_checkpoint(); // nobody else would try it again
        }
        let mut state = self.commit.state.lock();
        if state.durable >= pushed {
            drop(state);
            return done(Ok(()));
        }
        if state.held {
            drop(state);
            if self.is_threaded() {
                self.request_checkpoint();
            }
            return done(Err(refused_checkpoint())); // I6
        }
        state.waiters.push((pushed, done));
        if state.leader || state.cutting {
            return; // whoever leads next answers
        }
        state.leader = true;
        drop(state);
        self.lead();
    }

    /// Works as the leader until nobody waits any more, or a checkpoint wants to lead.
    fn lead(&self) {
        loop {
            match self.commit_round(Bounds::All) {
                Ok(Round::Durable(upto)) => {
                    let (ready, more) = self.answer(upto, true);
                    ready.into_iter().for_each(|done| done(Ok(())));
                    if !more {
                        return;
                    }
                }
                Ok(Round::Full) => {
                    self.step_down();
                    // The checkpoint answers those who wait.
                    self.request_checkpoint();
                    return;
                }
                Err(error) => {
                    self.fail_waiters(&error);
                    return;
                }
            }
        }
    }

    /// Takes a batch and appends it. The caller leads.
    fn commit_round(&self, bounds: Bounds) -> Result<Round> {
        self.check_poison()?;
        let mut journal = self.journal.lock();
        let mut stage = self.stage.lock();
        if !stage.is_clean() && !self.has_room(&journal, &stage, bounds) {
            return Ok(Round::Full);
        }
        let batch = stage.take();
        if bounds == Bounds::Cut {
            // The cut: everything up to here is in this checkpoint, nothing behind it.
            stage.freeze(None);
            stage.cut_attrs();
            stage.closed = self.is_closed();
        }
        drop(stage);
        if !batch.is_empty() {
            let flushed = if batch.needs_flush {
                self.device_sync()
            } else {
                Ok(())
            };
            flushed.inspect_err(|error| self.poison(error))?;
        }
        let is_foreseen = !journal.is_unsynced() || batch.is_empty();
        let (upto, is_small) = (batch.upto, batch.items.len() <= SMALL_ITEMS);
        self.append(&mut journal, batch)?;
        journal.sync().inspect_err(|error| self.poison(error))?;
        let is_half_full = journal.is_over(2);
        drop(journal);
        if is_half_full {
            self.wake_worker();
        }
        let mut state = self.commit.state.lock();
        if !is_small || !is_foreseen {
            state.alone = 0;
        }
        Ok(Round::Durable(upto))
    }

    /// True if what is queued may go to the journal.
    fn has_room(&self, journal: &Journal, stage: &Stage, bounds: Bounds) -> bool {
        // I5 of the journal. A checkpoint comes first: its cut keeps what is queued.
        let fits = journal.fits(stage.pending_bytes(), bounds == Bounds::Cut);
        let may_write = !self.is_clean() && fits;
        // Where the host lets no checkpoint through, deleting may go on as long as there is room.
        let is_refused = || self.is_host_full() || self.is_host_pressed();
        let in_time = || bounds != Bounds::All || journal.has_time(stage.work) || is_refused();
        may_write && in_time()
    }

    /// Appends a batch, if there is anything in it.
    fn append(&self, journal: &mut Journal, batch: Batch) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        match journal.append(&batch) {
            Err(error) if error.kind() == Kind::NoSpace => {
                // Nothing is lost: the next round writes it again, to the same place.
                self.stage.lock().untake(batch);
                if !journal.is_unsynced() {
                    self.commit.state.lock().written = None; // the journal synced it first
                }
                Err(self.host_refused(error))
            }
            written => written.inspect_err(|error| self.poison(error)),
        }
    }

    /// To be called when a write was answered: if the last syncs were all of one write by one
    /// writer, its next sync finds what it is about in the ring, and has only that to wait for.
    /// Nothing is durable by this.
    pub fn anticipate_sync(&self) {
        if !self.commit.expects_sync.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.commit.state.lock();
        if state.leader || state.cutting || !state.waiters.is_empty() {
            return;
        }
        state.leader = true;
        drop(state);
        if let Err(error) = self.write_ahead() {
            return self.fail_waiters(&error);
        }
        let mut state = self.commit.state.lock();
        if state.waiters.is_empty() || state.cutting {
            state.leader = false; // I4
            self.commit.free.notify_all();
            return;
        }
        drop(state);
        self.lead();
    }

    /// Writes what is queued to the ring, without a sync. The caller leads.
    fn write_ahead(&self) -> Result<()> {
        self.check_poison()?;
        let mut journal = self.journal.lock();
        let mut stage = self.stage.lock();
        let room = self.has_room(&journal, &stage, Bounds::All);
        // With a batch that is not durable in the ring it would wait for a sync: it was no use.
        if stage.is_clean() || stage.needs_flush() || journal.is_unsynced() || !room {
            return Ok(());
        }
        let oldest = stage.oldest();
        let batch = stage.take();
        drop(stage);
        self.append(&mut journal, batch)?;
        drop(journal);
        self.commit.state.lock().written = oldest; // I5
        Ok(())
    }

    /// True if a crash would lose something.
    pub(crate) fn is_unsynced(&self) -> bool {
        !self.stage.lock().is_clean() || self.commit.state.lock().written.is_some()
    }

    /// Milliseconds since the oldest change that a crash would lose.
    pub(crate) fn unsynced_ms(&self) -> u64 {
        let staged = self.stage.lock().unsynced_ms();
        let written = self.commit.state.lock().written;
        written.map_or(staged, |oldest| oldest.elapsed().as_millis() as u64)
    }

    /// Moves `durable` and takes out the waiters it satisfies. With `resign` steps down if none
    /// is left or a checkpoint waits (I4), else says that there is more to do.
    fn answer(&self, upto: u64, resign: bool) -> (Vec<Done>, bool) {
        let mut state = self.commit.state.lock();
        assert!(state.leader && upto >= state.durable);
        state.durable = upto;
        state.written = None; // I5: it was written before
        let (ready, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut state.waiters)
            .into_iter()
            .partition(|(need, _)| *need <= upto);
        state.waiters = waiting;
        state.alone = match ready.len() {
            1 => (state.alone + 1).min(ALONE),
            _ => 0,
        };
        let expects = state.alone == ALONE;
        self.commit.expects_sync.store(expects, Ordering::Relaxed);
        let yields = resign && state.cutting; // I4
        let more = !state.waiters.is_empty() && !yields;
        if resign && !more {
            state.leader = false;
            self.commit.free.notify_all();
        }
        (ready.into_iter().map(|(_, done)| done).collect(), more)
    }

    fn step_down(&self) {
        self.commit.state.lock().leader = false;
        self.commit.free.notify_all();
    }

    /// Answers everybody with an error and steps down. The pool is poisoned, or the host has no
    /// space. Only who leads calls it.
    fn fail_waiters(&self, error: &Error) {
        let mut state = self.commit.state.lock();
        state.leader = false;
        let waiters = std::mem::take(&mut state.waiters);
        drop(state);
        self.commit.free.notify_all();
        refuse(waiters, error);
    }

    /// The checkpoint of a delayed cut is tried again: its thread leads meanwhile.
    pub(crate) fn resume_cut(&self) {
        self.commit.state.lock().held = false;
    }

    /// The cut of a checkpoint: commits everything pending, freezes the stage in the same
    /// instant, and returns the sequence number and position of the first batch behind it.
    /// The caller holds the gate, so that no metadata changes meanwhile, and calls
    /// [`end_cut`](Self::end_cut) when the checkpoint is durable, or will not be.
    pub(crate) fn commit_cut(&self) -> Result<Cut> {
        let mut state = self.commit.state.lock();
        state.cutting = true;
        while state.leader {
            self.commit.free.wait(&mut state);
        }
        state.leader = true;
        state.cutting = false;
        drop(state);
        match self.commit_round(Bounds::Cut) {
            Ok(Round::Durable(upto)) => {
                // Position before anybody else can lead: what follows belongs to the next one.
                let (seq, pos) = self.journal.lock().position();
                let (ready, more) = self.answer(upto, false);
                self.step_down();
                ready.into_iter().for_each(|done| done(Ok(())));
                if more {
                    self.wake_committer(); // I4
                }
                let held = None;
                Ok(Cut { seq, pos, held })
            }
            Ok(Round::Full) => {
                // What waits is bounded so that this happens only behind cuts whose checkpoint was
                // given up (`host.rs`). This thread leads until `end_cut`.
                let (seq, pos) = self.journal.lock().position();
                let mut stage = self.stage.lock();
                let held = Some(stage.take());
                stage.freeze(None);
                stage.cut_attrs();
                stage.closed = self.is_closed();
                Ok(Cut { seq, pos, held })
            }
            Err(error) => {
                self.fail_waiters(&error);
                Err(error)
            }
        }
    }

    /// The checkpoint of a cut is durable or, with an error, was given up.
    pub(crate) fn end_cut(&self, cut: Cut, error: Option<&Error>) {
        let Some(batch) = cut.held else {
            return;
        };
        match error {
            None => {
                let (ready, more) = self.answer(batch.upto, false);
                self.step_down();
                ready.into_iter().for_each(|done| done(Ok(())));
                if more {
                    self.wake_committer(); // I4
                }
            }
            Some(error) => {
                self.stage.lock().untake(batch);
                self.fail_waiters(error);
            }
        }
    }

    /// The checkpoint of a cut waits until the host has space.
    pub(crate) fn delay_cut(&self, cut: &Cut, error: &Error) {
        if cut.held.is_some() {
            // This thread still leads, in name: nobody may commit, nobody should wait for that.
            let mut state = self.commit.state.lock();
            state.held = true; // I6
            let waiters = std::mem::take(&mut state.waiters);
            drop(state);
            refuse(waiters, error);
        }
    }

    /// Makes durable what waits when there was no space for the last checkpoint of a pool.
    pub(crate) fn commit_rest(&self) -> Result<()> {
        let mut state = self.commit.state.lock();
        while state.leader && !state.held {
            self.commit.free.wait(&mut state);
        }
        if state.held {
            return Err(refused_checkpoint());
        }
        state.leader = true;
        drop(state);
        match self.commit_round(Bounds::Bytes) {
            Ok(Round::Durable(upto)) => {
                let (ready, _) = self.answer(upto, true);
                ready.into_iter().for_each(|done| done(Ok(())));
                Ok(())
            }
            Ok(Round::Full) => {
                self.step_down();
                Err(Error::new(Kind::NoSpace, "the journal is full"))
            }
            Err(error) => {
                self.fail_waiters(&error);
                Err(error)
            }
        }
    }

    /// Leads for those who wait because the journal was full, or whom the cut of a checkpoint
    /// left waiting.
    pub(crate) fn commit_waiting(&self) {
        let mut state = self.commit.state.lock();
        if state.leader || state.cutting || state.waiters.is_empty() {
            return;
        }
        state.leader = true;
        drop(state);
        self.lead();
    }

    /// Answers those who wait for a checkpoint that failed. If only the host had no space for it,
    /// they may have waited for the time that a replay takes, and the ring has room for them.
    pub(crate) fn checkpoint_failed(&self, error: &Error) {
        if error.kind() != Kind::NoSpace {
            return self.commit_failed(error);
        }
        let mut state = self.commit.state.lock();
        if state.leader || state.cutting || state.waiters.is_empty() {
            return; // as for `commit_waiting`
        }
        state.leader = true;
        drop(state);
        loop {
            match self.commit_round(Bounds::Bytes) {
                Ok(Round::Durable(upto)) => {
                    let (ready, more) = self.answer(upto, true);
                    ready.into_iter().for_each(|done| done(Ok(())));
                    if !more {
                        return;
                    }
                }
                Ok(Round::Full) => return self.fail_waiters(error),
                Err(error) => return self.fail_waiters(&error),
            }
        }
    }

    /// Answers those who wait when the pool was poisoned, or a checkpoint failed, elsewhere.
    pub(crate) fn commit_failed(&self, error: &Error) {
        let mut state = self.commit.state.lock();
        if state.leader {
            return; // the leader notices
        }
        // Under the same hold, and nobody steps down: whoever leads from now on is another thread.
        let waiters = std::mem::take(&mut state.waiters);
        drop(state);
        refuse(waiters, error);
    }
}

/// What they are told who would wait for a leader in name.
fn refused_checkpoint() -> Error {
    Error::new(
        Kind::NoSpace,
        "the journal is full and the host has no space for a checkpoint: free some on the \
         filesystem that holds the pool",
    )
}

/// Tells each of `waiters` that it was refused. Called with no lock held.
fn refuse(waiters: Vec<(u64, Done)>, error: &Error) {
    waiters
        .into_iter()
        .for_each(|(_, done)| done(Err(error.duplicate())));
}

#[cfg(test)]
mod tests;
