//! VDI: dynamic, static and differencing images of VirtualBox.
//!
//! Layout: VirtualBox, `VDICore.h`, version 1.1 of the header. Little-endian. Blocks stand in the
//! order in which they were first written; a map says where.
//!
//! Invariants:
//!
//! 1. Every mapped block lies within the file, and no two blocks are one.

use std::sync::Arc;

use super::bytes::guid;
use super::source::{check_range, read_vec};
use super::{
    Content, Facts, Format, Identity, Layer, Pages, ParentRef, Run, Source, broken, unsupported,
};
use crate::error::Result;
use crate::ondisk::{get_u32, get_u64};
use crate::units::SECTOR_SIZE;

/// Number at 64 that makes a file a VDI.
pub const MAGIC: u32 = 0xbeda_107f;
const VERSION: u32 = 0x0001_0001;
/// Bytes of what is read of the header.
const HEADER_LEN: usize = 512;
const DYNAMIC: u32 = 1;
const STATIC: u32 = 2;
const UNDO: u32 = 3;
const DIFFERENCING: u32 = 4;
/// Map entry of a block that is not there.
const ABSENT: u32 = u32::MAX;
/// Map entry of a block that is zero.
const ZERO: u32 = u32::MAX - 1;
/// Largest block that is read: 256 MiB.
const BLOCK_MAX: u64 = 256 << 20;
/// Most blocks: a map of 64 MiB.
const BLOCKS_MAX: u64 = 16 << 20;

/// An open VDI.
#[derive(Debug)]
pub struct Vdi {
    facts: Facts,
    sources: [Arc<dyn Source>; 1],
    pages: Pages,
    map: u64,
    data: u64,
    block: u64,
    /// Bytes before the data of each block.
    extra: u64,
}

impl Vdi {
    /// Opens an image.
    ///
    /// # Errors
    /// `Corrupt`, naming what is wrong; `Unsupported`; `Io`.
    pub fn open(source: Arc<dyn Source>) -> Result<Self> {
        if source.len() < HEADER_LEN as u64 {
            return Err(broken("the image is shorter than the header of a VDI"));
        }
        let header = read_vec(&*source, 0, HEADER_LEN)?;
        if get_u32(&header, 64) != MAGIC {
            return Err(broken("this is no VDI"));
        }
        let version = get_u32(&header, 68);
        if version != VERSION {
            return Err(unsupported(format!(
                "this version of VDI is not known: version={}.{}",
                version >> 16,
                version & 0xffff
            )));
        }
        let subtype = match get_u32(&header, 76) {
            DYNAMIC => "dynamic",
            STATIC => "static",
            UNDO | DIFFERENCING => "differencing",
            other => return Err(broken(format!("no such type of VDI: type={other}"))),
        };
        let (map, data) = (get_u32(&header, 340).into(), get_u32(&header, 344).into());
        // QEMU and VirtualBox take disks whose size is no multiple of a sector.
        let size: u64 = get_u64(&header, 368);
        let block = u64::from(get_u32(&header, 376));
        let extra = u64::from(get_u32(&header, 380));
        let blocks = u64::from(get_u32(&header, 384));
        let end = source.len();
        if !block.is_power_of_two() || !(SECTOR_SIZE as u64..=BLOCK_MAX).contains(&block) {
            return Err(broken(format!(
                "the block size is no power of two from 512 bytes to 256 MiB: block={block}"
            )));
        }
        if size == 0 || size.div_ceil(block) > blocks {
            return Err(broken(format!(
                "the block map does not fit the size of the disk: blocks={blocks} size={size}"
            )));
        }
        if size.div_ceil(block) > BLOCKS_MAX || extra > block {
            return Err(unsupported(
                "the image has more or larger blocks than any product writes",
            ));
        }
        let needed = size.div_ceil(block);
        // What is behind the entries needed is not read, but a map must not lie about its length.
        check_range(end, map, blocks * 4)?;
        // Type, flags and all else that was read above ends at 456.
        if map < 456 || data < map + needed * 4 || data > end {
            return Err(broken("header, block map and data overlap"));
        }
        let vdi = Self {
            facts: facts(&header, subtype, size, block),
            pages: Pages::new(source.clone()),
            sources: [source],
            map,
            data,
            block,
            extra,
        };
        vdi.check_map(needed)?;
        Ok(vdi)
    }

    /// I1.
    fn check_map(&self, entries: u64) -> Result<()> {
        let stride = self.block + self.extra;
        let room = (self.sources[0].len() - self.data) / stride;
        // At most one number for each entry, however long the file is.
        let mut seen = Vec::new();
        let mut at = 0;
        while at < entries {
            let count = (entries - at).min(256 * 1024);
            let part = read_vec(&*self.sources[0], self.map + at * 4, count as usize * 4)?;
            for entry in part.chunks_exact(4).map(|raw| get_u32(raw, 0)) {
                if entry == ABSENT || entry == ZERO {
                    continue;
                }
                if u64::from(entry) >= room {
                    return Err(broken(format!(
                        "a block lies behind the end of the image: block={entry}"
                    )));
                }
                seen.push(entry);
            }
            at += count;
        }
        seen.sort_unstable();
        match seen.windows(2).find(|pair| pair[0] == pair[1]) {
            None => Ok(()),
            Some(pair) => Err(broken(format!(
                "a block belongs to two places of the disk: block={}",
                pair[0]
            ))),
        }
    }
}

fn facts(header: &[u8], subtype: &'static str, size: u64, block: u64) -> Facts {
    let link = guid(header, 424);
    let text = &header[..64];
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let parent = (subtype == "differencing" || !link.is_nil()).then(|| ParentRef {
        identity: Some(Identity::Uuid(link)),
        version: Some(guid(header, 440)).filter(|version| !version.is_nil()),
        ..ParentRef::default()
    });
    Facts {
        format: Format::Vdi,
        subtype,
        size,
        block,
        sector: SECTOR_SIZE as u32,
        identity: Some(Identity::Uuid(guid(header, 392))),
        version: Some(guid(header, 408)),
        creator: String::from_utf8_lossy(text)
            .trim()
            .trim_matches(['<', '>'])
            .trim()
            .to_owned(),
        parent,
        notes: Vec::new(),
    }
}

impl Layer for Vdi {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn sources(&self) -> &[Arc<dyn Source>] {
        &self.sources
    }

    fn run(&self, offset: u64, most: u64) -> Result<Run> {
        let (index, inside) = (offset / self.block, offset % self.block);
        let len = most.min(self.block - inside).min(self.facts.size - offset);
        let content = match self.pages.u32_le(self.map + index * 4)? {
            ABSENT => Content::Absent,
            ZERO => Content::Zero,
            entry => Content::Data {
                source: 0,
                at: self.data + u64::from(entry) * (self.block + self.extra) + self.extra + inside,
            },
        };
        Ok(Run { len, content })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::testing::Long;

    fn open(blocks: [u32; 2], len: u64) -> Result<Vdi> {
        let mut bytes = vec![0; 1024];
        for (at, number) in [
            (64, MAGIC),
            (68, VERSION),
            (72, 400),
            (76, DYNAMIC),
            (340, 512),
            (344, 1024),
            (360, 512),
            (368, 8192),
            (376, 4096),
            (384, 2),
            (388, 2),
            (512, blocks[0]),
            (516, blocks[1]),
        ] {
            bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
        }
        Vdi::open(Arc::new(Long(bytes, len)))
    }

    #[test]
    fn a_long_file_takes_no_memory_and_no_block_is_used_twice() {
        for len in [1024 + 8192, 1 << 62] {
            assert!(open([1, 0], len).is_ok());
            let error = open([1, 1], len).unwrap_err();
            assert!(error.to_string().contains("two places"), "{error}");
        }
    }
}
