//! Conversion inside a mounted pool: every direction shares the payload, reads the same, and leaves
//! nothing when it is killed.
#![cfg(feature = "fuse")]
#![allow(clippy::unwrap_used)]

mod datastore;
mod images;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use datastore::{Datastore, cannot_mount, nodupe, not_run, run};
use images::{contents, disk, has_qemu, identity, qemu_compares};
use nodupe::device::SplitMix64;
use nodupe::formats::Format;
use serde_json::Value;

/// File extension, subformat, format.
const KINDS: [(&str, &str, Format); 9] = [
    ("raw", "raw", Format::Raw),
    ("vhd", "fixed", Format::Vhd),
    ("vhd", "dynamic", Format::Vhd),
    ("vhdx", "dynamic", Format::Vhdx),
    ("vhdx", "fixed", Format::Vhdx),
    ("vmdk", "flat", Format::Vmdk),
    ("vdi", "dynamic", Format::Vdi),
    ("vdi", "fixed", Format::Vdi),
    ("qcow2", "qcow2", Format::Qcow2),
];

fn convert(src: &Path, dst: &Path, more: &[&str]) -> Value {
    let mut command = nodupe();
    command.arg("convert").arg(src).arg(dst).args(more);
    let output = run(command.arg("--json"));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn remove(path: &Path) {
    fs::remove_file(path).unwrap();
    let stem = path.file_stem().unwrap().to_str().unwrap();
    if path
        .extension()
        .is_some_and(|extension| extension == "vmdk")
    {
        fs::remove_file(path.with_file_name(format!("{stem}-flat.vmdk"))).unwrap();
    }
}

#[test]
fn every_direction_shares_the_payload_and_reads_the_same() {
    if let Some(why) = cannot_mount() {
        return not_run(
            "every_direction_shares_the_payload_and_reads_the_same",
            &why,
        );
    }
    let mut store = Datastore::new("4G");
    let dir = store.dir();
    let (bytes, data) = disk(24 << 20);
    let raw = dir.join("0.raw");
    fs::write(&raw, &bytes).unwrap();
    // A file written with its zeros: the pool makes holes of them.
    let qemu = has_qemu();
    for (i, (extension, kind, format)) in KINDS.into_iter().enumerate() {
        let from = dir.join(format!("from-{i}.{extension}"));
        convert(&raw, &from, &["--subformat", kind]);
        if qemu {
            qemu_compares(&from, &raw);
        }
        for (k, (extension, kind, target)) in KINDS.into_iter().enumerate() {
            let to = dir.join(format!("to-{k}.{extension}"));
            let told = convert(&from, &to, &["--subformat", kind]);
            let why = format!("{format} {i} to {target} {k}: {told}");
            assert_eq!(told["copied_bytes"], 0, "{why}");
            let shared = told["shared_bytes"].as_u64().unwrap();
            assert!(shared >= data && shared < data + (1 << 20), "{why}");
            assert!(contents(&to, target) == bytes, "{why}");
            remove(&to);
        }
    }
    store.unmount();
    store.check();
}

/// Bytes of the pool in use.
fn used(dir: &Path) -> u64 {
    let output = run(nodupe().arg("df").arg("--json").arg(dir));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let pools = told["pools"].as_array().unwrap();
    pools[0]["used"].as_u64().unwrap()
}

#[test]
fn a_hundred_gibibytes_cost_a_few_mebibytes() {
    if let Some(why) = cannot_mount() {
        return not_run("a_hundred_gibibytes_cost_a_few_mebibytes", &why);
    }
    const SIZE: u64 = 100 << 30;
    let mut store = Datastore::new("4G");
    let dir = store.dir();
    let raw = dir.join("dense.raw");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&raw)
        .unwrap();
    // One region of 32 MiB, again and again.
    let (mut random, mut at) = (SplitMix64::new(3), 0);
    while at < 32 << 20 {
        let bytes: Vec<u8> = (0..1 << 17)
            .flat_map(|_| random.next().to_le_bytes())
            .collect();
        file.write_all_at(&bytes, at).unwrap();
        at += bytes.len() as u64;
    }
    file.set_len(SIZE).unwrap();
    while at < SIZE {
        let len = at.min(SIZE - at);
        at += nodupe::sys::files::copy_range(&file, 0, &file, at, len).unwrap();
    }
    drop(file);
    let mut last = raw;
    for (extension, kind, _) in KINDS.into_iter().skip(1) {
        let to = dir.join(format!("{kind}.{extension}"));
        let before = used(&dir);
        // Each from the one before, so that each is once a source.
        let told = convert(&last, &to, &["--subformat", kind]);
        assert_eq!(told["shared_bytes"].as_u64(), Some(SIZE), "{told}");
        assert_eq!(told["copied_bytes"], 0, "{told}");
        let more = used(&dir).saturating_sub(before);
        assert!(
            more < 10 << 20,
            "{kind} {extension}: {more} bytes more in use"
        );
        last = to;
    }
    // The last of the disk is the last of the region.
    let back = dir.join("back.raw");
    convert(&last, &back, &[]);
    let (mut first, mut again) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let file = File::open(&back).unwrap();
    file.read_exact_at(&mut first, 31 << 20).unwrap();
    file.read_exact_at(&mut again, SIZE - (1 << 20)).unwrap();
    assert!(first == again && first.iter().any(|byte| *byte != 0));
    drop(file);
    store.unmount();
    store.check();
}

#[test]
fn a_bitmap_that_is_not_as_the_others_counts() {
    let name = "a_bitmap_that_is_not_as_the_others_counts";
    if let Some(why) = cannot_mount() {
        return not_run(name, &why);
    }
    let store = Datastore::new("1G");
    let dir = store.dir();
    let (size, block) = (24 << 20, 2 << 20);
    let mut bytes: Vec<u8> = (0..size).map(|at| (at / 4096 % 255 + 1) as u8).collect();
    let (raw, vhd) = (dir.join("0.raw"), dir.join("0.vhd"));
    fs::write(&raw, &bytes).unwrap();
    convert(&raw, &vhd, &["--subformat", "dynamic"]);
    let file = File::options().read(true).write(true).open(&vhd).unwrap();
    for cut in [0, 7, 8, 11] {
        // The first sector of the block is no more there, says its bitmap.
        let at = (2 * 4096 - 512 + cut * (block + 4096)) as u64;
        let mut bits = [0; 512];
        file.read_exact_at(&mut bits, at).unwrap();
        assert_eq!(bits, [0xff; 512]);
        file.write_all_at(&[0x7f], at).unwrap();
        bytes[cut * block..][..512].fill(0);
        let to = dir.join(format!("to-{cut}.raw"));
        convert(&vhd, &to, &[]);
        assert!(contents(&to, Format::Raw) == bytes, "{cut}");
    }
}

#[test]
fn what_is_not_aligned_is_copied_and_told() {
    let name = "what_is_not_aligned_is_copied_and_told";
    if let Some(why) = cannot_mount() {
        return not_run(name, &why);
    }
    if !has_qemu() {
        return not_run(name, "qemu-img is missing: run scripts/setup");
    }
    let store = Datastore::new("4G");
    let dir = store.dir();
    let (bytes, data) = disk(24 << 20);
    let raw = dir.join("0.raw");
    fs::write(&raw, &bytes).unwrap();
    // QEMU puts the bitmap right before the block, which is therefore 512 bytes off.
    let vhd = dir.join("qemu.vhd");
    run(Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on"])
        .args([&raw, &vhd]));
    let to = dir.join("to.qcow2");
    let told = convert(&vhd, &to, &[]);
    // Every eighth block is where it should be, by chance.
    let [copied, shared] = ["copied_bytes", "shared_bytes"].map(|key| told[key].as_u64().unwrap());
    assert!(copied > 0 && copied + shared >= data, "{told}");
    assert!(contents(&to, Format::Qcow2) == bytes);
    // A chain: the child's own blocks, and its parent's.
    let child = dir.join("child.qcow2");
    run(Command::new("qemu-img")
        .args([
            "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "to.qcow2",
        ])
        .arg(&child));
    run(Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 5 2M 64k"])
        .arg(&child));
    let flat = dir.join("flat.vdi");
    let told = convert(&child, &flat, &[]);
    assert_eq!(told["copied_bytes"], 0, "{told}");
    let mut expected = bytes;
    expected[2 << 20..(2 << 20) + (64 << 10)].fill(5);
    assert!(contents(&flat, Format::Vdi) == expected);
}

#[test]
fn a_child_finds_its_parent_below_what_is_allowed() {
    if let Some(why) = cannot_mount() {
        return not_run("a_child_finds_its_parent_below_what_is_allowed", &why);
    }
    let mut store = Datastore::new("1G");
    let dir = store.dir();
    let (mut bytes, _) = disk(24 << 20);
    let raw = dir.join("gold.raw");
    fs::write(&raw, &bytes).unwrap();
    let vm = dir.join("vm.raw");
    run(nodupe().arg("clone").args([&raw, &vm]));
    let file = File::options().write(true).open(&vm).unwrap();
    for (at, byte) in [(0, 5), (6 << 20, 0), (20 << 20, 7)] {
        file.write_all_at(&[byte; 4096], at).unwrap();
        bytes[at as usize..at as usize + 4096].fill(byte);
    }
    drop(file);
    let outside = tempfile::tempdir().unwrap();
    for extension in ["vhd", "vhdx", "vmdk", "vdi", "qcow2"] {
        let library = dir.join(format!("library-{extension}"));
        let (golds, vms) = (library.join("gold"), library.join("vms/new"));
        fs::create_dir_all(&golds).unwrap();
        fs::create_dir_all(&vms).unwrap();
        let gold = golds.join(format!("gold.{extension}"));
        let child = vms.join(format!("vm.{extension}"));
        run(nodupe().arg("export").args([&raw, &gold]));
        run(nodupe()
            .arg("export")
            .args([&vm, &child])
            .arg("--backing")
            .arg(&raw)
            .arg("--parent")
            .arg(&gold));
        let flat = vms.join("flat.raw");
        let output = nodupe()
            .arg("convert")
            .args([&child, &flat])
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        let named = told.contains(&format!("gold.{extension}")) || told.contains("UUID");
        assert!(named && told.contains("--allow-parent"), "{told}");
        assert!(!output.status.success() && !flat.exists());
        let allow = ["--allow-parent", library.to_str().unwrap()];
        let told = convert(&child, &flat, &allow);
        assert_eq!(told["copied_bytes"], 0, "{extension}: {told}");
        assert!(fs::read(&flat).unwrap() == bytes, "{extension}: converted");
        let to = outside.path().join(format!("{extension}.raw"));
        run(nodupe().arg("export").args([&child, &to]).args(allow));
        assert!(fs::read(&to).unwrap() == bytes, "{extension}: exported");
        // In the tree of the child, an id leads to it wherever it is.
        if matches!(extension, "vhd" | "vhdx" | "vdi") {
            let below = vms.join("old");
            fs::rename(&golds, &below).unwrap();
            fs::rename(
                below.join(format!("gold.{extension}")),
                below.join(format!("x.{extension}")),
            )
            .unwrap();
            fs::remove_file(&flat).unwrap();
            convert(&child, &flat, &[]);
            assert!(fs::read(&flat).unwrap() == bytes, "{extension}: by its id");
        }
    }
    store.unmount();
    store.check();
}

#[test]
fn a_new_image_has_new_ids_unless_they_are_kept() {
    if let Some(why) = cannot_mount() {
        return not_run("a_new_image_has_new_ids_unless_they_are_kept", &why);
    }
    let store = Datastore::new("1G");
    let dir = store.dir();
    let (bytes, _) = disk(24 << 20);
    let raw = dir.join("0.raw");
    fs::write(&raw, &bytes).unwrap();
    let vhd = dir.join("a.vhd");
    convert(&raw, &vhd, &[]);
    convert(&vhd, &dir.join("b.vhdx"), &[]);
    convert(&vhd, &dir.join("c.vdi"), &["--keep-identity"]);
    assert_ne!(identity(&vhd), identity(&dir.join("b.vhdx")));
    assert_eq!(identity(&vhd), identity(&dir.join("c.vdi")));
    // Nothing is overwritten, and nothing is made of what is not in the pool.
    let refused = |src: &Path, dst: &Path| {
        let output = nodupe().arg("convert").args([src, dst]).output().unwrap();
        assert!(!output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(refused(&raw, &vhd).contains("already"));
    let outside = tempfile::tempdir().unwrap();
    let elsewhere = outside.path().join("0.raw");
    fs::write(&elsewhere, b"raw").unwrap();
    assert!(refused(&elsewhere, &dir.join("d.vhd")).contains("import"));
    assert!(refused(&raw, &outside.path().join("d.vhd")).contains("export"));
    // Clones with ids of their own.
    for (extension, kind) in [("vhd", "dynamic"), ("vhdx", "fixed"), ("vdi", "fixed")] {
        let image = dir.join(format!("gold.{extension}"));
        convert(&raw, &image, &["--subformat", kind]);
        let name = dir.join(format!("vm-{{}}.{extension}"));
        fs::set_permissions(&image, Permissions::from_mode(0o444)).unwrap();
        run(nodupe()
            .args(["clone", "--new-identity", "--count", "2"])
            .args([&image, &name]));
        let clones = [1, 2].map(|i| dir.join(format!("vm-{i}.{extension}")));
        let mode = fs::metadata(&clones[0]).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o444);
        let ids = [&image, &clones[0], &clones[1]].map(|path| identity(path));
        assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2]);
        let format = match extension {
            "vhd" => Format::Vhd,
            "vhdx" => Format::Vhdx,
            _ => Format::Vdi,
        };
        assert!(contents(&clones[1], format) == bytes, "{extension}");
    }
    // A flat VMDK: the clone has an extent of its own.
    let flat = dir.join("gold.vmdk");
    convert(&raw, &flat, &[]);
    run(nodupe()
        .args(["clone", "--new-identity"])
        .args([&flat, &dir.join("vm.vmdk")]));
    let clone = dir.join("vm.vmdk");
    assert!(identity(&clone).is_some() && identity(&clone) != identity(&flat));
    let text = fs::read_to_string(&clone).unwrap();
    assert!(
        text.contains("\"vm-flat.vmdk\"") && !text.contains("gold"),
        "{text}"
    );
    assert!(contents(&clone, Format::Vmdk) == bytes);
    // All or none, if a name is taken.
    fs::remove_file(&clone).unwrap();
    let output = nodupe()
        .args(["clone", "--new-identity"])
        .args([&flat, &clone])
        .output()
        .unwrap();
    assert!(!output.status.success() && !clone.exists());
    fs::remove_file(dir.join("vm-1.vhd")).unwrap();
    let output = nodupe()
        .args(["clone", "--new-identity", "--count", "2"])
        .args([&dir.join("gold.vhd"), &dir.join("vm-{}.vhd")])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("nothing was made"), "{told}");
    assert!(!dir.join("vm-1.vhd").exists());
    let output = nodupe()
        .args(["clone", "--new-identity"])
        .args([&raw, &dir.join("x.raw")])
        .output()
        .unwrap();
    assert!(!output.status.success() && !dir.join("x.raw").exists());
    // What no image is: no option of another verb is advised.
    fs::write(
        dir.join("packed"),
        [&b"\x1f\x8b\x08"[..], &[7; 4096]].concat(),
    )
    .unwrap();
    let output = nodupe()
        .args(["clone", "--new-identity"])
        .args([&dir.join("packed"), &dir.join("x")])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && told.contains("compressed"),
        "{told}"
    );
    assert!(!told.contains("--from"), "{told}");
}

#[test]
fn a_killed_conversion_or_clone_leaves_nothing_or_all() {
    if let Some(why) = cannot_mount() {
        return not_run("a_killed_conversion_or_clone_leaves_nothing_or_all", &why);
    }
    let mut store = Datastore::new("1G");
    let dir = store.dir();
    let (bytes, _) = disk(24 << 20);
    let raw = dir.join("0.raw");
    fs::write(&raw, &bytes).unwrap();
    let (gold, to) = (dir.join("gold.vhd"), dir.join("to.vhd"));
    convert(&raw, &gold, &[]);
    for i in 0..40_u64 {
        let mut command = nodupe();
        match i % 2 {
            0 => command
                .arg("convert")
                .args([&raw, &to])
                .args(["--subformat", "dynamic"]),
            _ => command.args(["clone", "--new-identity"]).args([&gold, &to]),
        };
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(i / 2));
        child.kill().unwrap();
        child.wait().unwrap();
        for entry in fs::read_dir(&dir).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            // Killed between its birth and the loss of its name, a file stays: with nothing in it.
            let hidden = name.starts_with(".nodupe-") && entry.metadata().unwrap().len() == 0;
            let known = ["0.raw", "gold.vhd", "to.vhd"].contains(&name.as_str());
            assert!(hidden || known, "{name}");
        }
        if to.exists() {
            assert!(contents(&to, Format::Vhd) == bytes);
            fs::remove_file(&to).unwrap();
        }
    }
    store.unmount();
    store.check();
}
