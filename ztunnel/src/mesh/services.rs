//! A name and addresses that stand for several workloads.

use std::{collections::BTreeMap, fmt, net::IpAddr, str::FromStr, sync::Arc};

use serde::{Serialize, Serializer};

use super::Workload;
use crate::identity::Identity;

/// Service port → target port. A target port of 0 is a named port that each workload maps by itself.
pub type PortMap = BTreeMap<u16, u16>;

/// A service is known by namespace and hostname, written `namespace/hostname`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    pub namespace: Arc<str>,
    pub hostname: Arc<str>,
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

impl FromStr for ServiceKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, hostname)) if !namespace.is_empty() && !hostname.is_empty() => {
                Ok(Self { namespace: namespace.into(), hostname: hostname.into() })
            }
            _ => Err(format!("service {text:?} is not of the form namespace/hostname")),
        }
    }
}

impl Serialize for ServiceKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A Kubernetes service, or what a ServiceEntry defines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub hostname: Arc<str>,
    #[serde(serialize_with = "network_addresses")]
    pub vips: Vec<(Arc<str>, IpAddr)>,
    pub ports: PortMap,
    /// Identities that its endpoints may have besides their own.
    pub subject_alt_names: Vec<Identity>,
    pub ip_families: IpFamilies,
    /// Of several services with one hostname, the one to take by default.
    pub canonical: bool,
    /// Endpoints count even while they are unhealthy.
    pub allow_unhealthy: bool,
    /// Traffic to it has to pass a waypoint, which is not supported yet: it must fail, not go around.
    pub behind_waypoint: bool,
}

/// Which addresses of an endpoint may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum IpFamilies {
    #[default]
    Any,
    IPv4,
    IPv6,
}

impl IpFamilies {
    pub fn accept(self, ip: IpAddr) -> bool {
        match self {
            Self::Any => true,
            Self::IPv4 => ip.is_ipv4(),
            Self::IPv6 => ip.is_ipv6(),
        }
    }
}

impl Service {
    pub fn key(&self) -> ServiceKey {
        ServiceKey { namespace: Arc::clone(&self.namespace), hostname: Arc::clone(&self.hostname) }
    }
}

/// A workload as part of one service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub workload: Arc<Workload>,
    ports: PortMap,
}

impl Endpoint {
    pub(super) fn new(workload: &Arc<Workload>, service: &Service, own: &PortMap) -> Self {
        // Only ports of the service count. The workload's own mapping wins; one to 0 takes the service's.
        let ports = service.ports.iter().filter_map(|(&port, &target)| {
            let own = own.get(&port).copied().filter(|&own| own != 0);
            own.or((target != 0).then_some(target)).map(|target| (port, target))
        });
        Self { workload: Arc::clone(workload), ports: ports.collect() }
    }

    /// Where a port of the service is served. `None`: this endpoint does not serve it.
    pub fn target_port(&self, service_port: u16) -> Option<u16> {
        self.ports.get(&service_port).copied()
    }
}

fn network_addresses<S: Serializer>(vips: &[(Arc<str>, IpAddr)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(vips.iter().map(|(network, ip)| format!("{network}/{ip}")))
}
