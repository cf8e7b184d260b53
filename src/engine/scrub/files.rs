//! The part of scrub that names files: one pass over the extent maps of all files, in which what
//! clones share is looked at once, finds who refers to damaged blocks; each such place is then
//! looked at as a reader would, and one pass over the names finds the paths.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::error::{Kind, Result};
use crate::ondisk::crc32c;
use crate::ondisk::extent::{NodeRef, decode_extent};
use crate::ondisk::node::{Node, TreeKind};
use crate::sync::Instant;
use crate::units::{BLOCK_SIZE, Ino};

use super::super::meta::Meta;
use super::super::nodes::Quiet;
use super::nodes::files_in;
use super::walk::{Place, child_range, in_range, read_block, read_node, seek};
use super::{B, DamagedFile, FILES_MAX, LINES_MAX, RANGES_MAX, Run, ScrubPhase};

/// Damaged blocks of one file that are looked at for its sake.
const RANGES_SEEN_MAX: usize = 16 * RANGES_MAX;
/// Leaves of extent maps read under one pin.
const STEP: usize = 32;
/// Nodes of which it is remembered what lies below: about 100 MiB.
const MEMO_MAX: usize = 1 << 20;

/// What of a part of an extent map is damaged. File blocks; shared by all files that share it.
#[derive(Clone, Debug, Default)]
struct Part {
    /// Blocks of the file with the suspected block of the pool.
    hits: Vec<(u64, u64)>,
    /// What a damaged node maps: first block, and the one behind the last.
    broken: Vec<(u64, u64)>,
}

impl Part {
    fn is_empty(&self) -> bool {
        self.hits.is_empty() && self.broken.is_empty()
    }

    fn add(&mut self, other: &Part) {
        self.hits.extend_from_slice(&other.hits);
        self.broken.extend_from_slice(&other.broken);
    }
}

/// One pass over all files.
#[derive(Default)]
struct Pass {
    /// The suspects, in order.
    suspects: Vec<u64>,
    /// What lies below roots and nodes of level 1, by block and checksum: another node there has
    /// another one.
    memo: HashMap<(u64, u32), Arc<Part>>,
    /// Suspects that were read again, by block and expected checksum.
    verified: HashMap<(u64, Option<u32>), bool>,
    /// What cannot be read, by inode: offset and length in bytes.
    found: BTreeMap<u64, Vec<(u64, u64)>>,
    /// There were more.
    cut: bool,
}

impl Pass {
    fn remember(&mut self, at: NodeRef, part: Part) -> Arc<Part> {
        let part = Arc::new(part);
        if self.memo.len() < MEMO_MAX {
            self.memo.insert((at.block, at.crc), Arc::clone(&part));
        }
        part
    }

    /// The suspects that a leaf refers to.
    fn search_leaf(&self, leaf: &Node, part: &mut Part) {
        for i in 0..leaf.count() {
            let Ok(run) = decode_extent(leaf.value(i)) else {
                continue; // its checksum was right: a matter for check
            };
            let from = self.suspects.partition_point(|block| *block < run.block);
            let hits = self.suspects[from..]
                .iter()
                .take_while(|block| **block < run.end());
            let first = leaf.key(i) as u64;
            part.hits
                .extend(hits.map(|block| (first.saturating_add(block - run.block), *block)));
        }
    }
}

/// What to look at next in a file.
enum Look {
    /// There is no map (any more).
    Nothing,
    /// Somebody else shares this part, and it is known.
    Known(Arc<Part>, Option<u128>),
    /// A damaged node with the range of its keys.
    Broken(u128, Option<u128>),
    /// Some leaves below one node.
    Leaves(Leaves),
}

/// Leaves below one node, or the root if that is a leaf.
struct Leaves {
    /// Each with its first key and the first one behind it.
    leaves: Vec<(Leaf, u128, Option<u128>)>,
    /// The node, if it can be remembered.
    below: Option<NodeRef>,
    /// These are the first ones below it, and the last ones.
    first: bool,
    last: bool,
    /// Where to go on.
    next: Option<u128>,
}

enum Leaf {
    Memory(Arc<Node>),
    Device(NodeRef),
}

impl Run<'_> {
    /// Finds the files that suspects and damaged nodes belong to. False if it should stop.
    pub(super) fn name_files(&mut self) -> Result<bool> {
        let began = Instant::now();
        self.scrub.update(|status| status.phase = ScrubPhase::Files);
        if !self.pool.read_only
            && let Err(error) = self.pool.checkpoint()
        {
            // It is wanted so that fewer nodes are only in memory, which are never remembered.
            log::debug!("no checkpoint before the search for files: {error}");
        }
        let mut pass = Pass {
            suspects: self.suspects.iter().copied().collect(),
            ..Pass::default()
        };
        let mut key = 0;
        loop {
            let (files, next) = self.some_files(key);
            for ino in files {
                if !self.goes_on() {
                    return Ok(false);
                }
                self.search_file(ino, &mut pass)?;
            }
            match next {
                Some(next) => key = next,
                None => break,
            }
        }
        self.fresh = 0;
        let outcome = self.publish(pass);
        self.named = Some((Instant::now(), began.elapsed()));
        outcome
    }

    /// The files in the leaf of the namespace that holds `key`, and where to go on.
    fn some_files(&self, key: u128) -> (Vec<Ino>, Option<u128>) {
        let _quiet = Quiet::begin();
        let meta = self.pool.meta.read();
        if meta.namespace.is_empty() {
            return (Vec::new(), None);
        }
        let Place { node, bound, .. } = seek(&meta, meta.namespace, TreeKind::Namespace, key, 0);
        (node.map(|leaf| files_in(&leaf)).unwrap_or_default(), bound)
    }

    /// Looks for suspects in the extent map of a file.
    fn search_file(&mut self, ino: Ino, pass: &mut Pass) -> Result<()> {
        let (mut key, mut all) = (0, Part::default());
        // What lies below the node at hand, and which one that is.
        let (mut part, mut below) = (Part::default(), None);
        let mut root = None;
        loop {
            let began = Instant::now();
            let pin = self.pin();
            let (look, root_now) = self.look(ino, key, pass)?;
            // What is remembered of a root is what one version of the file has.
            if *root.get_or_insert(root_now) != root_now {
                root = Some(None);
            }
            let (next, bytes) = match look {
                Look::Nothing => (None, 0),
                Look::Known(known, next) => {
                    all.add(&known);
                    (next, 0)
                }
                Look::Broken(low, bound) => {
                    all.broken.push(blocks(low, bound));
                    (bound, 0)
                }
                Look::Leaves(step) => {
                    if step.first {
                        all.add(&std::mem::take(&mut part));
                        below = step.below;
                    }
                    // It changed in between: what was found belongs to the file, not to a node.
                    below = below.filter(|at| Some(*at) == step.below);
                    let bytes = step.leaves.len() * BLOCK_SIZE;
                    for (leaf, low, bound) in step.leaves {
                        self.search_leaf(&leaf, low, bound, pass, &mut part);
                    }
                    if step.last
                        && let Some(at) = below
                    {
                        let known = pass.remember(at, std::mem::take(&mut part));
                        all.add(&known);
                    }
                    (step.next, bytes)
                }
            };
            drop(pin);
            self.pause(bytes as u64, began);
            match next {
                Some(next) => key = next,
                None => break,
            }
        }
        all.add(&part);
        if !all.is_empty() {
            self.verify_file(ino, &all, pass)?;
        }
        if let Some(Some(root)) = root {
            pass.remember(root, all);
        }
        Ok(())
    }

    /// What is at `key` in the map of a file; and the root, if it can be remembered.
    fn look(&self, ino: Ino, key: u128, pass: &Pass) -> Result<(Look, Option<NodeRef>)> {
        let _quiet = Quiet::begin();
        let meta = self.pool.meta.read();
        let root = match meta.inode(ino) {
            Ok(inode) => inode.root,
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Corrupt) => {
                return Ok((Look::Nothing, None));
            }
            Err(error) => return Err(error),
        };
        if root.is_empty() {
            return Ok((Look::Nothing, None));
        }
        let known = |at: NodeRef| {
            let durable = meta.unwritten(at.block).is_none();
            pass.memo.get(&(at.block, at.crc)).filter(|_| durable)
        };
        if key == 0
            && let Some(part) = known(root.node)
        {
            return Ok((Look::Known(Arc::clone(part), None), None));
        }
        let durable_root = meta
            .unwritten(root.node.block)
            .is_none()
            .then_some(root.node);
        let place = seek(&meta, root, TreeKind::Extents, key, 1);
        // Of a node that is sound in the cache only, too.
        let above = place
            .path
            .iter()
            .find(|(at, _)| self.bad_nodes.contains(&at.block));
        if above.is_some() {
            return Ok((Look::Broken(0, None), durable_root));
        }
        let node = match &place.node {
            Ok(node) if !self.bad_nodes.contains(&place.at.block) => Arc::clone(node),
            _ => return Ok((Look::Broken(place.low, place.bound), durable_root)),
        };
        if place.level == 0 {
            let leaves = Leaves {
                leaves: vec![(Leaf::Memory(node), place.low, place.bound)],
                below: durable_root,
                first: true,
                last: true,
                next: None,
            };
            return Ok((Look::Leaves(leaves), durable_root));
        }
        let from = node.child_index(key);
        if from == 0
            && let Some(part) = known(place.at)
        {
            return Ok((Look::Known(Arc::clone(part), place.bound), durable_root));
        }
        let look = some_leaves(&meta, &place, &node, from);
        Ok((look, durable_root))
    }

    fn search_leaf(
        &self,
        leaf: &Leaf,
        low: u128,
        bound: Option<u128>,
        pass: &Pass,
        part: &mut Part,
    ) {
        let at = match leaf {
            Leaf::Memory(node) => return pass.search_leaf(node, part),
            Leaf::Device(at) => *at,
        };
        let pool = self.pool.meta.read().pool_id();
        let node = read_node(&*self.pool.device, pool, TreeKind::Extents, 0, at);
        match node.and_then(|node| in_range(Arc::new(node), low, bound)) {
            Ok(node) => pass.search_leaf(&node, part),
            Err(_) => part.broken.push(blocks(low, bound)),
        }
    }

    /// Looks at what may be damaged in a file as a reader does, and notes what is.
    fn verify_file(&mut self, ino: Ino, part: &Part, pass: &mut Pass) -> Result<()> {
        let mut ranges = Vec::new();
        for &(at, block) in &part.hits {
            // Enough is enough, unless the block is news.
            if ranges.len() > RANGES_SEEN_MAX && self.confirmed.contains(&block) {
                continue;
            }
            if self.is_unreadable(ino, at, block, pass)? {
                ranges.push((at, at + 1));
                self.confirm(block);
            }
        }
        ranges.extend_from_slice(&part.broken);
        let size = self.pool.attr(ino).map_or(0, |attr| attr.size);
        let mut ranges = join(ranges, size);
        ranges.truncate(RANGES_MAX + 1); // one too many, to know that there are more
        if ranges.is_empty() {
            return Ok(());
        }
        if pass.found.len() >= FILES_MAX {
            pass.cut = true;
            return Ok(());
        }
        pass.found.insert(ino.0, ranges);
        Ok(())
    }

    /// True if reading file block `at` now would meet the damage of `block`.
    fn is_unreadable(&mut self, ino: Ino, at: u64, block: u64, pass: &mut Pass) -> Result<bool> {
        let _pin = self.pin();
        let sum = {
            let _quiet = Quiet::begin();
            let staged = {
                let stage = self.pool.stage.lock();
                let file = stage.file(ino);
                file.is_some_and(|file| !file.range(at, at + 1).is_empty())
            };
            let meta = self.pool.meta.read();
            let Ok(inode) = meta.file(ino) else {
                return Ok(false); // gone
            };
            let mut mapped = None;
            let end = at.saturating_add(1);
            let found = meta.mapped(inode.root, at, end, &mut |part| {
                mapped = Some(part.extent);
                std::ops::ControlFlow::Break(())
            });
            if staged || found.is_err() || mapped.map(|run| run.block) != Some(block) {
                return Ok(false);
            }
            let sums = mapped.map(|run| meta.sums(run));
            sums.and_then(Result::ok)
                .and_then(|sums| sums.first().copied())
        };
        if let Some(known) = pass.verified.get(&(block, sum)) {
            return Ok(*known);
        }
        let mut bytes = vec![0; BLOCK_SIZE];
        let read = read_block(&*self.pool.device, block, &mut bytes);
        let damaged = read.is_err() || sum != Some(crc32c(&bytes));
        pass.verified.insert((block, sum), damaged);
        Ok(damaged)
    }

    /// Finds the paths and tells what was found. False if it should stop.
    fn publish(&mut self, pass: Pass) -> Result<bool> {
        let wanted = pass.found.keys().copied().collect();
        let mut paths = self.pool.find_paths(&wanted, &|| self.goes_on());
        if !self.goes_on() {
            return Ok(false);
        }
        let mut found = self.scrub.found.lock();
        let mut lines = found.files.len();
        for (ino, ranges) in pass.found {
            let new = !found.files.contains_key(&ino);
            if new && found.files.len() >= FILES_MAX {
                continue;
            }
            let file = found.files.entry(ino).or_default();
            file.ino = ino;
            file.paths = paths.remove(&ino).unwrap_or_default();
            let known = file.ranges.clone();
            file.ranges = join_bytes(known, ranges);
            file.more |= file.ranges.len() > RANGES_MAX;
            file.ranges.truncate(RANGES_MAX);
            if new && lines < LINES_MAX {
                log::error!("scrub: a file is damaged: {}", Line(file));
            } else if new && lines == LINES_MAX {
                log::error!("scrub: more files are damaged: nodupe scrub --status names them");
            }
            lines += usize::from(new);
        }
        found.status.files = found.files.len() as u64;
        found.status.damaged_blocks = self.forgotten + self.confirmed.len() as u64;
        drop(found);
        if pass.cut {
            self.scrub.other(format!(
                "more than {FILES_MAX} files are damaged: only as many are named"
            ));
        }
        Ok(true)
    }
}

/// Up to [`STEP`] leaves below `node`, at `place`, from child `from` on.
fn some_leaves(meta: &Meta, place: &Place, node: &Node, from: usize) -> Look {
    let end = (from + STEP).min(node.count());
    let leaves = (from..end).map(|i| {
        let at = node.child(i);
        let (low, bound) = child_range(node, i, place.low, place.bound);
        let leaf = match meta.unwritten(at.block) {
            Some(leaf) => Leaf::Memory(Arc::clone(leaf)),
            None => Leaf::Device(at),
        };
        (leaf, low, bound)
    });
    let leaves: Vec<_> = leaves.collect();
    Look::Leaves(Leaves {
        below: meta.unwritten(place.at.block).is_none().then_some(place.at),
        first: from == 0,
        last: end == node.count(),
        next: leaves.last().and_then(|(_, _, bound)| *bound),
        leaves,
    })
}

/// A range of keys as blocks of a file.
fn blocks(low: u128, bound: Option<u128>) -> (u64, u64) {
    let cut = |key: u128| u64::try_from(key).unwrap_or(u64::MAX);
    (cut(low), bound.map_or(u64::MAX, cut))
}

/// Ranges of blocks as ranges of bytes (offset, length) of a file of `size` bytes, in order.
fn join(mut ranges: Vec<(u64, u64)>, size: u64) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let bytes = ranges.into_iter().filter_map(|(from, to)| {
        let (from, to) = (from.saturating_mul(B), to.saturating_mul(B).min(size));
        (from < to).then(|| (from, to - from))
    });
    join_bytes(bytes.collect(), Vec::new())
}

/// Ranges of bytes (offset, length), those of both together, in order and apart from each other.
fn join_bytes(mut all: Vec<(u64, u64)>, more: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    all.extend(more);
    all.sort_unstable();
    all.dedup_by(|next, last| {
        let joins = next.0 <= last.0 + last.1;
        if joins {
            last.1 = last.1.max(next.0 + next.1 - last.0);
        }
        joins
    });
    all
}

/// A damaged file in one line.
struct Line<'a>(&'a DamagedFile);

impl std::fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let file = self.0;
        if file.paths.is_empty() {
            write!(f, "(without a name)")?;
        }
        for path in &file.paths {
            write!(f, "{} ", String::from_utf8_lossy(path).escape_debug())?;
        }
        write!(f, "inode={}", file.ino)?;
        for (offset, len) in file.ranges.iter().take(8) {
            write!(f, " offset={offset} length={len}")?;
        }
        if file.ranges.len() > 8 {
            write!(f, " and more")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_joined_and_cut_at_the_end_of_the_file() {
        let blocks = vec![(7, 8), (2, 3), (3, 4), (4, 5), (9, u64::MAX)];
        assert_eq!(
            join(blocks, 10 * B + 5),
            [(2 * B, 3 * B), (7 * B, B), (9 * B, B + 5)]
        );
        assert_eq!(join(vec![(5, 6)], 5 * B), []);
        let both = join_bytes(vec![(0, 10), (30, 5)], vec![(5, 10), (15, 1)]);
        assert_eq!(both, [(0, 16), (30, 5)]);
    }
}
