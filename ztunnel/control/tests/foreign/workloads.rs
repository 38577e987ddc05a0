//! Nodes and pods.

use serde_json::{Value, json};

use super::mesh::Mesh;

pub fn nodes(mesh: &mut Mesh) {
    for (name, labels) in [
        (
            "n1",
            json!({"topology.kubernetes.io/region": "r", "topology.kubernetes.io/zone": "z",
            "topology.istio.io/subzone": "s"}),
        ),
        ("n2", json!({"topology.kubernetes.io/zone": "z"})),
        ("n3", json!({})),
    ] {
        mesh.object("Node", "v1", name, &json!({"metadata": {"labels": labels, "namespace": null}}));
    }
}

pub fn pods(mesh: &mut Mesh) {
    let nothing = &json!({});
    mesh.pod("plain", 1, nothing, nothing);
    mesh.pod(
        "region",
        2,
        &json!({"spec": {"nodeName": "n1"}}),
        &json!({"node": "n1", "locality": {"region": "r", "zone": "z", "subzone": "s"}}),
    );
    mesh.pod(
        "zone",
        3,
        &json!({"spec": {"nodeName": "n2"}}),
        &json!({"node": "n2", "locality": {"zone": "z"}}),
    );
    mesh.pod("nowhere", 4, &json!({"spec": {"nodeName": "unknown"}}), &json!({"node": "unknown"}));
    mesh.pod(
        "account",
        5,
        &json!({"spec": {"serviceAccountName": "web"}}),
        &json!({"service_account": "web"}),
    );
    mesh.pod("host", 6, &json!({"spec": {"hostNetwork": true}}), &json!({"network_mode": "HOST_NETWORK"}));
    mesh.pod(
        "captured",
        7,
        &json!({"metadata": {"annotations": {"ambient.istio.io/redirection": "enabled"}}}),
        &json!({"tunnel_protocol": "HBONE"}),
    );
    mesh.pod(
        "left",
        8,
        &json!({"metadata": {"annotations": {"ambient.istio.io/redirection": "disabled"}}}),
        nothing,
    );
    mesh.pod(
        "native",
        9,
        &json!({"metadata": {"labels": {"networking.istio.io/tunnel": "http"}}}),
        &json!({"tunnel_protocol": "HBONE", "native_tunnel": true}),
    );
    mesh.pod(
        "unready",
        10,
        &json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}),
        &json!({"status": "UNHEALTHY"}),
    );
    mesh.pod(
        "starting",
        11,
        &json!({"status": {"phase": "Pending", "conditions": []}}),
        &json!({"status": "UNHEALTHY"}),
    );
    mesh.pod(
        "dual",
        12,
        &json!({"status": {"podIPs": [{"ip": "10.1.0.12"}, {"ip": "fd00::12"}]}}),
        &json!({"addresses": ["10.1.0.12", "fd00::12"]}),
    );
    mesh.pod("succeeded", 13, &json!({"status": {"phase": "Succeeded"}}), &Value::Null);
    mesh.pod("failed", 14, &json!({"status": {"phase": "Failed"}}), &Value::Null);
    mesh.pod("without-address", 15, &json!({"status": {"podIP": null, "podIPs": null}}), &Value::Null);
    // Names, from the most to the least specific label.
    mesh.pod(
        "app",
        16,
        &json!({"metadata": {"labels": {"app": "shop", "version": "v1"}}}),
        &json!({"canonical_name": "shop", "canonical_revision": "v1"}),
    );
    mesh.pod(
        "recommended",
        17,
        &json!({"metadata": {"labels": {"app": "shop", "version": "v1",
            "app.kubernetes.io/name": "cart", "app.kubernetes.io/version": "v2"}}}),
        &json!({"canonical_name": "cart", "canonical_revision": "v2"}),
    );
    mesh.pod(
        "canonical",
        18,
        &json!({"metadata": {"labels": {"app": "shop", "app.kubernetes.io/name": "cart",
            "service.istio.io/canonical-name": "till", "service.istio.io/canonical-revision": "v3"}}}),
        &json!({"canonical_name": "till", "canonical_revision": "v3"}),
    );
    // Controllers.
    let owned = |name: &str, kind: &str, owner: &str, labels: Value| {
        json!({"metadata": {"name": name, "generateName": format!("{owner}-"), "labels": labels,
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": kind, "name": owner, "uid": "u", "controller": true}]}})
    };
    let named = |name: &str| json!({"workload_name": name, "canonical_name": name});
    mesh.pod(
        "",
        19,
        &owned("front-5d4-x1", "ReplicaSet", "front-5d4", json!({"pod-template-hash": "5d4"})),
        &named("front"),
    );
    mesh.pod("", 20, &owned("backup-28000001-x2", "Job", "backup-28000001", json!({})), &named("backup"));
    mesh.pod("", 21, &owned("once-x3", "Job", "once", json!({})), &named("once"));
    mesh.pod("", 22, &owned("db-0", "StatefulSet", "db", json!({})), &named("db"));
    mesh.pod("", 23, &owned("agent-x4", "DaemonSet", "agent", json!({})), &named("agent"));
}
