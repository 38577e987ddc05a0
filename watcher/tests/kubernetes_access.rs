//! The chart's ClusterRole is enough for the watcher, each verb of it is needed, and it is of no
//! use for more.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use testbed::{
    api_node::ApiNode,
    api_server::{ApiServer, rbac},
    chart,
    wait::wait_for,
};

/// The chart's rules, one for each resource.
fn rules() -> Vec<(String, String, Vec<String>)> {
    let role: Value = chart::objects(rbac())
        .into_iter()
        .find(|document| document["kind"] == "ClusterRole")
        .expect("the ClusterRole");
    let texts = |value: &Value| -> Vec<String> {
        value
            .as_array()
            .expect("a list")
            .iter()
            .map(|text| text.as_str().expect("a text").to_owned())
            .collect()
    };
    let mut rules = Vec::new();
    for rule in role["rules"].as_array().expect("rules") {
        for resource in texts(&rule["resources"]) {
            rules.push((texts(&rule["apiGroups"])[0].clone(), resource, texts(&rule["verbs"])));
        }
    }
    rules
}

/// A role of the same rights but for `verb` on `resource`, bound to an account of its own: its
/// kubeconfig.
fn account_without(api: &ApiServer, name: &str, verb: &str, resource: &str) -> std::path::PathBuf {
    let rules: Vec<Value> = rules()
        .into_iter()
        .map(|(group, of, verbs)| {
            let verbs: Vec<String> =
                verbs.into_iter().filter(|granted| of != resource || granted != verb).collect();
            json!({"apiGroups": [group], "resources": [of], "verbs": verbs})
        })
        .filter(|rule| rule["verbs"] != json!([]))
        .collect();
    let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules});
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": "adit-system"}],
    });
    api.service_account("adit-system", name);
    api.apply(&format!("{role}\n---\n{binding}"));
    api.kubeconfig_of("adit-system", name)
}

#[test]
#[ignore = "needs root: make test"]
fn each_verb_of_the_role_is_needed_and_its_absence_is_named() {
    let mut node = ApiNode::new(&json!({"istio.io/dataplane-mode": "ambient"}));
    let annotations = json!({"ambient.adit.dev/fail-mode": "ajar"});
    node.pod("pod", &json!({"metadata": {"annotations": annotations}}));
    let needed_to_read =
        [("list", "pods"), ("watch", "pods"), ("list", "namespaces"), ("watch", "namespaces")];
    let needed_to_write = [("patch", "pods/status"), ("create", "events")];
    let granted: BTreeSet<(String, String)> = rules()
        .into_iter()
        .flat_map(|(_, resource, verbs)| verbs.into_iter().map(move |verb| (verb, resource.clone())))
        .collect();
    let tested = needed_to_read.iter().chain(&needed_to_write);
    assert_eq!(
        granted,
        tested.map(|(verb, resource)| ((*verb).to_owned(), (*resource).to_owned())).collect()
    );
    for (number, (verb, resource)) in needed_to_read.iter().enumerate() {
        node.host.kubeconfig = Some(account_without(&node.api, &format!("without-{number}"), verb, resource));
        node.host.start(&[]);
        node.wait_source_error(&[&format!("the verb {verb} on {resource}"), "forbidden"]);
        node.host.kill_watcher();
    }
    for (number, (verb, resource)) in needed_to_write.iter().enumerate() {
        node.host.kubeconfig = Some(account_without(&node.api, &format!("mute-{number}"), verb, resource));
        node.host.start(&[]);
        let tunnel = node.tunnel().take_all();
        // Traffic does not wait for what cannot be written back.
        node.wait_state("pod", "open", "");
        wait_for(&format!("a record that {verb} on {resource} is missing"), || {
            let log = node.host.log();
            let named = log.lines().any(|line| {
                line.contains("forbidden")
                    && line.contains(&format!("cannot {verb} resource"))
                    && line.contains(verb)
            });
            named.then_some(())
        });
        node.host.kill_watcher();
        tunnel.join().expect("the tunnel");
        node.api.patch_pod(
            &node.namespace,
            "pod",
            &json!({"metadata": {"annotations": {"ambient.istio.io/redirection": null}}}),
        );
    }
}

#[test]
#[ignore = "needs root: make test"]
fn the_role_does_not_let_anybody_change_what_pods_run() {
    let mut node = ApiNode::new(&json!({}));
    node.pod("pod", &json!({}));
    let pods: Api<Pod> = Api::namespaced(node.api.client_by(&node.api.watcher_kubeconfig()), &node.namespace);
    let other = Patch::Strategic(json!({"spec": {"containers": [{"name": "main", "image": "another"}]}}));
    let params = PatchParams::default();
    let refused = node.api.block_on(pods.patch("pod", &params, &other)).expect_err("patched");
    assert!(refused.to_string().contains("forbidden"), "{refused}");
    let image = |pod: Pod| pod.spec.expect("a spec").containers[0].image.clone();
    let pod =
        node.api.block_on(pods.patch_status("pod", &params, &other)).expect("a patch that changes nothing");
    assert_eq!(image(pod).as_deref(), Some("none"));
}

#[test]
#[ignore = "needs root: make test"]
fn with_the_charts_policy_a_watcher_changes_one_annotation_of_its_own_nodes_pods() {
    let api = std::sync::Arc::new(ApiServer::start());
    // What keeps a watcher to one annotation on the pods of its own node.
    api.apply(&chart::template("redirect-only", "watcher-own-node.yaml", &[]));
    let mut node = ApiNode::of(api, &json!({"istio.io/dataplane-mode": "ambient"}));
    let (own, _) = node.pod("own", &json!({"metadata": {"annotations": {"kept": "as it is"}}}));
    node.api.pod(&node.namespace, "foreign", "another-node", &json!({}));
    let account = json!({"spec": {"serviceAccountName": "adit-watcher"}});
    let uid = node.api.pod("adit-system", "watcher", &node.host.name, &account);
    let kubeconfig = node.api.kubeconfig_of_pod("adit-system", "adit-watcher", Some(("watcher", &uid)));

    let pods: Api<Pod> = Api::namespaced(node.api.client_by(&kubeconfig), &node.namespace);
    let refusal = |name: &str, patch: &Value| {
        let patch = Patch::Merge(patch);
        let patched = node.api.block_on(pods.patch_status(name, &PatchParams::default(), &patch));
        patched.err().map(|error| error.to_string())
    };
    let mark = |value: Value| json!({"metadata": {"annotations": {"ambient.istio.io/redirection": value}}});
    let in_force = |said: Option<String>| said.is_some_and(|said| said.contains("its own node only"));
    wait_for("the policy to be in force", || in_force(refusal("foreign", &mark(json!("enabled")))));
    for more in [
        json!({"status": {"podIP": "10.99.0.1", "podIPs": [{"ip": "10.99.0.1"}]}}),
        json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}}),
        json!({"metadata": {"labels": {"app": "another"}}}),
        json!({"metadata": {"finalizers": ["example.org/stays"]}}),
        json!({"metadata": {"annotations": {"another": "annotation"}}}),
        json!({"metadata": {"annotations": {"kept": "no more"}}}),
        json!({"metadata": {"annotations": {"kept": null}}}),
    ] {
        let said = refusal("own", &more).unwrap_or_else(|| panic!("{more} is let pass"));
        assert!(
            said.contains("changes the annotation ambient.istio.io/redirection and nothing else"),
            "{said}"
        );
    }
    let said = refusal("own", &mark(json!("disabled"))).expect("refused");
    assert!(said.contains("is enabled, or not there"), "{said}");

    node.host.kubeconfig = Some(kubeconfig.clone());
    node.host.start(&[]);
    let _told = node.tunnel().take_all();
    node.wait_state("own", "open", "");
    node.wait_annotation("own", Some("enabled"));
    node.api.label_namespace(&node.namespace, &json!({"istio.io/dataplane-mode": null}));
    node.wait_annotation("own", None);
    node.report(own);
}
