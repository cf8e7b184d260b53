//! VHD: fixed, dynamic and differencing images of Virtual PC, Hyper-V, Azure and others.
//!
//! Layout: Microsoft, Virtual Hard Disk Image Format Specification 1.0. Big-endian. The footer at
//! the end counts; the copy at 0 of the others is used where it is damaged.
//!
//! Invariants:
//!
//! 1. Every allocated block lies between the headers and the footer, and no two overlap.
//! 2. A sector whose bit is clear is absent in a differencing image, and zero in a dynamic one.

use std::sync::Arc;

use super::bytes::{be16, be32, be64, utf16};
use super::source::{PAGE, check_range, read_vec};
use super::{
    Content, Facts, Format, Identity, Layer, Pages, ParentRef, Run, Source, Uuid, broken,
    unsupported,
};
use crate::error::Result;
use crate::sync::Mutex;
use crate::units::SECTOR_SIZE;

const SECTOR: u64 = SECTOR_SIZE as u64;
/// First bytes of a footer.
pub const COOKIE: [u8; 8] = *b"conectix";
const HEADER_COOKIE: [u8; 8] = *b"cxsparse";
/// Bytes of the header of dynamic and differencing images.
const HEADER_LEN: usize = 1024;
const VERSION: u32 = 0x0001_0000;
pub(crate) const FIXED: u32 = 2;
pub(crate) const DYNAMIC: u32 = 3;
pub(crate) const DIFFERENCING: u32 = 4;
/// Entry of a block that is not there.
const UNUSED: u32 = u32::MAX;
/// How often a source is asked in vain which bitmaps repeat.
const MISSES_MAX: u32 = 16;
/// Largest block that is read: 256 MiB, above what any product writes.
const BLOCK_MAX: u64 = 256 << 20;
/// Most blocks: a table of 64 MiB.
const BLOCKS_MAX: u64 = 16 << 20;
/// Most bytes of a parent's name.
const NAME_BYTES_MAX: u32 = 64 << 10;
/// Cylinders, heads and sectors of a disk that is too large for them.
const GEOMETRY_MAX: (u64, u64, u64) = (65535, 16, 255);

/// The footer, and with it what every VHD has.
#[derive(Clone, Debug)]
pub struct Footer {
    /// Offset of the header of a dynamic image.
    pub data_offset: u64,
    /// Who wrote the image, four letters.
    pub creator: [u8; 4],
    /// Size of the virtual disk in bytes, as Hyper-V counts it.
    pub current_size: u64,
    /// Cylinders, heads, sectors per track.
    pub geometry: (u64, u64, u64),
    /// 2 fixed, 3 dynamic, 4 differencing.
    pub kind: u32,
    /// What a child calls this image.
    pub uuid: Uuid,
    /// A virtual machine was suspended with it.
    pub saved_state: bool,
}

/// Complement of the sum of all bytes but the four at `at`.
pub(crate) fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum = |part: &[u8]| part.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    !(sum(bytes).wrapping_sub(sum(&bytes[at..at + 4])))
}

impl Footer {
    /// Decodes 512 bytes; `None` if they are no whole footer.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != SECTOR_SIZE
            || bytes[..8] != COOKIE
            || be32(bytes, 64) != checksum(bytes, 64)
        {
            return None;
        }
        let mut creator = [0; 4];
        creator.copy_from_slice(&bytes[28..32]);
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&bytes[68..84]);
        (be32(bytes, 12) == VERSION).then_some(Self {
            data_offset: be64(bytes, 16),
            creator,
            current_size: be64(bytes, 48),
            geometry: (
                u64::from(be16(bytes, 56)),
                u64::from(bytes[58]),
                u64::from(bytes[59]),
            ),
            kind: be32(bytes, 60),
            uuid: Uuid(uuid),
            saved_state: bytes[84] != 0,
        })
    }

    /// Size of the virtual disk: that of the geometry where the creator counts so.
    fn size(&self) -> u64 {
        let (cylinders, heads, sectors) = self.geometry;
        let by_geometry = matches!(&self.creator, b"vpc " | b"qemu");
        if by_geometry && self.geometry != GEOMETRY_MAX && cylinders * heads * sectors > 0 {
            return cylinders * heads * sectors * SECTOR;
        }
        self.current_size
    }
}

/// The footer of an image, where it stands, and whether only the copy at 0 is whole.
///
/// # Errors
/// `Corrupt` if there is none; `Io`.
pub fn footer(source: &dyn Source) -> Result<(Footer, u64, bool)> {
    let len = source.len();
    // Virtual PC before 2004 wrote 511 bytes.
    for size in [SECTOR, SECTOR - 1] {
        let Some(at) = len.checked_sub(size) else {
            continue;
        };
        let mut bytes = read_vec(source, at, size as usize)?;
        bytes.resize(SECTOR_SIZE, 0);
        if let Some(footer) = Footer::decode(&bytes) {
            return Ok((footer, at, false));
        }
    }
    if len >= SECTOR {
        let bytes = read_vec(source, 0, SECTOR_SIZE)?;
        if let Some(footer) = Footer::decode(&bytes).filter(|footer| footer.kind != FIXED) {
            return Ok((footer, len, true));
        }
    }
    Err(broken(
        "no whole VHD footer: not at the end and not at the beginning of the image",
    ))
}

/// An open VHD.
#[derive(Debug)]
pub struct Vhd {
    facts: Facts,
    sources: [Arc<dyn Source>; 1],
    /// None: a fixed image.
    blocks: Option<Blocks>,
}

/// How a dynamic or differencing image finds its blocks.
#[derive(Debug)]
struct Blocks {
    pages: Pages,
    source: Arc<dyn Source>,
    table: u64,
    /// Entries of the table that the disk needs.
    entries: u64,
    block: u64,
    bitmap: u64,
    full: Mutex<Full>,
    /// What a clear bit means.
    clear: Content,
}

/// Bitmaps that are known to have all bits set. Of a disk of 100 GiB there are 51,200, for each of
/// which a file would be read; a pool has them all in one block.
#[derive(Clone, Copy, Debug, Default)]
struct Full {
    /// Where the first one stands, and how far the next ones are from each other.
    at: u64,
    stride: u64,
    /// How many follow the first.
    count: u64,
    /// How often nothing was known of the next ones.
    misses: u32,
}

impl Full {
    fn has(&self, at: u64) -> bool {
        let Some(far) = at.checked_sub(self.at) else {
            return false;
        };
        self.count > 0 && far % self.stride == 0 && far / self.stride <= self.count
    }
}

impl Vhd {
    /// Opens an image.
    ///
    /// # Errors
    /// `Corrupt`, naming what is wrong; `Unsupported`; `Io`.
    pub fn open(source: Arc<dyn Source>) -> Result<Self> {
        let (footer, end, copy) = footer(&*source)?;
        let size = footer.size();
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(broken(format!(
                "the size of the disk is no multiple of 512 bytes: size={size}"
            )));
        }
        let mut facts = Facts {
            format: Format::Vhd,
            subtype: "fixed",
            size,
            block: 0,
            sector: SECTOR_SIZE as u32,
            identity: Some(Identity::Uuid(footer.uuid)),
            version: None,
            creator: String::from_utf8_lossy(&footer.creator)
                .trim_end_matches(['\0', ' '])
                .to_owned(),
            parent: None,
            notes: Vec::new(),
        };
        if copy {
            let note = "the footer at the end is damaged; its copy at the beginning is used";
            facts.notes.push(note.to_owned());
        }
        if footer.saved_state {
            let note = "a suspended virtual machine belongs to it: its last writes may be missing";
            facts.notes.push(note.to_owned());
        }
        if footer.current_size != size {
            facts.notes.push(format!(
                "the size is that of the geometry, as its creator counts; the footer says {}",
                footer.current_size
            ));
        }
        let blocks = match footer.kind {
            FIXED => {
                check_range(end, 0, size)?;
                None
            }
            DYNAMIC | DIFFERENCING => {
                Some(open_blocks(source.clone(), &footer, end, size, &mut facts)?)
            }
            other => return Err(broken(format!("no such type of VHD: type={other}"))),
        };
        Ok(Self {
            facts,
            sources: [source],
            blocks,
        })
    }
}

fn open_blocks(
    source: Arc<dyn Source>,
    footer: &Footer,
    end: u64,
    size: u64,
    facts: &mut Facts,
) -> Result<Blocks> {
    let differencing = footer.kind == DIFFERENCING;
    facts.subtype = if differencing {
        "differencing"
    } else {
        "dynamic"
    };
    if footer.data_offset < SECTOR {
        return Err(broken("the header stands upon the footer's copy"));
    }
    check_range(end, footer.data_offset, HEADER_LEN as u64)?;
    let header = read_vec(&*source, footer.data_offset, HEADER_LEN)?;
    if header[..8] != HEADER_COOKIE || be32(&header, 36) != checksum(&header, 36) {
        return Err(broken("the header of the dynamic disk is damaged"));
    }
    if be32(&header, 24) != VERSION {
        return Err(unsupported("the version of the dynamic header is not 1.0"));
    }
    let (table, entries) = (be64(&header, 16), u64::from(be32(&header, 28)));
    let block = u64::from(be32(&header, 32));
    if !block.is_power_of_two() || !(SECTOR..=BLOCK_MAX).contains(&block) {
        return Err(broken(format!(
            "the block size is no power of two from 512 bytes to 256 MiB: block={block}"
        )));
    }
    let needed = size.div_ceil(block);
    if needed > entries {
        return Err(broken(format!(
            "the block table is too short: entries={entries} needed={needed}"
        )));
    }
    if needed > BLOCKS_MAX {
        return Err(unsupported(format!("too many blocks: {needed}")));
    }
    // What is behind the entries needed is not read, but a table must not lie about its length.
    check_range(end, table, entries * 4)?;
    let header_end = footer.data_offset + HEADER_LEN as u64;
    if table < SECTOR || table < header_end && footer.data_offset < table + needed * 4 {
        return Err(broken("the block table overlaps a header"));
    }
    facts.block = block;
    if differencing {
        facts.parent = Some(parent(&*source, &header)?);
    }
    let bitmap = (block / SECTOR).div_ceil(8).next_multiple_of(SECTOR);
    let taken = [
        (0, SECTOR),
        (footer.data_offset, header_end),
        (table, table + needed * 4),
    ];
    check_blocks(&*source, table, needed, bitmap + block, end, &taken)?;
    Ok(Blocks {
        pages: Pages::new(source.clone()),
        source,
        table,
        entries: needed,
        block,
        bitmap,
        full: Mutex::new(Full::default()),
        clear: if differencing {
            Content::Absent
        } else {
            Content::Zero
        },
    })
}

/// I1: all of the table at once.
fn check_blocks(
    source: &dyn Source,
    table: u64,
    entries: u64,
    stride: u64,
    end: u64,
    taken: &[(u64, u64)],
) -> Result<()> {
    let mut starts = Vec::new();
    let mut at = 0;
    while at < entries {
        let count = (entries - at).min(256 * 1024);
        let part = read_vec(source, table + at * 4, count as usize * 4)?;
        starts.extend(
            part.chunks_exact(4)
                .map(|raw| be32(raw, 0))
                .filter(|start| *start != UNUSED),
        );
        at += count;
    }
    starts.sort_unstable();
    let mut last = 0;
    for start in starts {
        let (from, to) = (
            u64::from(start) * SECTOR,
            u64::from(start) * SECTOR + stride,
        );
        if to > end {
            return Err(broken(format!(
                "a block reaches behind the end of the image: sector={start}"
            )));
        }
        if from < last || taken.iter().any(|(a, b)| from < *b && *a < to) {
            return Err(broken(format!(
                "a block overlaps another or a header: sector={start}"
            )));
        }
        last = to;
    }
    Ok(())
}

/// What a differencing image says of its parent.
fn parent(source: &dyn Source, header: &[u8]) -> Result<ParentRef> {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&header[40..56]);
    let mut names: Vec<(u8, String)> = Vec::new();
    for i in 0..8 {
        let entry = &header[576 + i * 24..600 + i * 24];
        let (len, at) = (be32(entry, 8), be64(entry, 16));
        let trust = match &entry[..4] {
            b"W2ru" => 0,
            b"W2ku" => 1,
            b"MacX" => 2,
            _ => continue,
        };
        // A locator that points nowhere is ignored: there are others.
        if len == 0 || len > NAME_BYTES_MAX || check_range(source.len(), at, len.into()).is_err() {
            continue;
        }
        let bytes = read_vec(source, at, len as usize)?;
        names.push((
            trust,
            if trust == 2 {
                String::from_utf8_lossy(&bytes).into_owned()
            } else {
                utf16(&bytes, u16::from_le_bytes)
            },
        ));
    }
    names.push((3, utf16(&header[64..576], u16::from_be_bytes)));
    names.sort_by_key(|(trust, _)| *trust);
    Ok(ParentRef {
        identity: Some(Identity::Uuid(Uuid(uuid))),
        names: names
            .into_iter()
            .map(|(_, name)| name)
            .filter(|name| !name.is_empty())
            .collect(),
        ..ParentRef::default()
    })
}

impl Blocks {
    fn run(&self, offset: u64, most: u64) -> Result<Run> {
        let (index, inside) = (offset / self.block, offset % self.block);
        let most = most.min(self.block - inside);
        let start = self.pages.u32_be(self.table + index * 4)?;
        if start == UNUSED {
            return Ok(Run {
                len: most,
                content: self.clear,
            });
        }
        let at = u64::from(start) * SECTOR;
        let (first, last) = (inside / SECTOR, (inside + most).div_ceil(SECTOR));
        let (set, count) = if self.full.lock().has(at) {
            (true, last - first)
        } else {
            self.bits(at, first, last)?
        };
        if set && count == self.block / SECTOR {
            self.look_ahead(index, at)?;
        }
        let len = ((first + count) * SECTOR - inside).min(most);
        let content = if set {
            Content::Data {
                source: 0,
                at: at + self.bitmap + inside,
            }
        } else {
            self.clear
        };
        Ok(Run { len, content })
    }

    /// Asks how many of the next bitmaps are the same as the one at `at`, of block `index`, which has
    /// all bits set.
    fn look_ahead(&self, index: u64, at: u64) -> Result<()> {
        let page = at / PAGE * PAGE;
        let mut full = *self.full.lock();
        if full.misses >= MISSES_MAX || at + self.bitmap > page + PAGE || index + 1 >= self.entries
        {
            return Ok(());
        }
        let next = self.pages.u32_be(self.table + (index + 1) * 4)?;
        let stride = (u64::from(next) * SECTOR).checked_sub(at);
        let Some(stride) = stride.filter(|stride| next != UNUSED && *stride > 0) else {
            return Ok(());
        };
        if full.has(at + stride) {
            return Ok(());
        }
        match self.source.repeats(page, PAGE, stride)? {
            0 => full.misses += 1,
            count => {
                full = Full {
                    at,
                    stride,
                    count,
                    misses: 0,
                }
            }
        }
        *self.full.lock() = full;
        Ok(())
    }

    /// The bit of sector `first`, and how many sectors up to `last` have the same.
    fn bits(&self, bitmap: u64, first: u64, last: u64) -> Result<(bool, u64)> {
        let mut value = None;
        let mut sector = first;
        let mut chunk = [0; 64];
        while sector < last {
            let from = sector / 8;
            let count = (last.div_ceil(8) - from).min(chunk.len() as u64) as usize;
            self.pages.read(bitmap + from, &mut chunk[..count])?;
            let end = last.min((from + count as u64) * 8);
            let all = chunk[..count].iter().all(|bits| *bits == 0xff);
            if all && value != Some(false) {
                (value, sector) = (Some(true), end);
            }
            while sector < end {
                let bit = chunk[(sector / 8 - from) as usize] & 0x80 >> (sector % 8) != 0;
                if *value.get_or_insert(bit) != bit {
                    return Ok((!bit, sector - first));
                }
                sector += 1;
            }
        }
        Ok((value.unwrap_or(false), sector - first))
    }
}

impl Layer for Vhd {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn sources(&self) -> &[Arc<dyn Source>] {
        &self.sources
    }

    fn run(&self, offset: u64, most: u64) -> Result<Run> {
        let most = most.min(self.facts.size - offset);
        match &self.blocks {
            None => Ok(Run {
                len: most,
                content: Content::Data {
                    source: 0,
                    at: offset,
                },
            }),
            Some(blocks) => blocks.run(offset, most),
        }
    }
}
