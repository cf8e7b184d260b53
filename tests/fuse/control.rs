//! The control channel of a mounted pool.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;

use nodupe::control::{Compare, Request, Response, Shares, Token, call};
use nodupe::engine::Share;
use nodupe::error::{Kind, Result};

use crate::fixture::{Mounted, is_root, noise};
use crate::sys::{self, Mapping, as_user};

fn ask(path: &Path, request: &Request) -> Result<Response> {
    call(File::open(path).unwrap().as_fd(), request)
}

fn token(path: &Path) -> Token {
    match ask(path, &Request::Token).unwrap() {
        Response::Token(token) => token,
        other => panic!("{other:?}"),
    }
}

fn clone(source: Token, dir: &Path, name: &str, count: Option<u32>) -> Result<Response> {
    let request = Request::Clone {
        source,
        name: name.to_owned(),
        count,
        preserve: false,
    };
    ask(dir, &request)
}

#[test]
fn facts_are_told_on_any_file() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    fs::write(mounted.path("file"), noise(1, 100_000)).unwrap();
    for path in [mounted.root(), mounted.path("file")] {
        let Response::Info(info) = ask(&path, &Request::Info).unwrap() else {
            panic!("no facts");
        };
        assert_eq!(info.pid, std::process::id());
        assert_eq!(Path::new(&info.pool), mounted.outside().join("pool"));
        assert_eq!(info.uuid, [7; 16]);
        assert_eq!(info.poisoned, None);
        assert_eq!(info.usage.total, mounted.pool().usage().total);
    }
    assert_eq!(
        ask(&mounted.root(), &Request::Checkpoint).unwrap(),
        Response::Done
    );
    let Response::Usage(usage) = ask(&mounted.path("file"), &Request::Usage).unwrap() else {
        panic!("no usage");
    };
    assert_eq!((usage.size, usage.exclusive), (100_000, 25 * 4096));
    let error = ask(mounted.outside(), &Request::Info).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
}

#[test]
fn files_are_cloned_many_times_at_once() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let gold = mounted.path("gold");
    let mut data = noise(2, 8 * 1024 * 1024);
    fs::write(&gold, &data).unwrap();
    let file = File::options().read(true).write(true).open(&gold).unwrap();
    let mapping = Mapping::new(&file, data.len());
    mapping.write(500, b"mapped");
    data[500..506].copy_from_slice(b"mapped");
    let dir = mounted.path("vms");
    fs::create_dir(&dir).unwrap();
    let before = fs::metadata(&dir).unwrap();
    let used = mounted.used();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let answer = clone(token(&gold), &dir, "vm-{}.raw", Some(100)).unwrap();
    assert_eq!(answer, Response::Clones(100));
    let after = fs::metadata(&dir).unwrap();
    assert!(
        (after.mtime(), after.mtime_nsec()) > (before.mtime(), before.mtime_nsec()),
        "the kernel was told of the new entries"
    );
    assert!(mounted.used() - used < 4 * 1024 * 1024);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 100);
    for number in ["1", "50", "100"] {
        assert!(fs::read(dir.join(format!("vm-{number}.raw"))).unwrap() == data);
    }
    let changed = File::options()
        .write(true)
        .open(dir.join("vm-7.raw"))
        .unwrap();
    changed.write_all_at(b"own", 0).unwrap();
    assert!(fs::read(dir.join("vm-8.raw")).unwrap() == data);

    let error = clone(token(&gold), &dir, "vm-{}.raw", Some(100)).unwrap_err();
    assert_eq!(error.kind(), Kind::Exists);
    // All or none.
    let error = clone(token(&gold), &dir, "{}0-vm-1.raw", Some(3)).map(|_| ());
    error.unwrap();
    fs::write(dir.join("x2"), "").unwrap();
    let error = clone(token(&gold), &dir, "x{}", Some(3)).unwrap_err();
    assert_eq!(error.kind(), Kind::Exists);
    assert!(!dir.join("x1").exists());
}

#[test]
fn bad_requests_are_refused() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let gold = mounted.path("gold");
    fs::write(&gold, "gold").unwrap();
    let root = mounted.root();
    for (name, count, kind) in [
        ("a/b", None, Kind::Invalid),
        ("..", None, Kind::Invalid),
        ("", None, Kind::NotFound),
        ("same", Some(2), Kind::Invalid),
        ("x{}", Some(0), Kind::Invalid),
        ("gold", None, Kind::Exists),
    ] {
        let error = clone(token(&gold), &root, name, count).unwrap_err();
        assert_eq!(error.kind(), kind, "{name}");
    }
    let error = clone(token(&gold), &root, &"n".repeat(256), None).unwrap_err();
    assert_eq!(error.kind(), Kind::NameTooLong);
    let error = clone(token(&gold), &gold, "x", None).unwrap_err();
    assert_eq!(error.kind(), Kind::NotDirectory);
    let error = clone(Token([1; 16]), &root, "x", None).unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
    let write_only = File::options().write(true).open(&gold).unwrap();
    let error = call(write_only.as_fd(), &Request::Token).unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
}

#[test]
fn blocks_are_shared_only_by_a_descriptor_that_may_write() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let (gold, copy) = (mounted.path("gold"), mounted.path("copy"));
    fs::write(&gold, noise(5, 64 * 4096)).unwrap();
    File::create(&copy).unwrap().set_len(64 * 4096).unwrap();
    let share = || Request::Share {
        source: Some(token(&gold)),
        ranges: vec![Shares {
            first: Share {
                block: 0,
                dst_block: 0,
                count: 64,
            },
            times: 1,
            steps: (0, 0),
        }],
    };
    let read_only = File::open(&copy).unwrap();
    let error = call(read_only.as_fd(), &share()).unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
    let writable = File::options().write(true).open(&copy).unwrap();
    call(writable.as_fd(), &share()).unwrap();
    assert!(fs::read(&copy).unwrap() == noise(5, 64 * 4096));
}

#[test]
fn blocks_are_compared_only_by_a_descriptor_that_may_read() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let (gold, other) = (mounted.path("gold"), mounted.path("other"));
    for path in [&gold, &other] {
        fs::write(path, noise(5, 64 * 4096)).unwrap();
    }
    let equal = |dry| {
        let range = Share {
            block: 0,
            dst_block: 0,
            count: 64,
        };
        Request::ShareEqual(Compare {
            source: Some(token(&gold)),
            range,
            dry,
        })
    };
    let places = Request::Places {
        from: 0,
        to: 64,
        sums: true,
    };
    let write_only = File::options().write(true).open(&other).unwrap();
    let read_only = File::open(&other).unwrap();
    for (file, request) in [
        (&write_only, equal(false)),
        (&write_only, equal(true)),
        (&write_only, places.clone()),
        (&read_only, equal(false)),
    ] {
        let error = call(file.as_fd(), &request).unwrap_err();
        assert_eq!(error.kind(), Kind::Denied, "{request:?}");
    }
    let told = |file: &File, request: &Request| match call(file.as_fd(), request).unwrap() {
        Response::Equal(equal) => equal.blocks(),
        Response::Places(places) => places.sums.len() as u64,
        other => panic!("{other:?}"),
    };
    assert_eq!(told(&read_only, &places), 64);
    assert_eq!(told(&read_only, &equal(true)), 64);
    let both = File::options().read(true).write(true).open(&other).unwrap();
    let times = |file: &File| {
        let facts = file.metadata().unwrap();
        (facts.modified().unwrap(), facts.ctime_nsec(), facts.len())
    };
    let before = times(&both);
    assert_eq!(told(&both, &equal(false)), 64);
    assert_eq!(told(&both, &equal(false)), 0);
    assert_eq!(times(&both), before);
    assert!(fs::read(&other).unwrap() == noise(5, 64 * 4096));
}

#[test]
fn directories_are_cloned_with_all_in_them() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let vm = mounted.path("vm");
    fs::create_dir_all(vm.join("snapshots")).unwrap();
    fs::write(vm.join("disk.raw"), noise(3, 1_000_000)).unwrap();
    fs::write(vm.join("snapshots/1"), "one").unwrap();
    std::os::unix::fs::symlink("disk.raw", vm.join("current")).unwrap();
    clone(token(&vm), &mounted.root(), "vm-{}", Some(2)).unwrap();
    let copy = mounted.path("vm-2");
    assert!(fs::read(copy.join("current")).unwrap() == noise(3, 1_000_000));
    assert_eq!(fs::read_to_string(copy.join("snapshots/1")).unwrap(), "one");
    fs::remove_dir_all(&vm).unwrap();
    assert!(fs::read(copy.join("disk.raw")).unwrap() == noise(3, 1_000_000));
}

#[test]
fn clones_need_the_rights_that_a_copy_needs() {
    if !is_root() {
        return;
    }
    let Some(mounted) = Mounted::new() else {
        return;
    };
    const USER: u32 = 65534;
    const GROUP: u32 = 65533;
    let (gold, own) = (mounted.path("gold"), mounted.path("own"));
    fs::write(&gold, "gold").unwrap();
    fs::create_dir(&own).unwrap();
    chown(&own, Some(USER), Some(GROUP)).unwrap();
    let root = mounted.root();
    let roots_token = token(&gold);
    as_user(USER, GROUP, || {
        let error = clone(token(&gold), &root, "x", None).unwrap_err();
        assert_eq!(
            error.kind(),
            Kind::Denied,
            "no entry in a directory of root"
        );
        let error = clone(roots_token, &own, "x", None).unwrap_err();
        assert_eq!(error.kind(), Kind::Denied, "a token of somebody else");
        let request = Request::Clone {
            source: token(&gold),
            name: "x".to_owned(),
            count: None,
            preserve: true,
        };
        let error = ask(&own, &request).unwrap_err();
        assert_eq!(
            error.kind(),
            Kind::NotPermitted,
            "an owner who is not the caller"
        );
        clone(token(&gold), &own, "x", None).unwrap();
    });
    let facts = fs::metadata(own.join("x")).unwrap();
    assert_eq!((facts.uid(), facts.gid()), (USER, GROUP));
    let request = Request::Clone {
        source: token(&own.join("x")),
        name: "kept".to_owned(),
        count: None,
        preserve: true,
    };
    ask(&root, &request).unwrap();
    assert_eq!(fs::metadata(mounted.path("kept")).unwrap().uid(), USER);
    clone(token(&own.join("x")), &root, "roots", None).unwrap();
    assert_eq!(fs::metadata(mounted.path("roots")).unwrap().uid(), 0);

    // A directory with something in it that the caller cannot read.
    let mixed = mounted.path("mixed");
    fs::create_dir(&mixed).unwrap();
    fs::write(mixed.join("secret"), "secret").unwrap();
    fs::set_permissions(mixed.join("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    as_user(USER, GROUP, || {
        let error = clone(token(&mixed), &own, "mixed", None).unwrap_err();
        assert_eq!(error.kind(), Kind::Denied);
    });
    fs::set_permissions(mixed.join("secret"), fs::Permissions::from_mode(0o644)).unwrap();
    as_user(USER, GROUP, || {
        clone(token(&mixed), &own, "mixed", None).unwrap()
    });
    sys::mknod(
        &mixed.join("null"),
        libc::S_IFCHR | 0o666,
        libc::makedev(1, 3),
    )
    .unwrap();
    as_user(USER, GROUP, || {
        let error = clone(token(&mixed), &own, "again", None).unwrap_err();
        assert_eq!(error.kind(), Kind::NotPermitted, "a device node");
    });
}
