//! A simulated device whose operations take time: others run between the beginning and the end of
//! each, and what touches one place at one time is a failure.
//!
//! Invariants that the engine owes the device, checked here:
//!
//! 1. A write overlaps no other operation that is under way, nor does a discard: what is read
//!    would be neither old nor new, and what is written neither of the two.

use std::fmt;
use std::io;
use std::sync::Mutex;

use nodupe::device::{BlockDevice, SimDevice};
use shuttle::sync::atomic::{AtomicU64, Ordering};

/// What an operation does to its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Read,
    Write,
    Discard,
}

/// Called with the device at the moment of a planned cut.
type OnCut = Box<dyn FnOnce(&SimDevice) + Send>;

/// The device. Its own bookkeeping is atomic: nobody is scheduled while `busy` or `cut` is held.
pub(crate) struct Slow {
    pub(crate) sim: SimDevice,
    /// Accessed only so that the scheduler may choose.
    point: AtomicU64,
    busy: Mutex<Vec<(What, u64, u64)>>,
    cut: Mutex<Option<(u64, OnCut)>>,
}

impl fmt::Debug for Slow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.sim.fmt(f)
    }
}

impl Slow {
    pub(crate) fn new(sim: SimDevice) -> Self {
        Self {
            sim,
            point: AtomicU64::new(0),
            busy: Mutex::new(Vec::new()),
            cut: Mutex::new(None),
        }
    }

    /// Calls `then` at the `nth` moment from now on: one before and one behind each operation.
    pub(crate) fn cut_after(&self, nth: u64, then: impl FnOnce(&SimDevice) + Send + 'static) {
        *self.cut.lock().expect("nobody panics inside") = Some((nth, Box::new(then)));
    }

    fn point(&self) {
        self.point.fetch_add(1, Ordering::SeqCst);
        let mut cut = self.cut.lock().expect("nobody panics inside");
        if let Some((left, _)) = cut.as_mut() {
            *left -= 1;
        }
        let due = cut.take_if(|(left, _)| *left == 0);
        drop(cut);
        if let Some((_, then)) = due {
            then(&self.sim);
        }
    }

    fn during<T>(
        &self,
        what: What,
        (addr, len): (u64, u64),
        op: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        self.point();
        let mine = (what, addr, addr + len);
        {
            let mut busy = self.busy.lock().expect("nobody panics inside");
            let meets = busy.iter().find(|(other, from, to)| {
                *from < mine.2 && mine.1 < *to && !(*other == What::Read && what == What::Read)
            });
            let meets = meets.copied();
            busy.push(mine);
            drop(busy);
            assert!(meets.is_none(), "{mine:?} meets {meets:?} on the device");
        }
        let outcome = op();
        self.point();
        let mut busy = self.busy.lock().expect("nobody panics inside");
        let at = busy.iter().position(|other| *other == mine);
        busy.swap_remove(at.expect("it was put there"));
        outcome
    }
}

impl BlockDevice for Slow {
    fn len(&self) -> u64 {
        self.sim.len()
    }

    fn read_at(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        let range = (addr, buf.len() as u64);
        self.during(What::Read, range, || self.sim.read_at(addr, buf))
    }

    fn write_at(&self, addr: u64, data: &[u8]) -> io::Result<()> {
        let half = data.len() / 8192 * 4096;
        self.during(What::Write, (addr, data.len() as u64), || {
            if half > 0 {
                self.sim.write_at(addr, &data[..half])?;
                self.point();
            }
            self.sim.write_at(addr + half as u64, &data[half..])
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.point();
        let outcome = self.sim.sync();
        self.point();
        outcome
    }

    fn discard(&self, addr: u64, len: u64) -> io::Result<()> {
        self.during(What::Discard, (addr, len), || self.sim.discard(addr, len))
    }
}
