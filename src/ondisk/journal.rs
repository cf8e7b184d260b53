//! The header of a journal batch: what one group commit wrote.
//!
//! A batch is contiguous in the ring: a header, the records right behind it (padded to a whole
//! block), then the data blocks. It is replayed wholly or not at all: the header's checksum
//! covers header and records, and the records carry the checksums of the data blocks.
//!
//! Data blocks hold whatever a guest wrote, a forged batch too. What tells a batch from its copy
//! is the seal, which needs the secret key of the pool, and the block where it says it begins.

use std::hash::Hasher;

use siphasher::sip::SipHasher13;

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
/// Offset of the sequence number up to which all batches were durable when this one was written
/// (u64).
pub const BATCH_DURABLE: usize = 40;
/// Offset of the block of the ring where the batch begins (u64).
pub const BATCH_BLOCK: usize = 48;
/// Offset of the seal (u64): SipHash-1-3, with the pool's secret key, of header and records without
/// CRC and seal.
pub const BATCH_SEAL: usize = 56;
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
    /// All batches up to this sequence number were durable before this one was written.
    pub durable: u64,
    /// Block of the ring where it begins.
    pub block: u64,
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

    /// Writes the header, its seal with the pool's secret `key` and its checksum, at the front of
    /// `head`: the whole blocks that hold header and records, the records already in place.
    pub fn encode(&self, head: &mut [u8], key: &[u8; 16]) {
        assert_eq!(head.len() as u64, self.head_blocks() * BLOCK_SIZE as u64);
        put_u64(head, BATCH_MAGIC_AT, BATCH_MAGIC);
        put_u64(head, BATCH_POOL, self.pool);
        put_u64(head, BATCH_SEQ, self.seq);
        put_u32(head, BATCH_RECORDS_LEN, self.records_len);
        put_u32(head, BATCH_DATA_BLOCKS, self.data_blocks);
        put_u64(head, BATCH_DURABLE, self.durable);
        put_u64(head, BATCH_BLOCK, self.block);
        let seal = self.seal(head, key);
        put_u64(head, BATCH_SEAL, seal);
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
        check_reserved(&block[BATCH_CRC + 4..BATCH_DURABLE], "journal batch header")?;
        Ok(Self {
            pool: get_u64(block, BATCH_POOL),
            seq: get_u64(block, BATCH_SEQ),
            records_len: get_u32(block, BATCH_RECORDS_LEN),
            data_blocks: get_u32(block, BATCH_DATA_BLOCKS),
            durable: get_u64(block, BATCH_DURABLE),
            block: get_u64(block, BATCH_BLOCK),
        })
    }

    /// Checks the checksum and the seal over header and records.
    ///
    /// # Errors
    /// `Corrupt` if one does not match: the batch was cut by a crash, damaged, or never written by
    /// this pool.
    pub fn verify(&self, head: &[u8], key: &[u8; 16]) -> Result<()> {
        if head.len() as u64 != self.head_blocks() * BLOCK_SIZE as u64
            || get_u32(head, BATCH_CRC) != self.crc(head)
        {
            return Err(Error::corrupt("journal batch has a wrong checksum"));
        }
        if get_u64(head, BATCH_SEAL) != self.seal(head, key) {
            return Err(Error::corrupt("journal batch has a wrong seal"));
        }
        Ok(())
    }

    fn seal(&self, head: &[u8], key: &[u8; 16]) -> u64 {
        batch_seal(&head[..BATCH_RECORDS + self.records_len as usize], key)
    }

    fn crc(&self, head: &[u8]) -> u32 {
        let end = BATCH_RECORDS + self.records_len as usize;
        super::page_crc(&head[..end], BATCH_CRC)
    }
}

/// The seal of a batch, of its header and records: SipHash-1-3 with the pool's secret `key`.
pub fn batch_seal(head: &[u8], key: &[u8; 16]) -> u64 {
    let mut hasher = SipHasher13::new_with_key(key);
    hasher.write(&head[..BATCH_CRC]);
    hasher.write(&head[BATCH_DURABLE..BATCH_SEAL]);
    hasher.write(&head[BATCH_RECORDS..]);
    hasher.finish()
}
