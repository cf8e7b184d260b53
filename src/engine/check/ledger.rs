//! The ledger: how often each block of a part of the pool is referred to, as data and as a node.
//!
//! Invariants:
//!
//! 1. It covers the blocks from `start` up to `end`. When it outgrows its bound it gives up its
//!    upper part: `end` comes down, what is left is right, and another pass does the rest. One
//!    segment is always kept, so that each pass gets further.
//! 2. A segment is a map of borders while its runs are few, and an array of counts when they are
//!    many, so it never takes more than about 4 bytes for a block, and 24 for a node.

use std::collections::BTreeMap;

use crate::ondisk::node::TreeKind;

/// Blocks of a segment: 16 MiB of the pool, whose counts are 16 KiB at most.
pub(crate) const SEGMENT_BLOCKS: u64 = 4096;
/// Borders above which a segment becomes an array.
const BORDERS_MAX: usize = 1000;
/// What is counted for the memory of a segment, a border, an array, a node.
const SEGMENT_COST: usize = 200;
const BORDER_COST: usize = 14;
const ARRAY_COST: usize = SEGMENT_BLOCKS as usize * 4;
const NODE_COST: usize = 24;

/// References to blocks as data.
#[derive(Debug)]
enum Runs {
    /// Changes of the count at an offset within the segment.
    Borders(BTreeMap<u16, i32>),
    /// The count of each block.
    Array(Box<[u32]>),
}

/// A block that is referred to as a node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NodeUse {
    /// Of which tree, by the first reference.
    pub(crate) kind: TreeKind,
    /// References.
    pub(crate) count: u32,
    /// Another reference was from a tree of another kind.
    pub(crate) mixed: bool,
}

#[derive(Debug)]
struct Segment {
    data: Runs,
    nodes: BTreeMap<u16, NodeUse>,
}

impl Segment {
    fn new() -> Self {
        Self {
            data: Runs::Borders(BTreeMap::new()),
            nodes: BTreeMap::new(),
        }
    }

    fn cost(&self) -> usize {
        let data = match &self.data {
            Runs::Borders(borders) => borders.len() * BORDER_COST,
            Runs::Array(_) => ARRAY_COST,
        };
        SEGMENT_COST + data + self.nodes.len() * NODE_COST
    }

    fn add(&mut self, from: u64, to: u64) {
        match &mut self.data {
            Runs::Borders(borders) => {
                *borders.entry(from as u16).or_default() += 1;
                if to < SEGMENT_BLOCKS {
                    *borders.entry(to as u16).or_default() -= 1;
                }
                if borders.len() > BORDERS_MAX {
                    self.data = Runs::Array(self.data_counts());
                }
            }
            Runs::Array(counts) => {
                for count in &mut counts[from as usize..to as usize] {
                    *count = count.saturating_add(1);
                }
            }
        }
    }

    fn data_counts(&self) -> Box<[u32]> {
        match &self.data {
            Runs::Array(counts) => counts.clone(),
            Runs::Borders(borders) => {
                let mut counts = vec![0; SEGMENT_BLOCKS as usize].into_boxed_slice();
                let (mut at, mut sum) = (0, 0_i64);
                for (border, change) in borders {
                    counts[at..usize::from(*border)].fill(sum.max(0) as u32);
                    at = usize::from(*border);
                    sum += i64::from(*change);
                }
                counts[at..].fill(sum.max(0) as u32);
                counts
            }
        }
    }
}

/// What a part of the pool is used for. See the file for what it keeps true.
#[derive(Debug)]
pub(crate) struct Ledger {
    start: u64,
    end: u64,
    segments: BTreeMap<u64, Segment>,
    /// Bytes in use, and the bound.
    cost: usize,
    bound: usize,
}

/// The counts of one segment, all kinds together.
#[derive(Debug)]
pub(crate) struct Counts {
    /// First block.
    pub(crate) first: u64,
    /// References of each block as data.
    pub(crate) data: Box<[u32]>,
    /// Blocks that are nodes.
    pub(crate) nodes: BTreeMap<u16, NodeUse>,
}

impl Counts {
    /// All references of block `i` of the segment.
    pub(crate) fn total(&self, i: usize) -> u32 {
        let node = self.nodes.get(&(i as u16)).map_or(0, |node| node.count);
        self.data[i].saturating_add(node)
    }
}

impl Ledger {
    /// An empty ledger for the blocks `start` up to `end`, of about `bound` bytes.
    pub(crate) fn new(start: u64, end: u64, bound: usize) -> Self {
        Self {
            start,
            end,
            segments: BTreeMap::new(),
            cost: 0,
            bound,
        }
    }

    /// First block that it covers.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// The block behind the last one that it covers.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    fn segment(&mut self, number: u64) -> &mut Segment {
        let cost = &mut self.cost;
        self.segments.entry(number).or_insert_with(|| {
            *cost += SEGMENT_COST;
            Segment::new()
        })
    }

    /// Notes that one more extent refers to the blocks `from` up to `to`.
    pub(crate) fn add_data(&mut self, from: u64, to: u64) {
        let (mut at, to) = (from.max(self.start), to.min(self.end));
        while at < to {
            let number = at / SEGMENT_BLOCKS;
            let base = number * SEGMENT_BLOCKS;
            let next = (base + SEGMENT_BLOCKS).min(to);
            let segment = self.segment(number);
            let before = segment.cost();
            segment.add(at - base, next - base);
            let after = segment.cost();
            self.cost = self.cost + after - before;
            at = next;
        }
        self.shrink();
    }

    /// Notes one more reference to a node. Returns what is known of the block now, `None` if it
    /// is not covered.
    pub(crate) fn add_node(&mut self, block: u64, kind: TreeKind) -> Option<NodeUse> {
        if block < self.start || block >= self.end {
            return None;
        }
        let (number, offset) = (block / SEGMENT_BLOCKS, (block % SEGMENT_BLOCKS) as u16);
        let segment = self.segment(number);
        let mut new = false;
        let entry = segment.nodes.entry(offset).or_insert_with(|| {
            new = true;
            NodeUse {
                kind,
                count: 0,
                mixed: false,
            }
        });
        entry.count = entry.count.saturating_add(1);
        entry.mixed |= entry.kind != kind;
        let found = *entry;
        if new {
            self.cost += NODE_COST;
            self.shrink();
        }
        Some(found)
    }

    /// I1: gives up the upper part.
    fn shrink(&mut self) {
        while self.cost > self.bound && self.segments.len() > 1 {
            if let Some((number, segment)) = self.segments.pop_last() {
                self.cost -= segment.cost();
                self.end = self.end.min(number * SEGMENT_BLOCKS).max(self.start + 1);
            }
        }
    }

    /// True if nothing had to be given up of what lies before `end`.
    pub(crate) fn reaches(&self, end: u64) -> bool {
        self.end >= end
    }

    /// The first segment at or behind number `from` in which something is in use.
    pub(crate) fn next_segment(&self, from: u64) -> Option<u64> {
        self.segments
            .range(from..)
            .next()
            .map(|(number, _)| *number)
    }

    /// The counts of a segment, whether anything in it is in use or not.
    pub(crate) fn counts(&self, number: u64) -> Counts {
        let (data, nodes) = match self.segments.get(&number) {
            Some(segment) => (segment.data_counts(), segment.nodes.clone()),
            None => (
                vec![0; SEGMENT_BLOCKS as usize].into_boxed_slice(),
                BTreeMap::new(),
            ),
        };
        Counts {
            first: number * SEGMENT_BLOCKS,
            data,
            nodes,
        }
    }

    /// Runs of data, in order, each within one segment.
    pub(crate) fn data_runs(&self) -> DataRuns<'_> {
        DataRuns {
            ledger: self,
            next: 0,
            counts: None,
            at: 0,
        }
    }
}

/// Walks over the data that a ledger knows.
pub(crate) struct DataRuns<'a> {
    ledger: &'a Ledger,
    next: u64,
    counts: Option<Counts>,
    at: usize,
}

impl Iterator for DataRuns<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        loop {
            let Some(counts) = &self.counts else {
                let number = self.ledger.next_segment(self.next)?;
                self.next = number + 1;
                self.counts = Some(self.ledger.counts(number));
                self.at = 0;
                continue;
            };
            let rest = &counts.data[self.at..];
            let Some(skip) = rest.iter().position(|count| *count > 0) else {
                self.counts = None;
                continue;
            };
            let from = self.at + skip;
            let len = counts.data[from..]
                .iter()
                .position(|count| *count == 0)
                .unwrap_or(counts.data.len() - from);
            self.at = from + len;
            let first = counts.first + from as u64;
            return Some((first, first + len as u64));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_the_same_as_borders_and_as_an_array() {
        let mut few = Ledger::new(0, 3 * SEGMENT_BLOCKS, usize::MAX);
        let mut many = Ledger::new(0, 3 * SEGMENT_BLOCKS, usize::MAX);
        for i in 0..SEGMENT_BLOCKS / 3 {
            many.add_data(i * 3, i * 3 + 1);
        }
        for ledger in [&mut few, &mut many] {
            ledger.add_data(100, 2 * SEGMENT_BLOCKS + 5);
            ledger.add_data(4090, 4100);
        }
        let (few, many) = (few.counts(0), many.counts(0));
        for i in 0..SEGMENT_BLOCKS as usize {
            let more = u32::from(i % 3 == 0 && i < 4095);
            assert_eq!(few.data[i] + more, many.data[i], "{i}");
        }
    }

    #[test]
    fn a_bound_makes_it_cover_less_and_a_next_pass_does_the_rest() {
        let mut start = 0;
        let mut runs = Vec::new();
        let mut passes = 0;
        let end = 20 * SEGMENT_BLOCKS;
        while start < end {
            let mut ledger = Ledger::new(start, end, 2000);
            for i in 0..2000 {
                ledger.add_data(i * 40 + 7, i * 40 + 9);
            }
            runs.extend(ledger.data_runs());
            assert!(ledger.end() > start);
            start = ledger.end();
            passes += 1;
        }
        assert!(passes > 5, "{passes}");
        let all: Vec<_> = (0..2000).map(|i| (i * 40 + 7, i * 40 + 9)).collect();
        // A run may be cut at the border of a segment.
        let blocks = |runs: &[(u64, u64)]| -> Vec<u64> {
            runs.iter().flat_map(|run| run.0..run.1).collect()
        };
        assert_eq!(blocks(&runs), blocks(&all));
    }
}
