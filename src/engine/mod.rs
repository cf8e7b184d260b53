//! The engine: a pool of blocks, files that share them, and the journal that makes writes last.
//! Usable as a library; knows no FUSE, no errno and no image format.
//!
//! From the bottom up, each using only what stands above it in this list:
//!
//! - structures: `nodes` (clean tree nodes), `delta` (changed reference counts), `counters` (how
//!   much is free and promised), `slots` (superblocks), `space` (free blocks), `refusals` (of the
//!   host), `recent` (what was used last), `cache` (data blocks), `pieces` (transfers), `fetch` (reads them), `ahead` (streams),
//!   `waiters` (of a
//!   group commit), `heartbeat` (no second host), `syncs` (of the device), `meta` (the trees and their
//!   dirty nodes), `tree` (the B+tree);
//! - meanings: `extents` (maps of files), `namespace` (inodes and names), `stage` (blocks without
//!   a place), `journal` (the ring), `apply` (what each record does),
//!   `salvage` (which records still have something to act on);
//! - procedures: `pool` (locks and limits), `host` (a host without space), `commit` (group commit),
//!   `file`, `read`, `range`, `share`, `equal`, `names`, `clone_tree` (what callers ask for), `destage`,
//!   `checkpoint`, `grow`,
//!   `replay`, `recover`, `worker`, `check`, `scrub`, `repair`.

mod ahead;
mod apply;
mod cache;
mod check;
mod checkpoint;
mod clone_tree;
mod commit;
mod counters;
mod delta;
mod destage;
mod discard;
mod equal;
mod extents;
mod fetch;
mod file;
mod grow;
mod heartbeat;
mod host;
mod journal;
mod meta;
mod names;
mod namespace;
mod nodes;
#[cfg(feature = "shuttle")]
pub mod parts;
mod pieces;
mod pool;
mod range;
mod read;
mod recent;
mod recover;
mod refusals;
mod repair;
mod replay;
mod salvage;
mod scrub;
mod share;
mod slots;
mod space;
mod stage;
mod syncs;
mod tree;
mod types;
mod waiters;
mod work;
mod worker;

pub use ahead::Stream;
pub use equal::{Equal, Place, Places};
pub use fetch::ReadBytes;
pub use heartbeat::{BEAT_INTERVAL, Heartbeat, Identity, refuse_active};
pub use pool::Pool;
pub use scrub::{DamagedFile, Scrub, ScrubOptions, ScrubPhase, ScrubState, ScrubStatus};
pub use share::{Extents, Share};
pub use types::{
    Action, Attr, CheckCounts, CheckOptions, CheckReport, CreateOptions, DirEntry, FileKind,
    FilePlace, FileUsage, Finding, Health, NewNode, OpenOptions, Origin, PoolInfo, RenameMode,
    RepairReport, Replayed, SetAttr, Usage, XattrMode,
};
