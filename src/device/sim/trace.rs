//! A recorded history of a simulated device, and walking through it: a crash image at any write
//! costs a copy of some pointers, so that a test can have them all.

use super::SimDevice;
use super::image::{Page, State};
use crate::units::BLOCK_SIZE;

/// One change of a device.
#[derive(Clone)]
pub(super) enum Event {
    /// These pages were written at `addr` bytes; the next `held` syncs pass them over.
    Write {
        addr: u64,
        pages: Vec<Option<Page>>,
        held: u32,
    },
    /// `len` bytes at `addr` were given back.
    Discard { addr: u64, len: u64 },
    /// The device grew to `len` bytes.
    Grow { len: u64 },
    /// Everything completed is durable.
    Sync,
    /// A sync failed: what is durable follows from the seed.
    FailedSync { seed: u64 },
}

/// All changes of a device since [`SimDevice::record`].
#[derive(Clone)]
pub struct SimTrace {
    base: State,
    events: Vec<Event>,
}

impl SimTrace {
    pub(super) fn new(base: State) -> Self {
        Self {
            base,
            events: Vec::new(),
        }
    }

    pub(super) fn push(&mut self, event: Event) {
        self.events.push(event);
    }

    /// Number of events: writes, discards and effective syncs.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// True if nothing happened.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// A walk through the history, from its beginning.
    pub fn replay(&self) -> SimReplay<'_> {
        SimReplay {
            trace: self,
            state: self.base.clone(),
            position: 0,
        }
    }
}

/// The device at one point of its history.
pub struct SimReplay<'a> {
    trace: &'a SimTrace,
    state: State,
    position: usize,
}

impl SimReplay<'_> {
    /// Goes over the next event; false at the end.
    pub fn step(&mut self) -> bool {
        let Some(event) = self.trace.events.get(self.position) else {
            return false;
        };
        self.state.apply(event);
        self.position += 1;
        true
    }

    /// Events passed.
    pub fn position(&self) -> usize {
        self.position
    }

    /// True if the event passed last was a write, discard or growth, so that there is something new to
    /// lose.
    pub fn is_behind_write(&self) -> bool {
        let last = self.position.checked_sub(1);
        matches!(
            last.and_then(|last| self.trace.events.get(last)),
            Some(Event::Write { .. } | Event::Discard { .. } | Event::Grow { .. })
        )
    }

    /// What the event passed last did, in words.
    pub fn describe(&self) -> String {
        let block = BLOCK_SIZE as u64;
        let last = self.position.checked_sub(1);
        match last.and_then(|last| self.trace.events.get(last)) {
            None => "the beginning".into(),
            Some(Event::Write { addr, pages, .. }) => {
                format!(
                    "a write of {} blocks at block {}",
                    pages.len(),
                    addr / block
                )
            }
            Some(Event::Discard { addr, len }) => {
                format!(
                    "a discard of {} blocks at block {}",
                    len / block,
                    addr / block
                )
            }
            Some(Event::Grow { len }) => format!("growth to {} blocks", len / block),
            Some(Event::Sync) => "a sync".into(),
            Some(Event::FailedSync { .. }) => "a sync that failed".into(),
        }
    }

    /// The device as it was here, with what is pending.
    pub fn device(&self, seed: u64) -> SimDevice {
        SimDevice::from_state(self.state.clone(), seed)
    }

    /// The device after a crash here, as [`SimDevice::crash`].
    pub fn crash(&self, seed: u64) -> SimDevice {
        self.device(seed).crash(seed)
    }

    /// As [`SimDevice::crash_all`].
    pub fn crash_all(&self) -> SimDevice {
        self.device(0).crash_all()
    }

    /// As [`SimDevice::crash_none`].
    pub fn crash_none(&self) -> SimDevice {
        self.device(0).crash_none()
    }
}
