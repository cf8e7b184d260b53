//! A pool mounted by the real program, for tests that need a real mount.
//!
//! The daemon runs in the foreground as a child of the test, so that a test can kill it and
//! nothing is left behind when a test fails. `NODUPE=PATH` tests another build of the program.

#![allow(dead_code, reason = "each file of tests uses a part of this")]

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long a mount or an unmount may take, in seconds, on a machine that is busy.
const ANSWER_SECS_MAX: u64 = 60;

/// A pool file and the folder that it is mounted at.
#[derive(Debug)]
pub(crate) struct Datastore {
    /// Holds the pool and the mount point; on a disk, because a pool wants O_DIRECT.
    folder: TempDir,
    daemon: Option<Child>,
}

/// Says on the terminal, past the capture of the test runner, why a test does nothing here.
pub(crate) fn not_run(test: &str, why: &str) {
    // A closed stderr is no reason to fail.
    let _ignored = writeln!(io::stderr(), "{test}: NOT RUN: {why}");
}

/// Why this machine cannot mount, if it cannot.
pub(crate) fn cannot_mount() -> Option<String> {
    let fuse = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse");
    if let Err(error) = fuse {
        return Some(format!("/dev/fuse: {error}"));
    }
    let root = fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0);
    (!root).then(|| "mounting needs root here".to_owned())
}

/// The program under test.
pub(crate) fn nodupe() -> Command {
    match std::env::var_os("NODUPE") {
        Some(path) => Command::new(path),
        None => Command::new(env!("CARGO_BIN_EXE_nodupe")),
    }
}

/// Runs a command to its end; fails the test, with what it printed, unless it succeeds.
pub(crate) fn run(command: &mut Command) -> Output {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    output
}

impl Datastore {
    /// Makes a pool of `size` (as the command line writes it, `4G`) and mounts it.
    pub(crate) fn new(size: &str) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("datastore.")
            .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .expect("a folder for the pool");
        let mut store = Self {
            folder,
            daemon: None,
        };
        fs::create_dir(store.dir()).expect("a mount point");
        run(nodupe().arg("create").arg(store.pool()).args([
            "--size",
            size,
            "--journal-size",
            "64M",
        ]));
        store.mount();
        store
    }

    /// The pool file.
    pub(crate) fn pool(&self) -> PathBuf {
        self.folder.path().join("pool.nodupe")
    }

    /// Where the pool is mounted.
    pub(crate) fn dir(&self) -> PathBuf {
        self.folder.path().join("mnt")
    }

    /// What the daemon prints.
    fn log(&self) -> PathBuf {
        self.folder.path().join("daemon.log")
    }

    /// Mounts the pool; returns when the mount answers.
    pub(crate) fn mount(&mut self) {
        assert!(self.daemon.is_none(), "mounted already");
        let daemon = nodupe()
            .arg("mount")
            .arg(self.pool())
            .arg(self.dir())
            .args(["--foreground", "--cache-size", "128M"])
            .stdin(Stdio::null())
            // Not the test's own output: a daemon that outlives a failed test would hold it.
            .stdout(Stdio::null())
            .stderr(File::create(self.log()).expect("a log file"))
            .spawn()
            .expect("the program starts");
        let log = self.log();
        let daemon = self.daemon.insert(daemon);
        let started = Instant::now();
        let (dir, parent) = (self.folder.path().join("mnt"), self.folder.path());
        while !is_mount_point(&dir, parent) {
            if let Some(status) = daemon.try_wait().expect("a child can be waited for") {
                let log = fs::read_to_string(&log).unwrap_or_default();
                panic!("nodupe mount ended: {status}\n{log}");
            }
            assert!(
                started.elapsed() < Duration::from_secs(ANSWER_SECS_MAX),
                "not mounted after {ANSWER_SECS_MAX} s"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The most memory that the daemon ever had, in bytes.
    pub(crate) fn peak_memory(&self) -> u64 {
        let pid = self.daemon.as_ref().expect("mounted").id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a live daemon");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
        kib.and_then(|kib| kib.trim().parse::<u64>().ok())
            .expect("a number of KiB")
            * 1024
    }

    /// Kills the daemon as a crash would. The dead mount stays: [`detach`](Self::detach) it.
    pub(crate) fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("mounted");
        daemon.kill().expect("the daemon was alive");
        daemon.wait().expect("a child can be waited for");
    }

    /// Takes away the mount of a daemon that was killed.
    pub(crate) fn detach(&self) {
        run(Command::new("umount").arg("-l").arg(self.dir()));
    }

    /// Unmounts; returns when everything is durable and the daemon has gone.
    pub(crate) fn unmount(&mut self) {
        run(nodupe().arg("umount").arg(self.dir()));
        let daemon = self.daemon.as_mut().expect("mounted");
        let started = Instant::now();
        while daemon
            .try_wait()
            .expect("a child can be waited for")
            .is_none()
        {
            assert!(
                started.elapsed() < Duration::from_secs(ANSWER_SECS_MAX),
                "nodupe umount returned, but the daemon lives"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        self.daemon = None;
    }

    /// Fails the test if the pool, which is not mounted, has a finding.
    pub(crate) fn check(&self) {
        assert!(
            self.daemon.is_none(),
            "check needs a pool that is not mounted"
        );
        run(nodupe().arg("check").arg(self.pool()));
    }
}

impl Drop for Datastore {
    /// Leaves nothing behind when a test has failed half-way.
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            // Failures do not matter here: the test has its verdict.
            let _ignored = daemon.kill();
            let _ignored = daemon.wait();
            let _ignored = Command::new("umount").arg("-l").arg(self.dir()).status();
        }
    }
}

/// True if another file system is mounted at `dir`, a folder in `parent`.
fn is_mount_point(dir: &Path, parent: &Path) -> bool {
    match (fs::metadata(dir), fs::metadata(parent)) {
        (Ok(dir), Ok(parent)) => dir.dev() != parent.dev(),
        _ => false,
    }
}
