//! Runs worlds: which schedulers, how many schedules, from which seed, and how a failure is found
//! again.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use nodupe::device::SplitMix64;
use shuttle::rand::RngCore as _;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

/// Steps of one world after which it is taken for stuck: a hundred times the usual.
const STEPS_MAX: usize = 3_000_000;
/// Changes of priority in a schedule of the second kind: bugs that need so many are found.
const DEPTH: usize = 4;
/// Bytes of a thread's stack: a descent of a tree holds a few blocks.
const STACK: usize = 512 * 1024;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

fn config() -> Config {
    let mut config = Config::new();
    config.stack_size = STACK;
    config.max_steps = MaxSteps::FailAfter(STEPS_MAX);
    config.silence_warnings = true;
    config.failure_persistence = FailurePersistence::File(Some(env!("CARGO_TARGET_TMPDIR").into()));
    config
}

fn run(scheduler: impl Scheduler + 'static, world: fn(&mut SplitMix64)) -> usize {
    Runner::new(scheduler, config()).run(move || {
        // What the threads do is part of the schedule, and so of a replay.
        let mut rng = SplitMix64::new(shuttle::rand::thread_rng().next_u64());
        world(&mut rng);
    })
}

/// Runs `world` on something that is not part of any schedule, such as the making of a pool.
pub(crate) fn prepare(world: impl Fn() + Send + Sync + 'static) {
    Runner::new(RandomScheduler::new_from_seed(1, 1), config()).run(world);
}

/// Explores `schedules` schedules of `world` (`SCHEDULES` of them if that is set), half of them
/// at random, half with few changes of priority, which finds what needs a thread to fall far
/// behind.
pub(crate) fn explore(name: &str, schedules: usize, world: fn(&mut SplitMix64)) {
    super::world::base(); // made before the first schedule
    if let Ok(path) = std::env::var("REPLAY") {
        let scheduler = shuttle::scheduler::ReplayScheduler::new_from_file(path);
        run(scheduler.expect("a file with a schedule"), world);
        return;
    }
    let fresh = || {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        since.map_or(1, |time| time.as_nanos() as u64 % 1_000_000_007)
    };
    let seed = number("SEED").unwrap_or_else(fresh);
    let schedules = number("SCHEDULES").map_or(schedules, |number| number as usize);
    eprintln!("{name}: SEED={seed} SCHEDULES={schedules}");
    let begun = Instant::now();
    let random = schedules.div_ceil(2);
    let mut done = run(RandomScheduler::new_from_seed(seed, random), world);
    if schedules > random {
        let pct = PctScheduler::new_from_seed(seed, DEPTH, schedules - random);
        done += run(pct, world);
    }
    eprintln!("{name}: {done} schedules in {:.1?}", begun.elapsed());
}
