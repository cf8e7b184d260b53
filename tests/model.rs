//! The model that other tests trust is itself compared with plain vectors of bytes.

mod common;

use common::content::{Content, digest_bytes};
use common::generate::random_bytes;

use nodupe::device::SplitMix64;

#[test]
fn contents_are_those_of_a_vector() {
    let mut rng = SplitMix64::new(1);
    let mut content = Content::default();
    let mut bytes: Vec<u8> = Vec::new();
    for _ in 0..4000 {
        let offset = rng.index(bytes.len() + 5000);
        let len = rng.index(9000) + 1;
        match rng.below(8) {
            0 => {
                let size = offset.min(60_000);
                content.truncate(size as u64);
                bytes.resize(size, 0);
            }
            1 => {
                content.punch(offset as u64, len as u64);
                let end = (offset + len).min(bytes.len());
                if offset < end {
                    bytes[offset..end].fill(0);
                }
            }
            2 => {
                let from = content.clone();
                let to = rng.index(50_000);
                let done = content.copy_range(&from, offset as u64, to as u64, len as u64);
                let source = bytes.get(offset..).unwrap_or_default();
                let source = source[..len.min(source.len())].to_vec();
                assert_eq!(done, source.len() as u64);
                put(&mut bytes, to, &source);
            }
            kind => {
                let offset = offset.min(50_000);
                let data = match kind {
                    3 => vec![0; len],
                    _ => random_bytes(&mut rng, len),
                };
                content.write(offset as u64, &data);
                put(&mut bytes, offset, &data);
            }
        }
        assert_eq!(content.size(), bytes.len() as u64);
        assert!(content.read(0, bytes.len()) == bytes);
        assert_eq!(content.digest(), digest_bytes(0, 0, &bytes));
    }
}

fn put(bytes: &mut Vec<u8>, offset: usize, data: &[u8]) {
    if data.is_empty() {
        return;
    }
    let end = offset + data.len();
    bytes.resize(bytes.len().max(end), 0);
    bytes[offset..end].copy_from_slice(data);
}

#[test]
fn digests_tell_places_apart() {
    let page = |byte| vec![byte; 4096];
    let digest = |parts: &[Vec<u8>]| digest_bytes(0, 0, &parts.concat());
    assert_ne!(digest(&[page(1), page(2)]), digest(&[page(2), page(1)]));
    assert_ne!(digest(&[page(0), page(1)]), digest(&[page(1)]));
    assert_eq!(digest(&[page(1), page(0)]), digest(&[page(1)]));
    assert_eq!(digest(&[page(0), page(0)]), 0);
}
