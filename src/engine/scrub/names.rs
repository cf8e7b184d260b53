//! From inodes to paths. Nothing in the pool leads from a file to its names, so this is a pass
//! over the whole namespace: for reports of damage only.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use crate::ondisk::inode::{InodeKind, KeyType, decode_entries, split_key};
use crate::ondisk::node::TreeKind;
use crate::sync::Instant;
use crate::units::Ino;

use super::super::names::DEPTH_MAX;
use super::super::nodes::Quiet;
use super::super::pool::Pool;
use super::walk::seek;

/// Longest search for the name of one inode that a read failed on.
const SEARCH_MAX: Duration = Duration::from_millis(300);
/// Names of one inode that are told.
const NAMES_MAX: usize = 1000;
/// Entries of a directory looked at under one hold of the trees.
const ENTRIES: usize = 256;

impl Pool {
    /// Paths of an inode, each beginning with `/`. None if it has none, they cannot be read, or
    /// the namespace is too large to be searched in a moment.
    pub fn paths(&self, ino: Ino) -> Vec<Vec<u8>> {
        let until = Instant::now() + SEARCH_MAX;
        let wanted = BTreeSet::from([ino.0]);
        let mut found = self.find_paths(&wanted, &|| Instant::now() < until);
        found.remove(&ino.0).unwrap_or_default()
    }

    /// Paths of inodes, as far as they are found while `goes_on` says so.
    pub(super) fn find_paths(
        &self,
        wanted: &BTreeSet<u64>,
        goes_on: &dyn Fn() -> bool,
    ) -> HashMap<u64, Vec<Vec<u8>>> {
        let mut links = Vec::new();
        let mut key = 0;
        while goes_on() && !wanted.is_empty() {
            let _quiet = Quiet::begin();
            let meta = self.meta.read();
            if meta.namespace.is_empty() {
                break;
            }
            let place = seek(&meta, meta.namespace, TreeKind::Namespace, key, 0);
            drop(meta);
            if let Ok(leaf) = place.node {
                for i in 0..leaf.count() {
                    let (dir, kind, _) = split_key(leaf.key(i));
                    if KeyType::from_code(kind) != Some(KeyType::Entries) {
                        continue;
                    }
                    let entries = decode_entries(leaf.value(i)).unwrap_or_default();
                    let hits = entries.into_iter().filter(|e| wanted.contains(&e.ino.0));
                    links.extend(hits.map(|entry| (entry.ino.0, dir, entry.name)));
                }
            }
            match place.bound {
                Some(bound) => key = bound,
                None => break,
            }
        }
        let mut dirs = HashMap::from([(Ino::ROOT.0, Some(Vec::new()))]);
        let mut found: HashMap<u64, Vec<Vec<u8>>> = HashMap::new();
        for (ino, dir, name) in links {
            let paths = found.entry(ino).or_default();
            if paths.len() < NAMES_MAX
                && let Some(mut path) = self.dir_path(dir, &mut dirs, goes_on)
            {
                path.push(b'/');
                path.extend_from_slice(&name);
                paths.push(path);
            }
        }
        found.values_mut().for_each(|paths| paths.sort());
        found
    }

    /// Path of a directory; of the root the empty one.
    fn dir_path(
        &self,
        dir: u64,
        known: &mut HashMap<u64, Option<Vec<u8>>>,
        goes_on: &dyn Fn() -> bool,
    ) -> Option<Vec<u8>> {
        // Up to a directory that is known, and down again.
        let mut names = Vec::new();
        let mut at = dir;
        let mut path = loop {
            if let Some(path) = known.get(&at) {
                break path.clone();
            }
            let found = self.name_of_dir(at, goes_on);
            match found {
                Some((parent, name)) if names.len() < DEPTH_MAX => {
                    names.push((at, name));
                    at = parent;
                }
                _ => break None,
            }
        };
        for (dir, name) in names.into_iter().rev() {
            if let Some(path) = &mut path {
                path.push(b'/');
                path.extend_from_slice(&name);
            }
            known.insert(dir, path.clone());
        }
        path
    }

    /// Parent and name of a directory.
    fn name_of_dir(&self, dir: u64, goes_on: &dyn Fn() -> bool) -> Option<(u64, Vec<u8>)> {
        let _quiet = Quiet::begin();
        let parent = {
            let inode = self.meta.read().inode(Ino(dir)).ok()?;
            (inode.kind == InodeKind::Directory).then_some(inode.parent)?
        };
        let mut cookie = 0;
        while goes_on() {
            let entries = self.read_dir(Ino(parent), cookie, ENTRIES).ok()?;
            cookie = entries.last()?.cookie;
            let found = entries.into_iter().find(|entry| entry.ino.0 == dir);
            if let Some(entry) = found {
                return Some((parent, entry.name));
            }
        }
        None
    }
}
