//! `istio_dns_*`: DNS requests of the pods.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _},
    metrics::{MetricType, counter::Counter, histogram::Histogram},
    registry::Unit,
};

use super::{
    U64Counter,
    label_sets::{LabelSets, Labels, OVERFLOW},
};
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

impl Labels for DnsLabels {
    fn overflow(&self) -> Self {
        let name = || Arc::<str>::from(OVERFLOW);
        Self { source_canonical_service: name(), source_canonical_revision: name(), ..*self }
    }
}

/// The counters of one label set.
#[derive(Debug)]
pub(crate) struct DnsCounters {
    /// Requests of pods.
    pub requests: U64Counter,
    /// Requests forwarded to a resolver.
    pub upstream_requests: U64Counter,
    /// Forwarded requests without an answer.
    pub upstream_failures: U64Counter,
    /// Time until the resolver answered.
    pub upstream_duration: Histogram,
}

impl Default for DnsCounters {
    fn default() -> Self {
        Self {
            requests: Counter::default(),
            upstream_requests: Counter::default(),
            upstream_failures: Counter::default(),
            upstream_duration: Histogram::new([0.0005, 0.001, 0.01, 0.1, 1.0, 5.0]),
        }
    }
}

/// The DNS of all clients. There may be many over time, such as Jobs.
pub(crate) type DnsMetrics = LabelSets<DnsLabels, DnsCounters>;

type OfCounters = fn(&DnsCounters) -> &U64Counter;

impl Collector for DnsMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let counters: [(&str, &str, OfCounters); 3] = [
            ("requests", "The total number of DNS requests", |c| &c.requests),
            ("upstream_requests", "The total number of DNS requests forwarded upstream", |c| {
                &c.upstream_requests
            }),
            ("upstream_failures", "The total number of forwarded DNS requests that nobody answered", |c| {
                &c.upstream_failures
            }),
        ];
        let sets = self.all();
        for (name, help, counter) in counters {
            let name = format!("istio_dns_{name}");
            let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
            for set in sets.iter().filter(|set| counter(set).get() > 0) {
                counter(set).encode(family.encode_family(&set.labels)?)?;
            }
        }
        let (name, help) = ("istio_dns_upstream_request_duration", "How long forwarded DNS requests took");
        let unit = Some(&Unit::Seconds);
        let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Histogram)?;
        for set in sets.iter().filter(|set| set.upstream_requests.get() > 0) {
            set.upstream_duration.encode(family.encode_family(&set.labels)?)?;
        }
        Ok(())
    }
}
