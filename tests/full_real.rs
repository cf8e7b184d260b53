//! Space with the real program and a real kernel: a host filesystem that gets full under a pool,
//! pools that grow while they are mounted, warnings, and QEMU, which pauses its guest until there
//! is space again.

mod datastore;

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use datastore::{cannot_mount, nodupe, not_run, run};
use serde_json::{Value, json};
use tempfile::TempDir;

const MIB: u64 = 1024 * 1024;
/// How long anything may take that the daemon does by itself, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A pool, mounted by the program, with a place for its file and one for the mount.
struct Store {
    home: TempDir,
    /// A filesystem of its own is mounted where the pool is.
    on_tmpfs: bool,
}

impl Store {
    /// In a folder on disk.
    fn new() -> Self {
        let home = tempfile::Builder::new()
            .prefix("space.")
            .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .expect("a folder");
        for dir in ["host", "mnt"] {
            fs::create_dir(home.path().join(dir)).expect("a folder");
        }
        Self {
            home,
            on_tmpfs: false,
        }
    }

    /// On a filesystem in memory of `size`.
    fn on_tmpfs(size: &str) -> Self {
        let mut store = Self::new();
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(store.path("host")));
        store.on_tmpfs = true;
        store
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn pool(&self) -> PathBuf {
        self.path("host/pool")
    }

    fn dir(&self) -> PathBuf {
        self.path("mnt")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn create(&self, args: &[&str]) {
        run(nodupe().arg("create").arg(self.pool()).args(args));
    }

    fn mount(&self, args: &[&str]) {
        run(nodupe()
            .arg("mount")
            .arg(self.pool())
            .arg(self.dir())
            .args(["--cache-size", "32M", "--log-file"])
            .arg(self.path("log"))
            .args(args));
    }

    fn unmount_and_check(&self) {
        run(nodupe().arg("umount").arg(self.dir()));
        run(nodupe().arg("check").arg(self.pool()));
    }

    fn df(&self) -> Value {
        let output = run(nodupe().args(["df", "--json"]).arg(self.dir()));
        let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        found["pools"][0].clone()
    }
}

impl Drop for Store {
    /// Leaves nothing behind when a test failed half-way.
    fn drop(&mut self) {
        let _ignored = Command::new("umount").arg("-lq").arg(self.dir()).status();
        if self.on_tmpfs {
            let _ignored = Command::new("umount")
                .arg("-l")
                .arg(self.path("host"))
                .status();
        }
    }
}

/// Bytes that do not repeat.
fn noise(seed: u64, len: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len as usize + 8);
    while bytes.len() < len as usize {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len as usize);
    bytes
}

/// Writes pieces of 512 KiB, and then of 4 KiB, until there is no space; what was acknowledged.
fn fill(path: &Path, seed: u64) -> Vec<u8> {
    let mut whole = Vec::new();
    let Ok(file) = File::create(path) else {
        return whole;
    };
    let mut len = MIB / 2;
    loop {
        let piece = noise(seed + whole.len() as u64, len);
        match file.write_at(&piece, whole.len() as u64) {
            // Of a write that was cut short only a part was acknowledged.
            Ok(done) => whole.extend_from_slice(&piece[..done]),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
                if len == 4096 {
                    break;
                }
                len = 4096;
            }
        }
        assert!(whole.len() < 2 << 30, "the pool does not get full");
    }
    file.sync_all()
        .expect("what was acknowledged can be synced");
    whole
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn unable(test: &str, programs: &[&str]) -> bool {
    if let Some(why) = cannot_mount() {
        not_run(test, &why);
        return true;
    }
    for program in programs {
        if Command::new(program).arg("--version").output().is_err() {
            not_run(test, &format!("{program} is missing: run scripts/setup"));
            return true;
        }
    }
    false
}

#[test]
fn a_mounted_pool_outlives_a_full_host() {
    if unable("a_mounted_pool_outlives_a_full_host", &[]) {
        return;
    }
    let store = Store::on_tmpfs("96M");
    store.create(&["--size", "512M", "--journal-size", "8M"]);
    store.mount(&[]);
    let keep = fill(&store.dir().join("keep"), 1);
    assert!(
        keep.len() as u64 > 40 * MIB,
        "only {} bytes fit",
        keep.len()
    );
    let facts = store.df();
    assert!(facts["available"].as_u64() > Some(300 * MIB), "{facts}");
    // What the last refused write had taken is free again, so it may be less than full.
    assert_ne!(facts["state"], "ok", "{facts}");
    assert!(facts["host_available"].as_u64() < Some(MIB), "{facts}");
    assert!(
        store.log().contains("the host has no space"),
        "{}",
        store.log()
    );
    // What a refused write left allocated is used by small ones, and then there is nothing.
    let small = |index| fs::write(store.dir().join(format!("s{index}")), noise(index, 4096));
    let refused = (0..20_000).find_map(|index| small(index).err());
    let refused = refused.expect("there is no space");
    assert_eq!(refused.kind(), ErrorKind::StorageFull);
    wait_for("the state of a full host", || store.df()["state"] == "full");

    // What is deleted in the pool is the host's again, and with it the pool's.
    File::options()
        .write(true)
        .open(store.dir().join("keep"))
        .and_then(|file| file.set_len(20 * MIB))
        .expect("truncating needs no space");
    wait_for("space after deleting", || {
        fs::write(store.dir().join("small"), noise(2, 5000)).is_ok()
    });
    let more = noise(3, 15 * MIB);
    wait_for("more space after deleting", || {
        fs::write(store.dir().join("more"), &more).is_ok()
    });

    // Somebody frees space on the host: everything goes on without being mounted again.
    run(Command::new("mount")
        .args(["-o", "remount,size=300M"])
        .arg(store.path("host")));
    wait_for("space on the host", || {
        fs::write(store.dir().join("large"), noise(4, 30 * MIB)).is_ok()
    });
    assert_ne!(store.df()["state"], "full");
    assert!(
        store.log().contains("has space for the pool again"),
        "{}",
        store.log()
    );
    let same = || {
        let read = |name: &str| fs::read(store.dir().join(name)).expect("it is readable");
        assert!(read("keep") == keep[..20 * MIB as usize], "keep differs");
        assert!(read("small") == noise(2, 5000), "small differs");
        assert!(read("more") == more, "more differs");
        assert!(read("large") == noise(4, 30 * MIB), "large differs");
    };
    same();
    store.unmount_and_check();
    store.mount(&[]);
    same();
    store.unmount_and_check();
}

#[test]
fn a_pool_that_was_closed_on_a_full_host_loses_nothing() {
    if unable("a_pool_that_was_closed_on_a_full_host_loses_nothing", &[]) {
        return;
    }
    let store = Store::on_tmpfs("64M");
    store.create(&["--size", "512M", "--journal-size", "8M"]);
    store.mount(&[]);
    let file = File::create(store.dir().join("file")).expect("there is room");
    file.write_all_at(&noise(1, MIB), 0).expect("there is room");
    file.sync_all().expect("the pool is sound");
    // Others take the rest.
    let mut ballast = File::create(store.path("host/ballast")).expect("there is room");
    while ballast.write_all(&noise(7, MIB)).is_ok() {}
    // Small writes have their place in the journal and the reserve.
    let mut acknowledged = 0;
    for block in 0..64 {
        if file
            .write_all_at(&noise(block, 4096), block * 4096)
            .is_err()
        {
            break;
        }
        acknowledged += 1;
    }
    file.sync_all().expect("the journal has room");
    drop(file);
    let mut wanted = noise(1, MIB);
    for block in 0..acknowledged {
        wanted[block as usize * 4096..][..4096].copy_from_slice(&noise(block, 4096));
    }
    run(nodupe().arg("umount").arg(store.dir()));
    store.mount(&[]);
    assert!(fs::read(store.dir().join("file")).expect("it is readable") == wanted);
    fs::remove_file(store.dir().join("file")).expect("deleting needs no space");
    drop(ballast);
    fs::remove_file(store.path("host/ballast")).expect("there it was");
    wait_for("space on the host", || {
        fs::write(store.dir().join("again"), noise(4, 10 * MIB)).is_ok()
    });
    store.unmount_and_check();
}

#[test]
fn a_pool_grows_mounted_and_not_and_on_a_block_device() {
    if unable("a_pool_grows_mounted_and_not_and_on_a_block_device", &[]) {
        return;
    }
    let store = Store::new();
    let grow = |args: &[&str]| nodupe().arg("grow").args(args).output().expect("it starts");
    let code = |args: &[&str]| grow(args).status.code();
    store.create(&["--size", "64M", "--journal-size", "4M"]);
    let (pool, dir) = (store.pool(), store.dir());
    let (pool, dir) = (pool.to_str().expect("ASCII"), dir.to_str().expect("ASCII"));
    // Not mounted.
    assert_eq!(code(&[pool]), Some(2), "a file needs a size");
    assert_eq!(code(&[pool, "100"]), Some(1), "no pool shrinks");
    assert_eq!(code(&[pool, "2000T"]), Some(1), "beyond the limit");
    assert_eq!(code(&["/no/such/pool", "+1G"]), Some(1));
    assert_eq!(code(&[pool, "+16M"]), Some(0));
    assert_eq!(fs::metadata(pool).expect("it is there").len(), 80 * MIB);
    run(nodupe().args(["check", pool]));
    // Mounted and full.
    store.mount(&[]);
    let first = fill(&Path::new(dir).join("first"), 1);
    let output = run(nodupe().args(["grow", dir, "+64M", "--json"]));
    let facts: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(facts["before"], 80 * MIB);
    assert_eq!(facts["size"], 144 * MIB);
    let second = fill(&Path::new(dir).join("second"), 2);
    assert!(
        second.len() as u64 > 55 * MIB,
        "only {} bytes more",
        second.len()
    );
    assert_eq!(code(&[pool, "160M"]), Some(0), "by the path of the pool");
    assert_eq!(store.df()["size"], 160 * MIB);
    let again = grow(&[pool, "160M"]);
    assert!(
        String::from_utf8_lossy(&again.stdout).contains("already"),
        "{again:?}"
    );
    store.unmount_and_check();
    store.mount(&[]);
    assert!(fs::read(Path::new(dir).join("first")).expect("readable") == first);
    assert!(fs::read(Path::new(dir).join("second")).expect("readable") == second);
    store.unmount_and_check();
    grow_on_a_block_device(&store);
}

fn grow_on_a_block_device(store: &Store) {
    let file = store.path("host/disk");
    File::create(&file)
        .and_then(|disk| disk.set_len(64 * MIB))
        .expect("a file");
    let attached = Command::new("losetup")
        .args(["-f", "--show"])
        .arg(&file)
        .output();
    let device = match attached {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        other => return not_run("grow on a block device", &format!("losetup: {other:?}")),
    };
    run(nodupe().args(["create", &device, "--journal-size", "4M"]));
    File::options()
        .write(true)
        .open(&file)
        .and_then(|disk| disk.set_len(96 * MIB))
        .expect("a larger file");
    let early = nodupe()
        .args(["grow", &device, "1G"])
        .output()
        .expect("it starts");
    run(Command::new("losetup").args(["-c", &device]));
    let grown = nodupe()
        .args(["grow", &device])
        .output()
        .expect("it starts");
    let checked = nodupe()
        .args(["check", &device])
        .output()
        .expect("it starts");
    let facts = nodupe()
        .args(["info", &device, "--json"])
        .output()
        .expect("it starts");
    run(Command::new("losetup").args(["-d", &device]));
    assert_eq!(early.status.code(), Some(1), "{early:?}");
    assert!(
        String::from_utf8_lossy(&early.stderr).contains("lvextend"),
        "{early:?}"
    );
    assert!(grown.status.success(), "{grown:?}");
    assert!(checked.status.success(), "{checked:?}");
    let facts: Value = serde_json::from_slice(&facts.stdout).expect("JSON");
    assert_eq!(facts["size"], 96 * MIB);
}

#[test]
fn marks_are_told_once_in_log_df_and_hook() {
    if unable("marks_are_told_once_in_log_df_and_hook", &[]) {
        return;
    }
    let store = Store::new();
    store.create(&["--size", "64M", "--journal-size", "4M", "--preallocate"]);
    assert!(fs::metadata(store.pool()).expect("it is there").blocks() * 512 >= 64 * MIB);
    let (hook, told) = (store.path("hook"), store.path("told"));
    let script = "#!/bin/sh\necho $NODUPE_STATE $NODUPE_MARK >>\"${0%/*}/told\"\n";
    fs::write(&hook, script).expect("a file");
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).expect("our own file");
    let hook = hook.to_str().expect("ASCII");
    store.mount(&["-o", "warn=20:60", "--on-warning", hook]);
    assert_eq!(store.df()["state"], "ok");
    let lines = || fs::read_to_string(&told).unwrap_or_default();
    let write = |name: &str, mib: u64| {
        fs::write(store.dir().join(name), noise(mib, mib * MIB)).expect("there is room");
    };
    write("a", 15);
    wait_for("the first mark", || lines() == "warning 20\n");
    assert_eq!(store.df()["state"], "warning");
    assert_eq!(store.df()["warn_at"], json!([20, 60]));
    write("b", 24);
    wait_for("the second mark", || lines() == "warning 20\ncritical 60\n");
    fs::remove_file(store.dir().join("b")).expect("deleting always works");
    let log = store.log();
    assert!(
        log.contains("WARN") && log.contains("ERROR") && log.contains("nodupe grow"),
        "{log}"
    );
    // Allocated in advance: what was deleted does not go back to the host.
    store.unmount_and_check();
    assert!(fs::metadata(store.pool()).expect("it is there").blocks() * 512 >= 64 * MIB);
    let mut wrong = nodupe();
    wrong.arg("mount").arg(store.pool()).arg(store.dir());
    let wrong = wrong.args(["--warn-at", "x"]).output().expect("it starts");
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");
}

#[test]
fn every_way_to_write_tells_that_the_pool_is_full() {
    if unable("every_way_to_write_tells_that_the_pool_is_full", &[]) {
        return;
    }
    let store = Store::new();
    store.create(&["--size", "64M", "--journal-size", "4M"]);
    store.mount(&[]);
    let whole = fill(&store.dir().join("file"), 1);
    let small = store.path("host/small");
    fs::write(&small, noise(3, 3 * MIB)).expect("the host has space");
    let (file, new) = (store.dir().join("file"), store.dir().join("new"));
    let (file, new) = (file.to_str().expect("ASCII"), new.to_str().expect("ASCII"));
    let small = small.to_str().expect("ASCII");
    let of = |name: &str| format!("of={name}");
    let input = format!("if={small}");
    for command in [
        vec!["cp", small, new],
        vec!["dd", &input, &of(new), "bs=1M", "oflag=direct"],
        vec![
            "dd",
            &input,
            &of(file),
            "bs=1M",
            "conv=notrunc",
            "oflag=append",
        ],
        vec![
            "dd",
            &input,
            &of(file),
            "bs=4k",
            "conv=notrunc,fsync",
            "oflag=append,sync",
        ],
        vec!["fallocate", "-l", "20M", new],
        vec![
            "qemu-img",
            "create",
            "-f",
            "raw",
            "-o",
            "preallocation=falloc",
            new,
            "20M",
        ],
    ] {
        let Ok(output) = Command::new(command[0]).args(&command[1..]).output() else {
            not_run(
                "every_way_to_write_tells",
                &format!("{} is missing", command[0]),
            );
            continue;
        };
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{command:?} found space");
        assert!(text.contains("No space left"), "{command:?}: {text}");
    }
    let read = fs::read(file).expect("it is readable");
    assert!(read.starts_with(&whole), "what was acknowledged differs");
    // The way out.
    fs::remove_file(file).expect("deleting always works");
    wait_for("space after deleting", || fs::copy(small, new).is_ok());
    assert!(fs::read(new).expect("it is readable") == noise(3, 3 * MIB));
    store.unmount_and_check();
}

/// A guest in one sector: writes 120 sectors after the other from sector 64 on, each with its number
/// at its beginning, until it comes to the sector number at `LAST_AT`. Ends with 2, or 3 if the BIOS
/// told of an error, which the debug port of QEMU makes the exit codes 5 and 7.
///
/// ```text
///     cli; xor ax,ax; mov ds,ax; mov ss,ax; mov sp,0x7c00; sti
///     mov [drive],dl
/// again:
///     mov ax,0x1000; mov es,ax; xor di,di
///     mov eax,[lba]; mov cx,120
/// fill:
///     mov es:[di],eax; add di,512; inc eax; loop fill
///     mov si,packet; mov dl,[drive]; mov ax,0x4300; int 0x13    ; extended write
///     mov al,3; jc end
///     add dword [lba],120; mov eax,[lba]; cmp eax,[last]; jb again
///     mov al,2
/// end:
///     mov dx,0x501; out dx,al; hlt; jmp end
/// packet:
///     db 16,0; dw 120, 0,0x1000
/// lba: dd 64,0
/// last: dd 0
/// drive: db 0
/// ```
const GUEST: [u8; 104] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xfb, 0x88, 0x16, 0x67, 0x7c, 0xb8,
    0x00, 0x10, 0x8e, 0xc0, 0x31, 0xff, 0x66, 0xa1, 0x5b, 0x7c, 0xb9, 0x78, 0x00, 0x26, 0x66, 0x89,
    0x05, 0x81, 0xc7, 0x00, 0x02, 0x66, 0x40, 0xe2, 0xf4, 0xbe, 0x53, 0x7c, 0x8a, 0x16, 0x67, 0x7c,
    0xb8, 0x00, 0x43, 0xcd, 0x13, 0xb0, 0x03, 0x72, 0x13, 0x66, 0x83, 0x06, 0x5b, 0x7c, 0x78, 0x66,
    0xa1, 0x5b, 0x7c, 0x66, 0x3b, 0x06, 0x63, 0x7c, 0x72, 0xc5, 0xb0, 0x02, 0xba, 0x01, 0x05, 0xee,
    0xf4, 0xeb, 0xf9, 0x10, 0x00, 0x78, 0x00, 0x00, 0x00, 0x00, 0x10, 0x40, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];
/// Offset in [`GUEST`] of the sector number at which it ends (u32).
const LAST_AT: usize = 0x63;
const SECTOR: u64 = 512;

/// A QEMU that is talked to.
struct Qemu {
    process: Child,
    reader: BufReader<UnixStream>,
}

impl Qemu {
    fn start(disk: &Path, cache: &str, socket: &Path) -> Self {
        let drive = format!(
            "file={},format=raw,if=virtio,cache={cache},werror=enospc",
            disk.display()
        );
        let process = Command::new("qemu-system-x86_64")
            .args(["-M", "pc", "-accel", "tcg", "-m", "32", "-display", "none"])
            .args([
                "-vga",
                "none",
                "-nodefaults",
                "-boot",
                "c",
                "-drive",
                &drive,
            ])
            .args(["-device", "isa-debug-exit,iobase=0x501,iosize=1"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU starts");
        let mut stream = None;
        wait_for("QEMU", || {
            stream = UnixStream::connect(socket).ok();
            stream.is_some()
        });
        let stream = stream.expect("it was waited for");
        stream
            .set_read_timeout(Some(3 * PATIENCE))
            .expect("a socket has timeouts");
        let mut qemu = Self {
            process,
            reader: BufReader::new(stream),
        };
        qemu.next(); // the greeting
        qemu.tell("qmp_capabilities");
        qemu
    }

    fn tell(&mut self, command: &str) {
        let text = format!("{}\n", json!({ "execute": command }));
        self.reader
            .get_mut()
            .write_all(text.as_bytes())
            .expect("QEMU listens");
    }

    /// The next message.
    fn next(&mut self) -> Value {
        let mut line = String::new();
        let read = self.reader.read_line(&mut line).expect("QEMU talks");
        assert!(read > 0, "QEMU ended: {:?}", self.process.wait());
        serde_json::from_str(&line).expect("JSON")
    }

    /// Waits for an event.
    fn event(&mut self, name: &str) -> Value {
        loop {
            let message = self.next();
            if message["event"] == name {
                return message["data"].clone();
            }
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ignored = self.process.kill();
        let _ignored = self.process.wait();
    }
}

/// Runs the guest on a pool that is too small for it; `relieve` makes room when it was paused.
fn pause_and_resume(cache: &str, relieve: impl FnOnce(&Store)) {
    // In memory, where syncs are quick: the fuller a pool is, the more of them it needs.
    let store = Store::on_tmpfs("300M");
    store.create(&["--size", "64M", "--journal-size", "4M"]);
    store.mount(&[]);
    let ballast = noise(9, 36 * MIB);
    fs::write(store.dir().join("ballast"), &ballast).expect("there is room");
    let last = 28 * MIB / SECTOR;
    let disk = store.dir().join("disk.raw");
    let mut boot = [0; SECTOR as usize];
    boot[..GUEST.len()].copy_from_slice(&GUEST);
    boot[LAST_AT..LAST_AT + 4].copy_from_slice(&(last as u32).to_le_bytes());
    boot[510..].copy_from_slice(&[0x55, 0xaa]);
    fs::write(&disk, boot).expect("there is room");
    let image = OpenOptions::new()
        .write(true)
        .open(&disk)
        .expect("it is there");
    image
        .set_len(64 * MIB)
        .expect("a sparse file takes no space");
    let sockets = tempfile::tempdir().expect("a folder with a short path");
    let mut qemu = Qemu::start(&disk, cache, &sockets.path().join("qmp"));
    let error = qemu.event("BLOCK_IO_ERROR");
    assert_eq!(error["nospace"], true, "{error}");
    assert_eq!(error["action"], "stop", "{error}");
    qemu.event("STOP");
    relieve(&store);
    qemu.tell("cont");
    qemu.event("RESUME");
    // The debug port ends QEMU: 5 is the guest's 2.
    let status = qemu.process.wait().expect("a child can be waited for");
    assert_eq!(status.code(), Some(5), "the guest saw an error");
    let mut whole = Vec::new();
    let mut file = File::open(&disk).expect("it is there");
    file.read_to_end(&mut whole).expect("it is readable");
    for sector in 64..last {
        let at = (sector * SECTOR) as usize;
        let number = u32::from_le_bytes(whole[at..at + 4].try_into().expect("four bytes"));
        assert_eq!(u64::from(number), sector, "sector {sector} of {last}");
    }
    drop((image, file));
    store.unmount_and_check();
}

#[test]
fn qemu_pauses_its_guest_until_the_pool_has_grown() {
    let name = "qemu_pauses_its_guest_until_the_pool_has_grown";
    if unable(name, &["qemu-system-x86_64"]) {
        return;
    }
    pause_and_resume("none", |store| {
        run(nodupe().arg("grow").arg(store.dir()).arg("+64M"));
    });
}

#[test]
fn qemu_pauses_its_guest_until_something_was_deleted() {
    let name = "qemu_pauses_its_guest_until_something_was_deleted";
    if unable(name, &["qemu-system-x86_64"]) {
        return;
    }
    pause_and_resume("writeback", |store| {
        fs::remove_file(store.dir().join("ballast")).expect("deleting always works");
    });
}
