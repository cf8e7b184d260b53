//! Replay: does the records of the journal again, in bounded memory.
//!
//! Invariants:
//!
//! 1. Before anything is allocated, every place that the journal maps is held: what was written
//!    there before the crash must not be overwritten.
//! 2. Replay leaves the pool as it was before the crash: what is staged is staged, what is changed
//!    is changed, and the journal goes on behind the last batch. So no checkpoint is needed before
//!    the pool can be used, and until there is one the next crash replays the same batches again.
//! 3. What exceeds the limits in the middle of it is destaged or, for changed nodes, made durable
//!    by a checkpoint, which has exactly what was replayed up to there: the superblock names the
//!    next batch, and held places count as free (`space.rs`).
//! 4. As in the live run, what is staged of a file gets its place before the file is cloned;
//!    otherwise each clone would need places of its own.

use std::collections::VecDeque;

use crate::error::{Error, Kind, Result};
use crate::ondisk::record::Record;
use crate::ondisk::superblock::FLAG_REPAIRED;
use crate::sync::{Instant, mpsc, thread};
use crate::units::{BLOCK_SIZE, Ino};

use super::apply::{apply, attr_of};
use super::journal::{Journal, ReadBatch};
use super::meta::Meta;
use super::pool::Pool;
use super::salvage::can_apply;
use super::stage::{FileAttr, Stage, Staged};
use super::types::Replayed;

/// Rings of at least this size, in bytes, are read by a thread of their own: 16 MiB. In smaller
/// ones nothing is gained, and the simulation relies on one order of reads.
const THREAD_MIN: u64 = 16 * 1024 * 1024;
/// Batches read ahead of the one that is replayed: each has at most a few MiB, as a rule.
const BATCHES_AHEAD: usize = 4;

/// What the first look at the journal has found.
struct FirstLook {
    /// Batches to be replayed, from the first one on.
    kept: VecDeque<ReadBatch>,
    /// Bytes that they take.
    kept_bytes: usize,
    /// Batches that were replayed at once.
    done: u64,
    /// Batches to be replayed.
    left: u64,
    /// Records that were left out.
    left_out: u64,
}

/// A host without space is no reason to refuse a pool: the journal has what has no place yet, and
/// deleting may be the way out.
pub(super) fn tolerate_full_host(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(error) if error.kind() == Kind::NoSpace => {
            log::error!("the journal stays in use until the host has space: {error}");
            Ok(())
        }
        outcome => outcome,
    }
}

impl Pool {
    /// Replays the journal. `scout`: a second reader of it; `in_slot`: the superblock was found in
    /// its slot. Nothing is written before it is known that the journal lost nothing. False if it
    /// is empty.
    pub(crate) fn replay(&self, mut scout: Journal, in_slot: bool) -> Result<bool> {
        let begun = Instant::now();
        self.stage.lock().replaying = true;
        let mut first = FirstLook {
            kept: VecDeque::new(),
            kept_bytes: 0,
            done: 0,
            left: 0,
            left_out: 0,
        };
        if scout.size() < THREAD_MIN {
            while let Some(batch) = scout.read_next()? {
                self.look_at(batch, &mut first)?;
            }
        } else {
            scout = self.look_ahead(scout, &mut first)?;
        }
        self.refuse_loss(&scout, in_slot)?;
        self.heal()?;
        drop(scout);
        for _ in 0..first.left {
            let batch = match first.kept.pop_front() {
                Some(batch) => {
                    self.journal.lock().move_behind(&batch);
                    batch
                }
                None => {
                    let read = self.journal.lock().read_next()?;
                    read.ok_or_else(|| Error::corrupt("the journal changed while it was read"))?
                }
            };
            first.left_out += self.replay_batch(batch)?;
            if !self.read_only {
                tolerate_full_host(self.relieve())?;
            }
        }
        self.stage.lock().replaying = false;
        let mut journal = self.journal.lock();
        journal.end_reading();
        let replayed = Replayed {
            batches: first.done + first.left,
            bytes: journal.used(),
            millis: begun.elapsed().as_millis() as u64,
            left_out: first.left_out,
        };
        *self.replayed.lock() = replayed;
        if replayed.batches > 0 {
            log::info!(
                "replayed the journal: {} batches, {} bytes, {} ms",
                replayed.batches,
                replayed.bytes,
                replayed.millis
            );
        }
        Ok(replayed.batches > 0)
    }

    /// Looks at all batches; reading, checking and copying them goes on meanwhile.
    fn look_ahead(&self, mut scout: Journal, first: &mut FirstLook) -> Result<Journal> {
        thread::scope(|scope| {
            let (sender, batches) = mpsc::sync_channel(BATCHES_AHEAD);
            let reader = scope.spawn(move || {
                while let Some(batch) = scout.read_next().transpose() {
                    let failed = batch.is_err();
                    if sender.send(batch).is_err() || failed {
                        break; // who looks at them has failed, or will
                    }
                }
                scout
            });
            for batch in batches {
                self.look_at(batch?, first)?;
            }
            let reader = reader.join();
            reader.map_err(|_| Error::new(Kind::Io, "the reader of the journal panicked"))
        })
    }

    /// Holds the places that a batch maps (I1). A batch that allocates nothing is replayed at
    /// once, if there is room and no other one stands before it; others are kept, as many as memory
    /// allows, and the rest will be read again.
    fn look_at(&self, batch: ReadBatch, first: &mut FirstLook) -> Result<()> {
        let plain = batch.records.iter().all(|record| {
            matches!(
                record,
                Record::Block { .. } | Record::Zero { .. } | Record::Touch { .. }
            )
        });
        let staged = self.stage.lock().blocks();
        if plain && first.left == 0 && staged < self.limits.replay_blocks {
            first.done += 1;
            self.journal.lock().move_behind(&batch);
            first.left_out += self.replay_batch(batch)?;
            return Ok(());
        }
        let mut meta = self.meta.write();
        for record in &batch.records {
            if let Record::Map { extent, .. } = record {
                meta.hold(*extent)?;
            }
        }
        let bytes = staged * BLOCK_SIZE + first.kept_bytes + batch.memory();
        let room = self.limits.replay_blocks * BLOCK_SIZE;
        if first.kept.len() as u64 == first.left && bytes <= room {
            first.kept_bytes += batch.memory();
            first.kept.push_back(batch);
        }
        first.left += 1;
        Ok(())
    }

    /// Returns how many records were left out, which happens only behind a repair.
    fn replay_batch(&self, batch: ReadBatch) -> Result<u64> {
        let tolerant = self.superblock.lock().flags & FLAG_REPAIRED != 0;
        let mut left_out = 0;
        let mut pass = |done: Result<()>| match done {
            Err(error) if tolerant && error.kind() != Kind::Io => {
                left_out += 1;
                Ok(())
            }
            done => done,
        };
        let mut data = batch.data.into_iter();
        let mut records = batch.records.into_iter().peekable();
        while records.peek().is_some() {
            if let Some(Record::Clone { src, .. } | Record::CloneRange { src, .. }) = records.peek()
                && !self.read_only
            {
                pass(tolerate_full_host(self.destage_file(*src)))?; // I4
            }
            let mut meta = self.meta.write();
            let mut stage = self.stage.lock();
            while let Some(record) = records.next() {
                match record {
                    Record::Block { ino, block, crc } => {
                        let data = data.next();
                        assert!(data.is_some(), "the reader counted the blocks of the batch");
                        let staged = Staged { data, crc };
                        pass(self.restage(&meta, &mut stage, ino, block, staged))?;
                    }
                    Record::Zero { ino, block } => {
                        let zeros = Staged { data: None, crc: 0 };
                        pass(self.restage(&meta, &mut stage, ino, block, zeros))?;
                    }
                    Record::Touch {
                        ino,
                        size,
                        mtime,
                        ctime,
                    } => {
                        let attr = FileAttr { size, mtime, ctime };
                        pass(retouch(&meta, &mut stage, ino, attr))?;
                    }
                    record => {
                        if let Record::Map { extent, .. } = &record {
                            meta.space.unhold(*extent)?;
                        }
                        let possible = match tolerant {
                            true => can_apply(&meta, &record),
                            false => Ok(()),
                        };
                        let done = possible.and_then(|()| apply(&mut meta, &mut stage, &record));
                        if let (Err(_), Record::Map { extent, .. }) = (&done, &record) {
                            meta.space.delta.add(*extent, 0); // taken for it, and free again
                        }
                        pass(done)?;
                    }
                }
                if matches!(
                    records.peek(),
                    Some(Record::Clone { .. } | Record::CloneRange { .. })
                ) {
                    break;
                }
            }
        }
        let work = std::mem::take(&mut self.stage.lock().work);
        self.journal.lock().add_work(work);
        Ok(left_out)
    }

    fn restage(
        &self,
        meta: &Meta,
        stage: &mut Stage,
        ino: Ino,
        block: u64,
        staged: Staged,
    ) -> Result<()> {
        if stage.file(ino).is_none() {
            stage.open(ino, attr_of(&meta.file(ino)?));
        }
        self.counters.reserve_anyway(1);
        stage.put(ino, block, staged);
        Ok(())
    }

    /// Keeps the limits (I3).
    fn relieve(&self) -> Result<()> {
        let low = self.counters.free() < self.counters.floor() / 2 && self.counters.dirty() > 0;
        if low || self.counters.is_tight() || self.excess() > 1 {
            return self.checkpoint_as(false);
        }
        let most = self.limits.replay_blocks;
        if self.stage.lock().blocks() <= most {
            return Ok(());
        }
        // The files with most of it, so that the others are still written in one piece.
        let mut files = self.stage.lock().block_counts();
        files.sort_unstable_by_key(|(blocks, _)| std::cmp::Reverse(*blocks));
        for (_, ino) in files {
            if self.stage.lock().blocks() <= most / 2 {
                break;
            }
            self.destage_file(ino)?;
        }
        Ok(())
    }
}

/// Sizes and times go to the stage, where a live write has them: the next checkpoint folds them in.
fn retouch(meta: &Meta, stage: &mut Stage, ino: Ino, attr: FileAttr) -> Result<()> {
    if stage.file(ino).is_none() {
        stage.open(ino, attr_of(&meta.file(ino)?));
    }
    if let Some(file) = stage.file_mut(ino) {
        file.attr = attr;
        file.unfolded = true;
    }
    Ok(())
}
