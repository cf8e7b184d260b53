//! Reading tree nodes and walking trees, by `docs/format.md` and by nothing else. What is damaged
//! is told, and left out; what is not is shown.
//!
//! Invariants:
//!
//! 1. Levels fall by one from a node to its child, so no walk goes deeper than a level says, also
//!    where nodes lead in circles.
//! 2. Records outside the range that their parents give them are left out: no lookup would find
//!    them, and so each record of a node is met once, however often the node is referred to.

use crate::device::BlockDevice;
use crate::error::Error;
use crate::ondisk::extent::{NodeRef, Root};
use crate::ondisk::node::{Node, TreeKind};
use crate::ondisk::superblock::Superblock;
use crate::units::BLOCK_SIZE;

use super::code;

/// First and last key of a part of a tree.
pub(crate) type Range = (u128, u128);
/// All keys.
pub(crate) const ALL: Range = (0, u128::MAX);

/// What is wrong with something, as a finding.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    /// Number of the finding.
    pub(crate) code: u32,
    /// In words.
    pub(crate) text: String,
}

/// A device with the superblock of its pool.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a> {
    pub(crate) device: &'a dyn BlockDevice,
    pub(crate) sb: &'a Superblock,
}

impl Reader<'_> {
    /// True if the blocks `start` up to `end` can be allocated.
    pub(crate) fn holds(&self, start: u64, end: u64) -> bool {
        start >= self.sb.first_block() && end <= self.sb.end_block() && start < end
    }

    /// Reads and verifies a node.
    pub(crate) fn node(&self, kind: TreeKind, level: u8, at: NodeRef) -> Result<Node, Fault> {
        if !self.holds(at.block, at.block.saturating_add(1)) {
            return Err(Fault {
                code: code::OUTSIDE,
                text: format!(
                    "a node of {kind:?} lies outside the pool: block {}",
                    at.block
                ),
            });
        }
        let fault = |text| Fault {
            code: code::NODE,
            text,
        };
        let mut page = Box::new([0; BLOCK_SIZE]);
        let read = self
            .device
            .read_at(at.block * BLOCK_SIZE as u64, &mut page[..]);
        if let Err(source) = read {
            return Err(fault(format!(
                "a node of {kind:?} cannot be read: block {}: {source}",
                at.block
            )));
        }
        let node = Node::verify(page, kind, level, at, self.sb.pool_id())
            .map_err(|error: Error| fault(error.to_string()))?;
        if node.generation() > self.sb.generation {
            return Err(fault(format!("node is from the future: {node:?}")));
        }
        Ok(node)
    }
}

/// What a walk meets.
pub(crate) enum Event<'e> {
    /// A reference to a node, before it is read. The answer false: do not read it.
    Node { at: NodeRef, level: u8 },
    /// A record of a leaf.
    Record { key: u128, value: &'e [u8] },
    /// A node that cannot be used; the keys of its range are lost with it.
    Lost { fault: Fault },
    /// A record outside the range of its node.
    Misplaced { key: u128, node: &'e Node },
}

/// Called with what a walk meets.
pub(crate) type Visit<'v, C> = dyn FnMut(&mut C, Event<'_>) -> bool + 'v;

/// Walks over the part of a tree that `keys` has something of, in order.
pub(crate) fn walk<C>(
    reader: Reader<'_>,
    context: &mut C,
    root: Root,
    kind: TreeKind,
    keys: Range,
    visit: &mut Visit<'_, C>,
) {
    if !root.is_empty() {
        let whole = Walk { reader, kind, keys };
        whole.below(context, root.level, root.node, ALL, visit);
    }
}

struct Walk<'a> {
    reader: Reader<'a>,
    kind: TreeKind,
    keys: Range,
}

impl Walk<'_> {
    fn below<C>(
        &self,
        context: &mut C,
        level: u8,
        at: NodeRef,
        range: Range,
        visit: &mut Visit<'_, C>,
    ) {
        if !visit(context, Event::Node { at, level }) {
            return;
        }
        let node = match self.reader.node(self.kind, level, at) {
            Ok(node) => node,
            Err(fault) => {
                visit(context, Event::Lost { fault });
                return;
            }
        };
        for i in 0..node.count() {
            let key = node.key(i);
            if key < range.0 || key > range.1 {
                visit(context, Event::Misplaced { key, node: &node });
                continue;
            }
            if level > 0 {
                let part = (key, child_end(&node, i, range.1));
                if part.1 >= self.keys.0 && part.0 <= self.keys.1 {
                    self.below(context, level - 1, node.child(i), part, visit);
                }
            } else if key >= self.keys.0 && key <= self.keys.1 {
                let value = node.value(i);
                visit(context, Event::Record { key, value });
            }
        }
    }
}

/// The last key that child `i` may hold, if `last` is the last of its parent.
pub(crate) fn child_end(node: &Node, i: usize, last: u128) -> u128 {
    if i + 1 < node.count() {
        (node.key(i + 1) - 1).min(last)
    } else {
        last
    }
}
