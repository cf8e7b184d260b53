//! Extended attributes, and the file capabilities among them.

use std::sync::atomic::Ordering;

use super::caller::Caller;
use super::inodes::Inode;
use super::{MODE_GROUP_EXECUTE, MODE_SETGID, MODE_SETUID, Vfs};
use crate::engine::{Attr, FileKind, SetAttr, XattrMode};
use crate::error::{Error, Kind, Result};
use crate::units::{Ino, Time};

/// File capabilities: rights that whoever executes the file gets.
pub(super) const CAPABILITY: &[u8] = b"security.capability";

/// Attributes that only the superuser may see.
const TRUSTED: &[u8] = b"trusted.";

/// Longest name, in bytes.
const XATTR_NAME_BYTES_MAX: usize = 255;

/// Largest value, in bytes: what the system call takes.
const XATTR_VALUE_BYTES_MAX: usize = 64 * 1024;

impl Vfs {
    /// Value of an extended attribute.
    pub fn xattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        check_xattr_name(name)?;
        self.pool.xattr(ino, name)
    }

    /// Names of the extended attributes that the caller may see.
    pub fn list_xattrs(&self, caller: &Caller, ino: Ino) -> Result<Vec<Vec<u8>>> {
        let mut names = self.pool.list_xattrs(ino)?;
        if !caller.is_root() {
            names.retain(|name| !name.starts_with(TRUSTED));
        }
        Ok(names)
    }

    /// Sets an extended attribute.
    pub fn set_xattr(&self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> Result<()> {
        self.check_writable()?;
        check_xattr_name(name)?;
        if value.len() > XATTR_VALUE_BYTES_MAX {
            return Err(Error::new(
                Kind::TooLarge,
                format!(
                    "an extended attribute has at most 64 KiB: length={}",
                    value.len()
                ),
            ));
        }
        self.pool.set_xattr(ino, name, value, mode, Time::now())?;
        if name == CAPABILITY {
            self.inode(ino).unprivileged.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// Removes an extended attribute.
    pub fn remove_xattr(&self, ino: Ino, name: &[u8]) -> Result<()> {
        self.check_writable()?;
        check_xattr_name(name)?;
        self.pool.remove_xattr(ino, name, Time::now())
    }

    /// Drops set-id bits and file capabilities before `caller` changes the contents. Who is root
    /// may keep them.
    pub(super) fn strip_privileges(&self, caller: &Caller, inode: &Inode) -> Result<()> {
        if caller.is_root() || inode.unprivileged.load(Ordering::Acquire) {
            return Ok(());
        }
        // Set before looking: a chmod meanwhile clears it again and is not forgotten.
        inode.unprivileged.store(true, Ordering::Release);
        let attr = self.pool.attr(inode.ino)?;
        let mode = mode_without_privileges(caller, &attr);
        if mode != attr.mode {
            let set = SetAttr {
                mode: Some(mode),
                ctime: Some(Time::now()),
                ..SetAttr::default()
            };
            self.pool.set_attr(inode.ino, &set)?;
            if let Some(watcher) = self.watcher.get() {
                watcher.mode_changed(inode.ino);
            }
        }
        if mode & (MODE_SETUID | MODE_SETGID) != 0 {
            inode.unprivileged.store(false, Ordering::Release);
        }
        self.drop_capabilities(inode.ino)
    }

    /// Removes the file capabilities, if there are any.
    pub(super) fn drop_capabilities(&self, ino: Ino) -> Result<()> {
        match self.pool.remove_xattr(ino, CAPABILITY, Time::now()) {
            Err(error) if error.kind() != Kind::NoAttribute => Err(error),
            _ => Ok(()),
        }
    }
}

/// The mode of a file after somebody who may not keep its set-id bits changed it. A set-group-id
/// bit without execute permission of the group means something else, and stays for its members.
pub(super) fn mode_without_privileges(caller: &Caller, attr: &Attr) -> u32 {
    let mut mode = attr.mode;
    if attr.kind == FileKind::Directory {
        return mode;
    }
    mode &= !MODE_SETUID;
    if mode & MODE_SETGID != 0
        && (mode & MODE_GROUP_EXECUTE != 0 || !(caller.is_root() || caller.in_group(attr.gid)))
    {
        mode &= !MODE_SETGID;
    }
    mode
}

fn check_xattr_name(name: &[u8]) -> Result<()> {
    // Access control lists would have to be obeyed, and other names belong to nobody.
    let known = [&b"user."[..], b"trusted.", b"security."];
    if !known
        .iter()
        .any(|prefix| name.starts_with(prefix) && name.len() > prefix.len())
    {
        return Err(Error::new(
            Kind::Unsupported,
            "extended attributes are of the classes user, trusted and security",
        ));
    }
    if name.len() > XATTR_NAME_BYTES_MAX {
        return Err(Error::new(
            Kind::Range,
            "the name of an extended attribute has at most 255 bytes",
        ));
    }
    Ok(())
}
