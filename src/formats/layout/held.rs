//! What a chain of images holds: its maps, and the holes of the files below them.
//!
//! Invariants:
//!
//! 1. What is told as held covers everything that does not read as zeros.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::{ALIGN, Map};
use crate::error::Result;
use crate::formats::chain::Chain;
use crate::formats::{Content, Source};

/// Tells the first range with data of a file within a range; `None`: a hole to the end of it.
pub type Holes<'a> = &'a dyn Fn(&Arc<dyn Source>, Range<u64>) -> Result<Option<Range<u64>>>;

/// Where a piece of a disk is.
#[derive(Clone, Debug)]
pub enum Place {
    /// As it is, at an offset in a file.
    At(Arc<dyn Source>, u64),
    /// To be unpacked: the chain reads it.
    Packed,
}

/// A piece of a disk.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Offset on the disk.
    pub disk: u64,
    /// Length in bytes, at least 1.
    pub len: u64,
    /// Where it is.
    pub place: Place,
}

/// A chain of images with the holes of its files.
pub struct Held<'a> {
    /// The images.
    pub chain: &'a Chain,
    /// The holes.
    pub holes: Holes<'a>,
}

impl fmt::Debug for Held<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Held({:?})", self.chain)
    }
}

impl Held<'_> {
    /// The first piece that is held between two offsets of the disk.
    ///
    /// # Errors
    /// As those of the images and their files.
    pub fn piece(&self, from: u64, to: u64) -> Result<Option<Piece>> {
        let to = to.min(self.chain.size());
        let mut disk = from;
        while disk < to {
            let (layer, run) = self.chain.run(disk, to - disk)?;
            let len = run.len;
            match run.content {
                Content::Zero | Content::Absent => {}
                Content::Packed => {
                    let place = Place::Packed;
                    return Ok(Some(Piece { disk, len, place }));
                }
                Content::Data { source, at } => {
                    let source = &self.chain.layers()[layer].sources()[source];
                    if let Some(data) = (self.holes)(source, at..at + len)? {
                        return Ok(Some(Piece {
                            disk: disk + (data.start - at),
                            len: data.end - data.start,
                            place: Place::At(source.clone(), data.start),
                        }));
                    }
                }
            }
            disk += len;
        }
        Ok(None)
    }
}

impl Map for Held<'_> {
    fn next(&self, from: u64) -> Result<Option<Range<u64>>> {
        let size = self.chain.size();
        Ok(self.piece(from, size)?.map(|piece| {
            let end = (piece.disk + piece.len).next_multiple_of(ALIGN).min(size);
            let start = piece.disk - piece.disk % ALIGN;
            start.max(from)..end
        }))
    }
}
