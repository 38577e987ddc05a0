//! One story on each network of pods, some of which Istio's agent had prepared: enrolled, between the
//! nodes and on one, probed under strict policy, and out again.

use testbed::{
    capture::Capture,
    istio_rules::{self, Kind},
    real_cluster::{Network, Pod},
};

use crate::{
    policies, probes,
    rig::{DEMO, Rig, SERVER},
    traffic,
};

/// Whether pods are joined to their node as `network` says.
fn assert_joined(rig: &Rig, pod: &Pod, network: Network) {
    let route = rig.node_of(pod).run(&format!("ip route get {}", pod.ip));
    let has_bridge = route.contains("dev cni0");
    assert_eq!(has_bridge, network != Network::Routed, "{route}");
    assert_eq!(pod.ips.len(), if network == Network::DualStack { 2 } else { 1 }, "{:?}", pod.ips);
}

fn by_address(ip: &str) -> String {
    if ip.contains(':') { format!("http://[{ip}]:8080/") } else { format!("http://{ip}:8080/") }
}

fn story(network: Network) {
    let rig = Rig::start_with(network);
    rig.namespace(DEMO, &["client", "server"]);
    rig.install(&[]);
    let server = rig.server();
    let far = rig.serving("far", "client", "node1");
    let near = rig.serving("near", "client", "node2");
    assert_joined(&rig, &server, network);
    let (name, role, handler) = probes::handlers().remove(0);
    rig.cluster.apply(&probes::probed(name, role, &handler).to_string());
    let probed = rig.cluster.ready_pod(DEMO, name);

    // As in a cluster that switches from Istio, with its agent gone.
    for pod in [&server, &far] {
        let script = istio_rules::script(Kind::IptablesNft);
        rig.node_of(pod)
            .run(&format!("nsenter -t {} -n sh -e <<'SCRIPT'\n{script}\nSCRIPT", rig.process_of(pod)));
        assert!(rig.get(&far, SERVER).is_err(), "{} without the agent's tunnel", pod.name);
    }

    rig.cluster.apply(policies::STRICT);
    rig.label(DEMO, "ambient");
    for pod in [&server, &far, &near, &probed] {
        rig.wait_enrolled(pod, true);
    }
    let wire = Capture::start(&rig.cluster.netns);
    for client in [&far, &near] {
        assert!(rig.wait_get(client, SERVER, true).contains("hello from server"));
        for (to, from) in server.ips.iter().zip(&client.ips) {
            let body = rig.wait_get(client, &by_address(to), true);
            assert!(body.contains(&format!("hello from server, client {from}")), "{to}: {body}");
        }
    }
    traffic::assert_only_hbone(&wire, &far, &server);
    for ip in &far.ips {
        rig.wait_record("node2", &["inbound", "/ns/demo/sa/client", "/ns/demo/sa/server", ip]);
    }
    for (node, ip) in rig.cluster.nodes.iter().flat_map(|node| probed.ips.iter().map(move |ip| (node, ip))) {
        let dial = format!("nsenter -t 1 -n busybox wget -q -O - -T 3 {} || echo refused", by_address(ip));
        assert_eq!(node.run(&dial).trim(), "refused", "{} to {ip}", node.name);
    }
    probes::assert_probes_pass(&rig, 10, "under strict policy");

    rig.label(DEMO, "none");
    for pod in [&server, &far, &near, &probed] {
        rig.wait_enrolled(pod, false);
    }
    for client in [&far, &near] {
        let body = rig.wait_get(client, SERVER, true);
        assert!(client.ips.iter().any(|ip| body.contains(ip)), "{body}");
    }
}

#[test]
#[ignore = "starts a cluster, needs root: make e2e"]
fn pods_behind_a_bridge_are_enrolled_probed_and_released() {
    story(Network::Bridge);
}

#[test]
#[ignore = "starts a cluster, needs root: make e2e"]
fn pods_that_their_node_routes_to_are_enrolled_probed_and_released() {
    story(Network::Routed);
}

#[test]
#[ignore = "starts a cluster, needs root: make e2e"]
fn pods_of_both_families_are_enrolled_probed_and_released() {
    story(Network::DualStack);
}
