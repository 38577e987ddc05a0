//! Certificates: for pods of the asking tunnel's node, and for nobody else.

use std::{sync::Arc, time::Duration};

use prost_types::{Struct, value::Kind};
use rcgen::{CertificateParams, KeyPair, SanType};
use serde_json::{Value, json};
use testbed::{api_server::ApiServer, wait::wait_at_most};
use tokio::time::timeout;
use tonic::{Code, Status};
use ztunnel::identity::{Certificates, Identity};
use ztunnel_api::ca::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};

use crate::rig::{Control, LIMIT, authorized, unique};

/// A namespace with a pod of `account` on `node`.
pub fn with_pod(control: &Control, account: &str, node: &str) -> String {
    pod_of(&control.api, account, node)
}

pub fn pod_of(api: &ApiServer, account: &str, node: &str) -> String {
    let demo = unique("demo");
    api.namespace(&demo, &json!({}));
    api.service_account(&demo, account);
    api.pod(&demo, "web", node, &json!({"spec": {"serviceAccountName": account}}));
    demo
}

pub fn id(namespace: &str, account: &str) -> String {
    format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")
}

/// A CSR for `name` as `identity`, sent with `token`.
pub fn ask(control: &Control, token: &str, identity: &str, name: &str) -> Result<Vec<String>, Status> {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(name.try_into().unwrap())];
    let csr = params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
    ask_with(control, token, identity, csr)
}

fn ask_with(control: &Control, token: &str, identity: &str, csr: String) -> Result<Vec<String>, Status> {
    let identity = prost_types::Value { kind: Some(Kind::StringValue(identity.to_owned())) };
    let fields = [("ImpersonatedIdentity".to_owned(), identity)].into();
    let request = IstioCertificateRequest { csr, validity_duration: 3600, metadata: Some(Struct { fields }) };
    let mut client = IstioCertificateServiceClient::new(control.channel());
    let call = client.create_certificate(authorized(request, token));
    let answer =
        control.runtime.block_on(async { timeout(LIMIT, call).await.expect("an answer in time") })?;
    Ok(answer.into_inner().cert_chain)
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_tunnel_has_certificates_for_the_pods_of_its_node_only() {
    let control = Control::start(&[]);
    let (here, elsewhere) = (unique("node"), unique("node"));
    let (own, other) = (with_pod(&control, "web", &here), with_pod(&control, "web", &elsewhere));
    // The tunnel's own client, and what it demands of a certificate.
    let certificates = Certificates::new(&control.tunnel_config(&here), Arc::default()).unwrap();
    let _leases = [&own, &other].map(|namespace| certificates.lease(namespace.as_str().into(), "web".into()));
    let identity = |namespace: &str| -> Identity { id(namespace, "web").parse().unwrap() };
    let get = |of: &Identity| {
        let asked = async { timeout(LIMIT, certificates.get(of)).await.expect("an answer in time") };
        control.runtime.block_on(asked)
    };
    let running = tokio_util::sync::CancellationToken::new();
    control.runtime.spawn(Arc::clone(&certificates).run(running.clone()));
    let credentials = get(&identity(&own)).unwrap();
    assert_eq!(credentials.identity, identity(&own));
    let lasts = credentials.not_after.duration_since(credentials.not_before).unwrap();
    assert!(lasts > Duration::from_hours(23) && lasts < Duration::from_hours(26), "{lasts:?}");
    let error = get(&identity(&other)).unwrap_err();
    let causes = format!("{error:?}");
    assert!(causes.contains("no pod of") && causes.contains(&here), "{causes}");
    running.cancel();
    assert!(control.metric("ztunnel_control_certificates_signed_total") >= 1.0);
}

#[test]
#[ignore = "needs an API server: make test"]
fn every_refusal_has_a_reason() {
    let control = Control::start(&[]);
    let node = unique("node");
    let demo = with_pod(&control, "web", &node);
    let (web, token) = (id(&demo, "web"), control.token(&node));
    assert_eq!(ask(&control, &token, &web, &web).unwrap().len(), 2);

    let refused = |token: &str, identity: &str, name: &str, code: Code, reason: &str| {
        let status = ask(&control, token, identity, name).unwrap_err();
        assert_eq!(status.code(), code, "{reason}: {status:?}");
        counted(&control, reason);
    };
    let elsewhere = control.token(&unique("node"));
    refused(&elsewhere, &web, &web, Code::PermissionDenied, "not_on_node");
    let since_1970 = |claims: &Value| claims["iat"].as_i64().unwrap();
    let signed_anew = control.api.forge(&token, |_| {});
    assert_eq!(ask(&control, &signed_anew, &web, &web).unwrap().len(), 2);
    let expired = control.api.forge(&token, |claims| {
        let issued = since_1970(claims);
        (claims["iat"], claims["nbf"], claims["exp"]) =
            ((issued - 7200).into(), (issued - 7200).into(), (issued - 60).into());
    });
    refused(&expired, &web, &web, Code::Unauthenticated, "token_refused");
    let audience = control.token_of(("adit-system", "ztunnel"), &node, "vault");
    refused(&audience, &web, &web, Code::Unauthenticated, "token_refused");
    let account = control.token_of((&demo, "web"), &node, "istio-ca");
    refused(&account, &web, &web, Code::PermissionDenied, "not_a_tunnel");
    refused(&token, &web, &id(&demo, "other"), Code::InvalidArgument, "csr_other_name");
    refused(&token, "web", &web, Code::InvalidArgument, "no_identity");
    let foreign = web.replace("cluster.local", "example.org");
    refused(&token, &foreign, &foreign, Code::PermissionDenied, "other_trust_domain");
    // Of the same name in another namespace.
    let namesake = id("default", "web");
    refused(&token, &namesake, &namesake, Code::PermissionDenied, "not_on_node");
    let status = ask_with(&control, &token, &web, "no CSR".to_owned()).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    counted(&control, "csr_unreadable");
}

fn counted(control: &Control, reason: &str) {
    let name = format!("ztunnel_control_certificates_refused_total{{reason=\"{reason}\"}}");
    assert!(control.metric(&name) >= 1.0, "{reason} is not counted");
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_pod_that_ended_has_no_certificate_any_more() {
    let control = Control::start(&[]);
    let node = unique("node");
    let demo = with_pod(&control, "web", &node);
    let (web, token) = (id(&demo, "web"), control.token(&node));
    ask(&control, &token, &web, &web).unwrap();
    control.api.set_status(&demo, "web", &json!({"phase": "Succeeded"}));
    assert_eq!(ask(&control, &token, &web, &web).unwrap_err().code(), Code::PermissionDenied);

    // A tunnel that is gone is nobody. The API server may take a while to see it.
    let demo = with_pod(&control, "web", &node);
    let web = id(&demo, "web");
    let (tunnel, token) = control.bound_token(("adit-system", "ztunnel"), &node, "istio-ca");
    ask(&control, &token, &web, &web).unwrap();
    control.api.delete_pod("adit-system", &tunnel);
    wait_at_most(LIMIT, "the token to be worth nothing", || {
        ask(&control, &token, &web, &web)
            .is_err_and(|refused| refused.code() == Code::Unauthenticated)
            .then_some(())
    });
}
