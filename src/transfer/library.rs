//! The images that a user named, and those that belong to them.
//!
//! Invariants:
//!
//! 1. A file is opened by its [`Spot`] only, and again only if it is still the same file.
//! 2. What cannot be read is noted by name; it does not stop the rest.
//! 3. Directories are walked without following links, to a bounded depth and number of entries.

use std::collections::{HashMap, HashSet};
use std::fs::{File, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::looks::{Choice, choose, extents, is_archive, open_member};
use super::roots::{FileId, Roots, Spot, file_id};
use crate::error::{Error, Kind, Result};
use crate::formats::qcow2::Qcow2;
use crate::formats::{Facts, FileSource, Format, Layer, Source, ova, probe};
use crate::sys::files;

/// Most entries of a directory tree.
const ENTRIES_MAX: usize = 1_000_000;
/// Deepest directory.
pub(super) const DEPTH_MAX: usize = 128;

/// Makes a source of a file that an image consists of.
pub type Through<'a> = &'a mut dyn FnMut(File) -> Result<Arc<dyn Source>>;

/// Which disk of a file.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum What {
    /// The disk.
    Disk,
    /// A snapshot inside a qcow2 image: its number in the table, and its name.
    Snapshot(usize, String),
    /// A disk of an OVA: its number in the OVF, and the name of its file.
    Member(usize, String),
}

/// Where the contents of a disk come from that it does not hold itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parent {
    /// Nowhere: it is whole.
    None,
    /// From this image of the library; and how it was found, in words.
    Image(usize, &'static str),
    /// From one that is not to be had: why, in words.
    Missing(String),
}

/// A disk.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its file.
    pub spot: Spot,
    /// Which disk of the file.
    pub what: What,
    /// What the file says of it.
    pub facts: Facts,
    /// Its parent; settled by [`Library::resolve`].
    pub parent: Parent,
    /// True if the user named it, or the tree that it is in; else it only belongs to one that was.
    pub wanted: bool,
    /// Path below the place that the user named: where it goes below the destination.
    pub place: PathBuf,
    /// Permission bits of its file.
    pub mode: u32,
    /// Last change of its file: seconds and nanoseconds since 1970.
    pub modified: (i64, i64),
    /// Bytes that its files take up on their filesystem.
    pub stored: u64,
    pub(super) id: FileId,
    /// The user said which format it has.
    chosen: bool,
    /// It is a part of another image, and only looks like one.
    pub(super) is_extent: bool,
}

/// What could not be read, and why.
#[derive(Debug)]
pub struct Trouble {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub error: Error,
    place: Option<PathBuf>,
    id: FileId,
    /// It looks like no image, and nobody said what it is.
    plain: bool,
}

/// Images and what was found out about them.
#[derive(Debug, Default)]
pub struct Library {
    roots: Roots,
    images: Vec<Image>,
    pub(super) troubles: Vec<Trouble>,
    /// Images that turned out to be extents of others.
    left_out: Vec<Trouble>,
    loaded: HashMap<(FileId, Option<Format>), usize>,
    /// Files that an image of several names as its own: the image's file, and theirs.
    named: Vec<(FileId, FileId)>,
    /// Those of them that belong to an image; settled by [`Library::settle_extents`].
    extents: HashSet<FileId>,
    /// Directories whose entries were looked at.
    pub(super) scanned: HashSet<Spot>,
    /// Trees that were looked at from top to bottom.
    pub(super) walked: HashSet<Spot>,
    /// Entries of directories that were seen.
    entries: usize,
}

impl Library {
    /// One without images.
    pub fn new() -> Self {
        Self::default()
    }

    /// Allows parents and extents below `dir`, without importing what is there.
    ///
    /// # Errors
    /// `Io` and the like if it cannot be opened.
    pub fn allow(&mut self, dir: &Path) -> Result<()> {
        self.roots.add(dir).map(drop)
    }

    /// The images, in the order in which they were found.
    pub fn images(&self) -> &[Image] {
        &self.images
    }

    pub(super) fn image_mut(&mut self, index: usize) -> &mut Image {
        &mut self.images[index]
    }

    pub(super) fn roots(&self) -> &Roots {
        &self.roots
    }

    /// The whole path of an image's file.
    pub fn path(&self, index: usize) -> PathBuf {
        self.roots.show(&self.images[index].spot)
    }

    /// What could not be read: neither images nor a part of one.
    pub fn troubles(&self) -> impl Iterator<Item = &Trouble> {
        let relevant = |trouble: &&Trouble| !self.extents.contains(&trouble.id);
        let troubles = self.troubles.iter().filter(relevant);
        troubles.chain(&self.left_out)
    }

    /// Adds a file that the user named. `format`: the user said so, and nothing is guessed.
    ///
    /// # Errors
    /// What opening it answers, and what is wrong with it.
    pub fn add_file(&mut self, path: &Path, format: Option<Format>) -> Result<()> {
        let whole = path
            .canonicalize()
            .map_err(|source| Error::io(format!("cannot open {}", path.display()), source))?;
        let (Some(dir), Some(name)) = (whole.parent(), whole.file_name()) else {
            return Err(Error::new(
                Kind::Invalid,
                format!("{} is no file", path.display()),
            ));
        };
        let spot = self.roots.add(dir)?.join(Path::new(name));
        let choice = format.map_or(Choice::Probe, Choice::Exactly);
        let place = PathBuf::from(name);
        self.load(&spot, choice, Some(&place)).map(drop)
    }

    /// Adds all images below a directory that the user named. `under`: where they go below the
    /// destination.
    ///
    /// # Errors
    /// `Io` if the directory cannot be read; `TooLarge`. What is wrong with one image, or with a
    /// directory below, is among the [`troubles`](Self::troubles).
    pub fn add_tree(&mut self, dir: &Path, under: &Path) -> Result<()> {
        let top = self.roots.add(dir)?;
        let mut pending = vec![(top.clone(), under.to_path_buf(), 0)];
        while let Some((dir, place, depth)) = pending.pop() {
            let entries = match self.list(&dir) {
                Ok(entries) => entries,
                Err(error) if depth > 0 && error.kind() != Kind::TooLarge => {
                    self.trouble(&dir, error);
                    continue;
                }
                Err(error) => return Err(error),
            };
            for (name, is_dir) in entries {
                let (spot, place) = (dir.join(&name), place.join(&name));
                if !is_dir {
                    self.try_load(&spot, Choice::Scan, Some(&place));
                } else if depth < DEPTH_MAX {
                    pending.push((spot, place, depth + 1));
                } else {
                    let what = format!("more than {DEPTH_MAX} directories below each other");
                    let error = Error::new(Kind::TooLarge, what + ": import it by itself");
                    self.trouble(&spot, error);
                }
            }
            self.scanned.insert(dir);
        }
        self.walked.insert(top);
        Ok(())
    }

    /// Notes a directory that was not looked at.
    fn trouble(&mut self, dir: &Spot, error: Error) {
        self.troubles.push(Trouble {
            path: self.roots.show(dir),
            error,
            place: None,
            id: (0, 0),
            plain: false,
        });
    }

    /// Files and directories in a directory, by name. A link is neither.
    pub(super) fn list(&mut self, dir: &Spot) -> Result<Vec<(PathBuf, bool)>> {
        let path = self.roots.show(dir);
        let failed = |source| Error::io(format!("cannot list {}", path.display()), source);
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let kind = entry.file_type().map_err(failed)?;
            if kind.is_dir() || kind.is_file() {
                found.push((PathBuf::from(entry.file_name()), kind.is_dir()));
            }
            self.entries += 1;
            if self.entries > ENTRIES_MAX {
                return Err(Error::new(
                    Kind::TooLarge,
                    format!("more than {ENTRIES_MAX} files: import parts of the library"),
                ));
            }
        }
        found.sort();
        Ok(found)
    }

    pub(super) fn try_load(&mut self, spot: &Spot, choice: Choice, place: Option<&Path>) {
        if let Err(error) = self.load(spot, choice, place) {
            let path = self.roots.show(spot);
            let (mut id, mut plain) = ((0, 0), false);
            if let Ok((file, metadata)) = self.roots.open(spot, false) {
                id = file_id(&metadata);
                let looks = FileSource::new(file).and_then(|source| probe::probe(&source));
                plain = looks.is_ok_and(|format| format == Format::Raw)
                    && !matches!(choice, Choice::Exactly(_));
            }
            let place = place.map(Path::to_path_buf);
            let trouble = Trouble {
                path,
                error,
                place,
                id,
                plain,
            };
            self.troubles.push(trouble);
        }
    }

    /// Loads the image at a place, or finds that it is loaded. `None`: it is none. `place`: it is
    /// wanted, and goes there.
    pub(super) fn load(
        &mut self,
        spot: &Spot,
        choice: Choice,
        place: Option<&Path>,
    ) -> Result<Option<usize>> {
        let (file, metadata) = self.roots.open(spot, place.is_some())?;
        let id = file_id(&metadata);
        let source: Arc<dyn Source> = Arc::new(FileSource::new(file)?);
        if let Some(place) = place
            && !matches!(choice, Choice::Exactly(_))
            && is_archive(&*source, spot)?
        {
            self.load_archive(spot, &metadata, source, place)?;
            return Ok(None);
        }
        let device = metadata.file_type().is_block_device();
        let Some(format) = choose(&*source, spot, choice, device)? else {
            return Ok(None);
        };
        if let Some(index) = self.loaded.get(&(id, Some(format))) {
            let index = *index;
            self.tell_link(index, spot, place);
            self.want(index, place);
            return Ok(Some(index));
        }
        let mut extents = Vec::new();
        let opened = self.open(spot, format, source, &mut extents);
        // A disk of one file that names itself is no extent.
        let others = extents.iter().filter(|(other, _)| *other != id);
        self.named.extend(others.map(|(other, _)| (id, *other)));
        let (layer, snapshots) = opened?;
        let image = Image {
            spot: spot.clone(),
            what: What::Disk,
            facts: layer.facts().clone(),
            parent: Parent::None,
            wanted: place.is_some(),
            place: place.map(Path::to_path_buf).unwrap_or_default(),
            mode: metadata.mode() & 0o777,
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            stored: metadata.blocks() * 512 + extents.iter().map(|(_, bytes)| bytes).sum::<u64>(),
            id,
            chosen: place.is_some() && matches!(choice, Choice::Exactly(_)),
            is_extent: false,
        };
        let index = self.images.len();
        self.loaded.insert((id, Some(format)), index);
        let claimed = match choice {
            Choice::Exactly(_) => self.claim(id, format),
            _ => None,
        };
        self.images.push(image);
        self.add_snapshots(index, snapshots);
        self.want(index, claimed.as_deref());
        Ok(Some(index))
    }

    /// Says of an image that is wanted under a second name that it is imported under the first.
    fn tell_link(&mut self, index: usize, spot: &Spot, place: Option<&Path>) {
        let also = self.roots.show(spot);
        let Some(image) = self.images.get(index) else {
            return;
        };
        if place.is_some() && image.wanted && self.roots.show(&image.spot) != also {
            let name = also.display();
            let note = format!("{name} is the same file: it is imported once, under this name");
            self.images[index].facts.notes.push(note);
        }
    }

    /// Finds out which files are parts of others. What a guest wrote into an extent may look like an
    /// image, which must become no disk of its own; nor may such an image make others its extents.
    pub(super) fn settle_extents(&mut self) {
        self.extents = extents(&self.named);
        for image in &mut self.images {
            let suspect = image.facts.format != Format::Raw && !image.chosen;
            if suspect && self.extents.contains(&image.id) && !image.is_extent {
                image.is_extent = true;
                if std::mem::take(&mut image.wanted) && image.what == What::Disk {
                    self.left_out.push(Trouble {
                        path: self.roots.show(&image.spot),
                        error: Error::new(
                            Kind::Invalid,
                            format!(
                                "it looks like {0}, and is an extent of another image: no disk is \
                                 made of it; if it is one, name it alone, --from {0}",
                                image.facts.format
                            ),
                        ),
                        place: None,
                        id: image.id,
                        plain: false,
                    });
                }
            }
        }
    }

    /// Takes the place of a file that was read as raw only because it looks like nothing else: what
    /// a child says of it counts more. Where the user said what it is, or it looks like an image,
    /// no child decides how it is imported.
    fn claim(&mut self, id: FileId, format: Format) -> Option<PathBuf> {
        let mut place = None;
        for other in self.images.iter_mut().filter(|other| other.id == id) {
            let own = other.facts.format;
            if own == format {
                continue;
            }
            if own == Format::Raw && !other.chosen {
                if std::mem::take(&mut other.wanted) {
                    place = Some(other.place.clone());
                }
            } else if other.wanted && other.what == What::Disk {
                let note = format!("a child takes it for {format}; it is imported as {own}");
                other.facts.notes.push(note);
            }
        }
        self.troubles.retain_mut(|trouble| {
            let claimed = trouble.id == id && trouble.plain;
            if claimed && trouble.place.is_some() {
                place = trouble.place.take();
            }
            !claimed
        });
        place
    }

    /// The image, and with it its snapshots, is wanted at a place.
    fn want(&mut self, index: usize, place: Option<&Path>) {
        let Some(place) = place else { return };
        let (id, format) = (self.images[index].id, self.images[index].facts.format);
        for image in &mut self.images[index..] {
            if image.id == id && image.facts.format == format && !image.wanted {
                image.wanted = true;
                image.place = place.to_path_buf();
            }
        }
    }

    fn add_snapshots(&mut self, index: usize, snapshots: Result<Vec<(String, Facts)>>) {
        let disk = self.images[index].clone();
        match snapshots {
            Ok(snapshots) => {
                for (number, (name, facts)) in snapshots.into_iter().enumerate() {
                    self.images.push(Image {
                        what: What::Snapshot(number, name),
                        facts,
                        ..disk.clone()
                    });
                }
            }
            // The disk itself can be read all the same.
            Err(error) => {
                let note = format!("its snapshots cannot be read: {error}");
                self.images[index].facts.notes.push(note);
            }
        }
    }

    fn load_archive(
        &mut self,
        spot: &Spot,
        metadata: &Metadata,
        source: Arc<dyn Source>,
        place: &Path,
    ) -> Result<()> {
        let id = file_id(metadata);
        if let Some(index) = self.loaded.get(&(id, None)) {
            self.tell_link(*index, spot, Some(place));
            return Ok(());
        }
        let archive = ova::Ova::open(source)?;
        let mut images = Vec::new();
        for (number, disk) in archive.disks().iter().enumerate() {
            let layer = open_member(&archive, number)?;
            images.push(Image {
                spot: spot.clone(),
                what: What::Member(number, disk.name.clone()),
                facts: layer.facts().clone(),
                parent: Parent::None,
                wanted: true,
                place: place.to_path_buf(),
                mode: metadata.mode() & 0o777,
                modified: (metadata.mtime(), metadata.mtime_nsec()),
                stored: archive.disk(number)?.len(),
                id,
                chosen: false,
                is_extent: false,
            });
        }
        self.loaded.insert((id, None), self.images.len());
        self.images.append(&mut images);
        Ok(())
    }

    /// Opens an image to be read: the same file as before.
    ///
    /// # Errors
    /// `Busy` if the file was replaced since it was looked at; as the format's own.
    pub fn layer(&self, index: usize) -> Result<Box<dyn Layer>> {
        self.layer_through(index, &mut |file| {
            files::expect_sequential(&file);
            Ok(Arc::new(FileSource::new(file)?))
        })
    }

    /// As [`layer`](Self::layer), with its files read by what `through` makes of each.
    ///
    /// # Errors
    /// As [`layer`](Self::layer), and those of `through`.
    pub fn layer_through(&self, index: usize, through: Through<'_>) -> Result<Box<dyn Layer>> {
        let image = &self.images[index];
        let (file, metadata) = self.roots.open(&image.spot, image.wanted)?;
        let changed = || {
            Error::new(
                Kind::Busy,
                format!(
                    "{} was changed meanwhile: try again",
                    self.path(index).display()
                ),
            )
        };
        if file_id(&metadata) != image.id {
            return Err(changed());
        }
        let source = through(file)?;
        let mut open = |name: &str| {
            let (file, _) = self.open_extent(&image.spot, name)?;
            through(file)
        };
        let layer: Box<dyn Layer> = match &image.what {
            What::Disk => probe::open(source, image.facts.format, &mut open)?,
            What::Snapshot(number, _) => {
                let qcow2 = Qcow2::open(source, &mut open)?;
                let snapshots = qcow2.snapshots()?;
                let snapshot = snapshots.get(*number).ok_or_else(changed)?;
                qcow2.check_snapshot(snapshot)?;
                Box::new(qcow2.at_snapshot(snapshot))
            }
            What::Member(number, _) => {
                let archive = ova::Ova::open(source)?;
                if *number >= archive.disks().len() {
                    return Err(changed());
                }
                open_member(&archive, *number)?
            }
        };
        let facts = layer.facts();
        if facts.size != image.facts.size || facts.identity != image.facts.identity {
            return Err(changed());
        }
        Ok(layer)
    }

    /// Compares a disk of an archive with the archive's manifest, which reads all of it.
    ///
    /// # Errors
    /// `Corrupt` if they differ; `Io`.
    pub fn verify(&self, index: usize) -> Result<()> {
        let image = &self.images[index];
        let What::Member(number, _) = &image.what else {
            return Ok(());
        };
        let (file, _) = self.roots.open(&image.spot, true)?;
        let archive = ova::Ova::open(Arc::new(FileSource::new(file)?))?;
        if *number < archive.disks().len() {
            archive.verify(*number)?;
        }
        Ok(())
    }

    fn open(
        &self,
        spot: &Spot,
        format: Format,
        source: Arc<dyn Source>,
        extents: &mut Vec<(FileId, u64)>,
    ) -> Result<Opened> {
        let mut open = |name: &str| {
            let (file, metadata) = self.open_extent(spot, name)?;
            extents.push((file_id(&metadata), metadata.blocks() * 512));
            let source: Arc<dyn Source> = Arc::new(FileSource::new(file)?);
            Ok(source)
        };
        if format != Format::Qcow2 || probe::is_qcow1(&*source)? {
            return Ok((probe::open(source, format, &mut open)?, Ok(Vec::new())));
        }
        let qcow2 = Qcow2::open(source, &mut open)?;
        let snapshots = qcow2.snapshots().map(|snapshots| {
            let one = |snapshot| qcow2.at_snapshot(snapshot).facts().clone();
            let named = snapshots.iter().map(|s| (s.name.clone(), one(s)));
            named.collect()
        });
        Ok((Box::new(qcow2), snapshots))
    }

    /// Opens a further file of the image at `spot`, by the name that the image has for it.
    fn open_extent(&self, spot: &Spot, name: &str) -> Result<(File, Metadata)> {
        let mut why = None;
        for candidate in self.roots.candidates(spot, name, false)? {
            match self.roots.open(&candidate, false) {
                Ok(found) => return Ok(found),
                Err(error) if error.kind() == Kind::NotFound => {
                    why.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(why.unwrap_or_else(|| Error::new(Kind::NotFound, format!("there is no {name:?}"))))
    }
}

/// An open image, and the names and facts of its snapshots.
type Opened = (Box<dyn Layer>, Result<Vec<(String, Facts)>>);
