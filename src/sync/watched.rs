//! The locks of `parking_lot` for builds with assertions: each knows its rank, and a thread that
//! takes one out of order panics at once, instead of a deadlock one day.
//!
//! Invariants:
//!
//! 1. A thread's record counts the locks of each rank that it holds; taking one is refused while
//!    one of a higher rank, or of its own, is held. Locks of files ([`SHARED_RANK`]) may be held
//!    several at a time. Rank 0 is not watched.
//! 2. The order is looked at before waiting, so that a would-be deadlock is found also when there
//!    is nobody to wait for.
//! 3. A wait for a signal gives up the lock and takes it again; its place in the record stays.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

/// Highest rank.
const RANKS: usize = 8;
/// The one rank of which a thread may hold several: locks of files, in the order of their numbers.
const SHARED_RANK: u8 = 3;

std::thread_local! {
    static HELD: Cell<[u8; RANKS + 1]> = const { Cell::new([0; RANKS + 1]) };
}

/// A place in the record of this thread.
#[derive(Debug)]
struct Place(u8);

impl Place {
    fn enter(rank: u8) -> Self {
        if rank > 0 {
            let mut held = HELD.get();
            let from = rank + u8::from(rank == SHARED_RANK);
            let over = (from..=RANKS as u8).find(|higher| held[usize::from(*higher)] > 0);
            assert!(
                over.is_none(),
                "a lock of rank {rank} is taken while one of rank {over:?} is held"
            );
            held[usize::from(rank)] += 1;
            HELD.set(held);
        }
        Self(rank)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.0 > 0 {
            let mut held = HELD.get();
            held[usize::from(self.0)] -= 1;
            HELD.set(held);
        }
    }
}

/// A mutex with a rank.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T> {
    rank: u8,
    lock: parking_lot::Mutex<T>,
}

/// Holds a [`Mutex`].
#[derive(Debug)]
pub(crate) struct MutexGuard<'a, T> {
    guard: parking_lot::MutexGuard<'a, T>,
    _place: Place,
}

impl<T> Mutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self::ranked(0, value)
    }

    pub(crate) const fn ranked(rank: u8, value: T) -> Self {
        let lock = parking_lot::Mutex::new(value);
        Self { rank, lock }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        let place = Place::enter(self.rank);
        MutexGuard {
            guard: self.lock.lock(),
            _place: place,
        }
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

/// A signal.
#[derive(Debug, Default)]
pub(crate) struct Condvar(parking_lot::Condvar);

impl Condvar {
    pub(crate) const fn new() -> Self {
        Self(parking_lot::Condvar::new())
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }

    pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        self.0.wait(&mut guard.guard);
    }

    pub(crate) fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, time: Duration) {
        self.0.wait_for(&mut guard.guard, time);
    }

    pub(crate) fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, time: std::time::Instant) {
        self.0.wait_until(&mut guard.guard, time);
    }
}

/// A lock with a rank that readers share.
#[derive(Debug, Default)]
pub(crate) struct RwLock<T> {
    rank: u8,
    lock: parking_lot::RwLock<T>,
}

/// Holds a [`RwLock`] for reading.
#[derive(Debug)]
pub(crate) struct RwLockReadGuard<'a, T> {
    guard: parking_lot::RwLockReadGuard<'a, T>,
    _place: Place,
}

/// Holds a [`RwLock`] for writing.
#[derive(Debug)]
pub(crate) struct RwLockWriteGuard<'a, T> {
    guard: parking_lot::RwLockWriteGuard<'a, T>,
    _place: Place,
}

impl<T> RwLock<T> {
    pub(crate) const fn ranked(rank: u8, value: T) -> Self {
        let lock = parking_lot::RwLock::new(value);
        Self { rank, lock }
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
        let place = Place::enter(self.rank);
        RwLockReadGuard {
            guard: self.lock.read(),
            _place: place,
        }
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, T> {
        let place = Place::enter(self.rank);
        RwLockWriteGuard {
            guard: self.lock.write(),
            _place: place,
        }
    }
}

impl<T> Deref for RwLockReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> Deref for RwLockWriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for RwLockWriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}
