//! Clean tree nodes: read from the device, checked, and kept in a bounded cache.
//!
//! Invariants:
//!
//! 1. A cached node equals the block on the device. Dirty nodes live in `Meta`.
//! 2. A block that becomes a node again passes through `Meta`'s dirty set, and [`put`] replaces
//!    what the cache held for it, so a stale node is never found: [`get`] also compares the
//!    checksum with the one the parent expects.
//!
//! [`put`]: NodeCache::put
//! [`get`]: NodeCache::get

use std::cell::Cell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::num::NonZeroUsize;
use std::sync::Arc;

use crate::device::BlockDevice;
use crate::error::{Error, Kind, Result};
use crate::ondisk::extent::NodeRef;
use crate::ondisk::node::{Node, TreeKind};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, local};
use crate::units::BLOCK_SIZE;

use super::recent::Recent;

/// How often a node is read before it counts as damaged. What fails once only must not end a
/// checkpoint, which cannot go on without the node and would poison the pool.
const TRIES: u32 = 3;
/// Shards of the cache, so that readers seldom meet.
const SHARDS: usize = 8;

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// A node that is not in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Absent {
    pub(crate) kind: TreeKind,
    pub(crate) level: u8,
    pub(crate) at: NodeRef,
}

/// Whether this thread reads nodes from the device.
#[derive(Clone, Copy, Debug)]
enum Reach {
    Device,
    Memory,
    /// It does not, and needed this one.
    Missed(Absent),
}

local! {
    static REACH: Cell<Reach> = const { Cell::new(Reach::Device) };
}

/// Runs `look`, which looks at trees, without reading from the device.
///
/// # Errors
/// The first node that it needed and that is not in memory; what `look` came to is dropped.
pub(crate) fn in_memory<T>(
    look: impl FnOnce() -> Result<T>,
) -> std::result::Result<Result<T>, Absent> {
    REACH.with(|reach| reach.set(Reach::Memory));
    let outcome = look();
    match REACH.with(|reach| reach.replace(Reach::Device)) {
        Reach::Missed(absent) => Err(absent),
        _ => Ok(outcome),
    }
}

/// While it lives, what this thread reads is not kept in the cache: a walk over everything must
/// not drive out what guests use.
#[derive(Debug)]
pub(crate) struct Quiet(());

impl Quiet {
    /// Begins. One at a time in a thread.
    pub(crate) fn begin() -> Self {
        QUIET.set(true);
        Self(())
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        QUIET.set(false);
    }
}

/// Hashes block numbers, with one multiplication: they are looked up for every level of every
/// descent, and the allocator chooses them, not a guest.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BlockHasher(u64);

impl Hasher for BlockHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes
            .iter()
            .for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, value: u64) {
        /// 2^64 divided by the golden ratio: its bits are well mixed.
        const FACTOR: u128 = 0x9e37_79b9_7f4a_7c15;
        let wide = u128::from(self.0 ^ value) * FACTOR;
        self.0 = (wide >> 64) as u64 ^ wide as u64;
    }
}

/// Something for each of some blocks.
pub(crate) type BlockMap<T> = HashMap<u64, T, BuildHasherDefault<BlockHasher>>;

/// The cache of clean nodes, and the way to the device behind it.
#[derive(Debug)]
pub(crate) struct NodeCache {
    device: Arc<dyn BlockDevice>,
    /// Identity of the pool, which every node carries.
    pub(crate) pool: u64,
    /// Reads of nodes that were not what had been written.
    pub(crate) damaged: AtomicU64,
    /// Nodes by block. Rank 7 in the lock order: nothing is locked while one is held.
    shards: Vec<Mutex<Recent<Arc<Node>>>>,
}

impl NodeCache {
    /// A cache of at most `nodes_max` nodes of the pool `pool` on `device`.
    pub(crate) fn new(device: Arc<dyn BlockDevice>, pool: u64, nodes_max: usize) -> Self {
        let each = NonZeroUsize::new(nodes_max / SHARDS).unwrap_or(NonZeroUsize::MIN);
        let shards = (0..SHARDS).map(|_| Mutex::new(Recent::new(each))).collect();
        Self {
            device,
            pool,
            damaged: AtomicU64::new(0),
            shards,
        }
    }

    fn shard(&self, block: u64) -> &Mutex<Recent<Arc<Node>>> {
        &self.shards[(block as usize) % SHARDS]
    }

    /// The node at `at`, from the cache or the device.
    pub(crate) fn get(&self, kind: TreeKind, level: u8, at: NodeRef) -> Result<Arc<Node>> {
        if let Some(node) = self.shard(at.block).lock().get(at.block)
            && node.crc() == at.crc
            && node.kind() == kind
            && node.level() == level
        {
            return Ok(node.clone());
        }
        let addr = at
            .block
            .checked_mul(BLOCK_SIZE as u64)
            .filter(|addr| *addr < self.device.len());
        let Some(addr) = addr else {
            return Err(Error::corrupt(format!(
                "tree node lies outside: block={}",
                at.block
            )));
        };
        if let Some(error) = REACH.with(|reach| match reach.get() {
            Reach::Device => None,
            Reach::Memory | Reach::Missed(_) => {
                reach.set(Reach::Missed(Absent { kind, level, at }));
                Some(Error::new(Kind::Busy, "a tree node is not in memory"))
            }
        }) {
            return Err(error);
        }
        let mut tries = 1;
        let node = loop {
            match self.read(addr, kind, level, at) {
                Err(error) if tries < TRIES => {
                    tries += 1;
                    log::warn!("reading once more: {error}");
                }
                outcome => break Arc::new(outcome?),
            }
        };
        if !QUIET.get() {
            self.put(node.clone());
        }
        Ok(node)
    }

    fn read(&self, addr: u64, kind: TreeKind, level: u8, at: NodeRef) -> Result<Node> {
        let mut page = Box::new([0; BLOCK_SIZE]);
        self.device.read_at(addr, &mut page[..]).map_err(|source| {
            Error::io(
                format!("cannot read a tree node: block={}", at.block),
                source,
            )
        })?;
        Node::verify(page, kind, level, at, self.pool).inspect_err(|_| {
            self.damaged.fetch_add(1, Ordering::Relaxed);
        })
    }

    /// Keeps a node that was just read or written.
    pub(crate) fn put(&self, node: Arc<Node>) {
        let old = self.shard(node.addr()).lock().put(node.addr(), node);
        drop(old); // its memory is given back without the lock
    }
}
