//! Scrub: reads everything that a pool in use keeps, compares it with its checksums, and names
//! every file that a damaged block belongs to.
//!
//! It runs beside everything else: on a mounted pool, or on one that was opened read-only.
//!
//! 1. `places`: superblocks; of a pool that is not mounted also the journal.
//! 2. `nodes`: every node of every tree, from the device and against the checksum that its parent
//!    has. Shared ones once. Which blocks are nodes is remembered, a bit for each.
//! 3. `data`: every other block in use, in the order of the pool.
//! 4. `files`: only if there is damage: one pass over all extent maps, and one over the names.
//!
//! Invariants:
//!
//! 1. A block is read while a pin or a later look keeps what is known of it true: what is
//!    reported was damaged in the very way that a reader of the file would have met it.
//! 2. Nothing read here goes to the caches, and nothing is read from the block cache: a good copy
//!    there must not hide a damaged block.
//! 3. The trees are locked to look things up, not while data is read or somebody sleeps.
//! 4. Memory is bounded: [`SUSPECTS_MAX`] blocks, [`FILES_MAX`] files, [`RANGES_MAX`] ranges of a
//!    file, 4 KiB for each allocation group that holds nodes.
//!
//! What was found and how far it came is kept in the pool (`record`), so that a scrub that was
//! stopped, by whatever, goes on where it was.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::error::{Kind, Result};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Instant, Mutex};
use crate::units::{BLOCK_SIZE, Ino, Time};

use super::pool::Pool;
use super::types::XattrMode;

mod data;
mod files;
mod names;
mod nodes;
mod places;
mod record;
mod walk;

use record::{ATTRIBUTE, Kept, runs_of};
use walk::BlockSet;

const B: u64 = BLOCK_SIZE as u64;
/// Suspected blocks after which their files are named and the list begins anew.
const SUSPECTS_MAX: usize = 8192;
/// Damaged files that are told one by one.
const FILES_MAX: usize = 100_000;
/// Ranges of one file that are told one by one.
const RANGES_MAX: usize = 64;
/// Findings that are no files.
const OTHERS_MAX: usize = 1000;
/// Damaged files, and damaged blocks, that are logged.
const LINES_MAX: usize = 1000;
/// How often the position is written down.
const SAVE_INTERVAL: Duration = Duration::from_secs(30);
/// Naming files may take this part of the time before the end: a twentieth.
const NAMING_SHARE: u32 = 20;
/// Times that a yielding scrub rests for as long as it worked, while others use the pool.
const REST: u32 = 4;
/// Longest rest at once.
const REST_MAX: Duration = Duration::from_secs(1);
/// How often a sleeping scrub looks whether it should stop.
const NAP: Duration = Duration::from_millis(50);

/// How a scrub goes about it.
#[derive(Clone, Debug, Default)]
pub struct ScrubOptions {
    /// Bytes per second, at most. `None`: as fast as the device.
    pub rate: Option<u64>,
    /// Steps back while others use the pool: works a fifth of the time then.
    pub yields: bool,
    /// Begins at the beginning, although an earlier one was interrupted.
    pub restart: bool,
    /// Begins to read data at this address of the pool, in bytes.
    pub from: Option<u64>,
}

/// What a scrub is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScrubPhase {
    /// Superblocks, journal and tree nodes.
    #[default]
    Metadata,
    /// Data blocks.
    Data,
    /// Looking for the files of damaged blocks.
    Files,
}

/// How a scrub stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScrubState {
    /// There was none.
    #[default]
    Never,
    /// It is at work.
    Running,
    /// It was interrupted; the next one goes on there.
    Stopped,
    /// It came to its end.
    Finished,
    /// It could not go on.
    Failed,
}

/// Where a scrub is, and what it has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubStatus {
    /// How it stands.
    pub state: ScrubState,
    /// What it is doing.
    pub phase: ScrubPhase,
    /// Address in the pool up to which data was read, in bytes.
    pub position: u64,
    /// Bytes in use that were read, and that there were at the beginning.
    pub done: u64,
    /// See `done`.
    pub total: u64,
    /// Blocks that are not what was written.
    pub damaged_blocks: u64,
    /// Files that they belong to.
    pub files: u64,
    /// Findings that are no files.
    pub others: u64,
    /// True if it went on where an earlier one was interrupted.
    pub resumed: bool,
    /// When it began (before it was interrupted, if it was).
    pub started: Time,
    /// When it ended, or when that was last written down.
    pub ended: Time,
    /// Why it failed.
    pub error: Option<String>,
}

impl ScrubStatus {
    /// True if nothing was found so far.
    pub fn is_clean(&self) -> bool {
        self.damaged_blocks + self.files + self.others == 0
    }
}

/// A file with blocks that cannot be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DamagedFile {
    /// Its number.
    pub ino: u64,
    /// Its paths from the root of the pool on, each beginning with `/`. None: it was deleted and
    /// is still open, or its name cannot be read.
    pub paths: Vec<Vec<u8>>,
    /// Offset and length of what cannot be read, in bytes, in order.
    pub ranges: Vec<(u64, u64)>,
    /// There are more ranges.
    pub more: bool,
}

/// A scrub: what is asked of it, and what it tells meanwhile. Shared by the thread that runs
/// [`Pool::scrub`] and those that look.
#[derive(Debug, Default)]
pub struct Scrub {
    options: ScrubOptions,
    stop: AtomicBool,
    /// Held for a moment; nothing is taken while it is.
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Found {
    status: ScrubStatus,
    files: BTreeMap<u64, DamagedFile>,
    others: Vec<String>,
}

impl Scrub {
    /// One that has not begun.
    pub fn new(options: ScrubOptions) -> Self {
        Self {
            options,
            ..Self::default()
        }
    }

    /// Asks it to stop; [`Pool::scrub`] returns soon after.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    /// How it stands.
    pub fn status(&self) -> ScrubStatus {
        self.found.lock().status.clone()
    }

    /// Up to `limit` damaged files with inode numbers above `after`, in their order.
    pub fn files(&self, after: u64, limit: usize) -> Vec<DamagedFile> {
        let found = self.found.lock();
        let behind = found.files.range(after.saturating_add(1)..);
        behind.map(|(_, file)| file.clone()).take(limit).collect()
    }

    /// Up to `limit` findings that are no files, from number `from` on.
    pub fn others(&self, from: usize, limit: usize) -> Vec<String> {
        let found = self.found.lock();
        found
            .others
            .iter()
            .skip(from)
            .take(limit)
            .cloned()
            .collect()
    }

    fn update(&self, change: impl FnOnce(&mut ScrubStatus)) {
        change(&mut self.found.lock().status);
    }

    /// Notes a finding that is no file.
    fn other(&self, text: String) {
        let mut found = self.found.lock();
        found.status.others += 1;
        if found.others.len() < OTHERS_MAX {
            log::error!("scrub: {text}");
            found.others.push(text);
        }
    }
}

/// A scrub at work.
struct Run<'a> {
    pool: &'a Pool,
    scrub: &'a Scrub,
    /// Generation of the newest checkpoint at the beginning: newer nodes are not in `nodes`.
    generation: u64,
    /// Blocks that are nodes.
    nodes: BlockSet,
    /// Those of them that are damaged.
    bad_nodes: BTreeSet<u64>,
    /// Some of these belong to extent maps.
    bad_maps: bool,
    /// Blocks in use that are neither what their checksum says nor a node, as it seems.
    suspects: BTreeSet<u64>,
    /// Suspects since files were last named.
    fresh: usize,
    /// Suspects that a file refers to, so that they are damaged.
    confirmed: BTreeSet<u64>,
    /// As many were confirmed before the list began anew.
    forgotten: u64,
    kept: Kept,
    saved: Instant,
    /// When files were last named, and how long that took.
    named: Option<(Instant, Duration)>,
    pace: Pace,
}

/// What keeps the pace.
struct Pace {
    /// When the bytes read so far may have been read.
    due: Instant,
    /// Operations of others that were seen.
    seen: u64,
    /// Pins of this scrub, which are no operations of others.
    own: u64,
}

impl Pool {
    /// Scrubs: returns when it is done, or was stopped. What it finds is told by `scrub`.
    ///
    /// # Errors
    /// If it cannot go on: the device cannot be read at all. Damage is a finding, not an error.
    pub fn scrub(&self, scrub: &Scrub) -> Result<()> {
        let mut run = Run::begin(self, scrub);
        let outcome = run.work();
        run.save(matches!(outcome, Ok(true)));
        let state = match &outcome {
            Ok(true) => ScrubState::Finished,
            Ok(false) => ScrubState::Stopped,
            Err(_) => ScrubState::Failed,
        };
        scrub.update(|status| {
            status.state = state;
            status.ended = Time::now();
            status.error = outcome.as_ref().err().map(ToString::to_string);
        });
        outcome.map(drop)
    }

    /// How the last scrub of this pool ended, as it is written down in it.
    ///
    /// # Errors
    /// `Io` or `Corrupt` if it cannot be read.
    pub fn last_scrub(&self) -> Result<ScrubStatus> {
        let Some(kept) = self.kept()? else {
            return Ok(ScrubStatus::default());
        };
        let state = match kept.finished {
            true => ScrubState::Finished,
            false => ScrubState::Stopped,
        };
        Ok(ScrubStatus {
            state,
            phase: ScrubPhase::Data,
            position: kept.position.saturating_mul(B),
            done: kept.done.saturating_mul(B),
            total: kept.total.saturating_mul(B),
            damaged_blocks: kept.damaged,
            files: kept.files,
            others: kept.others,
            resumed: false,
            started: kept.started,
            ended: kept.ended,
            error: None,
        })
    }

    fn kept(&self) -> Result<Option<Kept>> {
        match self.xattr(Ino::ROOT, ATTRIBUTE) {
            // Of another version, or not ours: as if there were none.
            Ok(bytes) => Ok(Kept::decode(&bytes).ok()),
            Err(error) if error.kind() == Kind::NoAttribute => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl<'a> Run<'a> {
    fn begin(pool: &'a Pool, scrub: &'a Scrub) -> Self {
        let options = &scrub.options;
        let generation = pool.superblock.lock().generation;
        let used = {
            let meta = pool.meta.read();
            meta.space.total() - pool.counters.free().min(meta.space.total())
        };
        let earlier = match pool.kept() {
            Ok(earlier) => earlier.filter(|kept| !kept.finished),
            Err(error) => {
                log::warn!("cannot read where the last scrub was interrupted: {error}");
                None
            }
        };
        let fresh = Kept {
            generation,
            position: options.from.unwrap_or(0) / B,
            total: used,
            started: Time::now(),
            ..Kept::default()
        };
        let resumes = !options.restart && options.from.is_none();
        let earlier = earlier.filter(|_| resumes);
        let resumed = earlier.is_some();
        let kept = earlier.unwrap_or(fresh);
        let suspects = kept
            .suspects
            .iter()
            .flat_map(|(first, count)| *first..first.saturating_add(u64::from(*count)))
            .take(SUSPECTS_MAX)
            .collect::<BTreeSet<u64>>();
        let kept_blocks = suspects.len() as u64;
        scrub.update(|status| {
            status.state = ScrubState::Running;
            status.resumed = resumed;
            status.started = kept.started;
            status.position = kept.position.saturating_mul(B);
            status.done = kept.done.saturating_mul(B);
            status.total = kept.total.max(used) * B;
        });
        Self {
            pool,
            scrub,
            generation,
            nodes: BlockSet::default(),
            bad_nodes: BTreeSet::new(),
            bad_maps: false,
            fresh: suspects.len(),
            suspects,
            confirmed: BTreeSet::new(),
            // What the list had no room for.
            forgotten: kept.damaged.saturating_sub(kept_blocks),
            kept,
            saved: Instant::now(),
            named: None,
            pace: Pace {
                due: Instant::now(),
                seen: 0,
                own: 0,
            },
        }
    }

    /// All phases. False if it was stopped.
    fn work(&mut self) -> Result<bool> {
        self.check_places()?;
        if !self.walk_trees()? {
            return Ok(false);
        }
        if self.bad_maps && !self.name_files()? {
            return Ok(false);
        }
        self.scrub.update(|status| status.phase = ScrubPhase::Data);
        if !self.read_data()? {
            return Ok(false);
        }
        // Twice: what moved from file to file during the first pass may have been missed.
        for _ in 0..2 {
            let unexplained = self.suspects.len() > self.confirmed.len();
            if (self.fresh > 0 || unexplained) && !self.name_files()? {
                return Ok(false);
            }
        }
        self.tell_unexplained();
        Ok(true)
    }

    /// Suspects that nothing refers to are mostly blocks that were freed meanwhile.
    fn tell_unexplained(&self) {
        let unused = self.suspects.difference(&self.confirmed).count();
        if unused > 0 {
            log::info!("scrub: {unused} blocks that no file uses (any more) could not be verified");
        }
    }

    /// False if it should stop.
    fn goes_on(&self) -> bool {
        !self.scrub.stop.load(Ordering::Relaxed) && !self.pool.is_closed()
    }

    /// Notes that a block in use is not what it should be.
    fn suspect(&mut self, block: u64) {
        if self.suspects.insert(block) {
            self.fresh += 1;
            log::debug!("scrub: looks for the files of a block: block={block}");
        }
    }

    /// Notes that a suspect is damaged: a file refers to it.
    fn confirm(&mut self, block: u64) {
        if self.confirmed.insert(block) && self.confirmed.len() <= LINES_MAX {
            log::error!("scrub: a data block is not what was written: block={block}");
        }
    }

    /// Names the files of suspects if there are too many of them, or it costs little by now.
    /// False if it should stop.
    fn name_in_time(&mut self) -> Result<bool> {
        let due = match self.named {
            None => true,
            Some((when, took)) => when.elapsed() > took * NAMING_SHARE,
        };
        let full = self.suspects.len() >= SUSPECTS_MAX;
        if self.fresh == 0 || !(due || full) {
            return Ok(true);
        }
        let phase = self.scrub.status().phase;
        if !self.name_files()? {
            return Ok(false);
        }
        self.scrub.update(|status| status.phase = phase);
        if full {
            self.forgotten += self.confirmed.len() as u64;
            self.suspects.clear();
            self.confirmed.clear();
        }
        Ok(true)
    }

    /// Writes down how far it came.
    fn save(&mut self, finished: bool) {
        self.saved = Instant::now();
        let status = self.scrub.status();
        self.kept.finished = finished;
        self.kept.ended = Time::now();
        if finished && self.forgotten == 0 {
            // Everything was looked at (again).
            self.kept.damaged = status.damaged_blocks;
            self.kept.files = status.files;
            self.kept.others = status.others;
        } else {
            self.kept.damaged = self.forgotten + self.suspects.len() as u64;
            self.kept.files = self.kept.files.max(status.files);
            self.kept.others = self.kept.others.max(status.others);
        }
        self.kept.suspects = match finished {
            true => Vec::new(),
            false => runs_of(self.suspects.iter().copied()),
        };
        let pool = self.pool;
        if pool.read_only || pool.is_closed() || pool.poisoned().is_some() {
            return;
        }
        let value = self.kept.encode();
        let now = self.kept.ended;
        let done = self
            .pool
            .set_xattr(Ino::ROOT, ATTRIBUTE, &value, XattrMode::Set, now);
        if let Err(error) = done {
            log::warn!("the next scrub cannot go on where this one is: {error}");
        }
    }

    /// Writes it down now and then.
    fn save_in_time(&mut self) {
        if self.saved.elapsed() > SAVE_INTERVAL {
            self.save(false);
        }
    }

    /// Sleeps as the options ask for, behind `bytes` that took since `began`.
    fn pause(&mut self, bytes: u64, began: Instant) {
        let now = Instant::now();
        let options = &self.scrub.options;
        let mut until = now;
        if let Some(rate) = options.rate.filter(|rate| *rate > 0) {
            let cost = Duration::from_secs_f64(bytes as f64 / rate as f64);
            self.pace.due = self.pace.due.max(began) + cost;
            until = self.pace.due;
        }
        if options.yields {
            let others = self.pool.readers.begun() - self.pace.own + self.pool.stage.lock().pushed;
            if std::mem::replace(&mut self.pace.seen, others) != others {
                until = until.max(now + (began.elapsed() * REST).min(REST_MAX));
            }
        }
        while self.goes_on() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            crate::sync::thread::sleep(left.min(NAP));
        }
    }

    /// Begins to read: what can be seen now is not used again.
    fn pin(&mut self) -> super::cache::Pin {
        self.pace.own += 1;
        self.pool.readers.pin()
    }
}
