//! Reading in every way there is: on the thread of the caller, by threads, through `io_uring`; ahead
//! of a stream; many readers of one block.
//!
//! Where the kernel or a container forbids `io_uring`, its part says so and threads take its place,
//! as they do in a mount.

mod common;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock};

use common::generate::random_bytes;
use common::history::create_options;

use nodupe::device::{
    BlockDevice, Fault, FaultOp, FileDevice, OpenMode, ReadQueue, Repeat, SimDevice, SplitMix64,
};
use nodupe::engine::{NewNode, OpenOptions, Pool, Stream};
use nodupe::error::{Error, Kind};
use nodupe::units::{Ino, Time};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;
const BLOCK: usize = 4 * KIB;
const POOL: u64 = 64 * MIB as u64;

type Hook = Box<dyn FnOnce() + Send>;

/// A device that counts its reads, has a queue or not, and does something before a read.
struct Watched {
    inner: Arc<dyn BlockDevice>,
    queue: Option<ReadQueue>,
    gap_max: u64,
    reads: Arc<AtomicU64>,
    bytes: Arc<AtomicU64>,
    hook: Mutex<Option<Hook>>,
    /// Address of a block that cannot be read.
    bad: Arc<AtomicU64>,
    /// Where the last read of the thread of a caller was.
    last: AtomicU64,
    /// Whoever holds it makes the reads of the queue wait.
    gate: Arc<Mutex<()>>,
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watched")
    }
}

fn check_bad(bad: &AtomicU64, addr: u64, len: usize) -> io::Result<()> {
    if (addr..addr + len as u64).contains(&bad.load(Ordering::SeqCst)) {
        return Err(io::Error::other("a block cannot be read"));
    }
    Ok(())
}

impl Watched {
    fn new(inner: Arc<dyn BlockDevice>, with_queue: bool) -> Arc<Self> {
        let gap_max = inner.gap_max();
        Arc::new(Self::with_gaps(inner, with_queue, gap_max))
    }

    fn with_gaps(inner: Arc<dyn BlockDevice>, with_queue: bool, gap_max: u64) -> Self {
        let (reads, bytes) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let bad = Arc::new(AtomicU64::new(u64::MAX));
        let gate = Arc::<Mutex<()>>::default();
        let queue = with_queue.then(|| {
            let (bad, gate) = (bad.clone(), gate.clone());
            let (inner, reads, bytes) = (inner.clone(), reads.clone(), bytes.clone());
            let read = move |addr, buf: &mut [u8]| {
                drop(gate.lock().expect("nobody panics inside"));
                reads.fetch_add(1, Ordering::SeqCst);
                bytes.fetch_add(buf.len() as u64, Ordering::SeqCst);
                check_bad(&bad, addr, buf.len())?;
                inner.read_at(addr, buf)
            };
            ReadQueue::threads(read).expect("threads can be made")
        });
        Self {
            gap_max,
            inner,
            queue,
            reads,
            bytes,
            hook: Mutex::new(None),
            bad,
            last: AtomicU64::new(0),
            gate,
        }
    }

    fn counts(&self) -> (u64, u64) {
        (
            self.reads.load(Ordering::SeqCst),
            self.bytes.load(Ordering::SeqCst),
        )
    }
}

impl BlockDevice for Watched {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_at(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        let hook = self.hook.lock().expect("nobody panics inside").take();
        if let Some(hook) = hook {
            hook();
        }
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.bytes.fetch_add(buf.len() as u64, Ordering::SeqCst);
        self.last.store(addr, Ordering::SeqCst);
        check_bad(&self.bad, addr, buf.len())?;
        self.inner.read_at(addr, buf)
    }

    fn queue(&self) -> Option<&ReadQueue> {
        self.queue.as_ref()
    }

    fn gap_max(&self) -> u64 {
        self.gap_max
    }

    fn write_at(&self, addr: u64, data: &[u8]) -> io::Result<()> {
        self.inner.write_at(addr, data)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn discard(&self, addr: u64, len: u64) -> io::Result<()> {
        self.inner.discard(addr, len)
    }
}

fn open(device: Arc<dyn BlockDevice>, cache_size: usize) -> Arc<Pool> {
    let options = OpenOptions {
        read_only: false,
        cache_size: cache_size as u64,
    };
    Pool::open(device, None, &options).expect("a sound pool opens")
}

fn create(pool: &Pool, name: &str) -> Ino {
    let node = NewNode::regular(0o600);
    let made = pool.create_node(Ino::ROOT, name.as_bytes(), &node, Time::default());
    made.expect("there is room").ino
}

fn write(pool: &Pool, ino: Ino, at: usize, data: &[u8]) {
    let done = pool.write(ino, at as u64, data, Time::default());
    done.expect("there is room");
}

/// Fills the pool of `device`: a golden file, and a clone of it that has aged, with holes.
fn fill(device: &Arc<dyn BlockDevice>) -> (Ino, Vec<u8>, Ino, Vec<u8>) {
    let options = create_options(1, MIB as u64);
    Pool::create(device.clone(), None, &options).expect("a pool is made");
    let pool = open(device.clone(), 8 * MIB);
    let mut rng = SplitMix64::new(7);
    let gold = create(&pool, "gold");
    let gold_bytes = random_bytes(&mut rng, 4 * MIB + 777);
    write(&pool, gold, 0, &gold_bytes);
    let aged = create(&pool, "aged");
    let cloned = pool.clone_file(gold, aged, Time::default());
    cloned.expect("there is room");
    let mut bytes = gold_bytes.clone();
    for _ in 0..600 {
        let at = rng.below(1024) as usize * BLOCK;
        let data = random_bytes(&mut rng, BLOCK);
        write(&pool, aged, at, &data);
        bytes[at..at + BLOCK].copy_from_slice(&data);
    }
    for i in 0..8 {
        let (at, len) = (i * 500 * KIB + 100, 20 * KIB);
        let punched = pool.punch(aged, at as u64, len as u64, Time::default());
        punched.expect("there is room");
        bytes[at..at + len].fill(0);
    }
    pool.close().expect("the device is sound");
    (gold, gold_bytes, aged, bytes)
}

/// Many reads at once of every size and alignment, by readers in order and others.
fn read_all_over(pool: &Pool, ino: Ino, bytes: &[u8], seed: u64) {
    let mut rng = SplitMix64::new(seed);
    let (tell, told) = channel();
    let stream = Stream::default();
    let mut next = 0;
    for i in 0..400 {
        let in_order = i % 2 == 0;
        let len = 1 + rng.index([BLOCK, 64 * KIB, MIB + 9000][i % 3]);
        let at = if in_order {
            next
        } else {
            rng.index(bytes.len() + BLOCK)
        };
        if in_order {
            next = if at > bytes.len() { 0 } else { at + len };
        }
        let tell = tell.clone();
        let stream = in_order.then_some(&stream);
        pool.read_with(ino, at as u64, len, stream, move |read| {
            let read = read.map(|bytes| bytes.to_vec());
            tell.send((at, len, read)).expect("somebody listens");
        });
    }
    drop(tell);
    let mut seen = 0;
    for (at, len, read) in told {
        let from = at.min(bytes.len());
        let want = &bytes[from..(at + len).min(bytes.len()).max(from)];
        assert!(
            read.expect("the device is sound") == want,
            "at={at} len={len}"
        );
        seen += 1;
    }
    assert_eq!(seen, 400, "each read is answered once");
    let mut whole = Vec::new();
    pool.read(ino, 0, bytes.len() + MIB, &mut whole)
        .expect("the device is sound");
    assert!(whole == bytes);
}

#[test]
fn every_way_of_reading_gives_the_same_bytes() {
    let sim: Arc<dyn BlockDevice> = Arc::new(SimDevice::new(POOL, 1));
    let (gold, gold_bytes, aged, aged_bytes) = fill(&sim);
    for with_queue in [false, true] {
        for cache_size in [MIB / 8, 64 * MIB] {
            let pool = open(Watched::new(sim.clone(), with_queue), cache_size);
            read_all_over(&pool, aged, &aged_bytes, 1);
            read_all_over(&pool, gold, &gold_bytes, 2);
            pool.close().expect("the device is sound");
        }
    }
}

#[test]
fn a_file_of_the_host_is_read_through_its_queue() {
    let folder = tempfile::tempdir().expect("a folder for the test");
    let path = folder.path().join("pool");
    let device = FileDevice::create(&path, Some(POOL), false).expect("a file can be made");
    let (gold, gold_bytes, aged, aged_bytes) = fill(&(Arc::new(device) as Arc<dyn BlockDevice>));
    for cache_size in [MIB / 8, 64 * MIB] {
        // That it can be opened again shows that nothing is left of the reads before.
        let device = FileDevice::open(&path, OpenMode::ReadWrite).expect("it is there and free");
        match device.queue() {
            Some(queue) if queue.is_ring() => {}
            Some(_) => eprintln!("io_uring is forbidden here: threads read instead"),
            None => panic!("a file has a queue"),
        }
        let pool = open(Arc::new(device), cache_size);
        read_all_over(&pool, aged, &aged_bytes, 3);
        read_all_over(&pool, gold, &gold_bytes, 4);
        pool.close().expect("the device is sound");
    }
}

/// A pool with a golden file and 32 clones of it, whose nodes are in memory and whose data is not.
struct Storm {
    sim: Arc<SimDevice>,
    watched: Arc<Watched>,
    pool: Arc<Pool>,
    clones: Vec<Ino>,
    bytes: Vec<u8>,
}

fn storm() -> Storm {
    let sim = Arc::new(SimDevice::new(POOL, 1));
    let device: Arc<dyn BlockDevice> = sim.clone();
    let (gold, gold_bytes, ..) = fill(&device);
    let watched = Watched::new(device, false);
    let pool = open(watched.clone(), 64 * MIB);
    let mut clones = Vec::new();
    for i in 0..32 {
        let clone = create(&pool, &format!("clone{i}"));
        pool.clone_file(gold, clone, Time::default())
            .expect("there is room");
        // A large read leaves the nodes in memory, and not the data.
        pool.read(clone, 0, gold_bytes.len(), &mut Vec::new())
            .expect("the device is sound");
        clones.push(clone);
    }
    Storm {
        sim,
        watched,
        pool,
        clones,
        bytes: gold_bytes,
    }
}

/// The first clone reads a range, and while the device works on it all others want the same.
fn read_at_once(storm: &Storm, at: usize, len: usize) -> Vec<Result<Vec<u8>, Error>> {
    let (tell, told) = channel();
    let read = move |pool: &Pool, clone: Ino| {
        let tell = tell.clone();
        pool.read_with(clone, at as u64, len, None, move |read| {
            tell.send(read.map(|bytes| bytes.to_vec()))
                .expect("somebody listens");
        });
    };
    let (others, pool) = (storm.clones[1..].to_vec(), storm.pool.clone());
    let (mine, theirs) = (read.clone(), read);
    *storm.watched.hook.lock().expect("nobody panics inside") = Some(Box::new(move || {
        for clone in others {
            theirs(&pool, clone);
        }
    }));
    mine(&storm.pool, storm.clones[0]);
    drop(mine);
    told.iter().collect()
}

#[test]
fn readers_of_one_block_at_one_time_make_one_device_read() {
    let storm = storm();
    for (at, len) in [(MIB, BLOCK), (2 * MIB, 64 * KIB), (3 * MIB, MIB)] {
        let before = storm.watched.counts();
        let reads = read_at_once(&storm, at, len);
        assert_eq!(reads.len(), 32);
        for read in reads {
            assert!(read.expect("the device is sound") == storm.bytes[at..at + len]);
        }
        let after = storm.watched.counts();
        assert_eq!(after.1 - before.1, len as u64, "read once, at {at}");
        assert_eq!(after.0 - before.0, 1, "in one piece, at {at}");
    }
}

#[test]
fn damage_reaches_nobody_who_waits_for_the_block() {
    let storm = storm();
    for (fault, at) in [(Fault::FlipBit, MIB), (Fault::Io, 2 * MIB)] {
        storm.sim.fail(FaultOp::Read, 1, fault, Repeat::Once);
        let reads = read_at_once(&storm, at, BLOCK);
        assert_eq!(reads.len(), 32);
        for read in reads {
            let kind = read.expect_err("it was not what had been written").kind();
            assert!(matches!(kind, Kind::Corrupt | Kind::Io), "{kind:?}");
        }
        // What was wrong once is not remembered.
        let mut again = Vec::new();
        let (pool, clone) = (&storm.pool, storm.clones[5]);
        pool.read(clone, at as u64, BLOCK, &mut again)
            .expect("the device is sound again");
        assert!(again == storm.bytes[at..at + BLOCK]);
    }
}

/// Where in the pool of `sim` a block of a file lies.
fn place_of(sim: &Arc<dyn BlockDevice>, ino: Ino, block: usize) -> u64 {
    let watched = Watched::new(sim.clone(), false);
    let pool = open(watched.clone(), MIB);
    pool.read(ino, (block * BLOCK) as u64, BLOCK, &mut Vec::new())
        .expect("the device is sound");
    watched.last.load(Ordering::SeqCst)
}

#[test]
fn a_bad_block_in_a_gap_or_beside_is_an_error_of_nobody_else() {
    let sim: Arc<dyn BlockDevice> = Arc::new(SimDevice::new(POOL, 1));
    let (gold, bytes, ..) = fill(&sim);
    let holey = {
        let pool = open(sim.clone(), MIB);
        let holey = create(&pool, "holey");
        pool.clone_file(gold, holey, Time::default())
            .expect("there is room");
        pool.punch(holey, 40 * BLOCK as u64, BLOCK as u64, Time::default())
            .expect("there is room");
        pool.close().expect("the device is sound");
        holey
    };
    let place = place_of(&sim, gold, 40);
    for with_queue in [false, true] {
        let watched = Arc::new(Watched::with_gaps(sim.clone(), with_queue, 8));
        watched.bad.store(place, Ordering::SeqCst);
        let pool = open(watched.clone(), MIB);
        let read = |ino, from: usize, blocks: usize| {
            let mut read = Vec::new();
            let (at, len) = ((from * BLOCK) as u64, blocks * BLOCK);
            pool.read(ino, at, len, &mut read).map(|()| read)
        };
        // The gap is read along. Nothing of a range as long as this stays in the cache.
        let before = watched.counts();
        let got = read(holey, 0, 200).expect("all of its blocks are sound");
        assert!(watched.counts().1 - before.1 > 200 * BLOCK as u64);
        let mut want = bytes[..200 * BLOCK].to_vec();
        want[40 * BLOCK..41 * BLOCK].fill(0);
        assert!(got == want);
        let error = read(gold, 32, 16).expect_err("one of its blocks cannot be read");
        assert_eq!(error.kind(), Kind::Io);
        assert!(
            read(gold, 32, 8).expect("its blocks are sound") == bytes[32 * BLOCK..][..8 * BLOCK]
        );
        pool.close().expect("the device is sound");
    }
}

#[test]
fn a_read_merged_with_one_ahead_that_fails_gets_its_own_block() {
    let sim: Arc<dyn BlockDevice> = Arc::new(SimDevice::new(POOL, 1));
    let (gold, bytes, ..) = fill(&sim);
    let place = place_of(&sim, gold, 40);
    let watched = Watched::new(sim, true);
    watched.bad.store(place, Ordering::SeqCst);
    let pool = open(watched.clone(), 16 * MIB);
    let stream = Stream::default();
    let (tell, told) = channel();
    {
        let _closed = watched.gate.lock().expect("nobody panics inside");
        // Two requests in order, so that the blocks from the 32nd on are read ahead.
        for at in [0, 16] {
            pool.read_with(gold, at * BLOCK as u64, 16 * BLOCK, Some(&stream), |_| {});
        }
        let before = watched.counts();
        for block in 32..64 {
            let tell = tell.clone();
            pool.read_with(gold, (block * BLOCK) as u64, BLOCK, None, move |read| {
                let read = read.map(|bytes| bytes.to_vec());
                tell.send((block, read)).expect("somebody listens");
            });
        }
        assert_eq!(watched.counts(), before, "all of them are being read");
    }
    drop(tell);
    let mut seen = 0;
    for (block, read) in told {
        seen += 1;
        match read {
            Ok(read) => assert!(read == bytes[block * BLOCK..][..BLOCK], "{block}"),
            Err(error) => assert_eq!((block, error.kind()), (40, Kind::Io)),
        }
    }
    assert_eq!(seen, 32, "each read is answered once");
    pool.close().expect("the device is sound");
}

/// Reads a file in order by `step` bytes, with a stream.
fn read_in_order(pool: &Pool, ino: Ino, bytes: &[u8], step: usize) {
    let stream = Stream::default();
    for at in (0..bytes.len()).step_by(step) {
        let (tell, told) = channel();
        pool.read_with(ino, at as u64, step, Some(&stream), move |read| {
            let read = read.map(|bytes| bytes.to_vec());
            tell.send(read).expect("somebody listens");
        });
        let read = told.recv().expect("it is answered");
        let want = &bytes[at..(at + step).min(bytes.len())];
        assert!(read.expect("the device is sound") == want, "at={at}");
    }
}

#[test]
fn a_stream_is_read_in_large_pieces_once_and_not_behind_its_end() {
    let sim: Arc<dyn BlockDevice> = Arc::new(SimDevice::new(POOL, 1));
    let (gold, bytes, ..) = fill(&sim);
    for step in [BLOCK, 64 * KIB] {
        let watched = Watched::new(sim.clone(), true);
        let pool = open(watched.clone(), 64 * MIB);
        pool.read(gold, 0, 1, &mut Vec::new())
            .expect("the device is sound");
        let before = watched.counts();
        read_in_order(&pool, gold, &bytes, step);
        let after = watched.counts();
        let (reads, read) = (after.0 - before.0, after.1 - before.1);
        let most = bytes.len().next_multiple_of(BLOCK) + 64 * KIB; // and a few nodes
        assert!(read <= most as u64, "read={read} most={most}");
        assert!(reads <= 40, "reads={reads} step={step}");
        pool.close().expect("the device is sound");
    }
}

/// What a block holds: its number and its version, all over.
fn stamped(block: usize, version: u64) -> Vec<u8> {
    let stamp = [block as u64, version];
    let bytes: Vec<u8> = stamp.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.repeat(BLOCK / bytes.len())
}

/// The version of a block as it was read; it must be whole and of this block.
fn version_of(block: usize, bytes: &[u8]) -> u64 {
    let word = |i: usize| u64::from_le_bytes(bytes[i * 8..][..8].try_into().expect("eight bytes"));
    let version = word(1);
    assert!(bytes == stamped(block, version), "block {block} is a mix");
    version
}

#[test]
fn what_was_read_ahead_is_never_stale() {
    const BLOCKS: usize = 512;
    const ROUNDS: u64 = 40;
    let sim: Arc<dyn BlockDevice> = Arc::new(SimDevice::new(POOL, 1));
    Pool::create(sim.clone(), None, &create_options(1, MIB as u64)).expect("a pool is made");
    let pool = open(Watched::new(sim, true), 4 * MIB);
    pool.start().expect("threads can be made");
    let file = create(&pool, "file");
    let first: Vec<u8> = (0..BLOCKS).flat_map(|block| stamped(block, 0)).collect();
    write(&pool, file, 0, &first);
    // Versions that were acknowledged before a read began must be seen by it.
    let written: Arc<Vec<AtomicU64>> = Arc::new((0..BLOCKS).map(|_| AtomicU64::new(0)).collect());
    let done = Arc::new(OnceLock::new());
    let writer = {
        let (pool, written, done) = (pool.clone(), written.clone(), done.clone());
        std::thread::spawn(move || {
            let mut rng = SplitMix64::new(3);
            for version in 1..=ROUNDS {
                for _ in 0..24 {
                    let (at, count) = (rng.index(BLOCKS - 32), 1 + rng.index(32));
                    let bytes: Vec<u8> = (at..at + count)
                        .flat_map(|block| stamped(block, version))
                        .collect();
                    write(&pool, file, at * BLOCK, &bytes);
                    for block in &written[at..at + count] {
                        block.store(version, Ordering::SeqCst);
                    }
                }
                match version % 4 {
                    0 => pool.checkpoint().expect("the device is sound"),
                    1 => {
                        let name = format!("clone{version}");
                        let clone = create(&pool, &name);
                        pool.clone_file(file, clone, Time::default())
                            .expect("there is room");
                        let gone = pool.unlink(Ino::ROOT, name.as_bytes(), Time::default());
                        let gone = gone.expect("the name exists").ino;
                        pool.reclaim(gone).expect("deleting always works");
                    }
                    _ => {}
                }
            }
            done.set(()).expect("once");
        })
    };
    while done.get().is_none() {
        let stream = Stream::default();
        for at in (0..BLOCKS).step_by(4) {
            let before: Vec<u64> = written[at..at + 4]
                .iter()
                .map(|version| version.load(Ordering::SeqCst))
                .collect();
            let (tell, told) = channel();
            let offset = (at * BLOCK) as u64;
            pool.read_with(file, offset, 4 * BLOCK, Some(&stream), move |read| {
                tell.send(read.map(|bytes| bytes.to_vec()))
                    .expect("somebody listens");
            });
            let bytes = told.recv().expect("it is answered");
            let bytes = bytes.expect("the device is sound");
            for (i, bytes) in bytes.chunks_exact(BLOCK).enumerate() {
                let version = version_of(at + i, bytes);
                assert!(version >= before[i], "block {} is stale", at + i);
            }
        }
    }
    writer.join().expect("the writer ends well");
    pool.close().expect("the device is sound");
}

#[test]
fn a_file_cut_behind_what_was_read_ahead_reads_as_zeros_there() {
    let sim: Arc<dyn BlockDevice> = Arc::new(SimDevice::new(POOL, 1));
    let (gold, mut bytes, ..) = fill(&sim);
    let pool = open(Watched::new(sim, true), 64 * MIB);
    let stream = Stream::default();
    let read = |at: usize| {
        let (tell, told) = channel();
        pool.read_with(gold, at as u64, 64 * KIB, Some(&stream), move |read| {
            tell.send(read.map(|bytes| bytes.to_vec()))
                .expect("somebody listens");
        });
        let read = told.recv().expect("it is answered");
        read.expect("the device is sound")
    };
    for i in 0..4 {
        assert!(read(i * 64 * KIB) == bytes[i * 64 * KIB..][..64 * KIB]);
    }
    let (cut, len) = (5 * 64 * KIB + 100, bytes.len());
    for size in [cut, len] {
        pool.truncate(gold, size as u64, Time::default())
            .expect("there is room");
    }
    bytes[cut..].fill(0);
    for i in 4..16 {
        assert!(
            read(i * 64 * KIB) == bytes[i * 64 * KIB..][..64 * KIB],
            "{i}"
        );
    }
    pool.close().expect("the device is sound");
}
