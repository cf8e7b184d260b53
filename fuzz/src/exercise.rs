//! Everything that can be asked of a pool, within reason: a hostile tree may show far more than
//! there is.

use std::collections::BTreeSet;
use std::sync::Arc;

use nodupe::device::{BlockDevice, SimDevice, SplitMix64};
use nodupe::engine::{FileKind, Finding, NewNode, Pool, RenameMode, SetAttr, XattrMode};
use nodupe::units::{Ino, Time};

use super::fence::Fence;
use super::forge::{B, superblock_or_copy};
use super::template::options;

/// Things that a walk looks at.
const LOOKS_MAX: usize = 24;

/// A name: its directory, what it names, the name, of which kind.
pub type Name = (Ino, Ino, Vec<u8>, FileKind);

/// What a check finds; nothing if there is no pool at all.
pub fn check(device: &SimDevice) -> Option<Vec<Finding>> {
    Pool::check(device, None, &mut |_, _| {}).ok()
}

/// Looks at what the pool shows. What it lists is a tree of sound names.
pub fn walk(pool: &Pool) -> Vec<Name> {
    let (mut todo, mut seen) = (vec![Ino::ROOT], BTreeSet::new());
    let mut found = Vec::new();
    while let Some(ino) = todo.pop() {
        if !seen.insert(ino) || seen.len() > LOOKS_MAX {
            continue;
        }
        look(pool, ino);
        let mut cookie = 0;
        for _ in 0..20 {
            let Ok(entries) = pool.read_dir(ino, cookie, 16) else {
                break;
            };
            let Some(last) = entries.last() else {
                break;
            };
            assert!(last.cookie > cookie, "the listing of {ino} goes in circles");
            cookie = last.cookie;
            for entry in entries {
                assert_name(&entry.name);
                drop(pool.lookup(ino, &entry.name));
                todo.push(entry.ino);
                found.push((ino, entry.ino, entry.name, entry.kind));
            }
        }
    }
    found
}

/// The kernel, and whoever joins it to a path, must be able to rely on a name.
fn assert_name(name: &[u8]) {
    let sound = (1..=255).contains(&name.len())
        && !name.contains(&b'/')
        && !name.contains(&0)
        && name != b"."
        && name != b"..";
    assert!(sound, "a name is listed that cannot be one: {name:?}");
}

fn look(pool: &Pool, ino: Ino) {
    let attr = pool.attr(ino);
    drop((pool.origin(ino), pool.file_usage(ino)));
    if let Ok(target) = pool.read_link(ino) {
        assert!(target.len() <= 4095, "a target of {} bytes", target.len());
    }
    for name in pool.list_xattrs(ino).unwrap_or_default() {
        if let Ok(value) = pool.xattr(ino, &name) {
            assert!(value.len() <= 64 * 1024, "a value of {} bytes", value.len());
        }
    }
    let size = attr.map_or(1 << 20, |attr| attr.size);
    assert!(size <= 1 << 55, "a file of {size} bytes");
    for offset in [0, 4096, size / 2, size.saturating_sub(5000), size] {
        let mut bytes = Vec::new();
        drop(pool.read(ino, offset, 100_000, &mut bytes));
        assert!(bytes.len() <= 100_000);
        drop(pool.seek_data(ino, offset));
    }
    drop((pool.seek_hole(ino, 0), pool.seek_hole(ino, size / 2)));
}

/// Changes and removes things.
pub fn disturb(pool: &Pool, found: &[Name], rng: &mut SplitMix64) {
    let now = Time::default();
    let node = NewNode::regular(0o600);
    let new = pool.create_node(Ino::ROOT, b"hostile new", &node, now);
    let new = new.map_or(Ino(2), |attr| attr.ino);
    let data: Vec<u8> = (0..200_000_u32).map(|i| (i % 251) as u8 + 1).collect();
    for name in found {
        change(pool, name, new, &data, rng);
        if rng.chance(10) {
            drop(pool.sync());
        }
        if rng.chance(5) {
            drop(pool.checkpoint());
        }
        if rng.chance(30) {
            remove(pool, name);
        }
    }
    drop((pool.sync(), pool.checkpoint()));
}

fn change(pool: &Pool, name: &Name, new: Ino, data: &[u8], rng: &mut SplitMix64) {
    let now = Time::default();
    let (dir, ino, name, _) = name;
    let offset = rng.below(300_000);
    match rng.below(14) {
        0 => drop(pool.write(*ino, offset, &data[..5000], now)),
        1 => drop(pool.write(*ino, offset / B * B, data, now)),
        2 => drop(pool.truncate(*ino, offset, now)),
        3 => drop(pool.punch(*ino, offset, 70_000, now)),
        4 => drop(pool.clone_file(*ino, new, now)),
        5 => drop(pool.clone_range(*ino, 0, new, offset / B * B, 100_000, now)),
        6 => drop(pool.rename(*dir, name, Ino::ROOT, b"moved", RenameMode::Replace, now)),
        7 => drop(pool.set_xattr(*ino, b"user.a", &data[..3000], XattrMode::Set, now)),
        8 => drop(pool.clone_tree(*ino, Ino::ROOT, std::slice::from_ref(name), None, now)),
        9 => drop(pool.link(*ino, Ino::ROOT, b"linked", now)),
        10 => drop(pool.begin_clone(*ino, new, 4096, now)),
        11 => drop(pool.extend_clone(new, offset, now)),
        12 => drop(pool.rename(*dir, name, *dir, b"link", RenameMode::Exchange, now)),
        _ => {
            let set = SetAttr {
                mode: Some(0o777),
                ..SetAttr::default()
            };
            drop(pool.set_attr(*ino, &set));
        }
    }
}

fn remove(pool: &Pool, name: &Name) {
    let now = Time::default();
    let (dir, ino, name, kind) = name;
    let gone = match kind {
        FileKind::Directory => pool.rmdir(*dir, name, now),
        _ => pool.unlink(*dir, name, now),
    };
    if gone.is_ok() {
        drop(pool.reclaim(*ino));
    }
}

/// Does everything to a pool, behind a fence.
pub fn exercise(device: &SimDevice, seed: u64) {
    let mut rng = SplitMix64::new(seed ^ 0xe8e);
    drop(check(device));
    let inner = Arc::new(device.fork(seed));
    let Some(sb) = superblock_or_copy(device) else {
        let opened = Pool::open(inner, None, &options(true));
        assert!(opened.is_err(), "a pool without a superblock was opened");
        return;
    };
    let first: Arc<dyn BlockDevice> = Arc::new(Fence::new(inner.clone(), &sb));
    if let Ok(pool) = Pool::open(first.clone(), None, &options(true)) {
        walk(&pool);
        assert!(pool.usage().total > 0);
    }
    if let Ok(pool) = Pool::open(first.clone(), None, &options(false)) {
        let found = walk(&pool);
        disturb(&pool, &found, &mut rng);
        assert!(pool.usage().total > 0);
        walk(&pool);
        drop(pool.close());
    }
    drop(check(&inner));
    if let Ok(pool) = Pool::open(first, None, &options(false)) {
        // Everything goes: deleting walks what nothing else did.
        for name in walk(&pool).into_iter().rev() {
            remove(&pool, &name);
            drop(pool.reclaim(name.1));
        }
        drop(pool.close());
    }
}
