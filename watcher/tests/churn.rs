//! Pods that come and go: how their first connection is handled, and that they leave nothing.

mod identity;
mod load;

use std::{
    fmt::Write as _,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use testbed::{
    command::run,
    fakes::Received,
    netns::TestNetns,
    process::KillOnDrop,
    program::{TestSize, binary},
    wait::wait_for,
    watcher_node::WatcherNode,
};

/// A uid as the API server makes them.
fn uid(number: usize) -> String {
    format!("{:08x}-0000-4000-8000-{:012x}", std::process::id(), number)
}

fn pods_dir(node: &WatcherNode) -> PathBuf {
    node.cgroup.join("pods")
}

/// Writes a pods file of these uids, which names no cgroup.
fn publish(node: &WatcherNode, uids: &[String], enrolled: bool, more: &str) {
    let mut text = String::from(if uids.is_empty() { "pods: []\n" } else { "pods:\n" });
    let label = if enrolled { "ambient" } else { "none" };
    for (i, uid) in uids.iter().enumerate() {
        let _ = write!(
            text,
            "- uid: {uid}\n  name: p{i}\n  labels: {{istio.io/dataplane-mode: {label}}}\n{more}"
        );
    }
    let next = node.dir.path().join("pods.next");
    fs::write(&next, text).expect("pods file");
    fs::rename(next, node.dir.path().join("pods.yaml")).expect("pods file");
}

/// A netns with an address, and a default route to an interface where nothing answers.
fn network(node: &WatcherNode, number: usize) -> TestNetns {
    let netns = TestNetns::new(format!("{}-n{number}", node.name));
    let (a, b) = (number / 250, number % 250 + 1);
    netns.run(&format!(
        "ip link add e0 type veth peer name e1
         ip addr add 10.{}.{a}.{b}/32 dev e0
         ip link set e0 up
         ip route add default dev e0",
        100 + number % 2
    ));
    netns
}

/// Starts a process in a cgroup that is made right before; the first thing it does in it is `then`.
fn start_in(network: &TestNetns, container: &Path, then: &str) -> Child {
    let script = format!("mkdir -p {0}; echo $$ > {0}/cgroup.procs; {then}", container.display());
    network
        .command("bash")
        .args(["-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nsenter")
}

/// A pod that lasts in each of these.
fn start_each(node: &WatcherNode, networks: &[TestNetns], uids: &[String]) -> Vec<KillOnDrop> {
    let start = |(network, uid): (&TestNetns, &String)| {
        let dir = pods_dir(node).join(format!("pod{uid}/main"));
        KillOnDrop(start_in(network, &dir, "exec sleep infinity"))
    };
    networks.iter().zip(uids).map(start).collect()
}

fn remove(pod: &Path) {
    for dir in [pod.join("main"), pod.to_owned()] {
        wait_for("a cgroup to be empty", || !dir.exists() || fs::remove_dir(&dir).is_ok());
    }
}

fn end(mut child: Child) {
    let _ = child.kill();
    let _ = child.wait();
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_first_connect_of_a_new_pod_is_never_in_clear() {
    let mut node = WatcherNode::new();
    let pods = TestSize::get().pick(100, 2000);
    let uids: Vec<String> = (0..pods).map(uid).collect();
    publish(&node, &uids, true, "");
    node.start(&["--events", "lifecycle"]);
    wait_for("the watcher to know the pods", || node.status()["ready"].as_bool().filter(|ready| *ready));
    let network = network(&node, 0);
    let mut escaped = Vec::new();
    for uid in &uids {
        let pod = pods_dir(&node).join(format!("burstable/pod{uid}"));
        // No host has this address: a connection that leaves the pod times out, with another error.
        let connect = "exec 3<>/dev/tcp/192.0.2.1/80";
        let output =
            start_in(&network, &pod.join("main"), &format!("timeout 2 bash -c '{connect}'; {connect}"))
                .wait_with_output()
                .expect("nsenter");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if said.matches("connect: Operation not permitted").count() != 2 {
            escaped.push(said);
        }
        remove(&pod);
    }
    assert!(escaped.is_empty(), "{} of {pods} escaped: {}\n{}", escaped.len(), escaped[0], node.log());
    // And what was closed in the kernel is opened there, too.
    publish(&node, &[], true, "");
    wait_for("the maps to be empty", || node.status()["pods"].as_array().unwrap().is_empty().then_some(()));
    assert_eq!(node.status()["events"]["lost"], 0);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn every_source_of_events_finds_a_new_pod() {
    for source in ["lifecycle", "scan", "connector"] {
        let mut node = WatcherNode::new();
        publish(&node, &[uid(0)], true, "");
        if source == "connector" && !connector_is_there() {
            assert!(node.refuses(&["--events", source]).contains("LISTEN"));
            continue;
        }
        node.start(&["--events", source]);
        let received = node.tunnel().take_all();
        let network = network(&node, 0);
        let pod = pods_dir(&node).join(format!("pod{}", uid(0)));
        let process = start_in(&network, &pod.join("main"), "exec sleep infinity");
        node.wait_state(0, "open", "");
        assert_eq!(node.status()["events"]["source"], source);
        // Its only process ends, and its cgroup goes: it leaves the mesh long before the next scan.
        end(process);
        remove(&pod);
        node.wait_state(0, "closed", "no_cgroup");
        drop(node);
        let received = received.join().unwrap();
        let adds = received.iter().filter(|received| matches!(received, Received::Add(..))).count();
        assert!(adds == 1 && received.last() == Some(&Received::Del(uid(0))), "{source}: {received:?}");
    }
}

/// GETs a path of the watcher's own port, which it chose by itself.
fn http(node: &WatcherNode, path: &str) -> String {
    let log = node.log();
    let at = log.split("address=").nth(1).expect("the address in the log");
    let mut stream = TcpStream::connect(at.split_whitespace().next().unwrap()).expect("connect");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: w\r\nConnection: close\r\n\r\n").expect("request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answer");
    answer
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn ready_means_that_every_pod_of_the_source_was_looked_at() {
    let mut node = WatcherNode::new();
    let network = network(&node, 0);
    let _process =
        KillOnDrop(start_in(&network, &pods_dir(&node).join(format!("pod{}/main", uid(0))), "sleep 1000"));
    // A source that cannot say anything yet.
    fs::write(node.dir.path().join("pods.yaml"), "pods: [").expect("pods file");
    node.start(&["--metrics-address", "127.0.0.1:0"]);
    assert!(http(&node, "/healthz/ready").starts_with("HTTP/1.1 503"));
    assert_eq!(node.status()["ready"], false);
    publish(&node, &[uid(0)], true, "");
    wait_for("the watcher to be ready", || {
        http(&node, "/healthz/ready").starts_with("HTTP/1.1 200").then_some(())
    });
    // By then the pod is found, and closed.
    assert!(http(&node, "/metrics").contains("adit_watcher_pods{state=\"closed\"} 1"));
    let received = node.tunnel().take_all();
    node.wait_state(0, "open", "");
    let metrics = http(&node, "/metrics");
    for line in [
        "adit_watcher_pods{state=\"open\"} 1",
        "adit_watcher_pods{state=\"closed\"} 0",
        "adit_watcher_tunnels 1",
        "adit_watcher_enrolment_duration_seconds_count 1",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
    drop(node);
    received.join().unwrap();
}

/// Whether the kernel answers a LISTEN of the process connector from here, as preflight finds.
fn connector_is_there() -> bool {
    let output = Command::new(binary("watcher")).args(["preflight", "-o", "json"]).output().expect("watcher");
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = answer["checks"].as_array().expect("checks");
    let connector = checks.iter().find(|check| check["name"] == "process connector").expect("the check");
    !connector["found"].as_str().expect("text").starts_with("not available")
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn sixty_labels_at_once_take_milliseconds() {
    let mut node = WatcherNode::new();
    let pods = TestSize::get().pick(60, 200);
    let uids: Vec<String> = (0..pods).map(uid).collect();
    let networks: Vec<TestNetns> = (0..pods).map(|number| network(&node, number)).collect();
    let _processes = start_each(&node, &networks, &uids);
    publish(&node, &uids, false, "");
    node.start(&[]);
    let tunnel = node.tunnel();
    assert!(tunnel.take_snapshot().is_empty());
    for some in [1, 20, pods] {
        let since = Instant::now();
        publish(&node, &uids[..some], true, "");
        let mut first = None;
        for _ in 0..some {
            assert!(matches!(tunnel.take(), Received::Add(..)));
            first.get_or_insert_with(|| since.elapsed());
        }
        let last = since.elapsed();
        eprintln!("{some} pods: first handed over after {:?}, last after {last:?}", first.unwrap());
        // The measured time is printed. The assertion only excludes that a scan or a timeout was
        // waited for.
        assert!(last < Duration::from_secs(5));
        publish(&node, &uids, false, "");
        for _ in 0..some {
            assert!(matches!(tunnel.take(), Received::Del(_)));
        }
        wait_for("the netns to be put back", || {
            node.status()["draining"].as_array().is_some_and(Vec::is_empty).then_some(())
        });
    }
}

/// Pods that come are closed by the programs themselves, which no scan may take for a change that
/// others made.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn scans_take_a_hundred_pods_that_come_for_nobodys_change() {
    let mut node = WatcherNode::new();
    let uids: Vec<String> = (0..100).map(uid).collect();
    publish(&node, &uids, true, "");
    node.start(&["--events", "lifecycle", "--rescan", "1"]);
    wait_for("the watcher to know the pods", || node.status()["ready"].as_bool().filter(|ready| *ready));
    // As long as it takes for some scans to fall among them.
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(5) {
        for uid in &uids {
            fs::create_dir_all(pods_dir(&node).join(format!("pod{uid}"))).expect("cgroup");
        }
        for uid in &uids {
            fs::remove_dir(pods_dir(&node).join(format!("pod{uid}"))).expect("cgroup");
        }
    }
    let log = node.log();
    let told: Vec<&str> = log.lines().filter(|line| line.contains("another program changed")).collect();
    assert!(told.is_empty(), "{told:#?}");
}
