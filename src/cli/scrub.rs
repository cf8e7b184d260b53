//! `nodupe scrub`: reads everything that a pool keeps, and names the files that are damaged.
//!
//! A mounted pool is scrubbed by its daemon, and this program looks; any other is opened to read.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use clap::Args;
use indicatif::ProgressBar;
use nodupe::control::{Request, ScrubPage, scrub_state_name};
use nodupe::engine::{
    DamagedFile, OpenOptions, Scrub as Work, ScrubOptions, ScrubPhase, ScrubState, ScrubStatus,
};
use nodupe::sys::process::TerminationSignals;
use serde_json::{Value, json};

use super::access;
use super::client;
use super::failure::{Failure, Result};
use super::info::time_text;
use super::mounts::{self, Mount};
use super::output::{Align, Output, Table, clean, list, show};
use super::size;
use super::target::LOOK_CACHE_SIZE;

const EXAMPLE: &str = "\
A mounted pool is scrubbed beside its guests, gently unless --rate is given. Ctrl-C stops it, and
the next one goes on there; so does one behind an unmount or a crash.

Exit codes:
  0  everything in use was read and is sound
  1  something is damaged, or not everything was read
  2  the command line is wrong

Examples:
  nodupe scrub ./datastore
  nodupe scrub ./datastore --rate 50M
  nodupe scrub ./datastore --background; nodupe scrub ./datastore --status
  nodupe scrub --json /dev/sdb1 | jq '.files[].paths'";

/// How often a running scrub is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Slowest scrub: below that it would not end.
const RATE_MIN: u64 = 64 * 1024; // 64 KiB/s

/// Reads everything that a pool keeps, and names every file with damage.
///
/// Compares every block in use with its checksum, also in a mounted pool. All files that share a
/// damaged block are named.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Scrub {
    /// Directory that the pool is mounted on, or a pool
    #[arg(value_name = "DIR|POOL")]
    target: PathBuf,
    /// Bytes per second, at most, whatever guests do
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    rate: Option<u64>,
    /// Begin at the beginning, although the last scrub was interrupted
    #[arg(long)]
    restart: bool,
    /// Let the daemon go on alone
    #[arg(long, conflicts_with_all = ["status", "stop"])]
    background: bool,
    /// Show how the scrub stands, or how the last one ended
    #[arg(long, conflicts_with = "stop")]
    status: bool,
    /// Stop the scrub that runs
    #[arg(long)]
    stop: bool,
    /// Begin to read data here (address in the pool), if it is not mounted
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    from: Option<u64>,
    /// Device of the journal, if the pool is not mounted and its journal is not in it
    #[arg(long, value_name = "DEVICE")]
    journal: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn parse_rate(text: &str) -> std::result::Result<u64, String> {
    let size = text.trim();
    match size::parse(size.strip_suffix("/s").unwrap_or(size))? {
        rate if rate >= RATE_MIN => Ok(rate),
        _ => Err(format!("'{text}': a scrub reads at least 64K a second")),
    }
}

/// A pool, and where it is mounted.
struct Target {
    name: String,
    mount: Option<Mount>,
}

/// What was found.
#[derive(Default)]
struct Findings {
    files: Vec<DamagedFile>,
    others: Vec<String>,
}

pub(super) fn run(args: &Scrub, output: Output) -> Result<()> {
    let target = find(&args.target)?;
    match &target.mount {
        Some(mount) => online(args, &target, &mount.dir, output),
        None => offline(args, &target, output),
    }
}

fn find(path: &Path) -> Result<Target> {
    let name = show(path);
    let mount = match path.canonicalize() {
        Ok(resolved) if resolved.is_dir() => {
            let mount = mounts::holding(&resolved)?.filter(Mount::is_ours);
            Some(mount.ok_or_else(|| {
                Failure::new(format!("cannot scrub {name}"))
                    .why("it is not in a mounted pool")
                    .hint("name a pool, or the directory it is mounted on")
            })?)
        }
        Ok(resolved) => mounts::of_pool(&resolved)?,
        // The pool is opened, and why that fails is told then.
        Err(_) => None,
    };
    Ok(Target { name, mount })
}

fn online(args: &Scrub, target: &Target, dir: &Path, output: Output) -> Result<()> {
    if args.from.is_some() || args.journal.is_some() {
        return Err(Failure::usage(format!(
            "--from and --journal are for pools that are not mounted, {} is",
            target.name
        )));
    }
    if args.status {
        let status = client::scrub(dir, &Request::ScrubStatus)?;
        let findings = match status.is_clean() {
            true => Findings::default(),
            false => findings_of(dir)?,
        };
        return tell_status(args, target, &status, &findings, output);
    }
    if args.stop {
        let mut status = client::scrub(dir, &Request::ScrubStop)?;
        while status.state == ScrubState::Running {
            thread::sleep(POLL_INTERVAL);
            status = client::scrub(dir, &Request::ScrubStatus)?;
        }
        output.done(&status_line(&status));
        return Ok(());
    }
    let signals = Signals::watch()?;
    let request = Request::ScrubStart {
        rate: args.rate,
        restart: args.restart,
    };
    client::scrub(dir, &request)?;
    if args.background {
        output.done(&format!(
            "the daemon scrubs {}; see how it stands: nodupe scrub --status {}",
            target.name,
            show(dir)
        ));
        return Ok(());
    }
    let status = watch(&signals, output, |stop| match stop {
        true => client::scrub(dir, &Request::ScrubStop),
        false => client::scrub(dir, &Request::ScrubStatus),
    })?;
    tell(args, target, &status, &findings_of(dir)?, output)
}

fn findings_of(dir: &Path) -> Result<Findings> {
    let mut all = Findings::default();
    let mut page = Some(ScrubPage::default());
    while let Some(at) = page {
        let found = client::scrub_findings(dir, at)?;
        for file in found.files {
            match all.files.last_mut() {
                // A file with many names is in several pages.
                Some(last) if last.ino == file.ino => last.paths.extend(file.paths),
                _ => all.files.push(file),
            }
        }
        all.others.extend(found.others);
        // A daemon that leads in a circle is not followed.
        page = found.next.filter(|next| *next != at);
    }
    Ok(all)
}

fn offline(args: &Scrub, target: &Target, output: Output) -> Result<()> {
    let (name, path) = (&target.name, &args.target);
    if args.background || args.stop {
        return Err(Failure::new(format!("{name} is not mounted"))
            .why("nobody could scrub it in the background")
            .hint(format!("scrub it: nodupe scrub {name}")));
    }
    let signals = Signals::watch()?;
    let options = OpenOptions {
        read_only: true,
        cache_size: LOOK_CACHE_SIZE,
    };
    let pool = access::open_pool(path, args.journal.as_deref(), &options)?;
    let cannot = |error| Failure::of_pool(format!("cannot scrub the pool {name}"), name, &error);
    if args.status {
        let status = pool.last_scrub().map_err(cannot)?;
        return tell_status(args, target, &status, &Findings::default(), output);
    }
    // The table says it all; the log is for daemons.
    if std::env::var_os("RUST_LOG").is_none() {
        log::set_max_level(log::LevelFilter::Off);
    }
    let work = Work::new(ScrubOptions {
        rate: args.rate,
        yields: false,
        // It could not write down how far it came, so it does not begin in the middle either.
        restart: true,
        from: args.from,
    });
    let status = thread::scope(|scope| {
        let thread = scope.spawn(|| pool.scrub(&work));
        let status = watch(&signals, output, |stop| {
            if stop {
                work.stop();
            }
            let mut status = work.status();
            if !thread.is_finished() {
                status.state = ScrubState::Running;
            }
            Ok(status)
        });
        match thread.join() {
            Ok(outcome) => outcome.map_err(cannot).and(status),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })?;
    let findings = Findings {
        files: work.files(0, usize::MAX),
        others: work.others(0, usize::MAX),
    };
    tell(args, target, &status, &findings, output)
}

/// Signals that ask this program to end.
struct Signals(Arc<AtomicU32>);

impl Signals {
    fn watch() -> Result<Self> {
        let failed = |error: std::io::Error| Failure::new("cannot wait for Ctrl-C").because(&error);
        let signals = TerminationSignals::block().map_err(failed)?;
        let count = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&count);
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                while signals.wait().is_ok() {
                    // Who asks twice does not want to wait.
                    if counter.fetch_add(1, Ordering::SeqCst) > 0 {
                        std::process::exit(1);
                    }
                }
            })
            .map_err(failed)?;
        Ok(Self(count))
    }

    fn came(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 0
    }
}

/// Shows how a scrub goes on until it has ended. `ask` tells how it stands; asks it to stop if
/// that is true.
fn watch(
    signals: &Signals,
    output: Output,
    mut ask: impl FnMut(bool) -> Result<ScrubStatus>,
) -> Result<ScrubStatus> {
    let bar = output.progress("", 0, true);
    let mut stopped = false;
    let outcome = loop {
        let stop = signals.came() && !std::mem::replace(&mut stopped, signals.came());
        let status = match ask(stop) {
            Ok(status) => status,
            Err(failure) => break Err(failure),
        };
        if status.state != ScrubState::Running {
            break Ok(status);
        }
        draw(&bar, &status);
        thread::sleep(POLL_INTERVAL);
    };
    bar.finish_and_clear();
    outcome
}

fn draw(bar: &ProgressBar, status: &ScrubStatus) {
    bar.set_message(match status.phase {
        ScrubPhase::Metadata => "reading metadata",
        ScrubPhase::Data => "reading data",
        ScrubPhase::Files => "looking for damaged files",
    });
    bar.set_length(status.total);
    if bar.position() == 0 && status.done > 0 && status.resumed {
        // What an earlier one has read is no measure of the speed.
        bar.set_position(status.done);
        bar.reset_eta();
    }
    bar.set_position(status.done);
}

/// Tells what a scrub came to.
fn tell(
    args: &Scrub,
    target: &Target,
    status: &ScrubStatus,
    findings: &Findings,
    output: Output,
) -> Result<()> {
    let name = &target.name;
    if args.json {
        output.json(to_json(target, status, findings));
    } else if findings.files.is_empty() && findings.others.is_empty() {
        if status.state == ScrubState::Finished && status.is_clean() {
            output.done(&format!(
                "{name} is sound: {} verified",
                size::human(status.done)
            ));
        }
    } else {
        output.data(&text(target, findings));
    }
    match status.state {
        ScrubState::Finished if status.is_clean() => Ok(()),
        ScrubState::Finished => Err(Failure::new(format!("{name} is damaged: {}", count(status)))
            .hint("copy what is sound of these files elsewhere, or restore them from a backup")
            .hint("a block is sound again once it is overwritten; look at the disk (smartctl, dmesg)")),
        ScrubState::Failed => {
            let failure = Failure::new(format!("the scrub of {name} could not go on"));
            Err(match &status.error {
                Some(why) => failure.why(why.clone()),
                None => failure,
            })
        }
        _ => {
            let failure = Failure::new(format!(
                "the scrub of {name} was stopped: {}",
                status_line(status)
            ));
            let from = match target.mount {
                Some(_) => String::new(),
                None => format!(" --from {}", status.position),
            };
            Err(failure.hint(format!("go on: nodupe scrub {name}{from}")))
        }
    }
}

fn tell_status(
    args: &Scrub,
    target: &Target,
    status: &ScrubStatus,
    findings: &Findings,
    output: Output,
) -> Result<()> {
    if args.json {
        output.json(to_json(target, status, findings));
        return Ok(());
    }
    let mut lines = vec![
        ("pool", target.name.clone()),
        ("scrub", status_line(status)),
    ];
    if status.state != ScrubState::Never {
        lines.push(("began", time_text(status.started)));
    }
    if !matches!(status.state, ScrubState::Never | ScrubState::Running) {
        lines.push(("ended", time_text(status.ended)));
    }
    if let Some(why) = &status.error {
        lines.push(("error", clean(why)));
    }
    let mut text_all = list(&lines);
    if !findings.files.is_empty() || !findings.others.is_empty() {
        text_all.push('\n');
        text_all.push_str(&text(target, findings));
    }
    output.data(&text_all);
    Ok(())
}

/// How a scrub stands, in a line.
pub(super) fn status_line(status: &ScrubStatus) -> String {
    let percent = (status.done.min(status.total) * 100)
        .checked_div(status.total)
        .unwrap_or(0);
    let found = match status.is_clean() {
        true => "no damage".to_owned(),
        false => count(status),
    };
    match status.state {
        ScrubState::Never => "never".to_owned(),
        ScrubState::Running => match status.phase {
            ScrubPhase::Metadata => "running: reads metadata".to_owned(),
            _ => format!("running: {percent}% read, {found} so far"),
        },
        ScrubState::Stopped => format!("interrupted at {percent}%, {found} so far"),
        ScrubState::Finished => format!(
            "finished {}: {} verified, {found}",
            time_text(status.ended),
            size::human(status.done)
        ),
        ScrubState::Failed => format!("failed at {percent}%, {found} so far"),
    }
}

fn count(status: &ScrubStatus) -> String {
    let plural = |count: u64, one: &str, many: &str| match count {
        0 => None,
        1 => Some(format!("1 {one}")),
        count => Some(format!("{count} {many}")),
    };
    let parts = [
        plural(status.files, "file", "files"),
        plural(status.damaged_blocks, "data block", "data blocks"),
        plural(status.others, "other finding", "other findings"),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// The paths of a file as the user can use them.
fn paths(target: &Target, file: &DamagedFile) -> Vec<String> {
    let named = file.paths.iter().map(|path| {
        let path = String::from_utf8_lossy(path).into_owned();
        match &target.mount {
            Some(mount) => format!("{}{path}", mount.dir.display()),
            None => format!("{}:{path}", target.name),
        }
    });
    named.collect()
}

fn text(target: &Target, findings: &Findings) -> String {
    let right = Align::Right;
    let mut table = Table::new(&[("FILE", Align::Left), ("OFFSET", right), ("LENGTH", right)]);
    for file in &findings.files {
        let mut names = paths(target, file);
        if names.is_empty() {
            names.push(format!("(deleted, but open: inode {})", file.ino));
        }
        for name in names {
            for (offset, len) in &file.ranges {
                table.row(vec![clean(&name), offset.to_string(), len.to_string()]);
            }
            if file.more {
                table.row(vec![clean(&name), "and".into(), "more".into()]);
            }
        }
    }
    let mut text = match table.is_empty() {
        true => String::new(),
        false => table.render(),
    };
    for other in &findings.others {
        text.push_str(&clean(other));
        text.push('\n');
    }
    text
}

fn to_json(target: &Target, status: &ScrubStatus, findings: &Findings) -> Value {
    let file = |file: &DamagedFile| {
        let range = |(offset, len): &(u64, u64)| json!({"offset": offset, "length": len});
        json!({
            "inode": file.ino,
            "paths": paths(target, file),
            "ranges": file.ranges.iter().map(range).collect::<Vec<_>>(),
            "more_ranges": file.more,
        })
    };
    json!({
        "pool": target.name,
        "mount": target.mount.as_ref().map(|mount| show(&mount.dir)),
        "state": scrub_state_name(status.state),
        "clean": status.is_clean(),
        "verified": status.done,
        "total": status.total,
        "position": status.position,
        "resumed": status.resumed,
        "damaged_blocks": status.damaged_blocks,
        "damaged_files": status.files,
        "files": findings.files.iter().map(file).collect::<Vec<_>>(),
        "others": findings.others,
        "error": status.error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_sizes_a_second() {
        assert_eq!(parse_rate("64M"), Ok(64 << 20));
        assert_eq!(parse_rate(" 1.5G/s"), Ok(3 << 29));
        assert!(parse_rate("63K").unwrap_err().contains("at least 64K"));
        assert!(parse_rate("fast").is_err());
    }

    #[test]
    fn a_line_tells_how_it_stands() {
        let mut status = ScrubStatus {
            state: ScrubState::Stopped,
            done: 430,
            total: 1000,
            ..ScrubStatus::default()
        };
        assert_eq!(status_line(&status), "interrupted at 43%, no damage so far");
        status.files = 2;
        status.damaged_blocks = 1;
        assert_eq!(
            status_line(&status),
            "interrupted at 43%, 2 files, 1 data block so far"
        );
        assert_eq!(status_line(&ScrubStatus::default()), "never");
    }
}
