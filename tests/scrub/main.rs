//! Scrub: every damaged block is found, exactly the files that share it are named, nothing sound is
//! ever reported, and what was interrupted goes on.
//!
//! `FLIPS=100000 cargo test --test scrub flip` flips more bits; `SECONDS=60 cargo test --test scrub
//! beside` looks for false findings longer; `SEED=7` is another history.

#[path = "../common/mod.rs"]
mod common;

mod beside;
mod faults;
mod world;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::generate::random_bytes;
use common::history::open;
use world::{B, CACHE, MIB, World, assert_clean, find, named, now, number, open_to_read, scrub};

use nodupe::device::SplitMix64;
use nodupe::engine::{Scrub, ScrubOptions, ScrubState};
use nodupe::error::Kind;
use nodupe::units::Ino;

#[test]
fn a_sound_pool_is_clean_online_and_offline() {
    let world = World::furnished(number("SEED", 1));
    // With blocks in the stage, the journal and dirty nodes, and everything at its place.
    for _ in 0..2 {
        let done = scrub(&world.pool);
        assert_clean(&done);
        let status = done.status();
        assert!(
            status.done >= 2 * MIB && status.done <= status.total,
            "{status:?}"
        );
        world.pool.checkpoint().expect("the device is sound");
    }
    assert_clean(&scrub(&open_to_read(&Arc::new(world.device.crash_all()))));
    world.close();
    let device = Arc::new(world.device.crash_all());
    let pool = open_to_read(&device);
    assert_clean(&scrub(&pool));
    assert_eq!(
        pool.last_scrub().expect("it reads").state,
        ScrubState::Finished
    );
}

#[test]
fn every_flipped_bit_is_found_and_exactly_the_files_are_named() {
    const AT_ONCE: u64 = 10;
    let (seed, flips) = (number("SEED", 1), number("FLIPS", 1000));
    let world = World::furnished(seed);
    world.close();
    let places = world.places();
    let addrs: Vec<u64> = places.keys().copied().collect();
    let shared = places.values().filter(|found| found.len() > 3).count();
    assert!(
        addrs.len() > 800 && shared > 300,
        "{} {shared}",
        addrs.len()
    );
    let rng = &mut SplitMix64::new(seed ^ 0xf11b);
    let (mut detected, mut references) = (0, 0);
    for round in 0..flips.div_ceil(AT_ONCE) {
        let device = Arc::new(world.device.fork(round));
        let mut hit = BTreeSet::new();
        while (hit.len() as u64) < AT_ONCE {
            let addr = addrs[rng.index(addrs.len())];
            if hit.insert(addr) {
                device.flip(addr + rng.below(B), rng.below(8) as u32);
            }
        }
        let expected = world.expected(&places, &hit);
        // Offline and online take turns.
        let pool = match round % 2 {
            0 => open_to_read(&device),
            _ => open(&device, CACHE).expect("the trees are sound"),
        };
        let done = scrub(&pool);
        assert_eq!(named(&done), expected, "SEED={seed} round {round}");
        assert_eq!(done.status().damaged_blocks, AT_ONCE);
        assert_eq!(done.status().others, 0);
        assert_eq!(
            world.unreadable(&pool),
            expected,
            "SEED={seed} round {round}"
        );
        detected += AT_ONCE;
        references += expected.values().map(Vec::len).sum::<usize>();
    }
    eprintln!("{detected} flips found, {references} ranges of files named, none too many");
}

#[test]
fn large_reads_fail_only_where_they_meet_damage() {
    let world = World::furnished(3);
    world.close();
    let places = world.places();
    let (addr, _) = places
        .iter()
        .find(|(_, found)| found.contains(&("/gold".into(), 100 * B)))
        .expect("the block is somewhere");
    world.device.flip(*addr, 0);
    let pool = open(&world.device, CACHE).expect("the trees are sound");
    for path in ["/gold", "/vms/second name", "/vms/deep/clone-0"] {
        let (ino, bytes) = (find(&pool, path), &world.files[path]);
        for (offset, len, good) in [
            (0, 400 * B, false),
            (0, 100 * B, true),
            (101 * B, 256 * B, true),
            (96 * B, 8 * B, false),
            (100 * B + 4095, 1, false),
            (100 * B - 1, 1, true),
        ] {
            let mut found = Vec::new();
            let read = pool.read(ino, offset, len as usize, &mut found);
            assert_eq!(read.is_ok(), good, "{path} {offset} {len}");
            let end = (offset + len) as usize;
            assert!(!good || found == bytes[offset as usize..end]);
            if let Err(error) = read {
                assert_eq!(error.kind(), Kind::Corrupt);
                assert!(error.to_string().contains("offset=409600"), "{error}");
            }
        }
    }
    // Overwritten, it is whole again, in this file.
    let ino = find(&pool, "/vms/deep/clone-0");
    pool.write(ino, 100 * B, &[7; 4096], now())
        .expect("there is room");
    let left = named(&scrub(&pool));
    assert!(left.contains_key("/gold") && !left.contains_key("/vms/deep/clone-0"));
}

#[test]
fn what_was_interrupted_goes_on() {
    let mut world = World::empty(6, 100 * MIB);
    let rng = &mut SplitMix64::new(6);
    for i in 0..40 {
        let data = random_bytes(rng, MIB as usize);
        world.write("/big", i * MIB as usize, &data);
    }
    world.clone_file("/big", "/clone");
    world.close();
    let places = world.places();
    let first = *places.keys().next().expect("there is data");
    let last = *places.keys().next_back().expect("there is data");
    let device = Arc::new(world.device.fork(1));
    device.flip(first, 1);
    device.flip(last, 1);
    let expected = world.expected(&places, &BTreeSet::from([first, last]));
    // Slow enough to be stopped in between: 16 MiB are looked up at once.
    let pool = open(&device, CACHE).expect("the trees are sound");
    let slow = Arc::new(Scrub::new(ScrubOptions {
        rate: Some(20 * MIB),
        ..ScrubOptions::default()
    }));
    std::thread::scope(|scope| {
        let (pool, runs) = (Arc::clone(&pool), Arc::clone(&slow));
        let thread = scope.spawn(move || pool.scrub(&runs));
        let until = Instant::now() + Duration::from_secs(30);
        while slow.status().done == 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        slow.stop();
        thread.join().expect("no panic").expect("it was stopped");
    });
    let stopped = slow.status();
    assert_eq!(stopped.state, ScrubState::Stopped);
    assert!(
        stopped.position > first && stopped.position <= last,
        "{stopped:?} {last}"
    );
    // The daemon dies; what was written down is in the journal.
    pool.sync().expect("the device is sound");
    let device = Arc::new(device.crash_none());
    let pool = open(&device, CACHE).expect("the trees are sound");
    let kept = pool.last_scrub().expect("it reads");
    assert_eq!(
        (kept.state, kept.position),
        (ScrubState::Stopped, stopped.position)
    );
    let reads = device.counts().reads;
    let rest = scrub(&pool);
    assert!(rest.status().resumed);
    assert_eq!(named(&rest), expected, "also what was found before");
    let resumed_reads = device.counts().reads - reads;
    // The next one begins at the beginning.
    let again = scrub(&pool);
    assert!(!again.status().resumed);
    assert_eq!(named(&again), expected);
    eprintln!("{resumed_reads} reads to the end");
    let kept = pool.last_scrub().expect("it reads");
    assert_eq!((kept.files, kept.damaged_blocks), (again.status().files, 2));
    pool.close().expect("the device is sound");
}

#[test]
fn ten_thousand_clones_cost_one_walk() {
    let mut world = World::empty(8, 96 * MIB);
    let rng = &mut SplitMix64::new(8);
    for i in 0..2000 {
        world.write("/gold", i * 2 * 4096, &random_bytes(rng, 4096));
    }
    let gold = find(&world.pool, "/gold");
    for i in 0..100 {
        let names: Vec<Vec<u8>> = (0..100).map(|n| format!("c{i}-{n}").into_bytes()).collect();
        let done = world.pool.clone_tree(gold, Ino::ROOT, &names, None, now());
        done.expect("there is room");
    }
    world.close();
    let places = world.places();
    let addr = *places.keys().nth(1000).expect("there are 2000 blocks");
    world.device.flip(addr, 5);
    let pool = open_to_read(&world.device);
    let before = world.device.counts().reads;
    let began = Instant::now();
    let done = scrub(&pool);
    let reads = world.device.counts().reads - before;
    eprintln!(
        "10,001 files named in {:?} with {reads} reads",
        began.elapsed()
    );
    assert_eq!(done.status().files, 10_001);
    let offset = places[&addr][0].1;
    for file in done.files(0, usize::MAX) {
        assert_eq!(file.ranges, [(offset, B)]);
        assert_eq!(file.paths.len(), 1);
    }
    assert!(reads < 100_000, "{reads}");
}
