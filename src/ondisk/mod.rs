//! Layer 1: bytes to structs and back. THE on-disk format, specified in `docs/format.md`.
//!
//! No I/O, no locks, no policy. Conventions:
//!
//! 1. Little-endian; offsets and sizes are constants that a test compares with the document.
//! 2. Every metadata block carries its kind, its own address, the generation it was written in
//!    and a CRC-32C, and decoding checks all of them (and the identity of the pool).
//! 3. Reserved bytes are written as zero and required to be zero.
//! 4. Decoding is total: any bytes give a value or an error, never a panic.

pub mod extent;
pub mod heartbeat;
pub mod inode;
pub mod journal;
pub mod node;
pub mod record;
pub mod superblock;

use crate::error::{Error, Result};
use crate::units::{BLOCK_SIZE, Time};

/// The bytes of one block.
pub type Page = [u8; BLOCK_SIZE];

/// CRC-32C (Castagnoli, reflected, as in iSCSI, RFC 3720 appendix B.4).
pub fn crc32c(bytes: &[u8]) -> u32 {
    // The algorithm has 32 bits, so the upper half of the result is zero.
    (crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) & 0xffff_ffff) as u32
}

/// CRC-32C of a block whose four checksum bytes at `crc_at` count as zero.
pub(crate) fn page_crc(page: &[u8], crc_at: usize) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(&page[..crc_at]);
    digest.update(&[0; 4]);
    digest.update(&page[crc_at + 4..]);
    (digest.finalize() & 0xffff_ffff) as u32
}

/// True if every byte is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(256)
        .all(|chunk| chunk.iter().fold(0, |any, byte| any | byte) == 0)
}

pub(crate) fn get_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn get_u32(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

pub(crate) fn get_u64(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

pub(crate) fn put_u16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Size of a [`Time`] on disk: seconds (i64) and nanoseconds (u32).
pub const TIME_LEN: usize = 12;

pub(crate) fn get_time(bytes: &[u8], at: usize) -> Time {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    Time {
        secs: i64::from_le_bytes(raw),
        // Total, as all decoding: no value makes a time that callers cannot compute with.
        nanos: get_u32(bytes, at + 8).min(999_999_999),
    }
}

pub(crate) fn put_time(bytes: &mut [u8], at: usize, time: Time) {
    bytes[at..at + 8].copy_from_slice(&time.secs.to_le_bytes());
    put_u32(bytes, at + 8, time.nanos);
}

/// Fails unless every reserved byte is zero.
pub(crate) fn check_reserved(bytes: &[u8], what: &str) -> Result<()> {
    if is_zero(bytes) {
        Ok(())
    } else {
        Err(Error::corrupt(format!(
            "reserved bytes are not zero: {what}"
        )))
    }
}
