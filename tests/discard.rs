//! What is freed goes back to the host, and nothing else does.

mod common;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::crash::{TINY, check, new_pool};
use common::damage::used_blocks;
use common::generate::random_bytes;
use common::history::open;

use nodupe::device::{BlockDevice, FileDevice, OpenMode, SimDevice, SplitMix64};
use nodupe::engine::{CreateOptions, NewNode, OpenOptions, Pool};
use nodupe::units::{Ino, Time};

const B: u64 = 4096;

fn create(pool: &Pool, name: &str) -> Ino {
    let node = NewNode::regular(0o600);
    let made = pool.create_node(Ino::ROOT, name.as_bytes(), &node, Time::default());
    made.expect("there is room").ino
}

fn write(pool: &Pool, ino: Ino, offset: u64, data: &[u8]) {
    let written = pool.write(ino, offset, data, Time::default());
    written.expect("there is room");
}

fn remove(pool: &Pool, name: &str) {
    let attr = pool.unlink(Ino::ROOT, name.as_bytes(), Time::default());
    let ino = attr.expect("the name exists").ino;
    pool.reclaim(ino).expect("deleting always works");
}

fn checkpoint(pool: &Pool) {
    // What one frees, the next one may allocate; old nodes are freed one later.
    for _ in 0..3 {
        pool.checkpoint().expect("the device is sound");
    }
}

/// Blocks with data or nodes.
fn used(device: &SimDevice) -> usize {
    used_blocks(device)
        .into_iter()
        .filter(|addr| *addr >= 16 * B + TINY.journal_size)
        .count()
}

fn content(pool: &Pool, ino: Ino, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    pool.read(ino, 0, len, &mut bytes)
        .expect("the device is sound");
    bytes
}

#[test]
fn a_deleted_file_leaves_nothing_on_the_host() {
    let (device, pool) = new_pool(&TINY, 1).expect("a pool is made");
    let mut rng = SplitMix64::new(1);
    checkpoint(&pool);
    let before = used(&device);
    let kept = create(&pool, "kept");
    let kept_bytes = random_bytes(&mut rng, 300_000);
    write(&pool, kept, 0, &kept_bytes);
    let gone = create(&pool, "gone");
    // Scattered over the file, and so in one place of the pool; and in large writes.
    for index in 0..200_u64 {
        write(
            &pool,
            gone,
            index * 7 % 200 * B,
            &random_bytes(&mut rng, 4096),
        );
    }
    write(&pool, gone, 4 << 20, &random_bytes(&mut rng, 1 << 20));
    checkpoint(&pool);
    assert!(used(&device) > before + 450);
    remove(&pool, "gone");
    checkpoint(&pool);
    let left = used(&device).saturating_sub(before + kept_bytes.len().div_ceil(4096));
    assert!(left < 48, "{left} blocks are left of a deleted file");
    assert!(content(&pool, kept, 400_000) == kept_bytes);
    pool.close().expect("the device is sound");
    let device = Arc::new(device.crash_all());
    check(&device, "behind discards").unwrap_or_else(|error| panic!("{error}"));
    let pool = open(&device, TINY.cache_size).expect("a closed pool opens");
    assert!(content(&pool, kept, 400_000) == kept_bytes);
}

#[test]
fn pieces_freed_bit_by_bit_leave_nothing_on_the_host() {
    let (device, pool) = new_pool(&TINY, 2).expect("a pool is made");
    let mut rng = SplitMix64::new(2);
    let mut files = Vec::new();
    for index in 0..256 {
        let name = format!("f{index}");
        let ino = create(&pool, &name);
        let bytes = random_bytes(&mut rng, 4096);
        write(&pool, ino, 0, &bytes);
        files.push((name, ino, bytes));
    }
    checkpoint(&pool);
    let full = used(&device);
    // Each checkpoint frees single blocks far apart; no run is ever a whole piece.
    for round in 0..16 {
        for (name, ..) in files.iter().skip(round).step_by(16) {
            remove(&pool, name);
        }
        pool.checkpoint().expect("the device is sound");
        for (name, ino, bytes) in files.iter().skip(round + 1).step_by(16) {
            if round < 15 {
                assert!(content(&pool, *ino, 5000) == *bytes, "{name}");
            }
        }
    }
    checkpoint(&pool);
    let left = used(&device);
    assert!(
        left + 240 < full,
        "{left} of {full} blocks are left of many small files"
    );
}

#[test]
fn a_host_file_shrinks_while_threads_run() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("pool");
    let device = FileDevice::create(&path, Some(64 << 20), false).expect("a file is made");
    let options = CreateOptions {
        journal_size: Some(1 << 20),
        uuid: [1; 16],
        hash_key: [2; 16],
        uid: 0,
        gid: 0,
        time: Time::default(),
    };
    Pool::create(Arc::new(device), None, &options).expect("a pool is made");
    let device = FileDevice::open(&path, OpenMode::ReadWrite).expect("nobody holds the file");
    let device: Arc<dyn BlockDevice> = Arc::new(device);
    let options = OpenOptions {
        read_only: false,
        cache_size: 8 << 20,
    };
    let pool = Pool::open(device, None, &options).expect("a new pool opens");
    pool.start().expect("threads can be made");
    let ino = create(&pool, "large");
    let mut rng = SplitMix64::new(3);
    for index in 0..24 {
        write(&pool, ino, index << 20, &random_bytes(&mut rng, 1 << 20));
    }
    checkpoint(&pool);
    let full = host_bytes(&path);
    assert!(full > 24 << 20);
    remove(&pool, "large");
    let begun = Instant::now();
    while host_bytes(&path) > 3 << 20 {
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "{} of {full} bytes are left (this test needs a filesystem with holes)",
            host_bytes(&path)
        );
        checkpoint(&pool);
        std::thread::sleep(Duration::from_millis(20));
    }
    // What is deleted just before a close goes back as well.
    let ino = create(&pool, "last");
    for index in 0..8 {
        write(&pool, ino, index << 20, &random_bytes(&mut rng, 1 << 20));
    }
    checkpoint(&pool);
    remove(&pool, "last");
    pool.close().expect("the device is sound");
    assert!(host_bytes(&path) < 3 << 20, "{} bytes", host_bytes(&path));
}

fn host_bytes(path: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).expect("the file is there");
    metadata.blocks() * 512
}

/// A device that keeps what a crash would leave at its first discard.
#[derive(Debug)]
struct FirstDiscard {
    device: Arc<SimDevice>,
    crashed: Mutex<Option<SimDevice>>,
}

impl BlockDevice for FirstDiscard {
    fn len(&self) -> u64 {
        self.device.len()
    }
    fn read_at(&self, addr: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.device.read_at(addr, buf)
    }
    fn write_at(&self, addr: u64, data: &[u8]) -> std::io::Result<()> {
        self.device.write_at(addr, data)
    }
    fn sync(&self) -> std::io::Result<()> {
        self.device.sync()
    }
    fn discard(&self, addr: u64, len: u64) -> std::io::Result<()> {
        let mut crashed = self.crashed.lock().expect("nobody panics inside");
        crashed.get_or_insert_with(|| self.device.crash_all());
        self.device.discard(addr, len)
    }
}

#[test]
fn what_waited_to_be_discarded_at_a_crash_is_discarded_later() {
    for is_journal_empty in [true, false] {
        let (device, pool) = new_pool(&TINY, 4).expect("a pool is made");
        checkpoint(&pool);
        let before = used(&device);
        pool.close().expect("the device is sound");
        drop(pool);
        let device = Arc::new(FirstDiscard {
            device,
            crashed: Mutex::default(),
        });
        let options = OpenOptions {
            read_only: false,
            cache_size: TINY.cache_size,
        };
        let pool = Pool::open(device.clone(), None, &options).expect("a clean pool");
        let gone = create(&pool, "gone");
        write(
            &pool,
            gone,
            0,
            &random_bytes(&mut SplitMix64::new(4), 2_000_000),
        );
        pool.checkpoint().expect("the device is sound");
        *device.crashed.lock().expect("nobody panics inside") = None;
        remove(&pool, "gone");
        pool.checkpoint().expect("the device is sound");
        pool.checkpoint().expect("the device is sound");
        let crashed = device.crashed.lock().expect("nobody panics inside").take();
        let crashed = Arc::new(crashed.expect("something was discarded"));
        assert!(used(&crashed) > before + 400, "the crash came too late");
        if !is_journal_empty {
            let pool = open(&crashed, TINY.cache_size).expect("as a crash left it");
            create(&pool, "new");
            pool.sync().expect("the device is sound");
        }
        let pool = open(&crashed, TINY.cache_size).expect("as a crash left it");
        assert_eq!(pool.health().replayed.batches == 0, is_journal_empty);
        pool.start().expect("threads can be made");
        pool.close().expect("the device is sound");
        let after = used(&crashed);
        assert!(after <= before + 8, "{after} blocks, {before} before");
        check(&crashed, "after the discards").expect("nothing is to be found");
    }
}
