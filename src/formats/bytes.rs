//! Numbers, ids and text as image formats store them. Little-endian numbers are those of `ondisk`.
//!
//! Invariants:
//!
//! 1. Offsets are constants of a codec, within a buffer whose length it has checked: what lies
//!    outside is a mistake of ours, and panics.

use super::Uuid;

/// A big-endian number of 2 bytes.
pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// A big-endian number of 4 bytes.
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(raw)
}

/// A big-endian number of 8 bytes.
pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(raw)
}

/// An id in the byte order of Microsoft and VirtualBox.
pub(crate) fn guid(bytes: &[u8], at: usize) -> Uuid {
    let mut raw = [0; 16];
    raw.copy_from_slice(&bytes[at..at + 16]);
    Uuid::from_guid(raw)
}

/// Text up to its first NUL; what is no text becomes replacement characters.
pub(crate) fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> String {
    let units: Vec<u16> = bytes
        .chunks_exact(2)
        .map(|raw| unit([raw[0], raw[1]]))
        .take_while(|unit| *unit != 0)
        .collect();
    String::from_utf16_lossy(&units)
}
