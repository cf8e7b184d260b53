//! What a change of one line in the engine would break, and no other test is sure to notice: each
//! test here fails if the line is gone that `scripts/mutants.txt` names it for.
//!
//! Nothing is random. Where two threads must meet, one of them is held in the middle of a device
//! operation (`device.rs`) while the other is given a moment to do what it must not.

#[path = "../common/mod.rs"]
mod common;

mod device;
mod failures;
mod meetings;
mod states;

use common::crash::check;
use common::history::open;

use nodupe::device::SimDevice;
use nodupe::engine::{NewNode, Pool};
use nodupe::units::{Ino, Time};

use std::sync::Arc;

use device::B;

fn create(pool: &Pool, name: &str) -> Ino {
    let node = NewNode::regular(0o600);
    let made = pool.create_node(Ino::ROOT, name.as_bytes(), &node, Time::default());
    made.expect("there is room").ino
}

/// `count` blocks that differ from each other and from those of any other `stamp`.
fn blocks(stamp: u8, count: u64) -> Vec<u8> {
    let block = |index: u64| {
        let mut bytes = [stamp; B as usize];
        bytes[..8].copy_from_slice(&(index + 1).to_le_bytes());
        bytes
    };
    (0..count).flat_map(block).collect()
}

/// Writes `count` blocks from block `at` on.
fn write(pool: &Pool, ino: Ino, at: u64, stamp: u8, count: u64) {
    let data = blocks(stamp, count);
    let written = pool.write(ino, at * B, &data, Time::default());
    written.expect("there is room");
}

fn read(pool: &Pool, ino: Ino, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let done = pool.read(ino, offset, len as usize, &mut bytes);
    done.expect("the device is sound");
    bytes
}

/// Fails unless blocks `at` and so on are what [`write`] wrote.
fn assert_written(pool: &Pool, ino: Ino, at: u64, stamp: u8, count: u64) {
    let found = read(pool, ino, at * B, count * B);
    let wanted = blocks(stamp, count);
    let wrong = (0..count as usize).find(|block| {
        let range = block * B as usize..(block + 1) * B as usize;
        found.get(range.clone()) != wanted.get(range)
    });
    assert_eq!(wrong, None, "not what was written: {ino:?}");
}

fn checkpoint(pool: &Pool) {
    pool.checkpoint().expect("the device is sound");
}

/// Opens what a crash left, which must be sound before and after.
fn reopen(left: SimDevice) -> Arc<Pool> {
    let left = Arc::new(left);
    check(&left, "behind a crash").unwrap_or_else(|error| panic!("{error}"));
    let pool = open(&left, 4 << 20).expect("a pool opens behind a crash");
    checkpoint(&pool);
    check(&left, "once opened").unwrap_or_else(|error| panic!("{error}"));
    pool
}
