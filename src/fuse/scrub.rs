//! The scrub of a mounted pool: one thread in the background, which the control channel starts,
//! stops and asks.
//!
//! Invariants:
//! 1. There is one scrub at a time.
//! 2. The thread has ended before the mount returns, so that nobody uses a pool that is closed.

use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;

use super::spawn;
use crate::control::{ScrubFindings, ScrubPage};
use crate::engine::{Pool, Scrub, ScrubOptions, ScrubState, ScrubStatus};
use crate::error::{Error, Kind, Result};

/// Bytes per second of a scrub that was not told how fast: well below what a disk can do.
const GENTLE_RATE: u64 = 128 * 1024 * 1024; // 128 MiB/s

/// Runs scrubs of one pool.
#[derive(Debug)]
pub(super) struct Scrubber {
    pool: Arc<Pool>,
    job: Mutex<Option<Job>>,
}

#[derive(Debug)]
struct Job {
    scrub: Arc<Scrub>,
    thread: JoinHandle<()>,
}

impl Scrubber {
    pub(super) fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            job: Mutex::new(None),
        }
    }

    /// Begins, unless a scrub is running; tells how it stands. Without a rate it is gentle: slow,
    /// and slower while others use the pool.
    pub(super) fn start(&self, rate: Option<u64>, restart: bool) -> Result<ScrubStatus> {
        let mut job = self.job.lock();
        if let Some(running) = job.as_ref().filter(|job| !job.thread.is_finished()) {
            if restart {
                return Err(Error::new(
                    Kind::Busy,
                    "a scrub is running: stop it before another one begins anew",
                ));
            }
            return Ok(running.scrub.status());
        }
        let scrub = Arc::new(Scrub::new(ScrubOptions {
            rate: Some(rate.unwrap_or(GENTLE_RATE)),
            yields: rate.is_none(),
            restart,
            from: None,
        }));
        let (pool, handle) = (self.pool.clone(), scrub.clone());
        let thread = spawn("nodupe-scrub", move || run(&pool, &handle))
            .map_err(|error| Error::io("cannot start a thread for the scrub", error))?;
        *job = Some(Job { scrub, thread });
        Ok(ScrubStatus {
            state: ScrubState::Running,
            ..ScrubStatus::default()
        })
    }

    /// Asks the scrub to stop, and tells how it stands.
    pub(super) fn stop(&self) -> Result<ScrubStatus> {
        if let Some(job) = &*self.job.lock() {
            job.scrub.stop();
        }
        self.status()
    }

    /// How the scrub stands, or how the last one ended.
    pub(super) fn status(&self) -> Result<ScrubStatus> {
        let job = self.job.lock();
        let Some(job) = &*job else {
            return self.pool.last_scrub();
        };
        let mut status = job.scrub.status();
        // It has not begun, or is about to write down that it has ended.
        if status.state == ScrubState::Never || !job.thread.is_finished() {
            status.state = ScrubState::Running;
        }
        Ok(status)
    }

    /// What it found.
    pub(super) fn findings(&self, page: ScrubPage) -> ScrubFindings {
        match &*self.job.lock() {
            Some(job) => ScrubFindings::page(&job.scrub, page),
            None => ScrubFindings::default(),
        }
    }

    /// Stops and waits.
    pub(super) fn finish(&self) {
        let Some(job) = self.job.lock().take() else {
            return;
        };
        job.scrub.stop();
        if job.thread.join().is_err() {
            log::error!("the scrub panicked");
        }
    }
}

fn run(pool: &Pool, scrub: &Scrub) {
    let failed = pool.scrub(scrub).err();
    let status = scrub.status();
    let found = format!(
        "{} damaged blocks in {} files, {} other findings",
        status.damaged_blocks, status.files, status.others
    );
    match (failed, status.state) {
        (Some(error), _) => log::error!("the scrub could not go on: {error}; {found} so far"),
        (None, ScrubState::Finished) if status.is_clean() => {
            log::info!("the scrub has verified {} bytes: no damage", status.done);
        }
        (None, ScrubState::Finished) => log::error!("the scrub has ended: {found}"),
        (None, _) => log::info!("the scrub was stopped: {found} so far"),
    }
}
