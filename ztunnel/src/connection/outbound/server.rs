//! The far end of a connection, by whichever way it is reached.

use std::{net::IpAddr, sync::Arc, time::Instant};

use tokio::net::TcpStream;

use super::{
    gateway,
    tunnel::{PeerTarget, open_stream, request, revoked_if_cut},
};
use crate::{
    connection::error::OutboundError,
    context::{Accepted, ProcessContext},
    direction::Direction,
    hbone::{client::ConnectError, nested::NestedStream, pool::StreamLease},
    mesh::Workload,
    record::{ByteCounters, ConnectionEnds},
    route::{OutboundRoute, Via},
    socket,
    stream::{self, HboneStream, SocketIs},
};

/// A server that was connected.
pub(super) enum Server {
    Plain(TcpStream),
    /// Through a peer's tunnel, which ends when its certificate is revoked.
    Tunnel(HboneStream, StreamLease, std::net::SocketAddr),
    /// Through the gateway of another network.
    Beyond(Box<NestedStream>, std::net::SocketAddr),
}

/// Connects to where `route` leads.
pub(super) async fn connect(
    accepted: &Accepted,
    source: &Arc<Workload>,
    route: &OutboundRoute,
) -> Result<Server, OutboundError> {
    let (process, began) = (&accepted.worker.process, Instant::now());
    let server = match &route.via {
        Via::Plain => {
            let pod = &accepted.pod;
            let from = chosen_source(accepted, source, route.target.ip());
            let socket = socket::connect_as(&pod.netns, route.target, from, &pod.socket).await;
            Server::Plain(socket.map_err(OutboundError::Dial)?)
        }
        Via::Hbone { peer, authority, expected } => {
            let target = PeerTarget { peer: *peer, authority, expected };
            let request = request(accepted, source, route, authority, None)?;
            let (stream, lease) = open_stream(accepted, source, &request, &target).await?;
            // A tunnel that must end takes connections for a moment still.
            if process.revocations.is_revoked(lease.chain()) {
                return Err(Arc::new(ConnectError::Revoked { peer: *peer }).into());
            }
            Server::Tunnel(stream, lease, *peer)
        }
        Via::Gateway { peer, authority, expected, inner_expected } => {
            let target = PeerTarget { peer: *peer, authority, expected };
            // Boxed: most connections do not need the room that its state takes.
            let inner = Box::pin(gateway::open(accepted, source, route, &target, inner_expected)).await?;
            Server::Beyond(Box::new(inner), *peer)
        }
    };
    process.metrics.connected(Direction::Outbound.as_str(), began.elapsed());
    Ok(server)
}

/// The address from which to connect to `to`, if the client chose one: where a pod has several
/// interfaces, the source may decide about the route. It shows by an address that is none of those
/// which the mesh knows of the pod: the kernel redirects a socket to the address that it is bound to,
/// else to the pod's first one.
fn chosen_source(accepted: &Accepted, source: &Workload, to: IpAddr) -> Option<IpAddr> {
    let own = accepted.client.ip();
    let dialled = accepted.stream.local_addr().ok()?.ip().to_canonical();
    let is_chosen = dialled == own && !source.addresses.contains(&own) && own.is_ipv4() == to.is_ipv4();
    is_chosen.then_some(own)
}

impl Server {
    /// Adds to `ends` what only the answer tells.
    pub(super) fn describe(&self, process: &ProcessContext, ends: &mut ConnectionEnds) {
        if let Self::Beyond(inner, _) = self {
            gateway::describe(process, inner, ends);
        }
    }

    /// Copies until both sides are done, or one breaks.
    pub(super) async fn carry(
        self,
        accepted: Accepted,
        counters: &ByteCounters,
    ) -> Result<(), OutboundError> {
        let process = Arc::clone(&accepted.worker.process);
        let limits = process.config.limits;
        let (stream, lease, chain, peer) = match self {
            Self::Plain(server) => {
                let cut = std::future::pending();
                return Ok(stream::relay(accepted.stream, server, counters, limits, cut).await?);
            }
            Self::Tunnel(stream, lease, peer) => {
                let chain = lease.chain().clone();
                (stream, Some(lease), chain, peer)
            }
            Self::Beyond(inner, peer) => (inner.stream, None, inner.chain, peer),
        };
        let revoked = process.revocations.until_revoked(chain);
        let done = stream::tunnel(accepted.stream, stream, SocketIs::Client, counters, limits, revoked).await;
        drop(lease);
        done.map_err(|error| revoked_if_cut(error, peer))
    }
}
