//! Plans of qcow2, version 3. Big-endian.
//!
//! Header, reference counts, tables, then the clusters without gaps in the order of the disk. The
//! clusters are so large that the tables of one image stay small.
//!
//! Invariants:
//!
//! 1. Every cluster of the file has a reference count of 1.

use super::{
    Blocks, Map, Parent, Part, Plan, PlannedFile, SECTOR, Spec, blocks, contiguous, count, put,
    too_large,
};
use crate::error::Result;
use crate::formats::qcow2::MAGIC;
use crate::formats::{Format, unsupported};

/// Bytes of the header itself.
const HEADER_LEN: u32 = 104;
/// 16 bits a reference count.
const REFCOUNT_ORDER: u32 = 4;
/// Smallest and largest cluster that is made: 64 KiB and 2 MiB.
const BITS: std::ops::RangeInclusive<u32> = 16..=21;
/// Tables of a full disk stay below this where a larger cluster helps: 4 MiB.
const TABLES_MAX: u64 = 4 << 20;
/// Where the name of the parent stands.
const NAME_AT: u64 = 512;
/// Longest name of the parent.
const NAME_MAX: usize = 1023;
/// Largest table of tables that QEMU opens: 32 MiB.
const L1_MAX: u64 = 32 << 20;
const COPIED: u64 = 1 << 63;
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Bits of the cluster size for a disk.
pub(super) fn cluster_bits(size: u64) -> u32 {
    let mut bits = *BITS.start();
    while bits < *BITS.end() && size.div_ceil(1 << bits) * 8 > TABLES_MAX {
        bits += 1;
    }
    bits
}

/// What a header says.
pub(super) struct Header<'a> {
    pub(super) bits: u32,
    pub(super) size: u64,
    pub(super) l1_entries: u64,
    pub(super) l1: u64,
    pub(super) refcounts: u64,
    pub(super) refcount_clusters: u64,
    pub(super) parent: Option<&'a Parent>,
}

impl Header<'_> {
    /// At most 2 KiB.
    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; HEADER_LEN as usize];
        put(&mut bytes, 0, &MAGIC);
        let mut number = |at: usize, value: u32| put(&mut bytes, at, &value.to_be_bytes());
        number(4, 3);
        number(20, self.bits);
        number(36, self.l1_entries as u32);
        number(56, self.refcount_clusters as u32);
        number(96, REFCOUNT_ORDER);
        number(100, HEADER_LEN);
        put(&mut bytes, 24, &self.size.to_be_bytes());
        put(&mut bytes, 40, &self.l1.to_be_bytes());
        put(&mut bytes, 48, &self.refcounts.to_be_bytes());
        let Some(parent) = self.parent else {
            bytes.extend([0; 8]); // end of the extensions
            return Ok(bytes);
        };
        let name = parent.name.as_bytes();
        // A colon makes a name a protocol for QEMU, whatever it means here.
        if name.len() > NAME_MAX || parent.name.contains(':') {
            return Err(unsupported(
                "a qcow2 cannot name its parent if the name is long or has a colon in it",
            ));
        }
        let format = match parent.format {
            Format::Vhd => "vpc",
            other => other.name(),
        };
        bytes.extend(BACKING_FORMAT.to_be_bytes());
        bytes.extend((format.len() as u32).to_be_bytes());
        bytes.extend(format.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes.resize(NAME_AT as usize, 0);
        bytes.extend(name);
        put(&mut bytes, 8, &NAME_AT.to_be_bytes());
        put(&mut bytes, 16, &(name.len() as u32).to_be_bytes());
        Ok(bytes)
    }
}

/// Clusters of the reference counts for `rest` other clusters: table, blocks.
pub(super) fn refcount_clusters(rest: u64, bits: u32) -> (u64, u64) {
    let (per_block, per_table) = (1_u64 << (bits - 1), 1_u64 << (bits - 3));
    let (mut table, mut blocks) = (1, 1);
    loop {
        let needed = (rest + table + blocks).div_ceil(per_block);
        let needed_table = needed.div_ceil(per_table);
        if needed <= blocks && needed_table <= table {
            return (table, blocks);
        }
        (table, blocks) = (needed_table.max(table), needed.max(blocks));
    }
}

/// Numbers of the tables in which something is, ascending.
fn tables(runs: &[Blocks], per_table: u64) -> Vec<u64> {
    let mut tables: Vec<u64> = Vec::new();
    for run in runs {
        let first = run.first / per_table;
        let first = tables.last().map_or(first, |last| first.max(last + 1));
        tables.extend(first..=(run.first + run.count - 1) / per_table);
    }
    tables
}

/// The contents of these tables, for clusters from `first` on.
fn entries(runs: &[Blocks], tables: &[u64], bits: u32, first: u64) -> Vec<u8> {
    let (cluster, per_table) = (1_u64 << bits, 1_u64 << (bits - 3));
    let mut bytes = vec![0; tables.len() << bits];
    for run in runs {
        for i in 0..run.count {
            let block = run.first + i;
            let place = tables.partition_point(|table| *table < block / per_table) as u64;
            let entry = (first + (run.before + i) * cluster) | COPIED;
            let at = place * cluster + block % per_table * 8;
            put(&mut bytes, at as usize, &entry.to_be_bytes());
        }
    }
    bytes
}

pub(super) fn plan(spec: &Spec, map: &dyn Map) -> Result<Plan> {
    let size = spec.size.next_multiple_of(SECTOR);
    let bits = cluster_bits(size);
    let cluster = 1_u64 << bits;
    let per_table = cluster / 8;
    let l1_entries = size.div_ceil(cluster * per_table);
    if l1_entries * 8 > L1_MAX {
        return Err(too_large(spec, "what QEMU opens"));
    }
    let runs = blocks(map, cluster, spec.size)?;
    let tables = tables(&runs, per_table);
    let l1_clusters = (l1_entries * 8).div_ceil(cluster);
    let rest = 1 + l1_clusters + tables.len() as u64 + count(&runs);
    let (table, counts) = refcount_clusters(rest, bits);
    let l1_at = (1 + table + counts) * cluster;
    let l2_at = l1_at + l1_clusters * cluster;
    let first = l2_at + tables.len() as u64 * cluster;
    let mut l1 = vec![0; l1_entries as usize * 8];
    for (i, table) in tables.iter().enumerate() {
        let entry = (l2_at + i as u64 * cluster) | COPIED;
        put(&mut l1, *table as usize * 8, &entry.to_be_bytes());
    }
    let l2 = entries(&runs, &tables, bits, first);
    let mut directory = Vec::new();
    for i in 0..counts {
        directory.extend(((1 + table + i) * cluster).to_be_bytes());
    }
    let header = Header {
        bits,
        size,
        l1_entries,
        l1: l1_at,
        refcounts: cluster,
        refcount_clusters: table,
        parent: spec.parent.as_ref(),
    };
    let mut parts = vec![
        Part::Bytes {
            at: 0,
            bytes: header.encode()?,
        },
        Part::Bytes {
            at: cluster,
            bytes: directory,
        },
        Part::Bytes {
            at: (1 + table) * cluster,
            bytes: [0, 1].repeat((rest + table + counts) as usize),
        },
        Part::Bytes {
            at: l1_at,
            bytes: l1,
        },
        Part::Bytes {
            at: l2_at,
            bytes: l2,
        },
    ];
    parts.extend(contiguous(&runs, first, cluster));
    let file = PlannedFile {
        name: None,
        len: first + count(&runs) * cluster,
        parts,
    };
    Ok(Plan::single(file, spec.size, cluster))
}
