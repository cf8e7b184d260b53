//! Two threads that meet in the middle of a device operation.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nodupe::engine::{Pool, Share};
use nodupe::units::{Ino, Time};

use super::common::crash::{Geometry, TINY, check};
use super::device::{At, B, Hooked, Others, open_hooked};
use super::{assert_written, blocks, checkpoint, create, read, reopen, write};

#[test]
fn what_is_staged_beside_a_checkpoint_is_durable_when_it_is() {
    let (device, pool, (one, two)) =
        open_hooked(&TINY, |pool| (create(pool, "one"), create(pool, "two")));
    write(&pool, one, 0, 1, 1);
    let worker = pool.clone();
    // Most of the stage is written before the cut; this comes in between.
    device.at(At::WriteData, move || write(&worker, two, 0, 2, 1));
    checkpoint(&pool);
    device.assert_all_happened();
    pool.sync().expect("the device is sound");
    let left = reopen(device.sim.crash_none());
    assert_written(&left, one, 0, 1, 1);
    assert_written(&left, two, 0, 2, 1);
}

/// Does `change` between the cut of a checkpoint and the moment its trees are complete. Returns
/// what a crash behind the next sync leaves.
fn change_behind_the_cut(change: fn(&Pool, Ino)) -> (Arc<Pool>, Ino) {
    let (device, pool, [one, two, three]) = open_hooked(&TINY, |pool| {
        ["one", "two", "three"].map(|name| create(pool, name))
    });
    write(&pool, one, 0, 1, 1);
    let worker = pool.clone();
    device.at(At::WriteData, move || write(&worker, two, 0, 2, 1));
    let (worker, others) = (pool.clone(), Others::default());
    let waiting = others.clone();
    device.at(At::WriteData, move || {
        waiting.begin(move || change(&worker, three));
    });
    checkpoint(&pool);
    others.join();
    device.assert_all_happened();
    pool.sync().expect("the device is sound");
    (reopen(device.sim.crash_none()), three)
}

#[test]
fn names_do_not_change_behind_the_cut() {
    let (left, _) = change_behind_the_cut(|pool, _| {
        create(pool, "behind");
    });
    left.lookup(Ino::ROOT, b"behind").expect("it was synced");
}

#[test]
fn nothing_is_mapped_behind_the_cut() {
    let (left, ino) = change_behind_the_cut(|pool, ino| write(pool, ino, 0, 3, 64));
    assert_written(&left, ino, 0, 3, 64);
}

#[test]
fn what_a_checkpoint_frees_is_not_used_before_it_is_durable() {
    let (device, pool, (old, new)) = open_hooked(&TINY, |pool| {
        let (old, new) = (create(pool, "old"), create(pool, "new"));
        // In front of all that is free, so that it would be used first.
        (0..6).for_each(|at| write(pool, old, at * 256, 1, 256));
        (old, new)
    });
    pool.truncate(old, 0, Time::default())
        .expect("always works");
    let image = Arc::new(Mutex::new(None));
    let (worker, sim, seen) = (pool.clone(), device.sim.clone(), image.clone());
    device.at(At::WriteSuperblock, move || {
        (0..2).for_each(|at| write(&worker, new, at * 256, 2, 256));
        worker.sync().expect("the device is sound");
        *seen.lock().expect("nobody panics inside") = Some(sim.crash_all());
    });
    checkpoint(&pool);
    device.assert_all_happened();
    let image = image.lock().expect("nobody panics inside").take();
    let left = reopen(image.expect("a superblock was written"));
    (0..2).for_each(|at| {
        let found = read(&left, new, at * 256 * B, 256 * B);
        assert!(found == blocks(2, 256), "piece {at} is lost");
    });
}

#[test]
fn a_destage_does_not_go_on_over_the_cut() {
    let geometry = Geometry {
        pool_size: 32 << 20,
        journal_size: 8 << 20,
        cache_size: 4 << 20,
    };
    let (device, pool, (direct, staged)) = open_hooked(&geometry, |pool| {
        (create(pool, "direct"), create(pool, "staged"))
    });
    let (others, (go_on, is_told)) = (Others::default(), mpsc::channel::<()>());
    let (workers, waiting, hooked) = (pool.clone(), others.clone(), device.clone());
    // A direct write holds the checkpoint back behind its own destage...
    device.at(At::WriteData, move || {
        let pool = workers.clone();
        let (done, is_done) = mpsc::channel::<()>();
        waiting.begin(move || {
            checkpoint(&pool);
            drop(done);
        });
        // ...while another one begins, because much is staged. There the checkpoint gets its turn.
        hooked.at(At::WriteData, move || {
            drop(go_on);
            let patience = Duration::from_millis(500);
            assert!(is_done.recv_timeout(patience) != Ok(()), "nobody sends");
        });
        let pool = workers.clone();
        waiting.begin(move || (0..80).for_each(|at| write(&pool, staged, at * 4, 2, 4)));
        let patience = Duration::from_secs(20);
        assert!(is_told.recv_timeout(patience) != Ok(()), "nobody sends");
    });
    write(&pool, direct, 0, 1, 32);
    others.join();
    device.assert_all_happened();
    check(&device.sim.crash_none(), "behind the checkpoint")
        .unwrap_or_else(|error| panic!("{error}"));
    assert_written(&pool, direct, 0, 1, 32);
    (0..80).for_each(|at| assert_written(&pool, staged, at * 4, 2, 4));
}

#[test]
fn no_checkpoint_is_written_while_something_is_discarded() {
    let (device, pool, file) = open_hooked(&TINY, |pool| {
        let file = create(pool, "file");
        write(pool, file, 0, 1, 256);
        file
    });
    pool.truncate(file, 0, Time::default())
        .expect("always works");
    let (worker, sim, others) = (pool.clone(), device.sim.clone(), Others::default());
    let waiting = others.clone();
    device.at(At::Discard, move || {
        let pool = worker.clone();
        let is_done = waiting.begin(move || {
            create(&pool, "other");
            checkpoint(&pool);
        });
        if is_done {
            let left = sim.crash_none();
            check(&left, "beside a discard").unwrap_or_else(|error| panic!("{error}"));
        }
    });
    checkpoint(&pool);
    others.join();
    device.assert_all_happened();
    reopen(device.sim.crash_none());
}

#[test]
fn two_writes_of_parts_of_a_block_keep_both() {
    let (device, pool, file) = open_hooked(&TINY, |pool| {
        let file = create(pool, "file");
        write(pool, file, 0, 1, 1);
        file
    });
    let put = move |pool: &Pool, at: u64, byte: u8| {
        let written = pool.write(file, at, &[byte; 50], Time::default());
        written.expect("there is room");
    };
    let (worker, others) = (pool.clone(), Others::default());
    let waiting = others.clone();
    device.at(At::ReadData, move || {
        waiting.begin(move || put(&worker, 2000, 8));
    });
    put(&pool, 1000, 7);
    others.join();
    device.assert_all_happened();
    assert_eq!(read(&pool, file, 1000, 50), [7; 50]);
    assert_eq!(read(&pool, file, 2000, 50), [8; 50]);
}

#[test]
fn a_clone_that_ends_within_a_block_is_of_one_instant() {
    let (device, pool, (source, clone)) = open_hooked(&TINY, |pool| {
        let files = (create(pool, "source"), create(pool, "clone"));
        write(pool, files.0, 0, 1, 3);
        files
    });
    let (worker, others) = (pool.clone(), Others::default());
    let waiting = others.clone();
    // The clone reads its last block, of which it shows a part. One write changes that and another.
    device.at(At::ReadData, move || {
        waiting.begin(move || write(&worker, source, 0, 2, 2));
    });
    pool.begin_clone(source, clone, B + 100, Time::default())
        .expect("there is room");
    others.join();
    device.assert_all_happened();
    let found = read(&pool, clone, 0, 2 * B);
    let is_one = |stamp| found == blocks(stamp, 2)[..B as usize + 100];
    assert!(is_one(1) || is_one(2), "a clone of two instants");
}

#[test]
fn what_is_being_read_is_not_used_again() {
    let (device, pool, (old, new)) = open_hooked(&TINY, |pool| {
        let files = (create(pool, "old"), create(pool, "new"));
        write(pool, files.0, 0, 1, 16);
        files
    });
    let (worker, others) = (pool.clone(), Others::default());
    let waiting = others.clone();
    device.at(At::ReadData, move || {
        waiting.begin(move || {
            let done = worker.truncate(old, 0, Time::default());
            done.expect("always works");
            checkpoint(&worker);
            // From the first free block on, which is where the reader looks.
            (0..4).for_each(|at| write(&worker, new, at * 16, 2, 16));
        });
    });
    assert_written(&pool, old, 0, 1, 16);
    others.join();
    device.assert_all_happened();
}

/// How long the journal gets before a superblock can be written, in blocks.
fn journal_beside_a_checkpoint(device: &Hooked, pool: &Arc<Pool>, file: Ino) -> u64 {
    let (sender, receiver) = mpsc::channel();
    let worker = pool.clone();
    device.at(At::WriteSuperblock, move || {
        let (mut most, mut last) = (0, Instant::now());
        while last.elapsed() < Duration::from_millis(500) {
            let used = worker.usage().journal_used / B;
            if used > most {
                (most, last) = (used, Instant::now());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        sender.send(most).expect("the test waits");
    });
    for round in 0.. {
        if let Ok(most) = receiver.try_recv() {
            return most;
        }
        write(pool, file, round % 8 * 8, 1, 8);
        pool.sync().expect("the device is sound");
    }
    unreachable!("it goes on until something is received")
}

#[test]
fn commits_leave_a_quarter_of_the_journal_to_checkpoints() {
    const ALLOWED: u64 = TINY.journal_size / B / 4 * 3;
    /// The batch of the cut, which may use the last quarter, and what it skips at the end of the
    /// ring: twice a write of 8 blocks with what belongs to it.
    const OF_THE_CUT: u64 = 2 * 12;
    let (device, pool, file) = open_hooked(&TINY, |pool| create(pool, "file"));
    pool.start().expect("threads can be made");
    let most = journal_beside_a_checkpoint(&device, &pool, file);
    device.assert_all_happened();
    pool.close().expect("the device is sound");
    assert!(most <= ALLOWED + OF_THE_CUT, "{most} blocks are used");
}

#[test]
fn no_batch_is_longer_than_the_search_for_lost_ones_reaches() {
    // All writers pass the look at the queue before any of them has queued anything.
    const WRITERS: usize = 8;
    let (device, pool, files) = open_hooked(&TINY, |pool| {
        let files: [Ino; WRITERS] = std::array::from_fn(|id| create(pool, &format!("w{id}")));
        files.iter().for_each(|ino| write(pool, *ino, 0, 1, 32));
        files
    });
    files
        .iter()
        .for_each(|ino| drop(read(&pool, *ino, 20 * B, B))); // their nodes
    let arrived = Arc::new(AtomicUsize::new(0));
    for _ in 0..WRITERS {
        let arrived = arrived.clone();
        device.at(At::ReadData, move || {
            arrived.fetch_add(1, Ordering::SeqCst);
            let begun = Instant::now();
            while arrived.load(Ordering::SeqCst) < WRITERS
                && begun.elapsed() < Duration::from_secs(2)
            {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    }
    std::thread::scope(|scope| {
        for ino in files {
            let pool = &pool;
            scope.spawn(move || {
                let data = vec![2; 60_000];
                let written = pool.write(ino, 100, &data, Time::default());
                written.expect("there is room");
            });
        }
    });
    device.assert_all_happened();
    pool.sync().expect("the device is sound");
    let (longest, ring) = (
        device.longest_batch.load(Ordering::SeqCst),
        TINY.journal_size / B,
    );
    assert!(
        longest > 0 && longest < ring / 4,
        "{longest} of {ring} blocks"
    );
    let left = reopen(device.sim.crash_none());
    for ino in files {
        assert!(read(&left, ino, 100, 60_000).iter().all(|byte| *byte == 2));
    }
}

#[test]
fn what_is_written_while_blocks_are_compared_is_not_shared() {
    let (device, pool, (one, two)) = open_hooked(&TINY, |pool| {
        let files = (create(pool, "one"), create(pool, "two"));
        write(pool, files.0, 0, 1, 8);
        write(pool, files.1, 0, 1, 8);
        files
    });
    let (worker, others) = (pool.clone(), Others::default());
    let waiting = others.clone();
    device.at(At::ReadData, move || {
        write(&worker, two, 0, 2, 3); // nobody makes it wait
        waiting.begin(move || checkpoint(&worker));
    });
    let all = Share {
        block: 0,
        dst_block: 0,
        count: 8,
    };
    let equal = pool.share_equal(one, two, &all, false);
    let equal = equal.expect("there is room");
    others.join();
    device.assert_all_happened();
    assert_eq!((equal.ranges, equal.compared), (vec![(3, 5)], 8));
    assert_written(&pool, one, 0, 1, 8);
    assert_written(&pool, two, 0, 2, 3);
    pool.sync().expect("the device is sound");
    let left = reopen(device.sim.crash_none());
    assert_written(&left, one, 0, 1, 8);
    assert_written(&left, two, 0, 2, 3);
    assert_eq!(
        read(&left, two, 3 * B, 5 * B),
        read(&left, one, 3 * B, 5 * B)
    );
}
