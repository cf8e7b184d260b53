//! The text that describes a VMDK: ids, the kind of disk, and its extents.
//!
//! Layout: VMware, Virtual Disk Format 1.1. A file of its own, or embedded in a sparse extent.
//!
//! Invariants:
//!
//! 1. Total: any bytes give a description or an error. Unknown keys are ignored, as all products
//!    write some of their own.
//! 2. At most `EXTENTS_MAX` extents, whose sizes add up without overflow.

use crate::error::Result;
use crate::formats::{broken, unsupported};

/// Longest descriptor file: 1 MiB.
pub(crate) const FILE_MAX: u64 = 1 << 20;
/// Longest embedded descriptor: 64 KiB.
pub(super) const EMBEDDED_MAX: u64 = 64 << 10;
/// Most extents.
const EXTENTS_MAX: usize = 4096;
/// Longest line.
const LINE_MAX: usize = 4096;
/// Largest disk in sectors: 8 EiB would not fit the arithmetic; VMware's limit is 62 TiB.
const SECTORS_MAX: u64 = 1 << 40;
/// First line of every descriptor.
const FIRST_LINE: &str = "# disk descriptorfile";
/// `parentCID` of a disk without parent.
const NO_PARENT: u32 = u32::MAX;

/// How an extent is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// The bytes themselves.
    Flat,
    /// A sparse extent; its own first bytes tell which kind.
    Sparse,
    /// Zeros, without a file.
    Zero,
}

/// A line that describes an extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in sectors of 512 bytes.
    pub sectors: u64,
    /// How it is stored.
    pub kind: ExtentKind,
    /// Its file, as the descriptor names it; empty for zeros.
    pub name: String,
    /// First sector in its file, of a flat extent.
    pub offset: u64,
}

/// What a descriptor says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Content id.
    pub cid: Option<u32>,
    /// Content id of the parent, of a child.
    pub parent_cid: Option<u32>,
    /// Name of the parent's file.
    pub parent_hint: Option<String>,
    /// Kind of disk: `monolithicSparse` and so on.
    pub create_type: String,
    /// The extents, in order.
    pub extents: Vec<Extent>,
}

/// True if a file that begins with `bytes` is a descriptor.
pub(crate) fn is_descriptor(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(512)]).to_lowercase();
    text.trim_start_matches('\u{fffd}')
        .trim_start()
        .starts_with(FIRST_LINE)
}

impl Descriptor {
    /// Parses a descriptor, up to its first NUL.
    ///
    /// # Errors
    /// `Corrupt`, naming the line; `Unsupported` for disks that are devices.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let end = bytes.iter().position(|byte| *byte == 0);
        let text = String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]);
        let mut descriptor = Self::default();
        let mut total = 0_u64;
        for line in text.lines() {
            let line = line.trim();
            if line.len() > LINE_MAX {
                return Err(broken("the descriptor has a line that is too long"));
            }
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let access = line.split_whitespace().next().unwrap_or_default();
            if matches!(
                access.to_ascii_uppercase().as_str(),
                "RW" | "RDONLY" | "NOACCESS"
            ) {
                let extent = extent(line, access)?;
                total = total.saturating_add(extent.sectors);
                descriptor.extents.push(extent);
                if total > SECTORS_MAX || descriptor.extents.len() > EXTENTS_MAX {
                    return Err(broken("the descriptor has too many or too large extents"));
                }
            } else if let Some((key, value)) = line.split_once('=') {
                descriptor.set(key.trim(), value.trim().trim_matches('"'))?;
            }
        }
        check_type(&descriptor.create_type)?;
        Ok(descriptor)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let number = || {
            u32::from_str_radix(value, 16)
                .map_err(|_| broken(format!("the descriptor has a bad id: {key}={value}")))
        };
        match key.to_ascii_lowercase().as_str() {
            "cid" => {
                self.cid.get_or_insert(number()?);
            }
            "parentcid" => {
                let number = number()?;
                self.parent_cid = (number != NO_PARENT).then_some(number);
            }
            "parentfilenamehint" => self.parent_hint = Some(value.to_owned()),
            "createtype" => value.clone_into(&mut self.create_type),
            _ => {}
        }
        Ok(())
    }
}

/// Refuses disks that are devices of a host, and kinds that nobody knows.
fn check_type(kind: &str) -> Result<()> {
    match kind.to_ascii_lowercase().as_str() {
        "monolithicsparse"
        | "monolithicflat"
        | "twogbmaxextentsparse"
        | "twogbmaxextentflat"
        | "streamoptimized"
        | "vmfs"
        | "vmfsthin"
        | "vmfspreallocated"
        | "vmfseagerzeroedthick"
        | "vmfssparse"
        | "sesparse"
        | "custom"
        | "" => Ok(()),
        "fulldevice"
        | "partitioneddevice"
        | "vmfsraw"
        | "vmfsrdm"
        | "vmfsrdmp"
        | "vmfsrawdevicemap"
        | "vmfspassthroughrawdevicemap" => Err(unsupported(format!(
            "the disk is a device of its host, which is not read: createType={kind}"
        ))),
        _ => Err(unsupported(format!(
            "this kind of VMDK is not known: createType={kind}"
        ))),
    }
}

/// Parses `ACCESS SECTORS KIND ["NAME" [OFFSET ...]]`.
fn extent(line: &str, access: &str) -> Result<Extent> {
    let bad = |what: &str| broken(format!("{what} in a line of the descriptor: {line:?}"));
    let rest = line[access.len()..].trim_start();
    let (sectors, rest) = rest
        .split_once(char::is_whitespace)
        .ok_or_else(|| bad("something is missing"))?;
    let sectors: u64 = sectors
        .parse()
        .ok()
        .filter(|sectors| (1..=SECTORS_MAX).contains(sectors))
        .ok_or_else(|| bad("the size is no number of sectors"))?;
    let rest = rest.trim_start();
    let (kind, rest) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let kind = match kind.to_ascii_uppercase().as_str() {
        "FLAT" | "VMFS" => ExtentKind::Flat,
        "SPARSE" | "VMFSSPARSE" | "SESPARSE" => ExtentKind::Sparse,
        "ZERO" => ExtentKind::Zero,
        "VMFSRDM" | "VMFSRAW" => {
            return Err(unsupported(format!(
                "an extent is a device of its host, which is not read: {line:?}"
            )));
        }
        _ => return Err(bad("the kind of extent is not known")),
    };
    if kind == ExtentKind::Zero {
        return Ok(Extent {
            sectors,
            kind,
            name: String::new(),
            offset: 0,
        });
    }
    if access.eq_ignore_ascii_case("NOACCESS") {
        return Err(unsupported(format!(
            "an extent must not be read, it says: {line:?}"
        )));
    }
    let quoted = rest.trim_start().strip_prefix('"');
    let (name, rest) = quoted
        .and_then(|rest| rest.split_once('"'))
        .ok_or_else(|| bad("the name of the file is missing"))?;
    let offset = match rest.split_whitespace().next() {
        None => 0,
        Some(word) => word
            .parse()
            .ok()
            .filter(|offset| *offset <= SECTORS_MAX)
            .ok_or_else(|| bad("the offset is no number of sectors"))?,
    };
    Ok(Extent {
        sectors,
        kind,
        name: name.to_owned(),
        offset,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# Disk DescriptorFile\r\nversion = 1 \r\nencoding=\"UTF-8\"\r\n\
        CID=fffffffe\r\nparentCID=0000abcd\r\nparentFileNameHint=\"a b.vmdk\"\r\n\
        createType=\"twoGbMaxExtentSparse\"\r\nRW 100 SPARSE \"x y-s001.vmdk\"\r\n\
        RW 28 FLAT \"f.vmdk\" 7\r\nRDONLY 64 ZERO\r\nddb.adapterType = \"ide\"\r\n";

    #[test]
    fn a_descriptor_is_read_with_its_extents() {
        let descriptor = Descriptor::parse(TEXT.as_bytes()).unwrap();
        assert!(is_descriptor(TEXT.as_bytes()));
        assert_eq!(descriptor.cid, Some(0xffff_fffe));
        assert_eq!(descriptor.parent_cid, Some(0xabcd));
        assert_eq!(descriptor.parent_hint.as_deref(), Some("a b.vmdk"));
        let sizes: Vec<_> = descriptor
            .extents
            .iter()
            .map(|extent| {
                (
                    extent.sectors,
                    extent.kind,
                    extent.name.as_str(),
                    extent.offset,
                )
            })
            .collect();
        let expected = [
            (100, ExtentKind::Sparse, "x y-s001.vmdk", 0),
            (28, ExtentKind::Flat, "f.vmdk", 7),
            (64, ExtentKind::Zero, "", 0),
        ];
        assert_eq!(sizes, expected);
    }

    #[test]
    fn what_makes_no_sense_or_leads_to_a_device_is_refused() {
        for line in [
            "RW -8 FLAT \"a\" 0",
            "RW 0 FLAT \"a\" 0",
            "RW 8 FLAT a 0",
            "RW 8 FLAT",
            "RW 8",
            "RW 8 FLAT \"a\" 99999999999999",
            "RW 8 VMFSRDM \"a\"",
            "RW 8 QUANTUM \"a\"",
            "CID=xyz",
            "createType=\"fullDevice\"",
        ] {
            assert!(Descriptor::parse(line.as_bytes()).is_err(), "{line}");
        }
    }
}
