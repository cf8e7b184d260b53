//! The process that serves a mount: signals, readiness, log, and the clean end.
//!
//! 1. Termination signals are blocked before the first thread starts; one thread waits for them.
//! 2. The pool is closed after the session has ended, whatever ended it, and only then does the
//!    process exit: who waits for the process knows that everything is durable.
//! 3. Until the mount answers, errors go to the standard error of whoever started the mount.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nodupe::engine::Pool;
use nodupe::error::Kind;
use nodupe::fuse::{self, MountOptions, Unmounter};
use nodupe::sys::process::{self, TerminationSignals};
use nodupe::vfs::BlocksPolicy;

use super::failure::{Failure, Result};
use super::logging;
use super::options::Words;
use super::output::show;
use super::warn::Watch;

/// Lower is spared longer when memory runs out; -1000 would mean never.
const OOM_SCORE: &str = "-900";

/// How long those who use the mount have to end after a termination signal. Shorter than what a
/// system that shuts down gives a service (90 s), so that it leaves a clean pool.
const GRACE: Duration = Duration::from_secs(30);

/// What is served, and how.
#[derive(Debug)]
pub(super) struct Plan {
    /// Absolute path of the pool.
    pub(super) pool_path: PathBuf,
    /// Absolute path of the directory.
    pub(super) dir: PathBuf,
    pub(super) allow_other: bool,
    pub(super) read_only: bool,
    pub(super) words: Words,
    /// Percent of use at which the log warns, ascending.
    pub(super) marks: Vec<u8>,
    /// Program to run at each warning.
    pub(super) hook: Option<PathBuf>,
}

/// What a termination signal has to do now.
#[derive(Debug)]
enum Phase {
    /// Nothing is mounted: the process may just end. What was begun is replayed or undone by the
    /// next open of the pool.
    Starting,
    /// The kernel may mount at any moment: remember the signal.
    Mounting { stop: bool },
    /// Unmount; at the second signal do not wait for those who still use the mount.
    Mounted { unmounter: Unmounter, signals: u32 },
}

/// What the thread that waits for signals shares with the one that serves.
#[derive(Debug)]
struct Shared {
    phase: Mutex<Phase>,
    /// The pool, until somebody closes it. Held during that, so that nobody exits before.
    pool: Mutex<Option<Arc<Pool>>>,
}

impl Shared {
    /// Closes the pool, if nobody has done it.
    fn close(&self) -> Option<nodupe::error::Result<()>> {
        let mut pool = lock(&self.pool);
        pool.take().map(|pool| pool.close())
    }
}

/// A process that is going to serve a mount.
#[derive(Debug)]
pub(super) struct Service {
    ready: Option<File>,
    log: Option<File>,
    foreground: bool,
    shared: Arc<Shared>,
}

impl Service {
    /// Prepares the process; call it before any other thread exists.
    pub(super) fn prepare(
        ready_fd: Option<i32>,
        log_file: Option<&Path>,
        foreground: bool,
    ) -> Result<Self> {
        let failed =
            |error: io::Error| Failure::new("cannot prepare the nodupe process").because(&error);
        process::bound_allocator();
        if let Some(ready) = ready_fd {
            process::close_inherited(ready);
        }
        let ready = ready_fd.map(process::adopt_descriptor).transpose();
        let ready = ready.map_err(|error| {
            Failure::usage("--ready-fd is for this program's own use").because(&error)
        })?;
        let signals = TerminationSignals::block().map_err(failed)?;
        let shared = Arc::new(Shared {
            phase: Mutex::new(Phase::Starting),
            pool: Mutex::new(None),
        });
        let log = log_file.map(open_log).transpose()?;
        std::panic::set_hook(Box::new(|panic| {
            log::error!(
                "nodupe has a bug and ends now, the journal keeps what was synced: {panic}"
            );
            std::process::abort();
        }));
        let service = Self {
            ready,
            log,
            foreground,
            shared: Arc::clone(&shared),
        };
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || watch(&signals, &shared))
            .map_err(failed)?;
        Ok(service)
    }

    /// Serves `pool` until it is unmounted, and closes it.
    pub(super) fn run(mut self, pool: &Arc<Pool>, plan: &Plan) -> Result<()> {
        protect();
        *lock(&self.shared.pool) = Some(Arc::clone(pool));
        let served = self.serve(pool, plan);
        let name = show(&plan.pool_path);
        let closed = match self.shared.close() {
            Some(closed) => closed,
            // The other thread has closed it, and ends the process.
            None => loop {
                thread::park();
            },
        };
        let closed = closed.map_err(|error| {
            Failure::of_pool(format!("cannot close the pool {name}"), &name, &error)
        });
        match (served, closed) {
            (Ok(()), Ok(())) => {
                log::info!("{name}: closed cleanly");
                Ok(())
            }
            (Ok(()), Err(failure)) => Err(failure),
            (Err(failure), Ok(())) => Err(failure),
            (Err(failure), Err(second)) => {
                log::error!("{}", second.chain.join(": "));
                Err(failure)
            }
        }
    }

    fn serve(&mut self, pool: &Arc<Pool>, plan: &Plan) -> Result<()> {
        let (name, dir) = (show(&plan.pool_path), show(&plan.dir));
        let what = format!("cannot mount {name} on {dir}");
        if !plan.read_only {
            pool.start()
                .map_err(|error| Failure::of_pool(&what, &name, &error))?;
        }
        *lock(&self.shared.phase) = Phase::Mounting { stop: false };
        let shared = Arc::clone(&self.shared);
        // Nobody answers requests before this returns: it must not touch the mount.
        let ready = |unmounter: Unmounter| {
            let mounted = Phase::Mounted {
                unmounter,
                signals: 0,
            };
            let before = std::mem::replace(&mut *lock(&shared.phase), mounted);
            // First, because it opens the log.
            let told = self.tell_ready();
            log::info!("{name}: mounted on {dir}");
            watch_space(pool, plan);
            if let Err(error) = told {
                log::warn!("nobody waits for the mount any more: {error}");
            }
            if matches!(before, Phase::Mounting { stop: true }) {
                stop(&shared);
            }
        };
        let served = fuse::mount(Arc::clone(pool), &plan.dir, &mount_options(plan), ready);
        let was_mounted = matches!(*lock(&self.shared.phase), Phase::Mounted { .. });
        match served {
            Ok(()) => Ok(()),
            // The kernel ended the session while a request was on its way: an unmount as well.
            Err(error) if was_mounted && is_aborted(&error) => Ok(()),
            Err(error) if was_mounted => Err(Failure::new(format!("{dir} is not served any more"))
                .because(&error)
                .hint(format!("clear it and mount again: nodupe umount {dir}"))),
            Err(error) => Err(refused(&what, plan, &error)),
        }
    }

    /// The mount answers: lets go of the terminal, tells who waits.
    fn tell_ready(&mut self) -> io::Result<()> {
        // The current directory would keep another filesystem busy.
        std::env::set_current_dir("/")?;
        if let Some(log) = &self.log {
            process::redirect_streams(File::open("/dev/null")?.as_fd(), log.as_fd())?;
        } else if !self.foreground {
            let null = OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/null")?;
            process::redirect_streams(null.as_fd(), null.as_fd())?;
        }
        if !self.foreground {
            process::new_session()?;
            logging::show_all();
        }
        match self.ready.take() {
            Some(mut ready) => ready.write_all(b"+"),
            None => Ok(()),
        }
    }
}

/// Warns when the pool fills up.
fn watch_space(pool: &Arc<Pool>, plan: &Plan) {
    if plan.read_only {
        return;
    }
    let (path, hook) = (&plan.pool_path, plan.hook.clone());
    if let Err(error) = Watch::start(pool, path, &plan.dir, &plan.marks, hook) {
        log::warn!("nobody warns when the pool fills up: {error}");
    }
}

/// Waits for termination signals for as long as the process lives.
fn watch(signals: &TerminationSignals, shared: &Arc<Shared>) {
    loop {
        match signals.wait() {
            Ok(signal) => {
                log::info!("{signal} received");
                stop(shared);
            }
            Err(error) => {
                log::error!("cannot wait for signals: {error}");
                return;
            }
        }
    }
}

/// Does what a termination signal asks for.
fn stop(shared: &Arc<Shared>) {
    let (unmounter, signals) = match &mut *lock(&shared.phase) {
        Phase::Starting => std::process::exit(1),
        Phase::Mounting { stop } => {
            *stop = true;
            return;
        }
        Phase::Mounted { unmounter, signals } => {
            *signals += 1;
            (unmounter.clone(), *signals)
        }
    };
    if signals == 1 {
        // If it is in use this only detaches it: the process ends with the last user.
        if let Err(error) = unmounter.unmount() {
            tell("not unmounted", &error);
        }
        let waiting = Arc::clone(shared);
        let grace = move || {
            thread::sleep(GRACE);
            log::warn!("still in use after {} s", GRACE.as_secs());
            end_now(&waiting);
        };
        if let Err(error) = thread::Builder::new().name("grace".into()).spawn(grace) {
            log::warn!("waiting for the users of the mount without a limit: {error}");
        }
        return;
    }
    log::warn!("second signal");
    end_now(shared);
}

/// Closes the pool and ends this process, whoever uses the mount.
fn end_now(shared: &Shared) {
    log::warn!("ending now, those who still use the mount are cut off");
    // They get errors from the kernel as soon as this process has gone.
    match shared.close() {
        // The other thread has closed it, and ends the process.
        None => {}
        Some(Ok(())) => std::process::exit(0),
        Some(Err(error)) => {
            tell("cannot close the pool", &error);
            std::process::exit(1);
        }
    }
}

/// True if the error says that the kernel has ended the session.
fn is_aborted(error: &nodupe::error::Error) -> bool {
    std::error::Error::source(error)
        .and_then(|source| source.downcast_ref::<io::Error>())
        .is_some_and(|source| source.kind() == io::ErrorKind::ConnectionAborted)
}

fn tell(what: &str, error: &nodupe::error::Error) {
    log::error!("{}", Failure::new(what).because(error).chain.join(": "));
}

/// Makes this process outlive a shortage of memory: it serves the write-back that ends it.
fn protect() {
    if let Err(error) = process::set_io_flusher() {
        log::debug!("not marked as a flusher of memory: {error}");
    }
    match process::lock_memory() {
        Ok(true) => {}
        Ok(false) => {
            log::debug!("memory is not locked: it needs CAP_IPC_LOCK, or ulimit -l unlimited")
        }
        Err(error) => log::debug!("memory is not locked: {error}"),
    }
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE) {
        log::debug!("not spared when memory runs out: {error}");
    }
}

fn open_log(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(|error| {
            Failure::new(format!("cannot open the log {}", show(path)))
                .because(&error)
                .hint("choose another --log-file")
        })
}

fn mount_options(plan: &Plan) -> MountOptions {
    let mut options = MountOptions::new(&plan.pool_path);
    options.allow_other = plan.allow_other;
    options.read_only = plan.read_only;
    if let Some(threads) = plan.words.threads {
        options.threads = threads;
    }
    options.read_ahead = plan.words.read_ahead;
    if plan.words.blocks_allocated {
        options.blocks = BlocksPolicy::Allocated;
    }
    options.marks.clone_from(&plan.marks);
    options.extra.clone_from(&plan.words.kernel);
    options
}

/// Why the kernel refused the mount, and what to do.
fn refused(what: &str, plan: &Plan, error: &nodupe::error::Error) -> Failure {
    let name = show(&plan.pool_path);
    if !Path::new("/dev/fuse").exists() {
        return Failure::new(what).because(error).hint(
            "there is no /dev/fuse: load the module (modprobe fuse), or give it to the container",
        );
    }
    match error.kind() {
        Kind::Denied | Kind::NotPermitted => {
            let (uid, _) = process::effective_owner();
            let failure = Failure::new(what).because(error);
            if uid == 0 {
                failure.hint("this container may not mount: it needs CAP_SYS_ADMIN and /dev/fuse")
            } else if plan.allow_other {
                failure.hint("as root, add the line user_allow_other to /etc/fuse.conf")
            } else {
                failure.hint("mount as root, or install fuse3 (fusermount3)")
            }
        }
        _ => Failure::of_pool(what, &name, error),
    }
}

/// A poisoned lock means that a thread panicked, which ends the process anyway.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
