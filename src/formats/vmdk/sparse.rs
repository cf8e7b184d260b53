//! Sparse extents of VMware's workstation products, with plain or compressed grains.
//!
//! Layout: VMware, Virtual Disk Format 1.1: `KDMV` header, a directory of tables of grains. Offsets
//! are in sectors of 512 bytes.
//!
//! Invariants:
//!
//! 1. All tables were checked when it was opened: they and the grains lie within the file and
//!    behind the header.
//! 2. A compressed grain unpacks to at most one grain, whatever it claims.
//! 3. No table belongs to two places of the extent.

use std::io::Read;
use std::sync::Arc;

use flate2::read::ZlibDecoder;

use super::descriptor::EMBEDDED_MAX;
use crate::error::Result;
use crate::formats::source::{check_range, check_tables_apart, read_vec};
use crate::formats::{Pages, Source, broken, unsupported};
use crate::ondisk::{get_u16, get_u32, get_u64};

/// First bytes of such an extent.
pub(crate) const MAGIC: [u8; 4] = *b"KDMV";
const SECTOR: u64 = 512;
const HEADER_LEN: usize = 512;
/// Entries of a table of grains.
const TABLE: u64 = 512;
/// Directory at the end, where the footer tells.
const AT_END: u64 = u64::MAX;
/// Largest grain in sectors: 32 MiB.
const GRAIN_MAX: u64 = 1 << 16;
/// Largest extent in sectors: 64 TiB.
const CAPACITY_MAX: u64 = 1 << 37;

const NEWLINES: u32 = 1;
const REDUNDANT: u32 = 2;
const ZEROED: u32 = 4;
const COMPRESSED: u32 = 0x1_0000;

/// Where a grain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grain {
    /// The parent's.
    Absent,
    /// Zeros.
    Zero,
    /// Bytes at this offset.
    At(u64),
    /// Compressed, with its marker at this offset.
    Packed(u64),
}

/// An open sparse extent.
#[derive(Debug)]
pub(super) struct Sparse {
    source: Arc<dyn Source>,
    pages: Pages,
    /// Sectors of the extent.
    pub(super) capacity: u64,
    /// Bytes of a grain.
    pub(super) grain: u64,
    flags: u32,
    /// Offset of the directory in bytes.
    directory: u64,
    /// Embedded descriptor: offset and length in bytes; length 0 if there is none.
    descriptor: (u64, u64),
    /// What is odd but harmless.
    pub(super) notes: Vec<String>,
}

impl Sparse {
    pub(super) fn open(source: Arc<dyn Source>) -> Result<Self> {
        let mut header = read_vec(&*source, 0, HEADER_LEN)?;
        let descriptor = (get_u64(&header, 28), get_u64(&header, 36));
        if get_u64(&header, 56) == AT_END {
            header = footer(&*source)?;
        }
        check_header(&header)?;
        let mut sparse = Self {
            pages: Pages::new(source.clone()),
            capacity: get_u64(&header, 12),
            grain: get_u64(&header, 20) * SECTOR,
            flags: get_u32(&header, 8),
            directory: 0,
            descriptor: descriptor_at(&*source, descriptor)?,
            notes: Vec::new(),
            source,
        };
        if header[72] != 0 {
            sparse.notes.push("it was not closed cleanly".to_owned());
        }
        sparse.choose_directory(get_u64(&header, 56), get_u64(&header, 48))?;
        sparse.check_tables()?;
        Ok(sparse)
    }

    /// The embedded descriptor.
    pub(super) fn descriptor(&self) -> Result<Option<Vec<u8>>> {
        let (at, len) = self.descriptor;
        if len == 0 {
            return Ok(None);
        }
        read_vec(&*self.source, at, len as usize).map(Some)
    }

    pub(super) fn is_compressed(&self) -> bool {
        self.flags & COMPRESSED != 0
    }

    fn grains(&self) -> u64 {
        (self.capacity * SECTOR).div_ceil(self.grain)
    }

    /// The primary directory, or the redundant one where that is damaged.
    fn choose_directory(&mut self, primary: u64, redundant: u64) -> Result<()> {
        let tables = self.grains().div_ceil(TABLE);
        let at = |sector: u64| {
            let at = sector.checked_mul(SECTOR).filter(|at| *at > 0)?;
            check_range(self.source.len(), at, tables * 4).ok()?;
            Some(at)
        };
        let twin = at(redundant).filter(|_| self.flags & REDUNDANT != 0);
        let Some(first) = at(primary).or(twin) else {
            return Err(broken("the directory of grains lies behind the end"));
        };
        self.directory = first;
        let Some(twin) = twin.filter(|twin| *twin != first) else {
            return Ok(());
        };
        for i in 0..tables {
            let (a, b) = (
                self.pages.u32_le(first + i * 4)?,
                self.pages.u32_le(twin + i * 4)?,
            );
            let lost = |sector: u32| self.check_table(i, sector).is_err();
            if (a == 0 && b != 0 || a != 0 && lost(a)) && (b == 0 || !lost(b)) {
                self.notes
                    .push("the directory of grains is damaged; its copy is used".to_owned());
                self.directory = twin;
                return Ok(());
            }
        }
        Ok(())
    }

    /// Entries of table `i`: fewer in the last.
    fn entries(&self, i: u64) -> u64 {
        (self.grains() - i * TABLE).min(TABLE)
    }

    fn check_table(&self, i: u64, sector: u32) -> Result<()> {
        let at = u64::from(sector) * SECTOR;
        if at < HEADER_LEN as u64 {
            return Err(broken("a table of grains lies upon the header"));
        }
        check_range(self.source.len(), at, self.entries(i) * 4)
    }

    /// I1.
    fn check_tables(&self) -> Result<()> {
        self.check_apart()?;
        let len = self.source.len();
        let size = self.capacity * SECTOR;
        let first = (self.descriptor.0 + self.descriptor.1).max(HEADER_LEN as u64);
        for i in 0..self.grains().div_ceil(TABLE) {
            let sector = self.pages.u32_le(self.directory + i * 4)?;
            if sector == 0 {
                continue;
            }
            self.check_table(i, sector)?;
            let at = u64::from(sector) * SECTOR;
            let table = read_vec(&*self.source, at, self.entries(i) as usize * 4)?;
            for (k, raw) in table.chunks_exact(4).enumerate() {
                let sector = get_u32(raw, 0);
                if sector == 0 || sector == 1 && self.flags & ZEROED != 0 {
                    continue;
                }
                let index = i * TABLE + k as u64;
                let at = u64::from(sector) * SECTOR;
                let bytes = if self.is_compressed() {
                    12
                } else {
                    self.grain.min(size - index * self.grain)
                };
                if at < first || at.checked_add(bytes).is_none_or(|end| end > len) {
                    return Err(broken(format!(
                        "a grain lies upon the header or behind the end: grain={index} sector={sector}"
                    )));
                }
            }
        }
        Ok(())
    }

    /// I3.
    fn check_apart(&self) -> Result<()> {
        let mut found = Vec::new();
        for i in 0..self.grains().div_ceil(TABLE) {
            let sector = self.pages.u32_le(self.directory + i * 4)?;
            if sector > 0 {
                found.push((u64::from(sector) * SECTOR, self.entries(i) as u32 * 4));
            }
        }
        check_tables_apart(&mut found)
    }

    /// Where grain `index` is.
    pub(super) fn grain(&self, index: u64) -> Result<Grain> {
        let table = u64::from(self.pages.u32_le(self.directory + index / TABLE * 4)?);
        if table == 0 {
            return Ok(Grain::Absent);
        }
        let sector = self.pages.u32_le(table * SECTOR + index % TABLE * 4)?;
        Ok(match sector {
            0 => Grain::Absent,
            1 if self.flags & ZEROED != 0 => Grain::Zero,
            at if self.is_compressed() => Grain::Packed(u64::from(at) * SECTOR),
            at => Grain::At(u64::from(at) * SECTOR),
        })
    }

    /// Grains from `index` to the end of its table, if there is no such table; else 0.
    pub(super) fn absent(&self, index: u64) -> Result<u64> {
        let table = self.pages.u32_le(self.directory + index / TABLE * 4)?;
        Ok(if table == 0 { TABLE - index % TABLE } else { 0 })
    }

    /// Unpacks grain `index`, whose marker is at `at`.
    pub(super) fn unpack(&self, index: u64, at: u64) -> Result<Vec<u8>> {
        let marker = read_vec(&*self.source, at, 12)?;
        let (sector, len) = (get_u64(&marker, 0), u64::from(get_u32(&marker, 8)));
        if sector != index * (self.grain / SECTOR) {
            return Err(broken(format!(
                "a compressed grain belongs elsewhere: grain={index} sector={sector}"
            )));
        }
        // What deflate adds to bytes that do not shrink is far less than this.
        if len > self.grain * 2 {
            return Err(broken(format!(
                "a compressed grain is larger than any can be: grain={index} bytes={len}"
            )));
        }
        let packed = read_vec(&*self.source, at + 12, len as usize)?;
        let mut bytes = Vec::with_capacity(self.grain as usize);
        ZlibDecoder::new(&packed[..])
            .take(self.grain + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| {
                broken(format!(
                    "a compressed grain is damaged: grain={index}: {error}"
                ))
            })?;
        let wanted = self.grain.min(self.capacity * SECTOR - index * self.grain);
        if (bytes.len() as u64) < wanted || bytes.len() as u64 > self.grain {
            return Err(broken(format!(
                "a compressed grain has not the size of a grain: grain={index} bytes={}",
                bytes.len()
            )));
        }
        bytes.resize(self.grain as usize, 0);
        Ok(bytes)
    }
}

/// The copy of the header at the end of a stream, which knows where the directory is.
fn footer(source: &dyn Source) -> Result<Vec<u8>> {
    // Footer marker, footer, end-of-stream marker, a sector each; padding may follow.
    let len = source.len() / SECTOR * SECTOR;
    let at = len
        .checked_sub(3 * SECTOR)
        .ok_or_else(|| broken("the stream is cut off"))?;
    let bytes = read_vec(source, at, 3 * SECTOR as usize)?;
    let (marker, footer) = (&bytes[..512], &bytes[512..1024]);
    if get_u32(marker, 12) != 3 || footer[..4] != MAGIC || get_u64(footer, 56) == AT_END {
        return Err(broken("the stream is cut off: its footer is missing"));
    }
    Ok(footer.to_vec())
}

fn check_header(header: &[u8]) -> Result<()> {
    let (version, flags) = (get_u32(header, 4), get_u32(header, 8));
    let (capacity, grain) = (get_u64(header, 12), get_u64(header, 20));
    if header[..4] != MAGIC {
        return Err(broken("this is no sparse extent"));
    }
    if !(1..=3).contains(&version) {
        return Err(unsupported(format!(
            "this version of a sparse extent is not known: version={version}"
        )));
    }
    if flags & NEWLINES != 0 && header[73..77] != *b"\n \r\n" {
        return Err(broken(
            "the file was changed by a transfer as text: its line ends are not as written",
        ));
    }
    if capacity == 0 || capacity > CAPACITY_MAX {
        return Err(broken(format!(
            "the size of the extent makes no sense: sectors={capacity}"
        )));
    }
    if !grain.is_power_of_two() || !(8..=GRAIN_MAX).contains(&grain) {
        return Err(broken(format!(
            "the size of a grain is no power of two from 8 sectors to 32 MiB: sectors={grain}"
        )));
    }
    if u64::from(get_u32(header, 44)) != TABLE {
        return Err(broken("a table of grains does not have 512 entries"));
    }
    if flags & COMPRESSED != 0 && get_u16(header, 77) != 1 {
        return Err(unsupported("this compression is not known"));
    }
    Ok(())
}

fn descriptor_at(source: &dyn Source, (at, len): (u64, u64)) -> Result<(u64, u64)> {
    if at == 0 || len == 0 {
        return Ok((0, 0));
    }
    let (Some(at), Some(len)) = (at.checked_mul(SECTOR), len.checked_mul(SECTOR)) else {
        return Err(broken("the embedded descriptor lies behind the end"));
    };
    check_range(source.len(), at, len)?;
    if len > EMBEDDED_MAX {
        return Err(broken(format!(
            "the embedded descriptor is too long: bytes={len}"
        )));
    }
    Ok((at, len))
}
