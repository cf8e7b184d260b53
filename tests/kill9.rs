//! What was synced survives a `kill -9` of the daemon, on a real mount.
//!
//! Writers write numbered blocks in an order that a seed fixes and note the number that their
//! last sync covered. After the kill and a new mount each file must hold what its writer had
//! written up to some point, no older than that sync. A writer with O_DIRECT sends each write as
//! one request, so its file must be a prefix of what it wrote, in order; the kernel may reorder
//! writes through its cache, so there only the synced blocks are compared. No block may be torn.

mod datastore;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use datastore::{Datastore, cannot_mount, not_run};

/// Size of one write, in bytes.
const BLOCK: usize = 4096;
/// Blocks of each file: 4 MiB, so that many are written more than once.
const BLOCKS: u64 = 1024;
/// Writers in each round.
const ROUNDS: [u64; 3] = [1, 2, 4];

/// What one writer knows about its file.
#[derive(Debug)]
struct Written {
    path: PathBuf,
    seed: u64,
    direct: bool,
    /// Number of the last write that a sync covered.
    synced: u64,
    /// Number of the last write that was sent.
    sent: u64,
}

/// A pseudo-random number from a seed and a counter (the finalizer of SplitMix64).
fn mix(seed: u64, counter: u64) -> u64 {
    let mut z = seed.wrapping_add(counter.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Block that write `number` goes to.
fn place(seed: u64, number: u64) -> u64 {
    mix(seed, number) % BLOCKS
}

/// Writes until the daemon is gone, which an error tells, or `stop`.
fn write_until_killed(path: &Path, seed: u64, direct: bool, stop: &AtomicBool) -> Written {
    let mut written = Written {
        path: path.to_owned(),
        seed,
        direct,
        synced: 0,
        sent: 0,
    };
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .custom_flags(if direct { libc::O_DIRECT } else { 0 })
        .open(path)
        .expect("a new file");
    file.sync_all().expect("a synced file");
    File::open(path.parent().expect("a file in a folder"))
        .and_then(|folder| folder.sync_all())
        .expect("a synced folder");
    // O_DIRECT wants aligned memory on some file systems; twice the size holds a whole block.
    let mut memory = vec![0_u8; 2 * BLOCK];
    let start = memory.as_ptr().align_offset(BLOCK);
    let buffer = &mut memory[start..start + BLOCK];
    while !stop.load(Ordering::Relaxed) {
        let number = written.sent + 1;
        for word in buffer.chunks_exact_mut(8) {
            word.copy_from_slice(&number.to_le_bytes());
        }
        written.sent = number;
        let at = place(seed, number) * BLOCK as u64;
        if file.write_all_at(buffer, at).is_err() {
            return written;
        }
        if mix(seed, !number).is_multiple_of(4) {
            if file.sync_data().is_err() {
                return written;
            }
            written.synced = number;
        }
    }
    written
}

/// Reads a file as the number of the write that each block comes from; 0 where there is none.
fn numbers(path: &Path) -> Vec<u64> {
    let data = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(
        data.len() % BLOCK,
        0,
        "{}: size {}",
        path.display(),
        data.len()
    );
    let blocks = data.chunks_exact(BLOCK).enumerate();
    let mut found: Vec<u64> = blocks
        .map(|(at, block)| {
            let (first, rest) = block.split_at(8);
            assert!(
                rest.chunks_exact(8).all(|word| word == first),
                "{}: block {at} is torn",
                path.display()
            );
            u64::from_le_bytes(first.try_into().expect("eight bytes"))
        })
        .collect();
    found.resize(BLOCKS as usize, 0);
    found
}

/// Blocks as they are after the first `count` writes.
fn state(seed: u64, count: u64) -> Vec<u64> {
    let mut blocks = vec![0; BLOCKS as usize];
    for number in 1..=count {
        blocks[place(seed, number) as usize] = number;
    }
    blocks
}

/// Compares a file with what its writer knows.
fn verify(written: &Written) {
    let path = written.path.display();
    let found = numbers(&written.path);
    let newest = found.iter().copied().max().unwrap_or(0);
    assert!(
        (written.synced..=written.sent).contains(&newest),
        "{path}: newest write {newest}, synced {}, sent {}",
        written.synced,
        written.sent
    );
    if written.direct {
        let expected = state(written.seed, newest);
        assert!(
            found == expected,
            "{path}: not a prefix of what was written"
        );
    }
    let synced = state(written.seed, written.synced);
    for (at, (found, synced)) in found.iter().zip(&synced).enumerate() {
        let placed = *found == 0 || place(written.seed, *found) == at as u64;
        assert!(
            placed,
            "{path}: block {at} holds write {found}, of another block"
        );
        assert!(found >= synced, "{path}: block {at} lost write {synced}");
    }
}

#[test]
fn synced_writes_survive_kill_nine() {
    if let Some(why) = cannot_mount() {
        return not_run("synced_writes_survive_kill_nine", &why);
    }
    let seed = std::env::var("SEED").ok().map_or_else(
        || {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            now.expect("a clock after 1970").as_secs()
        },
        |seed| seed.parse().expect("SEED is a number"),
    );
    eprintln!("SEED={seed}");
    let mut store = Datastore::new("1G");
    let mut kept = BTreeMap::new();
    for (round, writers) in (0..).zip(ROUNDS) {
        let stop = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = (0..writers)
            .map(|writer| {
                let path = store.dir().join(format!("round{round}.writer{writer}"));
                let seed = mix(seed, round * 100 + writer);
                let stop = Arc::clone(&stop);
                thread::spawn(move || write_until_killed(&path, seed, writer % 2 == 0, &stop))
            })
            .collect();
        thread::sleep(Duration::from_millis(300 + mix(seed, round) % 900));
        store.kill();
        stop.store(true, Ordering::Relaxed);
        let written: Vec<Written> = threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .expect("the writer ends by an error of its file")
            })
            .collect();
        store.detach();
        store.mount();
        for written in &written {
            assert!(
                written.synced > 0,
                "nothing was synced, so nothing is proved"
            );
            verify(written);
            kept.insert(written.path.clone(), numbers(&written.path));
        }
        for (path, blocks) in &kept {
            assert!(
                numbers(path) == *blocks,
                "{}: an older file changed",
                path.display()
            );
        }
    }
    store.unmount();
    store.check();
}

/// The comparison is only worth something if it sees what must not happen.
#[test]
fn verify_sees_lost_and_reordered_writes() {
    let folder = tempfile::tempdir().expect("a folder");
    let written = Written {
        path: folder.path().join("file"),
        seed: 7,
        direct: true,
        synced: 90,
        sent: 100,
    };
    let save = |blocks: &[u64]| {
        let words = BLOCK / 8;
        let bytes: Vec<u8> = blocks
            .iter()
            .flat_map(|number| number.to_le_bytes().repeat(words))
            .collect();
        fs::write(&written.path, bytes).expect("a file");
    };
    let fails = || std::panic::catch_unwind(|| verify(&written)).is_err();
    save(&state(7, 95));
    assert!(!fails(), "95 of 100 writes, 90 synced: a good crash");
    save(&state(7, 89));
    assert!(fails(), "the last synced write is lost");
    let mut reordered = state(7, 95);
    reordered[place(7, 94) as usize] = 0;
    save(&reordered);
    assert!(fails(), "write 95 without write 94");
}
