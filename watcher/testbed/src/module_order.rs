//! Checks that the modules of a crate depend on each other in one direction.
//!
//! A crate's root lists its modules in its first doc comment, from the top to the bottom. Each line
//! of the list begins with a star and the module's name as a link, and may name several modules, in
//! order. A module uses only modules below it. Inside of a module no files use each other in a ring.

mod rings;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Panics with every import that points up, or that is of a module which the root does not list, and
/// with every ring of files.
///
/// `manifest_dir` is the crate's `CARGO_MANIFEST_DIR`. Code below the first `#[cfg(test)]` of a
/// file may use anything.
///
/// # Panics
/// Also if a source file cannot be read, or the root lists no modules.
pub fn assert_one_way(manifest_dir: &str) {
    let src = Path::new(manifest_dir).join("src");
    let order = listed(&read(&src.join("lib.rs")));
    assert!(order.len() > 1, "{}: no list of modules in the crate's documentation", src.display());
    let mut wrong = Vec::new();
    for file in rust_files(&src) {
        let inside = file.strip_prefix(&src).unwrap_or(&file);
        let Some(module) = top_module(inside) else { continue };
        let Some(floor) = order.get(&module) else {
            // A module of the binary, which stands above the library.
            if is_declared(&src, &module) {
                wrong.push(format!("{}: {module} is not in the list", inside.display()));
            }
            continue;
        };
        for used in used_modules(&code(&read(&file))) {
            match order.get(&used) {
                Some(below) if below > floor || used == module => {}
                Some(_) => {
                    wrong.push(format!("{}: {module} uses {used}, which stands above it", inside.display()));
                }
                None if is_declared(&src, &used) => {
                    wrong.push(format!("{}: uses {used}, which is not in the list", inside.display()));
                }
                None => {}
            }
        }
    }
    let files = rust_files(&src).into_iter().map(|file| {
        let inside = file.strip_prefix(&src).unwrap_or(&file).with_extension("");
        let path = inside.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        (path, code(&read(&file)))
    });
    let in_rings = rings::rings(&files.collect());
    wrong.extend(in_rings.into_iter().map(|ring| format!("{ring} use each other in a ring")));
    wrong.sort();
    wrong.dedup();
    assert!(wrong.is_empty(), "modules of {}:\n{}", src.display(), wrong.join("\n"));
}

/// Module → its place in the list.
fn listed(root: &str) -> BTreeMap<String, usize> {
    let lines = root.lines().filter_map(|line| line.strip_prefix("//! * "));
    let names = lines.flat_map(|line| {
        let before_colon = line.split(": ").next().unwrap_or(line);
        before_colon
            .split('`')
            .skip(1)
            .step_by(2)
            .map(|name| name.trim_start_matches("crate::").to_owned())
            .collect::<Vec<_>>()
    });
    names.enumerate().map(|(place, name)| (name, place)).collect()
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    for entry in entries {
        let path = entry.unwrap_or_else(|error| panic!("{}: {error}", dir.display())).path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != "tests") {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
            files.push(path);
        }
    }
    files
}

/// The first part of a file's module path; `None`: the crate's root or its binary.
fn top_module(inside: &Path) -> Option<String> {
    let first = inside.components().next()?;
    let name = Path::new(first.as_os_str()).file_stem()?.to_str()?.to_owned();
    (name != "lib" && name != "main").then_some(name)
}

fn is_declared(src: &Path, module: &str) -> bool {
    read(&src.join("lib.rs")).lines().any(|line| line.trim_end().ends_with(&format!("mod {module};")))
}

/// `text` without comments, and without the tests at its end.
fn code(text: &str) -> String {
    text.lines()
        .take_while(|line| *line != "#[cfg(test)]")
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// The top-level modules in `crate::…` paths, of `use` trees too.
fn used_modules(code: &str) -> Vec<String> {
    let mut modules = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            Some(group) => modules.extend(group_heads(group)),
            None => modules.extend(identifier(rest)),
        }
    }
    modules
}

/// The first identifiers of a `use` group, which begins after its `{`.
fn group_heads(group: &str) -> Vec<String> {
    let (mut depth, mut heads, mut at_start) = (0_usize, Vec::new(), true);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => at_start = true,
            c if at_start && !c.is_whitespace() => {
                heads.extend(identifier(&group[at..]));
                at_start = false;
            }
            _ => {}
        }
    }
    heads
}

fn identifier(text: &str) -> Option<String> {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    (end > 0).then(|| text[..end].to_owned())
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crate_with(files: &[(&str, &str)]) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("adit-order-{}-{}", std::process::id(), files.len()));
        for (name, text) in files {
            let file = dir.join("src").join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        dir
    }

    fn complaint(files: &[(&str, &str)]) -> Option<String> {
        let dir = crate_with(files);
        let checked = std::panic::catch_unwind(|| assert_one_way(dir.to_str().unwrap()));
        fs::remove_dir_all(&dir).unwrap();
        checked.err().map(|panic| panic.downcast_ref::<String>().unwrap().clone())
    }

    const ROOT: &str =
        "//! * [`top`], [`middle`]: two\n//! * `ground`: one\nmod top;\nmod middle;\nmod ground;\n";

    #[test]
    fn an_import_that_points_up_is_named() {
        assert_eq!(complaint(&[("lib.rs", ROOT), ("top.rs", "use crate::{ground, middle::{A, B}};")]), None);
        let up = complaint(&[
            ("lib.rs", ROOT),
            ("top.rs", ""),
            (
                "ground/inner.rs",
                "// crate::top\nuse crate::{\n    middle::X,\n};\n#[cfg(test)]\nuse crate::top;",
            ),
        ]);
        assert!(up.unwrap().ends_with("ground/inner.rs: ground uses middle, which stands above it"));
    }

    #[test]
    fn a_module_that_is_not_in_the_list_is_named() {
        let root = format!("{ROOT}mod extra;\n");
        let missing = complaint(&[("lib.rs", &root), ("top.rs", ""), ("extra.rs", ""), ("ground.rs", "")]);
        assert!(missing.unwrap().ends_with("extra.rs: extra is not in the list"));
    }
}
