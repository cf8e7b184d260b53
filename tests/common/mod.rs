//! What the crash and fault tests share: a model of the filesystem that has no line in common with
//! the engine, random histories that run on both, and the comparison of the two.
#![allow(dead_code)] // each test binary uses its part

pub(crate) mod campaign;
pub(crate) mod content;
pub(crate) mod crash;
pub(crate) mod damage;
pub(crate) mod faulty;
pub(crate) mod furnish;
pub(crate) mod generate;
pub(crate) mod history;
pub(crate) mod image;
pub(crate) mod model;
pub(crate) mod pairs;
pub(crate) mod script;
pub(crate) mod shrink;
pub(crate) mod view;
pub(crate) mod world;
pub(crate) mod writers;
