//! Aligned memory for direct I/O, kept for reuse so that a 4 KiB read does not allocate.
//!
//! Invariants:
//!
//! 1. A buffer begins on a block boundary and is as long as asked for, at most [`CHUNK_MAX`].
//! 2. At most the sum over [`CLASSES`] = 17 MiB stay allocated while no transfer runs.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::sync::Mutex;
use crate::sys::memory::Aligned;
#[cfg(test)]
use crate::units::BLOCK_SIZE;

/// Longest buffer, in bytes: enough for a disk to be at its full speed, and one request of FUSE.
const CHUNK_MAX: usize = 1024 * 1024; // 1 MiB

/// Bytes of the buffers of a class, and how many are kept for reuse: single blocks, runs of
/// fragmented files, what is read ahead, and one large one for each thread that is likely to run.
const CLASSES: [(usize, usize); 7] = [
    (16 * 1024, 128), // 2 MiB in all
    (32 * 1024, 32),  // 1 MiB in all
    (64 * 1024, 16),  // 1 MiB in all
    (128 * 1024, 8),  // 1 MiB in all
    (256 * 1024, 8),  // 2 MiB in all
    (512 * 1024, 4),  // 2 MiB in all
    (CHUNK_MAX, 8),   // 8 MiB in all
];

/// Buffers waiting for the next transfer, by class. Guarded by themselves, held for a push or a
/// pop only.
type Kept = [Mutex<Vec<Aligned>>; CLASSES.len()];

/// Where buffers come from and go back to.
#[derive(Clone, Debug, Default)]
pub(crate) struct BouncePool {
    kept: Arc<Kept>,
}

impl BouncePool {
    /// Longest buffer there is, in bytes, a multiple of the block size.
    pub(crate) fn chunk_max(&self) -> usize {
        CHUNK_MAX
    }

    /// A buffer of `len` bytes with any contents.
    pub(crate) fn take(&self, len: usize) -> Bounce {
        let class = CLASSES.iter().position(|class| len <= class.0);
        let class = class.unwrap_or_else(|| panic!("transfer was not split len={len}"));
        let reused = self.kept[class].lock().pop();
        Bounce {
            memory: reused.unwrap_or_else(|| Aligned::new(CLASSES[class].0)),
            len,
            kept: Arc::clone(&self.kept),
        }
    }
}

/// A buffer in use; goes back to its pool when dropped.
#[derive(Debug)]
pub struct Bounce {
    memory: Aligned,
    len: usize,
    kept: Arc<Kept>,
}

impl Bounce {
    /// Takes the memory away for a transfer. The buffer has none until it is
    /// [`restored`](Self::restore).
    pub(crate) fn lend(&mut self) -> Aligned {
        std::mem::replace(&mut self.memory, Aligned::nothing())
    }

    /// Gives the memory back.
    pub(crate) fn restore(&mut self, memory: Aligned) {
        self.memory = memory;
    }

    /// Bytes it was taken for, also while its memory is lent.
    pub(crate) fn asked(&self) -> usize {
        self.len
    }
}

impl Deref for Bounce {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.bytes(self.len)
    }
}

impl DerefMut for Bounce {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.bytes_mut(self.len)
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        let memory = self.lend();
        let Some(class) = CLASSES.iter().position(|class| class.0 == memory.len()) else {
            return; // lent and not given back
        };
        let mut kept = self.kept[class].lock();
        if kept.len() < CLASSES[class].1 {
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
        for len in [BLOCK_SIZE, 64 * 1024, 64 * 1024 + BLOCK_SIZE, CHUNK_MAX] {
            let buffer = pool.take(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.as_ptr().addr().is_multiple_of(BLOCK_SIZE));
        }
        assert_eq!(pool.take(BLOCK_SIZE).as_ptr().addr(), first);
    }

    #[test]
    fn idle_buffers_are_bounded() {
        let pool = BouncePool::default();
        let many: Vec<_> = (0..40).map(|_| pool.take(CHUNK_MAX)).collect();
        drop(many);
        assert_eq!(pool.kept[6].lock().len(), CLASSES[6].1);
        let mut lent = pool.take(BLOCK_SIZE);
        let memory = lent.lend();
        lent.restore(memory);
        assert_eq!(lent.len(), BLOCK_SIZE);
        let before = pool.kept[0].lock().len();
        lent.lend();
        drop(lent);
        assert_eq!(pool.kept[0].lock().len(), before);
    }
}
