//! Changes the bytes of a pool and makes every checksum right again, as somebody would who means
//! harm: what protects against damage says nothing about him.

use std::collections::BTreeSet;

use nodupe::device::{BlockDevice, SimDevice};
use nodupe::engine::Pool;
use nodupe::ondisk::crc32c;
use nodupe::ondisk::journal::{
    BATCH_CRC, BATCH_MAGIC, BATCH_MAGIC_AT, BATCH_RECORDS, BATCH_RECORDS_LEN, BATCH_SEAL,
    BATCH_SEQ, batch_seal,
};
use nodupe::ondisk::node::{NODE_CRC, NODE_MAGIC, NODE_RECORDS};
use nodupe::ondisk::superblock::{HEAD_BLOCKS, SB_CRC, SB_GENERATION, SLOTS, Superblock};

use super::choose::Choose;

/// Bytes of a block.
pub const B: u64 = 4096;

/// The bytes of a block.
pub type Page = [u8; 4096];

/// A pool whose blocks are to be changed.
pub struct Forge {
    /// What it lives on.
    pub device: SimDevice,
    nodes: Vec<u64>,
}

/// The number that stands at `at`.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The number that stands at `at`.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// The checksum of bytes of which four at `at` hold it.
pub fn crc_without(bytes: &[u8], at: usize) -> u32 {
    let mut bytes = bytes.to_vec();
    bytes[at..at + 4].fill(0);
    crc32c(&bytes)
}

/// The bytes of block `block`.
pub fn page(device: &SimDevice, block: u64) -> Page {
    let mut page = [0; 4096];
    let read = device.read_at(block * B, &mut page);
    read.expect("a sound device reads");
    page
}

/// Stores blocks.
pub fn put(device: &SimDevice, block: u64, bytes: &[u8]) {
    let written = device.write_at(block * B, bytes);
    written.expect("a sound device writes");
}

/// The slot of the newest superblock, and what it says.
pub fn superblock(device: &SimDevice) -> (u64, Superblock) {
    let slots = [0, 1].into_iter().filter_map(|slot| {
        let found = Superblock::decode(&page(device, slot)).ok()?;
        Some((slot, found))
    });
    let newest = slots.max_by_key(|(_, sb)| sb.generation);
    newest.expect("the pool has a superblock")
}

/// The superblock that an open takes, read where the pool says it is after one: the newest of what
/// stands in its own place. `None` if no pool can be opened.
pub fn superblock_or_copy(device: &SimDevice) -> Option<Superblock> {
    let info = Pool::inspect(device).ok()?;
    let slot = info.generation % SLOTS;
    let copy = info.size / B - SLOTS + slot;
    // Forged ones may differ and have one generation: an open takes the copy then.
    let places = [copy, slot].into_iter().filter(|at| *at < device.len() / B);
    let mut found = places.filter_map(|at| Superblock::decode(&page(device, at)).ok());
    found.find(|sb| (sb.generation, sb.uuid) == (info.generation, info.uuid))
}

/// Blocks of the nodes that the superblock leads to, lowest first.
pub fn nodes(device: &SimDevice) -> Vec<u64> {
    let blocks = device.len() / B;
    let (slot, _) = superblock(device);
    let (mut todo, mut seen) = (vec![slot], BTreeSet::new());
    while let Some(block) = todo.pop() {
        let above = page(device, block);
        // Whatever looks like a reference to a node is one: block and checksum are right.
        for at in 0..4096 - 12 {
            let child = u64_at(&above, at);
            if child < HEAD_BLOCKS || child >= blocks || seen.contains(&child) {
                continue;
            }
            let target = page(device, child);
            if is_node(&target) && u32_at(&target, NODE_CRC) == u32_at(&above, at + 8) {
                seen.insert(child);
                todo.push(child);
            }
        }
    }
    seen.into_iter().collect()
}

fn is_node(page: &Page) -> bool {
    u32_at(page, 0) == NODE_MAGIC && u32_at(page, NODE_CRC) == crc_without(page, NODE_CRC)
}

/// Blocks of journal batches that wait for replay.
pub fn batches(device: &SimDevice) -> Vec<u64> {
    let (_, sb) = superblock(device);
    let ring = sb.journal_start..sb.journal_start + sb.journal_blocks;
    ring.filter(|block| {
        let page = page(device, *block);
        u64_at(&page, BATCH_MAGIC_AT) == BATCH_MAGIC && u64_at(&page, BATCH_SEQ) >= sb.journal_seq
    })
    .collect()
}

impl Forge {
    /// A copy of a pool; `nodes` are those of [`nodes`], which takes long.
    pub fn new(device: &SimDevice, nodes: &[u64]) -> Self {
        Self {
            device: device.fork(0),
            nodes: nodes.to_vec(),
        }
    }

    /// Stores a changed node and makes all checksums above it right.
    pub fn put_node(&self, block: u64, changed: &mut Page) {
        self.put_node_in(block, changed, &mut Vec::new());
    }

    /// `path`: the nodes whose change led here; a tree may lead back to one of them.
    fn put_node_in(&self, block: u64, changed: &mut Page, path: &mut Vec<u64>) {
        let old = u32_at(&page(&self.device, block), NODE_CRC);
        let new = crc_without(changed, NODE_CRC);
        changed[NODE_CRC..NODE_CRC + 4].copy_from_slice(&new.to_le_bytes());
        put(&self.device, block, changed);
        if old == new || path.contains(&block) {
            return;
        }
        path.push(block);
        let mut pattern = block.to_le_bytes().to_vec();
        pattern.extend_from_slice(&old.to_le_bytes());
        for parent in self.nodes.iter().copied().chain([0, 1]) {
            if parent == block {
                continue;
            }
            let mut above = page(&self.device, parent);
            let mut changed = false;
            for at in 0..4096 - 12 {
                if above[at] == pattern[0] && above[at..at + 12] == pattern[..] {
                    above[at + 8..at + 12].copy_from_slice(&new.to_le_bytes());
                    changed = true;
                }
            }
            if changed && parent < HEAD_BLOCKS {
                self.put_superblock(parent, &mut above);
            } else if changed {
                self.put_node_in(parent, &mut above, path);
            }
        }
        path.pop();
    }

    /// Stores a changed superblock with its checksum.
    pub fn put_superblock(&self, slot: u64, page: &mut Page) {
        let crc = crc_without(page, SB_CRC);
        page[SB_CRC..SB_CRC + 4].copy_from_slice(&crc.to_le_bytes());
        put(&self.device, slot, page);
    }

    /// Changes a few fields of one node.
    pub fn change_node(&self, choose: &mut impl Choose) {
        let block = self.nodes[choose.index(self.nodes.len())];
        let mut node = page(&self.device, block);
        let header = choose.below(8) == 0;
        // Records stand at the front, values of the namespace at the back.
        let (from, to) = match (header, choose.below(2)) {
            (true, _) => (4, NODE_RECORDS),
            (false, 0) => (NODE_RECORDS, 600),
            (false, _) => (NODE_RECORDS, 4096),
        };
        for _ in 0..choose.below(3) + 1 {
            if choose.below(8) == 0 {
                self.redirect(&mut node, choose);
            } else {
                mutate(&mut node, from, to, choose);
            }
        }
        self.put_node(block, &mut node);
    }

    /// Writes a right reference to some node somewhere among the records.
    fn redirect(&self, node: &mut Page, choose: &mut impl Choose) {
        let target = self.nodes[choose.index(self.nodes.len())];
        let crc = u32_at(&page(&self.device, target), NODE_CRC);
        let at = NODE_RECORDS + choose.index(500) * 8;
        node[at..at + 8].copy_from_slice(&target.to_le_bytes());
        node[at + 8..at + 12].copy_from_slice(&crc.to_le_bytes());
    }

    /// Changes a few fields of the newest superblock; there is no other one then.
    pub fn change_superblock(&self, choose: &mut impl Choose) {
        let (slot, _) = superblock(&self.device);
        let mut changed = page(&self.device, slot);
        for _ in 0..choose.below(2) + 1 {
            mutate(&mut changed, SB_GENERATION, 248, choose);
        }
        self.put_superblock(slot, &mut changed);
        put(&self.device, 1 - slot, &[0; 4096]);
    }

    /// Changes a few fields of the journal batch at `block`.
    pub fn change_batch(&self, block: u64, choose: &mut impl Choose) {
        let first = page(&self.device, block);
        let len = BATCH_RECORDS + u32_at(&first, BATCH_RECORDS_LEN) as usize;
        let mut head = vec![0; len.div_ceil(B as usize) * B as usize];
        let read = self.device.read_at(block * B, &mut head);
        read.expect("a sound device reads");
        let key = superblock(&self.device).1.hash_key;
        let header = choose.below(8) == 0;
        let from = if header { BATCH_SEQ } else { BATCH_RECORDS };
        for _ in 0..choose.below(3) + 1 {
            mutate(&mut head, from, len, choose);
        }
        // As far as the header, which may have changed, still says.
        let len = BATCH_RECORDS + u32_at(&head, BATCH_RECORDS_LEN) as usize;
        if len <= head.len() {
            let seal = batch_seal(&head[..len], &key);
            head[BATCH_SEAL..BATCH_SEAL + 8].copy_from_slice(&seal.to_le_bytes());
            let crc = crc_without(&head[..len], BATCH_CRC);
            head[BATCH_CRC..BATCH_CRC + 4].copy_from_slice(&crc.to_le_bytes());
        }
        put(&self.device, block, &head);
    }
}

/// Changes a field somewhere between `from` and `to` to a value that hurts.
pub fn mutate(bytes: &mut [u8], from: usize, to: usize, choose: &mut impl Choose) {
    let width = [1, 2, 4, 8][choose.index(4)];
    if to < from + width {
        return;
    }
    let places = to - from - width + 1;
    let at = from + choose.index(places);
    let mut old = [0; 8];
    old[..width].copy_from_slice(&bytes[at..at + width]);
    let old = u64::from_le_bytes(old);
    let new = match choose.below(13) {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => u64::MAX - 1,
        4 => old.wrapping_add(1),
        5 => old.wrapping_sub(1),
        6 => {
            let elsewhere = from + choose.index(places);
            let mut other = [0; 8];
            other[..width].copy_from_slice(&bytes[elsewhere..elsewhere + width]);
            u64::from_le_bytes(other)
        }
        7 => 1 << choose.below(64),
        8 => (1 << choose.below(63)) - 1,
        9 => old ^ (1 << choose.below(64)),
        10 => old.wrapping_mul(2),
        11 => choose.below(256),
        _ => choose.any(),
    };
    bytes[at..at + width].copy_from_slice(&new.to_le_bytes()[..width]);
}
