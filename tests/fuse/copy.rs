//! `cp` is a clone: nothing is moved, the bytes are the same by every way to read them, and the
//! copy of a file that is being written is the file at one instant.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::fixture::{Mounted, cp, cp_is_new, noise};
use crate::sys::{self, Mapping};

const MIB: u64 = 1024 * 1024;
const GIB: u64 = 1024 * MIB;

/// What a clone may cost: less than this.
const CLONE_BYTES_MAX: u64 = MIB;

fn direct(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .unwrap()
}

/// `cp` from `a` to `b`; fails if the pool grows by what a copy would need.
fn clone(mounted: &Mounted, a: &Path, b: &Path) {
    let before = mounted.used();
    cp(a, b);
    let grown = mounted.used().saturating_sub(before);
    assert!(grown < CLONE_BYTES_MAX, "the copy took {grown} bytes");
}

#[test]
fn a_full_image_is_cloned_and_reads_the_same_every_way() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    if !cp_is_new() {
        return;
    }
    let (gold, vm) = (mounted.path("gold"), mounted.path("vm"));
    let data = noise(1, 64 * 1024 * 1024 + 512);
    fs::write(&gold, &data).unwrap();
    clone(&mounted, &gold, &vm);
    assert!(fs::read(&vm).unwrap() == data);
    let file = direct(&vm);
    let mut read = vec![0; data.len()];
    file.read_exact_at(&mut read, 0).unwrap();
    assert!(read == data);
    let mapping = Mapping::new(&file, data.len());
    assert!(mapping.read(0, data.len()) == data);
    // Equals: a write to one is no write to the other.
    file.write_all_at(&[0xaa; 8192], 4096).unwrap();
    direct(&gold).write_all_at(&[0xbb; 4096], MIB).unwrap();
    let mut expected = data.clone();
    expected[4096..12288].fill(0xaa);
    assert!(fs::read(&vm).unwrap() == expected);
    assert!(mapping.read(0, data.len()) == expected);
    fs::remove_file(&gold).unwrap();
    drop(mapping);
    drop(file);
    let mounted = mounted.remount();
    assert!(fs::read(mounted.path("vm")).unwrap() == expected);
}

#[test]
fn sparse_and_huge_images_are_cloned() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    if !cp_is_new() {
        return;
    }
    for size in [MIB, GIB, GIB + 4096, 4 * GIB + 123, 9 * GIB] {
        let (gold, vm) = (mounted.path("gold"), mounted.path("vm"));
        let file = File::create(&gold).unwrap();
        file.set_len(size).unwrap();
        let places: Vec<u64> = (0..64)
            .map(|number| (size - 4096) / 64 * number / 512 * 512)
            .chain([size - 4096])
            .collect();
        for &place in &places {
            file.write_all_at(&noise(place + 1, 4096), place).unwrap();
        }
        clone(&mounted, &gold, &vm);
        let copy = File::open(&vm).unwrap();
        assert_eq!(copy.metadata().unwrap().len(), size);
        let mut read = vec![0; 4096];
        for &place in &places {
            copy.read_exact_at(&mut read, place).unwrap();
            assert!(read == noise(place + 1, 4096), "size={size} place={place}");
        }
        // Between the places there is nothing.
        copy.read_exact_at(&mut read, places[3] + 4096).unwrap();
        assert!(size == MIB || read.iter().all(|&byte| byte == 0));
        fs::remove_file(&gold).unwrap();
        fs::remove_file(&vm).unwrap();
    }
}

#[test]
fn an_empty_image_stays_empty() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    if !cp_is_new() {
        return;
    }
    let (gold, vm) = (mounted.path("gold"), mounted.path("vm"));
    File::create(&gold).unwrap().set_len(8 * MIB).unwrap();
    clone(&mounted, &gold, &vm);
    assert!(fs::read(&vm).unwrap() == vec![0; 8 * 1024 * 1024]);
    File::create(&gold).unwrap();
    clone(&mounted, &gold, &vm);
    assert_eq!(fs::metadata(&vm).unwrap().len(), 0);
}

/// Mapped and buffered changes of the source that the kernel still holds are in the copy.
#[test]
fn a_copy_has_what_the_page_cache_had() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    if !cp_is_new() {
        return;
    }
    let (gold, vm) = (mounted.path("gold"), mounted.path("vm"));
    fs::write(&gold, noise(2, 4 * 1024 * 1024)).unwrap();
    let file = File::options().read(true).write(true).open(&gold).unwrap();
    let mapping = Mapping::new(&file, 4 * 1024 * 1024);
    mapping.write(1_000_000, b"mapped, not synced");
    // The destination has old contents, and old pages in the cache.
    fs::write(&vm, noise(3, 5 * 1024 * 1024)).unwrap();
    assert!(fs::read(&vm).unwrap() == noise(3, 5 * 1024 * 1024));
    cp(&gold, &vm);
    let mut expected = noise(2, 4 * 1024 * 1024);
    expected[1_000_000..1_000_018].copy_from_slice(b"mapped, not synced");
    assert!(fs::read(&vm).unwrap() == expected);
}

/// A writer stamps places all over a file of several GiB, one after the other, round after
/// round. In one instant of it, places before the writer have this round's stamp and those behind
/// it the last one's.
#[test]
fn a_copy_of_a_file_being_written_is_one_instant() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    if !cp_is_new() {
        return;
    }
    const PLACES: u64 = 48;
    let place = |number: u64| number * 96 * MIB;
    let (gold, vm) = (mounted.path("gold"), mounted.path("vm"));
    File::create(&gold).unwrap().set_len(place(PLACES)).unwrap();
    let file = direct(&gold);
    let stamp = |round: u64, number: u64| {
        let mut block = [0u8; 4096];
        block[..8].copy_from_slice(&round.to_le_bytes());
        file.write_all_at(&block, place(number)).unwrap();
    };
    for number in 0..PLACES {
        stamp(1, number);
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 2;
            while !stop.load(Ordering::Relaxed) {
                for number in 0..PLACES {
                    stamp(round, number);
                }
                round += 1;
            }
        });
        let copies = || {
            for _ in 0..20 {
                cp(&gold, &vm);
                let copy = File::open(&vm).unwrap();
                assert_eq!(copy.metadata().unwrap().len(), place(PLACES));
                let stamps: Vec<u64> = (0..PLACES)
                    .map(|number| {
                        let mut bytes = [0; 8];
                        copy.read_exact_at(&mut bytes, place(number)).unwrap();
                        u64::from_le_bytes(bytes)
                    })
                    .collect();
                let one_instant =
                    stamps.is_sorted_by(|a, b| a >= b) && stamps[0] - stamps[stamps.len() - 1] <= 1;
                if !one_instant {
                    return Err(stamps);
                }
                fs::remove_file(&vm).unwrap();
            }
            Ok(())
        };
        let result = copies();
        stop.store(true, Ordering::Relaxed);
        result.unwrap();
    });
}

#[test]
fn ranges_are_shared_or_copied_by_their_offsets() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let data = noise(4, 16 * 1024 * 1024);
    fs::write(mounted.path("a"), &data).unwrap();
    let a = File::open(mounted.path("a")).unwrap();
    let cases = [
        (0, 0, 4096),
        (0, 4096, 8 << 20),
        (4096, 0, 5000),
        (100, 100, 9000),
        (1, 2, 100_000),
        (16 * MIB - 10, 0, 100),
        (7, MIB, 16 << 20),
        (0, 3, 12 << 20),
    ];
    for (from, to, len) in cases {
        let path = mounted.path("b");
        let mut expected = noise(5, 2 * 1024 * 1024 + 77);
        fs::write(&path, &expected).unwrap();
        let b = File::options().write(true).open(&path).unwrap();
        let mut done = 0;
        while done < len as u64 {
            let left = len - usize::try_from(done).unwrap();
            let copied = sys::copy_file_range(&a, from + done, &b, to + done, left).unwrap();
            if copied == 0 {
                break;
            }
            done += copied;
        }
        assert_eq!(done, (len as u64).min(16 * MIB - from), "{from} {to} {len}");
        let at = |offset: u64| usize::try_from(offset).unwrap();
        if expected.len() < at(to + done) {
            expected.resize(at(to + done), 0);
        }
        expected[at(to)..at(to + done)].copy_from_slice(&data[at(from)..at(from + done)]);
        assert!(fs::read(&path).unwrap() == expected, "{from} {to} {len}");
    }
}

#[test]
fn a_copy_within_a_file_works_where_the_ranges_do_not_overlap() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path("a");
    let data = noise(6, 2 * 1024 * 1024);
    fs::write(&path, &data).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let copied = sys::copy_file_range(&file, 0, &file, 2 * MIB, 2 * 1024 * 1024).unwrap();
    assert_eq!(copied, 2 * MIB);
    assert!(fs::read(&path).unwrap() == [&data[..], &data[..]].concat());
    let error = sys::copy_file_range(&file, 0, &file, 4096, 8192).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
}

/// A copy in pieces that is broken off, or written into, has what was copied and no more.
#[test]
fn a_copy_in_pieces_can_be_broken_off() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let data = noise(7, 8 * 1024 * 1024);
    fs::write(mounted.path("a"), &data).unwrap();
    let a = File::open(mounted.path("a")).unwrap();
    let path = mounted.path("b");
    let mib = 1024 * 1024;

    let b = File::create(&path).unwrap();
    let copied = sys::copy_file_range(&a, 0, &b, 0, mib).unwrap();
    assert_eq!(copied, MIB);
    assert!(fs::read(&path).unwrap() == data[..mib]);
    // What the source has now is in the next piece only if the clone was broken off.
    let copied = sys::copy_file_range(&a, MIB, &b, MIB, 2 * mib).unwrap();
    assert_eq!(copied, 2 * MIB);
    drop(b);
    assert!(fs::read(&path).unwrap() == data[..3 * mib]);
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(4 * MIB)
        .unwrap();
    let mut expected = data[..3 * mib].to_vec();
    expected.resize(4 * mib, 0);
    assert!(
        fs::read(&path).unwrap() == expected,
        "what was not shown is gone"
    );

    let b = File::create(&path).unwrap();
    sys::copy_file_range(&a, 0, &b, 0, mib).unwrap();
    b.write_all_at(b"written", 100).unwrap();
    sys::copy_file_range(&a, MIB, &b, MIB, mib).unwrap();
    let mut expected = data[..2 * mib].to_vec();
    expected[100..107].copy_from_slice(b"written");
    assert!(fs::read(&path).unwrap() == expected);

    let b = File::create(&path).unwrap();
    sys::copy_file_range(&a, 0, &b, 0, mib).unwrap();
    b.set_len(0).unwrap();
    b.set_len(2 * MIB).unwrap();
    assert!(fs::read(&path).unwrap() == vec![0; 2 * mib]);

    // Bytes that end within a block.
    let b = File::create(&path).unwrap();
    let mut done = 0;
    while done < 10_000 {
        let left = usize::try_from(10_000 - done).unwrap();
        done += sys::copy_file_range(&a, done, &b, done, left).unwrap();
    }
    drop(b);
    assert!(fs::read(&path).unwrap() == data[..10_000]);
}

#[test]
fn a_clone_of_a_clone_of_a_clone_is_a_file_of_its_own() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    if !cp_is_new() {
        return;
    }
    let mut expected = noise(8, 4 * 1024 * 1024);
    fs::write(mounted.path("0"), &expected).unwrap();
    for depth in 1..=30usize {
        let (from, to) = (
            mounted.path(&(depth - 1).to_string()),
            mounted.path(&depth.to_string()),
        );
        cp(&from, &to);
        let file = File::options().write(true).open(&to).unwrap();
        let at = depth * 100_000;
        file.write_all_at(&noise(depth as u64, 5000), at as u64)
            .unwrap();
        expected[at..at + 5000].copy_from_slice(&noise(depth as u64, 5000));
        if depth % 3 == 0 {
            fs::remove_file(&from).unwrap();
        }
        assert!(fs::read(&to).unwrap() == expected, "depth {depth}");
    }
}
