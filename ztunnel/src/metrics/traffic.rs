//! Counters of connections, and their labels.

use std::{fmt, sync::Arc};

use prometheus_client::{
    encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder},
    metrics::gauge::Gauge,
};

use super::U64Counter;

/// Istio's traffic labels. Empty values show as `unknown`, except the localities, which are left
/// out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct TrafficLabels {
    /// `source` or `destination`.
    pub reporter: &'static str,
    /// The client.
    pub source: EndLabels,
    /// The server.
    pub destination: EndLabels,
    /// Host name of the service.
    pub destination_service: Arc<str>,
    /// Namespace of the service.
    pub destination_service_namespace: Arc<str>,
    /// Name of the service.
    pub destination_service_name: Arc<str>,
    /// Istio's flag of the failure, or `-`.
    pub response_flags: &'static str,
    /// Whether the connection went over HBONE.
    pub mutual_tls: bool,
}

/// Labels of one end of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct EndLabels {
    /// Name of the workload, such as a Deployment.
    pub workload: Arc<str>,
    /// Canonical service name.
    pub canonical_service: Arc<str>,
    /// Canonical revision.
    pub canonical_revision: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// SPIFFE id proven by mutual TLS.
    pub principal: Arc<str>,
    /// Its cluster.
    pub cluster: Arc<str>,
    /// Its region.
    pub region: Arc<str>,
    /// Its zone.
    pub zone: Arc<str>,
}

impl EncodeLabelSet for TrafficLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let Self { source, destination, .. } = self;
        let policy = if self.mutual_tls { "mutual_tls" } else { "unknown" };
        let all: [(&str, &str); 23] = [
            ("reporter", self.reporter),
            ("source_workload", &source.workload),
            ("source_canonical_service", &source.canonical_service),
            ("source_canonical_revision", &source.canonical_revision),
            ("source_workload_namespace", &source.namespace),
            ("source_principal", &source.principal),
            ("source_app", &source.canonical_service),
            ("source_version", &source.canonical_revision),
            ("source_cluster", &source.cluster),
            ("destination_service", &self.destination_service),
            ("destination_service_namespace", &self.destination_service_namespace),
            ("destination_service_name", &self.destination_service_name),
            ("destination_workload", &destination.workload),
            ("destination_canonical_service", &destination.canonical_service),
            ("destination_canonical_revision", &destination.canonical_revision),
            ("destination_workload_namespace", &destination.namespace),
            ("destination_principal", &destination.principal),
            ("destination_app", &destination.canonical_service),
            ("destination_version", &destination.canonical_revision),
            ("destination_cluster", &destination.cluster),
            ("request_protocol", "tcp"),
            ("response_flags", self.response_flags),
            ("connection_security_policy", policy),
        ];
        for (key, value) in all {
            let value = if value.is_empty() { "unknown" } else { value };
            (key, value).encode(encoder.encode_label())?;
        }
        let localities = [
            ("source_region", &source.region),
            ("source_zone", &source.zone),
            ("destination_region", &destination.region),
            ("destination_zone", &destination.zone),
        ];
        for (key, value) in localities.into_iter().filter(|(_, value)| !value.is_empty()) {
            (key, &**value).encode(encoder.encode_label())?;
        }
        Ok(())
    }
}

/// The counters of one label set.
#[derive(Debug)]
pub struct Traffic {
    pub(super) labels: TrafficLabels,
    /// Connections opened.
    pub opened: U64Counter,
    /// Connections closed.
    pub closed: U64Counter,
    /// Bytes from the client: Istio's convention, at both reporters.
    pub received: U64Counter,
    /// Bytes to the client.
    pub sent: U64Counter,
    /// Connections open now, of the reporter.
    pub sockets_open: Gauge,
}
