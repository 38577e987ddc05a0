//! Counters of connections, and their labels.

use std::{fmt, sync::Arc};

use prometheus_client::{
    encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder},
    metrics::gauge::Gauge,
};

use super::U64Counter;

/// Istio's traffic labels. Empty values show as `unknown`, except the localities, which are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct TrafficLabels {
    pub reporter: &'static str,
    pub source: EndLabels,
    pub destination: EndLabels,
    pub destination_service: Arc<str>,
    pub destination_service_namespace: Arc<str>,
    pub destination_service_name: Arc<str>,
    pub response_flags: &'static str,
    pub mutual_tls: bool,
}

/// Labels of one end of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct EndLabels {
    pub workload: Arc<str>,
    pub canonical_service: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub namespace: Arc<str>,
    pub principal: Arc<str>,
    pub cluster: Arc<str>,
    pub region: Arc<str>,
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
    pub opened: U64Counter,
    pub closed: U64Counter,
    /// Bytes from the client: Istio's convention, at both reporters.
    pub received: U64Counter,
    /// Bytes to the client.
    pub sent: U64Counter,
    pub sockets_open: Gauge,
}
