//! How long a new pod waits for the answer to its first connection.

use std::time::Duration;

use serde_json::{Value, json};
use testbed::wait::try_wait_slowly;

use crate::rig::{LIMIT, Rig, container};

/// The times of ten new pods of `namespace`, the shortest first, of which so many start at a time.
pub fn times(rig: &Rig, namespace: &str, url: &str, at_a_time: u8) -> Vec<Duration> {
    let name = format!("first-{at_a_time}");
    let job = json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "namespace": namespace},
        "spec": {"completions": 10, "parallelism": at_a_time, "backoffLimit": 0,
            "template": {"spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 0,
                "nodeSelector": {"kubernetes.io/hostname": "node1"},
                "containers": [container("main", &["first", url])]}}}});
    rig.cluster.apply(&job.to_string());
    let logs = || {
        let selector = format!("job-name={name}");
        rig.cluster.kubectl_text(&["-n", namespace, "logs", "-l", &selector, "--tail=5"])
    };
    let ended = try_wait_slowly(LIMIT, || {
        let status = ["-n", namespace, "get", "job", &name, "-o", "jsonpath={.status}"];
        let status: Value = serde_json::from_str(&rig.cluster.kubectl_line(&status)?).ok()?;
        assert!(status["failed"].is_null(), "{}\n{}", logs(), rig.system_story());
        (status["succeeded"] == 10).then_some(())
    });
    assert!(ended.is_some(), "{}\n{}", logs(), rig.system_story());
    let micros = |line: &str| line.strip_prefix("answered after ")?.split(' ').next()?.parse().ok();
    // A kubelet may not find the log of a container that has just ended.
    let all = try_wait_slowly(LIMIT, || {
        let times: Vec<Duration> = logs().lines().filter_map(micros).map(Duration::from_micros).collect();
        (times.len() == 10).then_some(times)
    });
    let mut times = all.unwrap_or_else(|| panic!("not ten: {}", logs()));
    times.sort_unstable();
    times
}
