//! Layer 1: bytes at addresses. What a pool lives on, and what it may rely on there.
//!
//! The contract, which the engine is written against and the simulated device enforces:
//!
//! 1. A write is *completed* when [`BlockDevice::write_at`] returns and *durable* when a later
//!    [`BlockDevice::sync`] returns `Ok`.
//! 2. After a crash each completed, not yet durable write is present, absent or torn at
//!    [`SECTOR_SIZE`](crate::units::SECTOR_SIZE), independently of every other.
//! 3. A failed sync leaves the state of those writes unknown for good: nobody retries it.
//!    A write that failed for want of space on the host is another thing: what it wrote of its own
//!    range is unknown, everything else is as before, and it may be repeated, there or elsewhere.
//! 4. Addresses and lengths are multiples of [`BLOCK_SIZE`](crate::units::BLOCK_SIZE). Memory may
//!    have any alignment; a device that needs aligned memory copies.

use std::fmt::Debug;
use std::io;

mod bounce;
mod content;
mod file;
mod queue;
mod sim;

pub use bounce::Bounce;
pub(crate) use bounce::BouncePool;
pub use file::{FileDevice, OpenMode};
pub use queue::{QueuedRead, ReadDone, ReadQueue};
pub use sim::{Fault, FaultOp, Repeat, SimCounts, SimDevice, SimReplay, SimTrace, SplitMix64};

/// A device or file that holds a pool (or a journal). See the module for the contract.
pub trait BlockDevice: Send + Sync + Debug {
    /// Size in bytes, a multiple of the block size.
    fn len(&self) -> u64;

    /// True for a device without a single block.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` from `addr`: whole or an error, never short. Bytes never written read as zero.
    fn read_at(&self, addr: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Where reads are handed over that nobody waits for; `None` where there is no such thing and
    /// whoever wants to read waits. Threads may start at the first call.
    fn queue(&self) -> Option<&ReadQueue> {
        None
    }

    /// Most blocks between two wanted ones that are cheaper read and thrown away than left out.
    fn gap_max(&self) -> u64 {
        0
    }

    /// Writes all of `data` at `addr`. Not durable before the next [`sync`](Self::sync).
    fn write_at(&self, addr: u64, data: &[u8]) -> io::Result<()>;

    /// Makes every completed write durable.
    fn sync(&self) -> io::Result<()>;

    /// Tells the host that `len` bytes at `addr` are not needed any more. Advisory: afterwards
    /// they read as zeros or as anything else.
    fn discard(&self, addr: u64, len: u64) -> io::Result<()>;

    /// Makes the device `len` bytes long, where the host can do that; what is added reads as
    /// zeros. Durable, as a write is, after the next [`sync`](Self::sync). Never shrinks.
    fn grow(&self, len: u64) -> io::Result<()> {
        if len <= self.len() {
            return Ok(());
        }
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Length that the device has on the host by now, in bytes, which may be more than
    /// [`len`](Self::len): somebody made a block device larger.
    fn host_len(&self) -> io::Result<u64> {
        Ok(self.len())
    }

    /// Bytes that the host has allocated for the device.
    fn allocated(&self) -> io::Result<u64> {
        Ok(self.len())
    }

    /// Bytes that the host can still allocate for the device, of all that share it; `None` if
    /// everything is allocated for good, as on a block device.
    fn host_free(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }

    /// Makes the host keep space for a range, so that writes to it never fail for want of it.
    /// What is there stays; what was never written reads as zeros.
    ///
    /// # Errors
    /// `Unsupported` where the host makes no such promise.
    fn preallocate(&self, _addr: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
