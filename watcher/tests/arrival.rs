//! A new pod's first connection arrives, as the pod.

use std::{fs, time::Duration};

use nix::sys::signal::Signal;
use testbed::{
    cluster::{Cluster, Enrol},
    command::text,
    label_latency::SANDBOX_TO_CONTAINER,
    process::{Placement, Process},
    program::TestSize,
    wait::{try_wait, wait_for},
};

/// Starts `count` pods one after the other, all at the address of `client`, whose first instruction
/// is a connect; how many were answered, how many of these as themselves, and the slowest.
fn first_connects(cluster: &Cluster, count: usize, more: &str) -> (usize, usize, Duration) {
    let (client, server) = (&cluster.pods[0], &cluster.pods[1]);
    let as_client = |line: &&String| line.contains("inbound") && line.contains("sa/client");
    let recorded = || cluster.nodes[1].access_log().iter().filter(as_client).count();
    let before = recorded();
    let (mut answered, mut slowest) = (0, Duration::ZERO);
    for number in 0..count {
        let uid = format!("{number:08x}-0000-4000-8000-{:012x}", more.len());
        let pod = cluster.nodes[0].pods_cgroup().join(format!("burstable/pod{uid}"));
        let file = format!(
            "pods:\n- uid: {uid}\n  name: client\n  namespace: demo\n  serviceAccount: client\n  \
             labels: {{istio.io/dataplane-mode: ambient}}\n{more}"
        );
        let next = cluster.nodes[0].pods_file().with_extension("next");
        fs::write(&next, file).expect("pods file");
        fs::rename(&next, cluster.nodes[0].pods_file()).expect("pods file");
        for below in ["pause", "main"] {
            fs::create_dir_all(pod.join(below)).expect("cgroup");
        }
        let log = cluster.dir.path().join("pause.log");
        let placed = |container: &str| Placement::in_cgroup(&pod.join(container)).in_netns(&client.netns);
        let pause = Process::spawn("pause", placed("pause").command(&["sleep", "1000"]), &log);
        // No wait for the watcher: a container runtime does not wait either.
        std::thread::sleep(SANDBOX_TO_CONTAINER);
        let first = format!(
            "s=$EPOCHREALTIME; exec 3<>/dev/tcp/{}/8080; e=$EPOCHREALTIME; echo $((${{e/./}} - ${{s/./}}));
             printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; timeout 10 cat <&3",
            server.v4
        );
        let output = placed("main").command(&["bash", "-c", &first]).output().expect("sh");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if said.contains(&format!("client {}", client.v4)) {
            answered += 1;
            let took = said.lines().next().and_then(|line| line.parse().ok()).map(Duration::from_micros);
            slowest = slowest.max(took.unwrap_or_default());
        } else {
            eprintln!("pod {number}: {said}{}", String::from_utf8_lossy(&output.stderr));
        }
        drop(pause);
        for dir in [pod.join("pause"), pod.join("main"), pod] {
            wait_for("the cgroup to be empty", || fs::remove_dir(&dir).is_ok());
        }
    }
    // Records are written when connections end.
    let mut as_themselves = 0;
    try_wait(Duration::from_secs(3), || {
        as_themselves = recorded() - before;
        as_themselves >= answered
    });
    if as_themselves < answered {
        // Which of both it is: a connection past the tunnels, or one without its record.
        let of_client = cluster.nodes[0].access_log().iter().filter(|line| line.contains("outbound")).count();
        let server = cluster.nodes[1].access_log();
        let nobodys: Vec<&String> = server.iter().filter(|line| !as_client(line)).collect();
        eprintln!("{of_client} records of the client's tunnel; the server's of others: {nobodys:#?}");
    }
    (answered, as_themselves, slowest)
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_first_connect_of_every_new_pod_arrives_as_that_pod() {
    let pods = TestSize::get().pick(30, 1000);
    let mut cluster = Cluster::new();
    let _client = cluster.pod("client", 0, Enrol::Mesh);
    let server = cluster.pod("server", 1, Enrol::Mesh);
    cluster.serve_web(&server, "hello");
    cluster.start();
    for (mode, more) in [("closed", "  failMode: closed\n"), ("open", "  failMode: open\n")] {
        let (answered, as_themselves, slowest) = first_connects(&cluster, pods, more);
        eprintln!(
            "{mode}: {answered} of {pods} answered, {as_themselves} with their identity, {} escaped, slowest connect {slowest:?}",
            answered - as_themselves
        );
        // On a machine that does much else a tunnel may be late: then a closed pod is refused,
        // never passed by.
        assert!(answered * 10 >= pods * 9, "{mode}: {answered} of {pods}\n{}", cluster.nodes[0].story());
        assert!(mode == "open" || as_themselves == answered, "{mode}\n{}", cluster.nodes[0].story());
    }
}

/// The watcher is late: it sees the pod's first process only when that has listened for a while.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn nobody_reaches_a_new_pod_before_its_netns_is_known() {
    const SERVE: &str = "import socket, sys
s = socket.create_server(('', 8080)) if sys.argv[1] == '4' else socket.create_server(('::', 8080), family=socket.AF_INET6)
while True:
    c, peer = s.accept(); c.recv(4096); c.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\nhello'); c.close()";
    for family in ["4", "6"] {
        let mut cluster = Cluster::new();
        let client = cluster.pod("client", 0, Enrol::Plain);
        // For its netns and its addresses.
        let place = cluster.pod("place", 1, Enrol::Plain);
        cluster.start();
        let node = &cluster.nodes[1];
        let uid = "00000000-0000-4000-8000-000000000007";
        let file = format!(
            "pods:\n- uid: {uid}\n  name: place\n  namespace: demo\n  serviceAccount: place\n  \
             failMode: closed\n  labels: {{istio.io/dataplane-mode: ambient}}\n"
        );
        let next = node.pods_file().with_extension("next");
        fs::write(&next, file).expect("pods file");
        fs::rename(&next, node.pods_file()).expect("pods file");
        wait_for("the pod to be expected", || node.status().contains(uid).then_some(()));
        let watcher = node.watcher.as_ref().expect("running");
        watcher.signal(Signal::SIGSTOP);

        let pod = node.pods_cgroup().join(format!("burstable/pod{uid}"));
        fs::create_dir_all(pod.join("main")).expect("cgroup");
        let log = cluster.dir.path().join("late.log");
        let command = Placement::in_cgroup(&pod.join("main"))
            .in_netns(&place.netns)
            .command(&["python3", "-c", SERVE, family]);
        let mut late = Process::spawn("late", command, &log);
        let (url, own) = match family {
            "4" => (format!("http://{}:8080/", place.v4), "http://127.0.0.1:8080/".to_owned()),
            _ => (format!("http://[{}]:8080/", place.v6), "http://[::1]:8080/".to_owned()),
        };
        // To itself it may talk at once, over the loopback and by its own address.
        wait_for("the application to listen", || place.netns.curl(&own).1.contains("hello").then_some(()));
        assert!(place.netns.curl(&url).1.contains("hello"), "from the pod itself");
        let answer = client.exec(&["curl", "-sS", "--max-time", "2", &url]);
        assert!(!answer.status.success(), "answered before anybody knew the netns: {}", text(&answer));

        watcher.signal(Signal::SIGCONT);
        wait_for("an answer through the tunnel", || client.curl(&url).ok());
        let from = if family == "4" { &client.v4 } else { &client.v6 };
        let recorded = |line: &String| line.contains("inbound") && line.contains(from.as_str());
        wait_for("its record", || node.access_log().iter().any(recorded).then_some(()));
        late.kill();
        for dir in [pod.join("main"), pod] {
            wait_for("the cgroup to be empty", || fs::remove_dir(&dir).is_ok());
        }
    }
}
