//! Bad input is refused by name, and other pods are not affected.

use std::{fs, process::Command, time::Duration};

use adit_ebpf_loader::{Kernel, own_netns_cookie};
use testbed::{
    cluster::{Cluster, ClusterPod, Enrol},
    command::{run, text},
    netns::TestNetns,
    process::{Placement, Process},
    program::binary,
    wait::{LIMIT, try_wait, wait_at_most, wait_for},
    watcher_node::WatcherNode,
};

/// The watcher's word on each pod of node a: name → (state, reason code).
fn states(cluster: &Cluster) -> Vec<(String, String, String)> {
    let status = cluster.nodes[0].status();
    let value: serde_json::Value = serde_json::from_str(&status).unwrap_or_default();
    let word = |pod: &serde_json::Value, pointer: &str| {
        pod.pointer(pointer).and_then(|v| v.as_str()).unwrap_or_default().to_owned()
    };
    let pods = value["pods"].as_array().cloned().unwrap_or_default();
    pods.iter().map(|pod| (word(pod, "/name"), word(pod, "/state"), word(pod, "/reason/code"))).collect()
}

fn entry(name: &str, cgroup: &std::path::Path, more: &str) -> String {
    format!(
        "- uid: uid-{name}\n  name: {name}\n  namespace: demo\n  serviceAccount: {name}\n  cgroup: {}\n  \
         labels: {{istio.io/dataplane-mode: ambient}}\n{more}",
        cgroup.display()
    )
}

fn pod_cgroup(pod: &ClusterPod) -> &std::path::Path {
    pod.cgroup.parent().expect("pod cgroup")
}

fn wait_for_state(cluster: &Cluster, name: &str, state: &str, reason: &str) {
    let wanted = (name.to_owned(), state.to_owned(), reason.to_owned());
    let mut seen = Vec::new();
    let reached = try_wait(LIMIT, || {
        seen = states(cluster);
        seen.contains(&wanted)
    });
    assert!(reached.is_some(), "wanted {wanted:?}, found {seen:?}\n{}", cluster.nodes[0].story());
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn bad_entries_are_refused_by_name_and_the_others_go_on() {
    let mut cluster = Cluster::new();
    let good = cluster.pod("good", 0, Enrol::Mesh);
    let elsewhere = cluster.pod("elsewhere", 0, Enrol::Mesh);
    let shared = cluster.pod("shared", 0, Enrol::Mesh);
    let plain = cluster.pod("plain", 1, Enrol::Plain);
    cluster.serve_web(&plain, "hello");
    // A "pod" whose process lives in the node's own netns.
    let host_cgroup = cluster.nodes[0].pods_cgroup().join("podhost");
    fs::create_dir_all(&host_cgroup).expect("cgroup");
    let command =
        Placement::in_cgroup(&host_cgroup).in_netns(&cluster.nodes[0].netns).command(&["sleep", "infinity"]);
    let log = cluster.dir.path().join("host.log");
    cluster.keep(Process::spawn("sleep", command, &log));

    cluster.publish();
    let missing = cluster.nodes[0].pods_cgroup().join("podmissing");
    let file = [
        "pods:\n".to_owned(),
        entry("good", pod_cgroup(&good), ""),
        entry("elsewhere", pod_cgroup(&elsewhere), "  addresses: [10.9.9.9]\n"),
        entry("one", pod_cgroup(&shared), ""),
        entry("two", pod_cgroup(&shared), ""),
        entry("host", &host_cgroup, ""),
        entry("missing", &missing, ""),
        entry("misspelt", &missing, "  faleMode: open\n"),
    ]
    .concat();
    fs::write(cluster.nodes[0].pods_file(), file).expect("pods file");
    let (cgroup2, bpffs, mesh, ca) =
        (cluster.cgroup2.clone(), cluster.bpffs(), cluster.mesh_file(), cluster.ca_dir());
    cluster.nodes[0].start_watcher(&cgroup2, &bpffs, &["--detach"]);
    cluster.nodes[0].start_tunnel(&mesh, &ca);

    wait_for_state(&cluster, "good", "open", "");
    for (name, reason) in [
        ("elsewhere", "address_not_held"),
        ("two", "duplicate_cgroup"),
        ("host", "host_netns"),
        ("missing", "cgroup_gone"),
        ("misspelt", "bad_entry"),
    ] {
        wait_for_state(&cluster, name, "refused", reason);
    }
    let url = format!("http://{}:8080/", plain.v4);
    assert_eq!(good.curl(&url), Ok(format!("hello, client {}\n", good.v4)));
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_file_that_is_no_yaml_leaves_the_last_good_one_in_force() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let plain = cluster.pod("plain", 1, Enrol::Plain);
    cluster.serve_web(&plain, "hello");
    cluster.start();
    fs::write(cluster.nodes[0].pods_file(), "pods: [\n").expect("pods file");
    let error = wait_for("the complaint", || {
        let status = cluster.nodes[0].watcher_command(&["status", "-o", "json"]).stdout;
        let status: serde_json::Value = serde_json::from_slice(&status).ok()?;
        status.pointer("/source/error")?.as_str().map(str::to_owned)
    });
    assert!(error.contains("pods.yaml"), "names the file: {error}");
    wait_for_state(&cluster, "client", "open", "");
    assert!(client.curl(&format!("http://{}:8080/", plain.v4)).is_ok());
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_whose_cgroup_vanishes_leaves_nothing_in_the_maps() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let stays = cluster.pod("stays", 0, Enrol::Mesh);
    cluster.start();
    client.end();
    wait_at_most(Duration::from_secs(2), "the pod to be gone", || {
        let output = cluster.nodes[0].watcher_command(&["status", "cgroups", "-o", "json"]);
        let said = text(&output);
        (output.status.success() && !said.contains("podclient") && said.contains("podstays")).then_some(())
    });
    wait_for_state(&cluster, &stays.name, "open", "");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn preflight_names_what_is_missing_and_nothing_is_attached() {
    let cluster = Cluster::new();
    let nowhere = cluster.dir.path().join("no-bpffs");
    fs::create_dir(&nowhere).expect("folder");
    let preflight = |bpffs: &std::path::Path, cgroups: &std::path::Path| {
        Command::new(binary("watcher"))
            .args(["preflight", "-o", "json", "--bpffs"])
            .arg(bpffs)
            .arg("--cgroup-root")
            .arg(cgroups)
            .output()
            .expect("watcher")
    };
    let good = preflight(&cluster.bpffs(), &cluster.cgroup2);
    assert!(good.status.success(), "{}", text(&good));
    for (name, bpffs, cgroups) in [
        ("bpffs", nowhere.as_path(), cluster.cgroup2.as_path()),
        ("cgroup2", &cluster.bpffs(), nowhere.as_path()),
    ] {
        let output = preflight(bpffs, cgroups);
        assert_eq!(output.status.code(), Some(1), "{name}: {}", text(&output));
        let checks: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let failed = checks.to_string();
        assert!(failed.contains(name), "{failed}");
    }
    assert_eq!(
        fs::read_dir(cluster.bpffs())
            .expect("bpffs")
            .flatten()
            .filter(|entry| { entry.file_name().to_str().is_some_and(|name| name.starts_with("adit")) })
            .count(),
        0
    );
}

/// A tunnel's connections are counted by netns, of which many come and go.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn counts_of_connections_go_with_their_netns() {
    let (mut node, pod) = WatcherNode::with_pod(true, &["--rescan", "1"]);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    node.wait_state(pod, "open", "");
    let [living, gone] = ["living", "gone"].map(|name| {
        let netns = TestNetns::new(format!("{}-{name}", node.name));
        run(&format!("ip -n {netns} addr add 10.5.5.5/32 dev lo\nip -n {netns} link set lo up"));
        // Nobody listens, so it ends at once; it is counted all the same.
        let dial = ["bash", "-c", "exec 3<>/dev/tcp/10.5.5.5/9"];
        let placed = Placement::in_cgroup(&node.cgroup.join("tunnel")).in_netns(&netns);
        placed.command(&dial).output().expect("bash");
        let cookie = netns.enter(own_netns_cookie).expect("a cookie");
        (netns, cookie)
    });
    let pins = node.bpffs().join("adit").join(&node.name);
    let counted = || Kernel::open(&pins).unwrap().netns_with_pinned_connections().unwrap();
    assert!(counted().is_superset(&[living.1, gone.1].into()), "{:?} {living:?} {gone:?}", counted());
    gone.0.delete();
    node.kill_watcher();
    node.start(&["--rescan", "1"]);
    let swept = try_wait(LIMIT, || !counted().contains(&gone.1));
    assert!(swept.is_some(), "{:?} {living:?} {gone:?}\n{}", counted(), node.log());
    assert!(counted().contains(&living.1), "a count of a netns that is there");
}
