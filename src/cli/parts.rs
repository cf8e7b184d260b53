//! New files outside of a pool: hidden until all are there, gone if that fails.
//!
//! Invariants:
//!
//! 1. What has the name of a new file already is never replaced.
//! 2. All files get their names and those last, or none has one.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nodupe::error::{Error, Kind, Result};
use nodupe::sys::files;

use super::convert;
use super::output::show;

/// Files that are written, each with the name that it will have.
#[derive(Debug, Default)]
pub(super) struct Parts {
    made: RefCell<Vec<(PathBuf, PathBuf)>>,
}

impl Parts {
    /// Makes the file that will be `path`.
    pub(super) fn create(&self, path: &Path) -> Result<File> {
        if fs::symlink_metadata(path).is_ok() {
            return Err(exists(path));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let hidden = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&hidden)
            .map_err(|error| failed(path, error))?;
        self.made.borrow_mut().push((hidden, path.to_path_buf()));
        Ok(file)
    }

    /// Gives the files, which are durable, their names.
    pub(super) fn publish(&self) -> Result<()> {
        let mut published = Vec::new();
        let outcome = self.publish_all(&mut published);
        if outcome.is_err() {
            for path in &published {
                // Made a moment ago, and of no use without the others.
                drop(fs::remove_file(path));
            }
        }
        outcome
    }

    fn publish_all(&self, published: &mut Vec<PathBuf>) -> Result<()> {
        while let Some((hidden, path)) = self.made.borrow().first().cloned() {
            files::rename_new(&hidden, &path).map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => exists(&path),
                _ => failed(&path, error),
            })?;
            self.made.borrow_mut().remove(0);
            published.push(path);
        }
        // All are in one directory.
        let Some(path) = published.first() else {
            return Ok(());
        };
        let dir = convert::parent_of(path).unwrap_or_else(|_| PathBuf::from("."));
        let synced = File::open(dir).and_then(|dir| dir.sync_all());
        match synced {
            // A file system that does not sync directories.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            synced => synced.map_err(|error| failed(path, error)),
        }
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        for (hidden, _) in self.made.take() {
            // Whatever went wrong is told already.
            drop(fs::remove_file(hidden));
        }
    }
}

fn exists(path: &Path) -> Error {
    let what = format!("{} exists: remove it first", show(path));
    Error::new(Kind::Exists, what)
}

fn failed(path: &Path, error: io::Error) -> Error {
    Error::io(format!("cannot make {}", show(path)), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_files_get_their_names_or_none_does() {
        let dir = tempfile::tempdir().unwrap();
        let names = ["a", "b"].map(|name| dir.path().join(name));
        let parts = Parts::default();
        for name in &names {
            parts.create(name).unwrap();
        }
        // Somebody else was faster.
        fs::write(&names[1], "theirs").unwrap();
        let error = parts.publish().unwrap_err();
        assert_eq!(error.kind(), Kind::Exists);
        drop(parts);
        let left = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 1, "only what is theirs");
        assert_eq!(fs::read(&names[1]).unwrap(), b"theirs");
        fs::remove_file(&names[1]).unwrap();
        let parts = Parts::default();
        for name in &names {
            parts.create(name).unwrap();
        }
        parts.publish().unwrap();
        drop(parts);
        assert!(names.iter().all(|name| name.exists()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
