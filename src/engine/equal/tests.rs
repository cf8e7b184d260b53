//! Sharing of equal blocks: what is shared, and what is not, also if somebody writes meanwhile.

use std::sync::{Arc, OnceLock, Weak};

use super::*;
use crate::device::{BlockDevice, SimDevice};
use crate::engine::{CreateOptions, NewNode, OpenOptions};
use crate::ondisk::crc32c;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::units::Time;

const MIB: u64 = 1024 * 1024;
const B: u64 = BLOCK_SIZE as u64;

fn new_pool() -> (Arc<SimDevice>, Arc<Pool>) {
    let device = Arc::new(SimDevice::new(24 * MIB, 1));
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

fn file(pool: &Pool, name: &str) -> Ino {
    let node = NewNode::regular(0o600);
    let made = pool.create_node(Ino::ROOT, name.as_bytes(), &node, Time::default());
    made.expect("there is room").ino
}

/// A block for each byte of `stamps`, all of them it; 0 is a hole.
fn write(pool: &Pool, ino: Ino, at: u64, stamps: &[u8]) {
    for (i, stamp) in (at..).zip(stamps) {
        let wrote = pool.write(ino, i * B, &[*stamp; BLOCK_SIZE], Time::default());
        wrote.expect("there is room");
    }
}

fn stamps(pool: &Pool, ino: Ino, count: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = pool.read(ino, 0, (count * B) as usize, &mut bytes);
    read.expect("the device is sound");
    assert_eq!(bytes.len() as u64, count * B);
    let block = |block: &[u8]| {
        assert!(block.iter().all(|byte| *byte == block[0]));
        block[0]
    };
    bytes.chunks(BLOCK_SIZE).map(block).collect()
}

fn share(block: u64, dst_block: u64, count: u64) -> Share {
    Share {
        block,
        dst_block,
        count,
    }
}

/// Ranges that are equal, and how many blocks were compared.
fn shared(pool: &Pool, src: Ino, dst: Ino, range: Share) -> (Vec<(u64, u64)>, u64) {
    let equal = pool.share_equal(src, dst, &range, false);
    let equal = equal.expect("the device is sound");
    (equal.ranges, equal.compared)
}

fn places(pool: &Pool, ino: Ino) -> Vec<u64> {
    let places = pool.places(ino, (0, u64::MAX), usize::MAX, None);
    let runs = places.expect("the device is sound").runs;
    let blocks = runs.iter().flat_map(|run| run.block..run.block + run.count);
    blocks.collect()
}

fn used(pool: &Pool) -> u64 {
    pool.checkpoint().expect("the device is sound");
    pool.usage().used
}

#[test]
fn equal_blocks_are_shared_and_no_others() {
    let (_device, pool) = new_pool();
    let (src, dst) = (file(&pool, "src"), file(&pool, "dst"));
    write(&pool, src, 0, &[1, 2, 3, 0, 5, 6, 7, 8]);
    write(&pool, dst, 0, &[1, 2, 4, 0, 5, 0, 7, 8]);
    let (before, attr) = (used(&pool), pool.attr(dst).expect("it is there"));
    let dry = pool.share_equal(src, dst, &share(0, 0, 99), true);
    let dry = dry.expect("the device is sound");
    assert_eq!(
        (&dry.ranges[..], dry.compared),
        (&[(0, 2), (4, 1), (6, 2)][..], 5)
    );
    assert_eq!(used(&pool), before);
    let (ranges, compared) = shared(&pool, src, dst, share(0, 0, 99));
    assert_eq!((ranges, compared), (dry.ranges, 5));
    assert_eq!(before - used(&pool), 5 * B);
    assert_eq!(pool.attr(dst).expect("it is there"), attr);
    // What is shared is not compared again, and changes alone.
    assert_eq!(shared(&pool, src, dst, share(0, 0, 8)), (vec![], 0));
    write(&pool, dst, 0, &[9]);
    assert_eq!(stamps(&pool, src, 8), [1, 2, 3, 0, 5, 6, 7, 8]);
    assert_eq!(stamps(&pool, dst, 8), [9, 2, 4, 0, 5, 0, 7, 8]);
    // Elsewhere in the file, and within one file.
    write(&pool, dst, 8, &[3, 0, 5, 6]);
    assert_eq!(
        shared(&pool, src, dst, share(2, 8, 9)),
        (vec![(0, 1), (2, 2)], 3)
    );
    assert_eq!(shared(&pool, dst, dst, share(4, 10, 1)), (vec![], 0));
    write(&pool, dst, 10, &[5]);
    assert_eq!(shared(&pool, dst, dst, share(4, 10, 1)), (vec![(0, 1)], 1));
    assert_eq!(stamps(&pool, dst, 12), [9, 2, 4, 0, 5, 0, 7, 8, 3, 0, 5, 6]);
    pool.close().expect("the device is sound");
}

/// Two blocks that differ and have the same checksum: by the polynomial of CRC-32C, wherever it
/// is added.
fn colliding() -> [[u8; BLOCK_SIZE]; 2] {
    let one = [7; BLOCK_SIZE];
    let mut other = one;
    let polynomial: u64 = 0x1_1edc_6f41;
    for bit in 0..33 {
        // The highest power comes first, the lowest bit of each byte is the first.
        if polynomial >> (32 - bit) & 1 == 1 {
            other[100 + bit / 8] ^= 1 << (bit % 8);
        }
    }
    assert!(one != other);
    assert_eq!(crc32c(&one), crc32c(&other));
    [one, other]
}

#[test]
fn bytes_decide_and_not_checksums() {
    let (_device, pool) = new_pool();
    let (src, dst) = (file(&pool, "src"), file(&pool, "dst"));
    let [one, other] = colliding();
    for (ino, bytes) in [(src, one), (dst, other)] {
        let wrote = pool.write(ino, 0, &bytes, Time::default());
        wrote.expect("there is room");
    }
    assert_eq!(shared(&pool, src, dst, share(0, 0, 1)), (vec![], 1));
    let mut bytes = Vec::new();
    let read = pool.read(dst, 0, BLOCK_SIZE, &mut bytes);
    read.expect("the device is sound");
    assert!(bytes == other);
}

/// Compares, lets `meanwhile` do something, and shares.
fn meet(meanwhile: impl FnOnce(&Pool, Ino, Ino)) -> (Vec<(u64, u64)>, Vec<u8>, Vec<u8>) {
    let (device, pool) = new_pool();
    let (src, dst) = (file(&pool, "src"), file(&pool, "dst"));
    write(&pool, src, 0, &[1, 2, 3, 4]);
    write(&pool, dst, 0, &[1, 2, 3, 4]);
    pool.checkpoint().expect("the device is sound");
    let (step, mut equal) = (share(0, 0, 4), Equal::default());
    let pin = pool.readers.pin();
    let pairs = pool.compare(src, dst, &step, &mut equal);
    let pairs = pairs.expect("the device is sound");
    assert_eq!(pairs.len(), 4);
    meanwhile(&pool, src, dst);
    let (from, to) = (stamps(&pool, src, 4), stamps(&pool, dst, 4));
    let done = pool.share_pairs((src, dst), &step, 0, pairs, &mut equal);
    assert_eq!(done.expect("there is room"), Attempt::Done(()));
    drop(pin);
    assert_eq!((stamps(&pool, src, 4), stamps(&pool, dst, 4)), (from, to));
    pool.sync().expect("the device is sound");
    let crashed = Arc::new(device.crash(1));
    let left = Pool::open(crashed, None, &OpenOptions::default()).expect("it opens");
    let both = (stamps(&left, src, 4), stamps(&left, dst, 4));
    assert_eq!(both, (stamps(&pool, src, 4), stamps(&pool, dst, 4)));
    (equal.ranges, both.0, both.1)
}

#[test]
fn what_is_written_between_comparing_and_sharing_stays() {
    let (ranges, src, dst) = meet(|_, _, _| {});
    assert_eq!(
        (ranges, src, dst),
        (vec![(0, 4)], vec![1, 2, 3, 4], vec![1, 2, 3, 4])
    );
    // Staged, and with a place of its own; in either file.
    for destage in [false, true] {
        for in_src in [false, true] {
            let (ranges, src, dst) = meet(|pool, src, dst| {
                let ino = if in_src { src } else { dst };
                write(pool, ino, 1, &[9]);
                if destage {
                    pool.destage_all().expect("the device is sound");
                }
            });
            assert_eq!(ranges, [(0, 1), (2, 2)]);
            let expected = [vec![1, 9, 3, 4], vec![1, 2, 3, 4]];
            let (changed, other) = if in_src { (src, dst) } else { (dst, src) };
            assert_eq!([changed, other], expected);
        }
    }
    // Holes and shorter files.
    let (ranges, _, dst) = meet(|pool, _, dst| {
        let punched = pool.punch(dst, B, B, Time::default());
        punched.expect("always works");
    });
    assert_eq!((ranges, dst), (vec![(0, 1), (2, 2)], vec![1, 0, 3, 4]));
    let (ranges, _, dst) = meet(|pool, src, dst| {
        for (ino, size) in [(src, 3 * B), (dst, B), (src, 4 * B), (dst, 4 * B)] {
            let cut = pool.truncate(ino, size, Time::default());
            cut.expect("always works");
        }
    });
    assert_eq!((ranges, dst), (vec![(0, 1)], vec![1, 0, 0, 0]));
    // The same bytes in another place were not compared.
    let (ranges, ..) = meet(|pool, src, _| write(pool, src, 2, &[3]));
    assert_eq!(ranges, [(0, 2), (3, 1)]);
}

#[test]
fn what_waits_for_its_place_is_shared_once_it_has_one() {
    let (device, pool) = new_pool();
    let (src, dst) = (file(&pool, "src"), file(&pool, "dst"));
    write(&pool, src, 0, &[1, 2, 3]);
    write(&pool, dst, 0, &[1, 2, 3]);
    assert_eq!(shared(&pool, src, dst, share(0, 0, 3)), (vec![(0, 3)], 3));
    assert_eq!(places(&pool, src), places(&pool, dst));
    pool.sync().expect("the device is sound");
    let crashed = Arc::new(device.crash(1));
    let left = Pool::open(crashed, None, &OpenOptions::default()).expect("it opens");
    assert_eq!(places(&left, src), places(&left, dst));
    assert_eq!(stamps(&left, dst, 3), [1, 2, 3]);
}

#[test]
fn long_ranges_are_shared_in_steps() {
    let (_device, pool) = new_pool();
    let (src, dst) = (file(&pool, "src"), file(&pool, "dst"));
    let all: Vec<u8> = (0..STEP_BLOCKS * 2 + 44)
        .map(|i| (i % 250) as u8 + 1)
        .collect();
    write(&pool, src, 0, &all);
    write(&pool, dst, 0, &all);
    write(&pool, dst, STEP_BLOCKS - 1, &[255]);
    let before = used(&pool);
    let (ranges, compared) = shared(&pool, src, dst, share(0, 0, 1000));
    let count = all.len() as u64;
    assert_eq!(
        ranges,
        [(0, STEP_BLOCKS - 1), (STEP_BLOCKS, count - STEP_BLOCKS)]
    );
    assert_eq!(compared, count - 1);
    assert!(before - used(&pool) >= (count - 1) * B);
}

#[test]
fn places_come_by_pages_with_their_checksums() {
    let (_device, pool) = new_pool();
    let ino = file(&pool, "file");
    write(&pool, ino, 0, &[1, 2, 0, 4, 5, 6]);
    let all = pool.places(ino, (0, 99), 9, Some(99));
    let all = all.expect("the device is sound");
    assert_eq!(all.next, 99);
    let runs: Vec<_> = all.runs.iter().map(|run| (run.at, run.count)).collect();
    assert_eq!(runs, [(0, 2), (3, 3)]);
    let sum = |stamp: u8| crc32c(&[stamp; BLOCK_SIZE]);
    assert_eq!(all.sums, [1, 2, 4, 5, 6].map(sum));
    let page = pool.places(ino, (0, 6), 1, None);
    let page = page.expect("the device is sound");
    assert_eq!((page.runs.len(), page.sums.len(), page.next), (1, 0, 3));
    let page = pool.places(ino, (1, 6), 9, Some(3));
    let page = page.expect("the device is sound");
    assert_eq!((page.sums, page.next), ([2, 4, 5].map(sum).to_vec(), 5));
}

#[test]
fn ranges_that_make_no_sense_are_refused() {
    let (_device, pool) = new_pool();
    let ino = file(&pool, "file");
    write(&pool, ino, 0, &[1, 1]);
    for range in [share(u64::MAX, 0, 2), share(0, u64::MAX, 2), share(0, 1, 2)] {
        let refused = pool.share_equal(ino, ino, &range, false);
        assert_eq!(
            refused.expect_err("it makes no sense").kind(),
            Kind::Invalid
        );
    }
    assert_eq!(shared(&pool, ino, ino, share(5, 900, 7)), (vec![], 0));
}

/// Takes the lock of the stage at each read: builds with assertions refuse that under it.
#[derive(Debug)]
struct Staged {
    device: SimDevice,
    pool: OnceLock<Weak<Pool>>,
    reads: AtomicU64,
}

impl BlockDevice for Staged {
    fn len(&self) -> u64 {
        self.device.len()
    }
    fn read_at(&self, addr: u64, buf: &mut [u8]) -> std::io::Result<()> {
        if let Some(pool) = self.pool.get().and_then(Weak::upgrade) {
            drop(pool.stage.lock());
            self.reads.fetch_add(1, Ordering::Relaxed);
        }
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
fn nothing_is_read_of_the_device_under_the_lock_of_the_stage() {
    let (device, pool) = new_pool();
    let (src, dst) = (file(&pool, "src"), file(&pool, "dst"));
    write(&pool, src, 0, &[1, 2, 3]);
    write(&pool, dst, 0, &[1, 2, 4]);
    pool.close().expect("the device is sound");
    let reads_of = |look: &dyn Fn(&Pool)| {
        let device = Arc::new(Staged {
            device: device.fork(1),
            pool: OnceLock::new(),
            reads: AtomicU64::new(0),
        });
        let options = OpenOptions {
            read_only: true,
            cache_size: 4 * MIB,
        };
        let pool = Pool::open(device.clone(), None, &options).expect("it opens");
        device.pool.get_or_init(|| Arc::downgrade(&pool));
        look(&pool);
        device.reads.load(Ordering::Relaxed)
    };
    let compared = reads_of(&|pool| {
        let mut equal = Equal::default();
        let pairs = pool.compare(src, dst, &share(0, 0, 3), &mut equal);
        assert_eq!(pairs.expect("the device is sound").len(), 2);
    });
    let placed = reads_of(&|pool| assert_eq!(places(pool, src).len(), 3));
    assert!(compared > 0 && placed > 0, "{compared} {placed}");
}
