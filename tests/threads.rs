//! Many threads at once on a pool whose limits are all tiny: nothing is lost, nothing deadlocks.
//!
//! Each thread owns some files and keeps their contents as plain vectors, so that every read can
//! be compared at once and everything once more behind a close and a reopen. What threads share
//! are the pool's limits, its locks, and one golden file that nobody writes.
//!
//! `SECONDS=60 SEED=7 cargo test --test threads` runs longer, or another history; threads make no
//! run repeat another one exactly.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::crash::check;
use common::generate::random_bytes;
use common::history::{create_options, open};

use nodupe::device::{BlockDevice, FileDevice, OpenMode, SimDevice, SplitMix64};
use nodupe::engine::{NewNode, OpenOptions, Pool};
use nodupe::error::Kind;
use nodupe::units::{Ino, Time};

/// Longest time in which no thread may finish any operation.
const PATIENCE: Duration = Duration::from_secs(60);
/// Threads that change files, each with files of its own.
const WRITERS: u64 = 6;
/// Bytes of the golden file, and most bytes of any other.
const FILE_MAX: usize = 768 * 1024;

fn now() -> Time {
    Time::now()
}

fn number(name: &str, default: u64) -> u64 {
    let value = std::env::var(name).ok();
    value.map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|error| panic!("{name}={text}: {error}"))
    })
}

/// What all threads share.
struct Stress {
    pool: Arc<Pool>,
    gold: Ino,
    gold_bytes: Vec<u8>,
    until: Instant,
    /// Operations done, so that the watchdog sees life.
    done: AtomicU64,
    /// Operations refused because the pool was full.
    refused: AtomicU64,
    finished: AtomicBool,
}

/// A thread's files: names and contents.
type Files = BTreeMap<String, (Ino, Vec<u8>)>;

fn create(pool: &Pool, name: &str) -> nodupe::error::Result<Ino> {
    let node = NewNode::regular(0o600);
    Ok(pool
        .create_node(Ino::ROOT, name.as_bytes(), &node, now())?
        .ino)
}

impl Stress {
    /// Takes the outcome of an operation: false if the pool was full.
    fn took(&self, outcome: nodupe::error::Result<()>, what: &str) -> bool {
        self.done.fetch_add(1, Ordering::Relaxed);
        match outcome {
            Ok(()) => true,
            Err(error) if error.kind() == Kind::NoSpace => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                false
            }
            Err(error) => panic!("{what}: {:?}: {error}", error.kind()),
        }
    }

    /// Takes the outcome of an operation that needs no space.
    fn must<T>(&self, outcome: nodupe::error::Result<T>, what: &str) -> T {
        self.done.fetch_add(1, Ordering::Relaxed);
        outcome.unwrap_or_else(|error| panic!("{what}: {:?}: {error}", error.kind()))
    }

    fn compare(&self, name: &str, ino: Ino, bytes: &[u8], offset: usize, len: usize) {
        let mut found = Vec::new();
        let read = self.pool.read(ino, offset as u64, len, &mut found);
        read.unwrap_or_else(|error| panic!("read of {name}: {error}"));
        let end = (offset + len).min(bytes.len());
        let wanted = bytes.get(offset..end).unwrap_or_default();
        assert!(found == wanted, "{name}: wrong bytes at {offset}, {len}");
    }

    fn write(&self, name: &str, ino: Ino, bytes: &mut Vec<u8>, rng: &mut SplitMix64) {
        let len = match rng.below(8) {
            0 => rng.index(5000) + 1,
            1..5 => (rng.index(4) + 1) * 4096,
            5..7 => (rng.index(16) + 16) * 4096, // direct
            _ => rng.index(40_000) + 1,
        };
        let skew = if rng.chance(30) { rng.index(4096) } else { 0 };
        let offset = rng.index(FILE_MAX - len) / 4096 * 4096 + skew;
        let data = if rng.chance(10) {
            vec![0; len]
        } else {
            random_bytes(rng, len)
        };
        let outcome = self.pool.write(ino, offset as u64, &data, now());
        if self.took(outcome, "write") {
            let end = offset + len;
            bytes.resize(bytes.len().max(end), 0);
            bytes[offset..end].copy_from_slice(&data);
        } else {
            self.relearn(name, ino, bytes);
        }
    }

    /// A write that was refused may have been done in part.
    fn relearn(&self, name: &str, ino: Ino, bytes: &mut Vec<u8>) {
        bytes.clear();
        let read = self.pool.read(ino, 0, 2 * FILE_MAX, bytes);
        read.unwrap_or_else(|error| panic!("read of {name}: {error}"));
    }

    /// One operation of a writer on its own files.
    fn step(&self, id: u64, files: &mut Files, rng: &mut SplitMix64, serial: &mut u64) {
        let names: Vec<String> = files.keys().cloned().collect();
        if names.len() < 2 || (names.len() < 6 && rng.chance(3)) {
            *serial += 1;
            let name = format!("w{id}-{serial}");
            match create(&self.pool, &name) {
                Ok(ino) => drop(files.insert(name, (ino, Vec::new()))),
                Err(error) => {
                    self.took(Err(error), "create");
                    return;
                }
            }
            return;
        }
        let name = &names[rng.index(names.len())];
        let (ino, mut bytes) = files.remove(name).unwrap_or_else(|| unreachable!());
        let mut lives = true;
        match rng.below(100) {
            0..50 => self.write(name, ino, &mut bytes, rng),
            50..75 => {
                let offset = rng.index(bytes.len() + 1);
                self.compare(name, ino, &bytes, offset, rng.index(100_000) + 1);
                self.done.fetch_add(1, Ordering::Relaxed);
            }
            75..83 => {
                self.must(self.pool.sync(), "sync");
            }
            83..88 => {
                let size = rng.index(bytes.len() + 10_000);
                let size = if rng.chance(30) { 0 } else { size };
                let outcome = self.pool.truncate(ino, size as u64, now());
                if self.took(outcome.map(drop), "truncate") {
                    bytes.resize(size, 0);
                }
            }
            88..92 => {
                let offset = rng.index(bytes.len() + 1);
                let end = (offset + rng.index(60_000)).min(bytes.len());
                let len = (end - offset) as u64;
                let outcome = self.pool.punch(ino, offset as u64, len, now());
                if self.took(outcome, "punch") {
                    bytes[offset..end].fill(0);
                }
            }
            92..95 => {
                let outcome = self.pool.clone_file(self.gold, ino, now());
                if self.took(outcome, "clone of gold") {
                    bytes.clone_from(&self.gold_bytes);
                }
            }
            95..98 => {
                // The file itself is out of the map, and there were at least two.
                if let Some((other, other_bytes)) = files.values().nth(rng.index(files.len())) {
                    let outcome = self.pool.clone_file(*other, ino, now());
                    if self.took(outcome, "clone") {
                        bytes.clone_from(other_bytes);
                    }
                }
            }
            _ => {
                self.must(
                    self.pool.unlink(Ino::ROOT, name.as_bytes(), now()),
                    "unlink",
                );
                self.must(self.pool.reclaim(ino), "reclaim");
                lives = false;
            }
        }
        if lives {
            files.insert(name.clone(), (ino, bytes));
        }
    }

    fn writer(&self, id: u64, seed: u64) -> Files {
        let mut rng = SplitMix64::new(seed * 1000 + id);
        let mut files = Files::new();
        let mut serial = 0;
        while Instant::now() < self.until {
            self.step(id, &mut files, &mut rng, &mut serial);
        }
        files
    }

    /// Reads the golden file and looks at everything, always.
    fn reader(&self, seed: u64) {
        let mut rng = SplitMix64::new(seed ^ 0xbead);
        while Instant::now() < self.until {
            let offset = rng.index(FILE_MAX);
            self.compare("gold", self.gold, &self.gold_bytes, offset, 70_000);
            let usage = self.pool.usage();
            assert!(usage.used <= usage.total, "{usage:?}");
            let listed = self.pool.read_dir(Ino::ROOT, 0, 100);
            listed.unwrap_or_else(|error| panic!("read_dir: {error}"));
            self.done.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Checkpoints and whole clones in the middle of everything.
    fn disturber(&self, seed: u64) {
        let mut rng = SplitMix64::new(seed ^ 0xd157);
        for round in 0_u64.. {
            if Instant::now() >= self.until {
                return;
            }
            std::thread::sleep(Duration::from_millis(rng.below(40)));
            if rng.chance(50) {
                self.must(self.pool.checkpoint(), "checkpoint");
                continue;
            }
            let names: Vec<Vec<u8>> = (0..10)
                .map(|index| format!("many{round}-{index}").into_bytes())
                .collect();
            let outcome = self
                .pool
                .clone_tree(self.gold, Ino::ROOT, &names, None, now());
            if !self.took(outcome, "clone_tree") {
                continue;
            }
            for name in names {
                let attr = self.must(self.pool.unlink(Ino::ROOT, &name, now()), "unlink");
                self.compare("clone", attr.ino, &self.gold_bytes, 12_345, 5_000);
                self.must(self.pool.reclaim(attr.ino), "reclaim");
            }
        }
    }

    /// Ends the process if nothing happens any more: a deadlock cannot be joined.
    fn watch(&self) {
        let (mut last, mut since) = (0, Instant::now());
        while !self.finished.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(100));
            let done = self.done.load(Ordering::Relaxed);
            if done != last {
                (last, since) = (done, Instant::now());
            }
            if since.elapsed() > PATIENCE {
                eprintln!(
                    "DEADLOCK: no operation finished for {PATIENCE:?}, behind {done} operations"
                );
                std::process::abort();
            }
        }
    }
}

/// Runs the threads on a pool on `device`, and closes it. Returns what must be in it.
fn run(device: Arc<dyn BlockDevice>, cache_size: u64, seconds: u64, seed: u64) -> Files {
    let options = OpenOptions {
        read_only: false,
        cache_size,
    };
    let pool = Pool::open(device, None, &options).expect("a new pool opens");
    let gold = create(&pool, "gold").expect("an empty pool has room");
    let gold_bytes = random_bytes(&mut SplitMix64::new(seed), FILE_MAX);
    pool.write(gold, 0, &gold_bytes, now())
        .expect("an empty pool has room");
    pool.start().expect("threads can be made");
    let stress = Stress {
        pool,
        gold,
        gold_bytes,
        until: Instant::now() + Duration::from_secs(seconds),
        done: AtomicU64::new(0),
        refused: AtomicU64::new(0),
        finished: AtomicBool::new(false),
    };
    let mut all = Files::new();
    std::thread::scope(|scope| {
        let stress = &stress;
        scope.spawn(|| stress.watch());
        let writers: Vec<_> = (0..WRITERS)
            .map(|id| scope.spawn(move || stress.writer(id, seed)))
            .collect();
        let others = [
            scope.spawn(|| stress.reader(seed)),
            scope.spawn(|| stress.disturber(seed)),
        ];
        // A thread that panicked must not leave the others to the watchdog.
        let writers: Vec<_> = writers.into_iter().map(|thread| thread.join()).collect();
        let others = others.map(|thread| thread.join());
        let closed = stress.pool.close();
        stress.finished.store(true, Ordering::Relaxed);
        for files in writers {
            all.extend(files.expect("a writer found no difference"));
        }
        for other in others {
            other.expect("nobody found a difference");
        }
        closed.expect("the pool closes");
    });
    all.insert("gold".into(), (gold, stress.gold_bytes.clone()));
    eprintln!(
        "{} operations, {} refused for want of space, {} files left",
        stress.done.load(Ordering::Relaxed),
        stress.refused.load(Ordering::Relaxed),
        all.len()
    );
    all
}

/// Compares all files of a pool that was opened again.
fn compare_all(pool: &Pool, files: &Files) {
    for (name, (ino, bytes)) in files {
        let attr = pool.lookup(Ino::ROOT, name.as_bytes());
        let attr = attr.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((attr.ino, attr.size), (*ino, bytes.len() as u64), "{name}");
        let mut found = Vec::new();
        let read = pool.read(*ino, 0, bytes.len() + 1, &mut found);
        read.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(found == *bytes, "{name} differs behind a reopen");
    }
    let listed = pool.read_dir(Ino::ROOT, 0, 10_000);
    let listed = listed.unwrap_or_else(|error| panic!("read_dir: {error}"));
    assert_eq!(listed.len(), files.len(), "names too many");
}

fn stress_simulated(pool_size: u64, journal_size: u64, cache_size: u64) {
    let (seconds, seed) = (number("SECONDS", 4), number("SEED", 1));
    let device = Arc::new(SimDevice::new(pool_size, seed));
    let options = create_options(seed, journal_size);
    Pool::create(device.clone(), None, &options).expect("a pool is made");
    let files = run(device.clone(), cache_size, seconds, seed);
    // Not a byte may depend on what was only in memory.
    let device = Arc::new(device.crash_none());
    check(&device, "behind the threads").unwrap_or_else(|error| panic!("{error}"));
    let pool = open(&device, cache_size).expect("a closed pool opens");
    compare_all(&pool, &files);
}

const MIB: u64 = 1024 * 1024;

#[test]
fn threads_share_a_pool_with_a_tiny_journal() {
    stress_simulated(96 * MIB, MIB, 4 * MIB);
}

#[test]
fn threads_share_a_pool_that_is_nearly_full() {
    stress_simulated(7 * MIB, MIB, 4 * MIB);
}

#[test]
fn threads_share_a_pool_in_a_file() {
    let (seconds, seed) = (number("SECONDS", 4), number("SEED", 1));
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("pool");
    let device = FileDevice::create(&path, Some(128 * MIB), false).expect("a file is made");
    let options = create_options(seed, 4 * MIB);
    Pool::create(Arc::new(device), None, &options).expect("a pool is made");
    let device = FileDevice::open(&path, OpenMode::ReadWrite).expect("nobody holds the file");
    let files = run(Arc::new(device), 8 * MIB, seconds, seed);
    let device = FileDevice::open(&path, OpenMode::ReadWrite).expect("the pool let go of it");
    let findings = Pool::check(&device, None, &mut |_, _| {}).expect("a pool is there");
    assert_eq!(findings, []);
    let options = OpenOptions {
        read_only: true,
        cache_size: 8 * MIB,
    };
    let pool = Pool::open(Arc::new(device), None, &options).expect("a closed pool opens");
    compare_all(&pool, &files);
}
