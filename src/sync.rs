//! Layer 0: the locks, signals, atomics, threads and the clock that the engine uses, under one
//! name, so that a model checker can put its own in their place.
//!
//! Normally these are those of `parking_lot` and `std`. With the feature `shuttle` they are those
//! of the crate of that name, which runs all threads of a test one at a time and decides at each
//! lock, atomic access and signal who goes on: `tests/shuttle.rs` explores interleavings of the
//! real engine that way. A program built with that feature cannot open a pool.
//!
//! Invariants:
//!
//! 1. Whatever of the engine one thread does and another can see goes through this module (or
//!    through an `Arc`, whose count nobody waits for). `tests/tidy.rs` looks for other names.
//! 2. Locks are not poisoned by a panic and not re-entrant; also a second read lock of one thread
//!    is an error, because a writer in between makes it a deadlock. Under `shuttle` it panics.
//! 3. A wait with a limit may end early for no reason. Under `shuttle` its end is up to the
//!    scheduler and moves the clock, so nothing relies on how long it takes.

#[cfg(not(feature = "shuttle"))]
mod real {
    pub(crate) use std::sync::atomic;
    pub(crate) use std::sync::mpsc;
    pub(crate) use std::thread;
    pub(crate) use std::thread_local as local;
    pub(crate) use std::time::Instant;

    pub(crate) use parking_lot::{Condvar, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
}

#[cfg(not(feature = "shuttle"))]
pub(crate) use real::*;

#[cfg(feature = "shuttle")]
mod model;

#[cfg(feature = "shuttle")]
pub(crate) use model::*;
