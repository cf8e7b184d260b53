//! A journal that lost what had been acknowledged is noticed: the pool is not opened for writing as
//! if nothing had been, `check` says so, and a guest cannot fake it.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::crash::{Geometry, TINY, new_pool};
use common::generate::random_bytes;
use common::history::open;

use nodupe::device::{BlockDevice, SimDevice, SplitMix64};
use nodupe::engine::{NewNode, OpenOptions, Pool};
use nodupe::error::Kind;
use nodupe::ondisk::journal::{BATCH_MAGIC, BatchHeader};
use nodupe::ondisk::superblock::HEAD_BLOCKS;
use nodupe::units::{Ino, Time};

/// Batches after the one that makes the file.
const BATCHES: u64 = 6;
const BLOCK: u64 = 4096;

fn create(pool: &Pool, name: &str) -> Ino {
    let node = NewNode::regular(0o600);
    let made = pool.create_node(Ino::ROOT, name.as_bytes(), &node, Time::default());
    made.expect("there is room").ino
}

/// A pool whose journal holds a batch for each of `BATCHES` writes, and the places of all batches.
fn journal_of_writes() -> (SimDevice, Vec<(u64, BatchHeader)>) {
    let (device, pool) = new_pool(&TINY, 7).expect("a pool is made");
    let ino = create(&pool, "file");
    pool.sync().expect("the device is sound");
    for index in 0..BATCHES {
        let data = random_bytes(&mut SplitMix64::new(index + 1), 9000);
        let now = Time::default();
        pool.write(ino, index * 9000, &data, now)
            .expect("there is room");
        pool.sync().expect("the device is sound");
    }
    let image = device.crash_none();
    let batches = batches(&image);
    assert_eq!(batches.len() as u64, BATCHES + 1);
    (image, batches)
}

/// Damages the batch that begins at a block.
type Damage<'a> = &'a dyn Fn(&SimDevice, u64);

/// All headers in the ring, by their device block.
fn batches(device: &SimDevice) -> Vec<(u64, BatchHeader)> {
    let ring = HEAD_BLOCKS..HEAD_BLOCKS + TINY.journal_size / BLOCK;
    ring.filter_map(|block| {
        let mut bytes = vec![0; BLOCK as usize];
        let read = device.read_at(block * BLOCK, &mut bytes);
        read.expect("a sound device reads");
        let header = BatchHeader::decode(&bytes).ok()?;
        Some((block, header))
    })
    .collect()
}

/// Bytes of the file, which must be a prefix of what was written.
fn prefix(pool: &Pool) -> u64 {
    let attr = pool.lookup(Ino::ROOT, b"file").expect("the file is there");
    let mut bytes = Vec::new();
    pool.read(attr.ino, 0, attr.size as usize, &mut bytes)
        .expect("its bytes are whole");
    for (index, piece) in bytes.chunks(9000).enumerate() {
        let wanted = random_bytes(&mut SplitMix64::new(index as u64 + 1), 9000);
        assert!(piece == wanted, "write {index} is not what was written");
    }
    attr.size
}

fn findings(device: &SimDevice) -> Vec<u32> {
    let found = Pool::check(device, None, &mut |_, _| {}).expect("the pool can be checked");
    found.iter().map(|finding| finding.code).collect()
}

#[test]
fn a_damaged_batch_that_was_durable_is_not_taken_for_the_end() {
    let (image, batches) = journal_of_writes();
    let damages: [(&str, Damage); 5] = [
        ("header", &|device, at| device.flip(at * BLOCK + 20, 1)),
        ("record", &|device, at| device.flip(at * BLOCK + 70, 0)),
        ("data", &|device, at| device.flip((at + 1) * BLOCK + 99, 7)),
        ("zeros", &|device, at| {
            let zeros = [0; BLOCK as usize];
            device.write_at(at * BLOCK, &zeros).expect("in range");
        }),
        ("garbage", &|device, at| {
            let bytes = random_bytes(&mut SplitMix64::new(at), BLOCK as usize);
            device.write_at(at * BLOCK, &bytes).expect("in range");
        }),
    ];
    for (what, damage) in damages {
        for (index, (at, header)) in batches.iter().enumerate() {
            if header.data_blocks == 0 && what == "data" {
                continue;
            }
            let device = Arc::new(image.fork(0));
            damage(&device, *at);
            let is_last = index + 1 == batches.len();
            let opened = open(&device, TINY.cache_size);
            if is_last {
                // Nothing tells it from a batch that a crash cut off.
                let pool = opened.expect("the end of the journal is no error");
                assert_eq!(prefix(&pool), (index as u64 - 1) * 9000, "{what}");
                continue;
            }
            let error = opened.expect_err("acknowledged writes are gone");
            assert_eq!(error.kind(), Kind::Corrupt, "{what}: {error}");
            assert!(error.to_string().contains("lost acknowledged writes"));
            assert!(findings(&device).contains(&30), "{what} in batch {index}");
            rescue(&device, index as u64);
        }
    }
}

/// Read-only the pool shows the state before the loss; afterwards it can be told to go on there.
fn rescue(device: &Arc<SimDevice>, index: u64) {
    let options = OpenOptions {
        read_only: true,
        cache_size: TINY.cache_size,
    };
    let shared: Arc<dyn BlockDevice> = device.clone();
    let wanted = index.saturating_sub(1) * 9000;
    let pool = Pool::open(shared.clone(), None, &options).expect("read-only it opens");
    if index > 0 {
        assert_eq!(prefix(&pool), wanted);
    }
    drop(pool);
    let dropped = Pool::accept_loss(&shared, None).expect("the device is sound");
    assert_eq!(dropped, BATCHES - index);
    let pool = open(device, TINY.cache_size).expect("the loss was accepted");
    if index > 0 {
        assert_eq!(prefix(&pool), wanted);
    }
    pool.close().expect("the device is sound");
    assert_eq!(findings(device), [0; 0]);
}

#[test]
fn batches_in_the_data_of_a_guest_are_not_believed() {
    // The data blocks of a batch are what a guest wrote: here copies of real batches, and a batch
    // with a right checksum that lacks the seal.
    let (image, batches) = journal_of_writes();
    let identity = batches[0].1.pool;
    let mut copies = Vec::new();
    for (block, _) in &batches {
        let mut bytes = vec![0; BLOCK as usize];
        image.read_at(block * BLOCK, &mut bytes).expect("in range");
        copies.push(bytes);
    }
    for seq in [3, 9, 1000, u64::MAX] {
        let header = BatchHeader {
            pool: identity,
            seq,
            records_len: 0,
            data_blocks: 0,
            durable: seq - 1,
            block: 20,
        };
        let mut forged = vec![0; BLOCK as usize];
        header.encode(&mut forged, &[0; 16]);
        assert_eq!(forged[..8], BATCH_MAGIC.to_le_bytes());
        copies.push(forged);
    }
    let (device, pool) = new_pool(&TINY, 7).expect("a pool is made");
    let ino = create(&pool, "guest");
    for round in 0..12_u64 {
        for (index, copy) in copies.iter().enumerate() {
            let at = (round * 100 + index as u64) * BLOCK;
            pool.write(ino, at, copy, Time::default())
                .expect("there is room");
        }
        pool.sync().expect("the device is sound");
        let crashed = Arc::new(device.crash_none());
        assert_eq!(findings(&crashed), [0; 0]);
        let pool = open(&crashed, TINY.cache_size).expect("nothing was lost");
        let attr = pool.lookup(Ino::ROOT, b"guest").expect("it is there");
        let mut bytes = Vec::new();
        let last = (round * 100) * BLOCK;
        pool.read(attr.ino, last, copies[0].len(), &mut bytes)
            .expect("its bytes are whole");
        assert!(bytes == copies[0]);
    }
}

#[test]
fn a_lost_write_of_a_superblock_slot_is_made_good_by_its_copy() {
    let (device, pool) = new_pool(&TINY, 5).expect("a pool is made");
    create(&pool, "old");
    pool.checkpoint().expect("the device is sound");
    let older = device.crash_none();
    create(&pool, "new");
    pool.close().expect("the device is sound");
    // As if the device had said yes to the last write of either slot, and done nothing.
    for slot in 0..2 {
        let image = Arc::new(device.crash_all());
        let mut bytes = vec![0; BLOCK as usize];
        older.read_at(slot * BLOCK, &mut bytes).expect("in range");
        image.write_at(slot * BLOCK, &bytes).expect("in range");
        let zeros = vec![0; TINY.journal_size as usize];
        image
            .write_at(HEAD_BLOCKS * BLOCK, &zeros)
            .expect("in range");
        let pool = open(&image, TINY.cache_size).expect("a copy is newer");
        let found = pool.lookup(Ino::ROOT, b"new");
        found.unwrap_or_else(|error| panic!("slot {slot}: {error}"));
    }
}

#[test]
fn nothing_of_a_future_that_was_given_up_comes_back() {
    // More batches behind the loss than the search for it reaches, and later ones of the same
    // sizes: they get the numbers and the places of those that were given up.
    const DEAD: u64 = 22;
    let (device, pool) = new_pool(&TINY, 7).expect("a pool is made");
    let ino = create(&pool, "file");
    pool.sync().expect("the device is sound");
    let write = |pool: &Pool, index: u64, seed: u64| {
        let data = random_bytes(&mut SplitMix64::new(seed + index), 9000);
        pool.write(ino, index * 9000, &data, Time::default())
            .expect("there is room");
        pool.sync().expect("the device is sound");
    };
    (0..DEAD).for_each(|index| write(&pool, index, 1));
    let image = Arc::new(device.crash_none());
    let found = batches(&image);
    assert_eq!(found.len() as u64, DEAD + 1);
    let (lost, last) = (found[2].0, found[found.len() - 1].0);
    // The search reaches a quarter of the ring.
    assert!(last - lost > TINY.journal_size / BLOCK / 4, "{lost} {last}");
    image.flip(lost * BLOCK + 70, 0);
    let shared: Arc<dyn BlockDevice> = image.clone();
    let dropped = Pool::accept_loss(&shared, None).expect("the device is sound");
    assert_eq!(dropped, DEAD - 2);
    let pool = open(&image, TINY.cache_size).expect("the loss was accepted");
    assert_eq!(prefix(&pool), 9000);
    for index in 1..DEAD {
        write(&pool, index, 1000);
        let crashed = Arc::new(image.crash_none());
        let pool = open(&crashed, TINY.cache_size)
            .unwrap_or_else(|error| panic!("behind write {index}: {error}"));
        let attr = pool.lookup(Ino::ROOT, b"file").expect("the file is there");
        assert_eq!(attr.size, (index + 1) * 9000);
        let mut bytes = Vec::new();
        pool.read(ino, index * 9000, 9000, &mut bytes)
            .expect("its bytes are whole");
        let wanted = random_bytes(&mut SplitMix64::new(1000 + index), 9000);
        assert!(bytes == wanted, "write {index} is not what was written");
    }
}

/// Counts the bytes that are read.
#[derive(Debug)]
struct Reads {
    device: SimDevice,
    bytes: AtomicU64,
}

impl BlockDevice for Reads {
    fn len(&self) -> u64 {
        self.device.len()
    }
    fn read_at(&self, addr: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.device.read_at(addr, buf)
    }
    fn write_at(&self, addr: u64, data: &[u8]) -> std::io::Result<()> {
        self.device.write_at(addr, data)
    }
    fn sync(&self) -> std::io::Result<()> {
        self.device.sync()
    }
    fn discard(&self, addr: u64, len: u64) -> std::io::Result<()> {
        self.device.discard(addr, len)
    }
}

#[test]
fn an_old_copy_that_says_clean_does_not_hide_a_loss() {
    let (device, pool) = new_pool(&TINY, 9).expect("a pool is made");
    create(&pool, "file");
    pool.close().expect("the device is sound");
    drop(pool);
    // What is left later: no slot, copies as old as this, because the host had no space for newer
    // ones, and a ring that went round since.
    let old = device.crash_all();
    let pool = open(&device, TINY.cache_size).expect("the pool is whole");
    let blocks = TINY.journal_size / BLOCK;
    let (mut batches_written, mut checkpoints) = (0, 0);
    while batches_written < blocks || checkpoints < 3 {
        create(&pool, &format!("{batches_written}"));
        pool.sync().expect("the device is sound");
        batches_written += 1;
        if batches_written % (blocks / 8) == 0 {
            pool.checkpoint().expect("the device is sound");
            checkpoints += 1;
        }
    }
    create(&pool, "last");
    pool.sync().expect("the device is sound");
    let newer = device.crash_none();
    let mut bytes = vec![0; BLOCK as usize];
    for block in HEAD_BLOCKS..HEAD_BLOCKS + blocks {
        let read = newer.read_at(block * BLOCK, &mut bytes);
        read.expect("a sound device reads");
        old.write_at(block * BLOCK, &bytes).expect("in range");
    }
    let zeros = [0; BLOCK as usize];
    for slot in [0, 1] {
        old.write_at(slot * BLOCK, &zeros).expect("in range");
    }
    let old = Arc::new(old);
    // A refused open must not leave a slot behind that looks like the newest one.
    for _ in 0..2 {
        let error = open(&old, TINY.cache_size).expect_err("acknowledged writes are gone");
        let text = error.to_string();
        assert!(text.contains("lost acknowledged writes"), "{text}");
    }
}

#[test]
fn the_ring_of_a_clean_pool_is_not_searched() {
    const LARGE: Geometry = Geometry {
        pool_size: 256 * 1024 * 1024,
        journal_size: 64 * 1024 * 1024,
        ..TINY
    };
    let (device, pool) = new_pool(&LARGE, 8).expect("a pool is made");
    create(&pool, "file");
    let crashed = device.crash_all();
    pool.close().expect("the device is sound");
    let opened = |device: SimDevice| {
        let bytes = AtomicU64::new(0);
        let device = Arc::new(Reads { device, bytes });
        let options = OpenOptions {
            read_only: false,
            cache_size: LARGE.cache_size,
        };
        Pool::open(device.clone(), None, &options).expect("the pool is whole");
        device.bytes.load(Ordering::Relaxed)
    };
    let clean = opened(device.crash_all());
    assert!(clean < 1024 * 1024, "{clean} bytes");
    // Behind a crash the loss of the first batch would look like none.
    let searched = opened(crashed);
    assert!(searched > LARGE.journal_size / 4, "{searched} bytes");
}
