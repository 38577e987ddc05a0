//! Install, enrol, leave, uninstall: with pods that ran before, and run on.

use testbed::capture::Capture;

use crate::{
    docs, policies,
    rig::{DEMO, Rig, SERVER, SYSTEM},
    traffic,
};

#[test]
#[ignore = "starts a cluster, needs root: make e2e"]
fn an_operator_installs_enrols_and_uninstalls_while_pods_run() {
    let rig = Rig::start();
    let [server, client, other, stranger] = rig.demo_and_a_stranger();
    let (by_address, by_name) = (format!("http://{}:8080/", server.ip), SERVER);
    for url in [by_address.as_str(), by_name] {
        let body = rig.wait_get(&client, url, true);
        assert!(body.contains(&format!("hello from server, client {}", client.ip)), "{body}");
    }

    docs::import(&rig);
    docs::follow(&rig, docs::INSTALL, "Without Istio");
    for pod in [&server, &client, &other] {
        rig.wait_enrolled(pod, true);
    }
    rig.wait_enrolled(&stranger, false);

    let wire = Capture::start(&rig.cluster.netns);
    for url in [by_address.as_str(), by_name] {
        let body = rig.wait_get(&client, url, true);
        assert!(body.contains(&format!("hello from server, client {}", client.ip)), "{body}");
    }
    traffic::assert_only_hbone(&wire, &client, &server);
    for (node, direction) in [("node1", "outbound"), ("node2", "inbound")] {
        rig.wait_record(node, &[direction, "/ns/demo/sa/client", "/ns/demo/sa/server"]);
    }

    // Plaintext passes until a policy says otherwise.
    assert!(rig.wait_get(&stranger, &by_address, true).contains(&stranger.ip));
    rig.cluster.apply(policies::STRICT);
    rig.wait_get(&stranger, &by_address, false);
    rig.wait_get(&client, &by_address, true);
    rig.wait_get(&other, &by_address, true);
    rig.cluster.apply(policies::CLIENT_ONLY);
    rig.wait_get(&other, &by_address, false);
    rig.wait_get(&client, by_name, true);

    for section in
        ["", "Check", "A pod is not in the mesh", "One connection fails", "The tunnel is not ready"]
    {
        docs::follow(&rig, docs::OPERATIONS, section);
    }
    docs::follow(&rig, docs::CONTROL_PLANE, "Revocation");
    rig.wait_get(&client, by_name, true);

    rig.label(DEMO, "none");
    for pod in [&server, &client, &other] {
        rig.wait_enrolled(pod, false);
    }
    assert!(rig.wait_get(&stranger, &by_address, true).contains(&stranger.ip));
    rig.wait_get(&other, by_name, true);

    docs::follow(&rig, docs::INSTALL, "Uninstall");
    rig.cluster.wait_gone(SYSTEM, "app.kubernetes.io/name=adit");
    assert!(rig.wait_get(&stranger, &by_address, true).contains(&stranger.ip));
    rig.assert_nothing_left(&[&server, &client, &other]);
}
