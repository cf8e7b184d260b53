//! Small pools with everything in them, from which the targets start.

use std::sync::{Arc, OnceLock};

use nodupe::device::{SimDevice, SplitMix64};
use nodupe::engine::{
    CreateOptions, FileKind, NewNode, OpenOptions, Pool, RenameMode, SetAttr, XattrMode,
};
use nodupe::error::Result;
use nodupe::units::{Ino, Time};

use super::forge;

/// Bytes of caches for a pool in these tests.
pub const CACHE_SIZE: u64 = 4 * 1024 * 1024;

const MIB: u64 = 1024 * 1024;
const B: u64 = 4096;

/// A pool to begin with.
pub struct Template {
    /// What it lives on.
    pub device: SimDevice,
    /// Blocks of its nodes.
    pub nodes: Vec<u64>,
    /// Blocks of its journal batches that wait for replay.
    pub batches: Vec<u64>,
}

/// What became of a pool at the end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Closed,
    /// A checkpoint holds everything, also what is unfinished.
    Cut,
    /// The journal waits for replay.
    Journal,
}

/// The pools: one of a single allocation group, closed; one of three groups, cut off behind a
/// checkpoint; one that was cut off with a journal to replay.
pub fn templates() -> &'static [Template; 3] {
    static TEMPLATES: OnceLock<[Template; 3]> = OnceLock::new();
    TEMPLATES.get_or_init(|| {
        [(12, End::Closed), (280, End::Cut), (12, End::Journal)].map(|(mib, end)| {
            let device = furnish(mib * MIB, end).expect("a sound pool takes everything");
            Template {
                nodes: forge::nodes(&device),
                batches: forge::batches(&device),
                device,
            }
        })
    })
}

/// How pools are opened here.
#[allow(clippy::needless_update)] // options that are new must not break this
pub fn options(read_only: bool) -> OpenOptions {
    OpenOptions {
        read_only,
        cache_size: CACHE_SIZE,
        ..OpenOptions::default()
    }
}

fn create(size: u64) -> Result<Arc<SimDevice>> {
    let device = Arc::new(SimDevice::new(size, 1));
    let options = CreateOptions {
        journal_size: Some(MIB),
        uuid: *b"0123456789abcdef",
        hash_key: *b"fedcba9876543210",
        uid: 0,
        gid: 0,
        time: Time::default(),
    };
    Pool::create(device.clone(), None, &options)?;
    Ok(device)
}

fn furnish(size: u64, end: End) -> Result<SimDevice> {
    let device = create(size)?;
    let pool = Pool::open(device.clone(), None, &options(false))?;
    trees(&pool)?;
    pool.checkpoint()?;
    life(&pool)?;
    match end {
        End::Closed => pool.close()?,
        End::Cut => pool.checkpoint()?,
        End::Journal => pool.sync()?,
    }
    Ok(device.crash_none())
}

fn node(kind: FileKind, target: &[u8]) -> NewNode<'_> {
    NewNode {
        kind,
        mode: 0o755,
        uid: 1000,
        gid: 100,
        rdev: 0,
        target,
    }
}

/// Directories, fragmented files and clones of them, so that all trees have several levels.
fn trees(pool: &Pool) -> Result<()> {
    let now = Time::default();
    let mut rng = SplitMix64::new(7);
    let dir = pool.create_node(Ino::ROOT, b"large", &node(FileKind::Directory, b""), now)?;
    let file = pool.create_node(dir.ino, b"pieces", &node(FileKind::Regular, b""), now)?;
    for block in 0..260 {
        let bytes: Vec<u8> = (0..4096).map(|_| rng.below(256) as u8).collect();
        pool.write(file.ino, block * 2 * B, &bytes, now)?;
    }
    let names: Vec<_> = (0..8).map(|i| format!("clone {i}").into_bytes()).collect();
    pool.clone_tree(file.ino, dir.ino, &names, None, now)?;
    for name in &names[..3] {
        let clone = pool.lookup(dir.ino, name)?;
        pool.write(clone.ino, rng.below(500) * B, b"of its own", now)?;
    }
    // Every other block has one reference more, so that no two neighbours share a record.
    let odd = pool.create_node(dir.ino, b"odd", &node(FileKind::Regular, b""), now)?;
    for block in (0..260).step_by(2) {
        pool.clone_range(file.ino, block * 2 * B, odd.ino, block * B, B, now)?;
    }
    let fifo = pool.create_node(dir.ino, b"pipe", &node(FileKind::Fifo, b""), now)?;
    for i in 0..100 {
        pool.link(fifo.ino, dir.ino, format!("pipe {i}").as_bytes(), now)?;
    }
    let large = vec![7; 600 * 1024];
    let image = pool.create_node(Ino::ROOT, b"image", &node(FileKind::Regular, b""), now)?;
    pool.write(image.ino, 0, &large, now)?;
    pool.truncate(image.ino, 40 * 1024 * MIB, now)?;
    pool.set_xattr(image.ino, b"user.note", &[b'n'; 3000], XattrMode::Set, now)?;
    pool.set_xattr(image.ino, b"user.empty", b"", XattrMode::Set, now)?;
    let link = pool.create_node(
        Ino::ROOT,
        b"link",
        &node(FileKind::Symlink, &[b't'; 2000]),
        now,
    )?;
    pool.link(link.ino, dir.ino, b"link too", now)?;
    for (name, kind) in [
        (&b"fifo"[..], FileKind::Fifo),
        (b"device", FileKind::CharDevice),
    ] {
        pool.create_node(Ino::ROOT, name, &node(kind, b""), now)?;
    }
    Ok(())
}

/// One of every operation; what a crash would interrupt is left unfinished.
fn life(pool: &Pool) -> Result<()> {
    let now = Time { secs: 5, nanos: 6 };
    let dir = pool.create_node(Ino::ROOT, b"dir", &node(FileKind::Directory, b""), now)?;
    let image = pool.lookup(Ino::ROOT, b"image")?;
    let a = pool.create_node(dir.ino, b"a", &node(FileKind::Regular, b""), now)?;
    let b = pool.create_node(dir.ino, b"b", &node(FileKind::Regular, b""), now)?;
    pool.write(a.ino, 100, b"a few bytes", now)?;
    pool.write(a.ino, 64 * 1024, &vec![3; 128 * 1024], now)?;
    pool.sync()?;
    pool.clone_file(a.ino, b.ino, now)?;
    pool.write(a.ino, 5 * B, &vec![0; 8192], now)?;
    pool.punch(b.ino, 70_000, 20_000, now)?;
    pool.clone_range(a.ino, 64 * 1024, b.ino, 256 * 1024, 65_536, now)?;
    pool.truncate(a.ino, 100_000, now)?;
    pool.rename(dir.ino, b"a", Ino::ROOT, b"moved", RenameMode::Replace, now)?;
    pool.link(b.ino, Ino::ROOT, b"linked", now)?;
    let set = SetAttr {
        mode: Some(0o640),
        uid: Some(7),
        mtime: Some(now),
        ..SetAttr::default()
    };
    pool.set_attr(b.ino, &set)?;
    pool.set_xattr(b.ino, b"user.x", b"value", XattrMode::Set, now)?;
    pool.set_xattr(b.ino, b"user.y", b"value", XattrMode::Set, now)?;
    pool.remove_xattr(b.ino, b"user.y", now)?;
    pool.sync()?;
    // Deleted and still in use, deleted and being freed, and a clone that is not finished.
    pool.create_node(Ino::ROOT, b"gone", &node(FileKind::Regular, b""), now)?;
    let gone = pool.lookup(Ino::ROOT, b"gone")?;
    pool.write(gone.ino, 0, b"orphan", now)?;
    pool.unlink(Ino::ROOT, b"gone", now)?;
    let large = pool.lookup(Ino::ROOT, b"large")?;
    pool.rename(
        large.ino,
        b"clone 1",
        large.ino,
        b"clone 2",
        RenameMode::Exchange,
        now,
    )?;
    let victim = pool.unlink(large.ino, b"clone 5", now)?;
    pool.reclaim(victim.ino)?;
    let part = pool.create_node(dir.ino, b"part", &node(FileKind::Regular, b""), now)?;
    pool.begin_clone(image.ino, part.ino, 64 * B, now)?;
    pool.extend_clone(part.ino, 100 * B, now)?;
    Ok(())
}
