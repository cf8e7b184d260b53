//! Power cuts, flipped bits and errors of the disk under the real daemon: a slice of
//! `scripts/powercut/run.py`, with a new seed each time, which it prints.

mod datastore;

use std::path::Path;
use std::process::Command;

use datastore::{cannot_mount, not_run};

/// Runs the script; true if it found nothing.
fn run(arguments: &[&str]) -> bool {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/powercut/run.py");
    let output = Command::new("python3")
        .arg(script)
        .args(arguments)
        .args(["--nodupe", env!("CARGO_BIN_EXE_nodupe")])
        .output()
        .expect("python3 was found before");
    eprintln!("{}", String::from_utf8_lossy(&output.stdout));
    eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    assert_ne!(output.status.code(), Some(2), "the script cannot run");
    output.status.success()
}

/// True, and the reason on stderr, where the script cannot run.
fn cannot_run(name: &str) -> bool {
    if let Some(why) = cannot_mount() {
        not_run(name, &why);
        return true;
    }
    for program in ["python3", "qemu-storage-daemon"] {
        if Command::new(program).arg("--version").output().is_err() {
            not_run(name, &format!("{program} is missing: run scripts/setup"));
            return true;
        }
    }
    false
}

#[test]
fn power_cuts_lose_nothing_that_was_acknowledged() {
    if !cannot_run("power cuts") {
        assert!(run(&["cuts", "--operations", "120", "--cuts", "16"]));
        // The harness has eyes: a disk that ignores a flush is noticed.
        assert!(run(&[
            "cuts",
            "--operations",
            "120",
            "--cuts",
            "16",
            "--lying"
        ]));
    }
}

#[test]
fn a_flipped_bit_is_never_read_as_data() {
    if !cannot_run("flips") {
        assert!(run(&["flips", "--operations", "120", "--flips", "20"]));
    }
}

#[test]
fn errors_of_the_disk_reach_whoever_waits_for_it() {
    if !cannot_run("errors of the disk") {
        assert!(run(&["errors", "--errors", "4"]));
    }
}
