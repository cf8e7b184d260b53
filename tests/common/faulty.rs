//! Histories on a device that fails: run until somebody is told, then everything is asked for.

use std::sync::Arc;

use nodupe::device::{SimDevice, SplitMix64};
use nodupe::error::Kind;

use super::crash::{TINY, Verdict, check, identify, new_pool};
use super::generate::{SMALL, next_op};
use super::history::{History, Op, Runner, Step, apply, open};
use super::model::Model;
use super::script::{Planned, next_of};
use super::writers::Writers;

/// Operations of a history with a fault.
const OPS: usize = 60;

/// A pool that is closed, and what is in it.
pub(crate) type Base = (SimDevice, Model);

/// A pool with some files, closed, and its model.
pub(crate) fn furnished(seed: u64, ops: usize) -> Verdict<Base> {
    let (device, pool) = new_pool(&TINY, seed)?;
    let mut runner = Runner::new(pool);
    let mut rng = SplitMix64::new(seed ^ 0xf00d);
    for _ in 0..ops {
        let op = next_op(&mut rng, &runner.model, &SMALL);
        let done = runner.run(&op);
        done.map_err(|error| format!("{}: {error}", op.text()))?;
    }
    let closed = runner.pool.close();
    closed.map_err(|error| format!("close: {error}"))?;
    let mut model = runner.model;
    model.forget_unnamed();
    Ok((device.crash_none(), model))
}

/// One run of a history on a device that fails.
pub(crate) struct Faulty {
    pub(crate) device: Arc<SimDevice>,
    pub(crate) runner: Runner,
    /// Each step is what it would be had the operation happened, also where it failed.
    pub(crate) history: History,
    /// The newest step that must be there after a crash.
    pub(crate) acked: usize,
    /// The step in which the first fault happened.
    pub(crate) hit: Option<usize>,
    /// Steps that were acknowledged as durable and wrote something.
    pub(crate) durable: Vec<usize>,
    /// The first operation that failed.
    pub(crate) error: Option<String>,
    /// Operations of the run.
    pub(crate) ops: Vec<Planned>,
}

/// Where the operations of a run come from.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    Random,
    List(&'a [Planned]),
}

/// Runs the same operations for the same `seed`, until one fails. `plan` is called behind `open`.
pub(crate) fn run_faulty(
    base: &Base,
    seed: u64,
    source: Source,
    plan: impl Fn(&SimDevice),
    goes_on: impl Fn(&Runner, Kind) -> bool,
) -> Verdict<Faulty> {
    let device = Arc::new(base.0.fork(seed));
    let pool = open(&device, TINY.cache_size).map_err(|error| format!("open: {error}"))?;
    let runner = Runner::adopt(pool, &base.1)?;
    let start = Step::new(&runner.model, "start".into(), true, 0..0);
    plan(&device);
    let mut faulty = Faulty {
        history: History {
            seed,
            cache_size: TINY.cache_size,
            steps: vec![start],
            trace: device.take_trace(),
        },
        device,
        runner,
        acked: 0,
        hit: None,
        durable: vec![0],
        error: None,
        ops: Vec::new(),
    };
    let mut writers = Writers::new(seed, 1 + (seed % 3) as usize, &SMALL);
    writers.reopens = false;
    let mut left = OPS;
    let mut list = match source {
        Source::Random => [].iter(),
        Source::List(ops) => ops.iter(),
    };
    while faulty.error.is_none() {
        let next = match source {
            Source::Random => left.checked_sub(1).map(|rest| {
                left = rest;
                writers.next(&faulty.runner.model)
            }),
            Source::List(_) => next_of(&mut list, &mut faulty.runner),
        };
        let is_last = next.is_none();
        faulty.step(next.unwrap_or(Op::Sync), &goes_on);
        if is_last {
            break;
        }
    }
    Ok(faulty)
}

impl Faulty {
    fn step(&mut self, op: Op, goes_on: impl Fn(&Runner, Kind) -> bool) {
        let next = self.runner.model.next_id();
        let writes = self.device.counts().writes;
        let mut after = self.runner.model.clone();
        if apply(&mut after, &op).is_err() {
            after = self.runner.model.clone();
        }
        let step = Step::new(&after, op.text(), op.is_durable(), 0..0);
        self.history.steps.push(step);
        let index = self.history.steps.len() - 1;
        let result = self.runner.run(&op);
        let counts = self.device.counts();
        if counts.faults > 0 {
            self.hit = self.hit.or(Some(index));
        }
        match result {
            Ok(_) if op.is_durable() => {
                self.acked = index;
                if counts.writes > writes {
                    self.durable.push(index);
                }
            }
            Ok(_) => {}
            Err(error) if goes_on(&self.runner, error.kind()) => {
                self.history.steps.pop();
            }
            Err(error) => {
                self.error = Some(format!("{}: {:?}: {error}", op.text(), error.kind()));
            }
        }
        self.ops.push(Planned { op, next });
    }

    /// The oldest step that a device which lied in step `hit` may bring back without a word: the
    /// last acknowledged one, if anything that was written later proves that it was durable. Of the
    /// end of the journal nobody can tell whether a crash took it.
    pub(crate) fn floor(&self) -> usize {
        let hit = self.hit.unwrap_or(usize::MAX);
        let later = self.durable.iter().filter(|step| **step > hit).count();
        if later > 0 {
            return self.acked;
        }
        let before = self.durable.iter().rev().find(|step| **step < hit);
        before.copied().unwrap_or(0)
    }

    /// The newest step before the fault of which nothing is in the journal alone; the newest of all
    /// if something written later proves what was durable.
    pub(crate) fn checkpoint_before_hit(&self) -> usize {
        let hit = self.hit.unwrap_or(usize::MAX);
        if self.durable.iter().any(|step| *step > hit) {
            return self.acked;
        }
        let is_checkpoint = |step: &&usize| matches!(self.ops[**step - 1].op, Op::Checkpoint);
        let before = self.durable.iter().rev().filter(|step| **step < hit);
        let mut before = before.filter(|step| **step > 0);
        before.find(is_checkpoint).copied().unwrap_or(0)
    }
}

/// After a fault that must poison the pool: no acknowledgement, reads go on, and every crash image
/// is a state since the last acknowledged sync.
pub(crate) fn check_poisoned(faulty: &Faulty) -> Verdict {
    let pool = &faulty.runner.pool;
    let error = faulty.error.as_deref().ok_or("the fault reached nobody")?;
    for _ in 0..2 {
        if pool.sync().is_ok() {
            return Err(format!("a sync was acknowledged after {error}"));
        }
    }
    if pool.checkpoint().is_ok() {
        return Err(format!("a checkpoint was acknowledged after {error}"));
    }
    match pool.poisoned() {
        Some(reason) if !reason.is_empty() => {}
        _ => return Err(format!("poisoned() gives no reason after {error}")),
    }
    let now = nodupe::units::Time::default();
    let tried = pool.set_attr(
        nodupe::units::Ino::ROOT,
        &nodupe::engine::SetAttr {
            mtime: Some(now),
            ..Default::default()
        },
    );
    if tried.is_ok() {
        return Err(format!("a poisoned pool takes changes after {error}"));
    }
    old_data_reads(faulty)?;
    recover(faulty, "before close")?;
    if pool.close().is_ok() {
        return Err(format!("close says yes after {error}"));
    }
    recover(faulty, "after close")
}

/// Files that the history did not change can be read as before.
fn old_data_reads(faulty: &Faulty) -> Verdict {
    let steps = &faulty.history.steps;
    let (first, last) = (&steps[0].model, &steps[steps.len() - 1].model);
    for (id, node) in first.nodes.iter().filter(|(_, node)| node.is_file()) {
        let unchanged = last
            .nodes
            .get(id)
            .is_some_and(|now| now.content.is_same(&node.content));
        if !unchanged {
            continue;
        }
        let len = node.content.size().min(1024 * 1024) as usize;
        let mut bytes = Vec::new();
        let read = faulty
            .runner
            .pool
            .read(faulty.runner.ino(*id), 0, len, &mut bytes);
        read.map_err(|error| format!("old data of {id} cannot be read any more: {error}"))?;
        if bytes != node.content.read(0, len) {
            return Err(format!("old data of {id} reads as something else"));
        }
    }
    Ok(())
}

/// Reopens a few crash images.
pub(crate) fn recover(faulty: &Faulty, when: &str) -> Verdict {
    let newest = faulty.history.steps.len() - 1;
    for seed in 0..3 {
        let image = match seed {
            0 => faulty.device.crash_none(),
            _ => faulty.device.crash(seed),
        };
        let context = |error: String| format!("{when}, image {seed}: {error}");
        check(&image, "of the crash image").map_err(context)?;
        let image = Arc::new(image);
        let pool =
            open(&image, TINY.cache_size).map_err(|error| context(format!("open: {error}")))?;
        identify(&faulty.history, &pool, faulty.acked..=newest).map_err(context)?;
        pool.close()
            .map_err(|error| context(format!("close: {error}")))?;
        check(&image, "after recovery").map_err(context)?;
    }
    Ok(())
}

/// Everything is as the model says, now, after a close, and after a reopen.
pub(crate) fn check_whole(faulty: &Faulty) -> Verdict {
    faulty.device.heal();
    let context = |what: &'static str| move |error| format!("{what}: {error}");
    faulty.runner.compare().map_err(context("at the end"))?;
    let closed = faulty.runner.pool.close();
    closed.map_err(|error| format!("close: {error}"))?;
    let device = Arc::new(faulty.device.crash_none());
    check(&device, "after close")?;
    let pool = open(&device, TINY.cache_size).map_err(|error| format!("reopen: {error}"))?;
    let reopened = Runner::adopt(pool, &faulty.runner.model)?;
    reopened.compare().map_err(context("reopened"))
}
