//! Who asks: the identity behind a call, and what the mode bits of an inode grant it.
//!
//! Ordinary calls are checked by the kernel (`default_permissions`); this is for what the kernel
//! does not know: clones by the control channel, and set-id bits that must go.

use crate::engine::{Attr, FileKind};

/// The user, group and process behind a call.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Process; it waits for the answer, so it is alive.
    pub pid: u32,
    /// The supplementary groups of a process: asked for only where they decide.
    pub groups: fn(pid: u32) -> Vec<u32>,
}

/// What somebody wants to do with an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read a file.
    Read,
    /// List a directory and reach what is in it.
    List,
    /// Make entries in a directory.
    Enter,
}

impl Caller {
    /// True for the superuser, who may everything.
    pub fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// True if the caller is a member of group `gid`.
    pub fn in_group(&self, gid: u32) -> bool {
        self.gid == gid || (self.groups)(self.pid).contains(&gid)
    }

    /// True if the mode bits of `attr` grant `access`.
    pub fn may(&self, access: Access, attr: &Attr) -> bool {
        if self.is_root() {
            return true;
        }
        if access != Access::Read && attr.kind != FileKind::Directory {
            return false;
        }
        let wanted = match access {
            Access::Read => 0o4,
            Access::List => 0o5,
            Access::Enter => 0o3,
        };
        let granted = if self.uid == attr.uid {
            attr.mode >> 6
        } else if self.in_group(attr.gid) {
            attr.mode >> 3
        } else {
            attr.mode
        };
        granted & wanted == wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Ino, Time};

    fn attr(kind: FileKind, mode: u32) -> Attr {
        Attr {
            ino: Ino(9),
            generation: 1,
            kind,
            mode,
            nlink: 1,
            uid: 10,
            gid: 20,
            rdev: 0,
            size: 0,
            has_data: false,
            mapped: 0,
            atime: Time::default(),
            mtime: Time::default(),
            ctime: Time::default(),
            btime: Time::default(),
            parent: Ino::ROOT,
        }
    }

    fn caller(uid: u32, gid: u32) -> Caller {
        Caller {
            uid,
            gid,
            pid: 1,
            groups: |_| vec![77],
        }
    }

    #[test]
    fn the_first_class_that_fits_decides() {
        let owner_shut_out = attr(FileKind::Regular, 0o044);
        assert!(!caller(10, 20).may(Access::Read, &owner_shut_out));
        assert!(caller(11, 20).may(Access::Read, &owner_shut_out));
        assert!(caller(11, 21).may(Access::Read, &owner_shut_out));
        assert!(caller(0, 0).may(Access::Read, &attr(FileKind::Regular, 0)));
        let group_only = Attr {
            gid: 77,
            ..attr(FileKind::Regular, 0o040)
        };
        assert!(caller(11, 21).may(Access::Read, &group_only));
    }

    #[test]
    fn entering_needs_write_and_search() {
        for (mode, may) in [(0o700, true), (0o600, false), (0o500, false), (0o300, true)] {
            let dir = attr(FileKind::Directory, mode);
            assert_eq!(caller(10, 20).may(Access::Enter, &dir), may, "{mode:o}");
        }
        assert!(!caller(10, 20).may(Access::Enter, &attr(FileKind::Regular, 0o700)));
    }
}
