//! A damaged block below a mount: an error there and nowhere else, and every file that shares it
//! is named while the pool is in use.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nodupe::control::{Request, Response, ScrubFindings, ScrubPage, call};
use nodupe::engine::{ScrubState, ScrubStatus};
use nodupe::error::{Kind, Result};

use crate::fixture::{Mounted, is_root, noise};
use crate::sys::as_user;

const BLOCK: usize = 4096;
/// Longest wait for a scrub: generous, because the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

fn ask(dir: &Path, request: &Request) -> Result<Response> {
    call(File::open(dir).unwrap().as_fd(), request)
}

fn status(dir: &Path, request: &Request) -> ScrubStatus {
    match ask(dir, request).unwrap() {
        Response::Scrub(status) => *status,
        other => panic!("{other:?}"),
    }
}

/// Scrubs to the end.
fn scrub(dir: &Path) -> (ScrubStatus, ScrubFindings) {
    let start = Request::ScrubStart {
        rate: None,
        restart: false,
    };
    assert_eq!(status(dir, &start).state, ScrubState::Running);
    let until = Instant::now() + PATIENCE;
    loop {
        let status = status(dir, &Request::ScrubStatus);
        if status.state != ScrubState::Running {
            let page = Request::ScrubFindings(ScrubPage::default());
            let Response::ScrubFindings(findings) = ask(dir, &page).unwrap() else {
                panic!("no findings");
            };
            assert_eq!(findings.next, None);
            return (status, findings);
        }
        assert!(Instant::now() < until, "{status:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Flips a bit of each place in the file of the pool that holds `block`. Returns how many.
fn damage(pool: &Path, block: &[u8]) -> usize {
    let bytes = fs::read(pool).unwrap();
    let places = bytes.chunks(BLOCK).enumerate();
    let places: Vec<usize> = places
        .filter(|(_, chunk)| *chunk == block)
        .map(|(at, _)| at)
        .collect();
    let file = File::options().write(true).open(pool).unwrap();
    for at in &places {
        let offset = at * BLOCK + 1234;
        let byte = bytes[offset] ^ 0x10;
        file.write_all_at(&[byte], offset as u64).unwrap();
    }
    file.sync_all().unwrap();
    places.len()
}

fn eio<T: std::fmt::Debug>(result: std::io::Result<T>) {
    assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EIO));
}

/// Reads a file with the contents `data`, whose block `bad` is damaged, in all ways.
fn read_around(path: &Path, data: &[u8], bad: usize) {
    let direct = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .unwrap();
    let buffered = File::open(path).unwrap();
    // Aligned memory, which O_DIRECT asks for.
    let mut memory = vec![0; 1024 * 1024 + BLOCK];
    let skip = memory.as_ptr().align_offset(BLOCK);
    for block in bad - 3..bad + 4 {
        let offset = block * BLOCK;
        let wanted = &data[offset..][..BLOCK];
        for file in [&direct, &buffered] {
            let bytes = &mut memory[skip..skip + BLOCK];
            let read = file.read_at(bytes, offset as u64);
            if block == bad {
                eio(read);
            } else {
                assert_eq!(read.unwrap(), BLOCK, "{block}");
                assert!(bytes == wanted, "{block}");
            }
        }
    }
    let large = &mut memory[skip..skip + 1024 * 1024];
    // A large read that meets it is an error, never a short one: programs take a short read
    // for the end of the file.
    eio(direct.read_at(large, (bad - 100) as u64 * BLOCK as u64));
    for first in [0, bad + 1] {
        assert_eq!(
            direct.read_at(large, (first * BLOCK) as u64).unwrap(),
            large.len()
        );
        assert!(large == &data[first * BLOCK..][..large.len()]);
    }
    // The kernel asks again page by page, and gives what comes before.
    let from = (bad - 100) * BLOCK;
    let got = buffered.read_at(large, from as u64).unwrap();
    assert!(got <= 100 * BLOCK && got > 0);
    assert!(large[..got] == data[from..from + got]);
    assert_eq!(fs::metadata(path).unwrap().len(), data.len() as u64);
    let mut all = Vec::new();
    eio(File::open(path).unwrap().read_to_end(&mut all));
    assert!(all == data[..bad * BLOCK], "{}", all.len());
}

#[test]
fn damage_is_an_error_there_and_nowhere_else() {
    let Some(mut mounted) = Mounted::new() else {
        return;
    };
    const SIZE: usize = 4 * 1024 * 1024;
    const BAD: usize = 300;
    let data = noise(11, SIZE);
    fs::write(mounted.path("gold"), &data).unwrap();
    let names = ["gold", "vm-1", "vm-2", "dir/vm-3"];
    fs::create_dir(mounted.path("dir")).unwrap();
    for name in &names[1..] {
        let (from, to) = (mounted.path("gold"), mounted.path(name));
        crate::fixture::cp(&from, &to);
    }
    let shares = mounted.pool().usage().used < 2 * SIZE as u64;
    // One clone has a block of its own there.
    let own = File::options()
        .write(true)
        .open(mounted.path("vm-2"))
        .unwrap();
    own.write_all_at(&noise(12, BLOCK), (BAD * BLOCK) as u64)
        .unwrap();
    drop(own);
    mounted.end();
    let bad = &data[BAD * BLOCK..][..BLOCK];
    assert!(damage(&mounted.outside().join("pool"), bad) > 0);
    mounted.begin();
    for name in ["gold", "vm-1", "dir/vm-3"] {
        read_around(&mounted.path(name), &data, BAD);
    }
    let mut wanted = data.clone();
    wanted[BAD * BLOCK..][..BLOCK].copy_from_slice(&noise(12, BLOCK));
    assert!(fs::read(mounted.path("vm-2")).unwrap() == wanted);

    let (status, findings) = scrub(&mounted.root());
    assert_eq!(status.state, ScrubState::Finished);
    assert_eq!(findings.others, Vec::<String>::new());
    let mut found: Vec<_> = findings.files.iter().flat_map(|file| &file.paths).collect();
    found.sort();
    let wanted = [&b"/dir/vm-3"[..], b"/gold", b"/vm-1"];
    assert_eq!(found, wanted);
    for file in &findings.files {
        assert_eq!(file.ranges, [((BAD * BLOCK) as u64, BLOCK as u64)]);
    }
    assert!(!shares || status.damaged_blocks == 1, "{status:?}");

    // Overwritten, the block is sound again.
    for name in ["gold", "vm-1", "dir/vm-3"] {
        let file = File::options()
            .write(true)
            .open(mounted.path(name))
            .unwrap();
        file.write_all_at(bad, (BAD * BLOCK) as u64).unwrap();
        drop(file);
        assert!(fs::read(mounted.path(name)).unwrap() == data);
    }
    let (status, _) = scrub(&mounted.root());
    assert!(status.is_clean(), "{status:?}");
}

#[test]
fn a_scrub_is_stopped_by_an_unmount_and_goes_on() {
    let Some(mut mounted) = Mounted::new() else {
        return;
    };
    fs::write(mounted.path("file"), noise(3, 48 * 1024 * 1024)).unwrap();
    mounted.pool().checkpoint().unwrap();
    let slow = Request::ScrubStart {
        rate: Some(8 * 1024 * 1024),
        restart: true,
    };
    status(&mounted.root(), &slow);
    let error = ask(&mounted.root(), &slow).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
    let until = Instant::now() + PATIENCE;
    let mut now = status(&mounted.root(), &Request::ScrubStatus);
    while now.done == 0 {
        assert!(
            now.state == ScrubState::Running && Instant::now() < until,
            "{now:?}"
        );
        thread::sleep(Duration::from_millis(20));
        now = status(&mounted.root(), &Request::ScrubStatus);
    }
    mounted.end();
    mounted.begin();
    let last = status(&mounted.root(), &Request::ScrubStatus);
    assert_eq!(last.state, ScrubState::Stopped);
    assert!(last.done >= now.done && last.done < last.total, "{last:?}");
    let (done, _) = scrub(&mounted.root());
    assert!(done.resumed && done.is_clean(), "{done:?}");
    let mut mounted = mounted.remount();
    let last = status(&mounted.root(), &Request::ScrubStatus);
    assert_eq!((last.state, last.done), (ScrubState::Finished, done.done));
    mounted.end();
}

#[test]
fn only_root_and_the_owner_scrub() {
    if !is_root() {
        return;
    }
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let root = mounted.root();
    as_user(65534, 65533, || {
        for request in [
            Request::ScrubStart {
                rate: None,
                restart: false,
            },
            Request::ScrubStop,
            Request::ScrubFindings(ScrubPage::default()),
        ] {
            let error = ask(&root, &request).unwrap_err();
            assert_eq!(error.kind(), Kind::NotPermitted, "{request:?}");
        }
        assert_eq!(
            status(&root, &Request::ScrubStatus).state,
            ScrubState::Never
        );
    });
}
