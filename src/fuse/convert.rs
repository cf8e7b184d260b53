//! Between the values of the engine and those of fuser.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    FileAttr, FileHandle, FileType, FopenFlags, INodeNo, OpenAccMode, OpenFlags, Request, TimeOrNow,
};

use super::system;

use crate::engine::{Attr, FileKind};
use crate::units::{BLOCK_SIZE, Ino, Time};
use crate::vfs::{self, Caller, HandleId};

pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

/// The kind that the type bits of a mode say; `None` for what `mknod` does not make.
pub(super) fn node_kind(mode: u32) -> Option<FileKind> {
    match mode & libc::S_IFMT {
        // A mode without a type is a regular file.
        0 | libc::S_IFREG => Some(FileKind::Regular),
        libc::S_IFIFO => Some(FileKind::Fifo),
        libc::S_IFSOCK => Some(FileKind::Socket),
        libc::S_IFCHR => Some(FileKind::CharDevice),
        libc::S_IFBLK => Some(FileKind::BlockDevice),
        _ => None,
    }
}

/// Attributes; `blocks` in units of 512 bytes.
pub(super) fn file_attr(attr: &Attr, blocks: u64) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino.0),
        size: attr.size,
        blocks,
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: system_time(attr.btime),
        kind: file_type(attr.kind),
        // The mask leaves twelve bits.
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: BLOCK_SIZE as u32,
        flags: 0,
    }
}

pub(super) fn ino(ino: INodeNo) -> Ino {
    Ino(ino.0)
}

pub(super) fn caller(request: &Request) -> Caller {
    Caller {
        uid: request.uid(),
        gid: request.gid(),
        pid: request.pid(),
        groups: system::groups,
    }
}

pub(super) fn handle(handle: FileHandle) -> HandleId {
    HandleId(handle.0)
}

pub(super) fn open_flags(flags: i32) -> vfs::OpenFlags {
    vfs::OpenFlags {
        read: OpenFlags(flags).acc_mode() != OpenAccMode::O_WRONLY,
        write: OpenFlags(flags).acc_mode() != OpenAccMode::O_RDONLY,
        sync: is_sync(flags),
        cached: !is_direct(flags),
    }
}

/// True for what goes around the page cache.
pub(super) fn is_direct(flags: i32) -> bool {
    flags & libc::O_DIRECT != 0
}

/// True for O_SYNC, which includes the bit of O_DSYNC, and for O_DSYNC.
pub(super) fn is_sync(flags: i32) -> bool {
    flags & libc::O_DSYNC != 0
}

/// How the kernel treats an open file: what is opened O_DIRECT goes around the page cache, with
/// writers side by side; of other files cached pages stay, for what changes behind them is told.
pub(super) fn fopen_flags(flags: i32) -> FopenFlags {
    if is_direct(flags) {
        FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
    } else {
        FopenFlags::FOPEN_KEEP_CACHE
    }
}

/// A time for fuser. What cannot be one there, which only a damaged pool holds, becomes 1970.
fn system_time(time: Time) -> SystemTime {
    let nanos = Duration::from_nanos(time.nanos.into());
    let seconds = Duration::from_secs(time.secs.unsigned_abs());
    let whole = if time.secs < 0 {
        UNIX_EPOCH.checked_sub(seconds)
    } else {
        UNIX_EPOCH.checked_add(seconds)
    };
    whole
        .and_then(|whole| whole.checked_add(nanos))
        .unwrap_or(UNIX_EPOCH)
}

/// A time that a caller sets.
pub(super) fn time(time: TimeOrNow) -> Time {
    match time {
        TimeOrNow::Now => Time::now(),
        TimeOrNow::SpecificTime(time) => sent_time(time),
    }
}

/// fuser takes the nanoseconds of a time before 1970 away from the seconds where the kernel adds
/// them: -1.25 s arrives as seconds -2 and nanoseconds 750,000,000 and becomes -2.75 s. Taken
/// apart the same way, it is what the kernel sent.
fn sent_time(time: SystemTime) -> Time {
    match UNIX_EPOCH.duration_since(time) {
        Ok(before) if !before.is_zero() && before.as_secs() > 0 => Time {
            secs: -i64::try_from(before.as_secs()).unwrap_or(i64::MAX),
            nanos: before.subsec_nanos(),
        },
        _ => Time::from(time),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_are_what_the_kernel_sent() {
        for (secs, nanos) in [(-2i64, 750_000_000), (-1, 0), (0, 5), (1, 999_999_999)] {
            // As fuser makes it.
            let fusers = if secs >= 0 {
                UNIX_EPOCH + Duration::new(secs.unsigned_abs(), nanos)
            } else {
                UNIX_EPOCH - Duration::new(secs.unsigned_abs(), nanos)
            };
            assert_eq!(sent_time(fusers), Time { secs, nanos });
        }
    }

    #[test]
    fn any_time_of_a_pool_can_be_told() {
        for secs in [i64::MIN, -1, 0, 1, i64::MAX] {
            for nanos in [0, 999_999_999, u32::MAX] {
                system_time(Time { secs, nanos });
            }
        }
        let time = Time {
            secs: -2,
            nanos: 750_000_000,
        };
        assert_eq!(
            UNIX_EPOCH.duration_since(system_time(time)).unwrap(),
            Duration::from_millis(1250)
        );
    }

    #[test]
    fn what_mknod_does_not_make_has_no_kind() {
        assert_eq!(node_kind(libc::S_IFDIR | 0o755), None);
        assert_eq!(node_kind(libc::S_IFLNK), None);
        assert_eq!(node_kind(0o644), Some(FileKind::Regular));
        assert_eq!(node_kind(libc::S_IFIFO | 0o644), Some(FileKind::Fifo));
    }
}
