//! New ids for the clone of an image: `nodupe clone --new-identity`.
//!
//! Invariants:
//!
//! 1. The clone gets its name when it has its new ids, in one instant; until then it has none, and
//!    is gone with the process. Of a VMDK of several files the descriptor gets its name last.
//! 2. What a guest wrote decides neither which bytes are changed nor which files are cloned.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, fchown};
use std::path::Path;

use nodupe::error::{Error, Kind, Result};
use nodupe::formats::layout::{Ids, renew, renew_descriptor};
use nodupe::formats::{FileSource, Format};
use nodupe::sys::files;

use super::{image, unnamed};

/// Makes a clone of `src` with new ids: `name` in `dir`, a directory of the same mounted pool.
pub(super) fn clone(src: &Path, dir: &Path, name: &str, preserve: bool) -> Result<()> {
    let failed = |error| Error::io(format!("cannot open {}", src.display()), error);
    let source = File::open(src).map_err(failed)?;
    let is_file = source.metadata().is_ok_and(|metadata| metadata.is_file());
    if !is_file {
        return Err(Error::new(
            Kind::Invalid,
            "only the clone of a file gets a new identity: clone a directory file by file",
        ));
    }
    let bytes = FileSource::new(source.try_clone().map_err(failed)?)?;
    // I2.
    let format = match image::choose(&bytes, src) {
        Err(error) if error.kind() == Kind::Invalid => {
            return Err(Error::new(
                Kind::Invalid,
                "the name of the image and its contents disagree about the format: make another \
                 image with nodupe convert --from FORMAT, which copies no data either",
            ));
        }
        // The error itself names --from, which only other verbs have.
        Err(error) if error.kind() == Kind::Unsupported => {
            return Err(Error::new(
                Kind::Unsupported,
                "it is compressed, or an image of a kind that is not read: clone it without \
                 --new-identity",
            ));
        }
        format => format?,
    };
    let ids = Ids::random()?;
    if format == Format::Vmdk {
        let mut parts = Parts::new(src, name)?;
        let text = renew_descriptor(&bytes, &ids, &mut |part| parts.rename(part))?;
        if let Some(text) = text {
            return parts.publish(src, dir, preserve, |dir| {
                let file = unnamed::create(dir, 0o600, false)?;
                change(&file, 0, &text)?;
                finish(&source, &file, preserve)?;
                unnamed::publish(&file, dir, name, preserve)
            });
        }
    }
    // Refused before anything is made.
    renew(&bytes, format, &ids)?;
    let file = unnamed::create(dir, 0o600, false)?;
    unnamed::copy_all(&source, &file, u64::MAX)?;
    // The clone, which nobody writes to meanwhile, decides where they go.
    let bytes = FileSource::new(file.try_clone().map_err(failed)?)?;
    for (at, edit) in renew(&bytes, format, &ids)? {
        change(&file, at, &edit)?;
    }
    finish(&source, &file, preserve)?;
    unnamed::publish(&file, dir, name, preserve)
}

fn change(file: &File, at: u64, bytes: &[u8]) -> Result<()> {
    let failed = |error| Error::io("cannot change the clone", error);
    file.write_all_at(bytes, at).map_err(failed)
}

/// Gives the clone what its source has beside its contents.
fn finish(source: &File, file: &File, preserve: bool) -> Result<()> {
    let failed = |error| Error::io("cannot give the clone the attributes of the source", error);
    let metadata = source.metadata().map_err(failed)?;
    if preserve {
        fchown(file, Some(metadata.uid()), Some(metadata.gid())).map_err(failed)?;
    }
    // Access lists change the mode, and the mode changes them: it comes last.
    files::copy_attributes(source, file).map_err(failed)?;
    file.set_permissions(metadata.permissions()).map_err(failed)
}

/// The further files of a VMDK, and what their clones are called.
struct Parts {
    /// Beginning of the names of the original, and of the clone.
    stems: (String, String),
    names: BTreeMap<String, String>,
}

impl Parts {
    fn new(src: &Path, name: &str) -> Result<Self> {
        let stem = |name: &Path| Some(name.file_stem()?.to_str()?.to_owned());
        let stems = stem(src).zip(stem(Path::new(name)));
        let stems = stems.filter(|(_, new)| !new.contains(['"', '\n', '\r']));
        Ok(Self {
            stems: stems.ok_or_else(|| {
                Error::new(Kind::Invalid, "a VMDK cannot name its parts by such a name")
            })?,
            names: BTreeMap::new(),
        })
    }

    fn rename(&mut self, part: &str) -> Result<String> {
        if part.contains(['/', '\\', '\0']) || matches!(part, "" | "." | "..") {
            return Err(Error::new(
                Kind::Unsupported,
                "a part of the VMDK is in another directory: use nodupe convert, which copies no \
                 data either",
            ));
        }
        let (old, new) = &self.stems;
        let renamed = match part.strip_prefix(old.as_str()) {
            Some(rest) => format!("{new}{rest}"),
            None => format!("{new}-{part}"),
        };
        self.names.insert(part.to_owned(), renamed.clone());
        Ok(renamed)
    }

    /// Clones the parts, and then what `last` makes: all get their names, or none.
    fn publish(
        &self,
        src: &Path,
        dir: &Path,
        preserve: bool,
        last: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let mut made = Vec::new();
        let all = || {
            for (part, name) in &self.names {
                let path = src.with_file_name(part);
                let failed = |error| Error::io(format!("cannot open {}", path.display()), error);
                let file = files::open_itself(&path).map_err(failed)?;
                if !file.metadata().map_err(failed)?.is_file() {
                    let what = format!("{} is no regular file", path.display());
                    return Err(Error::new(Kind::Invalid, what));
                }
                unnamed::publish(&file, dir, name, preserve)?;
                made.push(dir.join(name));
            }
            last(dir)
        };
        let outcome = all();
        if outcome.is_err() {
            // Made a moment ago, and of no use without the others.
            made.iter().for_each(|path| drop(fs::remove_file(path)));
        }
        outcome
    }
}
