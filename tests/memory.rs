//! The daemon stays within its memory: what the user set for the caches, and the fixed part that
//! `docs/architecture.md` tells, whatever is asked of it.

mod datastore;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use datastore::{Datastore, cannot_mount, not_run};

/// What `Datastore` gives the caches: 128 MiB.
const CACHE: u64 = 128 << 20;
/// The fixed part, in bytes: 128 MiB, which also holds the program and what its allocator keeps.
const FIXED: u64 = 128 << 20;
/// How long everything goes on at once.
const LOAD: Duration = Duration::from_secs(8);
/// Size of each file, in bytes; all of them together are more than the caches.
const FILE: u64 = 96 << 20;

/// The next number of a simple sequence, so that writes jump.
fn next(state: &mut u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1);
    *state >> 24
}

/// Small and large writes, syncs and reads of one file, until the time is over.
fn load(path: &Path, seed: u64, until: Instant) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(if seed.is_multiple_of(2) {
            libc::O_SYNC
        } else {
            0
        })
        .open(path)
        .expect("the file is there");
    let mut state = seed;
    let mut buffer = vec![seed as u8; 1 << 20];
    while Instant::now() < until {
        let len = if next(&mut state).is_multiple_of(16) {
            1 << 20
        } else {
            4096
        };
        let at = next(&mut state) % (FILE / 4096) * 4096;
        let at = at.min(FILE - len as u64);
        buffer[0] = state as u8;
        file.write_all_at(&buffer[..len], at).expect("written");
        if next(&mut state).is_multiple_of(64) {
            file.sync_data().expect("synced");
        }
        let from = next(&mut state) % (FILE - (1 << 20));
        file.read_exact_at(&mut buffer[..len], from).expect("read");
    }
}

#[test]
fn the_daemon_stays_within_its_memory() {
    if let Some(why) = cannot_mount() {
        return not_run("the_daemon_stays_within_its_memory", &why);
    }
    let mut store = Datastore::new("8G");
    let dir = store.dir();
    let paths: Vec<_> = (0..4).map(|i| dir.join(format!("{i}.raw"))).collect();
    for path in &paths {
        File::create(path)
            .and_then(|file| file.set_len(FILE))
            .expect("a file");
    }
    let until = Instant::now() + LOAD;
    thread::scope(|scope| {
        for (seed, path) in (1..).zip(&paths) {
            scope.spawn(move || load(path, seed, until));
        }
        scope.spawn(|| {
            // Clones of files in use keep the trees growing.
            for i in 0.. {
                if Instant::now() > until {
                    break;
                }
                let clone = dir.join(format!("clone-{i}.raw"));
                fs::copy(&paths[i % paths.len()], clone).expect("a clone");
                thread::sleep(Duration::from_millis(20));
            }
        });
    });
    let peak = store.peak_memory();
    eprintln!(
        "at most {} MiB with {} MiB of cache",
        peak >> 20,
        CACHE >> 20
    );
    assert!(peak <= CACHE + FIXED, "{} MiB", peak >> 20);
    store.unmount();
    store.check();
}
