//! How a verb gets at a pool that is not mounted: devices, checks in order, errors that help.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nodupe::device::{BlockDevice, FileDevice, OpenMode};
use nodupe::engine::{BEAT_INTERVAL, Heartbeat, Identity, OpenOptions, Pool, PoolInfo};
use nodupe::error::{Error, Kind};

use super::failure::{Failure, Result};
use super::mounts;
use super::output::show;
use super::size;

/// The devices of a pool, locked as the mode asks.
#[derive(Debug)]
pub(super) struct Devices {
    /// The pool.
    pub(super) pool: Arc<dyn BlockDevice>,
    /// Its journal, if that is on a device of its own and was named.
    pub(super) journal: Option<Arc<dyn BlockDevice>>,
}

/// Opens the devices of a pool and looks at its superblock.
pub(super) fn open_devices(path: &Path, journal: Option<&Path>, mode: OpenMode) -> Result<Devices> {
    let name = show(path);
    let pool = open_device(path, mode)?;
    let info = inspect(path, &pool)?;
    if mode != OpenMode::Inspect && info.size > pool.len() {
        let (size, len) = (size::human(info.size), size::human(pool.len()));
        return Err(Failure::new(format!("cannot use {name}"))
            .why(format!(
                "it is truncated: it has {len} of the {size} of its pool"
            ))
            .hint("restore it from a backup; nothing was changed"));
    }
    if mode != OpenMode::Inspect {
        refuse_active(path, &pool, &info)?;
    }
    let journal = match (journal, info.journal_external, mode) {
        (Some(journal), true, _) => Some(open_device(journal, mode)?),
        (Some(_), false, _) => {
            return Err(
                Failure::new(format!("the journal of {name} is in the pool"))
                    .hint("leave --journal out"),
            );
        }
        (None, true, OpenMode::Inspect) | (None, false, _) => None,
        (None, true, _) => {
            return Err(
                Failure::new(format!("the journal of {name} is on another device"))
                    .hint("say which: --journal DEVICE"),
            );
        }
    };
    Ok(Devices {
        pool: Arc::new(pool),
        journal: journal.map(|journal| Arc::new(journal) as Arc<dyn BlockDevice>),
    })
}

/// Opens a pool to work on it in this process.
pub(super) fn open_pool(
    path: &Path,
    journal: Option<&Path>,
    options: &OpenOptions,
) -> Result<Arc<Pool>> {
    let mode = if options.read_only {
        OpenMode::ReadOnly
    } else {
        OpenMode::ReadWrite
    };
    let devices = open_devices(path, journal, mode)?;
    let name = show(path);
    let failed =
        |error: Error| Failure::of_pool(format!("cannot open the pool {name}"), &name, &error);
    if options.read_only {
        return Pool::open(devices.pool, devices.journal, options).map_err(failed);
    }
    let (heartbeat, devices) = claim(path, devices)?;
    let pool = Pool::open(devices.pool, devices.journal, options).map_err(failed)?;
    pool.keep_heartbeat(heartbeat);
    Ok(pool)
}

/// Marks a pool as in use for writing. The devices it returns are written only while it is ours;
/// who is done with them releases the heartbeat.
pub(super) fn claim(path: &Path, devices: Devices) -> Result<(Arc<Heartbeat>, Devices)> {
    let name = show(path);
    let failed =
        |error: Error| Failure::of_pool(format!("cannot open the pool {name}"), &name, &error);
    let uuid = Pool::inspect(&*devices.pool).map_err(failed)?.uuid;
    // A lock on a block device is known to this host alone.
    let shared = fs::metadata(path).is_ok_and(|about| about.file_type().is_block_device());
    let heartbeat = Heartbeat::claim(&devices.pool, uuid, &identity()?, BEAT_INTERVAL, shared)
        .map_err(failed)?;
    let guarded = Devices {
        pool: heartbeat.guard(devices.pool),
        journal: devices.journal.map(|journal| heartbeat.guard(journal)),
    };
    Ok((heartbeat, guarded))
}

/// Who opens a pool here.
fn identity() -> Result<Identity> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let boot: String = read("/proc/sys/kernel/random/boot_id")
        .chars()
        .filter(char::is_ascii_hexdigit)
        .collect();
    let owner = nodupe::sys::control::random()
        .map_err(|error| Failure::new("no random numbers from the system").because(&error))?;
    Ok(Identity {
        owner,
        // Without /proc every system is another one: then a dead owner costs some seconds.
        boot: u128::from_str_radix(&boot, 16).map_or(owner, u128::to_be_bytes),
        pid: std::process::id(),
        host: read("/proc/sys/kernel/hostname").trim().to_owned(),
        is_alive: mounts::is_alive,
        clock: nodupe::sys::process::uptime,
    })
}

/// Refuses a pool that another host has open.
fn refuse_active(path: &Path, pool: &FileDevice, info: &PoolInfo) -> Result<()> {
    let name = show(path);
    nodupe::engine::refuse_active(pool, info.uuid, &identity()?)
        .map_err(|error| Failure::of_pool(format!("cannot use {name}"), &name, &error))
}

/// The superblock of a pool, which may be mounted meanwhile.
pub(super) fn inspect_path(path: &Path) -> Result<PoolInfo> {
    inspect(path, &open_device(path, OpenMode::Inspect)?)
}

fn inspect(path: &Path, device: &FileDevice) -> Result<PoolInfo> {
    let name = show(path);
    let what = format!("cannot use {name}");
    let probed = Pool::probe(device).map_err(|error| Failure::of_pool(&what, &name, &error))?;
    // Where the device is larger than its pool, only a search finds the copies.
    if !probed && Pool::inspect(device).is_err() {
        return Err(Failure::new(what)
            .why("it is not a nodupe pool")
            .hint("look for the right path, or make a pool: nodupe create POOL"));
    }
    Pool::inspect(device).map_err(|error| Failure::of_pool(&what, &name, &error))
}

fn open_device(path: &Path, mode: OpenMode) -> Result<FileDevice> {
    let name = show(path);
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Failure::new(format!("there is no pool {name}"))
                .because(&error)
                .hint(format!("make it: nodupe create {name}")));
        }
        Ok(metadata) if metadata.is_dir() => {
            return Err(
                Failure::new(format!("cannot use {name}")).why("it is a directory, not a pool")
            );
        }
        _ => {}
    }
    FileDevice::open(path, mode).map_err(|error| match error.kind() {
        Kind::Busy => in_use(path, &error),
        _ => Failure::of_pool(format!("cannot open {name}"), &name, &error),
    })
}

/// The pool is locked: by whom, and where it is mounted, if that can be found out.
pub(super) fn in_use(path: &Path, error: &Error) -> Failure {
    let name = show(path);
    let mount = mounts::of_pool(path).ok().flatten();
    let pids = mounts::lock_holders(path);
    let mut what = format!("the pool {name} is in use");
    if !pids.is_empty() {
        let list: Vec<String> = pids.iter().map(u32::to_string).collect();
        what.push_str(&format!(" by process {}", list.join(", ")));
    }
    match mount {
        Some(mount) => {
            let dir = show(&mount.dir);
            Failure::new(format!("{what}, mounted on {dir}")).hint(format!(
                "use {dir}, or unmount it first: nodupe umount {dir}"
            ))
        }
        None if pids.is_empty() => Failure::of_pool(what, &name, error),
        None => Failure::new(what).hint("wait for that process to end, or end it"),
    }
}

/// True for what a pool can be on: a file or a block device.
pub(super) fn can_hold_pool(path: &Path) -> bool {
    fs::metadata(path)
        .is_ok_and(|metadata| metadata.is_file() || metadata.file_type().is_block_device())
}

/// Splits `POOL:/path`, where POOL is a file or block device, into its two halves.
pub(super) fn split_pool_path(text: &Path) -> Option<(PathBuf, Vec<u8>)> {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let bytes = text.as_os_str().as_bytes();
    bytes.windows(2).enumerate().find_map(|(at, pair)| {
        let pool = Path::new(OsStr::from_bytes(&bytes[..at]));
        (pair == b":/" && can_hold_pool(pool))
            .then(|| (pool.to_path_buf(), bytes[at + 1..].to_vec()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pool_paths_are_split_where_the_pool_ends() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a:b");
        fs::write(&file, b"").unwrap();
        let text = PathBuf::from(format!("{}:/x:/y", file.display()));
        let (found, inner) = split_pool_path(&text).unwrap();
        assert_eq!((found, inner.as_slice()), (file, &b"/x:/y"[..]));
        assert!(split_pool_path(Path::new("/no/such:/x")).is_none());
        let dir_as_pool = PathBuf::from(format!("{}:/x", dir.path().display()));
        assert!(split_pool_path(&dir_as_pool).is_none());
    }
}
