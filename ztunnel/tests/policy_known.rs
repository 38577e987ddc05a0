//! What passes while the control plane has not told all policies, or tells some that the tunnel does
//! not understand: never more than with them.

use std::{io::ErrorKind, time::Duration};

use serde_json::{Value, json};
use testbed::{
    fakes::FakeControlPlane,
    mesh_pod::{MeshPod, read_line},
    netns::TestNetns,
    tunnel_mesh::{TunnelMesh, local},
    wait::{try_wait, wait_for},
};

use crate::control_plane::{base64, name, serve, tunnel, unheard, workload};

/// A workload that names `policies`.
fn naming(pod: &MeshPod, version: &str, policies: &[&str]) -> Value {
    let mut sent = workload(pod, version, 1);
    sent[1]["workload"]["authorizationPolicies"] = json!(policies);
    sent
}

/// A policy of namespace `demo` that decides about everybody.
fn policy(name: &str, scope: u32, action: u32) -> Value {
    json!({"name": name, "namespace": "demo", "scope": scope, "action": action, "rules": [{}]})
}

const GLOBAL: u32 = 0;
const SELECTED: u32 = 2;
const ALLOW: u32 = 0;
const DENY: u32 = 1;

fn passes(client: &MeshPod, server: &MeshPod) -> bool {
    (client.netns.try_connect(server.at(8080)).and_then(|mut stream| read_line(&mut stream))).is_ok()
}

/// Two pods of one node, and its control plane.
struct Node {
    mesh: TunnelMesh,
    client: MeshPod,
    server: MeshPod,
    control: FakeControlPlane,
    netns: TestNetns,
}

impl Node {
    fn new() -> Self {
        let mut mesh = TunnelMesh::new();
        let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
        server.serve_double_echo(8080);
        let netns = mesh.netns("a");
        let control = FakeControlPlane::start(mesh.dir.path(), &netns, 0);
        Self { mesh, client, server, control, netns }
    }
}

/// The order in which Istio's control plane answers: addresses first. Whoever waited for them must
/// not pass before the policies are there.
#[test]
#[ignore = "needs root: make test"]
fn nothing_passes_before_every_type_was_answered_once() {
    let Node { mesh, client, server, mut control, netns } = Node::new();
    let pods = json!({name(&client): workload(&client, "1", 1), name(&server): workload(&server, "1", 1)});
    control.send(&json!({"hold": "address", "set": pods}));
    control
        .send(&json!({"hold": "authorization", "set": {"demo/deny": ["1", policy("deny", GLOBAL, DENY)]}}));
    control.send(&json!({"hold_back": "authorization"}));
    let mut node = unheard(&mesh, netns, control.port, &[]);
    // Its acknowledgement: the tunnel has taken the addresses.
    while control.request("address")["nonce"] == "" {}
    if node.agent().try_accept(Duration::from_secs(2)).is_some() {
        serve(&mut node, &[&client, &server]);
        let passed = try_wait(Duration::from_secs(2), || passes(&client, &server)).is_some();
        panic!("the tunnel serves pods without policies; a connection passed: {passed}");
    }
    let waits = node.readiness().expect("an answer");
    assert!(waits.contains("state manager"), "{waits}");

    control.send(&json!({"let_go": "authorization"}));
    node.agent().accept();
    serve(&mut node, &[&client, &server]);
    node.wait_ready();
    assert_eq!(client.netns.refusal(server.at(8080)), ErrorKind::ConnectionReset);
    node.records(1, &["explicitly denied by: demo/deny"]);
    control.send(&json!({"push": "authorization", "remove": ["demo/deny"]}));
    wait_for("the policy to go", || passes(&client, &server));
}

/// A workload names its policies, and may be told before them.
#[test]
#[ignore = "needs root: make test"]
fn a_named_policy_that_was_never_heard_of_is_waited_for_and_refuses_and_a_removed_one_is_none() {
    let Node { mesh, client, server, mut control, netns } = Node::new();
    let pods = json!({
        name(&client): workload(&client, "1", 1), name(&server): naming(&server, "1", &["demo/late"]),
    });
    control.send(&json!({"hold": "address", "set": pods}));
    let node = tunnel(&mesh, netns, control.port, &[&client, &server]);
    node.wait_ready();
    assert_eq!(client.netns.refusal(server.at(8080)), ErrorKind::ConnectionReset);
    node.records(1, &["\"reason\":\"unknown_policy\"", "demo/late"]);
    // Who comes before the policy waits for it.
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| passes(&client, &server));
        wait_for("a connection to wait", || node.log().matches("waiting for policies").count() >= 2);
        let late = json!({"demo/late": ["1", policy("late", SELECTED, ALLOW)]});
        control.send(&json!({"push": "authorization", "set": late}));
        assert!(waiting.join().expect("no panic"), "it waits, and is allowed");
    });
    // Removed, and named still: there is no such policy, and the tunnel was told so.
    control.send(&json!({"push": "authorization", "remove": ["demo/late"]}));
    wait_for("the removal", || {
        let dump = node.netns.http("GET", local(15000), "/config_dump").expect("dump");
        let (_, body) = dump.split_once("\r\n\r\n").expect("HTTP");
        serde_json::from_str::<Value>(body).expect("JSON")["policies"] == json!([])
    });
    assert!(passes(&client, &server));

    // An open connection is cut when its pod names another one that never comes.
    let mut open = client.netns.connect(server.at(8080));
    read_line(&mut open).expect("greeting");
    let other = naming(&server, "2", &["demo/other"]);
    control.send(&json!({"push": "address", "set": {name(&server): other}}));
    assert!(read_line(&mut open).is_err(), "cut");
    node.records(1, &["\"reason\":\"policy_change\""]);
}

/// What a refused policy said is not known, except that it was there.
#[test]
#[ignore = "needs root: make test"]
fn a_policy_that_is_not_understood_is_stricter_than_meant_and_never_laxer() {
    let Node { mesh, client, server, mut control, netns } = Node::new();
    let pods = json!({name(&client): workload(&client, "1", 1), name(&server): workload(&server, "1", 1)});
    control.send(&json!({"hold": "address", "set": pods}));
    let node = tunnel(&mesh, netns, control.port, &[&client, &server]);
    node.wait_ready();
    assert!(passes(&client, &server));

    let only_extensions = json!({"clauses": [{"matches": [{"extensions": [{"name": "new"}]}]}]});
    let with = |action: u32, key: &str, value: Value| {
        let mut sent = policy("new", GLOBAL, action);
        sent[key] = value;
        sent
    };
    let no_port = json!([{"clauses": [{"matches": [{"destinationPorts": [65_536]}]}]}]);
    let refused: [(&str, Value); 7] = [
        ("a port that is none", with(DENY, "rules", no_port)),
        ("an unknown action", policy("new", GLOBAL, 7)),
        ("an unknown scope", policy("new", 9, DENY)),
        ("extensions of the policy", with(DENY, "extensions", json!([{"name": "new"}]))),
        ("extensions of a match", with(DENY, "rules", json!([only_extensions]))),
        ("extensions of a match that allows", with(ALLOW, "rules", json!([only_extensions]))),
        ("no protobuf", json!({"raw": base64(b"\x0a\xff\xff")})),
    ];
    let gauge = || {
        let labels = ["url=\"type.googleapis.com/istio.security.Authorization\""];
        node.metric("ztunnel_xds_refused_resources", &labels).unwrap_or(0)
    };
    for (what, sent) in refused {
        control.send(&json!({"push": "authorization", "set": {"demo/new": ["1", sent]}}));
        let error = loop {
            let request = control.request("authorization");
            if let Some(error) = request["error"].as_str().filter(|error| !error.is_empty()) {
                break error.to_owned();
            }
        };
        assert!(error.starts_with("demo/new: "), "{what}: {error}");
        assert!(!passes(&client, &server), "{what}: a connection passed");
        // What is scraped may be a moment old.
        wait_for("the gauge to show it", || gauge() == 1);
        assert!(node.is_ready(), "{what}");
        control.send(&json!({"push": "authorization", "remove": ["demo/new"]}));
        wait_for("the policy to go", || passes(&client, &server));
        wait_for("the gauge to forget it", || gauge() == 0);
    }

    // It goes also if it is removed while nobody is told.
    let mut refused = policy("new", GLOBAL, DENY);
    refused["extensions"] = json!([{"name": "new"}]);
    control.send(&json!({"push": "authorization", "set": {"demo/new": ["1", refused]}}));
    wait_for("the policy to hold", || !passes(&client, &server));
    control.send(&json!({"hold": "authorization", "remove": ["demo/new"]}));
    control.send(&json!({"hang_up": true}));
    wait_for("the policy to go", || passes(&client, &server));

    // A version that is understood takes its place, and stays when the next one is not.
    control.send(&json!({"push": "authorization", "set": {"demo/new": ["1", policy("new", GLOBAL, 7)]}}));
    wait_for("the policy to hold", || !passes(&client, &server));
    control.send(&json!({"push": "authorization", "set": {"demo/new": ["2", policy("new", GLOBAL, ALLOW)]}}));
    wait_for("the policy to allow", || passes(&client, &server));
    control.send(&json!({"push": "authorization", "set": {"demo/new": ["3", policy("new", GLOBAL, 7)]}}));
    wait_for("the refusal", || gauge() == 1);
    assert!(passes(&client, &server));
}
