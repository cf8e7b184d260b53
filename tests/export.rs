//! Export out of a mounted pool: every format reads the same outside, compressed and by standard
//! output too; and of a clone only the differences.
#![cfg(feature = "fuse")]
#![allow(clippy::unwrap_used)]

mod datastore;
mod images;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use datastore::{Datastore, cannot_mount, nodupe, not_run, run};
use images::{contents, disk, has_qemu, qemu_compares};
use nodupe::formats::chain::Chain;
use nodupe::formats::{FileSource, Format, Source, probe};
use serde_json::Value;

fn export(src: &Path, dst: &Path, more: &[&str]) -> Value {
    let mut command = nodupe();
    command.arg("export").arg(src).arg(dst).args(more);
    let output = run(command.arg("--json"));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A mounted pool with a disk in it, and a folder outside.
fn with_disk() -> (Datastore, tempfile::TempDir, PathBuf, Vec<u8>, u64) {
    let store = Datastore::new("1G");
    let outside = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (bytes, data) = disk(24 << 20);
    let raw = store.dir().join("gold.raw");
    fs::write(&raw, &bytes).unwrap();
    (store, outside, raw, bytes, data)
}

#[test]
fn every_format_reads_the_same_outside_and_imported_back() {
    if let Some(why) = cannot_mount() {
        let name = "every_format_reads_the_same_outside_and_imported_back";
        return not_run(name, &why);
    }
    let (mut store, outside, raw, bytes, data) = with_disk();
    let qemu = has_qemu();
    for (i, (name, more, format)) in [
        ("a.raw", &[][..], Format::Raw),
        ("a.vhd", &[], Format::Vhd),
        ("b.vhd", &["--subformat", "dynamic"], Format::Vhd),
        ("a.vhdx", &[], Format::Vhdx),
        ("b.vhdx", &["--subformat", "fixed"], Format::Vhdx),
        ("a.vmdk", &[], Format::Vmdk),
        ("b.vmdk", &["--subformat", "monolithicFlat"], Format::Vmdk),
        ("c.vmdk", &["--subformat", "streamOptimized"], Format::Vmdk),
        ("a.vdi", &[], Format::Vdi),
        ("b.vdi", &["--subformat", "static"], Format::Vdi),
        ("a.qcow2", &[], Format::Qcow2),
        ("b.qcow2", &["--compress"], Format::Qcow2),
    ]
    .into_iter()
    .enumerate()
    {
        let to = outside.path().join(name);
        let told = export(&raw, &to, more);
        assert_eq!(told["data_bytes"].as_u64(), Some(data), "{i}: {told}");
        let written = told["written_bytes"].as_u64().unwrap();
        assert!(written < data + (2 << 20), "{name}: {told}");
        assert!(
            contents(&to, format) == bytes,
            "{name}: the contents differ"
        );
        if qemu {
            qemu_compares(&to, &raw);
        }
        let back = store.dir().join(format!("back-{i}.raw"));
        run(nodupe().arg("import").args([&to, &back]));
        assert!(
            fs::read(&back).unwrap() == bytes,
            "{name}: imported, it differs"
        );
    }
    store.unmount();
    store.check();
}

#[test]
fn what_is_written_in_order_goes_to_standard_output() {
    if let Some(why) = cannot_mount() {
        return not_run("what_is_written_in_order_goes_to_standard_output", &why);
    }
    let (_store, outside, raw, bytes, _) = with_disk();
    for (format, kind) in [
        (Format::Raw, "raw"),
        (Format::Vhd, "fixed"),
        (Format::Vhd, "dynamic"),
        (Format::Vhdx, "dynamic"),
        (Format::Vmdk, "streamOptimized"),
        (Format::Vmdk, "monolithicSparse"),
        (Format::Vdi, "dynamic"),
        (Format::Qcow2, "qcow2"),
    ] {
        let to = outside.path().join(format!("{kind}.{format}"));
        let output = nodupe()
            .arg("export")
            .args([&raw, Path::new("-")])
            .args(["--format", format.name(), "--subformat", kind])
            .stdout(Stdio::from(File::create(&to).unwrap()))
            .output()
            .unwrap();
        assert!(output.status.success(), "{kind} {format}: {output:?}");
        assert!(contents(&to, format) == bytes, "{kind} {format}");
    }
    let output = nodupe()
        .arg("export")
        .args([&raw, Path::new("-")])
        .args(["--format", "qcow2", "--compress"])
        .output()
        .unwrap();
    assert!(!output.status.success(), "it is not written in order");
}

/// The head of a dynamic VHD of this size is one block of 4 KiB, as is what comes before the data.
#[test]
fn a_dynamic_vhd_of_any_size_goes_to_standard_output() {
    let outside = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let raw = outside.path().join("a.raw");
    let file = File::create(&raw).unwrap();
    file.set_len(1200 << 20).unwrap();
    for at in [3_u64 << 20, 1000 << 20] {
        file.write_all_at(&[7; 4096], at).unwrap();
    }
    let to = outside.path().join("a.vhd");
    run(nodupe()
        .arg("export")
        .args([&raw, Path::new("-")])
        .args(["--format", "vhd", "--subformat", "dynamic"])
        .stdout(Stdio::from(File::create(&to).unwrap())));
    let source: Arc<dyn Source> = Arc::new(FileSource::new(File::open(&to).unwrap()).unwrap());
    let layer = probe::open(source, Format::Vhd, &mut |_| unreachable!()).unwrap();
    let chain = Chain::new(vec![layer]);
    for (at, byte) in [(3_u64 << 20, 7), ((3 << 20) + 4096, 0), (1000 << 20, 7)] {
        let mut bytes = [1; 512];
        chain.read(at, &mut bytes).unwrap();
        assert_eq!(bytes, [byte; 512], "{at}");
    }
    // What is odd about an image is told to whoever makes another one of it.
    let told = export(&to, &outside.path().join("whole.vdi"), &[]);
    assert_eq!(told["advice"].as_array().map(Vec::len), Some(0), "{told}");
    let file = File::options().write(true).open(&to).unwrap();
    file.set_len(to.metadata().unwrap().len() - 512).unwrap();
    let told = export(&to, &outside.path().join("cut.vdi"), &[]);
    assert_eq!(told["advice"].as_array().map(Vec::len), Some(1), "{told}");
}

#[test]
fn of_a_clone_only_the_differences_are_exported() {
    if let Some(why) = cannot_mount() {
        return not_run("of_a_clone_only_the_differences_are_exported", &why);
    }
    let (mut store, outside, gold, mut bytes, _) = with_disk();
    let clone = store.dir().join("vm.raw");
    run(nodupe().arg("clone").args([&gold, &clone]));
    let file = File::options().write(true).open(&clone).unwrap();
    for (at, byte, len) in [
        (6_u64 << 20, 3_u8, 4096_usize),
        (2 << 20, 9, 8192),
        (1 << 20, 0, 4096),
    ] {
        file.write_all_at(&vec![byte; len], at).unwrap();
        bytes[at as usize..at as usize + len].fill(byte);
    }
    // Written, but equal to what was there.
    file.write_all_at(&bytes[7 << 20..(7 << 20) + 4096], 7 << 20)
        .unwrap();
    drop(file);
    let qemu = has_qemu();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    for extension in ["qcow2", "vmdk", "vhd", "vhdx", "vdi"] {
        let format = Format::named(extension).unwrap();
        let parent = outside.path().join(format!("gold.{extension}"));
        let child = outside.path().join(format!("vm.{extension}"));
        export(&gold, &parent, &[]);
        let told = export(
            &clone,
            &child,
            &["--backing", &text(&gold), "--parent", &text(&parent)],
        );
        assert_eq!(told["data_bytes"].as_u64(), Some(16384), "{told}");
        let written = told["written_bytes"].as_u64().unwrap();
        // VDI has nothing smaller than its blocks of 1 MiB, in three of which something differs.
        let limit = if format == Format::Vdi {
            4 << 20
        } else {
            1 << 20
        };
        assert!(written < limit, "{extension}: {told}");
        if format != Format::Vdi {
            assert!(contents(&child, format) == bytes, "{extension}");
        }
        // As a library reads it: a VDI names its parent by its id alone.
        let flat = outside.path().join(format!("flat-{extension}.raw"));
        export(&child, &flat, &[]);
        assert!(fs::read(&flat).unwrap() == bytes, "{extension}");
        if qemu && matches!(format, Format::Qcow2 | Format::Vmdk) {
            qemu_compares(&child, &clone);
        }
    }
    // A parent that has no identity is no parent of a VHD.
    let output = nodupe()
        .arg("export")
        .args([&clone, &outside.path().join("x.vhd")])
        .arg("--backing")
        .arg(&gold)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && told.contains("--parent"),
        "{told}"
    );
    // An overlay of the raw file itself.
    fs::copy(&gold, outside.path().join("gold.raw")).unwrap();
    let child = outside.path().join("overlay.qcow2");
    export(&clone, &child, &["--backing", &text(&gold), "--compress"]);
    assert!(contents(&child, Format::Qcow2) == bytes);
    store.unmount();
    store.check();
}
