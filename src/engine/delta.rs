//! How reference counts changed since the last checkpoint. Changes gather here, by runs of blocks,
//! and the checkpoint merges them, sorted, into the refcount tree.
//!
//! Invariants:
//!
//! 1. There is an entry for every block whose count changed in this generation, also when the sum
//!    is 0: a block allocated and dropped again is found by the merge and freed.
//! 2. Runs do not overlap.

use std::collections::BTreeMap;

use crate::ondisk::extent::Extent;

/// Changes of reference counts, by runs of blocks.
#[derive(Debug, Default)]
pub(crate) struct Delta {
    /// First block of a run to its end and change.
    runs: BTreeMap<u64, (u64, i64)>,
}

impl Delta {
    /// Adds `change` to the count of each block of the run; a lost one has none.
    pub(crate) fn add(&mut self, run: Extent, change: i64) {
        if run.is_lost() {
            return;
        }
        self.add_range(run.block, run.end(), change);
    }

    /// Adds `change` to the count of the blocks `start` up to `end`.
    pub(crate) fn add_range(&mut self, start: u64, end: u64, change: i64) {
        // As a rule what changes again is what changed before.
        if let Some(run) = self.runs.get_mut(&start).filter(|run| run.0 == end) {
            run.1 += change;
            return;
        }
        let mut start = start;
        self.split_at(start);
        self.split_at(end);
        while start < end {
            match self.runs.range_mut(start..end).next() {
                Some((&at, run)) if at == start => {
                    run.1 += change;
                    start = run.0;
                }
                found => {
                    let gap_end = found.map_or(end, |(&at, _)| at);
                    self.insert_gap(start, gap_end, change);
                    start = gap_end;
                }
            }
        }
    }

    /// Inserts a run where there is none, or extends the one on its left.
    fn insert_gap(&mut self, start: u64, end: u64, change: i64) {
        if let Some((_, left)) = self.runs.range_mut(..start).next_back()
            && left.0 == start
            && left.1 == change
        {
            left.0 = end;
            return;
        }
        self.runs.insert(start, (end, change));
    }

    fn split_at(&mut self, at: u64) {
        if let Some((_, run)) = self.runs.range_mut(..at).next_back()
            && run.0 > at
        {
            let right = *run;
            run.0 = at;
            self.runs.insert(at, right);
        }
    }

    /// The change of one block.
    pub(crate) fn get(&self, block: u64) -> i64 {
        match self.runs.range(..=block).next_back() {
            Some((_, run)) if run.0 > block => run.1,
            _ => 0,
        }
    }

    /// The change of one block, and up to where (not beyond `end`) it is the same.
    pub(crate) fn get_run(&self, block: u64, end: u64) -> (i64, u64) {
        if let Some((_, run)) = self.runs.range(..=block).next_back()
            && run.0 > block
        {
            return (run.1, run.0.min(end));
        }
        (
            0,
            self.runs
                .range(block..end)
                .next()
                .map_or(end, |(at, _)| *at),
        )
    }

    /// Takes up to `max` runs (start, end, change) off the front.
    pub(crate) fn take(&mut self, max: usize) -> Vec<(u64, u64, i64)> {
        let mut out = Vec::new();
        while out.len() < max
            && let Some((start, (end, change))) = self.runs.pop_first()
        {
            out.push((start, end, change));
        }
        out
    }

    /// Runs of blocks with one change.
    pub(crate) fn len(&self) -> usize {
        self.runs.len()
    }

    /// True if nothing changed.
    pub(crate) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(block: u64, len: u32) -> Extent {
        Extent { block, len }
    }

    #[test]
    fn delta_splits_and_sums() {
        let mut delta = Delta::default();
        delta.add(run(10, 10), 1);
        delta.add(run(15, 1), -1);
        delta.add(run(5, 30), 1);
        let counts: Vec<i64> = (4..36).map(|block| delta.get(block)).collect();
        let expect: Vec<i64> = (4..36)
            .map(|b| match b {
                15 => 1,
                10..20 => 2,
                5..35 => 1,
                _ => 0,
            })
            .collect();
        assert_eq!(counts, expect);
        let taken = delta.take(100);
        assert_eq!(
            taken.iter().map(|(start, end, _)| end - start).sum::<u64>(),
            30
        );
    }
}
