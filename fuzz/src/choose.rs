//! Where choices come from: the bytes of a fuzzer, or a seeded generator.
//!
//! Choices made of bytes are stable: one byte for each choice among up to 256, so that a small
//! change of the input is a small change of what is done.

use nodupe::device::SplitMix64;

/// Gives numbers.
pub trait Choose {
    /// A number below `most`, which is not 0.
    fn below(&mut self, most: u64) -> u64;

    /// True when nothing is left to choose from.
    fn is_done(&self) -> bool {
        false
    }

    /// An index into `len` things.
    fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// Any number.
    fn any(&mut self) -> u64 {
        self.below(1 << 32) << 32 | self.below(1 << 32)
    }
}

/// Choices from bytes; zeros when they are used up.
pub struct Bytes<'a>(pub &'a [u8]);

impl Choose for Bytes<'_> {
    fn below(&mut self, most: u64) -> u64 {
        let width = match most {
            0..=0x100 => 1,
            0x101..=0x1_0000 => 2,
            0x1_0001..=0x1_0000_0000 => 4,
            _ => 8,
        };
        let mut raw = [0; 8];
        let taken = width.min(self.0.len());
        raw[..taken].copy_from_slice(&self.0[..taken]);
        self.0 = &self.0[taken..];
        u64::from_le_bytes(raw) % most
    }

    fn is_done(&self) -> bool {
        self.0.is_empty()
    }
}

impl Choose for SplitMix64 {
    fn below(&mut self, most: u64) -> u64 {
        SplitMix64::below(self, most)
    }
}
