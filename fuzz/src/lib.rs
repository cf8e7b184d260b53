//! The bodies of the fuzz targets, apart from libFuzzer: `cargo test` runs the same code over the
//! corpus (`tests/corpus.rs`), and `tests/hostile.rs` uses it with seeds instead of coverage.
//!
//! A body takes any bytes and must return: a panic, an endless loop, memory without bound and a
//! write to a place where the pool has nothing to write are what it looks for.
#![allow(unreachable_pub, clippy::unwrap_used)]

pub mod bodies;
pub mod choose;
pub mod exercise;
pub mod fence;
pub mod forge;
pub mod images;
pub mod records;
pub mod seeds;
pub mod template;
