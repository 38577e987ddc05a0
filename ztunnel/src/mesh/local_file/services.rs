//! Services and gateways as written, and the checks on each.

use std::{collections::BTreeMap, fmt::Display, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use serde::{Deserialize, de::IgnoredAny};

use super::{LocalFileError, check::from_text, invalid};
use crate::mesh::{
    GatewayAddress, GatewayDestination, Service, ServiceKey,
    gateways::WeightedWaypoint,
    services::{AppProtocol, HealthPolicy, IpFamilies, LbMode, LbScope, LoadBalancing, PortMap, Visibility},
};

/// A gateway as written: the destination is `network/address`, `namespace/hostname`, or a
/// structure.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct GatewayEntry {
    destination: DestinationEntry,
    #[serde(default = "hbone_port")]
    hbone_mtls_port: u16,
}

fn hbone_port() -> u16 {
    15008
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected network/address, namespace/hostname, {address, network} or {namespace, hostname}"
)]
enum DestinationEntry {
    Text(String),
    Address(AddressEntry),
    Hostname(HostnameEntry),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AddressEntry {
    #[serde(default)]
    network: String,
    address: IpAddr,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HostnameEntry {
    namespace: String,
    hostname: String,
}

impl GatewayEntry {
    pub(super) fn check(self, object: &str, key: &'static str) -> Result<GatewayAddress, LocalFileError> {
        if self.hbone_mtls_port == 0 {
            return Err(invalid(object, key, "hboneMtlsPort may not be 0"));
        }
        let destination = match self.destination {
            DestinationEntry::Text(text) => from_text(object, key, &text)?,
            DestinationEntry::Address(entry) => {
                GatewayDestination::Address(entry.network.into(), entry.address.to_canonical())
            }
            DestinationEntry::Hostname(entry) => GatewayDestination::Hostname(ServiceKey {
                namespace: entry.namespace.into(),
                hostname: entry.hostname.into(),
            }),
        };
        Ok(GatewayAddress { destination, hbone_mtls_port: self.hbone_mtls_port })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WeightedWaypointEntry {
    destination: GatewayEntry,
    weight: u32,
}

enum Vip {
    One(IpAddr),
    Range(IpNet),
}

/// `network/address` or `network/address/length`.
fn vip(text: &str) -> Result<(Arc<str>, Vip), String> {
    let (network, rest) = text.split_once('/').ok_or("is not of the form network/address")?;
    let vip = if rest.contains('/') {
        Vip::Range(rest.parse::<IpNet>().map_err(|error| format!("{rest:?}: {error}"))?.trunc())
    } else {
        Vip::One(rest.parse().map_err(|error| format!("{rest:?}: {error}"))?)
    };
    Ok((network.into(), vip))
}

/// A service as it is written.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ServiceEntry {
    name: String,
    namespace: String,
    hostname: String,
    #[serde(default)]
    vips: Vec<String>,
    #[serde(default)]
    ports: PortMap,
    #[serde(default)]
    subject_alt_names: Vec<String>,
    waypoint: Option<GatewayEntry>,
    #[serde(default)]
    weighted_waypoints: Vec<WeightedWaypointEntry>,
    #[serde(default)]
    load_balancer: LoadBalancerEntry,
    ip_families: Option<IpFamiliesEntry>,
    #[serde(default)]
    canonical: bool,
    #[serde(default)]
    visibility: VisibilityEntry,
    #[serde(default)]
    app_protocols: BTreeMap<u16, AppProtocolEntry>,
    /// Follows from the workloads' `services`; dumps of Istio's tunnel show it.
    #[serde(rename = "endpoints")]
    _endpoints: Option<IgnoredAny>,
}

#[derive(Deserialize)]
enum IpFamiliesEntry {
    Dual,
    IPv4,
    IPv6,
}

#[derive(Default, Deserialize)]
enum VisibilityEntry {
    #[default]
    Public,
    Namespace,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum AppProtocolEntry {
    Unknown,
    Http11,
    Http2,
    Grpc,
    Tcp,
    Tls,
}

impl From<AppProtocolEntry> for AppProtocol {
    fn from(entry: AppProtocolEntry) -> Self {
        match entry {
            AppProtocolEntry::Unknown => Self::Unknown,
            AppProtocolEntry::Http11 => Self::Http11,
            AppProtocolEntry::Http2 => Self::Http2,
            AppProtocolEntry::Grpc => Self::Grpc,
            AppProtocolEntry::Tcp => Self::Tcp,
            AppProtocolEntry::Tls => Self::Tls,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct LoadBalancerEntry {
    routing_preferences: Vec<ScopeEntry>,
    mode: ModeEntry,
    health_policy: HealthPolicyEntry,
}

#[derive(Clone, Copy, Deserialize)]
enum ScopeEntry {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

#[derive(Clone, Copy, Default, Deserialize)]
enum ModeEntry {
    #[default]
    Standard,
    Strict,
    Failover,
    Passthrough,
}

#[derive(Default, Deserialize)]
enum HealthPolicyEntry {
    #[default]
    OnlyHealthy,
    AllowAll,
}

impl From<LoadBalancerEntry> for LoadBalancing {
    fn from(entry: LoadBalancerEntry) -> Self {
        let scope = |entry: &ScopeEntry| match entry {
            ScopeEntry::Region => LbScope::Region,
            ScopeEntry::Zone => LbScope::Zone,
            ScopeEntry::Subzone => LbScope::Subzone,
            ScopeEntry::Node => LbScope::Node,
            ScopeEntry::Cluster => LbScope::Cluster,
            ScopeEntry::Network => LbScope::Network,
        };
        Self {
            preferences: entry.routing_preferences.iter().map(scope).collect(),
            mode: match entry.mode {
                ModeEntry::Standard => LbMode::Standard,
                ModeEntry::Strict => LbMode::Strict,
                ModeEntry::Failover => LbMode::Failover,
                ModeEntry::Passthrough => LbMode::Passthrough,
            },
            health_policy: match entry.health_policy {
                HealthPolicyEntry::OnlyHealthy => HealthPolicy::OnlyHealthy,
                HealthPolicyEntry::AllowAll => HealthPolicy::AllowAll,
            },
        }
    }
}

impl ServiceEntry {
    pub(super) fn check(self) -> Result<Service, LocalFileError> {
        let object = format!("service {}/{}", self.namespace, self.hostname);
        if self.hostname.is_empty() || self.namespace.is_empty() {
            return Err(invalid(object, "hostname, namespace", "may not be empty"));
        }
        if self.ports.contains_key(&0) {
            return Err(invalid(object, "ports", "port 0 cannot be dialled"));
        }
        let (mut vips, mut cidr_vips) = (Vec::new(), Vec::new());
        for text in &self.vips {
            let refused = |reason: &dyn Display| invalid(&object, "vips", format!("{text:?}: {reason}"));
            match vip(text).map_err(|reason| refused(&reason))? {
                (network, Vip::One(ip)) => vips.push((network, ip)),
                (network, Vip::Range(net)) => cidr_vips.push((network, net)),
            }
        }
        let all = |texts: &[String], key| -> Result<Vec<_>, LocalFileError> {
            texts.iter().map(|text| from_text(&object, key, text)).collect()
        };
        Ok(Service {
            vips,
            cidr_vips,
            app_protocols: self.app_protocols.into_iter().map(|(port, entry)| (port, entry.into())).collect(),
            subject_alt_names: all(&self.subject_alt_names, "subjectAltNames")?,
            ip_families: match self.ip_families {
                None | Some(IpFamiliesEntry::Dual) => IpFamilies::Any,
                Some(IpFamiliesEntry::IPv4) => IpFamilies::IPv4,
                Some(IpFamiliesEntry::IPv6) => IpFamilies::IPv6,
            },
            canonical: self.canonical,
            load_balancing: self.load_balancer.into(),
            waypoint: self.waypoint.map(|entry| entry.check(&object, "waypoint")).transpose()?,
            weighted_waypoints: self
                .weighted_waypoints
                .into_iter()
                .map(|entry| {
                    let destination = entry.destination.check(&object, "weightedWaypoints")?;
                    Ok(WeightedWaypoint { destination, weight: entry.weight })
                })
                .collect::<Result<_, LocalFileError>>()?,
            visibility: match self.visibility {
                VisibilityEntry::Public => Visibility::Public,
                VisibilityEntry::Namespace => Visibility::Namespace,
            },
            ports: self.ports,
            name: self.name.into(),
            namespace: self.namespace.into(),
            hostname: self.hostname.into(),
        })
    }
}
