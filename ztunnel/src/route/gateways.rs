//! From the name of a waypoint or of a network's gateway to the tunnel's end that stands for it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use rand::Rng;

use super::{
    Avoid,
    balance::{self, Candidate},
};
use crate::{
    identity::Identity,
    mesh::{
        Endpoint, GatewayAddress, GatewayDestination, MeshView, NamedGateway, Purpose, Question, Workload,
        services::IpFamilies,
    },
};

/// A tunnel's end that carries traffic for others.
#[derive(Clone, Debug)]
pub(super) struct Gateway {
    pub workload: Arc<Workload>,
    pub peer: SocketAddr,
    pub expected: Vec<Identity>,
}

/// Where a tunnel's end may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Within {
    /// In the client's network: the same address in another network is another workload.
    OwnNetwork,
    /// Anywhere: a gateway into a network belongs to that network.
    AnyNetwork,
}

/// Whether `workload` itself is (one of) what `gateway` names. Decided by what it is, not by its
/// identity alone, which others may share.
pub(crate) fn is_gateway(mesh: &MeshView<'_>, workload: &Workload, gateway: &GatewayAddress) -> bool {
    match mesh.gateway(gateway) {
        Some(NamedGateway::Service(service)) => {
            let key = service.key();
            // From the workload's side: it has few services, the service may have many endpoints.
            workload.services.contains_key(&key)
        }
        Some(NamedGateway::Workload(named)) => named.uid == workload.uid,
        None => false,
    }
}

/// One of those that `gateway` names, for a client. `None`: nobody knows it, or nobody of it is
/// healthy and within reach.
pub(super) fn resolve(
    mesh: &MeshView<'_>,
    client: &Workload,
    gateway: &GatewayAddress,
    within: Within,
    like: IpAddr,
    avoid: &Avoid<'_>,
    rng: &mut impl Rng,
) -> Option<Gateway> {
    let port = gateway.hbone_mtls_port;
    let is_within = |workload: &Workload| within == Within::AnyNetwork || workload.network == client.network;
    match mesh.gateway(gateway)? {
        NamedGateway::Workload(workload) => {
            if !is_within(workload) {
                return None;
            }
            let ip = match &gateway.destination {
                GatewayDestination::Address(_, ip) => *ip,
                GatewayDestination::Hostname(_) => balance::address(workload, IpFamilies::Any, like)?,
            };
            Some(Gateway {
                workload: Arc::clone(workload),
                peer: SocketAddr::new(ip, port),
                expected: vec![workload.identity()],
            })
        }
        NamedGateway::Service(service) => {
            let purpose = match within {
                Within::OwnNetwork => Purpose::GatewayHere,
                Within::AnyNetwork => Purpose::GatewayAnywhere,
            };
            let asked = Question { service, client, port, is_ipv4: like.is_ipv4(), purpose };
            let candidate = |endpoint: &Endpoint| {
                let workload = &endpoint.workload;
                let near = Some(workload).filter(|workload| is_within(workload))?;
                let ip = balance::address(near, service.ip_families, like)?;
                // A gateway takes HBONE whether or not its service lists that port.
                let at = SocketAddr::new(ip, endpoint.target_port(service, port).unwrap_or(port));
                let rank = balance::rank(client, workload, &service.load_balancing)?;
                Some(Candidate { rank, at, way: at })
            };
            let endpoints = mesh.endpoints(&service.key());
            let (endpoint, peer) = balance::pick(endpoints, &asked, candidate, avoid, rng)?;
            let workload = &endpoint.workload;
            let mut expected = service.subject_alt_names.clone();
            expected.push(workload.identity());
            Some(Gateway { workload: Arc::clone(workload), peer, expected })
        }
    }
}
