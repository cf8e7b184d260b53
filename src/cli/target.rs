//! What an argument of `df` and `info` means: a pool, mounted or not, or a file in one.

use std::io;
use std::path::{Path, PathBuf};

use nodupe::engine::{FileUsage, Health, OpenOptions, Origin, Pool, PoolInfo, Usage};

use super::access;
use super::client;
use super::failure::{Failure, Result};
use super::mounts::{self, Mount};
use super::output::show;
use super::tree;
use super::warn::MARKS_DEFAULT;

/// Bound of the caches for a look into a pool that is not mounted.
pub(super) const LOOK_CACHE_SIZE: u64 = 64 * 1024 * 1024; // 64 MiB

/// How much of a pool is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// Its superblock: takes no lock on a pool that is not mounted.
    Identity,
    /// Also how full it is: opens a pool that is not mounted, to read.
    Usage,
}

/// What was found.
#[derive(Debug)]
pub(super) enum Facts {
    Pool(Box<PoolFacts>),
    File(Box<FileFacts>),
}

/// A pool.
#[derive(Debug)]
pub(super) struct PoolFacts {
    /// Its file or device.
    pub(super) pool: PathBuf,
    /// Where it is mounted.
    pub(super) mount: Option<PathBuf>,
    /// True if it is mounted read-only.
    pub(super) read_only: bool,
    /// The process that serves it.
    pub(super) pid: Option<u32>,
    /// What its superblock says.
    pub(super) info: PoolInfo,
    /// How full it is, if that was wanted.
    pub(super) usage: Option<Usage>,
    /// Why writes are refused, if they are.
    pub(super) poisoned: Option<String>,
    /// What happened since it was mounted.
    pub(super) health: Option<Health>,
    /// True if the host below a mounted pool has no space.
    pub(super) host_full: bool,
    /// Percent of use at which its daemon warns, ascending.
    pub(super) marks: Vec<u8>,
}

/// A file in a pool.
#[derive(Debug)]
pub(super) struct FileFacts {
    /// As the user named it.
    pub(super) path: PathBuf,
    pub(super) usage: FileUsage,
    /// Where it was cloned from.
    pub(super) origin: Option<Origin>,
}

/// Finds out what `path` names.
pub(super) fn facts(path: &Path, journal: Option<&Path>, want: Want) -> Result<Facts> {
    let resolved = match path.canonicalize() {
        Ok(resolved) => resolved,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return match access::split_pool_path(path) {
                Some((pool, inner)) => unmounted_file(path, &pool, &inner, journal),
                None => Err(Failure::new(format!("there is no {}", show(path))).because(&error)),
            };
        }
        Err(error) if mounts::is_dead(&error) => return Err(dead(path)),
        Err(error) => {
            return Err(Failure::new(format!("cannot look at {}", show(path))).because(&error));
        }
    };
    if let Some(mount) = mounts::holding(&resolved)?
        && mount.is_ours()
    {
        return if resolved.is_dir() {
            Ok(Facts::Pool(Box::new(mounted(&mount)?)))
        } else {
            mounted_file(path, &resolved)
        };
    }
    if resolved.is_dir() {
        return Err(
            Failure::new(format!("{} is not in a mounted pool", show(path)))
                .hint("name a pool, the directory it is mounted on, or a file in that"),
        );
    }
    if let Some(mount) = mounts::of_pool(&resolved)? {
        return Ok(Facts::Pool(Box::new(mounted(&mount)?)));
    }
    unmounted(path, journal, want).map(|facts| Facts::Pool(Box::new(facts)))
}

/// The facts of a mounted pool.
pub(super) fn mounted(mount: &Mount) -> Result<PoolFacts> {
    let daemon = client::daemon(&mount.dir)?;
    Ok(PoolFacts {
        info: access::inspect_path(Path::new(&daemon.pool))?,
        pool: daemon.pool.into(),
        mount: Some(mount.dir.clone()),
        read_only: mount.read_only,
        pid: Some(daemon.pid),
        usage: Some(daemon.usage),
        host_full: daemon.host_full,
        marks: daemon.marks,
        poisoned: daemon.poisoned,
        health: Some(daemon.health),
    })
}

fn mounted_file(path: &Path, resolved: &Path) -> Result<Facts> {
    Ok(Facts::File(Box::new(FileFacts {
        path: path.to_path_buf(),
        usage: client::file_usage(resolved)?,
        origin: None, // the control channel does not tell
    })))
}

fn unmounted(path: &Path, journal: Option<&Path>, want: Want) -> Result<PoolFacts> {
    let mut facts = PoolFacts {
        pool: path.to_path_buf(),
        mount: None,
        read_only: false,
        pid: None,
        info: access::inspect_path(path)?,
        usage: None,
        poisoned: None,
        health: None,
        host_full: false,
        marks: MARKS_DEFAULT.to_vec(),
    };
    if want == Want::Usage {
        let pool = open_to_look(path, journal)?;
        facts.usage = Some(pool.usage());
        facts.poisoned = pool.poisoned();
        close(&pool, path)?;
    }
    Ok(facts)
}

fn unmounted_file(
    path: &Path,
    pool_path: &Path,
    inner: &[u8],
    journal: Option<&Path>,
) -> Result<Facts> {
    let pool = open_to_look(pool_path, journal)?;
    let ino = tree::find(&pool, inner)?.ino;
    let failed = |error| {
        Failure::of_pool(
            format!("cannot look at {}", show(path)),
            &show(pool_path),
            &error,
        )
    };
    let usage = pool.file_usage(ino).map_err(failed)?;
    let origin = pool.origin(ino).map_err(failed)?;
    close(&pool, pool_path)?;
    Ok(Facts::File(Box::new(FileFacts {
        path: path.to_path_buf(),
        usage,
        origin,
    })))
}

fn open_to_look(path: &Path, journal: Option<&Path>) -> Result<std::sync::Arc<Pool>> {
    let options = OpenOptions {
        read_only: true,
        cache_size: LOOK_CACHE_SIZE,
    };
    access::open_pool(path, journal, &options)
}

fn close(pool: &Pool, path: &Path) -> Result<()> {
    let name = show(path);
    pool.close()
        .map_err(|error| Failure::of_pool(format!("cannot close {name}"), &name, &error))
}

/// A path in a mount whose daemon has gone.
pub(super) fn dead(path: &Path) -> Failure {
    Failure::new(format!("nobody serves {}", show(path)))
        .why("the nodupe process of this mount has ended")
        .hint("clear it: nodupe umount DIR; then mount the pool again, nothing synced is lost")
}
