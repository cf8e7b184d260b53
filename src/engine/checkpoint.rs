//! Checkpoint: all trees durable, as of one instant; then the superblock flips, the journal is
//! free, and so are the blocks that this generation dropped.
//!
//! The order, and why:
//!
//! 1. Most of the stage is destaged, and most reference counts are merged, while everything goes
//!    on.
//! 2. The gate closes: no operation that changes metadata is under way. The cut commits what is
//!    pending and freezes the stage in one instant. What is written later is in later batches.
//! 3. The frozen rest is destaged, sizes and times are folded into the inodes, reference counts
//!    merged, nodes sealed. Now the trees are the state at the cut. The gate opens.
//! 4. Nodes are written; the device is synced, data included; the superblock is written to the
//!    slot that is not the newest; the device is synced again. That is the flip.
//! 5. The journal is trimmed; blocks that this generation freed become free, and are given back
//!    to the host afterwards (`discard.rs`).
//!
//! If the host has no space (`host.rs`) a checkpoint that has not come to step 4 is given up: what is
//! in the trees and the stage stays there, in memory and in the journal. From step 4 on it waits in
//! memory, and the next one finishes it first.
//!
//! A crash before the flip finds the old superblock, whose trees are untouched, because nothing
//! they refer to is free before step 5.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::ondisk::extent::{Root, encode_group};
use crate::ondisk::node::{Node, TreeKind};
use crate::ondisk::superblock::{FLAG_CLEAN, FLAG_REPAIRED, SLOTS, Superblock};
use crate::units::{BLOCK_SIZE, Ino};

use super::journal::Cut;
use super::meta::{Meta, floor_blocks};
use super::nodes::BlockMap;
use super::pool::Pool;

/// Runs of reference counts merged under one hold of the trees.
const MERGE_STEP: usize = 512;
/// Blocks of one write of nodes: 1 MiB.
const WRITE_BLOCKS: usize = 256;
/// Bitmaps kept in memory: 1024 of them are 4 MiB and cover 128 GiB.
const BITMAPS_MAX: usize = 1024;

impl Pool {
    /// Destages everything and writes a checkpoint, which frees the journal.
    ///
    /// # Errors
    /// `Io` or `Poisoned` if the device failed; `NoSpace` if the host has no space, then the journal
    /// keeps what was to be written.
    pub fn checkpoint(&self) -> Result<()> {
        self.check_writable()?;
        self.checkpoint_as(false)
    }

    /// Writes a checkpoint; `clean` marks the pool as closed.
    pub(crate) fn checkpoint_as(&self, clean: bool) -> Result<()> {
        self.checkpoint_with(clean, || Ok(()))
    }

    /// Does `before` while no checkpoint is written, and writes one.
    pub(crate) fn checkpoint_with(
        &self,
        clean: bool,
        before: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        // Those who wait for this checkpoint are told, too.
        self.check_poison()
            .inspect_err(|error| self.commit_failed(error))?;
        let done = {
            let _one = self.checkpointing.lock();
            if !clean {
                self.check_writable()?; // nobody writes behind the last one
            }
            self.finish_unfinished()
                .and_then(|()| before())
                .and_then(|()| self.write_checkpoint(clean))
        };
        self.relief.notify_all();
        match &done {
            Ok(()) => self.commit_waiting(),
            // No checkpoint was tried.
            Err(error) if matches!(error.kind(), Kind::Invalid | Kind::TooLarge) => {}
            Err(error) => self.checkpoint_failed(error),
        }
        if done.is_ok() && !self.is_threaded() {
            while self.discard_some()? {}
        }
        done
    }

    fn write_checkpoint(&self, clean: bool) -> Result<()> {
        self.destage_all()
            .inspect_err(|error| self.poison_unless_full(error))?;
        self.merge_most().inspect_err(|error| self.poison(error))?;
        let gate = self.gate.write();
        // Nobody else destages across the cut: what it mapped could be of either side.
        let destaging = self.destaging.lock();
        let cut = self.commit_cut().inspect_err(|error| self.give_up(error))?;
        let sealed = self.destage_frozen().and_then(|()| {
            let sealed = self.seal_cut();
            sealed.inspect_err(|error| self.poison(error))
        });
        let mut superblock = match sealed {
            Ok(superblock) => superblock,
            Err(error) => {
                self.give_up(&error);
                self.end_cut(cut, Some(&error));
                return Err(error);
            }
        };
        drop((destaging, gate));
        superblock.journal_seq = cut.seq;
        superblock.journal_pos = cut.pos;
        superblock.flags &= !FLAG_CLEAN;
        if !self.stage.lock().replaying {
            superblock.flags &= !FLAG_REPAIRED; // no record from before the repair is left
        }
        superblock.flags |= if clean { FLAG_CLEAN } else { 0 };
        self.finish(superblock, cut)
    }

    /// There will be no checkpoint of this cut. The gate is closed.
    fn give_up(&self, error: &Error) {
        self.poison_unless_full(error);
        self.stage.lock().uncut_attrs();
    }

    /// Makes the trees the state at the cut and hands their new nodes over to be written. The gate
    /// is closed.
    fn seal_cut(&self) -> Result<Superblock> {
        self.fold_attrs()?;
        self.merge()?;
        let mut meta = self.meta.write();
        meta.seal_all()?;
        let mut superblock = self.superblock.lock().clone();
        meta.describe(&mut superblock);
        meta.next_generation();
        Ok(superblock)
    }

    /// Writes what an earlier checkpoint could not, because the host had no space.
    fn finish_unfinished(&self) -> Result<()> {
        let unfinished = self.unfinished.lock().take();
        unfinished.map_or(Ok(()), |(superblock, cut)| {
            self.resume_cut();
            self.finish(superblock, cut)
        })
    }

    /// Writes the nodes that were handed over, and flips. If the host has no space for that it can
    /// be done again: nothing durable refers to those nodes, and the superblock goes to the slot
    /// that is not the newest.
    fn finish(&self, superblock: Superblock, cut: Cut) -> Result<()> {
        let nodes = self.meta.read().being_written();
        let written = self.write_nodes(&nodes);
        drop(nodes);
        let seq = superblock.journal_seq;
        let flipped = written
            .and_then(|()| self.renew_copies(&superblock))
            .and_then(|()| self.device_sync())
            .and_then(|()| self.flip(&superblock));
        if let Err(error) = flipped {
            self.poison_unless_full(&error);
            self.delay_cut(&cut, &error);
            *self.unfinished.lock() = Some((superblock, cut));
            return Err(error);
        }
        self.journal.lock().trim(seq);
        self.release();
        self.end_cut(cut, None);
        Ok(())
    }

    /// After an error of a checkpoint: whatever cannot be tried again makes the pool read-only.
    fn poison_unless_full(&self, error: &Error) {
        if error.kind() != Kind::NoSpace {
            self.poison(error);
        }
    }

    /// Sizes and times as of the cut go into the inode records.
    fn fold_attrs(&self) -> Result<()> {
        let inos = self.stage.lock().inos();
        for ino in inos {
            let mut meta = self.meta.write();
            let mut stage = self.stage.lock();
            let Some(attr) = stage.file_mut(ino).and_then(|file| file.cut_attr.take()) else {
                continue;
            };
            drop(stage);
            let mut inode = meta.inode(ino)?;
            (inode.size, inode.mtime, inode.ctime) = (attr.size, attr.mtime, attr.ctime);
            meta.put_inode(ino, &inode)?;
        }
        self.stage.lock().sweep();
        Ok(())
    }

    /// Merges the reference counts that changed up to now.
    fn merge_most(&self) -> Result<()> {
        let rounds = self.meta.read().space.delta.len() / MERGE_STEP;
        for _ in 0..rounds {
            if !self.meta.write().merge_refs(MERGE_STEP)? {
                break;
            }
        }
        Ok(())
    }

    /// Merges reference counts and group records until nothing changes any more: storing them
    /// allocates nodes, which changes them again, but each node is shadowed once only.
    fn merge(&self) -> Result<()> {
        loop {
            while self.meta.write().merge_refs(MERGE_STEP)? {}
            let mut meta = self.meta.write();
            if !meta.store_groups()? && meta.space.delta.is_empty() {
                return Ok(());
            }
        }
    }

    fn write_nodes(&self, nodes: &BlockMap<Arc<Node>>) -> Result<()> {
        let sorted: BTreeMap<u64, &Arc<Node>> =
            nodes.iter().map(|(at, node)| (*at, node)).collect();
        let mut buffer: Vec<u8> = Vec::new();
        let mut first = 0;
        for (block, node) in sorted {
            let count = (buffer.len() / BLOCK_SIZE) as u64;
            if count > 0 && (first + count != block || count as usize == WRITE_BLOCKS) {
                self.device_write(first, &buffer)?;
                buffer.clear();
            }
            if buffer.is_empty() {
                first = block;
            }
            buffer.extend_from_slice(&node.page()[..]);
        }
        if !buffer.is_empty() {
            self.device_write(first, &buffer)?;
        }
        Ok(())
    }

    /// Makes `superblock` the newest one.
    fn flip(&self, superblock: &Superblock) -> Result<()> {
        let slot = superblock.generation % SLOTS;
        let page = superblock.encode();
        if let Err(error) = Superblock::decode(&page) {
            // Counters of a forged pool that have come to their end: the last one is kept.
            self.poison(&error);
            return Err(error);
        }
        self.device_write(slot, &page[..])?;
        self.device_sync()?;
        // The copy is for a pool that lost both slots; it need not be durable now.
        *self.superblock.lock() = superblock.clone();
        let mut stale = self.stale_copies.lock().clone();
        stale.retain(|old| old.generation % SLOTS != slot);
        stale.push(superblock.clone());
        self.write_copies(stale)
    }

    /// Writes the copies that an earlier flip, or the open, could not, before `superblock` makes
    /// them older still. Where the pool grows there are newer ones at its new end.
    fn renew_copies(&self, superblock: &Superblock) -> Result<()> {
        let mut stale = self.stale_copies.lock().clone();
        stale.retain(|old| old.blocks == superblock.blocks);
        self.write_copies(stale)
    }

    /// Writes copies of the slots. One that the host has no space for stops nothing, because it
    /// matters only when both slots are gone: the next flip tries it again, and until then it is
    /// said that it is old.
    fn write_copies(&self, copies: Vec<Superblock>) -> Result<()> {
        let mut stale = Vec::new();
        for copy in copies {
            let place = copy.end_block() + copy.generation % SLOTS;
            let addr = place * BLOCK_SIZE as u64;
            let written = self.device.write_at(addr, &copy.encode()[..]);
            let context = || format!("cannot write a copy of the superblock: block={place}");
            match written.map_err(|source| Error::io(context(), source)) {
                Err(error) if error.kind() == Kind::NoSpace => stale.push((copy, error)),
                written => written.inspect_err(|error| self.poison(error))?,
            }
        }
        let was_stale = !self.stale_copies.lock().is_empty();
        match stale.first() {
            Some((_, error)) if !was_stale => log::warn!(
                "{error}; if both superblocks are damaged there is no newer copy: free some space \
                 on the filesystem that holds the pool"
            ),
            None if was_stale => log::warn!("the copies of the superblock are as new again"),
            _ => {}
        }
        *self.stale_copies.lock() = stale.into_iter().map(|(copy, _)| copy).collect();
        Ok(())
    }

    /// What the flipped generation freed may be allocated again.
    fn release(&self) {
        self.meta.write().written();
        self.readers.wait(); // I3 of the cache
        let mut meta = self.meta.write();
        meta.space.release(floor_blocks);
        let generation = meta.generation;
        meta.space.trim(BITMAPS_MAX, generation);
    }
}

impl Meta {
    /// Stores the changed group records. True if any was changed.
    fn store_groups(&mut self) -> Result<bool> {
        let mut any = false;
        while let Some((group, free)) = self.space.next_changed() {
            any = true;
            let mut root = self.groups;
            let key = u128::from(group);
            let stored = self.insert(&mut root, TreeKind::Groups, key, &encode_group(free));
            self.groups = root;
            stored?;
        }
        Ok(any)
    }

    /// Seals all dirty nodes. Extent maps come first, because inode records hold their roots.
    fn seal_all(&mut self) -> Result<()> {
        let mut sealed = BlockMap::default();
        for ino in self.changed_files.clone() {
            let mut inode = self.inode(Ino(ino))?;
            self.seal(&mut inode.root, &mut sealed)?;
            self.put_inode(Ino(ino), &inode)?;
        }
        if self.detached_dirty {
            for (id, mut root) in self.all_detached()? {
                let before: Root = root;
                self.seal(&mut root, &mut sealed)?;
                if root != before {
                    self.put_detached(id, root)?;
                }
            }
        }
        // Those records were changed in this generation, so storing them allocated nothing.
        assert!(
            self.space.delta.is_empty(),
            "sealing must not change reference counts"
        );
        for kind in [
            TreeKind::Sums,
            TreeKind::Groups,
            TreeKind::Refs,
            TreeKind::Namespace,
        ] {
            let mut root = *self.root_mut(kind);
            self.seal(&mut root, &mut sealed)?;
            *self.root_mut(kind) = root;
        }
        if sealed.len() != self.dirty_count() {
            return Err(Error::corrupt(format!(
                "dirty nodes are not reachable: dirty={} sealed={}",
                self.dirty_count(),
                sealed.len()
            )));
        }
        Ok(())
    }

    fn root_mut(&mut self, kind: TreeKind) -> &mut Root {
        match kind {
            TreeKind::Namespace => &mut self.namespace,
            TreeKind::Refs => &mut self.refs,
            TreeKind::Sums => &mut self.sums,
            TreeKind::Groups => &mut self.groups,
            TreeKind::Extents => unreachable!("each file has its own"),
        }
    }

    /// Writes the trees of this generation into a superblock.
    fn describe(&self, sb: &mut Superblock) {
        sb.generation = self.generation;
        sb.blocks = self.space.end_after() + SLOTS;
        sb.next_ino = self.next_ino;
        sb.next_detached = self.next_detached;
        sb.inodes = self.inodes;
        sb.logical = self.logical;
        sb.free = self.space.free_after();
        sb.namespace = self.namespace;
        sb.refs = self.refs;
        sb.sums = self.sums;
        sb.groups = self.groups;
    }
}
