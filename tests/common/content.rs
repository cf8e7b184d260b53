//! Contents of a file in the model: pages in a map, shared by snapshots and clones.
//!
//! Invariant: a page that is not in the map is zeros, and so is what lies behind the size.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// 4 KiB that are never changed, and their hash.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) bytes: [u8; PAGE],
    hash: u64,
}

/// Size and bytes of a file. A clone of it is O(1).
#[derive(Clone, Debug, Default)]
pub(crate) struct Content {
    size: u64,
    pages: Arc<BTreeMap<u64, Arc<Page>>>,
}

impl Content {
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// True if nothing was written since the one was made from the other.
    pub(crate) fn is_same(&self, other: &Content) -> bool {
        self.size == other.size && Arc::ptr_eq(&self.pages, &other.pages)
    }

    /// The bytes of a range, zeros behind the end.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        for (page, within, range) in pieces(offset, len) {
            if let Some(page) = self.pages.get(&page) {
                let piece = &mut out[range];
                piece.copy_from_slice(&page.bytes[within..within + piece.len()]);
            }
        }
        out
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let pages = Arc::make_mut(&mut self.pages);
        for (index, within, range) in pieces(offset, data.len()) {
            let old = pages.get(&index);
            let mut bytes = old.map_or([0; PAGE], |page| page.bytes);
            let piece = &data[range];
            bytes[within..within + piece.len()].copy_from_slice(piece);
            match hash_page(&bytes) {
                0 => pages.remove(&index),
                hash => pages.insert(index, Arc::new(Page { bytes, hash })),
            };
        }
        if !data.is_empty() {
            self.size = self.size.max(offset + data.len() as u64);
        }
    }

    pub(crate) fn truncate(&mut self, size: u64) {
        if size < self.size {
            let pages = Arc::make_mut(&mut self.pages);
            pages.split_off(&size.div_ceil(PAGE as u64));
            let edge = (size as usize).next_multiple_of(PAGE) - size as usize;
            self.zero(size, edge as u64);
        }
        self.size = size;
    }

    /// Zeros up to the end of the file; the size stays.
    pub(crate) fn punch(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size);
        if offset < end {
            self.zero(offset, end - offset);
        }
    }

    /// Copies a range of `from`; returns the bytes done.
    pub(crate) fn copy_range(&mut self, from: &Content, at: u64, to: u64, len: u64) -> u64 {
        let done = len.min(from.size.saturating_sub(at));
        self.write(to, &from.read(at, done as usize));
        done
    }

    /// The first `size` bytes of `from`, as a clone in pieces shows them.
    pub(crate) fn shown(from: &Content, size: u64) -> Content {
        let mut shown = from.clone();
        shown.truncate(size.min(from.size));
        shown
    }

    /// A number that two contents share exactly if their bytes are equal (sizes are not in it).
    pub(crate) fn digest(&self) -> u64 {
        self.pages
            .iter()
            .fold(0, |sum, (index, page)| digest_add(sum, *index, page.hash))
    }

    /// The pages that are not zeros, in order.
    pub(crate) fn data_pages(&self) -> impl Iterator<Item = u64> {
        self.pages.keys().copied()
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let pages = Arc::make_mut(&mut self.pages);
        let (first, last) = (offset / PAGE as u64, (offset + len).div_ceil(PAGE as u64));
        let touched: Vec<u64> = pages.range(first..last).map(|(index, _)| *index).collect();
        for index in touched {
            let start = index * PAGE as u64;
            let from = offset.saturating_sub(start) as usize;
            let to = (offset + len - start).min(PAGE as u64) as usize;
            let mut bytes = pages[&index].bytes;
            bytes[from..to].fill(0);
            match hash_page(&bytes) {
                0 => pages.remove(&index),
                hash => pages.insert(index, Arc::new(Page { bytes, hash })),
            };
        }
    }
}

/// Adds bytes that were read, beginning on a page boundary, to a digest.
pub(crate) fn digest_bytes(mut digest: u64, offset: u64, bytes: &[u8]) -> u64 {
    assert!(offset.is_multiple_of(PAGE as u64));
    for (index, chunk) in (offset / PAGE as u64..).zip(bytes.chunks(PAGE)) {
        let hash = if chunk.len() == PAGE {
            hash_page(chunk)
        } else {
            let mut page = [0; PAGE];
            page[..chunk.len()].copy_from_slice(chunk);
            hash_page(&page)
        };
        if hash != 0 {
            digest = digest_add(digest, index, hash);
        }
    }
    digest
}

fn digest_add(digest: u64, index: u64, hash: u64) -> u64 {
    let mixed = (hash ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15)).rotate_left(29);
    digest.wrapping_add(mixed.wrapping_mul(0xd6e8_feb8_6659_fd93))
}

/// A hash of a page that is 0 for zeros and for nothing else.
fn hash_page(bytes: &[u8]) -> u64 {
    let mut lanes = [0_u64; 4];
    let mut any = 0;
    for chunk in bytes.chunks_exact(32) {
        for (lane, word) in lanes.iter_mut().zip(chunk.chunks_exact(8)) {
            let word = u64::from_le_bytes(word.try_into().expect("chunks of 8 bytes"));
            any |= word;
            *lane = (*lane ^ word)
                .wrapping_mul(0x9fb2_1c65_1e98_df25)
                .rotate_left(31);
        }
    }
    if any == 0 {
        return 0;
    }
    lanes
        .iter()
        .fold(1, |all: u64, lane| {
            (all ^ lane)
                .wrapping_mul(0xff51_afd7_ed55_8ccd)
                .rotate_left(33)
        })
        .max(1)
}

/// The pages of a byte range: index, offset within the page, range within the buffer.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let within = (at % PAGE as u64) as usize;
        let piece = (PAGE - within).min(len - done);
        let range = done..done + piece;
        done += piece;
        Some((at / PAGE as u64, within, range))
    })
}
