//! Header, extensions and snapshots of a qcow2 image.
//!
//! Layout: QEMU, docs/interop/qcow2.txt. Big-endian.
//!
//! Invariants:
//!
//! 1. Total: any bytes give a header or an error, and no length in them asks for memory that the
//!    file does not have.

use crate::error::Result;
use crate::formats::bytes::{be16, be32, be64};
use crate::formats::source::{check_range, read_vec};
use crate::formats::{Source, broken, unsupported};

/// First bytes of a qcow or qcow2 image.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";

const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;
const DATA_FILE: u64 = 4;
const COMPRESSION: u64 = 8;
const EXTENDED_L2: u64 = 16;

const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_DATA_FILE: u32 = 0x4441_5441;

/// Longest name of a file in an image.
const NAME_MAX: u32 = 1023;
/// Largest table of the first level: 32 MiB, as QEMU has it.
const L1_MAX: u64 = 32 << 20;
/// Largest table of snapshots, and most of them, as QEMU has it.
const SNAPSHOTS_LEN_MAX: u64 = 64 << 20;
const SNAPSHOTS_MAX: u32 = 65536;
/// Largest virtual disk: 2^62 bytes would overflow nothing yet.
const SIZE_MAX: u64 = 1 << 62;

/// How compressed clusters are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Deflate,
    Zstd,
}

/// What the header says, checked.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) size: u64,
    pub(super) l1: u64,
    pub(super) l1_entries: u64,
    pub(super) extended: bool,
    pub(super) compression: Compression,
    pub(super) backing: Option<String>,
    pub(super) backing_format: Option<String>,
    pub(super) data_file: Option<Option<String>>,
    pub(super) notes: Vec<String>,
    snapshots: u32,
    snapshots_at: u64,
}

/// A point in time kept inside the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its number, as text.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Size of the disk then, in bytes.
    pub size: u64,
    /// Table of its first level: offset and entries.
    pub(super) l1: u64,
    pub(super) l1_entries: u64,
}

impl Header {
    pub(super) fn read(source: &dyn Source) -> Result<Self> {
        // The header and all that goes with it lie in the first cluster.
        let head = read_vec(source, 0, source.len().min(2 << 20) as usize)?;
        if head.len() < 72 || head[..4] != MAGIC {
            return Err(broken("this is no qcow2 image"));
        }
        let version = be32(&head, 4);
        if version != 2 && version != 3 {
            return Err(unsupported(format!(
                "this version of qcow is not read: version={version}"
            )));
        }
        if version == 3 && head.len() < 104 {
            return Err(broken("the header is cut off"));
        }
        let cluster_bits = be32(&head, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(broken(format!(
                "a cluster has 512 bytes to 2 MiB: bits={cluster_bits}"
            )));
        }
        match be32(&head, 32) {
            0 => {}
            method => {
                return Err(unsupported(format!(
                    "the image is encrypted: method={method}"
                )));
            }
        }
        let incompatible = if version == 3 { be64(&head, 72) } else { 0 };
        let unknown = incompatible & !(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2);
        if unknown != 0 {
            return Err(unsupported(format!(
                "the image needs features that are not known: bits={unknown:#x}"
            )));
        }
        let header_len = if version == 3 { be32(&head, 100) } else { 72 };
        let cluster = 1_usize << cluster_bits;
        if header_len < 72 || !header_len.is_multiple_of(8) || header_len as usize > cluster {
            return Err(broken(format!(
                "the header has no length that it can have: bytes={header_len}"
            )));
        }
        let compression = match head.get(104) {
            _ if incompatible & COMPRESSION == 0 => Compression::Deflate,
            Some(0) if header_len > 104 => Compression::Deflate,
            Some(1) if header_len > 104 => Compression::Zstd,
            _ => return Err(unsupported("this compression is not known")),
        };
        let mut notes = Vec::new();
        if incompatible & DIRTY != 0 {
            notes.push("it was not closed cleanly; its data is whole".to_owned());
        }
        if incompatible & CORRUPT != 0 {
            notes.push("QEMU marked it as corrupt: check its contents".to_owned());
        }
        let mut header = Self {
            version,
            cluster_bits,
            size: be64(&head, 24),
            l1: be64(&head, 40),
            l1_entries: u64::from(be32(&head, 36)),
            extended: incompatible & EXTENDED_L2 != 0,
            compression,
            backing: None,
            backing_format: None,
            data_file: (incompatible & DATA_FILE != 0).then_some(None),
            notes,
            snapshots: be32(&head, 60),
            snapshots_at: be64(&head, 64),
        };
        if header.extended && cluster_bits < 14 {
            return Err(broken("clusters with parts have at least 16 KiB"));
        }
        header.check_table(source, header.l1, header.l1_entries, header.size)?;
        header.read_extensions(&head[..head.len().min(cluster)], header_len as usize)?;
        header.read_backing(source, be64(&head, 8), be32(&head, 16))?;
        Ok(header)
    }

    /// Entries of a table of the second level.
    pub(super) fn l2_entries(&self) -> u64 {
        (1 << self.cluster_bits) / if self.extended { 16 } else { 8 }
    }

    fn check_table(&self, source: &dyn Source, at: u64, entries: u64, size: u64) -> Result<()> {
        let per_entry = self.l2_entries() << self.cluster_bits;
        let needed = size.div_ceil(per_entry);
        if size > SIZE_MAX || needed > entries {
            return Err(broken(format!(
                "the table of the first level is too short: entries={entries} needed={needed}"
            )));
        }
        let bytes = entries * 8;
        if bytes > L1_MAX {
            return Err(unsupported(format!(
                "the table of the first level is too large: bytes={bytes}"
            )));
        }
        if entries > 0 && (at == 0 || !at.is_multiple_of(1 << self.cluster_bits)) {
            return Err(broken(format!(
                "the table of the first level lies where none can be: offset={at}"
            )));
        }
        check_range(source.len(), at, bytes)
    }

    fn read_extensions(&mut self, cluster: &[u8], from: usize) -> Result<()> {
        let mut at = from;
        while let Some(head) = cluster.get(at..at + 8) {
            let (kind, len) = (be32(head, 0), be32(head, 4) as usize);
            if kind == 0 {
                return Ok(());
            }
            let Some(value) = cluster.get(at + 8..).and_then(|rest| rest.get(..len)) else {
                return Err(broken("an extension of the header is cut off"));
            };
            let text = || String::from_utf8_lossy(value).into_owned();
            match kind {
                EXT_BACKING_FORMAT => self.backing_format = Some(text()),
                EXT_DATA_FILE if self.data_file.is_some() => self.data_file = Some(Some(text())),
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        // A version 2 header may be followed by the backing file's name at once.
        Ok(())
    }

    fn read_backing(&mut self, source: &dyn Source, at: u64, len: u32) -> Result<()> {
        if at == 0 {
            return Ok(());
        }
        if len > NAME_MAX || at > 1 << self.cluster_bits {
            return Err(broken(
                "the name of the backing file lies where none can be",
            ));
        }
        let bytes = read_vec(source, at, len as usize)?;
        self.backing = Some(String::from_utf8_lossy(&bytes).into_owned());
        Ok(())
    }

    /// The snapshots inside the image.
    pub(super) fn snapshots(&self, source: &dyn Source) -> Result<Vec<Snapshot>> {
        if self.snapshots > SNAPSHOTS_MAX {
            return Err(broken(format!(
                "more snapshots than an image can have: {}",
                self.snapshots
            )));
        }
        let (mut at, mut found) = (self.snapshots_at, Vec::new());
        for _ in 0..self.snapshots {
            let head = read_vec(source, at, 40)?;
            let (id, name) = (usize::from(be16(&head, 12)), usize::from(be16(&head, 14)));
            let extra = be32(&head, 36) as usize;
            if extra > 1024 {
                return Err(broken("a snapshot has more to say than any can"));
            }
            let rest = read_vec(source, at + 40, extra + id + name)?;
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let size = if extra >= 16 {
                be64(&rest, 8)
            } else {
                self.size
            };
            let snapshot = Snapshot {
                id: text(&rest[extra..extra + id]),
                name: text(&rest[extra + id..]),
                size,
                l1: be64(&head, 0),
                l1_entries: u64::from(be32(&head, 8)),
            };
            self.check_table(source, snapshot.l1, snapshot.l1_entries, size)?;
            found.push(snapshot);
            at += (40 + extra + id + name).next_multiple_of(8) as u64;
            if at - self.snapshots_at > SNAPSHOTS_LEN_MAX {
                return Err(broken("the table of snapshots is too long"));
            }
        }
        Ok(found)
    }
}
