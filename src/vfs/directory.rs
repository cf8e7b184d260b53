//! Listing directories. "." and ".." come first, with the cookies 1 and 2; those of the engine
//! begin at 16.

use super::Vfs;
use crate::engine::{Attr, DirEntry, FileKind};
use crate::error::{Kind, Result};
use crate::units::Ino;

/// Cookie behind ".".
pub const COOKIE_DOT: u64 = 1;
/// Cookie behind "..".
pub const COOKIE_DOT_DOT: u64 = 2;

/// Entries that are asked for at once: about what fits a page.
const BATCH_ENTRIES: usize = 64;

impl Vfs {
    /// Gives the entries of `dir` behind `cookie` to `take`, until that returns false.
    pub fn read_dir(
        &self,
        dir: Ino,
        cookie: u64,
        mut take: impl FnMut(&DirEntry) -> bool,
    ) -> Result<()> {
        if cookie < COOKIE_DOT && !take(&dots(dir, b".", COOKIE_DOT)) {
            return Ok(());
        }
        if cookie < COOKIE_DOT_DOT {
            let parent = self.pool.attr(dir)?.parent;
            if !take(&dots(parent, b"..", COOKIE_DOT_DOT)) {
                return Ok(());
            }
        }
        let mut cookie = if cookie <= COOKIE_DOT_DOT { 0 } else { cookie };
        loop {
            let batch = self.pool.read_dir(dir, cookie, BATCH_ENTRIES)?;
            let Some(last) = batch.last() else {
                return Ok(());
            };
            cookie = last.cookie;
            for entry in &batch {
                if !take(entry) {
                    return Ok(());
                }
            }
        }
    }

    /// As [`read_dir`](Self::read_dir), with attributes. An entry that was taken is counted as one
    /// lookup, but for "." and "..".
    pub fn read_dir_plus(
        &self,
        dir: Ino,
        cookie: u64,
        mut take: impl FnMut(&DirEntry, &Attr) -> bool,
    ) -> Result<()> {
        let mut failed = None;
        self.read_dir(dir, cookie, |entry| {
            let attr = match self.pool.attr(entry.ino) {
                Ok(attr) => attr,
                // Removed since it was listed.
                Err(error) if error.kind() == Kind::NotFound => return true,
                Err(error) => {
                    failed = Some(error);
                    return false;
                }
            };
            if !take(entry, &attr) {
                return false;
            }
            if entry.cookie > COOKIE_DOT_DOT {
                self.inodes.add_lookup(entry.ino);
            }
            true
        })?;
        failed.map_or(Ok(()), Err)
    }
}

fn dots(ino: Ino, name: &[u8], cookie: u64) -> DirEntry {
    DirEntry {
        ino,
        kind: FileKind::Directory,
        name: name.to_vec(),
        cookie,
    }
}
