//! The corpus of the fuzz targets, and their seeds, through the very code that is fuzzed: what was
//! found once stays found. `fuzz/README.md` tells how to look for more.

#[allow(dead_code)]
#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use fuzz::bodies::{Body, TARGETS};

/// Longest time that one input may take.
const PATIENCE: Duration = Duration::from_secs(60);

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target)
}

fn body(target: &str) -> Body {
    let found = TARGETS.iter().find(|(name, _)| *name == target);
    found.expect("a target of this name").1
}

/// Runs a body over inputs, on two threads; says which input ended it.
fn replay(target: &str, inputs: &[(String, Vec<u8>)]) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((name, bytes)) = inputs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    within_patience(target, name, bytes);
                }
            });
        }
    });
}

/// Runs one input; a watchdog ends the program if it never ends, because a thread cannot be.
fn within_patience(target: &str, name: &str, bytes: &[u8]) {
    let (done, wait) = channel::<()>();
    let what = format!("{target}/{name}");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if wait.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                eprintln!("ENDLESS: input {what}");
                std::process::abort();
            }
        });
        let body = body(target);
        let outcome = std::panic::catch_unwind(|| body(bytes));
        drop(done);
        if outcome.is_err() {
            panic!("input {target}/{name} panicked");
        }
    });
}

fn stored(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = folder(target);
    let entries =
        std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut inputs: Vec<_> = entries
        .map(|entry| {
            let entry = entry.expect("a readable folder");
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, std::fs::read(entry.path()).expect("a readable input"))
        })
        .collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "no inputs in {}", folder.display());
    inputs
}

#[test]
fn stored_inputs_are_taken_well() {
    for (target, _) in TARGETS {
        replay(target, &stored(target));
    }
}

/// `SEEDS_INTO=fuzz/work cargo test --test corpus seeds` stores them for a fuzzer.
#[test]
fn seeds_of_real_pools_are_taken_well() {
    let into = std::env::var_os("SEEDS_INTO").map(PathBuf::from);
    let seeds = fuzz::seeds::seeds();
    for (target, _) in TARGETS {
        let mut inputs: Vec<_> = seeds.iter().filter(|seed| seed.0 == target).collect();
        inputs.sort();
        inputs.dedup();
        assert!(inputs.len() > 2, "{} seeds for {target}", inputs.len());
        if let Some(into) = &into {
            let folder = into.join(target);
            std::fs::create_dir_all(&folder).expect("a folder for seeds");
            for (i, (_, bytes)) in inputs.iter().enumerate() {
                std::fs::write(folder.join(format!("seed-{i}")), bytes).expect("a seed");
            }
        }
        let inputs: Vec<_> = (0..)
            .zip(inputs)
            .map(|(i, (_, bytes))| (format!("seed-{i}"), bytes.clone()))
            .collect();
        replay(target, &inputs);
    }
}
