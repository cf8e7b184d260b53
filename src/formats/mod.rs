//! Image formats of others: VHD, VHDX, VMDK, qcow2, VDI, raw. Each codec turns bytes into facts and
//! a map of one layer, and never opens a file: parents and further extents are named in the facts,
//! and whoever reads a library decides where to look for them.
//!
//! Invariants:
//!
//! 1. Every size and offset of an image is compared with the length of its file before it is used
//!    or memory is taken for it; arithmetic on them is checked.
//! 2. Memory is bounded whatever an image says: tables are read through [`Pages`], a small cache.
//! 3. Opening ends within time proportional to the tables that the file really has; nothing
//!    recurses over what an image says.
//! 4. A layer is read only through its [`Layer`]; the map covers the virtual disk without gaps.
#![expect(
    clippy::big_endian_bytes,
    reason = "VHD and qcow2 are big-endian on disk"
)]

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};

mod bytes;
pub mod chain;
pub mod layout;
pub mod ova;
pub mod probe;
pub mod qcow2;
pub mod raw;
pub mod source;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

pub use source::{FileSource, Pages, Source};

/// A family of image files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The bytes of the disk and nothing else.
    Raw,
    /// Virtual PC, Hyper-V, Azure: fixed, dynamic, differencing.
    Vhd,
    /// Hyper-V: fixed, dynamic, differencing, with a log.
    Vhdx,
    /// VMware: descriptor and extents.
    Vmdk,
    /// QEMU.
    Qcow2,
    /// VirtualBox.
    Vdi,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 6] = [
        Format::Raw,
        Format::Vhd,
        Format::Vhdx,
        Format::Vmdk,
        Format::Qcow2,
        Format::Vdi,
    ];

    /// By a name that people or images use: `vhd` and `vpc` are one, in any case.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "raw" | "img" | "dd" => Format::Raw,
            "vhd" | "vpc" | "avhd" => Format::Vhd,
            "vhdx" | "avhdx" => Format::Vhdx,
            "vmdk" => Format::Vmdk,
            "qcow2" | "qcow" => Format::Qcow2,
            "vdi" => Format::Vdi,
            _ => return None,
        })
    }

    /// The word for it on the command line and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Vhd => "vhd",
            Format::Vhdx => "vhdx",
            Format::Vmdk => "vmdk",
            Format::Qcow2 => "qcow2",
            Format::Vdi => "vdi",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// 16 bytes that name an image, in the order of their text form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// From the byte order of Microsoft and VirtualBox: the first three fields little-endian.
    pub fn from_guid(raw: [u8; 16]) -> Self {
        let mut bytes = raw;
        bytes[..4].reverse();
        bytes[4..6].reverse();
        bytes[6..8].reverse();
        Self(bytes)
    }

    /// In the byte order of Microsoft and VirtualBox.
    pub fn to_guid(self) -> [u8; 16] {
        Self::from_guid(self.0).0
    }

    /// True if all bytes are zero, which stands for none.
    pub fn is_nil(self) -> bool {
        self.0 == [0; 16]
    }

    /// From text with or without braces; `None` if it is not 32 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let digits: String = text
            .trim()
            .trim_start_matches('{')
            .trim_end_matches('}')
            .chars()
            .filter(|c| *c != '-')
            .collect();
        if digits.len() != 32 || !digits.is_ascii() {
            return None;
        }
        let mut bytes = [0; 16];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(digits.get(i * 2..i * 2 + 2)?, 16).ok()?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// What identifies an image to its children.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Identity {
    /// VHD unique id, VHDX DataWriteGuid, VDI uuid.
    Uuid(Uuid),
    /// VMDK content id, renewed when the contents change.
    Cid(u32),
}

/// How a layer names its parent. Names are as the image has them: hints, never paths to open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParentRef {
    /// What the parent calls itself, if the format stores it.
    pub identity: Option<Identity>,
    /// The parent's [`Facts::version`] when the child was made: another one means that the parent
    /// was changed since.
    pub version: Option<Uuid>,
    /// Names in the order of trust.
    pub names: Vec<String>,
    /// Format of the parent, where the child says so.
    pub format: Option<String>,
}

/// What is known of an image without reading its data.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The format.
    pub format: Format,
    /// Fixed, dynamic, differencing and the like, in the words of the format.
    pub subtype: &'static str,
    /// Size of the virtual disk in bytes.
    pub size: u64,
    /// Unit in which the image allocates, in bytes; 0 if it does not.
    pub block: u64,
    /// Logical sector size in bytes.
    pub sector: u32,
    /// What children call it.
    pub identity: Option<Identity>,
    /// Id of its last change, where the format has one beside the identity.
    pub version: Option<Uuid>,
    /// Who wrote it, as it says.
    pub creator: String,
    /// The parent of a differencing image.
    pub parent: Option<ParentRef>,
    /// What is odd but harmless: to be shown, one line each.
    pub notes: Vec<String>,
}

/// What a layer holds of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing: the parent's contents, or zeros if there is none.
    Absent,
    /// Zeros, whatever a parent has.
    Zero,
    /// Bytes as they stand at `at` of source number `source`.
    Data {
        /// Index into [`Layer::sources`].
        source: usize,
        /// Offset in bytes.
        at: u64,
    },
    /// Bytes that must be unpacked: only [`Layer::read`] gives them.
    Packed,
}

/// A run of a virtual disk with one kind of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Length in bytes, at least 1.
    pub len: u64,
    /// What is there.
    pub content: Content,
}

/// One image file (with its extents): facts, map and data, without its parent.
pub trait Layer: Send + Sync + fmt::Debug {
    /// What is known of it.
    fn facts(&self) -> &Facts;

    /// The files that data runs point into.
    fn sources(&self) -> &[Arc<dyn Source>];

    /// The run that begins at `offset`, below the size; of at most `most` bytes, which is above 0.
    ///
    /// # Errors
    /// `Corrupt` if a table of the image is damaged; `Io`.
    fn run(&self, offset: u64, most: u64) -> Result<Run>;

    /// Reads a range of which every byte is `Data` or `Packed`.
    ///
    /// # Errors
    /// `Corrupt` for packed data that does not unpack; `Io`.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let (offset, rest) = (offset + done as u64, &mut buf[done..]);
            let run = self.run(offset, rest.len() as u64)?;
            let part = &mut rest[..run.len as usize];
            match run.content {
                Content::Data { source, at } => self.sources()[source].read_at(at, part)?,
                Content::Packed => self.read_packed(offset, part)?,
                Content::Absent | Content::Zero => {
                    return Err(broken("a range without data was read"));
                }
            }
            done += run.len as usize;
        }
        Ok(())
    }

    /// Unpacks a range within one `Packed` run; only for formats that have such runs.
    ///
    /// # Errors
    /// `Corrupt` if it does not unpack; `Io`.
    fn read_packed(&self, _offset: u64, _out: &mut [u8]) -> Result<()> {
        Err(broken("a range is not compressed after all"))
    }
}

/// Opens a further file of an image by the name that the image has for it. Whoever provides it
/// decides which names lead anywhere.
pub type Opener<'a> = &'a mut dyn FnMut(&str) -> Result<Arc<dyn Source>>;

/// An image that breaks the rules of its format.
pub(crate) fn broken(what: impl Into<String>) -> Error {
    Error::corrupt(what)
}

/// An image that this program does not read.
pub(crate) fn unsupported(what: impl Into<String>) -> Error {
    Error::new(Kind::Unsupported, what)
}

/// What tests of several formats use.
#[cfg(test)]
pub(crate) mod testing {
    use super::{Result, Source};

    /// A file that holds these bytes and claims to be this long.
    #[derive(Debug)]
    pub(crate) struct Long(pub(crate) Vec<u8>, pub(crate) u64);

    impl Source for Long {
        fn len(&self) -> u64 {
            self.1
        }

        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
            for (i, byte) in buf.iter_mut().enumerate() {
                *byte = self.0.get(offset as usize + i).copied().unwrap_or(0);
            }
            Ok(())
        }
    }
}
