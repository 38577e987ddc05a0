//! A service.

use std::net::IpAddr;

use ztunnel_api::workload::{
    IpFamilies, LoadBalancing, NetworkAddress, Port, Service as Sent,
    load_balancing::{HealthPolicy, Mode, Scope},
};

use super::address::octets;
use crate::{
    objects::service::{Distribution, Families, Service, ServicePort, Target},
    settings::MeshSettings,
};

/// `inherited`: what its namespace prefers.
pub(super) fn service(
    settings: &MeshSettings,
    namespace: &str,
    inherited: Option<Distribution>,
    service: &Service,
) -> Sent {
    let port = |port: &ServicePort| Port {
        service_port: port.number.into(),
        target_port: match port.target {
            Target::Number(number) => number.into(),
            // Each endpoint says its own.
            Target::Name(_) => 0,
        },
        app_protocol: port.protocol.into(),
    };
    let address = |ip: &IpAddr| NetworkAddress {
        network: settings.network.clone(),
        address: octets(*ip),
        length: None,
    };
    let families = match service.families {
        Families::Unsaid => IpFamilies::Automatic,
        Families::V4 => IpFamilies::Ipv4Only,
        Families::V6 => IpFamilies::Ipv6Only,
        Families::Both => IpFamilies::Dual,
    };
    Sent {
        name: service.name.clone(),
        namespace: namespace.to_owned(),
        hostname: settings.hostname(namespace, &service.name),
        addresses: service.addresses.iter().map(address).collect(),
        ports: service.ports.iter().map(port).collect(),
        load_balancing: load_balancing(service, inherited),
        ip_families: families.into(),
        // Of all that have its name, this is the one that everybody means.
        canonical: true,
        ..Sent::default()
    }
}

/// `None`: any healthy endpoint.
fn load_balancing(service: &Service, inherited: Option<Distribution>) -> Option<LoadBalancing> {
    let (mode, preference) = match service.distribution.or(inherited) {
        _ if service.node_local => (Mode::Strict, &[Scope::Node][..]),
        Some(Distribution::SameZone) => (Mode::Failover, &[Scope::Network, Scope::Region, Scope::Zone][..]),
        Some(Distribution::SameNode) => {
            (Mode::Failover, &[Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node][..])
        }
        None if !service.publish_not_ready => return None,
        None => (Mode::UnspecifiedMode, &[][..]),
    };
    let health_policy =
        if service.publish_not_ready { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
    Some(LoadBalancing {
        routing_preference: preference.iter().map(|scope| i32::from(*scope)).collect(),
        mode: mode.into(),
        health_policy: health_policy.into(),
    })
}
