//! A name and addresses that stand for several workloads.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    fmt,
    net::IpAddr,
    str::FromStr,
    sync::Arc,
};

use ipnet::IpNet;
use serde::{Serialize, Serializer};

use super::{GatewayAddress, Workload, gateways::WeightedWaypoint};
use crate::identity::Identity;

/// Service port → target port. A target port of 0 is a named port that each workload maps by itself.
pub type PortMap = BTreeMap<u16, u16>;

/// A service is known by namespace and hostname, written `namespace/hostname`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    pub namespace: Arc<str>,
    pub hostname: Arc<str>,
}

impl ServiceKey {
    pub(super) fn parts(&self) -> (&str, &str) {
        (&self.namespace, &self.hostname)
    }
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
    /// Ranges of addresses that are all its own. Of several that hold an address the narrowest counts.
    #[serde(serialize_with = "network_addresses", skip_serializing_if = "Vec::is_empty")]
    pub cidr_vips: Vec<(Arc<str>, IpNet)>,
    pub ports: PortMap,
    /// What its ports speak, where that is known.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub app_protocols: BTreeMap<u16, AppProtocol>,
    /// Identities that its endpoints may have besides their own.
    pub subject_alt_names: Vec<Identity>,
    pub ip_families: IpFamilies,
    /// Of several services with one hostname, the one to take by default.
    pub canonical: bool,
    #[serde(rename = "loadBalancer")]
    pub load_balancing: LoadBalancing,
    /// What its traffic has to pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<GatewayAddress>,
    /// Several in place of that one; those with weight 0 get nothing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    pub visibility: Visibility,
}

/// How one of its endpoints is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancing {
    /// What an endpoint should have in common with the client, the most important first.
    #[serde(rename = "routingPreferences")]
    pub preferences: Vec<LbScope>,
    pub mode: LbMode,
    pub health_policy: HealthPolicy,
}

/// What two workloads may have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum LbScope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

/// What the preferences mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum LbMode {
    /// Nothing: every endpoint is as good as any other.
    #[default]
    Standard,
    /// Only endpoints that meet all of them count.
    Strict,
    /// Those that meet most of them, counted from the first, come first.
    Failover,
    /// No endpoint is chosen: the address that was dialled is the destination.
    Passthrough,
}

/// Which endpoints count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum HealthPolicy {
    #[default]
    OnlyHealthy,
    AllowAll,
}

/// Who may use its name and addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum Visibility {
    #[default]
    Public,
    /// Its own namespace only.
    Namespace,
}

/// What a port speaks above TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum AppProtocol {
    #[default]
    Unknown,
    Http11,
    Http2,
    Grpc,
    Tcp,
    Tls,
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

    /// Whether its endpoints count even while they are unhealthy.
    pub fn allows_unhealthy(&self) -> bool {
        self.load_balancing.health_policy == HealthPolicy::AllowAll
    }

    /// Whether workloads of `namespace` may know of it.
    pub fn is_visible_from(&self, namespace: &str) -> bool {
        self.visibility == Visibility::Public || *self.namespace == *namespace
    }
}

/// A workload as part of one service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub workload: Arc<Workload>,
    /// The target ports that are its own.
    pub(super) ports: Arc<PortMap>,
}

impl Endpoint {
    /// Where a port of the service, which is the one that it is an endpoint of, is served. `None`: not by this one.
    pub fn target_port(&self, service: &Service, port: u16) -> Option<u16> {
        // Only ports of the service count. The workload's own mapping wins; one to 0 takes the service's.
        let target = service.ports.get(&port).copied()?;
        let own = self.ports.get(&port).copied().filter(|&own| own != 0);
        own.or_else(|| (target != 0).then_some(target))
    }
}

/// The services that have whole ranges of addresses: few, so they are indexed anew when one of them changes.
#[derive(Clone, Debug, Default)]
pub(super) struct Ranges {
    services: BTreeMap<ServiceKey, Arc<Service>>,
    by_network: HashMap<Arc<str>, ByLength>,
}

/// By the ranges' lengths: an address is looked up once for each length that there is, the longest first.
type ByLength = BTreeMap<Reverse<u8>, HashMap<IpNet, Arc<Service>>>;

impl Ranges {
    pub fn put(&mut self, key: ServiceKey, service: Arc<Service>) {
        self.services.insert(key, service);
        self.index();
    }

    pub fn remove(&mut self, key: &ServiceKey) {
        self.services.remove(key);
        self.index();
    }

    fn index(&mut self) {
        self.by_network.clear();
        for service in self.services.values() {
            for (network, range) in &service.cidr_vips {
                let by_length = self.by_network.entry(Arc::clone(network)).or_default();
                let of_length = by_length.entry(Reverse(range.prefix_len())).or_default();
                // Of several with one range the first has it.
                of_length.entry(range.trunc()).or_insert_with(|| Arc::clone(service));
            }
        }
    }

    pub fn find(&self, network: &str, ip: IpAddr) -> Option<&Arc<Service>> {
        self.by_network.get(network)?.iter().find_map(|(Reverse(length), ranges)| {
            // A length that the address' family does not have is the other one's.
            ranges.get(&IpNet::new(ip, *length).ok()?.trunc())
        })
    }
}

fn network_addresses<T: fmt::Display, S: Serializer>(
    vips: &[(Arc<str>, T)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(vips.iter().map(|(network, address)| format!("{network}/{address}")))
}
