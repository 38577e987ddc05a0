//! The document as it is written, and what is checked of each entry.

use std::{collections::BTreeMap, fmt::Display, net::IpAddr, str::FromStr};

use ipnet::IpNet;
use serde::{Deserialize, de::IgnoredAny};

use super::{Defaults, LocalFileError, invalid};
use crate::{
    identity::Identity,
    mesh::{
        Policy, PolicyKey, Protocol, Service, Workload,
        policies::{Action, Clause, Match, Rule, Scope, ServiceAccountMatch, StringMatch},
        services::{IpFamilies, PortMap},
        workloads::Locality,
    },
};

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Document {
    pub workloads: Vec<WorkloadEntry>,
    pub services: Vec<ServiceEntry>,
    pub policies: Vec<PolicyEntry>,
}

/// A workload as it is written.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct WorkloadEntry {
    name: String,
    namespace: String,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    service_account: String,
    #[serde(default)]
    trust_domain: String,
    #[serde(default)]
    workload_ips: Vec<IpAddr>,
    workload_ip: Option<IpAddr>,
    #[serde(default)]
    protocol: ProtocolEntry,
    #[serde(default)]
    network_mode: NetworkModeEntry,
    #[serde(default)]
    network: String,
    #[serde(default)]
    node: String,
    #[serde(default)]
    cluster_id: String,
    #[serde(default)]
    canonical_name: String,
    #[serde(default)]
    canonical_revision: String,
    #[serde(default)]
    workload_name: String,
    #[serde(default)]
    workload_type: String,
    #[serde(default)]
    locality: LocalityEntry,
    #[serde(default)]
    authorization_policies: Vec<String>,
    #[serde(default)]
    services: BTreeMap<String, PortMap>,
    #[serde(default)]
    status: StatusEntry,
    capacity: Option<u32>,
    waypoint: Option<IgnoredAny>,
    /// How to reach its network. Needed only from other networks, which is refused anyway.
    #[serde(rename = "networkGateway")]
    _network_gateway: Option<IgnoredAny>,
    /// It speaks HBONE by itself, which its peers need not know.
    #[serde(rename = "nativeTunnel")]
    _native_tunnel: Option<bool>,
    application_tunnel: Option<IgnoredAny>,
    #[serde(default)]
    hostname: String,
}

#[derive(Default, Deserialize)]
enum ProtocolEntry {
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    #[serde(rename = "HBONE")]
    Hbone,
}

#[derive(Default, Deserialize)]
enum NetworkModeEntry {
    #[default]
    Standard,
    HostNetwork,
}

#[derive(Default, Deserialize)]
enum StatusEntry {
    #[default]
    Healthy,
    Unhealthy,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct LocalityEntry {
    region: String,
    zone: String,
    subzone: String,
}

impl WorkloadEntry {
    pub fn check(self, defaults: &Defaults) -> Result<Workload, LocalFileError> {
        let object = format!("workload {}/{}", self.namespace, self.name);
        if self.name.is_empty() || self.namespace.is_empty() {
            return Err(invalid(object, "name, namespace", "may not be empty"));
        }
        if self.application_tunnel.is_some() {
            return Err(invalid(object, "applicationTunnel", "is not supported"));
        }
        if !self.hostname.is_empty() && self.workload_ips.is_empty() && self.workload_ip.is_none() {
            return Err(invalid(object, "hostname", "a workload without addresses is not supported"));
        }
        let uid = or(self.uid, || format!("{}/{}", self.namespace, self.name));
        let service_account = or(self.service_account, || "default".to_owned());
        let trust_domain = or(self.trust_domain, || defaults.trust_domain.to_string());
        let workload = Workload {
            services: keys(&object, "services", self.services)?,
            policies: self
                .authorization_policies
                .iter()
                .map(|key| key.parse().map_err(|reason| invalid(&object, "authorizationPolicies", reason)))
                .collect::<Result<_, _>>()?,
            uid: uid.into(),
            service_account: service_account.into(),
            trust_domain: trust_domain.into(),
            addresses: self.workload_ips.into_iter().chain(self.workload_ip).collect(),
            protocol: match self.protocol {
                ProtocolEntry::Tcp => Protocol::Tcp,
                ProtocolEntry::Hbone => Protocol::Hbone,
            },
            host_network: matches!(self.network_mode, NetworkModeEntry::HostNetwork),
            network: self.network.into(),
            node: self.node.into(),
            cluster_id: or(self.cluster_id, || defaults.cluster_id.to_string()).into(),
            canonical_name: self.canonical_name.into(),
            canonical_revision: self.canonical_revision.into(),
            workload_name: or(self.workload_name, || self.name.clone()).into(),
            workload_type: self.workload_type.to_lowercase().into(),
            locality: Locality {
                region: self.locality.region.into(),
                zone: self.locality.zone.into(),
                subzone: self.locality.subzone.into(),
            },
            healthy: matches!(self.status, StatusEntry::Healthy),
            capacity: self.capacity.unwrap_or(1),
            behind_waypoint: self.waypoint.is_some(),
            name: self.name.into(),
            namespace: self.namespace.into(),
        };
        let identity = workload.identity().to_string();
        if identity.parse::<Identity>().is_err() {
            let reason = format!("{identity} is no valid identity");
            return Err(invalid(object, "trustDomain, namespace, serviceAccount", reason));
        }
        Ok(workload)
    }
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
    waypoint: Option<IgnoredAny>,
    load_balancer: Option<LoadBalancerEntry>,
    ip_families: Option<IpFamiliesEntry>,
    #[serde(default)]
    canonical: bool,
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

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LoadBalancerEntry {
    #[serde(default)]
    routing_preferences: Vec<String>,
    #[serde(default)]
    mode: ModeEntry,
    #[serde(default)]
    health_policy: HealthPolicyEntry,
}

#[derive(Clone, Copy, Default, Deserialize, PartialEq, Eq)]
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

impl ServiceEntry {
    pub fn check(self) -> Result<Service, LocalFileError> {
        let object = format!("service {}/{}", self.namespace, self.hostname);
        if self.hostname.is_empty() || self.namespace.is_empty() {
            return Err(invalid(object, "hostname, namespace", "may not be empty"));
        }
        if self.ports.contains_key(&0) {
            return Err(invalid(object, "ports", "port 0 cannot be dialled"));
        }
        if let Some(balancer) = &self.load_balancer
            // Preferences without `Strict` or `Failover` mean nothing.
            && (balancer.mode != ModeEntry::Standard || !balancer.routing_preferences.is_empty())
        {
            return Err(invalid(
                object,
                "loadBalancer",
                "only mode Standard without preferences is supported",
            ));
        }
        let vip = |text: &String| -> Result<_, String> {
            let (network, ip) =
                text.rsplit_once('/').ok_or("is not of the form network/address".to_owned())?;
            let ip = ip.parse::<IpAddr>().map_err(|error| format!("{ip:?}: {error}"))?;
            Ok((network.into(), ip))
        };
        let all = |texts: &[String], key| -> Result<Vec<_>, LocalFileError> {
            texts.iter().map(|text| from_text(&object, key, text)).collect()
        };
        Ok(Service {
            vips: self
                .vips
                .iter()
                .map(|text| {
                    vip(text).map_err(|reason| invalid(&object, "vips", format!("{text:?}: {reason}")))
                })
                .collect::<Result<_, _>>()?,
            subject_alt_names: all(&self.subject_alt_names, "subjectAltNames")?,
            ip_families: match self.ip_families {
                None | Some(IpFamiliesEntry::Dual) => IpFamilies::Any,
                Some(IpFamiliesEntry::IPv4) => IpFamilies::IPv4,
                Some(IpFamiliesEntry::IPv6) => IpFamilies::IPv6,
            },
            canonical: self.canonical,
            allow_unhealthy: matches!(
                self.load_balancer.map(|balancer| balancer.health_policy),
                Some(HealthPolicyEntry::AllowAll)
            ),
            behind_waypoint: self.waypoint.is_some(),
            ports: self.ports,
            name: self.name.into(),
            namespace: self.namespace.into(),
            hostname: self.hostname.into(),
        })
    }
}

/// A policy as it is written.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct PolicyEntry {
    name: String,
    namespace: String,
    scope: ScopeEntry,
    action: ActionEntry,
    #[serde(default)]
    rules: Vec<Vec<Vec<MatchEntry>>>,
    #[serde(default)]
    dry_run: bool,
}

#[derive(Deserialize)]
enum ScopeEntry {
    Global,
    Namespace,
    WorkloadSelector,
}

#[derive(Deserialize)]
enum ActionEntry {
    Allow,
    Deny,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct MatchEntry {
    namespaces: Vec<StringEntry>,
    not_namespaces: Vec<StringEntry>,
    principals: Vec<StringEntry>,
    not_principals: Vec<StringEntry>,
    service_accounts: Vec<ServiceAccountEntry>,
    not_service_accounts: Vec<ServiceAccountEntry>,
    source_ips: Vec<String>,
    not_source_ips: Vec<String>,
    destination_ips: Vec<String>,
    not_destination_ips: Vec<String>,
    destination_ports: Vec<u16>,
    not_destination_ports: Vec<u16>,
}

/// `{Exact: text}` and its like; a bare text is exact.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text, or one of Exact, Prefix, Suffix and Presence")]
enum StringEntry {
    Exact(String),
    Tagged(TaggedStringEntry),
}

#[derive(Deserialize)]
enum TaggedStringEntry {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Presence(IgnoredAny),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ServiceAccountEntry {
    namespace: String,
    service_account: String,
}

impl PolicyEntry {
    pub fn check(self) -> Result<Policy, LocalFileError> {
        let object = format!("policy {}/{}", self.namespace, self.name);
        if self.name.is_empty() {
            return Err(invalid(object, "name", "may not be empty"));
        }
        let clause = |matches: Vec<MatchEntry>| {
            matches.into_iter().map(|one| one.check(&object)).collect::<Result<_, _>>().map(Clause)
        };
        let rule = |clauses: Vec<_>| clauses.into_iter().map(clause).collect::<Result<_, _>>().map(Rule);
        Ok(Policy {
            rules: self.rules.into_iter().map(rule).collect::<Result<_, LocalFileError>>()?,
            scope: match self.scope {
                ScopeEntry::Global => Scope::Global,
                ScopeEntry::Namespace => Scope::Namespace,
                ScopeEntry::WorkloadSelector => Scope::WorkloadSelector,
            },
            action: match self.action {
                ActionEntry::Allow => Action::Allow,
                ActionEntry::Deny => Action::Deny,
            },
            dry_run: self.dry_run,
            key: PolicyKey { namespace: self.namespace.into(), name: self.name.into() },
        })
    }
}

impl MatchEntry {
    fn check(self, object: &str) -> Result<Match, LocalFileError> {
        let nets = |texts: Vec<String>, key| -> Result<Vec<_>, _> {
            texts.iter().map(|text| net(object, key, text)).collect()
        };
        let strings = |entries: Vec<StringEntry>| entries.into_iter().map(StringMatch::from).collect();
        let accounts = |entries: Vec<ServiceAccountEntry>| {
            let account = |entry: ServiceAccountEntry| ServiceAccountMatch {
                namespace: entry.namespace,
                service_account: entry.service_account,
            };
            entries.into_iter().map(account).collect()
        };
        Ok(Match {
            namespaces: strings(self.namespaces),
            not_namespaces: strings(self.not_namespaces),
            principals: strings(self.principals),
            not_principals: strings(self.not_principals),
            service_accounts: accounts(self.service_accounts),
            not_service_accounts: accounts(self.not_service_accounts),
            source_ips: nets(self.source_ips, "sourceIps")?,
            not_source_ips: nets(self.not_source_ips, "notSourceIps")?,
            destination_ips: nets(self.destination_ips, "destinationIps")?,
            not_destination_ips: nets(self.not_destination_ips, "notDestinationIps")?,
            destination_ports: self.destination_ports,
            not_destination_ports: self.not_destination_ports,
        })
    }
}

impl From<StringEntry> for StringMatch {
    fn from(entry: StringEntry) -> Self {
        match entry {
            StringEntry::Exact(text) | StringEntry::Tagged(TaggedStringEntry::Exact(text)) => {
                Self::Exact(text)
            }
            StringEntry::Tagged(TaggedStringEntry::Prefix(text)) => Self::Prefix(text),
            StringEntry::Tagged(TaggedStringEntry::Suffix(text)) => Self::Suffix(text),
            StringEntry::Tagged(TaggedStringEntry::Presence(IgnoredAny)) => Self::Presence,
        }
    }
}

/// A CIDR, or one address.
fn net(object: &str, key: &'static str, text: &str) -> Result<IpNet, LocalFileError> {
    match text.parse::<IpAddr>() {
        Ok(ip) => Ok(ip.into()),
        Err(_) => from_text(object, key, text),
    }
}

fn from_text<T: FromStr<Err: Display>>(
    object: &str,
    key: &'static str,
    text: &str,
) -> Result<T, LocalFileError> {
    text.parse().map_err(|error| invalid(object, key, format!("{text:?}: {error}")))
}

fn keys<K: FromStr<Err: Display> + Ord, V>(
    object: &str,
    key: &'static str,
    map: BTreeMap<String, V>,
) -> Result<BTreeMap<K, V>, LocalFileError> {
    map.into_iter().map(|(name, value)| Ok((from_text(object, key, &name)?, value))).collect()
}

fn or(text: String, default: impl FnOnce() -> String) -> String {
    if text.is_empty() { default() } else { text }
}
