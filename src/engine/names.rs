//! Operations on names and attributes: each is checked, journaled and applied in one instant.

use crate::error::{Error, Kind, Result};
use crate::ondisk::inode::{Inode, InodeKind, TARGET_MAX, XATTR_VALUE_MAX};
use crate::ondisk::record::Record;
use crate::units::{BLOCK_SIZE, Ino, Time};

use super::apply::{RENAME_EXCHANGE, RENAME_NO_REPLACE, RENAME_REPLACE, set};
use super::file::Attempt;
use super::meta::Meta;
use super::namespace::check_name;
use super::pool::Pool;
use super::stage::{Stage, record_cost};
use super::types::{Attr, DirEntry, FileKind, NewNode, RenameMode, SetAttr, XattrMode};

/// Most hard links of an inode.
const LINKS_MAX: u32 = 65_000;
/// Deepest directory tree that a rename or a clone follows.
pub(crate) const DEPTH_MAX: usize = 4096;

pub(crate) fn from_disk(kind: InodeKind) -> FileKind {
    match kind {
        InodeKind::Regular => FileKind::Regular,
        InodeKind::Directory => FileKind::Directory,
        InodeKind::Symlink => FileKind::Symlink,
        InodeKind::Fifo => FileKind::Fifo,
        InodeKind::Socket => FileKind::Socket,
        InodeKind::CharDevice => FileKind::CharDevice,
        InodeKind::BlockDevice => FileKind::BlockDevice,
    }
}

fn to_disk(kind: FileKind) -> InodeKind {
    match kind {
        FileKind::Regular => InodeKind::Regular,
        FileKind::Directory => InodeKind::Directory,
        FileKind::Symlink => InodeKind::Symlink,
        FileKind::Fifo => InodeKind::Fifo,
        FileKind::Socket => InodeKind::Socket,
        FileKind::CharDevice => InodeKind::CharDevice,
        FileKind::BlockDevice => InodeKind::BlockDevice,
    }
}

pub(crate) fn attr_from(ino: Ino, inode: &Inode, stage: &Stage) -> Attr {
    let staged = stage.file(ino).is_some_and(|file| !file.is_empty());
    Attr {
        ino,
        generation: inode.generation,
        kind: from_disk(inode.kind),
        mode: u32::from(inode.mode),
        nlink: inode.nlink,
        uid: inode.uid,
        gid: inode.gid,
        rdev: inode.rdev,
        size: inode.size,
        has_data: staged || !inode.root.is_empty(),
        mapped: inode.mapped * BLOCK_SIZE as u64,
        atime: inode.atime,
        mtime: inode.mtime,
        ctime: inode.ctime,
        btime: inode.btime,
        parent: if inode.kind == InodeKind::Directory {
            Ino(inode.parent)
        } else {
            Ino::ROOT
        },
    }
}

/// A name for people: what would move the cursor of a terminal, or break a log, is escaped.
fn shown_name(name: &[u8]) -> String {
    String::from_utf8_lossy(name).escape_debug().to_string()
}

fn missing(name: &[u8]) -> Error {
    Error::new(
        Kind::NotFound,
        format!("no such name: {}", shown_name(name)),
    )
}

pub(crate) fn taken(name: &[u8]) -> Error {
    Error::new(
        Kind::Exists,
        format!("the name exists: {}", shown_name(name)),
    )
}

impl Pool {
    /// Checks with `plan`, applies the records it returns and queues them, in one instant.
    pub(crate) fn transact<T>(
        &self,
        plan: impl Fn(&mut Meta, &Stage) -> Result<(Vec<Record>, T)>,
    ) -> Result<T> {
        self.begin_change()?;
        self.with_space(|| {
            let _gate = self.gate.read();
            let mut meta = self.meta.write();
            let mut stage = self.stage.lock();
            let (records, value) = plan(&mut meta, &stage)?;
            let cost = records.iter().map(record_cost).sum();
            if !stage.has_room(cost, self.limits.pending_bytes) {
                return Ok(Attempt::QueueFull);
            }
            for record in records {
                self.apply_or_poison(&mut meta, &mut stage, &record)?;
                stage.push(record);
            }
            Ok(Attempt::Done(value))
        })
    }

    /// The inode that `name` in directory `dir` names.
    ///
    /// # Errors
    /// `NotFound`, `NotDirectory`.
    pub fn lookup(&self, dir: Ino, name: &[u8]) -> Result<Attr> {
        let meta = self.meta.read();
        meta.directory(dir)?;
        let entry = meta.entry(dir, name)?.ok_or_else(|| missing(name))?;
        let inode = meta.inode(entry.ino)?;
        Ok(self.shown(entry.ino, inode))
    }

    /// An inode whose record was read under a lock of the trees that is still held. The stage is
    /// locked after that, so that nobody waits for it while nodes are read.
    fn shown(&self, ino: Ino, mut inode: Inode) -> Attr {
        let stage = self.stage.lock();
        if let Some(file) = stage.file(ino) {
            file.attr.put_into(&mut inode);
        }
        attr_from(ino, &inode, &stage)
    }

    /// Attributes of an inode.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn attr(&self, ino: Ino) -> Result<Attr> {
        let meta = self.meta.read();
        let inode = meta.inode(ino)?;
        Ok(self.shown(ino, inode))
    }

    /// Changes attributes.
    pub fn set_attr(&self, ino: Ino, change: &SetAttr) -> Result<Attr> {
        let bit = |present: bool, bit: u8| if present { bit } else { 0 };
        let mask = bit(change.mode.is_some(), set::MODE)
            | bit(change.uid.is_some(), set::UID)
            | bit(change.gid.is_some(), set::GID)
            | bit(change.atime.is_some(), set::ATIME)
            | bit(change.mtime.is_some(), set::MTIME)
            | bit(change.ctime.is_some(), set::CTIME);
        self.transact(|meta, _| {
            meta.inode(ino)?;
            let record = Record::SetAttr {
                ino,
                mask,
                mode: (change.mode.unwrap_or(0) & 0o7777) as u16,
                uid: change.uid.unwrap_or(0),
                gid: change.gid.unwrap_or(0),
                times: [change.atime, change.mtime, change.ctime].map(Option::unwrap_or_default),
            };
            Ok((vec![record], ()))
        })?;
        self.attr(ino)
    }

    /// Creates an inode and its name; sets the times of both inode and directory to `now`.
    ///
    /// # Errors
    /// `Exists`, `NotDirectory`, `NameTooLong`, `Invalid` names, `NoSpace`.
    pub fn create_node(
        &self,
        dir: Ino,
        name: &[u8],
        node: &NewNode<'_>,
        now: Time,
    ) -> Result<Attr> {
        check_name(name)?;
        if node.target.len() > TARGET_MAX {
            return Err(Error::new(
                Kind::NameTooLong,
                "the target of a symlink is too long",
            ));
        }
        let ino = self.transact(|meta, _| {
            self.check_room()?;
            living_directory(meta, dir)?;
            if meta.entry(dir, name)?.is_some() {
                return Err(taken(name));
            }
            let ino = Ino(meta.next_ino);
            Ok((vec![create_record(meta, dir, name, ino, node, now)], ino))
        })?;
        self.attr(ino)
    }

    /// Another name for an existing inode.
    ///
    /// # Errors
    /// `NotPermitted` for a directory, `TooManyLinks`, `Exists`.
    pub fn link(&self, ino: Ino, dir: Ino, name: &[u8], now: Time) -> Result<Attr> {
        check_name(name)?;
        self.transact(|meta, _| {
            self.check_room()?;
            let inode = meta.inode(ino)?;
            if inode.kind == InodeKind::Directory {
                return Err(Error::new(
                    Kind::NotPermitted,
                    "directories have one name only",
                ));
            }
            if inode.nlink == 0 {
                return Err(missing(name));
            }
            if inode.nlink >= LINKS_MAX {
                return Err(Error::new(
                    Kind::TooManyLinks,
                    "the file has too many names",
                ));
            }
            living_directory(meta, dir)?;
            if meta.entry(dir, name)?.is_some() {
                return Err(taken(name));
            }
            Ok((
                vec![Record::Link {
                    ino,
                    dir,
                    name: name.into(),
                    now,
                }],
                (),
            ))
        })?;
        self.attr(ino)
    }

    /// Removes a name of something that is not a directory. If it was the last one the inode is
    /// an orphan: it lives until [`reclaim`](Self::reclaim) or the next open of the pool.
    ///
    /// # Errors
    /// `NotFound`, `IsDirectory`.
    pub fn unlink(&self, dir: Ino, name: &[u8], now: Time) -> Result<Attr> {
        self.remove_name(dir, name, false, now)
    }

    /// Removes an empty directory (an orphan from then on, as in `unlink`).
    ///
    /// # Errors
    /// `NotFound`, `NotDirectory`, `NotEmpty`.
    pub fn rmdir(&self, dir: Ino, name: &[u8], now: Time) -> Result<Attr> {
        self.remove_name(dir, name, true, now)
    }

    fn remove_name(&self, dir: Ino, name: &[u8], directory: bool, now: Time) -> Result<Attr> {
        let ino = self.transact(|meta, _| {
            meta.directory(dir)?;
            let entry = meta.entry(dir, name)?.ok_or_else(|| missing(name))?;
            match (entry.kind == InodeKind::Directory, directory) {
                (true, false) => return Err(Error::new(Kind::IsDirectory, "is a directory")),
                (false, true) => return Err(Error::new(Kind::NotDirectory, "is no directory")),
                (true, true) => check_empty(meta, entry.ino)?,
                (false, false) => {}
            }
            Ok((
                vec![Record::Unlink {
                    dir,
                    name: name.into(),
                    directory,
                    now,
                }],
                entry.ino,
            ))
        })?;
        self.attr(ino)
    }

    /// Renames, moving between directories if they differ. Returns the attributes of what was
    /// replaced (`nlink` 0: an orphan).
    ///
    /// # Errors
    /// `Invalid` to move a directory below itself, `NotDirectory` for a directory over a file,
    /// `IsDirectory` for a file over a directory, `NotEmpty`, `NotFound`, `Exists`.
    pub fn rename(
        &self,
        dir: Ino,
        name: &[u8],
        new_dir: Ino,
        new_name: &[u8],
        mode: RenameMode,
        now: Time,
    ) -> Result<Option<Attr>> {
        check_name(new_name)?;
        let code = match mode {
            RenameMode::Replace => RENAME_REPLACE,
            RenameMode::NoReplace => RENAME_NO_REPLACE,
            RenameMode::Exchange => RENAME_EXCHANGE,
        };
        let replaced = self.transact(|meta, _| {
            let replaced = check_rename(meta, dir, name, new_dir, new_name, mode)?;
            let record = Record::Rename {
                dir,
                name: name.into(),
                new_dir,
                new_name: new_name.into(),
                mode: code,
                now,
            };
            Ok((vec![record], replaced))
        })?;
        replaced.map(|ino| self.attr(ino)).transpose()
    }

    /// Up to `limit` entries behind `cookie` (0: from the start), without "." and "..".
    ///
    /// # Errors
    /// `NotDirectory`.
    pub fn read_dir(&self, dir: Ino, cookie: u64, limit: usize) -> Result<Vec<DirEntry>> {
        let meta = self.meta.read();
        meta.directory(dir)?;
        let entries = meta.entries(dir, cookie, limit)?.into_iter();
        Ok(entries
            .map(|(cookie, entry)| DirEntry {
                ino: entry.ino,
                kind: from_disk(entry.kind),
                name: entry.name,
                cookie,
            })
            .collect())
    }

    /// Target of a symlink.
    ///
    /// # Errors
    /// `Invalid` for anything else.
    pub fn read_link(&self, ino: Ino) -> Result<Vec<u8>> {
        let meta = self.meta.read();
        if meta.inode(ino)?.kind != InodeKind::Symlink {
            return Err(Error::new(
                Kind::Invalid,
                format!("is not a symlink: ino={ino}"),
            ));
        }
        meta.target(ino)
    }

    /// Value of an extended attribute.
    ///
    /// # Errors
    /// `NoAttribute`.
    pub fn xattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        let meta = self.meta.read();
        meta.inode(ino)?;
        meta.xattr(ino, name)?.ok_or_else(no_attribute)
    }

    /// Names of the extended attributes.
    pub fn list_xattrs(&self, ino: Ino) -> Result<Vec<Vec<u8>>> {
        let meta = self.meta.read();
        meta.inode(ino)?;
        Ok(meta
            .xattrs(ino)?
            .into_iter()
            .map(|(name, _)| name)
            .collect())
    }

    /// Sets an extended attribute: name up to 255 bytes, value up to 64 KiB.
    ///
    /// # Errors
    /// `Range` for an empty or long name, `TooLarge` for a long value, `Exists` and
    /// `NoAttribute` by mode.
    pub fn set_xattr(
        &self,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
        now: Time,
    ) -> Result<()> {
        if name.is_empty() || name.len() > 255 {
            return Err(Error::new(
                Kind::Range,
                "the name of an attribute is empty or too long",
            ));
        }
        if value.len() > XATTR_VALUE_MAX {
            return Err(Error::new(
                Kind::TooLarge,
                "the value of an attribute is too long",
            ));
        }
        self.transact(|meta, _| {
            self.check_room()?;
            meta.inode(ino)?;
            match (meta.xattr(ino, name)?.is_some(), mode) {
                (true, XattrMode::Create) => return Err(taken(name)),
                (false, XattrMode::Replace) => return Err(no_attribute()),
                _ => {}
            }
            Ok((
                vec![Record::SetXattr {
                    ino,
                    name: name.into(),
                    value: value.into(),
                    now,
                }],
                (),
            ))
        })
    }

    /// Removes an extended attribute.
    ///
    /// # Errors
    /// `NoAttribute`.
    pub fn remove_xattr(&self, ino: Ino, name: &[u8], now: Time) -> Result<()> {
        self.transact(|meta, _| {
            meta.inode(ino)?;
            meta.xattr(ino, name)?.ok_or_else(no_attribute)?;
            Ok((
                vec![Record::RemoveXattr {
                    ino,
                    name: name.into(),
                    now,
                }],
                (),
            ))
        })
    }

    /// Tells that nobody uses an orphan any more: its space is freed (in the background). Does
    /// nothing for an inode that still has a name, or is gone.
    ///
    /// # Errors
    /// `Corrupt` or `Io` if its records cannot be read; `Poisoned`.
    pub fn reclaim(&self, ino: Ino) -> Result<()> {
        self.begin_change()?;
        let gate = self.gate.read();
        let owned = self.own_file(ino);
        let mut meta = self.meta.write();
        match meta.inode(ino) {
            Ok(inode) if inode.nlink == 0 => {}
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        }
        // Not journaled: after a crash the inode is an orphan still, and is reclaimed at open.
        meta.delete_inode(ino)
            .inspect_err(|error| self.poison(error))?;
        self.stage.lock().forget(ino);
        drop((meta, owned, gate));
        if self.is_threaded() {
            self.wake_worker();
            return Ok(());
        }
        loop {
            match self.reap() {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                // The rest waits until the host has space.
                Err(error) if error.kind() == Kind::NoSpace => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

fn no_attribute() -> Error {
    Error::new(Kind::NoAttribute, "no such attribute")
}

pub(crate) fn create_record(
    meta: &Meta,
    dir: Ino,
    name: &[u8],
    ino: Ino,
    node: &NewNode<'_>,
    now: Time,
) -> Record {
    Record::Create {
        dir,
        name: name.into(),
        ino,
        generation: meta.generation,
        kind: to_disk(node.kind).code(),
        mode: (node.mode & 0o7777) as u16,
        uid: node.uid,
        gid: node.gid,
        rdev: node.rdev,
        target: node.target.into(),
        now,
    }
}

/// A directory that still has a name, so that something can be put into it.
pub(crate) fn living_directory(meta: &Meta, dir: Ino) -> Result<Inode> {
    let inode = meta.directory(dir)?;
    if inode.nlink == 0 {
        return Err(Error::new(
            Kind::NotFound,
            format!("the directory was removed: ino={dir}"),
        ));
    }
    Ok(inode)
}

fn check_empty(meta: &Meta, dir: Ino) -> Result<()> {
    if meta.entries(dir, 0, 1)?.is_empty() {
        return Ok(());
    }
    Err(Error::new(
        Kind::NotEmpty,
        format!("the directory is not empty: ino={dir}"),
    ))
}

/// True if `ino` is `above` or lies below it.
pub(crate) fn is_within(meta: &Meta, ino: Ino, above: Ino) -> Result<bool> {
    let mut at = ino;
    for _ in 0..DEPTH_MAX {
        if at == above {
            return Ok(true);
        }
        if at == Ino::ROOT {
            return Ok(false);
        }
        at = Ino(meta.directory(at)?.parent);
    }
    Err(Error::new(
        Kind::TooLarge,
        "directories are nested too deeply",
    ))
}

/// Checks a rename; returns the inode that it replaces.
fn check_rename(
    meta: &Meta,
    dir: Ino,
    name: &[u8],
    new_dir: Ino,
    new_name: &[u8],
    mode: RenameMode,
) -> Result<Option<Ino>> {
    meta.directory(dir)?;
    living_directory(meta, new_dir)?;
    let moved = meta.entry(dir, name)?.ok_or_else(|| missing(name))?;
    let target = meta.entry(new_dir, new_name)?;
    let is_dir = |kind: InodeKind| kind == InodeKind::Directory;
    match (&target, mode) {
        (None, RenameMode::Exchange) => return Err(missing(new_name)),
        (Some(_), RenameMode::NoReplace) => return Err(taken(new_name)),
        _ => {}
    }
    if is_dir(moved.kind) && is_within(meta, new_dir, moved.ino)? {
        return Err(Error::new(
            Kind::Invalid,
            "a directory cannot be moved into itself",
        ));
    }
    let Some(target) = target else {
        return if mode == RenameMode::Exchange {
            Err(missing(new_name))
        } else {
            Ok(None)
        };
    };
    match mode {
        RenameMode::NoReplace | RenameMode::Exchange => {
            if is_dir(target.kind) && is_within(meta, dir, target.ino)? {
                return Err(Error::new(
                    Kind::Invalid,
                    "a directory cannot be moved into itself",
                ));
            }
            Ok(None)
        }
        RenameMode::Replace if target.ino == moved.ino => Ok(None),
        RenameMode::Replace => match (is_dir(moved.kind), is_dir(target.kind)) {
            (true, false) => Err(Error::new(Kind::NotDirectory, "a file has the new name")),
            (false, true) => Err(Error::new(
                Kind::IsDirectory,
                "a directory has the new name",
            )),
            (true, true) => check_empty(meta, target.ino).map(|()| Some(target.ino)),
            (false, false) => Ok(Some(target.ino)),
        },
    }
}
