//! What applications see of names, by the tools that they would use.

use std::{
    collections::{BTreeSet, HashSet},
    fmt::Write as _,
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
};

use testbed::{
    fakes::{FakeResolver, RESOLVER_ADDRESSES},
    mesh_pod::MeshPod,
    tunnel_mesh::TunnelMesh,
    wait::{LIMIT, wait_for},
};
const SERVICES: &str = "\
- name: web
  namespace: demo
  hostname: web.demo.svc.cluster.local
  vips: [\"/10.96.0.1\", \"/fd96::1\"]
- name: four
  namespace: other
  hostname: four.other.svc.cluster.local
  vips: [\"/10.96.0.2\"]
- name: wild
  namespace: demo
  hostname: \"*.example.com\"
  vips: [\"/10.96.0.3\"]
- name: named
  namespace: demo
  hostname: entry.outside.test
  vips: []
- name: db
  namespace: demo
  hostname: db.demo.svc.cluster.local
  vips: []
";

/// The lines of `dig`'s answer: `+short` and whatever `arguments` ask for.
fn dig(pod: &MeshPod, arguments: &[&str]) -> BTreeSet<String> {
    let all = [&["+short", "+tries=1", "+timeout=15"], arguments].concat();
    pod.netns.output("dig", &all).lines().map(str::to_owned).collect()
}

fn lines(expected: &[&str]) -> BTreeSet<String> {
    expected.iter().map(|line| (*line).to_owned()).collect()
}

/// What `dig` says of the reply: its status, and how many records it has.
fn status(pod: &MeshPod, arguments: &[&str]) -> (String, usize) {
    let all = [&["+tries=1", "+timeout=15"], arguments].concat();
    let output = pod.netns.output("dig", &all);
    let after = |mark: &str| {
        let (_, rest) = output.split_once(mark).unwrap_or_else(|| panic!("no {mark} in {output}"));
        rest.split(',').next().expect("a word").trim().to_owned()
    };
    (after("status:"), after("ANSWER:").parse().expect("a number"))
}

/// A pod whose queries are captured, the resolver behind, and the services.
fn captured(mesh: &mut TunnelMesh) -> (MeshPod, FakeResolver) {
    mesh.services.push_str(SERVICES);
    let client = mesh.enrolled("a", "client");
    mesh.add_to_last_workload("  services:\n    demo/db.demo.svc.cluster.local: {}\n");
    mesh.capture_dns(&client);
    let resolver = FakeResolver::start(&mesh.router);
    (client, resolver)
}

#[test]
#[ignore = "needs root: make test"]
fn names_of_services_are_answered_and_all_else_is_forwarded() {
    let mut mesh = TunnelMesh::new();
    let (client, resolver) = captured(&mut mesh);
    let _node = mesh.node("a", &[&client]);
    let at = "@169.254.1.1";
    for name in
        ["web", "web.demo", "web.demo.svc", "web.demo.svc.cluster.local", "WEB.demo.svc.Cluster.local"]
    {
        assert_eq!(dig(&client, &[at, name]), lines(&["10.96.0.1"]), "{name}");
        assert_eq!(dig(&client, &[at, "+tcp", name, "AAAA"]), lines(&["fd96::1"]), "{name}");
        // Two labels are a name of the outside world first, if it has that name.
        assert_eq!(resolver.queries(name).is_empty(), name != "web.demo", "{name}");
    }
    assert_eq!(dig(&client, &["@fd77::ffff", "web"]), lines(&["10.96.0.1"]), "by way of IPv6");
    assert_eq!(dig(&client, &[at, "any.example.com"]), lines(&["10.96.0.3"]));
    assert_eq!(dig(&client, &[at, "web.demo.demo.svc.cluster.local"]), lines(&["web.demo.", "10.96.0.1"]));
    assert_eq!(dig(&client, &[at, "db"]), lines(&[&client.ip.to_string()]), "headless");
    assert_eq!(dig(&client, &[at, "db", "AAAA"]), lines(&[&client.ip6.to_string()]), "headless");

    assert_eq!(dig(&client, &[at, "www.outside.test"]), lines(&["192.0.2.0"]));
    let asked = &resolver.queries("www.outside.test")[0];
    assert_eq!(asked.client.ip(), client.ip, "the outer world sees the pod");
    assert_eq!(
        dig(&client, &[at, "entry.outside.test"]),
        lines(&["192.0.2.0"]),
        "an entry without an address"
    );
    for kind in ["TXT", "HTTPS", "TYPE4242"] {
        assert_eq!(
            status(&client, &[at, "web", kind]),
            ("NOERROR".to_owned(), 0),
            "the name exists, {kind} does not"
        );
    }
    assert_eq!(resolver.queries("web").len(), 3, "only addresses are ours to tell");
    for opcode in ["UPDATE", "NOTIFY", "STATUS"] {
        let opcode = format!("+opcode={opcode}");
        assert_eq!(status(&client, &[at, &opcode, "www.outside.test", "SOA"]).0, "NOERROR", "{opcode}");
    }

    assert_eq!(status(&client, &[at, "four.other", "AAAA"]), ("NOERROR".to_owned(), 0), "no such address");
    assert_eq!(status(&client, &[at, "nosuch.demo.svc.cluster.local"]), ("NXDOMAIN".to_owned(), 0));
    assert_eq!(status(&client, &[at, "broken.test"]), ("SERVFAIL".to_owned(), 0));
    let families: Vec<_> =
        resolver.queries("broken.test").iter().map(|asked| asked.client.is_ipv4()).collect();
    assert_eq!(families, [true, false], "the second resolver may know better than the first");
}

/// Redirects of netfilter keep it for TCP. For datagrams, the kernel programs of our watcher do.
#[test]
#[ignore = "needs root: make test"]
fn a_query_goes_to_the_resolver_that_was_asked() {
    let mut mesh = TunnelMesh::new();
    let (client, resolver) = captured(&mut mesh);
    let _node = mesh.node_with("a", &[&client], &[("DNS_UPSTREAM", "192.0.2.99")]);
    for (at, by_v4) in [("@169.254.1.1", true), ("@fd77::ffff", false)] {
        assert_eq!(dig(&client, &[at, "+tcp", "www.outside.test"]), lines(&["192.0.2.0"]), "{at}");
        let asked = resolver.queries("www.outside.test");
        assert_eq!(asked.last().map(|asked| asked.client.is_ipv4()), Some(by_v4), "{at}");
    }
}

#[test]
#[ignore = "needs root: make test"]
fn a_resolver_that_is_away_costs_no_wait_and_one_answer_brings_it_back() {
    let mut mesh = TunnelMesh::new();
    let (client, _resolver) = captured(&mut mesh);
    let _node = mesh.node("a", &[&client]);
    let at = "@169.254.1.1";
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(status(&client, &[at, "silent.test"]).0, "SERVFAIL"));
        }
    });
    // One of these may be the probe.
    let mut waits: Vec<_> = std::thread::scope(|scope| {
        let asking: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let began = std::time::Instant::now();
                    assert_eq!(status(&client, &[at, "silent.test"]).0, "SERVFAIL");
                    began.elapsed()
                })
            })
            .collect();
        asking.into_iter().map(|one| one.join().expect("no panic")).collect()
    });
    waits.sort_unstable();
    assert!(waits[1].as_secs_f64() < 2.0, "{waits:?}");
    wait_for("a probe to bring it back", || {
        (dig(&client, &[at, "www.outside.test"]) == lines(&["192.0.2.0"])).then_some(())
    });
    assert_eq!(dig(&client, &[at, "www.outside.test"]), lines(&["192.0.2.0"]));
}

#[test]
#[ignore = "needs root: make test"]
fn long_answers_go_over_tcp() {
    let mut mesh = TunnelMesh::new();
    let (client, resolver) = captured(&mut mesh);
    let mut vips = String::new();
    for number in 0..100 {
        let _ = write!(vips, "\"/10.97.0.{number}\", ");
    }
    let service = "- name: many\n  namespace: demo\n  hostname: many.demo.svc.cluster.local\n";
    let _ = writeln!(mesh.services, "{service}  vips: [{vips}]");
    mesh.publish();
    let _node = mesh.node("a", &[&client]);
    // Without EDNS 512 bytes fit. dig asks again by TCP, as every resolver library does.
    assert_eq!(dig(&client, &["@169.254.1.1", "+noedns", "many"]).len(), 100);
    assert_eq!(dig(&client, &["@169.254.1.1", "+noedns", "+ignore", "many"]).len(), 0);
    assert_eq!(dig(&client, &["@169.254.1.1", "+bufsize=4096", "+ignore", "many"]).len(), 100);
    assert_eq!(dig(&client, &["@169.254.1.1", "large.outside.test"]).len(), 50);
    let ways: Vec<_> = resolver.queries("large.outside.test").iter().map(|asked| asked.by_tcp).collect();
    assert_eq!(ways, [false, true], "the outer world's truncation reaches the client");
}

#[test]
#[ignore = "needs root: make test"]
fn the_c_librarys_resolver_finds_services_by_its_search_domains() {
    let mut mesh = TunnelMesh::new();
    let (client, _resolver) = captured(&mut mesh);
    let _node = mesh.node("a", &[&client]);
    let file = mesh.dir.path().join("resolv.conf");
    let text = "search demo.svc.cluster.local svc.cluster.local cluster.local\nnameserver 169.254.1.1\n\
        options ndots:5 timeout:15 attempts:1\n";
    fs::write(&file, text).expect("write");
    let lookup = |name: &str| {
        let script = format!("mount --bind {} /etc/resolv.conf; getent ahostsv4 {name}", file.display());
        let output = client.netns.output("unshare", &["-m", "sh", "-ec", &script]);
        output.split_whitespace().next().unwrap_or_default().to_owned()
    };
    for (name, address) in [
        ("web", "10.96.0.1"),
        ("web.demo", "10.96.0.1"),
        ("web.demo.svc.cluster.local", "10.96.0.1"),
        ("four.other", "10.96.0.2"),
        ("any.example.com", "10.96.0.3"),
        ("www.outside.test", "192.0.2.0"),
        ("nosuch", ""),
    ] {
        assert_eq!(lookup(name), address, "{name}");
    }
}

#[test]
#[ignore = "needs root: make test"]
fn queries_are_counted_and_so_is_what_the_outer_world_makes_of_them() {
    let mut mesh = TunnelMesh::new();
    let (client, _resolver) = captured(&mut mesh);
    let node = mesh.node("a", &[&client]);
    dig(&client, &["@169.254.1.1", "web"]);
    dig(&client, &["@169.254.1.1", "+tcp", "www.outside.test"]);
    assert_eq!(status(&client, &["@169.254.1.1", "silent.test"]).0, "SERVFAIL");
    let labels = |protocol: &'static str| {
        [
            "request_query_type=\"A\"",
            protocol,
            "source_canonical_service=\"client\"",
            "source_canonical_revision=\"v1\"",
        ]
    };
    let (udp, tcp) = (labels("request_protocol=\"udp\""), labels("request_protocol=\"tcp\""));
    node.wait_metric("istio_dns_requests_total", &udp, 2);
    node.wait_metric("istio_dns_requests_total", &tcp, 1);
    node.wait_metric("istio_dns_upstream_requests_total", &udp, 1);
    node.wait_metric("istio_dns_upstream_requests_total", &tcp, 1);
    node.wait_metric("istio_dns_upstream_failures_total", &udp, 1);
    assert_eq!(node.metric("istio_dns_upstream_failures_total", &tcp), None);
    let duration = "istio_dns_upstream_request_duration_seconds";
    node.wait_metric(&format!("{duration}_count"), &tcp, 1);
    let buckets: HashSet<_> = ["0.0005", "0.001", "0.01", "0.1", "1.0", "5.0", "+Inf"]
        .into_iter()
        .filter(|bound| node.metrics().contains(&format!("{duration}_bucket{{le=\"{bound}\"")))
        .collect();
    assert_eq!(buckets.len(), 7, "{}", node.metrics());
}

#[test]
#[ignore = "needs root: make test"]
fn nobody_can_guess_how_a_forwarded_query_comes_back() {
    let mut mesh = TunnelMesh::new();
    let (client, resolver) = captured(&mut mesh);
    let _node = mesh.node("a", &[&client]);
    let socket = client.netns.enter(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).expect("bind");
    socket.set_read_timeout(Some(LIMIT)).expect("timeout");
    // Always the same id and port.
    let query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x03www\x07outside\x04test\0\0\x01\0\x01";
    let to = SocketAddr::new(RESOLVER_ADDRESSES[0].parse().expect("address"), 53);
    for _ in 0..16 {
        socket.send_to(query, to).expect("send");
        let mut reply = [0; 512];
        let (length, from) = socket.recv_from(&mut reply).expect("reply");
        assert_eq!((from, &reply[..2]), (to, &query[..2]));
        assert!(reply[..length].ends_with(&[192, 0, 2, 0]));
    }
    let asked = resolver.queries("www.outside.test");
    let ids: HashSet<_> = asked.iter().map(|asked| asked.id).collect();
    let ports: HashSet<_> = asked.iter().map(|asked| asked.client.port()).collect();
    assert!(ids.len() > 12 && ports.len() > 12, "ids {ids:?}, ports {ports:?}");
}

#[test]
#[ignore = "needs root: make test"]
fn a_successor_takes_over_without_a_lost_query() {
    let mut mesh = TunnelMesh::new();
    let (client, _resolver) = captured(&mut mesh);
    let mut old = mesh.node("a", &[&client]);
    let _new = mesh.node("a", &[&client]);
    let query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x03web\0\0\x01\0\x01";
    let to = SocketAddr::new(RESOLVER_ADDRESSES[0].parse().expect("address"), 53);
    for round in 0..300 {
        if round == 100 {
            old.signal(nix::sys::signal::Signal::SIGTERM);
        }
        // Each from a port of its own, so that the kernel spreads them over both.
        let socket = client.netns.enter(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).expect("bind");
        socket.set_read_timeout(Some(LIMIT)).expect("timeout");
        socket.send_to(query, to).expect("send");
        let mut reply = [0; 512];
        let (length, _) =
            socket.recv_from(&mut reply).unwrap_or_else(|error| panic!("query {round}: {error}"));
        assert!(reply[..length].ends_with(&[10, 96, 0, 1]), "query {round}");
    }
    assert!(old.wait_exit().success());
}

#[test]
#[ignore = "needs root: make test"]
fn a_pod_whose_dns_port_is_taken_is_served_without_names() {
    let mut mesh = TunnelMesh::new();
    let client = mesh.enrolled("a", "client");
    let _taken = client.netns.enter(|| UdpSocket::bind(("127.0.0.1", 15053))).expect("bind");
    let node = mesh.node("a", &[&client]);
    wait_for("the log", || node.log().contains("cannot serve the pod's DNS").then_some(()));
}

#[test]
#[ignore = "needs root: make test"]
fn a_pod_that_leaves_gets_its_dns_port_back() {
    let mut mesh = TunnelMesh::new();
    let (client, _resolver) = captured(&mut mesh);
    let mut node = mesh.node("a", &[&client]);
    assert_eq!(dig(&client, &["@169.254.1.1", "web"]), lines(&["10.96.0.1"]));
    assert_eq!(node.agent().delete(&client.name), "");
    wait_for("the port to be free", || {
        client.netns.enter(|| UdpSocket::bind(("127.0.0.1", 15053))).ok().map(drop)
    });
}

/// Queries take of the same descriptors as connections. Of sixteen, the netns, the listeners and DNS
/// itself take eleven.
#[test]
#[ignore = "needs root: make test"]
fn a_pod_without_descriptors_is_told_so_at_once_and_names_of_the_mesh_need_none() {
    let mut mesh = TunnelMesh::new();
    let (client, _resolver) = captured(&mut mesh);
    mesh.router.serve(8080, |mut stream, _| {
        let _ = std::io::Read::read(&mut stream, &mut [0]);
    });
    let node = mesh.node_with("a", &[&client], &[("POD_DESCRIPTORS", "16")]);
    let forwarded = || status(&client, &["db.outside.test"]).0;
    assert_eq!(forwarded(), "NOERROR");
    let connections = [0; 2].map(|_| client.netns.connect(([169, 254, 1, 1], 8080)));
    let query = client.netns.connect(([127, 0, 0, 1], 15053));
    wait_for("all to be taken", || forwarded() == "SERVFAIL");
    assert_eq!(dig(&client, &["web.demo.svc.cluster.local"]), lines(&["10.96.0.1"]));
    client.netns.refusal(([169, 254, 1, 1], 8080));
    node.wait_metric("ztunnel_connection_failures_total", &["reason=\"too_many_connections\""], 1);
    drop((connections, query));
    wait_for("some to be free again", || forwarded() == "NOERROR");
}
