//! `docs/behaviours.md` keeps its word: every row is there, and every test that is named exists.

use std::{
    collections::{BTreeMap, HashSet},
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
