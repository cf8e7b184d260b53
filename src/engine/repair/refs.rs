//! The trees about space: checksums of lost records, and reference counts with the free blocks of
//! groups, built from what the new state refers to.
//!
//! The refcount tree counts its own nodes. So its blocks are chosen first, then its records are
//! counted, and blocks are added until there are exactly as many as the records need.

use std::collections::{BTreeMap, BTreeSet};

use crate::engine::check::ledger::{Ledger, SEGMENT_BLOCKS};
use crate::engine::check::walk::{ALL, Event, Reader, walk};
use crate::error::{Error, Result};
use crate::ondisk::extent::{
    GROUP_BLOCKS, Root, SUMS_LEN, SUMS_PER_RECORD, encode_group, encode_refs,
};
use crate::ondisk::node::TreeKind;
use crate::ondisk::superblock::Superblock;
use crate::ondisk::{crc32c, put_u32};
use crate::units::BLOCK_SIZE;

use super::load::{Loader, Site, nodes_of};

/// Records of a new leaf of refcounts or groups, of 252.
const LEAF_RECORDS: usize = 220;
/// Longest run of one record.
const RUN_MAX: u64 = 1 << 31;

/// Takes the checksum tree over as it is; counts its nodes.
pub(super) fn adopt_sums(reader: Reader<'_>, new: &mut Ledger) {
    let (root, kind) = (reader.sb.sums, TreeKind::Sums);
    walk(reader, new, root, kind, ALL, &mut |new, event| {
        if let Event::Node { at, level } = event {
            new.add_node(at.block, TreeKind::Sums);
            return level > 0;
        }
        true
    });
}

/// Builds the checksum tree from the records that survive, and those for the blocks `unsummed`
/// (sorted runs) from what the blocks hold now.
pub(super) fn rebuild_sums(
    reader: Reader<'_>,
    site: &mut Site<'_, '_>,
    new: &mut Ledger,
    unsummed: &[(u64, u64)],
) -> Result<Root> {
    struct State<'s, 'a, 'l> {
        site: &'s mut Site<'a, 'l>,
        loader: Loader,
        missing: BTreeSet<u64>,
        failed: Option<Error>,
    }
    let missing = unsummed
        .iter()
        .flat_map(|run| run.0 / SUMS_PER_RECORD..=(run.1 - 1) / SUMS_PER_RECORD)
        .collect();
    let mut state = State {
        site,
        loader: Loader::new(TreeKind::Sums),
        missing,
        failed: None,
    };
    let fill = |state: &mut State<'_, '_, '_>, before: u128| -> Result<()> {
        while let Some(key) = state.missing.first().copied()
            && u128::from(key) < before
        {
            state.missing.pop_first();
            let record = sums_of_blocks(reader, key, unsummed);
            state.loader.push(state.site, u128::from(key), &record)?;
        }
        Ok(())
    };
    let root = reader.sb.sums;
    walk(
        reader,
        &mut state,
        root,
        TreeKind::Sums,
        ALL,
        &mut |state, event| {
            if let Event::Record { key, value } = event
                && state.failed.is_none()
            {
                let done = fill(state, key).and_then(|()| {
                    state.missing.remove(&(key as u64));
                    state.loader.push(state.site, key, value)
                });
                state.failed = done.err();
            }
            state.failed.is_none()
        },
    );
    if let Some(error) = state.failed.take() {
        return Err(error);
    }
    fill(&mut state, u128::MAX)?;
    let (root, blocks) = state.loader.finish(state.site)?;
    for block in blocks {
        new.add_node(block, TreeKind::Sums);
    }
    Ok(root)
}

/// The checksums of 64 blocks, as far as they hold data, of what they hold now. Those that cannot
/// be read get none.
fn sums_of_blocks(reader: Reader<'_>, key: u64, unsummed: &[(u64, u64)]) -> [u8; SUMS_LEN] {
    let mut record = [0; SUMS_LEN];
    let mut page = vec![0; BLOCK_SIZE];
    for slot in 0..SUMS_PER_RECORD {
        let block = key * SUMS_PER_RECORD + slot;
        let i = unsummed.partition_point(|run| run.1 <= block);
        if unsummed.get(i).is_some_and(|run| run.0 <= block)
            && reader
                .device
                .read_at(block * BLOCK_SIZE as u64, &mut page)
                .is_ok()
        {
            put_u32(&mut record, slot as usize * 4, crc32c(&page));
        }
    }
    record
}

/// What the refcount tree and the group tree will hold.
#[derive(Debug, Default)]
struct Tally {
    runs: usize,
    groups: usize,
    used: u64,
}

/// Shows all runs with the same count, in order, as the refcount tree has them.
fn runs(
    new: &Ledger,
    own: &BTreeSet<u64>,
    show: &mut dyn FnMut(u64, u64, u32) -> Result<()>,
) -> Result<()> {
    let mut run: Option<(u64, u64, u32)> = None;
    let mut numbers: BTreeSet<u64> = own.iter().map(|block| block / SEGMENT_BLOCKS).collect();
    let mut next = new.next_segment(0);
    while let Some(number) = next {
        numbers.insert(number);
        next = new.next_segment(number + 1);
    }
    for number in numbers {
        let counts = new.counts(number);
        for i in 0..SEGMENT_BLOCKS {
            let block = counts.first + i;
            let count = counts.total(i as usize) + u32::from(own.contains(&block));
            run = match run {
                Some((from, to, known)) if to == block && known == count && to - from < RUN_MAX => {
                    Some((from, block + 1, known))
                }
                done => {
                    if let Some((from, to, known)) = done {
                        show(from, to, known)?;
                    }
                    (count > 0).then_some((block, block + 1, count))
                }
            };
        }
    }
    run.map_or(Ok(()), |(from, to, count)| show(from, to, count))
}

/// Blocks in use of each group.
fn note_groups(used: &mut BTreeMap<u64, u64>, from: u64, to: u64) {
    let mut at = from;
    while at < to {
        let next = ((at / GROUP_BLOCKS + 1) * GROUP_BLOCKS).min(to);
        *used.entry(at / GROUP_BLOCKS).or_default() += next - at;
        at = next;
    }
}

fn tally(new: &Ledger, own: &BTreeSet<u64>) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut used = BTreeMap::new();
    runs(new, own, &mut |from, to, _| {
        tally.runs += 1;
        tally.used += to - from;
        note_groups(&mut used, from, to);
        Ok(())
    })?;
    tally.groups = used.len();
    Ok(tally)
}

/// How many leaves make a tree of exactly `nodes` nodes, if any number does.
fn leaves_for(nodes: usize, least: usize) -> Option<usize> {
    (least..=nodes)
        .find(|leaves| nodes_of(*leaves) >= nodes)
        .filter(|leaves| nodes_of(*leaves) == nodes)
}

/// Spreads `records` over `leaves` leaves.
fn spread(records: usize, leaves: usize) -> Vec<usize> {
    (0..leaves)
        .map(|i| records / leaves + usize::from(i < records % leaves))
        .collect()
}

/// Builds the refcount tree and the group tree of the new state; the roots go to `sb`, and the
/// number of free blocks.
pub(super) fn build(site: &mut Site<'_, '_>, new: &Ledger, sb: &mut Superblock) -> Result<()> {
    let mut own = BTreeSet::new();
    let start = site.free.clone();
    let mut more = 2;
    let (tally, refs_leaves, group_leaves) = loop {
        for _ in 0..more {
            own.insert(site.take()?);
        }
        let tally = tally(new, &own)?;
        let group_leaves = tally.groups.div_ceil(LEAF_RECORDS);
        let groups = nodes_of(group_leaves);
        let least = tally.runs.div_ceil(LEAF_RECORDS);
        let needed = groups + nodes_of(least);
        if own.len() >= needed
            && let Some(leaves) = leaves_for(own.len() - groups, least)
        {
            break (tally, leaves, group_leaves);
        }
        more = needed.saturating_sub(own.len()).max(1);
    };
    // The loaders take the same blocks again, in the same order.
    site.free = start;
    let mut used = BTreeMap::new();
    let mut loader = Loader::with_leaves(TreeKind::Refs, spread(tally.runs, refs_leaves));
    runs(new, &own, &mut |from, to, count| {
        note_groups(&mut used, from, to);
        let value = encode_refs((to - from) as u32, count);
        loader.push(site, u128::from(from), &value)
    })?;
    let (refs, refs_blocks) = loader.finish(site)?;
    let mut loader = Loader::with_leaves(TreeKind::Groups, spread(tally.groups, group_leaves));
    for (group, used) in used {
        let first = (group * GROUP_BLOCKS).max(sb.first_block());
        let end = ((group + 1) * GROUP_BLOCKS).min(sb.end_block());
        let free = (end - first) - used;
        loader.push(site, u128::from(group), &encode_group(free as u32))?;
    }
    let (groups, group_blocks) = loader.finish(site)?;
    let taken: BTreeSet<u64> = refs_blocks.into_iter().chain(group_blocks).collect();
    if taken != own {
        return Err(Error::corrupt(format!(
            "the repair planned {} nodes for counts and built {}: nothing was changed",
            own.len(),
            taken.len()
        )));
    }
    (sb.refs, sb.groups) = (refs, groups);
    sb.free = (sb.end_block() - sb.first_block()) - tally.used;
    Ok(())
}
