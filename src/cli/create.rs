//! `nodupe create`: makes a pool.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use clap::Args;
use indicatif::ProgressBar;
use nodupe::device::{BlockDevice, FileDevice};
use nodupe::engine::{CreateOptions, Pool, PoolInfo};
use nodupe::error::{Error, Kind};
use nodupe::sys::process;
use nodupe::units::Time;
use serde_json::json;

use super::access;
use super::failure::{Failure, Result};
use super::info;
use super::output::{Output, show};
use super::size;

const EXAMPLE: &str = "\
Examples:
  nodupe create ./pool.nodupe --size 500G
  nodupe create ./pool.nodupe --size 500G --preallocate
  nodupe create /dev/sdb1 --journal /dev/nvme0n1p3";

/// Makes a pool on a file or a block device.
///
/// A file is made sparse, so that a pool takes only what is stored in it. An existing empty or
/// zero-filled file is used at its size, and so is a block device.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Create {
    /// File or block device of the pool
    pub(super) pool: PathBuf,
    #[command(flatten)]
    pub(super) shape: Shape,
    /// Overwrite a pool, a filesystem or other data
    #[arg(long)]
    force: bool,
    /// Print the facts of the pool as JSON
    #[arg(long)]
    json: bool,
}

/// What a new pool is made like.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct Shape {
    /// Size of the pool, 64M to 1P; a new file has 100G unless told otherwise
    #[arg(long, value_name = "SIZE", value_parser = size::parse_pool_size)]
    pub(super) size: Option<u64>,
    /// Size of the journal; an eighth of the pool, 1M to 1G, unless told otherwise
    #[arg(long, value_name = "SIZE", value_parser = size::parse_journal_size)]
    pub(super) journal_size: Option<u64>,
    /// File or block device of the journal, if it is not in the pool
    #[arg(long, value_name = "DEVICE")]
    pub(super) journal: Option<PathBuf>,
    /// Allocate the whole file on the host, now and for good, instead of what is stored
    #[arg(long)]
    pub(super) preallocate: bool,
}

pub(super) fn run(args: &Create, output: Output) -> Result<()> {
    let info = make_pool(&args.pool, &args.shape, args.force, output)?;
    let name = show(&args.pool);
    if args.json {
        let mut facts = info::facts_json(&info);
        facts["pool"] = json!(name);
        output.json(facts);
    } else {
        output.done(&format!(
            "created {name}: {}, journal {}\nnext: nodupe mount {name} DIR",
            size::human(info.size),
            size::human(info.journal_size),
        ));
    }
    Ok(())
}

/// Makes a pool; a file that was made for it goes away again if that fails.
pub(super) fn make_pool(
    path: &Path,
    shape: &Shape,
    force: bool,
    output: Output,
) -> Result<PoolInfo> {
    let name = show(path);
    let what = format!("cannot create the pool {name}");
    // A file is looked at before anything is done to it, a device when it is open.
    if let (None, Ok(old)) = (shape.size, fs::metadata(path))
        && old.is_file()
        && old.len() > 0
    {
        check_size(old.len(), &what)?;
    }
    let mut made = MadeFiles::default();
    let device = made.take(path, shape.size, size::POOL_SIZE_DEFAULT, force)?;
    check_size(device.len(), &what)?;
    if shape.preallocate {
        device.preallocate(0, device.len()).map_err(|error| {
            let failure = Failure::new(&what).because(&error);
            match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    failure.hint("choose a smaller --size, or leave --preallocate out")
                }
                _ => failure.hint("its filesystem cannot do that: leave --preallocate out"),
            }
        })?;
    }
    let journal = match &shape.journal {
        Some(journal) => {
            let wanted = shape.journal_size;
            Some(made.take(journal, wanted, JOURNAL_SIZE_MAX, force)?)
        }
        None => None,
    };
    let random = random_bytes().map_err(|error| Failure::new(&what).because(&error))?;
    let (uid, gid) = process::effective_owner();
    let options = CreateOptions {
        journal_size: shape.journal_size,
        uuid: as_uuid(random.0),
        hash_key: random.1,
        uid,
        gid,
        time: Time::now(),
    };
    let ring = options.journal_size.unwrap_or_else(|| match &journal {
        Some(journal) => journal.len(),
        None => (device.len() / 8).clamp(JOURNAL_SIZE_MIN, JOURNAL_SIZE_MAX),
    });
    let bar = output.progress("filling the journal", ring, true);
    let device: Arc<dyn BlockDevice> = Arc::new(device);
    let counted = |device| Arc::new(Counting::new(device, &bar)) as Arc<dyn BlockDevice>;
    let journal = journal.map(|journal| counted(Arc::new(journal)));
    let created = Pool::create(counted(Arc::clone(&device)), journal, &options);
    bar.finish_and_clear();
    let info = created
        .and_then(|()| Pool::inspect(device.as_ref()))
        .map_err(|error| failed(&what, path, &error))?;
    made.keep();
    Ok(info)
}

const JOURNAL_SIZE_MIN: u64 = 1024 * 1024; // 1 MiB
const JOURNAL_SIZE_MAX: u64 = 1024 * 1024 * 1024; // 1 GiB

fn check_size(len: u64, what: &str) -> Result<()> {
    if (size::POOL_SIZE_MIN..=size::POOL_SIZE_MAX).contains(&len) {
        return Ok(());
    }
    let len = size::human(len);
    Err(Failure::new(what)
        .why(format!("it has {len}, and a pool has 64 MiB to 1 PiB"))
        .hint("choose another file or device"))
}

fn failed(what: &str, path: &Path, error: &Error) -> Failure {
    let name = show(path);
    match error.kind() {
        Kind::Exists => {
            let failure = match access::inspect_path(path) {
                Ok(_) => Failure::new(what).why("it holds a nodupe pool"),
                Err(_) => Failure::new(what).because(error),
            };
            failure.hint(format!(
                "nothing was changed; to overwrite it: nodupe create --force {name}"
            ))
        }
        Kind::Busy => access::in_use(path, error),
        Kind::NotFound => Failure::new(what)
            .because(error)
            .hint("make the directory first, or look for the right path"),
        _ => Failure::of_pool(what, &name, error),
    }
}

/// Files that did not exist before: removed when dropped, unless kept.
#[derive(Debug, Default)]
struct MadeFiles(Vec<PathBuf>);

impl MadeFiles {
    /// Makes or takes the device of a pool or journal. A file that is missing or empty gets
    /// `default` bytes unless `size` says otherwise.
    fn take(
        &mut self,
        path: &Path,
        size: Option<u64>,
        default: u64,
        force: bool,
    ) -> Result<FileDevice> {
        let what = format!("cannot create the pool on {}", show(path));
        let (missing, empty) = match fs::metadata(path) {
            Err(error) => (error.kind() == io::ErrorKind::NotFound, true),
            Ok(metadata) => (false, metadata.is_file() && metadata.len() == 0),
        };
        let size = size.or(empty.then_some(default));
        let device =
            FileDevice::create(path, size, force).map_err(|error| failed(&what, path, &error))?;
        if missing {
            self.0.push(path.to_path_buf());
        }
        Ok(device)
    }

    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for MadeFiles {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = fs::remove_file(path) {
                log::warn!("cannot remove {}: {error}", show(path));
            }
        }
    }
}

/// Random bytes for the identity and the hash key.
fn random_bytes() -> io::Result<([u8; 16], [u8; 16])> {
    let (mut uuid, mut key) = ([0; 16], [0; 16]);
    let mut source = File::open("/dev/urandom")?;
    source.read_exact(&mut uuid)?;
    source.read_exact(&mut key)?;
    Ok((uuid, key))
}

/// Marks random bytes as a version 4 UUID (RFC 9562).
fn as_uuid(mut bytes: [u8; 16]) -> [u8; 16] {
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    bytes
}

/// A device that shows on a bar how much was written to it.
#[derive(Debug)]
struct Counting {
    device: Arc<dyn BlockDevice>,
    bar: Mutex<ProgressBar>,
}

impl Counting {
    fn new(device: Arc<dyn BlockDevice>, bar: &ProgressBar) -> Self {
        Self {
            device,
            bar: Mutex::new(bar.clone()),
        }
    }
}

impl BlockDevice for Counting {
    fn len(&self) -> u64 {
        self.device.len()
    }

    fn read_at(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        self.device.read_at(addr, buf)
    }

    fn write_at(&self, addr: u64, data: &[u8]) -> io::Result<()> {
        self.device.write_at(addr, data)?;
        if let Ok(bar) = self.bar.lock() {
            bar.inc(data.len() as u64);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.device.sync()
    }

    fn discard(&self, addr: u64, len: u64) -> io::Result<()> {
        self.device.discard(addr, len)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.device.allocated()
    }

    fn host_free(&self) -> io::Result<Option<u64>> {
        self.device.host_free()
    }

    fn preallocate(&self, addr: u64, len: u64) -> io::Result<()> {
        self.device.preallocate(addr, len)
    }
}
