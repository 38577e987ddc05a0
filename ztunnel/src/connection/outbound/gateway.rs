//! The way into another network: a tunnel to its gateway and, within it, one to an endpoint that
//! the gateway chooses.

use std::sync::Arc;

use super::tunnel::{PeerTarget, open_stream, request};
use crate::connection::error::OutboundError;
use crate::{
    context::{Accepted, ProcessContext},
    direction::Direction,
    hbone::{
        BAGGAGE,
        client::ConnectError,
        nested::{self, NestedStream},
    },
    identity::Identity,
    mesh::{Workload, baggage},
    record::ConnectionEnds,
    route::OutboundRoute,
};

/// Who answered, in the words of the answer.
pub(super) fn describe(process: &ProcessContext, inner: &NestedStream, ends: &mut ConnectionEnds) {
    if process.config.response_baggage {
        let lines = inner.response.headers().get_all(BAGGAGE).iter();
        let described = baggage::parse(lines.filter_map(|value| value.to_str().ok()));
        ends.destination_workload = Some(Arc::new(described.into_workload(inner.identity.as_ref())));
    }
    ends.destination_identity.clone_from(&inner.identity);
}

/// The stream to the endpoint that the gateway chose.
pub(super) async fn open(
    accepted: &Accepted,
    source: &Workload,
    route: &OutboundRoute,
    target: &PeerTarget<'_>,
    inner_expected: &[Identity],
) -> Result<NestedStream, OutboundError> {
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
    let opened = nested::open(stream, lease, peer, tls, &process.config, &accepted.pod.memory, inner).await;
    let inner = opened.map_err(failed)?;
    if process.revocations.is_revoked(&inner.chain) {
        process.metrics.crl.rejected(Direction::Outbound);
        return Err(failed(ConnectError::Revoked { peer }).into());
    }
    Ok(inner)
}
