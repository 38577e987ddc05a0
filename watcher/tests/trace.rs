//! `watcher trace`: any number of readers, each with a filter of its own.

use std::{collections::BTreeSet, path::PathBuf};

use serde_json::Value;
use testbed::{
    process::{Placement, Process},
    wait::wait_for,
    watcher_node::WatcherNode,
};

/// One reader.
struct Reader(Process);

impl Reader {
    fn start(node: &WatcherNode, words: &[&str]) -> Self {
        let log: PathBuf = node.dir.path().join(format!("trace-{}.log", words.join("-").replace('/', "_")));
        let words: Vec<&str> = ["trace", "-o", "json"].iter().chain(words).copied().collect();
        let readers = || node.log().matches("trace on").count();
        let before = readers();
        let reader = Self(Process::spawn("trace", node.prepared(&words), &log));
        wait_for("the trace to be on", || readers() > before);
        reader
    }

    /// The far ends that it has told so far.
    fn told(&self) -> BTreeSet<String> {
        let output = self.0.output();
        let lines = output.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.map(|line| line["remote"].as_str().expect("an address").to_owned()).collect()
    }
}

/// A process of pod `number` that dials the two addresses and ends. The programs refuse both: there
/// is no tunnel.
fn dial(node: &WatcherNode, number: usize) {
    let pod = &node.pods[number];
    let script = "
import socket
for port in (80, 81):
    s = socket.socket(); s.setblocking(False)
    s.connect_ex(('10.88.NUMBER.99', port)); s.close()
"
    .replace("NUMBER", &number.to_string());
    let placed = Placement::in_cgroup(&pod.cgroup.join("container")).in_netns(&pod.netns);
    assert!(placed.command(&["python3", "-c", &script]).status().expect("python3").success());
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn each_of_several_traces_tells_what_it_was_asked_for() {
    let mut node = WatcherNode::new();
    let (a, b) = (node.pod("a"), node.pod("b"));
    node.write_pods(&[true, true], "");
    node.start(&[]);
    for pod in [a, b] {
        node.wait_state(pod, "closed", "no_tunnel");
    }
    let far = |numbers: &[usize], ports: &[u16]| -> BTreeSet<String> {
        let of = |number: &usize| {
            let number = *number;
            ports.iter().map(move |port| format!("10.88.{number}.99:{port}"))
        };
        numbers.iter().flat_map(of).collect()
    };
    let mut readers = vec![
        (Reader::start(&node, &["--pod", "a"]), far(&[a], &[80, 81])),
        (Reader::start(&node, &["--pod", "default/b", "--port", "80"]), far(&[b], &[80])),
        (Reader::start(&node, &["--not-address", "10.88.0.0/24"]), far(&[b], &[80, 81])),
        (Reader::start(&node, &["--address", "10.88.1.99"]), far(&[b], &[80, 81])),
        (Reader::start(&node, &[]), far(&[a, b], &[80, 81])),
    ];
    let told = |readers: &[(Reader, BTreeSet<String>)]| {
        for pod in [a, b] {
            dial(&node, pod);
        }
        for (reader, expected) in readers {
            wait_for("what was asked for", || reader.told().is_superset(expected));
            assert_eq!(&reader.told(), expected);
        }
    };
    told(&readers);
    // One that ends leaves the others alone; what the programs leave out changes with it.
    drop(readers.pop());
    told(&readers);
    drop(readers.drain(2..).collect::<Vec<_>>());
    told(&readers);
    drop(readers);
    wait_for("the programs to be silent", || node.log().contains("trace off"));
    let (ok, said) = node.command(&["trace", "--pod", "nobody"]);
    assert!(!ok && said.is_empty(), "{said}");
}
