//! Destage: the frozen half of the stage gets its place in the pool. And the reaper, which frees
//! extent maps that nobody uses, bit by bit.
//!
//! Invariants:
//!
//! 1. A mapping is installed before its block leaves the stage, so a reader finds one or the
//!    other.
//! 2. A block is mapped only if it is still the frozen one: what was overwritten, truncated or
//!    punched meanwhile is dropped, and its new place is free again.
//! 3. If the host has no space blocks stay staged, as if nothing had been tried.
//! 4. Blocks of a file go to consecutive places in the order of the file.

use std::sync::Arc;

use crate::error::{Kind, Result};
use crate::ondisk::extent::Extent;
use crate::ondisk::inode::InodeKind;
use crate::units::{BLOCK_SIZE, Ino};

use super::apply::mapped_now;
use super::meta::Meta;
use super::pool::Pool;
use super::space::Class;
use super::stage::Staged;

/// Blocks placed in one step, 1 MiB: one large write, mapped under one hold of the trees. Those who
/// wait for room in the stage go on after each step, so that longer ones make them wait longer.
const STEP: usize = 256;
/// Leaves of a dead extent map that are freed under one hold of the trees.
const REAP_STEP: usize = 32;

/// A block of a file with its place; zeros need none.
type Placed = (u64, Staged, Option<u64>);

impl Pool {
    /// Destages everything staged now.
    pub(crate) fn destage_all(&self) -> Result<()> {
        let _destaging = self.destaging.lock();
        self.stage.lock().freeze(None);
        self.destage_frozen()
    }

    /// Destages one file. The caller owns it, so that nothing is added meanwhile.
    pub(crate) fn destage_file(&self, ino: Ino) -> Result<()> {
        if self
            .stage
            .lock()
            .file(ino)
            .is_none_or(|file| file.is_empty())
        {
            return Ok(());
        }
        let _destaging = self.destaging.lock();
        self.stage.lock().freeze(Some(ino));
        self.destage_inode(ino)?;
        self.relief.notify_all();
        Ok(())
    }

    /// Destages the frozen half. The caller holds `destaging`.
    pub(crate) fn destage_frozen(&self) -> Result<()> {
        let inos = self.stage.lock().inos();
        for ino in inos {
            self.destage_inode(ino)?;
        }
        self.relief.notify_all();
        Ok(())
    }

    fn destage_inode(&self, ino: Ino) -> Result<()> {
        let mut from = 0;
        loop {
            // A step at a time: writers wait for the lock.
            let step = self.stage.lock().frozen(ino, from, STEP);
            let Some((last, _)) = step.last() else {
                return Ok(());
            };
            from = last + 1;
            let placed = self.place_staged(&step)?;
            self.map_placed(ino, placed)?;
            self.relief.notify_all();
        }
    }

    /// Writes staged blocks to new places; if the host has no space for them, to where it keeps
    /// some for the pool.
    fn place_staged(&self, blocks: &[(u64, Staged)]) -> Result<Vec<Placed>> {
        let full = blocks
            .iter()
            .filter(|(_, staged)| staged.data.is_some())
            .count();
        let runs = match self.alloc_runs(Class::Data, full as u32) {
            Err(error) if error.kind() == Kind::NoSpace => {
                // The reserve should make this impossible; without a place nothing can go on.
                self.poison(&error);
                return Err(error);
            }
            runs => runs?,
        };
        match self.write_staged_to(blocks, &runs) {
            Err(error) if error.kind() == Kind::NoSpace => self.free_unused(runs),
            Ok(placed) => {
                if full > 0 {
                    self.host_accepted();
                }
                return Ok(placed);
            }
            failed => return failed,
        }
        let runs = self.alloc_runs(Class::Rescue, full as u32)?;
        let placed = self.write_staged_to(blocks, &runs);
        placed.inspect_err(|error| {
            if error.kind() == Kind::NoSpace {
                self.free_unused(runs); // I3
            }
        })
    }

    fn write_staged_to(&self, blocks: &[(u64, Staged)], runs: &[Extent]) -> Result<Vec<Placed>> {
        let mut places = runs.iter().flat_map(|run| run.block..run.end());
        let placed: Vec<Placed> = blocks
            .iter()
            .map(|(at, staged)| {
                (
                    *at,
                    staged.clone(),
                    staged.data.as_ref().and_then(|_| places.next()),
                )
            })
            .collect();
        let mut data = placed
            .iter()
            .filter_map(|(_, staged, place)| staged.data.as_ref().zip(*place));
        let step = (self.buffers.chunk_max() / BLOCK_SIZE) as u32;
        for run in runs {
            let mut done = 0;
            while done < run.len {
                let piece = run.tail(done).head(step.min(run.len - done));
                let mut buffer = self.buffers.take(piece.len as usize * BLOCK_SIZE);
                for (bytes, (page, place)) in buffer.chunks_exact_mut(BLOCK_SIZE).zip(data.by_ref())
                {
                    bytes.copy_from_slice(&page[..]);
                    self.cache.put(place, Arc::clone(page)); // I1 of the cache
                }
                self.device_write(piece.block, &buffer)?;
                done += piece.len;
            }
        }
        Ok(placed)
    }

    fn map_placed(&self, ino: Ino, placed: Vec<Placed>) -> Result<()> {
        let mut meta = self.meta.write();
        let (live, dead): (Vec<_>, Vec<_>) = {
            let stage = self.stage.lock();
            placed
                .into_iter()
                .partition(|(at, staged, _)| stage.is_frozen(ino, *at, staged))
        };
        for (_, _, place) in dead {
            if let Some(block) = place {
                meta.space.unalloc(Extent { block, len: 1 }); // I2
            }
        }
        if live.is_empty() {
            return Ok(());
        }
        map_live(&mut meta, ino, &live).inspect_err(|error| self.poison(error))?;
        let mut stage = self.stage.lock();
        for (at, staged, _) in &live {
            stage.thawed(ino, *at, staged); // I1
        }
        Ok(())
    }

    /// Frees a piece of an extent map that nobody uses. False if there is none.
    pub(crate) fn reap(&self) -> Result<bool> {
        self.check_poison()?;
        if self.excess() > 0 {
            self.checkpoint()?;
        }
        let _gate = self.gate.read();
        let mut meta = self.meta.write();
        let Some((id, mut root)) = meta.first_detached()? else {
            return Ok(false);
        };
        for _ in 0..REAP_STEP {
            if root.is_empty() {
                break;
            }
            meta.drop_some(&mut root)
                .inspect_err(|error| self.poison(error))?;
        }
        meta.put_detached(id, root)
            .inspect_err(|error| self.poison(error))?;
        Ok(true)
    }
}

/// Maps blocks that are still wanted: runs of neighbours with one change of the tree each.
fn map_live(meta: &mut Meta, ino: Ino, live: &[Placed]) -> Result<()> {
    let mut inode = meta.inode(ino)?;
    assert!(
        inode.kind == InodeKind::Regular,
        "only files have staged blocks"
    );
    let mut i = 0;
    while i < live.len() {
        let (at, _, place) = &live[i];
        let len = live[i..]
            .iter()
            .enumerate()
            .take_while(|(n, next)| {
                next.0 == at + *n as u64 && next.2 == place.map(|place| place + *n as u64)
            })
            .count();
        let end = at + len as u64;
        let (before, _) = meta.count_mapped(inode.root, *at, end)?;
        inode.mapped = mapped_now(inode.mapped, before, 0)?;
        match place {
            Some(block) => {
                let run = Extent {
                    block: *block,
                    len: len as u32,
                };
                meta.map(&mut inode.root, *at, run)?;
                let sums: Vec<u32> = live[i..i + len].iter().map(|(_, s, _)| s.crc).collect();
                meta.set_sums(run, &sums)?;
                inode.mapped += len as u64;
            }
            None => meta.unmap(&mut inode.root, *at, end)?,
        }
        i += len;
    }
    meta.put_inode(ino, &inode)
}
