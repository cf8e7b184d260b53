//! `create`, `info`, `df` and `check` on pools that are not mounted.

use std::fs::{self, File};

use super::*;

#[test]
fn create_refuses_what_holds_something() {
    let sandbox = Sandbox::new();
    let mut ext4 = vec![0; 64 << 20];
    ext4[0x438..0x43a].copy_from_slice(&[0x53, 0xef]);
    let mut data = vec![0; 64 << 20];
    data[40 << 20] = 1;
    for (name, bytes, word) in [("ext4", ext4, "ext4"), ("data", data, "data")] {
        let file = sandbox.file(name, &bytes);
        let before = state(&file);
        fails(
            &run(&["create", text(&file)]),
            1,
            &[text(&file), word, "--force"],
        );
        assert_eq!(state(&file), before);
        succeeds(&run(&["create", text(&file), "--force"]));
        succeeds(&run(&["check", text(&file)]));
    }
    let pool = sandbox.pool();
    let before = state(&pool);
    fails(
        &run(&["create", text(&pool)]),
        1,
        &["holds a nodupe pool", "--force"],
    );
    assert_eq!(state(&pool), before);
    succeeds(&run(&["create", text(&pool), "--force"]));
    let small = sandbox.file("small", &[0; 1 << 20]);
    let before = state(&small);
    fails(&run(&["create", text(&small)]), 1, &["64 MiB to 1 PiB"]);
    assert_eq!(state(&small), before);
    let orphan = sandbox.path("no/such/dir/p");
    fails(&run(&["create", text(&orphan)]), 1, &["No such file"]);
}

#[test]
fn create_uses_a_zero_filled_file_at_its_size() {
    let sandbox = Sandbox::new();
    let file = sandbox.file("p", &[]);
    let zeros = File::options().write(true).open(&file).unwrap();
    zeros.set_len(96 << 20).unwrap();
    let facts = json(
        &run(&["create", text(&file), "--journal-size", "2M", "--json"]),
        &["pool", "uuid", "format", "size", "journal_size", "created"],
    );
    assert_eq!(facts["size"], 96 << 20);
    assert_eq!(facts["journal_size"], 2 << 20);
    let empty = sandbox.file("empty", &[]);
    succeeds(&run(&["create", text(&empty), "--size", SIZE]));
    assert_eq!(fs::metadata(&empty).unwrap().len(), 64 << 20);
    let quiet = run(&["create", "-q", text(&sandbox.path("q")), "--size", SIZE]);
    succeeds(&quiet);
    assert_eq!(
        (stdout(&quiet), stderr(&quiet)),
        (String::new(), String::new())
    );
}

#[test]
fn the_largest_pool_is_sparse() {
    let sandbox = Sandbox::new();
    let Some(disk) = tmpfs(&sandbox, "the_largest_pool_is_sparse", "400M") else {
        return;
    };
    let pool = disk.join("p");
    succeeds(&run(&[
        "create",
        text(&pool),
        "--size",
        "1P",
        "--journal-size",
        "1M",
    ]));
    succeeds(&run(&["check", text(&pool)]));
    let metadata = fs::metadata(&pool).unwrap();
    assert_eq!(metadata.len(), 1 << 50);
    let taken = metadata.blocks() * 512;
    // The reserve, which is allocated in advance, has 256 MiB in any pool that is large.
    assert!(taken < 272 << 20, "{taken} bytes");
}

#[test]
fn a_journal_can_have_its_own_device() {
    let sandbox = Sandbox::new();
    let (pool, journal) = (sandbox.path("p"), sandbox.path("j"));
    let (pool, journal) = (text(&pool), text(&journal));
    let shape = ["--size", SIZE, "--journal-size", "4M", "--journal", journal];
    succeeds(&run(&[&["create", pool], &shape[..]].concat()));
    let facts = json(&run(&["info", pool, "--json"]), &[]);
    assert_eq!(facts["journal_external"], true);
    fails(&run(&["check", pool]), 3, &["--journal"]);
    succeeds(&run(&["check", pool, "--journal", journal]));
    json(&run(&["df", pool, "--journal", journal, "--json"]), &[]);
}

#[test]
fn facts_of_a_pool_that_is_not_mounted() {
    let sandbox = Sandbox::new();
    let pool = sandbox.pool();
    let before = state(&pool);
    let facts = json(
        &run(&["info", text(&pool), "--json"]),
        &[
            "pool",
            "mount",
            "uuid",
            "format",
            "size",
            "journal_size",
            "clean",
            "created",
        ],
    );
    assert_eq!(facts["size"], 64 << 20);
    assert_eq!(facts["clean"], true);
    assert!(facts["mount"].is_null());
    let df = json(&run(&["df", text(&pool), "--json"]), &["pools", "files"]);
    assert_eq!(df["pools"][0]["size"], 64 << 20);
    let check = json(&run(&["check", text(&pool), "--json"]), &["pool"]);
    assert_eq!(check["clean"], true);
    assert_eq!(check["findings"], Value::Array(Vec::new()));
    let table = stdout(&run(&["df", text(&pool)]));
    for column in [
        "POOL", "SIZE", "USED", "AVAIL", "USE%", "LOGICAL", "SHARING", "JOURNAL",
    ] {
        assert!(table.contains(column), "{table}");
    }
    assert_eq!(state(&pool), before);
}

#[test]
fn check_finds_damage() {
    let sandbox = Sandbox::new();
    let pool = sandbox.pool();
    let mut bytes = fs::read(&pool).unwrap();
    // One flipped bit in the last block that holds something, before the superblock copies.
    let end = bytes.len() - 2 * 4096;
    let last = bytes[..end].iter().rposition(|&byte| byte != 0).unwrap();
    bytes[last] ^= 1;
    fs::write(&pool, bytes).unwrap();
    let before = state(&pool);
    let found = run(&["check", text(&pool), "--json"]);
    assert_eq!(found.status.code(), Some(1), "{}", stderr(&found));
    assert_eq!(state(&pool), before);
}

#[test]
fn a_repair_takes_the_mark_of_a_pool_over() {
    use std::os::unix::fs::FileExt;
    let sandbox = Sandbox::new();
    let pool = sandbox.pool();
    let file = File::options().read(true).write(true).open(&pool).unwrap();
    let mut slot = [0; 4096];
    file.read_exact_at(&mut slot, 4096).unwrap();
    // What a host that died has left.
    let mark = nodupe::ondisk::heartbeat::Heartbeat {
        pool: nodupe::ondisk::superblock::Superblock::decode(&slot)
            .unwrap()
            .uuid,
        owner: [5; 16],
        boot: [6; 16],
        seq: 7,
        time: nodupe::units::Time::default(),
        pid: 8,
        interval_ms: 50,
        host: "elsewhere".into(),
    };
    let at = nodupe::ondisk::heartbeat::HB_BLOCK * 4096;
    file.write_all_at(&mark.encode()[..], at).unwrap();
    let repaired = run(&["check", "--repair", "--yes", text(&pool)]);
    succeeds(&repaired);
    let mut left = [1; 4096];
    file.read_exact_at(&mut left, at).unwrap();
    assert_eq!(left, [0; 4096], "the repair had no mark of its own");
}
