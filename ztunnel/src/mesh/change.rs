//! What a control plane tells, as a difference.

use std::sync::Arc;

use super::{Policy, PolicyKey, Service, ServiceKey, Workload};

/// One resource that is new, or as it is now, or gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Workload(Workload),
    Service(Service),
    Policy(Policy),
    /// By uid.
    NoWorkload(Arc<str>),
    NoService(ServiceKey),
    NoPolicy(PolicyKey),
}
