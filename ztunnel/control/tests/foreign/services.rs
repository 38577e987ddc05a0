//! Services and what is behind them.

use serde_json::{Value, json};

use super::mesh::Mesh;

pub fn services(mesh: &mut Mesh) {
    let nothing = &json!({});
    let web = |spec: Value| json!({"spec": spec});
    mesh.service("plain-svc", 1, nothing, nothing);
    mesh.service(
        "headless",
        2,
        &web(json!({"clusterIP": "None"})),
        &json!({"addresses": null, "ip_families": "DUAL"}),
    );
    mesh.service(
        "local",
        3,
        &web(json!({"internalTrafficPolicy": "Local"})),
        &json!({"load_balancing": {"routing_preference": ["NODE"], "mode": "STRICT"}}),
    );
    mesh.service(
        "same-zone",
        4,
        &web(json!({"trafficDistribution": "PreferClose"})),
        &json!({"load_balancing": {"routing_preference": ["NETWORK", "REGION", "ZONE"], "mode": "FAILOVER"}}),
    );
    mesh.service(
        "early",
        5,
        &web(json!({"publishNotReadyAddresses": true})),
        &json!({"load_balancing": {"health_policy": "ALLOW_ALL"}}),
    );
    mesh.service(
        "annotated",
        6,
        &json!({"metadata": {"annotations": {"networking.istio.io/traffic-distribution": "PreferClose"}}}),
        &json!({"load_balancing": {"routing_preference": ["NETWORK", "REGION", "ZONE"], "mode": "FAILOVER"}}),
    );
    // As with Kubernetes, `PreferClose` is an old name of the zone: a subzone counts for the node only.
    for (name, last, field, preference) in [
        ("in-zone", 11, "PreferSameZone", &["NETWORK", "REGION", "ZONE"][..]),
        ("on-node", 12, "PreferSameNode", &["NETWORK", "REGION", "ZONE", "SUBZONE", "NODE"][..]),
    ] {
        let sent = json!({"load_balancing": {"routing_preference": preference, "mode": "FAILOVER"}});
        mesh.service(name, last, &web(json!({"trafficDistribution": field})), &sent);
    }
    mesh.service(
        "annotated-node",
        13,
        &json!({"metadata": {"annotations": {"networking.istio.io/traffic-distribution": "PreferSameNode"}}}),
        &json!({"load_balancing": {"mode": "FAILOVER",
            "routing_preference": ["NETWORK", "REGION", "ZONE", "SUBZONE", "NODE"]}}),
    );
    // Its own node comes before any other preference.
    mesh.service(
        "early-and-local",
        14,
        &web(json!({"publishNotReadyAddresses": true, "internalTrafficPolicy": "Local",
            "trafficDistribution": "PreferSameZone"})),
        &json!({"load_balancing": {"routing_preference": ["NODE"], "mode": "STRICT", "health_policy": "ALLOW_ALL"}}),
    );
    // Layer 4 has no word for a session.
    mesh.service("session", 15, &web(json!({"sessionAffinity": "ClientIP"})), nothing);
    mesh.service(
        "datagrams",
        16,
        &web(json!({"ports": [{"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 5353},
            {"name": "dns-tcp", "port": 53, "targetPort": 5354}, {"name": "log", "port": 514, "protocol": "UDP"}]})),
        &json!({"ports": [{"service_port": 53, "target_port": 5354, "app_protocol": "TCP"},
            {"service_port": 514, "target_port": 514}]}),
    );
    let protocols =
        [("http", "HTTP11"), ("http2", "HTTP2"), ("grpc", "GRPC"), ("tcp", "TCP"), ("https", "TLS")];
    let ports: Vec<Value> =
        (81..).zip(protocols).map(|(port, (name, _))| json!({"name": name, "port": port})).collect();
    let sent: Vec<Value> = (81..)
        .zip(protocols)
        .map(|(port, (_, protocol))| json!({"service_port": port, "target_port": port, "app_protocol": protocol}))
        .collect();
    mesh.service("protocols", 7, &web(json!({"ports": ports})), &json!({"ports": sent}));
    // An alias is DNS's alone.
    mesh.service(
        "alias",
        8,
        &web(json!({"clusterIP": null, "type": "ExternalName", "externalName": "example.org"})),
        &Value::Null,
    );
}

/// What is behind them.
pub fn endpoints(mesh: &mut Mesh) {
    let nothing = &json!({});
    let web = |spec: Value| json!({"spec": spec});
    // Endpoints by selector, and a named port that each pod has another number for.
    mesh.service("selecting", 9, &web(json!({"selector": {"of": "selecting"},
            "ports": [{"name": "web", "port": 80, "targetPort": 8080}, {"name": "named", "port": 81, "targetPort": "http"}]})),
        &json!({"ports": [{"service_port": 80, "target_port": 8080}, {"service_port": 81}]}));
    let named = |port: u16| {
        json!({"metadata": {"labels": {"of": "selecting"}},
        "spec": {"containers": [{"name": "main", "image": "none", "ports": [{"name": "http", "containerPort": port}]}]}})
    };
    let key = "demo/selecting.demo.svc.cluster.local";
    let serves = |port: u16| json!({"services": {key: {"ports": [{"service_port": 80, "target_port": 8080}, {"service_port": 81, "target_port": port}]}}});
    mesh.pod("selected-a", 31, &named(9000), &serves(9000));
    mesh.pod("selected-b", 32, &named(9001), &serves(9001));
    mesh.pod(
        "selected-c",
        33,
        &json!({"metadata": {"labels": {"of": "selecting"}}}),
        &json!({"services": {key: {"ports": [{"service_port": 80, "target_port": 8080}]}}}),
    );

    // A name that no pod has a port of.
    mesh.service(
        "nowhere",
        17,
        &web(json!({"selector": {"of": "nowhere"}, "ports": [{"port": 80, "targetPort": "absent"}]})),
        &json!({"ports": [{"service_port": 80}]}),
    );
    mesh.pod(
        "selected-by-nowhere",
        34,
        &json!({"metadata": {"labels": {"of": "nowhere"}}}),
        &json!({"services": {"demo/nowhere.demo.svc.cluster.local": {}}}),
    );

    // Endpoints that are no pods.
    mesh.service("outside", 10, nothing, nothing);
    mesh.object(
        "EndpointSlice",
        "discovery.k8s.io/v1",
        "outside-1",
        &json!({
        "metadata": {"labels": {"kubernetes.io/service-name": "outside"}}, "addressType": "IPv4",
        "ports": [{"name": "web", "port": 7000, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["192.0.2.1"]}]}),
    );
    mesh.expected.insert("Kubernetes/discovery.k8s.io/EndpointSlice/demo/outside-1/192.0.2.1".to_owned(), json!({
        "aliases": ["/192.0.2.1"],
        "workload": {"uid": "Kubernetes/discovery.k8s.io/EndpointSlice/demo/outside-1/192.0.2.1",
            "name": "outside-1", "namespace": "demo", "addresses": ["192.0.2.1"], "cluster_id": "Kubernetes",
            "network_mode": "HOST_NETWORK",
            "services": {"demo/outside.demo.svc.cluster.local": {"ports": [{"service_port": 80, "target_port": 7000}]}}}}));
    mesh.object(
        "EndpointSlice",
        "discovery.k8s.io/v1",
        "outside-2",
        &json!({
        "metadata": {"labels": {"kubernetes.io/service-name": "outside"}}, "addressType": "IPv6",
        "ports": [{"name": "web", "port": 7001, "protocol": "TCP"}, {"name": "other", "port": 7002}],
        "endpoints": [{"addresses": ["2001:db8::1"], "conditions": {"ready": false}}]}),
    );
    mesh.expected.insert("Kubernetes/discovery.k8s.io/EndpointSlice/demo/outside-2/2001:db8::1".to_owned(), json!({
        "aliases": ["/2001:db8::1"],
        "workload": {"uid": "Kubernetes/discovery.k8s.io/EndpointSlice/demo/outside-2/2001:db8::1",
            "name": "outside-2", "namespace": "demo", "addresses": ["2001:db8::1"], "cluster_id": "Kubernetes",
            "network_mode": "HOST_NETWORK", "status": "UNHEALTHY",
            "services": {"demo/outside.demo.svc.cluster.local": {"ports": [{"service_port": 80, "target_port": 7001}]}}}}));
}
