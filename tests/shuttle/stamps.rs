//! Worlds with one writer that fills slots of two files with rising stamps in a fixed order, and
//! others that clone meanwhile: each clone, and what each crash leaves, is a prefix of the writes.

use std::sync::{Arc, Mutex};

use nodupe::device::SplitMix64;
use nodupe::engine::{FileKind, Pool};
use nodupe::error::Result;
use nodupe::units::{Ino, Time};

use super::world::{FILES, HALF, HALVES, TREE, World, bytes_of, create, lock, registers_of};

/// Where the writer writes, in this order, again and again: file, first half block, how many. All
/// kinds of writes, none over another.
const SLOTS: [(u32, u32, u32); 5] = [(0, 0, 2), (1, 1, 1), (1, 2, 32), (0, 4, 3), (1, 34, 2)];
/// Writes in a world.
const WRITES: u64 = 9;

/// How many writes had begun, and how many had ended.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    begun: u64,
    ended: u64,
    synced: u64,
}

/// What the slots show behind `writes` writes.
fn prefix(writes: u64) -> [u64; SLOTS.len()] {
    let mut slots = [0; SLOTS.len()];
    for stamp in 1..=writes {
        slots[(stamp - 1) as usize % SLOTS.len()] = stamp;
    }
    slots
}

/// What the slots of two files show; 0 for a file that is not looked at.
fn slots(pool: &Pool, files: [Option<Ino>; 2]) -> Result<[u64; SLOTS.len()]> {
    let mut shown = [0; SLOTS.len()];
    for (slot, (file, first, len)) in shown.iter_mut().zip(SLOTS) {
        let Some(ino) = files[file as usize] else {
            continue;
        };
        let mut bytes = Vec::new();
        pool.read(ino, 0, HALVES as usize * HALF, &mut bytes)?;
        let all = registers_of(file, 0..HALVES, &bytes);
        let part = &all[first as usize..][..len as usize];
        *slot = part[0].1;
        assert!(
            part.iter().all(|(_, stamp)| *stamp == *slot),
            "a write was seen in part: {part:?}"
        );
    }
    Ok(shown)
}

fn assert_prefix(shown: [u64; SLOTS.len()], least: u64, most: u64, what: &str) {
    assert!(
        (least..=most).any(|writes| prefix(writes) == shown),
        "{what} shows {shown:?}, which is no prefix of at least {least} and at most {most} writes"
    );
}

fn find(pool: &Pool, dir: Ino, name: &str) -> Result<Ino> {
    Ok(pool.lookup(dir, name.as_bytes())?.ino)
}

/// The two files in a directory.
fn files_in(pool: &Pool, dir: Ino) -> Result<[Ino; 2]> {
    Ok([find(pool, dir, FILES[0])?, find(pool, dir, FILES[1])?])
}

fn write_all(world: &World, files: [Ino; 2], progress: &Mutex<Progress>) {
    for stamp in 1..=WRITES {
        let (file, first, len) = SLOTS[(stamp - 1) as usize % SLOTS.len()];
        lock(progress).begun = stamp;
        let written = world.pool.write(
            files[file as usize],
            u64::from(first) * HALF as u64,
            &bytes_of(stamp, len),
            Time::default(),
        );
        written.expect("there is room");
        lock(progress).ended = stamp;
        if stamp % 4 == 0 {
            world.pool.sync().expect("the device is sound");
            lock(progress).synced = stamp;
        }
    }
}

/// Clones the whole directory, and looks at the clone.
fn clone_tree(world: &World, tree: Ino, progress: &Mutex<Progress>, round: u64) -> Result<()> {
    let name = format!("t{round}");
    let least = lock(progress).ended;
    let names = [name.clone().into_bytes()];
    world
        .pool
        .clone_tree(tree, Ino::ROOT, &names, None, Time::default())?;
    let most = lock(progress).begun;
    let copy = find(&world.pool, Ino::ROOT, &name)?;
    let shown = slots(&world.pool, files_in(&world.pool, copy)?.map(Some))?;
    assert_prefix(shown, least, most, "a clone of a tree");
    Ok(())
}

/// Clones one file of the two; the other counts as the prefix wants it.
fn clone_one(world: &World, files: [Ino; 2], progress: &Mutex<Progress>, round: u64) -> Result<()> {
    let which = (round % 2) as usize;
    let dst = create(
        &world.pool,
        Ino::ROOT,
        &format!("f{round}"),
        FileKind::Regular,
    )?;
    let least = lock(progress).ended;
    world.pool.clone_file(files[which], dst, Time::default())?;
    let most = lock(progress).begun;
    let mut files = [None; 2];
    files[which] = Some(dst);
    let shown = slots(&world.pool, files)?;
    let fits = (least..=most).any(|writes| {
        let wanted = prefix(writes);
        (0..SLOTS.len()).all(|i| SLOTS[i].0 as usize != which || wanted[i] == shown[i])
    });
    assert!(
        fits,
        "a clone of file {which} shows {shown:?}, no prefix of {least} to {most} writes"
    );
    Ok(())
}

/// Runs one world: clones of trees or of files, with or without background threads.
pub(crate) fn run(trees: bool, workers: bool, rng: &mut SplitMix64) {
    let world = World::new(rng, workers, false);
    let tree = find(&world.pool, Ino::ROOT, TREE).expect("the base has it");
    let files = files_in(&world.pool, tree).expect("the base has them");
    let progress: Arc<Mutex<Progress>> = Arc::default();
    // The power fails at some moment of a copy of the world.
    type Left = Option<(nodupe::device::SimDevice, Progress)>;
    let left: Arc<Mutex<Left>> = Arc::default();
    {
        let (progress, left) = (Arc::clone(&progress), Arc::clone(&left));
        world.device.cut_after(1 + rng.below(120), move |sim| {
            *lock(&left) = Some((sim.fork(1), *lock(&progress)));
        });
    }
    let writer = {
        let (world, progress) = (Arc::clone(&world), Arc::clone(&progress));
        shuttle::thread::spawn(move || write_all(&world, files, &progress))
    };
    let cloner = {
        let (world, progress) = (Arc::clone(&world), Arc::clone(&progress));
        shuttle::thread::spawn(move || {
            for round in 0..3 {
                let done = if trees {
                    clone_tree(&world, tree, &progress, round)
                } else {
                    clone_one(&world, files, &progress, round)
                };
                done.expect("there is room");
            }
        })
    };
    let other = {
        let world = Arc::clone(&world);
        shuttle::thread::spawn(move || world.pool.checkpoint().expect("the device is sound"))
    };
    for thread in [writer, cloner, other] {
        thread.join().expect("a thread found no difference");
    }
    let shown = slots(&world.pool, files.map(Some)).expect("the device is sound");
    assert_prefix(shown, WRITES, WRITES, "the source");
    world.finish(rng);
    let cut = lock(&left).take();
    if let Some((device, progress)) = cut {
        let device = Arc::new(device.crash(rng.next()));
        let pool = super::common::history::open(&device, 4 << 20).expect("it recovers");
        let tree = find(&pool, Ino::ROOT, TREE).expect("nobody removes it");
        let files = files_in(&pool, tree).expect("nobody removes them");
        let shown = slots(&pool, files.map(Some)).expect("the device is sound");
        assert_prefix(shown, progress.synced, progress.begun, "a crash");
        pool.close().expect("the device is sound");
    }
}
