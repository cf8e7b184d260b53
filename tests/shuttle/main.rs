//! The engine under a model checker: thousands of interleavings of the real code, one thread at a
//! time, the scheduler's choice at every lock, atomic access, signal and device operation.
//!
//! A *world* is a pool on a simulated device with a few threads that do a few operations each.
//! What they wrote and read is compared with what a file may show (`history.rs`); worlds are cut
//! at random moments and opened again, as after a crash. A deadlock is a failure too.
//!
//! ```text
//! cargo test --features shuttle --test shuttle                       a few thousand schedules
//! SEED=7 SCHEDULES=5000 cargo test --features shuttle --test shuttle clones
//! REPLAY=target/tmp/schedule000 cargo test --features shuttle --test shuttle clones
//! ```
//!
//! `SCHEDULES` is for each test, `SEED` repeats a run; a failure prints where its schedule is, and
//! `REPLAY` repeats exactly that world. `docs/concurrency.md` says what is modelled and what not.

// Of the common parts this needs the check only.
#[path = "../common/mod.rs"]
mod common;

mod device;
mod explore;
mod history;
mod mix;
mod readers;
mod stamps;
mod world;

use explore::explore;
use mix::{Mix, Op};
use nodupe::device::Fault;

/// Writers of all kinds, readers and clones on two files, checkpoints between them.
const BUSY: Mix = Mix {
    threads: &[
        &[Op::Write, Op::WriteHalf, Op::Read, Op::Sync],
        &[Op::Write, Op::Clone, Op::Truncate, Op::Sync],
        &[Op::WriteDirect, Op::Read, Op::Punch],
        &[Op::Checkpoint, Op::Read],
        &[Op::Look],
    ],
    ops: 3,
    workers: false,
    close: false,
    crash: true,
    fault: None,
};

#[test]
fn files_are_linearizable_and_survive_crashes() {
    explore("files_are_linearizable", 300, |rng| mix::run(&BUSY, rng));
}

#[test]
fn background_threads_disturb_nobody() {
    const MIX: Mix = Mix {
        workers: true,
        threads: &[
            &[Op::Write, Op::WriteHalf, Op::Read, Op::Sync],
            &[Op::WriteDirect, Op::Clone, Op::Truncate, Op::Punch],
            &[Op::Checkpoint, Op::Names, Op::Read, Op::Look],
        ],
        ..BUSY
    };
    explore("background_threads", 200, |rng| mix::run(&MIX, rng));
}

#[test]
fn syncs_are_answered_once_and_truly() {
    const MIX: Mix = Mix {
        threads: &[
            &[Op::Write, Op::Sync],
            &[Op::Write, Op::SyncWith],
            &[Op::Write, Op::Sync, Op::SyncWith],
            &[Op::Checkpoint],
        ],
        ops: 4,
        ..BUSY
    };
    explore("syncs", 400, |rng| mix::run(&MIX, rng));
}

#[test]
fn nothing_is_acknowledged_behind_a_failure() {
    const MIX: Mix = Mix {
        threads: &[
            &[Op::Write, Op::Sync],
            &[Op::WriteDirect, Op::SyncWith],
            &[Op::Checkpoint, Op::Sync],
        ],
        ops: 4,
        fault: Some(Fault::Io),
        ..BUSY
    };
    explore("failure", 300, |rng| mix::run(&MIX, rng));
    const WORKERS: Mix = Mix {
        workers: true,
        ..MIX
    };
    explore("failure_with_workers", 100, |rng| mix::run(&WORKERS, rng));
}

#[test]
fn a_full_host_loses_nothing() {
    const MIX: Mix = Mix {
        threads: &[
            &[Op::Write, Op::Sync],
            &[Op::WriteDirect, Op::SyncWith],
            &[Op::Checkpoint, Op::Sync],
        ],
        ops: 4,
        fault: Some(Fault::NoSpace),
        ..BUSY
    };
    explore("full_host", 300, |rng| mix::run(&MIX, rng));
    const WORKERS: Mix = Mix {
        workers: true,
        ..MIX
    };
    explore("full_host_with_workers", 100, |rng| mix::run(&WORKERS, rng));
}

#[test]
fn names_and_files_that_vanish_leave_nothing_behind() {
    const MIX: Mix = Mix {
        threads: &[
            &[Op::Names, Op::Doom, Op::Sync],
            &[Op::WriteDoomed, Op::CloneDoomed, Op::Names],
            &[Op::WriteDoomed, Op::Checkpoint, Op::Write],
        ],
        ops: 4,
        ..BUSY
    };
    explore("names", 300, |rng| mix::run(&MIX, rng));
}

#[test]
fn discards_and_reallocation_never_meet() {
    const MIX: Mix = Mix {
        threads: &[
            &[Op::WriteDirect, Op::Punch, Op::Checkpoint],
            &[Op::WriteDirect, Op::Truncate, Op::Read],
            &[Op::Read, Op::Checkpoint, Op::Read],
        ],
        ops: 5,
        workers: true,
        ..BUSY
    };
    explore("discards", 150, |rng| mix::run(&MIX, rng));
    const ALONE: Mix = Mix {
        workers: false,
        ..MIX
    };
    explore("discards_alone", 200, |rng| mix::run(&ALONE, rng));
}

#[test]
fn no_reader_is_missed_when_a_block_is_used_again() {
    explore("readers", 20_000, readers::run);
}

#[test]
fn a_pool_closes_while_it_is_busy() {
    const MIX: Mix = Mix {
        threads: &[
            &[Op::Write, Op::Sync],
            &[Op::WriteDirect, Op::SyncWith, Op::Clone],
            &[Op::Checkpoint, Op::Read],
        ],
        close: true,
        ..BUSY
    };
    explore("close", 300, |rng| mix::run(&MIX, rng));
    const WORKERS: Mix = Mix {
        workers: true,
        ..MIX
    };
    explore("close_with_workers", 100, |rng| mix::run(&WORKERS, rng));
}

#[test]
fn clones_are_instants() {
    explore("clones_of_files", 250, |rng| stamps::run(false, false, rng));
    explore("clones_of_trees", 250, |rng| stamps::run(true, false, rng));
    explore("clones_with_workers", 100, |rng| {
        stamps::run(true, true, rng)
    });
}
