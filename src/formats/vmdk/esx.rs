//! Sparse extents of ESX: `COWD` (vmfsSparse) and seSparse, the deltas of its snapshots.
//!
//! Layout: COWD: VMware, Virtual Disk Format 1.1. seSparse is not published; the layout is that
//! which VMware's products write and QEMU's `vmdk` driver reads.
//!
//! Invariants:
//!
//! 1. All tables were checked when it was opened: they and the grains lie within the file.
//! 2. No table belongs to two places of the extent.
//! 2. No table belongs to two places.

use std::sync::Arc;

use super::sparse::Grain;
use crate::error::Result;
use crate::formats::source::{check_range, check_tables_apart, read_vec};
use crate::formats::{Pages, Source, broken, unsupported};
use crate::ondisk::{get_u32, get_u64};

/// First bytes of a vmfsSparse extent.
pub(crate) const COWD: [u8; 4] = *b"COWD";
/// First number of a seSparse extent.
pub(crate) const SESPARSE: u64 = 0xcafe_babe;
const SECTOR: u64 = 512;
/// Entries of a table, of both kinds.
const TABLE: u64 = 4096;
/// Largest extent in sectors: 64 TiB.
const CAPACITY_MAX: u64 = 1 << 37;

const SE_VERSION: u64 = 0x2_0000_0001;
const SE_VOLATILE: u64 = 0xcafe_cafe;
/// Sectors of a table, and of a grain, that seSparse has.
const SE_TABLE_SECTORS: u64 = 64;
const SE_GRAIN: u64 = 8;

/// Which of the two.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Cowd,
    /// Offsets of tables and of grains, in bytes.
    SeSparse {
        tables: u64,
        grains: u64,
    },
}

/// An open extent.
#[derive(Debug)]
pub(super) struct Esx {
    pages: Pages,
    kind: Kind,
    /// Sectors of the extent.
    pub(super) capacity: u64,
    /// Bytes of a grain.
    pub(super) grain: u64,
    directory: u64,
}

impl Esx {
    pub(super) fn open_cowd(source: Arc<dyn Source>) -> Result<Self> {
        let header = read_vec(&*source, 0, 512)?;
        let number = |at| u64::from(get_u32(&header, at));
        let (capacity, grain) = (number(12), number(16));
        let (directory, entries) = (number(20) * SECTOR, number(24));
        if header[..4] != COWD || number(4) != 1 {
            return Err(unsupported("this version of a COWD extent is not known"));
        }
        if capacity == 0 || !grain.is_power_of_two() || grain > 1 << 16 {
            return Err(broken(format!(
                "size or grain of the COWD extent make no sense: sectors={capacity} grain={grain}"
            )));
        }
        let extent = Self {
            pages: Pages::new(source),
            kind: Kind::Cowd,
            capacity,
            grain: grain * SECTOR,
            directory,
        };
        let needed = extent.grains().div_ceil(TABLE);
        if entries < needed || directory == 0 {
            return Err(broken(format!(
                "the directory of the COWD extent is too short: entries={entries} needed={needed}"
            )));
        }
        // Its table would not fit the file, unless it is that long for nothing.
        check_range(extent.pages.len(), directory, entries.saturating_mul(4))?;
        extent.check_tables(needed)?;
        Ok(extent)
    }

    pub(super) fn open_sesparse(source: Arc<dyn Source>) -> Result<Self> {
        let header = read_vec(&*source, 0, 512)?;
        let sectors = |at: usize| get_u64(&header, at);
        if sectors(0) != SESPARSE || sectors(8) != SE_VERSION {
            return Err(unsupported(
                "this version of a seSparse extent is not known",
            ));
        }
        let (capacity, grain, table) = (sectors(16), sectors(24), sectors(32));
        if grain != SE_GRAIN || table != SE_TABLE_SECTORS || sectors(40) != 0 {
            return Err(unsupported(format!(
                "this kind of seSparse extent is not known: grain={grain} table={table}"
            )));
        }
        if capacity == 0 || capacity > CAPACITY_MAX {
            return Err(broken(format!(
                "the size of the extent makes no sense: sectors={capacity}"
            )));
        }
        let bytes = |at: usize| {
            let at = sectors(at).checked_mul(SECTOR);
            at.filter(|at| *at < source.len())
                .ok_or_else(|| broken("a part of the seSparse extent lies behind the end"))
        };
        let volatile = read_vec(&*source, bytes(80)?, 512)?;
        if get_u64(&volatile, 0) != SE_VOLATILE {
            return Err(broken("the volatile header of the extent is damaged"));
        }
        if get_u64(&volatile, 24) != 0 {
            return Err(unsupported(
                "the extent has a journal to replay: open it once with its own product",
            ));
        }
        let extent = Self {
            kind: Kind::SeSparse {
                tables: bytes(144)?,
                // Without any grain nothing needs to be there.
                grains: sectors(192).saturating_mul(SECTOR),
            },
            capacity,
            grain: SE_GRAIN * SECTOR,
            directory: bytes(128)?,
            pages: Pages::new(source.clone()),
        };
        let needed = extent.grains().div_ceil(TABLE);
        check_range(source.len(), extent.directory, needed * 8)?;
        extent.check_tables(needed)?;
        Ok(extent)
    }

    fn grains(&self) -> u64 {
        (self.capacity * SECTOR).div_ceil(self.grain)
    }

    /// Offset of table `i`; `None` if nothing of it is there.
    fn table(&self, i: u64) -> Result<Option<u64>> {
        match self.kind {
            Kind::Cowd => {
                let sector = u64::from(self.pages.u32_le(self.directory + i * 4)?);
                Ok((sector != 0).then_some(sector * SECTOR))
            }
            Kind::SeSparse { tables, .. } => {
                let entry = self.pages.u64_le(self.directory + i * 8)?;
                if entry == 0 {
                    return Ok(None);
                }
                let index = entry & 0x0fff_ffff_ffff_ffff;
                if entry >> 60 != 1 || index > u64::from(u32::MAX) {
                    return Err(broken(format!(
                        "an entry of the seSparse directory is damaged: entry={entry:#x}"
                    )));
                }
                Ok(Some(tables + index * SE_TABLE_SECTORS * SECTOR))
            }
        }
    }

    /// I1.
    fn check_tables(&self, tables: u64) -> Result<()> {
        self.check_apart(tables)?;
        for i in 0..tables {
            let Some(at) = self.table(i)? else { continue };
            let count = (self.grains() - i * TABLE).min(TABLE);
            if at < 512 {
                return Err(broken("a table lies upon the header"));
            }
            for k in 0..count {
                self.entry(at, i * TABLE + k)?;
            }
        }
        Ok(())
    }

    /// I2.
    fn check_apart(&self, tables: u64) -> Result<()> {
        let width = match self.kind {
            Kind::Cowd => 4,
            Kind::SeSparse { .. } => 8,
        };
        let mut found = Vec::new();
        for i in 0..tables {
            if let Some(at) = self.table(i)? {
                let count = (self.grains() - i * TABLE).min(TABLE);
                found.push((at, count as u32 * width));
            }
        }
        check_tables_apart(&mut found)
    }

    /// The entry of grain `index` in the table at `table`, checked.
    fn entry(&self, table: u64, index: u64) -> Result<Grain> {
        let grain = match self.kind {
            Kind::Cowd => {
                let sector = u64::from(self.pages.u32_le(table + index % TABLE * 4)?);
                if sector == 0 {
                    return Ok(Grain::Absent);
                }
                sector * SECTOR
            }
            Kind::SeSparse { grains, .. } => {
                let entry = self.pages.u64_le(table + index % TABLE * 8)?;
                match entry >> 60 {
                    0 if entry == 0 => return Ok(Grain::Absent),
                    1 | 2 => return Ok(Grain::Zero),
                    3 => {
                        let place = entry >> 48 & 0xfff | (entry & 0xffff_ffff_ffff) << 12;
                        place
                            .checked_mul(self.grain)
                            .and_then(|bytes| bytes.checked_add(grains))
                            .ok_or_else(|| broken("a grain lies behind the end"))?
                    }
                    _ => {
                        return Err(broken(format!(
                            "an entry of a seSparse table is damaged: entry={entry:#x}"
                        )));
                    }
                }
            }
        };
        let bytes = self.grain.min(self.capacity * SECTOR - index * self.grain);
        if grain < 512 {
            return Err(broken(format!(
                "a grain lies upon the header: grain={index}"
            )));
        }
        check_range(self.pages.len(), grain, bytes)?;
        Ok(Grain::At(grain))
    }

    /// Grains from `index` to the end of its table, if there is no such table; else 0.
    pub(super) fn absent(&self, index: u64) -> Result<u64> {
        let table = self.table(index / TABLE)?;
        Ok(table.map_or(TABLE - index % TABLE, |_| 0))
    }

    /// Where grain `index` is.
    pub(super) fn grain(&self, index: u64) -> Result<Grain> {
        match self.table(index / TABLE)? {
            Some(table) => self.entry(table, index),
            None => Ok(Grain::Absent),
        }
    }
}
