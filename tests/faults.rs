//! Devices that fail: an error is an error, wrong bytes are never handed out, nothing is
//! acknowledged that is not safe, and what was acknowledged before stays.
//!
//! Most tests make the n-th operation of the device go wrong, for each n.

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::campaign::{Rot, Tally, Wrong, bound, damage, describe, inject, kinds, measure};
use common::crash::{TINY, Verdict, assert_none, for_each_seed, identify, seeds};
use common::damage::{look, used_blocks};
use common::faulty::{Base, Source, furnished, run_faulty};
use common::history::{Runner, open};
use common::pairs::{operations, prepare};
use common::script::Planned;
use common::world::run_faults;

use nodupe::device::{Fault, FaultOp, Repeat, SimDevice, SplitMix64};
use nodupe::engine::Pool;
use nodupe::error::Kind;

/// All faults of the kinds that `wanted` selects, at each n of one history.
fn each_nth(
    base: &Base,
    seed: u64,
    source: Source,
    tally: &Tally,
    wanted: impl Fn(Wrong) -> bool,
) -> Verdict {
    let measured = measure(base, seed, source)?;
    let cases: Vec<(String, Wrong, u64)> = kinds()
        .into_iter()
        .filter(|(_, wrong)| wanted(*wrong))
        .flat_map(|(name, wrong)| {
            (1..=bound(wrong, &measured)).map(move |nth| (name.clone(), wrong, nth))
        })
        .collect();
    let all: Vec<u64> = (0..cases.len() as u64).collect();
    let failures = for_each_seed(&all, |index| {
        let (name, wrong, nth) = &cases[index as usize];
        let outcome = inject(base, seed, source, *wrong, *nth);
        tally.add(
            name,
            outcome.map_err(|error| format!("{name}, n={nth}: {error}"))?,
        );
        Ok(())
    });
    match failures.into_iter().next() {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

/// As [`each_nth`] for random histories of a few seeds.
fn each_nth_of_random(test: &str, count: u64, wanted: impl Fn(Wrong) -> bool) -> Tally {
    let tally = Tally::default();
    let mut failures = Vec::new();
    for seed in seeds(count) {
        let base = furnished(seed, 60);
        let result = base.and_then(|base| each_nth(&base, seed, Source::Random, &tally, &wanted));
        failures.extend(result.err().map(|error| (seed, error)));
    }
    eprint!("{test}:\n{}", tally.table());
    assert_none(test, &failures);
    tally
}

fn is_error(fault: Fault) -> bool {
    matches!(fault, Fault::Io | Fault::NoSpace)
}

#[test]
fn a_failed_write_poisons_the_pool() {
    each_nth_of_random(
        "a_failed_write_poisons",
        2,
        |wrong| matches!(wrong, Wrong::Op(FaultOp::Write, fault, _) if is_error(fault)),
    );
}

#[test]
fn a_failed_sync_poisons_the_pool() {
    each_nth_of_random(
        "a_failed_sync_poisons",
        2,
        |wrong| matches!(wrong, Wrong::Op(FaultOp::Sync, fault, _) if is_error(fault)),
    );
}

#[test]
fn a_failed_discard_harms_nothing() {
    each_nth_of_random("a_failed_discard", 2, |wrong| {
        matches!(wrong, Wrong::Op(FaultOp::Discard, ..))
    });
}

#[test]
fn a_failed_read_fails_one_operation() {
    each_nth_of_random("a_failed_read", 2, |wrong| {
        matches!(wrong, Wrong::Op(FaultOp::Read, ..))
    });
}

#[test]
fn writes_and_syncs_that_lie_are_noticed_or_harmless() {
    let tally = each_nth_of_random(
        "writes_and_syncs_that_lie",
        3,
        |wrong| matches!(wrong, Wrong::Op(FaultOp::Write | FaultOp::Sync, fault, _) if !is_error(fault)),
    );
    assert!(tally.total()[1] > 0, "no lie was ever noticed");
}

#[test]
fn a_host_that_fills_up_takes_nothing_acknowledged_away() {
    each_nth_of_random("a_host_that_fills_up", 2, |wrong| wrong == Wrong::HostFull);
}

#[test]
fn every_error_at_every_place_of_every_operation() {
    // Short histories on a pool with three files: each operation, and a sync behind it.
    let tally = Tally::default();
    let choice = operations(&mut SplitMix64::new(0));
    let mut failures = Vec::new();
    for index in 0..choice.len() {
        let seed = index as u64;
        let mut rng = SplitMix64::new(seed);
        let mut ops = prepare(&mut rng);
        ops.push(operations(&mut rng)[index].clone());
        let ops: Vec<Planned> = ops.into_iter().map(|op| Planned { op, next: 0 }).collect();
        let result = furnished(0, 0).and_then(|base| {
            each_nth(
                &base,
                seed,
                Source::List(&ops),
                &tally,
                |wrong| match wrong {
                    Wrong::Op(FaultOp::Discard, ..) | Wrong::Rot(..) => false,
                    Wrong::Op(_, fault, _) => is_error(fault),
                    Wrong::HostFull => true,
                },
            )
        });
        failures.extend(result.err().map(|error| (seed, error)));
    }
    eprint!("every operation:\n{}", tally.table());
    assert_none("every_error_at_every_place", &failures);
}

#[test]
fn random_faults_of_all_kinds_are_detected_or_harmless() {
    let tally = Tally::default();
    let failures = for_each_seed(&seeds(80), |seed| run_faults(seed, 20, &tally));
    eprint!("random faults:\n{}", tally.table());
    assert_none("random_faults_of_all_kinds", &failures);
}

#[test]
fn an_open_that_cannot_read_can_be_repeated() {
    let mut runs = 0;
    for seed in seeds(2) {
        let (device, model) = furnished(seed, 60).expect("a pool on a sound device");
        for nth in 1.. {
            let device = Arc::new(device.fork(seed));
            device.fail(FaultOp::Read, nth, Fault::Io, Repeat::Once);
            let opened = open(&device, TINY.cache_size);
            runs += 1;
            let Err(error) = opened else {
                // A copy helped out, or all reads of an open have had their turn.
                if device.counts().reads < nth {
                    break;
                }
                continue;
            };
            assert_eq!(error.kind(), Kind::Io, "SEED={seed} n={nth}: {error}");
            let pool = open(&device, TINY.cache_size).expect("the device is sound again");
            let again = Runner::adopt(pool, &model).and_then(|runner| runner.compare());
            again.unwrap_or_else(|error| panic!("SEED={seed} n={nth}: {error}"));
        }
    }
    eprintln!("opens with a read error: {runs}");
}

#[test]
fn a_recovery_that_cannot_write_can_be_repeated() {
    // Opening after a crash: the n-th write or sync fails, for each n; the next open finds the same.
    let runs = AtomicU64::new(0);
    let failures = for_each_seed(&seeds(4), |seed| {
        let base = furnished(seed, 40)?;
        let faulty = run_faulty(&base, seed, Source::Random, |_| {}, |_, _| false)?;
        let image = faulty.device.crash(seed);
        let newest = faulty.history.steps.len() - 1;
        let found = |device: &SimDevice, allowed| {
            let device = Arc::new(device.fork(seed));
            let pool = open(&device, TINY.cache_size).map_err(|error| format!("open: {error}"))?;
            identify(&faulty.history, &pool, allowed)
        };
        let first = found(&image, faulty.acked..=newest)?;
        for (op, fault) in [
            (FaultOp::Write, Fault::Io),
            (FaultOp::Write, Fault::NoSpace),
            (FaultOp::Sync, Fault::Io),
        ] {
            for (nth, repeat) in (1..).flat_map(|n| [(n, Repeat::Once), (n, Repeat::Forever)]) {
                let device = Arc::new(image.fork(seed ^ nth));
                device.fail(op, nth, fault, repeat);
                let opened = open(&device, TINY.cache_size);
                if device.counts().faults == 0 {
                    break;
                }
                runs.fetch_add(1, Ordering::Relaxed);
                drop(opened);
                for image in [device.crash_all(), device.crash_none(), device.crash(nth)] {
                    found(&image, first..=first)
                        .map_err(|error| format!("{op:?} {fault:?} n={nth}: {error}"))?;
                }
            }
        }
        Ok(())
    });
    eprintln!("recoveries with an error: {}", runs.load(Ordering::Relaxed));
    assert_none("a_recovery_that_cannot_write", &failures);
}

#[test]
fn a_flipped_bit_gives_an_error_or_nothing() {
    // Half of the flips hit nodes and superblocks, half data.
    let base = furnished(seeds(1)[0], 150).expect("a pool on a sound device");
    let sorts = used_blocks(&base.0)
        .into_iter()
        .map(|at| (describe(&base.0, at), at));
    let (data, other): (Vec<_>, Vec<_>) = sorts.partition(|(what, _)| what.starts_with("data"));
    let metadata: Vec<_> = other
        .into_iter()
        .filter(|(what, _)| !what.starts_with("journal"))
        .collect();
    // Tried, noticed by a reader, pool refused, found by `check`.
    let counts = [const { [const { AtomicU64::new(0) }; 4] }; 2];
    let failures = for_each_seed(&seeds(2400), |seed| {
        let mut rng = SplitMix64::new(seed);
        let is_data = rng.chance(50);
        let blocks = if is_data { &data } else { &metadata };
        let (what, at) = &blocks[rng.index(blocks.len())];
        let device = Arc::new(base.0.fork(seed));
        device.flip(at + rng.below(4096), rng.below(8) as u32);
        let checked = Pool::check(&*device, None, &mut |_, _| {});
        let seen = look(&device, TINY.cache_size, &base.1)
            .map_err(|error| format!("flipped in {what}: {error}"))?;
        let is_clean = checked.is_ok_and(|findings| findings.is_empty());
        let happened = [true, seen.errors > 0, seen.refused, !is_clean];
        for (count, happened) in counts[usize::from(is_data)].iter().zip(happened) {
            count.fetch_add(u64::from(happened), Ordering::Relaxed);
        }
        if is_clean && (seen.refused || seen.errors > 0) {
            return Err(format!(
                "flipped in {what}: check finds nothing, but {seen:?}"
            ));
        }
        Ok(())
    });
    for (name, counts) in ["metadata", "data"].iter().zip(&counts) {
        let [tried, errors, refused, found] =
            [0, 1, 2, 3].map(|index| counts[index].load(Ordering::Relaxed));
        eprintln!(
            "flipped bits in {name}: {tried} tried, {errors} gave errors, {refused} pools did not \
             open, {found} found by check; 0 wrong bytes"
        );
        assert!(errors > 0, "no flip reached anything that is read");
    }
    assert_none("a_flipped_bit", &failures);
}

#[test]
fn rotten_blocks_of_every_sort_are_errors_or_harmless() {
    // By what the block was: damage that was tried, and that was noticed.
    let places: Mutex<BTreeMap<String, [u64; 2]>> = Mutex::default();
    let base = furnished(seeds(1)[0], 150).expect("a pool on a sound device");
    let all: Vec<u64> = seeds(1500);
    let failures = for_each_seed(&all, |seed| {
        let mut rng = SplitMix64::new(seed);
        let rot = [Rot::FlipBit, Rot::Zeros, Rot::Garbage, Rot::Copy][rng.index(4)];
        let device = Arc::new(base.0.fork(seed));
        let place = damage(&device, rot, &mut rng);
        let seen = look(&device, TINY.cache_size, &base.1)
            .map_err(|error| format!("{rot:?} of {place}: {error}"))?;
        let sort = place.split(" block").next().unwrap_or_default().to_owned();
        let mut places = places.lock().expect("nobody panics while counting");
        let counts = places.entry(sort).or_default();
        counts[0] += 1;
        counts[1] += u64::from(seen.refused || seen.errors > 0);
        Ok(())
    });
    eprintln!("rotten blocks, tried and noticed by a reader: {places:?}");
    assert_none("rotten_blocks_of_every_sort", &failures);
}

#[test]
fn damage_before_recovery_is_noticed_unless_it_is_the_end_of_the_journal() {
    let tally = Tally::default();
    let bases: Vec<(u64, Base)> = seeds(4)
        .into_iter()
        .map(|seed| (seed, furnished(seed, 40).expect("a pool on a sound device")))
        .collect();
    let failures = for_each_seed(&seeds(1200), |nth| {
        let (seed, base) = &bases[nth as usize % bases.len()];
        let rot = [Rot::FlipBit, Rot::Zeros, Rot::Garbage, Rot::Copy][nth as usize / 4 % 4];
        let wrong = Wrong::Rot(rot, false);
        let outcome = inject(base, *seed, Source::Random, wrong, nth);
        tally.add(
            &format!("{rot:?}"),
            outcome.map_err(|e| format!("base {seed}: {e}"))?,
        );
        Ok(())
    });
    eprint!("damage before recovery:\n{}", tally.table());
    assert_none("damage_before_recovery", &failures);
}
