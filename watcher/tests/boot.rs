//! After a boot nothing closes pods until a watcher runs, and pods may start before it does.

use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::Signal;
use testbed::{
    cluster::{Cluster, ClusterPod, Enrol},
    process::Process,
    wait::{LIMIT, try_wait, wait_for},
};

/// An entry of the pods file; `more` are further lines.
fn entry(pod: &ClusterPod, enrolled: bool, more: &str) -> String {
    let label = if enrolled { "ambient" } else { "none" };
    format!(
        "- uid: {}\n  name: {name}\n  namespace: demo\n  serviceAccount: {name}\n  cgroup: {}\n  \
         labels: {{istio.io/dataplane-mode: {label}}}\n{more}",
        pod.uid(),
        pod.cgroup.parent().expect("pod cgroup").display(),
        name = pod.name,
    )
}

fn publish(cluster: &Cluster, entries: &[String]) {
    cluster.nodes[0].write_pods(&entries.concat());
}

fn python(cluster: &Cluster, pod: &ClusterPod, name: &str, script: &str) -> Process {
    let log = cluster.dir.path().join(format!("{}-{name}.log", pod.name));
    pod.spawn(name, &["python3", "-c", script], &log)
}

/// A server that holds every connection.
fn server(cluster: &Cluster, pod: &ClusterPod, port: u16) -> Process {
    let script = format!(
        "
import socket
s = socket.socket(socket.AF_INET6); s.bind(('::', {port})); s.listen(); held = []
print('listening', flush=True)
while True: held.append(s.accept())
"
    );
    let process = python(cluster, pod, &format!("server-{port}"), &script);
    wait_for("the server", || process.output().contains("listening"));
    process
}

/// A connection that is held open; how it ends is printed.
fn held(cluster: &Cluster, pod: &ClusterPod, to: &str, port: u16) -> Process {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let name = format!("held-{}", COUNT.fetch_add(1, Ordering::Relaxed));
    let script = format!(
        "
import errno, socket
s = socket.create_connection(('{to}', {port}), 10); s.settimeout(None)
print('connected', flush=True)
try: print('data' if s.recv(1) else 'end', flush=True)
except OSError as error: print(errno.errorcode[error.errno], flush=True)
"
    );
    let process = python(cluster, pod, &name, &script);
    wait_for("the connection", || process.output().contains("connected"));
    process
}

fn state(cluster: &Cluster, name: &str) -> String {
    let status: serde_json::Value = serde_json::from_str(&cluster.nodes[0].status()).unwrap_or_default();
    let pods = status["pods"].as_array().cloned().unwrap_or_default();
    pods.iter().find(|pod| pod["name"] == name).map(|pod| pod["state"].to_string()).unwrap_or_default()
}

fn wait_state(cluster: &Cluster, name: &str, wanted: &str) {
    let reached = try_wait(LIMIT, || state(cluster, name) == format!("\"{wanted}\""));
    assert!(reached.is_some(), "{name}: {}\n{}", state(cluster, name), cluster.nodes[0].story());
}

/// As after `watcher uninstall`: nothing is attached, and the tunnel has served the pods before.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_tunnel_that_has_listened_since_before_the_programs_serves_again() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let plain = cluster.pod("plain", 1, Enrol::Plain);
    cluster.serve_web(&plain, "hello");
    cluster.start();
    let url = format!("http://{}:8080/", plain.v4);
    assert_eq!(client.curl(&url), Ok(format!("hello, client {}\n", client.v4)));
    let mut watcher = cluster.nodes[0].watcher.take().expect("a watcher");
    watcher.signal(Signal::SIGTERM);
    assert!(watcher.wait().success(), "{}", cluster.nodes[0].story());
    // The pod is out of the mesh.
    assert_eq!(client.curl(&url), Ok(format!("hello, client {}\n", client.v4)));
    cluster.replace_watcher(0, std::time::Duration::ZERO);
    wait_state(&cluster, "client", "open");
    let carried = try_wait(LIMIT, || client.curl(&url).ok());
    assert!(carried.is_some(), "{}", cluster.nodes[0].story());
    wait_for("a record of the tunnel", || {
        cluster.nodes[0].access_log().iter().filter(|line| line.contains("outbound")).count() >= 2
    });
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn what_pods_made_in_clear_before_the_first_watcher_is_cut() {
    let mut cluster = Cluster::new();
    let plain = cluster.pod("plain", 1, Enrol::Plain);
    let closed = cluster.pod("closed", 0, Enrol::Mesh);
    let open = cluster.pod("opened", 0, Enrol::Mesh);
    let later = cluster.pod("later", 0, Enrol::Mesh);
    let _servers =
        [server(&cluster, &plain, 8080), server(&cluster, &plain, 6379), server(&cluster, &closed, 7070)];
    let cut = [
        held(&cluster, &closed, &plain.v4, 8080),
        held(&cluster, &closed, &plain.v6, 8080),
        held(&cluster, &plain, &closed.v4, 7070),
    ];
    let kept = [
        held(&cluster, &closed, &plain.v4, 6379),
        held(&cluster, &closed, "127.0.0.1", 7070),
        held(&cluster, &closed, &closed.v4, 7070),
        held(&cluster, &open, &plain.v4, 8080),
        held(&cluster, &later, &plain.v4, 8080),
    ];
    cluster.publish_mesh();
    let entries = |later_enrolled: bool| {
        [
            entry(&closed, true, "  excludeOutboundPorts: [6379]\n"),
            entry(&open, true, "  failMode: open\n"),
            entry(&later, later_enrolled, ""),
        ]
    };
    publish(&cluster, &entries(false));
    let (cgroup2, bpffs, mesh, ca) =
        (cluster.cgroup2.clone(), cluster.bpffs(), cluster.mesh_file(), cluster.ca_dir());
    cluster.nodes[0].start_watcher(&cgroup2, &bpffs, &["--rescan", "1"]);
    // No tunnel is needed for that: the pod is closed.
    for held in &cut {
        let ended = try_wait(LIMIT, || held.output().lines().count() == 2);
        assert!(ended.is_some(), "still in clear\n{}", cluster.nodes[0].story());
        assert!(held.output().contains("ECONN"), "{}", held.output());
    }
    cluster.nodes[0].start_tunnel(&mesh, &ca);
    wait_state(&cluster, "closed", "open");
    wait_state(&cluster, "opened", "open");
    wait_state(&cluster, "later", "plain");
    // A label that is put on a running pod breaks nothing.
    publish(&cluster, &entries(true));
    wait_state(&cluster, "later", "open");
    let through = held(&cluster, &closed, &plain.v4, 8080);
    // Nor does the next watcher, which finds programs attached.
    let scans = |cluster: &Cluster| cluster.nodes[0].watcher_log().matches("pod list received").count();
    let before = scans(&cluster);
    cluster.replace_watcher(0, std::time::Duration::ZERO);
    wait_for("the next watcher", || scans(&cluster) > before);
    for name in ["closed", "opened", "later"] {
        wait_state(&cluster, name, "open");
    }
    for held in kept.iter().chain([&through]) {
        assert_eq!(held.output(), "connected\n", "{}", cluster.nodes[0].story());
    }
}
