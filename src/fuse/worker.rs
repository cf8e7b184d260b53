//! A thread for what must not hold a session thread and has its own answer: checkpoints, and what
//! the kernel is told of its page cache.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use super::spawn;

type Job = Box<dyn FnOnce() + Send>;

/// Where jobs go. There are at most as many as the kernel has requests under way.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    jobs: Sender<Job>,
}

impl Queue {
    /// Runs `job` behind those that wait.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        if self.jobs.send(Box::new(job)).is_err() {
            // The job is dropped, and what it would have answered is answered with EIO.
            log::error!("the worker of the mount is gone");
        }
    }
}

/// The thread.
#[derive(Debug)]
pub(super) struct Worker {
    queue: Queue,
    thread: JoinHandle<()>,
}

impl Worker {
    /// Starts a thread called `name`.
    pub(super) fn start(name: &str) -> io::Result<Self> {
        let (jobs, waiting): (_, Receiver<Job>) = channel();
        let thread = spawn(name, move || {
            for job in waiting {
                job();
            }
        })?;
        Ok(Self {
            queue: Queue { jobs },
            thread,
        })
    }

    pub(super) fn queue(&self) -> Queue {
        self.queue.clone()
    }

    /// Waits until every job is done. Every other sender of jobs must be gone.
    pub(super) fn finish(self) {
        drop(self.queue);
        if self.thread.join().is_err() {
            log::error!("the worker of the mount panicked");
        }
    }
}
