//! The simulated device does what it says, each time the same.

use super::*;
use crate::units::SECTOR_SIZE;

const BLOCK: u64 = BLOCK_SIZE as u64;
const LEN: u64 = 64 * BLOCK;

fn filled(byte: u8, blocks: usize) -> Vec<u8> {
    vec![byte; blocks * BLOCK_SIZE]
}

fn contents(device: &SimDevice) -> Vec<u8> {
    let mut out = vec![0; LEN as usize];
    device.read_at(0, &mut out).unwrap();
    out
}

/// Writes 1..=count to blocks 0.., the first `synced` of them durable.
fn numbered(count: u8, synced: u8) -> SimDevice {
    let device = SimDevice::new(LEN, 1);
    for number in 1..=count {
        let addr = u64::from(number - 1) * BLOCK;
        device.write_at(addr, &filled(number, 1)).unwrap();
        if number == synced {
            device.sync().unwrap();
        }
    }
    device
}

#[test]
fn reads_see_writes_and_zeros() {
    let device = numbered(3, 0);
    let bytes = contents(&device);
    for (index, block) in bytes.chunks(BLOCK_SIZE).enumerate() {
        let wanted = if index < 3 { index as u8 + 1 } else { 0 };
        assert!(block.iter().all(|byte| *byte == wanted));
    }
    assert!(device.read_at(LEN, &mut [0; BLOCK_SIZE]).is_err());
    assert!(device.write_at(LEN - BLOCK, &filled(1, 2)).is_err());
    assert_eq!(device.counts().writes, 3);
}

#[test]
fn synced_writes_survive_every_crash() {
    let device = numbered(20, 10);
    assert_eq!(device.pending_len(), 10);
    let (mut lost, mut kept, mut torn) = (0, 0, 0);
    for seed in 0..200 {
        let bytes = contents(&device.crash(seed));
        for (index, block) in bytes.chunks(BLOCK_SIZE).enumerate().take(20) {
            let number = index as u8 + 1;
            let sectors = || block.chunks(SECTOR_SIZE);
            let fresh = sectors()
                .filter(|sector| sector.iter().all(|byte| *byte == number))
                .count();
            let empty = sectors()
                .filter(|sector| sector.iter().all(|byte| *byte == 0))
                .count();
            assert_eq!(fresh + empty, BLOCK_SIZE / SECTOR_SIZE);
            if index < 10 {
                assert_eq!(empty, 0);
            } else if empty == 0 {
                kept += 1;
            } else if fresh == 0 {
                lost += 1;
            } else {
                torn += 1;
            }
        }
    }
    assert!(
        lost > 300 && kept > 300 && torn > 150,
        "{lost} {kept} {torn}"
    );
}

#[test]
fn a_crash_follows_from_its_seed() {
    let device = numbered(30, 3);
    assert_eq!(contents(&device.crash(7)), contents(&device.crash(7)));
    assert_ne!(contents(&device.crash(7)), contents(&device.crash(8)));
    assert_eq!(contents(&device.crash_all()), contents(&device));
    assert_eq!(contents(&device.crash_none()), contents(&numbered(3, 3)));
}

#[test]
fn overlapping_writes_may_be_in_any_order() {
    let device = SimDevice::new(LEN, 1);
    for byte in 1..=3 {
        device.write_at(0, &filled(byte, 1)).unwrap();
    }
    let mut winners = [0; 4];
    for seed in 0..300 {
        winners[usize::from(contents(&device.crash(seed))[0])] += 1;
    }
    assert!(winners.iter().all(|count| *count > 20), "{winners:?}");
}

#[test]
fn a_discard_is_a_write_of_zeros() {
    let device = numbered(4, 4);
    device.discard(0, 2 * BLOCK).unwrap();
    assert_eq!(contents(&device)[0], 0);
    assert_eq!(contents(&device.crash_none())[0], 1);
    device.sync().unwrap();
    assert_eq!(contents(&device.crash_none())[0], 0);
    assert_eq!(contents(&device)[2 * BLOCK_SIZE], 3);
}

#[test]
fn forks_do_not_see_each_other() {
    let device = numbered(4, 2);
    let fork = device.fork(2);
    fork.write_at(0, &filled(9, 1)).unwrap();
    device.write_at(BLOCK, &filled(8, 1)).unwrap();
    assert_eq!(contents(&device)[0], 1);
    assert_eq!(contents(&fork)[BLOCK_SIZE], 2);
    assert_eq!(fork.pending_len(), 3);
}

#[test]
fn a_lying_sync_makes_nothing_durable() {
    let device = SimDevice::new(LEN, 1);
    device.ignore_sync(true);
    device.write_at(0, &filled(1, 1)).unwrap();
    device.sync().unwrap();
    assert_eq!(contents(&device.crash_none())[0], 0);
    device.ignore_sync(false);
    device.sync().unwrap();
    assert_eq!(contents(&device.crash_none())[0], 1);
}

#[test]
fn after_a_failed_sync_the_next_one_lies() {
    let mut lost = 0;
    for seed in 0..40 {
        let device = SimDevice::new(LEN, seed);
        device.fail(FaultOp::Sync, 1, Fault::Io, Repeat::Once);
        device.write_at(0, &filled(1, 1)).unwrap();
        assert!(device.sync().is_err());
        device.sync().unwrap();
        assert_eq!(contents(&device)[0], 1);
        lost += usize::from(contents(&device.crash_all())[0] == 0);
        let after = contents(&device.crash_none())[0];
        assert!(after <= 1);
        lost += usize::from(after == 0);
    }
    assert!(lost > 0);
}

#[test]
fn faults_hit_the_nth_operation() {
    let device = SimDevice::new(LEN, 1);
    device.fail(FaultOp::Write, 2, Fault::NoSpace, Repeat::Once);
    device.fail(FaultOp::Read, 3, Fault::Io, Repeat::Forever);
    let write = |byte| device.write_at(0, &filled(byte, 1));
    write(1).unwrap();
    assert_eq!(write(2).unwrap_err().kind(), io::ErrorKind::StorageFull);
    let mut block = filled(0, 1);
    device.read_at(0, &mut block).unwrap();
    assert_eq!(block[0], 1);
    write(3).unwrap();
    device.read_at(0, &mut block).unwrap();
    assert_eq!(block[0], 3);
    for _ in 0..3 {
        assert!(device.read_at(0, &mut block).is_err());
    }
    device.heal();
    device.read_at(0, &mut block).unwrap();
}

#[test]
fn silent_faults_say_yes() {
    let before = filled(1, 4);
    for (fault, seed) in [Fault::Lost, Fault::Torn, Fault::Misdirected, Fault::FlipBit]
        .into_iter()
        .flat_map(|fault| (0..8).map(move |seed| (fault, seed)))
    {
        let device = SimDevice::new(LEN, seed);
        device.write_at(0, &before).unwrap();
        device.fail(FaultOp::Write, 1, fault, Repeat::Once);
        device.write_at(0, &filled(2, 4)).unwrap();
        let bytes = contents(&device);
        let (old, new) = (
            bytes.iter().filter(|byte| **byte == 1).count(),
            bytes.iter().filter(|byte| **byte == 2).count(),
        );
        match fault {
            Fault::Lost => assert_eq!((old, new), (before.len(), 0)),
            Fault::FlipBit => assert_eq!((old, new), (0, before.len() - 1)),
            Fault::Torn => assert_eq!(old + new, before.len()),
            _ => assert_eq!(new, before.len()),
        }
    }
}

#[test]
fn a_flipped_bit_stays_flipped() {
    let device = numbered(2, 2);
    device.flip(5, 3);
    device.flip(LEN - 1, 0);
    for image in [contents(&device), contents(&device.crash_none())] {
        assert_eq!(image[5], 1 ^ 8);
        assert_eq!(image[LEN as usize - 1], 1);
    }
}

#[test]
fn a_replay_shows_every_moment() {
    let device = numbered(2, 1);
    device.record();
    device.write_at(0, &filled(7, 1)).unwrap();
    device.sync().unwrap();
    device.discard(BLOCK, BLOCK).unwrap();
    assert_eq!(device.recorded(), 3);
    let trace = device.take_trace();
    assert_eq!(device.recorded(), 0);
    let mut replay = trace.replay();
    assert_eq!(contents(&replay.crash_all())[0], 1);
    assert!(!replay.is_behind_write());
    assert!(replay.step() && replay.is_behind_write());
    assert_eq!(contents(&replay.crash_none())[0], 1);
    assert_eq!(contents(&replay.crash_all())[0], 7);
    assert!(replay.step() && !replay.is_behind_write());
    assert_eq!(contents(&replay.crash_none())[0], 7);
    assert_eq!(contents(&replay.crash_none())[BLOCK_SIZE], 2);
    assert!(replay.step());
    assert_eq!(contents(&replay.device(3)), contents(&device));
    assert!(!replay.step());
    assert_eq!(replay.position(), 3);
}

#[test]
fn a_delayed_write_is_passed_over_by_some_syncs() {
    let device = SimDevice::new(LEN, 3);
    device.fail(FaultOp::Write, 1, Fault::Delayed, Repeat::Once);
    device.write_at(0, &filled(1, 1)).unwrap();
    device.write_at(BLOCK, &filled(2, 1)).unwrap();
    device.sync().unwrap();
    let image = contents(&device.crash_none());
    assert_eq!((image[0], image[BLOCK_SIZE]), (0, 2), "reordered");
    assert_eq!(contents(&device)[0], 1);
    for _ in 0..10 {
        device.sync().unwrap();
    }
    assert_eq!(contents(&device.crash_none())[0], 1);
}

#[test]
fn a_delayed_write_undoes_no_newer_one() {
    let device = SimDevice::new(LEN, 3);
    device.fail(FaultOp::Write, 1, Fault::Delayed, Repeat::Once);
    device.write_at(0, &filled(1, 1)).unwrap();
    device.write_at(0, &filled(2, 1)).unwrap();
    for _ in 0..12 {
        device.sync().unwrap();
        assert_eq!(contents(&device.crash_none())[0], 2);
    }
}

#[test]
fn a_host_that_fills_up_takes_what_it_has_room_for() {
    let device = numbered(4, 4);
    device.limit_space(Some(6));
    device.write_at(0, &filled(9, 4)).unwrap(); // nothing new
    let error = device.write_at(3 * BLOCK, &filled(7, 4)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    let bytes = contents(&device);
    let first = |block: usize| bytes[block * BLOCK_SIZE];
    assert_eq!([first(3), first(4), first(5), first(6)], [7, 7, 7, 0]);
    device.discard(0, BLOCK).unwrap();
    device.write_at(8 * BLOCK, &filled(5, 1)).unwrap();
    assert!(device.write_at(0, &filled(5, 1)).is_err(), "given back");
    device.limit_space(None);
    device.write_at(0, &filled(5, 1)).unwrap();
}

#[test]
fn latency_is_counted_and_only_slept_on_request() {
    let device = numbered(2, 2);
    let hour = Duration::from_secs(3600);
    device.latency(FaultOp::Sync, hour, false);
    device.sync().unwrap();
    device.write_at(0, &filled(1, 1)).unwrap();
    assert_eq!(device.counts().waited, hour);
    device.latency(FaultOp::Write, Duration::from_millis(2), true);
    device.latency(FaultOp::Sync, Duration::ZERO, true);
    let begun = std::time::Instant::now();
    device.write_at(0, &filled(1, 1)).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(2));
}

#[test]
fn zeros_and_noise_replace_one_block() {
    for fault in [Fault::Zeros, Fault::Garbage] {
        let device = SimDevice::new(LEN, 4);
        device.fail(FaultOp::Write, 1, fault, Repeat::Once);
        device.write_at(0, &filled(1, 4)).unwrap();
        let sound = |bytes: &[u8]| {
            let blocks = bytes.chunks(BLOCK_SIZE).take(4);
            blocks.filter(|block| block.iter().all(|b| *b == 1)).count()
        };
        assert_eq!(sound(&contents(&device)), 3);
        device.write_at(0, &filled(1, 4)).unwrap();
        device.fail(FaultOp::Read, 1, fault, Repeat::Once);
        let mut read = filled(0, 4);
        device.read_at(0, &mut read).unwrap();
        assert_eq!(sound(&read), 3);
    }
}
