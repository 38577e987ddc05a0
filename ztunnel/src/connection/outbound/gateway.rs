//! The way into another network: a tunnel to its gateway and, within it, one to an endpoint that
//! the gateway chooses.

use std::{sync::Arc, time::Instant};

use super::tunnel::{PeerTarget, ends, open_stream, request, revoked_if_cut};
use crate::connection::{client::while_waiting, error::OutboundError};
use crate::{
    context::Accepted,
    direction::Direction,
    hbone::{BAGGAGE, client::ConnectError, nested},
    identity::Identity,
    mesh::{Workload, baggage},
    record::{ConnectionFailure, ConnectionRecord},
    route::OutboundRoute,
    socket,
    stream::{self, SocketIs},
};

/// Follows the connection to its end. Who answers is known only from its answer, so the record is
/// opened after it.
pub(super) async fn carry(
    accepted: Accepted,
    source: &Arc<Workload>,
    route: &OutboundRoute,
    target: &PeerTarget<'_>,
    inner_expected: &[Identity],
) {
    let began = Instant::now();
    let metrics = Arc::clone(&accepted.worker.process.metrics);
    let mut ends = ends(&accepted, source, route);
    let opening = open(&accepted, source, route, target, inner_expected);
    let inner = match while_waiting(&accepted.stream, opening).await {
        Ok(inner) => inner,
        Err(error) => {
            let record = ConnectionRecord::open_since(&metrics, ends, began);
            socket::reset(accepted.stream);
            return record.close(Err(&error));
        }
    };
    metrics.connected(Direction::Outbound.as_str(), began.elapsed());
    if accepted.worker.process.config.response_baggage {
        let lines = inner.response.headers().get_all(BAGGAGE).iter();
        let described = baggage::parse(lines.filter_map(|value| value.to_str().ok()));
        ends.destination_workload = Some(Arc::new(described.into_workload(inner.identity.as_ref())));
    }
    ends.destination_identity = inner.identity;
    let record = ConnectionRecord::open_since(&metrics, ends, began);
    let process = Arc::clone(&accepted.worker.process);
    let revoked = process.revocations.until_revoked(inner.chain);
    let result = stream::tunnel(
        accepted.stream,
        inner.stream,
        SocketIs::Client,
        record.counters(),
        process.config.limits,
        revoked,
    )
    .await;
    let result = result.map_err(|error| revoked_if_cut(error, target.peer));
    record.close(result.as_ref().copied().map_err(|error| error as &dyn ConnectionFailure));
}

async fn open(
    accepted: &Accepted,
    source: &Workload,
    route: &OutboundRoute,
    target: &PeerTarget<'_>,
    inner_expected: &[Identity],
) -> Result<nested::NestedStream, OutboundError> {
    let PeerTarget { peer, authority, .. } = *target;
    let process = &accepted.worker.process;
    let outer = request(accepted, source, route, authority, None)?;
    let (stream, lease) = open_stream(accepted, source, &outer, target).await?;
    // Behind the gateway our address means nothing: the network tells that the source is to be
    // known by baggage.
    let inner = request(accepted, source, route, authority, Some(&source.network))?;
    let failed =
        |source| Arc::new(ConnectError::Inner { authority: authority.to_owned(), source: Box::new(source) });
    let credentials = process.certificates.get(&source.identity()).await;
    let tls = credentials.map_err(|error| failed(ConnectError::Identity(error)))?.client(inner_expected);
    let opened =
        nested::open(stream, lease, peer, tls, &process.config.h2, inner, process.config.pool.answer_limit)
            .await;
    let inner = opened.map_err(failed)?;
    if process.revocations.is_revoked(&inner.chain) {
        process.metrics.crl.rejected(Direction::Outbound);
        return Err(failed(ConnectError::Revoked { peer }).into());
    }
    Ok(inner)
}
