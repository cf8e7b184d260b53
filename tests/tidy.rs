//! Rules of the source tree that no compiler checks: which layer may use which, where `unsafe`
//! and the outside world may appear, how long a file may be. A rule that hurts is changed here,
//! with its reason.
//!
//! The tests read the files as text, so what they see is what a reader sees: comments and string
//! literals are stripped before names are looked for.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The layers, lowest first; a layer uses only what stands above it in this list (and itself).
/// `&[..]` on one line are peers that do not know each other.
const LAYERS: &[&[&str]] = &[
    &["error", "sync"],
    &["units"],
    &["sys", "ondisk"],
    &["device"],
    &["engine"],
    &["formats"],
    &["transfer"],
    &["vfs"],
    &["control"],
    &["fuse"],
];

/// Modules inside the engine, lowest first, by the same rule: structures, meanings, procedures.
const ENGINE_LAYERS: &[&[&str]] = &[
    &[
        "types", "delta", "counters", "slots", "pieces", "recent", "work",
    ],
    &[
        "ahead",
        "nodes",
        "space",
        "cache",
        "waiters",
        "heartbeat",
        "syncs",
        "refusals",
    ],
    &["fetch"],
    &["meta"],
    &["tree"],
    &["extents", "namespace"],
    &["stage"],
    &["journal", "apply"],
    &["salvage"],
    &["pool"],
    &[
        "commit",
        "worker",
        "checkpoint",
        "destage",
        "grow",
        "host",
        "discard",
        "file",
        "read",
    ],
    &["share"],
    &["range", "names", "replay", "equal"],
    &["clone_tree", "recover"],
    &["check", "scrub", "parts"],
    &["repair"],
];

/// Where a crate or a feature of the language may be named: `(word, places, reason)`. A place is
/// a path below `src`, a folder if it ends with a slash.
const CONFINED: &[(&str, &[&str], &str)] = &[
    ("fuser", &["fuse/"], "one adapter knows the FUSE protocol"),
    (
        "libc",
        &["sys/", "device/file.rs", "fuse/"],
        "system calls live in sys; the others name constants of flags and errno",
    ),
    (
        "clap",
        &["cli/", "main.rs"],
        "the library has no command line",
    ),
    (
        "env_logger",
        &["cli/", "main.rs"],
        "only the program decides where logs go",
    ),
    (
        "indicatif",
        &["cli/", "main.rs"],
        "only the program has a terminal",
    ),
    (
        "parking_lot",
        &[
            "sync.rs",
            "device/sim/",
            "vfs/",
            "fuse/",
            "control.rs",
            "sync/watched.rs",
        ],
        "locks of the engine come from sync, where a model checker can take their place",
    ),
    (
        "shuttle",
        &["sync.rs", "sync/"],
        "one module knows the model checker",
    ),
    (
        "io_uring",
        &["sys/ring.rs"],
        "memory that the kernel writes to is watched over in one place",
    ),
    (
        "unsafe",
        &["sys/"],
        "unsafe code stays where it can be read in one sitting",
    ),
];

/// Longest source file, in lines, tests included.
const FILE_LINES_MAX: usize = 800;

/// Words that must not be committed.
const FORBIDDEN: &[&str] = &[
    "todo!",
    "unimplemented!",
    "dbg!",
    "FIXME",
    "XXX",
    "#[ignore",
];

/// A source file: its path below the crate and its text.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// Path below `src`, or `None` for a file outside.
    fn below_src(&self) -> Option<&str> {
        self.path.strip_prefix("src/")
    }

    /// The lines that are code, with their numbers: comments and string literals blanked.
    fn code(&self) -> Vec<(usize, String)> {
        let stripped = strip(&self.text);
        (1..).zip(stripped.lines().map(str::to_owned)).collect()
    }
}

/// Blanks comments, string literals and character literals, keeping line numbers.
fn strip(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < bytes.len() {
        let rest = &text[at..];
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(len) = raw_string(rest) {
            len
        } else if rest.starts_with('"') {
            string(rest)
        } else if rest.starts_with('\'') {
            character(rest)
        } else {
            0
        };
        if skipped == 0 {
            let next = rest.chars().next().map_or(1, char::len_utf8);
            out.push_str(&rest[..next]);
            at += next;
        } else {
            out.extend(rest[..skipped].chars().filter(|&c| c == '\n'));
            out.push(' ');
            at += skipped;
        }
    }
    out
}

/// Length of the raw string literal that `rest` starts with, if it does.
fn raw_string(rest: &str) -> Option<usize> {
    let body = rest.strip_prefix("br").or_else(|| rest.strip_prefix('r'))?;
    let hashes = body.len() - body.trim_start_matches('#').len();
    let open = rest.len() - body.len() + hashes + 1;
    if !body[hashes..].starts_with('"') {
        return None;
    }
    let close = format!("\"{}", "#".repeat(hashes));
    let end = rest[open..]
        .find(&close)
        .map(|found| open + found + close.len());
    Some(end.unwrap_or(rest.len()))
}

/// Length of the string literal that `rest` starts with.
fn string(rest: &str) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Length of the character literal that `rest` starts with; 0 for a lifetime.
fn character(rest: &str) -> usize {
    let mut chars = rest.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => chars
            .skip(1)
            .find(|&(_, c)| c == '\'')
            .map_or(0, |(end, _)| end + 1),
        Some(_) => match chars.next() {
            Some((end, '\'')) => end + 1,
            _ => 0,
        },
        None => 0,
    }
}

/// Every Rust file of the project, sorted by path.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for folder in [
        "src",
        "tests",
        "benches",
        "examples",
        "fuzz/src",
        "fuzz/targets",
    ] {
        collect(&root.join(folder), &mut found);
    }
    found.sort();
    assert!(
        !found.is_empty(),
        "no source files below {}",
        root.display()
    );
    found
        .iter()
        .map(|path| Source {
            path: path
                .strip_prefix(root)
                .expect("collected below the root")
                .to_string_lossy()
                .into_owned(),
            text: fs::read_to_string(path)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display())),
        })
        .collect()
}

/// Adds the Rust files below `folder` to `found`.
fn collect(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries {
        let path = entry.expect("a readable folder").path();
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// True if `word` stands in `line` as a whole identifier.
fn names(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(part) && !line[at + word.len()..].starts_with(part))
}

/// The first segments of the paths that follow `prefix` in `code`, with their line numbers:
/// `use crate::engine::Pool` has `engine`, `use crate::{device, units::Ino}` has both.
fn segments(code: &[(usize, String)], prefix: &str) -> BTreeSet<(usize, String)> {
    let text: String = code.iter().map(|(_, line)| line.clone() + "\n").collect();
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices(prefix) {
        let line = text[..at].matches('\n').count() + 1;
        let rest = &text[at + prefix.len()..];
        if let Some(group) = rest.strip_prefix('{') {
            found.extend(heads(group).into_iter().map(|name| (line, name)));
        } else if let Some(name) = identifier(rest) {
            found.insert((line, name));
        }
    }
    found
}

/// First identifiers of the members of a `use` group, whose opening brace is gone.
fn heads(group: &str) -> Vec<String> {
    let mut depth = 0;
    let mut head = true;
    let mut found = Vec::new();
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => head = true,
            c if head && depth == 0 && !c.is_whitespace() => {
                found.extend(identifier(&group[at..]));
                head = false;
            }
            _ => {}
        }
    }
    found
}

/// The identifier that `text` starts with.
fn identifier(text: &str) -> Option<String> {
    let end = text
        .find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(text.len());
    (end > 0).then(|| text[..end].to_owned())
}

/// Position of `name` in a list of layers.
fn rank(layers: &[&[&str]], name: &str) -> Option<usize> {
    layers.iter().position(|peers| peers.contains(&name))
}

/// What is wrong with `from` using `to`, if anything.
fn breach(layers: &[&[&str]], from: &str, to: &str) -> Option<String> {
    if from == to {
        return None;
    }
    match (rank(layers, from), rank(layers, to)) {
        (_, None) => Some(format!("{to} is not in the list of layers")),
        (Some(from_rank), Some(to_rank)) if to_rank >= from_rank => Some(format!(
            "{from} must not use {to}, which is {} it",
            if to_rank == from_rank {
                "beside"
            } else {
                "above"
            }
        )),
        _ => None,
    }
}

/// First part of a path below a folder, without the suffix of a file.
fn module(below: &str) -> &str {
    let first = below.split('/').next().unwrap_or(below);
    first.strip_suffix(".rs").unwrap_or(first)
}

/// Fails with every finding, one per line.
fn report(rule: &str, findings: &[String]) {
    assert!(findings.is_empty(), "{rule}:\n  {}", findings.join("\n  "));
}

#[test]
fn imports_point_down() {
    let mut findings = Vec::new();
    for source in sources() {
        let Some(below) = source.below_src() else {
            continue;
        };
        let layer = module(below);
        let code = source.code();
        if matches!(layer, "cli" | "main") {
            // The program is another crate: only what the library publishes is in its reach,
            // and `crate::` there means itself.
            for (line, name) in segments(&code, "crate::") {
                if rank(LAYERS, &name).is_some() {
                    findings.push(format!("{}:{line}: use nodupe::{name}", source.path));
                }
            }
            continue;
        }
        if layer == "lib" {
            continue;
        }
        if rank(LAYERS, layer).is_none() {
            findings.push(format!(
                "{}: {layer} is not in the list of layers",
                source.path
            ));
            continue;
        }
        for (line, name) in segments(&code, "crate::") {
            if let Some(why) = breach(LAYERS, layer, &name) {
                findings.push(format!("{}:{line}: {why}", source.path));
            }
        }
    }
    report("imports point down only", &findings);
}

#[test]
fn engine_modules_point_down() {
    let mut findings = Vec::new();
    if ENGINE_LAYERS.is_empty() {
        return;
    }
    for source in sources() {
        let Some(below) = source.path.strip_prefix("src/engine/") else {
            continue;
        };
        let from = module(below);
        if from == "mod" {
            continue;
        }
        let code = source.code();
        let nested = below.contains('/');
        let mut used = segments(&code, "crate::engine::");
        let up = if nested { "super::super::" } else { "super::" };
        // Inside `mod tests` of a file, `super` is the file itself; names that are not modules
        // of the engine are therefore items of the file, or re-exports, and not judged.
        used.extend(segments(&code, up));
        for (line, name) in used {
            if rank(ENGINE_LAYERS, &name).is_none() {
                continue;
            }
            if let Some(why) = breach(ENGINE_LAYERS, from, &name) {
                findings.push(format!("{}:{line}: {why}", source.path));
            }
        }
        if rank(ENGINE_LAYERS, from).is_none() {
            findings.push(format!("{}: {from} is not in the list", source.path));
        }
    }
    report("imports inside the engine point down only", &findings);
}

#[test]
fn outside_world_stays_in_its_places() {
    let mut findings = Vec::new();
    for source in sources() {
        let Some(below) = source.below_src() else {
            continue;
        };
        for (line, text) in source.code() {
            for (word, places, why) in CONFINED {
                let allowed = places.iter().any(|place| {
                    below == *place || (place.ends_with('/') && below.starts_with(place))
                });
                if !allowed && names(&text, word) {
                    findings.push(format!("{}:{line}: {word}: {why}", source.path));
                }
            }
        }
    }
    report("names outside their places", &findings);
}

#[test]
fn files_are_short_ascii_and_introduce_themselves() {
    let mut findings = Vec::new();
    for source in sources() {
        let lines = source.text.lines().count();
        if lines > FILE_LINES_MAX {
            findings.push(format!("{}: {lines} lines, split it by noun", source.path));
        }
        if !source.text.starts_with("//!") {
            findings.push(format!("{}: opens without `//!`", source.path));
        }
        for (number, line) in (1..).zip(source.text.lines()) {
            if !line.is_ascii() {
                findings.push(format!("{}:{number}: not ASCII", source.path));
            }
        }
    }
    report("files", &findings);
}

#[test]
fn nothing_unfinished_is_committed() {
    let mut findings = Vec::new();
    for source in sources() {
        // This file names the words that it looks for.
        if source.path == "tests/tidy.rs" {
            continue;
        }
        for (number, line) in (1..).zip(source.text.lines()) {
            for word in FORBIDDEN {
                if line.contains(word) {
                    findings.push(format!("{}:{number}: {word}", source.path));
                }
            }
        }
    }
    report("unfinished code", &findings);
}

/// Every change of `scripts/mutants.txt` can still be made: its lines stand there, once.
#[test]
fn every_mutant_has_its_place() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let mut findings = Vec::new();
    for part in read("scripts/mutants.txt").split("\n== ").skip(1) {
        let (mut file, mut gone): (&str, Vec<&str>) = ("", Vec::new());
        let mut check = |file: &str, gone: &mut Vec<&str>| {
            let text = read(file);
            let lines: Vec<&str> = text.lines().map(str::trim).collect();
            let found = lines
                .windows(gone.len().max(1))
                .filter(|at| *at == &gone[..]);
            let count = found.count();
            if count != 1 && !gone.is_empty() {
                let name = part.split(':').next().unwrap_or_default();
                findings.push(format!("{name}: {count} places in {file}"));
            }
            gone.clear();
        };
        for line in part.lines() {
            if line.starts_with("src/") {
                check(file, &mut gone);
                file = line.trim();
            } else if let Some(old) = line.strip_prefix('-') {
                gone.push(old.trim());
            }
        }
        check(file, &mut gone);
    }
    report(
        "lines of scripts/mutants.txt are not in the source",
        &findings,
    );
}

/// The rules above are only worth something if the reader of sources sees what it should.
#[test]
fn the_reader_sees_code_and_only_code() {
    let text = concat!(
        "use crate::{device, units::{Ino, Time}, error::Error};\n",
        "// use crate::fuse;\n",
        "let s = \"crate::cli \\\" unsafe\"; let c = '\"'; let r = r#\"crate::vfs\"#;\n",
        "fn f<'a>(x: &'a str) { crate::engine::open(x) }\n",
    );
    let source = Source {
        path: "src/x.rs".to_owned(),
        text: text.to_owned(),
    };
    let code = source.code();
    assert_eq!(code.len(), 4);
    let found = segments(&code, "crate::");
    let expected = [(1, "device"), (1, "error"), (1, "units"), (4, "engine")];
    assert_eq!(
        found,
        expected.map(|(line, name)| (line, name.to_owned())).into()
    );
    assert!(!code.iter().any(|(_, line)| names(line, "unsafe")));
    assert!(names("unsafe { x }", "unsafe") && !names("unsafe_code", "unsafe"));
    assert!(breach(LAYERS, "device", "engine").is_some());
    assert!(breach(LAYERS, "sys", "ondisk").is_some());
    assert!(breach(LAYERS, "engine", "device").is_none());
}
