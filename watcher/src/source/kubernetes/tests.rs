use std::{collections::HashMap, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::{Query, State},
    response::{IntoResponse as _, Response},
    routing::get,
};
use futures_util::StreamExt as _;
use serde_json::{Value, json};

use super::*;
use crate::model::pod::Entry;

/// An API server that is behind its store, as one of several may be: what it remembers lacks
/// everything that the store has. It says so only to who asks for the store's own state.
async fn fake_server_that_is_behind(store: HashMap<&'static str, Value>) -> Config {
    let answer = |State(item): State<Value>, Query(query): Query<HashMap<String, String>>| async move {
        let is = |key: &str, value: &str| query.get(key).is_some_and(|given| given == value);
        let of_any_age = is("resourceVersion", "0") || is("sendInitialEvents", "true");
        let watches = is("watch", "true") || is("watch", "1");
        let items = if of_any_age { Vec::new() } else { vec![item] };
        if !watches {
            let list = json!({"metadata": {"resourceVersion": "7"}, "items": items});
            return Json(list).into_response();
        }
        let end = json!({"type": "BOOKMARK", "object": {"kind": "Pod", "apiVersion": "v1",
            "metadata": {"resourceVersion": "5", "annotations": {"k8s.io/initial-events-end": "true"}}}});
        let first =
            futures_util::stream::iter(of_any_age.then(|| Ok::<_, std::io::Error>(format!("{end}\n"))));
        Response::new(Body::from_stream(first.chain(futures_util::stream::pending())))
    };
    let mut routes = Router::new();
    for (kind, item) in store {
        routes = routes.route(&format!("/api/v1/{kind}"), get(answer).with_state(item));
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    #[expect(clippy::disallowed_methods, reason = "ends with the test's runtime")]
    tokio::spawn(async move { axum::serve(listener, routes).await });
    Config::new(format!("http://{address}").parse().unwrap())
}

#[tokio::test]
async fn what_a_server_that_is_behind_does_not_know_yet_is_not_taken_for_gone() {
    let ambient = json!({"istio.io/dataplane-mode": "ambient"});
    let config = fake_server_that_is_behind(HashMap::from([
        ("namespaces", json!({"metadata": {"name": "demo", "uid": "n", "labels": ambient}})),
        (
            "pods",
            json!({"metadata": {"name": "client", "namespace": "demo", "uid": "p"},
            "spec": {"nodeName": "a", "containers": []}}),
        ),
    ]))
    .await;
    let options = KubernetesConfig { node: "a".to_owned(), ..KubernetesConfig::default() };
    let mut source = start(&config, options).unwrap();
    source.begin();
    let first = tokio::time::timeout(Duration::from_secs(10), source.updates.recv()).await;
    let Ok(Some(Update::All(pods))) = first else { panic!("{first:?}") };
    assert!(matches!(&pods[..], [Entry::Pod(pod)] if pod.name == "client"), "{pods:?}");
}
