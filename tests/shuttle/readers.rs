//! Readers and the reuse of blocks, without the rest of a pool: what somebody who began to read may
//! still look at is not used again, whatever a thread does between two steps of a pin.

use std::sync::Arc;

use nodupe::device::SplitMix64;
use nodupe::engine::parts::Reading;
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::thread;

/// What is in a block that was used again.
const OTHER: u64 = u64::MAX;
/// Checkpoints.
const ROUNDS: u64 = 4;

/// A file of one block that each round writes to the other place.
#[derive(Default)]
struct World {
    reading: Reading,
    place: AtomicU64,
    blocks: [AtomicU64; 2],
}

pub(crate) fn run(_: &mut SplitMix64) {
    let world = Arc::new(World::default());
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let _reader = world.reading.begin();
                let place = world.place.load(Ordering::SeqCst);
                let found = world.blocks[place as usize].load(Ordering::SeqCst);
                assert_ne!(found, OTHER, "a block was used again while it was read");
            })
        })
        .collect();
    for round in 1..=ROUNDS {
        let (new, old) = (round % 2, (round - 1) % 2);
        world.blocks[new as usize].store(round, Ordering::SeqCst);
        world.place.store(new, Ordering::SeqCst);
        world.reading.wait();
        world.blocks[old as usize].store(OTHER, Ordering::SeqCst);
    }
    for reader in readers {
        reader.join().expect("it found what it may");
    }
}
