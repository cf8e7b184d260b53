//! Crash tests: a history is run once and recorded; then the device is cut off at each of its
//! writes, and what a reopened pool shows must be one of the states that the promises allow.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use nodupe::device::{SimDevice, SimTrace, SplitMix64};
use nodupe::engine::{FileKind, Finding, Pool};

use super::generate::{Limits, next_op, random_bytes};
use super::history::{History, Op, Runner, Step, create_options, open};
use super::model::ROOT;
use super::view::View;

/// What a test gives back: done, or what went wrong.
pub(crate) type Verdict<T = ()> = std::result::Result<T, String>;

/// Geometry of a pool in these tests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) pool_size: u64,
    pub(crate) journal_size: u64,
    pub(crate) cache_size: u64,
}

/// Small enough that the journal fills and wraps.
pub(crate) const TINY: Geometry = Geometry {
    pool_size: 12 * 1024 * 1024,
    journal_size: 1024 * 1024,
    cache_size: 4 * 1024 * 1024,
};

/// What all crash points together did.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    pub(crate) histories: AtomicU64,
    pub(crate) operations: AtomicU64,
    pub(crate) events: AtomicU64,
    pub(crate) crashes: AtomicU64,
    /// Crashes during the recovery from a crash.
    pub(crate) second_crashes: AtomicU64,
    /// Recoveries after which work went on, and was cut again.
    pub(crate) continued: AtomicU64,
    /// Recoveries that showed an older state than the newest possible.
    pub(crate) rolled_back: AtomicU64,
}

impl Totals {
    pub(crate) fn report(&self, what: &str) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        eprintln!(
            "{what}: {} histories, {} operations, {} device events, {} crash points, \
             {} crashes in recovery, {} continued, {} rolled back",
            get(&self.histories),
            get(&self.operations),
            get(&self.events),
            get(&self.crashes),
            get(&self.second_crashes),
            get(&self.continued),
            get(&self.rolled_back),
        );
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A new pool on a new device, all of it durable.
pub(crate) fn new_pool(geometry: &Geometry, seed: u64) -> Verdict<(Arc<SimDevice>, Arc<Pool>)> {
    let device = Arc::new(SimDevice::new(geometry.pool_size, seed));
    let options = create_options(seed, geometry.journal_size);
    Pool::create(device.clone(), None, &options).map_err(|error| format!("create: {error}"))?;
    let pool = open(&device, geometry.cache_size).map_err(|error| format!("open: {error}"))?;
    Ok((device, pool))
}

/// Runs a history of operations that `next` gives, until it gives none.
pub(crate) fn record(
    geometry: &Geometry,
    seed: u64,
    ignore_sync: bool,
    mut next: impl FnMut(&mut Runner) -> Option<Op>,
) -> Verdict<History> {
    let (device, pool) = new_pool(geometry, seed)?;
    pool.sync().map_err(|error| format!("sync: {error}"))?;
    device.record();
    device.ignore_sync(ignore_sync);
    let mut runner = Runner::new(pool);
    runner.home = Some((device.clone(), geometry.cache_size));
    let mut steps = vec![Step::new(&runner.model, "start".into(), true, 0..0)];
    while let Some(op) = next(&mut runner) {
        let begin = device.recorded();
        let text = format!("{:4} {}", steps.len(), op.text());
        let done = runner
            .run(&op)
            .map_err(|error| format!("{text}: {:?}: {error}", error.kind()))?;
        let text = if done {
            text
        } else {
            format!("{text} (refused)")
        };
        let events = begin..device.recorded();
        steps.push(Step::new(&runner.model, text, op.is_durable(), events));
        if steps.len().is_multiple_of(64) {
            compare(&runner, &steps)?;
        }
    }
    compare(&runner, &steps)?;
    let begin = device.recorded();
    let closed = runner.pool.close();
    closed.map_err(|error| format!("close: {error}"))?;
    let events = begin..device.recorded();
    runner.model.forget_unnamed();
    steps.push(Step::new(&runner.model, "close".into(), true, events));
    Ok(History {
        seed,
        cache_size: geometry.cache_size,
        steps,
        trace: device.take_trace(),
    })
}

fn compare(runner: &Runner, steps: &[Step]) -> Verdict {
    runner.compare().map_err(|difference| {
        let last = steps.last().map_or("", |step| &step.text);
        format!("the open pool differs behind step {last}:\n{difference}")
    })
}

/// Runs a random history of `ops` operations.
pub(crate) fn record_random(
    geometry: &Geometry,
    limits: &Limits,
    seed: u64,
    ops: usize,
    ignore_sync: bool,
) -> Verdict<History> {
    let mut rng = SplitMix64::new(seed);
    let mut left = ops;
    record(geometry, seed, ignore_sync, |runner| {
        left = left.checked_sub(1)?;
        Some(next_op(&mut rng, &runner.model, limits))
    })
}

/// How thoroughly a history is cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Depth {
    /// Random crash images at each write.
    pub(crate) images: u64,
    /// One of so many crash points is also cut during its recovery...
    pub(crate) second_every: u64,
    /// ...and one of so many goes on working after it.
    pub(crate) continue_every: u64,
}

/// A crash after which something promised was not so.
#[derive(Clone, Debug)]
pub(crate) struct Violation {
    /// Device events before the crash; `None`: it was no crash that showed it.
    pub(crate) position: Option<usize>,
    /// The operation under way, or the last one, by its step.
    pub(crate) step: Option<usize>,
    pub(crate) error: String,
}

impl Violation {
    /// Seen without a crash.
    pub(crate) fn plain(error: String) -> Self {
        Self {
            position: None,
            step: None,
            error,
        }
    }
}

/// Cuts a history at each of its writes.
pub(crate) fn cut_everywhere(history: &History, depth: &Depth, totals: &Totals) -> Verdict {
    cut(history, depth, totals).map_err(|violation| violation.error)
}

/// As [`cut_everywhere`]; says where.
pub(crate) fn cut(
    history: &History,
    depth: &Depth,
    totals: &Totals,
) -> std::result::Result<(), Violation> {
    let mut rng = SplitMix64::new(history.seed ^ 0x005e_ed0f_c0ff_ee00);
    let mut replay = history.trace.replay();
    totals
        .operations
        .fetch_add(history.steps.len() as u64, Ordering::Relaxed);
    totals
        .events
        .fetch_add(history.trace.len() as u64, Ordering::Relaxed);
    count(&totals.histories);
    while replay.step() {
        let position = replay.position();
        if !replay.is_behind_write() {
            continue;
        }
        for _ in 0..depth.images {
            let seed = rng.next();
            let (image, which) = match seed % 16 {
                0 => (replay.crash_none(), "none of what was not synced is there"),
                1 => (replay.crash_all(), "all that was written is there"),
                _ => (replay.crash(seed), "some of what was not synced is there"),
            };
            count(&totals.crashes);
            survive(history, position, &image, seed, depth, totals).map_err(|error| {
                let step = *history.allowed(position).end();
                Violation {
                    position: Some(position),
                    step: Some(step),
                    error: format!(
                        "crash behind event {position} of {} ({}), in step {}; {which} (image \
                         {seed:#x}): {error}",
                        history.trace.len(),
                        replay.describe(),
                        history.steps[step].text.trim(),
                    ),
                }
            })?;
        }
    }
    Ok(())
}

/// Recovers from one crash and checks everything.
fn survive(
    history: &History,
    position: usize,
    image: &SimDevice,
    seed: u64,
    depth: &Depth,
    totals: &Totals,
) -> Verdict {
    let allowed = history.allowed(position);
    // Between two checkpoints the structures on the device are the same.
    if (seed >> 40).is_multiple_of(4) {
        check(image, "before recovery")?;
    }
    let device = Arc::new(image.fork(seed));
    let wants_second = (seed >> 8).is_multiple_of(depth.second_every);
    if wants_second {
        device.record();
    }
    let pool = open(&device, history.cache_size).map_err(|error| format!("open: {error}"))?;
    let found = identify(history, &pool, allowed.clone())?;
    if found < *allowed.end() {
        count(&totals.rolled_back);
    }
    if (seed >> 24).is_multiple_of(depth.continue_every) {
        count(&totals.continued);
        return go_on(history, found, &device, pool, seed);
    }
    // Opening ends with a checkpoint, so that there is something to check without a close as well.
    // The data was read, and compared with its checksums, a moment ago.
    check_metadata(&device, "after recovery")?;
    if wants_second || (seed >> 44).is_multiple_of(4) {
        pool.close().map_err(|error| format!("close: {error}"))?;
        check(&device, "after recovery and close")?;
    }
    drop(pool);
    if wants_second {
        let trace = device.take_trace();
        cut_recovery(history, found, &trace, seed, totals, 2)?;
        let pool = open(&device, history.cache_size).map_err(|error| format!("reopen: {error}"))?;
        identify(history, &pool, found..=found).map_err(|error| format!("reopened: {error}"))?;
    }
    Ok(())
}

/// Cuts a recovery and the close behind it, at a few of its writes: the state that it found first
/// must be found again. `deeper` times more, the recovery from that is cut as well.
fn cut_recovery(
    history: &History,
    found: usize,
    trace: &SimTrace,
    seed: u64,
    totals: &Totals,
    deeper: u32,
) -> Verdict {
    let mut rng = SplitMix64::new(seed ^ 0x2ec0);
    let stride = trace.len().div_ceil(6).max(1);
    let mut replay = trace.replay();
    let mut skip = rng.index(stride);
    while replay.step() {
        if skip > 0 {
            skip -= 1;
            continue;
        }
        skip = stride - 1;
        count(&totals.second_crashes);
        let position = replay.position();
        let device = Arc::new(replay.crash(rng.next()));
        let context = |error| format!("crash in recovery behind event {position}: {error}");
        check(&device, "before second recovery").map_err(context)?;
        let again = deeper > 0 && rng.chance(20);
        if again {
            device.record();
        }
        let pool =
            open(&device, history.cache_size).map_err(|error| context(format!("open: {error}")))?;
        identify(history, &pool, found..=found).map_err(context)?;
        pool.close()
            .map_err(|error| context(format!("close: {error}")))?;
        check(&device, "after second recovery").map_err(context)?;
        if again {
            let (trace, seed) = (device.take_trace(), rng.next());
            cut_recovery(history, found, &trace, seed, totals, deeper - 1).map_err(context)?;
        }
    }
    Ok(())
}

/// After a recovery: writes something, syncs, crashes; nothing of the lost past may come back.
fn go_on(
    history: &History,
    found: usize,
    device: &Arc<SimDevice>,
    pool: Arc<Pool>,
    seed: u64,
) -> Verdict {
    let mut rng = SplitMix64::new(seed ^ 0x60);
    let mut runner = Runner::adopt(Arc::clone(&pool), &history.steps[found].model)?;
    let failed = |error| format!("going on after recovery: {error}");
    let name = b"after the crash".to_vec();
    let create = Op::Create(ROOT, name.clone(), FileKind::Regular, Vec::new());
    runner.run(&create).map_err(failed)?;
    let id = runner
        .model
        .lookup(ROOT, &name)
        .map_err(|kind| format!("{kind:?}"))?;
    for index in 0..rng.below(6) + 1 {
        let len = rng.below(9000) as usize + 1;
        let write = Op::Write(id, index * 7000, random_bytes(&mut rng, len));
        runner.run(&write).map_err(failed)?;
    }
    runner.run(&Op::Sync).map_err(failed)?;
    let wanted = View::of_model(&runner.model);
    // More that may be lost, so that the crash has something to tear.
    runner.run(&Op::Truncate(id, 0)).map_err(failed)?;
    let lost = View::of_model(&runner.model);
    let device = Arc::new(device.crash(rng.next()));
    drop((runner, pool));
    check(&device, "after going on")?;
    let pool = open(&device, history.cache_size).map_err(|error| format!("open again: {error}"))?;
    let view = View::of_pool(&pool).map_err(|error| format!("read again: {error}"))?;
    if view != wanted && view != lost {
        let differences = view.differences(&wanted).join("\n");
        return Err(format!("work after a recovery was lost:\n{differences}"));
    }
    pool.close()
        .map_err(|error| format!("close again: {error}"))?;
    check(&device, "after going on and closing")
}

/// Which step of the history the pool is at; an error if it is none that is allowed.
pub(crate) fn identify(
    history: &History,
    pool: &Pool,
    allowed: std::ops::RangeInclusive<usize>,
) -> Verdict<usize> {
    let view = View::of_pool(pool).map_err(|error| format!("cannot read: {error}"))?;
    let digest = view.digest();
    let is_match = |step: &usize| history.steps[*step].digest == digest;
    if let Some(step) = allowed.clone().rev().find(is_match) {
        return Ok(step);
    }
    let elsewhere = (0..history.steps.len()).rev().find(is_match);
    let (step, differences) = allowed
        .clone()
        .map(|step| {
            let wanted = View::of_model(&history.steps[step].model);
            (step, view.differences(&wanted))
        })
        .min_by_key(|(_, differences)| differences.len())
        .unwrap_or_default();
    let near: Vec<&str> = history.steps[*allowed.start()..=*allowed.end()]
        .iter()
        .map(|step| step.text.as_str())
        .collect();
    Err(format!(
        "no state of steps {allowed:?} (it is that of step {elsewhere:?}); nearest is {step}:\n{}\n\
         steps since the last acknowledged sync:\n{}",
        differences.join("\n"),
        near.join("\n"),
    ))
}

/// `check` finds nothing, and writes nothing.
pub(crate) fn check(device: &SimDevice, when: &str) -> Verdict {
    check_with(device, when, |device| {
        Pool::check(device, None, &mut |_, _| {})
    })
}

/// As [`check`], of all but the data.
fn check_metadata(device: &SimDevice, when: &str) -> Verdict {
    check_with(device, when, |device| {
        Pool::check_metadata(device, &mut |_, _| {})
    })
}

fn check_with(
    device: &SimDevice,
    when: &str,
    check: impl Fn(&SimDevice) -> nodupe::error::Result<Vec<Finding>>,
) -> Verdict {
    let before = device.counts();
    let findings = check(device).map_err(|error| format!("check {when}: {error}"))?;
    let after = device.counts();
    if (before.writes, before.discards) != (after.writes, after.discards) {
        return Err(format!("check {when} wrote to the device"));
    }
    if findings.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = findings
        .iter()
        .take(20)
        .map(|finding| format!("{}: {}", finding.code, finding.message))
        .collect();
    Err(format!("check {when} found:\n{}", lines.join("\n")))
}

/// The seeds to run: `SEED=n` one, `SEEDS=n` so many fresh ones, else `default` fresh ones. Fresh
/// ones are others in each run, and a failure prints the one that failed.
pub(crate) fn seeds(default: u64) -> Vec<u64> {
    match environment("SEED") {
        Some(seed) => vec![seed],
        None => {
            let count = environment("SEEDS").unwrap_or(default);
            let mut rng = SplitMix64::new(first_seed());
            (0..count).map(|_| rng.next() >> 16).collect()
        }
    }
}

/// All of `count` numbered cases, or with `SEED=n` that one.
pub(crate) fn cases(count: u64) -> Vec<u64> {
    match environment("SEED") {
        Some(seed) => vec![seed],
        None => (0..count).collect(),
    }
}

fn environment(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    let number = value.parse::<u64>();
    Some(number.unwrap_or_else(|error| panic!("{name}={value}: {error}")))
}

/// What the fresh seeds of this process follow from: the clock, or `FIRST_SEED=n` for the same ones
/// again. Printed once.
pub(crate) fn first_seed() -> u64 {
    static FIRST: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *FIRST.get_or_init(|| {
        let first = environment("FIRST_SEED").unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map_or(1, |now| now.as_nanos() as u64) >> 10
        });
        eprintln!("fresh seeds: FIRST_SEED={first} gives the same ones again");
        first
    })
}

/// Runs `test` for each seed, on as many threads as there are processors; returns the failures, at
/// most one per thread. A panic is a failure.
pub(crate) fn for_each_seed(
    seeds: &[u64],
    test: impl Fn(u64) -> Verdict + Sync,
) -> Vec<(u64, String)> {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let worker = || {
        while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
            let result = catch_unwind(AssertUnwindSafe(|| test(*seed)));
            let error = match result {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error,
                Err(panic) => {
                    let text = panic.downcast_ref::<String>().cloned();
                    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|t| (*t).into()));
                    format!("panic: {}", text.unwrap_or_default())
                }
            };
            next.store(seeds.len(), Ordering::Relaxed);
            return Some((*seed, error));
        }
        None
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        let joined = workers.into_iter().map(|worker| worker.join());
        joined.filter_map(|result| result.ok().flatten()).collect()
    })
}

/// Panics with the failures, each with the command that repeats it.
pub(crate) fn assert_none(test: &str, failures: &[(u64, String)]) {
    let texts: Vec<String> = failures
        .iter()
        .map(|(seed, error)| format!("SEED={seed} cargo test {test}\n{error}"))
        .collect();
    assert!(texts.is_empty(), "\n{}", texts.join("\n\n"));
}
