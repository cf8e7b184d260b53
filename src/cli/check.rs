//! `nodupe check`: verifies a pool that is not mounted, and repairs it if asked to.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use nodupe::device::OpenMode;
use nodupe::engine::{Action, CheckOptions, CheckReport, FilePlace, Finding, Pool, RepairReport};
use nodupe::units::Time;
use serde_json::{Value, json};

use super::access;
use super::failure::{Failure, Result};
use super::output::{Output, clean, show};
use super::size;

/// Exit code if the check could not run.
const COULD_NOT_RUN: u8 = 3;
/// Exit code if there were findings, and a repair has put all of them right.
const REPAIRED: u8 = 4;
/// Findings and actions that a question shows; the others are counted.
const SHOWN_MAX: usize = 40;
const B: u64 = 4096;

const EXAMPLE: &str = "\
Exit codes:
  0  clean
  1  there are findings
  2  the command line is wrong
  3  the check could not run
  4  there were findings, and all of them are repaired

Examples:
  nodupe check ./pool.nodupe
  nodupe check --json /dev/sdb1 | jq '.findings[].message'
  nodupe check --repair ./pool.nodupe";

/// Verifies all structures and all data of a pool that is not mounted.
///
/// Reads only, unless --repair is given. A repair builds the new state in free places and then
/// switches to it, so it can be interrupted at any time; it never changes data.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Check {
    /// Pool: a file or block device
    pool: PathBuf,
    /// Device of the journal, if it is not in the pool
    #[arg(long, value_name = "DEVICE")]
    journal: Option<PathBuf>,
    /// Repair what is found, after a question
    #[arg(long)]
    repair: bool,
    /// Repair without a question
    #[arg(long, requires = "repair")]
    yes: bool,
    /// Memory to use; with less it takes longer
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "256M")]
    memory: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Check, output: Output) -> Result<()> {
    let outcome = match args.repair {
        true => repair(args, output),
        false => check(args, output),
    };
    outcome.map_err(|failure| match failure.usage || failure.code.is_some() {
        true => failure,
        false => failure.exit_code(COULD_NOT_RUN),
    })
}

fn options(args: &Check) -> CheckOptions {
    CheckOptions {
        memory: args.memory,
        data: true,
        search: true,
    }
}

fn check(args: &Check, output: Output) -> Result<()> {
    let name = show(&args.pool);
    let begun = Instant::now();
    let devices = access::open_devices(&args.pool, args.journal.as_deref(), OpenMode::ReadOnly)?;
    let report = with_bar(output, |progress| {
        let (pool, journal) = (devices.pool.as_ref(), devices.journal.as_deref());
        Pool::check_with(pool, journal, &options(args), progress)
    })
    .map_err(|error| Failure::of_pool(format!("cannot check {name}"), &name, &error))?;
    let took = begun.elapsed();
    if args.json {
        let mut value = report_json(&report);
        value["pool"] = json!(name);
        value["seconds"] = json!(took.as_secs_f64());
        output.json(value);
    } else if report.findings.is_empty() {
        output.done(&format!("{name} is clean"));
        tell_state(&report, output);
    } else {
        output.data(&report.findings.iter().map(line).collect::<String>());
        tell_state(&report, output);
    }
    damaged(&name, &report)
}

fn repair(args: &Check, output: Output) -> Result<()> {
    let name = show(&args.pool);
    let asks = !args.yes;
    if asks && !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        return Err(Failure::usage("a repair asks before it changes anything")
            .hint("without a terminal, agree beforehand: --yes"));
    }
    let begun = Instant::now();
    let devices = access::open_devices(&args.pool, args.journal.as_deref(), OpenMode::ReadWrite)?;
    let (heartbeat, devices) = access::claim(&args.pool, devices)?;
    let mut confirm =
        |report: &CheckReport, actions: &[Action]| !asks || agree(&name, report, actions);
    let outcome = with_bar(output, |progress| {
        let (pool, journal) = (devices.pool.clone(), devices.journal.clone());
        Pool::repair(
            pool,
            journal,
            &options(args),
            Time::now(),
            &mut confirm,
            progress,
        )
    });
    heartbeat.release();
    let report = outcome
        .map_err(|error| Failure::of_pool(format!("cannot repair {name}"), &name, &error))?;
    tell_repair(args, &name, &report, begun.elapsed(), output)
}

fn tell_repair(
    args: &Check,
    name: &str,
    report: &RepairReport,
    took: Duration,
    output: Output,
) -> Result<()> {
    if args.json {
        let mut value = report_json(&report.after);
        value["pool"] = json!(name);
        value["seconds"] = json!(took.as_secs_f64());
        value["declined"] = json!(report.declined);
        value["before"] = report_json(&report.before);
        value["actions"] = report
            .actions
            .iter()
            .map(|action| json!({ "code": action.code, "message": clean(&action.message) }))
            .collect();
        output.json(value);
    } else if report.before.findings.is_empty() && report.actions.is_empty() {
        output.done(&format!("{name} is clean, nothing was changed"));
    } else {
        output.data(&report.actions.iter().map(action_line).collect::<String>());
        output.data(&report.after.findings.iter().map(line).collect::<String>());
    }
    if report.declined {
        return Err(Failure::new(format!("{name} was not changed")).exit_code(1));
    }
    damaged(name, &report.after)?;
    if report.before.findings.is_empty() {
        return Ok(());
    }
    output.note(&format!("{name} is repaired"));
    Err(Failure::silent(REPAIRED))
}

/// Asks on the terminal.
fn agree(name: &str, report: &CheckReport, actions: &[Action]) -> bool {
    let mut text: String = report.findings.iter().take(SHOWN_MAX).map(line).collect();
    let more = report.findings.len().saturating_sub(SHOWN_MAX);
    if more > 0 {
        text.push_str(&format!("... and {more} more findings\n"));
    }
    text.push_str("\nThis will be done:\n");
    text.extend(actions.iter().take(SHOWN_MAX).map(action_line));
    let more = actions.len().saturating_sub(SHOWN_MAX);
    if more > 0 {
        text.push_str(&format!("... and {more} more actions\n"));
    }
    text.push_str(&format!("\nRepair {name}? [y/N] "));
    let mut stderr = io::stderr().lock();
    let asked = stderr
        .write_all(text.as_bytes())
        .and_then(|()| stderr.flush());
    let mut answer = String::new();
    asked.is_ok()
        && io::stdin().lock().read_line(&mut answer).is_ok()
        && matches!(answer.trim(), "y" | "Y" | "yes")
}

/// Does work with a bar on a terminal, and nothing on a pipe.
fn with_bar<T>(output: Output, work: impl FnOnce(&mut dyn FnMut(u64, u64)) -> T) -> T {
    let bar = output.progress("checking", 0, true);
    let mut progress = |done: u64, total: u64| {
        bar.set_length(total * B);
        bar.set_position(done * B);
    };
    let result = work(&mut progress);
    bar.finish_and_clear();
    result
}

/// What is worth knowing and no finding.
fn tell_state(report: &CheckReport, output: Output) {
    if report.counts.batches > 0 {
        output.note(&format!(
            "{} batches of the journal wait for replay, which the next mount does",
            report.counts.batches
        ));
    }
    if report.counts.lost_blocks > 0 {
        output.note(&format!(
            "{} of files were lost in an earlier repair, and cannot be read",
            size::human(report.counts.lost_blocks.saturating_mul(B))
        ));
    }
}

fn line(finding: &Finding) -> String {
    let mut text = format!("E{:04} {}", finding.code, clean(&finding.message));
    for (i, place) in finding.files.iter().enumerate() {
        text.push_str(if i == 0 { ": " } else { ", " });
        text.push_str(&place_text(place));
    }
    if finding.files_more > 0 {
        text.push_str(&format!(", and {} more files", finding.files_more));
    }
    text.push('\n');
    text
}

fn place_text(place: &FilePlace) -> String {
    let path = match &place.path {
        Some(path) => clean(path),
        None => format!("inode {} without a name", place.ino),
    };
    match place.offset {
        Some(offset) => format!("{path} at byte {offset}"),
        None => path,
    }
}

fn action_line(action: &Action) -> String {
    format!("R{:04} {}\n", action.code, clean(&action.message))
}

fn report_json(report: &CheckReport) -> Value {
    let place = |place: &FilePlace| json!({ "inode": place.ino.0, "path": place.path, "offset": place.offset });
    let findings: Vec<_> = report
        .findings
        .iter()
        .map(|finding| {
            json!({
                "code": finding.code,
                "message": finding.message,
                "files": finding.files.iter().map(place).collect::<Vec<_>>(),
                "files_more": finding.files_more,
            })
        })
        .collect();
    let counts = &report.counts;
    json!({
        "clean": report.findings.is_empty(),
        "findings": findings,
        "findings_more": report.more,
        "counts": {
            "nodes": counts.nodes,
            "inodes": counts.inodes,
            "clones": counts.clones,
            "data_blocks": counts.data_blocks,
            "detached_maps": counts.detached,
            "lost_blocks": counts.lost_blocks,
            "journal_batches": counts.batches,
            "journal_cut": counts.batch_cut,
            "passes": counts.passes,
        },
    })
}

/// A failure if there are findings.
fn damaged(name: &str, report: &CheckReport) -> Result<()> {
    let count = match (report.findings.len(), report.more) {
        (0, _) => return Ok(()),
        (1, 0) => "1 finding".into(),
        (count, 0) => format!("{count} findings"),
        (count, _) => format!("more than {count} findings"),
    };
    Err(Failure::new(format!("{name} is damaged: {count}"))
        .hint("copy off what is needed from a read-only mount: nodupe mount --read-only POOL DIR")
        .hint(format!("then repair it: nodupe check --repair {name}"))
        .hint("what each code means is in docs/check.md")
        .exit_code(1))
}
