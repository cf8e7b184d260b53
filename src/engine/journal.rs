//! The journal ring: appending batches and reading them back.
//!
//! Invariants:
//!
//! 1. Batches have consecutive sequence numbers; one is written when the one before was made
//!    durable, as its header says. The first one that is not valid ends the journal. A crash can take the last one only:
//!    if a later one is there, the device lost what it had made durable ([`Journal::lost`]).
//! 2. A batch is contiguous. One that does not fit before the end of the ring starts at block 0;
//!    a reader that finds nothing at its position looks there for the same sequence number.
//! 3. A batch never overwrites one that a checkpoint has not made obsolete.
//! 4. A part of the ring is kept for the batch that a checkpoint itself writes.
//! 5. No batch is written behind a superblock that says that the pool was closed cleanly
//!    (`commit.rs`). So if none follows a clean one, none was lost, and nobody needs to search; but for a
//!    clean one from a copy, which may be older than what is gone.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::device::{BlockDevice, BouncePool};
use crate::error::{Error, Kind, Result};
use crate::ondisk::journal::{BATCH_RECORDS, BatchHeader};
use crate::ondisk::record::Record;
use crate::ondisk::superblock::Superblock;
use crate::ondisk::{Page, crc32c};
use crate::units::BLOCK_SIZE;

use super::stage::{Batch, Pending};
use super::syncs::Syncs;
use super::work;

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Blocks of the largest batch that is believed: 256 MiB, eight times what may wait for one
/// (`Limits::pending_bytes`), so that a forged header cannot ask for all memory.
const BATCH_BLOCKS_MAX: u64 = 256 * 1024 * 1024 / BLOCK;

/// Bytes of the ring read at once: large enough for a disk to be at its full speed.
const AHEAD_BLOCKS: u64 = 8 * 1024 * 1024 / BLOCK;
/// Bytes of the ring read first: 128 KiB.
const AHEAD_BLOCKS_MIN: u64 = 128 * 1024 / BLOCK;
/// A batch has less than this share of the ring: an eighth may wait for it, and the operation that
/// came last may have added a sixteenth (`Limits::pending_bytes`).
const BATCH_SHARE: u64 = 4;
/// Blocks that a batch reaches at most: twice the 32 MiB that may wait for it.
const REACH_BLOCKS_MAX: u64 = 64 * 1024 * 1024 / BLOCK;
/// Blocks read at once in search of a later batch: 1 MiB.
const SCAN_BLOCKS: u64 = 256;

/// The proof that the journal lost a batch that was durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lost {
    /// Sequence number of the batch that is not there.
    pub(crate) missing: u64,
    /// Sequence number of one that was written later.
    pub(crate) later: u64,
    /// Block of the ring's device where that one begins.
    pub(crate) block: u64,
}

/// Where the next batch goes, and what is in use.
#[derive(Debug)]
pub(crate) struct Journal {
    device: Arc<dyn BlockDevice>,
    syncs: Arc<Syncs>,
    pool: u64,
    /// Secret key of the pool, for the seals.
    key: [u8; 16],
    /// First block of the ring on its device.
    start: u64,
    /// Blocks of the ring.
    blocks: u64,
    /// Sequence number of the next batch.
    seq: u64,
    /// Block of the ring where it goes.
    head: u64,
    /// Batches that a checkpoint has not made obsolete.
    live: VecDeque<Live>,
    /// Their blocks.
    used: u64,
    /// The work of replaying them (`work.rs`).
    work: u64,
    /// The last batch was written, and is not durable yet.
    unsynced: bool,
    /// For what is written: a part of a batch at a time.
    buffers: BouncePool,
    ahead: Ahead,
}

/// A batch that a checkpoint has not made obsolete.
#[derive(Debug)]
struct Live {
    seq: u64,
    /// With those skipped before it.
    blocks: u64,
    work: u64,
}

/// The cut of a checkpoint.
#[derive(Debug)]
pub(crate) struct Cut {
    /// Sequence number of the first batch behind it.
    pub(crate) seq: u64,
    /// Its block in the ring.
    pub(crate) pos: u64,
    /// What the ring had no room for: durable with the checkpoint. Until then nobody commits,
    /// because a batch behind it could not be replayed without it.
    pub(crate) held: Option<Batch>,
}

/// A batch read back.
#[derive(Debug)]
pub(crate) struct ReadBatch {
    pub(crate) records: Vec<Record>,
    pub(crate) data: Vec<Arc<Page>>,
    /// Blocks of the ring that it takes, with those skipped before it.
    taken: u64,
    /// Block of the ring behind it.
    next: u64,
}

impl ReadBatch {
    /// Bytes of memory that it takes, roughly.
    pub(crate) fn memory(&self) -> usize {
        self.data.len() * (BLOCK_SIZE + 64) + self.records.len() * size_of::<Record>()
    }
}

/// A part of the ring in memory, so that small batches need no read of their own.
#[derive(Default)]
struct Ahead {
    /// Its first block.
    at: u64,
    bytes: Vec<u8>,
    /// Where the first block begins in `bytes`: aligned, for direct transfers.
    start: usize,
    /// Blocks.
    count: u64,
}

impl std::fmt::Debug for Ahead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ahead({}, {})", self.at, self.count)
    }
}

impl Journal {
    /// The ring as a superblock describes it.
    pub(crate) fn new(device: Arc<dyn BlockDevice>, superblock: &Superblock) -> Self {
        Self {
            device,
            syncs: Arc::default(),
            pool: superblock.pool_id(),
            key: superblock.hash_key,
            start: superblock.journal_start,
            blocks: superblock.journal_blocks,
            seq: superblock.journal_seq,
            head: superblock.journal_pos,
            live: VecDeque::new(),
            used: 0,
            work: 0,
            unsynced: false,
            buffers: BouncePool::default(),
            ahead: Ahead::default(),
        }
    }

    /// Takes turns with those who sync `device`, if that is where the ring is.
    pub(crate) fn share(&mut self, device: &Arc<dyn BlockDevice>, syncs: &Arc<Syncs>) {
        if Arc::ptr_eq(&self.device, device) {
            self.syncs = Arc::clone(syncs);
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

    /// True if more than so many quarters are in use: of the ring, or of the work that it may
    /// hold.
    pub(crate) fn is_over(&self, quarters: u64) -> bool {
        self.used * 4 > self.blocks * quarters || self.work * 4 > work::WORK_MAX * quarters
    }

    /// True if the ring may hold so much more work. One that holds none takes anything.
    pub(crate) fn has_time(&self, work: u64) -> bool {
        self.live.is_empty() || (self.work + work) * 4 <= work::WORK_MAX * 3
    }

    /// Asks the host to keep space for the ring.
    pub(crate) fn preallocate(&self) -> std::io::Result<()> {
        self.device
            .preallocate(self.start * BLOCK, self.blocks * BLOCK)
    }

    /// Writes a batch, once the one before is durable.
    ///
    /// # Errors
    /// `NoSpace` if the host had no space to overwrite the ring, as copy-on-write filesystems may:
    /// nothing changed, and the same place is written again next time. Any other error leaves the
    /// ring unknown.
    pub(crate) fn append(&mut self, batch: &Batch) -> Result<()> {
        self.sync()?; // I1
        self.ahead = Ahead::default(); // what it holds is going to change
        let (mut head, pages, mut header) = encode(self.pool, self.seq, batch);
        let blocks = header.blocks();
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
        header.block = at;
        header.encode(&mut head, &self.key);
        self.write(at, &head, &pages)
            .map_err(|source| Error::io("cannot write the journal", source))?;
        self.unsynced = true;
        self.take(blocks + skipped, batch.work + work::BATCH);
        self.head = (at + blocks) % self.blocks;
        self.seq += 1;
        Ok(())
    }

    /// True if the last batch is not durable yet.
    pub(crate) fn is_unsynced(&self) -> bool {
        self.unsynced
    }

    /// Makes the last batch durable.
    ///
    /// # Errors
    /// `Io`: what the ring holds of it is unknown.
    pub(crate) fn sync(&mut self) -> Result<()> {
        if self.unsynced {
            // Whatever the reason: what the device has of it is unknown.
            self.syncs.sync(&*self.device).map_err(|source| {
                Error::new(Kind::Io, format!("cannot sync the journal: {source}"))
            })?;
            self.unsynced = false;
        }
        Ok(())
    }

    /// Writes a batch at block `at` of the ring, in pieces.
    fn write(&self, at: u64, head: &[u8], pages: &[&Page]) -> std::io::Result<()> {
        let whole = head.len() + pages.len() * BLOCK_SIZE;
        let mut blocks = head
            .chunks_exact(BLOCK_SIZE)
            .chain(pages.iter().map(|page| &page[..]));
        let mut done = 0;
        while done < whole {
            let mut buffer = self
                .buffers
                .take((whole - done).min(self.buffers.chunk_max()));
            for (place, block) in buffer.chunks_exact_mut(BLOCK_SIZE).zip(blocks.by_ref()) {
                place.copy_from_slice(block);
            }
            self.device
                .write_at((self.start + at) * BLOCK + done as u64, &buffer)?;
            done += buffer.len();
        }
        Ok(())
    }

    /// Forgets the batches before sequence number `seq`: a checkpoint holds what they say.
    pub(crate) fn trim(&mut self, seq: u64) {
        while let Some(batch) = self.live.pop_front_if(|batch| batch.seq < seq) {
            self.used -= batch.blocks;
            self.work -= batch.work;
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
            if let Some(mut batch) = self.read_at(at)? {
                if at != self.head {
                    batch.taken += self.blocks - self.head;
                }
                if self.used + batch.taken >= self.blocks {
                    return Ok(None); // a full lap: this batch is where reading began
                }
                self.move_behind(&batch);
                return Ok(Some(batch));
            }
        }
        Ok(None)
    }

    /// Moves behind the next batch, which another reader of the same ring has read.
    pub(crate) fn move_behind(&mut self, batch: &ReadBatch) {
        let work: u64 = batch.records.iter().map(work::of).sum();
        self.take(batch.taken, work + work::BATCH);
        self.head = batch.next;
        self.seq += 1;
    }

    /// The batch that comes next is in the ring.
    fn take(&mut self, blocks: u64, work: u64) {
        let seq = self.seq;
        self.live.push_back(Live { seq, blocks, work });
        self.used += blocks;
        self.work += work;
    }

    /// Replaying the batch before this position is `work` more than its records tell.
    pub(crate) fn add_work(&mut self, work: u64) {
        if let Some(last) = self.live.back_mut() {
            last.work += work;
            self.work += work;
        }
    }

    /// To be asked at the end of the journal. A batch that was written after the missing one had
    /// been made durable, and is still there, proves that the device lost what it had promised to
    /// keep: the sequence numbers of the missing and of the later batch, and where that one is.
    ///
    /// Reads as far as the missing batch can have reached, from where it began and from block 0,
    /// so that opening a pool costs no reading of the whole ring. Headers that promise long batches
    /// are believed within a budget: forged ones must not make the search take hours.
    ///
    /// # Errors
    /// `Io` if the device cannot be read.
    pub(crate) fn lost(&self) -> Result<Option<Lost>> {
        let reach = (self.blocks / BATCH_SHARE).min(REACH_BLOCKS_MAX);
        let end = (self.head + reach).min(self.blocks);
        let wraps = self.head + 2 * reach > self.blocks;
        let front = if wraps { reach.min(self.head) } else { 0 };
        let mut budget = 8 * reach;
        for (mut at, end) in [(self.head, end), (0, front)] {
            while at < end {
                let count = (end - at).min(SCAN_BLOCKS);
                let blocks = self.read_blocks(at, count)?;
                for (block, bytes) in (at..).zip(blocks.chunks_exact(BLOCK_SIZE)) {
                    let Ok(header) = BatchHeader::decode(bytes) else {
                        continue;
                    };
                    if !self.is_later(&header) || !self.is_likely(&header, block) {
                        continue;
                    }
                    let Some(left) = budget.checked_sub(header.head_blocks()) else {
                        log::warn!(
                            "the search for lost batches was given up: too many promise much"
                        );
                        return Ok(None);
                    };
                    budget = left;
                    if self.is_whole(&header, block)? {
                        return Ok(Some(Lost {
                            missing: self.seq,
                            later: header.seq,
                            block: self.start + block,
                        }));
                    }
                }
                at += count;
            }
        }
        Ok(None)
    }

    /// To be asked at the end of the journal, if it is a loss: the blocks of the ring's device where
    /// batches may begin that were written after the missing one, in all of the ring. What cannot
    /// be read counts as one. None of the blocks is of a batch before the loss.
    pub(crate) fn dead(&self) -> Vec<u64> {
        let mut dead = Vec::new();
        let unused = self.blocks - self.used;
        let end = (self.head + unused).min(self.blocks);
        let front = unused - (end - self.head);
        for (mut at, end) in [(self.head, end), (0, front)] {
            while at < end {
                let count = (end - at).min(SCAN_BLOCKS);
                let read = self.read_blocks(at, count).ok();
                for index in 0..count {
                    let from = index as usize * BLOCK_SIZE;
                    // Nobody needs what is there: the seal, which takes long if much is promised,
                    // is not looked at.
                    let is_dead = read.as_ref().is_none_or(|bytes| {
                        BatchHeader::decode(&bytes[from..from + BLOCK_SIZE]).is_ok_and(|header| {
                            self.is_later(&header) && self.is_likely(&header, at + index)
                        })
                    });
                    if is_dead {
                        dead.push(self.start + at + index);
                    }
                }
                at += count;
            }
        }
        dead
    }

    /// True if `header` says that it was written when the next batch had been made durable.
    fn is_later(&self, header: &BatchHeader) -> bool {
        header.durable >= self.seq && header.seq > header.durable
    }

    /// True if `header`, found at block `at` of the ring, can be that of a batch of this pool.
    fn is_likely(&self, header: &BatchHeader, at: u64) -> bool {
        let fits = header.blocks() <= BATCH_BLOCKS_MAX && at + header.blocks() <= self.blocks;
        header.pool == self.pool && header.block == at && fits
    }

    /// True if the batch at block `at` of the ring, a likely one, is of this pool.
    fn is_whole(&self, header: &BatchHeader, at: u64) -> Result<bool> {
        let head = self.read_blocks(at, header.head_blocks())?;
        Ok(header.verify(&head, &self.key).is_ok())
    }

    fn read_blocks(&self, at: u64, count: u64) -> Result<Vec<u8>> {
        let mut buffer = vec![0; (count * BLOCK) as usize];
        self.device
            .read_at((self.start + at) * BLOCK, &mut buffer)
            .map_err(|source| Error::io("cannot read the journal", source))?;
        Ok(buffer)
    }

    /// Forgets what was read ahead.
    pub(crate) fn end_reading(&mut self) {
        self.ahead = Ahead::default();
    }

    /// The bytes of `count` blocks from `at` on.
    fn look(&mut self, at: u64, count: u64) -> Result<&[u8]> {
        let ahead = &mut self.ahead;
        if at < ahead.at || at + count > ahead.at + ahead.count {
            // Little at first, and more as long as batches follow: an empty journal costs nothing.
            let follows = ahead.count > 0 && (ahead.at..=ahead.at + ahead.count).contains(&at);
            let more = if follows { 4 * ahead.count } else { 0 };
            let more = more.clamp(AHEAD_BLOCKS_MIN, AHEAD_BLOCKS);
            // A damaged block behind the end of the journal is nobody's concern.
            let many = count.max(more).min(self.blocks - at);
            if ahead.fill(&*self.device, self.start, at, many).is_err() {
                ahead
                    .fill(&*self.device, self.start, at, count)
                    .map_err(|source| Error::io("cannot read the journal", source))?;
            }
        }
        let from = ahead.start + ((at - ahead.at) * BLOCK) as usize;
        Ok(&ahead.bytes[from..from + (count * BLOCK) as usize])
    }

    fn read_at(&mut self, at: u64) -> Result<Option<ReadBatch>> {
        let (pool, seq, blocks) = (self.pool, self.seq, self.blocks);
        let Ok(header) = BatchHeader::decode(self.look(at, 1)?) else {
            return Ok(None);
        };
        let expected = header.pool == pool && header.seq == seq && header.block == at;
        if !expected || header.blocks() > BATCH_BLOCKS_MAX || at + header.blocks() > blocks {
            return Ok(None);
        }
        let key = self.key;
        let head = self.look(at, header.head_blocks())?;
        if header.verify(head, &key).is_err() {
            return Ok(None);
        }
        // The checksum was right, so this program wrote something it cannot read.
        let records =
            Record::decode_all(&head[BATCH_RECORDS..BATCH_RECORDS + header.records_len as usize])?;
        let raw = self.look(at + header.head_blocks(), u64::from(header.data_blocks))?;
        let (pages, _) = raw.as_chunks::<BLOCK_SIZE>();
        let mut sums = records.iter().filter_map(|record| match record {
            Record::Block { crc, .. } => Some(*crc),
            _ => None,
        });
        let whole = pages.iter().all(|page| sums.next() == Some(crc32c(page)));
        if !whole || sums.next().is_some() {
            return Ok(None);
        }
        let data = pages.iter().map(|page| Arc::new(*page)).collect();
        Ok(Some(ReadBatch {
            records,
            data,
            taken: header.blocks(),
            next: (at + header.blocks()) % blocks,
        }))
    }
}

impl Ahead {
    fn fill(
        &mut self,
        device: &dyn BlockDevice,
        ring: u64,
        at: u64,
        count: u64,
    ) -> std::io::Result<()> {
        let len = (count * BLOCK) as usize;
        if self.bytes.len() < len + BLOCK_SIZE {
            self.bytes = vec![0; len + BLOCK_SIZE];
            self.start = self.bytes.as_ptr().align_offset(BLOCK_SIZE);
        }
        self.count = 0;
        device.read_at(
            (ring + at) * BLOCK,
            &mut self.bytes[self.start..self.start + len],
        )?;
        (self.at, self.count) = (at, count);
        Ok(())
    }
}

/// A batch: room for the header, with records and padding; the data blocks; and the header, which
/// lacks the place.
fn encode(pool: u64, seq: u64, batch: &Batch) -> (Vec<u8>, Vec<&Page>, BatchHeader) {
    let mut bytes = vec![0; BATCH_RECORDS];
    let mut data: Vec<&Page> = Vec::new();
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
        durable: seq - 1, // I1
        block: 0,
    };
    bytes.resize((header.head_blocks() * BLOCK) as usize, 0);
    (bytes, data, header)
}
