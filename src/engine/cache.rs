//! The block cache: contents of data blocks, keyed by pool block, so that what clones share is
//! held once; and the pins that keep a block from being used again while somebody reads it.
//!
//! Invariants:
//!
//! 1. A cached block equals the block on the device: whoever writes a data block puts or removes
//!    it here before any extent map refers to it.
//! 2. Two readers that miss one block make one device read.
//! 3. A block freed by a checkpoint is not allocated again before every reader that began
//!    before has ended.

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;

use crate::ondisk::Page;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Condvar, Mutex, thread};

/// Shards of the cache, so that readers seldom meet.
const SHARDS: usize = 16;

/// Data blocks in memory.
#[derive(Debug)]
pub(crate) struct BlockCache {
    /// Rank 7 in the lock order: nothing is locked while one is held.
    shards: Vec<Mutex<LruCache<u64, Arc<Page>>>>,
    /// Blocks that somebody is reading from the device. Rank 7.
    loading: Mutex<HashSet<u64>>,
    loaded: Condvar,
}

impl BlockCache {
    /// A cache of at most `blocks_max` blocks.
    pub(crate) fn new(blocks_max: usize) -> Self {
        let each = NonZeroUsize::new(blocks_max / SHARDS).unwrap_or(NonZeroUsize::MIN);
        Self {
            shards: (0..SHARDS)
                .map(|_| Mutex::new(LruCache::new(each)))
                .collect(),
            loading: Mutex::new(HashSet::new()),
            loaded: Condvar::new(),
        }
    }

    fn shard(&self, block: u64) -> &Mutex<LruCache<u64, Arc<Page>>> {
        &self.shards[(block / 8) as usize % SHARDS]
    }

    /// The contents of a block, if they are here.
    pub(crate) fn get(&self, block: u64) -> Option<Arc<Page>> {
        self.shard(block).lock().get(&block).cloned()
    }

    /// Keeps the contents of a block.
    pub(crate) fn put(&self, block: u64, page: Arc<Page>) {
        self.shard(block).lock().put(block, page);
    }

    /// Forgets a block.
    pub(crate) fn remove(&self, block: u64) {
        self.shard(block).lock().pop(&block);
    }

    /// Claims the blocks of `wanted` that nobody reads yet; the caller must read them and call
    /// [`release`](Self::release). The others are being read by somebody else.
    pub(crate) fn claim(&self, wanted: impl Iterator<Item = u64>) -> HashSet<u64> {
        let mut loading = self.loading.lock();
        wanted.filter(|block| loading.insert(*block)).collect()
    }

    /// The claimed blocks are in the cache, or could not be read.
    pub(crate) fn release(&self, claimed: &HashSet<u64>) {
        let mut loading = self.loading.lock();
        for block in claimed {
            loading.remove(block);
        }
        drop(loading);
        self.loaded.notify_all();
    }

    /// Waits until nobody else reads `block`, and returns it if it arrived.
    pub(crate) fn wait(&self, block: u64) -> Option<Arc<Page>> {
        let mut loading = self.loading.lock();
        while loading.contains(&block) {
            self.loaded.wait(&mut loading);
        }
        drop(loading);
        self.get(block)
    }
}

/// Counts readers by epoch, so that a checkpoint can wait for those that began before it.
#[derive(Debug, Default)]
pub(crate) struct Readers {
    epoch: AtomicU64,
    active: [AtomicU64; 2],
    /// Pins there ever were: tells whether anybody reads.
    begun: AtomicU64,
}

/// A reader at work; blocks it can see are not used again.
#[derive(Debug)]
pub(crate) struct Pin<'a> {
    readers: &'a Readers,
    slot: usize,
}

impl Readers {
    /// Readers that ever began.
    pub(crate) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    /// Begins to read.
    pub(crate) fn pin(&self) -> Pin<'_> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let slot = (epoch & 1) as usize;
            self.active[slot].fetch_add(1, Ordering::SeqCst);
            if self.epoch.load(Ordering::SeqCst) == epoch {
                return Pin {
                    readers: self,
                    slot,
                };
            }
            // The epoch turned in between: this pin could be missed.
            self.active[slot].fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Waits for all readers that began before. One caller at a time.
    pub(crate) fn wait(&self) {
        let old = self.epoch.fetch_add(1, Ordering::SeqCst);
        let slot = (old & 1) as usize;
        let mut spins = 0_u32;
        while self.active[slot].load(Ordering::SeqCst) > 0 {
            spins += 1;
            if spins < 100 {
                thread::yield_now();
            } else {
                thread::sleep(std::time::Duration::from_micros(100));
            }
        }
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.readers.active[self.slot].fetch_sub(1, Ordering::SeqCst);
    }
}
