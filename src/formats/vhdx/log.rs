//! The log of a VHDX, replayed in memory: a dirty image is read as it would be after its replay,
//! and stays as it is.
//!
//! Layout: MS-VHDX, 2.3. The log is a ring of entries of whole pages; the active sequence is the
//! run of valid entries with rising numbers whose head names its tail.
//!
//! Invariants:
//!
//! 1. Memory is bounded by the length of the log, which is at most [`LOG_MAX`].
//! 2. Time is as well: entries that lie upon each other are decoded up to [`DECODED_MAX`] times the
//!    length of the log, and zeroed ranges are merged.
//! 3. Replay writes neither to the headers nor to the log: an image that asks for it is refused.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::Result;
use crate::formats::source::{check_range, read_vec};
use crate::formats::{Source, broken, unsupported};
use crate::ondisk::{crc32c, get_u32, get_u64};

/// Unit of the log and of what it changes.
const PAGE: u64 = 4096;
/// Longest log that is replayed: 64 MiB. Products make 1 MiB to 32 MiB.
const LOG_MAX: u64 = 64 << 20;
/// Bytes that are decoded, in lengths of the log. Entries of one pass through the ring do not
/// overlap, and what older passes left is no more than that again.
const DECODED_MAX: u64 = 4;
/// Bytes of the header of an entry, and of each of its descriptors.
const ENTRY_HEADER: usize = 64;
const DESCRIPTOR: usize = 32;
/// First byte that replay may change: what lies before are the file's identifier and headers.
const REPLAY_FROM: u64 = 192 << 10;

/// Where the log is, and whose entries count.
#[derive(Clone, Copy, Debug)]
pub(super) struct Log {
    pub(super) guid: [u8; 16],
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// One valid entry.
#[derive(Debug)]
struct Entry {
    at: u64,
    len: u64,
    tail: u64,
    seq: u64,
    flushed: u64,
    last: u64,
    changes: Vec<Change>,
}

#[derive(Debug)]
enum Change {
    Zero {
        at: u64,
        len: u64,
    },
    /// The page of the image, and where its bytes stand: entry page and descriptor.
    Data {
        at: u64,
        page: Box<[u8; PAGE as usize]>,
    },
}

/// An image as it is after replay.
#[derive(Debug)]
pub(super) struct Replayed {
    base: Arc<dyn Source>,
    len: u64,
    pages: BTreeMap<u64, Box<[u8; PAGE as usize]>>,
    /// Zeroed ranges: begin and end. None touches another.
    zeros: BTreeMap<u64, u64>,
}

/// Replays `log` over `base`.
///
/// # Errors
/// `Corrupt` if no sequence of entries is whole, or the image was cut off after it was logged.
pub(super) fn replay(base: Arc<dyn Source>, log: Log) -> Result<Replayed> {
    if log.len > LOG_MAX {
        return Err(unsupported(format!(
            "the log is too long: bytes={}",
            log.len
        )));
    }
    let ring = read_vec(&*base, log.offset, log.len as usize)?;
    let Some(active) = active(&ring, &log)? else {
        return Err(broken(
            "the image has a log to replay, and no entry of it is whole: its last changes are lost",
        ));
    };
    let (flushed, last) = active
        .last()
        .map_or((0, 0), |head| (head.flushed, head.last));
    if last > super::LEN_MAX {
        return Err(broken(format!(
            "the log says that the file is longer than any VHDX can be: bytes={last}"
        )));
    }
    if base.len() < flushed {
        return Err(broken(format!(
            "the image was cut off after its log was written: length={} flushed={flushed}",
            base.len()
        )));
    }
    let mut replayed = Replayed {
        len: base.len().max(last),
        base,
        pages: BTreeMap::new(),
        zeros: BTreeMap::new(),
    };
    for change in active.into_iter().flat_map(|entry| entry.changes) {
        replayed.apply(change, &log)?;
    }
    Ok(replayed)
}

/// Bytes of the ring from `at` on, around its end. `len` is at most that of the ring.
fn around(ring: &[u8], at: u64, len: usize) -> Vec<u8> {
    let at = at as usize % ring.len();
    let first = len.min(ring.len() - at);
    let mut bytes = ring[at..at + first].to_vec();
    bytes.extend_from_slice(&ring[..len - first]);
    bytes
}

/// The active sequence: of all runs whose head names a tail within, that with the highest number.
fn active(ring: &[u8], log: &Log) -> Result<Option<Vec<Entry>>> {
    // Decoded once each; runs are then followed by position.
    let mut entries: BTreeMap<u64, Entry> = BTreeMap::new();
    let mut budget = log.len * DECODED_MAX;
    for at in (0..log.len).step_by(PAGE as usize) {
        if let Some(entry) = decode(ring, at, log, &mut budget)? {
            entries.insert(at, entry);
        }
    }
    // Who follows whom, so that runs are found in one pass.
    let follows = |entry: &Entry| {
        let next = entries.get(&((entry.at + entry.len) % log.len))?;
        (next.seq == entry.seq.wrapping_add(1)).then_some(next)
    };
    let mut best: Option<(u64, Vec<u64>)> = None;
    let followed: std::collections::HashSet<u64> = entries
        .values()
        .filter_map(|entry| follows(entry).map(|next| next.at))
        .collect();
    for start in entries
        .values()
        .filter(|entry| !followed.contains(&entry.at))
    {
        let mut run = vec![start.at];
        let mut head = start;
        while let Some(next) = follows(head) {
            run.push(next.at);
            head = next;
        }
        let Some(from) = run.iter().position(|at| *at == head.tail) else {
            continue;
        };
        if best.as_ref().is_none_or(|(seq, _)| head.seq > *seq) {
            best = Some((head.seq, run.split_off(from)));
        }
    }
    Ok(best.map(|(_, run)| {
        run.iter()
            .filter_map(|at| entries.remove(at))
            .collect::<Vec<_>>()
    }))
}

/// The entry at `at`, if it is whole and of this log. Takes what it reads from `budget`.
fn decode(ring: &[u8], at: u64, log: &Log, budget: &mut u64) -> Result<Option<Entry>> {
    let head = around(ring, at, ENTRY_HEADER);
    let len = u64::from(get_u32(&head, 8));
    let tail = u64::from(get_u32(&head, 12));
    let (seq, count) = (get_u64(&head, 16), u64::from(get_u32(&head, 24)));
    let sane = head[..4] == *b"loge"
        && head[32..48] == log.guid
        && len > 0
        && len.is_multiple_of(PAGE)
        && len <= log.len
        && tail.is_multiple_of(PAGE)
        && tail < log.len
        && seq > 0
        && count <= len / DESCRIPTOR as u64;
    if !sane {
        return Ok(None);
    }
    let Some(rest) = budget.checked_sub(len) else {
        return Err(broken(
            "the entries of the log lie upon each other, more than any product leaves them",
        ));
    };
    *budget = rest;
    Ok(decode_whole(ring, at, len))
}

/// The entry at `at`, whose header makes sense, if the rest of it does.
fn decode_whole(ring: &[u8], at: u64, len: u64) -> Option<Entry> {
    let mut whole = around(ring, at, len as usize);
    let tail = u64::from(get_u32(&whole, 12));
    let (seq, count) = (get_u64(&whole, 16), u64::from(get_u32(&whole, 24)));
    let crc = get_u32(&whole, 4);
    whole[4..8].fill(0);
    if crc32c(&whole) != crc {
        return None;
    }
    let table = (ENTRY_HEADER as u64 + count * DESCRIPTOR as u64).next_multiple_of(PAGE);
    let mut sectors = whole.get(table as usize..)?.chunks_exact(PAGE as usize);
    let mut changes = Vec::new();
    for i in 0..count as usize {
        let descriptor = whole
            .get(ENTRY_HEADER + i * DESCRIPTOR..)?
            .get(..DESCRIPTOR)?;
        let target = get_u64(descriptor, 16);
        if get_u64(descriptor, 24) != seq || !target.is_multiple_of(PAGE) {
            return None;
        }
        changes.push(match &descriptor[..4] {
            b"zero" => {
                let len = get_u64(descriptor, 8);
                if !len.is_multiple_of(PAGE) || target.checked_add(len).is_none() {
                    return None;
                }
                Change::Zero { at: target, len }
            }
            b"desc" => {
                let sector = sectors.next()?;
                let high = u64::from(get_u32(sector, 4));
                let low = u64::from(get_u32(sector, PAGE as usize - 4));
                if sector[..4] != *b"data" || high << 32 | low != seq {
                    return None;
                }
                let mut page = Box::new([0; PAGE as usize]);
                page[..8].copy_from_slice(&descriptor[8..16]);
                page[8..PAGE as usize - 4].copy_from_slice(&sector[8..PAGE as usize - 4]);
                page[PAGE as usize - 4..].copy_from_slice(&descriptor[4..8]);
                Change::Data { at: target, page }
            }
            _ => return None,
        });
    }
    Some(Entry {
        at,
        len,
        tail,
        seq,
        flushed: get_u64(&whole, 48),
        last: get_u64(&whole, 56),
        changes,
    })
}

impl Replayed {
    fn apply(&mut self, change: Change, log: &Log) -> Result<()> {
        let (at, len) = match &change {
            Change::Zero { at, len } => (*at, *len),
            Change::Data { at, .. } => (*at, PAGE),
        };
        let end = at.saturating_add(len);
        if at < REPLAY_FROM || at < log.offset + log.len && log.offset < end {
            return Err(broken(format!(
                "the log would change the headers or itself: offset={at}"
            )));
        }
        if end > self.len {
            return Err(broken(format!(
                "the log changes what lies behind the end of the image: offset={at} bytes={len}"
            )));
        }
        match change {
            Change::Data { at, page } => {
                self.pages.insert(at, page);
            }
            Change::Zero { .. } => {
                let covered: Vec<u64> = self.pages.range(at..end).map(|(at, _)| *at).collect();
                for page in covered {
                    self.pages.remove(&page);
                }
                self.zero(at, end);
            }
        }
        Ok(())
    }

    /// Adds a zeroed range, as one with those that it touches.
    fn zero(&mut self, at: u64, end: u64) {
        let (mut from, mut to) = (at, end);
        while let Some((begin, until)) = self.zeros.range(..=to).next_back() {
            let (begin, until) = (*begin, *until);
            if until < from {
                break;
            }
            self.zeros.remove(&begin);
            (from, to) = (from.min(begin), to.max(until));
        }
        self.zeros.insert(from, to);
    }

    /// True if the log zeroed the page at `at`.
    fn zeroed(&self, at: u64) -> bool {
        let last = self.zeros.range(..=at).next_back();
        last.is_some_and(|(_, end)| *end > at)
    }
}

impl Source for Replayed {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.len, offset, buf.len() as u64)?;
        // What the file was not extended to yet reads as zeros.
        let there = self.base.len().saturating_sub(offset).min(buf.len() as u64) as usize;
        self.base
            .read_at(offset.min(self.base.len()), &mut buf[..there])?;
        buf[there..].fill(0);
        if self.pages.is_empty() && self.zeros.is_empty() {
            return Ok(());
        }
        let end = offset + buf.len() as u64;
        let mut at = offset / PAGE * PAGE;
        while at < end {
            let (from, to) = (at.max(offset), (at + PAGE).min(end));
            let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
            if let Some(page) = self.pages.get(&at) {
                part.copy_from_slice(&page[(from - at) as usize..(to - at) as usize]);
            } else if self.zeroed(at) {
                part.fill(0);
            }
            at += PAGE;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUID: [u8; 16] = [7; 16];

    /// Puts an entry of `len` bytes without sectors into the ring.
    fn put(ring: &mut [u8], at: usize, len: usize, last: u64, changes: &[(u64, u64)]) {
        let entry = &mut ring[at..at + len];
        entry[..4].copy_from_slice(b"loge");
        entry[8..12].copy_from_slice(&(len as u32).to_le_bytes());
        entry[12..16].copy_from_slice(&(at as u32).to_le_bytes());
        entry[16] = 1;
        entry[24..28].copy_from_slice(&(changes.len() as u32).to_le_bytes());
        entry[32..48].copy_from_slice(&GUID);
        entry[56..64].copy_from_slice(&last.to_le_bytes());
        for (i, (from, bytes)) in changes.iter().enumerate() {
            let descriptor = &mut entry[ENTRY_HEADER + i * DESCRIPTOR..][..DESCRIPTOR];
            descriptor[..4].copy_from_slice(b"zero");
            descriptor[8..16].copy_from_slice(&bytes.to_le_bytes());
            descriptor[16..24].copy_from_slice(&from.to_le_bytes());
            descriptor[24] = 1;
        }
        let crc = crc32c(entry);
        entry[4..8].copy_from_slice(&crc.to_le_bytes());
    }

    fn replayed(ring: &[u8]) -> Result<Replayed> {
        let offset = 1 << 20;
        let mut file = vec![0xff; 4 << 20];
        file[1 << 20..][..ring.len()].copy_from_slice(ring);
        let len = ring.len() as u64;
        let guid = GUID;
        replay(Arc::new(file), Log { guid, offset, len })
    }

    #[test]
    fn a_log_that_makes_the_file_endless_is_refused() {
        for (last, fits) in [(4 << 20, true), (1 << 63, false), (u64::MAX, false)] {
            let mut ring = vec![0; 1 << 20];
            put(&mut ring, 0, 4096, last, &[]);
            assert_eq!(replayed(&ring).is_ok(), fits, "{last}");
        }
    }

    #[test]
    fn entries_upon_each_other_are_given_up() {
        let mut ring = vec![0; 1 << 20];
        for at in (0..ring.len() / 2).step_by(PAGE as usize) {
            let len = ring.len() / 2;
            put(&mut ring, at, len, 4 << 20, &[]);
        }
        let error = replayed(&ring).unwrap_err();
        assert!(error.to_string().contains("upon each other"), "{error}");
    }

    #[test]
    fn zeroed_ranges_are_merged() {
        let mib = 1 << 20;
        let page = |i: u64| (2 * mib + i * PAGE, PAGE);
        let mut zeros: Vec<_> = (0..100).map(|i| page(i * 37 % 100)).collect();
        zeros.extend([
            (3 * mib, 3 * PAGE),
            (3 * mib, PAGE),
            page(400),
            (3 * mib, 0),
        ]);
        let mut ring = vec![0; mib as usize];
        put(&mut ring, 0, 8192, 4 << 20, &zeros);
        let replayed = replayed(&ring).unwrap();
        let ranges: Vec<_> = replayed.zeros.iter().map(|(a, b)| (*a, *b)).collect();
        let wanted = [
            (2 * mib, 2 * mib + 100 * PAGE),
            (3 * mib, 3 * mib + 3 * PAGE),
            (page(400).0, page(401).0),
        ];
        assert_eq!(ranges, wanted);
        assert!(replayed.zeroed(3 * mib + 2 * PAGE) && !replayed.zeroed(3 * mib + 3 * PAGE));
        let mut byte = [1];
        replayed.read_at(2 * mib + 50 * PAGE, &mut byte).unwrap();
        assert_eq!(byte, [0]);
    }
}
