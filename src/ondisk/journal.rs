//! The header of a journal batch: what one group commit wrote.
//!
//! A batch is contiguous in the ring: a header, the records right behind it (padded to a whole
//! block), then the data blocks. It is replayed wholly or not at all: the header's checksum
//! covers header and records, and the records carry the checksums of the data blocks.

use super::{check_reserved, get_u32, get_u64, put_u32, put_u64};
use crate::error::{Error, Result};
use crate::units::BLOCK_SIZE;

/// "NDPJRNL1" as a little-endian number.
pub const BATCH_MAGIC: u64 = 0x314c_4e52_4a50_444e;
/// Offset of the magic number (u64).
pub const BATCH_MAGIC_AT: usize = 0;
/// Offset of the pool's identity, the first 8 bytes of its UUID (u64).
pub const BATCH_POOL: usize = 8;
/// Offset of the sequence number (u64): one more than that of the batch before.
pub const BATCH_SEQ: usize = 16;
/// Offset of the number of bytes of records (u32).
pub const BATCH_RECORDS_LEN: usize = 24;
/// Offset of the number of data blocks (u32).
pub const BATCH_DATA_BLOCKS: usize = 28;
/// Offset of the CRC-32C (u32) of header and records, this field counted as zero.
pub const BATCH_CRC: usize = 32;
/// Offset of the first record.
pub const BATCH_RECORDS: usize = 64;

/// A decoded batch header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// Identity of the pool.
    pub pool: u64,
    /// Sequence number.
    pub seq: u64,
    /// Bytes of records.
    pub records_len: u32,
    /// Data blocks behind them.
    pub data_blocks: u32,
}

impl BatchHeader {
    /// Blocks of the header and the records.
    pub fn head_blocks(&self) -> u64 {
        (BATCH_RECORDS as u64 + u64::from(self.records_len)).div_ceil(BLOCK_SIZE as u64)
    }

    /// Blocks of the whole batch.
    pub fn blocks(&self) -> u64 {
        self.head_blocks() + u64::from(self.data_blocks)
    }

    /// Writes the header, and its checksum, at the front of `head`: the whole blocks that hold
    /// header and records, the records already in place.
    pub fn encode(&self, head: &mut [u8]) {
        assert_eq!(head.len() as u64, self.head_blocks() * BLOCK_SIZE as u64);
        put_u64(head, BATCH_MAGIC_AT, BATCH_MAGIC);
        put_u64(head, BATCH_POOL, self.pool);
        put_u64(head, BATCH_SEQ, self.seq);
        put_u32(head, BATCH_RECORDS_LEN, self.records_len);
        put_u32(head, BATCH_DATA_BLOCKS, self.data_blocks);
        let crc = self.crc(head);
        put_u32(head, BATCH_CRC, crc);
    }

    /// Reads the first block of a batch. Its checksum can be checked with
    /// [`verify`](Self::verify) once the records are read.
    ///
    /// # Errors
    /// `Corrupt` if it is not the header of a batch.
    pub fn decode(block: &[u8]) -> Result<Self> {
        if block.len() < BLOCK_SIZE || get_u64(block, BATCH_MAGIC_AT) != BATCH_MAGIC {
            return Err(Error::corrupt("no journal batch is there"));
        }
        check_reserved(&block[BATCH_CRC + 4..BATCH_RECORDS], "journal batch header")?;
        Ok(Self {
            pool: get_u64(block, BATCH_POOL),
            seq: get_u64(block, BATCH_SEQ),
            records_len: get_u32(block, BATCH_RECORDS_LEN),
            data_blocks: get_u32(block, BATCH_DATA_BLOCKS),
        })
    }

    /// Checks the checksum over header and records.
    ///
    /// # Errors
    /// `Corrupt` if it does not match: the batch was cut by a crash, or damaged.
    pub fn verify(&self, head: &[u8]) -> Result<()> {
        if head.len() as u64 != self.head_blocks() * BLOCK_SIZE as u64
            || get_u32(head, BATCH_CRC) != self.crc(head)
        {
            return Err(Error::corrupt("journal batch has a wrong checksum"));
        }
        Ok(())
    }

    fn crc(&self, head: &[u8]) -> u32 {
        let end = BATCH_RECORDS + self.records_len as usize;
        super::page_crc(&head[..end], BATCH_CRC)
    }
}
