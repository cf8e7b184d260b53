//! What must be so behind a sequence of operations of one thread.

use std::collections::BTreeMap;
use std::sync::Arc;

use nodupe::device::{BlockDevice, SimDevice, SplitMix64};
use nodupe::engine::Pool;
use nodupe::ondisk::node::{NODE_KIND, NODE_LEVEL, NODE_MAGIC};
use nodupe::units::{Ino, Time};

use super::common::crash::{Geometry, TINY, new_pool};
use super::common::damage::look;
use super::common::generate::{SMALL, next_op};
use super::common::history::Runner;
use super::common::image::{page, put};
use super::device::{B, open_hooked};
use super::{assert_written, checkpoint, create, read, reopen, write};

/// Nothing is evicted from the caches of these pools.
const ROOMY: Geometry = Geometry {
    cache_size: 64 << 20,
    ..TINY
};
/// More than half of such a pool, in blocks.
const MOST: u64 = 1792;

/// Writes, reads and frees most of the pool, and writes in pieces of `piece` blocks to what must be
/// partly the same place.
fn write_where_cached_blocks_were(piece: u64) {
    let (_, pool, (old, new)) = open_hooked(&ROOMY, |pool| {
        let (old, new) = (create(pool, "old"), create(pool, "new"));
        (0..MOST / 256).for_each(|at| write(pool, old, at * 256, 1, 256));
        (old, new)
    });
    for at in (0..MOST).step_by(16) {
        read(&pool, old, at * B, 16 * B); // few enough for the cache
    }
    pool.truncate(old, 0, Time::default())
        .expect("always works");
    checkpoint(&pool);
    (0..MOST / piece).for_each(|at| write(&pool, new, at * piece, 2, piece));
    checkpoint(&pool);
    for at in 0..MOST / piece {
        assert_written(&pool, new, at * piece, 2, piece);
    }
}

#[test]
fn a_direct_write_is_not_hidden_by_what_the_cache_had() {
    write_where_cached_blocks_were(256);
}

#[test]
fn a_staged_write_is_not_hidden_by_what_the_cache_had() {
    write_where_cached_blocks_were(4);
}

#[test]
fn what_was_cut_off_does_not_come_back() {
    for placed in [false, true] {
        for by_write in [false, true] {
            let (_, pool, file) = open_hooked(&TINY, |pool| create(pool, "file"));
            let resize = |size| {
                let done = pool.truncate(file, size, Time::default());
                done.expect("there is room");
            };
            write(&pool, file, 0, 7, 3);
            if placed {
                checkpoint(&pool);
            }
            resize(B + 100);
            match by_write {
                true => write(&pool, file, 3, 7, 1),
                false => resize(3 * B),
            }
            let found = read(&pool, file, B + 100, 2 * B - 100);
            let context = format!("placed: {placed}, grown by a write: {by_write}");
            assert!(found.iter().all(|byte| *byte == 0), "{context}");
        }
    }
}

#[test]
fn an_open_frees_what_was_unlinked_and_not_closed() {
    let (device, pool, before) = open_hooked(&TINY, |pool| {
        create(pool, "stays");
        pool.usage().inodes
    });
    let open = create(&pool, "open");
    write(&pool, open, 0, 1, 20);
    checkpoint(&pool);
    pool.unlink(Ino::ROOT, b"open", Time::default())
        .expect("it is there");
    pool.sync().expect("the device is sound");
    let pool = reopen(device.sim.crash_none());
    assert_eq!(pool.usage().inodes, before);
    pool.attr(open).expect_err("nobody has it open any more");
}

#[test]
fn many_extents_that_are_cut_off_keep_the_others() {
    // Above 4,096 extents the map is shared with one that is freed bit by bit.
    const EXTENTS: u64 = 4300;
    let geometry = Geometry {
        pool_size: 64 << 20,
        journal_size: 8 << 20,
        cache_size: 16 << 20,
    };
    let (device, pool, file) = open_hooked(&geometry, |pool| create(pool, "file"));
    (0..EXTENTS).for_each(|extent| write(&pool, file, extent * 2, 3, 1));
    checkpoint(&pool);
    pool.punch(file, 0, 4200 * 2 * B, Time::default())
        .expect("a hole needs no room");
    let pool = {
        checkpoint(&pool);
        reopen(device.sim.crash_none())
    };
    for extent in 4200..EXTENTS {
        assert_written(&pool, file, extent * 2, 3, 1);
    }
}

/// Nodes of a pool by block: kind and level.
fn nodes(device: &SimDevice) -> BTreeMap<u64, (u8, u8)> {
    let used = device.used().into_iter().map(|addr| addr / B);
    used.filter_map(|block| {
        let page = page(device, block);
        let is_node = page.starts_with(&NODE_MAGIC.to_le_bytes());
        is_node.then_some((block, (page[NODE_KIND], page[NODE_LEVEL])))
    })
    .collect()
}

#[test]
fn an_old_version_of_a_node_is_not_taken_for_the_new_one() {
    // As a device does that loses a write: what is there is whole, of this pool, of the same tree,
    // and says itself that it belongs there.
    let (device, pool) = new_pool(&TINY, 3).expect("a pool is made");
    let mut runner = Runner::new(pool);
    let mut rng = SplitMix64::new(3);
    let mut versions: Vec<SimDevice> = Vec::new();
    for _ in 0..60 {
        for _ in 0..4 {
            let op = next_op(&mut rng, &runner.model, &SMALL);
            runner.run(&op).expect("the device is sound");
        }
        checkpoint(&runner.pool);
        versions.push(device.crash_none());
    }
    runner.pool.close().expect("the device is sound");
    runner.model.forget_unnamed();
    let newest = device.crash_none();
    let (mut tried, mut noticed) = (0, 0);
    for (block, sort) in nodes(&newest) {
        let of_now = page(&newest, block);
        let older = versions.iter().rev().map(|version| page(version, block));
        let is_other = |old: &[u8; B as usize]| {
            old.starts_with(&NODE_MAGIC.to_le_bytes())
                && (old[NODE_KIND], old[NODE_LEVEL]) == sort
                && *old != of_now
        };
        let Some(old) = older.into_iter().find(is_other) else {
            continue;
        };
        let damaged = Arc::new(newest.fork(0));
        put(&damaged, block, &old);
        let findings = Pool::check(&*damaged, None, &mut |_, _| {});
        let is_found = findings.map_or(true, |findings| !findings.is_empty());
        let seen = look(&damaged, TINY.cache_size, &runner.model)
            .unwrap_or_else(|error| panic!("block {block}, {sort:?}: {error}"));
        let is_seen = seen.refused || seen.errors > 0;
        assert!(is_found || !is_seen, "check passes block {block}: {seen:?}");
        tried += 1;
        noticed += u32::from(is_seen);
    }
    assert!(noticed > 2, "{noticed} of {tried} were noticed");
}

#[test]
fn the_bitmap_of_a_group_leaves_out_what_is_freed_later() {
    let geometry = Geometry {
        pool_size: 512 << 20,
        ..TINY
    };
    let (device, pool, (file, other)) = open_hooked(&geometry, |pool| {
        let (file, other) = (create(pool, "file"), create(pool, "other"));
        write(pool, file, 0, 1, 256);
        (file, other)
    });
    // No bitmap of the group with the data is in memory, and none is needed to free it.
    pool.truncate(file, 0, Time::default())
        .expect("always works");
    let worker = pool.clone();
    device.at(super::device::At::WriteSuperblock, move || {
        write(&worker, other, 0, 2, 32);
    });
    checkpoint(&pool);
    device.assert_all_happened();
    pool.sync().expect("the device is sound");
    assert_written(&reopen(device.sim.crash_none()), other, 0, 2, 32);
    assert_eq!(device.len(), geometry.pool_size);
}
