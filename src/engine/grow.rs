//! Growing a pool, mounted or not; and what the host allocates for it in advance.
//!
//! The order, and why:
//!
//! 1. The device grows, and that is made durable: a superblock must never name blocks that a crash
//!    takes away again.
//! 2. Both slots of the superblock are copied to the new end, so that copies are where the end of
//!    the device is, whichever size the newest superblock has.
//! 3. A checkpoint names the new size, with the group record that goes with it: its flip is the
//!    instant at which the pool is larger.
//! 4. Only then blocks behind the old end are allocated, the old places of the copies among them.
//!    A journal that maps them is replayed on a superblock that knows them.
//!
//! A crash in between leaves a device that is larger than the pool on it, which is harmless:
//! growing again goes on from there.

use crate::error::{Error, Kind, Result};
use crate::ondisk::superblock::{FLAG_PREALLOCATED, POOL_BLOCKS_MAX, SLOTS};
use crate::units::BLOCK_SIZE;

use super::pool::Pool;

const B: u64 = BLOCK_SIZE as u64;

impl Pool {
    /// Makes the pool `size` bytes large, rounded down to whole blocks; `None`: as large as its
    /// device has become. Returns its size. Nothing happens if that is its size already. Everything
    /// else goes on meanwhile.
    ///
    /// # Errors
    /// `Invalid` if the pool is larger already or the device cannot be; `TooLarge` over the limit
    /// of the format; `NoSpace` if the host has none.
    pub fn grow(&self, size: Option<u64>) -> Result<u64> {
        self.check_writable()?;
        let asked = match size {
            Some(size) => size,
            None => self
                .device
                .host_len()
                .map_err(|source| Error::io("cannot read the length of the device", source))?,
        };
        let blocks = asked / B;
        let is_larger = || -> Result<bool> {
            let now = self.superblock.lock().blocks;
            if blocks > POOL_BLOCKS_MAX {
                return Err(Error::new(Kind::TooLarge, "a pool has at most 1 PiB"));
            }
            if blocks < now {
                return Err(Error::new(
                    Kind::Invalid,
                    format!(
                        "a pool cannot shrink: size={} asked={}",
                        now * B,
                        blocks * B
                    ),
                ));
            }
            Ok(blocks > now)
        };
        if !is_larger()? {
            return Ok(blocks * B);
        }
        self.checkpoint_with(false, || {
            if is_larger()? {
                self.extend_device(blocks)?;
                self.meta.write().space.begin_growth(blocks - SLOTS);
            }
            Ok(())
        })?;
        self.keep_home_or_warn();
        log::info!("the pool has grown to {} bytes", blocks * B);
        Ok(blocks * B)
    }

    /// Makes the device larger and puts copies of the superblock at its end.
    fn extend_device(&self, blocks: u64) -> Result<()> {
        let old = self.device.len();
        self.device
            .grow(blocks * B)
            .map_err(|source| match source.kind() {
                std::io::ErrorKind::InvalidInput | std::io::ErrorKind::Unsupported => Error::new(
                    Kind::Invalid,
                    format!(
                        "the device is not that large: make it larger first (lvextend...): size={old} asked={}",
                        blocks * B
                    ),
                ),
                _ => Error::io("cannot make the device larger", source),
            })?;
        let is_preallocated = self.superblock.lock().flags & FLAG_PREALLOCATED != 0;
        if is_preallocated && blocks * B > old {
            self.device
                .preallocate(old, blocks * B - old)
                .map_err(|source| Error::io("cannot allocate what the pool grows by", source))?;
        }
        let mut page = [0; BLOCK_SIZE];
        for slot in 0..SLOTS {
            self.device
                .read_at(slot * B, &mut page)
                .map_err(|source| Error::io("cannot read the superblock", source))?;
            self.device_write(blocks - SLOTS + slot, &page)?;
        }
        self.device_sync()
    }

    /// Asks the host to allocate what must always be writable: everything up to the end of the home
    /// of the nodes, the copies of the superblock, and the ring. Does nothing where the host makes
    /// no such promise.
    pub(crate) fn keep_home(&self) -> Result<()> {
        let (end, copies) = {
            let meta = self.meta.read();
            (meta.space.home().1, meta.space.end_after())
        };
        let kept = self
            .device
            .preallocate(0, end * B)
            .and_then(|()| self.device.preallocate(copies * B, SLOTS * B))
            .and_then(|()| self.journal.lock().preallocate());
        match kept {
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {
                log::debug!("the host allocates nothing in advance");
                Ok(())
            }
            kept => kept.map_err(|source| {
                Error::io("the host does not keep the reserve of the pool", source)
            }),
        }
    }

    /// As [`keep_home`](Self::keep_home), where the pool is used anyway: at every open, because it
    /// may have been copied as a sparse file.
    pub(crate) fn keep_home_or_warn(&self) {
        if let Err(error) = self.keep_home() {
            log::warn!("{error}: deleting may fail while the host is full");
        }
    }
}
