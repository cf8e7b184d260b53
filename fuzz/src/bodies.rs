//! What each fuzz target does with its input.

use nodupe::control::{CLONES_MAX, Compare, Request, Response, Token, clone_names};
use nodupe::device::{BlockDevice, SimDevice};
use nodupe::engine::Pool;
use nodupe::engine::Share;
use nodupe::ondisk::extent::{
    NodeRef, Root, decode_extent, decode_group, decode_refs, encode_extent, encode_group,
    encode_refs,
};
use nodupe::ondisk::inode::{Inode, decode_entries, decode_xattr, encode_entries};
use nodupe::ondisk::journal::BATCH_RECORDS;
use nodupe::ondisk::node::{
    NODE_ADDR, NODE_COUNT, NODE_CRC, NODE_DEAD, NODE_HEAP, NODE_KIND, NODE_LEVEL, NODE_MAGIC,
    NODE_MAGIC_AT, NODE_POOL, NODE_RECORDS, Node, TreeKind,
};
use nodupe::ondisk::record::Record;
use nodupe::ondisk::superblock::{SB_CRC, SB_MAGIC, SLOTS, Superblock};

use super::choose::{Bytes, Choose};
use super::exercise::exercise;
use super::forge::{Forge, Page, crc_without, put, superblock as newest};
use super::records::{Maker, Ring};
use super::template::templates;

/// A fuzz target.
pub type Body = fn(&[u8]);

/// All targets by name.
pub const TARGETS: [(&str, Body); 8] = [
    ("superblock", superblock),
    ("node", node),
    ("record", record),
    ("journal", journal),
    ("replay", replay),
    ("pool", pool),
    ("control", control),
    ("image", super::images::image),
];

/// The first bytes of a superblock, whose magic and checksum are right.
pub fn superblock(data: &[u8]) {
    let mut page = [0; 4096];
    let len = data.len().min(4096);
    page[..len].copy_from_slice(&data[..len]);
    page[..8].copy_from_slice(&SB_MAGIC);
    let crc = crc_without(&page, SB_CRC);
    page[SB_CRC..SB_CRC + 4].copy_from_slice(&crc.to_le_bytes());
    let Ok(found) = Superblock::decode(&page) else {
        return;
    };
    let again = Superblock::decode(&found.encode());
    assert_eq!(again.expect("what is written can be read"), found);
    assert!(found.first_block() < found.end_block());
    // On a device that knows nothing of the trees that it promises.
    let device = SimDevice::new(12 * 1024 * 1024, 0);
    put(&device, found.generation % SLOTS, &page);
    assert!(Pool::probe(&device).is_ok_and(|found| found));
    assert!(Pool::inspect(&device).is_ok());
    exercise(&device, 0);
}

/// A node whose header is right as far as nobody can choose it. Two bytes say how much of the rest
/// stands behind the header; what is left stands at the end, where values grow down.
pub fn node(data: &[u8]) {
    let mut choose = Bytes(data);
    let kind = TreeKind::ALL[choose.index(5)];
    let level = choose.below(256) as u8;
    let mut page = Box::new([0; 4096]);
    page[NODE_MAGIC_AT..4].copy_from_slice(&NODE_MAGIC.to_le_bytes());
    page[NODE_KIND] = kind.code();
    page[NODE_LEVEL] = level;
    for at in [NODE_COUNT, NODE_HEAP, NODE_DEAD] {
        let number = choose.below(1 << 16) as u16;
        page[at..at + 2].copy_from_slice(&number.to_le_bytes());
    }
    page[NODE_ADDR] = 7;
    page[NODE_POOL] = 9;
    let front = choose.below(1 << 16) as usize;
    let rest = &choose.0[..choose.0.len().min(4096 - NODE_RECORDS)];
    let (front, back) = rest.split_at(front.min(rest.len()));
    page[NODE_RECORDS..NODE_RECORDS + front.len()].copy_from_slice(front);
    page[4096 - back.len()..].copy_from_slice(back);
    let crc = crc_without(&page[..], NODE_CRC);
    page[NODE_CRC..NODE_CRC + 4].copy_from_slice(&crc.to_le_bytes());
    if let Ok(node) = Node::verify(page, kind, level, NodeRef { block: 7, crc }, 9) {
        search(&node);
        for i in 0..node.count() {
            values(kind, &node, i);
        }
        rebuild(node);
    }
}

fn search(node: &Node) {
    for i in 0..node.count() {
        assert_eq!(node.find(node.key(i)), Ok(i));
        let before = node.key(i).saturating_sub(1);
        assert!(node.child_index(before) < node.count());
    }
    assert!(node.find(u128::MAX).is_err() || node.count() > 0);
}

fn values(kind: TreeKind, node: &Node, i: usize) {
    let value = node.value(i);
    match kind {
        _ if node.level() > 0 => assert!(node.child(i).block > 0),
        TreeKind::Namespace => {
            drop((
                Inode::decode(value),
                decode_entries(value),
                Root::decode(value),
            ));
        }
        TreeKind::Extents => drop(decode_extent(value)),
        TreeKind::Refs => drop(decode_refs(value)),
        TreeKind::Sums => assert_eq!(value.len(), 256),
        TreeKind::Groups => drop(decode_group(value)),
    }
}

/// All that the trees do to a node.
fn rebuild(mut node: Node) {
    let sound = |node: &Node| {
        let mut copy = node.clone();
        let crc = copy.seal();
        let at = NodeRef { block: 7, crc };
        let page: Box<Page> = Box::new(*copy.page());
        let found = Node::verify(page, copy.kind(), copy.level(), at, 9);
        found.expect("a changed node is well-formed");
    };
    let (kind, level) = (node.kind(), node.level());
    if node.count() > 1 {
        let mut right = Node::new(kind, level, 7, 1, 9);
        let mut left = node.clone();
        left.split_into(left.middle(), &mut right);
        sound(&left);
        sound(&right);
        left.append(&right);
        sound(&left);
        assert_eq!(left.count(), node.count());
    }
    while node.count() > 1 {
        let i = node.count() / 2;
        let (key, value) = (node.key(i), node.value(i).to_vec());
        node.remove(i);
        if node.fits(value.len()) && node.count().is_multiple_of(2) {
            node.insert(i, key, &value);
            assert_eq!(node.value(i), value);
            let short = &value[..value.len() / 2];
            if level == 0 && kind == TreeKind::Namespace && node.set_value(i, short) {
                assert_eq!(node.value(i), short);
            }
            sound(&node);
            node.remove(i);
        }
    }
    sound(&node);
}

/// One value of a leaf or one record of the journal. The first byte says which.
pub fn record(data: &[u8]) {
    let Some((which, value)) = data.split_first() else {
        return;
    };
    match which % 8 {
        0 => {
            if let Ok(extent) = decode_extent(value) {
                assert_eq!(encode_extent(extent)[..], *value);
                assert!(extent.end() > extent.block);
            }
        }
        1 => {
            if let Ok((len, count)) = decode_refs(value) {
                assert_eq!(encode_refs(len, count)[..], *value);
            }
        }
        2 => {
            if let Ok(free) = decode_group(value) {
                assert_eq!(encode_group(free)[..], *value);
            }
        }
        3 => {
            if let Ok(root) = Root::decode(value) {
                assert_eq!(root.encode()[..], *value);
            }
        }
        4 => {
            if let Ok(inode) = Inode::decode(value) {
                let again = Inode::decode(&inode.encode());
                assert_eq!(again.expect("what is written can be read"), inode);
            }
        }
        5 => {
            if let Ok(entries) = decode_entries(value) {
                let encoded = encode_entries(&entries);
                assert!(encoded.is_err() || encoded.is_ok_and(|bytes| bytes == value));
            }
        }
        6 => {
            if let Ok((name, bytes)) = decode_xattr(value) {
                assert!(!name.is_empty() && name.len() <= 255 && bytes.len() <= 64 * 1024);
            }
        }
        _ => {
            if let Ok(records) = Record::decode_all(value) {
                let mut bytes = Vec::new();
                records.iter().for_each(|record| record.encode(&mut bytes));
                let again = Record::decode_all(&bytes);
                assert_eq!(again.expect("what is written can be read"), records);
            }
        }
    }
}

/// Bytes of journal records, replayed on a pool. The first byte says how many batches they are
/// cut into, between records.
pub fn journal(data: &[u8]) {
    let Some((cuts, bytes)) = data.split_first() else {
        return;
    };
    let template = &templates()[usize::from(cuts % 2)];
    let device = template.device.fork(0);
    let mut ring = Ring::new(&device);
    match Record::decode_all(bytes) {
        Ok(mut records) => {
            let size = records.len().div_ceil(usize::from(cuts / 64) + 1).max(1);
            for batch in records.chunks_mut(size) {
                if !ring.append(batch) {
                    break;
                }
            }
        }
        Err(_) => {
            let mut head = vec![0; BATCH_RECORDS];
            head.extend_from_slice(bytes);
            ring.append_bytes(head, u32::from(cuts / 64));
        }
    }
    exercise(&device, 0);
}

/// Records that are mostly about what exists, replayed on a pool.
pub fn replay(data: &[u8]) {
    let mut choose = Bytes(data);
    let template = &templates()[choose.index(2)];
    let device = template.device.fork(0);
    let mut ring = Ring::new(&device);
    let (next_ino, blocks) = (newest(&device).1.next_ino, device.len() / 4096);
    let mut records = Vec::new();
    while !choose.is_done() && records.len() < 200 {
        let end = choose.below(8) == 7;
        let choose = &mut choose;
        let mut maker = Maker {
            choose,
            next_ino,
            blocks,
        };
        records.push(maker.record());
        if end && !ring.append(&mut std::mem::take(&mut records)) {
            break;
        }
    }
    ring.append(&mut records);
    exercise(&device, 0);
}

/// A pool of which some fields are changed, wherever they stand, and all checksums are right.
pub fn pool(data: &[u8]) {
    let mut choose = Bytes(data);
    let template = &templates()[choose.index(3)];
    let forge = Forge::new(&template.device, &template.nodes);
    let seed = choose.below(4);
    for _ in 0..16 {
        if choose.is_done() {
            break;
        }
        match choose.below(16) {
            0 => {
                forge.change_superblock(&mut choose);
                break;
            }
            1 if !template.batches.is_empty() => {
                let block = template.batches[choose.index(template.batches.len())];
                forge.change_batch(block, &mut choose);
            }
            _ => forge.change_node(&mut choose),
        }
    }
    exercise(&forge.device, seed);
}

/// A request to compare a block with another.
pub(crate) fn compare(source: Option<Token>) -> Compare {
    let range = Share {
        block: 1,
        dst_block: 2,
        count: 3,
    };
    Compare {
        source,
        range,
        dry: false,
    }
}

/// What arrives at the control channel, and what the daemon might answer.
pub fn control(data: &[u8]) {
    if let Ok(request) = Request::decode(data) {
        if let Ok(encoded) = request.encode() {
            let again = Request::decode(&encoded[..]);
            assert_eq!(again.expect("what is sent can be read"), request);
        }
        if let Request::Clone { name, count, .. } = &request {
            names(name, *count);
        }
    }
    let clone = Request::Clone {
        source: Token([0; 16]),
        name: String::new(),
        count: None,
        preserve: false,
    };
    let requests = [
        Request::Info,
        Request::Token,
        clone,
        Request::Usage,
        Request::Checkpoint,
        Request::Places {
            from: 0,
            to: 1,
            sums: true,
        },
        Request::ShareEqual(compare(None)),
    ];
    for request in requests {
        let answer = Response::decode(&request, data);
        if answer.is_ok() {
            let encoded = Response::encode(&answer);
            drop(Response::decode(&request, &encoded[..]));
        }
    }
}

/// Names of clones do not take memory without bound.
fn names(name: &str, count: Option<u32>) {
    if let Ok(names) = clone_names(name, count) {
        assert!(names.len() <= CLONES_MAX as usize);
        let bytes: usize = names.iter().map(Vec::len).sum();
        assert!(bytes <= names.len() * 255, "{bytes} bytes of names");
    }
}
