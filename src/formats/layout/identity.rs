//! New ids for an image that is there: which bytes of it change.
//!
//! Invariants:
//!
//! 1. The image is whole before and after the edits; sizes, tables and data stay as they are.
//! 2. What is not known is refused: an image whose copy would share files with it, a dirty log.

use super::Ids;
use crate::error::{Error, Kind, Result};
use crate::formats::source::read_vec;
use crate::formats::vhd::{self, checksum};
use crate::formats::vmdk::descriptor::{self, Descriptor};
use crate::formats::{Format, Source, broken, unsupported};
use crate::ondisk::{crc32c, get_u16, get_u32, get_u64};

const SECTOR: u64 = 512;
const VHDX_HEADERS: [u64; 2] = [64 << 10, 128 << 10];
/// Where VDI keeps its id, and that of its last change.
const VDI_IDS: [u64; 2] = [392, 408];
/// Longest descriptor inside a sparse VMDK.
const DESCRIPTOR_MAX: u64 = 64 << 10;

/// Bytes to write, and where.
pub type Edits = Vec<(u64, Vec<u8>)>;

/// What gives an image of `format` the identity `ids`.
///
/// # Errors
/// `Unsupported` for what has no identity, or not in this file alone; `Corrupt`; `Io`.
pub fn renew(source: &dyn Source, format: Format, ids: &Ids) -> Result<Edits> {
    match format {
        Format::Vhd => vhd(source, ids),
        Format::Vhdx => vhdx(source, ids),
        Format::Vmdk => vmdk(source, ids),
        Format::Vdi => Ok(VDI_IDS
            .into_iter()
            .zip([ids.uuid, ids.others[0]])
            .map(|(at, uuid)| (at, uuid.to_guid().to_vec()))
            .collect()),
        Format::Raw | Format::Qcow2 => Err(unsupported(format!(
            "a {format} image has no identity: clone it without --new-identity"
        ))),
    }
}

fn vhd(source: &dyn Source, ids: &Ids) -> Result<Edits> {
    let (footer, at, _) = vhd::footer(source)?;
    if at + SECTOR != source.len() {
        return Err(unsupported(
            "the footer at the end of the VHD is not whole: convert the image instead",
        ));
    }
    let mut bytes = read_vec(source, at, SECTOR as usize)?;
    bytes[68..84].copy_from_slice(&ids.uuid.0);
    let sum = checksum(&bytes, 64);
    bytes[64..68].copy_from_slice(&sum.to_be_bytes());
    let mut edits = vec![(at, bytes.clone())];
    // All but fixed images have a copy. What stands there in a fixed one is the guest's.
    if matches!(footer.kind, vhd::DYNAMIC | vhd::DIFFERENCING) {
        let copy = read_vec(source, 0, SECTOR as usize)?;
        if vhd::Footer::decode(&copy).is_none_or(|copy| copy.kind != footer.kind) {
            return Err(unsupported(
                "the copy of the footer at the beginning of the VHD is not whole: convert the \
                 image instead",
            ));
        }
        edits.push((0, bytes));
    } else if footer.kind != vhd::FIXED {
        return Err(unsupported(format!(
            "this type of VHD is not known: {}",
            footer.kind
        )));
    }
    Ok(edits)
}

fn vhdx(source: &dyn Source, ids: &Ids) -> Result<Edits> {
    let mut edits = Edits::new();
    for (i, at) in VHDX_HEADERS.into_iter().enumerate() {
        let mut bytes = read_vec(source, at, 4096)?;
        let sum = get_u32(&bytes, 4);
        bytes[4..8].fill(0);
        if bytes[..4] != *b"head" || crc32c(&bytes) != sum {
            return Err(broken(
                "a header of the VHDX is not whole: convert it instead",
            ));
        }
        if bytes[48..64] != [0; 16] {
            return Err(Error::new(
                Kind::Busy,
                "the VHDX is in use, or was not closed cleanly: close it first",
            ));
        }
        // The second one is the newer.
        bytes[8..16].copy_from_slice(&(i as u64 + 1).to_le_bytes());
        bytes[16..32].copy_from_slice(&ids.others[0].to_guid());
        bytes[32..48].copy_from_slice(&ids.uuid.to_guid());
        let sum = crc32c(&bytes);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        edits.push((at, bytes));
    }
    if let Some(at) = disk_id(source)? {
        edits.push((at, ids.others[1].to_guid().to_vec()));
    }
    Ok(edits)
}

/// Where the id of the virtual disk stands. A chain has one: that of a child stays.
fn disk_id(source: &dyn Source) -> Result<Option<u64>> {
    const METADATA: [u8; 4] = [0x06, 0xa2, 0x7c, 0x8b];
    const DISK_ID: [u8; 4] = [0xab, 0x12, 0xca, 0xbe];
    const PARENT_LOCATOR: [u8; 4] = [0x2d, 0x5f, 0xd3, 0xa8];
    let table = read_vec(source, 192 << 10, 64 << 10)?;
    let count = get_u32(&table, 8).min(2047) as usize;
    let regions = (0..count).map(|i| &table[16 + i * 32..48 + i * 32]);
    let Some(region) = regions.into_iter().find(|region| region[..4] == METADATA) else {
        return Ok(None);
    };
    let region = get_u64(region, 16);
    let items = read_vec(source, region, 64 << 10)?;
    let count = usize::from(get_u16(&items, 10)).min(2047);
    let item = |id: [u8; 4]| {
        let mut items = (0..count).map(|i| &items[32 + i * 32..64 + i * 32]);
        items.find(|item| item[..4] == id)
    };
    if item(PARENT_LOCATOR).is_some() {
        return Ok(None);
    }
    let at = item(DISK_ID).map(|item| region + u64::from(get_u32(item, 16)));
    Ok(at.filter(|at| at + 16 <= source.len()))
}

fn vmdk(source: &dyn Source, ids: &Ids) -> Result<Edits> {
    let header = read_vec(source, 0, source.len().min(SECTOR) as usize)?;
    if !header.starts_with(b"KDMV") || header.len() < SECTOR as usize {
        return Err(unsupported(
            "this is an extent of a VMDK, or its descriptor: neither is a disk alone",
        ));
    }
    let (at, len) = (get_u64(&header, 28), get_u64(&header, 36));
    let (Some(at), Some(len)) = (at.checked_mul(SECTOR), len.checked_mul(SECTOR)) else {
        return Err(broken("the embedded descriptor lies behind the end"));
    };
    if len == 0 || len > DESCRIPTOR_MAX {
        return Err(unsupported(
            "this is an extent of a VMDK, which has no identity of its own",
        ));
    }
    let mut text = read_vec(source, at, len as usize)?;
    renew_text(&mut text, ids)?;
    Ok(vec![(at, text)])
}

/// The descriptor of a copy of a VMDK of several files; `None` if the file is no descriptor.
/// `rename` tells what the copy of a file of the disk is called.
///
/// # Errors
/// `Corrupt`; `Unsupported`; `Io`; those of `rename`.
pub fn renew_descriptor(
    source: &dyn Source,
    ids: &Ids,
    rename: &mut dyn FnMut(&str) -> Result<String>,
) -> Result<Option<Vec<u8>>> {
    let head = read_vec(source, 0, source.len().min(SECTOR) as usize)?;
    if !descriptor::is_descriptor(&head) || source.len() > descriptor::FILE_MAX {
        return Ok(None);
    }
    let old = read_vec(source, 0, source.len() as usize)?;
    Descriptor::parse(&old)?;
    let old = String::from_utf8(old)
        .map_err(|_| unsupported("the descriptor is not in UTF-8: convert the image instead"))?;
    let mut text = String::with_capacity(old.len());
    for line in old.split_inclusive('\n') {
        let word = line.split_whitespace().next().unwrap_or_default();
        let is_extent = ["RW", "RDONLY"]
            .iter()
            .any(|w| w.eq_ignore_ascii_case(word));
        let mut quoted = line.splitn(3, '"');
        match (quoted.next(), quoted.next(), quoted.next()) {
            (Some(head), Some(name), Some(tail)) if is_extent => {
                text.extend([head, "\"", &rename(name)?, "\"", tail]);
            }
            // Which blocks of the original changed says nothing about the copy.
            _ if word.to_ascii_lowercase().starts_with("changetrackpath") => {}
            _ => text.push_str(line),
        }
    }
    let mut text = text.into_bytes();
    renew_text(&mut text, ids)?;
    Ok(Some(text))
}

/// Gives a descriptor new ids.
fn renew_text(text: &mut [u8], ids: &Ids) -> Result<()> {
    if !replace(text, "cid", &format!("{:08x}", ids.cid)) {
        return Err(broken("the descriptor has no CID"));
    }
    let uuid: String = ids
        .uuid
        .0
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let long: String = ids.others[0].0[..12]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let long = format!("{long}{:08x}", ids.cid);
    replace(text, "ddb.longcontentid", &long);
    for key in ["ddb.uuid", "ddb.uuid.image"] {
        replace(text, key, &uuid);
    }
    Ok(())
}

/// Replaces the hexadecimal digits of the value of `key` by those of `value`; whatever stands
/// between them stays. False if there is no such key with as many digits.
fn replace(text: &mut [u8], key: &str, value: &str) -> bool {
    let mut start = 0;
    while start < text.len() && text[start] != 0 {
        let rest = &mut text[start..];
        let end = rest.iter().position(|byte| matches!(byte, b'\n' | 0));
        let end = end.unwrap_or(rest.len());
        let line = &mut rest[..end];
        let len = line.len() + 1;
        if let Some(equals) = line.iter().position(|byte| *byte == b'=') {
            let (name, digits) = line.split_at_mut(equals);
            if name.trim_ascii().eq_ignore_ascii_case(key.as_bytes()) {
                let places: Vec<&mut u8> = digits
                    .iter_mut()
                    .filter(|byte| byte.is_ascii_hexdigit())
                    .collect();
                if places.len() != value.len() {
                    return false;
                }
                for (place, digit) in places.into_iter().zip(value.bytes()) {
                    *place = digit;
                }
                return true;
            }
        }
        start += len;
    }
    false
}
