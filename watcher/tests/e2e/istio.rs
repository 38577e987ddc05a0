//! In a cluster with Istio's real control plane.

use testbed::capture::Capture;

use crate::{
    policies,
    rig::{DEMO, PodSpec, Rig, SERVER},
    traffic,
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
    rig.cluster.apply(policies::CLIENT_ONLY);
    rig.wait_get(&other, &by_address, false);
    rig.wait_get(&client, SERVER, true);

    rig.uninstall();
    assert!(rig.wait_get(&stranger, &by_address, true).contains(&stranger.ip));
    rig.assert_nothing_left(&[&server, &client, &other]);
}
