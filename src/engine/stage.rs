//! The stage: the newest bytes of blocks that have no place in the pool yet, and the queue of
//! what the next journal batch will hold.
//!
//! Invariants:
//!
//! 1. A block in `active` is newer than the same block in `frozen`, and that than the extent map.
//! 2. Everything acknowledged and not yet durable is in `pending`, in order. A batch takes all
//!    of it at once, so what a crash leaves is a prefix of what was acknowledged.
//! 3. A block written twice before a batch is taken is queued once, with its newest bytes,
//!    unless a record that is not a block came in between: order matters to those. (Or the stage
//!    was frozen in between: then it is queued twice, in order.)
//! 4. Each block in `active` or `frozen` holds a reservation of the space map.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::ondisk::Page;
use crate::ondisk::inode::Inode;
use crate::ondisk::record::Record;
use crate::sync::Instant;
use crate::units::{BLOCK_SIZE, Ino, Time};

use super::counters::Counters;
use super::work;

/// Contents of one block on their way to the pool.
#[derive(Clone, Debug)]
pub(crate) struct Staged {
    /// The bytes; `None`: zeros.
    pub(crate) data: Option<Arc<Page>>,
    /// Their CRC-32C; 0 for zeros.
    pub(crate) crc: u32,
}

impl Staged {
    /// True if both are the very same write.
    pub(crate) fn same(&self, other: &Self) -> bool {
        match (&self.data, &other.data) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        }
    }
}

/// A block in one half of the stage.
#[derive(Debug)]
struct Held {
    staged: Staged,
    /// The batch that it waits for, as [`Stage::batch`] counts, and its place in that queue.
    /// `NO_BATCH`: nobody queued it.
    batch: u64,
    at: usize,
}

/// Of blocks that never were in a queue.
const NO_BATCH: u64 = 0;

/// Size and times of a file that is being written: newer than its inode record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileAttr {
    /// Bytes.
    pub(crate) size: u64,
    /// Last change of the contents.
    pub(crate) mtime: Time,
    /// Last change.
    pub(crate) ctime: Time,
}

impl FileAttr {
    /// Makes an inode as new as this is.
    pub(crate) fn put_into(self, inode: &mut Inode) {
        (inode.size, inode.mtime, inode.ctime) = (self.size, self.mtime, self.ctime);
    }
}

/// What is staged of one file.
#[derive(Debug)]
pub(crate) struct StageFile {
    pub(crate) attr: FileAttr,
    /// The attributes as of the cut of the checkpoint in progress.
    pub(crate) cut_attr: Option<FileAttr>,
    /// `attr` may differ from the inode record.
    pub(crate) unfolded: bool,
    /// The file is a clone in pieces.
    pub(crate) pinned: bool,
    active: BTreeMap<u64, Held>,
    frozen: BTreeMap<u64, Held>,
}

impl StageFile {
    /// The newest staged contents of blocks `from` up to `to`, in order.
    pub(crate) fn range(&self, from: u64, to: u64) -> BTreeMap<u64, Staged> {
        let mut all: BTreeMap<u64, Staged> = self
            .frozen
            .range(from..to)
            .map(|(at, held)| (*at, held.staged.clone()))
            .collect();
        all.extend(
            self.active
                .range(from..to)
                .map(|(at, held)| (*at, held.staged.clone())),
        );
        all
    }

    /// The newest staged contents of a block.
    pub(crate) fn newest(&self, block: u64) -> Option<&Staged> {
        let held = self.active.get(&block).or_else(|| self.frozen.get(&block));
        held.map(|held| &held.staged)
    }

    /// Staged blocks, those in both halves counted twice.
    pub(crate) fn blocks(&self) -> u64 {
        (self.active.len() + self.frozen.len()) as u64
    }

    /// True if no block is staged.
    pub(crate) fn is_empty(&self) -> bool {
        self.active.is_empty() && self.frozen.is_empty()
    }
}

/// Something that waits for the next batch.
#[derive(Clone, Debug)]
pub(crate) enum Pending {
    /// New contents of a block.
    Block(Ino, u64, Staged),
    /// Any other record.
    Record(Record),
}

/// What a batch will hold.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) items: Vec<Pending>,
    /// Sizes and times of the files that were written.
    pub(crate) touches: Vec<Record>,
    /// Upper bound of the bytes that it takes in the journal.
    pub(crate) bytes: usize,
    /// The work of replaying it (`work.rs`).
    pub(crate) work: u64,
    /// `Stage::pushed` when it was taken.
    pub(crate) upto: u64,
    /// Data written in place must be durable before the batch.
    pub(crate) needs_flush: bool,
}

impl Batch {
    /// True if there is nothing to write.
    pub(crate) fn is_empty(&self) -> bool {
        self.items.is_empty() && self.touches.is_empty()
    }
}

/// Bytes that a block takes in a batch: itself, its record, its share of the header.
pub(crate) const BLOCK_COST: usize = BLOCK_SIZE + 32;

/// Bytes that size and times of a file take in a batch, at most.
pub(crate) const TOUCH_COST: usize = 64;

/// The stage of a pool. Guarded by one lock, rank 7 in the order of `pool.rs`.
#[derive(Debug)]
pub(crate) struct Stage {
    files: BTreeMap<u64, StageFile>,
    pending: Vec<Pending>,
    /// Counts the times that blocks lost their place in `pending`: what `Held` says of a place
    /// holds for the same number only.
    batch: u64,
    /// Upper bound of the bytes that `pending` takes in the journal.
    pending_bytes: usize,
    /// The work of replaying it; in replay, what extent maps add to that of the records.
    pub(crate) work: u64,
    /// Files whose size or times the next batch must hold.
    touched: BTreeSet<u64>,
    needs_flush: bool,
    /// When the oldest of what waits was queued.
    oldest: Option<Instant>,
    /// Counts pushes; a sync waits until what was pushed before it is durable.
    pub(crate) pushed: u64,
    /// Staged blocks, active and frozen.
    blocks: usize,
    counters: Arc<Counters>,
    /// Replay does not journal what it reads from the journal.
    pub(crate) replaying: bool,
    /// Set by the cut of the last checkpoint: what came later would be in nothing durable.
    pub(crate) closed: bool,
}

impl Stage {
    /// An empty stage.
    pub(crate) fn new(counters: Arc<Counters>) -> Self {
        Self {
            files: BTreeMap::new(),
            pending: Vec::new(),
            batch: NO_BATCH + 1,
            pending_bytes: 0,
            work: 0,
            touched: BTreeSet::new(),
            needs_flush: false,
            oldest: None,
            pushed: 0,
            blocks: 0,
            counters,
            replaying: false,
            closed: false,
        }
    }

    /// What is staged of a file.
    pub(crate) fn file(&self, ino: Ino) -> Option<&StageFile> {
        self.files.get(&ino.0)
    }

    /// What is staged of a file, to change its attributes.
    pub(crate) fn file_mut(&mut self, ino: Ino) -> Option<&mut StageFile> {
        self.files.get_mut(&ino.0)
    }

    /// The entry of a file; `attr` are those of its inode record.
    pub(crate) fn open(&mut self, ino: Ino, attr: FileAttr) -> &mut StageFile {
        self.files.entry(ino.0).or_insert_with(|| StageFile {
            attr,
            cut_attr: None,
            unfolded: false,
            pinned: false,
            active: BTreeMap::new(),
            frozen: BTreeMap::new(),
        })
    }

    /// Inodes with an entry.
    pub(crate) fn inos(&self) -> Vec<Ino> {
        self.files.keys().map(|ino| Ino(*ino)).collect()
    }

    /// Staged blocks of each file that has any.
    pub(crate) fn block_counts(&self) -> Vec<(u64, Ino)> {
        let counts = self.files.iter();
        counts
            .map(|(ino, file)| (file.blocks(), Ino(*ino)))
            .filter(|(blocks, _)| *blocks > 0)
            .collect()
    }

    /// Sizes of the files with an entry.
    pub(crate) fn sizes(&self) -> Vec<(Ino, u64)> {
        self.files
            .iter()
            .map(|(ino, file)| (Ino(*ino), file.attr.size))
            .collect()
    }

    /// Staged blocks.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes that wait for the journal.
    pub(crate) fn pending_bytes(&self) -> usize {
        self.pending_bytes
    }

    /// True if nothing waits for the journal.
    pub(crate) fn is_clean(&self) -> bool {
        self.pending.is_empty() && self.touched.is_empty()
    }

    /// True if `bytes` more may be queued; an empty queue takes any one operation, and one that
    /// is closed none.
    pub(crate) fn has_room(&self, bytes: usize, bytes_max: usize) -> bool {
        !self.closed && (self.is_clean() || self.pending_bytes + bytes <= bytes_max)
    }

    /// Stages the contents of a block. The caller has reserved space for it; the reservation is
    /// given back if the block held one already.
    pub(crate) fn put(&mut self, ino: Ino, block: u64, staged: Staged) {
        let file = self.files.get_mut(&ino.0).expect("the entry was opened");
        let (batch, at) = match self.replaying {
            true => (NO_BATCH, 0),
            false => (self.batch, self.pending.len()),
        };
        let mut waits = None;
        match file.active.entry(block) {
            Entry::Occupied(mut held) => {
                self.counters.unreserve(1);
                let held = held.get_mut();
                held.staged = staged.clone();
                if held.batch == batch {
                    waits = Some(held.at);
                } else {
                    (held.batch, held.at) = (batch, at);
                }
            }
            Entry::Vacant(place) => {
                self.blocks += 1;
                let staged = staged.clone();
                place.insert(Held { staged, batch, at });
            }
        }
        if self.replaying {
            return;
        }
        self.count_push();
        // I3: the newest bytes take the place of those that wait.
        if let Some(at) = waits {
            self.pending[at] = Pending::Block(ino, block, staged);
            return;
        }
        self.pending.push(Pending::Block(ino, block, staged));
        self.pending_bytes += BLOCK_COST;
        self.work += work::BLOCK;
    }

    /// Stages a block that a clone shares with its source: nothing is queued, because the record
    /// of the clone does the same in replay. The reservation may exceed what is free by what a
    /// clone was checked for.
    pub(crate) fn put_shared(&mut self, ino: Ino, block: u64, staged: Staged) {
        let file = self.files.get_mut(&ino.0).expect("the entry was opened");
        self.counters.reserve_anyway(1);
        let held = Held {
            staged,
            batch: NO_BATCH,
            at: 0,
        };
        if file.active.insert(block, held).is_some() {
            self.counters.unreserve(1);
        } else {
            self.blocks += 1;
        }
    }

    /// Queues a record.
    pub(crate) fn push(&mut self, record: Record) {
        if self.replaying {
            return;
        }
        self.count_push();
        self.batch += 1; // I3
        self.pending_bytes += record_cost(&record);
        self.work += work::of(&record);
        self.needs_flush |= matches!(record, Record::Map { .. });
        self.pending.push(Pending::Record(record));
    }

    fn count_push(&mut self) {
        if self.is_clean() {
            self.oldest = Some(Instant::now());
        }
        self.pushed += 1;
    }

    /// True if data written in place must be durable before what waits for the journal.
    pub(crate) fn needs_flush(&self) -> bool {
        self.needs_flush
    }

    /// When the oldest of what waits for the journal was queued.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        self.oldest.filter(|_| !self.is_clean())
    }

    /// Milliseconds since the oldest change that waits for the journal.
    pub(crate) fn unsynced_ms(&self) -> u64 {
        self.oldest()
            .map_or(0, |oldest| oldest.elapsed().as_millis() as u64)
    }

    /// Notes that size or times of a file changed.
    pub(crate) fn touch(&mut self, ino: Ino) {
        if let Some(file) = self.files.get_mut(&ino.0) {
            file.unfolded = true;
            if !self.replaying && !self.touched.contains(&ino.0) {
                self.count_push();
                self.touched.insert(ino.0);
                self.pending_bytes += TOUCH_COST;
            }
        }
    }

    /// Takes everything that waits.
    pub(crate) fn take(&mut self) -> Batch {
        self.batch += 1;
        let bytes = std::mem::take(&mut self.pending_bytes);
        let touched = std::mem::take(&mut self.touched);
        let touches = touched.into_iter().filter_map(|ino| {
            let attr = self.files.get(&ino)?.attr;
            let FileAttr { size, mtime, ctime } = attr;
            Some(Record::Touch {
                ino: Ino(ino),
                size,
                mtime,
                ctime,
            })
        });
        Batch {
            touches: touches.collect(),
            items: std::mem::take(&mut self.pending),
            bytes,
            work: std::mem::take(&mut self.work),
            upto: self.pushed,
            needs_flush: std::mem::take(&mut self.needs_flush),
        }
    }

    /// Puts back what [`take`](Self::take) took and what could not be written to the journal.
    pub(crate) fn untake(&mut self, batch: Batch) {
        // What was queued meanwhile is newer. Where blocks stand in the queue is not known any
        // more, so that they may be queued twice: I3 saves space and time only.
        self.batch += 1;
        let newer = std::mem::replace(&mut self.pending, batch.items);
        self.pending.extend(newer);
        for record in &batch.touches {
            if let Record::Touch { ino, .. } = record
                && self.files.contains_key(&ino.0)
            {
                self.touched.insert(ino.0);
            }
        }
        self.pending_bytes += batch.bytes;
        self.work += batch.work;
        self.needs_flush |= batch.needs_flush;
    }

    /// Drops staged blocks `from` up to `to` of a file, whose contents are obsolete.
    pub(crate) fn drop_range(&mut self, ino: Ino, from: u64, to: u64) {
        let Some(file) = self.files.get_mut(&ino.0) else {
            return;
        };
        let mut dropped = 0;
        for half in [&mut file.active, &mut file.frozen] {
            let keys: Vec<u64> = half.range(from..to).map(|(at, _)| *at).collect();
            dropped += keys.len();
            for key in keys {
                half.remove(&key);
            }
        }
        self.blocks -= dropped;
        self.counters.unreserve(dropped as u64); // I4
    }

    /// Forgets a file whose inode is gone.
    pub(crate) fn forget(&mut self, ino: Ino) {
        self.drop_range(ino, 0, u64::MAX);
        self.files.remove(&ino.0);
        self.touched.remove(&ino.0);
    }

    /// Moves what is active to the frozen half: of one file, or of all. What is frozen already
    /// and was not destaged stays, unless a newer block replaces it.
    pub(crate) fn freeze(&mut self, only: Option<Ino>) {
        let mut replaced = 0;
        for (ino, file) in &mut self.files {
            if only.is_some_and(|only| only.0 != *ino) {
                continue;
            }
            if file.frozen.is_empty() {
                file.frozen = std::mem::take(&mut file.active);
                continue;
            }
            for (block, held) in std::mem::take(&mut file.active) {
                if file.frozen.insert(block, held).is_some() {
                    replaced += 1;
                }
            }
        }
        self.blocks -= replaced;
        self.counters.unreserve(replaced as u64);
    }

    /// Remembers the attributes of all files as of now, for the checkpoint.
    pub(crate) fn cut_attrs(&mut self) {
        for file in self.files.values_mut() {
            if file.unfolded {
                file.cut_attr = Some(file.attr);
                file.unfolded = false;
            }
        }
    }

    /// Takes back [`cut_attrs`](Self::cut_attrs): there will be no checkpoint of that instant.
    pub(crate) fn uncut_attrs(&mut self) {
        for file in self.files.values_mut() {
            file.unfolded |= file.cut_attr.take().is_some();
        }
    }

    /// The first `most` frozen blocks of a file from `from` on, in order.
    pub(crate) fn frozen(&self, ino: Ino, from: u64, most: usize) -> Vec<(u64, Staged)> {
        let Some(file) = self.files.get(&ino.0) else {
            return Vec::new();
        };
        file.frozen
            .range(from..)
            .take(most)
            .map(|(at, held)| (*at, held.staged.clone()))
            .collect()
    }

    /// True if `staged` is still the frozen content of the block.
    pub(crate) fn is_frozen(&self, ino: Ino, block: u64, staged: &Staged) -> bool {
        let frozen = self
            .files
            .get(&ino.0)
            .and_then(|file| file.frozen.get(&block));
        frozen.is_some_and(|frozen| frozen.staged.same(staged))
    }

    /// A frozen block has its place now.
    pub(crate) fn thawed(&mut self, ino: Ino, block: u64, staged: &Staged) {
        if let Some(file) = self.files.get_mut(&ino.0)
            && file
                .frozen
                .get(&block)
                .is_some_and(|frozen| frozen.staged.same(staged))
        {
            file.frozen.remove(&block);
            self.blocks -= 1;
            self.counters.unreserve(1);
        }
    }

    /// Drops entries that say nothing any more.
    pub(crate) fn sweep(&mut self) {
        let touched = &self.touched;
        self.files.retain(|ino, file| {
            !file.is_empty() || file.unfolded || file.cut_attr.is_some() || touched.contains(ino)
        });
    }
}

/// Upper bound of the bytes of a record.
pub(crate) fn record_cost(record: &Record) -> usize {
    let extra = match record {
        Record::Map { sums, .. } => sums.len() * 4,
        Record::Create { name, target, .. } => name.len() + target.len(),
        Record::Link { name, .. } | Record::Unlink { name, .. } => name.len(),
        Record::RemoveXattr { name, .. } => name.len(),
        Record::Rename { name, new_name, .. } => name.len() + new_name.len(),
        Record::SetXattr { name, value, .. } => name.len() + value.len(),
        _ => 0,
    };
    96 + extra
}
