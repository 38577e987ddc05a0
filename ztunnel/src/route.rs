//! Where an outbound connection goes, decided from one snapshot of the mesh.

mod avoid;
mod balance;
mod gateways;
mod source;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use rand::Rng;

pub(crate) use avoid::{Avoid, FailedEndpoints};
use balance::Candidate;
use gateways::Within;
pub(crate) use gateways::is_gateway;
pub(crate) use source::Source;

use crate::{
    config::PortsConfig,
    identity::Identity,
    mesh::{
        Endpoint, GatewayAddress, MeshView, Protocol, Purpose, Question, Service, Workload,
        services::{IpFamilies, LbMode},
    },
    reason::FailureReason,
};

/// Where an outbound connection goes.
#[derive(Clone, Debug)]
pub(crate) struct OutboundRoute {
    /// What the application addressed, if it was a service.
    pub service: Option<Arc<Service>>,
    /// The workload that the connection is made to: the endpoint, or a waypoint or gateway before
    /// it. `None`: a destination outside of the mesh.
    pub workload: Option<Arc<Workload>>,
    /// The workload's address and target port, or the original destination.
    pub target: SocketAddr,
    pub via: Via,
}

impl OutboundRoute {
    /// What is dialled, for another connection to avoid if that fails: the port of the application,
    /// or the tunnel of a waypoint or gateway.
    pub(crate) fn endpoint(&self) -> SocketAddr {
        match &self.via {
            Via::Hbone { peer, .. } if peer.ip() != self.target.ip() => *peer,
            Via::Gateway { peer, .. } => *peer,
            Via::Plain | Via::Hbone { .. } => self.target,
        }
    }
}

/// How the target is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Via {
    Plain,
    /// Through the tunnel at `peer`, which must prove to be one of `expected`.
    Hbone {
        peer: SocketAddr,
        authority: String,
        expected: Vec<Identity>,
    },
    /// Into another network: a tunnel to its gateway at `peer`, and within it one to an endpoint of
    /// the gateway's choice, which must prove to be one of `inner_expected`. Both are requested for
    /// `authority`.
    Gateway {
        peer: SocketAddr,
        authority: String,
        expected: Vec<Identity>,
        inner_expected: Vec<Identity>,
    },
}

/// Where a connection goes, or which endpoint must be resolved first.
#[derive(Clone, Debug)]
pub(crate) enum OutboundDecision {
    Route(OutboundRoute),
    Unlocated(Unlocated),
}

/// An endpoint that has a host name and no address.
#[derive(Clone, Debug)]
pub(crate) struct Unlocated {
    pub hostname: Arc<str>,
    service: Arc<Service>,
    workload: Arc<Workload>,
    port: u16,
}

impl Unlocated {
    /// Which of the host's addresses may be used.
    pub(crate) fn families(&self) -> IpFamilies {
        self.service.ip_families
    }

    pub(crate) fn located(self, ip: IpAddr) -> OutboundRoute {
        let target = SocketAddr::new(ip, self.port);
        OutboundRoute {
            via: direct(&self.workload, target, self.service.subject_alt_names.clone()),
            service: Some(self.service),
            workload: Some(self.workload),
            target,
        }
    }
}

/// Why there is no route.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RouteError {
    /// Not an end: see [`Source`].
    #[error("the way depends on what is not told of the source yet")]
    Untold,
    #[error("no healthy upstream: {service}")]
    NoHealthyUpstream { service: String },
    #[error("service {service} has no port {port}")]
    NoPort { service: String, port: u16 },
    #[error(
        "no healthy upstream: {destination} is behind waypoint {waypoint}, which is unknown or has no healthy endpoint in this network"
    )]
    NoWaypoint { destination: String, waypoint: String },
    #[error("{workload} is on network {network:?}, for which the control plane names no gateway")]
    NoGateway { workload: String, network: String },
    #[error("{workload} is behind gateway {gateway}, which is unknown or has no healthy endpoint")]
    UnknownGateway { workload: String, gateway: String },
}

impl RouteError {
    /// For logs and metrics.
    pub(crate) fn reason(&self) -> FailureReason {
        match self {
            Self::Untold => FailureReason::UnknownWorkload,
            Self::NoHealthyUpstream { .. } => FailureReason::NoHealthyUpstream,
            Self::NoPort { .. } => FailureReason::NoSuchPort,
            Self::NoWaypoint { .. } => FailureReason::NoWaypoint,
            Self::NoGateway { .. } => FailureReason::NoGateway,
            Self::UnknownGateway { .. } => FailureReason::UnknownGateway,
        }
    }
}

/// Follows `original`, the address that an application of `source` dialled. Where there is a choice,
/// what `avoid` names comes last, or not at all. First rule that holds wins:
///
/// 1. it is a service's that `source` may know: a. with a waypoint that `source` is not itself:
///    there, requesting `original` b. that is passed through: as if it were no service's c. else:
///    the endpoint that load balancing chooses, or an error
/// 2. it is a workload's: there, through its waypoint if it has one that `source` is not itself
/// 3. it is unknown: straight there
pub(crate) fn outbound(
    mesh: &MeshView<'_>,
    source: &Source,
    original: SocketAddr,
    avoid: &Avoid<'_>,
    rng: &mut impl Rng,
) -> Result<OutboundDecision, RouteError> {
    let original = SocketAddr::new(original.ip().to_canonical(), original.port());
    let service = mesh
        .service_by_vip(&source.network, original.ip())
        .filter(|service| service.is_visible_from(&source.namespace));
    if let Some(service) = service {
        if let Some(route) = to_service_waypoint(mesh, source, service, original, avoid, rng)? {
            return Ok(OutboundDecision::Route(route));
        }
        if service.load_balancing.mode != LbMode::Passthrough {
            return to_service(mesh, source, service, original, avoid, rng);
        }
    }
    let Some(workload) = mesh.workload_by_address(&source.network, original.ip()) else {
        let (service, target) = (service.cloned(), original);
        return Ok(OutboundDecision::Route(OutboundRoute {
            service,
            workload: None,
            target,
            via: Via::Plain,
        }));
    };
    // Traffic to a service never uses a workload's waypoint.
    if service.is_none()
        && let Some(waypoint) = &workload.waypoint
        && !source.is_gateway(mesh, waypoint)?
    {
        let name = || workload.name.to_string();
        return to_waypoint(mesh, source, waypoint, original, name, avoid, rng).map(OutboundDecision::Route);
    }
    Ok(OutboundDecision::Route(OutboundRoute {
        service: service.cloned(),
        workload: Some(Arc::clone(workload)),
        target: original,
        via: direct(workload, original, Vec::new()),
    }))
}

/// `None`: it has no waypoint, or `source` is it, or one of them: its own traffic must get past
/// itself.
fn to_service_waypoint(
    mesh: &MeshView<'_>,
    source: &Source,
    service: &Arc<Service>,
    original: SocketAddr,
    avoid: &Avoid<'_>,
    rng: &mut impl Rng,
) -> Result<Option<OutboundRoute>, RouteError> {
    let weighted = service.weighted_waypoints.iter();
    let all = weighted.clone().map(|waypoint| &waypoint.destination).chain(&service.waypoint);
    for waypoint in all.clone() {
        if source.is_gateway(mesh, waypoint)? {
            return Ok(None);
        }
    }
    let weights = weighted.filter(|waypoint| waypoint.weight > 0);
    let share = balance::choose(weights.map(|waypoint| (0, waypoint.weight, &waypoint.destination)), rng);
    let Some(waypoint) = share.or(service.waypoint.as_ref()) else {
        return match all.clone().next() {
            None => Ok(None),
            // All of weight 0 and no other: a waypoint is wanted, and there is none to take.
            Some(waypoint) => Err(no_waypoint(service.key().to_string(), waypoint)),
        };
    };
    let mut route = to_waypoint(mesh, source, waypoint, original, || service.key().to_string(), avoid, rng)?;
    route.service = Some(Arc::clone(service));
    Ok(Some(route))
}

/// The request to a waypoint names what was dialled: the waypoint chooses the endpoint.
fn to_waypoint(
    mesh: &MeshView<'_>,
    source: &Workload,
    waypoint: &GatewayAddress,
    original: SocketAddr,
    destination: impl Fn() -> String,
    avoid: &Avoid<'_>,
    rng: &mut impl Rng,
) -> Result<OutboundRoute, RouteError> {
    let Some(gateway) =
        gateways::resolve(mesh, source, waypoint, Within::OwnNetwork, original.ip(), avoid, rng)
    else {
        return Err(no_waypoint(destination(), waypoint));
    };
    let via = Via::Hbone { peer: gateway.peer, authority: original.to_string(), expected: gateway.expected };
    Ok(OutboundRoute { service: None, workload: Some(gateway.workload), target: original, via })
}

fn no_waypoint(destination: String, waypoint: &GatewayAddress) -> RouteError {
    RouteError::NoWaypoint { destination, waypoint: waypoint.to_string() }
}

fn to_service(
    mesh: &MeshView<'_>,
    source: &Source,
    service: &Arc<Service>,
    original: SocketAddr,
    avoid: &Avoid<'_>,
    rng: &mut impl Rng,
) -> Result<OutboundDecision, RouteError> {
    let key = service.key();
    if !service.ports.contains_key(&original.port()) {
        return Err(RouteError::NoPort { service: key.to_string(), port: original.port() });
    }
    let endpoints = mesh.endpoints(&key);
    let asked = Question {
        service,
        client: source,
        port: original.port(),
        is_ipv4: original.is_ipv4(),
        purpose: Purpose::Server,
    };
    let picked = balance::pick(
        endpoints,
        &asked,
        |endpoint| {
            let rank = balance::rank(source, &endpoint.workload, &service.load_balancing)?;
            let way = Reach::of(endpoint, source, service, original)?;
            let at = match way {
                Reach::Here(target) => target,
                // Its address is known later.
                Reach::Named(..) | Reach::Beyond(_) => NOWHERE,
            };
            Some(Candidate { rank, at, way })
        },
        avoid,
        rng,
    );
    match picked {
        Some((endpoint, Reach::Here(target))) => Ok(OutboundDecision::Route(OutboundRoute {
            service: Some(Arc::clone(service)),
            workload: Some(Arc::clone(&endpoint.workload)),
            target,
            via: direct(&endpoint.workload, target, service.subject_alt_names.clone()),
        })),
        Some((endpoint, Reach::Named(hostname, port))) => Ok(OutboundDecision::Unlocated(Unlocated {
            hostname: Arc::clone(hostname),
            service: Arc::clone(service),
            workload: Arc::clone(&endpoint.workload),
            port,
        })),
        Some((endpoint, Reach::Beyond(gateway))) => {
            source.must_be_told()?;
            to_gateway(mesh, source, service, (&endpoint.workload, gateway), original, avoid, rng)
                .map(OutboundDecision::Route)
        }
        None => Err(unreachable(source, service, endpoints)),
    }
}

/// Has never failed.
const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// Where an endpoint serves the port that was dialled.
enum Reach<'a> {
    /// At an address of our network, of the dialled family if it has one.
    Here(SocketAddr),
    /// In our network, at the address of its host name.
    Named(&'a Arc<str>, u16),
    /// In another network. What addresses it has there are of no use here.
    Beyond(&'a GatewayAddress),
}

impl<'a> Reach<'a> {
    /// `None`: it does not serve the port, or no way leads to it.
    fn of(
        endpoint: &'a Endpoint,
        source: &Workload,
        service: &Service,
        original: SocketAddr,
    ) -> Option<Self> {
        let (workload, port) = (&endpoint.workload, endpoint.target_port(service, original.port())?);
        if workload.network != source.network {
            return workload.network_gateway.as_ref().map(Self::Beyond);
        }
        if let (Some(hostname), []) = (&workload.hostname, &workload.addresses[..]) {
            return Some(Self::Named(hostname, port));
        }
        let ip = balance::address(workload, service.ip_families, original.ip())?;
        Some(Self::Here(SocketAddr::new(ip, port)))
    }
}

/// Addresses mean nothing beyond the gateway, so both requests name the service.
fn to_gateway(
    mesh: &MeshView<'_>,
    source: &Workload,
    service: &Arc<Service>,
    (endpoint, address): (&Workload, &GatewayAddress),
    original: SocketAddr,
    avoid: &Avoid<'_>,
    rng: &mut impl Rng,
) -> Result<OutboundRoute, RouteError> {
    let Some(gateway) =
        gateways::resolve(mesh, source, address, Within::AnyNetwork, original.ip(), avoid, rng)
    else {
        let (workload, gateway) = (endpoint.name.to_string(), address.to_string());
        return Err(RouteError::UnknownGateway { workload, gateway });
    };
    let mut inner_expected = service.subject_alt_names.clone();
    inner_expected.push(endpoint.identity());
    Ok(OutboundRoute {
        service: Some(Arc::clone(service)),
        workload: Some(gateway.workload),
        target: original,
        via: Via::Gateway {
            peer: gateway.peer,
            authority: format!("{}:{}", service.hostname, original.port()),
            expected: gateway.expected,
            inner_expected,
        },
    })
}

/// Why none of the endpoints was chosen.
fn unreachable(source: &Workload, service: &Service, endpoints: &[Endpoint]) -> RouteError {
    let beyond = endpoints.iter().map(|endpoint| &endpoint.workload).find(|workload| {
        workload.network != source.network
            && workload.network_gateway.is_none()
            && balance::rank(source, workload, &service.load_balancing).is_some()
    });
    match beyond {
        Some(workload) => RouteError::NoGateway {
            workload: workload.name.to_string(),
            network: workload.network.to_string(),
        },
        None => RouteError::NoHealthyUpstream { service: service.key().to_string() },
    }
}

fn direct(workload: &Workload, target: SocketAddr, mut expected: Vec<Identity>) -> Via {
    match workload.protocol {
        Protocol::Tcp => Via::Plain,
        Protocol::Hbone => {
            expected.push(workload.identity());
            let peer = SocketAddr::new(target.ip(), PortsConfig::default().hbone);
            Via::Hbone { peer, authority: target.to_string(), expected }
        }
    }
}

#[cfg(test)]
mod tests;
