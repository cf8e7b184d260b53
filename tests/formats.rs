//! Images of real products: each reads as its manifest says. The images are not part of the project
//! (their licences forbid it): `NODUPE_SAMPLES` names a folder with them, unpacked.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use nodupe::error::Result;
use nodupe::formats::Format;
use nodupe::formats::chain::Chain;
use nodupe::transfer::Library;
use sha2::{Digest, Sha256};

/// The disk of a file, with its parents, as an import finds them.
fn disk(path: &Path, format: Option<Format>) -> Result<Chain> {
    let mut library = Library::new();
    library.add_file(path, format)?;
    library.resolve();
    let wanted = |(_, image): &(usize, &nodupe::transfer::Image)| image.wanted;
    let (index, _) = (0..).zip(library.images()).find(wanted).unwrap();
    library.verify(index)?;
    library.disk(index)
}

fn digest(chain: &Chain) -> Result<String> {
    let size = chain.size();
    let mut sha = Sha256::new();
    sha.update(format!("sparse64k-v1:{size}\n"));
    let (mut at, mut buf) = (0, vec![0; 65536]);
    while at < size {
        let len = (size - at).min(65536);
        let (_, run) = chain.run(at, size - at)?;
        if run.content == nodupe::formats::Content::Zero && run.len > 65536 {
            at += run.len / 65536 * 65536;
            continue;
        }
        let part = &mut buf[..len as usize];
        chain.read(at, part)?;
        if part.iter().any(|b| *b != 0) {
            sha.update(at.to_le_bytes());
            sha.update(&*part);
        }
        at += len;
    }
    Ok(sha.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

#[test]
fn samples() {
    let Some(dir) = std::env::var_os("NODUPE_SAMPLES") else {
        eprintln!("no samples");
        return;
    };
    let dir = PathBuf::from(dir);
    let text = std::fs::read_to_string(dir.join("MANIFEST.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let (mut good, mut bad) = (0, 0);
    for s in json["samples"].as_array().unwrap() {
        let id = s["id"].as_str().unwrap();
        let path = dir.join(id).join(s["main"].as_str().unwrap());
        let got = disk(&path, None).and_then(|c| digest(&c).map(|d| (c.size(), d)));
        let want = (
            s["truth"]["size"].as_u64(),
            s["truth"]["sparse_sha256"].as_str(),
        );
        let positive = s["kind"] == "positive";
        let ok = match &got {
            Ok((size, d)) => positive && Some(*size) == want.0 && Some(d.as_str()) == want.1,
            Err(_) => !positive,
        };
        if ok {
            good += 1
        } else {
            bad += 1
        }
        eprintln!(
            "{} {id} {} -> {got:?} want {want:?}",
            if ok { "ok" } else { "BAD" },
            s["kind"]
        );
    }
    eprintln!("good {good} bad {bad}");
    assert_eq!(bad, 0);
}

#[test]
fn hostile() {
    let Some(dir) = std::env::var_os("NODUPE_HOSTILE") else {
        eprintln!("no hostile");
        return;
    };
    let dir = PathBuf::from(dir);
    let text = std::fs::read_to_string(dir.join("MANIFEST.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let (mut good, mut bad) = (0, 0);
    for s in json["cases"].as_array().unwrap() {
        let id = s["id"].as_str().unwrap();
        let from = (s["format"] == "raw").then_some(Format::Raw);
        let path = dir.join(s["main"].as_str().unwrap());
        let begun = std::time::Instant::now();
        let got = disk(&path, from).and_then(|c| {
            if c.size() > 1 << 33 {
                Ok((c.size(), String::new()))
            } else {
                digest(&c).map(|d| (c.size(), d))
            }
        });
        let truth = s["truth"]["sparse_sha256"].as_str();
        let is_truth = matches!(&got, Ok((_, d)) if Some(d.as_str()) == truth);
        let ok = match s["expect"].as_str().unwrap() {
            "refuse" => got.is_err(),
            "truth" => is_truth,
            "refuse-or-truth" => got.is_err() || is_truth,
            _ => true,
        };
        if ok {
            good += 1
        } else {
            bad += 1
        }
        eprintln!(
            "{} {id} {} {:?} -> {got:?}",
            if ok { "ok" } else { "BAD" },
            s["expect"],
            begun.elapsed()
        );
    }
    eprintln!("good {good} bad {bad}");
    assert_eq!(bad, 0);
}
