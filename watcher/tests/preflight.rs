//! Nodes that lack something: what `watcher preflight` says of it, and that `watcher run` refuses.

mod support;

use std::{
    os::unix::net::UnixListener,
    process::{Command, Output},
};

use serde_json::Value;
use socket2::{Domain, SockAddr, Socket, Type};
use support::{Bed, Told};

const WATCHER: &str = env!("CARGO_BIN_EXE_watcher");
/// Nothing but what preflight asks for by name.
const ENOUGH: &str = "--bounding-set=-all,+net_admin,+sys_ptrace,+sys_admin";

/// `watcher preflight -o json`, by `wrapper`: whether all is well, and the checks.
fn preflight(bed: &Bed, wrapper: &[&str]) -> (bool, Vec<Value>) {
    let bpffs = bed.bpffs().display().to_string();
    let attach = bed.cgroup.join("pods").display().to_string();
    let words = [WATCHER, "preflight", "-o", "json", "--bpffs", &bpffs, "--attach", &attach];
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
    let mut bed = Bed::new();
    for (capability, name) in
        [("net_admin", "CAP_NET_ADMIN"), ("sys_ptrace", "CAP_SYS_PTRACE"), ("sys_admin", "CAP_SYS_ADMIN")]
    {
        let (ok, checks) = preflight(&bed, &["setpriv", &without(capability)]);
        assert!(!ok && failed(&checks).contains(&"capabilities"), "{checks:#?}");
        assert_eq!(found(&checks, "capabilities"), format!("missing: {name}"));
    }
    let (ok, checks) = preflight(&bed, &["setpriv", ENOUGH]);
    assert!(ok, "{checks:#?}");

    // Enough for an enrolment, too.
    let pod = bed.pod("a");
    bed.write_pods(&[true], "");
    bed.start_under(&["setpriv", ENOUGH], &[]);
    let tunnel = bed.tunnel();
    assert!(matches!(tunnel.take(), Told::Add(uid, _) if uid == "uid-a"));
    assert_eq!(tunnel.take(), Told::SnapshotSent);
    bed.wait_state(pod, "open", "");
}

/// A personality of Linux makes uname(2) say 2.6 (uname26, for programs that know no 3).
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_kernel_that_is_too_old_is_named() {
    let bed = Bed::new();
    let (ok, checks) = preflight(&bed, &["setarch", std::env::consts::ARCH, "--uname-2.6"]);
    assert!(!ok && failed(&checks).contains(&"kernel"), "{checks:#?}");
    assert!(found(&checks, "kernel").starts_with("2.6."), "{checks:#?}");
    let kernel = checks.iter().find(|check| check["name"] == "kernel").expect("the check");
    assert!(kernel["needed"].as_str().is_some_and(|needed| needed.contains("5.10")), "{kernel}");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_watcher_that_lacks_something_refuses_by_name_and_attaches_nothing() {
    let bed = Bed::new();
    bed.write_pods(&[], "");
    let before = bed.pins();
    let path = |name: &str| bed.dir.path().join(name).display().to_string();
    let Output { status, stderr, .. } = Command::new("setpriv")
        .args([&without("sys_ptrace"), WATCHER, "run", "--pods", &path("pods.yaml"), "--node", &bed.name])
        .args(["--run-dir", &path("run"), "--zds-socket", &path("zds.sock"), "--bpffs", &path("bpf")])
        .arg("--attach")
        .arg(bed.cgroup.join("pods"))
        .output()
        .expect("watcher");
    let said = String::from_utf8_lossy(&stderr);
    assert!(!status.success());
    assert!(said.contains("FAIL capabilities: missing: CAP_SYS_PTRACE; needed: "), "{said}");
    assert!(said.contains("to do: ") && said.contains("nothing was attached"), "{said}");
    assert_eq!(bed.pins(), before);
}

/// As in a container of Kind: the tracepoints work there, the process connector does not.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn namespaces_are_no_obstacle_and_the_connector_is_not_needed() {
    let bed = Bed::new();
    for wrapper in [&["unshare", "--cgroup", "--net"][..], &["unshare", "--net", "--pid", "--fork"]] {
        let (ok, checks) = preflight(&bed, wrapper);
        assert!(ok, "{checks:#?}");
        let connector = found(&checks, "process connector");
        assert!(connector.starts_with("not available, lifecycle ring buffer is used"), "{connector}");
    }
    let (ok, checks) = preflight(&bed, &[]);
    assert!(ok, "{checks:#?}");
    for name in ["kernel", "cgroup v2", "bpffs", "BTF", "cgroup/sock_addr", "sock_ops", "sk_lookup"] {
        assert!(!found(&checks, name).is_empty());
    }
    assert_eq!(bed.pins().len(), 2, "bpffs has two files of its own: {:?}", bed.pins());
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn uninstalling_removes_a_dead_tunnel_socket_and_no_living_one() {
    let bed = Bed::new();
    let zds = bed.zds();
    let uninstall = || {
        let (zds, bpffs) = (zds.display().to_string(), bed.bpffs().display().to_string());
        let (ok, said) = bed.command(&["uninstall", "--zds-socket", &zds, "--bpffs", &bpffs]);
        assert!(ok, "{said}");
    };
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).expect("socket");
    socket.bind(&SockAddr::unix(&zds).expect("path")).expect("bind");
    socket.listen(1).expect("listen");
    uninstall();
    assert!(zds.exists(), "somebody listens");
    drop(socket);
    uninstall();
    assert!(!zds.exists(), "nobody answers");
    let other = UnixListener::bind(&zds).expect("bind");
    uninstall();
    assert!(zds.exists(), "another kind of socket, and alive");
    drop(other);
}
