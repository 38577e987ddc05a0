//! From the name of a waypoint or of a network's gateway to the tunnel's end that stands for it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use rand::Rng;

use super::{Avoid, balance};
use crate::{
    identity::Identity,
    mesh::{GatewayAddress, GatewayDestination, MeshView, NamedGateway, Workload, services::IpFamilies},
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
            let endpoints = mesh.endpoints(&service.key()).iter();
            let candidates =
                endpoints.filter(|endpoint| is_within(&endpoint.workload)).filter_map(|endpoint| {
                    let workload = &endpoint.workload;
                    let ip = balance::address(workload, service.ip_families, like)?;
                    // A gateway takes HBONE whether or not its service lists that port.
                    let peer = SocketAddr::new(ip, endpoint.target_port(service, port).unwrap_or(port));
                    let rank = balance::rank(client, workload, &service.load_balancing)?;
                    let rank = avoid.rank(rank, peer)?;
                    Some((rank, workload.capacity, (workload, peer)))
                });
            let (workload, peer) = balance::choose(candidates, rng)?;
            let mut expected = service.subject_alt_names.clone();
            expected.push(workload.identity());
            Some(Gateway { workload: Arc::clone(workload), peer, expected })
        }
    }
}
