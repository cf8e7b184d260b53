//! Worlds in which every thread does a few operations of its own mix, at random.

use std::sync::Arc;

use nodupe::device::{Fault, SplitMix64};
use nodupe::engine::{FileKind, RenameMode};
use nodupe::error::{Kind, Result};
use nodupe::units::{Ino, Time};

use super::history::Place;
use super::world::{DOOMED, FILES, HALF, HALVES, NAMES, World, bytes_of, create, lock, name_of};

/// Kinds of operations.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    /// A block or two, through the stage.
    Write,
    /// Half a block: reads, changes and writes.
    WriteHalf,
    /// Sixteen blocks, straight to their places.
    WriteDirect,
    Truncate,
    Punch,
    Read,
    /// Clones a file and looks at the clone, then and at the end.
    Clone,
    Sync,
    SyncWith,
    Checkpoint,
    /// What `df` asks for.
    Look,
    /// Makes, renames and removes names of the thread's own.
    Names,
    /// Removes the doomed file and makes another.
    Doom,
    WriteDoomed,
    CloneDoomed,
}

/// What a world is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mix {
    /// For each thread the operations that it chooses from.
    pub(crate) threads: &'static [&'static [Op]],
    /// Operations of each thread.
    pub(crate) ops: u64,
    /// With background threads.
    pub(crate) workers: bool,
    /// One more thread closes the pool in the middle of it.
    pub(crate) close: bool,
    /// The power fails at some moment (in a copy of the world).
    pub(crate) crash: bool,
    /// What the device does at some moment.
    pub(crate) fault: Option<Fault>,
}

/// What a file shows, register by register.
type Shown = Vec<(Place, u64)>;

/// One thread of a world.
struct Actor {
    world: Arc<World>,
    id: u32,
    rng: SplitMix64,
    /// Names of its own that exist.
    names: [bool; 2],
    /// Clones it made: what they show must never change.
    clones: Vec<(Ino, u32, Shown)>,
}

/// Runs one world.
pub(crate) fn run(mix: &Mix, rng: &mut SplitMix64) {
    let world = World::new(rng, mix.workers, mix.crash);
    if let Some(fault) = mix.fault {
        world.plan_fault(fault, rng);
    }
    let mut threads = Vec::new();
    for (id, kinds) in (0..).zip(mix.threads) {
        let mut actor = Actor {
            world: Arc::clone(&world),
            id,
            rng: SplitMix64::new(rng.next()),
            names: [false; 2],
            clones: Vec::new(),
        };
        let ops = mix.ops;
        threads.push(shuttle::thread::spawn(move || {
            for _ in 0..ops {
                let op = kinds[actor.rng.index(kinds.len())];
                actor.act(op);
            }
            actor
        }));
    }
    if mix.close {
        *lock(&world.closing) = true;
        world.sync("close", || world.pool.close());
    }
    for thread in threads {
        let actor = thread.join().expect("a thread found no difference");
        actor.compare_clones();
    }
    world.finish(rng);
}

impl Actor {
    fn file(&mut self) -> u32 {
        self.rng.index(FILES.len()) as u32
    }

    fn act(&mut self, op: Op) {
        let world = Arc::clone(&self.world);
        let file = self.file();
        match op {
            Op::Write => {
                // Few places, so that threads meet: both ends of what is written directly.
                let first = [0, 2, 30, 32][self.rng.index(4)];
                let len = [2, 4][self.rng.index(2)];
                self.write(file, first..first + len);
            }
            Op::WriteHalf => {
                let first = [1, 2, 33][self.rng.index(3)];
                let len = [1, 3][self.rng.index(2)];
                self.write(file, first..first + len);
            }
            Op::WriteDirect => {
                let first = [0, 2][self.rng.index(2)];
                self.write(file, first..first + 32);
            }
            Op::Truncate => self.truncate(file),
            Op::Punch => self.punch(file),
            Op::Read if self.rng.chance(50) => world.read(file, 0..HALVES),
            Op::Read => world.read(file, 0..4),
            Op::Clone => self.clone_file(file),
            Op::Sync => world.sync("sync", || world.pool.sync()),
            Op::SyncWith => world.sync_with(),
            Op::Checkpoint => world.sync("checkpoint", || world.pool.checkpoint()),
            Op::Look => {
                let (usage, _) = (world.pool.usage(), world.pool.health());
                assert!(usage.used <= usage.total, "{usage:?}");
            }
            Op::Names => self.change_names(),
            Op::Doom => self.doom(),
            Op::WriteDoomed => {
                let ino = *lock(&world.doomed);
                let len = if self.rng.chance(30) { 32 } else { 3 };
                let written = world.pool.write(ino, 0, &bytes_of(7, len), Time::default());
                self.took_doomed(written, "write of a doomed file");
            }
            Op::CloneDoomed => {
                let ino = *lock(&world.doomed);
                let name = format!("d{}-{}", self.id, world.stamp());
                if let Some(dst) = self.create(&name) {
                    let cloned = world.pool.clone_file(ino, dst, Time::default());
                    self.took_doomed(cloned, "clone of a doomed file");
                }
            }
        }
    }

    fn write(&self, file: u32, halves: std::ops::Range<u32>) {
        let world = &self.world;
        let stamp = world.stamp();
        let (ino, offset) = (
            world.files[file as usize],
            u64::from(halves.start) * HALF as u64,
        );
        let data = bytes_of(stamp, halves.len() as u32);
        let writes = halves.map(|half| ((file, half), stamp)).collect();
        world.write("write", writes, || {
            world.pool.write(ino, offset, &data, Time::default())
        });
        world.pool.anticipate_sync(); // as the mount does
    }

    fn truncate(&mut self, file: u32) {
        let world = &self.world;
        let size = [0, 1, 3, 33, 40][self.rng.index(5)];
        let writes = (size..HALVES).map(|half| ((file, half), 0)).collect();
        let (ino, bytes) = (world.files[file as usize], u64::from(size) * HALF as u64);
        world.write("truncate", writes, || {
            world.pool.truncate(ino, bytes, Time::default()).map(drop)
        });
    }

    fn punch(&mut self, file: u32) {
        let world = &self.world;
        let halves = [0..2, 1..2, 1..33, 0..36][self.rng.index(4)].clone();
        let (offset, len) = (
            u64::from(halves.start) * HALF as u64,
            halves.len() as u64 * HALF as u64,
        );
        let writes = halves.map(|half| ((file, half), 0)).collect();
        let ino = world.files[file as usize];
        world.write("punch", writes, || {
            world.pool.punch(ino, offset, len, Time::default())
        });
    }

    fn create(&self, name: &str) -> Option<Ino> {
        let world = &self.world;
        let made = create(&world.pool, Ino::ROOT, name, FileKind::Regular);
        world.took(made, "create")
    }

    fn clone_file(&mut self, file: u32) {
        let world = Arc::clone(&self.world);
        let name = format!("c{}-{}", self.id, world.stamp());
        let Some(dst) = self.create(&name) else {
            return;
        };
        let since = world.history().mark();
        let cloned = world
            .pool
            .clone_file(world.files[file as usize], dst, Time::default());
        if world.took(cloned, "clone").is_none() {
            return;
        }
        let until = world.history().mark();
        if let Some(shown) = world.content(dst, file, 0..HALVES) {
            world.saw(since, until, shown.clone());
            self.clones.push((dst, file, shown));
        }
    }

    /// What a clone shows is what it showed.
    fn compare_clones(&self) {
        for (ino, file, shown) in &self.clones {
            if let Some(now) = self.world.content(*ino, *file, 0..HALVES) {
                assert_eq!(*shown, now, "a clone changed");
            }
        }
    }

    fn change_names(&mut self) {
        let world = Arc::clone(&self.world);
        let at = self.rng.index(2);
        let place = |index: usize| (NAMES + self.id, index as u32);
        let names = [place(0), place(1)].map(name_of);
        let names = names.each_ref().map(String::as_bytes);
        match (self.names[at], self.names[1 - at]) {
            (false, _) => {
                world.write("create", vec![(place(at), 1)], || {
                    create(
                        &world.pool,
                        Ino::ROOT,
                        &name_of(place(at)),
                        FileKind::Regular,
                    )
                    .map(drop)
                });
                self.names[at] = true;
            }
            (true, other) if other || self.rng.chance(50) => {
                let moved = vec![(place(at), 0), (place(1 - at), 1)];
                world.write("rename", moved, || {
                    let (old, new) = (names[at], names[1 - at]);
                    let (root, mode) = (Ino::ROOT, RenameMode::Replace);
                    let time = Time::default();
                    let replaced = world.pool.rename(root, old, root, new, mode, time)?;
                    replaced.map_or(Ok(()), |attr| world.pool.reclaim(attr.ino))
                });
                self.names = [at == 1, at == 0];
            }
            _ => {
                world.write("unlink", vec![(place(at), 0)], || {
                    let gone = world.pool.unlink(Ino::ROOT, names[at], Time::default())?;
                    world.pool.reclaim(gone.ino)
                });
                self.names[at] = false;
            }
        }
    }

    fn doom(&self) {
        let world = &self.world;
        let gone = world
            .pool
            .unlink(Ino::ROOT, DOOMED.as_bytes(), Time::default());
        let Some(attr) = world.took(gone, "unlink") else {
            return;
        };
        world.took(world.pool.reclaim(attr.ino), "reclaim");
        if let Some(ino) = self.create(DOOMED) {
            *lock(&world.doomed) = ino;
        }
    }

    /// A file that is gone is an answer too.
    fn took_doomed(&self, outcome: Result<()>, what: &str) {
        match outcome {
            Err(error) if error.kind() == Kind::NotFound => {}
            outcome => drop(self.world.took(outcome, what)),
        }
    }
}
