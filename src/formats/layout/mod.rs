//! Plans of image files: which bytes of tables and which ranges of a disk stand where in a file of
//! a format. Import, convert and export all write images by such a plan.
//!
//! Invariants:
//!
//! 1. Payload stands at an offset that is equal to its offset on the disk modulo 4 KiB, so that a
//!    pool can share its blocks.
//! 2. The pieces of a file come in ascending order, do not overlap, and lie within its length.
//!    What no piece covers is a hole: zeros.
//! 3. Memory is bounded by the tables that the image will have, never by its payload.
//! 4. A plan is refused, not bent, if the format cannot hold the disk.

use std::ops::Range;

use super::{Format, Identity, Uuid, unsupported};
use crate::error::{Error, Result};
use crate::sys;
use crate::units::{BLOCK_SIZE, SECTOR_SIZE};

mod held;
mod identity;
mod qcow2;
mod stream;
mod vdi;
mod vhd;
mod vhdx;
mod vmdk;

pub use held::{Held, Holes, Piece, Place};
pub use identity::{Edits, renew, renew_descriptor};
pub use stream::{Progress, compressed_qcow2, stream_optimized};

const ALIGN: u64 = BLOCK_SIZE as u64;
const SECTOR: u64 = SECTOR_SIZE as u64;
const MIB: u64 = 1 << 20;

/// A format and how it stores a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shape {
    /// The bytes of the disk.
    Raw,
    /// The bytes of the disk and a footer.
    VhdFixed,
    /// Blocks of 2 MiB.
    VhdDynamic,
    /// All blocks there, in order.
    VhdxFixed,
    /// Blocks where there is data.
    VhdxDynamic,
    /// A descriptor and an extent file with the bytes of the disk.
    VmdkFlat,
    /// One file with grains of 64 KiB.
    VmdkSparse,
    /// All blocks there, in order.
    VdiFixed,
    /// Blocks where there is data.
    VdiDynamic,
    /// Clusters where there is data.
    Qcow2,
}

impl Shape {
    /// The shape of a format that is made where none is asked for, or the one of that name.
    ///
    /// # Errors
    /// `Unsupported`, naming those that there are.
    pub fn of(format: Format, subformat: Option<&str>) -> Result<Self> {
        let known: &[(&str, Shape)] = match format {
            Format::Raw => &[("raw", Shape::Raw)],
            Format::Vhd => &[("fixed", Shape::VhdFixed), ("dynamic", Shape::VhdDynamic)],
            Format::Vhdx => &[("dynamic", Shape::VhdxDynamic), ("fixed", Shape::VhdxFixed)],
            Format::Vmdk => &[
                ("monolithicFlat", Shape::VmdkFlat),
                ("flat", Shape::VmdkFlat),
                ("monolithicSparse", Shape::VmdkSparse),
                ("sparse", Shape::VmdkSparse),
            ],
            Format::Vdi => &[
                ("dynamic", Shape::VdiDynamic),
                ("fixed", Shape::VdiFixed),
                ("static", Shape::VdiFixed),
            ],
            Format::Qcow2 => &[("qcow2", Shape::Qcow2)],
        };
        let Some(name) = subformat else {
            return Ok(known[0].1);
        };
        let found = known
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, shape)| *shape).ok_or_else(|| {
            let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
            unsupported(format!(
                "{format} has no subformat {name}: choose {}",
                names.join(", ")
            ))
        })
    }

    /// The format.
    pub fn format(self) -> Format {
        match self {
            Shape::Raw => Format::Raw,
            Shape::VhdFixed | Shape::VhdDynamic => Format::Vhd,
            Shape::VhdxFixed | Shape::VhdxDynamic => Format::Vhdx,
            Shape::VmdkFlat | Shape::VmdkSparse => Format::Vmdk,
            Shape::VdiFixed | Shape::VdiDynamic => Format::Vdi,
            Shape::Qcow2 => Format::Qcow2,
        }
    }

    /// True if the image holds the whole disk, also where it is zero.
    pub fn is_fixed(self) -> bool {
        matches!(
            self,
            Shape::Raw | Shape::VhdFixed | Shape::VhdxFixed | Shape::VmdkFlat | Shape::VdiFixed
        )
    }
}

/// Which ids an image gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// What children call it: VHD, VHDX, VDI.
    pub uuid: Uuid,
    /// Further ids that a format wants: of the file, of the disk, of the last change.
    pub others: [Uuid; 3],
    /// Content id of a VMDK.
    pub cid: u32,
}

impl Ids {
    /// New ids, of the random numbers of the system.
    ///
    /// # Errors
    /// `Io` if it has none.
    pub fn random() -> Result<Self> {
        let uuid = || {
            let random = sys::control::random();
            let bytes =
                random.map_err(|error| Error::io("no random numbers from the system", error))?;
            Ok::<_, Error>(random_uuid(bytes))
        };
        let cid = uuid()?.0;
        // 0xffffffff stands for no parent, 0xfffffffe for a disk that was never written.
        let cid = u32::from_le_bytes([cid[0], cid[1], cid[2], cid[3]]).clamp(1, 0xffff_fffd);
        Ok(Self {
            uuid: uuid()?,
            others: [uuid()?, uuid()?, uuid()?],
            cid,
        })
    }

    /// With the identity of another image, as far as it fits.
    #[must_use]
    pub fn keeping(mut self, identity: Option<Identity>) -> Self {
        match identity {
            Some(Identity::Uuid(uuid)) => self.uuid = uuid,
            Some(Identity::Cid(cid)) => self.cid = cid,
            None => {}
        }
        self
    }
}

/// A UUID of version 4.
fn random_uuid(mut bytes: [u8; 16]) -> Uuid {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Uuid(bytes)
}

/// The parent of an image that holds only differences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Name of its file as the image will have it: relative to the image.
    pub name: String,
    /// Absolute name, where it is known.
    pub absolute: Option<String>,
    /// Its identity; what has none is a raw or qcow2 file.
    pub identity: Option<Identity>,
    /// Id of its last change, if its format has one: [`Facts::version`](super::Facts::version).
    pub version: Option<Uuid>,
    /// Its format.
    pub format: Format,
}

/// What is to be made.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Format and subformat.
    pub shape: Shape,
    /// Size of the disk in bytes; rounded up to what the format can say.
    pub size: u64,
    /// Logical sector size: 4096 is kept by VHDX only.
    pub sector: u32,
    /// Its ids.
    pub ids: Ids,
    /// Seconds since 1970.
    pub seconds: u64,
    /// Name of the file, without directory: the files of a flat VMDK name each other.
    pub name: String,
    /// Makes an image of differences.
    pub parent: Option<Parent>,
}

/// Which ranges of a disk an image must hold.
pub trait Map {
    /// The first such range that ends behind `from`, a multiple of 4 KiB, cut off before `from`. It
    /// begins and ends at multiples of 4 KiB, or ends at the end of the disk.
    ///
    /// # Errors
    /// As those of the image that it is a map of.
    fn next(&self, from: u64) -> Result<Option<Range<u64>>>;
}

/// Ranges in ascending order, without overlap.
impl Map for Vec<Range<u64>> {
    fn next(&self, from: u64) -> Result<Option<Range<u64>>> {
        let index = self.partition_point(|range| range.end <= from);
        Ok(self
            .get(index)
            .map(|range| range.start.max(from)..range.end))
    }
}

/// Takes the pieces of a file.
pub trait Sink {
    /// Bytes of headers and tables. Blocks of 4 KiB that are zero may be left out.
    ///
    /// # Errors
    /// What keeps it from being written.
    fn bytes(&mut self, at: u64, bytes: &[u8]) -> Result<()>;

    /// The same `len` bytes as stand at `from`, where an earlier piece put them; all three are
    /// multiples of 4 KiB.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    fn repeat(&mut self, at: u64, from: u64, len: u64) -> Result<()>;

    /// `len` bytes of the disk from `disk`. What is zero there may be left out.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    fn payload(&mut self, at: u64, disk: u64, len: u64) -> Result<()>;
}

#[derive(Clone, Debug)]
enum Part {
    Bytes {
        at: u64,
        bytes: Vec<u8>,
    },
    Payload {
        at: u64,
        disk: u64,
        len: u64,
    },
    /// Blocks of `block` bytes that follow each other on the disk; before each one in the file is
    /// a block of 4 KiB that is the same as that at `lead`.
    Led {
        at: u64,
        disk: u64,
        count: u64,
        block: u64,
        lead: u64,
    },
}

/// One file of an image.
#[derive(Clone, Debug)]
pub struct PlannedFile {
    /// Name, without directory. `None`: the one that was asked for.
    pub name: Option<String>,
    /// Length in bytes.
    pub len: u64,
    parts: Vec<Part>,
}

/// The files of an image, at least one; the last is the one that was asked for: whoever sees it
/// finds the others.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The files.
    pub files: Vec<PlannedFile>,
    /// Size of the disk in bytes, as the image will have it.
    pub size: u64,
    /// Unit of allocation in bytes; 0 if there is none.
    pub block: u64,
}

impl Plan {
    /// Plans an image of what `map` tells.
    ///
    /// # Errors
    /// `Unsupported` if the format cannot hold the disk; those of `map`.
    pub fn new(spec: &Spec, map: &dyn Map) -> Result<Self> {
        if spec.size == 0 && spec.shape != Shape::Raw {
            return Err(unsupported(format!(
                "a disk of 0 bytes cannot be kept as {}",
                spec.shape.format()
            )));
        }
        if spec.parent.is_some() && spec.shape.is_fixed() {
            return Err(unsupported(
                "an image of differences is of another subformat: leave it out",
            ));
        }
        match spec.shape {
            Shape::Raw => Ok(Self::single(raw(spec.size), spec.size, 0)),
            Shape::VhdFixed => vhd::fixed(spec),
            Shape::VhdDynamic => vhd::dynamic(spec, map),
            Shape::VhdxFixed | Shape::VhdxDynamic => vhdx::plan(spec, map),
            Shape::VmdkFlat => vmdk::flat(spec),
            Shape::VmdkSparse => vmdk::sparse(spec, map),
            Shape::VdiFixed | Shape::VdiDynamic => vdi::plan(spec, map),
            Shape::Qcow2 => qcow2::plan(spec, map),
        }
    }

    fn single(file: PlannedFile, size: u64, block: u64) -> Self {
        Self {
            files: vec![file],
            size,
            block,
        }
    }

    /// Bytes of all files together.
    pub fn len(&self) -> u64 {
        self.files.iter().map(|file| file.len).sum()
    }

    /// True if there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl PlannedFile {
    /// Gives the pieces to `sink`, in order.
    ///
    /// # Errors
    /// Those of `sink`.
    pub fn emit(&self, size: u64, sink: &mut dyn Sink) -> Result<()> {
        let payload = |sink: &mut dyn Sink, at: u64, disk: u64, len: u64| {
            let len = len.min(size.saturating_sub(disk));
            if len > 0 {
                sink.payload(at, disk, len)
            } else {
                Ok(())
            }
        };
        for part in &self.parts {
            match part {
                Part::Bytes { at, bytes } => sink.bytes(*at, bytes)?,
                Part::Payload { at, disk, len } => payload(sink, *at, *disk, *len)?,
                Part::Led {
                    at,
                    disk,
                    count,
                    block,
                    lead,
                } => {
                    for i in 0..*count {
                        let at = at + i * (block + ALIGN);
                        if at - ALIGN != *lead {
                            sink.repeat(at - ALIGN, *lead, ALIGN)?;
                        }
                        payload(sink, at, disk + i * block, *block)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn raw(size: u64) -> PlannedFile {
    PlannedFile {
        name: None,
        len: size,
        parts: vec![Part::Payload {
            at: 0,
            disk: 0,
            len: size,
        }],
    }
}

/// A run of blocks of the disk that the image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Blocks {
    first: u64,
    count: u64,
    /// How many come before it in the image.
    before: u64,
}

/// The blocks of `block` bytes with something in them.
fn blocks(map: &dyn Map, block: u64, size: u64) -> Result<Vec<Blocks>> {
    let mut runs: Vec<Blocks> = Vec::new();
    let (mut at, mut before) = (0, 0);
    while at < size {
        let Some(range) = map.next(at)? else { break };
        let (first, end) = (range.start / block, range.end.div_ceil(block));
        let count = end - first;
        match runs.last_mut() {
            Some(last) if last.first + last.count == first => last.count += count,
            _ => runs.push(Blocks {
                first,
                count,
                before,
            }),
        }
        before += count;
        at = end * block;
    }
    Ok(runs)
}

/// All blocks of a disk.
fn all_blocks(block: u64, size: u64) -> Vec<Blocks> {
    vec![Blocks {
        first: 0,
        count: size.div_ceil(block),
        before: 0,
    }]
}

/// How many blocks.
fn count(runs: &[Blocks]) -> u64 {
    runs.iter().map(|run| run.count).sum()
}

/// Payload of blocks that stand without gaps from `at`.
fn contiguous(runs: &[Blocks], at: u64, block: u64) -> Vec<Part> {
    runs.iter()
        .map(|run| Part::Payload {
            at: at + run.before * block,
            disk: run.first * block,
            len: run.count * block,
        })
        .collect()
}

/// The time in seconds since 2000, as VHD counts.
fn since_2000(seconds: u64) -> u32 {
    u32::try_from(seconds.saturating_sub(946_684_800)).unwrap_or(u32::MAX)
}

fn put(bytes: &mut [u8], at: usize, part: &[u8]) {
    bytes[at..at + part.len()].copy_from_slice(part);
}

/// UTF-16 in the byte order of `unit`.
fn utf16(text: &str, unit: fn(u16) -> [u8; 2]) -> Vec<u8> {
    text.encode_utf16().flat_map(unit).collect()
}

fn too_large(spec: &Spec, limit: &str) -> Error {
    unsupported(format!(
        "a disk of {} bytes does not fit into this kind of {}, which ends at {limit}",
        spec.size,
        spec.shape.format()
    ))
}

#[cfg(test)]
mod tests;
