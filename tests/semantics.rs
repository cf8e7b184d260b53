//! Every test that `docs/semantics.md` names exists: a promise without its test is only a hope.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

/// What stands between backquotes in a line of the document.
fn quoted(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// True if `text` has a test function of this name.
fn has_test(text: &str, name: &str) -> bool {
    let head = format!("fn {name}()");
    let mut before = "";
    for line in text.lines() {
        if line
            .trim_start()
            .trim_start_matches("pub ")
            .starts_with(&head)
        {
            return before.starts_with("#[");
        }
        before = line.trim_start();
    }
    false
}

#[test]
fn every_named_test_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/semantics.md")).unwrap();
    let (mut missing, mut found) = (Vec::new(), 0);
    for name in text
        .lines()
        .filter(|line| line.starts_with('|'))
        .flat_map(quoted)
    {
        if name.starts_with("scripts/") || name.starts_with("examples/") {
            found += 1;
            if !root.join(name).is_file() {
                missing.push(name);
            }
        } else if let Some((file, test)) = name.split_once("::") {
            found += 1;
            let sources =
                ["tests", "src"].map(|folder| root.join(folder).join(format!("{file}.rs")));
            let exists = sources
                .iter()
                .filter_map(|path| fs::read_to_string(path).ok())
                .any(|text| has_test(&text, test));
            if !exists {
                missing.push(name);
            }
        }
    }
    assert!(missing.is_empty(), "named and not there: {missing:#?}");
    assert!(
        found > 50,
        "the document is not read as it is written: {found}"
    );
}

#[test]
fn every_promise_has_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/semantics.md")).unwrap();
    for number in 1..=13 {
        let row = format!("| P{number} |");
        let line = text.lines().find(|line| line.starts_with(&row));
        assert!(
            line.is_some_and(|line| quoted(line).next().is_some()),
            "P{number}"
        );
        assert!(
            text.contains(&format!("**P{number} ")),
            "P{number} is not told"
        );
    }
}
