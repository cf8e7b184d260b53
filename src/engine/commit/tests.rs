//! A full ring: the batch of a cut waits in memory until its checkpoint is durable. And what is
//! written ahead of a sync that is likely to come.

use std::sync::Arc;
use std::time::Duration;

use crate::device::{Fault, FaultOp, Repeat, SimDevice};
use crate::engine::{CreateOptions, NewNode, OpenOptions, Pool};
use crate::error::{Error, Kind};
use crate::ondisk::record::Record;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Instant, mpsc, thread};
use crate::units::{Ino, Time};

use super::super::work::WORK_MAX;

const MIB: u64 = 1024 * 1024;

/// An empty pool with a ring of 1 MiB.
fn new_pool() -> (Arc<SimDevice>, Arc<Pool>) {
    let device = Arc::new(SimDevice::new(12 * MIB, 1));
    let options = CreateOptions {
        journal_size: Some(MIB),
        uuid: [1; 16],
        hash_key: [2; 16],
        uid: 0,
        gid: 0,
        time: Time::default(),
    };
    Pool::create(device.clone(), None, &options).expect("there is room");
    let options = OpenOptions {
        read_only: false,
        cache_size: 4 * MIB,
    };
    let pool = Pool::open(device.clone(), None, &options).expect("a new pool opens");
    (device, pool)
}

fn refused() -> Error {
    Error::new(Kind::NoSpace, "the host is full")
}

/// Changes the trees, so that a checkpoint has nodes to write.
fn create(pool: &Pool, name: &str) -> Ino {
    let node = NewNode::regular(0o600);
    let made = pool.create_node(Ino::ROOT, name.as_bytes(), &node, Time::default());
    made.expect("there is room").ino
}

/// Queues what changes nothing, without keeping the limits.
fn push(pool: &Pool, ino: Ino) {
    pool.stage.lock().push(Record::RemoveXattr {
        ino,
        name: vec![b'x'; 200],
        now: Time::default(),
    });
}

/// Fills the ring, by cuts whose checkpoints were given up.
fn fill_ring(pool: &Pool, ino: Ino) {
    for _ in 0..MIB / 4096 {
        for _ in 0..300 {
            push(pool, ino);
        }
        let gate = pool.gate.write();
        let cut = pool.commit_cut().expect("the device is sound");
        let is_full = cut.held.is_some();
        pool.stage.lock().uncut_attrs();
        pool.end_cut(cut, Some(&refused()));
        drop(gate);
        if is_full {
            return;
        }
    }
    panic!("the ring never gets full");
}

/// What `call` returns, in time.
fn ends<T: Send + 'static>(pool: &Arc<Pool>, call: fn(&Pool) -> T) -> T {
    let (sender, receiver) = mpsc::channel();
    let pool = Arc::clone(pool);
    let caller = thread::spawn(move || sender.send(call(&pool)));
    let outcome = receiver.recv_timeout(Duration::from_secs(20));
    let outcome = outcome.expect("it ends in time");
    let sent = caller.join().expect("it does not panic");
    sent.expect("somebody receives");
    outcome
}

/// A pool whose ring is full, and whose checkpoint waits behind the cut with its batch held.
fn held() -> (Arc<SimDevice>, Arc<Pool>) {
    let (device, pool) = new_pool();
    let ino = create(&pool, "a");
    fill_ring(&pool, ino);
    device.fail(FaultOp::Write, 1, Fault::NoSpace, Repeat::Forever);
    let error = pool.checkpoint().expect_err("the host is full");
    assert_eq!(error.kind(), Kind::NoSpace, "{error}");
    assert!(pool.commit.state.lock().held, "the batch is held");
    push(&pool, ino);
    (device, pool)
}

#[test]
fn nobody_waits_for_a_held_batch() {
    let (device, pool) = held();
    let error = ends(&pool, Pool::sync).expect_err("the host is full");
    assert_eq!(error.kind(), Kind::NoSpace, "{error}");
    pool.poison(&refused());
    let error = ends(&pool, Pool::sync).expect_err("the pool is poisoned");
    assert_eq!(error.kind(), Kind::Poisoned, "{error}");
    drop(device);
    let (device, pool) = held();
    device.heal();
    ends(&pool, Pool::sync).expect("the host has space again");
    ends(&pool, Pool::close).expect("the host has space again");
}

/// A checkpoint that the host has no space for, for which somebody waits: what they are told.
fn refused_checkpoint_for_one(pool: &Pool) -> Result<(), Error> {
    let (sender, receiver) = mpsc::channel();
    let pushed = pool.stage.lock().pushed;
    let done = Box::new(move |outcome| sender.send(outcome).expect("somebody receives"));
    pool.commit.state.lock().waiters.push((pushed, done));
    let outcome = pool.checkpoint_with(false, || Err(refused()));
    assert_eq!(outcome.expect_err("refused").kind(), Kind::NoSpace);
    receiver.try_recv().expect("the checkpoint answers")
}

#[test]
fn a_refused_checkpoint_refuses_nobody_for_whom_the_ring_has_room() {
    let (device, pool) = new_pool();
    let ino = create(&pool, "a");
    pool.sync().expect("the device is sound");
    // All the time that a replay may take is used up, and hardly any of the ring.
    pool.journal.lock().add_work(WORK_MAX);
    create(&pool, "b");
    refused_checkpoint_for_one(&pool).expect("the ring has room");
    let crashed = Arc::new(device.crash_none());
    let again = Pool::open(crashed, None, &OpenOptions::default()).expect("it opens");
    again.lookup(Ino::ROOT, b"b").expect("a synced name");
    fill_ring(&pool, ino);
    let error = refused_checkpoint_for_one(&pool).expect_err("the ring is full");
    assert_eq!(error.kind(), Kind::NoSpace, "{error}");
}

#[test]
fn a_pool_with_a_held_batch_closes() {
    let (_device, pool) = held();
    pool.start().expect("threads can be made");
    thread::sleep(Duration::from_millis(1300)); // the commit thread has its turn
    let error = ends(&pool, Pool::close).expect_err("the host is full");
    assert_eq!(error.kind(), Kind::NoSpace, "{error}");
    assert!(!error.to_string().contains("nothing is lost"), "{error}");
}

#[test]
fn the_last_cut_closes_the_stage_also_with_a_full_ring() {
    let (_device, pool) = new_pool();
    let ino = create(&pool, "a");
    fill_ring(&pool, ino);
    assert!(pool.stage.lock().has_room(0, usize::MAX));
    pool.set_closed();
    let gate = pool.gate.write();
    let cut = pool.commit_cut().expect("the device is sound");
    assert!(cut.held.is_some(), "the ring is full");
    // A writer that had begun before the close comes now: it would be in no durable state.
    let has_room = pool.stage.lock().has_room(0, usize::MAX);
    pool.end_cut(cut, Some(&refused()));
    drop(gate);
    assert!(!has_room, "staged behind the last cut");
}

/// Writes a block of a file, as the mount does.
fn write(pool: &Pool, ino: Ino, block: u64, byte: u8) {
    let bytes = [byte; 4096];
    let written = pool.write(ino, block * 4096, &bytes, Time::default());
    written.expect("there is room");
    pool.anticipate_sync();
}

/// A pool with a file that one writer writes and syncs block by block.
fn alone() -> (Arc<SimDevice>, Arc<Pool>, Ino) {
    let (device, pool) = new_pool();
    let ino = create(&pool, "a");
    for round in 0..8 {
        write(&pool, ino, round, 1);
        pool.sync().expect("the device is sound");
    }
    (device, pool, ino)
}

/// The first byte of a block after a crash of `device`.
fn after_crash(device: &SimDevice, ino: Ino, block: u64) -> Option<u8> {
    let device = Arc::new(device.crash(1));
    let pool = Pool::open(device, None, &OpenOptions::default()).expect("it opens");
    let mut bytes = Vec::new();
    pool.read(ino, block * 4096, 1, &mut bytes)
        .expect("it reads");
    bytes.first().copied()
}

#[test]
fn a_write_is_in_the_ring_before_its_sync_and_durable_with_it() {
    let (device, pool, ino) = alone();
    let before = device.counts();
    write(&pool, ino, 8, 2);
    let written = device.counts();
    assert_eq!(written.writes, before.writes + 1, "it is in the ring");
    assert_eq!(written.syncs, before.syncs, "nothing is durable by that");
    assert!(pool.is_unsynced());
    pool.sync().expect("the device is sound");
    let synced = device.counts();
    assert_eq!(synced.writes, written.writes, "nothing is left to write");
    assert_eq!(synced.syncs, written.syncs + 1);
    assert!(!pool.is_unsynced());
    assert_eq!(after_crash(&device, ino, 8), Some(2));
}

#[test]
fn a_batch_is_durable_before_the_next_one_is_written() {
    let (device, pool, ino) = alone();
    write(&pool, ino, 8, 2);
    write(&pool, ino, 9, 3); // not foreseen
    let before = device.counts();
    pool.sync().expect("the device is sound");
    let synced = device.counts();
    assert_eq!(synced.syncs, before.syncs + 2, "one for each batch");
    assert_eq!(after_crash(&device, ino, 9), Some(3));
    write(&pool, ino, 10, 4);
    let written = device.counts();
    assert_eq!(written.writes, synced.writes, "it is not expected any more");
}

#[test]
fn a_checkpoint_makes_durable_what_was_written_ahead() {
    let (device, pool, ino) = alone();
    write(&pool, ino, 8, 2);
    pool.checkpoint().expect("the device is sound");
    assert!(!pool.is_unsynced());
    assert_eq!(after_crash(&device, ino, 8), Some(2));
}

#[test]
fn a_failed_sync_of_what_was_written_ahead_poisons() {
    let (device, pool, ino) = alone();
    write(&pool, ino, 8, 2);
    device.fail(FaultOp::Sync, 1, Fault::Io, Repeat::Once);
    let error = pool.sync().expect_err("the device failed");
    assert_ne!(error.kind(), Kind::NoSpace, "{error}");
    assert!(pool.poisoned().is_some());
    assert!(pool.sync().is_err(), "nothing is tried again");
}

#[test]
fn what_was_written_ahead_is_synced_also_if_the_next_batch_is_refused() {
    let (device, pool, ino) = alone();
    write(&pool, ino, 8, 2);
    write(&pool, ino, 9, 3); // not foreseen: it waits for a sync
    device.fail(FaultOp::Write, 1, Fault::NoSpace, Repeat::Forever);
    let error = pool.sync().expect_err("the host is full");
    assert_eq!(error.kind(), Kind::NoSpace, "{error}");
    assert!(pool.commit.state.lock().written.is_none());
    assert!(pool.is_unsynced(), "the second one waits");
    assert_eq!(after_crash(&device, ino, 8), Some(2));
}

#[test]
fn a_checkpoint_with_a_full_ring_leaves_nothing_unsynced() {
    let (_device, pool) = new_pool();
    let ino = create(&pool, "a");
    fill_ring(&pool, ino);
    // As if the last batch of the ring had been written ahead.
    pool.commit.state.lock().written = Some(Instant::now());
    pool.checkpoint().expect("the device is sound");
    assert!(!pool.is_unsynced());
    assert_eq!(pool.unsynced_ms(), 0);
}

#[test]
fn a_failure_elsewhere_takes_the_lead_from_nobody() {
    // Whether somebody leads and who waits must be looked at in one instant: whoever began to lead
    // in between would lose the lead, and two would write the journal. A machine on which the two
    // never meet misses the bug; it does not see one that is not there.
    let (_device, pool) = new_pool();
    let ino = create(&pool, "a");
    let (stop, failing) = (Arc::new(AtomicBool::new(false)), Arc::clone(&pool));
    let over = Arc::clone(&stop);
    let failing = thread::spawn(move || {
        while !over.load(Ordering::SeqCst) {
            failing.commit_failed(&refused());
        }
    });
    for _ in 0..2000 {
        push(&pool, ino);
        if let Err(error) = pool.sync() {
            assert_eq!(error.kind(), Kind::NoSpace, "{error}");
        }
    }
    stop.store(true, Ordering::SeqCst);
    failing.join().expect("it does not panic");
    pool.sync().expect("the device is sound");
    let state = pool.commit.state.lock();
    assert!(!state.leader && state.waiters.is_empty());
}
