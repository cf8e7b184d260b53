//! Every kind of operation at every fill level of a pool that is nearly full, cut at every write:
//! it succeeds or is refused wholly, what frees space never fails, and no crash loses anything.

mod common;

use std::sync::Arc;

use common::crash::{
    Depth, Geometry, Totals, Verdict, assert_none, check, cut_everywhere, for_each_seed, new_pool,
};
use common::generate::random_bytes;
use common::history::{History, Op, Runner, Step, open};
use common::model::{Model, ROOT};

use nodupe::device::{SimDevice, SplitMix64};
use nodupe::engine::{FileKind, RenameMode, SetAttr, XattrMode};
use nodupe::error::Kind;

/// The smallest pool there is, half of it journal: quick to fill, to read back and to check.
const SMALLEST: Geometry = Geometry {
    pool_size: 4 * 1024 * 1024,
    journal_size: 2 * 1024 * 1024,
    cache_size: 4 * 1024 * 1024,
};
/// Available blocks from which on each fill level is looked at: more than the largest operation
/// asks for.
const LEVELS_FROM: u64 = 56;
const B: u64 = 4096;

/// A file with data, its clone, a directory with a file, a file with an attribute, a clone in
/// pieces, a file full of holes, and a file that fills the pool.
const FILE: usize = 1;
const CLONE: usize = 2;
const DIR: usize = 3;
const INNER: usize = 4;
const PIECES: usize = 6;
const HOLES: usize = 7;
const BALLAST: usize = 8;

fn prepare(rng: &mut SplitMix64) -> Vec<Op> {
    let file = |dir, name: &str| Op::Create(dir, name.into(), FileKind::Regular, Vec::new());
    let mut ops = vec![
        file(ROOT, "file"),
        file(ROOT, "clone"),
        Op::Create(ROOT, b"dir".to_vec(), FileKind::Directory, Vec::new()),
        file(DIR, "inner"),
        Op::Create(ROOT, b"empty".to_vec(), FileKind::Directory, Vec::new()),
        file(ROOT, "pieces"),
        file(ROOT, "holes"),
        file(ROOT, "ballast"),
        Op::Write(FILE, 0, random_bytes(rng, 150_000)),
        Op::CloneFile(FILE, CLONE),
        Op::Write(INNER, 0, random_bytes(rng, 20_000)),
        Op::SetXattr(
            INNER,
            b"user.x".to_vec(),
            random_bytes(rng, 2000),
            XattrMode::Set,
        ),
        Op::BeginClone(FILE, PIECES, 8192),
    ];
    // Every second block: one extent each, so that the map has several leaves.
    for index in 0..40 {
        ops.push(Op::Write(
            HOLES,
            index * 2 * B,
            random_bytes(rng, B as usize),
        ));
    }
    ops.push(Op::Checkpoint);
    ops
}

/// The operations, and whether they may be refused for want of space.
fn operations(rng: &mut SplitMix64) -> Vec<(Op, bool)> {
    let mut bytes = |len| random_bytes(rng, len);
    let name = |name: &str| name.as_bytes().to_vec();
    let at = |name: &str| (ROOT, name.as_bytes().to_vec());
    vec![
        (Op::Write(FILE, 100, bytes(300)), true),
        (Op::Write(CLONE, 4096, bytes(8192)), true),
        (Op::Write(CLONE, 0, bytes(131_072)), true),
        (Op::Write(INNER, 1 << 40, bytes(4096)), true),
        (Op::Write(FILE, 0, vec![0; 8192]), true),
        (Op::Truncate(FILE, 1 << 30), true),
        (Op::Truncate(CLONE, 5000), true),
        (Op::Truncate(CLONE, 8192), false),
        (Op::Truncate(FILE, 0), false),
        (Op::Punch(CLONE, 3000, 9000), true),
        (Op::Punch(CLONE, 8192, 40_960), false),
        (Op::Punch(HOLES, 8192, 81_920), false),
        (Op::CloneFile(FILE, INNER), true),
        (Op::CloneFile(INNER, HOLES), true),
        (Op::CloneRange((FILE, 0), (INNER, 8192), 8192), true),
        (
            Op::CloneTree(DIR, ROOT, vec![name("copy"), name("copy2")]),
            true,
        ),
        (Op::ExtendClone(PIECES, 16_384), true),
        (Op::EndClone(PIECES), false),
        (
            Op::Create(DIR, name("new"), FileKind::Regular, vec![]),
            true,
        ),
        (
            Op::Create(ROOT, name("link"), FileKind::Symlink, vec![b'/'; 3000]),
            true,
        ),
        (Op::Link(FILE, DIR, name("link")), true),
        (Op::Unlink(ROOT, name("file"), true), false),
        (Op::Unlink(ROOT, name("clone"), false), false),
        (Op::Unlink(ROOT, name("holes"), true), false),
        (Op::Rmdir(ROOT, name("empty")), false),
        (
            Op::Rename(at("file"), at("clone"), RenameMode::Replace),
            true,
        ),
        (
            Op::Rename(at("clone"), (DIR, name("inner")), RenameMode::Exchange),
            true,
        ),
        (
            Op::Rename(at("dir"), at("elsewhere"), RenameMode::NoReplace),
            true,
        ),
        (
            Op::SetXattr(FILE, name("user.y"), bytes(9000), XattrMode::Set),
            true,
        ),
        (Op::RemoveXattr(INNER, name("user.x")), false),
        (
            Op::SetAttr(
                FILE,
                SetAttr {
                    mode: Some(0o600),
                    ..SetAttr::default()
                },
            ),
            true,
        ),
        (Op::Checkpoint, false),
    ]
}

/// A pool at one fill level.
struct Level {
    device: SimDevice,
    model: Model,
    /// Blocks that could still be written.
    available: u64,
}

fn must(runner: &mut Runner, op: &Op) -> Verdict {
    match runner.run(op) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("{}: {:?}: {error}", op.text(), error.kind())),
    }
}

/// All fill levels, down to the one at which not a single block can be written.
fn levels() -> Verdict<Vec<Level>> {
    let mut rng = SplitMix64::new(1);
    let (device, pool) = new_pool(&SMALLEST, 1)?;
    let mut runner = Runner::new(pool);
    for op in prepare(&mut rng) {
        must(&mut runner, &op)?;
    }
    let mut levels = Vec::new();
    let mut offset = 0;
    loop {
        let available = runner.pool.usage().available / B;
        let large = available > LEVELS_FROM + 72;
        let len = if large { 65_536 } else { B as usize };
        if available <= LEVELS_FROM {
            levels.push(Level {
                device: device.fork(available),
                model: runner.model.clone(),
                available,
            });
        }
        match runner.run(&Op::Write(BALLAST, offset, random_bytes(&mut rng, len))) {
            Ok(_) => offset += len as u64,
            Err(error) if error.kind() == Kind::NoSpace => break,
            Err(error) => return Err(format!("{:?}: {error}", error.kind())),
        }
        must(&mut runner, &Op::Checkpoint)?;
        must(&mut runner, &Op::Checkpoint)?;
    }
    let lowest = levels
        .last()
        .map_or(u64::MAX, |level: &Level| level.available);
    if lowest > 4 || levels.len() < 30 {
        return Err(format!(
            "{} levels, the lowest has {lowest} blocks",
            levels.len()
        ));
    }
    Ok(levels)
}

/// One operation at one level, then what must work at any: sync, delete, checkpoint, close.
fn history(level: &Level, op: &Op, may_fail: bool, seed: u64) -> Verdict<(History, bool)> {
    let device = Arc::new(level.device.fork(seed));
    let pool = open(&device, SMALLEST.cache_size).map_err(|error| format!("open: {error}"))?;
    let mut runner = Runner::adopt(pool, &level.model)?;
    device.record();
    let mut steps = vec![Step::new(&runner.model, "start".into(), true, 0..0)];
    let mut run = |runner: &mut Runner, op: &Op, may_fail: bool| -> Verdict<bool> {
        let begin = device.recorded();
        let done = match runner.run(op) {
            Ok(_) => true,
            Err(error) if error.kind() == Kind::NoSpace && may_fail => false,
            Err(error) => return Err(format!("{}: {:?}: {error}", op.text(), error.kind())),
        };
        let events = begin..device.recorded();
        let text = if done {
            op.text()
        } else {
            format!("{} (no space)", op.text())
        };
        steps.push(Step::new(&runner.model, text, op.is_durable(), events));
        Ok(done)
    };
    let done = run(&mut runner, op, may_fail)?;
    run(&mut runner, &Op::Sync, false)?;
    runner.compare()?;
    // Not quite half of the pool: space that can be used at once.
    run(&mut runner, &Op::Punch(BALLAST, 0, 400 * 1024), false)?;
    run(&mut runner, &Op::Checkpoint, false)?;
    run(&mut runner, &Op::Checkpoint, false)?;
    let data = random_bytes(&mut SplitMix64::new(seed), 200_000);
    run(
        &mut runner,
        &Op::Write(BALLAST, 0, data[..131_072].to_vec()),
        false,
    )?;
    runner.compare()?;
    let begin = device.recorded();
    let closed = runner.pool.close();
    closed.map_err(|error| format!("close: {error}"))?;
    let events = begin..device.recorded();
    runner.model.forget_unnamed();
    steps.push(Step::new(&runner.model, "close".into(), true, events));
    check(&device, "after close")?;
    let history = History {
        seed,
        cache_size: SMALLEST.cache_size,
        steps,
        trace: device.take_trace(),
    };
    Ok((history, done))
}

#[test]
fn every_operation_at_every_fill_level_survives_a_crash_at_every_write() {
    let levels = levels().unwrap_or_else(|error| panic!("{error}"));
    let count = operations(&mut SplitMix64::new(2)).len();
    let depth = Depth {
        images: 1,
        second_every: 32,
        continue_every: u64::MAX, // going on needs space
    };
    let totals = Totals::default();
    let refused = std::sync::atomic::AtomicU64::new(0);
    let all: Vec<u64> = (0..(levels.len() * count) as u64).collect();
    let failures = for_each_seed(&all, |seed| {
        let level = &levels[seed as usize / count];
        let (op, may_fail) = operations(&mut SplitMix64::new(2)).swap_remove(seed as usize % count);
        let context = |error| format!("{} blocks, {}: {error}", level.available, op.text());
        let (history, done) = history(level, &op, may_fail, seed).map_err(context)?;
        if !done {
            refused.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        cut_everywhere(&history, &depth, &totals).map_err(context)
    });
    totals.report("full pools");
    eprintln!(
        "{} fill levels, {count} operations, {refused:?} refused",
        levels.len()
    );
    assert!(refused.into_inner() > 0, "the pool was never full");
    assert_none("every_operation_at_every_fill_level", &failures);
}
