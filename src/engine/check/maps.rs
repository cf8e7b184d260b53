//! Extent maps: a node that several files share is referred to each time, and entered once.

use crate::ondisk::extent::{NodeRef, Root, decode_extent};
use crate::ondisk::inode::{FLAG_PINNED, Inode, InodeKind, KeyType, split_key};
use crate::ondisk::node::TreeKind;
use crate::units::BLOCK_SIZE;

use super::walk::{ALL, Range, child_end};
use super::{Checker, Subject, code};

/// What a part of an extent map maps.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Span {
    /// Blocks, and those of them that are lost.
    mapped: u64,
    lost: u64,
    /// The first file block, and the one behind the last; both 0 if nothing is mapped.
    first: u128,
    end: u128,
}

/// The span of a node that was entered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    span: Span,
    level: u8,
    crc: u32,
}

/// Bytes that a remembered span takes, about.
const KNOWN_COST: usize = 112;
/// Most of all file blocks there can be, and more.
const FAR: u128 = 1 << 60;

impl Checker<'_> {
    /// Walks the namespace for the roots of extent maps, and the maps.
    pub(super) fn walk_maps(&mut self) {
        let root = self.reader.sb.namespace;
        self.tree(
            root,
            TreeKind::Namespace,
            ALL,
            Some(0),
            &mut |this, key, value| {
                let (ino, kind, rest) = split_key(key);
                match KeyType::from_code(kind) {
                    Some(KeyType::Inode) => {
                        if let Ok(inode) = Inode::decode(value) {
                            this.file_map(ino, &inode);
                        }
                    }
                    Some(KeyType::Detached) => {
                        if let Ok(root) = Root::decode(value) {
                            this.extent_map(root, Subject::Pool, &format!("detached map {rest}"));
                        }
                    }
                    _ => {}
                }
            },
        );
    }

    fn file_map(&mut self, ino: u64, inode: &Inode) {
        let subject = Subject::Inode(ino);
        let span = self.extent_map(inode.root, subject, &format!("inode {ino}"));
        if span.mapped != inode.mapped {
            let text = format!(
                "inode {ino} maps {} blocks, its record says {}",
                span.mapped, inode.mapped
            );
            self.find(code::MAPPED, subject, text);
        }
        let blocks = u128::from(inode.size.div_ceil(BLOCK_SIZE as u64));
        // A clone in pieces does not show all that it has yet. And a deleted file has no size to
        // rely on: if it was written, deleted and reclaimed between two batches, the batch has the
        // blocks, but not the size that they gave it, as that went with the inode. Replay makes
        // it again, blocks behind its end included, and a checkpoint in the middle of replay
        // stores that. Nobody can reach it, and the end of recovery frees it.
        let shown = inode.flags & FLAG_PINNED == 0 && inode.nlink > 0;
        if inode.kind == InodeKind::Regular && shown && span.end > blocks {
            let text = format!("inode {ino} maps blocks behind its end");
            self.find(code::INODE, subject, text);
        }
        if self.counts.passes == 0 {
            self.counts.lost_blocks += span.lost;
        }
    }

    fn extent_map(&mut self, root: Root, subject: Subject, owner: &str) -> Span {
        if root.is_empty() || self.failure.is_some() {
            return Span::default();
        }
        self.below(root.level, root.node, ALL, subject, owner, true)
    }

    /// `counted`: this is the first time that its parent is entered in this pass.
    fn below(
        &mut self,
        level: u8,
        at: NodeRef,
        range: Range,
        subject: Subject,
        owner: &str,
        counted: bool,
    ) -> Span {
        if counted {
            self.ledger.add_node(at.block, TreeKind::Extents);
        }
        if let Some(known) = self.spans.get(&at.block)
            && (known.level, known.crc) == (level, at.crc)
        {
            let span = known.span;
            self.check_range(&span, range, owner, subject);
            return span;
        }
        let node = match self.reader.node(TreeKind::Extents, level, at) {
            Ok(node) => node,
            Err(fault) => {
                self.find(fault.code, Subject::Node(at.block), fault.text);
                return Span::default();
            }
        };
        // Only a reference that is right counts as a visit: of one block, one can be.
        let first_time = counted && self.seen.insert(at.block);
        if self.seen.cost() > self.share(4) {
            self.too_little_memory("the nodes of extent maps", self.seen.cost());
            return Span::default();
        }
        if first_time && self.counts.passes == 0 {
            self.counts.nodes += 1;
            self.advance(1);
        }
        let mut sum = Span::default();
        for i in 0..node.count() {
            let key = node.key(i);
            if key < range.0 || key > range.1 {
                let text = format!("extent {key} of {owner} is misplaced in {node:?}");
                self.find(code::KEY_RANGE, subject, text);
                if !first_time {
                    continue; // it ends: see `walk.rs`, point 2
                }
            }
            let part = if level > 0 {
                let part = (key, child_end(&node, i, range.1.max(key)));
                self.below(level - 1, node.child(i), part, subject, owner, first_time)
            } else {
                self.extent(key, node.value(i), owner, subject, first_time)
            };
            self.join(&mut sum, &part, owner, subject);
        }
        self.know(at, level, sum)
    }

    fn know(&mut self, at: NodeRef, level: u8, span: Span) -> Span {
        let room = self.share(8) / KNOWN_COST;
        // Spans of interior nodes are few and save the most.
        if self.spans.len() < if level > 0 { room } else { room / 2 } {
            let crc = at.crc;
            self.spans.insert(at.block, Known { span, level, crc });
        }
        span
    }

    fn check_range(&mut self, span: &Span, range: Range, owner: &str, subject: Subject) {
        if span.mapped > 0 && (span.first < range.0 || span.first > range.1) {
            let text = format!(
                "a shared part of {owner} is misplaced: extent {}",
                span.first
            );
            self.find(code::KEY_RANGE, subject, text);
        }
    }

    fn join(&mut self, sum: &mut Span, part: &Span, owner: &str, subject: Subject) {
        if part.mapped == 0 {
            return;
        }
        if sum.mapped > 0 && part.first < sum.end {
            let text = format!("extent {} of {owner} overlaps another", part.first);
            self.find(code::OVERLAP, subject, text);
        }
        if sum.mapped == 0 {
            sum.first = part.first;
        }
        sum.end = sum.end.max(part.end);
        sum.mapped = sum.mapped.saturating_add(part.mapped);
        sum.lost = sum.lost.saturating_add(part.lost);
    }

    /// One extent, with the references to its blocks.
    fn extent(
        &mut self,
        key: u128,
        value: &[u8],
        owner: &str,
        subject: Subject,
        counted: bool,
    ) -> Span {
        let run = match decode_extent(value) {
            Ok(run) => run,
            Err(error) => {
                let text = format!("extent {key} of {owner}: {error}");
                self.find(code::RECORD, subject, text);
                return Span::default();
            }
        };
        let len = u64::from(run.len);
        if key + u128::from(len) > FAR {
            let text = format!("extent {key} of {owner} lies behind the largest file");
            self.find(code::RECORD, subject, text);
        }
        if run.is_lost() {
            // A repair marked it: known, and no finding any more.
        } else if !self.reader.holds(run.block, run.end()) {
            let text = format!("extent {key} of {owner} lies outside the pool");
            self.find(code::OUTSIDE, subject, text);
        } else if counted {
            self.ledger.add_data(run.block, run.end());
        }
        Span {
            mapped: len,
            lost: if run.is_lost() { len } else { 0 },
            first: key,
            end: key + u128::from(run.len),
        }
    }
}
