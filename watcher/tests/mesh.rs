//! End to end: real watchers, real tunnels, real kernel programs, foreign clients and servers.

mod lifetimes;

use std::{
    fs,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use testbed::{
    cluster::{Cluster, ClusterPod, Enrol, STRICT, WEB_V4, WEB_V6},
    command::{run, text},
    traffic::RequestLoop,
    wait::{wait_at_most, wait_for},
};

/// A client on node a, an enrolled server on node b, both running nginx-unmodified programs.
fn across_nodes() -> (Cluster, ClusterPod, ClusterPod) {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let server = cluster.pod("server", 1, Enrol::Mesh);
    cluster.serve_web(&server, "hello from server");
    cluster.start();
    (cluster, client, server)
}

fn record(cluster: &Cluster, node: usize, parts: &[&str]) -> String {
    wait_for(&format!("an access record with {parts:?}"), || {
        cluster.nodes[node]
            .access_log()
            .into_iter()
            .rev()
            .find(|line| parts.iter().all(|part| line.contains(part)))
    })
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn both_families_cross_the_nodes_with_identities_and_the_clients_address() {
    let (cluster, client, server) = across_nodes();
    for (address, source) in [
        (format!("http://{}:8080/", server.v4), &client.v4),
        (format!("http://[{}]:8080/", server.v6), &client.v6),
        (format!("http://{WEB_V4}/"), &client.v4),
        (format!("http://[{WEB_V6}]/"), &client.v6),
    ] {
        let reply = client.curl(&address).expect(&address);
        assert_eq!(reply, format!("hello from server, client {source}\n"), "{address}");
    }
    let identity = |name: &str| format!("spiffe://cluster.local/ns/demo/sa/{name}");
    for (node, direction) in [(0, "outbound"), (1, "inbound")] {
        record(&cluster, node, &[direction, &identity("client"), &identity("server")]);
    }
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_plain_client_is_served_through_15006_and_a_strict_policy_refuses_it() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let near = cluster.pod("near", 1, Enrol::Plain);
    let far = cluster.pod("far", 0, Enrol::Plain);
    let server = cluster.pod("server", 1, Enrol::Mesh);
    cluster.serve_web(&server, "hello");
    cluster.start();
    let url = format!("http://{}:8080/", server.v4);
    for pod in [&near, &far] {
        assert_eq!(pod.curl(&url), Ok(format!("hello, client {}\n", pod.v4)));
        let line = record(&cluster, 1, &["inbound", &pod.v4]);
        assert!(!line.contains("src.identity"), "{line}");
    }
    cluster.policies = STRICT.into();
    cluster.publish_mesh();
    for pod in [&near, &far] {
        wait_for("the policy to hold", || pod.curl(&url).is_err().then_some(()));
        // The one that showed it may have been open for a moment, and was cut.
        pod.curl(&url).expect_err("denied");
        record(&cluster, 1, &[&pod.v4, "explicitly denied by: demo/strict"]);
    }
    assert_eq!(client.curl(&url), Ok(format!("hello, client {}\n", client.v4)), "identified clients pass");
}

/// As without a mesh: refused by connect(2), not accepted and then reset.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_port_that_nobody_listens_on_is_refused_near_and_far() {
    const REFUSED: &str = "Couldn't connect";
    let mut cluster = Cluster::new();
    let near = cluster.pod("near", 1, Enrol::Plain);
    let far = cluster.pod("far", 0, Enrol::Plain);
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let server = cluster.pod("server", 1, Enrol::Mesh);
    cluster.serve_web(&server, "hello");
    cluster.nodes[1].watcher_words = vec!["--rescan".into(), "1".into()];
    cluster.start();
    let url = |port: u16| format!("http://{}:{port}/", server.v4);
    for pod in [&near, &far] {
        assert!(pod.curl(&url(8080)).is_ok(), "it listened before it was enrolled");
        let error = pod.curl(&url(8090)).expect_err("nobody listens");
        assert!(error.contains(REFUSED), "{error}");
    }
    // A captured client is accepted by its own tunnel, and reset at once.
    let error = client.curl(&url(8090)).expect_err("nobody listens");
    assert!(error.contains("reset"), "{error}");
    let explained = cluster.nodes[1].watcher_command(&["explain", "near", &format!("{}:8090", server.v4)]);
    assert!(String::from_utf8_lossy(&explained.stdout).contains("nobody listens"), "{explained:?}");
    let log = cluster.dir.path().join("late.log");
    let mut late = server.spawn("late", &["python3", "-m", "http.server", "8090", "--bind", "0.0.0.0"], &log);
    for pod in [&far, &near] {
        wait_for("the new listener to be reached", || pod.curl(&url(8090)).ok());
    }
    // The captured client's attempt has a record too, with its identity.
    let recorded = |line: &&String| {
        line.contains(":8090") && line.contains("complete") && !line.contains("src.identity")
    };
    wait_for("both to be recorded", || {
        (cluster.nodes[1].access_log().iter().filter(recorded).count() == 2).then_some(())
    });
    late.kill();
    for pod in [&near, &far] {
        wait_for("its end to be found", || {
            pod.curl(&url(8090)).is_err_and(|error| error.contains(REFUSED)).then_some(())
        });
    }
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn an_unknown_destination_passes_through_and_a_service_without_endpoints_is_refused() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let plain = cluster.pod("plain", 1, Enrol::Plain);
    cluster.serve_web(&plain, "hello");
    cluster.pods.iter_mut().for_each(|pod| pod.serves_web = false);
    cluster.start();
    assert_eq!(
        client.curl(&format!("http://{}:8080/", plain.v4)),
        Ok(format!("hello, client {}\n", client.v4))
    );
    client.curl(&format!("http://{WEB_V4}/")).expect_err("no endpoint");
    record(&cluster, 0, &["outbound", "no healthy upstream"]);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn loopback_and_the_own_address_stay_local_and_the_tunnels_ports_lead_nowhere() {
    let (cluster, client, server) = across_nodes();
    assert_eq!(server.curl("http://127.0.0.1:8080/"), Ok("hello from server, client 127.0.0.1\n".into()));
    assert_eq!(server.curl("http://[::1]:8080/"), Ok("hello from server, client ::1\n".into()));
    let own = server.curl(&format!("http://{}:8080/", server.v4));
    assert_eq!(own, Ok(format!("hello from server, client {}\n", server.v4)));
    for port in [15001, 15006] {
        for host in ["127.0.0.1", &client.v4, &server.v4] {
            let url = format!("http://{host}:{port}/");
            client.curl(&url).expect_err(&url);
        }
    }
    let node = format!("10.77.{}.1", cluster.nodes[0].number);
    for host in ["127.0.0.1", "[::1]", &client.v4, &node] {
        let url = format!("http://{host}:15000/config_dump");
        client.curl(&url).expect_err("the tunnel's admin port is the node's");
    }
    for port in [15001, 15006, 15008, 15080] {
        let url = format!("http://{node}:{port}/");
        client.curl(&url).expect_err(&url);
    }
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn metrics_name_both_ends_and_count_bytes_as_istio_does() {
    let (cluster, client, server) = across_nodes();
    let url = format!("http://{}:8080/", server.v4);
    client.curl(&url).expect("reply");
    for (node, reporter) in [(0, "source"), (1, "destination")] {
        let line = wait_for("the closed counter", || {
            cluster.nodes[node]
                .metrics()
                .lines()
                .find(|line| {
                    line.starts_with("istio_tcp_connections_closed_total")
                        && line.contains(&format!("reporter=\"{reporter}\""))
                        && line.contains("source_principal=\"spiffe://cluster.local/ns/demo/sa/client\"")
                        && line.contains("destination_principal=\"spiffe://cluster.local/ns/demo/sa/server\"")
                        && line.contains("connection_security_policy=\"mutual_tls\"")
                })
                .map(str::to_owned)
        });
        assert!(line.ends_with(" 1"), "{line}");
    }
    assert_eq!(cluster.nodes[0].http("http://127.0.0.1:15021/healthz/ready").0, 200);
}

/// What a client gets to hear is the address that the server was reached under.
const TELL_ADDRESS: &str = "
import socket, threading
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(('0.0.0.0', 7000)); s.listen(1024)
def serve():
    while True:
        c, _ = s.accept()
        try: c.sendall(c.getsockname()[0].encode())
        except OSError: pass
        c.close()
for _ in range(3): threading.Thread(target=serve, daemon=True).start()
serve()
";

/// argv: own address, connects. 64 local ports, 500 destinations, each port reused at once (a reset
/// leaves no TIME_WAIT), so that whatever is left of the last connection would be met by the next.
const DIAL_MANY: &str = "
import socket, struct, sys, threading, random
me, connects = sys.argv[1], int(sys.argv[2])
wrong, failed, right = [], [], [0]
lock = threading.Lock()
def dial(ports, count):
    rng = random.Random(ports[0])
    good = 0
    for i in range(count):
        number = rng.randrange(500)
        there = '10.78.%d.%d' % (number // 250, 1 + number % 250)
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        s.settimeout(10)
        try:
            s.bind((me, ports[i % len(ports)]))
            s.connect((there, 7000))
            got = s.recv(64).decode()
            if got == there: good += 1
            else: wrong.append((there, got))
        except OSError as error: failed.append((there, str(error)))
        s.close()
    with lock: right[0] += good
threads = [threading.Thread(target=dial, args=(list(range(20000 + 8 * t, 20008 + 8 * t)), connects // 8)) for t in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print('right', right[0], 'wrong', len(wrong), wrong[:3], 'failed', len(failed), failed[:3])
";

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_hundred_thousand_connects_from_few_ports_to_many_destinations_are_never_mistaken() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let plain = cluster.pod("plain", 1, Enrol::Plain);
    for (netns, gateway) in [(&cluster.nodes[0].netns, "10.77.0.2"), (&cluster.nodes[1].netns, &plain.v4)] {
        run(&format!("ip -n {netns} route add 10.78.0.0/16 via {gateway}"));
    }
    run(&format!("ip -n {} route add local 10.78.0.0/16 dev lo", plain.netns));
    cluster.start();
    let server = plain.spawn("tell", &["python3", "-c", TELL_ADDRESS], &cluster.dir.path().join("tell.log"));
    cluster.keep(server);
    wait_for("the server", || {
        plain.exec(&["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/7000"]).status.success().then_some(())
    });
    let connects = "100000";
    let output = client.exec(&["python3", "-c", DIAL_MANY, &client.v4, connects]);
    let said = text(&output);
    assert!(said.contains(&format!("right {connects} wrong 0")), "{said}");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn certificates_come_from_a_certificate_service_where_there_is_one() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let server = cluster.pod("server", 1, Enrol::Mesh);
    cluster.serve_web(&server, "hello");
    cluster.use_certificate_service();
    cluster.start();
    let url = format!("http://{}:8080/", server.v4);
    assert_eq!(client.curl(&url), Ok(format!("hello, client {}\n", client.v4)));
    record(&cluster, 1, &["inbound", "spiffe://cluster.local/ns/demo/sa/client"]);
    assert!(!cluster.ca_dir().exists(), "no development CA was made");
}
