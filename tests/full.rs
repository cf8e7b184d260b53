//! A full pool is harmless: ENOSPC comes before the acknowledgement, nothing acknowledged is lost,
//! deleting always works, and what was deleted can be used again.

mod common;

use std::sync::Arc;

use common::crash::{
    Depth, TINY, Totals, Verdict, assert_none, check, cut_everywhere, for_each_seed, new_pool,
    record, seeds,
};
use common::generate::{Limits, next_op, random_bytes};
use common::history::{Op, Runner, open};
use common::model::{Id, ROOT};

use nodupe::device::{SimDevice, SplitMix64};
use nodupe::engine::FileKind;
use nodupe::error::Kind;

const KIB: u64 = 1024;

fn create(name: &str) -> Op {
    Op::Create(
        ROOT,
        name.as_bytes().to_vec(),
        FileKind::Regular,
        Vec::new(),
    )
}

fn unlink(name: &str) -> Op {
    Op::Unlink(ROOT, name.as_bytes().to_vec(), true)
}

/// Runs an operation that must succeed.
fn must(runner: &mut Runner, op: &Op) -> Verdict {
    match runner.run(op) {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!("{} was refused", op.text())),
        Err(error) => Err(format!("{}: {:?}: {error}", op.text(), error.kind())),
    }
}

/// Runs an operation for which there may be no space; false if there was none.
fn may(runner: &mut Runner, op: &Op) -> Verdict<bool> {
    match runner.run(op) {
        Ok(_) => Ok(true),
        // The tiny journal holds no large tree at once.
        Err(error) if error.kind() == Kind::TooLarge && matches!(op, Op::CloneTree(..)) => Ok(true),
        Err(error) if error.kind() == Kind::NoSpace => Ok(false),
        Err(error) => Err(format!("{}: {:?}: {error}", op.text(), error.kind())),
    }
}

fn id(runner: &Runner, name: &str) -> Verdict<Id> {
    let found = runner.model.lookup(ROOT, name.as_bytes());
    found.map_err(|kind| format!("{name}: {kind:?}"))
}

/// Writes files of about 1 MiB until there is no space, in pieces of `piece` bytes. Returns how
/// many files there are.
fn fill(runner: &mut Runner, rng: &mut SplitMix64, piece: u64, prefix: &str) -> Verdict<usize> {
    for index in 0.. {
        let name = format!("{prefix}{index}");
        if !may(runner, &create(&name))? {
            return Ok(index);
        }
        let id = id(runner, &name)?;
        let mut offset = 0;
        while offset < 1024 * KIB {
            let write = Op::Write(id, offset, random_bytes(rng, piece as usize));
            if !may(runner, &write)? {
                return Ok(index + 1);
            }
            offset += piece;
        }
        if index > 100 {
            return Err("the pool does not get full".into());
        }
    }
    Ok(0)
}

/// Reopens behind a crash, everything synced before.
fn reopen(device: &SimDevice, runner: Runner, seed: u64) -> Verdict<(Arc<SimDevice>, Runner)> {
    let crashed = Arc::new(device.crash(seed));
    check(&crashed, "of a full pool")?;
    let pool = open(&crashed, TINY.cache_size).map_err(|error| format!("reopen: {error}"))?;
    let runner = Runner::adopt(pool, &runner.model)?;
    runner.compare()?;
    Ok((crashed, runner))
}

#[test]
fn a_full_pool_keeps_what_it_acknowledged() {
    let failures = for_each_seed(&seeds(8), |seed| {
        let mut rng = SplitMix64::new(seed);
        let (mut device, pool) = new_pool(&TINY, seed)?;
        let mut runner = Runner::new(pool);
        must(&mut runner, &Op::Checkpoint)?;
        let empty = runner.pool.usage();
        for round in 0..3 {
            let piece = [4 * KIB, 64 * KIB, 256 * KIB, 700][(seed as usize + round) % 4];
            let files = fill(&mut runner, &mut rng, piece, "big")?;
            let usage = runner.pool.usage();
            if usage.available > 512 * KIB {
                return Err(format!("no space, but {} bytes are free", usage.available));
            }
            // No bytes for data, so names until these fail as well.
            let mut small = 0;
            while small < 3000 && may(&mut runner, &create(&format!("small{small}")))? {
                small += 1;
            }
            must(&mut runner, &Op::Sync)?;
            runner.compare()?;
            (device, runner) = reopen(&device, runner, seed)?;
            must(&mut runner, &Op::Checkpoint)?;
            fill(&mut runner, &mut rng, 4 * KIB, "more")?;
            runner.compare()?;
            let before = runner.pool.usage();
            let half = files / 2;
            for index in 0..half {
                must(&mut runner, &unlink(&format!("big{index}")))?;
            }
            must(&mut runner, &Op::Checkpoint)?;
            must(&mut runner, &Op::Checkpoint)?;
            let after = runner.pool.usage();
            let freed = (half as u64 * 1024 * KIB).min(before.used);
            if after.available < before.available + freed * 9 / 10 {
                return Err(format!(
                    "{freed} bytes deleted, free before {} and after {}",
                    before.available, after.available
                ));
            }
            must(&mut runner, &create("again"))?;
            let again = id(&runner, "again")?;
            must(
                &mut runner,
                &Op::Write(again, 0, random_bytes(&mut rng, 300_000)),
            )?;
            must(&mut runner, &Op::Sync)?;
            (device, runner) = reopen(&device, runner, seed + 1)?;
            empty_out(&mut runner)?;
        }
        let usage = runner.pool.usage();
        if usage.used > empty.used + 256 * KIB {
            return Err(format!(
                "leak: used {} when empty, now {}",
                empty.used, usage.used
            ));
        }
        runner
            .pool
            .close()
            .map_err(|error| format!("close: {error}"))?;
        check(&device, "of a pool that was full")
    });
    assert_none("a_full_pool_keeps", &failures);
}

/// Removes every name in the root.
fn empty_out(runner: &mut Runner) -> Verdict {
    let names: Vec<_> = runner.model.node(ROOT).entries.keys().cloned().collect();
    for name in names {
        must(runner, &Op::Unlink(ROOT, name, true))?;
    }
    must(runner, &Op::Checkpoint)?;
    must(runner, &Op::Checkpoint)
}

#[test]
fn overwriting_clones_at_full_never_fails_a_sync() {
    let failures = for_each_seed(&seeds(8), |seed| {
        let mut rng = SplitMix64::new(seed);
        let (device, pool) = new_pool(&TINY, seed)?;
        let mut runner = Runner::new(pool);
        must(&mut runner, &create("gold"))?;
        let gold = id(&runner, "gold")?;
        for index in 0..12 {
            let data = random_bytes(&mut rng, 256 * 1024);
            must(&mut runner, &Op::Write(gold, index * 256 * KIB, data))?;
        }
        let mut clones = Vec::new();
        for index in 0..6 {
            let name = format!("clone{index}");
            must(&mut runner, &create(&name))?;
            clones.push(id(&runner, &name)?);
            must(&mut runner, &Op::CloneFile(gold, clones[index]))?;
        }
        let (mut refused, mut synced) = (0, 0);
        for _ in 0..3000 {
            let clone = clones[rng.index(clones.len())];
            let offset = rng.below(3 * 1024 * KIB - 8192);
            let len = rng.below(8192) as usize + 1;
            let write = Op::Write(clone, offset, random_bytes(&mut rng, len));
            refused += usize::from(!may(&mut runner, &write)?);
            if rng.chance(5) {
                must(&mut runner, &Op::Sync)?;
                synced += 1;
            }
            if refused > 200 {
                break;
            }
        }
        if refused == 0 {
            return Err(format!("the pool never got full in {synced} syncs"));
        }
        must(&mut runner, &Op::Sync)?;
        let (_, mut runner) = reopen(&device, runner, seed)?;
        empty_out(&mut runner)
    });
    assert_none("overwriting_clones_at_full", &failures);
}

/// Far more than fits into the pool.
const GREEDY: Limits = Limits {
    nodes_max: 120,
    bytes_max: 40 * 1024 * KIB,
    file_max: 2048 * KIB,
};

/// True for what may never fail for want of space.
fn frees(op: &Op) -> bool {
    matches!(
        op,
        Op::Unlink(..)
            | Op::Rmdir(..)
            | Op::Reclaim(_)
            | Op::EndClone(_)
            | Op::Sync
            | Op::Checkpoint
    ) || matches!(op, Op::Truncate(_, 0))
}

/// The next operation, which fills the pool again where the others emptied it.
fn greedy_op(rng: &mut SplitMix64, runner: &Runner) -> Op {
    let files = runner.model.nodes.iter().filter(|(_, node)| node.is_file());
    let files: Vec<Id> = files.map(|(id, _)| *id).collect();
    if files.is_empty() || runner.pool.usage().available < 256 * KIB || rng.chance(60) {
        return next_op(rng, &runner.model, &GREEDY);
    }
    let offset = rng.below(GREEDY.file_max) / 4096 * 4096;
    Op::Write(
        files[rng.index(files.len())],
        offset,
        random_bytes(rng, 256 * 1024),
    )
}

#[test]
fn random_histories_on_a_full_pool_survive_crashes() {
    let totals = Totals::default();
    let depth = Depth {
        images: 1,
        second_every: 16,
        continue_every: u64::MAX, // going on needs space
    };
    let failures = for_each_seed(&seeds(6), |seed| {
        let mut rng = SplitMix64::new(seed);
        // Filled without a record first: only what happens on the full pool is cut.
        let mut left = 240;
        let mut refused = 0;
        let mut ballast = (0..34).map(|index| index * 256 * KIB);
        let mut is_made = false;
        let history = record(&TINY, seed, false, |runner| {
            if !is_made {
                is_made = true;
                return Some(create("ballast"));
            }
            if let Some(offset) = ballast.next() {
                return Some(Op::Write(1, offset, random_bytes(&mut rng, 256 * 1024)));
            }
            while left > 0 {
                left -= 1;
                let op = greedy_op(&mut rng, runner);
                // Tried on a pool in the same state it would be twice the work: ask the free
                // space instead, and leave out what clearly does not fit.
                let needs = match &op {
                    Op::Write(_, _, data) => data.len() as u64 + 64 * KIB,
                    _ => 64 * KIB,
                };
                if frees(&op) || runner.pool.usage().available > needs {
                    return Some(op);
                }
                refused += 1;
            }
            None
        })?;
        if refused == 0 {
            return Err("the pool never got full".into());
        }
        cut_everywhere(&history, &depth, &totals)
    });
    totals.report("full pools");
    assert_none("random_histories_on_a_full_pool", &failures);
}

#[test]
fn random_operations_on_a_full_pool_fail_wholly() {
    let failures = for_each_seed(&seeds(12), |seed| {
        let mut rng = SplitMix64::new(seed);
        let (device, pool) = new_pool(&TINY, seed)?;
        let mut runner = Runner::new(pool);
        let mut refused = 0;
        for index in 0..1500 {
            let op = greedy_op(&mut rng, &runner);
            if matches!(op, Op::BeginClone(..)) {
                continue; // a change that is refused ends a clone in pieces all the same
            }
            if frees(&op) {
                // A file that is shared or sparse is freed with what the reserve holds.
                let done = runner.run(&op);
                done.map_err(|error| format!("{}: {:?}: {error}", op.text(), error.kind()))?;
            } else if !may(&mut runner, &op)? {
                refused += 1;
            }
            if index % 200 == 199 {
                runner
                    .compare()
                    .map_err(|error| format!("{}: {error}", op.text()))?;
            }
        }
        if refused == 0 {
            return Err("the pool never got full".into());
        }
        must(&mut runner, &Op::Sync)?;
        let (_, runner) = reopen(&device, runner, seed)?;
        runner
            .pool
            .close()
            .map_err(|error| format!("close: {error}"))
    });
    assert_none("random_operations_on_a_full_pool", &failures);
}
