//! System calls on the file or block device under a pool: opening it safely, direct I/O, holes.
//!
//! Everything here is a thin, safe wrapper: it adds no policy, takes no locks and keeps no state.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// `BLKDISCARD`, `_IO(0x12, 119)`: takes a pointer to start and length in bytes.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// Opens an existing file or device for reading, and for writing if `write`. Never waits (for the
/// other end of a pipe, say) and never makes a terminal the controlling one. `exclusive`: `O_EXCL`,
/// which on a block device fails with `EBUSY` while it is mounted or part of something else.
pub fn open(path: &Path, write: bool, exclusive: bool) -> io::Result<File> {
    let exclusive = if exclusive { libc::O_EXCL } else { 0 };
    OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | exclusive)
        .open(path)
}

/// Creates a file that did not exist, for reading and writing by its owner alone. Fails if the
/// name is taken, even by a symbolic link to nothing.
pub fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

/// Switches direct I/O (`O_DIRECT`) on or off, and non-blocking mode off. `EINVAL` where the
/// filesystem has no direct I/O.
pub fn set_direct(file: &File, on: bool) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: F_GETFL takes no pointer, and `file` keeps `fd` open.
    let flags = check(unsafe { libc::fcntl(fd, libc::F_GETFL) })?;
    let flags = flags & !(libc::O_NONBLOCK | libc::O_DIRECT);
    let flags = flags | if on { libc::O_DIRECT } else { 0 };
    // SAFETY: F_SETFL takes an int and no pointer, and `file` keeps `fd` open.
    check(unsafe { libc::fcntl(fd, libc::F_SETFL, flags) })?;
    Ok(())
}

/// Frees a range of a file: afterwards it reads as zeros and takes no space. The size stays.
pub fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (offset, len) = (to_off(offset)?, to_off(len)?);
    retry(|| {
        // SAFETY: fallocate takes no pointer, and `file` keeps the descriptor open.
        unsafe { libc::fallocate64(file.as_raw_fd(), mode, offset, len) }
    })?;
    Ok(())
}

/// Allocates space for a range of a file: what is there stays, the rest reads as zeros, and the size
/// stays.
pub fn allocate(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (to_off(offset)?, to_off(len)?);
    retry(|| {
        // SAFETY: fallocate takes no pointer, and `file` keeps the descriptor open.
        unsafe { libc::fallocate64(file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, offset, len) }
    })?;
    Ok(())
}

/// Bytes that users can still allocate in the filesystem that holds an open file.
pub fn free_bytes(file: &File) -> io::Result<u64> {
    let mut found = std::mem::MaybeUninit::<libc::statvfs64>::uninit();
    // SAFETY: fstatvfs writes one struct statvfs64 to the pointer, for which there is room; `file`
    // keeps the descriptor open.
    check(unsafe { libc::fstatvfs64(file.as_raw_fd(), found.as_mut_ptr()) })?;
    // SAFETY: the call succeeded, so the struct is filled.
    let found = unsafe { found.assume_init() };
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Tells a block device that a range is not needed any more.
pub fn discard_blocks(device: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    retry(|| {
        // SAFETY: BLKDISCARD reads two u64 from the pointer, which `range` holds and which lives
        // for the whole call; `device` keeps the descriptor open.
        unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD, range.as_ptr()) }
    })?;
    Ok(())
}

/// Offset of the first byte at or behind `offset` that may be other than a hole; `None` if there
/// is none. Moves the file offset.
pub fn seek_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    seek(file.as_raw_fd(), offset, libc::SEEK_DATA)
}

/// Offset of the first hole at or behind `offset`, the end of the file being one; `None` if
/// `offset` is at or behind the end. Moves the file offset.
pub fn seek_hole(file: &File, offset: u64) -> io::Result<Option<u64>> {
    seek(file.as_raw_fd(), offset, libc::SEEK_HOLE)
}

fn seek(fd: RawFd, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    // SAFETY: lseek takes no pointer; an `fd` that is not open would only give EBADF.
    let found = unsafe { libc::lseek64(fd, to_off(offset)?, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

/// True if the host says that it does not do this kind of operation at all.
pub fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
    )
}

/// True if somebody else holds the block device.
pub fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}

/// True for `EINVAL`: of direct I/O, that the host cannot do it this way.
pub fn is_invalid(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

/// The error that a failing disk gives.
pub fn io_error() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

/// The error that a full disk gives.
pub fn no_space_error() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOSPC)
}

fn to_off(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn retry(mut call: impl FnMut() -> libc::c_int) -> io::Result<libc::c_int> {
    loop {
        match check(call()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
