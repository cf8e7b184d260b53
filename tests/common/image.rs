//! The bytes of a pool, read and changed from outside: which blocks are in use, and damage of all
//! kinds, also such that every checksum is right.

use std::collections::{BTreeMap, BTreeSet};

use nodupe::device::{BlockDevice, SimDevice, SplitMix64};
use nodupe::ondisk::crc32c;
use nodupe::ondisk::node::{NODE_COUNT, NODE_CRC, NODE_KIND, NODE_LEVEL, NODE_MAGIC, NODE_RECORDS};
use nodupe::ondisk::superblock::{HEAD_BLOCKS, SB_CRC, Superblock};

const B: u64 = 4096;

pub(crate) type Page = [u8; 4096];

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// What a block in use is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Use {
    Slot,
    Copy,
    /// A node, by the number of its tree.
    Node(u8),
    Data,
}

pub(crate) fn page(device: &SimDevice, block: u64) -> Page {
    let mut page = [0; 4096];
    let read = device.read_at(block * B, &mut page);
    read.expect("a sound device reads");
    page
}

pub(crate) fn put(device: &SimDevice, block: u64, page: &[u8]) {
    let written = device.write_at(block * B, page);
    written.expect("a sound device writes");
    device.sync().expect("a sound device syncs");
}

fn crc_without(page: &Page, at: usize) -> u32 {
    let mut bytes = *page;
    bytes[at..at + 4].fill(0);
    crc32c(&bytes)
}

fn is_node(page: &Page) -> bool {
    u32_at(page, 0) == NODE_MAGIC && u32_at(page, NODE_CRC) == crc_without(page, NODE_CRC)
}

/// The newest superblock and its slot.
pub(crate) fn newest(device: &SimDevice) -> (u64, Superblock) {
    let slots = [0, 1].into_iter().filter_map(|slot| {
        let found = Superblock::decode(&page(device, slot)).ok()?;
        Some((slot, found))
    });
    let newest = slots.max_by_key(|(_, sb)| sb.generation);
    newest.expect("a pool has a superblock")
}

/// Nodes that the superblock leads to.
pub(crate) fn nodes(device: &SimDevice) -> BTreeSet<u64> {
    let (slot, sb) = newest(device);
    let (mut todo, mut seen) = (vec![slot], BTreeSet::new());
    while let Some(block) = todo.pop() {
        let above = page(device, block);
        // Whatever looks like a reference to a node is one: block and checksum are right.
        for at in 0..4096 - 12 {
            let child = u64_at(&above, at);
            if child < HEAD_BLOCKS || child >= sb.blocks || seen.contains(&child) {
                continue;
            }
            let target = page(device, child);
            if is_node(&target) && u32_at(&target, NODE_CRC) == u32_at(&above, at + 8) {
                seen.insert(child);
                todo.push(child);
            }
        }
    }
    seen
}

/// All blocks in use, by the refcount tree of a sound pool.
pub(crate) fn in_use(device: &SimDevice) -> BTreeMap<u64, Use> {
    let (_, sb) = newest(device);
    let mut all = BTreeMap::from([
        (0, Use::Slot),
        (1, Use::Slot),
        (sb.blocks - 2, Use::Copy),
        (sb.blocks - 1, Use::Copy),
    ]);
    let nodes = nodes(device);
    for block in &nodes {
        let node = page(device, *block);
        if node[NODE_KIND] != 3 || node[NODE_LEVEL] != 0 {
            continue;
        }
        for i in 0..usize::from(u16::from_le_bytes([node[NODE_COUNT], node[NODE_COUNT + 1]])) {
            let at = NODE_RECORDS + i * 16;
            let start = u64_at(&node, at);
            for block in start..start + u64::from(u32_at(&node, at + 8)) {
                all.insert(block, Use::Data);
            }
        }
    }
    // Removed values in a leaf may still refer to nodes that are free.
    for block in nodes
        .into_iter()
        .filter(|block| all.contains_key(block))
        .collect::<Vec<_>>()
    {
        all.insert(block, Use::Node(page(device, block)[NODE_KIND]));
    }
    all
}

/// Stores a changed node and makes all checksums above it right.
pub(crate) fn forge(device: &SimDevice, block: u64, changed: &Page, nodes: &BTreeSet<u64>) {
    let mut changed = *changed;
    let old = u32_at(&page(device, block), NODE_CRC);
    let new = crc_without(&changed, NODE_CRC);
    changed[NODE_CRC..NODE_CRC + 4].copy_from_slice(&new.to_le_bytes());
    put(device, block, &changed);
    if old == new {
        return;
    }
    let mut pattern = block.to_le_bytes().to_vec();
    pattern.extend_from_slice(&old.to_le_bytes());
    for parent in nodes.iter().copied().chain([0, 1]) {
        let mut above = page(device, parent);
        let mut hit = false;
        for at in (0..4096 - 12).filter(|_| parent != block) {
            if above[at..at + 12] == pattern[..] {
                above[at + 8..at + 12].copy_from_slice(&new.to_le_bytes());
                hit = true;
            }
        }
        if hit && parent < HEAD_BLOCKS {
            forge_superblock(device, parent, &mut above);
        } else if hit {
            forge(device, parent, &above, nodes);
        }
    }
}

/// Stores a changed superblock with a right checksum, in its slot and as its copy.
pub(crate) fn forge_superblock(device: &SimDevice, slot: u64, changed: &mut Page) {
    let crc = crc_without(changed, SB_CRC);
    changed[SB_CRC..SB_CRC + 4].copy_from_slice(&crc.to_le_bytes());
    put(device, slot, changed);
    put(device, device.len() / B - 2 + slot, changed);
}

/// Changes a field somewhere in `from..to` to a value that hurts.
pub(crate) fn hurt(page: &mut Page, from: usize, to: usize, rng: &mut SplitMix64) {
    let width = [1, 2, 4, 8][rng.index(4)];
    let at = from + rng.index((to - from).saturating_sub(width).max(1));
    let at = if rng.chance(60) {
        (at / 8 * 8).max(from)
    } else {
        at
    };
    let mut old = [0; 8];
    old[..width].copy_from_slice(&page[at..at + width]);
    let old = u64::from_le_bytes(old);
    let new = match rng.below(9) {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => old.wrapping_add(1),
        4 => old.wrapping_sub(1),
        5 => u64_at(page, from + rng.index((to - from - 8) / 8) * 8),
        6 => old ^ (1 << rng.below(64)),
        7 => old.wrapping_mul(2),
        _ => rng.next(),
    };
    page[at..at + width].copy_from_slice(&new.to_le_bytes()[..width]);
}
