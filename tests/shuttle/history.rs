//! What the threads of a world did to small pieces of files, when each operation began and ended,
//! and whether one order of all of them explains what was read, or what a crash left.
//!
//! A *register* is half a block of a file, or a name: the unit in which the engine promises that
//! an operation happens wholly or not at all. Time counts beginnings and ends.

use std::collections::{BTreeMap, HashSet};

/// A register: a file (or a thread's names) and a place in it.
pub(crate) type Place = (u32, u32);

/// What was done to a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    Write(u64),
    Read(u64),
}

/// An operation on a register. `end` is `NEVER` while it is under way, and for good if it failed:
/// it may have happened, then or later.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    begin: u64,
    end: u64,
    act: Act,
}

const NEVER: u64 = u64::MAX;

/// Names an operation that is under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket(u64);

/// Everything that was done.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    now: u64,
    registers: BTreeMap<Place, Vec<Access>>,
    /// What had ended before this is durable.
    durable: u64,
    /// The first failure of the device that a caller was told.
    failed: Option<u64>,
}

impl History {
    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// A time that everything before it, and nothing behind it, has passed.
    pub(crate) fn mark(&mut self) -> Ticket {
        Ticket(self.tick())
    }

    /// An operation that writes begins.
    pub(crate) fn begin(&mut self, writes: impl IntoIterator<Item = (Place, u64)>) -> Ticket {
        let begin = self.tick();
        for (place, value) in writes {
            self.registers.entry(place).or_default().push(Access {
                begin,
                end: NEVER,
                act: Act::Write(value),
            });
        }
        Ticket(begin)
    }

    /// It ended well.
    pub(crate) fn end(&mut self, ticket: Ticket) {
        let end = self.tick();
        for access in self.registers.values_mut().flatten() {
            if access.begin == ticket.0 {
                access.end = end;
            }
        }
    }

    /// Between `since` and `until` these values were seen.
    pub(crate) fn saw(
        &mut self,
        since: Ticket,
        until: Ticket,
        values: impl IntoIterator<Item = (Place, u64)>,
    ) {
        for (place, value) in values {
            self.registers.entry(place).or_default().push(Access {
                begin: since.0,
                end: until.0,
                act: Act::Read(value),
            });
        }
    }

    /// A sync that began at `begun` said yes.
    pub(crate) fn synced(&mut self, begun: Ticket) {
        assert!(
            self.failed.is_none_or(|failed| begun.0 < failed),
            "a sync said yes that began behind a failure"
        );
        self.durable = self.durable.max(begun.0);
    }

    /// Somebody was told that the device failed.
    pub(crate) fn failure(&mut self) {
        let now = self.tick();
        self.failed.get_or_insert(now);
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// True if this register was ever touched.
    pub(crate) fn places(&self) -> impl Iterator<Item = Place> {
        self.registers.keys().copied()
    }

    /// Fails unless one order explains all reads of each register.
    pub(crate) fn assert_linearizable(&self) {
        for (place, accesses) in &self.registers {
            let must = |access: &Access| access.end != NEVER;
            assert!(
                explains(accesses, must, None),
                "no order explains what was read: {place:?}: {accesses:#?}"
            );
        }
    }

    /// Fails unless the values found behind a crash now, or a close, are those of some moment at
    /// which everything durable had happened. `all`: nothing may be missing.
    pub(crate) fn assert_survived(&self, all: bool, found: &BTreeMap<Place, u64>) {
        for (place, accesses) in &self.registers {
            let durable = if all { NEVER } else { self.durable };
            let value = found.get(place).copied().unwrap_or(0);
            assert!(
                explains(accesses, |access| access.end < durable, Some(value)),
                "found {value} at {place:?}, durable before {durable}: {accesses:#?}"
            );
        }
    }
}

/// True if some order of `accesses`, which begins with value 0 and keeps to the times, has every
/// one for which `must` is true, and ends with `last` if that is given. Those it leaves out are
/// behind its end, or never happened.
fn explains(accesses: &[Access], must: impl Fn(&Access) -> bool, last: Option<u64>) -> bool {
    assert!(accesses.len() <= 128, "too many accesses for one register");
    let needed = (0..accesses.len())
        .filter(|&i| must(&accesses[i]))
        .fold(0_u128, |mask, i| mask | 1 << i);
    let mut seen = HashSet::new();
    let mut todo = vec![(0_u128, 0_u64)];
    while let Some((done, value)) = todo.pop() {
        if done & needed == needed && last.is_none_or(|last| last == value) {
            return true;
        }
        if !seen.insert((done, value)) {
            continue;
        }
        let open = |i: &usize| done & 1 << *i == 0;
        let first_end = (0..accesses.len())
            .filter(open)
            .map(|i| accesses[i].end)
            .min()
            .unwrap_or(NEVER);
        for i in (0..accesses.len()).filter(open) {
            if accesses[i].begin > first_end {
                continue; // one that ended before it began is still to come
            }
            match accesses[i].act {
                Act::Write(new) => todo.push((done | 1 << i, new)),
                Act::Read(seen) if seen == value => todo.push((done | 1 << i, value)),
                Act::Read(_) => {}
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Place = (0, 0);

    /// Write of `value` during `times`.
    fn write(history: &mut History, value: u64, then: impl FnOnce(&mut History)) {
        let ticket = history.begin([(AT, value)]);
        then(history);
        history.end(ticket);
    }

    fn read(history: &mut History, value: u64) {
        let (since, until) = (history.mark(), history.mark());
        history.saw(since, until, [(AT, value)]);
    }

    fn holds(history: &History) -> bool {
        explains(&history.registers[&AT], |access| access.end != NEVER, None)
    }

    #[test]
    fn old_or_new_while_a_write_runs_and_never_back() {
        let mut history = History::default();
        write(&mut history, 1, |history| {
            read(history, 0);
            read(history, 1);
        });
        read(&mut history, 1);
        assert!(holds(&history));
        read(&mut history, 0);
        assert!(!holds(&history), "an old value behind the write");
        let mut history = History::default();
        write(&mut history, 1, |history| {
            read(history, 1);
            read(history, 0);
        });
        assert!(!holds(&history), "new, then old");
    }

    #[test]
    fn what_is_durable_survives_and_the_rest_may() {
        let mut history = History::default();
        write(&mut history, 1, |_| {});
        let sync = history.mark();
        history.synced(sync);
        write(&mut history, 2, |_| {});
        let survives = |value| {
            let durable = history.durable;
            let accesses = &history.registers[&AT];
            explains(accesses, |access| access.end < durable, Some(value))
        };
        assert!(survives(1) && survives(2) && !survives(0) && !survives(3));
    }

    #[test]
    fn what_was_seen_orders_what_survives() {
        let mut history = History::default();
        // Two writes at once; then 1 was seen, so 2 came before it.
        let (one, two) = (history.begin([(AT, 1)]), history.begin([(AT, 2)]));
        history.end(one);
        history.end(two);
        read(&mut history, 1);
        let sync = history.mark();
        history.synced(sync);
        history.assert_survived(false, &BTreeMap::from([(AT, 1)]));
        let wrong = std::panic::catch_unwind(|| {
            history.assert_survived(false, &BTreeMap::from([(AT, 2)]));
        });
        assert!(wrong.is_err());
    }
}
