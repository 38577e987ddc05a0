//! What applications see of the mesh.

use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
};

use testbed::{
    mesh_pod::{MeshPod, read_all, read_line},
    tunnel_mesh::{TunnelMesh, TunnelNode},
    wait::{LIMIT, wait_for},
};
/// One exchange of 11 bytes against 22, and the client's address as the server sees it.
fn exchange(client: &MeshPod, server: &MeshPod) -> String {
    let mut stream = client.netns.connect(server.at(8080));
    let seen = read_line(&mut stream).expect("greeting");
    stream.write_all(b"hello tunne").expect("write");
    stream.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(read_all(&mut stream).expect("answer"), b"hello tunnehello tunne");
    seen
}

fn assert_meshed(source: &TunnelNode, destination: &TunnelNode, greeting: u64) {
    let outbound = &source.records(1, &["\"direction\":\"outbound\""])[0];
    let inbound = &destination.records(1, &["\"direction\":\"inbound\""])[0];
    for record in [outbound, inbound] {
        assert_eq!(record["src.identity"], "spiffe://cluster.local/ns/demo/sa/client", "{record}");
        assert_eq!(record["dst.identity"], "spiffe://cluster.local/ns/demo/sa/server", "{record}");
        assert_eq!(
            (&record["bytes_sent"], &record["bytes_recv"]),
            (&11.into(), &(22 + greeting).into()),
            "{record}"
        );
        assert!(record.get("error").is_none_or(serde_json::Value::is_null), "{record}");
    }
    for (tunnel, reporter) in [(source, "reporter=\"source\""), (destination, "reporter=\"destination\"")] {
        let labels = [reporter, "connection_security_policy=\"mutual_tls\""];
        for (name, value) in [
            ("istio_tcp_connections_opened_total", 1),
            ("istio_tcp_connections_closed_total", 1),
            ("istio_tcp_received_bytes_total", 11),
            ("istio_tcp_sent_bytes_total", 22 + greeting),
        ] {
            tunnel.wait_metric(name, &labels, value);
        }
    }
}

#[test]
#[ignore = "needs root: make test"]
fn captured_client_reaches_captured_server_of_its_node() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    server.serve_double_echo(8080);
    let node = mesh.node("a", &[&client, &server]);
    let seen = exchange(&client, &server);
    assert_eq!(seen, client.ip.to_string(), "the application sees the client's address");
    assert_meshed(&node, &node, seen.len() as u64 + 1);
}

#[test]
#[ignore = "needs root: make test"]
fn captured_client_reaches_captured_server_of_another_node_over_hbone() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("b", "server"));
    server.serve_double_echo(8080);
    let (a, b) = (mesh.node("a", &[&client]), mesh.node("b", &[&server]));
    let seen = exchange(&client, &server);
    assert_eq!(seen, client.ip.to_string(), "the application sees the client's address");
    assert_meshed(&a, &b, seen.len() as u64 + 1);
}

#[test]
#[ignore = "needs root: make test"]
fn dedicated_tunnels_serve_one_workload_each() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("b", "server"));
    server.serve_double_echo(8080);
    let (a, b) = (TunnelNode::dedicated(&mesh, &client), TunnelNode::dedicated(&mesh, &server));
    a.wait_ready();
    b.wait_ready();
    assert!(!a.log().contains("certificate fetched"), "nothing is fetched ahead");
    let seen = exchange(&client, &server);
    assert_eq!(seen, client.ip.to_string(), "the application sees the client's address");
    assert_meshed(&a, &b, seen.len() as u64 + 1);
}

#[test]
#[ignore = "needs root: make test"]
fn captured_client_reaches_plain_server_as_plain_tcp() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.plain("a", "server"));
    server.serve_double_echo(8080);
    let node = mesh.node("a", &[&client]);
    assert_eq!(exchange(&client, &server), client.ip.to_string());
    let record = &node.records(1, &["\"direction\":\"outbound\""])[0];
    assert!(record.get("src.identity").is_none(), "{record}");
    assert_eq!(record["dst.workload"], "server");
    let labels = ["reporter=\"source\"", "connection_security_policy=\"unknown\""];
    node.wait_metric("istio_tcp_connections_closed_total", &labels, 1);
}

#[test]
#[ignore = "needs root: make test"]
fn plain_client_reaches_captured_server_through_15006() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.plain("a", "client"), mesh.enrolled("a", "server"));
    server.serve_double_echo(8080);
    let node = mesh.node("a", &[&server]);
    assert_eq!(exchange(&client, &server), client.ip.to_string());
    let record = &node.records(1, &["\"direction\":\"inbound\""])[0];
    assert!(record.get("src.identity").is_none(), "{record}");
    assert_eq!(record["dst.addr"], server.at(8080).to_string());
}

/// Our watcher gives the tunnel's mark another meaning than Istio's CNI does; no socket that talks
/// to the outside may bear it then.
#[test]
#[ignore = "needs root: make test"]
fn pods_that_our_watcher_prepared_are_served_too() {
    let mut mesh = TunnelMesh::new();
    let (plain, client, server) = (
        mesh.plain("a", "plain"),
        mesh.prepared_by_watcher("a", "client"),
        mesh.prepared_by_watcher("b", "server"),
    );
    server.serve_double_echo(8080);
    let (_a, b) = (mesh.node("a", &[&client]), mesh.node("b", &[&server]));
    assert_eq!(exchange(&plain, &server), plain.ip.to_string());
    assert_eq!(exchange(&client, &server), client.ip.to_string());
    b.records(1, &["\"direction\":\"inbound\"", "\"dst.hbone_addr\"", "sa/client"]);
}

#[test]
#[ignore = "needs root: make test"]
fn everything_holds_for_ipv6() {
    let mut mesh = TunnelMesh::new();
    let (plain, client, server) =
        (mesh.plain("a", "plain"), mesh.enrolled("a", "client"), mesh.enrolled("b", "server"));
    server.serve_double_echo(8080);
    let (_a, b) = (mesh.node("a", &[&client]), mesh.node("b", &[&server]));
    for pod in [&plain, &client] {
        let mut stream = pod.netns.connect((server.ip6, 8080));
        assert_eq!(read_line(&mut stream).expect("greeting"), pod.ip6.to_string(), "the client's address");
    }
    b.records(1, &["\"direction\":\"inbound\"", &format!("[{}]:15008", server.ip6), "sa/client"]);
}

#[test]
#[ignore = "needs root: make test"]
fn destination_that_nobody_knows_is_passed_through() {
    let mut mesh = TunnelMesh::new();
    let client = mesh.enrolled("a", "client");
    let node = mesh.node("a", &[&client]);
    mesh.router.serve(8080, |mut stream, _| {
        let _ = stream.write_all(b"outside");
    });
    let mut stream = client.netns.connect(([169, 254, 1, 1], 8080));
    assert_eq!(read_all(&mut stream).expect("greeting"), b"outside");
    // The refusal by a closed port passes through as well.
    assert_eq!(client.netns.refusal(([169, 254, 1, 1], 9)), ErrorKind::ConnectionReset);
    assert_eq!(node.records(1, &["169.254.1.1:9", "connection failed"]).len(), 1);
}

#[test]
#[ignore = "needs root: make test"]
fn service_leads_to_its_endpoint_and_without_healthy_endpoint_nowhere() {
    let mut mesh = TunnelMesh::new();
    let client = mesh.enrolled("a", "client");
    let server = mesh.enrolled("a", "server");
    mesh.services.push_str(
        "- name: web\n  namespace: demo\n  hostname: web.demo.svc.cluster.local\n  vips: [\"/10.96.0.1\"]\n  \
         ports: {80: 8080}\n- name: none\n  namespace: demo\n  hostname: none.demo.svc.cluster.local\n  \
         vips: [\"/10.96.0.2\"]\n  ports: {80: 8080}\n",
    );
    mesh.add_to_last_workload("  services:\n    demo/web.demo.svc.cluster.local:\n      80: 8080\n");
    server.serve_double_echo(8080);
    let node = mesh.node("a", &[&client, &server]);

    let mut stream = client.netns.connect(([10, 96, 0, 1], 80));
    assert_eq!(read_line(&mut stream).expect("greeting"), client.ip.to_string());
    drop(stream);
    for direction in ["outbound", "inbound"] {
        let record = &node.records(1, &[&format!("\"direction\":\"{direction}\"")])[0];
        assert_eq!(record["dst.service"], "web.demo.svc.cluster.local", "{record}");
    }

    assert_eq!(client.netns.refusal(([10, 96, 0, 2], 80)), ErrorKind::ConnectionReset);
    node.records(1, &["no healthy upstream"]);
}

#[test]
#[ignore = "needs root: make test"]
fn half_close_passes_on_both_ways() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    // Says everything that it heard, once it has heard the end.
    server.serve(8080, |mut stream, _| {
        let heard = read_all(&mut stream).unwrap_or_default();
        let _ = stream.write_all(&heard);
    });
    // Ends first, and goes on listening.
    server.serve(8081, |mut stream, _| {
        let _ = stream.write_all(b"bye").and_then(|()| stream.shutdown(Shutdown::Write));
        let _ = read_all(&mut stream);
    });
    let node = mesh.node("a", &[&client, &server]);
    let data: Vec<u8> = (0..3_000_000u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    let mut stream = client.netns.connect(server.at(8080));
    stream.write_all(&data).expect("write");
    stream.shutdown(Shutdown::Write).expect("shutdown");
    assert!(read_all(&mut stream).expect("echo") == data, "the echo differs");

    let mut stream = client.netns.connect(server.at(8081));
    assert_eq!(read_all(&mut stream).expect("bye"), b"bye");
    stream.write_all(b"late").expect("the other direction is still open");
    drop(stream);
    let record = &node.records(2, &["\"direction\":\"inbound\""])[1];
    assert_eq!((&record["bytes_sent"], &record["bytes_recv"]), (&4.into(), &3.into()));
}

#[test]
#[ignore = "needs root: make test"]
fn reset_arrives_as_reset_both_ways() {
    let mut mesh = TunnelMesh::new();
    let (client, server, plain) =
        (mesh.enrolled("a", "client"), mesh.enrolled("b", "server"), mesh.plain("b", "plain"));
    let (told, tell) = std::sync::mpsc::channel();
    for pod in [&server, &plain] {
        pod.serve(8080, |mut stream, _| {
            // Half a transfer, then a reset.
            let _ = stream.write_all(&[7; 1000]).and_then(|()| stream.read_exact(&mut [0]));
            let _ = socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO));
        });
        let told = told.clone();
        pod.serve(8081, move |mut stream, _| {
            let _ = stream.write_all(b"x");
            let _ = told.send(read_all(&mut stream).map_err(|error| error.kind()));
        });
    }
    let (_a, _b) = (mesh.node("a", &[&client]), mesh.node("b", &[&server]));
    for pod in [&server, &plain] {
        let mut stream = client.netns.connect(pod.at(8080));
        stream.read_exact(&mut [0; 1000]).expect("half a transfer");
        stream.write_all(b"x").expect("write");
        assert_eq!(read_all(&mut stream).unwrap_err().kind(), ErrorKind::ConnectionReset, "to the client");

        let mut stream = client.netns.connect(pod.at(8081));
        stream.read_exact(&mut [0]).expect("greeting");
        socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).expect("linger");
        drop(stream);
        let heard = tell.recv_timeout(LIMIT).expect("the server hears the end");
        assert_eq!(heard, Err(ErrorKind::ConnectionReset), "to the server");
    }
}

#[test]
#[ignore = "needs root: make test"]
fn tunnels_own_ports_lead_nowhere() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    let node = mesh.node("a", &[&client, &server]);
    for port in [15001, 15006] {
        for to in [client.at(port), ([127, 0, 0, 1], port).into(), server.at(port)] {
            let Ok(mut stream) = client.netns.try_connect(to) else { continue }; // refused is fine, too
            let _ = stream.write_all(b"GET / HTTP/1.0\r\n\r\n");
            let answer = read_all(&mut stream).unwrap_or_default();
            assert_eq!(answer, b"", "{to} answers");
        }
    }
    assert!(node.records(4, &["recursive"]).len() >= 4);
    let opened = wait_for("metrics", || Some(node.metrics()));
    assert!(!opened.contains("connections_opened_total{reporter=\"destination\""), "{opened}");
}

/// The router has a route to the pod for an address that is not the pod's, as any neighbour on its
/// network may.
#[test]
#[ignore = "needs root: make test"]
fn a_neighbour_cannot_use_a_pod_as_a_proxy() {
    let mut mesh = TunnelMesh::new();
    let (pod, outside) = (mesh.enrolled("a", "pod"), mesh.plain("a", "outside"));
    let elsewhere = ([198, 51, 100, 7], 8080);
    outside.netns.run("ip addr add 198.51.100.7/32 dev eth0");
    // What comes from the pod goes where it belongs.
    mesh.router.run(&format!(
        "ip route add 198.51.100.7 via {} dev p1 onlink; ip route add 198.51.100.7 dev p2 table 200; \
         ip rule add iif p1 lookup 200",
        pod.ip
    ));
    outside.serve_double_echo(8080);
    let node = mesh.node_with("a", &[&pod], &[("ENABLE_ORIG_SRC", "false")]);
    assert_eq!(mesh.router.refusal(elsewhere), ErrorKind::ConnectionReset);
    node.records(1, &["198.51.100.7:8080", "\"reason\":\"not_own_address\""]);
    // An address of the pod that the control plane does not name is the pod's.
    pod.netns.run("ip addr add 198.51.100.7/32 dev lo");
    pod.serve_double_echo(8080);
    let mut stream = mesh.router.connect(elsewhere);
    read_line(&mut stream).expect("greeting");
}
