//! `nodupe grow`: makes a pool larger, mounted or not.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use clap::Args;
use nodupe::device::{BlockDevice, FileDevice, OpenMode};
use nodupe::engine::OpenOptions;
use serde_json::json;

use super::access;
use super::client;
use super::failure::{Failure, Result};
use super::mounts::{self, Mount};
use super::output::{Output, show};
use super::size::{self, Growth};
use super::target;

const EXAMPLE: &str = "\
A file is extended; it stays sparse, unless the pool was made with --preallocate. A block device
must have been made larger before (lvextend...); without SIZE the pool takes all of it.
A pool never shrinks.

Examples:
  nodupe grow /srv/vms +100G
  nodupe grow ./pool.nodupe 1T
  lvextend -L +100G vg/vms && nodupe grow /dev/vg/vms";

/// Makes a pool larger, while it is used.
///
/// The new space can be used at once; whoever was told that the pool is full goes on.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Grow {
    /// Pool, or the directory it is mounted on
    #[arg(value_name = "POOL|DIR")]
    target: PathBuf,
    /// New size, or +SIZE to add; a block device is taken whole unless told otherwise
    #[arg(value_name = "[+]SIZE", value_parser = size::parse_growth)]
    size: Option<Growth>,
    /// Device of the journal, for a pool that is not mounted and whose journal is not in it
    #[arg(long, value_name = "DEVICE")]
    journal: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Grow, output: Output) -> Result<()> {
    let mount = find_mount(&args.target)?;
    let pool = match &mount {
        Some(mount) => PathBuf::from(client::daemon(&mount.dir)?.pool),
        None => args.target.clone(),
    };
    let name = show(&pool);
    let before = access::inspect_path(&pool)?.size;
    let wanted = wanted(&pool, before, args.size)?;
    let warning = wanted.and_then(|size| host_is_short(&pool, size));
    let what = format!("cannot grow the pool {name}");
    let size = match &mount {
        Some(mount) => client::grow(&mount.dir, wanted)?
            .map_err(|error| Failure::of_pool(what, &name, &error))?,
        None => {
            let options = OpenOptions {
                read_only: false,
                cache_size: target::LOOK_CACHE_SIZE,
            };
            let opened = access::open_pool(&pool, args.journal.as_deref(), &options)?;
            let grown = opened.grow(wanted);
            let closed = opened.close();
            let failed = |error| Failure::of_pool(&what, &name, &error);
            let size = grown.map_err(failed)?;
            closed.map_err(failed)?;
            size
        }
    };
    if args.json {
        output.json(json!({
            "pool": name,
            "mount": mount.as_ref().map(|mount| show(&mount.dir)),
            "before": before,
            "size": size,
            "warning": warning,
        }));
    } else if size == before {
        output.done(&format!("{name} has {} already", size::human(size)));
    } else {
        let (old, new) = (size::human(before), size::human(size));
        output.done(&format!("{name} has grown from {old} to {new}"));
    }
    if let Some(warning) = warning {
        output.note(&warning);
    }
    Ok(())
}

/// Where the pool is mounted that the user means; `None` if it is not.
fn find_mount(path: &Path) -> Result<Option<Mount>> {
    let failed = |error: std::io::Error| match mounts::is_dead(&error) {
        true => target::dead(path),
        false => Failure::new(format!("cannot look at {}", show(path))).because(&error),
    };
    let resolved = match path.canonicalize() {
        // Opening it tells what to do.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        resolved => resolved.map_err(failed)?,
    };
    match mounts::holding(&resolved)? {
        Some(mount) if mount.is_ours() => Ok(Some(mount)),
        _ => mounts::of_pool(&resolved),
    }
}

/// The size to grow to; `None`: that of the block device.
fn wanted(pool: &Path, before: u64, asked: Option<Growth>) -> Result<Option<u64>> {
    let name = show(pool);
    let size = match asked {
        Some(Growth::To(size)) => size,
        Some(Growth::By(more)) => before.saturating_add(more),
        None => {
            let is_device = fs::metadata(pool).is_ok_and(|file| file.file_type().is_block_device());
            return if is_device {
                Ok(None)
            } else {
                Err(Failure::usage("the new size is missing")
                    .hint(format!("add it: nodupe grow {name} +100G")))
            };
        }
    };
    let what = format!("cannot grow the pool {name} to {}", size::human(size));
    if size > size::POOL_SIZE_MAX {
        return Err(Failure::new(what).why("a pool has at most 1 PiB"));
    }
    if size < before {
        return Err(Failure::new(what)
            .why(format!(
                "it has {}, and a pool does not shrink",
                size::human(before)
            ))
            .hint("to make it smaller: create another one, and copy the files"));
    }
    Ok(Some(size))
}

/// A warning if the host could not hold all of a sparse pool of `size` bytes.
fn host_is_short(pool: &Path, size: u64) -> Option<String> {
    let metadata = fs::metadata(pool).ok().filter(|file| file.is_file())?;
    let device = FileDevice::open(pool, OpenMode::Inspect).ok()?;
    let free = device.host_free().ok()??;
    let missing = size
        .saturating_sub(metadata.blocks() * 512) // st_blocks counts 512 bytes everywhere
        .saturating_sub(free);
    (missing > 0).then(|| {
        format!(
            "the filesystem that holds {} has {} free: it could not hold the whole pool, {} are \
             missing",
            show(pool),
            size::human(free),
            size::human(missing)
        )
    })
}
