//! Which blocks are read by which transfer.
//!
//! Invariants:
//!
//! 1. Each wanted block is in one piece, and no piece is longer than the caller allows.

use std::ops::Range;

use crate::units::BLOCK_SIZE;

/// A block that is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Want {
    /// Block of the file.
    pub(crate) at: u64,
    /// Block of the pool.
    pub(crate) block: u64,
    /// Checksum of its contents.
    pub(crate) sum: u32,
}

/// Blocks that are read by one transfer, gaps between them included.
#[derive(Debug)]
pub(crate) struct Piece {
    /// Block of the pool.
    pub(crate) first: u64,
    /// Blocks from the first wanted one to the last.
    pub(crate) len: u64,
    /// In the order of the pool.
    pub(crate) wants: Vec<Want>,
}

/// Joins wanted blocks, which are in order, to pieces of at most `len_max` blocks: neighbours, and
/// what has at most `gap_max` blocks in between, as long as half of what is read is wanted.
pub(crate) fn pieces(wants: Vec<Want>, gap_max: u64, len_max: u64) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for want in wants {
        if let Some(last) = pieces.last_mut() {
            let gap = want.block - (last.first + last.len);
            let len = last.len + gap + 1;
            let dense = gap == 0 || len <= 2 * (last.wants.len() as u64 + 1) + gap_max;
            if gap <= gap_max && dense && len <= len_max {
                last.len = len;
                last.wants.push(want);
                continue;
            }
        }
        pieces.push(Piece {
            first: want.block,
            len: 1,
            wants: vec![want],
        });
    }
    pieces
}

impl Piece {
    /// What was read of a block.
    pub(crate) fn bytes<'a>(&self, buffer: &'a [u8], want: &Want) -> &'a [u8] {
        &buffer[self.place(want)]
    }

    /// Where in the buffer of the piece a block lies.
    pub(crate) fn place(&self, want: &Want) -> Range<usize> {
        let from = (want.block - self.first) as usize * BLOCK_SIZE;
        from..from + BLOCK_SIZE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(blocks: &[u64], gap_max: u64, len_max: u64) -> Vec<(u64, u64, usize)> {
        let wants = blocks.iter().map(|&block| Want {
            at: 0,
            block,
            sum: 0,
        });
        pieces(wants.collect(), gap_max, len_max)
            .iter()
            .map(|piece| (piece.first, piece.len, piece.wants.len()))
            .collect()
    }

    #[test]
    fn neighbours_become_one_transfer() {
        assert_eq!(joined(&[5, 6, 7, 9], 0, 256), [(5, 3, 3), (9, 1, 1)]);
        assert_eq!(joined(&[5, 6, 7, 8], 0, 2), [(5, 2, 2), (7, 2, 2)]);
        assert_eq!(joined(&[], 8, 256), []);
    }

    #[test]
    fn small_gaps_are_read_along_while_half_is_wanted() {
        assert_eq!(joined(&[5, 6, 10, 20], 4, 256), [(5, 6, 3), (20, 1, 1)]);
        let sparse: Vec<u64> = (0..100).map(|i| i * 5).collect();
        let read: u64 = joined(&sparse, 4, 256).iter().map(|piece| piece.1).sum();
        assert!(read <= 3 * 100, "{read}");
    }
}
