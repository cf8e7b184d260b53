//! Superblock slots and their copies: whole, where they belong, and in step with each other.
//!
//! What a crash leaves is no finding: a copy is written after its slot and made durable by the
//! next checkpoint, so it may be one round (two generations) behind. And while the pool grows,
//! copies of both slots, which have the old size, are put at the new end first; they may lie over
//! copies at the old end.

use crate::engine::slots::{Content, decode_at, read_place};
use crate::ondisk::superblock::{SLOTS, Superblock};

use super::{Checker, Subject, code};

impl Checker<'_> {
    /// Checks both slots and both copies.
    pub(super) fn check_slots(&mut self) {
        let sb = self.reader.sb;
        let device = self.reader.device;
        for slot in 0..SLOTS {
            let name = if slot == 0 { "A" } else { "B" };
            let content = read_place(device, slot, false);
            let place = sb.end_block() + slot;
            let copy = self.as_left_by_growing(read_place(device, place, true), place, slot);
            // Slot of generation g is g mod 2; the other one was written right before, unless a
            // forged one says that there was none.
            let expected = sb
                .generation
                .saturating_sub((sb.generation % SLOTS + slot) % SLOTS);
            if let Some(problem) = slot_problem(&content, expected, sb) {
                let text = format!("superblock slot {name} {problem}");
                self.find(code::SUPERBLOCK, Subject::Pool, text);
            }
            if let Some(problem) = copy_problem(&copy, expected, content.whole(), sb) {
                let text = format!("the copy of superblock slot {name} {problem}");
                self.find(code::SUPERBLOCK, Subject::Pool, text);
            }
        }
    }
}

fn broken(content: &Content) -> Option<String> {
    match content {
        Content::Damaged(why) => Some(format!("is damaged: {why}")),
        Content::Newer(error) | Content::Unreadable(error) => Some(format!("is damaged: {error}")),
        Content::Whole(_) | Content::Blank | Content::Misplaced => None,
    }
}

impl Checker<'_> {
    /// A copy that is whole and only in a place for another size is what growing leaves for a
    /// while, also if the growth itself was lost in a crash.
    fn as_left_by_growing(&self, copy: Content, place: u64, slot: u64) -> Content {
        let Content::Damaged(why) = copy else {
            return copy;
        };
        let (device, sb) = (self.reader.device, self.reader.sb);
        match decode_at(device, place) {
            Some(found) if !is_same_pool(&found, sb) => Content::Damaged(why),
            Some(found) if found.generation % SLOTS == slot => Content::Whole(Box::new(found)),
            Some(_) => Content::Misplaced,
            None => Content::Damaged(why),
        }
    }
}

fn slot_problem(content: &Content, expected: u64, newest: &Superblock) -> Option<String> {
    match content {
        Content::Blank if expected == 0 => None, // the first checkpoint has generation 1
        Content::Blank => Some("is blank".into()),
        Content::Whole(found) if found.generation != expected => Some(format!(
            "is of generation {}, where {expected} belongs",
            found.generation
        )),
        Content::Whole(found) if expected == newest.generation && **found != *newest => {
            Some("differs from its copy".into())
        }
        Content::Whole(found) => {
            (!is_same_pool(found, newest)).then(|| "is of another pool".into())
        }
        other => broken(other),
    }
}

fn copy_problem(
    content: &Content,
    expected: u64,
    slot: Option<&Superblock>,
    newest: &Superblock,
) -> Option<String> {
    let grown = slot.is_some_and(|slot| slot.blocks != newest.blocks);
    match content {
        Content::Blank if expected <= SLOTS || grown => None,
        Content::Blank => Some("is blank".into()),
        Content::Whole(found) if !is_same_pool(found, newest) => Some("is of another pool".into()),
        Content::Whole(found) if found.generation == expected => {
            let differs = slot.is_some_and(|slot| slot.generation == expected && *slot != **found);
            differs.then(|| "differs from the slot".into())
        }
        Content::Whole(found) if found.generation + SLOTS == expected || grown => None,
        Content::Whole(found) => Some(format!(
            "is of generation {}, where {expected} belongs",
            found.generation
        )),
        _ if grown => None, // whatever lay there before the pool reached so far
        other => broken(other),
    }
}

fn is_same_pool(found: &Superblock, newest: &Superblock) -> bool {
    found.uuid == newest.uuid && found.hash_key == newest.hash_key
}
