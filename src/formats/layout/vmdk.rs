//! Plans of VMDK: flat and sparse, each of one extent. Little-endian.
//!
//! A flat disk is a text that describes it and a file with its bytes. A sparse one has the text
//! inside, then two copies of its tables, then the grains.
//!
//! Invariants:
//!
//! 1. Grains stand at multiples of their size, behind all tables.

use super::{
    Map, Part, Plan, PlannedFile, SECTOR, Spec, blocks, contiguous, count, put, raw, too_large,
};
use crate::error::Result;
use crate::formats::{Identity, unsupported};

/// Bytes of a grain.
pub(super) const GRAIN: u64 = 64 << 10;
/// Entries of a table of grains.
pub(super) const TABLE: u64 = 512;
/// Where the descriptor of a sparse extent stands, and its sectors.
pub(super) const DESCRIPTOR: (u64, u64) = (1, 20);
/// Newlines are there to be checked; there is a second directory.
const FLAGS: u32 = 3;
/// Largest flat disk: 62 TiB, the most that VMware takes.
const FLAT_MAX: u64 = 62 << 40;

/// Cylinders, heads and sectors as VMware gives them to a SCSI disk.
fn geometry(size: u64) -> (u64, u64, u64) {
    let (heads, sectors) = match size {
        0..=0x3fff_ffff => (64, 32),
        0x4000_0000..=0x7fff_ffff => (128, 32),
        _ => (255, 63),
    };
    (size / SECTOR / (heads * sectors), heads, sectors)
}

/// The text that describes a disk of one extent.
pub(super) fn descriptor(spec: &Spec, size: u64, kind: &str, extent: &str) -> Result<String> {
    let (cylinders, heads, sectors) = geometry(size);
    let parent = match &spec.parent {
        None => "ffffffff".to_owned(),
        Some(parent) => match parent.identity {
            Some(Identity::Cid(cid)) => format!("{cid:08x}"),
            _ => {
                return Err(unsupported(
                    "a VMDK of differences needs a VMDK as its parent, which has a content id",
                ));
            }
        },
    };
    let hint = match &spec.parent {
        Some(parent) => format!("parentFileNameHint=\"{}\"\n", quoted(&parent.name)?),
        None => String::new(),
    };
    let uuid = spec.ids.uuid.0.map(|byte| format!("{byte:02x}"));
    Ok(format!(
        "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID={:08x}\nparentCID={parent}\n\
         createType=\"{kind}\"\n{hint}\n# Extent description\n{extent}\n\n\
         # The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"8\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\nddb.geometry.heads = \"{heads}\"\n\
         ddb.geometry.sectors = \"{sectors}\"\nddb.adapterType = \"lsilogic\"\n\
         ddb.uuid = \"{}-{}\"\n",
        spec.ids.cid,
        uuid[..8].join(" "),
        uuid[8..].join(" "),
    ))
}

/// A name between quotes in the descriptor.
fn quoted(name: &str) -> Result<&str> {
    if name.contains(['"', '\n', '\r', '\0']) {
        return Err(unsupported(
            "a VMDK cannot name a file with quotes or line ends in its name: choose another name",
        ));
    }
    Ok(name)
}

pub(super) fn flat(spec: &Spec) -> Result<Plan> {
    let size = spec.size.next_multiple_of(SECTOR);
    if size > FLAT_MAX {
        return Err(too_large(spec, "62 TiB"));
    }
    let stem = spec.name.strip_suffix(".vmdk").unwrap_or(&spec.name);
    let name = format!("{}-flat.vmdk", quoted(stem)?);
    let extent = format!("RW {} FLAT \"{name}\" 0", size / SECTOR);
    let text = descriptor(spec, size, "monolithicFlat", &extent)?;
    let mut disk = raw(size);
    disk.name = Some(name);
    let described = PlannedFile {
        name: None,
        len: text.len() as u64,
        parts: vec![Part::Bytes {
            at: 0,
            bytes: text.into_bytes(),
        }],
    };
    Ok(Plan {
        files: vec![disk, described],
        size: spec.size,
        block: 0,
    })
}

/// The header of a sparse extent; places are in sectors.
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) flags: u32,
    pub(super) capacity: u64,
    pub(super) redundant: u64,
    pub(super) directory: u64,
    pub(super) overhead: u64,
    pub(super) compression: u16,
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR as usize];
        put(&mut bytes, 0, b"KDMV");
        put(&mut bytes, 4, &self.version.to_le_bytes());
        put(&mut bytes, 8, &self.flags.to_le_bytes());
        put(&mut bytes, 12, &self.capacity.to_le_bytes());
        put(&mut bytes, 20, &(GRAIN / SECTOR).to_le_bytes());
        put(&mut bytes, 28, &DESCRIPTOR.0.to_le_bytes());
        put(&mut bytes, 36, &DESCRIPTOR.1.to_le_bytes());
        put(&mut bytes, 44, &(TABLE as u32).to_le_bytes());
        put(&mut bytes, 48, &self.redundant.to_le_bytes());
        put(&mut bytes, 56, &self.directory.to_le_bytes());
        put(&mut bytes, 64, &self.overhead.to_le_bytes());
        put(&mut bytes, 73, b"\n \r\n");
        put(&mut bytes, 77, &self.compression.to_le_bytes());
        bytes
    }
}

/// The descriptor of a sparse extent, padded to its place.
pub(super) fn embedded(spec: &Spec, size: u64, kind: &str) -> Result<Vec<u8>> {
    let extent = format!("RW {} SPARSE \"{}\"", size / SECTOR, quoted(&spec.name)?);
    let mut text = descriptor(spec, size, kind, &extent)?.into_bytes();
    let room = (DESCRIPTOR.1 * SECTOR) as usize;
    if text.len() > room {
        return Err(unsupported("the names are too long for a VMDK"));
    }
    text.resize(room, 0);
    Ok(text)
}

pub(super) fn sparse(spec: &Spec, map: &dyn Map) -> Result<Plan> {
    let size = spec.size.next_multiple_of(SECTOR);
    let grains = size.div_ceil(GRAIN);
    let tables = grains.div_ceil(TABLE);
    let runs = blocks(map, GRAIN, spec.size)?;
    // Per copy: the directory, then all tables.
    let directory_len = (tables * 4).next_multiple_of(SECTOR);
    let copy_len = directory_len + tables * TABLE * 4;
    let copies = [SECTOR * (DESCRIPTOR.0 + DESCRIPTOR.1), 0];
    let copies = [copies[0], copies[0] + copy_len];
    let first = (copies[1] + copy_len).next_multiple_of(GRAIN);
    let len = first + count(&runs) * GRAIN;
    if u32::try_from(len / SECTOR).is_err() {
        return Err(too_large(spec, "2 TiB of grains that are used"));
    }
    let mut table = vec![0; (tables * TABLE * 4) as usize];
    for run in &runs {
        for i in 0..run.count {
            let sector = ((first + (run.before + i) * GRAIN) / SECTOR) as u32;
            put(
                &mut table,
                (run.first + i) as usize * 4,
                &sector.to_le_bytes(),
            );
        }
    }
    let header = Header {
        version: 1,
        flags: FLAGS,
        capacity: size / SECTOR,
        redundant: copies[0] / SECTOR,
        directory: copies[1] / SECTOR,
        overhead: first / SECTOR,
        compression: 0,
    };
    let mut head = header.encode();
    head.extend(embedded(spec, size, "monolithicSparse")?);
    let mut parts = vec![Part::Bytes { at: 0, bytes: head }];
    for at in copies {
        let mut bytes = vec![0; directory_len as usize];
        for i in 0..tables {
            let sector = ((at + directory_len + i * TABLE * 4) / SECTOR) as u32;
            put(&mut bytes, i as usize * 4, &sector.to_le_bytes());
        }
        parts.push(Part::Bytes { at, bytes });
        parts.push(Part::Bytes {
            at: at + directory_len,
            bytes: table.clone(),
        });
    }
    parts.extend(contiguous(&runs, first, GRAIN));
    let file = PlannedFile {
        name: None,
        len,
        parts,
    };
    Ok(Plan::single(file, spec.size, GRAIN))
}
