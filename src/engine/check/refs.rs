//! Comparing the references found with the refcount tree, and free blocks with its gaps.

use std::collections::BTreeMap;

use crate::ondisk::extent::{GROUP_BLOCKS, decode_refs_run};
use crate::ondisk::node::{NODE_ADDR, NODE_MAGIC, NODE_MAGIC_AT, TreeKind};
use crate::ondisk::{get_u32, get_u64};
use crate::units::BLOCK_SIZE;

use super::ledger::{Ledger, SEGMENT_BLOCKS};
use super::{Checker, Subject, code};

/// What one pass hands on to the next.
#[derive(Debug, Default)]
pub(super) struct Carry {
    /// A run of the refcount tree that reaches into the next pass: its end and count.
    run: Option<(u64, u32)>,
    /// Where the last run ended.
    last_end: u64,
    /// Blocks in use of groups that are not complete yet, by the refcount tree.
    used: BTreeMap<u64, u64>,
    /// Blocks in use of all groups that are.
    total: u64,
}

/// Blocks in a row with the same two counts, which differ.
type Difference = (u64, u64, u32, u32);

/// Goes over the segments of a ledger with the runs of the refcount tree, both in order.
struct Sweep<'l> {
    ledger: &'l Ledger,
    /// The segment that runs are filled into.
    number: u64,
    recorded: Vec<u32>,
    filled: bool,
    difference: Option<Difference>,
}

impl Checker<'_> {
    /// Compares the part of the pool that the ledger covers. `first`, `last`: it is the first or
    /// last part, and what lies outside the pool on that side is looked at as well.
    pub(super) fn check_refs(&mut self, ledger: &Ledger, first: bool, last: bool) {
        let (start, end) = (ledger.start(), ledger.end());
        let mut sweep = Sweep {
            ledger,
            number: start / SEGMENT_BLOCKS,
            recorded: vec![0; SEGMENT_BLOCKS as usize],
            filled: false,
            difference: None,
        };
        if let Some((until, count)) = self.refs.run.take() {
            self.recorded_run(&mut sweep, start, until, count);
        }
        let keys = (
            if first { 0 } else { u128::from(start) },
            if last { u128::MAX } else { u128::from(end) - 1 },
        );
        let root = self.reader.sb.refs;
        self.tree(
            root,
            TreeKind::Refs,
            keys,
            None,
            &mut |this, key, value| match decode_refs_run(key, value) {
                Ok((from, to, count)) if this.reader.holds(from, to) => {
                    if from < this.refs.last_end {
                        let text = format!("refcount records overlap at block {from}");
                        this.find(code::RECORD, Subject::Pool, text);
                    }
                    this.refs.last_end = this.refs.last_end.max(to);
                    this.recorded_run(&mut sweep, from, to, count);
                }
                Ok(_) => this.find(
                    code::OUTSIDE,
                    Subject::Pool,
                    format!("refcount at block {key} lies outside the pool"),
                ),
                Err(error) => this.find(
                    code::RECORD,
                    Subject::Pool,
                    format!("refcount at block {key}: {error}"),
                ),
            },
        );
        self.sweep_to(&mut sweep, end.div_ceil(SEGMENT_BLOCKS));
        self.report(sweep.difference.take());
        self.check_groups(start, end, last);
    }

    /// A run of the refcount tree; what of it lies behind the ledger is kept for the next pass.
    fn recorded_run(&mut self, sweep: &mut Sweep<'_>, from: u64, to: u64, count: u32) {
        let end = sweep.ledger.end();
        if to > end {
            self.refs.run = Some((to, count));
        }
        let (mut at, to) = (from, to.min(end));
        while at < to {
            self.sweep_to(sweep, at / SEGMENT_BLOCKS);
            let base = sweep.number * SEGMENT_BLOCKS;
            let next = (base + SEGMENT_BLOCKS).min(to);
            if at < base {
                return; // records that overlap, of which a finding tells
            }
            sweep.recorded[(at - base) as usize..(next - base) as usize].fill(count);
            sweep.filled = true;
            at = next;
        }
        let mut at = from;
        while at < to {
            let next = ((at / GROUP_BLOCKS + 1) * GROUP_BLOCKS).min(to);
            *self.refs.used.entry(at / GROUP_BLOCKS).or_default() += next - at;
            at = next;
        }
    }

    /// Compares the segments before `number`.
    fn sweep_to(&mut self, sweep: &mut Sweep<'_>, number: u64) {
        while sweep.number < number {
            let in_use = sweep.ledger.next_segment(sweep.number);
            if sweep.filled || in_use == Some(sweep.number) {
                self.compare_segment(sweep);
                sweep.recorded.fill(0);
                sweep.filled = false;
                sweep.number += 1;
            } else {
                sweep.number = in_use.map_or(number, |next| next.min(number));
            }
        }
    }

    fn compare_segment(&mut self, sweep: &mut Sweep<'_>) {
        let counts = sweep.ledger.counts(sweep.number);
        for i in 0..SEGMENT_BLOCKS as usize {
            let (real, stored) = (counts.total(i), sweep.recorded[i]);
            let block = counts.first + i as u64;
            if real == stored || block < sweep.ledger.start() || block >= sweep.ledger.end() {
                continue;
            }
            match &mut sweep.difference {
                Some(found) if found.1 == block && found.2 == real && found.3 == stored => {
                    found.1 = block + 1;
                }
                found => {
                    let done = found.replace((block, block + 1, real, stored));
                    self.report(done);
                }
            }
        }
        for (offset, node) in &counts.nodes {
            let block = counts.first + u64::from(*offset);
            let kind = node.kind;
            if node.mixed {
                let text = format!("block {block} is a node of {kind:?} and of another tree");
                self.find(code::CONFLICT, Subject::Node(block), text);
            }
            if counts.data[usize::from(*offset)] > 0 {
                if self.holds_a_node(block) {
                    self.marks.bad.push((block, block + 1));
                }
                let text = format!("block {block} is a node of {kind:?} and data of a file");
                self.find(code::CONFLICT, Subject::Data(block, block + 1), text);
            }
        }
    }

    /// True if a block holds a node, and so no data.
    fn holds_a_node(&self, block: u64) -> bool {
        let mut page = [0; BLOCK_SIZE];
        let addr = block * BLOCK_SIZE as u64;
        self.reader.device.read_at(addr, &mut page).is_ok()
            && get_u32(&page, NODE_MAGIC_AT) == NODE_MAGIC
            && get_u64(&page, NODE_ADDR) == block
    }

    fn report(&mut self, difference: Option<Difference>) {
        let Some((from, to, real, stored)) = difference else {
            return;
        };
        let text = format!("blocks {from} to {to} have {real} references, recorded are {stored}");
        if stored < real {
            self.find(code::REFCOUNT, Subject::Data(from, to), text);
        } else {
            self.find(code::LEAK, Subject::Pool, format!("{text}: a leak"));
        }
    }

    /// Compares the free blocks of each group that ends before `end` with the gaps of the
    /// refcount tree.
    fn check_groups(&mut self, start: u64, end: u64, last: bool) {
        let stored = self.stored_groups(start, end, last);
        let sb = self.reader.sb;
        let mut used = std::mem::take(&mut self.refs.used);
        let groups: std::collections::BTreeSet<u64> =
            used.keys().chain(stored.keys()).copied().collect();
        for group in groups {
            if !last && (group + 1) * GROUP_BLOCKS > end {
                continue;
            }
            let first = (group * GROUP_BLOCKS).max(sb.first_block());
            let size = ((group + 1) * GROUP_BLOCKS)
                .min(sb.end_block())
                .saturating_sub(first);
            let taken = used.remove(&group).unwrap_or(0);
            self.refs.total += taken;
            let free = size.saturating_sub(taken);
            let recorded = stored.get(&group).map_or(size, |free| u64::from(*free));
            if free != recorded {
                let text = format!("group {group} has {free} free blocks, recorded are {recorded}");
                self.find(code::GROUP, Subject::Pool, text);
            }
        }
        self.refs.used = used;
    }

    /// Compares the free blocks of all groups with the superblock, after the last pass.
    pub(super) fn check_free(&mut self) {
        let sb = self.reader.sb;
        let free = (sb.end_block() - sb.first_block()).saturating_sub(self.refs.total);
        if free != sb.free && self.failure.is_none() {
            let text = format!("{free} blocks are free, the superblock says {}", sb.free);
            self.find(code::FREE_COUNT, Subject::Pool, text);
        }
    }
}
