//! A small pool whose records are changed one by one, with all checksums made right again.

use std::sync::Arc;

use crate::fuzz::exercise::{check, exercise};
use crate::fuzz::fence::Fence;
use crate::fuzz::forge::{B, Forge, Page, nodes, page, put, superblock};
use crate::fuzz::template::options;

use nodupe::device::{BlockDevice, SimDevice};
use nodupe::engine::{CreateOptions, FileKind, NewNode, Pool};
use nodupe::error::{Kind, Result};
use nodupe::ondisk::crc32c;
use nodupe::ondisk::extent::Root;
use nodupe::ondisk::inode::{INODE_ROOT, KeyType, decode_entries, key, split_key};
use nodupe::ondisk::node::{Node, TreeKind};
use nodupe::units::{Ino, Time};

pub(crate) const NOW: Time = Time { secs: 1, nanos: 0 };

pub(crate) fn node(kind: FileKind, target: &[u8]) -> NewNode<'_> {
    NewNode {
        kind,
        mode: 0o755,
        uid: 0,
        gid: 0,
        rdev: 0,
        target,
    }
}

/// A small pool, and the inodes in it: /dir, /dir/sub, /file (64 KiB at one place), /link.
pub(crate) struct Small {
    pub(crate) forge: Forge,
    pub(crate) dir: Ino,
    pub(crate) sub: Ino,
    pub(crate) file: Ino,
    pub(crate) link: Ino,
}

impl Small {
    pub(crate) fn new() -> Self {
        let device = Arc::new(SimDevice::new(8 << 20, 1));
        let [dir, sub, file, link] = furnish(&device).expect("a sound pool");
        let device = device.crash_none();
        Self {
            forge: Forge::new(&device, &nodes(&device)),
            dir,
            sub,
            file,
            link,
        }
    }

    pub(crate) fn device(&self) -> &SimDevice {
        &self.forge.device
    }

    pub(crate) fn root(&self, kind: TreeKind) -> Root {
        let (_, sb) = superblock(self.device());
        match kind {
            TreeKind::Namespace => sb.namespace,
            TreeKind::Refs => sb.refs,
            TreeKind::Sums => sb.sums,
            TreeKind::Groups => sb.groups,
            TreeKind::Extents => {
                let inode = self.value(TreeKind::Namespace, key(self.file.0, KeyType::Inode, 0));
                Root::decode(&inode[INODE_ROOT..INODE_ROOT + 16]).expect("a root")
            }
        }
    }

    pub(crate) fn node(&self, kind: TreeKind) -> Node {
        let (root, pool) = (self.root(kind), superblock(self.device()).1.pool_id());
        assert_eq!(root.level, 0, "{kind:?} has more than one node");
        let bytes = Box::new(page(self.device(), root.node.block));
        Node::verify(bytes, kind, 0, root.node, pool).expect("a sound node")
    }

    /// Changes the only node of a tree.
    pub(crate) fn edit(&self, kind: TreeKind, change: impl FnOnce(&mut Node)) {
        let mut node = self.node(kind);
        change(&mut node);
        let mut bytes: Page = *node.page();
        self.forge.put_node(node.addr(), &mut bytes);
    }

    pub(crate) fn value(&self, kind: TreeKind, key: u128) -> Vec<u8> {
        let node = self.node(kind);
        let i = node.find(key).expect("the record is there");
        node.value(i).to_vec()
    }

    /// Stores a record, new or not.
    pub(crate) fn put(&self, kind: TreeKind, key: u128, value: &[u8]) {
        self.edit(kind, |node| match node.find(key) {
            Ok(i) => {
                node.remove(i);
                node.insert(i, key, value);
            }
            Err(i) => node.insert(i, key, value),
        });
    }

    pub(crate) fn remove(&self, kind: TreeKind, key: u128) {
        self.edit(kind, |node| {
            let i = node.find(key).expect("the record is there");
            node.remove(i);
        });
    }

    /// Changes a field of an inode record.
    pub(crate) fn set_inode(&self, ino: Ino, at: usize, bytes: &[u8]) {
        let key = key(ino.0, KeyType::Inode, 0);
        let mut value = self.value(TreeKind::Namespace, key);
        value[at..at + bytes.len()].copy_from_slice(bytes);
        self.put(TreeKind::Namespace, key, &value);
    }

    /// Changes a field of the superblock; there is no other one then.
    pub(crate) fn set_superblock(&self, at: usize, number: u64) {
        let (slot, _) = superblock(self.device());
        let mut bytes = page(self.device(), slot);
        bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        self.forge.put_superblock(slot, &mut bytes);
        put(self.device(), 1 - slot, &[0; 4096]);
        let copies = self.device().len() / B - 2;
        put(self.device(), copies, &[0; 8192]);
    }

    /// The buckets of a directory.
    pub(crate) fn buckets(&self, dir: Ino) -> Vec<u128> {
        let node = self.node(TreeKind::Namespace);
        let keys = (0..node.count()).map(|i| node.key(i));
        keys.filter(|key| {
            let (ino, kind, _) = split_key(*key);
            ino == dir.0 && KeyType::from_code(kind) == Some(KeyType::Entries)
        })
        .collect()
    }

    /// The bucket that names `ino`.
    pub(crate) fn bucket_of(&self, dir: Ino, ino: Ino) -> u128 {
        let names = |key: &u128| {
            let bucket = self.value(TreeKind::Namespace, *key);
            decode_entries(&bucket).is_ok_and(|entries| entries.iter().any(|e| e.ino == ino))
        };
        let found = self.buckets(dir).into_iter().find(names);
        found.expect("the directory names it")
    }

    /// Numbers of what a check finds.
    pub(crate) fn findings(&self) -> Vec<u32> {
        let found = check(self.device()).expect("there is a pool");
        found.into_iter().map(|finding| finding.code).collect()
    }

    pub(crate) fn open(&self) -> Result<Arc<Pool>> {
        let (_, sb) = superblock(self.device());
        let device = Fence::new(Arc::new(self.device().fork(1)), &sb);
        Pool::open(Arc::new(device), None, &options(false))
    }

    /// Check finds it, and nothing that is asked of it does harm.
    pub(crate) fn is_harmless(&self) {
        assert!(!self.findings().is_empty(), "check finds nothing");
        self.is_survived();
    }

    pub(crate) fn is_survived(&self) {
        for seed in 0..4 {
            exercise(self.device(), seed);
        }
    }
}

pub(crate) fn furnish(device: &Arc<SimDevice>) -> Result<[Ino; 4]> {
    let options_ = CreateOptions {
        journal_size: Some(1 << 20),
        uuid: [7; 16],
        hash_key: [9; 16],
        uid: 0,
        gid: 0,
        time: NOW,
    };
    Pool::create(device.clone(), None, &options_)?;
    let pool = Pool::open(device.clone(), None, &options(false))?;
    let dir = pool.create_node(Ino::ROOT, b"dir", &node(FileKind::Directory, b""), NOW)?;
    let sub = pool.create_node(dir.ino, b"sub", &node(FileKind::Directory, b""), NOW)?;
    let file = pool.create_node(Ino::ROOT, b"file", &node(FileKind::Regular, b""), NOW)?;
    pool.write(file.ino, 0, &[5; 65536], NOW)?;
    let link = pool.create_node(Ino::ROOT, b"link", &node(FileKind::Symlink, b"to"), NOW)?;
    pool.close()?;
    Ok([dir.ino, sub.ino, file.ino, link.ino])
}

pub(crate) fn kind_of<T>(result: Result<T>) -> Option<Kind> {
    result.err().map(|error| error.kind())
}

/// Bytes at `at` that give `bytes` the CRC `wanted`: a CRC is linear, so whoever chooses 32 bits
/// chooses it.
pub(crate) fn force_crc(bytes: &mut [u8], at: usize, wanted: u32) {
    bytes[at..at + 4].fill(0);
    let base = crc32c(bytes);
    // What each bit changes, and which bits did, reduced to a basis by its highest bit.
    let mut basis = [(0_u32, 0_u32); 32];
    for bit in 0..32_u32 {
        let mask = 1_u32 << bit;
        bytes[at..at + 4].copy_from_slice(&mask.to_le_bytes());
        let (mut effect, mut bits) = (crc32c(bytes) ^ base, mask);
        while effect != 0 {
            let top = effect.ilog2() as usize;
            if basis[top].0 == 0 {
                basis[top] = (effect, bits);
                break;
            }
            effect ^= basis[top].0;
            bits ^= basis[top].1;
        }
    }
    let (mut left, mut bits) = (base ^ wanted, 0);
    while left != 0 {
        let (effect, by) = basis[left.ilog2() as usize];
        assert_ne!(effect, 0, "four bytes reach every checksum");
        left ^= effect;
        bits ^= by;
    }
    bytes[at..at + 4].copy_from_slice(&bits.to_le_bytes());
}
