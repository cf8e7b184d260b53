//! Files as devices: whole transfers from any memory, locks, and what `create` refuses.

use super::*;
use std::os::unix::fs::PermissionsExt;
use tempfile::TempDir;

const MIB: u64 = 1024 * 1024;

fn new_device(dir: &TempDir, size: u64) -> FileDevice {
    FileDevice::create(&dir.path().join("pool"), Some(size), false).unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 31 % 251) as u8).collect()
}

fn kind<T>(result: Result<T>) -> Kind {
    result.err().map(|error| error.kind()).unwrap()
}

#[test]
fn transfers_are_whole_from_any_memory() {
    let dir = TempDir::new().unwrap();
    let device = new_device(&dir, 16 * MIB);
    let pattern = pattern(5 * MIB as usize + 4096);
    for shift in [0, 1, 16, 511, 4095] {
        for len in [4096, 128 * 1024, 132 * 1024, 5 * MIB as usize] {
            let mut source = vec![0; shift];
            source.extend_from_slice(&pattern[..len]);
            device.write_at(8192, &source[shift..]).unwrap();
            let mut target = vec![0; shift + len];
            device.read_at(8192, &mut target[shift..]).unwrap();
            assert!(target[shift..] == pattern[..len], "shift={shift} len={len}");
        }
    }
    device.sync().unwrap();
    let mut zeros = vec![1; 8192];
    device.read_at(0, &mut zeros).unwrap();
    assert!(is_zero(&zeros));
    assert!(device.read_at(16 * MIB, &mut zeros).is_err());
    assert!(device.write_at(16 * MIB - 4096, &zeros).is_err());
}

#[test]
fn discarded_space_returns_to_the_host() {
    let dir = TempDir::new().unwrap();
    let device = new_device(&dir, 16 * MIB);
    device.write_at(0, &pattern(4 * MIB as usize)).unwrap();
    device.sync().unwrap();
    let before = device.allocated().unwrap();
    assert!(before >= 4 * MIB);
    device.discard(MIB, 2 * MIB).unwrap();
    device.sync().unwrap();
    let mut block = vec![0; 4096];
    if device.no_discard.load(Ordering::Relaxed) {
        eprintln!("not tested: this filesystem has no holes");
    } else {
        assert!(device.allocated().unwrap() <= before - 2 * MIB);
        device.read_at(MIB, &mut block).unwrap();
        assert!(is_zero(&block));
    }
    device.read_at(0, &mut block).unwrap();
    assert!(block == pattern(4096));
    assert_eq!(device.len(), 16 * MIB);
}

#[test]
fn a_pool_has_one_writer() {
    let dir = TempDir::new().unwrap();
    let device = new_device(&dir, MIB);
    let path = device.path().to_path_buf();
    let open = |mode| FileDevice::open(&path, mode);
    let error = open(OpenMode::ReadWrite).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
    assert!(error.to_string().contains("in use"), "{error}");
    assert_eq!(kind(open(OpenMode::ReadOnly)), Kind::Busy);
    open(OpenMode::Inspect).unwrap();
    drop(device);
    let first = open(OpenMode::ReadOnly).unwrap();
    open(OpenMode::ReadOnly).unwrap();
    assert_eq!(kind(open(OpenMode::ReadWrite)), Kind::Busy);
    assert!(first.write_at(0, &[0; 4096]).is_err());
    drop(first);
    open(OpenMode::ReadWrite).unwrap();
}

#[test]
fn only_files_and_block_devices_are_opened() {
    let dir = TempDir::new().unwrap();
    let missing = dir.path().join("missing");
    let open = |path: &Path| FileDevice::open(path, OpenMode::ReadWrite);
    assert_eq!(kind(open(&missing)), Kind::NotFound);
    assert_eq!(kind(open(dir.path())), Kind::Invalid);
    assert_eq!(kind(open(Path::new("/dev/null"))), Kind::Invalid);
    let create = |path: &Path| FileDevice::create(path, Some(MIB), true);
    assert_eq!(kind(create(dir.path())), Kind::Invalid);
    assert_eq!(kind(create(&missing.join("pool"))), Kind::NotFound);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&missing, &link).unwrap();
    assert_eq!(kind(create(&link)), Kind::NotFound);
    assert!(!missing.exists());
}

#[test]
fn a_new_file_is_sparse_and_private() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("pool");
    assert_eq!(kind(FileDevice::create(&path, None, false)), Kind::Invalid);
    assert_eq!(
        kind(FileDevice::create(&path, Some(0), false)),
        Kind::Invalid
    );
    let huge = FileDevice::create(&path, Some(u64::MAX), false);
    assert_eq!(kind(huge), Kind::Invalid);
    assert!(!path.exists());
    let device = FileDevice::create(&path, Some(MIB + 1), false).unwrap();
    assert_eq!(device.len(), MIB + 4096);
    assert_eq!(device.allocated().unwrap(), 0);
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
}

#[test]
fn create_takes_empty_and_blank_files_as_they_are() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("pool");
    let create = |size| FileDevice::create(&path, size, false);
    File::create(&path).unwrap();
    assert_eq!(kind(create(None)), Kind::Invalid);
    assert_eq!(create(Some(MIB)).unwrap().len(), MIB);
    assert_eq!(create(None).unwrap().len(), MIB);
    assert_eq!(kind(create(Some(2 * MIB))), Kind::Invalid);
    std::fs::write(&path, vec![0; 10_000]).unwrap();
    assert_eq!(create(None).unwrap().len(), 8192);
}

#[test]
fn create_does_not_destroy_what_is_there() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("pool");
    let create = |force| FileDevice::create(&path, None, force);
    let mut image = vec![0; 3 * MIB as usize + 512];
    image[3 * MIB as usize..][..8].copy_from_slice(b"conectix");
    std::fs::write(&path, &image).unwrap();
    let error = create(false).unwrap_err();
    assert_eq!(error.kind(), Kind::Exists);
    assert!(error.to_string().contains("VHD"), "{error}");
    image[3 * MIB as usize..].fill(0);
    image[2 * MIB as usize + 77] = 1;
    std::fs::write(&path, &image).unwrap();
    let error = create(false).unwrap_err();
    assert_eq!(error.kind(), Kind::Exists);
    assert!(std::fs::read(&path).unwrap() == image);
    let device = create(true).unwrap();
    assert_eq!(device.len(), 3 * MIB);
    assert!(device.is_blank().unwrap());
    assert_eq!(device.allocated().unwrap(), 0);
}

#[test]
fn a_huge_sparse_file_is_judged_at_once() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("pool");
    let size = 8 * 1024 * 1024 * MIB; // 8 TiB: ext4 ends at 16 TiB
    let Ok(device) = FileDevice::create(&path, Some(size), false) else {
        eprintln!("not tested: this filesystem has no files of 8 TiB");
        return;
    };
    device.write_at(size / 2, &[0; 4096]).unwrap();
    assert!(device.is_blank().unwrap());
    device.write_at(size - 4096, &[1; 4096]).unwrap();
    assert!(!device.is_blank().unwrap());
}

#[test]
fn a_file_grows_and_never_shrinks() {
    let dir = TempDir::new().unwrap();
    let device = new_device(&dir, MIB);
    device.grow(2 * MIB - 1).unwrap();
    assert_eq!(device.len(), 2 * MIB);
    device.grow(MIB).unwrap();
    assert_eq!(device.len(), 2 * MIB);
    device.write_at(2 * MIB - 4096, &[1; 4096]).unwrap();
    assert!(device.grow(u64::MAX).is_err());
}
