//! Streams through the tunnels of peers, which the connections of a pod share.

use std::{
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    connection::error::OutboundError,
    context::{Accepted, ProcessContext},
    direction::Direction,
    hbone::{
        ConnectHeaders,
        client::{self, ConnectError, PeerTunnel},
        pool::{StreamLease, TunnelKey},
    },
    identity::{CertificateChain, Identity},
    mesh::{Workload, baggage},
    record::{ConnectionEnds, UntoldSource},
    route::{OutboundRoute, Source, Via},
    stream::{HboneStream, StreamError},
};

/// The tunnel to use: who must be at its end, and which authority to request there.
pub(super) struct PeerTarget<'a> {
    pub peer: SocketAddr,
    pub authority: &'a str,
    pub expected: &'a [Identity],
}

/// Both ends, for the access record.
pub(super) fn ends(accepted: &Accepted, source: &Source, route: &OutboundRoute) -> ConnectionEnds {
    let mut ends = ConnectionEnds::new(Direction::Outbound, accepted.client, route.target);
    ends.source_workload = Some(Arc::clone(&source.workload));
    if !source.is_told {
        let store = Arc::clone(&accepted.worker.process.store);
        ends.untold_source = Some(UntoldSource::new(Arc::clone(&accepted.pod), store));
    }
    ends.destination_workload.clone_from(&route.workload);
    ends.destination_service.clone_from(&route.service);
    if let Via::Hbone { peer, .. } | Via::Gateway { peer, .. } = &route.via {
        ends.destination = *peer;
        ends.hbone = Some(route.target);
        ends.source_identity = Some(source.identity());
        ends.destination_identity = route.workload.as_ref().map(|workload| workload.identity());
    }
    ends
}

/// `network`: the one that the request leaves.
pub(super) fn request(
    accepted: &Accepted,
    source: &Workload,
    route: &OutboundRoute,
    authority: &str,
    network: Option<&str>,
) -> Result<http::Request<()>, OutboundError> {
    let connect = ConnectHeaders {
        authority,
        baggage: Some(baggage::of_workload(source)),
        client: accepted.client,
        service: route.service.as_ref().map(|service| &*service.hostname),
        network,
    };
    connect.request().map_err(|source| OutboundError::Request { authority: authority.to_owned(), source })
}

/// Sends a request through a tunnel that the connections of the pod share, as `source`.
pub(super) async fn open_stream(
    accepted: &Accepted,
    source: &Workload,
    request: &http::Request<()>,
    target: &PeerTarget<'_>,
) -> Result<(HboneStream, StreamLease), OutboundError> {
    let key = key(accepted, source, target);
    let dial = || dial(accepted, &key);
    let (_response, stream, lease) = accepted.worker.pool.open(&key, request, dial).await?;
    Ok((stream, lease))
}

/// Opens such a tunnel, if there is none. Returns the certificates of its peer.
pub(super) async fn reach(
    accepted: &Accepted,
    source: &Workload,
    target: &PeerTarget<'_>,
) -> Result<CertificateChain, OutboundError> {
    let key = key(accepted, source, target);
    let lease = accepted.worker.pool.reach(&key, || dial(accepted, &key)).await?;
    lease.rely();
    Ok(lease.chain().clone())
}

fn key(accepted: &Accepted, source: &Workload, target: &PeerTarget<'_>) -> TunnelKey {
    let PeerTarget { peer, expected, .. } = *target;
    TunnelKey { source: source.identity(), expected: expected.to_vec(), peer, netns: accepted.pod.netns.id() }
}

/// Opens a tunnel of `key`.
fn dial(
    accepted: &Accepted,
    key: &TunnelKey,
) -> impl Future<Output = Result<PeerTunnel, ConnectError>> + use<> {
    let (worker, pod) = (Rc::clone(&accepted.worker), Arc::clone(&accepted.pod));
    let TunnelKey { source, expected, peer, .. } = key.clone();
    async move {
        let process = Arc::clone(&worker.process);
        let credentials = process.certificates.get(&source).await.map_err(ConnectError::Identity)?;
        let socket = worker
            .dialler(&pod)
            .connect(peer, None)
            .await
            .map_err(|source| ConnectError::Tcp { peer, source })?;
        let began = Instant::now();
        let tunnel =
            client::handshake(socket, peer, credentials.client(&expected), &process.config.h2, &pod.memory)
                .await;
        process.metrics.tls_handshake(Direction::Outbound.as_str(), began.elapsed());
        if let Err(ConnectError::Expired { .. }) = tunnel {
            credentials.forget_sessions(&expected);
        }
        let mut tunnel = tunnel?;
        let own = credentials.not_after;
        tunnel.end = Some(tunnel.end.map_or(own, |end| end.min(own)));
        end_when_revoked(process, peer, tunnel)
    }
}

/// How long the streams of a revoked tunnel may take to end by themselves.
const STREAM_GRACE: Duration = Duration::from_millis(50);

/// Makes the tunnel end when a certificate of its peer is revoked.
fn end_when_revoked(
    process: Arc<ProcessContext>,
    peer: SocketAddr,
    mut tunnel: PeerTunnel,
) -> Result<PeerTunnel, ConnectError> {
    if !process.revocations.is_configured() {
        return Ok(tunnel);
    }
    if tunnel.chain.is_empty() {
        process.metrics.crl.untracked(Direction::Outbound);
    }
    if process.revocations.is_revoked(&tunnel.chain) {
        process.metrics.crl.rejected(Direction::Outbound);
        return Err(ConnectError::Revoked { peer });
    }
    let (driver, chain) = (tunnel.driver, tunnel.chain.clone());
    tunnel.driver = Box::pin(async move {
        let revoked = async {
            process.revocations.until_revoked(chain).await;
            process.metrics.crl.rejected(Direction::Outbound);
            // The streams first: they say why they are cut.
            tokio::time::sleep(STREAM_GRACE).await;
        };
        tokio::select! {
            ended = driver => ended,
            () = revoked => Ok(()),
        }
    });
    Ok(tunnel)
}

/// A client's stream is cut only because its peer's certificate was revoked.
pub(super) fn revoked_if_cut(error: StreamError, peer: SocketAddr) -> OutboundError {
    match error {
        StreamError::Cut => Arc::new(ConnectError::Revoked { peer }).into(),
        error => error.into(),
    }
}
