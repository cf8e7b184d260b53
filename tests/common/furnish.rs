//! Pools with all kinds of things in them, for tests that damage them.

use nodupe::device::{SimDevice, SplitMix64};
use nodupe::engine::{FileKind, NewNode, Pool};
use nodupe::units::{Ino, Time};

use super::crash::{TINY, Verdict, new_pool};
use super::generate::{SMALL, next_op, random_bytes};
use super::history::Runner;

const B: u64 = 4096;

/// A file with many extents and clones of it: trees of several levels that share nodes, in a
/// directory that the random history does not know.
pub(crate) fn large_trees(pool: &Pool, rng: &mut SplitMix64) -> nodupe::error::Result<()> {
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
    let names: Vec<_> = (0..120)
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
pub(crate) fn all_kinds(seed: u64, closed: bool) -> Verdict<SimDevice> {
    let (device, pool) = new_pool(&TINY, seed)?;
    let mut rng = SplitMix64::new(seed ^ 0xf00d);
    large_trees(&pool, &mut rng).map_err(|error| format!("large trees: {error}"))?;
    let mut runner = Runner::new(pool);
    for index in 0..200 {
        let op = next_op(&mut rng, &runner.model, &SMALL);
        let done = runner.run(&op);
        done.map_err(|error| format!("{}: {error}", op.text()))?;
        if index == 150 {
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
