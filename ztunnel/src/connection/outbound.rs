//! Follows one connection that an application of a served pod makes: where did it want to go, who
//! is that, and by which way; then copies until it ends.

mod gateway;
mod tunnel;

use std::{net::SocketAddr, sync::Arc, time::Instant};

use tokio::net::TcpStream;

use self::tunnel::{PeerTarget, ends, open_stream, request, revoked_if_cut};
use super::{client::while_waiting, error::OutboundError};
use crate::{
    context::Accepted,
    direction::Direction,
    hbone::client::ConnectError,
    mesh::{MeshView, Workload},
    record::{ByteCounters, ConnectionEnds, ConnectionFailure, ConnectionRecord, record_early_failure},
    route::{self, OutboundDecision, OutboundRoute, Via},
    socket,
    stream::{self, SocketIs},
    workload_lookup::{ensure_known, own_workload},
};

/// A connection that was captured on 15001.
pub(crate) async fn serve(accepted: Accepted) {
    let client = accepted.client;
    let local = accepted.stream.local_addr().map_or(client, socket::canonical);
    let original = socket::original_dst(&accepted.stream).map_err(OutboundError::OriginalDst);
    let dialled = *original.as_ref().unwrap_or(&local);
    let planned = match original {
        Ok(original) => while_waiting(&accepted.stream, plan(&accepted, original)).await,
        Err(error) => Err(error),
    };
    let (source, route) = match planned {
        Ok(planned) => planned,
        Err(error) => {
            let ends = ConnectionEnds::new(Direction::Outbound, client, dialled);
            record_early_failure(&accepted.worker.process.metrics, &ends, &error);
            return socket::reset(accepted.stream);
        }
    };
    let metrics = Arc::clone(&accepted.worker.process.metrics);
    let open = || ConnectionRecord::open(&metrics, ends(&accepted, &source, &route));
    let (record, result) = match &route.via {
        Via::Plain => {
            let record = open();
            let result = plain(accepted, route.target, record.counters()).await;
            (record, result)
        }
        Via::Hbone { peer, authority, expected } => {
            let record = open();
            let target = PeerTarget { peer: *peer, authority, expected };
            let result = hbone(accepted, &source, &route, &target, record.counters()).await;
            (record, result)
        }
        Via::Gateway { peer, authority, expected, inner_expected } => {
            let target = PeerTarget { peer: *peer, authority, expected };
            return gateway::carry(accepted, &source, &route, &target, inner_expected).await;
        }
    };
    record.close(result.as_ref().copied().map_err(|error| error as &dyn ConnectionFailure));
}

/// From which workload to where, and how.
async fn plan(
    accepted: &Accepted,
    original: SocketAddr,
) -> Result<(Arc<Workload>, OutboundRoute), OutboundError> {
    let process = &accepted.worker.process;
    let (mesh, source) = own_workload(process, &accepted.pod).await?;
    // Whoever dials the tunnel itself has no destination; carrying it would lead back here.
    let to_itself = original.ip().is_loopback() || source.addresses.contains(&original.ip());
    let local = accepted.stream.local_addr().map(|local| local.ip().to_canonical());
    if process.config.ports.is_own(original.port())
        && (to_itself || local.is_ok_and(|local| local == original.ip()))
    {
        return Err(OutboundError::Recursive);
    }
    let rule = |view: &MeshView<'_>| route::outbound(view, &source, original, &mut rand::rng());
    let (_, found) = ensure_known(process, &accepted.pod, mesh, rule).await?;
    let route = match found? {
        OutboundDecision::Route(route) => route,
        OutboundDecision::Unlocated(endpoint) => {
            let (resolver, families) = (&accepted.worker.resolver, endpoint.families());
            let found = resolver.address(&endpoint.hostname, families, original.ip()).await;
            process.metrics.on_demand_dns(&source, &endpoint.hostname);
            endpoint.located(found?)
        }
    };
    Ok((source, route))
}

async fn plain(accepted: Accepted, target: SocketAddr, counters: &ByteCounters) -> Result<(), OutboundError> {
    let (metrics, began) = (Arc::clone(&accepted.worker.process.metrics), Instant::now());
    let limits = accepted.worker.process.config.limits;
    match while_waiting(&accepted.stream, dial(&accepted, target)).await {
        Ok(server) => {
            metrics.connected(Direction::Outbound.as_str(), began.elapsed());
            Ok(stream::relay(accepted.stream, server, counters, limits, std::future::pending()).await?)
        }
        Err(error) => refuse(accepted, error),
    }
}

async fn hbone(
    accepted: Accepted,
    source: &Workload,
    route: &OutboundRoute,
    target: &PeerTarget<'_>,
    counters: &ByteCounters,
) -> Result<(), OutboundError> {
    let (metrics, began) = (Arc::clone(&accepted.worker.process.metrics), Instant::now());
    let opening = async {
        let request = request(&accepted, source, route, target.authority, None)?;
        open_stream(&accepted, source, &request, target).await
    };
    match while_waiting(&accepted.stream, opening).await {
        Ok((stream, lease)) => {
            metrics.connected(Direction::Outbound.as_str(), began.elapsed());
            let process = Arc::clone(&accepted.worker.process);
            // A tunnel that must end takes connections for a moment still.
            if process.revocations.is_revoked(lease.chain()) {
                return refuse(accepted, Arc::new(ConnectError::Revoked { peer: target.peer }).into());
            }
            let revoked = process.revocations.until_revoked(lease.chain().clone());
            let done = stream::tunnel(
                accepted.stream,
                stream,
                SocketIs::Client,
                counters,
                process.config.limits,
                revoked,
            )
            .await;
            done.map_err(|error| revoked_if_cut(error, target.peer))
        }
        Err(error) => refuse(accepted, error),
    }
}

/// The connection was accepted before the destination was known to be reachable: reset it.
fn refuse(accepted: Accepted, error: OutboundError) -> Result<(), OutboundError> {
    socket::reset(accepted.stream);
    Err(error)
}

async fn dial(accepted: &Accepted, target: SocketAddr) -> Result<TcpStream, OutboundError> {
    let pod = &accepted.pod;
    socket::connect(&pod.netns, target, None, &pod.socket).await.map_err(OutboundError::Dial)
}
