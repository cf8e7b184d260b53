//! Questions to the daemon of a mounted pool, over its control channel.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;

use nodupe::control::{self, Info, Request, Response, ScrubFindings, ScrubPage};
use nodupe::engine::{FileUsage, ScrubStatus};
use nodupe::error::{Error, Kind};

use super::failure::{Failure, Result};
use super::mounts;
use super::output::show;
use super::target;

/// What the daemon that serves `dir` says of itself and its pool.
pub(super) fn daemon(dir: &Path) -> Result<Info> {
    match ask(dir, &open(dir)?, &Request::Info)? {
        Response::Info(info) => Ok(*info),
        _ => Err(nonsense(dir)),
    }
}

/// What one file in a mount uses.
pub(super) fn file_usage(path: &Path) -> Result<FileUsage> {
    match ask(path, &open(path)?, &Request::Usage)? {
        Response::Usage(usage) => Ok(usage),
        _ => Err(nonsense(path)),
    }
}

/// Clones `src` into the directory `dir` of the same mount: `name`, or with a count as many
/// names with a number. Errors of the daemon come back as they are.
pub(super) fn clone(
    src: &Path,
    dir: &Path,
    name: &str,
    count: Option<u32>,
    preserve: bool,
) -> Result<std::result::Result<(), Error>> {
    let (source, into) = (open(src)?, open(dir)?);
    let Response::Token(source) = ask(src, &source, &Request::Token)? else {
        return Err(nonsense(src));
    };
    let request = Request::Clone {
        source,
        name: name.to_owned(),
        count,
        preserve,
    };
    Ok(control::call(into.as_fd(), &request).map(drop))
}

/// Makes a request about the scrub of the pool mounted on `dir`, and tells how it stands.
pub(super) fn scrub(dir: &Path, request: &Request) -> Result<ScrubStatus> {
    match ask(dir, &open(dir)?, request)? {
        Response::Scrub(status) => Ok(*status),
        _ => Err(nonsense(dir)),
    }
}

/// A page of what the scrub of the pool mounted on `dir` has found.
pub(super) fn scrub_findings(dir: &Path, page: ScrubPage) -> Result<ScrubFindings> {
    match ask(dir, &open(dir)?, &Request::ScrubFindings(page))? {
        Response::ScrubFindings(findings) => Ok(findings),
        _ => Err(nonsense(dir)),
    }
}

/// Makes the pool mounted on `dir` larger; `None`: as large as its device. Returns its size, or
/// the error of the daemon as it is.
pub(super) fn grow(dir: &Path, size: Option<u64>) -> Result<std::result::Result<u64, Error>> {
    match control::call(open(dir)?.as_fd(), &Request::Grow { size }) {
        Ok(Response::Grown(size)) => Ok(Ok(size)),
        Ok(_) => Err(nonsense(dir)),
        Err(error) => Ok(Err(error)),
    }
}

/// Opens a file or directory; nothing that could make the open wait.
fn open(path: &Path) -> Result<File> {
    let failed = |error: std::io::Error| match mounts::is_dead(&error) {
        true => target::dead(path),
        false => Failure::new(format!("cannot open {}", show(path))).because(&error),
    };
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() && !metadata.is_dir() {
        return Err(Failure::new(format!("cannot use {}", show(path)))
            .why("it is neither a file nor a directory"));
    }
    File::open(path).map_err(failed)
}

fn ask(path: &Path, file: &File, request: &Request) -> Result<Response> {
    control::call(file.as_fd(), request).map_err(|error| {
        let failure =
            Failure::new(format!("no answer from the pool of {}", show(path))).because(&error);
        match error.kind() {
            Kind::Unsupported => failure,
            _ => failure.hint("see the log of its nodupe process, and dmesg"),
        }
    })
}

fn nonsense(path: &Path) -> Failure {
    Failure::new(format!(
        "the process that serves {} answers nonsense",
        show(path)
    ))
    .hint("use the same version of nodupe for the mount and for this command")
}
