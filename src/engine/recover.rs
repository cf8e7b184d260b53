//! Making a pool, opening it, and closing it.
//!
//! Opening takes the newest valid superblock (of the two slots, or of their copies if both are
//! gone), replays the journal on its trees, ends what a crash interrupted (orphans, clones in
//! pieces), and writes a checkpoint. A crash in the middle of that changes nothing: replay
//! allocates only what is free, and the old superblock stays until the new one is durable.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::device::BlockDevice;
use crate::error::{Error, Kind, Result};
use crate::ondisk::extent::Root;
use crate::ondisk::inode::{FLAG_PINNED, Inode, InodeKind};
use crate::ondisk::record::Record;
use crate::ondisk::superblock::{
    FLAG_EXTERNAL_JOURNAL, HEAD_BLOCKS, JOURNAL_BLOCKS_MIN, POOL_BLOCKS_MAX, POOL_BLOCKS_MIN,
    SB_MAGIC, SLOTS, Superblock,
};
use crate::units::{BLOCK_SIZE, Ino, Time};

use super::apply::{apply, attr_of};
use super::journal::{Journal, ReadBatch};
use super::meta::Meta;
use super::nodes::NodeCache;
use super::pool::{Pool, info_of};
use super::stage::Staged;
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
        for slot in [0, 1, superblock.end_block(), superblock.end_block() + 1] {
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
        let nodes = (options.cache_size / 4 / B) as usize;
        let nodes = Arc::new(NodeCache::new(device.clone(), superblock.pool_id(), nodes));
        let meta = Meta::open(&superblock, nodes)?;
        let sb = &superblock;
        let ring = |seq, pos| {
            let device = ring_device.clone();
            Journal::new(
                device,
                sb.pool_id(),
                sb.journal_start,
                sb.journal_blocks,
                seq,
                pos,
            )
        };
        let (seq, pos) = (sb.journal_seq, sb.journal_pos);
        let scout = ring(seq, pos);
        let pool = Self::assemble(device, ring(seq, pos), meta, superblock.clone(), options);
        pool.replay(scout).map_err(contradiction)?;
        if !options.read_only {
            pool.finish_interrupted().map_err(contradiction)?;
            pool.checkpoint_as(false)?;
        }
        Ok(Arc::new(pool))
    }

    fn replay(&self, mut scout: Journal) -> Result<()> {
        // First pass: places that the journal maps are taken before replay allocates any.
        let mut batches = 0_u64;
        {
            let mut meta = self.meta.write();
            while let Some(batch) = scout.read_next()? {
                batches += 1;
                for record in &batch.records {
                    if let Record::Map { extent, .. } = record {
                        meta.alloc_exact(*extent)?;
                    }
                }
            }
        }
        if batches == 0 {
            return Ok(());
        }
        log::info!("replaying the journal: {batches} batches");
        self.stage.lock().replaying = true;
        for _ in 0..batches {
            let batch = self.journal.lock().read_next()?;
            let batch =
                batch.ok_or_else(|| Error::corrupt("the journal changed while it was read"))?;
            self.replay_batch(batch)?;
            let staged = self.stage.lock().blocks();
            if staged > self.limits.staged_blocks && !self.read_only {
                self.destage_all()?;
            }
        }
        self.stage.lock().replaying = false;
        Ok(())
    }

    fn replay_batch(&self, batch: ReadBatch) -> Result<()> {
        let mut meta = self.meta.write();
        let mut stage = self.stage.lock();
        let mut data = batch.data.into_iter();
        for record in &batch.records {
            let (ino, block, staged) = match record {
                Record::Block { ino, block, crc } => {
                    let data = data.next();
                    assert!(data.is_some(), "the reader counted the blocks of the batch");
                    (*ino, *block, Staged { data, crc: *crc })
                }
                Record::Zero { ino, block } => (*ino, *block, Staged { data: None, crc: 0 }),
                record => {
                    apply(&mut meta, &mut stage, record)?;
                    continue;
                }
            };
            let inode = meta.file(ino)?;
            stage.open(ino, attr_of(&inode));
            self.counters.reserve_anyway(1);
            stage.put(ino, block, staged);
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
            self.checkpoint_as(true)
        });
        self.set_closed();
        // Without threads nobody else would tell those who wait.
        outcome.inspect_err(|error| self.commit_failed(error))
    }

    fn end_or_reclaim(&self, ino: Ino) -> Result<()> {
        if self.meta.read().inode(ino)?.nlink > 0 {
            self.end_clone(ino)
        } else {
            self.reclaim(ino)
        }
    }
}

/// What recovery does was done or checked before, so a refusal of it is damage.
fn contradiction(error: Error) -> Error {
    match error.kind() {
        Kind::Io | Kind::Corrupt | Kind::Poisoned | Kind::NoSpace => error,
        _ => Error::corrupt(format!("the journal or the pool is damaged: {error}")),
    }
}

/// Where superblocks may be, on a device of `blocks` blocks.
fn superblock_places(blocks: u64) -> Vec<u64> {
    let mut places = vec![0, 1];
    if blocks > SLOTS * 2 {
        places.extend([blocks - 2, blocks - 1]);
    }
    places.retain(|at| *at < blocks);
    places
}

/// The newest valid superblock: of the slots and, if not both of them are valid, of the copies at
/// the end of the device.
pub(crate) fn read_superblock(device: &dyn BlockDevice) -> Result<Superblock> {
    let mut page = [0; BLOCK_SIZE];
    let mut failure = None;
    let mut best: Option<Superblock> = None;
    let mut whole = 0;
    for (i, at) in superblock_places(device.len() / B).into_iter().enumerate() {
        // A damaged slot may have been the newest: then its copy is.
        if i == SLOTS as usize && whole == SLOTS {
            break;
        }
        device
            .read_at(at * B, &mut page)
            .map_err(device_error("read the superblock"))?;
        match Superblock::decode(&page) {
            Ok(found) => {
                whole += 1;
                if best
                    .as_ref()
                    .is_none_or(|best| found.generation > best.generation)
                {
                    best = Some(found);
                }
            }
            Err(error) if error.kind() == Kind::Unsupported => failure = Some(error),
            Err(_) => {}
        }
    }
    // A newer format beats an older superblock that it left behind.
    match (failure, best) {
        (Some(error), _) => Err(error),
        (None, Some(best)) => Ok(best),
        (None, None) => Err(Error::new(
            Kind::Corrupt,
            "this is not a nodupe pool, or both its superblocks and their copies are damaged",
        )),
    }
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
    Ok(Superblock {
        uuid: options.uuid,
        generation: 0,
        blocks,
        flags: if journal.is_some() {
            FLAG_EXTERNAL_JOURNAL
        } else {
            0
        },
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
    let (seq, pos) = (superblock.journal_seq, superblock.journal_pos);
    let ring = Journal::new(
        device.clone(),
        superblock.pool_id(),
        superblock.journal_start,
        superblock.journal_blocks,
        seq,
        pos,
    );
    let options = OpenOptions {
        read_only: false,
        cache_size: 4 * 1024 * 1024,
    };
    Pool::assemble(device, ring, meta, superblock, &options).checkpoint_as(true)?;
    Ok(())
}
