//! Names: making, linking, renaming and removing entries of directories.

use super::caller::Caller;
use super::{HandleId, MODE_BITS, MODE_SETGID, OpenFlags, TARGET_BYTES_MAX, Vfs, check_name};
use crate::engine::{Attr, FileKind, NewNode, RenameMode};
use crate::error::{Error, Kind, Result};
use crate::units::{Ino, Time};

/// Beginning of names under which a file is made that has none: it is an orphan from its first moment.
/// An import makes such files, so that whatever ends it takes them with it.
pub const UNNAMED_PREFIX: &str = ".nodupe-import-";

/// What is to be made. Symbolic links have [`Vfs::symlink`].
#[derive(Clone, Copy, Debug)]
pub struct NewInode {
    /// Kind of file.
    pub kind: FileKind,
    /// Mode bits, the umask already applied.
    pub mode: u32,
    /// Device number of a device node, else 0.
    pub rdev: u32,
}

impl Vfs {
    /// Makes an inode and its name, counted as one lookup.
    pub fn make(&self, caller: &Caller, dir: Ino, name: &[u8], new: NewInode) -> Result<Attr> {
        self.make_node(caller, dir, name, new, b"")
    }

    /// Makes a symbolic link, counted as one lookup.
    pub fn symlink(&self, caller: &Caller, dir: Ino, name: &[u8], target: &[u8]) -> Result<Attr> {
        if target.is_empty() {
            return Err(Error::new(
                Kind::NotFound,
                "the target of a symbolic link is not empty",
            ));
        }
        if target.len() > TARGET_BYTES_MAX {
            return Err(Error::new(
                Kind::NameTooLong,
                format!(
                    "the target of a symbolic link has at most {TARGET_BYTES_MAX} bytes: length={}",
                    target.len()
                ),
            ));
        }
        let new = NewInode {
            kind: FileKind::Symlink,
            mode: 0o777,
            rdev: 0,
        };
        self.make_node(caller, dir, name, new, target)
    }

    /// Makes a regular file and opens it. Where the name is taken by a regular file, which a clone
    /// behind the kernel's back can do after the kernel looked, that one is opened unless
    /// `exclusive`. Counted as one lookup.
    pub fn create(
        &self,
        caller: &Caller,
        dir: Ino,
        name: &[u8],
        mode: u32,
        exclusive: bool,
        flags: OpenFlags,
    ) -> Result<(Attr, HandleId)> {
        let new = NewInode {
            kind: FileKind::Regular,
            mode,
            rdev: 0,
        };
        match self.make_node(caller, dir, name, new, b"") {
            Ok(attr) => {
                let handle = self.open_created(&attr, flags);
                Ok((attr, handle))
            }
            Err(error) if error.kind() == Kind::Exists && !exclusive => {
                let attr = self.pool.lookup(dir, name)?;
                // The kernel has seen no file, so it has checked no right to this one.
                if !caller.is_root() && caller.uid != attr.uid {
                    return Err(Error::new(
                        Kind::Denied,
                        "somebody else made a file of this name just now: open it again",
                    ));
                }
                let handle = self.open(attr.ino, flags)?;
                self.inodes.add_lookup(attr.ino);
                Ok((attr, handle))
            }
            Err(error) => Err(error),
        }
    }

    /// Makes a file without a name and opens it; `name`, which begins with [`UNNAMED_PREFIX`], is its
    /// own for the moment between two operations of one request. Counted as one lookup.
    pub fn create_unnamed(
        &self,
        caller: &Caller,
        dir: Ino,
        name: &[u8],
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Attr, HandleId)> {
        let created = self.create(caller, dir, name, mode, true, flags)?;
        self.unlink(dir, name)?;
        Ok(created)
    }

    /// Gives a file another name, counted as one lookup.
    pub fn link(&self, ino: Ino, dir: Ino, name: &[u8]) -> Result<Attr> {
        self.check_writable()?;
        check_name(name)?;
        let attr = self.pool.link(ino, dir, name, Time::now())?;
        self.inodes.adopt(ino);
        self.inodes.add_lookup(ino);
        Ok(attr)
    }

    /// Removes a name of a file.
    pub fn unlink(&self, dir: Ino, name: &[u8]) -> Result<()> {
        self.check_writable()?;
        check_name(name)?;
        let attr = self.pool.unlink(dir, name, Time::now())?;
        self.left(&attr)
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, dir: Ino, name: &[u8]) -> Result<()> {
        self.check_writable()?;
        match name {
            b"." => {
                return Err(Error::new(Kind::Invalid, "a directory is not removed as ."));
            }
            b".." => {
                return Err(Error::new(
                    Kind::NotEmpty,
                    "a directory is not removed by its child",
                ));
            }
            name => check_name(name)?,
        }
        let attr = self.pool.rmdir(dir, name, Time::now())?;
        self.left(&attr)
    }

    /// Renames.
    pub fn rename(
        &self,
        dir: Ino,
        name: &[u8],
        new_dir: Ino,
        new_name: &[u8],
        mode: RenameMode,
    ) -> Result<()> {
        self.check_writable()?;
        check_name(name)?;
        check_name(new_name)?;
        let replaced = self
            .pool
            .rename(dir, name, new_dir, new_name, mode, Time::now())?;
        match replaced {
            Some(attr) => self.left(&attr),
            None => Ok(()),
        }
    }

    /// Clones `src`, a file or a directory with all in it, to each of `names` in `dir`: all or
    /// none, in one instant. `owner`: user and group of what is made; `None` keeps them. `allows`
    /// sees each inode of the source at that instant.
    pub fn clone_tree(
        &self,
        src: Ino,
        dir: Ino,
        names: &[Vec<u8>],
        owner: Option<(u32, u32)>,
        allows: &dyn Fn(&Attr) -> Result<()>,
    ) -> Result<()> {
        self.check_writable()?;
        for name in names {
            check_name(name)?;
        }
        self.pool
            .clone_tree_if(src, dir, names, owner, Time::now(), allows)
    }

    fn make_node(
        &self,
        caller: &Caller,
        dir: Ino,
        name: &[u8],
        new: NewInode,
        target: &[u8],
    ) -> Result<Attr> {
        self.check_writable()?;
        check_name(name)?;
        let parent = self.pool.attr(dir)?;
        let mut mode = new.mode & MODE_BITS;
        let mut gid = caller.gid;
        if parent.mode & MODE_SETGID != 0 {
            gid = parent.gid;
            if new.kind == FileKind::Directory {
                mode |= MODE_SETGID;
            }
        }
        let node = NewNode {
            kind: new.kind,
            mode,
            uid: caller.uid,
            gid,
            rdev: new.rdev,
            target,
        };
        let attr = self.pool.create_node(dir, name, &node, Time::now())?;
        self.inodes.add_lookup(attr.ino);
        Ok(attr)
    }

    /// A name of this inode is gone: reclaims it if that was the last one and nobody uses it.
    fn left(&self, attr: &Attr) -> Result<()> {
        if attr.nlink == 0 && self.inodes.orphan(attr.ino) {
            self.pool.reclaim(attr.ino)?;
        }
        Ok(())
    }
}
