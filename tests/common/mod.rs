//! What the crash and fault tests share: a model of the filesystem that has no line in common with
//! the engine, random histories that run on both, and the comparison of the two.
#![allow(dead_code)] // each test binary uses its part

pub(crate) mod content;
pub(crate) mod crash;
pub(crate) mod damage;
pub(crate) mod generate;
pub(crate) mod history;
pub(crate) mod model;
pub(crate) mod view;
