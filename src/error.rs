//! The one error type of the engine: what happened, where, and what the caller can do about it.
//!
//! A [`Kind`] exists only where a caller acts differently on it. The message is a lowercase fact
//! followed by `key=value` pairs; it never repeats its source, because whoever prints an error
//! walks the chain.

use std::fmt;
use std::io;

/// Result of every fallible operation of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// The named thing does not exist: fix the request.
    NotFound,
    /// The name is taken: choose another.
    Exists,
    /// The request makes no sense: fix it.
    Invalid,
    /// A file, name or value is over a limit: make it smaller.
    TooLarge,
    /// A name is longer than a directory entry can hold.
    NameTooLong,
    /// A directory was needed and something else was found.
    NotDirectory,
    /// A directory was found where a file was needed.
    IsDirectory,
    /// The directory still has entries.
    NotEmpty,
    /// The operation is not permitted on this kind of object, or to this caller.
    NotPermitted,
    /// The caller lacks the right to do this.
    Denied,
    /// The file has as many hard links as it can have.
    TooManyLinks,
    /// The extended attribute does not exist.
    NoAttribute,
    /// The buffer is too small for the value.
    Range,
    /// The offset lies beyond the last data or hole of the file.
    NoSuchOffset,
    /// This program does not do that.
    Unsupported,
    /// Somebody else uses the pool: wait or unmount.
    Busy,
    /// The pool (or the host under it) is full: delete something or grow it.
    NoSpace,
    /// The pool was opened read-only: mount it writable.
    ReadOnly,
    /// Bytes on the device are not what was written: run `check`, restore.
    Corrupt,
    /// The device failed: look at it.
    Io,
    /// A write or sync failed earlier, so the state of the device is unknown: fix it, mount again.
    Poisoned,
}

/// An error: kind, message, and the operating system's error where there is one.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    message: String,
    source: Option<io::Error>,
}

impl Error {
    /// A new error of `kind`; `message` is a lowercase fact with `key=value` details.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
        }
    }

    /// An error of the device or the host, with its cause.
    pub fn io(message: impl Into<String>, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::NoSpace,
            io::ErrorKind::NotFound => Kind::NotFound,
            io::ErrorKind::PermissionDenied => Kind::Denied,
            _ => Kind::Io,
        };
        Self {
            kind,
            message: message.into(),
            source: Some(source),
        }
    }

    /// Bytes on the device that are not what was written there.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(Kind::Corrupt, message)
    }

    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The same error again, for each of several waiters.
    pub(crate) fn duplicate(&self) -> Self {
        let message = match &self.source {
            Some(source) => format!("{}: {source}", self.message),
            None => self.message.clone(),
        };
        Self {
            kind: self.kind,
            message,
            source: None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}
