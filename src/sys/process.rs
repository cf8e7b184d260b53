//! Processes: termination signals, waiting for a daemon to go, unmounting, standard streams.
//!
//! 1. Every function here is safe to call from any thread, except where its text says otherwise.
//! 2. Errors are the operating system's own, untouched: the caller says what they mean.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

/// How often a process is looked at where the kernel has no pidfd (before Linux 5.3).
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Turns the -1 of a system call into its error.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Effective user and group of this process.
pub fn effective_owner() -> (u32, u32) {
    // SAFETY: both calls take nothing, touch no memory of ours and cannot fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// SIGTERM, SIGINT and SIGHUP, blocked in every thread so that one thread can wait for them.
#[derive(Debug)]
pub struct TerminationSignals {
    set: libc::sigset_t,
}

impl TerminationSignals {
    /// Blocks the signals in this thread and in those it starts later: call it before any other
    /// thread exists, or a signal may still end the process.
    pub fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set that it is given, so that it may be assumed
        // initialised; the signal numbers are valid; a null old set is allowed.
        unsafe {
            check(libc::sigemptyset(set.as_mut_ptr()))?;
            let mut set = set.assume_init();
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                check(libc::sigaddset(&raw mut set, signal))?;
            }
            match libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) {
                0 => Ok(Self { set }),
                errno => Err(io::Error::from_raw_os_error(errno)),
            }
        }
    }

    /// Waits for one of the signals and returns its name.
    pub fn wait(&self) -> io::Result<&'static str> {
        loop {
            // SAFETY: the set is initialised and lives longer than the call; a null siginfo
            // is allowed.
            match check(unsafe { libc::sigwaitinfo(&raw const self.set, ptr::null_mut()) }) {
                Ok(libc::SIGTERM) => return Ok("SIGTERM"),
                Ok(libc::SIGINT) => return Ok("SIGINT"),
                Ok(_) => return Ok("SIGHUP"),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Lets a descriptor survive the next exec, under the same number.
pub fn keep_on_exec(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_descriptor_flags(fd, 0)
}

fn set_descriptor_flags(fd: BorrowedFd<'_>, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as it is borrowed; F_SETFD takes an int.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, flags) }).map(drop)
}

/// Takes over a descriptor that the parent process left open for this one, by its number.
/// Refuses the standard streams and numbers that are not open. Call it at most once per number,
/// and before this process opens anything of its own.
pub fn adopt_descriptor(number: RawFd) -> io::Result<File> {
    if number <= libc::STDERR_FILENO {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: F_GETFD only asks; a number that is not open is answered with EBADF.
    check(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
    // SAFETY: the number is open, was passed to this process to own, and nothing else here
    // owns it, because the caller asks before opening anything.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    set_descriptor_flags(fd.as_fd(), libc::FD_CLOEXEC)?;
    Ok(File::from(fd))
}

/// Closes every descriptor that this process was started with, but the standard streams and
/// `keep`: a daemon must not hold files or pipes of whoever started it. Call it before this
/// process opens anything of its own. Does nothing on kernels without it (before Linux 5.9).
pub fn close_inherited(keep: RawFd) {
    const NO_FLAGS: libc::c_uint = 0;
    let first = libc::STDERR_FILENO + 1;
    let ranges = [
        (first, keep.saturating_sub(1)),
        (keep.saturating_add(1), RawFd::MAX),
    ];
    for (from, to) in ranges.into_iter().filter(|(from, to)| from <= to) {
        // SAFETY: takes integers only; nothing in this process owns a descriptor yet, because
        // the caller asks before opening anything.
        unsafe { libc::syscall(libc::SYS_close_range, from, to, NO_FLAGS) };
    }
}

/// Makes this process the leader of a session of its own, without a terminal.
pub fn new_session() -> io::Result<()> {
    // SAFETY: setsid takes nothing and touches no memory of ours.
    check(unsafe { libc::setsid() }).map(drop)
}

/// Points standard input at `input`, standard output and standard error at `output`.
pub fn redirect_streams(input: BorrowedFd<'_>, output: BorrowedFd<'_>) -> io::Result<()> {
    for (from, to) in [
        (input, libc::STDIN_FILENO),
        (output, libc::STDOUT_FILENO),
        (output, libc::STDERR_FILENO),
    ] {
        // SAFETY: `from` is open for as long as it is borrowed; replacing a standard stream is
        // what the caller asks for, and no owned descriptor of ours has those numbers.
        check(unsafe { libc::dup2(from.as_raw_fd(), to) })?;
    }
    Ok(())
}

/// Tells the kernel that this process serves the reclaim of dirty memory, so that its own
/// allocations do not wait for that reclaim. Needs CAP_SYS_RESOURCE.
pub fn set_io_flusher() -> io::Result<()> {
    const PR_SET_IO_FLUSHER: libc::c_int = 57; // linux/prctl.h, since 5.6
    const ON: libc::c_ulong = 1;
    const UNUSED: libc::c_ulong = 0;
    // SAFETY: PR_SET_IO_FLUSHER takes integers only and touches no memory of ours.
    check(unsafe { libc::prctl(PR_SET_IO_FLUSHER, ON, UNUSED, UNUSED, UNUSED) }).map(drop)
}

/// Time since the system was started, the time that it slept included.
pub fn uptime() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel fills the structure, which is ours. The clock exists since Linux 2.6.39, so
    // the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// Keeps what this process uses in memory from being evicted: code, stacks and heap, each page
/// from its first use on. False if this process may not lock as much as it likes: then nothing is
/// locked, because a limit would make allocations fail later.
pub fn lock_memory() -> io::Result<bool> {
    if !may_lock_all()? {
        return Ok(false);
    }
    let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    // SAFETY: mlockall takes flags only, and changes no memory of ours.
    check(unsafe { libc::mlockall(flags) }).map(|_| true)
}

/// Keeps the allocator from holding memory that is not used: few arenas, because a block that one
/// thread allocates is often freed by another, and large buffers straight from the system.
pub fn bound_allocator() {
    #[cfg(target_env = "gnu")]
    {
        const ARENAS: libc::c_int = 4;
        const LARGE: libc::c_int = 4 * 1024 * 1024; // 4 MiB
        const KEPT: libc::c_int = 8 * 1024 * 1024; // 8 MiB at the end of the heap
        for (parameter, value) in [
            (libc::M_ARENA_MAX, ARENAS),
            (libc::M_MMAP_THRESHOLD, LARGE),
            (libc::M_TRIM_THRESHOLD, KEPT),
        ] {
            // SAFETY: mallopt takes two integers and changes settings of the allocator only.
            unsafe { libc::mallopt(parameter, value) };
        }
    }
}

fn may_lock_all() -> io::Result<bool> {
    let mut limit = MaybeUninit::<libc::rlimit>::uninit();
    // SAFETY: getrlimit fills the struct that it is given, which may be assumed initialised if it
    // succeeds.
    let limit = unsafe {
        check(libc::getrlimit(libc::RLIMIT_MEMLOCK, limit.as_mut_ptr()))?;
        limit.assume_init()
    };
    if limit.rlim_cur == libc::RLIM_INFINITY {
        return Ok(true);
    }
    const CAP_IPC_LOCK: u64 = 1 << 14; // linux/capability.h
    let status = std::fs::read_to_string("/proc/self/status")?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    // In a user namespace of its own the capability does not lift the limit.
    let map = std::fs::read_to_string("/proc/self/uid_map")?;
    let is_first = map.split_whitespace().eq(["0", "0", "4294967295"]);
    Ok(is_first && effective & CAP_IPC_LOCK != 0)
}

/// Another process, held so that its number cannot come to mean a different one.
#[derive(Debug)]
pub struct Process {
    pid: libc::pid_t,
    /// `None` where the kernel has no pidfd.
    pidfd: Option<OwnedFd>,
}

impl Process {
    /// Finds a process by its number; an error if there is none.
    pub fn open(pid: u32) -> io::Result<Self> {
        let pid = libc::pid_t::try_from(pid)
            .ok()
            .filter(|&pid| pid > 0)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        const NO_FLAGS: libc::c_uint = 0;
        // SAFETY: pidfd_open takes two integers and touches no memory of ours.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, NO_FLAGS) };
        if result == -1 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::ENOSYS) {
                return Err(error);
            }
            return Ok(Self { pid, pidfd: None });
        }
        let number = RawFd::try_from(result).map_err(io::Error::other)?;
        // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(number) };
        Ok(Self {
            pid,
            pidfd: Some(pidfd),
        })
    }

    /// Waits until the process has gone, at most `timeout`. False: it is still there.
    pub fn wait_gone(&self, timeout: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let gone = match &self.pidfd {
                Some(pidfd) => poll_readable(pidfd.as_fd(), left),
                None => self.poll_by_number(left),
            };
            match gone {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn poll_by_number(&self, timeout: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            // SAFETY: signal 0 is never delivered; the call only asks whether the process exists.
            match check(unsafe { libc::kill(self.pid, 0) }) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(true),
                // EPERM: it exists and belongs to somebody else.
                _ if Instant::now() >= deadline => return Ok(false),
                _ => thread::sleep(POLL_INTERVAL),
            }
        }
    }
}

/// Waits until `fd` is readable, at most `timeout`.
fn poll_readable(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let mut entry = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let millis = libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: `entry` is one valid pollfd and lives longer than the call.
    check(unsafe { libc::poll(&raw mut entry, 1, millis) }).map(|ready| ready > 0)
}

/// Unmounts `dir`. `lazy` detaches it at once, whoever uses it. Where this process may not do so
/// itself, fusermount3 does it, whose message becomes the error.
pub fn unmount(dir: &Path, lazy: bool) -> io::Result<()> {
    let path = CString::new(dir.as_os_str().as_bytes())?;
    let flags = libc::UMOUNT_NOFOLLOW | if lazy { libc::MNT_DETACH } else { 0 };
    // SAFETY: `path` is a NUL-terminated string that lives longer than the call.
    match check(unsafe { libc::umount2(path.as_ptr(), flags) }) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            fusermount(dir, lazy).map_err(|helper| helper.unwrap_or(error))
        }
        Err(error) => Err(error),
    }
}

/// The error is `None` if there is no such program.
fn fusermount(dir: &Path, lazy: bool) -> Result<(), Option<io::Error>> {
    let flags = if lazy { "-uz" } else { "-u" };
    let output = match Command::new("fusermount3")
        .args([OsStr::new(flags), OsStr::new("--"), dir.as_os_str()])
        .output()
    {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(None),
        Err(error) => return Err(Some(error)),
    };
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let kind = if message.contains("busy") {
        io::ErrorKind::ResourceBusy
    } else {
        io::ErrorKind::PermissionDenied
    };
    Err(Some(io::Error::new(kind, message)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn waits_for_a_process_to_go() {
        let mut child = Command::new("sleep").arg("0.3").spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        assert!(!process.wait_gone(Duration::from_millis(10)).unwrap());
        let by_number = Process {
            pid: process.pid,
            pidfd: None,
        };
        assert!(!by_number.wait_gone(Duration::from_millis(10)).unwrap());
        assert!(process.wait_gone(Duration::from_secs(10)).unwrap());
        child.wait().unwrap();
        assert!(by_number.wait_gone(Duration::from_secs(10)).unwrap());
        assert!(Process::open(0).is_err());
    }

    #[test]
    fn refuses_descriptors_that_are_not_open() {
        assert!(adopt_descriptor(1).is_err());
        assert!(adopt_descriptor(1_000_000).is_err());
    }
}
