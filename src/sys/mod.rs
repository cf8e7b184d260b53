//! Layer 0: the few system calls that std lacks, as safe functions. The only folder with `unsafe`.
#![allow(unsafe_code)]

pub mod block;
pub mod control;
pub mod files;
pub mod memory;
pub mod process;
pub mod ring;
pub mod slab;
