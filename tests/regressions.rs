//! Bugs that were found once, each with a small test of its own.

mod common;

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::crash::{Geometry, TINY, check, new_pool};
use common::history::open;

use nodupe::device::{BlockDevice, Fault, FaultOp, Repeat, SimDevice};
use nodupe::engine::{NewNode, OpenOptions, Pool, XattrMode};
use nodupe::error::Kind;
use nodupe::ondisk::superblock::HEAD_BLOCKS;
use nodupe::units::{Ino, Time};

fn create(pool: &Pool, name: &str) -> Ino {
    let node = NewNode::regular(0o600);
    let made = pool.create_node(Ino::ROOT, name.as_bytes(), &node, Time::default());
    made.expect("there is room").ino
}

/// Runs `work` on a thread of its own and waits for it, but not for ever.
fn within(limit: Duration, what: &str, work: impl FnOnce() + Send + 'static) {
    let (sender, receiver) = mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        work();
        drop(sender);
    });
    match receiver.recv_timeout(limit) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{what} took longer than {limit:?}"),
        _ => thread.join().expect("the work succeeds"),
    }
}

#[test]
fn large_records_of_many_threads_fit_the_journal() {
    // All passed the limit of the queue at once, and together overran the part of the ring that
    // is kept for checkpoints.
    let (_, pool) = new_pool(&TINY, 1).expect("a pool is made");
    pool.start().expect("threads can be made");
    let inos: Vec<Ino> = (0..16).map(|i| create(&pool, &format!("f{i}"))).collect();
    let worker = Arc::clone(&pool);
    within(Duration::from_secs(60), "setting attributes", move || {
        std::thread::scope(|scope| {
            for ino in inos {
                let pool = &worker;
                scope.spawn(move || {
                    for round in 0..40_u8 {
                        let value = vec![round; 60_000];
                        let now = Time::default();
                        pool.set_xattr(ino, b"user.large", &value, XattrMode::Set, now)
                            .expect("there is room");
                        if round % 8 == 0 {
                            pool.sync().expect("the device is sound");
                        }
                    }
                });
            }
        });
    });
    pool.close().expect("the device is sound");
}

#[test]
fn a_poisoned_pool_lets_nobody_wait() {
    // Whoever waited for a checkpoint that was never written waited for ever.
    for nth in (1..60).step_by(6) {
        let (device, pool) = new_pool(&TINY, nth).expect("a pool is made");
        let ino = create(&pool, "file");
        pool.start().expect("threads can be made");
        device.fail(FaultOp::Write, nth, Fault::Io, Repeat::Forever);
        let refused = Arc::new(AtomicUsize::new(0));
        let (worker, counter) = (Arc::clone(&pool), Arc::clone(&refused));
        within(Duration::from_secs(30), "failing", move || {
            std::thread::scope(|scope| {
                for thread in 0..6_u64 {
                    let (pool, counter) = (&worker, &counter);
                    scope.spawn(move || {
                        let data = vec![thread as u8 + 1; 40_000];
                        for round in 0.. {
                            let offset = (thread * 50 + round % 50) * 4096;
                            let written = pool.write(ino, offset, &data, Time::default());
                            if written.and_then(|()| pool.sync()).is_err() {
                                break;
                            }
                        }
                        let again = pool.sync().expect_err("the device is gone");
                        assert_eq!(again.kind(), Kind::Poisoned);
                        counter.fetch_add(1, Ordering::Relaxed);
                    });
                }
            });
        });
        assert_eq!(refused.load(Ordering::Relaxed), 6);
        pool.close().expect_err("nothing more can be made durable");
    }
}

#[test]
fn the_copy_of_a_damaged_superblock_is_as_new() {
    // The older slot was taken, although a copy of the newer one was there: whatever was
    // acknowledged since then was lost without a word.
    let (device, pool) = new_pool(&TINY, 3).expect("a pool is made");
    create(&pool, "old");
    pool.checkpoint().expect("the device is sound");
    create(&pool, "new");
    pool.close().expect("the device is sound");
    let image = device.crash_all();
    // A closed pool needs no journal, which could have hidden the loss.
    let zeros = vec![0; TINY.journal_size as usize];
    image
        .write_at(HEAD_BLOCKS * 4096, &zeros)
        .expect("a sound device writes");
    for slot in 0..2 {
        let damaged = Arc::new(image.fork(0));
        damaged.flip(slot * 4096 + 100, 3);
        let pool = open(&damaged, TINY.cache_size).expect("a copy is whole");
        for name in [&b"old"[..], b"new"] {
            let found = pool.lookup(Ino::ROOT, name);
            found.unwrap_or_else(|error| panic!("slot {slot}: {error}"));
        }
    }
}

#[test]
fn a_split_run_of_references_keeps_its_bitmap_right() {
    // Reference counts of a long run change one by one, in an order that splits and joins their
    // records in the middle; what a checkpoint stored must agree with the free blocks.
    let (device, pool) = new_pool(&TINY, 4).expect("a pool is made");
    let source = create(&pool, "source");
    let data: Vec<u8> = (0..1_200_000_u32).map(|i| (i / 7) as u8 | 1).collect();
    let now = Time::default();
    pool.write(source, 0, &data, now).expect("there is room");
    pool.checkpoint().expect("the device is sound");
    for round in 0..12_u64 {
        let clone = create(&pool, &format!("clone{round}"));
        for piece in 0..40 {
            let at = (piece * 7 + round) % 280 * 4096;
            let done = pool.clone_range(source, at, clone, at, 4096, now);
            assert_eq!(done.expect("there is room"), 4096);
        }
        pool.punch(source, (round * 23) * 4096, 3 * 4096, now)
            .expect("a hole needs no room");
        pool.checkpoint().expect("the device is sound");
        let image: SimDevice = device.crash_none();
        assert_eq!(image.len(), TINY.pool_size);
        check(&image, "in the middle").unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
}

/// A device that does something once, just before a superblock is written.
struct Hooked {
    sim: Arc<SimDevice>,
    hook: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl std::fmt::Debug for Hooked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hooked")
    }
}

impl BlockDevice for Hooked {
    fn len(&self) -> u64 {
        self.sim.len()
    }

    fn read_at(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        self.sim.read_at(addr, buf)
    }

    fn write_at(&self, addr: u64, data: &[u8]) -> io::Result<()> {
        if addr < 2 * 4096 {
            let hook = self.hook.lock().expect("nobody panics inside").take();
            if let Some(hook) = hook {
                hook();
            }
        }
        self.sim.write_at(addr, data)
    }

    fn sync(&self) -> io::Result<()> {
        self.sim.sync()
    }

    fn discard(&self, addr: u64, len: u64) -> io::Result<()> {
        self.sim.discard(addr, len)
    }
}

/// What round `round` writes: with the head of its batch 16 blocks of the journal.
fn piece(round: usize) -> Vec<u8> {
    vec![round as u8 + 1; 15 * 4096]
}

/// Writes and syncs pieces until all are done, counting those that are durable.
fn write_and_sync(pool: &Pool, ino: Ino, count: usize, durable: &AtomicUsize) {
    for round in 0..count {
        let data = piece(round);
        let offset = (round * data.len()) as u64;
        pool.write(ino, offset, &data, Time::default())
            .and_then(|()| pool.sync())
            .expect("the device is sound");
        durable.store(round + 1, Ordering::SeqCst);
    }
}

#[test]
fn the_journal_is_kept_until_the_superblock_is_written() {
    // Syncs go on while a checkpoint is written. They must not overwrite what the superblock that
    // still counts needs for its replay: the ring has 256 blocks, and a
    // write waits for a checkpoint when half of them are used.
    const BEFORE: usize = 9;
    const MEANWHILE: usize = 12;
    let (sim, pool) = new_pool(&TINY, 5).expect("a pool is made");
    pool.close().expect("the device is sound");
    drop(pool);
    let device = Arc::new(Hooked {
        sim: Arc::clone(&sim),
        hook: Mutex::new(None),
    });
    let options = OpenOptions {
        read_only: false,
        cache_size: TINY.cache_size,
    };
    let pool = Pool::open(device.clone(), None, &options).expect("the pool is sound");
    let (old, new) = (create(&pool, "old"), create(&pool, "new"));
    pool.checkpoint().expect("the device is sound");
    write_and_sync(&pool, old, BEFORE, &AtomicUsize::new(0));

    let durable = Arc::new(AtomicUsize::new(0));
    let (sender, receiver) = mpsc::channel();
    let (worker, counter) = (Arc::clone(&pool), Arc::clone(&durable));
    *device.hook.lock().expect("nobody panics inside") = Some(Box::new(move || {
        let written = Arc::clone(&counter);
        let writer = std::thread::spawn(move || write_and_sync(&worker, new, MEANWHILE, &written));
        // It ends, or waits for this checkpoint because the ring is full.
        let mut seen = usize::MAX;
        while seen != counter.load(Ordering::SeqCst) && seen != MEANWHILE {
            seen = counter.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(300));
        }
        let promised = counter.load(Ordering::SeqCst);
        sender
            .send((promised, sim.crash_all(), writer))
            .expect("the test waits");
    }));
    pool.checkpoint().expect("the device is sound");
    let (promised, image, writer) = receiver.recv().expect("a superblock was written");
    writer.join().expect("there is room behind the checkpoint");
    pool.close().expect("the device is sound");

    let pool = open(&Arc::new(image), TINY.cache_size).expect("a crash leaves a sound pool");
    for (ino, count) in [(old, BEFORE), (new, promised)] {
        for round in 0..count {
            let (mut found, wanted) = (Vec::new(), piece(round));
            let offset = (round * wanted.len()) as u64;
            pool.read(ino, offset, wanted.len(), &mut found)
                .expect("the device is sound");
            assert!(found == wanted, "round {round} of {ino:?} is lost");
        }
    }
}

#[test]
fn a_journal_never_takes_long_to_replay() {
    // Discards take few bytes and long to replay: a ring that has room for a million of them is
    // freed by a checkpoint long before.
    const DISCARDS: u64 = 300_000;
    let geometry = Geometry {
        pool_size: 256 * 1024 * 1024,
        journal_size: 64 * 1024 * 1024,
        ..TINY
    };
    let (_, pool) = new_pool(&geometry, 6).expect("a pool is made");
    let ino = create(&pool, "file");
    pool.truncate(ino, 1 << 30, Time::default())
        .expect("there is room");
    pool.checkpoint().expect("the device is sound");
    let before = pool.info().generation;
    for n in 0..DISCARDS {
        pool.punch(ino, n % 1000 * 4096, 4096, Time::default())
            .expect("there is room");
    }
    pool.sync().expect("the device is sound");
    let usage = pool.usage();
    assert!(pool.info().generation > before, "no checkpoint came");
    assert!(usage.journal_used < usage.journal_size / 4);
}
