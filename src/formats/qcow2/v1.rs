//! Version 1 of qcow, the format before qcow2.
//!
//! Layout: QEMU, `block/qcow.c`. Big-endian. Two levels of tables; no snapshots, no zero clusters,
//! no format of the backing file.
//!
//! Invariants:
//!
//! 1. What a table points to lies within the file; otherwise reading it is an error, never zeros.
//! 2. A compressed cluster unpacks to one cluster, whatever it claims.

use std::io::Read;
use std::sync::Arc;

use flate2::read::DeflateDecoder;

use super::header::MAGIC;
use crate::error::Result;
use crate::formats::bytes::{be32, be64};
use crate::formats::source::{check_range, check_tables_apart, read_vec};
use crate::formats::{
    Content, Facts, Format, Layer, Pages, ParentRef, Run, Source, broken, unsupported,
};
use crate::units::SECTOR_SIZE;

const HEADER_LEN: usize = 48;
const COMPRESSED: u64 = 1 << 63;
/// Longest name of a backing file.
const NAME_MAX: u32 = 1023;
/// Largest table of the first level: 32 MiB.
const L1_MAX: u64 = 32 << 20;

/// An open qcow image of version 1.
#[derive(Debug)]
pub struct Qcow1 {
    facts: Facts,
    sources: [Arc<dyn Source>; 1],
    pages: Pages,
    l1: u64,
    cluster_bits: u32,
    l2_bits: u32,
}

/// True if a file that begins with `head` is one.
pub(crate) fn is_version_1(head: &[u8]) -> bool {
    head.len() >= 8 && head[..4] == MAGIC && be32(head, 4) == 1
}

impl Qcow1 {
    /// Opens an image.
    ///
    /// # Errors
    /// `Corrupt`, naming what is wrong; `Unsupported`; `Io`.
    pub fn open(source: Arc<dyn Source>) -> Result<Self> {
        let header = read_vec(&*source, 0, HEADER_LEN)?;
        if !is_version_1(&header) {
            return Err(broken("this is no qcow image of version 1"));
        }
        if be32(&header, 36) != 0 {
            return Err(unsupported("the image is encrypted"));
        }
        let (cluster_bits, l2_bits) = (u32::from(header[32]), u32::from(header[33]));
        if !(9..=16).contains(&cluster_bits) || !(6..=13).contains(&l2_bits) {
            return Err(broken(format!(
                "clusters or tables of a size that none has: bits={cluster_bits}, {l2_bits}"
            )));
        }
        let (size, l1) = (be64(&header, 24), be64(&header, 40));
        let entries = size.div_ceil(1 << (cluster_bits + l2_bits));
        if size == 0 || entries * 8 > L1_MAX || l1 < HEADER_LEN as u64 {
            return Err(broken(format!(
                "the size of the disk does not fit its table: size={size}"
            )));
        }
        check_range(source.len(), l1, entries * 8)?;
        let mut tables = Vec::new();
        for raw in read_vec(&*source, l1, entries as usize * 8)?.chunks_exact(8) {
            let table = be64(raw, 0);
            if table > 0 {
                // The offset must leave room for the table, or reading it fails.
                tables.push((table.min(source.len()), 8 << l2_bits));
            }
        }
        check_tables_apart(&mut tables)?;
        let parent = match (be64(&header, 8), be32(&header, 16)) {
            (0, _) => None,
            (_, len) if len > NAME_MAX => {
                return Err(broken("the name of the backing file is too long"));
            }
            (at, len) => {
                let name = read_vec(&*source, at, len as usize)?;
                Some(ParentRef {
                    names: vec![String::from_utf8_lossy(&name).into_owned()],
                    ..ParentRef::default()
                })
            }
        };
        Ok(Self {
            facts: Facts {
                format: Format::Qcow2,
                subtype: "v1",
                size,
                block: 1 << cluster_bits,
                sector: SECTOR_SIZE as u32,
                identity: None,
                version: None,
                creator: String::new(),
                parent,
                notes: Vec::new(),
            },
            pages: Pages::new(source.clone()),
            sources: [source],
            l1,
            cluster_bits,
            l2_bits,
        })
    }

    /// The entry of the cluster at `offset`; 0: absent. And for how many clusters it holds, if there
    /// is no table.
    fn entry(&self, offset: u64) -> Result<(u64, u64)> {
        let index = offset >> self.cluster_bits;
        let table = self.pages.u64_be(self.l1 + (index >> self.l2_bits) * 8)?;
        let inside = index & ((1 << self.l2_bits) - 1);
        if table == 0 {
            return Ok((0, (1 << self.l2_bits) - inside));
        }
        let at = table
            .checked_add(inside * 8)
            .ok_or_else(|| broken("a table lies behind the end"))?;
        Ok((self.pages.u64_be(at)?, 1))
    }

    fn unpack(&self, entry: u64) -> Result<Vec<u8>> {
        let shift = 63 - self.cluster_bits;
        let at = entry & ((1 << shift) - 1);
        let size = 1 << self.cluster_bits;
        let len = (entry & !COMPRESSED) >> shift & (size - 1);
        let packed = read_vec(&*self.sources[0], at, len as usize)?;
        let mut bytes = vec![0; size as usize];
        DeflateDecoder::new(&packed[..])
            .read_exact(&mut bytes)
            .map_err(|error| {
                broken(format!(
                    "a compressed cluster is damaged: offset={at}: {error}"
                ))
            })?;
        Ok(bytes)
    }
}

impl Layer for Qcow1 {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn sources(&self) -> &[Arc<dyn Source>] {
        &self.sources
    }

    fn run(&self, offset: u64, most: u64) -> Result<Run> {
        let size = 1_u64 << self.cluster_bits;
        let inside = offset % size;
        let (entry, count) = self.entry(offset)?;
        let len = most
            .min(self.facts.size - offset)
            .min(count * size - inside);
        let content = match entry {
            0 => Content::Absent,
            entry if entry & COMPRESSED != 0 => Content::Packed,
            at => {
                check_range(self.sources[0].len(), at.saturating_add(inside), len)?;
                Content::Data {
                    source: 0,
                    at: at + inside,
                }
            }
        };
        Ok(Run { len, content })
    }

    fn read_packed(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let bytes = self.unpack(self.entry(offset)?.0)?;
        let skip = (offset % (1 << self.cluster_bits)) as usize;
        out.copy_from_slice(&bytes[skip..skip + out.len()]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// 16 KiB in clusters of 4 KiB: absent, data, compressed, absent.
    fn image() -> Vec<u8> {
        let mut bytes = vec![0; 16384];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x01");
        bytes[24..32].copy_from_slice(&16384_u64.to_be_bytes());
        (bytes[32], bytes[33]) = (12, 9);
        bytes[40..48].copy_from_slice(&48_u64.to_be_bytes());
        bytes[48..56].copy_from_slice(&4096_u64.to_be_bytes());
        let mut packed =
            flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(&[7; 4096]).unwrap();
        let packed = packed.finish().unwrap();
        let entry = COMPRESSED | (packed.len() as u64) << 51 | 12288;
        bytes[4104..4112].copy_from_slice(&8192_u64.to_be_bytes());
        bytes[4112..4120].copy_from_slice(&entry.to_be_bytes());
        bytes[8192..12288].fill(5);
        bytes[12288..12288 + packed.len()].copy_from_slice(&packed);
        bytes
    }

    #[test]
    fn clusters_are_read_and_lies_are_refused() {
        let layer = Qcow1::open(Arc::new(image())).unwrap();
        let mut buf = vec![0; 8192];
        layer.read(4096, &mut buf).unwrap();
        assert!(buf[..4096] == [5; 4096] && buf[4096..] == [7; 4096]);
        assert_eq!(layer.run(0, 16384).unwrap().content, Content::Absent);
        assert!(Qcow1::open(Arc::new(image()[..50].to_vec())).is_err());
        for (at, byte) in [(24, 0xff), (32, 60), (39, 1), (44, 0xff), (19, 0)] {
            let mut bad = image();
            bad[at] = byte;
            if at == 19 {
                bad[8] = 0x10; // a name behind the end
                bad[19] = 4;
            }
            assert!(Qcow1::open(Arc::new(bad)).is_err(), "{at}");
        }
        let mut bad = image();
        bad[4104] = 0x10;
        let layer = Qcow1::open(Arc::new(bad)).unwrap();
        assert!(layer.run(4096, 4096).is_err());
    }
}
