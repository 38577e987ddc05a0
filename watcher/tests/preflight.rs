//! Nodes that lack something: what `watcher preflight` says of it, and that `watcher run` refuses.

use std::{
    os::unix::net::UnixListener,
    process::{Command, Output},
};

use serde_json::Value;
use socket2::{Domain, SockAddr, Socket, Type};
use testbed::{fakes::Received, program::binary, watcher_node::WatcherNode};

/// Nothing but what preflight asks for by name.
const ENOUGH: &str = "--bounding-set=-all,+net_admin,+sys_ptrace,+sys_admin";

fn watcher() -> String {
    binary("watcher").display().to_string()
}

/// `watcher preflight -o json`, by `wrapper`: whether all is well, and the checks.
fn preflight(node: &WatcherNode, wrapper: &[&str]) -> (bool, Vec<Value>) {
    let bpffs = node.bpffs().display().to_string();
    let attach = node.cgroup.join("pods").display().to_string();
    let watcher = watcher();
    let words = [&*watcher, "preflight", "-o", "json", "--bpffs", &bpffs, "--attach", &attach];
    let line: Vec<&str> = wrapper.iter().copied().chain(words).collect();
    let output = Command::new(line[0]).args(&line[1..]).output().expect("preflight");
    let answer: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{line:?}: {error}: {output:?}"));
    assert_eq!(answer["ok"], output.status.success());
    (output.status.success(), answer["checks"].as_array().expect("checks").clone())
}

fn failed(checks: &[Value]) -> Vec<&str> {
    checks.iter().filter(|check| check["ok"] == false).filter_map(|check| check["name"].as_str()).collect()
}

fn found<'a>(checks: &'a [Value], name: &str) -> &'a str {
    let check =
        checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no check {name}"));
    check["found"].as_str().expect("text")
}

fn without(capability: &str) -> String {
    format!("--bounding-set=-{capability}")
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn missing_capabilities_are_named_and_what_is_asked_for_is_enough() {
    let mut node = WatcherNode::new();
    for (capability, name) in
        [("net_admin", "CAP_NET_ADMIN"), ("sys_ptrace", "CAP_SYS_PTRACE"), ("sys_admin", "CAP_SYS_ADMIN")]
    {
        let (ok, checks) = preflight(&node, &["setpriv", &without(capability)]);
        assert!(!ok && failed(&checks).contains(&"capabilities"), "{checks:#?}");
        assert_eq!(found(&checks, "capabilities"), format!("missing: {name}"));
    }
    let (ok, checks) = preflight(&node, &["setpriv", ENOUGH]);
    assert!(ok, "{checks:#?}");

    // Enough for an enrolment, too.
    let pod = node.pod("a");
    node.write_pods(&[true], "");
    node.start_under(&["setpriv", ENOUGH], &[]);
    let tunnel = node.tunnel();
    assert!(matches!(tunnel.take(), Received::Add(uid, _) if uid == "uid-a"));
    assert_eq!(tunnel.take(), Received::SnapshotSent);
    node.wait_state(pod, "open", "");
}

/// A personality of Linux makes uname(2) say 2.6 (uname26, for programs that know no 3).
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_kernel_that_is_too_old_is_named() {
    let node = WatcherNode::new();
    let (ok, checks) = preflight(&node, &["setarch", std::env::consts::ARCH, "--uname-2.6"]);
    assert!(!ok && failed(&checks).contains(&"kernel"), "{checks:#?}");
    assert!(found(&checks, "kernel").starts_with("2.6."), "{checks:#?}");
    let kernel = checks.iter().find(|check| check["name"] == "kernel").expect("the check");
    assert!(kernel["needed"].as_str().is_some_and(|needed| needed.contains("5.10")), "{kernel}");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_watcher_that_lacks_something_refuses_by_name_and_attaches_nothing() {
    let node = WatcherNode::new();
    node.write_pods(&[], "");
    let before = node.pins();
    let path = |name: &str| node.dir.path().join(name).display().to_string();
    let Output { status, stderr, .. } = Command::new("setpriv")
        .args([
            &*without("sys_ptrace"),
            &watcher(),
            "run",
            "--pods",
            &path("pods.yaml"),
            "--node",
            &node.name,
        ])
        .args(["--run-dir", &path("run"), "--zds-socket", &path("zds.sock"), "--bpffs", &path("bpf")])
        .arg("--attach")
        .arg(node.cgroup.join("pods"))
        .output()
        .expect("watcher");
    let said = String::from_utf8_lossy(&stderr);
    assert!(!status.success());
    assert!(said.contains("FAIL capabilities: missing: CAP_SYS_PTRACE; needed: "), "{said}");
    assert!(said.contains("to do: ") && said.contains("nothing was attached"), "{said}");
    assert_eq!(node.pins(), before);
}

/// As in a container of Kind: the tracepoints work there, the process connector does not.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn namespaces_are_no_obstacle_and_the_connector_is_not_needed() {
    let node = WatcherNode::new();
    for wrapper in [&["unshare", "--cgroup", "--net"][..], &["unshare", "--net", "--pid", "--fork"]] {
        let (ok, checks) = preflight(&node, wrapper);
        assert!(ok, "{checks:#?}");
        let connector = found(&checks, "process connector");
        assert!(connector.starts_with("not available, lifecycle ring buffer is used"), "{connector}");
    }
    let (ok, checks) = preflight(&node, &[]);
    assert!(ok, "{checks:#?}");
    for name in ["kernel", "cgroup v2", "bpffs", "BTF", "cgroup/sock_addr", "sock_ops", "sk_lookup"] {
        assert!(!found(&checks, name).is_empty());
    }
    assert_eq!(node.pins().len(), 2, "bpffs has two files of its own: {:?}", node.pins());
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn uninstalling_removes_a_dead_tunnel_socket_and_no_living_one() {
    let node = WatcherNode::new();
    let zds = node.zds();
    let uninstall = || {
        let (zds, bpffs) = (zds.display().to_string(), node.bpffs().display().to_string());
        let (ok, said) = node.command(&["uninstall", "--zds-socket", &zds, "--bpffs", &bpffs]);
        assert!(ok, "{said}");
    };
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).expect("socket");
    socket.bind(&SockAddr::unix(&zds).expect("path")).expect("bind");
    socket.listen(1).expect("listen");
    uninstall();
    assert!(zds.exists(), "a process listens");
    drop(socket);
    uninstall();
    assert!(!zds.exists(), "no process answers");
    let other = UnixListener::bind(&zds).expect("bind");
    uninstall();
    assert!(zds.exists(), "another kind of socket, and alive");
    drop(other);
}
