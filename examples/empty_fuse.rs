//! A FUSE filesystem that does nothing: how fast any daemon could be on this machine.
//!
//! It shows files `disk0` to `disk63`, all of one size; reads give zeros, writes and syncs are
//! answered at once, with the settings of the kernel that a mount of nodupe uses. What is left of
//! an operation is the kernel, the switch to the daemon and back, and the transfer of the bytes.
//!
//! `cargo run --release --example empty_fuse -- DIR [SIZE_MIB]`; ends when DIR is unmounted.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, Session, WriteFlags,
};

const TTL: Duration = Duration::from_secs(1);
const MIB: u64 = 1024 * 1024;
/// Number of the root directory; the files follow it.
const ROOT: u64 = 1;
const FILES: u64 = 64;
/// Most that the kernel asks for at once.
static ZEROS: [u8; 1024 * 1024] = [0; 1024 * 1024];

/// The filesystem; `size` is that of each file, in bytes.
struct Empty {
    size: u64,
}

impl Empty {
    fn attr(&self, ino: u64) -> FileAttr {
        let (kind, perm, size) = match ino {
            ROOT => (FileType::Directory, 0o700, 4096),
            _ => (FileType::RegularFile, 0o600, self.size),
        };
        FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Empty {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for flag in [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_PARALLEL_DIROPS] {
            config
                .add_capabilities(flag)
                .map_err(|_| io::Error::other(format!("the kernel does not offer {flag:?}")))?;
        }
        config
            .set_max_write(1024 * 1024)
            .map_err(|most| io::Error::other(format!("writes have at most {most} bytes")))?;
        config
            .set_max_background(256)
            .and_then(|_| config.set_congestion_threshold(192))
            .map_err(|least| io::Error::other(format!("at least {least} requests wait")))?;
        Ok(())
    }

    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let number = name.to_str().and_then(|name| name.strip_prefix("disk"));
        match number.and_then(|number| number.parse::<u64>().ok()) {
            Some(number) if number < FILES => {
                reply.entry(&TTL, &self.attr(ROOT + 1 + number), Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        reply.attr(&TTL, &self.attr(inode.0));
    }

    fn open(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let left = self.size.saturating_sub(offset).min(u64::from(size));
        reply.data(&ZEROS[..ZEROS.len().min(left as usize)]);
    }

    fn write(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.written(data.len() as u32);
    }

    fn fsync(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }
}

fn main() -> io::Result<()> {
    let mut args = std::env::args().skip(1);
    let dir = args
        .next()
        .ok_or_else(|| io::Error::other("usage: empty_fuse DIR [SIZE_MIB]"))?;
    let mib: u64 = args.next().and_then(|mib| mib.parse().ok()).unwrap_or(1024);
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("empty".to_owned())];
    config.n_threads = Some(nodupe::fuse::THREADS_DEFAULT);
    config.clone_fd = true;
    let empty = Empty { size: mib * MIB };
    let session = Session::new(empty, Path::new(&dir), &config)?;
    session.spawn()?.join()
}
