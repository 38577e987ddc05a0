//! An application that uses a port which is the tunnel's in its pod: whichever of the two came first,
//! the pod, the port and the process are told.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
};

use adit_ebpf_loader::Kernel;
use k8s_openapi::api::events::v1::Event;
use serde_json::{Value, json};
use testbed::{
    api_node::ApiNode,
    lend::tunnel_listener,
    process::{Placement, Process},
    wait::{LIMIT, try_wait, wait_for},
    watcher_node::{NodePod, WatcherNode},
};

/// Binds what its arguments say, as `tcp4 15006`, and listens; prints how that went, and stays.
const APP: &str = "
import errno, socket, sys, time
kind, port = sys.argv[1], int(sys.argv[2])
family = socket.AF_INET6 if '6' in kind else socket.AF_INET
s = socket.socket(family, socket.SOCK_DGRAM if 'udp' in kind else socket.SOCK_STREAM)
if 'shared' in kind: s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
try:
    s.bind(('127.0.0.1' if 'loopback' in kind else '', port))
    if 'udp' not in kind: s.listen()
    print('bound', flush=True)
except OSError as error:
    print(errno.errorcode[error.errno], flush=True)
time.sleep(10000)
";

/// A program called "greedy" in the pod's container that does this; what it said.
fn app(dir: &Path, pod: &NodePod, kind: &str, port: u16) -> (Process, String) {
    let program = dir.join("greedy");
    if !program.exists() {
        fs::copy("/usr/bin/python3", &program).expect("a copy of python3");
    }
    let placement = Placement::in_cgroup(&pod.cgroup.join("container")).in_netns(&pod.netns);
    let command = placement.command(&[program.to_str().unwrap(), "-c", APP, kind, &port.to_string()]);
    let process = Process::spawn("greedy", command, &dir.join(format!("{kind}-{port}.log")));
    let said = wait_for("the application", || {
        process.output().lines().last().map(str::to_owned).filter(|line| !line.is_empty())
    });
    (process, said)
}

/// Waits until the status has exactly these uses: port, UDP, listens, process.
fn wait_uses(node: &WatcherNode, pod: usize, wanted: &[(u16, bool, bool, &str)]) -> Value {
    let wanted: Vec<Value> = wanted.iter().map(|use_of| json!(use_of)).collect();
    let mut last = Value::Null;
    let reached = try_wait(LIMIT, || {
        last = node.status()["pods"][pod].clone();
        let uses = last["reserved_ports"].as_array()?.iter();
        let uses: Vec<Value> = uses
            .map(|found| json!([found["port"], found["is_udp"], found["listens"], found["process"]]))
            .collect();
        (uses == wanted).then_some(())
    });
    assert!(reached.is_some(), "wanted {wanted:?}, found {last}\n{}", node.log());
    last
}

fn metric(address: &str, port: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let begin = format!("adit_watcher_reserved_port_uses{{port=\"{port}\"}} ");
    text.lines().find_map(|line| line.strip_prefix(&begin)).unwrap_or_else(|| panic!("{text}")).to_owned()
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn an_application_that_listens_on_a_port_of_the_tunnel_before_it_is_told_by_name() {
    let mut node = WatcherNode::new();
    let (a, b) = (node.pod("a"), node.pod("b"));
    let dir = node.dir.path().to_owned();
    let mut apps: Vec<_> = [("tcp4", 15006), ("tcp6", 15008), ("tcp4-loopback", 15053), ("tcp4", 15007)]
        .map(|(kind, port)| app(&dir, &node.pods[a], kind, port))
        .into();
    assert!(apps.iter().all(|(_, said)| said == "bound"), "{apps:?}");
    node.write_pods(&[true, true], "");
    // Nothing here waits for a scan.
    node.start(&["--rescan", "600"]);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    let uses = [15006, 15008, 15053].map(|port| (port, false, true, "greedy"));
    wait_uses(&node, a, &uses);
    node.wait_state(a, "open", "reserved_port");
    node.wait_state(b, "open", "");
    let status = node.status();
    let text = status["pods"][a]["reason"]["text"].as_str().unwrap();
    assert!(text.contains("\"greedy\" listens on TCP port 15006"), "{text}");
    let pid = status["pods"][a]["reserved_ports"][0]["pid"].as_i64().unwrap();
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/comm")).unwrap().trim(), "greedy");
    let (_, shown) = node.command(&["status"]);
    assert!(shown.contains("\"greedy\" listens on TCP port 15053"), "{shown}");
    // A tunnel that cannot have the ports refuses the pod: the cause is told in place of that.
    drop(tunnel);
    apps.drain(..);
    let apps = app(&dir, &node.pods[a], "tcp4-loopback", 15001);
    let tunnel = node.tunnel();
    for _ in 0..2 {
        tunnel.receive();
        tunnel.answer("cannot listen on port 15001: address in use");
    }
    wait_uses(&node, a, &[(15001, false, true, "greedy")]);
    node.wait_state(a, "closed", "reserved_port");
    node.wait_state(b, "closed", "tunnel_refused");
    drop(apps);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn an_application_that_cannot_have_a_port_of_the_tunnel_is_told_by_name() {
    let mut node = WatcherNode::new();
    let a = node.pod("a");
    let dir = node.dir.path().to_owned();
    node.write_pods(&[true], "");
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    node.start(&["--rescan", "600", "--metrics-address", &free]);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    node.wait_state(a, "open", "");
    let cgroup = node.cgroup.join("tunnel");
    let _listeners = [15001, 15006, 15008]
        .map(|port| tunnel_listener(&cgroup, &node.pods[a].netns, format!("[::]:{port}").parse().unwrap()));
    // Its own ports are no news.
    let (other, said) = app(&dir, &node.pods[a], "tcp4", 15007);
    assert_eq!(said, "bound");
    assert_eq!(node.status()["pods"][a]["reserved_ports"], json!([]));
    let (first, said) = app(&dir, &node.pods[a], "tcp4", 15008);
    assert_eq!(said, "EADDRINUSE");
    wait_uses(&node, a, &[(15008, false, false, "greedy")]);
    node.wait_state(a, "open", "reserved_port");
    assert_eq!((metric(&free, "hbone"), metric(&free, "inbound")), ("1".to_owned(), "0".to_owned()));
    let (second, said) = app(&dir, &node.pods[a], "tcp6-shared", 15006);
    assert_eq!(said, "EADDRINUSE", "the tunnel's listener here does not share its port");
    wait_uses(&node, a, &[(15006, false, false, "greedy"), (15008, false, false, "greedy")]);
    // Where no tunnel listens yet, it can have the port.
    let (third, said) = app(&dir, &node.pods[a], "tcp4-loopback", 15053);
    assert_eq!(said, "bound");
    wait_uses(
        &node,
        a,
        &[(15006, false, false, "greedy"), (15008, false, false, "greedy"), (15053, false, true, "greedy")],
    );
    let (fourth, said) = app(&dir, &node.pods[a], "udp4-loopback", 15053);
    assert_eq!(said, "bound");
    let found = wait_uses(
        &node,
        a,
        &[
            (15006, false, false, "greedy"),
            (15008, false, false, "greedy"),
            (15053, false, true, "greedy"),
            (15053, true, true, "greedy"),
        ],
    );
    assert_eq!(found["state"], "open");
    assert_eq!(metric(&free, "dns"), "1");
    drop((other, first, second, third, fourth));
}

#[test]
#[ignore = "needs root: make test"]
fn an_application_on_a_port_of_the_tunnel_is_an_event_of_its_pod() {
    let mut node = ApiNode::new(&json!({"istio.io/dataplane-mode": "ambient"}));
    let (number, _) = node.pod("pod", &json!({}));
    let dir = node.host.dir.path().to_owned();
    node.host.start(&["--rescan", "600"]);
    let _told = node.tunnel().take_all();
    node.wait_state("pod", "open", "");
    let _app = app(&dir, &node.host.pods[number], "tcp4", 15006);
    node.wait_state("pod", "open", "reserved_port");
    let said = wait_for("an Event", || {
        let api = kube::Api::<Event>::namespaced(node.api.client(), &node.namespace);
        let events = node.api.block_on(api.list(&kube::api::ListParams::default())).ok()?;
        events.items.into_iter().find(|event| event.reason.as_deref() == Some("ReservedPort"))?.note
    });
    assert!(said.contains("\"greedy\" listens on TCP port 15006"), "{said}");
}

/// Neither as it begins to listen, nor when a scan lists its listeners.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn what_a_tunnel_listens_on_is_not_told() {
    let (mut node, pod) = WatcherNode::with_pod(true, &["--rescan", "1"]);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    let cgroup = node.cgroup.join("tunnel");
    let _listeners = [15001, 15006, 15008]
        .map(|port| tunnel_listener(&cgroup, &node.pods[pod].netns, format!("[::]:{port}").parse().unwrap()));
    node.wait_state(pod, "open", "");
    // What a scan puts right shows that it was there.
    let mut kernel = Kernel::open(&node.bpffs().join("adit").join(&node.name)).unwrap();
    for _ in 0..2 {
        let (stray, info) = (1 << 60, kernel.cgroups().unwrap()[0].1);
        kernel.set_cgroup(stray, &info).unwrap();
        wait_for("a scan", || kernel.cgroup(stray).unwrap().is_none());
    }
    assert_eq!(node.status()["pods"][pod]["reserved_ports"], json!([]));
    node.wait_state(pod, "open", "");
    node.kill_watcher();
}
