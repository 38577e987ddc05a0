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

/// The annotation or label by which an injector of sidecars marks a pod, if one is there.
pub(crate) fn mark(
    annotations: &BTreeMap<String, String>,
    labels: Option<&BTreeMap<String, String>>,
) -> Option<&'static str> {
    let is_there = |key: &&String, of: &BTreeMap<String, String>| {
        of.get(*key).is_some_and(|value| value != "false" && value != "disabled")
    };
    PROFILES.values().find_map(|profile| {
        let annotation = profile.annotations.iter().find(|key| is_there(key, annotations));
        let label = || profile.labels.iter().find(|key| labels.is_some_and(|labels| is_there(key, labels)));
        annotation.or_else(label).map(String::as_str)
    })
}

/// Whether only a sidecar has a container of this name.
pub(crate) fn has_container(name: &str) -> bool {
    PROFILES.values().any(|profile| profile.containers.iter().any(|container| container == name))
}

/// The mesh whose sidecar has these listeners: on each of its ports, by one of its users. `listeners`
/// are ports and users; `here` gives the listeners' number of one of the pod's users.
pub(crate) fn of_listeners(
    listeners: &[(u16, u32)],
    here: impl Fn(u32) -> Option<u32>,
) -> Option<&'static str> {
    let found = PROFILES.values().find(|profile| {
        profile
            .users
            .iter()
            .filter_map(|user| here(*user))
            .any(|user| profile.ports.iter().all(|port| listeners.contains(&(*port, user))))
    });
    found.map(|profile| profile.about.as_str())
}

/// Every port that a sidecar of a profile listens on.
pub(crate) fn ports() -> Vec<u16> {
    PROFILES.values().flat_map(|profile| &profile.ports).copied().collect()
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    /// Made from the file: `UPDATE_DOCS=1 cargo test -p watcher documentation`.
    #[test]
    fn the_documentation_has_a_line_for_every_profile() {
        let mut table =
            "| profile | sidecars of | users | groups | marks | containers | ports |\n|---|---|---|---|---|---|---|\n"
                .to_owned();
        let names = |names: &[&[String]]| {
            let names: Vec<String> =
                names.iter().copied().flatten().map(|name| format!("`{name}`")).collect();
            if names.is_empty() { "–".to_owned() } else { names.join(", ") }
        };
        let list = |ids: Vec<u32>| {
            let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
            if ids.is_empty() { "–".to_owned() } else { ids.join(", ") }
        };
        for (name, profile) in PROFILES.iter() {
            let Profile { about, users, groups, containers, annotations, labels, ports } = profile;
            let ports = ports.iter().copied().map(u32::from).collect();
            let (users, groups, ports) = (list(users.clone()), list(groups.clone()), list(ports));
            let (marks, containers) = (names(&[annotations, labels]), names(&[containers]));
            let _ = writeln!(
                table,
                "| `{name}` | {about} | {users} | {groups} | {marks} | {containers} | {ports} |"
            );
        }
        testbed::doc_table::assert_current(
            "docs/configuration.md",
            "guard profiles: made from watcher/src/source/profiles.yaml",
            &table,
        );
    }

    #[test]
    fn a_sidecar_is_known_by_all_its_ports_and_its_user() {
        let same = Some;
        for (listeners, expected) in [
            (&[(15001, 1337), (15006, 1337), (8080, 0)][..], Some("Istio")),
            (&[(15001, 1337), (15006, 0)], None),
            (&[(15001, 1337)], None),
            (&[(15001, 0), (15006, 0)], None),
            (&[(4143, 2102), (4140, 2102)], Some("Linkerd")),
            (&[(15001, 5678), (15006, 5678)], Some("Kuma")),
            (&[], None),
        ] {
            assert_eq!(of_listeners(listeners, same), expected, "{listeners:?}");
        }
        let own = |user| Some(user + 100_000);
        assert_eq!(of_listeners(&[(15001, 101_337), (15006, 101_337)], own), Some("Istio"));
        assert_eq!(of_listeners(&[(15001, 1337), (15006, 1337)], own), None);
    }

    #[test]
    fn injectors_leave_their_marks() {
        let of = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
        let none = BTreeMap::new();
        assert_eq!(mark(&of("linkerd.io/proxy-version", "edge"), None), Some("linkerd.io/proxy-version"));
        assert_eq!(mark(&of("kuma.io/sidecar-injected", "false"), Some(&none)), None);
        assert_eq!(mark(&none, Some(&of("osm-proxy-uuid", "x"))), Some("osm-proxy-uuid"));
        assert!(has_container("linkerd-proxy") && !has_container("proxy"));
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
