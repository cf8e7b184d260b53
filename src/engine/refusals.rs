//! What is known of a host that refused a write. Data only; `host.rs` works on it.

use std::time::Duration;

use crate::sync::atomic::AtomicBool;
use crate::sync::{Instant, Mutex};

/// What is known of the space on the host.
#[derive(Debug, Default)]
pub(crate) struct HostState {
    /// The last data written to a new place was refused.
    pub(crate) full: AtomicBool,
    /// Something was refused since the pool was opened.
    pub(crate) refused: AtomicBool,
    /// The home of the nodes has no room for what could have to be rescued (`host.rs`).
    pub(crate) crowded: AtomicBool,
    /// When it last refused a write, was last asked again, and when that was last said. Rank 8.
    pub(crate) times: Mutex<Times>,
}

/// Moments of the past.
#[derive(Debug, Default)]
pub(crate) struct Times {
    pub(crate) refused: Option<Instant>,
    pub(crate) probed: Option<Instant>,
    pub(crate) said: Option<Instant>,
    /// It was said, and not yet that it is over.
    pub(crate) is_open: bool,
}

impl Times {
    /// True if that was so long ago, or never.
    pub(crate) fn is_over(time: Option<Instant>, span: Duration) -> bool {
        time.is_none_or(|time| time.elapsed() >= span)
    }
}
