//! Blocks of images that were imported earlier in the same run, and of files that were in the pool
//! before, by their checksum: where equal contents can be shared instead of written again.
//!
//! Invariants:
//!
//! 1. A checksum only says where to look: bytes are compared before they are shared.
//! 2. What is compared changes no more, so that what is shared is what was compared. Of an image
//!    that is being imported only windows that are complete are in the index. A file that was in the
//!    pool before is looked at as it is now, in a clone without a name.
//! 3. Memory is bounded: at [`ENTRIES_MAX`] entries every second checksum is forgotten and no longer
//!    taken. Runs of equal blocks are found by those that are left.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Result;
use crate::ondisk::crc32c;
use crate::sync::Mutex;
use crate::sys::files;

/// Unit that is shared: a block of the pool.
const BLOCK: usize = 4096;
/// Most entries, which stand for 12 GiB: with what a map needs beside them about 80 MiB.
const ENTRIES_MAX: usize = 3 << 20;
/// Blocks of a window of [`fill`](super::fill()).
const WINDOW_BLOCKS: i64 = super::fill::WINDOW as i64 / BLOCK as i64;
/// Most images, and clones of files of the pool, that are open for this.
const OPEN_MAX: usize = 512;
/// Most files of the pool.
const KNOWN_MAX: usize = 1 << 20;
/// Most places that are compared with one window.
const TRIES_MAX: usize = 8;

/// Makes a clone without a name of a file of the pool.
pub type CloneFile<'a> = Box<dyn Fn(&Path) -> Result<File> + Send + Sync + 'a>;

#[derive(Debug)]
enum Source {
    /// It changes no more (I2).
    Open(Arc<File>),
    /// It was in the pool before.
    Known(PathBuf),
    /// It is gone or damaged, or nobody may read it.
    Unusable,
}

#[derive(Debug, Default)]
struct Index {
    files: Vec<Source>,
    open: usize,
    /// Number of the file, and the block in it.
    blocks: HashMap<u32, (u32, u32)>,
    /// Only checksums without these bits are kept.
    mask: u32,
}

impl Index {
    fn insert(&mut self, sum: u32, file: u32, block: u64) {
        let Ok(block) = u32::try_from(block) else {
            return;
        };
        if sum & self.mask != 0 {
            return;
        }
        self.blocks.entry(sum).or_insert((file, block));
        if self.blocks.len() >= ENTRIES_MAX {
            self.mask = self.mask << 1 | 1;
            let mask = self.mask;
            self.blocks.retain(|sum, _| sum & mask == 0); // I3
        }
    }
}

/// The index.
pub struct Twins<'a> {
    index: Mutex<Index>,
    clone: CloneFile<'a>,
}

impl fmt::Debug for Twins<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Twins({} blocks)", self.index.lock().blocks.len())
    }
}

/// A file of the index that is being written.
#[derive(Clone, Debug)]
pub struct Twin<'a> {
    twins: &'a Twins<'a>,
    number: Option<u32>,
}

impl<'a> Twins<'a> {
    /// An empty index. `clone` is asked for files of the pool when something of them may be equal.
    pub fn new(clone: CloneFile<'a>) -> Self {
        Self {
            index: Mutex::default(),
            clone,
        }
    }

    /// Adds a file that is being imported, as long as there is room.
    pub fn add<'b>(&'b self, file: &Arc<File>) -> Twin<'b> {
        let mut index = self.index.lock();
        let number = (index.open < OPEN_MAX).then(|| {
            index.open += 1;
            index.files.push(Source::Open(file.clone()));
            index.files.len() as u32 - 1
        });
        Twin {
            twins: self,
            number,
        }
    }

    /// Adds a file of the pool, as long as there is room. Returns its number.
    pub fn add_known(&self, path: PathBuf) -> Option<u32> {
        let mut index = self.index.lock();
        (index.files.len() < KNOWN_MAX).then(|| {
            index.files.push(Source::Known(path));
            index.files.len() as u32 - 1
        })
    }

    /// Adds a block of a file of the pool, by its checksum (CRC-32C).
    pub fn learn(&self, number: u32, block: u64, sum: u32) {
        self.index.lock().insert(sum, number, block);
    }

    /// Where a block with this checksum may be, and what to read of it.
    fn find(&self, sum: u32) -> Option<(u32, i64, Arc<File>)> {
        let (number, block, path) = {
            let index = self.index.lock();
            let (number, block) = *index.blocks.get(&sum)?;
            let block = i64::from(block);
            match index.files.get(number as usize)? {
                Source::Open(file) => return Some((number, block, file.clone())),
                Source::Known(_) if index.open >= OPEN_MAX => return None,
                Source::Known(path) => (number, block, path.clone()),
                Source::Unusable => return None,
            }
        };
        let cloned = (self.clone)(&path);
        let mut index = self.index.lock();
        if let Some(Source::Open(file)) = index.files.get(number as usize) {
            return Some((number, block, file.clone())); // somebody else was quicker
        }
        let file = match cloned {
            Ok(file) => Arc::new(file),
            Err(error) => {
                log::debug!("nothing is shared with {}: {error}", path.display());
                index.files[number as usize] = Source::Unusable;
                return None;
            }
        };
        index.open += 1;
        index.files[number as usize] = Source::Open(file.clone());
        Some((number, block, file))
    }

    /// Looks into a file no more, because it cannot be read or shared.
    fn give_up(&self, number: u32, error: &io::Error) {
        let mut index = self.index.lock();
        let Some(source) = index.files.get_mut(number as usize) else {
            return;
        };
        if matches!(std::mem::replace(source, Source::Unusable), Source::Open(_)) {
            index.open = index.open.saturating_sub(1);
        }
        drop(index);
        log::debug!("nothing is shared with file {number}: {error}");
    }
}

impl Twin<'_> {
    /// Remembers the blocks of `bytes`, which stand at `at` in the file.
    pub(super) fn note(&self, at: u64, bytes: &[u8]) {
        let Some(number) = self.number else { return };
        let mut sums = Vec::with_capacity(bytes.len() / BLOCK);
        for (i, block) in bytes.chunks_exact(BLOCK).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                sums.push((crc32c(block), at / BLOCK as u64 + i as u64));
            }
        }
        let mut index = self.twins.index.lock();
        for (sum, block) in sums {
            index.insert(sum, number, block);
        }
    }

    /// Shares with `file`, in which `bytes` are to stand at `at`, what other files have of them.
    /// `wanted` tells of each block whether it is to be written, and is told of those that need
    /// not be any more. Other files that are damaged have nothing that is equal: whatever cannot be
    /// shared is to be written.
    pub(super) fn share(&self, file: &File, at: u64, bytes: &[u8], wanted: &mut [bool]) -> u64 {
        let mut shared = 0;
        let mut tried: Vec<(u32, i64, i64)> = Vec::new();
        let blocks = bytes.len() / BLOCK;
        let mut i = 0;
        while i < blocks && tried.len() < TRIES_MAX {
            if !wanted[i] {
                i += 1;
                continue;
            }
            let found = self.twins.find(crc32c(&bytes[i * BLOCK..(i + 1) * BLOCK]));
            let found = found.map(|(number, block, file)| {
                ((number, block - i as i64, block / WINDOW_BLOCKS), file)
            });
            if let Some((place, source)) = found
                && !tried.contains(&place)
            {
                tried.push(place);
                let (number, start, window) = place;
                let window = window * WINDOW_BLOCKS..(window + 1) * WINDOW_BLOCKS;
                let from = (&*source, start, window);
                if let Err(error) = compare(from, file, at, bytes, wanted, &mut shared) {
                    self.twins.give_up(number, &error);
                }
            }
            i += 1;
        }
        shared
    }
}

/// Shares the blocks that are equal, if block 0 of `bytes` is block `start` of `source`, of which only
/// some blocks count, and adds their bytes to `shared`.
fn compare(
    (source, start, within): (&File, i64, Range<i64>),
    file: &File,
    at: u64,
    bytes: &[u8],
    wanted: &mut [bool],
    shared: &mut u64,
) -> io::Result<()> {
    // I2: of `bytes`, the blocks that lie in that window of the source.
    let first = (within.start - start).max(0) as usize;
    let blocks = (bytes.len() / BLOCK).min((within.end - start).max(0) as usize);
    let skip = first.min(blocks);
    let from = (start + skip as i64).max(0) as u64 * BLOCK as u64;
    let mut other = vec![0; (blocks - skip) * BLOCK];
    let mut got = 0;
    while got < other.len() {
        match source.read_at(&mut other[got..], from + got as u64)? {
            0 => break,
            read => got += read,
        }
    }
    let equal = |i: usize| {
        let there = (i - skip) * BLOCK;
        there + BLOCK <= got && bytes[i * BLOCK..(i + 1) * BLOCK] == other[there..there + BLOCK]
    };
    let mut i = skip;
    while i < blocks {
        let mut end = i;
        while end < blocks && wanted[end] && equal(end) {
            end += 1;
        }
        if end > i {
            let (mut done, len) = (0, ((end - i) * BLOCK) as u64);
            let (theirs, ours) = (from + ((i - skip) * BLOCK) as u64, at + (i * BLOCK) as u64);
            while done < len {
                match files::copy_range(source, theirs + done, file, ours + done, len - done)? {
                    0 => return Ok(()), // it is shorter than it was: write the rest
                    copied => done += copied,
                }
            }
            wanted[i..end].fill(false);
            *shared += len;
        }
        i = end.max(i + 1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_be_read_or_shared_is_not_looked_into_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("there");
        let bytes = vec![7; 2 * BLOCK];
        std::fs::write(&path, &bytes).unwrap();
        let new = dir.path().join("new");
        std::fs::write(&new, &bytes).unwrap();
        // Neither can be read from and written to at once: one fails to be read, one to be shared.
        for (source_reads, target_writes) in [(false, true), (true, false)] {
            let opened = |path: &Path, reads: bool| {
                let mut options = File::options();
                options.read(reads).write(!reads).open(path).unwrap()
            };
            let twins = Twins::new(Box::new(move |path| Ok(opened(path, source_reads))));
            let known = twins.add_known(path.clone()).unwrap();
            for block in 0..2 {
                twins.learn(known, block, crc32c(&bytes[..BLOCK]));
            }
            let file = Arc::new(opened(&new, !target_writes));
            let twin = twins.add(&file);
            let mut wanted = [true; 2];
            assert_eq!(twin.share(&file, 0, &bytes, &mut wanted), 0);
            assert_eq!(wanted, [true; 2]);
            let index = twins.index.lock();
            assert!(matches!(index.files[known as usize], Source::Unusable));
            assert_eq!(index.open, 1);
        }
    }
}
