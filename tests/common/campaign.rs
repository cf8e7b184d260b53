//! Every kind of fault that a simulated device knows, one run for each, and what came of it: the
//! fault was detected, or it harmed nothing. Anything else is a violation.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use nodupe::device::{BlockDevice, Fault, FaultOp, Repeat, SimDevice, SplitMix64};
use nodupe::engine::Pool;
use nodupe::error::Kind;
use nodupe::ondisk::node::NODE_MAGIC;
use nodupe::ondisk::superblock::HEAD_BLOCKS;

use super::crash::{TINY, Verdict};
use super::damage::{look, look_for_any, used_blocks};
use super::faulty::{Base, Faulty, Source, check_poisoned, check_whole, recover, run_faulty};
use super::generate::random_bytes;
use super::history::Runner;
use super::model::Model;

/// A way to go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// The n-th operation of a kind.
    Op(FaultOp, Fault, Repeat),
    /// The host under a sparse pool has room for n more blocks.
    HostFull,
    /// A block was changed while nobody looked; of a pool that was closed, or was not.
    Rot(Rot, bool),
}

/// What happens to a block at rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rot {
    FlipBit,
    Zeros,
    Garbage,
    /// It is what another block is.
    Copy,
}

/// What came of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Somebody was told: an error, a finding, a pool that is refused.
    Detected,
    /// Everything is as it should be.
    Tolerated,
}

/// All of them, by the name under which they are counted.
pub(crate) fn kinds() -> Vec<(String, Wrong)> {
    let mut kinds = Vec::new();
    let errors = [Fault::Io, Fault::NoSpace];
    let lies = [
        Fault::Lost,
        Fault::Torn,
        Fault::Misdirected,
        Fault::Delayed,
        Fault::FlipBit,
        Fault::Zeros,
        Fault::Garbage,
    ];
    let mut add = |op: FaultOp, fault: Fault, repeat: Repeat| {
        let name = format!("{op:?} {fault:?} {repeat:?}").to_lowercase();
        kinds.push((name, Wrong::Op(op, fault, repeat)));
    };
    for repeat in [Repeat::Once, Repeat::Forever] {
        for fault in errors {
            add(FaultOp::Write, fault, repeat);
            add(FaultOp::Sync, fault, repeat);
        }
        add(FaultOp::Read, Fault::Io, repeat);
        add(FaultOp::Discard, Fault::Io, repeat);
    }
    for fault in lies {
        add(FaultOp::Write, fault, Repeat::Once);
        if fault != Fault::Delayed {
            add(FaultOp::Read, fault, Repeat::Once);
        }
    }
    add(FaultOp::Sync, Fault::Lost, Repeat::Once);
    kinds.push(("host full".into(), Wrong::HostFull));
    for rot in [Rot::FlipBit, Rot::Zeros, Rot::Garbage, Rot::Copy] {
        for closed in [true, false] {
            let state = if closed { "closed" } else { "crashed" };
            let name = format!("rot {rot:?}, {state} pool").to_lowercase();
            kinds.push((name, Wrong::Rot(rot, closed)));
        }
    }
    kinds
}

/// Faults by kind: injected, detected, tolerated.
#[derive(Debug, Default)]
pub(crate) struct Tally(Mutex<BTreeMap<String, [u64; 3]>>);

impl Tally {
    pub(crate) fn add(&self, kind: &str, outcome: Outcome) {
        let mut counts = self.0.lock().expect("nobody panics while counting");
        let counts = counts.entry(kind.to_owned()).or_default();
        counts[0] += 1;
        counts[1] += u64::from(outcome == Outcome::Detected);
        counts[2] += u64::from(outcome == Outcome::Tolerated);
    }

    /// Injected, detected and tolerated, of all kinds.
    pub(crate) fn total(&self) -> [u64; 3] {
        let counts = self.0.lock().expect("nobody panics while counting");
        let add = |sum: [u64; 3], counts: &[u64; 3]| {
            [sum[0] + counts[0], sum[1] + counts[1], sum[2] + counts[2]]
        };
        counts.values().fold([0; 3], add)
    }

    /// One line for each kind.
    pub(crate) fn table(&self) -> String {
        let counts = self.0.lock().expect("nobody panics while counting");
        let lines = counts.iter().map(|(kind, [all, detected, tolerated])| {
            format!("{kind:34} {all:9} {detected:9} {tolerated:9}\n")
        });
        let head = format!(
            "{:34} {:>9} {:>9} {:>9}\n",
            "fault", "injected", "detected", "tolerated"
        );
        head + &lines.collect::<String>()
    }
}

/// How many operations a run without a fault needs behind its open: reads, writes, syncs, discards,
/// and the blocks that it takes from the host.
pub(crate) fn measure(base: &Base, seed: u64, source: Source) -> Verdict<[u64; 5]> {
    let before = std::cell::Cell::new([0; 4]);
    let before_host = std::cell::Cell::new(0);
    let counts = |device: &SimDevice| {
        let counts = device.counts();
        [counts.reads, counts.writes, counts.syncs, counts.discards]
    };
    let plan = |device: &SimDevice| {
        before.set(counts(device));
        device.limit_space(Some(u64::MAX));
        before_host.set(device.taken());
    };
    let whole = run_faulty(base, seed, source, plan, |_, _| false)?;
    if let Some(error) = whole.error {
        return Err(format!("without a fault: {error}"));
    }
    let (after, before) = (counts(&whole.device), before.get());
    let taken = whole.device.taken();
    Ok([
        after[0] - before[0],
        after[1] - before[1],
        after[2] - before[2],
        after[3] - before[3],
        taken.saturating_sub(before_host.get()),
    ])
}

/// The largest n that makes sense for a kind, given what [`measure`] found.
pub(crate) fn bound(wrong: Wrong, measured: &[u64; 5]) -> u64 {
    match wrong {
        Wrong::Op(FaultOp::Read, ..) => measured[0],
        Wrong::Op(FaultOp::Write, ..) => measured[1],
        Wrong::Op(FaultOp::Sync, ..) => measured[2],
        Wrong::Op(FaultOp::Discard, ..) => measured[3],
        Wrong::HostFull => measured[4],
        Wrong::Rot(..) => u64::from(u32::MAX),
    }
}

/// One run of the history of `seed`, or of a list, with one fault. `nth` counts operations from 1,
/// or is the room of the host, or decides which block rots.
pub(crate) fn inject(
    base: &Base,
    seed: u64,
    source: Source,
    wrong: Wrong,
    nth: u64,
) -> Verdict<Outcome> {
    let op = match wrong {
        Wrong::Rot(rot, closed) => return rot_one(base, seed, source, rot, closed, nth),
        Wrong::HostFull => return fill_host(base, seed, source, nth),
        Wrong::Op(op, ..) => op,
    };
    let Wrong::Op(_, fault, repeat) = wrong else {
        unreachable!("the other ways were handled");
    };
    let plan = |device: &SimDevice| device.fail(op, nth, fault, repeat);
    let is_error = matches!(fault, Fault::Io | Fault::NoSpace);
    match (op, is_error) {
        (FaultOp::Write, true) if fault == Fault::NoSpace => {
            no_space(run_faulty(base, seed, source, plan, |_, _| false)?)
        }
        (FaultOp::Write | FaultOp::Sync, true) => {
            let faulty = run_faulty(base, seed, source, plan, |_, _| false)?;
            check_poisoned(&faulty).map(|()| Outcome::Detected)
        }
        (FaultOp::Discard, _) => {
            let faulty = run_faulty(base, seed, source, plan, |_, _| false)?;
            match &faulty.error {
                Some(error) => Err(format!("a discard is advisory: {error}")),
                None => check_whole(&faulty).map(|()| Outcome::Tolerated),
            }
        }
        (FaultOp::Read, _) => {
            let told = std::cell::Cell::new(false);
            let goes_on = |runner: &Runner, kind| {
                told.set(true);
                matches!(kind, Kind::Io | Kind::Corrupt) && runner.pool.poisoned().is_none()
            };
            let faulty = run_faulty(base, seed, source, plan, goes_on)?;
            match &faulty.error {
                Some(_) => recover(&faulty, "after a failed read")?,
                None if repeat == Repeat::Once => check_whole(&faulty)?,
                None => {}
            }
            let was_told = told.get() || faulty.error.is_some();
            Ok(if was_told {
                Outcome::Detected
            } else {
                Outcome::Tolerated
            })
        }
        _ => lie(&run_faulty(base, seed, source, plan, |_, _| false)?, fault),
    }
}

/// After a write or sync that did not do what it said: whatever is wrong is noticed, and nothing
/// that is proven to have been durable is gone without a word.
fn lie(faulty: &Faulty, fault: Fault) -> Verdict<Outcome> {
    let floor = match fault {
        // It may be written over batches before it, of which it would have been the proof.
        Fault::Misdirected => faulty.floor().min(faulty.checkpoint_before_hit()),
        _ => faulty.floor(),
    };
    let mut detected = faulty.error.is_some();
    let mut last = faulty.runner.model.clone();
    last.forget_unnamed();
    let steps = faulty.history.steps.iter().map(|step| &step.model);
    let models: Vec<&Model> = steps.chain([&last]).collect();
    let crashes = [faulty.device.crash_all(), faulty.device.crash_none()];
    let closed = faulty.runner.pool.close();
    let image = faulty.device.crash_all();
    let closed_floor = if closed.is_ok() {
        models.len() - 2
    } else {
        floor
    };
    let images = crashes.into_iter().map(|image| (image, floor, false));
    for (image, floor, is_closed) in images.chain([(image, closed_floor, closed.is_ok())]) {
        let checked = Pool::check(&image, None, &mut |_, _| {});
        let is_clean = checked.is_ok_and(|findings| findings.is_empty());
        let state = if is_closed { "closed" } else { "crashed" };
        let look = look_for_any(&image, TINY.cache_size, &models[floor..])
            .map_err(|error| format!("{state}, since step {floor}: {error}"))?;
        if is_closed && is_clean && (look.refused || look.errors > 0) {
            return Err(format!("check finds nothing, but {look:?}"));
        }
        detected |= look.refused || look.errors > 0 || !is_clean;
    }
    Ok(if detected {
        Outcome::Detected
    } else {
        Outcome::Tolerated
    })
}

/// A history while the host fills up: what was acknowledged stays, and everything works again once
/// there is room.
fn fill_host(base: &Base, seed: u64, source: Source, room: u64) -> Verdict<Outcome> {
    let plan = |device: &SimDevice| {
        device.limit_space(Some(u64::MAX));
        device.limit_space(Some(device.taken() + room - 1));
    };
    no_space(run_faulty(base, seed, source, plan, |_, _| false)?)
}

/// After a write for which the host had no space: whoever was told goes on when there is some, and
/// nothing acknowledged is gone, whether the pool could take more or not.
fn no_space(faulty: Faulty) -> Verdict<Outcome> {
    let Some(error) = &faulty.error else {
        return check_whole(&faulty).map(|()| Outcome::Tolerated);
    };
    if faulty.runner.pool.poisoned().is_some() {
        return check_poisoned(&faulty).map(|()| Outcome::Detected);
    }
    if !error.contains("NoSpace") {
        return Err(format!("a full host is no reason for {error}"));
    }
    recover(&faulty, "with a full host")?;
    faulty.device.heal();
    faulty.device.limit_space(None);
    let closed = faulty.runner.pool.close();
    closed.map_err(|error| format!("close with room again: {error}"))?;
    recover(&faulty, "with room again")?;
    Ok(Outcome::Detected)
}

/// One damaged block of a pool that was closed, or cut off behind a history.
fn rot_one(
    base: &Base,
    seed: u64,
    source: Source,
    rot: Rot,
    closed: bool,
    nth: u64,
) -> Verdict<Outcome> {
    let mut rng = SplitMix64::new(nth ^ seed.rotate_left(17));
    if closed {
        let device = Arc::new(base.0.fork(seed));
        let place = damage(&device, rot, &mut rng);
        let checked = Pool::check(&*device, None, &mut |_, _| {});
        let seen = look(&device, TINY.cache_size, &base.1)
            .map_err(|error| format!("{rot:?} of {place}: {error}"))?;
        let is_clean = checked.is_ok_and(|findings| findings.is_empty());
        let is_told = seen.refused || seen.errors > 0;
        if is_clean && is_told {
            return Err(format!(
                "{rot:?} of {place}: check finds nothing, but {seen:?}"
            ));
        }
        let detected = is_told || !is_clean;
        return Ok(if detected {
            Outcome::Detected
        } else {
            Outcome::Tolerated
        });
    }
    let faulty = run_faulty(base, seed, source, |_| {}, |_, _| false)?;
    let image = faulty.device.crash_none();
    let place = damage(&image, rot, &mut rng);
    // The last batch alone can be taken for one that a crash cut off.
    let floor = faulty.durable.iter().rev().nth(1).copied().unwrap_or(0);
    let models: Vec<&Model> = faulty
        .history
        .steps
        .iter()
        .map(|step| &step.model)
        .collect();
    let checked = Pool::check(&image, None, &mut |_, _| {});
    let is_clean = checked.is_ok_and(|findings| findings.is_empty());
    let seen = look_for_any(&image, TINY.cache_size, &models[floor..])
        .map_err(|error| format!("{rot:?} of {place}, since step {floor}: {error}"))?;
    let detected = seen.refused || seen.errors > 0 || !is_clean;
    Ok(if detected {
        Outcome::Detected
    } else {
        Outcome::Tolerated
    })
}

/// Damages a block that is in use, and says which.
pub(crate) fn damage(device: &SimDevice, rot: Rot, rng: &mut SplitMix64) -> String {
    let used = used_blocks(device);
    let at = used[rng.index(used.len())];
    let name = describe(device, at);
    let put = |bytes: &[u8]| {
        let written = device.write_at(at, bytes);
        assert!(
            written.and_then(|()| device.sync()).is_ok(),
            "a sound device writes"
        );
    };
    match rot {
        // Most often in a place where every bit counts: the beginning of a block.
        Rot::FlipBit => {
            let within = if rng.chance(30) { 64 } else { 4096 };
            device.flip(at + rng.below(within), rng.below(8) as u32);
        }
        Rot::Zeros => put(&[0; 4096]),
        Rot::Garbage => put(&random_bytes(rng, 4096)),
        Rot::Copy => {
            let mut bytes = vec![0; 4096];
            let read = device.read_at(used[rng.index(used.len())], &mut bytes);
            assert!(read.is_ok(), "a sound device reads");
            put(&bytes);
        }
    }
    name
}

/// What a block holds, by its looks.
pub(crate) fn describe(device: &SimDevice, at: u64) -> String {
    let mut bytes = vec![0; 4096];
    let read = device.read_at(at, &mut bytes);
    assert!(read.is_ok(), "a sound device reads");
    let block = at / 4096;
    let what = match block {
        0 | 1 => "superblock",
        _ if at + 8192 >= device.len() => "superblock copy",
        _ if block < HEAD_BLOCKS + TINY.journal_size / 4096 => "journal",
        _ if bytes[..4] == NODE_MAGIC.to_le_bytes() => "node",
        _ => "data",
    };
    format!("{what} block {block}")
}
