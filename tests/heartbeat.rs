//! Two hosts and one pool: only one of them writes. The hosts are identities that the test makes
//! up, the pool is a device that both see.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nodupe::device::{BlockDevice, SimDevice};
use nodupe::engine::{
    CreateOptions, Heartbeat, Identity, OpenOptions, Pool, SetAttr, refuse_active,
};
use nodupe::error::{Kind, Result};
use nodupe::sys::process::uptime;
use nodupe::units::{Ino, Time};

const INTERVAL: Duration = Duration::from_millis(100);
const UUID: [u8; 16] = [9; 16];
/// Address of the mark.
const HEARTBEAT: u64 = 2 * 4096;

/// The pool as one host sees it. It can be put to sleep: then its heartbeat stands still.
#[derive(Debug)]
struct Host {
    shared: Arc<SimDevice>,
    asleep: AtomicBool,
    /// Marks hang between the look and the write, and one does.
    holds: AtomicBool,
    held: AtomicBool,
}

impl BlockDevice for Host {
    fn len(&self) -> u64 {
        self.shared.len()
    }
    fn read_at(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        while self.asleep.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.shared.read_at(addr, buf)
    }
    fn write_at(&self, addr: u64, data: &[u8]) -> io::Result<()> {
        while addr == HEARTBEAT && self.holds.load(Ordering::SeqCst) {
            self.held.store(true, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
        }
        self.shared.write_at(addr, data)
    }
    fn sync(&self) -> io::Result<()> {
        self.shared.sync()
    }
    fn discard(&self, addr: u64, len: u64) -> io::Result<()> {
        self.shared.discard(addr, len)
    }
}

fn identity(owner: u8, boot: u8, pid: u32) -> Identity {
    Identity {
        owner: [owner; 16],
        boot: [boot; 16],
        pid,
        host: format!("host{boot}"),
        is_alive: |pid| pid != 666,
        clock: uptime,
    }
}

fn pool() -> Arc<SimDevice> {
    let device = Arc::new(SimDevice::new(16 * 1024 * 1024, 1));
    let options = CreateOptions {
        journal_size: None,
        uuid: UUID,
        hash_key: [1; 16],
        uid: 0,
        gid: 0,
        time: Time::default(),
    };
    Pool::create(device.clone(), None, &options).expect("a pool");
    device
}

/// Opens the pool as the command line does.
fn open(shared: &Arc<SimDevice>, us: &Identity) -> Result<(Arc<Host>, Arc<Pool>)> {
    let host = Arc::new(Host {
        shared: shared.clone(),
        asleep: AtomicBool::new(false),
        holds: AtomicBool::new(false),
        held: AtomicBool::new(false),
    });
    let device: Arc<dyn BlockDevice> = host.clone();
    refuse_active(&*device, UUID, us)?;
    let heartbeat = Heartbeat::claim(&device, UUID, us, INTERVAL, false)?;
    let pool = Pool::open(heartbeat.guard(device), None, &OpenOptions::default())?;
    pool.keep_heartbeat(heartbeat);
    Ok((host, pool))
}

fn change(pool: &Pool) -> Result<()> {
    let change = SetAttr {
        mtime: Some(Time::now()),
        ..SetAttr::default()
    };
    pool.set_attr(Ino::ROOT, &change)?;
    pool.sync()
}

#[test]
fn a_pool_in_use_on_another_host_is_refused() {
    let device = pool();
    let (_, first) = open(&device, &identity(1, 1, 10)).expect("nobody has it");
    let error = open(&device, &identity(2, 2, 20)).expect_err("host1 has it");
    assert_eq!(error.kind(), Kind::Busy);
    let text = error.to_string();
    assert!(text.contains("host1") && text.contains("10"), "{text}");
    // Another process of the same system as well, as long as it lives.
    let error = open(&device, &identity(3, 1, 30)).expect_err("process 10 has it");
    assert_eq!(error.kind(), Kind::Busy);
    // Nor is it shown to those who only read.
    let error = refuse_active(&*device, UUID, &identity(4, 4, 40)).expect_err("host1 writes");
    assert_eq!(error.kind(), Kind::Busy);
    change(&first).expect("the owner goes on");
    first.close().expect("closed");
    let begun = Instant::now();
    let (_, second) = open(&device, &identity(2, 2, 20)).expect("it was closed");
    assert!(
        begun.elapsed() < INTERVAL,
        "a closed pool makes nobody wait"
    );
    second.close().expect("closed");
}

#[test]
fn a_dead_host_is_replaced_after_a_while_and_a_dead_process_at_once() {
    let device = pool();
    let (host, first) = open(&device, &identity(1, 1, 666)).expect("nobody has it");
    change(&first).expect("it is ours");
    // As if host 1 had died: nothing of it reaches the pool any more.
    host.asleep.store(true, Ordering::SeqCst);
    std::thread::sleep(INTERVAL * 2);
    let begun = Instant::now();
    let (second_host, second) = open(&device, &identity(2, 2, 20)).expect("host1 is dead");
    assert!(begun.elapsed() >= INTERVAL * 4, "{:?}", begun.elapsed());
    change(&second).expect("it is ours");
    second_host.asleep.store(true, Ordering::SeqCst);
    drop(second);
    // Process 666 of the same system has gone, says the system.
    let device = pool();
    let (host, third) = open(&device, &identity(3, 1, 666)).expect("nobody has it");
    host.asleep.store(true, Ordering::SeqCst);
    let begun = Instant::now();
    let (_, fourth) = open(&device, &identity(4, 1, 20)).expect("process 666 is dead");
    assert!(begun.elapsed() < INTERVAL * 2, "{:?}", begun.elapsed());
    fourth.close().expect("closed");
    drop((first, third));
}

#[test]
fn an_owner_that_slept_acknowledges_nothing_after_it_was_replaced() {
    let device = pool();
    let (host, first) = open(&device, &identity(1, 1, 10)).expect("nobody has it");
    change(&first).expect("it is ours");
    host.asleep.store(true, Ordering::SeqCst);
    std::thread::sleep(INTERVAL * 2);
    let (_, second) = open(&device, &identity(2, 2, 20)).expect("host1 sleeps");
    change(&second).expect("it is ours");
    let before = device.counts().writes;
    host.asleep.store(false, Ordering::SeqCst);
    let error = change(&first).expect_err("host2 has it");
    let why = first.poisoned().unwrap_or_default();
    assert!(
        why.contains("host2") && why.contains("20"),
        "{error}: {why}"
    );
    for _ in 0..3 {
        assert!(change(&first).is_err(), "and it stays so");
    }
    assert!(first.close().is_err());
    drop(first);
    // Beats of host 2 aside, nobody wrote.
    let beats = before + 40;
    assert!(device.counts().writes < beats, "host1 has written");
    change(&second).expect("host2 goes on");
    second.close().expect("closed");
    let findings = Pool::check(&*device, None, &mut |_, _| {}).expect("checked");
    assert!(findings.is_empty(), "{findings:?}");
}

#[test]
fn an_idle_owner_is_poisoned_at_once() {
    let device = pool();
    let (host, first) = open(&device, &identity(1, 1, 10)).expect("nobody has it");
    host.asleep.store(true, Ordering::SeqCst);
    std::thread::sleep(INTERVAL * 2);
    let (_, second) = open(&device, &identity(2, 2, 20)).expect("host1 sleeps");
    host.asleep.store(false, Ordering::SeqCst);
    let begun = Instant::now();
    while first.poisoned().is_none() {
        assert!(begun.elapsed() < INTERVAL * 50, "nobody told host1");
        std::thread::sleep(INTERVAL / 10);
    }
    second.close().expect("closed");
}

#[test]
fn what_is_left_of_another_pool_or_damaged_is_no_owner() {
    let device = pool();
    let (_, first) = open(&device, &identity(1, 1, 10)).expect("nobody has it");
    let begun = Instant::now();
    refuse_active(&*device, [8; 16], &identity(2, 2, 20)).expect("that was another pool");
    device.flip(2 * 4096 + 100, 3);
    refuse_active(&*device, [8; 16], &identity(2, 2, 20)).expect("nobody can tell");
    assert!(begun.elapsed() < INTERVAL * 2);
    first.close().expect("closed");
}

#[test]
fn an_owner_that_slept_is_replaced_for_good_also_by_who_has_closed_since() {
    let device = pool();
    let (host, first) = open(&device, &identity(1, 1, 10)).expect("nobody has it");
    change(&first).expect("it is ours");
    host.asleep.store(true, Ordering::SeqCst);
    std::thread::sleep(INTERVAL * 2);
    let (_, second) = open(&device, &identity(2, 2, 20)).expect("host1 sleeps");
    change(&second).expect("it is ours");
    second.close().expect("closed");
    let before = device.counts().writes;
    host.asleep.store(false, Ordering::SeqCst);
    assert!(change(&first).is_err(), "host2 had it");
    assert!(first.poisoned().is_some());
    assert!(first.close().is_err());
    assert_eq!(device.counts().writes, before, "host1 has written");
    let findings = Pool::check(&*device, None, &mut |_, _| {}).expect("checked");
    assert!(findings.is_empty(), "{findings:?}");
}

/// Waits for something, not for ever.
fn until(what: &str, is: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < INTERVAL * 100, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Who stands in the mark.
fn marked_by(device: &SimDevice, owner: u8) -> bool {
    let mut page = [0; 4096];
    device.read_at(HEARTBEAT, &mut page).expect("sound");
    nodupe::ondisk::heartbeat::Heartbeat::decode(&page)
        .is_ok_and(|mark| mark.is_some_and(|mark| mark.owner == [owner; 16]))
}

fn host(shared: &Arc<SimDevice>, holds: bool) -> Arc<Host> {
    Arc::new(Host {
        shared: shared.clone(),
        asleep: AtomicBool::new(false),
        holds: AtomicBool::new(holds),
        held: AtomicBool::new(false),
    })
}

#[test]
fn a_mark_written_over_by_an_owner_that_had_just_looked_is_no_claim() {
    let device = pool();
    let (first_host, first) = open(&device, &identity(1, 1, 10)).expect("nobody has it");
    change(&first).expect("it is ours");
    first_host.asleep.store(true, Ordering::SeqCst);
    std::thread::sleep(INTERVAL * 2);
    let second_host = host(&device, true);
    std::thread::scope(|scope| {
        let second = scope.spawn(|| {
            let device: Arc<dyn BlockDevice> = second_host.clone();
            let us = identity(2, 2, 20);
            refuse_active(&*device, UUID, &us)?;
            Heartbeat::claim(&device, UUID, &us, INTERVAL, false)
        });
        // Both have looked, and neither has written: then the second one, and the first one.
        until("the claim", || second_host.held.load(Ordering::SeqCst));
        first_host.holds.store(true, Ordering::SeqCst);
        first_host.asleep.store(false, Ordering::SeqCst);
        until("the beat", || first_host.held.load(Ordering::SeqCst));
        second_host.holds.store(false, Ordering::SeqCst);
        until("the mark of host2", || marked_by(&device, 2));
        first_host.holds.store(false, Ordering::SeqCst);
        let claimed = second.join().expect("no panic");
        let error = claimed.expect_err("host1 is alive, and has the mark");
        assert_eq!(error.kind(), Kind::Busy);
    });
    // It could have been replaced since it began to look, so it gives up as well: better nobody
    // than two.
    assert!(change(&first).is_err());
}

#[test]
fn of_two_that_claim_at_once_without_a_lock_the_last_one_has_it() {
    let device = pool();
    let hosts = [host(&device, true), host(&device, true)];
    std::thread::scope(|scope| {
        let claims = [1_u8, 2].map(|owner| {
            let device: Arc<dyn BlockDevice> = hosts[usize::from(owner) - 1].clone();
            scope.spawn(move || {
                let us = identity(owner, owner, u32::from(owner));
                refuse_active(&*device, UUID, &us)?;
                // A long interval, so that the test has time between look and mark.
                Heartbeat::claim(&device, UUID, &us, INTERVAL * 20, true)
            })
        });
        for host in &hosts {
            until("a claim", || host.held.load(Ordering::SeqCst));
        }
        for (owner, host) in (1..).zip(&hosts) {
            host.holds.store(false, Ordering::SeqCst);
            until("a mark", || marked_by(&device, owner));
        }
        let [first, second] = claims.map(|claim| claim.join().expect("no panic"));
        assert_eq!(first.expect_err("host2 was later").kind(), Kind::Busy);
        second.expect("the last one has it").release();
    });
}
