//! Discovery from a control plane that shares no line with us: gRPC's own implementation in Python,
//! with definitions written for it alone.

use std::io::ErrorKind;

use serde_json::{Value, json};
use testbed::{
    fakes::FakeControlPlane,
    mesh_pod::{MeshPod, read_line},
    netns::TestNetns,
    tunnel_mesh::{TunnelMesh, TunnelNode},
    wait::wait_for,
};

/// A tunnel of node `a` that asks the control plane on `port`.
pub fn tunnel(mesh: &TunnelMesh, netns: TestNetns, port: u64, pods: &[&MeshPod]) -> TunnelNode {
    tunnel_with(mesh, netns, port, pods, &[])
}

pub fn tunnel_with(
    mesh: &TunnelMesh,
    netns: TestNetns,
    port: u64,
    pods: &[&MeshPod],
    more: &[(&str, &str)],
) -> TunnelNode {
    let mut tunnel = unheard(mesh, netns, port, more);
    tunnel.agent().accept();
    serve(&mut tunnel, pods);
    tunnel
}

/// Hands `pods` over to a tunnel that has said hello.
pub fn serve(tunnel: &mut TunnelNode, pods: &[&MeshPod]) {
    for pod in pods {
        assert_eq!(tunnel.agent().add(pod), "");
    }
    assert_eq!(tunnel.agent().snapshot(), "");
}

/// A tunnel that may not have said hello yet.
pub fn unheard(mesh: &TunnelMesh, netns: TestNetns, port: u64, more: &[(&str, &str)]) -> TunnelNode {
    let address = format!("https://localhost:{port}");
    let root = mesh.dir.path().join("xds-root.pem").display().to_string();
    let variables = [
        ("LOCAL_XDS_PATH", ""),
        ("XDS_ADDRESS", &address),
        ("XDS_ROOT_CA", &root),
        ("AUTH_TOKEN", "a.b.c"),
        ("XDS_HEADER_X_TENANT", "seven"),
        ("ISTIO_META_FLAVOUR", "plain"),
        ("ISTIO_METAJSON_LABELS", "{\"a\": [1, true]}"),
        ("INSTANCE_IP", "192.0.2.7"),
        ("POD_NAME", "ztunnel-a"),
        ("POD_NAMESPACE", "adit"),
    ];
    TunnelNode::start_unheard(mesh, "a", netns, &[&variables, more].concat())
}

pub fn name(pod: &MeshPod) -> String {
    format!("Kubernetes//Pod/demo/{}", pod.name)
}

/// A workload as the control plane sends it.
pub fn workload(pod: &MeshPod, version: &str, tunnel_protocol: u32) -> Value {
    let services = match pod.name.as_str() {
        "server" => json!({WEB: {"ports": [{"servicePort": 80, "targetPort": 8080}]}}),
        _ => json!({}),
    };
    json!([version, {"workload": {
        "uid": name(pod), "name": pod.name, "namespace": "demo", "addresses": [base64(&pod.ip.octets())],
        "tunnelProtocol": tunnel_protocol, "serviceAccount": pod.name, "node": "a", "canonicalName": pod.name,
        "canonicalRevision": "v1", "workloadName": pod.name, "clusterId": "Kubernetes",
        "services": services,
    }}])
}

pub fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn service() -> Value {
    json!(["1", {"service": {
        "name": "web", "namespace": "demo", "hostname": "web.demo.svc.cluster.local",
        "addresses": [{"network": "", "address": base64(&[10, 96, 0, 1])}],
        "ports": [{"servicePort": 80, "targetPort": 8080}],
    }}])
}

const WEB: &str = "demo/web.demo.svc.cluster.local";

#[test]
#[ignore = "needs root: make test"]
fn a_foreign_control_plane_tells_and_is_told_what_is_wrong() {
    let mut mesh = TunnelMesh::new();
    let (client, server, bad) =
        (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"), mesh.plain("a", "bad"));
    server.serve_double_echo(8080);
    let netns = mesh.netns("a");
    let mut control = FakeControlPlane::start(mesh.dir.path(), &netns, 0);
    control.send(&json!({"hold": "address", "set": {
        name(&client): workload(&client, "1", 1), name(&server): workload(&server, "1", 1),
        name(&bad): workload(&bad, "1", 2), WEB: service(),
    }}));
    let node = tunnel(&mesh, netns, control.port, &[&client, &server]);

    let metadata = control.receive("stream")["stream"].clone();
    assert_eq!(
        (&metadata["authorization"], &metadata["clusterid"], &metadata["x_tenant"]),
        (&json!("Bearer a.b.c"), &json!("Kubernetes"), &json!("seven"))
    );
    let first = [control.receive("request"), control.receive("request")];
    for (request, kind) in first.iter().zip(["address", "authorization"]) {
        assert_eq!(request["request"], kind);
        assert_eq!(request["node"], "ztunnel~192.0.2.7~ztunnel-a.adit~adit.svc.cluster.local");
        let told = &request["metadata"];
        for (key, value) in [
            ("NAME", json!("ztunnel-a")),
            ("NAMESPACE", json!("adit")),
            ("INSTANCE_IPS", json!("192.0.2.7")),
            ("NODE_NAME", json!("a")),
            ("CLUSTER_ID", json!("Kubernetes")),
            ("FLAVOUR", json!("plain")),
            ("LABELS", json!({"a": [1.0, true]})),
        ] {
            assert_eq!(told[key], value, "{key}");
        }
        for (key, nothing) in [("subscribe", json!([])), ("unsubscribe", json!([])), ("versions", json!({}))]
        {
            assert_eq!(request[key], nothing, "a wildcard names nobody");
        }
    }
    // The good resources hold, the bad one is refused by name.
    let error = control.request("address")["error"].as_str().expect("text").to_owned();
    assert!(error.starts_with(&format!("{}: tunnel_protocol", name(&bad))), "{error}");
    assert!(!error.contains(&name(&server)), "{error}");
    node.wait_ready();
    for to in [server.at(8080), "10.96.0.1:80".parse().expect("address")] {
        read_line(&mut client.netns.connect(to)).expect("greeting");
    }
    let carried =
        node.records(2, &["\"direction\":\"outbound\"", "spiffe://cluster.local/ns/demo/sa/server"]);
    assert_eq!(carried[0]["dst.workload"], "server");

    // A policy comes and goes.
    let deny = json!({"demo/deny": ["1", {"name": "deny", "namespace": "demo", "scope": 1, "action": 1,
        "rules": [{"clauses": [{"matches": [{"principals": [{"exact": "cluster.local/ns/demo/sa/client"}]}]}]}]}]});
    control.send(&json!({"push": "authorization", "set": deny}));
    wait_for("the policy to hold", || {
        (client.netns.try_connect(server.at(8080)).and_then(|mut stream| read_line(&mut stream)))
            .is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
            .then_some(())
    });
    // The one that showed it may have been open for a moment, and was cut.
    assert_eq!(client.netns.refusal(server.at(8080)), ErrorKind::ConnectionReset);
    node.records(1, &["explicitly denied by: demo/deny"]);
    control.send(&json!({"push": "authorization", "remove": ["demo/deny"]}));
    wait_for("the policy to go", || read_line(&mut client.netns.try_connect(server.at(8080)).ok()?).ok());
    let metrics = node.metrics();
    for url in ["istio.workload.Address", "istio.security.Authorization"] {
        assert!(
            metrics.contains(&format!("istio_xds_message_total{{url=\"type.googleapis.com/{url}\"}}")),
            "{metrics}"
        );
    }
}

#[test]
#[ignore = "needs root: make test"]
fn what_is_held_outlives_the_control_plane_and_is_told_when_it_is_back() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    server.serve_double_echo(8080);
    let netns = mesh.netns("a");
    let mut control = FakeControlPlane::start(mesh.dir.path(), &netns, 0);
    let both = json!({name(&client): workload(&client, "1", 1), name(&server): workload(&server, "3", 1)});
    control.send(&json!({"hold": "address", "set": both}));
    let node = tunnel(&mesh, netns, control.port, &[&client, &server]);
    node.wait_ready();
    read_line(&mut client.netns.connect(server.at(8080))).expect("greeting");
    for _ in 0..2 {
        control.request("address");
    }

    // It hangs up: the next stream tells what is held.
    control.send(&json!({"hang_up": true}));
    let again = control.request("address");
    assert_eq!(again["versions"], json!({name(&client): "1", name(&server): "3"}));
    assert_eq!(again["nonce"], "");

    // It is gone, and nothing changes.
    let port = control.port;
    drop(control);
    wait_for("the loss to be noticed", || node.log().contains("control plane unreachable").then_some(()));
    assert!(node.is_ready());
    read_line(&mut client.netns.connect(server.at(8080))).expect("greeting");

    // It is back, and one of them left meanwhile.
    let mut control = FakeControlPlane::start(mesh.dir.path(), &node.netns, port);
    control.send(&json!({"hold": "address", "set": {name(&client): workload(&client, "1", 1)}}));
    let again = control.request("address");
    assert_eq!(again["versions"], json!({name(&client): "1", name(&server): "3"}));
    wait_for("who left to be forgotten", || {
        let dump = node.netns.http("GET", ([127, 0, 0, 1], 15000), "/config_dump").expect("dump");
        (!dump.contains(&name(&server)) && dump.contains(&name(&client))).then_some(())
    });
}

/// The tunnel subscribes to what connections need, when they need it, and to nothing else.
#[test]
#[ignore = "needs root: make test"]
fn what_a_connection_needs_is_asked_for_and_stays_asked_for() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    let (other, outside) = (mesh.enrolled("a", "other"), mesh.plain("a", "outside"));
    for pod in [&server, &other, &outside] {
        pod.serve_double_echo(8080);
    }
    let netns = mesh.netns("a");
    let mut control = FakeControlPlane::start(mesh.dir.path(), &netns, 0);
    let all = json!({name(&client): workload(&client, "1", 1), name(&server): workload(&server, "1", 1),
        name(&other): workload(&other, "1", 1), WEB: service()});
    control.send(&json!({"hold": "address", "set": all}));
    let on_demand = [("XDS_ON_DEMAND", "true"), ("ISTIO_META_DNS_CAPTURE", "false")];
    let node = tunnel_with(&mesh, netns, control.port, &[&client, &server, &other], &on_demand);
    // There is no subscription yet, so there is nothing to wait for.
    let first = control.request("address");
    assert_eq!((&first["subscribe"], &first["unsubscribe"]), (&json!(["*"]), &json!(["*"])));
    node.wait_ready();

    // A pod, a service, and an unknown address: one subscription each, besides those of the node's
    // pods.
    let asked_for = |control: &FakeControlPlane, name: &str| loop {
        let request = control.request("address");
        let names = request["subscribe"].as_array().expect("names");
        if names.contains(&json!(name)) {
            return;
        }
        assert!(
            names.iter().all(|name| name.as_str().is_some_and(|name| name.contains("/demo/"))),
            "{names:?}"
        );
    };
    for _ in 0..2 {
        for to in [server.at(8080), "10.96.0.1:80".parse().expect("address"), outside.at(8080)] {
            read_line(&mut client.netns.connect(to)).expect("greeting");
        }
    }
    for asked in [server.ip.to_string(), "10.96.0.1".to_owned(), outside.ip.to_string()] {
        asked_for(&control, &format!("/{asked}"));
    }
    let to_server = ["\"direction\":\"outbound\"", "spiffe://cluster.local/ns/demo/sa/server"];
    assert_eq!(node.records(4, &to_server)[3]["dst.workload"], "server");
    let dump = || node.netns.http("GET", ([127, 0, 0, 1], 15000), "/config_dump").expect("dump");
    assert!(!dump().contains(&name(&other)), "nobody asked for that one");

    // While there is no answer, an unknown destination is not passed through; known ones go on.
    control.send(&json!({"mute": true}));
    control.receive("mute");
    assert_eq!(client.netns.refusal(other.at(8080)), ErrorKind::ConnectionReset);
    node.records(1, &["\"reason\":\"unanswered\"", &format!("/{}", other.ip)]);
    read_line(&mut client.netns.connect(server.at(8080))).expect("greeting");
    // The answer comes, late, and counts though its asker gave up.
    control.send(&json!({"mute": false}));
    wait_for("the late answer", || dump().contains(&name(&other)).then_some(()));
    read_line(&mut client.netns.connect(other.at(8080))).expect("greeting");

    // A pod that left is removed; a new pod at a subscribed address is sent.
    control.send(&json!({"push": "address", "remove": [name(&other)]}));
    wait_for("who left to be forgotten", || !dump().contains(&name(&other)));
    control.send(&json!({"push": "address", "set": {name(&outside): workload(&outside, "1", 0)}}));
    wait_for("who came to be known", || dump().contains(&name(&outside)).then_some(()));

    // The next stream asks for the same by itself, and tells what is held.
    control.send(&json!({"hang_up": true}));
    let again = loop {
        let request = control.request("address");
        if request["node"] != "" {
            break request;
        }
    };
    let subscribed = again["subscribe"].as_array().expect("names");
    for name in
        ["*".to_owned(), format!("/{}", server.ip), format!("/{}", outside.ip), "/10.96.0.1".to_owned()]
    {
        assert!(subscribed.contains(&json!(name)), "{name} in {subscribed:?}");
    }
    assert_eq!(again["unsubscribe"], json!(["*"]));
    let held = again["versions"].as_object().expect("versions");
    for (name, is_held) in [(name(&server), true), (WEB.to_owned(), true), (name(&other), false)] {
        assert_eq!(held.contains_key(&name), is_held, "{name} in {held:?}");
    }
}
