//! A pool on the host: a file or a block device, read and written past the page cache.
//!
//! Invariants:
//!
//! 1. Whoever may write holds an exclusive lock for as long as the device is open, and a block
//!    device is opened exclusively, so that two writers never meet on one host.
//! 2. A transfer is whole or an error. Memory that direct I/O cannot take goes through a bounce
//!    buffer; the caller's alignment never reaches the host.
//! 3. Nothing here is retried but `EINTR`: a failed write or sync is the caller's to judge.

use std::fs::{File, Metadata, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::BlockDevice;
use super::bounce::BouncePool;
use super::content::{self, HEAD_LEN, TAIL_LEN};
use super::queue::ReadQueue;
use crate::error::{Error, Kind, Result};
use crate::sys::block;
use crate::units::BLOCK_SIZE;

/// The block size as the type of addresses.
const BLOCK: u64 = BLOCK_SIZE as u64;

/// Bytes looked at before a block device without a known signature counts as empty.
const BLANK_LEN: u64 = 1024 * 1024; // 1 MiB: any boot sector, superblock or label has begun

/// How a device is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// Reads only, and takes no lock: for the facts of a pool that may be mounted meanwhile.
    Inspect,
    /// Reads only; shared lock: nobody writes while it is open.
    ReadOnly,
    /// Reads and writes; exclusive lock.
    ReadWrite,
}

/// Blocks that are read along rather than left out, 32 KiB: as long as another transfer takes.
const GAP_MAX: u64 = 8;

/// Environment variable that keeps `io_uring` out, for where the kernel has it and it does not
/// work well.
const NO_RING: &str = "NODUPE_NO_IO_URING";

/// A file or block device, locked while it is open.
#[derive(Debug)]
pub struct FileDevice {
    /// Goes before the file: what is under way ends first.
    queue: OnceLock<Option<ReadQueue>>,
    file: Arc<File>,
    path: PathBuf,
    /// Bytes, a multiple of the block size. Grows only.
    len: AtomicU64,
    is_block_device: bool,
    /// True if transfers go past the page cache and need aligned memory.
    direct: bool,
    /// Set when the host said that it has no discard; it is not asked again.
    no_discard: AtomicBool,
    bounce: BouncePool,
}

impl FileDevice {
    /// Opens an existing file or block device.
    ///
    /// `Busy` if somebody else has it open, `NotFound`, `Denied`, `Invalid` if it is something
    /// else than a file or block device.
    pub fn open(path: &Path, mode: OpenMode) -> Result<Self> {
        let metadata =
            std::fs::metadata(path).map_err(|error| on_path("cannot open", path, error))?;
        check_type(&metadata, path)?;
        let write = mode == OpenMode::ReadWrite;
        let exclusive = write && metadata.file_type().is_block_device();
        let file = match block::open(path, write, exclusive) {
            Ok(file) => file,
            Err(error) if block::is_busy(&error) => {
                return Err(Error::new(
                    Kind::Busy,
                    format!(
                        "device is mounted or part of something else: free it first path={}",
                        path.display()
                    ),
                ));
            }
            Err(error) => return Err(on_path("cannot open", path, error)),
        };
        Self::from_file(file, path, mode)
    }

    /// Makes or takes the device of a new pool and locks it.
    ///
    /// A file that does not exist is made, sparse, `size` bytes long (rounded up to whole blocks)
    /// and private to its owner. An empty file is extended to `size`. Any other file is used at its
    /// size and must be all zeros; a block device is used at its size and must hold no known
    /// filesystem, partition table or disk image. With `force` old contents do not matter: a file
    /// is emptied and extended to `size`, or its old size.
    ///
    /// `Exists` if it holds something, `Invalid` if `size` is missing or does not fit; otherwise
    /// as [`open`](Self::open).
    pub fn create(path: &Path, size: Option<u64>, force: bool) -> Result<Self> {
        if let Some(size) = size
            && (size == 0 || size > i64::MAX as u64 - BLOCK)
        {
            return Err(Error::new(
                Kind::Invalid,
                format!("a pool cannot have this size size={size}"),
            ));
        }
        let size = size.map(|size| size.next_multiple_of(BLOCK));
        match std::fs::symlink_metadata(path) {
            Ok(_) => Self::take(path, size, force),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::make(path, size),
            Err(error) => Err(on_path("cannot open", path, error)),
        }
    }

    /// Path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// True for a block device, false for a file.
    pub fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    /// True if transfers go past the host's page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Bytes that the file takes on the host; for a block device its length.
    pub fn allocated(&self) -> io::Result<u64> {
        if self.is_block_device {
            return Ok(self.len());
        }
        Ok(self.file.metadata()?.blocks() * 512) // st_blocks counts 512 bytes everywhere
    }

    /// Makes the device at least `len` bytes long, rounded up to whole blocks. A file is extended,
    /// sparse; a block device must have grown by itself. The new length is durable after the next
    /// sync. Never shrinks.
    pub fn grow(&self, len: u64) -> io::Result<()> {
        let len = len
            .checked_next_multiple_of(BLOCK)
            .ok_or_else(|| invalid("length is over the limit"))?;
        let now = raw_len(&self.file)?;
        if now < len {
            if self.is_block_device {
                return Err(invalid("block device is shorter than that"));
            }
            self.file.set_len(len)?;
            // At once, and with all that belongs to it: nothing may name a length that a crash
            // takes back.
            self.file.sync_all()?;
        }
        self.len.fetch_max(len, Ordering::AcqRel);
        Ok(())
    }

    /// What the device is known to hold: a filesystem, a partition table, a disk image... The
    /// project's own pools are not looked for.
    pub fn known_content(&self) -> io::Result<Option<&'static str>> {
        // The raw length: the footer of a VHD is 512 bytes behind the last whole block.
        let len = raw_len(&self.file)?;
        let head = self.peek(0, HEAD_LEN.min(len))?;
        let tail_at = len.saturating_sub(TAIL_LEN) / BLOCK * BLOCK;
        let tail = self.peek(tail_at, len - tail_at)?;
        Ok(content::detect(&head, &tail, len))
    }

    /// True if every byte reads as zero. Holes are skipped, so that a sparse file of any size is
    /// quick; of a block device only the beginning is read.
    pub fn is_blank(&self) -> io::Result<bool> {
        if self.is_block_device {
            let head = self.peek(0, BLANK_LEN.min(raw_len(&self.file)?))?;
            return Ok(is_zero(&head));
        }
        let end = raw_len(&self.file)?;
        let mut at = 0;
        while let Some(data) = block::seek_data(&self.file, at)? {
            let hole = block::seek_hole(&self.file, data)?.unwrap_or(end);
            at = data / BLOCK * BLOCK;
            while at < hole {
                let chunk = BLANK_LEN.min(hole - at);
                if !is_zero(&self.peek(at, chunk)?) {
                    return Ok(false);
                }
                at += chunk;
            }
        }
        Ok(true)
    }

    /// The device of a new pool where nothing is yet.
    fn make(path: &Path, size: Option<u64>) -> Result<Self> {
        let size = size.ok_or_else(|| size_missing(path))?;
        let file =
            block::create_new(path).map_err(|error| on_path("cannot create", path, error))?;
        let made = file
            .set_len(size)
            .map_err(|error| on_path("cannot extend", path, error))
            .and_then(|()| Self::from_file(file, path, OpenMode::ReadWrite));
        if made.is_err()
            && let Err(error) = std::fs::remove_file(path)
        {
            log::warn!("cannot remove {}: {error}", path.display());
        }
        made
    }

    /// The device of a new pool in place of what exists.
    fn take(path: &Path, size: Option<u64>, force: bool) -> Result<Self> {
        let device = Self::open(path, OpenMode::ReadWrite)?;
        let failed = |error| on_path("cannot read", path, error);
        let len = raw_len(&device.file).map_err(failed)?;
        if !force && len > 0 {
            if let Some(content) = device.known_content().map_err(failed)? {
                return Err(Error::new(
                    Kind::Exists,
                    format!(
                        "holds {content}: choose another, or destroy it with --force path={}",
                        path.display()
                    ),
                ));
            }
            if !device.is_blank().map_err(failed)? {
                return Err(Error::new(
                    Kind::Exists,
                    format!(
                        "holds data: choose another, or destroy it with --force path={}",
                        path.display()
                    ),
                ));
            }
        }
        if device.is_block_device {
            return match size {
                Some(size) if size != len => Err(size_fixed(path, len)),
                _ => Ok(device),
            };
        }
        let resized = match size {
            None if len == 0 => return Err(size_missing(path)),
            Some(size) if size != len && len > 0 && !force => return Err(size_fixed(path, len)),
            Some(size) => size,
            None => len / BLOCK * BLOCK,
        };
        let empty_first = if force {
            device.file.set_len(0)
        } else {
            Ok(())
        };
        empty_first
            .and_then(|()| device.file.set_len(resized))
            .map_err(|error| on_path("cannot resize", path, error))?;
        device.len.store(resized, Ordering::Release);
        Ok(device)
    }

    /// Locks an open file and finds out what the host can do.
    fn from_file(file: File, path: &Path, mode: OpenMode) -> Result<Self> {
        let metadata = file
            .metadata()
            .map_err(|error| on_path("cannot open", path, error))?;
        check_type(&metadata, path)?; // again: the name may mean another thing by now
        lock(&file, path, mode)?;
        let raw = raw_len(&file).map_err(|error| on_path("cannot open", path, error))?;
        let bounce = BouncePool::default();
        let direct =
            go_direct(&file, raw, &bounce).map_err(|error| on_path("cannot read", path, error))?;
        if !direct {
            log::warn!(
                "{}: no direct I/O here, the host's page cache holds everything twice",
                path.display()
            );
        }
        Ok(Self {
            queue: OnceLock::new(),
            is_block_device: metadata.file_type().is_block_device(),
            file: Arc::new(file),
            path: path.to_path_buf(),
            len: AtomicU64::new(raw / BLOCK * BLOCK),
            direct,
            no_discard: AtomicBool::new(false),
            bounce,
        })
    }

    /// Reads `len` bytes at `addr`, a multiple of the block size, beyond the last whole block too.
    fn peek(&self, addr: u64, len: u64) -> io::Result<Vec<u8>> {
        let len = usize::try_from(len).map_err(|_| invalid("length is over the limit"))?;
        let mut out = Vec::with_capacity(len);
        while out.len() < len {
            let chunk = (len - out.len()).min(self.bounce.chunk_max());
            let mut buffer = self.bounce.take(chunk.next_multiple_of(BLOCK_SIZE));
            let read = read_some(&self.file, &mut buffer, addr + out.len() as u64)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            out.extend_from_slice(&buffer[..read.min(chunk)]);
        }
        Ok(out)
    }

    /// Checks a transfer against the contract and the end of the device.
    fn check_range(&self, addr: u64, len: u64) -> io::Result<()> {
        assert!(
            addr.is_multiple_of(BLOCK) && len.is_multiple_of(BLOCK),
            "unaligned transfer addr={addr} len={len}"
        );
        match addr.checked_add(len) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(invalid("transfer behind the end of the device")),
        }
    }

    /// Reads through `io_uring`, by threads where that is forbidden.
    fn start_queue(&self) -> Option<ReadQueue> {
        if std::env::var_os(NO_RING).is_none() {
            match ReadQueue::ring(Arc::clone(&self.file)) {
                Ok(queue) => return Some(queue),
                Err(error) => log::info!("no io_uring here, threads read instead: {error}"),
            }
        }
        let file = Arc::clone(&self.file);
        ReadQueue::threads(move |addr, buf| file.read_exact_at(buf, addr))
            .inspect_err(|error| log::warn!("no threads for reads: {error}"))
            .ok()
    }

    /// True if the host can transfer to or from this memory as it is.
    fn is_straight(&self, memory: &[u8]) -> bool {
        !self.direct || memory.as_ptr().addr().is_multiple_of(BLOCK_SIZE)
    }
}

impl BlockDevice for FileDevice {
    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    fn read_at(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check_range(addr, buf.len() as u64)?;
        if self.is_straight(buf) {
            return self.file.read_exact_at(buf, addr);
        }
        let mut at = addr;
        for chunk in buf.chunks_mut(self.bounce.chunk_max()) {
            let mut bounce = self.bounce.take(chunk.len());
            self.file.read_exact_at(&mut bounce, at)?;
            chunk.copy_from_slice(&bounce);
            at += chunk.len() as u64;
        }
        Ok(())
    }

    fn queue(&self) -> Option<&ReadQueue> {
        self.queue.get_or_init(|| self.start_queue()).as_ref()
    }

    fn gap_max(&self) -> u64 {
        GAP_MAX
    }

    fn write_at(&self, addr: u64, data: &[u8]) -> io::Result<()> {
        self.check_range(addr, data.len() as u64)?;
        if self.is_straight(data) {
            return self.file.write_all_at(data, addr);
        }
        let mut at = addr;
        for chunk in data.chunks(self.bounce.chunk_max()) {
            let mut bounce = self.bounce.take(chunk.len());
            bounce.copy_from_slice(chunk);
            self.file.write_all_at(&bounce, at)?;
            at += chunk.len() as u64;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, addr: u64, len: u64) -> io::Result<()> {
        self.check_range(addr, len)?;
        if len == 0 || self.no_discard.load(Ordering::Relaxed) {
            return Ok(());
        }
        let result = if self.is_block_device {
            block::discard_blocks(&self.file, addr, len)
        } else {
            block::punch_hole(&self.file, addr, len)
        };
        match result {
            Err(error) if block::is_unsupported(&error) => {
                log::info!(
                    "{}: the host takes no freed space back: {error}",
                    self.path.display()
                );
                self.no_discard.store(true, Ordering::Relaxed);
                Ok(())
            }
            result => result,
        }
    }

    fn grow(&self, len: u64) -> io::Result<()> {
        FileDevice::grow(self, len)
    }

    fn host_len(&self) -> io::Result<u64> {
        Ok(raw_len(&self.file)? / BLOCK * BLOCK)
    }

    fn allocated(&self) -> io::Result<u64> {
        FileDevice::allocated(self)
    }

    fn host_free(&self) -> io::Result<Option<u64>> {
        if self.is_block_device {
            return Ok(None);
        }
        block::free_bytes(&self.file).map(Some)
    }

    fn preallocate(&self, addr: u64, len: u64) -> io::Result<()> {
        self.check_range(addr, len)?;
        if self.is_block_device || len == 0 {
            return Ok(()); // its space is its own
        }
        block::allocate(&self.file, addr, len)
    }
}

/// Refuses everything but files and block devices.
fn check_type(metadata: &Metadata, path: &Path) -> Result<()> {
    let file_type = metadata.file_type();
    if file_type.is_file() || file_type.is_block_device() {
        return Ok(());
    }
    let what = if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a named pipe"
    } else if file_type.is_char_device() {
        "a character device"
    } else {
        "neither a file nor a block device"
    };
    Err(Error::new(
        Kind::Invalid,
        format!(
            "is {what}: a pool is a file or a block device path={}",
            path.display()
        ),
    ))
}

fn lock(file: &File, path: &Path, mode: OpenMode) -> Result<()> {
    let locked = match mode {
        OpenMode::Inspect => return Ok(()),
        OpenMode::ReadOnly => file.try_lock_shared(),
        OpenMode::ReadWrite => file.try_lock(),
    };
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(Error::new(
            Kind::Busy,
            format!(
                "pool is in use by another process: unmount it first path={}",
                path.display()
            ),
        )),
        Err(TryLockError::Error(error)) => Err(on_path("cannot lock", path, error)),
    }
}

/// Switches to direct I/O; false if the host cannot do it in whole blocks.
fn go_direct(file: &File, len: u64, bounce: &BouncePool) -> io::Result<bool> {
    match block::set_direct(file, true) {
        Ok(()) => {}
        Err(error) if block::is_invalid(&error) => {
            block::set_direct(file, false)?;
            return Ok(false);
        }
        Err(error) => return Err(error),
    }
    // Some hosts accept the flag and refuse the transfers, or want larger blocks.
    let mut buffer = bounce.take(BLOCK_SIZE);
    if len >= BLOCK
        && let Err(error) = read_some(file, &mut buffer, 0)
        && block::is_invalid(&error)
    {
        block::set_direct(file, false)?;
        return Ok(false);
    }
    Ok(true)
}

fn read_some(file: &File, buf: &mut [u8], addr: u64) -> io::Result<usize> {
    loop {
        match file.read_at(buf, addr) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Length in bytes, of a block device too, not rounded.
fn raw_len(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(BLOCK_SIZE)
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

fn on_path(what: &str, path: &Path, error: io::Error) -> Error {
    Error::io(format!("{what} path={}", path.display()), error)
}

fn size_missing(path: &Path) -> Error {
    Error::new(
        Kind::Invalid,
        format!(
            "a new pool needs a size: give --size path={}",
            path.display()
        ),
    )
}

fn size_fixed(path: &Path, len: u64) -> Error {
    Error::new(
        Kind::Invalid,
        format!(
            "exists with another size: leave --size out path={} size={len}",
            path.display()
        ),
    )
}

#[cfg(test)]
mod tests;
