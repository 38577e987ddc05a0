//! Policies, and the pods that name them.

use serde_json::{Value, json};

use super::mesh::Mesh;

pub fn policies(mesh: &mut Mesh) {
    let rules = |rules: Value| json!({"spec": {"rules": rules}});
    let from = |source: Value| json!([{"from": [{"source": source}]}]);
    let one = |sent: Value| json!({"rules": [{"clauses": [{"matches": [sent]}]}]});
    mesh.policy("nobody", &json!({"spec": {}}), &json!({}));
    mesh.policy("everybody", &rules(json!([{}])), &json!({"rules": [{}]}));
    mesh.policy(
        "denies",
        &json!({"spec": {"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["a"]}}]}]}}),
        &json!({"action": "DENY", "rules": [{"clauses": [{"matches": [{"namespaces": [{"exact": "a"}]}]}]}]}),
    );
    mesh.policy("principals", &rules(from(json!({"principals": ["cluster.local/ns/a/sa/b", "*/sa/b", "cluster.local/*", "*"]}))),
        &one(json!({"principals": [{"exact": "cluster.local/ns/a/sa/b"}, {"suffix": "/sa/b"}, {"prefix": "cluster.local/"}, {"presence": {}}]})));
    mesh.policy(
        "not-principals",
        &rules(from(json!({"notPrincipals": ["*"], "notNamespaces": ["b"]}))),
        &one(json!({"not_principals": [{"presence": {}}], "not_namespaces": [{"exact": "b"}]})),
    );
    mesh.policy("accounts", &rules(from(json!({"serviceAccounts": ["web", "other/web"], "notServiceAccounts": ["x"]}))),
        &one(json!({"service_accounts": [{"namespace": "demo", "service_account": "web"}, {"namespace": "other", "service_account": "web"}],
            "not_service_accounts": [{"namespace": "demo", "service_account": "x"}]})));
    mesh.policy("addresses", &rules(from(json!({"ipBlocks": ["10.0.0.0/8", "192.0.2.1"], "notIpBlocks": ["fd00::/64"]}))),
        &one(json!({"source_ips": [{"address": "10.0.0.0", "length": 8}, {"address": "192.0.2.1", "length": 32}],
            "not_source_ips": [{"address": "fd00::", "length": 64}]})));
    mesh.policy(
        "ports",
        &rules(json!([{"to": [{"operation": {"ports": ["80", "81"], "notPorts": ["82"]}}]}])),
        &one(json!({"destination_ports": [80, 81], "not_destination_ports": [82]})),
    );
    // First what is called, then who calls, then conditions.
    mesh.policy("all-at-once", &rules(json!([{"from": [{"source": {"namespaces": ["a"]}}, {"source": {"namespaces": ["b"]}}],
            "to": [{"operation": {"ports": ["80"]}}],
            "when": [{"key": "destination.ip", "values": ["10.0.0.1"]}, {"key": "source.namespace", "notValues": ["c"]}]}])),
        &json!({"rules": [{"clauses": [
            {"matches": [{"destination_ports": [80]}]},
            {"matches": [{"namespaces": [{"exact": "a"}]}, {"namespaces": [{"exact": "b"}]}]},
            {"matches": [{"destination_ips": [{"address": "10.0.0.1", "length": 32}]}]},
            {"matches": [{"not_namespaces": [{"exact": "c"}]}]}]}]}));
    let when = |key: &str, values: Value| json!([{"when": [{"key": key, "values": values}]}]);
    for (name, key, values, sent) in [
        (
            "when-ip",
            "source.ip",
            json!(["10.1.0.0/16"]),
            json!({"source_ips": [{"address": "10.1.0.0", "length": 16}]}),
        ),
        (
            "when-principal",
            "source.principal",
            json!(["cluster.local/ns/a/*"]),
            json!({"principals": [{"prefix": "cluster.local/ns/a/"}]}),
        ),
        ("when-port", "destination.port", json!(["8080"]), json!({"destination_ports": [8080]})),
    ] {
        mesh.policy(name, &rules(when(key, values)), &one(sent));
    }
    mesh.policy(
        "two-rules",
        &rules(json!([{"to": [{"operation": {"ports": ["80"]}}]}, {"from": [{"source": {"namespaces": ["a*"]}}]}])),
        &json!({"rules": [{"clauses": [{"matches": [{"destination_ports": [80]}]}]},
            {"clauses": [{"matches": [{"namespaces": [{"prefix": "a"}]}]}]}]}),
    );
    mesh.policy(
        "dry",
        &json!({"metadata": {"annotations": {"istio.io/dry-run": "true"}}, "spec": {}}),
        &json!({"dry_run": true}),
    );
    mesh.policy("allows-get", &rules(json!([{"to": [{"operation": {"methods": ["GET"]}}]}])), &json!({}));
    mesh.policy(
        "for-waypoint",
        &json!({"spec": {"targetRefs": [{"kind": "Service", "group": "", "name": "plain-svc"}]}}),
        &Value::Null,
    );
    mesh.policy("audits", &json!({"spec": {"action": "AUDIT", "rules": [{}]}}), &Value::Null);
    mesh.policy(
        "selects",
        &json!({"spec": {"selector": {"matchLabels": {"team": "a"}}}}),
        &json!({"scope": "WORKLOAD_SELECTOR"}),
    );
    mesh.policy(
        "global",
        &json!({"metadata": {"namespace": "adit-system"}, "spec": {}}),
        &json!({"namespace": "adit-system", "scope": null}),
    );

    // One of the root namespace is named by pods of others.
    mesh.policy(
        "selects-everywhere",
        &json!({"metadata": {"namespace": "adit-system"}, "spec": {"selector": {"matchLabels": {"team": "b"}}}}),
        &json!({"namespace": "adit-system", "scope": "WORKLOAD_SELECTOR"}),
    );
    mesh.pod(
        "selected-from-root",
        44,
        &json!({"metadata": {"labels": {"team": "b"}}}),
        &json!({"authorization_policies": ["adit-system/selects-everywhere"]}),
    );

    mesh.peer_authentication("port", &json!({"selector": {"matchLabels": {"peer": "port"}},
        "mtls": {"mode": "PERMISSIVE"}, "portLevelMtls": {"9090": {"mode": "STRICT"}, "80": {"mode": "PERMISSIVE"}}}));
    mesh.expected.insert("demo/converted_peer_authentication_port".to_owned(), json!({
        "name": "converted_peer_authentication_port", "namespace": "demo", "scope": "WORKLOAD_SELECTOR", "action": "DENY",
        "aliases": [], "rules": [{"clauses": [{"matches": [
            {"not_principals": [{"presence": {}}], "destination_ports": [9090]}]}]}]}));
    // It changes nothing for whom nothing is strict.
    let permissive = json!({"selector": {"matchLabels": {"peer": "open"}}, "mtls": {"mode": "DISABLE"}});
    mesh.peer_authentication("open", &permissive);
    mesh.pod("peer-open", 45, &json!({"metadata": {"labels": {"peer": "open"}}}), &json!({}));

    mesh.peer_authentication("ports", &json!({"selector": {"matchLabels": {"peer": "ports"}},
        "mtls": {"mode": "STRICT"}, "portLevelMtls": {"8080": {"mode": "PERMISSIVE"}, "8081": {"mode": "DISABLE"}}}));
    let anonymous = json!({"matches": [{"not_principals": [{"presence": {}}]}]});
    mesh.expected.insert("demo/converted_peer_authentication_ports".to_owned(), json!({
        "name": "converted_peer_authentication_ports", "namespace": "demo", "scope": "WORKLOAD_SELECTOR", "action": "DENY",
        "aliases": [], "rules": [{"clauses": [anonymous, {"matches": [{"not_destination_ports": [8080]}]},
            {"matches": [{"not_destination_ports": [8081]}]}]}]}));
    mesh.peer_authentication(
        "strict",
        &json!({"selector": {"matchLabels": {"peer": "strict"}}, "mtls": {"mode": "STRICT"}}),
    );
    mesh.expected.insert("adit-system/istio_converted_static_strict".to_owned(), json!({
        "name": "istio_converted_static_strict", "namespace": "adit-system", "scope": "WORKLOAD_SELECTOR", "action": "DENY",
        "aliases": [], "rules": [{"clauses": [anonymous]}]}));
    for (name, last, key) in [
        ("peer-port", 46, "demo/converted_peer_authentication_port"),
        ("peer-ports", 41, "demo/converted_peer_authentication_ports"),
        ("peer-strict", 42, "adit-system/istio_converted_static_strict"),
    ] {
        let peer = name.strip_prefix("peer-").unwrap();
        mesh.pod(
            name,
            last,
            &json!({"metadata": {"labels": {"peer": peer}}}),
            &json!({"authorization_policies": [key]}),
        );
    }
    mesh.pod(
        "selected-by-policy",
        43,
        &json!({"metadata": {"labels": {"team": "a"}}}),
        &json!({"authorization_policies": ["demo/selects"]}),
    );
}
