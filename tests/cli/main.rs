//! The contract of the program: every verb's help, exit codes, messages, JSON keys, and that bad
//! input damages nothing. Runs the real binary; tests that need /dev/fuse or root say so when
//! they cannot run.
#![cfg(feature = "fuse")]
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

mod bad_input;
mod check;
mod device_errors;
mod mounts;
mod pools;
mod scrub;

const VERBS: [&str; 13] = [
    "create", "mount", "umount", "grow", "clone", "df", "info", "import", "inspect", "convert",
    "export", "check", "scrub",
];

/// Smallest pool, so that the tests are quick.
const SIZE: &str = "64M";

/// A directory of its own for each test; what is still mounted in it goes at the end.
struct Sandbox(tempfile::TempDir);

impl Sandbox {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().canonicalize().unwrap().join(name)
    }

    fn dir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).unwrap();
        path
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// A new, empty pool.
    fn pool(&self) -> PathBuf {
        let path = self.path("pool.nodupe");
        succeeds(&run(&["create", text(&path), "--size", SIZE]));
        path
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let below = self.0.path().to_string_lossy().into_owned();
        for dir in mountinfo
            .lines()
            .rev()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|dir| dir.starts_with(&below))
        {
            // A failed test may have left anything: best effort.
            drop(Command::new("umount").args(["-l", dir]).status());
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nodupe"));
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    program().args(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[track_caller]
fn succeeds(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
}

/// Fails with `code`, says each of `words` on standard error, and prints no data.
#[track_caller]
fn fails(output: &Output, code: i32, words: &[&str]) {
    let message = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert!(message.starts_with("nodupe: "), "{message}");
    for word in words {
        assert!(message.contains(word), "no '{word}' in: {message}");
    }
    assert_eq!(stdout(output), "");
}

#[track_caller]
fn json(output: &Output, keys: &[&str]) -> Value {
    succeeds(output);
    let value: Value = serde_json::from_str(&stdout(output)).unwrap();
    assert_eq!(value["schema"], 1);
    for key in keys {
        assert!(value.get(key).is_some(), "no key '{key}' in {value}");
    }
    value
}

/// Everything that a failed verb must leave alone: bytes, length, time of change.
fn state(path: &Path) -> (u64, i64, i64, u32) {
    let metadata = fs::metadata(path).unwrap();
    let crc = crc_of(&fs::read(path).unwrap());
    (metadata.len(), metadata.mtime(), metadata.mtime_nsec(), crc)
}

fn crc_of(bytes: &[u8]) -> u32 {
    let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes);
    u32::try_from(crc).unwrap()
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

/// True if this machine can mount; says why not.
fn can_mount(test: &str) -> bool {
    let why = if !Path::new("/dev/fuse").exists() {
        "there is no /dev/fuse"
    } else if !is_root() && Command::new("fusermount3").arg("-V").output().is_err() {
        "it needs root or fusermount3"
    } else {
        return true;
    };
    eprintln!("{test}: not run: {why}");
    false
}

/// A small tmpfs below the sandbox, or why there is none.
fn tmpfs(sandbox: &Sandbox, test: &str, size: &str) -> Option<PathBuf> {
    let dir = sandbox.dir("tmpfs");
    let options = format!("size={size}");
    let mounted = is_root()
        && Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs", text(&dir)])
            .status()
            .is_ok_and(|status| status.success());
    if !mounted {
        eprintln!("{test}: not run: it needs root, to mount a tmpfs");
    }
    mounted.then_some(dir)
}

#[test]
fn every_verb_has_help_with_an_example() {
    let top = run(&["--help"]);
    succeeds(&top);
    for verb in VERBS {
        assert!(stdout(&top).contains(&format!("\n  {verb}")), "{verb}");
        let help = run(&[verb, "--help"]);
        succeeds(&help);
        let help = stdout(&help);
        let (_, examples) = help.rsplit_once("Examples:").unwrap();
        assert!(examples.contains(&format!("nodupe {verb}")), "{help}");
    }
    succeeds(&run(&["--version"]));
}

#[test]
fn wrong_command_lines_exit_2() {
    for verb in VERBS {
        fails(&run(&[verb, "--no-such-flag"]), 2, &["--no-such-flag"]);
        if verb != "df" {
            fails(&run(&[verb]), 2, &["required"]);
        }
    }
    let sandbox = Sandbox::new();
    let pool = sandbox.path("p");
    let pool = text(&pool);
    let cases: [(&[&str], &str); 12] = [
        (&[], "Usage"),
        (&["no-such-verb"], "no-such-verb"),
        (&["create", pool, "--size", "1M"], "64 MiB to 1 PiB"),
        (&["create", pool, "--size", "2P"], "64 MiB to 1 PiB"),
        (&["create", pool, "--size", "100GB"], "ambiguous"),
        (&["create", pool, "--journal-size", "1K"], "at least 1 MiB"),
        (&["mount", pool, "d", "-o", "frob"], "frob"),
        (&["mount", pool, "d", "-o", "ro,threads=x"], "threads=x"),
        (&["mount", pool, "d", "--size", "64M"], "--create"),
        (
            &["mount", pool, "d", "--create", "--read-only"],
            "read-only",
        ),
        (&["mount", pool, "d", "--cache-size", "1"], "16 MiB"),
        (&["clone", "a", "b{}", "--count", "0"], "--count"),
    ];
    for (args, word) in cases {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
    }
    assert!(!Path::new(pool).exists());
}

#[test]
fn a_reader_that_has_gone_is_no_error() {
    for args in [&["df", "--json"][..], &["--help"]] {
        let mut child = program()
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        assert_eq!(child.wait().unwrap().code(), Some(0), "{args:?}");
    }
}
