//! Decodes each request, makes one call, sends the reply. Decides nothing about files.
//!
//! ENOSYS is remembered by the kernel for the life of a mount: it is answered only to what is
//! better done by the kernel alone.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request, TimeOrNow, WriteFlags,
};

use super::adapter::{Adapter, TTL};
use super::connection;
use super::convert::{
    caller, file_type, fopen_flags, handle, ino, is_direct, is_sync, node_kind, open_flags, time,
};
use crate::control;
use crate::engine::{FileKind, ReadBytes, RenameMode, XattrMode};
use crate::error::Result;
use crate::units::BLOCK_SIZE;
use crate::units::SECTOR_SIZE;
use crate::vfs::{Allocate, Change, NAME_BYTES_MAX, NewInode, Seek, UNNAMED_PREFIX};

/// True for a direct read of less than a sector. Disk filesystems refuse it, and QEMU asks for one
/// byte to learn that it must read whole sectors: if that works it reads behind the end of a file
/// of odd size and never comes to an end.
fn is_alignment_probe(flags: i32, offset: u64, size: u32) -> bool {
    let sector = SECTOR_SIZE as u32;
    is_direct(flags) && size < sector && offset.is_multiple_of(u64::from(sector))
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        connection::configure(config)
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let result = self.vfs.lookup(ino(parent), name.as_bytes());
        self.reply_entry("lookup", parent, result, reply);
    }

    fn forget(&self, _request: &Request, inode: INodeNo, lookups: u64) {
        if let Err(error) = self.vfs.forget(ino(inode), lookups) {
            // Nobody waits for an answer; what is damaged or failed is logged.
            self.errors.errno("forget", inode.0, &error);
        }
    }

    fn getattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        self.reply_attr("getattr", inode, self.vfs.attr(ino(inode)), reply);
    }

    fn setattr(
        &self,
        request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = Change {
            mode,
            uid,
            gid,
            size,
            atime: atime.map(time),
            mtime: mtime.map(time),
        };
        let result = self.vfs.set_attr(&caller(request), ino(inode), &change);
        self.reply_attr("setattr", inode, result, reply);
    }

    fn readlink(&self, _request: &Request, inode: INodeNo, reply: ReplyData) {
        match self.vfs.read_link(ino(inode)) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(self.errors.errno("readlink", inode.0, &error)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let Some(kind) = node_kind(mode) else {
            return reply.error(Errno::EINVAL);
        };
        let new = NewInode { kind, mode, rdev };
        let result = self
            .vfs
            .make(&caller(request), ino(parent), name.as_bytes(), new);
        self.reply_entry("mknod", parent, result, reply);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let new = NewInode {
            kind: FileKind::Directory,
            mode,
            rdev: 0,
        };
        let result = self
            .vfs
            .make(&caller(request), ino(parent), name.as_bytes(), new);
        self.reply_entry("mkdir", parent, result, reply);
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let result = self.vfs.unlink(ino(parent), name.as_bytes());
        self.reply_empty("unlink", parent, result, reply);
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let result = self.vfs.rmdir(ino(parent), name.as_bytes());
        self.reply_empty("rmdir", parent, result, reply);
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let result = self.vfs.symlink(
            &caller(request),
            ino(parent),
            name.as_bytes(),
            target.as_os_str().as_bytes(),
        );
        self.reply_entry("symlink", parent, result, reply);
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mode = if flags.is_empty() {
            RenameMode::Replace
        } else if flags == RenameFlags::RENAME_NOREPLACE {
            RenameMode::NoReplace
        } else if flags == RenameFlags::RENAME_EXCHANGE {
            RenameMode::Exchange
        } else {
            return reply.error(Errno::EINVAL);
        };
        let result = self.vfs.rename(
            ino(parent),
            name.as_bytes(),
            ino(new_parent),
            new_name.as_bytes(),
            mode,
        );
        self.reply_empty("rename", parent, result, reply);
    }

    fn link(
        &self,
        _request: &Request,
        inode: INodeNo,
        parent: INodeNo,
        name: &OsStr,
        reply: ReplyEntry,
    ) {
        let result = self.vfs.link(ino(inode), ino(parent), name.as_bytes());
        self.reply_entry("link", parent, result, reply);
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.vfs.open(ino(inode), open_flags(flags.0)) {
            Ok(handle) => reply.opened(FileHandle(handle.0), fopen_flags(flags.0)),
            Err(error) => reply.error(self.errors.errno("open", inode.0, &error)),
        }
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (caller, dir, name) = (caller(request), ino(parent), name.as_bytes());
        let (exclusive, opened) = (flags & libc::O_EXCL != 0, open_flags(flags));
        let unnamed = exclusive && name.starts_with(UNNAMED_PREFIX.as_bytes());
        let (result, ttl) = if unnamed {
            let result = self.vfs.create_unnamed(&caller, dir, name, mode, opened);
            // The kernel asks again who has the name: nobody.
            (result, Duration::ZERO)
        } else {
            let result = self.vfs.create(&caller, dir, name, mode, exclusive, opened);
            (result, TTL)
        };
        match result {
            Ok((attr, handle)) => reply.created(
                &ttl,
                &self.attr(&attr),
                Generation(attr.generation),
                FileHandle(handle.0),
                fopen_flags(flags),
            ),
            Err(error) => reply.error(self.errors.errno("create", parent.0, &error)),
        }
    }

    fn read(
        &self,
        _request: &Request,
        inode: INodeNo,
        file: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if is_alignment_probe(flags.0, offset, size) {
            return reply.error(fuser::Errno::EINVAL);
        }
        let errors = self.errors.clone();
        let done = move |read: Result<ReadBytes>| {
            let read = read.map_err(|error| errors.errno("read", inode.0, &error));
            // Nothing of the pool is held any more once the kernel may unmount.
            drop(errors);
            match read {
                Ok(bytes) => reply.data(&bytes),
                Err(errno) => reply.error(errno),
            }
        };
        let (file, size) = (handle(file), size as usize);
        self.vfs.read_with(file, ino(inode), offset, size, done);
    }

    fn write(
        &self,
        request: &Request,
        inode: INodeNo,
        file: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let strip = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        let result = self.vfs.write(
            &caller(request),
            handle(file),
            ino(inode),
            offset,
            data,
            strip,
        );
        if let Err(error) = result {
            return reply.error(self.errors.errno("write", inode.0, &error));
        }
        // The length of a request fits the 32 bits that it came in.
        let (bytes, sync) = (data.len() as u32, is_sync(flags.0));
        if is_direct(flags.0) {
            let written = (handle(file), offset, bytes);
            self.reply_written_directly(inode, written, sync, reply);
        } else {
            self.reply_written("write", inode, bytes, sync, reply);
        }
    }

    fn flush(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn release(
        &self,
        _request: &Request,
        inode: INodeNo,
        file: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let result = self.vfs.release(handle(file));
        self.reply_empty("release", inode, result, reply);
    }

    fn fsync(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.sync("fsync", inode, reply);
    }

    fn opendir(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.vfs.open_dir(ino(inode)) {
            Ok(handle) => reply.opened(FileHandle(handle.0), FopenFlags::empty()),
            Err(error) => reply.error(self.errors.errno("opendir", inode.0, &error)),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let result = self.vfs.read_dir(ino(inode), offset, |entry| {
            let name = OsStr::from_bytes(&entry.name);
            let number = INodeNo(entry.ino.0);
            !reply.add(number, entry.cookie, file_type(entry.kind), name)
        });
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(self.errors.errno("readdir", inode.0, &error)),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let result = self.vfs.read_dir_plus(ino(inode), offset, |entry, attr| {
            !reply.add(
                INodeNo(attr.ino.0),
                entry.cookie,
                OsStr::from_bytes(&entry.name),
                &TTL,
                &self.attr(attr),
                Generation(attr.generation),
            )
        });
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(self.errors.errno("readdirplus", inode.0, &error)),
        }
    }

    fn releasedir(
        &self,
        _request: &Request,
        inode: INodeNo,
        file: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let result = self.vfs.release(handle(file));
        self.reply_empty("releasedir", inode, result, reply);
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.sync("fsyncdir", inode, reply);
    }

    fn statfs(&self, _request: &Request, inode: INodeNo, reply: ReplyStatfs) {
        match self.vfs.space(ino(inode)) {
            Ok(space) => reply.statfs(
                space.blocks,
                space.free,
                space.available,
                space.inodes,
                space.inodes_free,
                BLOCK_SIZE as u32,
                NAME_BYTES_MAX as u32,
                BLOCK_SIZE as u32,
            ),
            Err(error) => reply.error(self.errors.errno("statfs", inode.0, &error)),
        }
    }

    fn setxattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let mode = match flags {
            0 => XattrMode::Set,
            libc::XATTR_CREATE => XattrMode::Create,
            libc::XATTR_REPLACE => XattrMode::Replace,
            _ => return reply.error(Errno::EINVAL),
        };
        let result = self.vfs.set_xattr(ino(inode), name.as_bytes(), value, mode);
        self.reply_empty("setxattr", inode, result, reply);
    }

    fn getxattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let value = self.vfs.xattr(ino(inode), name.as_bytes());
        self.reply_xattr(inode, size, value, reply);
    }

    fn listxattr(&self, request: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        let names = self.vfs.list_xattrs(&caller(request), ino(inode));
        let list = names.map(|names| {
            let mut list = Vec::new();
            for name in names {
                list.extend_from_slice(&name);
                list.push(0);
            }
            list
        });
        self.reply_xattr(inode, size, list, reply);
    }

    fn removexattr(&self, _request: &Request, inode: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let result = self.vfs.remove_xattr(ino(inode), name.as_bytes());
        self.reply_empty("removexattr", inode, result, reply);
    }

    fn ioctl(
        &self,
        request: &Request,
        inode: INodeNo,
        file: FileHandle,
        _flags: IoctlFlags,
        command: u32,
        payload: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        if command != control::CONTROL {
            return reply.error(Errno::ENOTTY);
        }
        self.answer_control(caller(request), handle(file), ino(inode), payload, reply);
    }

    /// ENOSYS: regular files are always ready, and the kernel need not ask again.
    fn poll(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fallocate(
        &self,
        request: &Request,
        inode: INodeNo,
        file: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        const ZERO_KEEP: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        let what = match mode {
            0 => Allocate::Extend,
            libc::FALLOC_FL_KEEP_SIZE => Allocate::KeepSize,
            PUNCH => Allocate::Punch,
            libc::FALLOC_FL_ZERO_RANGE => Allocate::Zero,
            ZERO_KEEP => Allocate::ZeroKeepSize,
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        let result = self.vfs.allocate(
            &caller(request),
            handle(file),
            ino(inode),
            offset,
            length,
            what,
        );
        self.reply_empty("fallocate", inode, result, reply);
    }

    fn lseek(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let what = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        match self.vfs.seek(ino(inode), offset, what) {
            Ok(found) => match i64::try_from(found) {
                Ok(found) => reply.offset(found),
                Err(_) => reply.error(Errno::EOVERFLOW),
            },
            Err(error) => reply.error(self.errors.errno("lseek", inode.0, &error)),
        }
    }

    fn copy_file_range(
        &self,
        request: &Request,
        src: INodeNo,
        src_file: FileHandle,
        src_offset: u64,
        dst: INodeNo,
        dst_file: FileHandle,
        dst_offset: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let result = self.vfs.copy(
            &caller(request),
            (handle(src_file), ino(src), src_offset),
            (handle(dst_file), ino(dst), dst_offset),
            len,
        );
        let copied = match result {
            Ok(copied) => copied,
            Err(error) => return reply.error(self.errors.errno("copy", dst.0, &error)),
        };
        let sync = self.vfs.handle_flags(handle(dst_file), ino(dst)).sync;
        // At most 1 GiB.
        self.reply_written("copy", dst, copied as u32, sync, reply);
    }
}
