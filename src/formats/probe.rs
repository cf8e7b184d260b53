//! What an image is: by its first and last bytes, never by its name.
//!
//! Invariants:
//!
//! 1. Only what cannot be the contents of a disk by chance is taken for a format. A file that a
//!    guest may have written is not probed at all: then the caller names the format.

use std::sync::Arc;

use super::source::read_vec;
use super::{Format, Layer, Opener, Source, qcow2, raw::Raw, vdi, vhd, vhdx, vmdk};
use crate::error::Result;
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
        Format::Qcow2 => Box::new(qcow2::Qcow2::open(source, open)?),
        Format::Vdi => Box::new(vdi::Vdi::open(source)?),
    })
}
