//! Plans of VHD: fixed, dynamic, differencing. Big-endian.
//!
//! A block's data begins at a multiple of 4 KiB, and its bitmap takes the last sector of the 4 KiB
//! before, as Windows 8 and later lay it out. All blocks of a dynamic image have the same bitmap.
//!
//! Invariants:
//!
//! 1. The geometry never makes the disk larger than it is, and the creator is one whose images
//!    every product reads by their size.

use super::{
    ALIGN, Blocks, Map, Parent, Part, Plan, PlannedFile, SECTOR, Spec, blocks, count, put,
    since_2000, too_large, utf16,
};
use crate::error::Result;
use crate::formats::vhd::{COOKIE, checksum};
use crate::formats::{Identity, Uuid, unsupported};

const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;
const BLOCK: u64 = 2 << 20;
/// Largest disk with a block table: 2040 GiB, the most that Hyper-V and Virtual PC take.
const DYNAMIC_MAX: u64 = 2040 << 30;
/// Where the header of a dynamic image stands, and the block table.
const HEADER: u64 = 512;
const TABLE: u64 = 1536;
const HEADER_LEN: usize = 1024;
const VERSION: u32 = 0x0001_0000;
/// Longest parent name in the header, in bytes.
const NAME_MAX: usize = 512;

/// Cylinders, heads and sectors of a disk, by the rule of the format's specification.
fn geometry(size: u64) -> (u16, u8, u8) {
    let total = (size / SECTOR).min(65535 * 16 * 255);
    if total >= 65535 * 16 * 63 {
        return ((total / 255 / 16) as u16, 16, 255);
    }
    let mut sectors = 17;
    let mut tracks = total / sectors;
    let mut heads = tracks.div_ceil(1024).max(4);
    if tracks >= heads * 1024 || heads > 16 {
        (sectors, heads) = (31, 16);
        tracks = total / sectors;
    }
    if tracks >= heads * 1024 {
        (sectors, heads) = (63, 16);
        tracks = total / sectors;
    }
    ((tracks / heads) as u16, heads as u8, sectors as u8)
}

/// The footer, which is also at the beginning of an image that is not fixed.
fn footer(spec: &Spec, size: u64, kind: u32) -> Vec<u8> {
    let mut bytes = vec![0; SECTOR as usize];
    let (cylinders, heads, sectors) = geometry(size);
    put(&mut bytes, 0, &COOKIE);
    put(&mut bytes, 8, &2_u32.to_be_bytes());
    put(&mut bytes, 12, &VERSION.to_be_bytes());
    let header = if kind == FIXED { u64::MAX } else { HEADER };
    put(&mut bytes, 16, &header.to_be_bytes());
    put(&mut bytes, 24, &since_2000(spec.seconds).to_be_bytes());
    // I1: by this creator QEMU and Azure's tools take the size, not the geometry.
    put(&mut bytes, 28, b"win ");
    put(&mut bytes, 32, &0x000a_0000_u32.to_be_bytes());
    put(&mut bytes, 36, b"Wi2k");
    put(&mut bytes, 40, &size.to_be_bytes());
    put(&mut bytes, 48, &size.to_be_bytes());
    put(&mut bytes, 56, &cylinders.to_be_bytes());
    put(&mut bytes, 58, &[heads, sectors]);
    put(&mut bytes, 60, &kind.to_be_bytes());
    put(&mut bytes, 68, &spec.ids.uuid.0);
    let sum = checksum(&bytes, 64);
    put(&mut bytes, 64, &sum.to_be_bytes());
    bytes
}

pub(super) fn fixed(spec: &Spec) -> Result<Plan> {
    let size = spec.size.next_multiple_of(SECTOR);
    let file = PlannedFile {
        name: None,
        len: size + SECTOR,
        parts: vec![
            Part::Payload {
                at: 0,
                disk: 0,
                len: size,
            },
            Part::Bytes {
                at: size,
                bytes: footer(spec, size, FIXED),
            },
        ],
    };
    Ok(Plan::single(file, spec.size, 0))
}

pub(super) fn dynamic(spec: &Spec, map: &dyn Map) -> Result<Plan> {
    let size = spec.size.next_multiple_of(SECTOR);
    if size > DYNAMIC_MAX {
        return Err(too_large(spec, "2040 GiB"));
    }
    let kind = if spec.parent.is_some() {
        DIFFERENCING
    } else {
        DYNAMIC
    };
    let runs = blocks(map, BLOCK, spec.size)?;
    let entries = size.div_ceil(BLOCK);
    let table_end = TABLE + (entries * 4).next_multiple_of(SECTOR);
    let names = match &spec.parent {
        Some(parent) => locators(parent, table_end)?,
        None => Vec::new(),
    };
    let names_end = table_end + names.iter().map(|name| name.space).sum::<u64>();
    let first = names_end.next_multiple_of(ALIGN) + ALIGN;
    let table = table(spec, &runs, (table_end - TABLE) as usize, first)?;
    let mut head = footer(spec, size, kind);
    head.extend(header(spec, entries, &names)?);
    head.extend(table);
    for name in &names {
        let mut bytes = name.bytes.clone();
        bytes.resize(name.space as usize, 0);
        head.extend(bytes);
    }
    let mut parts = vec![Part::Bytes { at: 0, bytes: head }];
    if kind == DIFFERENCING {
        parts.extend(differing(&runs, map, first, spec.size)?);
    } else if !runs.is_empty() {
        parts.push(Part::Bytes {
            at: first - ALIGN,
            bytes: lead(&[0xff; SECTOR as usize]),
        });
        parts.extend(runs.iter().map(|run| Part::Led {
            at: first + run.before * (BLOCK + ALIGN),
            disk: run.first * BLOCK,
            count: run.count,
            block: BLOCK,
            lead: first - ALIGN,
        }));
    }
    let end = match count(&runs) {
        0 => names_end.next_multiple_of(ALIGN),
        blocks => first + blocks * (BLOCK + ALIGN) - ALIGN,
    };
    parts.push(Part::Bytes {
        at: end,
        bytes: footer(spec, size, kind),
    });
    let file = PlannedFile {
        name: None,
        len: end + SECTOR,
        parts,
    };
    Ok(Plan::single(file, spec.size, BLOCK))
}

/// The block table of `len` bytes, for blocks whose data stands from `first` on.
fn table(spec: &Spec, runs: &[Blocks], len: usize, first: u64) -> Result<Vec<u8>> {
    let mut table = vec![0xff; len];
    for run in runs {
        for i in 0..run.count {
            let bitmap = first + (run.before + i) * (BLOCK + ALIGN) - SECTOR;
            let sector = u32::try_from(bitmap / SECTOR)
                .map_err(|_| too_large(spec, "2 TiB of blocks that are used"))?;
            let at = (run.first + i) as usize * 4;
            put(&mut table, at, &sector.to_be_bytes());
        }
    }
    Ok(table)
}

/// The 4 KiB before a block, with its bitmap at the end.
fn lead(bitmap: &[u8; SECTOR as usize]) -> Vec<u8> {
    let mut bytes = vec![0; ALIGN as usize];
    put(&mut bytes, (ALIGN - SECTOR) as usize, bitmap);
    bytes
}

/// Blocks of a differencing image: each with a bitmap of what differs.
fn differing(runs: &[Blocks], map: &dyn Map, first: u64, size: u64) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    for run in runs {
        for i in 0..run.count {
            let start = (run.first + i) * BLOCK;
            let end = (start + BLOCK).min(size);
            let data = first + (run.before + i) * (BLOCK + ALIGN);
            let mut bitmap = [0_u8; SECTOR as usize];
            let mut payload = Vec::new();
            let mut at = start;
            while at < end {
                let Some(range) = map.next(at)?.filter(|range| range.start < end) else {
                    break;
                };
                let to = range.end.min(end);
                for sector in (range.start - start) / SECTOR..(to - start).div_ceil(SECTOR) {
                    bitmap[sector as usize / 8] |= 0x80 >> (sector % 8);
                }
                payload.push(Part::Payload {
                    at: data + range.start - start,
                    disk: range.start,
                    len: to - range.start,
                });
                at = to.next_multiple_of(ALIGN);
            }
            parts.push(Part::Bytes {
                at: data - ALIGN,
                bytes: lead(&bitmap),
            });
            parts.extend(payload);
        }
    }
    Ok(parts)
}

/// A name of the parent, behind the block table.
struct Locator {
    code: [u8; 4],
    bytes: Vec<u8>,
    at: u64,
    space: u64,
}

fn locators(parent: &Parent, from: u64) -> Result<Vec<Locator>> {
    let relative = format!(".\\{}", parent.name.replace('/', "\\"));
    let mut names = vec![(*b"W2ru", relative)];
    if let Some(absolute) = &parent.absolute {
        names.push((*b"W2ku", absolute.clone()));
    }
    let mut at = from;
    let mut locators = Vec::new();
    for (code, name) in names {
        let bytes = utf16(&name, u16::to_le_bytes);
        let space = (bytes.len() as u64).next_multiple_of(SECTOR);
        locators.push(Locator {
            code,
            bytes,
            at,
            space,
        });
        at += space;
    }
    Ok(locators)
}

fn header(spec: &Spec, entries: u64, names: &[Locator]) -> Result<Vec<u8>> {
    let mut bytes = vec![0; HEADER_LEN];
    put(&mut bytes, 0, b"cxsparse");
    put(&mut bytes, 8, &u64::MAX.to_be_bytes());
    put(&mut bytes, 16, &TABLE.to_be_bytes());
    put(&mut bytes, 24, &VERSION.to_be_bytes());
    put(&mut bytes, 28, &(entries as u32).to_be_bytes());
    put(&mut bytes, 32, &(BLOCK as u32).to_be_bytes());
    if let Some(parent) = &spec.parent {
        put(&mut bytes, 40, &parent_uuid(parent)?.0);
        let mut name = utf16(&parent.name, u16::to_be_bytes);
        name.truncate(NAME_MAX);
        put(&mut bytes, 64, &name);
        for (i, name) in names.iter().enumerate() {
            let at = 576 + i * 24;
            put(&mut bytes, at, &name.code);
            // The specification says sectors; every product writes bytes.
            put(&mut bytes, at + 4, &(name.space as u32).to_be_bytes());
            put(&mut bytes, at + 8, &(name.bytes.len() as u32).to_be_bytes());
            put(&mut bytes, at + 16, &name.at.to_be_bytes());
        }
    }
    let sum = checksum(&bytes, 36);
    put(&mut bytes, 36, &sum.to_be_bytes());
    Ok(bytes)
}

fn parent_uuid(parent: &Parent) -> Result<Uuid> {
    match parent.identity {
        Some(Identity::Uuid(uuid)) => Ok(uuid),
        _ => Err(unsupported(
            "a differencing VHD needs a VHD as its parent, which has an id",
        )),
    }
}
