//! Writes a planned file into a mounted pool by sharing blocks: only tables are written, and what
//! cannot be shared because its offsets differ within 4 KiB.
//!
//! Invariants:
//!
//! 1. What is to be shared is asked for in as few requests as its regularity allows.
//! 2. A range is repeated only after the bytes that it repeats were written.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nodupe::control::{self, GROUPS_MAX, Request, SHARES_MAX, Shares};
use nodupe::engine::Share;
use nodupe::error::{Error, Result};
use nodupe::formats::layout::{Held, Piece, Place, Sink};
use nodupe::ondisk::is_zero;
use nodupe::units::BLOCK_SIZE;

use super::image::Image;

const B: u64 = BLOCK_SIZE as u64;
/// Bytes that are copied at once where they cannot be shared.
const STEP: u64 = 1 << 20;

/// Ranges that wait to be shared, from one source.
#[derive(Debug, Default)]
struct Waiting {
    groups: Vec<Shares>,
    total: u64,
}

impl Waiting {
    fn add(&mut self, share: Share) {
        self.total += 1;
        if let Some(last) = self.groups.last_mut() {
            let step = (
                share.block.checked_sub(last.first.block),
                share.dst_block.checked_sub(last.first.dst_block),
            );
            if let (Some(step), Some(dst_step)) = step
                && share.count == last.first.count
            {
                if last.times == 1 {
                    last.times = 2;
                    last.steps = (step, dst_step);
                    return;
                }
                if step == last.times * last.steps.0 && dst_step == last.times * last.steps.1 {
                    last.times += 1;
                    return;
                }
            }
        }
        self.groups.push(Shares {
            first: share,
            times: 1,
            steps: (0, 0),
        });
    }

    fn is_full(&self) -> bool {
        self.groups.len() >= GROUPS_MAX || self.total >= SHARES_MAX
    }
}

/// How much was shared, and how much had to be copied, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) shared: u64,
    pub(super) copied: u64,
    /// Headers and tables.
    pub(super) tables: u64,
}

/// A file in the pool that is being made.
pub(super) struct Sharing<'a> {
    pub(super) image: &'a Image,
    pub(super) held: &'a Held<'a>,
    /// It has its length already.
    pub(super) dst: &'a File,
    /// Device of the destination: what is elsewhere is copied.
    pub(super) device: u64,
    pub(super) counts: Counts,
    /// By number of the source's file; `None`: the destination itself.
    waiting: HashMap<Option<usize>, Waiting>,
}

impl<'a> Sharing<'a> {
    pub(super) fn new(
        image: &'a Image,
        held: &'a Held<'a>,
        dst: &'a File,
        device: u64,
        counts: Counts,
    ) -> Self {
        Self {
            image,
            held,
            dst,
            device,
            counts,
            waiting: HashMap::new(),
        }
    }

    /// Does what still waits.
    pub(super) fn finish(mut self) -> Result<Counts> {
        let sources: Vec<Option<usize>> = self.waiting.keys().copied().collect();
        for source in sources {
            self.flush(source)?;
        }
        Ok(self.counts)
    }

    fn flush(&mut self, source: Option<usize>) -> Result<()> {
        let Some(waiting) = self.waiting.remove(&source) else {
            return Ok(());
        };
        let token = match source {
            Some(index) => Some(self.image.files[index].token()?),
            None => None,
        };
        let request = Request::Share {
            source: token,
            ranges: waiting.groups,
        };
        control::call(self.dst.as_fd(), &request).map(drop)
    }

    fn share(&mut self, source: Option<usize>, share: Share) -> Result<()> {
        let waiting = self.waiting.entry(source).or_default();
        waiting.add(share);
        if waiting.is_full() {
            self.flush(source)?;
        }
        Ok(())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.dst
            .write_all_at(bytes, at)
            .map_err(|error| Error::io("cannot write the new image", error))
    }

    /// Copies a part of the disk through memory.
    fn copy(&mut self, at: u64, disk: u64, len: u64) -> Result<()> {
        let mut done = 0;
        while done < len {
            let step = (len - done).min(STEP);
            let mut bytes = vec![0; step as usize];
            self.held.chain.read(disk + done, &mut bytes)?;
            if !is_zero(&bytes) {
                self.write(at + done, &bytes)?;
                self.counts.copied += step;
            }
            done += step;
        }
        Ok(())
    }

    /// The file of a piece, and where in it, if its blocks can be shared.
    fn shareable(&self, piece: &Piece, at: u64) -> Option<(usize, u64)> {
        let Place::At(source, from) = &piece.place else {
            return None;
        };
        let index = self.image.file(source)?;
        let file = &self.image.files[index];
        let fits = file.is_pooled() && file.device == self.device && from % B == at % B;
        fits.then_some((index, *from))
    }

    /// Places one piece, whose bytes go to `at`.
    fn place(&mut self, piece: &Piece, at: u64) -> Result<()> {
        let Some((index, from)) = self.shareable(piece, at) else {
            return self.copy(at, piece.disk, piece.len);
        };
        let head = ((B - at % B) % B).min(piece.len);
        let whole = (piece.len - head) / B * B;
        let tail = piece.len - head - whole;
        if head > 0 {
            self.copy(at, piece.disk, head)?;
        }
        if whole > 0 {
            let share = Share {
                block: (from + head) / B,
                dst_block: (at + head) / B,
                count: whole / B,
            };
            self.share(Some(index), share)?;
            self.counts.shared += whole;
        }
        if tail > 0 {
            let done = head + whole;
            self.copy(at + done, piece.disk + done, tail)?;
        }
        Ok(())
    }
}

impl Sink for Sharing<'_> {
    fn bytes(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        // Tables of a sparse disk are mostly zeros: runs of blocks that are not.
        let mut start = 0;
        while start < bytes.len() {
            let block = |from: usize| &bytes[from..bytes.len().min(from + BLOCK_SIZE)];
            let mut end = start;
            while end < bytes.len() && !is_zero(block(end)) {
                end = bytes.len().min(end + BLOCK_SIZE);
            }
            if end > start {
                self.write(at + start as u64, &bytes[start..end])?;
                self.counts.tables += (end - start) as u64;
                start = end;
            } else {
                start = bytes.len().min(start + BLOCK_SIZE);
            }
        }
        Ok(())
    }

    fn repeat(&mut self, at: u64, from: u64, len: u64) -> Result<()> {
        let share = Share {
            block: from / B,
            dst_block: at / B,
            count: len / B,
        };
        self.share(None, share)
    }

    fn payload(&mut self, at: u64, disk: u64, len: u64) -> Result<()> {
        let (mut from, to) = (disk, disk + len);
        while let Some(mut piece) = self.held.piece(from, to)? {
            piece.len = piece.len.min(to - piece.disk);
            from = piece.disk + piece.len;
            // Neighbours on the disk and in their file are one piece.
            while from < to
                && let Place::At(source, start) = &piece.place
                && let Some(next) = self.held.piece(from, to)?
                && next.disk == from
                && let Place::At(other, next_start) = &next.place
                && *next_start == start + piece.len
                && std::ptr::addr_eq(
                    std::sync::Arc::as_ptr(source),
                    std::sync::Arc::as_ptr(other),
                )
            {
                piece.len += next.len.min(to - from);
                from = piece.disk + piece.len;
            }
            self.place(&piece, at + piece.disk - disk)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_regular_is_one_group() {
        let mut waiting = Waiting::default();
        for i in 0..1000 {
            waiting.add(Share {
                block: i * 512,
                dst_block: 2 + i * 513,
                count: 512,
            });
        }
        assert_eq!(waiting.groups.len(), 1);
        assert_eq!(waiting.groups[0].times, 1000);
        let last = waiting.groups[0].each().last().unwrap();
        assert_eq!((last.block, last.dst_block), (999 * 512, 2 + 999 * 513));
        // A shorter one ends the group.
        waiting.add(Share {
            block: 1000 * 512,
            dst_block: 2 + 1000 * 513,
            count: 1,
        });
        assert_eq!(waiting.groups.len(), 2);
    }
}
