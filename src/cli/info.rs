//! `nodupe info`: the facts of a pool or a file.

use std::path::{Path, PathBuf};

use clap::Args;
use nodupe::control::health_value;
use nodupe::control::{Request, scrub_status_value};
use nodupe::engine::{FileUsage, Origin, PoolInfo, ScrubStatus};
use nodupe::units::Time;
use serde_json::{Value, json};

use super::client;
use super::failure::Result;
use super::output::{Output, list, show};
use super::scrub::status_line;
use super::size;
use super::target::{self, Facts, FileFacts, PoolFacts};

const EXAMPLE: &str = "\
Examples:
  nodupe info ./pool.nodupe
  nodupe info /srv/vms/vm-001.raw
  nodupe info --json ./pool.nodupe:/vm-001.raw";

/// Shows the facts of a pool, or of a file in one.
///
/// A pool is named by its file or device, mounted or not, or by the directory it is mounted on.
/// A file is named by its mounted path, or as POOL:/path if the pool is not mounted.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Info {
    /// Pool, mounted directory or file
    #[arg(value_name = "POOL|DIR|FILE")]
    target: PathBuf,
    /// Device of the journal, if the pool is not mounted and its journal is not in it
    #[arg(long, value_name = "DEVICE")]
    journal: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Info, output: Output) -> Result<()> {
    let facts = target::facts(
        &args.target,
        args.journal.as_deref(),
        target::Want::Identity,
    )?;
    match (facts, args.json) {
        (Facts::Pool(facts), true) => output.json(pool_json(&facts)),
        (Facts::Pool(facts), false) => output.data(&pool_text(&facts)),
        (Facts::File(facts), true) => output.json(file_json(&facts)),
        (Facts::File(facts), false) => output.data(&file_text(&facts)),
    }
    Ok(())
}

/// How the last scrub of a mounted pool ended, if its daemon tells.
fn last_scrub(facts: &PoolFacts) -> Option<ScrubStatus> {
    let dir = facts.mount.as_deref()?;
    client::scrub(dir, &Request::ScrubStatus).ok()
}

fn pool_text(facts: &PoolFacts) -> String {
    let info = &facts.info;
    let mounted = match (&facts.mount, facts.pid) {
        (None, _) => "no".to_owned(),
        (Some(dir), None) => format!("on {}", show(dir)),
        (Some(dir), Some(pid)) => format!("on {} by process {pid}", show(dir)),
    };
    let place = if info.journal_external {
        "on its own device"
    } else {
        "in the pool"
    };
    let mut lines = vec![
        ("pool", show(&facts.pool)),
        ("mounted", mounted),
        ("uuid", uuid_text(&info.uuid)),
        ("format", info.version.to_string()),
        ("size", size::human(info.size)),
        (
            "journal",
            format!("{} {place}", size::human(info.journal_size)),
        ),
        ("created", time_text(info.created)),
        ("generation", info.generation.to_string()),
    ];
    if facts.mount.is_none() {
        let state = if info.clean {
            "closed cleanly"
        } else {
            "not closed cleanly: the next mount replays the journal"
        };
        lines.push(("state", state.to_owned()));
    }
    if let Some(scrub) = last_scrub(facts) {
        lines.push(("scrub", status_line(&scrub)));
    }
    if let Some(why) = &facts.poisoned {
        lines.push(("poisoned", why.clone()));
    }
    list(&lines)
}

fn pool_json(facts: &PoolFacts) -> Value {
    let mut value = facts_json(&facts.info);
    value["pool"] = json!(show(&facts.pool));
    value["mount"] = json!(facts.mount.as_deref().map(show));
    value["pid"] = json!(facts.pid);
    // While it is mounted there is nothing to tell.
    value["clean"] = json!(facts.mount.is_none().then_some(facts.info.clean));
    value["poisoned"] = json!(facts.poisoned);
    value["health"] = json!(facts.health.as_ref().map(health_value));
    value["scrub"] = json!(last_scrub(facts).as_ref().map(scrub_status_value));
    value
}

/// The fixed facts of a pool.
pub(super) fn facts_json(info: &PoolInfo) -> Value {
    json!({
        "uuid": uuid_text(&info.uuid),
        "format": info.version,
        "size": info.size,
        "journal_size": info.journal_size,
        "journal_external": info.journal_external,
        "generation": info.generation,
        "created": time_text(info.created),
    })
}

fn file_text(facts: &FileFacts) -> String {
    let FileUsage {
        size,
        mapped,
        exclusive,
        extents,
    } = facts.usage;
    let mut lines = vec![
        ("file", show(&facts.path)),
        ("size", size::human(size)),
        ("mapped", size::human(mapped)),
        ("exclusive", size::human(exclusive)),
        ("extents", extents.to_string()),
    ];
    if let Some(origin) = &facts.origin {
        lines.push(("origin", format!("inode {}", origin.ino)));
        lines.push(("cloned", time_text(origin.time)));
    }
    list(&lines)
}

fn file_json(facts: &FileFacts) -> Value {
    let mut value = usage_json(&facts.path, &facts.usage);
    if let Some(origin) = &facts.origin {
        value["origin"] = origin_json(origin);
    }
    value
}

/// What one file uses.
pub(super) fn usage_json(path: &Path, usage: &FileUsage) -> Value {
    json!({
        "file": show(path),
        "size": usage.size,
        "mapped": usage.mapped,
        "exclusive": usage.exclusive,
        "extents": usage.extents,
    })
}

fn origin_json(origin: &Origin) -> Value {
    json!({
        "ino": origin.ino.0,
        "generation": origin.generation,
        "time": time_text(origin.time),
    })
}

fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ]
    .join("-")
}

/// A time in UTC, as `2026-03-01T12:00:00Z`.
pub(super) fn time_text(time: Time) -> String {
    const DAY: i64 = 24 * 60 * 60;
    let (days, seconds) = (time.secs.div_euclid(DAY), time.secs.rem_euclid(DAY));
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let (year, month, day) = civil(days);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Year, month and day of a number of days since 1970-01-01, in the Gregorian calendar. Years
/// are counted from March here, so that the leap day is the last day of a year.
fn civil(days: i64) -> (i64, i64, i64) {
    const DAYS_PER_ERA: i64 = 400 * 365 + 97; // 400 years
    const MARCH_OF_YEAR_0: i64 = 719_468; // days from 0000-03-01 to 1970-01-01
    let days = days.saturating_add(MARCH_OF_YEAR_0);
    let (era, day) = (days.div_euclid(DAYS_PER_ERA), days.rem_euclid(DAYS_PER_ERA));
    // Takes the leap days out: one each 4 years, none each 100, one in 400.
    let year = (day - day / 1460 + day / 36_524 - day / (DAYS_PER_ERA - 1)) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153; // 153 days are any five months from March on
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: i64) -> String {
        time_text(Time { secs, nanos: 0 })
    }

    #[test]
    fn times_are_calendar_times() {
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(-1), "1969-12-31T23:59:59Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_709_251_199), "2024-02-29T23:59:59Z");
        assert_eq!(at(1_709_251_200), "2024-03-01T00:00:00Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    #[test]
    fn uuids_have_their_usual_form() {
        let uuid = std::array::from_fn(|index| u8::try_from(index).unwrap() * 17);
        assert_eq!(uuid_text(&uuid), "00112233-4455-6677-8899-aabbccddeeff");
    }
}
