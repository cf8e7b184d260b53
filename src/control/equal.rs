//! What is equal, on the control channel: where the blocks of a file are, with their checksums, and
//! sharing of ranges after a comparison.
//!
//! Invariants:
//!
//! 1. An answer holds at most [`RUNS_MAX`] runs and [`SUMS_MAX`] checksums, or [`EQUAL_BLOCKS_MAX`]
//!    blocks that are equal in ranges with gaps between, and fits the payload.

use serde_json::{Value, json};

use super::ranges::lists;
use super::{Object, Token, malformed, to_hex};
use crate::engine::{Equal, Place, Places, Share};
use crate::error::Result;

/// Most runs in an answer: three numbers of 14 digits each fit 2,400 bytes.
pub const RUNS_MAX: usize = 50;
/// Most checksums in an answer: 5 KiB.
pub const SUMS_MAX: u64 = 640;
/// Most blocks that one request compares: 4 MiB, so that it takes a moment. Every second one is a
/// range of at most 9 bytes.
pub const EQUAL_BLOCKS_MAX: u64 = 1024;

/// Digits of a checksum.
const DIGITS: usize = 8;

/// Ranges to compare and share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compare {
    /// Where from; `None`: the open file itself.
    pub source: Option<Token>,
    /// Which.
    pub range: Share,
    /// Only tell what would be shared.
    pub dry: bool,
}

pub(super) fn compare_value(compare: &Compare) -> Value {
    let Share {
        block,
        dst_block,
        count,
    } = compare.range;
    json!({
        "op": "share_equal",
        "source": compare.source.map(|token| to_hex(&token.0)),
        "block": block,
        "dst_block": dst_block,
        "count": count,
        "dry": compare.dry,
    })
}

pub(super) fn compare_from(object: &Object<'_>) -> Result<Compare> {
    let source = match object.optional_text("source")? {
        None => None,
        Some(_) => Some(Token(object.hex("source")?)),
    };
    let range = Share {
        block: object.number("block")?,
        dst_block: object.number("dst_block")?,
        count: object.number("count")?,
    };
    if range.count > EQUAL_BLOCKS_MAX {
        return Err(malformed("count")); // I1
    }
    Ok(Compare {
        source,
        range,
        dry: object.flag("dry")?,
    })
}

pub(super) fn equal_value(equal: &Equal) -> Value {
    json!({"ranges": pairs(&equal.ranges), "compared": equal.compared})
}

pub(super) fn equal_from(object: &Object<'_>) -> Result<Equal> {
    let ranges = lists::<2>(object, "ranges")?.into_iter();
    Ok(Equal {
        ranges: ranges.map(|[start, count]| (start, count)).collect(),
        compared: object.number("compared")?,
    })
}

fn pairs(ranges: &[(u64, u64)]) -> Vec<Value> {
    ranges
        .iter()
        .map(|(start, count)| json!([start, count]))
        .collect()
}

pub(super) fn places_value(places: &Places) -> Value {
    let runs: Vec<Value> = places
        .runs
        .iter()
        .map(|run| json!([run.at, run.block, run.count]))
        .collect();
    let sums: String = places
        .sums
        .iter()
        .map(|sum| format!("{sum:0DIGITS$x}"))
        .collect();
    json!({"runs": runs, "sums": sums, "next": places.next})
}

pub(super) fn places_from(object: &Object<'_>) -> Result<Places> {
    let runs = lists::<3>(object, "runs")?.into_iter();
    let text = object.text("sums")?;
    // Signs are no digits, though the parser of numbers takes them.
    if !text.len().is_multiple_of(DIGITS) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(malformed("sums"));
    }
    let sums = (0..text.len())
        .step_by(DIGITS)
        .map(|at| u32::from_str_radix(&text[at..at + DIGITS], 16).map_err(|_| malformed("sums")));
    Ok(Places {
        runs: runs
            .map(|[at, block, count]| Place { at, block, count })
            .collect(),
        sums: sums.collect::<Result<_>>()?,
        next: object.number("next")?,
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Request, Response};
    use super::*;

    #[test]
    fn full_messages_fit_and_come_back() {
        // The last block of the largest file, and of the largest pool, has 14 or 15 digits.
        let far = (1 << 55) / 4096;
        let range = Share {
            block: far,
            dst_block: far,
            count: EQUAL_BLOCKS_MAX,
        };
        let compare = Request::ShareEqual(Compare {
            source: Some(Token([9; 16])),
            range,
            dry: true,
        });
        let places = Request::Places {
            from: 1,
            to: far,
            sums: true,
        };
        for request in [&compare, &places] {
            let payload = request.encode().unwrap();
            assert_eq!(Request::decode(&payload[..]).unwrap(), *request);
        }
        let equal = Response::Equal(Equal {
            ranges: (0..EQUAL_BLOCKS_MAX).step_by(2).map(|at| (at, 1)).collect(),
            compared: EQUAL_BLOCKS_MAX,
        });
        let run = Place {
            at: far,
            block: 1 << 48,
            count: far,
        };
        let found = Response::Places(Places {
            runs: vec![run; RUNS_MAX],
            sums: vec![0xfedc_ba98; SUMS_MAX as usize],
            next: far,
        });
        for (request, response) in [(compare, equal), (places, found)] {
            let payload = Response::encode(&Ok(response.clone()));
            assert_eq!(Response::decode(&request, &payload[..]).unwrap(), response);
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let range = Share {
            block: 0,
            dst_block: 0,
            count: EQUAL_BLOCKS_MAX + 1,
        };
        let compare = Compare {
            source: None,
            range,
            dry: false,
        };
        let payload = Request::ShareEqual(compare).encode().unwrap();
        assert!(Request::decode(&payload[..]).is_err());
        let places = Request::Places {
            from: 0,
            to: 1,
            sums: true,
        };
        for sums in ["1", "+1234567", "1234567\u{e9}"] {
            let payload = format!("{{\"ok\":{{\"runs\":[],\"sums\":\"{sums}\",\"next\":1}}}}");
            assert!(Response::decode(&places, payload.as_bytes()).is_err());
        }
    }
}
