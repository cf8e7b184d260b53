//! Which files findings are about, and where these files are: a number helps nobody.
//!
//! Runs at the end, over at most 1000 findings: one walk over all extent maps finds the files
//! that damaged blocks belong to, clones included; then a walk over the namespace for each level
//! of directories finds their paths.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use crate::ondisk::extent::{NodeRef, Root, decode_extent};
use crate::ondisk::inode::{Inode, KeyType, decode_entries, split_key};
use crate::ondisk::node::TreeKind;
use crate::units::{BLOCK_SIZE, Ino};

use super::seen::Seen;
use super::walk::{ALL, Event, Range, Reader, child_end, walk};
use super::{Checker, Subject};
use crate::engine::types::{FilePlace, Finding};

/// Files that a finding names; the others are counted.
const FILES_MAX: usize = 16;
/// Directories that a path is followed up.
const DEPTH_MAX: usize = 128;

/// A finding that has something in a part of an extent map: its index, and the file block.
type Hit = (usize, u64);

/// What is looked for.
#[derive(Debug, Default)]
struct Wanted {
    /// Runs of data, sorted by their first block: first, end, finding.
    data: Vec<(u64, u64, usize)>,
    /// Length of the longest of them.
    longest: u64,
    /// Nodes of extent maps.
    nodes: HashMap<u64, Vec<usize>>,
}

impl Wanted {
    fn is_empty(&self) -> bool {
        self.data.is_empty() && self.nodes.is_empty()
    }

    /// The findings about blocks `from` up to `to`, each with the first of these blocks.
    fn among(&self, from: u64, to: u64) -> impl Iterator<Item = (usize, u64)> + '_ {
        let first = from.saturating_sub(self.longest);
        let start = self.data.partition_point(|run| run.0 < first);
        self.data[start..]
            .iter()
            .take_while(move |run| run.0 < to)
            .filter(move |run| run.1 > from)
            .map(move |run| (run.2, run.0.max(from)))
    }
}

struct Locator<'a> {
    reader: Reader<'a>,
    wanted: Wanted,
    /// Shared or not, parts in which something was found.
    hits: HashMap<u64, Rc<Vec<Hit>>>,
    /// Nodes below which nothing was found.
    misses: Seen,
    /// Files of each finding: the inode and the file block, and how many more.
    files: BTreeMap<usize, (Vec<(u64, u64)>, u64)>,
}

impl Locator<'_> {
    fn file(&mut self, ino: u64, root: Root) {
        if root.is_empty() {
            return;
        }
        let hits = self.below(root.level, root.node, ALL);
        let mut named = BTreeSet::new();
        for (finding, block) in hits.iter() {
            if named.insert(*finding) {
                let (files, more) = self.files.entry(*finding).or_default();
                if files.len() < FILES_MAX {
                    files.push((ino, *block));
                } else {
                    *more += 1;
                }
            }
        }
    }

    fn below(&mut self, level: u8, at: NodeRef, range: Range) -> Rc<Vec<Hit>> {
        if let Some(hits) = self.hits.get(&at.block) {
            return hits.clone();
        }
        if !self.misses.insert(at.block) {
            return Rc::default();
        }
        let first = u64::try_from(range.0).unwrap_or(u64::MAX);
        let mut hits: Vec<Hit> = Vec::new();
        if let Some(findings) = self.wanted.nodes.get(&at.block) {
            hits.extend(findings.iter().map(|finding| (*finding, first)));
        }
        if let Ok(node) = self.reader.node(TreeKind::Extents, level, at) {
            for i in 0..node.count() {
                let key = node.key(i);
                if level > 0 {
                    let part = (key, child_end(&node, i, range.1.max(key)));
                    hits.extend(self.below(level - 1, node.child(i), part).iter());
                } else if let Ok(run) = decode_extent(node.value(i))
                    && !run.is_lost()
                {
                    let file_block = |block: u64| key as u64 + (block - run.block);
                    let found = self.wanted.among(run.block, run.end());
                    hits.extend(found.map(|(finding, block)| (finding, file_block(block))));
                }
            }
        }
        // One place in a file is enough for each finding.
        let mut known = BTreeSet::new();
        hits.retain(|hit| known.insert(hit.0));
        let hits = Rc::new(hits);
        if !hits.is_empty() {
            self.hits.insert(at.block, hits.clone());
        }
        hits
    }
}

impl Checker<'_> {
    /// The findings, with the files that they are about.
    pub(super) fn name_findings(&mut self) -> Vec<Finding> {
        let noted = std::mem::take(&mut self.findings.list);
        let mut wanted = Wanted::default();
        let mut inos = BTreeSet::new();
        for (i, noted) in noted.iter().enumerate() {
            match noted.subject {
                Subject::Pool => {}
                Subject::Inode(ino) => drop(inos.insert(ino)),
                Subject::Data(from, to) => {
                    wanted.longest = wanted.longest.max(to - from);
                    wanted.data.push((from, to, i));
                }
                Subject::Node(block) => wanted.nodes.entry(block).or_default().push(i),
            }
        }
        wanted.data.sort_unstable();
        let files = if wanted.is_empty() {
            BTreeMap::new()
        } else {
            locate(self.reader, wanted)
        };
        inos.extend(
            files
                .values()
                .flat_map(|(files, _)| files.iter().map(|file| file.0)),
        );
        let paths = paths_of(self.reader, &inos);
        let place = |ino: &u64, block: Option<u64>| FilePlace {
            ino: Ino(*ino),
            path: paths.get(ino).cloned(),
            offset: block.map(|block| block.saturating_mul(BLOCK_SIZE as u64)),
        };
        noted
            .into_iter()
            .enumerate()
            .map(|(i, noted)| {
                let mut finding = Finding {
                    code: noted.code,
                    message: noted.message,
                    files: Vec::new(),
                    files_more: 0,
                };
                if let Subject::Inode(ino) = noted.subject {
                    finding.files.push(place(&ino, None));
                }
                if let Some((files, more)) = files.get(&i) {
                    let listed = files.iter().map(|(ino, block)| place(ino, Some(*block)));
                    finding.files.extend(listed);
                    finding.files_more = *more;
                }
                finding
            })
            .collect()
    }
}

/// The files of each finding.
fn locate(reader: Reader<'_>, wanted: Wanted) -> BTreeMap<usize, (Vec<(u64, u64)>, u64)> {
    let mut locator = Locator {
        reader,
        wanted,
        hits: HashMap::new(),
        misses: Seen::default(),
        files: BTreeMap::new(),
    };
    let root = reader.sb.namespace;
    walk(
        reader,
        &mut locator,
        root,
        TreeKind::Namespace,
        ALL,
        &mut |locator, event| {
            if let Event::Record { key, value } = event {
                let (ino, kind, _) = split_key(key);
                if KeyType::from_code(kind) == Some(KeyType::Inode)
                    && let Ok(inode) = Inode::decode(value)
                {
                    locator.file(ino, inode.root);
                }
            }
            true
        },
    );
    locator.files
}

/// One path for each inode that has a name. What leads nowhere begins with "?".
pub(crate) fn paths_of(reader: Reader<'_>, inos: &BTreeSet<u64>) -> HashMap<u64, String> {
    // Directory and name of all inodes on the way up.
    let mut names: HashMap<u64, (u64, Vec<u8>)> = HashMap::new();
    let mut wanted: BTreeSet<u64> = inos.clone();
    wanted.remove(&Ino::ROOT.0);
    for _ in 0..DEPTH_MAX {
        if wanted.is_empty() {
            break;
        }
        let root = reader.sb.namespace;
        let mut found = Vec::new();
        walk(
            reader,
            &mut found,
            root,
            TreeKind::Namespace,
            ALL,
            &mut |found: &mut Vec<(u64, u64, Vec<u8>)>, event| {
                if let Event::Record { key, value } = event {
                    let (dir, kind, _) = split_key(key);
                    if KeyType::from_code(kind) == Some(KeyType::Entries) {
                        let entries = decode_entries(value).unwrap_or_default();
                        let hits = entries
                            .into_iter()
                            .filter(|entry| wanted.contains(&entry.ino.0));
                        found.extend(hits.map(|entry| (entry.ino.0, dir, entry.name)));
                    }
                }
                true
            },
        );
        wanted.clear();
        for (ino, dir, name) in found {
            names.entry(ino).or_insert((dir, name));
            if dir != Ino::ROOT.0 && !names.contains_key(&dir) {
                wanted.insert(dir);
            }
        }
    }
    let mut paths = HashMap::new();
    for ino in inos {
        let mut parts = Vec::new();
        let mut at = *ino;
        while at != Ino::ROOT.0
            && parts.len() < DEPTH_MAX
            && let Some((dir, name)) = names.get(&at)
        {
            parts.push(String::from_utf8_lossy(name).into_owned());
            at = *dir;
        }
        if parts.is_empty() && at != Ino::ROOT.0 {
            continue;
        }
        let start = if at == Ino::ROOT.0 { "/" } else { "?/" };
        parts.reverse();
        paths.insert(*ino, format!("{start}{}", parts.join("/")));
    }
    paths
}
