//! Follows one connection that an application of a served pod makes: where did it want to go, who is that, and
//! by which way; then copies until it ends.

mod gateway;

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::net::TcpStream;

use crate::{
    discovery::demand::Unanswered,
    hbone::{
        Connect,
        client::{self, ConnectError, Tunnel},
        pool::{Key, Lease},
    },
    identity::Identity,
    lookup::LookupError,
    mesh::{Mesh, Workload, baggage},
    record::{Counters, Direction, Ends, Failure, Record, denied_early},
    route::{self, Outbound, OutboundRoute, RouteError, Via},
    socket,
    stream::{self, SocketIs, Stream, StreamError},
    worker::{Accepted, Shared, UnknownWorkload},
};

/// Why an outbound connection did not come to be, or broke.
#[derive(Debug, thiserror::Error)]
pub enum OutboundError {
    #[error("cannot tell what was dialled")]
    OriginalDst(#[source] io::Error),
    #[error("attempted recursive call to ourselves")]
    Recursive,
    #[error(transparent)]
    UnknownWorkload(#[from] UnknownWorkload),
    #[error(transparent)]
    Route(#[from] RouteError),
    #[error(transparent)]
    Lookup(#[from] LookupError),
    #[error(transparent)]
    Unanswered(#[from] Unanswered),
    #[error("connection failed")]
    Dial(#[source] io::Error),
    #[error("cannot ask for {authority:?}")]
    Request { authority: String, source: http::Error },
    #[error(transparent)]
    Hbone(#[from] Arc<ConnectError>),
    #[error(transparent)]
    Stream(#[from] StreamError),
}

impl Failure for OutboundError {
    fn reason(&self) -> &'static str {
        match self {
            Self::OriginalDst(_) => "no_original_dst",
            Self::Recursive => "recursive",
            Self::UnknownWorkload(_) => "unknown_workload",
            Self::Route(error) => error.reason(),
            Self::Lookup(_) => "lookup",
            Self::Unanswered(_) => "unanswered",
            Self::Dial(_) => "connect",
            Self::Request { .. } => "invalid_request",
            Self::Hbone(error) => error.reason(),
            Self::Stream(error) => error.reason(),
        }
    }

    fn response_flags(&self) -> &'static str {
        match self {
            Self::Dial(_) => "CONNECT",
            Self::Hbone(error) => error.response_flags(),
            _ => "-",
        }
    }
}

/// A connection that was captured on 15001.
pub async fn serve(accepted: Accepted) {
    let client = accepted.client;
    let local = accepted.stream.local_addr().map_or(client, socket::canonical);
    let planned = plan(&accepted).await;
    let (source, route) = match planned {
        Ok(planned) => planned,
        Err((original, error)) => {
            let ends = Ends::new(Direction::Outbound, client, original.unwrap_or(local));
            denied_early(&accepted.worker.shared.metrics, &ends, &error);
            return socket::reset(accepted.stream);
        }
    };
    let metrics = Arc::clone(&accepted.worker.shared.metrics);
    let open = || Record::open(&metrics, ends(&accepted, &source, &route));
    let (record, result) = match &route.via {
        Via::Plain => {
            let record = open();
            let result = plain(accepted, route.target, record.counters()).await;
            (record, result)
        }
        Via::Hbone { peer, authority, expected } => {
            let record = open();
            let way = Way { peer: *peer, authority, expected };
            let result = hbone(accepted, &source, &route, &way, record.counters()).await;
            (record, result)
        }
        Via::Gateway { peer, authority, expected, inner_expected } => {
            let way = Way { peer: *peer, authority, expected };
            return gateway::carry(accepted, &source, &route, &way, inner_expected).await;
        }
    };
    record.close(result.as_ref().copied().map_err(|error| error as &dyn Failure));
}

/// From which workload to where, and how. Errors come with the original destination if that is known.
async fn plan(
    accepted: &Accepted,
) -> Result<(Arc<Workload>, OutboundRoute), (Option<SocketAddr>, OutboundError)> {
    let shared = &accepted.worker.shared;
    let original =
        socket::original_dst(&accepted.stream).map_err(|error| (None, OutboundError::OriginalDst(error)))?;
    let failed = |error: OutboundError| (Some(original), error);
    let (mesh, source) = shared.workload(&accepted.pod).await.map_err(|error| failed(error.into()))?;
    // Whoever dials the tunnel itself has no destination; carrying it would lead back here.
    let to_itself = original.ip().is_loopback() || source.addresses.contains(&original.ip());
    let local = accepted.stream.local_addr().map(|local| local.ip().to_canonical());
    if shared.is_own_port(original.port()) && (to_itself || local.is_ok_and(|local| local == original.ip())) {
        return Err(failed(OutboundError::Recursive));
    }
    let missing = |mesh: &Mesh| route::missing(mesh, &source, original);
    let mesh = shared.informed(mesh, missing).await.map_err(|error| failed(error.into()))?;
    let found =
        route::outbound(&mesh, &source, original, &mut rand::rng()).map_err(|error| failed(error.into()))?;
    let route = match found {
        Outbound::Route(route) => route,
        Outbound::Unlocated(endpoint) => {
            let (lookups, families) = (&accepted.worker.lookups, endpoint.families());
            let found = lookups.address(&endpoint.hostname, families, original.ip()).await;
            shared.metrics.on_demand_dns(&source, &endpoint.hostname);
            endpoint.located(found.map_err(|error| failed(error.into()))?)
        }
    };
    Ok((source, route))
}

fn ends(accepted: &Accepted, source: &Arc<Workload>, route: &OutboundRoute) -> Ends {
    let mut ends = Ends::new(Direction::Outbound, accepted.client, route.target);
    ends.source_workload = Some(Arc::clone(source));
    ends.destination_workload.clone_from(&route.workload);
    ends.destination_service.clone_from(&route.service);
    if let Via::Hbone { peer, .. } | Via::Gateway { peer, .. } = &route.via {
        ends.destination = *peer;
        ends.hbone = Some(route.target);
        ends.source_identity = Some(accepted.pod.identity.clone());
        ends.destination_identity = route.workload.as_ref().map(|workload| workload.identity());
    }
    ends
}

/// The tunnel to go through: who must be at its end, and what to ask for there.
struct Way<'a> {
    peer: SocketAddr,
    authority: &'a str,
    expected: &'a [Identity],
}

async fn plain(accepted: Accepted, target: SocketAddr, counters: &Counters) -> Result<(), OutboundError> {
    let (metrics, began) = (Arc::clone(&accepted.worker.shared.metrics), Instant::now());
    let limits = accepted.worker.shared.config.limits;
    match dial(&accepted, target).await {
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
    way: &Way<'_>,
    counters: &Counters,
) -> Result<(), OutboundError> {
    let (metrics, began) = (Arc::clone(&accepted.worker.shared.metrics), Instant::now());
    let opened = match request(&accepted, source, route, way.authority, None) {
        Ok(request) => pooled(&accepted, &request, way).await,
        Err(error) => Err(error),
    };
    match opened {
        Ok((stream, lease)) => {
            metrics.connected(Direction::Outbound.as_str(), began.elapsed());
            let shared = Arc::clone(&accepted.worker.shared);
            // A tunnel that must end takes connections for a moment still.
            if shared.revocations.is_revoked(lease.chain()) {
                return refuse(accepted, Arc::new(ConnectError::Revoked { peer: way.peer }).into());
            }
            let revoked = shared.revocations.until_revoked(lease.chain().clone());
            let done = stream::tunnel(
                accepted.stream,
                stream,
                SocketIs::Client,
                counters,
                shared.config.limits,
                revoked,
            )
            .await;
            done.map_err(|error| cut_or(error, way.peer))
        }
        Err(error) => refuse(accepted, error),
    }
}

/// Capture accepted the connection before anybody could ask the destination: now it is reset.
fn refuse(accepted: Accepted, error: OutboundError) -> Result<(), OutboundError> {
    socket::reset(accepted.stream);
    Err(error)
}

async fn dial(accepted: &Accepted, target: SocketAddr) -> Result<TcpStream, OutboundError> {
    let pod = &accepted.pod;
    socket::connect(&pod.netns, target, None, &pod.socket).await.map_err(OutboundError::Dial)
}

/// `network`: the one that the request leaves.
fn request(
    accepted: &Accepted,
    source: &Workload,
    route: &OutboundRoute,
    authority: &str,
    network: Option<&str>,
) -> Result<http::Request<()>, OutboundError> {
    let connect = Connect {
        authority,
        baggage: Some(baggage::of_workload(source)),
        client: accepted.client,
        service: route.service.as_ref().map(|service| &*service.hostname),
        network,
    };
    connect.request().map_err(|source| OutboundError::Request { authority: authority.to_owned(), source })
}

/// Sends a request through a tunnel that the connections of the pod share.
async fn pooled(
    accepted: &Accepted,
    request: &http::Request<()>,
    way: &Way<'_>,
) -> Result<(Stream, Lease), OutboundError> {
    let Accepted { pod, worker, .. } = accepted;
    let Way { peer, expected, .. } = *way;
    let key = Key { source: pod.identity.clone(), expected: expected.to_vec(), peer, netns: pod.netns.id() };
    let dial = || {
        let (shared, pod, expected) = (Arc::clone(&worker.shared), Arc::clone(pod), expected.to_vec());
        async move {
            let credentials = shared.certificates.get(&pod.identity).await.map_err(ConnectError::Identity)?;
            let socket = socket::connect(&pod.netns, peer, None, &pod.socket)
                .await
                .map_err(|source| ConnectError::Tcp { peer, source })?;
            let began = Instant::now();
            let tunnel =
                client::handshake(socket, peer, credentials.client(&expected), &shared.config.h2).await;
            shared.metrics.tls_handshake(Direction::Outbound.as_str(), began.elapsed());
            guarded(shared, peer, tunnel?)
        }
    };
    let (_response, stream, lease) = worker.pool.open(&key, request, dial).await?;
    Ok((stream, lease))
}

/// How long the streams of a tunnel that must end have to end by themselves.
const FAREWELL: Duration = Duration::from_millis(50);

/// A tunnel that ends when a certificate of its peer is revoked.
fn guarded(shared: Arc<Shared>, peer: SocketAddr, mut tunnel: Tunnel) -> Result<Tunnel, ConnectError> {
    if !shared.revocations.is_configured() {
        return Ok(tunnel);
    }
    if tunnel.chain.is_empty() {
        shared.metrics.crl.untracked(Direction::Outbound);
    }
    if shared.revocations.is_revoked(&tunnel.chain) {
        shared.metrics.crl.rejected(Direction::Outbound);
        return Err(ConnectError::Revoked { peer });
    }
    let (driver, chain) = (tunnel.driver, tunnel.chain.clone());
    tunnel.driver = Box::pin(async move {
        let revoked = async {
            shared.revocations.until_revoked(chain).await;
            shared.metrics.crl.rejected(Direction::Outbound);
            // The streams first: they say why they are cut.
            tokio::time::sleep(FAREWELL).await;
        };
        tokio::select! {
            ended = driver => ended,
            () = revoked => Ok(()),
        }
    });
    Ok(tunnel)
}

/// Connections of clients are cut for one reason only.
fn cut_or(error: StreamError, peer: SocketAddr) -> OutboundError {
    match error {
        StreamError::Cut => Arc::new(ConnectError::Revoked { peer }).into(),
        error => error.into(),
    }
}
