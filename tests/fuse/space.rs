//! What `stat`, `df` and `du` are told.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use nodupe::vfs::BlocksPolicy;

use crate::fixture::{Mounted, cp, cp_is_new, noise};
use crate::sys;

const MIB: u64 = 1024 * 1024;

#[test]
fn the_root_tells_of_the_pool_and_a_file_of_itself() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    if !cp_is_new() {
        return;
    }
    let (gold, clone) = (mounted.path("gold"), mounted.path("clone"));
    fs::write(&gold, noise(1, 32 * 1024 * 1024)).unwrap();
    mounted.pool().checkpoint().unwrap();
    let used_of = |path: &Path| {
        let (blocks, free, available, unit) = sys::statfs(path);
        assert!(available <= free && free <= blocks);
        (blocks - free) * unit
    };
    let usage = mounted.pool().usage();
    let root = used_of(&mounted.root());
    assert!(root.abs_diff(usage.used) < MIB, "{root} {usage:?}");
    assert_eq!(used_of(&gold), 32 * MIB);
    let (_, _, available, unit) = sys::statfs(&gold);
    assert!((available * unit).abs_diff(usage.available) < MIB);

    cp(&gold, &clone);
    mounted.pool().checkpoint().unwrap();
    // What a file uses is remembered for a second.
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!((used_of(&gold), used_of(&clone)), (0, 0));
    let file = File::options().write(true).open(&clone).unwrap();
    file.write_all_at(&noise(2, 8 * 1024 * 1024), 0).unwrap();
    file.sync_all().unwrap();
    mounted.pool().checkpoint().unwrap();
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!((used_of(&gold), used_of(&clone)), (8 * MIB, 8 * MIB));
}

#[test]
fn blocks_are_the_size_so_that_cp_sees_no_holes() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("file");
    let file = File::create_new(&path).unwrap();
    file.set_len(10 * MIB).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().blocks(), 0);
    file.write_all_at(b"data", 5 * MIB).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().blocks() * 512, 10 * MIB);
    file.set_len(10 * MIB + 1).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().blocks() * 512, 10 * MIB + 4096);
}

#[test]
fn blocks_are_what_is_allocated_where_that_is_asked_for() {
    let Some(mounted) = Mounted::with(|options| options.blocks = BlocksPolicy::Allocated) else {
        return;
    };
    let path = mounted.path("file");
    let file = File::create_new(&path).unwrap();
    file.set_len(10 * MIB).unwrap();
    file.write_all_at(&noise(1, 8192), 5 * MIB).unwrap();
    file.sync_all().unwrap();
    mounted.pool().checkpoint().unwrap();
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(fs::metadata(&path).unwrap().blocks() * 512, 8192);
}
