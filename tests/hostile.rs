//! Pools made by somebody who means harm: every checksum is right, and what it protects is not.
//!
//! A field of a node, of a superblock or of the journal is changed, and all checksums from there
//! up to the superblock are made right again. Whatever is asked of such a pool gives an answer or
//! an error: no panic (so no failed assertion either, and no overflow), no endless loop, and no
//! write to where the superblocks and the journal are. `tests/crafted.rs` has pools that somebody
//! thought out; the fuzz targets (`fuzz/README.md`) look for more.
//!
//! `SEEDS=20000 cargo test --release --test hostile` looks further.

mod common;
#[allow(dead_code)]
#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::crash::{TINY, Verdict, assert_none, for_each_seed, new_pool, seeds};
use common::generate::{SMALL, next_op, random_bytes};
use common::history::Runner;
use fuzz::exercise::exercise;
use fuzz::forge::{B, Forge, batches, nodes};
use fuzz::template::options;

use nodupe::device::{SimDevice, SplitMix64};
use nodupe::engine::{FileKind, NewNode, Pool};
use nodupe::units::{Ino, Time};

/// Longest time that one case may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Names and extents for trees of several levels, with shared nodes, in a directory that the
/// random history does not know.
fn large_trees(pool: &Pool, rng: &mut SplitMix64) -> nodupe::error::Result<()> {
    let now = Time::default();
    let node = |kind| NewNode {
        kind,
        mode: 0o700,
        uid: 0,
        gid: 0,
        rdev: 0,
        target: b"",
    };
    let dir = pool.create_node(Ino::ROOT, b"large", &node(FileKind::Directory), now)?;
    let file = pool.create_node(dir.ino, b"fragments", &node(FileKind::Regular), now)?;
    for block in 0..500 {
        pool.write(file.ino, block * 2 * B, &random_bytes(rng, 4096), now)?;
    }
    let names: Vec<_> = (0..150)
        .map(|i| format!("clone {i}").into_bytes())
        .collect();
    pool.clone_tree(file.ino, dir.ino, &names, None, now)?;
    for name in &names[..3] {
        let clone = pool.lookup(dir.ino, name)?;
        pool.write(clone.ino, rng.below(1000) * B, b"of its own", now)?;
    }
    pool.checkpoint()
}

/// A pool with all kinds of things in it; closed, or with a journal that waits for replay.
fn furnished(seed: u64, closed: bool) -> Verdict<SimDevice> {
    let (device, pool) = new_pool(&TINY, seed)?;
    let mut rng = SplitMix64::new(seed ^ 0xf00d);
    large_trees(&pool, &mut rng).map_err(|error| format!("large trees: {error}"))?;
    let mut runner = Runner::new(pool);
    for index in 0..260 {
        let op = next_op(&mut rng, &runner.model, &SMALL);
        let done = runner.run(&op);
        done.map_err(|error| format!("{}: {error}", op.text()))?;
        if index == 180 {
            let done = runner.pool.checkpoint();
            done.map_err(|error| format!("checkpoint: {error}"))?;
        }
    }
    let done = if closed {
        runner.pool.close()
    } else {
        runner.pool.sync()
    };
    done.map_err(|error| format!("end: {error}"))?;
    Ok(device.crash_none())
}

/// Runs the cases with a watchdog, because a thread in an endless loop cannot be joined.
fn watched(seeds: &[u64], case: impl Fn(u64) -> Verdict + Sync) -> Vec<(u64, String)> {
    let running: Mutex<Vec<(u64, Instant)>> = Mutex::new(Vec::new());
    let lock = || running.lock().expect("nobody panics with it");
    let finished = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !finished.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(50));
                if let Some((seed, _)) = lock().iter().find(|run| run.1.elapsed() > PATIENCE) {
                    eprintln!("ENDLESS: SEED={seed} cargo test --test hostile");
                    std::process::abort();
                }
            }
        });
        let failures = for_each_seed(seeds, |seed| {
            lock().push((seed, Instant::now()));
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| case(seed)));
            lock().retain(|run| run.0 != seed);
            outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        finished.store(true, Ordering::Relaxed);
        failures
    })
}

#[test]
fn a_forged_tree_gives_errors_only() {
    let base = furnished(5, true).expect("a pool on a sound device");
    let nodes = nodes(&base);
    assert!(nodes.len() > 30, "only {} nodes", nodes.len());
    let opened = AtomicU64::new(0);
    let failures = watched(&seeds(500), |seed| {
        let mut rng = SplitMix64::new(seed);
        let forge = Forge::new(&base, &nodes);
        for _ in 0..rng.below(2) + 1 {
            forge.change_node(&mut rng);
        }
        if Pool::open(Arc::new(forge.device.fork(0)), None, &options(true)).is_ok() {
            opened.fetch_add(1, Ordering::Relaxed);
        }
        exercise(&forge.device, seed);
        Ok(())
    });
    eprintln!("forged trees: {} opened", opened.load(Ordering::Relaxed));
    assert_none("a_forged_tree", &failures);
}

#[test]
fn a_forged_superblock_gives_errors_only() {
    let base = furnished(6, true).expect("a pool on a sound device");
    let failures = watched(&seeds(150), |seed| {
        let mut rng = SplitMix64::new(seed);
        let forge = Forge::new(&base, &[]);
        forge.change_superblock(&mut rng);
        exercise(&forge.device, seed);
        Ok(())
    });
    assert_none("a_forged_superblock", &failures);
}

#[test]
fn a_forged_journal_gives_errors_only() {
    let base = furnished(7, false).expect("a pool on a sound device");
    let batches = batches(&base);
    assert!(batches.len() > 1, "only {} batches", batches.len());
    let failures = watched(&seeds(300), |seed| {
        let mut rng = SplitMix64::new(seed);
        let forge = Forge::new(&base, &[]);
        forge.change_batch(batches[rng.index(batches.len())], &mut rng);
        exercise(&forge.device, seed);
        Ok(())
    });
    assert_none("a_forged_journal", &failures);
}
