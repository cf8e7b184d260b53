//! How long a pool takes to open when its journal is full, and how much memory that needs.
//!
//! A child process fills the ring of a new pool with one kind of load and ends without closing it,
//! as if it had been killed; another one opens the pool, and is timed. So that the ring fills up
//! although checkpoints would free it, the device under the filling process holds back every write
//! of a superblock: the ring is then as full as it can ever be, three quarters.
//!
//! `cargo run --release --example recovery -- FOLDER [--journal MIB] [--cache MIB] [--load NAME]`

#![allow(clippy::print_stdout)] // an example shows what it does

use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nodupe::device::{BlockDevice, FileDevice, OpenMode, SplitMix64};
use nodupe::engine::{CreateOptions, NewNode, OpenOptions, Pool, RenameMode};
use nodupe::error::{Error, Kind, Result};
use nodupe::units::{Ino, Time};

const MIB: u64 = 1024 * 1024;
const BLOCK: u64 = 4096;
/// Loads, each with what it is.
const LOADS: [(&str, &str); 5] = [
    (
        "random",
        "4 KiB random writes to 4 files, a sync for every 32",
    ),
    ("synced", "4 KiB random writes to 4 files, a sync for each"),
    (
        "names",
        "creates, renames, links and unlinks, a sync for every 32",
    ),
    (
        "clones",
        "clones of 2 files that are written, a sync for every 16",
    ),
    (
        "discards",
        "4 KiB random discards of 4 files, a sync for every 32",
    ),
];
/// Blocks of each of the files that are written: 1 GiB.
const FILE_BLOCKS: u64 = 256 * 1024;

/// A pool's device on which no checkpoint becomes durable once that is wanted.
#[derive(Debug)]
struct Held {
    device: FileDevice,
    hold: AtomicBool,
}

impl BlockDevice for Held {
    fn len(&self) -> u64 {
        self.device.len()
    }
    fn read_at(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        self.device.read_at(addr, buf)
    }
    fn write_at(&self, addr: u64, data: &[u8]) -> io::Result<()> {
        while addr < 2 * BLOCK && self.hold.load(Ordering::SeqCst) {
            std::thread::park();
        }
        self.device.write_at(addr, data)
    }
    fn sync(&self) -> io::Result<()> {
        self.device.sync()
    }
    fn discard(&self, addr: u64, len: u64) -> io::Result<()> {
        self.device.discard(addr, len)
    }
}

fn file_node() -> NewNode<'static> {
    NewNode::regular(0o644)
}

/// Makes a pool, puts files in it, and fills its ring.
fn fill(path: &Path, load: &str, journal: u64) -> Result<()> {
    let device = FileDevice::create(path, Some(32 * 1024 * MIB), true)?;
    let device = Arc::new(Held {
        device,
        hold: AtomicBool::new(false),
    });
    let options = CreateOptions {
        journal_size: Some(journal * MIB),
        uuid: [7; 16],
        hash_key: [8; 16],
        uid: 0,
        gid: 0,
        time: Time::now(),
    };
    Pool::create(device.clone(), None, &options)?;
    // For blocks enough that the stage holds what is in the ring; for names the default.
    let cache_size = match load {
        "random" | "synced" => 16 * 1024 * MIB,
        _ => 1024 * MIB,
    };
    let options = OpenOptions {
        read_only: false,
        cache_size,
    };
    let pool = Pool::open(device.clone(), None, &options)?;
    let now = Time::now();
    let mut files = Vec::new();
    let mut rng = SplitMix64::new(1);
    let mut page = vec![0; MIB as usize];
    page.iter_mut().for_each(|byte| *byte = rng.next() as u8);
    for i in 0..4 {
        let name = format!("file{i}");
        let ino = pool
            .create_node(Ino::ROOT, name.as_bytes(), &file_node(), now)?
            .ino;
        if load == "discards" || load == "clones" {
            for at in 0..FILE_BLOCKS * BLOCK / MIB {
                pool.write(ino, at * MIB, &page, now)?;
            }
        } else {
            pool.truncate(ino, FILE_BLOCKS * BLOCK, now)?;
        }
        files.push(ino);
    }
    pool.checkpoint()?;
    pool.start()?;
    device.hold.store(true, Ordering::SeqCst);
    let done = Arc::new(AtomicU64::new(0));
    let (work, worker) = (done.clone(), pool.clone());
    let load = load.to_owned();
    std::thread::spawn(move || {
        while work.load(Ordering::SeqCst) < LIMIT {
            let n = work.load(Ordering::SeqCst);
            step(&worker, &load, &files, n, &mut rng, &page).expect("the load runs");
            work.store(n + 1, Ordering::SeqCst);
        }
    });
    // Until the ring is full, or everybody waits for the checkpoint that cannot end.
    let (mut last, mut still) = (0, 0);
    while pool.usage().journal_used <= journal * MIB / 1000 * 740 && still < 100 {
        let now = done.load(Ordering::SeqCst);
        still = if now == last { still + 1 } else { 0 };
        last = now;
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("{last} {}", pool.usage().journal_used);
    // As killed: nothing is closed.
    std::process::exit(0)
}

/// Operations after which a load ends although the ring is not full.
const LIMIT: u64 = 2_000_000;

fn step(
    pool: &Pool,
    load: &str,
    files: &[Ino],
    n: u64,
    rng: &mut SplitMix64,
    page: &[u8],
) -> Result<()> {
    let now = Time::now();
    let (file, at) = (files[rng.index(4)], rng.below(FILE_BLOCKS) * BLOCK);
    let every = match load {
        "random" | "synced" => {
            let from = rng.index(page.len() - 4096);
            pool.write(file, at, &page[from..from + 4096], now)?;
            if load == "synced" { 1 } else { 32 }
        }
        "discards" => {
            pool.punch(file, at, BLOCK, now)?;
            32
        }
        "names" => {
            let name = format!("name {n}");
            let ino = pool
                .create_node(Ino::ROOT, name.as_bytes(), &file_node(), now)?
                .ino;
            let (old, new) = (name.as_bytes(), format!("new name {n}"));
            match n % 4 {
                0 => drop(pool.rename(
                    Ino::ROOT,
                    old,
                    Ino::ROOT,
                    new.as_bytes(),
                    RenameMode::Replace,
                    now,
                )?),
                1 => drop(pool.link(ino, Ino::ROOT, new.as_bytes(), now)?),
                2 => drop(pool.unlink(Ino::ROOT, old, now)?),
                _ => {}
            }
            32
        }
        "clones" => {
            pool.write(files[n as usize % 2], at, &page[..4096], now)?;
            let name = format!("clone {n}").into_bytes();
            pool.clone_tree(files[n as usize % 2], Ino::ROOT, &[name], None, now)?;
            16
        }
        _ => return Err(Error::new(Kind::Invalid, format!("no such load: {load}"))),
    };
    if n.is_multiple_of(every) {
        pool.sync()
    } else {
        Ok(())
    }
}

/// Opens the pool and tells: milliseconds, KiB of memory at most.
fn reopen(path: &Path, cache: u64) -> Result<()> {
    let device = Arc::new(FileDevice::open(path, OpenMode::ReadWrite)?);
    let options = OpenOptions {
        read_only: false,
        cache_size: cache * MIB,
    };
    let (begun, cpu) = (Instant::now(), cpu_ms());
    let pool = Pool::open(device, None, &options)?;
    let (ms, cpu) = (begun.elapsed().as_millis(), cpu_ms() - cpu);
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak: u64 = peak
        .and_then(|peak| peak.trim().split(' ').next()?.parse().ok())
        .unwrap_or(0);
    let begun = Instant::now();
    pool.checkpoint()?;
    println!("{ms} {cpu} {} {}", peak / 1024, begun.elapsed().as_millis());
    pool.close()
}

/// Milliseconds of processor time that this process has used: on a busy machine the better figure.
fn cpu_ms() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or("").split_whitespace();
    // Times of this process in user and system mode, in hundredths of a second.
    let ticks = fields
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok());
    ticks.sum::<u64>() * 10
}

/// Runs this program again and returns the numbers that it prints.
fn child(args: &[&str]) -> Vec<u64> {
    let program = std::env::current_exe().expect("this program has a path");
    let output = Command::new(program)
        .args(args)
        .output()
        .expect("it starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {text}{errors}");
    text.split_whitespace()
        .filter_map(|number| number.parse().ok())
        .collect()
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |text: &str| text.parse::<u64>().expect("a number");
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["fill", path, load, journal] => return fill(Path::new(path), load, number(journal)),
        ["open", path, cache] => return reopen(Path::new(path), number(cache)),
        _ => {}
    }
    let folder = words.first().expect("the first argument is a folder");
    let option = |name: &str| {
        let at = words.iter().position(|word| *word == name)?;
        words.get(at + 1).copied()
    };
    let sizes = option("--journal").map_or(vec![64, 256, 1024], |size| vec![number(size)]);
    let cache = option("--cache").unwrap_or("1024");
    let path = format!("{folder}/recovery.pool");
    println!(
        "| load | journal | in use | operations | open | processor | memory | checkpoint after it |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (load, what) in LOADS {
        if option("--load").is_some_and(|wanted| wanted != load) {
            continue;
        }
        for size in &sizes {
            let filled = child(&["fill", &path, load, &size.to_string()]);
            let opened = child(&["open", &path, cache]);
            println!(
                "| {what} | {size} MiB | {} MiB | {} | {} ms | {} ms | {} MiB | {} ms |",
                filled[1] / MIB,
                filled[0],
                opened[0],
                opened[1],
                opened[2],
                opened[3]
            );
        }
    }
    std::fs::remove_file(&path).map_err(|error| Error::io("cannot remove the pool", error))
}
