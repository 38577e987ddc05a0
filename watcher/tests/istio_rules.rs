//! Pods that Istio's node agent had prepared, after it has gone: its rules are still in their netns.

use std::process::Command;

use testbed::{
    cluster::{Cluster, ClusterPod, Enrol},
    command::{run, text},
    istio_rules::{Kind, script},
    program::binary,
    wait::{LIMIT, try_wait, wait_for},
};

fn prepare(pod: &ClusterPod, kind: Kind) {
    let output = pod.exec(&["sh", "-ec", &script(kind)]);
    assert!(output.status.success(), "{kind:?}: {}", text(&output));
}

fn pods(cluster: &Cluster, node: usize) -> Vec<serde_json::Value> {
    let status: serde_json::Value = serde_json::from_str(&cluster.nodes[node].status()).unwrap_or_default();
    status["pods"].as_array().cloned().unwrap_or_default()
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn pods_that_istios_agent_had_prepared_are_served_without_a_restart() {
    for kind in [Kind::IptablesNft, Kind::Nftables] {
        let mut cluster = Cluster::new();
        let client = cluster.pod("client", 0, Enrol::Mesh);
        let plain = cluster.pod("plain", 0, Enrol::Plain);
        let server = cluster.pod("server", 1, Enrol::Mesh);
        cluster.serve_web(&server, "hello");
        for pod in [&client, &server] {
            prepare(pod, kind);
        }
        cluster.start();
        let both = |pod: &ClusterPod| {
            for (host, source) in [(server.v4.clone(), &pod.v4), (format!("[{}]", server.v6), &pod.v6)] {
                let answer = pod.curl(&format!("http://{host}:8080/"));
                assert_eq!(answer, Ok(format!("hello, client {source}\n")), "{kind:?} {}", pod.name);
            }
        };
        both(&client);
        both(&plain);
        wait_for("the record of a connection with identities", || {
            cluster.nodes[1].access_log().iter().any(|line| {
                ["inbound", "/ns/demo/sa/client", "/ns/demo/sa/server"].iter().all(|part| line.contains(part))
            })
        });
        let said = "took out the rules that Istio's node agent had left";
        assert!(cluster.nodes[0].story().contains(said), "{}", cluster.nodes[0].story());
        // They leave as pods that Istio never knew.
        cluster.label(&["client", "server"], Enrol::Plain);
        both(&client);
    }
}

/// Of this kind the kernel takes only whole tables.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_with_istios_rules_of_the_legacy_kind_is_refused_by_name() {
    let mut cluster = Cluster::new();
    let legacy = cluster.pod("legacy", 0, Enrol::Plain);
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let server = cluster.pod("server", 1, Enrol::Mesh);
    cluster.serve_web(&server, "hello");
    prepare(&legacy, Kind::IptablesLegacy);
    cluster.start();
    cluster.pods.iter_mut().filter(|pod| pod.name == "legacy").for_each(|pod| pod.enrol = Enrol::Mesh);
    cluster.publish_pods(0);
    let mut last = None;
    let reached = try_wait(LIMIT, || {
        last = pods(&cluster, 0).into_iter().find(|pod| pod["name"] == "legacy");
        let pod = last.as_ref()?;
        (pod["state"] == "closed" && pod["reason"]["code"] == "istio_rules").then_some(())
    });
    assert!(reached.is_some(), "{last:?}\n{}", cluster.nodes[0].story());
    let checks = text(&Command::new(binary("watcher")).arg("preflight").output().expect("watcher"));
    let said = checks.lines().find(|line| line.starts_with("warn istio rules: in "));
    assert!(said.is_some_and(|said| said.contains("legacy iptables")), "{checks}");
    let said = last.expect("the pod")["reason"]["text"].to_string();
    assert!(said.contains("restart the pod"), "{said}");
    assert_eq!(
        client.curl(&format!("http://{}:8080/", server.v4)),
        Ok(format!("hello, client {}\n", client.v4))
    );

    // What somebody takes out by hand is found at the next attempt.
    run(&format!(
        "nsenter --net={} sh -c 'for t in nat mangle raw; do iptables-legacy -t $t -F; iptables-legacy -t $t -X; done; ip rule del fwmark 0x111/0xfff'",
        legacy.netns.path().display()
    ));
    wait_for("the pod to be served", || legacy.curl(&format!("http://{}:8080/", server.v4)).is_ok());
}
