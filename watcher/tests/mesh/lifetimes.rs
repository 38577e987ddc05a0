//! Pods, watchers and tunnels that come and go under traffic.

use super::*;

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_label_comes_and_goes_under_load_without_a_failed_request() {
    let (mut cluster, client, server) = across_nodes();
    // Not the service's address: it leads nowhere outside the mesh.
    let url = format!("http://{}:8080/", server.v4);
    let requests = RequestLoop::start(&client, &url, &cluster.dir.path().join("loop"));
    for _ in 0..25 {
        for enrol in [Enrol::Plain, Enrol::Mesh] {
            cluster.label(&["client", "server"], enrol);
            requests.more(3);
        }
    }
    let (count, failed) = requests.finish();
    assert!(failed.is_empty(), "{failed:?} of {count}");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn watchers_that_are_killed_while_pods_come_and_go_stop_no_traffic() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let server = cluster.pod("server", 1, Enrol::Mesh);
    let others = ["p0", "p1", "p2", "p3"];
    for (i, name) in others.iter().enumerate() {
        cluster.pod(name, i % 2, Enrol::Plain);
    }
    cluster.serve_web(&server, "hello");
    cluster.start();
    let url = format!("http://{}:8080/", server.v4);
    let requests = RequestLoop::start(&client, &url, &cluster.dir.path().join("loop"));
    for round in 0..10_usize {
        // Half of the others change; the watcher dies somewhere in the middle of that.
        for (i, name) in others.iter().enumerate() {
            let enrol = if (i / 2 + round) % 2 == 0 { Enrol::Mesh } else { Enrol::Plain };
            cluster.pods.iter_mut().find(|pod| pod.name == *name).expect("pod").enrol = enrol;
        }
        let node = round % 2;
        cluster.publish_pods(node);
        std::thread::sleep(Duration::from_millis(round as u64 * 3));
        cluster.replace_watcher(node, Duration::from_millis(20 * (round as u64 % 3)));
        cluster.publish_pods(1 - node);
        cluster.wait_settled();
        requests.more(3);
    }
    let (count, failed) = requests.finish();
    assert!(failed.is_empty(), "{failed:?} of {count}");
    // Not one of them went in clear.
    let records = || -> (usize, usize) {
        let log = cluster.nodes[1].access_log();
        let inbound = || log.iter().filter(|line| line.contains("inbound") && line.contains("complete"));
        (inbound().filter(|line| line.contains("sa/client")).count(), inbound().count())
    };
    wait_for("a record of each request", || records().0 == count);
    assert_eq!(records(), (count, count));
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_killed_tunnel_is_refused_or_passed_by_as_the_pod_chose_and_comes_back() {
    let mut cluster = Cluster::new();
    let closed = cluster.pod("closed", 0, Enrol::Mesh);
    let open = cluster.pod("open", 0, Enrol::Mesh);
    let plain = cluster.pod("plain", 1, Enrol::Plain);
    cluster.pods[1].fail_open = true;
    cluster.serve_web(&plain, "hello");
    cluster.start();
    let url = format!("http://{}:8080/", plain.v4);
    assert!(closed.curl(&url).is_ok() && open.curl(&url).is_ok());

    cluster.nodes[0].tunnel.as_mut().expect("tunnel").signal(Signal::SIGKILL);
    wait_at_most(Duration::from_secs(2), "the open pod to pass in clear", || open.curl(&url).ok());
    let since = Instant::now();
    closed.curl(&url).expect_err("closed");
    assert!(since.elapsed() < Duration::from_secs(2), "refused at once, not by a timeout");

    let (mesh, ca) = (cluster.mesh_file(), cluster.ca_dir());
    cluster.nodes[0].start_tunnel(&mesh, &ca);
    wait_at_most(Duration::from_secs(2), "the closed pod to be served again", || closed.curl(&url).ok());
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn pods_follow_their_fail_mode_also_when_watcher_and_tunnel_are_both_killed() {
    let mut cluster = Cluster::new();
    let closed = cluster.pod("closed", 0, Enrol::Mesh);
    let open = cluster.pod("open", 0, Enrol::Mesh);
    let plain = cluster.pod("plain", 1, Enrol::Plain);
    cluster.pods[1].fail_open = true;
    cluster.serve_web(&plain, "hello");
    cluster.serve_web(&open, "open");
    cluster.start();
    let url = format!("http://{}:8080/", plain.v4);
    assert!(closed.curl(&url).is_ok() && open.curl(&url).is_ok());

    cluster.nodes[0].watcher.as_mut().expect("watcher").signal(Signal::SIGKILL);
    cluster.nodes[0].tunnel.as_mut().expect("tunnel").signal(Signal::SIGKILL);
    wait_at_most(Duration::from_secs(2), "the open pod to pass in clear", || open.curl(&url).ok());
    let inbound = format!("http://{}:8080/", open.v4);
    wait_at_most(Duration::from_secs(2), "the open pod to be reached in clear", || plain.curl(&inbound).ok());
    closed.curl(&url).expect_err("closed");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn open_connections_survive_enrolling_and_leaving() {
    let (mut cluster, client, server) = across_nodes();
    let echo = "import socket\ns=socket.socket(socket.AF_INET6)\ns.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1)\n\
                s.bind(('::',9000))\ns.listen()\n\
                import threading\ndef serve(c):\n  while True:\n    b=c.recv(4096)\n    if not b: return\n    c.sendall(b)\n\
                while True:\n  c,_=s.accept()\n  threading.Thread(target=serve,args=(c,),daemon=True).start()\n";
    let echo = server.spawn("echo", &["python3", "-c", echo], &cluster.dir.path().join("echo.log"));
    cluster.keep(echo);
    wait_for("the echo server to listen", || {
        server.exec(&["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/9000"]).status.success().then_some(())
    });
    let go = |name: &str| cluster.dir.path().join(name);
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
        client.spawn("dial", &["python3", "-c", &program], &cluster.dir.path().join(log))
    };
    let says = |log: &str, word: &str| {
        let log = cluster.dir.path().join(log);
        wait_for(&format!("{word} in {}", log.display()), || {
            let text = fs::read_to_string(&log).ok()?;
            assert!(!text.contains("Error"), "{text}");
            text.contains(word).then_some(())
        });
    };
    let meshed = dial("meshed.log", &meshed_go);
    says("meshed.log", "up");
    let dir = cluster.dir.path().to_owned();
    cluster.label(&["client", "server"], Enrol::Plain);
    fs::write(&meshed_go, "").expect("go");
    let says = |log: &str, word: &str| {
        let log = dir.join(log);
        wait_for(&format!("{word} in {}", log.display()), || {
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
    cluster.label(&["client", "server"], Enrol::Mesh);
    fs::write(&plain_go, "").expect("go");
    says("plain.log", "survived");
    drop(plain);
}

/// What a pod's netns looks like from inside, and what is pinned.
fn traces(cluster: &Cluster) -> Vec<String> {
    let mut seen = Vec::new();
    for pod in &cluster.pods {
        for line in [
            "ip rule show",
            "ip -6 rule show",
            "ip route show table all",
            "ip -6 route show table all",
            "ss -Hltn",
            "sysctl net.ipv4.tcp_fwmark_accept net.ipv4.fwmark_reflect net.ipv6.fwmark_reflect net.ipv4.tcp_migrate_req net.ipv4.tcp_tw_reuse",
        ] {
            let output = pod.exec(&line.split(' ').collect::<Vec<_>>());
            // A question that fails would answer alike before and after.
            assert!(output.status.success(), "{line}: {}", text(&output));
            // Link-local addresses and their routes come by themselves, some time after the
            // interface.
            let text = text(&output);
            let lines = text.lines().filter(|line| !line.contains("fe80:"));
            seen.extend(lines.map(|entry| format!("{} {line}: {entry}", pod.name)));
        }
    }
    for entry in fs::read_dir(cluster.bpffs()).expect("bpffs").flatten() {
        seen.push(format!("pinned: {}", entry.path().display()));
    }
    seen.sort();
    seen
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn after_killing_everything_uninstall_leaves_nothing() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let server = cluster.pod("server", 1, Enrol::Mesh);
    cluster.serve_web(&server, "hello");
    let before = traces(&cluster);
    cluster.start();
    let url = format!("http://{}:8080/", server.v4);
    assert_eq!(client.curl(&url), Ok(format!("hello, client {}\n", client.v4)));
    assert_ne!(traces(&cluster), before, "enrolling leaves traces to be removed");
    for node in &mut cluster.nodes {
        for program in [&mut node.tunnel, &mut node.watcher] {
            program.as_mut().expect("running").kill();
        }
    }
    client.curl(&url).expect_err("still closed");
    for node in &cluster.nodes {
        let (bpffs, run_dir) = (cluster.bpffs(), node.dir.join("run"));
        let path = |path: &std::path::Path| path.to_str().expect("UTF-8 path").to_owned();
        let (bpffs, run_dir) = (path(&bpffs), path(&run_dir));
        let line = ["uninstall", "--node", &node.pins_name, "--bpffs", &bpffs, "--run-dir", &run_dir];
        let output = node.watcher_command(&line);
        assert!(output.status.success(), "{}", text(&output));
    }
    assert_eq!(traces(&cluster), before);
    assert_eq!(client.curl(&url), Ok(format!("hello, client {}\n", client.v4)), "in clear");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_tunnels_successor_takes_over_under_load_without_a_failed_request() {
    let (mut cluster, client, server) = across_nodes();
    let url = format!("http://{}:8080/", server.v4);
    let requests = RequestLoop::start(&client, &url, &cluster.dir.path().join("loop"));
    let (mesh, ca) = (cluster.mesh_file(), cluster.ca_dir());
    for node in 0..2 {
        requests.more(10);
        // In a cluster each has a network of its own; here they share the node's.
        let addresses = [
            ("ADMIN_ADDR", "127.0.0.1:16000"),
            ("STATS_ADDR", "127.0.0.1:16020"),
            ("READINESS_ADDR", "127.0.0.1:16021"),
        ];
        let node = &mut cluster.nodes[node];
        let successor = node.spawn_tunnel(&mesh, &ca, &addresses);
        wait_for("the successor to be ready", || {
            (node.http("http://127.0.0.1:16021/healthz/ready").0 == 200).then_some(())
        });
        let mut first = node.tunnel.replace(successor).expect("the first tunnel");
        assert!(first.stop(Duration::from_secs(10)), "the first tunnel did not end by itself");
        requests.more(10);
    }
    let (count, failed) = requests.finish();
    assert!(failed.is_empty(), "{failed:?} of {count}");
}
