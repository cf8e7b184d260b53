//! Names: rename with its flags, links, directories, special files, and what a remount keeps.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use nodupe::control::{Request, Response, call};
use nodupe::error::Kind;

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

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// Components of 255 bytes, and a path as long as the kernel takes them: 4095 bytes and a NUL.
#[test]
fn paths_are_as_long_as_the_kernel_takes_them() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let mut path = mounted.root();
    while path.as_os_str().len() + 256 < 4000 {
        path.push("d".repeat(255));
    }
    fs::create_dir_all(&path).unwrap();
    let left = 4095 - path.as_os_str().len() - 1;
    let longest = path.join("f".repeat(left));
    fs::write(&longest, "deep").unwrap();
    assert_eq!(longest.as_os_str().len(), 4095);
    assert_eq!(read(&longest), "deep");
    let longer = path.join("f".repeat(left + 1));
    assert_eq!(errno(fs::write(&longer, "")), Some(libc::ENAMETOOLONG));
    for name in ["n".repeat(256), "n".repeat(1000)] {
        let path = mounted.path(&name);
        let too_long = Some(libc::ENAMETOOLONG);
        assert_eq!(errno(fs::metadata(&path)), too_long);
        assert_eq!(errno(fs::create_dir(&path)), too_long);
        assert_eq!(errno(symlink("x", &path)), too_long);
        fs::write(mounted.path("file"), "").unwrap();
        assert_eq!(errno(fs::rename(mounted.path("file"), &path)), too_long);
        assert_eq!(errno(fs::hard_link(mounted.path("file"), &path)), too_long);
    }
}

/// Every byte but '/' and NUL is a byte of a name, and comes back as it was.
#[test]
fn names_are_bytes() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let mut names: Vec<Vec<u8>> = (1..=255_u8)
        .filter(|byte| *byte != b'/' && *byte != b'.')
        .map(|byte| vec![byte])
        .collect();
    names.extend([
        b"...".to_vec(),
        b"-rf".to_vec(),
        b"\x1b[31mred".to_vec(),
        b"caf\xc3\xa9".to_vec(),
        b"cafe\xcc\x81".to_vec(), // the same to an eye
        b"\xed\xa0\x80".to_vec(), // half of a pair
        "\u{202e}gpj.exe".into(),
    ]);
    for name in &names {
        write(&mounted.root().join(OsStr::from_bytes(name)), "x");
    }
    let mounted = mounted.remount();
    let listed: BTreeSet<Vec<u8>> = fs::read_dir(mounted.root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().as_bytes().to_vec())
        .collect();
    assert_eq!(listed, names.into_iter().collect());
}

/// A chain of directories deeper than any path: made by moving chains into each other.
#[test]
fn directories_nest_deeper_than_paths_reach() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    const LEVELS: usize = 1500;
    let deep = |top: &str| -> (PathBuf, PathBuf) {
        let top = mounted.path(top);
        let mut path = top.clone();
        for _ in 0..LEVELS {
            path.push("d");
        }
        fs::create_dir_all(&path).unwrap();
        (top, path)
    };
    // The second chain into the bottom of the first, which then is the bottom of a third...
    let (inner, _) = deep("a");
    let (middle, bottom) = deep("b");
    fs::rename(&inner, bottom.join("x")).unwrap();
    let (outer, bottom) = deep("c");
    fs::rename(&middle, bottom.join("x")).unwrap();
    assert_eq!(errno(fs::metadata(bottom.join("x"))), None);
    // A clone of it is refused, and nothing of it made.
    let token = call(File::open(&outer).unwrap().as_fd(), &Request::Token).unwrap();
    let Response::Token(source) = token else {
        panic!("{token:?}");
    };
    let clone = Request::Clone {
        source,
        name: "copy".into(),
        count: None,
        preserve: false,
    };
    let error = call(File::open(mounted.root()).unwrap().as_fd(), &clone).unwrap_err();
    assert_eq!(error.kind(), Kind::TooLarge);
    assert!(!mounted.path("copy").exists());
    // Above itself, below itself, at whatever depth: never.
    let error = fs::rename(&outer, bottom.join("x/y")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    let removed = Command::new("rm").arg("-rf").arg(&outer).output().unwrap();
    assert!(removed.status.success(), "{removed:?}");
    assert_eq!(fs::read_dir(mounted.root()).unwrap().count(), 0);
}

#[test]
fn a_file_has_65000_names_at_most() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let (pool, file) = (mounted.pool(), mounted.path("file"));
    write(&file, "x");
    fs::create_dir(mounted.path("dir")).unwrap();
    let (ino, dir) = (
        nodupe::units::Ino(fs::metadata(&file).unwrap().ino()),
        nodupe::units::Ino(fs::metadata(mounted.path("dir")).unwrap().ino()),
    );
    // Behind the kernel's back, where it takes a tenth of the time.
    for number in 1..65_000 {
        let name = format!("{number}");
        pool.link(ino, dir, name.as_bytes(), nodupe::units::Time::now())
            .unwrap();
    }
    let more = fs::hard_link(&file, mounted.path("one more"));
    assert_eq!(errno(more), Some(libc::EMLINK));
    fs::remove_file(mounted.path("dir/7")).unwrap();
    fs::hard_link(&file, mounted.path("one more")).unwrap();
}

#[test]
fn targets_and_attributes_have_limits() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let link = |len: usize| symlink("t".repeat(len), mounted.path(&format!("link {len}")));
    link(4095).unwrap();
    assert_eq!(errno(link(4096)), Some(libc::ENAMETOOLONG));
    assert_eq!(errno(link(0)), Some(libc::ENOENT));
    let file = mounted.path("file");
    write(&file, "");
    let name = |len: usize| format!("user.{}", "n".repeat(len - 5));
    sys::set_xattr(&file, &name(255), b"v", 0).unwrap();
    let set = sys::set_xattr(&file, &name(256), b"v", 0);
    assert_eq!(errno(set), Some(libc::ERANGE));
    let largest = noise(1, 65_536);
    sys::set_xattr(&file, "user.large", &largest, 0).unwrap();
    assert!(sys::xattr(&file, "user.large", 65_536).unwrap().1 == largest);
    let short = sys::xattr(&file, "user.large", 65_535).map(drop);
    assert_eq!(errno(short), Some(libc::ERANGE));
    let set = sys::set_xattr(&file, "user.large", &noise(1, 65_537), 0);
    assert_eq!(errno(set), Some(libc::E2BIG));
    assert!(sys::set_xattr(&file, "user.", b"v", 0).is_err());
    assert!(sys::set_xattr(&file, "other.name", b"v", 0).is_err());
    sys::set_xattr(&file, "user.empty", b"", 0).unwrap();
    assert_eq!(sys::xattr(&file, "user.empty", 0).unwrap().0, 0);
}

#[test]
fn sizes_and_offsets_have_limits() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    const MAX: u64 = 1 << 55;
    const END: u64 = i64::MAX as u64;
    let path = mounted.path("file");
    let options = || {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .clone()
    };
    let file = options().open(&path).unwrap();
    let efbig = Some(libc::EFBIG);
    file.set_len(MAX).unwrap();
    file.write_all_at(b"z", MAX - 1).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, MAX - 1).unwrap();
    assert_eq!(&byte, b"z");
    for size in [MAX + 1, END - 1, END] {
        assert_eq!(errno(file.set_len(size)), efbig, "{size}");
    }
    for offset in [MAX, MAX + 1, END - 10_000, END - 1] {
        let written = file.write_at(b"z", offset).map(drop);
        assert_eq!(errno(written), efbig, "{offset}");
        assert_eq!(file.read_at(&mut byte, offset).unwrap(), 0, "{offset}");
        assert_eq!(
            errno(sys::seek(&file, offset, libc::SEEK_DATA)),
            Some(libc::ENXIO)
        );
        assert_eq!(errno(sys::fallocate(&file, 0, offset, 1)), efbig);
    }
    assert_eq!(errno(sys::fallocate(&file, 0, 0, MAX + 1)), efbig);
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    sys::fallocate(&file, punch, 0, MAX).unwrap();
    file.read_exact_at(&mut byte, MAX - 1).unwrap();
    assert_eq!(byte, [0]);
    // A copy within a file onto itself, over its end, and from behind it.
    file.set_len(0).unwrap();
    file.write_all_at(&noise(3, 65_536), 0).unwrap();
    for (from, to, len, error) in [
        (0, 4096, 8192, libc::EINVAL),
        (4096, 0, 8192, libc::EINVAL),
        (0, 0, 4096, libc::EINVAL),
        (0, MAX, 4096, libc::EFBIG),
        (0, MAX - 1, 4096, libc::EFBIG),
        (0, END - 1, 4096, libc::EFBIG),
    ] {
        let copied = sys::copy_file_range(&file, from, &file, to, len);
        let found = errno(copied);
        let overflow = to > MAX && found == Some(libc::EOVERFLOW);
        assert!(
            found == Some(error) || overflow,
            "{from} to {to}: {found:?}"
        );
    }
    assert_eq!(
        sys::copy_file_range(&file, 65_536, &file, 0, 10).unwrap(),
        0
    );
    assert_eq!(
        sys::copy_file_range(&file, END - 1, &file, 0, 0).unwrap_or(0),
        0
    );
    let mut now = vec![0; 65_536];
    file.read_exact_at(&mut now, 0).unwrap();
    assert!(now == noise(3, 65_536));
}

#[test]
fn strange_control_requests_are_refused() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let dir = File::open(mounted.root()).unwrap();
    let errors = sys::strange_ioctls(&dir);
    assert_eq!(errors.len(), 5, "{errors:?}");
    for error in errors {
        let number = error.raw_os_error().unwrap_or(0);
        assert!(
            [libc::EFAULT, libc::ENOTTY, libc::EINVAL].contains(&number),
            "{error}"
        );
    }
    call(dir.as_fd(), &Request::Info).unwrap();
}
