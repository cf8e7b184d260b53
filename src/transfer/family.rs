//! Who is whose parent: from ids, content ids and names, in the order in which they can be trusted.
//!
//! Invariants:
//!
//! 1. Where a format has ids, a parent is taken only if its id is the one that the child wants. A
//!    name alone counts only for qcow2, which has nothing else.
//! 2. Every image ends with a parent that can be had, with none, or with a reason. No chain is a
//!    circle, or longer than [`DEPTH_MAX`].

use std::collections::{HashSet, VecDeque};
use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;

use super::library::{Library, Parent, Through, What};
use super::looks::Choice;
use crate::error::{Error, Kind, Result};
use crate::formats::chain::Chain;
use crate::formats::{FileSource, Format, Identity, ParentRef};

/// Longest chain. Products stop far below: Hyper-V at 50, VMware at 32.
const DEPTH_MAX: usize = 256;

impl Library {
    /// Finds the parents of all images that are wanted, and the parents of these.
    pub fn resolve(&mut self) {
        self.settle_extents();
        let (mut asked, mut pending) = (HashSet::new(), VecDeque::new());
        loop {
            // What is found on the way may take the place of what was wanted.
            let images = self.images().iter().enumerate();
            let wanted = images.filter(|(index, image)| image.wanted && !asked.contains(index));
            pending.extend(wanted.map(|(index, _)| index));
            if pending.is_empty() {
                break;
            }
            while let Some(index) = pending.pop_front() {
                if !asked.insert(index) || self.images()[index].facts.parent.is_none() {
                    continue;
                }
                let parent = match self.find_parent(index) {
                    Ok((parent, how)) => {
                        pending.push_back(parent);
                        Parent::Image(parent, how)
                    }
                    Err(error) => Parent::Missing(in_words(&error)),
                };
                self.image_mut(index).parent = parent;
            }
        }
        // What a scan found beside them: looking for its parents could mean a walk of all trees.
        for index in 0..self.images().len() {
            if !asked.contains(&index) && self.images()[index].facts.parent.is_some() {
                let why = "nobody asked for it".to_owned();
                self.image_mut(index).parent = Parent::Missing(why);
            }
        }
        // Parents may have extents as well.
        self.settle_extents();
        self.cut_circles();
    }

    /// The disk of an image, with all its parents, open to be read.
    ///
    /// # Errors
    /// As [`chain`](Self::chain) and [`layer`](Self::layer).
    pub fn disk(&self, index: usize) -> Result<Chain> {
        self.disk_through(index, &mut |file| Ok(Arc::new(FileSource::new(file)?)))
    }

    /// As [`disk`](Self::disk), with its files read by what `through` makes of each.
    ///
    /// # Errors
    /// As [`disk`](Self::disk), and those of `through`.
    pub fn disk_through(&self, index: usize, through: Through<'_>) -> Result<Chain> {
        let chain = self.chain(index)?.into_iter();
        let layers = chain.map(|index| self.layer_through(index, through));
        Ok(Chain::new(layers.collect::<Result<_>>()?))
    }

    /// The images from `index` to its oldest parent.
    ///
    /// # Errors
    /// `NotFound` if one of them has a parent that is not to be had.
    pub fn chain(&self, index: usize) -> Result<Vec<usize>> {
        let mut chain = vec![index];
        let mut at = index;
        loop {
            at = match &self.images()[at].parent {
                Parent::None => return Ok(chain),
                Parent::Image(parent, _) => *parent,
                Parent::Missing(why) if chain.len() == 1 => {
                    return Err(Error::new(Kind::NotFound, why.clone()));
                }
                Parent::Missing(why) => {
                    return Err(Error::new(
                        Kind::NotFound,
                        format!("of its parent {}: {why}", self.path(at).display()),
                    ));
                }
            };
            chain.push(at);
        }
    }

    fn find_parent(&mut self, index: usize) -> Result<(usize, &'static str)> {
        let image = self.images()[index].clone();
        let Some(wanted) = image.facts.parent.clone() else {
            return Err(Error::new(Kind::NotFound, "it has no parent"));
        };
        let proven = wanted.identity.is_some();
        let choice = match (&wanted.format, proven) {
            (_, true) => Choice::Exactly(image.facts.format),
            (None, false) => Choice::Backing,
            (Some(name), false) => Choice::Exactly(Format::named(name).ok_or_else(|| {
                let what = format!("the format of its backing file is not read: {name:?}");
                Error::new(Kind::Unsupported, what)
            })?),
        };
        let mut why: Option<Error> = None;
        for name in &wanted.names {
            match self.by_name(index, name, choice, &wanted) {
                Ok(parent) => return Ok((parent, "by name")),
                // That it is there and another one says more than that it is not.
                Err(error) if why.as_ref().is_none_or(|w| w.kind() == Kind::NotFound) => {
                    why = Some(error);
                }
                Err(_) => {}
            }
        }
        let by_uuid = matches!(wanted.identity, Some(Identity::Uuid(_)));
        if by_uuid {
            self.scan_beside(&image.spot);
        }
        if proven && let Some(parent) = self.by_identity(index, &wanted)? {
            return Ok((parent, "by id"));
        }
        if by_uuid {
            self.scan_roots();
            if let Some(parent) = self.by_identity(index, &wanted)? {
                return Ok((parent, "by id"));
            }
        }
        Err(why.unwrap_or_else(|| missing(&wanted)))
    }

    fn by_name(
        &mut self,
        child: usize,
        name: &str,
        choice: Choice,
        wanted: &ParentRef,
    ) -> Result<usize> {
        let spot = self.images()[child].spot.clone();
        let loose = wanted.identity.is_some();
        let mut why = None;
        for candidate in self.roots().candidates(&spot, name, loose)? {
            let outcome = self
                .load(&candidate, choice, None)
                .and_then(|found| found.ok_or_else(|| missing(wanted)))
                .and_then(|found| self.check(child, found, wanted).map(|()| found));
            match outcome {
                Ok(found) => return Ok(found),
                Err(error) if error.kind() == Kind::NotFound => {}
                Err(error) => {
                    why.get_or_insert(error);
                }
            }
        }
        Err(why.unwrap_or_else(|| {
            Error::new(Kind::NotFound, format!("its parent {name:?} is missing"))
        }))
    }

    /// The one image with the id that is wanted. Copies have the same: then the one beside the
    /// child, or none.
    fn by_identity(&self, child: usize, wanted: &ParentRef) -> Result<Option<usize>> {
        let images = self.images();
        let home = images[child].spot.directory();
        let suits = |index: &usize| {
            let image = &images[*index];
            image.what == What::Disk
                && !image.is_extent
                && image.id != images[child].id
                && image.facts.identity == wanted.identity
                // Content ids are short, and all new disks of QEMU have the same.
                && match wanted.identity {
                    Some(Identity::Cid(_)) => has_name(&image.spot.path().to_string_lossy(), wanted),
                    _ => true,
                }
        };
        let mut found: Vec<usize> = (0..images.len()).filter(suits).collect();
        let unchanged = |index: &usize| self.check(child, *index, wanted).is_ok();
        match found.iter().copied().find(|index| unchanged(index)) {
            None => match found.first() {
                None => return Ok(None),
                Some(first) => self.check(child, *first, wanted)?,
            },
            Some(_) => found.retain(unchanged),
        }
        if found.len() > 1 {
            found.retain(|index| images[*index].spot.directory() == home);
        }
        match found[..] {
            [one] => Ok(Some(one)),
            _ => Err(Error::new(
                Kind::Invalid,
                "several images have the id of its parent: leave one of them in the library",
            )),
        }
    }

    /// Fails if an image is not, or no longer, what the child was made from.
    fn check(&self, child: usize, found: usize, wanted: &ParentRef) -> Result<()> {
        let (image, name) = (&self.images()[found], self.path(found));
        let wrong = |what: &str| Error::new(Kind::Invalid, format!("{} {what}", name.display()));
        if image.id == self.images()[child].id {
            return Err(wrong("is its own parent: its chain is a circle"));
        }
        if wanted.identity.is_some() && image.facts.identity != wanted.identity {
            return Err(wrong(match wanted.identity {
                Some(Identity::Cid(_)) => "was changed since the child was made: its CID differs",
                _ => "is another image than its parent, or was changed: its UUID differs",
            }));
        }
        if wanted.version.is_some() && image.facts.version != wanted.version {
            return Err(wrong(
                "was changed since the child was made: its modification UUID differs",
            ));
        }
        Ok(())
    }

    /// I2.
    fn cut_circles(&mut self) {
        // What is known to end: 0 unknown, else images to the end of the chain.
        let mut depth = vec![0_usize; self.images().len()];
        for start in 0..self.images().len() {
            let (mut way, mut seen, mut at) = (Vec::new(), HashSet::new(), start);
            let why = loop {
                if depth[at] > 0 {
                    break None;
                }
                if !seen.insert(at) {
                    break Some("its chain is a circle");
                }
                way.push(at);
                match self.images()[at].parent {
                    Parent::Image(parent, _) => at = parent,
                    _ => break None,
                }
            };
            let names = match why {
                Some(_) => self.names(&way),
                None => String::new(),
            };
            let mut below = depth[at];
            for index in way.into_iter().rev() {
                below += 1;
                depth[index] = below;
                if let Some(why) = why {
                    let text = format!("{why}: {names}");
                    self.image_mut(index).parent = Parent::Missing(text);
                } else if below > DEPTH_MAX {
                    let text = format!("its chain has more than {DEPTH_MAX} images");
                    self.image_mut(index).parent = Parent::Missing(text);
                }
            }
        }
    }

    fn names(&self, way: &[usize]) -> String {
        const SHOWN: usize = 4;
        let show = |index: &usize| self.images()[*index].spot.path().display().to_string();
        let names: Vec<String> = way.iter().take(SHOWN).map(show).collect();
        let more = if way.len() > SHOWN { ", ..." } else { "" };
        format!("{}{more}", names.join(", "))
    }
}

/// True if a path ends in a name that the child has for its parent.
fn has_name(path: &str, wanted: &ParentRef) -> bool {
    let base = |name: &str| name.rsplit(['/', '\\']).next().map(str::to_ascii_lowercase);
    wanted.names.iter().any(|name| base(name) == base(path))
}

fn missing(wanted: &ParentRef) -> Error {
    let what = match (&wanted.identity, wanted.names.first()) {
        (_, Some(name)) => format!("its parent {name:?} is missing"),
        (Some(Identity::Uuid(uuid)), None) => format!("its parent with the UUID {uuid} is missing"),
        _ => "it has a parent and does not say which".to_owned(),
    };
    Error::new(Kind::NotFound, what)
}

/// An error and its causes, for one line.
fn in_words(error: &(dyn std::error::Error + 'static)) -> String {
    fn join(text: String, next: &dyn Display) -> String {
        format!("{text}: {next}")
    }
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = join(text, &error);
        next = error.source();
    }
    text
}

/// The name of an image's file without what stands behind the last dot.
pub(super) fn stem(path: &Path) -> String {
    path.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
