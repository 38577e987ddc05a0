//! Two tunnels of one node: which of them has the pods.

use std::{fs, path::PathBuf};

use nix::sys::signal::Signal;
use testbed::{
    fakes::FakeCa,
    mesh_pod::{MeshPod, read_line},
    tunnel_mesh::{TunnelMesh, TunnelNode},
    wait::wait_for,
};

const AWAITS: &str = "another tunnel serves the pod until this one can";
const NOT_TOLD: &str = "the control plane has not told of the pod yet";

/// A tunnel that is offered the pods, and whose certificate service cannot be reached. It is where a
/// [`FakeCa`] in its netns would be.
fn without_certificates(mesh: &TunnelMesh, pods: &[&MeshPod]) -> TunnelNode {
    let (netns, folder) = (mesh.netns("a"), mesh.dir.path().join("service"));
    drop(FakeCa::start(&folder, &[&netns]));
    let env = FakeCa::env(&folder);
    let mut env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
    env.push(("DEVELOPMENT_CA_DIR", ""));
    let mut tunnel = TunnelNode::start_with(mesh, "a", netns, &env);
    for pod in pods {
        assert_eq!(tunnel.agent().add(pod), "");
    }
    assert_eq!(tunnel.agent().snapshot(), "");
    tunnel
}

fn assert_carried(client: &MeshPod, server: &MeshPod, when: &str) {
    for round in 0..50 {
        let mut stream = client.netns.connect(server.at(8080));
        read_line(&mut stream).unwrap_or_else(|error| panic!("{when}, connection {round}: {error}"));
    }
}

/// As in a rollout of tunnels with a token that the certificate service refuses.
#[test]
#[ignore = "needs root: make test"]
fn a_tunnel_without_certificates_leaves_the_pods_to_the_one_that_has_them() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    server.serve_double_echo(8080);
    let mut old = mesh.node("a", &[&client, &server]);
    let new = without_certificates(&mesh, &[&client, &server]);
    assert_carried(&client, &server, "the successor has no certificates");
    wait_for("it to say so", || (new.log().matches(AWAITS).count() == 2).then_some(()));
    assert!(!new.is_ready(), "a rollout would go on");

    let service = FakeCa::start(&mesh.dir.path().join("service"), &[&new.netns]);
    new.wait_ready();
    old.signal(Signal::SIGTERM);
    assert!(old.wait_exit().success());
    assert_carried(&client, &server, "the successor has certificates");
    drop(service);
}

#[test]
#[ignore = "needs root: make test"]
fn pods_that_nobody_else_serves_wait_for_no_certificate() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    let plain = mesh.plain("a", "plain");
    plain.serve_double_echo(8080);
    server.serve_double_echo(8080);
    let old = mesh.node("a", &[&client]);
    let new = without_certificates(&mesh, &[&client, &server]);
    let times_added = |pod: &MeshPod| {
        let added = |line: &&str| line.contains("pod added") && line.contains(&format!("\"{}\"", pod.name));
        new.log().lines().filter(added).count()
    };
    wait_for("the pod without another tunnel", || (times_added(&server) == 1).then_some(()));
    assert_eq!(times_added(&client), 0, "the predecessor has it");
    old.signal(Signal::SIGKILL);
    new.wait_ready();
    wait_for("the log to say so", || (times_added(&client) == 1).then_some(()));
    // What needs no certificate is carried.
    assert_carried(&client, &plain, "out of the mesh");
}

/// A tunnel of the pods whose mesh file lacks what `of` takes out of it, and that file.
fn that_knows_less(mesh: &TunnelMesh, pods: &[&MeshPod], of: &MeshPod) -> (TunnelNode, PathBuf) {
    let whole = fs::read_to_string(mesh.mesh_file()).expect("mesh file");
    let file = mesh.dir.path().join("less.yaml");
    let less = whole.replace(&format!("name: {}\n", of.name), "name: somebody-else\n");
    assert_ne!(less, whole);
    fs::write(&file, less).expect("mesh file");
    let path = file.display().to_string();
    let mut tunnel = TunnelNode::start_with(mesh, "a", mesh.netns("a"), &[("LOCAL_XDS_PATH", &path)]);
    for pod in pods {
        assert_eq!(tunnel.agent().add(pod), "");
    }
    assert_eq!(tunnel.agent().snapshot(), "");
    (tunnel, file)
}

#[test]
#[ignore = "needs root: make test"]
fn a_tunnel_that_was_not_told_of_a_pod_leaves_it_to_the_one_that_was() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    server.serve_double_echo(8080);
    let mut old = mesh.node("a", &[&client, &server]);
    let (new, file) = that_knows_less(&mesh, &[&client, &server], &server);
    wait_for("it to say so", || new.log().contains(NOT_TOLD).then_some(()));
    assert_carried(&client, &server, "the successor does not know the server");
    assert!(!new.is_ready(), "a rollout would go on");

    fs::copy(mesh.mesh_file(), &file).expect("mesh file");
    new.wait_ready();
    old.signal(Signal::SIGTERM);
    assert!(old.wait_exit().success());
    assert_carried(&client, &server, "the successor knows the server");
}

/// The control plane may never tell of a pod; then no tunnel is better than another.
#[test]
#[ignore = "needs root: make test"]
fn a_rollout_does_not_stop_at_a_pod_of_which_nothing_is_told() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    let _old = mesh.node("a", &[&client, &server]);
    let (new, _file) = that_knows_less(&mesh, &[&client, &server], &server);
    wait_for("it to wait", || new.log().contains(NOT_TOLD).then_some(()));
    new.wait_ready();
}
