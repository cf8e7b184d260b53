//! Images of real products: each reads as its manifest says. The images are not part of the project
//! (their licences forbid it): `NODUPE_SAMPLES` names a folder with them, unpacked.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nodupe::error::{Error, Kind, Result};
use nodupe::formats::chain::Chain;
use nodupe::formats::{FileSource, Layer, Source, probe};
use sha2::{Digest, Sha256};

fn source(path: &Path) -> Result<Arc<dyn Source>> {
    let kind =
        std::fs::symlink_metadata(path).map_err(|e| Error::io(format!("{}", path.display()), e))?;
    if !kind.is_file() {
        return Err(Error::new(Kind::Invalid, "not a regular file"));
    }
    let file = File::open(path)
        .map_err(|error| Error::io(format!("cannot open {}", path.display()), error))?;
    Ok(Arc::new(FileSource::new(file)?))
}

fn beside(path: &Path, name: &str) -> PathBuf {
    let base = name.rsplit(['/', '\\']).next().unwrap_or(name);
    path.parent().unwrap().join(base)
}

fn layer(path: &Path) -> Result<Box<dyn Layer>> {
    let source = source(path)?;
    let format = probe::probe(&*source)?;
    probe::open(source, format, &mut |name| {
        if name.contains("/") || name.contains("\\") {
            return Err(Error::new(Kind::Denied, format!("outside: {name:?}")));
        }
        self::source(&beside(path, name))
    })
}

fn chain(path: &Path) -> Result<Chain> {
    let mut layers = vec![layer(path)?];
    while let Some(parent) = layers.last().unwrap().facts().parent.clone() {
        if layers.len() > 64 {
            return Err(Error::new(Kind::Invalid, "too deep"));
        }
        let mut found = None;
        let mut why = Error::new(Kind::NotFound, format!("no parent: {parent:?}"));
        for name in &parent.names {
            match layer(&beside(path, name)) {
                Ok(l) => {
                    if parent.identity.is_some() && l.facts().identity != parent.identity {
                        why = Error::new(
                            Kind::Invalid,
                            format!(
                                "parent changed {:?} {:?}",
                                parent.identity,
                                l.facts().identity
                            ),
                        );
                        continue;
                    }
                    found = Some(l);
                    break;
                }
                Err(error) => why = error,
            }
        }
        if parent.names.is_empty() {
            for entry in std::fs::read_dir(path.parent().unwrap()).unwrap() {
                let p = entry.unwrap().path();
                if let Ok(l) = layer(&p)
                    && l.facts().identity == parent.identity
                    && p != path
                {
                    found = Some(l);
                }
            }
        }
        layers.push(found.ok_or(why)?);
    }
    Ok(Chain::new(layers))
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
        if s["format"] == "ova" {
            continue;
        }
        let path = dir.join(id).join(s["main"].as_str().unwrap());
        let got = chain(&path).and_then(|c| digest(&c).map(|d| (c.size(), d)));
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
        if s["format"] == "ova" || s["format"] == "raw" {
            continue;
        }
        let path = dir
            .join("cases")
            .join(id)
            .join(s["file"].as_str().or(s["main"].as_str()).unwrap());
        let begun = std::time::Instant::now();
        let got = chain(&path).and_then(|c| {
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
