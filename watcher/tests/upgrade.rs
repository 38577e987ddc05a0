//! What a watcher finds that another version left, or that nobody watched for a while: nothing
//! opens, and nothing that was served is refused.

use std::{fs, net::TcpListener, process::Command, time::Duration};

use adit_ebpf_common::maps::{ALL, CGROUP_INFO, Keeps, MapSpec, POD_BY_ADDR, POD_BY_NETNS, SETTINGS};
use adit_ebpf_loader::pin_name;
use testbed::{
    fakes::FakeTunnel,
    process::{Placement, Process},
    wait::{LIMIT, try_wait, wait_at_most, wait_for},
    watcher_node::WatcherNode,
};

/// A process of pod `number` that dials a neighbour to whom there is no way, and prints what happens
/// whenever that changes: `carried` by the tunnel, `EPERM` where the programs refuse,
/// `EHOSTUNREACH` in clear. A point for each connection, so that one can see it go on.
struct Dialler(Process);

impl Dialler {
    fn start(node: &WatcherNode, number: usize) -> Self {
        let pod = &node.pods[number];
        pod.netns.run(&format!("ip route replace unreachable 10.88.{number}.99"));
        let script = "
import errno, socket, sys, time
last = None
while True:
    s = socket.socket(); s.settimeout(20)
    try:
        s.connect(('10.88.NUMBER.99', 80)); said = 'carried'
    except OSError as error:
        said = errno.errorcode.get(error.errno, str(error))
    s.close()
    sys.stdout.write('.' if said == last else '\\n' + said + '\\n'); sys.stdout.flush(); last = said
    time.sleep(0.005)
"
        .replace("NUMBER", &number.to_string());
        let placed = Placement::in_cgroup(&pod.cgroup.join("container")).in_netns(&pod.netns);
        let log = node.dir.path().join(format!("dial-{}-{}.log", pod.name, rand::random::<u32>()));
        Self(Process::spawn("dialler", placed.command(&["python3", "-c", &script]), &log))
    }

    /// What happened so far, each change once.
    fn said(&self) -> Vec<String> {
        let output = self.0.output();
        output.lines().filter(|line| !line.trim_matches('.').is_empty()).map(str::to_owned).collect()
    }

    /// Waits for so many more connections.
    fn more(&self, count: usize) {
        let dials = |said: String| said.matches('.').count();
        let wanted = dials(self.0.output()) + count;
        wait_for("more connections", || dials(self.0.output()) >= wanted);
    }
}

/// The listeners of a tunnel in pod `number`, which accept and hang up.
fn listeners(node: &WatcherNode, number: usize) -> Process {
    let script = "
import select, socket
def listen(port):
    s = socket.socket(socket.AF_INET6); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.bind(('::', port)); s.listen(128); return s
all = [listen(port) for port in (15001, 15006, 15008)]
print('listening', flush=True)
while True:
    for s in select.select(all, [], [])[0]:
        s.accept()[0].close()
";
    let placed = Placement::in_cgroup(&node.cgroup.join("tunnel")).in_netns(&node.pods[number].netns);
    let log = node.dir.path().join(format!("listeners-{number}.log"));
    let _ = fs::remove_file(&log);
    let process = Process::spawn("listeners", placed.command(&["python3", "-c", script]), &log);
    wait_for("the listeners", || process.output().contains("listening"));
    process
}

/// A node with one pod, which a tunnel carries.
fn served_node() -> (WatcherNode, FakeTunnel, Process, Dialler) {
    let (node, pod) = WatcherNode::with_pod(true, &[]);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    let listeners = listeners(&node, pod);
    node.wait_state(pod, "open", "");
    let dialler = Dialler::start(&node, pod);
    wait_for("the first connection", || !dialler.said().is_empty());
    assert_eq!(dialler.said(), ["carried"]);
    (node, tunnel, listeners, dialler)
}

/// The pins of maps that are called so, as another version calls its own.
const OTHER: &str = "-9";

fn of_other_versions(node: &WatcherNode) -> Vec<String> {
    let names = node.pins().into_iter().filter_map(|pin| Some(pin.file_name()?.to_str()?.to_owned()));
    names.filter(|name| name.ends_with(OTHER)).collect()
}

/// The links run the programs of a version whose maps have another ABI number, as if this version
/// were the later one or the one before. The source of pods is away.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn an_upgrade_with_other_maps_opens_nothing_and_refuses_nobody() {
    let (mut node, mut tunnel, _listeners, dialler) = served_node();
    let all: Vec<MapSpec> = ALL.iter().copied().filter(|map| map.keeps == Keeps::Entries).collect();
    let cases = [&[CGROUP_INFO], &[SETTINGS], &[POD_BY_ADDR], &[POD_BY_NETNS], &all[..]];
    for changed in cases {
        let maps: Vec<_> = changed.iter().map(|map| map.name).collect();
        node.kill_watcher();
        drop(tunnel);
        let folder = node.bpffs().join(format!("adit/{}/maps", node.name));
        for map in changed {
            fs::rename(folder.join(pin_name(map)), folder.join(format!("{}{OTHER}", map.name)))
                .expect("its pin");
        }
        fs::write(node.dir.path().join("pods.yaml"), "pods: [\n").unwrap();
        // Twice: one that is killed before its maps are filled leaves them empty.
        for _ in 0..2 {
            node.kill_watcher();
            node.start(&["--rescan", "1"]);
            dialler.more(30);
            assert_eq!(dialler.said(), ["carried"], "{maps:?}, no source\n{}", node.log());
        }
        let problems = node.status()["problems"].to_string();
        assert!(problems.contains("another version"), "{problems}");

        node.write_pods(&[true], "");
        let taken_over = try_wait(LIMIT, || of_other_versions(&node).is_empty());
        assert!(taken_over.is_some(), "{maps:?}: {:?}\n{}", node.pins(), node.log());
        dialler.more(30);
        assert_eq!(dialler.said(), ["carried"], "{maps:?}\n{}", node.log());
        assert_eq!(node.status()["problems"], serde_json::json!([]));
        node.wait_state(0, "open", "");
        tunnel = node.tunnel();
        assert_eq!(tunnel.take_snapshot(), ["uid-a"]);
        dialler.more(30);
        assert_eq!(dialler.said(), ["carried"], "{maps:?}, with the tunnel\n{}", node.log());
    }
}

/// The programs that close a pod at birth, and what they read, outlive the watcher.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_that_begins_while_no_watcher_runs_is_closed() {
    let mut node = WatcherNode::new();
    let cgroup = node.cgroup.join("pods/late");
    let entry = format!(
        "pods:\n- uid: uid-late\n  name: late\n  cgroup: {}\n  labels: {{istio.io/dataplane-mode: ambient}}\n",
        cgroup.display()
    );
    fs::write(node.dir.path().join("pods.yaml"), entry).unwrap();
    node.start(&[]);
    node.wait_state(0, "refused", "cgroup_gone");
    let connected = node.tunnel();
    wait_for("the tunnel to be connected", || !node.status()["tunnels"].as_array().unwrap().is_empty());
    node.kill_watcher();
    drop(connected);

    let late = node.pod("late");
    let dialler = Dialler::start(&node, late);
    dialler.more(20);
    assert_eq!(dialler.said(), ["EPERM"], "in clear");
    node.write_pods(&[true], "");
    node.start(&[]);
    let tunnel = node.tunnel();
    let _listeners = listeners(&node, late);
    assert_eq!(tunnel.take_snapshot(), ["uid-late"]);
    node.wait_state(late, "open", "");
    wait_for("the tunnel to carry it", || dialler.said() == ["EPERM", "carried"]);

    // A label that was taken off meanwhile counts once the source is read.
    node.kill_watcher();
    node.write_pods(&[false], "");
    node.start(&[]);
    node.wait_state(late, "plain", "");
}

/// What a watcher heard while it stood by is old when its turn comes: pods have come since.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_successor_that_has_stood_by_for_long_opens_no_pod_that_came_meanwhile() {
    let (mut node, a) = WatcherNode::with_pod(true, &[]);
    let next = node.spawn(&[], &[]);
    wait_for("the successor to stand by", || next.output().contains("standing by"));
    // More than any queue of updates holds.
    for enrolled in [false, true].repeat(6) {
        node.write_pods(&[enrolled], "");
        let (state, code) = if enrolled { ("closed", "no_tunnel") } else { ("plain", "") };
        node.wait_state(a, state, code);
    }
    let b = node.pod("b");
    node.write_pods(&[true, true], "");
    node.wait_state(b, "closed", "no_tunnel");
    let diallers = [(); 3].map(|()| Dialler::start(&node, b));
    for dialler in &diallers {
        dialler.more(20);
    }
    node.kill_watcher();
    wait_for("the successor to work", || node.command(&["status", "-o", "json"]).0);
    node.wait_state(b, "closed", "no_tunnel");
    for dialler in diallers {
        dialler.more(20);
        assert_eq!(dialler.said(), ["EPERM"], "in clear\n{}", next.output());
    }
}

/// In one netns, with one address for the metrics: whoever has it delays the metrics, nothing else.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_successor_whose_metrics_address_is_taken_takes_over_all_the_same() {
    let (mut node, _) = WatcherNode::with_pod(true, &[]);
    let somebody = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = somebody.local_addr().unwrap().to_string();
    let next = node.spawn(&[], &["--metrics-address", &address]);
    wait_for("the successor to stand by", || next.output().contains("standing by"));
    node.kill_watcher();
    wait_for("the successor to work", || node.command(&["status", "-o", "json"]).0);
    node.wait_state(0, "closed", "no_tunnel");
    drop(somebody);
    wait_for("its metrics", || {
        let url = format!("http://{address}/healthz/ready");
        let output = Command::new("curl").args(["-sf", "--max-time", "2", &url]).output().unwrap();
        output.stdout == b"ready\n"
    });
}

/// The connection is not the data path: a tunnel that lost it serves on, and comes back.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_lost_connection_of_a_tunnel_is_no_lost_tunnel() {
    let (node, tunnel, listeners, dialler) = served_node();
    drop(tunnel);
    wait_for("the connection to be gone", || node.status()["tunnels"].as_array().unwrap().is_empty());
    dialler.more(100);
    node.wait_state(0, "open", "");
    let tunnel = node.tunnel();
    assert_eq!(tunnel.take_snapshot(), ["uid-a"]);
    node.wait_state(0, "open", "");
    dialler.more(20);
    assert_eq!(dialler.said(), ["carried"], "{}", node.log());

    // A tunnel whose process ended is known at once.
    drop((listeners, tunnel));
    let closed = || {
        let pod = node.status()["pods"][0].clone();
        pod["state"] == "closed" && pod["reason"]["code"] == "no_tunnel"
    };
    wait_at_most(Duration::from_secs(5), "the pod to be closed", closed);
    dialler.more(2);
    let said = dialler.said();
    assert!(said == ["carried", "EPERM"] || said == ["carried", "ECONNREFUSED", "EPERM"], "{said:?}");
}

/// One that does not come back is not waited for for ever.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_tunnel_that_stays_away_is_given_up_although_it_listens() {
    let (node, tunnel, _listeners, dialler) = served_node();
    drop(tunnel);
    node.wait_state(0, "closed", "no_tunnel");
    dialler.more(2);
    assert_eq!(dialler.said(), ["carried", "EPERM"], "{}", node.log());
}
