//! Names: rename with its flags, links, directories, special files, and what a remount keeps.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use crate::fixture::{Mounted, noise};
use crate::sys;

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn rename_replaces_refuses_and_swaps() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let (a, b, dir) = (mounted.path("a"), mounted.path("b"), mounted.path("dir"));
    write(&a, "a");
    write(&b, "b");
    fs::create_dir(&dir).unwrap();
    let error = sys::rename(&a, &b, libc::RENAME_NOREPLACE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    sys::rename(&a, &b, libc::RENAME_EXCHANGE).unwrap();
    assert_eq!((read(&a), read(&b)), ("b".into(), "a".into()));
    sys::rename(&a, &dir, libc::RENAME_EXCHANGE).unwrap();
    assert!(a.is_dir() && dir.is_file());
    sys::rename(&a, &dir, libc::RENAME_EXCHANGE).unwrap();
    let error = sys::rename(&a, &mounted.path("none"), libc::RENAME_EXCHANGE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    sys::rename(&a, &mounted.path("c"), libc::RENAME_NOREPLACE).unwrap();
    fs::rename(mounted.path("c"), &b).unwrap();
    assert_eq!(read(&b), "b");
    assert!(!mounted.path("c").exists());

    fs::rename(&b, dir.join("b")).unwrap();
    assert_eq!(read(&dir.join("b")), "b");
    let error = fs::rename(&dir, dir.join("b/under")).unwrap_err();
    assert!(
        [ErrorKind::NotADirectory, ErrorKind::InvalidInput].contains(&error.kind()),
        "{error}"
    );
    fs::create_dir(dir.join("sub")).unwrap();
    let error = fs::rename(&dir, dir.join("sub/dir")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    fs::create_dir(mounted.path("empty")).unwrap();
    let error = fs::rename(mounted.path("empty"), &dir).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DirectoryNotEmpty);
    fs::rename(&dir, mounted.path("empty")).unwrap();
    assert_eq!(read(&mounted.path("empty/b")), "b");
}

#[test]
fn a_replaced_file_stays_readable_where_it_is_open() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    write(&mounted.path("old"), "old");
    write(&mounted.path("new"), "new");
    let mut open = File::open(mounted.path("old")).unwrap();
    fs::rename(mounted.path("new"), mounted.path("old")).unwrap();
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert_eq!(text, "old");
    assert_eq!(open.metadata().unwrap().nlink(), 0);
    assert_eq!(read(&mounted.path("old")), "new");
}

#[test]
fn links_count_and_symlinks_point() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let (a, b) = (mounted.path("a"), mounted.path("b"));
    write(&a, "shared");
    fs::hard_link(&a, &b).unwrap();
    let (x, y) = (fs::metadata(&a).unwrap(), fs::metadata(&b).unwrap());
    assert_eq!((x.ino(), x.nlink()), (y.ino(), 2));
    let error = fs::hard_link(&a, &b).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    fs::remove_file(&a).unwrap();
    assert_eq!(read(&b), "shared");
    assert_eq!(fs::metadata(&b).unwrap().nlink(), 1);

    let link = mounted.path("link");
    symlink("b", &link).unwrap();
    assert_eq!(read(&link), "shared");
    assert_eq!(fs::read_link(&link).unwrap(), Path::new("b"));
    assert_eq!(fs::symlink_metadata(&link).unwrap().len(), 1);
    let long = "x".repeat(4095);
    symlink(&long, mounted.path("long")).unwrap();
    assert_eq!(
        fs::read_link(mounted.path("long")).unwrap(),
        Path::new(&long)
    );
}

#[test]
fn directories_count_their_children() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let dir = mounted.path("dir");
    fs::create_dir(&dir).unwrap();
    assert_eq!(fs::metadata(&dir).unwrap().nlink(), 2);
    fs::create_dir(dir.join("sub")).unwrap();
    assert_eq!(fs::metadata(&dir).unwrap().nlink(), 3);
    let error = fs::remove_dir(&dir).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DirectoryNotEmpty);
    assert!(fs::remove_file(&dir).is_err());
    let parent = fs::metadata(dir.join("sub/..")).unwrap().ino();
    assert_eq!(parent, fs::metadata(&dir).unwrap().ino());
    fs::remove_dir(dir.join("sub")).unwrap();
    fs::remove_dir(&dir).unwrap();
    assert!(!dir.exists());
}

#[test]
fn names_have_255_bytes_of_any_kind() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let longest = mounted.path(&"n".repeat(255));
    write(&longest, "longest");
    assert_eq!(read(&longest), "longest");
    let error = fs::write(mounted.path(&"n".repeat(256)), "").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidFilename);
    let raw = mounted.root().join(OsStr::from_bytes(b"\xff\xfe\n\x01"));
    write(&raw, "raw");
    let names: Vec<_> = fs::read_dir(mounted.root())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(names.contains(&raw) && names.contains(&longest));
}

#[test]
fn a_big_directory_is_listed_while_it_is_emptied() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    const ENTRIES: usize = 5000;
    let dir = mounted.path("many");
    fs::create_dir(&dir).unwrap();
    for number in 0..ENTRIES {
        File::create_new(dir.join(format!("entry-{number:05}"))).unwrap();
    }
    let all: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(all.len(), ENTRIES);
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), ENTRIES);
    let mut seen = BTreeSet::new();
    for entry in fs::read_dir(&dir).unwrap() {
        let entry = entry.unwrap();
        assert!(seen.insert(entry.file_name()), "{entry:?} was listed twice");
        fs::remove_file(entry.path()).unwrap();
    }
    assert_eq!(seen.len(), ENTRIES);
    fs::remove_dir(&dir).unwrap();
}

#[test]
fn special_files_are_made_and_used() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let fifo = mounted.path("fifo");
    sys::mknod(&fifo, libc::S_IFIFO | 0o600, 0).unwrap();
    assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut end = File::options().write(true).open(&fifo).unwrap();
            end.write_all(b"through the pipe").unwrap();
        });
        assert_eq!(read(&fifo), "through the pipe");
    });
    let socket = mounted.path("socket");
    drop(UnixListener::bind(&socket).unwrap());
    assert!(fs::metadata(&socket).unwrap().file_type().is_socket());
    if sys::uid() == 0 {
        let null = mounted.path("null");
        sys::mknod(&null, libc::S_IFCHR | 0o666, libc::makedev(1, 3)).unwrap();
        let facts = fs::metadata(&null).unwrap();
        assert!(facts.file_type().is_char_device());
        assert_eq!(facts.rdev(), libc::makedev(1, 3));
        // Devices are off by default.
        assert_eq!(
            File::open(&null).unwrap_err().kind(),
            ErrorKind::PermissionDenied
        );
    }
}

#[test]
fn a_remount_keeps_everything() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let data = noise(9, 1_000_003);
    fs::create_dir(mounted.path("dir")).unwrap();
    let file = mounted.path("dir/file");
    fs::write(&file, &data).unwrap();
    fs::hard_link(&file, mounted.path("hard")).unwrap();
    symlink("dir/file", mounted.path("soft")).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    sys::set_xattr(&file, "user.note", b"kept", 0).unwrap();
    let times = [
        Duration::new(1_000_000_000, 123_456_789),
        Duration::new(5, 1),
    ];
    for time in times {
        let handle = File::options().write(true).open(&file).unwrap();
        handle.set_modified(UNIX_EPOCH + time).unwrap();
        assert_eq!(
            fs::metadata(&file).unwrap().modified().unwrap(),
            UNIX_EPOCH + time
        );
    }
    let early = UNIX_EPOCH - Duration::new(1, 250_000_000);
    let handle = File::options().write(true).open(&file).unwrap();
    handle.set_modified(early).unwrap();
    drop(handle);
    let facts = |mounted: &Mounted| {
        ["dir", "dir/file", "hard", "soft", ""].map(|name| {
            let facts = fs::symlink_metadata(mounted.path(name)).unwrap();
            (
                facts.ino(),
                facts.nlink(),
                facts.mode(),
                (facts.uid(), facts.gid()),
                (facts.size(), facts.blocks()),
                (facts.mtime(), facts.mtime_nsec()),
                (facts.ctime(), facts.ctime_nsec()),
            )
        })
    };
    let before = facts(&mounted);
    assert_eq!((before[1].5), (-2, 750_000_000));
    let mounted = mounted.remount();
    assert_eq!(facts(&mounted), before);
    assert!(fs::read(mounted.path("soft")).unwrap() == data);
    let (len, value) = sys::xattr(&mounted.path("hard"), "user.note", 100).unwrap();
    assert_eq!(&value[..usize::try_from(len).unwrap()], b"kept");
}

#[test]
fn a_read_only_mount_changes_nothing() {
    let Some(mounted) = Mounted::with(|options| options.read_only = true) else {
        return;
    };
    for error in [
        fs::write(mounted.path("file"), "x").unwrap_err(),
        fs::create_dir(mounted.path("dir")).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);
    }
    assert_eq!(fs::read_dir(mounted.root()).unwrap().count(), 0);
    // There is nothing to make durable, so that succeeds.
    File::open(mounted.root()).unwrap().sync_all().unwrap();
}
