//! Random operations that make sense most of the time: many names in few directories, files that
//! are cloned while they are dirty, sizes around every border.

use nodupe::device::SplitMix64;
use nodupe::engine::{FileKind, RenameMode, SetAttr, XattrMode};

use super::history::Op;
use super::model::{Id, Model, ROOT};

const KIB: u64 = 1024;

/// Bounds that keep a history small enough to be read back thousands of times.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Files and directories at most, about.
    pub(crate) nodes_max: usize,
    /// Bytes of all files at most, about; clones count.
    pub(crate) bytes_max: u64,
    /// Bytes of one file at most, holes aside.
    pub(crate) file_max: u64,
}

pub(crate) const SMALL: Limits = Limits {
    nodes_max: 24,
    bytes_max: 2048 * KIB,
    file_max: 384 * KIB,
};

/// The next operation, from the state of the model.
pub(crate) fn next_op(rng: &mut SplitMix64, model: &Model, limits: &Limits) -> Op {
    let bytes: u64 = model
        .nodes
        .values()
        .map(|node| node.content.data_pages().count() as u64 * 4 * KIB)
        .sum();
    let is_full = bytes > limits.bytes_max || model.nodes.len() > limits.nodes_max;
    for _ in 0..100 {
        let op = match rng.below(if is_full { 60 } else { 100 }) {
            0..6 => Some(Op::Sync),
            6 => Some(Op::Checkpoint),
            7..17 if is_full || rng.chance(40) => remove(rng, model),
            7..17 => None,
            17..25 => shrink(rng, model),
            25..31 => rename(rng, model),
            31..36 => attributes(rng, model),
            36..60 if is_full && rng.chance(70) => remove(rng, model),
            36..39 => share(rng, model, limits),
            39..60 => write(rng, model, limits),
            60..72 => Some(create(rng, model)),
            72..86 => clone(rng, model, limits),
            86..91 => share(rng, model, limits),
            _ => write(rng, model, limits),
        };
        if let Some(op) = op {
            return op;
        }
    }
    create(rng, model)
}

/// Bytes that do not repeat.
pub(crate) fn random_bytes(rng: &mut SplitMix64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&rng.next().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn pick<T: Clone>(rng: &mut SplitMix64, from: &[T]) -> Option<T> {
    if from.is_empty() {
        return None;
    }
    Some(from[rng.index(from.len())].clone())
}

fn name(rng: &mut SplitMix64) -> Vec<u8> {
    match rng.below(20) {
        0 => vec![b'x'; 255],
        1 => vec![0xff, 0xfe, rng.below(3) as u8 + 1],
        2 => [vec![b'y'; 200], vec![b'0' + rng.below(4) as u8]].concat(),
        _ => vec![b'a' + rng.below(12) as u8],
    }
}

fn files(model: &Model) -> Vec<Id> {
    let nodes = model.nodes.iter();
    nodes
        .filter(|(_, node)| node.is_file())
        .map(|(id, _)| *id)
        .collect()
}

fn dir(rng: &mut SplitMix64, model: &Model) -> Id {
    let dirs: Vec<Id> = model
        .nodes
        .iter()
        .filter(|(_, node)| node.is_dir() && node.nlink > 0)
        .map(|(id, _)| *id)
        .collect();
    if rng.chance(40) {
        return ROOT;
    }
    pick(rng, &dirs).unwrap_or(ROOT)
}

/// A name that exists, mostly.
fn existing(rng: &mut SplitMix64, model: &Model) -> (Id, Vec<u8>) {
    for _ in 0..8 {
        let dir = dir(rng, model);
        let names: Vec<_> = model.node(dir).entries.keys().cloned().collect();
        if let Some(name) = pick(rng, &names) {
            return (dir, name);
        }
    }
    (ROOT, name(rng))
}

fn create(rng: &mut SplitMix64, model: &Model) -> Op {
    let (dir, name) = (dir(rng, model), name(rng));
    let (kind, target) = match rng.below(20) {
        0 => (FileKind::Fifo, Vec::new()),
        1..3 => {
            let len = [1, 59, 300, 4000][rng.index(4)];
            (FileKind::Symlink, vec![b'/'; len])
        }
        3..7 => (FileKind::Directory, Vec::new()),
        _ => (FileKind::Regular, Vec::new()),
    };
    Op::Create(dir, name, kind, target)
}

fn remove(rng: &mut SplitMix64, model: &Model) -> Option<Op> {
    let orphans: Vec<Id> = model
        .nodes
        .iter()
        .filter(|(_, node)| node.nlink == 0)
        .map(|(id, _)| *id)
        .collect();
    if rng.chance(30) {
        return pick(rng, &orphans).map(Op::Reclaim);
    }
    let (dir, name) = existing(rng, model);
    match model.lookup(dir, &name) {
        Ok(id) if model.node(id).is_dir() && rng.chance(95) => Some(Op::Rmdir(dir, name)),
        _ => Some(Op::Unlink(dir, name, rng.chance(60))),
    }
}

fn rename(rng: &mut SplitMix64, model: &Model) -> Option<Op> {
    let from = existing(rng, model);
    let to = if rng.chance(50) {
        existing(rng, model)
    } else {
        (dir(rng, model), name(rng))
    };
    if rng.chance(25) {
        let id = model.lookup(from.0, &from.1).ok()?;
        // With two reasons to refuse it, which one is named is nobody's business.
        let is_plain = !model.node(id).is_dir() || model.lookup(to.0, &to.1).is_err();
        return is_plain.then_some(Op::Link(id, to.0, to.1));
    }
    let modes = [
        RenameMode::Replace,
        RenameMode::Replace,
        RenameMode::NoReplace,
        RenameMode::Exchange,
    ];
    Some(Op::Rename(from, to, modes[rng.index(4)]))
}

fn attributes(rng: &mut SplitMix64, model: &Model) -> Option<Op> {
    let (dir, name) = existing(rng, model);
    let id = model.lookup(dir, &name).ok()?;
    let key = [b"user.".to_vec(), vec![b'a' + rng.below(3) as u8]].concat();
    let present: Vec<_> = model.node(id).xattrs.keys().cloned().collect();
    Some(match rng.below(5) {
        0 => Op::RemoveXattr(id, pick(rng, &present).unwrap_or(key)),
        1..4 => {
            let len = [0, 1, 40, 700, 3000, 9000][rng.index(6)];
            let modes = [XattrMode::Set, XattrMode::Create, XattrMode::Replace];
            Op::SetXattr(id, key, random_bytes(rng, len), modes[rng.index(3)])
        }
        _ => Op::SetAttr(
            id,
            SetAttr {
                mode: Some(0o600 + rng.below(0o200) as u32),
                gid: Some(rng.below(5) as u32),
                ..SetAttr::default()
            },
        ),
    })
}

/// Somewhere in a file or a little behind its end, aligned half of the time.
fn offset(rng: &mut SplitMix64, size: u64) -> u64 {
    let offset = rng.below(size + 12 * KIB);
    match rng.below(4) {
        0 => offset,
        1 => size,
        _ => offset / 4096 * 4096,
    }
}

fn write(rng: &mut SplitMix64, model: &Model, limits: &Limits) -> Option<Op> {
    let id = pick(rng, &files(model))?;
    let mut offset = offset(rng, model.node(id).content.size());
    let len = match rng.below(20) {
        0..5 => rng.below(600) + 1,
        5..10 => (rng.below(4) + 1) * 4 * KIB,
        10..14 => rng.below(20 * KIB) + 1,
        14..17 => (rng.below(16) + 16) * 4 * KIB,
        _ => (rng.below(8) + 1) * 4 * KIB,
    };
    let len = len.min(limits.file_max);
    if len >= 64 * KIB {
        // A large write happens wholly or not at all only if it begins on a block border.
        offset = offset / 4096 * 4096;
    }
    if offset + len > limits.file_max {
        // A far write now and then: large keys in the extent map.
        offset = if rng.chance(10) {
            rng.below(1 << 40) / 4096 * 4096
        } else {
            rng.below(limits.file_max - len + 1) / 4096 * 4096
        };
    }
    let data = if rng.chance(10) {
        vec![0; len as usize]
    } else {
        random_bytes(rng, len as usize)
    };
    Some(Op::Write(id, offset, data))
}

fn shrink(rng: &mut SplitMix64, model: &Model) -> Option<Op> {
    let id = pick(rng, &files(model))?;
    let size = model.node(id).content.size();
    Some(match rng.below(4) {
        0 => Op::Truncate(id, [0, size + 5000, 1 << 41, size][rng.index(4)]),
        1 => Op::Truncate(id, offset(rng, size)),
        2 => Op::Punch(id, offset(rng, size), rng.below(50 * KIB) + 1),
        _ => Op::Punch(
            id,
            offset(rng, size) / 4096 * 4096,
            (rng.below(8) + 1) * 4096,
        ),
    })
}

fn clone(rng: &mut SplitMix64, model: &Model, limits: &Limits) -> Option<Op> {
    let pinned: Vec<(Id, u64)> = model.pinned().collect();
    if let Some((dst, end)) = pick(rng, &pinned)
        && rng.chance(35)
    {
        let shown = model.node(dst).content.size();
        return Some(match rng.below(4) {
            0 => Op::EndClone(dst),
            1 => Op::ExtendClone(dst, end),
            2 => Op::ExtendClone(dst, shown + rng.below(end - shown + 1)),
            _ => Op::ExtendClone(dst, shown + rng.below(end - shown + 1) / 4096 * 4096),
        });
    }
    let all = files(model);
    let (src, dst) = (pick(rng, &all)?, pick(rng, &all)?);
    let (from, to) = (&model.node(src).content, &model.node(dst).content);
    match rng.below(10) {
        0..4 if src != dst => Some(Op::CloneFile(src, dst)),
        4..7 => {
            let at = offset(rng, from.size());
            let len = if rng.chance(50) {
                (rng.below(24) + 1) * 4096
            } else {
                rng.below(60 * KIB) + 1
            };
            let to_at = if rng.chance(50) {
                at
            } else {
                offset(rng, to.size())
            };
            // Only what is one step of the engine is atomic: shared whole blocks, up to the end
            // of the source if that becomes the end of the destination; or a small copy.
            let (at, to_at, len) = if at % 4096 == to_at % 4096 {
                let (at, to_at) = (at / 4096 * 4096, to_at / 4096 * 4096);
                let left = len.min(from.size().saturating_sub(at));
                let ends = at + left == from.size() && to_at + left >= to.size();
                (at, to_at, if ends { left } else { left / 4096 * 4096 })
            } else {
                (at, to_at, len.min(12 * KIB))
            };
            let fits = len > 0 && to_at + len <= limits.file_max && from.size() < 1 << 30;
            let apart = src != dst || at + len <= to_at || to_at + len <= at;
            (fits && apart).then_some(Op::CloneRange((src, at), (dst, to_at), len))
        }
        7 => clone_tree(rng, model),
        8 if rng.chance(20) => Some(Op::ExtendClone(dst, to.size())),
        _ => {
            let is_empty = |id: &Id| model.node(*id).content.size() == 0 && *id != src;
            let empty: Vec<Id> = all.iter().copied().filter(is_empty).collect();
            // Only whole blocks begin a clone in pieces.
            let unit = if rng.chance(80) { 4096 } else { 1 };
            let size = rng.below(from.size() + 1) / unit * unit;
            let dst = pick(rng, &empty)?;
            (from.size() > 0).then_some(Op::BeginClone(src, dst, size))
        }
    }
}

/// Sharing of blocks; or a write of what another file, or another part of this one, has, so that
/// there is something equal to share.
fn share(rng: &mut SplitMix64, model: &Model, limits: &Limits) -> Option<Op> {
    let all = files(model);
    let (src, dst) = (pick(rng, &all)?, pick(rng, &all)?);
    let (from, to) = (&model.node(src).content, &model.node(dst).content);
    let pages: Vec<u64> = from.data_pages().collect();
    let page = pick(rng, &pages)?;
    let most = |count: u64, to_page: u64| {
        let left = (from.size() / 4096).saturating_sub(page);
        let dst_left = (to.size() / 4096).saturating_sub(to_page);
        let apart = if src == dst {
            page.abs_diff(to_page)
        } else {
            u64::MAX
        };
        count.min(left).min(dst_left).min(apart)
    };
    let count = rng.below(16) + 1;
    match rng.below(4) {
        0 => {
            let len = (count * 4096).min(limits.file_max);
            let offset = rng.below(limits.file_max - len + 1) / 4096 * 4096;
            Some(Op::Write(dst, offset, from.read(page * 4096, len as usize)))
        }
        1 => {
            let to_page = offset(rng, to.size()) / 4096;
            let count = most(count, to_page);
            (count > 0).then_some(Op::Share((src, page), (dst, to_page), count))
        }
        _ => {
            let bytes = from.read(page * 4096, 4096);
            let is_equal = |other: &u64| to.read(other * 4096, 4096) == bytes;
            let equal: Vec<u64> = to.data_pages().filter(is_equal).collect();
            let to_page = pick(rng, &equal)?;
            let count = most(count, to_page);
            (count > 0).then_some(Op::ShareEqual((src, page), (dst, to_page), count))
        }
    }
}

fn clone_tree(rng: &mut SplitMix64, model: &Model) -> Option<Op> {
    let (dir, source) = existing(rng, model);
    let src = model.lookup(dir, &source).ok()?;
    let into = self::dir(rng, model);
    let is_safe = !model.node(src).is_dir() || !model.is_above(src, into);
    let mut names = vec![name(rng)];
    let second = name(rng);
    if rng.chance(30) && second != names[0] {
        names.push(second);
    }
    is_safe.then_some(Op::CloneTree(src, into, names))
}
