//! The engine as a library, without FUSE: a pool in memory, a golden image, a clone that is
//! written, a power cut, and what is left of it.
//!
//! Run it with `cargo run --example embed`.

#![allow(clippy::print_stdout)] // an example shows what it does

use std::sync::Arc;

use nodupe::device::SimDevice;
use nodupe::engine::{CreateOptions, NewNode, OpenOptions, Pool};
use nodupe::error::Result;
use nodupe::units::{Ino, Time};

const MIB: u64 = 1024 * 1024;

fn main() -> Result<()> {
    let device = Arc::new(SimDevice::new(64 * MIB, 1));
    let time = Time::now();
    let options = CreateOptions {
        journal_size: None,
        uuid: [1; 16],
        hash_key: [2; 16],
        uid: 0,
        gid: 0,
        time,
    };
    Pool::create(device.clone(), None, &options)?;

    let pool = Pool::open(device.clone(), None, &OpenOptions::default())?;
    let node = NewNode::regular(0o644);
    let gold = pool.create_node(Ino::ROOT, b"gold.raw", &node, time)?.ino;
    for i in 0..16 {
        pool.write(gold, i * MIB, &vec![i as u8 + 1; MIB as usize], time)?;
    }
    let before = pool.usage().used;
    let vm = pool.create_node(Ino::ROOT, b"vm.raw", &node, time)?.ino;
    pool.clone_file(gold, vm, time)?;
    println!(
        "a clone of 16 MiB took {} bytes of the pool",
        pool.usage().used - before
    );

    pool.write(vm, 5000, b"synced", time)?;
    pool.sync()?;
    pool.write(vm, 9000, b"not synced", time)?;
    drop(pool);

    // The power fails: what was not synced is lost, wholly or in part.
    let after = Arc::new(device.crash(7));
    let pool = Pool::open(after.clone(), None, &OpenOptions::default())?;
    let mut bytes = Vec::new();
    pool.read(vm, 5000, 6, &mut bytes)?;
    println!(
        "after the power cut the clone holds {:?}",
        String::from_utf8_lossy(&bytes)
    );
    let (alone, size) = (pool.file_usage(vm)?.exclusive, pool.file_usage(vm)?.size);
    println!("of its {size} bytes it holds {alone} alone");
    pool.close()?;
    let findings = Pool::check(&*after, None, &mut |_, _| {})?;
    println!("check found {} things wrong", findings.len());
    Ok(())
}
