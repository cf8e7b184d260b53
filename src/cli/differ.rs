//! Where two images differ: by their maps first, and by their bytes only where these differ.
//!
//! Invariants:
//!
//! 1. What both images have in the same blocks of the pool is never read.
//! 2. What is told is exact to 4 KiB.

use std::ops::Range;
use std::os::fd::AsFd;

use nodupe::control::{self, Look, Request, Response};
use nodupe::error::{Error, Kind, Result};
use nodupe::formats::layout::{Held, Piece, Place};
use nodupe::units::BLOCK_SIZE;

use super::image::Image;

const B: u64 = BLOCK_SIZE as u64;
/// Bytes that are compared at once.
const STEP: u64 = 1 << 20;

/// An image and what it holds.
pub(super) type Side<'a> = (&'a Image, &'a Held<'a>);

/// The ranges, multiples of 4 KiB, in which `left` reads other than `right` does; what lies behind
/// the end of `right` reads as zeros.
pub(super) fn differences(left: Side<'_>, right: Side<'_>) -> Result<Vec<Range<u64>>> {
    let size = left.1.chain.size();
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let a = left.1.piece(at, size)?;
        let b = right.1.piece(at, size)?;
        let start = |piece: &Option<Piece>| piece.as_ref().map_or(size, |piece| piece.disk);
        at = start(&a).min(start(&b));
        // Both as of `at`: until where, and where.
        let (a_end, a) = side(a, at, size);
        let (b_end, b) = side(b, at, size);
        let end = a_end.min(b_end);
        if at >= size {
            break;
        }
        match (a, b) {
            (Some(a), Some(b)) => candidates(left, right, at..end, (&a, &b), &mut found)?,
            _ => add(&mut found, at..end),
        }
        at = end;
    }
    compare(left.1, right.1, found, size)
}

/// What of a piece begins at `at`, and where that ends.
fn side(piece: Option<Piece>, at: u64, size: u64) -> (u64, Option<Place>) {
    match piece {
        Some(piece) if piece.disk == at => (at + piece.len, Some(piece.place)),
        Some(piece) => (piece.disk, None),
        None => (size, None),
    }
}

/// Adds what of a range, which both images hold, is not in the same blocks.
fn candidates(
    (left, _): Side<'_>,
    (right, _): Side<'_>,
    range: Range<u64>,
    (a, b): (&Place, &Place),
    found: &mut Vec<Range<u64>>,
) -> Result<()> {
    let (Place::At(a, a_at), Place::At(b, b_at)) = (a, b) else {
        add(found, range);
        return Ok(());
    };
    let (Some(a), Some(b)) = (left.file(a), right.file(b)) else {
        add(found, range);
        return Ok(());
    };
    let (a, b) = (&left.files[a], &right.files[b]);
    let same_pool = a.is_pooled() && b.is_pooled() && a.device == b.device;
    if !same_pool || a_at % B != b_at % B {
        add(found, range);
        return Ok(());
    }
    // Disk offset of byte 0 of the file, modulo 2^64.
    let shift = range.start.wrapping_sub(*a_at);
    let to = (a_at + (range.end - range.start)).div_ceil(B);
    let mut from = a_at / B;
    let delta = (b_at / B).wrapping_sub(a_at / B);
    while from < to {
        let look = Look {
            from,
            to,
            other: Some((b.token()?, from.wrapping_add(delta))),
        };
        let Response::Extents(told) = control::call(a.file.as_fd(), &Request::Extents(look))?
        else {
            return Err(nonsense());
        };
        if told.next <= from {
            return Err(nonsense());
        }
        for (block, count) in told.ranges {
            let start = (block * B).max(*a_at).wrapping_add(shift);
            let end = ((block + count) * B).wrapping_add(shift);
            add(found, start..end.min(range.end));
        }
        from = told.next;
    }
    Ok(())
}

fn nonsense() -> Error {
    Error::new(
        Kind::Io,
        "the daemon of the datastore answers nonsense: use the same version of nodupe for both",
    )
}

/// Adds a range, joined with what touches it.
fn add(found: &mut Vec<Range<u64>>, range: Range<u64>) {
    match found.last_mut() {
        Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
        _ => found.push(range),
    }
}

/// Keeps the blocks of 4 KiB of which the bytes differ.
fn compare(
    left: &Held<'_>,
    right: &Held<'_>,
    found: Vec<Range<u64>>,
    size: u64,
) -> Result<Vec<Range<u64>>> {
    let right_size = right.chain.size();
    let mut kept: Vec<Range<u64>> = Vec::new();
    for range in found {
        let (mut at, end) = (range.start / B * B, range.end.next_multiple_of(B).min(size));
        while at < end {
            let len = (end - at).min(STEP) as usize;
            let (mut a, mut b) = (vec![0; len], vec![0; len]);
            left.chain.read(at, &mut a)?;
            let there = right_size.saturating_sub(at).min(len as u64) as usize;
            if there > 0 {
                right.chain.read(at, &mut b[..there])?;
            }
            for (i, (a, b)) in a.chunks(BLOCK_SIZE).zip(b.chunks(BLOCK_SIZE)).enumerate() {
                if a != b {
                    let start = at + i as u64 * B;
                    add(&mut kept, start..start + a.len() as u64);
                }
            }
            at += len as u64;
        }
    }
    Ok(kept)
}
