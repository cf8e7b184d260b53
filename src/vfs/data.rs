//! The contents of files: read, write, allocate, seek.

use super::caller::Caller;
use super::{HandleId, Vfs, check_range};
use crate::engine::ReadBytes;
use crate::error::{Error, Kind, Result};
use crate::units::{BLOCK_SIZE, Ino, Time};

/// What to do with a range of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocate {
    /// Grow the file to the end of the range. Blocks come when they are written, in a pool where
    /// every write goes to a new place; what is checked is that there is room for them.
    Extend,
    /// Check that there is room.
    KeepSize,
    /// Make the range a hole.
    Punch,
    /// Make the range zeros, and grow the file to its end.
    Zero,
    /// Make the range zeros as far as the file reaches.
    ZeroKeepSize,
}

/// What to look for in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// The next data.
    Data,
    /// The next hole; the end of the file is one.
    Hole,
}

impl Vfs {
    /// Appends up to `len` bytes of the file from `offset` to `out`; fewer at its end.
    pub fn read(&self, ino: Ino, offset: u64, len: usize, out: &mut Vec<u8>) -> Result<()> {
        self.pool.read(ino, offset, len, out)
    }

    /// Reads by an open handle as [`read`](Self::read) does, and calls `done` with the outcome: before this returns,
    /// or later from a thread that must not be made to wait for another read.
    pub fn read_with(
        &self,
        handle: HandleId,
        ino: Ino,
        offset: u64,
        len: usize,
        done: impl FnOnce(Result<ReadBytes>) + Send + 'static,
    ) {
        let handle = self.handle_of(handle, ino);
        let stream = handle.as_ref().map(|handle| &handle.stream);
        self.pool.read_with(ino, offset, len, stream, done);
    }

    /// Writes all of `data`. `strip`: the caller may not keep set-id bits of the file.
    pub fn write(
        &self,
        caller: &Caller,
        handle: HandleId,
        ino: Ino,
        offset: u64,
        data: &[u8],
        strip: bool,
    ) -> Result<()> {
        self.check_writable()?;
        check_range(offset, data.len() as u64)?;
        let inode = self.opened(handle, ino);
        self.end_pin(&inode)?;
        if strip {
            self.strip_privileges(caller, &inode)?;
        }
        self.pool.write(ino, offset, data, Time::now())
    }

    /// Allocates or frees a range.
    pub fn allocate(
        &self,
        caller: &Caller,
        handle: HandleId,
        ino: Ino,
        offset: u64,
        len: u64,
        what: Allocate,
    ) -> Result<()> {
        self.check_writable()?;
        if len == 0 {
            return Err(Error::new(Kind::Invalid, "an empty range is not allocated"));
        }
        let end = check_range(offset, len)?;
        let inode = self.opened(handle, ino);
        self.end_pin(&inode)?;
        self.strip_privileges(caller, &inode)?;
        let size = self.pool.attr(ino)?.size;
        let now = Time::now();
        match what {
            Allocate::Extend | Allocate::KeepSize => self.check_room(ino, offset, end)?,
            Allocate::Punch | Allocate::Zero | Allocate::ZeroKeepSize => {
                if offset < size {
                    self.pool.punch(ino, offset, end.min(size) - offset, now)?;
                }
            }
        }
        if matches!(what, Allocate::Extend | Allocate::Zero) && end > size {
            self.pool.truncate(ino, end, now)?;
        }
        Ok(())
    }

    /// Offset of the next data or hole at or behind `offset`.
    pub fn seek(&self, ino: Ino, offset: i64, what: Seek) -> Result<u64> {
        let Ok(offset) = u64::try_from(offset) else {
            return Err(Error::new(
                Kind::NoSuchOffset,
                format!("no file reaches there: offset={offset}"),
            ));
        };
        match what {
            Seek::Data => self.pool.seek_data(ino, offset),
            Seek::Hole => self.pool.seek_hole(ino, offset),
        }
    }

    /// Refuses a range that cannot be filled: even if every block that the file has were in the
    /// range, the rest would not fit the pool.
    fn check_room(&self, ino: Ino, offset: u64, end: u64) -> Result<()> {
        let block = BLOCK_SIZE as u64;
        let bytes = end.next_multiple_of(block) - offset / block * block;
        let missing = bytes.saturating_sub(self.pool.attr(ino)?.mapped);
        let available = self.pool.usage().available;
        if missing > available {
            return Err(Error::new(
                Kind::NoSpace,
                format!("the pool has no room for it: bytes={missing} available={available}"),
            ));
        }
        Ok(())
    }
}
