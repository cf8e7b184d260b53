//! Makes a failing history small: operations are left out, then made simpler, as long as what is
//! left still fails in the same way. Bounded in time.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::time::{Duration, Instant};

use super::crash::{Depth, Totals, Violation, cut};
use super::history::Op;
use super::script::{Planned, Script};

/// Longest time for one failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(40);

thread_local! {
    /// True while panics of this thread are expected and need no report.
    static QUIET: Cell<bool> = const { Cell::new(false) };
    /// Where the last of them was.
    static PLACE: Cell<String> = const { Cell::new(String::new()) };
}

/// Runs `test`; a panic is a violation as well, and printed only by whoever reports it.
pub(crate) fn caught<T>(
    test: impl FnOnce() -> std::result::Result<T, Violation>,
) -> std::result::Result<T, Violation> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| match info.location() {
            Some(place) if QUIET.get() => PLACE.set(format!(" at {place}")),
            _ => before(info),
        }));
    });
    let was_quiet = QUIET.replace(true);
    let result = catch_unwind(AssertUnwindSafe(test));
    QUIET.set(was_quiet);
    result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).into()));
        let (place, text) = (PLACE.take(), text.unwrap_or_default());
        Err(Violation::plain(format!("panic{place}: {text}")))
    })
}

/// Runs a script, cuts it at each write, and says what is wrong.
pub(crate) fn crash_everywhere(
    script: &Script,
    depth: &Depth,
    totals: &Totals,
) -> std::result::Result<(), Violation> {
    caught(|| {
        let history = script.run().map_err(Violation::plain)?;
        cut(&history, depth, totals)
    })
}

/// A small script that fails like `script`, and how.
pub(crate) struct Shrunk {
    pub(crate) script: Script,
    pub(crate) violation: Violation,
    /// Scripts that were tried.
    pub(crate) tried: usize,
}

impl Shrunk {
    pub(crate) fn report(&self) -> String {
        format!(
            "shrunk to {} operations ({} tries), on a new pool of {} KiB with a journal of {} KiB{}:\n{}{}",
            self.script.ops.len(),
            self.tried,
            self.script.geometry.pool_size / 1024,
            self.script.geometry.journal_size / 1024,
            if self.script.ignore_sync {
                ", syncs ignored"
            } else {
                ""
            },
            self.script.text(),
            self.violation.error,
        )
    }
}

/// Makes `script` smaller. `fails` runs one and returns what is wrong with it, if anything.
pub(crate) fn shrink(
    script: &Script,
    violation: Violation,
    patience: Duration,
    fails: impl Fn(&Script) -> Option<Violation>,
) -> Shrunk {
    let begun = Instant::now();
    let mut best = Shrunk {
        script: script.clone(),
        violation,
        tried: 0,
    };
    let attempt = |best: &mut Shrunk, ops: Vec<Planned>| {
        best.tried += 1;
        let script = Script {
            ops,
            ..best.script.clone()
        };
        // A crash that goes wrong must not turn into an operation that does, or the other way.
        let same =
            |found: &Violation| found.position.is_some() == best.violation.position.is_some();
        let Some(found) = fails(&script).filter(same) else {
            return false;
        };
        best.script = script;
        best.violation = found;
        true
    };
    // What came after the failure is not part of it.
    if let Some(step) = best.violation.step {
        let ops = best.script.ops.iter().take(step).cloned().collect();
        attempt(&mut best, ops);
    }
    let is_late = || begun.elapsed() > patience;
    loop {
        let before = (best.script.ops.len(), size(&best.script));
        let mut chunk = best.script.ops.len().div_ceil(2);
        while chunk > 0 && !is_late() {
            let mut end = best.script.ops.len();
            while end > 0 && !is_late() {
                let start = end.saturating_sub(chunk);
                let mut ops = best.script.ops.clone();
                ops.drain(start..end);
                attempt(&mut best, ops);
                end = start.min(best.script.ops.len());
            }
            chunk /= 2;
        }
        for index in (0..best.script.ops.len()).rev() {
            for simpler in simpler(&best.script.ops[index].op) {
                if is_late() {
                    break;
                }
                let mut ops = best.script.ops.clone();
                ops[index].op = simpler;
                if attempt(&mut best, ops) {
                    break;
                }
            }
        }
        if is_late() || (best.script.ops.len(), size(&best.script)) == before {
            return best;
        }
    }
}

/// Bytes in all operations: what the second half of shrinking makes less.
fn size(script: &Script) -> usize {
    let sizes = script.ops.iter().map(|planned| match &planned.op {
        Op::Write(_, offset, data) => data.len() + usize::from(*offset > 0),
        Op::WriteSync(_, offset, data) => data.len() + usize::from(*offset > 0) + 1,
        Op::SetXattr(_, _, value, _) => value.len(),
        _ => 0,
    });
    sizes.sum()
}

/// Operations that do less than this one.
fn simpler(op: &Op) -> Vec<Op> {
    let mut found = Vec::new();
    match op {
        Op::Write(id, offset, data) => {
            if *offset > 0 {
                found.push(Op::Write(*id, 0, data.clone()));
            }
            for len in [1, 4096, data.len() / 2] {
                if len < data.len() {
                    found.push(Op::Write(*id, *offset, data[..len].to_vec()));
                }
            }
        }
        Op::WriteSync(id, offset, data) => {
            found.push(Op::Write(*id, *offset, data.clone()));
            if data.len() > 1 {
                found.push(Op::WriteSync(*id, 0, data[..1].to_vec()));
            }
        }
        Op::SetXattr(id, name, value, mode) if !value.is_empty() => {
            found.push(Op::SetXattr(*id, name.clone(), Vec::new(), *mode));
        }
        _ => {}
    }
    found
}
