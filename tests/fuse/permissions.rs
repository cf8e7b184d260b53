//! Permissions, owners and set-id bits, with several users.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::{
    FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink,
};
use std::path::Path;
use std::process::Command;

use nodupe::control::{Request, Response, call};
use nodupe::error::Kind;

use crate::fixture::{Mounted, is_root};
use crate::sys::{self, as_member, as_user};

const USER: u32 = 65534;
const GROUP: u32 = 65533;

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn mode_bits_keep_others_out() {
    if !is_root() {
        return;
    }
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let (secret, shared) = (mounted.path("secret"), mounted.path("shared"));
    fs::write(&secret, "s").unwrap();
    set_mode(&secret, 0o600);
    fs::create_dir(&shared).unwrap();
    set_mode(&shared, 0o777);
    as_user(USER, GROUP, || {
        let denied = ErrorKind::PermissionDenied;
        assert_eq!(fs::read(&secret).unwrap_err().kind(), denied);
        assert_eq!(fs::remove_file(&secret).unwrap_err().kind(), denied);
        let own = mounted.path("own");
        assert_eq!(fs::write(&own, "").unwrap_err().kind(), denied);
        let own = shared.join("own");
        fs::write(&own, "mine").unwrap();
        let facts = fs::metadata(&own).unwrap();
        assert_eq!((facts.uid(), facts.gid()), (USER, GROUP));
        let error = chown(&own, Some(0), None).unwrap_err();
        assert_eq!(error.kind(), denied);
    });
    set_mode(&shared, 0o1777);
    fs::write(shared.join("roots"), "").unwrap();
    as_user(USER, GROUP, || {
        assert!(fs::remove_file(shared.join("roots")).is_err());
        fs::remove_file(shared.join("own")).unwrap();
    });
}

#[test]
fn a_set_group_id_directory_gives_its_group() {
    if !is_root() {
        return;
    }
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let dir = mounted.path("dir");
    fs::create_dir(&dir).unwrap();
    chown(&dir, None, Some(4242)).unwrap();
    set_mode(&dir, 0o2777);
    as_user(USER, GROUP, || {
        fs::write(dir.join("file"), "").unwrap();
        fs::create_dir(dir.join("sub")).unwrap();
    });
    let (file, sub) = (dir.join("file"), dir.join("sub"));
    assert_eq!(fs::metadata(&file).unwrap().gid(), 4242);
    assert_eq!(fs::metadata(&sub).unwrap().gid(), 4242);
    assert_eq!(mode(&file) & 0o2000, 0);
    assert_eq!(mode(&sub) & 0o2000, 0o2000);
}

/// The mode as stat(1) sees it, who asks for nothing else: the kernel answers from its cache what it
/// believes to be valid. `fs::metadata` asks for the times as well, which are never cached after a
/// write.
fn mode_alone(path: &Path) -> u32 {
    let stat = Command::new("stat").args(["-c", "%a"]).arg(path).output();
    let text = String::from_utf8(stat.unwrap().stdout).unwrap();
    u32::from_str_radix(text.trim(), 8).unwrap()
}

/// Every way to change the contents, by somebody else: the set-id bits must go.
#[test]
fn set_id_bits_do_not_survive_a_change_by_others() {
    if !is_root() {
        return;
    }
    let Some(mounted) = Mounted::with(|options| options.extra.push("suid".into())) else {
        return;
    };
    type Change = fn(&Path);
    fn open(path: &Path, flags: i32) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
            .unwrap()
    }
    let changes: [(&str, Change); 8] = [
        ("write", |path| open(path, 0).write_all_at(b"x", 0).unwrap()),
        ("direct", |path| {
            open(path, libc::O_DIRECT).write_all_at(b"x", 0).unwrap();
        }),
        ("truncate", |path| open(path, 0).set_len(10).unwrap()),
        ("open", |path| drop(File::create(path).unwrap())),
        ("allocate", |path| {
            sys::fallocate(&open(path, 0), 0, 0, 10_000).unwrap();
        }),
        ("punch", |path| {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            sys::fallocate(&open(path, 0), mode, 0, 4096).unwrap();
        }),
        ("zero", |path| {
            sys::fallocate(&open(path, 0), libc::FALLOC_FL_ZERO_RANGE, 0, 4096).unwrap();
        }),
        ("copy", |path| {
            let source = File::open(path.with_file_name("source")).unwrap();
            sys::copy_file_range(&source, 0, &open(path, 0), 0, 4096).unwrap();
        }),
    ];
    fs::write(mounted.path("source"), [7; 8192]).unwrap();
    for (name, change) in changes {
        for (before, after) in [(0o6777, 0o777), (0o6766, 0o766), (0o4777, 0o777)] {
            let path = mounted.path(&format!("{name}-{before:o}"));
            fs::write(&path, [1; 8192]).unwrap();
            set_mode(&path, before);
            as_user(USER, GROUP, || change(&path));
            assert_eq!(mode_alone(&path), after, "{name}");
            assert_eq!(mode(&path), after, "{name}");
            // Root may keep them.
            set_mode(&path, before);
            change(&path);
            assert_eq!(mode(&path), before, "{name} by root");
        }
    }
}

#[test]
fn a_new_owner_gets_no_set_id_bits_and_no_capabilities() {
    if !is_root() {
        return;
    }
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("file");
    fs::write(&path, "").unwrap();
    set_mode(&path, 0o6755);
    // Version 2 of the structure, with no capability in it.
    let mut capability = [0; 20];
    capability[3] = 2;
    sys::set_xattr(&path, "security.capability", &capability, 0).unwrap();
    chown(&path, Some(USER), Some(GROUP)).unwrap();
    assert_eq!(mode(&path), 0o755);
    assert_eq!(sys::list_xattrs(&path), [""; 0]);
    set_mode(&path, 0o777);
    sys::set_xattr(&path, "security.capability", &capability, 0).unwrap();
    as_user(USER, GROUP, || {
        fs::write(&path, "changed").unwrap();
    });
    assert_eq!(sys::list_xattrs(&path), [""; 0]);
}

/// Error numbers, where the kinds of std are too coarse.
fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> Option<i32> {
    result.unwrap_err().raw_os_error()
}

/// A mount as root, if both are possible here.
fn mounted() -> Option<Mounted> {
    if is_root() { Mounted::new() } else { None }
}

#[test]
fn read_write_and_execute_are_three_things() {
    let Some(mounted) = mounted() else {
        return;
    };
    let (file, dir, tool) = (
        mounted.path("file"),
        mounted.path("dir"),
        mounted.path("tool"),
    );
    fs::write(&file, "text").unwrap();
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("known"), "").unwrap();
    fs::copy("/bin/true", &tool).unwrap();
    let run = || Command::new(&tool).status().map(|status| status.success());
    for (bits, reads, writes, runs) in [
        (0o000, false, false, false),
        (0o004, true, false, false),
        (0o002, false, true, false),
        (0o005, true, false, true),
        (0o007, true, true, true),
    ] {
        set_mode(&file, bits);
        set_mode(&tool, bits);
        set_mode(&dir, bits);
        as_user(USER, GROUP, || {
            assert_eq!(File::open(&file).is_ok(), reads, "{bits:o}");
            let opened = OpenOptions::new().write(true).open(&file);
            assert_eq!(opened.is_ok(), writes, "{bits:o}");
            assert_eq!(run().is_ok(), runs, "{bits:o}");
            // Of a directory: to list it, to make entries (which needs both), to pass through it.
            assert_eq!(fs::read_dir(&dir).is_ok(), reads, "{bits:o}");
            let made = File::create_new(dir.join("new"));
            assert_eq!(made.is_ok(), writes && bits & 1 != 0, "{bits:o}");
            assert_eq!(fs::metadata(dir.join("known")).is_ok(), bits & 1 != 0);
        });
    }
}

#[test]
fn the_sticky_bit_protects_what_is_of_others() {
    let Some(mounted) = mounted() else {
        return;
    };
    const OTHER: u32 = 60001;
    let dir = mounted.path("tmp");
    fs::create_dir(&dir).unwrap();
    chown(&dir, Some(OTHER), None).unwrap();
    set_mode(&dir, 0o1777);
    let (mine, roots) = (dir.join("mine"), dir.join("roots"));
    fs::write(&roots, "").unwrap();
    as_user(USER, GROUP, || {
        fs::write(&mine, "").unwrap();
        let eperm = Some(libc::EPERM);
        assert_eq!(errno(fs::remove_file(&roots)), eperm);
        assert_eq!(errno(fs::rename(&roots, dir.join("x"))), eperm);
        assert_eq!(errno(fs::rename(&mine, &roots)), eperm, "replaces it");
        fs::rename(&mine, dir.join("renamed")).unwrap();
        // Nor is anybody let into a clone of a name that is there.
        assert_eq!(
            errno(fs::hard_link(dir.join("renamed"), &roots)),
            Some(libc::EEXIST)
        );
    });
    // The owner of the directory may remove anything in it.
    as_user(OTHER, GROUP, || {
        fs::remove_file(&roots).unwrap();
        fs::remove_file(dir.join("renamed")).unwrap();
    });
}

#[test]
fn further_groups_count() {
    let Some(mounted) = mounted() else {
        return;
    };
    const TEAM: u32 = 4242;
    let file = mounted.path("file");
    fs::write(&file, "team").unwrap();
    chown(&file, None, Some(TEAM)).unwrap();
    set_mode(&file, 0o660);
    as_user(USER, GROUP, || {
        assert_eq!(errno(File::open(&file)), Some(libc::EACCES));
    });
    as_member(USER, GROUP, &[7, TEAM], || {
        fs::write(&file, "changed").unwrap();
    });
    // The group of a file may become one that its owner is in, and no other one.
    let own = mounted.path("own");
    fs::write(&own, "").unwrap();
    chown(&own, Some(USER), Some(GROUP)).unwrap();
    as_member(USER, GROUP, &[TEAM], || {
        let eperm = Some(libc::EPERM);
        chown(&own, None, Some(TEAM)).unwrap();
        assert_eq!(errno(chown(&own, None, Some(TEAM + 1))), eperm);
        assert_eq!(errno(chown(&own, Some(USER + 1), None)), eperm);
        assert_eq!(errno(chown(&file, None, Some(TEAM))), eperm, "of root");
        assert_eq!(
            errno(fs::set_permissions(&file, Permissions::from_mode(0o777))),
            eperm
        );
        set_mode(&own, 0o2755);
        assert_eq!(mode(&own), 0o2755);
    });
    // Without the group, the set-group-id bit cannot be had.
    as_user(USER, GROUP, || {
        set_mode(&own, 0o2755);
        assert_eq!(mode(&own), 0o755);
    });
}

#[test]
fn attributes_belong_to_their_classes() {
    let Some(mounted) = mounted() else {
        return;
    };
    let (file, open, sticky, link) = (
        mounted.path("file"),
        mounted.path("open"),
        mounted.path("sticky"),
        mounted.path("link"),
    );
    for path in [&file, &open] {
        fs::write(path, "").unwrap();
    }
    fs::create_dir(&sticky).unwrap();
    symlink("file", &link).unwrap();
    set_mode(&file, 0o644);
    set_mode(&open, 0o666);
    set_mode(&sticky, 0o1777);
    sys::set_xattr(&file, "user.note", b"1", 0).unwrap();
    sys::set_xattr(&file, "trusted.note", b"2", 0).unwrap();
    sys::set_xattr(&file, "security.note", b"3", 0).unwrap();
    as_user(USER, GROUP, || {
        let (eacces, eperm) = (Some(libc::EACCES), Some(libc::EPERM));
        assert_eq!(sys::list_xattrs(&file), ["security.note", "user.note"]);
        assert_eq!(sys::xattr(&file, "user.note", 10).unwrap().0, 1);
        assert!(sys::xattr(&file, "trusted.note", 10).is_err());
        assert_eq!(errno(sys::set_xattr(&file, "user.note", b"x", 0)), eacces);
        assert_eq!(errno(sys::remove_xattr(&file, "user.note")), eacces);
        sys::set_xattr(&open, "user.note", b"x", 0).unwrap();
        for name in ["trusted.x", "security.x"] {
            assert_eq!(errno(sys::set_xattr(&open, name, b"x", 0)), eperm, "{name}");
        }
        assert_eq!(errno(sys::set_xattr(&sticky, "user.x", b"x", 0)), eperm);
        sys::set_xattr(&open, "system.posix_acl_access", b"x", 0).unwrap_err();
    });
    assert_eq!(
        errno(sys::set_xattr(&link, "user.x", b"x", 0)),
        Some(libc::EPERM)
    );
    set_mode(&file, 0o600);
    as_user(USER, GROUP, || {
        assert_eq!(
            errno(sys::xattr(&file, "user.note", 10)),
            Some(libc::EACCES)
        );
    });
}

#[test]
fn the_control_channel_serves_by_rank() {
    let Some(mounted) = mounted() else {
        return;
    };
    let (secret, write_only) = (mounted.path("secret"), mounted.path("write only"));
    for (path, bits) in [(&secret, 0o600), (&write_only, 0o622)] {
        fs::write(path, "secret").unwrap();
        set_mode(path, bits);
    }
    let (root, own) = (mounted.root(), mounted.path("own"));
    fs::create_dir(&own).unwrap();
    chown(&own, Some(USER), Some(GROUP)).unwrap();
    as_user(USER, GROUP, || {
        let dir = File::open(&root).unwrap();
        let info = call(dir.as_fd(), &Request::Info).unwrap();
        assert!(matches!(info, Response::Info(_)), "facts are for all");
        let error = call(dir.as_fd(), &Request::Checkpoint).unwrap_err();
        assert_eq!(error.kind(), Kind::NotPermitted);
        // What cannot be read cannot be cloned, by whatever way.
        assert_eq!(errno(File::open(&secret)), Some(libc::EACCES));
        let blind = OpenOptions::new().write(true).open(&write_only).unwrap();
        let error = call(blind.as_fd(), &Request::Token).unwrap_err();
        assert_eq!(error.kind(), Kind::Denied);
        let copy = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(own.join("copy"));
        let copied = sys::copy_file_range(&blind, 0, &copy.unwrap(), 0, 6);
        assert_eq!(errno(copied), Some(libc::EBADF));
    });
    let dir = File::open(&root).unwrap();
    let done = call(dir.as_fd(), &Request::Checkpoint).unwrap();
    assert_eq!(done, Response::Done);
}

#[test]
fn without_allow_other_nobody_else_gets_in() {
    if !is_root() {
        return;
    }
    let Some(mounted) = Mounted::with(|options| options.allow_other = false) else {
        return;
    };
    let file = mounted.path("file");
    fs::write(&file, "").unwrap();
    set_mode(&file, 0o777);
    set_mode(&mounted.root(), 0o777);
    as_user(USER, GROUP, || {
        let eacces = Some(libc::EACCES);
        assert_eq!(errno(fs::metadata(mounted.root())), eacces);
        assert_eq!(errno(fs::read_dir(mounted.root())), eacces);
        assert_eq!(errno(File::open(&file)), eacces);
        assert_eq!(errno(File::create(mounted.path("new"))), eacces);
    });
}

/// Handles go around all directories, so it takes a right of root to use them.
#[test]
fn handles_are_for_root() {
    let Some(mounted) = mounted() else {
        return;
    };
    let dir = mounted.path("closed");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), "").unwrap();
    set_mode(&dir, 0o700);
    let id = sys::FileId::of(&dir.join("file"));
    let root = File::open(mounted.root()).unwrap();
    id.open(&root).unwrap();
    let refused = as_user(USER, GROUP, || errno(id.open(&root)));
    assert_eq!(refused, Some(libc::EPERM));
}

#[test]
fn set_id_bits_and_devices_are_dead_by_default() {
    let Some(mounted) = mounted() else {
        return;
    };
    let path = mounted.root();
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table
        .lines()
        .find(|line| line.contains(path.to_str().unwrap()));
    let options = line.unwrap().split(' ').nth(5).unwrap();
    assert!(
        options.contains("nosuid") && options.contains("nodev"),
        "{options}"
    );
    // A program that belongs to root and says so runs as who starts it.
    let tool = mounted.path("id");
    fs::copy("/usr/bin/id", &tool).unwrap();
    lchown(&tool, Some(0), Some(0)).unwrap();
    set_mode(&tool, 0o6755);
    let output = as_user(USER, GROUP, || Command::new(&tool).arg("-u").output());
    assert_eq!(output.unwrap().stdout, format!("{USER}\n").as_bytes());
}

/// Whoever owns the directory around a mount can neither look into it nor end it.
#[test]
fn a_mount_in_a_directory_of_somebody_else_is_safe() {
    if !is_root() {
        return;
    }
    let Some(mut mounted) = Mounted::with(|options| options.allow_other = false) else {
        return;
    };
    fs::write(mounted.path("file"), "inside").unwrap();
    mounted.end();
    chown(mounted.outside(), Some(USER), Some(GROUP)).unwrap();
    mounted.begin();
    let root = mounted.root();
    as_user(USER, GROUP, || {
        assert_eq!(errno(fs::read(root.join("file"))), Some(libc::EACCES));
        assert_eq!(errno(fs::remove_dir(&root)), Some(libc::EBUSY));
        // Renaming a mount point in another namespace is allowed, here it is busy.
        assert_eq!(
            errno(fs::rename(&root, root.with_file_name("x"))),
            Some(libc::EBUSY)
        );
        let ended = Command::new("umount").arg(&root).output().unwrap();
        assert!(!ended.status.success(), "{ended:?}");
    });
    assert_eq!(fs::read(mounted.path("file")).unwrap(), b"inside");
}

/// Somebody who may move a file that he may not read moves it into a tree just when he clones it.
#[test]
fn nothing_slips_into_a_clone_behind_the_check() {
    let Some(mounted) = mounted() else {
        return;
    };
    let (open, own) = (mounted.path("open"), mounted.path("own"));
    fs::create_dir(&open).unwrap();
    set_mode(&open, 0o777);
    fs::create_dir(&own).unwrap();
    chown(&own, Some(USER), Some(GROUP)).unwrap();
    let (secret, tree) = (open.join("secret"), own.join("tree"));
    fs::write(&secret, "secret").unwrap();
    set_mode(&secret, 0o600);
    let done = std::sync::atomic::AtomicBool::new(false);
    let (done, inside) = (&done, &tree.join("secret"));
    as_user(USER, GROUP, || fs::create_dir(&tree).unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            as_user(USER, GROUP, || {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    fs::rename(&secret, inside).unwrap();
                    fs::rename(inside, &secret).unwrap();
                }
            });
        });
        as_user(USER, GROUP, || {
            let dir = File::open(&own).unwrap();
            let Ok(Response::Token(source)) =
                call(File::open(&tree).unwrap().as_fd(), &Request::Token)
            else {
                panic!("no token");
            };
            let leaked = (0..1500).find(|i| {
                let clone = Request::Clone {
                    source,
                    name: format!("copy {i}"),
                    count: None,
                    preserve: false,
                };
                drop(call(dir.as_fd(), &clone));
                fs::read(own.join(format!("copy {i}/secret"))).is_ok()
            });
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(leaked, None, "a secret was read");
        });
    });
}

/// A user who may open /dev/fuse makes, mounts and unmounts a pool of his own by fusermount3; the
/// device is opened to him in a mount namespace of its own.
#[test]
fn a_user_mounts_his_own_pool() {
    if !is_root() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    set_mode(home.path(), 0o755);
    fs::copy(env!("CARGO_BIN_EXE_nodupe"), home.path().join("nodupe")).unwrap();
    let own = home.path().join("own");
    fs::create_dir(&own).unwrap();
    chown(&own, Some(USER), Some(GROUP)).unwrap();
    let user = format!(
        "cd own && ../nodupe create pool --size 64M && mkdir dir && ../nodupe mount pool dir && \
         echo text > dir/file && test $(stat -c %u dir/file) = {USER} && \
         grep own/dir /proc/self/mountinfo | grep nosuid | grep nodev && \
         ../nodupe umount dir && ../nodupe check pool && test $(stat -c %a pool) = 600"
    );
    let script = format!(
        "mknod fuse c 10 229 && chmod 666 fuse && mount --bind fuse /dev/fuse || exit 77; \
         setpriv --version > /dev/null && fusermount3 -V > /dev/null || exit 77; \
         exec setpriv --reuid {USER} --regid {GROUP} --clear-groups sh -c '{user}'"
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]);
    let Ok(output) = command.current_dir(home.path()).output() else {
        eprintln!("not run: there is no unshare");
        return;
    };
    if output.status.code() == Some(77) {
        eprintln!("not run: /dev/fuse, setpriv or fusermount3 cannot be used: {output:?}");
        return;
    }
    assert!(output.status.success(), "{output:?}");
}
