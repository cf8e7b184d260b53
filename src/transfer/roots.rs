//! The directories that a user named: the only places where files of images are opened.
//!
//! Invariants:
//!
//! 1. A file is opened beneath one of the roots, by the kernel's own check, whatever an image or a
//!    link in the tree says and whoever changes the tree meanwhile.
//! 2. Only regular files are opened; and disks, where the user named them.

use std::fs::{File, Metadata};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::sys::files;

/// What makes two paths the same file: device and inode.
pub type FileId = (u64, u64);

/// A place below a root.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Spot {
    root: usize,
    path: PathBuf,
}

impl Spot {
    /// Number of its root.
    pub fn root(&self) -> usize {
        self.root
    }

    /// Path from its root: plain names only.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The last part of its name behind a dot, in lower case.
    pub fn extension(&self) -> Option<String> {
        let extension = self.path.extension()?;
        Some(extension.to_string_lossy().to_ascii_lowercase())
    }

    /// The directory that it is in.
    pub fn directory(&self) -> Self {
        Self {
            root: self.root,
            path: self.path.parent().unwrap_or(Path::new("")).to_path_buf(),
        }
    }

    /// An entry of this directory.
    #[must_use]
    pub fn join(&self, name: &Path) -> Self {
        Self {
            root: self.root,
            path: self.path.join(name),
        }
    }
}

#[derive(Debug)]
struct Root {
    path: PathBuf,
    dir: File,
}

/// The directories.
#[derive(Debug, Default)]
pub struct Roots {
    roots: Vec<Root>,
}

impl Roots {
    /// Allows what is below `dir`. Links in its own path are followed: the user wrote it.
    ///
    /// # Errors
    /// `Io` and the like if it cannot be opened.
    pub fn add(&mut self, dir: &Path) -> Result<Spot> {
        let failed = |source| {
            Error::io(
                format!("cannot open the directory {}", dir.display()),
                source,
            )
        };
        let path = dir.canonicalize().map_err(failed)?;
        let known = self.roots.iter().position(|root| root.path == path);
        let root = match known {
            Some(root) => root,
            None => {
                let dir = File::open(&path).map_err(failed)?;
                self.roots.push(Root { path, dir });
                self.roots.len() - 1
            }
        };
        Ok(Spot {
            root,
            path: PathBuf::new(),
        })
    }

    /// The directories themselves.
    pub(super) fn tops(&self) -> impl Iterator<Item = Spot> + use<> {
        let path = PathBuf::new;
        (0..self.roots.len()).map(move |root| Spot { root, path: path() })
    }

    /// The whole path of a place, to show, and to list directories.
    pub fn show(&self, spot: &Spot) -> PathBuf {
        self.roots[spot.root].path.join(&spot.path)
    }

    /// Opens the file at a place. `disks`: a disk is welcome.
    ///
    /// # Errors
    /// `Denied` if a link leads out of the root; `Invalid` if it is no regular file; `NotFound`;
    /// `Io`.
    pub fn open(&self, spot: &Spot, disks: bool) -> Result<(File, Metadata)> {
        let name = self.show(spot);
        let failed = |source: std::io::Error| {
            if files::leads_out(&source) {
                return Error::new(
                    Kind::Denied,
                    format!("{} leads out of its directory", name.display()),
                );
            }
            Error::io(format!("cannot open {}", name.display()), source)
        };
        let file = files::open_beneath(self.roots[spot.root].dir.as_fd(), &spot.path);
        let file = file.map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        if !(kind.is_file() || disks && kind.is_block_device()) {
            return Err(Error::new(
                Kind::Invalid,
                format!("{} is no regular file", name.display()),
            ));
        }
        Ok((file, metadata))
    }

    /// The places that a name in the image at `from` may mean, best first. `loose`: also the file
    /// of that name beside the image, where somebody may have moved it; only for who can prove that
    /// it is the right one.
    ///
    /// # Errors
    /// `Denied` if the name leads to no place below any root; `Unsupported` if it is no path.
    pub fn candidates(&self, from: &Spot, name: &str, loose: bool) -> Result<Vec<Spot>> {
        if is_protocol(name) {
            return Err(Error::new(
                Kind::Unsupported,
                format!("{name:?} is no path of a file"),
            ));
        }
        let mut found = Vec::new();
        let slashed = name.replace('\\', "/");
        for name in [name, slashed.as_str()] {
            let drive = name.as_bytes().get(1) == Some(&b':');
            if !drive && !name.starts_with("//") {
                found.extend(self.place(from, Path::new(name)));
            }
        }
        if loose && let Some(base) = slashed.rsplit('/').next().filter(|base| is_plain(base)) {
            found.push(from.directory().join(Path::new(base)));
        }
        let mut seen = Vec::new();
        found.retain(|spot| {
            let new = !seen.contains(spot);
            seen.push(spot.clone());
            new
        });
        if found.is_empty() {
            return Err(Error::new(
                Kind::Denied,
                format!(
                    "{name:?} leads out of {}: allow its directory with --allow-parent",
                    self.roots[from.root].path.display()
                ),
            ));
        }
        Ok(found)
    }

    /// Where a path leads that is relative to the directory of `from`, if below a root.
    fn place(&self, from: &Spot, name: &Path) -> Option<Spot> {
        let mut whole = self.show(&from.directory());
        for part in name.components() {
            match part {
                Component::Prefix(_) | Component::CurDir => {}
                Component::RootDir => whole = PathBuf::from("/"),
                Component::ParentDir => drop(whole.pop()),
                Component::Normal(part) => whole.push(part),
            }
        }
        // The deepest root: it may have been allowed for a reason.
        let (root, _) = (0..)
            .zip(&self.roots)
            .filter(|(_, root)| whole.starts_with(&root.path) && whole != root.path)
            .max_by_key(|(i, root)| (*i == from.root, root.path.as_os_str().len()))?;
        let path = whole.strip_prefix(&self.roots[root].path).ok()?;
        Some(Spot {
            root,
            path: path.to_path_buf(),
        })
    }
}

/// The id of an open file.
pub(super) fn file_id(metadata: &Metadata) -> FileId {
    (metadata.dev(), metadata.ino())
}

/// True for `json:`, `nbd://` and the like, which QEMU takes for more than a path. One letter is a
/// drive of Windows.
fn is_protocol(name: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    name.split_once(':')
        .is_some_and(|(head, _)| head.len() > 1 && head.chars().all(word))
}

fn is_plain(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains('\0')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_places_below_the_roots_only() {
        let dir = tempfile::tempdir().unwrap();
        for sub in ["lib/a", "lib/gold", "other"] {
            std::fs::create_dir_all(dir.path().join(sub)).unwrap();
        }
        let mut roots = Roots::default();
        let lib = roots.add(&dir.path().join("lib")).unwrap();
        let from = lib.join(Path::new("a/child.vhd"));
        let find = |roots: &Roots, name: &str, loose| {
            let found = roots.candidates(&from, name, loose);
            found.map(|spots| {
                let show = |spot: &Spot| spot.path.display().to_string();
                spots.iter().map(show).collect::<Vec<_>>()
            })
        };
        assert_eq!(
            find(&roots, "../gold/g.vhd", false).unwrap(),
            ["gold/g.vhd"]
        );
        let wanted = ["a/..\\gold\\g.vhd", "gold/g.vhd", "a/g.vhd"];
        assert_eq!(find(&roots, "..\\gold\\g.vhd", true).unwrap(), wanted);
        assert_eq!(find(&roots, "C:\\vm\\g.vhd", true).unwrap(), ["a/g.vhd"]);
        let other = dir.path().canonicalize().unwrap().join("other/x");
        let other = other.to_str().unwrap();
        for name in [
            "../../other/x",
            "/etc/passwd",
            other,
            "json:{}",
            "nbd://x",
            "..",
        ] {
            assert!(find(&roots, name, false).is_err(), "{name}");
        }
        roots.add(&dir.path().join("other")).unwrap();
        for name in ["../../other/x", other] {
            assert_eq!(find(&roots, name, false).unwrap(), ["x"]);
        }
    }
}
