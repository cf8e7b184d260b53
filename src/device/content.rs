//! What a device holds already, by its signatures: so that a new pool does not destroy it.
//!
//! Pure: looks at bytes that the caller has read. A match is a reason to stop and ask, so a false
//! alarm is harmless and a miss is not; the order puts the most telling name first.

/// Bytes wanted from the beginning of a device.
pub(super) const HEAD_LEN: u64 = 1024 * 1024 + 64 * 1024; // the VMFS volume is at 1 MiB
/// Bytes wanted from its end.
pub(super) const TAIL_LEN: u64 = 512 * 1024; // two ZFS labels of 256 KiB

/// A signature at a fixed offset from the beginning.
struct Signature {
    offset: usize,
    bytes: &'static [u8],
    what: &'static str,
}

const fn at(offset: usize, bytes: &'static [u8], what: &'static str) -> Signature {
    Signature {
        offset,
        bytes,
        what,
    }
}

/// Every signature that one comparison decides. Images before partition tables: a raw image that
/// a guest wrote begins with the guest's own partition table.
const SIGNATURES: &[Signature] = &[
    at(0, b"QFI\xfb", "a qcow2 image"),
    at(0, b"QED\0", "a QED image"),
    at(0, b"conectix", "a VHD image"),
    at(0, b"vhdxfile", "a VHDX image"),
    at(0, b"KDMV", "a VMDK image"),
    at(0, b"COWD", "a VMDK image"),
    at(0, b"# Disk DescriptorFile", "a VMDK image"),
    at(64, b"\x7f\x10\xda\xbe", "a VDI image"),
    at(0, b"LUKS\xba\xbe", "a LUKS volume"),
    at(0, b"XFSB", "an XFS filesystem"),
    at(0, b"hsqs", "a squashfs filesystem"),
    at(0, b"bluestore block device", "a Ceph OSD"),
    at(0, b"LABELONE", "an LVM physical volume"),
    at(512, b"LABELONE", "an LVM physical volume"),
    at(1024, b"LABELONE", "an LVM physical volume"),
    at(1536, b"LABELONE", "an LVM physical volume"),
    at(3, b"NTFS    ", "an NTFS filesystem"),
    at(3, b"EXFAT   ", "an exFAT filesystem"),
    at(3, b"ReFS\0", "a ReFS filesystem"),
    at(3, b"-FVE-FS-", "a BitLocker volume"),
    at(32, b"NXSB", "an APFS container"),
    at(54, b"FAT1", "a FAT filesystem"),
    at(82, b"FAT32", "a FAT filesystem"),
    at(512, b"EFI PART", "a GPT partition table"),
    at(4096, b"EFI PART", "a GPT partition table"),
    at(0x438, b"\x53\xef", "an ext2, ext3 or ext4 filesystem"),
    at(1024, b"H+\0\x04", "an HFS+ filesystem"),
    at(1024, b"HX\0\x05", "an HFS+ filesystem"),
    at(1024, b"\x10\x20\xf5\xf2", "an F2FS filesystem"),
    at(1024, b"\xe2\xe1\xf5\xe0", "an EROFS filesystem"),
    at(4086, b"SWAPSPACE2", "swap space"),
    at(4086, b"SWAP-SPACE", "swap space"),
    at(0, MD_MAGIC, "a member of a RAID array"),
    at(4096, MD_MAGIC, "a member of a RAID array"),
    at(4096 + 24, BCACHEFS_MAGIC, "a bcachefs filesystem"),
    at(4096 + 24, BCACHE_MAGIC, "a bcache device"),
    at(32768, b"JFS1", "a JFS filesystem"),
    at(32769, b"CD001", "an ISO 9660 filesystem"),
    at(65536 + 52, b"ReIsEr", "a ReiserFS filesystem"),
    at(65536, b"\x01\x16\x19\x70", "a GFS2 filesystem"),
    at(0x10040, b"_BHRfS_M", "a btrfs filesystem"),
    at(1024 * 1024, b"\x0d\xd0\x01\xc0", "a VMFS volume"),
];

const MD_MAGIC: &[u8] = b"\xfc\x4e\x2b\xa9";
const BCACHEFS_MAGIC: &[u8] = b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef";
const BCACHE_MAGIC: &[u8] = b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81";

/// What is on a device of `len` bytes with these bytes at its beginning and its end, or `None`.
pub(super) fn detect(head: &[u8], tail: &[u8], len: u64) -> Option<&'static str> {
    // A fixed VHD has only a footer; old ones are 511 bytes long.
    if from_end(tail, 512, b"conectix") || from_end(tail, 511, b"conectix") {
        return Some("a VHD image");
    }
    if let Some(found) = SIGNATURES
        .iter()
        .find(|signature| holds(head, signature.offset, signature.bytes))
    {
        return Some(found.what);
    }
    if has_zfs_label(head) || has_zfs_label(tail) {
        return Some("a member of a ZFS pool");
    }
    if has_md_at_end(tail, len) {
        return Some("a member of a RAID array");
    }
    if from_end(tail, 512, b"EFI PART") {
        return Some("a GPT partition table");
    }
    if holds(head, 510, b"\x55\xaa") {
        return Some("a boot sector or partition table");
    }
    None
}

fn holds(bytes: &[u8], offset: usize, wanted: &[u8]) -> bool {
    bytes
        .get(offset..)
        .is_some_and(|rest| rest.starts_with(wanted))
}

fn from_end(tail: &[u8], distance: usize, wanted: &[u8]) -> bool {
    tail.len()
        .checked_sub(distance)
        .is_some_and(|offset| holds(tail, offset, wanted))
}

/// A label is 256 KiB and begins on a multiple of that; the second half holds the uberblocks, one
/// at least each 1 KiB, each beginning with the magic in the writer's byte order.
fn has_zfs_label(bytes: &[u8]) -> bool {
    const LABEL_LEN: usize = 256 * 1024;
    const UBERBLOCKS_AT: usize = 128 * 1024;
    bytes.chunks(LABEL_LEN).any(|label| {
        label.get(UBERBLOCKS_AT..).is_some_and(|ring| {
            ring.chunks(1024).any(|slot| {
                slot.starts_with(b"\x0c\xb1\xba\0\0\0\0\0")
                    || slot.starts_with(b"\0\0\0\0\0\xba\xb1\x0c")
            })
        })
    })
}

/// Version 1.0 has its superblock 8 to 12 KiB before the end, version 0.90 in the last whole
/// 64 KiB but one boundary.
fn has_md_at_end(tail: &[u8], len: u64) -> bool {
    let tail_at = len - tail.len() as u64;
    let places = [
        (len / 512)
            .checked_sub(16)
            .map(|sector| sector / 8 * 8 * 512),
        (len / 65536 * 65536).checked_sub(65536),
    ];
    places.into_iter().flatten().any(|place| {
        place
            .checked_sub(tail_at)
            .and_then(|offset| usize::try_from(offset).ok())
            .is_some_and(|offset| holds(tail, offset, MD_MAGIC))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect_in(image: &[u8]) -> Option<&'static str> {
        let head = &image[..image.len().min(HEAD_LEN as usize)];
        let tail = &image[image.len().saturating_sub(TAIL_LEN as usize)..];
        detect(head, tail, image.len() as u64)
    }

    #[test]
    fn every_signature_is_found_and_zeros_are_not() {
        let blank = vec![0; 2 * 1024 * 1024];
        assert_eq!(detect_in(&blank), None);
        for signature in SIGNATURES {
            let mut image = blank.clone();
            image[signature.offset..][..signature.bytes.len()].copy_from_slice(signature.bytes);
            assert_eq!(detect_in(&image), Some(signature.what));
        }
    }

    #[test]
    fn footers_and_labels_at_the_end_are_found() {
        let len = 2 * 1024 * 1024;
        let cases: [(usize, &[u8], &str); 6] = [
            (len - 512, b"conectix", "a VHD image"),
            (len - 511, b"conectix", "a VHD image"),
            (len - 512, b"EFI PART", "a GPT partition table"),
            (len - 8192, MD_MAGIC, "a member of a RAID array"),
            (len - 65536, MD_MAGIC, "a member of a RAID array"),
            (
                len - 128 * 1024 + 5 * 1024,
                b"\x0c\xb1\xba\0\0\0\0\0",
                "a member of a ZFS pool",
            ),
        ];
        for (offset, bytes, what) in cases {
            let mut image = vec![0; len];
            image[offset..][..bytes.len()].copy_from_slice(bytes);
            assert_eq!(detect_in(&image), Some(what), "offset={offset}");
        }
    }

    #[test]
    fn short_files_are_looked_at_without_panic() {
        for len in [0, 1, 511, 512, 4096, 65536, 65537] {
            assert_eq!(detect_in(&vec![0; len]), None);
        }
    }
}
