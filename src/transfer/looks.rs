//! What the files of a library are: images, archives, or parts of other images.
//!
//! Invariants:
//!
//! 1. What a guest may have written decides nothing where a name, a child or the user says more.

use std::collections::{HashMap, HashSet};

use super::roots::{FileId, Spot};
use crate::error::{Error, Kind, Result};
use crate::formats::source::read_vec;
use crate::formats::{Format, Layer, Source, ova, probe};

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

/// Which files are parts of others, of pairs of an image and a file that it names as its own. Only
/// a whole image has extents: what a guest wrote into one may claim any.
pub(super) fn extents(named: &[(FileId, FileId)]) -> HashSet<FileId> {
    let mut owners: HashMap<FileId, HashSet<FileId>> = HashMap::new();
    let mut parts: HashMap<FileId, Vec<FileId>> = HashMap::new();
    for (owner, part) in named {
        if owners.entry(*part).or_default().insert(*owner) {
            parts.entry(*owner).or_default().push(*part);
        }
    }
    let mut whole: Vec<FileId> = parts.keys().copied().collect();
    whole.retain(|id| !owners.contains_key(id));
    let mut extents = HashSet::new();
    while let Some(owner) = whole.pop() {
        for part in parts.remove(&owner).unwrap_or_default() {
            if !extents.insert(part) {
                continue;
            }
            // What it names itself counts no more.
            for other in parts.remove(&part).unwrap_or_default() {
                let rest = owners.entry(other).or_default();
                rest.remove(&part);
                if rest.is_empty() && !extents.contains(&other) {
                    whole.push(other);
                }
            }
        }
    }
    // Those that name each other: which is the whole, nobody can tell.
    extents.extend(parts.into_values().flatten());
    extents
}

/// True if the file is an archive of disks, by its contents and its name.
pub(super) fn is_archive(source: &dyn Source, spot: &Spot) -> Result<bool> {
    let head = read_vec(source, 0, source.len().min(512) as usize)?;
    Ok(ova::is_archive(&head) && spot.extension().is_some_and(|e| e == "ova"))
}

/// A disk in an archive is whole, and of a format that says so.
pub(super) fn open_member(archive: &ova::Ova, number: usize) -> Result<Box<dyn Layer>> {
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
pub(super) fn choose(
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
            if found == Format::Raw && extension.and_then(Format::named).is_none() {
                probe::refuse_foreign(source)?;
            }
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
