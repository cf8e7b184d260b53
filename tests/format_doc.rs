//! `docs/format.md` and the constants in `src/ondisk` say the same.

use std::collections::BTreeMap;

use nodupe::ondisk::extent::{
    EXTENT_BLOCK, EXTENT_COUNT, EXTENT_LEN, EXTENT_STORED, Extent, GROUP_BLOCKS, GROUP_LEN,
    REFS_LEN, ROOT_LEN, SUMS_LEN, SUMS_PER_RECORD,
};
use nodupe::ondisk::heartbeat::*;
use nodupe::ondisk::inode::*;
use nodupe::ondisk::journal::*;
use nodupe::ondisk::node::*;
use nodupe::ondisk::record::Record;
use nodupe::ondisk::superblock::*;
use nodupe::units::{Ino, Time};

const DOC: &str = include_str!("../docs/format.md");

macro_rules! constants {
    ($($name:ident)*) => { [$((stringify!($name), $name)),*] };
}

/// Rows of the document's tables, split into cells.
fn rows() -> Vec<Vec<String>> {
    let rows = DOC.lines().filter(|line| line.starts_with('|'));
    rows.map(|line| {
        line.trim_matches('|')
            .split('|')
            .map(|cell| cell.trim().to_owned())
            .collect()
    })
    .collect()
}

#[test]
fn every_offset_is_documented_and_every_documented_offset_is_real() {
    let code: BTreeMap<&str, usize> = constants!(
        SB_MAGIC_AT SB_VERSION_AT SB_CRC SB_UUID SB_INCOMPAT SB_RO_COMPAT SB_COMPAT SB_GENERATION
        SB_BLOCKS SB_BLOCK_SIZE SB_FLAGS SB_JOURNAL_START SB_JOURNAL_BLOCKS SB_JOURNAL_SEQ
        SB_JOURNAL_POS SB_NEXT_INO SB_NEXT_DETACHED SB_INODES SB_LOGICAL SB_FREE SB_HASH_KEY
        SB_CREATED SB_NAMESPACE SB_REFS SB_SUMS SB_GROUPS
        HB_MAGIC_AT HB_CRC HB_HOST_LEN HB_POOL HB_OWNER HB_BOOT HB_SEQ HB_TIME HB_PID HB_INTERVAL
        HB_HOST
        NODE_MAGIC_AT NODE_KIND NODE_LEVEL NODE_COUNT NODE_ADDR NODE_GENERATION NODE_CRC NODE_HEAP
        NODE_DEAD NODE_POOL NODE_RECORDS
        EXTENT_BLOCK EXTENT_COUNT EXTENT_STORED
        INODE_KIND INODE_FLAGS INODE_MODE INODE_NLINK INODE_UID INODE_GID INODE_RDEV
        INODE_GENERATION INODE_SIZE INODE_MAPPED INODE_PARENT INODE_ROOT INODE_ATIME INODE_MTIME
        INODE_CTIME INODE_BTIME INODE_ORIGIN INODE_ORIGIN_GENERATION INODE_ORIGIN_TIME
        BATCH_MAGIC_AT BATCH_POOL BATCH_SEQ BATCH_RECORDS_LEN BATCH_DATA_BLOCKS BATCH_CRC
        BATCH_DURABLE BATCH_BLOCK BATCH_SEAL BATCH_RECORDS
    )
    .into_iter()
    .collect();
    let mut documented = BTreeMap::new();
    for row in rows() {
        if let Some(name) = row[0]
            .strip_prefix('`')
            .and_then(|name| name.strip_suffix('`'))
        {
            let offset: usize = row[1].parse().expect("an offset is a number");
            assert!(
                documented.insert(name.to_owned(), offset).is_none(),
                "{name} stands twice"
            );
        }
    }
    let documented: BTreeMap<&str, usize> = documented
        .iter()
        .map(|(name, offset)| (name.as_str(), *offset))
        .collect();
    assert_eq!(documented, code);
}

#[test]
fn fields_of_a_struct_do_not_overlap() {
    let mut end = 0;
    for row in rows() {
        let Some(name) = row[0].strip_prefix('`') else {
            continue;
        };
        let offset: usize = row[1].parse().expect("an offset is a number");
        if offset == 0 {
            end = 0; // the next struct
        }
        assert!(offset >= end, "{name} overlaps the field before it");
        end = offset + row[2].parse().unwrap_or(0);
    }
}

#[test]
fn magic_numbers_sizes_and_limits_are_as_documented() {
    assert_eq!(SB_MAGIC, [0x8a, 0x4e, 0x4f, 0x44, 0x55, 0x50, 0x45, 0x0a]);
    assert_eq!(NODE_MAGIC.to_le_bytes(), *b"NDPN");
    assert_eq!(BATCH_MAGIC.to_le_bytes(), *b"NDPJRNL1");
    assert_eq!((HB_MAGIC, HB_BLOCK, HB_HOST_MAX), (*b"NDPBEAT1", 2, 256));
    assert!(DOC.contains("\"NDPBEAT1\""));
    assert!(DOC.contains("8a 4e 4f 44 55 50 45 0a") && DOC.contains("\"NDPJRNL1\""));
    assert_eq!(SB_VERSION, 1);
    assert!(DOC.starts_with(&format!(
        "# The on-disk format of a nodupe pool, version {SB_VERSION}"
    )));
    assert_eq!(
        (INODE_LEN, VALUE_MAX, ROOT_LEN, EXTENT_LEN),
        (160, 960, 16, 16)
    );
    assert_eq!(
        (GROUP_BLOCKS, SUMS_PER_RECORD, HEAD_BLOCKS),
        (32768, 64, 16)
    );
    assert_eq!(
        (POOL_BLOCKS_MIN, POOL_BLOCKS_MAX, JOURNAL_BLOCKS_MIN),
        (1024, 1 << 38, 256)
    );
}

#[test]
fn kinds_of_trees_and_keys_are_as_documented() {
    let names = [
        "namespace",
        "extents of one file",
        "refcounts",
        "checksums",
        "groups",
    ];
    let lens = [
        None,
        Some(EXTENT_LEN),
        Some(REFS_LEN),
        Some(SUMS_LEN),
        Some(GROUP_LEN),
    ];
    for ((kind, name), len) in TreeKind::ALL.into_iter().zip(names).zip(lens) {
        assert_eq!(kind.value_len(), len);
        let row = rows()
            .into_iter()
            .find(|row| row[1] == name)
            .expect("the tree is documented");
        assert_eq!(row[0], kind.code().to_string());
        assert!(row[2].contains(&format!("{} bytes", kind.key_len())));
        if let Some(len) = len {
            assert_eq!(row[3], format!("{len} bytes"));
        }
    }
    let keys = [
        (KeyType::Inode, "inode record"),
        (KeyType::Entries, "bucket of entries"),
        (KeyType::Xattr, "piece of an extended attribute"),
        (KeyType::Symlink, "piece of a symlink's target"),
        (
            KeyType::Orphan,
            "empty: an inode without a name, or an unfinished clone in pieces",
        ),
        (
            KeyType::Detached,
            "tree root of an extent map that waits to be freed",
        ),
    ];
    for (key, value) in keys {
        let found = rows()
            .into_iter()
            .find(|row| row.get(3).is_some_and(|cell| cell == value));
        assert_eq!(
            found.expect("the key type is documented")[0],
            key.code().to_string()
        );
    }
}

#[test]
fn types_of_records_are_as_documented() {
    let (ino, now) = (Ino(1), Time::default());
    let name = || b"n".to_vec();
    let records = [
        (
            "Block",
            Record::Block {
                ino,
                block: 0,
                crc: 0,
            },
            21,
        ),
        ("Zero", Record::Zero { ino, block: 0 }, 17),
        (
            "Map",
            Record::Map {
                ino,
                block: 0,
                extent: Extent { block: 1, len: 2 },
                sums: vec![0, 0],
            },
            37,
        ),
        (
            "Touch",
            Record::Touch {
                ino,
                size: 0,
                mtime: now,
                ctime: now,
            },
            41,
        ),
        (
            "SetAttr",
            Record::SetAttr {
                ino,
                mask: 0,
                mode: 0,
                uid: 0,
                gid: 0,
                times: [now; 3],
            },
            56,
        ),
        (
            "Create",
            Record::Create {
                dir: ino,
                name: name(),
                ino,
                generation: 0,
                kind: 1,
                mode: 0,
                uid: 0,
                gid: 0,
                rdev: 0,
                target: Vec::new(),
                now,
            },
            61,
        ),
        (
            "Link",
            Record::Link {
                ino,
                dir: ino,
                name: name(),
                now,
            },
            34,
        ),
        (
            "Unlink",
            Record::Unlink {
                dir: ino,
                name: name(),
                directory: false,
                now,
            },
            27,
        ),
        (
            "Rename",
            Record::Rename {
                dir: ino,
                name: name(),
                new_dir: ino,
                new_name: name(),
                mode: 0,
                now,
            },
            40,
        ),
        (
            "SetXattr",
            Record::SetXattr {
                ino,
                name: name(),
                value: name(),
                now,
            },
            31,
        ),
        (
            "RemoveXattr",
            Record::RemoveXattr {
                ino,
                name: name(),
                now,
            },
            26,
        ),
        ("Truncate", Record::Truncate { ino, size: 0, now }, 29),
        (
            "Punch",
            Record::Punch {
                ino,
                block: 0,
                count: 0,
                now,
            },
            37,
        ),
        (
            "Clone",
            Record::Clone {
                src: ino,
                dst: ino,
                size: 0,
                pinned: false,
                now,
            },
            38,
        ),
        (
            "CloneRange",
            Record::CloneRange {
                src: ino,
                block: 0,
                dst: ino,
                dst_block: 0,
                count: 0,
            },
            41,
        ),
        (
            "Show",
            Record::Show {
                dst: ino,
                size: 0,
                now,
            },
            29,
        ),
        ("EndClone", Record::EndClone { dst: ino }, 9),
    ];
    for (name, record, len) in &records {
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        let row = rows()
            .into_iter()
            .find(|row| row[1] == *name)
            .expect("the record is documented");
        assert_eq!(row[0], bytes[0].to_string(), "{name}");
        assert_eq!(
            bytes.len(),
            *len,
            "{name}: the fields that the document lists"
        );
    }
    let typed = rows()
        .into_iter()
        .filter(|row| row.len() == 3 && row[0].parse::<u8>().is_ok());
    // The table of versions has three columns as well, and one row.
    assert_eq!(typed.count() - 1, records.len());
}
