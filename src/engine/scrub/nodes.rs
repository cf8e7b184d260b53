//! The part of scrub that reads tree nodes: each from the device, against the checksum that its
//! parent has, and each shared one once.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::ondisk::extent::{NodeRef, Root};
use crate::ondisk::inode::{Inode, InodeKind, KeyType, split_key};
use crate::ondisk::node::{Node, TreeKind};
use crate::sync::Instant;
use crate::units::{BLOCK_SIZE, Ino};

use super::super::meta::Meta;
use super::super::nodes::Quiet;
use super::walk::{child_range, read_node, seek};
use super::{Run, ScrubPhase};

/// Nodes read under one pin.
const STEP: usize = 32;

/// A tree to walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tree {
    /// One of those that are there once.
    One(TreeKind),
    /// The extent map of a file.
    File(Ino),
    /// A map that waits to be freed.
    Detached(u64),
}

impl Tree {
    fn kind(self) -> TreeKind {
        match self {
            Tree::One(kind) => kind,
            Tree::File(_) | Tree::Detached(_) => TreeKind::Extents,
        }
    }

    /// Its root as of now; `None` if there is none (any more).
    fn root(self, meta: &Meta) -> Result<Option<Root>> {
        let root = match self {
            Tree::One(TreeKind::Namespace) => meta.namespace,
            Tree::One(TreeKind::Refs) => meta.refs,
            Tree::One(TreeKind::Sums) => meta.sums,
            Tree::One(_) => meta.groups,
            Tree::File(ino) => match meta.inode(ino) {
                Ok(inode) => inode.root,
                Err(error) if error.kind() == Kind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            },
            Tree::Detached(id) => {
                let all = meta.all_detached()?;
                let found = all.into_iter().find(|(other, _)| *other == id);
                found.map(|(_, root)| root).unwrap_or_default()
            }
        };
        Ok((!root.is_empty()).then_some(root))
    }
}

/// What to do at one place of a tree.
#[derive(Default)]
struct Step {
    /// Nodes to read from the device.
    read: Vec<(NodeRef, u8)>,
    /// Leaves that only memory holds.
    memory: Vec<Arc<Node>>,
    /// Damaged nodes that were met on the way down.
    bad: Vec<(NodeRef, u8, Error)>,
    /// Where to go on.
    next: Option<u128>,
}

impl Run<'_> {
    /// Reads the nodes of all trees. False if it should stop.
    pub(super) fn walk_trees(&mut self) -> Result<bool> {
        self.scrub
            .update(|status| status.phase = ScrubPhase::Metadata);
        for kind in [TreeKind::Groups, TreeKind::Refs, TreeKind::Sums] {
            if self.walk(Tree::One(kind), &mut |_, _| Ok(true))?.is_break() {
                return Ok(false);
            }
        }
        let mut files = |run: &mut Self, leaf: &Node| run.walk_files(leaf);
        if self
            .walk(Tree::One(TreeKind::Namespace), &mut files)?
            .is_break()
        {
            return Ok(false);
        }
        let detached = self.pool.meta.read().all_detached();
        for (id, _) in detached.unwrap_or_default() {
            if self
                .walk(Tree::Detached(id), &mut |_, _| Ok(true))?
                .is_break()
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Walks the extent maps of the files in a leaf of the namespace.
    fn walk_files(&mut self, leaf: &Node) -> Result<bool> {
        for ino in files_in(leaf) {
            if self.walk(Tree::File(ino), &mut |_, _| Ok(true))?.is_break() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads the nodes of a tree, and visits those that are leaves and not shared with what was
    /// walked before.
    fn walk(
        &mut self,
        tree: Tree,
        visit: &mut dyn FnMut(&mut Self, &Node) -> Result<bool>,
    ) -> Result<ControlFlow<()>> {
        let mut key = 0;
        loop {
            if !self.goes_on() {
                return Ok(ControlFlow::Break(()));
            }
            let began = Instant::now();
            let pin = self.pin();
            let Some(step) = self.step(tree, key)? else {
                return Ok(ControlFlow::Continue(()));
            };
            let bytes = step.read.len() * BLOCK_SIZE;
            let mut leaves = step.memory;
            let mut bad = step.bad;
            for (at, level) in step.read {
                // An error that does not come back is none.
                let read = self.read(tree, at, level);
                match read.or_else(|_| self.read(tree, at, level)) {
                    Ok(node) if level == 0 => leaves.push(Arc::new(node)),
                    Ok(_) => {}
                    Err(error) => bad.push((at, level, error)),
                }
            }
            drop(pin);
            for (at, level, error) in bad {
                self.tell_bad(tree, at, level, &error);
            }
            for leaf in leaves {
                if !visit(self, &leaf)? {
                    return Ok(ControlFlow::Break(()));
                }
            }
            self.pause(bytes as u64, began);
            match step.next {
                Some(next) => key = next,
                None => return Ok(ControlFlow::Continue(())),
            }
        }
    }

    fn read(&self, tree: Tree, at: NodeRef, level: u8) -> Result<Node> {
        let pool = self.pool.meta.read().pool_id();
        read_node(&*self.pool.device, pool, tree.kind(), level, at)
    }

    /// Looks at the place of `key`: what is to be read there, and where to go on. `None` if the
    /// tree is not there (any more), or cannot be found because of damage that is told elsewhere.
    fn step(&mut self, tree: Tree, key: u128) -> Result<Option<Step>> {
        let _quiet = Quiet::begin();
        let meta = self.pool.meta.read();
        let root = match tree.root(&meta) {
            Ok(Some(root)) => root,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == Kind::Corrupt => return Ok(None),
            Err(error) => return Err(error),
        };
        let known = |at: NodeRef, nodes: &super::BlockSet| {
            meta.unwritten(at.block).is_none() && nodes.contains(at.block)
        };
        if key == 0 && known(root.node, &self.nodes) {
            return Ok(None); // a clone of what was walked
        }
        let place = seek(&meta, root, tree.kind(), key, 1);
        let mut step = Step {
            next: place.bound,
            ..Step::default()
        };
        let mut wanted = Vec::new();
        for (at, level) in &place.path {
            if !known(*at, &self.nodes) {
                wanted.push((*at, *level));
            }
        }
        match place.node {
            Err(error) => {
                if self.nodes.insert(place.at.block) {
                    step.bad.push((place.at, place.level, error));
                }
            }
            Ok(node) if place.level == 0 => wanted.push((place.at, node.level())),
            Ok(node) => {
                let from = node.child_index(key);
                let done = from == 0 && known(place.at, &self.nodes);
                if !known(place.at, &self.nodes) {
                    wanted.push((place.at, place.level));
                }
                let end = if done {
                    from
                } else {
                    (from + STEP).min(node.count())
                };
                wanted.extend((from..end).map(|i| (node.child(i), 0)));
                if !done && end < node.count() {
                    step.next = child_range(&node, end - 1, place.low, place.bound).1;
                }
            }
        }
        for (at, level) in wanted {
            match meta.unwritten(at.block) {
                Some(node) if level == 0 => step.memory.push(Arc::clone(node)),
                Some(_) => {}
                None if self.nodes.insert(at.block) => step.read.push((at, level)),
                None => {}
            }
        }
        step.read.sort_unstable_by_key(|(at, _)| at.block);
        Ok(Some(step))
    }

    fn tell_bad(&mut self, tree: Tree, at: NodeRef, level: u8, error: &Error) {
        if !self.bad_nodes.insert(at.block) {
            return;
        }
        let what = match tree {
            Tree::File(_) => {
                self.bad_maps = true; // its files are named with those of damaged blocks
                return log::error!("scrub: {error}");
            }
            Tree::Detached(_) => "of a deleted file: what it maps cannot be freed",
            Tree::One(TreeKind::Namespace) => "of the names: some files cannot be found",
            Tree::One(TreeKind::Sums) => "of the checksums: what it covers cannot be read",
            Tree::One(_) => "of the free space: the pool cannot be written any more",
        };
        let block = at.block;
        self.scrub.other(format!(
            "a tree node {what}: block={block} level={level}: {error}; run check on the unmounted pool"
        ));
    }
}

/// The files with an extent map in a leaf of the namespace.
pub(super) fn files_in(leaf: &Node) -> Vec<Ino> {
    let mut files = Vec::new();
    for i in 0..leaf.count() {
        let (ino, kind, _) = split_key(leaf.key(i));
        if KeyType::from_code(kind) == Some(KeyType::Inode)
            && let Ok(inode) = Inode::decode(leaf.value(i))
            && inode.kind == InodeKind::Regular
            && !inode.root.is_empty()
        {
            files.push(Ino(ino));
        }
    }
    files
}
