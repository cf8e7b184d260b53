//! The part of the control channel about scrub: how it stands, and what it found, a page at a time.

use serde_json::{Value, json};

use super::{MESSAGE_BYTES_MAX, Object, cut, malformed};
use crate::engine::{DamagedFile, Scrub, ScrubPhase, ScrubState, ScrubStatus};
use crate::error::Result;
use crate::units::Time;

/// Bytes of findings in one page: what is left of the payload holds the frame.
const PAGE_BYTES_MAX: usize = 7000;

/// Bytes of one path, escaped: of a longer one the end is sent.
const PATH_BYTES_MAX: usize = 3000;

/// Paths of one file, and findings that are no files, looked at for one page.
const ITEMS_MAX: usize = 64;

/// Where a page of findings begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubPage {
    /// Files with inode numbers up to this one were sent.
    pub after: u64,
    /// Paths of the next file that were sent.
    pub paths: u64,
    /// Findings that are no files that were sent.
    pub others: u64,
}

/// A page of findings. A file with many paths is in several pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubFindings {
    /// Damaged files, by inode number.
    pub files: Vec<DamagedFile>,
    /// Findings that are no files.
    pub others: Vec<String>,
    /// Where the next page begins; `None`: this was the last one.
    pub next: Option<ScrubPage>,
}

impl ScrubFindings {
    /// The page of what `scrub` found that begins at `page`.
    pub fn page(scrub: &Scrub, page: ScrubPage) -> Self {
        let mut findings = Self::default();
        let (mut at, mut bytes) = (page, 0);
        let skip = usize::try_from(page.others).unwrap_or(usize::MAX);
        for text in scrub.others(skip, ITEMS_MAX) {
            let text = cut(&text, MESSAGE_BYTES_MAX).to_owned();
            bytes += json!(text).to_string().len() + 1;
            if bytes > PAGE_BYTES_MAX {
                findings.next = Some(at);
                return findings;
            }
            findings.others.push(text);
            at.others += 1;
        }
        // More of these, or the first file, is for the next page.
        if findings.others.len() == ITEMS_MAX {
            findings.next = Some(at);
            return findings;
        }
        for file in scrub.files(page.after, ITEMS_MAX) {
            if !findings.add_file(&file, &mut at, &mut bytes) {
                findings.next = Some(at);
                return findings;
            }
        }
        findings.next = (findings.files.len() == ITEMS_MAX).then_some(at);
        findings
    }

    /// Adds a file, or as many of its paths as there is room for. False if that was not all.
    fn add_file(&mut self, file: &DamagedFile, at: &mut ScrubPage, bytes: &mut usize) -> bool {
        let mut part = DamagedFile {
            paths: Vec::new(),
            ..file.clone()
        };
        *bytes += file_value(&part).to_string().len() + 1;
        if *bytes > PAGE_BYTES_MAX {
            return false;
        }
        let skip = usize::try_from(at.paths).unwrap_or(usize::MAX);
        let mut whole = true;
        for path in file.paths.iter().skip(skip) {
            let path = shown(path);
            *bytes += json!(path).to_string().len() + 1;
            whole = *bytes <= PAGE_BYTES_MAX;
            if !whole {
                break;
            }
            part.paths.push(path.into_bytes());
            at.paths += 1;
        }
        if whole {
            (at.after, at.paths) = (file.ino, 0);
        }
        // What is sent twice but for its paths is merged by whoever asked.
        if whole || !part.paths.is_empty() {
            self.files.push(part);
        }
        whole
    }

    pub(super) fn to_value(&self) -> Value {
        json!({
            "files": self.files.iter().map(file_value).collect::<Vec<_>>(),
            "others": self.others,
            "next": self.next.map(page_value),
        })
    }

    pub(super) fn from_object(object: &Object<'_>) -> Result<Self> {
        let list = |name: &str| {
            let value = object.field(name)?.as_array();
            value.ok_or_else(|| malformed(name))
        };
        let others = list("others")?.iter().map(|value| {
            let text = value.as_str().map(str::to_owned);
            text.ok_or_else(|| malformed("others"))
        });
        let files = list("files")?.iter().map(file_from);
        let next = match object.field("next")? {
            Value::Null => None,
            value => Some(page_from(&Object::of(value)?)?),
        };
        Ok(Self {
            files: files.collect::<Result<_>>()?,
            others: others.collect::<Result<_>>()?,
            next,
        })
    }
}

/// A path as text, and of one that is too long its end.
fn shown(path: &[u8]) -> String {
    let mut text = String::from_utf8_lossy(path).into_owned();
    while json!(text).to_string().len() > PATH_BYTES_MAX {
        let half = text.chars().count() / 2;
        text = std::iter::once('~')
            .chain(text.chars().skip(half.max(2)))
            .collect();
    }
    text
}

fn file_value(file: &DamagedFile) -> Value {
    let paths = file.paths.iter().map(|path| String::from_utf8_lossy(path));
    json!({
        "ino": file.ino,
        "paths": paths.collect::<Vec<_>>(),
        "ranges": file.ranges,
        "more": file.more,
    })
}

fn file_from(value: &Value) -> Result<DamagedFile> {
    let object = Object::of(value)?;
    let bad = || malformed("files");
    let paths = object.field("paths")?.as_array().ok_or_else(bad)?;
    let ranges = object.field("ranges")?.as_array().ok_or_else(bad)?;
    let text = |value: &Value| {
        let text = value.as_str().map(|text| text.as_bytes().to_vec());
        text.ok_or_else(bad)
    };
    let range = |value: &Value| match value.as_array().map(Vec::as_slice) {
        Some([offset, len]) => offset.as_u64().zip(len.as_u64()).ok_or_else(bad),
        _ => Err(bad()),
    };
    Ok(DamagedFile {
        ino: object.number("ino")?,
        paths: paths.iter().map(text).collect::<Result<_>>()?,
        ranges: ranges.iter().map(range).collect::<Result<_>>()?,
        more: object.flag("more")?,
    })
}

pub(super) fn page_value(page: ScrubPage) -> Value {
    json!({"after": page.after, "paths": page.paths, "others": page.others})
}

pub(super) fn page_from(object: &Object<'_>) -> Result<ScrubPage> {
    Ok(ScrubPage {
        after: object.number("after")?,
        paths: object.number("paths")?,
        others: object.number("others")?,
    })
}

const STATES: [(ScrubState, &str); 5] = [
    (ScrubState::Never, "never"),
    (ScrubState::Running, "running"),
    (ScrubState::Stopped, "stopped"),
    (ScrubState::Finished, "finished"),
    (ScrubState::Failed, "failed"),
];

const PHASES: [(ScrubPhase, &str); 3] = [
    (ScrubPhase::Metadata, "metadata"),
    (ScrubPhase::Data, "data"),
    (ScrubPhase::Files, "files"),
];

fn name_of<T: PartialEq>(names: &[(T, &'static str)], wanted: &T) -> &'static str {
    let found = names.iter().find(|(value, _)| value == wanted);
    found.map_or("", |(_, name)| name)
}

fn value_of<T: Copy>(names: &[(T, &'static str)], wanted: &str) -> Result<T> {
    let found = names.iter().find(|(_, name)| *name == wanted);
    found
        .map(|(value, _)| *value)
        .ok_or_else(|| malformed(wanted))
}

/// Name of a state, as the channel and the command line tell it.
pub fn scrub_state_name(state: ScrubState) -> &'static str {
    name_of(&STATES, &state)
}

/// How a scrub stands, as JSON.
pub fn scrub_status_value(status: &ScrubStatus) -> Value {
    let time = |time: Time| json!([time.secs, time.nanos]);
    let error = status.error.as_deref();
    json!({
        "state": scrub_state_name(status.state),
        "phase": name_of(&PHASES, &status.phase),
        "position": status.position,
        "done": status.done,
        "total": status.total,
        "damaged_blocks": status.damaged_blocks,
        "files": status.files,
        "others": status.others,
        "resumed": status.resumed,
        "started": time(status.started),
        "ended": time(status.ended),
        "error": error.map(|why| cut(why, MESSAGE_BYTES_MAX)),
    })
}

pub(super) fn status_from(object: &Object<'_>) -> Result<ScrubStatus> {
    let time = |name: &str| match object.field(name)?.as_array().map(Vec::as_slice) {
        Some([secs, nanos]) => {
            let nanos = nanos.as_u64().and_then(|nanos| u32::try_from(nanos).ok());
            let time = secs.as_i64().zip(nanos);
            time.map(|(secs, nanos)| Time { secs, nanos })
                .ok_or_else(|| malformed(name))
        }
        _ => Err(malformed(name)),
    };
    Ok(ScrubStatus {
        state: value_of(&STATES, object.text("state")?)?,
        phase: value_of(&PHASES, object.text("phase")?)?,
        position: object.number("position")?,
        done: object.number("done")?,
        total: object.number("total")?,
        damaged_blocks: object.number("damaged_blocks")?,
        files: object.number("files")?,
        others: object.number("others")?,
        resumed: object.flag("resumed")?,
        started: time("started")?,
        ended: time("ended")?,
        error: object.optional_text("error")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{PAYLOAD_BYTES, Request, Response};

    #[test]
    fn a_file_with_many_and_long_names_is_sent_in_pages() {
        let long = |byte: u8| [&b"/"[..], &[byte; 250].repeat(12)].concat();
        let file = DamagedFile {
            ino: 5,
            paths: (0..40)
                .map(|i| long(b'a' + i % 26))
                .chain([long(1)])
                .collect(),
            ranges: (0..64).map(|i| (i << 50, 1 << 50)).collect(),
            more: true,
        };
        let (mut at, mut paths, mut pages) = (ScrubPage::default(), Vec::new(), 0);
        loop {
            let mut findings = ScrubFindings::default();
            let mut bytes = 0;
            let whole = findings.add_file(&file, &mut at, &mut bytes);
            findings.next = (!whole).then_some(at);
            let request = Request::ScrubFindings(ScrubPage::default());
            let payload = Response::encode(&Ok(Response::ScrubFindings(findings.clone())));
            assert_eq!(payload.len(), PAYLOAD_BYTES);
            let back = Response::decode(&request, &payload[..]).unwrap();
            assert_eq!(back, Response::ScrubFindings(findings.clone()));
            pages += 1;
            for part in findings.files {
                assert_eq!(
                    (part.ino, part.more, part.ranges),
                    (5, true, file.ranges.clone())
                );
                assert!(!part.paths.is_empty());
                paths.extend(part.paths);
            }
            if whole {
                break;
            }
        }
        assert_eq!((paths.len(), at.after), (41, 5));
        assert!(pages > 5);
        assert!(paths[40].starts_with(b"~\x01"));
    }
}
