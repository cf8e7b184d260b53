//! Places that the journal maps and replay has not mapped yet: nobody gets them, and whoever
//! counts free blocks for the device counts them as free, because no tree refers to them.

use crate::error::{Error, Result};
use crate::ondisk::extent::Extent;

use super::Space;

impl Space {
    /// As [`take_exact`](Self::take_exact), for a run that replay maps later.
    pub(crate) fn hold(&mut self, run: Extent, generation: u64) -> Result<()> {
        self.take_exact(run, generation)?;
        for (_, start, end) in self.parts(run.block, run.end()) {
            self.held.insert(start, end);
        }
        Ok(())
    }

    /// Replay maps a run that was held.
    pub(crate) fn unhold(&mut self, run: Extent) -> Result<()> {
        for (_, start, end) in self.parts(run.block, run.end()) {
            if self.held.remove(&start) != Some(end) {
                return Err(Error::corrupt("the journal changed while it was read"));
            }
        }
        Ok(())
    }

    /// Blocks of a group that are held.
    pub(super) fn held_in(&self, group: u64) -> u32 {
        let (start, end) = self.group_range(group);
        let parts = self.held.range(start..end);
        parts.map(|(from, to)| (to - from) as u32).sum()
    }
}
