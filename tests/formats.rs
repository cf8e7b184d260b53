//! Readers of image formats: images of every kind that the project makes itself, or that are put
//! together here, read as written; those that lie are refused.
//!
//! Images of real products, and broken ones, are not part of the project (their licences forbid it):
//! `NODUPE_SAMPLES` and `NODUPE_HOSTILE` name folders with them, unpacked.
#![allow(clippy::unwrap_used)]

#[path = "import/images.rs"]
mod images;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nodupe::error::Result;
use nodupe::formats::Format;
use nodupe::formats::chain::Chain;
use nodupe::transfer::Library;

use images::{Disk, Kind, chain, write};
use sha2::{Digest, Sha256};

/// The disk of a file, with its parents, as an import finds them.
fn disk(path: &Path, format: Option<Format>) -> Result<Chain> {
    let mut library = Library::new();
    library.add_file(path, format)?;
    library.resolve();
    let wanted = |(_, image): &(usize, &nodupe::transfer::Image)| image.wanted;
    let (index, _) = (0..).zip(library.images()).find(wanted).unwrap();
    library.verify(index)?;
    library.disk(index)
}

fn digest(chain: &Chain) -> Result<String> {
    let size = chain.size();
    let mut sha = Sha256::new();
    sha.update(format!("sparse64k-v1:{size}\n"));
    let (mut at, mut buf) = (0, vec![0; 65536]);
    while at < size {
        let len = (size - at).min(65536);
        let (_, run) = chain.run(at, size - at)?;
        if run.content == nodupe::formats::Content::Zero && run.len > 65536 {
            at += run.len / 65536 * 65536;
            continue;
        }
        let part = &mut buf[..len as usize];
        chain.read(at, part)?;
        if part.iter().any(|b| *b != 0) {
            sha.update(at.to_le_bytes());
            sha.update(&*part);
        }
        at += len;
    }
    Ok(sha.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// All bytes of a disk.
fn read(path: &Path) -> Result<Vec<u8>> {
    let disk = disk(path, None)?;
    let mut bytes = vec![0; disk.size() as usize];
    disk.read(0, &mut bytes)?;
    Ok(bytes)
}

fn patch(path: &Path, at: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

#[test]
fn chains_read_as_written() {
    for kind in Kind::ALL {
        let home = tempfile::tempdir().unwrap();
        for (name, disk) in chain(home.path(), kind, 4) {
            assert!(
                read(&home.path().join(&name)).unwrap() == disk.bytes,
                "{name}"
            );
        }
    }
}

#[test]
fn a_clear_bit_of_a_vhd_is_the_parents_sector() {
    let home = tempfile::tempdir().unwrap();
    let disks = chain(home.path(), Kind::Vhd, 1);
    let child = home.path().join("Vhd-1.vhd");
    let bytes = fs::read(&child).unwrap();
    // The first block that is there: its bitmap stands where the table says.
    let number = |at: usize| u32::from_str_radix(&hex(&bytes[at..at + 4]), 16).unwrap();
    let table = number(512 + 20) as usize;
    let block = (0..3).find(|i| number(table + i * 4) != u32::MAX).unwrap();
    let bitmap = u64::from(number(table + block * 4)) * 512;
    let old = &bytes[bitmap as usize..bitmap as usize + 512];
    let new: Vec<u8> = old.iter().map(|bits| bits & 0b1010_1010).collect();
    assert!(old != new);
    patch(&child, bitmap, &new);
    let mut wanted = disks[1].1.bytes.clone();
    for sector in (block * 4096..(block + 1) * 4096).filter(|sector| sector % 2 == 1) {
        let range = sector * 512..(sector + 1) * 512;
        wanted[range.clone()].copy_from_slice(&disks[0].1.bytes[range]);
    }
    assert!(read(&child).unwrap() == wanted);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A flat parent `p.vmdk` of 8 MiB, and `c.vmdk` with one extent of ESX.
fn esx(dir: &Path, kind: &str, extent: &[u8]) -> Vec<u8> {
    let parent = images::noise(3, 8 << 20);
    fs::write(dir.join("p-flat.vmdk"), &parent).unwrap();
    let text = |own: &str, parent: &str, extent: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID={own}\nparentCID={parent}\n\
             createType=\"vmfs\"\nparentFileNameHint=\"p.vmdk\"\n{extent}\n"
        )
    };
    let flat = text("0000000a", "ffffffff", "RW 16384 VMFS \"p-flat.vmdk\"");
    fs::write(
        dir.join("p.vmdk"),
        flat.replace("parentFileNameHint=\"p.vmdk\"\n", ""),
    )
    .unwrap();
    let line = format!("RW 16384 {kind} \"c-delta.vmdk\"");
    fs::write(dir.join("c.vmdk"), text("0000000b", "0000000a", &line)).unwrap();
    fs::write(dir.join("c-delta.vmdk"), extent).unwrap();
    parent
}

fn put32(bytes: &mut [u8], at: usize, numbers: &[u32]) {
    for (i, number) in numbers.iter().enumerate() {
        bytes[at + i * 4..at + i * 4 + 4].copy_from_slice(&number.to_le_bytes());
    }
}

fn put64(bytes: &mut [u8], at: usize, number: u64) {
    bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
}

#[test]
fn deltas_of_esx_are_read() {
    // COWD: sectors as grains, four tables of which one is there.
    let mut cowd = vec![0; 41 * 512];
    cowd[..4].copy_from_slice(b"COWD");
    put32(&mut cowd, 4, &[1, 3, 16384, 1, 4, 4]);
    put32(&mut cowd, 4 * 512, &[8]);
    put32(&mut cowd, 8 * 512 + 5 * 4, &[40]);
    cowd[40 * 512..].fill(0x5a);
    let home = tempfile::tempdir().unwrap();
    let mut wanted = esx(home.path(), "VMFSSPARSE", &cowd);
    wanted[5 * 512..6 * 512].fill(0x5a);
    assert!(read(&home.path().join("c.vmdk")).unwrap() == wanted);

    // seSparse: grains of 4 KiB; one there, one zero.
    let mut sparse = vec![0; (80 + 24) * 512];
    for (at, number) in [
        (0, 0xcafe_babe),
        (8, 0x2_0000_0001),
        (16, 16384),
        (24, 8),
        (32, 64),
        (80, 1),
        (128, 8),
        (144, 16),
        (192, 80),
        (512, 0xcafe_cafe),
        (8 * 512, 1 << 60),
        (16 * 512 + 3 * 8, 3 << 60 | 2 << 48),
        (16 * 512 + 4 * 8, 2 << 60),
    ] {
        put64(&mut sparse, at, number);
    }
    sparse[96 * 512..].fill(0xa5);
    let home = tempfile::tempdir().unwrap();
    let mut wanted = esx(home.path(), "SESPARSE", &sparse);
    wanted[3 * 4096..4 * 4096].fill(0xa5);
    wanted[4 * 4096..5 * 4096].fill(0);
    assert!(read(&home.path().join("c.vmdk")).unwrap() == wanted);
    patch(
        &home.path().join("p.vmdk"),
        0,
        b"# Disk DescriptorFile\nversion=2\nCID=0000000c",
    );
    let why = read(&home.path().join("c.vmdk")).unwrap_err().to_string();
    assert!(why.contains("its CID differs"), "{why}");
}

#[test]
fn what_lies_is_refused() {
    for kind in Kind::ALL {
        let home = tempfile::tempdir().unwrap();
        write(home.path(), "disk", kind, &Disk::base(1), None);
        let path = home.path().join(format!("disk.{}", kind.extension()));
        let len = fs::metadata(&path).unwrap().len();
        let whole = fs::read(&path).unwrap();
        // Cut off anywhere, it is refused; a VHD has the copy of its footer, and no more than that.
        for cut in [0, 1, 300, 512, 4096, 65536, len / 2, len - 65536] {
            fs::write(&path, &whole[..cut as usize]).unwrap();
            assert!(read(&path).is_err(), "{kind:?} cut at {cut}");
        }
        // Tables that claim more than the file has.
        let (at, value): (u64, &[u8]) = match kind {
            Kind::Vhd => (512 + 28, &[0x7f; 4]),
            Kind::Vhdx => (3 << 20, &[0x06, 0, 0, 0, 0, 0, 0xff, 0xff]),
            Kind::Vmdk => (56, &[0x7f; 8]),
            Kind::Qcow2 => (36, &[0x7f; 4]),
            Kind::Vdi => (384, &[0x7f; 4]),
        };
        fs::write(&path, &whole).unwrap();
        patch(&path, at, value);
        let outcome = read(&path);
        // The second directory of a VMDK is whole: then the first one's damage is told.
        let survives = kind == Kind::Vmdk && outcome.is_ok();
        assert!(outcome.is_err() || survives, "{kind:?}");
    }
}

/// What an import of `home` would make, and what it could not, in words.
fn found(home: &Path) -> (Vec<(String, Format)>, String) {
    let mut library = Library::new();
    library.add_tree(home, Path::new("")).unwrap();
    library.resolve();
    let images = library.images().iter().filter(|image| image.wanted);
    let name = |image: &nodupe::transfer::Image| image.place.display().to_string();
    let mut made: Vec<_> = images.map(|i| (name(i), i.facts.format)).collect();
    made.sort_by(|a, b| a.0.cmp(&b.0));
    let told = |t: &nodupe::transfer::Trouble| format!("{}: {}\n", t.path.display(), t.error);
    let told = library.troubles().map(told).collect();
    (made, told)
}

#[test]
fn an_extent_that_looks_like_an_image_is_no_disk() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path();
    write(dir, "a-flat", Kind::Vmdk, &Disk::base(1), None);
    let len = fs::metadata(dir.join("a-flat.vmdk")).unwrap().len();
    let text = |name: &str, sectors: u64| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\n\
             createType=\"monolithicFlat\"\nRW {sectors} FLAT \"{name}\" 0\n"
        )
    };
    fs::write(dir.join("a.vmdk"), text("a-flat.vmdk", len / 512)).unwrap();
    // An extent that claims another disk as its own.
    write(dir, "victim", Kind::Vmdk, &Disk::base(2), None);
    fs::write(
        dir.join("b-flat.vmdk"),
        text("victim.vmdk", 1) + &"#".repeat(512),
    )
    .unwrap();
    fs::write(dir.join("b.vmdk"), text("b-flat.vmdk", 1)).unwrap();
    let (made, told) = found(dir);
    let wanted = ["a.vmdk", "b.vmdk", "victim.vmdk"];
    assert_eq!(made, wanted.map(|name| (name.to_owned(), Format::Vmdk)));
    for name in ["a-flat.vmdk: it looks like vmdk", "b-flat.vmdk: it looks"] {
        assert!(told.contains(name), "{told}");
    }
}

#[test]
fn samples() {
    let Some(dir) = std::env::var_os("NODUPE_SAMPLES") else {
        eprintln!("samples of real products: NOT RUN: NODUPE_SAMPLES names none");
        return;
    };
    let dir = PathBuf::from(dir);
    let text = std::fs::read_to_string(dir.join("MANIFEST.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let (mut good, mut bad) = (0, 0);
    for s in json["samples"].as_array().unwrap() {
        let id = s["id"].as_str().unwrap();
        let path = dir.join(id).join(s["main"].as_str().unwrap());
        let got = disk(&path, None).and_then(|c| digest(&c).map(|d| (c.size(), d)));
        let want = (
            s["truth"]["size"].as_u64(),
            s["truth"]["sparse_sha256"].as_str(),
        );
        let positive = s["kind"] == "positive";
        let ok = match &got {
            Ok((size, d)) => positive && Some(*size) == want.0 && Some(d.as_str()) == want.1,
            Err(_) => !positive,
        };
        if ok {
            good += 1
        } else {
            bad += 1
        }
        eprintln!(
            "{} {id} {} -> {got:?} want {want:?}",
            if ok { "ok" } else { "BAD" },
            s["kind"]
        );
    }
    eprintln!("good {good} bad {bad}");
    assert_eq!(bad, 0);
}

#[test]
fn hostile() {
    let Some(dir) = std::env::var_os("NODUPE_HOSTILE") else {
        eprintln!("broken images kept elsewhere: NOT RUN: NODUPE_HOSTILE names none");
        return;
    };
    let dir = PathBuf::from(dir);
    let text = std::fs::read_to_string(dir.join("MANIFEST.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let (mut good, mut bad) = (0, 0);
    for s in json["cases"].as_array().unwrap() {
        let id = s["id"].as_str().unwrap();
        let from = (s["format"] == "raw").then_some(Format::Raw);
        let path = dir.join(s["main"].as_str().unwrap());
        let begun = std::time::Instant::now();
        let got = disk(&path, from).and_then(|c| {
            if c.size() > 1 << 33 {
                Ok((c.size(), String::new()))
            } else {
                digest(&c).map(|d| (c.size(), d))
            }
        });
        let truth = s["truth"]["sparse_sha256"].as_str();
        let is_truth = matches!(&got, Ok((_, d)) if Some(d.as_str()) == truth);
        let ok = match s["expect"].as_str().unwrap() {
            "refuse" => got.is_err(),
            "truth" => is_truth,
            "refuse-or-truth" => got.is_err() || is_truth,
            _ => true,
        };
        if ok {
            good += 1
        } else {
            bad += 1
        }
        eprintln!(
            "{} {id} {} {:?} -> {got:?}",
            if ok { "ok" } else { "BAD" },
            s["expect"],
            begun.elapsed()
        );
    }
    eprintln!("good {good} bad {bad}");
    assert_eq!(bad, 0);
}
