//! From Istio's own node agent to ours, and back: node by node, then the whole cluster. No pod is
//! restarted. Istio's own tunnel cannot be had from a registry of sources: below its agent runs ours,
//! by Istio's chart, with Istio's arguments.

use std::fs;

use serde_json::{Value, json};
use testbed::{
    capture::Capture,
    chart, image,
    real_cluster::{CNI, Pod},
    wait::{try_wait_slowly, wait_slowly},
};

use crate::{
    docs, istiod, policies,
    rig::{DEMO, ISTIO, LIMIT, Rig, SERVER, SYSTEM, image_folder},
    traffic,
};

/// The label by which a node has our agent, and what keeps Istio's pods off it: docs/install.md.
const LABEL: &str = "adit.dev/tunnel";

/// Istio's agent, and ours as its tunnel, on the nodes without the label.
fn install_agent(rig: &Rig) {
    let archive = image::istio_agent(&image_folder());
    for node in &rig.cluster.nodes {
        node.import(&archive);
    }
    let affinity = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
        "nodeSelectorTerms": [{"matchExpressions": [{"key": LABEL, "operator": "NotIn", "values": ["adit"]}]}]}}});
    let affinity = format!("--set-json=affinity={affinity}");
    let small = ["--set=resources.requests.cpu=10m", "--set=resources.requests.memory=32Mi"];
    let agent = [
        "--set=profile=ambient",
        &format!("--set=image={}", image::ISTIO_AGENT),
        "--set=pullPolicy=Never",
        &format!("--set=cniConfDir={CNI}/net.d"),
        &format!("--set=cniBinDir={CNI}/bin"),
        &affinity,
    ];
    istiod::helm(rig, "istio-cni", "istio-cni", &[&agent[..], &small].concat());
    let tunnel = [
        "--set=profile=ambient",
        &format!("--set=image={}", image::ADIT),
        "--set=imagePullPolicy=Never",
        &affinity,
    ];
    istiod::helm(rig, "ztunnel", "ztunnel", &[&tunnel[..], &small].concat());
    wait_istios(rig, 2);
}

/// Waits until Istio's agent and its tunnel are ready on so many nodes, and on no others.
fn wait_istios(rig: &Rig, nodes: usize) {
    for selector in ["k8s-app=istio-cni-node", "app=ztunnel"] {
        let is_ready = |pod: &Value| {
            let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
            conditions
                .into_iter()
                .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
        };
        let reached = try_wait_slowly(LIMIT, || {
            let pods = rig.cluster.pods(ISTIO, selector);
            pods.len() == nodes && pods.iter().all(is_ready)
        });
        let logs = ["-n", ISTIO, "logs", "-l", selector, "--tail=40"];
        assert!(
            reached.is_some(),
            "{selector} is not on {nodes} nodes\n{}\n{}",
            rig.cluster.kubectl_text(&logs),
            rig.system_story()
        );
    }
}

/// Whether Istio's agent has its rules in the netns of a pod.
fn has_istios_rules(rig: &Rig, pod: &Pod) -> bool {
    let rules = format!("nsenter -t {} -n iptables-nft-save 2>/dev/null", rig.process_of(pod));
    rig.node_of(pod).run(&rules).contains("ISTIO_OUTPUT")
}

fn wait_rules(rig: &Rig, pod: &Pod, has: bool) {
    wait_slowly(LIMIT, &format!("{} to have Istio's rules: {has}", pod.name), || {
        has_istios_rules(rig, pod) == has
    });
}

/// The client is answered under a policy about identities, and what crosses between the nodes is HBONE.
fn assert_meshed(rig: &Rig, client: &Pod, server: &Pod) {
    // Until the other side has taken over, connections fail.
    rig.wait_get(client, SERVER, true);
    let wire = Capture::start(&rig.cluster.netns);
    for url in [SERVER.to_owned(), format!("http://{}:8080/", server.ip)] {
        let body = rig.wait_get(client, &url, true);
        assert!(body.contains(&format!("hello from server, client {}", client.ip)), "{body}");
    }
    traffic::assert_only_hbone(&wire, client, server);
}

/// Installs ours for labelled nodes, in a namespace of its own.
fn install_for_labelled_nodes(rig: &Rig) {
    let values = rig.cluster.file("values.yaml");
    let image = image::ADIT;
    let text =
        format!("profile: istio\nimage: {image}\nimagePullPolicy: Never\nnodeSelector: {{{LABEL}: adit}}\n");
    fs::write(&values, text).expect("values");
    let folder = chart::folder();
    let (folder, values) = (folder.to_str().expect("UTF-8"), values.to_str().expect("UTF-8"));
    let words = ["install", "adit", folder, "--namespace", SYSTEM, "--create-namespace", "--values", values];
    rig.cluster.helm(&words).unwrap_or_else(|said| panic!("helm install: {said}"));
}

/// Waits until ours is ready on so many nodes.
fn wait_ours(rig: &Rig, nodes: usize) {
    let ready = [
        "-n",
        SYSTEM,
        "get",
        "daemonset",
        "ztunnel",
        "-o",
        "jsonpath={.status.desiredNumberScheduled} {.status.updatedNumberScheduled} {.status.numberReady} {.metadata.generation} {.status.observedGeneration}",
    ];
    let mut said = None;
    let reached = try_wait_slowly(LIMIT, || {
        said = rig.cluster.kubectl_line(&ready);
        let words: Vec<&str> = said.as_deref()?.split(' ').collect();
        let [desired, updated, ready, wanted, observed] = words[..] else { return None };
        let all = nodes.to_string();
        // Kubernetes leaves zero out.
        let updated = if nodes == 0 { desired == "0" } else { updated == all };
        (desired == all && updated && ready == all && wanted == observed).then_some(())
    });
    let logs = ["-n", SYSTEM, "logs", "-l", "app=ztunnel", "--all-containers", "--tail=40"];
    assert!(reached.is_some(), "{said:?}\n{}", rig.cluster.kubectl_text(&logs));
}

#[test]
#[ignore = "starts a cluster, needs root: make e2e"]
fn nodes_switch_from_istios_agent_and_back_and_no_pod_is_restarted() {
    let rig = Rig::start_with_istio();
    install_agent(&rig);
    rig.namespace(DEMO, &["client", "server"]);
    rig.label(DEMO, "ambient");
    let server = rig.server();
    let client = rig.serving("client", "client", "node1");
    rig.cluster.apply(policies::STRICT);
    rig.cluster.apply(policies::CLIENT_ONLY);
    for pod in [&client, &server] {
        rig.wait_enrolled(pod, true);
        assert!(has_istios_rules(&rig, pod), "{}", pod.name);
    }
    assert_meshed(&rig, &client, &server);

    // One node, then both, then the first one back.
    install_for_labelled_nodes(&rig);
    let set = format!("{LABEL}=adit");
    let unset = format!("{LABEL}-");
    rig.cluster.kubectl(&["label", "node", "node2", &set]);
    wait_istios(&rig, 1);
    wait_ours(&rig, 1);
    wait_rules(&rig, &server, false);
    assert!(has_istios_rules(&rig, &client));
    assert_meshed(&rig, &client, &server);
    assert_meshed_new_pods(&rig, "one");

    rig.cluster.kubectl(&["label", "node", "node1", &set]);
    wait_istios(&rig, 0);
    wait_ours(&rig, 2);
    wait_rules(&rig, &client, false);
    assert_meshed(&rig, &client, &server);

    let detach = [
        "upgrade",
        "adit",
        chart::folder().to_str().expect("UTF-8"),
        "--namespace",
        SYSTEM,
        "--reset-then-reuse-values",
        "--set",
        "watcher.detach=true",
    ]
    .map(str::to_owned);
    let detach: Vec<&str> = detach.iter().map(String::as_str).collect();
    rig.cluster.helm(&detach).unwrap_or_else(|said| panic!("helm upgrade: {said}"));
    wait_ours(&rig, 2);
    for (node, pod, istios) in [("node2", &server, 1), ("node1", &client, 2)] {
        rig.cluster.kubectl(&["label", "node", node, &unset]);
        wait_ours(&rig, 2 - istios);
        wait_istios(&rig, istios);
        wait_rules(&rig, pod, true);
        rig.wait_enrolled(pod, true);
        assert_meshed(&rig, &client, &server);
    }
    rig.cluster.wait_gone(SYSTEM, "app=ztunnel");
    assert_meshed_new_pods(&rig, "back");
    rig.cluster.helm(&["uninstall", "adit", "--namespace", SYSTEM]).expect("helm uninstall");

    // The whole cluster, as the page says it.
    docs::import(&rig);
    docs::follow(&rig, docs::INSTALL, "With Istio's control plane");
    for pod in [&client, &server] {
        wait_rules(&rig, pod, false);
        let now = rig.cluster.pod(DEMO, &pod.name).expect("the pod");
        assert_eq!(now.uid, pod.uid);
    }
    assert_meshed(&rig, &client, &server);
    for (node, direction) in [("node1", "outbound"), ("node2", "inbound")] {
        rig.wait_record(node, &[direction, "/ns/demo/sa/client", "/ns/demo/sa/server"]);
    }
    docs::follow(&rig, docs::INSTALL, "Uninstall");
    rig.cluster.wait_gone(ISTIO, "app.kubernetes.io/name=adit");
    rig.assert_nothing_left(&[&client, &server]);
}

/// New pods, on each node, are in the mesh from the start.
fn assert_meshed_new_pods(rig: &Rig, when: &str) {
    for node in ["node1", "node2"] {
        let pod = rig.serving(&format!("{when}-{node}"), "client", node);
        rig.wait_enrolled(&pod, true);
        assert!(rig.wait_get(&pod, SERVER, true).contains(&pod.ip));
    }
}
