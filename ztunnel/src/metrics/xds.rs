//! `istio_xds_*`: streams and messages of the control plane, with Istio's names; `ztunnel_xds_*`:
//! ours.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};

use super::U64Counter;

/// The families, shared with the registry.
#[derive(Clone, Debug, Default)]
pub(crate) struct XdsMetrics {
    terminations: Family<ReasonLabels, U64Counter>,
    messages: Family<UrlLabels, U64Counter>,
    bytes: Family<UrlLabels, U64Counter>,
    refused: Family<UrlLabels, Gauge>,
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Termination {
    /// It could not be opened.
    ConnectionError,
    /// The control plane ended it with an error.
    Error,
    /// The connection was lost.
    Reconnect,
    /// The control plane closed it.
    Complete,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: Termination,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UrlLabels {
    url: String,
}

impl XdsMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        let xds = registry.sub_registry_with_prefix("istio_xds");
        let help = "The total number of ended streams from the control plane (unstable)";
        xds.register("connection_terminations", help, self.terminations.clone());
        let help = "The total number of messages received from the control plane (unstable)";
        xds.register("message", help, self.messages.clone());
        let help = "The total number of bytes received from the control plane (unstable)";
        xds.register("message_bytes", help, self.bytes.clone());
        let help = "Resources whose last version was refused";
        registry.register("ztunnel_xds_refused_resources", help, self.refused.clone());
    }

    /// Counts a stream that ended.
    pub(crate) fn terminated(&self, reason: Termination) {
        self.terminations.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// How many resources of type `url` are refused as the control plane sent them last.
    pub(crate) fn refused(&self, url: &str, count: usize) {
        let labels = UrlLabels { url: url.to_owned() };
        self.refused.get_or_create(&labels).set(count.try_into().unwrap_or(i64::MAX));
    }

    /// Counts a message of resource type `url`.
    pub(crate) fn received(&self, url: &str, bytes: usize) {
        let labels = UrlLabels { url: url.to_owned() };
        self.messages.get_or_create(&labels).inc();
        self.bytes.get_or_create(&labels).inc_by(bytes as u64);
    }
}
