//! `nodupe umount`: unmounts a pool, and returns once everything is durable and the daemon gone.

use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use nodupe::sys::process::{self, Process};

use super::access;
use super::client;
use super::failure::{Failure, Result};
use super::mounts::{self, Mount};
use super::output::{Output, clean, show};

const EXAMPLE: &str = "\
Examples:
  nodupe umount /srv/vms";

/// After this long a waiting user is told why.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long each further wait is.
const WAIT_STEP: Duration = Duration::from_secs(60 * 60); // 1 h: there is no limit

/// For this long a busy mount is tried again: whoever passes by (df, a monitor, a scan of all
/// mounts) holds it for a moment only.
const BUSY_MAX: Duration = Duration::from_secs(1);
const BUSY_STEP: Duration = Duration::from_millis(20);

/// Most processes named as users of a busy mount.
const USERS_SHOWN_MAX: usize = 5;

/// Unmounts a pool.
///
/// Returns once everything is durable and the daemon has gone: the pool can be mounted elsewhere,
/// checked or copied at once.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Umount {
    /// Directory that the pool is mounted on
    dir: PathBuf,
}

pub(super) fn run(args: &Umount, output: Output) -> Result<()> {
    let name = show(&args.dir);
    let dir = mounts::resolve(&args.dir)
        .map_err(|error| Failure::new(format!("cannot unmount {name}")).because(&error))?;
    let mount = mounts::on(&dir)?.filter(Mount::is_ours).ok_or_else(|| {
        Failure::new(format!("cannot unmount {name}"))
            .why("no nodupe pool is mounted on it")
            .hint("see what is mounted: nodupe df")
    })?;
    if is_dead(&dir) {
        detach_dead(&dir, output)?;
        return Ok(());
    }
    // Held before the mount goes: afterwards nobody answers for the daemon.
    let daemon = client::daemon(&dir)?;
    let pid = daemon.pid;
    let daemon = Process::open(pid).map_err(|error| {
        Failure::new(format!("cannot watch process {pid} of {name}")).because(&error)
    })?;
    unmount(&dir).map_err(|error| failed(&mount, &error))?;
    wait(&daemon, output)?;
    check_closed(&mount)
}

fn unmount(dir: &Path) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match process::unmount(dir, false) {
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy && start.elapsed() < BUSY_MAX =>
            {
                thread::sleep(BUSY_STEP);
            }
            result => return result,
        }
    }
}

/// True if nobody serves the mount on `dir` any more. Asks for what the kernel does not remember:
/// attributes of a dead mount may still be had.
pub(super) fn is_dead(dir: &Path) -> bool {
    let answer = dir.metadata().and_then(|_| dir.read_dir()).map(drop);
    answer.is_err_and(|error| mounts::is_dead(&error))
}

/// Takes away a mount whose daemon has gone.
pub(super) fn detach_dead(dir: &Path, output: Output) -> Result<()> {
    let name = show(dir);
    process::unmount(dir, true).map_err(|error| {
        Failure::new(format!(
            "cannot clear {name}, whose nodupe process has ended"
        ))
        .because(&error)
        .hint(format!("try again as root: umount -l {name}"))
    })?;
    output.note(&format!(
        "{name} was left behind by a nodupe process that has ended; it was cleared, and the next \
         mount of its pool replays the journal"
    ));
    Ok(())
}

fn failed(mount: &Mount, error: &io::Error) -> Failure {
    let name = show(&mount.dir);
    let failure = Failure::new(format!("cannot unmount {name}")).because(error);
    if error.kind() != io::ErrorKind::ResourceBusy {
        return failure.hint("try again as root, or as the user who mounted it");
    }
    let users = mounts::users(mount);
    let mut shown: Vec<String> = users
        .iter()
        .take(USERS_SHOWN_MAX)
        .map(|(pid, name)| format!("{} (process {pid})", clean(name)))
        .collect();
    if users.len() > shown.len() {
        shown.push(format!("{} more", users.len() - shown.len()));
    }
    match shown.is_empty() {
        true => failure.hint(format!(
            "somebody uses it: see who with fuser -vm {name}, as root; another filesystem may be \
             mounted below it"
        )),
        false => failure
            .why(format!("used by {}", shown.join(", ")))
            .hint("end these, or let them close its files, then try again"),
    }
}

fn wait(daemon: &Process, output: Output) -> Result<()> {
    let failed =
        |error: io::Error| Failure::new("cannot wait for the nodupe process").because(&error);
    if !daemon.wait_gone(PATIENCE).map_err(failed)? {
        output.note("waiting until all writes are in the pool");
        while !daemon.wait_gone(WAIT_STEP).map_err(failed)? {}
    }
    Ok(())
}

/// The superblock tells whether the daemon could close the pool.
fn check_closed(mount: &Mount) -> Result<()> {
    if mount.read_only || !access::can_hold_pool(&mount.source) {
        return Ok(());
    }
    let info = access::inspect_path(&mount.source)?;
    // Somebody may have mounted it again by now.
    if info.clean || mounts::of_pool(&mount.source)?.is_some() {
        return Ok(());
    }
    let pool = show(&mount.source);
    Err(Failure::new(format!("{pool} was not closed cleanly"))
        .why("its nodupe process failed while it closed the pool")
        .hint("its log says why; what was synced is in the journal, and the next mount replays it")
        .hint(format!(
            "see whether the pool is sound: nodupe check {pool}"
        )))
}
