//! The startup taint keeps pods off a node until its watcher is ready.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::json;
use testbed::{api_node::ApiNode, api_server::ApiServer, chart, wait::wait_for};

const KEY: &str = "adit.dev/not-ready";

/// Keys and effects of the node's taints.
fn taints(node: &ApiNode) -> Vec<(String, String)> {
    let nodes = Api::<Node>::all(node.api.client());
    let found = node.api.block_on(nodes.get(&node.host.name)).expect("the node");
    let taints = found.spec.and_then(|spec| spec.taints).unwrap_or_default();
    taints.into_iter().map(|taint| (taint.key, taint.effect)).collect()
}

#[test]
#[ignore = "needs root: make test"]
fn the_startup_taint_goes_when_the_watcher_is_ready() {
    let mut node = ApiNode::of(Arc::new(ApiServer::start()), &json!({"istio.io/dataplane-mode": "ambient"}));
    let nodes = Api::<Node>::all(node.api.client());
    let object = serde_json::from_value(json!({
        "metadata": {"name": node.host.name},
        "spec": {"taints": [
            {"key": KEY, "effect": "NoSchedule"},
            {"key": "others.dev/taint", "value": "v", "effect": "NoExecute"},
            {"key": KEY, "effect": "NoExecute"},
        ]},
    }))
    .expect("a node");
    node.api.block_on(nodes.create(&PostParams::default(), &object)).expect("created");
    node.pod("a", &json!({}));
    let with_key = |node: &ApiNode| taints(node).iter().filter(|(key, _)| key == KEY).count();

    // A watcher that does not know its pods yet is not ready.
    node.api.kill_server();
    node.host.start(&["--startup-taint", KEY]);
    node.wait_source_error(&["list pods"]);
    node.api.start_server();
    // Nor may it do so without the right.
    wait_for("a record of the missing right", || {
        let log = node.host.log();
        log.lines().any(|line| line.contains("cannot remove the startup taint") && line.contains("forbidden"))
    });
    node.wait_state("a", "closed", "no_tunnel");
    assert_eq!(with_key(&node), 2);
    let key = format!("watcher.startupTaint={KEY}");
    node.api.apply(&chart::template("watcher-startup-taint-rbac.yaml", &["--set", &key]));
    wait_for("the taint to go", || with_key(&node) == 0);
    let other = ("others.dev/taint".to_owned(), "NoExecute".to_owned());
    assert!(taints(&node).contains(&other), "the others stay: {:?}", taints(&node));

    // Once: whoever puts it back wants it there. The next watcher takes it off again.
    let tainted = json!({"spec": {"taints": [{"key": KEY, "effect": "NoSchedule"}]}});
    let patch = Patch::Merge(&tainted);
    node.api.block_on(nodes.patch(&node.host.name, &PatchParams::default(), &patch)).expect("patched");
    node.host.kill_watcher();
    node.host.start(&["--startup-taint", KEY]);
    wait_for("the taint to go", || with_key(&node) == 0);
    node.host.kill_watcher();
    node.api.block_on(nodes.delete(&node.host.name, &DeleteParams::default())).expect("deleted");
    assert!(node.host.refuses(&["--startup-taint", "a=b"]).contains("the key alone"));
}
