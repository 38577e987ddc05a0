//! Ways around: waypoints, and the gateways of other networks.

use std::{
    fmt::Write as _,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    thread,
};

use nix::sys::socket::{setsockopt, sockopt};
use testbed::{
    fakes::FakeResolver,
    mesh_pod::{MeshPod, read_line},
    tunnel_mesh::{TUNNEL_MARK, TunnelMesh, TunnelNode},
};

const WAYPOINT: &str = "spiffe://cluster.local/ns/demo/sa/waypoint";
const CLIENT: &str = "spiffe://cluster.local/ns/demo/sa/client";

/// Sends its name to each client.
fn serve_name(pod: &MeshPod, port: u16) {
    let name = pod.name.clone();
    pod.serve(port, move |mut stream, _| {
        let _ = writeln!(stream, "{name}");
        let _ = stream.read(&mut [0]);
    });
}

fn who_answers(client: &MeshPod, to: impl Into<SocketAddr>) -> String {
    read_line(&mut client.netns.connect(to)).expect("a name")
}

fn vip() -> SocketAddr {
    (Ipv4Addr::new(10, 96, 0, 1), 80).into()
}

/// A client on node a, a waypoint on node b and a server on node c that names it, as does its
/// service `web`.
fn behind_waypoint(application_tunnel: &str) -> (TunnelMesh, [MeshPod; 3], [TunnelNode; 3]) {
    let mut mesh = TunnelMesh::new();
    let client = mesh.enrolled("a", "client");
    let waypoint = mesh.enrolled("b", "waypoint");
    mesh.add_to_last_workload(application_tunnel);
    let server = mesh.enrolled("c", "server");
    let named = format!("waypoint:\n    destination: /{}\n    hboneMtlsPort: 15008\n", waypoint.ip);
    let _ = write!(
        mesh.services,
        "- name: web\n  namespace: demo\n  hostname: web.demo.svc.cluster.local\n  vips: [\"/10.96.0.1\"]\n  \
         ports: {{80: 8080}}\n  {named}"
    );
    mesh.add_to_last_workload(&format!("  services:\n    demo/web.demo.svc.cluster.local: {{}}\n  {named}"));
    serve_name(&server, 8080);
    let nodes = [("a", &client), ("b", &waypoint), ("c", &server)].map(|(name, pod)| mesh.node(name, &[pod]));
    (mesh, [client, waypoint, server], nodes)
}

#[test]
#[ignore = "needs root: make test"]
fn a_waypoint_is_given_what_is_addressed_to_those_that_name_it() {
    let (_mesh, [client, waypoint, server], [a, b, _c]) = behind_waypoint("");
    serve_name(&waypoint, 8080);
    serve_name(&waypoint, 80);
    assert_eq!(who_answers(&client, server.at(8080)), "waypoint");
    assert_eq!(who_answers(&client, vip()), "waypoint");
    let record = &a.records(1, &["\"direction\":\"outbound\"", &server.at(8080).to_string()])[0];
    assert_eq!(record["dst.identity"], WAYPOINT, "{record}");
    assert_eq!(record["dst.addr"], waypoint.at(15008).to_string(), "{record}");
    let record = &a.records(1, &["\"direction\":\"outbound\"", "10.96.0.1:80"])[0];
    assert_eq!(record["dst.service"], "web.demo.svc.cluster.local", "{record}");
    let record = &b.records(2, &["\"direction\":\"inbound\""])[0];
    assert_eq!(record["src.identity"], CLIENT, "{record}");
    // What the waypoint itself sends gets past it.
    assert_eq!(who_answers(&waypoint, server.at(8080)), "server");
    assert_eq!(who_answers(&waypoint, vip()), "server");
}

#[test]
#[ignore = "needs root: make test"]
fn a_waypoint_that_speaks_proxy_is_told_client_target_and_identity() {
    let (_mesh, [client, waypoint, _server], _nodes) =
        behind_waypoint("  applicationTunnel: {protocol: PROXY, port: 15088}\n");
    waypoint.serve(15088, |mut stream, peer| {
        let mut fixed = [0; 16];
        stream.read_exact(&mut fixed).expect("a header");
        let mut rest = vec![0; u16::from_be_bytes([fixed[14], fixed[15]]).into()];
        stream.read_exact(&mut rest).expect("the rest of the header");
        let ip = |at: usize| Ipv4Addr::new(rest[at], rest[at + 1], rest[at + 2], rest[at + 3]);
        let identity = String::from_utf8_lossy(&rest[15..]).into_owned();
        let _ = writeln!(
            stream,
            "{peer} {:02x}{:02x} {} {}:{} {:02x} {identity}",
            fixed[12],
            fixed[13],
            ip(0),
            ip(4),
            u16::from_be_bytes([rest[10], rest[11]]),
            rest[12],
        );
    });
    let told = who_answers(&client, vip());
    assert_eq!(told, format!("127.0.0.1 2111 {} 10.96.0.1:80 d0 {CLIENT}", client.ip));
}

/// Passes bytes on to `to`, from within `pod` but not captured: what the gateway of a network does.
fn serve_forwarding(pod: &MeshPod, port: u16, to: SocketAddr) {
    let netns = std::sync::Arc::new(pod.netns.alias());
    pod.serve(port, move |mut near, _| {
        let dialled = netns.enter(|| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            setsockopt(&socket, sockopt::Mark, &TUNNEL_MARK)?;
            socket.connect(&to.into())?;
            Ok::<_, std::io::Error>(TcpStream::from(socket))
        });
        let mut far = dialled.expect("the server's tunnel");
        let (mut near_too, mut far_too) = (near.try_clone().expect("dup"), far.try_clone().expect("dup"));
        thread::spawn(move || {
            let _ = std::io::copy(&mut near_too, &mut far_too);
            let _ = far_too.shutdown(std::net::Shutdown::Write);
        });
        let _ = std::io::copy(&mut far, &mut near);
        let _ = near.shutdown(std::net::Shutdown::Write);
    });
}

#[test]
#[ignore = "needs root: make test"]
fn another_network_is_reached_by_a_tunnel_within_its_gateways() {
    let mut mesh = TunnelMesh::new();
    let client = mesh.enrolled("a", "client");
    let gateway = mesh.enrolled("b", "gateway");
    // To the gateway's own tunnel the service is what the gateway forwards.
    mesh.add_to_last_workload(
        "  network: east\n  services:\n    demo/web.demo.svc.cluster.local: {80: 9000}\n",
    );
    let server = mesh.enrolled("c", "server");
    mesh.add_to_last_workload(&format!(
        "  network: east\n  networkGateway: {{destination: east/{}}}\n  \
         services:\n    demo/web.demo.svc.cluster.local: {{}}\n",
        gateway.ip
    ));
    mesh.services.push_str(
        "- name: web\n  namespace: demo\n  hostname: web.demo.svc.cluster.local\n  vips: [\"/10.96.0.1\"]\n  \
         ports: {80: 8080}\n",
    );
    mesh.publish();
    server.serve_double_echo(8080);
    serve_forwarding(&gateway, 9000, server.at(15008));
    let [a, b, c] =
        [("a", &client), ("b", &gateway), ("c", &server)].map(|(name, pod)| mesh.node(name, &[pod]));

    let mut stream = client.netns.connect(vip());
    assert_eq!(read_line(&mut stream).expect("greeting"), gateway.ip.to_string());
    let sent = vec![7; 1 << 20];
    let mut received = vec![0; 2 << 20];
    let mut writing = stream.try_clone().expect("dup");
    let writer = thread::spawn(move || {
        writing.write_all(&sent).expect("write");
        writing.shutdown(std::net::Shutdown::Write).expect("shutdown");
    });
    stream.read_exact(&mut received).expect("answer");
    assert_eq!(stream.read(&mut [0]).expect("a clean end"), 0);
    assert!(received.iter().all(|&byte| byte == 7));
    writer.join().expect("all sent");

    let record = &a.records(1, &["\"direction\":\"outbound\""])[0];
    // Told by the inner reply, while the peer is the gateway.
    for (field, value) in [
        ("dst.workload", "server"),
        ("dst.identity", "spiffe://cluster.local/ns/demo/sa/server"),
        ("dst.service", "web.demo.svc.cluster.local"),
        ("dst.addr", &gateway.at(15008).to_string()),
        ("bytes_sent", "1048576"),
    ] {
        assert_eq!(record[field].to_string().trim_matches('"'), value, "{field} of {record}");
    }
    let labels = ["reporter=\"source\"", "destination_workload=\"server\""];
    a.wait_metric("istio_tcp_connections_opened_total", &labels, 1);
    let record = &b.records(1, &["\"direction\":\"inbound\""])[0];
    assert_eq!(record["src.identity"], CLIENT, "{record}");
    // At the far end the address is the gateway's; the client is known by what it tells.
    let record = &c.records(1, &["\"direction\":\"inbound\""])[0];
    assert_eq!(record["src.workload"], "client", "{record}");
    assert_eq!(record["src.identity"], CLIENT, "{record}");
}

#[test]
#[ignore = "needs root: make test"]
fn an_endpoint_known_by_name_alone_is_looked_up_and_remembered() {
    let mut mesh = TunnelMesh::new();
    let (client, outside) = (mesh.enrolled("a", "client"), mesh.plain("a", "outside"));
    for (name, vip) in [("db.outside.test", 1), ("nowhere.test", 2)] {
        mesh.add_to_last_workload(&format!(
            "- name: {name}\n  namespace: demo\n  hostname: {name}\n  services:\n    demo/{name}: {{}}\n"
        ));
        let _ = write!(
            mesh.services,
            "- name: {name}\n  namespace: demo\n  hostname: {name}\n  vips: [\"/10.96.0.{vip}\"]\n  \
             ports: {{80: 8080}}\n"
        );
    }
    mesh.publish();
    // What the resolver answers.
    outside.netns.run("ip addr add 192.0.2.0/32 dev eth0");
    mesh.router.run("ip route add 192.0.2.0/32 dev p2");
    serve_name(&outside, 8080);
    let a = mesh.node("a", &[&client]);
    a.netns.run("ip addr add 169.254.1.1/32 dev lo; ip -6 addr add fd77::ffff/128 dev lo nodad");
    let resolver = FakeResolver::start(&a.netns);

    for _ in 0..3 {
        assert_eq!(who_answers(&client, vip()), "outside");
    }
    let record = &a.records(3, &["\"dst.workload\":\"db.outside.test\""])[0];
    assert_eq!(record["dst.addr"], "192.0.2.0:8080", "{record}");
    // Three connections would ask six times, for two families each, if nothing were remembered.
    let asked = resolver.queries("db.outside.test").len();
    assert!((1..6).contains(&asked), "asked {asked} times");
    a.wait_metric("istio_on_demand_dns_total", &["hostname=\"db.outside.test\""], 3);

    let nowhere = SocketAddr::from((Ipv4Addr::new(10, 96, 0, 2), 80));
    client.netns.refusal(nowhere);
    a.records(1, &["cannot look nowhere.test up"]);
}
