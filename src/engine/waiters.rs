//! Who leads the group commit, and who waits for it. Data only; `commit.rs` works on it.

use crate::error::Result;
use crate::sync::atomic::AtomicBool;
use crate::sync::{Condvar, Instant, Mutex};

/// Called once with the outcome of a sync.
pub(crate) type Done = Box<dyn FnOnce(Result<()>) + Send>;

/// Who leads and who waits. Rank 8 in the lock order.
#[derive(Default)]
pub(crate) struct Commit {
    pub(crate) state: Mutex<State>,
    /// Signalled when a leader steps down.
    pub(crate) free: Condvar,
    /// The next write is likely to be followed by a sync of it alone. A hint, set under the lock.
    pub(crate) expects_sync: AtomicBool,
}

impl std::fmt::Debug for Commit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Commit")
    }
}

/// Guarded by the lock of [`Commit`].
#[derive(Default)]
pub(crate) struct State {
    pub(crate) leader: bool,
    /// The leader is one in name only: the batch of a cut waits for a checkpoint that the host
    /// refused (I6 of `commit.rs`).
    pub(crate) held: bool,
    /// A checkpoint waits to lead (I4 of `commit.rs`).
    pub(crate) cutting: bool,
    /// Pushes to the stage that are durable.
    pub(crate) durable: u64,
    /// What each needs to be durable, and how it is told.
    pub(crate) waiters: Vec<(u64, Done)>,
    /// Rounds in a row that made a little durable for one who waited, up to what counts.
    pub(crate) alone: u32,
    /// Since when the oldest of what is in the ring waits for a sync of the ring.
    pub(crate) written: Option<Instant>,
}
