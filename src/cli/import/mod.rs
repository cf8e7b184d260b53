//! `nodupe import`: images of other products become files of the pool, and children clones of
//! their parents.
//!
//! 1. Sources are opened to read only, and only below what the user named.
//! 2. A file of the pool gets its name when it is complete; what was begun has none, and is gone
//!    with the process.
//! 3. What cannot be imported is told by name, and the rest is imported.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use nodupe::formats::Format;
use nodupe::transfer::{Image, Library, Twins, destinations};

use super::access;
use super::blocks::Tree;
use super::failure::{Failure, Result};
use super::mounts;
use super::output::{self, Output, show};

mod known;
mod make;
mod report;

use make::Maker;

const EXAMPLE: &str = "\
Examples:
  nodupe import gold.vmdk /srv/vms/gold.raw
  nodupe import /mnt/library /srv/vms/library --format raw
  nodupe import appliance.ova /srv/vms/ --format qcow2
  nodupe import --from raw guest.img /srv/vms/guest.raw";

/// Imports disk images of other products: VHD, VHDX, VMDK, qcow2, VDI, OVA, raw.
///
/// Of a directory all images are imported, with its subdirectories. Who is whose parent is found
/// out, and a child becomes a clone of its parent plus its differences, so that no chain is left.
/// What cannot be imported is told by name; the rest is imported.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Import {
    /// Images, and directories of images
    #[arg(required = true)]
    src: Vec<PathBuf>,
    /// A file or directory in a mounted pool
    dst: PathBuf,
    /// What is made: raw, vhd, vhdx, vmdk, qcow2, vdi. Without it the name of DST decides, and
    /// in a directory the format is kept
    #[arg(long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,
    /// What the sources are, without looking at their contents
    #[arg(long, value_name = "FORMAT", value_parser = parse_format)]
    from: Option<Format>,
    /// Directory in which parents and extents may be, too
    #[arg(long, value_name = "DIR")]
    allow_parent: Vec<PathBuf>,
    /// Share blocks that are equal in several of the images or in the pool, though none was made
    /// from another
    #[arg(long)]
    dedupe: bool,
    /// Images that are imported at once
    #[arg(short, long, value_name = "N", default_value_t = 2,
          value_parser = clap::value_parser!(u8).range(1..=64))]
    jobs: u8,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn parse_format(name: &str) -> std::result::Result<Format, String> {
    let names = || Format::ALL.map(Format::name).join(", ");
    let found = Format::ALL.into_iter().find(|format| format.name() == name);
    found.ok_or_else(|| format!("there is no such format; choose one of {}", names()))
}

pub(super) fn run(args: &Import, output: Output) -> Result<()> {
    let begun = Instant::now();
    let into = is_directory(args);
    let (dir, name) = destination(args, into)?;
    let format = match (&name, args.format) {
        (_, Some(format)) => Some(format),
        (Some(name), None) => Some(by_name(name)?),
        (None, None) => None,
    };
    let mut failures = Vec::new();
    let library = read(args, &mut failures)?;
    let extension = |image: &Image| format.unwrap_or(image.facts.format).name();
    let mut names = destinations(&library, &extension);
    if let Some(name) = name {
        rename_one(args, &library, &mut names, name)?;
    }
    if names.is_empty() && failures.is_empty() {
        failures.push(
            Failure::new("nothing was imported")
                .why("there is no disk image in what was named")
                .hint("files that look like nothing are raw disks if you say so: --from raw FILE"),
        );
    }
    let twins = match args.dedupe {
        true => Some(twins(&dir, output)?),
        false => None,
    };
    let jobs = usize::from(args.jobs);
    let maker = Maker::new(&library, &dir, names, format, jobs, twins);
    let made = maker.run(output)?;
    let total = made.total() + failures.len();
    for index in made.files.keys() {
        for note in &library.images()[*index].facts.notes {
            output.note(&format!(
                "{}: {}",
                show(&library.path(*index)),
                output::clean(note)
            ));
        }
    }
    for (path, error) in &made.failed {
        failures.push(Failure::new(format!("cannot import {}", show(path))).because(error));
    }
    let report = report::Report {
        library: &library,
        made: &made,
        seconds: begun.elapsed().as_secs_f64(),
    };
    report.print(args.json, &failures, output)?;
    let failed = failures.len();
    failures.iter().for_each(output::failure);
    match failed {
        0 => Ok(()),
        1 if total == 1 => Err(Failure::silent(super::FAILED)),
        _ => Err(Failure::new(format!(
            "{failed} of {total} images were not imported"
        ))),
    }
}

/// Where to look for equal blocks: in all of the pool that holds `dir`.
fn twins(dir: &Path, output: Output) -> Result<Twins<'_>> {
    let failed =
        |error| Failure::new(format!("cannot look at the pool of {}", show(dir))).because(&error);
    let root = mounts::holding(dir)?.map_or_else(|| dir.to_path_buf(), |mount| mount.dir);
    let tree = Arc::new(Tree::new(&root).map_err(failed)?);
    let opens = tree.clone();
    let twins = Twins::new(Box::new(move |path| known::clone(dir, &opens, path)));
    known::learn(&root, &tree, &twins, output);
    Ok(twins)
}

/// Looks at all that the user named.
fn read(args: &Import, failures: &mut Vec<Failure>) -> Result<Library> {
    let mut library = Library::new();
    for dir in &args.allow_parent {
        library
            .allow(dir)
            .map_err(|error| Failure::new("cannot look for parents").because(&error))?;
    }
    let dirs = args.src.iter().filter(|src| src.is_dir()).count();
    for src in &args.src {
        let failed = |error| Failure::new(format!("cannot import {}", show(src))).because(&error);
        let outcome = if src.is_dir() {
            if args.from.is_some() {
                return Err(Failure::usage("--from is for files")
                    .hint("name the images of this format one by one"));
            }
            let under = match src.file_name() {
                Some(name) if dirs > 1 => Path::new(name),
                _ => Path::new(""),
            };
            library.add_tree(src, under)
        } else {
            library.add_file(src, args.from)
        };
        if let Err(error) = outcome {
            failures.push(failed(error));
        }
    }
    library.resolve();
    for trouble in library.troubles() {
        let what = format!("cannot import {}", show(&trouble.path));
        failures.push(Failure::new(what).because(&trouble.error));
    }
    Ok(library)
}

/// True if the destination is a directory, or will be one.
fn is_directory(args: &Import) -> bool {
    use std::os::unix::ffi::OsStrExt;
    args.src.len() > 1
        || args.src.iter().any(|src| src.is_dir())
        || args.dst.is_dir()
        || args.dst.as_os_str().as_bytes().ends_with(b"/")
}

/// The directory that is imported into, in a mounted pool, and the name of the one file to make.
fn destination(args: &Import, into: bool) -> Result<(PathBuf, Option<PathBuf>)> {
    let dst = &args.dst;
    let (dir, name) = match (into, dst.file_name(), dst.parent()) {
        (false, Some(name), Some(parent)) if parent.as_os_str().is_empty() => {
            (Path::new("."), Some(PathBuf::from(name)))
        }
        (false, Some(name), Some(parent)) => (parent, Some(PathBuf::from(name))),
        _ => (dst.as_path(), None),
    };
    // The part of the path that is there already decides where it is.
    let mut there = dir;
    while !there.exists() {
        there = match there.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
    }
    let whole = there
        .canonicalize()
        .map_err(|error| Failure::new(format!("cannot import to {}", show(dst))).because(&error))?;
    if !mounts::holding(&whole)?.is_some_and(|mount| mount.is_ours()) {
        let failure = Failure::new(format!("cannot import to {}", show(dst)));
        return Err(match access::can_hold_pool(dst) && dst.is_file() {
            true => failure
                .why("it is a file, not a place in a mounted pool")
                .hint("mount the pool first, and name a place below the mount: nodupe mount"),
            false => failure
                .why("it is not in a mounted pool")
                .hint("mount a pool first: nodupe mount POOL DIR"),
        });
    }
    if name.is_some() && !dir.exists() {
        return Err(Failure::new(format!("there is no directory {}", show(dir)))
            .hint(format!("make it first: mkdir -p {}", show(dir))));
    }
    std::fs::create_dir_all(dir)
        .and_then(|()| dir.canonicalize())
        .map(|dir| (dir, name))
        .map_err(|error| {
            Failure::new(format!("cannot make the directory {}", show(dir))).because(&error)
        })
}

/// The format that the name of a destination asks for.
fn by_name(name: &Path) -> Result<Format> {
    let extension = name.extension().map(|e| e.to_string_lossy().into_owned());
    let found = extension.as_deref().and_then(Format::named);
    found.ok_or_else(|| {
        Failure::usage(format!("the name {} does not say a format", show(name)))
            .hint("say it: --format raw, or end the name in .raw, .vhd, .vhdx, .vmdk, .qcow2, .vdi")
    })
}

/// Gives the one image that was named the name that was asked for.
fn rename_one(
    args: &Import,
    library: &Library,
    names: &mut HashMap<usize, PathBuf>,
    name: PathBuf,
) -> Result<()> {
    let is_extra = |index: &usize| {
        matches!(
            library.images()[*index].what,
            nodupe::transfer::What::Snapshot(..)
        )
    };
    let disks: Vec<usize> = names.keys().copied().filter(|i| !is_extra(i)).collect();
    match disks[..] {
        [] => Ok(()),
        [one] => {
            names.insert(one, name);
            Ok(())
        }
        _ => Err(Failure::usage(format!(
            "{} has several disks, and {} is one name",
            show(&args.src[0]),
            show(&args.dst)
        ))
        .hint(format!("name a directory: {}/", show(&args.dst)))),
    }
}
