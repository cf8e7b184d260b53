//! `nodupe df`: how full pools are, and what a file uses alone.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use nodupe::control::health_value;
use nodupe::engine::Usage;
use serde_json::{Value, json};

use super::failure::{Failure, Result};
use super::info;
use super::mounts::{self, Mount};
use super::output::{self, Align, Output, Table, show};
use super::size::human;
use super::target::{self, Facts, FileFacts, PoolFacts, Want};
use super::warn::{State, percent_used};

/// How long all mounted pools have to answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);

const EXAMPLE: &str = "\
Columns:
  USED     space taken: data and metadata     LOGICAL  what full copies would take
  AVAIL    what can still be written          SHARING  LOGICAL / USED
  STAGED   written, waiting for its place     JOURNAL  journal in use / its size
  MAPPED   of a file: data, shared or not     EXCLUSIVE  what deleting it would free
  STATE    ok, warning (a mark of --warn-at is crossed, or the host could not hold the pool), full

Examples:
  nodupe df
  nodupe df ./pool.nodupe
  nodupe df /srv/vms/vm-001.raw --json";

/// Shows how full pools are, or what a file uses alone.
///
/// Without arguments all mounted pools are shown. A pool that is not mounted is opened to read.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Df {
    /// Pools, mounted directories or files
    #[arg(value_name = "POOL|DIR|FILE")]
    targets: Vec<PathBuf>,
    /// Device of the journal, for a pool that is not mounted and whose journal is not in it
    #[arg(long, value_name = "DEVICE")]
    journal: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Df, output: Output) -> Result<()> {
    let (mut pools, mut files) = (Vec::new(), Vec::new());
    let (mut failures, mut unknown) = (Vec::new(), Vec::new());
    let mut add = |facts: Result<Facts>| match facts {
        Ok(Facts::Pool(facts)) => pools.push(*facts),
        Ok(Facts::File(facts)) => files.push(*facts),
        Err(failure) => failures.push(failure),
    };
    if args.targets.is_empty() {
        for (mount, answer) in ask(mounts::ours()?, ANSWER_MAX, target::mounted) {
            let facts = answer.unwrap_or_else(|| Err(silent(&mount)));
            // Somebody may have unmounted it meanwhile.
            if facts.is_ok() || mounts::on(&mount.dir)?.as_ref() == Some(&mount) {
                unknown.extend(facts.as_ref().err().map(|why| unknown_json(&mount, why)));
                add(facts.map(|facts| Facts::Pool(Box::new(facts))));
            }
        }
    }
    for path in &args.targets {
        add(target::facts(path, args.journal.as_deref(), Want::Usage));
    }
    let found_nothing = pools.is_empty() && files.is_empty();
    if args.json {
        output.json(json!({
            "pools": pools.iter().map(pool_json).chain(unknown).collect::<Vec<_>>(),
            "files": files.iter().map(file_json).collect::<Vec<_>>(),
        }));
    } else if !found_nothing {
        output.data(&text(&pools, &files));
    }
    if found_nothing && failures.is_empty() {
        output.note("no pool is mounted; to mount one: nodupe mount POOL DIR");
    }
    for facts in &pools {
        if let Some(why) = &facts.poisoned {
            output.note(&poisoned_text(facts, why));
        }
        if let Some(advice) = advice(facts) {
            output.note(&advice);
        }
        if facts.health.is_some_and(|health| health.stale_copies > 0) {
            output.note(&stale_text(facts));
        }
    }
    // As df does: shows what it can, tells every failure, and fails if there was one.
    let last = failures.pop();
    failures.iter().for_each(output::failure);
    last.map_or(Ok(()), Err)
}

/// Asks all mounts at once, each in a thread of its own, because one may be stuck. `None`: no answer
/// within `limit`.
fn ask<T: Send + 'static>(
    mounts: Vec<Mount>,
    limit: Duration,
    question: fn(&Mount) -> Result<T>,
) -> Vec<(Mount, Option<Result<T>>)> {
    let begun = Instant::now();
    let ask_one = |mount: Mount| {
        let (answer, waiting) = mpsc::sync_channel(1);
        let asked = mount.clone();
        // What cannot even be asked does not answer.
        drop(thread::Builder::new().spawn(move || {
            // An answer that comes too late interests nobody.
            drop(answer.send(question(&asked)));
        }));
        (mount, waiting)
    };
    let waiting: Vec<_> = mounts.into_iter().map(ask_one).collect();
    waiting
        .into_iter()
        .map(|(mount, waiting)| {
            let left = limit.saturating_sub(begun.elapsed());
            (mount, waiting.recv_timeout(left).ok())
        })
        .collect()
}

/// A mount whose daemon is there and stuck.
fn silent(mount: &Mount) -> Failure {
    Failure::new(format!("{} does not answer", show(&mount.dir)))
        .why(format!("its pool is {}", show(&mount.source)))
        .hint("see the log of its nodupe process, and dmesg")
}

fn text(pools: &[PoolFacts], files: &[FileFacts]) -> String {
    let pools = pool_table(pools);
    let files = file_table(files);
    let tables = [pools, files].into_iter().filter(|table| !table.is_empty());
    tables
        .map(|table| table.render())
        .collect::<Vec<_>>()
        .join("\n")
}

fn pool_table(pools: &[PoolFacts]) -> Table {
    let right = |name| (name, Align::Right);
    let mut table = Table::new(&[
        ("POOL", Align::Left),
        right("SIZE"),
        right("USED"),
        right("AVAIL"),
        right("USE%"),
        right("LOGICAL"),
        right("FILES"),
        right("SHARING"),
        right("STAGED"),
        right("JOURNAL"),
        ("STATE", Align::Left),
        ("MOUNTED ON", Align::Left),
    ]);
    for facts in pools {
        let usage = facts.usage.unwrap_or_default();
        let mut mount = facts.mount.as_deref().map_or_else(|| "-".to_owned(), show);
        if facts.poisoned.is_some() {
            mount.push_str(" (POISONED)");
        } else if facts.read_only {
            mount.push_str(" (read-only)");
        }
        table.row(vec![
            show(&facts.pool),
            human(usage.total),
            human(usage.used),
            human(usage.available),
            percent_used(&usage).map_or_else(|| "-".to_owned(), |percent| format!("{percent}%")),
            human(usage.logical),
            usage.inodes.to_string(),
            sharing(&usage).map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.1}x")),
            human(usage.staged),
            format!(
                "{}/{}",
                human(usage.journal_used),
                human(usage.journal_size)
            ),
            state(facts).map_or("-", State::word).to_owned(),
            mount,
        ]);
    }
    table
}

fn file_table(files: &[FileFacts]) -> Table {
    let mut table = Table::new(&[
        ("FILE", Align::Left),
        ("SIZE", Align::Right),
        ("MAPPED", Align::Right),
        ("EXCLUSIVE", Align::Right),
        ("EXTENTS", Align::Right),
    ]);
    for facts in files {
        table.row(vec![
            show(&facts.path),
            human(facts.usage.size),
            human(facts.usage.mapped),
            human(facts.usage.exclusive),
            facts.usage.extents.to_string(),
        ]);
    }
    table
}

/// Keys of a pool.
const POOL_KEYS: [&str; 22] = [
    "pool",
    "mount",
    "read_only",
    "size",
    "total",
    "used",
    "available",
    "host_available",
    "state",
    "advice",
    "warn_at",
    "reserve",
    "use_percent",
    "logical",
    "inodes",
    "sharing",
    "staged",
    "journal_used",
    "journal_size",
    "poisoned",
    "health",
    "error",
];

fn pool_json(facts: &PoolFacts) -> Value {
    let usage = facts.usage.unwrap_or_default();
    let told = json!({
        "pool": show(&facts.pool),
        "mount": facts.mount.as_deref().map(show),
        "read_only": facts.read_only,
        "size": facts.info.size,
        "total": usage.total,
        "used": usage.used,
        "available": usage.available,
        "host_available": usage.host_available,
        "state": state(facts).map(State::word),
        "advice": advice(facts),
        "warn_at": facts.marks,
        "reserve": usage.reserve,
        "use_percent": percent_used(&usage),
        "logical": usage.logical,
        "inodes": usage.inodes,
        "sharing": sharing(&usage),
        "staged": usage.staged,
        "journal_used": usage.journal_used,
        "journal_size": usage.journal_size,
        "poisoned": facts.poisoned,
        "health": facts.health.as_ref().map(health_value),
        "error": null,
    });
    debug_assert!(told.as_object().is_some_and(|told| {
        told.len() == POOL_KEYS.len() && POOL_KEYS.iter().all(|key| told.contains_key(*key))
    }));
    told
}

/// A mount of which nothing is known but why: all other keys of a pool are null.
fn unknown_json(mount: &Mount, why: &Failure) -> Value {
    let mut entry: serde_json::Map<String, Value> = POOL_KEYS
        .iter()
        .map(|key| ((*key).to_owned(), Value::Null))
        .collect();
    entry.insert("pool".to_owned(), json!(show(&mount.source)));
    entry.insert("mount".to_owned(), json!(show(&mount.dir)));
    entry.insert("error".to_owned(), json!(why.chain.join(": ")));
    Value::Object(entry)
}

/// How full a pool is, if that is known.
fn state(facts: &PoolFacts) -> Option<State> {
    let usage = facts.usage.as_ref()?;
    Some(State::of(usage, &facts.marks, facts.host_full))
}

fn advice(facts: &PoolFacts) -> Option<String> {
    state(facts)?.advice(&facts.pool, facts.usage.as_ref()?)
}

fn file_json(facts: &FileFacts) -> Value {
    info::usage_json(&facts.path, &facts.usage)
}

fn stale_text(facts: &PoolFacts) -> String {
    format!(
        "the host has no space to renew the copies of the superblock of {}, which count if both \
         superblocks are damaged\n  free some on the filesystem that holds the pool",
        show(&facts.pool)
    )
}

fn poisoned_text(facts: &PoolFacts, why: &str) -> String {
    let pool = show(&facts.pool);
    let dir = facts.mount.as_deref().unwrap_or(Path::new("DIR"));
    format!(
        "the pool {pool} refuses writes: {why}\n  repair the disk below it, then: nodupe umount {}; \
         nodupe check {pool}; mount it again",
        show(dir)
    )
}

/// How often, on average, a used byte stands for a byte of a file.
#[allow(clippy::cast_precision_loss)] // one digit behind the point is shown
fn sharing(usage: &Usage) -> Option<f64> {
    (usage.used > 0 && usage.logical > 0).then(|| usage.logical as f64 / usage.used as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sharing_never_divides_by_zero() {
        assert_eq!(sharing(&Usage::default()), None);
    }
    #[test]
    fn a_mount_that_is_stuck_holds_nobody_up() {
        let mounts = || mounts::all().unwrap()[..1].to_vec();
        let stuck = |_: &Mount| -> Result<()> {
            loop {
                thread::park();
            }
        };
        let told = ask(mounts(), Duration::from_millis(10), stuck);
        assert!(told[0].1.is_none());
        let failure = silent(&told[0].0);
        assert!(failure.chain[0].ends_with("does not answer"));
        let entry = unknown_json(&told[0].0, &failure);
        assert!(
            entry["error"]
                .as_str()
                .is_some_and(|why| why.contains("does not answer"))
        );
        assert!(POOL_KEYS.iter().all(|key| entry.get(key).is_some()));
        assert!(entry["used"].is_null());
        assert_eq!(entry["mount"], json!(show(&told[0].0.dir)));
        let told = ask(mounts(), Duration::from_secs(600), |_| Ok(7));
        assert_eq!(told[0].1.as_ref().unwrap().as_ref().unwrap(), &7);
    }
}
