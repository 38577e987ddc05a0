//! A new pod's first connection arrives, as the pod.

use std::{fs, path::PathBuf, time::Duration};

use nix::sys::signal::Signal;
use testbed::{
    cluster::{Cluster, ClusterPod, Enrol, STRICT},
    command::text,
    label_latency::SANDBOX_TO_CONTAINER,
    netns::TestNetns,
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
        let entry = format!(
            "- uid: {uid}\n  name: client\n  namespace: demo\n  serviceAccount: client\n  \
             labels: {{istio.io/dataplane-mode: ambient}}\n{more}"
        );
        cluster.nodes[0].write_pods(&entry);
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

/// A pod whose processes the watcher does not see: it stands still from when it expects the pod, until
/// the test lets it go on.
struct LatePod {
    uid: &'static str,
    cgroup: PathBuf,
    place: ClusterPod,
    log: PathBuf,
    application: Option<Process>,
}

impl LatePod {
    const UID: &str = "00000000-0000-4000-8000-000000000007";

    /// Expected on the second node, where `place` has its netns and addresses.
    fn expected(cluster: &Cluster, place: &ClusterPod) -> Self {
        let (node, uid) = (&cluster.nodes[1], Self::UID);
        let entry = format!(
            "- uid: {uid}\n  name: {name}\n  namespace: demo\n  serviceAccount: {name}\n  \
             failMode: closed\n  labels: {{istio.io/dataplane-mode: ambient}}\n",
            name = place.name,
        );
        node.write_pods(&entry);
        wait_for("the pod to be expected", || node.status().contains(uid).then_some(()));
        node.watcher.as_ref().expect("running").signal(Signal::SIGSTOP);
        let cgroup = node.pods_cgroup().join(format!("burstable/pod{uid}"));
        let log = cluster.dir.path().join("late.log");
        Self { uid, cgroup, place: place.clone(), log, application: None }
    }

    /// Its application, which answers on port 8080 of one family.
    fn listen(&mut self, family: &str, netns: &TestNetns) {
        const SERVE: &str = "import socket, sys
s = socket.create_server(('', 8080), backlog=1000) if sys.argv[1] == '4' else socket.create_server(('::', 8080), family=socket.AF_INET6, backlog=1000)
while True:
    c, peer = s.accept()
    try:
        c.recv(4096); c.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\nhello')
    except OSError: pass
    c.close()";
        fs::create_dir_all(self.cgroup.join("main")).expect("cgroup");
        let placement = Placement::in_cgroup(&self.cgroup.join("main")).in_netns(netns);
        let command = placement.command(&["python3", "-c", SERVE, family]);
        self.application = Some(Process::spawn("late", command, &self.log));
        let own = if family == "4" { "http://127.0.0.1:8080/" } else { "http://[::1]:8080/" };
        // To itself it may talk at once.
        wait_for("the application to listen", || netns.curl(own).1.contains("hello").then_some(()));
    }

    fn url(&self, family: &str) -> String {
        let ClusterPod { v4, v6, .. } = &self.place;
        if family == "4" { format!("http://{v4}:8080/") } else { format!("http://[{v6}]:8080/") }
    }

    fn end_application(&mut self) {
        if let Some(mut application) = self.application.take() {
            application.kill();
        }
        let main = self.cgroup.join("main");
        wait_for("the cgroup to be empty", || fs::remove_dir(&main).is_ok());
    }

    fn end(mut self) {
        self.end_application();
        wait_for("the cgroup to be empty", || fs::remove_dir(&self.cgroup).is_ok());
    }
}

fn let_go_on(cluster: &Cluster) {
    cluster.nodes[1].watcher.as_ref().expect("running").signal(Signal::SIGCONT);
}

/// The watcher is late: it sees the pod's first process only when that has listened for a while.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn nobody_reaches_a_new_pod_before_its_netns_is_known() {
    for family in ["4", "6"] {
        let mut cluster = Cluster::new();
        let client = cluster.pod("client", 0, Enrol::Plain);
        // For its netns and its addresses.
        let place = cluster.pod("place", 1, Enrol::Plain);
        cluster.start();
        let mut late = LatePod::expected(&cluster, &place);
        late.listen(family, &place.netns);
        let url = late.url(family);
        // By its own address, too.
        assert!(place.netns.curl(&url).1.contains("hello"), "from the pod itself");
        let answer = client.exec(&["curl", "-sS", "--max-time", "2", &url]);
        assert!(!answer.status.success(), "answered before anybody knew the netns: {}", text(&answer));

        let_go_on(&cluster);
        wait_for("an answer through the tunnel", || client.curl(&url).ok());
        let from = if family == "4" { &client.v4 } else { &client.v6 };
        let recorded = |line: &String| line.contains("inbound") && line.contains(from.as_str());
        wait_for("its record", || cluster.nodes[1].access_log().iter().any(recorded).then_some(()));
        late.end();
    }
}

/// Connects all the time, and says how often the application answered.
const FLOOD: &str = "import os, select, socket, sys
family, to, stop = (socket.AF_INET, sys.argv[1], sys.argv[2]) if ':' not in sys.argv[1] else (socket.AF_INET6, sys.argv[1], sys.argv[2])
tried = answered = 0
while not os.path.exists(stop):
    poll, sockets = select.epoll(), {}
    for _ in range(64):
        s = socket.socket(family)
        s.setblocking(False)
        s.connect_ex((to, 8080))
        poll.register(s, select.EPOLLOUT)
        sockets[s.fileno()] = s
    tried += 64
    for fd, events in poll.poll(0.002, 64):
        s = sockets[fd]
        if events & (select.EPOLLERR | select.EPOLLHUP): continue
        try:
            s.settimeout(1)
            s.sendall(b'GET / HTTP/1.0\\r\\n\\r\\n')
            answered += b'hello' in s.recv(4096)
        except OSError: pass
    for s in sockets.values(): s.close()
    poll.close()
    if tried == 64: print('began', flush=True)
print(tried, answered, flush=True)";

/// Whether the watcher of the second node says `state` of the pod, and `reason` if it gives one.
fn is(cluster: &Cluster, pod: &LatePod, state: &str, reason: &str) -> Option<()> {
    let status: serde_json::Value = serde_json::from_str(&cluster.nodes[1].status()).ok()?;
    let pods = status["pods"].as_array()?;
    let found = pods.iter().find(|other| other["uid"] == pod.uid)?;
    (found["state"] == state && found["reason"]["code"].as_str().unwrap_or_default() == reason).then_some(())
}

/// Starts [`FLOOD`] towards the pod, lets the watcher go on, and returns how many connections were
/// tried and answered until the watcher says that a tunnel serves the pod.
fn flood_until_served(cluster: &Cluster, client: &ClusterPod, late: &LatePod, family: &str) -> (u64, u64) {
    let (stop, log) = (cluster.dir.path().join("stop"), cluster.dir.path().join("flood.log"));
    let _ = fs::remove_file(&log);
    let to = if family == "4" { &late.place.v4 } else { &late.place.v6 };
    let mut flood =
        client.spawn("flood", &["python3", "-c", FLOOD, to, stop.to_str().expect("UTF-8 path")], &log);
    wait_for("the flood", || fs::read_to_string(&log).is_ok_and(|said| said.contains("began")).then_some(()));
    let_go_on(cluster);
    wait_for("the pod to be served", || is(cluster, late, "open", ""));
    fs::write(&stop, "").expect("file");
    flood.wait();
    fs::remove_file(&stop).expect("file");
    let said = fs::read_to_string(&log).expect("log");
    let mut numbers = said.lines().last().into_iter().flat_map(str::split_whitespace);
    let mut next = || numbers.next().and_then(|number| number.parse().ok());
    (next().expect("tried"), next().expect("answered"))
}

/// Under a strict policy a client without identity is refused. So an answer is one past the tunnel,
/// at whichever moment of the pod's arrival the connection was opened.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn nobody_gets_past_the_policy_of_a_pod_that_is_being_enrolled() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Plain);
    // A netns each: one that a pod had before may still be steered.
    let places = ["one", "two", "three", "four"].map(|name| cluster.pod(name, 1, Enrol::Plain));
    cluster.policies = STRICT.into();
    cluster.start();
    let mut answers = Vec::new();
    for (place, family) in places.iter().zip(["4", "6", "4", "6"]) {
        let mut late = LatePod::expected(&cluster, place);
        late.listen(family, &place.netns);
        answers.push(flood_until_served(&cluster, &client, &late, family));
        late.end();
    }
    eprintln!("tried and answered: {answers:?}");
    assert!(answers.iter().all(|(_, answered)| *answered == 0), "past the policy: {answers:?}");
}

/// The kubelet makes a pod's sandbox anew, with another netns in the same cgroup, before the watcher
/// sees it; once after it saw the old one end, and once while it saw nothing.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_with_a_new_sandbox_is_closed_both_ways_until_its_netns_is_known() {
    for sees_the_end in [true, false] {
        let mut cluster = Cluster::new();
        let client = cluster.pod("client", 0, Enrol::Plain);
        let [first, second] = ["first", "second"].map(|name| cluster.pod(name, 1, Enrol::Plain));
        cluster.serve_web(&client, "hello");
        cluster.start();
        let mut pod = LatePod::expected(&cluster, &first);
        pod.listen("4", &first.netns);
        let_go_on(&cluster);
        wait_for("the pod to be served", || is(&cluster, &pod, "open", ""));
        wait_for("an answer through the tunnel", || client.curl(&pod.url("4")).ok());

        let stop = || cluster.nodes[1].watcher.as_ref().expect("running").signal(Signal::SIGSTOP);
        if !sees_the_end {
            stop();
        }
        pod.end_application();
        if sees_the_end {
            wait_for("the watcher to see that", || is(&cluster, &pod, "closed", "no_process"));
            stop();
        }
        pod.place = second.clone();
        pod.listen("4", &second.netns);
        let answer = client.exec(&["curl", "-sS", "--max-time", "2", &pod.url("4")]);
        assert!(!answer.status.success(), "{sees_the_end}: answered in a netns that nobody knows");
        let placement = Placement::in_cgroup(&pod.cgroup.join("main")).in_netns(&second.netns);
        let out = format!("http://{}:8080/", client.v4);
        let answer = placement.command(&["curl", "-sS", "--max-time", "2", &out]).output().expect("curl");
        assert!(!answer.status.success(), "{sees_the_end}: it got out in clear: {}", text(&answer));

        let_go_on(&cluster);
        wait_for("the pod to be served", || is(&cluster, &pod, "open", ""));
        wait_for("an answer through the tunnel", || client.curl(&pod.url("4")).ok());
        let answer = placement.command(&["curl", "-sS", "--max-time", "2", &out]).output().expect("curl");
        assert!(answer.status.success(), "{sees_the_end}: {}", text(&answer));
        pod.end();
    }
}
