//! What the target `image` does: images of all formats with fields changed, opened alone and as a
//! child of a whole one, and read.
//!
//! An image is made by the project's own plan, so that an input needs to say only what is wrong
//! with it. Where a format has checksums they are made right, or nothing behind them would be
//! reached.

use std::sync::{Arc, LazyLock};

use nodupe::error::Result;
use nodupe::formats::chain::Chain;
use nodupe::formats::layout::{Ids, Parent, Plan, Shape, Sink, Spec};
use nodupe::formats::ova::Ova;
use nodupe::formats::qcow2::Qcow2;
use nodupe::formats::{Content, Format, Identity, Layer, Source, Uuid, probe};

use super::choose::{Bytes, Choose};
use super::forge::crc_without;

/// Bytes of the disks.
const SIZE: u64 = (2 << 20) + 4096;
/// Runs that are looked at, and bytes that are read, of one image.
const RUNS_MAX: usize = 4096;
const READ_MAX: u64 = 4 << 20;
/// Longest file that is made by changing one.
const LEN_MAX: usize = 16 << 20;

const SHAPES: [Shape; 8] = [
    Shape::VhdFixed,
    Shape::VhdDynamic,
    Shape::VhdxFixed,
    Shape::VhdxDynamic,
    Shape::VmdkSparse,
    Shape::VdiFixed,
    Shape::VdiDynamic,
    Shape::Qcow2,
];

/// An image, and where in it there are tables.
struct Template {
    shape: Shape,
    bytes: Vec<u8>,
    /// Offsets of bytes that are not zero and no payload.
    places: Vec<usize>,
}

struct ToVec<'a> {
    bytes: &'a mut Vec<u8>,
    places: &'a mut Vec<usize>,
}

impl Sink for ToVec<'_> {
    fn bytes(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let at = at as usize;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        // Fields that are zero stand beside some that are not.
        let near = |i: &usize| (i.saturating_sub(8)..bytes.len().min(i + 8)).any(|k| bytes[k] != 0);
        self.places
            .extend((0..bytes.len()).filter(near).map(|i| at + i));
        Ok(())
    }

    fn repeat(&mut self, at: u64, from: u64, len: u64) -> Result<()> {
        let (from, len) = (from as usize, len as usize);
        self.bytes.copy_within(from..from + len, at as usize);
        Ok(())
    }

    fn payload(&mut self, at: u64, _: u64, len: u64) -> Result<()> {
        let at = at as usize;
        self.bytes[at..at + len.min(64) as usize].fill(0xda);
        Ok(())
    }
}

fn template(shape: Shape, child: bool) -> Template {
    let format = shape.format();
    let parent = Parent {
        name: "parent".to_owned(),
        absolute: None,
        identity: Some(match format {
            Format::Vmdk => Identity::Cid(7),
            _ => Identity::Uuid(Uuid([7; 16])),
        }),
        version: None,
        format,
    };
    let spec = Spec {
        shape,
        size: SIZE,
        sector: 512,
        ids: Ids {
            uuid: Uuid([7; 16]),
            others: [Uuid([8; 16]); 3],
            cid: 7,
        },
        seconds: 1_700_000_000,
        name: "disk".to_owned(),
        parent: (child && !shape.is_fixed()).then_some(parent),
    };
    let map = vec![0..65536, SIZE - 4096..SIZE];
    let plan = Plan::new(&spec, &map).expect("a small disk");
    let planned = &plan.files[0];
    let (mut bytes, mut places) = (vec![0; planned.len as usize], Vec::new());
    let mut sink = ToVec {
        bytes: &mut bytes,
        places: &mut places,
    };
    planned.emit(SIZE, &mut sink).expect("memory takes all");
    Template {
        shape,
        bytes,
        places,
    }
}

/// All shapes, whole ones and children.
static TEMPLATES: LazyLock<Vec<Template>> = LazyLock::new(|| {
    let all = SHAPES
        .iter()
        .flat_map(|shape| [template(*shape, false), template(*shape, true)]);
    all.collect()
});

/// The body of the target.
pub fn image(data: &[u8]) {
    let mut choose = Bytes(data);
    let which = choose.index(TEMPLATES.len() + 4);
    let Some(template) = TEMPLATES.get(which) else {
        return plain(which - TEMPLATES.len(), choose.0);
    };
    let mut bytes = template.bytes.clone();
    let mut repair = true;
    for _ in 0..32 {
        if choose.is_done() {
            break;
        }
        let what = choose.below(16);
        let at = template.places[choose.below(1 << 16) as usize % template.places.len()];
        match what {
            0 => {
                let len = (choose.below(1 << 16) as usize * bytes.len()) >> 16;
                bytes.truncate(len.max(1));
            }
            1 => bytes.resize(
                (bytes.len() + choose.below(1 << 16) as usize).min(LEN_MAX),
                0,
            ),
            2 => repair = false,
            3..=7 => set(&mut bytes, at, &[choose.below(256) as u8]),
            8 | 9 => set(
                &mut bytes,
                at,
                &[choose.below(256) as u8, choose.below(256) as u8],
            ),
            10 | 11 => set(
                &mut bytes,
                at / 4 * 4,
                &(choose.below(1 << 32) as u32).to_le_bytes(),
            ),
            12 => set(&mut bytes, at / 8 * 8, &choose.any().to_le_bytes()),
            13 => set(&mut bytes, at / 8 * 8, &[0xff; 8]),
            14 => set(&mut bytes, at / 8 * 8, &[0; 8]),
            _ => {
                // One table's entry becomes another's.
                let from = template.places[choose.below(1 << 16) as usize % template.places.len()];
                if let Some(part) = bytes.get(from / 8 * 8..from / 8 * 8 + 8) {
                    let part = part.to_vec();
                    set(&mut bytes, at / 8 * 8, &part);
                }
            }
        }
    }
    if repair {
        make_right(template.shape, &mut bytes);
    }
    look(bytes, template.shape.format(), Some(template.shape));
}

fn set(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(part) = bytes.get_mut(at..at + value.len()) {
        part.copy_from_slice(value);
    }
}

/// Computes the checksums that the format has.
fn make_right(shape: Shape, bytes: &mut [u8]) {
    let crc = |bytes: &mut [u8], at: usize, len: usize| {
        if let Some(part) = bytes.get_mut(at..at + len) {
            let crc = crc_without(part, 4).to_le_bytes();
            part[4..8].copy_from_slice(&crc);
        }
    };
    let sum = |bytes: &mut [u8], at: usize, len: usize, field: usize| {
        if let Some(part) = bytes.get_mut(at..at + len) {
            part[field..field + 4].fill(0);
            let sum = part.iter().map(|byte| u32::from(*byte)).sum::<u32>();
            #[expect(clippy::big_endian_bytes, reason = "as VHD has it")]
            part[field..field + 4].copy_from_slice(&(!sum).to_be_bytes());
        }
    };
    match shape.format() {
        Format::Vhd => {
            let end = bytes.len().saturating_sub(512);
            sum(bytes, end, 512, 64);
            if shape == Shape::VhdDynamic {
                sum(bytes, 0, 512, 64);
                sum(bytes, 512, 1024, 36);
            }
        }
        Format::Vhdx => {
            for at in [64 << 10, 128 << 10] {
                crc(bytes, at, 4096);
            }
            for at in [192 << 10, 256 << 10] {
                crc(bytes, at, 64 << 10);
            }
        }
        _ => {}
    }
}

/// What has no tables, or is the input itself.
fn plain(which: usize, data: &[u8]) {
    match which {
        0 => look(data.to_vec(), Format::Vmdk, None),
        1 => {
            let mut text = b"# Disk DescriptorFile\nCID=7\ncreateType=\"custom\"\n".to_vec();
            text.extend_from_slice(data);
            look(text, Format::Vmdk, None);
        }
        2 => look(data.to_vec(), Format::Raw, None),
        _ => archive(data),
    }
}

/// An archive with the input as its OVF.
fn archive(data: &[u8]) {
    let mut bytes = Vec::new();
    for (name, contents) in [("a.ovf", data), ("d.vmdk", b"disk"), ("a.mf", data)] {
        let mut header = [0; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[124..135].copy_from_slice(format!("{:011o}", contents.len()).as_bytes());
        header[148..156].fill(b' ');
        header[156] = b'0';
        header[257..262].copy_from_slice(b"ustar");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(contents);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    for bytes in [bytes, data.to_vec()] {
        if let Ok(ova) = Ova::open(Arc::new(bytes)) {
            for index in 0..ova.disks().len() {
                drop(ova.verify(index));
                assert!(ova.disk(index).is_ok());
            }
        }
    }
}

/// Opens an image, alone and as a child, and reads it.
fn look(bytes: Vec<u8>, format: Format, shape: Option<Shape>) {
    let source: Arc<dyn Source> = Arc::new(bytes);
    drop(probe::choose(&*source, Some("vhd")));
    let mut open = |_: &str| Ok(source.clone());
    let Ok(layer) = probe::open(source.clone(), format, &mut open) else {
        return;
    };
    read(&*layer);
    if format == Format::Qcow2
        && let Ok(qcow2) = Qcow2::open(source.clone(), &mut open)
        && let Ok(snapshots) = qcow2.snapshots()
    {
        for snapshot in snapshots.iter().take(4) {
            read(&qcow2.at_snapshot(snapshot));
        }
    }
    let Some(shape) = shape else { return };
    let parent = TEMPLATES.iter().find(|template| template.shape == shape);
    let parent: Arc<dyn Source> = Arc::new(parent.expect("all are there").bytes.clone());
    if let Ok(parent) = probe::open(parent, format, &mut open) {
        let chain = Chain::new(vec![layer, parent]);
        let mut buf = vec![0; 65536];
        for at in [0, SIZE / 2, SIZE - 4096] {
            let len = chain.size().saturating_sub(at).min(buf.len() as u64);
            if len > 0 {
                drop(chain.read(at, &mut buf[..len as usize]));
            }
        }
    }
}

/// Walks over the map, which must have no gaps, and reads what is there.
fn read(layer: &dyn Layer) {
    let size = layer.facts().size;
    let (mut at, mut done, mut buf) = (0, 0, vec![0; 1 << 20]);
    for _ in 0..RUNS_MAX {
        if at >= size {
            break;
        }
        let Ok(run) = layer.run(at, size - at) else {
            break;
        };
        assert!(
            run.len > 0 && run.len <= size - at,
            "{run:?} at {at} of {size}"
        );
        if let Content::Data { source, .. } = run.content {
            assert!(source < layer.sources().len());
        }
        if matches!(run.content, Content::Data { .. } | Content::Packed) && done < READ_MAX {
            let len = run.len.min(buf.len() as u64);
            done += len;
            drop(layer.read(at, &mut buf[..len as usize]));
        }
        at += run.len;
    }
}
