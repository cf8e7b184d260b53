//! A pool with golden images, clones and other files; what is in them; and where.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use nodupe::device::{BlockDevice, SimDevice, SplitMix64};
use nodupe::engine::{FileKind, NewNode, OpenOptions, Pool, Scrub, ScrubOptions, ScrubState};
use nodupe::error::Kind;
use nodupe::units::{Ino, Time};

use crate::common::generate::random_bytes;
use crate::common::history::{create_options, open};

pub(crate) const B: u64 = 4096;
pub(crate) const MIB: u64 = 1024 * 1024;
pub(crate) const CACHE: u64 = 16 * MIB;
pub(crate) const JOURNAL: u64 = MIB;
/// Blocks that no data is in: superblocks and ring.
pub(crate) const HEAD: u64 = 16 + JOURNAL / B;

pub(crate) fn now() -> Time {
    Time::default()
}

pub(crate) fn number(name: &str, default: u64) -> u64 {
    let value = std::env::var(name).ok();
    value.map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|error| panic!("{name}={text}: {error}"))
    })
}

/// Ranges (offset, length) by path.
pub(crate) type Damage = BTreeMap<String, Vec<(u64, u64)>>;

/// A pool with files, and what they hold.
pub(crate) struct World {
    pub(crate) device: Arc<SimDevice>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) files: BTreeMap<String, Vec<u8>>,
}

pub(crate) fn create(pool: &Pool, dir: Ino, name: &str, kind: FileKind) -> Ino {
    let node = NewNode {
        kind,
        mode: 0o700,
        uid: 0,
        gid: 0,
        rdev: 0,
        target: b"",
    };
    let made = pool.create_node(dir, name.as_bytes(), &node, now());
    made.expect("there is room").ino
}

pub(crate) fn find(pool: &Pool, path: &str) -> Ino {
    let names = path.split('/').filter(|name| !name.is_empty());
    names.fold(Ino::ROOT, |dir, name| {
        let found = pool.lookup(dir, name.as_bytes());
        found.unwrap_or_else(|error| panic!("{path}: {error}")).ino
    })
}

impl World {
    pub(crate) fn empty(seed: u64, size: u64) -> Self {
        let device = Arc::new(SimDevice::new(size, seed));
        let options = create_options(seed, JOURNAL);
        Pool::create(device.clone(), None, &options).expect("a pool is made");
        let pool = open(&device, CACHE).expect("a new pool opens");
        Self {
            device,
            pool,
            files: BTreeMap::new(),
        }
    }

    pub(crate) fn write(&mut self, path: &str, offset: usize, data: &[u8]) {
        let (dir, name) = path.rsplit_once('/').expect("paths are absolute");
        let dir = find(&self.pool, dir);
        let ino = match self.pool.lookup(dir, name.as_bytes()) {
            Ok(attr) => attr.ino,
            Err(_) => create(&self.pool, dir, name, FileKind::Regular),
        };
        let done = self.pool.write(ino, offset as u64, data, now());
        done.expect("there is room");
        let bytes = self.files.entry(path.to_owned()).or_default();
        bytes.resize(bytes.len().max(offset + data.len()), 0);
        bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    pub(crate) fn clone_file(&mut self, from: &str, to: &str) {
        let (dir, name) = to.rsplit_once('/').expect("paths are absolute");
        let ino = create(&self.pool, find(&self.pool, dir), name, FileKind::Regular);
        let done = self.pool.clone_file(find(&self.pool, from), ino, now());
        done.expect("there is room");
        self.files.insert(to.to_owned(), self.files[from].clone());
    }

    /// Golden images, clones with changes of their own, a hard link, small and odd files.
    pub(crate) fn furnished(seed: u64) -> Self {
        let mut world = Self::empty(seed, 40 * MIB);
        let rng = &mut SplitMix64::new(seed);
        create(&world.pool, Ino::ROOT, "vms", FileKind::Directory);
        let vms = find(&world.pool, "vms");
        create(&world.pool, vms, "deep", FileKind::Directory);
        world.write("/gold", 0, &random_bytes(rng, 400 * 4096));
        // Scattered, so that its map has leaves.
        for i in 0..300 {
            world.write("/scattered", i * 2 * 4096, &random_bytes(rng, 4096));
        }
        world.write("/vms/odd", 0, &random_bytes(rng, 10_001));
        for i in 0..8 {
            let source = ["/gold", "/scattered"][i % 2];
            let path = format!("/vms/deep/clone-{i}");
            world.clone_file(source, &path);
            for _ in 0..i * 5 {
                let at = rng.index(390) * 4096;
                let len = (rng.index(3) + 1) * 4096;
                world.write(&path, at, &random_bytes(rng, len));
            }
        }
        world.clone_file("/vms/deep/clone-7", "/vms/grandchild");
        let linked = find(&world.pool, "gold");
        let done = world.pool.link(linked, vms, b"second name", now());
        done.expect("there is room");
        let gold = world.files["/gold"].clone();
        world.files.insert("/vms/second name".into(), gold);
        world
    }

    /// Closes; what is on the device then.
    pub(crate) fn close(&self) {
        self.pool.close().expect("the device is sound");
    }

    /// Where each block of the files is: address in the pool to (path, offset).
    pub(crate) fn places(&self) -> BTreeMap<u64, Vec<(String, u64)>> {
        let mut contents: HashMap<Vec<u8>, Vec<(String, u64)>> = HashMap::new();
        for (path, bytes) in &self.files {
            for (i, block) in (0..).zip(bytes.chunks(B as usize)) {
                let mut block = block.to_vec();
                block.resize(B as usize, 0);
                if block.iter().any(|byte| *byte != 0) {
                    let place = (path.clone(), i * B);
                    contents.entry(block).or_default().push(place);
                }
            }
        }
        let mut places = BTreeMap::new();
        let mut block = vec![0; B as usize];
        for addr in (HEAD * B..self.device.len()).step_by(B as usize) {
            let read = self.device.read_at(addr, &mut block);
            read.expect("a sound device reads");
            if let Some(found) = contents.get(&block) {
                places.insert(addr, found.clone());
            }
        }
        places
    }

    /// What is damaged if these addresses are.
    pub(crate) fn expected(
        &self,
        places: &BTreeMap<u64, Vec<(String, u64)>>,
        hit: &BTreeSet<u64>,
    ) -> Damage {
        let mut damage = Damage::new();
        for (path, offset) in hit.iter().flat_map(|addr| &places[addr]) {
            damage.entry(path.clone()).or_default().push((*offset, B));
        }
        for (path, ranges) in &mut damage {
            *ranges = joined(ranges, self.files[path].len() as u64);
        }
        damage
    }

    /// Reads everything in single blocks: what gives an error. Panics at a wrong byte.
    pub(crate) fn unreadable(&self, pool: &Pool) -> Damage {
        let mut damage = Damage::new();
        for (path, bytes) in &self.files {
            let ino = find(pool, path);
            let mut ranges = Vec::new();
            for (i, wanted) in (0..).zip(bytes.chunks(B as usize)) {
                let mut found = Vec::new();
                match pool.read(ino, i * B, B as usize, &mut found) {
                    Ok(()) => assert!(found == wanted, "{path}: wrong bytes in block {i}"),
                    Err(error) if error.kind() == Kind::Corrupt => ranges.push((i * B, B)),
                    Err(error) => panic!("{path}: {error}"),
                }
            }
            if !ranges.is_empty() {
                damage.insert(path.clone(), joined(&ranges, bytes.len() as u64));
            }
        }
        damage
    }
}

/// Ranges in order, neighbours as one, cut at `size`.
pub(crate) fn joined(ranges: &[(u64, u64)], size: u64) -> Vec<(u64, u64)> {
    let blocks: BTreeSet<u64> = ranges
        .iter()
        .flat_map(|(offset, len)| (*offset..offset + len).step_by(B as usize))
        .collect();
    let mut all: Vec<(u64, u64)> = Vec::new();
    for at in blocks {
        let len = B.min(size - at);
        match all.last_mut() {
            Some(last) if last.0 + last.1 == at => last.1 += len,
            _ => all.push((at, len)),
        }
    }
    all
}

/// What a scrub named.
pub(crate) fn named(scrub: &Scrub) -> Damage {
    let files = scrub.files(0, usize::MAX);
    let status = scrub.status();
    assert_eq!(status.files, files.len() as u64);
    let mut damage = Damage::new();
    for file in files {
        assert!(!file.more, "{file:?}");
        for path in &file.paths {
            let path = String::from_utf8_lossy(path).into_owned();
            damage.insert(path, file.ranges.clone());
        }
    }
    damage
}

/// Scrubs to the end.
pub(crate) fn scrub(pool: &Pool) -> Scrub {
    let scrub = Scrub::new(ScrubOptions::default());
    pool.scrub(&scrub).expect("the device can be read");
    assert_eq!(scrub.status().state, ScrubState::Finished);
    scrub
}

pub(crate) fn assert_clean(scrub: &Scrub) {
    let others = scrub.others(0, 10);
    assert!(scrub.status().is_clean(), "{:?} {others:?}", named(scrub));
}

pub(crate) fn open_to_read(device: &Arc<SimDevice>) -> Arc<Pool> {
    let options = OpenOptions {
        read_only: true,
        cache_size: CACHE,
    };
    Pool::open(device.clone(), None, &options).expect("the trees are sound")
}
