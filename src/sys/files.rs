//! Files beside the pool's own: opened only below a directory, their holes, copies by the kernel.
//!
//! Invariants:
//!
//! 1. [`open_beneath`] never leaves the directory that it is given, whatever links and `..` a path
//!    has and whoever changes the tree meanwhile; and never waits for a pipe or a device.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path};

/// Flags of every open here. Without O_NONBLOCK a pipe would wait for a writer.
const FLAGS: libc::c_int = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;

/// Opens a file below `dir` to read. Symbolic links are followed as long as they stay below.
/// What leads out fails with `EXDEV`.
///
/// # Errors
/// The system's own; `EXDEV` or `ELOOP` for what leads out.
pub fn open_beneath(dir: BorrowedFd<'_>, path: &Path) -> io::Result<File> {
    beneath(dir, path, FLAGS)
}

/// As [`open_beneath`], to read and write.
///
/// # Errors
/// As [`open_beneath`].
pub fn open_beneath_to_write(dir: BorrowedFd<'_>, path: &Path) -> io::Result<File> {
    beneath(dir, path, FLAGS | libc::O_RDWR)
}

/// Opens a directory to open files below it: nobody needs to be allowed to list it.
///
/// # Errors
/// The system's own.
pub fn directory(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(path)
}

fn beneath(dir: BorrowedFd<'_>, path: &Path, flags: libc::c_int) -> io::Result<File> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    // struct open_how: flags, mode, resolve.
    let how: [u64; 3] = [
        u64::from(flags.cast_unsigned()),
        0,
        libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS,
    ];
    // SAFETY: the descriptor is open for the call, the path has a NUL at its end, and `how` has the
    // layout and the size that are given.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            dir.as_raw_fd(),
            name.as_ptr(),
            how.as_ptr(),
            size_of_val(&how),
        )
    };
    if let Ok(fd @ 0..) = i32::try_from(fd) {
        // SAFETY: the call made this descriptor, and nothing else owns it.
        return Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // An old kernel, or a container that does not know the call.
        Some(libc::ENOSYS | libc::EPERM) => step_by_step(dir, path, flags),
        _ => Err(error),
    }
}

/// As [`open_beneath`], by one open for each part of the path; follows no links at all.
fn step_by_step(dir: BorrowedFd<'_>, path: &Path, flags: libc::c_int) -> io::Result<File> {
    let outside = || io::Error::from_raw_os_error(libc::EXDEV);
    let mut way = Vec::new();
    let mut parts = path.components().peekable();
    while let Some(part) = parts.next() {
        // Directories cannot be opened to write.
        let flags = match parts.peek() {
            None => flags,
            Some(_) => FLAGS,
        };
        match part {
            Component::CurDir => {}
            Component::ParentDir => drop(way.pop().ok_or_else(outside)?),
            Component::Normal(name) => {
                let from = way.last().map_or(dir, |file: &File| file.as_fd());
                way.push(open_step(from, name.as_bytes(), flags)?);
            }
            Component::RootDir | Component::Prefix(_) => return Err(outside()),
        }
    }
    way.pop().ok_or_else(outside)
}

fn open_step(dir: BorrowedFd<'_>, name: &[u8], flags: libc::c_int) -> io::Result<File> {
    let name = CString::new(name)?;
    // SAFETY: the descriptor is open for the call, and the name has a NUL at its end.
    let fd = unsafe { libc::openat(dir.as_raw_fd(), name.as_ptr(), flags | libc::O_NOFOLLOW) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call made this descriptor, and nothing else owns it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// True if [`open_beneath`] failed because a path leads out of its directory.
pub fn leads_out(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EXDEV | libc::ELOOP))
}

/// Renames a file; what has the new name already stays, and is an error.
///
/// # Errors
/// The system's own; `EEXIST` if there is one of that name.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    let name = |path: &Path| CString::new(path.as_os_str().as_bytes());
    let (old, new) = (name(from)?, name(to)?);
    // SAFETY: both paths have a NUL at their end, and live through the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            libc::AT_FDCWD,
            old.as_ptr(),
            libc::AT_FDCWD,
            new.as_ptr(),
            libc::RENAME_NOREPLACE,
        )
    };
    if done == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // A kernel or a file system that does not know it.
        Some(libc::ENOSYS | libc::EINVAL) => {
            std::fs::hard_link(from, to)?;
            std::fs::remove_file(from)
        }
        _ => Err(error),
    }
}

/// Opens `path` to read, not what a link there leads to, and never waits for a pipe or a device.
///
/// # Errors
/// The system's own; `ELOOP` for a link.
pub fn open_itself(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
}

/// Makes a file to read and write, `direct`: past the page cache; the name must be free.
///
/// # Errors
/// The system's own.
pub fn create_new(path: &Path, mode: u32, direct: bool) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(mode)
        .custom_flags(if direct { libc::O_DIRECT } else { 0 })
        .open(path)
}

/// Tells the kernel that a file will be read in order, so that it reads further ahead. Only advice:
/// nothing depends on it.
pub fn expect_sequential(file: &File) {
    // SAFETY: the descriptor is open for the call, which takes no memory.
    let refused =
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_SEQUENTIAL) };
    if refused != 0 {
        log::debug!(
            "no more read-ahead: {}",
            io::Error::from_raw_os_error(refused)
        );
    }
}

/// Where the next data of a file begins, from `offset` on; `None` if there is none.
///
/// # Errors
/// The system's own.
pub fn seek_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match seek(file, offset, libc::SEEK_DATA) {
        Ok(at) => Ok(Some(at)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        // A device, or a filesystem that knows no holes.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(Some(offset)),
        Err(error) => Err(error),
    }
}

/// Where the data at `offset` ends.
///
/// # Errors
/// The system's own.
pub fn seek_hole(file: &File, offset: u64) -> io::Result<u64> {
    match seek(file, offset, libc::SEEK_HOLE) {
        Ok(at) => Ok(at),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(u64::MAX),
        Err(error) => Err(error),
    }
}

fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    let offset = i64::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: takes numbers only; the descriptor is open for the call. Its position, which this
    // moves, is used by nobody: reads here say their offset.
    let at = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    u64::try_from(at).map_err(|_| io::Error::last_os_error())
}

/// Copies up to `len` bytes without them passing through this process; the filesystem shares them
/// where it can. Returns how many, 0 at the end of `from`.
///
/// # Errors
/// The system's own.
pub fn copy_range(from: &File, at: u64, to: &File, into: u64, len: u64) -> io::Result<u64> {
    let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let mut at = i64::try_from(at).map_err(wrong)?;
    let mut into = i64::try_from(into).map_err(wrong)?;
    let len = usize::try_from(len.min(1 << 30)).unwrap_or(1 << 30);
    // SAFETY: both descriptors are open for the call, both offsets live through it.
    let done = unsafe {
        libc::copy_file_range(
            from.as_raw_fd(),
            &raw mut at,
            to.as_raw_fd(),
            &raw mut into,
            len,
            0,
        )
    };
    u64::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// Makes a range of a file a hole; its size stays.
///
/// # Errors
/// The system's own.
pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let (offset, len) = (
        i64::try_from(offset).map_err(wrong)?,
        i64::try_from(len).map_err(wrong)?,
    );
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: takes numbers only; the descriptor is open for the call.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives `to` the extended attributes of `from`, access lists among them.
///
/// # Errors
/// The system's own. A filesystem without attributes has none to copy.
pub fn copy_attributes(from: &File, to: &File) -> io::Result<()> {
    // SAFETY: the kernel writes at most `len` bytes to `to`, which is that long.
    let names = whole(|to, len| unsafe { libc::flistxattr(from.as_raw_fd(), to.cast(), len) });
    let names = match names {
        Err(error) if error.raw_os_error() == Some(libc::ENOTSUP) => return Ok(()),
        names => names?,
    };
    for name in names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let name = CString::new(name)?;
        // SAFETY: as above; the name ends in a zero and lives through the call.
        let value = whole(|to, len| unsafe {
            libc::fgetxattr(from.as_raw_fd(), name.as_ptr(), to.cast(), len)
        })?;
        // SAFETY: the kernel reads the name up to its zero, and `value.len()` bytes of the value.
        let set = unsafe {
            libc::fsetxattr(
                to.as_raw_fd(),
                name.as_ptr(),
                value.as_ptr().cast(),
                value.len(),
                0,
            )
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// What a call writes to a buffer that it tells the size of: the largest value of an attribute, and
/// the longest list of them, is 64 KiB.
fn whole(call: impl Fn(*mut u8, usize) -> isize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 64 << 10]; // 64 KiB: XATTR_SIZE_MAX and XATTR_LIST_MAX
    let len = usize::try_from(call(bytes.as_mut_ptr(), bytes.len()))
        .map_err(|_| io::Error::last_os_error())?;
    bytes.truncate(len);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, symlink};

    fn open(dir: &File, path: &str) -> [io::Result<File>; 2] {
        let path = Path::new(path);
        [
            open_beneath(dir.as_fd(), path),
            step_by_step(dir.as_fd(), path, FLAGS),
        ]
    }

    #[test]
    fn what_is_below_is_opened_to_write() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("sub/file"), "old").unwrap();
        let root = directory(dir.path()).unwrap();
        let (root, path) = (root.as_fd(), Path::new("sub/file"));
        for file in [
            open_beneath_to_write(root, path),
            step_by_step(root, path, FLAGS | libc::O_RDWR),
        ] {
            file.unwrap().write_all_at(b"new", 0).unwrap();
        }
        let outside = open_beneath_to_write(root, Path::new("../file"));
        assert!(leads_out(&outside.unwrap_err()));
    }

    #[test]
    fn nothing_outside_of_the_directory_is_opened() {
        let outer = tempfile::tempdir().unwrap();
        let inner = outer.path().join("in");
        std::fs::create_dir_all(inner.join("sub")).unwrap();
        std::fs::write(outer.path().join("secret"), "s").unwrap();
        std::fs::write(inner.join("sub/file"), "f").unwrap();
        symlink(outer.path().join("secret"), inner.join("absolute")).unwrap();
        symlink("../secret", inner.join("climbs")).unwrap();
        let dir = File::open(&inner).unwrap();
        for path in ["sub/file", "./sub/../sub/file"] {
            assert!(open(&dir, path).iter().all(Result::is_ok), "{path}");
        }
        let secret = outer.path().join("secret");
        for path in [
            "../secret",
            "sub/../../secret",
            "absolute",
            "climbs",
            secret.to_str().unwrap(),
        ] {
            for outcome in open(&dir, path) {
                assert!(leads_out(&outcome.unwrap_err()), "{path}");
            }
        }
    }
}
