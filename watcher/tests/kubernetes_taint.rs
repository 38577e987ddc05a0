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
    // As the kubelet mounts it: bound to a pod, whose node it names.
    let account = json!({"spec": {"serviceAccountName": "adit-watcher"}});
    let uid = node.api.pod("adit-system", "watcher", &node.host.name, &account);
    let kubeconfig = node.api.kubeconfig_of_pod("adit-system", "adit-watcher", Some(("watcher", &uid)));
    node.host.kubeconfig = Some(kubeconfig.clone());
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
    let rights = chart::template("redirect-only", "watcher-startup-taint-rbac.yaml", &["--set", &key]);
    node.api.apply(&rights);
    wait_for("the taint to go", || with_key(&node) == 0);
    let other = ("others.dev/taint".to_owned(), "NoExecute".to_owned());
    assert!(taints(&node).contains(&other), "the others stay: {:?}", taints(&node));

    // With the same rights nothing else can be done to it, or to another node.
    let as_watcher = Api::<Node>::all(node.api.client_by(&kubeconfig));
    let another = serde_json::from_value(json!({"metadata": {"name": "another"}})).expect("a node");
    node.api.block_on(nodes.create(&PostParams::default(), &another)).expect("created");
    let refusal = |name: &str, patch: serde_json::Value| {
        let patched =
            node.api.block_on(as_watcher.patch(name, &PatchParams::default(), &Patch::Merge(patch)));
        patched.err().map(|error| error.to_string()).unwrap_or_default()
    };
    wait_for("the policy to be in force", || {
        let said = refusal("another", json!({"spec": {"taints": [{"key": "k", "effect": "NoExecute"}]}}));
        said.contains("changes its own node only").then_some(())
    });
    for more in [
        json!({"spec": {"taints": [{"key": "k", "effect": "NoExecute"}]}}),
        json!({"spec": {"taints": []}}),
        json!({"spec": {"unschedulable": true}}),
        json!({"metadata": {"labels": {"pool": "another"}}}),
        json!({"metadata": {"annotations": {"another": "annotation"}}}),
    ] {
        let said = refusal(&node.host.name, more.clone());
        assert!(said.contains("takes off the startup taint and changes nothing else"), "{more}: {said:?}");
    }

    // Once: whoever puts it back wants it there. The next watcher takes it off again.
    let tainted = json!({"spec": {"taints": [{"key": KEY, "effect": "NoSchedule"}]}});
    let patch = Patch::Merge(&tainted);
    node.api.block_on(nodes.patch(&node.host.name, &PatchParams::default(), &patch)).expect("patched");
    node.host.kill_watcher();
    node.host.start(&["--startup-taint", KEY]);
    wait_for("the taint to go", || with_key(&node) == 0);
    node.host.kill_watcher();
    for name in [&*node.host.name, "another"] {
        node.api.block_on(nodes.delete(name, &DeleteParams::default())).expect("deleted");
    }
    assert!(node.host.refuses(&["--startup-taint", "a=b"]).contains("the key alone"));
}
