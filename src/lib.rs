//! nodupe: a datastore for virtual disk images in which a copy is a clone.
//!
//! Layers, from the bottom up; each uses only what stands below it:
//!
//! - [`error`], [`units`], [`sys`]: errors, units and value types, system calls;
//! - [`device`], [`ondisk`]: bytes at addresses; bytes to structs and back;
//! - [`engine`]: the pool: files that share blocks, clones, journal, checkpoints, recovery;
//! - [`formats`], [`transfer`]: images of other products, and which of them belong together;
//! - [`vfs`]: what POSIX asks of it: handles, lookups, unlink while open;
//! - [`fuse`] and [`control`]: the mount, and the channel to a running one.
//!
//! The command line program is a separate crate root that sees only what is public here.
//! `docs/architecture.md` follows a read, a write, a sync and a clone through the layers.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod control;
pub mod device;
pub mod engine;
pub mod error;
pub mod formats;
#[cfg(feature = "fuse")]
pub mod fuse;
pub mod ondisk;
mod sync;
pub mod sys;
pub mod transfer;
pub mod units;
pub mod vfs;
