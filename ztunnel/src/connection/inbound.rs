//! Follows the connections that come to a served pod through a peer's tunnel, port 15008: is the
//! peer who it must be, may it, and will the application take it; then copies until it ends.
//!
//! * `delivery`: what a request means for the pod
//! * `source`: which workload the client is, for labels
//! * `proxy_protocol`: the header for applications that want it
//! * [`neighbour`]: connections from another pod of this node, which come through no tunnel

mod delivery;
pub(super) mod neighbour;
mod proxy_protocol;
mod source;

use std::{io, net::SocketAddr, rc::Rc, sync::Arc, time::Instant};

use delivery::{Delivery, Handover, delivery};
use http::{HeaderMap, HeaderValue, Method, Request};
use source::{Peer, source};
use tokio::{io::AsyncWriteExt, net::TcpStream};
use tracing::debug;

use super::{admission::Subject, application, error::InboundError};
use crate::{
    budget::DescriptorLease,
    context::{Accepted, WorkerContext},
    direction::Direction,
    hbone::{
        BAGGAGE, ConnectTarget, FORWARDED, InvalidTarget, forwarded_host,
        server::{self, ConnectRequest, TlsIo},
    },
    identity::{CertificateChain, Credentials, Identity, first_expiry, peer_identity, until},
    memory::TunnelMemory,
    mesh::{Mesh, Service, Workload, baggage},
    pod::ServedPod,
    record::{ByteCounters, ConnectionEnds, ConnectionFailure, ConnectionRecord, record_early_failure},
    socket,
    stream::{self, SocketIs, StreamError},
    workload_lookup::{ensure_known, for_label, own_workload},
};

/// One tunnel of a peer, or a pod of this node, as its requests see it.
struct InboundTunnel {
    worker: Rc<WorkerContext>,
    pod: Arc<ServedPod>,
    /// The peer that dialled: who it is by its certificate, where by its TCP connection. What it
    /// says in headers is believed for labels only.
    peer: SocketAddr,
    identity: Option<Identity>,
    chain: CertificateChain,
    /// Who the pod proved to be, and by what.
    credentials: Arc<Credentials>,
    /// The address that the peer dialled.
    local: SocketAddr,
}

/// A connection that came in on 15008.
pub(crate) async fn serve(accepted: Accepted) {
    let Accepted { stream, client: peer, pod, worker, descriptors: _descriptors } = accepted;
    let Ok(local) = stream.local_addr().map(socket::canonical) else { return };
    let process = Arc::clone(&worker.process);
    let fail = |error: InboundError| {
        record_early_failure(&process.metrics, &ConnectionEnds::new(Direction::Inbound, peer, local), &error);
    };
    // Until the handshake is done nobody knows who that is.
    let Ok(place) = pod.budget.handshake(peer.ip()).await else {
        socket::reset(stream);
        return process
            .metrics
            .refused(Direction::Inbound.as_str(), InboundError::TooManyHandshakes.reason());
    };
    // The control plane tells the trust domain of the pod, and so who it is.
    let own = match own_workload(&process, &pod).await {
        Ok((_, workload)) => workload.identity(),
        Err(error) => return fail(error.into()),
    };
    let credentials = match process.certificates.get(&own).await {
        Ok(credentials) => credentials,
        Err(error) => return fail(InboundError::Identity(error)),
    };
    let began = Instant::now();
    let tls = server::tls(stream, credentials.server()).await;
    process.metrics.tls_handshake(Direction::Inbound.as_str(), began.elapsed());
    drop(place);
    let tls = match tls {
        Ok(tls) => tls,
        Err(error) => return fail(InboundError::Tls(error)),
    };
    let certificates = tls.get_ref().1.peer_certificates();
    let chain = CertificateChain::of(certificates);
    let identity = match peer_identity(certificates) {
        Ok(identity) => Some(identity),
        Err(error) => return fail(InboundError::Tls(io::Error::other(error))),
    };
    if let Some(untrusted) = identity.as_ref().filter(|client| !credentials.accepts(client)) {
        return fail(InboundError::Untrusted(untrusted.clone()));
    }
    let end = first_expiry(certificates).map_or(credentials.not_after, |end| end.min(credentials.not_after));
    if process.revocations.is_configured() && chain.is_empty() {
        process.metrics.crl.untracked(Direction::Inbound);
    }
    if process.revocations.is_revoked(&chain) {
        process.metrics.crl.rejected(Direction::Inbound);
        return fail(InboundError::Revoked);
    }
    let stop = pod.stop.child_token();
    // No new streams then; those that are open end by themselves, each with its record.
    let over = async {
        tokio::select! {
            () = process.revocations.until_revoked(chain.clone()) => {
                process.metrics.crl.rejected(Direction::Inbound);
            }
            () = until_untrusted(&credentials, identity.as_ref()) => {}
            // A peer proves anew who it is when one of the two certificates has expired.
            () = until(end) => {}
        }
        stop.cancel();
        std::future::pending::<()>().await;
    };
    let tunnel = Rc::new(InboundTunnel {
        worker,
        pod,
        peer,
        identity: identity.clone(),
        chain: chain.clone(),
        credentials: Arc::clone(&credentials),
        local,
    });
    let memory = TunnelMemory::new(&tunnel.pod.memory, process.config.h2.stream_window);
    let tls = TlsIo::new(tls, &memory);
    let served = server::serve(tls, &process.config.h2, memory, stop.clone(), |connect| {
        request(Rc::clone(&tunnel), connect)
    });
    let served = tokio::select! {
        served = served => served,
        () = over => return,
    };
    if let Err(error) = served {
        // Its streams, if there were any, have their own records.
        debug!(src.addr = %peer, dst.addr = %local, %error, "tunnel of a peer ended");
    }
}

/// Resolves when the client's trust domain is accepted no longer.
async fn until_untrusted(credentials: &Credentials, client: Option<&Identity>) {
    match client {
        Some(client) => credentials.until_not_accepted(client).await,
        None => std::future::pending().await,
    }
}

/// A CONNECT request that passed all checks.
struct Admitted {
    subject: Subject,
    workload: Arc<Workload>,
    /// The client, for labels.
    source: Option<Arc<Workload>>,
    delivery: Delivery,
}

async fn request(tunnel: Rc<InboundTunnel>, mut connect: ConnectRequest) {
    let process = &tunnel.worker.process;
    let admitted = match connect.while_wanted(async |request| admit(&tunnel, request).await).await {
        Ok(admitted) => admitted,
        // A peer may do this very often.
        Err(error @ InboundError::ClientLeft) => {
            return process.metrics.refused(Direction::Inbound.as_str(), error.reason());
        }
        Err(error) => {
            let mut ends = ConnectionEnds::new(Direction::Inbound, tunnel.peer, tunnel.local);
            ends.source_identity.clone_from(&tunnel.identity);
            record_early_failure(&process.metrics, &ends, &error);
            return connect.refuse(error.status());
        }
    };
    let record = ConnectionRecord::open(&process.metrics, ends(&tunnel, &admitted));
    let result = carry(&tunnel, &admitted, connect, record.counters()).await;
    record.close(result.as_ref().copied().map_err(|error| error as &dyn ConnectionFailure));
}

/// The checks in the order of their answers: 400 for what is malformed, 503 for what leads nowhere,
/// 401.
async fn admit<B>(tunnel: &InboundTunnel, request: &Request<B>) -> Result<Admitted, InboundError> {
    if request.method() != Method::CONNECT {
        return Err(InboundError::Method(request.method().clone()));
    }
    let authority = request.uri().authority().ok_or(InvalidTarget)?;
    let target: ConnectTarget = authority.as_str().parse()?;
    admit_to(tunnel, &target, request.headers()).await
}

/// The checks of a request for `target`.
async fn admit_to(
    tunnel: &InboundTunnel,
    target: &ConnectTarget,
    headers: &HeaderMap,
) -> Result<Admitted, InboundError> {
    let process = &tunnel.worker.process;
    if let Some(over) = tunnel.is_over() {
        return Err(over);
    }
    let (mesh, workload) = own_workload(process, &tunnel.pod).await?;
    let (mesh, delivery) = ensure_known(process, &tunnel.pod, mesh, |view| {
        delivery(view, &workload, tunnel.local, target, process.config.proxy_to)
    })
    .await?;
    let mut delivery = delivery?;
    let port = delivery.target.port();
    let foreign = tunnel.pod.own_port.is_some_and(|own| own != port);
    if foreign || process.config.ports.is_own(port) {
        return Err(InboundError::Recursive);
    }
    let (client, identity) = (tunnel.peer.ip(), tunnel.identity.as_ref());
    let subject = Subject::new(process, &tunnel.pod, client, identity, delivery.target);
    subject.admit(&mesh, &workload).await?;
    if delivery.service.is_none() {
        delivery.service = forwarded_service(&mesh, &workload, headers);
    }
    let peer = Peer { ip: tunnel.peer.ip(), identity: tunnel.identity.as_ref() };
    let believed = process.config.response_baggage;
    let source = for_label(process, &tunnel.pod, &mesh, identity.is_some(), |view| {
        source(view, &workload, peer, headers, believed)
    });
    Ok(Admitted { subject, workload, source, delivery })
}

/// The service that the client dialled, as its tunnel says: `forwarded: for="…";host=…`. For labels
/// only.
fn forwarded_service(mesh: &Mesh, workload: &Workload, headers: &HeaderMap) -> Option<Arc<Service>> {
    let forwarded = headers.get(FORWARDED)?.to_str().ok()?;
    mesh.service_by_hostname(forwarded_host(forwarded)?, &workload.namespace).cloned()
}

fn ends(tunnel: &InboundTunnel, admitted: &Admitted) -> ConnectionEnds {
    let mut ends = ConnectionEnds::new(Direction::Inbound, tunnel.peer, tunnel.local);
    ends.source_workload.clone_from(&admitted.source);
    ends.source_identity.clone_from(&tunnel.identity);
    ends.hbone = Some(admitted.delivery.target);
    ends.destination_workload = Some(Arc::clone(&admitted.workload));
    ends.destination_identity = Some(tunnel.credentials.identity.clone());
    ends.destination_service.clone_from(&admitted.delivery.service);
    ends
}

async fn carry(
    tunnel: &InboundTunnel,
    admitted: &Admitted,
    mut connect: ConnectRequest,
    counters: &ByteCounters,
) -> Result<(), InboundError> {
    let (process, began) = (&tunnel.worker.process, Instant::now());
    let dialled = connect.while_wanted(async |_| hand_over(tunnel, &admitted.delivery).await).await;
    let (application, _descriptors) = match dialled {
        Ok(dialled) => dialled,
        Err(error) => {
            connect.refuse(error.status());
            return Err(error);
        }
    };
    process.metrics.connected(Direction::Inbound.as_str(), began.elapsed());
    let mut headers = HeaderMap::new();
    if process.config.response_baggage
        && let Ok(value) = HeaderValue::try_from(baggage::of_workload(&admitted.workload))
    {
        headers.insert(BAGGAGE, value);
    }
    let stream = connect.accept(headers).map_err(InboundError::Http)?;
    let cut = tunnel.until_cut(&admitted.subject);
    let limits = process.config.limits;
    let done = stream::tunnel(application, stream, SocketIs::Server, counters, limits, cut).await;
    done.map_err(|error| tunnel.ended(error))
}

impl InboundTunnel {
    /// Resolves when a connection that was admitted may go on no longer.
    async fn until_cut(&self, subject: &Subject) {
        tokio::select! {
            () = subject.until_denied() => {}
            () = self.worker.process.revocations.until_revoked(self.chain.clone()) => {}
            () = until_untrusted(&self.credentials, self.identity.as_ref()) => {}
        }
    }

    /// Why a connection ended early, if it was cut.
    fn ended(&self, error: StreamError) -> InboundError {
        match error {
            StreamError::Cut => self.is_over().unwrap_or(InboundError::PolicyChange),
            error => error.into(),
        }
    }

    /// Why no connection may use it any more, if that is so.
    fn is_over(&self) -> Option<InboundError> {
        if self.worker.process.revocations.is_revoked(&self.chain) {
            return Some(InboundError::Revoked);
        }
        let untrusted = self.identity.as_ref().filter(|client| !self.credentials.accepts(client));
        untrusted.map(|client| InboundError::Untrusted(client.clone()))
    }
}

/// Connects to the application, with the descriptor that this takes.
async fn hand_over(
    tunnel: &InboundTunnel,
    delivery: &Delivery,
) -> Result<(TcpStream, DescriptorLease), InboundError> {
    let descriptors = tunnel.pod.budget.descriptors.take(1).ok_or(InboundError::TooManyConnections)?;
    Ok((dial(tunnel, delivery).await?, descriptors))
}

/// Connects to the application, and sends it a PROXY header if it wants one.
async fn dial(tunnel: &InboundTunnel, delivery: &Delivery) -> Result<TcpStream, InboundError> {
    let (dial, requested) = match delivery.to {
        Handover::Plain => {
            return application::dial(&tunnel.worker, &tunnel.pod, delivery.target, tunnel.peer.ip()).await;
        }
        Handover::Proxy { dial, requested } => (dial, requested),
    };
    let mut application =
        application::dial_itself(&tunnel.worker, &tunnel.pod, dial, tunnel.peer.ip()).await?;
    let header = proxy_protocol::header(tunnel.peer, requested, tunnel.identity.as_ref());
    application.write_all(&header).await.map_err(InboundError::Dial)?;
    Ok(application)
}
