//! The contents of a simulated device: shared pages, the two images, and what lies between them.
//!
//! Pages are never changed in place, only replaced, so images, pending writes and recordings share
//! them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::rng::SplitMix64;
use super::trace::Event;
use crate::units::{BLOCK_SIZE, SECTOR_SIZE};

/// The contents of one block.
pub(super) type Page = Arc<[u8; BLOCK_SIZE]>;

/// Blocks of one leaf of an image.
const LEAF_BLOCKS: u64 = 64; // 256 KiB: a fork of 16 MiB copies 64 pointers

/// The page with these contents, `None` for zeros.
pub(super) fn page(bytes: &[u8]) -> Option<Page> {
    if bytes.iter().fold(0, |all, byte| all | byte) == 0 {
        return None;
    }
    let bytes: &[u8; BLOCK_SIZE] = bytes.try_into().ok()?;
    Some(Arc::new(*bytes))
}

/// Flips one bit of one byte.
pub(super) fn flip(page: &mut Option<Page>, byte: usize, bit: u32) {
    let mut bytes = page.as_deref().copied().unwrap_or([0; BLOCK_SIZE]);
    bytes[byte] ^= 1 << bit;
    *page = self::page(&bytes);
}

/// A sparse array of blocks, persistent in the sense that a clone shares everything.
#[derive(Clone, Default)]
pub(super) struct Image {
    leaves: BTreeMap<u64, Arc<[Option<Page>; LEAF_BLOCKS as usize]>>,
}

impl Image {
    fn get(&self, block: u64) -> Option<&Page> {
        let leaf = self.leaves.get(&(block / LEAF_BLOCKS))?;
        leaf[(block % LEAF_BLOCKS) as usize].as_ref()
    }

    fn set(&mut self, block: u64, page: Option<Page>) {
        let leaf = self
            .leaves
            .entry(block / LEAF_BLOCKS)
            .or_insert_with(|| Arc::new([const { None }; LEAF_BLOCKS as usize]));
        Arc::make_mut(leaf)[(block % LEAF_BLOCKS) as usize] = page;
    }

    pub(super) fn read(&self, addr: u64, buf: &mut [u8]) {
        let first = addr / BLOCK_SIZE as u64;
        for (block, out) in (first..).zip(buf.chunks_mut(BLOCK_SIZE)) {
            match self.get(block) {
                Some(page) => out.copy_from_slice(&page[..]),
                None => out.fill(0),
            }
        }
    }

    pub(super) fn write(&mut self, addr: u64, pages: &[Option<Page>]) {
        for (block, page) in (addr / BLOCK_SIZE as u64..).zip(pages) {
            self.set(block, page.clone());
        }
    }

    /// Forgets what lies at or behind `len` bytes.
    fn cut(&mut self, len: u64) {
        let end = len / BLOCK_SIZE as u64;
        let last = self.leaves.last_key_value().map_or(0, |(leaf, _)| leaf + 1);
        for block in end..last * LEAF_BLOCKS {
            if self.get(block).is_some() {
                self.set(block, None);
            }
        }
    }

    /// Blocks that are not zero.
    pub(super) fn used(&self) -> impl Iterator<Item = u64> + '_ {
        self.leaves.iter().flat_map(|(leaf, pages)| {
            let used = pages.iter().enumerate().filter(|(_, page)| page.is_some());
            used.map(move |(index, _)| leaf * LEAF_BLOCKS + index as u64)
        })
    }

    pub(super) fn flip(&mut self, addr: u64, bit: u32) {
        let block = addr / BLOCK_SIZE as u64;
        let mut page = self.get(block).cloned();
        flip(&mut page, (addr % BLOCK_SIZE as u64) as usize, bit);
        self.set(block, page);
    }

    /// Turns `pages`, about to be written at `addr`, into what a torn write of them leaves here:
    /// the beginning, the end, or any set of sectors is new.
    pub(super) fn tear(&self, addr: u64, pages: &mut [Option<Page>], rng: &mut SplitMix64) {
        const SECTORS: usize = BLOCK_SIZE / SECTOR_SIZE;
        let sectors = pages.len() * SECTORS;
        let cut = rng.index(sectors + 1);
        let shape = rng.below(3);
        let mut index = 0;
        for (block, page) in (addr / BLOCK_SIZE as u64..).zip(pages) {
            let old = self.get(block);
            let mut bytes = old.map_or([0; BLOCK_SIZE], |old| **old);
            let mut kept = 0;
            for at in (0..BLOCK_SIZE).step_by(SECTOR_SIZE) {
                let is_new = match shape {
                    0 => index < cut,
                    1 => index >= cut,
                    _ => rng.below(2) == 0,
                };
                if is_new {
                    kept += 1;
                    match page {
                        Some(page) => {
                            bytes[at..at + SECTOR_SIZE]
                                .copy_from_slice(&page[at..at + SECTOR_SIZE]);
                        }
                        None => bytes[at..at + SECTOR_SIZE].fill(0),
                    }
                }
                index += 1;
            }
            match kept {
                0 => *page = old.cloned(),
                SECTORS => {}
                _ => *page = self::page(&bytes),
            }
        }
    }
}

/// A change that a crash may take.
#[derive(Clone)]
enum Pending {
    /// Pages at an address, and the syncs that will pass them over.
    Write(u64, Vec<Option<Page>>, u32),
    /// The device grew to this length, in bytes.
    Grow(u64),
}

/// Both images of a device and the writes between them.
#[derive(Clone)]
pub(super) struct State {
    /// Length in bytes, as callers see it.
    pub(super) len: u64,
    /// Length that is certain to be there after a crash.
    pub(super) durable_len: u64,
    /// What reads see.
    pub(super) live: Image,
    /// What is certain to be there after a crash.
    pub(super) durable: Image,
    /// Completed and not durable, oldest first.
    pending: Vec<Pending>,
}

impl State {
    /// A device of `len` bytes on which all of `image` is durable.
    pub(super) fn settled(len: u64, image: Image) -> Self {
        Self {
            len,
            durable_len: len,
            live: image.clone(),
            durable: image,
            pending: Vec::new(),
        }
    }

    pub(super) fn pending_len(&self) -> usize {
        self.pending.len()
    }

    pub(super) fn apply(&mut self, event: &Event) {
        match event {
            Event::Write { addr, pages, held } => {
                self.live.write(*addr, pages);
                self.pending
                    .push(Pending::Write(*addr, pages.clone(), *held));
            }
            Event::Discard { addr, len } => {
                let pages = vec![None; (len / BLOCK_SIZE as u64) as usize];
                self.live.write(*addr, &pages);
                self.pending.push(Pending::Write(*addr, pages, 0));
            }
            Event::Grow { len } => {
                self.len = *len;
                self.pending.push(Pending::Grow(*len));
            }
            Event::Sync => self.settle(),
            Event::FailedSync { seed } => {
                let (len, image) = self.crash(&mut SplitMix64::new(*seed));
                (self.durable_len, self.durable) = (len, image);
                self.pending.clear();
            }
        }
    }

    fn settle(&mut self) {
        for change in std::mem::take(&mut self.pending) {
            let Pending::Write(addr, pages, held) = change else {
                continue;
            };
            if held == 0 {
                self.durable.write(addr, &pages);
                continue;
            }
            // What was written over it since is not undone when its turn comes.
            let blocks = (addr / BLOCK_SIZE as u64..).zip(&pages);
            let mut pairs = blocks.map(|(block, page)| (self.live.get(block), page.as_ref()));
            let is_newest = pairs.all(|(now, page)| match (now, page) {
                (None, None) => true,
                (Some(now), Some(page)) => Arc::ptr_eq(now, page),
                _ => false,
            });
            if is_newest {
                self.pending.push(Pending::Write(addr, pages, held - 1));
            }
        }
        self.durable_len = self.len;
    }

    /// One of the images that a crash now may leave, and the length that it has then.
    pub(super) fn crash(&self, rng: &mut SplitMix64) -> (u64, Image) {
        let mut image = self.durable.clone();
        let mut len = self.durable_len;
        if self.pending.is_empty() {
            return (len, image);
        }
        // Where many writes are pending a fair coin for each would never show the images in which
        // a single one is missing, or the only one.
        let percent = [10, 50, 50, 90][rng.index(4)];
        let mut order: Vec<usize> = (0..self.pending.len()).collect();
        if rng.below(2) == 0 {
            for last in (1..order.len()).rev() {
                order.swap(last, rng.index(last + 1));
            }
        }
        for index in order {
            let (addr, pages) = match &self.pending[index] {
                Pending::Write(addr, pages, _) => (addr, pages),
                Pending::Grow(to) => {
                    if rng.chance(percent) {
                        len = len.max(*to);
                    }
                    continue;
                }
            };
            let torn = rng.chance(20);
            if torn {
                let mut pages = pages.clone();
                image.tear(*addr, &mut pages, rng);
                image.write(*addr, &pages);
            } else if rng.chance(percent) {
                image.write(*addr, pages);
            }
        }
        // What was written behind the end of a file that did not grow is not there.
        if len < self.len {
            image.cut(len);
        }
        (len, image)
    }
}
