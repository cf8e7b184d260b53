//! A pool, made and mounted for one test.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nodupe::device::{FileDevice, OpenMode};
use nodupe::engine::{CreateOptions, OpenOptions, Pool};
use nodupe::error::{Kind, Result};
use nodupe::fuse::{MountOptions, Unmounter, mount};
use nodupe::units::Time;
use tempfile::TempDir;

use crate::sys;

/// Size of the pool, sparse.
const POOL_BYTES: u64 = 1024 * 1024 * 1024; // 1 GiB

/// Memory of the pool.
const CACHE_BYTES: u64 = 64 * 1024 * 1024; // 64 MiB

/// How long the lock of a pool may be held by nobody's fault.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(2);

/// What ends a mount, and the thread that serves it.
type Session = (Unmounter, JoinHandle<Result<()>>);

/// A pool that is mounted; unmounted and closed when dropped.
pub(crate) struct Mounted {
    pool: Option<Arc<Pool>>,
    session: Option<Session>,
    home: TempDir,
    change: fn(&mut MountOptions),
}

impl Mounted {
    /// A new pool, mounted for everybody if we are root; `None`, and the reason on stderr, where
    /// that is not possible.
    pub(crate) fn new() -> Option<Self> {
        Self::with(|_| ())
    }

    /// As `new`, with other options.
    pub(crate) fn with(change: fn(&mut MountOptions)) -> Option<Self> {
        if let Some(why) = cannot_mount() {
            eprintln!("not run: {why}");
            return None;
        }
        let home = tempfile::tempdir().unwrap();
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let pool = home.path().join("pool");
        File::create_new(&pool)
            .unwrap()
            .set_len(POOL_BYTES)
            .unwrap();
        let options = CreateOptions {
            journal_size: None,
            uuid: [7; 16],
            hash_key: [9; 16],
            uid: sys::uid(),
            gid: sys::gid(),
            time: Time::now(),
        };
        let device = FileDevice::open(&pool, OpenMode::ReadWrite).unwrap();
        Pool::create(Arc::new(device), None, &options).unwrap();
        fs::create_dir(home.path().join("mount")).unwrap();
        let (pool, session) = begin(&home, change);
        Some(Self {
            pool: Some(pool),
            session: Some(session),
            home,
            change,
        })
    }

    /// Unmounts, closes, opens and mounts again.
    pub(crate) fn remount(mut self) -> Self {
        self.end();
        self.begin();
        self
    }

    /// The pool, while it is mounted.
    pub(crate) fn pool(&self) -> &Arc<Pool> {
        self.pool.as_ref().unwrap()
    }

    /// Path of something in the mount.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// The mount point.
    pub(crate) fn root(&self) -> PathBuf {
        self.home.path().join("mount")
    }

    /// A directory outside the mount.
    pub(crate) fn outside(&self) -> &Path {
        self.home.path()
    }

    /// Bytes that the pool uses, once everything is at its place.
    pub(crate) fn used(&self) -> u64 {
        self.pool().checkpoint().unwrap();
        self.pool().usage().used
    }

    /// Unmounts, without waiting for the end.
    pub(crate) fn unmount(&self) {
        let (unmounter, _) = self.session.as_ref().unwrap();
        unmounter.unmount().unwrap();
    }

    /// Waits for the end of the mount, and closes the pool.
    pub(crate) fn wait(&mut self) {
        if let Some((_, serving)) = self.session.take() {
            serving.join().unwrap().unwrap();
            // Closed and gone, and the lock of its file with it.
            self.pool.take().unwrap().close().unwrap();
        }
    }

    /// Unmounts, waits and closes.
    pub(crate) fn end(&mut self) {
        if self.session.is_some() {
            self.unmount();
            self.wait();
        }
    }

    /// Opens and mounts again what was ended.
    pub(crate) fn begin(&mut self) {
        assert!(self.session.is_none());
        let (pool, session) = begin(&self.home, self.change);
        self.pool = Some(pool);
        self.session = Some(session);
    }
}

/// Opens the file of the pool. A program that another test is just starting holds each open file,
/// and its lock, for the moment until it runs: waits for that.
fn open_device(path: &Path) -> FileDevice {
    let start = Instant::now();
    loop {
        match FileDevice::open(path, OpenMode::ReadWrite) {
            Err(error) if error.kind() == Kind::Busy && start.elapsed() < LOCK_WAIT_MAX => {
                thread::sleep(Duration::from_millis(5));
            }
            result => return result.unwrap(),
        }
    }
}

fn begin(home: &TempDir, change: fn(&mut MountOptions)) -> (Arc<Pool>, Session) {
    let path = home.path().join("pool");
    let device = open_device(&path);
    let open = OpenOptions {
        read_only: false,
        cache_size: CACHE_BYTES,
    };
    let pool = Pool::open(Arc::new(device), None, &open).unwrap();
    pool.start().unwrap();
    let mut options = MountOptions::new(path);
    options.allow_other = sys::uid() == 0;
    change(&mut options);
    let (send, receive) = channel();
    let serving = {
        let (pool, dir) = (pool.clone(), home.path().join("mount"));
        thread::spawn(move || {
            mount(pool, &dir, &options, |unmounter| {
                send.send(unmounter).unwrap();
            })
        })
    };
    let Ok(unmounter) = receive.recv() else {
        panic!("not mounted: {:?}", serving.join().unwrap());
    };
    (pool, (unmounter, serving))
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if thread::panicking() {
            // The failure is told already: leave nothing behind, fail no more.
            if let Some((unmounter, serving)) = self.session.take()
                && unmounter.unmount().is_ok()
            {
                drop(serving.join());
            }
            return;
        }
        self.end();
    }
}

fn cannot_mount() -> Option<&'static str> {
    if File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .is_err()
    {
        return Some("/dev/fuse is missing or cannot be opened");
    }
    if sys::uid() != 0 && Command::new("fusermount3").arg("-V").output().is_err() {
        return Some("mounting needs root, or fusermount3");
    }
    None
}

/// True, or the reason on stderr.
pub(crate) fn is_root() -> bool {
    if sys::uid() != 0 {
        eprintln!("not run: it takes root to act as other users");
        return false;
    }
    true
}

/// True if `cp` copies by copy_file_range, as coreutils does from 9.0; else the reason on stderr.
pub(crate) fn cp_is_new() -> bool {
    let Ok(output) = Command::new("cp").arg("--version").output() else {
        eprintln!("not run: there is no cp");
        return false;
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let first = text.lines().next().unwrap_or_default();
    let new = first.contains("coreutils")
        && first
            .split_whitespace()
            .last()
            .and_then(|version| version.split('.').next()?.parse::<u32>().ok())
            .is_some_and(|major| major >= 9);
    if !new {
        eprintln!("not run: cp of coreutils 9.0 or later is needed, here is {first:?}");
    }
    new
}

/// Runs `cp` and fails unless it succeeds.
pub(crate) fn cp(from: &Path, to: &Path) {
    let output = Command::new("cp").arg(from).arg(to).output().unwrap();
    assert!(output.status.success(), "cp: {output:?}");
}

/// Bytes that do not compress, repeat or vanish: xorshift from `seed`.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
