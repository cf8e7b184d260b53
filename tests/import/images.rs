//! Images of every format, made by the project's own plans.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nodupe::error::Result;
use nodupe::formats::layout::{Ids, Parent, Plan, Shape, Sink, Spec};
use nodupe::formats::{Format, Identity};

/// Bytes of the disks here: no multiple of a large block.
pub(crate) const SIZE: u64 = (5 << 20) + 8192;

/// Formats that have children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Vhd,
    Vhdx,
    Vmdk,
    Qcow2,
    Vdi,
}

impl Kind {
    pub(crate) const ALL: [Kind; 5] = [Kind::Vhd, Kind::Vhdx, Kind::Vmdk, Kind::Qcow2, Kind::Vdi];

    fn shape(self) -> Shape {
        match self {
            Kind::Vhd => Shape::VhdDynamic,
            Kind::Vhdx => Shape::VhdxDynamic,
            Kind::Vmdk => Shape::VmdkSparse,
            Kind::Qcow2 => Shape::Qcow2,
            Kind::Vdi => Shape::VdiDynamic,
        }
    }

    fn format(self) -> Format {
        self.shape().format()
    }

    pub(crate) fn extension(self) -> &'static str {
        self.format().name()
    }
}

/// Bytes without a pattern.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Contents of a disk, and where it differs from its parent.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    pub(crate) bytes: Vec<u8>,
    changed: Vec<Range<u64>>,
}

impl Disk {
    /// A disk of its own.
    pub(crate) fn base(seed: u64) -> Self {
        let mut bytes = vec![0; SIZE as usize];
        let ranges = [0..65536_u64, 1 << 20..(2 << 20) + 4096, SIZE - 8192..SIZE];
        for range in &ranges {
            let part = &mut bytes[range.start as usize..range.end as usize];
            part.copy_from_slice(&noise(seed + range.start, part.len()));
        }
        Self {
            bytes,
            changed: ranges.to_vec(),
        }
    }

    /// With new data and zeros over the parent's, in places of its own.
    pub(crate) fn child(&self, seed: u64) -> Self {
        let mut bytes = self.bytes.clone();
        let data = (1 << 20) + seed % 31 * 32768;
        let zero = (1 << 20) + (seed * 7 + 3) % 61 * 16384;
        let at = data as usize;
        bytes[at..at + 8192].copy_from_slice(&noise(seed, 8192));
        bytes[zero as usize..zero as usize + 4096].fill(0);
        let mut changed = vec![data..data + 8192, zero..zero + 4096];
        changed.sort_by_key(|range| range.start);
        if changed[0].end >= changed[1].start {
            let end = changed[0].end.max(changed[1].end);
            changed.truncate(1);
            changed[0].end = end;
        }
        Self { bytes, changed }
    }
}

struct ToFile<'a> {
    file: &'a File,
    disk: &'a [u8],
}

impl Sink for ToFile<'_> {
    fn bytes(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, at).unwrap();
        Ok(())
    }

    fn repeat(&mut self, at: u64, from: u64, len: u64) -> Result<()> {
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, from).unwrap();
        self.bytes(at, &bytes)
    }

    fn payload(&mut self, at: u64, disk: u64, len: u64) -> Result<()> {
        self.bytes(at, &self.disk[disk as usize..(disk + len) as usize])
    }
}

/// Writes `NAME.EXTENSION`, of differences if there is a parent, which is given by its name without
/// extension and its ids.
pub(crate) fn write(
    dir: &Path,
    name: &str,
    kind: Kind,
    disk: &Disk,
    parent: Option<&(String, Ids)>,
) -> Ids {
    let ids = Ids::random().unwrap();
    let file_name = format!("{name}.{}", kind.extension());
    let identity = |ids: &Ids| match kind {
        Kind::Vmdk => Some(Identity::Cid(ids.cid)),
        Kind::Qcow2 => None,
        _ => Some(Identity::Uuid(ids.uuid)),
    };
    let described = parent.map(|(name, ids)| Parent {
        name: format!("{name}.{}", kind.extension()),
        absolute: None,
        identity: identity(ids),
        version: (kind == Kind::Vdi).then_some(ids.others[0]),
        format: kind.format(),
    });
    let spec = Spec {
        shape: kind.shape(),
        size: SIZE,
        sector: 512,
        ids,
        seconds: 1_700_000_000,
        name: file_name.clone(),
        parent: described,
    };
    let plan = Plan::new(&spec, &disk.changed).unwrap();
    let [planned] = &plan.files[..] else {
        panic!("these shapes have one file");
    };
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(dir.join(file_name))
        .unwrap();
    file.set_len(planned.len).unwrap();
    let mut sink = ToFile {
        file: &file,
        disk: &disk.bytes,
    };
    planned.emit(SIZE, &mut sink).unwrap();
    ids
}

/// A disk and `depth` children, each of the one before: `KIND-0` to `KIND-DEPTH`.
pub(crate) fn chain(dir: &Path, kind: Kind, depth: usize) -> Vec<(String, Disk)> {
    let mut disks: Vec<(String, Disk)> = Vec::new();
    let mut parent: Option<(String, Ids)> = None;
    for i in 0..=depth {
        let name = format!("{kind:?}-{i}");
        let disk = match disks.last() {
            None => Disk::base(1),
            Some((_, last)) => last.child(i as u64),
        };
        let ids = write(dir, &name, kind, &disk, parent.as_ref());
        parent = Some((name.clone(), ids));
        disks.push((format!("{name}.{}", kind.extension()), disk));
    }
    disks
}
