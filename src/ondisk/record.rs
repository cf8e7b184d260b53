//! Journal records: what happened, to be done again after a crash.
//!
//! Records are logical: replaying them in order on the trees of the last checkpoint gives the
//! state at the end of the journal, because each one carries everything that could differ
//! (inode numbers, times, sizes). The data of [`Record::Block`] follows the records of its
//! batch, one block each, in order.

use super::extent::{BLOCK_MAX, EXTENT_BLOCKS_MAX, Extent};
use super::inode::{
    FILE_BLOCKS_MAX, FILE_SIZE_MAX, NAME_MAX, NUMBER_MAX, TARGET_MAX, XATTR_VALUE_MAX, is_name,
};
use super::{get_time, get_u16, get_u32, get_u64};
use crate::error::{Error, Result};
use crate::units::{Ino, Time};

/// What a rename does when the new name is taken, on disk: 0 replace, 1 fail, 2 exchange.
pub type RenameCode = u8;

/// One journal record. Block numbers are file blocks unless they say otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Record {
    /// New contents of one block; `crc` is their CRC-32C.
    Block { ino: Ino, block: u64, crc: u32 },
    /// One block becomes zeros.
    Zero { ino: Ino, block: u64 },
    /// Blocks written in place: file blocks from `block` on now live in `extent`.
    Map {
        ino: Ino,
        block: u64,
        extent: Extent,
        sums: Vec<u32>,
    },
    /// Size and times after the blocks of this batch.
    Touch {
        ino: Ino,
        size: u64,
        mtime: Time,
        ctime: Time,
    },
    /// Attributes set by a caller; `mask` says which: 1 mode, 2 uid, 4 gid, 8 atime, 16 mtime,
    /// 32 ctime.
    SetAttr {
        ino: Ino,
        mask: u8,
        mode: u16,
        uid: u32,
        gid: u32,
        times: [Time; 3],
    },
    /// A new inode and its name.
    Create {
        dir: Ino,
        name: Vec<u8>,
        ino: Ino,
        generation: u64,
        kind: u8,
        mode: u16,
        uid: u32,
        gid: u32,
        rdev: u32,
        target: Vec<u8>,
        now: Time,
    },
    /// Another name.
    Link {
        ino: Ino,
        dir: Ino,
        name: Vec<u8>,
        now: Time,
    },
    /// A name removed; `directory` tells rmdir from unlink.
    Unlink {
        dir: Ino,
        name: Vec<u8>,
        directory: bool,
        now: Time,
    },
    /// A rename.
    Rename {
        dir: Ino,
        name: Vec<u8>,
        new_dir: Ino,
        new_name: Vec<u8>,
        mode: RenameCode,
        now: Time,
    },
    /// An extended attribute set.
    SetXattr {
        ino: Ino,
        name: Vec<u8>,
        value: Vec<u8>,
        now: Time,
    },
    /// An extended attribute removed.
    RemoveXattr { ino: Ino, name: Vec<u8>, now: Time },
    /// A new size; the tail of the last block was zeroed by a `Block` before.
    Truncate { ino: Ino, size: u64, now: Time },
    /// Whole blocks become holes.
    Punch {
        ino: Ino,
        block: u64,
        count: u64,
        now: Time,
    },
    /// `dst` becomes a clone of `src`, `size` bytes long; pinned: more will be shown later.
    Clone {
        src: Ino,
        dst: Ino,
        size: u64,
        pinned: bool,
        now: Time,
    },
    /// Blocks of `dst` become shared with `src`.
    CloneRange {
        src: Ino,
        block: u64,
        dst: Ino,
        dst_block: u64,
        count: u64,
    },
    /// A clone in pieces shows more.
    Show { dst: Ino, size: u64, now: Time },
    /// A clone in pieces ends.
    EndClone { dst: Ino },
}

struct Writer<'a>(&'a mut Vec<u8>);

impl Writer<'_> {
    fn u8(&mut self, v: u8) -> &mut Self {
        self.0.push(v);
        self
    }
    fn u16(&mut self, v: u16) -> &mut Self {
        self.0.extend_from_slice(&v.to_le_bytes());
        self
    }
    fn u32(&mut self, v: u32) -> &mut Self {
        self.0.extend_from_slice(&v.to_le_bytes());
        self
    }
    fn u64(&mut self, v: u64) -> &mut Self {
        self.0.extend_from_slice(&v.to_le_bytes());
        self
    }
    fn time(&mut self, v: Time) -> &mut Self {
        self.0.extend_from_slice(&v.secs.to_le_bytes());
        self.u32(v.nanos)
    }
    /// A length of 32 bits and the bytes.
    fn bytes(&mut self, v: &[u8]) -> &mut Self {
        self.u32(v.len() as u32);
        self.0.extend_from_slice(v);
        self
    }
}

/// Reads fields off the front of a slice; every method fails at its end.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        if self.0.len() < len {
            return Err(Error::corrupt("journal record is cut off"));
        }
        let (head, rest) = self.0.split_at(len);
        self.0 = rest;
        Ok(head)
    }
    fn u8(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }
    fn u16(&mut self) -> Result<u16> {
        Ok(get_u16(self.take(2)?, 0))
    }
    fn u32(&mut self) -> Result<u32> {
        Ok(get_u32(self.take(4)?, 0))
    }
    fn u64(&mut self) -> Result<u64> {
        Ok(get_u64(self.take(8)?, 0))
    }
    fn bounded(&mut self, most: u64) -> Result<u64> {
        let value = self.u64()?;
        if value > most {
            return Err(Error::corrupt(format!(
                "journal record has a number over the limit: {value}"
            )));
        }
        Ok(value)
    }
    fn ino(&mut self) -> Result<Ino> {
        match self.bounded(NUMBER_MAX)? {
            0 => Err(Error::corrupt("journal record is about inode 0")),
            ino => Ok(Ino(ino)),
        }
    }
    fn size(&mut self) -> Result<u64> {
        self.bounded(FILE_SIZE_MAX)
    }
    fn file_block(&mut self) -> Result<u64> {
        self.bounded(FILE_BLOCKS_MAX)
    }
    fn time(&mut self) -> Result<Time> {
        Ok(get_time(self.take(12)?, 0))
    }
    fn bytes(&mut self, most: usize) -> Result<Vec<u8>> {
        let len = self.u32()? as usize;
        if len > most {
            return Err(Error::corrupt(format!(
                "journal record has a value over the limit: len={len}"
            )));
        }
        Ok(self.take(len)?.to_vec())
    }
    fn name(&mut self) -> Result<Vec<u8>> {
        let name = self.bytes(NAME_MAX)?;
        if !is_name(&name) {
            return Err(Error::corrupt("journal record has a name that cannot be"));
        }
        Ok(name)
    }
    /// The name of an extended attribute.
    fn attribute(&mut self) -> Result<Vec<u8>> {
        let name = self.bytes(NAME_MAX)?;
        if name.is_empty() {
            return Err(Error::corrupt("journal record has an empty name"));
        }
        Ok(name)
    }
}

impl Record {
    /// Appends the record to `out`: a type byte, then its fields in the order of
    /// `docs/format.md`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut w = Writer(out);
        match self {
            Self::Block { ino, block, crc } => w.u8(1).u64(ino.0).u64(*block).u32(*crc),
            Self::Zero { ino, block } => w.u8(2).u64(ino.0).u64(*block),
            Self::Map {
                ino,
                block,
                extent,
                sums,
            } => {
                assert_eq!(sums.len(), extent.len as usize);
                w.u8(3)
                    .u64(ino.0)
                    .u64(*block)
                    .u64(extent.block)
                    .u32(extent.len);
                sums.iter().fold(&mut w, |w, sum| w.u32(*sum))
            }
            Self::Touch {
                ino,
                size,
                mtime,
                ctime,
            } => w.u8(4).u64(ino.0).u64(*size).time(*mtime).time(*ctime),
            Self::SetAttr {
                ino,
                mask,
                mode,
                uid,
                gid,
                times,
            } => {
                w.u8(5).u64(ino.0).u8(*mask).u16(*mode).u32(*uid).u32(*gid);
                w.time(times[0]).time(times[1]).time(times[2])
            }
            Self::Create {
                dir,
                name,
                ino,
                generation,
                kind,
                mode,
                uid,
                gid,
                rdev,
                target,
                now,
            } => {
                w.u8(6)
                    .u64(dir.0)
                    .bytes(name)
                    .u64(ino.0)
                    .u64(*generation)
                    .u8(*kind)
                    .u16(*mode);
                w.u32(*uid).u32(*gid).u32(*rdev).bytes(target).time(*now)
            }
            Self::Link {
                ino,
                dir,
                name,
                now,
            } => w.u8(7).u64(ino.0).u64(dir.0).bytes(name).time(*now),
            Self::Unlink {
                dir,
                name,
                directory,
                now,
            } => w
                .u8(8)
                .u64(dir.0)
                .bytes(name)
                .u8(u8::from(*directory))
                .time(*now),
            Self::Rename {
                dir,
                name,
                new_dir,
                new_name,
                mode,
                now,
            } => {
                w.u8(9)
                    .u64(dir.0)
                    .bytes(name)
                    .u64(new_dir.0)
                    .bytes(new_name);
                w.u8(*mode).time(*now)
            }
            Self::SetXattr {
                ino,
                name,
                value,
                now,
            } => w.u8(10).u64(ino.0).bytes(name).bytes(value).time(*now),
            Self::RemoveXattr { ino, name, now } => w.u8(11).u64(ino.0).bytes(name).time(*now),
            Self::Truncate { ino, size, now } => w.u8(12).u64(ino.0).u64(*size).time(*now),
            Self::Punch {
                ino,
                block,
                count,
                now,
            } => w.u8(13).u64(ino.0).u64(*block).u64(*count).time(*now),
            Self::Clone {
                src,
                dst,
                size,
                pinned,
                now,
            } => w
                .u8(14)
                .u64(src.0)
                .u64(dst.0)
                .u64(*size)
                .u8(u8::from(*pinned))
                .time(*now),
            Self::CloneRange {
                src,
                block,
                dst,
                dst_block,
                count,
            } => w
                .u8(15)
                .u64(src.0)
                .u64(*block)
                .u64(dst.0)
                .u64(*dst_block)
                .u64(*count),
            Self::Show { dst, size, now } => w.u8(16).u64(dst.0).u64(*size).time(*now),
            Self::EndClone { dst } => w.u8(17).u64(dst.0),
        };
    }

    /// Reads all records of a batch.
    ///
    /// # Errors
    /// `Corrupt` for an unknown type, a record that is cut off, or a value over its limit.
    pub fn decode_all(bytes: &[u8]) -> Result<Vec<Self>> {
        let mut reader = Reader(bytes);
        let mut records = Vec::new();
        while !reader.0.is_empty() {
            records.push(Self::decode(&mut reader)?);
        }
        Ok(records)
    }

    /// Reads one record off the front of `r`.
    ///
    /// # Errors
    /// `Corrupt` for an unknown type, a record that is cut off, or a number over its limit.
    pub(crate) fn decode(r: &mut Reader<'_>) -> Result<Self> {
        Ok(match r.u8()? {
            1 => Self::Block {
                ino: r.ino()?,
                block: r.file_block()?,
                crc: r.u32()?,
            },
            2 => Self::Zero {
                ino: r.ino()?,
                block: r.file_block()?,
            },
            3 => Self::decode_map(r)?,
            4 => Self::Touch {
                ino: r.ino()?,
                size: r.size()?,
                mtime: r.time()?,
                ctime: r.time()?,
            },
            5 => Self::SetAttr {
                ino: r.ino()?,
                mask: r.u8()?,
                mode: r.u16()?,
                uid: r.u32()?,
                gid: r.u32()?,
                times: [r.time()?, r.time()?, r.time()?],
            },
            6 => Self::Create {
                dir: r.ino()?,
                name: r.name()?,
                ino: r.ino()?,
                generation: r.u64()?,
                kind: r.u8()?,
                mode: r.u16()?,
                uid: r.u32()?,
                gid: r.u32()?,
                rdev: r.u32()?,
                target: r.bytes(TARGET_MAX)?,
                now: r.time()?,
            },
            7 => Self::Link {
                ino: r.ino()?,
                dir: r.ino()?,
                name: r.name()?,
                now: r.time()?,
            },
            8 => Self::Unlink {
                dir: r.ino()?,
                name: r.name()?,
                directory: r.u8()? != 0,
                now: r.time()?,
            },
            9 => Self::Rename {
                dir: r.ino()?,
                name: r.name()?,
                new_dir: r.ino()?,
                new_name: r.name()?,
                mode: r.u8()?,
                now: r.time()?,
            },
            10 => Self::SetXattr {
                ino: r.ino()?,
                name: r.attribute()?,
                value: r.bytes(XATTR_VALUE_MAX)?,
                now: r.time()?,
            },
            11 => Self::RemoveXattr {
                ino: r.ino()?,
                name: r.attribute()?,
                now: r.time()?,
            },
            12 => Self::Truncate {
                ino: r.ino()?,
                size: r.size()?,
                now: r.time()?,
            },
            13 => Self::Punch {
                ino: r.ino()?,
                block: r.file_block()?,
                count: r.u64()?, // all the rest of a file is more than it can have
                now: r.time()?,
            },
            14 => Self::Clone {
                src: r.ino()?,
                dst: r.ino()?,
                size: r.size()?,
                pinned: r.u8()? != 0,
                now: r.time()?,
            },
            15 => Self::CloneRange {
                src: r.ino()?,
                block: r.file_block()?,
                dst: r.ino()?,
                dst_block: r.file_block()?,
                count: r.file_block()?,
            },
            16 => Self::Show {
                dst: r.ino()?,
                size: r.size()?,
                now: r.time()?,
            },
            17 => Self::EndClone { dst: r.ino()? },
            kind => {
                return Err(Error::corrupt(format!(
                    "journal record is unknown: type={kind}"
                )));
            }
        })
    }

    fn decode_map(r: &mut Reader<'_>) -> Result<Self> {
        let (ino, block) = (r.ino()?, r.file_block()?);
        let extent = Extent {
            block: r.u64()?,
            len: r.u32()?,
        };
        let sums = r.take((extent.len as usize).saturating_mul(4))?;
        let sums: Vec<u32> = sums.chunks_exact(4).map(|sum| get_u32(sum, 0)).collect();
        if sums.is_empty() || extent.block > BLOCK_MAX || extent.len > EXTENT_BLOCKS_MAX {
            return Err(Error::corrupt(
                "journal record maps nothing, or what cannot be",
            ));
        }
        Ok(Self::Map {
            ino,
            block,
            extent,
            sums,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip_and_cuts_are_errors() {
        let now = Time { secs: -3, nanos: 7 };
        let records = vec![
            Record::Block {
                ino: Ino(2),
                block: 9,
                crc: 77,
            },
            Record::Map {
                ino: Ino(2),
                block: 1,
                extent: Extent { block: 5, len: 2 },
                sums: vec![1, 2],
            },
            Record::Create {
                dir: Ino(1),
                name: b"a".into(),
                ino: Ino(2),
                generation: 3,
                kind: 1,
                mode: 0o644,
                uid: 1,
                gid: 2,
                rdev: 0,
                target: b"".into(),
                now,
            },
            Record::Rename {
                dir: Ino(1),
                name: b"a".into(),
                new_dir: Ino(1),
                new_name: b"b".into(),
                mode: 2,
                now,
            },
            Record::Clone {
                src: Ino(2),
                dst: Ino(3),
                size: 8,
                pinned: true,
                now,
            },
        ];
        let mut bytes = Vec::new();
        records.iter().for_each(|record| record.encode(&mut bytes));
        assert_eq!(Record::decode_all(&bytes).unwrap(), records);
        for cut in 0..bytes.len() {
            if let Ok(fewer) = Record::decode_all(&bytes[..cut]) {
                assert_eq!(fewer, records[..fewer.len()]);
            }
        }
    }

    #[test]
    fn names_that_cannot_be_are_refused() {
        let link = |name: &[u8]| {
            let mut bytes = Vec::new();
            let link = Record::Link {
                ino: Ino(2),
                dir: Ino(1),
                name: name.into(),
                now: Time::default(),
            };
            link.encode(&mut bytes);
            Record::decode_all(&bytes)
        };
        assert!(link(b"a").is_ok());
        for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
            assert!(link(name).is_err(), "{name:?}");
        }
    }
}
