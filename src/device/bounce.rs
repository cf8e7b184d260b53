//! Aligned memory for direct I/O, kept for reuse so that a 4 KiB read does not allocate.
//!
//! Invariants:
//!
//! 1. A buffer begins on a block boundary and is as long as asked for, at most [`LARGE_LEN`].
//! 2. At most `SMALL_KEPT_MAX * SMALL_LEN + LARGE_KEPT_MAX * LARGE_LEN` = 14 MiB stay allocated
//!    while no transfer runs.

use std::fmt;
use std::ops::{Deref, DerefMut};

use crate::sync::Mutex;
use crate::units::BLOCK_SIZE;

/// Bytes of a small buffer: most transfers are a block or a few.
const SMALL_LEN: usize = 128 * 1024; // 128 KiB
/// Bytes of a large buffer: enough for a disk to be at its full speed, and one request of FUSE.
const LARGE_LEN: usize = 1024 * 1024; // 1 MiB
/// Small buffers kept for reuse.
const SMALL_KEPT_MAX: usize = 16; // 2 MiB in all
/// Large buffers kept for reuse: one for each thread that is likely to run.
const LARGE_KEPT_MAX: usize = 12; // 12 MiB in all

/// Buffers waiting for the next transfer.
#[derive(Debug, Default)]
pub(crate) struct BouncePool {
    /// Guarded by itself, held for a push or a pop only.
    small: Mutex<Vec<Aligned>>,
    /// As `small`.
    large: Mutex<Vec<Aligned>>,
}

impl BouncePool {
    /// Longest buffer there is, in bytes, a multiple of the block size.
    pub(crate) fn chunk_max(&self) -> usize {
        LARGE_LEN
    }

    /// A buffer of `len` bytes with any contents.
    pub(crate) fn take(&self, len: usize) -> Bounce<'_> {
        assert!(len <= LARGE_LEN, "transfer was not split len={len}");
        let (kept, capacity) = if len <= SMALL_LEN {
            (&self.small, SMALL_LEN)
        } else {
            (&self.large, LARGE_LEN)
        };
        let reused = kept.lock().pop();
        Bounce {
            memory: reused.unwrap_or_else(|| Aligned::new(capacity)),
            len,
            kept,
        }
    }
}

/// Memory with a block boundary in it and a given length behind that.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl fmt::Debug for Aligned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the bytes: devices are printed in messages, and the bytes are users' data.
        write!(f, "{} bytes", self.bytes.len())
    }
}

impl Aligned {
    fn new(capacity: usize) -> Self {
        // One block more than asked for, so that a boundary is in the first block. The vector is
        // never resized, so its memory never moves.
        let bytes = vec![0; capacity + BLOCK_SIZE];
        let start = bytes.as_ptr().addr().next_multiple_of(BLOCK_SIZE) - bytes.as_ptr().addr();
        Self { bytes, start }
    }
}

/// A buffer in use; goes back to its pool when dropped.
#[derive(Debug)]
pub(crate) struct Bounce<'a> {
    memory: Aligned,
    len: usize,
    kept: &'a Mutex<Vec<Aligned>>,
}

impl Deref for Bounce<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory.bytes[self.memory.start..][..self.len]
    }
}

impl DerefMut for Bounce<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory.bytes[self.memory.start..][..self.len]
    }
}

impl Drop for Bounce<'_> {
    fn drop(&mut self) {
        let empty = Aligned {
            bytes: Vec::new(),
            start: 0,
        };
        let memory = std::mem::replace(&mut self.memory, empty);
        let kept_max = if memory.bytes.len() < LARGE_LEN {
            SMALL_KEPT_MAX
        } else {
            LARGE_KEPT_MAX
        };
        let mut kept = self.kept.lock();
        if kept.len() < kept_max {
            kept.push(memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_reused() {
        let pool = BouncePool::default();
        let first = pool.take(BLOCK_SIZE).as_ptr().addr();
        for len in [BLOCK_SIZE, SMALL_LEN, SMALL_LEN + BLOCK_SIZE, LARGE_LEN] {
            let buffer = pool.take(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.as_ptr().addr().is_multiple_of(BLOCK_SIZE));
        }
        assert_eq!(pool.take(BLOCK_SIZE).as_ptr().addr(), first);
    }

    #[test]
    fn idle_buffers_are_bounded() {
        let pool = BouncePool::default();
        let many: Vec<_> = (0..40).map(|_| pool.take(LARGE_LEN)).collect();
        drop(many);
        assert_eq!(pool.large.lock().len(), LARGE_KEPT_MAX);
    }
}
