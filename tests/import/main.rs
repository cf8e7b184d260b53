//! `nodupe import` and `inspect` by the real program, into a pool mounted by it: chains of every
//! format, broken libraries, names, images of QEMU's tools, and being killed.
#![allow(clippy::unwrap_used)]

#[path = "../datastore/mod.rs"]
mod datastore;
mod dedupe;
mod images;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use datastore::{Datastore, cannot_mount, nodupe, not_run, run};
use images::{Disk, Kind, chain, write};
use serde_json::Value;

/// A mounted pool; `None`, after saying why, where that is not possible.
fn store(test: &str) -> Option<Datastore> {
    match cannot_mount() {
        Some(why) => {
            not_run(test, &why);
            None
        }
        None => Some(Datastore::new("8G")),
    }
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn import(args: &[&Path]) -> Output {
    let mut command = nodupe();
    command.arg("import").args(args).stdin(Stdio::null());
    command.output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
}

/// Files that were made, by the name of their source.
fn made(report: &Value) -> HashMap<String, PathBuf> {
    let images = report["images"].as_array().unwrap().iter();
    images
        .map(|image| {
            let source = Path::new(image["source"].as_str().unwrap());
            let name = source.file_name().unwrap().to_string_lossy().into_owned();
            (name, PathBuf::from(image["file"].as_str().unwrap()))
        })
        .collect()
}

/// All names below a directory, hidden ones as well.
fn names(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut pending = vec![dir.to_path_buf()];
    while let Some(at) = pending.pop() {
        for entry in fs::read_dir(at).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                pending.push(entry.path());
            } else {
                let path = entry.path();
                found.push(path.strip_prefix(dir).unwrap().display().to_string());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn chains_of_every_format_become_peers() {
    let Some(mut store) = store("chains_of_every_format_become_peers") else {
        return;
    };
    for kind in Kind::ALL {
        for depth in [1, 10, 100] {
            let library = folder();
            let disks = chain(library.path(), kind, depth);
            let dst = store.dir().join(format!("{kind:?}-{depth}"));
            let to_raw = ["--format", "raw", "--json"].map(Path::new);
            let output = import(&[&[library.path(), &dst][..], &to_raw].concat());
            assert!(output.status.success(), "{kind:?} {depth}: {output:?}");
            let report = json(&output);
            let made = made(&report);
            assert_eq!(made.len(), depth + 1);
            // Of a hundred, some and the last.
            let some = disks.iter().rev().step_by(if depth == 100 { 9 } else { 1 });
            for (name, disk) in some {
                assert!(
                    fs::read(&made[name]).unwrap() == disk.bytes,
                    "{kind:?} {name}"
                );
            }
            let sum = |key: &str| -> u64 {
                let images = report["images"].as_array().unwrap().iter();
                images.map(|image| image[key].as_u64().unwrap()).sum()
            };
            let (written, held) = (report["written"].as_u64().unwrap(), sum("held"));
            assert!(written * 100 <= held * 102, "{kind:?}: {written} of {held}");
            assert!(sum("shared") > sum("mapped") / 2, "{report}");
        }
    }
    store.unmount();
    store.check();
}

#[test]
fn a_library_keeps_its_formats_and_its_directories() {
    let test = "a_library_keeps_its_formats_and_its_directories";
    let Some(mut store) = store(test) else { return };
    let library = folder();
    let mut wanted = HashMap::new();
    for kind in Kind::ALL {
        let dir = library.path().join(format!("sub/{kind:?}"));
        fs::create_dir_all(&dir).unwrap();
        wanted.extend(chain(&dir, kind, 2));
    }
    fs::write(library.path().join("sub/notes.txt"), "no image").unwrap();
    let dst = store.dir().join("library");
    let output = import(&[library.path(), &dst, Path::new("--json")]);
    assert!(output.status.success(), "{output:?}");
    let again = import(&[
        &dst,
        &store.dir().join("again"),
        Path::new("--format"),
        Path::new("raw"),
        Path::new("--json"),
    ]);
    assert!(again.status.success(), "{again:?}");
    let made = made(&json(&again));
    assert_eq!(made.len(), wanted.len());
    for kind in Kind::ALL {
        assert!(
            dst.join(format!("sub/{kind:?}/{kind:?}-0.{}", kind.extension()))
                .exists()
        );
    }
    for (name, disk) in &wanted {
        let bytes = fs::read(&made[name]).unwrap();
        let len = disk.bytes.len();
        assert!(bytes[..len] == disk.bytes[..], "{name}");
        assert!(bytes[len..].iter().all(|byte| *byte == 0), "{name}");
    }
    store.unmount();
    store.check();
}

#[test]
fn what_is_broken_is_named_and_the_rest_is_imported() {
    let test = "what_is_broken_is_named_and_the_rest_is_imported";
    let Some(mut store) = store(test) else { return };
    let library = folder();
    let dir = |name: &str| {
        let dir = library.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    };
    // Whole; without its parent; with a parent that was changed; in a circle; cut off.
    chain(&dir("good"), Kind::Vhd, 2);
    chain(&dir("missing"), Kind::Vmdk, 1);
    fs::remove_file(dir("missing").join("Vmdk-0.vmdk")).unwrap();
    chain(&dir("changed"), Kind::Vhdx, 1);
    write(&dir("changed"), "Vhdx-0", Kind::Vhdx, &Disk::base(7), None);
    let first = write(&dir("circle"), "a", Kind::Qcow2, &Disk::base(8), None);
    let a = Some(("a".to_owned(), first));
    let second = write(&dir("circle"), "b", Kind::Qcow2, &Disk::base(8), a.as_ref());
    let b = Some(("b".to_owned(), second));
    write(&dir("circle"), "a", Kind::Qcow2, &Disk::base(8), b.as_ref());
    write(&dir("cut"), "c", Kind::Vdi, &Disk::base(9), None);
    let cut = fs::File::options()
        .write(true)
        .open(dir("cut").join("c.vdi"))
        .unwrap();
    cut.set_len(1 << 20).unwrap();
    symlink("/etc", library.path().join("link")).unwrap();

    let dst = store.dir().join("library");
    let output = import(&[library.path(), &dst, Path::new("--json")]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let report = json(&output);
    assert_eq!(report["images"].as_array().unwrap().len(), 4, "{report}");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    for (name, why) in [
        ("missing/Vmdk-1.vmdk", "\"Vmdk-0.vmdk\" is missing"),
        ("changed/Vhdx-1.vhdx", "its UUID differs"),
        ("circle/a.qcow2", "circle"),
        ("circle/b.qcow2", "circle"),
        ("cut/c.vdi", "behind the end"),
    ] {
        let line = told.lines().find(|line| line.contains(name));
        assert!(
            line.is_some_and(|line| line.contains(why)),
            "{name}: {told}"
        );
    }
    let wanted = [
        "changed/Vhdx-0.vhdx",
        "good/Vhd-0.vhd",
        "good/Vhd-1.vhd",
        "good/Vhd-2.vhd",
    ];
    assert_eq!(names(&dst), wanted);
    store.unmount();
    store.check();
}

#[test]
fn only_what_the_user_named_is_opened() {
    let Some(store) = store("only_what_the_user_named_is_opened") else {
        return;
    };
    let home = folder();
    let (inside, outside) = (home.path().join("in"), home.path().join("out"));
    fs::create_dir_all(&inside).unwrap();
    fs::create_dir_all(&outside).unwrap();
    let gold = Disk::base(1);
    let id = write(&outside, "gold", Kind::Qcow2, &gold, None);
    let child = gold.child(1);
    let mut refused = 0;
    let names = [
        "../out/gold".to_owned(),
        outside.join("gold").display().to_string(),
        "link".to_owned(),
    ];
    symlink(outside.join("gold.qcow2"), inside.join("link.qcow2")).unwrap();
    for (i, name) in names.into_iter().enumerate() {
        let file = format!("child-{i}");
        let child_path = inside.join(format!("{file}.qcow2"));
        let dst = store.dir().join(format!("{file}.raw"));
        write(
            &inside,
            &file,
            Kind::Qcow2,
            &child,
            Some(&(name.clone(), id)),
        );
        let output = import(&[&child_path, &dst]);
        assert_eq!(output.status.code(), Some(1), "{name}: {output:?}");
        assert!(!dst.exists());
        refused += 1;
        let allowed = [Path::new("--allow-parent"), &outside];
        let output = import(&[&[child_path.as_path(), &dst][..], &allowed].concat());
        // A link is not followed out of its tree, whatever else is allowed.
        if name == "link" {
            assert_eq!(output.status.code(), Some(1), "{output:?}");
            continue;
        }
        assert!(output.status.success(), "{name}: {output:?}");
        assert!(fs::read(&dst).unwrap() == child.bytes);
    }
    assert_eq!(refused, 3);
}

#[test]
fn a_format_is_not_guessed_from_what_a_guest_wrote() {
    let Some(store) = store("a_format_is_not_guessed_from_what_a_guest_wrote") else {
        return;
    };
    let home = folder();
    let other = Disk::base(3);
    write(home.path(), "evil", Kind::Qcow2, &other, None);
    let raw = home.path().join("guest.raw");
    fs::rename(home.path().join("evil.qcow2"), &raw).unwrap();
    let dst = store.dir().join("guest.raw");
    let output = import(&[&raw, &dst]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--from raw"));
    let output = import(&[&raw, &dst, Path::new("--from"), Path::new("raw")]);
    assert!(output.status.success(), "{output:?}");
    assert!(fs::read(&raw).unwrap() == fs::read(&dst).unwrap());
}

#[test]
fn names_do_not_collide_and_nothing_is_overwritten() {
    let Some(store) = store("names_do_not_collide_and_nothing_is_overwritten") else {
        return;
    };
    let home = folder();
    write(home.path(), "a", Kind::Vhd, &Disk::base(1), None);
    write(home.path(), "a", Kind::Vdi, &Disk::base(2), None);
    write(home.path(), "b", Kind::Vdi, &Disk::base(3), None);
    let dst = store.dir().join("x");
    let args = [home.path(), &dst, Path::new("--format"), Path::new("raw")];
    let output = import(&args);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(names(&dst), ["a.vdi.raw", "a.vhd.raw", "b.raw"]);
    let before = fs::metadata(dst.join("b.raw")).unwrap();
    let output = import(&args);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("exists"));
    let source = fs::metadata(home.path().join("b.vdi")).unwrap();
    let after = fs::metadata(dst.join("b.raw")).unwrap();
    assert_eq!(before.ino(), after.ino());
    assert_eq!(
        (after.mode(), after.mtime()),
        (source.mode(), source.mtime())
    );

    let outside = import(&[home.path(), &home.path().join("y")]);
    assert_eq!(outside.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&outside.stderr).contains("not in a mounted pool"));
    assert!(!home.path().join("y").exists());
}

#[test]
fn a_killed_import_leaves_nothing_or_all() {
    let Some(mut store) = store("a_killed_import_leaves_nothing_or_all") else {
        return;
    };
    let home = folder();
    let source = home.path().join("gold.raw");
    let bytes = images::noise(5, 24 << 20);
    fs::write(&source, &bytes).unwrap();
    let mut whole = 0;
    for round in 0..20 {
        let dst = store.dir().join(format!("{round}"));
        let mut child = nodupe()
            .args([Path::new("import"), &source, &dst.join("")])
            .args([Path::new("--format"), Path::new("vhd")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(round * 8));
        child.kill().unwrap();
        child.wait().unwrap();
        let made = if dst.exists() {
            names(&dst)
        } else {
            Vec::new()
        };
        // The daemon may be just about to take the hidden name away: nothing was written to it.
        let (hidden, made): (Vec<String>, Vec<String>) = made
            .into_iter()
            .partition(|name| name.starts_with(".nodupe-import-"));
        for name in hidden {
            assert_eq!(fs::metadata(dst.join(name)).unwrap().len(), 0);
        }
        if made.is_empty() {
            continue;
        }
        assert_eq!(made, ["gold.vhd"], "round {round}");
        let found = fs::read(dst.join("gold.vhd")).unwrap();
        assert_eq!(found.len(), bytes.len() + 512);
        assert!(found[..bytes.len()] == bytes[..]);
        whole += 1;
    }
    eprintln!("{whole} of 20 were complete before they were killed");
    store.unmount();
    store.check();
}

#[test]
fn images_of_qemu_read_as_qemu_reads_them() {
    let test = "images_of_qemu_read_as_qemu_reads_them";
    let Some(mut store) = store(test) else { return };
    if Command::new("qemu-img").arg("--version").output().is_err() {
        return not_run(test, "qemu-img is missing: run scripts/setup");
    }
    let home = folder();
    let raw = home.path().join("source.raw");
    let disk = Disk::base(11);
    fs::write(&raw, &disk.bytes).unwrap();
    let lib = home.path().join("lib");
    fs::create_dir(&lib).unwrap();
    for (name, format, options) in [
        ("v2.qcow2", "qcow2", "compat=0.10"),
        ("z.qcow2", "qcow2", "cluster_size=4096"),
        ("zstd.qcow2", "qcow2", "compression_type=zstd"),
        ("parts.qcow2", "qcow2", "extended_l2=on"),
        ("sparse.vmdk", "vmdk", "subformat=monolithicSparse"),
        ("flat.vmdk", "vmdk", "subformat=monolithicFlat"),
        ("split.vmdk", "vmdk", "subformat=twoGbMaxExtentSparse"),
        ("pieces.vmdk", "vmdk", "subformat=twoGbMaxExtentFlat"),
        ("stream.vmdk", "vmdk", "subformat=streamOptimized"),
        ("dynamic.vhd", "vpc", "subformat=dynamic,force_size=on"),
        ("fixed.vhd", "vpc", "subformat=fixed,force_size=on"),
        ("dynamic.vhdx", "vhdx", "subformat=dynamic"),
        ("fixed.vhdx", "vhdx", "subformat=fixed"),
        ("dynamic.vdi", "vdi", "static=off"),
        ("static.vdi", "vdi", "static=on"),
    ] {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "raw", "-O", format, "-o", options]);
        if name.starts_with('z') {
            command.arg("-c");
        }
        run(command.arg(&raw).arg(lib.join(name)));
    }
    let snapshot = |args: &[&str]| {
        run(Command::new("qemu-img")
            .args(args)
            .arg(lib.join("v2.qcow2")));
    };
    snapshot(&["snapshot", "-c", "before"]);
    let write = "write -P 7 4096 65536";
    run(Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", write])
        .arg(lib.join("v2.qcow2")));
    let dst = store.dir().join("lib");
    let output = import(&[
        &lib,
        &dst,
        Path::new("--format"),
        Path::new("raw"),
        Path::new("--json"),
    ]);
    assert!(output.status.success(), "{output:?}");
    let mut changed = disk.bytes.clone();
    changed[4096..4096 + 65536].fill(7);
    let made = names(&dst);
    assert_eq!(made.len(), 16, "{made:?}");
    for name in made {
        let bytes = fs::read(dst.join(&name)).unwrap();
        let wanted = if name == "v2.raw" {
            &changed
        } else {
            &disk.bytes
        };
        let len = wanted.len();
        // QEMU rounds the size of a VHD up.
        assert!(bytes[..len] == wanted[..], "{name}");
        assert!(bytes[len..].iter().all(|byte| *byte == 0), "{name}");
    }
    assert!(dst.join("v2@before.raw").exists());
    store.unmount();
    store.check();
}

#[test]
fn equal_blocks_of_strangers_are_shared_if_wanted() {
    let test = "equal_blocks_of_strangers_are_shared_if_wanted";
    let Some(mut store) = store(test) else { return };
    let home = folder();
    let common = images::noise(1, 6 << 20);
    // The same files at other places, behind something of its own.
    let blocks = |first: u64, skip: usize| {
        let mut bytes = images::noise(first, 3 * 4096);
        bytes.extend_from_slice(&common[skip * 4096..]);
        bytes
    };
    let all = [
        ("a", blocks(2, 0)),
        ("b", blocks(3, 5)),
        ("c", common.clone()),
    ];
    for (name, bytes) in &all {
        fs::write(home.path().join(format!("{name}.raw")), bytes).unwrap();
    }
    let dst = store.dir().join("x");
    let args = ["--dedupe", "--jobs", "1", "--json"].map(Path::new);
    let output = import(&[&[home.path(), &dst][..], &args].concat());
    assert!(output.status.success(), "{output:?}");
    let report = json(&output);
    let (written, shared) = (&report["written"], &report["deduplicated"]);
    let limit = common.len() as u64 + (1 << 20);
    assert!(written.as_u64().unwrap() < limit, "{written} {shared}");
    for (name, bytes) in &all {
        assert!(
            fs::read(dst.join(format!("{name}.raw"))).unwrap() == *bytes,
            "{name}"
        );
    }
    store.unmount();
    store.check();
}

#[test]
fn inspect_tells_what_an_image_is() {
    let home = folder();
    chain(home.path(), Kind::Vhdx, 2);
    let child = home.path().join("Vhdx-2.vhdx");
    let output = run(nodupe().args(["inspect", "--json"]).arg(&child));
    let image = json(&output)["images"][0].clone();
    assert_eq!(image["format"], "vhdx");
    assert_eq!(image["subtype"], "differencing");
    assert_eq!(image["size"], images::SIZE);
    assert_eq!(image["health"], "ok");
    assert_eq!(image["parents"].as_array().unwrap().len(), 2);
    assert_eq!(image["parents"][0]["found"], "by name");
    fs::rename(
        home.path().join("Vhdx-1.vhdx"),
        home.path().join("moved.vhdx"),
    )
    .unwrap();
    let output = run(nodupe().args(["inspect", "--json"]).arg(&child));
    assert_eq!(json(&output)["images"][0]["parents"][0]["found"], "by id");
    fs::remove_file(home.path().join("moved.vhdx")).unwrap();
    let output = nodupe().arg("inspect").arg(&child).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("is missing"));
}
