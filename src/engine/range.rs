//! Operations on ranges and whole files: truncate, punch, clone, and where data and holes are.

use std::ops::ControlFlow;

use crate::error::{Error, Kind, Result};
use crate::ondisk::inode::{FILE_SIZE_MAX, FLAG_PINNED, Inode};
use crate::ondisk::record::Record;
use crate::units::{BLOCK_SIZE, Ino, Time};

use super::apply::{attr_of, blocks_of, load};
use super::file::{Attempt, staged};
use super::meta::Meta;
use super::pool::Pool;
use super::share::{STEP_EXTENTS, Share};
use super::stage::{BLOCK_COST, Stage, StageFile, Staged, record_cost};
use super::types::{Attr, FileUsage, Origin};

const B: u64 = BLOCK_SIZE as u64;
/// Holes smaller than this are reported as data: a copy in pieces then has fewer of them, and a
/// reader loses little. 64 KiB.
const HOLE_MIN: u64 = 16; // blocks

/// A block with part of it changed, to be staged together with the record that needs it.
type Edge = (u64, Staged);

impl Pool {
    /// Sets the size; what is cut off is freed, what is added reads as zeros.
    ///
    /// # Errors
    /// `TooLarge` above the largest file size.
    pub fn truncate(&self, ino: Ino, size: u64, now: Time) -> Result<Attr> {
        if size > FILE_SIZE_MAX {
            return Err(Error::new(
                Kind::TooLarge,
                format!("file is too large: ino={ino}"),
            ));
        }
        self.begin_change()?;
        self.settle(ino)?;
        self.with_space(|| {
            let _gate = self.gate.read();
            let _owned = self.own_file(ino);
            if self.is_pinned(ino)? {
                return Ok(Attempt::Pinned(ino)); // begun since `settle`
            }
            let old = self.attr(ino)?.size;
            let mut edges = Vec::new();
            if size < old && !size.is_multiple_of(B) {
                edges.extend(self.edge(ino, size, (size / B + 1) * B)?);
            }
            self.change(
                ino,
                edges,
                vec![Record::Truncate { ino, size, now }],
                Vec::new(),
            )
        })?;
        self.attr(ino)
    }

    /// Makes a range read as zeros and frees its whole blocks. The size stays.
    ///
    /// # Errors
    /// `NoSpace` only if an edge of the range lies within a block that must be written.
    pub fn punch(&self, ino: Ino, offset: u64, len: u64, now: Time) -> Result<()> {
        self.begin_change()?;
        self.settle(ino)?;
        if offset >= FILE_SIZE_MAX {
            return Ok(()); // nothing can be there
        }
        self.with_space(|| {
            let _gate = self.gate.read();
            let _owned = self.own_file(ino);
            if self.is_pinned(ino)? {
                return Ok(Attempt::Pinned(ino));
            }
            let size = self.attr(ino)?.size;
            // Whole blocks behind the end may be freed as well: they hold nothing.
            let end = offset.saturating_add(len);
            let end = if end >= size {
                blocks_of(size).max(offset.div_ceil(B)) * B
            } else {
                end
            };
            if offset >= end {
                return Ok(Attempt::Done(()));
            }
            let (first, last) = (offset.div_ceil(B), end / B);
            let mut edges = Vec::new();
            if !offset.is_multiple_of(B) {
                edges.extend(self.edge(ino, offset, end.min(first * B))?);
            }
            if !end.is_multiple_of(B) && last >= first {
                edges.extend(self.edge(ino, last * B, end)?);
            }
            let (block, count) = (first, last.saturating_sub(first));
            self.change(
                ino,
                edges,
                vec![Record::Punch {
                    ino,
                    block,
                    count,
                    now,
                }],
                Vec::new(),
            )
        })
    }

    fn is_pinned(&self, ino: Ino) -> Result<bool> {
        Ok(self.meta.read().file(ino)?.flags & FLAG_PINNED != 0)
    }

    /// The block that holds `from` to `to` (bytes, within one block) with zeros there, unless it
    /// reads like that already.
    fn edge(&self, ino: Ino, from: u64, to: u64) -> Result<Option<Edge>> {
        let block = from / B;
        let mut bytes = self.read_block(ino, block)?;
        let part = &mut bytes[(from - block * B) as usize..(to - block * B) as usize];
        if crate::ondisk::is_zero(part) {
            return Ok(None);
        }
        part.fill(0);
        Ok(Some((block, staged(&bytes))))
    }

    /// Stages the blocks `first`, does `records`, and stages the blocks `last`, all in one
    /// instant. The caller owns the file.
    fn change(
        &self,
        ino: Ino,
        first: Vec<Edge>,
        records: Vec<Record>,
        last: Vec<Edge>,
    ) -> Result<Attempt<()>> {
        let edges = (first.len() + last.len()) as u64;
        self.counters.reserve_for_freeing(edges)?;
        let mut meta = self.meta.write();
        let inode = match meta.file(ino) {
            Ok(inode) => inode,
            Err(error) => {
                self.counters.unreserve(edges);
                return Err(error);
            }
        };
        let mut stage = self.stage.lock();
        let cost = records.iter().map(record_cost).sum::<usize>() + edges as usize * BLOCK_COST;
        if !stage.has_room(cost, self.limits.pending_bytes) {
            self.counters.unreserve(edges);
            return Ok(Attempt::QueueFull);
        }
        if edges > 0 {
            stage.open(ino, attr_of(&inode));
        }
        for (block, staged) in first {
            stage.put(ino, block, staged);
        }
        for record in records {
            self.apply_or_poison(&mut meta, &mut stage, &record)?;
            stage.push(record);
        }
        for (block, staged) in last {
            stage.put(ino, block, staged);
        }
        Ok(Attempt::Done(()))
    }

    /// Makes `dst`, an existing regular file, a clone of `src` as of this instant, contents and
    /// size. O(log n). Of `dst`'s old contents nothing is left.
    ///
    /// # Errors
    /// `Invalid` if both are one file.
    pub fn clone_file(&self, src: Ino, dst: Ino, now: Time) -> Result<()> {
        self.clone_as(src, dst, None, now)
    }

    /// Begins a clone in pieces, for an empty `dst`: pins `src` as of now; `dst` shows the first
    /// `size` bytes. [`extend_clone`](Self::extend_clone) shows more;
    /// [`end_clone`](Self::end_clone), any other change of `dst`, or a crash ends it, and drops
    /// what is not shown. A `size` that is no multiple of the block size ends it at once.
    ///
    /// # Errors
    /// As [`clone_file`](Self::clone_file).
    pub fn begin_clone(&self, src: Ino, dst: Ino, size: u64, now: Time) -> Result<()> {
        self.clone_as(src, dst, Some(size), now)
    }

    fn clone_as(&self, src: Ino, dst: Ino, shown: Option<u64>, now: Time) -> Result<()> {
        self.begin_change()?;
        if src == dst {
            return Err(Error::new(
                Kind::Invalid,
                format!("a file cannot be a clone of itself: ino={src}"),
            ));
        }
        self.with_space(|| {
            let _gate = self.gate.read();
            let _owned = self.own_files(src, dst);
            self.destage_file(src)?;
            self.check_room()?;
            let whole = self.attr(src)?.size;
            let size = shown.map_or(whole, |shown| shown.min(whole));
            let edge = if size < whole {
                self.edge(src, size, size.next_multiple_of(B))?
            } else {
                None
            };
            let source = self.meta.read().file(src)?;
            let pinned = shown.is_some() && size.is_multiple_of(B);
            let mut records = vec![Record::Clone {
                src,
                dst,
                size,
                pinned,
                now,
            }];
            // What lies behind the end of the source, or will never be shown.
            let hidden = if pinned {
                blocks_of(whole)
            } else {
                blocks_of(size)
            };
            if source.flags & FLAG_PINNED != 0 || !pinned && size < whole {
                let count = u64::MAX - hidden;
                records.push(Record::Punch {
                    ino: dst,
                    block: hidden,
                    count,
                    now,
                });
            }
            self.change(dst, Vec::new(), records, edge.into_iter().collect())
        })
    }

    /// Shows `dst`, a clone in pieces, up to `size` bytes. A `size` that is no multiple of the
    /// block size ends it. False if it is no clone in pieces (any more), or shows more already:
    /// nothing was done.
    pub fn extend_clone(&self, dst: Ino, size: u64, now: Time) -> Result<bool> {
        self.begin_change()?;
        self.with_space(|| {
            let _gate = self.gate.read();
            let _owned = self.own_file(dst);
            let inode = self.meta.read().file(dst)?;
            let shown = self.attr(dst)?.size;
            if inode.flags & FLAG_PINNED == 0 || size < shown || size > FILE_SIZE_MAX {
                return Ok(Attempt::Done(false));
            }
            let mut records = vec![Record::Show { dst, size, now }];
            let mut edges = Vec::new();
            if !size.is_multiple_of(B) {
                records.push(Record::EndClone { dst });
                edges.extend(self.hidden_edge(dst, size)?);
            }
            Ok(match self.change(dst, Vec::new(), records, edges)? {
                Attempt::Done(()) => Attempt::Done(true),
                Attempt::QueueFull => Attempt::QueueFull,
                Attempt::Pinned(ino) => Attempt::Pinned(ino),
            })
        })
    }

    /// Ends a clone in pieces and drops what was not shown. Does nothing if there is none.
    pub fn end_clone(&self, dst: Ino) -> Result<()> {
        self.begin_change()?;
        self.with_space(|| {
            let _gate = self.gate.read();
            let _owned = self.own_file(dst);
            if self.meta.read().file(dst)?.flags & FLAG_PINNED == 0 {
                return Ok(Attempt::Done(()));
            }
            self.change(dst, Vec::new(), vec![Record::EndClone { dst }], Vec::new())
        })
    }

    /// The last block of what `size` bytes show, with zeros behind them, unless it is like that.
    fn hidden_edge(&self, ino: Ino, size: u64) -> Result<Option<Edge>> {
        let mut bytes = Vec::new();
        self.read_shown(ino, size / B * B, BLOCK_SIZE, &mut bytes, true)?;
        bytes.resize(BLOCK_SIZE, 0);
        let tail = &mut bytes[(size % B) as usize..];
        if crate::ondisk::is_zero(tail) {
            return Ok(None);
        }
        tail.fill(0);
        Ok(Some((size / B, staged(&bytes))))
    }

    /// Shares a range of `src` with `dst` (whole blocks where both offsets allow; edges and odd
    /// offsets are copied). Both may be one file if the ranges do not overlap. Returns the bytes
    /// done: less than `len` only at the end of `src`.
    ///
    /// # Errors
    /// `Invalid` for overlapping ranges of one file.
    pub fn clone_range(
        &self,
        src: Ino,
        src_offset: u64,
        dst: Ino,
        dst_offset: u64,
        len: u64,
        now: Time,
    ) -> Result<u64> {
        self.begin_change()?;
        self.settle(dst)?;
        let len = len.min(self.attr(src)?.size.saturating_sub(src_offset));
        let fits = dst_offset
            .checked_add(len)
            .is_some_and(|end| end <= FILE_SIZE_MAX);
        if !fits {
            return Err(Error::new(
                Kind::TooLarge,
                format!("file is too large: ino={dst}"),
            ));
        }
        if src == dst && src_offset < dst_offset + len && dst_offset < src_offset + len && len > 0 {
            return Err(Error::new(
                Kind::Invalid,
                "the ranges of a copy within a file overlap",
            ));
        }
        if src_offset % B != dst_offset % B {
            return self.copy_bytes(src, src_offset, dst, dst_offset, len, now);
        }
        let head = ((B - src_offset % B) % B).min(len);
        self.copy_bytes(src, src_offset, dst, dst_offset, head, now)?;
        let (src_at, dst_at, left) = (src_offset + head, dst_offset + head, len - head);
        let mut done = 0;
        loop {
            let (from, to) = (src_at + done, dst_at + done);
            let step = self.share_blocks(src, from, dst, to, left - done, now)?;
            done += step;
            if step == 0 || done == left {
                break;
            }
            self.begin_change()?;
        }
        let tail = left - done;
        let copied = self.copy_bytes(src, src_at + done, dst, dst_at + done, tail, now)?;
        Ok(head + done + copied)
    }

    /// Shares the whole blocks of a range that begins on block borders; also its last, partial
    /// one, if that is the last of the source and becomes the last of the destination. Returns
    /// the bytes done: as many as one step takes, 0 if there are no whole blocks.
    fn share_blocks(
        &self,
        src: Ino,
        src_at: u64,
        dst: Ino,
        dst_at: u64,
        len: u64,
        now: Time,
    ) -> Result<u64> {
        let share = |meta: &mut Meta, stage: &mut Stage, inode: &Inode| {
            let size = load(meta, stage, src)?.size;
            // Both sizes as of now: nobody writes to either file.
            let ends = src_at + len == size && dst_at + len >= load(meta, stage, dst)?.size;
            let len = len.min(size.saturating_sub(src_at));
            let count = if ends { len.div_ceil(B) } else { len / B };
            if count == 0 {
                return Ok(Attempt::Done(0));
            }
            let (block, dst_block) = (src_at / B, dst_at / B);
            let range = Share {
                block,
                dst_block,
                count,
            };
            let shared = self.share_some(meta, stage, (src, dst), &range, STEP_EXTENTS)?;
            let Some((count, _)) = shared else {
                return Ok(Attempt::QueueFull);
            };
            stage.open(dst, attr_of(inode));
            let done = len.min(count * B);
            super::file::grow_and_touch(stage, dst, dst_at + done, now);
            Ok(Attempt::Done(done))
        };
        self.with_space(|| self.with_files(src, dst, share))
    }

    /// Copies bytes where blocks cannot be shared.
    fn copy_bytes(
        &self,
        src: Ino,
        src_offset: u64,
        dst: Ino,
        dst_offset: u64,
        len: u64,
        now: Time,
    ) -> Result<u64> {
        let mut done = 0;
        let mut bytes = Vec::new();
        while done < len {
            bytes.clear();
            let step = (len - done).min(1024 * 1024) as usize;
            self.read(src, src_offset + done, step, &mut bytes)?;
            if bytes.is_empty() {
                break;
            }
            self.write(dst, dst_offset + done, &bytes, now)?;
            done += bytes.len() as u64;
        }
        Ok(done)
    }

    /// Where a clone came from.
    pub fn origin(&self, ino: Ino) -> Result<Option<Origin>> {
        let inode = self.meta.read().inode(ino)?;
        Ok((inode.origin != 0).then_some(Origin {
            ino: Ino(inode.origin),
            generation: inode.origin_generation,
            time: inode.origin_time,
        }))
    }

    /// Offset of the first data at or behind `offset`. Holes smaller than 64 KiB count as data.
    ///
    /// # Errors
    /// `NoSuchOffset` if there is none.
    pub fn seek_data(&self, ino: Ino, offset: u64) -> Result<u64> {
        self.seek(ino, offset, true)
    }

    /// Offset of the first hole at or behind `offset`; the end of the file is one.
    ///
    /// # Errors
    /// `NoSuchOffset` behind the end.
    pub fn seek_hole(&self, ino: Ino, offset: u64) -> Result<u64> {
        self.seek(ino, offset, false)
    }

    fn seek(&self, ino: Ino, offset: u64, data: bool) -> Result<u64> {
        let none = || Error::new(Kind::NoSuchOffset, "nothing lies behind this offset");
        let meta = self.meta.read();
        let stage = self.stage.lock();
        let inode = load(&meta, &stage, ino)?;
        if offset >= inode.size {
            return Err(none());
        }
        let blocks = blocks_of(inode.size);
        // Joins mapped and staged runs into pieces of data, in order, from the offset on.
        let mut walk = DataWalk::new(&stage, ino, offset / B, blocks);
        let mut found = None;
        meta.mapped(inode.root, offset / B, blocks, &mut |part| {
            found = walk.run(part.at, part.end(), data);
            if found.is_some() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })?;
        let found = found.or_else(|| walk.finish(data));
        match found {
            Some(block) => Ok((block * B).clamp(offset, inode.size)),
            None if data => Err(none()),
            None => Ok(inode.size),
        }
    }

    /// What one file uses, alone and with others. O(extents that are not shared).
    pub fn file_usage(&self, ino: Ino) -> Result<FileUsage> {
        let _gate = self.gate.read();
        let meta = self.meta.read();
        let (inode, staged) = {
            let stage = self.stage.lock();
            let staged = stage.file(ino).map_or(0, StageFile::blocks);
            (load(&meta, &stage, ino)?, staged)
        };
        let (exclusive, extents) = meta.exclusive(inode.root)?;
        Ok(FileUsage {
            size: inode.size,
            mapped: inode.mapped * B,
            exclusive: (exclusive + staged) * B,
            extents,
        })
    }
}

/// Looks for data or a hole in a file while its mapped runs pass by.
struct DataWalk {
    /// Staged blocks that hold data, and those that are zeros, still to come.
    staged: Vec<(u64, bool)>,
    /// End of the data seen so far; begins at the offset asked for.
    at: u64,
    blocks: u64,
}

impl DataWalk {
    fn new(stage: &Stage, ino: Ino, start: u64, blocks: u64) -> Self {
        let range = stage
            .file(ino)
            .map(|file| file.range(start, blocks))
            .unwrap_or_default();
        let mut staged: Vec<_> = range
            .into_iter()
            .map(|(at, staged)| (at, staged.data.is_some()))
            .collect();
        staged.reverse();
        Self {
            staged,
            at: start,
            blocks,
        }
    }

    /// A mapped run. Staged zeros within it are small holes, and so data.
    fn run(&mut self, from: u64, to: u64, data: bool) -> Option<u64> {
        while let Some(&(at, real)) = self.staged.last()
            && at < from
        {
            self.staged.pop();
            if real && let Some(found) = self.piece(at, at + 1, data) {
                return Some(found);
            }
        }
        self.piece(from, to, data)
    }

    /// A piece of data; answers if it or the hole before it is what is looked for.
    fn piece(&mut self, from: u64, to: u64, data: bool) -> Option<u64> {
        if data {
            // Exact, also behind a small hole: the answer must not depend on where in the hole one asks.
            return Some(from);
        }
        if from.saturating_sub(self.at) >= HOLE_MIN {
            return Some(self.at);
        }
        self.at = self.at.max(to);
        None
    }

    fn finish(&mut self, data: bool) -> Option<u64> {
        while let Some((at, real)) = self.staged.pop() {
            if real && let Some(found) = self.piece(at, at + 1, data) {
                return Some(found);
            }
        }
        // The hole at the end, however small, is one if blocks are left.
        (!data).then_some(self.at.min(self.blocks))
    }
}
