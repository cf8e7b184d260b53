//! Operations that run on a pool and on the model side by side, and the record of such a run: what
//! the model was after each step, and what the device had seen by then.

use std::collections::BTreeMap;
use std::sync::Arc;

use nodupe::device::{BlockDevice, SimDevice, SimTrace};
use nodupe::engine::{
    CreateOptions, FileKind, NewNode, OpenOptions, Pool, RenameMode, SetAttr, Share, XattrMode,
};
use nodupe::error::{Error, Kind, Result};
use nodupe::units::{Ino, Time};

use super::content::PAGE;
use super::model::{Id, Model, Node, ROOT};
use super::view::{View, list, show};

/// Owner of everything in the tests.
pub(crate) const OWNER: (u32, u32) = (1000, 100);

/// One operation on the filesystem; files are named by the model's numbers.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Create(Id, Vec<u8>, FileKind, Vec<u8>),
    Link(Id, Id, Vec<u8>),
    /// Removes a name; `true` reclaims the inode at once if it was the last one.
    Unlink(Id, Vec<u8>, bool),
    Rmdir(Id, Vec<u8>),
    Reclaim(Id),
    Rename((Id, Vec<u8>), (Id, Vec<u8>), RenameMode),
    SetAttr(Id, SetAttr),
    SetXattr(Id, Vec<u8>, Vec<u8>, XattrMode),
    RemoveXattr(Id, Vec<u8>),
    Write(Id, u64, Vec<u8>),
    Truncate(Id, u64),
    Punch(Id, u64, u64),
    CloneFile(Id, Id),
    CloneRange((Id, u64), (Id, u64), u64),
    /// Shares blocks: first one of the source and of the destination, and how many.
    Share((Id, u64), (Id, u64), u64),
    /// Shares those of them that are equal.
    ShareEqual((Id, u64), (Id, u64), u64),
    BeginClone(Id, Id, u64),
    ExtendClone(Id, u64),
    EndClone(Id),
    CloneTree(Id, Id, Vec<Vec<u8>>),
    /// As with O_DSYNC: the write, and it lasts.
    WriteSync(Id, u64, Vec<u8>),
    /// Asks for the next data and the next hole.
    Seek(Id, u64),
    Sync,
    Checkpoint,
    /// Closes the pool and opens it again.
    Reopen,
}

impl Op {
    /// The operation in one line, bytes as their number.
    pub(crate) fn text(&self) -> String {
        match self {
            Op::Write(id, offset, data) | Op::WriteSync(id, offset, data) => {
                let zero = data.iter().all(|byte| *byte == 0);
                let what = if zero { "zeros" } else { "bytes" };
                let sync = if self.is_durable() { "Sync" } else { "" };
                format!("Write{sync}({id}, {offset}, {} {what})", data.len())
            }
            Op::Create(dir, name, kind, _) => format!("Create({dir}, {}, {kind:?})", show(name)),
            Op::Link(id, dir, name) => format!("Link({id}, {dir}, {})", show(name)),
            Op::Unlink(dir, name, now) => format!("Unlink({dir}, {}, {now})", show(name)),
            Op::Rmdir(dir, name) => format!("Rmdir({dir}, {})", show(name)),
            Op::Rename(from, to, mode) => format!(
                "Rename({}, {}, {}, {}, {mode:?})",
                from.0,
                show(&from.1),
                to.0,
                show(&to.1)
            ),
            Op::SetXattr(id, name, value, mode) => {
                format!(
                    "SetXattr({id}, {}, {} bytes, {mode:?})",
                    show(name),
                    value.len()
                )
            }
            Op::RemoveXattr(id, name) => format!("RemoveXattr({id}, {})", show(name)),
            Op::CloneTree(src, dir, names) => {
                let names: Vec<_> = names.iter().map(|name| show(name)).collect();
                format!("CloneTree({src}, {dir}, {names:?})")
            }
            other => format!("{other:?}"),
        }
    }

    /// True if nothing before it can be lost any more once it said yes.
    pub(crate) fn is_durable(&self) -> bool {
        matches!(
            self,
            Op::Sync | Op::Checkpoint | Op::WriteSync(..) | Op::Reopen
        )
    }
}

/// A pool and the model of it.
pub(crate) struct Runner {
    pub(crate) pool: Arc<Pool>,
    pub(crate) model: Model,
    /// The engine's numbers of the model's nodes.
    inos: BTreeMap<Id, Ino>,
    /// A clock that moves with each operation.
    ticks: i64,
    /// Clones in pieces before the present operation.
    pinned: Vec<Id>,
    /// An operation failed on the pool alone. What it began with, the end of a clone in pieces, may
    /// have been done.
    has_failed: bool,
    /// What [`Op::Reopen`] opens, and with how much cache.
    pub(crate) home: Option<(Arc<SimDevice>, u64)>,
}

/// Options of pools in tests: everything follows from `seed`.
pub(crate) fn create_options(seed: u64, journal_size: u64) -> CreateOptions {
    CreateOptions {
        journal_size: Some(journal_size),
        uuid: [(seed % 251) as u8 + 1; 16],
        hash_key: [(seed % 241) as u8 + 3; 16],
        uid: OWNER.0,
        gid: OWNER.1,
        time: Time::default(),
    }
}

pub(crate) fn open(device: &Arc<SimDevice>, cache_size: u64) -> Result<Arc<Pool>> {
    let options = OpenOptions {
        read_only: false,
        cache_size,
    };
    Pool::open(Arc::clone(device) as Arc<dyn BlockDevice>, None, &options)
}

impl Runner {
    /// On a pool that was just created.
    pub(crate) fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            model: Model::new(OWNER.0, OWNER.1),
            inos: BTreeMap::from([(ROOT, Ino::ROOT)]),
            ticks: 0,
            pinned: Vec::new(),
            has_failed: false,
            home: None,
        }
    }

    /// On a pool that is known to be at the state of `model`.
    pub(crate) fn adopt(pool: Arc<Pool>, model: &Model) -> std::result::Result<Self, String> {
        let mut runner = Self::new(pool);
        runner.model = model.clone();
        runner.model.forget_unnamed();
        runner.ticks = 1 << 20;
        runner.learn();
        Ok(runner)
    }

    pub(crate) fn ino(&self, id: Id) -> Ino {
        self.inos[&id]
    }

    fn now(&mut self) -> Time {
        self.ticks += 1;
        Time {
            secs: self.ticks,
            nanos: 0,
        }
    }

    /// Runs one operation on both. `Ok(false)`: both refused it, for the same reason. A refusal of
    /// the engine alone is the outer error, and the model is as before.
    pub(crate) fn run(&mut self, op: &Op) -> Result<bool> {
        let before = self.model.clone();
        self.pinned = before.pinned().map(|(id, _)| id).collect();
        let expected = apply(&mut self.model, op);
        let result = self.act(op);
        match (expected, result) {
            (Ok(()), Ok(())) => {
                self.learn();
                Ok(true)
            }
            (Err(kind), Err(error)) if error.kind() == kind => {
                self.model = before;
                Ok(false)
            }
            (Ok(()), Err(error)) => {
                self.model = before;
                self.has_failed = true;
                Err(error)
            }
            (Err(kind), Err(error)) => {
                self.model = before;
                Err(Error::new(
                    error.kind(),
                    format!("should fail with {kind:?}, but: {error}"),
                ))
            }
            (Err(kind), Ok(())) => panic!("{} should fail with {kind:?}", op.text()),
        }
    }

    /// The operation on the pool. Runs behind `apply`: the model is already changed.
    fn act(&mut self, op: &Op) -> Result<()> {
        let now = self.now();
        let pool = Arc::clone(&self.pool);
        match op {
            Op::Create(dir, name, kind, target) => {
                let node = NewNode {
                    kind: *kind,
                    mode: 0o640,
                    uid: OWNER.0,
                    gid: OWNER.1,
                    rdev: 0,
                    target,
                };
                pool.create_node(self.ino(*dir), name, &node, now)?;
            }
            Op::Link(id, dir, name) => {
                pool.link(self.ino(*id), self.ino(*dir), name, now)?;
            }
            Op::Unlink(dir, name, reclaim) => {
                let attr = pool.unlink(self.ino(*dir), name, now)?;
                if *reclaim {
                    pool.reclaim(attr.ino)?;
                }
            }
            Op::Rmdir(dir, name) => {
                let attr = pool.rmdir(self.ino(*dir), name, now)?;
                pool.reclaim(attr.ino)?;
            }
            Op::Reclaim(id) => pool.reclaim(self.ino(*id))?,
            Op::Rename(from, to, mode) => {
                let (dir, new_dir) = (self.ino(from.0), self.ino(to.0));
                if let Some(old) = pool.rename(dir, &from.1, new_dir, &to.1, *mode, now)? {
                    pool.reclaim(old.ino)?;
                }
            }
            Op::SetAttr(id, set) => {
                let ctime = Some(now);
                pool.set_attr(self.ino(*id), &SetAttr { ctime, ..*set })?;
            }
            Op::SetXattr(id, name, value, mode) => {
                pool.set_xattr(self.ino(*id), name, value, *mode, now)?;
            }
            Op::RemoveXattr(id, name) => pool.remove_xattr(self.ino(*id), name, now)?,
            Op::CloneTree(src, dir, names) => {
                pool.clone_tree(self.ino(*src), self.ino(*dir), names, Some(OWNER), now)?;
            }
            Op::WriteSync(id, offset, data) => {
                pool.write(self.ino(*id), *offset, data, now)?;
                pool.sync()?;
            }
            Op::Sync => pool.sync()?,
            Op::Checkpoint => pool.checkpoint()?,
            Op::Reopen => self.reopen()?,
            contents => self.act_on_contents(contents, now)?,
        }
        Ok(())
    }

    fn act_on_contents(&self, op: &Op, now: Time) -> Result<()> {
        let pool = &self.pool;
        match op {
            Op::Write(id, offset, data) => {
                pool.write(self.ino(*id), *offset, data, now)?;
                pool.anticipate_sync(); // as the mount does
            }
            Op::Truncate(id, size) => {
                let attr = pool.truncate(self.ino(*id), *size, now)?;
                assert_eq!(attr.size, *size, "truncate returned another size");
            }
            Op::Punch(id, offset, len) => pool.punch(self.ino(*id), *offset, *len, now)?,
            Op::CloneFile(src, dst) => pool.clone_file(self.ino(*src), self.ino(*dst), now)?,
            Op::CloneRange((src, src_offset), (dst, dst_offset), len) => {
                let (from, to) = (self.ino(*src), self.ino(*dst));
                let done = pool.clone_range(from, *src_offset, to, *dst_offset, *len, now)?;
                assert!(done <= *len, "cloned more than asked for");
            }
            Op::Share((src, _), (dst, _), _) => {
                let range = range_of(op);
                pool.share_ranges(self.ino(*src), self.ino(*dst), &[range], now)?;
            }
            Op::ShareEqual((src, _), (dst, _), count) => {
                let range = range_of(op);
                let equal = pool.share_equal(self.ino(*src), self.ino(*dst), &range, false)?;
                assert!(equal.blocks() <= *count, "shared more than asked for");
            }
            Op::BeginClone(src, dst, size) => {
                pool.begin_clone(self.ino(*src), self.ino(*dst), *size, now)?;
            }
            Op::ExtendClone(dst, size) => {
                let extended = pool.extend_clone(self.ino(*dst), *size, now)?;
                let was_pinned = self.pinned.contains(dst);
                if was_pinned && !extended && self.has_failed {
                    let why = "a change that failed had ended the clone";
                    return Err(Error::new(Kind::Io, why));
                }
                assert_eq!(extended, was_pinned, "extend_clone of {dst}");
            }
            Op::EndClone(dst) => pool.end_clone(self.ino(*dst))?,
            Op::Seek(id, offset) => self.seek(*id, *offset)?,
            other => unreachable!("{other:?} is not about contents"),
        }
        Ok(())
    }

    fn reopen(&mut self) -> Result<()> {
        let Some((device, cache_size)) = self.home.clone() else {
            return self.pool.sync();
        };
        self.pool.close()?;
        self.pool = open(&device, cache_size)?;
        Ok(())
    }

    /// What is called a hole must read as zeros; small holes may be called data.
    fn seek(&self, id: Id, offset: u64) -> Result<()> {
        const P: u64 = PAGE as u64;
        let content = &self.model.node(id).content;
        let found = |result: Result<u64>| match result {
            Err(error) if error.kind() == Kind::NoSuchOffset => Ok(None),
            other => other.map(Some),
        };
        let data = found(self.pool.seek_data(self.ino(id), offset))?;
        let hole = found(self.pool.seek_hole(self.ino(id), offset))?;
        let is_zero = |from: u64, to: u64| {
            let mut pages = content.data_pages();
            !pages.any(|page| page >= from / P && page < to.div_ceil(P))
        };
        if offset >= content.size() {
            assert_eq!((data, hole), (None, None), "seek behind the end of {id}");
            return Ok(());
        }
        let end = content.size();
        let (data, hole) = (data.unwrap_or(end), hole.unwrap_or(end));
        assert!(data >= offset && data <= end && hole >= offset && hole <= end);
        assert!(
            data < end || hole == offset,
            "neither data nor hole in {id}"
        );
        if data > offset {
            assert!(
                is_zero(offset, data),
                "data of {id} behind {offset} is called a hole"
            );
        }
        if hole < end {
            assert!(
                is_zero(hole, hole + 1),
                "data of {id} at {hole} is called a hole"
            );
        }
        Ok(())
    }

    /// Learns the engine's numbers of nodes that are new in the model, by their names.
    fn learn(&mut self) {
        if self.model.nodes.keys().all(|id| self.inos.contains_key(id)) {
            return;
        }
        let mut todo = vec![ROOT];
        while let Some(dir) = todo.pop() {
            for (name, child) in &self.model.node(dir).entries {
                if !self.inos.contains_key(child) {
                    let found = self.pool.lookup(self.inos[&dir], name);
                    let attr = found.unwrap_or_else(|error| panic!("{}: {error}", show(name)));
                    self.inos.insert(*child, attr.ino);
                }
                if self.model.node(*child).is_dir() {
                    todo.push(*child);
                }
            }
        }
    }

    /// Compares all of the open pool with the model, in words; also what is found by asking for
    /// holes, and what orphans hold.
    pub(crate) fn compare(&self) -> std::result::Result<(), String> {
        let view = View::of_pool(&self.pool).map_err(|error| format!("cannot read: {error}"))?;
        let differences = view.differences(&View::of_model(&self.model));
        if !differences.is_empty() {
            return Err(differences.join("\n"));
        }
        for (id, node) in &self.model.nodes {
            if node.is_file() {
                self.compare_file(*id, node)
                    .map_err(|error| format!("file {id}: {error}"))?;
            } else if node.is_dir() && node.nlink > 0 {
                let listed = list(&self.pool, self.ino(*id));
                let listed = listed.map_err(|error| format!("directory {id}: {error}"))?;
                if !listed.keys().eq(node.entries.keys()) {
                    return Err(format!("directory {id} lists other names"));
                }
            }
        }
        Ok(())
    }

    fn compare_file(&self, id: Id, node: &Node) -> Result<()> {
        let ino = self.ino(id);
        for page in node.content.data_pages() {
            let offset = page * PAGE as u64;
            let hole = self.pool.seek_hole(ino, offset)?;
            assert!(hole > offset, "hole at {offset} of {id}, where data is");
            let data = self.pool.seek_data(ino, offset)?;
            assert_eq!(data, offset, "no data at {offset} of {id}");
        }
        if node.nlink == 0 {
            let len = node.content.size().min(1024 * 1024) as usize;
            let mut bytes = Vec::new();
            self.pool.read(ino, 0, len, &mut bytes)?;
            assert!(bytes == node.content.read(0, len), "orphan {id} differs");
        }
        Ok(())
    }
}

/// What a share is about.
fn range_of(op: &Op) -> Share {
    match op {
        Op::Share((_, block), (_, dst_block), count)
        | Op::ShareEqual((_, block), (_, dst_block), count) => Share {
            block: *block,
            dst_block: *dst_block,
            count: *count,
        },
        other => unreachable!("{other:?} shares nothing"),
    }
}

/// The operation on the model alone.
pub(crate) fn apply(model: &mut Model, op: &Op) -> std::result::Result<(), Kind> {
    match op {
        Op::Create(dir, name, kind, target) => {
            let mut node = Node::new(*kind, 0o640, OWNER.0, OWNER.1);
            node.target = target.clone();
            model.create(*dir, name, node)?;
        }
        Op::Link(id, dir, name) => model.link(*id, *dir, name)?,
        Op::Unlink(dir, name, now) => {
            let id = model.unlink(*dir, name)?;
            if *now {
                model.reclaim(id);
            }
        }
        Op::Rmdir(dir, name) => {
            let id = model.rmdir(*dir, name)?;
            model.reclaim(id);
        }
        Op::Reclaim(id) => model.reclaim(*id),
        Op::Rename(from, to, mode) => {
            let old = model.rename((from.0, &from.1), (to.0, &to.1), *mode)?;
            if let Some(old) = old {
                model.reclaim(old);
            }
        }
        Op::SetAttr(id, set) => model.set_attr(*id, set),
        Op::SetXattr(id, name, value, mode) => model.set_xattr(*id, name, value, *mode)?,
        Op::RemoveXattr(id, name) => model.remove_xattr(*id, name)?,
        Op::Write(id, offset, data) | Op::WriteSync(id, offset, data) => {
            model.write(*id, *offset, data);
        }
        Op::Truncate(id, size) => model.truncate(*id, *size),
        Op::Punch(id, offset, len) => model.punch(*id, *offset, *len),
        Op::CloneFile(src, dst) => model.clone_file(*src, *dst),
        Op::CloneRange(src, dst, len) => {
            model.clone_range(*src, *dst, *len);
        }
        Op::Share((src, block), (dst, dst_block), count) => {
            let bytes = |blocks: &u64| blocks * PAGE as u64;
            model.clone_range((*src, bytes(block)), (*dst, bytes(dst_block)), bytes(count));
        }
        // It ends a clone in pieces, and changes nothing else.
        Op::ShareEqual(_, (dst, _), _) => model.end_clone(*dst),
        Op::BeginClone(src, dst, size) => model.begin_clone(*src, *dst, *size),
        Op::ExtendClone(dst, size) => {
            model.extend_clone(*dst, *size);
        }
        Op::EndClone(dst) => model.end_clone(*dst),
        Op::CloneTree(src, dir, names) => model.clone_tree(*src, *dir, names, Some(OWNER))?,
        Op::Sync | Op::Checkpoint | Op::Seek(..) => {}
        Op::Reopen => model.forget_unnamed(),
    }
    Ok(())
}

/// The state after one operation.
pub(crate) struct Step {
    /// What the model showed.
    pub(crate) model: Model,
    /// Digest of that.
    pub(crate) digest: u64,
    /// Events of the device when the operation began, and when it had returned.
    pub(crate) events: std::ops::Range<usize>,
    pub(crate) text: String,
    /// True if this operation promised that all before it lasts.
    pub(crate) is_durable: bool,
}

/// A finished run.
pub(crate) struct History {
    pub(crate) seed: u64,
    pub(crate) cache_size: u64,
    /// `steps[0]` is the empty pool, durable.
    pub(crate) steps: Vec<Step>,
    pub(crate) trace: SimTrace,
}

impl Step {
    pub(crate) fn new(
        model: &Model,
        text: String,
        is_durable: bool,
        events: std::ops::Range<usize>,
    ) -> Self {
        Self {
            model: model.clone(),
            digest: View::of_model(model).digest(),
            events,
            text,
            is_durable,
        }
    }
}

impl History {
    /// The steps that a pool may be at after a crash behind `position` events: from the last
    /// acknowledged sync to the operation that was under way.
    pub(crate) fn allowed(&self, position: usize) -> std::ops::RangeInclusive<usize> {
        let acked = self
            .steps
            .iter()
            .rposition(|step| step.is_durable && step.events.end <= position);
        let begun = self
            .steps
            .iter()
            .rposition(|step| step.events.start <= position);
        acked.unwrap_or(0)..=begun.unwrap_or(0)
    }
}
