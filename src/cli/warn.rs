//! Early warnings: the daemon looks every few seconds how full its pool is, and the host below it,
//! and says so once when a mark is crossed.
//!
//! 1. A mark is crossed upwards once; again only after use fell two percent below it.
//! 2. The hook runs without a shell, one at a time, and nothing waits for it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use nodupe::engine::{Pool, Usage};

use super::output::show;
use super::size::human;

/// Percent of use at which there are warnings unless told otherwise.
pub(super) const MARKS_DEFAULT: [u8; 3] = [80, 90, 95];
/// How far use must fall below a mark before it counts as crossed again, in percent.
const SLACK: u64 = 2;
/// How often the daemon looks.
const INTERVAL: Duration = Duration::from_secs(2);
/// Bytes below which a pool, or the host under it, is full: what creating a file asks for.
const FULL_BELOW: u64 = 64 * 1024; // 64 KiB

/// Parses `80,90,95` or `80:90:95`; `off` is no mark at all.
pub(super) fn parse_marks(text: &str) -> Result<Vec<u8>, String> {
    if text == "off" {
        return Ok(Vec::new());
    }
    let mark = |word: &str| match word.trim().parse() {
        Ok(percent @ 1..=100) => Ok(percent),
        _ => Err(format!(
            "'{word}' is no percent: give numbers from 1 to 100, as in 80,90,95, or off"
        )),
    };
    let mut marks: Vec<u8> = text.split([',', ':']).map(mark).collect::<Result<_, _>>()?;
    marks.sort_unstable();
    marks.dedup();
    Ok(marks)
}

/// Used of what users can use, rounded up as df does.
pub(super) fn percent_used(usage: &Usage) -> Option<u64> {
    let all = u128::from(usage.used) + u128::from(usage.available);
    (all > 0)
        .then(|| (u128::from(usage.used) * 100).div_ceil(all))
        .and_then(|percent| u64::try_from(percent).ok())
}

/// How full a pool is, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Ok,
    /// A mark is crossed.
    Warning,
    /// The host could not hold what the pool promises.
    HostShort,
    /// Writes fail for want of space on the host.
    HostFull,
    /// Writes fail for want of space in the pool.
    Full,
}

impl State {
    /// The state of a pool with warnings at `marks`. `host_full`: the host refused the last write.
    ///
    /// A host with next to nothing left is full as well: it may have taken one block more since it
    /// refused the last large write.
    pub(super) fn of(usage: &Usage, marks: &[u8], host_full: bool) -> Self {
        let percent = percent_used(usage).unwrap_or(0);
        let host = usage.host_available.unwrap_or(u64::MAX);
        if host_full || host < FULL_BELOW.min(usage.available) {
            return State::HostFull;
        }
        if usage.available < FULL_BELOW {
            return State::Full;
        }
        if marks
            .first()
            .is_some_and(|mark| percent >= u64::from(*mark))
        {
            return State::Warning;
        }
        match usage.host_available {
            Some(host) if host < usage.available => State::HostShort,
            _ => State::Ok,
        }
    }

    /// One word for tables and JSON.
    pub(super) fn word(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Warning | State::HostShort => "warning",
            State::HostFull | State::Full => "full",
        }
    }

    /// What it means for the pool `pool`, and what to do; `None` if all is well.
    pub(super) fn advice(self, pool: &Path, usage: &Usage) -> Option<String> {
        let name = show(pool);
        let grow = format!("nodupe grow {name} +SIZE");
        let (left, host) = (
            human(usage.available),
            human(usage.host_available.unwrap_or(0)),
        );
        match self {
            State::Ok => None,
            State::Warning => Some(format!(
                "{name} is filling up, {left} are left: delete files, or make it larger: {grow}"
            )),
            State::Full => Some(format!(
                "{name} is full, writes fail: delete files, or make it larger: {grow}"
            )),
            State::HostShort => Some(format!(
                "{name} has {left} left, but the filesystem that holds it only {host}: free space \
                 there, before writes fail"
            )),
            State::HostFull => Some(format!(
                "the filesystem that holds {name} is full, writes fail: free space there, or \
                 delete files in the pool"
            )),
        }
    }
}

/// Which marks are crossed.
#[derive(Debug)]
struct Marks {
    /// Ascending.
    marks: Vec<u8>,
    /// The first so many are crossed.
    crossed: usize,
}

impl Marks {
    /// Takes note of a use of `percent`; the mark if one was just crossed upwards, the highest of
    /// several.
    fn observe(&mut self, percent: u64) -> Option<u8> {
        let before = self.crossed;
        while let Some(mark) = self.marks.get(self.crossed)
            && percent >= u64::from(*mark)
        {
            self.crossed += 1;
        }
        while self.crossed > 0 && percent + SLACK <= u64::from(self.marks[self.crossed - 1]) {
            self.crossed -= 1;
        }
        (self.crossed > before).then(|| self.marks[self.crossed - 1])
    }

    fn is_top(&self, mark: u8) -> bool {
        self.marks.last() == Some(&mark)
    }
}

/// Watches a pool for as long as it is open.
#[derive(Debug)]
pub(super) struct Watch {
    pool: Weak<Pool>,
    path: PathBuf,
    dir: PathBuf,
    marks: Marks,
    /// The host is known to be short.
    host_short: bool,
    hook: Option<PathBuf>,
    running: Option<Child>,
}

impl Watch {
    /// Starts to watch `pool`, whose path is `path`, mounted on `dir`. `hook`: a program to run at
    /// each warning.
    pub(super) fn start(
        pool: &Arc<Pool>,
        path: &Path,
        dir: &Path,
        marks: &[u8],
        hook: Option<PathBuf>,
    ) -> std::io::Result<()> {
        let mut watch = Self {
            pool: Arc::downgrade(pool),
            path: path.to_path_buf(),
            dir: dir.to_path_buf(),
            marks: Marks {
                marks: marks.to_vec(),
                crossed: 0,
            },
            host_short: false,
            hook,
            running: None,
        };
        thread::Builder::new()
            .name("nodupe-watch".into())
            .spawn(move || {
                while watch.look() {
                    thread::sleep(INTERVAL);
                }
            })
            .map(drop)
    }

    /// False once the pool has gone.
    fn look(&mut self) -> bool {
        let Some(pool) = self.pool.upgrade() else {
            return false;
        };
        let usage = pool.usage();
        drop(pool);
        let percent = percent_used(&usage).unwrap_or(0);
        if let Some(mark) = self.marks.observe(percent) {
            let advice = State::of(&usage, &[mark], false).advice(&self.path, &usage);
            let text = format!("{percent}% used: {}", advice.unwrap_or_default());
            if self.marks.is_top(mark) {
                log::error!("{text}");
            } else {
                log::warn!("{text}");
            }
            let state = if self.marks.is_top(mark) {
                "critical"
            } else {
                "warning"
            };
            self.run_hook(state, percent, Some(mark));
        }
        let was_short = self.host_short;
        self.host_short = match usage.host_available {
            None => false,
            // Again only after there was some room: both numbers move all the time.
            Some(host) if was_short => host < usage.available / 100 * (100 + SLACK),
            Some(host) => host < usage.available,
        };
        if self.host_short && !was_short {
            let advice = State::HostShort.advice(&self.path, &usage);
            log::warn!("{}", advice.unwrap_or_default());
            self.run_hook("host", percent, None);
        }
        true
    }

    /// Runs the hook, unless the last one is still at work.
    fn run_hook(&mut self, state: &str, percent: u64, mark: Option<u8>) {
        let Some(hook) = &self.hook else {
            return;
        };
        if let Some(child) = &mut self.running
            && matches!(child.try_wait(), Ok(None))
        {
            log::warn!("{} is still at work: not run again", show(hook));
            return;
        }
        let started = Command::new(hook)
            .env("NODUPE_POOL", &self.path)
            .env("NODUPE_MOUNT", &self.dir)
            .env("NODUPE_STATE", state)
            .env("NODUPE_PERCENT", percent.to_string())
            .env(
                "NODUPE_MARK",
                mark.map(|mark| mark.to_string()).unwrap_or_default(),
            )
            .stdin(Stdio::null())
            .spawn();
        match started {
            Ok(child) => self.running = Some(child),
            Err(error) => log::warn!("cannot run {}: {error}", show(hook)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(used: u64, available: u64) -> Usage {
        Usage {
            used,
            available,
            ..Usage::default()
        }
    }

    #[test]
    fn percent_is_rounded_up_and_never_divides_by_zero() {
        assert_eq!(percent_used(&usage(0, 0)), None);
        assert_eq!(percent_used(&usage(1, 999)), Some(1));
        assert_eq!(percent_used(&usage(u64::MAX, u64::MAX)), Some(50));
    }

    #[test]
    fn a_mark_is_told_once_and_again_after_use_fell() {
        let mut marks = Marks {
            marks: vec![80, 90],
            crossed: 0,
        };
        let seen = [
            70, 79, 80, 81, 79, 80, 78, 80, 95, 91, 89, 90, 88, 90, 10, 100,
        ];
        let told: Vec<(u64, u8)> = seen
            .into_iter()
            .filter_map(|percent| marks.observe(percent).map(|mark| (percent, mark)))
            .collect();
        let expect = [(80, 80), (80, 80), (95, 90), (90, 90), (100, 90)];
        assert_eq!(told, expect);
    }

    #[test]
    fn lists_of_marks_are_read() {
        assert_eq!(parse_marks("95,80,90,90"), Ok(vec![80, 90, 95]));
        assert_eq!(parse_marks("80:90"), Ok(vec![80, 90]));
        assert_eq!(parse_marks("off"), Ok(vec![]));
        for text in ["", "0", "101", "80,,90", "high", "80%"] {
            assert!(parse_marks(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_worst_is_told() {
        const MIB: u64 = 1024 * 1024;
        let of = |used, available, host| {
            let host_available = host;
            let usage = Usage {
                host_available,
                ..usage(used * MIB, available * MIB)
            };
            State::of(&usage, &MARKS_DEFAULT, false)
        };
        assert_eq!(of(10, 90, None), State::Ok);
        assert_eq!(of(10, 90, Some(90 * MIB)), State::Ok);
        assert_eq!(of(10, 90, Some(MIB)), State::HostShort);
        assert_eq!(of(10, 90, Some(FULL_BELOW - 1)), State::HostFull);
        assert_eq!(of(100, 0, Some(0)), State::Full);
        assert_eq!(of(80, 20, Some(MIB)), State::Warning);
        assert_eq!(of(100, 0, None), State::Full);
        assert_eq!(State::of(&usage(0, 1), &[], true), State::HostFull);
    }
}
