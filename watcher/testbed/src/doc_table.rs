//! Tables in `docs/` that are made from code, and checked against it.
//!
//! A table stands between `<!-- MADE_FROM -->` and the next `<!-- end -->`.

use std::{fs, path::Path};

/// Fails unless the table below the marker `made_from` in `page` (from the repository's root) is
/// `table`. With `UPDATE_DOCS` set it writes `table` there.
///
/// # Panics
/// The page or a marker is missing, or the table is out of date.
pub fn assert_current(page: &str, made_from: &str, table: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(page);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{page}: {error}"));
    let (begin, end) = (format!("<!-- {made_from} -->\n"), "<!-- end -->\n");
    let (head, rest) = text.split_once(&begin).unwrap_or_else(|| panic!("{page} has no {begin}"));
    let (written, tail) = rest.split_once(end).unwrap_or_else(|| panic!("{page} has no {end} after {begin}"));
    if is_updating() {
        fs::write(&path, format!("{head}{begin}{table}{end}{tail}")).expect("the page can be written");
        return;
    }
    assert!(written == table, "{page} is out of date: UPDATE_DOCS=1 cargo test documentation");
}

/// Whether what is made from code is to be written, not compared: `UPDATE_DOCS` is set.
pub fn is_updating() -> bool {
    std::env::var_os("UPDATE_DOCS").is_some()
}
