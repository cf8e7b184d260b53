//! VHDX: fixed, dynamic and differencing images of Hyper-V, with their log.
//!
//! Layout: MS-VHDX, version 8. Little-endian. A dirty image is read as after its replay (`log.rs`)
//! and not changed.
//!
//! Invariants:
//!
//! 1. Every allocated block lies within the file; none overlaps another, a region, the log or
//!    the headers.
//! 2. A partly present block has a sector bitmap; only differencing images have such blocks.

use std::sync::Arc;

mod log;
pub(super) mod metadata;

use super::source::{check_range, read_vec};
use super::{Content, Facts, Format, Identity, Layer, Pages, Run, Source, broken, unsupported};
use crate::error::Result;
use crate::ondisk::get_u64;
use metadata::{MIB, Metadata, Regions};

/// First bytes of a VHDX.
pub const MAGIC: [u8; 8] = *b"vhdxfile";

/// Longest file: the largest disk, 64 TiB, and more than its tables and bitmaps ever take. Bounds
/// the memory of [`Taken`] to about 8 MiB.
const LEN_MAX: u64 = 65 << 40;

/// States of a block in the allocation table.
const NOT_PRESENT: u64 = 0;
const UNDEFINED: u64 = 1;
const ZERO: u64 = 2;
const UNMAPPED: u64 = 3;
const FULL: u64 = 6;
const PARTIAL: u64 = 7;

/// An open VHDX.
#[derive(Debug)]
pub struct Vhdx {
    facts: Facts,
    sources: [Arc<dyn Source>; 1],
    pages: Pages,
    bat: u64,
    block: u64,
    sector: u64,
    /// Payload entries between two entries of sector bitmaps.
    chunk: u64,
    has_parent: bool,
}

/// State and offset of an entry.
fn entry(raw: u64) -> (u64, u64) {
    (raw & 7, raw >> 20 << 20)
}

impl Vhdx {
    /// Opens an image.
    ///
    /// # Errors
    /// `Corrupt`, naming what is wrong; `Unsupported`; `Io`.
    pub fn open(source: Arc<dyn Source>) -> Result<Self> {
        let id = read_vec(&*source, 0, 520)?;
        if id[..8] != MAGIC {
            return Err(broken("this is no VHDX"));
        }
        let header = metadata::header(&*source)?;
        let mut notes = Vec::new();
        let source: Arc<dyn Source> = if header.log.guid == [0; 16] {
            source
        } else {
            notes.push("its log was replayed in memory; the file was not closed cleanly".into());
            Arc::new(log::replay(source, header.log)?)
        };
        if source.len() > LEN_MAX {
            return Err(unsupported(format!(
                "the file is longer than any VHDX can be: bytes={}",
                source.len()
            )));
        }
        let regions = metadata::regions(&*source, &header.log)?;
        let disk = metadata::metadata(&*source, &regions)?;
        let facts = Facts {
            format: Format::Vhdx,
            subtype: match (disk.has_parent, disk.fixed) {
                (true, _) => "differencing",
                (false, true) => "fixed",
                (false, false) => "dynamic",
            },
            size: disk.size,
            block: disk.block,
            sector: disk.sector as u32,
            identity: Some(Identity::Uuid(header.data_write)),
            version: None,
            creator: super::bytes::utf16(&id[8..], u16::from_le_bytes),
            parent: disk.parent.clone(),
            notes,
        };
        let vhdx = Self {
            facts,
            pages: Pages::new(source.clone()),
            sources: [source],
            bat: regions.bat.0,
            block: disk.block,
            sector: disk.sector,
            chunk: (disk.sector << 23) / disk.block,
            has_parent: disk.has_parent,
        };
        vhdx.check_table(&regions, &disk)?;
        Ok(vhdx)
    }

    /// Where the entry of a payload block stands in the table: behind every `chunk` of them there
    /// is one of a sector bitmap.
    fn place(&self, block: u64) -> u64 {
        block + block / self.chunk
    }

    /// I1 and I2, over the whole table.
    fn check_table(&self, regions: &Regions, disk: &Metadata) -> Result<()> {
        let payload = disk.size.div_ceil(disk.block);
        let entries = if disk.has_parent {
            payload.div_ceil(self.chunk) * (self.chunk + 1)
        } else {
            payload + (payload - 1) / self.chunk
        };
        if entries * 8 > regions.bat.1 {
            return Err(broken(format!(
                "the block allocation table is too short: entries={entries}"
            )));
        }
        let source = &*self.sources[0];
        check_range(source.len(), self.bat, entries * 8)?;
        let mut taken = Taken::new(source.len());
        for (from, to) in &regions.taken {
            taken.mark(*from, (*to).min(source.len()))?;
        }
        let mut at = 0;
        // The last bitmap seen missing while partial blocks of its chunk want it.
        let mut partial = false;
        while at < entries {
            let count = (entries - at).min(128 * 1024);
            let part = read_vec(source, self.bat + at * 8, count as usize * 8)?;
            for (i, raw) in part.chunks_exact(8).enumerate() {
                let (state, offset) = entry(get_u64(raw, 0));
                let index = at + i as u64;
                if index % (self.chunk + 1) == self.chunk {
                    if disk.has_parent && state == FULL {
                        taken.mark(offset, offset.saturating_add(MIB))?;
                    } else if partial {
                        return Err(broken("a partly present block has no sector bitmap"));
                    }
                    partial = false;
                    continue;
                }
                match state {
                    NOT_PRESENT | UNDEFINED | ZERO | UNMAPPED => {}
                    FULL => taken.mark(offset, offset.saturating_add(disk.block))?,
                    PARTIAL if disk.has_parent => {
                        partial = true;
                        taken.mark(offset, offset.saturating_add(disk.block))?;
                    }
                    _ => {
                        return Err(broken(format!(
                            "a block has a state that it cannot have: state={state}"
                        )));
                    }
                }
            }
            at += count;
        }
        Ok(())
    }

    /// Whether sector `first` of the disk is here, and how many up to `last` are alike. All lie
    /// in one block.
    fn bits(&self, block: u64, first: u64, last: u64) -> Result<(bool, u64)> {
        let chunk = block / self.chunk;
        let at = self.bat + ((chunk + 1) * (self.chunk + 1) - 1) * 8;
        let (_, bitmap) = entry(self.pages.u64_le(at)?);
        let begin = chunk * self.chunk * (self.block / self.sector);
        let (mut value, mut sector) = (None, first);
        let mut bytes = [0; 64];
        while sector < last {
            let from = (sector - begin) / 8;
            let count = ((last - begin).div_ceil(8) - from).min(bytes.len() as u64) as usize;
            self.pages.read(bitmap + from, &mut bytes[..count])?;
            let end = last.min(begin + (from + count as u64) * 8);
            while sector < end {
                let bit = sector - begin;
                let set = bytes[(bit / 8 - from) as usize] >> (bit % 8) & 1 == 1;
                if *value.get_or_insert(set) != set {
                    return Ok((!set, sector - first));
                }
                sector += 1;
            }
        }
        Ok((value.unwrap_or(false), sector - first))
    }
}

/// Which MiB of the file belong to something.
struct Taken {
    len: u64,
    bits: Vec<u64>,
}

impl Taken {
    fn new(len: u64) -> Self {
        Self {
            len,
            bits: vec![0; len.div_ceil(MIB).div_ceil(64) as usize],
        }
    }

    /// Takes a range for one thing alone.
    fn mark(&mut self, from: u64, to: u64) -> Result<()> {
        if to > self.len {
            return Err(broken(format!(
                "a block reaches behind the end of the image: offset={from}"
            )));
        }
        for mib in from / MIB..to.div_ceil(MIB) {
            let (word, bit) = ((mib / 64) as usize, mib % 64);
            if self.bits[word] >> bit & 1 == 1 {
                return Err(broken(format!(
                    "two blocks, or a block and a table, lie upon each other: offset={from}"
                )));
            }
            self.bits[word] |= 1 << bit;
        }
        Ok(())
    }
}

impl Layer for Vhdx {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn sources(&self) -> &[Arc<dyn Source>] {
        &self.sources
    }

    fn run(&self, offset: u64, most: u64) -> Result<Run> {
        let (block, inside) = (offset / self.block, offset % self.block);
        let most = most.min(self.block - inside).min(self.facts.size - offset);
        let (state, at) = entry(self.pages.u64_le(self.bat + self.place(block) * 8)?);
        let here = Content::Data {
            source: 0,
            at: at + inside,
        };
        let (len, content) = match state {
            FULL => (most, here),
            PARTIAL => {
                let first = offset / self.sector;
                let last = (offset + most).div_ceil(self.sector);
                let (set, count) = self.bits(block, first, last)?;
                let len = ((first + count) * self.sector - offset).min(most);
                (len, if set { here } else { Content::Absent })
            }
            NOT_PRESENT if self.has_parent => (most, Content::Absent),
            _ => (most, Content::Zero),
        };
        Ok(Run { len, content })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::testing::Long;

    #[test]
    fn a_file_longer_than_any_is_refused_before_memory_is_taken() {
        let mut bytes = vec![0; 1 << 20];
        bytes[..8].copy_from_slice(&MAGIC);
        let head = &mut bytes[65536..65536 + 4096];
        head[..4].copy_from_slice(b"head");
        head[66] = 1;
        let crc = crate::ondisk::crc32c(head);
        head[4..8].copy_from_slice(&crc.to_le_bytes());
        let error = Vhdx::open(Arc::new(Long(bytes, 1 << 62))).unwrap_err();
        assert!(error.to_string().contains("longer than any"), "{error}");
    }
}
