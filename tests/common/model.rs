//! What the filesystem should do, in the simplest way: names in maps, bytes in pages.
//!
//! Every method is one operation of the engine: it either happens wholly or returns the kind of the
//! error and changes nothing. Snapshots share all nodes that did not change.

use std::collections::BTreeMap;
use std::sync::Arc;

use nodupe::engine::{FileKind, RenameMode, SetAttr, XattrMode};
use nodupe::error::Kind;

use super::content::Content;

/// Name of a node within the model; the engine's numbers are another thing.
pub(crate) type Id = usize;

/// The root directory.
pub(crate) const ROOT: Id = 0;

pub(crate) type Outcome<T> = std::result::Result<T, Kind>;

/// A file, directory or anything else that has attributes.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) kind: FileKind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) rdev: u32,
    /// Names, of anything but a directory.
    pub(crate) nlink: u32,
    /// Target of a symlink.
    pub(crate) target: Vec<u8>,
    /// Bytes of a regular file.
    pub(crate) content: Content,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Names in a directory.
    pub(crate) entries: BTreeMap<Vec<u8>, Id>,
    /// Directory of a directory.
    pub(crate) parent: Id,
}

impl Node {
    pub(crate) fn new(kind: FileKind, mode: u32, uid: u32, gid: u32) -> Self {
        Self {
            kind,
            mode,
            uid,
            gid,
            rdev: 0,
            nlink: 1,
            target: Vec::new(),
            content: Content::default(),
            xattrs: BTreeMap::new(),
            entries: BTreeMap::new(),
            parent: ROOT,
        }
    }

    pub(crate) fn is_dir(&self) -> bool {
        self.kind == FileKind::Directory
    }

    pub(crate) fn is_file(&self) -> bool {
        self.kind == FileKind::Regular
    }
}

/// The whole filesystem at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) nodes: BTreeMap<Id, Arc<Node>>,
    /// Clones in pieces: what their source was when they began.
    pins: BTreeMap<Id, Content>,
    next: Id,
}

impl Model {
    pub(crate) fn new(uid: u32, gid: u32) -> Self {
        let root = Node::new(FileKind::Directory, 0o755, uid, gid);
        Self {
            nodes: BTreeMap::from([(ROOT, Arc::new(root))]),
            pins: BTreeMap::new(),
            next: ROOT + 1,
        }
    }

    /// The number that the next node gets.
    pub(crate) fn next_id(&self) -> Id {
        self.next
    }

    /// Lets the next node have at least this number, so that a history from which operations were
    /// removed still names the same nodes.
    pub(crate) fn skip_to(&mut self, id: Id) {
        self.next = self.next.max(id);
    }

    pub(crate) fn node(&self, id: Id) -> &Node {
        &self.nodes[&id]
    }

    fn change(&mut self, id: Id) -> &mut Node {
        Arc::make_mut(self.nodes.get_mut(&id).expect("nodes live until reclaimed"))
    }

    /// As `change`, for contents: ends a clone in pieces.
    fn change_content(&mut self, id: Id) -> &mut Content {
        self.pins.remove(&id);
        &mut self.change(id).content
    }

    pub(crate) fn lookup(&self, dir: Id, name: &[u8]) -> Outcome<Id> {
        self.node(dir)
            .entries
            .get(name)
            .copied()
            .ok_or(Kind::NotFound)
    }

    /// True for a directory that was removed and has not been reclaimed.
    fn is_removed_dir(&self, dir: Id) -> bool {
        self.node(dir).nlink == 0
    }

    fn add_node(&mut self, node: Node) -> Id {
        let id = self.next;
        self.next += 1;
        self.nodes.insert(id, Arc::new(node));
        id
    }

    pub(crate) fn create(&mut self, dir: Id, name: &[u8], mut node: Node) -> Outcome<Id> {
        if self.lookup(dir, name).is_ok() {
            return Err(Kind::Exists);
        }
        node.parent = dir;
        let id = self.add_node(node);
        self.change(dir).entries.insert(name.to_vec(), id);
        Ok(id)
    }

    pub(crate) fn link(&mut self, id: Id, dir: Id, name: &[u8]) -> Outcome<()> {
        if self.node(id).is_dir() {
            return Err(Kind::NotPermitted);
        }
        if self.node(id).nlink == 0 {
            return Err(Kind::NotFound); // nothing brings back a file whose last name is gone
        }
        if self.lookup(dir, name).is_ok() {
            return Err(Kind::Exists);
        }
        self.change(id).nlink += 1;
        self.change(dir).entries.insert(name.to_vec(), id);
        Ok(())
    }

    pub(crate) fn unlink(&mut self, dir: Id, name: &[u8]) -> Outcome<Id> {
        let id = self.lookup(dir, name)?;
        if self.node(id).is_dir() {
            return Err(Kind::IsDirectory);
        }
        self.change(dir).entries.remove(name);
        self.change(id).nlink -= 1;
        Ok(id)
    }

    pub(crate) fn rmdir(&mut self, dir: Id, name: &[u8]) -> Outcome<Id> {
        let id = self.lookup(dir, name)?;
        let node = self.node(id);
        if !node.is_dir() {
            return Err(Kind::NotDirectory);
        }
        if !node.entries.is_empty() {
            return Err(Kind::NotEmpty);
        }
        self.change(dir).entries.remove(name);
        self.change(id).nlink = 0;
        Ok(id)
    }

    /// Forgets a node that has no name; does nothing to others.
    pub(crate) fn reclaim(&mut self, id: Id) {
        if self.nodes.get(&id).is_some_and(|node| node.nlink == 0) {
            self.nodes.remove(&id);
            self.pins.remove(&id);
        }
    }

    /// What an open of the pool does: forgets all orphans, and ends all clones in pieces.
    pub(crate) fn forget_unnamed(&mut self) {
        self.nodes.retain(|_, node| node.nlink > 0);
        self.pins.clear();
    }

    /// True if `id` is `dir` or above it.
    pub(crate) fn is_above(&self, id: Id, mut dir: Id) -> bool {
        loop {
            if dir == id {
                return true;
            }
            if dir == ROOT {
                return false;
            }
            dir = self.node(dir).parent;
        }
    }

    /// Returns what was replaced.
    pub(crate) fn rename(
        &mut self,
        (dir, name): (Id, &[u8]),
        (new_dir, new_name): (Id, &[u8]),
        mode: RenameMode,
    ) -> Outcome<Option<Id>> {
        let id = self.lookup(dir, name)?;
        let old = self.lookup(new_dir, new_name).ok();
        match (mode, old) {
            (RenameMode::Exchange, None) => return Err(Kind::NotFound),
            (RenameMode::NoReplace, Some(_)) => return Err(Kind::Exists),
            _ => {}
        }
        if self.node(id).is_dir() && self.is_above(id, new_dir) {
            return Err(Kind::Invalid);
        }
        if let Some(old) = old {
            if old == id {
                return Ok(None);
            }
            if mode == RenameMode::Exchange {
                if self.node(old).is_dir() && self.is_above(old, dir) {
                    return Err(Kind::Invalid);
                }
                self.place(old, dir, name);
                self.place(id, new_dir, new_name);
                return Ok(None);
            }
            self.replaceable(id, old)?;
            self.change(old).nlink -= 1;
        }
        self.change(dir).entries.remove(name);
        self.place(id, new_dir, new_name);
        Ok(old)
    }

    fn place(&mut self, id: Id, dir: Id, name: &[u8]) {
        self.change(dir).entries.insert(name.to_vec(), id);
        if self.node(id).is_dir() {
            self.change(id).parent = dir;
        }
    }

    fn replaceable(&self, id: Id, old: Id) -> Outcome<()> {
        let (node, old) = (self.node(id), self.node(old));
        match (node.is_dir(), old.is_dir()) {
            (true, false) => Err(Kind::NotDirectory),
            (false, true) => Err(Kind::IsDirectory),
            (true, true) if !old.entries.is_empty() => Err(Kind::NotEmpty),
            _ => Ok(()),
        }
    }

    pub(crate) fn set_attr(&mut self, id: Id, set: &SetAttr) {
        let node = self.change(id);
        node.mode = set.mode.unwrap_or(node.mode);
        node.uid = set.uid.unwrap_or(node.uid);
        node.gid = set.gid.unwrap_or(node.gid);
    }

    pub(crate) fn set_xattr(
        &mut self,
        id: Id,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
    ) -> Outcome<()> {
        let exists = self.node(id).xattrs.contains_key(name);
        match mode {
            XattrMode::Create if exists => return Err(Kind::Exists),
            XattrMode::Replace if !exists => return Err(Kind::NoAttribute),
            _ => {}
        }
        let xattrs = &mut self.change(id).xattrs;
        xattrs.insert(name.to_vec(), value.to_vec());
        Ok(())
    }

    pub(crate) fn remove_xattr(&mut self, id: Id, name: &[u8]) -> Outcome<()> {
        if !self.node(id).xattrs.contains_key(name) {
            return Err(Kind::NoAttribute);
        }
        self.change(id).xattrs.remove(name);
        Ok(())
    }

    pub(crate) fn write(&mut self, id: Id, offset: u64, data: &[u8]) {
        self.change_content(id).write(offset, data);
    }

    pub(crate) fn truncate(&mut self, id: Id, size: u64) {
        self.change_content(id).truncate(size);
    }

    pub(crate) fn punch(&mut self, id: Id, offset: u64, len: u64) {
        self.change_content(id).punch(offset, len);
    }

    pub(crate) fn clone_file(&mut self, src: Id, dst: Id) {
        let content = self.node(src).content.clone();
        *self.change_content(dst) = content;
    }

    pub(crate) fn clone_range(
        &mut self,
        (src, src_offset): (Id, u64),
        (dst, dst_offset): (Id, u64),
        len: u64,
    ) -> u64 {
        let from = self.node(src).content.clone();
        self.change_content(dst)
            .copy_range(&from, src_offset, dst_offset, len)
    }

    pub(crate) fn begin_clone(&mut self, src: Id, dst: Id, size: u64) {
        let from = self.node(src).content.clone();
        *self.change_content(dst) = Content::shown(&from, size);
        // Part of a block can only be shown at the end.
        if size.is_multiple_of(4096) {
            self.pins.insert(dst, from);
        } else {
            self.pins.remove(&dst);
        }
    }

    pub(crate) fn extend_clone(&mut self, dst: Id, size: u64) -> bool {
        let Some(from) = self.pins.get(&dst) else {
            return false;
        };
        let shown = Content::shown(from, size);
        self.change(dst).content = shown;
        if !size.is_multiple_of(4096) {
            self.pins.remove(&dst);
        }
        true
    }

    pub(crate) fn end_clone(&mut self, dst: Id) {
        self.pins.remove(&dst);
    }

    /// Files that are a clone in pieces at the moment, and the size of what they show in the end.
    pub(crate) fn pinned(&self) -> impl Iterator<Item = (Id, u64)> {
        self.pins.iter().map(|(id, from)| (*id, from.size()))
    }

    pub(crate) fn clone_tree(
        &mut self,
        src: Id,
        dir: Id,
        names: &[Vec<u8>],
        owner: Option<(u32, u32)>,
    ) -> Outcome<()> {
        if names.iter().any(|name| self.lookup(dir, name).is_ok()) {
            return Err(Kind::Exists);
        }
        // One instant: no clone holds another one, even if `dir` lies within `src`.
        let before = self.clone();
        for name in names {
            let mut copies = BTreeMap::new();
            let copy = self.copy_node(&before, src, dir, owner, &mut copies);
            self.change(dir).entries.insert(name.clone(), copy);
        }
        Ok(())
    }

    fn copy_node(
        &mut self,
        before: &Model,
        src: Id,
        parent: Id,
        owner: Option<(u32, u32)>,
        copies: &mut BTreeMap<Id, Id>,
    ) -> Id {
        // Hard links within the tree stay hard links of one copy.
        if let Some(copy) = copies.get(&src) {
            self.change(*copy).nlink += 1;
            return *copy;
        }
        let mut node = before.node(src).clone();
        let entries = std::mem::take(&mut node.entries);
        (node.uid, node.gid) = owner.unwrap_or((node.uid, node.gid));
        node.parent = parent;
        node.nlink = 1;
        let copy = self.add_node(node);
        copies.insert(src, copy);
        for (name, id) in entries {
            let child = self.copy_node(before, id, copy, owner, copies);
            self.change(copy).entries.insert(name, child);
        }
        copy
    }
}
