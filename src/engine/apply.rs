//! What each journal record does to the trees and the stage: the same code for an operation
//! when it happens and for its record when it is replayed.
//!
//! Invariants:
//!
//! 1. `apply` is deterministic: a record and the state before it give the state after it.
//! 2. A live operation has been checked before: an error here means damage, and the caller
//!    poisons the pool. Replay refuses the journal.

use std::ops::ControlFlow;

use crate::error::{Error, Result};
use crate::ondisk::extent::Root;
use crate::ondisk::inode::{Entry, FLAG_PINNED, Inode, InodeKind};
use crate::ondisk::record::Record;
use crate::units::{BLOCK_SIZE, Ino, Time};

use super::extents::Mapped;
use super::meta::Meta;
use super::stage::{FileAttr, Stage};
use super::work;

/// A rename that replaces what has the new name.
pub(crate) const RENAME_REPLACE: u8 = 0;
/// A rename that fails if the new name is taken.
pub(crate) const RENAME_NO_REPLACE: u8 = 1;
/// A rename that swaps two names.
pub(crate) const RENAME_EXCHANGE: u8 = 2;

/// Bits of the mask of [`Record::SetAttr`].
pub(crate) mod set {
    pub(crate) const MODE: u8 = 1;
    pub(crate) const UID: u8 = 2;
    pub(crate) const GID: u8 = 4;
    pub(crate) const ATIME: u8 = 8;
    pub(crate) const MTIME: u8 = 16;
    pub(crate) const CTIME: u8 = 32;
}

/// Extents of a range above which its tree is first shared with a detached map, so that removing
/// the range is O(log n) and the reaper frees the rest bit by bit.
pub(crate) const DETACH_ABOVE: u64 = 4096;

/// Extents of a range that are in memory at once when it is shared.
const PARTS_MAX: usize = 4096;

/// The first block that lies wholly behind `size` bytes.
pub(crate) fn blocks_of(size: u64) -> u64 {
    size.div_ceil(BLOCK_SIZE as u64)
}

/// Size and times of an inode record.
pub(crate) fn attr_of(inode: &Inode) -> FileAttr {
    FileAttr {
        size: inode.size,
        mtime: inode.mtime,
        ctime: inode.ctime,
    }
}

/// The inode as a caller sees it: its record, with what the stage knows better.
pub(crate) fn load(meta: &Meta, stage: &Stage, ino: Ino) -> Result<Inode> {
    let mut inode = meta.inode(ino)?;
    if let Some(file) = stage.file(ino) {
        file.attr.put_into(&mut inode);
    }
    Ok(inode)
}

/// As [`load`], for what only files have: a record that is about anything else is damaged.
fn load_file(meta: &Meta, stage: &Stage, ino: Ino) -> Result<Inode> {
    meta.file(ino)?;
    load(meta, stage, ino)
}

/// The number of mapped blocks of a file once `less` are gone and `more` have come.
pub(crate) fn mapped_now(mapped: u64, less: u64, more: u64) -> Result<u64> {
    mapped
        .checked_sub(less)
        .map(|mapped| mapped + more)
        .ok_or_else(|| Error::corrupt("a file maps more blocks than were counted"))
}

/// Stores an inode, in its record and in the stage.
fn store(meta: &mut Meta, stage: &mut Stage, ino: Ino, inode: &Inode) -> Result<()> {
    if let Some(file) = stage.file_mut(ino) {
        file.attr = attr_of(inode);
        file.pinned = inode.flags & FLAG_PINNED != 0;
    }
    meta.put_inode(ino, inode)
}

/// Does what a record says. The data of `Block` records goes to the stage elsewhere.
pub(crate) fn apply(meta: &mut Meta, stage: &mut Stage, record: &Record) -> Result<()> {
    match record {
        Record::Block { .. } | Record::Zero { .. } => {
            unreachable!("block contents go to the stage")
        }
        Record::Map {
            ino,
            block,
            extent,
            sums,
        } => {
            let mut inode = load_file(meta, stage, *ino)?;
            let end = block + u64::from(extent.len);
            let (before, _) = meta.count_mapped(inode.root, *block, end)?;
            meta.map(&mut inode.root, *block, *extent)?;
            meta.set_sums(*extent, sums)?;
            inode.mapped = mapped_now(inode.mapped, before, u64::from(extent.len))?;
            stage.drop_range(*ino, *block, end);
            store(meta, stage, *ino, &inode)
        }
        Record::Touch {
            ino,
            size,
            mtime,
            ctime,
        } => {
            let mut inode = load_file(meta, stage, *ino)?;
            (inode.size, inode.mtime, inode.ctime) = (*size, *mtime, *ctime);
            store(meta, stage, *ino, &inode)
        }
        Record::SetAttr { ino, .. } => set_attr(meta, stage, *ino, record),
        Record::Create { .. } => create(meta, record),
        Record::Link {
            ino,
            dir,
            name,
            now,
        } => {
            let mut inode = load(meta, stage, *ino)?;
            inode.nlink = inode.nlink.saturating_add(1);
            inode.ctime = *now;
            meta.put_entry(
                *dir,
                Entry {
                    ino: *ino,
                    kind: inode.kind,
                    name: name.clone(),
                },
            )?;
            store(meta, stage, *ino, &inode)?;
            stamp(meta, *dir, *now, 0)
        }
        Record::Unlink { dir, name, now, .. } => {
            let entry = entry(meta, *dir, name)?;
            meta.remove_entry(*dir, name)?;
            let subdirectories = -i32::from(entry.kind == InodeKind::Directory);
            stamp(meta, *dir, *now, subdirectories)?;
            drop_link(meta, stage, entry.ino, *now)
        }
        Record::Rename { .. } => rename(meta, stage, record),
        Record::SetXattr {
            ino,
            name,
            value,
            now,
        } => {
            meta.put_xattr(*ino, name, value)?;
            change(meta, stage, *ino, *now)
        }
        Record::RemoveXattr { ino, name, now } => {
            meta.delete_xattr(*ino, name)?;
            change(meta, stage, *ino, *now)
        }
        Record::Truncate { ino, size, now } => {
            let mut inode = load_file(meta, stage, *ino)?;
            // Whatever the size is: replay learns it from the end of the batch only.
            unmap(meta, stage, &mut inode, blocks_of(*size), u64::MAX)?;
            stage.drop_range(*ino, blocks_of(*size), u64::MAX);
            inode.size = *size;
            (inode.mtime, inode.ctime) = (*now, *now);
            store(meta, stage, *ino, &inode)
        }
        Record::Punch {
            ino,
            block,
            count,
            now,
        } => {
            let mut inode = load_file(meta, stage, *ino)?;
            let end = block.saturating_add(*count);
            unmap(meta, stage, &mut inode, *block, end)?;
            stage.drop_range(*ino, *block, end);
            (inode.mtime, inode.ctime) = (*now, *now);
            store(meta, stage, *ino, &inode)
        }
        Record::Clone {
            src,
            dst,
            size,
            pinned,
            now,
        } => clone(meta, stage, *src, *dst, *size, *pinned, *now),
        Record::CloneRange { .. } => clone_range(meta, stage, record),
        Record::Show { dst, size, now } => {
            let mut inode = load_file(meta, stage, *dst)?;
            inode.size = *size;
            (inode.mtime, inode.ctime) = (*now, *now);
            store(meta, stage, *dst, &inode)
        }
        Record::EndClone { dst } => {
            let mut inode = load_file(meta, stage, *dst)?;
            let end = blocks_of(inode.size);
            unmap(meta, stage, &mut inode, end, u64::MAX)?;
            stage.drop_range(*dst, end, u64::MAX);
            unpin(meta, *dst, &mut inode)?;
            store(meta, stage, *dst, &inode)
        }
    }
}

/// Makes a range of a file a hole; a range of many extents is handed to the reaper.
fn unmap(meta: &mut Meta, stage: &mut Stage, inode: &mut Inode, from: u64, to: u64) -> Result<()> {
    let (blocks, extents) = meta.count_mapped(inode.root, from, to)?;
    stage.work += work::of_extents(extents);
    if blocks == 0 {
        return Ok(());
    }
    if extents > DETACH_ABOVE {
        let whole: Root = inode.root;
        if blocks == inode.mapped {
            inode.root = Root::default();
            inode.mapped = 0;
            return meta.detach(whole);
        }
        meta.inc_node(whole.node.block);
        meta.detach(whole)?;
    }
    meta.unmap(&mut inode.root, from, to)?;
    inode.mapped = mapped_now(inode.mapped, blocks, 0)?;
    Ok(())
}

/// Changes times and, by `subdirectories`, the links of a directory.
fn stamp(meta: &mut Meta, dir: Ino, now: Time, subdirectories: i32) -> Result<()> {
    meta.change_directory(dir, &mut |inode| {
        (inode.mtime, inode.ctime) = (now, now);
        inode.nlink = inode.nlink.saturating_add_signed(subdirectories);
    })
}

/// Changes the time of the last change.
fn change(meta: &mut Meta, stage: &mut Stage, ino: Ino, now: Time) -> Result<()> {
    let mut inode = load(meta, stage, ino)?;
    inode.ctime = now;
    store(meta, stage, ino, &inode)
}

fn entry(meta: &Meta, dir: Ino, name: &[u8]) -> Result<Entry> {
    meta.entry(dir, name)?
        .ok_or_else(|| Error::corrupt(format!("a name that must exist does not: dir={dir}")))
}

fn set_attr(meta: &mut Meta, stage: &mut Stage, ino: Ino, record: &Record) -> Result<()> {
    let Record::SetAttr {
        mask,
        mode,
        uid,
        gid,
        times,
        ..
    } = record
    else {
        unreachable!()
    };
    let mut inode = load(meta, stage, ino)?;
    let has = |bit: u8| mask & bit != 0;
    if has(set::MODE) {
        inode.mode = *mode;
    }
    if has(set::UID) {
        inode.uid = *uid;
    }
    if has(set::GID) {
        inode.gid = *gid;
    }
    if has(set::ATIME) {
        inode.atime = times[0];
    }
    if has(set::MTIME) {
        inode.mtime = times[1];
    }
    if has(set::CTIME) {
        inode.ctime = times[2];
    }
    store(meta, stage, ino, &inode)
}

fn create(meta: &mut Meta, record: &Record) -> Result<()> {
    let Record::Create {
        dir,
        name,
        ino,
        generation,
        kind,
        mode,
        uid,
        gid,
        rdev,
        target,
        now,
    } = record
    else {
        unreachable!()
    };
    let kind = InodeKind::from_code(*kind)
        .ok_or_else(|| Error::corrupt(format!("journal creates an unknown kind: {kind}")))?;
    let directory = kind == InodeKind::Directory;
    let inode = Inode {
        kind,
        flags: 0,
        mode: *mode,
        nlink: if directory { 2 } else { 1 },
        uid: *uid,
        gid: *gid,
        rdev: *rdev,
        generation: *generation,
        size: target.len() as u64,
        mapped: 0,
        parent: if directory { dir.0 } else { 0 },
        root: Root::default(),
        atime: *now,
        mtime: *now,
        ctime: *now,
        btime: *now,
        origin: 0,
        origin_generation: 0,
        origin_time: Time::default(),
    };
    // Numbers from the next one on are free, if it is known which one that is.
    if !(meta.numbers_known && ino.0 >= meta.next_ino) && meta.has_inode(*ino)? {
        return Err(Error::corrupt(format!(
            "an inode that is created exists: ino={ino}"
        )));
    }
    meta.next_ino = meta.next_ino.max(ino.0 + 1);
    meta.put_inode(*ino, &inode)?;
    if kind == InodeKind::Symlink {
        meta.put_target(*ino, target)?;
    }
    meta.put_entry(
        *dir,
        Entry {
            ino: *ino,
            kind,
            name: name.clone(),
        },
    )?;
    stamp(meta, *dir, *now, i32::from(directory))
}

/// One name less for an inode; without any it becomes an orphan.
fn drop_link(meta: &mut Meta, stage: &mut Stage, ino: Ino, now: Time) -> Result<()> {
    let mut inode = load(meta, stage, ino)?;
    let gone = inode.kind == InodeKind::Directory || inode.nlink <= 1;
    inode.nlink = if gone { 0 } else { inode.nlink - 1 };
    inode.ctime = now;
    if gone {
        meta.add_orphan(ino)?;
    }
    store(meta, stage, ino, &inode)
}

fn rename(meta: &mut Meta, stage: &mut Stage, record: &Record) -> Result<()> {
    let Record::Rename {
        dir,
        name,
        new_dir,
        new_name,
        mode,
        now,
    } = record
    else {
        unreachable!()
    };
    let moved = entry(meta, *dir, name)?;
    let target = meta.entry(*new_dir, new_name)?;
    if target
        .as_ref()
        .is_some_and(|target| target.ino == moved.ino)
    {
        return Ok(()); // two names of one inode: POSIX does nothing
    }
    let is_dir = |entry: &Entry| i32::from(entry.kind == InodeKind::Directory);
    let (mut out, mut into) = (-is_dir(&moved), is_dir(&moved));
    let exchange = *mode == RENAME_EXCHANGE;
    if let Some(target) = &target {
        into -= is_dir(target);
        if exchange {
            out += is_dir(target);
        }
    }
    if exchange {
        let target = target.ok_or_else(|| Error::corrupt("exchange with nothing"))?;
        meta.put_entry(
            *dir,
            Entry {
                name: name.clone(),
                ..target.clone()
            },
        )?;
        adopt(meta, stage, target.ino, *dir, *now)?;
    } else {
        meta.remove_entry(*dir, name)?;
        if let Some(target) = target {
            drop_link(meta, stage, target.ino, *now)?;
        }
    }
    meta.put_entry(
        *new_dir,
        Entry {
            name: new_name.clone(),
            ..moved.clone()
        },
    )?;
    adopt(meta, stage, moved.ino, *new_dir, *now)?;
    stamp(meta, *dir, *now, out)?;
    stamp(meta, *new_dir, *now, into)
}

/// Tells an inode that it lives in `dir` now.
fn adopt(meta: &mut Meta, stage: &mut Stage, ino: Ino, dir: Ino, now: Time) -> Result<()> {
    let mut inode = load(meta, stage, ino)?;
    if inode.kind == InodeKind::Directory {
        inode.parent = dir.0;
    }
    inode.ctime = now;
    store(meta, stage, ino, &inode)
}

/// The inode is no clone in pieces (any more); without a name it stays an orphan.
fn unpin(meta: &mut Meta, ino: Ino, inode: &mut Inode) -> Result<()> {
    if inode.flags & FLAG_PINNED != 0 && inode.nlink > 0 {
        meta.remove_orphan(ino)?;
    }
    inode.flags &= !FLAG_PINNED;
    Ok(())
}

/// Stages a copy of another file's staged block; the journal gets it from the `Clone` record.
fn share_staged(
    stage: &mut Stage,
    src: Ino,
    dst: Ino,
    from: u64,
    to: u64,
    at: u64,
    attr: FileAttr,
) {
    let blocks = match stage.file(src) {
        Some(file) => file.range(from, to),
        None => return,
    };
    if blocks.is_empty() {
        return;
    }
    stage.open(dst, attr);
    for (block, staged) in blocks {
        stage.put_shared(dst, block - from + at, staged);
    }
}

fn clone(
    meta: &mut Meta,
    stage: &mut Stage,
    src: Ino,
    dst: Ino,
    size: u64,
    pinned: bool,
    now: Time,
) -> Result<()> {
    let source = load_file(meta, stage, src)?;
    let mut inode = load_file(meta, stage, dst)?;
    unpin(meta, dst, &mut inode)?;
    stage.drop_range(dst, 0, u64::MAX);
    meta.detach(inode.root)?;
    inode.root = source.root;
    if !source.root.is_empty() {
        meta.inc_node(source.root.node.block);
    }
    inode.mapped = source.mapped;
    inode.size = size;
    inode.flags = if pinned { FLAG_PINNED } else { 0 };
    (inode.mtime, inode.ctime) = (now, now);
    inode.origin = src.0;
    inode.origin_generation = source.generation;
    inode.origin_time = now;
    if pinned {
        meta.add_orphan(dst)?;
    }
    share_staged(stage, src, dst, 0, u64::MAX, 0, attr_of(&inode));
    store(meta, stage, dst, &inode)
}

fn clone_range(meta: &mut Meta, stage: &mut Stage, record: &Record) -> Result<()> {
    let Record::CloneRange {
        src,
        block,
        dst,
        dst_block,
        count,
    } = record
    else {
        unreachable!()
    };
    let source = load_file(meta, stage, *src)?;
    let mut inode = load_file(meta, stage, *dst)?;
    let end = block.saturating_add(*count);
    let mut at = *block;
    // Whatever the record says, a bounded part of it is in memory at a time.
    while at < end {
        let root = if src == dst { inode.root } else { source.root };
        let mut parts: Vec<Mapped> = Vec::new();
        let mut next = end;
        meta.mapped(root, at, end, &mut |part| {
            if parts.len() == PARTS_MAX {
                next = part.at;
                return ControlFlow::Break(());
            }
            parts.push(part);
            ControlFlow::Continue(())
        })?;
        let to = |from: u64| from - block + dst_block;
        // Both may be one file: what is shared was read before the destination changes, and the
        // references to it are taken before those of the destination are dropped.
        stage.work += work::of_extents(2 * parts.len() as u64);
        for part in &parts {
            meta.space.delta.add(part.extent, 1);
        }
        unmap(meta, stage, &mut inode, to(at), to(next))?;
        for part in &parts {
            meta.map(&mut inode.root, to(part.at), part.extent)?;
            meta.space.delta.add(part.extent, -1);
            inode.mapped += u64::from(part.extent.len);
        }
        at = next;
    }
    stage.drop_range(*dst, *dst_block, dst_block + count);
    share_staged(
        stage,
        *src,
        *dst,
        *block,
        block + count,
        *dst_block,
        attr_of(&inode),
    );
    store(meta, stage, *dst, &inode)
}
