//! `nodupe dedupe`, and `import --dedupe` beside what the pool has.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use super::datastore::{Datastore, nodupe, run};
use super::images::{Disk, Kind, noise, write};
use super::{folder, import, json, store};

const BLOCK: usize = 4096;

fn dedupe(args: &[&str], files: &[&Path]) -> Output {
    let mut command = nodupe();
    command.arg("dedupe").args(args).args(files);
    command.output().unwrap()
}

fn report(args: &[&str], files: &[&Path]) -> Value {
    let output = dedupe(&[args, &["--json"]].concat(), files);
    assert!(output.status.success(), "{output:?}");
    json(&output)
}

fn number(report: &Value, key: &str) -> u64 {
    let number = report[key].as_u64();
    number.unwrap_or_else(|| panic!("no {key}: {report}"))
}

/// Bytes of the pool in use, once what was freed is free.
fn used(store: &Datastore) -> u64 {
    let output = run(nodupe().args(["df", "--json"]).arg(store.dir()));
    let report = json(&output);
    number(&report["pools"][0], "used")
}

fn sync(path: &Path) {
    File::open(path).unwrap().sync_all().unwrap();
}

/// Bytes of a file of the pool that it shares. The daemon remembers it for a moment: once a file.
fn shared_of(path: &Path) -> u64 {
    let output = run(nodupe().args(["df", "--json"]).arg(path));
    let file = json(&output)["files"][0].clone();
    number(&file, "mapped") - number(&file, "exclusive")
}

fn put(path: &Path, bytes: &[u8]) -> PathBuf {
    fs::write(path, bytes).unwrap();
    sync(path);
    path.to_path_buf()
}

#[test]
fn images_that_were_made_independently_share_what_is_equal() {
    let test = "images_that_were_made_independently_share_what_is_equal";
    let Some(mut store) = store(test) else { return };
    let home = folder();
    let disk = Disk::base(5);
    fs::write(home.path().join("a.raw"), &disk.bytes).unwrap();
    write(home.path(), "b", Kind::Qcow2, &disk, None);
    for name in ["a.raw", "b.qcow2"] {
        let output = import(&[&home.path().join(name), &store.dir().join(name)]);
        assert!(output.status.success(), "{output:?}");
    }
    let (a, b) = (store.dir().join("a.raw"), store.dir().join("b.qcow2"));
    let data = 65536 + (1 << 20) + 4096 + 8192;
    let contents = |path: &Path| fs::read(path).unwrap();
    let (of_a, of_b) = (contents(&a), contents(&b));

    let dry = report(&["--dry-run"], &[&a, &b]);
    assert_eq!(
        (number(&dry, "compared"), number(&dry, "shared")),
        (data, data)
    );
    assert!(dry["freed"].is_null());
    let before = used(&store);
    let done = report(&[], &[&a, &b]);
    assert_eq!(
        (number(&done, "compared"), number(&done, "shared")),
        (data, data)
    );
    // A few blocks for maps.
    assert!(number(&done, "freed") > data - (128 << 10), "{done}");
    assert!(before - used(&store) > data - (128 << 10));
    assert!(contents(&a) == of_a && contents(&b) == of_b);
    // What is shared is not looked at again.
    let again = report(&[], &[&store.dir()]);
    assert_eq!(
        (number(&again, "compared"), number(&again, "shared")),
        (0, 0)
    );

    // Each goes on alone.
    let file = File::options().write(true).open(&a).unwrap();
    file.write_all_at(&noise(77, 3 * BLOCK), 1 << 20).unwrap();
    file.sync_all().unwrap();
    drop(file);
    assert!(contents(&b) == of_b);
    fs::remove_file(&a).unwrap();
    assert!(contents(&b) == of_b);
    store.unmount();
    store.check();
}

#[test]
fn whatever_is_equal_at_multiples_of_4_kib_is_found() {
    let test = "whatever_is_equal_at_multiples_of_4_kib_is_found";
    let Some(mut store) = store(test) else { return };
    let dir = store.dir().join("dir/sub");
    fs::create_dir_all(&dir).unwrap();
    let common = noise(1, 700 * BLOCK);
    let moved = [&noise(2, 3 * BLOCK)[..], &common[200 * BLOCK..]].concat();
    let unaligned = [&noise(3, 512)[..], &common].concat();
    // Every second block, and one block again and again.
    let mut sparse = noise(4, 64 * BLOCK);
    for i in (0..64).step_by(2) {
        let range = i * BLOCK..(i + 1) * BLOCK;
        sparse[range.clone()].copy_from_slice(&common[range]);
    }
    let filler = noise(5, BLOCK).repeat(300);
    let odd = [&common[5 * BLOCK..9 * BLOCK], &noise(6, 100)].concat();
    let odd_tail = [&noise(7, BLOCK)[..], &noise(6, 100)].concat();
    let all = [
        ("common", common),
        ("dir/moved", moved),
        ("dir/sub/sparse", sparse),
        ("filler", filler),
        ("odd", odd),
        ("odd_tail", odd_tail),
        ("unaligned", unaligned),
    ];
    for (name, bytes) in &all {
        put(&store.dir().join(name), bytes);
    }
    let done = report(&[], &[&store.dir()]);
    let files = done["files"].as_array().unwrap();
    let found = |name: &str| {
        let path = store.dir().join(name);
        let file = files
            .iter()
            .find(|file| file["file"] == path.to_str().unwrap());
        number(file.unwrap(), "shared") / BLOCK as u64
    };
    let counts = all.each_ref().map(|(name, _)| found(name));
    assert_eq!(counts, [0, 500, 32, 299, 4, 1, 0], "{done}");
    for (name, bytes) in &all {
        assert!(
            fs::read(store.dir().join(name)).unwrap() == *bytes,
            "{name}"
        );
    }
    store.unmount();
    store.check();
}

#[test]
fn what_is_written_meanwhile_stays() {
    let test = "what_is_written_meanwhile_stays";
    let Some(mut store) = store(test) else { return };
    let bytes = noise(1, 4 << 20);
    let (a, b) = (store.dir().join("a"), store.dir().join("b"));
    put(&a, &bytes);
    put(&b, &bytes);
    // As often as it takes to write all of it twice, in both files.
    let wanted = [&a, &b].map(|path| {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let (mut bytes, salt) = (bytes.clone(), path.as_os_str().len() as u64);
        std::thread::spawn(move || {
            for round in 0..2 {
                for i in 0..1024_usize {
                    let at = i * 389 % 1024 * BLOCK;
                    // The same in both files now and then.
                    let seed = if i % 3 == 0 { 9 } else { salt + round };
                    let block = noise(seed * 4096 + i as u64, BLOCK);
                    file.write_all_at(&block, at as u64).unwrap();
                    bytes[at..at + BLOCK].copy_from_slice(&block);
                }
            }
            bytes
        })
    });
    while !wanted.iter().all(|writer| writer.is_finished()) {
        report(&[], &[&a, &b]);
    }
    let wanted = wanted.map(|writer| writer.join().unwrap());
    report(&[], &[&b, &a]);
    assert!(fs::read(&a).unwrap() == wanted[0]);
    assert!(fs::read(&b).unwrap() == wanted[1]);
    store.unmount();
    store.check();
    store.mount();
    assert!(fs::read(&a).unwrap() == wanted[0]);
    assert!(fs::read(&b).unwrap() == wanted[1]);
    store.unmount();
}

#[test]
fn dedupe_says_what_it_cannot_do() {
    let Some(mut store) = store("dedupe_says_what_it_cannot_do") else {
        return;
    };
    let home = folder();
    let outside = put(&home.path().join("outside"), b"x");
    for (args, code, why) in [
        (vec![outside.as_path()], 1, "is not in a mounted pool"),
        (vec![Path::new("/no/such/file")], 1, "cannot look at"),
        (vec![], 2, "required"),
    ] {
        let output = dedupe(&[], &args);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(told.contains(why), "{told}");
    }
    let inside = put(&store.dir().join("inside"), &noise(1, BLOCK));
    let output = dedupe(&[], &[&inside]);
    assert!(output.status.success(), "{output:?}");
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(told.contains("1 file looked at"), "{told}");
    store.unmount();
}

#[test]
fn what_can_only_be_read_is_a_source() {
    let test = "what_can_only_be_read_is_a_source";
    let Some(mut store) = store(test) else { return };
    let (gold, mine) = (store.dir().join("sleep"), store.dir().join("mine"));
    for path in [&gold, &mine] {
        fs::copy("/bin/sleep", path).unwrap();
        sync(path);
    }
    // Whoever may do everything cannot write to what is being executed, on most kernels.
    let mut child = Command::new(&gold).arg("600").spawn().unwrap();
    let busy = File::options().write(true).open(&gold).is_err();
    let done = report(&[], &[&mine, &gold]);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(number(&done, "shared") > 0, "{done}");
    let (sources, others): (Vec<&Value>, Vec<&Value>) = (done["files"].as_array().unwrap())
        .iter()
        .partition(|file| file["source_only"] == true);
    assert_eq!(sources.len(), usize::from(busy), "{done}");
    for file in sources {
        assert_eq!(file["file"], gold.to_str().unwrap());
        assert_eq!(number(file, "shared"), 0);
        assert!(number(others[0], "shared") > 0, "{done}");
    }
    assert!(fs::read(&gold).unwrap() == fs::read(&mine).unwrap());
    store.unmount();
    store.check();
}

#[test]
fn an_import_shares_what_the_pool_has_if_wanted() {
    let test = "an_import_shares_what_the_pool_has_if_wanted";
    let Some(mut store) = store(test) else { return };
    let home = folder();
    let common = noise(1, 6 << 20);
    let there = store.dir().join("there.img");
    put(&there, &common);
    let new = [&noise(2, 3 * BLOCK)[..], &common[5 * BLOCK..]].concat();
    fs::write(home.path().join("new.raw"), &new).unwrap();
    let dst = store.dir().join("x/new.raw");
    fs::create_dir(store.dir().join("x")).unwrap();
    let args = ["--dedupe", "--json"].map(Path::new);
    let output = import(&[&[home.path().join("new.raw").as_path(), &dst][..], &args].concat());
    assert!(output.status.success(), "{output:?}");
    let report = json(&output);
    assert!(number(&report, "written") < 1 << 20, "{report}");
    assert!(number(&report, "deduplicated") > 5 << 20, "{report}");
    assert!(fs::read(&dst).unwrap() == new);
    assert!(shared_of(&there) > 5 << 20);
    // Nothing is left but the two, and each goes on alone.
    assert_eq!(super::names(&store.dir()), ["there.img", "x/new.raw"]);
    fs::remove_file(&there).unwrap();
    assert!(fs::read(&dst).unwrap() == new);
    store.unmount();
    store.check();
}
