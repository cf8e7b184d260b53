//! How much space there is and how much of it is promised: numbers that everybody reads without
//! the lock of the trees.
//!
//! Invariants:
//!
//! 1. `free` is at least `reserved` and `floor` together whenever a promise is given, so that what
//!    was acknowledged finds its place, and deleting and checkpoints always find theirs.

use crate::error::{Error, Kind, Result};
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Blocks reserved for each staged block: its own, and its share of tree nodes that its mapping
/// changes (a leaf of the extent map, one of the refcounts, part of their parents).
pub(crate) const RESERVE_PER_BLOCK: u64 = 4;

/// Counters that are read and changed without the meta lock.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Allocatable blocks.
    pub(super) free: AtomicU64,
    /// Blocks promised to writes that were acknowledged.
    reserved: AtomicU64,
    /// Blocks that only deleting, discarding and checkpoints may use.
    pub(super) floor: AtomicU64,
    /// Reads of data blocks that were not what had been written.
    pub(crate) damaged: AtomicU64,
    /// Dirty nodes of the current generation.
    dirty: AtomicUsize,
    /// Runs of blocks whose reference count changed in it.
    delta: AtomicUsize,
    /// Blocks in all.
    pub(super) total: AtomicU64,
}

impl Counters {
    /// Promises space for `blocks` staged blocks: each with the worst case of its mapping.
    pub(crate) fn reserve(&self, blocks: u64) -> Result<()> {
        self.reserve_exactly(blocks * RESERVE_PER_BLOCK)
    }

    /// Promises `want` blocks.
    pub(crate) fn reserve_exactly(&self, want: u64) -> Result<()> {
        if want == 0 {
            return Ok(()); // also below the floor: deleting needs no promise
        }
        // The promise comes before the look: an allocation lowers `free` before it takes its
        // promise back, so whichever order this sees, nothing is promised twice.
        let before = self.reserved.fetch_add(want, Ordering::SeqCst);
        let free = self.free.load(Ordering::SeqCst);
        let floor = self.floor.load(Ordering::Relaxed);
        if free < before + want + floor {
            self.reserved.fetch_sub(want, Ordering::SeqCst);
            return Err(full());
        }
        Ok(())
    }

    /// Promises space for the few blocks that are rewritten so that others can be freed: these
    /// may use half of what is kept back.
    pub(crate) fn reserve_for_freeing(&self, blocks: u64) -> Result<()> {
        self.reserve(blocks).or_else(|error| {
            if self.free() < self.floor() / 2 {
                return Err(error);
            }
            self.reserve_anyway(blocks);
            Ok(())
        })
    }

    /// Promises without looking: replay does, for what was promised before the crash.
    pub(crate) fn reserve_anyway(&self, blocks: u64) {
        self.reserved
            .fetch_add(blocks * RESERVE_PER_BLOCK, Ordering::Relaxed);
    }

    /// Takes a promise back, because the blocks were allocated or are not needed.
    pub(crate) fn unreserve(&self, blocks: u64) {
        self.unreserve_exactly(blocks * RESERVE_PER_BLOCK);
    }

    /// Takes back what [`reserve_exactly`](Self::reserve_exactly) promised.
    pub(crate) fn unreserve_exactly(&self, want: u64) {
        let before = self.reserved.fetch_sub(want, Ordering::Relaxed);
        assert!(
            before >= want,
            "more space was given back than was reserved"
        );
    }

    /// Blocks that a user can still write.
    pub(crate) fn available(&self) -> u64 {
        let kept = self.reserved.load(Ordering::Relaxed) + self.floor.load(Ordering::Relaxed);
        self.free.load(Ordering::Relaxed).saturating_sub(kept)
    }

    /// Allocatable blocks, the floor included.
    pub(crate) fn free(&self) -> u64 {
        self.free.load(Ordering::Relaxed)
    }

    /// Dirty nodes of the current generation.
    pub(crate) fn dirty(&self) -> usize {
        self.dirty.load(Ordering::Relaxed)
    }

    /// Runs of blocks whose reference count changed in the current generation.
    pub(crate) fn delta(&self) -> usize {
        self.delta.load(Ordering::Relaxed)
    }

    /// Tells what the current generation has gathered.
    pub(crate) fn set_gathered(&self, nodes: usize, runs: usize) {
        self.dirty.store(nodes, Ordering::Relaxed);
        self.delta.store(runs, Ordering::Relaxed);
    }

    /// True if storing the changed reference counts could need more nodes than there is space
    /// for: at most one for each run, or as many as the refcount tree can have, whose leaves are
    /// at least a quarter full (63 records).
    pub(crate) fn is_tight(&self) -> bool {
        let total = self.total.load(Ordering::Relaxed);
        let leaves = total.saturating_sub(self.free()) / 64 + 2;
        let need = (self.delta() as u64).min(leaves);
        need > self.floor() / 2 + self.available()
    }

    /// Blocks that are kept back.
    pub(crate) fn floor(&self) -> u64 {
        self.floor.load(Ordering::Relaxed)
    }
}

/// The error of a pool without space.
pub(crate) fn full() -> Error {
    Error::new(Kind::NoSpace, "the pool is full: delete files or grow it")
}
