//! What goes wrong is named, refused, and nobody else's trouble.

mod bed;

use std::{fs, process::Command, time::Duration};

use bed::{Bed, Enrol, Pod, node::binary, process::text, wait_for};

/// The watcher's word on each pod of node a: name → (state, reason code).
fn states(bed: &Bed) -> Vec<(String, String, String)> {
    let status = bed.nodes[0].status();
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

fn pod_cgroup(pod: &Pod) -> &std::path::Path {
    pod.cgroup.parent().expect("pod cgroup")
}

fn wait_for_state(bed: &Bed, name: &str, state: &str, reason: &str) {
    let wanted = (name.to_owned(), state.to_owned(), reason.to_owned());
    let mut seen = Vec::new();
    let deadline = std::time::Instant::now() + Duration::from_secs(15);
    while std::time::Instant::now() < deadline {
        seen = states(bed);
        if seen.contains(&wanted) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("wanted {wanted:?}, found {seen:?}\n{}", bed.nodes[0].story());
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn bad_entries_are_refused_by_name_and_the_others_go_on() {
    let mut bed = Bed::new();
    let good = bed.pod("good", 0, Enrol::Mesh);
    let elsewhere = bed.pod("elsewhere", 0, Enrol::Mesh);
    let shared = bed.pod("shared", 0, Enrol::Mesh);
    let plain = bed.pod("plain", 1, Enrol::Plain);
    bed.serve_web(&plain, "hello");
    // A "pod" whose process lives in the node's own netns.
    let host_cgroup = bed.nodes[0].pods_cgroup().join("podhost");
    fs::create_dir_all(&host_cgroup).expect("cgroup");
    let command = bed::process::placed(&host_cgroup, &bed.nodes[0].netns, &["sleep", "infinity"]);
    let log = bed.dir.path().join("host.log");
    bed.keep(bed::process::Process::spawn("sleep", command, &log));

    bed.publish();
    let missing = bed.nodes[0].pods_cgroup().join("podmissing");
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
    fs::write(bed.nodes[0].pods_file(), file).expect("pods file");
    let (cgroup2, bpffs, mesh, ca) = (bed.cgroup2.clone(), bed.bpffs(), bed.mesh_file(), bed.ca_dir());
    bed.nodes[0].start_watcher(&cgroup2, &bpffs, &["--detach"]);
    bed.nodes[0].start_tunnel(&mesh, &ca);

    wait_for_state(&bed, "good", "open", "");
    for (name, reason) in [
        ("elsewhere", "address_not_held"),
        ("two", "duplicate_cgroup"),
        ("host", "host_netns"),
        ("missing", "cgroup_gone"),
        ("misspelt", "bad_entry"),
    ] {
        wait_for_state(&bed, name, "refused", reason);
    }
    let url = format!("http://{}:8080/", plain.v4);
    assert_eq!(good.curl(&url), Ok(format!("hello, client {}\n", good.v4)));
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_file_that_is_no_yaml_leaves_the_last_good_one_in_force() {
    let mut bed = Bed::new();
    let client = bed.pod("client", 0, Enrol::Mesh);
    let plain = bed.pod("plain", 1, Enrol::Plain);
    bed.serve_web(&plain, "hello");
    bed.start();
    fs::write(bed.nodes[0].pods_file(), "pods: [\n").expect("pods file");
    let error = wait_for("the complaint", Duration::from_secs(5), || {
        let status = bed.nodes[0].watcher_command(&["status", "-o", "json"]).stdout;
        let status: serde_json::Value = serde_json::from_slice(&status).ok()?;
        status.pointer("/source/error")?.as_str().map(str::to_owned)
    });
    assert!(error.contains("pods.yaml"), "names the file: {error}");
    wait_for_state(&bed, "client", "open", "");
    assert!(client.curl(&format!("http://{}:8080/", plain.v4)).is_ok());
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_whose_cgroup_vanishes_leaves_nothing_in_the_maps() {
    let mut bed = Bed::new();
    let client = bed.pod("client", 0, Enrol::Mesh);
    let stays = bed.pod("stays", 0, Enrol::Mesh);
    bed.start();
    client.end();
    wait_for("the pod to be gone", Duration::from_secs(2), || {
        let output = bed.nodes[0].watcher_command(&["status", "cgroups", "-o", "json"]);
        let said = text(&output);
        (output.status.success() && !said.contains("podclient") && said.contains("podstays")).then_some(())
    });
    wait_for_state(&bed, &stays.name, "open", "");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn preflight_names_what_is_missing_and_nothing_is_attached() {
    let bed = Bed::new();
    let nowhere = bed.dir.path().join("no-bpffs");
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
    let good = preflight(&bed.bpffs(), &bed.cgroup2);
    assert!(good.status.success(), "{}", text(&good));
    for (name, bpffs, cgroups) in
        [("bpffs", nowhere.as_path(), bed.cgroup2.as_path()), ("cgroup2", &bed.bpffs(), nowhere.as_path())]
    {
        let output = preflight(bpffs, cgroups);
        assert_eq!(output.status.code(), Some(1), "{name}: {}", text(&output));
        let checks: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let failed = checks.to_string();
        assert!(failed.contains(name), "{failed}");
    }
    assert_eq!(
        fs::read_dir(bed.bpffs())
            .expect("bpffs")
            .flatten()
            .filter(|entry| { entry.file_name().to_str().is_some_and(|name| name.starts_with("adit")) })
            .count(),
        0
    );
}
