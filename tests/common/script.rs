//! A history as a list of operations that can be run again, whole or with parts left out.
//!
//! Nodes keep their numbers when operations before them are left out; an operation that makes no
//! sense any more, or whose outcome nobody promised, is passed over.

use nodupe::engine::RenameMode;

use super::crash::{Geometry, Verdict, record};
use super::history::{History, Op, Runner};
use super::model::{Id, Model};

/// An operation and the number that the next new node had when it ran first.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub(crate) op: Op,
    pub(crate) next: Id,
}

/// Everything that a run follows from.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) geometry: Geometry,
    pub(crate) seed: u64,
    pub(crate) ignore_sync: bool,
    pub(crate) ops: Vec<Planned>,
}

impl Script {
    /// Runs it on a new pool.
    pub(crate) fn run(&self) -> Verdict<History> {
        let mut ops = self.ops.iter();
        record(&self.geometry, self.seed, self.ignore_sync, |runner| {
            next_of(&mut ops, runner)
        })
    }

    /// The operations, one in each line.
    pub(crate) fn text(&self) -> String {
        let lines = self
            .ops
            .iter()
            .map(|planned| format!("    {}\n", planned.op.text()));
        lines.collect()
    }
}

/// The next operation of a list that makes sense.
pub(crate) fn next_of<'a>(
    ops: &mut impl Iterator<Item = &'a Planned>,
    runner: &mut Runner,
) -> Option<Op> {
    for planned in ops {
        runner.model.skip_to(planned.next);
        if is_sensible(&planned.op, &runner.model) {
            return Some(planned.op.clone());
        }
    }
    None
}

/// True if all that the operation names still exists, and the model knows what it should do: some
/// things have two reasons to be refused, or are promised to be atomic only within limits.
pub(crate) fn is_sensible(op: &Op, model: &Model) -> bool {
    let lives = |id: &Id| model.nodes.contains_key(id);
    let file = |id: &Id| lives(id) && model.node(*id).is_file();
    let dir = |id: &Id| lives(id) && model.node(*id).is_dir() && model.node(*id).nlink > 0;
    match op {
        Op::Create(id, ..) | Op::Unlink(id, ..) | Op::Rmdir(id, _) => dir(id),
        Op::Link(id, to, name) => {
            let is_plain = |id| !model.node(id).is_dir() || model.lookup(*to, name).is_err();
            lives(id) && dir(to) && is_plain(*id)
        }
        Op::Reclaim(id) => lives(id) && model.node(*id).nlink == 0,
        Op::Rename(from, to, _) => dir(&from.0) && dir(&to.0),
        Op::SetAttr(id, _) | Op::SetXattr(id, ..) | Op::RemoveXattr(id, _) => lives(id),
        Op::Write(id, ..) | Op::WriteSync(id, ..) | Op::Truncate(id, _) => file(id),
        Op::Punch(id, ..) | Op::Seek(id, _) => file(id),
        Op::CloneFile(src, dst) => file(src) && file(dst) && src != dst,
        Op::CloneRange(src, dst, len) => {
            file(&src.0) && file(&dst.0) && is_one_step(model, *src, *dst, *len)
        }
        Op::Share(src, dst, count) | Op::ShareEqual(src, dst, count) => {
            // Whole blocks within both files.
            let fits = |(id, block): &(Id, u64)| {
                file(id) && block + count <= model.node(*id).content.size() / 4096
            };
            let apart = src.0 != dst.0 || src.1 + count <= dst.1 || dst.1 + count <= src.1;
            *count > 0 && fits(src) && fits(dst) && apart
        }
        Op::BeginClone(src, dst, size) => {
            let sizes = |id: Id| model.node(id).content.size();
            file(src) && file(dst) && src != dst && sizes(*dst) == 0 && sizes(*src) >= *size.max(&1)
        }
        Op::ExtendClone(dst, size) => {
            let shown = |dst: &Id| model.node(*dst).content.size();
            let pinned = model.pinned().find(|(id, _)| id == dst);
            file(dst) && pinned.is_none_or(|(_, end)| *size >= shown(dst) && *size <= end)
        }
        Op::EndClone(dst) => lives(dst) && model.pinned().any(|(id, _)| id == *dst),
        Op::CloneTree(src, into, _) => {
            let apart = || !model.node(*src).is_dir() || !model.is_above(*src, *into);
            lives(src) && dir(into) && model.node(*src).nlink > 0 && apart()
        }
        Op::Sync | Op::Checkpoint | Op::Reopen => true,
    }
}

/// True if the engine copies this range in one step: whole blocks that are shared, up to the end of
/// the source if that becomes the end of the destination; or a small copy of bytes.
fn is_one_step(model: &Model, (src, at): (Id, u64), (dst, to): (Id, u64), len: u64) -> bool {
    let (from, onto) = (
        model.node(src).content.size(),
        model.node(dst).content.size(),
    );
    let apart = src != dst || at + len <= to || to + len <= at;
    let left = len.min(from.saturating_sub(at));
    let is_shared = at.is_multiple_of(4096) && to.is_multiple_of(4096);
    let ends = at + left == from && to + left >= onto;
    let is_whole = left == len && (ends || len.is_multiple_of(4096));
    apart && ((is_shared && is_whole) || (at % 4096 != to % 4096 && len <= 12 * 1024))
}

/// Renames in which the two names are told apart, for histories that replace a file as editors do.
pub(crate) fn replace(from: (Id, Vec<u8>), to: (Id, Vec<u8>)) -> Op {
    Op::Rename(from, to, RenameMode::Replace)
}
