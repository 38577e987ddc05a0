//! `watcher trace`: any number of readers, each with a filter of its own.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
};

use nix::fcntl::OFlag;

use serde_json::Value;
use testbed::{
    mount::Mount,
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
    dial_ports(node, number, &[80, 81]);
}

/// The same at these ports.
fn dial_ports(node: &WatcherNode, number: usize, ports: &[u16]) {
    let pod = &node.pods[number];
    let script = "
import socket
for port in PORTS:
    s = socket.socket(); s.setblocking(False)
    s.connect_ex(('10.88.NUMBER.99', port)); s.close()
"
    .replace("NUMBER", &number.to_string())
    .replace("PORTS", &format!("{ports:?}"));
    let placed = Placement::in_cgroup(&pod.cgroup.join("container")).in_netns(&pod.netns);
    assert!(placed.command(&["python3", "-c", &script]).status().expect("python3").success());
}

/// A node whose two pods may not connect, as there is no tunnel.
fn two_closed_pods() -> (WatcherNode, [usize; 2]) {
    let mut node = WatcherNode::new();
    let pods = [node.pod("a"), node.pod("b")];
    node.write_pods(&[true, true], "");
    node.start(&[]);
    for pod in pods {
        node.wait_state(pod, "closed", "no_tunnel");
    }
    (node, pods)
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn each_of_several_traces_tells_what_it_was_asked_for() {
    let (node, [a, b]) = two_closed_pods();
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

/// What stands in trace_pipe of these ports since the last look. Whoever reads it takes it from all.
fn piped(pipe: &mut File, ports: &[u16]) -> String {
    let mut bytes = Vec::new();
    match pipe.read_to_end(&mut bytes) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => panic!("trace_pipe: {error}"),
        _ => {}
    }
    let is_ours = |line: &&str| ports.iter().any(|port| line.contains(&format!(":{port}: ")));
    String::from_utf8_lossy(&bytes).lines().filter(is_ours).map(|line| line.to_owned() + "\n").collect()
}

/// Ports that no other test dials, since what they trace stands in the same pipe.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn trace_pipe_has_a_readable_line_for_what_the_trace_asks_for_and_nothing_else() {
    let (node, [a, b]) = two_closed_pods();
    let at = node.dir.path().join("tracefs");
    fs::create_dir(&at).expect("folder");
    let tracefs = Mount::tracefs(&at);
    let mut pipe = File::options()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(tracefs.path().join("trace_pipe"))
        .expect("trace_pipe");
    let dial_both = |ports: &[u16]| [a, b].into_iter().for_each(|pod| dial_ports(&node, pod, ports));
    for (words, ports, expected) in [
        (&["--pod", "a"][..], [4711, 4712], &["10.88.0.99:4711", "10.88.0.99:4712"][..]),
        (&["--pod", "default/b", "--port", "4713"], [4713, 4714], &["10.88.1.99:4713"]),
        (&["--not-address", "10.88.0.0/24"], [4715, 4716], &["10.88.1.99:4715", "10.88.1.99:4716"]),
        (&["--address", "10.88.0.99"], [4717, 4718], &["10.88.0.99:4717", "10.88.0.99:4718"]),
    ] {
        dial_both(&ports);
        assert_eq!(piped(&mut pipe, &ports), "", "nobody traces");
        let mut reader = Reader::start(&node, words);
        dial_both(&ports);
        let mut lines = String::new();
        wait_for("the lines", || {
            lines += &piped(&mut pipe, &ports);
            lines.lines().count() >= expected.len()
        });
        lines += &piped(&mut pipe, &ports);
        let said: Vec<&str> =
            lines.lines().filter_map(|line| line.split_once("adit: ")).map(|(_, said)| said).collect();
        let expected: Vec<String> = expected
            .iter()
            .map(|to| format!("connect to {to}: refuse: tunnel away, pod fails closed"))
            .collect();
        assert_eq!(said, expected, "{words:?}");
        let offs = node.log().matches("trace off").count();
        reader.0.kill();
        wait_for("the trace to end", || node.log().matches("trace off").count() > offs);
    }
}
