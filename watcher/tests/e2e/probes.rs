//! Probes of enrolled pods (F10): they pass under strict policy, also while the tunnel is away, by
//! whom they come from and not by an address.

use serde_json::{Value, json};
use testbed::{
    real_cluster::Pod,
    wait::{try_wait_slowly, wait_slowly},
};

use crate::{
    policies,
    rig::{DEMO, LIMIT, PodSpec, Rig, SYSTEM, container},
};

/// Each kind of handler, for each kind of probe where it may stand: the name of the pod, the role
/// of its container, and its handler.
pub fn handlers() -> Vec<(&'static str, &'static [&'static str], Value)> {
    let serve: &[&str] = &["serve", "8080"];
    vec![
        ("http", serve, json!({"httpGet": {"path": "/", "port": 8080}})),
        ("tcp", serve, json!({"tcpSocket": {"port": 8080}})),
        ("grpc", &["serve-grpc", "8080"], json!({"grpc": {"port": 8080}})),
        (
            "exec",
            serve,
            json!({"exec": {"command": ["/usr/local/bin/pod", "get", "http://127.0.0.1:8080/"]}}),
        ),
    ]
}

/// A pod that is started anew, or is not ready, as soon as a single probe fails.
pub fn probed(name: &str, role: &[&str], handler: &Value) -> Value {
    let mut main = container("main", role);
    for kind in ["startupProbe", "livenessProbe", "readinessProbe"] {
        let mut probe = handler.clone();
        probe["periodSeconds"] = json!(1);
        probe["timeoutSeconds"] = json!(5);
        // A server needs a moment to begin.
        probe["failureThreshold"] = json!(if kind == "startupProbe" { 30 } else { 1 });
        main[kind] = probe;
    }
    // A handler of the same kind that runs when the container has started.
    if name == "http" {
        main["lifecycle"] = json!({"preStop": handler});
    }
    let spec = PodSpec { namespace: DEMO, name, account: "default", node: "node1", role };
    let mut pod = spec.manifest();
    pod["spec"]["containers"] = json!([main]);
    pod["spec"]["terminationGracePeriodSeconds"] = json!(5);
    pod
}

/// The events that tell of failed probes and hooks, except before the first success.
fn failures(rig: &Rig) -> Vec<String> {
    let events = rig.cluster.kubectl(&["-n", DEMO, "get", "events", "-o", "json"]);
    let events: Value = serde_json::from_str(&events).expect("JSON");
    let failed = |event: &&Value| {
        let message = event["message"].as_str().unwrap_or_default();
        ["Unhealthy", "Killing", "BackOff", "FailedPreStopHook"]
            .iter()
            .any(|reason| event["reason"] == *reason)
            && !message.starts_with("Startup probe failed")
    };
    let text = |event: &Value| format!("{} {}", event["involvedObject"]["name"], event["message"]);
    events["items"].as_array().expect("events").iter().filter(failed).map(text).collect()
}

/// How often the kubelet of node1 has probed, whatever came of it, as it counts it itself.
fn probes(rig: &Rig) -> u64 {
    let path = "/api/v1/nodes/node1/proxy/metrics/probes";
    let metrics = rig.cluster.kubectl(&["get", "--raw", path]);
    let counts =
        metrics.lines().filter(|line| line.starts_with("prober_probe_total{") && line.contains(DEMO));
    counts.filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok()).sum()
}

/// Waits until `count` more probes were made, and checks that none failed.
pub fn assert_probes_pass(rig: &Rig, count: u64, when: &str) {
    let wanted = probes(rig) + count;
    let done = try_wait_slowly(LIMIT, || probes(rig) >= wanted || !failures(rig).is_empty());
    assert!(done.is_some(), "{when}: too few probes");
    assert_eq!(failures(rig), Vec::<String>::new(), "{when}\n{}", rig.watcher("node1", &["status"]));
}

#[test]
#[ignore = "starts a cluster, needs root: make e2e"]
fn probes_pass_under_strict_policy_and_while_the_tunnel_is_away_and_nobody_elses_connections() {
    let mut rig = Rig::start();
    rig.namespace(DEMO, &[]);
    rig.install(&[]);
    rig.cluster.apply(policies::STRICT);
    rig.cluster.apply(policies::NOBODY);
    rig.label(DEMO, "ambient");
    for (name, role, handler) in handlers() {
        rig.cluster.apply(&probed(name, role, &handler).to_string());
    }
    let pods: Vec<Pod> = handlers().iter().map(|(name, ..)| rig.cluster.ready_pod(DEMO, name)).collect();
    for pod in &pods {
        rig.wait_enrolled(pod, true);
    }
    assert_probes_pass(&rig, 40, "with the tunnel");
    let own =
        format!("nsenter -t 1 -n busybox wget -q -O - -T 3 http://{}:8080/ || echo refused", pods[0].ip);
    assert_eq!(rig.cluster.nodes[0].run(&own).trim(), "refused", "another process of the node");

    // As systemd does it: the cgroup is another one afterwards.
    rig.cluster.nodes[0].kill_service("kubelet");
    rig.cluster.nodes[0].start_kubelet();
    wait_slowly(LIMIT, "the kubelet to answer", || {
        rig.cluster.kubectl_line(&["get", "--raw", "/api/v1/nodes/node1/proxy/healthz"]).is_some()
    });
    assert_probes_pass(&rig, 40, "after the kubelet was started again");

    // No tunnel and no watcher is left, and pods are closed.
    rig.cluster.kubectl(&["-n", SYSTEM, "delete", "daemonset/ztunnel"]);
    rig.cluster.wait_gone(SYSTEM, "app=ztunnel");
    let wanted = probes(&rig) + 40;
    wait_slowly(LIMIT, "probes without a tunnel", || probes(&rig) >= wanted);
    assert_eq!(failures(&rig), Vec::<String>::new(), "without a tunnel");
    assert_eq!(rig.cluster.nodes[0].run(&own).trim(), "refused", "another process of the node");
}
