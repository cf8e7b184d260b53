//! Contents: read, write, append, O_DIRECT, O_SYNC, mappings, allocation, holes.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::fixture::{Mounted, noise};
use crate::sys::{self, Aio, Mapping};

const BLOCK: usize = 4096;

/// Opens for reading and writing, around the page cache.
fn direct(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .unwrap()
}

#[test]
fn what_is_written_is_read() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("file");
    let data = noise(1, 3 * 1024 * 1024 + 17);
    fs::write(&path, &data).unwrap();
    assert_eq!(fs::read(&path).unwrap(), data);
    let facts = fs::metadata(&path).unwrap();
    assert_eq!(facts.len(), data.len() as u64);
    assert_eq!(facts.blksize(), 4096);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.write_all_at(b"patch", 5000).unwrap();
    let mut part = [0; 7];
    file.read_exact_at(&mut part, 4999).unwrap();
    assert_eq!(
        (part[0], &part[1..6], part[6]),
        (data[4999], &b"patch"[..], data[5005])
    );
    file.sync_all().unwrap();
    file.sync_data().unwrap();
}

#[test]
fn appends_of_many_writers_do_not_overwrite() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("log");
    std::thread::scope(|scope| {
        for writer in 0..4u8 {
            let path = &path;
            scope.spawn(move || {
                let mut file = File::options()
                    .append(true)
                    .create(true)
                    .open(path)
                    .unwrap();
                for _ in 0..200 {
                    file.write_all(&[b'a' + writer; 37]).unwrap();
                }
            });
        }
    });
    let log = fs::read(&path).unwrap();
    assert_eq!(log.len(), 4 * 200 * 37);
    for line in log.chunks(37) {
        assert!(line.iter().all(|byte| *byte == line[0]));
    }
}

#[test]
fn truncation_leaves_zeros() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("file");
    fs::write(&path, noise(2, 3 * BLOCK)).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(100).unwrap();
    file.set_len(2 * BLOCK as u64).unwrap();
    let read = fs::read(&path).unwrap();
    assert_eq!(&read[..100], &noise(2, 100)[..]);
    assert!(read[100..].iter().all(|&byte| byte == 0));
    let error = file.set_len(1 << 60).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FileTooLarge);
    File::create(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
}

#[test]
fn direct_writes_are_seen_by_the_page_cache_and_back() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("image");
    let file = direct(&path);
    let data = noise(3, 2 * 1024 * 1024 + 512);
    file.write_all_at(&data, 0).unwrap();
    assert_eq!(fs::read(&path).unwrap(), data);
    // The pages are cached now; they must not survive the next direct write. Nor must memory or
    // lengths be aligned.
    file.write_all_at(&noise(4, 1000), 4097).unwrap();
    let cached = fs::read(&path).unwrap();
    assert_eq!(&cached[4097..5097], &noise(4, 1000)[..]);
    let buffered = File::options().write(true).open(&path).unwrap();
    buffered.write_all_at(b"by the page cache", 9000).unwrap();
    let mut part = [0; 17];
    file.read_exact_at(&mut part, 9000).unwrap();
    assert_eq!(&part, b"by the page cache");
}

#[test]
fn parallel_direct_writers_keep_their_blocks() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("image");
    let file = direct(&path);
    file.set_len(64 * BLOCK as u64).unwrap();
    std::thread::scope(|scope| {
        for writer in 0..8u64 {
            let file = &file;
            scope.spawn(move || {
                for round in 0..20 {
                    for block in (writer..64).step_by(8) {
                        let data = noise(round * 64 + block, BLOCK);
                        file.write_all_at(&data, block * BLOCK as u64).unwrap();
                    }
                    file.sync_data().unwrap();
                }
            });
        }
    });
    let read = fs::read(&path).unwrap();
    for (block, data) in (0u64..).zip(read.chunks(BLOCK)) {
        assert!(data == noise(19 * 64 + block, BLOCK), "block {block}");
    }
}

#[test]
fn synchronous_writes_are_answered() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    for flags in [
        libc::O_SYNC,
        libc::O_DSYNC,
        libc::O_SYNC | libc::O_DIRECT,
        libc::O_DSYNC | libc::O_DIRECT,
    ] {
        let path = mounted.path("file");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(flags)
            .open(&path)
            .unwrap();
        let data = noise(flags.unsigned_abs().into(), 10 * BLOCK);
        file.write_all_at(&data, 0).unwrap();
        assert!(fs::read(&path).unwrap() == data);
    }
    File::open(mounted.root()).unwrap().sync_all().unwrap();
    fs::create_dir(mounted.path("dir")).unwrap();
    File::open(mounted.path("dir")).unwrap().sync_all().unwrap();
}

#[test]
fn mappings_and_calls_see_the_same_bytes() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    for flags in [0, libc::O_DIRECT] {
        let path = mounted.path("mapped");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(flags)
            .open(&path)
            .unwrap();
        file.write_all_at(&noise(5, 4 * BLOCK), 0).unwrap();
        let mapping = Mapping::new(&file, 4 * BLOCK);
        assert!(mapping.read(0, 4 * BLOCK) == noise(5, 4 * BLOCK));
        mapping.write(5000, b"by the mapping");
        let mut part = [0; 14];
        file.read_exact_at(&mut part, 5000).unwrap();
        assert_eq!(&part, b"by the mapping", "flags={flags:o}");
        file.write_all_at(b"by the call", 6000).unwrap();
        assert_eq!(mapping.read(6000, 11), b"by the call", "flags={flags:o}");
        mapping.write(100, b"kept");
        mapping.sync();
        drop(mapping);
        assert_eq!(&fs::read(&path).unwrap()[100..104], b"kept");
    }
}

#[test]
fn a_file_without_a_name_lives_until_it_is_closed() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("ghost");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    file.write_all(&noise(6, 8 * 1024 * 1024)).unwrap();
    file.sync_all().unwrap();
    let used = mounted.used();
    fs::remove_file(&path).unwrap();
    assert!(!path.exists());
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.write_all(b"more").unwrap();
    let mut read = vec![0; 8 * 1024 * 1024];
    file.read_exact_at(&mut read, 0).unwrap();
    assert!(read == noise(6, 8 * 1024 * 1024));
    drop(file);
    // Freed in the background, reusable after a checkpoint or two.
    let freed = (0..100).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        mounted.used() + 7 * 1024 * 1024 < used
    });
    assert!(freed, "used before {used}, now {}", mounted.used());
}

#[test]
fn allocation_grows_punches_and_zeroes() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("file");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    let data = noise(7, 8 * BLOCK);
    file.write_all_at(&data, 0).unwrap();
    let size = || fs::metadata(&path).unwrap().len();
    let keep = libc::FALLOC_FL_KEEP_SIZE;
    sys::fallocate(&file, keep, 0, 100_000).unwrap();
    assert_eq!(size(), 8 * BLOCK as u64);
    sys::fallocate(&file, 0, 0, 40_000).unwrap();
    assert_eq!(size(), 40_000);
    sys::fallocate(&file, 0, 0, 100).unwrap();
    assert_eq!(size(), 40_000);

    sys::fallocate(&file, libc::FALLOC_FL_PUNCH_HOLE | keep, 4000, 5000).unwrap();
    let mut expected = data.clone();
    expected[4000..9000].fill(0);
    expected.resize(40_000, 0);
    assert!(fs::read(&path).unwrap() == expected);
    sys::fallocate(&file, libc::FALLOC_FL_ZERO_RANGE, 20_000, 30_000).unwrap();
    expected[20_000..].fill(0);
    expected.resize(50_000, 0);
    assert!(fs::read(&path).unwrap() == expected);
    sys::fallocate(&file, libc::FALLOC_FL_ZERO_RANGE | keep, 10_000, 90_000).unwrap();
    expected[10_000..].fill(0);
    assert!(fs::read(&path).unwrap() == expected);
    assert_eq!(size(), 50_000);

    for mode in [libc::FALLOC_FL_COLLAPSE_RANGE, libc::FALLOC_FL_INSERT_RANGE] {
        let error = sys::fallocate(&file, mode, 0, 4096).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
    }
    let error = sys::fallocate(&file, 0, 0, 1 << 45).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StorageFull);
    let error = sys::fallocate(&file, 0, 1 << 60, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FileTooLarge);
}

#[test]
fn holes_are_found() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("sparse");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    let mib = 1024 * 1024;
    file.set_len(64 * mib).unwrap();
    let no_data = sys::seek(&file, 0, libc::SEEK_DATA).unwrap_err();
    assert_eq!(no_data.raw_os_error(), Some(libc::ENXIO));
    assert_eq!(sys::seek(&file, 5, libc::SEEK_HOLE).unwrap(), 5);
    file.write_all_at(&noise(8, 4 * BLOCK), 16 * mib).unwrap();
    for synced in [false, true] {
        if synced {
            file.sync_all().unwrap();
            mounted.pool().checkpoint().unwrap();
        }
        // Where data begins is told exactly, from anywhere in the hole before it; a small hole behind
        // it may be told to be data.
        for from in [0, 8 * mib, 16 * mib - 40 * 1024, 16 * mib - 1, 16 * mib] {
            let data = sys::seek(&file, from, libc::SEEK_DATA).unwrap();
            assert_eq!(data, 16 * mib, "data behind {from}");
        }
        let hole = sys::seek(&file, 16 * mib, libc::SEEK_HOLE).unwrap();
        assert!(hole >= 16 * mib + 4 * BLOCK as u64, "hole at {hole}");
        let end = sys::seek(&file, 64 * mib, libc::SEEK_DATA).unwrap_err();
        assert_eq!(end.raw_os_error(), Some(libc::ENXIO));
    }
    let mut read = Vec::new();
    File::open(&path).unwrap().read_to_end(&mut read).unwrap();
    assert_eq!(read.len() as u64, 64 * mib);
    assert_eq!(read.iter().filter(|&&byte| byte != 0).count(), {
        noise(8, 4 * BLOCK).iter().filter(|&&b| b != 0).count()
    });
}

/// A read into the page cache that was under way during a direct write must not leave the old
/// block there: whoever reads by the page cache afterwards sees what was written.
#[test]
fn a_direct_write_leaves_no_stale_page_behind() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("image");
    let writer = direct(&path);
    // A write that takes the daemon a while, and readers of single pages of it.
    const BYTES: usize = 1024 * 1024;
    let pages = [0, BYTES / 2, BYTES - BLOCK];
    writer.write_all_at(&vec![0; BYTES], 0).unwrap();
    let aio = Aio::new();
    let stop = AtomicBool::new(false);
    let stale = std::thread::scope(|scope| {
        for page in pages {
            let (path, stop) = (&path, &stop);
            scope.spawn(move || {
                let mut block = [0; BLOCK];
                while !stop.load(Ordering::Relaxed) {
                    let reader = File::open(path).unwrap();
                    reader.read_exact_at(&mut block, page as u64).unwrap();
                }
            });
        }
        let reader = File::open(&path).unwrap();
        let mut block = [0; BLOCK];
        let mut stale = 0;
        for round in 1..=250u8 {
            // After a synchronous write the kernel asks for the times of the file, and drops all
            // pages when they have changed; after an asynchronous one it trusts them for a while.
            aio.write(&writer, &vec![round; BYTES], 0);
            for page in pages {
                reader.read_exact_at(&mut block, page as u64).unwrap();
                stale += u32::from(block[0] != round);
            }
        }
        stop.store(true, Ordering::Relaxed);
        stale
    });
    assert_eq!(stale, 0, "reads that saw old blocks");
}

#[test]
fn readers_beside_a_writer_see_old_or_new_blocks() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("image");
    let file = direct(&path);
    file.write_all_at(&[1; BLOCK], 0).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..500u32 {
                let byte = if round % 2 == 0 { 2 } else { 1 };
                file.write_all_at(&[byte; BLOCK], 0).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        scope.spawn(|| {
            let reader = direct(&path);
            let mut block = [0; BLOCK];
            while !stop.load(Ordering::Relaxed) {
                reader.read_exact_at(&mut block, 0).unwrap();
                assert!(block.iter().all(|&byte| byte == block[0]), "torn block");
            }
        });
    });
}
