//! A world: a small pool on a slow device, two files that everybody uses, one that is doomed, and
//! what happened to them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nodupe::device::{BlockDevice, Fault, FaultOp, Repeat, SimDevice, SplitMix64};
use nodupe::engine::{FileKind, NewNode, OpenOptions, Pool};
use nodupe::error::{Error, Kind, Result};
use nodupe::units::{Ino, Time};

use super::common::crash::check;
use super::common::history::create_options;
use super::device::Slow;
use super::explore::prepare;
use super::history::{History, Place, Ticket};

pub(crate) const MIB: u64 = 1024 * 1024;
/// Bytes of a register.
pub(crate) const HALF: usize = 2048;
/// Registers of a file: two blocks more than the smallest direct write.
pub(crate) const HALVES: u32 = 36;
/// Files that everybody uses.
pub(crate) const FILES: [&str; 2] = ["a", "b"];
/// The file that comes and goes.
pub(crate) const DOOMED: &str = "doomed";
/// The directory that is cloned as a whole, and its files.
pub(crate) const TREE: &str = "tree";
/// Registers of names have these numbers plus that of their thread.
pub(crate) const NAMES: u32 = 1000;

const POOL: u64 = 6 * MIB;
const OPEN: OpenOptions = OpenOptions {
    read_only: false,
    cache_size: 4 * MIB,
};

/// A lock that nobody waits for: no thread is scheduled while another holds it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.try_lock().unwrap_or_else(|error| match error {
        std::sync::TryLockError::Poisoned(guard) => PoisonError::into_inner(guard),
        std::sync::TryLockError::WouldBlock => panic!("held while another thread ran"),
    })
}

/// The device that every world begins with: a pool with the files, all empty.
pub(crate) fn base() -> &'static SimDevice {
    static BASE: OnceLock<SimDevice> = OnceLock::new();
    BASE.get_or_init(|| {
        let device = Arc::new(SimDevice::new(POOL, 1));
        let made = Arc::clone(&device);
        prepare(move || {
            Pool::create(made.clone(), None, &create_options(1, MIB)).expect("a pool is made");
            let pool = Pool::open(made.clone(), None, &OPEN).expect("a new pool opens");
            for name in [FILES[0], FILES[1], DOOMED] {
                create(&pool, Ino::ROOT, name, FileKind::Regular).expect("there is room");
            }
            let tree = create(&pool, Ino::ROOT, TREE, FileKind::Directory);
            let tree = tree.expect("there is room");
            for name in FILES {
                create(&pool, tree, name, FileKind::Regular).expect("there is room");
            }
            pool.close().expect("the pool closes");
        });
        device.crash_none()
    })
}

pub(crate) fn create(pool: &Pool, dir: Ino, name: &str, kind: FileKind) -> Result<Ino> {
    let node = NewNode {
        kind,
        mode: 0o700,
        uid: 0,
        gid: 0,
        rdev: 0,
        target: b"",
    };
    let made = pool.create_node(dir, name.as_bytes(), &node, Time::default());
    Ok(made?.ino)
}

/// The bytes of registers that all hold `stamp`.
pub(crate) fn bytes_of(stamp: u64, halves: u32) -> Vec<u8> {
    stamp.to_le_bytes().repeat(halves as usize * HALF / 8)
}

/// The registers that a part of a file shows: those behind its end are zero.
pub(crate) fn registers_of(
    file: u32,
    halves: std::ops::Range<u32>,
    bytes: &[u8],
) -> Vec<(Place, u64)> {
    let first = halves.start;
    halves
        .map(|half| {
            let at = (half - first) as usize * HALF;
            let part = bytes.get(at..bytes.len().min(at + HALF)).unwrap_or(&[]);
            let mut stamps = part.chunks(8).map(|word| {
                let mut whole = [0; 8];
                whole[..word.len()].copy_from_slice(word);
                u64::from_le_bytes(whole)
            });
            let stamp = stamps.next().unwrap_or(0);
            assert!(
                stamps.all(|other| other == stamp),
                "half block {half} of file {file} is a mix"
            );
            ((file, half), stamp)
        })
        .collect()
}

/// A moment at which the power may fail.
struct Cut {
    device: SimDevice,
    history: History,
}

/// The world.
pub(crate) struct World {
    pub(crate) device: Arc<Slow>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) files: [Ino; 2],
    pub(crate) doomed: Mutex<Ino>,
    history: Arc<Mutex<History>>,
    cuts: Arc<Mutex<Vec<Cut>>>,
    stamp: Mutex<u64>,
    /// Syncs asked for with a callback, and callbacks called.
    pub(crate) asked: Mutex<(u64, u64)>,
    /// True once the pool is being closed: `Busy` is an answer then.
    pub(crate) closing: Mutex<bool>,
    /// True if the host may have no space: `NoSpace` is an answer then.
    host_is_full: Mutex<bool>,
}

impl World {
    /// A new one; `workers` starts the background threads, `cut` plans a crash.
    pub(crate) fn new(rng: &mut SplitMix64, workers: bool, cut: bool) -> Arc<Self> {
        let history = Arc::new(Mutex::new(History::default()));
        let cuts: Arc<Mutex<Vec<Cut>>> = Arc::default();
        let slow = Slow::new(base().fork(rng.next()));
        if cut {
            let (history, cuts) = (Arc::clone(&history), Arc::clone(&cuts));
            slow.cut_after(1 + rng.below(80), move |sim| {
                let cut = Cut {
                    device: sim.fork(1),
                    history: lock(&history).clone(),
                };
                lock(&cuts).push(cut);
            });
        }
        let device = Arc::new(slow);
        let pool = Pool::open(Arc::clone(&device) as Arc<dyn BlockDevice>, None, &OPEN);
        let pool = pool.expect("a closed pool opens");
        let find = |name: &str| {
            let found = pool.lookup(Ino::ROOT, name.as_bytes());
            found.expect("the base has it").ino
        };
        let (files, doomed) = (FILES.map(find), Mutex::new(find(DOOMED)));
        if workers {
            pool.start().expect("threads can be made");
        }
        Arc::new(Self {
            device,
            pool,
            files,
            doomed,
            history,
            cuts,
            stamp: Mutex::new(0),
            asked: Mutex::new((0, 0)),
            closing: Mutex::new(false),
            host_is_full: Mutex::new(false),
        })
    }

    pub(crate) fn history(&self) -> MutexGuard<'_, History> {
        lock(&self.history)
    }

    /// A value that nobody wrote before.
    pub(crate) fn stamp(&self) -> u64 {
        let mut stamp = lock(&self.stamp);
        *stamp += 1;
        *stamp
    }

    /// Plans a failure of the device: an error of a write or a sync, or a host that has no space
    /// for a while.
    pub(crate) fn plan_fault(&self, fault: Fault, rng: &mut SplitMix64) {
        let nth = 1 + rng.below(12);
        if fault == Fault::NoSpace {
            *lock(&self.host_is_full) = true;
            for next in 0..1 + rng.below(3) {
                let op = FaultOp::Write;
                self.device.sim.fail(op, nth + next, fault, Repeat::Once);
            }
            return;
        }
        let op = if rng.chance(50) {
            FaultOp::Write
        } else {
            FaultOp::Sync
        };
        self.device.sim.fail(op, nth, fault, Repeat::Once);
    }

    /// Takes the outcome of an operation: `None` if it was refused for a reason there is.
    pub(crate) fn took<T>(&self, outcome: Result<T>, what: &str) -> Option<T> {
        outcome.map_err(|error| self.refused(&error, what)).ok()
    }

    fn refused(&self, error: &Error, what: &str) {
        match error.kind() {
            Kind::Io | Kind::Poisoned if self.pool.poisoned().is_some() => {
                self.history().failure();
            }
            Kind::Busy if *lock(&self.closing) => {}
            Kind::NoSpace if *lock(&self.host_is_full) => {}
            kind => panic!("{what}: {kind:?}: {error}"),
        }
    }

    /// Does an operation that writes registers.
    pub(crate) fn write(
        &self,
        what: &str,
        writes: Vec<(Place, u64)>,
        op: impl FnOnce() -> Result<()>,
    ) {
        let ticket = self.history().begin(writes);
        let outcome = op();
        if self.took(outcome, what).is_some() {
            self.history().end(ticket);
        }
    }

    /// Reads registers of a file.
    pub(crate) fn read(&self, file: u32, halves: std::ops::Range<u32>) {
        let since = self.history().mark();
        let ino = self.files[file as usize];
        if let Some(found) = self.content(ino, file, halves) {
            let until = self.history().mark();
            self.history().saw(since, until, found);
        }
    }

    /// The registers that a file shows, as if it were `file`.
    pub(crate) fn content(
        &self,
        ino: Ino,
        file: u32,
        halves: std::ops::Range<u32>,
    ) -> Option<Vec<(Place, u64)>> {
        let mut bytes = Vec::new();
        let len = halves.len() * HALF;
        let offset = u64::from(halves.start) * HALF as u64;
        let outcome = self.pool.read(ino, offset, len, &mut bytes);
        self.took(outcome, "read")?;
        Some(registers_of(file, halves, &bytes))
    }

    /// A sync, or what is one too.
    pub(crate) fn sync(&self, what: &str, op: impl FnOnce() -> Result<()>) {
        let begun = self.history().mark();
        let outcome = op();
        if self.took(outcome, what).is_some() {
            self.history().synced(begun);
        }
    }

    /// A sync that is answered later.
    pub(crate) fn sync_with(self: &Arc<Self>) {
        let begun = self.history().mark();
        lock(&self.asked).0 += 1;
        let world = Arc::clone(self);
        self.pool.sync_with(Box::new(move |outcome| {
            lock(&world.asked).1 += 1;
            if world.took(outcome, "sync_with").is_some() {
                world.history().synced(begun);
            }
        }));
    }

    /// What was seen of a clone that was made between two moments.
    pub(crate) fn saw(&self, since: Ticket, until: Ticket, values: Vec<(Place, u64)>) {
        self.history().saw(since, until, values);
    }

    /// Closes the pool, compares everything, and what a crash would have left.
    pub(crate) fn finish(&self, rng: &mut SplitMix64) {
        self.device.sim.heal(); // somebody made space on the host
        *lock(&self.closing) = true;
        let closed = self.pool.close();
        let failed = self.history().has_failed() || self.pool.poisoned().is_some();
        if !failed && let Err(error) = &closed {
            assert!(error.kind() == Kind::Busy, "close: {error}"); // somebody closed before
        }
        let (asked, answered) = *lock(&self.asked);
        assert_eq!(asked, answered, "syncs asked for and answered");
        self.history().assert_linearizable();
        let now = Cut {
            device: self.device.sim.crash(rng.next()),
            history: self.history().clone(),
        };
        verify(&now, !failed);
        for cut in lock(&self.cuts).drain(..) {
            let device = cut.device.crash(rng.next());
            verify(&Cut { device, ..cut }, false);
        }
    }
}

/// Opens what a crash left, and compares it. `all`: nothing that completed may be missing.
fn verify(cut: &Cut, all: bool) {
    let device = Arc::new(cut.device.fork(1));
    check(&device, "behind a crash").expect("a crash leaves nothing to be found");
    let pool = Pool::open(device.clone(), None, &OPEN).expect("a pool opens behind a crash");
    let mut found = BTreeMap::new();
    for (file, name) in (0..).zip(FILES) {
        let attr = pool.lookup(Ino::ROOT, name.as_bytes());
        let attr = attr.expect("nobody removes it");
        let mut bytes = Vec::new();
        let read = pool.read(attr.ino, 0, HALVES as usize * HALF, &mut bytes);
        read.expect("the device is sound");
        found.extend(registers_of(file, 0..HALVES, &bytes));
    }
    for place in cut.history.places().filter(|place| place.0 >= NAMES) {
        let name = name_of(place);
        match pool.lookup(Ino::ROOT, name.as_bytes()) {
            Ok(_) => drop(found.insert(place, 1)),
            Err(error) => assert_eq!(error.kind(), Kind::NotFound, "{name}: {error}"),
        }
    }
    cut.history.assert_survived(all, &found);
    pool.close().expect("the device is sound");
    check(&device, "behind recovery").unwrap_or_else(|error| panic!("{error}"));
}

/// The name that a register stands for.
pub(crate) fn name_of(place: Place) -> String {
    format!("n{}-{}", place.0, place.1)
}
