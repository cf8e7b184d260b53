//! One seed is one world: geometry, writers, operations and crashes, or a fault, all follow from
//! it. What the soak runs without end, and the tests a little of.

use nodupe::device::SplitMix64;

use super::campaign::{Tally, bound, inject, kinds, measure};
use super::crash::{Depth, Geometry, TINY, Totals, Verdict, Violation, cut, record};
use super::faulty::{Base, Source, furnished, run_faulty};
use super::generate::{Limits, SMALL};
use super::history::History;
use super::script::{Planned, Script};
use super::shrink::{PATIENCE, caught, crash_everywhere, shrink};
use super::writers::Writers;

const KIB: u64 = 1024;

/// A world of operations and crashes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) geometry: Geometry,
    pub(crate) limits: Limits,
    /// Logical writers; 1: one stream of unrelated operations.
    pub(crate) writers: usize,
    pub(crate) ops: usize,
    pub(crate) ignore_sync: bool,
    pub(crate) depth: Depth,
}

/// Little data, so that operations on names and maps come more often for each crash.
const SPARSE: Limits = Limits {
    nodes_max: 12,
    bytes_max: 256 * KIB,
    file_max: 96 * KIB,
};

impl World {
    /// The world of a seed.
    pub(crate) fn of(seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed ^ 0x0030_711d);
        let geometry = match rng.below(4) {
            // The stage is small for its journal: destage is always under way.
            0 => Geometry {
                pool_size: 16 * KIB * KIB,
                journal_size: 2 * KIB * KIB,
                cache_size: 2 * KIB * KIB,
            },
            1 => Geometry {
                pool_size: 8 * KIB * KIB,
                ..TINY
            },
            _ => TINY,
        };
        let limits = if rng.chance(50) { SPARSE } else { SMALL };
        Self {
            seed,
            geometry,
            limits,
            writers: [1, 2, 3, 5][rng.index(4)],
            ops: [20, 60, 120, 200][rng.index(4)],
            ignore_sync: false,
            depth: Depth {
                images: 2,
                second_every: 16,
                continue_every: 8,
            },
        }
    }

    /// Runs the history, without a crash.
    pub(crate) fn play(&self) -> (Script, std::result::Result<History, Violation>) {
        let mut writers = Writers::new(self.seed, self.writers, &self.limits);
        let mut left = self.ops;
        let mut ops: Vec<Planned> = Vec::new();
        let history = caught(|| {
            record(&self.geometry, self.seed, self.ignore_sync, |runner| {
                left = left.checked_sub(1)?;
                let op = writers.next(&runner.model);
                let next = runner.model.next_id();
                ops.push(Planned {
                    op: op.clone(),
                    next,
                });
                Some(op)
            })
            .map_err(Violation::plain)
        });
        let script = Script {
            geometry: self.geometry,
            seed: self.seed,
            ignore_sync: self.ignore_sync,
            ops,
        };
        (script, history)
    }

    /// Runs the history, crashes it at each write, and reports the first violation, made small.
    pub(crate) fn run(&self, totals: &Totals) -> Verdict {
        let (script, history) = self.play();
        let result = history.and_then(|history| caught(|| cut(&history, &self.depth, totals)));
        let Err(violation) = result else {
            return Ok(());
        };
        Err(report(&script, violation, &self.depth))
    }
}

/// Makes a failing script small and describes it.
pub(crate) fn report(script: &Script, violation: Violation, depth: &Depth) -> String {
    let first = violation.error.clone();
    let unused = Totals::default();
    let shrunk = shrink(script, violation, PATIENCE, |script| {
        // A short history is cut more often, so that the crash that matters is met again.
        let images = if script.ops.len() < 20 {
            8
        } else {
            depth.images
        };
        let depth = Depth { images, ..*depth };
        crash_everywhere(script, &depth, &unused).err()
    });
    format!("{first}\n{}", shrunk.report())
}

/// A few faults of one history, kinds and places chosen by the seed.
pub(crate) fn run_faults(seed: u64, count: usize, tally: &Tally) -> Verdict {
    let mut rng = SplitMix64::new(seed ^ 0xfa17);
    let base = furnished(seed, [0, 20, 60][rng.index(3)])?;
    let measured = measure(&base, seed, Source::Random)?;
    let kinds = kinds();
    for _ in 0..count {
        let (name, wrong) = &kinds[rng.index(kinds.len())];
        let bound = bound(*wrong, &measured);
        if bound == 0 {
            continue;
        }
        let nth = rng.below(bound) + 1;
        let result =
            caught(|| inject(&base, seed, Source::Random, *wrong, nth).map_err(Violation::plain));
        match result {
            Ok(outcome) => tally.add(name, outcome),
            Err(violation) => {
                let text = format!("{name}, n={nth}: {}", violation.error);
                return Err(shrink_fault(&base, seed, text, |source| {
                    inject(&base, seed, source, *wrong, nth).map(drop)
                }));
            }
        }
    }
    Ok(())
}

/// As [`report`] for a fault: the pool is as it was, the operations on it become fewer.
fn shrink_fault(base: &Base, seed: u64, error: String, test: impl Fn(Source) -> Verdict) -> String {
    let Ok(whole) = run_faulty(base, seed, Source::Random, |_| {}, |_, _| false) else {
        return error;
    };
    let script = Script {
        geometry: TINY,
        seed,
        ignore_sync: false,
        ops: whole.ops,
    };
    let fails = |script: &Script| {
        let tried = caught(|| test(Source::List(&script.ops)).map_err(Violation::plain));
        tried.err()
    };
    let shrunk = shrink(&script, Violation::plain(error.clone()), PATIENCE, fails);
    format!(
        "{error}\non the pool that this seed furnishes, {}",
        shrunk.report()
    )
}
