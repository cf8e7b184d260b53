//! Finding superblocks: two slots at the beginning, a copy of each at the end of the pool.
//!
//! Invariants:
//!
//! 1. The valid superblock with the highest generation counts. A copy is written after its slot
//!    is durable, so a newer one shows that the slot was damaged or its write lost.
//! 2. A copy counts only where it says itself that it belongs, right behind the last block of a
//!    pool of its size, or at the end of the device, where growing puts copies first. So an old
//!    copy inside a pool that has grown, or one in the data of a pool, is not taken for one. And
//!    it is of the same pool as the slots, as far as these are whole.
//! 3. Copies are looked for at the end of the device, and where whole and damaged slots say that
//!    the pool ends. If that finds nothing, the device is searched from its end backwards.

use crate::device::BlockDevice;
use crate::error::{Error, Kind, Result};
use crate::ondisk::superblock::{
    POOL_BLOCKS_MAX, POOL_BLOCKS_MIN, SB_BLOCKS, SB_MAGIC, SLOTS, Superblock,
};
use crate::ondisk::{Page, get_u64, is_zero};
use crate::units::BLOCK_SIZE;

const B: u64 = BLOCK_SIZE as u64;
/// Bytes read at once while searching.
const SEARCH_STEP: u64 = 1024 * 1024;
/// Bytes before the end of the device that an open searches: a few seconds. A device that is
/// larger than its pool by more is a matter for `check --repair`, which searches all of it.
pub(crate) const SEARCH_AT_OPEN: u64 = 1024 * 1024 * 1024;

/// What is in a place for a superblock.
#[derive(Debug)]
pub(crate) enum Content {
    /// A valid one.
    Whole(Box<Superblock>),
    /// Zeros: nothing was written here yet.
    Blank,
    /// Something else, in words; also what another place should hold.
    Damaged(String),
    /// A copy of the other slot, as growing may leave it.
    Misplaced,
    /// A newer program wrote it.
    Newer(Error),
    /// The device cannot read it.
    Unreadable(Error),
}

impl Content {
    /// The superblock, if one is there.
    pub(crate) fn whole(&self) -> Option<&Superblock> {
        match self {
            Self::Whole(found) => Some(found),
            _ => None,
        }
    }
}

/// Reads one place. `is_copy`: by point 2 of the file it must say that it belongs there.
pub(crate) fn read_place(device: &dyn BlockDevice, block: u64, is_copy: bool) -> Content {
    let mut page: Page = [0; BLOCK_SIZE];
    if block >= device.len() / B {
        return Content::Damaged("it would lie behind the end of the device".into());
    }
    if let Err(source) = device.read_at(block * B, &mut page) {
        return Content::Unreadable(Error::io("cannot read the superblock", source));
    }
    decode_place(&page, block, is_copy)
}

fn decode_place(page: &Page, block: u64, is_copy: bool) -> Content {
    if is_zero(page) {
        return Content::Blank;
    }
    match Superblock::decode(page) {
        Ok(found) => {
            let slot = found.generation % SLOTS;
            let home = if is_copy {
                found.end_block() + slot
            } else {
                slot
            };
            if home == block {
                Content::Whole(Box::new(found))
            } else {
                Content::Damaged(format!("it belongs to block {home}"))
            }
        }
        Err(error) if error.kind() == Kind::Unsupported => Content::Newer(error),
        Err(error) => Content::Damaged(error.to_string()),
    }
}

/// All places for superblocks that were looked at.
#[derive(Debug)]
pub(crate) struct Slots {
    /// The slots A and B.
    pub(crate) slots: [Content; 2],
    /// Copies that were found whole, or were newer or unreadable, by their block.
    copies: Vec<(u64, Content)>,
}

impl Slots {
    /// Looks at the slots and the copies; searches up to `search` bytes before
    /// the end of the device if there is nothing else.
    pub(crate) fn read(device: &dyn BlockDevice, search: u64) -> Self {
        let mut found = Self {
            slots: [read_place(device, 0, false), read_place(device, 1, false)],
            copies: Vec::new(),
        };
        let blocks = device.len() / B;
        let mut ends = vec![blocks];
        for slot in 0..SLOTS {
            ends.extend(claimed_blocks(device, slot));
        }
        ends.sort_unstable();
        ends.dedup();
        for end in ends.iter().rev() {
            found.look_at_end(device, *end);
        }
        // On a device that is larger by one block one copy lies where the other would be.
        let whole = found.copies.iter().filter_map(|(_, copy)| copy.whole());
        let more: Vec<u64> = whole.map(|copy| copy.blocks).collect();
        for end in more.into_iter().filter(|end| !ends.contains(end)) {
            found.look_at_end(device, end);
        }
        if found.newest_whole().is_none() {
            found.search(device, search);
        }
        found
    }

    fn look_at_end(&mut self, device: &dyn BlockDevice, end: u64) {
        if end < POOL_BLOCKS_MIN || end > device.len() / B {
            return;
        }
        for (slot, block) in (0..).zip([end - SLOTS, end - 1]) {
            match read_place(device, block, true) {
                Content::Blank => {}
                Content::Damaged(_) if end == device.len() / B => {
                    // I2: a copy for a size that the pool does not have yet.
                    let found =
                        decode_at(device, block).filter(|found| found.generation % SLOTS == slot);
                    let found = found.map(|found| (block, Content::Whole(Box::new(found))));
                    self.copies.extend(found);
                }
                Content::Damaged(_) => {}
                content => self.copies.push((block, content)),
            }
        }
    }

    /// Point 3: from the end backwards, so that the end of a pool that has grown comes before an
    /// end that it had.
    fn search(&mut self, device: &dyn BlockDevice, search: u64) {
        let end = device.len() / B * B;
        let mut buffer = vec![0; SEARCH_STEP as usize];
        let mut at = end;
        while at > end.saturating_sub(search) && at > 0 {
            let from = at.saturating_sub(SEARCH_STEP);
            let buffer = &mut buffer[..(at - from) as usize];
            if device.read_at(from, buffer).is_ok() {
                for (i, chunk) in buffer.chunks_exact(BLOCK_SIZE).enumerate().rev() {
                    let block = from / B + i as u64;
                    if chunk[..8] != SB_MAGIC || block < SLOTS {
                        continue;
                    }
                    let mut page: Page = [0; BLOCK_SIZE];
                    page.copy_from_slice(chunk);
                    if let Content::Whole(found) = decode_place(&page, block, true) {
                        return self.look_at_end(device, found.blocks);
                    }
                }
            }
            at = from;
        }
    }

    fn newest_whole(&self) -> Option<&Superblock> {
        let slots = || self.slots.iter().filter_map(Content::whole);
        let copies = self
            .copies
            .iter()
            .filter_map(|(_, content)| content.whole());
        let copies = copies
            .filter(|copy| slots().next().is_none() || slots().any(|slot| slot.uuid == copy.uuid));
        slots().chain(copies).max_by_key(|found| found.generation)
    }

    /// The superblock that counts.
    ///
    /// # Errors
    /// `Unsupported` if a newer program wrote any; `Io` if a slot cannot be read and `strict`;
    /// `Corrupt` if there is none.
    pub(crate) fn newest(self, strict: bool) -> Result<Superblock> {
        let newest = self.newest_whole().cloned();
        let copies = self.copies.into_iter().map(|(_, content)| content);
        let mut unreadable = None;
        for content in self.slots.into_iter().chain(copies) {
            match content {
                // A newer format beats an older superblock that it left behind.
                Content::Newer(error) => return Err(error),
                Content::Unreadable(error) => unreadable = unreadable.or(Some(error)),
                _ => {}
            }
        }
        match (unreadable, newest) {
            // What cannot be read now may be the newest one, and readable tomorrow.
            (Some(error), found) if strict || found.is_none() => Err(error),
            (_, Some(found)) => Ok(found),
            (_, None) => Err(Error::new(
                Kind::Corrupt,
                "this is not a nodupe pool, or both its superblocks and their copies are damaged",
            )),
        }
    }
}

/// The superblock in a block, wherever it belongs.
pub(crate) fn decode_at(device: &dyn BlockDevice, block: u64) -> Option<Superblock> {
    let mut page: Page = [0; BLOCK_SIZE];
    device.read_at(block * B, &mut page).ok()?;
    Superblock::decode(&page).ok()
}

/// How many blocks a slot says that the pool has, be it damaged or not.
fn claimed_blocks(device: &dyn BlockDevice, slot: u64) -> Option<u64> {
    let mut page: Page = [0; BLOCK_SIZE];
    device.read_at(slot * B, &mut page).ok()?;
    let blocks = get_u64(&page, SB_BLOCKS);
    (POOL_BLOCKS_MIN..=POOL_BLOCKS_MAX)
        .contains(&blocks)
        .then_some(blocks)
}

/// Where superblocks may be, on a device that is as large as its pool.
pub(crate) fn superblock_places(blocks: u64) -> Vec<u64> {
    let mut places = vec![0, 1];
    if blocks > SLOTS * 2 {
        places.extend([blocks - 2, blocks - 1]);
    }
    places.retain(|at| *at < blocks);
    places
}

/// True if `newest` is in its slot, and not only in a copy, which may be any number of rounds old
/// where the host had no space for newer ones.
pub(crate) fn is_in_slot(device: &dyn BlockDevice, newest: &Superblock) -> bool {
    read_place(device, newest.generation % SLOTS, false).whole() == Some(newest)
}

/// Puts right what a crash or damage left of the superblocks: `newest` gets its slot, if it was
/// found as a copy only, so that the pool does not live on one block while it changes; and each
/// slot gets its copy, so that no copy is more than one round behind. Copies are made durable
/// by the next checkpoint. Returns the superblocks in slots whose copy the host had no space for.
///
/// # Errors
/// `Io` if it cannot be written.
pub(crate) fn heal(device: &dyn BlockDevice, newest: &Superblock) -> Result<Vec<Superblock>> {
    let failed = |source| Error::io("cannot write the superblock", source);
    let home = newest.generation % SLOTS;
    if !is_in_slot(device, newest) {
        let name = if home == 0 { "A" } else { "B" };
        log::warn!("superblock slot {name} is damaged, and is written anew from its copy");
        device
            .write_at(home * B, &newest.encode()[..])
            .map_err(failed)?;
        device.sync().map_err(failed)?;
    }
    let mut stale = Vec::new();
    for slot in 0..SLOTS {
        let Content::Whole(found) = read_place(device, slot, false) else {
            continue;
        };
        let place = newest.end_block() + slot;
        // What contradicts the one that counts, as a forged one may, is not spread any further.
        let agrees = found.blocks == newest.blocks && found.first_block() == newest.first_block();
        if agrees && read_place(device, place, true).whole() != Some(&*found) {
            match device
                .write_at(place * B, &found.encode()[..])
                .map_err(failed)
            {
                // As for a checkpoint: a host without space is no reason to refuse a pool.
                Err(error) if error.kind() == Kind::NoSpace => stale.push(*found),
                written => written?,
            }
        }
    }
    Ok(stale)
}
