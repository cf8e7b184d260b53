//! `nodupe check`: verifies all structures of a pool that is not mounted.

use std::path::PathBuf;

use clap::Args;
use nodupe::device::OpenMode;
use nodupe::engine::{Finding, Pool};
use serde_json::json;

use super::access;
use super::failure::{Failure, Result};
use super::output::{Output, show};

const EXAMPLE: &str = "\
Exit codes:
  0  clean
  1  something is damaged, or the check could not run
  2  the command line is wrong

Examples:
  nodupe check ./pool.nodupe
  nodupe check --json /dev/sdb1 | jq '.findings[].message'";

/// Verifies all structures of a pool that is not mounted.
///
/// Reads only: nothing is repaired or changed.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Check {
    /// Pool: a file or block device
    pool: PathBuf,
    /// Device of the journal, if it is not in the pool
    #[arg(long, value_name = "DEVICE")]
    journal: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Check, output: Output) -> Result<()> {
    let name = show(&args.pool);
    let devices = access::open_devices(&args.pool, args.journal.as_deref(), OpenMode::ReadOnly)?;
    let bar = output.progress("checking", 0, false);
    let mut progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let result = Pool::check(
        devices.pool.as_ref(),
        devices.journal.as_deref(),
        &mut progress,
    );
    bar.finish_and_clear();
    let findings =
        result.map_err(|error| Failure::of_pool(format!("cannot check {name}"), &name, &error))?;
    if args.json {
        let list: Vec<_> = findings
            .iter()
            .map(|finding| json!({ "code": finding.code, "message": finding.message }))
            .collect();
        output.json(json!({
            "pool": name,
            "clean": findings.is_empty(),
            "findings": list,
        }));
    } else if findings.is_empty() {
        output.done(&format!("{name} is clean"));
    } else {
        output.data(&findings.iter().map(line).collect::<String>());
    }
    match findings.len() {
        0 => Ok(()),
        1 => Err(damaged(&name, "1 finding")),
        count => Err(damaged(&name, &format!("{count} findings"))),
    }
}

fn line(finding: &Finding) -> String {
    format!("E{:04} {}\n", finding.code, finding.message)
}

fn damaged(name: &str, count: &str) -> Failure {
    Failure::new(format!("{name} is damaged: {count}"))
        .hint("copy off what is needed from a read-only mount: nodupe mount --read-only POOL DIR")
        .hint("what each code means is in docs/check.md")
}
