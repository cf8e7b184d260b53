//! Pools that an attacker thought out, each with right checksums: `check` tells what is wrong, a
//! pool that cannot be opened is refused, and whatever is asked of one that can gives an answer
//! or an error. Nothing of it makes the engine write where superblocks and journal are (the
//! device panics then), take a file for another one, or run without end.

#[allow(dead_code)]
#[path = "../../fuzz/src/lib.rs"]
mod fuzz;
mod small;

use std::sync::Arc;

use small::{NOW, Small, force_crc, furnish, kind_of, node};

use fuzz::exercise::{check, exercise};
use fuzz::fence::Fence;
use fuzz::forge::{B, Forge, nodes, page, put, superblock, u32_at};
use fuzz::records::Ring;
use fuzz::template::options;

use nodupe::device::{BlockDevice, SimDevice};
use nodupe::engine::{CreateOptions, FileKind, Pool};
use nodupe::error::{Kind, Result};
use nodupe::ondisk::extent::{
    Extent, NodeRef, REFS_LEN, decode_extent, decode_refs, encode_extent, encode_group, encode_refs,
};
use nodupe::ondisk::inode::{
    FILE_SIZE_MAX, INODE_FLAGS, INODE_KIND, INODE_NLINK, INODE_PARENT, INODE_ROOT, INODE_SIZE,
    KeyType, NUMBER_MAX, REST_MAX, key, split_key,
};
use nodupe::ondisk::journal::{BATCH_BLOCK, BatchHeader};
use nodupe::ondisk::node::{NODE_CRC, NODE_LEVEL, NODE_RECORDS, Node, TreeKind};
use nodupe::ondisk::record::Record;
use nodupe::ondisk::superblock::{
    SB_BLOCKS, SB_FREE, SB_GENERATION, SB_INODES, SB_JOURNAL_SEQ, SB_LOGICAL, SB_NEXT_DETACHED,
    SB_NEXT_INO, SB_REFS,
};
use nodupe::units::Ino;

#[test]
fn the_pool_to_begin_with_is_sound() {
    let small = Small::new();
    assert_eq!(small.findings(), Vec::<u32>::new());
    let pool = small.open().expect("it opens");
    let mut bytes = Vec::new();
    let read = pool.read(small.file, 0, 65536, &mut bytes);
    read.expect("it reads");
    assert!(bytes == [5; 65536]);
}

/// A node of two levels whose only child is itself, with a checksum that says so.
#[test]
fn a_node_that_is_its_own_child_is_noticed() {
    for kind in [TreeKind::Namespace, TreeKind::Refs, TreeKind::Extents] {
        let small = Small::new();
        let leaf = small.node(kind);
        let (block, crc) = (leaf.addr(), 0x5eed_f00d_u32);
        let mut own = Node::new(kind, 1, block, leaf.generation(), 0);
        let child = [
            block.to_le_bytes().to_vec(),
            crc.to_le_bytes().to_vec(),
            vec![0; 4],
        ];
        own.insert(0, leaf.key(0), &child.concat());
        let mut bytes = *own.page();
        bytes[32..40].copy_from_slice(&leaf.page()[32..40]);
        // The unused bytes behind the records make the checksum come true.
        bytes[NODE_CRC..NODE_CRC + 4].fill(0);
        force_crc(&mut bytes, 4000, crc);
        small.forge.put_node(block, &mut bytes);
        let stored = page(small.device(), block);
        assert_eq!(
            u32_at(&stored, NODE_CRC),
            crc,
            "the checksum was not forged"
        );
        assert_eq!(stored[NODE_LEVEL], 1);
        // The owner of the tree still says level 0; it has to be told.
        match kind {
            TreeKind::Extents => small.set_inode(small.file, INODE_ROOT + 12, &[1]),
            _ => {
                let at = if kind == TreeKind::Refs {
                    SB_REFS
                } else {
                    SB_REFS - 16
                };
                let (slot, _) = superblock(small.device());
                let mut sb = page(small.device(), slot);
                sb[at + 12] = 1;
                small.forge.put_superblock(slot, &mut sb);
            }
        }
        small.is_harmless();
    }
}

#[test]
fn huge_counts_are_harmless() {
    let cases: [fn(&Small); 9] = [
        |small| small.set_superblock(SB_INODES, NUMBER_MAX),
        |small| small.set_superblock(SB_INODES, 0),
        |small| small.set_superblock(SB_LOGICAL, u64::MAX),
        |small| small.set_superblock(SB_FREE, u64::MAX),
        |small| small.set_inode(small.file, INODE_NLINK, &[255; 4]),
        |small| small.set_inode(small.dir, INODE_NLINK, &[255; 4]),
        |small| small.put(TreeKind::Groups, 0, &encode_group(32768)),
        |small| small.put(TreeKind::Groups, 0, &encode_group(0)),
        |small| {
            let first = small.node(TreeKind::Refs).key(0);
            small.put(TreeKind::Refs, first, &encode_refs(u32::MAX, u32::MAX));
        },
    ];
    for (i, case) in cases.iter().enumerate() {
        let small = Small::new();
        case(&small);
        // How many bytes all files have together is told, and relied on by nobody.
        if i == 2 {
            small.is_survived();
        } else {
            small.is_harmless();
        }
    }
}

/// Data where there is none to be: the file shows nothing of it, and writing does not change it.
#[test]
fn extents_reach_nothing_but_data() {
    let blocks = (8 << 20) / B;
    let places = [
        (1, 1),
        (5, 1),
        (16, 16),
        (200, 16),
        (271, 2),
        (blocks - 2, 1),
        (blocks - 1, 1),
        (blocks - 3, 3),
        (blocks, 16),
        (blocks + 1000, 16),
        ((1 << 48) - 1, 1),
        (300, 1 << 30),
    ];
    for (block, len) in places {
        let small = Small::new();
        small.put(TreeKind::Extents, 0, &encode_extent(Extent { block, len }));
        let pool = small.open();
        if let Ok(pool) = pool {
            let mut bytes = Vec::new();
            let read = pool.read(small.file, 0, 65536, &mut bytes);
            assert_eq!(kind_of(read), Some(Kind::Corrupt), "block {block}");
        }
        small.is_harmless();
    }
}

/// Blocks of a file that the pool says are free: what is there is not believed by a checksum once
/// it was given away, and the pool's own blocks are out of reach.
#[test]
fn blocks_that_are_said_to_be_free_do_no_harm() {
    let small = Small::new();
    let value = small.value(TreeKind::Extents, 0);
    let run = decode_extent(&value).expect("an extent");
    let refs = small.node(TreeKind::Refs);
    let i = (0..refs.count())
        .find(|i| {
            let (len, _) = decode_refs(refs.value(*i)).expect("a record");
            let start = refs.key(*i) as u64;
            start <= run.block && run.end() <= start + u64::from(len)
        })
        .expect("the data is counted");
    small.edit(TreeKind::Refs, |node| {
        let (len, _) = decode_refs(node.value(i)).expect("a record");
        let start = node.key(i) as u64;
        node.remove(i);
        if start < run.block {
            let head = encode_refs((run.block - start) as u32, 1);
            node.insert(i, u128::from(start), &head);
        }
        if run.end() < start + u64::from(len) {
            let tail = encode_refs((start + u64::from(len) - run.end()) as u32, 1);
            let at = node.find(u128::from(run.end())).expect_err("it is inside");
            node.insert(at, u128::from(run.end()), &tail);
        }
    });
    let free = u32_at(&small.value(TreeKind::Groups, 0), 0) + run.len;
    small.put(TreeKind::Groups, 0, &encode_group(free));
    let pool = small.open().expect("nothing is wrong at first sight");
    let new = pool.create_node(Ino::ROOT, b"new", &node(FileKind::Regular, b""), NOW);
    let new = new.expect("a new file").ino;
    for block in 0..1000 {
        if pool.write(new, block * B, &[6; 4096], NOW).is_err() {
            break;
        }
    }
    drop(pool.checkpoint());
    let mut bytes = Vec::new();
    match pool.read(small.file, 0, 65536, &mut bytes) {
        // Given away, rewritten and checked anew: the attacker reads what he could write himself.
        Ok(()) => assert!(bytes.iter().all(|byte| *byte == 5 || *byte == 6)),
        Err(error) => assert_eq!(error.kind(), Kind::Corrupt),
    }
    small.is_harmless();
}

#[test]
fn references_that_lie_are_found() {
    // The wrong way to count: everything, nothing but one block, what nobody may have.
    for (block, len, count) in [
        (0, 8, 1),
        (16, 200, 1),
        (5, 600, 1),
        (2046, 10, 1),
        (300, 9, 7),
    ] {
        let small = Small::new();
        small.put(TreeKind::Refs, block, &encode_refs(len, count));
        small.is_harmless();
    }
    for count in [0, u32::MAX] {
        let small = Small::new();
        let first = small.node(TreeKind::Refs).key(0);
        let mut value = small.value(TreeKind::Refs, first);
        value[4..REFS_LEN].copy_from_slice(&count.to_le_bytes());
        small.put(TreeKind::Refs, first, &value);
        small.is_harmless();
    }
}

fn entry(ino: Ino, kind: u8, name: &[u8]) -> Vec<u8> {
    let mut bytes = ino.0.to_le_bytes().to_vec();
    bytes.extend_from_slice(&[kind, name.len() as u8]);
    bytes.extend_from_slice(name);
    bytes
}

#[test]
fn names_that_cannot_be_are_never_listed() {
    for name in [
        &b""[..],
        b".",
        b"..",
        b"a/b",
        b"/",
        b"a\0b",
        b"../../etc/passwd",
    ] {
        let small = Small::new();
        let bucket = small.bucket_of(Ino::ROOT, small.file);
        small.put(TreeKind::Namespace, bucket, &entry(small.file, 1, name));
        let pool = small.open().expect("it opens");
        assert_eq!(
            kind_of(pool.read_dir(Ino::ROOT, 0, 100)),
            Some(Kind::Corrupt)
        );
        small.is_harmless();
    }
    // A length that says more than is there.
    let small = Small::new();
    let bucket = small.bucket_of(Ino::ROOT, small.file);
    let mut long = entry(small.file, 1, b"file");
    long[9] = 255;
    small.put(TreeKind::Namespace, bucket, &long);
    small.is_harmless();
}

#[test]
fn entries_of_wrong_kinds_are_harmless() {
    type Case = fn(&Small) -> (Ino, Vec<u8>);
    let cases: [Case; 7] = [
        |small| (small.file, entry(small.file, 2, b"file")), // a file, said to be a directory
        |small| (small.dir, entry(small.dir, 1, b"dir")),
        |small| (small.link, entry(small.link, 1, b"link")),
        |small| (small.file, entry(Ino(999), 1, b"file")), // an inode that is not there
        |small| (small.file, entry(Ino(0), 1, b"file")),
        |small| (small.file, entry(Ino(u64::MAX), 2, b"file")),
        |small| (small.file, entry(Ino::ROOT, 2, b"file")), // the root within itself
    ];
    for case in cases {
        let small = Small::new();
        let (ino, value) = case(&small);
        let bucket = small.bucket_of(Ino::ROOT, ino);
        small.put(TreeKind::Namespace, bucket, &value);
        small.is_harmless();
    }
}

#[test]
fn inodes_of_wrong_kinds_are_harmless() {
    for kind in 0..=9 {
        let small = Small::new();
        if kind != 2 {
            small.set_inode(Ino::ROOT, INODE_KIND, &[kind]);
            small.is_harmless();
        }
        let small = Small::new();
        if kind != 1 {
            small.set_inode(small.file, INODE_KIND, &[kind]);
            small.is_harmless();
        }
        let small = Small::new();
        if kind != 3 {
            small.set_inode(small.link, INODE_KIND, &[kind]);
            small.is_harmless();
        }
    }
    for ino in [Ino::ROOT, Ino(3)] {
        // A directory with a size and with the extents of a file.
        let small = Small::new();
        let root = small.root(TreeKind::Extents);
        small.set_inode(ino, INODE_ROOT, &root.encode());
        small.set_inode(ino, INODE_SIZE, &65536_u64.to_le_bytes());
        small.is_harmless();
    }
    let small = Small::new();
    small.set_inode(small.file, INODE_FLAGS, &[1]); // a clone in pieces, which it is not
    small.is_harmless();
}

/// Directories that contain themselves, or each other: whoever follows them comes to an end.
#[test]
fn loops_of_directories_are_harmless() {
    // dir/sub is dir itself.
    let small = Small::new();
    let bucket = small.bucket_of(small.dir, small.sub);
    small.put(TreeKind::Namespace, bucket, &entry(small.dir, 2, b"sub"));
    small.is_harmless();
    let pool = small.open().expect("it opens");
    let cloned = pool.clone_tree(small.dir, Ino::ROOT, &[b"copy".to_vec()], None, NOW);
    assert_eq!(kind_of(cloned), Some(Kind::TooLarge));
    // dir and sub contain each other, and are nowhere else.
    let small = Small::new();
    let bucket = small.bucket_of(Ino::ROOT, small.dir);
    small.remove(TreeKind::Namespace, bucket);
    let hash = split_key(bucket).2;
    let inside = key(small.sub.0, KeyType::Entries, hash);
    small.put(TreeKind::Namespace, inside, &entry(small.dir, 2, b"dir"));
    small.set_inode(small.dir, INODE_PARENT, &small.sub.0.to_le_bytes());
    small.is_harmless();
    let pool = small.open().expect("it opens");
    let made = pool.create_node(small.sub, b"new", &node(FileKind::Regular, b""), NOW);
    assert!(made.is_ok() || kind_of(made) == Some(Kind::Corrupt));
    // Parents that lead in circles, or nowhere.
    for parent in [small.dir.0, small.sub.0, 0, 999, u64::MAX] {
        let small = Small::new();
        small.set_inode(small.dir, INODE_PARENT, &parent.to_le_bytes());
        small.is_harmless();
        let pool = small.open().expect("it opens");
        let copy = pool.clone_tree(small.file, small.sub, &[b"c".to_vec()], None, NOW);
        assert!(copy.is_ok() || kind_of(copy).is_some());
    }
}

/// One inode with two names and one link, one directory in two directories.
#[test]
fn inodes_that_are_named_twice_are_harmless() {
    for (ino, kind) in [(Ino(4), 1), (Ino(3), 2)] {
        let small = Small::new();
        assert!(ino == small.file || ino == small.sub);
        let bucket = key(Ino::ROOT.0, KeyType::Entries, 0x77_7700);
        small.put(TreeKind::Namespace, bucket, &entry(ino, kind, b"twice"));
        small.is_harmless();
    }
    // Twice the same name in one bucket.
    let small = Small::new();
    let bucket = small.bucket_of(Ino::ROOT, small.file);
    let twice = [entry(small.file, 1, b"file"), entry(small.dir, 2, b"file")].concat();
    small.put(TreeKind::Namespace, bucket, &twice);
    small.is_harmless();
    // A hash that leaves no room for the place in the bucket: cookies that are equal.
    let small = Small::new();
    let crowd: Vec<u8> = (0..20)
        .flat_map(|i| entry(small.file, 1, &[b'a' + i]))
        .collect();
    let bucket = key(Ino::ROOT.0, KeyType::Entries, 0x77_77ff);
    small.put(TreeKind::Namespace, bucket, &crowd);
    small.is_harmless();
}

#[test]
fn long_values_have_an_end() {
    let small = Small::new();
    // 65,536 pieces would be 60 MiB; a tree of one node holds four.
    let target = |piece| key(small.link.0, KeyType::Symlink, piece);
    small.put(TreeKind::Namespace, target(0), &[b't'; 960]);
    small.put(TreeKind::Namespace, target(1), &[b't'; 960]);
    small.set_inode(small.link, INODE_SIZE, &1920_u64.to_le_bytes());
    let pool = small.open().expect("it opens");
    assert_eq!(
        pool.read_link(small.link).expect("a long target").len(),
        1920
    );
    // One of 5000 bytes, written by the engine as an attribute and then given to a symlink.
    let device = Arc::new(SimDevice::new(8 << 20, 1));
    furnish(&device).expect("a sound pool");
    let pool = Pool::open(device.clone(), None, &options(false)).expect("it opens");
    let target = vec![b't'; 4095];
    let link = pool.create_node(Ino::ROOT, b"long", &node(FileKind::Symlink, &target), NOW);
    let link = link.expect("a symlink").ino;
    pool.close().expect("it closes");
    let device = device.crash_none();
    let forge = Forge::new(&device, &nodes(&device));
    // The last piece has 255 bytes; with 960 the target is longer than any path.
    let last = key(link.0, KeyType::Symlink, 4);
    for block in nodes(&device) {
        let mut bytes = page(&device, block);
        let at = NODE_RECORDS;
        if bytes[4] != TreeKind::Namespace.code() || bytes[NODE_LEVEL] != 0 {
            continue;
        }
        let pool_id = superblock(&device).1.pool_id();
        let crc = u32_at(&bytes, NODE_CRC);
        let found = Node::verify(
            Box::new(bytes),
            TreeKind::Namespace,
            0,
            NodeRef { block, crc },
            pool_id,
        );
        let mut leaf = found.expect("a sound leaf");
        let Ok(i) = leaf.find(last) else {
            continue;
        };
        assert!(
            at > 0 && leaf.set_value(i, &[b't'; 960]),
            "the leaf has room"
        );
        bytes = *leaf.page();
        forge.put_node(block, &mut bytes);
    }
    let pool = Pool::open(Arc::new(forge.device.fork(0)), None, &options(true));
    let read = pool.expect("it opens").read_link(link);
    assert_eq!(kind_of(read), Some(Kind::Corrupt));
    exercise(&forge.device, 1);
}

/// A counter that would give out again what exists: no file is overwritten by a new one.
#[test]
fn numbers_that_are_taken_are_not_given_out() {
    let small = Small::new();
    small.set_superblock(SB_NEXT_INO, 2);
    let pool = small.open().expect("it opens");
    let mut made = Vec::new();
    for name in [&b"x"[..], b"y", b"z", b"w"] {
        let new = pool.create_node(Ino::ROOT, name, &node(FileKind::Regular, b""), NOW);
        made.push(new.expect("a new file").ino);
    }
    let old = [Ino::ROOT, small.dir, small.sub, small.file, small.link];
    assert!(made.iter().all(|ino| !old.contains(ino)), "{made:?}");
    let mut bytes = Vec::new();
    let read = pool.read(small.file, 0, 65536, &mut bytes);
    read.expect("the file is still there");
    assert!(bytes == [5; 65536]);
    small.is_harmless();
    // The last number is taken: there is none to give out.
    for ino in [NUMBER_MAX, REST_MAX] {
        let small = Small::new();
        let record = small.value(TreeKind::Namespace, key(small.file.0, KeyType::Inode, 0));
        small.put(TreeKind::Namespace, key(ino, KeyType::Inode, 0), &record);
        small.is_harmless();
    }
    for next in [0, NUMBER_MAX] {
        let small = Small::new();
        small.set_superblock(SB_NEXT_DETACHED, next);
        let map = small.root(TreeKind::Extents);
        let waiting = key(0, KeyType::Detached, 0);
        small.put(TreeKind::Namespace, waiting, &map.encode());
        small.is_harmless();
    }
    for next in [NUMBER_MAX, NUMBER_MAX - 1] {
        let small = Small::new();
        small.set_superblock(SB_NEXT_INO, next);
        small.is_survived();
    }
}

/// Numbers that are about to end: the pool is refused while it can still be read, and is never
/// left without a superblock that can be.
#[test]
fn generations_and_sequence_numbers_do_not_wrap() {
    for at in [SB_GENERATION, SB_JOURNAL_SEQ] {
        for left in 1..10 {
            let small = Small::new();
            let (slot, _) = superblock(small.device());
            let number = u64::MAX / 2 - left;
            if at == SB_GENERATION && number % 2 != slot {
                continue; // that one belongs into the other slot
            }
            small.set_superblock(at, number);
            small.is_survived();
            let (_, sb) = superblock(small.device());
            let inner = Arc::new(small.device().fork(1));
            let device: Arc<dyn BlockDevice> = Arc::new(Fence::new(inner, &sb));
            for _ in 0..8 {
                if let Ok(pool) = Pool::open(device.clone(), None, &options(false)) {
                    drop(pool.create_node(Ino::ROOT, b"n", &node(FileKind::Fifo, b""), NOW));
                    drop((pool.sync(), pool.checkpoint(), pool.close()));
                }
                let shown = Pool::open(device.clone(), None, &options(true));
                shown.expect("what was written can be read");
            }
        }
        for number in [u64::MAX / 2, u64::MAX - 1, u64::MAX] {
            let small = Small::new();
            let (slot, _) = superblock(small.device());
            let mut bytes = page(small.device(), slot);
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
            small.forge.put_superblock(slot, &mut bytes);
            fuzz::forge::put(small.device(), 1 - slot, &[0; 4096]);
            fuzz::forge::put(small.device(), small.device().len() / B - 2, &[0; 8192]);
            assert_eq!(check(small.device()), None);
            let opened = Pool::open(Arc::new(small.device().fork(0)), None, &options(false));
            assert_eq!(kind_of(opened), Some(Kind::Corrupt));
        }
    }
}

#[test]
fn sizes_over_the_limit_are_refused() {
    for size in [FILE_SIZE_MAX + 1, u64::MAX] {
        let small = Small::new();
        small.set_inode(small.file, INODE_SIZE, &size.to_le_bytes());
        let pool = small.open().expect("it opens");
        assert_eq!(kind_of(pool.attr(small.file)), Some(Kind::Corrupt));
        small.is_harmless();
    }
    let small = Small::new();
    small.set_inode(small.file, INODE_SIZE, &FILE_SIZE_MAX.to_le_bytes());
    small.is_survived();
    let small = Small::new();
    small.set_superblock(SB_BLOCKS, 1 << 38);
    let opened = Pool::open(Arc::new(small.device().fork(0)), None, &options(false));
    assert_eq!(kind_of(opened), Some(Kind::Corrupt));
}

fn in_journal(records: &mut [Record]) -> (Small, Result<Arc<Pool>>) {
    let small = Small::new();
    assert!(Ring::new(small.device()).append(records), "it fits");
    let opened = small.open();
    small.is_survived();
    (small, opened)
}

#[test]
fn a_journal_about_what_is_not_there_is_refused() {
    let nobody = Ino(999);
    let (ino, size, now) = (nobody, 5, NOW);
    let extent = Extent { block: 600, len: 1 };
    let records = [
        Record::Block {
            ino,
            block: 0,
            crc: 0,
        },
        Record::Zero { ino, block: 0 },
        Record::Map {
            ino,
            block: 0,
            extent,
            sums: vec![0],
        },
        Record::Touch {
            ino,
            size,
            mtime: now,
            ctime: now,
        },
        Record::Truncate { ino, size, now },
        Record::Punch {
            ino,
            block: 0,
            count: 1,
            now,
        },
        Record::Link {
            ino,
            dir: Ino::ROOT,
            name: b"n".to_vec(),
            now,
        },
        Record::Link {
            ino: Ino(4),
            dir: nobody,
            name: b"n".to_vec(),
            now,
        },
        Record::Unlink {
            dir: nobody,
            name: b"n".to_vec(),
            directory: false,
            now,
        },
        Record::Unlink {
            dir: Ino::ROOT,
            name: b"n".to_vec(),
            directory: false,
            now,
        },
        Record::SetXattr {
            ino,
            name: b"user.a".to_vec(),
            value: vec![],
            now,
        },
        Record::Clone {
            src: nobody,
            dst: Ino(4),
            size,
            pinned: false,
            now,
        },
        Record::Clone {
            src: Ino(4),
            dst: nobody,
            size,
            pinned: false,
            now,
        },
        Record::Clone {
            src: Ino(2),
            dst: Ino(4),
            size,
            pinned: false,
            now,
        },
        Record::CloneRange {
            src: Ino(4),
            block: 0,
            dst: nobody,
            dst_block: 0,
            count: 1,
        },
        Record::Show {
            dst: nobody,
            size,
            now,
        },
        Record::EndClone { dst: nobody },
    ];
    for record in records {
        let text = format!("{record:?}");
        let (_, opened) = in_journal(&mut [record]);
        assert_eq!(kind_of(opened), Some(Kind::Corrupt), "{text}");
    }
}

#[test]
fn a_journal_that_would_overwrite_is_refused() {
    let create = |ino, dir, name: &[u8]| Record::Create {
        dir,
        name: name.to_vec(),
        ino,
        generation: 1,
        kind: 1,
        mode: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        target: Vec::new(),
        now: NOW,
    };
    let (_, opened) = in_journal(&mut [create(Ino(9), Ino::ROOT, b"new")]);
    opened.expect("a sound record");
    // An inode that exists, a name that exists, a file as a directory.
    for (ino, dir, name) in [
        (Ino(4), Ino::ROOT, &b"new"[..]),
        (Ino::ROOT, Ino::ROOT, b"new"),
        (Ino(9), Ino(4), b"new"),
        (Ino(0), Ino::ROOT, b"new"),
    ] {
        let (_, opened) = in_journal(&mut [create(ino, dir, name)]);
        assert_eq!(kind_of(opened), Some(Kind::Corrupt), "{ino} {dir}");
    }
    // Places that are taken, or are none.
    let used = decode_extent(&Small::new().value(TreeKind::Extents, 0)).expect("an extent");
    for block in [used.block, 0, 1, 16, 200, 2046, 2047, 2048, (1 << 48) - 1] {
        let (_, opened) = in_journal(&mut [Record::Map {
            ino: Ino(4),
            block: 0,
            extent: Extent { block, len: 1 },
            sums: vec![0],
        }]);
        assert_eq!(kind_of(opened), Some(Kind::Corrupt), "block {block}");
    }
}

/// A ring full of headers, each of which promises a batch of many MiB: looking for one that is
/// whole must not read all of them.
#[test]
fn headers_that_promise_much_do_not_delay_a_mount() {
    let device = Arc::new(SimDevice::new(320 << 20, 1));
    let create = CreateOptions {
        journal_size: Some(128 << 20),
        uuid: [7; 16],
        hash_key: [9; 16],
        uid: 0,
        gid: 0,
        time: NOW,
    };
    Pool::create(device.clone(), None, &create).expect("a new pool");
    let (_, sb) = superblock(&device);
    let mut bytes = [0; 4096];
    for block in sb.journal_pos + 1..sb.journal_pos + 6000 {
        let promise = BatchHeader {
            pool: sb.pool_id(),
            seq: sb.journal_seq + 9,
            records_len: 80 << 20,
            data_blocks: 0,
            durable: sb.journal_seq + 8,
            block,
        };
        // The header alone; its checksum is of what is not there.
        if bytes == [0; 4096] {
            let mut head = vec![0; (promise.head_blocks() * B) as usize];
            promise.encode(&mut head, &sb.hash_key);
            bytes.copy_from_slice(&head[..4096]);
        }
        bytes[BATCH_BLOCK..BATCH_BLOCK + 8].copy_from_slice(&block.to_le_bytes());
        put(&device, sb.journal_start + block, &bytes);
    }
    let begun = std::time::Instant::now();
    let pool = Pool::open(device, None, &options(true)).expect("nothing is lost");
    assert!(begun.elapsed().as_secs() < 30, "{:?}", begun.elapsed());
    drop(pool);
}
