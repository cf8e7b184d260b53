//! Repair: what a check found, put right, without ever making it worse.
//!
//! Invariants:
//!
//! 1. Everything is read first, and the whole repaired state is built twice: once to tell what
//!    will be done, without writing, and, if that is agreed to, once for good.
//! 2. New nodes go to blocks that nothing reachable refers to, by the check's own counts, and that
//!    no waiting batch of the journal maps. The recorded free space is not believed.
//! 3. They are made durable, and then one superblock flips. Until then the old state is untouched;
//!    a crash leaves the old or the new state.
//! 4. What cannot be read any more is marked as lost, and named: it reads as an error, never as
//!    zeros. What lost its name is in `lost+found`.
//! 5. A waiting journal is replayed onto the repaired trees, and what has nothing to act on is
//!    left out and counted. Then everything is checked again, and repaired again if need be.
//!
//! New trees are built bottom-up from sorted records (`load.rs`), not with the engine's B+tree:
//! that one allocates by the recorded free space and changes counts as it goes, both of which
//! cannot be relied on here. Maps are mended node by node (`maps.rs`), so that what clones share
//! stays shared.
//!
//! Memory: all names and inodes (about 400 bytes for each), about 100 bytes for each node of the
//! extent maps, and the counts of all blocks, which are bounded by the same option as a check's.

mod load;
mod maps;
mod names;
mod refs;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::device::BlockDevice;
use crate::error::{Error, Kind, Result};
use crate::ondisk::inode::{FLAG_PINNED, InodeKind};
use crate::ondisk::node::TreeKind;
use crate::ondisk::record::Record;
use crate::ondisk::superblock::{
    FLAG_CLEAN, FLAG_EXTERNAL_JOURNAL, FLAG_REPAIRED, SLOTS, Superblock,
};
use crate::units::{BLOCK_SIZE, Time};

use super::check::journal::Ring;
use super::check::ledger::Ledger;
use super::check::walk::{ALL, Event, Reader, walk};
use super::check::{Marks, code, count_references, survey};
use super::pool::Pool;
use super::slots::{Slots, heal};
use super::types::{Action, CheckOptions, CheckReport, OpenOptions, RepairReport};

use load::{Free, Loader, Site, Writer};
use maps::Maps;
use names::Names;

const B: u64 = BLOCK_SIZE as u64;
/// Rounds of check and repair; the second one is for what a journal brought along.
const ROUNDS_MAX: usize = 4;
/// Memory of the pool that replays the journal.
const REPLAY_CACHE: u64 = 64 * 1024 * 1024;
/// More blocks than any file has.
const ALL_BLOCKS: u64 = u64::MAX >> 8;

/// Numbers of actions. Never used again for another; documented in `docs/check.md`.
pub(crate) mod act {
    pub(crate) const SUPERBLOCK: u32 = 1;
    pub(crate) const COUNTS: u32 = 2;
    pub(crate) const SUMS: u32 = 3;
    pub(crate) const LOST_DATA: u32 = 4;
    pub(crate) const LOST_FOUND: u32 = 5;
    pub(crate) const ENTRY: u32 = 6;
    pub(crate) const INODE: u32 = 7;
    pub(crate) const DIRECTORY: u32 = 8;
    pub(crate) const VALUE: u32 = 9;
    pub(crate) const REPLAY: u32 = 10;
    pub(crate) const LEFT_OUT: u32 = 11;
    pub(crate) const RECORD: u32 = 12;
    pub(crate) const DETACHED: u32 = 13;
    pub(crate) const OVERLAP: u32 = 14;
}

impl Pool {
    /// Checks a pool that is not open, and repairs what is found. `confirm` is shown what will be
    /// done, before anything is written, and may decline.
    ///
    /// # Errors
    /// As [`check_with`](Self::check_with); `NoSpace` if the pool has too few free blocks for new
    /// trees; `Io` if the device fails: then the old state or the new one is there.
    pub fn repair(
        device: Arc<dyn BlockDevice>,
        journal: Option<Arc<dyn BlockDevice>>,
        options: &CheckOptions,
        now: Time,
        confirm: &mut dyn FnMut(&CheckReport, &[Action]) -> bool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<RepairReport> {
        let mut repair = Repair {
            device,
            journal,
            options: options.clone(),
            now,
        };
        repair.run(confirm, progress)
    }
}

struct Repair {
    device: Arc<dyn BlockDevice>,
    journal: Option<Arc<dyn BlockDevice>>,
    options: CheckOptions,
    now: Time,
}

/// What the waiting journal needs.
#[derive(Debug, Default)]
struct Waiting {
    batches: u64,
    /// Blocks that it maps, sorted runs.
    placed: Vec<(u64, u64)>,
    /// The first inode number that it does not use.
    next_ino: u64,
    /// How large it makes files, in bytes, by inode.
    sizes: BTreeMap<u64, u64>,
}

impl Repair {
    fn run(
        &mut self,
        confirm: &mut dyn FnMut(&CheckReport, &[Action]) -> bool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<RepairReport> {
        let mut done = RepairReport::default();
        for round in 0..ROUNDS_MAX {
            let sb = self.superblock()?;
            let (report, marks) = self.survey(&sb, progress)?;
            if round == 0 {
                done.before = report.clone();
            }
            done.after = report.clone();
            let waiting = self.waiting(&sb);
            if report.findings.is_empty() {
                // A repair that was cut short: what it began is brought to its end.
                if sb.flags & FLAG_REPAIRED == 0 || waiting.batches == 0 {
                    return Ok(done);
                }
                self.replay_told(&mut done)?;
                continue;
            }
            let old = self.count(&sb)?;
            let (planned, actions) = self.build(&sb, &report, &marks, &waiting, &old, None)?;
            if round == 0 && !confirm(&report, &actions) {
                done.declined = true;
                done.planned = actions;
                return Ok(done);
            }
            let device = self.device.clone();
            let (new, actions) =
                self.build(&sb, &report, &marks, &waiting, &old, Some(&*device))?;
            if new != planned {
                return Err(Error::corrupt(
                    "the pool reads differently each time: look at the disk below it; nothing \
                     that was there has changed",
                ));
            }
            drop(old);
            self.flip(&sb, &new)?;
            done.actions.extend(actions);
            if waiting.batches > 0 || has_code(&report, code::JOURNAL) {
                self.replay_told(&mut done)?;
            }
        }
        let sb = self.superblock()?;
        done.after = self.survey(&sb, progress)?.0;
        Ok(done)
    }

    fn superblock(&self) -> Result<Superblock> {
        let sb = Slots::read(&*self.device, u64::MAX).newest(false)?;
        if sb.blocks > self.device.len() / B {
            return Err(Error::corrupt(format!(
                "the pool is cut off: it has {} bytes and its device only {}; restore it from a backup",
                sb.blocks * B,
                self.device.len()
            )));
        }
        if sb.flags & FLAG_EXTERNAL_JOURNAL != 0 && self.journal.is_none() {
            return Err(Error::new(
                Kind::Invalid,
                "the pool has its journal on another device: name it with --journal",
            ));
        }
        Ok(sb)
    }

    fn survey(
        &self,
        sb: &Superblock,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(CheckReport, Marks)> {
        let journal = self.journal.as_deref();
        survey(&*self.device, journal, sb, &self.options, progress)
    }

    /// References of the old state, of the whole pool at once.
    fn count(&self, sb: &Superblock) -> Result<Ledger> {
        let ledger = count_references(&*self.device, sb, &self.options)?;
        if ledger.reaches(sb.end_block()) {
            return Ok(ledger);
        }
        Err(self.too_little_memory())
    }

    fn too_little_memory(&self) -> Error {
        let message = format!(
            "repair counts the references of all blocks at once, which does not fit into {} \
             bytes: allow it more",
            self.options.memory
        );
        Error::new(Kind::TooLarge, message)
    }

    fn waiting(&self, sb: &Superblock) -> Waiting {
        let device = match sb.flags & FLAG_EXTERNAL_JOURNAL != 0 {
            true => self.journal.as_ref().unwrap_or(&self.device),
            false => &self.device,
        };
        let ring = Ring {
            device: &**device,
            sb,
        };
        let mut waiting = Waiting::default();
        ring.waiting(&mut |_, batch| {
            waiting.batches += 1;
            for record in &batch.records {
                match record {
                    Record::Map { extent, .. } => {
                        waiting.placed.push((extent.block, extent.end()));
                    }
                    Record::Create { ino, .. } => {
                        waiting.next_ino = waiting.next_ino.max(ino.0.saturating_add(1));
                    }
                    Record::Show { dst: ino, size, .. }
                    | Record::Touch { ino, size, .. }
                    | Record::Truncate { ino, size, .. } => {
                        let largest = waiting.sizes.entry(ino.0).or_default();
                        *largest = (*largest).max(*size);
                    }
                    _ => {}
                }
            }
        });
        waiting.placed.sort_unstable();
        waiting
    }

    /// Builds the repaired state; on `target`, or nowhere, to see what it will be.
    fn build(
        &self,
        sb: &Superblock,
        report: &CheckReport,
        marks: &Marks,
        waiting: &Waiting,
        old: &Ledger,
        target: Option<&dyn BlockDevice>,
    ) -> Result<(Superblock, Vec<Action>)> {
        let mut new = sb.clone();
        new.generation += 1;
        // Whoever replays the journal, be it after a crash: it does not refuse what is left.
        new.flags = new.flags & !FLAG_CLEAN | FLAG_REPAIRED;
        let mut actions = Vec::new();
        let only_superblocks = report
            .findings
            .iter()
            .all(|finding| matches!(finding.code, code::SUPERBLOCK | code::JOURNAL));
        if has_code(report, code::SUPERBLOCK) {
            actions.push(Action {
                code: act::SUPERBLOCK,
                message: "write the superblock slots and their copies anew".into(),
            });
        }
        if !only_superblocks || report.more > 0 {
            let reader = Reader {
                device: &*self.device,
                sb,
            };
            let site = Site {
                writer: Writer::new(target, new.generation, sb.pool_id()),
                free: Free::new(old, &waiting.placed),
            };
            self.build_trees(reader, site, marks, waiting, &mut new, &mut actions)?;
        }
        if waiting.batches > 0 || has_code(report, code::JOURNAL) {
            actions.push(Action {
                code: act::REPLAY,
                message: format!("replay the journal: {} batches", waiting.batches),
            });
        }
        Ok((new, actions))
    }

    fn build_trees(
        &self,
        reader: Reader<'_>,
        mut site: Site<'_, '_>,
        marks: &Marks,
        waiting: &Waiting,
        new: &mut Superblock,
        actions: &mut Vec<Action>,
    ) -> Result<()> {
        let sb = reader.sb;
        let mut names = self.survivors(reader, actions);
        names.next_ino = names.next_ino.max(waiting.next_ino);
        names.mend();
        actions.append(&mut names.actions);
        let room = self.options.memory as usize;
        let counts = Ledger::new(sb.first_block(), sb.end_block(), room);
        let mut maps = Maps::new(reader, &marks.bad, counts);
        mend_maps(&mut maps, &mut site, &mut names, waiting)?;
        actions.append(&mut names.actions);
        let mut counts = maps.new;
        let mut loader = Loader::new(TreeKind::Namespace);
        for (at, value) in names.records()? {
            loader.push(&mut site, at, &value)?;
        }
        let (root, blocks) = loader.finish(&mut site)?;
        new.namespace = root;
        for block in blocks {
            counts.add_node(block, TreeKind::Namespace);
        }
        if marks.sums_lost || !marks.unsummed.is_empty() {
            new.sums = refs::rebuild_sums(reader, &mut site, &mut counts, &marks.unsummed)?;
            actions.push(Action {
                code: act::SUMS,
                message: format!(
                    "rebuild the checksums; of {} blocks they are lost, and taken from what is \
                     there now",
                    marks.unsummed.iter().map(|run| run.1 - run.0).sum::<u64>()
                ),
            });
        } else {
            refs::adopt_sums(reader, &mut counts);
        }
        if !counts.reaches(sb.end_block()) {
            return Err(self.too_little_memory());
        }
        new.next_ino = names.next_ino;
        (new.inodes, new.logical) = names.sums();
        let last = names.detached.keys().next_back().map_or(0, |last| last + 1);
        new.next_detached = new.next_detached.max(last);
        refs::build(&mut site, &counts, new)?;
        site.writer.flush()?;
        actions.push(Action {
            code: act::COUNTS,
            message: "rebuild the counts of references and of free space".into(),
        });
        Ok(())
    }

    /// All records of the namespace that can be read.
    fn survivors(&self, reader: Reader<'_>, actions: &mut Vec<Action>) -> Names {
        let mut names = Names::new(reader.sb, self.now);
        let root = reader.sb.namespace;
        let mut lost = 0;
        walk(
            reader,
            &mut names,
            root,
            TreeKind::Namespace,
            ALL,
            &mut |names, event| {
                match event {
                    Event::Record { key, value } => names.take(key, value),
                    Event::Lost { .. } => lost += 1,
                    Event::Node { .. } | Event::Misplaced { .. } => {}
                }
                true
            },
        );
        if lost > 0 {
            actions.push(Action {
                code: act::RECORD,
                message: format!("give up {lost} damaged parts of the namespace"),
            });
        }
        names
    }

    /// I3: durable first, then the flip; the copies last.
    fn flip(&self, old: &Superblock, new: &Superblock) -> Result<()> {
        let device = &*self.device;
        let failed = |source| Error::io("cannot write the repaired state", source);
        device.sync().map_err(failed)?;
        // If the old state is known from a copy only, it gets its slot before the other one
        // changes.
        heal(device, old)?;
        device
            .write_at(new.generation % SLOTS * B, &new.encode()[..])
            .map_err(failed)?;
        device.sync().map_err(failed)?;
        heal(device, new)?;
        device.sync().map_err(failed)
    }

    /// Replays the journal, and says what had to be left out.
    fn replay_told(&self, done: &mut RepairReport) -> Result<()> {
        let left_out = self.replay()?;
        if left_out > 0 {
            done.actions.push(Action {
                code: act::LEFT_OUT,
                message: format!(
                    "left out {left_out} records of the journal: what they are about is lost"
                ),
            });
        }
        Ok(())
    }

    /// I5: returns how many records were left out.
    fn replay(&self) -> Result<u64> {
        let options = OpenOptions {
            read_only: false,
            cache_size: REPLAY_CACHE,
        };
        let (device, journal) = (self.device.clone(), self.journal.clone());
        // What lies behind a batch that is gone is of no use without it.
        Pool::accept_loss(&device, journal.as_ref())?;
        let pool = match Pool::open(device, journal, &options) {
            Ok(pool) => pool,
            Err(error) if error.kind() == Kind::Corrupt => {
                // Not even parts of it can be replayed. Checkpoints on the way may have given
                // away what the state before them refers to: the newest one counts.
                let newest = self.superblock()?;
                let mut dropped = newest.clone();
                dropped.generation += 1;
                dropped.journal_seq += dropped.journal_blocks;
                self.flip(&newest, &dropped)?;
                return Ok(1);
            }
            Err(error) => return Err(error),
        };
        let left_out = pool.replayed.lock().left_out;
        pool.close()?;
        Ok(left_out)
    }
}

/// Mends the extent maps of all files, and of those that wait to be freed.
fn mend_maps(
    maps: &mut Maps<'_>,
    site: &mut Site<'_, '_>,
    names: &mut Names,
    waiting: &Waiting,
) -> Result<()> {
    let inos: Vec<u64> = names.inodes.keys().copied().collect();
    for ino in inos {
        let Some(mut inode) = names.inodes.get(&ino).copied() else {
            continue;
        };
        if inode.kind != InodeKind::Regular {
            continue;
        }
        let mut blocks = inode.size.div_ceil(B);
        if inode.flags & FLAG_PINNED != 0 {
            blocks = match (maps.is_whole(inode.root), waiting.sizes.get(&ino)) {
                (true, _) => ALL_BLOCKS,
                // What is damaged must not become zeros once the journal shows it. What nothing
                // will show any more is given up.
                (false, size) => blocks.max(size.map_or(0, |size| size.div_ceil(B))),
            };
        }
        let mended = maps.mend(site, inode.root, blocks)?;
        (inode.root, inode.mapped) = (mended.root, mended.mapped);
        names.inodes.insert(ino, inode);
        if mended.cut > 0 {
            let path = names.path(ino);
            let message = format!("cut {} extents of {path} that others overlap", mended.cut);
            let code = act::OVERLAP;
            names.actions.push(Action { code, message });
        }
        for (from, to) in mended.lost {
            let path = names.path(ino);
            let message = format!(
                "mark bytes {} to {} of {path} as lost: they cannot be read any more",
                from * B,
                to.min(blocks).saturating_mul(B)
            );
            let code = act::LOST_DATA;
            names.actions.push(Action { code, message });
        }
    }
    let mut gone = Vec::new();
    for (serial, root) in &names.detached {
        if maps.is_whole(*root) {
            maps.adopt(*root);
        } else {
            gone.push(*serial);
        }
    }
    for serial in gone {
        names.detached.remove(&serial);
        names.actions.push(Action {
            code: act::DETACHED,
            message: format!("forget the damaged map {serial} of a file that was deleted"),
        });
    }
    Ok(())
}

fn has_code(report: &CheckReport, code: u32) -> bool {
    report.findings.iter().any(|finding| finding.code == code)
}
