//! Who leads the group commit, and who waits for it. Data only; `commit.rs` works on it.

use crate::error::Result;
use crate::sync::{Condvar, Mutex};

/// Called once with the outcome of a sync.
pub(crate) type Done = Box<dyn FnOnce(Result<()>) + Send>;

/// Who leads and who waits. Rank 8 in the lock order.
#[derive(Default)]
pub(crate) struct Commit {
    pub(crate) state: Mutex<State>,
    /// Signalled when a leader steps down.
    pub(crate) free: Condvar,
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
    /// refused (I5 of `commit.rs`).
    pub(crate) held: bool,
    /// A checkpoint waits to lead (I4 of `commit.rs`).
    pub(crate) cutting: bool,
    /// Pushes to the stage that are durable.
    pub(crate) durable: u64,
    /// What each needs to be durable, and how it is told.
    pub(crate) waiters: Vec<(u64, Done)>,
}
