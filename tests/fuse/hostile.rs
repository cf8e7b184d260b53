//! Forged pools under the real daemon: it refuses them or shows what it can, and lives on.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nodupe::device::{BlockDevice, SimDevice, SplitMix64};

use crate::fixture::{Mounted, is_root};
use crate::fuzz::forge::Forge;
use crate::fuzz::template::templates;

/// Pools that are tried; `tests/hostile.rs` tries far more without a mount.
const POOLS: u64 = 24;

fn store(device: &SimDevice, path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(device.len()).unwrap();
    let mut bytes = vec![0; 1 << 20];
    for at in (0..device.len()).step_by(1 << 20) {
        device.read_at(at, &mut bytes).unwrap();
        if bytes.iter().any(|byte| *byte != 0) {
            file.write_all_at(&bytes, at).unwrap();
        }
    }
}

/// Runs the program for at most half a minute.
fn nodupe(args: &[&Path]) -> Output {
    let mut command = Command::new("timeout");
    command.arg("30").arg(env!("CARGO_BIN_EXE_nodupe"));
    command.args(args).stdin(Stdio::null()).output().unwrap()
}

/// Runs a shell script on `$1` for at most half a minute; what it says and whether its steps
/// succeed is not asked.
fn shell(script: &str, dir: &Path) {
    let mut command = Command::new("timeout");
    command.args(["30", "sh", "-c", script, "sh"]).arg(dir);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert_ne!(output.status.code(), Some(124), "endless: {script}");
}

#[track_caller]
fn ended_by_itself(output: &Output) {
    let code = output.status.code();
    assert!(code.is_some_and(|code| code < 100), "{output:?}");
}

fn try_pool(pool: &Path, dir: &Path) -> bool {
    ended_by_itself(&nodupe(&["check".as_ref(), pool]));
    let mounted = nodupe(&["mount".as_ref(), pool, dir]);
    ended_by_itself(&mounted);
    if !mounted.status.success() {
        let message = String::from_utf8_lossy(&mounted.stderr).into_owned();
        assert!(message.contains("nodupe: "), "{message}");
        return false;
    }
    shell("find \"$1\" -xdev 2>&1 | head -c 200000", dir);
    shell(
        "find \"$1\" -xdev -type f -size -2M -exec cat {} + | head -c 9000000",
        dir,
    );
    shell(
        "getfattr -dR -m - \"$1\" 2>&1 | head -c 200000; df \"$1\"",
        dir,
    );
    shell(
        "head -c 300000 /dev/zero | tr '\\0' x > \"$1/new\"; sync \"$1/new\"",
        dir,
    );
    shell(
        "cp \"$1/image\" \"$1/copy\"; mv \"$1/copy\" \"$1/dir/\"; ln \"$1/image\" \"$1/l\"",
        dir,
    );
    shell("rm -rf \"$1/large\" \"$1/dir\" \"$1/link\"", dir);
    let alive = fs::metadata(dir);
    let died = alive.err().and_then(|error| error.raw_os_error()) == Some(libc::ENOTCONN);
    assert!(!died, "the daemon died");
    let mut unmount = nodupe(&["umount".as_ref(), dir]);
    ended_by_itself(&unmount);
    // A pool that ran into damage says so at the end, and is unmounted all the same.
    if !unmount.status.success() {
        unmount = Command::new("umount").arg(dir).output().unwrap();
        drop(unmount);
    }
    true
}

#[test]
fn the_daemon_survives_forged_pools() {
    if !is_root() {
        return;
    }
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let home = mounted.outside().to_owned();
    let (pool, dir) = (home.join("forged"), home.join("forged mount"));
    fs::create_dir(&dir).unwrap();
    let mut shown = 0;
    for seed in 0..POOLS {
        let mut rng = SplitMix64::new(seed);
        let template = &templates()[if seed % 4 == 3 { 2 } else { 0 }];
        let forge = Forge::new(&template.device, &template.nodes);
        if template.batches.is_empty() {
            for _ in 0..rng.below(2) + 1 {
                forge.change_node(&mut rng);
            }
        } else {
            let batch = template.batches[rng.index(template.batches.len())];
            forge.change_batch(batch, &mut rng);
        }
        store(&forge.device, &pool);
        shown += u64::from(try_pool(&pool, &dir));
    }
    eprintln!("{shown} of {POOLS} forged pools were mounted");
    assert!(shown > POOLS / 4, "{shown} pools were mounted");
}

/// A name is what another user chose: it must not move the cursor of who lists it.
#[test]
fn names_reach_no_terminal_raw() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let name = "a\u{1b}[31mred\r\n\u{9b}2J\u{202e}gpj";
    let (file, copy) = (mounted.path(name), mounted.path(&format!("copy {name}")));
    fs::write(&file, "x").unwrap();
    let none = mounted.path(&format!("none {name}"));
    let outputs = [
        nodupe(&["df".as_ref(), &file]),
        nodupe(&["info".as_ref(), &file]),
        nodupe(&["clone".as_ref(), &file, &copy]),
        nodupe(&["clone".as_ref(), &file, &copy]),
        nodupe(&["clone".as_ref(), &none, &copy]),
        nodupe(&["df".as_ref(), &none]),
        nodupe(&["check".as_ref(), &none]),
        nodupe(&["umount".as_ref(), &none]),
        nodupe(&["mount".as_ref(), &none, &none]),
        nodupe(&["create".as_ref(), &none.join(name)]),
    ];
    let mut told = 0;
    for output in outputs {
        for text in [&output.stdout, &output.stderr] {
            let text = String::from_utf8(text.clone()).unwrap();
            let raw = text.chars().find(|c| c.is_control() && *c != '\n');
            assert_eq!(raw, None, "{text:?}");
            assert!(!text.contains('\u{202e}'), "{text:?}");
            told += usize::from(text.contains("red"));
        }
    }
    assert!(told >= 9, "names are told: {told}");
}
