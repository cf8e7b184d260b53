//! The heartbeat block: who has the pool open for writing, on whichever host.

use super::{Page, TIME_LEN, check_reserved, get_time, get_u16, get_u32, get_u64, page_crc};
use super::{put_time, put_u16, put_u32, put_u64};
use crate::error::{Error, Result};
use crate::units::{BLOCK_SIZE, SECTOR_SIZE, Time};

/// First bytes of the block while somebody has the pool open.
pub const HB_MAGIC: [u8; 8] = *b"NDPBEAT1";
/// Block of the pool where it stands.
pub const HB_BLOCK: u64 = 2;

/// Offset of the magic number.
pub const HB_MAGIC_AT: usize = 0;
/// Offset of the CRC-32C of the block, this field counted as zero (u32).
pub const HB_CRC: usize = 8;
/// Offset of the length of the host name (u16).
pub const HB_HOST_LEN: usize = 12;
/// Offset of the identity of the pool (16 bytes).
pub const HB_POOL: usize = 16;
/// Offset of the random identity of the opening (16 bytes).
pub const HB_OWNER: usize = 32;
/// Offset of the identity of the running system (16 bytes).
pub const HB_BOOT: usize = 48;
/// Offset of the number of the beat (u64).
pub const HB_SEQ: usize = 64;
/// Offset of the time of the beat.
pub const HB_TIME: usize = 72;
/// Offset of the process (u32).
pub const HB_PID: usize = HB_TIME + TIME_LEN;
/// Offset of the milliseconds between two beats (u32).
pub const HB_INTERVAL: usize = 88;
/// Offset of the host name.
pub const HB_HOST: usize = 96;
/// Longest host name kept, in bytes; it is cut.
pub const HB_HOST_MAX: usize = 256;
const HB_END: usize = HB_HOST + HB_HOST_MAX;
const _: () = assert!(HB_END <= SECTOR_SIZE, "a beat is never torn");

/// A heartbeat whose bytes were checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// Identity of the pool.
    pub pool: [u8; 16],
    /// Random: differs each time the pool is opened.
    pub owner: [u8; 16],
    /// Identity of the running system, which changes when it starts again.
    pub boot: [u8; 16],
    /// Number of the beat.
    pub seq: u64,
    /// When it was written, by the clock of its host: for people only.
    pub time: Time,
    /// Process that has the pool open.
    pub pid: u32,
    /// Milliseconds between two beats.
    pub interval_ms: u32,
    /// Name of the host, for people only.
    pub host: String,
}

impl Heartbeat {
    /// Encodes the block.
    pub fn encode(&self) -> Box<Page> {
        let mut b = Box::new([0; BLOCK_SIZE]);
        b[..8].copy_from_slice(&HB_MAGIC);
        b[HB_POOL..HB_POOL + 16].copy_from_slice(&self.pool);
        b[HB_OWNER..HB_OWNER + 16].copy_from_slice(&self.owner);
        b[HB_BOOT..HB_BOOT + 16].copy_from_slice(&self.boot);
        put_u64(&mut b[..], HB_SEQ, self.seq);
        put_time(&mut b[..], HB_TIME, self.time);
        put_u32(&mut b[..], HB_PID, self.pid);
        put_u32(&mut b[..], HB_INTERVAL, self.interval_ms);
        let host = self.host.as_bytes();
        let len = host.len().min(HB_HOST_MAX);
        put_u16(&mut b[..], HB_HOST_LEN, len as u16);
        b[HB_HOST..HB_HOST + len].copy_from_slice(&host[..len]);
        let crc = page_crc(&b[..], HB_CRC);
        put_u32(&mut b[..], HB_CRC, crc);
        b
    }

    /// Checks and decodes a block. `None`: nobody has the pool open.
    ///
    /// # Errors
    /// `Corrupt` if it is neither empty nor a valid heartbeat.
    pub fn decode(b: &Page) -> Result<Option<Self>> {
        if super::is_zero(b) {
            return Ok(None);
        }
        let len = usize::from(get_u16(b, HB_HOST_LEN));
        if b[..8] != HB_MAGIC || get_u32(b, HB_CRC) != page_crc(b, HB_CRC) || len > HB_HOST_MAX {
            return Err(Error::corrupt("the heartbeat block is damaged"));
        }
        check_reserved(&b[14..HB_POOL], "heartbeat")?;
        check_reserved(&b[HB_INTERVAL + 4..HB_HOST], "heartbeat")?;
        check_reserved(&b[HB_END..], "heartbeat")?;
        let id = |at: usize| {
            let mut id = [0; 16];
            id.copy_from_slice(&b[at..at + 16]);
            id
        };
        Ok(Some(Self {
            pool: id(HB_POOL),
            owner: id(HB_OWNER),
            boot: id(HB_BOOT),
            seq: get_u64(b, HB_SEQ),
            time: get_time(b, HB_TIME),
            pid: get_u32(b, HB_PID),
            interval_ms: get_u32(b, HB_INTERVAL),
            host: String::from_utf8_lossy(&b[HB_HOST..HB_HOST + len]).into_owned(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heartbeats_round_trip_and_damage_is_noticed() {
        let beat = Heartbeat {
            pool: [1; 16],
            owner: [2; 16],
            boot: [3; 16],
            seq: 4,
            time: Time { secs: 5, nanos: 6 },
            pid: 7,
            interval_ms: 1000,
            host: "a host".into(),
        };
        let page = beat.encode();
        assert_eq!(Heartbeat::decode(&page).unwrap(), Some(beat));
        assert_eq!(Heartbeat::decode(&[0; BLOCK_SIZE]).unwrap(), None);
        for at in (0..BLOCK_SIZE).step_by(7) {
            let mut bad = page.clone();
            bad[at] ^= 0x10;
            assert!(Heartbeat::decode(&bad).is_err(), "flipped at {at}");
        }
    }
}
