//! Files of a crate that use each other in a ring.
//!
//! Between a module and its own parents and children there may be both directions: a child is a part
//! of what its parent is.

use std::collections::{BTreeMap, BTreeSet};

/// A module's path below the crate; empty: its root.
type ModulePath = Vec<String>;

/// Each ring as its modules, in order, of `files`: the code of each module.
pub(super) fn rings(files: &BTreeMap<ModulePath, String>) -> Vec<String> {
    let uses: BTreeMap<_, _> =
        files.iter().map(|(module, code)| (module, used(module, code, files))).collect();
    let reached: BTreeMap<_, _> = files.keys().map(|module| (module, reachable(module, &uses))).collect();
    let mut rings = BTreeSet::new();
    for module in files.keys() {
        let ring: Vec<_> = reached[module].iter().filter(|other| reached[*other].contains(module)).collect();
        if !ring.is_empty() {
            rings.insert(ring.iter().map(|module| module.join("::")).collect::<Vec<_>>().join(" and "));
        }
    }
    rings.into_iter().collect()
}

fn reachable<'a>(
    from: &ModulePath,
    uses: &BTreeMap<&ModulePath, BTreeSet<&'a ModulePath>>,
) -> BTreeSet<&'a ModulePath> {
    let (mut reached, mut next) = (BTreeSet::new(), vec![from]);
    while let Some(module) = next.pop() {
        for used in &uses[module] {
            if reached.insert(*used) {
                next.push(used);
            }
        }
    }
    reached
}

/// The modules that `module` uses, without its parents and children.
fn used<'a>(
    module: &ModulePath,
    code: &str,
    files: &'a BTreeMap<ModulePath, String>,
) -> BTreeSet<&'a ModulePath> {
    let mut used = BTreeSet::new();
    for path in paths(code) {
        let supers = path.iter().take_while(|part| *part == "super").count();
        let (parents, rest) = match supers {
            0 => (&[][..], &path[1..]),
            _ => (&module[..module.len().saturating_sub(supers)], &path[supers..]),
        };
        // The end of the path is an item.
        let mut whole = [parents, rest].concat();
        while !whole.is_empty() && !files.contains_key(&whole) {
            whole.pop();
        }
        if let Some((found, _)) = files.get_key_value(&whole)
            && !found.is_empty()
            && !found.starts_with(module)
            && !module.starts_with(found)
        {
            used.insert(found);
        }
    }
    used
}

/// The paths that begin with `crate` or `super`, also those of `use` groups.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            let before = code[..at].chars().next_back();
            // The second one of `super::super::` belongs to the path of the first.
            if !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                tree(&code[at..], Vec::new(), &mut paths);
            }
        }
    }
    paths
}

/// Reads one tree, such as `a::{b, c::d}`, and returns what follows it.
fn tree<'a>(mut text: &'a str, mut path: Vec<String>, paths: &mut Vec<Vec<String>>) -> &'a str {
    while let Some(name) = super::identifier(text) {
        text = text[name.len()..].trim_start();
        path.push(name);
        let Some(after) = text.strip_prefix("::") else { break };
        text = after.trim_start();
        let Some(mut group) = text.strip_prefix('{') else { continue };
        loop {
            group = tree(group.trim_start(), path.clone(), paths);
            // Also over `as NAME` and `*`.
            let Some(end) = group.find([',', '}']) else { return "" };
            let is_last = group[end..].starts_with('}');
            group = &group[end + 1..];
            if is_last {
                return group;
            }
        }
    }
    paths.push(path);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rings_of(files: &[(&str, &str)]) -> Vec<String> {
        let module = |name: &str| name.split("::").map(str::to_owned).collect::<Vec<_>>();
        rings(&files.iter().map(|(name, code)| (module(name), (*code).to_owned())).collect())
    }

    #[test]
    fn a_ring_of_files_is_named_whatever_the_imports_look_like() {
        for import in
            ["use super::b::X;", "use crate::{z, m::{self, b::{X as Y, *}}};", "fn f() { super::b::g() }"]
        {
            let files =
                [("m", ""), ("m::a", import), ("m::b", "use super::c;"), ("m::c", "use super::a::Z;")];
            assert_eq!(rings_of(&files), ["m::a and m::b and m::c"], "{import}");
        }
    }

    #[test]
    fn a_child_and_its_parent_may_use_each_other() {
        let files =
            [("m", "use self::a::X;"), ("m::a", "use super::{Y, b};"), ("m::b", "use super::super::m::Y;")];
        assert_eq!(rings_of(&files), Vec::<String>::new());
    }
}
