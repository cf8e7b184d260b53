//! What the mount asks of the machine around it: groups of callers, read-ahead, and an end by
//! panic.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::thread;

/// Read-ahead of the page cache, in KiB: as much as one request holds.
const READ_AHEAD_KIB: &str = "1024";

/// First words of the names of threads that serve a mount: fuser's, and this program's.
const THREAD_NAMES: [&str; 2] = ["fuser-", "nodupe-"];

/// Makes a panic in a thread that serves a mount end the process, after it was told. Panics of
/// other threads are left to whoever started them.
pub(super) fn end_process_on_panic() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let tell = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            tell(panic);
            let thread = thread::current();
            let name = thread.name().unwrap_or("");
            if THREAD_NAMES.iter().any(|first| name.starts_with(first)) {
                std::process::abort();
            }
        }));
    });
}

/// Supplementary groups of a process; none if it cannot be seen.
pub(super) fn groups(pid: u32) -> Vec<u32> {
    let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else {
        return Vec::new();
    };
    groups_of(&status)
}

fn groups_of(status: &str) -> Vec<u32> {
    status
        .lines()
        .find_map(|line| line.strip_prefix("Groups:"))
        .map(|groups| {
            groups
                .split_whitespace()
                .filter_map(|group| group.parse().ok())
                .collect()
        })
        .unwrap_or_default()
}

/// Lets the kernel read ahead a whole request: it offers a FUSE daemon 128 KiB, and only the
/// setting of the mount itself goes beyond. Needs root; without, reads are smaller.
pub(super) fn raise_read_ahead(dir: &Path) {
    let Some(device) = mounted_device(dir) else {
        return;
    };
    let setting = PathBuf::from(format!("/sys/class/bdi/{device}/read_ahead_kb"));
    if let Err(error) = fs::write(&setting, READ_AHEAD_KIB) {
        log::debug!("{} was not set: {error}", setting.display());
    }
}

/// Device number, as "major:minor", of the newest mount on `dir`.
pub(super) fn mounted_device(dir: &Path) -> Option<String> {
    device_of(&fs::read("/proc/self/mountinfo").ok()?, dir)
}

fn device_of(mountinfo: &[u8], dir: &Path) -> Option<String> {
    mountinfo
        .split(|&byte| byte == b'\n')
        .filter_map(|line| {
            let mut fields = line.split(|&byte| byte == b' ');
            let device = fields.nth(2)?;
            let point = fields.nth(1)?;
            (unescape(point).as_bytes() == dir.as_os_str().as_bytes())
                .then(|| String::from_utf8_lossy(device).into_owned())
        })
        .next_back()
}

/// Undoes `\ooo`, by which mountinfo writes blanks and backslashes.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let escaped = after
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match escaped {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_mount_on_a_directory_is_found() {
        let mountinfo = b"36 35 98:0 / / rw - ext4 /dev/root rw\n\
            37 36 0:50 / /mnt/a\\040b rw - fuse.x x rw\n\
            38 36 0:51 / /mnt/a\\040b rw,nosuid - fuse.nodupe pool rw\n";
        let device = device_of(mountinfo, Path::new("/mnt/a b"));
        assert_eq!(device.as_deref(), Some("0:51"));
        assert_eq!(device_of(mountinfo, Path::new("/mnt/c")), None);
        assert_eq!(device_of(b"x y\n\\", Path::new("/")), None);
        assert_eq!(unescape(b"a\\04"), "a\\04");
    }

    /// Runs itself as a child whose thread panics, and looks how that ends.
    #[test]
    fn a_panic_in_a_serving_thread_ends_the_process() {
        const ASKED: &str = "NODUPE_TEST_PANICS";
        let name = "a_panic_in_a_serving_thread_ends_the_process";
        if std::env::var_os(ASKED).is_some() {
            end_process_on_panic();
            for thread in ["other", "nodupe-test"] {
                let thread = thread::Builder::new().name(thread.to_owned());
                let panicking = thread.spawn(|| panic!("as asked")).unwrap();
                panicking.join().unwrap_err();
                // The first one got here; the second must not.
                std::fs::write("/dev/stdout", "survived").unwrap();
            }
            return;
        }
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args([name, "--nocapture"])
            .env(ASKED, "1")
            .output()
            .unwrap();
        let signal = std::os::unix::process::ExitStatusExt::signal(&output.status);
        assert_eq!(signal, Some(libc::SIGABRT), "{output:?}");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(text.matches("survived").count(), 1, "{text}");
    }

    #[test]
    fn groups_are_read_from_the_status() {
        assert_eq!(
            groups_of("Name:\tcat\nGroups:\t4 24 1000 \nX:\n"),
            [4, 24, 1000]
        );
        assert_eq!(groups_of("Groups:\t \n"), Vec::<u32>::new());
        assert_eq!(groups_of(""), Vec::<u32>::new());
    }
}
