//! What was acknowledged survives every crash, and what remains is a state that was.
//!
//! Each test runs histories on a simulated device, cuts them at every device write, and compares
//! what a reopened pool shows with the model. A failure prints the command that repeats it.

mod common;

use common::crash::{
    Depth, TINY, Totals, Verdict, assert_none, cases, check, cut_everywhere, for_each_seed,
    new_pool, record, record_random, seeds,
};
use common::generate::{SMALL, random_bytes};
use common::history::{Op, create_options, open};
use common::model::ROOT;
use common::pairs::{operations, prepare};
use common::script::{Planned, Script};
use common::shrink::crash_everywhere;
use common::world::{World, report};

use std::sync::Arc;

use nodupe::device::{SimDevice, SplitMix64};
use nodupe::engine::{FileKind, NewNode, Pool, Share};
use nodupe::units::{Ino, Time};
use nodupe::vfs::{Caller, OpenFlags, Vfs, VfsOptions};

/// Operations of a random history.
const OPS: usize = 160;

#[test]
fn crash_at_every_write_leaves_an_allowed_state() {
    let totals = Totals::default();
    let failures = for_each_seed(&seeds(140), |seed| World::of(seed).run(&totals));
    totals.report("random histories");
    assert_none("crash_at_every_write", &failures);
}

#[test]
fn a_failing_history_shrinks_to_a_few_operations() {
    // A device that ignores syncs loses acknowledged writes: a close alone, or one operation and a
    // close, show it.
    for seed in 1..=4 {
        let world = World {
            ignore_sync: true,
            ops: 120,
            ..World::of(seed)
        };
        let text = world.run(&Totals::default()).expect_err("the device lies");
        eprintln!("SEED={seed}\n{text}\n");
        let count = text.split("shrunk to ").nth(1).and_then(|rest| {
            let digits = rest.split(' ').next()?;
            digits.parse::<usize>().ok()
        });
        let count = count.expect("the report says how many operations are left");
        assert!(count <= 4, "{count} operations are left");
        assert!(text.contains("crash behind event"), "no crash is named");
        // The same seed fails in the same way.
        let again = world.run(&Totals::default()).expect_err("the device lies");
        assert_eq!(text.lines().next(), again.lines().next());
    }
}

#[test]
fn crash_tests_notice_a_device_that_ignores_syncs() {
    let depth = Depth {
        images: 1,
        second_every: u64::MAX,
        continue_every: u64::MAX,
    };
    let totals = Totals::default();
    let mut noticed = 0;
    let seeds: Vec<u64> = (1..=8).collect();
    for seed in &seeds {
        let failures = for_each_seed(&[*seed], |seed| {
            let history = record_random(&TINY, &SMALL, seed, OPS, true)?;
            cut_everywhere(&history, &depth, &totals)
        });
        noticed += failures.len();
    }
    totals.report("lying device");
    assert!(
        noticed >= seeds.len() / 2,
        "only {noticed} of {} histories on a device that ignores syncs were noticed",
        seeds.len()
    );
}

/// Sequences of `len` of the operations on three files, numbered; each is cut at each write.
fn short_sequences(test: &str, numbers: &[u64], len: u32) {
    let depth = Depth {
        images: 3,
        second_every: 8,
        continue_every: 8,
    };
    let totals = Totals::default();
    let count = operations(&mut SplitMix64::new(0)).len() as u64;
    let failures = for_each_seed(numbers, |seed| {
        let mut rng = SplitMix64::new(seed);
        let mut ops = prepare(&mut rng);
        let choice = operations(&mut rng);
        let digits = (0..len).rev().map(|digit| seed / count.pow(digit) % count);
        ops.extend(digits.map(|index| choice[index as usize].clone()));
        ops.push(Op::Sync);
        // On a file that the first one removed the second is no operation.
        let script = Script {
            geometry: TINY,
            seed,
            ignore_sync: false,
            ops: ops.into_iter().map(|op| Planned { op, next: 0 }).collect(),
        };
        let result = crash_everywhere(&script, &depth, &totals);
        result.map_err(|violation| report(&script, violation, &depth))
    });
    totals.report(&format!("sequences of {len} operations"));
    assert_none(test, &failures);
}

#[test]
fn every_two_operations_survive_a_crash_at_every_write() {
    let count = operations(&mut SplitMix64::new(0)).len() as u64;
    short_sequences("every_two_operations", &cases(count * count), 2);
}

#[test]
fn sampled_three_operations_survive_a_crash_at_every_write() {
    short_sequences("sampled_three_operations", &seeds(500), 3);
}

#[test]
fn a_crash_while_a_pool_is_made_leaves_it_or_none() {
    let device = Arc::new(SimDevice::new(TINY.pool_size, 1));
    device.record();
    let options = create_options(1, TINY.journal_size);
    Pool::create(device.clone(), None, &options).expect("a pool is made on a sound device");
    let trace = device.take_trace();
    let mut replay = trace.replay();
    let (mut whole, mut none) = (0, 0);
    while replay.step() {
        for seed in 0..4 {
            let device = Arc::new(replay.crash(seed));
            match open(&device, TINY.cache_size) {
                Ok(pool) => {
                    let names = pool.read_dir(nodupe::units::Ino::ROOT, 0, 10);
                    assert_eq!(names.expect("the root is readable"), []);
                    pool.close().expect("an empty pool closes");
                    check(&device, "of a pool made in a crash").expect("no findings");
                    whole += 1;
                }
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    none += 1;
                }
            }
        }
    }
    let device = Arc::new(replay.crash_none());
    open(&device, TINY.cache_size).expect("create ends with a sync");
    eprintln!("crashes while a pool is made: {whole} left it, {none} left none");
}

#[test]
fn a_closed_pool_loses_nothing_in_a_crash() {
    let totals: Vec<_> = for_each_seed(&[1, 2, 3, 4], |seed| -> Verdict {
        let history = record_random(&TINY, &SMALL, seed, OPS, false)?;
        let mut replay = history.trace.replay();
        while replay.step() {}
        let device = Arc::new(replay.crash_none());
        check(&device, "after close")?;
        let last = history.steps.len() - 1;
        let writes = device.counts().writes;
        let pool = open(&device, TINY.cache_size).map_err(|error| error.to_string())?;
        common::crash::identify(&history, &pool, last..=last)?;
        if !pool.info().clean && writes == device.counts().writes {
            return Err("a closed pool is not marked clean".into());
        }
        Ok(())
    });
    assert_none("a_closed_pool", &totals);
}

/// A file that the tests of sharing use.
fn new_file(pool: &Pool, name: &str) -> Ino {
    let node = NewNode::regular(0o600);
    let made = pool.create_node(Ino::ROOT, name.as_bytes(), &node, Time::default());
    made.expect("there is room").ino
}

fn read(pool: &Pool, ino: Ino) -> Vec<u8> {
    let (mut bytes, size) = (Vec::new(), pool.attr(ino).expect("it is there").size);
    let done = pool.read(ino, 0, size as usize, &mut bytes);
    done.expect("the device is sound");
    bytes
}

#[test]
fn a_crash_within_a_long_share_leaves_what_came_first() {
    const COUNT: u64 = 4096;
    const SOURCES: u64 = 64;
    let (device, pool) = new_pool(&TINY, 1).expect("a pool is made");
    let (src, dst) = (new_file(&pool, "src"), new_file(&pool, "dst"));
    let stamp = |block: u64| (block % SOURCES) as u8 + 1;
    for block in 0..SOURCES {
        let wrote = pool.write(src, block * 4096, &[stamp(block); 4096], Time::default());
        wrote.expect("there is room");
    }
    let grown = pool.truncate(dst, COUNT * 4096, Time::default());
    grown.expect("a hole takes no room");
    pool.sync().expect("the device is sound");
    device.record();
    // Records for all of them do not fit one batch.
    let ranges: Vec<Share> = (0..COUNT)
        .map(|block| Share {
            block: block % SOURCES,
            dst_block: block,
            count: 1,
        })
        .collect();
    let shared = pool.share_ranges(src, dst, &ranges, Time::default());
    shared.expect("there is room");
    pool.sync().expect("the device is sound");
    let trace = device.take_trace();
    let mut replay = trace.replay();
    let mut seen = std::collections::BTreeSet::new();
    while replay.step() {
        for seed in 0..2 {
            let left = Arc::new(replay.crash(seed));
            check(&left, "within a share").expect("no findings");
            let pool = open(&left, TINY.cache_size).expect("it opens behind a crash");
            let bytes = read(&pool, dst);
            let mut blocks = bytes.chunks(4096).zip(0..);
            let done = blocks
                .by_ref()
                .take_while(|(bytes, block)| bytes.iter().all(|byte| *byte == stamp(*block)))
                .count();
            assert!(blocks.all(|(bytes, _)| bytes.iter().all(|byte| *byte == 0)));
            seen.insert(done as u64);
        }
    }
    let left = open(&Arc::new(replay.crash_none()), TINY.cache_size);
    let bytes = read(&left.expect("it opens behind a crash"), dst);
    assert!(
        bytes
            .chunks(4096)
            .zip(0..)
            .all(|(bytes, block)| bytes == [stamp(block); 4096])
    );
    assert!(seen.contains(&0) && seen.contains(&COUNT), "{seen:?}");
    assert!(seen.len() > 2, "no crash was in the middle: {seen:?}");
}

#[test]
fn what_a_synchronous_handle_shares_is_durable() {
    for sync in [true, false] {
        let (device, pool) = new_pool(&TINY, 1).expect("a pool is made");
        let (src, dst) = (new_file(&pool, "src"), new_file(&pool, "dst"));
        let wrote = pool.write(src, 0, &[7; 8192], Time::default());
        wrote.expect("there is room");
        let grown = pool.truncate(dst, 8192, Time::default());
        grown.expect("a hole takes no room");
        pool.sync().expect("the device is sound");
        let vfs = Vfs::new(pool.clone(), VfsOptions::default());
        let flags = OpenFlags {
            write: true,
            sync,
            ..OpenFlags::default()
        };
        let handle = vfs.open(dst, flags).expect("it is a file");
        let caller = Caller {
            uid: 0,
            gid: 0,
            pid: 1,
            groups: |_| Vec::new(),
        };
        let range = Share {
            block: 0,
            dst_block: 0,
            count: 2,
        };
        let shared = vfs.share(&caller, src, (handle, dst), &[range]);
        shared.expect("there is room");
        let left = open(&Arc::new(device.crash_none()), TINY.cache_size);
        let expected = [if sync { 7 } else { 0 }; 8192];
        assert!(read(&left.expect("it opens behind a crash"), dst) == expected);
    }
}

#[test]
fn unsynced_work_is_lost_from_the_end_only() {
    // Two files written in turns, never synced: whatever remains, no write is there without all
    // that came before it, in either file.
    let totals = Totals::default();
    let depth = Depth {
        images: 4,
        second_every: 16,
        continue_every: 16,
    };
    let failures = for_each_seed(&seeds(6), |seed| {
        let mut rng = SplitMix64::new(seed);
        let file = |name: &[u8]| Op::Create(ROOT, name.to_vec(), FileKind::Regular, Vec::new());
        let mut ops = vec![file(b"a"), file(b"b"), Op::Sync];
        for index in 0..400_u64 {
            let len = [700, 4096, 12288, 65536][rng.index(4)];
            let offset = rng.below(24) * 4096;
            ops.push(Op::Write(
                1 + (index % 2) as usize,
                offset,
                random_bytes(&mut rng, len),
            ));
        }
        let mut ops = ops.into_iter();
        let history = record(&TINY, seed, false, |_| ops.next())?;
        cut_everywhere(&history, &depth, &totals)
    });
    totals.report("two files in turns");
    assert_none("unsynced_work", &failures);
}

#[test]
fn recorded_histories_are_the_same_each_time() {
    let run = || {
        let history = record_random(&TINY, &SMALL, 11, 60, false).expect("the history runs");
        let digests: Vec<u64> = history.steps.iter().map(|step| step.digest).collect();
        (history.trace.len(), digests)
    };
    assert_eq!(run(), run());
    new_pool(&TINY, 1).expect("a pool is made");
}
