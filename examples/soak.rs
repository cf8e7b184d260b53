//! Simulated worlds with fresh seeds, without end: random histories that crash at every device
//! write, and every kind of device fault. Stops at the first promise that is broken, with the
//! history made small.
//!
//! `cargo run --release --example soak -- --minutes 20`; `docs/testing.md` has the figures of a
//! long run. `--seed N` runs one world again, exactly.

#![allow(clippy::print_stdout)] // what it found is its result

#[path = "../tests/common/mod.rs"]
mod common;

use std::cell::Cell;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;

use common::campaign::Tally;
use common::crash::{Totals, Verdict};
use common::world::{World, run_faults};

use nodupe::device::SplitMix64;

/// One of so many worlds is about faults, the others are about crashes.
const FAULTS_EVERY: u64 = 16;
/// Faults of such a world.
const FAULTS: usize = 40;

#[derive(Debug, Parser)]
#[command(about = "Crashes and breaks simulated pools until something goes wrong")]
struct Options {
    /// Stop after so many minutes.
    #[arg(long)]
    minutes: Option<u64>,
    /// Stop after so many crash points.
    #[arg(long)]
    crash_points: Option<u64>,
    /// Stop after so many faults; only worlds of faults are run.
    #[arg(long)]
    faults: Option<u64>,
    /// Run the one world of this seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Worlds at a time.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
}

thread_local! {
    /// The world that this thread runs.
    static SEED: Cell<u64> = const { Cell::new(0) };
}

/// A panic aborts an optimised build, and then nothing but this says which world it was.
fn name_the_world_that_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        let seed = SEED.get();
        eprintln!("cargo run --example soak -- --seed {seed} (with unwinding, so that it shrinks)");
    }));
}

/// What all worlds together did.
struct Soak {
    options: Options,
    begun: Instant,
    totals: Totals,
    tally: Tally,
    worlds: AtomicU64,
    stop: AtomicBool,
    failure: Mutex<Option<(u64, String)>>,
}

impl Soak {
    fn world(&self, seed: u64) -> Verdict {
        SEED.set(seed);
        let of_faults = self.options.faults.is_some() || seed.is_multiple_of(FAULTS_EVERY);
        if of_faults {
            run_faults(seed, FAULTS, &self.tally)
        } else {
            World::of(seed).run(&self.totals)
        }
    }

    fn is_done(&self) -> bool {
        let crashes = self.totals.crashes.load(Ordering::Relaxed);
        let is_late = |minutes| self.begun.elapsed() >= Duration::from_secs(minutes * 60);
        self.stop.load(Ordering::Relaxed)
            || self.options.minutes.is_some_and(is_late)
            || self
                .options
                .crash_points
                .is_some_and(|most| crashes >= most)
            || self
                .options
                .faults
                .is_some_and(|most| self.tally.total()[0] >= most)
    }

    fn work(&self, job: u64, first: u64) {
        let mut seeds = SplitMix64::new(first ^ job.rotate_left(40));
        while !self.is_done() {
            let seed = seeds.next() >> 16;
            let result = common::shrink::caught(|| {
                self.world(seed).map_err(common::crash::Violation::plain)
            });
            self.worlds.fetch_add(1, Ordering::Relaxed);
            if let Err(violation) = result {
                let mut failure = self.failure.lock().expect("nobody panics holding it");
                failure.get_or_insert((seed, violation.error));
                self.stop.store(true, Ordering::Relaxed);
            }
        }
    }

    fn progress(&self) -> String {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let [injected, detected, tolerated] = self.tally.total();
        let seconds = self.begun.elapsed().as_secs_f64();
        let crashes = get(&self.totals.crashes);
        format!(
            "{:5.0} s: {} worlds, {crashes} crash points ({:.0} a second), {} in recovery, \
             {} continued; {injected} faults, {detected} detected, {tolerated} tolerated",
            seconds,
            get(&self.worlds),
            crashes as f64 / seconds.max(0.001),
            get(&self.totals.second_crashes),
            get(&self.totals.continued),
        )
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    name_the_world_that_panics();
    let (one, jobs) = (options.seed, options.jobs.max(1) as u64);
    let soak = Soak {
        options,
        begun: Instant::now(),
        totals: Totals::default(),
        tally: Tally::default(),
        worlds: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        failure: Mutex::new(None),
    };
    if let Some(seed) = one {
        let result = soak.world(seed);
        return finish(&soak, result.err().map(|error| (seed, error)));
    }
    let first = common::crash::first_seed();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs)
            .map(|job| {
                let soak = &soak;
                scope.spawn(move || soak.work(job, first))
            })
            .collect();
        let mut ticks = 0_u64;
        while workers.iter().any(|worker| !worker.is_finished()) {
            std::thread::sleep(Duration::from_millis(200));
            ticks += 1;
            if ticks.is_multiple_of(50) {
                eprintln!("{}", soak.progress());
            }
        }
    });
    let failure = soak.failure.lock().map(|mut failure| failure.take());
    finish(&soak, failure.unwrap_or_default())
}

/// Prints what was done and what went wrong.
fn finish(soak: &Soak, failure: Option<(u64, String)>) -> ExitCode {
    println!("{}", soak.progress());
    soak.totals.report("crashes");
    println!("{}", soak.tally.table());
    let Some((seed, error)) = failure else {
        println!("nothing promised was broken");
        return ExitCode::SUCCESS;
    };
    let faults = match soak.options.faults {
        Some(_) => " --faults 1",
        None => "",
    };
    println!("cargo run --release --example soak -- --seed {seed}{faults}\n{error}");
    ExitCode::FAILURE
}
