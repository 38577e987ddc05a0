//! What an operator sets wrong and what a node runs out of, under traffic: nothing that runs is harmed,
//! the cause is said, and it heals.

use serde_json::{Value, json};
use testbed::{
    real_cluster::Pod,
    wait::{try_wait_slowly, wait_slowly},
};

use crate::{
    rig::{DEMO, LIMIT, Rig, SYSTEM},
    traffic::Load,
};

/// Where tunnels keep what the control plane told last, as the chart has it.
const STATE: &str = "/var/lib/adit/ztunnel";

#[test]
#[ignore = "starts a cluster, needs root: make e2e"]
fn what_is_set_wrong_or_runs_out_harms_nothing_that_runs_and_is_said() {
    let rig = Rig::start();
    let first = &rig.cluster.nodes[0];
    // Small enough to be filled.
    first.run(&format!("mkdir -p {STATE} && mount -t tmpfs -o size=256k tmpfs {STATE}"));
    let limits = ["--set", "resources.limits.memory=512Mi,watcher.resources.limits.memory=300Mi"];
    rig.install_enrolled(&limits);
    let load = Load::start(&rig, 1);
    load.assert_whole(&rig, "before");

    set_audience(&rig, "somebody-else");
    wait_newest(&rig, "the reason in the log", |rig, pod| {
        let log = rig.cluster.kubectl_text(&["-n", SYSTEM, "logs", &pod.name, "-c", "ztunnel"]);
        log.contains("the API server did not check its audience") || log.contains("token audiences")
    });
    load.assert_whole(&rig, "while new tunnels have tokens for somebody else");
    set_expired_token(&rig);
    wait_newest(&rig, "the reason in the log", |rig, pod| {
        let log = rig.cluster.kubectl_text(&["-n", SYSTEM, "logs", &pod.name, "-c", "ztunnel"]);
        log.lines().any(|line| line.contains("service account token has expired"))
    });
    load.assert_whole(&rig, "while new tunnels have a token that has expired");
    set_audience(&rig, "istio-ca");
    rig.wait_rolled_out();
    load.assert_whole(&rig, "after the audience was mended");

    first.run(&format!("dd if=/dev/zero of={STATE}/filler bs=4k 2>/dev/null || true"));
    // More than the free rest of its last page takes.
    let service = |n: u8| {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("more-{n}"), "namespace": DEMO},
               "spec": {"selector": {"app": "server"}, "ports": [{"port": 80}]}})
    };
    let services: Vec<Value> = (0..40).map(service).collect();
    rig.cluster.apply(&json!({"apiVersion": "v1", "kind": "List", "items": services}).to_string());
    let agent = rig.agent("node1");
    let said = "cannot keep the last state of the control plane";
    wait_slowly(LIMIT, "the tunnel to say that the disk is full", || {
        rig.cluster.kubectl_text(&["-n", SYSTEM, "logs", &agent.name, "-c", "ztunnel"]).contains(said)
    });
    load.assert_whole(&rig, "with a full disk");
    rig.cluster.kubectl(&["-n", SYSTEM, "rollout", "restart", "daemonset/ztunnel"]);
    rig.wait_rolled_out();
    load.assert_whole(&rig, "after a rollout with a full disk");

    rig.fill_memory("node1", "watcher");
    wait_restart(&rig, "watcher");
    load.assert_whole(&rig, "after the watcher was killed for its memory");
    load.end(&rig);
    // Its connections end with it.
    rig.fill_memory("node1", "ztunnel");
    wait_restart(&rig, "ztunnel");
    let load = Load::start(&rig, 2);
    load.assert_whole(&rig, "after the tunnel was killed for its memory");
    load.end(&rig);
}

/// Waits until a container on `node1` was killed for its memory and started again, and is ready.
fn wait_restart(rig: &Rig, container: &str) {
    let path = format!("jsonpath={{.status.containerStatuses[?(@.name==\"{container}\")].lastState}}");
    let mut said = None;
    let done = try_wait_slowly(LIMIT, || {
        said = rig.cluster.kubectl_line(&["-n", SYSTEM, "get", "pod", &rig.agent("node1").name, "-o", &path]);
        rig.restarts("node1", container) > 0 && said.as_ref().is_some_and(|said| said.contains("OOMKilled"))
    });
    assert!(done.is_some(), "{container}: {said:?}\n{}", rig.system_story());
}

/// Waits until `is_so` holds of a pod of the newest revision of the DaemonSet.
fn wait_newest(rig: &Rig, what: &str, is_so: impl Fn(&Rig, &Pod) -> bool) {
    let found = try_wait_slowly(LIMIT, || {
        let pods = rig.cluster.pods(SYSTEM, "app=ztunnel");
        let newest = pods.iter().max_by_key(|pod| pod["metadata"]["creationTimestamp"].to_string())?;
        let pod = rig.cluster.pod(SYSTEM, newest["metadata"]["name"].as_str()?)?;
        is_so(rig, &pod).then_some(())
    });
    assert!(found.is_some(), "waited in vain for {what}\n{}", rig.system_story());
}

/// For whom the tunnels' token is.
fn set_audience(rig: &Rig, audience: &str) {
    set_token(
        rig,
        &json!({"serviceAccountToken": {"audience": audience, "path": "istio-token", "expirationSeconds": 43200}}),
    );
}

/// The tunnels have a token as the API server signed it two hours ago, for an hour. It signs none for
/// less than ten minutes.
fn set_expired_token(rig: &Rig) {
    const HOUR: i64 = 3600;
    let agent = rig.agent("node1");
    let fresh = rig.cluster.kubectl(&[
        "-n",
        SYSTEM,
        "create",
        "token",
        "ztunnel",
        "--audience=istio-ca",
        "--bound-object-kind=Pod",
        &format!("--bound-object-name={}", agent.name),
    ]);
    let expired = rig.cluster.api.forge(fresh.trim(), |claims| {
        let issued = claims["iat"].as_i64().expect("a time");
        let times = [("iat", issued - 2 * HOUR), ("nbf", issued - 2 * HOUR), ("exp", issued - HOUR)];
        times.into_iter().for_each(|(claim, time)| claims[claim] = time.into());
    });
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "expired", "namespace": SYSTEM},
        "stringData": {"istio-token": expired}});
    rig.cluster.apply(&secret.to_string());
    set_token(rig, &json!({"secret": {"name": "expired"}}));
}

/// Where the tunnels' token comes from.
fn set_token(rig: &Rig, source: &Value) {
    let volume = json!({"name": "istio-token", "projected": {"defaultMode": 256, "sources": [source]}});
    let patch = json!({"spec": {"template": {"spec": {"volumes": [volume]}}}}).to_string();
    rig.cluster.kubectl(&["-n", SYSTEM, "patch", "daemonset", "ztunnel", "--patch", &patch]);
}
