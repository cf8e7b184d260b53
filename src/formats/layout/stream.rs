//! Compressed images, whose layout is known only when they are written: streamOptimized VMDK and
//! compressed qcow2.
//!
//! Invariants:
//!
//! 1. Memory is bounded by the tables of the image.
//! 2. A compressed cluster of a qcow2 refers back at most 4 KiB, as its readers may assume.

use std::io::{Read, Seek, SeekFrom, Write};

use flate2::read::ZlibEncoder;
use flate2::{Compress, Compression, FlushCompress};

use super::qcow2::{Header as Qcow2Header, refcount_clusters};
use super::vmdk::{self, DESCRIPTOR, GRAIN, TABLE};
use super::{Map, SECTOR, Spec, put, too_large};
use crate::error::{Error, Result};
use crate::formats::chain::Chain;
use crate::formats::unsupported;
use crate::ondisk::is_zero;

/// Marker types.
const TABLE_MARKER: u32 = 1;
const DIRECTORY_MARKER: u32 = 2;
const FOOTER_MARKER: u32 = 3;
/// Newlines are there to be checked; grains are compressed; there are markers.
const FLAGS: u32 = 0x3_0001;
/// The directory is where the footer says.
const AT_END: u64 = u64::MAX;
/// Sectors before the first grain.
const OVERHEAD: u64 = 128;

/// What is told while it goes on: bytes of the disk that are done.
pub type Progress<'a> = &'a mut dyn FnMut(u64);

fn failed(error: std::io::Error) -> Error {
    Error::io("cannot write the new image", error)
}

/// Counts what was written.
struct Out<'a> {
    to: &'a mut dyn Write,
    at: u64,
}

impl Out<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.to.write_all(bytes).map_err(failed)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self, to: u64) -> Result<()> {
        let missing = self.at.next_multiple_of(to) - self.at;
        self.write(&vec![0; missing as usize])
    }

    fn sector(&self, spec: &Spec) -> Result<u32> {
        u32::try_from(self.at / SECTOR).map_err(|_| too_large(spec, "2 TiB when compressed"))
    }

    fn marker(&mut self, sectors: u64, kind: u32) -> Result<()> {
        let mut bytes = [0; SECTOR as usize];
        put(&mut bytes, 0, &sectors.to_le_bytes());
        put(&mut bytes, 12, &kind.to_le_bytes());
        self.write(&bytes)
    }
}

/// Reads the blocks of `block` bytes that `map` tells, in order, padded with zeros behind the end
/// of the disk; those that are all zero are left out. `visit` gets their number and bytes.
fn each_block(
    spec: &Spec,
    (chain, map): (&Chain, &dyn Map),
    block: u64,
    progress: Progress<'_>,
    visit: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut bytes = vec![0; block as usize];
    let mut at = 0;
    while at < spec.size {
        let Some(range) = map.next(at)? else { break };
        for index in range.start / block..range.end.div_ceil(block) {
            let start = index * block;
            let len = block.min(spec.size - start) as usize;
            bytes.fill(0);
            chain.read(start, &mut bytes[..len])?;
            if !is_zero(&bytes) {
                visit(index, &bytes)?;
            }
            progress(len as u64);
        }
        at = range.end.div_ceil(block) * block;
    }
    Ok(())
}

/// Writes a streamOptimized VMDK of what `map` tells of `chain`; `out` is not sought.
///
/// # Errors
/// `Unsupported` if the format cannot hold the disk; those of `chain` and `map`; `Io`.
pub fn stream_optimized(
    spec: &Spec,
    disk: (&Chain, &dyn Map),
    out: &mut dyn Write,
    progress: Progress<'_>,
) -> Result<u64> {
    if spec.parent.is_some() {
        return Err(unsupported(
            "a streamOptimized VMDK has no parent: choose monolithicSparse",
        ));
    }
    let size = spec.size.next_multiple_of(SECTOR);
    let tables = size.div_ceil(GRAIN).div_ceil(TABLE);
    let header = |directory: u64| vmdk::Header {
        version: 3,
        flags: FLAGS,
        capacity: size / SECTOR,
        redundant: 0,
        directory,
        overhead: OVERHEAD,
        compression: 1,
    };
    let mut out = Out { to: out, at: 0 };
    out.write(&header(AT_END).encode())?;
    out.write(&vmdk::embedded(spec, size, "streamOptimized")?)?;
    debug_assert_eq!(out.at, (DESCRIPTOR.0 + DESCRIPTOR.1) * SECTOR);
    out.pad(OVERHEAD * SECTOR)?;
    let mut directory = vec![0; tables as usize * 4];
    let mut table: Option<(u64, Vec<u8>)> = None;
    let mut finish = |out: &mut Out<'_>, table: Option<(u64, Vec<u8>)>| {
        let Some((index, bytes)) = table else {
            return Ok(());
        };
        out.marker(TABLE * 4 / SECTOR, TABLE_MARKER)?;
        put(
            &mut directory,
            index as usize * 4,
            &out.sector(spec)?.to_le_bytes(),
        );
        out.write(&bytes)
    };
    each_block(spec, disk, GRAIN, progress, &mut |index, bytes| {
        if table.as_ref().is_none_or(|(at, _)| *at != index / TABLE) {
            finish(&mut out, table.take())?;
            table = Some((index / TABLE, vec![0; TABLE as usize * 4]));
        }
        if let Some((_, entries)) = &mut table {
            let at = (index % TABLE) as usize * 4;
            put(entries, at, &out.sector(spec)?.to_le_bytes());
        }
        let mut packed = vec![0; 12];
        put(&mut packed, 0, &(index * (GRAIN / SECTOR)).to_le_bytes());
        let mut encoder = ZlibEncoder::new(bytes, Compression::default());
        encoder.read_to_end(&mut packed).map_err(failed)?;
        let len = packed.len() as u32 - 12;
        put(&mut packed, 8, &len.to_le_bytes());
        out.write(&packed)?;
        out.pad(SECTOR)
    })?;
    finish(&mut out, table)?;
    directory.resize(directory.len().next_multiple_of(SECTOR as usize), 0);
    out.marker(directory.len() as u64 / SECTOR, DIRECTORY_MARKER)?;
    let directory_at = out.at / SECTOR;
    out.write(&directory)?;
    out.marker(1, FOOTER_MARKER)?;
    out.write(&header(directory_at).encode())?;
    out.marker(0, 0)?;
    Ok(out.at)
}

/// Bits of the cluster size of compressed images: 64 KiB, as QEMU makes them.
const BITS: u32 = 16;
const CLUSTER: u64 = 1 << BITS;
/// Entries of a table.
const PER_TABLE: u64 = CLUSTER / 8;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Where the count of sectors begins in an entry.
const SHIFT: u32 = 62 - (BITS - 8);
const REACH: usize = 4096;

/// Raw deflate that never refers back further than [`REACH`]; `None` if it does not shrink.
fn deflate(bytes: &[u8]) -> Result<Option<Vec<u8>>> {
    let mut packed = Vec::with_capacity(bytes.len());
    let mut encoder = Compress::new(Compression::default(), false);
    let wrong = |error| Error::io("cannot compress", std::io::Error::other(error));
    for (i, part) in bytes.chunks(REACH).enumerate() {
        let last = (i + 1) * REACH >= bytes.len();
        // I2: a full flush forgets what was before.
        let flush = if last {
            FlushCompress::Finish
        } else {
            FlushCompress::Full
        };
        let before = encoder.total_in();
        encoder
            .compress_vec(part, &mut packed, flush)
            .map_err(wrong)?;
        let taken = encoder.total_in() - before == part.len() as u64;
        if !taken || packed.len() + 64 >= bytes.len() {
            return Ok(None);
        }
    }
    Ok(Some(packed))
}

/// Writes a compressed qcow2 of what `map` tells of `chain`. `out` is an empty file.
///
/// # Errors
/// As [`stream_optimized`].
pub fn compressed_qcow2<W: Write + Seek>(
    spec: &Spec,
    disk: (&Chain, &dyn Map),
    out: &mut W,
    progress: Progress<'_>,
) -> Result<u64> {
    let size = spec.size.next_multiple_of(SECTOR);
    let l1_entries = size.div_ceil(CLUSTER * PER_TABLE);
    if l1_entries * 8 > 32 << 20 {
        return Err(too_large(spec, "what QEMU opens"));
    }
    let mut packed = Packed {
        sink: Out { to: out, at: 0 },
        counts: vec![1],
        tables: Vec::new(),
    };
    packed.sink.write(&vec![0; CLUSTER as usize])?;
    let visit = &mut |index: u64, bytes: &[u8]| packed.add(index, bytes);
    if spec.parent.is_some() {
        // Zeros over a parent's data are data here.
        each_differing(spec, disk, progress, visit)?;
    } else {
        each_block(spec, disk, CLUSTER, progress, visit)?;
    }
    let (l1_at, counts) = packed.finish(l1_entries)?;
    finish_qcow2(spec, out, (l1_entries, l1_at), counts)
}

/// Clusters on their way into a file.
struct Packed<'a> {
    sink: Out<'a>,
    /// Reference counts of the clusters so far; 0 for those of tables.
    counts: Vec<u16>,
    /// Tables in which something is: number and entries.
    tables: Vec<(u64, Vec<u8>)>,
}

impl Packed<'_> {
    fn add(&mut self, index: u64, bytes: &[u8]) -> Result<()> {
        let entry = match deflate(bytes)? {
            Some(packed) => {
                let at = self.sink.at;
                self.sink.write(&packed)?;
                let last = self.sink.at - 1;
                self.counts.resize((last / CLUSTER) as usize + 1, 0);
                for cluster in at / CLUSTER..=last / CLUSTER {
                    self.counts[cluster as usize] += 1;
                }
                at | ((last / SECTOR - at / SECTOR) << SHIFT) | COMPRESSED
            }
            None => {
                self.sink.pad(CLUSTER)?;
                let at = self.sink.at;
                self.sink.write(bytes)?;
                self.counts.resize((at / CLUSTER) as usize, 0);
                self.counts.push(1);
                at | COPIED
            }
        };
        let table = index / PER_TABLE;
        if self.tables.last().is_none_or(|(last, _)| *last != table) {
            self.tables.push((table, vec![0; CLUSTER as usize]));
        }
        if let Some((_, entries)) = self.tables.last_mut() {
            let at = (index % PER_TABLE) as usize * 8;
            put(entries, at, &entry.to_be_bytes());
        }
        Ok(())
    }

    /// Writes the tables; returns where the table of tables is, and the counts before it.
    fn finish(mut self, l1_entries: u64) -> Result<(u64, Vec<u16>)> {
        let mut l1 = vec![0; l1_entries as usize * 8];
        for (index, entries) in &self.tables {
            self.sink.pad(CLUSTER)?;
            let entry = self.sink.at | COPIED;
            put(&mut l1, *index as usize * 8, &entry.to_be_bytes());
            self.sink.write(entries)?;
        }
        self.sink.pad(CLUSTER)?;
        let l1_at = self.sink.at;
        self.sink.write(&l1)?;
        self.sink.pad(CLUSTER)?;
        self.counts.resize((l1_at / CLUSTER) as usize, 0);
        for count in &mut self.counts {
            *count = (*count).max(1); // tables
        }
        Ok((l1_at, self.counts))
    }
}

/// As [`each_block`], with the blocks that are zero.
fn each_differing(
    spec: &Spec,
    (chain, map): (&Chain, &dyn Map),
    progress: Progress<'_>,
    visit: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    for run in super::blocks(map, CLUSTER, spec.size)? {
        for index in run.first..run.first + run.count {
            let start = index * CLUSTER;
            let len = CLUSTER.min(spec.size - start) as usize;
            let mut bytes = vec![0; CLUSTER as usize];
            chain.read(start, &mut bytes[..len])?;
            visit(index, &bytes)?;
            progress(len as u64);
        }
    }
    Ok(())
}

/// Reference counts behind the tables, and the header that makes it an image.
fn finish_qcow2<W: Write + Seek>(
    spec: &Spec,
    out: &mut W,
    (l1_entries, l1): (u64, u64),
    mut counts: Vec<u16>,
) -> Result<u64> {
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
    counts.extend(vec![1; l1_clusters as usize]);
    let rest = counts.len() as u64;
    let (table, blocks) = refcount_clusters(rest, BITS);
    counts.extend(vec![1; (table + blocks) as usize]);
    let mut bytes = vec![0; (table * CLUSTER) as usize];
    for i in 0..blocks {
        let at = (rest + table + i) * CLUSTER;
        put(&mut bytes, i as usize * 8, &at.to_be_bytes());
    }
    let mut numbers: Vec<u8> = counts
        .iter()
        .flat_map(|count| count.to_be_bytes())
        .collect();
    numbers.resize((blocks * CLUSTER) as usize, 0);
    bytes.extend(numbers);
    let header = Qcow2Header {
        bits: BITS,
        size: spec.size.next_multiple_of(SECTOR),
        l1_entries,
        l1,
        refcounts: rest * CLUSTER,
        refcount_clusters: table,
        parent: spec.parent.as_ref(),
    };
    out.seek(SeekFrom::Start(rest * CLUSTER)).map_err(failed)?;
    out.write_all(&bytes).map_err(failed)?;
    out.seek(SeekFrom::Start(0)).map_err(failed)?;
    out.write_all(&header.encode()?).map_err(failed)?;
    Ok(rest * CLUSTER + bytes.len() as u64)
}
