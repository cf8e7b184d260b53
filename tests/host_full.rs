//! The host under a sparse pool gets full: writers are told before they are answered, nothing that
//! was acknowledged is lost, deleting helps, and everything goes on once the host has space.

mod common;

use std::sync::Arc;

use common::crash::{TINY, Verdict, assert_none, check, for_each_seed, new_pool, seeds};
use common::generate::{Limits, next_op, random_bytes};
use common::history::{Op, Runner, create_options, open};
use common::model::{Id, ROOT};

use nodupe::device::{BlockDevice, Fault, FaultOp, Repeat, SimDevice, SplitMix64};
use nodupe::engine::{FileKind, Pool, RenameMode, XattrMode};
use nodupe::error::Kind;
use nodupe::units::Ino;

const KIB: u64 = 1024;
const B: u64 = 4096;
/// Blocks of the pool that the host has to have in any case: ring, reserve, superblocks.
const LEAST: u64 = 16 + 256 + 96 + 2;

fn create(name: &str) -> Op {
    Op::Create(ROOT, name.into(), FileKind::Regular, Vec::new())
}

fn must(runner: &mut Runner, op: &Op) -> Verdict {
    match runner.run(op) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("{}: {:?}: {error}", op.text(), error.kind())),
    }
}

/// Runs an operation for which there may be no space; false if there was none.
fn may(runner: &mut Runner, op: &Op) -> Verdict<bool> {
    match runner.run(op) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == Kind::TooLarge && matches!(op, Op::CloneTree(..)) => Ok(true),
        Err(error) if error.kind() == Kind::NoSpace => {
            if let Some(why) = runner.pool.poisoned() {
                return Err(format!("{} poisoned the pool: {why}", op.text()));
            }
            Ok(false)
        }
        Err(error) => Err(format!("{}: {:?}: {error}", op.text(), error.kind())),
    }
}

fn id(runner: &Runner, name: &str) -> Verdict<Id> {
    let found = runner.model.lookup(ROOT, name.as_bytes());
    found.map_err(|kind| format!("{name}: {kind:?}"))
}

/// A pool of 12 MiB on a host that has `blocks` for it.
fn pool_on_host(blocks: u64, seed: u64) -> Verdict<(Arc<SimDevice>, Runner)> {
    let device = Arc::new(SimDevice::new(TINY.pool_size, seed));
    device.limit_space(Some(blocks));
    let options = create_options(seed, TINY.journal_size);
    Pool::create(device.clone(), None, &options).map_err(|error| format!("create: {error}"))?;
    let pool = open(&device, TINY.cache_size).map_err(|error| format!("open: {error}"))?;
    Ok((device, Runner::new(pool)))
}

/// Everything is as the model says: in the open pool, after a crash and after a close.
fn survives(device: &SimDevice, runner: &Runner, seed: u64) -> Verdict {
    runner.compare()?;
    let crashed = Arc::new(device.crash(seed));
    check(&crashed, "after a crash")?;
    let pool = open(&crashed, TINY.cache_size).map_err(|error| format!("reopen: {error}"))?;
    let again = Runner::adopt(pool, &runner.model)?;
    again
        .compare()
        .map_err(|error| format!("reopened: {error}"))?;
    again
        .pool
        .close()
        .map_err(|error| format!("close: {error}"))?;
    check(&crashed, "after close")
}

#[test]
fn a_pool_goes_on_when_its_host_has_space_again() {
    let failures = for_each_seed(&seeds(40), |seed| {
        let mut rng = SplitMix64::new(seed);
        let host = LEAST + 20 + rng.below(1500);
        let (device, mut runner) = pool_on_host(host, seed)?;
        let (mut refused, mut acknowledged) = (0, 0);
        for index in 0..400 {
            let name = format!("f{index}");
            if !may(&mut runner, &create(&name))? {
                refused += 1;
                break;
            }
            let file = id(&runner, &name)?;
            let len = [700, 4096, 60_000, 300_000][rng.index(4)];
            match may(
                &mut runner,
                &Op::Write(file, 0, random_bytes(&mut rng, len)),
            )? {
                true => acknowledged += 1,
                false => refused += 1,
            }
            // A sync needs nothing of the host that it has not given already.
            must(&mut runner, &Op::Sync)?;
            if refused > 12 {
                break;
            }
        }
        if refused == 0 || acknowledged == 0 {
            return Err(format!(
                "{acknowledged} writes, {refused} refused on {host} blocks"
            ));
        }
        if runner.pool.usage().available < 100 * B {
            return Err("the pool got full, not the host".into());
        }
        survives(&device, &runner, seed)?;
        // While it lasts: the pool can be closed and opened, and names can be removed.
        match runner.pool.close() {
            Err(error) if error.kind() != Kind::NoSpace => return Err(format!("close: {error}")),
            _ => {}
        }
        let pool = open(&device, TINY.cache_size).map_err(|error| format!("reopen: {error}"))?;
        let mut runner = Runner::adopt(pool, &runner.model)?;
        runner.compare()?;
        must(&mut runner, &Op::Unlink(ROOT, b"f0".to_vec(), true))?;
        must(&mut runner, &Op::Sync)?;
        // And it goes on as if nothing had been.
        device.limit_space(Some(1 << 40));
        must(&mut runner, &create("after"))?;
        let after = id(&runner, "after")?;
        must(
            &mut runner,
            &Op::Write(after, 0, random_bytes(&mut rng, 100_000)),
        )?;
        must(
            &mut runner,
            &Op::Write(after, 100_000, random_bytes(&mut rng, 1000)),
        )?;
        must(&mut runner, &Op::Checkpoint)?;
        survives(&device, &runner, seed + 1)?;
        runner
            .pool
            .close()
            .map_err(|error| format!("close: {error}"))?;
        check(&device, "in the end")
    });
    assert_none("a_pool_goes_on_when", &failures);
}

#[test]
fn deleting_gives_a_full_host_its_space_back() {
    let failures = for_each_seed(&seeds(12), |seed| {
        let mut rng = SplitMix64::new(seed);
        let (device, mut runner) = pool_on_host(LEAST + 900, seed)?;
        for index in 0..6 {
            let name = format!("f{index}");
            must(&mut runner, &create(&name))?;
            let file = id(&runner, &name)?;
            for piece in 0..4 {
                let data = random_bytes(&mut rng, 128 * 1024);
                must(&mut runner, &Op::Write(file, piece * 128 * KIB, data))?;
            }
        }
        must(&mut runner, &Op::Checkpoint)?;
        // Large writes until the host has nothing left, and small ones on top of it.
        must(&mut runner, &create("last"))?;
        let last = id(&runner, "last")?;
        let mut offset = 0;
        while may(
            &mut runner,
            &Op::Write(last, offset, random_bytes(&mut rng, 64 * 1024)),
        )? {
            offset += 64 * KIB;
        }
        let before = device.host_free().map_err(|error| error.to_string())?;
        if before >= Some(64 * KIB) {
            return Err(format!("the host has space left: {before:?}"));
        }
        for index in 0..3 {
            must(
                &mut runner,
                &Op::Unlink(ROOT, format!("f{index}").into_bytes(), true),
            )?;
        }
        must(&mut runner, &Op::Checkpoint)?;
        must(&mut runner, &Op::Checkpoint)?;
        let after = device.host_free().map_err(|error| error.to_string())?;
        if after < Some(3 * 512 * KIB * 9 / 10) {
            return Err(format!(
                "the host had {before:?} and has {after:?} after deleting"
            ));
        }
        must(
            &mut runner,
            &Op::Write(last, offset, random_bytes(&mut rng, 64 * 1024)),
        )?;
        must(
            &mut runner,
            &Op::Write(last, 100, random_bytes(&mut rng, 100)),
        )?;
        must(&mut runner, &Op::Sync)?;
        survives(&device, &runner, seed)
    });
    assert_none("deleting_gives_a_full_host", &failures);
}

#[test]
fn truncating_helps_a_host_that_small_files_filled_to_the_last_byte() {
    let failures = for_each_seed(&seeds(24), |seed| {
        let mut rng = SplitMix64::new(seed);
        let (device, mut runner) = pool_on_host(LEAST + 600 + rng.below(300), seed)?;
        must(&mut runner, &create("keep"))?;
        let keep = id(&runner, "keep")?;
        let mut offset = 0;
        while may(
            &mut runner,
            &Op::Write(keep, offset, random_bytes(&mut rng, 64 * 1024)),
        )? {
            offset += 64 * KIB;
        }
        // There is a little again, so that small files are taken until that is used. Each needs a
        // block and nodes of its own. A checkpoint comes now and then, as by itself.
        device.limit_space(Some(device.taken() + 16 + rng.below(30)));
        let often = 1 + rng.below(60);
        let mut refused = 0;
        for index in 0..4000 {
            let name = format!("s{index}");
            let made = may(&mut runner, &create(&name))?;
            let wrote = made && {
                let file = id(&runner, &name)?;
                may(
                    &mut runner,
                    &Op::Write(file, 0, random_bytes(&mut rng, 4096)),
                )?
            };
            refused += u32::from(!wrote);
            if refused > 4 {
                break;
            }
            if rng.below(often) == 0 {
                may(&mut runner, &Op::Checkpoint)?;
            }
        }
        if refused <= 4 {
            return Err("the host never got full".into());
        }
        must(&mut runner, &Op::Truncate(keep, offset / 3))?;
        // What it freed is free with the first checkpoint, and the host's behind it.
        must(&mut runner, &Op::Checkpoint)?;
        let after = device.host_free().map_err(|error| error.to_string())?;
        if after < Some(offset / 3) {
            return Err(format!(
                "the host has {after:?} of {offset} after truncating"
            ));
        }
        must(&mut runner, &create("more"))?;
        let more = id(&runner, "more")?;
        must(
            &mut runner,
            &Op::Write(more, 0, random_bytes(&mut rng, 64 * 1024)),
        )?;
        must(&mut runner, &Op::Sync)?;
        survives(&device, &runner, seed)
    });
    assert_none("truncating_helps_a_host", &failures);
}

const GREEDY: Limits = Limits {
    nodes_max: 60,
    bytes_max: 10 * 1024 * KIB,
    file_max: 1024 * KIB,
};

#[test]
fn random_work_on_a_host_that_is_full_now_and_then_loses_nothing() {
    let failures = for_each_seed(&seeds(40), |seed| {
        let mut rng = SplitMix64::new(seed);
        let (device, mut runner) = pool_on_host(LEAST + rng.below(800), seed)?;
        let mut refused = 0;
        for index in 0..1200 {
            if rng.below(60) == 0 {
                device.limit_space(Some(LEAST + rng.below(1600)));
            }
            let op = match runner.model.nodes.iter().find(|(_, node)| node.is_file()) {
                Some((file, _)) if rng.chance(25) => {
                    let offset = rng.below(GREEDY.file_max) / B * B;
                    Op::Write(*file, offset, random_bytes(&mut rng, 64 * 1024))
                }
                _ => next_op(&mut rng, &runner.model, &GREEDY),
            };
            if matches!(op, Op::BeginClone(..)) {
                continue; // a change that is refused ends a clone in pieces all the same
            }
            refused += u32::from(!may(&mut runner, &op)?);
            if index % 300 == 299 {
                runner
                    .compare()
                    .map_err(|error| format!("{}: {error}", op.text()))?;
            }
        }
        if refused == 0 {
            return Err("the host never got full".into());
        }
        device.limit_space(Some(1 << 40));
        must(&mut runner, &Op::Sync)?;
        survives(&device, &runner, seed)?;
        must(&mut runner, &Op::Checkpoint)?;
        runner
            .pool
            .close()
            .map_err(|error| format!("close: {error}"))?;
        check(&device, "in the end")
    });
    assert_none("random_work_on_a_host", &failures);
}

/// Work with every kind of device write in it.
fn script(rng: &mut SplitMix64) -> Vec<Op> {
    let file = |name: &str| Op::Create(ROOT, name.into(), FileKind::Regular, Vec::new());
    vec![
        file("a"),
        file("b"),
        Op::Write(1, 0, random_bytes(rng, 20_000)),
        Op::Write(2, 0, random_bytes(rng, 200_000)),
        Op::Sync,
        Op::CloneFile(1, 2),
        Op::Write(2, 5000, random_bytes(rng, 9000)),
        Op::SetXattr(
            1,
            b"user.x".to_vec(),
            random_bytes(rng, 3000),
            XattrMode::Set,
        ),
        Op::Checkpoint,
        Op::Write(1, 0, random_bytes(rng, 131_072)),
        Op::Truncate(1, 70_001),
        Op::Punch(2, 3000, 9000),
        Op::Sync,
        Op::CloneRange((1, 0), (2, 8192), 16_384),
        Op::Rename(
            (ROOT, b"a".to_vec()),
            (ROOT, b"c".to_vec()),
            RenameMode::Replace,
        ),
        Op::Checkpoint,
        Op::Unlink(ROOT, b"b".to_vec(), true),
        Op::Write(1, 4096, random_bytes(rng, 4096)),
        Op::Sync,
        Op::Checkpoint,
    ]
}

#[test]
fn every_single_write_may_find_no_space_on_the_host() {
    // Once, or until the operation was refused: in either case it works when tried again.
    let run = |nth: u64, repeat: Option<Repeat>| -> Verdict<u64> {
        let (device, pool) = new_pool(&TINY, nth)?;
        let mut runner = Runner::new(pool);
        let before = device.counts().writes;
        if let Some(repeat) = repeat {
            device.fail(FaultOp::Write, nth, Fault::NoSpace, repeat);
        }
        for op in script(&mut SplitMix64::new(7)) {
            let mut tries = 0;
            while !may(&mut runner, &op)? {
                runner
                    .compare()
                    .map_err(|error| format!("refused {}: {error}", op.text()))?;
                tries += 1;
                if tries > 2 || repeat == Some(Repeat::Forever) {
                    device.heal();
                }
                if tries > 4 {
                    return Err(format!("{} never works again", op.text()));
                }
            }
            if op.is_durable() {
                survives(&device, &runner, nth)?;
            }
        }
        device.heal();
        runner
            .pool
            .close()
            .map_err(|error| format!("close: {error}"))?;
        check(&device, "in the end")?;
        Ok(device.counts().writes - before)
    };
    let writes = run(1, None).expect("a sound device");
    assert!(writes > 20, "{writes} writes are no script");
    let all: Vec<u64> = (0..2 * writes).collect();
    let failures = for_each_seed(&all, |index| {
        let repeat = [Repeat::Once, Repeat::Forever][index as usize % 2];
        run(index / 2 + 1, Some(repeat)).map(drop)
    });
    eprintln!("{} writes found no space", all.len());
    assert_none("every_single_write_may_find_no_space", &failures);
}

#[test]
fn a_sync_that_finds_no_space_poisons_the_pool() {
    // What the host took before and lost now nobody knows: as for any other failed sync.
    let (device, pool) = new_pool(&TINY, 1).expect("a pool is made");
    let mut runner = Runner::new(pool);
    must(&mut runner, &create("a")).expect("there is room");
    device.fail(FaultOp::Sync, 1, Fault::NoSpace, Repeat::Once);
    let failed = runner.run(&Op::Sync).expect_err("the sync fails");
    assert_eq!(failed.kind(), Kind::Io);
    assert!(runner.pool.poisoned().is_some());
    let again = runner.run(&Op::Sync).expect_err("it stays so");
    assert_eq!(again.kind(), Kind::Poisoned);
}

#[test]
fn a_pool_is_not_made_where_its_reserve_has_no_space() {
    for blocks in [0, 100, 273, LEAST - 1] {
        let device = Arc::new(SimDevice::new(TINY.pool_size, 1));
        device.limit_space(Some(blocks));
        let made = Pool::create(device, None, &create_options(1, TINY.journal_size));
        assert_eq!(made.expect_err("no room").kind(), Kind::NoSpace, "{blocks}");
    }
    pool_on_host(LEAST, 1).expect("the host keeps as much as that");
}

#[test]
fn a_pool_opens_where_the_host_has_no_space_for_copies_of_the_superblock() {
    let (device, pool) = new_pool(&TINY, 1).expect("a new pool");
    pool.close().expect("a sound device");
    for block in [TINY.pool_size / B - 2, TINY.pool_size / B - 1] {
        device.flip(block * B + 99, 1);
    }
    device.fail(FaultOp::Write, 1, Fault::NoSpace, Repeat::Forever);
    open(&device, TINY.cache_size).expect("the slots are whole");
}

#[test]
fn a_copy_that_found_no_space_is_written_before_it_is_two_rounds_old() {
    for nth in 1..8 {
        let (device, pool) = new_pool(&TINY, nth).expect("a new pool");
        let mut runner = Runner::new(pool);
        must(&mut runner, &create("a")).expect("there is room");
        // The one write behind the flip of this checkpoint is that of the copy.
        let before = device.counts().writes;
        must(&mut runner, &Op::Checkpoint).expect("there is room");
        let writes = device.counts().writes - before;
        device.fail(FaultOp::Write, writes, Fault::NoSpace, Repeat::Once);
        for name in ["b", "c", "d", "e"] {
            must(&mut runner, &create(name)).expect("there is room");
            must(&mut runner, &Op::Checkpoint).expect("a copy is not worth a refusal");
            survives(&device, &runner, nth).expect("nothing is to be found");
        }
    }
}

#[test]
fn copies_of_the_superblock_without_space_stop_no_checkpoint() {
    let (device, mut runner) = pool_on_host(TINY.pool_size / B, 3).expect("a new pool");
    for block in [TINY.pool_size / B - 2, TINY.pool_size / B - 1] {
        device.discard(block * B, B).expect("in range");
    }
    // From here on the host has what it gave, and no block more.
    device.limit_space(Some(device.taken()));
    for name in ["a", "b", "c", "d", "e"] {
        must(&mut runner, &create(name)).expect("the host is not full for this");
        must(&mut runner, &Op::Checkpoint).expect("copies are not worth a refusal");
        assert_eq!(runner.pool.usage().journal_used, 0, "the journal is free");
    }
    assert!(runner.pool.poisoned().is_none() && !runner.pool.is_host_full());
    assert_eq!(runner.pool.health().stale_copies, 2);
    let crashed = Arc::new(device.crash_none());
    let again = open(&crashed, TINY.cache_size).expect("both slots are whole");
    again.lookup(Ino::ROOT, b"e").expect("a synced name");
    drop(again);
    // They are written as soon as the host has space.
    device.limit_space(None);
    must(&mut runner, &Op::Checkpoint).expect("there is space");
    assert_eq!(runner.pool.health().stale_copies, 0);
    survives(&device, &runner, 3).expect("nothing is to be found");
}

#[test]
fn nothing_is_committed_behind_a_superblock_that_says_clean() {
    let (device, pool) = new_pool(&TINY, 4).expect("a new pool");
    pool.close().expect("a sound device");
    drop(pool);
    // Not even the superblock can be written.
    device.fail(FaultOp::Write, 1, Fault::NoSpace, Repeat::Forever);
    let pool = open(&device, TINY.cache_size).expect("a full host is no reason to refuse it");
    device.heal();
    let mut runner = Runner::new(pool);
    must(&mut runner, &create("a")).expect("the queue has room");
    assert!(runner.pool.info().clean, "nothing tried it again");
    device.fail(FaultOp::Write, 1, Fault::NoSpace, Repeat::Once);
    let refused = runner.pool.sync().expect_err("no superblock, no batch");
    assert_eq!(refused.kind(), Kind::NoSpace);
    runner.pool.sync().expect("the host has space again");
    assert!(!runner.pool.info().clean);
    survives(&device, &runner, 4).expect("what was acknowledged is there");
}
