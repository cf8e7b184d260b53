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

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ondisk::Page;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, ranked, thread};
use crate::sys::slab::{Slab, SlabPage};
use crate::units::BLOCK_SIZE;

use super::recent::Recent;

/// Shards of the cache, so that readers seldom meet.
const SHARDS: usize = 16;

/// Contents of a block that the cache holds, or held a moment ago.
pub(crate) type Cached = Arc<SlabPage>;

/// Called with a block that somebody else has read, or with why that failed.
pub(crate) type Waiter = Box<dyn FnOnce(Result<Cached>) + Send>;

/// Contents of a block in memory.
#[derive(Clone, Debug)]
pub(crate) enum Held {
    /// There is no block: a hole.
    Zeros,
    /// In the stage.
    Staged(Arc<Page>),
    /// In the cache.
    Cached(Cached),
}

/// What a hole holds.
static ZEROS: Page = [0; BLOCK_SIZE];

impl Held {
    /// Its bytes.
    pub(crate) fn bytes(&self) -> &Page {
        match self {
            Self::Zeros => &ZEROS,
            Self::Staged(page) => page,
            Self::Cached(page) => page,
        }
    }
}

/// What a reader finds that needs a block.
#[derive(Debug)]
pub(crate) enum Look {
    /// Its contents.
    Here(Cached),
    /// Nothing: the caller reads it, and calls [`BlockCache::loaded`].
    Ours,
    /// Somebody else reads it, and will call the waiter.
    Theirs,
}

/// Data blocks in memory.
#[derive(Debug)]
pub(crate) struct BlockCache {
    shards: Vec<Mutex<Shard>>,
    /// Where the contents lie.
    memory: Slab,
}

/// Rank 8 in the lock order: nothing is locked while one is held.
struct Shard {
    pages: Recent<Cached>,
    /// Blocks that somebody is reading from the device, and who waits for them.
    loading: HashMap<u64, Vec<Waiter>>,
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shard({} blocks)", self.pages.len())
    }
}

impl BlockCache {
    /// A cache of at most `blocks_max` blocks.
    pub(crate) fn new(blocks_max: usize) -> Self {
        let each = NonZeroUsize::new(blocks_max / SHARDS).unwrap_or(NonZeroUsize::MIN);
        let shard = || Shard {
            pages: Recent::new(each),
            loading: HashMap::new(),
        };
        Self {
            shards: (0..SHARDS).map(|_| ranked::mutex(8, shard())).collect(),
            memory: Slab::default(),
        }
    }

    fn shard(&self, block: u64) -> &Mutex<Shard> {
        &self.shards[(block / 8) as usize % SHARDS]
    }

    /// The contents of a block, if they are here.
    pub(crate) fn get(&self, block: u64) -> Option<Cached> {
        self.shard(block).lock().pages.get(block).cloned()
    }

    /// Keeps the contents of a block.
    pub(crate) fn put(&self, block: u64, page: impl Deref<Target = Page>) {
        self.keep(block, Arc::new(self.memory.copy(&page)));
    }

    fn keep(&self, block: u64, page: Cached) {
        let old = self.shard(block).lock().pages.put(block, page);
        drop(old); // its memory is given back without the lock
    }

    /// Forgets a block.
    pub(crate) fn remove(&self, block: u64) {
        let old = self.shard(block).lock().pages.remove(block);
        drop(old);
    }

    /// Looks for a block that the caller, which is pinned, is going to read.
    pub(crate) fn look(&self, block: u64, waiter: impl FnOnce() -> Waiter) -> Look {
        let shard = &mut *self.shard(block).lock();
        if let Some(page) = shard.pages.get(block) {
            return Look::Here(Arc::clone(page));
        }
        match shard.loading.get_mut(&block) {
            Some(waiters) => {
                waiters.push(waiter());
                Look::Theirs
            }
            None => {
                shard.loading.insert(block, Vec::new());
                Look::Ours
            }
        }
    }

    /// The caller, which was told [`Look::Ours`], has read the block, or could not. It is kept if
    /// the caller wants that, or if somebody else waits for it. Called without a lock held.
    pub(crate) fn loaded(&self, block: u64, bytes: std::result::Result<&Page, &Error>, keep: bool) {
        let copy = |bytes| Arc::new(self.memory.copy(bytes));
        // I2: what is kept is here before it is not loading any more.
        let kept = bytes.ok().filter(|_| keep).map(copy);
        if let Some(page) = &kept {
            self.keep(block, Arc::clone(page));
        }
        let waiters = self.shard(block).lock().loading.remove(&block);
        let waiters = waiters.unwrap_or_default();
        if waiters.is_empty() {
            return;
        }
        match bytes {
            Ok(bytes) => {
                let page = kept.unwrap_or_else(|| copy(bytes));
                if !keep {
                    self.keep(block, Arc::clone(&page));
                }
                for waiter in waiters {
                    waiter(Ok(Arc::clone(&page)));
                }
            }
            Err(error) => {
                for waiter in waiters {
                    waiter(Err(error.duplicate()));
                }
            }
        }
    }
}

/// Counts readers by epoch, so that a checkpoint can wait for those that began before it.
#[derive(Debug, Default)]
pub(crate) struct Readers {
    epoch: AtomicU64,
    active: [AtomicU64; 2],
    /// Readers there ever were: tells whether anybody reads.
    begun: AtomicU64,
}

/// A reader at work; blocks it can see are not used again.
#[derive(Debug)]
pub(crate) struct Pin {
    readers: Arc<Readers>,
    slot: usize,
}

impl Readers {
    /// Readers that ever began.
    pub(crate) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    /// Counts a reader that needs no pin.
    pub(crate) fn note(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    /// Begins to read.
    pub(crate) fn pin(self: &Arc<Self>) -> Pin {
        self.note();
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let slot = (epoch & 1) as usize;
            self.active[slot].fetch_add(1, Ordering::SeqCst);
            if self.epoch.load(Ordering::SeqCst) == epoch {
                return Pin {
                    readers: Arc::clone(self),
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

impl Drop for Pin {
    fn drop(&mut self) {
        self.readers.active[self.slot].fetch_sub(1, Ordering::SeqCst);
    }
}
