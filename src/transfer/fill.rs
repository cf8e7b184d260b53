//! Puts the contents of one layer into a file: only what the layer holds is read, and only what the
//! file does not have already is written.
//!
//! Invariants:
//!
//! 1. Memory is bounded: each worker has two buffers of [`WINDOW`] bytes.
//! 2. Ranges that are zero become holes, whether a map, a hole of the source or the bytes say so.
//! 3. Buffers begin at a page: a write of [`WINDOW`] bytes past the page cache is then one request
//!    of whole blocks. From anywhere else it touches one page more than a request may have, and the
//!    kernel divides it in the middle of a block.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::error::{Error, Result};
use crate::formats::{Content, Layer, Run};
use crate::sync::Mutex;
use crate::sys::files;
use crate::sys::memory::Aligned;

use super::twins::Twin;

/// Bytes that one worker handles at a time: a megabyte is a large request for any disk.
pub(super) const WINDOW: u64 = 1 << 20;
/// Unit in which the file is compared and written: a block of the pool.
const BLOCK: usize = 4096;
/// A block without data.
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filled {
    /// Bytes that the layer holds, zeros included where it stores them.
    pub read: u64,
    /// Bytes that were written.
    pub written: u64,
    /// Bytes that were found in other files and shared.
    pub shared: u64,
}

impl Filled {
    /// Counts `other` as well.
    pub fn add(&mut self, other: Self) {
        self.read += other.read;
        self.written += other.written;
        self.shared += other.shared;
    }
}

/// What a layer holds of its disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Bytes of data.
    pub data: u64,
    /// Bytes that it says are zero.
    pub zero: u64,
}

/// Walks over the map of a layer.
///
/// # Errors
/// As [`Layer::run`].
pub fn held(layer: &dyn Layer) -> Result<Held> {
    let size = layer.facts().size;
    let (mut held, mut at) = (Held::default(), 0);
    while at < size {
        let run = run(layer, at, size - at)?;
        match run.content {
            Content::Absent => {}
            Content::Zero => held.zero += run.len,
            Content::Data { .. } | Content::Packed => held.data += run.len,
        }
        at += run.len;
    }
    Ok(held)
}

/// The run at `offset`, in which holes of the source are zeros.
fn run(layer: &dyn Layer, offset: u64, most: u64) -> Result<Run> {
    let run = layer.run(offset, most)?;
    let Content::Data { source, at } = run.content else {
        return Ok(run);
    };
    let (data, len) = layer.sources()[source].data(at, run.len)?;
    Ok(Run {
        len,
        content: if data { run.content } else { Content::Zero },
    })
}

/// The next piece of work.
#[derive(Debug)]
enum Piece {
    /// Part of a window.
    Mix(u64, u64),
    /// Zeros over a parent's data, in whole windows.
    Clear(u64, u64),
}

/// Where the next piece begins.
struct Cursor<'a> {
    layer: &'a dyn Layer,
    over: bool,
    at: u64,
}

impl Cursor<'_> {
    fn next(&mut self) -> Result<Option<Piece>> {
        let size = self.layer.facts().size;
        while self.at < size {
            let run = run(self.layer, self.at, size - self.at)?;
            let (start, end) = (self.at, self.at + run.len);
            match run.content {
                Content::Zero if self.over && start.is_multiple_of(WINDOW) && run.len >= WINDOW => {
                    self.at = if end == size {
                        end
                    } else {
                        end / WINDOW * WINDOW
                    };
                    return Ok(Some(Piece::Clear(start, self.at - start)));
                }
                Content::Zero if self.over => {}
                Content::Absent | Content::Zero => {
                    self.at = end;
                    continue;
                }
                Content::Data { .. } | Content::Packed => {}
            }
            self.at = ((start / WINDOW + 1) * WINDOW).min(size);
            let from = start / BLOCK as u64 * BLOCK as u64;
            return Ok(Some(Piece::Mix(from, self.at - from)));
        }
        Ok(None)
    }
}

/// Puts what `layer` holds into `file`, which has the size of the disk. `over`: the file has the
/// contents of the parent; else it is a hole. `twin`: what other files have is shared with them.
/// `workers` read and write at once. `progress` is told of bytes as they are done.
///
/// # Errors
/// `Corrupt` and `Io` of the layer; `NoSpace` and `Io` of the file, whose contents are then nothing
/// in particular.
pub fn fill(
    layer: &dyn Layer,
    file: &File,
    over: bool,
    twin: Option<&Twin<'_>>,
    workers: usize,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Filled> {
    let cursor = Mutex::new(Cursor { layer, over, at: 0 });
    let failure = Mutex::new(None);
    let total = Mutex::new(Filled::default());
    let work = || {
        let mut worker = Worker {
            layer,
            file,
            over,
            twin,
            new: Aligned::new(WINDOW as usize),
            old: Aligned::new(if over { WINDOW as usize } else { 0 }),
        };
        while failure.lock().is_none() {
            let piece = cursor.lock().next();
            let done = match piece {
                Ok(None) => return,
                Ok(Some(Piece::Mix(at, len))) => worker.mix(at, len),
                Ok(Some(Piece::Clear(at, len))) => {
                    let cleared = files::punch(file, at, len).map_err(cannot_write);
                    cleared.map(|()| Filled::default())
                }
                Err(error) => Err(error),
            };
            match done {
                Ok(done) => {
                    total.lock().add(done);
                    progress(done.read);
                }
                Err(error) => {
                    failure.lock().get_or_insert(error);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..workers {
            scope.spawn(work);
        }
        work();
    });
    match failure.lock().take() {
        Some(error) => Err(error),
        None => Ok(*total.lock()),
    }
}

struct Worker<'a> {
    layer: &'a dyn Layer,
    file: &'a File,
    over: bool,
    twin: Option<&'a Twin<'a>>,
    new: Aligned,
    old: Aligned,
}

impl Worker<'_> {
    /// Brings a part of a window up to date; it begins at a block.
    fn mix(&mut self, at: u64, len: u64) -> Result<Filled> {
        let count = len as usize;
        if self.over {
            self.read_old(at, count)?;
            let new = self.new.bytes_mut(count);
            new.copy_from_slice(self.old.bytes(count));
        }
        let read = self.overlay(at, count)?;
        let (written, shared) = self.write(at, count)?;
        Ok(Filled {
            read,
            written,
            shared,
        })
    }

    /// What the file has, which is shorter only at its end.
    fn read_old(&mut self, at: u64, count: usize) -> Result<()> {
        let mut done = 0;
        // Whole blocks are asked for: direct reads take nothing else.
        let wanted = count.next_multiple_of(BLOCK).min(self.old.len());
        let old = self.old.bytes_mut(wanted);
        while done < count {
            let got = self
                .file
                .read_at(&mut old[done..], at + done as u64)
                .map_err(|source| Error::io("cannot read the parent's contents", source))?;
            if got == 0 {
                break;
            }
            done += got;
        }
        if done < count {
            old[done..count].fill(0);
        }
        Ok(())
    }

    /// Puts the layer's own contents into the buffer, and zeros where neither it nor a parent has
    /// any. Neighbours are read in one go.
    fn overlay(&mut self, at: u64, count: usize) -> Result<u64> {
        let (end, mut pos, mut read) = (at + count as u64, at, 0);
        let new = self.new.bytes_mut(count);
        while pos < end {
            let mut one = run(self.layer, pos, end - pos)?;
            let start = (pos - at) as usize;
            if is_data(one.content) {
                while pos + one.len < end {
                    let next = run(self.layer, pos + one.len, end - pos - one.len)?;
                    if !is_data(next.content) {
                        break;
                    }
                    one.len += next.len;
                }
                let part = &mut new[start..start + one.len as usize];
                self.layer.read(pos, part)?;
                read += one.len;
            } else if one.content == Content::Zero || !self.over {
                new[start..start + one.len as usize].fill(0);
            }
            pos += one.len;
        }
        Ok(read)
    }

    /// Writes the blocks that differ from what the file has, and returns how many bytes; and how
    /// many were shared instead.
    fn write(&self, at: u64, count: usize) -> Result<(u64, u64)> {
        let new = self.new.bytes(count);
        let same = |from: usize| {
            let to = (from + BLOCK).min(count);
            if self.over {
                new[from..to] == self.old.bytes(count)[from..to]
            } else {
                new[from..to] == ZEROS[..to - from]
            }
        };
        let mut wanted: Vec<bool> = (0..count).step_by(BLOCK).map(|from| !same(from)).collect();
        let shared = match self.twin {
            Some(twin) => twin.share(self.file, at, new, &mut wanted),
            None => 0,
        };
        let (mut written, mut i) = (0, 0);
        while i < wanted.len() {
            let run = wanted[i..].iter().take_while(|wanted| **wanted).count();
            if run > 0 {
                let (from, to) = (i * BLOCK, ((i + run) * BLOCK).min(count));
                self.file
                    .write_all_at(&new[from..to], at + from as u64)
                    .map_err(cannot_write)?;
                written += (to - from) as u64;
            }
            i += run.max(1);
        }
        if let Some(twin) = self.twin {
            twin.note(at, new);
        }
        Ok((written, shared))
    }
}

fn is_data(content: Content) -> bool {
    matches!(content, Content::Data { .. } | Content::Packed)
}

fn cannot_write(source: std::io::Error) -> Error {
    Error::io("cannot write to the pool", source)
}
