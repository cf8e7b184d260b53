//! System calls around a mount: the control ioctl, write-back of mapped pages, unmounting, and the
//! random numbers behind tokens.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Makes the ioctl `number`, which reads and writes the whole payload. The number says its size,
/// which must be that of `payload`.
pub fn control<const N: usize>(
    file: BorrowedFd<'_>,
    number: u32,
    payload: &mut [u8; N],
) -> io::Result<()> {
    // The size of the argument, bits 16 to 29 of the number.
    let size = (number >> 16 & 0x3fff) as usize;
    assert_eq!(size, N, "the number of the ioctl says the size");
    // SAFETY: the descriptor is open for the call; the kernel and the filesystem behind it read
    // and write at most the `size` bytes that the number says, which is all of `payload`.
    let result = unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::c_ulong::from(number),
            payload.as_mut_ptr(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// True if an ioctl failed because nobody there knows it.
pub fn is_unknown(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOTTY | libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)
    )
}

/// Hands pages of the file that a mapping changed to the filesystem. Advisory: what fails here
/// (there are no such pages, it is a directory) leaves nothing undone that anybody relied on.
pub fn write_back(file: BorrowedFd<'_>) {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: takes numbers only; the descriptor is open for the call.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) };
}

/// Unmounts what is mounted on `dir`. `detach`: takes it out of the tree although it is in use; it
/// ends with its last user.
pub fn unmount(dir: &Path, detach: bool) -> io::Result<()> {
    let dir = CString::new(dir.as_os_str().as_bytes())?;
    let flags = if detach { libc::MNT_DETACH } else { 0 };
    // SAFETY: `dir` is a string with a NUL at its end that lives for the call.
    if unsafe { libc::umount2(dir.as_ptr(), flags | libc::UMOUNT_NOFOLLOW) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sixteen bytes that nobody can guess.
pub fn random() -> io::Result<[u8; 16]> {
    let mut bytes = [0u8; 16];
    // SAFETY: the buffer is as long as is said.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(got) != Ok(bytes.len()) {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes)
}
