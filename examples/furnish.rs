//! Makes a pool with one file of very many extents, for measuring what size costs.
//!
//! Every other block of the file is written, through the engine, so each block is an extent of its
//! own. The trees are all there, with their checksums and counts, and `nodupe check` finds nothing
//! wrong in them. The contents of the blocks are not stored, so that a hundred million of them fit
//! a small disk: do not read them. The blocks between them are holes and can be read.
//!
//! `cargo run --release --example furnish -- POOL EXTENTS [POOL_GIB]`

#![allow(clippy::print_stdout)] // an example shows what it does

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use nodupe::device::{BlockDevice, FileDevice};
use nodupe::engine::{CreateOptions, NewNode, OpenOptions, Pool};
use nodupe::error::{Error, Kind, Result};
use nodupe::units::{BLOCK_SIZE, Ino, Time};

/// What every block of data begins with, and nothing else does.
const MARK: [u8; 16] = *b"contents of data";
const BLOCK: u64 = BLOCK_SIZE as u64;

/// A device that forgets the contents of data blocks.
#[derive(Debug)]
struct Forgetful(FileDevice);

impl BlockDevice for Forgetful {
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn read_at(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(addr, buf)
    }
    fn write_at(&self, addr: u64, data: &[u8]) -> io::Result<()> {
        let mut at = addr;
        for run in data
            .chunks(BLOCK_SIZE)
            .collect::<Vec<_>>()
            .chunk_by(|a, b| a.starts_with(&MARK) == b.starts_with(&MARK))
        {
            let len = run.len() * BLOCK_SIZE;
            if !run[0].starts_with(&MARK) {
                let from = (at - addr) as usize;
                self.0.write_at(at, &data[from..from + len])?;
            }
            at += len as u64;
        }
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
    fn discard(&self, addr: u64, len: u64) -> io::Result<()> {
        self.0.discard(addr, len)
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| args.get(at).and_then(|text| text.parse::<u64>().ok());
    let (Some(path), Some(extents)) = (args.first(), number(1)) else {
        return Err(Error::new(
            Kind::Invalid,
            "usage: furnish POOL EXTENTS [POOL_GIB]",
        ));
    };
    let gib = number(2).unwrap_or(10 * 1024);
    let begun = Instant::now();
    let device = FileDevice::create(Path::new(path), Some(gib << 30), false)?;
    let device = Arc::new(Forgetful(device));
    let now = Time::now();
    let options = CreateOptions {
        journal_size: None,
        uuid: [3; 16],
        hash_key: [4; 16],
        uid: 0,
        gid: 0,
        time: now,
    };
    Pool::create(device.clone(), None, &options)?;
    let pool = Pool::open(device, None, &OpenOptions::default())?;
    pool.start()?;
    let node = NewNode::regular(0o600);
    let ino = pool.create_node(Ino::ROOT, b"fragmented", &node, now)?.ino;
    let mut block = [0; BLOCK_SIZE];
    block[..MARK.len()].copy_from_slice(&MARK);
    for n in 0..extents {
        pool.write(ino, 2 * n * BLOCK, &block, now)?;
    }
    pool.truncate(ino, 2 * extents * BLOCK, now)?;
    pool.close()?;
    println!(
        "{extents} extents in {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    Ok(())
}
