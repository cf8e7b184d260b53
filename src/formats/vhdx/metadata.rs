//! Headers, regions and metadata of a VHDX.
//!
//! Layout: MS-VHDX, 2.2 and 2.6. Little-endian; a structure's CRC-32C is that of the structure with
//! its checksum zero.
//!
//! Invariants:
//!
//! 1. Regions and the log do not overlap, and begin behind the headers.
//! 2. What is marked as required and not known refuses the image.

use std::collections::HashSet;

use super::log::Log;
use crate::error::Result;
use crate::formats::bytes::{guid, utf16};
use crate::formats::source::{check_range, read_vec};
use crate::formats::{Identity, ParentRef, Source, Uuid, broken, unsupported};
use crate::ondisk::{crc32c, get_u16, get_u32, get_u64};

pub(super) const MIB: u64 = 1 << 20;
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
const TABLE_LEN: usize = 64 << 10;
const ENTRIES_MAX: u32 = 2047;
/// Most bytes of one item of metadata.
const ITEM_MAX: u32 = 1 << 20;
/// Largest disk.
const SIZE_MAX: u64 = 64 << 40;

pub(in crate::formats) const BAT: &str = "2dc27766f62342009d64115e9bfd4a08";
pub(in crate::formats) const METADATA: &str = "8b7ca20647904b9ab8fe575f050f886e";
pub(in crate::formats) const FILE_PARAMETERS: &str = "caa16737fa364d43b3b633f0aa44e76b";
pub(in crate::formats) const DISK_SIZE: &str = "2fa54224cd1b4876b2115dbed83bf4b8";
pub(in crate::formats) const DISK_ID: &str = "beca12abb2e6452393efc309e000c746";
pub(in crate::formats) const LOGICAL_SECTOR: &str = "8141bf1da96f4709ba47f233a8faab5f";
pub(in crate::formats) const PHYSICAL_SECTOR: &str = "cda348c7445d44719cc9e9885251c556";
pub(in crate::formats) const PARENT_LOCATOR: &str = "a8d35f2db30b454dabf7d3d84834ab0c";
pub(in crate::formats) const LOCATOR_TYPE: &str = "b04aefb7d19e4a81b78925b8e9445913";

/// What the newer valid header says.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) data_write: Uuid,
    pub(super) log: Log,
}

/// Where tables are: offset and length in bytes.
#[derive(Debug)]
pub(super) struct Regions {
    pub(super) bat: (u64, u64),
    pub(super) metadata: (u64, u64),
    /// Everything that no block of the disk may overlap.
    pub(super) taken: Vec<(u64, u64)>,
}

/// What the metadata says of the disk.
#[derive(Debug)]
pub(super) struct Metadata {
    pub(super) block: u64,
    pub(super) fixed: bool,
    pub(super) has_parent: bool,
    pub(super) size: u64,
    pub(super) sector: u64,
    pub(super) parent: Option<ParentRef>,
}

fn is(id: Uuid, name: &str) -> bool {
    Uuid::parse(name) == Some(id)
}

/// True if the checksum at 4 is that of all of `bytes`.
fn whole(bytes: &[u8]) -> bool {
    let mut copy = bytes.to_vec();
    copy[4..8].fill(0);
    crc32c(&copy) == get_u32(bytes, 4)
}

/// The newer of the valid headers. Disk2vhd gives both the same number: then the first counts.
pub(super) fn header(source: &dyn Source) -> Result<Header> {
    let mut best: Option<(u64, Vec<u8>)> = None;
    for at in HEADERS {
        let Ok(bytes) = read_vec(source, at, 4096) else {
            continue;
        };
        let seq = get_u64(&bytes, 8);
        let newer = best.as_ref().is_none_or(|(best, _)| seq > *best);
        if bytes[..4] == *b"head" && whole(&bytes) && newer {
            best = Some((seq, bytes));
        }
    }
    let Some((_, bytes)) = best else {
        return Err(broken("both headers of the VHDX are damaged"));
    };
    if get_u16(&bytes, 66) != 1 {
        return Err(unsupported(format!(
            "this version of VHDX is not known: version={}",
            get_u16(&bytes, 66)
        )));
    }
    let mut log = [0; 16];
    log.copy_from_slice(&bytes[48..64]);
    let log = Log {
        guid: log,
        offset: get_u64(&bytes, 72),
        len: get_u32(&bytes, 68).into(),
    };
    if log.guid != [0; 16] {
        if get_u16(&bytes, 64) != 0 {
            return Err(unsupported("this version of the log is not known"));
        }
        if log.len == 0 {
            return Err(broken("the image has a log of no length"));
        }
    }
    let aligned = log.offset.is_multiple_of(MIB) && log.len.is_multiple_of(MIB);
    if log.len > 0 && (!aligned || log.offset < MIB) {
        return Err(broken(format!(
            "the log lies where none can be: offset={} bytes={}",
            log.offset, log.len
        )));
    }
    check_range(source.len(), log.offset, log.len)?;
    Ok(Header {
        data_write: guid(&bytes, 32),
        log,
    })
}

/// The regions, from the first table that is whole.
pub(super) fn regions(source: &dyn Source, log: &Log) -> Result<Regions> {
    let table = REGION_TABLES.iter().find_map(|at| {
        let bytes = read_vec(source, *at, TABLE_LEN).ok()?;
        let fits = get_u32(&bytes, 8) <= ENTRIES_MAX;
        (bytes[..4] == *b"regi" && whole(&bytes) && fits).then_some(bytes)
    });
    let Some(table) = table else {
        return Err(broken("both region tables of the VHDX are damaged"));
    };
    let (mut bat, mut metadata) = (None, None);
    let mut taken = vec![(0, MIB)];
    if log.len > 0 {
        taken.push((log.offset, log.offset + log.len));
    }
    for i in 0..get_u32(&table, 8) as usize {
        let entry = &table[16 + i * 32..48 + i * 32];
        let (id, at) = (guid(entry, 0), get_u64(entry, 16));
        let (len, required) = (u64::from(get_u32(entry, 24)), get_u32(entry, 28) & 1 == 1);
        let slot = if is(id, BAT) {
            &mut bat
        } else if is(id, METADATA) {
            &mut metadata
        } else if required {
            return Err(unsupported(format!(
                "a region that is required is not known: {id}"
            )));
        } else {
            continue;
        };
        let aligned = at.is_multiple_of(MIB) && len.is_multiple_of(MIB) && len > 0;
        let end = at.checked_add(len);
        let overlaps = |end| taken.iter().any(|(from, to)| at < *to && *from < end);
        match end {
            Some(end) if aligned && slot.is_none() && !overlaps(end) => {
                *slot = Some((at, len));
                taken.push((at, end));
            }
            _ => {
                return Err(broken(format!(
                    "a region overlaps another, or lies where none can be: offset={at} bytes={len}"
                )));
            }
        }
    }
    match (bat, metadata) {
        (Some(bat), Some(metadata)) => Ok(Regions {
            bat,
            metadata,
            taken,
        }),
        _ => Err(broken("a region of the VHDX is missing")),
    }
}

/// The items of the metadata region.
struct Items {
    found: Vec<(Uuid, Vec<u8>)>,
}

impl Items {
    fn read(source: &dyn Source, (at, len): (u64, u64)) -> Result<Self> {
        let table = read_vec(source, at, TABLE_LEN)?;
        let count = u32::from(get_u16(&table, 10));
        if table[..8] != *b"metadata" || count > ENTRIES_MAX {
            return Err(broken("the metadata table of the VHDX is damaged"));
        }
        let known = [
            FILE_PARAMETERS,
            DISK_SIZE,
            DISK_ID,
            LOGICAL_SECTOR,
            PHYSICAL_SECTOR,
            PARENT_LOCATOR,
        ];
        let (mut found, mut seen) = (Vec::new(), HashSet::new());
        for i in 0..count as usize {
            let entry = &table[32 + i * 32..64 + i * 32];
            let id = guid(entry, 0);
            let (offset, size) = (get_u32(entry, 16), get_u32(entry, 20));
            if !known.iter().any(|name| is(id, name)) {
                if get_u32(entry, 24) & 4 != 0 {
                    return Err(unsupported(format!(
                        "an item of the metadata that is required is not known: {id}"
                    )));
                }
                continue;
            }
            let inside = u64::from(offset) + u64::from(size) <= len;
            if !seen.insert(id) || size > ITEM_MAX || !inside || offset < TABLE_LEN as u32 {
                return Err(broken(format!(
                    "an item of the metadata is there twice or lies outside: {id}"
                )));
            }
            found.push((id, read_vec(source, at + u64::from(offset), size as usize)?));
        }
        Ok(Self { found })
    }

    fn get(&self, name: &str, len: usize, what: &str) -> Result<&[u8]> {
        match self.found.iter().find(|(id, _)| is(*id, name)) {
            Some((_, bytes)) if bytes.len() >= len => Ok(bytes),
            _ => Err(broken(format!("the metadata does not tell {what}"))),
        }
    }
}

/// What the metadata says, all of it checked.
pub(super) fn metadata(source: &dyn Source, regions: &Regions) -> Result<Metadata> {
    let items = Items::read(source, regions.metadata)?;
    let file = items.get(FILE_PARAMETERS, 8, "the block size")?;
    let (block, flags) = (u64::from(get_u32(file, 0)), get_u32(file, 4));
    let size = get_u64(items.get(DISK_SIZE, 8, "the size of the disk")?, 0);
    let sector = u64::from(get_u32(
        items.get(LOGICAL_SECTOR, 4, "the size of a sector")?,
        0,
    ));
    if !block.is_power_of_two() || !(MIB..=256 * MIB).contains(&block) {
        return Err(broken(format!(
            "the block size is no power of two from 1 MiB to 256 MiB: block={block}"
        )));
    }
    if sector != 512 && sector != 4096 {
        return Err(broken(format!(
            "a sector has 512 or 4096 bytes: sector={sector}"
        )));
    }
    if size == 0 || size > SIZE_MAX || !size.is_multiple_of(sector) {
        return Err(broken(format!(
            "the size of the disk is not one that a VHDX can have: size={size}"
        )));
    }
    let has_parent = flags & 2 != 0;
    let parent = if has_parent {
        Some(locator(items.get(
            PARENT_LOCATOR,
            20,
            "where the parent is",
        )?)?)
    } else {
        None
    };
    Ok(Metadata {
        block,
        fixed: flags & 1 != 0,
        has_parent,
        size,
        sector,
        parent,
    })
}

/// Keys and values of the parent locator.
fn locator(item: &[u8]) -> Result<ParentRef> {
    if !is(guid(item, 0), LOCATOR_TYPE) {
        return Err(unsupported(format!(
            "this kind of parent locator is not known: {}",
            guid(item, 0)
        )));
    }
    let count = usize::from(get_u16(item, 18));
    let mut pairs = Vec::new();
    for i in 0..count {
        let Some(entry) = item.get(20 + i * 12..32 + i * 12) else {
            return Err(broken("the parent locator is cut off"));
        };
        let text = |at: usize, len: usize| {
            let (at, len) = (
                get_u32(entry, at) as usize,
                usize::from(get_u16(entry, len)),
            );
            item.get(at..at.checked_add(len)?)
                .map(|bytes| utf16(bytes, u16::from_le_bytes))
        };
        let (Some(key), Some(value)) = (text(0, 8), text(4, 10)) else {
            return Err(broken("the parent locator is cut off"));
        };
        pairs.push((key, value));
    }
    let value = |key: &str| {
        let found = pairs.iter().find(|pair| pair.0 == key);
        found.map(|pair| pair.1.clone())
    };
    let identity = value("parent_linkage").and_then(|text| Uuid::parse(&text));
    let Some(identity) = identity.filter(|id| !id.is_nil()) else {
        return Err(broken("the parent locator does not tell the parent's id"));
    };
    Ok(ParentRef {
        identity: Some(Identity::Uuid(identity)),
        names: ["relative_path", "volume_path", "absolute_win32_path"]
            .iter()
            .filter_map(|key| value(key))
            .collect(),
        ..ParentRef::default()
    })
}
