//! qcow2: the images of QEMU, versions 2 and 3; and version 1 (`v1.rs`).
//!
//! Layout: QEMU, docs/interop/qcow2.txt. Big-endian. Clusters are found through tables of two
//! levels. Reference counts are not looked at: they matter to who writes.
//!
//! Invariants:
//!
//! 1. What a table points to lies within the file; otherwise reading it is an error, never zeros.
//! 2. No table of the second level belongs to two places of one disk.
//! 3. A compressed cluster unpacks to one cluster, whatever it claims.

use std::io::Read;
use std::sync::Arc;

use flate2::read::DeflateDecoder;

mod header;
mod v1;

use super::bytes::be64;
use super::source::{check_range, check_tables_apart, read_vec};
use super::{Content, Facts, Format, Layer, Opener, Pages, ParentRef, Run, Source, broken};
use crate::error::Result;
use crate::units::SECTOR_SIZE;
use header::{Compression, Header};

pub(crate) use header::MAGIC;
pub use header::Snapshot;
pub use v1::Qcow1;
pub(crate) use v1::is_version_1;

/// Offset of a table or cluster in an entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Parts of a cluster with extended entries.
const PARTS: u64 = 32;
/// Largest window that zstd may ask for: no frame holds more than a cluster of 2 MiB.
const WINDOW_MAX: u64 = 8 << 20;

/// An open qcow2 image, or one of its snapshots.
#[derive(Debug)]
pub struct Qcow2 {
    facts: Facts,
    header: Header,
    /// The image and, if it has one, its external data file.
    sources: Vec<Arc<dyn Source>>,
    pages: Pages,
    l1: u64,
}

/// What the tables say of a place.
enum Cluster {
    Absent,
    /// No table: this many clusters are absent.
    NoTable(u64),
    Zero,
    At(u64),
    Packed(u64),
    /// Host offset, which parts are there, which are zeros.
    Parts(u64, u32, u32),
}

impl Qcow2 {
    /// Opens an image. `open` opens its external data file, if it has one.
    ///
    /// # Errors
    /// `Corrupt`, naming what is wrong; `Unsupported`; `Io`; what `open` answers.
    pub fn open(source: Arc<dyn Source>, open: Opener<'_>) -> Result<Self> {
        let header = Header::read(&*source)?;
        let mut sources = vec![source.clone()];
        match &header.data_file {
            None => {}
            Some(Some(name)) => sources.push(open(name)?),
            Some(None) => {
                return Err(broken("the image has a data file and does not name it"));
            }
        }
        let parent = header.backing.as_ref().map(|name| ParentRef {
            names: vec![name.clone()],
            format: header.backing_format.clone(),
            ..ParentRef::default()
        });
        let facts = Facts {
            format: Format::Qcow2,
            subtype: match (&header.data_file, header.version) {
                (Some(_), _) => "v3 with data file",
                (None, 2) => "v2",
                (None, _) => "v3",
            },
            size: header.size,
            block: 1 << header.cluster_bits,
            sector: SECTOR_SIZE as u32,
            identity: None,
            version: None,
            creator: String::new(),
            parent,
            notes: header.notes.clone(),
        };
        let qcow2 = Self {
            facts,
            l1: header.l1,
            pages: Pages::new(source),
            header,
            sources,
        };
        qcow2.check_tables(qcow2.l1, qcow2.header.l1_entries)?;
        Ok(qcow2)
    }

    /// I2.
    fn check_tables(&self, l1: u64, entries: u64) -> Result<()> {
        let mut tables = Vec::new();
        let mut at = 0;
        while at < entries {
            let count = (entries - at).min(128 * 1024);
            let part = read_vec(&*self.sources[0], l1 + at * 8, count as usize * 8)?;
            let offsets = part.chunks_exact(8).map(|raw| be64(raw, 0) & OFFSET);
            tables.extend(offsets.filter(|at| *at > 0).map(|at| (at, 512)));
            at += count;
        }
        check_tables_apart(&mut tables)
    }

    /// Fails if the tables of a snapshot are not fit to be read.
    ///
    /// # Errors
    /// `Corrupt`; `Io`.
    pub fn check_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        self.check_tables(snapshot.l1, snapshot.l1_entries)
    }

    /// The snapshots that the image holds.
    ///
    /// # Errors
    /// `Corrupt` if their table is damaged; `Io`.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        self.header.snapshots(&*self.sources[0])
    }

    /// The disk as it was at a snapshot.
    #[must_use]
    pub fn at_snapshot(&self, snapshot: &Snapshot) -> Self {
        let mut facts = self.facts.clone();
        facts.size = snapshot.size;
        facts.notes.push(format!("snapshot {:?}", snapshot.name));
        Self {
            facts,
            header: self.header.clone(),
            sources: self.sources.clone(),
            pages: Pages::new(self.sources[0].clone()),
            l1: snapshot.l1,
        }
    }

    fn cluster_size(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    /// An offset in an entry, which must be that of a cluster.
    fn aligned(&self, entry: u64) -> Result<u64> {
        let at = entry & OFFSET;
        if !at.is_multiple_of(self.cluster_size()) {
            return Err(broken(format!(
                "a table points between clusters: entry={entry:#x}"
            )));
        }
        Ok(at)
    }

    fn cluster(&self, offset: u64) -> Result<Cluster> {
        let index = offset >> self.header.cluster_bits;
        let per_table = self.header.l2_entries();
        let l1_entry = self.pages.u64_be(self.l1 + index / per_table * 8)?;
        let table = self.aligned(l1_entry)?;
        if table == 0 {
            return Ok(Cluster::NoTable(per_table - index % per_table));
        }
        check_range(self.pages.len(), table, self.cluster_size())?;
        let width = if self.header.extended { 16 } else { 8 };
        let at = table + index % per_table * width;
        let entry = self.pages.u64_be(at)?;
        if entry & COMPRESSED != 0 {
            return Ok(Cluster::Packed(entry));
        }
        let host = self.aligned(entry)?;
        if self.header.extended {
            let bits = self.pages.u64_be(at + 8)?;
            let (there, zero) = (bits as u32, (bits >> 32) as u32);
            if there & zero != 0 || there != 0 && host == 0 && !self.is_external(entry) {
                return Err(broken(format!(
                    "the parts of a cluster contradict each other: bits={bits:#x}"
                )));
            }
            return Ok(Cluster::Parts(host, there, zero));
        }
        if self.header.version >= 3 && entry & ZERO != 0 {
            return Ok(Cluster::Zero);
        }
        if host == 0 && !self.is_external(entry) {
            return Ok(Cluster::Absent);
        }
        Ok(Cluster::At(host))
    }

    /// How many clusters behind that of `offset`, at most `most`, have the same entry in the same
    /// table. A table that is a hole is not read.
    fn equals(&self, offset: u64, most: u64) -> Result<u64> {
        let index = offset >> self.header.cluster_bits;
        let per_table = self.header.l2_entries();
        let table = self.aligned(self.pages.u64_be(self.l1 + index / per_table * 8)?)?;
        let width: usize = if self.header.extended { 16 } else { 8 };
        let at = table + index % per_table * width as u64;
        let most = most.min(per_table - 1 - index % per_table);
        let (mut first, mut next) = ([0; 16], [0; 16]);
        self.pages.read(at, &mut first[..width])?;
        let mut count = 0;
        if first == [0; 16] && most > 0 {
            let (there, len) = self.sources[0].data(at, (most + 1) * width as u64)?;
            if !there {
                count = (len / width as u64).saturating_sub(1).min(most);
            }
        }
        while count < most {
            self.pages
                .read(at + (count + 1) * width as u64, &mut next[..width])?;
            if next != first {
                break;
            }
            count += 1;
        }
        Ok(count)
    }

    /// True if host offset 0 is a place: in a data file, where nothing else begins.
    fn is_external(&self, entry: u64) -> bool {
        self.sources.len() > 1 && entry & COPIED != 0
    }

    /// Unpacks the cluster of a compressed entry.
    fn unpack(&self, entry: u64) -> Result<Vec<u8>> {
        let shift = 62 - (self.header.cluster_bits - 8);
        let at = entry & ((1 << shift) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> shift;
        let source = &self.sources[0];
        // Whole sectors are counted, and the last one need not be there.
        let end = ((at & !511) + (sectors + 1) * 512).min(source.len());
        if at >= end {
            return Err(broken(format!(
                "a compressed cluster lies behind the end: offset={at}"
            )));
        }
        let packed = read_vec(&**source, at, (end - at) as usize)?;
        let size = self.cluster_size() as usize;
        let mut bytes = vec![0; size];
        let damaged = |error: &dyn std::fmt::Display| {
            broken(format!(
                "a compressed cluster is damaged: offset={at}: {error}"
            ))
        };
        match self.header.compression {
            Compression::Deflate => DeflateDecoder::new(&packed[..])
                .read_exact(&mut bytes)
                .map_err(|error| damaged(&error))?,
            Compression::Zstd => {
                check_window(&packed).map_err(|error| damaged(&error))?;
                let mut decoder = ruzstd::decoding::StreamingDecoder::new(&packed[..])
                    .map_err(|error| damaged(&error))?;
                decoder
                    .read_exact(&mut bytes)
                    .map_err(|error| damaged(&error))?;
            }
        }
        Ok(bytes)
    }
}

/// Refuses a zstd frame whose window would take much memory. Layout: RFC 8878, 3.1.1.1.
fn check_window(frame: &[u8]) -> std::result::Result<(), &'static str> {
    if frame.len() < 6 || frame[..4] != [0x28, 0xb5, 0x2f, 0xfd] {
        return Err("no zstd frame begins there");
    }
    let descriptor = frame[4];
    if descriptor & 0x20 != 0 {
        // A single segment: the window is the size of the contents.
        let (skip, len) = match descriptor >> 6 {
            0 => (0, 1),
            1 => (256, 2),
            2 => (0, 4),
            _ => (0, 8),
        };
        let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
        let Some(raw) = frame.get(5 + dictionary..5 + dictionary + len) else {
            return Err("the frame is cut off");
        };
        let size = raw
            .iter()
            .rev()
            .fold(0_u64, |size, byte| size << 8 | u64::from(*byte));
        return if size + skip <= WINDOW_MAX {
            Ok(())
        } else {
            Err("the frame asks for too much memory")
        };
    }
    let (exponent, mantissa) = (u32::from(frame[5] >> 3), u64::from(frame[5] & 7));
    let base = 1_u64 << (10 + exponent);
    if base + base / 8 * mantissa > WINDOW_MAX {
        return Err("the frame asks for too much memory");
    }
    Ok(())
}

impl Layer for Qcow2 {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn sources(&self) -> &[Arc<dyn Source>] {
        &self.sources
    }

    fn run(&self, offset: u64, most: u64) -> Result<Run> {
        let size = self.cluster_size();
        let inside = offset % size;
        let wanted = most.min(self.facts.size - offset);
        let most = wanted.min(size - inside);
        let data = self.sources.len() - 1;
        let place = |host: u64, len: u64| {
            check_range(self.sources[data].len(), host + inside, len)?;
            Ok(Content::Data {
                source: data,
                at: host + inside,
            })
        };
        let (mut len, content) = match self.cluster(offset)? {
            Cluster::Absent => (most, Content::Absent),
            Cluster::NoTable(count) => {
                return Ok(Run {
                    len: wanted.min(count * size - inside),
                    content: Content::Absent,
                });
            }
            Cluster::Zero => (most, Content::Zero),
            Cluster::Packed(_) => (most, Content::Packed),
            Cluster::At(host) => (most, place(host, most)?),
            Cluster::Parts(host, there, zero) => {
                let part = size / PARTS;
                let kind = |i: u64| (there >> i & 1 == 1, zero >> i & 1 == 1);
                let first = inside / part;
                let same = (first..PARTS)
                    .take_while(|i| kind(*i) == kind(first))
                    .count();
                let len = ((first + same as u64) * part - inside).min(most);
                let content = match kind(first) {
                    (true, _) => place(host, len)?,
                    (_, true) => Content::Zero,
                    _ => Content::Absent,
                };
                let alike = there == 0 && matches!(zero, 0 | u32::MAX);
                if !alike {
                    return Ok(Run { len, content });
                }
                (len, content)
            }
        };
        let empty = matches!(content, Content::Absent | Content::Zero);
        if empty && len == size - inside && len < wanted {
            let more = self.equals(offset, (wanted - len).div_ceil(size))?;
            len = wanted.min(len + more * size);
        }
        Ok(Run { len, content })
    }

    fn read_packed(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let Cluster::Packed(entry) = self.cluster(offset)? else {
            return Err(broken("a cluster is not compressed after all"));
        };
        let bytes = self.unpack(entry)?;
        let skip = (offset % self.cluster_size()) as usize;
        out.copy_from_slice(&bytes[skip..skip + out.len()]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: usize = 512;

    /// Version 2 with clusters of 512 bytes: one table of the first level, with these entries.
    fn open(l1: &[u64]) -> Result<Qcow2> {
        let mut bytes = vec![0; 8 * CLUSTER];
        let size = (l1.len() * 64 * CLUSTER) as u64;
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[7] = 2;
        bytes[23] = 9;
        bytes[24..32].copy_from_slice(&size.to_be_bytes());
        bytes[39] = l1.len() as u8;
        bytes[40..48].copy_from_slice(&(CLUSTER as u64).to_be_bytes());
        for (i, entry) in l1.iter().enumerate() {
            bytes[CLUSTER + i * 8..][..8].copy_from_slice(&entry.to_be_bytes());
        }
        // One cluster, in the middle of the first table.
        bytes[2 * CLUSTER + 9 * 8..][..8].copy_from_slice(&(4 * CLUSTER as u64).to_be_bytes());
        Qcow2::open(Arc::new(bytes), &mut |_| {
            Err(broken("it has no other file"))
        })
    }

    #[test]
    fn a_table_that_is_named_twice_is_refused() {
        let (a, b) = (2 * CLUSTER as u64, 3 * CLUSTER as u64);
        assert!(open(&[a, 0, b, 0]).is_ok());
        for l1 in [&[a, b, a][..], &[a, COPIED | a]] {
            let error = open(l1).unwrap_err().to_string();
            assert!(error.contains("named twice"), "{error}");
        }
    }

    #[test]
    fn equal_neighbours_are_one_run() {
        let disk = open(&[2 * CLUSTER as u64, 3 * CLUSTER as u64]).unwrap();
        let cluster = CLUSTER as u64;
        let run = |at: u64, most: u64| disk.run(at, most).unwrap();
        assert_eq!(run(100, u64::MAX).len, 9 * cluster - 100);
        assert_eq!(run(0, 700).len, 700);
        assert_eq!(run(0, 700).content, Content::Absent);
        let data = run(9 * cluster, u64::MAX);
        assert!(matches!(data.content, Content::Data { at, .. } if at == 4 * cluster));
        assert_eq!(data.len, cluster);
        assert_eq!(run(10 * cluster, u64::MAX).len, 54 * cluster);
        assert_eq!(run(64 * cluster, u64::MAX).len, 64 * cluster);
    }
}
