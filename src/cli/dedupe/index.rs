//! Which blocks may be equal: those with one checksum and several places.
//!
//! The space of checksums is gone through in parts, as many as memory asks for, so that nothing is
//! missed however much there is.
//!
//! Invariants:
//!
//! 1. Memory is bounded: at most `most` entries. A part that has more is made smaller.
//! 2. Each group is in the order in which its blocks were told: the first one stays where it is, and
//!    the others are to become it.

/// Entries of one part: with what is made of them at most 160 MiB. They stand for 16 GiB that are
/// in no other file.
pub(super) const ENTRIES_MAX: usize = 4 << 20;
/// Blocks of a group that others are compared with: more have one checksum only by ill will.
const FIRST_ONES: usize = 4;

/// A block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Entry {
    pub(super) sum: u32,
    /// Number of the file.
    pub(super) file: u32,
    /// Block of the file.
    pub(super) at: u64,
    /// Block of the pool.
    pub(super) block: u64,
}

/// A part of the space of checksums.
#[derive(Debug)]
pub(super) struct Part {
    from: u32,
    /// The last one.
    last: u32,
    most: usize,
    entries: Vec<Entry>,
}

impl Part {
    /// A part from the checksum `from` on, as large as `most` entries allow.
    pub(super) fn new(from: u32, most: usize) -> Self {
        Self {
            from,
            last: u32::MAX,
            most,
            entries: Vec::new(),
        }
    }

    /// The last checksum in it, once all was told.
    pub(super) fn last(&self) -> u32 {
        self.last
    }

    /// Tells a block. What comes first stays.
    pub(super) fn add(&mut self, entry: Entry) {
        if entry.sum < self.from || entry.sum > self.last {
            return;
        }
        if self.entries.len() == self.most {
            self.shrink();
            if entry.sum > self.last || self.entries.len() == self.most {
                return;
            }
        }
        self.entries.push(entry);
    }

    /// Makes the part smaller (I1).
    fn shrink(&mut self) {
        self.entries.sort_unstable();
        let middle = self.entries[self.entries.len() / 2].sum;
        // One checksum alone can be too much: then later blocks of it are not looked at.
        self.last = middle.saturating_sub(1).max(self.from);
        self.entries.retain(|entry| entry.sum <= self.last);
    }

    /// The groups, once all was told.
    pub(super) fn groups(mut self) -> Groups {
        self.entries.sort_unstable();
        let mut kept = 0;
        let mut places: Vec<(u64, u32, u32)> = Vec::new();
        let mut start = 0;
        while start < self.entries.len() {
            let first = self.entries[start];
            let group = &self.entries[start..];
            let len = group
                .iter()
                .take_while(|entry| entry.sum == first.sum)
                .count();
            if group[..len].iter().any(|entry| entry.block != first.block) {
                self.entries.copy_within(start..start + len, kept);
                for i in kept..kept + len {
                    places.push((self.entries[i].block, i as u32, kept as u32));
                }
                kept += len;
            }
            start += len;
        }
        self.entries.truncate(kept);
        // A place that several files have is one of the group: where it came first.
        places.sort_unstable();
        places.dedup_by_key(|place| place.0);
        Groups {
            entries: self.entries,
            places,
        }
    }
}

/// Blocks that may be equal.
#[derive(Debug)]
pub(super) struct Groups {
    entries: Vec<Entry>,
    /// Blocks of the pool in order, each with its entry and the first one of its group.
    places: Vec<(u64, u32, u32)>,
}

impl Groups {
    /// Blocks of a run of places that may be equal to others, ascending, and those others, the
    /// first ones first.
    pub(super) fn within(
        &self,
        block: u64,
        count: u64,
    ) -> impl Iterator<Item = (u64, impl Iterator<Item = Entry>)> {
        let from = self.places.partition_point(|place| place.0 < block);
        let end = block.saturating_add(count);
        self.places[from..]
            .iter()
            .take_while(move |place| place.0 < end)
            .map(|(block, index, first)| (*block, self.before(*first as usize, *index as usize)))
            .filter_map(|(block, others)| {
                let mut others = others.peekable();
                others.peek().is_some().then_some((block, others))
            })
    }

    /// The first entries of a group, as far as they come before one of it.
    fn before(&self, first: usize, index: usize) -> impl Iterator<Item = Entry> {
        let own = self.entries[index].block;
        let others = self.entries[first..index].iter().copied();
        others
            .filter(move |entry| entry.block != own)
            .take(FIRST_ONES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(sum: u32, file: u32, at: u64, block: u64) -> Entry {
        Entry {
            sum,
            file,
            at,
            block,
        }
    }

    fn pairs(groups: &Groups, block: u64, count: u64) -> Vec<(u64, Vec<u64>)> {
        groups
            .within(block, count)
            .map(|(block, others)| (block, others.map(|other| other.block).collect()))
            .collect()
    }

    #[test]
    fn blocks_with_one_checksum_are_a_group() {
        let mut part = Part::new(0, 100);
        for told in [
            entry(5, 0, 0, 100),
            entry(6, 0, 1, 101),
            entry(7, 0, 2, 102),
            entry(5, 1, 0, 200),
            entry(7, 1, 9, 102), // the same place
            entry(5, 2, 0, 300),
            entry(5, 3, 0, 100),
        ] {
            part.add(told);
        }
        assert_eq!(part.last(), u32::MAX);
        let groups = part.groups();
        assert_eq!(
            pairs(&groups, 0, 1000),
            [(200, vec![100]), (300, vec![100, 200])]
        );
        assert_eq!(pairs(&groups, 201, 99), []);
        assert_eq!(pairs(&groups, 300, 1), [(300, vec![100, 200])]);
    }

    #[test]
    fn parts_together_miss_nothing() {
        // 1000 blocks of 500 contents, with room for 64.
        let all: Vec<Entry> = (0..1000_u32)
            .map(|i| {
                entry(
                    (i % 500).wrapping_mul(0x9e37_79b9),
                    i / 500,
                    i.into(),
                    i.into(),
                )
            })
            .collect();
        let (mut from, mut found, mut parts) = (0, Vec::new(), 0);
        loop {
            let mut part = Part::new(from, 64);
            all.iter().for_each(|entry| part.add(*entry));
            let last = part.last();
            found.extend(pairs(&part.groups(), 0, 1000));
            parts += 1;
            let Some(next) = last.checked_add(1) else {
                break;
            };
            from = next;
        }
        found.sort();
        let expected: Vec<_> = (500..1000)
            .map(|block| (block, vec![block - 500]))
            .collect();
        assert_eq!(found, expected);
        assert!((16..100).contains(&parts), "{parts} parts");
    }

    #[test]
    fn one_checksum_alone_does_not_take_all_memory() {
        let mut part = Part::new(3, 8);
        for i in 0..100 {
            part.add(entry(9, 0, i, i));
            part.add(entry(3, 1, i, 1000 + i));
        }
        let last = part.last();
        assert!(last < 9);
        assert_eq!(part.entries.len(), 8);
        let others = pairs(&part.groups(), 0, 9999);
        assert_eq!(others.len(), 7);
        assert!(others.iter().all(|(_, others)| others.len() <= FIRST_ONES));
    }
}
