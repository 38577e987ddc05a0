//! Revoked peers, with Istio's names.

use prometheus_client::{encoding::EncodeLabelSet, metrics::family::Family, registry::Registry};

use super::U64Counter;
use crate::direction::Direction;

/// Counters of revoked peers, and of peers that no list can name.
#[derive(Clone, Debug, Default)]
pub struct CrlMetrics {
    rejections: Family<ReporterLabels, U64Counter>,
    untracked: Family<ReporterLabels, U64Counter>,
}

/// The end of the connection that counts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReporterLabels {
    reporter: &'static str,
}

impl CrlMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        let crl = registry.sub_registry_with_prefix("istio_crl");
        let help =
            "The total number of peers refused or cut since a certificate of theirs is revoked (unstable)";
        crl.register("policy_rejections", help, self.rejections.clone());
        let help = "The total number of peers whose certificates could not be distinguished by issuer and serial number, so \
                    that no list could name them (unstable)";
        crl.register("untracked_connections", help, self.untracked.clone());
    }

    /// Counts a peer that was refused or disconnected.
    pub(crate) fn rejected(&self, direction: Direction) {
        self.rejections.get_or_create(&labels(direction)).inc();
    }

    /// Counts a connection whose peer no list can name.
    pub(crate) fn untracked(&self, direction: Direction) {
        self.untracked.get_or_create(&labels(direction)).inc();
    }
}

fn labels(direction: Direction) -> ReporterLabels {
    ReporterLabels { reporter: direction.reporter() }
}
