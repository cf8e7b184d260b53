//! What an image is: by its first and last bytes, and by what its name promises.
//!
//! Invariants:
//!
//! 1. Only what cannot be the contents of a disk by chance is taken for a format.
//! 2. A guest writes what it likes into a raw disk, such as the header of another format with
//!    the name of a file on the host. So where the name of a file and its contents disagree, it is
//!    refused until the user says what it is. The footer of a VHD is where no guest writes, so
//!    it counts more than what the guest has at the beginning.

use std::sync::Arc;

use super::source::read_vec;
use super::{Format, Layer, Opener, Source, broken, qcow2, raw::Raw, vdi, vhd, vhdx, vmdk};
use crate::error::{Error, Kind, Result};
use crate::ondisk::get_u32;

/// The format of an image. Raw, if it looks like nothing else.
///
/// # Errors
/// `Io`.
pub fn probe(source: &dyn Source) -> Result<Format> {
    let head = read_vec(source, 0, source.len().min(512) as usize)?;
    Ok(if head.starts_with(&qcow2::MAGIC) {
        Format::Qcow2
    } else if head.starts_with(&vhdx::MAGIC) {
        Format::Vhdx
    } else if vmdk::is_vmdk(&head) {
        Format::Vmdk
    } else if head.len() >= 72 && get_u32(&head, 64) == vdi::MAGIC {
        Format::Vdi
    } else if head.starts_with(&vhd::COOKIE) || vhd::footer(source).is_ok() {
        Format::Vhd
    } else {
        Format::Raw
    })
}

/// As [`probe`], of a file whose name ends in `extension`: what is named as a VHD and ends like one
/// is one, whatever a guest wrote to its first sector.
///
/// # Errors
/// `Io`.
pub fn probe_named(source: &dyn Source, extension: Option<&str>) -> Result<Format> {
    let promised = extension.and_then(Format::named);
    if promised == Some(Format::Vhd) && vhd::footer(source).is_ok_and(|(_, _, copy)| !copy) {
        return Ok(Format::Vhd);
    }
    probe(source)
}

/// The format of an image whose file name ends in `extension`.
///
/// # Errors
/// `Corrupt` if the name promises a format and the contents are of none; `Invalid` if the contents
/// look like another format than the name says; `Unsupported` if the name promises nothing and the
/// contents are of a kind that nobody reads here; `Io`.
pub fn choose(source: &dyn Source, extension: Option<&str>) -> Result<Format> {
    let found = probe_named(source, extension)?;
    let promised = extension.and_then(Format::named);
    match (promised, found) {
        (_, Format::Raw) if source.is_empty() => Err(broken("the file is empty")),
        (None, Format::Raw) => refuse_foreign(source).map(|()| found),
        (Some(promised), Format::Raw) if promised != Format::Raw => Err(broken(format!(
            "the name says {promised}, and the contents are not: damaged, or cut off"
        ))),
        // Ready-made systems come as qcow2 that is named .img.
        (Some(Format::Raw), Format::Qcow2) if is_alone(source) && extension != Some("raw") => {
            Ok(found)
        }
        (Some(Format::Raw), Format::Vmdk) if extension != Some("raw") && is_sparse(source) => {
            Ok(found)
        }
        (Some(promised), found) if promised != found => Err(Error::new(
            Kind::Invalid,
            format!(
                "the name says {promised}, and the contents look like {found}, which a guest may \
                 have written: say which it is, --from {promised} or --from {found}"
            ),
        )),
        (_, found) => Ok(found),
    }
}

/// What no firmware boots and no partition table begins with, and what to do with such a file.
const FOREIGN: [(&[u8], &str, &str); 8] = [
    (b"QED\0", "a QED image", "convert it with qemu-img"),
    (
        b"WithoutFreeSpace",
        "a Parallels image",
        "convert it with qemu-img",
    ),
    (
        b"WithouFreSpacExt",
        "a Parallels image",
        "convert it with qemu-img",
    ),
    (b"\x1f\x8b\x08", "compressed with gzip", "decompress it"),
    (b"\xfd7zXZ\0", "compressed with xz", "decompress it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it"),
    (b"PK\x03\x04", "a ZIP archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
];

/// Refuses what would be a disk of no use if its bytes were taken as they are.
///
/// # Errors
/// `Unsupported` with what to do; `Io`.
pub fn refuse_foreign(source: &dyn Source) -> Result<()> {
    let head = read_vec(source, 0, source.len().min(16) as usize)?;
    match FOREIGN.iter().find(|(magic, ..)| head.starts_with(magic)) {
        None => Ok(()),
        Some((_, what, advice)) => Err(Error::new(
            Kind::Unsupported,
            format!(
                "it is {what}: {advice} first, or say --from raw to take its bytes as they are"
            ),
        )),
    }
}

/// The format of a disk of the host: raw, which a guest may have filled with anything.
///
/// # Errors
/// `Invalid` if its contents look like another format; `Io`.
pub fn choose_device(source: &dyn Source) -> Result<Format> {
    match probe(source)? {
        Format::Raw => Ok(Format::Raw),
        found => Err(Error::new(
            Kind::Invalid,
            format!(
                "it is a block device, and its contents look like {found}, which a guest may have \
                 written: say which it is, --from raw or --from {found}"
            ),
        )),
    }
}

/// True for version 1 of qcow.
///
/// # Errors
/// `Io`.
pub fn is_qcow1(source: &dyn Source) -> Result<bool> {
    let head = read_vec(source, 0, source.len().min(8) as usize)?;
    Ok(qcow2::is_version_1(&head))
}

/// True for a qcow2 image that names no other file.
fn is_alone(source: &dyn Source) -> bool {
    let head = read_vec(source, 0, source.len().min(104) as usize).unwrap_or_default();
    head.len() == 104 && head[8..16] == [0; 8] && head[79] & 4 == 0
}

/// True for a VMDK of one sparse file, which has everything in itself.
fn is_sparse(source: &dyn Source) -> bool {
    read_vec(source, 0, 4).is_ok_and(|head| head == *b"KDMV")
}

/// Opens an image of a known format. `open` opens its further files.
///
/// # Errors
/// As the format's own.
pub fn open(source: Arc<dyn Source>, format: Format, open: Opener<'_>) -> Result<Box<dyn Layer>> {
    Ok(match format {
        Format::Raw => Box::new(Raw::open(source)),
        Format::Vhd => Box::new(vhd::Vhd::open(source)?),
        Format::Vhdx => Box::new(vhdx::Vhdx::open(source)?),
        Format::Vmdk => Box::new(vmdk::Vmdk::open(source, open)?),
        Format::Qcow2 if is_qcow1(&*source)? => Box::new(qcow2::Qcow1::open(source)?),
        Format::Qcow2 => Box::new(qcow2::Qcow2::open(source, open)?),
        Format::Vdi => Box::new(vdi::Vdi::open(source)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_and_contents_that_disagree_are_refused() {
        let mut qcow2 = vec![0; 512];
        qcow2[..4].copy_from_slice(&qcow2::MAGIC);
        let choose = |bytes: &Vec<u8>, name: &str| choose(bytes, Some(name)).ok();
        assert_eq!(choose(&qcow2, "qcow2"), Some(Format::Qcow2));
        assert_eq!(choose(&qcow2, "bin"), Some(Format::Qcow2));
        assert_eq!(choose(&qcow2, "raw"), None);
        assert_eq!(choose(&qcow2, "img"), Some(Format::Qcow2));
        qcow2[15] = 1; // names a backing file
        assert_eq!(choose(&qcow2, "img"), None);
        let zeros = vec![0; 512];
        assert_eq!(choose(&zeros, "img"), Some(Format::Raw));
        assert_eq!(choose(&zeros, "iso"), Some(Format::Raw));
        assert_eq!(choose(&zeros, "vhd"), None);
        assert_eq!(choose(&Vec::new(), "img"), None);
        for name in ["vmdk", "vdi", "vhd", "vhdx"] {
            assert_eq!(choose(&qcow2, name), None, "{name}");
        }
    }

    #[test]
    fn what_is_of_another_kind_is_no_raw_disk_unless_its_name_says_so() {
        for (magic, ..) in FOREIGN {
            let mut file = magic.to_vec();
            file.resize(4096, 7);
            for name in [None, Some("qed"), Some("gz")] {
                let error = choose(&file, name).map(drop).map_err(|error| error.kind());
                assert_eq!(error, Err(Kind::Unsupported), "{name:?}");
            }
            assert_eq!(choose(&file, Some("img")).ok(), Some(Format::Raw));
        }
        assert_eq!(choose(&vec![7; 4096], None).ok(), Some(Format::Raw));
    }

    #[test]
    fn what_a_guest_writes_to_a_fixed_vhd_or_a_device_makes_it_no_other_image() {
        let mut disk = vec![0; 4096];
        disk[..4].copy_from_slice(&qcow2::MAGIC);
        assert!(choose_device(&disk).is_err());
        assert_eq!(choose_device(&vec![0; 4096]).ok(), Some(Format::Raw));
        let mut footer = vec![0; 512];
        footer[..8].copy_from_slice(&vhd::COOKIE);
        footer[12..16].copy_from_slice(&[0, 1, 0, 0]);
        footer[63] = 2;
        let sum = vhd::checksum(&footer, 64);
        footer[64..68].copy_from_slice(&[24, 16, 8, 0].map(|shift| (sum >> shift) as u8));
        disk.extend_from_slice(&footer);
        for name in ["vhd", "vpc", "avhd"] {
            assert_eq!(choose(&disk, Some(name)).ok(), Some(Format::Vhd), "{name}");
        }
        assert!(choose(&disk, Some("vmdk")).is_err());
    }
}
