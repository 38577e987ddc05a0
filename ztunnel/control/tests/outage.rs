//! The API server is away: what is known stays, nothing is signed, and then everything goes on.

use std::sync::Arc;

use serde_json::json;
use testbed::{api_server::ApiServer, wait::wait_at_most};
use tonic::Code;

use crate::{
    certificates::{ask, id, with_pod},
    rig::{ADDRESS, AUTHORIZATION, Control, LIMIT, ready_at, unique},
};

#[test]
#[ignore = "needs an API server: make test"]
fn streams_outlive_the_api_server_and_certificates_wait_for_it() {
    // Without Istio's resources.
    let control = Control::start_at(Arc::new(ApiServer::start()), &[]);
    let node = unique("node");
    let demo = with_pod(&control, "web", &node);
    control.api.set_status(&demo, "web", &ready_at("10.3.0.1"));
    let (web, token) = (id(&demo, "web"), control.token(&node));
    let mut stream = control.stream(&token).unwrap();
    stream.subscribe(AUTHORIZATION);
    stream.subscribe(ADDRESS);
    let workload = format!("Kubernetes//Pod/{demo}/web");
    stream.receive_about(&workload);
    ask(&control, &token, &web, &web).unwrap();

    control.api.kill_server();
    let refused = ask(&control, &token, &web, &web).unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    wait_at_most(LIMIT, "the loss to be noticed", || {
        control.log().contains("what is known stays").then_some(())
    });
    assert!(control.get("/healthz/ready").contains("200 OK"));
    assert!(control.metric("ztunnel_control_streams") >= 1.0);

    control.api.start_server();
    control.api.patch_pod(&demo, "web", &json!({"metadata": {"labels": {"version": "v9"}}}));
    // On the same stream.
    let told = stream.receive_about(&workload);
    assert!(told.removed_resources.is_empty(), "{:?}", told.removed_resources);
    ask(&control, &token, &web, &web).unwrap();
}
