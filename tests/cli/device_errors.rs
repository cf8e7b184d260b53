//! A pool on a device that fails, under a real mount: reads go on, changes get EIO, and whoever
//! asks is told why and what to do. The device is a file that `qemu-storage-daemon` shows as a file
//! of FUSE, with `blkdebug` in between, which fails writes to one sector.

use std::fs::{self, File};
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::*;

/// A sector in the ring of a pool with a journal of 16 MiB, behind 1.4 MiB of batches.
const BAD_SECTOR: u64 = 3000;

/// Number of the error.
const EIO: i32 = 5;

/// The failing device; it ends with the test.
struct Failing(Child);

impl Drop for Failing {
    fn drop(&mut self) {
        if self.0.kill().is_ok() {
            drop(self.0.wait());
        }
    }
}

fn failing(sandbox: &Sandbox, pool: &Path) -> Option<(Failing, PathBuf)> {
    let config = format!(
        "[inject-error]\nevent = \"pwritev\"\niotype = \"write\"\nerrno = \"5\"\n\
         sector = \"{BAD_SECTOR}\"\nonce = \"off\"\n"
    );
    let config = sandbox.file("blkdebug", config.as_bytes());
    let export = sandbox.file("export", b"");
    let child = Command::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=f,filename={}", text(pool)))
        .arg("--blockdev")
        .arg(format!(
            "driver=blkdebug,node-name=d,image=f,config={}",
            text(&config)
        ))
        .arg("--export")
        .arg(format!(
            "type=fuse,id=e,node-name=d,mountpoint={},writable=on",
            text(&export)
        ))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let device = Failing(child);
    let begun = Instant::now();
    let size = fs::metadata(pool).unwrap().len();
    while fs::metadata(&export).is_ok_and(|metadata| metadata.len() != size) {
        if begun.elapsed() > Duration::from_secs(20) {
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Some((device, export))
}

#[test]
fn a_device_that_fails_poisons_the_pool() {
    const TEST: &str = "a_device_that_fails_poisons_the_pool";
    if !can_mount(TEST) {
        return;
    }
    let sandbox = Sandbox::new();
    let (pool, dir, log) = (sandbox.path("p"), sandbox.dir("d"), sandbox.path("log"));
    let shape = ["--size", "256M", "--journal-size", "16M"];
    succeeds(&run(&[&["create", text(&pool)], &shape[..]].concat()));
    let Some((device, export)) = failing(&sandbox, &pool) else {
        eprintln!("{TEST}: NOT RUN: no qemu-storage-daemon with FUSE exports (scripts/setup)");
        return;
    };
    let mount = ["mount", text(&export), text(&dir), "--log-file", text(&log)];
    succeeds(&run(&mount));
    let bytes = vec![7; 64 * 1024];
    let mut synced = 0;
    let mut open = None;
    // Until the ring reaches the bad sector.
    let error = loop {
        assert!(synced < 100, "nothing failed");
        let written = File::create(dir.join(format!("f{synced}"))).and_then(|mut file| {
            // Small enough to go through the journal.
            for block in bytes.chunks(4096) {
                file.write_all(block)?;
            }
            let outcome = file.sync_all();
            open = Some(file);
            outcome
        });
        match written {
            Ok(()) => synced += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.raw_os_error(), Some(EIO));
    assert!(synced > 2, "it failed too early");
    // Every later change and sync fails as well, and none of them by chance.
    let eio = |outcome: std::io::Result<()>| {
        assert_eq!(outcome.unwrap_err().raw_os_error(), Some(EIO));
    };
    let mut open = open.unwrap();
    for _ in 0..3 {
        eio(open.sync_all());
        eio(open.sync_data());
        eio(open.write_all(b"x").and_then(|()| open.sync_all()));
        eio(File::create(dir.join("new")).map(drop));
        eio(fs::create_dir(dir.join("dir")));
        eio(fs::rename(dir.join("f0"), dir.join("g")));
        eio(fs::remove_file(dir.join("f0")));
        eio(File::open(&dir).unwrap().sync_all());
    }
    for i in 0..synced {
        assert!(
            fs::read(dir.join(format!("f{i}"))).unwrap() == bytes,
            "f{i}"
        );
    }
    // Who asks is told.
    let why = "cannot write the journal";
    let facts = json(&run(&["info", text(&dir), "--json"]), &["health"]);
    assert!(facts["poisoned"].as_str().unwrap().contains(why));
    let df = run(&["df", text(&dir)]);
    assert!(stdout(&df).contains("POISONED"), "{}", stdout(&df));
    assert!(stderr(&df).contains(why) && stderr(&df).contains("nodupe umount"));
    let info = run(&["info", text(&dir)]);
    assert!(stdout(&info).contains(why), "{}", stdout(&info));
    assert!(fs::read_to_string(&log).unwrap().contains(why));
    drop(open);
    fails(&run(&["umount", text(&dir)]), 1, &["not closed cleanly"]);
    drop(device);
    // The repaired disk: everything that was acknowledged is there.
    succeeds(&run(&["check", text(&pool)]));
    succeeds(&run(&["mount", text(&pool), text(&dir)]));
    for i in 0..synced {
        assert!(
            fs::read(dir.join(format!("f{i}"))).unwrap() == bytes,
            "f{i}"
        );
    }
    succeeds(&run(&["umount", text(&dir)]));
}
