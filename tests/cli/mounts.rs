//! Real mounts: the way a user takes, and what happens when it goes wrong.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::*;

/// Longest wait for anything: generous, because the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

#[track_caller]
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A pool in a new sandbox, mounted in the background.
fn mounted() -> (Sandbox, PathBuf, PathBuf) {
    let sandbox = Sandbox::new();
    let (pool, dir) = (sandbox.path("pool.nodupe"), sandbox.path("store"));
    let output = run(&[
        "mount",
        text(&pool),
        text(&dir),
        "--create",
        "--size",
        "256M",
    ]);
    succeeds(&output);
    assert!(stderr(&output).contains("created the pool"));
    (sandbox, pool, dir)
}

fn pid_of(dir: &Path) -> u32 {
    let facts = json(&run(&["info", text(dir), "--json"]), &["pid"]);
    u32::try_from(facts["pid"].as_u64().unwrap()).unwrap()
}

fn is_alive(pid: u32) -> bool {
    // A zombie has ended, whoever does not collect it.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap_or("")
            .trim()
            .starts_with('Z')
    })
}

fn signal(pid: u32, signal: &str) {
    let status = Command::new("kill")
        .args([signal, &pid.to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

/// Bytes that do not repeat within a block.
fn sample(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
}

#[test]
fn create_mount_copy_clone_df_umount_check() {
    if !can_mount("create_mount_copy_clone_df_umount_check") {
        return;
    }
    let (_sandbox, pool, dir) = mounted();
    let bytes = sample(8 << 20);
    let gold = dir.join("gold.raw");
    fs::write(&gold, &bytes).unwrap();
    // fsync of the root directory makes the whole pool durable.
    File::open(&dir).unwrap().sync_all().unwrap();
    let used = |target: &Path| {
        let df = json(&run(&["df", text(target), "--json"]), &["pools"]);
        assert_eq!(df["pools"][0]["mount"], text(&dir));
        df["pools"][0]["used"].as_u64().unwrap()
    };
    let before = used(&dir);
    let copy = dir.join("copy.raw");
    let status = Command::new("cp").args([&gold, &copy]).status().unwrap();
    assert!(status.success());
    let pattern = dir.join("vm-{}.raw");
    let made = json(
        &run(&[
            "clone",
            text(&gold),
            text(&pattern),
            "--count",
            "3",
            "--json",
        ]),
        &["source", "seconds"],
    );
    assert_eq!(
        made["clones"],
        serde_json::json!(["vm-1.raw", "vm-2.raw", "vm-3.raw"])
    );
    File::open(&dir).unwrap().sync_all().unwrap();
    for name in ["copy.raw", "vm-1.raw", "vm-2.raw", "vm-3.raw"] {
        assert!(fs::read(dir.join(name)).unwrap() == bytes, "{name} differs");
    }
    assert!(used(&pool) < before + (4 << 20), "the clones took space");
    // Its exit code depends on the mounts of others, too.
    let table = run(&["df"]);
    assert!(stdout(&table).contains(text(&dir)), "{}", stdout(&table));

    let file = json(&run(&["df", text(&copy), "--json"]), &["files"]);
    assert_eq!(file["files"][0]["size"], bytes.len());
    let facts = json(&run(&["info", text(&gold), "--json"]), &["file", "extents"]);
    assert_eq!(facts["exclusive"], 0);

    let pid = pid_of(&dir);
    succeeds(&run(&["umount", text(&dir)]));
    assert!(!is_alive(pid), "umount returned before the daemon had gone");
    let facts = json(&run(&["info", text(&pool), "--json"]), &[]);
    assert_eq!(facts["clean"], true);
    succeeds(&run(&["check", text(&pool)]));
}

#[test]
fn clones_are_made_in_a_pool_that_is_not_mounted() {
    if !can_mount("clones_are_made_in_a_pool_that_is_not_mounted") {
        return;
    }
    let (_sandbox, pool, dir) = mounted();
    let bytes = sample(1 << 20);
    fs::create_dir(dir.join("set")).unwrap();
    fs::write(dir.join("set/gold.raw"), &bytes).unwrap();
    succeeds(&run(&["umount", text(&dir)]));

    let inner = |path: &str| format!("{}:{path}", text(&pool));
    succeeds(&run(&["clone", &inner("/set/gold.raw"), &inner("/a.raw")]));
    succeeds(&run(&[
        "clone",
        &inner("/set"),
        &inner("/set-{}"),
        "--count",
        "2",
    ]));
    let taken = run(&["clone", &inner("/set/gold.raw"), &inner("/a.raw")]);
    fails(&taken, 1, &["a.raw", "nothing was made"]);
    let none = run(&["clone", &inner("/none"), &inner("/b")]);
    fails(&none, 1, &["/none"]);
    let other = dir.join("c.raw");
    fails(
        &run(&["clone", &inner("/a.raw"), text(&other)]),
        2,
        &["not in a pool"],
    );
    let facts = json(&run(&["info", &inner("/a.raw"), "--json"]), &["origin"]);
    assert_eq!(facts["size"], bytes.len());
    assert!(!facts["origin"].is_null());
    succeeds(&run(&["check", text(&pool)]));

    succeeds(&run(&["mount", text(&pool), text(&dir)]));
    for name in ["a.raw", "set-1/gold.raw", "set-2/gold.raw"] {
        assert!(fs::read(dir.join(name)).unwrap() == bytes, "{name} differs");
    }
    succeeds(&run(&["umount", text(&dir)]));
}

#[test]
fn clones_that_cannot_be_made_are_refused() {
    if !can_mount("clones_that_cannot_be_made_are_refused") {
        return;
    }
    let (sandbox, _pool, dir) = mounted();
    let (gold, vm) = (dir.join("gold"), dir.join("vm"));
    fs::write(&gold, "gold").unwrap();
    fs::write(&vm, "vm").unwrap();
    let (gold, vm) = (text(&gold), text(&vm));
    fails(
        &run(&["clone", gold, vm]),
        1,
        &[gold, vm, "nothing was made"],
    );
    assert_eq!(fs::read(vm).unwrap(), b"vm");
    let outside = sandbox.path("outside");
    fails(
        &run(&["clone", gold, text(&outside)]),
        1,
        &["not in the same pool"],
    );
    let missing = dir.join("no/such/vm");
    fails(&run(&["clone", gold, text(&missing)]), 1, &["mkdir -p"]);
    fails(&run(&["clone", gold, vm, "--count", "2"]), 2, &["{}"]);
    // All or none: number 2 exists.
    fs::write(dir.join("n2"), "").unwrap();
    let pattern = dir.join("n{}");
    fails(
        &run(&["clone", gold, text(&pattern), "--count", "3"]),
        1,
        &["nothing was made"],
    );
    assert!(!dir.join("n1").exists() && !dir.join("n3").exists());
    succeeds(&run(&["umount", text(&dir)]));
}

#[test]
fn a_mounted_pool_is_protected() {
    if !can_mount("a_mounted_pool_is_protected") {
        return;
    }
    let (sandbox, pool, dir) = mounted();
    let other = sandbox.dir("other");
    let pid = pid_of(&dir).to_string();
    for args in [
        vec!["mount", text(&pool), text(&other)],
        vec!["check", text(&pool)],
        vec!["check", text(&pool), "--repair", "--yes"],
        vec!["create", text(&pool), "--force"],
    ] {
        fails(
            &run(&args),
            if args[0] == "check" { 3 } else { 1 },
            &["in use", &pid, text(&dir), "nodupe umount"],
        );
    }
    let second = sandbox.path("second");
    let taken = run(&["mount", text(&second), text(&dir), "--create"]);
    fails(&taken, 1, &[text(&pool), "nodupe umount"]);
    assert!(!second.exists());
    fs::write(dir.join("f"), "still works").unwrap();

    let mut user = Command::new("sleep")
        .arg("1000")
        .current_dir(&dir)
        .spawn()
        .unwrap();
    let busy = run(&["umount", text(&dir)]);
    let user_pid = user.id().to_string();
    user.kill().unwrap();
    user.wait().unwrap();
    fails(&busy, 1, &["busy", "sleep", &user_pid]);
    assert_eq!(fs::read(dir.join("f")).unwrap(), b"still works");
    succeeds(&run(&["umount", text(&dir)]));
}

#[test]
fn a_user_who_leaves_at_once_does_not_keep_a_mount() {
    if !can_mount("a_user_who_leaves_at_once_does_not_keep_a_mount") {
        return;
    }
    let (_sandbox, _pool, dir) = mounted();
    let passer = File::open(&dir).unwrap();
    let passing = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        drop(passer);
    });
    let output = run(&["umount", text(&dir)]);
    passing.join().unwrap();
    succeeds(&output);
}

#[test]
fn a_mount_left_by_a_killed_daemon_is_cleared() {
    if !can_mount("a_mount_left_by_a_killed_daemon_is_cleared") {
        return;
    }
    let (_sandbox, pool, dir) = mounted();
    let kill = || {
        let mut file = File::create(dir.join("f")).unwrap();
        file.write_all(b"synced").unwrap();
        file.sync_all().unwrap();
        drop(file);
        let pid = pid_of(&dir);
        signal(pid, "-KILL");
        wait_until("the daemon to die", || !is_alive(pid));
        wait_until("the mount to die", || fs::metadata(&dir).is_err());
    };
    kill();
    fails(
        &run(&["df", text(&dir)]),
        1,
        &["nobody serves", "nodupe umount"],
    );
    let again = run(&["mount", text(&pool), text(&dir)]);
    succeeds(&again);
    assert!(stderr(&again).contains("was cleared"), "{}", stderr(&again));
    assert_eq!(fs::read(dir.join("f")).unwrap(), b"synced");
    kill();
    let cleared = run(&["umount", text(&dir)]);
    succeeds(&cleared);
    assert!(
        stderr(&cleared).contains("was cleared"),
        "{}",
        stderr(&cleared)
    );
    let facts = json(&run(&["info", text(&pool), "--json"]), &[]);
    assert_eq!(facts["clean"], false);
    succeeds(&run(&["check", text(&pool)]));
}

#[test]
fn a_killed_daemon_is_replaced_at_once() {
    if !can_mount("a_killed_daemon_is_replaced_at_once") {
        return;
    }
    let (_sandbox, pool, dir) = mounted();
    for round in 0..20 {
        let text_now = format!("round {round}");
        let mut file = File::create(dir.join("f")).unwrap();
        file.write_all(text_now.as_bytes()).unwrap();
        file.sync_all().unwrap();
        signal(pid_of(&dir), "-KILL");
        // Nobody waits: the process may still hold the pool, and the mount still stand.
        drop(file);
        succeeds(&run(&["mount", text(&pool), text(&dir)]));
        assert_eq!(fs::read_to_string(dir.join("f")).unwrap(), text_now);
    }
    succeeds(&run(&["umount", text(&dir)]));
    succeeds(&run(&["check", text(&pool)]));
}

#[test]
fn what_nobody_synced_is_there_two_seconds_later() {
    if !can_mount("what_nobody_synced_is_there_two_seconds_later") {
        return;
    }
    let (_sandbox, pool, dir) = mounted();
    let bytes = sample(1 << 20);
    fs::write(dir.join("f"), &bytes).unwrap();
    fs::create_dir(dir.join("d")).unwrap();
    thread::sleep(Duration::from_millis(2500));
    signal(pid_of(&dir), "-KILL");
    succeeds(&run(&["mount", text(&pool), text(&dir)]));
    assert!(fs::read(dir.join("f")).unwrap() == bytes, "f differs");
    assert!(dir.join("d").is_dir());
    succeeds(&run(&["umount", text(&dir)]));
}

#[test]
fn a_pool_has_one_writer_by_whatever_name() {
    if !can_mount("a_pool_has_one_writer_by_whatever_name") {
        return;
    }
    let (sandbox, pool, dir) = mounted();
    let other = sandbox.dir("other");
    let (hard, soft) = (sandbox.path("hard"), sandbox.path("soft"));
    fs::hard_link(&pool, &hard).unwrap();
    std::os::unix::fs::symlink(&pool, &soft).unwrap();
    for name in [&hard, &soft] {
        fails(&run(&["mount", text(name), text(&other)]), 1, &["in use"]);
        fails(&run(&["check", text(name)]), 3, &["in use"]);
    }
    let made = Command::new("losetup")
        .args(["--find", "--show", text(&pool)])
        .output();
    match made {
        Ok(output) if output.status.success() => {
            // The lock of the file does not hold there; the heartbeat does.
            let device = stdout(&output).trim().to_owned();
            let refused = run(&["mount", &device, text(&other)]);
            let detached = Command::new("losetup").args(["-d", &device]).status();
            fails(&refused, 1, &["in use", &pid_of(&dir).to_string()]);
            assert!(detached.unwrap().success());
        }
        _ => eprintln!("the loop device part was NOT RUN: losetup makes none here"),
    }
    succeeds(&run(&["umount", text(&dir)]));
}

#[test]
fn a_stopped_daemon_that_was_replaced_acknowledges_nothing() {
    const TEST: &str = "a_stopped_daemon_that_was_replaced_acknowledges_nothing";
    if !can_mount(TEST) {
        return;
    }
    let (sandbox, pool, dir) = mounted();
    let made = Command::new("losetup")
        .args(["--find", "--show", text(&pool)])
        .output();
    let Ok(made) = made.as_ref().map(stdout).map(|text| text.trim().to_owned()) else {
        return;
    };
    if made.is_empty() {
        eprintln!("{TEST}: NOT RUN: losetup makes no device here");
        succeeds(&run(&["umount", text(&dir)]));
        return;
    }
    fs::write(dir.join("f"), "first").unwrap();
    File::open(&dir).unwrap().sync_all().unwrap();
    let stopped = pid_of(&dir);
    signal(stopped, "-STOP");
    let other = sandbox.dir("other");
    let taken = run(&["mount", &made, text(&other)]);
    // Before anything is asserted: a stopped daemon would hang whoever looks at its mount.
    signal(stopped, "-CONT");
    succeeds(&taken);
    assert_eq!(fs::read_to_string(other.join("f")).unwrap(), "first");
    fs::write(other.join("f"), "second").unwrap();
    File::open(&other).unwrap().sync_all().unwrap();
    let late = fs::write(dir.join("late"), "late").and_then(|()| File::open(&dir)?.sync_all());
    assert_eq!(late.unwrap_err().raw_os_error(), Some(5), "EIO");
    let facts = json(&run(&["df", text(&dir), "--json"]), &["pools"]);
    let why = facts["pools"][0]["poisoned"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    assert!(why.contains("taken the pool over"), "{why}");
    let left = run(&["umount", text(&dir)]);
    assert!(!is_alive(stopped), "{}", stderr(&left));
    succeeds(&run(&["umount", text(&other)]));
    assert!(
        Command::new("losetup")
            .args(["-d", &made])
            .status()
            .unwrap()
            .success()
    );
    succeeds(&run(&["check", text(&pool)]));
}

/// Waits for a daemon to end with exit code 0 and returns what it logged.
#[track_caller]
fn ends_well(daemon: Child) -> String {
    let output = daemon.wait_with_output().unwrap();
    let log = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{log}");
    log
}

/// A daemon in the foreground, once its mount answers.
fn foreground(pool: &Path, dir: &Path) -> Child {
    let child = program()
        .args(["mount", text(pool), text(dir), "--foreground"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("the mount", || run(&["info", text(dir)]).status.success());
    child
}

#[test]
fn termination_signals_close_the_pool() {
    if !can_mount("termination_signals_close_the_pool") {
        return;
    }
    let sandbox = Sandbox::new();
    let (pool, dir) = (sandbox.pool(), sandbox.dir("d"));
    for name in ["-TERM", "-INT", "-HUP"] {
        let daemon = foreground(&pool, &dir);
        fs::write(dir.join("f"), name).unwrap();
        signal(daemon.id(), name);
        let log = ends_well(daemon);
        assert!(
            log.contains("mounted on") && log.contains("closed cleanly"),
            "{log}"
        );
        let facts = json(&run(&["info", text(&pool), "--json"]), &[]);
        assert_eq!(
            (&facts["clean"], &facts["mount"]),
            (&Value::Bool(true), &Value::Null)
        );
    }
    // With an open file: the mount goes at once, the process when the file is closed.
    let mut daemon = foreground(&pool, &dir);
    fs::write(dir.join("f"), "open").unwrap();
    let mut file = File::open(dir.join("f")).unwrap();
    signal(daemon.id(), "-TERM");
    wait_until("the mount to go", || {
        fs::read_dir(&dir).unwrap().next().is_none()
    });
    let mut content = String::new();
    file.read_to_string(&mut content).unwrap();
    assert_eq!(content, "open");
    assert!(daemon.try_wait().unwrap().is_none());
    drop(file);
    ends_well(daemon);
    // The second signal does not wait for the users.
    let daemon = foreground(&pool, &dir);
    fs::write(dir.join("f"), "open").unwrap();
    let file = File::open(dir.join("f")).unwrap();
    signal(daemon.id(), "-TERM");
    wait_until("the mount to go", || {
        fs::read_dir(&dir).unwrap().next().is_none()
    });
    signal(daemon.id(), "-TERM");
    ends_well(daemon);
    drop(file);
    let facts = json(&run(&["info", text(&pool), "--json"]), &[]);
    assert_eq!(facts["clean"], true);
}

#[test]
fn a_read_only_mount_changes_nothing() {
    if !can_mount("a_read_only_mount_changes_nothing") {
        return;
    }
    let (sandbox, pool, dir) = mounted();
    fs::write(dir.join("f"), "data").unwrap();
    succeeds(&run(&["umount", text(&dir)]));
    let before = state(&pool);
    let log = sandbox.path("log");
    let options = [
        "-o",
        "ro,noatime,nofail,x-systemd.automount",
        "--log-file",
        text(&log),
    ];
    succeeds(&run(
        &[&["mount", text(&pool), text(&dir)], &options[..]].concat()
    ));
    assert_eq!(fs::read(dir.join("f")).unwrap(), b"data");
    let error = fs::write(dir.join("g"), "x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    succeeds(&run(&["umount", text(&dir)]));
    assert_eq!(state(&pool), before);
    let log = fs::read_to_string(&log).unwrap();
    assert!(
        log.contains("mounted on") && log.contains("closed cleanly"),
        "{log}"
    );
}

/// A kernel that asks in a new way first must not take two refusals at once for a daemon that can
/// copy in no way.
#[test]
fn copies_that_begin_together_in_a_new_mount_share() {
    const COPIES: usize = 6;
    if !can_mount("copies_that_begin_together_in_a_new_mount_share") {
        return;
    }
    let (_sandbox, pool, dir) = mounted();
    let gold = dir.join("gold.raw");
    fs::write(&gold, sample(8 << 20)).unwrap();
    let used = || {
        File::open(&dir).unwrap().sync_all().unwrap();
        let df = json(&run(&["df", text(&pool), "--json"]), &["pools"]);
        df["pools"][0]["used"].as_u64().unwrap()
    };
    let before = used();
    for round in 0..4 {
        succeeds(&run(&["umount", text(&dir)]));
        succeeds(&run(&["mount", text(&pool), text(&dir)]));
        let start = std::sync::Barrier::new(COPIES);
        thread::scope(|scope| {
            for number in 0..COPIES {
                let (start, gold, dir) = (&start, &gold, &dir);
                scope.spawn(move || {
                    start.wait();
                    fs::copy(gold, dir.join(format!("{round}-{number}.raw"))).unwrap();
                });
            }
        });
        fs::copy(&gold, dir.join(format!("{round}-after.raw"))).unwrap();
    }
    assert!(used() < before + (4 << 20), "the copies took space");
}
