//! New ids for the clone of an image: `nodupe clone --new-identity`.
//!
//! Invariants:
//!
//! 1. The clone gets its name when it has its new ids, in one instant.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use nodupe::error::{Error, Kind, Result};
use nodupe::formats::FileSource;
use nodupe::formats::layout::{Ids, renew};

use super::{image, unnamed};

/// Makes a clone of `src` with new ids: `name` in `dir`, a directory of the same mounted pool.
pub(super) fn clone(src: &Path, dir: &Path, name: &str, preserve: bool) -> Result<()> {
    let opened = |path: &Path| {
        let failed = |error| Error::io(format!("cannot open {}", path.display()), error);
        File::open(path).map_err(failed)
    };
    let source = opened(src)?;
    let is_file = source.metadata().is_ok_and(|metadata| metadata.is_file());
    if !is_file {
        return Err(Error::new(
            Kind::Invalid,
            "only the clone of a file gets a new identity: clone a directory file by file",
        ));
    }
    let bytes = FileSource::new(source)?;
    // What a guest wrote must not decide which bytes are changed.
    let format = match image::choose(&bytes, src) {
        Err(error) if error.kind() == Kind::Invalid => {
            return Err(Error::new(
                Kind::Invalid,
                "the name of the image and its contents disagree about the format: make another \
                 image with nodupe convert --from FORMAT, which copies no data either",
            ));
        }
        format => format?,
    };
    // Refused before anything is made.
    renew(&bytes, format, &Ids::random()?)?;
    let hidden = unnamed::hidden(".nodupe-")?;
    unnamed::publish(&opened(src)?, dir, &hidden, preserve)?;
    let path = dir.join(&hidden);
    let file = writable(&path);
    let removed = fs::remove_file(&path);
    let failed = |error| Error::io(format!("cannot change {}", path.display()), error);
    let (file, permissions) = file.map_err(failed)?;
    removed.map_err(failed)?;
    let bytes = FileSource::new(file.try_clone().map_err(failed)?)?;
    for (at, edit) in renew(&bytes, format, &Ids::random()?)? {
        file.write_all_at(&edit, at).map_err(failed)?;
    }
    file.set_permissions(permissions).map_err(failed)?;
    unnamed::publish(&file, dir, name, preserve)
}

/// Opens a file of ours to write, whatever its mode, and tells the mode that it had.
fn writable(path: &Path) -> io::Result<(File, Permissions)> {
    let before = fs::symlink_metadata(path)?.permissions();
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    let file = File::options().read(true).write(true).open(path)?;
    Ok((file, before))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_only_read_can_be_changed_by_its_owner() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::set_permissions(file.path(), Permissions::from_mode(0o444)).unwrap();
        let (open, before) = writable(file.path()).unwrap();
        open.write_all_at(b"x", 0).unwrap();
        assert_eq!(before.mode() & 0o7777, 0o444);
        let now = file.path().metadata().unwrap().permissions().mode();
        assert_eq!(now & 0o7777, 0o600, "the owner alone, and to write");
    }
}
