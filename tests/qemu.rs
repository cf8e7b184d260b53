//! QEMU boots images that were made here, and its tools work on images in the datastore exactly as
//! on an ordinary file system: the same commands run in both, and must print the same, return the
//! same and leave the same contents.

mod datastore;

use std::path::Path;
use std::process::Command;

use datastore::{Datastore, cannot_mount, nodupe, not_run, run};

#[test]
fn a_disk_in_every_format_boots() {
    let name = "a_disk_in_every_format_boots";
    if let Some(why) = cannot_mount() {
        return not_run(name, &why);
    }
    for program in ["qemu-system-x86_64", "python3"] {
        if Command::new(program).arg("--version").output().is_err() {
            return not_run(name, &format!("{program} is missing: run scripts/setup"));
        }
    }
    let mut store = Datastore::new("1G");
    let out = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/boot.py");
    run(Command::new(script)
        .arg(store.dir())
        .env("NODUPE", nodupe().get_program())
        .env("TMPDIR", out.path())
        .env("BOOT_QUICK", "1"));
    store.unmount();
    store.check();
}

#[test]
fn qemu_tools_agree_with_an_ordinary_file_system() {
    let name = "qemu_tools_agree_with_an_ordinary_file_system";
    if let Some(why) = cannot_mount() {
        return not_run(name, &why);
    }
    for program in ["qemu-img", "qemu-io", "python3"] {
        if Command::new(program).arg("--version").output().is_err() {
            return not_run(name, &format!("{program} is missing: run scripts/setup"));
        }
    }
    let mut store = Datastore::new("4G");
    let reference = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/qemu-tools.sh");
    run(Command::new(script)
        .arg(store.dir())
        .arg(reference.path())
        .env("QEMU_TOOLS_QUICK", "1"));
    store.unmount();
    store.check();
}
