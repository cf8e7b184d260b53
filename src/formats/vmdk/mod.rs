//! VMDK: the disks of VMware, of one or several extents.
//!
//! The descriptor tells which; each sparse extent is read by its own first bytes, because kinds of
//! disks are named loosely. Extents are opened by the caller, by the names that are given to it.
//!
//! Invariants:
//!
//! 1. The extents follow each other without gaps; each has the sectors that the descriptor says.

use std::collections::HashMap;
use std::sync::Arc;

pub mod descriptor;
mod esx;
mod sparse;

use super::source::{check_range, read_vec};
use super::{Content, Facts, Format, Identity, Layer, Opener, ParentRef, Run, Source, broken};
use crate::error::Result;
use crate::ondisk::get_u64;
use crate::units::SECTOR_SIZE;
use descriptor::{Descriptor, ExtentKind, FILE_MAX};
use esx::Esx;
use sparse::{Grain, Sparse};

const SECTOR: u64 = SECTOR_SIZE as u64;

/// True if a file that begins with `bytes` is a VMDK or an extent of one.
pub(crate) fn is_vmdk(bytes: &[u8]) -> bool {
    bytes.starts_with(&sparse::MAGIC)
        || bytes.starts_with(&esx::COWD)
        || bytes.len() >= 16 && get_u64(bytes, 0) == esx::SESPARSE
        || descriptor::is_descriptor(bytes)
}

/// True if a file that begins with `bytes` is an extent of ESX, which belongs to a descriptor.
pub(crate) fn is_extent(bytes: &[u8]) -> bool {
    bytes.starts_with(&esx::COWD) || bytes.len() >= 16 && get_u64(bytes, 0) == esx::SESPARSE
}

#[derive(Clone, Debug)]
enum Body {
    /// Offset in bytes of its first sector in its file.
    Flat(u64),
    Sparse(Arc<Sparse>),
    Esx(Arc<Esx>),
    Zero,
}

#[derive(Debug)]
struct Extent {
    /// First byte of the disk.
    start: u64,
    /// Bytes.
    len: u64,
    /// Index of its file.
    source: usize,
    body: Body,
}

/// An open VMDK.
#[derive(Debug)]
pub struct Vmdk {
    facts: Facts,
    sources: Vec<Arc<dyn Source>>,
    extents: Vec<Extent>,
}

impl Vmdk {
    /// Opens a descriptor with its extents, or an extent with its descriptor inside. `open` opens
    /// an extent by the name in the descriptor.
    ///
    /// # Errors
    /// `Corrupt`, naming what is wrong; `Unsupported`; `Io`; what `open` answers.
    pub fn open(source: Arc<dyn Source>, open: Opener<'_>) -> Result<Self> {
        let head = read_vec(&*source, 0, source.len().min(SECTOR) as usize)?;
        if head.starts_with(&sparse::MAGIC) {
            return Self::open_embedded(source);
        }
        if !descriptor::is_descriptor(&head) {
            return Err(broken(if is_extent(&head) {
                "this is an extent of a VMDK: name the descriptor that it belongs to"
            } else {
                "this is no VMDK"
            }));
        }
        if source.len() > FILE_MAX {
            return Err(broken(format!(
                "the descriptor is too long: bytes={}",
                source.len()
            )));
        }
        let text = read_vec(&*source, 0, source.len() as usize)?;
        let descriptor = Descriptor::parse(&text)?;
        let (mut sources, mut opened) = (Vec::new(), HashMap::<String, usize>::new());
        // Tables are checked once, however many lines name their file.
        let mut shared = HashMap::<usize, Body>::new();
        let (mut extents, mut start, mut notes) = (Vec::new(), 0, Vec::new());
        for line in &descriptor.extents {
            let index = if line.kind == ExtentKind::Zero {
                0
            } else if let Some(index) = opened.get(&line.name) {
                *index
            } else {
                sources.push(open(&line.name)?);
                opened.insert(line.name.clone(), sources.len() - 1);
                sources.len() - 1
            };
            let body = match line.kind {
                ExtentKind::Zero => Body::Zero,
                ExtentKind::Flat => Body::Flat(line.offset * SECTOR),
                ExtentKind::Sparse => match shared.get(&index) {
                    Some(body) => body.clone(),
                    None => {
                        let body = open_sparse(sources[index].clone(), &mut notes)?;
                        shared.insert(index, body.clone());
                        body
                    }
                },
            };
            let len = line.sectors * SECTOR;
            check_extent(&body, sources.get(index), len, &line.name)?;
            extents.push(Extent {
                start,
                len,
                source: index,
                body,
            });
            start += len;
        }
        Self::put_together(&descriptor, extents, sources, notes)
    }

    /// A single sparse extent: whatever name its descriptor has for it, it is this file.
    fn open_embedded(source: Arc<dyn Source>) -> Result<Self> {
        let sparse = Sparse::open(source.clone())?;
        let Some(text) = sparse.descriptor()? else {
            return Err(broken(
                "this is an extent of a VMDK: name the descriptor that it belongs to",
            ));
        };
        let descriptor = Descriptor::parse(&text)?;
        if descriptor.cid.is_none() && descriptor.create_type.is_empty() {
            return Err(broken(
                "the embedded descriptor is damaged: it says nothing",
            ));
        }
        if descriptor.extents.len() > 1 {
            return Err(broken(
                "the embedded descriptor has extents in other files, which no product writes",
            ));
        }
        let notes = sparse.notes.clone();
        let extent = Extent {
            start: 0,
            len: sparse.capacity * SECTOR,
            source: 0,
            body: Body::Sparse(Arc::new(sparse)),
        };
        Self::put_together(&descriptor, vec![extent], vec![source], notes)
    }

    fn put_together(
        descriptor: &Descriptor,
        extents: Vec<Extent>,
        sources: Vec<Arc<dyn Source>>,
        notes: Vec<String>,
    ) -> Result<Self> {
        let size = extents.last().map_or(0, |last| last.start + last.len);
        if size == 0 {
            return Err(broken("the descriptor has no extents"));
        }
        let block = extents.iter().find_map(|extent| match &extent.body {
            Body::Sparse(sparse) => Some(sparse.grain),
            Body::Esx(esx) => Some(esx.grain),
            Body::Flat(_) | Body::Zero => None,
        });
        let parent = descriptor.parent_cid.map(|cid| ParentRef {
            identity: Some(Identity::Cid(cid)),
            names: descriptor.parent_hint.clone().into_iter().collect(),
            ..ParentRef::default()
        });
        Ok(Self {
            facts: Facts {
                format: Format::Vmdk,
                subtype: subtype(&descriptor.create_type),
                size,
                block: block.unwrap_or(0),
                sector: SECTOR_SIZE as u32,
                identity: descriptor.cid.map(Identity::Cid),
                version: None,
                creator: String::new(),
                parent,
                notes,
            },
            sources,
            extents,
        })
    }

    fn extent(&self, offset: u64) -> &Extent {
        let after = self
            .extents
            .partition_point(|extent| extent.start <= offset);
        &self.extents[after - 1]
    }
}

/// The words of VMware for kinds of disks.
fn subtype(name: &str) -> &'static str {
    const KNOWN: [&str; 11] = [
        "monolithicSparse",
        "monolithicFlat",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
        "streamOptimized",
        "vmfs",
        "vmfsThin",
        "vmfsPreallocated",
        "vmfsEagerZeroedThick",
        "vmfsSparse",
        "seSparse",
    ];
    KNOWN
        .into_iter()
        .find(|known| known.eq_ignore_ascii_case(name))
        .unwrap_or("custom")
}

fn open_sparse(source: Arc<dyn Source>, notes: &mut Vec<String>) -> Result<Body> {
    let head = read_vec(&*source, 0, source.len().min(16) as usize)?;
    if head.starts_with(&sparse::MAGIC) {
        let sparse = Sparse::open(source)?;
        notes.extend(sparse.notes.iter().cloned());
        Ok(Body::Sparse(Arc::new(sparse)))
    } else if head.starts_with(&esx::COWD) {
        Esx::open_cowd(source).map(|esx| Body::Esx(Arc::new(esx)))
    } else if head.len() == 16 && get_u64(&head, 0) == esx::SESPARSE {
        Esx::open_sesparse(source).map(|esx| Body::Esx(Arc::new(esx)))
    } else {
        Err(broken("a sparse extent does not begin like one"))
    }
}

/// I1: the file has what the descriptor says.
fn check_extent(body: &Body, source: Option<&Arc<dyn Source>>, len: u64, name: &str) -> Result<()> {
    let capacity = match body {
        Body::Zero => return Ok(()),
        Body::Flat(at) => {
            let there = source.map_or(0, |source| source.len());
            return check_range(there, *at, len).map_err(|_| {
                broken(format!(
                    "an extent is shorter than its line says: file={name:?} has={there} wanted={len}"
                ))
            });
        }
        Body::Sparse(sparse) => sparse.capacity,
        Body::Esx(esx) => esx.capacity,
    };
    if capacity * SECTOR < len {
        return Err(broken(format!(
            "an extent is smaller than its line says: file={name:?} sectors={capacity}"
        )));
    }
    Ok(())
}

impl Layer for Vmdk {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn sources(&self) -> &[Arc<dyn Source>] {
        &self.sources
    }

    fn run(&self, offset: u64, most: u64) -> Result<Run> {
        let extent = self.extent(offset);
        let inside = offset - extent.start;
        let most = most.min(extent.len - inside);
        let (grain, found, empty) = match &extent.body {
            Body::Zero => {
                return Ok(Run {
                    len: most,
                    content: Content::Zero,
                });
            }
            Body::Flat(at) => {
                return Ok(Run {
                    len: most,
                    content: Content::Data {
                        source: extent.source,
                        at: at + inside,
                    },
                });
            }
            Body::Sparse(sparse) => {
                let index = inside / sparse.grain;
                (sparse.grain, sparse.grain(index)?, sparse.absent(index)?)
            }
            Body::Esx(esx) => {
                let index = inside / esx.grain;
                (esx.grain, esx.grain(index)?, esx.absent(index)?)
            }
        };
        let skip = inside % grain;
        let content = match found {
            Grain::Absent => Content::Absent,
            Grain::Zero => Content::Zero,
            Grain::At(at) => Content::Data {
                source: extent.source,
                at: at + skip,
            },
            Grain::Packed(_) => Content::Packed,
        };
        Ok(Run {
            len: most.min(grain * empty.max(1) - skip),
            content,
        })
    }

    fn read_packed(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let extent = self.extent(offset);
        let inside = offset - extent.start;
        let Body::Sparse(sparse) = &extent.body else {
            return Err(broken("only grains of sparse extents are compressed"));
        };
        let index = inside / sparse.grain;
        let Grain::Packed(at) = sparse.grain(index)? else {
            return Err(broken("a grain is not compressed after all"));
        };
        let bytes = sparse.unpack(index, at)?;
        let skip = (inside % sparse.grain) as usize;
        out.copy_from_slice(&bytes[skip..skip + out.len()]);
        Ok(())
    }
}
