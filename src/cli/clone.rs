//! `nodupe clone`: clones a file or a directory, once or many times, all or none.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use nodupe::control::{self, CLONES_MAX};
use nodupe::engine::{FileKind, OpenOptions};
use nodupe::error::{Error, Kind};
use nodupe::sys::process;
use nodupe::units::Time;
use serde_json::json;

use super::access;
use super::client;
use super::failure::{Failure, Result};
use super::identity;
use super::mounts;
use super::output::{Output, clean, show};
use super::target::{self, LOOK_CACHE_SIZE};
use super::tree;

/// What stands for the number in the name of each clone.
const PLACE: &str = "{}";

const EXAMPLE: &str = "\
Examples:
  nodupe clone /srv/vms/gold.raw /srv/vms/vm-001.raw
  nodupe clone /srv/vms/gold.raw '/srv/vms/vm-{}.raw' --count 100
  nodupe clone --new-identity /srv/vms/gold.vdi /srv/vms/vm-001.vdi
  nodupe clone ./pool.nodupe:/gold.raw ./pool.nodupe:/vm-001.raw";

/// Clones a file or a whole directory: no data is copied, whatever its size.
///
/// All clones are made in one instant, or none. SRC and DST are paths in one mounted pool, or
/// POOL:/path if the pool is not mounted. If DST is a directory the clone is made in it.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Clone {
    /// What is cloned
    src: PathBuf,
    /// The clone; with --count a {} in its name stands for the number, from 1
    dst: PathBuf,
    /// Number of clones
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(CLONES_MAX)))]
    count: Option<u32>,
    /// Keep the owner of the source; without it the clone is yours
    #[arg(long)]
    preserve: bool,
    /// Give each clone new ids, for hypervisors that refuse two disks with one: VHD, VHDX, VMDK, VDI.
    /// Several clones are made one after another
    #[arg(long)]
    new_identity: bool,
    /// Device of the journal, if the pool is not mounted and its journal is not in it
    #[arg(long, value_name = "DEVICE")]
    journal: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Clone, output: Output) -> Result<()> {
    let place = if args.src.exists() {
        None
    } else {
        access::split_pool_path(&args.src)
    };
    let (names, took) = match place {
        Some(_) if args.new_identity => {
            return Err(Failure::usage("--new-identity works in a mounted pool")
                .hint("mount it first: nodupe mount POOL DIR"));
        }
        Some((pool, inner)) => unmounted(args, &pool, &inner)?,
        None => mounted(args)?,
    };
    let src = show(&args.src);
    if args.json {
        let clones: Vec<String> = names
            .iter()
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect();
        output.json(json!({
            "source": src,
            "clones": clones,
            "seconds": took.as_secs_f64(),
        }));
    } else {
        let count = match names.len() {
            1 => "1 clone".to_owned(),
            count => format!("{count} clones"),
        };
        let millis = took.as_secs_f64() * 1000.0;
        output.done(&format!("{count} of {src} in {millis:.1} ms"));
    }
    Ok(())
}

/// Names that were made, and the time it took.
type Made = (Vec<Vec<u8>>, Duration);

fn mounted(args: &Clone) -> Result<Made> {
    let src = &args.src;
    let resolved = look(src)?;
    let mount = mounts::holding(&resolved)?.filter(mounts::Mount::is_ours);
    let Some(mount) = mount else {
        let failure = Failure::new(format!("cannot clone {}", show(src)));
        return Err(match access::can_hold_pool(src) {
            _ if resolved.is_dir() => failure.why("it is not in a mounted pool"),
            true => failure
                .why("it is not in a mounted pool")
                .hint("mount the pool first, or copy the file into a mounted pool: cp"),
            false => failure.why("it is neither a file nor a directory"),
        });
    };
    let (dir, name) = destination(&args.dst, src)?;
    let dir = dir
        .canonicalize()
        .map_err(|error| no_directory(&dir).because(&error))?;
    if mounts::holding(&dir)?.is_none_or(|other| other.device != mount.device) {
        return Err(Failure::new(format!("cannot clone {}", show(src)))
            .why(format!("{} is not in the same pool", show(&args.dst)))
            .hint(format!("clone to a place below {}", show(&mount.dir))));
    }
    let names = expand(&name, args.count)?;
    let name = std::str::from_utf8(&name).map_err(|error| {
        Failure::new(format!("cannot clone to {}", show(&args.dst)))
            .because(&error)
            .hint("choose a name in UTF-8, or unmount the pool and clone by POOL:/path")
    })?;
    let start = Instant::now();
    if args.new_identity {
        with_new_identity(args, &resolved, &dir, &names)?;
        return Ok((names, start.elapsed()));
    }
    client::clone(&resolved, &dir, name, args.count, args.preserve)?
        .map_err(|error| failed(src, &args.dst, &error))?;
    Ok((names, start.elapsed()))
}

/// Makes clones with ids of their own, one after another.
fn with_new_identity(args: &Clone, source: &Path, dir: &Path, names: &[Vec<u8>]) -> Result<()> {
    let taken = |name: &&Vec<u8>| {
        let path = dir.join(OsStr::from_bytes(name));
        path.symlink_metadata().is_ok()
    };
    if let Some(name) = names.iter().find(taken) {
        let name = clean(&String::from_utf8_lossy(name));
        let error = Error::new(Kind::Exists, format!("there is {name} already"));
        return Err(failed(&args.src, &args.dst, &error));
    }
    for (made, name) in names.iter().enumerate() {
        let name = String::from_utf8_lossy(name);
        if let Err(error) = identity::clone(source, dir, &name, args.preserve) {
            let mut failure = failed(&args.src, &args.dst, &error);
            if made > 0 {
                // What is said of all or none is not true of these.
                failure.hints = vec![format!(
                    "the clones before {} were made: {made} of {}",
                    clean(&name),
                    names.len()
                )];
            }
            return Err(failure);
        }
    }
    Ok(())
}

/// The absolute path of a source, which must exist. Links are followed, as by cp.
fn look(src: &Path) -> Result<PathBuf> {
    src.canonicalize().map_err(|error| match error.kind() {
        _ if mounts::is_dead(&error) => target::dead(src),
        io::ErrorKind::NotFound => {
            Failure::new(format!("there is no {}", show(src))).because(&error)
        }
        _ => Failure::new(format!("cannot clone {}", show(src))).because(&error),
    })
}

/// The directory and the name of a clone. Names with a place for the number are in `dst` itself.
fn destination(dst: &Path, src: &Path) -> Result<(PathBuf, Vec<u8>)> {
    let into = dst.is_dir() || dst.as_os_str().as_bytes().ends_with(b"/");
    let name = if into {
        src.file_name()
    } else {
        dst.file_name()
    };
    let name = name.ok_or_else(|| Failure::usage(format!("{} has no name", show(dst))))?;
    let dir = match dst.parent() {
        _ if into => dst,
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => dst,
    };
    Ok((dir.to_path_buf(), name.as_bytes().to_vec()))
}

fn no_directory(dir: &Path) -> Failure {
    Failure::new(format!("there is no directory {}", show(dir)))
        .hint(format!("make it first: mkdir -p {}", show(dir)))
}

fn unmounted(args: &Clone, pool_path: &Path, inner: &[u8]) -> Result<Made> {
    let (dst_pool, dst) = access::split_pool_path(&args.dst).ok_or_else(|| {
        Failure::usage(format!("{} is not in a pool", show(&args.dst)))
            .hint(format!("write {}:/path", show(pool_path)))
    })?;
    let same = |a: &Path, b: &Path| Some(a.canonicalize().ok()? == b.canonicalize().ok()?);
    if same(pool_path, &dst_pool) != Some(true) {
        return Err(Failure::new(format!("cannot clone {}", show(&args.src)))
            .why(format!("{} is in another pool", show(&args.dst)))
            .hint("mount both pools and copy it: cp"));
    }
    let options = OpenOptions {
        read_only: false,
        cache_size: LOOK_CACHE_SIZE,
    };
    let pool = access::open_pool(pool_path, args.journal.as_deref(), &options)?;
    let source = tree::find(&pool, inner)?;
    let (dir, name) = match tree::find(&pool, &dst) {
        Ok(found) if found.kind == FileKind::Directory => {
            let (_, name) = tree::split(inner)
                .ok_or_else(|| Failure::new("cannot clone the root directory into the pool"))?;
            (found.ino, name)
        }
        _ if dst.ends_with(b"/") => return Err(no_directory(&args.dst)),
        _ => {
            let (dir, name) = tree::split(&dst)
                .ok_or_else(|| Failure::usage(format!("{} has no name", show(&args.dst))))?;
            (tree::find(&pool, dir)?.ino, name)
        }
    };
    let names = expand(name, args.count)?;
    let owner = (!args.preserve).then(process::effective_owner);
    let start = Instant::now();
    pool.clone_tree(source.ino, dir, &names, owner, Time::now())
        .map_err(|error| failed(&args.src, &args.dst, &error))?;
    let took = start.elapsed();
    pool.close().map_err(|error| {
        let name = show(pool_path);
        Failure::of_pool(format!("cannot close {name}"), &name, &error)
    })?;
    Ok((names, took))
}

/// What a refused clone means.
pub(super) fn failed(src: &Path, dst: &Path, error: &nodupe::error::Error) -> Failure {
    let failure = Failure::new(format!("cannot clone {} to {}", show(src), show(dst)));
    let failure = failure.because(error);
    match error.kind() {
        Kind::Exists => {
            failure.hint("nothing was made; remove what has the name, or choose another")
        }
        Kind::NoSpace => failure.hint("nothing was made; delete something first: nodupe df"),
        Kind::Denied | Kind::NotPermitted => failure.hint("try again as root, or as the owner"),
        _ => failure,
    }
}

/// The names of the clones: with a count the place in `name` is replaced by the number.
fn expand(name: &[u8], count: Option<u32>) -> Result<Vec<Vec<u8>>> {
    if count.is_none() {
        return Ok(vec![name.to_vec()]);
    }
    let shown = clean(&String::from_utf8_lossy(name));
    let hint = "write {} where the number goes, in quotes: 'vm-{}.raw'";
    let wrong = |why: &str| {
        Failure::usage(format!("--count does not go with the name {shown}"))
            .why(why)
            .hint(hint)
    };
    let name = std::str::from_utf8(name).map_err(|_| wrong("it is not UTF-8"))?;
    if !name.contains(PLACE) {
        return Err(wrong("there is no {} in the last name of DST"));
    }
    control::clone_names(name, count).map_err(|error| wrong(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_numbered_from_one() {
        assert_eq!(expand(b"a{}", None).unwrap(), [b"a{}"]);
        assert_eq!(
            expand(b"vm-{}.raw", Some(2)).unwrap(),
            [b"vm-1.raw", b"vm-2.raw"]
        );
        assert!(expand(b"vm", Some(2)).unwrap_err().usage);
    }

    #[test]
    fn a_directory_takes_the_name_of_the_source() {
        let dir = tempfile::tempdir().unwrap();
        let src = Path::new("/m/gold.raw");
        let (parent, name) = destination(dir.path(), src).unwrap();
        assert_eq!(
            (parent.as_path(), name.as_slice()),
            (dir.path(), &b"gold.raw"[..])
        );
        let (parent, name) = destination(Path::new("vm.raw"), src).unwrap();
        assert_eq!(
            (parent.as_path(), name.as_slice()),
            (Path::new("."), &b"vm.raw"[..])
        );
        let (parent, name) = destination(Path::new("/no/such/"), src).unwrap();
        assert_eq!(parent, Path::new("/no/such/"));
        assert_eq!(name, b"gold.raw");
    }
}
