//! Both ends of a connection, and what metrics show of them.

use std::{net::SocketAddr, sync::Arc, time::SystemTime};

use crate::{
    direction::Direction,
    identity::Identity,
    mesh::{Service, Store, Workload},
    metrics::{EndLabels, TrafficLabels, failures::FailedConnection},
    pod::ServedPod,
    reason::FailureReason,
};

/// A source of which only the node agent has told when its connection was opened.
#[derive(Clone, Debug)]
pub(crate) struct UntoldSource {
    pod: Arc<ServedPod>,
    store: Arc<Store>,
}

impl UntoldSource {
    pub(crate) fn new(pod: Arc<ServedPod>, store: Arc<Store>) -> Self {
        Self { pod, store }
    }

    /// What is told of it by now.
    fn told(&self) -> Option<Arc<Workload>> {
        self.pod.workload(&self.store.snapshot()).cloned()
    }
}

/// Both ends of a connection, as far as they are known.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionEnds {
    pub direction: Direction,
    pub source: SocketAddr,
    pub source_workload: Option<Arc<Workload>>,
    /// Set while `source_workload` lacks what only the control plane knows.
    pub untold_source: Option<UntoldSource>,
    /// Proven by mutual TLS; `None` for plaintext. So for `destination_identity`.
    pub source_identity: Option<Identity>,
    /// Whom we talk to: over HBONE the tunnel's port 15008.
    pub destination: SocketAddr,
    /// Over HBONE, the target behind the tunnel.
    pub hbone: Option<SocketAddr>,
    pub destination_workload: Option<Arc<Workload>>,
    pub destination_identity: Option<Identity>,
    pub destination_service: Option<Arc<Service>>,
}

impl ConnectionEnds {
    /// Only the addresses are known yet.
    pub(crate) fn new(direction: Direction, source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            direction,
            source,
            source_workload: None,
            untold_source: None,
            source_identity: None,
            destination,
            hbone: None,
            destination_workload: None,
            destination_identity: None,
            destination_service: None,
        }
    }

    /// Fills in what was told of the source meanwhile. Whether everything is known of it now.
    pub(super) fn learn_source(&mut self) -> bool {
        let Some(untold) = &self.untold_source else { return true };
        let Some(told) = untold.told() else { return false };
        (self.source_workload, self.untold_source) = (Some(told), None);
        true
    }

    /// As the list of the last failures has it.
    pub(super) fn failed(&self, error: &str, reason: FailureReason) -> FailedConnection {
        FailedConnection {
            at: SystemTime::now(),
            direction: self.direction.as_str(),
            reason,
            src: self.source,
            dst: self.hbone.unwrap_or(self.destination),
            error: error.to_owned(),
        }
    }

    /// The labels of its metrics.
    pub(super) fn labels(&self, response_flags: &'static str) -> TrafficLabels {
        let service = self.destination_service.as_deref();
        TrafficLabels {
            reporter: self.direction.reporter(),
            source: end_labels(self.source_workload.as_deref(), self.source_identity.as_ref()),
            destination: end_labels(self.destination_workload.as_deref(), self.destination_identity.as_ref()),
            destination_service: service.map(|service| Arc::clone(&service.hostname)).unwrap_or_default(),
            destination_service_namespace: service
                .map(|service| Arc::clone(&service.namespace))
                .unwrap_or_default(),
            destination_service_name: service.map(|service| Arc::clone(&service.name)).unwrap_or_default(),
            response_flags,
            mutual_tls: self.source_identity.is_some() || self.destination_identity.is_some(),
        }
    }
}

fn end_labels(workload: Option<&Workload>, identity: Option<&Identity>) -> EndLabels {
    let principal = identity.map(|identity| identity.to_string().into()).unwrap_or_default();
    let Some(workload) = workload else { return EndLabels { principal, ..EndLabels::default() } };
    EndLabels {
        workload: Arc::clone(&workload.workload_name),
        canonical_service: Arc::clone(&workload.canonical_name),
        canonical_revision: Arc::clone(&workload.canonical_revision),
        namespace: Arc::clone(&workload.namespace),
        principal,
        cluster: Arc::clone(&workload.cluster_id),
        region: Arc::clone(&workload.locality.region),
        zone: Arc::clone(&workload.locality.zone),
    }
}
