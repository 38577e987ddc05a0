//! Large responses wait for their turn, and nothing else does.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use testbed::{api_server::ApiServer, wait::wait_at_most};

use crate::rig::{ADDRESS, AUTHORIZATION, Control, LIMIT, unique};

/// Of a service without a selector: more endpoints than a small response has.
fn many_endpoints(api: &ApiServer) {
    api.namespace("demo", &json!({}));
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "demo"},
        "spec": {"ports": [{"name": "web", "port": 80}]}});
    let endpoints: Vec<Value> = (0..600)
        .map(|number| json!({"addresses": [format!("10.9.{}.{}", number / 250, number % 250)]}))
        .collect();
    let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "web-1", "namespace": "demo", "labels": {"kubernetes.io/service-name": "web"}},
        "ports": [{"name": "web", "port": 80}], "endpoints": endpoints});
    for object in [service, slice] {
        api.apply(&object.to_string());
    }
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_tunnel_that_waits_for_its_turn_is_heard() {
    let api = Arc::new(ApiServer::start());
    many_endpoints(&api);
    let control = Control::start_at(Arc::clone(&api), &[]);
    let tunnel = |node: &str| {
        let mut stream = control.stream(&control.token(node)).unwrap();
        stream.subscribe(AUTHORIZATION);
        let policies = stream.receive().unwrap();
        stream.acknowledge(&policies);
        stream.subscribe(ADDRESS);
        stream
    };
    let nodes = [unique("node"), unique("node")];
    // As many as there are turns; none acknowledges what it got.
    let mut before: Vec<_> = (0..16).map(|number| tunnel(&nodes[number % 2])).collect();
    let first = before.iter_mut().map(|stream| stream.receive().unwrap()).collect::<Vec<_>>();
    assert!(first.iter().all(|response| response.resources.len() > 500));

    let (late, node) = (&mut tunnel(&unique("node")), unique("node"));
    assert!(late.is_silent_for(Duration::from_millis(300)), "it has no turn yet");
    // Another one that waits, too, and leaves.
    let leaving = tunnel(&node);
    wait_at_most(LIMIT, "all to be connected", || {
        (control.metric("ztunnel_control_streams") > 17.5).then_some(())
    });
    drop(leaving);
    // Well before it would have been given up.
    wait_at_most(Duration::from_secs(10), "it to be noticed", || {
        (control.metric("ztunnel_control_streams") < 17.5).then_some(())
    });
    // A turn that is free goes to who waits.
    before[3].acknowledge(&first[3]);
    assert!(late.receive().unwrap().resources.len() > 500);
}
