//! A set of block numbers in little memory: which nodes of extent maps a pass has entered.
//!
//! Invariant: a chunk takes two bytes for each block in it while these are few, and one bit for
//! each block that could be in it when they are many: 32 MiB for each TiB of the pool at most.

use std::collections::BTreeMap;

/// Blocks of a chunk.
const CHUNK: u64 = 65536;
/// Blocks in a chunk above which bits are smaller.
const SPARSE_MAX: usize = 4096;
const WORDS: usize = CHUNK as usize / 64;
const CHUNK_COST: usize = 64;

#[derive(Debug)]
enum Chunk {
    /// Sorted.
    Sparse(Vec<u16>),
    Bits(Box<[u64; WORDS]>),
}

/// A set of blocks.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    chunks: BTreeMap<u64, Chunk>,
    cost: usize,
}

impl Seen {
    /// Adds a block; false if it was in the set.
    pub(crate) fn insert(&mut self, block: u64) -> bool {
        let cost = &mut self.cost;
        let chunk = self.chunks.entry(block / CHUNK).or_insert_with(|| {
            *cost += CHUNK_COST;
            Chunk::Sparse(Vec::new())
        });
        let low = (block % CHUNK) as u16;
        match chunk {
            Chunk::Sparse(blocks) => {
                let Err(at) = blocks.binary_search(&low) else {
                    return false;
                };
                blocks.insert(at, low);
                *cost += 2;
                if blocks.len() > SPARSE_MAX {
                    *cost = *cost + WORDS * 8 - blocks.len() * 2;
                    let mut bits = Box::new([0; WORDS]);
                    for low in blocks.iter() {
                        bits[usize::from(*low) / 64] |= 1 << (low % 64);
                    }
                    *chunk = Chunk::Bits(bits);
                }
                true
            }
            Chunk::Bits(bits) => {
                let word = &mut bits[usize::from(low) / 64];
                let new = *word & (1 << (low % 64)) == 0;
                *word |= 1 << (low % 64);
                new
            }
        }
    }

    /// Bytes that it takes, about.
    pub(crate) fn cost(&self) -> usize {
        self.cost
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.chunks.clear();
        self.cost = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_few_and_many() {
        let mut seen = Seen::default();
        for block in (0..20_000).map(|i| i * 7) {
            assert!(seen.insert(block));
            assert!(!seen.insert(block));
        }
        assert!(seen.insert(1 << 40) && seen.insert(1));
        assert!((0..20_000).all(|i| !seen.insert(i * 7)));
        assert!(seen.cost() < 40_000, "{}", seen.cost());
    }
}
