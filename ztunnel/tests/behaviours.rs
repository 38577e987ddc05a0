//! `docs/behaviours.md` and `docs/failures.md` keep their word: every row and every reason is there, and every test
//! that is named exists.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    path::{Path, PathBuf},
};

const ROWS: std::ops::RangeInclusive<u32> = 1..=70;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Row → the last column.
fn rows() -> BTreeMap<u32, String> {
    let text = fs::read_to_string(root().join("docs/behaviours.md")).expect("docs/behaviours.md");
    let mut rows = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [row, _, tests] = cells[..] else { panic!("not three columns: {line}") };
        let Some(Ok(row)) = row.split(' ').next().map(str::parse) else { continue };
        assert!(rows.insert(row, tests.to_owned()).is_none(), "row {row} is there twice");
    }
    rows
}

/// The names of all functions marked as tests in the sources below `folder`.
fn tests_in(folder: &Path, found: &mut HashSet<String>) {
    for entry in fs::read_dir(folder).expect("a folder of the sources").map(|entry| entry.expect("entry")) {
        let path = entry.path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                tests_in(&path, found);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("a source file");
            let mut marked = false;
            for line in text.lines().map(str::trim) {
                if line.starts_with("#[test") || line.starts_with("#[tokio::test") {
                    marked = true;
                } else if marked && let Some((_, rest)) = line.split_once("fn ") {
                    found.extend(rest.split('(').next().map(str::to_owned));
                    marked = false;
                }
            }
        }
    }
}

#[test]
fn every_behaviour_is_listed_and_its_tests_exist() {
    let rows = rows();
    let missing: Vec<u32> = ROWS.filter(|row| !rows.contains_key(row)).collect();
    assert!(missing.is_empty(), "docs/behaviours.md lacks rows {missing:?}");
    let mut known = HashSet::new();
    for folder in ["ztunnel/src", "ztunnel/tests", "watcher/src", "watcher/tests"] {
        tests_in(&root().join(folder), &mut known);
    }
    for (row, tests) in &rows {
        let named: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
        assert!(!named.is_empty() || tests.starts_with("open"), "row {row} names no test and is not open");
        for name in named {
            assert!(known.contains(name), "row {row} names {name}, which is no test");
        }
    }
}

/// The words that the reasons of errors are, and the one for what is dropped.
fn reasons_in(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).expect("a folder of the sources").map(|entry| entry.expect("entry")) {
        let path = entry.path();
        if path.is_dir() {
            reasons_in(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
            let text = fs::read_to_string(&path).expect("a source file");
            // Functions named `reason` or `…_reason`, to the end of their bodies.
            for (at, _) in text.match_indices("reason(") {
                let Some((head, body)) = text[at..].split_once('{') else { continue };
                if head.len() < 60 && head.ends_with("-> &'static str ") {
                    let end = ["\n    }\n", "\n}\n"].into_iter().filter_map(|end| body.find(end)).min();
                    let words = body[..end.expect("its end")].split('"').skip(1).step_by(2);
                    found.extend(words.map(str::to_owned));
                }
            }
        }
    }
}

#[test]
fn every_reason_of_a_failure_is_explained() {
    let mut given = BTreeSet::from(["cut".to_owned()]);
    reasons_in(&root().join("ztunnel/src"), &mut given);
    let document = fs::read_to_string(root().join("docs/failures.md")).expect("docs/failures.md");
    let rows = document.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let explained: BTreeSet<String> = rows.map(str::to_owned).collect();
    assert_eq!(explained, given, "left: docs/failures.md, right: the sources");
}
