//! Check and repair on damaged pools: every damage is found, no repair makes it worse. After a
//! repair check is clean, the pool opens, and everything that could be read before reads the
//! same; what is lost is an error, never wrong bytes.
//!
//! `SEEDS=20 cargo test --test repair` looks at more pools, `THOROUGH=1` at more of each.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use common::crash::{Geometry, TINY, Verdict, assert_none, for_each_seed, new_pool, seeds};
use common::furnish::{all_kinds, large_trees};
use common::generate::random_bytes;
use common::history::open;
use common::image::{self, Use, forge, hurt, in_use, page, put};

use nodupe::device::{BlockDevice, FileDevice, OpenMode, SimDevice, SplitMix64};
use nodupe::engine::{
    CheckOptions, CheckReport, FileKind, Finding, NewNode, OpenOptions, Pool, RepairReport,
};
use nodupe::ondisk::node::NODE_RECORDS;
use nodupe::ondisk::superblock::Superblock;
use nodupe::units::{Ino, Time};

const B: u64 = 4096;
/// A new file.
const NODE: NewNode<'static> = NewNode::regular(0o600);

/// `many` cases, or `few` for a quick look.
fn depth(few: u64, many: u64) -> u64 {
    match std::env::var_os("THOROUGH") {
        Some(_) => many,
        None => few,
    }
}

/// What can be read: by path the page and its bytes, as far as there is an answer.
type Shown = BTreeMap<String, BTreeMap<u64, Vec<u8>>>;

/// Everything that a pool shows: bounded, as a damaged pool may show far too much.
fn shown(device: &Arc<SimDevice>, read_only: bool) -> Option<Shown> {
    let options = OpenOptions {
        read_only,
        cache_size: TINY.cache_size,
    };
    let pool = Pool::open(device.clone(), None, &options).ok()?;
    let mut all = Shown::new();
    let mut todo = vec![(Ino::ROOT, String::new(), 0)];
    while let Some((dir, path, depth)) = todo.pop() {
        let mut cookie = 0;
        while let Ok(entries) = pool.read_dir(dir, cookie, 64) {
            let Some(last) = entries.last() else {
                break;
            };
            cookie = last.cookie;
            for entry in entries {
                let name = format!("{path}/{}", entry.name.escape_ascii());
                let Ok(attr) = pool.lookup(dir, &entry.name) else {
                    continue;
                };
                match attr.kind {
                    FileKind::Directory if depth < 20 => todo.push((attr.ino, name, depth + 1)),
                    FileKind::Regular => drop(all.insert(name, pages(&pool, attr.ino, attr.size))),
                    FileKind::Symlink => {
                        // One whose target is lost cannot be read, and a repair removes it.
                        if let Ok(target) = pool.read_link(attr.ino) {
                            all.insert(name, BTreeMap::from([(0, target)]));
                        }
                    }
                    _ => drop(all.insert(name, BTreeMap::new())),
                }
            }
        }
    }
    if !read_only {
        pool.close().expect("a pool on a sound device closes");
    }
    Some(all)
}

/// The pages of a file that can be read, of the first few.
fn pages(pool: &Pool, ino: Ino, size: u64) -> BTreeMap<u64, Vec<u8>> {
    const PAGES_MAX: u64 = 300;
    let mut found = BTreeMap::new();
    // Far fewer of the large file, which has a hundred clones.
    let stride = if size > 100 * B { 37 } else { 1 };
    for page in (0..size.div_ceil(B))
        .step_by(stride)
        .take(PAGES_MAX as usize)
    {
        let mut bytes = Vec::new();
        if pool.read(ino, page * B, B as usize, &mut bytes).is_ok() {
            found.insert(page, bytes);
        }
    }
    found
}

fn check(device: &SimDevice) -> CheckReport {
    let report = Pool::check_with(device, None, &CheckOptions::default(), &mut |_, _| {});
    report.expect("there is a pool")
}

fn is_found(device: &SimDevice) -> bool {
    let options = CheckOptions::default();
    match Pool::check_with(device, None, &options, &mut |_, _| {}) {
        Ok(report) => !report.findings.is_empty(),
        Err(_) => true,
    }
}

fn repair(device: &Arc<SimDevice>) -> Verdict<RepairReport> {
    let options = CheckOptions {
        search: true,
        ..CheckOptions::default()
    };
    let now = Time { secs: 7, nanos: 0 };
    let done = Pool::repair(
        device.clone(),
        None,
        &options,
        now,
        &mut |_, _| true,
        &mut |_, _| {},
    );
    done.map_err(|error| format!("repair: {error}"))
}

fn lines(findings: &[Finding]) -> String {
    let lines = findings.iter().take(12);
    lines
        .map(|finding| format!("  E{:04} {}\n", finding.code, finding.message))
        .collect()
}

/// What a repair is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// Everything that could be read before.
    Everything,
    /// The same, unless checksums are lost, so that nobody can tell any more what else is, or
    /// records of the journal had to be left out, so that a name may be that of an older file.
    Verified,
    /// Nothing: the damage could change what is read.
    Nothing,
}

/// Repairs, and holds the result against what could be read before.
fn repair_and_compare(
    device: &Arc<SimDevice>,
    original: &Shown,
    held: Held,
) -> Verdict<RepairReport> {
    let before = shown(&Arc::new(device.fork(1)), true);
    let report = repair(device)?;
    let after = check(device);
    if !after.findings.is_empty() {
        return Err(format!(
            "not clean after a repair:\n{}before it was:\n{}",
            lines(&after.findings),
            lines(&report.before.findings)
        ));
    }
    let options = OpenOptions::default();
    if let Err(error) = Pool::open(Arc::new(device.fork(2)), None, &options) {
        return Err(format!("a repaired pool does not open: {error}"));
    }
    let now = shown(device, false).ok_or("a repaired pool does not open")?;
    let again = check(device);
    if !again.findings.is_empty() {
        return Err(format!(
            "not clean once mounted:\n{}",
            lines(&again.findings)
        ));
    }
    if held == Held::Everything || held == Held::Verified && !is_unsure(&report) {
        compare(&before.unwrap_or_default(), &now, original).map_err(|error| {
            let actions = report.actions.iter();
            let actions: String = actions
                .map(|action| format!("\n  R{:04} {}", action.code, action.message))
                .collect();
            format!("{error}; done was:{actions}")
        })?;
    }
    Ok(report)
}

/// Checksums are lost, or records of the journal were left out: see [`Held::Verified`].
fn is_unsure(report: &RepairReport) -> bool {
    let codes = report.actions.iter().map(|action| action.code);
    codes.into_iter().any(|code| matches!(code, 3 | 11))
}

/// What was right before must be right now, and nothing may be wrong.
fn compare(before: &Shown, now: &Shown, original: &Shown) -> Verdict {
    for (path, pages) in original {
        let had = before.get(path);
        let Some(has) = now.get(path) else {
            if had.is_some() {
                return Err(format!("{path} is gone"));
            }
            continue;
        };
        for (page, bytes) in pages {
            match has.get(page) {
                Some(found) if found == bytes => {}
                Some(found) => {
                    let what = match found.iter().all(|byte| *byte == 0) {
                        true => "zeros",
                        false => "wrong bytes",
                    };
                    return Err(format!("{path} page {page}: {what}"));
                }
                None if had.and_then(|had| had.get(page)) == Some(bytes) => {
                    return Err(format!(
                        "{path} page {page} could be read before the repair"
                    ));
                }
                None => {}
            }
        }
    }
    Ok(())
}

/// Kinds of damage to a block.
const KINDS: u64 = 6;

/// Damages a block; false if that changed nothing.
fn damage(device: &SimDevice, block: u64, kind: u64, rng: &mut SplitMix64, used: &[u64]) -> bool {
    let old = page(device, block);
    let mut new = old;
    match kind {
        0 => new[rng.index(64)] ^= 1 << rng.below(8),
        1 => new[rng.index(4096)] ^= 1 << rng.below(8),
        2 => new.fill(0),
        3 => new.copy_from_slice(&random_bytes(rng, 4096)),
        // Not a superblock: one in the place of another is what growing leaves.
        4 => new = page(device, used[2 + rng.index(used.len() - 4)]),
        _ => new[512 * rng.index(8)..].fill(0), // torn
    }
    put(device, block, &new);
    new != old
}

#[test]
fn every_flipped_bit_is_found() {
    let base = all_kinds(seeds(3)[0], true).expect("a pool on a sound device");
    assert_eq!(lines(&check(&base).findings), "");
    let mut all: Vec<(u64, Use)> = in_use(&base).into_iter().collect();
    // All metadata, and of the data some.
    all.retain(|(block, kind)| *kind != Use::Data || block % depth(4, 1) == 0);
    let counts: Mutex<BTreeMap<Use, u64>> = Mutex::new(BTreeMap::new());
    let indexes: Vec<u64> = (0..all.len() as u64).collect();
    let failures = for_each_seed(&indexes, |index| {
        let (block, kind) = all[index as usize];
        let mut rng = SplitMix64::new(index);
        for round in 0..3 {
            let device = base.fork(0);
            let at = if round == 0 {
                rng.index(64)
            } else {
                rng.index(4096)
            };
            device.flip(block * B + at as u64, rng.below(8) as u32);
            if !is_found(&device) {
                return Err(format!(
                    "a flip at {at} of block {block}, {kind:?}, is not found"
                ));
            }
            *counts.lock().expect("no panic").entry(kind).or_default() += 1;
        }
        Ok(())
    });
    let counts = counts.lock().expect("no panic");
    let sum = |data: bool| {
        let some = counts
            .iter()
            .filter(|(kind, _)| (**kind == Use::Data) == data);
        some.map(|(_, count)| count).sum::<u64>()
    };
    eprintln!(
        "flipped bits, all found: {} in metadata, {} in data: {counts:?}",
        sum(false),
        sum(true)
    );
    drop(counts);
    assert_none("every_flipped_bit_is_found", &failures);
}

#[test]
fn every_damage_is_repaired_and_nothing_gets_worse() {
    let done: Mutex<BTreeMap<Use, u64>> = Mutex::new(BTreeMap::new());
    for seed in seeds(1) {
        let base = all_kinds(seed, true).expect("a pool on a sound device");
        let original = shown(&Arc::new(base.fork(1)), true).expect("a sound pool opens");
        let all = in_use(&base);
        let used: Vec<u64> = all.keys().copied().collect();
        // All metadata, and of the data some.
        let mut rng = SplitMix64::new(seed);
        let chosen: Vec<(u64, Use)> = all
            .iter()
            .filter(|(_, kind)| **kind != Use::Data || rng.chance(depth(4, 10)))
            .map(|(block, kind)| (*block, *kind))
            .collect();
        let cases: Vec<u64> = (0..chosen.len() as u64).collect();
        let failures = for_each_seed(&cases, |case| {
            let (block, kind) = chosen[case as usize];
            for way in (case % depth(2, 1)..KINDS).step_by(depth(2, 1) as usize) {
                let mut rng = SplitMix64::new(seed << 32 | case << 8 | way);
                let device = Arc::new(base.fork(case));
                if !damage(&device, block, way, &mut rng, &used) {
                    continue;
                }
                let context = |error| {
                    format!("pool of seed {seed}, block {block}, {kind:?}, way {way}: {error}")
                };
                if !is_found(&device) {
                    return Err(context("not found".into()));
                }
                repair_and_compare(&device, &original, Held::Everything).map_err(context)?;
                *done.lock().expect("no panic").entry(kind).or_default() += 1;
            }
            Ok(())
        });
        assert_none("every_damage_is_repaired", &failures);
    }
    eprintln!("damages repaired: {:?}", done.lock().expect("no panic"));
}

#[test]
fn several_damages_at_once_are_repaired() {
    let base = all_kinds(seeds(2)[0], true).expect("a pool on a sound device");
    let original = shown(&Arc::new(base.fork(1)), true).expect("a sound pool opens");
    let used: Vec<u64> = in_use(&base)
        .into_keys()
        .filter(|block| *block > 0)
        .collect();
    let all: Vec<u64> = (0..depth(30, 100)).collect();
    let failures = for_each_seed(&all, |seed| {
        let mut rng = SplitMix64::new(seed);
        let device = Arc::new(base.fork(seed));
        for _ in 0..rng.below(20) + 2 {
            let (block, way) = (used[rng.index(used.len())], rng.below(KINDS));
            damage(&device, block, way, &mut rng, &used);
        }
        repair_and_compare(&device, &original, Held::Verified).map(drop)
    });
    assert_none("several_damages", &failures);
}

#[test]
fn forged_pools_end_up_clean() {
    let found = AtomicU64::new(0);
    let base = all_kinds(seeds(2)[0], true).expect("a pool on a sound device");
    let nodes = image::nodes(&base);
    let list: Vec<u64> = nodes.iter().copied().collect();
    let all: Vec<u64> = (0..seeds(1).len() as u64 * depth(100, 250)).collect();
    let failures = for_each_seed(&all, |seed| {
        let mut rng = SplitMix64::new(seed);
        let device = Arc::new(base.fork(seed));
        for _ in 0..rng.below(3) + 1 {
            let block = list[rng.index(list.len())];
            let mut changed = page(&device, block);
            let to = if rng.chance(50) { 512 } else { 4096 };
            hurt(&mut changed, NODE_RECORDS, to, &mut rng);
            forge(&device, block, &changed, &nodes);
        }
        found.fetch_add(u64::from(is_found(&device)), Ordering::Relaxed);
        repair_and_compare(&device, &Shown::new(), Held::Nothing).map(drop)
    });
    eprintln!(
        "forged pools: {}, with findings: {}",
        all.len(),
        found.load(Ordering::Relaxed)
    );
    assert_none("forged_pools", &failures);
}

#[test]
fn a_crash_at_every_write_of_a_repair_leaves_the_old_or_the_new_state() {
    let base = all_kinds(seeds(3)[0], false).expect("a pool on a sound device");
    let original = shown(&Arc::new(base.fork(1)), true).expect("a sound pool opens");
    let all = in_use(&base);
    let mut victims: BTreeMap<Use, u64> = BTreeMap::new();
    for (block, kind) in &all {
        victims.insert(*kind, *block);
    }
    let cases: Vec<(Use, u64)> = victims.into_iter().collect();
    let crashes = AtomicU64::new(0);
    let indexes: Vec<u64> = (0..cases.len() as u64).collect();
    let failures = for_each_seed(&indexes, |index| {
        let (kind, block) = cases[index as usize];
        let device = Arc::new(base.fork(index));
        let mut rng = SplitMix64::new(index);
        device.flip(block * B + 70, 3);
        device.record();
        // What the first repair left out, and said so, the second one does not know any more.
        let held = match is_unsure(&repair(&device)?) {
            true => Held::Nothing,
            false => Held::Verified,
        };
        let trace = device.take_trace();
        let mut replay = trace.replay();
        while replay.step() {
            if !replay.is_behind_write() {
                continue;
            }
            let image = Arc::new(replay.crash(rng.next()));
            crashes.fetch_add(1, Ordering::Relaxed);
            let context = |error| {
                format!(
                    "{kind:?}, crash behind event {}: {error}",
                    replay.position()
                )
            };
            repair_and_compare(&image, &original, held).map_err(context)?;
        }
        Ok(())
    });
    eprintln!("crashes in a repair: {}", crashes.load(Ordering::Relaxed));
    assert_none("a_crash_at_every_write_of_a_repair", &failures);
}

#[test]
fn a_waiting_journal_is_replayed_onto_what_is_left() {
    for seed in seeds(2) {
        let base = all_kinds(seed, false).expect("a pool on a sound device");
        assert!(check(&base).counts.batches > 0, "nothing waits");
        let original = shown(&Arc::new(base.fork(1)), true).expect("a sound pool opens");
        let used: Vec<(u64, Use)> = in_use(&base)
            .into_iter()
            .filter(|(_, kind)| *kind != Use::Data)
            .collect();
        let all: Vec<u64> = (0..used.len() as u64).collect();
        let failures = for_each_seed(&all, |index| {
            let (block, kind) = used[index as usize];
            let device = Arc::new(base.fork(index));
            device.flip(block * B + index * 7 % 4096, (index % 8) as u32);
            let context = |error| format!("pool of seed {seed}, block {block}, {kind:?}: {error}");
            repair_and_compare(&device, &original, Held::Verified).map_err(context)?;
            // Counts and checksums lost cost no acknowledged byte.
            if matches!(kind, Use::Node(3 | 5) | Use::Slot | Use::Copy) {
                let now = shown(&device, true).ok_or("it does not open")?;
                if now != original {
                    return Err(context("something acknowledged is lost".into()));
                }
            }
            Ok(())
        });
        assert_none("a_waiting_journal", &failures);
    }
}

/// A copy on a device of `len` bytes.
fn on_device_of(pool: &SimDevice, len: u64) -> Arc<SimDevice> {
    let larger = Arc::new(SimDevice::new(len, 1));
    for at in pool.used() {
        put(&larger, at / B, &page(pool, at / B));
    }
    larger
}

/// What a check tells, however many passes it took.
fn without_passes(mut report: CheckReport) -> CheckReport {
    // A leaf of which two passes need a part is counted by both.
    (report.counts.passes, report.counts.nodes) = (0, 0);
    report
        .findings
        .sort_by(|a, b| (a.code, &a.message).cmp(&(b.code, &b.message)));
    report
}

#[test]
fn little_memory_means_more_passes_and_the_same_findings() {
    let geometry = Geometry {
        pool_size: 64 * 1024 * 1024,
        ..TINY
    };
    let (device, pool) = new_pool(&geometry, 5).expect("a new pool");
    let (now, mut rng) = (Time::default(), SplitMix64::new(5));
    large_trees(&pool, &mut rng).expect("there is room");
    let dir = pool.lookup(Ino::ROOT, b"large").expect("it was made").ino;
    for index in 0..6_u8 {
        let file = pool.create_node(dir, &[b'f', index + b'0'], &NODE, now);
        let file = file.expect("a new name").ino;
        for block in 0..1200 {
            let bytes = random_bytes(&mut rng, 4096);
            let written = pool.write(file, block * 2 * B, &bytes, now);
            written.expect("there is room");
        }
    }
    pool.close().expect("a sound device");
    let base = device.crash_none();
    let used: Vec<u64> = in_use(&base).into_keys().filter(|at| *at > 1).collect();
    let little = CheckOptions {
        memory: 64 * 1024,
        ..CheckOptions::default()
    };
    let mut found = 0;
    for case in 0..12 {
        let mut rng = SplitMix64::new(case);
        let device = base.fork(case);
        for _ in 0..case {
            let (block, way) = (used[rng.index(used.len())], rng.below(KINDS));
            damage(&device, block, way, &mut rng, &used);
        }
        let much = check(&device);
        let parts = Pool::check_with(&device, None, &little, &mut |_, _| {}).expect("a pool");
        assert_eq!(much.counts.passes, 1);
        assert!(
            parts.counts.passes > 1,
            "all of it fits into {}",
            little.memory
        );
        assert_eq!(case == 0, much.findings.is_empty(), "case {case}");
        found += much.findings.len();
        assert_eq!(without_passes(much), without_passes(parts), "case {case}");
    }
    eprintln!("findings in one pass and in several: {found}");
}

#[test]
fn check_writes_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    for (seed, closed) in [(1, true), (2, false)] {
        let base = all_kinds(seed, closed).expect("a pool on a sound device");
        for damaged in [false, true] {
            let device = base.fork(seed);
            if damaged {
                for (block, kind) in in_use(&base) {
                    if kind != Use::Data && block % 3 == 0 {
                        device.flip(block * B + 99, 1);
                    }
                }
            }
            let before = device.counts();
            assert_eq!(check(&device).findings.is_empty(), !damaged);
            let after = device.counts();
            assert_eq!(
                (before.writes, before.syncs, before.discards),
                (after.writes, after.syncs, after.discards)
            );
            let path = dir.path().join(format!("{seed}-{damaged}"));
            let mut bytes = vec![0; TINY.pool_size as usize];
            device.read_at(0, &mut bytes).expect("a sound device");
            std::fs::write(&path, &bytes).expect("room for a file");
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o444);
            std::fs::set_permissions(&path, mode).expect("an own file");
            let file = FileDevice::open(&path, OpenMode::ReadOnly).expect("it can be read");
            let options = CheckOptions::default();
            let report = Pool::check_with(&file, None, &options, &mut |_, _| {});
            assert_eq!(report.expect("a pool"), check(&device));
            drop(file);
            assert!(std::fs::read(&path).expect("it is there") == bytes);
        }
    }
}

#[test]
fn without_both_slots_the_copies_serve_and_a_repair_rewrites_the_slots() {
    for (seed, closed, len) in [
        (1, true, TINY.pool_size),
        (2, false, TINY.pool_size),
        (3, true, TINY.pool_size + 5 * 1024 * 1024),
        (4, false, TINY.pool_size + B),
    ] {
        let base = all_kinds(seed, closed).expect("a pool on a sound device");
        let original = shown(&Arc::new(base.fork(1)), true).expect("a sound pool opens");
        let mut rng = SplitMix64::new(seed);
        for zeros in [true, false] {
            let device = on_device_of(&base, len);
            for slot in 0..2 {
                let bytes = match zeros {
                    true => vec![0; 4096],
                    false => random_bytes(&mut rng, 4096),
                };
                put(&device, slot, &bytes);
            }
            for read_only in [true, false] {
                let fork = Arc::new(device.fork(1));
                let opened = shown(&fork, read_only);
                assert!(opened.as_ref() == Some(&original), "seed {seed}");
            }
            let found = check(&device).findings;
            assert_eq!(found.len(), 2, "{}", lines(&found));
            assert!(found.iter().all(|finding| finding.code == 25));
            let done = repair_and_compare(&device, &original, Held::Everything);
            let done = done.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            assert!(done.actions.iter().any(|action| action.code == 1));
            for slot in 0..2 {
                Superblock::decode(&page(&device, slot)).expect("a slot is whole again");
            }
            assert!(shown(&device, true) == Some(original.clone()));
        }
    }
}

/// Reads a page of a file in the root directory.
fn read_page(pool: &Pool, name: &str, block: u64) -> nodupe::error::Result<Vec<u8>> {
    let ino = pool.lookup(Ino::ROOT, name.as_bytes())?.ino;
    let mut bytes = Vec::new();
    pool.read(ino, block * B, B as usize, &mut bytes)?;
    Ok(bytes)
}

#[test]
fn a_lost_range_is_an_error_until_it_is_written_punched_or_cut_off() {
    let (device, pool) = new_pool(&TINY, 1).expect("a new pool");
    let (now, mut rng) = (Time::default(), SplitMix64::new(1));
    let bytes = random_bytes(&mut rng, 8 * 4096);
    let work = |pool: &Pool| -> nodupe::error::Result<()> {
        let file = pool.create_node(Ino::ROOT, b"written", &NODE, now)?;
        pool.write(file.ino, 0, &bytes, now)?;
        let names = ["punched", "cut", "kept"].map(|name| name.as_bytes().to_vec());
        pool.clone_tree(file.ino, Ino::ROOT, &names, None, now)?;
        pool.close()
    };
    work(&pool).expect("a sound device");
    let lost = &bytes[3 * 4096..4 * 4096];
    // The journal, which comes first, has it as well.
    let places = device.used();
    let at = places
        .iter()
        .rfind(|at| page(&device, **at / B)[..] == *lost);
    let device = Arc::new(device.crash_none());
    device.flip(at.expect("it was written") + 5, 5);
    let report = repair(&device).expect("it can be repaired");
    let told = report.actions.iter().filter(|action| action.code == 4);
    assert_eq!(told.count(), 4, "{:?}", report.actions);

    let pool = open(&device, TINY.cache_size).expect("a repaired pool opens");
    for name in ["written", "punched", "cut", "kept"] {
        assert!(read_page(&pool, name, 3).is_err(), "{name}");
        assert!(read_page(&pool, name, 2).expect("it is whole") == bytes[2 * 4096..3 * 4096]);
    }
    let ino = |name: &str| pool.lookup(Ino::ROOT, name.as_bytes()).expect("a name").ino;
    // Part of a block is no remedy: the rest of it is lost still.
    assert!(pool.write(ino("written"), 3 * B + 7, b"part", now).is_err());
    assert!(read_page(&pool, "written", 3).is_err());
    let new = random_bytes(&mut rng, 4096);
    pool.write(ino("written"), 3 * B, &new, now)
        .expect("it can be written");
    pool.punch(ino("punched"), 3 * B, B, now)
        .expect("it can be punched");
    pool.truncate(ino("cut"), 3 * B, now)
        .expect("it can be cut off");
    pool.truncate(ino("cut"), 8 * B, now).expect("it can grow");
    let zeros = vec![0; 4096];
    for reopened in [false, true] {
        let device = if reopened {
            pool.close().expect("a sound device");
            Arc::new(device.crash_none())
        } else {
            device.clone()
        };
        let again = reopened.then(|| open(&device, TINY.cache_size).expect("it opens"));
        let pool = again.as_ref().unwrap_or(&pool);
        let page = |name| read_page(pool, name, 3);
        assert!(page("written").expect("it was written") == new);
        assert!(page("punched").expect("it was punched") == zeros);
        assert!(page("cut").expect("it was cut off") == zeros);
        assert!(page("kept").is_err());
    }
    let report = check(&device.crash_none());
    assert_eq!(
        (lines(&report.findings).as_str(), report.counts.lost_blocks),
        ("", 1)
    );
}
