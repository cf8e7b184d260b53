//! Syncs of a device of the pool: one at a time, and none after one that failed.
//!
//! Invariants:
//!
//! 1. A device tells of a lost write once, to one of those who sync it at that time. So nobody
//!    is told `Ok` while somebody else may be told of a failure: syncs take turns, and once one
//!    failed all later ones do.

use std::io;

use crate::device::BlockDevice;
use crate::sync::Mutex;

/// The turn, and whether a sync failed. Shared by all who sync one device. Rank 8 in the lock
/// order, held during the sync.
#[derive(Debug, Default)]
pub(crate) struct Syncs {
    failed: Mutex<bool>,
}

impl Syncs {
    /// Makes completed writes to `device` durable.
    pub(crate) fn sync(&self, device: &dyn BlockDevice) -> io::Result<()> {
        let mut failed = self.failed.lock();
        if *failed {
            return Err(io::Error::other("an earlier sync failed"));
        }
        let outcome = device.sync();
        *failed = outcome.is_err();
        outcome
    }
}
