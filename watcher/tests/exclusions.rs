//! Exclusion lists: the longest ones delay nobody, equal ones are shared, one that does not fit
//! closes its pod alone, and nobody inherits another pod's.

use std::{fmt::Write as _, fs};

use adit_ebpf_common::{
    address::mapped,
    exclusions::{INBOUND, MAPPED_BITS, OUTBOUND},
};
use adit_ebpf_loader::{ExclusionList, Kernel};
use testbed::{
    lend::{Lent, tunnel_listener},
    wait::{LIMIT, try_wait, wait_for},
    watcher_node::WatcherNode,
};

/// The pods file: every pod made so far, enrolled, each with its own lines.
fn write(node: &WatcherNode, more: &[String]) {
    let mut text = "pods:\n".to_owned();
    for (number, (pod, more)) in node.pods.iter().zip(more).enumerate() {
        let _ = write!(
            text,
            "- uid: uid-{name}\n  name: {name}\n  cgroup: {}\n  labels: {{istio.io/dataplane-mode: ambient}}\n  \
             addresses: [{}, \"fd88:{number}::2\"]\n{more}",
            pod.cgroup.display(),
            pod.address,
            name = pod.name,
        );
    }
    let next = node.dir.path().join("pods.next");
    fs::write(&next, text).expect("pods file");
    fs::rename(next, node.dir.path().join("pods.yaml")).expect("pods file");
}

fn listener(node: &WatcherNode, pod: usize) -> Lent {
    tunnel_listener(&node.cgroup.join("tunnel"), &node.pods[pod].netns, "[::]:15001".parse().unwrap())
}

/// What happens to a connection of the pod.
fn explained(node: &WatcherNode, pod: &str, to: &str) -> String {
    let (ok, text) = node.command(&["explain", pod, to, "-o", "json"]);
    assert!(ok, "{text}");
    serde_json::from_str::<serde_json::Value>(&text).unwrap()["outbound"].as_str().unwrap().to_owned()
}

fn wait_explained(node: &WatcherNode, pod: &str, to: &str, rule: &str) {
    let mut last = String::new();
    let reached = try_wait(LIMIT, || {
        last = explained(node, pod, to);
        last == rule
    });
    assert!(reached.is_some(), "{pod} to {to}: wanted {rule}, found {last}\n{}", node.log());
}

const REDIRECT: &str = "redirect to the tunnel";
const PORT: &str = "leave: port excluded";
const CIDR: &str = "leave: CIDR excluded";
const OUTSIDE: &str = "leave: in no inclusion list";

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_range_of_one_family_leaves_the_other_alone() {
    let mut node = WatcherNode::new();
    let pod = node.pod("a");
    write(&node, &[String::new()]);
    node.start(&[]);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    node.wait_state(pod, "open", "");
    let _listener = listener(&node, pod);
    let (v4, v6) = ("10.1.1.1:80", "[2001:db8::1]:80");
    for (port, (range, to_v4, to_v6)) in (7000..).zip([
        ("::/0", REDIRECT, CIDR),
        ("::/1", REDIRECT, CIDR),
        ("::/80", REDIRECT, REDIRECT),
        ("0.0.0.0/0", CIDR, REDIRECT),
        ("::ffff:0.0.0.0/96", CIDR, REDIRECT),
    ]) {
        // The port shows that this list is in force.
        write(&node, &[format!("  excludeOutboundCidrs: [\"{range}\"]\n  excludeOutboundPorts: [{port}]\n")]);
        wait_explained(&node, "a", &format!("10.1.1.1:{port}"), PORT);
        let found = (explained(&node, "a", v4), explained(&node, "a", v6));
        assert_eq!(found, (to_v4.to_owned(), to_v6.to_owned()), "{range}");
    }
}

/// Set for the pod, for its namespace and for the mesh; the narrower says more, and each edit holds at
/// once.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn inclusion_lists_leave_the_rest_outside_and_the_narrower_list_counts() {
    let mut node = WatcherNode::new();
    let (pod, _other) = (node.pod("a"), node.pod("b"));
    write(&node, &[String::new(), String::new()]);
    node.start(&[]);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    node.wait_state(pod, "open", "");
    let _listener = listener(&node, pod);
    let addresses = ["10.1.1.1:80", "10.9.1.1:80", "192.0.2.1:443", "192.0.2.1:80", "[2001:db8::1]:80"];
    let (mesh, wide) = ("mesh: {excludeOutboundCidrs: 10.1.0.0/16}\n", "includeOutboundCidrs: 10.0.0.0/8");
    for (own, others, rules) in [
        ("", mesh.to_owned(), [CIDR, REDIRECT, REDIRECT, REDIRECT, REDIRECT]),
        ("", format!("mesh: {{{wide}}}\n"), [REDIRECT, REDIRECT, OUTSIDE, OUTSIDE, OUTSIDE]),
        (
            "",
            format!("{mesh}namespaces: {{default: {{{wide}}}}}\n"),
            [REDIRECT, REDIRECT, OUTSIDE, OUTSIDE, OUTSIDE],
        ),
        (
            "excludeOutboundCidrs: 10.9.0.0/16",
            format!("mesh: {{{wide}}}\n"),
            [REDIRECT, CIDR, OUTSIDE, OUTSIDE, OUTSIDE],
        ),
        (
            "includeOutboundPorts: 443",
            format!("mesh: {{{wide}}}\n"),
            [OUTSIDE, OUTSIDE, REDIRECT, OUTSIDE, OUTSIDE],
        ),
        ("includeOutboundCidrs: '*'", format!("mesh: {{{wide}}}\n"), [REDIRECT; 5]),
        ("includeOutboundCidrs: nonsense", String::new(), [REDIRECT; 5]),
    ] {
        let own = if own.is_empty() { String::new() } else { format!("  {own}\n") };
        write(&node, &[own, others]);
        for (to, rule) in addresses.iter().zip(rules) {
            wait_explained(&node, "a", to, rule);
        }
    }
    let notes = node.status()["pods"][pod]["notes"].to_string();
    assert!(notes.contains("nonsense"), "{notes}");
    let seen = |port: &str| {
        let (ok, text) =
            node.command(&["explain", "b", &format!("{}:{port}", node.pods[pod].address), "-o", "json"]);
        assert!(ok, "{text}");
        text
    };
    write(&node, &["  includeInboundPorts: 8080\n  excludeOutboundPorts: 7000\n".to_owned(), String::new()]);
    wait_explained(&node, "a", "10.1.1.1:7000", PORT);
    assert!(!seen("8080").contains(OUTSIDE) && seen("8081").contains(OUTSIDE), "{}", seen("8081"));
}

/// As long as all annotations of a pod together may be.
const LONGEST: usize = 256 * 1024;

fn repeated(item: &str) -> String {
    item.repeat(LONGEST / item.len())
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_longest_lists_delay_nobody_and_are_shared() {
    let mut node = WatcherNode::new();
    let pods: Vec<usize> = ["a", "b", "c", "d"].map(|name| node.pod(name)).into();
    let long = format!(
        "  excludeOutboundPorts: \"{}\"\n  excludeInboundPorts: \"{},8000-65535\"\n  excludeOutboundCidrs: \"{}\"\n",
        repeated("1-65535,"),
        repeated("x,"),
        repeated("10.2.0.0/16,")
    );
    write(&node, &[long.clone(), long.clone(), long, String::new()]);
    node.start(&[]);
    let tunnel = node.tunnel();
    let mut served = tunnel.take_snapshot();
    served.sort();
    assert_eq!(served, ["uid-a", "uid-b", "uid-c", "uid-d"]);
    for pod in &pods {
        node.wait_state(*pod, "open", "");
    }
    let _listeners: Vec<Lent> = pods.iter().map(|pod| listener(&node, *pod)).collect();
    for pod in ["a", "b", "c"] {
        for port in [1, 80, 40_000, 65_535] {
            assert_eq!(explained(&node, pod, &format!("10.1.1.1:{port}")), PORT, "{pod} {port}");
        }
    }
    assert_eq!(explained(&node, "d", "10.1.1.1:80"), REDIRECT);
    let status = node.status();
    assert_eq!(status["problems"].as_array().map(Vec::len), Some(0), "{:.2000}", status["problems"]);
    let notes = status["pods"][pods[0]]["notes"].as_array().unwrap().clone();
    assert!((2..=20).contains(&notes.len()), "{} notes", notes.len());
    for part in ["more invalid items", "only the first 65536 items"] {
        assert!(notes.iter().any(|note| note.as_str().unwrap().contains(part)), "{part}: {notes:?}");
    }
    assert!(node.log().len() < 100_000, "a log of {} bytes", node.log().len());
}

/// The node's maps, opened beside its watcher.
fn maps(node: &WatcherNode) -> Kernel {
    Kernel::open(&node.bpffs().join("adit").join(&node.name)).unwrap()
}

fn everything() -> ExclusionList {
    ExclusionList::default().with_cidr([0; 16], 0).with_cidr(mapped([0; 4]), MAPPED_BITS)
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn no_pod_inherits_a_list_that_a_killed_watcher_left() {
    let mut node = WatcherNode::new();
    let (a, b) = (node.pod("a"), node.pod("b"));
    let list = |port: u16| format!("  excludeOutboundPorts: [{port}]\n");
    write(&node, &[list(7000), String::new()]);
    node.start(&[]);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    node.wait_state(a, "open", "");
    node.kill_watcher();
    drop(tunnel);
    let mut kernel = maps(&node);
    assert_eq!(kernel.exclusions().unwrap().len(), 1);
    // As one that was killed between the list and its pod's entry.
    for id in 2..20 {
        kernel.add_exclusions(id, &everything()).unwrap();
    }
    drop(kernel);

    write(&node, &[list(7001), list(7002)]);
    node.start(&["--rescan", "1"]);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    let _listeners = [listener(&node, a), listener(&node, b)];
    for (pod, port) in [("a", 7001), ("b", 7002)] {
        wait_explained(&node, pod, &format!("10.1.1.1:{port}"), PORT);
        wait_explained(&node, pod, "10.1.1.1:80", REDIRECT);
        wait_explained(&node, pod, "[2001:db8::1]:80", REDIRECT);
    }
    let mut kernel = maps(&node);
    let lists = kernel.exclusions().unwrap();
    assert_eq!(lists.values().map(ExclusionList::len).collect::<Vec<_>>(), [1, 1]);
    // What others write there, or take away, a scan puts right.
    for (id, list) in &lists {
        kernel.add_exclusions(*id, &everything()).unwrap();
        kernel.remove_exclusions(*id, list).unwrap();
    }
    kernel.add_exclusions(999, &everything()).unwrap();
    let repaired = try_wait(LIMIT, || kernel.exclusions().unwrap() == lists);
    assert!(repaired.is_some(), "{:?}\n{}", kernel.exclusions(), node.log());
    node.wait_state(a, "open", "");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_list_that_finds_no_room_closes_its_pod_alone() {
    let mut node = WatcherNode::new();
    let (a, b) = (node.pod("a"), node.pod("b"));
    let list =
        |port: u16| format!("  excludeInboundPorts: [{port}]\n  excludeOutboundCidrs: [10.2.0.0/16]\n");
    write(&node, &[list(7000), String::new()]);
    node.start(&["--rescan", "600"]);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    node.wait_state(a, "open", "");
    node.wait_state(b, "open", "");
    let _listeners = [listener(&node, a), listener(&node, b)];
    let mut kernel = maps(&node);
    let mut filler = ExclusionList::default();
    for port in (2..=u16::MAX).step_by(2) {
        filler = filler.with_ports(OUTBOUND, port..=port).with_ports(INBOUND, port..=port);
    }
    // One entry is the first pod's, the others are taken.
    let room = filler.clone().with_ports(OUTBOUND, 1..=1);
    kernel.add_exclusions(999, &room).unwrap();
    write(&node, &[list(7000), list(7001)]);
    node.wait_state(b, "closed", "exclusions_not_set");
    assert_eq!(explained(&node, "b", "10.2.1.1:80"), "refuse: tunnel away, pod fails closed");
    assert_eq!(kernel.exclusions().unwrap().len(), 2, "nothing of the list is there");
    node.wait_state(a, "open", "");
    assert_eq!(explained(&node, "a", "10.2.1.1:80"), CIDR);
    let status = node.status();
    let text = status["pods"][b]["reason"]["text"].as_str().unwrap();
    assert!(text.contains("1 entries of ports and 1 of addresses") && text.len() < 300, "{text}");

    // With the first pod's list it shares that.
    write(&node, &[list(7000), list(7000)]);
    node.wait_state(b, "open", "");
    assert_eq!(explained(&node, "b", "10.2.1.1:80"), CIDR);
    kernel.remove_exclusions(999, &room).unwrap();
    write(&node, &[list(7000), list(7002)]);
    wait_for("a list for each", || kernel.exclusions().unwrap().len() == 2);
    node.wait_state(b, "open", "");
    // Who leaves takes his list along, and no other.
    write(&node, &[list(7000), String::new()]);
    wait_for("one list", || kernel.exclusions().unwrap().len() == 1);
    assert_eq!(explained(&node, "a", "10.2.1.1:80"), CIDR);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_whose_entries_find_no_room_is_named_and_comes_in_later() {
    let mut node = WatcherNode::new();
    let (a, b) = (node.pod("a"), node.pod("b"));
    write(&node, &[String::new()]);
    node.start(&["--rescan", "600"]);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    node.wait_state(a, "open", "");
    let mut kernel = maps(&node);
    let (_, entry) = kernel.cgroups().unwrap()[0];
    // Ids that no cgroup has.
    let others: Vec<u64> =
        (1 << 60..).take_while(|id| kernel.set_cgroup(*id, &entry).is_ok()).take(100_000).collect();
    assert!((1000..100_000).contains(&others.len()), "{} entries fill the map", others.len());
    write(&node, &[String::new(), String::new()]);
    // Its cgroup has no entry, so its connections pass: the status says so.
    node.wait_state(b, "bypassed", "not_in_maps");
    node.wait_state(a, "open", "");
    for id in others {
        kernel.remove_cgroup(id).unwrap();
    }
    let taken = tunnel.take_all();
    node.wait_state(b, "open", "");
    node.kill_watcher();
    drop(taken.join());
}

/// Who wrote what, beside what the maps have.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_lists_in_force_tell_who_wrote_them() {
    let mut node = WatcherNode::new();
    let pod = node.pod("a");
    let own = "  excludeOutboundPorts: [80, 7000-7010]\n  guards: istio\n".to_owned();
    let wide =
        "mesh: {excludeOutboundCidrs: 10.1.0.0/16}\nnamespaces: {default: {excludeOutboundPorts: 81}}\n";
    write(&node, &[own + wide]);
    node.start(&["--rescan", "600"]);
    let _told = node.tunnel().take_all();
    node.wait_state(pod, "open", "");
    let listed = || -> Vec<String> {
        let (ok, text) = node.command(&["status", "lists", "--pod", "a", "-o", "json"]);
        assert!(ok, "{text}");
        let lists: serde_json::Value = serde_json::from_str(&text).unwrap();
        let entries = lists["lists"][0]["entries"].as_array().unwrap().iter();
        let text = |entry: &serde_json::Value| {
            assert_eq!(entry["in_maps"], true, "{entry}");
            let from: Vec<&str> =
                entry["from"].as_array().unwrap().iter().filter_map(|one| one.as_str()).collect();
            let [list, item] = ["list", "item"].map(|key| entry[key].as_str().unwrap());
            format!("{list} {item}: {}", from.join("; "))
        };
        entries.map(text).collect()
    };
    let (entry, namespace) = ("its entry in the pods file", "`namespaces.default` in the pods file");
    let expected = [
        format!("excludeOutboundPorts 80-81: {entry}; {namespace}"),
        format!("excludeOutboundPorts 7000-7010: {entry}"),
        "excludeOutboundCidrs 10.1.0.0/16: `mesh` in the pods file".to_owned(),
        format!("guards uid:1337: {entry}"),
        format!("guards gid:1337: {entry}"),
    ];
    assert_eq!(listed(), expected);
    let because = |to: &str| node.command(&["explain", "a", to]).1;
    assert!(
        because("10.1.1.1:443")
            .contains("because of excludeOutboundCidrs 10.1.0.0/16, `mesh` in the pods file")
    );
    assert!(
        because("10.9.1.1:7001").contains(&format!("because of excludeOutboundPorts 7000-7010, {entry}"))
    );
    assert!(!because("10.9.1.1:443").contains("because"));
    // What somebody else wrote into the maps has no origin.
    let mut kernel = maps(&node);
    let id = *kernel.exclusions().unwrap().keys().next().unwrap();
    kernel.add_exclusions(id, &ExclusionList::default().with_ports(OUTBOUND, 9999..=9999)).unwrap();
    assert!(listed().contains(&"excludeOutboundPorts 9999: ".to_owned()), "{:?}", listed());
    let table = node.command(&["status", "lists"]).1;
    assert!(table.contains("nobody here") && table.contains("7000-7010"), "{table}");
}
