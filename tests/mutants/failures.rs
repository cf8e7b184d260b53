//! A device that fails, or whose host is full, at one certain moment.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use nodupe::device::{Fault, FaultOp, Repeat};
use nodupe::error::Kind;
use nodupe::units::Ino;

use super::common::crash::TINY;
use super::device::{At, Others, open_hooked};
use super::{assert_written, checkpoint, create, reopen, write};

#[test]
fn syncs_take_turns_and_none_succeeds_behind_one_that_failed() {
    // A device tells of a lost write only once. The sync of a checkpoint fails while a commit
    // waits for its turn: its write may be what was lost.
    let (device, pool, file) = open_hooked(&TINY, |pool| create(pool, "file"));
    create(&pool, "other");
    pool.sync().expect("the device is sound");
    let (others, said_yes) = (Others::default(), Arc::new(AtomicBool::new(false)));
    let (sim, worker, waiting, answer) = (
        device.sim.clone(),
        pool.clone(),
        others.clone(),
        said_yes.clone(),
    );
    device.at(At::Sync, move || {
        let pool = worker.clone();
        waiting.begin(move || {
            write(&pool, file, 0, 1, 1);
            answer.store(pool.sync().is_ok(), Ordering::SeqCst);
        });
        sim.fail(FaultOp::Sync, 1, Fault::Io, Repeat::Once);
    });
    pool.checkpoint().expect_err("its sync fails");
    others.join();
    device.assert_all_happened();
    assert!(!device.syncs_met.load(Ordering::SeqCst), "two at once");
    assert!(!said_yes.load(Ordering::SeqCst), "a sync behind a failure");
    assert!(pool.poisoned().is_some());
    pool.sync().expect_err("it stays so");
}

#[test]
fn a_checkpoint_whose_sync_fails_is_the_end() {
    let (device, pool, _) = open_hooked(&TINY, |_| ());
    create(&pool, "synced");
    pool.sync().expect("the device is sound");
    device.sim.fail(FaultOp::Sync, 1, Fault::Io, Repeat::Once);
    pool.checkpoint().expect_err("its sync fails");
    assert!(pool.poisoned().is_some());
    pool.sync().expect_err("also if nothing waits");
    pool.close().expect_err("nothing is acknowledged any more");
    let left = reopen(device.sim.crash_none());
    left.lookup(Ino::ROOT, b"synced").expect("it was synced");
}

#[test]
fn a_batch_that_the_host_refused_is_written_by_the_next_sync() {
    let (device, pool, file) = open_hooked(&TINY, |pool| create(pool, "file"));
    write(&pool, file, 0, 1, 2);
    device
        .sim
        .fail(FaultOp::Write, 1, Fault::NoSpace, Repeat::Once);
    let refused = pool.sync().expect_err("the host has no space");
    assert_eq!(refused.kind(), Kind::NoSpace);
    pool.sync().expect("it has again");
    assert_written(&reopen(device.sim.crash_none()), file, 0, 1, 2);
}

#[test]
fn a_checkpoint_that_the_host_refused_is_finished_by_the_next() {
    let (device, pool, file) = open_hooked(&TINY, |pool| create(pool, "file"));
    write(&pool, file, 0, 1, 20);
    pool.sync().expect("the device is sound");
    let sim = device.sim.clone();
    device.at(At::WriteNode, move || {
        sim.fail(FaultOp::Write, 1, Fault::NoSpace, Repeat::Once);
    });
    let refused = pool.checkpoint().expect_err("the host has no space");
    assert_eq!(refused.kind(), Kind::NoSpace);
    device.assert_all_happened();
    write(&pool, file, 20, 1, 1);
    checkpoint(&pool);
    let left = reopen(device.sim.crash_none());
    assert_written(&left, file, 0, 1, 20);
    assert_written(&left, file, 20, 1, 1);
}

#[test]
fn a_sync_is_not_answered_by_the_batch_before_its_own() {
    let (device, pool, _) = open_hooked(&TINY, |_| ());
    // With its threads nobody looks at the journal, which is held here, before a change.
    pool.start().expect("threads can be made");
    let (answer, answered) = mpsc::channel();
    let (sim, worker) = (device.sim.clone(), pool.clone());
    device.at(At::WriteJournal, move || {
        // The batch was taken; this comes right behind it.
        create(&worker, "behind");
        worker.sync_with(Box::new(move |outcome| {
            outcome.expect("the device is sound");
            answer.send(sim.crash_none()).expect("the test waits");
        }));
    });
    create(&pool, "before");
    pool.sync().expect("the device is sound");
    let left = answered.recv().expect("whoever leads answers all");
    let left = reopen(left);
    let found = left.lookup(Ino::ROOT, b"behind");
    found.expect("what was synced is there");
    pool.close().expect("the device is sound");
}
