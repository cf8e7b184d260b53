//! What lost, misdirected, torn and wrong writes and reads leave is noticed, as data and as metadata.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nodupe::device::{BlockDevice, Fault, FaultOp, Repeat, SimDevice, SplitMix64};
use nodupe::engine::{OpenOptions, Pool, Scrub, ScrubOptions, XattrMode};
use nodupe::ondisk::node::Node;

use crate::common::generate::random_bytes;
use crate::common::history::{create_options, open};
use crate::world::{
    B, CACHE, HEAD, JOURNAL, MIB, World, assert_clean, find, named, now, number, open_to_read,
    scrub,
};

#[test]
fn lost_and_misdirected_writes_are_found() {
    let seed = number("SEED", 1);
    let (mut refused, mut harmless, mut damaged) = (0, 0, 0);
    for fault in [Fault::Lost, Fault::Misdirected, Fault::Torn, Fault::FlipBit] {
        for nth in 1..24 {
            let mut world = World::furnished(seed);
            world.pool.checkpoint().expect("the device is sound");
            world.device.fail(FaultOp::Write, nth, fault, Repeat::Once);
            let rng = &mut SplitMix64::new(seed * 1000 + 500 + nth);
            for i in 0..8 {
                let data = random_bytes(rng, 32 * 4096);
                world.write("/gold", i * 32 * 4096, &data);
                world
                    .files
                    .insert("/vms/second name".into(), world.files["/gold"].clone());
                world.write("/vms/odd", 0, &data[..4096]);
                world.write("/scattered", i * 8 * 4096, &data[..4096]);
                world.pool.checkpoint().expect("the device says so");
            }
            // Whoever opens the pool next meets what is on the device.
            world.close();
            let device = Arc::new(world.device.crash_all());
            let Ok(pool) = open(&device, CACHE) else {
                refused += 1;
                continue;
            };
            let done = scrub(&pool);
            let what = format!("SEED={seed} {fault:?} {nth} {:?}", done.others(0, 9));
            let unreadable = world.unreadable(&open_to_read(&device));
            assert_eq!(named(&done), unreadable, "{what}");
            match done.status().is_clean() {
                true => harmless += 1,
                false => damaged += 1,
            }
        }
    }
    eprintln!("{damaged} found by scrub, {refused} pools refused, {harmless} without damage");
    assert!(damaged > 20);
}

#[test]
fn a_stale_node_where_data_should_be_is_found() {
    // Sound, at its own address, and yet not what should be there: the write of the data that
    // took the place of a node was lost.
    let seed = number("SEED", 1);
    let mut world = World::empty(seed, 6 * MIB);
    let rng = &mut SplitMix64::new(seed);
    let mut nodes: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let id = u64::from_le_bytes(
        create_options(seed, JOURNAL).uuid[..8]
            .try_into()
            .expect("8"),
    );
    world.write("/a", 0, &random_bytes(rng, 4096));
    // More nodes than fit where nodes are kept together.
    let (ino, set) = (find(&world.pool, "/a"), XattrMode::Set);
    for i in 0..30 {
        let (name, value) = (format!("user.{i}"), random_bytes(rng, 60_000));
        let done = world
            .pool
            .set_xattr(ino, name.as_bytes(), &value, set, now());
        done.expect("there is room");
        world.pool.checkpoint().expect("the device is sound");
        for block in HEAD..world.device.len() / B - 2 {
            let mut page = Box::new([0; 4096]);
            let read = world.device.read_at(block * B, &mut page[..]);
            read.expect("a sound device reads");
            if let Ok(node) = Node::at_block(page, block, id) {
                nodes.insert(block * B, node.page().to_vec());
            }
        }
    }
    // And then data wherever nodes were: all of the pool.
    for i in 0..30 {
        let name = format!("user.{i}");
        let done = world.pool.remove_xattr(ino, name.as_bytes(), now());
        done.expect("that needs no room");
    }
    world.pool.checkpoint().expect("the device is sound");
    let mut at = 0;
    while world.pool.usage().available > 64 * B {
        world.write("/fill", at, &random_bytes(rng, 16 * 4096));
        at += 16 * 4096;
    }
    world.close();
    let places = world.places();
    let was_node: BTreeSet<u64> = nodes.keys().copied().collect();
    let both: Vec<u64> = places
        .keys()
        .copied()
        .filter(|at| was_node.contains(at))
        .collect();
    assert!(both.len() > 30, "{both:?}");
    for addr in both.into_iter().step_by(5) {
        let device = Arc::new(world.device.fork(addr));
        device.write_at(addr, &nodes[&addr]).expect("it is sound");
        let expected = world.expected(&places, &BTreeSet::from([addr]));
        for pool in [
            open_to_read(&device),
            open(&device, CACHE).expect("it opens"),
        ] {
            assert_eq!(named(&scrub(&pool)), expected);
        }
    }
}

/// Every block in use that holds a node, and what each held before, if anything.
fn nodes_of(device: &SimDevice) -> BTreeMap<u64, Vec<u8>> {
    let mut nodes = BTreeMap::new();
    let mut block = vec![0; B as usize];
    for addr in (HEAD * B..device.len() - 2 * B).step_by(B as usize) {
        device.read_at(addr, &mut block).expect("it reads");
        if block.starts_with(b"NDPN") {
            nodes.insert(addr, block.clone());
        }
    }
    nodes
}

#[test]
fn old_and_foreign_blocks_are_noticed() {
    // What lost and misdirected writes leave: sound blocks at the wrong place or time.
    let seed = number("SEED", 1);
    let mut world = World::furnished(seed);
    world.pool.checkpoint().expect("the device is sound");
    let before = world.device.crash_all();
    let rng = &mut SplitMix64::new(seed ^ 0x01d);
    for i in 0..60 {
        world.write("/scattered", i * 6 * 4096, &random_bytes(rng, 4096));
        world.write("/vms/odd", 0, &random_bytes(rng, 4096));
        if i % 10 == 0 {
            world.pool.checkpoint().expect("the device is sound");
        }
    }
    world.close();
    let places = world.places();
    let (addrs, nodes) = (
        places.keys().copied().collect::<Vec<_>>(),
        nodes_of(&world.device),
    );
    let node_addrs: Vec<u64> = nodes.keys().copied().collect();
    let read = |device: &SimDevice, addr: u64| {
        let mut bytes = vec![0; B as usize];
        device.read_at(addr, &mut bytes).expect("it reads");
        bytes
    };
    let (mut data, mut metadata, mut refused) = (0, 0, 0);
    for round in 0..400 {
        let is_data = round % 2 == 0;
        let victim = match is_data {
            true => addrs[rng.index(addrs.len())],
            false => node_addrs[rng.index(node_addrs.len())],
        };
        let bytes = match round / 2 % 4 {
            0 => read(&before, victim), // the newest write of this block was lost
            1 => read(&world.device, addrs[rng.index(addrs.len())]),
            2 => read(&world.device, node_addrs[rng.index(node_addrs.len())]),
            _ => vec![0; B as usize],
        };
        if bytes == read(&world.device, victim) {
            continue;
        }
        let device = Arc::new(world.device.fork(round));
        device.write_at(victim, &bytes).expect("it is sound");
        let what = format!("SEED={seed} round {round} at {victim}");
        if is_data {
            let expected = world.expected(&places, &BTreeSet::from([victim]));
            let pool = open_to_read(&device);
            assert_eq!(named(&scrub(&pool)), expected, "{what}");
            assert_eq!(world.unreadable(&pool), expected, "{what}");
            data += 1;
            continue;
        }
        let findings = Pool::check_metadata(&*device, &mut |_, _| {}).expect("a pool");
        let options = OpenOptions {
            read_only: true,
            cache_size: CACHE,
        };
        match Pool::open(device.clone(), None, &options) {
            Err(_) => refused += 1,
            Ok(pool) => {
                let done = scrub(&pool);
                // Many nodes on the device are of older trees.
                assert_eq!(done.status().is_clean(), findings.is_empty(), "{what}");
                metadata += u64::from(!findings.is_empty());
            }
        }
    }
    eprintln!("{data} data blocks, {metadata} nodes noticed, {refused} pools refused");
    assert!(data > 150 && metadata > 30);
}

#[test]
fn a_read_that_fails_once_is_no_damage() {
    let world = World::furnished(9);
    world.close();
    for nth in (1..400).step_by(7) {
        for fault in [Fault::Io, Fault::FlipBit] {
            let device = Arc::new(world.device.fork(nth));
            let pool = open_to_read(&device);
            device.fail(FaultOp::Read, nth, fault, Repeat::Once);
            let begun = Scrub::new(ScrubOptions::default());
            match pool.scrub(&begun) {
                Ok(()) => assert!(named(&begun).is_empty(), "{fault:?} {nth}"),
                Err(error) => panic!("{fault:?} {nth}: {error}"),
            }
        }
    }
}

#[test]
fn damaged_nodes_are_found_and_their_files_named() {
    let world = World::furnished(5);
    world.close();
    let mut block = vec![0; B as usize];
    let (mut found, mut refused) = (0, 0);
    for addr in (HEAD * B..world.device.len() - 2 * B).step_by(B as usize) {
        world.device.read_at(addr, &mut block).expect("it reads");
        if !block.starts_with(b"NDPN") {
            continue;
        }
        let device = Arc::new(world.device.fork(addr));
        device.flip(addr + 100, 3);
        let options = OpenOptions {
            read_only: true,
            cache_size: CACHE,
        };
        let Ok(pool) = Pool::open(device.clone(), None, &options) else {
            refused += 1;
            continue;
        };
        let done = scrub(&pool);
        let in_use = !Pool::check_metadata(&*device, &mut |_, _| {})
            .expect("there is a pool")
            .is_empty();
        assert_eq!(done.status().is_clean(), !in_use, "{addr}");
        let kind = block[4];
        if in_use && kind == 2 {
            let reads = world.unreadable(&pool);
            assert!(!reads.is_empty());
            let named = named(&done);
            assert!(reads.keys().eq(named.keys()), "{reads:?} {named:?}");
        }
        found += u64::from(in_use);
    }
    eprintln!("{found} damaged nodes found, {refused} times no pool");
    assert!(found > 10);
}

#[test]
fn damaged_superblocks_are_found() {
    let world = World::furnished(7);
    world.close();
    let last = world.device.len() / B - 1;
    for block in [0, 1, last - 1, last] {
        let device = Arc::new(world.device.fork(block));
        device.flip(block * B + 60, 2);
        let offline = scrub(&open_to_read(&device));
        let is_copy = block > 1;
        assert_eq!(offline.status().others, u64::from(!is_copy), "{block}");
        // One is written anew by opening the pool.
        let pool = open(&device, CACHE).expect("the others are sound");
        let online = scrub(&pool);
        assert!(online.status().others <= 1);
        assert_clean(&scrub(&pool));
        pool.close().expect("the device is sound");
        assert_eq!(
            Pool::check(&*device, None, &mut |_, _| {}).expect("a pool"),
            []
        );
    }
}
