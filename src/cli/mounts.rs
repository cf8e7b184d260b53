//! Which pools are mounted where, from `/proc/self/mountinfo`.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::failure::{Failure, Result};

/// Type of our mounts, as the kernel shows it.
pub(super) const TYPE: &str = "fuse.nodupe";

/// One mount of any filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// Major and minor number of the mounted filesystem.
    pub(super) device: (u32, u32),
    /// Directory it is mounted on.
    pub(super) dir: PathBuf,
    /// Type, as `ext4` or `fuse.nodupe`.
    pub(super) kind: String,
    /// What is mounted: for ours the path of the pool.
    pub(super) source: PathBuf,
    /// True if it is mounted read-only.
    pub(super) read_only: bool,
}

impl Mount {
    /// True for a mounted pool.
    pub(super) fn is_ours(&self) -> bool {
        self.kind == TYPE
    }
}

/// All mounts that this process sees, in the order they were made.
pub(super) fn all() -> Result<Vec<Mount>> {
    const PATH: &str = "/proc/self/mountinfo";
    let bytes = fs::read(PATH).map_err(|error| {
        Failure::new(format!("cannot read {PATH}"))
            .because(&error)
            .hint("mount /proc: mount -t proc proc /proc")
    })?;
    Ok(bytes.split(|&b| b == b'\n').filter_map(parse).collect())
}

/// The mounted pools.
pub(super) fn ours() -> Result<Vec<Mount>> {
    Ok(all()?.into_iter().filter(Mount::is_ours).collect())
}

/// The mount on exactly this directory: the last one made, which hides the others.
pub(super) fn on(dir: &Path) -> Result<Option<Mount>> {
    Ok(all()?.into_iter().rfind(|mount| mount.dir == dir))
}

/// The mount that `path`, absolute and without links, lies in.
pub(super) fn holding(path: &Path) -> Result<Option<Mount>> {
    let mut best: Option<Mount> = None;
    for mount in all()? {
        let deeper = best
            .as_ref()
            .is_none_or(|best| mount.dir.as_os_str().len() >= best.dir.as_os_str().len());
        if deeper && path.starts_with(&mount.dir) {
            best = Some(mount);
        }
    }
    Ok(best)
}

/// Where the pool at this path is mounted.
pub(super) fn of_pool(pool: &Path) -> Result<Option<Mount>> {
    let Ok(pool) = pool.canonicalize() else {
        return Ok(None);
    };
    Ok(ours()?.into_iter().rfind(|mount| mount.source == pool))
}

/// The absolute path without links of a directory that may be a dead mount, which cannot be
/// looked into.
pub(super) fn resolve(dir: &Path) -> io::Result<PathBuf> {
    match (dir.canonicalize(), dir.parent(), dir.file_name()) {
        (Err(error), Some(parent), Some(name)) if is_dead(&error) => {
            let parent = match parent.as_os_str().is_empty() {
                true => Path::new("."),
                false => parent,
            };
            Ok(parent.canonicalize()?.join(name))
        }
        (result, ..) => result,
    }
}

/// True if an error of a path says that the daemon of its mount has gone.
pub(super) fn is_dead(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotConnected | io::ErrorKind::ConnectionAborted
    )
}

/// One line: `36 35 98:0 /root /dir options [tags...] - type source superoptions`.
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&b| b == b' ');
    let mut next = || fields.next();
    let device = std::str::from_utf8(next().and(next()).and(next())?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let dir = next().and(next())?;
    let options = next()?;
    while next()? != b"-" {}
    let kind = next()?;
    let source = next()?;
    let super_options = next()?;
    let has_ro = |options: &[u8]| options.split(|&b| b == b',').any(|option| option == b"ro");
    Some(Mount {
        device: (major.parse().ok()?, minor.parse().ok()?),
        dir: unescape(dir),
        kind: String::from_utf8_lossy(kind).into_owned(),
        source: unescape(source),
        read_only: has_ro(options) || has_ro(super_options),
    })
}

/// The kernel writes space, tab, newline and backslash as a backslash and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|digits| {
            first == b'\\' && digits.iter().all(|digit| (b'0'..=b'7').contains(digit))
        });
        if let Some(digits) = octal {
            let value = digits
                .iter()
                .fold(0_u32, |value, digit| value * 8 + u32::from(digit - b'0'));
            out.push(u8::try_from(value).unwrap_or(b'?'));
            rest = &tail[3..];
        } else {
            out.push(first);
            rest = tail;
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

/// Which processes hold a lock on the file at `path`, as far as `/proc/locks` tells.
pub(super) fn lock_holders(path: &Path) -> Vec<u32> {
    use std::os::unix::fs::MetadataExt;
    let (Ok(metadata), Ok(locks)) = (fs::metadata(path), fs::read_to_string("/proc/locks")) else {
        return Vec::new();
    };
    let (major, minor) = device_numbers(metadata.dev());
    let wanted = format!("{major:02x}:{minor:02x}:{}", metadata.ino());
    let mut pids: Vec<u32> = locks
        .lines()
        // 1: FLOCK  ADVISORY  WRITE 2211 fe:00:12345 0 EOF
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let at = fields.iter().position(|field| *field == wanted)?;
            fields.get(at.checked_sub(1)?)?.parse().ok()
        })
        .collect();
    pids.sort_unstable();
    pids.dedup();
    pids
}

/// True if the process lives: one that has ended and waits for its parent does not.
pub(super) fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    // The state stands behind the name, which is in brackets and may hold anything.
    stat.is_ok_and(|stat| {
        let state = stat.rsplit(')').next().unwrap_or("").trim_start();
        !state.starts_with(['Z', 'X'])
    })
}

/// Major and minor number in a `dev_t` as glibc and musl encode it.
fn device_numbers(dev: u64) -> (u64, u64) {
    (
        ((dev >> 8) & 0xfff) | ((dev >> 32) & 0xffff_f000),
        (dev & 0xff) | ((dev >> 12) & 0xffff_ff00),
    )
}

/// Processes with something open below `dir`, as far as this user may see, with their names.
pub(super) fn users(mount: &Mount) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir("/proc") else {
        return found;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if uses(&entry.path(), mount) {
            let name = fs::read(entry.path().join("comm")).unwrap_or_default();
            let name = String::from_utf8_lossy(name.trim_ascii_end()).into_owned();
            found.push((pid, name));
        }
    }
    found
}

fn uses(process: &Path, mount: &Mount) -> bool {
    let inside =
        |link: PathBuf| fs::read_link(link).is_ok_and(|target| target.starts_with(&mount.dir));
    if inside(process.join("cwd")) || inside(process.join("root")) || inside(process.join("exe")) {
        return true;
    }
    let open_files = fs::read_dir(process.join("fd"));
    if open_files.is_ok_and(|files| files.flatten().any(|file| inside(file.path()))) {
        return true;
    }
    let device = format!("{:02x}:{:02x}", mount.device.0, mount.device.1);
    fs::read(process.join("maps")).is_ok_and(|maps| {
        maps.split(|&b| b == b'\n')
            .any(|line| line.split(|&b| b == b' ').nth(3) == Some(device.as_bytes()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_parsed() {
        let line = b"36 35 0:98 / /srv/a\\040b ro,noatime shared:1 master:2 - fuse.nodupe /p rw,x";
        let mount = parse(line).unwrap();
        assert_eq!(mount.device, (0, 98));
        assert_eq!(mount.dir, Path::new("/srv/a b"));
        assert_eq!(mount.source, Path::new("/p"));
        assert!(mount.is_ours() && mount.read_only);
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"36 35 0:98 / /srv rw"), None);
    }

    #[test]
    fn escapes_are_undone() {
        assert_eq!(unescape(b"a\\011b\\134"), Path::new("a\tb\\"));
        assert_eq!(unescape(b"a\\9"), Path::new("a\\9"));
    }

    #[test]
    fn the_root_directory_is_held() {
        assert!(holding(Path::new("/")).unwrap().is_some());
    }

    #[test]
    fn holders_of_a_lock_are_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(lock_holders(file.path()).is_empty());
        file.as_file().lock().unwrap();
        let holders = lock_holders(file.path());
        // Overlay filesystems show another device than the one below them.
        if holders.is_empty() {
            eprintln!(
                "no lock seen: /proc/locks does not show {}",
                file.path().display()
            );
        } else {
            assert_eq!(holders, [std::process::id()]);
        }
    }
}
