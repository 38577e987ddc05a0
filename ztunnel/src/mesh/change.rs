//! An update from a control plane, as a difference.

use std::sync::Arc;

use super::{Policy, PolicyKey, Service, ServiceKey, Workload};

/// One resource that was added, changed or removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MeshChange {
    PutWorkload(Workload),
    PutService(Service),
    PutPolicy(Policy),
    /// By uid.
    RemoveWorkload(Arc<str>),
    RemoveService(ServiceKey),
    RemovePolicy(PolicyKey),
}
