//! Large responses wait for their turn, and nothing else does.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use testbed::{api_server::ApiServer, wait::wait_at_most};

use crate::rig::{ADDRESS, AUTHORIZATION, BareStream, Control, LIMIT, unique};

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
    // As many as there are turns, all of which have begun before there is much to tell.
    let begun = |number: usize| {
        let mut stream = tunnel(&nodes[number % 2]);
        let first = stream.receive().unwrap();
        stream.acknowledge(&first);
        stream
    };
    let mut before: Vec<_> = (0..16).map(begun).collect();
    many_endpoints(&api);
    // None acknowledges what is large.
    let large = |stream: &mut BareStream<'_>| loop {
        let response = stream.receive().unwrap();
        if response.resources.len() > 500 {
            return response;
        }
        stream.acknowledge(&response);
    };
    let first: Vec<_> = before.iter_mut().map(large).collect();

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

/// As after a restart, when all come back at once: each may have megabytes to say and to hear.
#[test]
#[ignore = "needs an API server: make test"]
fn some_tunnels_begin_at_a_time_and_the_others_wait() {
    let control = Control::start(&[]);
    let begin = || {
        let stream = control.stream(&control.token(&unique("node"))).unwrap();
        stream.subscribe(AUTHORIZATION);
        stream.subscribe(ADDRESS);
        stream
    };
    let mut first: Vec<_> = (0..12).map(|_| begin()).collect();
    let mut policies: Vec<_> = first.iter_mut().map(|stream| stream.receive().unwrap()).collect();
    let mut late = begin();
    assert!(late.is_silent_for(Duration::from_millis(300)), "it waits for one to have begun");
    first[5].acknowledge(&policies.swap_remove(5));
    let addresses = first[5].receive().unwrap();
    assert!(late.is_silent_for(Duration::from_millis(300)), "half of it is not all");
    first[5].acknowledge(&addresses);
    assert_eq!(late.receive().unwrap().type_url, AUTHORIZATION);
    // One that leaves makes room as well.
    let mut later = begin();
    assert!(later.is_silent_for(Duration::from_millis(300)));
    drop(first.remove(0));
    assert_eq!(later.receive().unwrap().type_url, AUTHORIZATION);
}
