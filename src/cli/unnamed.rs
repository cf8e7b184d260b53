//! Files of a pool that have no name until they are complete.
//!
//! Invariants:
//!
//! 1. A file is made under a hidden name, which the daemon takes away in the same request: whatever
//!    ends the process takes the contents with it. Only a power cut between the two halves leaves
//!    an empty file, which a later import into the directory removes.
//! 2. The file gets its name by one request to the daemon: a clone of all of it, in one instant.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use nodupe::control::{self, Request, Response};
use nodupe::error::{Error, Kind, Result};
use nodupe::sys::{self, files};
use nodupe::vfs::UNNAMED_PREFIX as PREFIX;

/// Age at which a hidden name belongs to nobody who lives: it is there for microseconds.
const AGE: Duration = Duration::from_secs(60);

/// A name that nobody uses, which begins so.
fn hidden(prefix: &str) -> Result<String> {
    let random = sys::control::random()
        .map_err(|error| Error::io("no random numbers from the system", error))?;
    let digits: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{prefix}{digits}"))
}

/// A new file without a name, on the filesystem of `dir`. `direct`: written past the page cache.
pub(super) fn create(dir: &Path, mode: u32, direct: bool) -> Result<File> {
    let path = dir.join(hidden(PREFIX)?);
    let failed = |error| Error::io(format!("cannot make a file in {}", dir.display()), error);
    let file = files::create_new(&path, mode, direct).map_err(failed)?;
    // The daemon took the name away already. The kernel has to learn it, or it keeps the file.
    match fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failed(error)),
        _ => Ok(file),
    }
}

/// Gives `to`, which is empty, the contents of `from`, a file of the same pool, as far as `size`.
pub(super) fn copy_all(from: &File, to: &File, size: u64) -> Result<()> {
    let failed = |error| Error::io("cannot clone the contents", error);
    let mut done = 0;
    while done < size {
        match files::copy_range(from, done, to, done, size - done).map_err(failed)? {
            0 => break,
            copied => done += copied,
        }
    }
    Ok(())
}

/// Makes one copy within the mount that `dir` is in, before several threads do. Linux 6.18 asks for
/// copies in a new way first; if the first two of a mount are under way at once it misunderstands
/// that the daemon does not know the new way, and shares nothing any more until the next mount.
pub(super) fn copy_once(dir: &Path) -> Result<()> {
    let failed = |error| Error::io(format!("cannot write in {}", dir.display()), error);
    let file = create(dir, 0o600, false)?;
    file.write_all_at(b"x", 0).map_err(failed)?;
    files::copy_range(&file, 0, &file, 1, 1).map_err(failed)?;
    Ok(())
}

/// As [`copy_once`], of a new mount. A pool that is full, or a directory that is somebody else's, goes
/// without. Never in the daemon: if it is killed meanwhile, its end waits for its own answer.
pub(super) fn prime(dir: &Path) {
    if let Err(error) = copy_once(dir) {
        log::info!("no first copy in {}: {error}", dir.display());
    }
}

/// Gives the contents of `file` the name `name` in `dir`. `preserve`: with its owner, mode and times.
pub(super) fn publish(file: &File, dir: &Path, name: &str, preserve: bool) -> Result<()> {
    let into = File::open(dir)
        .map_err(|error| Error::io(format!("cannot open {}", dir.display()), error))?;
    let Response::Token(source) = control::call(file.as_fd(), &Request::Token)? else {
        return Err(Error::new(
            Kind::Unsupported,
            "the daemon of the pool answers nonsense: use the same version of nodupe",
        ));
    };
    let request = Request::Clone {
        source,
        name: name.to_owned(),
        count: None,
        preserve,
    };
    control::call(into.as_fd(), &request).map(drop)
}

/// Removes what imports and conversions left that were killed in the wrong microsecond.
pub(super) fn clean(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        let old = metadata
            .modified()
            .is_ok_and(|time| time.elapsed().is_ok_and(|age| age > AGE));
        if entry.file_name().to_string_lossy().starts_with(PREFIX)
            && metadata.is_file()
            && metadata.len() == 0
            && old
        {
            // Somebody else may have done so, or may not let us.
            drop(fs::remove_file(entry.path()));
        }
    }
}
