//! The system calls of the tests that std does not make.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::thread;

fn check(result: impl TryInto<i64>) -> io::Result<u64> {
    let value = result.try_into().unwrap_or(-1);
    u64::try_from(value).map_err(|_| io::Error::last_os_error())
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

pub(crate) fn uid() -> u32 {
    // SAFETY: takes nothing, cannot fail.
    unsafe { libc::geteuid() }
}

pub(crate) fn gid() -> u32 {
    // SAFETY: takes nothing, cannot fail.
    unsafe { libc::getegid() }
}

/// Runs `job` as another user and group, without further groups, on a thread of its own: the
/// kernel keeps identities per thread.
pub(crate) fn as_user<T: Send>(uid: u32, gid: u32, job: impl FnOnce() -> T + Send) -> T {
    as_member(uid, gid, &[], job)
}

/// As [`as_user`], with further groups.
pub(crate) fn as_member<T: Send>(
    uid: u32,
    gid: u32,
    groups: &[libc::gid_t],
    job: impl FnOnce() -> T + Send,
) -> T {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                let id = libc::c_long::from(gid);
                let user = libc::c_long::from(uid);
                // SAFETY: system calls with numbers, and a list that outlives the first of them;
                // they change this thread alone, which ends with `job`.
                unsafe {
                    check(libc::syscall(
                        libc::SYS_setgroups,
                        groups.len(),
                        groups.as_ptr(),
                    ))
                    .unwrap();
                    check(libc::syscall(libc::SYS_setresgid, id, id, id)).unwrap();
                    check(libc::syscall(libc::SYS_setresuid, user, user, user)).unwrap();
                }
                job()
            })
            .join()
            .unwrap()
    })
}

pub(crate) fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (offset.cast_signed(), len.cast_signed());
    // SAFETY: takes numbers only.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) }).map(drop)
}

pub(crate) fn seek(file: &File, offset: u64, whence: i32) -> io::Result<u64> {
    // SAFETY: takes numbers only.
    check(unsafe { libc::lseek(file.as_raw_fd(), offset.cast_signed(), whence) })
}

pub(crate) fn copy_file_range(
    from: &File,
    from_offset: u64,
    to: &File,
    to_offset: u64,
    len: usize,
) -> io::Result<u64> {
    let mut from_offset = from_offset.cast_signed();
    let mut to_offset = to_offset.cast_signed();
    // SAFETY: the offsets live for the call.
    check(unsafe {
        libc::copy_file_range(
            from.as_raw_fd(),
            &raw mut from_offset,
            to.as_raw_fd(),
            &raw mut to_offset,
            len,
            0,
        )
    })
}

pub(crate) fn rename(from: &Path, to: &Path, flags: u32) -> io::Result<()> {
    let (from, to) = (c_path(from), c_path(to));
    // SAFETY: both strings live for the call.
    check(unsafe {
        libc::renameat2(
            libc::AT_FDCWD,
            from.as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            flags,
        )
    })
    .map(drop)
}

pub(crate) fn mknod(path: &Path, mode: u32, device: u64) -> io::Result<()> {
    let path = c_path(path);
    // SAFETY: the string lives for the call.
    check(unsafe { libc::mknod(path.as_ptr(), mode, device) }).map(drop)
}

/// Blocks, free blocks and available blocks of what `path` is on, and the size of a block.
pub(crate) fn statfs(path: &Path) -> (u64, u64, u64, u64) {
    let path = c_path(path);
    // SAFETY: a structure of numbers may be zero; it and the string live for the call.
    let facts = unsafe {
        let mut facts: libc::statvfs = std::mem::zeroed();
        check(libc::statvfs(path.as_ptr(), &raw mut facts)).unwrap();
        facts
    };
    (
        facts.f_blocks,
        facts.f_bfree,
        facts.f_bavail,
        facts.f_frsize,
    )
}

pub(crate) fn set_xattr(path: &Path, name: &str, value: &[u8], flags: i32) -> io::Result<()> {
    let (path, name) = (c_path(path), CString::new(name).unwrap());
    // SAFETY: strings and value live for the call, the length is that of the value.
    check(unsafe {
        libc::lsetxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            flags,
        )
    })
    .map(drop)
}

/// Value of an attribute as far as `size` bytes hold it; the length alone for 0.
pub(crate) fn xattr(path: &Path, name: &str, size: usize) -> io::Result<(u64, Vec<u8>)> {
    let (path, name) = (c_path(path), CString::new(name).unwrap());
    let mut value = vec![0u8; size];
    // SAFETY: strings and buffer live for the call, the length is that of the buffer.
    let len = check(unsafe {
        libc::lgetxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    })?;
    Ok((len, value))
}

pub(crate) fn list_xattrs(path: &Path) -> Vec<String> {
    let path = c_path(path);
    let mut list = vec![0u8; 64 * 1024];
    // SAFETY: string and buffer live for the call, the length is that of the buffer.
    let len =
        check(unsafe { libc::llistxattr(path.as_ptr(), list.as_mut_ptr().cast(), list.len()) })
            .unwrap();
    list.truncate(usize::try_from(len).unwrap());
    let mut names: Vec<String> = list
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect();
    names.sort();
    names
}

pub(crate) fn remove_xattr(path: &Path, name: &str) -> io::Result<()> {
    let (path, name) = (c_path(path), CString::new(name).unwrap());
    // SAFETY: both strings live for the call.
    check(unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) }).map(drop)
}

/// Handle of a file, as an NFS server keeps it.
pub(crate) struct FileId(Box<IdBuffer>);

/// `struct file_handle` with room for the longest handle.
#[repr(C)]
struct IdBuffer {
    bytes: libc::c_uint,
    kind: libc::c_int,
    handle: [u8; ID_BYTES_MAX],
}

const ID_BYTES_MAX: usize = 128;

impl FileId {
    pub(crate) fn of(path: &Path) -> Self {
        let path = c_path(path);
        let mut buffer = Box::new(IdBuffer {
            bytes: ID_BYTES_MAX as libc::c_uint,
            kind: 0,
            handle: [0; ID_BYTES_MAX],
        });
        let mut mount: libc::c_int = 0;
        // SAFETY: the buffer has the layout of `struct file_handle` and says how long it is;
        // all pointers live for the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                libc::AT_FDCWD,
                path.as_ptr(),
                &raw mut *buffer,
                &raw mut mount,
                0,
            )
        };
        check(result).unwrap();
        Self(buffer)
    }

    /// Opens the file; `mount` is anything on its filesystem.
    pub(crate) fn open(&self, mount: &File) -> io::Result<File> {
        // SAFETY: the buffer was filled by the kernel, and lives for the call.
        let fd = check(unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                mount.as_raw_fd(),
                &raw const *self.0,
                libc::O_RDONLY,
            )
        })?;
        // SAFETY: a new descriptor that nobody else has.
        Ok(unsafe { File::from_raw_fd(fd.try_into().unwrap()) })
    }
}

/// A control request with a payload of the wrong size, no payload at all, or another number.
pub(crate) fn strange_ioctls(file: &File) -> Vec<io::Error> {
    let mut small = [0_u8; 64];
    let numbers: [libc::c_ulong; 5] = [
        0xe000_4e01,                // the right one, with a bad address
        0xc000_4e01 | 64 << 16,     // the right letter, a small payload
        0xe000_4e02,                // an unknown one of the right size
        0xc000_4e01 | 0x3fff << 16, // the largest payload there can be
        0x4e01,                     // none
    ];
    numbers
        .into_iter()
        .filter_map(|number| {
            let small_fits = number >> 16 & 0x3fff == 64;
            let address = if small_fits {
                small.as_mut_ptr()
            } else {
                std::ptr::without_provenance_mut(8)
            };
            // SAFETY: the kernel checks addresses: it fails with EFAULT for those that are none,
            // and the only real one holds as many bytes as the number says.
            let result = unsafe { libc::ioctl(file.as_raw_fd(), number, address) };
            check(result).err()
        })
        .collect()
}

/// What the kernel takes for one asynchronous request; on little-endian machines.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    result_file: u32,
}

/// Asynchronous writes, as QEMU makes them with `aio=native`.
pub(crate) struct Aio {
    context: u64,
}

impl Aio {
    pub(crate) fn new() -> Self {
        let mut context = 0u64;
        // SAFETY: the kernel writes the number of the new context.
        check(unsafe { libc::syscall(libc::SYS_io_setup, 1, &raw mut context) }).unwrap();
        Self { context }
    }

    /// Writes all of `data` and waits for the end of it.
    pub(crate) fn write(&self, file: &File, data: &[u8], offset: u64) {
        let request = Iocb {
            opcode: 1, // IOCB_CMD_PWRITE
            file: file.as_raw_fd().cast_unsigned(),
            buffer: data.as_ptr().addr() as u64,
            bytes: data.len() as u64,
            offset: offset.cast_signed(),
            ..Iocb::default()
        };
        let requests = [&raw const request];
        // SAFETY: one request, which lives as long as the call, and whose data lives until it has
        // ended, which is waited for.
        check(unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1, requests.as_ptr()) })
            .unwrap();
        let mut event = [0u64; 4];
        // SAFETY: room for one event.
        let got = unsafe {
            let nothing = std::ptr::null::<libc::timespec>();
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                1,
                1,
                event.as_mut_ptr(),
                nothing,
            )
        };
        assert_eq!(check(got).unwrap(), 1);
        assert_eq!(event[2], data.len() as u64, "what the write returned");
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: ours; nothing is under way.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

/// A shared mapping of the start of a file.
pub(crate) struct Mapping {
    start: *mut u8,
    len: usize,
}

impl Mapping {
    pub(crate) fn new(file: &File, len: usize) -> Self {
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self {
            start: start.cast(),
            len,
        }
    }

    pub(crate) fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.len);
        // SAFETY: inside the mapping. The bytes may change meanwhile, so they are read one by one
        // as volatile.
        (offset..offset + len)
            .map(|at| unsafe { self.start.add(at).read_volatile() })
            .collect()
    }

    pub(crate) fn write(&self, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= self.len);
        for (index, byte) in data.iter().enumerate() {
            // SAFETY: inside the mapping, which is writable.
            unsafe { self.start.add(offset + index).write_volatile(*byte) };
        }
    }

    pub(crate) fn sync(&self) {
        // SAFETY: the mapping is ours, from its start to its end.
        check(unsafe { libc::msync(self.start.cast(), self.len, libc::MS_SYNC) }).unwrap();
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody refers to it any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}
