//! Counters of connections, and their labels.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabel, EncodeLabelSet, LabelSetEncoder},
    metrics::MetricType,
};

use super::{
    U64Counter,
    label_sets::{LabelSets, Labels, OVERFLOW},
};
use crate::mesh::Workload;

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

impl Labels for TrafficLabels {
    fn overflow(&self) -> Self {
        let name = || Arc::<str>::from(OVERFLOW);
        let end = EndLabels {
            workload: name(),
            canonical_service: name(),
            canonical_revision: name(),
            namespace: name(),
            principal: name(),
            cluster: name(),
            region: Arc::default(),
            zone: Arc::default(),
        };
        Self {
            source: end.clone(),
            destination: end,
            destination_service: name(),
            destination_service_namespace: name(),
            destination_service_name: name(),
            ..*self
        }
    }
}

/// The counters of one label set.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Connections opened.
    pub opened: U64Counter,
    /// Connections closed.
    pub closed: U64Counter,
    /// Connections that failed.
    pub failed: U64Counter,
    /// Bytes from the client: Istio's convention, at both reporters.
    pub received: U64Counter,
    /// Bytes to the client.
    pub sent: U64Counter,
}

/// The traffic of all label sets.
pub(super) type TrafficSets = LabelSets<TrafficLabels, Traffic>;

type OfTraffic = fn(&Traffic) -> &U64Counter;

impl Collector for TrafficSets {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let families: [(&str, &str, OfTraffic); 5] = [
            ("connections_opened", "The total number of TCP connections opened", |t| &t.opened),
            ("connections_closed", "The total number of TCP connections closed", |t| &t.closed),
            ("connections_failed", "The total number of TCP connections that failed (unstable)", |t| {
                &t.failed
            }),
            ("received_bytes", "The total number of bytes received from clients", |t| &t.received),
            ("sent_bytes", "The total number of bytes sent to clients", |t| &t.sent),
        ];
        let sets = self.all();
        for (name, help, counter) in families {
            let name = format!("istio_tcp_{name}");
            let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
            for set in &sets {
                // A set of connections that failed early was never opened, and most never fail.
                let counts = if name.ends_with("failed") { set.failed.get() } else { set.opened.get() };
                if counts > 0 {
                    let value = counter(set).get();
                    family.encode_family(&set.labels)?.encode_counter::<NoLabels, _, u64>(&value, None)?;
                }
            }
        }
        Ok(())
    }
}

/// Of a counter without an exemplar.
type NoLabels = [(&'static str, &'static str); 0];

/// The client and the host looked up.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OnDemandDnsLabels {
    source_workload: Arc<str>,
    source_canonical_service: Arc<str>,
    source_canonical_revision: Arc<str>,
    source_workload_namespace: Arc<str>,
    source_cluster: Arc<str>,
    hostname: Arc<str>,
}

impl OnDemandDnsLabels {
    pub(super) fn new(source: &Workload, hostname: &Arc<str>) -> Self {
        let or_unknown =
            |value: &Arc<str>| if value.is_empty() { "unknown".into() } else { Arc::clone(value) };
        Self {
            source_workload: or_unknown(&source.workload_name),
            source_canonical_service: or_unknown(&source.canonical_name),
            source_canonical_revision: or_unknown(&source.canonical_revision),
            source_workload_namespace: or_unknown(&source.namespace),
            source_cluster: or_unknown(&source.cluster_id),
            hostname: Arc::clone(hostname),
        }
    }
}

impl Labels for OnDemandDnsLabels {
    fn overflow(&self) -> Self {
        let name = || Arc::<str>::from(OVERFLOW);
        Self {
            source_workload: name(),
            source_canonical_service: name(),
            source_canonical_revision: name(),
            source_workload_namespace: name(),
            source_cluster: name(),
            hostname: name(),
        }
    }
}

/// Look-ups of all label sets.
pub(super) type OnDemandDns = LabelSets<OnDemandDnsLabels, U64Counter>;

impl Collector for OnDemandDns {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let help = "The total number of look-ups of workloads that have a host name alone (unstable)";
        let mut family = encoder.encode_descriptor("istio_on_demand_dns", help, None, MetricType::Counter)?;
        for set in self.all() {
            let value = set.get();
            family.encode_family(&set.labels)?.encode_counter::<NoLabels, _, u64>(&value, None)?;
        }
        Ok(())
    }
}
