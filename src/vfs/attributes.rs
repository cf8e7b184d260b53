//! Attributes as a caller sees them: what `st_blocks` tells, changes, and how full things are.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::caller::Caller;
use super::xattrs::mode_without_privileges;
use super::{MODE_BITS, Vfs, check_range};
use crate::engine::{Attr, FileKind, FileUsage, SetAttr};
use crate::error::Result;
use crate::units::{BLOCK_SIZE, Ino, Time};

/// Bytes of a block, as the type that sizes have.
const BLOCK_BYTES: u64 = BLOCK_SIZE as u64;

/// Unit of `st_blocks`, in bytes.
const STAT_BLOCK_BYTES: u64 = 512;

/// How long what a file uses is taken as known: `df` asks several times in a row.
const USAGE_AGE_MAX: Duration = Duration::from_secs(1);

/// Files whose use is remembered.
const USAGE_ENTRIES_MAX: usize = 1024;

/// What `st_blocks` tells of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BlocksPolicy {
    /// The whole size if the file holds data at all, else 0. `cp` of coreutils 9.0 and later
    /// then sees no sparse file to search for holes, and copies by one call.
    #[default]
    Logical,
    /// What is allocated, shared or not, as `du` on other filesystems.
    Allocated,
}

/// Changes of attributes; `None` leaves one alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Change {
    /// Mode bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<Time>,
    /// Last change of the contents.
    pub mtime: Option<Time>,
}

/// How full something is, in blocks of 4 KiB and in inodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Blocks altogether.
    pub blocks: u64,
    /// Blocks not used.
    pub free: u64,
    /// Blocks that a user can still write.
    pub available: u64,
    /// Inodes that can exist.
    pub inodes: u64,
    /// Inodes that can still be made.
    pub inodes_free: u64,
}

/// What files use alone, remembered for a moment. Its lock is a leaf.
#[derive(Debug, Default)]
pub(super) struct UsageCache {
    entries: Mutex<HashMap<Ino, (Instant, FileUsage)>>,
}

impl UsageCache {
    fn get(&self, ino: Ino) -> Option<FileUsage> {
        let entries = self.entries.lock();
        let (time, usage) = entries.get(&ino)?;
        (time.elapsed() < USAGE_AGE_MAX).then_some(*usage)
    }

    fn put(&self, ino: Ino, usage: FileUsage) {
        let mut entries = self.entries.lock();
        if entries.len() >= USAGE_ENTRIES_MAX {
            entries.clear();
        }
        entries.insert(ino, (Instant::now(), usage));
    }
}

impl Vfs {
    /// What `st_blocks` tells, in units of 512 bytes.
    pub fn blocks(&self, attr: &Attr) -> u64 {
        match (attr.kind, self.options.blocks) {
            (FileKind::Regular, BlocksPolicy::Logical) if attr.has_data => {
                attr.size.div_ceil(BLOCK_BYTES) * (BLOCK_BYTES / STAT_BLOCK_BYTES)
            }
            (FileKind::Regular, BlocksPolicy::Logical) => 0,
            _ => attr.mapped / STAT_BLOCK_BYTES,
        }
    }

    /// Changes attributes; the size first. A change of the owner drops set-id bits, and so does a
    /// change of the size by somebody who is not root.
    pub fn set_attr(&self, caller: &Caller, ino: Ino, change: &Change) -> Result<Attr> {
        self.check_writable()?;
        let now = Time::now();
        let inode = self.inode(ino);
        if let Some(size) = change.size {
            check_range(0, size)?;
            self.end_pin(&inode)?;
            self.strip_privileges(caller, &inode)?;
            let attr = self.pool.truncate(ino, size, now)?;
            let only_size = Change {
                size: None,
                ..*change
            };
            if only_size.is_empty() {
                return Ok(attr);
            }
        }
        let mut mode = change.mode.map(|mode| mode & MODE_BITS);
        if change.uid.is_some() || change.gid.is_some() {
            let attr = self.pool.attr(ino)?;
            if attr.kind == FileKind::Regular {
                self.drop_capabilities(ino)?;
            }
            let stripped = mode_without_privileges(caller, &attr);
            if mode.is_none() && stripped != attr.mode {
                mode = Some(stripped);
            }
        }
        let set = SetAttr {
            mode,
            uid: change.uid,
            gid: change.gid,
            atime: change.atime,
            mtime: change.mtime,
            ctime: Some(now),
        };
        let attr = self.pool.set_attr(ino, &set)?;
        if change.mode.is_some() {
            inode.unprivileged.store(false, Ordering::Release);
        }
        Ok(attr)
    }

    /// How full the pool is; of a regular file, what it uses alone of what it could use, so that
    /// `df FILE` shows what deleting it gives back.
    pub fn space(&self, ino: Ino) -> Result<Space> {
        let usage = self.pool.usage();
        // What the host cannot give nobody can write, whatever the pool has.
        let host = usage.host_available.unwrap_or(u64::MAX);
        let available = usage.available.min(host) / BLOCK_BYTES;
        let attr = self.pool.attr(ino)?;
        let (blocks, free) = if attr.kind == FileKind::Regular {
            let exclusive = self.file_usage(ino)?.exclusive / BLOCK_BYTES;
            (exclusive + available, available)
        } else {
            let total = usage.total / BLOCK_BYTES;
            let free = usage.total.saturating_sub(usage.used) / BLOCK_BYTES;
            (total, free)
        };
        Ok(Space {
            blocks,
            free,
            available,
            // An inode costs a part of a block: as many as blocks is a promise that can be kept.
            inodes: usage.inodes.saturating_add(available),
            inodes_free: available,
        })
    }

    /// What one file uses, as of at most a second ago.
    pub fn file_usage(&self, ino: Ino) -> Result<FileUsage> {
        if let Some(usage) = self.usage.get(ino) {
            return Ok(usage);
        }
        let usage = self.pool.file_usage(ino)?;
        self.usage.put(ino, usage);
        Ok(usage)
    }
}

impl Change {
    fn is_empty(&self) -> bool {
        self.mode.is_none()
            && self.uid.is_none()
            && self.gid.is_none()
            && self.size.is_none()
            && self.atime.is_none()
            && self.mtime.is_none()
    }
}
