//! Image files as verbs use them: opened with their extents and parents, and their holes.
//!
//! Invariants:
//!
//! 1. Extents and parents are found as by an import, and only below the directory of the image and
//!    those that the user allows; nothing but regular files is opened.
//! 2. What a guest can write never decides the format: where names and contents disagree, or
//!    nothing says what a parent is, the image is refused.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nodupe::control::{self, EXTENTS_MAX, Look, Request, Response, Token};
use nodupe::error::{Error, Kind, Result};
use nodupe::formats::chain::Chain;
use nodupe::formats::{FileSource, Format, Source, probe};
use nodupe::sys::block;
use nodupe::transfer::{Library, What};
use nodupe::units::BLOCK_SIZE;

const B: u64 = BLOCK_SIZE as u64;
/// How long a token is used: it works for a minute.
const TOKEN_AGE: Duration = Duration::from_secs(20);

/// A file of an image.
#[derive(Debug)]
pub(super) struct ImageFile {
    pub(super) file: File,
    pub(super) source: Arc<dyn Source>,
    /// Device of the file system: one mounted pool has one.
    pub(super) device: u64,
    /// It is in a pool, whose daemon tells where data is.
    pooled: Option<Arc<Pooled>>,
    /// What was told of its data: in blocks, of a file in a pool, else in bytes.
    told: RefCell<Told>,
}

/// Where a file has data: the ranges within a part of it. A range is first and count in blocks, of
/// a file in a pool, else start and end in bytes.
#[derive(Debug, Default)]
struct Told {
    within: Range<u64>,
    ranges: Vec<(u64, u64)>,
}

/// An image with its files.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) chain: Chain,
    pub(super) files: Vec<ImageFile>,
}

impl Image {
    /// Opens `path` with its parents, which may be below its directory and those of `allowed`.
    /// `format`: not looked for.
    pub(super) fn open(path: &Path, format: Option<Format>, allowed: &[PathBuf]) -> Result<Self> {
        let mut library = Library::new();
        for dir in allowed {
            library.allow(dir)?;
        }
        library.add_file(path, format)?;
        library.resolve();
        match library.images().first().map(|image| &image.what) {
            Some(What::Disk) => {}
            None => return Err(refused("it is no disk image")),
            Some(_) => {
                return Err(refused(
                    "it is an archive of disks: import it, nodupe import",
                ));
            }
        }
        if !library.images()[0].wanted {
            return Err(refused(
                "it is a part of another image beside it: name that, or say what this is: --from",
            ));
        }
        let mut files = Vec::new();
        let chain = library.disk_through(0, &mut |file| {
            let file = ImageFile::new(file)?;
            let source = file.source.clone();
            files.push(file);
            Ok(source)
        })?;
        Ok(Self { chain, files })
    }

    /// The file behind a source of the chain, if it is one.
    pub(super) fn file(&self, source: &Arc<dyn Source>) -> Option<usize> {
        self.files
            .iter()
            .position(|file| std::ptr::addr_eq(Arc::as_ptr(&file.source), Arc::as_ptr(source)))
    }

    /// The first range with data of a source within a range.
    pub(super) fn data(
        &self,
        source: &Arc<dyn Source>,
        range: Range<u64>,
    ) -> Result<Option<Range<u64>>> {
        match self.file(source) {
            Some(index) => self.files[index].data(range),
            None => Ok(Some(range)),
        }
    }
}

/// A format by the name that QEMU or a user gives it.
pub(super) fn named(name: &str) -> Result<Format> {
    Ok(match name.to_ascii_lowercase().as_str() {
        "raw" | "img" => Format::Raw,
        "vhd" | "vpc" => Format::Vhd,
        "vhdx" => Format::Vhdx,
        "vmdk" => Format::Vmdk,
        "qcow2" => Format::Qcow2,
        "vdi" => Format::Vdi,
        _ => {
            return Err(Error::new(
                Kind::Unsupported,
                format!("no format {name:?}: choose raw, vhd, vhdx, vmdk, qcow2 or vdi"),
            ));
        }
    })
}

/// The format that the name of a file stands for.
pub(super) fn by_name(path: &Path) -> Option<Format> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    match extension.as_str() {
        "raw" | "img" | "iso" => Some(Format::Raw),
        "vpc" => None,
        other => named(other).ok(),
    }
}

/// The format of a file whose name ends in that of `path`.
pub(super) fn choose(source: &dyn Source, path: &Path) -> Result<Format> {
    probe::choose(source, path.extension().and_then(OsStr::to_str))
}

fn refused(what: &str) -> Error {
    Error::new(Kind::Invalid, what)
}

impl ImageFile {
    fn new(file: File) -> Result<Self> {
        let failed = |error| Error::io("cannot look at a file of the image", error);
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(refused("it is no regular file"));
        }
        let bytes = Arc::new(FileSource::new(file.try_clone().map_err(failed)?)?);
        let pooled = Arc::new(Pooled {
            bytes: bytes.clone(),
            file: file.try_clone().map_err(failed)?,
            token: Mutex::default(),
        });
        let is_pooled = pooled.token().is_ok();
        Ok(Self {
            device: metadata.dev(),
            file,
            source: match is_pooled {
                true => pooled.clone(),
                false => bytes,
            },
            pooled: is_pooled.then_some(pooled),
            told: RefCell::default(),
        })
    }

    /// True if it is in a mounted pool.
    pub(super) fn is_pooled(&self) -> bool {
        self.pooled.is_some()
    }

    /// What names it to the daemon.
    pub(super) fn token(&self) -> Result<Token> {
        let pooled = self.pooled.as_ref();
        pooled.map_or_else(
            || Err(refused("it is in no mounted pool")),
            |file| file.token(),
        )
    }

    /// The first range with data within a range.
    fn data(&self, range: Range<u64>) -> Result<Option<Range<u64>>> {
        let found = if self.is_pooled() {
            self.data_in_pool(&range)?
        } else {
            self.data_by_seek(&range)?
        };
        Ok(found
            .map(|found| found.start.max(range.start)..found.end.min(range.end))
            .filter(|found| found.start < found.end))
    }

    fn data_by_seek(&self, range: &Range<u64>) -> Result<Option<Range<u64>>> {
        let failed = |error| Error::io("cannot find the holes of an image", error);
        let told = self.told.borrow().ranges.first().copied();
        // One range is remembered: it is asked for piece by piece.
        if let Some((start, end)) = told
            && self.told.borrow().within.contains(&range.start)
        {
            if start < range.end {
                return Ok(Some(start..end));
            }
            return Ok(None);
        }
        let Some(start) = block::seek_data(&self.file, range.start).map_err(failed)? else {
            return Ok(None);
        };
        let end = block::seek_hole(&self.file, start).map_err(failed)?;
        let end = end.unwrap_or(self.source.len());
        *self.told.borrow_mut() = Told {
            within: range.start..end,
            ranges: vec![(start, end)],
        };
        Ok((start < range.end).then_some(start..end))
    }

    fn data_in_pool(&self, range: &Range<u64>) -> Result<Option<Range<u64>>> {
        let (mut from, to) = (range.start / B, range.end.div_ceil(B));
        while from < to {
            if !self.told.borrow().within.contains(&from) {
                // All of the file from here on: the answer has a limit of its own.
                let end = self.source.len().div_ceil(B).max(to);
                let look = Look {
                    from,
                    to: end,
                    other: None,
                };
                let request = Request::Extents(look);
                let Response::Extents(found) = control::call(self.file.as_fd(), &request)? else {
                    return Err(nonsense());
                };
                if found.next <= from {
                    return Err(nonsense());
                }
                *self.told.borrow_mut() = Told {
                    within: from..found.next,
                    ranges: found.ranges,
                };
            }
            let told = self.told.borrow();
            let index = told
                .ranges
                .partition_point(|(start, count)| start + count <= from);
            if let Some((start, count)) = told.ranges.get(index) {
                let data = (*start).max(from);
                return Ok((data < to).then(|| data * B..(start + count) * B));
            }
            from = told.within.end;
        }
        Ok(None)
    }
}

/// A file in a pool, whose daemon knows which blocks are the same without reading them. That holds
/// as long as what was read of the file does: until somebody writes it.
#[derive(Debug)]
struct Pooled {
    bytes: Arc<FileSource>,
    file: File,
    /// One is used for all: a user has few, and a new one takes the place of the oldest.
    token: Mutex<Option<(Token, Instant)>>,
}

impl Pooled {
    fn token(&self) -> Result<Token> {
        let mut slot = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((token, given)) = *slot
            && given.elapsed() < TOKEN_AGE
        {
            return Ok(token);
        }
        let Response::Token(token) = control::call(self.file.as_fd(), &Request::Token)? else {
            return Err(nonsense());
        };
        *slot = Some((token, Instant::now()));
        Ok(token)
    }
}

impl Source for Pooled {
    fn len(&self) -> u64 {
        self.bytes.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.bytes.read_at(offset, buf)
    }

    fn data(&self, offset: u64, most: u64) -> Result<(bool, u64)> {
        self.bytes.data(offset, most)
    }

    fn repeats(&self, offset: u64, len: u64, stride: u64) -> Result<u64> {
        let (block, step) = (offset / B, stride / B);
        let end = (self.len() / B).saturating_sub(step);
        if !(offset.is_multiple_of(B) && stride.is_multiple_of(B))
            || len != B
            || step == 0
            || block >= end
        {
            return Ok(0);
        }
        // As far as one answer can reach if all between the repetitions differs, as data does.
        let most = step.saturating_mul(EXTENTS_MAX as u64);
        let look = Look {
            from: block,
            to: end.min(block.saturating_add(most)),
            other: Some((self.token()?, block + step)),
        };
        let Response::Extents(told) = control::call(self.file.as_fd(), &Request::Extents(look))?
        else {
            return Err(nonsense());
        };
        // Where the file is not what it is one step further.
        let mut differing = told.ranges.iter().peekable();
        let (mut at, mut count) = (block, 0);
        while at < told.next {
            while differing.next_if(|range| range.0 + range.1 <= at).is_some() {}
            if differing.peek().is_some_and(|range| range.0 <= at) {
                break;
            }
            (at, count) = (at + step, count + 1);
        }
        Ok(count)
    }
}

fn nonsense() -> Error {
    Error::new(
        Kind::Io,
        "the daemon of the datastore answers nonsense: use the same version of nodupe for both",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use nodupe::formats::layout::{Ids, Parent, Plan, Shape, Sink, Spec};
    use std::fs;

    /// Keeps headers and tables.
    struct Bytes(Vec<u8>);

    impl Sink for Bytes {
        fn bytes(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
            self.0[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
            Ok(())
        }

        fn repeat(&mut self, _: u64, _: u64, _: u64) -> Result<()> {
            Ok(())
        }

        fn payload(&mut self, _: u64, _: u64, _: u64) -> Result<()> {
            Ok(())
        }
    }

    /// An image without data.
    fn empty(shape: Shape, parent: Option<Parent>) -> Vec<u8> {
        let spec = Spec {
            shape,
            size: 1 << 20,
            sector: 512,
            ids: Ids::random().unwrap(),
            seconds: 0,
            name: "x".into(),
            parent,
        };
        let plan = Plan::new(&spec, &Vec::new()).unwrap();
        let mut sink = Bytes(vec![0; plan.len() as usize]);
        plan.files[0].emit(plan.size, &mut sink).unwrap();
        sink.0
    }

    fn refused(path: &Path) -> String {
        Image::open(path, None, &[]).unwrap_err().to_string()
    }

    #[test]
    fn a_name_does_not_make_a_raw_disk_of_another_format() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        fs::write(&path, empty(Shape::Qcow2, None)).unwrap();
        let image = Image::open(&path, None, &[]).unwrap();
        assert_eq!(image.chain.layers()[0].facts().format, Format::Qcow2);
        let image = Image::open(&path, Some(Format::Raw), &[]).unwrap();
        assert_eq!(image.chain.layers()[0].facts().format, Format::Raw);
        let path = dir.path().join("a.raw");
        fs::write(&path, empty(Shape::Qcow2, None)).unwrap();
        let told = refused(&path);
        assert!(
            told.contains("--from raw") && told.contains("--from qcow2"),
            "{told}"
        );
    }

    #[test]
    fn a_backing_file_of_no_stored_format_is_not_guessed() {
        let dir = tempfile::tempdir().unwrap();
        let parent = Parent {
            name: "gold.img".into(),
            absolute: None,
            identity: None,
            version: None,
            format: Format::Raw,
        };
        let mut child = empty(Shape::Qcow2, Some(parent));
        let path = dir.path().join("child.qcow2");
        let gold = dir.path().join("gold.img");
        fs::write(&gold, empty(Shape::Qcow2, None)).unwrap();
        fs::write(&path, &child).unwrap();
        let image = Image::open(&path, None, &[]).unwrap();
        assert_eq!(image.chain.layers()[1].facts().format, Format::Raw);
        // An extension of the header that nobody knows, instead of the format.
        child[104..108].copy_from_slice(&[1; 4]);
        fs::write(&path, &child).unwrap();
        let told = refused(&path);
        assert!(told.contains("rebase"), "{told}");
        fs::write(&gold, vec![0; 1 << 20]).unwrap();
        assert_eq!(
            Image::open(&path, None, &[]).unwrap().chain.layers().len(),
            2
        );
    }
    #[test]
    fn an_image_names_neither_a_link_that_leads_out_nor_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (home, path) = (dir.path().join("home"), dir.path().join("home/child.qcow2"));
        fs::create_dir(&home).unwrap();
        let parent = Parent {
            name: "gold.img".into(),
            absolute: None,
            identity: None,
            version: None,
            format: Format::Raw,
        };
        fs::write(&path, empty(Shape::Qcow2, Some(parent))).unwrap();
        let (outside, gold) = (dir.path().join("outside"), home.join("gold.img"));
        fs::write(&outside, vec![0; 1 << 20]).unwrap();
        std::os::unix::fs::symlink(&outside, &gold).unwrap();
        assert!(refused(&path).contains("leads out"));
        fs::remove_file(&gold).unwrap();
        fs::create_dir(&gold).unwrap();
        assert!(refused(&path).contains("no regular file"));
        fs::remove_dir(&gold).unwrap();
        assert!(
            refused(&path).contains("gold.img"),
            "it says what is missing"
        );
    }
}
