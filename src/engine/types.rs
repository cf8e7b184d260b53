//! The value types that cross the border of the engine. Plain data: no locks, no I/O.

use crate::units::{Ino, Time};

/// What kind of thing an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A file with an extent map.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe; its data never reaches the pool.
    Fifo,
    /// A socket; its data never reaches the pool.
    Socket,
    /// A character device node.
    CharDevice,
    /// A block device node.
    BlockDevice,
}

/// Attributes of one inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Its number.
    pub ino: Ino,
    /// Number of the checkpoint generation in which it was created; with `ino` a stable handle.
    pub generation: u64,
    /// What it is.
    pub kind: FileKind,
    /// Permission bits, set-id and sticky bits: the low 12 bits of `st_mode`.
    pub mode: u32,
    /// Hard links. 0: unlinked, but still open or not yet reclaimed.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node, else 0.
    pub rdev: u32,
    /// Length in bytes. For a symlink the length of its target.
    pub size: u64,
    /// True if any block of the file is mapped or staged, so that it holds data at all.
    pub has_data: bool,
    /// Mapped bytes, shared or not: 4096 times the blocks of the extent map (staged blocks that
    /// have no place yet are not in it).
    pub mapped: u64,
    /// Last access (never updated by reads).
    pub atime: Time,
    /// Last change of the contents.
    pub mtime: Time,
    /// Last change of the attributes or the contents.
    pub ctime: Time,
    /// Creation.
    pub btime: Time,
    /// The directory that holds it, for directories; for other inodes the root.
    pub parent: Ino,
}

/// What to change of an inode; `None` leaves a field alone. Sizes go through
/// [`Pool::truncate`](crate::engine::Pool::truncate).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Low 12 bits of `st_mode`.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Last access.
    pub atime: Option<Time>,
    /// Last change of the contents.
    pub mtime: Option<Time>,
    /// Last change of the attributes; callers pass the time now.
    pub ctime: Option<Time>,
}

/// What is created by [`Pool::create_node`](crate::engine::Pool::create_node).
#[derive(Clone, Debug)]
pub struct NewNode<'a> {
    /// What it will be.
    pub kind: FileKind,
    /// Low 12 bits of `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node, else 0.
    pub rdev: u32,
    /// Target of a symlink, else empty.
    pub target: &'a [u8],
}

impl NewNode<'_> {
    /// A file of root's.
    pub const fn regular(mode: u32) -> Self {
        Self {
            kind: FileKind::Regular,
            mode,
            uid: 0,
            gid: 0,
            rdev: 0,
            target: b"",
        }
    }
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The inode it names.
    pub ino: Ino,
    /// What the inode is.
    pub kind: FileKind,
    /// Name: 1 to 255 bytes, without '/' and NUL.
    pub name: Vec<u8>,
    /// Passing this to `read_dir` continues behind this entry. Stable while the entry exists,
    /// whatever else is created or removed; at least 16 and below 2^63.
    pub cookie: u64,
}

/// What a rename does when the new name is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    /// Replaces what has the new name.
    Replace,
    /// Fails with [`Kind::Exists`](crate::error::Kind::Exists).
    NoReplace,
    /// Swaps the two; both must exist.
    Exchange,
}

/// What setting an extended attribute does when it exists, or does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XattrMode {
    /// Creates or replaces.
    Set,
    /// Fails if it exists.
    Create,
    /// Fails if it does not.
    Replace,
}

/// Where a clone came from. Information for lineage views, not a dependency.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The file that was cloned (it may be gone).
    pub ino: Ino,
    /// Its generation.
    pub generation: u64,
    /// When it was cloned.
    pub time: Time,
}

/// How a pool is made.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Bytes of the journal ring. `None`: an eighth of the pool, 1 MiB to 1 GiB; the whole
    /// device where the journal has one of its own.
    pub journal_size: Option<u64>,
    /// Identity of the pool, random.
    pub uuid: [u8; 16],
    /// Secret key of the directory hash, random.
    pub hash_key: [u8; 16],
    /// Owner of the root directory.
    pub uid: u32,
    /// Group of the root directory.
    pub gid: u32,
    /// Now.
    pub time: Time,
}

/// How a pool is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Opens without writing a byte; a journal that needs replay is replayed in memory only.
    pub read_only: bool,
    /// Bound of all caches and of the stage together, in bytes.
    pub cache_size: u64,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            cache_size: 1024 * 1024 * 1024,
        } // 1 GiB
    }
}

/// How full a pool is, in bytes and inodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that blocks can be allocated from: the pool without superblocks and journal.
    pub total: u64,
    /// Bytes in use: data, metadata, and what is freed by the next checkpoint.
    pub used: u64,
    /// Bytes that a user can still write, without the reserve.
    pub available: u64,
    /// Bytes that the host under a sparse pool can still take; `None` where its space is its own.
    /// Less than `available`: the host gets full before the pool does.
    pub host_available: Option<u64>,
    /// Bytes kept back so that deleting and checkpoints always work.
    pub reserve: u64,
    /// Bytes of acknowledged writes that wait in the stage for their place.
    pub staged: u64,
    /// Bytes of the journal ring in use.
    pub journal_used: u64,
    /// Bytes of the journal ring.
    pub journal_size: u64,
    /// Sum of the sizes of all files: what they would take if each were a full copy.
    pub logical: u64,
    /// Inodes that exist.
    pub inodes: u64,
}

/// What opening the pool did again from its journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Batches.
    pub batches: u64,
    /// Bytes of the ring.
    pub bytes: u64,
    /// Milliseconds it took.
    pub millis: u64,
    /// Records left out, because a repair could not save what they are about.
    pub left_out: u64,
}

/// How an open pool is: what happened since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// What opening it did again.
    pub replayed: Replayed,
    /// Milliseconds since the oldest change that a crash would lose; 0: it would lose nothing.
    pub unsynced_ms: u64,
    /// Reads of blocks and tree nodes that were not what had been written.
    pub damaged_reads: u64,
    /// Copies of the superblock that are older than they should be, because the host has no space
    /// for newer ones.
    pub stale_copies: u64,
    /// Beats of the heartbeat.
    pub beats: u64,
    /// Milliseconds since the last one.
    pub beat_age_ms: u64,
}

/// What one file uses, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileUsage {
    /// Length of the file.
    pub size: u64,
    /// Bytes with data, shared or not.
    pub mapped: u64,
    /// Bytes of data that no other file shares: what deleting it would free.
    pub exclusive: u64,
    /// Extents of the file.
    pub extents: u64,
}

/// Fixed facts of a pool, from its superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolInfo {
    /// Identity.
    pub uuid: [u8; 16],
    /// Version of the on-disk format.
    pub version: u32,
    /// Size of the pool in bytes.
    pub size: u64,
    /// Bytes of the journal ring.
    pub journal_size: u64,
    /// True if the journal is on a device of its own.
    pub journal_external: bool,
    /// Number of the newest checkpoint.
    pub generation: u64,
    /// True if the pool was closed cleanly.
    pub clean: bool,
    /// When the pool was made.
    pub created: Time,
}

/// A file that a finding is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilePlace {
    /// The inode.
    pub ino: Ino,
    /// One of its paths from the root of the pool; `None` if it has no name.
    pub path: Option<String>,
    /// Offset in bytes of the first damage, where the finding is about contents.
    pub offset: Option<u64>,
}

/// One thing that `check` found wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Stable number of this kind of finding, never used for another; see `docs/check.md`.
    pub code: u32,
    /// What is wrong, and where.
    pub message: String,
    /// Files that it is about, as far as that is known; not all of them if they are many.
    pub files: Vec<FilePlace>,
    /// How many more files there are.
    pub files_more: u64,
}

/// How a pool is checked.
#[derive(Clone, Debug)]
pub struct CheckOptions {
    /// Bound of the memory in bytes: less makes it slower, not worse.
    pub memory: u64,
    /// Reads all data and compares it with its checksums.
    pub data: bool,
    /// Searches the whole device for a superblock if none is found where they should be.
    pub search: bool,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self {
            memory: 256 * 1024 * 1024,
            data: true,
            search: false,
        }
    }
}

/// What a check looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckCounts {
    /// Tree nodes.
    pub nodes: u64,
    /// Inodes.
    pub inodes: u64,
    /// Inodes that were made as a clone of another.
    pub clones: u64,
    /// Blocks of data, each once.
    pub data_blocks: u64,
    /// Extent maps that wait to be freed.
    pub detached: u64,
    /// File blocks that an earlier repair marked as lost.
    pub lost_blocks: u64,
    /// Batches in the journal that wait for replay.
    pub batches: u64,
    /// The batch behind them is cut, as a crash while it was written leaves it.
    pub batch_cut: bool,
    /// Passes over the pool that the memory made necessary.
    pub passes: u64,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Findings, the first thousand.
    pub findings: Vec<Finding>,
    /// Findings behind these, some of them more than once.
    pub more: u64,
    /// What was looked at.
    pub counts: CheckCounts,
}

/// One thing that a repair does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Action {
    /// Stable number of this kind of action, never used for another; see `docs/check.md`.
    pub code: u32,
    /// What is done, in the imperative.
    pub message: String,
}

/// What a repair did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RepairReport {
    /// What was found at first.
    pub before: CheckReport,
    /// What was done, in order.
    pub actions: Vec<Action>,
    /// What a check finds now.
    pub after: CheckReport,
    /// True if it was not wanted, and nothing was done.
    pub declined: bool,
    /// What would have been done, had it been wanted.
    pub planned: Vec<Action>,
}
