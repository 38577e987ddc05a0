//! Nodes that lack something: what `watcher preflight` says of it, and that `watcher run` refuses.

use std::{
    net::TcpListener,
    os::unix::net::UnixListener,
    process::{Command, Output},
};

use serde_json::{Value, json};
use socket2::{Domain, SockAddr, Socket, Type};
use testbed::{
    api_node::ApiNode, cgroup::cgroup2_mount, fakes::Received, process::WITHOUT_IPV6, program::binary,
    watcher_node::WatcherNode,
};

/// Nothing but what preflight asks for by name.
const ENOUGH: &str = "--bounding-set=-all,+net_admin,+sys_ptrace,+sys_admin";

fn watcher() -> String {
    binary("watcher").display().to_string()
}

/// `watcher preflight -o json`, by `wrapper`: whether all is well, and the checks.
fn preflight(node: &WatcherNode, wrapper: &[&str]) -> (bool, Vec<Value>) {
    preflight_with(node, wrapper, &[])
}

/// The same with more options.
fn preflight_with(node: &WatcherNode, wrapper: &[&str], more: &[&str]) -> (bool, Vec<Value>) {
    let bpffs = node.bpffs().display().to_string();
    let attach = node.cgroup.join("pods").display().to_string();
    let watcher = watcher();
    let words = [&*watcher, "preflight", "-o", "json", "--bpffs", &bpffs, "--attach", &attach];
    let line: Vec<&str> = wrapper.iter().copied().chain(words).chain(more.iter().copied()).collect();
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

/// The tracepoints work there, the process connector does not.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_netns_is_no_obstacle_and_the_connector_is_not_needed() {
    let node = WatcherNode::new();
    let (ok, checks) = preflight(&node, &["unshare", "--net"]);
    assert!(ok, "{checks:#?}");
    let connector = found(&checks, "process connector");
    assert!(connector.starts_with("not available, lifecycle ring buffer is used"), "{connector}");
    let (ok, checks) = preflight(&node, &[]);
    assert!(ok, "{checks:#?}");
    for name in ["kernel", "cgroup v2", "bpffs", "BTF", "cgroup/sock_addr", "sock_ops", "sk_lookup"] {
        assert!(!found(&checks, name).is_empty());
    }
    assert_eq!(node.pins().len(), 2, "bpffs has two files of its own: {:?}", node.pins());
}

/// As container runtimes make one that is not privileged, or not in the node's pid namespace.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_container_that_cannot_do_it_is_told_what_to_change() {
    let node = WatcherNode::new();
    let own = node.cgroup.join("watcher/cgroup.procs").display().to_string();
    let private_cgroups = format!("echo $$ > {own} && exec unshare --cgroup \"$@\"");
    // Of its own in every way but for the file systems that it needs.
    let tree = cgroup2_mount().display().to_string();
    let own_tree = format!(
        "echo $$ > {own} && exec unshare --cgroup --pid --fork --mount-proc sh -c \
         'umount -l {tree} && mount -t cgroup2 cgroup2 {tree} && exec \"$@\"' sh \"$@\""
    );
    let read_only = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec \"$@\"";
    for (wrapper, name, says, advice) in [
        (&["sh", "-c", &private_cgroups, "sh"][..], "cgroup namespace", "outside", "privileged: true"),
        (&["sh", "-c", &own_tree, "sh"], "cgroup namespace", "no cgroup but", "privileged: true"),
        (&["unshare", "--pid", "--fork"], "pid namespace", "outside of it", "hostPID: true"),
        (
            &["unshare", "--mount", "sh", "-c", read_only, "sh"],
            "sysctls",
            "/proc/sys/net",
            "privileged: true",
        ),
        (&["prlimit", "--nofile=200:200"], "open files", "200", "LimitNOFILE"),
    ] {
        let (ok, checks) = preflight(&node, wrapper);
        assert!(!ok, "{wrapper:?}: {checks:#?}");
        // In a tree of one's own there is no cgroup of pods either, and `unshare` is outside.
        if says == "no cgroup but" {
            assert!(failed(&checks).contains(&name), "{checks:#?}");
        } else {
            assert_eq!(failed(&checks), [name], "{wrapper:?}");
        }
        let check = checks.iter().find(|check| check["name"] == name).expect("the check");
        for (key, part) in [("found", says), ("advice", advice)] {
            assert!(check[key].as_str().is_some_and(|text| text.contains(part)), "{check}");
        }
    }
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn how_many_of_the_nodes_pods_can_be_found_is_told() {
    let mut node = WatcherNode::new();
    let pods = node.dir.path().join("pods.yaml").display().to_string();
    node.pod("here");
    let absent = "- {uid: uid-x, name: absent, cgroup: nowhere}\n";
    node.write_pods(&[true], absent);
    let told = |wrapper: &[&str], more: &[&str]| {
        let (_, checks) = preflight_with(&node, wrapper, more);
        checks.into_iter().find(|check| check["name"] == "pods").expect("the check")
    };
    let check = told(&[], &["--pods", &pods]);
    assert_eq!(check["level"], "warn", "{check}");
    let text = check["found"].as_str().expect("text");
    assert!(text.starts_with("1 of 2 found") && text.ends_with("not default/absent"), "{check}");

    // The API says what runs.
    let api = ApiNode::new(&json!({}));
    let running = json!({"containerStatuses": [{
        "name": "main", "image": "i", "imageID": "i", "ready": true, "restartCount": 0,
        "state": {"running": {}},
    }]});
    let kubeconfig = format!("KUBECONFIG={}", api.api.watcher_kubeconfig().display());
    let wrapper = ["env", &kubeconfig];
    let of_api = ["--kubernetes", "--node", &node.name];
    api.api.pod(&api.namespace, "elsewhere", &node.name, &json!({}));
    api.api.pod(&api.namespace, "new", &node.name, &json!({}));
    api.api.set_status(&api.namespace, "elsewhere", &running);
    let check = told(&wrapper, &of_api);
    assert!(check["level"] == "fail", "{check}");
    assert!(check["found"].as_str().is_some_and(|text| text.starts_with("0 of 1 found")), "{check}");
    let away = told(&["env", "KUBECONFIG=/nowhere"], &of_api);
    assert!(
        away["level"] == "fail" && away["found"].as_str().is_some_and(|text| text.contains("KUBECONFIG"))
    );
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

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn on_a_kernel_without_ipv6_metrics_are_served_by_ipv4() {
    let mut node = WatcherNode::new();
    let pod = node.pod("a");
    node.write_pods(&[true], "");
    let port = TcpListener::bind("0.0.0.0:0").and_then(|any| any.local_addr()).expect("a free port").port();
    node.start_under(&WITHOUT_IPV6, &["--metrics-address", &format!("[::]:{port}")]);
    let tunnel = node.tunnel();
    assert!(matches!(tunnel.take(), Received::Add(uid, _) if uid == "uid-a"));
    node.wait_state(pod, "open", "");
    let url = format!("http://127.0.0.1:{port}/metrics");
    let output = Command::new("curl").args(["-sSf", "--noproxy", "*", &url]).output().expect("curl");
    assert!(output.status.success(), "{output:?}\n{}", node.log());
}
