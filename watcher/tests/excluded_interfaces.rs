//! Interfaces that a pod excludes: what its routes send out of them is left alone, as the routes are now.
//! The pods' tunnel has no listener and they fail closed, so what is captured fails with `EPERM`.

use std::{fs, time::Duration};

use testbed::{
    process::Placement,
    wait::{LIMIT, try_wait, wait_at_most},
    watcher_node::WatcherNode,
};

/// Dials, bound to an interface if one is given, and prints what connect(2) says at once.
const DIAL: &str = "
import errno, socket, sys
s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET); s.setblocking(False)
if len(sys.argv) > 2: s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, sys.argv[2].encode())
print(errno.errorcode[s.connect_ex((sys.argv[1], 80))])
";
const CAPTURED: &str = "EPERM";
const ALONE: &str = "EINPROGRESS";

/// What a process of the pod says of its connect(2) to an address, maybe from an interface.
fn dial(node: &WatcherNode, pod: usize, to: &[&str]) -> String {
    let here = &node.pods[pod];
    let placement = Placement::in_cgroup(&here.cgroup.join("container")).in_netns(&here.netns);
    let words = [&["/usr/bin/python3", "-c", DIAL], to].concat();
    let output = placement.command(&words).output().expect("python3");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn wait_dial(node: &WatcherNode, pod: usize, to: &[&str], expected: &str) {
    let mut last = String::new();
    let reached = try_wait(LIMIT, || {
        last = dial(node, pod, to);
        last == expected
    });
    assert!(reached.is_some(), "{to:?}: wanted {expected}, found {last}\n{}", node.log());
}

/// The first pod with these lines of its own, and the second without any.
fn write(node: &WatcherNode, own: &str) {
    node.write_pods(&[true, true], "");
    let path = node.dir.path().join("pods.yaml");
    let text = fs::read_to_string(&path).unwrap();
    let (first, second) = text.split_once("- uid: uid-b").unwrap();
    let next = node.dir.path().join("pods.own");
    fs::write(&next, format!("{first}{own}- uid: uid-b{second}")).unwrap();
    fs::rename(next, path).unwrap();
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn what_routes_send_out_of_an_excluded_interface_is_left_alone() {
    let mut node = WatcherNode::new();
    let (a, b) = (node.pod("a"), node.pod("b"));
    for pod in [a, b] {
        node.pods[pod].netns.run(&format!(
            "ip link add net1 type veth peer name peer1
             ip addr add 10.77.{pod}.2/24 dev net1
             ip addr add fd77:{pod}::2/64 dev net1 nodad
             ip link set net1 up
             ip link set peer1 up
             ip route add default via 10.88.{pod}.9"
        ));
    }
    write(&node, "");
    // No scan helps.
    node.start(&["--rescan", "600"]);
    let _told = node.tunnel().take_all();
    node.wait_state(a, "open", "");
    node.wait_state(b, "open", "");
    let (near, near_v6, own, far) = (["10.77.0.9"], ["fd77::9"], ["10.88.0.99"], ["192.0.2.1"]);
    for to in [near, near_v6, own, far] {
        assert_eq!(dial(&node, a, &to), CAPTURED, "{to:?}");
    }
    write(&node, "  excludeInterfaces: 'net*'\n");
    wait_dial(&node, a, &near, ALONE);
    assert_eq!([near_v6, own, far].map(|to| dial(&node, a, &to)), [ALONE, CAPTURED, CAPTURED]);
    // Bound to the interface, whatever the route; and to another one.
    assert_eq!(dial(&node, a, &["192.0.2.1", "net1"]), ALONE);
    assert_eq!(dial(&node, a, &["192.0.2.1", "e0"]), CAPTURED);
    assert_eq!(dial(&node, a, &["10.77.0.9", "net1"]), ALONE);
    // It does not take the route that excludes the range.
    assert_eq!(dial(&node, a, &["10.77.0.9", "e0"]), CAPTURED);
    assert_eq!(dial(&node, b, &["10.77.1.9"]), CAPTURED, "another pod's");
    let explained = node.command(&["explain", "a", "10.77.0.9:80"]).1;
    assert!(explained.contains("because of excludeInterfaces net* (routes: 10.77.0.0/24)"), "{explained}");
    let listed = node.command(&["status", "lists"]).1;
    assert!(listed.contains("routes of interfaces, its entry in the pods file"), "{listed}");

    // Routes and interfaces that come and go are followed.
    let obeyed = |to: &[&str], expected: &str| {
        wait_at_most(Duration::from_secs(3), &format!("{to:?} to be {expected}"), || {
            (dial(&node, a, to) == expected).then_some(())
        });
    };
    let ip = |line: &str| drop(node.pods[a].netns.run(&format!("ip {line}")));
    ip("route add 10.78.0.0/16 via 10.77.0.9");
    obeyed(&["10.78.1.1"], ALONE);
    ip("route add 10.78.5.0/24 via 10.88.0.9");
    obeyed(&["10.78.5.1"], CAPTURED);
    assert_eq!(dial(&node, a, &["10.78.1.1"]), ALONE);
    ip("route del 10.78.0.0/16");
    obeyed(&["10.78.1.1"], CAPTURED);
    ip("link add net2 type veth peer name peer2");
    ip("addr add 10.79.0.2/24 dev net2");
    ip("link set net2 up");
    ip("link set peer2 up");
    obeyed(&["10.79.0.9"], ALONE);
    // The way to everything else.
    ip("route replace default via 10.77.0.9");
    obeyed(&far, ALONE);
    assert_eq!(dial(&node, a, &own), CAPTURED);

    write(&node, "");
    wait_dial(&node, a, &near, CAPTURED);
    wait_dial(&node, a, &["192.0.2.1", "net1"], CAPTURED);
    node.kill_watcher();
}

/// Who follows the routes of a netns keeps it, so nobody may do so for longer than the pod lives.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_that_ends_leaves_no_netns_behind() {
    let mut node = WatcherNode::new();
    let (a, b) = (node.pod("a"), node.pod("b"));
    // The kernel removes both ends with the netns of either.
    let other = node.pods[b].netns.name().to_owned();
    node.pods[a].netns.run(&format!("ip link add net1 type veth peer name far netns {other}"));
    write(&node, "  excludeInterfaces: net1\n");
    node.start(&["--rescan", "600"]);
    let _told = node.tunnel().take_all();
    node.wait_state(a, "open", "");
    let has_other_end = || node.pods[b].netns.run("ip -br link").contains("far@");
    assert!(has_other_end());
    let pod = &mut node.pods[a];
    pod.end();
    pod.netns.delete();
    let has_other_end = || node.pods[b].netns.run("ip -br link").contains("far@");
    wait_at_most(Duration::from_secs(5), "the netns to go", || (!has_other_end()).then_some(()));
}
