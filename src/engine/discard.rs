//! Discard: freed blocks go back to the host, in the background.
//!
//! Invariants:
//!
//! 1. Only blocks that nobody can allocate are discarded: those of a piece are taken out of the
//!    space map first and put back afterwards. No checkpoint is written meanwhile, so none sees
//!    them missing.
//! 2. Blocks come here once the checkpoint that freed them is durable and nobody reads them any
//!    more, as for allocation.
//! 3. It is best effort: what waits beyond `WAITING_MAX` of `space.rs` is not given back before it
//!    is used and freed again. What waited when the daemon died is found by giving back all that is
//!    free, in slices in the background, when a pool is opened that was not closed.

use crate::error::{Kind, Result};
use crate::ondisk::superblock::FLAG_PREALLOCATED;
use crate::units::BLOCK_SIZE;

use super::meta::Meta;
use super::pool::Pool;

/// Discards of one slice, with no checkpoint between them.
const RUNS: usize = 64;
/// Blocks taken in one slice: 256 MiB.
const BLOCKS: u64 = 64 * 1024;

impl Pool {
    /// Gives back a slice of what waits for it. True if there may be more. Called with no lock
    /// held.
    ///
    /// # Errors
    /// `Poisoned`; `Corrupt` or `Io` if the space map cannot be read. A host that takes nothing
    /// back is no error.
    pub(crate) fn discard_some(&self) -> Result<bool> {
        self.check_poison()?;
        let keeps = || self.superblock.lock().flags & FLAG_PREALLOCATED != 0;
        if self.read_only || keeps() || !self.meta.read().space.has_discards() {
            return Ok(false);
        }
        let _one = self.checkpointing.lock(); // I1
        let Some(most) = self.reserve_for_discard() else {
            return Ok(false); // nearly full: space matters more than the host
        };
        let taken = {
            let mut meta = self.meta.write();
            let taken = meta.take_discards(most);
            // What was taken is not free any more, so the promise is kept in another way.
            self.counters.unreserve_exactly(most);
            taken?
        };
        for &(start, end) in &taken {
            let (at, len) = (start * BLOCK_SIZE as u64, (end - start) * BLOCK_SIZE as u64);
            if let Err(error) = self.device.discard(at, len) {
                log::debug!("the host took no discard: {error}");
            }
        }
        let mut meta = self.meta.write();
        for (start, end) in taken {
            meta.space.put_back(start, end);
        }
        Ok(meta.space.has_discards())
    }

    /// Promises blocks, so that taking them breaks no other promise.
    fn reserve_for_discard(&self) -> Option<u64> {
        let mut most = BLOCKS;
        while most >= super::space::PIECE {
            match self.counters.reserve_exactly(most) {
                Ok(()) => return Some(most),
                Err(error) if error.kind() == Kind::NoSpace => most /= 2,
                Err(_) => return None,
            }
        }
        None
    }
}

impl Meta {
    /// Takes aligned, entirely free pieces out of the space map, up to `most` blocks, from what
    /// waits to be discarded.
    fn take_discards(&mut self, most: u64) -> Result<Vec<(u64, u64)>> {
        let mut taken: Vec<(u64, u64)> = Vec::new();
        let mut left = most;
        while taken.len() < RUNS
            && let Some((group, start, end)) = self.space.next_discard(left)
        {
            if let Err(error) = self.ensure_group(group) {
                taken
                    .into_iter()
                    .for_each(|(start, end)| self.space.put_back(start, end));
                return Err(error);
            }
            for (start, end) in self.space.take_pieces(start, end) {
                left -= end - start;
                match taken.last_mut() {
                    Some(last) if last.1 == start => last.1 = end,
                    _ => taken.push((start, end)),
                }
            }
        }
        Ok(taken)
    }
}
