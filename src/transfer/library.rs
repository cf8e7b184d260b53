//! The images that a user named, and those that belong to them.
//!
//! Invariants:
//!
//! 1. A file is opened by its [`Spot`] only, and again only if it is still the same file.
//! 2. What cannot be read is noted by name; it does not stop the rest.
//! 3. Directories are walked without following links, to a bounded depth and number of entries.

use std::collections::{HashMap, HashSet};
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::roots::{FileId, Roots, Spot, file_id};
use crate::error::{Error, Kind, Result};
use crate::formats::qcow2::Qcow2;
use crate::formats::source::read_vec;
use crate::formats::{Facts, FileSource, Format, Layer, Source, ova, probe};

/// Most entries of a directory tree.
const ENTRIES_MAX: usize = 1_000_000;
/// Deepest directory.
const DEPTH_MAX: usize = 128;

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
}

/// How the format of a file is found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// By contents and name.
    Probe,
    /// As [`Probe`](Self::Probe), in a tree, where most files are no images.
    Scan,
    /// By contents and name, of a file that a child names without its format.
    Backing,
    /// It is known.
    Exactly(Format),
}

/// Images and what was found out about them.
#[derive(Debug, Default)]
pub struct Library {
    roots: Roots,
    images: Vec<Image>,
    troubles: Vec<Trouble>,
    /// Images that turned out to be extents of others.
    left_out: Vec<Trouble>,
    loaded: HashMap<(FileId, Option<Format>), usize>,
    /// Files that an image of several names as its own: the image's file, and theirs.
    named: Vec<(FileId, FileId)>,
    /// Those of them that belong to an image; settled by [`Library::settle_extents`].
    extents: HashSet<FileId>,
    /// Directories whose entries were looked at.
    pub(super) scanned: HashSet<Spot>,
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
    /// `Io` if the directory cannot be read; `TooLarge`. What is wrong with one image is among the
    /// [`troubles`](Self::troubles).
    pub fn add_tree(&mut self, dir: &Path, under: &Path) -> Result<()> {
        let top = self.roots.add(dir)?;
        let mut pending = vec![(top, under.to_path_buf(), 0)];
        while let Some((dir, place, depth)) = pending.pop() {
            for (name, is_dir) in self.list(&dir)? {
                let (spot, place) = (dir.join(&name), place.join(&name));
                if is_dir && depth < DEPTH_MAX {
                    pending.push((spot, place, depth + 1));
                } else if !is_dir {
                    self.try_load(&spot, Choice::Scan, Some(&place));
                }
            }
            self.scanned.insert(dir);
        }
        Ok(())
    }

    /// Files and directories in a directory, by name. A link is neither.
    fn list(&mut self, dir: &Spot) -> Result<Vec<(PathBuf, bool)>> {
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

    /// Looks at what stands beside an image: among it may be its parent.
    pub(super) fn scan_beside(&mut self, spot: &Spot) {
        let dir = spot.directory();
        if !self.scanned.insert(dir.clone()) {
            return;
        }
        let known = self.troubles.len();
        for (name, is_dir) in self.list(&dir).unwrap_or_default() {
            if !is_dir {
                self.try_load(&dir.join(&name), Choice::Scan, None);
            }
        }
        // Nobody asked for these.
        self.troubles.truncate(known);
    }

    fn try_load(&mut self, spot: &Spot, choice: Choice, place: Option<&Path>) {
        if let Err(error) = self.load(spot, choice, place) {
            let path = self.roots.show(spot);
            let id = self.roots.open(spot, false);
            let id = id.map_or((0, 0), |(_, metadata)| file_id(&metadata));
            let place = place.map(Path::to_path_buf);
            let trouble = Trouble {
                path,
                error,
                place,
                id,
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
        let claimed = self.claim(id);
        self.images.push(image);
        self.add_snapshots(index, snapshots);
        self.want(index, claimed.as_deref());
        Ok(Some(index))
    }

    /// Finds out which files are parts of others. What a guest wrote into an extent may look like an
    /// image, which must become no disk of its own; nor may such an image make others its extents.
    pub(super) fn settle_extents(&mut self) {
        let mut owners: HashMap<FileId, HashSet<FileId>> = HashMap::new();
        let mut parts: HashMap<FileId, Vec<FileId>> = HashMap::new();
        for (owner, part) in &self.named {
            if owners.entry(*part).or_default().insert(*owner) {
                parts.entry(*owner).or_default().push(*part);
            }
        }
        let mut whole: Vec<FileId> = parts.keys().copied().collect();
        whole.retain(|id| !owners.contains_key(id));
        self.extents.clear();
        while let Some(owner) = whole.pop() {
            for part in parts.remove(&owner).unwrap_or_default() {
                if !self.extents.insert(part) {
                    continue;
                }
                // What it names itself counts no more.
                for other in parts.remove(&part).unwrap_or_default() {
                    let rest = owners.entry(other).or_default();
                    rest.remove(&part);
                    if rest.is_empty() && !self.extents.contains(&other) {
                        whole.push(other);
                    }
                }
            }
        }
        // Those that name each other: which is the whole, nobody can tell.
        self.extents.extend(parts.into_values().flatten());
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
                    });
                }
            }
        }
    }

    /// Takes the place of a file that was taken for something else: what a child or the user says
    /// of it counts more than its looks.
    fn claim(&mut self, id: FileId) -> Option<PathBuf> {
        let mut place = None;
        for other in self.images.iter_mut().filter(|other| other.id == id) {
            if std::mem::take(&mut other.wanted) {
                place = Some(other.place.clone());
            }
        }
        self.troubles.retain_mut(|trouble| {
            if trouble.id == id && trouble.place.is_some() {
                place = trouble.place.take();
            }
            trouble.id != id
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
        if self.loaded.contains_key(&(id, None)) {
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
        let source: Arc<dyn Source> = Arc::new(FileSource::new(file)?);
        let layer: Box<dyn Layer> = match &image.what {
            What::Disk => {
                let format = image.facts.format;
                self.open(&image.spot, format, source, &mut Vec::new())?.0
            }
            What::Snapshot(number, _) => {
                let mut open = |name: &str| self.open_extent(&image.spot, name, &mut Vec::new());
                let qcow2 = Qcow2::open(source, &mut open)?;
                let snapshots = qcow2.snapshots()?;
                Box::new(qcow2.at_snapshot(snapshots.get(*number).ok_or_else(changed)?))
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
        let mut open = |name: &str| self.open_extent(spot, name, extents);
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
    fn open_extent(
        &self,
        spot: &Spot,
        name: &str,
        extents: &mut Vec<(FileId, u64)>,
    ) -> Result<Arc<dyn Source>> {
        let mut why = None;
        for candidate in self.roots.candidates(spot, name, false)? {
            match self.roots.open(&candidate, false) {
                Ok((file, metadata)) => {
                    extents.push((file_id(&metadata), metadata.blocks() * 512));
                    return Ok(Arc::new(FileSource::new(file)?));
                }
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

fn is_archive(source: &dyn Source, spot: &Spot) -> Result<bool> {
    let head = read_vec(source, 0, source.len().min(512) as usize)?;
    Ok(ova::is_archive(&head) && spot.extension().is_some_and(|e| e == "ova"))
}

/// A disk in an archive is whole, and of a format that says so.
fn open_member(archive: &ova::Ova, number: usize) -> Result<Box<dyn Layer>> {
    let source = archive.disk(number)?;
    let format = probe::probe(&*source)?;
    let name = &archive.disks()[number].name;
    if format == Format::Raw {
        return Err(Error::new(
            Kind::Unsupported,
            format!("a disk in the archive is of no known format: {name:?}"),
        ));
    }
    let layer = probe::open(source, format, &mut |other| {
        Err(Error::new(
            Kind::Denied,
            format!("a disk in the archive asks for a file outside: {other:?}"),
        ))
    })?;
    if layer.facts().parent.is_some() {
        return Err(Error::new(
            Kind::Unsupported,
            format!("a disk in the archive has a parent: {name:?}"),
        ));
    }
    Ok(layer)
}

/// The format of a file; `None` if it is no image.
fn choose(
    source: &dyn Source,
    spot: &Spot,
    choice: Choice,
    device: bool,
) -> Result<Option<Format>> {
    let extension = spot.extension();
    let extension = extension.as_deref();
    match choice {
        Choice::Exactly(format) => Ok(Some(format)),
        Choice::Probe if device => probe::choose_device(source).map(Some),
        Choice::Probe => probe::choose(source, extension).map(Some),
        Choice::Scan => {
            let named = extension.and_then(Format::named);
            // Change tracking of VMware has the extension of disks and is none.
            let name = spot.path().to_string_lossy();
            if named.is_none() && probe::probe(source)? == Format::Raw
                || name.ends_with("-ctk.vmdk")
            {
                return Ok(None);
            }
            probe::choose(source, extension).map(Some)
        }
        Choice::Backing => {
            let found = probe::probe_named(source, extension)?;
            if found == Format::Raw || extension.and_then(Format::named) == Some(found) {
                return Ok(Some(found));
            }
            Err(Error::new(
                Kind::Invalid,
                format!(
                    "{} looks like {found}, which a guest may have written, and its child does \
                     not say: record the format in the child (qemu-img rebase -u -F)",
                    spot.path().display()
                ),
            ))
        }
    }
}
