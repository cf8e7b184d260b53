//! Making a pool, opening it, and closing it.
//!
//! Opening takes the newest valid superblock (of the two slots, or of their copies if both are
//! gone), replays the journal on its trees, ends what a crash interrupted (orphans, clones in
//! pieces), and writes a checkpoint. A crash in the middle of that changes nothing: replay
//! allocates only what is free, and the old superblock stays until the new one is durable.

use std::sync::Arc;
use std::time::Duration;

use crate::device::BlockDevice;
use crate::error::{Error, Kind, Result};
use crate::ondisk::extent::Root;
use crate::ondisk::heartbeat::HB_BLOCK;
use crate::ondisk::inode::{FLAG_PINNED, Inode, InodeKind};
use crate::ondisk::superblock::{
    FLAG_CLEAN, FLAG_EXTERNAL_JOURNAL, FLAG_PREALLOCATED, HEAD_BLOCKS, JOURNAL_BLOCKS_MIN,
    POOL_BLOCKS_MAX, POOL_BLOCKS_MIN, SB_MAGIC, Superblock,
};
use crate::sync::Instant;
use crate::units::{BLOCK_SIZE, Ino, Time};

use super::heartbeat::Heartbeat;
use super::journal::{Journal, Lost};
use super::meta::Meta;
use super::nodes::NodeCache;
use super::pool::{Pool, info_of};
use super::replay::tolerate_full_host;
use super::slots::{SEARCH_AT_OPEN, Slots, heal, is_in_slot, superblock_places};
use super::types::{CreateOptions, OpenOptions, PoolInfo};

const B: u64 = BLOCK_SIZE as u64;
/// Default size of the ring: an eighth of the pool, at most 1 GiB.
const JOURNAL_BLOCKS_MAX: u64 = 1024 * 1024 * 1024 / B;
/// Longest time that a close spends on freeing what was deleted; the rest is done after the next
/// open.
const REAP_AT_CLOSE: Duration = Duration::from_secs(2);
/// Bytes zeroed at once when the ring is laid out.
const FILL_BYTES: u64 = 4 * 1024 * 1024;

fn device_error(what: &str) -> impl FnOnce(std::io::Error) -> Error {
    let what = what.to_owned();
    move |source| Error::io(format!("cannot {what}"), source)
}

impl Pool {
    /// Makes an empty pool on `device` (and `journal`, if the ring has a device of its own).
    /// What the devices held is lost. The ring is written in full, so that appending to it is
    /// overwriting, which the host can make durable cheaply.
    ///
    /// # Errors
    /// `Invalid` for a device too small or too large, or a ring that does not fit.
    pub fn create(
        device: Arc<dyn BlockDevice>,
        journal: Option<Arc<dyn BlockDevice>>,
        options: &CreateOptions,
    ) -> Result<()> {
        let superblock = layout(&*device, journal.as_deref(), options)?;
        let ring = journal.unwrap_or_else(|| device.clone());
        let zeros = vec![0; FILL_BYTES as usize];
        // Whatever was there must not be taken for a superblock or a batch of this pool.
        for slot in [
            0,
            1,
            HB_BLOCK,
            superblock.end_block(),
            superblock.end_block() + 1,
        ] {
            device
                .write_at(slot * B, &zeros[..BLOCK_SIZE])
                .map_err(device_error("write the superblock"))?;
        }
        let (mut at, end) = (
            superblock.journal_start * B,
            (superblock.journal_start + superblock.journal_blocks) * B,
        );
        while at < end {
            let len = (end - at).min(FILL_BYTES);
            ring.write_at(at, &zeros[..len as usize])
                .map_err(device_error("write the journal"))?;
            at += len;
        }
        ring.sync().map_err(device_error("sync the journal"))?;
        device.sync().map_err(device_error("sync the pool"))?;
        plant(device, superblock, options)
    }

    /// True if `device` holds a pool, of any version, damaged or not.
    ///
    /// # Errors
    /// `Io` if it cannot be read.
    pub fn probe(device: &dyn BlockDevice) -> Result<bool> {
        let blocks = device.len() / B;
        let mut page = [0; BLOCK_SIZE];
        for at in superblock_places(blocks) {
            device
                .read_at(at * B, &mut page)
                .map_err(device_error("read the superblock"))?;
            if page[..8] == SB_MAGIC {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Superblock facts without opening the pool: reads only, takes no lock.
    ///
    /// # Errors
    /// `Corrupt` if there is no pool, `Unsupported` for a newer format.
    pub fn inspect(device: &dyn BlockDevice) -> Result<PoolInfo> {
        Ok(info_of(&read_superblock(device)?))
    }

    /// Opens a pool, replaying its journal if it was not closed cleanly. `journal`: the device
    /// of the ring if it has its own.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`, `Io`; `Invalid` if the journal device is missing or not needed.
    pub fn open(
        device: Arc<dyn BlockDevice>,
        journal: Option<Arc<dyn BlockDevice>>,
        options: &OpenOptions,
    ) -> Result<Arc<Pool>> {
        let superblock = read_superblock(&*device)?;
        if superblock.blocks * B > device.len() {
            return Err(Error::corrupt(format!(
                "the pool is cut off: it has {} bytes and its device only {}; restore it from a backup",
                superblock.blocks * B,
                device.len()
            )));
        }
        let ring_device = ring_device(&superblock, &device, journal)?;
        if !options.read_only {
            // What a killed daemon wrote may still be in a cache of the host. From here on it
            // counts as durable, because it is read back: so it must be.
            ring_device
                .sync()
                .map_err(device_error("sync the journal"))?;
            device.sync().map_err(device_error("sync the pool"))?;
        }
        let nodes = (options.cache_size / 4 / B) as usize;
        let nodes = Arc::new(NodeCache::new(device.clone(), superblock.pool_id(), nodes));
        let mut meta = Meta::open(&superblock, nodes)?;
        if !options.read_only {
            meta.skip_taken_numbers()?;
        }
        let ring = || Journal::new(ring_device.clone(), &superblock);
        let scout = ring();
        let in_slot = is_in_slot(&*device, &superblock);
        let pool = Self::assemble(device, ring(), meta, superblock.clone(), options);
        let replayed = pool.replay(scout, in_slot).map_err(contradiction)?;
        if !options.read_only {
            pool.keep_home_or_warn();
            if pool.is_clean() {
                // Before anything changes, so that it needs no space: until the pool does not say
                // any more that it is clean, nothing can be committed.
                tolerate_full_host(pool.checkpoint_as(false))?;
            }
            let finished = pool.finish_interrupted().map_err(contradiction);
            tolerate_full_host(finished)?;
            let journal_full = pool.journal.lock().is_over(3);
            if !replayed || journal_full {
                tolerate_full_host(pool.checkpoint_as(false))?;
            }
        }
        Ok(Arc::new(pool))
    }

    /// True if the newest superblock says that the pool was closed cleanly.
    pub(crate) fn is_clean(&self) -> bool {
        self.superblock.lock().flags & FLAG_CLEAN != 0
    }

    /// Fails if the journal lost what was acknowledged. A read-only pool says so and shows the
    /// state before that, so that files can be rescued. `in_slot`: the superblock is not from a
    /// copy, behind which there may have been any number of newer ones.
    pub(crate) fn refuse_loss(&self, scout: &Journal, in_slot: bool) -> Result<()> {
        if in_slot && self.is_clean() && scout.used() == 0 {
            return Ok(()); // I5 of the journal: there never was a batch behind that superblock
        }
        let Some(lost) = scout.lost()? else {
            return Ok(());
        };
        let error = loss(lost);
        if !self.read_only {
            return Err(error);
        }
        log::error!("{error}; this is the state before the loss");
        Ok(())
    }

    /// Puts the slots and copies right: once it is known that nothing was lost, so that an old copy
    /// does not look like the newest superblock in its slot to the next open, and before anything
    /// changes.
    pub(crate) fn heal(&self) -> Result<()> {
        if !self.read_only {
            let superblock = self.superblock.lock().clone();
            let stale = heal(&*self.device, &superblock)?;
            *self.stale_copies.lock() = stale;
        }
        Ok(())
    }

    /// Reclaims orphans and ends clones in pieces that a crash left behind.
    fn finish_interrupted(&self) -> Result<()> {
        let orphans = self.meta.read().orphans()?;
        for ino in orphans {
            let inode = self.meta.read().inode(ino)?;
            if inode.nlink > 0 && inode.flags & FLAG_PINNED != 0 {
                self.end_clone(ino)?;
            } else {
                self.reclaim(ino)?;
            }
        }
        Ok(())
    }

    /// For a pool that does not open because its journal lost acknowledged writes: invalidates the
    /// batches behind the loss, so that the pool opens in the state before it. Returns how many.
    /// They are of no use, because each builds upon those before it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn accept_loss(
        device: &Arc<dyn BlockDevice>,
        journal: Option<&Arc<dyn BlockDevice>>,
    ) -> Result<u64> {
        let Some((lost, scout)) = lost_batch(device, journal.cloned())? else {
            return Ok(0);
        };
        let ring = journal.unwrap_or(device);
        let wipe = |block: u64| {
            ring.write_at(block * B, &[0; BLOCK_SIZE])
                .map_err(device_error("write the journal"))
        };
        let sync = || ring.sync().map_err(device_error("sync the journal"));
        // Later batches get the numbers and places of those, so not one may stay. The proof of the
        // loss goes last: until the others are gone the pool must not open.
        let mut batches = 1;
        for block in scout.dead() {
            if block != lost.block {
                wipe(block)?;
                batches += 1;
            }
        }
        sync()?;
        wipe(lost.block)?;
        sync()?;
        Ok(batches)
    }

    /// Makes everything durable, stops the threads and marks the pool clean. Every later call
    /// fails.
    ///
    /// # Errors
    /// `Io` or `Poisoned` if not everything could be made durable; the journal has what was.
    pub fn close(&self) -> Result<()> {
        self.stop_workers();
        if self.read_only {
            self.set_closed();
            return Ok(());
        }
        let outcome = self.check_writable().and_then(|()| {
            // What nobody can reach any more needs no reclaiming at the next open.
            let orphans = self.meta.read().orphans()?;
            for ino in orphans {
                self.end_or_reclaim(ino)?;
            }
            // Nor what was deleted a moment ago; but nobody waits long for it.
            let begun = Instant::now();
            while begun.elapsed() < REAP_AT_CLOSE && self.reap()? {}
            // From here on nobody begins anything; the cut refuses those who had begun.
            self.set_closed();
            self.checkpoint_as(true)
        });
        let outcome = outcome.map_err(|error| {
            if error.kind() != Kind::NoSpace || self.commit_rest().is_err() {
                return error;
            }
            Error::new(
                Kind::NoSpace,
                format!("the journal keeps what has no place yet, nothing is lost: {error}"),
            )
        });
        self.set_closed();
        // Without threads nobody else would tell those who wait.
        outcome.inspect_err(|error| self.commit_failed(error))?;
        // Who failed to close is dead, and found to be.
        if let Some(heartbeat) = self.heartbeat.lock().take() {
            heartbeat.release();
        }
        Ok(())
    }

    /// Tells the pool about the heartbeat under its devices: a loss poisons it at once, and a clean
    /// close takes the mark away.
    pub fn keep_heartbeat(self: &Arc<Self>, heartbeat: Arc<Heartbeat>) {
        let pool = Arc::downgrade(self);
        heartbeat.on_loss(move |error| {
            if let Some(pool) = pool.upgrade() {
                pool.poison(error);
                pool.commit_failed(error);
            }
        });
        *self.heartbeat.lock() = Some(heartbeat);
    }

    fn end_or_reclaim(&self, ino: Ino) -> Result<()> {
        if self.meta.read().inode(ino)?.nlink > 0 {
            self.end_clone(ino)
        } else {
            self.reclaim(ino)
        }
    }
}

fn loss(lost: Lost) -> Error {
    let Lost { missing, later, .. } = lost;
    Error::corrupt(format!(
        "the journal lost acknowledged writes: batch {missing} is damaged or gone, but was durable \
         when batch {later} was written; look at the device, then mount the pool read-only to \
         rescue files, restore it, or let 'nodupe check --repair' go on without them"
    ))
}

/// What recovery does was done or checked before, so a refusal of it is damage.
fn contradiction(error: Error) -> Error {
    match error.kind() {
        Kind::Io | Kind::Corrupt | Kind::Poisoned | Kind::NoSpace => error,
        _ => Error::corrupt(format!("the journal or the pool is damaged: {error}")),
    }
}

/// The newest valid superblock: of the slots and of their copies.
pub(crate) fn read_superblock(device: &dyn BlockDevice) -> Result<Superblock> {
    Slots::read(device, SEARCH_AT_OPEN).newest(true)
}

/// The proof that the journal lost a durable batch, if there is one, and the journal read up to the
/// loss. Reads only.
///
/// # Errors
/// `Io`, `Corrupt` if there is no pool; `Invalid` if the journal device is missing or not needed.
fn lost_batch(
    device: &Arc<dyn BlockDevice>,
    journal: Option<Arc<dyn BlockDevice>>,
) -> Result<Option<(Lost, Journal)>> {
    let superblock = read_superblock(&**device)?;
    let mut scout = Journal::new(ring_device(&superblock, device, journal)?, &superblock);
    while scout.read_next()?.is_some() {}
    Ok(scout.lost()?.map(|lost| (lost, scout)))
}

fn ring_device(
    sb: &Superblock,
    device: &Arc<dyn BlockDevice>,
    journal: Option<Arc<dyn BlockDevice>>,
) -> Result<Arc<dyn BlockDevice>> {
    match (sb.flags & FLAG_EXTERNAL_JOURNAL != 0, journal) {
        (false, None) => Ok(device.clone()),
        (true, Some(journal)) if journal.len() / B >= sb.journal_blocks => Ok(journal),
        (true, Some(_)) => Err(Error::corrupt(
            "the journal device is smaller than the journal",
        )),
        (true, None) => Err(Error::new(
            Kind::Invalid,
            "the pool has its journal on another device: name it with --journal",
        )),
        (false, Some(_)) => Err(Error::new(
            Kind::Invalid,
            "the pool has its journal inside: leave --journal out",
        )),
    }
}

/// Decides where everything goes.
fn layout(
    device: &dyn BlockDevice,
    journal: Option<&dyn BlockDevice>,
    options: &CreateOptions,
) -> Result<Superblock> {
    let blocks = device.len() / B;
    if !(POOL_BLOCKS_MIN..=POOL_BLOCKS_MAX).contains(&blocks) {
        return Err(Error::new(
            Kind::Invalid,
            format!(
                "a pool has 4 MiB to 1 PiB, this device has {} bytes",
                device.len()
            ),
        ));
    }
    let (room, default) = match journal {
        Some(journal) => (journal.len() / B, journal.len() / B),
        None => (
            blocks / 2,
            (blocks / 8).clamp(JOURNAL_BLOCKS_MIN, JOURNAL_BLOCKS_MAX),
        ),
    };
    let journal_blocks = options.journal_size.map_or(default, |size| size / B);
    if !(JOURNAL_BLOCKS_MIN..=room).contains(&journal_blocks) {
        return Err(Error::new(
            Kind::Invalid,
            format!(
                "a journal of {} bytes does not fit: it has at least 1 MiB and here at most {}",
                journal_blocks * B,
                room * B
            ),
        ));
    }
    // A file that is allocated as a whole before anything is in it was made so on purpose.
    let allocated = |device: &dyn BlockDevice| -> std::io::Result<bool> {
        Ok(device.host_free()?.is_some() && device.allocated()? >= device.len())
    };
    let is_preallocated = allocated(device).map_err(device_error("look at the device"))?;
    let flag = |is_set, flag| if is_set { flag } else { 0 };
    Ok(Superblock {
        uuid: options.uuid,
        generation: 0,
        blocks,
        flags: flag(journal.is_some(), FLAG_EXTERNAL_JOURNAL)
            | flag(is_preallocated, FLAG_PREALLOCATED),
        journal_start: if journal.is_some() { 0 } else { HEAD_BLOCKS },
        journal_blocks,
        journal_seq: 1,
        journal_pos: 0,
        next_ino: Ino::ROOT.0 + 1,
        next_detached: 1,
        inodes: 0,
        logical: 0,
        free: 0,
        hash_key: options.hash_key,
        created: options.time,
        namespace: Root::default(),
        refs: Root::default(),
        sums: Root::default(),
        groups: Root::default(),
    })
}

/// Writes the first checkpoint: an empty root directory.
fn plant(
    device: Arc<dyn BlockDevice>,
    superblock: Superblock,
    options: &CreateOptions,
) -> Result<()> {
    let nodes = Arc::new(NodeCache::new(device.clone(), superblock.pool_id(), 64));
    let mut meta = Meta::open(&superblock, nodes)?;
    let root = Inode {
        kind: InodeKind::Directory,
        flags: 0,
        mode: 0o755,
        nlink: 2,
        uid: options.uid,
        gid: options.gid,
        rdev: 0,
        generation: 1,
        size: 0,
        mapped: 0,
        parent: Ino::ROOT.0,
        root: Root::default(),
        atime: options.time,
        mtime: options.time,
        ctime: options.time,
        btime: options.time,
        origin: 0,
        origin_generation: 0,
        origin_time: Time::default(),
    };
    meta.put_inode(Ino::ROOT, &root)?;
    let ring = Journal::new(device.clone(), &superblock);
    let options = OpenOptions {
        read_only: false,
        cache_size: 4 * 1024 * 1024,
    };
    let pool = Pool::assemble(device, ring, meta, superblock, &options);
    pool.keep_home()?;
    pool.checkpoint_as(true)
}
