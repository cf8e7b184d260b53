//! The extent map of a file: where its blocks live in the pool; and the checksums of data.
//!
//! Invariants:
//!
//! 1. Extents of one file do not overlap. Each refers to blocks that have a reference for it, but
//!    for those that a repair has marked as lost: they have no blocks, and cannot be read.
//! 2. Neighbours that continue each other in the file and in the pool are one extent.
//! 3. Every block that an extent refers to has its checksum in the checksum tree; those of free
//!    blocks are left over and mean nothing.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ondisk::extent::{
    EXTENT_BLOCKS_MAX, Extent, NodeRef, Root, SUMS_LEN, SUMS_PER_RECORD, decode_extent,
    encode_extent,
};
use crate::ondisk::node::{Node, TreeKind};
use crate::ondisk::{get_u32, put_u32};

use super::meta::Meta;

/// A part of a file that is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapped {
    /// First file block.
    pub(crate) at: u64,
    /// Where it is.
    pub(crate) extent: Extent,
}

impl Mapped {
    /// The file block behind it.
    pub(crate) fn end(&self) -> u64 {
        self.at + u64::from(self.extent.len)
    }

    /// The part within file blocks `from` to `to`, if any.
    fn clip(self, from: u64, to: u64) -> Option<Self> {
        let (start, end) = (self.at.max(from), self.end().min(to));
        if start >= end {
            return None;
        }
        let extent = self
            .extent
            .tail((start - self.at) as u32)
            .head((end - start) as u32);
        Some(Self { at: start, extent })
    }
}

/// True if `right` is where `left` ends in the pool, or both are lost.
fn continues(left: Extent, right: Extent) -> bool {
    left.is_lost() == right.is_lost() && (left.is_lost() || left.end() == right.block)
}

fn decode(key: u128, value: &[u8]) -> Result<Mapped> {
    let mapped = Mapped {
        at: key as u64,
        extent: decode_extent(value)?,
    };
    if mapped
        .at
        .checked_add(u64::from(mapped.extent.len))
        .is_none()
    {
        return Err(Error::corrupt(format!(
            "extent reaches too far: file block={}",
            mapped.at
        )));
    }
    Ok(mapped)
}

impl Meta {
    /// Visits what is mapped of file blocks `from` to `to`, in order, cut at the borders.
    pub(crate) fn mapped(
        &self,
        root: Root,
        from: u64,
        to: u64,
        visit: &mut dyn FnMut(Mapped) -> ControlFlow<()>,
    ) -> Result<()> {
        let first = self.with_floor(root, TreeKind::Extents, u128::from(from), decode)?;
        if let Some(first) = first
            && let Some(part) = first?.clip(from, to)
            && visit(part).is_break()
        {
            return Ok(());
        }
        let (first, end) = (u128::from(from) + 1, u128::from(to));
        self.scan(root, TreeKind::Extents, first, end, &mut |key, value| {
            let part = decode(key, value)?.clip(from, to);
            Ok(part.is_none_or(|part| visit(part).is_continue()))
        })
    }

    /// Where one file block is, if it is mapped.
    pub(crate) fn mapped_block(&self, root: Root, at: u64) -> Result<Option<Extent>> {
        let found = self.with_floor(root, TreeKind::Extents, u128::from(at), |key, value| {
            decode(key, value).map(|mapped| mapped.clip(at, at + 1))
        })?;
        Ok(found.transpose()?.flatten().map(|part| part.extent))
    }

    /// Number of mapped blocks and of extents in a range.
    pub(crate) fn count_mapped(&self, root: Root, from: u64, to: u64) -> Result<(u64, u64)> {
        let (mut blocks, mut extents) = (0, 0);
        self.mapped(root, from, to, &mut |part| {
            blocks += u64::from(part.extent.len);
            extents += 1;
            ControlFlow::Continue(())
        })?;
        Ok((blocks, extents))
    }

    /// Makes file blocks `from` to `to` a hole and drops the references to their blocks.
    pub(crate) fn unmap(&mut self, root: &mut Root, from: u64, to: u64) -> Result<()> {
        let kind = TreeKind::Extents;
        if root.is_empty() || from >= to {
            return Ok(());
        }
        // What straddles the left border is cut there; it may straddle the right one as well.
        if let Some((key, value)) = self.floor(*root, kind, u128::from(from))? {
            let left = decode(key, &value)?;
            if left.at < from && left.end() > from {
                self.cut(root, left, from, to)?;
            }
        }
        if let Some(last) = to.checked_sub(1)
            && let Some((key, value)) = self.floor(*root, kind, u128::from(last))?
        {
            let right = decode(key, &value)?;
            if right.at >= from && right.end() > to {
                // Its key changes: the head goes, the tail stays under its new key.
                let tail = right
                    .clip(to, u64::MAX)
                    .expect("it reaches behind the border");
                self.remove(root, kind, key)?;
                self.insert(root, kind, u128::from(to), &encode_extent(tail.extent))?;
                let head = right.clip(from, to).expect("it begins before the border");
                self.space.delta.add(head.extent, -1);
            }
        }
        // Everything else begins and ends inside. Nothing there is the common case.
        let mut any = false;
        self.scan(
            *root,
            kind,
            u128::from(from),
            u128::from(to),
            &mut |_, _| {
                any = true;
                Ok(false)
            },
        )?;
        if any {
            let to = if to == u64::MAX {
                u128::MAX
            } else {
                u128::from(to)
            };
            self.remove_range(root, u128::from(from), to)?;
        }
        Ok(())
    }

    /// Cuts `left`, which straddles `from`, and what of it lies before `to` away.
    fn cut(&mut self, root: &mut Root, left: Mapped, from: u64, to: u64) -> Result<()> {
        let kind = TreeKind::Extents;
        let head = left.clip(0, from).expect("it begins before the border");
        let middle = left.clip(from, to).expect("it reaches over the border");
        if let Some(tail) = left.clip(to, u64::MAX) {
            self.insert(root, kind, u128::from(to), &encode_extent(tail.extent))?;
        }
        self.insert(root, kind, u128::from(left.at), &encode_extent(head.extent))?;
        self.space.delta.add(middle.extent, -1);
        Ok(())
    }

    /// Maps file blocks from `at` on to `extent`, which gains a reference; what was mapped there
    /// before loses one.
    pub(crate) fn map(&mut self, root: &mut Root, at: u64, extent: Extent) -> Result<()> {
        let kind = TreeKind::Extents;
        self.unmap(root, at, at + u64::from(extent.len))?;
        self.space.delta.add(extent, 1);
        let mut new = Mapped { at, extent };
        // I2: join with the neighbours.
        if let Some(before) = at.checked_sub(1)
            && let Some((key, value)) = self.floor(*root, kind, u128::from(before))?
        {
            let left = decode(key, &value)?;
            if left.end() == at
                && continues(left.extent, extent)
                && left.extent.len + extent.len <= EXTENT_BLOCKS_MAX
            {
                let len = left.extent.len + extent.len;
                new = Mapped {
                    at: left.at,
                    extent: Extent { len, ..left.extent },
                };
            }
        }
        if let Some(value) = self.get(*root, kind, u128::from(new.end()))? {
            let right = decode_extent(&value)?;
            if continues(new.extent, right) && new.extent.len + right.len <= EXTENT_BLOCKS_MAX {
                self.remove(root, kind, u128::from(new.end()))?;
                new.extent.len += right.len;
            }
        }
        self.insert(root, kind, u128::from(new.at), &encode_extent(new.extent))
    }

    /// Stores the checksums of a run of data blocks.
    pub(crate) fn set_sums(&mut self, run: Extent, sums: &[u32]) -> Result<()> {
        assert_eq!(run.len as usize, sums.len());
        let mut done = 0;
        while done < sums.len() {
            let block = run.block + done as u64;
            let (key, slot) = (block / SUMS_PER_RECORD, (block % SUMS_PER_RECORD) as usize);
            let count = (SUMS_PER_RECORD as usize - slot).min(sums.len() - done);
            let mut record = [0; SUMS_LEN];
            if count < SUMS_PER_RECORD as usize
                && let Some(old) = self.get(self.sums, TreeKind::Sums, u128::from(key))?
            {
                record.copy_from_slice(&old);
            }
            for i in 0..count {
                put_u32(&mut record, (slot + i) * 4, sums[done + i]);
            }
            let mut root = self.sums;
            let inserted = self.insert(&mut root, TreeKind::Sums, u128::from(key), &record);
            self.sums = root;
            inserted?;
            done += count;
        }
        Ok(())
    }

    /// The checksums of a run of data blocks.
    pub(crate) fn sums(&self, run: Extent) -> Result<Vec<u32>> {
        let mut sums = Vec::with_capacity(run.len as usize);
        while sums.len() < run.len as usize {
            let block = run.block + sums.len() as u64;
            let (key, slot) = (block / SUMS_PER_RECORD, (block % SUMS_PER_RECORD) as usize);
            let count = (SUMS_PER_RECORD as usize - slot).min(run.len as usize - sums.len());
            let Some(record) = self.get(self.sums, TreeKind::Sums, u128::from(key))? else {
                return Err(Error::corrupt(format!(
                    "data block has no checksum: block={block}"
                )));
            };
            sums.extend((0..count).map(|i| get_u32(&record, (slot + i) * 4)));
        }
        Ok(sums)
    }

    /// The checksums of data blocks, which come in ascending order.
    pub(crate) fn sums_of(
        &self,
        blocks: &mut dyn Iterator<Item = u64>,
        sums: &mut Vec<u32>,
    ) -> Result<()> {
        // The leaf of the block before, and the first key behind it: neighbours share one.
        let mut near: Option<(Arc<Node>, Option<u128>)> = None;
        for block in blocks {
            let key = u128::from(block / SUMS_PER_RECORD);
            let slot = (block % SUMS_PER_RECORD) as usize;
            let behind = |near: &(_, Option<u128>)| near.1.is_some_and(|bound| key >= bound);
            if near.as_ref().is_none_or(behind) {
                near = self.leaf(self.sums, TreeKind::Sums, key)?;
            }
            let found = near
                .as_ref()
                .and_then(|(leaf, _)| leaf.find(key).ok().map(|i| leaf.value(i)));
            let Some(record) = found else {
                return Err(Error::corrupt(format!(
                    "data block has no checksum: block={block}"
                )));
            };
            sums.push(get_u32(record, slot * 4));
        }
        Ok(())
    }

    /// Blocks of an extent map that no other file shares, and its extents.
    pub(crate) fn exclusive(&self, root: Root) -> Result<(u64, u64)> {
        let mut sum = (0, 0);
        if !root.is_empty() {
            let all = (0, u128::MAX);
            self.exclusive_below(root.level, root.node, all, false, &mut sum)?;
        }
        Ok(sum)
    }

    /// `range`: the first key below the node, and the first behind it. Checked, so that a damaged
    /// tree that leads to a node again and again ends.
    fn exclusive_below(
        &self,
        level: u8,
        at: NodeRef,
        range: (u128, u128),
        shared: bool,
        sum: &mut (u64, u64),
    ) -> Result<()> {
        let shared = shared || self.refcount(at.block)? > 1;
        let node = self.node(TreeKind::Extents, level, at)?;
        if node.key(0) < range.0 || node.key(node.count() - 1) >= range.1 {
            return Err(Error::corrupt(format!(
                "extent map has a node out of its range: block={}",
                at.block
            )));
        }
        for i in 0..node.count() {
            if level > 0 {
                let end = if i + 1 < node.count() {
                    node.key(i + 1)
                } else {
                    range.1
                };
                let below = (node.key(i), end);
                self.exclusive_below(level - 1, node.child(i), below, shared, sum)?;
                continue;
            }
            sum.1 += 1;
            if !shared {
                sum.0 += self.unshared(decode_extent(node.value(i))?)?;
            }
        }
        Ok(())
    }

    /// Blocks of a run with a single reference.
    fn unshared(&self, run: Extent) -> Result<u64> {
        if run.is_lost() {
            return Ok(0);
        }
        if !self.space.contains(run) {
            return Err(Error::corrupt(format!(
                "extent lies outside the pool: block={} len={}",
                run.block, run.len
            )));
        }
        let mut alone = 0;
        let mut at = run.block;
        while at < run.end() {
            let (count, end) = self.refcount_run(at, run.end())?;
            if count == 1 {
                alone += end - at;
            }
            at = end;
        }
        Ok(alone)
    }
}
