//! A repair and the journal behind it: what is replayed onto what is left, and from which
//! superblock it goes on.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::crash::{Geometry, TINY, new_pool};
use common::history::open;
use common::image::{self, page, put};

use nodupe::device::{BlockDevice, SimDevice};
use nodupe::engine::{Action, CheckOptions, Finding, NewNode, OpenOptions, Pool, XattrMode};
use nodupe::error::Kind;
use nodupe::ondisk::node::NODE_MAGIC;
use nodupe::ondisk::superblock::{FLAG_CLEAN, FLAG_REPAIRED, SLOTS, Superblock};
use nodupe::units::{Ino, Time};

const B: u64 = 4096;
/// A new file.
const NODE: NewNode<'static> = NewNode::regular(0o600);

fn findings(device: &SimDevice) -> Vec<Finding> {
    let found = Pool::check(device, None, &mut |_, _| {});
    found.expect("the pool can be checked")
}

/// The pool that a repair leaves which lost a file, with much in the journal before the record
/// about that file: `values` of 2000 bytes, so many more changed nodes than a small cache may
/// gather.
fn long_journal_behind_a_repair(values: u64) -> nodupe::error::Result<SimDevice> {
    const MIB: u64 = 1024 * 1024;
    let geometry = Geometry {
        pool_size: 128 * MIB,
        journal_size: 48 * MIB,
        cache_size: 256 * MIB,
    };
    let (device, pool) = new_pool(&geometry, 1).expect("a sound device");
    let now = Time::default();
    let kept = pool.create_node(Ino::ROOT, b"kept", &NODE, now)?;
    pool.checkpoint()?;
    let lost = pool.create_node(Ino::ROOT, b"lost", &NODE, now)?;
    pool.checkpoint()?;
    let value = vec![7; 2000];
    for index in 0..values {
        let name = format!("user.{index}").into_bytes();
        pool.set_xattr(kept.ino, &name, &value, XattrMode::Set, now)?;
        if index % 100 == 99 {
            pool.sync()?;
        }
    }
    for index in 0..2 {
        let name = format!("user.{index}").into_bytes();
        pool.set_xattr(lost.ino, &name, b"of no use", XattrMode::Set, now)?;
    }
    pool.sync()?;
    let image = device.crash_none();
    // The trees of before the file, with the journal of after it.
    let (slot, newest) = image::newest(&image);
    let mut forged = Superblock::decode(&page(&image, 1 - slot))?;
    assert_eq!(forged.generation + 1, newest.generation);
    forged.generation = newest.generation + 1;
    forged.journal_seq = newest.journal_seq;
    forged.journal_pos = newest.journal_pos;
    forged.flags = forged.flags & !FLAG_CLEAN | FLAG_REPAIRED;
    put(&image, forged.generation % SLOTS, &forged.encode()[..]);
    Ok(image)
}

#[test]
fn a_checkpoint_in_the_middle_of_replay_forgets_no_repair() {
    let device = Arc::new(long_journal_behind_a_repair(3000).expect("a sound device"));
    let (_, before) = image::newest(&device);
    let options = OpenOptions {
        read_only: false,
        cache_size: TINY.cache_size,
    };
    let pool = Pool::open(device.clone(), None, &options).expect("the lost file is left out");
    let image = Arc::new(device.crash_none());
    let (_, after) = image::newest(&image);
    assert!(after.generation > before.generation, "no checkpoint so far");
    assert_ne!(after.flags & FLAG_REPAIRED, 0);
    let again = Pool::open(image, None, &options).expect("so it is after a crash");
    for pool in [pool, again] {
        let kept = pool.lookup(Ino::ROOT, b"kept").expect("it is there");
        for index in 0..3000 {
            let name = format!("user.{index}").into_bytes();
            let value = pool.xattr(kept.ino, &name).expect("it was synced");
            assert_eq!(value, [7; 2000]);
        }
        pool.close().expect("a sound device");
    }
    let (_, closed) = image::newest(&device);
    assert_eq!(closed.flags & FLAG_REPAIRED, 0);
    assert!(findings(&device).is_empty());
}

/// A device whose tree nodes read as garbage from one write of a superblock slot to the next one,
/// and that sees whether superblocks get older.
#[derive(Debug)]
struct Spoilt {
    device: Arc<SimDevice>,
    /// Writes of slots up to the one that spoils it.
    left: AtomicU64,
    newest: AtomicU64,
}

impl BlockDevice for Spoilt {
    fn len(&self) -> u64 {
        self.device.len()
    }
    fn read_at(&self, addr: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.device.read_at(addr, buf)?;
        if self.left.load(Ordering::SeqCst) == 1 && buf.starts_with(&NODE_MAGIC.to_le_bytes()) {
            buf[100..].fill(0xaa);
        }
        Ok(())
    }
    fn write_at(&self, addr: u64, data: &[u8]) -> std::io::Result<()> {
        if addr < SLOTS * B {
            let spoil = |left: u64| Some(left.saturating_sub(1));
            let (set, get) = (Ordering::SeqCst, Ordering::SeqCst);
            self.left
                .fetch_update(set, get, spoil)
                .expect("always some");
            let written =
                Superblock::decode(data.try_into().expect("a page")).expect("one of ours");
            let before = self.newest.fetch_max(written.generation, Ordering::SeqCst);
            assert!(written.generation >= before, "back to an older superblock");
        }
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
fn a_repair_goes_on_from_the_newest_superblock() {
    // The replay behind a repair writes checkpoints. Wherever it then meets what it cannot go on
    // with, it must not go back to a state whose blocks have been given away.
    let image = long_journal_behind_a_repair(10_000).expect("a sound device");
    let mut seen = 0;
    for spoilt_at in 2..8 {
        let device = Arc::new(image.fork(0));
        // Something to repair.
        let (slot, _) = image::newest(&device);
        device.flip((1 - slot) * B + 99, 1);
        let spoilt = Arc::new(Spoilt {
            device: device.clone(),
            left: AtomicU64::new(spoilt_at),
            newest: AtomicU64::new(0),
        });
        let done = Pool::repair(
            spoilt.clone(),
            None,
            &CheckOptions::default(),
            Time::default(),
            &mut |_, _| true,
            &mut |_, _| {},
        );
        match done {
            // What the journal says was dropped as a whole.
            Ok(done) => {
                let dropped = |action: &Action| action.message.contains("left out 1 records");
                seen += done.actions.iter().filter(|action| dropped(action)).count();
            }
            Err(error) => assert_eq!(error.kind(), Kind::Corrupt, "{spoilt_at}: {error}"),
        }
        let found = findings(&device.crash_none());
        assert!(found.is_empty(), "{spoilt_at}: {found:?}");
        open(&device, TINY.cache_size).expect("the pool is whole");
    }
    assert!(seen > 0, "no replay was spoilt");
}
