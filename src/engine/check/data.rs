//! Data: each block that an extent refers to, once, in order of address, compared with its
//! checksum while the checksum tree is walked.

use crate::ondisk::crc32c;
use crate::ondisk::extent::SUMS_PER_RECORD;
use crate::ondisk::get_u32;
use crate::ondisk::node::TreeKind;
use crate::units::BLOCK_SIZE;

use super::ledger::{DataRuns, Ledger};
use super::{Checker, Subject, code};

/// Blocks read at once: 1 MiB.
const PIECE: usize = 256;

/// What is compared, and how far it has come.
struct Pass<'l> {
    runs: DataRuns<'l>,
    /// What is left of the run that is being compared.
    run: Option<(u64, u64)>,
    /// Blocks in a row from `first` on that wait to be read, by their checksums.
    first: u64,
    sums: Vec<u32>,
}

impl Checker<'_> {
    /// Looks for the checksum of each data block that the ledger knows, and compares the block
    /// unless only metadata is checked.
    pub(super) fn check_data(&mut self, ledger: &Ledger, last: bool) {
        let mut runs = ledger.data_runs();
        let mut pass = Pass {
            run: runs.next(),
            runs,
            first: 0,
            sums: Vec::new(),
        };
        let keys = (
            u128::from(ledger.start() / SUMS_PER_RECORD),
            match last {
                true => u128::MAX,
                false => u128::from((ledger.end() - 1) / SUMS_PER_RECORD),
            },
        );
        let root = self.reader.sb.sums;
        self.tree(root, TreeKind::Sums, keys, None, &mut |this, key, value| {
            // A key beyond the pool ends the search: nothing can lie behind it.
            let base = u64::try_from(key)
                .unwrap_or(u64::MAX)
                .saturating_mul(SUMS_PER_RECORD);
            this.skip_to(&mut pass, base);
            while let Some((next, _)) = pass.run
                && next >= base
                && next < base.saturating_add(SUMS_PER_RECORD)
            {
                let slot = (next - base) as usize;
                this.compare(&mut pass, next, get_u32(value, slot * 4));
            }
        });
        self.skip_to(&mut pass, u64::MAX);
        self.read_piece(&mut pass);
    }

    /// Blocks before `base` that were not met have no checksum.
    fn skip_to(&mut self, pass: &mut Pass<'_>, base: u64) {
        while let Some((next, end)) = pass.run
            && next < base
        {
            let until = end.min(base);
            let text = format!("data blocks {next} to {until} have no checksums");
            self.marks.unsummed.push((next, until));
            self.find(code::NO_SUM, Subject::Data(next, until), text);
            pass.advance_to(until);
        }
    }

    /// The next block has the checksum `sum`.
    fn compare(&mut self, pass: &mut Pass<'_>, block: u64, sum: u32) {
        pass.advance_to(block + 1);
        self.counts.data_blocks += 1;
        if !self.options.data {
            return;
        }
        if pass.first + pass.sums.len() as u64 != block || pass.sums.len() == PIECE {
            self.read_piece(pass);
            pass.first = block;
        }
        pass.sums.push(sum);
    }

    /// Reads and compares what waits.
    fn read_piece(&mut self, pass: &mut Pass<'_>) {
        let sums = std::mem::take(&mut pass.sums);
        if sums.is_empty() {
            return;
        }
        let device = self.reader.device;
        let mut bytes = vec![0; sums.len() * BLOCK_SIZE];
        let addr = pass.first * BLOCK_SIZE as u64;
        let whole = device.read_at(addr, &mut bytes).is_ok();
        for (i, (sum, bytes)) in sums.iter().zip(bytes.chunks_mut(BLOCK_SIZE)).enumerate() {
            let block = pass.first + i as u64;
            let subject = Subject::Data(block, block + 1);
            if !whole {
                // One bad sector must not hide what lies beside it.
                if let Err(error) = device.read_at(block * BLOCK_SIZE as u64, bytes) {
                    let text = format!("data block {block} cannot be read: {error}");
                    self.find(code::DATA, subject, text);
                    self.marks.bad.push((block, block + 1));
                    continue;
                }
            }
            if crc32c(bytes) != *sum {
                let text = format!("a data block is not what was written: block {block}");
                self.find(code::DATA, subject, text);
                self.marks.bad.push((block, block + 1));
            }
        }
        self.advance(sums.len() as u64);
    }
}

impl Pass<'_> {
    /// Blocks before `block`, which lies in the run or is its end, were met.
    fn advance_to(&mut self, block: u64) {
        self.run = match self.run {
            Some((_, end)) if block < end => Some((block, end)),
            _ => self.runs.next(),
        };
    }
}
