//! Open files and directories: handle number to inode and to how it was opened.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use super::Vfs;
use super::inodes::Inode;
use crate::engine::{Attr, FileKind, Stream};
use crate::error::{Error, Kind, Result};
use crate::units::Ino;

/// Number of an open file or directory, unique while the datastore is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandleId(pub u64);

/// How a file was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenFlags {
    /// It may be read by this handle.
    pub read: bool,
    /// It may be written by this handle.
    pub write: bool,
    /// Each change is durable before it is answered.
    pub sync: bool,
    /// What is read by this handle may stay in a page cache.
    pub cached: bool,
}

/// What a page cache must drop after a write around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StalePages {
    /// Nothing: it has no pages of the file.
    None,
    /// The range that was written.
    Written,
    /// All of the file.
    All,
}

#[derive(Debug)]
pub(super) struct Handle {
    pub(super) inode: Arc<Inode>,
    pub(super) flags: OpenFlags,
    /// How it is read.
    pub(super) stream: Stream,
}

/// The table. Its lock is a leaf.
#[derive(Debug, Default)]
pub(super) struct Handles {
    next: AtomicU64,
    open: RwLock<HashMap<HandleId, Arc<Handle>>>,
}

impl Handles {
    fn insert(&self, handle: Handle) -> HandleId {
        let id = HandleId(self.next.fetch_add(1, Ordering::Relaxed) + 1);
        self.open.write().insert(id, Arc::new(handle));
        id
    }

    fn get(&self, id: HandleId) -> Option<Arc<Handle>> {
        self.open.read().get(&id).cloned()
    }

    fn remove(&self, id: HandleId) -> Option<Arc<Handle>> {
        self.open.write().remove(&id)
    }
}

impl Vfs {
    /// Opens a regular file.
    pub fn open(&self, ino: Ino, flags: OpenFlags) -> Result<HandleId> {
        let attr = self.pool.attr(ino)?;
        match attr.kind {
            FileKind::Regular => Ok(self.add_handle(ino, flags)),
            FileKind::Directory => Err(Error::new(
                Kind::IsDirectory,
                format!("a directory cannot be opened as a file: inode={ino}"),
            )),
            _ => Err(Error::new(
                Kind::Unsupported,
                format!("only regular files are opened here: inode={ino}"),
            )),
        }
    }

    /// Opens a directory.
    pub fn open_dir(&self, ino: Ino) -> Result<HandleId> {
        let attr = self.pool.attr(ino)?;
        if attr.kind != FileKind::Directory {
            return Err(Error::new(
                Kind::NotDirectory,
                format!("not a directory: inode={ino}"),
            ));
        }
        let flags = OpenFlags {
            read: true,
            ..OpenFlags::default()
        };
        Ok(self.add_handle(ino, flags))
    }

    /// Closes a handle, and with it a clone in pieces that was made by it.
    pub fn release(&self, handle: HandleId) -> Result<()> {
        let Some(handle) = self.handles.remove(handle) else {
            return Ok(());
        };
        if handle.flags.cached {
            handle.inode.was_cached.store(true, Ordering::Release);
            handle.inode.cached.fetch_sub(1, Ordering::AcqRel);
        }
        let ended = self.end_pin(&handle.inode);
        let ino = handle.inode.ino;
        if self.inodes.drop_handle(ino) {
            self.pool.reclaim(ino)?;
        }
        ended
    }

    /// How an open handle of `ino` was opened; all false for one that is not open.
    pub fn handle_flags(&self, handle: HandleId, ino: Ino) -> OpenFlags {
        match self.handles.get(handle) {
            Some(handle) if handle.inode.ino == ino => handle.flags,
            _ => OpenFlags::default(),
        }
    }

    /// Which pages of a file may be stale after a write around the page cache. The kernel drops
    /// those of the range before it sends such a write, but a reader may have put old ones back
    /// since then, and be gone.
    pub fn stale_pages(&self, handle: HandleId, ino: Ino) -> StalePages {
        let inode = self.opened(handle, ino);
        if inode.cached.load(Ordering::Acquire) > 0 {
            StalePages::Written
        } else if inode.was_cached.swap(false, Ordering::AcqRel) {
            // Nobody reads now, so that after this there are no pages until somebody opens it.
            StalePages::All
        } else {
            StalePages::None
        }
    }

    pub(super) fn open_created(&self, attr: &Attr, flags: OpenFlags) -> HandleId {
        self.add_handle(attr.ino, flags)
    }

    /// The inode behind a handle. The kernel sends a handle of the same inode; what is unknown is
    /// found by number.
    pub(super) fn opened(&self, handle: HandleId, ino: Ino) -> Arc<Inode> {
        match self.handles.get(handle) {
            Some(handle) if handle.inode.ino == ino => handle.inode.clone(),
            _ => self.inode(ino),
        }
    }

    /// The handle, if it is open and of this inode.
    pub(super) fn handle_of(&self, handle: HandleId, ino: Ino) -> Option<Arc<Handle>> {
        self.handles
            .get(handle)
            .filter(|handle| handle.inode.ino == ino)
    }

    fn add_handle(&self, ino: Ino, flags: OpenFlags) -> HandleId {
        let inode = self.inodes.add_handle(ino);
        if flags.cached {
            inode.cached.fetch_add(1, Ordering::AcqRel);
        }
        self.handles.insert(Handle {
            inode,
            flags,
            stream: Stream::default(),
        })
    }
}
