//! Policies of our own kind, and what the statuses of both kinds say.

use std::sync::Arc;

use kube::{
    Api,
    api::{Patch, PatchParams},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use prost::Message as _;
use serde_json::{Value, json};
use testbed::{api_server::ApiServer, chart, wait::wait_at_most};
use ztunnel_api::security::{Action, Authorization};

use crate::rig::{AUTHORIZATION, Control, LIMIT, unique};

fn access_policies(api: &ApiServer, namespace: &str) -> Api<DynamicObject> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("adit.dev", "v1alpha1", "AccessPolicy"));
    Api::namespaced_with(api.client(), namespace, &resource)
}

fn apply(api: &ApiServer, policies: &Api<DynamicObject>, spec: &Value) -> Result<(), kube::Error> {
    let policy = json!({"apiVersion": "adit.dev/v1alpha1", "kind": "AccessPolicy",
        "metadata": {"name": "web"}, "spec": spec});
    let params = PatchParams::apply("test").force();
    api.block_on(policies.patch("web", &params, &Patch::Apply(&policy))).map(drop)
}

/// Our condition of a policy, when it is about its present version.
fn condition(api: &ApiServer, policies: &Api<DynamicObject>) -> Value {
    wait_at_most(LIMIT, "a status of this version", || {
        let policy = api.block_on(policies.get("web")).unwrap();
        let conditions = policy.data["status"]["conditions"].as_array()?;
        let ours = conditions.iter().find(|condition| condition["type"] == "ZtunnelAccepted")?.clone();
        (ours["observedGeneration"].as_i64() == policy.metadata.generation).then_some(ours)
    })
}

/// The policy of this name, when it is told next.
fn told(control: &Control, name: &str) -> Authorization {
    let mut stream = control.stream(&control.token(&unique("node"))).unwrap();
    stream.subscribe(AUTHORIZATION);
    let response = stream.receive_about(name);
    let resource = response.resources.iter().find(|resource| resource.name == name).unwrap();
    Authorization::decode(&*resource.resource.as_ref().unwrap().value).unwrap()
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_cluster_without_istio_has_policies_that_say_what_is_enforced() {
    let api = Arc::new(ApiServer::start());
    api.apply(&chart::template("standalone", "control-policy-crd.yaml", &[]));
    let policies = access_policies(&api, "demo");
    api.namespace("demo", &json!({}));
    api.wait("the kind", || async { policies.list(&kube::api::ListParams::default()).await.ok() });
    let (control, other) =
        (Control::start_at(Arc::clone(&api), &[]), Control::start_at(Arc::clone(&api), &[]));

    let rule = json!({"from": [{"source": {"serviceAccounts": ["client"]}}]});
    apply(&api, &policies, &json!({"selector": {"matchLabels": {"app": "web"}}, "rules": [rule]})).unwrap();
    let accepted = condition(&api, &policies);
    assert_eq!((&accepted["status"], &accepted["reason"]), (&json!("True"), &json!("Accepted")));
    let sent = told(&control, "demo/access_policy_web");
    assert_eq!((sent.action(), sent.rules.len()), (Action::Allow, 1));

    // What layer 4 does not see is neither lost on the way nor taken for nothing.
    let l7 = json!({"to": [{"operation": {"methods": ["GET"]}}]});
    let expressions = json!({"matchExpressions": [{"key": "app", "operator": "Exists"}]});
    for (spec, rules, named) in [
        (json!({"rules": [l7]}), 0, "methods"),
        (json!({"rules": [{}], "surprise": 1}), 1, "spec.surprise"),
        (json!({"rules": [{}], "selector": expressions}), 1, "matchExpressions"),
    ] {
        apply(&api, &policies, &spec).unwrap();
        let stricter = condition(&api, &policies);
        assert_eq!((&stricter["status"], &stricter["reason"]), (&json!("True"), &json!("UnsupportedValue")));
        assert!(stricter["message"].as_str().unwrap().contains(named), "{stricter}");
        let sent = told(&other, "demo/access_policy_web");
        assert_eq!(sent.rules.len(), rules, "{spec}");
        // An ALLOW policy that allows nobody, or one that denies everybody.
        assert_eq!(sent.action() == Action::Deny, rules == 1, "{spec}");
    }
    for wrong in [json!({"action": "CUSTOM"}), json!({"rules": {}}), json!({"rules": [{"when": [{}]}]})] {
        assert!(apply(&api, &policies, &wrong).is_err(), "{wrong}");
    }

    // Both replicas say the same, and then nothing more.
    apply(&api, &policies, &json!({})).unwrap();
    condition(&api, &policies);
    let version = || api.block_on(policies.get("web")).unwrap().metadata.resource_version;
    let written = version();
    api.label_namespace("demo", &json!({"any": "change"}));
    for control in [&control, &other] {
        told(control, "demo/access_policy_web");
    }
    assert_eq!(version(), written);
}

#[test]
#[ignore = "needs an API server: make test"]
fn istios_policies_say_it_as_with_istio_and_keep_what_others_say() {
    let control = Control::start(&[]);
    let (api, demo) = (&control.api, unique("demo"));
    api.namespace(&demo, &json!({}));
    let resource =
        ApiResource::from_gvk(&GroupVersionKind::gvk("security.istio.io", "v1", "AuthorizationPolicy"));
    let policies: Api<DynamicObject> = Api::namespaced_with(api.client(), &demo, &resource);
    api.apply(&format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: web\n  namespace: {demo}\nspec:\n  action: AUDIT"
    ));
    let refused = condition(api, &policies);
    assert_eq!((&refused["status"], &refused["reason"]), (&json!("False"), &json!("UnsupportedValue")));

    let other = json!({"type": "WaypointAccepted", "status": "True"});
    let conditions = json!({"status": {"conditions": [refused, other]}});
    api.block_on(policies.patch_status("web", &PatchParams::default(), &Patch::Merge(&conditions))).unwrap();
    let spec = json!({"spec": {"action": "ALLOW"}});
    api.block_on(policies.patch("web", &PatchParams::default(), &Patch::Merge(&spec))).unwrap();
    assert_eq!(condition(api, &policies)["reason"], "Accepted");
    let policy = api.block_on(policies.get("web")).unwrap();
    assert!(policy.data["status"]["conditions"].as_array().unwrap().contains(&other), "{:?}", policy.data);
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_peer_authentication_says_what_becomes_of_it() {
    let control = Control::start(&[]);
    let (api, demo) = (&control.api, unique("demo"));
    api.namespace(&demo, &json!({}));
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("security.istio.io", "v1", "PeerAuthentication"));
    let policies: Api<DynamicObject> = Api::namespaced_with(api.client(), &demo, &kind);
    let apply = |name: &str, spec: &Value| {
        let policy = json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": name, "namespace": demo}, "spec": spec});
        api.apply(&policy.to_string());
    };
    let selector = json!({"matchLabels": {"app": "web"}});
    for (spec, reason, message) in [
        (json!({"selector": selector, "mtls": {"mode": "STRICT"}}), "Accepted", "attached"),
        (json!({"selector": selector, "mtls": {"mode": "DISABLE"}}), "UnsupportedValue", "PERMISSIVE"),
        (json!({"selector": selector, "surprise": 1}), "UnsupportedValue", "plaintext is refused"),
        (json!({"portLevelMtls": {"80": {"mode": "STRICT"}}}), "UnsupportedValue", "needs a selector"),
    ] {
        apply("web", &spec);
        let said = condition(api, &policies);
        assert_eq!((&said["status"], &said["reason"]), (&json!("True"), &json!(reason)), "{said}");
        assert!(said["message"].as_str().unwrap().contains(message), "{said}");
    }
    // By its name it would come first; what is older does.
    let created = || api.block_on(policies.get("web")).unwrap().metadata.creation_timestamp.unwrap().0;
    let before = created();
    wait_at_most(LIMIT, "the next second", || {
        (k8s_openapi::jiff::Timestamp::now().as_second() > before.as_second()).then_some(())
    });
    apply("another", &json!({"mtls": {"mode": "PERMISSIVE"}}));
    let said = wait_at_most(LIMIT, "a status", || {
        let policy = api.block_on(policies.get("another")).unwrap();
        policy.data.pointer("/status/conditions/0").cloned()
    });
    assert_eq!((&said["status"], &said["reason"]), (&json!("False"), &json!("Conflicted")), "{said}");
    // A status that was written changes nothing.
    let version = || api.block_on(policies.get("another")).unwrap().metadata.resource_version;
    let written = version();
    api.label_namespace(&demo, &json!({"any": "change"}));
    told(&control, "adit-system/istio_converted_static_strict");
    assert_eq!(version(), written);
}
