//! Layer fuse: a [`Pool`] as a mounted filesystem. The only place that names fuser.
//!
//! Requests are decoded, handed to the [`Vfs`] in one call and answered. What
//! may take long does not hold a session thread: a sync is answered by the committer of the pool,
//! a checkpoint by a worker.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use fuser::{Config, Session, SessionACL};

use crate::engine::Pool;
use crate::error::{Error, Kind, Result};
use crate::vfs::{Vfs, VfsOptions};

mod adapter;
mod connection;
mod control;
mod convert;
mod errno;
mod options;
mod requests;
mod scrub;
mod system;
mod unmount;
mod worker;

pub use options::{MountOptions, THREADS_DEFAULT, THREADS_MAX};
pub use unmount::Unmounter;

use adapter::Adapter;
use control::Server;
use options::Resolved;
use scrub::Scrubber;
use worker::Worker;

/// Mounts `pool` on the directory `dir`, and serves it until it is unmounted. `ready` is called
/// once it is mounted. The caller closes the pool afterwards.
///
/// A panic in one of the threads of the mount ends the process: half a filesystem is worse than
/// none, and the journal makes it a crash like any other.
pub fn mount(
    pool: Arc<Pool>,
    dir: &Path,
    options: &MountOptions,
    ready: impl FnOnce(Unmounter) + Send,
) -> Result<()> {
    let Resolved { options, kernel } = options.clone().resolve()?;
    let dir = dir
        .canonicalize()
        .map_err(|error| cannot("find the mount point", dir, error))?;
    if !dir.is_dir() {
        return Err(Error::new(
            Kind::NotDirectory,
            format!(
                "the mount point is not a directory: {}; make one and mount there",
                dir.display()
            ),
        ));
    }
    system::end_process_on_panic();
    if let Some(bytes) = options.read_ahead {
        pool.set_read_ahead(bytes);
    }
    let vfs = Arc::new(Vfs::new(
        pool,
        VfsOptions {
            blocks: options.blocks,
            read_only: options.read_only,
        },
    ));
    let source = options.pool.to_string_lossy().into_owned();
    let no_thread = |error| cannot("start a thread for", &dir, error);
    let worker = Worker::start("nodupe-mount").map_err(no_thread)?;
    let pages = Worker::start("nodupe-pages").map_err(no_thread)?;
    let scrubber = Arc::new(Scrubber::new(vfs.pool().clone()));
    let adapter = Adapter::new(
        vfs.clone(),
        Server::new(vfs.clone(), source, options.marks.clone(), scrubber.clone()),
        worker.queue(),
        pages.queue(),
    );
    let invalidator = adapter.invalidator();
    vfs.watch(invalidator.clone());

    let mut config = Config::default();
    config.mount_options = kernel;
    config.acl = if options.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(options.threads);
    config.clone_fd = true;

    let session = Session::new(adapter, &dir, &config).map_err(|error| explain(&dir, error))?;
    invalidator.connect(session.notifier());
    system::raise_read_ahead(&dir);
    let unmounter = Unmounter::of_newest(&dir);
    let serving = serve(session).map_err(|error| cannot("serve", &dir, error))?;
    ready(unmounter.clone());
    let served = serving
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("a session thread panicked")));
    // It is gone, unless serving failed.
    unmounter.unmount()?;
    // The adapter is gone with the session, and with it the last sender of jobs.
    worker.finish();
    pages.finish();
    scrubber.finish();
    let finished = vfs.finish();
    served.map_err(|error| cannot("serve", &dir, error))?;
    finished
}

/// Serves requests on threads of fuser, until the mount is gone.
///
/// fuser unmounts the path when a session or its handle is dropped, also after somebody else
/// unmounted it: what is mounted there then, below or anew, would go. So its handle is never
/// dropped, which costs the descriptor of a dead connection; [`Unmounter`] unmounts.
fn serve(session: Session<Adapter>) -> io::Result<JoinHandle<io::Result<()>>> {
    let nothing = thread::Builder::new().spawn(|| Ok(()))?;
    let mut background = session.spawn()?;
    let serving = std::mem::replace(&mut background.guard, nothing);
    std::mem::forget(background);
    Ok(serving)
}

/// Why mounting failed, and what to do.
fn explain(dir: &Path, error: io::Error) -> Error {
    if !Path::new("/dev/fuse").exists() {
        return Error::new(
            Kind::Unsupported,
            "there is no /dev/fuse: load the kernel module fuse",
        );
    }
    cannot("mount on", dir, error)
}

fn cannot(what: &str, dir: &Path, error: io::Error) -> Error {
    Error::io(format!("cannot {what} {}", dir.display()), error)
}

/// Runs `job` on a thread of its own name, so that [`system::end_process_on_panic`] knows it.
fn spawn(name: &str, job: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(job)
}
