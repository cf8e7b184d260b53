//! Bad input: a clear error each, exit code 1, and nothing is damaged.

use std::fs::{self, File};

use super::*;

/// Verbs that need a pool, with a pool at `pool` and a directory at `dir`.
fn pool_verbs<'a>(pool: &'a str, dir: &'a str) -> [Vec<&'a str>; 4] {
    [
        vec!["mount", pool, dir],
        vec!["info", pool],
        vec!["df", pool],
        vec!["check", pool],
    ]
}

/// `check` tells that it could not run from findings.
fn code_of(args: &[&str]) -> i32 {
    if args[0] == "check" { 3 } else { 1 }
}

#[test]
fn a_missing_pool_is_told() {
    let sandbox = Sandbox::new();
    let (pool, dir) = (sandbox.path("none"), sandbox.dir("d"));
    for args in pool_verbs(text(&pool), text(&dir)) {
        fails(&run(&args), code_of(&args), &["there is no", text(&pool)]);
        assert!(!pool.exists());
    }
    fails(
        &run(&["clone", text(&pool), text(&dir)]),
        1,
        &["there is no", text(&pool)],
    );
    fails(&run(&["umount", text(&pool)]), 1, &[text(&pool)]);
    fails(
        &run(&["umount", text(&dir)]),
        1,
        &["no nodupe pool is mounted", "nodupe df"],
    );
}

#[test]
fn what_is_no_pool_is_refused() {
    let sandbox = Sandbox::new();
    let dir = sandbox.dir("d");
    let noise: Vec<u8> = (0..300_000_u32).map(|i| (i * 7 % 251) as u8).collect();
    for (name, bytes) in [
        ("text", &b"this is no pool\n"[..]),
        ("noise", &noise),
        ("zeros", &[0; 1 << 20]),
    ] {
        let file = sandbox.file(name, bytes);
        let before = state(&file);
        for args in pool_verbs(text(&file), text(&dir)) {
            fails(
                &run(&args),
                code_of(&args),
                &["not a nodupe pool", text(&file)],
            );
            assert_eq!(state(&file), before);
        }
    }
    for args in pool_verbs(text(&dir), text(&dir)) {
        fails(&run(&args), code_of(&args), &[text(&dir)]);
    }
    fails(
        &run(&["clone", text(&sandbox.path("text")), text(&dir)]),
        1,
        &["not in a mounted pool"],
    );
}

#[test]
fn a_truncated_pool_is_refused() {
    let sandbox = Sandbox::new();
    let (pool, dir) = (sandbox.pool(), sandbox.dir("d"));
    let file = File::options().write(true).open(&pool).unwrap();
    file.set_len(32 << 20).unwrap();
    let before = state(&pool);
    for args in [
        vec!["mount", text(&pool), text(&dir)],
        vec!["df", text(&pool)],
        vec!["check", text(&pool)],
    ] {
        fails(
            &run(&args),
            code_of(&args),
            &[text(&pool), "truncated", "backup"],
        );
        assert_eq!(state(&pool), before);
    }
}

#[test]
fn a_newer_format_is_refused() {
    const BLOCK: usize = 4096;
    const VERSION_AT: usize = 8;
    const CRC_AT: usize = 12;
    let sandbox = Sandbox::new();
    let (pool, dir) = (sandbox.pool(), sandbox.dir("d"));
    let mut bytes = fs::read(&pool).unwrap();
    let blocks = bytes.len() / BLOCK;
    // Both slots and their copies at the end, see docs/format.md.
    for block in [0, 1, blocks - 2, blocks - 1] {
        let block = &mut bytes[block * BLOCK..][..BLOCK];
        if block[1..7] == *b"NODUPE" {
            block[VERSION_AT] = 99;
            block[CRC_AT..CRC_AT + 4].fill(0);
            let crc = crc_of(block);
            for (byte, at) in block[CRC_AT..].iter_mut().zip(0..4) {
                *byte = (crc >> (8 * at)) as u8;
            }
        }
    }
    fs::write(&pool, bytes).unwrap();
    let before = state(&pool);
    for args in pool_verbs(text(&pool), text(&dir)) {
        fails(&run(&args), code_of(&args), &[text(&pool), "99", "newer"]);
        assert_eq!(state(&pool), before);
    }
}

#[test]
fn a_pool_in_use_is_refused() {
    let sandbox = Sandbox::new();
    let (pool, dir) = (sandbox.pool(), sandbox.dir("d"));
    let holder = File::options().write(true).open(&pool).unwrap();
    holder.lock().unwrap();
    let before = state(&pool);
    for args in [
        vec!["mount", text(&pool), text(&dir)],
        vec!["check", text(&pool)],
        vec!["create", text(&pool), "--force"],
    ] {
        fails(&run(&args), code_of(&args), &["in use", text(&pool)]);
        assert_eq!(state(&pool), before);
    }
    // Its facts can be read nevertheless.
    succeeds(&run(&["info", text(&pool)]));
}

#[test]
fn a_full_host_disk_is_told() {
    let sandbox = Sandbox::new();
    let Some(disk) = tmpfs(&sandbox, "a_full_host_disk_is_told", "4M") else {
        return;
    };
    let (pool, dir) = (disk.join("p"), sandbox.dir("d"));
    for args in [
        vec!["create", text(&pool), "--size", SIZE],
        vec!["mount", text(&pool), text(&dir), "--create", "--size", SIZE],
    ] {
        fails(&run(&args), code_of(&args), &[text(&pool), "No space left"]);
        assert_eq!(fs::read_dir(&disk).unwrap().count(), 0);
    }
}

#[test]
fn directories_that_cannot_be_mounted_on_are_refused() {
    let sandbox = Sandbox::new();
    let pool = sandbox.path("p");
    let full = sandbox.dir("full");
    fs::write(full.join("f"), "f").unwrap();
    let file = sandbox.file("file", b"");
    let none = sandbox.path("none");
    for (dir, words) in [
        (text(&none), &["No such file", "--create"][..]),
        (text(&file), &["not a directory"]),
        (text(&full), &["not empty", "-o nonempty"]),
        ("/proc", &["mount point already", "another directory"]),
    ] {
        let create: &[&str] = if dir == text(&none) {
            &[]
        } else {
            &["--create"]
        };
        let args = [&["mount", text(&pool), dir], create].concat();
        fails(&run(&args), 1, &[&[dir], words].concat());
        assert!(!pool.exists() && !none.exists());
    }
}
