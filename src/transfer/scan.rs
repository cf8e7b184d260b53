//! Looking for a parent that a child knows by its id only: beside the child, then in the trees that
//! the user named.
//!
//! Invariants:
//!
//! 1. What is found becomes known and is not wanted: nobody asked for it to be imported.
//! 2. No directory of another filesystem is entered: a tree may hold mounts of anything.

use std::os::unix::fs::MetadataExt;

use super::library::{DEPTH_MAX, Library};
use super::looks::Choice;
use super::roots::Spot;

impl Library {
    /// Looks at what stands beside an image: among it may be its parent.
    pub(super) fn scan_beside(&mut self, spot: &Spot) {
        let dir = spot.directory();
        if !self.scanned.insert(dir.clone()) {
            return;
        }
        self.load_unwanted(&dir);
    }

    /// Looks at all that is below the directories that the user named.
    pub(super) fn scan_roots(&mut self) {
        let tops: Vec<Spot> = self.roots().tops().collect();
        for top in tops {
            if !self.walked.insert(top.clone()) {
                continue;
            }
            let home = self.device(&top);
            let mut pending = vec![(top, 0)];
            while let Some((dir, depth)) = pending.pop() {
                // I2. It is known to nobody if it went away meanwhile.
                if self.device(&dir) != home {
                    continue;
                }
                for below in self.load_unwanted(&dir) {
                    if depth < DEPTH_MAX {
                        pending.push((below, depth + 1));
                    }
                }
                self.scanned.insert(dir);
            }
        }
    }

    /// Loads the images in a directory that are not known yet; returns the directories in it.
    fn load_unwanted(&mut self, dir: &Spot) -> Vec<Spot> {
        let (known, mut below) = (self.troubles.len(), Vec::new());
        for (name, is_dir) in self.list(dir).unwrap_or_default() {
            let spot = dir.join(&name);
            if is_dir {
                below.push(spot);
            } else {
                self.try_load(&spot, Choice::Scan, None);
            }
        }
        self.troubles.truncate(known);
        below
    }

    fn device(&self, dir: &Spot) -> Option<u64> {
        let path = self.roots().show(dir);
        let metadata = std::fs::symlink_metadata(path).ok();
        metadata.map(|metadata| metadata.dev())
    }
}
