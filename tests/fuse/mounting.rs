//! The mount itself: its end, its options, handles of files across it.

use std::fs::{self, File};
use std::io::Read;
use std::process::Command;

use nodupe::error::Kind;
use nodupe::fuse::{MountOptions, mount};

use crate::fixture::{Mounted, is_root, noise};
use crate::sys::{self, FileId};

fn mounts() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap()
}

#[test]
fn the_mount_shows_what_it_is() {
    let Some(mounted) = Mounted::with(|options| options.extra.push("noexec".into())) else {
        return;
    };
    let root = mounted.root();
    let mounts = mounts();
    let line = mounts
        .lines()
        .find(|line| line.split(' ').nth(4) == root.to_str())
        .unwrap();
    for part in [
        " fuse.nodupe ",
        "nosuid",
        "nodev",
        "noexec",
        "default_permissions",
        mounted.outside().join("pool").to_str().unwrap(),
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
}

#[test]
fn umount_by_somebody_else_ends_it_and_nothing_below_it() {
    if !is_root() {
        return;
    }
    let Some(mut mounted) = Mounted::new() else {
        return;
    };
    fs::write(mounted.path("file"), "kept").unwrap();
    // Another filesystem on the same directory, below: mount it, then the pool over it.
    mounted.end();
    let root = mounted.root();
    let tmpfs = Command::new("mount")
        .args(["-t", "tmpfs", "below"])
        .arg(&root)
        .status()
        .unwrap();
    assert!(tmpfs.success());
    mounted.begin();
    assert_eq!(fs::read(mounted.path("file")).unwrap(), b"kept");
    assert!(
        Command::new("umount")
            .arg(&root)
            .status()
            .unwrap()
            .success()
    );
    mounted.wait();
    assert_eq!(mounts().matches(root.to_str().unwrap()).count(), 1);
    assert!(
        Command::new("umount")
            .arg(&root)
            .status()
            .unwrap()
            .success()
    );
    mounted.begin();
    assert_eq!(fs::read(mounted.path("file")).unwrap(), b"kept");
}

#[test]
fn a_mount_in_use_ends_with_its_last_user() {
    let Some(mut mounted) = Mounted::new() else {
        return;
    };
    fs::write(mounted.path("file"), noise(1, 1_000_000)).unwrap();
    let mut open = File::open(mounted.path("file")).unwrap();
    mounted.unmount();
    assert!(!mounted.path("file").exists());
    let mut read = Vec::new();
    open.read_to_end(&mut read).unwrap();
    assert!(read == noise(1, 1_000_000));
    drop(open);
    mounted.wait();
    mounted.begin();
    assert!(fs::read(mounted.path("file")).unwrap() == noise(1, 1_000_000));
}

#[test]
fn what_cannot_be_mounted_is_refused() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let attempt = |dir: &std::path::Path, change: fn(&mut MountOptions)| {
        let mut options = MountOptions::new("/pool");
        change(&mut options);
        // One that is mounted after all is unmounted, and the test fails.
        mount(mounted.pool().clone(), dir, &options, |unmounter| {
            unmounter.unmount().unwrap();
        })
        .unwrap_err()
    };
    let missing = mounted.outside().join("missing");
    let error = attempt(&missing, |_| ());
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.to_string().contains("missing"), "{error}");
    let error = attempt(&mounted.outside().join("pool"), |_| ());
    assert_eq!(error.kind(), Kind::NotDirectory);
    let error = attempt(mounted.outside(), |options| options.threads = 0);
    assert_eq!(error.kind(), Kind::Invalid);
    let error = attempt(mounted.outside(), |options| options.extra.push("no".into()));
    assert_eq!(error.kind(), Kind::Invalid);
}

/// What an NFS server or a backup program does: a file by its handle, with nothing cached.
#[test]
fn file_handles_outlive_the_mount() {
    if !is_root() {
        return;
    }
    let Some(mounted) = Mounted::new() else {
        return;
    };
    fs::create_dir(mounted.path("dir")).unwrap();
    fs::write(mounted.path("dir/file"), "by handle").unwrap();
    fs::write(mounted.path("gone"), "").unwrap();
    let file = FileId::of(&mounted.path("dir/file"));
    let dir = FileId::of(&mounted.path("dir"));
    let gone = FileId::of(&mounted.path("gone"));
    fs::remove_file(mounted.path("gone")).unwrap();
    let mounted = mounted.remount();
    let mut text = String::new();
    let root = File::open(mounted.root()).unwrap();
    let mut opened = file.open(&root).unwrap();
    opened.read_to_string(&mut text).unwrap();
    assert_eq!(text, "by handle");
    assert!(dir.open(&root).unwrap().metadata().unwrap().is_dir());
    let error = gone.open(&root).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
    // Another file in its place is another file.
    drop(opened);
    fs::remove_file(mounted.path("dir/file")).unwrap();
    fs::write(mounted.path("dir/file"), "another").unwrap();
    drop(root);
    let mounted = mounted.remount();
    let root = File::open(mounted.root()).unwrap();
    let error = file.open(&root).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
    assert_eq!(sys::uid(), 0);
}
