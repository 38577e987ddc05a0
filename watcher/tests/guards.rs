//! Processes that are left alone: by user, by group, by container. Each is shown by real dials: the
//! pods' tunnel has no listener and they fail closed, so what is captured fails with `EPERM`, and what
//! is left alone is on its way in clear.

use std::{fmt::Write as _, fs, path::Path, process::Command};

use testbed::{
    command::run,
    process::{Placement, Process},
    wait::{LIMIT, try_wait, wait_for},
    watcher_node::WatcherNode,
};

/// Dials an address that nobody has, and prints what connect(2) says at once.
const DIAL: &str = "
import errno, socket, sys
s = socket.socket(); s.setblocking(False)
print(errno.errorcode[s.connect_ex((sys.argv[1], 80))])
";
const CAPTURED: &str = "EPERM";
const ALONE: &str = "EINPROGRESS";
/// A user and a group of a process.
type Ids = (u32, u32);

fn said(mut command: Command) -> String {
    let output = command.output().expect("the dialler");
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(output.status.success() && !text.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// What a process with these ids in the pod's container says of its connect(2).
fn dial(node: &WatcherNode, pod: usize, container: &str, (user, group): Ids) -> String {
    let here = &node.pods[pod];
    let placement = Placement::in_cgroup(&here.cgroup.join(container)).in_netns(&here.netns);
    let (user, group) = (format!("--reuid={user}"), format!("--regid={group}"));
    let to = format!("10.88.{pod}.99");
    said(placement.command(&[
        "setpriv",
        &user,
        &group,
        "--clear-groups",
        "/usr/bin/python3",
        "-c",
        DIAL,
        &to,
    ]))
}

/// The pods file: each pod with its own lines, and `wide` for all.
fn write(node: &WatcherNode, own: &[&str], wide: &str) {
    let mut text = "pods:\n".to_owned();
    for (number, (pod, own)) in node.pods.iter().zip(own).enumerate() {
        let _ = write!(
            text,
            "- uid: uid-{name}\n  name: {name}\n  cgroup: {}\n  labels: {{istio.io/dataplane-mode: ambient}}\n  \
             addresses: [{}, \"fd88:{number}::2\"]\n",
            pod.cgroup.display(),
            pod.address,
            name = pod.name,
        );
        if !own.is_empty() {
            let _ = writeln!(text, "  {own}");
        }
    }
    replace(node, &(text + wide));
}

fn replace(node: &WatcherNode, text: &str) {
    let next = node.dir.path().join("pods.next");
    fs::write(&next, text).expect("pods file");
    fs::rename(next, node.dir.path().join("pods.yaml")).expect("pods file");
}

/// Waits until `watcher explain` with these words names this rule.
fn wait_explained(node: &WatcherNode, pod: &str, words: &[&str], rule: &str) {
    let mut last = String::new();
    let all = [&["explain", pod, "10.1.1.1:80"], words].concat();
    let reached = try_wait(LIMIT, || {
        last = node.command(&all).1;
        last.contains(rule)
    });
    assert!(reached.is_some(), "{all:?}: wanted {rule}, found {last}\n{}", node.log());
}

const GUARDED: &str = "leave: caller is guarded";
const CLOSED: &str = "refuse: tunnel away, pod fails closed";

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn users_and_groups_are_left_alone_where_the_pod_the_namespace_or_the_mesh_says_so() {
    let mut node = WatcherNode::new();
    let (a, b) = (node.pod("a"), node.pod("b"));
    write(&node, &["", ""], "");
    node.start(&["--rescan", "600"]);
    let _told = node.tunnel().take_all();
    node.wait_state(a, "open", "");
    node.wait_state(b, "open", "");
    let (root, proxy, in_group, other) = ((0, 0), (1337, 7), (7, 1337), (5000, 5000));
    for ids in [root, proxy, in_group, other] {
        assert_eq!(dial(&node, a, "container", ids), CAPTURED, "nothing is guarded by default: {ids:?}");
    }
    // What tells that the edit holds: a user, and what happens to it.
    for (own, wide, (told, rule), expected) in [
        ("guards: istio", "", (1337, GUARDED), [CAPTURED, ALONE, ALONE, CAPTURED]),
        ("guards: 'uid:5000'", "", (5000, GUARDED), [CAPTURED, CAPTURED, CAPTURED, ALONE]),
        ("", "mesh: {guards: 'gid:1337'}\n", (5000, CLOSED), [CAPTURED, CAPTURED, ALONE, CAPTURED]),
        (
            "guards: [uid:5000]",
            "mesh: {guards: istio}\nnamespaces: {default: {guards: linkerd}}\n",
            (2102, GUARDED),
            [CAPTURED, ALONE, ALONE, ALONE],
        ),
        ("guards: none", "mesh: {guards: istio}\n", (2102, CLOSED), [CAPTURED; 4]),
        ("guards: [consul, 'uid:5000']", "", (5000, GUARDED), [CAPTURED, CAPTURED, CAPTURED, ALONE]),
        ("", "", (5000, CLOSED), [CAPTURED; 4]),
    ] {
        write(&node, &[own, "guards: none"], wide);
        wait_explained(&node, "a", &["--uid", &told.to_string()], rule);
        for (ids, expected) in [root, proxy, in_group, other].into_iter().zip(expected) {
            assert_eq!(dial(&node, a, "container", ids), expected, "{own} {wide} {ids:?}");
        }
        assert_eq!(dial(&node, b, "container", proxy), CAPTURED, "another pod's guards: {own} {wide}");
        if own.contains("consul") {
            let notes = node.status()["pods"][a]["notes"].to_string();
            assert!(notes.contains("consul"), "{notes}");
        }
    }
    let counted = node.command(&["status", "verdicts"]).1;
    assert!(counted.contains(GUARDED), "{counted}");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_container_is_left_alone_and_the_pods_others_are_not() {
    let mut node = WatcherNode::new();
    let a = node.pod("a");
    let proxy = node.pods[a].cgroup.join("cri-proxy.scope");
    fs::create_dir_all(proxy.join("below")).unwrap();
    write(&node, &["guards: 'container:cri-proxy.scope'"], "");
    node.start(&["--rescan", "600"]);
    let _told = node.tunnel().take_all();
    node.wait_state(a, "open", "");
    wait_explained(&node, "a", &["--container", "cri-proxy.scope"], GUARDED);
    wait_explained(&node, "a", &["--container", "container"], CLOSED);
    // No part of a name is taken for one.
    let said = node.prepared(&["explain", "a", "192.0.2.1:80", "--container", "c"]).output().unwrap();
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("no container \"c\""), "{said}");
    for (container, expected) in [
        ("cri-proxy.scope", ALONE),
        ("cri-proxy.scope/below", ALONE),
        ("container", CAPTURED),
        ("", CAPTURED),
    ] {
        assert_eq!(dial(&node, a, container, (0, 0)), expected, "{container}");
    }
    // A container that is made anew.
    wait_for("no process", || fs::remove_dir(proxy.join("below")).is_ok());
    wait_for("no process", || fs::remove_dir(&proxy).is_ok());
    fs::create_dir_all(&proxy).unwrap();
    wait_explained(&node, "a", &["--container", "cri-proxy.scope"], GUARDED);
    assert_eq!(dial(&node, a, "cri-proxy.scope", (0, 0)), ALONE);
    write(&node, &[""], "");
    wait_explained(&node, "a", &["--container", "cri-proxy.scope"], CLOSED);
    assert_eq!(dial(&node, a, "cri-proxy.scope", (0, 0)), CAPTURED);
}

/// Runs words in the pod's user namespace and netns, as this user and group of the pod.
fn dial_inside(container: &Path, pod: u32, (user, group): Ids, more: &[&str]) -> String {
    let (target, user, group) = (pod.to_string(), user.to_string(), group.to_string());
    let enter = ["nsenter", "-t", &target, "-U", "-n", "-S", &user, "-G", &group, "--"];
    let words = [&enter[..], more, &["/usr/bin/python3", "-c", DIAL, "10.89.0.99"]].concat();
    said(Placement::in_cgroup(container).command(&words))
}

/// As with `hostUsers: false`: the pod's numbers are not the node's.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn in_a_pod_with_users_of_its_own_its_own_numbers_count() {
    const FIRST: u32 = 500_000;
    let mut node = WatcherNode::new();
    let plain = node.pod("plain");
    let container = node.cgroup.join("pods/own/container");
    fs::create_dir_all(&container).unwrap();
    let command = Placement::in_cgroup(&container).command(&["unshare", "-U", "-n", "sleep", "infinity"]);
    let process = Process::spawn("pod", command, &node.dir.path().join("own.log"));
    let pid = process.pid();
    let user_ns = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    wait_for("a user namespace", || user_ns(&pid.to_string()) != user_ns("self"));
    for kind in ["uid", "gid"] {
        fs::write(format!("/proc/{pid}/{kind}_map"), format!("0 {FIRST} 65536")).unwrap();
    }
    for line in [
        "link add e0 type veth peer name e1",
        "addr add 10.89.0.2/24 dev e0",
        "link set e0 up",
        "link set e1 up",
    ] {
        run(&format!("nsenter -t {pid} -n ip {line}"));
    }
    let file = |guards: &str| {
        let pod = |name: &str, cgroup: &Path, address: &str| {
            format!(
                "- uid: uid-{name}\n  name: {name}\n  cgroup: {}\n  labels: {{istio.io/dataplane-mode: ambient}}\n  \
                 addresses: [{address}]\n  guards: {guards}\n",
                cgroup.display()
            )
        };
        let (own, other) = (node.cgroup.join("pods/own"), &node.pods[plain]);
        format!("pods:\n{}{}", pod("plain", &other.cgroup, &other.address), pod("own", &own, "10.89.0.2"))
    };
    replace(&node, &file("istio"));
    // A process that calls itself 1337 in a namespace of its own making, before anybody looks.
    let target = pid.to_string();
    let cheat = [
        "nsenter",
        "-t",
        &target,
        "-U",
        "-n",
        "-S",
        "1000",
        "-G",
        "1000",
        "--",
        "unshare",
        "-U",
        "--map-user=1337",
        "sleep",
        "infinity",
    ];
    let cheat = Process::spawn(
        "cheat",
        Placement::in_cgroup(&container).command(&cheat),
        &node.dir.path().join("cheat.log"),
    );
    wait_for("its user namespace", || {
        let own = user_ns(&cheat.pid().to_string());
        own != user_ns("self") && own != user_ns(&target)
    });
    let (number, first) = (1, format!("{}", FIRST + 1337));
    let mut node = node;
    node.start(&["--rescan", "600"]);
    let _told = node.tunnel().take_all();
    node.wait_state(plain, "open", "");
    node.wait_state(number, "open", "");
    wait_explained(&node, "own", &["--uid", "1337"], GUARDED);
    wait_explained(&node, "own", &["--uid", "0"], CLOSED);
    assert!(!node.command(&["explain", "own", "10.1.1.1:80", "--uid", &first]).0, "the pod has no such user");
    for (ids, expected) in
        [((1337, 0), ALONE), ((0, 1337), ALONE), ((0, 0), CAPTURED), ((1000, 1000), CAPTURED)]
    {
        assert_eq!(dial_inside(&container, pid, ids, &[]), expected, "{ids:?}");
    }
    let cheating = ["unshare", "-U", "--map-user=1337"];
    assert_eq!(dial_inside(&container, pid, (1000, 1000), &cheating), CAPTURED);
    // Beside it, the node's numbers are those of a pod without users of its own.
    assert_eq!(dial(&node, plain, "container", (1337, 0)), ALONE);
    assert_eq!(dial(&node, plain, "container", (FIRST + 1337, 0)), CAPTURED);
    drop((cheat, process));
}
