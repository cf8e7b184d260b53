//! A killed daemon, and a power cut after its successor has begun: what was written and not made
//! durable by the first one was read back by the second, so it must not vanish under it.

use std::sync::Arc;

use nodupe::device::SimDevice;
use nodupe::engine::{CreateOptions, OpenOptions, Pool, SetAttr};
use nodupe::error::Result;
use nodupe::units::{Ino, Time};

/// Changes before the kill.
const CHANGES: i64 = 8;

fn pool() -> Arc<SimDevice> {
    let device = Arc::new(SimDevice::new(16 << 20, 1));
    let options = CreateOptions {
        journal_size: Some(1 << 20),
        uuid: [9; 16],
        hash_key: [1; 16],
        uid: 0,
        gid: 0,
        time: Time::default(),
    };
    Pool::create(device.clone(), None, &options).expect("a pool");
    device
}

fn open(device: &Arc<SimDevice>) -> Result<Arc<Pool>> {
    Pool::open(device.clone(), None, &OpenOptions::default())
}

/// Numbers a state of the pool.
fn change(pool: &Pool, number: i64) {
    let time = Time {
        secs: number,
        nanos: 0,
    };
    let change = SetAttr {
        mtime: Some(time),
        ..SetAttr::default()
    };
    pool.set_attr(Ino::ROOT, &change).expect("changed");
    pool.sync().expect("synced");
}

fn number(pool: &Pool) -> i64 {
    pool.attr(Ino::ROOT).expect("the root").mtime.secs
}

#[test]
fn what_the_next_daemon_saw_survives_a_power_cut() {
    let device = pool();
    device.record();
    let first = open(&device).expect("a pool");
    for i in 1..=CHANGES {
        change(&first, i);
        if i % 3 == 0 {
            first.checkpoint().expect("a checkpoint");
        }
    }
    drop(first);
    let trace = device.take_trace();
    let mut replay = trace.replay();
    let mut kills = 0;
    while replay.step() {
        kills += 1;
        let at = format!("event {}: {}", replay.position(), replay.describe());
        // The process is gone; what it wrote is still in a cache of the host.
        let device = Arc::new(replay.device(kills));
        let second = open(&device).expect("after a kill");
        let seen = number(&second);
        second.sync().expect("synced");
        for cut in [device.crash_none(), device.crash(kills)] {
            let third = open(&Arc::new(cut)).unwrap_or_else(|error| panic!("{at}: {error}"));
            assert!(number(&third) >= seen, "{at}: {seen} was seen and is gone");
        }
        change(&second, CHANGES + 1);
        for seed in 0..3 {
            let cut = Arc::new(device.crash(kills * 3 + seed));
            let third = open(&cut).unwrap_or_else(|error| panic!("{at}: {error}"));
            assert_eq!(number(&third), CHANGES + 1, "{at}");
        }
    }
    assert!(kills > 30, "{kills}");
}
