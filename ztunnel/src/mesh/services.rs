//! Services: a name and addresses that stand for several workloads.

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

use super::{GatewayAddress, InvalidKey, gateways::WeightedWaypoint};
use crate::identity::Identity;

/// Service port → target port. Target port 0 is a named port, which each workload maps itself.
pub(crate) type PortMap = BTreeMap<u16, u16>;

/// The key of a service, written `namespace/hostname`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    /// Namespace. Never empty.
    pub namespace: Arc<str>,
    /// Host name. Never empty.
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
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, hostname)) if !namespace.is_empty() && !hostname.is_empty() => {
                Ok(Self { namespace: namespace.into(), hostname: hostname.into() })
            }
            _ => Err(InvalidKey::new("service", text, "namespace/hostname")),
        }
    }
}

impl Serialize for ServiceKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A Kubernetes service, or one that a ServiceEntry defines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// Name.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Host name, which may be a wildcard.
    pub hostname: Arc<str>,
    /// Its addresses, each with its network.
    #[serde(serialize_with = "network_addresses")]
    pub vips: Vec<(Arc<str>, IpAddr)>,
    /// Ranges of addresses that belong to the service. If several ranges contain an address, the
    /// narrowest wins.
    #[serde(serialize_with = "network_addresses", skip_serializing_if = "Vec::is_empty")]
    pub cidr_vips: Vec<(Arc<str>, IpNet)>,
    pub(crate) ports: PortMap,
    /// The protocols of its ports, where known.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub app_protocols: BTreeMap<u16, AppProtocol>,
    /// Identities that its endpoints may present besides their own.
    pub subject_alt_names: Vec<Identity>,
    pub(crate) ip_families: IpFamilies,
    /// Whether this is the default among several services with the same host name.
    pub canonical: bool,
    /// How an endpoint is chosen.
    #[serde(rename = "loadBalancer")]
    pub load_balancing: LoadBalancing,
    /// The waypoint that its traffic must go through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<GatewayAddress>,
    /// Several waypoints in place of that one. Those with weight 0 get no traffic.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// Who may resolve and reach it.
    pub visibility: Visibility,
}

/// How an endpoint is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancing {
    /// What an endpoint should share with the client, in order of importance.
    #[serde(rename = "routingPreferences")]
    pub preferences: Vec<LbScope>,
    /// How the preferences are applied.
    pub mode: LbMode,
    /// Which endpoints are eligible.
    pub health_policy: HealthPolicy,
}

/// A property that two workloads may share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum LbScope {
    /// In one region.
    Region,
    /// In one zone of it.
    Zone,
    /// In one part of the zone.
    Subzone,
    /// On one node.
    Node,
    /// In one cluster.
    Cluster,
    /// In one network.
    Network,
}

/// How the preferences are applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum LbMode {
    /// Not at all: all endpoints are equal.
    #[default]
    Standard,
    /// Only endpoints that meet all of them are used.
    Strict,
    /// Endpoints that meet more of them, counted from the first, are preferred.
    Failover,
    /// No endpoint is chosen; the destination is the dialled address.
    Passthrough,
}

/// Which endpoints are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum HealthPolicy {
    /// Healthy ones.
    #[default]
    OnlyHealthy,
    /// All.
    AllowAll,
}

/// From where the name and addresses of the service can be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum Visibility {
    /// All namespaces.
    #[default]
    Public,
    /// Its own namespace only.
    Namespace,
}

/// The protocol of a port above TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum AppProtocol {
    /// Not declared.
    #[default]
    Unknown,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
    /// gRPC.
    Grpc,
    /// Any protocol over TCP.
    Tcp,
    /// TLS.
    Tls,
}

/// Which addresses of an endpoint may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum IpFamilies {
    /// Both families.
    #[default]
    Any,
    /// IPv4 only.
    IPv4,
    /// IPv6 only.
    IPv6,
}

impl IpFamilies {
    /// Whether `ip` may be used.
    #[must_use]
    pub fn accept(self, ip: IpAddr) -> bool {
        match self {
            Self::Any => true,
            Self::IPv4 => ip.is_ipv4(),
            Self::IPv6 => ip.is_ipv6(),
        }
    }
}

impl Service {
    /// One of its addresses: preferably in `network`, then one of IPv4.
    pub(crate) fn vip_for(&self, network: &str) -> Option<IpAddr> {
        let far = |(of, ip): &&(Arc<str>, IpAddr)| (**of != *network, !ip.to_canonical().is_ipv4());
        self.vips.iter().min_by_key(far).map(|(_, ip)| ip.to_canonical())
    }

    /// Its key.
    #[must_use]
    pub fn key(&self) -> ServiceKey {
        ServiceKey { namespace: Arc::clone(&self.namespace), hostname: Arc::clone(&self.hostname) }
    }

    /// Whether unhealthy endpoints are used too.
    #[must_use]
    pub fn allows_unhealthy(&self) -> bool {
        self.load_balancing.health_policy == HealthPolicy::AllowAll
    }

    /// Whether workloads of `namespace` can see it.
    #[must_use]
    pub fn is_visible_from(&self, namespace: &str) -> bool {
        self.visibility == Visibility::Public || *self.namespace == *namespace
    }
}

/// Services with address ranges. There are few, so the index is rebuilt when one of them changes.
#[derive(Clone, Debug, Default)]
pub(super) struct Ranges {
    services: BTreeMap<ServiceKey, Arc<Service>>,
    by_network: HashMap<Arc<str>, ByLength>,
}

/// By prefix length. An address is looked up once per length, the longest first.
type ByLength = BTreeMap<Reverse<u8>, HashMap<IpNet, Arc<Service>>>;

impl Ranges {
    pub(super) fn put(&mut self, key: ServiceKey, service: Arc<Service>) {
        self.services.insert(key, service);
        self.index();
    }

    pub(super) fn remove(&mut self, key: &ServiceKey) {
        self.services.remove(key);
        self.index();
    }

    fn index(&mut self) {
        self.by_network.clear();
        for service in self.services.values() {
            for (network, range) in &service.cidr_vips {
                let by_length = self.by_network.entry(Arc::clone(network)).or_default();
                let of_length = by_length.entry(Reverse(range.prefix_len())).or_default();
                // If several services have the same range, the first one wins.
                of_length.entry(range.trunc()).or_insert_with(|| Arc::clone(service));
            }
        }
    }

    pub(super) fn find(&self, network: &str, ip: IpAddr) -> Option<&Arc<Service>> {
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
