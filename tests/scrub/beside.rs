//! Scrubs beside writers, clones, deletes and checkpoints: no false findings, and no wrong names.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nodupe::device::{BlockDevice, SplitMix64};
use nodupe::engine::{FileKind, Pool, Scrub};
use nodupe::error::Kind;
use nodupe::units::Ino;

use crate::common::generate::random_bytes;
use crate::common::history::open;
use crate::world::{
    B, CACHE, HEAD, MIB, World, assert_clean, create, find, named, now, number, scrub,
};

/// Writers, clones, deletes and checkpoints beside scrubs without end. `judge` looks at each scrub.
/// `damaged`: some reads fail. `also` is called all the while, with a number.
fn beside_everything(
    world: &World,
    (seed, seconds): (u64, u64),
    damaged: bool,
    also: impl Fn(u64) + Sync,
    judge: impl Fn(&Scrub),
) {
    let pool = Arc::clone(&world.pool);
    pool.start().expect("threads can be made");
    let until = Instant::now() + Duration::from_secs(seconds);
    let failed = AtomicBool::new(false);
    let (operations, scrubs) = (AtomicU64::new(0), AtomicU64::new(0));
    let goes_on = || Instant::now() < until && !failed.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        for id in 0..4 {
            let (pool, operations) = (&pool, &operations);
            let goes_on = &goes_on;
            scope.spawn(move || {
                let rng = &mut SplitMix64::new(seed * 100 + id);
                let gold = find(pool, "/gold");
                let mut names: Vec<String> = Vec::new();
                for serial in 0.. {
                    if !goes_on() {
                        return;
                    }
                    operations.fetch_add(1, Ordering::Relaxed);
                    let name = format!("w{id}-{serial}");
                    disturb(pool, (gold, damaged), name, &mut names, rng);
                }
            });
        }
        scope.spawn(|| {
            while goes_on() {
                pool.checkpoint().expect("the device is sound");
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        scope.spawn(|| (0..).take_while(|_| goes_on()).for_each(&also));
        let judging = || {
            while goes_on() {
                judge(&scrub(&pool));
                scrubs.fetch_add(1, Ordering::Relaxed);
            }
        };
        let judged = std::panic::catch_unwind(std::panic::AssertUnwindSafe(judging));
        failed.store(true, Ordering::Relaxed);
        judged.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    eprintln!("SEED={seed}: {scrubs:?} scrubs beside {operations:?} operations");
}

fn idle(_: u64) {
    std::thread::sleep(Duration::from_millis(20));
}

/// Damage in files that are deleted again, so that others get the places of damaged blocks while
/// scrub looks for their files.
#[test]
fn beside_everything_else_damage_that_goes_is_nobody_elses() {
    const BLOCKS: usize = 64;
    let (seconds, seed) = (number("SECONDS", 4), number("SEED", 1));
    let mut world = World::empty(seed, 24 * MIB);
    let gold = random_bytes(&mut SplitMix64::new(seed), MIB as usize);
    world.write("/gold", 0, &gold);
    let (device, pool) = (&world.device, &world.pool);
    let come_and_go = |serial| {
        let name = format!("victim-{serial}");
        let ino = create(pool, Ino::ROOT, &name, FileKind::Regular);
        let data = random_bytes(&mut SplitMix64::new(!seed ^ serial), BLOCKS * 4096);
        if pool.write(ino, 0, &data, now()).is_ok() {
            let mut block = vec![0; 4096];
            for addr in (HEAD * B..device.len()).step_by(4096) {
                device.read_at(addr, &mut block).expect("it reads");
                if data.chunks(4096).any(|chunk| chunk == block) {
                    device.flip(addr + 5, 5);
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let done = pool.unlink(Ino::ROOT, name.as_bytes(), now());
        let gone = pool.reclaim(done.expect("it is there").ino);
        gone.expect("it is there");
    };
    let seen = AtomicU64::new(0);
    beside_everything(&world, (seed, seconds), false, come_and_go, |done| {
        assert_eq!(done.others(0, 9), Vec::<String>::new());
        for path in named(done).keys() {
            assert!(path.starts_with("/victim-"), "{path}");
            seen.fetch_add(1, Ordering::Relaxed);
        }
    });
    eprintln!("{seen:?} times was a file named before it was deleted");
}

#[test]
fn beside_everything_else_nothing_sound_is_reported() {
    let (seconds, seed) = (number("SECONDS", 4), number("SEED", 1));
    let mut world = World::empty(seed, 64 * MIB);
    let gold = random_bytes(&mut SplitMix64::new(seed), 2 * MIB as usize);
    world.write("/gold", 0, &gold);
    beside_everything(&world, (seed, seconds), false, idle, assert_clean);
    world.pool.close().expect("the device is sound");
    let device = Arc::new(world.device.crash_none());
    let findings = Pool::check(&*device, None, &mut |_, _| {});
    assert_eq!(findings.expect("a pool"), []);
}

#[test]
fn beside_everything_else_only_damage_is_reported() {
    let (seconds, seed) = (number("SECONDS", 4), number("SEED", 1));
    let mut world = World::empty(seed, 64 * MIB);
    let gold = random_bytes(&mut SplitMix64::new(seed), 2 * MIB as usize);
    world.write("/gold", 0, &gold);
    world.close();
    let places = world.places();
    world.pool = open(&world.device, CACHE).expect("a closed pool opens");
    let hit: BTreeSet<u64> = places.keys().copied().step_by(50).collect();
    hit.iter().for_each(|addr| world.device.flip(addr + 9, 3));
    let all = &world.expected(&places, &hit)["/gold"];
    beside_everything(&world, (seed, seconds), true, idle, |done| {
        assert_eq!(done.status().others, 0);
        assert_eq!(done.status().damaged_blocks, hit.len() as u64);
        let named = named(done);
        assert_eq!(&named["/gold"], all);
        // A clone has each of these blocks where the golden image has it, or not at all.
        for (path, ranges) in &named {
            let known = |range| all.contains(range);
            assert!(ranges.iter().all(known), "{path}: {ranges:?}");
        }
    });
}

/// One operation of a writer.
fn disturb(
    pool: &Pool,
    (gold, damaged): (Ino, bool),
    name: String,
    names: &mut Vec<String>,
    rng: &mut SplitMix64,
) {
    let full = |outcome: nodupe::error::Result<()>| match outcome {
        Err(error) if error.kind() == Kind::NoSpace => {}
        // The other half of a block that is damaged cannot be kept.
        Err(error) if error.kind() == Kind::Corrupt && damaged => {}
        Err(error) => panic!("{error}"),
        Ok(()) => {}
    };
    if names.len() < 4 {
        if pool.usage().available < MIB {
            return; // room for names, and for deleting
        }
        let ino = create(pool, Ino::ROOT, &name, FileKind::Regular);
        full(pool.clone_file(gold, ino, now()));
        return names.push(name);
    }
    let at = rng.index(names.len());
    let ino = find(pool, &names[at]);
    match rng.below(20) {
        0..8 => {
            let (len, at) = ((rng.index(6) + 1) * 4096, rng.below(500) * B);
            full(pool.write(ino, at, &random_bytes(rng, len), now()));
        }
        8..13 => {
            let at = rng.below(480) * B;
            full(pool.write(ino, at, &random_bytes(rng, 32 * 4096), now()));
        }
        13..15 => full(pool.punch(ino, rng.below(500) * B, rng.below(60) * B, now())),
        15..17 => {
            let other = find(pool, &names[rng.index(names.len())]);
            if other != ino {
                full(pool.clone_file(other, ino, now()));
            }
        }
        17 => full(pool.truncate(ino, rng.below(500) * B + 5, now()).map(drop)),
        18 => full(pool.sync()),
        _ => {
            let name = names.swap_remove(at);
            let done = pool.unlink(Ino::ROOT, name.as_bytes(), now());
            pool.reclaim(done.expect("it is there").ino)
                .expect("it is there");
        }
    }
}
