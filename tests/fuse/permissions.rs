//! Permissions, owners and set-id bits, with several users.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;

use crate::fixture::{Mounted, is_root};
use crate::sys::{self, as_user};

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
