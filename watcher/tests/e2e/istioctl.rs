//! Istio's command line, which finds our tunnels and reads them as Istio's own.

use std::process::{Command, Stdio};

use testbed::{command::text, istio, real_cluster::Pod, wait::try_wait_slowly};

use crate::rig::{LIMIT, Rig};

/// What `istioctl WORDS` prints.
///
/// # Errors
/// Everything that it prints, when it fails.
pub fn run(rig: &Rig, words: &[&str]) -> Result<String, String> {
    let mut command = Command::new(istio::program("istioctl"));
    command.arg("--kubeconfig").arg(rig.cluster.api.admin_kubeconfig()).args(words);
    let output = command.env("HOME", rig.cluster.dir.path()).stdin(Stdio::null()).output().expect("istioctl");
    if output.status.success() { Ok(text(&output)) } else { Err(text(&output)) }
}

/// Waits until a line of what it prints has all of these words.
pub fn wait_line(rig: &Rig, words: &[&str], wanted: &[&str]) {
    let mut said = Ok(String::new());
    let found = try_wait_slowly(LIMIT, || {
        said = run(rig, words);
        let lines = said.as_deref().unwrap_or_default().lines();
        lines.into_iter().any(|line| {
            let has: Vec<&str> = line.split_whitespace().collect();
            wanted.iter().all(|word| has.contains(word))
        })
    });
    match said {
        Ok(said) if found.is_some() => println!("# istioctl {}\n{said}", words.join(" ")),
        said => panic!("istioctl {}: no line with {wanted:?}\n{said:?}", words.join(" ")),
    }
}

/// All that it reads from tunnels, where `server` of `node2` serves under the policy `client-only`, and
/// the pod `connections-1` of `node1` has connections to it.
pub fn assert_reads_tunnels(rig: &Rig, server: &Pod) {
    let tunnel = rig.agent("node2").name;
    let config = |kind: &str, more: &[&str], wanted: &[&str]| {
        wait_line(rig, &[&["ztunnel-config", kind], more].concat(), wanted);
    };
    config("workload", &["--node", "node2"], &["demo", "server", &server.ip, "node2", "None", "HBONE"]);
    // By the pod that it is about.
    config("workload", &["server.demo"], &["demo", "server", &server.ip, "node2", "None", "HBONE"]);
    let address = ["-n", "demo", "get", "service", "server", "-o", "jsonpath={.spec.clusterIP}"];
    config("service", &[&tunnel], &["demo", "server", &rig.cluster.kubectl(&address), "None", "1/1"]);
    config("policy", &[&tunnel], &["demo", "client-only", "Allow", "WorkloadSelector"]);
    let identity = "spiffe://cluster.local/ns/demo/sa/server";
    config("certificate", &[&tunnel], &[identity, "Leaf", "Available", "true"]);
    config("certificate", &[&tunnel], &[identity, "Root", "Available", "true"]);
    config("connections", &["--node", "node1"], &["connections-1.demo", "Outbound", "HBONE"]);
    config("connections", &["--node", "node2"], &["server.demo", "Inbound", "HBONE"]);
    for kind in ["workload", "service", "policy", "certificate", "connections", "all"] {
        let words = ["ztunnel-config", kind, &tunnel, "-o", "json"];
        let said = run(rig, &words).unwrap_or_else(|said| panic!("{words:?}: {said}"));
        let read: Result<serde_json::Value, _> = serde_json::from_str(&said);
        assert!(read.is_ok_and(|read| read != serde_json::json!([])), "{words:?}: {said}");
    }
    // Levels are read, and set.
    for more in [&[][..], &["--level", "debug"], &["--level", "info"]] {
        let words = [&["ztunnel-config", "log", &tunnel][..], more].concat();
        let said = run(rig, &words).unwrap_or_else(|said| panic!("{words:?}: {said}"));
        let level = more.last().copied().unwrap_or("info");
        assert!(said.contains(level), "{words:?}: {said}");
    }
    // What the control plane knows of them.
    wait_line(rig, &["proxy-status"], &[&format!("{tunnel}.{}", rig.system)]);
}
