//! End to end: real watchers, real tunnels, real kernel programs, foreign clients and servers.

mod bed;

use std::{
    fs,
    time::{Duration, Instant},
};

use bed::{
    Bed, Enrol, Pod,
    cluster::{WEB_V4, WEB_V6},
    load::RequestLoop,
    node::http,
    wait_for,
};
use nix::sys::signal::Signal;

/// A client on node a, an enrolled server on node b, both running nginx-unmodified programs.
fn across_nodes() -> (Bed, Pod, Pod) {
    let mut bed = Bed::new();
    let client = bed.pod("client", 0, Enrol::Mesh);
    let server = bed.pod("server", 1, Enrol::Mesh);
    bed.serve_web(&server, "hello from server");
    bed.start();
    (bed, client, server)
}

fn record(bed: &Bed, node: usize, parts: &[&str]) -> String {
    wait_for(&format!("an access record with {parts:?}"), Duration::from_secs(5), || {
        bed.nodes[node]
            .access_log()
            .into_iter()
            .rev()
            .find(|line| parts.iter().all(|part| line.contains(part)))
    })
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn both_families_cross_the_nodes_with_identities_and_the_clients_address() {
    let (bed, client, server) = across_nodes();
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
        record(&bed, node, &[direction, &identity("client"), &identity("server")]);
    }
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_plain_client_is_served_through_15006_and_a_strict_policy_refuses_it() {
    let mut bed = Bed::new();
    let client = bed.pod("client", 0, Enrol::Mesh);
    let near = bed.pod("near", 1, Enrol::Plain);
    let far = bed.pod("far", 0, Enrol::Plain);
    let server = bed.pod("server", 1, Enrol::Mesh);
    bed.serve_web(&server, "hello");
    bed.start();
    let url = format!("http://{}:8080/", server.v4);
    for pod in [&near, &far] {
        assert_eq!(pod.curl(&url), Ok(format!("hello, client {}\n", pod.v4)));
        let line = record(&bed, 1, &["inbound", &pod.v4]);
        assert!(!line.contains("src.identity"), "{line}");
    }
    bed.policies = "- name: strict\n  namespace: demo\n  scope: Namespace\n  action: Deny\n  \
                    rules:\n  - - - notPrincipals: [{Presence: []}]\n"
        .into();
    bed.publish_mesh();
    for pod in [&near, &far] {
        wait_for("the policy to hold", Duration::from_secs(5), || pod.curl(&url).is_err().then_some(()));
        // The one that showed it may have been open for a moment, and was cut.
        pod.curl(&url).expect_err("denied");
        record(&bed, 1, &[&pod.v4, "explicitly denied by: demo/strict"]);
    }
    assert_eq!(client.curl(&url), Ok(format!("hello, client {}\n", client.v4)), "identified clients pass");
}

/// As without a mesh: refused by connect(2), not accepted and then reset.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_port_that_nobody_listens_on_is_refused_near_and_far() {
    const REFUSED: &str = "Couldn't connect";
    let mut bed = Bed::new();
    let near = bed.pod("near", 1, Enrol::Plain);
    let far = bed.pod("far", 0, Enrol::Plain);
    let client = bed.pod("client", 0, Enrol::Mesh);
    let server = bed.pod("server", 1, Enrol::Mesh);
    bed.serve_web(&server, "hello");
    bed.nodes[1].watcher_words = vec!["--rescan".into(), "1".into()];
    bed.start();
    let url = |port: u16| format!("http://{}:{port}/", server.v4);
    for pod in [&near, &far] {
        assert!(pod.curl(&url(8080)).is_ok(), "it listened before it was enrolled");
        let error = pod.curl(&url(8090)).expect_err("nobody listens");
        assert!(error.contains(REFUSED), "{error}");
    }
    // A captured client is accepted by its own tunnel, and reset at once.
    let error = client.curl(&url(8090)).expect_err("nobody listens");
    assert!(error.contains("reset"), "{error}");
    let explained = bed.nodes[1].watcher_command(&["explain", "near", &format!("{}:8090", server.v4)]);
    assert!(String::from_utf8_lossy(&explained.stdout).contains("nobody listens"), "{explained:?}");
    let log = bed.dir.path().join("late.log");
    let mut late = server.spawn("late", &["python3", "-m", "http.server", "8090", "--bind", "0.0.0.0"], &log);
    for pod in [&far, &near] {
        wait_for("the new listener to be reached", Duration::from_secs(10), || pod.curl(&url(8090)).ok());
    }
    // The captured client's attempt has a record too, with its identity.
    let recorded = |line: &&String| {
        line.contains(":8090") && line.contains("complete") && !line.contains("src.identity")
    };
    wait_for("both to be recorded", Duration::from_secs(5), || {
        (bed.nodes[1].access_log().iter().filter(recorded).count() == 2).then_some(())
    });
    late.kill();
    for pod in [&near, &far] {
        wait_for("its end to be found", Duration::from_secs(10), || {
            pod.curl(&url(8090)).is_err_and(|error| error.contains(REFUSED)).then_some(())
        });
    }
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn an_unknown_destination_passes_through_and_a_service_without_endpoints_is_refused() {
    let mut bed = Bed::new();
    let client = bed.pod("client", 0, Enrol::Mesh);
    let plain = bed.pod("plain", 1, Enrol::Plain);
    bed.serve_web(&plain, "hello");
    bed.pods.iter_mut().for_each(|pod| pod.serves_web = false);
    bed.start();
    assert_eq!(
        client.curl(&format!("http://{}:8080/", plain.v4)),
        Ok(format!("hello, client {}\n", client.v4))
    );
    client.curl(&format!("http://{WEB_V4}/")).expect_err("no endpoint");
    record(&bed, 0, &["outbound", "no healthy upstream"]);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn loopback_and_the_own_address_stay_local_and_the_tunnels_ports_lead_nowhere() {
    let (bed, client, server) = across_nodes();
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
    let node = format!("10.77.{}.1", bed.nodes[0].number);
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
fn the_label_comes_and_goes_under_load_without_a_failed_request() {
    let (mut bed, client, server) = across_nodes();
    // Not the service's address: outside the mesh nobody serves that here.
    let url = format!("http://{}:8080/", server.v4);
    let requests = RequestLoop::start(&client, &url, &bed.dir.path().join("loop"));
    for _ in 0..25 {
        for enrol in [Enrol::Plain, Enrol::Mesh] {
            bed.label(&["client", "server"], enrol);
            requests.more(3);
        }
    }
    let (count, failed) = requests.finish();
    assert!(failed.is_empty(), "{failed:?} of {count}");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn watchers_that_are_killed_while_pods_come_and_go_stop_no_traffic() {
    let mut bed = Bed::new();
    let client = bed.pod("client", 0, Enrol::Mesh);
    let server = bed.pod("server", 1, Enrol::Mesh);
    let others = ["p0", "p1", "p2", "p3"];
    for (i, name) in others.iter().enumerate() {
        bed.pod(name, i % 2, Enrol::Plain);
    }
    bed.serve_web(&server, "hello");
    bed.start();
    let url = format!("http://{}:8080/", server.v4);
    let requests = RequestLoop::start(&client, &url, &bed.dir.path().join("loop"));
    for round in 0..10_usize {
        // Half of the others change; the watcher dies somewhere in the middle of that.
        for (i, name) in others.iter().enumerate() {
            let enrol = if (i / 2 + round) % 2 == 0 { Enrol::Mesh } else { Enrol::Plain };
            bed.pods.iter_mut().find(|pod| pod.name == *name).expect("pod").enrol = enrol;
        }
        let node = round % 2;
        bed.publish_pods(node);
        std::thread::sleep(Duration::from_millis(round as u64 * 3));
        bed.replace_watcher(node, Duration::from_millis(20 * (round as u64 % 3)));
        bed.publish_pods(1 - node);
        bed.wait_settled();
        requests.more(3);
    }
    let (count, failed) = requests.finish();
    assert!(failed.is_empty(), "{failed:?} of {count}");
    // Not one of them went in clear.
    let records = || -> (usize, usize) {
        let log = bed.nodes[1].access_log();
        let inbound = || log.iter().filter(|line| line.contains("inbound") && line.contains("complete"));
        (inbound().filter(|line| line.contains("sa/client")).count(), inbound().count())
    };
    wait_for("a record of each request", Duration::from_secs(5), || (records().0 == count).then_some(()));
    assert_eq!(records(), (count, count));
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_killed_tunnel_is_refused_or_passed_by_as_the_pod_chose_and_comes_back() {
    let mut bed = Bed::new();
    let closed = bed.pod("closed", 0, Enrol::Mesh);
    let open = bed.pod("open", 0, Enrol::Mesh);
    let plain = bed.pod("plain", 1, Enrol::Plain);
    bed.pods[1].fail_open = true;
    bed.serve_web(&plain, "hello");
    bed.start();
    let url = format!("http://{}:8080/", plain.v4);
    assert!(closed.curl(&url).is_ok() && open.curl(&url).is_ok());

    bed.nodes[0].tunnel.as_mut().expect("tunnel").signal(Signal::SIGKILL);
    wait_for("the open pod to pass in clear", Duration::from_secs(2), || open.curl(&url).ok());
    let since = Instant::now();
    closed.curl(&url).expect_err("closed");
    assert!(since.elapsed() < Duration::from_secs(2), "refused at once, not by a timeout");

    let (mesh, ca) = (bed.mesh_file(), bed.ca_dir());
    bed.nodes[0].start_tunnel(&mesh, &ca);
    wait_for("the closed pod to be served again", Duration::from_secs(2), || closed.curl(&url).ok());
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn pods_follow_their_fail_mode_also_when_watcher_and_tunnel_are_both_killed() {
    let mut bed = Bed::new();
    let closed = bed.pod("closed", 0, Enrol::Mesh);
    let open = bed.pod("open", 0, Enrol::Mesh);
    let plain = bed.pod("plain", 1, Enrol::Plain);
    bed.pods[1].fail_open = true;
    bed.serve_web(&plain, "hello");
    bed.serve_web(&open, "open");
    bed.start();
    let url = format!("http://{}:8080/", plain.v4);
    assert!(closed.curl(&url).is_ok() && open.curl(&url).is_ok());

    bed.nodes[0].watcher.as_mut().expect("watcher").signal(Signal::SIGKILL);
    bed.nodes[0].tunnel.as_mut().expect("tunnel").signal(Signal::SIGKILL);
    wait_for("the open pod to pass in clear", Duration::from_secs(2), || open.curl(&url).ok());
    let inbound = format!("http://{}:8080/", open.v4);
    wait_for("the open pod to be reached in clear", Duration::from_secs(2), || plain.curl(&inbound).ok());
    closed.curl(&url).expect_err("closed");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn open_connections_survive_enrolling_and_leaving() {
    let (mut bed, client, server) = across_nodes();
    let echo = "import socket\ns=socket.socket(socket.AF_INET6)\ns.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1)\n\
                s.bind(('::',9000))\ns.listen()\n\
                import threading\ndef serve(c):\n  while True:\n    b=c.recv(4096)\n    if not b: return\n    c.sendall(b)\n\
                while True:\n  c,_=s.accept()\n  threading.Thread(target=serve,args=(c,),daemon=True).start()\n";
    let echo = server.spawn("echo", &["python3", "-c", echo], &bed.dir.path().join("echo.log"));
    bed.keep(echo);
    wait_for("the echo server to listen", Duration::from_secs(10), || {
        server.exec(&["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/9000"]).status.success().then_some(())
    });
    let go = |name: &str| bed.dir.path().join(name);
    let (meshed_go, plain_go) = (go("meshed-go"), go("plain-go"));
    let dial = |log: &str, go: &std::path::Path| {
        let program = format!(
            "import socket,time,os\ns=socket.create_connection(('{}',9000),5)\ns.settimeout(5)\n\
             s.sendall(b'one'); assert s.recv(16)==b'one'\n\
             print('up',flush=True)\nwhile not os.path.exists('{}'): time.sleep(0.01)\n\
             s.sendall(b'two'); assert s.recv(16)==b'two'\nprint('survived',flush=True)\n",
            server.v4,
            go.display()
        );
        client.spawn("dial", &["python3", "-c", &program], &bed.dir.path().join(log))
    };
    let says = |log: &str, word: &str| {
        let log = bed.dir.path().join(log);
        wait_for(&format!("{word} in {}", log.display()), Duration::from_secs(10), || {
            let text = fs::read_to_string(&log).ok()?;
            assert!(!text.contains("Error"), "{text}");
            text.contains(word).then_some(())
        });
    };
    let meshed = dial("meshed.log", &meshed_go);
    says("meshed.log", "up");
    let dir = bed.dir.path().to_owned();
    bed.label(&["client", "server"], Enrol::Plain);
    fs::write(&meshed_go, "").expect("go");
    let says = |log: &str, word: &str| {
        let log = dir.join(log);
        wait_for(&format!("{word} in {}", log.display()), Duration::from_secs(10), || {
            let text = fs::read_to_string(&log).ok()?;
            assert!(!text.contains("Error"), "{text}");
            text.contains(word).then_some(())
        });
    };
    says("meshed.log", "survived");
    drop(meshed);

    let program = format!(
        "import socket,time,os\ns=socket.create_connection(('{}',9000),5)\ns.settimeout(5)\n\
         s.sendall(b'one'); assert s.recv(16)==b'one'\nprint('up',flush=True)\n\
         while not os.path.exists('{}'): time.sleep(0.01)\n\
         s.sendall(b'two'); assert s.recv(16)==b'two'\nprint('survived',flush=True)\n",
        server.v4,
        plain_go.display()
    );
    let plain = client.spawn("dial", &["python3", "-c", &program], &dir.join("plain.log"));
    says("plain.log", "up");
    bed.label(&["client", "server"], Enrol::Mesh);
    fs::write(&plain_go, "").expect("go");
    says("plain.log", "survived");
    drop(plain);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn metrics_name_both_ends_and_count_bytes_as_istio_does() {
    let (bed, client, server) = across_nodes();
    let url = format!("http://{}:8080/", server.v4);
    client.curl(&url).expect("reply");
    for (node, reporter) in [(0, "source"), (1, "destination")] {
        let line = wait_for("the closed counter", Duration::from_secs(5), || {
            bed.nodes[node]
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
    assert_eq!(http(&bed.nodes[0].netns, "http://127.0.0.1:15021/healthz/ready").0, 200);
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
    let mut bed = Bed::new();
    let client = bed.pod("client", 0, Enrol::Mesh);
    let plain = bed.pod("plain", 1, Enrol::Plain);
    for (netns, gateway) in [(&bed.nodes[0].netns, "10.77.0.2"), (&bed.nodes[1].netns, &plain.v4)] {
        bed::process::run(&format!("ip -n {netns} route add 10.78.0.0/16 via {gateway}"));
    }
    bed::process::run(&format!("ip -n {} route add local 10.78.0.0/16 dev lo", plain.netns));
    bed.start();
    let server = plain.spawn("tell", &["python3", "-c", TELL_ADDRESS], &bed.dir.path().join("tell.log"));
    bed.keep(server);
    wait_for("the server", Duration::from_secs(10), || {
        plain.exec(&["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/7000"]).status.success().then_some(())
    });
    let connects = "100000";
    let output = client.exec(&["python3", "-c", DIAL_MANY, &client.v4, connects]);
    let said = bed::process::text(&output);
    assert!(said.contains(&format!("right {connects} wrong 0")), "{said}");
}

/// What a pod's netns looks like from inside, and what is pinned.
fn traces(bed: &Bed) -> Vec<String> {
    let mut seen = Vec::new();
    for pod in &bed.pods {
        for line in [
            "ip rule show",
            "ip -6 rule show",
            "ip route show table all",
            "ip -6 route show table all",
            "ss -Hltn",
            "sysctl net.ipv4.tcp_fwmark_accept net.ipv4.fwmark_reflect net.ipv6.fwmark_reflect net.ipv4.tcp_migrate_req",
        ] {
            let output = pod.exec(&line.split(' ').collect::<Vec<_>>());
            // A question that fails would answer alike before and after.
            assert!(output.status.success(), "{line}: {}", bed::process::text(&output));
            // Link-local addresses and their routes come by themselves, some time after the interface.
            let text = bed::process::text(&output);
            let lines = text.lines().filter(|line| !line.contains("fe80:"));
            seen.extend(lines.map(|entry| format!("{} {line}: {entry}", pod.name)));
        }
    }
    for entry in fs::read_dir(bed.bpffs()).expect("bpffs").flatten() {
        seen.push(format!("pinned: {}", entry.path().display()));
    }
    seen.sort();
    seen
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn after_killing_everything_uninstall_leaves_nothing() {
    let mut bed = Bed::new();
    let client = bed.pod("client", 0, Enrol::Mesh);
    let server = bed.pod("server", 1, Enrol::Mesh);
    bed.serve_web(&server, "hello");
    let before = traces(&bed);
    bed.start();
    let url = format!("http://{}:8080/", server.v4);
    assert_eq!(client.curl(&url), Ok(format!("hello, client {}\n", client.v4)));
    assert_ne!(traces(&bed), before, "enrolling leaves traces to be removed");
    for node in &mut bed.nodes {
        for program in [&mut node.tunnel, &mut node.watcher] {
            program.as_mut().expect("running").kill();
        }
    }
    client.curl(&url).expect_err("still closed");
    for node in &bed.nodes {
        let (bpffs, run_dir) = (bed.bpffs(), node.dir.join("run"));
        let path = |path: &std::path::Path| path.to_str().expect("UTF-8 path").to_owned();
        let (bpffs, run_dir) = (path(&bpffs), path(&run_dir));
        let line = ["uninstall", "--node", &node.pins_name, "--bpffs", &bpffs, "--run-dir", &run_dir];
        let output = node.watcher_command(&line);
        assert!(output.status.success(), "{}", bed::process::text(&output));
    }
    assert_eq!(traces(&bed), before);
    assert_eq!(client.curl(&url), Ok(format!("hello, client {}\n", client.v4)), "in clear");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_tunnels_successor_takes_over_under_load_without_a_failed_request() {
    let (mut bed, client, server) = across_nodes();
    let url = format!("http://{}:8080/", server.v4);
    let requests = RequestLoop::start(&client, &url, &bed.dir.path().join("loop"));
    let (mesh, ca) = (bed.mesh_file(), bed.ca_dir());
    for node in 0..2 {
        requests.more(10);
        // In a cluster each has a network of its own; here they share the node's.
        let addresses = [
            ("ADMIN_ADDR", "127.0.0.1:16000"),
            ("STATS_ADDR", "127.0.0.1:16020"),
            ("READINESS_ADDR", "127.0.0.1:16021"),
        ];
        let node = &mut bed.nodes[node];
        let successor = node.spawn_tunnel(&mesh, &ca, &addresses);
        wait_for("the successor to be ready", Duration::from_secs(10), || {
            (http(&node.netns, "http://127.0.0.1:16021/healthz/ready").0 == 200).then_some(())
        });
        let mut first = node.tunnel.replace(successor).expect("the first tunnel");
        assert!(first.stop(Duration::from_secs(10)), "the first tunnel did not end by itself");
        requests.more(10);
    }
    let (count, failed) = requests.finish();
    assert!(failed.is_empty(), "{failed:?} of {count}");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn certificates_come_from_a_certificate_service_where_there_is_one() {
    let mut bed = Bed::new();
    let client = bed.pod("client", 0, Enrol::Mesh);
    let server = bed.pod("server", 1, Enrol::Mesh);
    bed.serve_web(&server, "hello");
    bed.use_certificate_service();
    bed.start();
    let url = format!("http://{}:8080/", server.v4);
    assert_eq!(client.curl(&url), Ok(format!("hello, client {}\n", client.v4)));
    record(&bed, 1, &["inbound", "spiffe://cluster.local/ns/demo/sa/client"]);
    assert!(!bed.ca_dir().exists(), "no development CA was made");
}
