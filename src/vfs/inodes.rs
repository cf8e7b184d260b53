//! The inodes that somebody refers to: lookups that the kernel has not forgotten, open handles.
//!
//! Invariants:
//! 1. An inode is in the table exactly while it has lookups or handles.
//! 2. Whoever takes the last reference of an inode without a name is told to reclaim it, once.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use parking_lot::Mutex;

use super::copy::Pin;
use crate::units::Ino;

/// Shards of the table: more than any daemon has threads.
const SHARDS: usize = 64;

/// What is known in memory about an inode in use.
#[derive(Debug)]
pub(super) struct Inode {
    /// Its number.
    pub(super) ino: Ino,
    /// False: `pin` is empty. Lets a write pass without the lock.
    pub(super) pinned: AtomicBool,
    /// The clone in pieces that is made of it.
    pub(super) pin: Mutex<Option<Pin>>,
    /// True: it is known to have no set-id bits and no file capabilities.
    pub(super) unprivileged: AtomicBool,
    /// Open handles that read by a page cache.
    pub(super) cached: AtomicU64,
    /// True: such a handle was closed, and what it read may still be there.
    pub(super) was_cached: AtomicBool,
}

impl Inode {
    pub(super) fn new(ino: Ino) -> Self {
        Self {
            ino,
            pinned: AtomicBool::new(false),
            pin: Mutex::new(None),
            unprivileged: AtomicBool::new(false),
            cached: AtomicU64::new(0),
            was_cached: AtomicBool::new(false),
        }
    }
}

#[derive(Debug)]
struct Entry {
    inode: Arc<Inode>,
    lookups: u64,
    handles: u64,
    /// It has no name any more.
    orphan: bool,
}

impl Entry {
    fn new(ino: Ino) -> Self {
        Self {
            inode: Arc::new(Inode::new(ino)),
            lookups: 0,
            handles: 0,
            orphan: false,
        }
    }

    fn unused(&self) -> bool {
        self.lookups == 0 && self.handles == 0
    }
}

type Shard = Mutex<HashMap<Ino, Entry>>;

/// The table. Its locks are leaves: nothing else is locked, and the pool is not called, under one.
#[derive(Debug)]
pub(super) struct Inodes {
    shards: Vec<Shard>,
}

impl Default for Inodes {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
        }
    }
}

impl Inodes {
    fn shard(&self, ino: Ino) -> &Shard {
        let index = usize::try_from(ino.0 % SHARDS as u64).expect("a remainder below 64 fits");
        &self.shards[index]
    }

    /// The inode, if anybody refers to it.
    pub(super) fn get(&self, ino: Ino) -> Option<Arc<Inode>> {
        let shard = self.shard(ino).lock();
        shard.get(&ino).map(|entry| entry.inode.clone())
    }

    /// Counts one lookup.
    pub(super) fn add_lookup(&self, ino: Ino) {
        let mut shard = self.shard(ino).lock();
        shard.entry(ino).or_insert_with(|| Entry::new(ino)).lookups += 1;
    }

    /// Counts one handle.
    pub(super) fn add_handle(&self, ino: Ino) -> Arc<Inode> {
        let mut shard = self.shard(ino).lock();
        let entry = shard.entry(ino).or_insert_with(|| Entry::new(ino));
        entry.handles += 1;
        entry.inode.clone()
    }

    /// Takes back lookups. True: reclaim it. A kernel that forgets more than it looked up changes
    /// nothing: the count stays at zero.
    #[must_use]
    pub(super) fn forget(&self, ino: Ino, count: u64) -> bool {
        self.update(ino, |entry| {
            entry.lookups = entry.lookups.saturating_sub(count);
        })
    }

    /// Takes back a handle. True: reclaim it.
    #[must_use]
    pub(super) fn drop_handle(&self, ino: Ino) -> bool {
        self.update(ino, |entry| {
            entry.handles = entry.handles.saturating_sub(1);
        })
    }

    /// The last name of the inode is gone. True: nobody refers to it either, reclaim it.
    #[must_use]
    pub(super) fn orphan(&self, ino: Ino) -> bool {
        let mut shard = self.shard(ino).lock();
        match shard.get_mut(&ino) {
            Some(entry) => {
                entry.orphan = true;
                false
            }
            None => true,
        }
    }

    /// The inode has a name again.
    pub(super) fn adopt(&self, ino: Ino) {
        if let Some(entry) = self.shard(ino).lock().get_mut(&ino) {
            entry.orphan = false;
        }
    }

    /// Empties the table; returns the inodes to reclaim.
    pub(super) fn drain_orphans(&self) -> Vec<Ino> {
        let mut orphans = Vec::new();
        for shard in &self.shards {
            let entries = std::mem::take(&mut *shard.lock());
            orphans.extend(
                entries
                    .into_iter()
                    .filter_map(|(ino, entry)| entry.orphan.then_some(ino)),
            );
        }
        orphans
    }

    fn update(&self, ino: Ino, change: impl FnOnce(&mut Entry)) -> bool {
        let mut shard = self.shard(ino).lock();
        let Some(entry) = shard.get_mut(&ino) else {
            return false;
        };
        change(entry);
        if !entry.unused() {
            return false;
        }
        let orphan = entry.orphan;
        shard.remove(&ino);
        orphan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INO: Ino = Ino(42);

    #[test]
    fn an_orphan_is_reclaimed_once_by_whoever_leaves_last() {
        let inodes = Inodes::default();
        inodes.add_lookup(INO);
        inodes.add_lookup(INO);
        inodes.add_handle(INO);
        assert!(!inodes.orphan(INO));
        assert!(!inodes.forget(INO, 2));
        assert!(inodes.drop_handle(INO));
        assert!(!inodes.drop_handle(INO));
        assert!(!inodes.forget(INO, 1));
        assert!(inodes.get(INO).is_none());
    }

    #[test]
    fn what_nobody_knows_is_reclaimed_with_its_name() {
        assert!(Inodes::default().orphan(INO));
    }

    #[test]
    fn a_named_inode_is_never_reclaimed() {
        let inodes = Inodes::default();
        inodes.add_lookup(INO);
        assert!(!inodes.forget(INO, 1));
        inodes.add_lookup(INO);
        assert!(!inodes.orphan(INO));
        inodes.adopt(INO);
        assert!(!inodes.forget(INO, 1));
    }

    #[test]
    fn the_end_of_the_mount_leaves_no_orphan() {
        let inodes = Inodes::default();
        inodes.add_lookup(INO);
        inodes.add_lookup(Ino(7));
        assert!(!inodes.orphan(INO));
        assert_eq!(inodes.drain_orphans(), vec![INO]);
        assert_eq!(inodes.drain_orphans(), vec![]);
    }
}
