//! What a namespace and the mesh exclude and include, by annotations and by the chart's ConfigMap.

use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::json;
use testbed::{api_node::ApiNode, chart, wait::wait_for};

#[test]
#[ignore = "needs root: make test"]
fn lists_of_a_namespace_and_of_the_mesh_hold_from_the_next_connection_on() {
    let mut node = ApiNode::new(&json!({"istio.io/dataplane-mode": "ambient"}));
    // The ConfigMap as the chart has it, and the watchers' right to follow it.
    node.api.apply(&chart::template("redirect-only", "watcher-lists.yaml", &[]));
    let maps: Api<ConfigMap> = Api::namespaced(node.api.client(), "adit-system");
    let namespaces: Api<Namespace> = Api::all(node.api.client());
    let own = json!({"metadata": {"annotations": {"ambient.adit.dev/exclude-outbound-ports": "6379"}}});
    node.pod("pod", &own);
    node.host.start(&["--lists-config-map", "adit-system/adit-lists"]);
    let _told = node.tunnel().take_all();
    node.wait_state("pod", "open", "");
    let excluded = |node: &ApiNode| -> Vec<u16> {
        let is_excluded = |port: &u16| {
            let pod = format!("{}/pod", node.namespace);
            let (ok, said) = node.host.command(&["explain", &pod, &format!("10.1.1.1:{port}")]);
            assert!(ok, "{said}");
            said.contains("port excluded")
        };
        [25, 26, 6379].into_iter().filter(is_excluded).collect()
    };
    let wait_excluded = |node: &ApiNode, wanted: &[u16]| {
        wait_for(&format!("{wanted:?} to be excluded"), || (excluded(node) == wanted).then_some(()));
    };
    wait_excluded(&node, &[6379]);
    let patch = |data: serde_json::Value| Patch::Merge(json!({"data": data}));
    let params = PatchParams::default();
    let mesh = patch(json!({"excludeOutboundPorts": "25", "excludeOutboundPort": "1"}));
    node.api.block_on(maps.patch("adit-lists", &params, &mesh)).expect("patched");
    wait_excluded(&node, &[25, 6379]);
    assert!(node.host.log().contains("excludeOutboundPort: unknown key ignored"), "{}", node.host.log());

    let annotations = json!({"ambient.adit.dev/exclude-outbound-ports": "26, smtp"});
    let namespace = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
    node.api.block_on(namespaces.patch(&node.namespace, &params, &namespace)).expect("patched");
    wait_excluded(&node, &[25, 26, 6379]);
    let notes = node.find("pod").expect("the pod")["notes"].to_string();
    assert!(notes.contains(&format!("namespace {}", node.namespace)) && notes.contains("smtp"), "{notes}");

    let (ok, listed) = node.host.command(&["status", "lists", "-o", "json"]);
    assert!(ok, "{listed}");
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    let from = |item: &str| {
        let entries = listed["lists"][0]["entries"].as_array().expect("entries");
        let entry =
            entries.iter().find(|entry| entry["item"] == item).unwrap_or_else(|| panic!("{entries:?}"));
        entry["from"].clone()
    };
    let namespace_says = format!("annotations of namespace {}", node.namespace);
    assert_eq!(from("25-26"), json!([namespace_says, "ConfigMap adit-system/adit-lists"]));
    assert_eq!(from("6379"), json!(["annotations of the pod"]));

    node.api.block_on(maps.delete("adit-lists", &DeleteParams::default())).expect("deleted");
    wait_excluded(&node, &[26, 6379]);
    assert!(node.source_error().is_none());
}

/// Not known is not none: what they exclude or include would hold for every pod.
#[test]
#[ignore = "needs root: make test"]
fn lists_that_may_not_be_read_are_named_and_the_watcher_is_not_ready() {
    let mut node = ApiNode::new(&json!({"istio.io/dataplane-mode": "ambient"}));
    node.pod("pod", &json!({}));
    // The chart's role is about one name.
    node.host.start(&["--lists-config-map", "adit-system/others"]);
    node.wait_source_error(&["the verb list on configmaps", "forbidden"]);
    let status = node.host.status();
    assert_eq!((&status["ready"], &status["source"]["synced"]), (&json!(false), &json!(false)));
}
