//! A pool grows while it is used, at any moment, and no crash makes it anything but the old or the
//! new one with everything that was acknowledged.

mod common;

use std::sync::Arc;

use common::crash::{
    Depth, TINY, Totals, Verdict, assert_none, check, cut_everywhere, for_each_seed, new_pool,
    seeds,
};
use common::generate::{SMALL, next_op, random_bytes};
use common::history::{History, Op, Runner, Step, open};
use common::model::ROOT;

use nodupe::device::{BlockDevice, FileDevice, OpenMode, SimDevice, SplitMix64};
use nodupe::engine::{FileKind, OpenOptions, Pool};
use nodupe::error::Kind;

const B: u64 = 4096;
const MIB: u64 = 1024 * 1024;

/// Sizes that a pool of 12 MiB grows to: by one block, by a few, into the next allocation group, to
/// the border of one, and over several.
const SIZES: [u64; 6] = [
    TINY.pool_size + B,
    13 * MIB,
    128 * MIB + 2 * B,
    128 * MIB + 3 * B,
    140 * MIB,
    600 * MIB,
];

fn create(name: &str) -> Op {
    Op::Create(ROOT, name.into(), FileKind::Regular, Vec::new())
}

fn must(runner: &mut Runner, op: &Op) -> Verdict {
    match runner.run(op) {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!("{} was refused", op.text())),
        Err(error) => Err(format!("{}: {:?}: {error}", op.text(), error.kind())),
    }
}

fn grow(pool: &Pool, size: u64) -> Verdict {
    match pool.grow(Some(size)) {
        Ok(now) if now == size && pool.info().size == size => Ok(()),
        Ok(now) => Err(format!("grew to {now} instead of {size}")),
        Err(error) => Err(format!("grow to {size}: {:?}: {error}", error.kind())),
    }
}

/// Writes about 1 MiB files until there is no space.
fn fill(runner: &mut Runner, rng: &mut SplitMix64, prefix: &str) -> Verdict {
    for index in 0..1000 {
        let name = format!("{prefix}{index}");
        let made = runner.run(&create(&name)).map(|_| ());
        let written = made.and_then(|()| {
            let id = runner.model.lookup(ROOT, name.as_bytes());
            let id = id.expect("it was just made");
            (0..4).try_for_each(|piece| {
                let data = random_bytes(rng, 256 * 1024);
                runner
                    .run(&Op::Write(id, piece * 256 * 1024, data))
                    .map(|_| ())
            })
        });
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == Kind::NoSpace => return Ok(()),
            Err(error) => return Err(format!("{:?}: {error}", error.kind())),
        }
    }
    Err("the pool does not get full".into())
}

/// A random history during which the pool grows twice.
fn history(seed: u64, ops: usize, ignore_sync: bool) -> Verdict<History> {
    let mut rng = SplitMix64::new(seed);
    let (device, pool) = new_pool(&TINY, seed)?;
    pool.sync().map_err(|error| format!("sync: {error}"))?;
    device.record();
    device.ignore_sync(ignore_sync);
    let mut runner = Runner::new(pool);
    let mut steps = vec![Step::new(&runner.model, "start".into(), true, 0..0)];
    let mut sizes = vec![SIZES[rng.index(SIZES.len())], SIZES[rng.index(SIZES.len())]];
    sizes.sort_unstable();
    let grows: Vec<usize> = (0..2).map(|_| rng.index(ops)).collect();
    for index in 0..ops {
        for _ in grows.iter().filter(|at| **at == index) {
            let size = sizes.remove(0);
            let begin = device.recorded();
            let is_larger = size > runner.pool.info().size; // else nothing happens
            grow(&runner.pool, size)?;
            let events = begin..device.recorded();
            steps.push(Step::new(
                &runner.model,
                format!("grow to {size}"),
                is_larger,
                events,
            ));
        }
        let op = if rng.chance(20) && runner.model.lookup(ROOT, b"large").is_err() {
            create("large")
        } else if rng.chance(20)
            && let Ok(id) = runner.model.lookup(ROOT, b"large")
            && runner.model.node(id).is_file()
        {
            // Large writes reach the new end soon.
            Op::Write(
                id,
                rng.below(8) * 128 * 1024,
                random_bytes(&mut rng, 128 * 1024),
            )
        } else {
            next_op(&mut rng, &runner.model, &SMALL)
        };
        let begin = device.recorded();
        let text = format!("{:4} {}", steps.len(), op.text());
        let done = runner.run(&op);
        let done = done.map_err(|error| format!("{text}: {:?}: {error}", error.kind()))?;
        let text = if done {
            text
        } else {
            format!("{text} (refused)")
        };
        let events = begin..device.recorded();
        steps.push(Step::new(&runner.model, text, op.is_durable(), events));
    }
    runner.compare()?;
    let begin = device.recorded();
    let closed = runner.pool.close();
    closed.map_err(|error| format!("close: {error}"))?;
    let events = begin..device.recorded();
    runner.model.forget_unnamed();
    steps.push(Step::new(&runner.model, "close".into(), true, events));
    Ok(History {
        seed,
        cache_size: TINY.cache_size,
        steps,
        trace: device.take_trace(),
    })
}

#[test]
fn growing_survives_a_crash_at_every_write() {
    let depth = Depth {
        images: 2,
        second_every: 8,
        continue_every: 8,
    };
    let totals = Totals::default();
    let failures = for_each_seed(&seeds(40), |seed| {
        cut_everywhere(&history(seed, 40, false)?, &depth, &totals)
    });
    totals.report("growing pools");
    assert_none("growing_survives_a_crash", &failures);
}

#[test]
fn a_crash_around_growth_leaves_one_of_two_sizes() {
    for size in SIZES {
        let (device, pool) = new_pool(&TINY, size).expect("a pool is made");
        device.record();
        grow(&pool, size).expect("the device can grow");
        let trace = device.take_trace();
        let mut replay = trace.replay();
        let (mut old, mut new) = (0, 0);
        while replay.step() {
            for seed in 0..20 {
                let crashed = Arc::new(replay.crash(seed));
                let pool = open(&crashed, TINY.cache_size).expect("either pool opens");
                match pool.info().size {
                    found if found == TINY.pool_size => old += 1,
                    found if found == size => new += 1,
                    found => panic!("size {found} after a crash while it grew to {size}"),
                }
                // Growing again goes on from there.
                grow(&pool, size).expect("the device can grow");
                pool.close().expect("the device is sound");
                check(&crashed, "after growing again").expect("no findings");
            }
        }
        assert!(
            old > 0 && new > 0,
            "{old} crashes left the old size, {new} the new one"
        );
    }
}

#[test]
fn a_lost_growth_would_be_noticed() {
    let mut noticed = 0;
    for seed in 1..=6 {
        let failures = for_each_seed(&[seed], |seed| {
            let depth = Depth {
                images: 3,
                second_every: u64::MAX,
                continue_every: u64::MAX,
            };
            cut_everywhere(&history(seed, 20, true)?, &depth, &Totals::default())
        });
        noticed += failures.len();
    }
    assert!(
        noticed >= 3,
        "a device that ignores syncs was noticed {noticed} times in 6"
    );
}

#[test]
fn growth_makes_room_at_once_in_a_full_pool() {
    let failures = for_each_seed(&seeds(6), |seed| {
        let mut rng = SplitMix64::new(seed);
        let (device, pool) = new_pool(&TINY, seed)?;
        let mut runner = Runner::new(pool);
        fill(&mut runner, &mut rng, "before")?;
        let before = runner.pool.usage();
        let size = [13 * MIB, 40 * MIB, 150 * MIB][seed as usize % 3];
        grow(&runner.pool, size)?;
        let after = runner.pool.usage();
        let grown = size - TINY.pool_size;
        if after.total != before.total + grown {
            return Err(format!("total {} and then {}", before.total, after.total));
        }
        // The blocks that are kept back grow with the pool.
        if after.available + after.reserve < before.available + before.reserve + grown - MIB / 2 {
            return Err(format!(
                "available {} and then {}",
                before.available, after.available
            ));
        }
        must(&mut runner, &create("again"))?;
        let id = runner
            .model
            .lookup(ROOT, b"again")
            .map_err(|kind| format!("{kind:?}"))?;
        must(
            &mut runner,
            &Op::Write(id, 0, random_bytes(&mut rng, 256 * 1024)),
        )?;
        if size < 100 * MIB {
            fill(&mut runner, &mut rng, "after")?;
        }
        must(&mut runner, &Op::Sync)?;
        let crashed = Arc::new(device.crash(seed));
        check(&crashed, "after a crash")?;
        let pool = open(&crashed, TINY.cache_size).map_err(|error| format!("open: {error}"))?;
        let runner = Runner::adopt(pool, &runner.model)?;
        runner.compare()?;
        runner
            .pool
            .close()
            .map_err(|error| format!("close: {error}"))?;
        check(&crashed, "after close")
    });
    assert_none("growth_makes_room", &failures);
}

#[test]
fn copies_of_the_superblock_move_to_the_new_end() {
    for size in SIZES {
        let (device, pool) = new_pool(&TINY, 3).expect("a pool is made");
        grow(&pool, size).expect("the device can grow");
        pool.close().expect("the device is sound");
        for slot in 0..2 {
            device
                .write_at(slot * B, &[0x55; B as usize])
                .expect("the device is sound");
        }
        let device = Arc::new(device.crash_all());
        let pool = open(&device, TINY.cache_size).expect("the copies are found");
        assert_eq!(pool.info().size, size);
    }
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let (device, pool) = new_pool(&TINY, 4).expect("a pool is made");
    let kind = |size| pool.grow(size).expect_err("must be refused").kind();
    assert_eq!(kind(Some(TINY.pool_size - 1)), Kind::Invalid);
    assert_eq!(kind(Some((1 << 50) + B)), Kind::TooLarge);
    assert_eq!(
        pool.grow(Some(TINY.pool_size)).expect("nothing to do"),
        TINY.pool_size
    );
    assert_eq!(
        pool.grow(Some(TINY.pool_size + 1)).expect("rounded down"),
        TINY.pool_size
    );
    assert_eq!(
        pool.grow(None).expect("it is as large as that"),
        TINY.pool_size
    );
    // Somebody made the device larger.
    device.grow(20 * MIB).expect("the device can grow");
    assert_eq!(pool.grow(None).expect("there is room"), 20 * MIB);
    pool.sync().expect("the pool goes on");
    pool.close().expect("the device is sound");
    let closed = pool.grow(Some(30 * MIB));
    assert_eq!(closed.expect_err("it was closed").kind(), Kind::Busy);
    let options = OpenOptions {
        read_only: true,
        cache_size: TINY.cache_size,
    };
    let device: Arc<SimDevice> = device;
    let pool = Pool::open(device, None, &options).expect("it opens");
    let refused = pool.grow(Some(30 * MIB)).expect_err("it is read-only");
    assert_eq!(refused.kind(), Kind::ReadOnly);
}

#[test]
fn a_file_grows_under_threads_that_write() {
    let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = home.path().join("pool");
    let device = FileDevice::create(&path, Some(64 * MIB), false).expect("a file");
    let options = common::history::create_options(5, 4 * MIB);
    Pool::create(Arc::new(device), None, &options).expect("a pool is made");
    let open = || {
        let device = FileDevice::open(&path, OpenMode::ReadWrite).expect("it opens");
        let options = OpenOptions {
            read_only: false,
            cache_size: 16 * MIB,
        };
        Pool::open(Arc::new(device), None, &options).expect("it opens")
    };
    let pool = open();
    pool.start().expect("threads start");
    let write = |file: u64| {
        let mut rng = SplitMix64::new(file);
        let mut runner = Runner::new(Arc::clone(&pool));
        let name = format!("file{file}");
        runner.run(&create(&name)).expect("there is room");
        let ino = pool
            .lookup(nodupe::units::Ino::ROOT, name.as_bytes())
            .expect("it is there")
            .ino;
        let mut whole = Vec::new();
        while whole.len() < 60 * MIB as usize {
            let len = [4096, 100_000, 1 << 20][rng.index(3)];
            let data = random_bytes(&mut rng, len);
            let done = pool.write(
                ino,
                whole.len() as u64,
                &data,
                nodupe::units::Time::default(),
            );
            match done {
                Ok(()) => whole.extend_from_slice(&data),
                // Full until it has grown again.
                Err(error) if error.kind() == Kind::NoSpace => {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
                Err(error) => panic!("{:?}: {error}", error.kind()),
            }
        }
        (ino, whole)
    };
    let written = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|file| {
                scope.spawn({
                    let write = &write;
                    move || write(file)
                })
            })
            .collect();
        let mut size = 64 * MIB;
        while size < 320 * MIB {
            std::thread::sleep(std::time::Duration::from_millis(30));
            size += 16 * MIB + B;
            grow(&pool, size).expect("the file can grow");
        }
        let joined = writers
            .into_iter()
            .map(|writer| writer.join().expect("it wrote all"));
        joined.collect::<Vec<_>>()
    });
    pool.close().expect("the device is sound");
    drop(pool);
    let pool = open();
    for (ino, whole) in written {
        let mut bytes = Vec::new();
        pool.read(ino, 0, whole.len() + 1, &mut bytes)
            .expect("it is readable");
        assert!(bytes == whole, "file {ino} differs");
    }
    pool.close().expect("the device is sound");
    drop(pool);
    let device = FileDevice::open(&path, OpenMode::ReadOnly).expect("it opens");
    let findings = Pool::check(&device, None, &mut |_, _| {}).expect("it is readable");
    assert_eq!(findings, []);
}
