//! Discovery streams, request by request.

use std::time::Duration;

use kube::{
    Api,
    api::DeleteParams,
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use prost::Message as _;
use serde_json::json;
use testbed::wait::wait_at_most;
use tonic::Code;
use ztunnel_api::{
    discovery::{self, DeltaDiscoveryRequest, DeltaDiscoveryResponse},
    workload::{Address, Workload, address::Type},
};

use crate::rig::{ADDRESS, AUTHORIZATION, Control, LIMIT, ready_at, unique};

fn workload(response: &DeltaDiscoveryResponse, name: &str) -> Workload {
    let resource = response.resources.iter().find(|resource| resource.name == name).unwrap();
    let content = resource.resource.as_ref().unwrap();
    match Address::decode(&*content.value).unwrap().r#type.unwrap() {
        Type::Workload(workload) => workload,
        Type::Service(service) => panic!("{service:?}"),
    }
}

fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|resource| resource.name.as_str()).collect()
}

/// A namespace with a pod `web`, and the name of its workload.
fn with_pod(control: &Control, node: &str, address: &str) -> (String, String) {
    let demo = unique("demo");
    control.api.namespace(&demo, &json!({}));
    control.api.pod(&demo, "web", node, &json!({"metadata": {"labels": {"app": "none"}}}));
    control.api.set_status(&demo, "web", &ready_at(address));
    let name = format!("Kubernetes//Pod/{demo}/web");
    (demo, name)
}

#[test]
#[ignore = "needs an API server: make test"]
fn policies_come_before_workloads_and_before_whoever_names_them() {
    let control = Control::start(&[]);
    let (demo, web) = with_pod(&control, &unique("node"), "10.2.0.1");
    let mut stream = control.stream(&control.token(&unique("node"))).unwrap();
    // A tunnel asks for workloads first.
    stream.subscribe(ADDRESS);
    stream.subscribe(AUTHORIZATION);
    let first = stream.receive().unwrap();
    assert_eq!(first.type_url, AUTHORIZATION);
    assert!(stream.is_silent_for(Duration::from_millis(300)), "workloads before the policies are taken");
    stream.acknowledge(&first);
    let second = stream.receive().unwrap();
    assert_eq!(second.type_url, ADDRESS);
    stream.acknowledge(&second);
    if !names(&second).contains(&&*web) {
        // The pod is newer than what the stream began with.
        stream.receive_about(&web);
    }

    // A policy, and at the same time the label by which it selects the pod.
    control.api.apply(&format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: p\n  namespace: {demo}\n\
         spec:\n  selector: {{matchLabels: {{app: web}}}}\n  action: DENY\n  rules: [{{}}]"
    ));
    control.api.patch_pod(&demo, "web", &json!({"metadata": {"labels": {"app": "web"}}}));
    let policy = format!("{demo}/p");
    let (mut heard, mut named) = (false, false);
    while !named {
        let response = stream.receive().unwrap();
        heard |= names(&response).contains(&&*policy);
        if names(&response).contains(&&*web) {
            named = workload(&response, &web).authorization_policies.contains(&policy);
            assert!(!named || heard, "the workload names a policy that was not told");
        }
        stream.acknowledge(&response);
    }
}

/// A tunnel that forgets a policy which a workload still names lets pass what it forbids.
#[test]
#[ignore = "needs an API server: make test"]
fn a_policy_is_gone_after_whoever_named_it() {
    let control = Control::start(&[]);
    let (demo, web) = with_pod(&control, &unique("node"), "10.2.0.9");
    let selecting = |name: &str| {
        control.api.apply(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: {name}\n  namespace: {demo}\n\
             spec:\n  selector: {{matchLabels: {{app: none}}}}\n  action: DENY\n  rules: [{{}}]"
        ));
    };
    selecting("before");
    let mut stream = control.stream(&control.token(&unique("node"))).unwrap();
    stream.subscribe(AUTHORIZATION);
    stream.subscribe(ADDRESS);
    let policies = |response: &DeltaDiscoveryResponse| {
        let is_told = names(response).contains(&&*web);
        if is_told { workload(response, &web).authorization_policies } else { Vec::new() }
    };
    let (before, after) = (format!("{demo}/before"), format!("{demo}/after"));
    loop {
        let response = stream.receive().unwrap();
        stream.acknowledge(&response);
        if policies(&response).contains(&before) {
            break;
        }
    }
    selecting("after");
    let kind = GroupVersionKind::gvk("security.istio.io", "v1", "AuthorizationPolicy");
    let kind = ApiResource::from_gvk(&kind);
    let api: Api<DynamicObject> = Api::namespaced_with(control.api.client(), &demo, &kind);
    control.api.block_on(api.delete("before", &DeleteParams::default())).unwrap();
    let mut named = true;
    loop {
        let response = stream.receive().unwrap();
        let told = policies(&response);
        if told.contains(&after) {
            named = told.contains(&before);
            if !named {
                assert!(stream.is_silent_for(Duration::from_millis(300)), "before the workload is taken");
            }
        }
        let is_gone = response.removed_resources.contains(&before);
        assert!(!is_gone || !named, "gone, while the workload names it");
        stream.acknowledge(&response);
        if is_gone {
            break;
        }
    }
}

#[test]
#[ignore = "needs an API server: make test"]
fn whoever_comes_back_is_told_only_what_differs() {
    let control = Control::start(&[]);
    let (_, web) = with_pod(&control, &unique("node"), "10.2.0.2");
    let token = control.token(&unique("node"));
    let mut stream = control.stream(&token).unwrap();
    stream.subscribe(AUTHORIZATION);
    stream.subscribe(ADDRESS);
    let all = stream.receive_about(&web);
    let version = all.resources.iter().find(|resource| resource.name == web).unwrap().version.clone();
    drop(stream);

    let mut stream = control.stream(&token).unwrap();
    let held = [(web.clone(), version), ("Kubernetes//Pod/gone/gone".to_owned(), "1".to_owned())];
    stream.send(DeltaDiscoveryRequest {
        type_url: ADDRESS.to_owned(),
        initial_resource_versions: held.into(),
        ..DeltaDiscoveryRequest::default()
    });
    // Nobody subscribes to policies: workloads do not wait for ever.
    let differs = stream.receive().unwrap();
    assert!(!names(&differs).contains(&&*web), "{:?}", names(&differs));
    assert!(differs.removed_resources.contains(&"Kubernetes//Pod/gone/gone".to_owned()));
    // A refusal is counted, and nothing is sent again.
    stream.send(DeltaDiscoveryRequest {
        type_url: ADDRESS.to_owned(),
        response_nonce: differs.nonce.clone(),
        error_detail: Some(discovery::Status { code: 3, message: "x: no".to_owned() }),
        ..DeltaDiscoveryRequest::default()
    });
    wait_at_most(LIMIT, "the refusal to be counted", || {
        (control.metric("ztunnel_control_nacks_total{type=\"address\"}") >= 1.0).then_some(())
    });
}

#[test]
#[ignore = "needs an API server: make test"]
fn another_replica_goes_on_where_one_ended() {
    let (one, other) = (Control::start(&[]), Control::start(&[]));
    assert_eq!(one.root, other.root);
    let (_, web) = with_pod(&one, &unique("node"), "10.2.0.3");
    let token = one.token(&unique("node"));
    let mut stream = one.stream(&token).unwrap();
    stream.subscribe(AUTHORIZATION);
    stream.subscribe(ADDRESS);
    let told = stream.receive_about(&web);
    let held = told.resources.iter().find(|resource| resource.name == web).unwrap();
    let held = [(web.clone(), held.version.clone())];
    drop(stream);
    // As with -9.
    drop(one);

    let mut stream = other.stream(&token).unwrap();
    stream.subscribe(AUTHORIZATION);
    stream.subscribe(ADDRESS);
    stream.receive_about(&web);
    let mut stream = other.stream(&token).unwrap();
    stream.send(DeltaDiscoveryRequest {
        type_url: ADDRESS.to_owned(),
        initial_resource_versions: held.into(),
        ..DeltaDiscoveryRequest::default()
    });
    stream.subscribe(AUTHORIZATION);
    let policies = stream.receive().unwrap();
    stream.acknowledge(&policies);
    let differs = stream.receive().unwrap();
    assert_eq!(differs.type_url, ADDRESS);
    assert!(!names(&differs).contains(&&*web) && !differs.removed_resources.contains(&web));
}

#[test]
#[ignore = "needs an API server: make test"]
fn on_demand_a_tunnel_is_told_of_its_node_and_of_what_it_asks_for() {
    let control = Control::start(&[]);
    let node = unique("node");
    let (_, own) = with_pod(&control, &node, "10.2.1.1");
    let (_, other) = with_pod(&control, &unique("node"), "10.2.1.2");
    let mut stream = control.stream(&control.token(&node)).unwrap();
    let ask = |subscribe: &[&str], unsubscribe: &[&str]| {
        let texts = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        DeltaDiscoveryRequest {
            type_url: ADDRESS.to_owned(),
            resource_names_subscribe: texts(subscribe),
            resource_names_unsubscribe: texts(unsubscribe),
            ..DeltaDiscoveryRequest::default()
        }
    };
    stream.send(ask(&["*"], &["*"]));
    stream.subscribe(AUTHORIZATION);
    let first = stream.receive_about(&own);
    assert!(!names(&first).contains(&&*other), "{:?}", names(&first));
    stream.send(ask(&["/10.2.1.2"], &[]));
    let asked = stream.receive_about(&other);
    assert!(asked.resources.iter().any(|resource| resource.aliases == ["/10.2.1.2"]));
    stream.send(ask(&["/10.2.1.77"], &[]));
    stream.receive_about("/10.2.1.77");
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_tunnel_that_does_not_answer_is_disconnected() {
    let control = Control::start(&["--acknowledge-secs", "1"]);
    let mut stream = control.stream(&control.token(&unique("node"))).unwrap();
    stream.subscribe(AUTHORIZATION);
    stream.receive().unwrap();
    // It is told nothing more, and then that it is too slow, or it finds the connection closed.
    stream.receive().unwrap_err();
    wait_at_most(LIMIT, "the stream to end", || {
        (control.metric("ztunnel_control_unacknowledged_total") >= 1.0
            && control.metric("ztunnel_control_streams") < 1.0)
            .then_some(())
    });
}

#[test]
#[ignore = "needs an API server: make test"]
fn nobody_but_tunnels_is_told_anything() {
    let control = Control::start(&[]);
    let other = control.token_of(("adit-system", "default"), "n", "istio-ca");
    let audience = control.token_of(("adit-system", "ztunnel"), "n", "vault");
    for (token, code) in [
        (other, Code::PermissionDenied),
        (audience, Code::Unauthenticated),
        ("nonsense".to_owned(), Code::Unauthenticated),
    ] {
        let refused = control.stream(&token).err().expect("a refusal");
        assert_eq!(refused.code(), code, "{refused:?}");
    }
    for reason in ["not_a_tunnel", "token_refused"] {
        let name = format!("ztunnel_control_unauthenticated_total{{reason=\"{reason}\"}}");
        assert!(control.metric(&name) >= 1.0, "{reason}");
    }
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_shutdown_tells_tunnels_to_go_elsewhere() {
    let mut control = Control::start(&[]);
    let token = control.token(&unique("node"));
    let ended = {
        let mut stream = control.stream(&token).unwrap();
        stream.subscribe(AUTHORIZATION);
        let first = stream.receive().unwrap();
        stream.acknowledge(&first);
        let pid = nix::unistd::Pid::from_raw(control.process.0.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        loop {
            match stream.receive() {
                Ok(response) => stream.acknowledge(&response),
                Err(status) => break status,
            }
        }
    };
    assert_eq!(ended.code(), Code::Unavailable, "{ended:?}");
    let status = wait_at_most(LIMIT, "the process to end", || control.process.0.try_wait().unwrap());
    assert!(status.success(), "{status}\n{}", control.log());
}
