//! Protobuf resource → mesh type. Each resource is validated as a whole, and refused with the field
//! and the reason.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU16,
    sync::Arc,
};

use ipnet::IpNet;
use prost::Message as _;
use ztunnel_api::{
    discovery::Resource,
    security,
    workload::{self as proto, load_balancing},
};

use super::ResourceDecoder;
use crate::{
    identity::Identity,
    mesh::{
        GatewayAddress, GatewayDestination, InvalidKey, Policy, PolicyKey, Protocol, Service, ServiceKey,
        Workload,
        gateways::WeightedWaypoint,
        policies::{Action, Clause, Match, PolicyScope, Rule, ServiceAccountMatch, StringMatch},
        services::{
            AppProtocol, HealthPolicy, IpFamilies, LbMode, LbScope, LoadBalancing, PortMap, Visibility,
        },
        workloads::{ApplicationProtocol, ApplicationTunnel, Common, Locality},
    },
};

/// A field of a resource that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct InvalidResource {
    field: &'static str,
    reason: String,
}

fn invalid(field: &'static str, reason: impl Into<String>) -> InvalidResource {
    InvalidResource { field, reason: reason.into() }
}

impl ResourceDecoder {
    /// A workload. Missing fields get the defaults of this cluster.
    pub(super) fn workload(&self, sent: proto::Workload) -> Result<Workload, InvalidResource> {
        if sent.uid.is_empty() {
            return Err(invalid("uid", "is empty"));
        }
        if sent.name.is_empty() || sent.namespace.is_empty() {
            return Err(invalid("name, namespace", "may not be empty"));
        }
        let protocol = match known(sent.tunnel_protocol, "tunnel_protocol")? {
            proto::TunnelProtocol::None => Protocol::Tcp,
            proto::TunnelProtocol::Hbone => Protocol::Hbone,
            proto::TunnelProtocol::LegacyIstioMtls => {
                return Err(invalid("tunnel_protocol", "LEGACY_ISTIO_MTLS is not supported"));
            }
        };
        let workload_type = match known(sent.workload_type, "workload_type")? {
            proto::WorkloadType::Deployment => "deployment",
            proto::WorkloadType::Cronjob => "cronjob",
            proto::WorkloadType::Pod => "pod",
            proto::WorkloadType::Job => "job",
        };
        let mut services = BTreeMap::new();
        for (key, ports) in sent.services {
            let key: ServiceKey =
                key.parse().map_err(|error: InvalidKey| invalid("services", error.to_string()))?;
            services.insert(key, Arc::new(port_map(&ports.ports)?));
        }
        let gateway =
            |sent: Option<proto::GatewayAddress>, field| sent.map(|sent| gateway(sent, field)).transpose();
        let policies = sent.authorization_policies.iter();
        let locality = sent.locality.unwrap_or_default();
        let common = Common {
            protocol,
            services,
            policies: policies
                .map(|key| {
                    key.parse()
                        .map_err(|error: InvalidKey| invalid("authorization_policies", error.to_string()))
                })
                .collect::<Result<_, _>>()?,
            host_network: known::<proto::NetworkMode>(sent.network_mode, "network_mode")?
                == proto::NetworkMode::HostNetwork,
            waypoint: gateway(sent.waypoint, "waypoint")?,
            network_gateway: gateway(sent.network_gateway, "network_gateway")?,
            application_tunnel: sent.application_tunnel.map(application_tunnel).transpose()?,
            locality: Locality {
                region: self.intern(locality.region),
                zone: self.intern(locality.zone),
                subzone: self.intern(locality.subzone),
            },
            workload_name: self.intern(or(sent.workload_name, &sent.name)),
            namespace: self.intern(sent.namespace),
            service_account: self.intern(or(sent.service_account, "default")),
            trust_domain: self.intern(or(sent.trust_domain, &self.defaults.trust_domain)),
            network: self.intern(sent.network),
            cluster_id: self.intern(or(sent.cluster_id, &self.defaults.cluster_id)),
            canonical_name: self.intern(sent.canonical_name),
            canonical_revision: self.intern(sent.canonical_revision),
            workload_type: self.intern(workload_type.to_owned()),
            native_tunnel: sent.native_tunnel,
            hostname: (!sent.hostname.is_empty()).then(|| sent.hostname.into()),
        };
        let workload = Workload {
            addresses: sent.addresses.iter().map(|bytes| ip(bytes, "addresses")).collect::<Result<_, _>>()?,
            healthy: known::<proto::WorkloadStatus>(sent.status, "status")? == proto::WorkloadStatus::Healthy,
            capacity: sent.capacity.unwrap_or(1),
            uid: sent.uid.into(),
            name: sent.name.into(),
            node: self.intern(sent.node),
            common: self.commons.intern(common),
        };
        let identity = workload.identity().to_string();
        if identity.parse::<Identity>().is_err() {
            let reason = format!("{identity} is not a valid identity");
            return Err(invalid("trust_domain, namespace, service_account", reason));
        }
        Ok(workload)
    }

    pub(super) fn service(&self, sent: proto::Service) -> Result<Service, InvalidResource> {
        if sent.namespace.is_empty() || sent.hostname.is_empty() {
            return Err(invalid("namespace, hostname", "may not be empty"));
        }
        let (mut vips, mut cidr_vips) = (Vec::new(), Vec::new());
        for address in sent.addresses {
            let (network, ip) = (self.intern(address.network), ip(&address.address, "addresses")?);
            match address.length {
                None => vips.push((network, ip)),
                Some(length) => cidr_vips.push((network, net(ip, length, "addresses")?)),
            }
        }
        let mut app_protocols = BTreeMap::new();
        for sent in &sent.ports {
            let protocol = match known(sent.app_protocol, "ports")? {
                proto::AppProtocol::Unknown => continue,
                proto::AppProtocol::Http11 => AppProtocol::Http11,
                proto::AppProtocol::Http2 => AppProtocol::Http2,
                proto::AppProtocol::Grpc => AppProtocol::Grpc,
                proto::AppProtocol::Tcp => AppProtocol::Tcp,
                proto::AppProtocol::Tls => AppProtocol::Tls,
            };
            app_protocols.insert(port(sent.service_port, "ports")?, protocol);
        }
        let identity = |text: &String| {
            text.parse()
                .map_err(|_| invalid("subject_alt_names", format!("{text:?} is not a valid identity")))
        };
        let weighted = |sent: proto::WeightedWaypoint| {
            let destination =
                sent.destination.ok_or_else(|| invalid("weighted_waypoints", "has no destination"))?;
            Ok(WeightedWaypoint {
                destination: gateway(destination, "weighted_waypoints")?,
                weight: sent.weight,
            })
        };
        Ok(Service {
            vips,
            cidr_vips,
            ports: port_map(&sent.ports)?,
            app_protocols,
            subject_alt_names: sent.subject_alt_names.iter().map(identity).collect::<Result<_, _>>()?,
            ip_families: match known(sent.ip_families, "ip_families")? {
                proto::IpFamilies::Automatic | proto::IpFamilies::Dual => IpFamilies::Any,
                proto::IpFamilies::Ipv4Only => IpFamilies::IPv4,
                proto::IpFamilies::Ipv6Only => IpFamilies::IPv6,
            },
            canonical: sent.canonical,
            load_balancing: sent.load_balancing.map(load_balancing).transpose()?.unwrap_or_default(),
            waypoint: sent.waypoint.map(|sent| gateway(sent, "waypoint")).transpose()?,
            weighted_waypoints: sent
                .weighted_waypoints
                .into_iter()
                .map(weighted)
                .collect::<Result<_, _>>()?,
            visibility: match known(sent.visibility, "visibility")? {
                proto::Visibility::Public => Visibility::Public,
                proto::Visibility::NamespaceLocal => Visibility::Namespace,
            },
            name: self.intern(sent.name),
            namespace: self.intern(sent.namespace),
            hostname: self.intern(sent.hostname),
        })
    }
}

pub(super) fn policy(sent: security::Authorization) -> Result<Policy, InvalidResource> {
    if sent.name.is_empty() {
        return Err(invalid("name", "is empty"));
    }
    let clause = |sent: security::Clause| {
        sent.matches.into_iter().map(one_match).collect::<Result<_, _>>().map(Clause)
    };
    let rule =
        |sent: security::Rule| sent.clauses.into_iter().map(clause).collect::<Result<_, _>>().map(Rule);
    Ok(Policy {
        rules: sent.rules.into_iter().map(rule).collect::<Result<_, InvalidResource>>()?,
        scope: match known(sent.scope, "scope")? {
            security::Scope::Global => PolicyScope::Global,
            security::Scope::Namespace => PolicyScope::Namespace,
            security::Scope::WorkloadSelector => PolicyScope::WorkloadSelector,
        },
        action: match known(sent.action, "action")? {
            security::Action::Allow => Action::Allow,
            security::Action::Deny => Action::Deny,
        },
        dry_run: sent.dry_run,
        stand_in: false,
        key: PolicyKey { namespace: sent.namespace.into(), name: sent.name.into() },
    })
}

/// What is left of a policy that is refused: as much as it may forbid, and nothing that it may allow.
///
/// It protects what the policy says that it protects; everything, if that is not known. One that
/// allows some allows nobody; any other denies everybody.
pub(super) fn stand_in(refused: &Resource) -> Policy {
    let content = refused.resource.as_ref();
    let sent = content.and_then(|any| security::Authorization::decode(&*any.value).ok());
    let key = match &sent {
        Some(sent) if !sent.name.is_empty() => {
            PolicyKey { namespace: sent.namespace.as_str().into(), name: sent.name.as_str().into() }
        }
        _ => (refused.name.parse())
            .unwrap_or_else(|_| PolicyKey { namespace: "".into(), name: refused.name.as_str().into() }),
    };
    let scope = match sent.as_ref().map(|sent| security::Scope::try_from(sent.scope)) {
        Some(Ok(security::Scope::Namespace)) => PolicyScope::Namespace,
        Some(Ok(security::Scope::WorkloadSelector)) => PolicyScope::WorkloadSelector,
        Some(Ok(security::Scope::Global) | Err(_)) | None => PolicyScope::Global,
    };
    let (action, rules) = match sent.as_ref().map(|sent| security::Action::try_from(sent.action)) {
        Some(Ok(security::Action::Allow)) => (Action::Allow, Vec::new()),
        Some(Ok(security::Action::Deny) | Err(_)) | None => (Action::Deny, vec![Rule::default()]),
    };
    let dry_run = sent.is_some_and(|sent| sent.dry_run);
    Policy { key, scope, action, rules, dry_run, stand_in: true }
}

fn one_match(sent: security::Match) -> Result<Match, InvalidResource> {
    let ports = |sent: Vec<u32>, field| -> Result<Vec<u16>, InvalidResource> {
        sent.into_iter().map(|number| port(number, field)).collect()
    };
    let accounts = |sent: Vec<security::ServiceAccountMatch>| {
        let account = |sent: security::ServiceAccountMatch| ServiceAccountMatch {
            namespace: sent.namespace,
            service_account: sent.service_account,
        };
        sent.into_iter().map(account).collect()
    };
    Ok(Match {
        namespaces: strings(sent.namespaces, "namespaces")?,
        not_namespaces: strings(sent.not_namespaces, "not_namespaces")?,
        principals: strings(sent.principals, "principals")?,
        not_principals: strings(sent.not_principals, "not_principals")?,
        service_accounts: accounts(sent.service_accounts),
        not_service_accounts: accounts(sent.not_service_accounts),
        source_ips: nets(&sent.source_ips, "source_ips")?,
        not_source_ips: nets(&sent.not_source_ips, "not_source_ips")?,
        destination_ips: nets(&sent.destination_ips, "destination_ips")?,
        not_destination_ips: nets(&sent.not_destination_ips, "not_destination_ips")?,
        destination_ports: ports(sent.destination_ports, "destination_ports")?,
        not_destination_ports: ports(sent.not_destination_ports, "not_destination_ports")?,
    })
}

/// Refuses unknown kinds of match: without them the policy would have another meaning.
fn strings(
    sent: Vec<security::StringMatch>,
    field: &'static str,
) -> Result<Vec<StringMatch>, InvalidResource> {
    use security::string_match::MatchType;
    let one = |sent: security::StringMatch| match sent.match_type {
        Some(MatchType::Exact(text)) => Ok(StringMatch::Exact(text)),
        Some(MatchType::Prefix(text)) => Ok(StringMatch::Prefix(text)),
        Some(MatchType::Suffix(text)) => Ok(StringMatch::Suffix(text)),
        Some(MatchType::Presence(())) => Ok(StringMatch::Presence),
        None => Err(invalid(field, "a match of an unknown type")),
    };
    sent.into_iter().map(one).collect()
}

fn nets(sent: &[security::Address], field: &'static str) -> Result<Vec<IpNet>, InvalidResource> {
    sent.iter().map(|sent| net(ip(&sent.address, field)?, sent.length, field)).collect()
}

fn load_balancing(sent: proto::LoadBalancing) -> Result<LoadBalancing, InvalidResource> {
    const FIELD: &str = "load_balancing";
    let mut preferences = Vec::new();
    for scope in sent.routing_preference {
        preferences.push(match known(scope, FIELD)? {
            load_balancing::Scope::UnspecifiedScope => continue,
            load_balancing::Scope::Region => LbScope::Region,
            load_balancing::Scope::Zone => LbScope::Zone,
            load_balancing::Scope::Subzone => LbScope::Subzone,
            load_balancing::Scope::Node => LbScope::Node,
            load_balancing::Scope::Cluster => LbScope::Cluster,
            load_balancing::Scope::Network => LbScope::Network,
        });
    }
    Ok(LoadBalancing {
        preferences,
        mode: match known(sent.mode, FIELD)? {
            load_balancing::Mode::UnspecifiedMode => LbMode::Standard,
            load_balancing::Mode::Strict => LbMode::Strict,
            load_balancing::Mode::Failover => LbMode::Failover,
            load_balancing::Mode::Passthrough => LbMode::Passthrough,
        },
        health_policy: match known(sent.health_policy, FIELD)? {
            load_balancing::HealthPolicy::OnlyHealthy => HealthPolicy::OnlyHealthy,
            load_balancing::HealthPolicy::AllowAll => HealthPolicy::AllowAll,
        },
    })
}

fn application_tunnel(sent: proto::ApplicationTunnel) -> Result<ApplicationTunnel, InvalidResource> {
    use proto::application_tunnel::Protocol as Sent;
    const FIELD: &str = "application_tunnel";
    Ok(ApplicationTunnel {
        protocol: match known(sent.protocol, FIELD)? {
            Sent::None => ApplicationProtocol::None,
            Sent::Proxy => ApplicationProtocol::Proxy,
        },
        port: NonZeroU16::new(port(sent.port, FIELD)?),
    })
}

fn gateway(sent: proto::GatewayAddress, field: &'static str) -> Result<GatewayAddress, InvalidResource> {
    use proto::gateway_address::Destination;
    let destination = match sent.destination {
        Some(Destination::Address(address)) => {
            GatewayDestination::Address(address.network.into(), ip(&address.address, field)?)
        }
        Some(Destination::Hostname(name)) => {
            if name.namespace.is_empty() || name.hostname.is_empty() {
                return Err(invalid(field, "namespace and hostname may not be empty"));
            }
            GatewayDestination::Hostname(ServiceKey {
                namespace: name.namespace.into(),
                hostname: name.hostname.into(),
            })
        }
        None => return Err(invalid(field, "has no destination")),
    };
    match port(sent.hbone_mtls_port, field)? {
        0 => Err(invalid(field, "hbone_mtls_port may not be 0")),
        hbone_mtls_port => Ok(GatewayAddress { destination, hbone_mtls_port }),
    }
}

fn port_map(sent: &[proto::Port]) -> Result<PortMap, InvalidResource> {
    sent.iter()
        .map(|sent| Ok((port(sent.service_port, "ports")?, port(sent.target_port, "ports")?)))
        .collect()
}

fn port(number: u32, field: &'static str) -> Result<u16, InvalidResource> {
    u16::try_from(number).map_err(|_| invalid(field, format!("{number} is not a port")))
}

fn ip(bytes: &[u8], field: &'static str) -> Result<IpAddr, InvalidResource> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(v4).into());
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(v6) => Ok(IpAddr::from(Ipv6Addr::from(v6)).to_canonical()),
        Err(_) => Err(invalid(field, format!("an address of {} bytes, expected 4 or 16", bytes.len()))),
    }
}

fn net(ip: IpAddr, length: u32, field: &'static str) -> Result<IpNet, InvalidResource> {
    let net = u8::try_from(length).ok().and_then(|length| IpNet::new(ip, length).ok());
    net.map(|net| net.trunc()).ok_or_else(|| invalid(field, format!("{ip}/{length} is not a range")))
}

/// The value of an enum. Refuses unknown values, since one could mean that traffic must not pass.
fn known<T: TryFrom<i32>>(number: i32, field: &'static str) -> Result<T, InvalidResource> {
    T::try_from(number).map_err(|_| invalid(field, format!("unknown value {number}")))
}

fn or(text: String, default: &str) -> String {
    if text.is_empty() { default.to_owned() } else { text }
}

/// Shares equal texts of different resources.
impl ResourceDecoder {
    fn intern(&self, text: String) -> Arc<str> {
        self.texts.intern(text)
    }
}

#[cfg(test)]
mod tests;
