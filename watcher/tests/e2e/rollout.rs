//! What is done to Adit and to the nodes under traffic: rollouts, crashes, restarts.

use testbed::wait::wait_slowly;

use crate::{
    rig::{DEMO, LIMIT, Rig, SERVER, SYSTEM},
    traffic::{Load, Storm},
};

#[test]
#[ignore = "starts a cluster, needs root: make e2e"]
fn a_rollout_fails_no_request_and_cuts_no_connection_and_crashes_heal() {
    let mut rig = Rig::start();
    rig.install_enrolled(&[]);
    let load = Load::start(&rig, 1);
    load.assert_whole(&rig, "before");

    let client = rig.serving("client", "client", "node1");
    rig.wait_enrolled(&client, true);
    let address = ["-n", DEMO, "get", "service", "server", "-o", "jsonpath={.spec.clusterIP}"];
    let storm = Storm::start(&rig, &client, &format!("http://{}/", rig.cluster.kubectl(&address)));
    load.assert_whole(&rig, "before a rollout, under more load");
    rig.cluster.kubectl(&["-n", SYSTEM, "rollout", "restart", "daemonset/ztunnel"]);
    rig.wait_rolled_out();
    load.assert_whole(&rig, "after a rollout");
    let rate = storm.end();
    // A thousand is asked for; a busy machine of two cores makes fewer.
    assert!(rate > 100.0, "{rate} requests a second");

    for service in ["kubelet", "containerd"] {
        for node in &mut rig.cluster.nodes {
            node.kill_service(service);
            if service == "kubelet" { node.start_kubelet() } else { node.start_containerd() }
        }
        for node in ["node1", "node2"] {
            let healthz = format!("/api/v1/nodes/{node}/proxy/healthz");
            wait_slowly(LIMIT, "the kubelet", || {
                rig.cluster.kubectl_line(&["get", "--raw", &healthz]).is_some()
            });
        }
        rig.wait_rolled_out();
        load.assert_whole(&rig, &format!("after {service} was killed and started again"));
    }

    for node in ["node1", "node2"] {
        rig.kill(node, "watcher");
    }
    load.assert_whole(&rig, "while watchers start again");
    rig.wait_rolled_out();
    load.assert_whole(&rig, "after the watchers were killed");
    load.end(&rig);

    // Its connections end with it. The next ones come through as soon as it is back.
    let before = rig.restarts("node1", "ztunnel");
    rig.kill("node1", "ztunnel");
    wait_slowly(LIMIT, "the tunnel to start again", || rig.restarts("node1", "ztunnel") > before);
    let load = Load::start(&rig, 2);
    load.assert_whole(&rig, "after the tunnel was killed");
    load.end(&rig);

    // The namespace is still labelled.
    let server = rig.cluster.pod(DEMO, "server").expect("the server");
    rig.uninstall();
    let body = rig.wait_get(&client, SERVER, true);
    assert!(body.contains(&client.ip), "{body}");
    rig.assert_nothing_left(&[&server, &client]);
}
