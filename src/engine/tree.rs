//! The one B+tree: search, scan, insert, remove, and dropping whole subtrees, all by shadowing.
//!
//! Invariants:
//!
//! 1. A change begins with the root and shadows each node on its way down before it touches it.
//! 2. Nothing is changed before what the change needs is at hand: a node is allocated before
//!    records move into it. An error in the middle of a change (a damaged node, a full pool in
//!    spite of the reserve) leaves counts that do not add up, so the caller poisons the pool.
//! 3. Descent is bounded by the level that each node carries, checked on the way.
//!
//! Shadowing and cloning follow O. Rodeh, "B-trees, shadowing, and clones" (ACM TOS 3(4), 2008).

use std::borrow::Cow;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ondisk::extent::{LEVEL_MAX, NodeRef, Root, decode_extent};
use crate::ondisk::node::{Node, TreeKind};

use super::meta::Meta;
use super::nodes::BlockMap;

/// A node with less than this share of its bytes in use looks for a neighbour to merge with.
const MERGE_BELOW: usize = 4032 / 4;

/// Called with each record of a scan: key and value; false ends it.
pub(crate) type Visit<'a> = dyn FnMut(u128, &[u8]) -> Result<bool> + 'a;

/// Called with the value that a key has, if any; returns the one that it gets.
pub(crate) type Change<'a, 'v> = dyn FnMut(Option<&[u8]>) -> Result<Cow<'v, [u8]>> + 'a;

/// A tree whose checksums are right and whose structure is not.
fn contradiction(block: u64) -> Error {
    Error::corrupt(format!(
        "tree contradicts itself at a node: block={block}; run check"
    ))
}

fn dirty_ref(block: u64) -> NodeRef {
    // I3 of `Meta`: the checksum follows when the checkpoint seals the node.
    NodeRef { block, crc: 0 }
}

impl Meta {
    /// The leaf whose range holds `key`, and the first key behind that range.
    pub(crate) fn leaf(
        &self,
        root: Root,
        kind: TreeKind,
        key: u128,
    ) -> Result<Option<(Arc<Node>, Option<u128>)>> {
        if root.is_empty() {
            return Ok(None);
        }
        let mut node = self.node(kind, root.level, root.node)?;
        let mut bound = None;
        for level in (0..root.level).rev() {
            let i = node.child_index(key);
            if i + 1 < node.count() {
                bound = Some(node.key(i + 1));
            }
            node = self.node(kind, level, node.child(i))?;
        }
        Ok(Some((node, bound)))
    }

    /// The value of `key`.
    pub(crate) fn get(&self, root: Root, kind: TreeKind, key: u128) -> Result<Option<Vec<u8>>> {
        self.with(root, kind, key, <[u8]>::to_vec)
    }

    /// What `look` makes of the value of `key`.
    pub(crate) fn with<T>(
        &self,
        root: Root,
        kind: TreeKind,
        key: u128,
        look: impl FnOnce(&[u8]) -> T,
    ) -> Result<Option<T>> {
        if root.is_empty() {
            return Ok(None);
        }
        let mut node = self.look(kind, root.level, root.node)?;
        for level in (0..root.level).rev() {
            node = self.look(kind, level, node.child(node.child_index(key)))?;
        }
        Ok(node.find(key).ok().map(|i| look(node.value(i))))
    }

    /// The record with the largest key at or below `key`.
    pub(crate) fn floor(
        &self,
        root: Root,
        kind: TreeKind,
        key: u128,
    ) -> Result<Option<(u128, Vec<u8>)>> {
        self.with_floor(root, kind, key, |key, value| (key, value.to_vec()))
    }

    /// What `look` makes of the record with the largest key at or below `key`.
    pub(crate) fn with_floor<T>(
        &self,
        root: Root,
        kind: TreeKind,
        key: u128,
        look: impl FnOnce(u128, &[u8]) -> T,
    ) -> Result<Option<T>> {
        if root.is_empty() {
            return Ok(None);
        }
        let mut node = self.look(kind, root.level, root.node)?;
        // The nearest subtree on the left, in case the leaf holds only larger keys.
        let mut left = None;
        for level in (0..root.level).rev() {
            let i = node.child_index(key);
            if i > 0 {
                left = Some((node.child(i - 1), level));
            }
            node = self.look(kind, level, node.child(i))?;
        }
        let found = match node.find(key) {
            Ok(i) => Some(i),
            Err(i) => i.checked_sub(1),
        };
        if let Some(i) = found {
            return Ok(Some(look(node.key(i), node.value(i))));
        }
        let Some((at, level)) = left else {
            return Ok(None);
        };
        let mut node = self.look(kind, level, at)?;
        for level in (0..level).rev() {
            node = self.look(kind, level, node.child(node.count() - 1))?;
        }
        let last = node.count() - 1;
        Ok(Some(look(node.key(last), node.value(last))))
    }

    /// Visits the records with keys from `from` up to, not including, `to`.
    pub(crate) fn scan(
        &self,
        root: Root,
        kind: TreeKind,
        from: u128,
        to: u128,
        visit: &mut Visit<'_>,
    ) -> Result<()> {
        let mut at = from;
        while at < to {
            let Some((leaf, bound)) = self.leaf(root, kind, at)? else {
                return Ok(());
            };
            let first = leaf.find(at).unwrap_or_else(|i| i);
            for i in first..leaf.count() {
                if leaf.key(i) >= to || !visit(leaf.key(i), leaf.value(i))? {
                    return Ok(());
                }
            }
            match bound {
                Some(bound) => at = bound,
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Inserts a record, or replaces its value.
    pub(crate) fn insert(
        &mut self,
        root: &mut Root,
        kind: TreeKind,
        key: u128,
        value: &[u8],
    ) -> Result<()> {
        self.update(root, kind, key, &mut |_| Ok(Cow::Borrowed(value)))
    }

    /// Inserts or replaces a record in one descent: `change` learns the value that the key has and
    /// tells the one that it gets. If it fails nothing changes but where nodes are.
    pub(crate) fn update<'v>(
        &mut self,
        root: &mut Root,
        kind: TreeKind,
        key: u128,
        change: &mut Change<'_, 'v>,
    ) -> Result<()> {
        if root.is_empty() {
            let value = change(None)?;
            let block = self.new_node(kind, 0)?;
            self.node_mut(block).insert(0, key, &value);
            *root = Root {
                node: dirty_ref(block),
                level: 0,
            };
            return Ok(());
        }
        let block = self.shadow(kind, root.level, root.node)?;
        root.node = dirty_ref(block);
        if let Some((right_key, right)) = self.update_below(kind, root.level, block, key, change)? {
            if root.level >= LEVEL_MAX {
                return Err(contradiction(block));
            }
            let top = self.new_node(kind, root.level + 1)?;
            let left_key = self.node_mut(block).key(0);
            let node = self.node_mut(top);
            node.insert(0, left_key, &dirty_ref(block).encode());
            node.insert(1, right_key, &dirty_ref(right).encode());
            *root = Root {
                node: dirty_ref(top),
                level: root.level + 1,
            };
        }
        Ok(())
    }

    /// Updates below a private node; returns the new right neighbour if it had to be split.
    fn update_below<'v>(
        &mut self,
        kind: TreeKind,
        level: u8,
        block: u64,
        key: u128,
        change: &mut Change<'_, 'v>,
    ) -> Result<Option<(u128, u64)>> {
        let node = self.node_mut(block);
        if level == 0 {
            let found = node.find(key);
            let value = change(found.ok().map(|i| node.value(i)))?;
            return match found {
                Ok(i) if node.set_value(i, &value) => Ok(None),
                Ok(i) => {
                    node.remove(i);
                    self.insert_here(kind, level, block, i, key, &value)
                }
                Err(i) => self.insert_here(kind, level, block, i, key, &value),
            };
        }
        let i = node.child_index(key);
        let at = node.child(i);
        let grows = key < node.key(i);
        let child = self.shadow(kind, level - 1, at)?;
        if child != at.block {
            self.node_mut(block).set_child(i, dirty_ref(child));
        }
        if grows {
            // Only the first child is chosen for a smaller key; its range grows downwards.
            self.node_mut(block).set_key(i, key);
        }
        match self.update_below(kind, level - 1, child, key, change)? {
            None => Ok(None),
            Some((right_key, right)) => self.insert_here(
                kind,
                level,
                block,
                i + 1,
                right_key,
                &dirty_ref(right).encode(),
            ),
        }
    }

    /// Inserts a record at position `i` of a private node, splitting it if it is full.
    fn insert_here(
        &mut self,
        kind: TreeKind,
        level: u8,
        block: u64,
        i: usize,
        key: u128,
        value: &[u8],
    ) -> Result<Option<(u128, u64)>> {
        let node = self.node_mut(block);
        let ordered = (i == 0 || node.key(i - 1) < key) && (i == node.count() || key < node.key(i));
        if !ordered {
            return Err(contradiction(block)); // a child with keys that are not in its range
        }
        if node.fits(value.len()) {
            node.insert(i, key, value);
            return Ok(None);
        }
        // I2: the new node comes first.
        let right = self.new_node(kind, level)?;
        let node = self.node_mut(block);
        // Appending leaves the left node full: ascending inserts pack densely.
        let appending = i == node.count();
        let from = if appending { i } else { node.middle() };
        let mut moved = self.node_mut(right).clone();
        let node = self.node_mut(block);
        node.split_into(from, &mut moved);
        let into_left = !appending && (i < from || (i == from && node.fits(value.len())));
        if into_left && node.fits(value.len()) {
            node.insert(i, key, value);
        } else if into_left {
            // A large value between small ones: it goes first into the right node.
            assert!(i == from, "a split makes room for the largest value");
            moved.insert(0, key, value);
        } else {
            moved.insert(i - from, key, value);
        }
        let right_key = moved.key(0);
        *self.node_mut(right) = moved;
        Ok(Some((right_key, right)))
    }

    /// Removes a record. False if there is none.
    pub(crate) fn remove(&mut self, root: &mut Root, kind: TreeKind, key: u128) -> Result<bool> {
        if self.get(*root, kind, key)?.is_none() {
            return Ok(false);
        }
        self.remove_known(root, kind, key)?;
        Ok(true)
    }

    /// Removes a record that is there: the tree is not empty.
    pub(crate) fn remove_known(
        &mut self,
        root: &mut Root,
        kind: TreeKind,
        key: u128,
    ) -> Result<()> {
        let block = self.shadow(kind, root.level, root.node)?;
        root.node = dirty_ref(block);
        self.remove_below(kind, root.level, block, key)?;
        self.shrink_root(root, kind)
    }

    fn remove_below(&mut self, kind: TreeKind, level: u8, block: u64, key: u128) -> Result<()> {
        if level == 0 {
            let node = self.node_mut(block);
            if let Ok(i) = node.find(key) {
                node.remove(i);
            }
            return Ok(());
        }
        let i = self.node_mut(block).child_index(key);
        let child = self.shadow_child(kind, level, block, i)?;
        self.remove_below(kind, level - 1, child, key)?;
        self.rebalance(kind, level, block, i)
    }

    /// Makes child `i` of a private node private.
    fn shadow_child(&mut self, kind: TreeKind, level: u8, block: u64, i: usize) -> Result<u64> {
        let at = self.node_mut(block).child(i);
        let child = self.shadow(kind, level - 1, at)?;
        if child != at.block {
            self.node_mut(block).set_child(i, dirty_ref(child));
        }
        Ok(child)
    }

    /// Frees child `i` (private) if it is empty; merges it with a neighbour if both are small.
    fn rebalance(&mut self, kind: TreeKind, level: u8, block: u64, i: usize) -> Result<()> {
        let child = self.node_mut(block).child(i).block;
        if self.node_mut(child).count() == 0 {
            self.free_node(child);
            self.node_mut(block).remove(i);
            return Ok(());
        }
        if self.node_mut(child).used() >= MERGE_BELOW || self.node_mut(block).count() < 2 {
            return Ok(());
        }
        let left = if i + 1 < self.node_mut(block).count() {
            i
        } else {
            i - 1
        };
        let other = if left == i { left + 1 } else { left };
        let at = self.node_mut(block).child(other);
        let neighbour = self.node(kind, level - 1, at)?;
        if !neighbour.fits_all(self.node_mut(child)) {
            return Ok(());
        }
        let left_block = self.shadow_child(kind, level, block, left)?;
        let right_block = self.shadow_child(kind, level, block, left + 1)?;
        let right = self.node_mut(right_block).clone();
        let left_node = self.node_mut(left_block);
        if left_node.count() > 0 && left_node.key(left_node.count() - 1) >= right.key(0) {
            return Err(contradiction(right_block));
        }
        left_node.append(&right);
        self.free_node(right_block);
        self.node_mut(block).remove(left + 1);
        Ok(())
    }

    /// Removes levels that hold a single child, and an empty root.
    fn shrink_root(&mut self, root: &mut Root, kind: TreeKind) -> Result<()> {
        loop {
            let node = self.node(kind, root.level, root.node)?;
            if node.count() == 0 {
                self.free_node(root.node.block);
                *root = Root::default();
                return Ok(());
            }
            if root.level == 0 || node.count() > 1 {
                return Ok(());
            }
            // Only a private node may go: the first one was shadowed, those below it need not be.
            let shared = kind == TreeKind::Extents && self.refcount(root.node.block)? > 1;
            if shared || !self.is_dirty(root.node.block) {
                return Ok(());
            }
            let old = root.node.block;
            *root = Root {
                node: node.child(0),
                level: root.level - 1,
            };
            self.free_node(old);
        }
    }

    /// Removes the records of an extent map with keys from `from` on, up to `to`, dropping the
    /// references of whole subtrees at once. Records must not straddle the borders.
    pub(crate) fn remove_range(&mut self, root: &mut Root, from: u128, to: u128) -> Result<()> {
        if root.is_empty() || from >= to {
            return Ok(());
        }
        let block = self.shadow(TreeKind::Extents, root.level, root.node)?;
        root.node = dirty_ref(block);
        self.remove_range_below(root.level, block, from, to, None)?;
        self.shrink_root(root, TreeKind::Extents)
    }

    /// `bound`: the first key behind the node's range.
    fn remove_range_below(
        &mut self,
        level: u8,
        block: u64,
        from: u128,
        to: u128,
        bound: Option<u128>,
    ) -> Result<()> {
        let kind = TreeKind::Extents;
        let mut i = self.node_mut(block).count();
        while i > 0 {
            i -= 1;
            let node = self.node_mut(block);
            let first = node.key(i);
            if level == 0 {
                if first >= from && first < to {
                    let run = decode_extent(node.value(i))?;
                    node.remove(i);
                    self.space.delta.add(run, -1);
                }
                continue;
            }
            let end = if i + 1 < node.count() {
                Some(node.key(i + 1))
            } else {
                bound
            };
            if first >= to || end.is_some_and(|end| end <= from) {
                continue;
            }
            if first >= from && end.map_or(to == u128::MAX, |end| end <= to) {
                let at = node.child(i);
                self.drop_subtree(level - 1, at)?;
                self.node_mut(block).remove(i);
                continue;
            }
            let child = self.shadow_child(kind, level, block, i)?;
            self.remove_range_below(level - 1, child, from, to, end)?;
            if self.node_mut(child).count() == 0 {
                self.free_node(child);
                self.node_mut(block).remove(i);
            }
        }
        Ok(())
    }

    /// Drops one reference to a subtree of an extent map; what nobody else refers to is freed.
    pub(crate) fn drop_subtree(&mut self, level: u8, at: NodeRef) -> Result<()> {
        let kind = TreeKind::Extents;
        match self.refcount(at.block)? {
            0 => return Err(contradiction(at.block)),
            1 => {}
            _ => {
                self.dec_node(at.block);
                return Ok(());
            }
        }
        let node = self.node(kind, level, at)?;
        for i in 0..node.count() {
            if level == 0 {
                let run = decode_extent(node.value(i))?;
                self.space.delta.add(run, -1);
            } else {
                self.drop_subtree(level - 1, node.child(i))?;
            }
        }
        self.free_node(at.block);
        Ok(())
    }

    /// Frees one leaf's worth, or one shared subtree, of an extent map that nobody uses. Leaves
    /// the root empty when it is done.
    pub(crate) fn drop_some(&mut self, root: &mut Root) -> Result<()> {
        let kind = TreeKind::Extents;
        if root.is_empty() {
            return Ok(());
        }
        if root.level == 0 || self.refcount(root.node.block)? > 1 {
            self.drop_subtree(root.level, root.node)?;
            *root = Root::default();
            return Ok(());
        }
        let mut node = self.node(kind, root.level, root.node)?;
        loop {
            let last = node.count() - 1;
            let child = node.child(last);
            if node.level() == 1 || self.refcount(child.block)? > 1 {
                let from = node.key(last);
                return self.remove_range(root, from, u128::MAX);
            }
            node = self.node(kind, node.level() - 1, child)?;
        }
    }

    /// Computes the checksums of all dirty nodes below `root`, children first, and stores them
    /// in their parents. `sealed` remembers the checksum of each node done.
    pub(crate) fn seal(&mut self, root: &mut Root, sealed: &mut BlockMap<u32>) -> Result<()> {
        if !root.is_empty() && self.is_dirty(root.node.block) {
            root.node.crc = self.seal_below(root.level, root.node.block, sealed)?;
        }
        Ok(())
    }

    fn seal_below(&mut self, level: u8, block: u64, sealed: &mut BlockMap<u32>) -> Result<u32> {
        if let Some(&crc) = sealed.get(&block) {
            return Ok(crc);
        }
        if self.node_mut(block).level() != level {
            return Err(contradiction(block));
        }
        if level > 0 {
            for i in 0..self.node_mut(block).count() {
                let child = self.node_mut(block).child(i).block;
                if self.is_dirty(child) {
                    let crc = self.seal_below(level - 1, child, sealed)?;
                    self.node_mut(block)
                        .set_child(i, NodeRef { block: child, crc });
                }
            }
        }
        let crc = self.node_mut(block).seal();
        sealed.insert(block, crc);
        Ok(crc)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::device::SimDevice;
    use crate::engine::space::Class;
    use crate::engine::{CreateOptions, OpenOptions, Pool};
    use crate::units::Time;

    /// A clone whose root loses all children but one must not free that one with the root: the
    /// original still refers to it.
    #[test]
    fn an_only_child_that_is_shared_survives_the_root() {
        const EXTENTS: u64 = 28_300; // just above what one level of interior nodes holds
        let device = Arc::new(SimDevice::new(512 * 1024 * 1024, 1));
        let options = CreateOptions {
            journal_size: Some(1024 * 1024),
            uuid: [1; 16],
            hash_key: [2; 16],
            uid: 0,
            gid: 0,
            time: Time::default(),
        };
        Pool::create(device.clone(), None, &options).unwrap();
        let pool = Pool::open(device, None, &OpenOptions::default()).unwrap();
        let mut meta = pool.meta.write();
        let mut original = Root::default();
        for i in 0..EXTENTS {
            let run = meta.alloc(Class::Data, 1).unwrap();
            meta.map(&mut original, i * 2, run).unwrap();
        }
        let top = meta
            .node(TreeKind::Extents, original.level, original.node)
            .unwrap();
        assert_eq!((original.level, top.count()), (2, 2));
        let border = top.key(1) as u64;
        meta.inc_node(original.node.block);
        let mut clone = original;
        meta.unmap(&mut clone, 0, border).unwrap();
        let blocks = |meta: &Meta, root| meta.count_mapped(root, 0, u64::MAX).unwrap().0;
        assert_eq!(blocks(&meta, clone), EXTENTS - border / 2);
        assert_eq!(blocks(&meta, original), EXTENTS);
        meta.unmap(&mut clone, 0, u64::MAX).unwrap();
        assert!(clone.is_empty());
        assert_eq!(blocks(&meta, original), EXTENTS);
    }
}
