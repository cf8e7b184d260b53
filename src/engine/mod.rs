//! The engine: a pool of blocks, files that share them, and the journal that makes writes last.
//! Usable as a library; knows no FUSE, no errno and no image format.
//!
//! From the bottom up, each using only what stands above it in this list:
//!
//! - structures: `nodes` (clean tree nodes), `delta` (changed reference counts), `space` (free
//!   blocks), `cache` (data blocks), `waiters` (of a group commit), `meta` (the trees and their dirty
//!   nodes), `tree` (the B+tree);
//! - meanings: `extents` (maps of files), `namespace` (inodes and names), `stage` (blocks without
//!   a place), `journal` (the ring), `apply` (what each record does);
//! - procedures: `pool` (locks and limits), `commit` (group commit), `file`, `range`, `names`,
//!   `clone_tree` (what callers ask for), `destage`, `checkpoint`, `recover`, `worker`, `check`.

mod apply;
mod cache;
mod check;
mod checkpoint;
mod clone_tree;
mod commit;
mod delta;
mod destage;
mod discard;
mod extents;
mod file;
mod journal;
mod meta;
mod names;
mod namespace;
mod nodes;
mod pool;
mod range;
mod recover;
mod space;
mod stage;
mod tree;
mod types;
mod waiters;
mod worker;

pub use pool::Pool;
pub use types::{
    Attr, CreateOptions, DirEntry, FileKind, FileUsage, Finding, NewNode, OpenOptions, Origin,
    PoolInfo, RenameMode, SetAttr, Usage, XattrMode,
};
