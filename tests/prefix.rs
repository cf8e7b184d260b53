//! Promise P3: after any crash the pool shows a prefix of what was acknowledged, over all files, at
//! least up to the last acknowledged sync.
//!
//! The check shares nothing with the model of the other tests: every sector of three files holds
//! the number of the write that wrote it last, so that what is found says by itself which writes
//! are there. One number K must explain every sector of every file.

mod common;

use std::sync::Arc;

use common::crash::{TINY, Verdict, assert_none, for_each_seed, new_pool, seeds};
use common::history::open;

use nodupe::device::{BlockDevice, SimDevice, SplitMix64};
use nodupe::engine::{NewNode, Pool};
use nodupe::ondisk::crc32c;
use nodupe::ondisk::journal::{BATCH_RECORDS, BatchHeader};
use nodupe::ondisk::record::Record;
use nodupe::ondisk::superblock::{HEAD_BLOCKS, Superblock};
use nodupe::units::{Ino, Time};

const FILES: usize = 3;
const SECTOR: usize = 512;
/// Sectors of a file: 24 blocks.
const SECTORS: usize = 24 * 8;
/// Writes and punches of a history.
const WRITES: usize = 240;

/// The number of the last write of each sector, of each file; 0: zeros.
type Stamps = Vec<[u32; SECTORS]>;

/// One numbered change, and where it ended in the device's history.
struct Change {
    file: usize,
    first: usize,
    sectors: usize,
    /// The number; 0 for a punch.
    stamp: u32,
    begun: usize,
}

struct Run {
    device: Arc<SimDevice>,
    changes: Vec<Change>,
    /// Device events when a sync had returned, and the changes before it.
    synced: Vec<(usize, usize)>,
    trace: nodupe::device::SimTrace,
}

fn stamped(stamp: u32, sectors: usize) -> Vec<u8> {
    stamp.to_le_bytes().repeat(sectors * SECTOR / 4)
}

fn make(pool: &Pool, name: &str) -> Ino {
    let node = NewNode::regular(0o600);
    let made = pool.create_node(Ino::ROOT, name.as_bytes(), &node, Time::default());
    made.expect("there is room").ino
}

/// Numbered writes of one sector to sixteen blocks, and punches, to three files in any order; a
/// sync now and then, a checkpoint seldom.
fn run(seed: u64) -> Verdict<Run> {
    let (device, pool) = new_pool(&TINY, seed)?;
    let names = ["a", "b", "c"];
    let inos: Vec<Ino> = names.iter().map(|name| make(&pool, name)).collect();
    let failed = |error: nodupe::error::Error| error.to_string();
    for ino in &inos {
        let size = (SECTORS * SECTOR) as u64;
        pool.truncate(*ino, size, Time::default()).map_err(failed)?;
    }
    pool.sync().map_err(failed)?;
    device.record();
    let mut rng = SplitMix64::new(seed);
    let (mut changes, mut synced) = (Vec::new(), vec![(0, 0)]);
    for number in 1..=WRITES as u32 {
        let file = rng.index(FILES);
        let (unit, most) = [(1, 20), (8, 4), (8, 16)][rng.index(3)];
        let sectors = (rng.index(most) + 1) * unit;
        let first = rng.index((SECTORS - sectors) / unit + 1) * unit;
        let begun = device.recorded();
        let (at, len) = ((first * SECTOR) as u64, (sectors * SECTOR) as u64);
        let is_punch = rng.chance(20);
        let stamp = if is_punch { 0 } else { number };
        let done = match is_punch {
            true => pool.punch(inos[file], at, len, Time::default()),
            false => pool.write(inos[file], at, &stamped(stamp, sectors), Time::default()),
        };
        done.map_err(failed)?;
        changes.push(Change {
            file,
            first,
            sectors,
            stamp,
            begun,
        });
        match rng.below(40) {
            0..4 => pool.sync().map_err(failed)?,
            4 => pool.checkpoint().map_err(failed)?,
            _ => continue,
        }
        synced.push((device.recorded(), changes.len()));
    }
    Ok(Run {
        trace: device.take_trace(),
        device,
        changes,
        synced,
    })
}

/// The stamps that a pool on this image shows. A sector that mixes two writes is an error.
fn stamps(image: SimDevice) -> Verdict<Stamps> {
    let pool = open(&Arc::new(image), TINY.cache_size).map_err(|error| format!("open: {error}"))?;
    let mut all = Vec::new();
    for name in ["a", "b", "c"] {
        let attr = pool.lookup(Ino::ROOT, name.as_bytes());
        let attr = attr.map_err(|error| format!("{name}: {error}"))?;
        let mut bytes = Vec::new();
        let read = pool.read(attr.ino, 0, SECTORS * SECTOR, &mut bytes);
        read.map_err(|error| format!("{name}: {error}"))?;
        let mut found = [0; SECTORS];
        for (index, sector) in bytes.chunks(SECTOR).enumerate() {
            let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
            let stamp = word(&sector[..4]);
            if sector.chunks(4).any(|bytes| word(bytes) != stamp) {
                return Err(format!("sector {index} of {name} mixes two writes"));
            }
            found[index] = stamp;
        }
        all.push(found);
    }
    Ok(all)
}

/// The one K from `oldest` to `newest` whose first K changes explain what is there.
fn explain(run: &Run, found: &Stamps, oldest: usize, newest: usize) -> Verdict<usize> {
    let mut wanted: Stamps = vec![[0; SECTORS]; FILES];
    for count in 0..=newest {
        if let Some(change) = count.checked_sub(1).map(|last| &run.changes[last]) {
            wanted[change.file][change.first..][..change.sectors].fill(change.stamp);
        }
        if count >= oldest && wanted == *found {
            return Ok(count);
        }
    }
    let newest_seen = found.iter().flatten().max();
    Err(format!(
        "what is there is no prefix: changes {oldest} to {newest} were possible, the newest found \
         is {newest_seen:?}"
    ))
}

/// The changes that must be there after a crash behind `position` events, and those that may be.
fn bounds(run: &Run, position: usize) -> (usize, usize) {
    let synced = run
        .synced
        .iter()
        .rev()
        .find(|(events, _)| *events <= position);
    let begun = run.changes.iter().filter(|change| change.begun <= position);
    (synced.map_or(0, |(_, count)| *count), begun.count())
}

#[test]
fn every_crash_leaves_a_prefix_over_all_files() {
    let cuts = std::sync::atomic::AtomicU64::new(0);
    let older = std::sync::atomic::AtomicU64::new(0);
    let failures = for_each_seed(&seeds(20), |seed| {
        let run = run(seed)?;
        let mut rng = SplitMix64::new(seed ^ 0xc07);
        let mut replay = run.trace.replay();
        while replay.step() {
            let position = replay.position();
            let (oldest, newest) = bounds(&run, position);
            for _ in 0..3 {
                let image = rng.next();
                let kept = stamps(replay.crash(image))
                    .and_then(|found| explain(&run, &found, oldest, newest))
                    .map_err(|error| format!("event {position}, image {image:#x}: {error}"))?;
                cuts.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let is_older = u64::from(kept < newest);
                older.fetch_add(is_older, std::sync::atomic::Ordering::Relaxed);
            }
        }
        Ok(())
    });
    eprintln!("prefix: {cuts:?} cuts, {older:?} of them lost something from the end");
    assert_none("every_crash_leaves_a_prefix", &failures);
}

/// Changes the order of the records in the last batch of the journal, its data with them, and makes
/// it whole again. False if there is none with two records.
fn reorder(device: &SimDevice) -> bool {
    let mut page = vec![0; 4096];
    let mut newest: Option<(u64, BatchHeader)> = None;
    let key = (0..2).find_map(|slot| {
        let mut page = [0; 4096];
        device.read_at(slot * 4096, &mut page).ok()?;
        Superblock::decode(&page).ok().map(|sb| sb.hash_key)
    });
    let ring = HEAD_BLOCKS..HEAD_BLOCKS + TINY.journal_size / 4096;
    for block in ring {
        let read = device.read_at(block * 4096, &mut page);
        read.expect("a sound device reads");
        if let Ok(header) = BatchHeader::decode(&page)
            && header.block == block - HEAD_BLOCKS
            && newest.is_none_or(|(_, newest)| header.seq > newest.seq)
        {
            newest = Some((block, header));
        }
    }
    let (Some((block, header)), Some(key)) = (newest, key) else {
        return false;
    };
    let mut bytes = vec![0; (header.blocks() * 4096) as usize];
    let read = device.read_at(block * 4096, &mut bytes);
    read.expect("a sound device reads");
    let head = (header.head_blocks() * 4096) as usize;
    let end = BATCH_RECORDS + header.records_len as usize;
    let mut data = bytes[head..].chunks(4096);
    let decoded = Record::decode_all(&bytes[BATCH_RECORDS..end]).expect("the batch is whole");
    let mut records = Vec::new();
    for record in decoded {
        let block = match &record {
            Record::Block { crc, .. } => {
                let block = data.next().expect("the batch is whole").to_vec();
                assert_eq!(crc32c(&block), *crc);
                Some(block)
            }
            _ => None,
        };
        records.push((record, block));
    }
    // A block goes in front of what changed its file before it.
    records.reverse();
    let mut changed = vec![0; BATCH_RECORDS];
    records
        .iter()
        .for_each(|(record, _)| record.encode(&mut changed));
    changed.resize(head, 0);
    header.encode(&mut changed, &key);
    changed.extend(
        records
            .iter()
            .filter_map(|(_, block)| block.as_ref())
            .flatten(),
    );
    device.write_at(block * 4096, &changed).expect("in range");
    device.sync().expect("a sound device syncs");
    records.len() > 1
}

#[test]
fn a_batch_in_another_order_is_noticed() {
    // What the test above says about order is only worth something if it can fail.
    let (mut tried, mut noticed) = (0, 0);
    for seed in 1..=6 {
        let run = run(seed).expect("the history runs");
        assert!(!run.device.is_empty());
        let mut replay = run.trace.replay();
        while replay.step() {
            let position = replay.position();
            let (oldest, newest) = bounds(&run, position);
            // Only where the last batch was acknowledged a moment ago.
            if !run.synced.iter().any(|(events, _)| *events == position) {
                continue;
            }
            let image = replay.crash_none();
            if !reorder(&image) {
                continue;
            }
            tried += 1;
            let found = stamps(image).and_then(|found| explain(&run, &found, oldest, newest));
            noticed += usize::from(found.is_err());
        }
    }
    eprintln!("reordered batches: {tried} tried, {noticed} noticed");
    // Most blocks may be swapped without anybody seeing it: those of punches and overlaps not.
    assert!(noticed * 12 > tried && tried > 20, "{noticed} of {tried}");
}
