//! The far end of a connection, by whichever way it is reached.

use std::{collections::HashSet, net::IpAddr, sync::Arc, time::Instant};

use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use tokio::net::TcpStream;

use super::{
    gateway, neighbour,
    tunnel::{PeerTarget, open_stream, request, revoked_if_cut},
};
use crate::{
    connection::error::OutboundError,
    context::{Accepted, ProcessContext},
    direction::Direction,
    hbone::{client::ConnectError, nested::NestedStream, pool::StreamLease},
    record::{ByteCounters, ConnectionEnds},
    route::{OutboundRoute, Source, Via},
    stream::{self, HboneStream, SocketIs, StreamError},
};

/// A server that was connected.
pub(super) enum Server {
    Plain(TcpStream),
    /// An application of this node.
    Neighbour(Box<neighbour::Connected>, std::net::SocketAddr),
    /// Through a peer's tunnel, which ends when its certificate is revoked.
    Tunnel(HboneStream, StreamLease, std::net::SocketAddr),
    /// Through the gateway of another network.
    Beyond(Box<NestedStream>, std::net::SocketAddr),
}

/// Connects to where `route` leads.
pub(super) async fn connect(
    accepted: &Accepted,
    source: &Source,
    route: &OutboundRoute,
) -> Result<Server, OutboundError> {
    let (process, began) = (&accepted.worker.process, Instant::now());
    let server = match &route.via {
        Via::Plain => {
            let from = chosen_source(accepted, source, route.target.ip());
            let socket = accepted.worker.dialler(&accepted.pod).connect_as(route.target, from).await;
            Server::Plain(socket.map_err(OutboundError::Dial)?)
        }
        Via::Hbone { peer, authority, expected } => {
            let target = PeerTarget { peer: *peer, authority, expected };
            if let Some(connected) = neighbour::connect(accepted, source, route, &target).await? {
                Server::Neighbour(Box::new(connected), *peer)
            } else {
                let request = request(accepted, source, route, authority, None)?;
                let (stream, lease) = open_stream(accepted, source, &request, &target).await?;
                // A tunnel that must end takes connections for a moment still.
                if process.revocations.is_revoked(lease.chain()) {
                    return Err(Arc::new(ConnectError::Revoked { peer: *peer }).into());
                }
                Server::Tunnel(stream, lease, *peer)
            }
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
fn chosen_source(accepted: &Accepted, source: &Source, to: IpAddr) -> Option<IpAddr> {
    let own = redirected_to_itself(accepted, to)?;
    // A newcomer has one address only (see `may_choose_source`).
    (source.is_told && !source.addresses.contains(&own)).then_some(own)
}

/// Whether a newcomer may have chosen an address. It may not if it has only one.
pub(super) fn may_choose_source(accepted: &Accepted, source: &Source, to: IpAddr) -> bool {
    if source.is_told || redirected_to_itself(accepted, to).is_none() {
        return false;
    }
    let addresses =
        accepted.pod.netns.enter(|| Ok(getifaddrs()?.filter_map(|link| routable(&link)).collect()));
    addresses.map_or(true, |all: HashSet<IpAddr>| {
        all.iter().filter(|one| one.is_ipv4() == to.is_ipv4()).count() > 1
    })
}

/// The client's address, if that is where its connection was redirected to.
fn redirected_to_itself(accepted: &Accepted, to: IpAddr) -> Option<IpAddr> {
    let own = accepted.client.ip();
    let dialled = accepted.stream.local_addr().ok()?.ip().to_canonical();
    (dialled == own && own.is_ipv4() == to.is_ipv4()).then_some(own)
}

/// An address from which others can be reached.
fn routable(link: &InterfaceAddress) -> Option<IpAddr> {
    let address = link.address.as_ref()?;
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    let ip = v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))?;
    let is_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    (!ip.is_loopback() && !is_local).then_some(ip)
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
                return Ok(stream::relay(accepted.stream, server, &[counters], limits, cut).await?);
            }
            Self::Neighbour(connected, peer) => {
                let neighbour::Connected { neighbour, chain } = *connected;
                let revoked = process.revocations.until_revoked(chain);
                let done = neighbour.carry(accepted.stream, counters, revoked).await;
                if let Err(StreamError::Cut) = done {
                    process.metrics.crl.rejected(Direction::Outbound);
                }
                return done.map_err(|error| revoked_if_cut(error, peer));
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
