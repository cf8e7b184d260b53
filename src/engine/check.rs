//! Check: reads all structures of a pool that is not open and compares them with each other.
//! Reads only; finds, never mends.
//!
//! It is written against `docs/format.md`: it walks nodes by itself, and counts references by
//! itself, so that a mistake of the engine is not repeated here.
//!
//! Memory is bounded by [`CheckOptions::memory`], whatever the size of the pool:
//!
//! - References are counted for as much of the pool as half of the bound can tell (`ledger.rs`);
//!   then these counts are compared and the data they stand for is read, and another pass counts
//!   the next part. Each pass reads the namespace and the extent maps again.
//! - Inodes are compared with the names that lead to them in the same way, by ranges of numbers
//!   (`names.rs`).
//! - What has to be remembered as a whole is small: which nodes of extent maps were entered (1 bit
//!   for each block of the pool at most, `seen.rs`), and the parents of directories (16 bytes
//!   each). If a quarter of the bound is too little for one of them, check says so and ends.
//! - Spans of shared nodes are remembered as far as an eighth of the bound goes, and read again
//!   where they are not.
//! - At most 1000 findings are kept, and their files are looked for at the end (`places.rs`).

mod data;
pub(crate) mod journal;
pub(crate) mod ledger;
mod maps;
pub(crate) mod names;
mod places;
mod refs;
pub(crate) mod seen;
mod slots;
pub(crate) mod walk;

use std::collections::{BTreeMap, HashMap};

use crate::device::BlockDevice;
use crate::error::{Error, Kind, Result};
use crate::ondisk::extent::{GROUP_BLOCKS, decode_group};
use crate::ondisk::node::TreeKind;
use crate::ondisk::superblock::{FLAG_EXTERNAL_JOURNAL, Superblock};

use super::pool::Pool;
use super::slots::Slots;
use super::types::{CheckCounts, CheckOptions, CheckReport, Finding};

use ledger::Ledger;
use seen::Seen;
use walk::{Event, Range, Reader, walk};

/// Findings after which a badly damaged pool is not described further.
const FINDINGS_MAX: usize = 1000;

/// Numbers of findings. Never used again for another; documented in `docs/check.md`.
#[allow(missing_docs)]
pub(crate) mod code {
    pub(crate) const NODE: u32 = 1;
    pub(crate) const RECORD: u32 = 2;
    pub(crate) const KEY_RANGE: u32 = 3;
    pub(crate) const OUTSIDE: u32 = 4;
    pub(crate) const OVERLAP: u32 = 5;
    pub(crate) const REFCOUNT: u32 = 6;
    pub(crate) const LEAK: u32 = 7;
    pub(crate) const GROUP: u32 = 8;
    pub(crate) const FREE_COUNT: u32 = 9;
    pub(crate) const NO_SUM: u32 = 10;
    pub(crate) const NO_INODE: u32 = 11;
    pub(crate) const NLINK: u32 = 12;
    pub(crate) const ORPHAN: u32 = 13;
    pub(crate) const ENTRY_KIND: u32 = 14;
    pub(crate) const PARENT: u32 = 15;
    pub(crate) const MAPPED: u32 = 16;
    pub(crate) const INODE_COUNT: u32 = 17;
    pub(crate) const NUMBER: u32 = 18;
    pub(crate) const DATA: u32 = 19;
    pub(crate) const CONFLICT: u32 = 20;
    pub(crate) const UNREACHABLE: u32 = 21;
    pub(crate) const NAME: u32 = 22;
    pub(crate) const LONG_VALUE: u32 = 23;
    pub(crate) const LINEAGE: u32 = 24;
    pub(crate) const SUPERBLOCK: u32 = 25;
    pub(crate) const LOGICAL: u32 = 27;
    pub(crate) const INODE: u32 = 28;
    pub(crate) const JOURNAL: u32 = 30;
}

/// What a finding is about, to find its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// The pool as a whole.
    Pool,
    /// An inode.
    Inode(u64),
    /// A run of data blocks, first and end.
    Data(u64, u64),
    /// A node of an extent map.
    Node(u64),
}

/// A finding before its files are known.
#[derive(Debug)]
struct Noted {
    code: u32,
    message: String,
    subject: Subject,
}

/// All findings so far.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    list: Vec<Noted>,
    /// How many more there were.
    more: u64,
}

impl Findings {
    /// Adds a finding, once: passes may meet it again.
    pub(crate) fn add(&mut self, code: u32, subject: Subject, message: String) {
        let known = |noted: &Noted| noted.code == code && noted.message == message;
        if self.list.iter().any(known) {
            return;
        }
        if self.list.len() >= FINDINGS_MAX {
            self.more += 1;
            return;
        }
        self.list.push(Noted {
            code,
            message,
            subject,
        });
    }
}

struct Checker<'a> {
    reader: Reader<'a>,
    /// The device of the ring; `None` if it is elsewhere and was not given.
    ring: Option<&'a dyn BlockDevice>,
    options: CheckOptions,
    findings: Findings,
    marks: Marks,
    counts: CheckCounts,
    ledger: Ledger,
    /// Nodes of extent maps whose contents this pass has counted.
    seen: Seen,
    /// What subtrees map, as far as there is memory.
    spans: HashMap<u64, maps::Known>,
    /// What passes hand on to the next one.
    refs: refs::Carry,
    /// A reason to end early.
    failure: Option<Error>,
    /// Blocks read, for the progress.
    read: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Pool {
    /// Verifies all structures of a pool that is not open, and the checksums of all its data.
    /// Reads only. `progress(done, total)` in blocks. The journal is not replayed: the newest
    /// checkpoint is what is verified.
    ///
    /// # Errors
    /// If there is no pool, or its device cannot be read. Damage is a finding, not an error.
    pub fn check(
        device: &dyn BlockDevice,
        journal: Option<&dyn BlockDevice>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<Finding>> {
        let report = Self::check_with(device, journal, &CheckOptions::default(), progress)?;
        Ok(report.findings)
    }

    /// As [`check`](Self::check), but reads no data: quick, and blind to damage there.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn check_metadata(
        device: &dyn BlockDevice,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<Finding>> {
        let options = CheckOptions {
            data: false,
            ..CheckOptions::default()
        };
        Ok(Self::check_with(device, None, &options, progress)?.findings)
    }

    /// As [`check`](Self::check), with options and a full report.
    ///
    /// # Errors
    /// As [`check`](Self::check); also `TooLarge` if the pool needs more memory than it may use.
    pub fn check_with(
        device: &dyn BlockDevice,
        journal: Option<&dyn BlockDevice>,
        options: &CheckOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<CheckReport> {
        let search = if options.search {
            u64::MAX
        } else {
            super::slots::SEARCH_AT_OPEN
        };
        let sb = Slots::read(device, search).newest(false)?;
        Ok(survey(device, journal, &sb, options, progress)?.0)
    }
}

/// What a repair needs to know beside the findings, complete and not in words.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    /// Data blocks that are not what was written, sorted runs.
    pub(crate) bad: Vec<(u64, u64)>,
    /// Data blocks without checksums, sorted runs.
    pub(crate) unsummed: Vec<(u64, u64)>,
    /// Something of the checksum tree is damaged.
    pub(crate) sums_lost: bool,
}

/// Checks the trees of one superblock.
pub(crate) fn survey(
    device: &dyn BlockDevice,
    journal: Option<&dyn BlockDevice>,
    sb: &Superblock,
    options: &CheckOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(CheckReport, Marks)> {
    let mut checker = Checker::new(device, journal, sb, options, progress);
    checker.run();
    if let Some(error) = checker.failure.take() {
        return Err(error);
    }
    let more = checker.findings.more;
    let findings = checker.name_findings();
    let report = CheckReport {
        findings,
        more,
        counts: checker.counts,
    };
    let mut marks = checker.marks;
    marks.bad = joined(marks.bad);
    marks.unsummed = joined(marks.unsummed);
    Ok((report, marks))
}

/// Counts all references of one superblock's trees, as far as all of the memory can tell.
pub(crate) fn count_references(
    device: &dyn BlockDevice,
    sb: &Superblock,
    options: &CheckOptions,
) -> Result<Ledger> {
    let mut progress = |_, _| {};
    let mut checker = Checker::new(device, None, sb, options, &mut progress);
    checker.count(sb.first_block(), options.memory as usize);
    match checker.failure.take() {
        Some(error) => Err(error),
        None => Ok(checker.ledger),
    }
}

/// Sorts runs and joins those that touch or overlap.
fn joined(mut runs: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    runs.sort_unstable();
    runs.dedup_by(|next, run| {
        let joins = next.0 <= run.1;
        if joins {
            run.1 = run.1.max(next.1);
        }
        joins
    });
    runs
}

impl<'a> Checker<'a> {
    fn new(
        device: &'a dyn BlockDevice,
        journal: Option<&'a dyn BlockDevice>,
        sb: &'a Superblock,
        options: &CheckOptions,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Self {
        let ring = match sb.flags & FLAG_EXTERNAL_JOURNAL != 0 {
            true => journal,
            false => Some(device),
        };
        Self {
            reader: Reader { device, sb },
            ring,
            options: options.clone(),
            findings: Findings::default(),
            marks: Marks::default(),
            counts: CheckCounts::default(),
            ledger: Ledger::new(0, 0, 0),
            seen: Seen::default(),
            spans: HashMap::new(),
            refs: refs::Carry::default(),
            failure: None,
            read: 0,
            progress,
        }
    }
}

impl Checker<'_> {
    fn find(&mut self, code: u32, subject: Subject, message: String) {
        self.findings.add(code, subject, message);
    }

    /// A share of the memory that may be used.
    fn share(&self, part: u64) -> usize {
        const LEAST: u64 = 16 * 1024;
        (self.options.memory / part).max(LEAST) as usize
    }

    /// Ends the check: `what` does not fit into a quarter of the memory.
    fn too_little_memory(&mut self, what: &str, needed: usize) {
        let error = Error::new(
            Kind::TooLarge,
            format!(
                "check needs more memory to remember {what}: at least {} bytes, it may use {}",
                needed as u64 * 5,
                self.options.memory
            ),
        );
        self.failure = self.failure.take().or(Some(error));
    }

    fn run(&mut self) {
        self.check_slots();
        self.check_journal();
        self.check_names();
        let sb = self.reader.sb;
        let mut start = sb.first_block();
        while start < sb.end_block() && self.failure.is_none() {
            self.pass(start);
            start = self.ledger.end();
            self.counts.passes += 1;
        }
        self.check_free();
    }

    /// Counts references for as much of the pool, from `start` on, as fits; compares them with
    /// the refcount tree and reads the data.
    fn pass(&mut self, start: u64) {
        let sb = self.reader.sb;
        self.count(start, self.share(2));
        if self.failure.is_some() {
            return;
        }
        let ledger = std::mem::replace(&mut self.ledger, Ledger::new(0, 0, 0));
        let first = start == sb.first_block();
        let last = ledger.reaches(sb.end_block());
        self.check_data(&ledger, last);
        self.check_refs(&ledger, first, last);
        self.ledger = ledger;
    }

    /// Counts references from block `start` on, as far as `room` bytes can tell.
    fn count(&mut self, start: u64, room: usize) {
        let sb = self.reader.sb;
        self.ledger = Ledger::new(start, sb.end_block(), room);
        self.seen.clear();
        self.spans.clear();
        for (root, kind) in [
            (sb.refs, TreeKind::Refs),
            (sb.sums, TreeKind::Sums),
            (sb.groups, TreeKind::Groups),
        ] {
            self.tree(root, kind, walk::ALL, Some(1), &mut |_, _, _| {});
        }
        self.walk_maps();
    }

    /// Notes that `blocks` more were read. All that is in use is read once at least.
    fn advance(&mut self, blocks: u64) {
        let sb = self.reader.sb;
        let usable = sb.end_block() - sb.first_block();
        let total = usable - sb.free.min(usable);
        self.read += blocks;
        (self.progress)(self.read.min(total), total);
    }

    /// Visits the records of a tree that is not shared, and counts its nodes in the ledger if
    /// `counted`: the lowest level that is read.
    fn tree(
        &mut self,
        root: crate::ondisk::extent::Root,
        kind: TreeKind,
        keys: Range,
        counted: Option<u8>,
        visit: &mut dyn FnMut(&mut Self, u128, &[u8]),
    ) {
        walk(
            self.reader,
            self,
            root,
            kind,
            keys,
            &mut |this, event| match event {
                Event::Node { at, level } => {
                    let deep_enough = level >= counted.unwrap_or(0);
                    if counted.is_some() {
                        this.ledger.add_node(at.block, kind);
                    }
                    // Counting passes read what is above the leaves again and again; the leaves
                    // are read part by part when they are compared.
                    let new = match counted {
                        Some(_) => deep_enough && this.counts.passes == 0,
                        None => level == 0,
                    };
                    if new {
                        this.counts.nodes += 1;
                        this.advance(1);
                    }
                    deep_enough
                }
                Event::Record { key, value } => {
                    visit(this, key, value);
                    true
                }
                Event::Lost { fault } => {
                    this.marks.sums_lost |= kind == TreeKind::Sums;
                    this.find(fault.code, Subject::Pool, fault.text);
                    true
                }
                Event::Misplaced { key, node } => {
                    this.marks.sums_lost |= kind == TreeKind::Sums;
                    let text = format!("key {key:#x} is misplaced in {node:?}");
                    this.find(code::KEY_RANGE, Subject::Pool, text);
                    true
                }
            },
        );
    }

    /// The group records of the groups that blocks `start` up to `end` belong to.
    fn stored_groups(&mut self, start: u64, end: u64, last: bool) -> BTreeMap<u64, u32> {
        let sb = self.reader.sb;
        let all = sb.end_block().div_ceil(GROUP_BLOCKS);
        let keys = match last {
            true => (u128::from(start / GROUP_BLOCKS), u128::MAX),
            false => (
                u128::from(start / GROUP_BLOCKS),
                u128::from((end - 1) / GROUP_BLOCKS),
            ),
        };
        let mut groups = BTreeMap::new();
        self.tree(
            sb.groups,
            TreeKind::Groups,
            keys,
            None,
            &mut |this, key, value| match decode_group(value) {
                Ok(free) if key < u128::from(all) => {
                    groups.insert(key as u64, free);
                }
                Ok(_) => this.find(
                    code::OUTSIDE,
                    Subject::Pool,
                    format!("group {key} lies outside the pool"),
                ),
                Err(error) => {
                    this.find(code::RECORD, Subject::Pool, format!("group {key}: {error}"))
                }
            },
        );
        groups
    }
}
