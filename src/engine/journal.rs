//! The journal ring: appending batches and reading them back.
//!
//! Invariants:
//!
//! 1. Batches have consecutive sequence numbers; one is written and made durable after the
//!    other. The first one that is not valid ends the journal.
//! 2. A batch is contiguous. One that does not fit before the end of the ring starts at block 0;
//!    a reader that finds nothing at its position looks there for the same sequence number.
//! 3. A batch never overwrites one that a checkpoint has not made obsolete.
//! 4. A part of the ring is kept for the batch that a checkpoint itself writes.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::ondisk::journal::{BATCH_RECORDS, BatchHeader};
use crate::ondisk::record::{Reader, Record};
use crate::ondisk::{Page, crc32c};
use crate::units::BLOCK_SIZE;

use super::stage::{Batch, Pending};

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Blocks of the largest batch that is believed: 256 MiB, eight times what may wait for one
/// (`Limits::pending_bytes`), so that a forged header cannot ask for all memory.
const BATCH_BLOCKS_MAX: u64 = 256 * 1024 * 1024 / BLOCK;

/// Where the next batch goes, and what is in use.
#[derive(Debug)]
pub(crate) struct Journal {
    device: Arc<dyn BlockDevice>,
    pool: u64,
    /// First block of the ring on its device.
    start: u64,
    /// Blocks of the ring.
    blocks: u64,
    /// Sequence number of the next batch.
    seq: u64,
    /// Block of the ring where it goes.
    head: u64,
    /// Batches that a checkpoint has not made obsolete: sequence number and blocks, with those
    /// skipped before it.
    live: VecDeque<(u64, u64)>,
    used: u64,
}

/// A batch read back.
#[derive(Debug)]
pub(crate) struct ReadBatch {
    pub(crate) records: Vec<Record>,
    pub(crate) data: Vec<Arc<Page>>,
}

impl Journal {
    /// The ring as a superblock describes it.
    pub(crate) fn new(
        device: Arc<dyn BlockDevice>,
        pool: u64,
        start: u64,
        blocks: u64,
        seq: u64,
        pos: u64,
    ) -> Self {
        Self {
            device,
            pool,
            start,
            blocks,
            seq,
            head: pos,
            live: VecDeque::new(),
            used: 0,
        }
    }

    /// Bytes of the ring.
    pub(crate) fn size(&self) -> u64 {
        self.blocks * BLOCK
    }

    /// Bytes in use.
    pub(crate) fn used(&self) -> u64 {
        self.used * BLOCK
    }

    /// Sequence number of the next batch and the block of the ring where it goes.
    pub(crate) fn position(&self) -> (u64, u64) {
        (self.seq, self.head)
    }

    /// True if a batch of up to `bytes` fits. `checkpoint`: the quarter that is kept may be used.
    pub(crate) fn fits(&self, bytes: usize, checkpoint: bool) -> bool {
        let kept = if checkpoint { 0 } else { self.blocks / 4 };
        // The header block, and rounding of the records.
        let blocks = (bytes as u64).div_ceil(BLOCK) + 2;
        let skipped = if self.head + blocks > self.blocks {
            self.blocks - self.head
        } else {
            0
        };
        // I3: strictly less, so that head and tail are never confused.
        self.used + skipped + blocks + kept < self.blocks
    }

    /// Writes a batch and makes it durable.
    pub(crate) fn append(&mut self, batch: &Batch) -> Result<()> {
        let buffer = encode(self.pool, self.seq, batch);
        let blocks = buffer.len() as u64 / BLOCK;
        let skipped = if self.head + blocks > self.blocks {
            self.blocks - self.head
        } else {
            0
        };
        assert!(
            self.used + skipped + blocks < self.blocks,
            "a batch overran the journal"
        );
        let at = if skipped > 0 { 0 } else { self.head };
        let failed = |what: &str, source| Error::io(format!("cannot {what} the journal"), source);
        self.device
            .write_at((self.start + at) * BLOCK, &buffer)
            .map_err(|source| failed("write", source))?;
        self.device
            .sync()
            .map_err(|source| failed("sync", source))?;
        self.live.push_back((self.seq, blocks + skipped));
        self.used += blocks + skipped;
        self.head = (at + blocks) % self.blocks;
        self.seq += 1;
        Ok(())
    }

    /// Forgets the batches before sequence number `seq`: a checkpoint holds what they say.
    pub(crate) fn trim(&mut self, seq: u64) {
        while let Some(&(first, blocks)) = self.live.front()
            && first < seq
        {
            self.used -= blocks;
            self.live.pop_front();
        }
    }

    /// Reads the next batch and moves behind it. `None` at the end of the journal.
    ///
    /// # Errors
    /// `Io` if the device cannot be read. Anything that is no valid batch is the end.
    pub(crate) fn read_next(&mut self) -> Result<Option<ReadBatch>> {
        let mut starts = vec![self.head];
        if self.head != 0 {
            starts.push(0); // I2
        }
        for at in starts {
            if let Some((batch, blocks)) = self.read_at(at)? {
                let skipped = if at == self.head {
                    0
                } else {
                    self.blocks - self.head
                };
                if self.used + skipped + blocks >= self.blocks {
                    return Ok(None); // a full lap: this batch is where reading began
                }
                self.live.push_back((self.seq, blocks + skipped));
                self.used += blocks + skipped;
                self.head = (at + blocks) % self.blocks;
                self.seq += 1;
                return Ok(Some(batch));
            }
        }
        Ok(None)
    }

    fn read_blocks(&self, at: u64, count: u64) -> Result<Vec<u8>> {
        let mut buffer = vec![0; (count * BLOCK) as usize];
        self.device
            .read_at((self.start + at) * BLOCK, &mut buffer)
            .map_err(|source| Error::io("cannot read the journal", source))?;
        Ok(buffer)
    }

    fn read_at(&self, at: u64) -> Result<Option<(ReadBatch, u64)>> {
        let Ok(header) = BatchHeader::decode(&self.read_blocks(at, 1)?) else {
            return Ok(None);
        };
        let expected = header.pool == self.pool && header.seq == self.seq;
        if !expected || header.blocks() > BATCH_BLOCKS_MAX || at + header.blocks() > self.blocks {
            return Ok(None);
        }
        let head = self.read_blocks(at, header.head_blocks())?;
        if header.verify(&head).is_err() {
            return Ok(None);
        }
        let mut reader = Reader(&head[BATCH_RECORDS..BATCH_RECORDS + header.records_len as usize]);
        let mut records = Vec::new();
        while !reader.0.is_empty() {
            // The checksum was right, so this program wrote something it cannot read.
            records.push(Record::decode(&mut reader)?);
        }
        let raw = self.read_blocks(at + header.head_blocks(), u64::from(header.data_blocks))?;
        let data: Vec<Arc<Page>> = raw
            .chunks_exact(BLOCK_SIZE)
            .map(|chunk| {
                let mut page = Arc::new([0; BLOCK_SIZE]);
                Arc::make_mut(&mut page).copy_from_slice(chunk);
                page
            })
            .collect();
        let sums = records.iter().filter_map(|record| match record {
            Record::Block { crc, .. } => Some(*crc),
            _ => None,
        });
        let sums: Vec<u32> = sums.collect();
        let whole = sums.len() == data.len()
            && sums
                .iter()
                .zip(&data)
                .all(|(sum, page)| crc32c(&page[..]) == *sum);
        if !whole {
            return Ok(None);
        }
        Ok(Some((ReadBatch { records, data }, header.blocks())))
    }
}

/// The bytes of a batch: header and records, padded, then the data blocks.
fn encode(pool: u64, seq: u64, batch: &Batch) -> Vec<u8> {
    let mut bytes = vec![0; BATCH_RECORDS];
    let mut data = Vec::new();
    for item in &batch.items {
        match item {
            Pending::Block(ino, block, staged) => match &staged.data {
                Some(page) => {
                    let crc = staged.crc;
                    Record::Block {
                        ino: *ino,
                        block: *block,
                        crc,
                    }
                    .encode(&mut bytes);
                    data.push(page);
                }
                None => Record::Zero {
                    ino: *ino,
                    block: *block,
                }
                .encode(&mut bytes),
            },
            Pending::Record(record) => record.encode(&mut bytes),
        }
    }
    batch
        .touches
        .iter()
        .for_each(|record| record.encode(&mut bytes));
    let header = BatchHeader {
        pool,
        seq,
        records_len: (bytes.len() - BATCH_RECORDS) as u32,
        data_blocks: data.len() as u32,
    };
    bytes.resize((header.head_blocks() * BLOCK) as usize, 0);
    header.encode(&mut bytes);
    bytes.reserve_exact(data.len() * BLOCK_SIZE);
    data.into_iter()
        .for_each(|page| bytes.extend_from_slice(&page[..]));
    bytes
}
