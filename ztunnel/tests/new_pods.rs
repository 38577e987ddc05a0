//! The first connections of a pod that the node agent has told and the control plane has not: they
//! go on at once where nothing depends on what only the control plane knows, and wait or are refused
//! where something does.

use std::{
    io::{self, ErrorKind},
    net::{SocketAddr, TcpStream},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use testbed::{
    fakes::FakeControlPlane,
    mesh_pod::{MeshPod, read_line},
    tunnel_mesh::{TunnelMesh, TunnelNode, local},
    wait::wait_for,
};

use crate::control_plane::{base64, name, tunnel_with, workload};

/// Less than a connection waits for its own workload, by far.
const AT_ONCE: Duration = Duration::from_secs(2);

/// A node whose control plane has told of the server, which is a pod of the same node, and not of
/// the client.
struct Rig {
    node: TunnelNode,
    control: FakeControlPlane,
    client: MeshPod,
    server: MeshPod,
    _mesh: TunnelMesh,
}

impl Rig {
    fn new(told: impl FnOnce(&MeshPod, &MeshPod) -> Value) -> Self {
        let mut mesh = TunnelMesh::new();
        let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
        server.serve_double_echo(8080);
        let netns = mesh.netns("a");
        let mut control = FakeControlPlane::start(mesh.dir.path(), &netns, 0);
        control.send(&json!({"hold": "address", "set": told(&client, &server)}));
        let node = tunnel_with(&mesh, netns, control.port, &[&server, &client], &[]);
        node.wait_ready();
        Self { node, control, client, server, _mesh: mesh }
    }

    fn push(&mut self, name: &str, told: &Value) {
        self.control.send(&json!({"push": "address", "set": {name: told}}));
    }

    fn greeted(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let mut stream = self.client.netns.try_connect(to)?;
        read_line(&mut stream).map(|_| stream)
    }

    /// A connection that waits, and goes on when `tell` has told what it waited for.
    fn waits_for(&mut self, to: SocketAddr, tell: impl FnOnce(&mut Self)) {
        let (mut stream, began) = (self.client.netns.connect(to), Instant::now());
        stream.set_read_timeout(Some(Duration::from_millis(700))).expect("timeout");
        let early = read_line(&mut stream).expect_err("nothing was told");
        assert_eq!(early.kind(), ErrorKind::WouldBlock, "after {:?}: {early}", began.elapsed());
        tell(self);
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        read_line(&mut stream).expect("greeting");
    }
}

fn of_node_b(pod: &MeshPod) -> Value {
    let mut sent = workload(pod, "1", 1);
    sent[1]["workload"]["node"] = json!("b");
    sent
}

#[test]
#[ignore = "needs root: make test"]
fn the_first_connection_of_a_pod_does_not_wait_for_the_control_plane_to_tell_of_it() {
    let mut rig = Rig::new(|_, server| json!({name(server): workload(server, "1", 1)}));
    let to = rig.server.at(8080);
    let began = Instant::now();
    let connection = rig.greeted(to).expect("greeting");
    println!("answered after {:?}", began.elapsed());
    assert!(began.elapsed() < AT_ONCE, "answered after {:?}", began.elapsed());
    drop(connection);

    // Nobody has told more of it when it ends: its names are those of the node agent.
    let outbound = "\"direction\":\"outbound\"";
    let own = "spiffe://cluster.local/ns/demo/sa/client";
    let record = &rig.node.records(1, &[outbound])[0];
    for (field, value) in [
        ("src.workload", "client"),
        ("src.namespace", "demo"),
        ("src.identity", own),
        ("src.cluster", "Kubernetes"),
        ("dst.workload", "server"),
        ("dst.identity", "spiffe://cluster.local/ns/demo/sa/server"),
    ] {
        assert_eq!(record[field], value, "{field} of {record}");
    }
    let principal = format!("source_principal=\"{own}\"");
    let untold =
        ["reporter=\"source\"", &principal, "source_workload_namespace=\"demo\"", "source_app=\"unknown\""];
    for counted in ["opened", "closed"] {
        rig.node.wait_metric(&format!("istio_tcp_connections_{counted}_total"), &untold, 1);
    }

    // Told while a connection is open: what is known at its end counts.
    let open = rig.greeted(to).expect("greeting");
    let told = workload(&rig.client, "1", 1);
    rig.push(&name(&rig.client), &told);
    wait_for("the word", || {
        let dump = rig.node.netns.http("GET", local(15000), "/config_dump").expect("dump");
        dump.contains(&name(&rig.client)).then_some(())
    });
    drop(open);
    assert_eq!(rig.node.records(2, &[outbound])[1]["src.workload"], "client");
    let told = ["reporter=\"source\"", &principal, "source_workload=\"client\"", "source_app=\"client\""];
    for counted in ["opened", "closed"] {
        rig.node.wait_metric(&format!("istio_tcp_connections_{counted}_total"), &told, 1);
        rig.node.wait_metric(&format!("istio_tcp_connections_{counted}_total"), &untold, 1);
    }
}

/// Who the pod is needs a trust domain and a network. Only a pod of the same node tells them.
#[test]
#[ignore = "needs root: make test"]
fn without_a_pod_of_the_node_a_new_one_waits_for_its_own_workload() {
    let mut rig = Rig::new(|_, server| json!({name(server): of_node_b(server)}));
    let to = rig.server.at(8080);
    rig.waits_for(to, |rig| {
        let told = workload(&rig.client, "1", 1);
        rig.push(&name(&rig.client), &told);
    });
}

/// Whether the client is the waypoint itself, which passes it by, is known by its workload alone.
#[test]
#[ignore = "needs root: make test"]
fn towards_a_waypoint_that_it_may_be_itself_a_new_pod_waits_for_its_own_workload() {
    const GATE: &str = "demo/gate.demo.svc.cluster.local";
    let mut rig = Rig::new(|_, server| {
        let mut told = workload(server, "1", 1);
        told[1]["workload"]["waypoint"] = json!({"hostname": {"namespace": "demo", "hostname": "gate.demo.svc.cluster.local"}, "hboneMtlsPort": 15008});
        let gate = json!(["1", {"service": {
            "name": "gate", "namespace": "demo", "hostname": "gate.demo.svc.cluster.local",
            "addresses": [{"network": "", "address": base64(&[10, 96, 0, 9])}],
            "ports": [{"servicePort": 15008, "targetPort": 15008}],
        }}]);
        json!({name(server): told, GATE: gate})
    });
    let to = rig.server.at(8080);
    rig.waits_for(to, |rig| {
        let mut told = workload(&rig.client, "1", 1);
        told[1]["workload"]["services"] = json!({GATE: {"ports": []}});
        rig.push(&name(&rig.client), &told);
    });
}

/// What the control plane says of a pod counts more than what the node agent says, also if it says
/// that there is none. And nobody reaches a pod of which it has not told what protects it.
#[test]
#[ignore = "needs root: make test"]
fn a_pod_that_the_control_plane_contradicts_or_has_removed_is_refused() {
    let mut rig = Rig::new(|client, server| {
        let mut other = workload(client, "1", 1);
        other[1]["workload"]["serviceAccount"] = json!("another");
        json!({name(server): workload(server, "1", 1), name(client): other})
    });
    let to = rig.server.at(8080);
    assert_eq!(rig.client.netns.refusal(to), ErrorKind::ConnectionReset);
    rig.node.records(1, &["\"reason\":\"unknown_workload\"", "outbound"]);

    let told = workload(&rig.client, "2", 1);
    rig.push(&name(&rig.client), &told);
    wait_for("the client to be known", || rig.greeted(to).ok());
    rig.control.send(&json!({"push": "address", "remove": [name(&rig.client)]}));
    wait_for("the client to be forgotten", || {
        let dump = rig.node.netns.http("GET", local(15000), "/config_dump").expect("dump");
        (!dump.contains(&name(&rig.client))).then_some(())
    });
    assert_eq!(rig.client.netns.refusal(to), ErrorKind::ConnectionReset);
    rig.node.records(2, &["\"reason\":\"unknown_workload\"", "outbound"]);

    rig.client.serve_double_echo(8080);
    assert_eq!(rig.server.netns.refusal(rig.client.at(8080)), ErrorKind::ConnectionReset);
    rig.node.records(1, &["\"reason\":\"unknown_workload\"", "inbound"]);
}

/// How long the control plane takes to tell of a pod, in the measurement below.
const WORD: Duration = Duration::from_millis(500);

/// Prints how long the first connections of new pods take, one pod at a time and ten at a time, while
/// the control plane tells of each [`WORD`] after the node agent.
#[test]
#[ignore = "needs root: make test"]
fn first_connections_are_answered_before_the_control_plane_tells_of_their_pods() {
    let mut mesh = TunnelMesh::new();
    let (server, outside) = (mesh.enrolled("a", "server"), mesh.plain("a", "outside"));
    let pods: Vec<MeshPod> = (0..40).map(|n| mesh.enrolled("a", &format!("new-{n}"))).collect();
    server.serve_double_echo(8080);
    let netns = mesh.netns("a");
    let mut control = FakeControlPlane::start(mesh.dir.path(), &netns, 0);
    control.send(&json!({"hold": "address", "set": {name(&server): workload(&server, "1", 1)}}));
    let mut node = tunnel_with(&mesh, netns, control.port, &[&server], &[]);
    node.wait_ready();

    let first = |pod: &MeshPod| {
        let began = Instant::now();
        read_line(&mut pod.netns.connect(server.at(8080))).expect("greeting");
        began.elapsed()
    };
    let direct = (0..20).map(|_| first(&outside)).collect();
    let (tell, told) = mpsc::channel::<(Instant, String, Value)>();
    let control_plane = thread::spawn(move || {
        // Nobody hangs up: it is a clock.
        let (_nobody, hung_up) = mpsc::channel::<()>();
        for (due, name, word) in told {
            let _ = hung_up.recv_timeout(due.saturating_duration_since(Instant::now()));
            control.send(&json!({"push": "address", "set": {name: word}}));
        }
    });
    let mut start = |pod: &MeshPod| {
        let word = (Instant::now() + WORD, name(pod), workload(pod, "1", 1));
        assert_eq!(node.agent().add(pod), "");
        tell.send(word).expect("it listens");
    };
    let (lone, crowd) = pods.split_at(20);
    let mut one_by_one = Vec::new();
    for pod in lone {
        start(pod);
        one_by_one.push(first(pod));
    }
    let mut ten_at_a_time = Vec::new();
    for ten in crowd.chunks(10) {
        ten.iter().for_each(&mut start);
        thread::scope(|scope| {
            let all: Vec<_> = ten.iter().map(|pod| scope.spawn(move || first(pod))).collect();
            ten_at_a_time.extend(all.into_iter().map(|one| one.join().expect("no panic")));
        });
    }
    drop(tell);
    control_plane.join().expect("no panic");
    for (what, mut took) in [("direct", direct), ("one by one", one_by_one), ("ten at a time", ten_at_a_time)]
    {
        let took: &mut Vec<Duration> = &mut took;
        took.sort();
        let median = took[took.len() / 2];
        println!("{what}: median {median:?}, longest {:?}", took[took.len() - 1]);
        assert!(median < WORD, "{what}: {took:?}");
    }
}
