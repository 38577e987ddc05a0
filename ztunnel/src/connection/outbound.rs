//! Follows one connection that an application of a served pod makes: where did it want to go, who
//! is that, and by which way; then copies until it ends.
//!
//! If an endpoint cannot be connected, another one of the service is tried, each once and all within
//! the time that a connect may take. Nothing that the client said was sent by then.

mod gateway;
mod neighbour;
mod server;
mod tunnel;

use std::{io, net::SocketAddr, sync::Arc, time::Instant};

use tokio::time::timeout_at;
use tracing::debug;

use self::{server::connect, tunnel::ends};
use super::{client::while_waiting, error::OutboundError};
use crate::{
    context::Accepted,
    direction::Direction,
    mesh::{Mesh, MeshView},
    record::{ConnectionEnds, ConnectionFailure, ConnectionRecord, record_early_failure},
    route::{self, Avoid, OutboundDecision, OutboundRoute, RouteError, Source, Via},
    socket,
    workload_lookup::{ensure_known, newcomer, own_workload},
};

/// How many endpoints one connection is tried at. A client must not cause a connect to each of a
/// thousand.
const MOST_ENDPOINTS: usize = 4;

/// A connection that was captured on 15001.
pub(crate) async fn serve(accepted: Accepted) {
    let (client, began) = (accepted.client, Instant::now());
    let process = Arc::clone(&accepted.worker.process);
    let original = original_dst(&accepted);
    let dialled = original
        .as_ref()
        .copied()
        .unwrap_or_else(|_| accepted.stream.local_addr().map_or(client, socket::canonical));
    let planned = match original {
        Ok(original) => while_waiting(&accepted.stream, plan(&accepted, original, &[])).await,
        Err(error) => Err(error),
    };
    let (mut source, mut route) = match planned {
        Ok(planned) => planned,
        Err(error) => {
            let ends = ConnectionEnds::new(Direction::Outbound, client, dialled);
            record_early_failure(&process.metrics, &ends, &error);
            return socket::reset(accepted.stream);
        }
    };
    // Through a gateway only the answer tells who the server is: then the record is opened after it.
    let open = |source: &Source, route: &OutboundRoute| {
        let known = !matches!(route.via, Via::Gateway { .. });
        known.then(|| ConnectionRecord::open(&process.metrics, ends(&accepted, source, route)))
    };
    let mut record = open(&source, &route);
    // The first one has limits of its own; those after it have what it left of the time.
    let limit = Instant::now() + socket::CONNECT_TIMEOUT;
    let mut connected = while_waiting(&accepted.stream, connect(&accepted, &source, &route)).await;
    let mut tried = Vec::new();
    while let Err(error) = &connected
        && error.is_of_endpoint(&route)
    {
        accepted.worker.failed.add(route.endpoint());
        tried.push(route.endpoint());
        if tried.len() == MOST_ENDPOINTS || Instant::now() >= limit {
            break;
        }
        let next = match while_waiting(&accepted.stream, plan(&accepted, dialled, &tried)).await {
            Ok(next) if !tried.contains(&next.1.endpoint()) => next,
            // There is no other one. What the client is told is why the first ones failed.
            _ => break,
        };
        debug!(src.addr = %client, failed = %route.endpoint(), next = %next.1.endpoint(), %error, "trying another endpoint");
        process.metrics.retried(error.reason());
        (source, route) = next;
        match &mut record {
            Some(record) => record.redirect(ends(&accepted, &source, &route)),
            None => record = open(&source, &route),
        }
        let connecting = async {
            let in_time = timeout_at(limit.into(), connect(&accepted, &source, &route)).await;
            in_time.unwrap_or_else(|_| {
                accepted.worker.failed.add(route.endpoint());
                Err(OutboundError::OutOfTime(socket::CONNECT_TIMEOUT))
            })
        };
        connected = while_waiting(&accepted.stream, connecting).await;
    }
    let mut ends = ends(&accepted, &source, &route);
    let result = match connected {
        Ok(server) => {
            accepted.worker.failed.remove(route.endpoint());
            server.describe(&process, &mut ends);
            let record =
                record.get_or_insert_with(|| ConnectionRecord::open_since(&process.metrics, ends, began));
            server.carry(accepted, record.counters()).await
        }
        Err(error) => {
            record.get_or_insert_with(|| ConnectionRecord::open_since(&process.metrics, ends, began));
            // It was accepted before the destination was known to be reachable.
            socket::reset(accepted.stream);
            Err(error)
        }
    };
    if let Some(record) = record {
        record.close(result.as_ref().copied().map_err(|error| error as &dyn ConnectionFailure));
    }
}

/// What the application dialled.
fn original_dst(accepted: &Accepted) -> Result<SocketAddr, OutboundError> {
    let original = socket::original_dst(&accepted.stream).map_err(OutboundError::OriginalDst)?;
    // Nobody recorded one, and it was not kept either, as TPROXY does.
    if !original.is_recorded && original.address.port() == accepted.worker.process.config.ports.outbound {
        return Err(OutboundError::OriginalDst(io::ErrorKind::NotFound.into()));
    }
    Ok(original.address)
}

/// From which workload to where, and how. Not to what was `tried`, if there is another way.
///
/// A pod that is not told yet goes on as a newcomer, unless the way depends on more of it.
async fn plan(
    accepted: &Accepted,
    original: SocketAddr,
    tried: &[SocketAddr],
) -> Result<(Source, OutboundRoute), OutboundError> {
    let process = &accepted.worker.process;
    if let Some((mesh, new)) = newcomer(process, &accepted.pod) {
        match way(accepted, mesh, Source::newcomer(new), original, tried).await {
            Err(OutboundError::Route(RouteError::Untold)) => {}
            found => return found,
        }
    }
    let (mesh, own) = own_workload(process, &accepted.pod).await?;
    way(accepted, mesh, Source::told(own), original, tried).await
}

async fn way(
    accepted: &Accepted,
    mesh: Arc<Mesh>,
    source: Source,
    original: SocketAddr,
    tried: &[SocketAddr],
) -> Result<(Source, OutboundRoute), OutboundError> {
    let process = &accepted.worker.process;
    if process.config.ports.is_own(original.port()) {
        // Which addresses it has is not known.
        source.must_be_told()?;
        // Whoever dials the tunnel itself has no destination; carrying it would lead back here.
        let to_itself = original.ip().is_loopback() || source.addresses.contains(&original.ip());
        let local = accepted.stream.local_addr().map(|local| local.ip().to_canonical());
        if to_itself || local.is_ok_and(|local| local == original.ip()) {
            return Err(OutboundError::Recursive);
        }
    }
    let avoid = Avoid { tried, failed: Some(&accepted.worker.failed) };
    let rule = |view: &MeshView<'_>| route::outbound(view, &source, original, &avoid, &mut rand::rng());
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
    if route.via == Via::Plain && server::may_choose_source(accepted, &source, route.target.ip()) {
        source.must_be_told()?;
    }
    Ok((source, route))
}
