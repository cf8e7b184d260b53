//! The pool: what an open one consists of, its locks, its limits, and what happens when the
//! device fails.
//!
//! Lock order; a thread takes them only downwards (builds with assertions watch it, `sync.rs`):
//!
//! | rank | lock | held for |
//! |---|---|---|
//! | 1 | `checkpointing` | one checkpoint |
//! | 2 | `gate` | read: an operation that changes metadata; write: the cut of a checkpoint |
//! | 3 | `file_locks` | read: writes of whole blocks; write: everything else on a file's contents |
//! | 4 | `destaging` | one destage |
//! | 5 | `meta` | the trees |
//! | 6 | `journal` | the ring; its device I/O |
//! | 7 | `stage` | staged blocks and the queue for the journal |
//! | 8 | `commit`, `poison`, `syncs`, caches | single fields, one sync; nothing is taken while one is held |
//!
//! Invariants:
//!
//! 1. After a failed write or sync of the device nothing is acknowledged any more, and what
//!    failed is not tried again: its state on the device is unknown (`device/mod.rs`, point 3).
//!    A write that failed because the host has no space is another matter: see `host.rs`.
//! 2. Whatever changes metadata holds the gate, so that a checkpoint is the state of one instant.

use std::sync::Arc;

use crate::device::{BlockDevice, BouncePool};
use crate::error::{Error, Kind, Result};
use crate::ondisk::superblock::{FLAG_CLEAN, FLAG_EXTERNAL_JOURNAL, SB_VERSION, Superblock};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::ranked;
use crate::sync::thread::JoinHandle;
use crate::sync::{Condvar, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use crate::units::{BLOCK_SIZE, Ino};

use super::cache::{BlockCache, Readers};
use super::heartbeat::Heartbeat;

use super::counters::Counters;
use super::fetch::Fetcher;
use super::journal::{Cut, Journal};
use super::meta::Meta;
use super::refusals::HostState;
use super::stage::Stage;
use super::syncs::Syncs;
use super::types::{Health, OpenOptions, PoolInfo, Replayed, Usage};
use super::waiters::Commit;

/// Locks that files share by their inode number. Few of them for the model checker, which makes
/// thousands of pools.
const FILE_LOCKS: usize = if cfg!(feature = "shuttle") { 8 } else { 1024 };

/// Bytes that are read ahead of a stream unless told otherwise.
const AHEAD_DEFAULT: u64 = 2 * 1024 * 1024; // 2 MiB: what a fast disk reads while a guest works on 1

/// What bounds the memory and the queues of an open pool.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes that may wait for the journal: an eighth of the ring less what headers and rounding
    /// take. The quarter kept for checkpoints then holds such a batch, also one that skips the
    /// end of the ring, which costs almost as much again. Whoever queues checks it under the
    /// lock of the stage; a single operation on an empty queue is bounded by a sixteenth.
    pub(crate) pending_bytes: usize,
    /// Staged blocks above which writers wait for destage.
    pub(crate) staged_blocks: usize,
    /// Bytes of one step of a staged write: at least what is not written directly, so that an
    /// aligned write is one step.
    pub(crate) step_bytes: usize,
    /// Dirty nodes above which a checkpoint is due.
    pub(crate) dirty_nodes: usize,
    /// Runs of changed reference counts above which a checkpoint is due.
    pub(crate) delta_runs: usize,
    /// Staged blocks above which replay destages, together with what it keeps of the journal. More
    /// than otherwise: nothing else is in the caches yet.
    pub(crate) replay_blocks: usize,
}

/// What the background worker is asked to do.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    pub(crate) asked: bool,
    pub(crate) checkpoint: bool,
    /// The commit thread should lead for those who wait.
    pub(crate) commit: bool,
    /// Much waits for the journal: the commit thread should commit, whoever waits.
    pub(crate) commit_early: bool,
    /// The commit thread ends.
    pub(crate) stop_commit: bool,
    /// The worker ends.
    pub(crate) stop_work: bool,
}

/// An open pool. See the module for its locks.
#[derive(Debug)]
pub struct Pool {
    pub(crate) device: Arc<dyn BlockDevice>,
    syncs: Arc<Syncs>,
    pub(crate) read_only: bool,
    /// It was not closed cleanly before it was opened.
    pub(crate) was_left_open: bool,
    pub(crate) limits: Limits,
    pub(crate) counters: Arc<Counters>,
    pub(crate) cache: Arc<BlockCache>,
    /// Aligned memory for transfers of data.
    pub(crate) buffers: BouncePool,
    pub(crate) readers: Arc<Readers>,
    /// Bytes that are read ahead of a stream at most.
    pub(crate) ahead_max: AtomicU64,
    ahead_most: u64,
    /// Reads data blocks.
    pub(crate) fetcher: Fetcher,
    pub(crate) checkpointing: Mutex<()>,
    pub(crate) gate: RwLock<()>,
    file_locks: Vec<RwLock<()>>,
    pub(crate) destaging: Mutex<()>,
    pub(crate) meta: RwLock<Meta>,
    pub(crate) journal: Mutex<Journal>,
    pub(crate) stage: Mutex<Stage>,
    pub(crate) commit: Commit,
    /// The newest durable superblock. Rank 8.
    pub(crate) superblock: Mutex<Superblock>,
    /// A checkpoint whose nodes or superblock the host had no space for: the next one finishes it
    /// first. Rank 8; changed only by who holds `checkpointing`.
    pub(crate) unfinished: Mutex<Option<(Superblock, Cut)>>,
    /// Superblocks in a slot whose copy the host had no space for. The next flip tries these copies
    /// first, so that none is more than one round behind where the host has space. Rank 8; as
    /// `unfinished`.
    pub(crate) stale_copies: Mutex<Vec<Superblock>>,
    /// The host refused to take what was written.
    pub(crate) host: HostState,
    poisoned: AtomicBool,
    poison: Mutex<Option<String>>,
    closed: AtomicBool,
    /// Work for the background thread. Rank 8.
    pub(crate) wake: Mutex<Wake>,
    pub(crate) wake_signal: Condvar,
    /// Signalled when staged blocks, journal or space became free.
    pub(crate) relief: Condvar,
    pub(crate) workers: Mutex<Vec<JoinHandle<()>>>,
    pub(crate) threaded: AtomicBool,
    /// What the open found in the journal. Rank 8.
    pub(crate) replayed: Mutex<Replayed>,
    /// The mark that no other host has the pool. Rank 8.
    pub(crate) heartbeat: Mutex<Option<Arc<Heartbeat>>>,
}

impl Pool {
    /// Puts an open pool together from its parts; recovery calls it.
    pub(crate) fn assemble(
        device: Arc<dyn BlockDevice>,
        mut journal: Journal,
        meta: Meta,
        superblock: Superblock,
        options: &OpenOptions,
    ) -> Self {
        let limits = limits(options.cache_size, journal.size());
        let counters = meta.space.counters.clone();
        let syncs = Arc::default();
        journal.share(&device, &syncs);
        let cache = Arc::new(BlockCache::new(
            (options.cache_size / 2) as usize / BLOCK_SIZE,
        ));
        let buffers = BouncePool::default();
        let fetcher = Fetcher::new(&device, &cache, &buffers, &counters);
        Self {
            syncs,
            read_only: options.read_only,
            was_left_open: superblock.flags & FLAG_CLEAN == 0,
            limits,
            cache,
            buffers,
            readers: Arc::default(),
            ahead_max: AtomicU64::new(AHEAD_DEFAULT.min(ahead_most(options.cache_size))),
            ahead_most: ahead_most(options.cache_size),
            fetcher,
            checkpointing: ranked::mutex(1, ()),
            gate: ranked::rw_lock(2, ()),
            file_locks: (0..FILE_LOCKS).map(|_| ranked::rw_lock(3, ())).collect(),
            destaging: ranked::mutex(4, ()),
            stage: ranked::mutex(7, Stage::new(counters.clone())),
            counters,
            meta: ranked::rw_lock(5, meta),
            journal: ranked::mutex(6, journal),
            commit: Commit::default(),
            superblock: ranked::mutex(8, superblock),
            unfinished: ranked::mutex(8, None),
            stale_copies: ranked::mutex(8, Vec::new()),
            host: HostState::default(),
            poisoned: AtomicBool::new(false),
            poison: ranked::mutex(8, None),
            closed: AtomicBool::new(false),
            wake: ranked::mutex(8, Wake::default()),
            wake_signal: Condvar::new(),
            relief: Condvar::new(),
            workers: Mutex::new(Vec::new()),
            threaded: AtomicBool::new(false),
            replayed: ranked::mutex(8, Replayed::default()),
            heartbeat: ranked::mutex(8, None),
            device,
        }
    }

    /// Sets how many bytes are read ahead of a reader in order; 0: none. At most a sixteenth of the
    /// cached blocks, so that many readers do not drive out what was read for others.
    pub fn set_read_ahead(&self, bytes: u64) {
        let bytes = bytes.min(self.ahead_most);
        self.ahead_max.store(bytes, Ordering::Relaxed);
    }

    /// Superblock facts.
    pub fn info(&self) -> PoolInfo {
        let journal_size = self.journal.lock().size();
        PoolInfo {
            journal_size,
            ..info_of(&self.superblock.lock())
        }
    }

    /// How full the pool is.
    pub fn usage(&self) -> Usage {
        const B: u64 = BLOCK_SIZE as u64;
        let (total, free, logical, inodes) = {
            let meta = self.meta.read();
            let sizes = self.stage.lock().sizes();
            // Files being written are larger (or smaller) than their records say.
            let logical = sizes.into_iter().fold(meta.logical, |sum, (ino, size)| {
                let old = meta.inode(ino).map_or(size, |inode| inode.size);
                sum.wrapping_sub(old).wrapping_add(size)
            });
            (
                meta.space.total(),
                self.counters.free(),
                logical,
                meta.inodes,
            )
        };
        let (journal_used, journal_size) = {
            let journal = self.journal.lock();
            (journal.used(), journal.size())
        };
        let staged = self.stage.lock().blocks() as u64;
        let host_available = self.host_available(total - free).unwrap_or_else(|error| {
            log::debug!("the host does not tell its free space: {error}");
            None
        });
        Usage {
            host_available,
            total: total * B,
            used: (total - free) * B,
            available: self.counters.available() * B,
            reserve: self.counters.floor() * B,
            staged: staged * B,
            journal_used,
            journal_size,
            logical,
            inodes,
        }
    }

    /// What the host can still take of data, when `used` blocks are in use: what it has free, and
    /// what it has allocated for the pool already.
    fn host_available(&self, used: u64) -> std::io::Result<Option<u64>> {
        let Some(free) = self.device.host_free()? else {
            return Ok(None);
        };
        let ring = self.superblock.lock().first_block();
        let floor = self.counters.floor();
        let spare = self
            .device
            .allocated()?
            .saturating_sub((used + ring + floor) * BLOCK_SIZE as u64);
        Ok(Some(free.saturating_add(spare)))
    }

    /// What happened since the pool was opened.
    pub fn health(&self) -> Health {
        let heartbeat = self.heartbeat.lock().clone();
        let (beats, beat_age_ms) = heartbeat.map_or((0, 0), |heartbeat| heartbeat.state());
        // One lock after the other: a guard within the expression below would live to its end.
        let replayed = *self.replayed.lock();
        let unsynced_ms = self.unsynced_ms();
        let nodes = self.meta.read().damaged_nodes();
        let stale_copies = self.stale_copies.lock().len() as u64;
        Health {
            replayed,
            unsynced_ms,
            damaged_reads: self.counters.damaged.load(Ordering::Relaxed) + nodes,
            stale_copies,
            beats,
            beat_age_ms,
        }
    }

    /// Why writes are refused, if an earlier write or sync failed.
    pub fn poisoned(&self) -> Option<String> {
        self.poison.lock().clone()
    }

    /// Refuses everything from now on, because of `error`.
    pub(crate) fn poison(&self, error: &Error) {
        let mut poison = self.poison.lock();
        if poison.is_none() {
            let why = error.duplicate().to_string();
            log::error!("the pool refuses writes from now on: {why}");
            *poison = Some(why);
        }
        drop(poison);
        self.poisoned.store(true, Ordering::SeqCst);
        self.relief.notify_all();
    }

    /// Fails if an earlier write or sync failed.
    pub(crate) fn check_poison(&self) -> Result<()> {
        if !self.poisoned.load(Ordering::Relaxed) {
            return Ok(());
        }
        let why = self.poison.lock().clone().unwrap_or_default();
        Err(Error::new(
            Kind::Poisoned,
            format!(
                "the pool refuses writes because an earlier one failed ({why}); look at its device, then mount it again"
            ),
        ))
    }

    /// Fails if the pool cannot be changed.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::new(Kind::ReadOnly, "the pool is mounted read-only"));
        }
        self.check_open()?;
        self.check_poison()
    }

    /// Fails if a sync cannot be answered: nothing is ever pending in a read-only pool.
    pub(crate) fn check_writable_or_read_only(&self) -> Result<()> {
        self.check_open()?;
        self.check_poison()
    }

    /// True once `close` lets nobody begin anything any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    fn check_open(&self) -> Result<()> {
        if self.is_closed() {
            return Err(Error::new(Kind::Busy, "the pool was closed"));
        }
        Ok(())
    }

    /// Marks the pool closed; false if it was.
    pub(crate) fn set_closed(&self) -> bool {
        !self.closed.swap(true, Ordering::SeqCst)
    }

    /// Makes completed writes to the pool durable, or poisons it.
    pub(crate) fn device_sync(&self) -> Result<()> {
        let synced = self.syncs.sync(&*self.device);
        synced.map_err(|source| {
            // Also if it was for want of space: what was written before is in an unknown state.
            let error = Error::new(Kind::Io, format!("cannot sync the pool: {source}"));
            self.poison(&error);
            error
        })
    }

    /// Writes whole blocks to the pool, or poisons it.
    ///
    /// # Errors
    /// `NoSpace` if the host has no space: the pool is not poisoned, because nothing but the
    /// contents of these very blocks, to which nothing refers yet, is unknown (`host.rs`).
    pub(crate) fn device_write(&self, block: u64, data: &[u8]) -> Result<()> {
        let written = self.device.write_at(block * BLOCK_SIZE as u64, data);
        written.map_err(|source| {
            let error = Error::io(format!("cannot write to the pool: block={block}"), source);
            if error.kind() == Kind::NoSpace {
                return self.host_refused(error);
            }
            self.poison(&error);
            error
        })
    }

    fn file_lock(&self, ino: Ino) -> &RwLock<()> {
        &self.file_locks[ino.0 as usize % FILE_LOCKS]
    }

    /// Shares a file with other writers of whole blocks.
    pub(crate) fn share_file(&self, ino: Ino) -> RwLockReadGuard<'_, ()> {
        self.file_lock(ino).read()
    }

    /// Has a file for itself.
    pub(crate) fn own_file(&self, ino: Ino) -> RwLockWriteGuard<'_, ()> {
        self.file_lock(ino).write()
    }

    /// Has two files for itself. The second guard is missing if they share a lock.
    pub(crate) fn own_files(
        &self,
        a: Ino,
        b: Ino,
    ) -> (RwLockWriteGuard<'_, ()>, Option<RwLockWriteGuard<'_, ()>>) {
        let (low, high) = (a.0 as usize % FILE_LOCKS, b.0 as usize % FILE_LOCKS);
        if low == high {
            return (self.file_locks[low].write(), None);
        }
        let (low, high) = (low.min(high), low.max(high));
        let first = self.file_locks[low].write();
        (first, Some(self.file_locks[high].write()))
    }

    /// True if background threads do destage and checkpoints.
    pub(crate) fn is_threaded(&self) -> bool {
        self.threaded.load(Ordering::Relaxed)
    }
}

/// Facts of a superblock. The size of an external journal is that of its ring.
pub(crate) fn info_of(sb: &Superblock) -> PoolInfo {
    PoolInfo {
        uuid: sb.uuid,
        version: SB_VERSION,
        size: sb.blocks * BLOCK_SIZE as u64,
        journal_size: sb.journal_blocks * BLOCK_SIZE as u64,
        journal_external: sb.flags & FLAG_EXTERNAL_JOURNAL != 0,
        generation: sb.generation,
        clean: sb.flags & FLAG_CLEAN != 0,
        created: sb.created,
    }
}

/// A sixteenth of the cached blocks, in bytes.
fn ahead_most(cache_size: u64) -> u64 {
    cache_size / 2 / 16
}

/// Splits `cache_size` (bytes): half for blocks, a quarter for clean nodes, an eighth for dirty
/// nodes, an eighth for the stage and at least 1 MiB of it. Changed reference counts, 64 bytes for
/// each run of blocks, take up to a thirty-second in addition.
fn limits(cache_size: u64, journal_size: u64) -> Limits {
    const MIB: u64 = 1024 * 1024;
    let pending = (journal_size / 8 - 4 * BLOCK_SIZE as u64)
        .min(32 * MIB)
        .min((cache_size / 4).max(2 * MIB));
    let staged = (cache_size / 8).min(journal_size).max(MIB) / BLOCK_SIZE as u64;
    Limits {
        pending_bytes: pending as usize,
        staged_blocks: staged as usize,
        step_bytes: (pending / 4).clamp(64 * 1024, MIB) as usize,
        dirty_nodes: (cache_size / 8 / BLOCK_SIZE as u64).max(512) as usize,
        delta_runs: (cache_size / 32 / 64).max(4096) as usize,
        replay_blocks: ((cache_size / 4 * 3).max(MIB) / BLOCK_SIZE as u64) as usize,
    }
}
