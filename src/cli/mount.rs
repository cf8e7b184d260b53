//! `nodupe mount`: what is checked before a pool is served, and waiting until it is.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use nodupe::sys::process;

use super::access;
use super::create::{self, Shape};
use super::daemon::{self, Service};
use super::failure::{Failure, Result};
use super::mounts;
use super::options::{self, Words};
use super::output::{Output, show};
use super::size;
use super::umount;
use super::unnamed;
use super::warn::{self, MARKS_DEFAULT};

/// Bound of the caches unless told otherwise.
const CACHE_SIZE_DEFAULT: u64 = 1024 * 1024 * 1024; // 1 GiB

/// Longest wait for a process that is about to end, and how often it is looked at.
const DYING_MAX: Duration = Duration::from_secs(10);
const DYING_STEP: Duration = Duration::from_millis(10);

const EXAMPLE: &str = "\
Mount options (-o, separated by commas):
  allow_other         other users may use it: a hypervisor that runs as its own user needs this
  ro, rw              read-only, or not
  cache_size=SIZE     as --cache-size
  blocks=logical      st_blocks tells the size of a file, so that every cp clones (default)
  blocks=allocated    st_blocks tells what is mapped; cp 9.0 and 9.1 then copy sparse files
  threads=N           threads that serve requests
  read_ahead=SIZE     read ahead of guests that read in order at most so far (2M); 0 for not at all
  warn=80:90:95       as --warn-at
  noatime, exec, noexec, dev, nodev, suid, nosuid    as for mount(8); nodev,nosuid by default
  relatime, norelatime, diratime, nodiratime    taken; access times are not kept
  nonempty            mount even if the directory has something in it
  defaults, nofail, _netdev, user, users, auto, noauto, comment=, x-...    ignored

Examples:
  nodupe mount ./pool.nodupe ./datastore --create
  nodupe mount /dev/sdb1 /srv/vms --allow-other --cache-size 4G --log-file /var/log/nodupe.log";

/// Mounts a pool.
///
/// Returns once the mount answers; a process in the background serves it.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Mount {
    /// Pool: a file or block device
    pool: PathBuf,
    /// Directory to mount it on
    dir: PathBuf,
    /// Make the pool and the directory if they are missing
    #[arg(long)]
    create: bool,
    #[command(flatten)]
    shape: Shape,
    /// Stay in the foreground; ends when the pool is unmounted
    #[arg(long)]
    foreground: bool,
    /// Bound of all caches together
    #[arg(long, value_name = "SIZE", value_parser = size::parse_cache_size)]
    cache_size: Option<u64>,
    /// Let other users use it, as permissions allow
    #[arg(long)]
    allow_other: bool,
    /// Mount read-only: nothing is written to the pool
    #[arg(long)]
    read_only: bool,
    /// Where the log goes once the mount answers; nowhere unless told (--foreground: standard
    /// error)
    #[arg(long, value_name = "PATH")]
    log_file: Option<PathBuf>,
    /// Percent of use at which the log warns, at the last one as an error; 80,90,95 unless told
    /// otherwise, or off
    #[arg(long, value_name = "PERCENTS")]
    warn_at: Option<String>,
    /// Program to run at each warning; NODUPE_STATE, NODUPE_PERCENT, NODUPE_MARK, NODUPE_POOL and
    /// NODUPE_MOUNT tell it why
    #[arg(long, value_name = "PROGRAM")]
    on_warning: Option<PathBuf>,
    /// Mount options, see below
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// Pipe on which the daemon tells that the mount answers
    #[arg(long, hide = true)]
    ready_fd: Option<i32>,
}

impl Mount {
    /// True if this process will serve the pool itself.
    pub(super) fn is_service(&self) -> bool {
        self.foreground || self.ready_fd.is_some()
    }

    /// True if a starting process waits for this one.
    pub(super) fn is_background(&self) -> bool {
        self.ready_fd.is_some()
    }
}

pub(super) fn run(args: &Mount, output: Output) -> Result<()> {
    let words = options::parse(&args.options)?;
    let read_only = args.read_only || words.read_only == Some(true);
    let shape = &args.shape;
    let is_shaped = shape.size.is_some() || shape.journal_size.is_some() || shape.preallocate;
    if !args.create && is_shaped {
        return Err(
            Failure::usage("--size, --journal-size and --preallocate are for a new pool")
                .hint("add --create"),
        );
    }
    if args.create && read_only {
        return Err(Failure::usage("--create and read-only exclude each other"));
    }
    let marks = match &args.warn_at {
        Some(text) => warn::parse_marks(text).map_err(Failure::usage)?,
        None => words.warn.clone().unwrap_or(MARKS_DEFAULT.to_vec()),
    };
    let words = Words {
        warn: Some(marks),
        ..words
    };
    if args.is_service() {
        serve(args, &words, read_only, output)
    } else {
        start(args)?;
        if !read_only {
            unnamed::prime(&args.dir);
        }
        Ok(())
    }
}

/// Starts this program again as the daemon and waits until the mount answers.
fn start(args: &Mount) -> Result<()> {
    let what = || format!("cannot mount {}", show(&args.pool));
    let failed = |error: io::Error| Failure::new(what()).because(&error);
    let (mut reader, writer) = io::pipe().map_err(failed)?;
    process::keep_on_exec(writer.as_fd()).map_err(failed)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("nodupe");
    // The flag goes right behind the verb, because there may be a "--" further on.
    let mut arguments = std::env::args_os().skip(1);
    for argument in arguments.by_ref() {
        let is_verb = argument == "mount";
        command.arg(argument);
        if is_verb {
            command
                .arg("--ready-fd")
                .arg(writer.as_raw_fd().to_string());
            break;
        }
    }
    let child = command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map_err(failed)?;
    // The daemon holds the only writing end now, so that its death ends the wait.
    drop(writer);
    let mut byte = [0];
    match reader.read(&mut byte).map_err(failed)? {
        0 => Err(ended(child, what())),
        _ => answers(args),
    }
}

/// Why a daemon ended before the mount answered. It has told most of it itself.
fn ended(mut child: Child, what: String) -> Failure {
    match child.wait() {
        Ok(status) if status.code() == Some(2) => Failure::told(true),
        Ok(status) if status.code().is_some() => Failure::told(false),
        Ok(status) => {
            let signal = status.signal().unwrap_or_default();
            Failure::new(what)
                .why(format!("its process was ended by signal {signal}"))
                .hint("see more: add --foreground, and set RUST_LOG=debug")
        }
        Err(error) => Failure::new(what).because(&error),
    }
}

/// Looks from outside whether the mount is there.
fn answers(args: &Mount) -> Result<()> {
    let failed = |reason: Failure| reason.hint("see more: mount with --foreground or --log-file");
    let what = format!("{} does not answer", show(&args.dir));
    let dir = args
        .dir
        .canonicalize()
        .and_then(|dir| dir.metadata().map(|_| dir))
        .map_err(|error| failed(Failure::new(&what).because(&error)))?;
    match mounts::on(&dir)? {
        Some(mount) if mount.is_ours() => Ok(()),
        _ => Err(failed(
            Failure::new(what).why("the pool is not mounted on it any more"),
        )),
    }
}

/// Checks everything, opens the pool and serves it until it is unmounted.
fn serve(args: &Mount, words: &Words, read_only: bool, output: Output) -> Result<()> {
    let service = Service::prepare(args.ready_fd, args.log_file.as_deref(), args.foreground)?;
    let dir = prepare_dir(&args.dir, args.create, words.nonempty, output)?;
    prepare_pool(args, output)?;
    let pool_path = args.pool.canonicalize().map_err(|error| {
        Failure::new(format!("cannot use {}", show(&args.pool))).because(&error)
    })?;
    let options = nodupe::engine::OpenOptions {
        read_only,
        cache_size: args
            .cache_size
            .or(words.cache_size)
            .unwrap_or(CACHE_SIZE_DEFAULT),
    };
    wait_for_dying(&pool_path, &dir);
    let pool = access::open_pool(&pool_path, args.shape.journal.as_deref(), &options)?;
    let plan = daemon::Plan {
        pool_path,
        dir,
        allow_other: args.allow_other || words.allow_other,
        read_only,
        marks: words.warn.clone().unwrap_or_default(),
        hook: args.on_warning.clone(),
        words: words.clone(),
    };
    service.run(&pool, &plan)
}

/// Waits for a process that is about to end and still holds the pool: killed, or behind an unmount
/// that nobody waited for. Opening the pool tells what is wrong if that does not help.
fn wait_for_dying(pool: &Path, dir: &Path) {
    let begun = Instant::now();
    while begun.elapsed() < DYING_MAX && !mounts::lock_holders(pool).is_empty() {
        match mounts::of_pool(pool) {
            // Somebody serves it, and is alive.
            Ok(Some(mount)) if mount.dir != dir && !umount::is_dead(&mount.dir) => return,
            _ => thread::sleep(DYING_STEP),
        }
    }
}

/// The directory to mount on, absolute: exists, is empty, and nothing is mounted on it.
fn prepare_dir(dir: &Path, create: bool, nonempty: bool, output: Output) -> Result<PathBuf> {
    let name = show(dir);
    let what = format!("cannot mount on {name}");
    let failed = |error: io::Error| Failure::new(&what).because(&error);
    if let Err(error) = fs::metadata(dir) {
        match error.kind() {
            io::ErrorKind::NotFound if create => fs::create_dir_all(dir).map_err(failed)?,
            io::ErrorKind::NotFound => {
                return Err(
                    failed(error).hint(format!("make it: mkdir -p {name}, or mount with --create"))
                );
            }
            // Cleared below.
            _ if mounts::is_dead(&error) => {}
            _ => return Err(failed(error)),
        }
    }
    if umount::is_dead(dir) {
        clear_dead(dir, output)?;
    }
    let dir = dir.canonicalize().map_err(failed)?;
    if !dir.is_dir() {
        return Err(Failure::new(what).why("it is not a directory"));
    }
    if let Some(mount) = mounts::on(&dir)? {
        let source = show(&mount.source);
        let failure = Failure::new(what);
        return Err(if mount.is_ours() {
            failure
                .why(format!("the pool {source} is mounted on it"))
                .hint(format!(
                    "unmount that first: nodupe umount {name}; or choose another one"
                ))
        } else {
            failure
                .why(format!(
                    "it is a mount point already, of {} ({})",
                    source, mount.kind
                ))
                .hint("choose another directory")
        });
    }
    let mut entries = fs::read_dir(&dir).map_err(failed)?;
    if !nonempty && entries.next().is_some() {
        return Err(Failure::new(what)
            .why("it is not empty, and the mount would hide what is in it")
            .hint("choose another directory, or add -o nonempty"));
    }
    Ok(dir)
}

/// Clears mounts that killed daemons of ours have left on `dir`, one on the other.
fn clear_dead(dir: &Path, output: Output) -> Result<()> {
    let failed =
        |error: io::Error| Failure::new(format!("cannot mount on {}", show(dir))).because(&error);
    let resolved = mounts::resolve(dir).map_err(failed)?;
    while umount::is_dead(&resolved) {
        match mounts::on(&resolved)? {
            Some(mount) if mount.is_ours() => umount::detach_dead(&resolved, output)?,
            _ => {
                return Err(Failure::new(format!("cannot mount on {}", show(dir)))
                    .why("another filesystem is mounted there, and nobody serves it")
                    .hint(format!("clear it first, as root: umount -l {}", show(dir))));
            }
        }
    }
    Ok(())
}

/// Makes the pool if it is missing and the user wants that.
fn prepare_pool(args: &Mount, output: Output) -> Result<()> {
    let name = show(&args.pool);
    let is_blank_file = match fs::metadata(&args.pool) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Ok(metadata) => metadata.is_file() && metadata.len() == 0,
        // Opening it tells why.
        Err(_) => false,
    };
    if !is_blank_file {
        return Ok(());
    }
    if !args.create {
        return Err(Failure::new(format!("there is no pool {name}"))
            .hint("look for the right path, or mount with --create to make it"));
    }
    let info = create::make_pool(&args.pool, &args.shape, false, output)?;
    let size = size::human(info.size);
    output.note(&format!("created the pool {name}: {size}, sparse"));
    Ok(())
}
