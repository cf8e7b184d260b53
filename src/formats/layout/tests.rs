//! Images written by their plans are read back by the readers and by QEMU.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::*;
use crate::formats::chain::Chain;
use crate::formats::{FileSource, Layer, probe};

const SHAPES: [Shape; 10] = [
    Shape::Raw,
    Shape::VhdFixed,
    Shape::VhdDynamic,
    Shape::VhdxFixed,
    Shape::VhdxDynamic,
    Shape::VmdkFlat,
    Shape::VmdkSparse,
    Shape::VdiFixed,
    Shape::VdiDynamic,
    Shape::Qcow2,
];

/// Writes to a file, and checks the order of the pieces.
struct ToFile<'a> {
    file: File,
    disk: &'a [u8],
    end: u64,
    len: u64,
}

impl ToFile<'_> {
    fn put(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        assert!(at >= self.end, "a piece begins before the last one ends");
        self.end = at + bytes.len() as u64;
        assert!(self.end <= self.len, "a piece lies behind the end");
        self.file.write_all_at(bytes, at).unwrap();
        Ok(())
    }
}

impl Sink for ToFile<'_> {
    fn bytes(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.put(at, bytes)
    }

    fn repeat(&mut self, at: u64, from: u64, len: u64) -> Result<()> {
        assert!([at, from, len].iter().all(|n| n.is_multiple_of(ALIGN)));
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, from).unwrap();
        self.put(at, &bytes)
    }

    fn payload(&mut self, at: u64, disk: u64, len: u64) -> Result<()> {
        assert_eq!(at % ALIGN, disk % ALIGN, "payload is not aligned");
        let bytes = &self.disk[disk as usize..(disk + len) as usize];
        self.put(at, bytes)
    }
}

fn spec(shape: Shape, size: u64, name: &str) -> Spec {
    Spec {
        shape,
        size,
        sector: 512,
        ids: Ids {
            uuid: Uuid([0x11; 16]),
            others: [Uuid([0x22; 16]), Uuid([0x33; 16]), Uuid([0x44; 16])],
            cid: 0x1234_5678,
        },
        seconds: 1_700_000_000,
        name: name.to_owned(),
        parent: None,
    }
}

/// Lays `disk` out in `dir`; returns the file that was asked for.
fn lay_out(dir: &Path, spec: &Spec, disk: &[u8], map: &dyn Map) -> PathBuf {
    let plan = Plan::new(spec, map).unwrap();
    for planned in &plan.files {
        let name = planned.name.as_deref().unwrap_or(&spec.name);
        let options = File::options()
            .read(true)
            .write(true)
            .create(true)
            .to_owned();
        let file = options.open(dir.join(name)).unwrap();
        file.set_len(0).unwrap();
        file.set_len(planned.len).unwrap();
        let mut sink = ToFile {
            file,
            disk,
            end: 0,
            len: planned.len,
        };
        planned.emit(plan.size, &mut sink).unwrap();
    }
    dir.join(&spec.name)
}

fn open(path: &Path, format: Format) -> Box<dyn Layer> {
    let source = |path: &Path| -> Result<Arc<dyn crate::formats::Source>> {
        Ok(Arc::new(FileSource::new(File::open(path).unwrap())?))
    };
    let dir = path.parent().unwrap().to_owned();
    let opened = probe::open(source(path).unwrap(), format, &mut |name| {
        source(&dir.join(name))
    });
    opened.unwrap()
}

fn contents(chain: &Chain) -> Vec<u8> {
    let mut bytes = vec![0; chain.size() as usize];
    chain.read(0, &mut bytes).unwrap();
    bytes
}

/// A disk with data here and there: `(offset, length)` of each range, multiples of 4 KiB.
fn disk(size: u64, ranges: &[(u64, u64)]) -> (Vec<u8>, Vec<Range<u64>>) {
    let mut bytes = vec![0; size as usize];
    let mut map = Vec::new();
    for (at, len) in ranges {
        let end = (at + len).min(size);
        for (i, byte) in bytes[*at as usize..end as usize].iter_mut().enumerate() {
            *byte = (i % 251 + (*at as usize >> 12)) as u8 | 1;
        }
        map.push(*at..end);
    }
    (bytes, map)
}

fn qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        eprintln!("qemu-img is not installed: its part of this test is left out");
    }
    found
}

fn run_qemu(args: &[&str]) {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
}

/// The disk is of the same size and contents for QEMU as the raw file `flat`.
fn compare(path: &str, format: &str, flat: &str) {
    run_qemu(&["compare", "-q", "-f", format, "-F", "raw", path, flat]);
    // A difference in size is none to it where the rest is zero.
    let info = ["info", "--output=json", "-f", format, path];
    let output = Command::new("qemu-img").args(info).output().unwrap();
    let info: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let size = std::fs::metadata(flat).unwrap().len();
    assert_eq!(info["virtual-size"].as_u64(), Some(size), "{path}");
}

fn qemu_name(format: Format) -> &'static str {
    match format {
        Format::Vhd => "vpc",
        other => other.name(),
    }
}

fn extension(format: Format) -> &'static str {
    match format {
        Format::Raw => "img",
        other => other.name(),
    }
}

#[test]
fn every_shape_is_read_back_and_by_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = qemu();
    let sizes: [(u64, &[(u64, u64)]); 4] = [
        (
            20 << 20,
            &[
                (0, 4096),
                (64 << 10, 8192),
                (3 << 20, 3 << 20),
                (19 << 20, 1 << 20),
            ],
        ),
        ((9 << 20) + 512, &[(1 << 20, 4096), (9 << 20, 4096)]),
        (5 << 20, &[]),
        (512, &[(0, 4096)]),
    ];
    for (size, ranges) in sizes {
        let (bytes, map) = disk(size, ranges);
        let flat = dir.path().join("disk.raw");
        std::fs::write(&flat, &bytes).unwrap();
        for shape in SHAPES {
            let format = shape.format();
            let name = format!("{shape:?}-{size}.{}", extension(format));
            let path = lay_out(dir.path(), &spec(shape, size, &name), &bytes, &map);
            let chain = Chain::new(vec![open(&path, format)]);
            assert_eq!(chain.size(), size, "{name}");
            assert!(contents(&chain) == bytes, "{name}: the contents differ");
            if !qemu {
                continue;
            }
            let (path, flat) = (path.to_str().unwrap(), flat.to_str().unwrap());
            let format = qemu_name(format);
            compare(path, format, flat);
            if matches!(format, "qcow2" | "vdi" | "vhdx") || shape == Shape::VmdkSparse {
                run_qemu(&["check", "-q", "-f", format, path]);
            }
        }
    }
}

#[test]
fn an_unaligned_raw_disk_grows_to_a_sector() {
    let dir = tempfile::tempdir().unwrap();
    let (mut bytes, map) = disk(10_000, &[(0, 10_000)]);
    let sized = |shape: Shape| {
        let format = shape.format();
        let path = lay_out(
            dir.path(),
            &spec(shape, 10_000, &format!("{shape:?}")),
            &bytes,
            &map,
        );
        contents(&Chain::new(vec![open(&path, format)]))
    };
    let all: Vec<Vec<u8>> = SHAPES.into_iter().map(sized).collect();
    assert!(all[0] == bytes);
    bytes.resize(10_240, 0);
    for (shape, got) in SHAPES.iter().zip(&all).skip(1) {
        assert!(*got == bytes, "{shape:?}");
    }
}

#[test]
fn large_disks_have_small_tables() {
    let size = 100_u64 << 30;
    let dense: Vec<Range<u64>> = std::iter::once(0..size).collect();
    let sparse: Vec<Range<u64>> = (0..100).map(|i| i << 30..(i << 30) + 4096).collect();
    struct Sum(u64, u64);
    impl Sink for Sum {
        fn bytes(&mut self, _: u64, bytes: &[u8]) -> Result<()> {
            let blocks = bytes.chunks(4096).filter(|b| b.iter().any(|b| *b != 0));
            self.0 += blocks.count() as u64 * 4096;
            Ok(())
        }
        fn repeat(&mut self, _: u64, _: u64, _: u64) -> Result<()> {
            Ok(())
        }
        fn payload(&mut self, _: u64, _: u64, len: u64) -> Result<()> {
            self.1 += len;
            Ok(())
        }
    }
    for shape in SHAPES {
        if shape == Shape::VmdkSparse {
            continue; // VMware's grains: 12 MiB
        }
        for map in [&dense, &sparse] {
            let plan = Plan::new(&spec(shape, size, "a.vmdk"), map).unwrap();
            let mut sum = Sum(0, 0);
            for file in &plan.files {
                file.emit(plan.size, &mut sum).unwrap();
            }
            assert!(sum.0 < 5 << 20, "{shape:?}: {} bytes of tables", sum.0);
            let whole = shape.is_fixed() || map.len() == 1;
            assert!(!whole || sum.1 == size, "{shape:?}: {}", sum.1);
        }
    }
}

#[test]
fn a_disk_with_large_sectors_stays_one_as_vhdx() {
    let dir = tempfile::tempdir().unwrap();
    let (bytes, map) = disk(10 << 20, &[(0, 4096), (8 << 20, 1 << 20)]);
    let mut spec = spec(Shape::VhdxDynamic, 10 << 20, "a.vhdx");
    spec.sector = 4096;
    let path = lay_out(dir.path(), &spec, &bytes, &map);
    let layer = open(&path, Format::Vhdx);
    assert_eq!(layer.facts().sector, 4096);
    assert!(contents(&Chain::new(vec![layer])) == bytes);
}

/// Knows which of its bytes repeat, and counts what is read.
#[derive(Debug)]
struct Knowing {
    bytes: Vec<u8>,
    reads: std::sync::atomic::AtomicU64,
}

impl crate::formats::Source for Knowing {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.reads
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.bytes.read_at(offset, buf)
    }

    fn repeats(&self, offset: u64, len: u64, stride: u64) -> Result<u64> {
        let part = |at: u64| self.bytes.get(at as usize..(at + len) as usize);
        let next = |n: &u64| part(offset + n * stride) == part(offset);
        Ok((1..).take_while(next).count() as u64)
    }
}

#[test]
fn bitmaps_of_a_vhd_that_are_known_to_repeat_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let (bytes, map) = disk(24 << 20, &[(0, 24 << 20)]);
    let spec = spec(Shape::VhdDynamic, 24 << 20, "a.vhd");
    let path = lay_out(dir.path(), &spec, &bytes, &map);
    let look = |cut: Option<usize>| {
        let mut bytes = std::fs::read(&path).unwrap();
        if let Some(block) = cut {
            // Its first sector: the bitmaps before it, and behind it, say what they did.
            let at = 2 * 4096 - 512 + block * ((2 << 20) + 4096);
            assert_eq!(bytes[at..at + 512], [0xff; 512]);
            bytes[at] = 0x7f;
        }
        let source = Arc::new(Knowing {
            bytes,
            reads: Default::default(),
        });
        let open = &mut |_: &str| unreachable!();
        let layer = probe::open(source.clone(), Format::Vhd, open).unwrap();
        let read = contents(&Chain::new(vec![layer]));
        (
            read,
            source.reads.load(std::sync::atomic::Ordering::Relaxed),
        )
    };
    let (whole, reads) = look(None);
    assert!(whole == bytes);
    let mut expected = bytes;
    expected[7 * (2 << 20)..][..512].fill(0);
    let (cut, more) = look(Some(7));
    assert!(cut == expected, "the bit that is clear");
    // One bitmap for all; and three more: before the gap, in it, behind it.
    assert!(more <= reads + 3, "{reads} {more}");
}

#[test]
fn images_of_differences_hold_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    let (base, base_map) = disk(9 << 20, &[(0, 3 << 20), (5 << 20, 1 << 20)]);
    let mut changed = base.clone();
    let mut differs = Vec::new();
    for (at, len, byte) in [
        (8192_u64, 4096_u64, 7_u8),
        (65536, 12288, 0),
        (4 << 20, 4096, 9),
        ((9 << 20) - 4096, 4096, 3),
    ] {
        changed[at as usize..(at + len) as usize].fill(byte);
        differs.push(at..at + len);
    }
    for shape in [
        Shape::VhdDynamic,
        Shape::VhdxDynamic,
        Shape::VmdkSparse,
        Shape::VdiDynamic,
        Shape::Qcow2,
    ] {
        let format = shape.format();
        let extension = extension(format);
        let parent_spec = spec(shape, 9 << 20, &format!("base.{extension}"));
        let parent_path = lay_out(dir.path(), &parent_spec, &base, &base_map);
        let parent = open(&parent_path, format);
        let mut child_spec = spec(shape, 9 << 20, &format!("child.{extension}"));
        child_spec.ids.uuid = Uuid([0x77; 16]);
        child_spec.ids.cid = 77;
        child_spec.parent = Some(Parent {
            name: parent_spec.name.clone(),
            absolute: None,
            identity: parent.facts().identity,
            version: parent.facts().version,
            format,
        });
        let path = lay_out(dir.path(), &child_spec, &changed, &differs);
        let child = open(&path, format);
        let named = child.facts().parent.clone().expect("it has a parent");
        assert_eq!(named.identity, parent.facts().identity, "{format}");
        match format {
            Format::Vdi => assert_eq!(named.version, parent.facts().version),
            _ => assert!(named.names[0].ends_with(&parent_spec.name), "{named:?}"),
        }
        let chain = Chain::new(vec![child, parent]);
        assert!(contents(&chain) == changed, "{format}: the contents differ");
        assert!(std::fs::metadata(&path).unwrap().len() < 8 << 20 || format != Format::Qcow2);
        if qemu() && matches!(format, Format::Qcow2 | Format::Vmdk) {
            let flat = dir.path().join("changed.raw");
            std::fs::write(&flat, &changed).unwrap();
            let (path, flat) = (path.to_str().unwrap(), flat.to_str().unwrap());
            compare(path, format.name(), flat);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let none: Vec<Range<u64>> = Vec::new();
    for (shape, size) in [
        (Shape::VhdDynamic, 2041_u64 << 30),
        (Shape::VhdxDynamic, 65 << 40),
        (Shape::VmdkFlat, 63 << 40),
        (Shape::Qcow2, 0),
    ] {
        assert!(
            Plan::new(&spec(shape, size, "a"), &none).is_err(),
            "{shape:?}"
        );
    }
    assert!(Shape::of(Format::Vhd, Some("sideways")).is_err());
    assert_eq!(
        Shape::of(Format::Vdi, Some("FIXED")).unwrap(),
        Shape::VdiFixed
    );
}

/// The disk as an image that holds all of it.
fn as_chain(dir: &Path, bytes: &[u8]) -> Chain {
    let path = dir.join("source.raw");
    std::fs::write(&path, bytes).unwrap();
    Chain::new(vec![open(&path, Format::Raw)])
}

#[test]
fn compressed_images_are_read_back_and_by_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = qemu();
    let (mut bytes, map) = disk(
        (70 << 20) + 512,
        &[
            (0, 4096),
            (64 << 10, 200 << 10),
            (40 << 20, 4096),
            (70 << 20, 512),
        ],
    );
    // Some of it does not shrink.
    let mut number = 88172645463325252_u64;
    for byte in &mut bytes[64 << 10..160 << 10] {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        *byte = number as u8;
    }
    let chain = as_chain(dir.path(), &bytes);
    let flat = dir.path().join("source.raw");
    let size = bytes.len() as u64;
    for (name, format) in [("a.vmdk", Format::Vmdk), ("a.qcow2", Format::Qcow2)] {
        let path = dir.path().join(name);
        let mut file = File::create(&path).unwrap();
        let spec = spec(Shape::Qcow2, size, name);
        let mut done = 0;
        let progress: Progress<'_> = &mut |bytes| done += bytes;
        let written = match format {
            Format::Vmdk => stream_optimized(&spec, (&chain, &map), &mut file, progress),
            _ => compressed_qcow2(&spec, (&chain, &map), &mut file, progress),
        };
        assert_eq!(written.unwrap(), std::fs::metadata(&path).unwrap().len());
        assert!(done > 0);
        let read = Chain::new(vec![open(&path, format)]);
        assert!(contents(&read) == bytes, "{name}: the contents differ");
        if qemu {
            let (path, flat) = (path.to_str().unwrap(), flat.to_str().unwrap());
            compare(path, format.name(), flat);
            run_qemu(&["check", "-q", "-f", format.name(), path]);
        }
    }
}

#[test]
fn new_ids_change_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (bytes, map) = disk(9 << 20, &[(0, 4096), (3 << 20, 1 << 20)]);
    let mut ids = spec(Shape::Raw, 0, "").ids;
    ids.uuid = Uuid([0xaa; 16]);
    ids.cid = 0xfeed_beef;
    for shape in SHAPES {
        let format = shape.format();
        let name = format!("{shape:?}.{}", extension(format));
        let path = lay_out(dir.path(), &spec(shape, 9 << 20, &name), &bytes, &map);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let source = FileSource::new(file.try_clone().unwrap()).unwrap();
        let edits = renew(&source, format, &ids);
        if matches!(shape, Shape::Raw | Shape::Qcow2 | Shape::VmdkFlat) {
            assert!(edits.is_err(), "{shape:?}");
            continue;
        }
        for (at, bytes) in edits.unwrap() {
            file.write_all_at(&bytes, at).unwrap();
        }
        let layer = open(&path, format);
        let expected = match format {
            Format::Vmdk => Identity::Cid(ids.cid),
            _ => Identity::Uuid(ids.uuid),
        };
        assert_eq!(layer.facts().identity, Some(expected), "{shape:?}");
        assert!(contents(&Chain::new(vec![layer])) == bytes, "{shape:?}");
        if qemu() && format != Format::Vhd {
            run_qemu(&["check", "-q", "-f", format.name(), path.to_str().unwrap()]);
        }
    }
}

#[test]
fn new_ids_of_a_fixed_vhd_leave_the_first_sector_to_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let ids = spec(Shape::Raw, 0, "").ids;
    let (bytes, map) = disk(9 << 20, &[(0, 4096)]);
    let image = |shape| {
        let path = lay_out(dir.path(), &spec(shape, 9 << 20, "x.vhd"), &bytes, &map);
        std::fs::read(path).unwrap()
    };
    // Some products write zeros, or anything, where no header follows.
    let mut fixed = image(Shape::VhdFixed);
    let footer = fixed.len() - 512;
    fixed[footer + 16..footer + 24].fill(0);
    let sum = crate::formats::vhd::checksum(&fixed[footer..], 64);
    fixed[footer + 64..footer + 68].copy_from_slice(&sum.to_be_bytes());
    let edits = renew(&fixed, Format::Vhd, &ids).unwrap();
    assert_eq!(edits.len(), 1);
    assert_eq!(edits[0].0, footer as u64);
    let mut dynamic = image(Shape::VhdDynamic);
    assert_eq!(renew(&dynamic, Format::Vhd, &ids).unwrap().len(), 2);
    dynamic[100] ^= 1;
    assert!(renew(&dynamic, Format::Vhd, &ids).is_err(), "a broken copy");
}
