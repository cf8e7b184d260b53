//! `nodupe scrub` as a user meets it: on a mounted pool and on one that is not.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use super::*;

/// Bytes that repeat nowhere.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..len / 8).flat_map(|_| next()).collect()
}

/// Flips a bit wherever the pool holds `block`.
fn damage(pool: &Path, block: &[u8]) {
    let bytes = fs::read(pool).unwrap();
    let file = File::options().write(true).open(pool).unwrap();
    let mut places = 0;
    for (at, chunk) in bytes.chunks(4096).enumerate() {
        if chunk == block {
            let byte = [chunk[77] ^ 1];
            file.write_all_at(&byte, (at * 4096 + 77) as u64).unwrap();
            places += 1;
        }
    }
    assert!(places > 0);
}

#[test]
fn damage_is_named_in_a_mounted_pool_and_in_one_that_is_not() {
    if !can_mount("damage_is_named_in_a_mounted_pool_and_in_one_that_is_not") {
        return;
    }
    let sandbox = Sandbox::new();
    let (pool, dir, log) = (
        sandbox.path("pool.nodupe"),
        sandbox.path("store"),
        sandbox.path("log"),
    );
    let mount = ["mount", text(&pool), text(&dir), "--log-file", text(&log)];
    succeeds(&run(&[&mount[..], &["--create", "--size", "256M"]].concat()));
    let bytes = noise(8 << 20);
    let gold = dir.join("gold.raw");
    fs::write(&gold, &bytes).unwrap();
    let pattern = dir.join("vm-{}.raw");
    succeeds(&run(&[
        "clone",
        text(&gold),
        text(&pattern),
        "--count",
        "3",
    ]));
    let done = run(&["scrub", text(&dir)]);
    succeeds(&done);
    assert!(stdout(&done).contains("is sound: 8"), "{}", stdout(&done));
    succeeds(&run(&["umount", text(&dir)]));
    let done = run(&["scrub", text(&pool)]);
    succeeds(&done);
    assert!(stdout(&done).contains("is sound: 8"), "{}", stdout(&done));

    damage(&pool, &bytes[5 << 20..][..4096]);
    names_all_offline(&pool);
    succeeds(&run(&mount));
    names_all_online(&pool, &dir);
    succeeds(&run(&["umount", text(&dir)]));
    let log = fs::read_to_string(&log).unwrap();
    for words in [
        "read failed: path=/vm-2.raw inode=",
        "offset=5242880",
        "scrub: a file is damaged: /gold.raw inode=",
        "scrub: a file is damaged: /vm-3.raw inode=",
    ] {
        assert!(log.contains(words), "no '{words}' in {log}");
    }
    // What it was is written down.
    let facts = json_of_status(&pool);
    assert_eq!(
        (&facts["state"], &facts["damaged_files"]),
        (&"finished".into(), &4.into())
    );
}

/// The four images that share the damaged block.
const DAMAGED: [&str; 4] = ["gold.raw", "vm-1.raw", "vm-2.raw", "vm-3.raw"];

fn names_all_offline(pool: &Path) {
    let offline = run(&["scrub", text(pool)]);
    assert_eq!(offline.status.code(), Some(1), "{}", stderr(&offline));
    let table = stdout(&offline);
    for name in DAMAGED {
        let start = format!("{}:/{name}", text(pool));
        let line = table.lines().find(|line| line.starts_with(&start));
        let words: Vec<_> = line.unwrap().split_whitespace().collect();
        assert_eq!(words[1..], ["5242880", "4096"], "{table}");
    }
    assert!(stderr(&offline).contains("4 files, 1 data block"));
    assert_eq!(
        stderr(&offline).matches("gold.raw").count(),
        0,
        "told twice"
    );
    let json: Value =
        serde_json::from_str(&stdout(&run(&["scrub", text(pool), "--json"]))).unwrap();
    assert_eq!(
        (&json["schema"], &json["clean"]),
        (&1.into(), &false.into())
    );
    assert_eq!(json["files"].as_array().unwrap().len(), 4);
}

fn names_all_online(pool: &Path, dir: &Path) {
    let error = fs::read(dir.join("vm-2.raw")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "EIO");
    let online = run(&["scrub", text(pool), "--json"]);
    assert_eq!(online.status.code(), Some(1));
    let json: Value = serde_json::from_str(&stdout(&online)).unwrap();
    let mut paths: Vec<&str> = json["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| file["paths"][0].as_str().unwrap())
        .collect();
    paths.sort_unstable();
    let wanted = DAMAGED.map(|name| dir.join(name));
    assert_eq!(paths, wanted.each_ref().map(|path| text(path)));
    let shown = stdout(&run(&["info", text(dir)]));
    assert!(shown.contains("4 files, 1 data block"), "{shown}");
    let shown = stdout(&run(&["scrub", "--status", text(dir)]));
    assert!(
        shown.contains("finished") && shown.contains("vm-3.raw"),
        "{shown}"
    );
}

fn json_of_status(pool: &Path) -> Value {
    json(
        &run(&["scrub", "--status", "--json", text(pool)]),
        &["state", "damaged_blocks"],
    )
}

#[test]
fn an_interrupted_scrub_goes_on() {
    if !can_mount("an_interrupted_scrub_goes_on") {
        return;
    }
    let sandbox = Sandbox::new();
    let (pool, dir) = (sandbox.path("pool.nodupe"), sandbox.path("store"));
    succeeds(&run(&[
        "mount",
        text(&pool),
        text(&dir),
        "--create",
        "--size",
        "256M",
    ]));
    fs::write(dir.join("file"), noise(64 << 20)).unwrap();
    File::open(&dir).unwrap().sync_all().unwrap();
    for target in [&dir, &pool] {
        if target == &pool {
            succeeds(&run(&["umount", text(&dir)]));
        }
        let scrub = program()
            .args(["scrub", text(target), "--rate", "24M/s"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Behind its first 16 MiB, long before its end.
        thread::sleep(Duration::from_millis(1500));
        let pid = scrub.id().to_string();
        let status = Command::new("kill").args(["-INT", &pid]).status().unwrap();
        assert!(status.success());
        let began = Instant::now();
        let output = scrub.wait_with_output().unwrap();
        assert!(began.elapsed() < Duration::from_secs(20));
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(
            message.contains("was stopped") && message.contains("go on: nodupe scrub"),
            "{message}"
        );
        if target == &dir {
            let rest = json(&run(&["scrub", text(&dir), "--json"]), &["resumed"]);
            assert_eq!(
                (&rest["resumed"], &rest["clean"]),
                (&true.into(), &true.into())
            );
        } else {
            let from = message.split("--from ").nth(1).unwrap().trim().to_owned();
            assert!(from.parse::<u64>().unwrap() > 0);
            succeeds(&run(&["scrub", text(&pool), "--from", &from]));
        }
    }
    fails(
        &run(&["scrub", text(&pool), "--background"]),
        1,
        &["not mounted"],
    );
    fails(&run(&["scrub", text(&pool), "--rate", "1K"]), 2, &["64K"]);
    fails(
        &run(&["scrub", text(&sandbox.dir("empty"))]),
        1,
        &["not in a mounted pool"],
    );
    let text_file = sandbox.file("text", b"no pool");
    fails(
        &run(&["scrub", text(&text_file)]),
        1,
        &["not a nodupe pool"],
    );
}
