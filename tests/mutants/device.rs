//! A device that does something at a certain operation, before it happens, while whoever asked for
//! it waits. So a test needs no luck to be in the middle of a checkpoint.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nodupe::device::{BlockDevice, SimDevice};
use nodupe::engine::{OpenOptions, Pool};
use nodupe::ondisk::node::NODE_MAGIC;
use nodupe::ondisk::superblock::{HEAD_BLOCKS, SLOTS};

use super::common::crash::Geometry;
use super::common::history::create_options;

pub(crate) const B: u64 = 4096;
/// How long something that must wait is given to show that it does not. Nothing depends on how
/// fast it is: a slow machine misses a bug, it does not see one that is not there.
const PATIENCE: Duration = Duration::from_millis(300);

/// An operation of the device, and what it is about: with `Data`, blocks of the pool that hold no
/// node; with `Node`, those that do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    ReadData,
    ReadNode,
    ReadOther,
    WriteSuperblock,
    WriteJournal,
    WriteNode,
    WriteData,
    Sync,
    Discard,
}

type Hook = Box<dyn FnOnce() + Send>;

/// The device. Its hooks wait in order: only the first can happen.
pub(crate) struct Hooked {
    pub(crate) sim: Arc<SimDevice>,
    hooks: Mutex<VecDeque<(At, Hook)>>,
    /// First block behind the journal.
    first: u64,
    syncing: AtomicUsize,
    /// Two syncs ran at once.
    pub(crate) syncs_met: AtomicBool,
    /// Blocks of the longest write to the journal.
    pub(crate) longest_batch: AtomicU64,
}

impl std::fmt::Debug for Hooked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hooked")
    }
}

impl Hooked {
    /// Does `hook` at the next such operation behind the hooks that wait already.
    pub(crate) fn at(&self, at: At, hook: impl FnOnce() + Send + 'static) {
        self.lock().push_back((at, Box::new(hook)));
    }

    /// Fails if a hook still waits: then the test was about nothing.
    pub(crate) fn assert_all_happened(&self) {
        let waiting: Vec<At> = self.lock().iter().map(|(at, _)| *at).collect();
        assert!(waiting.is_empty(), "these never happened: {waiting:?}");
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<(At, Hook)>> {
        self.hooks.lock().expect("nobody panics inside")
    }

    fn happens(&self, at: At) {
        let hook = {
            let mut hooks = self.lock();
            match hooks.front() {
                Some((wanted, _)) if *wanted == at => hooks.pop_front(),
                _ => None,
            }
        };
        // On a thread of its own, because a thread takes locks in their order only.
        if let Some((_, hook)) = hook
            && let Err(panic) = std::thread::spawn(hook).join()
        {
            std::panic::resume_unwind(panic);
        }
    }

    fn holds_node(bytes: &[u8]) -> bool {
        bytes.starts_with(&NODE_MAGIC.to_le_bytes())
    }
}

impl BlockDevice for Hooked {
    fn len(&self) -> u64 {
        self.sim.len()
    }

    fn read_at(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut first = [0; B as usize];
        self.sim.read_at(addr / B * B, &mut first)?;
        self.happens(match addr / B {
            block if block < self.first => At::ReadOther,
            _ if Self::holds_node(&first) => At::ReadNode,
            _ => At::ReadData,
        });
        self.sim.read_at(addr, buf)
    }

    fn write_at(&self, addr: u64, data: &[u8]) -> io::Result<()> {
        let (block, end) = (addr / B, self.len() / B - SLOTS);
        let at = match block {
            _ if block < SLOTS || block >= end => At::WriteSuperblock,
            _ if block < self.first => At::WriteJournal,
            _ if Self::holds_node(data) => At::WriteNode,
            _ => At::WriteData,
        };
        if at == At::WriteJournal {
            let blocks = data.len() as u64 / B;
            self.longest_batch.fetch_max(blocks, Ordering::SeqCst);
        }
        self.happens(at);
        self.sim.write_at(addr, data)
    }

    fn sync(&self) -> io::Result<()> {
        if self.syncing.fetch_add(1, Ordering::SeqCst) > 0 {
            self.syncs_met.store(true, Ordering::SeqCst);
        }
        self.happens(At::Sync);
        let outcome = self.sim.sync();
        self.syncing.fetch_sub(1, Ordering::SeqCst);
        outcome
    }

    fn discard(&self, addr: u64, len: u64) -> io::Result<()> {
        self.happens(At::Discard);
        self.sim.discard(addr, len)
    }
}

/// A pool in which `fill` made what there is to begin with, closed and opened again, so that
/// nothing is in a cache, on a device with hooks.
pub(crate) fn open_hooked<T>(
    geometry: &Geometry,
    fill: impl FnOnce(&Pool) -> T,
) -> (Arc<Hooked>, Arc<Pool>, T) {
    let sim = Arc::new(SimDevice::new(geometry.pool_size, 1));
    let options = create_options(1, geometry.journal_size);
    Pool::create(sim.clone(), None, &options).expect("a pool is made");
    let options = OpenOptions {
        read_only: false,
        cache_size: geometry.cache_size,
    };
    let pool = Pool::open(sim.clone(), None, &options).expect("a new pool opens");
    let filled = fill(&pool);
    pool.close().expect("the device is sound");
    let device = Arc::new(Hooked {
        sim,
        hooks: Mutex::default(),
        first: HEAD_BLOCKS + geometry.journal_size / B,
        syncing: AtomicUsize::new(0),
        syncs_met: AtomicBool::new(false),
        longest_batch: AtomicU64::new(0),
    });
    let pool = Pool::open(device.clone(), None, &options).expect("a closed pool opens");
    (device, pool, filled)
}

/// What others do meanwhile.
#[derive(Clone, Debug, Default)]
pub(crate) struct Others(Arc<Mutex<Vec<JoinHandle<()>>>>);

impl Others {
    /// Begins `work` on a thread and waits for a moment; true if it was done by then.
    pub(crate) fn begin(&self, work: impl FnOnce() + Send + 'static) -> bool {
        let (sender, receiver) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            work();
            drop(sender);
        });
        self.0.lock().expect("nobody panics inside").push(thread);
        receiver.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Disconnected)
    }

    /// Waits for all of them.
    pub(crate) fn join(&self) {
        let threads = std::mem::take(&mut *self.0.lock().expect("nobody panics inside"));
        for thread in threads {
            thread.join().expect("what others did succeeds");
        }
    }
}
