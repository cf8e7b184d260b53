//! How long the journal takes to be replayed: an estimate, so that a checkpoint comes before that
//! is too long. Bytes alone do not tell: a gibibyte holds 200,000 blocks, or six million discards.
//!
//! The unit is a microsecond of one processor of 2023, measured with `examples/recovery.rs`. Like
//! the bytes of the ring, work is bounded by shares: at half a checkpoint begins, at three quarters
//! commits wait for it, and an eighth may wait for a commit. Unlike these bounds of the ring, which
//! must hold, those of work give way: to one operation that is more than that, to the batch of a
//! checkpoint, and while the host has no space for one, or had none a while ago.
//!
//! The estimate follows from records and trees alone, never from a clock: the simulation relies on
//! checkpoints at the same moments.

use crate::ondisk::record::Record;

/// What a journal holds at most: 1.2 s, of which an open may meet three quarters. By the clock of a quiet
/// machine that is up to twice as much, with the reading of the ring.
pub(crate) const WORK_MAX: u64 = 1_200_000;
/// What may wait for a commit, as the eighth of the ring that may: 0.15 s.
pub(crate) const PENDING_MAX: u64 = WORK_MAX / 8;
/// A batch beside its records: reading and checking what may be one block.
pub(crate) const BATCH: u64 = 12;
/// A block of data: read, checked and staged.
pub(crate) const BLOCK: u64 = 4;
/// A change of one record of a tree.
const CHANGE: u64 = 1;
/// Extents that are removed or shared in the time of one change.
const EXTENTS: u64 = 2;
/// A clone, with the destage of what is staged of its source.
const CLONE: u64 = 60;
/// Bytes of a long value that take a change: what fits a record of a tree.
const LONG: usize = 960;
/// Checksums that are set in the time of one change.
const SUMS: usize = 32;

/// The work of replaying a record, but for what depends on extent maps ([`of_extents`]).
pub(crate) fn of(record: &Record) -> u64 {
    match record {
        Record::Block { .. } => BLOCK,
        Record::Zero { .. } | Record::Touch { .. } => CHANGE,
        Record::Map { sums, .. } => 8 * CHANGE + (sums.len() / SUMS) as u64,
        Record::SetAttr { .. } | Record::Show { .. } => 2 * CHANGE,
        Record::Create { target, .. } => 2 * CHANGE + of_long(target.len()),
        Record::Link { .. } => 3 * CHANGE,
        Record::Unlink { .. } => 4 * CHANGE,
        Record::Rename { .. } => 6 * CHANGE,
        Record::SetXattr { value, .. } => 4 * CHANGE + 2 * of_long(value.len()),
        Record::RemoveXattr { .. } => 4 * CHANGE,
        Record::Truncate { .. } | Record::Punch { .. } | Record::EndClone { .. } => 4 * CHANGE,
        Record::Clone { .. } | Record::CloneRange { .. } => CLONE,
    }
}

fn of_long(len: usize) -> u64 {
    len.div_ceil(LONG) as u64 * CHANGE
}

/// The work of removing or sharing so many extents.
pub(crate) fn of_extents(count: u64) -> u64 {
    count / EXTENTS
}
