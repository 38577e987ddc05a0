//! `istio_dns_*`: DNS requests of the pods.

use std::sync::Arc;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, histogram::Histogram},
    registry::{Registry, Unit},
};

use super::U64Counter;
use crate::mesh::Workload;

/// Query type, protocol and client.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct DnsLabels {
    request_query_type: &'static str,
    request_protocol: &'static str,
    source_canonical_service: Arc<str>,
    source_canonical_revision: Arc<str>,
}

impl DnsLabels {
    /// `protocol`: `udp` or `tcp`. Unknown parts of `source` are `unknown`.
    pub(crate) fn new(query_type: &'static str, protocol: &'static str, source: Option<&Workload>) -> Self {
        let or_unknown = |value: Option<&Arc<str>>| match value {
            Some(value) if !value.is_empty() => Arc::clone(value),
            _ => "unknown".into(),
        };
        Self {
            request_query_type: query_type,
            request_protocol: protocol,
            source_canonical_service: or_unknown(source.map(|source| &source.canonical_name)),
            source_canonical_revision: or_unknown(source.map(|source| &source.canonical_revision)),
        }
    }
}

/// The families, shared with the registry.
#[derive(Clone, Debug)]
pub(crate) struct DnsMetrics {
    /// Requests of pods.
    pub requests: Family<DnsLabels, U64Counter>,
    /// Requests forwarded to a resolver.
    pub upstream_requests: Family<DnsLabels, U64Counter>,
    /// Forwarded requests without an answer.
    pub upstream_failures: Family<DnsLabels, U64Counter>,
    /// Time until the resolver answered.
    pub upstream_duration: Family<DnsLabels, Histogram, fn() -> Histogram>,
}

impl Default for DnsMetrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            upstream_requests: Family::default(),
            upstream_failures: Family::default(),
            upstream_duration: Family::new_with_constructor(|| {
                Histogram::new([0.0005, 0.001, 0.01, 0.1, 1.0, 5.0])
            }),
        }
    }
}

impl DnsMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("istio_dns");
        let Self { requests, upstream_requests, upstream_failures, upstream_duration } = self.clone();
        registry.register("requests", "The total number of DNS requests", requests);
        let help = "The total number of DNS requests forwarded upstream";
        registry.register("upstream_requests", help, upstream_requests);
        let help = "The total number of forwarded DNS requests that nobody answered";
        registry.register("upstream_failures", help, upstream_failures);
        let help = "How long forwarded DNS requests took";
        registry.register_with_unit("upstream_request_duration", help, Unit::Seconds, upstream_duration);
    }
}
