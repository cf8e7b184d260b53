//! Blocks of images that were imported earlier in the same run, by their hash: where equal contents
//! can be shared instead of written again.
//!
//! Invariants:
//!
//! 1. A hash only says where to look: bytes are compared before they are shared.
//! 2. A file in the index has no name, and a window of it is noted when it is complete and changes no
//!    more. Only such windows are compared: what is shared is what was compared.
//! 3. Memory is bounded: at [`ENTRIES_MAX`] entries every second hash is forgotten and no longer
//!    taken. Runs of equal blocks are found by those that are left.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ondisk::crc32c;
use crate::sync::Mutex;
use crate::sys::files;

/// Unit that is shared: a block of the pool.
const BLOCK: usize = 4096;
/// Most entries: with what a map needs beside them about 100 MiB.
const ENTRIES_MAX: usize = 2 << 20;
/// Blocks of a window of [`fill`](super::fill()).
const WINDOW_BLOCKS: i64 = super::fill::WINDOW as i64 / BLOCK as i64;
/// Most files.
const FILES_MAX: usize = 512;
/// Most places that are compared with one window.
const TRIES_MAX: usize = 8;

#[derive(Debug, Default)]
struct Index {
    files: Vec<Arc<File>>,
    /// Number of the file, and the block in it.
    blocks: HashMap<u64, (u32, u32)>,
    /// Only hashes without these bits are kept.
    mask: u64,
}

/// The index.
#[derive(Debug, Default)]
pub struct Twins {
    index: Mutex<Index>,
}

/// A file of the index that is being written.
#[derive(Clone, Debug)]
pub struct Twin<'a> {
    twins: &'a Twins,
    number: Option<u32>,
}

/// Of two checksums, because it is quick: whoever makes blocks with one hash wins a comparison.
fn hash(block: &[u8]) -> u64 {
    let (a, b) = block.split_at(BLOCK / 2);
    u64::from(crc32c(a)) << 32 | u64::from(crc32c(b))
}

impl Twins {
    /// An empty index.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a file, as long as there is room.
    pub fn add(&self, file: &Arc<File>) -> Twin<'_> {
        let mut index = self.index.lock();
        let number = (index.files.len() < FILES_MAX).then(|| {
            index.files.push(file.clone());
            index.files.len() as u32 - 1
        });
        Twin {
            twins: self,
            number,
        }
    }
}

impl Twin<'_> {
    /// Remembers the blocks of `bytes`, which stand at `at` in the file.
    pub(super) fn note(&self, at: u64, bytes: &[u8]) {
        let Some(number) = self.number else { return };
        let mut hashes = Vec::with_capacity(bytes.len() / BLOCK);
        for (i, block) in bytes.chunks_exact(BLOCK).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                hashes.push((hash(block), at / BLOCK as u64 + i as u64));
            }
        }
        let mut index = self.twins.index.lock();
        for (hash, block) in hashes {
            let Ok(block) = u32::try_from(block) else {
                break;
            };
            if hash & index.mask != 0 {
                continue;
            }
            index.blocks.entry(hash).or_insert((number, block));
            if index.blocks.len() >= ENTRIES_MAX {
                index.mask = index.mask << 1 | 1;
                let mask = index.mask;
                index.blocks.retain(|hash, _| hash & mask == 0);
            }
        }
    }

    /// Shares with `file`, in which `bytes` are to stand at `at`, what other files have of them.
    /// `wanted` tells of each block whether it is to be written, and is told of those that need
    /// not be any more.
    pub(super) fn share(
        &self,
        file: &File,
        at: u64,
        bytes: &[u8],
        wanted: &mut [bool],
    ) -> Result<u64> {
        let mut shared = 0;
        let mut tried: Vec<(u32, i64, i64)> = Vec::new();
        let blocks = bytes.len() / BLOCK;
        let mut i = 0;
        while i < blocks && tried.len() < TRIES_MAX {
            if !wanted[i] {
                i += 1;
                continue;
            }
            let hash = hash(&bytes[i * BLOCK..(i + 1) * BLOCK]);
            let found = {
                let index = self.twins.index.lock();
                let found = index.blocks.get(&hash).copied();
                found.and_then(|(number, block)| {
                    let file = index.files.get(number as usize)?;
                    let (block, window) = (i64::from(block), i64::from(block) / WINDOW_BLOCKS);
                    Some(((number, block - i as i64, window), file.clone()))
                })
            };
            if let Some((place, source)) = found
                && !tried.contains(&place)
            {
                tried.push(place);
                let (_, start, window) = place;
                let window = window * WINDOW_BLOCKS..(window + 1) * WINDOW_BLOCKS;
                shared += compare((&source, start, window), file, at, bytes, wanted)?;
            }
            i += 1;
        }
        Ok(shared)
    }
}

/// Shares the blocks that are equal, if block 0 of `bytes` is block `start` of `source`, of which only
/// some blocks count.
fn compare(
    (source, start, within): (&File, i64, Range<i64>),
    file: &File,
    at: u64,
    bytes: &[u8],
    wanted: &mut [bool],
) -> Result<u64> {
    // I2: of `bytes`, the blocks that lie in that window of the source.
    let first = (within.start - start).max(0) as usize;
    let blocks = (bytes.len() / BLOCK).min((within.end - start).max(0) as usize);
    let skip = first.min(blocks);
    let from = (start + skip as i64).max(0) as u64 * BLOCK as u64;
    let mut other = vec![0; (blocks - skip) * BLOCK];
    let mut got = 0;
    while got < other.len() {
        let read = source.read_at(&mut other[got..], from + got as u64);
        match read.map_err(|error| Error::io("cannot read what was imported", error))? {
            0 => break,
            read => got += read,
        }
    }
    let equal = |i: usize| {
        let there = (i - skip) * BLOCK;
        there + BLOCK <= got && bytes[i * BLOCK..(i + 1) * BLOCK] == other[there..there + BLOCK]
    };
    let (mut shared, mut i) = (0, skip);
    while i < blocks {
        let mut end = i;
        while end < blocks && wanted[end] && equal(end) {
            end += 1;
        }
        if end > i {
            let (mut done, len) = (0, ((end - i) * BLOCK) as u64);
            let (theirs, ours) = (from + ((i - skip) * BLOCK) as u64, at + (i * BLOCK) as u64);
            while done < len {
                let copied =
                    files::copy_range(source, theirs + done, file, ours + done, len - done);
                match copied.map_err(|error| Error::io("cannot write to the pool", error))? {
                    0 => return Ok(shared), // it is shorter than it was: write the rest
                    copied => done += copied,
                }
            }
            wanted[i..end].fill(false);
            shared += len;
        }
        i = end.max(i + 1);
    }
    Ok(shared)
}
