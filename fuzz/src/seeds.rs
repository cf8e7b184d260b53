//! Inputs to begin with, made of real pools: what the targets take apart is put together here.

use nodupe::control::{Request, Token};
use nodupe::device::{BlockDevice, SplitMix64};
use nodupe::ondisk::extent::NodeRef;
use nodupe::ondisk::journal::{BATCH_RECORDS, BATCH_RECORDS_LEN};
use nodupe::ondisk::node::{
    NODE_COUNT, NODE_DEAD, NODE_HEAP, NODE_KIND, NODE_LEVEL, NODE_RECORDS, Node, TreeKind,
};
use nodupe::ondisk::record::Record;

use super::bodies::compare;
use super::forge::{B, Page, page, superblock, u32_at, u64_at};
use super::template::{Template, templates};

/// Name of a target and an input for it.
pub type Seed = (&'static str, Vec<u8>);

/// Inputs for all targets.
pub fn seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for (i, template) in templates().iter().enumerate() {
        let (slot, _) = superblock(&template.device);
        let first = page(&template.device, slot)[..248].to_vec();
        seeds.push(("superblock", first));
        for block in &template.nodes {
            nodes(&page(&template.device, *block), *block, i == 0, &mut seeds);
        }
        batches(template, &mut seeds);
    }
    let mut rng = SplitMix64::new(3);
    for len in [4, 16, 40, 100, 250] {
        for target in ["replay", "pool"] {
            seeds.push((target, (0..len).map(|_| rng.below(256) as u8).collect()));
        }
    }
    for which in 0..20 {
        // As it is, and with a few fields changed.
        seeds.push(("image", vec![which]));
        let tail = (0..40).map(|_| rng.below(256) as u8);
        seeds.push(("image", std::iter::once(which).chain(tail).collect()));
    }
    control(&mut seeds);
    seeds
}

/// A node, and what its first records hold. `whole`: the node itself, too.
fn nodes(page: &Page, block: u64, whole: bool, seeds: &mut Vec<Seed>) {
    let Some(index) = TreeKind::ALL
        .iter()
        .position(|kind| kind.code() == page[NODE_KIND])
    else {
        return;
    };
    let (kind, level) = (TreeKind::ALL[index], page[NODE_LEVEL]);
    let count = usize::from(u16::from_le_bytes([page[NODE_COUNT], page[NODE_COUNT + 1]]));
    let heap = usize::from(u16::from_le_bytes([page[NODE_HEAP], page[NODE_HEAP + 1]]));
    let stride = match (level, kind.value_len()) {
        (0, Some(len)) => kind.key_len() + len,
        (0, None) => 20,
        _ => kind.key_len() + 16,
    };
    if whole {
        let mut seed = vec![index as u8, level];
        for at in [NODE_COUNT, NODE_HEAP, NODE_DEAD] {
            seed.extend_from_slice(&page[at..at + 2]);
        }
        let front = count * stride;
        seed.extend_from_slice(&(front as u16).to_le_bytes());
        seed.extend_from_slice(&page[NODE_RECORDS..NODE_RECORDS + front]);
        if heap > 0 {
            seed.extend_from_slice(&page[heap..]);
        }
        seeds.push(("node", seed));
    }
    let crc = u32_at(page, nodupe::ondisk::node::NODE_CRC);
    let pool = u64_at(page, nodupe::ondisk::node::NODE_POOL);
    let found = Node::verify(Box::new(*page), kind, level, NodeRef { block, crc }, pool);
    let node = found.expect("a sound node");
    let which: &[u8] = match (level, kind) {
        (0, TreeKind::Namespace) => &[4, 5, 6, 3],
        (0, TreeKind::Extents) => &[0],
        (0, TreeKind::Refs) => &[1],
        (0, TreeKind::Groups) => &[2],
        _ => &[],
    };
    for i in (0..node.count()).step_by(9) {
        for first in which {
            let mut seed = vec![*first];
            seed.extend_from_slice(node.value(i));
            seeds.push(("record", seed));
        }
    }
}

fn batches(template: &Template, seeds: &mut Vec<Seed>) {
    for block in &template.batches {
        let first = page(&template.device, *block);
        let len = u32_at(&first, BATCH_RECORDS_LEN) as usize;
        let mut head = vec![0; (BATCH_RECORDS + len).next_multiple_of(B as usize)];
        let read = template.device.read_at(block * B, &mut head);
        read.expect("a sound device reads");
        let bytes = &head[BATCH_RECORDS..BATCH_RECORDS + len];
        for cuts in [0, 65] {
            let mut seed = vec![cuts];
            seed.extend_from_slice(bytes);
            seeds.push(("journal", seed));
        }
        for record in Record::decode_all(bytes).expect("sound records") {
            let mut seed = vec![7];
            record.encode(&mut seed);
            seeds.push(("record", seed));
        }
    }
}

fn control(seeds: &mut Vec<Seed>) {
    let clone = |count| Request::Clone {
        source: Token([0x5a; 16]),
        name: "vm-{}.raw".into(),
        count,
        preserve: true,
    };
    for request in [
        Request::Info,
        Request::Token,
        Request::Usage,
        clone(None),
        clone(Some(9)),
        Request::Places {
            from: 7,
            to: 1 << 40,
            sums: true,
        },
        Request::ShareEqual(compare(Some(Token([0x5a; 16])))),
    ] {
        let payload = request.encode().expect("it is short");
        let len = payload.iter().position(|byte| *byte == 0).unwrap_or(0);
        seeds.push(("control", payload[..len].to_vec()));
    }
    let answers = [
        r#"{"error":{"kind":"Exists","message":"it is there"}}"#,
        r#"{"ok":{"token":"5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a","clones":3}}"#,
        r#"{"ok":{"size":1,"mapped":2,"exclusive":3,"extents":4}}"#,
        r#"{"ok":{"runs":[[1,2,2]],"sums":"00000001fffffffe","next":9}}"#,
        r#"{"ok":{"ranges":[[0,1],[2,3]],"compared":4}}"#,
        concat!(
            r#"{"ok":{"pid":1,"pool":"/p","uuid":"00112233445566778899aabbccddeeff","version":1,"#,
            r#""poisoned":null,"usage":{"total":1,"used":2,"available":3,"reserve":4,"staged":5,"#,
            r#""journal_used":6,"journal_size":7,"logical":8,"inodes":9}}}"#
        ),
    ];
    seeds.extend(answers.map(|text| ("control", text.as_bytes().to_vec())));
}
