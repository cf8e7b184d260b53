//! Messages of the control channel come back as they were sent; hostile ones are errors.

use super::*;

const TOKEN: Token = Token([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]);

fn requests() -> Vec<Request> {
    vec![
        Request::Info,
        Request::Token,
        Request::Clone {
            source: TOKEN,
            name: "vm-{} \"quoted\" \u{1f4be}.raw".to_owned(),
            count: Some(12),
            preserve: true,
        },
        Request::Clone {
            source: TOKEN,
            name: "vm".to_owned(),
            count: None,
            preserve: false,
        },
        Request::Usage,
        Request::Checkpoint,
        Request::ScrubStart {
            rate: Some(u64::MAX),
            restart: true,
        },
        Request::ScrubStart {
            rate: None,
            restart: false,
        },
        Request::ScrubStop,
        Request::ScrubStatus,
        Request::ScrubFindings(ScrubPage {
            after: 1,
            paths: 2,
            others: 3,
        }),
        Request::Share {
            source: None,
            ranges: Vec::new(),
        },
        Request::Extents(Look {
            from: 0,
            to: 1,
            other: None,
        }),
        Request::Places {
            from: 0,
            to: u64::MAX,
            sums: false,
        },
        Request::Grow { size: None },
        Request::Grow {
            size: Some(1 << 50),
        },
    ]
}

#[test]
fn the_number_is_that_of_the_header_files() {
    assert_eq!(CONTROL, 0xe000_4e01);
}

#[test]
fn requests_come_back() {
    for request in requests() {
        let payload = request.encode().unwrap();
        assert_eq!(Request::decode(&payload[..]).unwrap(), request);
    }
}

#[test]
fn responses_come_back() {
    let info = Info {
        pid: 77,
        pool: "/var/pool.nodupe".to_owned(),
        uuid: TOKEN.0,
        version: 1,
        poisoned: Some("a sync failed".to_owned()),
        health: Health {
            beats: 17,
            ..Health::default()
        },
        host_full: true,
        marks: vec![80, 100],
        usage: Usage {
            host_available: Some(10),
            total: u64::MAX,
            used: 2,
            available: 3,
            reserve: 4,
            staged: 5,
            journal_used: 6,
            journal_size: 7,
            logical: 8,
            inodes: 9,
        },
    };
    let usage = FileUsage {
        size: 1,
        mapped: 2,
        exclusive: 3,
        extents: 4,
    };
    let scrub = ScrubStatus {
        state: crate::engine::ScrubState::Stopped,
        total: u64::MAX,
        started: crate::units::Time { secs: -5, nanos: 6 },
        error: Some("why".to_owned()),
        ..ScrubStatus::default()
    };
    let clone = requests().swap_remove(2);
    for (request, response) in [
        (Request::Info, Response::Info(Box::new(info))),
        (Request::Token, Response::Token(TOKEN)),
        (clone, Response::Clones(12)),
        (Request::Usage, Response::Usage(usage)),
        (Request::Checkpoint, Response::Done),
        (Request::ScrubStatus, Response::Scrub(Box::new(scrub))),
    ] {
        let payload = Response::encode(&Ok(response.clone()));
        assert_eq!(Response::decode(&request, &payload[..]).unwrap(), response);
    }
}

#[test]
fn errors_come_back_with_their_kind_and_cause() {
    for kind in KINDS {
        assert_eq!(kind_from_name(kind_name(kind)), Some(kind));
        let payload = Response::encode(&Err(Error::new(kind, "why")));
        let error = Response::decode(&Request::Info, &payload[..]).unwrap_err();
        assert_eq!((error.kind(), error.to_string()), (kind, "why".to_owned()));
    }
    let cause = std::io::Error::other("the cause");
    let payload = Response::encode(&Err(Error::io("what", cause)));
    let error = Response::decode(&Request::Info, &payload[..]).unwrap_err();
    assert_eq!(error.to_string(), "what: the cause");
    let long = "\u{1}\u{20ac}".repeat(5000);
    let payload = Response::encode(&Err(Error::new(Kind::Invalid, long)));
    let error = Response::decode(&Request::Info, &payload[..]).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(error.to_string().len() <= MESSAGE_BYTES_MAX);
}

#[test]
fn hostile_bytes_are_an_error() {
    for payload in [
        &b""[..],
        b"\0\0\0",
        b"null",
        b"[]",
        b"{}",
        b"{\"op\":1}",
        b"{\"op\":\"format\"}",
        b"{\"op\":\"clone\"}",
        b"{\"op\":\"clone\",\"source\":\"+0000000000000000000000000000001\",\"name\":\"a\"}",
        b"{\"op\":\"clone\",\"source\":\"00\",\"name\":\"a\",\"count\":1}",
        b"\xff\xfe",
        &[b'['; PAYLOAD_BYTES],
    ] {
        Request::decode(payload).unwrap_err();
        for request in requests() {
            Response::decode(&request, payload).unwrap_err();
        }
    }
    // Any single byte of a good request changed: a value or an error, no panic.
    let good = requests().swap_remove(2).encode().unwrap();
    for position in 0..200 {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[position] ^= 1 << bit;
            drop(Request::decode(&bad[..]));
        }
    }
}

#[test]
fn clones_are_numbered_from_one() {
    let names = clone_names("vm-{}.raw", Some(10)).unwrap();
    assert_eq!(names.first().unwrap(), b"vm-1.raw");
    assert_eq!(names.last().unwrap(), b"vm-10.raw");
    assert_eq!(clone_names("vm-{}", None).unwrap(), vec![b"vm-{}".to_vec()]);
    assert_eq!(clone_names("vm", Some(1)).unwrap(), vec![b"vm".to_vec()]);
    for (name, count) in [("vm", 2), ("vm-{}", 0), ("vm-{}", CLONES_MAX + 1)] {
        let error = clone_names(name, Some(count)).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
    }
}

#[test]
fn long_names_are_refused_before_they_are_made() {
    // 4000 numbers of six digits in each of 100,000 names: 2.4 GB.
    let error = clone_names(&"{}".repeat(4000), Some(CLONES_MAX)).unwrap_err();
    assert_eq!(error.kind(), Kind::NameTooLong);
    let name = "x".repeat(253) + "{}";
    assert_eq!(clone_names(&name, Some(99)).unwrap().len(), 99);
    assert!(clone_names(&name, Some(100)).is_err());
}
