//! Lists that users wrote for a sidecar of another mesh, as annotations: here they mean the same.
//!
//! They count where an operator names that mesh, and where our own annotation of the same list is not
//! there.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::options::{OPTIONS, PodOption};
use crate::model::pod::Pod;

/// A mesh whose annotations can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum ForeignMesh {
    /// `traffic.sidecar.istio.io/…`
    Istio,
    /// `config.linkerd.io/skip-…`
    Linkerd,
    /// `traffic.kuma.io/…`
    Kuma,
    /// `openservicemesh.io/…`
    Osm,
    /// `flomesh.io/…`
    Fsm,
}

/// One annotation.
pub(crate) struct ForeignList {
    /// Whose it is.
    pub mesh: ForeignMesh,
    /// Its name.
    pub annotation: &'static str,
    /// The key of the same option here.
    pub key: &'static str,
    /// What an empty value means.
    empty: Empty,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Empty {
    /// There is no such list.
    NoList,
    /// Nothing is included.
    Nothing,
}

const fn list(mesh: ForeignMesh, annotation: &'static str, key: &'static str) -> ForeignList {
    ForeignList { mesh, annotation, key, empty: Empty::NoList }
}

const fn including(mesh: ForeignMesh, annotation: &'static str, key: &'static str) -> ForeignList {
    ForeignList { mesh, annotation, key, empty: Empty::Nothing }
}

/// In the order in which the documentation lists them.
#[rustfmt::skip]
pub(crate) const FOREIGN: &[ForeignList] = &[
    list(ForeignMesh::Istio, "traffic.sidecar.istio.io/excludeOutboundPorts", "excludeOutboundPorts"),
    list(ForeignMesh::Istio, "traffic.sidecar.istio.io/excludeOutboundIPRanges", "excludeOutboundCidrs"),
    list(ForeignMesh::Istio, "traffic.sidecar.istio.io/excludeInterfaces", "excludeInterfaces"),
    list(ForeignMesh::Istio, "traffic.sidecar.istio.io/excludeInboundPorts", "excludeInboundPorts"),
    including(ForeignMesh::Istio, "traffic.sidecar.istio.io/includeOutboundIPRanges", "includeOutboundCidrs"),
    list(ForeignMesh::Istio, INCLUDED_PORTS, "includeOutboundPorts"),
    including(ForeignMesh::Istio, "traffic.sidecar.istio.io/includeInboundPorts", "includeInboundPorts"),
    list(ForeignMesh::Linkerd, "config.linkerd.io/skip-outbound-ports", "excludeOutboundPorts"),
    list(ForeignMesh::Linkerd, "config.linkerd.io/skip-subnets", "excludeOutboundCidrs"),
    list(ForeignMesh::Linkerd, "config.linkerd.io/skip-inbound-ports", "excludeInboundPorts"),
    list(ForeignMesh::Kuma, "traffic.kuma.io/exclude-outbound-ports", "excludeOutboundPorts"),
    list(ForeignMesh::Kuma, "traffic.kuma.io/exclude-outbound-ips", "excludeOutboundCidrs"),
    list(ForeignMesh::Kuma, "traffic.kuma.io/exclude-inbound-ports", "excludeInboundPorts"),
    list(ForeignMesh::Osm, "openservicemesh.io/outbound-port-exclusion-list", "excludeOutboundPorts"),
    list(ForeignMesh::Osm, "openservicemesh.io/outbound-ip-range-exclusion-list", "excludeOutboundCidrs"),
    list(ForeignMesh::Osm, "openservicemesh.io/inbound-port-exclusion-list", "excludeInboundPorts"),
    list(ForeignMesh::Osm, "openservicemesh.io/outbound-ip-range-inclusion-list", "includeOutboundCidrs"),
    list(ForeignMesh::Fsm, "flomesh.io/outbound-port-exclusion-list", "excludeOutboundPorts"),
    list(ForeignMesh::Fsm, "flomesh.io/outbound-ip-range-exclusion-list", "excludeOutboundCidrs"),
    list(ForeignMesh::Fsm, "flomesh.io/inbound-port-exclusion-list", "excludeInboundPorts"),
    list(ForeignMesh::Fsm, "flomesh.io/outbound-ip-range-inclusion-list", "includeOutboundCidrs"),
];

/// Istio captures these ports besides the ranges that are included, and all ranges are by default. So
/// alone it changes nothing.
const INCLUDED_PORTS: &str = "traffic.sidecar.istio.io/includeOutboundPorts";
const INCLUDED_RANGES: &str = "traffic.sidecar.istio.io/includeOutboundIPRanges";

/// Whether `annotation` is one of `meshes`.
pub(crate) fn is_of(meshes: &BTreeSet<ForeignMesh>, annotation: &str) -> bool {
    FOREIGN.iter().any(|list| list.annotation == annotation && meshes.contains(&list.mesh))
}

/// Sets on `pod` what the annotations of `meshes` say, where ours say nothing.
pub(crate) fn set(pod: &mut Pod, meshes: &BTreeSet<ForeignMesh>, annotations: &BTreeMap<String, String>) {
    for ForeignList { annotation, key, empty, .. } in
        FOREIGN.iter().filter(|list| meshes.contains(&list.mesh))
    {
        let (Some(text), Some(option)) =
            (annotations.get(*annotation), OPTIONS.iter().find(|option| option.key == *key))
        else {
            continue;
        };
        let decides_nothing = *annotation == INCLUDED_PORTS && !annotations.contains_key(INCLUDED_RANGES);
        if option.annotation(annotations).is_some() || decides_nothing {
            continue;
        }
        if text.trim().is_empty() {
            if *empty == Empty::Nothing {
                include_nothing(pod, option);
            }
        } else if let Err(invalid) = option.set(pod, annotation, &Value::String(text.clone())) {
            pod.notes.push(invalid.ignored());
        }
    }
}

/// An inclusion list that has nothing.
fn include_nothing(pod: &mut Pod, option: &PodOption) {
    let lists = std::sync::Arc::make_mut(&mut pod.lists);
    match option.key {
        "includeInboundPorts" => lists.inbound.included_ports = Some(Vec::new()),
        _ => lists.outbound.included_cidrs = Some(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use clap::ValueEnum as _;
    use serde_json::json;

    use super::*;
    use crate::model::lists::effective;

    fn read(meshes: &[ForeignMesh], annotations: &Value) -> Pod {
        let annotations = serde_json::from_value(annotations.clone()).unwrap();
        let mut pod = Pod::default();
        set(&mut pod, &meshes.iter().copied().collect(), &annotations);
        pod
    }

    #[test]
    fn every_annotation_is_a_list_that_there_is() {
        for ForeignList { annotation, key, mesh, .. } in FOREIGN {
            assert!(OPTIONS.iter().any(|option| option.key == *key), "{annotation}");
            assert!(is_of(&[*mesh].into(), annotation) && !is_of(&BTreeSet::new(), annotation));
        }
    }

    #[test]
    fn they_count_where_their_mesh_is_named_and_ours_are_not_there() {
        let annotations = json!({
            "config.linkerd.io/skip-outbound-ports": "25,587-600", "config.linkerd.io/skip-subnets": "10.0.0.0/8",
            "traffic.kuma.io/exclude-outbound-ports": "1234",
        });
        let pod = read(&[ForeignMesh::Linkerd], &annotations);
        assert_eq!(pod.lists.outbound.excluded_ports, [25..=25, 587..=600]);
        assert_eq!(pod.lists.outbound.excluded_cidrs.len(), 1);
        assert_eq!(read(&[], &annotations), Pod::default());
        let ours = json!({"config.linkerd.io/skip-outbound-ports": "25",
            "ambient.adit.dev/exclude-outbound-ports": "26"});
        assert!(read(&[ForeignMesh::Linkerd], &ours).lists.outbound.excluded_ports.is_empty());
        let bad = read(&[ForeignMesh::Kuma], &json!({"traffic.kuma.io/exclude-inbound-ports": "http"}));
        assert!(bad.notes[0].contains("traffic.kuma.io/exclude-inbound-ports: \"http\""), "{:?}", bad.notes);
    }

    #[test]
    fn istios_inclusion_lists_mean_what_they_mean_there() {
        let outside = |annotations: Value, to: &str| {
            let pod = read(&[ForeignMesh::Istio], &annotations);
            effective(&[&pod.lists]).leaves_outside(to.parse().unwrap(), false)
        };
        let ports = "traffic.sidecar.istio.io/includeOutboundPorts";
        let ranges = "traffic.sidecar.istio.io/includeOutboundIPRanges";
        assert!(!outside(json!({ports: "80"}), "8.8.8.8:443"), "all ranges are included by default");
        assert!(outside(json!({ranges: "10.0.0.0/8", ports: "80"}), "8.8.8.8:443"));
        assert!(!outside(json!({ranges: "10.0.0.0/8", ports: "80"}), "8.8.8.8:80"));
        assert!(!outside(json!({ranges: "*"}), "8.8.8.8:443"));
        assert!(outside(json!({ranges: ""}), "8.8.8.8:443"), "nothing is");
        assert!(!outside(json!({ranges: "", ports: "80"}), "8.8.8.8:80"));
        let inbound = |text: &str| {
            let annotations = json!({"traffic.sidecar.istio.io/includeInboundPorts": text});
            effective(&[&read(&[ForeignMesh::Istio], &annotations).lists]).leaves_outside_at(8080)
        };
        assert_eq!(["", "*", "8080", "80"].map(inbound), [true, false, false, true]);
    }

    /// Made from the rows: `UPDATE_DOCS=1 cargo test -p watcher documentation`.
    #[test]
    fn the_documentation_has_a_line_for_every_foreign_annotation() {
        let mut table = "| `--annotations-of` | annotation | as |\n|---|---|---|\n".to_owned();
        for ForeignList { mesh, annotation, key, .. } in FOREIGN {
            let mesh = mesh.to_possible_value().unwrap();
            let _ = writeln!(table, "| `{}` | `{annotation}` | `{key}` |", mesh.get_name());
        }
        testbed::doc_table::assert_current(
            "docs/configuration.md",
            "annotations of others: made from watcher/src/source/foreign.rs",
            &table,
        );
    }
}
