//! Where an outbound connection goes, decided from one snapshot of the mesh.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use rand::{Rng, RngExt};

use crate::{
    config::Ports,
    identity::Identity,
    mesh::{Endpoint, Mesh, Protocol, Service, Workload, services::HealthPolicy},
};

/// What becomes of an outbound connection.
#[derive(Clone, Debug)]
pub struct OutboundRoute {
    /// What the application addressed, if it was a service.
    pub service: Option<Arc<Service>>,
    /// Who will answer. `None`: nobody of the mesh.
    pub workload: Option<Arc<Workload>>,
    /// The workload's address and target port, or the original destination.
    pub target: SocketAddr,
    pub via: Via,
}

/// How the target is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Via {
    Plain,
    /// Through the tunnel at `peer`, which must prove to be one of `expected`.
    Hbone {
        peer: SocketAddr,
        authority: String,
        expected: Vec<Identity>,
    },
}

/// Why there is no way.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    #[error("no healthy upstream: {service}")]
    NoHealthyUpstream { service: String },
    #[error("service {service} has no port {port}")]
    NoPort { service: String, port: u16 },
    #[error("{destination} must be reached through a waypoint, which is not supported")]
    Waypoint { destination: String },
    #[error("{workload} is on network {network:?}, and network gateways are not supported")]
    RemoteNetwork { workload: String, network: String },
}

impl RouteError {
    /// A closed set, for logs and metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoHealthyUpstream { .. } => "no_healthy_upstream",
            Self::NoPort { .. } => "no_such_port",
            Self::Waypoint { .. } => "waypoint_unsupported",
            Self::RemoteNetwork { .. } => "remote_network_unsupported",
        }
    }
}

/// Follows `original`, the address that an application of `source` dialled. First rule that holds wins:
///
/// 1. it is a service's: one of its healthy endpoints, by chance weighted with their capacity, or an error
/// 2. it is a workload's: that workload
/// 3. it is nobody's: straight there
pub fn outbound(
    mesh: &Mesh,
    source: &Workload,
    original: SocketAddr,
    rng: &mut impl Rng,
) -> Result<OutboundRoute, RouteError> {
    let original = SocketAddr::new(original.ip().to_canonical(), original.port());
    if let Some(service) = mesh.service_by_vip(&source.network, original.ip()) {
        return to_service(mesh, source, service, original, rng);
    }
    let Some(workload) = mesh.workload_by_address(&source.network, original.ip()) else {
        return Ok(OutboundRoute { service: None, workload: None, target: original, via: Via::Plain });
    };
    if workload.waypoint.is_some() {
        return Err(RouteError::Waypoint { destination: workload.name.to_string() });
    }
    let via = via(workload, original, Vec::new());
    Ok(OutboundRoute { service: None, workload: Some(Arc::clone(workload)), target: original, via })
}

fn to_service(
    mesh: &Mesh,
    source: &Workload,
    service: &Arc<Service>,
    original: SocketAddr,
    rng: &mut impl Rng,
) -> Result<OutboundRoute, RouteError> {
    let key = service.key();
    if service.waypoint.is_some() || !service.weighted_waypoints.is_empty() {
        return Err(RouteError::Waypoint { destination: key.to_string() });
    }
    if !service.ports.contains_key(&original.port()) {
        return Err(RouteError::NoPort { service: key.to_string(), port: original.port() });
    }
    let (local, remote): (Vec<_>, Vec<_>) = mesh
        .endpoints(&key)
        .iter()
        .filter(|endpoint| {
            endpoint.workload.healthy || service.load_balancing.health_policy == HealthPolicy::AllowAll
        })
        .filter_map(|endpoint| Some((endpoint, target(endpoint, service, original)?)))
        .partition(|(endpoint, _)| endpoint.workload.network == source.network);
    let Some((endpoint, target)) = choose(&local, rng) else {
        return Err(match remote.first() {
            Some((endpoint, _)) => RouteError::RemoteNetwork {
                workload: endpoint.workload.name.to_string(),
                network: endpoint.workload.network.to_string(),
            },
            None => RouteError::NoHealthyUpstream { service: key.to_string() },
        });
    };
    let workload = &endpoint.workload;
    Ok(OutboundRoute {
        service: Some(Arc::clone(service)),
        workload: Some(Arc::clone(workload)),
        target,
        via: via(workload, target, service.subject_alt_names.clone()),
    })
}

/// The address at which an endpoint serves the port that was dialled, of the dialled family if it has one.
fn target(endpoint: &Endpoint, service: &Service, original: SocketAddr) -> Option<SocketAddr> {
    let port = endpoint.target_port(original.port())?;
    let usable = endpoint.workload.addresses.iter().copied().filter(|&ip| service.ip_families.accept(ip));
    let preferred = |ip: &IpAddr| ip.is_ipv4() == original.is_ipv4();
    let ip = usable.clone().find(preferred).or_else(|| usable.clone().next())?;
    Some(SocketAddr::new(ip, port))
}

/// One of them, each with the chance that its capacity gives it. A capacity of 0 takes no new connections, unless
/// nobody else is there.
fn choose<'a>(
    endpoints: &[(&'a Endpoint, SocketAddr)],
    rng: &mut impl Rng,
) -> Option<(&'a Endpoint, SocketAddr)> {
    let total: u64 = endpoints.iter().map(|(endpoint, _)| u64::from(endpoint.workload.capacity)).sum();
    if total == 0 {
        return endpoints.get(rng.random_range(0..endpoints.len().max(1))).copied();
    }
    let mut ticket = rng.random_range(0..total);
    for &(endpoint, target) in endpoints {
        let weight = u64::from(endpoint.workload.capacity);
        if ticket < weight {
            return Some((endpoint, target));
        }
        ticket -= weight;
    }
    None
}

fn via(workload: &Workload, target: SocketAddr, mut expected: Vec<Identity>) -> Via {
    match workload.protocol {
        Protocol::Tcp => Via::Plain,
        Protocol::Hbone => {
            expected.push(workload.identity());
            let peer = SocketAddr::new(target.ip(), Ports::default().hbone);
            Via::Hbone { peer, authority: target.to_string(), expected }
        }
    }
}

#[cfg(test)]
mod tests;
