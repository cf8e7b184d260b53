//! Layer vfs: what POSIX says about files, told over [`Pool`]. No FUSE, no errno, no system calls.
//!
//! What it owns, none of it on disk: how often the kernel refers to each inode, the open handles,
//! and the clones that a caller makes in pieces.
//!
//! Invariants:
//! 1. An inode without a name is handed to [`Pool::reclaim`] exactly once, when the last lookup
//!    and the last handle of it are gone, and never before.
//! 2. No lock of this layer is held while a lock of another inode of this layer is taken.
//! 3. Nothing changes the pool when [`VfsOptions::read_only`] is set.
//! 4. Set-id bits and file capabilities do not survive a change of the contents by somebody who
//!    may not keep them.

use std::fmt::Debug;
use std::sync::{Arc, OnceLock};

use crate::engine::{Attr, Pool};
use crate::error::{Error, Kind, Result};
use crate::units::Ino;

mod attributes;
mod caller;
mod copy;
mod data;
mod directory;
mod handles;
mod inodes;
mod names;
mod xattrs;

pub use attributes::{BlocksPolicy, Change, Space};
pub use caller::{Access, Caller};
pub use copy::COPY_BYTES_MAX;
pub use data::{Allocate, Seek};
pub use directory::{COOKIE_DOT, COOKIE_DOT_DOT};
pub use handles::{HandleId, OpenFlags, StalePages};
pub use names::{NewInode, UNNAMED_PREFIX};

use attributes::UsageCache;
use handles::Handles;
use inodes::{Inode, Inodes};

/// Largest size of a file, in bytes: 32 PiB, far above any pool, far below where sums overflow.
pub const FILE_BYTES_MAX: u64 = 1 << 55;

/// Longest name of a directory entry, in bytes.
pub const NAME_BYTES_MAX: usize = 255;

/// Longest target of a symbolic link, in bytes: a path with its NUL fits 4096.
pub const TARGET_BYTES_MAX: usize = 4095;

/// Bits of a mode that set the effective user of who executes the file.
pub(crate) const MODE_SETUID: u32 = 0o4000;
/// The same for the group; on a directory: entries inherit its group.
pub(crate) const MODE_SETGID: u32 = 0o2000;
/// Execute permission of the group.
pub(crate) const MODE_GROUP_EXECUTE: u32 = 0o0010;
/// Every bit of a mode that is not the file type.
pub(crate) const MODE_BITS: u32 = 0o7777;

/// How a [`Vfs`] behaves.
#[derive(Clone, Copy, Debug, Default)]
pub struct VfsOptions {
    /// What `st_blocks` tells.
    pub blocks: BlocksPolicy,
    /// Refuses every change with [`Kind::ReadOnly`].
    pub read_only: bool,
}

/// Is told what changed without the caller knowing it.
pub trait Watcher: Debug + Send + Sync {
    /// The mode of an inode is another one: its contents were changed by somebody who may not keep
    /// set-id bits.
    fn mode_changed(&self, ino: Ino);
}

/// A pool as a tree of files.
#[derive(Debug)]
pub struct Vfs {
    pool: Arc<Pool>,
    options: VfsOptions,
    watcher: OnceLock<Box<dyn Watcher>>,
    inodes: Inodes,
    handles: Handles,
    usage: UsageCache,
}

impl Vfs {
    /// The files of `pool`.
    pub fn new(pool: Arc<Pool>, options: VfsOptions) -> Self {
        Self {
            pool,
            options,
            watcher: OnceLock::new(),
            inodes: Inodes::default(),
            handles: Handles::default(),
            usage: UsageCache::default(),
        }
    }

    /// Names who is told of changes; once.
    pub fn watch(&self, watcher: impl Watcher + 'static) {
        assert!(self.watcher.set(Box::new(watcher)).is_ok(), "one watcher");
    }

    /// The pool below.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// The inode that `name` in `dir` names, counted as one lookup. "." is `dir` itself, which need
    /// not be a directory, and ".." is its parent: an NFS server asks for both.
    pub fn lookup(&self, dir: Ino, name: &[u8]) -> Result<Attr> {
        let attr = match name {
            b"." => self.attr_in_use(dir)?,
            b".." => {
                let parent = self.pool.attr(dir)?.parent;
                self.pool.attr(parent)?
            }
            name => {
                check_name_length(name)?;
                self.pool.lookup(dir, name)?
            }
        };
        self.inodes.add_lookup(attr.ino);
        Ok(attr)
    }

    /// Attributes of an inode that a file handle of an NFS client names. One that has no name and
    /// that nobody uses is being freed.
    fn attr_in_use(&self, ino: Ino) -> Result<Attr> {
        let attr = self.pool.attr(ino)?;
        if attr.nlink == 0 && self.inodes.get(ino).is_none() {
            return Err(Error::new(
                Kind::NotFound,
                format!("the file was removed: inode={ino}"),
            ));
        }
        Ok(attr)
    }

    /// Takes back `count` lookups of `ino`.
    pub fn forget(&self, ino: Ino, count: u64) -> Result<()> {
        if self.inodes.forget(ino, count) {
            self.pool.reclaim(ino)?;
        }
        Ok(())
    }

    /// Gives up every inode without a name that is still referred to: nobody can any more, the
    /// mount is gone.
    pub fn finish(&self) -> Result<()> {
        for ino in self.inodes.drain_orphans() {
            self.pool.reclaim(ino)?;
        }
        Ok(())
    }

    /// Attributes of an inode.
    pub fn attr(&self, ino: Ino) -> Result<Attr> {
        self.pool.attr(ino)
    }

    /// Target of a symbolic link.
    pub fn read_link(&self, ino: Ino) -> Result<Vec<u8>> {
        self.pool.read_link(ino)
    }

    /// Calls `done` when everything acknowledged so far is durable: at once, or later on another
    /// thread. A read-only mount has nothing to wait for.
    pub fn sync_with(&self, done: Box<dyn FnOnce(Result<()>) + Send>) {
        if self.options.read_only {
            done(Ok(()));
        } else {
            self.pool.sync_with(done);
        }
    }

    /// A write was answered: prepares for the sync that is likely to follow it.
    pub fn anticipate_sync(&self) {
        if !self.options.read_only {
            self.pool.anticipate_sync();
        }
    }

    /// Puts everything to its place in the pool. Takes long.
    pub fn checkpoint(&self) -> Result<()> {
        if self.options.read_only {
            return Ok(());
        }
        self.pool.checkpoint()
    }

    /// What `inode` is in the table, or a new one that is in no table.
    fn inode(&self, ino: Ino) -> Arc<Inode> {
        self.inodes
            .get(ino)
            .unwrap_or_else(|| Arc::new(Inode::new(ino)))
    }

    /// Refuses changes of a read-only mount.
    fn check_writable(&self) -> Result<()> {
        if self.options.read_only {
            return Err(Error::new(
                Kind::ReadOnly,
                "the datastore is mounted read-only: mount it writable to change it",
            ));
        }
        Ok(())
    }
}

/// Checks the name of a new entry: 1 to 255 bytes, no '/' and no NUL, neither "." nor "..".
pub fn check_name(name: &[u8]) -> Result<()> {
    check_name_length(name)?;
    if name == b"." || name == b".." {
        return Err(Error::new(
            Kind::Invalid,
            "the names . and .. are taken by the directory itself: choose another",
        ));
    }
    if name.iter().any(|&byte| byte == b'/' || byte == 0) {
        return Err(Error::new(
            Kind::Invalid,
            "a name has no slash and no NUL in it: choose another",
        ));
    }
    Ok(())
}

fn check_name_length(name: &[u8]) -> Result<()> {
    if name.is_empty() {
        return Err(Error::new(Kind::NotFound, "a name is not empty"));
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(Error::new(
            Kind::NameTooLong,
            format!("a name has at most 255 bytes: length={}", name.len()),
        ));
    }
    Ok(())
}

/// End of a range of a file, refused where no file can reach.
fn check_range(offset: u64, len: u64) -> Result<u64> {
    match offset.checked_add(len) {
        Some(end) if end <= FILE_BYTES_MAX => Ok(end),
        _ => Err(Error::new(
            Kind::TooLarge,
            format!("a file has at most 32 PiB: offset={offset} length={len}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_directory_can_hold_are_refused() {
        for (name, kind) in [
            (&b""[..], Kind::NotFound),
            (b".", Kind::Invalid),
            (b"..", Kind::Invalid),
            (b"a/b", Kind::Invalid),
            (b"a\0b", Kind::Invalid),
            (&[b'a'; 256][..], Kind::NameTooLong),
        ] {
            assert_eq!(check_name(name).unwrap_err().kind(), kind);
        }
        for name in [&b"a"[..], b"...", b".hidden", &[0xff; 255][..]] {
            check_name(name).unwrap();
        }
    }

    #[test]
    fn ranges_end_where_files_end() {
        assert_eq!(check_range(0, FILE_BYTES_MAX).unwrap(), FILE_BYTES_MAX);
        assert_eq!(
            check_range(1, FILE_BYTES_MAX).unwrap_err().kind(),
            Kind::TooLarge
        );
        assert_eq!(check_range(u64::MAX, 1).unwrap_err().kind(), Kind::TooLarge);
    }
}
