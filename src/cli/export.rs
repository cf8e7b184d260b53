//! `nodupe export`: an image of any format, outside of the pool.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use indicatif::ProgressBar;
use nodupe::error::{Error, Kind};
use nodupe::formats::Format;
use nodupe::formats::layout::{
    Held, Map, Parent, Place, Plan, PlannedFile, Shape, Sink, Spec, compressed_qcow2,
    stream_optimized,
};
use nodupe::ondisk::is_zero;
use nodupe::units::BLOCK_SIZE;
use serde_json::json;

use super::convert;
use super::differ;
use super::failure::{Failure, Result};
use super::image::{self, Image};
use super::output::{Output, show};
use super::parts::Parts;
use super::size;

const EXAMPLE: &str = "\
Examples:
  nodupe export /srv/vms/vm.raw /backup/vm.vhdx
  nodupe export /srv/vms/vm.raw /backup/vm.vmdk --subformat streamOptimized
  nodupe export /srv/vms/vm.raw /backup/vm.qcow2 --backing /srv/vms/gold.raw
  nodupe export /srv/vms/vm.raw - --format raw | ssh host 'cat > vm.raw'

Subformats, the first is the default: vhd fixed, dynamic; vhdx dynamic, fixed; vdi dynamic, fixed;
vmdk monolithicSparse, monolithicFlat, streamOptimized.";

/// Writes an image of another format outside of the pool; only allocated data is read.
///
/// With --backing only the differences from another file of the pool are written, as a differencing
/// VHD or VHDX, a VMDK delta or a qcow2 overlay; what both share is not read.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Export {
    /// The image; parents are found by name and id below its directory
    src: PathBuf,
    /// The image to make, or - for standard output
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
    /// Compress the clusters of a qcow2, or make a streamOptimized VMDK
    #[arg(long)]
    compress: bool,
    /// Write only the differences from this image
    #[arg(long, value_name = "GOLD")]
    backing: Option<PathBuf>,
    /// Format of GOLD, instead of looking at it
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    backing_from: Option<String>,
    /// With --backing: the exported image of GOLD, which DST will name as its parent
    #[arg(long, value_name = "FILE", requires = "backing")]
    parent: Option<PathBuf>,
    /// Keep the UUID or content id of SRC
    #[arg(long)]
    keep_identity: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// What is written.
struct Made {
    shape: Shape,
    stream: bool,
}

pub(super) fn run(args: &Export, output: Output) -> Result<()> {
    let begun = Instant::now();
    let what = || format!("cannot export {} to {}", show(&args.src), show(&args.dst));
    let failed = |error: &Error| {
        let failure = Failure::new(what()).because(error);
        match error.kind() {
            Kind::NoSpace => failure.hint("make room where it is written to"),
            _ => failure,
        }
    };
    let made = made(args)?;
    let to_stdout = args.dst.as_os_str() == "-";
    if to_stdout && (io::stdout().is_terminal() || args.json) {
        return Err(Failure::usage(
            "an image to standard output goes neither to a terminal nor together with --json",
        ));
    }
    let from = convert::named(args.from.as_deref())?;
    let image = Image::open(&args.src, from, &args.allow_parent)
        .map_err(|error| convert::hint_parents(failed(&error), error.kind(), &args.src))?;
    let holes = |source: &_, range| image.data(source, range);
    let held = Held {
        chain: &image.chain,
        holes: &holes,
    };
    let mut spec = convert::spec(&image, made.shape, &args.dst, args.keep_identity)
        .map_err(|error| failed(&error))?;
    let differences = match &args.backing {
        None => None,
        Some(gold) => {
            let (parent, found) = against(args, gold, made.shape, (&image, &held))?;
            spec.parent = Some(parent);
            Some(found)
        }
    };
    let map: &dyn Map = match &differences {
        Some(found) => found,
        None => &held,
    };
    let total = total(map, spec.size).map_err(|error| failed(&error))?;
    let bar = output.progress("exporting", total, true);
    let job = Job {
        spec: &spec,
        held: &held,
        map,
        bar: &bar,
        total,
        written: Cell::new(0),
    };
    let done = match (made.stream, to_stdout) {
        (true, true) => job.stream(&mut io::stdout().lock()),
        (false, true) => job.plan_to(&mut io::stdout().lock()),
        _ => job.to_files(&args.dst, made.stream),
    };
    bar.finish_and_clear();
    done.map_err(|error| failed(&error))?;
    let advice = convert::advice(&image, &spec);
    advice.iter().for_each(|note| output.note(note));
    tell(args, output, &job, (&advice, begun));
    Ok(())
}

/// Says what was done.
fn tell(args: &Export, output: Output, job: &Job<'_>, (advice, begun): (&[String], Instant)) {
    if args.json {
        output.json(json!({
            "source": show(&args.src),
            "destination": show(&args.dst),
            "format": job.spec.shape.format().name(),
            "size": job.spec.size,
            "data_bytes": job.total,
            "written_bytes": job.written.get(),
            "advice": advice,
            "seconds": begun.elapsed().as_secs_f64(),
        }));
    } else if args.dst.as_os_str() != "-" {
        let written = size::human(job.written.get());
        output.done(&format!("{}: {written} written", show(&args.dst)));
    }
}

/// What the options ask for.
fn made(args: &Export) -> Result<Made> {
    let named = convert::named(args.format.as_deref())?;
    let format = match named.or_else(|| image::by_name(&args.dst)) {
        Some(format) => format,
        None => {
            return Err(
                Failure::usage(format!("the name {} tells no format", show(&args.dst)))
                    .hint("name it: --format raw|vhd|vhdx|vmdk|qcow2|vdi"),
            );
        }
    };
    let wants_stream = args
        .subformat
        .as_deref()
        .is_some_and(|name| name.eq_ignore_ascii_case("streamOptimized"));
    if format == Format::Vmdk && (wants_stream || args.compress && args.subformat.is_none()) {
        return Ok(Made {
            shape: Shape::VmdkSparse,
            stream: true,
        });
    }
    if args.compress && format != Format::Qcow2 {
        return Err(Failure::usage("only qcow2 and vmdk are compressed"));
    }
    let subformat = match (format, args.subformat.as_deref(), &args.backing) {
        (Format::Vmdk, None, _) => Some("monolithicSparse"),
        (Format::Vhd | Format::Vhdx | Format::Vdi, None, Some(_)) => Some("dynamic"),
        (_, subformat, _) => subformat,
    };
    let shape = Shape::of(format, subformat).map_err(|error| Failure::usage(error.to_string()))?;
    Ok(Made {
        shape,
        stream: args.compress,
    })
}

/// The parent that the image will name, and where it differs from it.
fn against(
    args: &Export,
    gold: &Path,
    shape: Shape,
    source: differ::Side<'_>,
) -> Result<(Parent, Vec<std::ops::Range<u64>>)> {
    let cannot = |path: &Path, error: &Error| {
        Failure::new(format!("cannot compare with {}", show(path))).because(error)
    };
    let from = convert::named(args.backing_from.as_deref())?;
    let right =
        Image::open(gold, from, &args.allow_parent).map_err(|error| match error.kind() {
            // The error itself names --from, which is of SRC.
            Kind::Invalid => cannot(gold, &error).hint("of this one: --backing-from FORMAT"),
            kind => convert::hint_parents(cannot(gold, &error), kind, gold),
        })?;
    let holes = |source: &_, range| right.data(source, range);
    let held = Held {
        chain: &right.chain,
        holes: &holes,
    };
    let facts = right.chain.layers()[0].facts().clone();
    let size = source.1.chain.size();
    let (path, facts) = match &args.parent {
        None => (gold.to_path_buf(), facts),
        Some(path) => {
            let parent = Image::open(path, None, &args.allow_parent);
            let parent = parent
                .map_err(|error| convert::hint_parents(cannot(path, &error), error.kind(), path))?;
            let why = unlike(&parent, facts.size, size).map_err(|error| cannot(path, &error))?;
            if let Some(why) = why {
                return Err(Failure::new(format!("{} is no parent", show(path)))
                    .why(format!("{why} {}", show(gold)))
                    .hint("give the image that was exported from it"));
            }
            (path.clone(), parent.chain.layers()[0].facts().clone())
        }
    };
    if shape.format() != Format::Qcow2 && facts.format != shape.format() {
        return Err(Failure::new(format!(
            "a {} of differences needs a parent of that format",
            shape.format()
        ))
        .why(format!("{} is {}", show(&path), facts.format))
        .hint(format!(
            "export it first and name it: nodupe export {} gold.{}; --parent gold.{}",
            show(gold),
            shape.format(),
            shape.format()
        )));
    }
    let found =
        differ::differences(source, (&right, &held)).map_err(|error| cannot(gold, &error))?;
    let name = parent_name(&path, &args.dst, shape).map_err(|error| cannot(&path, &error))?;
    Ok((
        Parent {
            name,
            absolute: None,
            identity: facts.identity,
            version: facts.version,
            format: facts.format,
        },
        found,
    ))
}

/// What tells that an image, as far as a child of `child` bytes sees it, is not the one of `size`
/// bytes that the child was compared with.
fn unlike(parent: &Image, size: u64, child: u64) -> nodupe::error::Result<Option<&'static str>> {
    let found = parent.chain.size();
    if found < size {
        return Ok(Some("it is smaller than"));
    }
    let holes = |source: &_, range| parent.data(source, range);
    let held = Held {
        chain: &parent.chain,
        holes: &holes,
    };
    let (from, to) = (size.next_multiple_of(BLOCK_SIZE as u64), found.min(child));
    let more = from < to && held.piece(from, to)?.is_some();
    Ok(more.then_some("it has data behind the end of"))
}

/// What an image at `dst` calls its parent: relative to itself, if that is beside or below it.
fn parent_name(path: &Path, dst: &Path, shape: Shape) -> nodupe::error::Result<String> {
    let failed = |error| Error::io("cannot tell where it is", error);
    let path = path.canonicalize().map_err(failed)?;
    let base = PathBuf::from(path.file_name().unwrap_or_default());
    let name = if dst.as_os_str() == "-" {
        base // it may go anywhere
    } else {
        let dir = match dst.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let dir = dir.canonicalize().map_err(failed)?;
        match path.strip_prefix(&dir) {
            Ok(relative) => relative.to_path_buf(),
            Err(_) if matches!(shape.format(), Format::Qcow2 | Format::Vmdk) => path,
            // Absolute names are those of Windows there; the id leads to the parent.
            Err(_) => base,
        }
    };
    let name = name.into_os_string().into_string();
    name.map_err(|_| Error::new(Kind::Invalid, "its name is not UTF-8"))
}

/// Bytes that a map tells.
fn total(map: &dyn Map, size: u64) -> nodupe::error::Result<u64> {
    let (mut at, mut total) = (0, 0);
    while at < size {
        let Some(range) = map.next(at)? else { break };
        total += range.end - range.start;
        at = range.end.next_multiple_of(BLOCK_SIZE as u64);
    }
    Ok(total)
}

fn write_failed(error: io::Error) -> Error {
    Error::io("cannot write the new image", error)
}

/// One export.
struct Job<'a> {
    spec: &'a Spec,
    held: &'a Held<'a>,
    map: &'a dyn Map,
    bar: &'a ProgressBar,
    /// Bytes of the disk that the map tells.
    total: u64,
    /// Bytes written.
    written: Cell<u64>,
}

impl Job<'_> {
    /// A compressed VMDK, to where nothing can be sought.
    fn stream(&self, out: &mut dyn Write) -> nodupe::error::Result<()> {
        if self.spec.shape == Shape::Qcow2 {
            return Err(Error::new(
                Kind::Unsupported,
                "a compressed qcow2 is not written in order: export it to a file",
            ));
        }
        let disk = (self.held.chain, self.map);
        let written = stream_optimized(self.spec, disk, out, &mut |done| self.bar.inc(done))?;
        self.written.set(written);
        out.flush().map_err(write_failed)
    }

    /// A planned image, in order.
    fn plan_to(&self, out: &mut dyn Write) -> nodupe::error::Result<()> {
        let plan = Plan::new(self.spec, self.map)?;
        let [file] = &plan.files[..] else {
            return Err(Error::new(
                Kind::Unsupported,
                "an image of several files is not written to standard output",
            ));
        };
        let mut sink = InOrder {
            job: self,
            out,
            at: 0,
            lead: None,
        };
        file.emit(plan.size, &mut sink)?;
        sink.fill_to(file.len)?;
        sink.out.flush().map_err(write_failed)
    }

    /// Files under a name of their own until they are complete.
    fn to_files(&self, dst: &Path, stream: bool) -> nodupe::error::Result<()> {
        let parts = Parts::default();
        if stream {
            let mut file = parts.create(dst)?;
            if self.spec.shape == Shape::Qcow2 {
                let disk = (self.held.chain, self.map);
                let mut out = io::BufWriter::with_capacity(1 << 20, &mut file);
                let progress = &mut |done| self.bar.inc(done);
                let written = compressed_qcow2(self.spec, disk, &mut out, progress)?;
                self.written.set(written);
                out.flush().map_err(write_failed)?;
            } else {
                self.stream(&mut io::BufWriter::with_capacity(1 << 20, &mut file))?;
            }
            file.sync_all().map_err(write_failed)?;
            return parts.publish();
        }
        let plan = Plan::new(self.spec, self.map)?;
        for planned in &plan.files {
            let path = match &planned.name {
                Some(name) => dst.with_file_name(name),
                None => dst.to_path_buf(),
            };
            let file = parts.create(&path)?;
            self.write(planned, plan.size, &file)?;
        }
        parts.publish()
    }

    fn write(&self, planned: &PlannedFile, size: u64, file: &File) -> nodupe::error::Result<()> {
        file.set_len(planned.len).map_err(write_failed)?;
        let mut sink = ToFile { job: self, file };
        planned.emit(size, &mut sink)?;
        file.sync_all().map_err(write_failed)
    }

    /// Gives the parts of a range that are held to `visit`, with their offset on the disk.
    fn read(
        &self,
        disk: u64,
        len: u64,
        visit: &mut dyn FnMut(u64, &[u8]) -> nodupe::error::Result<()>,
    ) -> nodupe::error::Result<()> {
        const STEP: u64 = 1 << 20;
        let (mut from, to) = (disk, disk + len);
        let mut bytes = Vec::new();
        while let Some(piece) = self.held.piece(from, to)? {
            let end = (piece.disk + piece.len).min(to);
            let mut at = piece.disk;
            while at < end {
                bytes.resize((end - at).min(STEP) as usize, 0);
                match &piece.place {
                    Place::At(source, from) => {
                        source.read_at(from + (at - piece.disk), &mut bytes)?;
                    }
                    Place::Packed => self.held.chain.read(at, &mut bytes)?,
                }
                visit(at, &bytes)?;
                self.bar.inc(bytes.len() as u64);
                at += bytes.len() as u64;
            }
            from = end;
        }
        Ok(())
    }

    fn count(&self, bytes: usize) {
        self.written.set(self.written.get() + bytes as u64);
    }
}

/// A file that reads as zeros where nothing is written.
struct ToFile<'a> {
    job: &'a Job<'a>,
    file: &'a File,
}

impl ToFile<'_> {
    /// Writes what is not zero.
    fn put(&self, at: u64, bytes: &[u8]) -> nodupe::error::Result<()> {
        let mut start = 0;
        while start < bytes.len() {
            let block = |from: usize| &bytes[from..bytes.len().min(from + BLOCK_SIZE)];
            let mut end = start;
            while end < bytes.len() && !is_zero(block(end)) {
                end = bytes.len().min(end + BLOCK_SIZE);
            }
            if end > start {
                self.file
                    .write_all_at(&bytes[start..end], at + start as u64)
                    .map_err(write_failed)?;
                self.job.count(end - start);
                start = end;
            } else {
                start = bytes.len().min(start + BLOCK_SIZE);
            }
        }
        Ok(())
    }
}

impl Sink for ToFile<'_> {
    fn bytes(&mut self, at: u64, bytes: &[u8]) -> nodupe::error::Result<()> {
        self.put(at, bytes)
    }

    fn repeat(&mut self, at: u64, from: u64, len: u64) -> nodupe::error::Result<()> {
        let mut bytes = vec![0; len as usize];
        self.file
            .read_exact_at(&mut bytes, from)
            .map_err(write_failed)?;
        self.put(at, &bytes)
    }

    fn payload(&mut self, at: u64, disk: u64, len: u64) -> nodupe::error::Result<()> {
        self.job.read(disk, len, &mut |part, bytes| {
            self.put(at + (part - disk), bytes)
        })
    }
}

/// Something that is only ever written at its end.
struct InOrder<'a> {
    job: &'a Job<'a>,
    out: &'a mut dyn Write,
    at: u64,
    /// The newest piece of one block, which may be repeated.
    lead: Option<(u64, Vec<u8>)>,
}

impl InOrder<'_> {
    fn fill_to(&mut self, at: u64) -> nodupe::error::Result<()> {
        let zeros = vec![0; 1 << 20];
        while self.at < at {
            let len = (at - self.at).min(zeros.len() as u64) as usize;
            self.put(self.at, &zeros[..len])?;
        }
        Ok(())
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> nodupe::error::Result<()> {
        if at > self.at {
            self.fill_to(at)?;
        }
        self.out.write_all(bytes).map_err(write_failed)?;
        self.at += bytes.len() as u64;
        self.job.count(bytes.len());
        Ok(())
    }
}

impl Sink for InOrder<'_> {
    fn bytes(&mut self, at: u64, bytes: &[u8]) -> nodupe::error::Result<()> {
        if bytes.len() == BLOCK_SIZE {
            self.lead = Some((at, bytes.to_vec()));
        }
        self.put(at, bytes)
    }

    fn repeat(&mut self, at: u64, from: u64, _: u64) -> nodupe::error::Result<()> {
        let Some((_, bytes)) = self.lead.take_if(|(lead, _)| *lead == from) else {
            return Err(Error::new(
                Kind::Unsupported,
                "this image is not written in order: export it to a file",
            ));
        };
        let outcome = self.put(at, &bytes);
        self.lead = Some((from, bytes));
        outcome
    }

    fn payload(&mut self, at: u64, disk: u64, len: u64) -> nodupe::error::Result<()> {
        let job = self.job;
        job.read(disk, len, &mut |part, bytes| {
            self.put(at + (part - disk), bytes)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_named_so_that_it_is_found() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("vms/old")).unwrap();
        let name = |parent: &str, shape| {
            let path = root.join(parent);
            std::fs::write(&path, "").unwrap();
            parent_name(&path, &root.join("vms/vm.x"), shape).unwrap()
        };
        for shape in [Shape::Qcow2, Shape::VhdDynamic] {
            assert_eq!(name("vms/gold", shape), "gold");
            assert_eq!(name("vms/old/gold", shape), "old/gold");
        }
        let absolute = root.join("gold").into_os_string().into_string().unwrap();
        assert_eq!(name("gold", Shape::Qcow2), absolute);
        assert_eq!(name("gold", Shape::VhdxDynamic), "gold");
    }

    #[test]
    fn a_parent_with_more_data_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.raw");
        std::fs::write(&path, vec![1; 3 * BLOCK_SIZE]).unwrap();
        let image = Image::open(&path, None, &[]).unwrap();
        let block = BLOCK_SIZE as u64;
        let unlike = |size, child| unlike(&image, size, child).unwrap();
        assert_eq!(unlike(3 * block, 5 * block), None);
        assert!(unlike(4 * block, 5 * block).is_some());
        assert!(unlike(2 * block, 5 * block).is_some());
        assert_eq!(unlike(2 * block, 2 * block), None, "the child ends before");
    }
}
