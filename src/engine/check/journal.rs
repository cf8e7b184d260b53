//! The journal ring: what waits for replay, and whether it is what was written.
//!
//! Batches are durable one after the other, so the first one that is not whole is the end, as a
//! crash leaves it. If a later one is whole, that is no crash: something in between was damaged,
//! and everything behind it would be lost silently.

use crate::device::BlockDevice;
use crate::error::Error;
use crate::ondisk::crc32c;
use crate::ondisk::extent::Extent;
use crate::ondisk::journal::{BATCH_RECORDS, BatchHeader};
use crate::ondisk::record::{Reader as RecordReader, Record};
use crate::ondisk::superblock::Superblock;
use crate::units::BLOCK_SIZE;

use super::{Checker, Subject, code};

const B: u64 = BLOCK_SIZE as u64;
/// Blocks of the largest batch that is believed: 256 MiB, as for replay.
const BATCH_BLOCKS_MAX: u64 = 256 * 1024 * 1024 / B;
/// Blocks read at once.
const PIECE: u64 = 256;
/// How far behind the end of the journal a later batch is looked for: a quarter of the ring, or
/// 64 MiB if that is less.
const REACH_BLOCKS_MAX: u64 = 64 * 1024 * 1024 / B;

/// The ring of a pool, to be read only.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring<'a> {
    pub(crate) device: &'a dyn BlockDevice,
    pub(crate) sb: &'a Superblock,
}

/// A batch that is whole.
#[derive(Debug)]
pub(crate) struct WholeBatch {
    pub(crate) records: Vec<Record>,
    pub(crate) blocks: u64,
}

/// What is where a batch may be.
#[derive(Debug)]
pub(crate) enum Found {
    Whole(WholeBatch),
    /// Its header is there, and something of the rest is not.
    Cut,
    Nothing,
    /// It is whole, and cannot be understood.
    Malformed(Error),
}

impl Ring<'_> {
    fn read(&self, at: u64, count: u64) -> Option<Vec<u8>> {
        let mut bytes = vec![0; (count * B) as usize];
        let addr = (self.sb.journal_start + at) * B;
        self.device.read_at(addr, &mut bytes).ok()?;
        Some(bytes)
    }

    /// Looks at block `at` of the ring for the batch `seq`.
    pub(crate) fn batch(&self, at: u64, seq: u64) -> Found {
        let Some(first) = self.read(at, 1) else {
            return Found::Cut;
        };
        let Ok(header) = BatchHeader::decode(&first) else {
            return Found::Nothing;
        };
        if header.pool != self.sb.pool_id() || header.seq != seq || header.block != at {
            return Found::Nothing;
        }
        let blocks = header.blocks();
        if blocks > BATCH_BLOCKS_MAX || at + blocks > self.sb.journal_blocks {
            return Found::Cut;
        }
        let head = self.read(at, header.head_blocks());
        let Some(head) = head.filter(|head| header.verify(head, &self.sb.hash_key).is_ok()) else {
            return Found::Cut;
        };
        let mut reader =
            RecordReader(&head[BATCH_RECORDS..BATCH_RECORDS + header.records_len as usize]);
        let mut records = Vec::new();
        while !reader.0.is_empty() {
            match Record::decode(&mut reader) {
                Ok(record) => records.push(record),
                Err(error) => return Found::Malformed(error),
            }
        }
        let sums: Vec<u32> = records
            .iter()
            .filter_map(|record| match record {
                Record::Block { crc, .. } => Some(*crc),
                _ => None,
            })
            .collect();
        if sums.len() != header.data_blocks as usize {
            return Found::Cut;
        }
        if !self.holds_data(at + header.head_blocks(), &sums) {
            return Found::Cut;
        }
        Found::Whole(WholeBatch { records, blocks })
    }

    fn holds_data(&self, at: u64, sums: &[u32]) -> bool {
        (at..)
            .step_by(PIECE as usize)
            .zip(sums.chunks(PIECE as usize))
            .all(|(at, sums)| {
                self.read(at, sums.len() as u64).is_some_and(|bytes| {
                    bytes
                        .chunks(BLOCK_SIZE)
                        .zip(sums)
                        .all(|(block, sum)| crc32c(block) == *sum)
                })
            })
    }

    /// Shows all batches that wait, in order; returns the sequence number behind the last one,
    /// the block where it would be, and what is there instead.
    pub(crate) fn waiting(&self, show: &mut dyn FnMut(u64, WholeBatch)) -> (u64, u64, Found) {
        let (mut seq, mut at) = (self.sb.journal_seq, self.sb.journal_pos);
        let mut used = 0;
        loop {
            let mut found = self.batch(at, seq);
            let mut start = at;
            if !matches!(found, Found::Whole(_)) && at != 0 {
                match self.batch(0, seq) {
                    Found::Nothing => {}
                    other => (found, start) = (other, 0),
                }
            }
            let Found::Whole(batch) = found else {
                return (seq, at, found);
            };
            let skipped = if start == at {
                0
            } else {
                self.sb.journal_blocks - at
            };
            used += skipped + batch.blocks;
            if used >= self.sb.journal_blocks {
                return (seq, at, Found::Nothing); // a full lap
            }
            at = (start + batch.blocks) % self.sb.journal_blocks;
            show(seq, batch);
            seq += 1;
        }
    }

    /// Sequence number of a batch that shows that batch `missing`, which would be at block `at`,
    /// was durable. Looked for where such a batch must begin: see `docs/format.md`.
    fn later(&self, missing: u64, at: u64) -> Option<u64> {
        let blocks = self.sb.journal_blocks;
        let reach = (blocks / 4).min(REACH_BLOCKS_MAX);
        let ends = [(at, (at + reach).min(blocks)), (0, reach.min(at))];
        for (from, to) in ends {
            for first in (from..to).step_by(PIECE as usize) {
                let count = PIECE.min(to - first);
                let Some(bytes) = self.read(first, count) else {
                    continue;
                };
                for (at, block) in (first..).zip(bytes.chunks(BLOCK_SIZE)) {
                    if let Ok(header) = BatchHeader::decode(block)
                        && header.durable >= missing
                        && header.seq > header.durable
                        && self.is_genuine(&header, at)
                    {
                        return Some(header.seq);
                    }
                }
            }
        }
        None
    }

    /// True if header and records are of this pool and belong there.
    fn is_genuine(&self, header: &BatchHeader, at: u64) -> bool {
        let fits = header.blocks() <= BATCH_BLOCKS_MAX
            && at + header.blocks() <= self.sb.journal_blocks
            && header.block == at
            && header.pool == self.sb.pool_id();
        fits && self
            .read(at, header.head_blocks())
            .is_some_and(|head| header.verify(&head, &self.sb.hash_key).is_ok())
    }
}

impl Checker<'_> {
    /// Reads what waits in the ring.
    pub(super) fn check_journal(&mut self) {
        let Some(device) = self.ring else {
            return;
        };
        let sb = self.reader.sb;
        let ring = Ring { device, sb };
        let mut batches = 0;
        let (end, at, found) = ring.waiting(&mut |seq, batch| {
            batches += 1;
            for record in &batch.records {
                if let Record::Map { extent, sums, .. } = record {
                    self.check_placed(seq, *extent, sums);
                }
            }
        });
        self.counts.batches = batches;
        self.counts.batch_cut = matches!(found, Found::Cut);
        if let Found::Malformed(error) = found {
            let text = format!("journal batch {end} cannot be understood: {error}");
            self.find(code::JOURNAL, Subject::Pool, text);
        }
        if let Some(later) = ring.later(end, at) {
            let text = format!(
                "the journal lost batch {end}, which was durable when batch {later} was written"
            );
            self.find(code::JOURNAL, Subject::Pool, text);
        }
    }

    /// Data that was written in place and waits in the journal to be mapped.
    fn check_placed(&mut self, seq: u64, extent: Extent, sums: &[u32]) {
        if extent.is_lost() || !self.reader.holds(extent.block, extent.end()) {
            let text = format!("journal batch {seq} maps blocks outside the pool");
            return self.find(code::JOURNAL, Subject::Pool, text);
        }
        if !self.options.data {
            return;
        }
        let mut page = vec![0; BLOCK_SIZE];
        for (block, sum) in (extent.block..extent.end()).zip(sums) {
            let read = self.reader.device.read_at(block * B, &mut page);
            if read.is_err() || crc32c(&page) != *sum {
                let text = format!(
                    "a data block is not what was written: block {block}, of journal batch {seq}"
                );
                self.find(code::DATA, Subject::Pool, text);
            }
        }
    }
}
