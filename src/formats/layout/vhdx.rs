//! Plans of VHDX: fixed, dynamic, differencing. Little-endian.
//!
//! Headers, log, metadata and block table come first, then the blocks without gaps. The log is
//! empty and both headers are whole.
//!
//! Invariants:
//!
//! 1. Regions and blocks stand at multiples of 1 MiB.

use super::{
    ALIGN, Blocks, MIB, Map, Parent, Part, Plan, PlannedFile, SECTOR, Shape, Spec, all_blocks,
    blocks, contiguous, count, put, too_large, utf16,
};
use crate::error::Result;
use crate::formats::vhdx::MAGIC;
use crate::formats::vhdx::metadata::{
    self, DISK_ID, DISK_SIZE, FILE_PARAMETERS, LOCATOR_TYPE, LOGICAL_SECTOR, PARENT_LOCATOR,
    PHYSICAL_SECTOR,
};
use crate::formats::{Identity, Uuid, unsupported};
use crate::ondisk::crc32c;

const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
const TABLE_LEN: usize = 64 << 10;
const LOG: u64 = MIB;
const METADATA: u64 = 2 * MIB;
const BAT: u64 = 3 * MIB;
const SIZE_MAX: u64 = 64 << 40;
/// Blocks of 2 MiB up to this size of the disk, of 32 MiB above: a block table of 4 MiB.
const SMALL_MAX: u64 = 1 << 40;

const FULL: u64 = 6;
const PARTIAL: u64 = 7;

fn guid(name: &str) -> [u8; 16] {
    // The constants above are well formed, as the reader's tests find by them.
    Uuid::parse(name).unwrap_or_default().to_guid()
}

/// What the tables are made of.
struct Shaped<'a> {
    spec: &'a Spec,
    size: u64,
    sector: u64,
    block: u64,
    /// Blocks between two entries of sector bitmaps.
    chunk: u64,
    runs: Vec<Blocks>,
}

pub(super) fn plan(spec: &Spec, map: &dyn Map) -> Result<Plan> {
    let sector = if spec.sector == 4096 { ALIGN } else { SECTOR };
    let size = spec.size.next_multiple_of(sector);
    if size > SIZE_MAX {
        return Err(too_large(spec, "64 TiB"));
    }
    let block = if size > SMALL_MAX { 32 * MIB } else { 2 * MIB };
    let runs = match spec.shape {
        Shape::VhdxFixed => all_blocks(block, spec.size),
        _ => blocks(map, block, spec.size)?,
    };
    let shaped = Shaped {
        spec,
        size,
        sector,
        block,
        chunk: (sector << 23) / block,
        runs,
    };
    let bat_len = (shaped.entries() * 8).next_multiple_of(MIB);
    let bitmaps = if spec.parent.is_some() {
        shaped.bitmaps(map)?
    } else {
        Vec::new()
    };
    let first = BAT + bat_len + bitmaps.len() as u64 * MIB;
    let mut parts = head(spec, bat_len);
    parts.push(Part::Bytes {
        at: METADATA,
        bytes: shaped.metadata()?,
    });
    parts.push(Part::Bytes {
        at: BAT,
        bytes: shaped.table(first, &bitmaps),
    });
    for (i, (_, bytes)) in bitmaps.iter().enumerate() {
        parts.push(Part::Bytes {
            at: BAT + bat_len + i as u64 * MIB,
            bytes: bytes.clone(),
        });
    }
    let len = first + count(&shaped.runs) * block;
    if spec.parent.is_some() {
        parts.extend(shaped.differing(map, first)?);
    } else {
        parts.extend(contiguous(&shaped.runs, first, block));
    }
    let file = PlannedFile {
        name: None,
        len,
        parts,
    };
    Ok(Plan::single(file, spec.size, block))
}

/// What stands in the first MiB.
fn head(spec: &Spec, bat_len: u64) -> Vec<Part> {
    let (headers, tables) = (HEADERS, REGION_TABLES);
    let regions = regions(bat_len);
    [
        (0, file_id()),
        (headers[0], header(spec, 1)),
        (headers[1], header(spec, 2)),
        (tables[0], regions.clone()),
        (tables[1], regions),
    ]
    .into_iter()
    .map(|(at, bytes)| Part::Bytes { at, bytes })
    .collect()
}

fn file_id() -> Vec<u8> {
    let mut bytes = vec![0; 520];
    put(&mut bytes, 0, &MAGIC);
    put(&mut bytes, 8, &utf16("nodupe", u16::to_le_bytes));
    bytes
}

/// With its CRC-32C at 4.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let sum = crc32c(&bytes);
    put(&mut bytes, 4, &sum.to_le_bytes());
    bytes
}

fn header(spec: &Spec, sequence: u64) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    put(&mut bytes, 0, b"head");
    put(&mut bytes, 8, &sequence.to_le_bytes());
    put(&mut bytes, 16, &spec.ids.others[0].to_guid());
    put(&mut bytes, 32, &spec.ids.uuid.to_guid());
    put(&mut bytes, 66, &1_u16.to_le_bytes());
    put(&mut bytes, 68, &(MIB as u32).to_le_bytes());
    put(&mut bytes, 72, &LOG.to_le_bytes());
    sealed(bytes)
}

fn regions(bat_len: u64) -> Vec<u8> {
    let mut bytes = vec![0; TABLE_LEN];
    put(&mut bytes, 0, b"regi");
    put(&mut bytes, 8, &2_u32.to_le_bytes());
    let entries = [
        (metadata::BAT, BAT, bat_len),
        (metadata::METADATA, METADATA, MIB),
    ];
    for (i, (id, at, len)) in entries.into_iter().enumerate() {
        let entry = 16 + i * 32;
        put(&mut bytes, entry, &guid(id));
        put(&mut bytes, entry + 16, &at.to_le_bytes());
        put(&mut bytes, entry + 24, &(len as u32).to_le_bytes());
        put(&mut bytes, entry + 28, &1_u32.to_le_bytes());
    }
    sealed(bytes)
}

impl Shaped<'_> {
    fn entries(&self) -> u64 {
        let payload = self.size.div_ceil(self.block);
        if self.spec.parent.is_some() {
            payload.div_ceil(self.chunk) * (self.chunk + 1)
        } else {
            payload + (payload - 1) / self.chunk
        }
    }

    /// The table of items, and the items.
    fn metadata(&self) -> Result<Vec<u8>> {
        let spec = self.spec;
        let mut flags = u32::from(spec.shape == Shape::VhdxFixed);
        flags |= u32::from(spec.parent.is_some()) << 1;
        let mut parameters = (self.block as u32).to_le_bytes().to_vec();
        parameters.extend(flags.to_le_bytes());
        // Flags: 2 belongs to the disk, 4 must be understood.
        let mut items = vec![
            (FILE_PARAMETERS, 4_u32, parameters),
            (DISK_SIZE, 6, self.size.to_le_bytes().to_vec()),
            (DISK_ID, 6, spec.ids.others[1].to_guid().to_vec()),
            (
                LOGICAL_SECTOR,
                6,
                (self.sector as u32).to_le_bytes().to_vec(),
            ),
            (PHYSICAL_SECTOR, 6, 4096_u32.to_le_bytes().to_vec()),
        ];
        if let Some(parent) = &spec.parent {
            items.push((PARENT_LOCATOR, 4, locator(parent)?));
        }
        let mut bytes = vec![0; TABLE_LEN];
        put(&mut bytes, 0, b"metadata");
        put(&mut bytes, 10, &(items.len() as u16).to_le_bytes());
        for (i, (id, flags, item)) in items.into_iter().enumerate() {
            let entry = 32 + i * 32;
            let at = bytes.len() as u32;
            put(&mut bytes, entry, &guid(id));
            put(&mut bytes, entry + 16, &at.to_le_bytes());
            put(&mut bytes, entry + 20, &(item.len() as u32).to_le_bytes());
            put(&mut bytes, entry + 24, &flags.to_le_bytes());
            bytes.extend(item);
        }
        Ok(bytes)
    }

    /// The block allocation table, with blocks from `first` on.
    fn table(&self, first: u64, bitmaps: &[(u64, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = vec![0; (self.entries() * 8) as usize];
        let mut entry = |index: u64, at: u64, state: u64| {
            put(&mut bytes, index as usize * 8, &(at | state).to_le_bytes());
        };
        let state = if self.spec.parent.is_some() {
            PARTIAL
        } else {
            FULL
        };
        for run in &self.runs {
            for i in 0..run.count {
                let block = run.first + i;
                let at = first + (run.before + i) * self.block;
                entry(block + block / self.chunk, at, state);
            }
        }
        let bitmaps_at = first - bitmaps.len() as u64 * MIB;
        for (i, (chunk, _)) in bitmaps.iter().enumerate() {
            let index = (chunk + 1) * (self.chunk + 1) - 1;
            entry(index, bitmaps_at + i as u64 * MIB, FULL);
        }
        bytes
    }

    /// Per chunk with a block in it, which sectors are here.
    fn bitmaps(&self, map: &dyn Map) -> Result<Vec<(u64, Vec<u8>)>> {
        let span = self.chunk * self.block;
        let mut bitmaps: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut at = 0;
        while at < self.spec.size {
            let Some(range) = map.next(at)? else { break };
            let chunk = range.start / span;
            let end = range.end.min((chunk + 1) * span);
            if bitmaps.last().is_none_or(|last| last.0 != chunk) {
                bitmaps.push((chunk, vec![0; MIB as usize]));
            }
            if let Some((_, bytes)) = bitmaps.last_mut() {
                let base = chunk * span;
                let from = (range.start - base) / self.sector;
                for sector in from..(end - base).div_ceil(self.sector) {
                    bytes[sector as usize / 8] |= 1 << (sector % 8);
                }
            }
            at = end.next_multiple_of(ALIGN);
        }
        Ok(bitmaps)
    }

    fn differing(&self, map: &dyn Map, first: u64) -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        for run in &self.runs {
            let (start, end) = (
                run.first * self.block,
                ((run.first + run.count) * self.block).min(self.spec.size),
            );
            let mut at = start;
            while at < end {
                let Some(range) = map.next(at)?.filter(|range| range.start < end) else {
                    break;
                };
                let to = range.end.min(end);
                parts.push(Part::Payload {
                    at: first + run.before * self.block + range.start - start,
                    disk: range.start,
                    len: to - range.start,
                });
                at = to.next_multiple_of(ALIGN);
            }
        }
        Ok(parts)
    }
}

/// Keys and values that lead to the parent.
fn locator(parent: &Parent) -> Result<Vec<u8>> {
    let Some(Identity::Uuid(uuid)) = parent.identity else {
        return Err(unsupported(
            "a differencing VHDX needs a VHDX as its parent, which has an id",
        ));
    };
    let mut pairs = vec![
        ("parent_linkage", format!("{{{uuid}}}")),
        (
            "relative_path",
            format!(".\\{}", parent.name.replace('/', "\\")),
        ),
    ];
    if let Some(absolute) = &parent.absolute {
        pairs.push(("absolute_win32_path", absolute.clone()));
    }
    let mut bytes = guid(LOCATOR_TYPE).to_vec();
    bytes.extend([0; 2]);
    bytes.extend((pairs.len() as u16).to_le_bytes());
    let mut texts = Vec::new();
    let base = 20 + pairs.len() * 12;
    for (key, value) in &pairs {
        let (key, value) = (utf16(key, u16::to_le_bytes), utf16(value, u16::to_le_bytes));
        let at = base + texts.len();
        bytes.extend((at as u32).to_le_bytes());
        bytes.extend(((at + key.len()) as u32).to_le_bytes());
        bytes.extend((key.len() as u16).to_le_bytes());
        bytes.extend((value.len() as u16).to_le_bytes());
        texts.extend(key);
        texts.extend(value);
    }
    bytes.extend(texts);
    Ok(bytes)
}
