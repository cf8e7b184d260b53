//! The part of scrub that reads data: every block in use that is no node, in the order of the
//! pool, in pieces of up to 1 MiB.
//!
//! What is known of a window of blocks is looked up at once and may be out of date when they are
//! read; so a block that does not match is looked at again, pinned, before it counts.

use std::collections::HashMap;

use crate::error::{Kind, Result};
use crate::ondisk::extent::{Extent, SUMS_LEN, SUMS_PER_RECORD, decode_refs_run};
use crate::ondisk::node::{Node, TreeKind};
use crate::ondisk::{crc32c, get_u32};
use crate::sync::Instant;
use crate::units::BLOCK_SIZE;

use super::super::meta::Meta;
use super::super::nodes::Quiet;
use super::walk::read_block;
use super::{B, Run};

/// Blocks looked up at once: 16 MiB, about what one node of each tree describes.
const WINDOW: u64 = 4096;
/// Blocks read at once: 1 MiB.
const PIECE: u64 = 256;
/// Unused blocks that are read along rather than begin a new read: 32 KiB.
const GAP: u64 = 8;

/// What the trees say about some blocks.
struct Window {
    /// Runs in use, first and end.
    runs: Vec<(u64, u64)>,
    /// Records of checksums by their keys.
    sums: HashMap<u64, [u8; SUMS_LEN]>,
    /// The first block behind it.
    end: u64,
}

impl Window {
    fn sum(&self, block: u64) -> Option<u32> {
        let record = self.sums.get(&(block / SUMS_PER_RECORD))?;
        Some(get_u32(record, (block % SUMS_PER_RECORD) as usize * 4))
    }

    /// Blocks in use.
    fn used(&self) -> u64 {
        self.runs.iter().map(|run| run.1 - run.0).sum()
    }

    /// The runs joined or cut to what is read at once.
    fn pieces(&self) -> Vec<(u64, u64)> {
        let mut pieces: Vec<(u64, u64)> = Vec::new();
        for &(start, end) in &self.runs {
            let mut at = start;
            while at < end {
                if let Some(last) = pieces.last_mut()
                    && at - last.1 <= GAP
                    && at - last.0 < PIECE
                {
                    last.1 = end.min(last.0 + PIECE);
                    at = last.1;
                    continue;
                }
                pieces.push((at, end.min(at + PIECE)));
                at = end.min(at + PIECE);
            }
        }
        pieces
    }
}

impl Run<'_> {
    /// Reads all data from the position on. False if it should stop.
    pub(super) fn read_data(&mut self) -> Result<bool> {
        loop {
            // The pool may have grown.
            let (first, end) = {
                let sb = self.pool.superblock.lock();
                (sb.first_block(), sb.end_block())
            };
            let start = self.kept.position.max(first);
            if start >= end {
                return Ok(true);
            }
            let window = match self.window(start, end) {
                Ok(window) => window,
                Err(error) if error.kind() == Kind::Corrupt => {
                    let to = (start + WINDOW).min(end);
                    self.scrub.other(format!(
                        "data was not verified, because which blocks are in use cannot be read: block={start} to={to}: {error}"
                    ));
                    Window {
                        runs: Vec::new(),
                        sums: HashMap::new(),
                        end: to,
                    }
                }
                Err(error) => return Err(error),
            };
            for (from, to) in window.pieces() {
                if !self.goes_on() {
                    return Ok(false);
                }
                let began = Instant::now();
                self.read_piece(&window, from, to)?;
                self.pause((to - from) * B, began);
            }
            self.kept.position = window.end;
            self.kept.done += window.used();
            let (position, done) = (self.kept.position * B, self.kept.done * B);
            self.scrub.update(|status| {
                status.position = position;
                status.done = done;
                status.total = status.total.max(done);
            });
            if !self.name_in_time()? {
                return Ok(false);
            }
            self.save_in_time();
            if !self.goes_on() {
                return Ok(false);
            }
        }
    }

    /// What the trees say about the next blocks from `start` on.
    fn window(&self, start: u64, end: u64) -> Result<Window> {
        let _quiet = Quiet::begin();
        let meta = self.pool.meta.read();
        let (count, until) = meta.refcount_run(start, end)?;
        let start = if count == 0 { until } else { start };
        let end = end.min((start / WINDOW + 1) * WINDOW).max(start);
        let mut window = Window {
            runs: used_runs(&meta, start, end)?,
            sums: HashMap::new(),
            end,
        };
        let (first, last) = (start / SUMS_PER_RECORD, end.div_ceil(SUMS_PER_RECORD));
        let mut note = |key: u128, value: &[u8]| {
            let mut record = [0; SUMS_LEN];
            record.copy_from_slice(value);
            window.sums.insert(key as u64, record);
            Ok(true)
        };
        let (from, to) = (u128::from(first), u128::from(last));
        let scanned = meta.scan(meta.sums, TreeKind::Sums, from, to, &mut note);
        if scanned.is_err() {
            // One by one: those of a damaged node stay unknown, and their blocks cannot be read.
            for key in first..last {
                if let Ok(Some(value)) = meta.get(meta.sums, TreeKind::Sums, u128::from(key)) {
                    note(u128::from(key), &value)?;
                }
            }
        }
        Ok(window)
    }

    fn read_piece(&mut self, window: &Window, from: u64, to: u64) -> Result<()> {
        let mut odd = Vec::new();
        {
            let mut buffer = self.pool.buffers.take((to - from) as usize * BLOCK_SIZE);
            let whole = self.pool.device.read_at(from * B, &mut buffer).is_ok();
            let used = window
                .runs
                .iter()
                .flat_map(|run| run.0.max(from)..run.1.min(to));
            for block in used {
                let at = (block - from) as usize * BLOCK_SIZE;
                let bytes = &buffer[at..at + BLOCK_SIZE];
                if !whole || window.sum(block) != Some(crc32c(bytes)) {
                    odd.push(block);
                }
            }
        }
        // The nodes among them, what changed since, and the damaged ones.
        for block in odd {
            if !self.bad_nodes.contains(&block) && self.is_damaged(block)? {
                self.suspect(block);
            }
        }
        Ok(())
    }

    /// Looks at one block again: is it in use, as data, and not what its checksum says?
    fn is_damaged(&mut self, block: u64) -> Result<bool> {
        let _pin = self.pin();
        let (sum, pool) = {
            let _quiet = Quiet::begin();
            let meta = self.pool.meta.read();
            // What only memory holds was not written yet.
            if meta.unwritten(block).is_some() || matches!(meta.refcount(block), Ok(0)) {
                return Ok(false);
            }
            let sum = meta.sums(Extent { block, len: 1 });
            (
                sum.ok().and_then(|sums| sums.first().copied()),
                meta.pool_id(),
            )
        };
        let mut page = Box::new([0; BLOCK_SIZE]);
        if read_block(&*self.pool.device, block, &mut page[..]).is_err() {
            return Ok(true);
        }
        if sum == Some(crc32c(&page[..])) {
            return Ok(false);
        }
        // A node that was here when the trees were walked, or was written since. Any other is an
        // old one, whose place data should have taken: that write was lost.
        let known = self.nodes.contains(block);
        let node = Node::at_block(page, block, pool);
        Ok(!node.is_ok_and(|node| known || node.generation() > self.generation))
    }
}

/// The blocks from `start` to `end` that are in use, as runs.
fn used_runs(meta: &Meta, start: u64, end: u64) -> Result<Vec<(u64, u64)>> {
    let mut stored = Vec::new();
    let mut note = |at: u128, value: &[u8]| {
        let (from, to, count) = decode_refs_run(at, value)?;
        if to > start {
            stored.push((from.max(start), to.min(end), i64::from(count)));
        }
        Ok(true)
    };
    let kind = TreeKind::Refs;
    if let Some((at, value)) = meta.floor(meta.refs, kind, u128::from(start))? {
        note(at, &value)?;
    }
    let range = (u128::from(start) + 1, u128::from(end));
    meta.scan(meta.refs, kind, range.0, range.1, &mut note)?;
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut stored = stored.into_iter().peekable();
    let mut at = start;
    while at < end {
        while stored.next_if(|run| run.1 <= at).is_some() {}
        let (count, until) = match stored.peek() {
            Some(run) if run.0 <= at => (run.2, run.1),
            Some(run) => (0, run.0),
            None => (0, end),
        };
        let (change, until) = meta.space.delta.get_run(at, until.min(end));
        if count + change > 0 {
            match runs.last_mut() {
                Some(last) if last.1 == at => last.1 = until,
                _ => runs.push((at, until)),
            }
        }
        at = until;
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_what_is_in_use_and_little_more() {
        let window = |runs: &[(u64, u64)]| Window {
            runs: runs.to_vec(),
            sums: HashMap::new(),
            end: 0,
        };
        let whole = window(&[(10, 10 + 2 * PIECE + 1)]);
        assert_eq!(whole.pieces().len(), 3);
        assert_eq!(whole.used(), 2 * PIECE + 1);
        let near = window(&[(10, 12), (12 + GAP, 30), (31 + GAP, 40)]);
        assert_eq!(near.pieces(), [(10, 30), (31 + GAP, 40)]);
        for runs in [
            vec![(1, 300), (302, 303), (400, 1000)],
            vec![(5, 6), (260, 270)],
        ] {
            let window = window(&runs);
            let pieces = window.pieces();
            assert!(pieces.iter().all(|piece| piece.1 - piece.0 <= PIECE));
            assert!(pieces.windows(2).all(|pair| pair[0].1 <= pair[1].0));
            for block in runs.iter().flat_map(|run| run.0..run.1) {
                let found = pieces
                    .iter()
                    .filter(|piece| (piece.0..piece.1).contains(&block));
                assert_eq!(found.count(), 1, "{block}");
            }
        }
    }
}
