//! In the place of Istio's tunnel: its environment, its names, several clusters in one mesh. Against
//! the foreign control plane, which signs the certificates too.

use std::fs;

use serde_json::{Value, json};
use testbed::{
    fakes::FakeControlPlane,
    mesh_pod::{MeshPod, read_line},
    tunnel_mesh::{TunnelMesh, TunnelNode},
    wait::wait_for,
};

use crate::control_plane::{base64, name, tunnel_with, workload};

/// The workload, changed by `fields`.
fn with(pod: &MeshPod, fields: &Value) -> Value {
    let mut told = workload(pod, "1", 1);
    let Some(workload) = told[1]["workload"].as_object_mut() else { panic!("{told}") };
    for (key, value) in fields.as_object().expect("fields") {
        workload.insert(key.clone(), value.clone());
    }
    told
}

/// Pods, agent and control plane of a cluster whose trust domain is not the default.
fn example_org(mesh: &mut TunnelMesh) -> (MeshPod, MeshPod, Value) {
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    server.serve_double_echo(8080);
    let fields = json!({"trustDomain": "example.org", "clusterId": "east"});
    let told = json!({"hold": "address",
        "set": {name(&client): with(&client, &fields), name(&server): with(&server, &fields)}});
    (client, server, told)
}

fn carries(node: &TunnelNode, client: &MeshPod, server: &MeshPod) {
    read_line(&mut client.netns.connect(server.at(8080))).expect("greeting");
    let record = &node.records(1, &["\"direction\":\"inbound\"", "spiffe://"])[0];
    for (end, account) in [("src", "client"), ("dst", "server")] {
        assert_eq!(record[format!("{end}.identity")], format!("spiffe://example.org/ns/demo/sa/{account}"));
        assert_eq!(record[format!("{end}.cluster")], "east");
    }
}

/// As the chart of Istio's tunnel writes it; the addresses are those that it gives the loopback.
#[test]
#[ignore = "needs root: make test"]
fn the_environment_and_the_arguments_of_istios_daemonset_start_the_tunnel() {
    let mut mesh = TunnelMesh::new();
    let (client, server, told) = example_org(&mut mesh);
    let netns = mesh.netns("a");
    let mut control = FakeControlPlane::start(mesh.dir.path(), &netns, 15012);
    control.send(&told);
    let folder = mesh.dir.path().join("container");
    let secrets = folder.join("var/run/secrets");
    for part in ["istio", "tokens"] {
        fs::create_dir_all(secrets.join(part)).expect("folder");
    }
    fs::copy(mesh.dir.path().join("xds-root.pem"), secrets.join("istio/root-cert.pem")).expect("root");
    fs::write(secrets.join("tokens/istio-token"), "a.b.c\n").expect("token");
    let environment = [
        ("CA_ADDRESS", "istiod.istio-system.svc:15012"),
        ("XDS_ADDRESS", "istiod.istio-system.svc:15012"),
        ("RUST_LOG", "info"),
        ("LOG_FORMAT", "json"),
        ("NETWORK", ""),
        ("ISTIO_META_CLUSTER_ID", "east"),
        ("ISTIO_META_ENABLE_HBONE", "true"),
        ("ISTIO_META_DNS_PROXY_ADDR", "127.0.0.1:15053"),
        ("INPOD_ENABLED", "true"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ("POD_NAME", "ztunnel-x7x2q"),
        ("POD_NAMESPACE", "istio-system"),
        ("NODE_NAME", "a"),
        ("INSTANCE_IP", "192.0.2.7"),
        ("SERVICE_ACCOUNT", "ztunnel"),
        ("ZTUNNEL_CPU_LIMIT", "2"),
        ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
        ("KUBERNETES_SERVICE_PORT", "443"),
    ];
    let hosts = "127.0.0.1 localhost istiod.istio-system.svc\n";
    let mut node = TunnelNode::daemonset(&mesh, netns, &folder, hosts, &environment);
    for pod in [&client, &server] {
        assert_eq!(node.agent().add(pod), "");
    }
    assert_eq!(node.agent().snapshot(), "");
    node.wait_ready();

    let call = control.receive("stream")["stream"].clone();
    assert_eq!((&call["authorization"], &call["clusterid"]), (&json!("Bearer a.b.c"), &json!("east")));
    let request = control.request("address");
    assert_eq!(
        request["node"],
        "ztunnel~192.0.2.7~ztunnel-x7x2q.istio-system~istio-system.svc.cluster.local"
    );
    for (key, value) in [("CLUSTER_ID", "east"), ("ENABLE_HBONE", "true"), ("NODE_NAME", "a")] {
        assert_eq!(request["metadata"][key], value, "{key}");
    }
    let signed = [control.receive("signed"), control.receive("signed")];
    for one in &signed {
        assert!(
            one["signed"].as_str().is_some_and(|id| id.starts_with("spiffe://example.org/ns/demo/")),
            "{one}"
        );
        assert_eq!(one["with"]["clusterid"], "east");
    }
    carries(&node, &client, &server);
}

#[test]
#[ignore = "needs root: make test"]
fn a_control_plane_at_a_socket_that_asks_for_no_token_serves_the_tunnel() {
    let mut mesh = TunnelMesh::new();
    let (client, server, told) = example_org(&mut mesh);
    let netns = mesh.netns("a");
    let socket = mesh.dir.path().join("istiod.sock");
    let mut control = FakeControlPlane::start_at_socket(mesh.dir.path(), &netns, &socket);
    control.send(&told);
    let address = format!("unix:{}", socket.display());
    let missing = mesh.dir.path().join("no-such-token").display().to_string();
    let more = [
        ("XDS_ADDRESS", &*address),
        ("CA_ADDRESS", &address),
        ("DEVELOPMENT_CA_DIR", ""),
        ("XDS_ROOT_CA", ""),
        ("AUTH_TOKEN", &missing),
        ("CLUSTER_ID", "east"),
    ];
    let node = tunnel_with(&mesh, netns, 0, &[&client, &server], &more);
    node.wait_ready();
    let call = control.receive("stream")["stream"].clone();
    assert_eq!(call.get("authorization"), None, "{call}");
    carries(&node, &client, &server);
    let said = node.log().lines().filter(|line| line.contains("no file with a token")).count();
    assert_eq!(said, 2, "once for each of the two services\n{}", node.log());
}

/// Pods of a StatefulSet that every cluster has, with one policy that is the own cluster's alone.
#[test]
#[ignore = "needs root: make test"]
fn a_pod_is_not_taken_for_its_namesake_of_another_cluster() {
    let mut mesh = TunnelMesh::new();
    let (client, denied, open) =
        (mesh.enrolled("a", "client"), mesh.enrolled("a", "denied"), mesh.enrolled("a", "open"));
    let netns = mesh.netns("a");
    let mut control = FakeControlPlane::start(mesh.dir.path(), &netns, 0);
    let mut set = serde_json::Map::new();
    set.insert(name(&client), with(&client, &json!({})));
    for (pod, ours, theirs) in
        [(&denied, json!(["demo/deny"]), json!([])), (&open, json!([]), json!(["demo/deny"]))]
    {
        pod.serve_double_echo(8080);
        set.insert(name(pod), with(pod, &json!({"authorizationPolicies": ours})));
        for cluster in 0..6u8 {
            // Before the own cluster by name, and so in the tables of who takes the first one.
            let uid = format!("A{cluster}//Pod/demo/{}", pod.name);
            let fields = json!({"uid": uid, "clusterId": format!("A{cluster}"), "authorizationPolicies": theirs,
                "addresses": [base64(&[10, 99, cluster, pod.ip.octets()[3]])]});
            set.insert(uid, with(pod, &fields));
        }
    }
    control.send(&json!({"hold": "address", "set": set}));
    let deny = json!({"demo/deny": ["1", {"name": "deny", "namespace": "demo", "scope": 2, "action": 1,
        "rules": [{"clauses": [{"matches": [{"principals": [{"exact": "cluster.local/ns/demo/sa/client"}]}]}]}]}]});
    control.send(&json!({"hold": "authorization", "set": deny}));
    let node = tunnel_with(&mesh, netns, control.port, &[&client, &denied, &open], &[]);
    node.wait_ready();
    read_line(&mut client.netns.connect(open.at(8080))).expect("a policy of somebody else does not apply");
    wait_for("the own policy to apply", || {
        let refused = client.netns.try_connect(denied.at(8080)).and_then(|mut stream| read_line(&mut stream));
        refused.is_err().then_some(())
    });
    node.records(1, &["explicitly denied by: demo/deny"]);

    // Known by the other clusters only: unknown.
    control.send(&json!({"push": "address", "remove": [name(&open)]}));
    wait_for("the pod to be unknown", || {
        let refused = client.netns.try_connect(open.at(8080)).and_then(|mut stream| read_line(&mut stream));
        refused.is_err().then_some(())
    });
}
