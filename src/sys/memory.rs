//! Aligned memory that the kernel can be given for a while.
//!
//! The memory of an [`Aligned`] stays where it is while the value moves, which is what a transfer
//! under way relies on (`ring.rs`).

use std::fmt;

/// Memory with a border of `ALIGN` bytes in it and a given length behind that.
pub struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

/// The alignment, in bytes: what any disk takes for direct I/O.
const ALIGN: usize = 4096;

impl fmt::Debug for Aligned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the bytes: devices are printed in messages, and the bytes are users' data.
        write!(f, "{} bytes", self.len())
    }
}

impl Aligned {
    /// `capacity` zero bytes.
    pub fn new(capacity: usize) -> Self {
        // As much more that a border is within. The vector is never resized, so its memory never
        // moves.
        let bytes = vec![0; capacity + ALIGN];
        let start = bytes.as_ptr().addr().next_multiple_of(ALIGN) - bytes.as_ptr().addr();
        Self { bytes, start }
    }

    /// No memory at all, to leave behind when the real one is lent.
    pub fn nothing() -> Self {
        Self {
            bytes: Vec::new(),
            start: 0,
        }
    }

    /// Bytes that there are.
    pub fn len(&self) -> usize {
        self.bytes.len().saturating_sub(ALIGN)
    }

    /// True for [`nothing`](Self::nothing).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first `len` bytes.
    pub fn bytes(&self, len: usize) -> &[u8] {
        &self.bytes[self.start..][..len]
    }

    /// The first `len` bytes, to change.
    pub fn bytes_mut(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.start..][..len]
    }
}
