//! In a cluster with Istio's real control plane.

use testbed::capture::Capture;

use crate::{
    first, policies,
    rig::{DEMO, ISTIO, PodSpec, Rig, SERVER},
    traffic::{self, Load},
};

#[test]
#[ignore = "starts a cluster, needs root: make e2e"]
fn istios_control_plane_feeds_the_mesh() {
    let rig = Rig::start_with_istio();
    rig.namespace(DEMO, &["client", "server", "other"]);
    rig.namespace("outside", &[]);
    let server = rig.server();
    let client = rig.serving("client", "client", "node1");
    let other = rig.serving("other", "other", "node2");
    let stranger = rig.pod(PodSpec {
        namespace: "outside",
        name: "stranger",
        account: "default",
        node: "node1",
        role: &["serve", "8080"],
    });
    rig.install(&["--set", "profile=istio"]);
    rig.label(DEMO, "ambient");
    for pod in [&server, &client, &other] {
        rig.wait_enrolled(pod, true);
    }
    let by_address = format!("http://{}:8080/", server.ip);
    let wire = Capture::start(&rig.cluster.netns);
    for url in [by_address.as_str(), SERVER] {
        let body = rig.wait_get(&client, url, true);
        assert!(body.contains(&format!("hello from server, client {}", client.ip)), "{body}");
    }
    traffic::assert_only_hbone(&wire, &client, &server);
    for (node, direction) in [("node1", "outbound"), ("node2", "inbound")] {
        rig.wait_record(node, &[direction, "/ns/demo/sa/client", "/ns/demo/sa/server"]);
    }

    assert!(rig.wait_get(&stranger, &by_address, true).contains(&stranger.ip));
    rig.cluster.apply(policies::STRICT);
    rig.wait_get(&stranger, &by_address, false);
    rig.wait_get(&client, &by_address, true);
    rig.wait_get(&other, &by_address, true);

    new_pods_are_answered_at_once(&rig);

    rig.cluster.apply(policies::CLIENT_ONLY);
    rig.wait_get(&other, &by_address, false);
    rig.wait_get(&client, SERVER, true);

    istiod_is_away(&rig);

    rig.uninstall();
    assert!(rig.wait_get(&stranger, &by_address, true).contains(&stranger.ip));
    rig.assert_nothing_left(&[&server, &client, &other]);
}

/// Beside pods without a mesh, as the machine may be slow.
fn new_pods_are_answered_at_once(rig: &Rig) {
    rig.namespace("plain", &[]);
    rig.pod(PodSpec {
        namespace: "plain",
        name: "server",
        account: "default",
        node: "node2",
        role: &["serve", "8080"],
    });
    rig.cluster.kubectl(&["-n", "plain", "expose", "pod", "server", "--port=80", "--target-port=8080"]);
    for at_a_time in [1, 10] {
        let [plain, mesh] = ["plain", DEMO].map(|namespace| {
            let address = ["-n", namespace, "get", "service", "server", "-o", "jsonpath={.spec.clusterIP}"];
            let url = format!("http://{}/", rig.cluster.kubectl(&address));
            first::times(rig, namespace, &url, at_a_time)
        });
        println!(
            "first connections, {at_a_time} pods at a time: p50 {:?}, max {:?}; without a mesh p50 {:?}, max {:?}",
            mesh[5], mesh[9], plain[5], plain[9]
        );
    }
}

/// Nothing that runs needs it; what it would have told is told when it is back.
fn istiod_is_away(rig: &Rig) {
    let load = Load::start(rig, 1);
    load.assert_whole(rig, "with istiod");
    let scale = |replicas: &str| {
        let replicas = format!("--replicas={replicas}");
        rig.cluster.kubectl(&["-n", ISTIO, "scale", "deployment/istiod", &replicas]);
    };
    scale("0");
    rig.cluster.wait_gone(ISTIO, "app=istiod");
    load.assert_whole(rig, "without istiod");
    scale("1");
    rig.wait_rolled_out();
    load.assert_whole(rig, "with istiod again");
    load.end(rig);
}
