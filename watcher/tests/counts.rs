//! What the watcher counts of pods' connections: by which rule the programs decided, and those that
//! passed them.

use std::fs;

use serde_json::Value;
use testbed::{
    cluster::{Cluster, ClusterPod, Enrol},
    process::Process,
    wait::wait_for,
};

/// Dials the address once a second, and keeps every connection.
const KEEP: &str = r"
import socket, sys, time
kept = []
while True:
    try:
        kept.append(socket.create_connection((sys.argv[1], 8080), timeout=5))
    except OSError as error:
        print(error, flush=True)
    time.sleep(1)
";

const METRICS: &str = "127.0.0.1:15099";
const FOUND: &str = "adit_watcher_connections_in_clear_total";

/// A client in the mesh of node 0 and a server outside it on node 1.
fn client_and_server() -> (Cluster, ClusterPod, ClusterPod) {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let server = cluster.pod("server", 1, Enrol::Plain);
    cluster.serve_web(&server, "hello");
    cluster.nodes[0].watcher_words =
        ["--rescan", "1", "--metrics-address", METRICS].map(str::to_owned).into();
    cluster.start();
    (cluster, client, server)
}

fn keep(cluster: &Cluster, client: &ClusterPod, server: &ClusterPod) -> Process {
    client.spawn("keep", &["python3", "-c", KEEP, &server.v4], &cluster.nodes[0].dir.join("keep.log"))
}

/// The value of a metric of the watcher of node 0; 0: it has no such line.
fn metric(cluster: &Cluster, name: &str) -> u64 {
    let (status, text) = cluster.nodes[0].http(&format!("http://{METRICS}/metrics"));
    assert_eq!(status, 200, "{text}");
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(0, |value| value.parse().unwrap())
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn verdicts_are_counted_by_rule_and_pod() {
    let (mut cluster, client, server) = client_and_server();
    let url = format!("http://{}:8080/", server.v4);
    for _ in 0..3 {
        client.curl(&url).unwrap();
    }
    let redirect = r#"adit_watcher_verdicts_total{rule="redirect to the tunnel"}"#;
    assert_eq!(metric(&cluster, redirect), 3);
    let listed = |cluster: &Cluster| -> Value {
        let output = cluster.nodes[0].watcher_command(&["status", "verdicts", "-o", "json"]);
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["verdicts"].clone()
    };
    let is_ours = |verdict: &Value| verdict["pod"] == "client" && verdict["rule"] == "redirect to the tunnel";
    let of_pod = |verdicts: &Value| verdicts.as_array().unwrap().iter().find(|v| is_ours(v)).cloned();
    let found = of_pod(&listed(&cluster)).unwrap_or_else(|| panic!("{}", listed(&cluster)));
    assert_eq!(found["count"], 3);
    let table = cluster.nodes[0].watcher_command(&["status", "verdicts"]).stdout;
    let table = String::from_utf8(table).unwrap();
    assert!(
        table.lines().any(|line| line.contains("client")
            && line.contains(" 3  ")
            && line.contains("redirect to the tunnel")),
        "{table}"
    );

    // A pod that left is shown no more, and its connections did happen.
    cluster.label(&["client"], Enrol::Plain);
    wait_for("the pod's counts to go", || of_pod(&listed(&cluster)).is_none().then_some(()));
    assert_eq!(metric(&cluster, redirect), 3);
}

/// What all pods of node 0 guard.
fn guard(cluster: &Cluster, guards: &str) {
    let path = cluster.nodes[0].pods_file();
    let text = fs::read_to_string(&path).unwrap();
    let pods: String =
        text.lines().filter(|line| !line.starts_with("mesh:")).flat_map(|line| [line, "\n"]).collect();
    let next = path.with_extension("guards");
    fs::write(&next, format!("{pods}mesh: {{guards: '{guards}'}}\n")).unwrap();
    fs::rename(next, path).unwrap();
}

/// No list of sockets tells a group: what a guarded one has in clear is right, and what others have is
/// found all the same.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn pods_that_guard_a_group_are_audited_too() {
    let (cluster, client, server) = client_and_server();
    guard(&cluster, "gid:0");
    let _kept = keep(&cluster, &client, &server);
    let guarded = || metric(&cluster, r#"adit_watcher_verdicts_total{rule="leave: caller is guarded"}"#);
    wait_for("guarded connections, and scans meanwhile", || (guarded() >= 5).then_some(()));
    assert_eq!(metric(&cluster, FOUND), 0, "{}", cluster.nodes[0].watcher_log());
    guard(&cluster, "gid:4242");
    let opened = || metric(&cluster, r#"adit_watcher_verdicts_total{rule="redirect to the tunnel"}"#);
    wait_for("connections by the tunnel, and scans meanwhile", || (opened() >= 4).then_some(()));
    assert_eq!(metric(&cluster, FOUND), 0, "{}", cluster.nodes[0].watcher_log());
    wait_for("a connection in clear to be counted", || {
        unlink(&cluster);
        (metric(&cluster, FOUND) > 0).then_some(())
    });
    assert_eq!(metric(&cluster, "adit_watcher_connections_not_audited_total"), 0);
}

fn links(cluster: &Cluster) -> Vec<fs::DirEntry> {
    let folder = cluster.bpffs().join("adit").join(&cluster.nodes[0].pins_name).join("links");
    let all = fs::read_dir(folder).unwrap().flatten();
    all.filter(|link| link.file_name().to_string_lossy().contains("connect")).collect()
}

/// A scan makes them again.
fn unlink(cluster: &Cluster) {
    for link in links(cluster) {
        let _ = fs::remove_file(link.path());
    }
}

/// Somebody removes a link of the programs: what passes meanwhile is found, with the pod and both ends.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn connections_that_passed_the_programs_are_counted_and_named() {
    let (cluster, client, server) = client_and_server();
    let _kept = keep(&cluster, &client, &server);
    let opened = || metric(&cluster, r#"adit_watcher_verdicts_total{rule="redirect to the tunnel"}"#);
    wait_for("connections by the tunnel, and scans meanwhile", || (opened() >= 4).then_some(()));
    assert_eq!(metric(&cluster, FOUND), 0, "{}", cluster.nodes[0].watcher_log());

    let links_before = links(&cluster).len();
    wait_for("a connection in clear to be counted", || {
        unlink(&cluster);
        (metric(&cluster, FOUND) > 0).then_some(())
    });
    wait_for("the links to be made again", || (links(&cluster).len() == links_before).then_some(()));
    assert!(cluster.nodes[0].watcher_log().contains("removed links of ours"));
    let log = cluster.nodes[0].watcher_log();
    let line = log.lines().find(|line| line.contains("no tunnel carries")).unwrap_or_else(|| panic!("{log}"));
    assert!(line.contains(&client.uid()) && line.contains(&format!("{}:8080", server.v4)), "{line}");
}
