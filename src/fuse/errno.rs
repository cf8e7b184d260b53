//! The one place where kinds of errors become numbers of the system, and where errors that are
//! not the caller's are logged.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuser::Errno;
use parking_lot::Mutex;

use crate::engine::Pool;
use crate::error::{Error, Kind};
use crate::units::Ino;

/// Messages per [`LOG_PERIOD`]: one failing disk must not fill another.
const LOG_MESSAGES_MAX: u32 = 20;

/// Period of the limit.
const LOG_PERIOD: Duration = Duration::from_secs(10);

/// The system's number for a kind of error.
pub(super) fn errno(kind: Kind) -> Errno {
    match kind {
        Kind::NotFound => Errno::ENOENT,
        Kind::Exists => Errno::EEXIST,
        Kind::Invalid => Errno::EINVAL,
        Kind::TooLarge => Errno::EFBIG,
        Kind::NameTooLong => Errno::ENAMETOOLONG,
        Kind::NotDirectory => Errno::ENOTDIR,
        Kind::IsDirectory => Errno::EISDIR,
        Kind::NotEmpty => Errno::ENOTEMPTY,
        Kind::NotPermitted => Errno::EPERM,
        Kind::Denied => Errno::EACCES,
        Kind::TooManyLinks => Errno::EMLINK,
        Kind::NoAttribute => Errno::ENODATA,
        Kind::Range => Errno::ERANGE,
        Kind::NoSuchOffset => Errno::ENXIO,
        Kind::Unsupported => Errno::EOPNOTSUPP,
        Kind::Busy => Errno::EBUSY,
        Kind::NoSpace => Errno::ENOSPC,
        Kind::ReadOnly => Errno::EROFS,
        Kind::Corrupt | Kind::Io | Kind::Poisoned => Errno::EIO,
    }
}

/// Logs what an errno does not tell: damage and failures of the pool.
#[derive(Debug, Default)]
pub(super) struct ErrorLog {
    /// To find the paths of what is damaged.
    pool: Option<Arc<Pool>>,
    period: Mutex<Period>,
}

#[derive(Debug, Default)]
struct Period {
    start: Option<Instant>,
    messages: u32,
    /// Paths found in this period: finding one may cost a pass over all names.
    paths: HashMap<u64, String>,
}

impl ErrorLog {
    /// Of what happens to files in `pool`.
    pub(super) fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool: Some(pool),
            ..Self::default()
        }
    }

    /// The errno to answer with. Damage and failures are logged, with the operation and the inode
    /// they met.
    pub(super) fn errno(&self, operation: &str, ino: u64, error: &Error) -> Errno {
        let kind = error.kind();
        match kind {
            Kind::Corrupt | Kind::Io if self.admit() => {
                let path = self.path(ino);
                log::error!("{operation} failed: {path}inode={ino}: {}", Chain(error));
            }
            Kind::Poisoned if self.admit() => {
                log::error!("{operation} failed: inode={ino}: {}", Chain(error));
            }
            Kind::Corrupt | Kind::Io | Kind::Poisoned => {}
            _ => log::debug!("{operation}: inode={ino}: {}", Chain(error)),
        }
        errno(kind)
    }

    /// `path=...` with a space behind it; nothing if the inode has none, or it cannot be found.
    fn path(&self, ino: u64) -> String {
        if let Some(path) = self.period.lock().paths.get(&ino) {
            return path.clone();
        }
        let paths = self.pool.as_ref().map(|pool| pool.paths(Ino(ino)));
        let path = match paths.unwrap_or_default().first() {
            Some(path) => format!("path={} ", String::from_utf8_lossy(path).escape_debug()),
            None => String::new(),
        };
        self.period.lock().paths.insert(ino, path.clone());
        path
    }

    fn admit(&self) -> bool {
        let mut period = self.period.lock();
        let now = Instant::now();
        let over = period
            .start
            .is_none_or(|start| now.duration_since(start) >= LOG_PERIOD);
        if over {
            let dropped = period.messages.saturating_sub(LOG_MESSAGES_MAX);
            if dropped > 0 {
                log::error!("{dropped} more errors were not logged");
            }
            *period = Period {
                start: Some(now),
                ..Period::default()
            };
        }
        period.messages = period.messages.saturating_add(1);
        period.messages <= LOG_MESSAGES_MAX
    }
}

/// An error with its causes, in one line.
struct Chain<'a>(&'a Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = std::error::Error::source(self.0);
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_errors_is_not_logged_whole() {
        let log = ErrorLog::default();
        let admitted = (0..1000).filter(|_| log.admit()).count();
        assert_eq!(admitted, LOG_MESSAGES_MAX as usize);
    }
}
