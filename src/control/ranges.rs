//! Ranges of blocks on the control channel: sharing many at once, and telling where data is or
//! where two files differ.
//!
//! Invariants:
//!
//! 1. A request stands for at most [`SHARES_MAX`] ranges, an answer holds at most [`EXTENTS_MAX`],
//!    and both fit the payload.

use serde_json::{Value, json};

use super::{Object, Token, malformed, to_hex};
use crate::engine::{Extents, Share};
use crate::error::Result;

/// Most ranges that one request shares.
pub const SHARES_MAX: u64 = 4096;
/// Most [`Shares`] in one request: six numbers of 14 digits each fit 7 KiB.
pub const GROUPS_MAX: usize = 75;
/// Most ranges in an answer: two numbers of 14 digits each fit 7 KiB.
pub const EXTENTS_MAX: usize = 200;

/// Ranges that follow each other in equal steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// The first.
    pub first: Share,
    /// How many, at least 1.
    pub times: u64,
    /// Blocks from each to the next in the source and in the destination.
    pub steps: (u64, u64),
}

impl Shares {
    /// One by one.
    pub fn each(&self) -> impl Iterator<Item = Share> + '_ {
        (0..self.times).map(|i| Share {
            block: self
                .first
                .block
                .saturating_add(i.saturating_mul(self.steps.0)),
            dst_block: self
                .first
                .dst_block
                .saturating_add(i.saturating_mul(self.steps.1)),
            count: self.first.count,
        })
    }
}

/// What of a file is asked for, in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// First block.
    pub from: u64,
    /// The block behind the last one.
    pub to: u64,
    /// The file to compare with, and its block that goes with `from`. `None`: where is data?
    pub other: Option<(Token, u64)>,
}

pub(super) fn shares_value(source: Option<Token>, groups: &[Shares]) -> Value {
    let groups: Vec<Value> = groups
        .iter()
        .map(|group| {
            let Share {
                block,
                dst_block,
                count,
            } = group.first;
            json!([
                block,
                dst_block,
                count,
                group.times,
                group.steps.0,
                group.steps.1
            ])
        })
        .collect();
    json!({
        "op": "share",
        "source": source.map(|token| to_hex(&token.0)),
        "ranges": groups,
    })
}

pub(super) fn shares_from(object: &Object<'_>) -> Result<(Option<Token>, Vec<Shares>)> {
    let source = match object.optional_text("source")? {
        None => None,
        Some(_) => Some(Token(object.hex("source")?)),
    };
    let mut groups = Vec::new();
    let mut total = 0_u64;
    for numbers in lists::<6>(object, "ranges")? {
        let [block, dst_block, count, times, step, dst_step] = numbers;
        total = total.saturating_add(times);
        groups.push(Shares {
            first: Share {
                block,
                dst_block,
                count,
            },
            times,
            steps: (step, dst_step),
        });
    }
    if total > SHARES_MAX {
        return Err(malformed("ranges")); // I1
    }
    Ok((source, groups))
}

pub(super) fn look_value(look: &Look) -> Value {
    json!({
        "op": "extents",
        "from": look.from,
        "to": look.to,
        "other": look.other.map(|(token, _)| to_hex(&token.0)),
        "other_from": look.other.map(|(_, from)| from),
    })
}

pub(super) fn look_from(object: &Object<'_>) -> Result<Look> {
    let other = match object.optional_text("other")? {
        None => None,
        Some(_) => Some((Token(object.hex("other")?), object.number("other_from")?)),
    };
    let look = Look {
        from: object.number("from")?,
        to: object.number("to")?,
        other,
    };
    if look.from > look.to {
        return Err(malformed("to"));
    }
    Ok(look)
}

pub(super) fn extents_value(extents: &Extents) -> Value {
    let ranges: Vec<Value> = extents
        .ranges
        .iter()
        .map(|(start, count)| json!([start, count]))
        .collect();
    json!({"ranges": ranges, "next": extents.next})
}

pub(super) fn extents_from(object: &Object<'_>) -> Result<Extents> {
    Ok(Extents {
        ranges: lists::<2>(object, "ranges")?
            .into_iter()
            .map(|[start, count]| (start, count))
            .collect(),
        next: object.number("next")?,
    })
}

/// A list of lists of `N` numbers.
pub(super) fn lists<const N: usize>(object: &Object<'_>, name: &str) -> Result<Vec<[u64; N]>> {
    let list = object.field(name)?.as_array();
    let list = list.ok_or_else(|| malformed(name))?;
    let numbers = |value: &Value| -> Option<[u64; N]> {
        let parts: Option<Vec<u64>> = value.as_array()?.iter().map(Value::as_u64).collect();
        parts?.try_into().ok()
    };
    let lists: Option<Vec<_>> = list.iter().map(numbers).collect();
    lists.ok_or_else(|| malformed(name))
}

#[cfg(test)]
mod tests {
    use super::super::{PAYLOAD_BYTES, Request, Response};
    use super::*;

    fn group(number: u64, times: u64) -> Shares {
        Shares {
            first: Share {
                block: number,
                dst_block: number,
                count: number,
            },
            times,
            steps: (number, number),
        }
    }

    #[test]
    fn full_messages_fit_and_come_back() {
        // The last block of the largest file has 14 digits.
        let far = (1 << 55) / 4096;
        let look = Look {
            from: 1,
            to: far,
            other: Some((Token([7; 16]), far)),
        };
        let requests = [
            Request::Share {
                source: Some(Token([9; 16])),
                ranges: vec![group(far, 12); GROUPS_MAX],
            },
            Request::Share {
                source: None,
                ranges: vec![group(0, SHARES_MAX)],
            },
            Request::Extents(look),
            Request::Extents(Look {
                other: None,
                ..look
            }),
        ];
        for request in &requests {
            let payload = request.encode().unwrap();
            assert_eq!(payload.len(), PAYLOAD_BYTES);
            assert_eq!(Request::decode(&payload[..]).unwrap(), *request);
        }
        let response = Response::Extents(Extents {
            ranges: vec![(far, far); EXTENTS_MAX],
            next: far,
        });
        let payload = Response::encode(&Ok(response.clone()));
        assert_eq!(
            Response::decode(&requests[2], &payload[..]).unwrap(),
            response
        );
    }

    #[test]
    fn more_than_a_request_may_ask_for_is_refused() {
        for ranges in [
            vec![group(1, SHARES_MAX + 1)],
            vec![group(1, u64::MAX), group(1, 1)],
        ] {
            let request = Request::Share {
                source: None,
                ranges,
            };
            let payload = request.encode().unwrap();
            assert!(Request::decode(&payload[..]).is_err());
        }
    }
}
