//! Pools made by somebody who means harm: every checksum is right, and what it protects is not.
//!
//! A field of a node, of a superblock or of the journal is changed, and all checksums from there
//! up to the superblock are made right again. Whatever is asked of such a pool gives an answer or
//! an error: no panic (so no failed assertion either, and no overflow), and no endless loop.
//!
//! `SEEDS=20000 cargo test --release --test hostile` looks further.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::crash::{TINY, Verdict, assert_none, for_each_seed, new_pool, seeds};
use common::generate::{SMALL, next_op, random_bytes};
use common::history::Runner;

use nodupe::device::{BlockDevice, SimDevice, SplitMix64};
use nodupe::engine::{FileKind, NewNode, OpenOptions, Pool, RenameMode, SetAttr, XattrMode};
use nodupe::ondisk::crc32c;
use nodupe::ondisk::journal::{
    BATCH_CRC, BATCH_MAGIC, BATCH_MAGIC_AT, BATCH_RECORDS, BATCH_RECORDS_LEN, BATCH_SEQ,
};
use nodupe::ondisk::node::{NODE_CRC, NODE_MAGIC, NODE_RECORDS};
use nodupe::ondisk::superblock::{HEAD_BLOCKS, SB_CRC, SB_GENERATION, Superblock};
use nodupe::units::{Ino, Time};

const B: u64 = 4096;
/// Longest time that one case may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Things that a walk looks at; a hostile tree may show far more.
const LOOKS_MAX: usize = 60;

type Page = [u8; 4096];

/// All blocks of a pool, to be changed.
struct Forge {
    device: SimDevice,
    blocks: u64,
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// The checksum of bytes of which four at `at` hold it.
fn crc_without(bytes: &[u8], at: usize) -> u32 {
    let mut bytes = bytes.to_vec();
    bytes[at..at + 4].fill(0);
    crc32c(&bytes)
}

impl Forge {
    fn page(&self, block: u64) -> Page {
        let mut page = [0; 4096];
        let read = self.device.read_at(block * B, &mut page);
        read.expect("a sound device reads");
        page
    }

    fn put(&self, block: u64, page: &[u8]) {
        let written = self.device.write_at(block * B, page);
        written.expect("a sound device writes");
    }

    fn is_node(page: &Page) -> bool {
        u32_at(page, 0) == NODE_MAGIC && u32_at(page, NODE_CRC) == crc_without(page, NODE_CRC)
    }

    fn superblock(&self) -> Verdict<(u64, Superblock)> {
        let slots = [0, 1].into_iter().filter_map(|slot| {
            let found = Superblock::decode(&self.page(slot)).ok()?;
            Some((slot, found))
        });
        let newest = slots.max_by_key(|(_, sb)| sb.generation);
        newest.ok_or_else(|| "there is no superblock".into())
    }

    /// Blocks of nodes that are in use: those that the superblock leads to.
    fn nodes(&self) -> Verdict<Vec<u64>> {
        let (slot, _) = self.superblock()?;
        let (mut todo, mut seen) = (vec![slot], BTreeSet::new());
        while let Some(block) = todo.pop() {
            let page = self.page(block);
            // Whatever looks like a reference to a node is one: block and checksum are right.
            for at in 0..4096 - 12 {
                let child = u64_at(&page, at);
                if child < HEAD_BLOCKS || child >= self.blocks || seen.contains(&child) {
                    continue;
                }
                let target = self.page(child);
                if Self::is_node(&target) && u32_at(&target, NODE_CRC) == u32_at(&page, at + 8) {
                    seen.insert(child);
                    todo.push(child);
                }
            }
        }
        Ok(seen.into_iter().collect())
    }

    /// Stores a changed node and makes all checksums above it right.
    fn put_node(&self, block: u64, page: &mut Page, nodes: &[u64]) {
        let old = u32_at(&self.page(block), NODE_CRC);
        let new = crc_without(page, NODE_CRC);
        page[NODE_CRC..NODE_CRC + 4].copy_from_slice(&new.to_le_bytes());
        self.put(block, page);
        if old == new {
            return;
        }
        let mut pattern = block.to_le_bytes().to_vec();
        pattern.extend_from_slice(&old.to_le_bytes());
        for parent in nodes.iter().copied().chain([0, 1]) {
            if parent == block {
                continue;
            }
            let mut above = self.page(parent);
            let mut changed = false;
            for at in 0..4096 - 12 {
                if above[at..at + 12] == pattern[..] {
                    above[at + 8..at + 12].copy_from_slice(&new.to_le_bytes());
                    changed = true;
                }
            }
            if changed && parent < HEAD_BLOCKS {
                self.put_superblock(parent, &mut above);
            } else if changed {
                self.put_node(parent, &mut above, nodes);
            }
        }
    }

    fn put_superblock(&self, slot: u64, page: &mut Page) {
        let crc = crc_without(page, SB_CRC);
        page[SB_CRC..SB_CRC + 4].copy_from_slice(&crc.to_le_bytes());
        self.put(slot, page);
    }

    /// Blocks of journal batches that wait for replay.
    fn batches(&self) -> Verdict<Vec<u64>> {
        let (_, sb) = self.superblock()?;
        let range = sb.journal_start..sb.journal_start + sb.journal_blocks;
        Ok(range
            .filter(|block| {
                let page = self.page(*block);
                u64_at(&page, BATCH_MAGIC_AT) == BATCH_MAGIC
                    && u64_at(&page, BATCH_SEQ) >= sb.journal_seq
            })
            .collect())
    }

    fn forge_batch(&self, block: u64, rng: &mut SplitMix64) {
        let first = self.page(block);
        let len = BATCH_RECORDS + u32_at(&first, BATCH_RECORDS_LEN) as usize;
        let blocks = len.div_ceil(B as usize);
        let mut head = vec![0; blocks * B as usize];
        let read = self.device.read_at(block * B, &mut head);
        read.expect("a sound device reads");
        let from = if rng.chance(10) {
            BATCH_SEQ
        } else {
            BATCH_RECORDS
        };
        for _ in 0..rng.below(3) + 1 {
            mutate(&mut head, from, len, rng);
        }
        // As far as the header, which may have changed, still says.
        let len = BATCH_RECORDS + u32_at(&head, BATCH_RECORDS_LEN) as usize;
        if len <= head.len() {
            let crc = crc_without(&head[..len], BATCH_CRC);
            head[BATCH_CRC..BATCH_CRC + 4].copy_from_slice(&crc.to_le_bytes());
        }
        self.put(block, &head);
    }
}

/// Changes a field somewhere between `from` and `to` to a value that hurts.
fn mutate(bytes: &mut [u8], from: usize, to: usize, rng: &mut SplitMix64) {
    let width = [1, 2, 4, 8][rng.index(4)];
    if to < from + width {
        return;
    }
    let at = from + rng.index(to - from - width + 1);
    // Fields are aligned to 4 in most structures, and seldom in records.
    let at = if rng.chance(50) {
        (at / 4 * 4).max(from)
    } else {
        at
    };
    let mut old = [0; 8];
    old[..width].copy_from_slice(&bytes[at..at + width]);
    let old = u64::from_le_bytes(old);
    let elsewhere = from + rng.index(to - from - width + 1);
    let mut other = [0; 8];
    other[..width].copy_from_slice(&bytes[elsewhere..elsewhere + width]);
    let new = match rng.below(12) {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => u64::MAX - 1,
        4 => old.wrapping_add(1),
        5 => old.wrapping_sub(1),
        6 => u64::from_le_bytes(other),
        7 => 1 << rng.below(64),
        8 => (1 << rng.below(63)) - 1,
        9 => old ^ (1 << rng.below(64)),
        10 => old.wrapping_mul(2),
        _ => rng.next(),
    };
    bytes[at..at + width].copy_from_slice(&new.to_le_bytes()[..width]);
}

/// Names and extents for trees of several levels, with shared nodes, in a directory that the
/// random history does not know.
fn large_trees(pool: &Pool, rng: &mut SplitMix64) -> nodupe::error::Result<()> {
    let now = Time::default();
    let node = |kind| NewNode {
        kind,
        mode: 0o700,
        uid: 0,
        gid: 0,
        rdev: 0,
        target: b"",
    };
    let dir = pool.create_node(Ino::ROOT, b"large", &node(FileKind::Directory), now)?;
    let file = pool.create_node(dir.ino, b"fragments", &node(FileKind::Regular), now)?;
    for block in 0..500 {
        pool.write(file.ino, block * 2 * B, &random_bytes(rng, 4096), now)?;
    }
    let names: Vec<_> = (0..150)
        .map(|i| format!("clone {i}").into_bytes())
        .collect();
    pool.clone_tree(file.ino, dir.ino, &names, None, now)?;
    for name in &names[..3] {
        let clone = pool.lookup(dir.ino, name)?;
        pool.write(clone.ino, rng.below(1000) * B, b"of its own", now)?;
    }
    pool.checkpoint()
}

/// A pool with all kinds of things in it; closed, or with a journal that waits for replay.
fn furnished(seed: u64, closed: bool) -> Verdict<SimDevice> {
    let (device, pool) = new_pool(&TINY, seed)?;
    let mut rng = SplitMix64::new(seed ^ 0xf00d);
    large_trees(&pool, &mut rng).map_err(|error| format!("large trees: {error}"))?;
    let mut runner = Runner::new(pool);
    for index in 0..260 {
        let op = next_op(&mut rng, &runner.model, &SMALL);
        let done = runner.run(&op);
        done.map_err(|error| format!("{}: {error}", op.text()))?;
        if index == 180 {
            let done = runner.pool.checkpoint();
            done.map_err(|error| format!("checkpoint: {error}"))?;
        }
    }
    let done = if closed {
        runner.pool.close()
    } else {
        runner.pool.sync()
    };
    done.map_err(|error| format!("end: {error}"))?;
    Ok(device.crash_none())
}

/// Looks at everything that the pool shows, within reason.
fn walk(pool: &Pool) -> Vec<(Ino, Ino, Vec<u8>, FileKind)> {
    let (mut todo, mut seen) = (vec![Ino::ROOT], BTreeSet::new());
    let mut found = Vec::new();
    while let Some(ino) = todo.pop() {
        if !seen.insert(ino) || seen.len() > LOOKS_MAX {
            continue;
        }
        look(pool, ino);
        let mut cookie = 0;
        for _ in 0..20 {
            let Ok(entries) = pool.read_dir(ino, cookie, 16) else {
                break;
            };
            let Some(last) = entries.last() else {
                break;
            };
            assert!(last.cookie > cookie, "the listing of {ino} goes in circles");
            cookie = last.cookie;
            for entry in entries {
                drop(pool.lookup(ino, &entry.name));
                todo.push(entry.ino);
                found.push((ino, entry.ino, entry.name, entry.kind));
            }
        }
    }
    found
}

fn look(pool: &Pool, ino: Ino) {
    let attr = pool.attr(ino);
    drop((pool.origin(ino), pool.file_usage(ino), pool.read_link(ino)));
    for name in pool.list_xattrs(ino).unwrap_or_default() {
        drop(pool.xattr(ino, &name));
    }
    let size = attr.map_or(1 << 20, |attr| attr.size);
    for offset in [0, 4096, size / 2, size.saturating_sub(5000), size] {
        let mut bytes = Vec::new();
        drop(pool.read(ino, offset, 100_000, &mut bytes));
        drop((pool.seek_data(ino, offset), pool.seek_hole(ino, offset)));
    }
}

/// Changes and removes things.
fn disturb(pool: &Pool, found: &[(Ino, Ino, Vec<u8>, FileKind)], rng: &mut SplitMix64) {
    let now = Time::default();
    let node = NewNode {
        kind: FileKind::Regular,
        mode: 0o600,
        uid: 0,
        gid: 0,
        rdev: 0,
        target: b"",
    };
    let new = pool.create_node(Ino::ROOT, b"hostile new", &node, now);
    let new = new.map_or(Ino(2), |attr| attr.ino);
    let data = random_bytes(rng, 200_000);
    for (dir, ino, name, kind) in found {
        let offset = rng.below(300_000);
        match rng.below(12) {
            0 => drop(pool.write(*ino, offset, &data[..5000], now)),
            1 => drop(pool.write(*ino, offset / B * B, &data, now)),
            2 => drop(pool.truncate(*ino, offset, now)),
            3 => drop(pool.punch(*ino, offset, 70_000, now)),
            4 => drop(pool.clone_file(*ino, new, now)),
            5 => drop(pool.clone_range(*ino, 0, new, offset / B * B, 100_000, now)),
            6 => drop(pool.rename(*dir, name, Ino::ROOT, b"moved", RenameMode::Replace, now)),
            7 => drop(pool.set_xattr(*ino, b"user.a", &data[..3000], XattrMode::Set, now)),
            8 => drop(pool.clone_tree(*ino, Ino::ROOT, std::slice::from_ref(name), None, now)),
            9 => drop(pool.link(*ino, Ino::ROOT, b"linked", now)),
            10 => drop(pool.begin_clone(*ino, new, 4096, now)),
            _ => drop(pool.set_attr(
                *ino,
                &SetAttr {
                    mode: Some(0o777),
                    ..SetAttr::default()
                },
            )),
        }
        if rng.chance(10) {
            drop(pool.sync());
        }
        if rng.chance(5) {
            drop(pool.checkpoint());
        }
        if rng.chance(30) {
            let gone = match kind {
                FileKind::Directory => pool.rmdir(*dir, name, now),
                _ => pool.unlink(*dir, name, now),
            };
            if gone.is_ok() {
                drop(pool.reclaim(*ino));
            }
        }
    }
    drop((pool.sync(), pool.checkpoint()));
}

/// Does everything to a pool.
fn exercise(device: &SimDevice, seed: u64) {
    let mut rng = SplitMix64::new(seed ^ 0xe8e);
    drop(Pool::check(device, None, &mut |_, _| {}));
    let options = |read_only| OpenOptions {
        read_only,
        cache_size: TINY.cache_size,
    };
    let first = Arc::new(device.fork(seed));
    if let Ok(pool) = Pool::open(first.clone(), None, &options(true)) {
        walk(&pool);
        assert!(pool.usage().total > 0);
    }
    if let Ok(pool) = Pool::open(first.clone(), None, &options(false)) {
        let found = walk(&pool);
        disturb(&pool, &found, &mut rng);
        assert!(pool.usage().total > 0);
        walk(&pool);
        drop(pool.close());
    }
    drop(Pool::check(&*first, None, &mut |_, _| {}));
    if let Ok(pool) = Pool::open(first, None, &options(false)) {
        // Everything goes: deleting walks what nothing else did.
        for (dir, ino, name, kind) in walk(&pool).into_iter().rev() {
            let now = Time::default();
            let gone = match kind {
                FileKind::Directory => pool.rmdir(dir, &name, now),
                _ => pool.unlink(dir, &name, now),
            };
            drop(gone);
            drop(pool.reclaim(ino));
        }
        drop(pool.close());
    }
}

/// Runs the cases with a watchdog, because a thread in an endless loop cannot be joined.
fn watched(seeds: &[u64], case: impl Fn(u64) -> Verdict + Sync) -> Vec<(u64, String)> {
    let running: Mutex<Vec<(u64, Instant)>> = Mutex::new(Vec::new());
    let lock = || running.lock().expect("nobody panics with it");
    let finished = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !finished.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(50));
                if let Some((seed, _)) = lock().iter().find(|run| run.1.elapsed() > PATIENCE) {
                    eprintln!("ENDLESS: SEED={seed} cargo test --test hostile");
                    std::process::abort();
                }
            }
        });
        let failures = for_each_seed(seeds, |seed| {
            lock().push((seed, Instant::now()));
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| case(seed)));
            lock().retain(|run| run.0 != seed);
            outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        finished.store(true, Ordering::Relaxed);
        failures
    })
}

fn forge(base: &SimDevice, seed: u64) -> Forge {
    Forge {
        device: base.fork(seed),
        blocks: TINY.pool_size / B,
    }
}

#[test]
fn a_forged_tree_gives_errors_only() {
    let base = furnished(5, true).expect("a pool on a sound device");
    let nodes = forge(&base, 0).nodes().expect("it has nodes");
    assert!(nodes.len() > 30, "only {} nodes", nodes.len());
    let opened = AtomicU64::new(0);
    let failures = watched(&seeds(500), |seed| {
        let mut rng = SplitMix64::new(seed);
        let forge = forge(&base, seed);
        for _ in 0..rng.below(2) + 1 {
            let block = nodes[rng.index(nodes.len())];
            let mut page = forge.page(block);
            let from = if rng.chance(15) { 4 } else { NODE_RECORDS };
            // Records stand at the front, values of the namespace at the back.
            let to = if rng.chance(60) { 600 } else { 4096 };
            for _ in 0..rng.below(3) + 1 {
                mutate(&mut page, from, to, &mut rng);
            }
            forge.put_node(block, &mut page, &nodes);
        }
        let probe = OpenOptions {
            read_only: true,
            cache_size: TINY.cache_size,
        };
        if Pool::open(Arc::new(forge.device.fork(0)), None, &probe).is_ok() {
            opened.fetch_add(1, Ordering::Relaxed);
        }
        exercise(&forge.device, seed);
        Ok(())
    });
    eprintln!("forged trees: {} opened", opened.load(Ordering::Relaxed));
    assert_none("a_forged_tree", &failures);
}

#[test]
fn a_forged_superblock_gives_errors_only() {
    let base = furnished(6, true).expect("a pool on a sound device");
    let failures = watched(&seeds(150), |seed| {
        let mut rng = SplitMix64::new(seed);
        let forge = forge(&base, seed);
        let (slot, _) = forge.superblock()?;
        let mut page = forge.page(slot);
        for _ in 0..rng.below(2) + 1 {
            mutate(&mut page, SB_GENERATION, 248, &mut rng);
        }
        forge.put_superblock(slot, &mut page);
        forge.put(1 - slot, &[0; 4096]);
        exercise(&forge.device, seed);
        Ok(())
    });
    assert_none("a_forged_superblock", &failures);
}

#[test]
fn a_forged_journal_gives_errors_only() {
    let base = furnished(7, false).expect("a pool on a sound device");
    let batches = forge(&base, 0).batches().expect("it has a superblock");
    assert!(batches.len() > 1, "only {} batches", batches.len());
    let failures = watched(&seeds(300), |seed| {
        let mut rng = SplitMix64::new(seed);
        let forge = forge(&base, seed);
        let block = batches[rng.index(batches.len())];
        forge.forge_batch(block, &mut rng);
        exercise(&forge.device, seed);
        Ok(())
    });
    assert_none("a_forged_journal", &failures);
}
