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

use common::crash::{Verdict, assert_none, for_each_seed, seeds};
use common::furnish::all_kinds;
use fuzz::exercise::exercise;
use fuzz::forge::{Forge, batches, nodes};
use fuzz::template::options;

use nodupe::device::SplitMix64;
use nodupe::engine::Pool;

/// Longest time that one case may take.
const PATIENCE: Duration = Duration::from_secs(60);

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
    let base = all_kinds(5, true).expect("a pool on a sound device");
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
    let base = all_kinds(6, true).expect("a pool on a sound device");
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
    let base = all_kinds(7, false).expect("a pool on a sound device");
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
