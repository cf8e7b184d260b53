//! Faults on request: which operation goes wrong, how, and how often.

/// The kind of operation that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOp {
    /// `read_at`.
    Read,
    /// `write_at`.
    Write,
    /// `sync`.
    Sync,
    /// `discard`.
    Discard,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The operation fails with `EIO`. A write may have been done wholly, in part or not at all;
    /// after a sync each pending write is durable or will be lost, whatever later syncs say.
    Io,
    /// A write fails with `ENOSPC` and does nothing; a sync does the same as for [`Io`](Self::Io).
    NoSpace,
    /// The operation says yes and does nothing. A read gives zeros.
    Lost,
    /// The operation is done at another address. For syncs and discards as [`Io`](Self::Io).
    Misdirected,
    /// Says yes, but only some of the sectors are written; a read is zeros from some byte on. For
    /// syncs and discards as [`Io`](Self::Io).
    Torn,
    /// One bit of what is written or read is wrong. For syncs and discards as [`Io`](Self::Io).
    FlipBit,
    /// One block of what is written or read is zeros. For syncs and discards as [`Io`](Self::Io).
    Zeros,
    /// One block of what is written or read is noise. For syncs and discards as [`Io`](Self::Io).
    Garbage,
    /// A write is reordered over the syncs behind it: it is there for whoever reads, but the next
    /// few syncs do not make it durable, although they say yes. Reads, syncs and discards: as
    /// [`Io`](Self::Io).
    Delayed,
}

/// How often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// That one operation.
    Once,
    /// That one and all of its kind behind it.
    Forever,
}

#[derive(Debug)]
struct Plan {
    op: FaultOp,
    /// Operations of this kind until it happens, this one included; 0: it happened.
    left: u64,
    fault: Fault,
    repeat: Repeat,
}

/// All planned faults.
#[derive(Debug, Default)]
pub(super) struct Faults {
    plans: Vec<Plan>,
}

impl Faults {
    pub(super) fn plan(&mut self, op: FaultOp, nth: u64, fault: Fault, repeat: Repeat) {
        assert!(nth > 0, "operations are counted from 1");
        self.plans.push(Plan {
            op,
            left: nth,
            fault,
            repeat,
        });
    }

    /// Counts one operation; what goes wrong with it, of several plans the oldest one.
    pub(super) fn next(&mut self, op: FaultOp) -> Option<Fault> {
        let mut found = None;
        for plan in self.plans.iter_mut().filter(|plan| plan.op == op) {
            let hit = match plan.left {
                0 => plan.repeat == Repeat::Forever,
                left => {
                    plan.left = left - 1;
                    plan.left == 0
                }
            };
            if hit && found.is_none() {
                found = Some(plan.fault);
            }
        }
        found
    }
}
