//! Several logical writers in one history, each with a plan of several steps, interleaved by the
//! seed: an editor that replaces files, a copy in pieces, a database with O_DSYNC, a guest that
//! writes and flushes, a chain of clones, somebody who tidies up, and anybody who does anything.

use std::collections::VecDeque;

use nodupe::device::SplitMix64;
use nodupe::engine::FileKind;

use super::generate::{Limits, next_op, random_bytes};
use super::history::Op;
use super::model::{Id, Model, ROOT};
use super::script::{is_sensible, replace};

/// A step of a plan; what it names is looked up when its turn comes.
enum Todo {
    Op(Op),
    /// On the file of this name in the root directory.
    On(Vec<u8>, fn(Id, Id, &mut SplitMix64) -> Op, Id),
}

/// The writers and their unfinished plans.
pub(crate) struct Writers {
    rng: SplitMix64,
    limits: Limits,
    plans: Vec<VecDeque<Todo>>,
    made: u64,
    /// True if the pool may be closed and opened again in the middle.
    pub(crate) reopens: bool,
}

impl Writers {
    pub(crate) fn new(seed: u64, count: usize, limits: &Limits) -> Self {
        Self {
            rng: SplitMix64::new(seed),
            limits: *limits,
            plans: (0..count.max(1)).map(|_| VecDeque::new()).collect(),
            made: 0,
            reopens: true,
        }
    }

    /// The next operation of somebody.
    pub(crate) fn next(&mut self, model: &Model) -> Op {
        for _ in 0..100 {
            let writer = self.rng.index(self.plans.len());
            let todo = self.plans[writer].pop_front();
            let op = match todo {
                Some(Todo::Op(op)) => Some(op),
                Some(Todo::On(name, make, other)) => model
                    .lookup(ROOT, &name)
                    .ok()
                    .map(|id| make(id, other, &mut self.rng)),
                None if self.plans.len() > 1 && self.rng.chance(30) => {
                    self.plan(writer, model);
                    continue;
                }
                None => Some(self.anything(model)),
            };
            match op {
                Some(op) if is_sensible(&op, model) => return op,
                _ => self.plans[writer].clear(),
            }
        }
        Op::Sync
    }

    fn anything(&mut self, model: &Model) -> Op {
        if self.plans.len() > 1 && self.rng.chance(8) {
            let files = files(model);
            if !files.is_empty() {
                let id = files[self.rng.index(files.len())];
                let size = model.node(id).content.size();
                return match self.rng.below(5) {
                    0 if self.reopens => Op::Reopen,
                    0 => Op::Checkpoint,
                    1 | 2 => Op::Seek(id, self.rng.below(size + 4096)),
                    _ => dsync(id, id, &mut self.rng),
                };
            }
        }
        next_op(&mut self.rng, model, &self.limits)
    }

    fn plan(&mut self, writer: usize, model: &Model) {
        let files = files(model);
        let file = match files.len() {
            0 => None,
            count => Some(files[self.rng.index(count)]),
        };
        self.made += 1;
        let name = format!("w{writer}.{}", self.made % 5).into_bytes();
        let create = |name: &[u8], kind| Op::Create(ROOT, name.to_vec(), kind, Vec::new());
        let fresh = Todo::Op(create(&name, FileKind::Regular));
        let on = |make, other| Todo::On(name.clone(), make, other);
        let plan = match (self.rng.below(6), file) {
            (0, _) => vec![
                fresh,
                on(small_write, 0),
                on(small_write, 0),
                Todo::Op(Op::Sync),
                Todo::Op(replace((ROOT, name.clone()), (ROOT, b"a".to_vec()))),
                Todo::Op(Op::Sync),
            ],
            (1, Some(source)) => vec![
                fresh,
                Todo::On(
                    name.clone(),
                    |dst, src, _| Op::BeginClone(src, dst, 4096),
                    source,
                ),
                on(
                    |dst, _, rng| Op::ExtendClone(dst, (rng.below(4) + 2) * 4096),
                    0,
                ),
                on(
                    |dst, _, rng| Op::ExtendClone(dst, (rng.below(20) + 6) * 4096),
                    0,
                ),
                on(|dst, _, _| Op::EndClone(dst), 0),
            ],
            (2, Some(source)) => vec![
                fresh,
                Todo::Op(Op::Write(source, 0, random_bytes(&mut self.rng, 5000))),
                on(|dst, src, _| Op::CloneFile(src, dst), source),
                on(small_write, 0),
                on(|src, dst, _| Op::CloneFile(src, dst), source),
                on(dsync, 0),
            ],
            (3, Some(file)) => (0..6)
                .map(|_| Todo::Op(dsync(file, 0, &mut self.rng)))
                .collect(),
            (4, Some(file)) => guest(file, &mut self.rng),
            _ => vec![
                Todo::Op(create(&name, FileKind::Directory)),
                on(|dir, _, _| create_in(dir, b"one"), 0),
                on(|dir, _, _| create_in(dir, b"two"), 0),
                on(
                    |dir, _, _| Op::CloneTree(dir, ROOT, vec![b"tree".to_vec()]),
                    0,
                ),
                on(|dir, _, _| Op::Unlink(dir, b"one".to_vec(), true), 0),
                on(
                    |dir, _, _| replace((dir, b"two".to_vec()), (ROOT, b"b".to_vec())),
                    0,
                ),
                Todo::Op(Op::Rmdir(ROOT, name.clone())),
            ],
        };
        self.plans[writer] = plan.into();
    }
}

/// Whole blocks here and there, and a flush now and then.
fn guest(file: Id, rng: &mut SplitMix64) -> Vec<Todo> {
    let mut plan = Vec::new();
    for _ in 0..9 {
        let (at, blocks) = (rng.below(40) * 4096, rng.index(6) + 1);
        let bytes = random_bytes(rng, blocks * 4096);
        plan.push(Todo::Op(Op::Write(file, at, bytes)));
        if rng.chance(33) {
            plan.push(Todo::Op(Op::Sync));
        }
    }
    plan
}

fn create_in(dir: Id, name: &[u8]) -> Op {
    Op::Create(dir, name.to_vec(), FileKind::Regular, Vec::new())
}

fn small_write(id: Id, _: Id, rng: &mut SplitMix64) -> Op {
    let len = rng.index(9000) + 1;
    Op::Write(id, rng.below(20_000), random_bytes(rng, len))
}

fn dsync(id: Id, _: Id, rng: &mut SplitMix64) -> Op {
    let len = (rng.index(16) + 1) * 512;
    Op::WriteSync(id, rng.below(80) * 512, random_bytes(rng, len))
}

fn files(model: &Model) -> Vec<Id> {
    let nodes = model.nodes.iter();
    nodes
        .filter(|(_, node)| node.is_file())
        .map(|(id, _)| *id)
        .collect()
}
