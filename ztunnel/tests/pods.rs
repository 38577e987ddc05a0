//! What the node agent sees, and how the process ends.

use std::{
    io::{Read, Write},
    net::Shutdown,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use testbed::{
    mesh_pod::{MeshPod, read_all, read_line},
    program::binary,
    tunnel_mesh::{TunnelMesh, TunnelNode},
    wait::wait_for,
};
use ztunnel_api::zds::{AddWorkload, workload_request::Payload};

/// Whether the tunnel listens in the pod: on all ports or on none. They are opened and closed one
/// after the other, and a look may come in between.
fn is_served(pod: &MeshPod) -> bool {
    wait_for("all ports or none", || {
        let listeners = pod.netns.output("ss", &["-Htln"]);
        let ports = ["15001", "15006", "15008"].map(|port| listeners.matches(&format!(":{port} ")).count());
        ports.iter().all(|&count| count == ports[0]).then_some(ports[0] > 0)
    })
}

#[test]
#[ignore = "needs root: make test"]
fn node_agent_is_answered_as_the_protocol_says() {
    let mut mesh = TunnelMesh::new();
    let (one, two) = (mesh.enrolled("a", "one"), mesh.enrolled("a", "two"));
    let mut node = mesh.node_without_pods("a");
    assert_eq!(node.hello, [8, 1]);
    assert!(!node.is_ready(), "before the snapshot");
    assert_eq!(node.agent().add(&one), "");
    assert!(is_served(&one), "listening when acknowledged");
    assert_eq!(node.agent().add(&one), "", "again");
    assert!(node.agent().add_as("x", "x", &[]).contains("one netns descriptor"));
    assert!(node.agent().add_as("x", "x", &[one.netns.open(), two.netns.open()]).contains("has 2"));
    let nameless = Payload::Add(AddWorkload { uid: "x".into(), workload_info: None });
    assert!(node.agent().request(nameless, &[two.netns.open()]).contains("without workload_info"));
    assert!(node.agent().keep("x").contains("unknown pod"));
    assert!(node.agent().request_raw(&[0xff, 0xff], &[]).contains("not a WorkloadRequest"));
    assert_eq!(node.agent().snapshot(), "");
    node.wait_ready();

    // Another netns under the same uid: there, and no longer here.
    assert_eq!(node.agent().add_as("one", "one", &[two.netns.open()]), "");
    assert!(is_served(&two));
    wait_for("the old netns to be left", || !is_served(&one));
    assert_eq!(node.agent().delete("one"), "");
    wait_for("the pod to be left", || !is_served(&two));
    assert_eq!(node.agent().delete("one"), "", "again");
}

/// The tunnel refuses the message, keeps the session, and closes what came with it.
#[test]
#[ignore = "needs root: make test"]
fn a_message_with_very_many_descriptors_is_refused_and_leaves_none() {
    let mut mesh = TunnelMesh::new();
    let pod = mesh.enrolled("a", "one");
    let mut node = mesh.node_without_pods("a");
    assert_eq!(node.agent().snapshot(), "");
    node.wait_ready();
    let open =
        |node: &TunnelNode| std::fs::read_dir(format!("/proc/{}/fd", node.pid())).expect("fds").count();
    let before = open(&node);
    for count in [9, 253] {
        let many: Vec<_> = (0..count).map(|_| pod.netns.open()).collect();
        let error = node.agent().add_as("x", "x", &many);
        assert!(error.contains(&format!("has {count}")), "{error}");
    }
    wait_for("the descriptors to be closed", || open(&node) <= before);
    assert_eq!(node.agent().add(&pod), "", "the session goes on");
}

#[test]
#[ignore = "needs root: make test"]
fn a_certificate_is_fetched_ahead_and_kept_until_the_last_pod_of_its_account_goes() {
    let mut mesh = TunnelMesh::new();
    let (one, two) = (mesh.enrolled("a", "shared"), mesh.enrolled("a", "two"));
    let mut node = mesh.node("a", &[]);
    let state = |node: &TunnelNode| {
        let answer = node.netns.http("GET", ([127, 0, 0, 1], 15000), "/config_dump").expect("dump");
        let body = answer.split_once("\r\n\r\n").expect("a body").1;
        let dump: serde_json::Value = serde_json::from_str(body).expect("JSON");
        let held = dump["certificates"].as_array().expect("certificates").iter();
        let mut held = held.filter(|held| held["identity"] == "spiffe://cluster.local/ns/demo/sa/shared");
        held.next().map(|held| held["state"].clone())
    };
    assert_eq!(state(&node), None);
    assert_eq!(node.agent().add_as("one", "shared", &[one.netns.open()]), "");
    wait_for("the certificate", || state(&node).is_some_and(|state| state == "Available"));
    assert_eq!(node.agent().add_as("two", "shared", &[two.netns.open()]), "");
    assert_eq!(node.agent().delete("one"), "");
    wait_for("the pod to be left", || !is_served(&one));
    assert_eq!(state(&node), Some("Available".into()), "the other pod needs it");
    assert_eq!(node.agent().delete("two"), "");
    wait_for("it to be forgotten", || state(&node).is_none().then_some(()));
}

#[test]
#[ignore = "needs root: make test"]
fn lost_node_agent_leaves_the_pods_served_and_its_next_snapshot_counts() {
    let mut mesh = TunnelMesh::new();
    let (one, two) = (mesh.enrolled("a", "one"), mesh.enrolled("a", "two"));
    let mut node = mesh.node("a", &[&one, &two]);
    node.agent().hang_up();
    wait_for("not ready", || !node.is_ready());
    assert!(is_served(&one) && is_served(&two));
    assert_eq!(node.agent().accept(), [8, 1]);
    assert_eq!(node.agent().keep("one"), "");
    assert!(is_served(&two), "until the snapshot");
    assert_eq!(node.agent().snapshot(), "");
    wait_for("the pod that was not named to be left", || !is_served(&two));
    assert!(is_served(&one));
    node.wait_ready();
}

#[test]
#[ignore = "needs root: make test"]
fn pod_whose_port_is_taken_is_refused_and_tried_again() {
    let mut mesh = TunnelMesh::new();
    let pod = mesh.enrolled("a", "pod");
    let mut node = mesh.node_without_pods("a");
    assert_eq!(node.agent().snapshot(), "");
    for port in [15001, 15006, 15008] {
        let squatter = pod.netns.enter(|| std::net::TcpListener::bind(("0.0.0.0", port))).expect("bind");
        assert!(node.agent().add(&pod).contains("in use"));
        assert!(!node.is_ready(), "while a pod is pending");
        drop(squatter);
        wait_for("the pod to be served", || is_served(&pod).then_some(()));
        node.wait_ready();
        assert_eq!(node.agent().delete("pod"), "");
        wait_for("the pod to be left", || !is_served(&pod));
    }
}

#[test]
#[ignore = "needs root: make test"]
fn open_connection_outlives_the_stop_until_it_ends() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    server.serve_double_echo(8080);
    let mut node = mesh.node("a", &[&client, &server]);
    let mut stream = client.netns.connect(server.at(8080));
    read_line(&mut stream).expect("greeting");
    node.signal(Signal::SIGTERM);
    wait_for("the listeners to close", || !is_served(&client) && !is_served(&server));
    assert!(node.is_running());
    stream.write_all(b"still here").expect("write");
    stream.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(read_all(&mut stream).expect("echo"), b"still herestill here");
    let end = Instant::now();
    assert!(node.wait_exit().success());
    assert!(end.elapsed() < Duration::from_secs(1), "ended {:?} after the last connection", end.elapsed());
}

#[test]
#[ignore = "needs root: make test"]
fn a_removed_pod_carries_nothing_more() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("b", "server"));
    server.serve_double_echo(8080);
    let (_a, mut b) = (mesh.node("a", &[&client]), mesh.node("b", &[&server]));
    let mut long = client.netns.connect(server.at(8080));
    read_line(&mut long).expect("greeting");
    assert_eq!(b.agent().delete("server"), "");
    wait_for("the pod to be left", || !is_served(&server));
    // Taken out of the mesh it still has its connections; a new one is taken by the client's
    // tunnel, and fails there.
    long.write_all(b"still here").expect("write");
    long.read_exact(&mut [0; 20]).expect("echo");
    assert_eq!(client.netns.refusal(server.at(8080)), std::io::ErrorKind::ConnectionReset);
    // Deleted it has not even an address.
    server.netns.run("ip link del eth0");
    let _ = long.write_all(b"anybody");
    let error = long.read_exact(&mut [0]).expect_err("nobody is there");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "noticed, and not by the test's own limit");
}

/// Out of the mesh at either end, but not deleted: what was open stays open, drain deadline or not.
#[test]
#[ignore = "needs root: make test"]
fn connections_of_pods_that_left_stay_open() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("b", "server"));
    server.serve_double_echo(8080);
    let short = [("CONNECTION_TERMINATION_DEADLINE", "100ms")];
    let (mut a, mut b) = (mesh.node_with("a", &[&client], &short), mesh.node_with("b", &[&server], &short));
    let mut stream = client.netns.connect(server.at(8080));
    read_line(&mut stream).expect("greeting");
    assert_eq!((a.agent().delete("client"), b.agent().delete("server")), (String::new(), String::new()));
    wait_for("both to be left", || !is_served(&client) && !is_served(&server));
    let left = Instant::now();
    while left.elapsed() < Duration::from_secs(1) {
        stream.write_all(b"still here").expect("write");
        stream.read_exact(&mut [0; 20]).expect("echo");
    }
    stream.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(stream.read(&mut [0]).expect("the end"), 0);
}

#[test]
#[ignore = "needs root: make test"]
fn drain_deadline_cuts_with_a_reset() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    server.serve_double_echo(8080);
    let mut node = mesh.node("a", &[&client, &server]);
    let mut stream = client.netns.connect(server.at(8080));
    read_line(&mut stream).expect("greeting");
    let begin = Instant::now();
    node.signal(Signal::SIGTERM);
    assert!(
        stream.read_exact(&mut [0]).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
    );
    assert!(begin.elapsed() >= Duration::from_secs(4), "cut after {:?}", begin.elapsed());
    assert!(node.wait_exit().success());
    assert!(begin.elapsed() < Duration::from_secs(9), "ended after {:?}", begin.elapsed());
}

#[test]
#[ignore = "needs root: make test"]
fn killed_tunnel_resets_and_does_not_end_connections() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("b", "server"));
    server.serve_double_echo(8080);
    let (_a, b) = (mesh.node("a", &[&client]), mesh.node("b", &[&server]));
    let mut stream = client.netns.connect(server.at(8080));
    read_line(&mut stream).expect("greeting");
    b.signal(Signal::SIGKILL);
    assert!(read_all(&mut stream).is_err(), "a truncated transfer must not look complete");
}

#[test]
#[ignore = "needs root: make test"]
fn quitquitquit_ends_an_idle_tunnel_at_once() {
    let mesh = TunnelMesh::new();
    let mut node = mesh.node("a", &[]);
    let answer = node.netns.http("POST", ([127, 0, 0, 1], 15000), "/quitquitquit").expect("answer");
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    let begin = Instant::now();
    assert!(node.wait_exit().success());
    assert!(begin.elapsed() < Duration::from_secs(2));
}

#[test]
#[ignore = "needs root: make test"]
fn successor_takes_over_without_a_lost_connection() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    server.serve_double_echo(8080);
    let mut old = mesh.node("a", &[&client, &server]);
    let mut long = client.netns.connect(server.at(8080));
    read_line(&mut long).expect("greeting");
    let _new = mesh.node("a", &[&client, &server]);
    old.signal(Signal::SIGTERM);
    for round in 0..100 {
        let mut stream = client.netns.connect(server.at(8080));
        read_line(&mut stream).unwrap_or_else(|error| panic!("connection {round}: {error}"));
    }
    long.write_all(b"old").expect("write");
    long.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(read_all(&mut long).expect("echo"), b"oldold");
    assert!(old.wait_exit().success());
}

#[test]
#[ignore = "needs root: make test"]
fn a_dedicated_tunnel_does_not_start_without_its_ports() {
    let mut mesh = TunnelMesh::new();
    let pod = mesh.enrolled("a", "pod");
    for port in [15001, 15006, 15008] {
        let taken = pod.netns.enter(|| std::net::TcpListener::bind(("0.0.0.0", port))).expect("bind");
        let mut tunnel = TunnelNode::dedicated(&mesh, &pod);
        assert!(!tunnel.wait_exit().success());
        let log = tunnel.log();
        assert!(log.contains("in use") && log.contains(&port.to_string()), "{port}: {log}");
        drop(taken);
    }
}

#[test]
#[ignore = "needs root: make test"]
fn address_in_use_is_a_reason_not_to_start() {
    let mesh = TunnelMesh::new();
    for (port, purpose) in [(15000, "admin"), (15020, "metrics"), (15021, "readiness")] {
        let taken = mesh.router.enter(|| std::net::TcpListener::bind(("0.0.0.0", port))).expect("bind");
        let output = std::process::Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", mesh.router))
            .arg(binary("ztunnel"))
            .env("LOCAL_XDS_PATH", mesh.mesh_file())
            .env("DEVELOPMENT_CA_DIR", mesh.ca_dir())
            .output()
            .expect("start");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(purpose) && error.contains("in use"), "{error}");
        drop(taken);
    }
}
