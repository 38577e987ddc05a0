//! The API server goes away, hangs, forgets and comes back: the last known state holds, and no
//! change is missed.

use std::sync::Arc;

use nix::sys::signal::Signal;
use serde_json::json;
use testbed::{api_node::ApiNode, api_server::ApiServer, wait::wait_for};

#[test]
#[ignore = "needs root: make test"]
fn while_the_api_server_is_away_nothing_changes_and_then_nothing_was_missed() {
    let ambient = json!({"istio.io/dataplane-mode": "ambient"});
    let mut node = ApiNode::of(Arc::new(ApiServer::start()), &ambient);
    let (running, _) = node.pod("running", &json!({}));
    node.host.start(&[]);
    let tunnel = node.tunnel().take_all();
    node.wait_state("running", "open", "");
    node.wait_annotation("running", Some("enabled"));

    node.api.kill_server();
    node.wait_source_error(&["watch pods", "watch namespaces"]);
    assert_eq!(node.find("running").expect("the pod")["state"], "open");
    let said = node.host.command(&["status"]).1;
    assert!(said.contains("keeping the last known pods: watch pods"), "{said}");

    // A watcher that starts meanwhile leaves everything as it was, for as long as it takes, and is
    // not ready.
    node.host.watcher.as_ref().expect("watcher").signal(Signal::SIGKILL);
    node.host.kill_watcher();
    tunnel.join().expect("the tunnel");
    node.host.start(&[]);
    node.wait_source_error(&["list pods"]);
    let status = node.host.status();
    assert_eq!((&status["ready"], &status["source"]["synced"]), (&json!(false), &json!(false)));
    assert!(node.host.pods[running].is_prepared(), "it was taken for gone");
    let steered =
        node.host.pins().iter().filter(|pin| pin.to_string_lossy().contains("links/netns-")).count();
    assert_eq!(steered, 1, "{:?}", node.host.pins());

    node.api.start_server();
    let _told = node.tunnel().take_all();
    node.wait_state("running", "open", "");
    wait_for("the source to be in order", || node.source_error().is_none().then_some(()));

    // Once more with a resumed watch: the changes in between arrive.
    node.api.kill_server();
    node.wait_source_error(&["watch pods", "watch namespaces"]);
    node.api.start_server();
    node.api.label_namespace(&node.namespace, &json!({"istio.io/dataplane-mode": null}));
    node.wait_state("running", "plain", "");
    node.wait_annotation("running", None);
    wait_for("the source to be in order", || node.source_error().is_none().then_some(()));
}

#[test]
#[ignore = "needs root: make test"]
fn a_resumed_watch_that_has_nothing_to_say_is_in_order() {
    let mut node = ApiNode::of(Arc::new(ApiServer::start()), &json!({}));
    node.host.start(&[]);
    node.wait_ready();
    node.api.kill_server();
    node.wait_source_error(&["watch pods", "watch namespaces"]);
    node.api.start_server();
    wait_for("the source to be in order", || node.source_error().is_none().then_some(()));
}

#[test]
#[ignore = "needs root: make test"]
fn a_server_that_hangs_holds_up_nobody_and_goes_on() {
    let mut node = ApiNode::of(Arc::new(ApiServer::start()), &json!({}));
    node.pod("running", &json!({}));
    node.host.start(&[]);
    let _told = node.tunnel().take_all();
    node.wait_state("running", "plain", "");
    node.api.signal_server(Signal::SIGSTOP);
    assert_eq!(node.find("running").expect("the pod")["state"], "plain");
    node.api.signal_server(Signal::SIGCONT);
    node.api.label_namespace(&node.namespace, &json!({"istio.io/dataplane-mode": "ambient"}));
    node.wait_state("running", "open", "");
}

/// What a watcher missed while it was stopped and the server forgot is found by a new list.
#[test]
#[ignore = "needs root: make test"]
fn a_version_that_is_too_old_leads_to_a_new_list() {
    let mut node = ApiNode::of(Arc::new(ApiServer::start()), &json!({}));
    let ambient = json!({"metadata": {"labels": {"istio.io/dataplane-mode": "ambient"}}});
    node.pod("stays", &ambient);
    let (goes, _) = node.pod("goes", &ambient);
    node.host.start(&[]);
    let _told = node.tunnel().take_all();
    node.wait_state("stays", "open", "");
    node.wait_state("goes", "open", "");

    let watcher = node.host.watcher.as_ref().expect("watcher");
    watcher.signal(Signal::SIGSTOP);
    node.api.kill_server();
    node.api.start_server();
    node.host.pods[goes].end();
    node.api.delete_pod(&node.namespace, "goes");
    let more = json!({"metadata": {"labels": {"istio.io/dataplane-mode": "none"}}});
    node.api.patch_pod(&node.namespace, "stays", &more);
    node.api.label_namespace(&node.namespace, &json!({"istio.io/dataplane-mode": "ambient"}));
    node.api.pod(&node.namespace, "comes", &node.host.name, &json!({}));
    node.api.compact();
    // Its memory of what happened goes with it.
    node.api.kill_server();
    node.api.start_server();
    watcher.signal(Signal::SIGCONT);

    node.wait_state("stays", "plain", "");
    node.wait_state("comes", "closed", "no_cgroup");
    assert!(node.find("goes").is_none(), "it was deleted");
    wait_for("the source to be in order", || node.source_error().is_none().then_some(()));
}
