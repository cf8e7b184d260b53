//! Races of real threads on a slow device, each with its own promise: clones are instants, what was
//! synced stays, a close keeps what was acknowledged, nothing that is used is discarded.
//!
//! `tests/shuttle` looks at the same promises with fewer operations and all the more
//! interleavings; here the threads, the memory and the clock are real.
//!
//! `SECONDS=60 SEED=7 cargo test --test races` runs longer, or with other delays.

mod common;

use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::crash::check;
use common::history::{create_options, open};

use nodupe::device::{BlockDevice, SimDevice, SplitMix64};
use nodupe::engine::{FileKind, NewNode, OpenOptions, Pool};
use nodupe::error::{Kind, Result};
use nodupe::units::{Ino, Time};

const MIB: u64 = 1024 * 1024;
const B: usize = 4096;
const CACHE: u64 = 4 * MIB;

fn number(name: &str, default: u64) -> u64 {
    let value = std::env::var(name).ok();
    value.map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|error| panic!("{name}={text}: {error}"))
    })
}

/// How long each test runs.
fn duration() -> Duration {
    Duration::from_millis(1000 * number("SECONDS", 2))
}

/// What an operation does to a range of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Read,
    Write,
    Discard,
}

/// A simulated device that takes its time, and fails the test if a write or a discard overlaps
/// anything that is under way.
#[derive(Debug)]
struct Slow {
    sim: SimDevice,
    rng: Mutex<SplitMix64>,
    busy: Mutex<Vec<(What, u64, u64)>>,
    /// Longest delay of an operation.
    delay_us_max: u64,
}

impl Slow {
    fn new(len: u64, delay_us_max: u64) -> Arc<Self> {
        let seed = number("SEED", 1);
        Arc::new(Self {
            sim: SimDevice::new(len, seed),
            rng: Mutex::new(SplitMix64::new(seed)),
            busy: Mutex::new(Vec::new()),
            delay_us_max,
        })
    }

    fn delay(&self) {
        let micros = self
            .rng
            .lock()
            .expect("nobody panics inside")
            .below(self.delay_us_max + 1);
        std::thread::sleep(Duration::from_micros(micros));
    }

    fn during<T>(&self, what: What, addr: u64, len: u64, op: impl FnOnce() -> T) -> T {
        let mine = (what, addr, addr + len);
        let meets = {
            let mut busy = self.busy.lock().expect("nobody panics inside");
            let meets = busy.iter().copied().find(|(other, from, to)| {
                *from < mine.2 && mine.1 < *to && !(*other == What::Read && what == What::Read)
            });
            busy.push(mine);
            meets
        };
        if meets.is_some() {
            // A panic in a background thread alone would go unseen.
            eprintln!("{mine:?} meets {meets:?} on the device");
            std::process::abort();
        }
        self.delay();
        let outcome = op();
        self.delay();
        let mut busy = self.busy.lock().expect("nobody panics inside");
        let at = busy.iter().position(|other| *other == mine);
        busy.swap_remove(at.expect("it was put there"));
        outcome
    }
}

impl BlockDevice for Slow {
    fn len(&self) -> u64 {
        self.sim.len()
    }

    fn read_at(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        let len = buf.len() as u64;
        self.during(What::Read, addr, len, || self.sim.read_at(addr, buf))
    }

    fn write_at(&self, addr: u64, data: &[u8]) -> io::Result<()> {
        let len = data.len() as u64;
        self.during(What::Write, addr, len, || self.sim.write_at(addr, data))
    }

    fn sync(&self) -> io::Result<()> {
        self.delay();
        let outcome = self.sim.sync();
        self.delay();
        outcome
    }

    fn discard(&self, addr: u64, len: u64) -> io::Result<()> {
        self.during(What::Discard, addr, len, || self.sim.discard(addr, len))
    }
}

/// A new pool on a new slow device, with its threads.
fn new_pool(size: u64, delay_us_max: u64) -> (Arc<Slow>, Arc<Pool>) {
    let device = Slow::new(size, 0);
    Pool::create(device.clone(), None, &create_options(1, MIB)).expect("a pool is made");
    let sim = device.sim.fork(1);
    let device = Arc::new(Slow {
        sim,
        rng: Mutex::new(SplitMix64::new(number("SEED", 1))),
        busy: Mutex::new(Vec::new()),
        delay_us_max,
    });
    let options = OpenOptions {
        read_only: false,
        cache_size: CACHE,
    };
    let pool = Pool::open(device.clone(), None, &options).expect("a new pool opens");
    pool.start().expect("threads can be made");
    (device, pool)
}

fn make(pool: &Pool, dir: Ino, name: &str, kind: FileKind) -> Ino {
    let node = NewNode {
        kind,
        mode: 0o700,
        uid: 0,
        gid: 0,
        rdev: 0,
        target: b"",
    };
    let made = pool.create_node(dir, name.as_bytes(), &node, Time::default());
    made.expect("there is room").ino
}

fn create(pool: &Pool, name: &str) -> Ino {
    make(pool, Ino::ROOT, name, FileKind::Regular)
}

fn remove(pool: &Pool, dir: Ino, name: &str) {
    let gone = pool.unlink(dir, name.as_bytes(), Time::default());
    let ino = gone.expect("the name exists").ino;
    pool.reclaim(ino).expect("deleting always works");
}

/// Blocks that all hold `stamp`.
fn blocks(stamp: u64, count: usize) -> Vec<u8> {
    stamp.to_le_bytes().repeat(count * B / 8)
}

fn write(pool: &Pool, ino: Ino, block: u64, stamp: u64, count: usize) -> Result<()> {
    let data = blocks(stamp, count);
    pool.write(ino, block * B as u64, &data, Time::default())
}

/// The stamps of the blocks of a file; each block must hold one.
fn stamps(pool: &Pool, ino: Ino, count: usize) -> Vec<u64> {
    let mut bytes = Vec::new();
    pool.read(ino, 0, count * B, &mut bytes)
        .expect("the device is sound");
    bytes.resize(count * B, 0);
    bytes
        .chunks_exact(B)
        .map(|block| {
            let mut stamps = block
                .chunks_exact(8)
                .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
            let first = stamps.next().unwrap_or(0);
            assert!(stamps.all(|stamp| stamp == first), "a block is a mix");
            first
        })
        .collect()
}

/// Closes, and opens what is durable.
fn reopen(device: &Slow, pool: &Pool) -> Arc<Pool> {
    pool.close().expect("the device is sound");
    let device = Arc::new(device.sim.crash_none());
    check(&device, "behind the race").unwrap_or_else(|error| panic!("{error}"));
    open(&device, CACHE).expect("a closed pool opens")
}

/// Writes of the load in their order, again and again: file, block, blocks. The third is direct.
const SLOTS: [(usize, u64, usize); 4] = [(0, 0, 1), (1, 0, 2), (0, 1, 16), (1, 2, 1)];
/// Blocks of a file of the load.
const LOAD_BLOCKS: usize = 17;

/// What the slots show behind so many writes.
fn prefix(writes: u64) -> [u64; SLOTS.len()] {
    let count = SLOTS.len() as u64;
    std::array::from_fn(|slot| {
        let slot = slot as u64 + 1;
        if writes < slot {
            return 0;
        }
        (writes - slot) / count * count + slot
    })
}

fn shown(pool: &Pool, files: [Ino; 2]) -> [u64; SLOTS.len()] {
    let files = files.map(|ino| stamps(pool, ino, LOAD_BLOCKS));
    SLOTS.map(|(file, block, count)| {
        let part = &files[file][block as usize..][..count];
        assert!(
            part.iter().all(|stamp| *stamp == part[0]),
            "a write was seen in part: {part:?}"
        );
        part[0]
    })
}

#[test]
fn clones_under_load_are_instants() {
    let (device, pool) = new_pool(24 * MIB, 200);
    let tree = make(&pool, Ino::ROOT, "tree", FileKind::Directory);
    let files = ["a", "b"].map(|name| make(&pool, tree, name, FileKind::Regular));
    let (begun, ended) = (AtomicU64::new(0), AtomicU64::new(0));
    let until = Instant::now() + duration();
    let mut clones = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for stamp in 1.. {
                if Instant::now() >= until {
                    return;
                }
                let (file, block, count) = SLOTS[(stamp - 1) as usize % SLOTS.len()];
                begun.store(stamp, Ordering::SeqCst);
                write(&pool, files[file], block, stamp, count).expect("there is room");
                ended.store(stamp, Ordering::SeqCst);
            }
        });
        scope.spawn(|| {
            while Instant::now() < until {
                pool.checkpoint().expect("the device is sound");
            }
        });
        while Instant::now() < until {
            let least = ended.load(Ordering::SeqCst);
            let names = [b"copy".to_vec()];
            pool.clone_tree(tree, Ino::ROOT, &names, None, Time::default())
                .expect("there is room");
            let most = begun.load(Ordering::SeqCst);
            let copy = pool.lookup(Ino::ROOT, b"copy").expect("it was made").ino;
            let copies = [b"a", b"b"].map(|name| pool.lookup(copy, name).expect("it is there"));
            let shown = shown(&pool, copies.map(|attr| attr.ino));
            assert!(
                (least..=most).any(|writes| prefix(writes) == shown),
                "a clone shows {shown:?}, no prefix of {least} to {most} writes"
            );
            for name in ["a", "b"] {
                remove(&pool, copy, name);
            }
            let gone = pool.rmdir(Ino::ROOT, b"copy", Time::default());
            pool.reclaim(gone.expect("it is empty").ino)
                .expect("deleting always works");
            clones += 1;
        }
    });
    let writes = ended.load(Ordering::SeqCst);
    eprintln!("{clones} clones beside {writes} writes");
    let pool = reopen(&device, &pool);
    assert_eq!(shown(&pool, files), prefix(writes));
}

#[test]
fn syncs_hold_beside_checkpoints() {
    const WRITERS: usize = 3;
    let (device, pool) = new_pool(24 * MIB, 200);
    let files: [Ino; WRITERS] = std::array::from_fn(|id| create(&pool, &format!("w{id}")));
    pool.sync().expect("the device is sound");
    let durable: [AtomicU64; WRITERS] = Default::default();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (id, ino) in files.iter().enumerate() {
            let (pool, durable, stop) = (&pool, &durable[id], &stop);
            scope.spawn(move || {
                for stamp in 1.. {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    // Staged or direct, by turns.
                    let count = if stamp % 5 == 0 { 16 } else { 1 };
                    write(pool, *ino, 0, stamp, count).expect("there is room");
                    pool.sync().expect("the device is sound");
                    durable.store(stamp, Ordering::SeqCst);
                }
            });
        }
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                pool.checkpoint().expect("the device is sound");
            }
        });
        let until = Instant::now() + duration();
        let mut crashes = 0;
        while Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
            let least = durable.each_ref().map(|stamp| stamp.load(Ordering::SeqCst));
            let left = Arc::new(device.sim.crash(crashes));
            check(&left, "behind a crash").unwrap_or_else(|error| panic!("{error}"));
            let left = open(&left, CACHE).expect("a pool opens behind a crash");
            for (ino, least) in files.iter().zip(least) {
                let found = stamps(&left, *ino, 1)[0];
                assert!(found >= least, "found {found}, synced was {least}");
            }
            crashes += 1;
        }
        stop.store(true, Ordering::SeqCst);
        eprintln!("{crashes} crashes, synced: {durable:?}");
    });
    pool.close().expect("the device is sound");
}

#[test]
fn a_busy_pool_closes_and_keeps_what_it_acknowledged() {
    const WRITERS: usize = 4;
    let until = Instant::now() + duration();
    let mut rounds = 0;
    while Instant::now() < until || rounds == 0 {
        let (device, pool) = new_pool(24 * MIB, 100);
        let files: [Ino; WRITERS] = std::array::from_fn(|id| create(&pool, &format!("w{id}")));
        let last: [AtomicU64; WRITERS] = Default::default();
        std::thread::scope(|scope| {
            for (id, ino) in files.iter().enumerate() {
                let (pool, last) = (&pool, &last[id]);
                scope.spawn(move || {
                    for stamp in 1.. {
                        let count = if id == 0 { 16 } else { 1 };
                        match write(pool, *ino, 0, stamp, count) {
                            Ok(()) => last.store(stamp, Ordering::SeqCst),
                            Err(error) => {
                                assert_eq!(error.kind(), Kind::Busy, "{error}");
                                return;
                            }
                        }
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(rounds % 7 * 5));
            pool.close().expect("the device is sound");
        });
        let device = Arc::new(device.sim.crash_none());
        check(&device, "behind a close").unwrap_or_else(|error| panic!("{error}"));
        let pool = open(&device, CACHE).expect("a closed pool opens");
        for (ino, last) in files.iter().zip(&last) {
            let (found, last) = (stamps(&pool, *ino, 1)[0], last.load(Ordering::SeqCst));
            // The write that close refused may be there.
            assert!(found == last || found == last + 1, "{found} for {last}");
        }
        rounds += 1;
    }
    eprintln!("{rounds} pools closed");
}

#[test]
fn discards_spare_what_is_allocated_again() {
    let (device, pool) = new_pool(16 * MIB, 100);
    let until = Instant::now() + duration();
    let refused = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for id in 0..3_u64 {
            let (pool, refused) = (&pool, &refused);
            scope.spawn(move || {
                let mut rng = SplitMix64::new(id);
                for round in 1.. {
                    if Instant::now() >= until {
                        return;
                    }
                    let name = format!("w{id}-{round}");
                    let ino = create(pool, &name);
                    let count = 16 + rng.index(100);
                    match write(pool, ino, 0, round, count) {
                        Ok(()) => {
                            let found = stamps(pool, ino, count);
                            assert!(found.iter().all(|stamp| *stamp == round), "{name}");
                        }
                        Err(error) => {
                            assert_eq!(error.kind(), Kind::NoSpace, "{error}");
                            refused.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                    remove(pool, Ino::ROOT, &name);
                }
            });
        }
        scope.spawn(|| {
            while Instant::now() < until {
                pool.checkpoint().expect("the device is sound");
            }
        });
    });
    let counts = device.sim.counts();
    eprintln!(
        "{} discards beside {} writes, {} refused",
        counts.discards,
        counts.writes,
        refused.load(Ordering::SeqCst)
    );
    assert!(counts.discards > 0, "nothing was discarded");
    reopen(&device, &pool);
}

#[test]
fn truncates_writes_and_clones_of_one_file_mix_no_block() {
    const BLOCKS: usize = 20;
    let (device, pool) = new_pool(24 * MIB, 50);
    let shared = create(&pool, "shared");
    let newest = AtomicU64::new(0);
    let until = Instant::now() + duration();
    std::thread::scope(|scope| {
        for id in 0..2_u64 {
            let (pool, newest) = (&pool, &newest);
            scope.spawn(move || {
                let mut rng = SplitMix64::new(id);
                while Instant::now() < until {
                    let stamp = newest.fetch_add(1, Ordering::SeqCst) + 1;
                    let (block, count) = if rng.chance(30) {
                        (rng.below(4), 16)
                    } else {
                        (rng.below(18), 2)
                    };
                    write(pool, shared, block, stamp, count).expect("there is room");
                }
            });
        }
        scope.spawn(|| {
            let mut rng = SplitMix64::new(7);
            while Instant::now() < until {
                // Only whole blocks: what is left of a block would be a mix in this test.
                let size = rng.below(BLOCKS as u64 + 1) * B as u64;
                pool.truncate(shared, size, Time::default())
                    .expect("there is room");
                pool.punch(shared, 0, B as u64 * rng.below(4), Time::default())
                    .expect("there is room");
            }
        });
        for round in 0_u64.. {
            if Instant::now() >= until {
                break;
            }
            let name = format!("c{round}");
            let copy = create(&pool, &name);
            pool.clone_file(shared, copy, Time::default())
                .expect("there is room");
            let most = newest.load(Ordering::SeqCst);
            let found = stamps(&pool, copy, BLOCKS);
            assert!(found.iter().all(|stamp| *stamp <= most), "{found:?}");
            assert_eq!(found, stamps(&pool, copy, BLOCKS), "a clone changed");
            remove(&pool, Ino::ROOT, &name);
        }
    });
    let found = stamps(&pool, shared, BLOCKS);
    let pool = reopen(&device, &pool);
    assert_eq!(found, stamps(&pool, shared, BLOCKS));
}
