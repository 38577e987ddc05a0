//! The bill of materials (CycloneDX 1.5): every crate that is linked into a program, with its
//! version, licence and checksum, and what depends on what.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use serde_json::{Value, json};

/// The bill of `programs`, from what `cargo metadata --filter-platform` printed and from Cargo.lock,
/// which has the checksums.
///
/// # Errors
/// A program is no package of the workspace, or either text is not what Cargo writes.
pub fn bill(metadata: &Value, lock: &str, programs: &[String]) -> anyhow::Result<Value> {
    let packages: BTreeMap<&str, &Value> = list(&metadata["packages"])?
        .iter()
        .map(|package| text(&package["id"]).map(|id| (id, package)))
        .collect::<anyhow::Result<_>>()?;
    let links = links(metadata)?;
    let checksums = checksums(lock);

    let mut open = Vec::new();
    for program in programs {
        let own = list(&metadata["workspace_members"])?.iter().filter_map(Value::as_str);
        let mut own =
            own.filter(|id| packages.get(id).is_some_and(|package| package["name"] == program.as_str()));
        open.push(own.next().with_context(|| format!("the workspace has no package {program}"))?);
    }
    let roots: BTreeSet<&str> = open.iter().copied().collect();
    let mut linked = BTreeSet::new();
    while let Some(id) = open.pop() {
        if linked.insert(id) {
            open.extend(links.get(id).into_iter().flatten());
        }
    }

    let mut components = BTreeMap::new();
    let mut dependencies = BTreeMap::new();
    for id in &linked {
        let package = packages.get(id).with_context(|| format!("no package {id}"))?;
        let reference = reference(package)?;
        let of = links.get(id).into_iter().flatten().filter_map(|id| packages.get(id));
        let of: BTreeSet<String> = of.map(|package| self::reference(package)).collect::<Result<_, _>>()?;
        dependencies.insert(reference.clone(), json!({"ref": reference, "dependsOn": of}));
        components.insert(reference, component(package, roots.contains(id), &checksums)?);
    }
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "container", "bom-ref": "image", "name": "adit"}},
        "components": components.into_values().collect::<Vec<_>>(),
        "dependencies": dependencies.into_values().collect::<Vec<_>>(),
    }))
}

/// What each package links: neither what only its build needs, nor what only its tests need.
fn links(metadata: &Value) -> anyhow::Result<BTreeMap<&str, Vec<&str>>> {
    let mut links = BTreeMap::new();
    for node in list(&metadata["resolve"]["nodes"])? {
        let mut of = Vec::new();
        for dependency in list(&node["deps"])? {
            let kinds = list(&dependency["dep_kinds"])?;
            let package = text(&dependency["pkg"])?;
            if kinds.iter().any(|kind| kind["kind"].is_null()) {
                of.push(package);
            }
        }
        links.insert(text(&node["id"])?, of);
    }
    Ok(links)
}

fn component(
    package: &Value,
    is_program: bool,
    checksums: &BTreeMap<(String, String), String>,
) -> anyhow::Result<Value> {
    let (name, version) = (text(&package["name"])?, text(&package["version"])?);
    let reference = reference(package)?;
    let mut component = json!({
        "type": if is_program { "application" } else { "library" },
        "bom-ref": reference,
        "name": name,
        "version": version,
        "purl": reference,
    });
    if let Some(licence) = package["license"].as_str() {
        // Old crates write the choice of two licences with a slash.
        component["licenses"] = json!([{"expression": licence.replace('/', " OR ")}]);
    }
    if let Some(checksum) = checksums.get(&(name.to_owned(), version.to_owned())) {
        component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
    }
    Ok(component)
}

/// The package as a package URL. Ours are at no registry.
fn reference(package: &Value) -> anyhow::Result<String> {
    Ok(format!("pkg:cargo/{}@{}", text(&package["name"])?, text(&package["version"])?))
}

/// The checksums of Cargo.lock by name and version.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let mut found = BTreeMap::new();
    for package in lock.split("[[package]]") {
        let value = |key: &str| {
            let line = package.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "));
            line.map(|value| value.trim_matches('"').to_owned())
        };
        if let (Some(name), Some(version), Some(checksum)) =
            (value("name"), value("version"), value("checksum"))
        {
            found.insert((name, version), checksum);
        }
    }
    found
}

fn list(value: &Value) -> anyhow::Result<&Vec<Value>> {
    value.as_array().with_context(|| format!("expected a list of `cargo metadata`, found {value}"))
}

fn text(value: &Value) -> anyhow::Result<&str> {
    value.as_str().with_context(|| format!("expected a text of `cargo metadata`, found {value}"))
}
