//! Sharing of ranges: what bounds it, and what it comes to where it cannot go on.

use std::sync::Arc;

use super::*;
use crate::device::SimDevice;
use crate::engine::{CreateOptions, NewNode, OpenOptions};

const MIB: u64 = 1024 * 1024;

fn mapped(at: u64, block: u64, len: u32) -> Mapped {
    Mapped {
        at,
        extent: Extent { block, len },
    }
}

#[test]
fn maps_differ_where_blocks_do() {
    let left = [mapped(0, 100, 10), mapped(20, 300, 5)];
    let right = [mapped(0, 100, 4), mapped(4, 50, 2), mapped(6, 106, 4)];
    assert_eq!(differing(&left, &right, 30), [(4, 6), (20, 25)]);
    assert_eq!(differing(&right, &left, 30), [(4, 6), (20, 25)]);
    assert_eq!(differing(&left, &left, 30), []);
    assert_eq!(differing(&left, &right, 5), [(4, 5)]);
    assert_eq!(differing(&left, &[], 30), [(0, 10), (20, 25)]);
}

#[test]
fn ranges_are_joined_and_come_by_pages() {
    let runs = [(0, 2), (2, 4), (6, 7), (9, 12)];
    let all = join(runs.into_iter(), 11, 9);
    assert_eq!(all.ranges, [(0, 4), (6, 1), (9, 2)]);
    assert_eq!(all.next, 11);
    let page = join(runs.into_iter(), 11, 2);
    assert_eq!((page.ranges.len(), page.next), (2, 9));
}

#[test]
fn partial_blocks_are_shared_only_as_the_last_of_both() {
    let share = |block, dst_block, count| Share {
        block,
        dst_block,
        count,
    };
    let ok = |same, range, from, to| check(same, &range, from, to).is_ok();
    assert!(ok(false, share(0, 0, 2), 2 * B, 2 * B));
    assert!(ok(false, share(0, 5, 2), B + 512, 6 * B + 512));
    assert!(!ok(false, share(0, 5, 2), B + 512, 7 * B));
    assert!(!ok(false, share(0, 5, 2), 2 * B, 6 * B + 512));
    assert!(!ok(false, share(0, 0, 0), B, B));
    assert!(!ok(false, share(u64::MAX, 0, 2), B, B));
    assert!(!ok(true, share(0, 1, 2), 9 * B, 9 * B));
    assert!(ok(true, share(0, 2, 2), 9 * B, 9 * B));
}

fn new_pool(size: u64) -> (Arc<SimDevice>, Arc<Pool>) {
    let device = Arc::new(SimDevice::new(size, 1));
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

/// A file of `blocks` blocks, all of them a hole.
fn file(pool: &Pool, name: &str, blocks: u64) -> Ino {
    let node = NewNode::regular(0o600);
    let made = pool.create_node(Ino::ROOT, name.as_bytes(), &node, Time::default());
    let ino = made.expect("there is room").ino;
    let grown = pool.truncate(ino, blocks * B, Time::default());
    grown.expect("a hole takes no room");
    ino
}

/// A file whose extents are of one block each, with a hole behind each.
fn aged(pool: &Pool, name: &str, extents: u64) -> Ino {
    let ino = file(pool, name, extents * 2);
    for i in 0..extents {
        let wrote = pool.write(ino, i * 2 * B, &[7; BLOCK_SIZE], Time::default());
        wrote.expect("there is room");
    }
    ino
}

fn extents(pool: &Pool, ino: Ino) -> u64 {
    pool.file_usage(ino).expect("it is a file").extents
}

#[test]
fn a_step_takes_a_bounded_part_of_a_range() {
    let (device, pool) = new_pool(24 * MIB);
    let count = 2 * STEP_EXTENTS + 5;
    let src = aged(&pool, "src", count);
    let dst = file(&pool, "dst", count * 2);
    let range = Share {
        block: 0,
        dst_block: 0,
        count: count * 2,
    };
    let mut left = vec![range];
    let mut steps = 0;
    while !left.is_empty() {
        let step = pool.share_step(src, dst, &mut left, Time::default());
        assert_eq!(step.expect("there is room"), Attempt::Done(()));
        steps += 1;
        let done = (steps * STEP_EXTENTS).min(count);
        assert_eq!(extents(&pool, dst), done, "step {steps}");
    }
    assert_eq!(steps, 3);
    // By the way of `copy_file_range` as well, and within one file.
    let copy = file(&pool, "copy", 0);
    let done = pool.clone_range(src, 0, copy, 0, count * 2 * B, Time::default());
    assert_eq!(done.expect("there is room"), count * 2 * B);
    assert_eq!(extents(&pool, copy), count);
    let twice = pool.clone_range(copy, 0, copy, count * 2 * B, count * 2 * B, Time::default());
    assert_eq!(twice.expect("there is room"), count * 2 * B);
    assert_eq!(extents(&pool, copy), 2 * count);
    pool.sync().expect("the device is sound");
    let crashed = Arc::new(device.crash(1));
    let pool = Pool::open(crashed, None, &OpenOptions::default()).expect("it opens");
    assert_eq!(extents(&pool, dst), count);
    let all = (dst, 0, count * 2);
    let differing = pool.differing_ranges(all, (src, 0), 9);
    assert_eq!(differing.expect("both are files").ranges, []);
}

#[test]
fn a_share_that_finds_no_room_for_its_nodes_does_not_poison() {
    let (_device, pool) = new_pool(24 * MIB);
    let (each, times) = (1000, 40);
    let src = aged(&pool, "src", each);
    // Many extents of few blocks: the same again and again.
    let many = file(&pool, "many", each * 2 * times);
    let dst = file(&pool, "dst", each * 2 * times);
    let ranges = (0..times).map(|i| Share {
        block: 0,
        dst_block: i * each * 2,
        count: each * 2,
    });
    let ranges: Vec<_> = ranges.collect();
    let shared = pool.share_ranges(src, many, &ranges, Time::default());
    shared.expect("there is room");
    let fill = file(&pool, "fill", 0);
    for i in 0.. {
        let wrote = pool.write(fill, i * B, &[1; BLOCK_SIZE], Time::default());
        let Err(error) = wrote else { continue };
        assert_eq!(error.kind(), Kind::NoSpace, "{error}");
        break;
    }
    let all = Share {
        block: 0,
        dst_block: 0,
        count: each * 2 * times,
    };
    let error = pool
        .share_ranges(many, dst, &[all], Time::default())
        .expect_err("there is no room for the nodes");
    assert_eq!(error.kind(), Kind::NoSpace, "{error}");
    assert_eq!(pool.poisoned(), None);
    pool.truncate(fill, 0, Time::default())
        .expect("deleting needs no room");
    let shared = pool.share_ranges(many, dst, &[all], Time::default());
    shared.expect("there is room again");
    assert_eq!(extents(&pool, dst), each * times);
    pool.close().expect("the device is sound");
}

#[test]
fn what_was_shared_before_an_error_changes_the_times() {
    let (_device, pool) = new_pool(24 * MIB);
    let src = aged(&pool, "src", 4);
    let dst = file(&pool, "dst", 8);
    let share = |block| Share {
        block,
        dst_block: block,
        count: 2,
    };
    let time = |secs| Time { secs, nanos: 0 };
    let mtime = || pool.attr(dst).expect("it is there").mtime;
    let error = pool
        .share_ranges(src, dst, &[share(8), share(0)], time(1))
        .expect_err("the first lies outside");
    assert_eq!(error.kind(), Kind::Invalid, "{error}");
    assert_eq!((extents(&pool, dst), mtime()), (0, Time::default()));
    let error = pool
        .share_ranges(src, dst, &[share(0), share(8)], time(2))
        .expect_err("the second lies outside");
    assert_eq!(error.kind(), Kind::Invalid, "{error}");
    assert_eq!((extents(&pool, dst), mtime()), (1, time(2)));
}

#[test]
fn staged_blocks_lie_over_mapped_ones() {
    let parts = vec![mapped(2, 100, 4), mapped(8, 50, 1), mapped(9, 200, 2)];
    let all = overlay(parts.clone(), [0, 3, 5, 8, 20].into_iter());
    let lost = |at| mapped(at, 0, 1);
    let expected = [
        lost(0),
        mapped(2, 100, 1),
        lost(3),
        mapped(4, 102, 1),
        lost(5),
        lost(8),
        mapped(9, 200, 2),
        lost(20),
    ];
    assert_eq!(all, expected);
    assert_eq!(overlay(parts.clone(), std::iter::empty()), parts);
}

/// Looks at a file of 8 blocks with data in every second one, some of it staged.
fn look_without_writing(device: &SimDevice, pool: &Pool, (src, dst): (Ino, Ino)) {
    let before = device.counts().writes;
    let told = pool.data_ranges(src, 0, 8, 9);
    assert_eq!(
        told.expect("it reads").ranges,
        [(0, 1), (2, 1), (4, 1), (6, 1)]
    );
    let told = pool.differing_ranges((src, 0, 8), (dst, 0), 9);
    assert_eq!(told.expect("it reads").ranges, [(6, 1)]);
    assert_eq!(device.counts().writes, before, "nothing was written");
}

#[test]
fn looking_writes_nothing_where_nothing_may_be_written() {
    let (device, pool) = new_pool(24 * MIB);
    let src = aged(&pool, "src", 4);
    let dst = file(&pool, "dst", 0);
    pool.clone_file(src, dst, Time::default())
        .expect("there is room");
    pool.checkpoint().expect("the device is sound");
    pool.write(src, 6 * B, &[8; BLOCK_SIZE], Time::default())
        .expect("there is room");
    pool.sync().expect("the device is sound");
    let crashed = Arc::new(device.crash(1));
    let options = OpenOptions {
        read_only: true,
        cache_size: 4 * MIB,
    };
    let read_only = Pool::open(crashed.clone(), None, &options).expect("it opens");
    look_without_writing(&crashed, &read_only, (src, dst));
    assert_eq!(read_only.poisoned(), None);
    pool.poison(&Error::new(Kind::Io, "the device failed"));
    look_without_writing(&device, &pool, (src, dst));
}
