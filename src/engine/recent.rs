//! A map of bounded size that keeps what was used recently: what both caches are made of.
//!
//! A use only sets a mark beside the value. Who needs room turns a hand over all places, takes marks
//! away and forgets the first entry without one (second chance, F. J. Corbato, 1969). A list in the
//! order of use would be more exact, but a hit has to unlink three neighbours that are in no cache
//! of the processor, which cost more than all the rest of a read from memory.
//!
//! Invariants:
//!
//! 1. A place holds the key of one entry, which knows its place, or is free.
//! 2. There are at most as many places as entries are allowed.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::num::NonZeroUsize;

/// Marks that one insertion takes away at most: after them what the hand points to goes, so that
/// nobody waits for a whole turn.
const MARKS_MAX: usize = 64;

/// Values by number, at most so many.
#[derive(Debug)]
pub(crate) struct Recent<V> {
    entries: HashMap<u64, Entry<V>, BuildHasherDefault<Mix>>,
    /// Keys by place.
    places: Vec<u64>,
    /// Places whose entry was removed.
    free: Vec<u32>,
    /// Where the next entry is forgotten.
    hand: usize,
    most: usize,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    place: u32,
    /// Used since the hand came by.
    used: bool,
}

impl<V> Recent<V> {
    /// Nothing yet; at most `most` entries.
    pub(crate) fn new(most: NonZeroUsize) -> Self {
        Self {
            entries: HashMap::default(),
            places: Vec::new(),
            free: Vec::new(),
            hand: 0,
            most: most.get().min(u32::MAX as usize),
        }
    }

    /// Entries.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The value of `key`, which counts as used.
    pub(crate) fn get(&mut self, key: u64) -> Option<&V> {
        let entry = self.entries.get_mut(&key)?;
        if !entry.used {
            entry.used = true; // what is marked already is not written to
        }
        Some(&entry.value)
    }

    /// Keeps a value. Returns the one that had to go for it, or that it replaces.
    pub(crate) fn put(&mut self, key: u64, value: V) -> Option<V> {
        if let Some(entry) = self.entries.get_mut(&key) {
            return Some(std::mem::replace(&mut entry.value, value));
        }
        let (place, old) = if let Some(place) = self.free.pop() {
            (place, None)
        } else if self.places.len() < self.most {
            self.places.push(key);
            (self.places.len() as u32 - 1, None)
        } else {
            let (place, old) = self.forget_one();
            (place, Some(old))
        };
        self.places[place as usize] = key; // I1
        let entry = Entry {
            value,
            place,
            used: false,
        };
        self.entries.insert(key, entry);
        old
    }

    /// Forgets the value of `key`, and returns it.
    pub(crate) fn remove(&mut self, key: u64) -> Option<V> {
        let entry = self.entries.remove(&key)?;
        self.free.push(entry.place);
        Some(entry.value)
    }

    /// Forgets an entry that was not used for long. No place is free.
    fn forget_one(&mut self) -> (u32, V) {
        let mut marks = 0;
        loop {
            let key = self.places[self.hand];
            self.hand = (self.hand + 1) % self.places.len();
            let entry = self
                .entries
                .get_mut(&key)
                .expect("a place that is not free has an entry"); // I1
            if entry.used && marks < MARKS_MAX {
                entry.used = false;
                marks += 1;
                continue;
            }
            let entry = self.entries.remove(&key).expect("it was found");
            return (entry.place, entry.value);
        }
    }
}

/// Mixes the bits of a block number. Nobody outside chooses which blocks there are, so this need
/// not be a keyed hash.
#[derive(Debug, Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        // An odd number whose bits look random: 2^64 divided by the golden ratio.
        let product = u128::from(self.0 ^ number) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(most: usize) -> Recent<u64> {
        Recent::new(NonZeroUsize::new(most).unwrap())
    }

    #[test]
    fn what_is_used_stays_and_what_is_not_goes() {
        let mut recent = of(8);
        for key in 0..8 {
            assert_eq!(recent.put(key, key + 100), None);
        }
        for key in 100..200 {
            assert_eq!(recent.get(3), Some(&103));
            assert!(recent.put(key, 0).is_some_and(|gone| gone != 103));
        }
        assert_eq!(recent.len(), 8);
        assert_eq!(recent.get(0), None);
    }

    #[test]
    fn where_all_are_used_one_goes_nevertheless() {
        let most = 4 * MARKS_MAX as u64;
        let mut recent = of(most as usize);
        for key in 0..2 * most {
            recent.put(key, key);
            let found = (0..=key).filter(|key| recent.get(*key).is_some()).count();
            assert_eq!(found, recent.len());
            assert!(recent.len() as u64 <= most);
        }
        assert_eq!(recent.get(2 * most - 1), Some(&(2 * most - 1)));
    }

    /// Against a map, which never forgets: what is found is the newest value, and no more is kept
    /// than allowed.
    #[test]
    fn nothing_old_is_found_after_puts_and_removals_in_any_order() {
        let (mut recent, mut map) = (of(16), HashMap::new());
        let mut seed = 1_u64;
        for round in 0..100_000_u64 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let key = (seed >> 33) % 40;
            match (seed >> 60) % 4 {
                0 => {
                    let (found, known) = (recent.remove(key), map.remove(&key));
                    assert!(found.is_none() || found == known);
                }
                1 => assert!(
                    recent
                        .get(key)
                        .is_none_or(|found| map.get(&key) == Some(found))
                ),
                _ => {
                    recent.put(key, round);
                    map.insert(key, round);
                    assert_eq!(recent.get(key), Some(&round));
                }
            }
            assert!(recent.len() + recent.free.len() == recent.places.len());
            assert!(recent.places.len() <= 16);
        }
        assert!(recent.len() > 8);
    }
}
