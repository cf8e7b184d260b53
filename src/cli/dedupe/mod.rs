//! `nodupe dedupe`: blocks of files of a mounted pool that are equal become one, while the files are
//! in use.
//!
//! 1. Checksums only say where to look: the daemon compares bytes, and shares what is equal at that
//!    moment. Nobody who uses the files can tell, and being killed does no harm.
//! 2. Of equal blocks that of the first file stays, and the others become it.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::ProgressBar;
use nodupe::control::{self, Compare, EQUAL_BLOCKS_MAX, Request, Response, Token};
use nodupe::engine::{Equal, Place, Share};
use nodupe::error::{Error, Kind};
use nodupe::units::BLOCK_SIZE;
use nodupe::vfs::UNNAMED_PREFIX;
use serde_json::{Value, json};

use super::blocks::{self, Seen, Tree};
use super::failure::{Failure, Result};
use super::mounts;
use super::output::{self, Align, Output, Table, show};
use super::size::human;

mod index;

use index::{ENTRIES_MAX, Entry, Groups, Part};

const B: u64 = BLOCK_SIZE as u64;
/// Blocks that are compared where only the first is known to be a candidate.
const FIRST_BLOCKS: u64 = 16;
/// How long a token is used: it works for a minute.
const TOKEN_AGE: Duration = Duration::from_secs(20);
/// Files that stay open at once.
const OPEN_MAX: usize = 64;

const EXAMPLE: &str = "\
The files may be in use: nothing that their users see changes. Of equal blocks those of the file
that is named first stay; files that can only be read come before the others. Blocks are found equal at any multiple of 4096 bytes in the files.

Exit codes:
  0  all that was named was looked at
  1  something could not be read or shared
  2  the command line is wrong

Examples:
  nodupe dedupe /srv/vms/debian.raw /srv/vms/ubuntu.raw
  nodupe dedupe --dry-run /srv/vms
  nodupe dedupe /srv/vms --json | jq .freed";

/// Shares equal blocks of files in a mounted pool, while they are in use.
///
/// For images that were made independently and are partly equal; what was cloned is shared
/// already. Blocks are compared byte by byte before they are shared.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Dedupe {
    /// Files, and directories with all that is below them, of one mounted pool
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Compare, and tell what would be shared
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A file, and what was done with it.
#[derive(Debug)]
struct Item {
    path: PathBuf,
    /// The mount that it is in.
    tree: Rc<Tree>,
    /// Bytes that are allocated for it, to draw the bar.
    data: u64,
    compared: u64,
    shared: u64,
    failed: bool,
    /// Why it cannot be written to: others share its blocks, and it stays as it is.
    refused: Option<Error>,
}

pub(super) fn run(args: &Dedupe, output: Output) -> Result<()> {
    let begun = Instant::now();
    let mut failures = Vec::new();
    let items = find(args, &mut failures)?;
    let dir = items.first().map(|item| item.path.clone());
    let before = dir.as_deref().map(|path| used(path, args.dry_run));
    let data = items.iter().map(|item| item.data).sum();
    let bar = output.progress("looking for equal blocks", data, true);
    let mut work = Work {
        items,
        dry: args.dry_run,
        open: HashMap::new(),
        failures,
        bar,
    };
    work.sources_first();
    if let Err(error) = work.run() {
        work.failures.push(
            Failure::new("cannot go on").because(&error).hint(
                "what was shared so far stays shared; the contents of all files are as before",
            ),
        );
    }
    work.bar.finish_and_clear();
    let freed = match (before.flatten(), &dir) {
        (Some(before), Some(path)) => {
            used(path, args.dry_run).map(|after| before.saturating_sub(after))
        }
        _ => None,
    };
    report(args, &work, freed, begun.elapsed(), output);
    work.failures.iter().for_each(output::failure);
    match work.failures.is_empty() {
        true => Ok(()),
        false => Err(Failure::silent(super::FAILED)),
    }
}

/// All files that were named, in that order and each once.
fn find(args: &Dedupe, failures: &mut Vec<Failure>) -> Result<Vec<Item>> {
    let (mut items, mut known) = (Vec::new(), HashSet::new());
    let (mut device, mut trees) = (None, HashMap::new());
    for named in &args.files {
        let failed = |error: &std::io::Error| {
            Failure::new(format!("cannot look at {}", show(named))).because(error)
        };
        let path = named.canonicalize().map_err(|error| failed(&error))?;
        let Some(mount) = mounts::holding(&path)?.filter(|mount| mount.is_ours()) else {
            return Err(
                Failure::new(format!("{} is not in a mounted pool", show(named)))
                    .hint("mount the pool, and name files below the mount: nodupe mount POOL DIR"),
            );
        };
        let tree = tree(&mut trees, mount.dir)?;
        let metadata = fs::metadata(&path).map_err(|error| failed(&error))?;
        if *device.get_or_insert(metadata.dev()) != metadata.dev() {
            return Err(Failure::usage(format!(
                "{} is in another pool than {}",
                show(named),
                show(&args.files[0])
            ))
            .hint("blocks are shared within one pool: name files of one"));
        }
        if metadata.is_file() {
            add(&mut items, &mut known, (path, &tree), &metadata);
            continue;
        }
        if !metadata.is_dir() {
            return Err(Failure::new(format!("cannot use {}", show(named)))
                .why("it is neither a file nor a directory"));
        }
        let found = super::blocks::files_below(&path, metadata.dev(), |dir, error| {
            let failure = Failure::new(format!("cannot look into {}", show(dir)));
            failures.push(failure.because(error));
        });
        for (path, metadata) in found {
            add(&mut items, &mut known, (path, &tree), &metadata);
        }
    }
    Ok(items)
}

/// The tree below a mount, opened once.
fn tree(trees: &mut HashMap<PathBuf, Rc<Tree>>, dir: PathBuf) -> Result<Rc<Tree>> {
    if let Some(tree) = trees.get(&dir) {
        return Ok(tree.clone());
    }
    let failed = |error: Error| Failure::new("cannot use the mount").because(&error);
    let tree = Rc::new(Tree::new(&dir).map_err(failed)?);
    trees.insert(dir, tree.clone());
    Ok(tree)
}

fn add(
    items: &mut Vec<Item>,
    known: &mut HashSet<u64>,
    (path, tree): (PathBuf, &Rc<Tree>),
    metadata: &fs::Metadata,
) {
    let hidden = path
        .file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with(UNNAMED_PREFIX));
    if !hidden && known.insert(metadata.ino()) {
        items.push(Item {
            path,
            tree: tree.clone(),
            data: metadata.blocks().saturating_mul(512),
            compared: 0,
            shared: 0,
            failed: false,
            refused: None,
        });
    }
}

/// Bytes of the pool in use, once all that was freed is free; `None`: only who mounted it may ask
/// for that.
fn used(path: &Path, dry: bool) -> Option<u64> {
    let file = File::open(path).ok()?;
    if !dry {
        control::call(file.as_fd(), &Request::Checkpoint).ok()?;
    }
    match control::call(file.as_fd(), &Request::Info) {
        Ok(Response::Info(info)) => Some(info.usage.used),
        _ => None,
    }
}

/// An open file.
struct Open {
    file: File,
    token: Option<(Token, Instant)>,
}

struct Work {
    items: Vec<Item>,
    dry: bool,
    open: HashMap<u32, Open>,
    failures: Vec<Failure>,
    bar: ProgressBar,
}

/// The file that is being looked at, and what of it is done.
struct Target {
    number: u32,
    /// Blocks that are shared or will not be: first and the one behind, ascending.
    done: Vec<(u64, u64)>,
    /// Blocks to compare next.
    ahead: u64,
}

impl Work {
    /// Puts files that can only be read before the others, so that those share with them. If all
    /// are such, nothing can be done with any.
    fn sources_first(&mut self) {
        for number in 0..self.items.len() as u32 {
            self.opened(number);
        }
        self.open.clear();
        self.items.sort_by_key(|item| item.refused.is_none());
        if self
            .items
            .iter()
            .all(|item| item.failed || item.refused.is_some())
        {
            for number in 0..self.items.len() {
                if let Some(error) = self.items[number].refused.take() {
                    self.fail(number as u32, &error);
                }
            }
        }
    }

    fn run(&mut self) -> nodupe::error::Result<()> {
        let mut from = 0;
        loop {
            let mut part = Part::new(from, ENTRIES_MAX);
            self.collect(&mut part)?;
            let last = part.last();
            self.share(&part.groups(), (from, last))?;
            match last.checked_add(1) {
                Some(next) => from = next,
                None => return Ok(()),
            }
        }
    }

    /// Tells a part the blocks of all files.
    fn collect(&mut self, part: &mut Part) -> nodupe::error::Result<()> {
        let mut seen = Seen::default();
        for number in 0..self.items.len() as u32 {
            let Some(open) = self.opened(number) else {
                continue;
            };
            let file = &open.file;
            let told = blocks::fresh(file, &mut seen, |at, block, sum| {
                part.add(Entry {
                    sum,
                    file: number,
                    at,
                    block,
                });
            });
            self.check(number, told)?;
        }
        Ok(())
    }

    /// Shares what is equal of the groups, which are those of a part of the checksums.
    fn share(&mut self, groups: &Groups, part: (u32, u32)) -> nodupe::error::Result<()> {
        // The bar goes through all data once, whatever the number of parts.
        let of_all = |checksums: u64| checksums as f64 / (1_u64 << 32) as f64;
        let each = of_all(u64::from(part.1 - part.0) + 1);
        let before = of_all(part.0.into()) * self.bar.length().unwrap_or(0) as f64;
        let mut done = 0.0;
        for number in 0..self.items.len() as u32 {
            if self.opened(number).is_none() || self.items[number as usize].refused.is_some() {
                continue;
            }
            // The file stays open whatever else is opened meanwhile.
            let Some(open) = self.open.remove(&number) else {
                continue;
            };
            let mut target = Target {
                number,
                done: Vec::new(),
                ahead: FIRST_BLOCKS,
            };
            let shared = blocks::runs(&open.file, |run| {
                done += (run.count * B) as f64 * each;
                self.bar.set_position((before + done) as u64);
                self.share_run(groups, &open.file, run, &mut target)
            });
            self.open.insert(number, open);
            self.check(number, shared)?;
        }
        Ok(())
    }

    fn share_run(
        &mut self,
        groups: &Groups,
        file: &File,
        run: Place,
        target: &mut Target,
    ) -> nodupe::error::Result<()> {
        for (block, others) in groups.within(run.block, run.count) {
            let at = run.at + (block - run.block);
            target.done.retain(|range| range.1 > at);
            for other in others {
                if target.done.iter().any(|range| range.0 <= at) {
                    break;
                }
                self.compare(file, at, &other, target)?;
            }
        }
        Ok(())
    }

    /// Compares blocks from `at` on with those of another file, or of another part of this one.
    fn compare(
        &mut self,
        file: &File,
        at: u64,
        other: &Entry,
        target: &mut Target,
    ) -> nodupe::error::Result<()> {
        let own = target.number == other.file;
        let source = match own {
            true => None,
            false => match self.token(other.file) {
                Some(token) => Some(token),
                None => return Ok(()),
            },
        };
        let most = match own {
            true => at.abs_diff(other.at),
            false => u64::MAX,
        };
        let mut count = target.ahead.min(most);
        if count == 0 {
            return Ok(());
        }
        let equal = loop {
            let request = Request::ShareEqual(Compare {
                source,
                range: Share {
                    block: other.at,
                    dst_block: at,
                    count,
                },
                dry: self.dry,
            });
            match control::call(file.as_fd(), &request) {
                Ok(Response::Equal(equal)) if is_sound(&equal, count) => break equal,
                Ok(_) => return Err(blocks::nonsense()),
                // What is damaged is told once for each file, and the rest is looked at: block by
                // block, until some are equal again.
                Err(error) if error.kind() == Kind::Corrupt => {
                    self.fail(target.number, &error);
                    target.ahead = 1;
                    if count == 1 {
                        return Ok(());
                    }
                    count = 1;
                }
                Err(error) => return Err(error),
            }
        };
        let item = &mut self.items[target.number as usize];
        item.compared += equal.compared * B;
        item.shared += equal.blocks() * B;
        let to_the_end = equal
            .ranges
            .last()
            .is_some_and(|last| last.0 + last.1 == count);
        target.ahead = match to_the_end {
            true => (target.ahead * 8).min(EQUAL_BLOCKS_MAX),
            false => FIRST_BLOCKS,
        };
        let ranges = equal.ranges.iter();
        target
            .done
            .extend(ranges.map(|(first, count)| (at + first, at + first + count)));
        Ok(())
    }

    /// The token of a file that blocks are shared from.
    fn token(&mut self, number: u32) -> Option<Token> {
        let open = self.opened(number)?;
        if let Some((token, given)) = open.token
            && given.elapsed() < TOKEN_AGE
        {
            return Some(token);
        }
        match control::call(open.file.as_fd(), &Request::Token) {
            Ok(Response::Token(token)) => {
                open.token = Some((token, Instant::now()));
                Some(token)
            }
            Ok(_) => None,
            Err(error) => {
                self.fail(number, &error);
                None
            }
        }
    }

    /// The file, open; `None` if that cannot be, which is told once.
    fn opened(&mut self, number: u32) -> Option<&mut Open> {
        if self.open.len() >= OPEN_MAX && !self.open.contains_key(&number) {
            self.open.clear();
        }
        if !self.open.contains_key(&number) {
            let item = &mut self.items[number as usize];
            if item.failed {
                return None;
            }
            let write = !self.dry && item.refused.is_none();
            let mut opened = item.tree.open(&item.path, write);
            if write && opened.as_ref().is_err_and(is_only_to_read) {
                item.refused = opened.err();
                opened = item.tree.open(&item.path, false);
            }
            match opened {
                Ok(file) => {
                    let token = None;
                    self.open.insert(number, Open { file, token });
                }
                Err(error) => {
                    self.fail(number, &error);
                    return None;
                }
            }
        }
        self.open.get_mut(&number)
    }

    /// Goes on behind what concerns one file only.
    fn check(
        &mut self,
        number: u32,
        outcome: nodupe::error::Result<()>,
    ) -> nodupe::error::Result<()> {
        match outcome {
            Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::NotFound | Kind::Denied) => {
                self.fail(number, &error);
                Ok(())
            }
            outcome => outcome,
        }
    }

    fn fail(&mut self, number: u32, error: &Error) {
        let item = &mut self.items[number as usize];
        if !std::mem::replace(&mut item.failed, true) {
            let what = format!("cannot share all of {}", show(&item.path));
            self.failures.push(Failure::new(what).because(error));
        }
    }
}

/// True if a file that could not be opened to write may be one to read.
fn is_only_to_read(error: &Error) -> bool {
    let cause = std::error::Error::source(error);
    let cause = cause.and_then(|cause| cause.downcast_ref::<io::Error>());
    let kind = cause.map(io::Error::kind);
    error.kind() == Kind::Denied
        || matches!(
            kind,
            Some(io::ErrorKind::ExecutableFileBusy | io::ErrorKind::ReadOnlyFilesystem)
        )
}

fn is_sound(equal: &Equal, count: u64) -> bool {
    let within = |range: &(u64, u64)| range.0.checked_add(range.1).is_some_and(|end| end <= count);
    equal.ranges.iter().all(within) && equal.compared <= EQUAL_BLOCKS_MAX * 64
}

fn report(args: &Dedupe, work: &Work, freed: Option<u64>, took: Duration, output: Output) {
    let sum = |of: fn(&Item) -> u64| work.items.iter().map(of).sum::<u64>();
    let (compared, shared) = (sum(|item| item.compared), sum(|item| item.shared));
    let freed = freed.filter(|_| !args.dry_run);
    if args.json {
        let file = |item: &Item| {
            json!({
                "file": show(&item.path),
                "compared": item.compared,
                "shared": item.shared,
                "source_only": item.refused.is_some(),
            })
        };
        let files: Vec<Value> = work.items.iter().map(file).collect();
        let failures = work.failures.iter();
        output.json(json!({
            "files": files,
            "compared": compared,
            "shared": shared,
            "freed": freed,
            "dry_run": args.dry_run,
            "failures": failures.map(|f| f.chain.join(": ")).collect::<Vec<_>>(),
            "seconds": took.as_secs_f64(),
        }));
        return;
    }
    let sources = work.items.iter().filter(|item| item.refused.is_some());
    match sources.count() {
        0 => {}
        1 => output.note("1 file can only be read: it stays, and others share its blocks"),
        count => output.note(&format!(
            "{count} files can only be read: they stay, and others share their blocks"
        )),
    }
    let right = Align::Right;
    let mut table = Table::new(&[
        ("FILE", Align::Left),
        ("COMPARED", right),
        ("SHARED", right),
    ]);
    for item in work.items.iter().filter(|item| item.compared > 0) {
        table.row(vec![
            show(&item.path),
            human(item.compared),
            human(item.shared),
        ]);
    }
    if !table.is_empty() && !output.quiet {
        output.data(&table.render());
    }
    output.done(&format!(
        "{} looked at in {:.1} s: {} compared, {} {}{}",
        match work.items.len() {
            1 => "1 file".to_owned(),
            count => format!("{count} files"),
        },
        took.as_secs_f64(),
        human(compared),
        human(shared),
        match args.dry_run {
            true => "would be shared",
            false => "shared",
        },
        match freed {
            Some(freed) => format!(", {} freed", human(freed)),
            None => String::new(),
        }
    ));
}
