//! The blocks of files as their daemon tells them: places in the pool and checksums.
//!
//! Invariants:
//!
//! 1. Memory is bounded: [`Seen`] forgets nothing, and takes in no more when it is full.
//! 2. What a [`Tree`] opens is a regular file of its filesystem below its directory, whatever became
//!    of the names since they were read.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nodupe::control::{self, Request, Response};
use nodupe::engine::{Place, Places};
use nodupe::error::{Error, Kind, Result};
use nodupe::sys::files;

/// Most runs of places that are remembered: about 25 MiB.
const SEEN_MAX: usize = 512 * 1024;

/// Blocks between two new runs that are asked for as well.
const GAP: u64 = 64;

/// Tells all runs of blocks of an open file.
pub(super) fn runs(file: &File, mut visit: impl FnMut(Place) -> Result<()>) -> Result<()> {
    pages(file, (0, u64::MAX), false, |found| {
        found.runs.into_iter().try_for_each(&mut visit)
    })
}

/// Tells the blocks of an open file whose places are new, and perhaps some others.
pub(super) fn fresh(
    file: &File,
    seen: &mut Seen,
    mut visit: impl FnMut(u64, u64, u32),
) -> Result<()> {
    // Little pieces are asked for together.
    let mut wanted: Option<(u64, u64)> = None;
    runs(file, |run| {
        for (skip, count) in seen.add(run.block, run.count) {
            let (from, to) = (run.at + skip, run.at + skip + count);
            match &mut wanted {
                Some(wanted) if from <= wanted.1 + GAP => wanted.1 = to,
                _ => {
                    if let Some(range) = wanted.replace((from, to)) {
                        sums(file, range, &mut visit)?;
                    }
                }
            }
        }
        Ok(())
    })?;
    wanted.map_or(Ok(()), |range| sums(file, range, visit))
}

/// Tells the blocks from `from` to `to` of an open file: number, place and checksum.
fn sums(file: &File, (from, to): (u64, u64), mut visit: impl FnMut(u64, u64, u32)) -> Result<()> {
    pages(file, (from, to), true, |found| {
        let runs = found.runs.iter();
        let blocks = runs.flat_map(|run| (0..run.count).map(|i| (run.at + i, run.block + i)));
        let sums = found.sums.iter();
        blocks
            .zip(sums)
            .for_each(|((at, block), sum)| visit(at, block, *sum));
        Ok(())
    })
}

/// Asks page by page.
fn pages(
    file: &File,
    (mut from, to): (u64, u64),
    sums: bool,
    mut visit: impl FnMut(Places) -> Result<()>,
) -> Result<()> {
    while from < to {
        let request = Request::Places { from, to, sums };
        let found = match control::call(file.as_fd(), &request)? {
            Response::Places(found) if found.next > from && is_sound(&found) => found,
            _ => return Err(nonsense()),
        };
        from = found.next;
        visit(found)?;
    }
    Ok(())
}

/// Numbers that can be added.
fn is_sound(found: &Places) -> bool {
    let fits = |at: u64, count: u64| at.checked_add(count).is_some();
    let mut runs = found.runs.iter();
    runs.all(|run| run.count > 0 && fits(run.at, run.count) && fits(run.block, run.count))
}

pub(super) fn nonsense() -> Error {
    Error::new(
        Kind::Unsupported,
        "the daemon of the pool answers nonsense: use the same version of nodupe",
    )
}

/// A directory whose files are opened by the paths that a walk found.
#[derive(Debug)]
pub(super) struct Tree {
    path: PathBuf,
    dir: File,
    device: u64,
}

impl Tree {
    /// Files below `path`, on the same device.
    ///
    /// # Errors
    /// `Io` and the like if it cannot be opened.
    pub(super) fn new(path: &Path) -> Result<Self> {
        let failed = |error| Error::io(format!("cannot open {}", path.display()), error);
        let dir = files::directory(path).map_err(failed)?;
        Ok(Self {
            path: path.to_path_buf(),
            device: dir.metadata().map_err(failed)?.dev(),
            dir,
        })
    }

    /// Device of its files.
    pub(super) fn device(&self) -> u64 {
        self.device
    }

    /// Opens a file by its whole path, to read or to `write` as well (I2).
    ///
    /// # Errors
    /// What opening it answers; `Invalid` if something else is there now.
    pub(super) fn open(&self, path: &Path, write: bool) -> Result<File> {
        let failed = |error| Error::io(format!("cannot open {}", path.display()), error);
        let other = || {
            let what = "another thing than a file of this pool has that name now";
            Error::new(Kind::Invalid, what)
        };
        let below = path.strip_prefix(&self.path).map_err(|_| other())?;
        let opened = match write {
            true => files::open_beneath_to_write(self.dir.as_fd(), below),
            false => files::open_beneath(self.dir.as_fd(), below),
        };
        let file = opened.map_err(|error| match files::leads_out(&error) {
            true => other(),
            false => failed(error),
        })?;
        let metadata = file.metadata().map_err(failed)?;
        match metadata.is_file() && metadata.dev() == self.device {
            true => Ok(file),
            false => Err(other()),
        }
    }
}

/// Regular files below a directory, on the same device, by name. `failed` is told of directories
/// that cannot be looked into.
pub(super) fn files_below(
    dir: &Path,
    device: u64,
    mut failed: impl FnMut(&Path, &io::Error),
) -> Vec<(PathBuf, Metadata)> {
    let (mut found, mut pending) = (Vec::new(), vec![dir.to_path_buf()]);
    while let Some(dir) = pending.pop() {
        let entries = match fs::read_dir(&dir).and_then(Iterator::collect::<io::Result<Vec<_>>>) {
            Ok(entries) => entries,
            Err(error) => {
                failed(&dir, &error);
                continue;
            }
        };
        for entry in entries {
            // Of a link this is the link itself; what is gone by now is left out.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            match metadata.file_type() {
                _ if metadata.dev() != device => {}
                kind if kind.is_dir() => pending.push(entry.path()),
                kind if kind.is_file() => found.push((entry.path(), metadata)),
                _ => {}
            }
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// Places that were seen: what many clones share is looked at once.
#[derive(Debug, Default)]
pub(super) struct Seen(BTreeMap<u64, u64>);

impl Seen {
    /// Adds a run of places. Returns the parts of it that are new, counted from its beginning.
    pub(super) fn add(&mut self, first: u64, count: u64) -> Vec<(u64, u64)> {
        let (mut at, end) = (first, first + count);
        let mut fresh = Vec::new();
        let before = self.0.range(..=first).next_back();
        let (mut start, mut stop) = (first, end);
        if let Some((known, known_end)) = before.filter(|known| *known.1 >= first) {
            (start, stop) = (*known, stop.max(*known_end));
            at = at.max(*known_end);
        }
        if at >= end {
            return fresh;
        }
        let behind: Vec<(u64, u64)> = self.0.range(at..=end).map(|(a, b)| (*a, *b)).collect();
        for (known, known_end) in behind {
            if known > at && at < end {
                fresh.push((at - first, known.min(end) - at));
            }
            at = at.max(known_end);
            stop = stop.max(known_end);
            self.0.remove(&known);
        }
        if at < end {
            fresh.push((at - first, end - at));
        }
        if self.0.len() < SEEN_MAX || start < first {
            self.0.insert(start, stop); // I1
        }
        fresh
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_the_tree_are_opened() {
        use std::os::unix::{fs::symlink, net::UnixListener};
        let (home, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = |name: &str| home.path().join(name);
        fs::write(at("file"), "f").unwrap();
        fs::write(outside.path().join("file"), "o").unwrap();
        symlink(outside.path().join("file"), at("link")).unwrap();
        symlink(outside.path(), at("dir")).unwrap();
        symlink("/dev/null", at("device")).unwrap();
        let _listener = UnixListener::bind(at("socket")).unwrap();
        let mut tree = Tree::new(home.path()).unwrap();
        for write in [false, true] {
            assert!(tree.open(&at("file"), write).is_ok());
            for name in ["link", "dir/file", "device", "socket", "missing"] {
                assert!(tree.open(&at(name), write).is_err(), "{name}");
            }
            assert!(tree.open(&outside.path().join("file"), write).is_err());
        }
        tree.device += 1;
        let refused = tree.open(&at("file"), false).map_err(|e| e.kind());
        assert!(matches!(refused, Err(Kind::Invalid)));
    }

    #[test]
    fn a_place_is_new_once() {
        let mut seen = Seen::default();
        assert_eq!(seen.add(100, 10), [(0, 10)]);
        assert_eq!(seen.add(100, 10), []);
        assert_eq!(seen.add(102, 3), []);
        assert_eq!(seen.add(95, 10), [(0, 5)]);
        assert_eq!(seen.add(120, 5), [(0, 5)]);
        assert_eq!(seen.add(90, 50), [(0, 5), (20, 10), (35, 15)]);
        assert_eq!(seen.add(90, 50), []);
        assert_eq!(seen.add(140, 1), [(0, 1)]);
        assert_eq!(seen.0, BTreeMap::from([(90, 141)]));
        assert_eq!(seen.add(0, 1000), [(0, 90), (141, 859)]);
    }

    #[test]
    fn places_are_new_as_a_set_says() {
        let (mut seen, mut known) = (Seen::default(), std::collections::HashSet::new());
        let mut state = 7_u64;
        for _ in 0..5000 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let (first, count) = (state >> 40 & 1023, (state >> 20 & 31) + 1);
            let mut fresh = vec![false; count as usize];
            for (at, count) in seen.add(first, count) {
                (at..at + count).for_each(|i| fresh[i as usize] = true);
            }
            for (i, fresh) in (first..).zip(fresh) {
                assert_eq!(known.insert(i), fresh, "{i}");
            }
        }
    }
}
