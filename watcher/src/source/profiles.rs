//! Sidecars of other meshes, as data.

use std::{collections::BTreeMap, sync::LazyLock};

use serde::Deserialize;

/// What the sidecars of one mesh are like.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Profile {
    /// The mesh.
    pub about: String,
    /// Who the proxy runs as, in the pod.
    pub users: Vec<u32>,
    /// The same of groups; none where another process may have it.
    pub groups: Vec<u32>,
    /// Names of the proxy's container that nobody else uses.
    pub containers: Vec<String>,
    /// Annotations that only a pod with the proxy has.
    pub annotations: Vec<String>,
    /// Labels that only a pod with the proxy has.
    pub labels: Vec<String>,
    /// Where the proxy listens, in the pod's netns.
    pub ports: Vec<u16>,
}

/// By the names that options use.
pub(crate) static PROFILES: LazyLock<BTreeMap<String, Profile>> = LazyLock::new(|| {
    serde_saphyr::from_str(include_str!("profiles.yaml")).unwrap_or_else(|error| {
        unreachable!("profiles.yaml is part of the program, and a test reads it: {error}")
    })
});

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    /// Made from the file: `UPDATE_DOCS=1 cargo test -p watcher documentation`.
    #[test]
    fn the_documentation_has_a_line_for_every_profile() {
        let mut table = "| profile | sidecars of | users | groups |\n|---|---|---|---|\n".to_owned();
        let list = |ids: &[u32]| {
            let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
            if ids.is_empty() { "–".to_owned() } else { ids.join(", ") }
        };
        for (name, Profile { about, users, groups, .. }) in PROFILES.iter() {
            let _ = writeln!(table, "| `{name}` | {about} | {} | {} |", list(users), list(groups));
        }
        testbed::doc_table::assert_current(
            "docs/configuration.md",
            "guard profiles: made from watcher/src/source/profiles.yaml",
            &table,
        );
    }

    #[test]
    fn every_profile_says_who_the_proxy_is() {
        let names: Vec<&str> = PROFILES.keys().map(String::as_str).collect();
        assert_eq!(names, ["fsm", "istio", "kuma", "linkerd", "osm"]);
        for (name, profile) in PROFILES.iter() {
            assert!(
                !profile.users.contains(&0) && !profile.users.is_empty() && !profile.ports.is_empty(),
                "{name}"
            );
            let marks = profile.containers.len() + profile.annotations.len() + profile.labels.len();
            assert!(marks > 0, "{name}");
        }
    }
}
