//! Makes the files: parents first, several at once.
//!
//! 1. An image is begun when the one that it is a clone of is complete; that one stays open, without
//!    a name, as long as somebody wants to be cloned from it.
//! 2. One that fails takes those below it with it, and nobody else.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use indicatif::ProgressBar;
use nodupe::error::{Error, Kind, Result};
use nodupe::formats::chain::Whole;
use nodupe::formats::layout::{Ids, Plan, Shape, Sink, Spec};
use nodupe::formats::{Format, Layer};
use nodupe::sys::files;
use nodupe::transfer::{self, Filled, Held, Image, Library, Parent, Twins, What};

use super::super::failure;
use super::super::output::Output;
use super::super::unnamed;

/// Threads that read and write one image.
const WORKERS: usize = 4;

/// What is to be made of a library.
pub(super) struct Maker<'a> {
    library: &'a Library,
    dir: &'a Path,
    /// Paths below `dir`, by image.
    names: HashMap<usize, PathBuf>,
    format: Option<Format>,
    jobs: usize,
    /// Finds equal blocks, if that is wanted.
    twins: Option<Twins<'a>>,
}

/// What was made.
#[derive(Debug, Default)]
pub(super) struct Made {
    /// Images and their files.
    pub(super) files: HashMap<usize, PathBuf>,
    /// Sources and why not.
    pub(super) failed: Vec<(PathBuf, Error)>,
    /// What images hold, by image.
    pub(super) held: HashMap<usize, Held>,
    /// Bytes that were read and written.
    pub(super) filled: Filled,
}

impl Made {
    /// How many were to be made.
    pub(super) fn total(&self) -> usize {
        self.files.len() + self.failed.len()
    }
}

/// What the threads share.
#[derive(Default)]
struct State {
    ready: VecDeque<usize>,
    running: usize,
    /// Clones that wait for an image.
    waiting: HashMap<usize, Vec<usize>>,
    /// The contents of images from which clones are still to be made, and how many.
    bases: HashMap<usize, (Arc<File>, usize)>,
    /// What an image is made from.
    base_of: HashMap<usize, usize>,
    made: Made,
    /// Images that are not made.
    refused: Vec<usize>,
}

impl<'a> Maker<'a> {
    pub(super) fn new(
        library: &'a Library,
        dir: &'a Path,
        names: HashMap<usize, PathBuf>,
        format: Option<Format>,
        jobs: usize,
        twins: Option<Twins<'a>>,
    ) -> Self {
        Self {
            library,
            dir,
            names,
            format,
            jobs,
            twins,
        }
    }

    /// Makes all of them.
    pub(super) fn run(mut self, output: Output) -> failure::Result<Made> {
        unnamed::clean(self.dir);
        if let Err(error) = unnamed::copy_once(self.dir) {
            // Whatever is wrong there is told of each image.
            log::debug!("no copy before the others: {error}");
        }
        let state = self.plan();
        // What failed is perhaps what others are made from; it gets no name.
        let failed: Vec<usize> = state.refused.clone();
        failed
            .iter()
            .for_each(|index| drop(self.names.remove(index)));
        let total = state.made.held.values().map(|held| held.data).sum();
        let bar = output.progress("importing", total, true);
        let (state, wake) = (Mutex::new(state), Condvar::new());
        std::thread::scope(|scope| {
            for _ in 0..self.jobs {
                scope.spawn(|| self.work(&state, &wake, &bar));
            }
        });
        bar.finish_and_clear();
        let mut made = state
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .made;
        if let Some(path) = made.files.values().next() {
            // One sync makes all of it durable.
            let synced = File::open(path).and_then(|file| file.sync_all());
            if let Err(error) = synced {
                let error = Error::io("what was imported may not be durable", error);
                made.failed.push((path.clone(), error));
            }
        }
        made.failed.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(made)
    }

    /// Who is made from whom, and what there is to read.
    fn plan(&self) -> State {
        let mut state = State::default();
        let mut wanted: Vec<usize> = self.names.keys().copied().collect();
        wanted.sort_unstable();
        for index in wanted {
            if let Err(error) = self.add(&mut state, index) {
                state.made.failed.push((self.library.path(index), error));
                state.refused.push(index);
            }
        }
        let bases = &state.base_of;
        let mut all: Vec<usize> = state.made.held.keys().copied().collect();
        all.sort_unstable();
        state.ready = all
            .iter()
            .copied()
            .filter(|i| !bases.contains_key(i))
            .collect();
        for index in all {
            if let Some(base) = state.base_of.get(&index) {
                state.waiting.entry(*base).or_default().push(index);
            }
        }
        state
    }

    /// Adds an image with all that it is made from.
    fn add(&self, state: &mut State, index: usize) -> Result<()> {
        if let Some(path) = self.names.get(&index).map(|name| self.dir.join(name))
            && path.symlink_metadata().is_ok()
        {
            return Err(Error::new(
                Kind::Exists,
                format!(
                    "{} exists: remove it, or choose another place",
                    path.display()
                ),
            ));
        }
        self.library.chain(index)?;
        let mut new = Vec::new();
        let mut at = Some(index);
        while let Some(index) = at.filter(|index| !state.made.held.contains_key(index)) {
            let layer = self.library.layer(index)?;
            new.push((index, transfer::held(&*layer)?));
            at = self.base(index);
        }
        for (index, held) in new {
            state.made.held.insert(index, held);
            if let Some(base) = self.base(index) {
                state.base_of.insert(index, base);
            }
        }
        Ok(())
    }

    /// The image that one is made from: its parent, or for a snapshot the disk that it is in.
    fn base(&self, index: usize) -> Option<usize> {
        let images = self.library.images();
        let image = &images[index];
        if let What::Snapshot(..) = image.what {
            let disk = |other: &Image| other.what == What::Disk && other.spot == image.spot;
            return images[..index].iter().rposition(disk);
        }
        match image.parent {
            Parent::Image(parent, _) => Some(parent),
            Parent::None | Parent::Missing(_) => None,
        }
    }

    fn work(&self, shared: &Mutex<State>, wake: &Condvar, bar: &ProgressBar) {
        let lock = || shared.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = lock();
        loop {
            let Some(index) = state.ready.pop_front() else {
                if state.running == 0 {
                    wake.notify_all();
                    return;
                }
                state = wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.running += 1;
            let base = state.base_of.get(&index).copied();
            let from = base.and_then(|base| state.bases.get(&base).map(|base| base.0.clone()));
            drop(state);
            let outcome = self.make(index, from.as_deref(), bar);
            drop(from);
            state = lock();
            state.running -= 1;
            self.settle(&mut state, index, outcome);
            if let Some(base) = base
                && let Some((_, users)) = state.bases.get_mut(&base)
            {
                *users -= 1;
                if *users == 0 {
                    state.bases.remove(&base);
                }
            }
            wake.notify_all();
        }
    }

    fn settle(&self, state: &mut State, index: usize, outcome: Result<(Arc<File>, Filled)>) {
        let below = state.waiting.remove(&index).unwrap_or_default();
        match outcome {
            Ok((file, filled)) => {
                state.made.filled.add(filled);
                if let Some(name) = self.names.get(&index) {
                    state.made.files.insert(index, self.dir.join(name));
                }
                if !below.is_empty() {
                    state.bases.insert(index, (file, below.len()));
                }
                // Depth first: so that few files stay open.
                below
                    .into_iter()
                    .rev()
                    .for_each(|child| state.ready.push_front(child));
            }
            Err(error) => {
                let what = format!("its parent {} failed", self.library.path(index).display());
                let mut lost = below;
                while let Some(child) = lost.pop() {
                    lost.extend(state.waiting.remove(&child).unwrap_or_default());
                    if self.names.contains_key(&child) {
                        let error = Error::new(Kind::NotFound, what.clone());
                        state.made.failed.push((self.library.path(child), error));
                    }
                }
                if self.names.contains_key(&index) {
                    state.made.failed.push((self.library.path(index), error));
                }
            }
        }
    }

    /// Makes one, and returns the bytes of its disk.
    fn make(
        &self,
        index: usize,
        base: Option<&File>,
        bar: &ProgressBar,
    ) -> Result<(Arc<File>, Filled)> {
        let image = &self.library.images()[index];
        let size = image.facts.size;
        self.library.verify(index)?;
        let layer: Box<dyn Layer> = match image.what {
            What::Snapshot(..) => Box::new(Whole::new(self.library.disk(index)?)),
            _ => self.library.layer(index)?,
        };
        let disk = Arc::new(unnamed::create(self.dir, image.mode, true)?);
        if let Some(base) = base {
            copy_all(base, &disk, size)?;
        }
        disk.set_len(size).map_err(cannot_write)?;
        let progress = |bytes| bar.inc(bytes);
        let twin = self.twins.as_ref().map(|twins| twins.add(&disk));
        let over = base.is_some();
        let filled = transfer::fill(&*layer, &disk, over, twin.as_ref(), WORKERS, &progress)?;
        if let Some(name) = self.names.get(&index) {
            self.publish(image, &disk, &self.dir.join(name))?;
        }
        Ok((disk, filled))
    }

    /// Gives the disk its name, in the format that is wanted.
    fn publish(&self, image: &Image, disk: &File, path: &Path) -> Result<()> {
        let dir = path.parent().unwrap_or(self.dir);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        fs::create_dir_all(dir)
            .map_err(|error| Error::io(format!("cannot make {}", dir.display()), error))?;
        let format = self.format.unwrap_or(image.facts.format);
        if format == Format::Raw {
            unnamed::publish(disk, dir, &name, false)?;
            return keep_time(path, image);
        }
        let plan = Plan::new(
            &spec(image, format, &name)?,
            &data_ranges(disk, image.facts.size)?,
        )?;
        for planned in &plan.files {
            let file = unnamed::create(self.dir, image.mode, true)?;
            file.set_len(planned.len).map_err(cannot_write)?;
            let mut sink = FileSink { file: &file, disk };
            planned.emit(image.facts.size, &mut sink)?;
            let name = planned.name.as_deref().unwrap_or(&name);
            unnamed::publish(&file, dir, name, false)?;
            keep_time(&dir.join(name), image)?;
        }
        Ok(())
    }
}

fn spec(image: &Image, format: Format, name: &str) -> Result<Spec> {
    let same = format == image.facts.format && !matches!(image.what, What::Snapshot(..));
    let identity = image.facts.identity.filter(|_| same);
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    Ok(Spec {
        shape: Shape::of(format, None)?,
        size: image.facts.size,
        sector: image.facts.sector,
        ids: Ids::random()?.keeping(identity),
        seconds: now.map_or(0, |now| now.as_secs()),
        name: name.to_owned(),
        parent: None,
    })
}

/// Where a file of the pool has data, in whole blocks.
fn data_ranges(file: &File, size: u64) -> Result<Vec<Range<u64>>> {
    let failed = |error| Error::io("cannot look for the data of what was imported", error);
    let (mut ranges, mut at) = (Vec::new(), 0);
    while at < size {
        let Some(start) = files::seek_data(file, at).map_err(failed)? else {
            break;
        };
        if start >= size {
            break;
        }
        let end = files::seek_hole(file, start).map_err(failed)?.min(size);
        ranges.push(start..end);
        at = end;
    }
    Ok(ranges)
}

/// Writes a planned file; the payload is shared with the disk.
struct FileSink<'a> {
    file: &'a File,
    disk: &'a File,
}

impl Sink for FileSink<'_> {
    fn bytes(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, at).map_err(cannot_write)
    }

    fn repeat(&mut self, at: u64, from: u64, len: u64) -> Result<()> {
        share(self.file, from, self.file, at, len)
    }

    fn payload(&mut self, at: u64, disk: u64, len: u64) -> Result<()> {
        share(self.disk, disk, self.file, at, len)
    }
}

/// Copies a range within the pool, which shares its blocks.
fn share(from: &File, at: u64, to: &File, into: u64, len: u64) -> Result<()> {
    let mut done = 0;
    while done < len {
        let copied = files::copy_range(from, at + done, to, into + done, len - done);
        match copied.map_err(cannot_write)? {
            0 => break,
            copied => done += copied,
        }
    }
    Ok(())
}

/// Makes `to`, which is empty, a clone of `from`, as far as `size`.
pub(super) fn copy_all(from: &File, to: &File, size: u64) -> Result<()> {
    let there = from.metadata().map_err(cannot_write)?.len();
    share(from, 0, to, 0, there.min(size))
}

/// The time of the source.
fn keep_time(path: &Path, image: &Image) -> Result<()> {
    let (seconds, nanos) = image.modified;
    let nanos = Duration::from_nanos(u64::try_from(nanos).unwrap_or(0));
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let time = if seconds < 0 {
        UNIX_EPOCH.checked_sub(whole)
    } else {
        UNIX_EPOCH.checked_add(whole)
    };
    let Some(time) = time.and_then(|time| time.checked_add(nanos)) else {
        return Ok(());
    };
    match File::open(path).and_then(|file| file.set_modified(time)) {
        // The source forbids its owner to read it, and so does the new file.
        Err(error) if error.kind() != std::io::ErrorKind::PermissionDenied => Err(Error::io(
            format!("cannot set the time of {}", path.display()),
            error,
        )),
        _ => Ok(()),
    }
}

fn cannot_write(error: std::io::Error) -> Error {
    Error::io("cannot write to the pool", error)
}
