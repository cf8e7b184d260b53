//! Bytes of image files: the only way in which codecs read, and a small cache for their tables.
//!
//! Invariants:
//!
//! 1. A read is whole or an error: what lies behind the end of a file is never taken for zeros.
//! 2. [`Pages`] holds at most `PAGES_MAX` pages, whatever the tables claim.

use std::fmt;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::sync::Mutex;
use lru::LruCache;

use super::broken;
use crate::error::{Error, Result};
use crate::sys::files;

/// Bytes at offsets.
pub trait Source: Send + Sync + fmt::Debug {
    /// Length in bytes.
    fn len(&self) -> u64;

    /// True if it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `Corrupt` if it reaches behind the end; `Io`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Whether data stands at `offset`, and for how many bytes, at most `most`, it is alike: a
    /// hole reads as zeros and need not be read. A source that does not know says data.
    ///
    /// # Errors
    /// `Io`.
    fn data(&self, _offset: u64, most: u64) -> Result<(bool, u64)> {
        Ok((true, most))
    }

    /// How many times the `len` bytes at `offset` stand there again, each time `stride` bytes
    /// further, as far as that is known without reading them. A source that does not know says 0.
    ///
    /// # Errors
    /// `Io`.
    fn repeats(&self, _offset: u64, _len: u64, _stride: u64) -> Result<u64> {
        Ok(0)
    }
}

/// An open file. Its length is that of the moment it was opened.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    len: u64,
}

impl FileSource {
    /// Reads from `file`, which the caller opened and found to be a regular file or a disk.
    ///
    /// # Errors
    /// `Io` if its length cannot be found.
    pub fn new(file: File) -> Result<Self> {
        use std::io::{Seek, SeekFrom};
        let len = (&file)
            .seek(SeekFrom::End(0))
            .map_err(|source| Error::io("cannot find the length of an image", source))?;
        Ok(Self { file, len })
    }
}

impl Source for FileSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.len, offset, buf.len() as u64)?;
        self.file
            .read_exact_at(buf, offset)
            .map_err(|source| Error::io(format!("cannot read an image: offset={offset}"), source))
    }

    fn data(&self, offset: u64, most: u64) -> Result<(bool, u64)> {
        let failed = |source| Error::io("cannot look for holes in an image", source);
        let end = offset + most;
        match files::seek_data(&self.file, offset).map_err(failed)? {
            None => Ok((false, most)),
            Some(data) if data > offset => Ok((false, data.min(end) - offset)),
            Some(_) => {
                let hole = files::seek_hole(&self.file, offset).map_err(failed)?;
                Ok((true, hole.clamp(offset + 1, end) - offset))
            }
        }
    }
}

/// A part of another source: a member of an archive.
#[derive(Debug)]
pub struct Part {
    source: Arc<dyn Source>,
    start: u64,
    len: u64,
}

impl Part {
    /// `len` bytes of `source` from `start`.
    ///
    /// # Errors
    /// `Corrupt` if they reach behind its end.
    pub fn new(source: Arc<dyn Source>, start: u64, len: u64) -> Result<Self> {
        check_range(source.len(), start, len)?;
        Ok(Self { source, start, len })
    }
}

impl Source for Part {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.len, offset, buf.len() as u64)?;
        self.source.read_at(self.start + offset, buf)
    }

    fn data(&self, offset: u64, most: u64) -> Result<(bool, u64)> {
        self.source.data(self.start + offset, most)
    }
}

/// Bytes in memory: headers that were put together, and tests.
impl Source for Vec<u8> {
    fn len(&self) -> u64 {
        self.as_slice().len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(Source::len(self), offset, buf.len() as u64)?;
        buf.copy_from_slice(&self[offset as usize..][..buf.len()]);
        Ok(())
    }
}

/// Fails if a range is not within `len` bytes.
pub(crate) fn check_range(len: u64, offset: u64, count: u64) -> Result<()> {
    match offset.checked_add(count) {
        Some(end) if end <= len => Ok(()),
        _ => Err(broken(format!(
            "something lies behind the end of the image: offset={offset} bytes={count} length={len}"
        ))),
    }
}

/// Reads `count` bytes that the caller has found to be few.
pub(crate) fn read_vec(source: &dyn Source, offset: u64, count: usize) -> Result<Vec<u8>> {
    check_range(source.len(), offset, count as u64)?;
    let mut bytes = vec![0; count];
    source.read_at(offset, &mut bytes)?;
    Ok(bytes)
}

/// Fails if two tables, each with offset and length in bytes, lie upon each other: a small file could
/// then describe a huge disk, by naming one table over and over.
pub(crate) fn check_tables_apart(tables: &mut [(u64, u32)]) -> Result<()> {
    tables.sort_unstable();
    let overlap = |pair: &&[(u64, u32)]| pair[0].0 + u64::from(pair[0].1) > pair[1].0;
    match tables.windows(2).find(overlap) {
        None => Ok(()),
        Some(pair) => Err(broken(format!(
            "a table of the image is named twice, or two lie upon each other: offset={}",
            pair[1].0
        ))),
    }
}

/// Bytes of one page.
pub(super) const PAGE: u64 = 4096;
/// Pages kept: 1 MiB.
const PAGES_MAX: NonZeroUsize = NonZeroUsize::new(256).expect("256 is not zero");

/// Tables of an image, read by pages as they are needed.
pub struct Pages {
    source: Arc<dyn Source>,
    cache: Mutex<LruCache<u64, Arc<Vec<u8>>>>,
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pages({:?})", self.source)
    }
}

impl Pages {
    /// Tables of `source`.
    pub fn new(source: Arc<dyn Source>) -> Self {
        Self {
            source,
            cache: Mutex::new(LruCache::new(PAGES_MAX)),
        }
    }

    /// Length of the source in bytes.
    pub fn len(&self) -> u64 {
        self.source.len()
    }

    /// True if the source has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf`, a few bytes, from `offset`.
    ///
    /// # Errors
    /// `Corrupt` behind the end; `Io`.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.len(), offset, buf.len() as u64)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let page = self.page(at / PAGE)?;
            let skip = (at % PAGE) as usize;
            let len = (page.len() - skip).min(buf.len() - done);
            buf[done..done + len].copy_from_slice(&page[skip..skip + len]);
            done += len;
        }
        Ok(())
    }

    fn page(&self, number: u64) -> Result<Arc<Vec<u8>>> {
        if let Some(page) = self.cache.lock().get(&number) {
            return Ok(page.clone());
        }
        let len = (self.len() - number * PAGE).min(PAGE) as usize;
        let page = Arc::new(read_vec(&*self.source, number * PAGE, len)?);
        self.cache.lock().put(number, page.clone());
        Ok(page)
    }

    /// A big-endian number of 4 bytes.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn u32_be(&self, offset: u64) -> Result<u32> {
        let mut raw = [0; 4];
        self.read(offset, &mut raw)?;
        Ok(u32::from_be_bytes(raw))
    }

    /// A little-endian number of 4 bytes.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn u32_le(&self, offset: u64) -> Result<u32> {
        let mut raw = [0; 4];
        self.read(offset, &mut raw)?;
        Ok(u32::from_le_bytes(raw))
    }

    /// A big-endian number of 8 bytes.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn u64_be(&self, offset: u64) -> Result<u64> {
        let mut raw = [0; 8];
        self.read(offset, &mut raw)?;
        Ok(u64::from_be_bytes(raw))
    }

    /// A little-endian number of 8 bytes.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn u64_le(&self, offset: u64) -> Result<u64> {
        let mut raw = [0; 8];
        self.read(offset, &mut raw)?;
        Ok(u64::from_le_bytes(raw))
    }
}
