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
//! 3. A lock made by [`ranked`] is taken only while locks of lower ranks are held, so that no two
//!    threads wait for each other. Builds with assertions watch it and panic. Files' locks share a
//!    rank, and are taken in the order of their inode numbers.
//! 4. A wait with a limit may end early for no reason. Under `shuttle` its end is up to the
//!    scheduler and moves the clock, so nothing relies on how long it takes.

#[cfg(not(feature = "shuttle"))]
mod real {
    pub(crate) use std::sync::atomic;
    pub(crate) use std::sync::mpsc;
    pub(crate) use std::thread;
    pub(crate) use std::thread_local as local;
    pub(crate) use std::time::Instant;

    #[cfg(not(debug_assertions))]
    pub(crate) use parking_lot::{Condvar, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
}

#[cfg(all(not(feature = "shuttle"), debug_assertions))]
mod watched;

#[cfg(all(not(feature = "shuttle"), debug_assertions))]
pub(crate) use watched::{Condvar, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Locks with a place in the order in which a thread takes them.
pub(crate) mod ranked {
    use super::{Mutex, RwLock};

    /// A mutex of this rank, from 1 (taken first) to 8.
    #[cfg_attr(
        any(feature = "shuttle", not(debug_assertions)),
        expect(unused_variables, reason = "watched in builds with assertions only")
    )]
    pub(crate) fn mutex<T>(rank: u8, value: T) -> Mutex<T> {
        #[cfg(all(not(feature = "shuttle"), debug_assertions))]
        return Mutex::ranked(rank, value);
        #[cfg(any(feature = "shuttle", not(debug_assertions)))]
        Mutex::new(value)
    }

    /// A lock of this rank that readers share.
    #[cfg_attr(
        any(feature = "shuttle", not(debug_assertions)),
        expect(unused_variables, reason = "watched in builds with assertions only")
    )]
    pub(crate) fn rw_lock<T>(rank: u8, value: T) -> RwLock<T> {
        #[cfg(all(not(feature = "shuttle"), debug_assertions))]
        return RwLock::ranked(rank, value);
        #[cfg(any(feature = "shuttle", not(debug_assertions)))]
        RwLock::new(value)
    }
}

#[cfg(not(feature = "shuttle"))]
pub(crate) use real::*;

#[cfg(feature = "shuttle")]
mod model;

#[cfg(feature = "shuttle")]
pub(crate) use model::*;
