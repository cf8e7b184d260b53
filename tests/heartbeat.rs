//! Two hosts and one pool: only one of them writes. The hosts are identities that the test makes
//! up, the pool is a device that both see.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
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
    /// How long a beat hangs between its look and its write.
    slow: Mutex<Duration>,
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
        if addr == HEARTBEAT {
            std::thread::sleep(*self.slow.lock().expect("no panic before"));
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
        slow: Mutex::default(),
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

#[test]
fn a_beat_that_hangs_between_look_and_mark_lets_no_two_write() {
    let device = pool();
    let (host, first) = open(&device, &identity(1, 1, 10)).expect("nobody has it");
    change(&first).expect("it is ours");
    // The next beat of host 1 looks, hangs, and writes when host 2 has just taken the pool over.
    *host.slow.lock().expect("no panic before") = INTERVAL * 6;
    std::thread::sleep(INTERVAL * 2);
    *host.slow.lock().expect("no panic before") = Duration::ZERO;
    let second = open(&device, &identity(2, 2, 20));
    std::thread::sleep(INTERVAL * 8);
    let one = change(&first).is_ok();
    let two = second.is_ok_and(|(_, second)| change(&second).is_ok());
    assert!(!(one && two), "both write");
}

#[test]
fn of_two_that_claim_at_once_without_a_lock_one_has_it() {
    for round in 0..12 {
        let device = pool();
        let claims: Vec<bool> = std::thread::scope(|scope| {
            let claim = |owner: u8, delay: u64| {
                let device: Arc<dyn BlockDevice> = device.clone();
                scope.spawn(move || {
                    std::thread::sleep(Duration::from_millis(delay));
                    let us = identity(owner, owner, u32::from(owner));
                    let claim = refuse_active(&*device, UUID, &us)
                        .and_then(|()| Heartbeat::claim(&device, UUID, &us, INTERVAL, true));
                    // Kept, so that the other one meets a living owner.
                    std::thread::sleep(INTERVAL * 3);
                    claim.is_ok_and(|claim| claim.beat().is_ok())
                })
            };
            let both = [claim(1, 0), claim(2, round % 4)];
            both.map(|thread| thread.join().expect("no panic")).to_vec()
        });
        assert!(claims != [true, true], "round {round}: both have it");
    }
}
