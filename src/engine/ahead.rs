//! Streams: readers that go through a file in order, and how far to read ahead of them.
//!
//! Invariants:
//!
//! 1. What is read ahead goes into the block cache by its place in the pool, as whatever is read
//!    does: a write in between changes the place, so nothing stale is ever found.
//! 2. A reader that jumps costs nothing but a few comparisons.

use std::ops::Range;

use crate::sync::Mutex;

/// Bytes that are read ahead first.
const FIRST: u64 = 128 * 1024; // 128 KiB
/// Requests in order after which something is read ahead.
const HITS: u32 = 2;
/// How far from the expected place a request still belongs to the stream, at least and at most:
/// several requests of one reader are under way, and come in any order.
const NEAR: Range<u64> = 128 * 1024..4 * 1024 * 1024;

/// What is known of one reader of one file: one for each open handle.
#[derive(Debug, Default)]
pub struct Stream {
    /// Rank 8 in the lock order.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The byte behind the last request.
    next: u64,
    /// The byte behind what was read ahead.
    ahead: u64,
    /// Bytes that were read ahead last.
    window: u64,
    /// Requests in order.
    hits: u32,
}

impl Stream {
    /// Notes a request of `len` bytes at `offset`. Returns what to read ahead, in bytes, at most up
    /// to `max` behind the request.
    pub(crate) fn note(&self, offset: u64, len: u64, max: u64) -> Option<Range<u64>> {
        let state = &mut *self.state.lock();
        let end = offset.saturating_add(len);
        let near = (8 * len).clamp(NEAR.start, NEAR.end);
        if offset.abs_diff(state.next) > near {
            *state = State {
                next: end,
                ..State::default()
            };
            return None;
        }
        if end <= state.next {
            return None; // once more, or out of order
        }
        state.next = end;
        state.hits = state.hits.saturating_add(1);
        if state.hits < HITS || state.ahead >= end.saturating_add(state.window / 2).max(1) {
            return None;
        }
        state.window = (2 * state.window).max(FIRST).max(2 * len).min(max);
        let from = state.ahead.max(end);
        state.ahead = end.saturating_add(state.window);
        (from < state.ahead).then_some(from..state.ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: u64 = 1024 * 1024;

    #[test]
    fn a_stream_is_read_ahead_of_once_and_in_growing_steps() {
        let stream = Stream::default();
        let (mut ahead, mut steps) = (0, Vec::new());
        for i in 0..1024 {
            let end = (i + 1) * 4096;
            if let Some(range) = stream.note(i * 4096, 4096, MAX) {
                assert!(range.start >= end && range.start >= ahead, "nothing twice");
                assert!(range.end <= end + MAX);
                steps.push(range.end - range.start);
                ahead = range.end;
            }
            assert!(i == 0 || ahead > end, "the next request is on its way");
        }
        assert!(steps[0] >= FIRST && steps.len() < 16, "{steps:?}");
    }

    #[test]
    fn a_reader_that_jumps_is_not_read_ahead_of() {
        let stream = Stream::default();
        for i in 0..100_u64 {
            let offset = (i * 7919 % 1000) * 1024 * 1024;
            assert_eq!(stream.note(offset, 4096, MAX), None);
        }
        // Where it settles down it is.
        let base = 5000 * 1024 * 1024;
        let found = (0..4).find_map(|i| stream.note(base + i * 4096, 4096, MAX));
        assert!(found.is_some());
    }

    #[test]
    fn requests_out_of_order_stay_one_stream() {
        let stream = Stream::default();
        let mut read = 0;
        for i in [1, 0, 3, 2, 5, 4, 7, 6, 9, 8_u64] {
            if let Some(range) = stream.note(i * 65536, 65536, MAX) {
                read += range.end - range.start;
            }
        }
        assert!(read > 0);
        assert_eq!(stream.note(u64::MAX - 4096, 4096, MAX), None);
        assert_eq!(stream.note(u64::MAX - 2, 4096, MAX), None);
    }
}
