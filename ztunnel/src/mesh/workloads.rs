//! A workload: one pod as its peers know it.

use std::{collections::BTreeMap, net::IpAddr, num::NonZeroU16, ops::Deref, sync::Arc};

use serde::{Serialize, Serializer};

use super::{GatewayAddress, PolicyKey, ServiceKey, services::PortMap};
use crate::identity::Identity;

/// A pod (or machine) that has an identity.
///
/// A mesh may have 100,000 workloads, and the pods of a deployment differ in little: see
/// [`Common`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// Unique id, such as `Kubernetes//Pod/demo/web-1`.
    pub uid: Arc<str>,
    /// Name of the pod.
    pub name: Arc<str>,
    /// Its node.
    pub node: Arc<str>,
    /// Its addresses in its network.
    #[serde(rename = "workloadIps")]
    pub addresses: Box<[IpAddr]>,
    /// Its weight among the endpoints of a service.
    pub capacity: u32,
    /// Whether it is ready.
    #[serde(rename = "status", serialize_with = "status")]
    pub healthy: bool,
    /// What it shares with similar workloads.
    #[serde(flatten)]
    pub common: Arc<Common>,
}

/// In Istio's words.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn status<S: Serializer>(healthy: &bool, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(if *healthy { "Healthy" } else { "Unhealthy" })
}

/// The part that similar workloads share. It is stored once for all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Common {
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// With namespace and trust domain, its identity.
    pub service_account: Arc<str>,
    pub(crate) trust_domain: Arc<str>,
    /// Where its addresses can be reached directly.
    pub network: Arc<str>,
    pub(crate) cluster_id: Arc<str>,
    pub(crate) protocol: Protocol,
    pub(crate) canonical_name: Arc<str>,
    pub(crate) canonical_revision: Arc<str>,
    /// Name of the object that manages the pod, such as its deployment.
    pub workload_name: Arc<str>,
    /// `deployment`, `cronjob`, `job` or `pod`.
    pub workload_type: Arc<str>,
    pub(crate) locality: Locality,
    /// The services of which it is an endpoint, with target ports that differ from the service's.
    pub services: BTreeMap<ServiceKey, Arc<PortMap>>,
    /// Policies that select it by name.
    #[serde(rename = "authorizationPolicies")]
    pub policies: Vec<PolicyKey>,
    pub(crate) host_network: bool,
    /// It speaks HBONE itself, without a tunnel on its node.
    pub native_tunnel: bool,
    /// The waypoint for traffic to its addresses. Traffic to a service uses that service's
    /// waypoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<GatewayAddress>,
    /// The gateway into its network, for workloads of other networks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_gateway: Option<GatewayAddress>,
    /// Its host name, for a workload without addresses. It is resolved when a connection needs it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<Arc<str>>,
    /// How the application receives connections that are addressed to others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub application_tunnel: Option<ApplicationTunnel>,
}

/// Fields of the shared part read like the workload's own.
impl Deref for Workload {
    type Target = Common;

    fn deref(&self) -> &Common {
        &self.common
    }
}

/// Changes the shared part for this workload alone. Workloads from a control plane do not change
/// after decoding.
#[cfg(test)]
impl std::ops::DerefMut for Workload {
    fn deref_mut(&mut self) -> &mut Common {
        Arc::make_mut(&mut self.common)
    }
}

/// How an application that is a waypoint receives connections for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct ApplicationTunnel {
    pub(crate) protocol: ApplicationProtocol,
    /// The port to dial in place of the addressed one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<NonZeroU16>,
}

/// The protocol in front of the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum ApplicationProtocol {
    /// None.
    #[default]
    #[serde(rename = "NONE")]
    None,
    /// PROXY protocol, version 2.
    #[serde(rename = "PROXY")]
    Proxy,
}

/// How a workload is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum Protocol {
    /// Plain TCP: not enrolled.
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    /// HBONE: enrolled.
    #[serde(rename = "HBONE")]
    Hbone,
}

/// Where the workload runs. Empty parts are unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Locality {
    /// Region.
    pub region: Arc<str>,
    /// Zone.
    pub zone: Arc<str>,
    /// Subzone.
    pub subzone: Arc<str>,
}

impl Workload {
    /// Whether it is a pod, and not what an entry of the control plane's says.
    pub(crate) fn is_pod(&self) -> bool {
        self.uid.contains("//Pod/")
    }

    /// Its SPIFFE id.
    #[must_use]
    pub fn identity(&self) -> Identity {
        Identity {
            trust_domain: Arc::clone(&self.trust_domain),
            namespace: Arc::clone(&self.namespace),
            service_account: Arc::clone(&self.service_account),
        }
    }

    /// One of its addresses, preferably of the same family as `like`.
    #[must_use]
    pub fn address_like(&self, like: IpAddr) -> Option<IpAddr> {
        let same_family = |ip: &&IpAddr| ip.is_ipv4() == like.to_canonical().is_ipv4();
        self.addresses.iter().find(same_family).or_else(|| self.addresses.first()).copied()
    }
}
