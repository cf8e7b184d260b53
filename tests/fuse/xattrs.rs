//! Extended attributes.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use crate::fixture::{Mounted, is_root};
use crate::sys;

fn value(path: &Path, name: &str) -> Option<Vec<u8>> {
    match sys::xattr(path, name, 64 * 1024) {
        Ok((len, mut value)) => {
            value.truncate(usize::try_from(len).unwrap());
            Some(value)
        }
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(libc::ENODATA));
            None
        }
    }
}

#[test]
fn attributes_are_set_listed_and_removed() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("file");
    fs::write(&path, "").unwrap();
    assert_eq!(value(&path, "user.a"), None);
    sys::set_xattr(&path, "user.a", b"1", libc::XATTR_CREATE).unwrap();
    let error = sys::set_xattr(&path, "user.a", b"2", libc::XATTR_CREATE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    let error = sys::set_xattr(&path, "user.b", b"2", libc::XATTR_REPLACE).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENODATA));
    sys::set_xattr(&path, "user.a", b"22", libc::XATTR_REPLACE).unwrap();
    sys::set_xattr(&path, "user.empty", b"", 0).unwrap();
    assert_eq!(value(&path, "user.a").unwrap(), b"22");
    assert_eq!(value(&path, "user.empty").unwrap(), b"");
    assert_eq!(sys::list_xattrs(&path), ["user.a", "user.empty"]);
    sys::remove_xattr(&path, "user.a").unwrap();
    assert_eq!(sys::list_xattrs(&path), ["user.empty"]);
    let error = sys::remove_xattr(&path, "user.a").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENODATA));
}

#[test]
fn sizes_are_asked_for_and_limits_hold() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("file");
    fs::write(&path, "").unwrap();
    let longest = format!("user.{}", "n".repeat(250));
    let largest = vec![b'v'; 64 * 1024];
    sys::set_xattr(&path, &longest, &largest, 0).unwrap();
    assert_eq!(sys::xattr(&path, &longest, 0).unwrap().0, 64 * 1024);
    assert!(value(&path, &longest).unwrap() == largest);
    let error = sys::xattr(&path, &longest, 100).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ERANGE));
    let error = sys::set_xattr(&path, "user.big", &vec![0; 64 * 1024 + 1], 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::E2BIG));
}

#[test]
fn access_control_lists_are_refused_and_trusted_is_roots() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("file");
    fs::write(&path, "").unwrap();
    let acl = [2, 0, 0, 0];
    let error = sys::set_xattr(&path, "system.posix_acl_access", &acl, 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
    let error = sys::set_xattr(&path, "nonsense", b"", 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
    if !is_root() {
        return;
    }
    sys::set_xattr(&path, "trusted.t", b"1", 0).unwrap();
    sys::set_xattr(&path, "user.u", b"1", 0).unwrap();
    assert_eq!(sys::list_xattrs(&path), ["trusted.t", "user.u"]);
    let others = sys::as_user(65534, 65534, || sys::list_xattrs(&path));
    assert_eq!(others, ["user.u"]);
}
