//! `nodupe convert`: another format of an image in a pool, with the blocks of the one that is there.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use clap::Args;
use nodupe::error::{Error, Kind};
use nodupe::formats::Format;
use nodupe::formats::layout::{Held, Ids, Plan, Shape, Spec};
use serde_json::json;

use super::failure::{Failure, Result};
use super::image::{self, Image};
use super::output::{Output, clean, show};
use super::sharing::{Counts, Sharing};
use super::size;
use super::unnamed;

const EXAMPLE: &str = "\
Examples:
  nodupe convert /srv/vms/gold.raw /srv/vms/gold.vhdx
  nodupe convert /srv/vms/gold.vhdx /srv/vms/gold.vhd --subformat dynamic
  nodupe convert /srv/vms/disk.qcow2 /srv/vms/disk.raw --json

Subformats, the first is the default: vhd fixed, dynamic; vhdx dynamic, fixed; vdi dynamic, fixed;
vmdk monolithicFlat, monolithicSparse.";

/// Makes an image of another format in a mounted pool, without copying its data.
///
/// SRC and DST are paths in one mounted pool. Both share their blocks; what does not begin at a
/// multiple of 4 KiB in SRC is copied. SRC stays as it is. DST gets new ids.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Convert {
    /// The image; parents are found by name and id below its directory
    src: PathBuf,
    /// The image to make
    dst: PathBuf,
    /// Format of DST: raw, vhd, vhdx, vmdk, qcow2, vdi [default: by the name of DST]
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// Kind of image of that format
    #[arg(long, value_name = "KIND")]
    subformat: Option<String>,
    /// Format of SRC, instead of looking at it
    #[arg(long, value_name = "FORMAT")]
    from: Option<String>,
    /// Directory in which parents and extents may be, too
    #[arg(long, value_name = "DIR")]
    allow_parent: Vec<PathBuf>,
    /// Keep the UUID or content id of SRC
    #[arg(long)]
    keep_identity: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Convert, output: Output) -> Result<()> {
    let begun = Instant::now();
    let failed = |error: &Error| {
        let what = format!("cannot convert {} to {}", show(&args.src), show(&args.dst));
        let failure = Failure::new(what).because(error);
        match error.kind() {
            Kind::Exists => failure.hint("remove it first, or choose another name"),
            Kind::NoSpace => failure.hint("nothing was made; delete something first: nodupe df"),
            _ => failure,
        }
    };
    let shape = shape(args.format.as_deref(), args.subformat.as_deref(), &args.dst)?;
    let from = named(args.from.as_deref())?;
    let image = Image::open(&args.src, from, &args.allow_parent)
        .map_err(|error| hint_parents(failed(&error), error.kind(), &args.src))?;
    let dir = parent_of(&args.dst)?;
    let device = fs::metadata(&dir)
        .map_err(|error| Failure::new(format!("cannot use {}", show(&dir))).because(&error))?
        .dev();
    if image
        .files
        .iter()
        .any(|file| !file.is_pooled() || file.device != device)
    {
        let what = format!("cannot convert {} to {}", show(&args.src), show(&args.dst));
        return Err(Failure::new(what)
            .why("both must be in one mounted pool")
            .hint("from elsewhere into a pool: nodupe import; out of a pool: nodupe export"));
    }
    let holes = |source: &_, range| image.data(source, range);
    let held = Held {
        chain: &image.chain,
        holes: &holes,
    };
    let spec =
        spec(&image, shape, &args.dst, args.keep_identity).map_err(|error| failed(&error))?;
    let plan = Plan::new(&spec, &held).map_err(|error| failed(&error))?;
    let counts = make(&dir, &args.dst, &plan, |planned, dst, counts| {
        let mut sink = Sharing::new(&image, &held, dst, device, counts);
        planned.emit(plan.size, &mut sink)?;
        sink.finish()
    })
    .map_err(|error| failed(&error))?;
    let advice = advice(&image, &spec);
    advice.iter().for_each(|note| output.note(note));
    if args.json {
        output.json(json!({
            "source": show(&args.src),
            "destination": show(&args.dst),
            "format": shape.format().name(),
            "size": plan.size,
            "shared_bytes": counts.shared,
            "copied_bytes": counts.copied,
            "table_bytes": counts.tables,
            "advice": advice,
            "seconds": begun.elapsed().as_secs_f64(),
        }));
    } else {
        output.done(&format!(
            "{}: {} shared, {} copied",
            show(&args.dst),
            size::human(counts.shared),
            size::human(counts.copied),
        ));
    }
    Ok(())
}

/// Says what helps if an image could not be opened because a parent is not found.
pub(super) fn hint_parents(failure: Failure, kind: Kind, src: &Path) -> Failure {
    match kind {
        Kind::NotFound | Kind::Denied if src.exists() => {
            failure.hint("say in which directories parents are: --allow-parent DIR")
        }
        _ => failure,
    }
}

/// The shape that is asked for.
pub(super) fn shape(format: Option<&str>, subformat: Option<&str>, dst: &Path) -> Result<Shape> {
    let format = match named(format)? {
        Some(format) => format,
        None => image::by_name(dst).ok_or_else(|| {
            Failure::usage(format!("the name {} tells no format", show(dst)))
                .hint("name it: --format raw|vhd|vhdx|vmdk|qcow2|vdi")
        })?,
    };
    Shape::of(format, subformat).map_err(|error| Failure::usage(error.to_string()))
}

/// A format that the user names.
pub(super) fn named(name: Option<&str>) -> Result<Option<Format>> {
    name.map(image::named)
        .transpose()
        .map_err(|error| Failure::usage(clean(&error.to_string())))
}

/// The directory that a file is to be made in.
pub(super) fn parent_of(path: &Path) -> Result<PathBuf> {
    if path.file_name().is_none() {
        return Err(Failure::usage(format!("{} has no name", show(path))));
    }
    Ok(match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_path_buf(),
        _ => PathBuf::from("."),
    })
}

/// What is to be made of an image.
pub(super) fn spec(
    image: &Image,
    shape: Shape,
    dst: &Path,
    keep: bool,
) -> nodupe::error::Result<Spec> {
    let facts = image.chain.layers()[0].facts();
    let ids = Ids::random()?;
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH);
    let name = dst.file_name().unwrap_or_default();
    Ok(Spec {
        shape,
        size: facts.size,
        sector: facts.sector,
        ids: if keep {
            ids.keeping(facts.identity)
        } else {
            ids
        },
        seconds: seconds.map_or(0, |since| since.as_secs()),
        name: name.to_string_lossy().into_owned(),
        parent: None,
    })
}

/// What the owner of the new image should know.
pub(super) fn advice(image: &Image, spec: &Spec) -> Vec<String> {
    let layers = image.chain.layers();
    let facts = layers[0].facts();
    let mut notes = Vec::new();
    for (i, layer) in layers.iter().enumerate() {
        let whose = match i {
            0 => "the image".to_owned(),
            i => format!("its parent, number {i}"),
        };
        // Names from the image may be in it.
        let odd = layer.facts().notes.iter().map(|note| clean(note));
        notes.extend(odd.map(|note| format!("{whose}: {note}")));
    }
    if spec.shape == Shape::VhdFixed && !spec.size.is_multiple_of(1 << 20) {
        notes.push("Azure takes only disks of whole MiB: grow the disk first".to_owned());
    }
    if facts.sector == 4096 && spec.shape.format() != Format::Vhdx {
        notes.push(format!(
            "the disk has sectors of 4096 bytes, which {} cannot say: a guest that relies on it \
             needs them set by its virtual machine",
            spec.shape.format()
        ));
    }
    notes
}

type Written = nodupe::error::Result<Counts>;

/// Makes the files of a plan in `dir`, writes each by `write`, and gives them their names when all
/// are complete, the one that was asked for last. Whatever goes wrong, nothing is left.
pub(super) fn make(
    dir: &Path,
    dst: &Path,
    plan: &Plan,
    mut write: impl FnMut(&nodupe::formats::layout::PlannedFile, &File, Counts) -> Written,
) -> Written {
    unnamed::clean(dir);
    let name_of = |planned: &nodupe::formats::layout::PlannedFile| {
        let name = match &planned.name {
            Some(name) => Some(name.as_str()),
            None => dst.file_name().and_then(|name| name.to_str()),
        };
        name.map(str::to_owned)
            .ok_or_else(|| Error::new(Kind::Invalid, "the name of the new image is not UTF-8"))
    };
    for planned in &plan.files {
        let name = name_of(planned)?;
        if fs::symlink_metadata(dir.join(&name)).is_ok() {
            return Err(Error::new(
                Kind::Exists,
                format!("there is {} already", show(Path::new(&name))),
            ));
        }
    }
    let mut counts = Counts::default();
    let mut files = Vec::new();
    for planned in &plan.files {
        let file = unnamed::create(dir, 0o666, false)?;
        file.set_len(planned.len)
            .map_err(|error| Error::io("cannot make a file of that size", error))?;
        counts = write(planned, &file, counts)?;
        files.push((file, name_of(planned)?));
    }
    for (i, (file, name)) in files.iter().enumerate() {
        if let Err(error) = unnamed::publish(file, dir, name, false) {
            for (_, name) in &files[..i] {
                // Made a moment ago, and of no use without the others.
                drop(fs::remove_file(dir.join(name)));
            }
            return Err(error);
        }
    }
    Ok(counts)
}
