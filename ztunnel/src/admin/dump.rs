//! `/config_dump`: the whole state, under the names of Istio's dump, so that `istioctl
//! ztunnel-config` can read it.

use std::{collections::BTreeMap, time::SystemTime};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Serialize;
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;

use super::Admin;
use crate::{
    identity::CertificateInfo,
    mesh::{Endpoint, Service, ServiceKey},
    metrics::open::ConnectionView,
};

/// Number of connections listed; all are counted.
const CONNECTIONS: usize = 10_000;

/// Takes long for a large mesh: call it on a blocking thread.
pub(super) fn dump(admin: &Admin) -> serde_json::Result<String> {
    let mesh = admin.store.snapshot();
    let mut workloads: Vec<_> = mesh.workloads().collect();
    let mut services: Vec<_> = mesh.services().collect();
    workloads.sort_by_key(|workload| &workload.uid);
    services.sort_by_key(|service| (&service.namespace, &service.hostname));
    let services: Vec<_> = services
        .into_iter()
        .map(|service| {
            let (key, endpoints) = (service.key(), mesh.endpoints(&service.key()));
            let endpoints = endpoints.iter().map(|end| (&*end.workload.uid, EndpointDump::new(&key, end)));
            json!(ServiceDump { service, endpoints: endpoints.collect() })
        })
        .collect();
    let (connections, all) = admin.metrics.open.views(CONNECTIONS);
    serde_json::to_string_pretty(&json!({
        "version": { "version": env!("CARGO_PKG_VERSION") },
        "config": &*admin.config,
        "configKeys": &*admin.config.effective,
        "staticConfig": { "source": &admin.config.local_state },
        "workloads": workloads,
        "services": services,
        "policies": mesh.policies().collect::<Vec<_>>(),
        "certificates": admin.certificates.list().iter().map(CertificateDump::from).collect::<Vec<_>>(),
        "workloadState": with_connections((admin.workload_state)(), &connections),
        "openConnections": { "total": all, "listed": connections.len() },
    }))
}

#[derive(Serialize)]
struct ServiceDump<'a> {
    #[serde(flatten)]
    service: &'a Service,
    /// By the uid of the workload.
    endpoints: BTreeMap<&'a str, EndpointDump<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EndpointDump<'a> {
    workload_uid: &'a str,
    service: String,
    /// Target ports that differ from the service's.
    port: &'a BTreeMap<u16, u16>,
}

impl<'a> EndpointDump<'a> {
    fn new(service: &ServiceKey, endpoint: &'a Endpoint) -> Self {
        let workload = &endpoint.workload;
        Self { workload_uid: &workload.uid, service: service.to_string(), port: endpoint.own_ports() }
    }
}

/// The state of the pods, each with its open connections.
fn with_connections(mut pods: Value, connections: &[ConnectionView]) -> Value {
    for pod in pods.as_object_mut().into_iter().flat_map(|pods| pods.values_mut()) {
        let is = |key: &str, text: &str| pod["info"][key] == text;
        let of = |direction: &str| -> Vec<&ConnectionView> {
            let own = |view: &&ConnectionView| is("namespace", &view.pod.0) && is("name", &view.pod.1);
            connections.iter().filter(|view| view.direction == direction).filter(own).collect()
        };
        pod["connections"] = json!({ "inbound": of("inbound"), "outbound": of("outbound") });
    }
    pods
}

/// State of a certificate, in Istio's words.
pub(super) fn state(known: &CertificateInfo) -> &'static str {
    match (&known.credentials, &known.error) {
        (Some(credentials), _) if credentials.not_after < SystemTime::now() => "Expired",
        (Some(_), _) => "Available",
        (None, Some(_)) => "Unavailable",
        (None, None) => "Initializing",
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CertificateDump {
    identity: String,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    cert_chain: Vec<OneCertificate>,
    root_certs: Vec<OneCertificate>,
}

/// Base64 of the PEM, as Istio's tunnel shows it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct OneCertificate {
    pem: String,
    serial_number: String,
    valid_from: String,
    expiration_time: String,
}

impl From<&CertificateInfo> for CertificateDump {
    fn from(known: &CertificateInfo) -> Self {
        let credentials = known.credentials.as_deref();
        let shown =
            |certs: Option<&[_]>| certs.unwrap_or_default().iter().filter_map(OneCertificate::new).collect();
        Self {
            identity: known.identity.to_string(),
            state: state(known),
            error: known.error.clone(),
            cert_chain: shown(credentials.map(crate::identity::Credentials::chain)),
            root_certs: shown(credentials.map(crate::identity::Credentials::roots)),
        }
    }
}

impl OneCertificate {
    fn new(cert: &rustls::pki_types::CertificateDer<'static>) -> Option<Self> {
        let (_, parsed) = x509_parser::parse_x509_certificate(cert).ok()?;
        let body = BASE64_STANDARD.encode(cert);
        let mut pem = "-----BEGIN CERTIFICATE-----\n".to_owned();
        for line in body.as_bytes().chunks(64) {
            pem.push_str(&String::from_utf8_lossy(line));
            pem.push('\n');
        }
        pem.push_str("-----END CERTIFICATE-----\n");
        Some(Self {
            pem: BASE64_STANDARD.encode(pem),
            // In decimal, as Istio's tunnel has it.
            serial_number: parsed.tbs_certificate.serial.to_string(),
            valid_from: parsed.validity().not_before.to_datetime().format(&Rfc3339).ok()?,
            expiration_time: parsed.validity().not_after.to_datetime().format(&Rfc3339).ok()?,
        })
    }
}
