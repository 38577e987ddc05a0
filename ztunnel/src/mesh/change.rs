//! An update from a control plane, as a difference.

use std::sync::Arc;

use super::{Policy, PolicyKey, Service, ServiceKey, Workload};

/// One resource that was added, changed or removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MeshChange {
    /// Adds or replaces a workload, by uid.
    PutWorkload(Workload),
    /// Adds or replaces a service.
    PutService(Service),
    /// Adds or replaces a policy.
    PutPolicy(Policy),
    /// Removes a workload, by uid.
    RemoveWorkload(Arc<str>),
    /// Removes a service.
    RemoveService(ServiceKey),
    /// Removes a policy.
    RemovePolicy(PolicyKey),
    /// Forgets all workloads and services: another word about all of them follows.
    ForgetAddresses,
    /// Forgets all policies, and also which ones were removed: another word about all of them
    /// follows.
    ForgetPolicies,
}
