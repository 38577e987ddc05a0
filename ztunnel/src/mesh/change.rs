//! What a control plane tells, as a difference.

use std::sync::Arc;

use super::{Policy, PolicyKey, Service, ServiceKey, Workload};

/// One resource that is new, or as it is now, or gone.
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
