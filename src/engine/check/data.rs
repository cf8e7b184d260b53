//! The part of check that reads data: each block that an extent refers to, once, in order of
//! address, compared with its checksum while the checksum tree is walked.

use crate::error::Error;
use crate::ondisk::crc32c;
use crate::ondisk::extent::SUMS_PER_RECORD;
use crate::ondisk::get_u32;
use crate::ondisk::node::TreeKind;
use crate::units::BLOCK_SIZE;

use super::{Checker, code};

/// Blocks read at once: 1 MiB.
const PIECE: usize = 256;

/// What is compared, and how far it has come.
struct Pass {
    /// Runs of data blocks, sorted, apart from each other.
    runs: Vec<(u64, u64)>,
    /// The run that is being compared.
    at: usize,
    /// Its first block that was not met yet.
    next: u64,
    /// Blocks in a row from `first` on that wait to be read, by their checksums.
    first: u64,
    sums: Vec<u32>,
    /// True if the blocks are to be read, not only their checksums to be looked for.
    reads: bool,
}

/// Sorts runs and joins those that touch or overlap: what clones share is there once.
fn joined(mut runs: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    runs.sort_unstable();
    runs.dedup_by(|next, run| {
        let joins = next.0 <= run.1;
        if joins {
            run.1 = run.1.max(next.1);
        }
        joins
    });
    runs
}

impl Checker<'_> {
    /// Looks for the checksum of each data block found, and with `reads` compares the block.
    pub(super) fn check_data(&mut self, reads: bool) {
        let runs = joined(std::mem::take(&mut self.data));
        let mut pass = Pass {
            next: runs.first().map_or(u64::MAX, |run| run.0),
            runs,
            at: 0,
            first: 0,
            sums: Vec::new(),
            reads,
        };
        self.walk(self.sb.sums, TreeKind::Sums, &mut |this, key, value| {
            // A key beyond the pool ends the search: nothing can lie behind it.
            let base = (key as u64).saturating_mul(SUMS_PER_RECORD);
            this.skip_to(&mut pass, base);
            while pass.next < base.saturating_add(SUMS_PER_RECORD) && pass.next >= base {
                let slot = (pass.next - base) as usize;
                this.compare(&mut pass, get_u32(value, slot * 4));
            }
        });
        self.skip_to(&mut pass, u64::MAX);
        self.read_piece(&mut pass);
    }

    /// Blocks before `base` that were not met have no checksum.
    fn skip_to(&mut self, pass: &mut Pass, base: u64) {
        while let Some(&(_, end)) = pass.runs.get(pass.at)
            && pass.next < base
        {
            let until = end.min(base);
            let text = format!("data blocks {} to {until} have no checksums", pass.next);
            self.find(code::NO_SUM, text);
            pass.advance_to(until);
        }
    }

    /// The next block has the checksum `sum`.
    fn compare(&mut self, pass: &mut Pass, sum: u32) {
        let block = pass.next;
        pass.advance_to(block + 1);
        if !pass.reads {
            return;
        }
        if pass.first + pass.sums.len() as u64 != block || pass.sums.len() == PIECE {
            self.read_piece(pass);
            pass.first = block;
        }
        pass.sums.push(sum);
    }

    /// Reads and compares what waits.
    fn read_piece(&mut self, pass: &mut Pass) {
        let sums = std::mem::take(&mut pass.sums);
        let mut bytes = vec![0; sums.len() * BLOCK_SIZE];
        let addr = pass.first * BLOCK_SIZE as u64;
        if sums.is_empty() {
            return;
        }
        let whole = self.device.read_at(addr, &mut bytes).is_ok();
        for (i, (sum, bytes)) in sums.iter().zip(bytes.chunks_mut(BLOCK_SIZE)).enumerate() {
            let block = pass.first + i as u64;
            if !whole {
                // One bad sector must not hide what lies beside it.
                let read = self.device.read_at(block * BLOCK_SIZE as u64, bytes);
                if let Err(source) = read {
                    let error = Error::io("cannot read", source);
                    let text = format!("data block {block} cannot be read: {error}");
                    self.find(code::DATA, text);
                    continue;
                }
            }
            if crc32c(bytes) != *sum {
                let text = format!("a data block is not what was written: block {block}");
                self.find(code::DATA, text);
            }
        }
        self.advance(sums.len() as u64);
    }
}

impl Pass {
    /// Blocks before `block` were met.
    fn advance_to(&mut self, block: u64) {
        self.next = block;
        if self.runs.get(self.at).is_some_and(|run| run.1 <= block) {
            self.at += 1;
            self.next = self.runs.get(self.at).map_or(u64::MAX, |run| run.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::joined;

    #[test]
    fn what_clones_share_is_read_once() {
        let runs = vec![(30, 40), (10, 20), (15, 25), (10, 12), (25, 30), (50, 51)];
        assert_eq!(joined(runs), [(10, 40), (50, 51)]);
        assert_eq!(joined(Vec::new()), []);
    }
}
