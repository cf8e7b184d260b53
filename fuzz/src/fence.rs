//! A device that knows what may be written where, and panics at anything else: a pool that lies
//! about itself must not make the engine destroy its superblocks and its journal.

use std::io;
use std::sync::Arc;

use nodupe::device::{BlockDevice, SimDevice};
use nodupe::ondisk::journal::{BATCH_MAGIC, BATCH_MAGIC_AT};
use nodupe::ondisk::superblock::{HEAD_BLOCKS, SLOTS, Superblock};

use super::forge::{B, u64_at};

/// A device with a fence around what is not data.
#[derive(Debug)]
pub struct Fence {
    inner: Arc<SimDevice>,
    /// First and last but one block that can be allocated, as the superblock says.
    first: u64,
    end: u64,
}

impl Fence {
    /// For a pool that `sb` describes.
    pub fn new(inner: Arc<SimDevice>, sb: &Superblock) -> Self {
        Self {
            inner,
            first: sb.first_block(),
            end: sb.end_block(),
        }
    }

    fn check(&self, addr: u64, data: &[u8]) {
        let (start, end) = (addr / B, (addr + data.len() as u64) / B);
        if start >= self.first && end <= self.end {
            return;
        }
        let slot = start < SLOTS || (self.end..self.end + SLOTS).contains(&start);
        if slot {
            let whole = <&[u8; 4096]>::try_from(data).ok();
            let found = whole.and_then(|page| Superblock::decode(page).ok());
            let found = found.unwrap_or_else(|| panic!("no superblock is written to {start}"));
            assert!(found.end_block() == self.end && found.first_block() == self.first);
            return;
        }
        assert!(
            start >= HEAD_BLOCKS && end <= self.first,
            "blocks {start} to {end} are written, the pool has {} to {}",
            self.first,
            self.end
        );
        let magic = u64_at(data, BATCH_MAGIC_AT);
        assert_eq!(magic, BATCH_MAGIC, "no batch is written to block {start}");
    }
}

impl BlockDevice for Fence {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_at(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(addr, buf)
    }

    fn write_at(&self, addr: u64, data: &[u8]) -> io::Result<()> {
        self.check(addr, data);
        self.inner.write_at(addr, data)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn discard(&self, addr: u64, len: u64) -> io::Result<()> {
        let (start, end) = (addr / B, (addr + len) / B);
        assert!(
            start >= self.first && end <= self.end,
            "blocks {start} to {end} are discarded, the pool has {} to {}",
            self.first,
            self.end
        );
        self.inner.discard(addr, len)
    }
}
