//! Why a verb failed, in three parts: what, why, and what to do next.

use std::error::Error;

use nodupe::error::Kind;

use super::output::clean;

/// Result of every verb and its helpers.
pub(super) type Result<T> = std::result::Result<T, Failure>;

/// A failed verb. Built by the place that knows most, printed by `output`.
#[derive(Debug)]
pub(super) struct Failure {
    /// What failed, then each cause, outermost first.
    pub(super) chain: Vec<String>,
    /// What to do next, one command or sentence a line.
    pub(super) hints: Vec<String>,
    /// True if the command line was wrong: exit code 2 instead of 1.
    pub(super) usage: bool,
    /// Another exit code, of a verb that says more by it.
    pub(super) code: Option<u8>,
}

impl Failure {
    /// `what` failed.
    pub(super) fn new(what: impl Into<String>) -> Self {
        Self {
            chain: vec![what.into()],
            hints: Vec::new(),
            usage: false,
            code: None,
        }
    }

    /// The command line is wrong.
    pub(super) fn usage(what: impl Into<String>) -> Self {
        Self {
            usage: true,
            ..Self::new(what)
        }
    }

    /// Everything was told; only the exit code says more.
    pub(super) fn silent(code: u8) -> Self {
        Self {
            chain: Vec::new(),
            hints: Vec::new(),
            usage: false,
            code: Some(code),
        }
    }

    /// With this exit code.
    pub(super) fn exit_code(mut self, code: u8) -> Self {
        self.code = Some(code);
        self
    }

    /// Another process has told why already.
    #[cfg(feature = "fuse")]
    pub(super) fn told(usage: bool) -> Self {
        Self {
            chain: Vec::new(),
            hints: Vec::new(),
            usage,
            code: None,
        }
    }

    /// Adds an error and its sources to the chain.
    pub(super) fn because(mut self, error: &dyn Error) -> Self {
        let mut next = Some(error);
        while let Some(error) = next {
            // Names that others gave may be in it.
            self.chain.push(clean(&error.to_string()));
            next = error.source();
        }
        self
    }

    /// Adds a reason in words.
    pub(super) fn why(mut self, reason: impl Into<String>) -> Self {
        self.chain.push(reason.into());
        self
    }

    /// Adds what to do next.
    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// `what` failed on a pool, because of an error of the library, which says what to do next.
    pub(super) fn of_pool(
        what: impl Into<String>,
        pool: &str,
        error: &nodupe::error::Error,
    ) -> Self {
        let failure = Self::new(what).because(error);
        match hint_for(error.kind(), pool) {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

/// What a user can do about an error of this kind on `pool`.
fn hint_for(kind: Kind, pool: &str) -> Option<String> {
    Some(match kind {
        Kind::Busy => {
            "unmount it first (nodupe umount DIR), or end the process that uses it".into()
        }
        Kind::NoSpace => "free some space, or use a smaller --size or --journal-size".into(),
        Kind::Corrupt => format!("see what is damaged: nodupe check {pool}"),
        Kind::Denied => "try again as root, or as the owner".into(),
        Kind::Io => "look at the disk below it (dmesg), then try again".into(),
        Kind::Poisoned => {
            format!("unmount it, repair the disk below it, run nodupe check {pool}, mount it again")
        }
        Kind::ReadOnly => "mount it writable".into(),
        // The message itself says what to change.
        _ => return None,
    })
}
