//! The heartbeat: no two hosts write one pool, and one that slept notices that it was replaced.
//!
//! A lock of the host ends at the host. So whoever has a pool open for writing keeps a mark in one
//! block of it and rewrites it once an interval. Whoever wants to open the pool and finds a mark
//! waits whether it changes.
//!
//! Invariants:
//!
//! 1. A mark that changes belongs to a living owner: the pool is refused. One that stays as it is
//!    for [`DEAD_AFTER`] intervals belongs to a dead one. One of this very system whose process
//!    has gone is dead at once: `kill -9` and mount take no time.
//! 2. An owner whose last beat is older than [`TRUST`] intervals looks at its mark before it writes
//!    or acknowledges anything: `TRUST < DEAD_AFTER`, so nobody can have taken the pool over
//!    earlier. The look comes before each write, and behind each sync.
//! 3. An owner that finds another mark never writes again, and leaves that mark alone. No mark at
//!    all is the same: who took the pool over has closed it since.
//! 4. Marks are compared by what is in them, never by clocks of two hosts. The clock of one host
//!    counts the time that it slept.
//! 5. Between looking at a mark and writing one's own another may write his. So whoever takes a
//!    pool over waits longer than any owner may take from one to the other ([`SETTLE`]) and looks
//!    again, before anything else; an owner that was slower, and could have been replaced by then,
//!    gives up. Where no lock excludes others (`shared`), whoever claims a pool without a mark
//!    does the same, with times of a fraction of an interval.
//!
//! What this cannot do is stop a write that left the host before it slept and arrives after it was
//! replaced; only the storage can (reservations). Nor can a virtual machine that was paused know
//! it by any clock of its own: it notices at its next beat.

use std::fmt;
use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::device::{BlockDevice, ReadQueue};
use crate::error::{Error, Kind, Result};
use crate::ondisk::heartbeat::{HB_BLOCK, Heartbeat as Mark};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Condvar, Instant, Mutex, thread};
use crate::units::{BLOCK_SIZE, Time};

/// Between two beats, unless told otherwise.
pub const BEAT_INTERVAL: Duration = Duration::from_secs(1);
/// Intervals without a change after which an owner counts as dead.
const DEAD_AFTER: u32 = 4;
/// Intervals for which a beat is good.
const TRUST: u32 = 2;
const _: () = assert!(TRUST < DEAD_AFTER);
/// Intervals after which who took a pool over looks whether it is still his; and longest time from
/// look to mark of an owner that could have been replaced.
const SETTLE: u32 = 2;
/// Part of an interval for the same where nobody left a mark.
const SETTLE_SHARE: u32 = 4;
/// Longest interval that is believed of a mark, so that a damaged one makes nobody wait for ever.
const INTERVAL_MAX: Duration = Duration::from_secs(60);

/// Who opens a pool.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Random, for this opening.
    pub owner: [u8; 16],
    /// Identity of the running system, which changes when it starts again.
    pub boot: [u8; 16],
    /// This process.
    pub pid: u32,
    /// Name of this host, for people.
    pub host: String,
    /// Tells whether a process of this system is alive.
    pub is_alive: fn(u32) -> bool,
    /// Time since any fixed point, the time that the system slept included.
    pub clock: fn() -> Duration,
}

/// Our mark in a pool, rewritten by a thread for as long as this is not released.
pub struct Heartbeat {
    device: Arc<dyn BlockDevice>,
    interval: Duration,
    /// The mark as it stands in the pool. Held during a beat.
    own: Mutex<Mark>,
    clock: fn() -> Duration,
    /// Milliseconds of `clock` at the last beat.
    last: AtomicU64,
    beats: AtomicU64,
    lost: AtomicBool,
    /// Why it is lost, if it is.
    loss: Mutex<Option<String>>,
    /// Who is told then.
    tell: Mutex<Option<Tell>>,
    stop: Mutex<bool>,
    stopped: Condvar,
}

/// Is told why the heartbeat was lost.
type Tell = Box<dyn Fn(&Error) + Send>;

impl fmt::Debug for Heartbeat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Heartbeat({} beats)", self.beats.load(Ordering::Relaxed))
    }
}

/// What stands where marks are.
enum Found {
    /// A mark.
    Mark(Mark),
    /// None: the pool was closed.
    Nothing,
    /// Something that is none: a torn beat, or damage.
    Damaged,
}

fn look(device: &dyn BlockDevice) -> Result<Found> {
    let mut page = [0; BLOCK_SIZE];
    device
        .read_at(HB_BLOCK * BLOCK_SIZE as u64, &mut page)
        .map_err(|source| Error::io("cannot read the heartbeat", source))?;
    Ok(match Mark::decode(&page) {
        Ok(Some(mark)) => Found::Mark(mark),
        Ok(None) => Found::Nothing,
        Err(error) => {
            log::warn!("{error}");
            Found::Damaged
        }
    })
}

/// The mark that stands in a pool, for who does not own it. A damaged one counts as none.
fn read_mark(device: &dyn BlockDevice) -> Result<Option<Mark>> {
    Ok(match look(device)? {
        Found::Mark(mark) => Some(mark),
        Found::Nothing | Found::Damaged => None,
    })
}

fn in_use(mark: &Mark) -> Error {
    Error::new(
        Kind::Busy,
        format!(
            "the pool is in use on another host: host={} process={}; unmount it there first",
            mark.host, mark.pid
        ),
    )
}

/// Fails if somebody elsewhere has the pool open for writing. Takes no time if there is no mark, or
/// one of this system; else some intervals of its owner (I1).
///
/// # Errors
/// `Busy` if it is in use; `Io`.
pub fn refuse_active(device: &dyn BlockDevice, pool: [u8; 16], us: &Identity) -> Result<()> {
    let Some(first) = read_mark(device)? else {
        return Ok(());
    };
    let dead = first.boot == us.boot && (first.pid == us.pid || !(us.is_alive)(first.pid));
    if first.pool != pool || dead {
        return Ok(()); // I1; or what another pool has left there
    }
    let interval = Duration::from_millis(first.interval_ms.into()).min(INTERVAL_MAX);
    log::info!(
        "the pool is marked as in use by host {}: waiting whether it is alive",
        first.host
    );
    let begun = Instant::now();
    while begun.elapsed() < interval * DEAD_AFTER {
        thread::sleep(interval / 4);
        match read_mark(device)? {
            None => return Ok(()),
            Some(now) if (now.owner, now.seq) != (first.owner, first.seq) => {
                return Err(in_use(&now));
            }
            Some(_) => {}
        }
    }
    log::warn!("host {} has left the pool without closing it", first.host);
    Ok(())
}

impl Heartbeat {
    /// Marks the pool as ours and begins to beat. The caller has made sure that it is nobody
    /// else's: [`refuse_active`]. `shared`: a lock on the device does not exclude other hosts, as
    /// on a block device. Takes some intervals if the mark of another host is there, a fraction
    /// of one if `shared`, else no time (I5).
    ///
    /// # Errors
    /// `Busy` if somebody else has it; `Io`.
    pub fn claim(
        device: &Arc<dyn BlockDevice>,
        pool: [u8; 16],
        us: &Identity,
        interval: Duration,
        shared: bool,
    ) -> Result<Arc<Self>> {
        let mark = Mark {
            pool,
            owner: us.owner,
            boot: us.boot,
            seq: 0,
            time: Time::now(),
            pid: us.pid,
            interval_ms: interval.as_millis() as u32,
            host: us.host.clone(),
        };
        let heartbeat = Arc::new(Self {
            device: Arc::clone(device),
            interval,
            own: Mutex::new(mark),
            clock: us.clock,
            last: AtomicU64::new((us.clock)().as_millis() as u64),
            beats: AtomicU64::new(0),
            lost: AtomicBool::new(false),
            loss: Mutex::new(None),
            tell: Mutex::new(None),
            stop: Mutex::new(false),
            stopped: Condvar::new(),
        });
        let settle = heartbeat.take(us, shared)?;
        if !settle.is_zero() {
            thread::sleep(settle);
        }
        // Of several that claimed at once the last one has it.
        heartbeat.beat()?;
        let beating = Arc::downgrade(&heartbeat);
        thread::Builder::new()
            .name("nodupe-beat".into())
            .spawn(move || beat_until_released(&beating))
            .map_err(|source| Error::io("cannot start a thread", source))?;
        Ok(heartbeat)
    }

    /// A device that is written only while the pool is ours (I2).
    pub fn guard(self: &Arc<Self>, device: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
        Arc::new(Guarded {
            device,
            heartbeat: Arc::clone(self),
        })
    }

    /// Beats so far, and milliseconds since the last one.
    pub fn state(&self) -> (u64, u64) {
        (self.beats.load(Ordering::Relaxed), self.age_ms())
    }

    /// Calls `tell` when the heartbeat is lost.
    pub fn on_loss(&self, tell: impl Fn(&Error) + Send + 'static) {
        *self.tell.lock() = Some(Box::new(tell));
    }

    fn now_ms(&self) -> u64 {
        (self.clock)().as_millis() as u64
    }

    fn age_ms(&self) -> u64 {
        let last = self.last.load(Ordering::SeqCst);
        self.now_ms().saturating_sub(last)
    }

    /// Writes the first mark, soon after a look at what is there. Returns how long it must stand
    /// before it counts (I5).
    ///
    /// # Errors
    /// `Busy` if somebody else wrote a mark over ours meanwhile; `Io`.
    fn take(&self, us: &Identity, shared: bool) -> Result<Duration> {
        let mut settle = Duration::ZERO;
        loop {
            let own = self.own.lock();
            let begun = self.now_ms();
            let left = read_mark(&*self.device)?.filter(|mark| {
                mark.pool == own.pool && mark.owner != own.owner && mark.boot != us.boot
            });
            if let Some(other) = left.as_ref().filter(|_| !settle.is_zero()) {
                return Err(in_use(other));
            }
            // A second round finds our own mark, and waits for what the first one found.
            settle = settle.max(match left {
                Some(left) => {
                    let theirs = Duration::from_millis(left.interval_ms.into());
                    self.interval.max(theirs.min(INTERVAL_MAX)) * SETTLE
                }
                None if shared => self.interval / SETTLE_SHARE,
                None => Duration::ZERO,
            });
            self.put(&own.encode()[..])?;
            let took = self.now_ms() - begun;
            if settle.is_zero() || u128::from(took) < settle.as_millis() {
                return Ok(settle);
            }
        }
    }

    fn put(&self, page: &[u8]) -> Result<()> {
        self.device
            .write_at(HB_BLOCK * BLOCK_SIZE as u64, page)
            .map_err(|source| Error::io("cannot write the heartbeat", source))
    }

    /// Looks whether the mark is ours, and renews it.
    ///
    /// # Errors
    /// `Busy` if it is somebody else's, now and for ever; `Io`: it is not known.
    pub fn beat(&self) -> Result<()> {
        self.check_lost()?;
        let mut own = self.own.lock();
        let begun = self.now_ms();
        let span = self.interval.as_millis() as u64;
        let replaceable = |now: u64| {
            now.saturating_sub(self.last.load(Ordering::SeqCst)) >= span * u64::from(DEAD_AFTER)
        };
        let other = match look(&*self.device)? {
            Found::Mark(mark) if mark.owner == own.owner => None,
            Found::Mark(mark) => Some(format!(
                "another host has taken the pool over: host={} process={}",
                mark.host, mark.pid
            )),
            Found::Nothing => {
                Some("another host has taken the pool over, and closed it since".to_owned())
            }
            // Nobody can have replaced this owner yet, so this is damage, and is repaired.
            Found::Damaged if !replaceable(begun) => None,
            Found::Damaged => Some(
                "the heartbeat is damaged, and another host may have taken the pool over"
                    .to_owned(),
            ),
        };
        if let Some(why) = other {
            drop(own);
            return Err(self.lose(why)); // I3
        }
        own.seq += 1;
        own.time = Time::now();
        self.put(&own.encode()[..])?;
        let now = self.now_ms();
        if replaceable(now) && now - begun >= span * u64::from(SETTLE) {
            drop(own);
            let why = "another host may have taken the pool over while a beat took too long";
            return Err(self.lose(why.to_owned())); // I5
        }
        self.last.store(begun, Ordering::SeqCst);
        self.beats.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn lose(&self, why: String) -> Error {
        let error = Error::new(Kind::Busy, why.clone());
        *self.loss.lock() = Some(why);
        self.lost.store(true, Ordering::SeqCst);
        if let Some(tell) = &*self.tell.lock() {
            tell(&error);
        }
        error
    }

    fn check_lost(&self) -> Result<()> {
        if !self.lost.load(Ordering::SeqCst) {
            return Ok(());
        }
        let why = self.loss.lock().clone().unwrap_or_default();
        Err(Error::new(Kind::Busy, why))
    }

    /// Makes sure that the pool is still ours (I2).
    fn check(&self) -> Result<()> {
        self.check_lost()?;
        if self.age_ms() < (self.interval * TRUST).as_millis() as u64 {
            return Ok(());
        }
        self.beat()
    }

    /// Ends the beats and takes our mark away.
    pub fn release(&self) {
        *self.stop.lock() = true;
        self.stopped.notify_all();
        let outcome = self.beat().and_then(|()| self.put(&[0; BLOCK_SIZE]));
        if let Err(error) = outcome {
            log::warn!("cannot take the heartbeat away: {error}");
        }
    }
}

/// The thread. It ends with the heartbeat.
fn beat_until_released(heartbeat: &Weak<Heartbeat>) {
    while let Some(heartbeat) = heartbeat.upgrade() {
        let mut stop = heartbeat.stop.lock();
        if !*stop {
            heartbeat.stopped.wait_for(&mut stop, heartbeat.interval);
        }
        if *stop {
            return;
        }
        // Held during the beat, so that none comes behind the release.
        match heartbeat.beat() {
            Ok(()) => {}
            Err(error) if heartbeat.lost.load(Ordering::SeqCst) => {
                log::error!("{error}");
                return;
            }
            // Whoever writes next looks again.
            Err(error) => log::warn!("{error}"),
        }
    }
}

/// A device behind a heartbeat.
#[derive(Debug)]
struct Guarded {
    device: Arc<dyn BlockDevice>,
    heartbeat: Arc<Heartbeat>,
}

impl Guarded {
    fn check(&self) -> io::Result<()> {
        self.heartbeat.check().map_err(io::Error::other)
    }
}

impl BlockDevice for Guarded {
    fn len(&self) -> u64 {
        self.device.len()
    }

    fn read_at(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        self.device.read_at(addr, buf)
    }

    fn queue(&self) -> Option<&ReadQueue> {
        self.device.queue()
    }

    fn gap_max(&self) -> u64 {
        self.device.gap_max()
    }

    fn write_at(&self, addr: u64, data: &[u8]) -> io::Result<()> {
        self.check()?;
        self.device.write_at(addr, data)
    }

    fn sync(&self) -> io::Result<()> {
        self.device.sync()?;
        self.check() // what follows is an acknowledgement
    }

    fn discard(&self, addr: u64, len: u64) -> io::Result<()> {
        self.check()?;
        self.device.discard(addr, len)
    }

    fn grow(&self, len: u64) -> io::Result<()> {
        self.check()?;
        self.device.grow(len)
    }

    fn host_len(&self) -> io::Result<u64> {
        self.device.host_len()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.device.allocated()
    }

    fn host_free(&self) -> io::Result<Option<u64>> {
        self.device.host_free()
    }

    fn preallocate(&self, addr: u64, len: u64) -> io::Result<()> {
        self.check()?;
        self.device.preallocate(addr, len)
    }
}
