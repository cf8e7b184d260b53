//! The names of `sync` over the model checker, with the faces of `parking_lot` and `std`.

use std::cell::Cell;
use std::ops::{Add, Deref, DerefMut, Sub};
use std::sync::PoisonError;
use std::time::Duration;

use shuttle::rand::Rng as _;

pub(crate) use shuttle::sync::{atomic, mpsc};
pub(crate) use shuttle::thread_local as local;

/// Most steps of others that a wait with a limit lasts if nobody signals.
const STEPS_MAX: u32 = 16;

/// Threads of the model.
pub(crate) mod thread {
    pub(crate) use shuttle::thread::{Builder, JoinHandle, panicking, scope, yield_now};

    /// Lets others go on, and moves the clock.
    pub(crate) fn sleep(time: std::time::Duration) {
        super::pass(time);
        yield_now();
    }
}

std::thread_local! {
    /// The time of the world that runs on this thread of the host.
    static CLOCK: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

fn pass(time: Duration) {
    CLOCK.set(CLOCK.get() + time);
}

/// A point of the time that only waiting moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Instant(Duration);

impl Instant {
    pub(crate) fn now() -> Self {
        Self(CLOCK.get())
    }

    pub(crate) fn saturating_duration_since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    pub(crate) fn elapsed(self) -> Duration {
        Self::now().saturating_duration_since(self)
    }
}

impl Sub for Instant {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        self.0 - earlier.0
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self(self.0 + time)
    }
}

/// A mutex that no panic poisons.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

/// Holds a [`Mutex`]. Empty only inside [`Condvar`].
#[derive(Debug)]
pub(crate) struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
    held: Option<shuttle::sync::MutexGuard<'a, T>>,
}

impl<T> Mutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(shuttle::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        MutexGuard {
            mutex: self,
            held: Some(held),
        }
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.held.as_ref().expect("empty only inside a wait")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.held.as_mut().expect("empty only inside a wait")
    }
}

/// A signal.
#[derive(Debug, Default)]
pub(crate) struct Condvar {
    signal: shuttle::sync::Condvar,
    /// Signals so far, for waits with a limit. Nobody is scheduled between reading and writing it.
    count: std::sync::atomic::AtomicU64,
}

impl Condvar {
    pub(crate) const fn new() -> Self {
        Self {
            signal: shuttle::sync::Condvar::new(),
            count: std::sync::atomic::AtomicU64::new(0),
        }
    }

    fn count(&self) -> u64 {
        self.count.load(std::sync::atomic::Ordering::SeqCst)
    }

    pub(crate) fn notify_all(&self) {
        self.signal.notify_all();
        self.count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }

    pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        let held = guard.held.take().expect("empty only inside a wait");
        let held = self.signal.wait(held);
        guard.held = Some(held.unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits for a signal, or as long as the scheduler likes.
    pub(crate) fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, time: Duration) {
        let before = self.count();
        drop(guard.held.take());
        let mut left = shuttle::rand::thread_rng().gen_range(1..=STEPS_MAX);
        while left > 0 && self.count() == before {
            shuttle::thread::yield_now();
            left -= 1;
        }
        if left == 0 {
            pass(time);
        }
        let held = guard.mutex.0.lock();
        guard.held = Some(held.unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, until: Instant) {
        self.wait_for(guard, until.0.saturating_sub(CLOCK.get()));
    }
}

/// Who holds a [`RwLock`] for reading.
type Holders = std::sync::Mutex<Vec<shuttle::thread::ThreadId>>;

/// A lock for many readers or one writer that no panic poisons.
#[derive(Debug, Default)]
pub(crate) struct RwLock<T> {
    lock: shuttle::sync::RwLock<T>,
    holders: Holders,
}

/// Holds a [`RwLock`] for reading.
#[derive(Debug)]
pub(crate) struct RwLockReadGuard<'a, T> {
    held: shuttle::sync::RwLockReadGuard<'a, T>,
    holders: &'a Holders,
}

/// Holds a [`RwLock`] for writing.
pub(crate) type RwLockWriteGuard<'a, T> = shuttle::sync::RwLockWriteGuard<'a, T>;

impl<T> RwLock<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self {
            lock: shuttle::sync::RwLock::new(value),
            holders: Holders::new(Vec::new()),
        }
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
        let me = shuttle::thread::current().id();
        let holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        let again = holders.contains(&me);
        drop(holders);
        assert!(!again, "a thread takes a read lock that it holds"); // I2
        let held = self.lock.read().unwrap_or_else(PoisonError::into_inner);
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        holders.push(me);
        drop(holders);
        RwLockReadGuard {
            held,
            holders: &self.holders,
        }
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.lock.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Deref for RwLockReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.held
    }
}

impl<T> Drop for RwLockReadGuard<'_, T> {
    fn drop(&mut self) {
        let me = shuttle::thread::current().id();
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        holders.retain(|holder| *holder != me);
    }
}
