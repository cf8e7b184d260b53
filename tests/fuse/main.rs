//! The mounted filesystem, as programs see it: real mounts of a pool in a temporary directory,
//! one module per family of calls.
//!
//! A test that cannot run here (no /dev/fuse, not root) says so on stderr and passes.
#![cfg(feature = "fuse")]
#![allow(clippy::unwrap_used)]

mod control;
mod copy;
mod data;
mod fixture;
#[allow(dead_code)]
#[path = "../../fuzz/src/lib.rs"]
mod fuzz;
mod hostile;
mod mounting;
mod names;
mod permissions;
mod scrub;
mod space;
mod sys;
mod xattrs;
