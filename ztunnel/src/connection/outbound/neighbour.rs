//! Finds out whether the destination is a pod of this node, which is reached without a tunnel.
//!
//! There is a tunnel between the two all the same, which carries nothing: as long as it can be opened
//! and is kept, whoever decides about packets between them, such as a CNI plugin by a NetworkPolicy, lets
//! the pods talk over HBONE, and both have proven who they are.

use std::{net::SocketAddr, sync::Arc};

use super::tunnel::{PeerTarget, reach};
use crate::{
    config::{ProxyMode, SameNode},
    connection::{
        error::OutboundError,
        inbound::neighbour::{self, Neighbour, NeighbourRequest},
    },
    context::Accepted,
    direction::Direction,
    hbone::client::ConnectError,
    identity::CertificateChain,
    pod::ServedPod,
    route::{OutboundRoute, Source},
};

/// The application of a pod of this node, and what its tunnel's certificates would have been.
pub(super) struct Connected {
    pub neighbour: Neighbour,
    pub chain: CertificateChain,
}

/// Connects to the destination if this process serves it. `None`: it does not, or not everything is
/// known that a tunnel would prove. Then a tunnel is tried, which says what is wrong.
pub(super) async fn connect(
    accepted: &Accepted,
    source: &Source,
    route: &OutboundRoute,
    via: &PeerTarget<'_>,
) -> Result<Option<Connected>, OutboundError> {
    let process = &accepted.worker.process;
    let Some(pod) = served_here(accepted, source, route, via.peer) else { return Ok(None) };
    let Some(server) = route.workload.as_ref().map(|workload| workload.identity()) else { return Ok(None) };
    if !via.expected.contains(&server) {
        return Ok(None);
    }
    // Who they are is proven by the same certificates as it would be through a tunnel.
    let failed = |error| Arc::new(ConnectError::Identity(error));
    let client_credentials = process.certificates.get(&source.identity()).await.map_err(failed)?;
    let Ok(credentials) = process.certificates.get(&server).await else { return Ok(None) };
    let chain = reach(accepted, source, via).await?;
    if process.revocations.is_revoked(&chain) {
        process.metrics.crl.rejected(Direction::Outbound);
        return Err(Arc::new(ConnectError::Revoked { peer: via.peer }).into());
    }
    let asked = NeighbourRequest {
        client: accepted.client,
        client_credentials: &client_credentials,
        client_workload: &source.workload,
        pod,
        credentials,
        peer: via.peer,
        target: route.target,
        service: route.service.as_ref(),
    };
    let neighbour = neighbour::connect(&accepted.worker, asked).await;
    let neighbour = neighbour.map_err(|status| Arc::new(ConnectError::Status(status)))?;
    Ok(Some(Connected { neighbour, chain }))
}

/// The pod at the end of `route`, if no other tunnel is on the way, and if it has that address.
///
/// The mesh may be behind: another pod may have the address by now. A tunnel would find out by the
/// certificate. And a client may have chosen an address that the mesh does not know as its own, for which
/// policies and applications would take it; a tunnel comes from one that the kernel chose.
fn served_here(
    accepted: &Accepted,
    source: &Source,
    route: &OutboundRoute,
    peer: SocketAddr,
) -> Option<Arc<ServedPod>> {
    let process = &accepted.worker.process;
    let config = &process.config;
    let client = accepted.client.ip();
    if config.same_node != SameNode::Direct
        || config.mode != ProxyMode::Shared
        || peer.ip() != route.target.ip()
        || client.is_ipv4() != peer.is_ipv4()
        || !source.is_told
        || !source.addresses.contains(&client)
    {
        return None;
    }
    let workload = route.workload.as_ref()?;
    process.served.find(workload, &process.store.snapshot(), route.target)
}
