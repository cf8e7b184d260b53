//! The part of scrub that looks at fixed places: the superblocks with their copies, and the
//! journal of a pool that is not mounted.

use crate::device::BlockDevice;
use crate::error::Result;
use crate::ondisk::superblock::{FLAG_CLEAN, SLOTS, Superblock};
use crate::units::BLOCK_SIZE;

use super::super::slots::superblock_places;
use super::Run;
use super::walk::read_block;

/// What is in a place for a superblock of this pool: its generation.
type Slot = Option<u64>;

impl Run<'_> {
    /// Verifies superblocks and, where nobody writes, the journal.
    pub(super) fn check_places(&mut self) -> Result<()> {
        self.check_superblocks();
        if self.pool.read_only {
            let is_clean = self.pool.superblock.lock().flags & FLAG_CLEAN != 0;
            let lost = match is_clean {
                true => None,
                false => self.pool.journal.lock().lost()?,
            };
            if let Some(lost) = lost {
                self.scrub.other(format!(
                    "the journal lost acknowledged writes: batch {} is damaged or gone, but was durable when batch {} was written; run check",
                    lost.missing, lost.later
                ));
            }
        }
        Ok(())
    }

    fn check_superblocks(&mut self) {
        let pool = self.pool;
        let mut bad = self.bad_superblocks();
        // A crash may have torn the copy that was being written; and what is written anew is
        // sound again. Two checkpoints write every place.
        if !bad.is_empty() && !pool.read_only {
            let before = std::mem::take(&mut bad);
            for _ in 0..SLOTS {
                if let Err(error) = pool.checkpoint() {
                    log::warn!("scrub: superblocks cannot be written anew: {error}");
                    break;
                }
            }
            bad = self.bad_superblocks();
            // A slot that nobody was writing was damaged, although it is sound now.
            let mended = before
                .into_iter()
                .filter(|was| bad.iter().all(|is| is.0 != was.0));
            for (at, text) in mended {
                if at < SLOTS {
                    self.scrub.other(format!("{text}; it was written anew"));
                } else {
                    log::warn!("scrub: {text}; it was written anew");
                }
            }
        }
        bad.into_iter().for_each(|(_, text)| self.scrub.other(text));
    }

    /// What is wrong with superblocks and copies, by their blocks.
    fn bad_superblocks(&self) -> Vec<(u64, String)> {
        // Nobody writes one meanwhile.
        let _one = self.pool.checkpointing.lock();
        let newest = self.pool.superblock.lock().clone();
        let blocks = self.pool.device.len() / BLOCK_SIZE as u64;
        let mut places = superblock_places(blocks);
        places.truncate(SLOTS as usize);
        places.extend((0..SLOTS).map(|slot| newest.end_block() + slot));
        let found: Vec<Slot> = places
            .iter()
            .map(|at| generation_at(&*self.pool.device, *at, &newest))
            .collect();
        let mut bad = Vec::new();
        for (i, (at, found)) in places.iter().zip(&found).enumerate() {
            let newest_here = i as u64 % SLOTS == newest.generation % SLOTS;
            let is_copy = i as u64 >= SLOTS;
            let expected = match newest_here {
                true => Some(newest.generation),
                // The first checkpoint of a pool has none before it.
                false => newest.generation.checked_sub(1).filter(|g| *g > 0),
            };
            // A crash leaves the place that was being written as it may be.
            let torn = self.pool.read_only && newest.flags & FLAG_CLEAN == 0;
            let what = if is_copy {
                "copy of a superblock"
            } else {
                "superblock"
            };
            match (found, expected) {
                (_, None) => {}
                (Some(found), Some(expected)) if *found == expected => {}
                // The last copy is not waited for.
                (Some(found), Some(expected)) if is_copy && *found + SLOTS == expected => {}
                _ if self.pool.read_only && is_copy => {
                    log::warn!("scrub: a {what} is not valid: block={at}; the next mount writes it anew");
                }
                (_, Some(_)) if torn && !newest_here => {}
                (Some(found), Some(expected)) => bad.push((*at, format!(
                    "a {what} is not the one that was written: block={at} generation={found} expected={expected}"
                ))),
                (None, Some(_)) => bad.push((*at, format!("a {what} is damaged: block={at}"))),
            }
        }
        bad
    }
}

/// The generation of the superblock at a block; `None` if there is none of this pool.
fn generation_at(device: &dyn BlockDevice, block: u64, newest: &Superblock) -> Slot {
    let mut page = [0; BLOCK_SIZE];
    read_block(device, block, &mut page).ok()?;
    let found = Superblock::decode(&page).ok()?;
    (found.uuid == newest.uuid).then_some(found.generation)
}
