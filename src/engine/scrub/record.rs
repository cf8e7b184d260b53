//! What a scrub leaves behind for the next one: how far it came, and what it found. Kept as an
//! extended attribute of the root directory, so the journal and the checkpoints make it as durable
//! as anything else; specified in `docs/format.md`.

use crate::error::{Error, Result};
use crate::ondisk::{get_time, get_u32, get_u64, put_time, put_u32, put_u64};
use crate::units::Time;

/// Name of the attribute.
pub(super) const ATTRIBUTE: &[u8] = b"trusted.nodupe.scrub";

/// Most runs of suspected blocks that are kept: 48 KiB.
pub(super) const RUNS_MAX: usize = 4096;

const VERSION: u32 = 1;
const STATE: usize = 4;
const GENERATION: usize = 8;
const POSITION: usize = 16;
const DONE: usize = 24;
const TOTAL: usize = 32;
const DAMAGED: usize = 40;
const FILES: usize = 48;
const OTHERS: usize = 56;
const STARTED: usize = 64;
const ENDED: usize = 76;
const RUNS: usize = 88;
const RUN_LEN: usize = 12;

/// The record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Kept {
    /// It came to its end.
    pub(super) finished: bool,
    /// Generation of the newest checkpoint when it began.
    pub(super) generation: u64,
    /// Block of the pool to go on with.
    pub(super) position: u64,
    /// Blocks in use that were read, and that there were at the beginning.
    pub(super) done: u64,
    pub(super) total: u64,
    /// Damaged blocks, files with such, and findings that are no files.
    pub(super) damaged: u64,
    pub(super) files: u64,
    pub(super) others: u64,
    pub(super) started: Time,
    /// The end, or the last time that this was written.
    pub(super) ended: Time,
    /// Blocks that were not what their checksum says: first and number.
    pub(super) suspects: Vec<(u64, u32)>,
}

impl Kept {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; RUNS];
        put_u32(&mut bytes, 0, VERSION);
        bytes[STATE] = u8::from(self.finished);
        for (at, value) in [
            (GENERATION, self.generation),
            (POSITION, self.position),
            (DONE, self.done),
            (TOTAL, self.total),
            (DAMAGED, self.damaged),
            (FILES, self.files),
            (OTHERS, self.others),
        ] {
            put_u64(&mut bytes, at, value);
        }
        put_time(&mut bytes, STARTED, self.started);
        put_time(&mut bytes, ENDED, self.ended);
        for (first, count) in self.suspects.iter().take(RUNS_MAX) {
            bytes.extend_from_slice(&first.to_le_bytes());
            bytes.extend_from_slice(&count.to_le_bytes());
        }
        bytes
    }

    /// # Errors
    /// `Corrupt` if it is of another version, or nothing that a scrub wrote.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        let whole = bytes.len() >= RUNS && (bytes.len() - RUNS).is_multiple_of(RUN_LEN);
        if !whole || get_u32(bytes, 0) != VERSION || bytes[STATE] > 1 {
            return Err(Error::corrupt("the record of the last scrub is malformed"));
        }
        let runs = bytes[RUNS..].chunks_exact(RUN_LEN).take(RUNS_MAX);
        Ok(Self {
            finished: bytes[STATE] == 1,
            generation: get_u64(bytes, GENERATION),
            position: get_u64(bytes, POSITION),
            done: get_u64(bytes, DONE),
            total: get_u64(bytes, TOTAL),
            damaged: get_u64(bytes, DAMAGED),
            files: get_u64(bytes, FILES),
            others: get_u64(bytes, OTHERS),
            started: get_time(bytes, STARTED),
            ended: get_time(bytes, ENDED),
            suspects: runs.map(|run| (get_u64(run, 0), get_u32(run, 8))).collect(),
        })
    }
}

/// Blocks in order as runs.
pub(super) fn runs_of(blocks: impl Iterator<Item = u64>) -> Vec<(u64, u32)> {
    let mut runs: Vec<(u64, u32)> = Vec::new();
    for block in blocks {
        match runs.last_mut() {
            Some(last) if last.0 + u64::from(last.1) == block => last.1 += 1,
            _ => runs.push((block, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_and_others_are_refused() {
        let kept = Kept {
            finished: true,
            generation: 7,
            position: 8,
            done: 9,
            total: 10,
            damaged: 11,
            files: 12,
            others: 13,
            started: Time {
                secs: 14,
                nanos: 15,
            },
            ended: Time { secs: -1, nanos: 2 },
            suspects: runs_of([5, 6, 9, 20, 21, 22].into_iter()),
        };
        assert_eq!(kept.suspects, [(5, 2), (9, 1), (20, 3)]);
        let bytes = kept.encode();
        assert_eq!(Kept::decode(&bytes).unwrap(), kept);
        for len in 0..bytes.len() {
            if len < RUNS || !(len - RUNS).is_multiple_of(RUN_LEN) {
                assert!(Kept::decode(&bytes[..len]).is_err(), "{len}");
            }
        }
        let mut other = bytes;
        other[0] = 2;
        assert!(Kept::decode(&other).is_err());
    }
}
