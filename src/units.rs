//! Units and small value types that cross the layers: block size, inode numbers, times.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

/// Unit of allocation and of redirect-on-write, in bytes: 4 KiB, the page and sector size of
/// today's guests and disks.
pub const BLOCK_SIZE: usize = 4096;

/// Smallest unit that a device writes whole, in bytes.
pub const SECTOR_SIZE: usize = 512;

/// Number of a file or directory: never 0, never used again after its file is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ino(pub u64);

impl Ino {
    /// The root directory.
    pub const ROOT: Ino = Ino(1);
}

impl fmt::Display for Ino {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A point in time: seconds since 1970 (negative before) and nanoseconds within the second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Whole seconds since 1970-01-01T00:00:00Z.
    pub secs: i64,
    /// Nanoseconds past `secs`, 0 to 999,999,999.
    pub nanos: u32,
}

impl Time {
    /// The time now.
    pub fn now() -> Self {
        Self::from(SystemTime::now())
    }
}

impl From<SystemTime> for Time {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(after) => Self {
                secs: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
                nanos: after.subsec_nanos(),
            },
            Err(before) => {
                let before = before.duration();
                let secs = -i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
                match before.subsec_nanos() {
                    0 => Self { secs, nanos: 0 },
                    nanos => Self {
                        secs: secs - 1,
                        nanos: 1_000_000_000 - nanos,
                    },
                }
            }
        }
    }
}
