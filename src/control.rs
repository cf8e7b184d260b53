//! The control channel: what the command line asks of a mounted pool, by one ioctl on any open
//! file or directory of the mount.
//!
//! The payload is 8 KiB both ways: UTF-8 JSON, padded with NULs. A request is an object with `op`;
//! the answer is `{"ok":{...}}` or `{"error":{"kind":"Exists","message":"..."}}`.
//!
//! A clone names its source by a *token*, which is given out on an open source: having opened it
//! proves the right to read it. The destination is the open directory that the ioctl is made on.
//!
//! Decoding is total: any bytes give a value or an error.

use std::os::fd::BorrowedFd;

use serde_json::{Map, Value, json};

use crate::engine::{Equal, Extents, FileUsage, Health, Places, Replayed, ScrubStatus, Usage};
use crate::error::{Error, Kind, Result};
use crate::sys;
use crate::vfs::NAME_BYTES_MAX;

mod equal;
mod ranges;
mod scrub;

pub use equal::{Compare, EQUAL_BLOCKS_MAX, RUNS_MAX, SUMS_MAX};
pub use ranges::{EXTENTS_MAX, GROUPS_MAX, Look, SHARES_MAX, Shares};
pub use scrub::{ScrubFindings, ScrubPage, scrub_state_name, scrub_status_value};

/// Bytes of the payload, both ways.
pub const PAYLOAD_BYTES: usize = 8192;

/// Number of the ioctl: `_IOWR('N', 1, [u8; 8192])`. Read and write, the size, a letter, 1.
pub const CONTROL: u32 = 3 << 30 | (PAYLOAD_BYTES as u32) << 16 | (b'N' as u32) << 8 | 1;

/// Most clones that one request makes.
pub const CLONES_MAX: u32 = 100_000;

/// Longest message of an error that is sent, in bytes: what is left of the payload holds the rest
/// even if every byte is escaped.
const MESSAGE_BYTES_MAX: usize = 1024;

/// Proof that a file or directory was opened, for a minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub [u8; 16]);

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Facts of the pool and of the daemon.
    Info,
    /// A token for the open file or directory.
    Token,
    /// Clones `source` into the open directory.
    Clone {
        /// What to clone.
        source: Token,
        /// Name of the clone; `{}` in it is the number of the clone where `count` is given.
        name: String,
        /// How many, numbered from 1. `None`: one, with `name` as it is.
        count: Option<u32>,
        /// Keeps owner and group of the source. Else the clones are the caller's.
        preserve: bool,
    },
    /// What the open file uses.
    Usage,
    /// Writes a checkpoint.
    Checkpoint,
    /// Begins a scrub, or finds the one that runs.
    ScrubStart {
        /// Bytes per second, at most. `None`: gently.
        rate: Option<u64>,
        /// Does not go on where an earlier one was interrupted.
        restart: bool,
    },
    /// Stops the scrub.
    ScrubStop,
    /// How the scrub stands, or how the last one ended.
    ScrubStatus,
    /// What it found, from a page on.
    ScrubFindings(ScrubPage),
    /// Shares ranges of blocks with the open file.
    Share {
        /// Where from; `None`: the open file itself.
        source: Option<Token>,
        /// Which.
        ranges: Vec<Shares>,
    },
    /// Where the open file has data, or differs from another.
    Extents(Look),
    /// Where the blocks of the open file are.
    Places {
        /// First block.
        from: u64,
        /// The block behind the last one.
        to: u64,
        /// With their checksums.
        sums: bool,
    },
    /// Shares blocks with the open file that are equal.
    ShareEqual(Compare),
    /// Makes the pool larger.
    Grow {
        /// Size in bytes; `None`: as large as its device has become.
        size: Option<u64>,
    },
}

/// Facts of a mounted pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Process of the daemon.
    pub pid: u32,
    /// Absolute path of the pool.
    pub pool: String,
    /// Identity of the pool.
    pub uuid: [u8; 16],
    /// Version of its on-disk format.
    pub version: u32,
    /// Why writes are refused, if a write or sync failed.
    pub poisoned: Option<String>,
    /// What happened since it was mounted.
    pub health: Health,
    /// True if the host refused the last new data for want of space.
    pub host_full: bool,
    /// Percent of use at which the daemon warns, ascending.
    pub marks: Vec<u8>,
    /// How full it is.
    pub usage: Usage,
}

/// What is answered, per request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// To [`Request::Info`].
    Info(Box<Info>),
    /// To [`Request::Token`].
    Token(Token),
    /// To [`Request::Clone`]: how many were made.
    Clones(u32),
    /// To [`Request::Usage`].
    Usage(FileUsage),
    /// To [`Request::Extents`].
    Extents(Extents),
    /// To [`Request::Places`].
    Places(Places),
    /// To [`Request::ShareEqual`].
    Equal(Equal),
    /// To [`Request::Checkpoint`] and [`Request::Share`].
    Done,
    /// To [`Request::ScrubStart`], [`Request::ScrubStop`] and [`Request::ScrubStatus`].
    Scrub(Box<ScrubStatus>),
    /// To [`Request::ScrubFindings`].
    ScrubFindings(ScrubFindings),
    /// To [`Request::Grow`]: the size of the pool, in bytes.
    Grown(u64),
}

/// Asks the daemon behind `file`, an open file or directory of a mount. Its errors come back as
/// they were there; [`Kind::Unsupported`] if there is no nodupe daemon behind it.
pub fn call(file: BorrowedFd<'_>, request: &Request) -> Result<Response> {
    if *request == Request::Token {
        // What a mapping of the source changed is still with the kernel. A directory has none.
        sys::control::write_back(file);
    }
    let mut payload = request.encode()?;
    sys::control::control(file, CONTROL, &mut payload).map_err(|error| {
        if sys::control::is_unknown(&error) {
            Error::new(
                Kind::Unsupported,
                "this is not in a mounted nodupe datastore: give a path below the mount",
            )
        } else {
            Error::io("the daemon of the datastore does not answer", error)
        }
    })?;
    Response::decode(request, &payload[..])
}

impl Request {
    /// The payload to send.
    pub fn encode(&self) -> Result<Box<[u8; PAYLOAD_BYTES]>> {
        pad(&match self {
            Request::Info => json!({"op": "info"}),
            Request::Token => json!({"op": "token"}),
            Request::Clone {
                source,
                name,
                count,
                preserve,
            } => json!({
                "op": "clone",
                "source": to_hex(&source.0),
                "name": name,
                "count": count,
                "preserve": preserve,
            }),
            Request::Usage => json!({"op": "usage"}),
            Request::Checkpoint => json!({"op": "checkpoint"}),
            Request::ScrubStart { rate, restart } => {
                json!({"op": "scrub_start", "rate": rate, "restart": restart})
            }
            Request::ScrubStop => json!({"op": "scrub_stop"}),
            Request::ScrubStatus => json!({"op": "scrub_status"}),
            Request::ScrubFindings(page) => {
                json!({"op": "scrub_findings", "page": scrub::page_value(*page)})
            }
            Request::Share { source, ranges } => ranges::shares_value(*source, ranges),
            Request::Extents(look) => ranges::look_value(look),
            Request::Places { from, to, sums } => {
                json!({"op": "places", "from": from, "to": to, "sums": sums})
            }
            Request::ShareEqual(compare) => equal::compare_value(compare),
            Request::Grow { size } => json!({"op": "grow", "size": size}),
        })
    }

    /// The request that was sent.
    pub fn decode(payload: &[u8]) -> Result<Self> {
        let object = Object::parse(payload)?;
        match object.text("op")? {
            "info" => Ok(Request::Info),
            "token" => Ok(Request::Token),
            "clone" => Ok(Request::Clone {
                source: Token(object.hex("source")?),
                name: object.text("name")?.to_owned(),
                count: object.optional_number("count")?,
                preserve: object.flag("preserve")?,
            }),
            "usage" => Ok(Request::Usage),
            "checkpoint" => Ok(Request::Checkpoint),
            "scrub_start" => Ok(Request::ScrubStart {
                rate: match object.0.get("rate") {
                    None | Some(Value::Null) => None,
                    Some(_) => Some(object.number("rate")?),
                },
                restart: object.flag("restart")?,
            }),
            "scrub_stop" => Ok(Request::ScrubStop),
            "scrub_status" => Ok(Request::ScrubStatus),
            "scrub_findings" => {
                let page = Object::of(object.field("page")?)?;
                Ok(Request::ScrubFindings(scrub::page_from(&page)?))
            }
            "share" => {
                let (source, ranges) = ranges::shares_from(&object)?;
                Ok(Request::Share { source, ranges })
            }
            "extents" => ranges::look_from(&object).map(Request::Extents),
            "places" => Ok(Request::Places {
                from: object.number("from")?,
                to: object.number("to")?,
                sums: object.flag("sums")?,
            }),
            "share_equal" => equal::compare_from(&object).map(Request::ShareEqual),
            "grow" => Ok(Request::Grow {
                size: object.optional_number("size")?,
            }),
            _ => Err(Error::new(
                Kind::Unsupported,
                "the daemon does not know this request: use the same version of nodupe for both",
            )),
        }
    }
}

impl Response {
    /// The payload that answers with `result`.
    pub fn encode(result: &Result<Response>) -> Box<[u8; PAYLOAD_BYTES]> {
        let value = match result {
            Ok(response) => json!({ "ok": response.to_value() }),
            Err(error) => error_value(error),
        };
        // Everything but the path of the pool has a bounded length.
        pad(&value)
            .or_else(|error| pad(&error_value(&error)))
            .unwrap_or_else(|_| Box::new([0; PAYLOAD_BYTES]))
    }

    /// The answer to `request`, or the error that was the answer.
    pub fn decode(request: &Request, payload: &[u8]) -> Result<Self> {
        let object = Object::parse(payload)?;
        if let Some(error) = object.0.get("error") {
            let error = Object::of(error)?;
            let kind = kind_from_name(error.text("kind")?).unwrap_or(Kind::Io);
            return Err(Error::new(kind, error.text("message")?));
        }
        let ok = Object::of(object.field("ok")?)?;
        Ok(match request {
            Request::Info => Response::Info(Box::new(Info {
                pid: ok.number("pid")?,
                pool: ok.text("pool")?.to_owned(),
                uuid: ok.hex("uuid")?,
                version: ok.number("version")?,
                poisoned: ok.optional_text("poisoned")?,
                health: health_from(&Object::of(ok.field("health")?)?)?,
                host_full: ok.flag("host_full")?,
                marks: ok.percents("marks")?,
                usage: usage_from(&Object::of(ok.field("usage")?)?)?,
            })),
            Request::Token => Response::Token(Token(ok.hex("token")?)),
            Request::Clone { .. } => Response::Clones(ok.number("clones")?),
            Request::Usage => Response::Usage(FileUsage {
                size: ok.number("size")?,
                mapped: ok.number("mapped")?,
                exclusive: ok.number("exclusive")?,
                extents: ok.number("extents")?,
            }),
            Request::Checkpoint | Request::Share { .. } => Response::Done,
            Request::Extents(_) => Response::Extents(ranges::extents_from(&ok)?),
            Request::Places { .. } => Response::Places(equal::places_from(&ok)?),
            Request::ShareEqual(_) => Response::Equal(equal::equal_from(&ok)?),
            Request::ScrubStart { .. } | Request::ScrubStop | Request::ScrubStatus => {
                Response::Scrub(Box::new(scrub::status_from(&ok)?))
            }
            Request::ScrubFindings(_) => Response::ScrubFindings(ScrubFindings::from_object(&ok)?),
            Request::Grow { .. } => Response::Grown(ok.number("size")?),
        })
    }

    fn to_value(&self) -> Value {
        match self {
            Response::Info(info) => json!({
                "pid": info.pid,
                "pool": info.pool,
                "uuid": to_hex(&info.uuid),
                "version": info.version,
                "host_full": info.host_full,
                "marks": info.marks,
                "poisoned": info.poisoned.as_deref().map(|why| cut(why, MESSAGE_BYTES_MAX)),
                "health": health_value(&info.health),
                "usage": usage_value(&info.usage),
            }),
            Response::Token(token) => json!({"token": to_hex(&token.0)}),
            Response::Clones(clones) => json!({ "clones": clones }),
            Response::Usage(usage) => {
                let FileUsage {
                    size,
                    mapped,
                    exclusive,
                    extents,
                } = usage;
                json!({"size": size, "mapped": mapped, "exclusive": exclusive, "extents": extents})
            }
            Response::Done => json!({}),
            Response::Extents(extents) => ranges::extents_value(extents),
            Response::Places(places) => equal::places_value(places),
            Response::Equal(equal) => equal::equal_value(equal),
            Response::Scrub(status) => scrub_status_value(status),
            Response::ScrubFindings(findings) => findings.to_value(),
            Response::Grown(size) => json!({ "size": size }),
        }
    }
}

/// Names of `count` clones: `{}` in `name` becomes the number from 1. Without a count the one name
/// is `name` itself.
///
/// # Errors
/// `NameTooLong` before any is made: a user must not make the daemon fill its memory with them.
pub fn clone_names(name: &str, count: Option<u32>) -> Result<Vec<Vec<u8>>> {
    let holes = name.matches("{}").count();
    let longest = match count {
        Some(count) => name.len() - holes * 2 + holes * count.to_string().len(),
        None => name.len(),
    };
    if longest > NAME_BYTES_MAX {
        return Err(Error::new(
            Kind::NameTooLong,
            format!("a name has at most {NAME_BYTES_MAX} bytes, that of the clone {longest}"),
        ));
    }
    let Some(count) = count else {
        return Ok(vec![name.as_bytes().to_vec()]);
    };
    if count == 0 || count > CLONES_MAX {
        return Err(Error::new(
            Kind::Invalid,
            format!("a clone is made 1 to {CLONES_MAX} times: count={count}"),
        ));
    }
    if holes == 0 {
        if count > 1 {
            return Err(Error::new(
                Kind::Invalid,
                "several clones need a {} in their name, for the number",
            ));
        }
        return Ok(vec![name.as_bytes().to_vec()]);
    }
    Ok((1..=count)
        .map(|number| name.replace("{}", &number.to_string()).into_bytes())
        .collect())
}

/// Every kind of error.
const KINDS: [Kind; 21] = [
    Kind::NotFound,
    Kind::Exists,
    Kind::Invalid,
    Kind::TooLarge,
    Kind::NameTooLong,
    Kind::NotDirectory,
    Kind::IsDirectory,
    Kind::NotEmpty,
    Kind::NotPermitted,
    Kind::Denied,
    Kind::TooManyLinks,
    Kind::NoAttribute,
    Kind::Range,
    Kind::NoSuchOffset,
    Kind::Unsupported,
    Kind::Busy,
    Kind::NoSpace,
    Kind::ReadOnly,
    Kind::Corrupt,
    Kind::Io,
    Kind::Poisoned,
];

/// Name of a kind of error on the channel.
pub fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::NotFound => "NotFound",
        Kind::Exists => "Exists",
        Kind::Invalid => "Invalid",
        Kind::TooLarge => "TooLarge",
        Kind::NameTooLong => "NameTooLong",
        Kind::NotDirectory => "NotDirectory",
        Kind::IsDirectory => "IsDirectory",
        Kind::NotEmpty => "NotEmpty",
        Kind::NotPermitted => "NotPermitted",
        Kind::Denied => "Denied",
        Kind::TooManyLinks => "TooManyLinks",
        Kind::NoAttribute => "NoAttribute",
        Kind::Range => "Range",
        Kind::NoSuchOffset => "NoSuchOffset",
        Kind::Unsupported => "Unsupported",
        Kind::Busy => "Busy",
        Kind::NoSpace => "NoSpace",
        Kind::ReadOnly => "ReadOnly",
        Kind::Corrupt => "Corrupt",
        Kind::Io => "Io",
        Kind::Poisoned => "Poisoned",
    }
}

/// The kind of error of that name.
pub fn kind_from_name(name: &str) -> Option<Kind> {
    KINDS.into_iter().find(|&kind| kind_name(kind) == name)
}

fn error_value(error: &Error) -> Value {
    let mut message = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        message = format!("{message}: {cause}");
        source = cause.source();
    }
    json!({"error": {
        "kind": kind_name(error.kind()),
        "message": cut(&message, MESSAGE_BYTES_MAX),
    }})
}

/// As it is sent, and as the command line shows it.
pub fn health_value(health: &Health) -> Value {
    json!({
        "replayed_batches": health.replayed.batches,
        "replayed_bytes": health.replayed.bytes,
        "replay_ms": health.replayed.millis,
        "replay_left_out": health.replayed.left_out,
        "unsynced_ms": health.unsynced_ms,
        "damaged_reads": health.damaged_reads,
        "stale_copies": health.stale_copies,
        "beats": health.beats,
        "beat_age_ms": health.beat_age_ms,
    })
}

fn health_from(object: &Object<'_>) -> Result<Health> {
    Ok(Health {
        replayed: Replayed {
            batches: object.number("replayed_batches")?,
            bytes: object.number("replayed_bytes")?,
            millis: object.number("replay_ms")?,
            left_out: object.number("replay_left_out")?,
        },
        unsynced_ms: object.number("unsynced_ms")?,
        damaged_reads: object.number("damaged_reads")?,
        stale_copies: object.number("stale_copies")?,
        beats: object.number("beats")?,
        beat_age_ms: object.number("beat_age_ms")?,
    })
}

fn usage_value(usage: &Usage) -> Value {
    let Usage {
        total,
        used,
        available,
        host_available,
        reserve,
        staged,
        journal_used,
        journal_size,
        logical,
        inodes,
    } = usage;
    json!({
        "total": total,
        "used": used,
        "available": available,
        "host_available": host_available,
        "reserve": reserve,
        "staged": staged,
        "journal_used": journal_used,
        "journal_size": journal_size,
        "logical": logical,
        "inodes": inodes,
    })
}

fn usage_from(object: &Object<'_>) -> Result<Usage> {
    Ok(Usage {
        total: object.number("total")?,
        used: object.number("used")?,
        available: object.number("available")?,
        host_available: object.optional_number("host_available")?,
        reserve: object.number("reserve")?,
        staged: object.number("staged")?,
        journal_used: object.number("journal_used")?,
        journal_size: object.number("journal_size")?,
        logical: object.number("logical")?,
        inodes: object.number("inodes")?,
    })
}

/// `text`, or as much of it as `bytes` hold.
fn cut(text: &str, bytes: usize) -> &str {
    let mut end = text.len().min(bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn pad(value: &Value) -> Result<Box<[u8; PAYLOAD_BYTES]>> {
    let text = value.to_string();
    let mut payload = Box::new([0; PAYLOAD_BYTES]);
    match payload.get_mut(..text.len()) {
        Some(start) => start.copy_from_slice(text.as_bytes()),
        None => {
            return Err(Error::new(
                Kind::TooLarge,
                format!(
                    "the names in it are too long for one request: length={}",
                    text.len()
                ),
            ));
        }
    }
    Ok(payload)
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<[u8; 16]> {
    // Signs are no digits, though the parser of numbers takes them.
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let number = u128::from_str_radix(text, 16).ok()?;
    let mut bytes = [0; 16];
    for (index, byte) in bytes.iter_mut().enumerate() {
        // The cast keeps the low eight bits: the first byte is the highest.
        *byte = (number >> (8 * (15 - index))) as u8;
    }
    Some(bytes)
}

/// The fields of a JSON object, borrowed or just parsed.
struct Object<'a>(std::borrow::Cow<'a, Map<String, Value>>);

impl<'a> Object<'a> {
    fn parse(payload: &[u8]) -> Result<Object<'static>> {
        let text = payload.split(|&byte| byte == 0).next().unwrap_or(&[]);
        match serde_json::from_slice(text) {
            Ok(Value::Object(fields)) => Ok(Object(std::borrow::Cow::Owned(fields))),
            _ => Err(malformed("the payload")),
        }
    }

    fn of(value: &'a Value) -> Result<Self> {
        value
            .as_object()
            .map(|fields| Object(std::borrow::Cow::Borrowed(fields)))
            .ok_or_else(|| malformed("an object"))
    }

    fn field(&self, name: &str) -> Result<&Value> {
        self.0.get(name).ok_or_else(|| malformed(name))
    }

    fn text(&self, name: &str) -> Result<&str> {
        self.field(name)?.as_str().ok_or_else(|| malformed(name))
    }

    fn optional_text(&self, name: &str) -> Result<Option<String>> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => Ok(Some(self.text(name)?.to_owned())),
        }
    }

    fn number<T: TryFrom<u64>>(&self, name: &str) -> Result<T> {
        self.field(name)?
            .as_u64()
            .and_then(|number| T::try_from(number).ok())
            .ok_or_else(|| malformed(name))
    }

    fn optional_number<T: TryFrom<u64>>(&self, name: &str) -> Result<Option<T>> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => self.number(name).map(Some),
        }
    }

    fn flag(&self, name: &str) -> Result<bool> {
        match self.0.get(name) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| malformed(name)),
        }
    }

    /// A list of percents; none if it is missing.
    fn percents(&self, name: &str) -> Result<Vec<u8>> {
        let Some(list) = self.0.get(name) else {
            return Ok(Vec::new());
        };
        let list = list.as_array().ok_or_else(|| malformed(name))?;
        let percent = |value: &Value| {
            let number = value.as_u64().and_then(|number| u8::try_from(number).ok());
            number.filter(|number| *number <= 100)
        };
        let percents: Option<Vec<u8>> = list.iter().map(percent).collect();
        percents.ok_or_else(|| malformed(name))
    }

    fn hex(&self, name: &str) -> Result<[u8; 16]> {
        from_hex(self.text(name)?).ok_or_else(|| malformed(name))
    }
}

fn malformed(what: &str) -> Error {
    Error::new(
        Kind::Invalid,
        format!("not a message of the control channel: field={what}"),
    )
}

#[cfg(test)]
mod tests;
