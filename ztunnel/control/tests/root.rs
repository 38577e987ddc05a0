//! The Secret of the root: made once, and refused when it does not fit.

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, api::PostParams};
use serde_json::json;
use testbed::api_server::ApiServer;
use tokio::runtime::Runtime;
use ztunnel_control::authority::{
    new_root,
    secret::{RootError, RootPlace},
};

use crate::rig::unique;

fn place() -> RootPlace {
    RootPlace {
        namespace: "adit-system".to_owned(),
        secret: unique("root"),
        config_map: None,
        trust_domain: "cluster.local".to_owned(),
    }
}

#[test]
#[ignore = "needs an API server: make test"]
fn of_many_at_the_same_time_one_makes_the_root() {
    let (api, runtime, place) = (ApiServer::shared(), Runtime::new().unwrap(), place());
    let client = api.client();
    let opened = runtime.block_on(futures_util::future::join_all((0..8).map(|_| place.open(&client))));
    let roots: Vec<String> = opened.into_iter().map(|opened| opened.unwrap().root().to_owned()).collect();
    assert!(roots.iter().all(|root| *root == roots[0]), "{roots:#?}");
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_root_that_does_not_fit_is_refused_with_the_reason() {
    let (api, runtime) = (ApiServer::shared(), Runtime::new().unwrap());
    let (certificate, key) = new_root("cluster.local").unwrap();
    let (_, other) = new_root("cluster.local").unwrap();
    for (data, expected) in [
        (json!({"tls.crt": certificate, "tls.key": other}), "does not belong to the certificate"),
        (json!({"tls.crt": "nonsense", "tls.key": key}), "cannot be read"),
        (json!({"tls.crt": certificate, "tls.key": ""}), "tls.key"),
    ] {
        let place = place();
        let secret = json!({"metadata": {"name": place.secret}, "stringData": data});
        let secret: Secret = serde_json::from_value(secret).unwrap();
        let secrets: Api<Secret> = Api::namespaced(api.client(), &place.namespace);
        api.block_on(secrets.create(&PostParams::default(), &secret)).unwrap();
        let error = runtime.block_on(place.open(&api.client())).unwrap_err();
        assert!(matches!(error, RootError::Unusable { .. } | RootError::Incomplete { .. }), "{error:?}");
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        assert!(format!("{error}: {cause}").contains(expected), "{error}: {cause}");
    }
}
