//! Devices that fail: an error is an error, wrong bytes are never handed out, nothing is
//! acknowledged that is not safe, and what was acknowledged before stays.
//!
//! Each test makes the n-th operation of the device fail, for each n.

mod common;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::crash::{TINY, Verdict, assert_none, check, for_each_seed, identify, new_pool, seeds};
use common::damage::{look, look_for_any, used_blocks};
use common::generate::{SMALL, next_op};
use common::history::{History, Op, Runner, Step, apply, open};
use common::model::Model;

use nodupe::device::{Fault, FaultOp, Repeat, SimDevice, SplitMix64};
use nodupe::engine::Pool;
use nodupe::error::Kind;

/// Operations of a history with a fault.
const OPS: usize = 60;

/// A pool with some files, closed, and its model.
fn furnished(seed: u64, ops: usize) -> Verdict<(SimDevice, Model)> {
    let (device, pool) = new_pool(&TINY, seed)?;
    let mut runner = Runner::new(pool);
    let mut rng = SplitMix64::new(seed ^ 0xf00d);
    for _ in 0..ops {
        let op = next_op(&mut rng, &runner.model, &SMALL);
        let done = runner.run(&op);
        done.map_err(|error| format!("{}: {error}", op.text()))?;
    }
    let closed = runner.pool.close();
    closed.map_err(|error| format!("close: {error}"))?;
    let mut model = runner.model;
    model.forget_unnamed();
    Ok((device.crash_none(), model))
}

/// One run of a history on a device that fails.
struct Faulty {
    device: Arc<SimDevice>,
    runner: Runner,
    /// Each step is what it would be had the operation happened, also where it failed.
    history: History,
    /// The newest step that must be there after a crash.
    acked: usize,
    /// The first operation that failed.
    error: Option<String>,
}

/// Runs the same operations for the same `seed`, until one fails. `plan` is called behind `open`.
fn run_faulty(
    base: &(SimDevice, Model),
    seed: u64,
    plan: impl Fn(&SimDevice),
    goes_on: impl Fn(&Runner, Kind) -> bool,
) -> Verdict<Faulty> {
    let device = Arc::new(base.0.fork(seed));
    let pool = open(&device, TINY.cache_size).map_err(|error| format!("open: {error}"))?;
    let runner = Runner::adopt(pool, &base.1)?;
    let start = Step::new(&runner.model, "start".into(), true, 0..0);
    plan(&device);
    let mut faulty = Faulty {
        history: History {
            seed,
            cache_size: TINY.cache_size,
            steps: vec![start],
            trace: device.take_trace(),
        },
        device,
        runner,
        acked: 0,
        error: None,
    };
    let mut rng = SplitMix64::new(seed);
    for index in 0..=OPS {
        let op = match index {
            OPS => Op::Sync,
            _ => next_op(&mut rng, &faulty.runner.model, &SMALL),
        };
        let mut after = faulty.runner.model.clone();
        if apply(&mut after, &op).is_err() {
            after = faulty.runner.model.clone();
        }
        let step = Step::new(&after, op.text(), op.is_durable(), 0..0);
        faulty.history.steps.push(step);
        match faulty.runner.run(&op) {
            Ok(_) if op.is_durable() => faulty.acked = faulty.history.steps.len() - 1,
            Ok(_) => {}
            Err(error) if goes_on(&faulty.runner, error.kind()) => {
                faulty.history.steps.pop();
            }
            Err(error) => {
                faulty.error = Some(format!("{}: {:?}: {error}", op.text(), error.kind()));
                break;
            }
        }
    }
    Ok(faulty)
}

/// After a fault that must poison the pool: no acknowledgement, reads go on, and every crash image
/// is a state since the last acknowledged sync.
fn check_poisoned(faulty: &Faulty) -> Verdict {
    let pool = &faulty.runner.pool;
    let error = faulty.error.as_deref().ok_or("the fault reached nobody")?;
    for _ in 0..2 {
        if pool.sync().is_ok() {
            return Err(format!("a sync was acknowledged after {error}"));
        }
    }
    if pool.checkpoint().is_ok() {
        return Err(format!("a checkpoint was acknowledged after {error}"));
    }
    match pool.poisoned() {
        Some(reason) if !reason.is_empty() => {}
        _ => return Err(format!("poisoned() gives no reason after {error}")),
    }
    let now = nodupe::units::Time::default();
    let tried = pool.set_attr(
        nodupe::units::Ino::ROOT,
        &nodupe::engine::SetAttr {
            mtime: Some(now),
            ..Default::default()
        },
    );
    if tried.is_ok() {
        return Err(format!("a poisoned pool takes changes after {error}"));
    }
    old_data_reads(faulty)?;
    recover(faulty, "before close")?;
    if pool.close().is_ok() {
        return Err(format!("close says yes after {error}"));
    }
    recover(faulty, "after close")
}

/// Files that the history did not change can be read as before.
fn old_data_reads(faulty: &Faulty) -> Verdict {
    let steps = &faulty.history.steps;
    let (first, last) = (&steps[0].model, &steps[steps.len() - 1].model);
    for (id, node) in first.nodes.iter().filter(|(_, node)| node.is_file()) {
        let unchanged = last
            .nodes
            .get(id)
            .is_some_and(|now| now.content.is_same(&node.content));
        if !unchanged {
            continue;
        }
        let len = node.content.size().min(1024 * 1024) as usize;
        let mut bytes = Vec::new();
        let read = faulty
            .runner
            .pool
            .read(faulty.runner.ino(*id), 0, len, &mut bytes);
        read.map_err(|error| format!("old data of {id} cannot be read any more: {error}"))?;
        if bytes != node.content.read(0, len) {
            return Err(format!("old data of {id} reads as something else"));
        }
    }
    Ok(())
}

/// Reopens a few crash images.
fn recover(faulty: &Faulty, when: &str) -> Verdict {
    let newest = faulty.history.steps.len() - 1;
    for seed in 0..3 {
        let image = match seed {
            0 => faulty.device.crash_none(),
            _ => faulty.device.crash(seed),
        };
        let context = |error: String| format!("{when}, image {seed}: {error}");
        check(&image, "of the crash image").map_err(context)?;
        let image = Arc::new(image);
        let pool =
            open(&image, TINY.cache_size).map_err(|error| context(format!("open: {error}")))?;
        identify(&faulty.history, &pool, faulty.acked..=newest).map_err(context)?;
        pool.close()
            .map_err(|error| context(format!("close: {error}")))?;
        check(&image, "after recovery").map_err(context)?;
    }
    Ok(())
}

/// Everything is as the model says, now, after a close, and after a reopen.
fn check_whole(faulty: &Faulty) -> Verdict {
    faulty.device.heal();
    let context = |what: &'static str| move |error| format!("{what}: {error}");
    faulty.runner.compare().map_err(context("at the end"))?;
    let closed = faulty.runner.pool.close();
    closed.map_err(|error| format!("close: {error}"))?;
    let device = Arc::new(faulty.device.crash_none());
    check(&device, "after close")?;
    let pool = open(&device, TINY.cache_size).map_err(|error| format!("reopen: {error}"))?;
    let reopened = Runner::adopt(pool, &faulty.runner.model)?;
    reopened.compare().map_err(context("reopened"))
}

/// Calls `test` with each n of `1..=total` for the operations that a whole run needs, on all
/// processors, with a base of its own for each of a few seeds.
fn for_each_nth(
    name: &str,
    count: impl Fn(&SimDevice) -> u64 + Sync,
    test: impl Fn(&(SimDevice, Model), u64, u64) -> Verdict + Sync,
) {
    let runs = AtomicU64::new(0);
    let mut failures = Vec::new();
    for seed in seeds(2) {
        let prepared = furnished(seed, 60).and_then(|base| {
            // Faults are counted from behind `open`, which needs operations of its own.
            let opened = Cell::new(0);
            let plan = |device: &SimDevice| opened.set(count(device));
            let whole = run_faulty(&base, seed, plan, |_, _| false)?;
            match whole.error {
                Some(error) => Err(format!("without a fault: {error}")),
                None => Ok((count(&whole.device) - opened.get(), base)),
            }
        });
        match prepared {
            Ok((total, base)) => {
                let all: Vec<u64> = (1..=total).collect();
                let failed = for_each_seed(&all, |nth| {
                    runs.fetch_add(1, Ordering::Relaxed);
                    test(&base, seed, nth)
                });
                let failed = failed.into_iter();
                failures.extend(failed.map(|(nth, error)| (seed, format!("n={nth}: {error}"))));
            }
            Err(error) => failures.push((seed, error)),
        }
    }
    eprintln!("{name}: {} runs", runs.load(Ordering::Relaxed));
    assert_none(name, &failures);
}

#[test]
fn a_failed_write_poisons_the_pool() {
    for_each_nth(
        "a_failed_write_poisons",
        |device| device.counts().writes,
        |base, seed, nth| {
            for (fault, repeat) in [
                (Fault::Io, Repeat::Once),
                (Fault::Io, Repeat::Forever),
                (Fault::NoSpace, Repeat::Once),
                (Fault::NoSpace, Repeat::Forever),
            ] {
                let plan = |device: &SimDevice| device.fail(FaultOp::Write, nth, fault, repeat);
                let faulty = run_faulty(base, seed, plan, |_, _| false)?;
                check_poisoned(&faulty)
                    .map_err(|error| format!("{fault:?} {repeat:?}: {error}"))?;
            }
            Ok(())
        },
    );
}

#[test]
fn a_failed_sync_poisons_the_pool() {
    for_each_nth(
        "a_failed_sync_poisons",
        |device| device.counts().syncs,
        |base, seed, nth| {
            for repeat in [Repeat::Once, Repeat::Forever] {
                let plan = |device: &SimDevice| device.fail(FaultOp::Sync, nth, Fault::Io, repeat);
                let faulty = run_faulty(base, seed, plan, |_, _| false)?;
                check_poisoned(&faulty).map_err(|error| format!("{repeat:?}: {error}"))?;
            }
            Ok(())
        },
    );
}

#[test]
fn a_failed_discard_harms_nothing() {
    for_each_nth(
        "a_failed_discard",
        |device| device.counts().discards,
        |base, seed, nth| {
            let plan = |device: &SimDevice| {
                device.fail(FaultOp::Discard, nth, Fault::Io, Repeat::Forever);
            };
            let faulty = run_faulty(base, seed, plan, |_, _| false)?;
            match &faulty.error {
                Some(error) => Err(format!("a discard is advisory: {error}")),
                None => check_whole(&faulty),
            }
        },
    );
}

#[test]
fn a_failed_read_fails_one_operation() {
    for_each_nth(
        "a_failed_read",
        |device| device.counts().reads,
        |base, seed, nth| {
            for fault in [
                Fault::Io,
                Fault::FlipBit,
                Fault::Misdirected,
                Fault::Torn,
                Fault::Lost,
            ] {
                let plan = |device: &SimDevice| {
                    device.fail(FaultOp::Read, nth, fault, Repeat::Once);
                };
                let goes_on = |runner: &Runner, kind| {
                    matches!(kind, Kind::Io | Kind::Corrupt) && runner.pool.poisoned().is_none()
                };
                let faulty = run_faulty(base, seed, plan, goes_on)?;
                match &faulty.error {
                    Some(_) => recover(&faulty, "after a failed read"),
                    None => check_whole(&faulty),
                }
                .map_err(|error| format!("{fault:?}: {error}"))?;
            }
            Ok(())
        },
    );
}

#[test]
fn an_open_that_cannot_read_can_be_repeated() {
    let mut runs = 0;
    for seed in seeds(2) {
        let (device, model) = furnished(seed, 60).expect("a pool on a sound device");
        for nth in 1.. {
            let device = Arc::new(device.fork(seed));
            device.fail(FaultOp::Read, nth, Fault::Io, Repeat::Once);
            let opened = open(&device, TINY.cache_size);
            runs += 1;
            let Err(error) = opened else {
                // A copy helped out, or all reads of an open have had their turn.
                if device.counts().reads < nth {
                    break;
                }
                continue;
            };
            assert_eq!(error.kind(), Kind::Io, "SEED={seed} n={nth}: {error}");
            let pool = open(&device, TINY.cache_size).expect("the device is sound again");
            let again = Runner::adopt(pool, &model).and_then(|runner| runner.compare());
            again.unwrap_or_else(|error| panic!("SEED={seed} n={nth}: {error}"));
        }
    }
    eprintln!("opens with a read error: {runs}");
}

#[test]
fn writes_that_lie_are_noticed_or_harmless() {
    for_each_nth(
        "writes_that_lie",
        |device| device.counts().writes,
        |base, seed, nth| {
            for fault in [Fault::Lost, Fault::Misdirected, Fault::Torn, Fault::FlipBit] {
                let plan = |device: &SimDevice| {
                    device.fail(FaultOp::Write, nth, fault, Repeat::Once);
                };
                let faulty = run_faulty(base, seed, plan, |_, _| false)?;
                // Whether it says yes is its own matter: it cannot know.
                let closed = faulty.runner.pool.close();
                drop(closed);
                let device = faulty.device.crash_all();
                let checked = Pool::check(&device, None, &mut |_, _| {});
                let mut last = faulty.runner.model.clone();
                last.forget_unnamed();
                let steps = faulty.history.steps.iter().map(|step| &step.model);
                let models: Vec<&Model> = steps.chain([&last]).collect();
                let look = look_for_any(&device, TINY.cache_size, &models)
                    .map_err(|error| format!("{fault:?}: {error}"))?;
                let is_clean = checked.is_ok_and(|findings| findings.is_empty());
                if is_clean && (look.refused || look.errors > 0) {
                    return Err(format!("{fault:?}: check finds nothing, but {look:?}"));
                }
            }
            Ok(())
        },
    );
}

#[test]
fn a_flipped_bit_gives_an_error_or_nothing() {
    let (errors, right, refused) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let base = furnished(seeds(3)[0], 150).expect("a pool on a sound device");
    let used = used_blocks(&base.0);
    let all: Vec<u64> = (0..2000).collect();
    let failures = for_each_seed(&all, |seed| {
        let mut rng = SplitMix64::new(seed);
        let device = Arc::new(base.0.fork(seed));
        // Most often in a place where every bit counts: the beginning of a block.
        let within = if rng.chance(30) { 64 } else { 4096 };
        let addr = used[rng.index(used.len())] + rng.below(within);
        device.flip(addr, rng.below(8) as u32);
        let checked = Pool::check(&*device, None, &mut |_, _| {});
        let look = look(&device, TINY.cache_size, &base.1)
            .map_err(|error| format!("flipped at {addr:#x}: {error}"))?;
        errors.fetch_add(u64::from(look.errors > 0), Ordering::Relaxed);
        refused.fetch_add(u64::from(look.refused), Ordering::Relaxed);
        right.fetch_add(
            u64::from(look.errors == 0 && !look.refused),
            Ordering::Relaxed,
        );
        let is_clean = checked.is_ok_and(|findings| findings.is_empty());
        if is_clean && (look.refused || look.errors > 0) {
            return Err(format!(
                "flipped at {addr:#x}: check finds nothing, but {look:?}"
            ));
        }
        Ok(())
    });
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    eprintln!(
        "flipped bits: {} gave errors, {} pools did not open, {} changed nothing",
        get(&errors),
        get(&refused),
        get(&right)
    );
    assert_none("a_flipped_bit", &failures);
    assert!(get(&errors) > 0, "no flip reached anything that is read");
}

#[test]
fn a_flipped_bit_before_recovery_gives_a_past_state_or_an_error() {
    let seed = seeds(3)[0];
    let base = furnished(seed, 60).expect("a pool on a sound device");
    let faulty = run_faulty(&base, seed, |_| {}, |_, _| false).expect("no fault was planned");
    let image = faulty.device.crash_none();
    let used = used_blocks(&image);
    let models: Vec<&Model> = faulty
        .history
        .steps
        .iter()
        .map(|step| &step.model)
        .collect();
    let all: Vec<u64> = (0..1000).collect();
    let failures = for_each_seed(&all, |seed| {
        let mut rng = SplitMix64::new(seed);
        let device = image.fork(seed);
        let addr = used[rng.index(used.len())] + rng.below(4096);
        device.flip(addr, rng.below(8) as u32);
        // Its verdict depends on where the journal ends for it; but it must not panic.
        drop(Pool::check(&device, None, &mut |_, _| {}));
        let seen = look_for_any(&device, TINY.cache_size, &models);
        seen.map(drop)
            .map_err(|error| format!("flipped at {addr:#x}: {error}"))
    });
    assert_none("a_flipped_bit_before_recovery", &failures);
}
