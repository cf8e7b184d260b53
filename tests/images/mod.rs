//! What the tests of image formats share: disks with known contents, and reading images back.

#![allow(dead_code, reason = "each file of tests uses a part of this")]
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use nodupe::device::SplitMix64;
use nodupe::formats::chain::Chain;
use nodupe::formats::{FileSource, Format, Identity, Layer, Source, probe};

/// A disk of `size` bytes with data here and there, all of it in blocks of 4 KiB; returns how many
/// bytes of data.
pub(crate) fn disk(size: usize) -> (Vec<u8>, u64) {
    let mut bytes = vec![0; size];
    let mut random = SplitMix64::new(7);
    let mut data = 0;
    for (at, len) in [
        (0, 4096),
        (1 << 20, 300 << 10),
        (5 << 20, 4 << 20),
        ((16 << 20) + 8192, 4096),
        (size - 8192, 8192),
    ] {
        for part in bytes[at..at + len].chunks_mut(8) {
            let number = random.next() | 1;
            part.copy_from_slice(&number.to_le_bytes()[..part.len()]);
        }
        data += len as u64;
    }
    (bytes, data)
}

fn layer(path: &Path, format: Option<Format>) -> Box<dyn Layer> {
    let source = |path: &Path| -> Arc<dyn Source> {
        Arc::new(FileSource::new(File::open(path).unwrap()).unwrap())
    };
    let main = source(path);
    let format = format.unwrap_or_else(|| probe::probe(&*main).unwrap());
    let dir = path.parent().unwrap().to_owned();
    probe::open(main, format, &mut |name| Ok(source(&dir.join(name)))).unwrap()
}

/// The identity of an image.
pub(crate) fn identity(path: &Path) -> Option<Identity> {
    layer(path, None).facts().identity
}

/// Contents of an image with its parents, which stand beside it.
pub(crate) fn contents(path: &Path, format: Format) -> Vec<u8> {
    let mut layers = vec![layer(path, Some(format))];
    while let Some(parent) = layers.last().unwrap().facts().parent.clone() {
        let name = parent.names[0].rsplit(['/', '\\']).next().unwrap();
        let format = match parent.format.as_deref() {
            Some("raw") => Some(Format::Raw),
            _ => None,
        };
        let found = layer(&path.with_file_name(name), format);
        assert!(parent.identity.is_none() || parent.identity == found.facts().identity);
        layers.push(found);
    }
    let chain = Chain::new(layers);
    let mut bytes = vec![0; chain.size() as usize];
    chain.read(0, &mut bytes).unwrap();
    bytes
}

/// True if QEMU's tool is there; says so if not.
pub(crate) fn has_qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        eprintln!("qemu-img is missing, its part is left out: run scripts/setup");
    }
    found
}

/// QEMU's name of the format that a file's extension names.
pub(crate) fn qemu_format(path: &Path) -> String {
    let extension = path.extension().unwrap().to_str().unwrap();
    match extension {
        "vhd" => "vpc".to_owned(),
        other => other.to_owned(),
    }
}

/// QEMU reads the same from an image as from a raw file of equal size.
pub(crate) fn qemu_compares(path: &Path, raw: &Path) {
    let format = qemu_format(path);
    let run = |args: &[&str]| {
        let output = Command::new("qemu-img").args(args).output().unwrap();
        assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
        output.stdout
    };
    let (path, raw_path) = (path.to_str().unwrap(), raw.to_str().unwrap());
    run(&["compare", "-q", "-f", &format, "-F", "raw", path, raw_path]);
    let info = run(&["info", "--output=json", "-f", &format, path]);
    let info: serde_json::Value = serde_json::from_slice(&info).unwrap();
    let size = std::fs::metadata(raw).unwrap().len();
    assert_eq!(info["virtual-size"].as_u64(), Some(size), "{path}");
    if matches!(format.as_str(), "qcow2" | "vdi" | "vhdx") {
        run(&["check", "-q", "-f", &format, path]);
    }
}
