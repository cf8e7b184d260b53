//! The daemon's end of the control channel: who may do what, and the tokens that name sources.
//!
//! Invariants:
//! 1. A token works for the user who got it, for a minute, and was got by who could read the file.
//! 2. A clone is made only where its maker could have made a copy: readable source, writable
//!    directory.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::control::{
    Compare, EXTENTS_MAX, Info, Look, RUNS_MAX, Request, Response, SUMS_MAX, Shares, Token,
    clone_names,
};
use crate::engine::{Attr, FileKind, Share};
use crate::error::{Error, Kind, Result};
use crate::sys;
use crate::units::Ino;
use crate::vfs::{Access, Caller, HandleId, Vfs};

use super::scrub::Scrubber;

/// How long a token works.
const TOKEN_AGE_MAX: Duration = Duration::from_secs(60);

/// Tokens of one user: beyond, the oldest goes.
const TOKENS_PER_USER_MAX: usize = 256;

/// Tokens of all users.
const TOKENS_MAX: usize = 16 * 1024;

/// Entries of a directory tree that a user other than root clones at once: each is looked at.
const TREE_ENTRIES_MAX: usize = 100_000;

/// Set-group-id bit of a mode: in such a directory, entries get its group.
const MODE_SETGID: u32 = 0o2000;

/// Answers requests of the control channel.
#[derive(Debug)]
pub(super) struct Server {
    vfs: Arc<Vfs>,
    pool: String,
    /// Percent of use at which the daemon warns, ascending.
    marks: Vec<u8>,
    tokens: Mutex<Tokens>,
    scrubber: Arc<Scrubber>,
}

impl Server {
    /// For the pool at path `pool`, in which there are warnings at `marks` percent of use.
    pub(super) fn new(
        vfs: Arc<Vfs>,
        pool: String,
        marks: Vec<u8>,
        scrubber: Arc<Scrubber>,
    ) -> Self {
        Self {
            vfs,
            pool,
            marks,
            scrubber,
            tokens: Mutex::default(),
        }
    }

    /// Answers `request`, made on the open file or directory `ino`.
    pub(super) fn answer(
        &self,
        caller: &Caller,
        handle: HandleId,
        ino: Ino,
        request: &Request,
    ) -> Result<Response> {
        match request {
            Request::Info => Ok(self.info()),
            Request::Token => self.token(caller, handle, ino),
            Request::Clone {
                source,
                name,
                count,
                preserve,
            } => {
                let names = clone_names(name, *count)?;
                self.clone(caller, *source, ino, &names, *preserve)
            }
            Request::Usage => self.vfs.file_usage(ino).map(Response::Usage),
            Request::Checkpoint => {
                check_owner(caller)?; // each one costs everybody a wait
                self.vfs.checkpoint().map(|()| Response::Done)
            }
            Request::ScrubStart { rate, restart } => {
                check_owner(caller)?;
                let status = self.scrubber.start(*rate, *restart)?;
                Ok(Response::Scrub(Box::new(status)))
            }
            Request::ScrubStop => {
                check_owner(caller)?;
                let status = self.scrubber.stop()?;
                Ok(Response::Scrub(Box::new(status)))
            }
            Request::ScrubStatus => {
                let status = self.scrubber.status()?;
                Ok(Response::Scrub(Box::new(status)))
            }
            Request::ScrubFindings(page) => {
                check_owner(caller)?; // paths that not everybody may see
                Ok(Response::ScrubFindings(self.scrubber.findings(*page)))
            }
            Request::Share { source, ranges } => {
                let src = match source {
                    Some(token) => self.granted(caller, *token)?,
                    None => ino,
                };
                let ranges: Vec<Share> = ranges.iter().flat_map(Shares::each).collect();
                self.vfs.share(caller, src, (handle, ino), &ranges)?;
                Ok(Response::Done)
            }
            Request::Extents(look) => self.extents(caller, handle, ino, look),
            Request::Places { from, to, sums } => {
                self.check_readable(handle, ino)?;
                let sums_max = sums.then_some(SUMS_MAX);
                let pool = self.vfs.pool();
                let places = pool.places(ino, (*from, *to), RUNS_MAX, sums_max)?;
                Ok(Response::Places(places))
            }
            Request::ShareEqual(compare) => self.share_equal(caller, handle, ino, compare),
            Request::Grow { size } => self.grow(caller, *size),
        }
    }

    fn info(&self) -> Response {
        let pool = self.vfs.pool();
        let facts = pool.info();
        Response::Info(Box::new(Info {
            pid: std::process::id(),
            pool: self.pool.clone(),
            uuid: facts.uuid,
            version: facts.version,
            poisoned: pool.poisoned(),
            health: pool.health(),
            host_full: pool.is_host_full(),
            marks: self.marks.clone(),
            usage: pool.usage(),
        }))
    }

    fn grow(&self, caller: &Caller, size: Option<u64>) -> Result<Response> {
        if !caller.is_root() && caller.uid != sys::process::effective_owner().0 {
            return Err(Error::new(
                Kind::NotPermitted,
                "only root and the user who mounted the pool make it larger",
            ));
        }
        self.vfs.pool().grow(size).map(Response::Grown)
    }

    fn token(&self, caller: &Caller, handle: HandleId, ino: Ino) -> Result<Response> {
        if !self.vfs.handle_flags(handle, ino).read {
            return Err(Error::new(
                Kind::Denied,
                "the source is not open for reading: open it so",
            ));
        }
        let token = sys::control::random()
            .map(Token)
            .map_err(|error| Error::io("no random numbers from the system", error))?;
        let grant = Grant {
            ino,
            uid: caller.uid,
            given: Instant::now(),
        };
        self.tokens.lock().insert(token, grant);
        Ok(Response::Token(token))
    }

    /// What a token stands for.
    fn granted(&self, caller: &Caller, token: Token) -> Result<Ino> {
        self.tokens.lock().ino(token, caller.uid).ok_or_else(|| {
            Error::new(
                Kind::Denied,
                "the token of the source is not known, or older than a minute: get a new one",
            )
        })
    }

    fn check_readable(&self, handle: HandleId, ino: Ino) -> Result<()> {
        if self.vfs.handle_flags(handle, ino).read {
            return Ok(());
        }
        Err(Error::new(
            Kind::Denied,
            "the file is not open for reading: open it so",
        ))
    }

    /// Who learns what is equal could read both files.
    fn share_equal(
        &self,
        caller: &Caller,
        handle: HandleId,
        ino: Ino,
        compare: &Compare,
    ) -> Result<Response> {
        self.check_readable(handle, ino)?;
        let src = match compare.source {
            Some(token) => self.granted(caller, token)?,
            None => ino,
        };
        let equal = self
            .vfs
            .share_equal(src, (handle, ino), &compare.range, compare.dry)?;
        Ok(Response::Equal(equal))
    }

    fn extents(
        &self,
        caller: &Caller,
        handle: HandleId,
        ino: Ino,
        look: &Look,
    ) -> Result<Response> {
        self.check_readable(handle, ino)?;
        let pool = self.vfs.pool();
        let extents = match look.other {
            None => pool.data_ranges(ino, look.from, look.to, EXTENTS_MAX),
            Some((token, from)) => {
                let other = self.granted(caller, token)?;
                let file = (ino, look.from, look.to);
                pool.differing_ranges(file, (other, from), EXTENTS_MAX)
            }
        };
        extents.map(Response::Extents)
    }

    fn clone(
        &self,
        caller: &Caller,
        source: Token,
        dir: Ino,
        names: &[Vec<u8>],
        preserve: bool,
    ) -> Result<Response> {
        let src = self.granted(caller, source)?;
        let into = self.vfs.attr(dir)?;
        if into.kind != FileKind::Directory {
            return Err(Error::new(
                Kind::NotDirectory,
                "clones are made in a directory: make the request on one",
            ));
        }
        if !caller.may(Access::Enter, &into) {
            return Err(Error::new(
                Kind::Denied,
                "the directory is not writable for the caller",
            ));
        }
        if preserve && !caller.is_root() {
            return Err(Error::new(
                Kind::NotPermitted,
                "only root keeps the owner of what it clones",
            ));
        }
        let seen = if caller.is_root() {
            None
        } else {
            Some(self.check_tree(caller, src)?)
        };
        // Others may put something into the tree behind the check: it is not cloned.
        let allows = |attr: &Attr| match &seen {
            Some(seen) if seen.get(&attr.ino) != Some(&rights(attr)) => Err(Error::new(
                Kind::Busy,
                "the directory was changed while it was looked at: try again",
            )),
            _ => Ok(()),
        };
        let gid = if into.mode & MODE_SETGID != 0 {
            into.gid
        } else {
            caller.gid
        };
        let owner = (!preserve).then_some((caller.uid, gid));
        self.vfs.clone_tree(src, dir, names, owner, &allows)?;
        Ok(Response::Clones(u32::try_from(names.len()).map_err(
            |_| Error::new(Kind::TooLarge, "more clones than can be counted"),
        )?))
    }

    /// Refuses a source with anything in it that `caller` could not copy: what he cannot read,
    /// device nodes, and files with capabilities, which as his own would give him rights.
    /// Returns what it has seen, with the rights of each.
    fn check_tree(&self, caller: &Caller, src: Ino) -> Result<HashMap<Ino, Rights>> {
        let mut passed = HashMap::new();
        let mut seen = 0;
        // A file was readable when it was opened; a directory perhaps only to be listed.
        let top = self.vfs.attr(src)?;
        if top.kind == FileKind::Directory && !caller.may(Access::List, &top) {
            return Err(Error::new(
                Kind::Denied,
                "what is in the directory is not readable for the caller",
            ));
        }
        self.check_entry(&top)?;
        passed.insert(src, rights(&top));
        let mut pending = vec![src];
        while let Some(dir) = pending.pop() {
            if self.vfs.attr(dir)?.kind != FileKind::Directory {
                continue;
            }
            let mut entries = Vec::new();
            self.vfs
                .read_dir(dir, crate::vfs::COOKIE_DOT_DOT, |entry| {
                    entries.push(entry.ino);
                    seen += 1;
                    seen <= TREE_ENTRIES_MAX
                })?;
            if seen > TREE_ENTRIES_MAX {
                return Err(Error::new(
                    Kind::TooLarge,
                    format!("the directory has over {TREE_ENTRIES_MAX} entries: let root clone it"),
                ));
            }
            for ino in entries {
                let attr = self.vfs.attr(ino)?;
                let access = match attr.kind {
                    FileKind::Directory => Access::List,
                    _ => Access::Read,
                };
                if attr.kind != FileKind::Symlink && !caller.may(access, &attr) {
                    return Err(Error::new(
                        Kind::Denied,
                        format!("something in the directory is not readable: inode={ino}"),
                    ));
                }
                self.check_entry(&attr)?;
                passed.insert(ino, rights(&attr));
                if attr.kind == FileKind::Directory {
                    pending.push(ino);
                }
            }
        }
        Ok(passed)
    }

    fn check_entry(&self, attr: &Attr) -> Result<()> {
        match attr.kind {
            FileKind::CharDevice | FileKind::BlockDevice => Err(Error::new(
                Kind::NotPermitted,
                format!("only root clones device nodes: inode={}", attr.ino),
            )),
            FileKind::Regular => match self.vfs.xattr(attr.ino, b"security.capability") {
                Err(error) if error.kind() == Kind::NoAttribute => Ok(()),
                Err(error) => Err(error),
                Ok(_) => Err(Error::new(
                    Kind::NotPermitted,
                    format!(
                        "only root clones files with capabilities: inode={}",
                        attr.ino
                    ),
                )),
            },
            _ => Ok(()),
        }
    }
}

/// Mode, owner and group of an inode.
type Rights = (u32, u32, u32);

fn rights(attr: &Attr) -> Rights {
    (attr.mode, attr.uid, attr.gid)
}

/// Lets pass who mounted the pool, and root.
fn check_owner(caller: &Caller) -> Result<()> {
    let (owner, _) = sys::process::effective_owner();
    if caller.is_root() || caller.uid == owner {
        return Ok(());
    }
    Err(Error::new(
        Kind::NotPermitted,
        "only root and the user who mounted the pool may do that",
    ))
}

/// What a token stands for.
#[derive(Debug)]
struct Grant {
    ino: Ino,
    uid: u32,
    given: Instant,
}

#[derive(Debug, Default)]
struct Tokens {
    grants: HashMap<Token, Grant>,
}

impl Tokens {
    fn insert(&mut self, token: Token, grant: Grant) {
        self.grants
            .retain(|_, grant| grant.given.elapsed() < TOKEN_AGE_MAX);
        let uid = grant.uid;
        if self.grants.values().filter(|old| old.uid == uid).count() >= TOKENS_PER_USER_MAX {
            self.drop_oldest(|old| old.uid == uid);
        }
        if self.grants.len() >= TOKENS_MAX {
            self.drop_oldest(|_| true);
        }
        self.grants.insert(token, grant);
    }

    fn ino(&self, token: Token, uid: u32) -> Option<Ino> {
        let grant = self.grants.get(&token)?;
        (grant.uid == uid && grant.given.elapsed() < TOKEN_AGE_MAX).then_some(grant.ino)
    }

    fn drop_oldest(&mut self, among: impl Fn(&Grant) -> bool) {
        let oldest = self
            .grants
            .iter()
            .filter(|(_, grant)| among(grant))
            .min_by_key(|(_, grant)| grant.given)
            .map(|(token, _)| *token);
        if let Some(oldest) = oldest {
            self.grants.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(number: u16) -> Token {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&number.to_le_bytes());
        Token(bytes)
    }

    fn grant(uid: u32) -> Grant {
        Grant {
            ino: Ino(5),
            uid,
            given: Instant::now(),
        }
    }

    #[test]
    fn a_token_is_of_use_to_its_user_only() {
        let mut tokens = Tokens::default();
        tokens.insert(token(1), grant(1000));
        assert_eq!(tokens.ino(token(1), 1000), Some(Ino(5)));
        assert_eq!(tokens.ino(token(1), 1001), None);
        assert_eq!(tokens.ino(token(2), 1000), None);
    }

    #[test]
    fn one_user_cannot_push_out_the_tokens_of_another() {
        let mut tokens = Tokens::default();
        tokens.insert(token(0), grant(1));
        for number in 1..2000 {
            tokens.insert(token(number), grant(2));
        }
        assert_eq!(tokens.ino(token(0), 1), Some(Ino(5)));
        assert_eq!(tokens.ino(token(1), 2), None);
        assert_eq!(tokens.ino(token(1999), 2), Some(Ino(5)));
        assert_eq!(tokens.grants.len(), TOKENS_PER_USER_MAX + 1);
    }

    #[test]
    fn an_old_token_is_of_no_use() {
        let mut tokens = Tokens::default();
        let Some(given) = Instant::now().checked_sub(TOKEN_AGE_MAX) else {
            eprintln!("skipped: the machine started less than a minute ago");
            return;
        };
        tokens.insert(token(1), Grant { given, ..grant(1) });
        assert_eq!(tokens.ino(token(1), 1), None);
    }
}
