//! Requests that no kernel sends: the layer below the mount is called with numbers, names and
//! handles that make no sense. It answers with errors, and the pool stays sound. And a path of a
//! new pool that somebody has prepared.

use std::sync::Arc;

use nodupe::device::{FileDevice, SimDevice, SplitMix64};
use nodupe::engine::{CreateOptions, FileKind, OpenOptions, Pool, RenameMode, XattrMode};
use nodupe::error::Kind;
use nodupe::units::{Ino, Time};
use nodupe::vfs::{Allocate, Caller, Change, HandleId, NewInode, OpenFlags, Seek, Vfs, VfsOptions};

const ROUNDS: usize = 20_000;

/// A number, mostly from the edges.
fn number(rng: &mut SplitMix64) -> u64 {
    match rng.below(12) {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => u64::MAX - rng.below(10_000),
        4 => i64::MAX as u64 - rng.below(3) + 1,
        5 => (1 << 55) - rng.below(3) + 1,
        6 => 1 << rng.below(64),
        7 => rng.next(),
        _ => rng.below(200_000),
    }
}

fn ino(rng: &mut SplitMix64) -> Ino {
    Ino(match rng.below(10) {
        0 => number(rng),
        _ => rng.below(30),
    })
}

fn name(rng: &mut SplitMix64) -> Vec<u8> {
    match rng.below(12) {
        0 => Vec::new(),
        1 => b".".to_vec(),
        2 => b"..".to_vec(),
        3 => b"a/b".to_vec(),
        4 => b"n\0l".to_vec(),
        5 => vec![b'n'; 255],
        6 => vec![b'n'; 256],
        7 => vec![0xff; 70_000],
        _ => vec![b'a' + rng.below(8) as u8],
    }
}

fn caller(rng: &mut SplitMix64) -> Caller {
    Caller {
        uid: rng.below(3) as u32 * 1000,
        gid: rng.next() as u32,
        pid: rng.next() as u32,
        groups: |_| vec![1, 2, u32::MAX],
    }
}

fn change(rng: &mut SplitMix64) -> Change {
    let time = Time {
        secs: number(rng).cast_signed(),
        nanos: number(rng) as u32,
    };
    let mut some = |value: u64| rng.chance(30).then_some(value as u32);
    Change {
        mode: some(u64::MAX),
        uid: some(u64::MAX),
        gid: some(7),
        size: rng.chance(20).then(|| number(rng)),
        atime: rng.chance(30).then_some(time),
        mtime: rng.chance(30).then_some(time),
    }
}

fn call(vfs: &Vfs, rng: &mut SplitMix64, handles: &mut Vec<HandleId>) {
    let who = caller(rng);
    let (a, b, offset, len) = (ino(rng), ino(rng), number(rng), number(rng));
    let handle = match (rng.below(4), handles.last()) {
        (0, _) | (_, None) => HandleId(number(rng)),
        (_, Some(handle)) => *handle,
    };
    let (one, two) = (name(rng), name(rng));
    match rng.below(24) {
        0 => drop(vfs.lookup(a, &one)),
        1 => drop(vfs.forget(a, offset)),
        2 => drop((
            vfs.attr(a),
            vfs.read_link(a),
            vfs.space(a),
            vfs.file_usage(a),
        )),
        3 => drop(vfs.set_attr(&who, a, &change(rng))),
        4 | 5 => {
            let kinds = [FileKind::Regular, FileKind::Directory, FileKind::CharDevice];
            let new = NewInode {
                kind: kinds[rng.index(3)],
                mode: rng.next() as u32,
                rdev: rng.next() as u32,
            };
            drop(vfs.make(&who, a, &one, new));
        }
        6 => drop(vfs.symlink(&who, a, &one, &two)),
        7 => drop(vfs.link(a, b, &one)),
        8 => drop(vfs.unlink(a, &one)),
        9 => drop(vfs.rmdir(a, &one)),
        10 | 11 => {
            let modes = [
                RenameMode::Replace,
                RenameMode::NoReplace,
                RenameMode::Exchange,
            ];
            drop(vfs.rename(a, &one, b, &two, modes[rng.index(3)]));
        }
        12 => {
            let flags = OpenFlags {
                read: true,
                write: true,
                sync: false,
                cached: rng.chance(50),
            };
            handles.extend(vfs.open(a, flags).ok());
        }
        13 => handles.extend(vfs.open_dir(a).ok()),
        14 => drop(vfs.release(handles.pop().unwrap_or(handle))),
        15 => {
            let mut bytes = Vec::new();
            drop(vfs.read(a, offset, len.min(1 << 20) as usize, &mut bytes));
            assert!(bytes.len() <= 1 << 20);
        }
        16 => drop(vfs.write(
            &who,
            handle,
            a,
            offset,
            &vec![7; len.min(70_000) as usize],
            who.uid == 0,
        )),
        17 => {
            let whats = [
                Allocate::Extend,
                Allocate::KeepSize,
                Allocate::Punch,
                Allocate::Zero,
            ];
            drop(vfs.allocate(&who, handle, a, offset, len, whats[rng.index(4)]));
        }
        18 => {
            let what = if rng.chance(50) {
                Seek::Data
            } else {
                Seek::Hole
            };
            drop(vfs.seek(a, offset.cast_signed(), what));
        }
        19 => drop(vfs.copy(&who, (handle, a, offset), (handle, b, number(rng)), len)),
        20 => {
            drop(vfs.read_dir(a, offset, |_| true));
            drop(vfs.read_dir_plus(a, offset, |_, _| false));
        }
        21 => {
            let attribute = [b"user.".to_vec(), one].concat();
            let value = vec![9; len.min(70_000) as usize];
            drop(vfs.set_xattr(a, &attribute, &value, XattrMode::Set));
            drop((
                vfs.xattr(a, &attribute),
                vfs.list_xattrs(&who, a),
                vfs.xattr(a, &two),
            ));
        }
        22 => drop(vfs.clone_tree(a, b, &[one, two], Some((1, 2)), &|_| Ok(()))),
        _ => drop(vfs.remove_xattr(a, &one)),
    }
}

#[test]
fn calls_without_sense_are_answered() {
    for seed in 0..3 {
        let device = Arc::new(SimDevice::new(64 << 20, seed));
        let create = CreateOptions {
            journal_size: Some(4 << 20),
            uuid: [7; 16],
            hash_key: [9; 16],
            uid: 0,
            gid: 0,
            time: Time::default(),
        };
        Pool::create(device.clone(), None, &create).expect("a pool is made");
        #[allow(clippy::needless_update)] // options that are new must not break this
        let options = OpenOptions {
            read_only: false,
            cache_size: 8 << 20,
            ..OpenOptions::default()
        };
        let pool = Pool::open(device.clone(), None, &options).expect("it opens");
        let vfs = Vfs::new(pool.clone(), VfsOptions::default());
        let mut rng = SplitMix64::new(seed);
        let mut handles = Vec::new();
        for round in 0..ROUNDS {
            call(&vfs, &mut rng, &mut handles);
            if round % 5000 == 0 {
                pool.checkpoint().expect("no request did harm");
            }
        }
        assert_eq!(pool.poisoned(), None, "seed {seed}");
        for handle in handles {
            vfs.release(handle).expect("it was open");
        }
        vfs.finish().expect("orphans go");
        drop(vfs);
        pool.close().expect("it closes");
        let found = Pool::check(&*device, None, &mut |_, _| {}).expect("there is a pool");
        assert!(found.is_empty(), "seed {seed}: {found:?}");
    }
}

#[test]
fn unknown_inodes_are_no_such_file() {
    let device = Arc::new(SimDevice::new(16 << 20, 1));
    let create = CreateOptions {
        journal_size: Some(1 << 20),
        uuid: [7; 16],
        hash_key: [9; 16],
        uid: 0,
        gid: 0,
        time: Time::default(),
    };
    Pool::create(device.clone(), None, &create).expect("a pool is made");
    let pool = Pool::open(device, None, &OpenOptions::default()).expect("it opens");
    let vfs = Vfs::new(pool, VfsOptions::default());
    for number in [0, 2, 1 << 55, 1 << 56, u64::MAX - 1, u64::MAX] {
        let error = vfs.attr(Ino(number)).expect_err("there is no such inode");
        assert_eq!(error.kind(), Kind::NotFound, "{number}");
        let error = vfs.lookup(Ino(number), b"a").expect_err("nor in it");
        assert_eq!(error.kind(), Kind::NotFound, "{number}");
    }
}

#[test]
fn a_planted_symlink_makes_no_pool() {
    use std::os::unix::fs::{MetadataExt, symlink};
    let home = tempfile::tempdir().expect("a folder");
    let (pool, target) = (home.path().join("pool"), home.path().join("target"));
    symlink(&target, &pool).expect("a symlink");
    FileDevice::create(&pool, Some(64 << 20), false).expect_err("it leads nowhere");
    assert!(!target.exists(), "a file was made behind a symlink");
    std::fs::write(&target, "precious").expect("a file");
    let error = FileDevice::create(&pool, Some(64 << 20), false).expect_err("it is in use");
    assert_eq!(error.kind(), Kind::Exists);
    let kept = std::fs::read(&target).expect("it is there");
    assert_eq!(kept, b"precious");
    let own = home.path().join("own");
    FileDevice::create(&own, Some(64 << 20), false).expect("a new pool");
    let mode = std::fs::metadata(&own).expect("it is there").mode();
    assert_eq!(mode & 0o7777, 0o600);
}
