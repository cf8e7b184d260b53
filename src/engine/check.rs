//! Check: reads all structures of a pool that is not open and compares them with each other.
//! Reads only; finds, never mends.
//!
//! It is written against `docs/format.md`: it walks nodes by itself, and counts references by
//! itself, so that a mistake of the engine is not repeated here.
//!
//! Memory is bounded by the metadata, not by the data: about 150 bytes for each extent that is
//! not shared, 24 for each run of reference counts, 250 for each inode, and 1 MiB for data
//! blocks. Checksums are compared while their tree is walked and never held.

mod data;

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::ondisk::extent::{
    GROUP_BLOCKS, NodeRef, Root, decode_extent, decode_group, decode_refs_run,
};
use crate::ondisk::inode::{FLAG_PINNED, Inode, InodeKind, KeyType, decode_entries, split_key};
use crate::ondisk::node::{Node, TreeKind};
use crate::ondisk::superblock::Superblock;
use crate::units::{BLOCK_SIZE, Ino};

use super::pool::Pool;
use super::recover::read_superblock;
use super::types::Finding;

/// Findings after which a badly damaged pool is not searched further.
const FINDINGS_MAX: usize = 1000;

/// Numbers of findings. Never used again for another; documented in `docs/check.md`.
#[allow(missing_docs)]
pub(crate) mod code {
    pub(crate) const NODE: u32 = 1;
    pub(crate) const RECORD: u32 = 2;
    pub(crate) const KEY_RANGE: u32 = 3;
    pub(crate) const OUTSIDE: u32 = 4;
    pub(crate) const OVERLAP: u32 = 5;
    pub(crate) const REFCOUNT: u32 = 6;
    pub(crate) const LEAK: u32 = 7;
    pub(crate) const GROUP: u32 = 8;
    pub(crate) const FREE_COUNT: u32 = 9;
    pub(crate) const NO_SUM: u32 = 10;
    pub(crate) const NO_INODE: u32 = 11;
    pub(crate) const NLINK: u32 = 12;
    pub(crate) const ORPHAN: u32 = 13;
    pub(crate) const ENTRY_KIND: u32 = 14;
    pub(crate) const PARENT: u32 = 15;
    pub(crate) const MAPPED: u32 = 16;
    pub(crate) const INODE_COUNT: u32 = 17;
    pub(crate) const NUMBER: u32 = 18;
    pub(crate) const DATA: u32 = 19;
}

struct Checker<'a> {
    device: &'a dyn BlockDevice,
    sb: Superblock,
    findings: Vec<Finding>,
    /// References found: by runs of blocks, as changes at their borders.
    references: BTreeMap<u64, i64>,
    /// Nodes of extent maps seen: their references are counted, their contents once.
    extent_nodes: HashMap<u64, Span>,
    /// Runs of data blocks found, first and end, as they come.
    data: Vec<(u64, u64)>,
    /// Blocks read, for the progress.
    read: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

/// What a part of an extent map maps.
#[derive(Clone, Copy, Default)]
struct Span {
    /// Blocks.
    mapped: u64,
    /// The first file block, and the one behind the last; both 0 if nothing is mapped.
    first: u128,
    end: u128,
}

#[derive(Default)]
struct Names {
    inodes: BTreeMap<u64, Inode>,
    /// Entries that name an inode, and the subdirectories of a directory.
    links: HashMap<u64, u32>,
    subdirectories: HashMap<u64, u32>,
    /// Directory, inode and kind of each entry.
    entries: Vec<(u64, u64, InodeKind)>,
    orphans: HashSet<u64>,
    owners: HashSet<u64>,
    detached: Vec<Root>,
}

impl Pool {
    /// Verifies all structures of a pool that is not open, and the checksums of all its data.
    /// Reads only. `progress(done, total)` in blocks. The journal is not replayed: the newest
    /// checkpoint is what is verified.
    ///
    /// # Errors
    /// If there is no pool, or its device cannot be read. Damage is a finding, not an error.
    pub fn check(
        device: &dyn BlockDevice,
        _journal: Option<&dyn BlockDevice>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<Finding>> {
        Self::check_as(device, true, progress)
    }

    /// As [`check`](Self::check), but reads no data: quick, and blind to damage there.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn check_metadata(
        device: &dyn BlockDevice,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<Finding>> {
        Self::check_as(device, false, progress)
    }

    fn check_as(
        device: &dyn BlockDevice,
        with_data: bool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<Finding>> {
        let sb = read_superblock(device)?;
        let mut checker = Checker {
            device,
            sb,
            findings: Vec::new(),
            references: BTreeMap::new(),
            extent_nodes: HashMap::new(),
            data: Vec::new(),
            read: 0,
            progress,
        };
        checker.run(with_data);
        Ok(checker.findings)
    }
}

impl Checker<'_> {
    fn find(&mut self, code: u32, message: String) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(Finding { code, message });
        }
    }

    fn run(&mut self, with_data: bool) {
        let mut groups = BTreeMap::new();
        self.walk(
            self.sb.groups,
            TreeKind::Groups,
            &mut |this, key, value| match decode_group(value) {
                Ok(free) if key < u128::from(this.sb.end_block().div_ceil(GROUP_BLOCKS)) => {
                    groups.insert(key as u64, free);
                }
                Ok(_) => this.find(code::OUTSIDE, format!("group {key} lies outside the pool")),
                Err(error) => this.find(code::RECORD, format!("group {key}: {error}")),
            },
        );
        let mut refs = Vec::new();
        self.walk(
            self.sb.refs,
            TreeKind::Refs,
            &mut |this, key, value| match decode_refs_run(key, value) {
                Ok((start, end, count)) if this.holds(start, end) => {
                    refs.push((start, end - start, count));
                }
                Ok(_) => this.find(
                    code::OUTSIDE,
                    format!("refcount at block {key} lies outside the pool"),
                ),
                Err(error) => this.find(code::RECORD, format!("refcount at block {key}: {error}")),
            },
        );
        let mut names = Names::default();
        self.walk(
            self.sb.namespace,
            TreeKind::Namespace,
            &mut |this, key, value| {
                this.name_record(&mut names, key, value);
            },
        );
        self.check_names(&names);
        for (ino, inode) in &names.inodes {
            let mapped = self.extent_map(inode.root, &format!("inode {ino}"));
            if mapped != inode.mapped {
                let text = format!(
                    "inode {ino} maps {mapped} blocks, its record says {}",
                    inode.mapped
                );
                self.find(code::MAPPED, text);
            }
        }
        for (i, root) in names.detached.iter().enumerate() {
            self.extent_map(*root, &format!("detached map {i}"));
        }
        self.check_data(with_data);
        self.check_refs(&refs);
        self.check_groups(&refs, &groups);
    }

    /// True if the blocks `start` up to `end` can be allocated.
    fn holds(&self, start: u64, end: u64) -> bool {
        start >= self.sb.first_block() && end <= self.sb.end_block()
    }

    /// Notes that `blocks` more were read. All that is in use is read once.
    fn advance(&mut self, blocks: u64) {
        let usable = self.sb.end_block() - self.sb.first_block();
        let total = usable - self.sb.free.min(usable);
        self.read += blocks;
        (self.progress)(self.read.min(total), total);
    }

    /// Reads a node; damage is a finding.
    fn node(&mut self, kind: TreeKind, level: u8, at: NodeRef) -> Option<Node> {
        self.advance(1);
        if !self.holds(at.block, at.block + 1) {
            let text = format!(
                "a node of {kind:?} lies outside the pool: block {}",
                at.block
            );
            self.find(code::OUTSIDE, text);
            return None;
        }
        let mut page = Box::new([0; BLOCK_SIZE]);
        let read = self
            .device
            .read_at(at.block * BLOCK_SIZE as u64, &mut page[..]);
        let node = read
            .map_err(|source| Error::io("cannot read a node", source))
            .and_then(|()| Node::verify(page, kind, level, at, self.sb.pool_id()));
        match node {
            Ok(node) if node.generation() <= self.sb.generation => Some(node),
            Ok(node) => {
                self.find(code::NODE, format!("node is from the future: {node:?}"));
                None
            }
            Err(error) => {
                self.find(code::NODE, error.to_string());
                None
            }
        }
    }

    fn refer(&mut self, start: u64, end: u64) {
        *self.references.entry(start).or_default() += 1;
        *self.references.entry(end).or_default() -= 1;
    }

    /// Visits all records of a tree that is not shared.
    fn walk(&mut self, root: Root, kind: TreeKind, visit: &mut dyn FnMut(&mut Self, u128, &[u8])) {
        if !root.is_empty() {
            let mut seen = HashSet::new();
            self.walk_below(
                root.level,
                root.node,
                kind,
                (0, u128::MAX),
                &mut seen,
                visit,
            );
        }
    }

    fn walk_below(
        &mut self,
        level: u8,
        at: NodeRef,
        kind: TreeKind,
        range: (u128, u128),
        seen: &mut HashSet<u64>,
        visit: &mut dyn FnMut(&mut Self, u128, &[u8]),
    ) {
        if !seen.insert(at.block) {
            return self.find(
                code::NODE,
                format!("node {} is in tree {kind:?} twice", at.block),
            );
        }
        self.refer(at.block, at.block + 1);
        let Some(node) = self.node(kind, level, at) else {
            return;
        };
        for i in 0..node.count() {
            let key = node.key(i);
            if key < range.0 || key > range.1 {
                self.find(
                    code::KEY_RANGE,
                    format!("key {key:#x} is misplaced in {node:?}"),
                );
            }
            if level == 0 {
                visit(self, key, node.value(i));
            } else {
                let end = if i + 1 < node.count() {
                    node.key(i + 1) - 1
                } else {
                    range.1
                };
                self.walk_below(level - 1, node.child(i), kind, (key, end), seen, visit);
            }
        }
    }

    /// Walks an extent map; shared nodes are referred to each time but entered once. Returns
    /// the number of mapped blocks.
    fn extent_map(&mut self, root: Root, owner: &str) -> u64 {
        if root.is_empty() {
            return 0;
        }
        self.extents_below(root.level, root.node, (0, u128::MAX), owner)
            .mapped
    }

    fn extents_below(&mut self, level: u8, at: NodeRef, range: (u128, u128), owner: &str) -> Span {
        self.refer(at.block, at.block + 1);
        if let Some(span) = self.extent_nodes.get(&at.block) {
            return *span;
        }
        self.extent_nodes.insert(at.block, Span::default()); // a cycle ends here
        let Some(node) = self.node(TreeKind::Extents, level, at) else {
            return Span::default();
        };
        let mut sum = Span::default();
        for i in 0..node.count() {
            let key = node.key(i);
            if key < range.0 || key > range.1 {
                self.find(
                    code::KEY_RANGE,
                    format!("extent {key} of {owner} is misplaced in {node:?}"),
                );
            }
            let part = if level > 0 {
                let end = if i + 1 < node.count() {
                    node.key(i + 1) - 1
                } else {
                    range.1
                };
                self.extents_below(level - 1, node.child(i), (key, end), owner)
            } else {
                self.extent(key, node.value(i), owner)
            };
            if part.mapped == 0 {
                continue;
            }
            if sum.mapped > 0 && part.first < sum.end {
                self.find(
                    code::OVERLAP,
                    format!("extent {} of {owner} overlaps another", part.first),
                );
            }
            if sum.mapped == 0 {
                sum.first = part.first;
            }
            sum.end = sum.end.max(part.end);
            sum.mapped = sum.mapped.saturating_add(part.mapped);
        }
        self.extent_nodes.insert(at.block, sum);
        sum
    }

    /// One extent, with the references to its blocks.
    fn extent(&mut self, key: u128, value: &[u8], owner: &str) -> Span {
        let run = match decode_extent(value) {
            Ok(run) => run,
            Err(error) => {
                self.find(code::RECORD, format!("extent {key} of {owner}: {error}"));
                return Span::default();
            }
        };
        if self.holds(run.block, run.end()) {
            self.refer(run.block, run.end());
            self.data.push((run.block, run.end()));
        } else {
            self.find(
                code::OUTSIDE,
                format!("extent {key} of {owner} lies outside the pool"),
            );
        }
        Span {
            mapped: u64::from(run.len),
            first: key,
            end: key + u128::from(run.len),
        }
    }

    fn name_record(&mut self, names: &mut Names, key: u128, value: &[u8]) {
        let (ino, kind, rest) = split_key(key);
        let Some(kind) = KeyType::from_code(kind) else {
            return self.find(
                code::RECORD,
                format!("namespace key {key:#x} has an unknown type"),
            );
        };
        match kind {
            KeyType::Inode => match Inode::decode(value) {
                Ok(inode) => drop(names.inodes.insert(ino, inode)),
                Err(error) => self.find(code::RECORD, format!("inode {ino}: {error}")),
            },
            KeyType::Entries => match decode_entries(value) {
                Ok(entries) => {
                    for entry in entries {
                        *names.links.entry(entry.ino.0).or_default() += 1;
                        if entry.kind == InodeKind::Directory {
                            *names.subdirectories.entry(ino).or_default() += 1;
                        }
                        names.entries.push((ino, entry.ino.0, entry.kind));
                    }
                }
                Err(error) => self.find(code::RECORD, format!("directory {ino}: {error}")),
            },
            KeyType::Xattr | KeyType::Symlink => drop(names.owners.insert(ino)),
            KeyType::Orphan => drop(names.orphans.insert(rest)),
            KeyType::Detached => match Root::decode(value) {
                Ok(root) => names.detached.push(root),
                Err(error) => self.find(code::RECORD, format!("detached map {rest}: {error}")),
            },
        }
    }

    fn check_names(&mut self, names: &Names) {
        for (dir, ino, kind) in &names.entries {
            match names.inodes.get(ino) {
                None => self.find(
                    code::NO_INODE,
                    format!("directory {dir} names inode {ino}, which is not there"),
                ),
                Some(inode) if inode.kind != *kind => {
                    self.find(
                        code::ENTRY_KIND,
                        format!("directory {dir} says inode {ino} is {kind:?}"),
                    );
                }
                Some(inode) if inode.kind == InodeKind::Directory && inode.parent != *dir => {
                    self.find(
                        code::PARENT,
                        format!("directory {ino} is in {dir}, but says {}", inode.parent),
                    );
                }
                Some(_) => {}
            }
            if !names
                .inodes
                .get(dir)
                .is_some_and(|inode| inode.kind == InodeKind::Directory)
            {
                self.find(
                    code::NO_INODE,
                    format!("entries belong to {dir}, which is no directory"),
                );
            }
        }
        for (ino, inode) in &names.inodes {
            let links = names.links.get(ino).copied().unwrap_or(0);
            let expect = match inode.kind {
                InodeKind::Directory if links > 0 || *ino == Ino::ROOT.0 => {
                    2 + names.subdirectories.get(ino).copied().unwrap_or(0)
                }
                _ => links,
            };
            if inode.nlink != expect {
                self.find(
                    code::NLINK,
                    format!(
                        "inode {ino} has {expect} links, its record says {}",
                        inode.nlink
                    ),
                );
            }
            let orphan = names.orphans.contains(ino);
            if orphan != (inode.nlink == 0 || inode.flags & FLAG_PINNED != 0) {
                self.find(
                    code::ORPHAN,
                    format!("inode {ino} and the list of orphans disagree"),
                );
            }
            if *ino >= self.sb.next_ino {
                self.find(
                    code::NUMBER,
                    format!("inode {ino} has a number not given out yet"),
                );
            }
        }
        for ino in names.orphans.iter().chain(&names.owners) {
            if !names.inodes.contains_key(ino) {
                self.find(
                    code::NO_INODE,
                    format!("something belongs to inode {ino}, which is not there"),
                );
            }
        }
        if !names.inodes.contains_key(&Ino::ROOT.0) {
            self.find(code::NO_INODE, "there is no root directory".into());
        }
        if names.inodes.len() as u64 != self.sb.inodes {
            let text = format!(
                "there are {} inodes, the superblock says {}",
                names.inodes.len(),
                self.sb.inodes
            );
            self.find(code::INODE_COUNT, text);
        }
    }

    /// Compares the references found with the refcount tree.
    fn check_refs(&mut self, refs: &[(u64, u64, u32)]) {
        let mut borders = std::mem::take(&mut self.references);
        let mut found = Vec::new(); // runs with their number of references
        let (mut count, mut from) = (0, 0);
        while let Some((at, change)) = borders.pop_first() {
            if count > 0 && at > from {
                found.push((from, at, count));
            }
            count += change;
            from = at;
        }
        // Sweep both lists of runs by their borders.
        let mut edges: Vec<u64> = found.iter().flat_map(|run| [run.0, run.1]).collect();
        edges.extend(refs.iter().flat_map(|run| [run.0, run.0 + run.1]));
        edges.sort_unstable();
        edges.dedup();
        let (mut f, mut r) = (0, 0);
        for pair in edges.windows(2) {
            while f < found.len() && found[f].1 <= pair[0] {
                f += 1;
            }
            while r < refs.len() && refs[r].0 + refs[r].1 <= pair[0] {
                r += 1;
            }
            let real = found
                .get(f)
                .filter(|run| run.0 <= pair[0])
                .map_or(0, |run| run.2);
            let stored = refs
                .get(r)
                .filter(|run| run.0 <= pair[0])
                .map_or(0, |run| i64::from(run.2));
            if stored < real {
                self.find(
                    code::REFCOUNT,
                    format!(
                        "blocks {} to {} have {real} references, recorded are {stored}",
                        pair[0], pair[1]
                    ),
                );
            } else if stored > real {
                self.find(
                    code::LEAK,
                    format!(
                        "blocks {} to {} have {real} references, recorded are {stored}: a leak",
                        pair[0], pair[1]
                    ),
                );
            }
        }
    }

    /// Compares the free blocks of each group with the gaps of the refcount tree.
    fn check_groups(&mut self, refs: &[(u64, u64, u32)], groups: &BTreeMap<u64, u32>) {
        let mut used: BTreeMap<u64, u64> = BTreeMap::new();
        let mut total = 0;
        for (start, len, _) in refs {
            total += len;
            let (mut at, end) = (*start, start + len);
            while at < end {
                let next = ((at / GROUP_BLOCKS + 1) * GROUP_BLOCKS).min(end);
                *used.entry(at / GROUP_BLOCKS).or_default() += next - at;
                at = next;
            }
        }
        for group in used
            .keys()
            .chain(groups.keys())
            .copied()
            .collect::<std::collections::BTreeSet<u64>>()
        {
            let start = (group * GROUP_BLOCKS).max(self.sb.first_block());
            let end = ((group + 1) * GROUP_BLOCKS).min(self.sb.end_block());
            let size = end.saturating_sub(start);
            let free = size.saturating_sub(used.get(&group).copied().unwrap_or(0));
            let stored = groups.get(&group).map_or(size, |free| u64::from(*free));
            if free != stored {
                self.find(
                    code::GROUP,
                    format!("group {group} has {free} free blocks, recorded are {stored}"),
                );
            }
        }
        let free = (self.sb.end_block() - self.sb.first_block()).saturating_sub(total);
        if free != self.sb.free {
            let text = format!(
                "{free} blocks are free, the superblock says {}",
                self.sb.free
            );
            self.find(code::FREE_COUNT, text);
        }
    }
}
