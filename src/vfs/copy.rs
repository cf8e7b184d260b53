//! Copies inside the pool are clones: `copy_file_range` shares blocks.
//!
//! `cp` copies a large file by many calls while its source may be written. So that the copy is
//! the source at one instant, the first call on an empty destination pins the source, and calls
//! that go on where the last one ended show more of what was pinned. Whatever else happens to the
//! destination ends that.
//!
//! Invariants:
//! 1. At most one clone in pieces per destination; `pinned` is true while `pin` is set.
//! 2. What is shown of a pinned source ends at a block, or at the end of the source.

use std::sync::atomic::Ordering;

use super::caller::Caller;
use super::inodes::Inode;
use super::{HandleId, Vfs, check_range};
use crate::engine::{Equal, Share};
use crate::error::{Error, Kind, Result};
use crate::units::{BLOCK_SIZE, Ino, Time};

/// Most bytes that one call copies: 1 GiB, so that the answer fits the 32 bits that it has on
/// every kernel.
pub const COPY_BYTES_MAX: u64 = 1024 * 1024 * 1024;

/// Most bytes that one call copies where nothing can be shared, because the offsets differ within
/// a block: 8 MiB, so that the call stays short.
const UNSHARED_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// A clone in pieces.
#[derive(Debug)]
pub(super) struct Pin {
    /// The source.
    src: Ino,
    /// Size of the source when it was pinned, in bytes.
    size: u64,
    /// Bytes of the destination that are shown: where the next call goes on. Equal to `size`: all
    /// is done, and one more call is told so.
    next: u64,
}

impl Vfs {
    /// Copies up to `len` bytes; returns how many: fewer at will, 0 only at the end of the source.
    pub fn copy(
        &self,
        caller: &Caller,
        (src_handle, src, src_offset): (HandleId, Ino, u64),
        (dst_handle, dst, dst_offset): (HandleId, Ino, u64),
        len: u64,
    ) -> Result<u64> {
        self.check_writable()?;
        let mut len = len.min(COPY_BYTES_MAX);
        check_range(src_offset, len)?;
        check_range(dst_offset, len)?;
        let from = self.opened(src_handle, src);
        let to = self.opened(dst_handle, dst);
        self.strip_privileges(caller, &to)?;
        // What is not shown yet of a source that is itself being made is not copied.
        self.end_pin(&from)?;
        if src != dst && src_offset == dst_offset {
            let done = self.copy_pinned(&from, &to, src_offset, len)?;
            if let Some(done) = done {
                return Ok(done);
            }
        }
        self.end_pin(&to)?;
        if src_offset % BLOCK_SIZE as u64 != dst_offset % BLOCK_SIZE as u64 {
            len = len.min(UNSHARED_BYTES_MAX);
        }
        self.pool
            .clone_range(src, src_offset, dst, dst_offset, len, Time::now())
    }

    /// Shares ranges of blocks of `src` with `dst`, which is open for writing. By a handle
    /// whose changes are durable before they are answered they are.
    ///
    /// # Errors
    /// `Denied`; as [`Pool::share_ranges`](crate::engine::Pool::share_ranges).
    pub fn share(
        &self,
        caller: &Caller,
        src: Ino,
        (dst_handle, dst): (HandleId, Ino),
        ranges: &[Share],
    ) -> Result<()> {
        self.check_writable()?;
        let flags = self.handle_flags(dst_handle, dst);
        if !flags.write {
            return Err(Error::new(
                Kind::Denied,
                "the destination is not open for writing: open it so",
            ));
        }
        let to = self.opened(dst_handle, dst);
        self.strip_privileges(caller, &to)?;
        // What is not shown yet of a source that is itself being made is not copied.
        if let Some(from) = self.inodes.get(src) {
            self.end_pin(&from)?;
        }
        self.end_pin(&to)?;
        self.pool.share_ranges(src, dst, ranges, Time::now())?;
        if flags.sync { self.pool.sync() } else { Ok(()) }
    }

    /// Shares what is equal of a range of `src` with `dst`, which is open for writing unless this is
    /// `dry`. Nothing that anybody can see changes, but for the space that is used. Of a file that is
    /// just being copied nothing is shared: it shares all that it can.
    ///
    /// # Errors
    /// `Denied`; as [`Pool::share_equal`](crate::engine::Pool::share_equal).
    pub fn share_equal(
        &self,
        src: Ino,
        (dst_handle, dst): (HandleId, Ino),
        range: &Share,
        dry: bool,
    ) -> Result<Equal> {
        if !dry {
            self.check_writable()?;
            if !self.handle_flags(dst_handle, dst).write {
                return Err(Error::new(
                    Kind::Denied,
                    "the destination is not open for writing: open it so",
                ));
            }
        }
        let is_pinned = |ino: Ino| {
            let inode = self.inodes.get(ino);
            inode.is_some_and(|inode| inode.pinned.load(Ordering::Acquire))
        };
        if is_pinned(src) || is_pinned(dst) {
            return Ok(Equal::default());
        }
        self.pool.share_equal(src, dst, range, dry)
    }

    /// Ends the clone in pieces that is made of `inode`, if there is one.
    pub(super) fn end_pin(&self, inode: &Inode) -> Result<()> {
        if !inode.pinned.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut pin = inode.pin.lock();
        inode.pinned.store(false, Ordering::Release);
        match pin.take() {
            Some(pin) if pin.next < pin.size => self.pool.end_clone(inode.ino),
            _ => Ok(()),
        }
    }

    /// The copy as a whole clone, or as the next piece of one. `None`: it is neither.
    fn copy_pinned(&self, from: &Inode, to: &Inode, offset: u64, len: u64) -> Result<Option<u64>> {
        let mut slot = to.pin.lock();
        match slot.as_mut() {
            Some(pin) if pin.src == from.ino && pin.next == offset => {
                if pin.next == pin.size {
                    // The end, told once: who asks again wants what the source got since.
                    *slot = None;
                    to.pinned.store(false, Ordering::Release);
                    return Ok(Some(0));
                }
                self.show_more(to, pin, len)
            }
            None if offset == 0 && self.pool.attr(to.ino)?.size == 0 => {
                let begun = self.begin(from, to, len)?;
                if let Some(pin) = begun.pin {
                    *slot = Some(pin);
                    to.pinned.store(true, Ordering::Release);
                }
                Ok(begun.done)
            }
            _ => Ok(None),
        }
    }

    /// Shows the next piece.
    fn show_more(&self, to: &Inode, pin: &mut Pin, len: u64) -> Result<Option<u64>> {
        let shown = shown_end(pin.next, len, pin.size);
        if shown == pin.next || !self.pool.extend_clone(to.ino, shown, Time::now())? {
            return Ok(None);
        }
        let done = shown - pin.next;
        pin.next = shown;
        if pin.next == pin.size {
            self.pool.end_clone(to.ino)?;
        }
        Ok(Some(done))
    }

    /// First call on an empty destination, from the start of the source.
    fn begin(&self, from: &Inode, to: &Inode, len: u64) -> Result<Begun> {
        let size = self.pool.attr(from.ino)?.size;
        let now = Time::now();
        if size == 0 {
            return Ok(Begun {
                done: Some(0),
                pin: None,
            });
        }
        if len >= size {
            self.pool.clone_file(from.ino, to.ino, now)?;
            // The source may have grown or shrunk since its size was asked for.
            let size = self.pool.attr(to.ino)?.size;
            if size > len {
                self.pool.truncate(to.ino, len, now)?;
            }
            let done = size.min(len);
            return Ok(Begun {
                done: Some(done),
                pin: Some(Pin {
                    src: from.ino,
                    size: done,
                    next: done,
                }),
            });
        }
        let shown = shown_end(0, len, size);
        if shown == 0 {
            return Ok(Begun::default());
        }
        match self.pool.begin_clone(from.ino, to.ino, shown, now) {
            Ok(()) => Ok(Begun {
                done: Some(shown),
                pin: Some(Pin {
                    src: from.ino,
                    size,
                    next: shown,
                }),
            }),
            // It shrank since its size was asked for.
            Err(error) if error.kind() == Kind::Invalid => Ok(Begun::default()),
            Err(error) => Err(error),
        }
    }
}

#[derive(Default)]
struct Begun {
    /// Bytes copied; `None` if this is no case for a clone.
    done: Option<u64>,
    pin: Option<Pin>,
}

/// Where a piece of `len` bytes from `start`, a block boundary, ends: at the end of the source or
/// at a block boundary.
fn shown_end(start: u64, len: u64, size: u64) -> u64 {
    let end = start.saturating_add(len);
    if end >= size {
        return size;
    }
    (end - end % BLOCK_SIZE as u64).max(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_at_blocks_or_at_the_end() {
        assert_eq!(shown_end(0, 4096, 10_000), 4096);
        assert_eq!(shown_end(0, 5000, 10_000), 4096);
        assert_eq!(shown_end(0, 100, 10_000), 0);
        assert_eq!(shown_end(8192, 1807, 10_000), 8192);
        assert_eq!(shown_end(8192, 1808, 10_000), 10_000);
        assert_eq!(shown_end(8192, u64::MAX, 10_000), 10_000);
    }
}
