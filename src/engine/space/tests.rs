//! The space map gives what is free, and only that.

use super::*;

const ALL: (u64, u64) = (0, GROUP_BLOCKS);

fn run(block: u64, len: u32) -> Extent {
    Extent { block, len }
}

#[test]
fn runs_are_found_across_words() {
    let mut bitmap = [0; WORDS];
    set_bits(&mut bitmap, 60, 200, true);
    set_bits(&mut bitmap, 300, 310, true);
    assert_eq!(find_run(&bitmap, ALL, 256, 1), Some((60, 140)));
    assert_eq!(find_run(&bitmap, ALL, 100, 100), Some((60, 100)));
    assert_eq!(find_run(&bitmap, ALL, 256, 141), None);
    assert_eq!(find_run(&bitmap, (201, 500), 4, 1), Some((300, 4)));
    assert_eq!(find_run(&bitmap, (201, 302), 4, 1), Some((300, 2)));
    assert_eq!(find_run(&bitmap, (201, 300), 4, 1), None);
    assert_eq!(find_run(&bitmap, (61, 63), 4, 2), Some((61, 2)));
}

#[test]
fn only_pieces_that_are_wholly_free_are_discarded() {
    let mut space = Space::new(16, 1000, 0);
    space.load_group(0, &[]).unwrap();
    let Found::Run(all) = space.find(Class::Data, 984, 1).unwrap() else {
        panic!()
    };
    assert_eq!(all.len, 984);
    let free = |space: &mut Space, start, end| {
        space.free_later(start, end, false).unwrap();
        space.release(|_| 0);
        let mut taken = Vec::new();
        while let Some((_, start, end)) = space.next_discard(1 << 20) {
            taken.extend(space.take_pieces(start, end));
        }
        taken
            .iter()
            .for_each(|(start, end)| space.put_back(*start, *end));
        taken
    };
    // Two pieces whole, two in part; the rest of these comes later.
    assert_eq!(free(&mut space, 40, 90), [(48, 64), (64, 80)]);
    assert_eq!(free(&mut space, 32, 40), [(32, 48)]);
    assert_eq!(free(&mut space, 90, 96), [(80, 96)]);
    // The last piece reaches over the end of the space.
    assert_eq!(free(&mut space, 976, 1000), [(976, 992)]);
    assert_eq!(space.counters.free(), 64 + 24);
}

#[test]
fn runs_that_wait_for_discard_are_joined() {
    let mut space = Space::new(16, 1000, 0);
    for (start, end) in [(100, 110), (120, 130), (110, 120), (90, 125), (300, 310)] {
        space.wait_for_discard(start, end);
    }
    assert_eq!(space.next_discard(64), Some((0, 80, 144)));
    assert_eq!(space.next_discard(8), None);
    assert_eq!(space.next_discard(16), Some((0, 288, 304)));
    assert_eq!(space.next_discard(16), Some((0, 304, 320)));
    assert_eq!(space.next_discard(16), None);
}

#[test]
fn freed_blocks_come_back_only_after_release() {
    let mut space = Space::new(16, 1000, 0);
    space.load_group(0, &[]).unwrap();
    let Found::Run(all) = space.find(Class::Data, 984, 1).unwrap() else {
        panic!()
    };
    assert_eq!(all, run(16, 984));
    assert!(space.find(Class::Data, 1, 1).is_err());
    space.free_later(100, 110, false).unwrap();
    assert!(space.find(Class::Data, 1, 1).is_err());
    assert_eq!(space.free_after(), 10);
    space.release(|_| 0);
    assert_eq!(
        space.find(Class::Node, 4, 1).unwrap(),
        Found::Run(run(100, 4))
    );
}

#[test]
fn data_leaves_the_home_to_nodes_until_nothing_else_is_left() {
    let mut space = Space::new(20, 1000, 100);
    assert_eq!(space.home(), (20, 128));
    space.load_group(0, &[]).unwrap();
    let mut take = |class, want| match space.find(class, want, 1) {
        Ok(Found::Run(run)) => Some((run.block, run.len)),
        Ok(Found::NeedsGroup(group)) => panic!("group {group} is loaded"),
        Err(_) => None,
    };
    assert_eq!(take(Class::Data, 500), Some((128, 500)));
    assert_eq!(take(Class::Node, 8), Some((20, 8)));
    assert_eq!(take(Class::Data, 500), Some((628, 372)));
    assert_eq!(take(Class::Rescue, 73), Some((28, 73)));
    assert_eq!(take(Class::Rescue, 1), None);
    assert_eq!(take(Class::Node, 4), Some((101, 4)));
    assert_eq!(take(Class::Data, 500), Some((105, 23)));
    assert_eq!(take(Class::Node, 1), None);
}

#[test]
fn growth_counts_when_its_checkpoint_is_durable() {
    for loaded in [false, true] {
        for new_end in [1001, 2000, GROUP_BLOCKS, GROUP_BLOCKS + 1, 5 * GROUP_BLOCKS] {
            let mut space = Space::new(16, 1000, 0);
            if loaded {
                space.load_group(0, &[]).unwrap();
                space.find(Class::Data, 984, 1).unwrap();
            }
            let used = if loaded { 984 } else { 0 };
            space.begin_growth(3000);
            space.begin_growth(new_end); // thought better of it
            assert_eq!(space.counters.free(), 984 - used);
            assert_eq!(space.free_after(), new_end - 16 - used);
            assert_eq!((space.total(), space.end_after()), (984, new_end));
            let first = (new_end.min(GROUP_BLOCKS) - 16 - used) as u32;
            assert_eq!(space.next_changed(), Some((0, first)));
            if loaded {
                assert!(space.find(Class::Data, 1, 1).is_err());
                space.free_later(16, 1000, true).unwrap();
            }
            space.release(|_| 0);
            assert_eq!(space.counters.free(), new_end - 16);
            assert_eq!(space.total(), new_end - 16);
            if loaded {
                // Behind what was there, or wherever the next group is.
                let found = space.find(Class::Data, 1, 2).unwrap();
                assert!(matches!(found, Found::Run(_) | Found::NeedsGroup(1)));
            } else {
                space.load_group(0, &[]).unwrap();
            }
        }
    }
}
