//! Connections from another pod of this node. This process would be at both ends of a tunnel between
//! the two, so there is none: what is asked at either end is asked here, and the application is
//! connected once. Records and metrics are those of a connection through a tunnel.

use std::{io, net::SocketAddr, rc::Rc, sync::Arc, time::Instant};

use h2::Reason;
use http::{HeaderMap, StatusCode};
use tokio::net::TcpStream;

use super::{Admitted, InboundTunnel, admit_to, ends, hand_over};
use crate::{
    budget::DescriptorLease,
    connection::error::InboundError,
    context::{ProcessContext, WorkerContext},
    direction::Direction,
    hbone::ConnectTarget,
    identity::{CertificateChain, Credentials},
    mesh::{Service, Workload},
    pod::ServedPod,
    record::{ByteCounters, ConnectionEnds, ConnectionRecord, record_early_failure},
    stream::{self, StreamError},
};

/// What a pod asks of another one. Both have proven who they are.
pub(crate) struct NeighbourRequest<'a> {
    pub client: SocketAddr,
    pub client_credentials: &'a Credentials,
    pub client_workload: &'a Arc<Workload>,
    /// Whom the client asks for.
    pub pod: Arc<ServedPod>,
    pub credentials: Arc<Credentials>,
    /// Where its tunnel would be dialled.
    pub peer: SocketAddr,
    pub target: SocketAddr,
    pub service: Option<&'a Arc<Service>>,
}

/// An application that was connected.
pub(crate) struct Neighbour {
    arrival: InboundTunnel,
    admitted: Admitted,
    application: TcpStream,
    record: ConnectionRecord,
    _descriptors: DescriptorLease,
}

/// Asks whether the pod takes the connection, and connects it.
///
/// # Errors
/// What a tunnel would answer. Its record is written.
pub(crate) async fn connect(
    worker: &Rc<WorkerContext>,
    asked: NeighbourRequest<'_>,
) -> Result<Neighbour, StatusCode> {
    let process = &worker.process;
    let tracks = process.revocations.is_configured();
    let chain = tracks.then(|| CertificateChain::of(Some(asked.client_credentials.chain())));
    let arrival = InboundTunnel {
        worker: Rc::clone(worker),
        pod: asked.pod,
        peer: asked.client,
        identity: Some(asked.client_credentials.identity.clone()),
        chain: chain.unwrap_or_default(),
        credentials: asked.credentials,
        local: asked.peer,
    };
    let refused = |error: &InboundError| {
        let mut ends = ConnectionEnds::new(Direction::Inbound, arrival.peer, arrival.local);
        ends.source_identity.clone_from(&arrival.identity);
        record_early_failure(&process.metrics, &ends, error);
        count_if_revoked(process, error);
        error.status()
    };
    let target = ConnectTarget::Address(asked.target);
    let mut admitted =
        admit_to(&arrival, &target, &HeaderMap::new()).await.map_err(|error| refused(&error))?;
    admitted.source = Some(Arc::clone(asked.client_workload));
    if admitted.delivery.service.is_none() {
        admitted.delivery.service = asked.service.cloned();
    }
    let began = Instant::now();
    let opening = Opening(Some(ConnectionRecord::open(&process.metrics, ends(&arrival, &admitted))));
    let connected = hand_over(&arrival, &admitted.delivery).await;
    let Some(record) = opening.end() else { return Err(StatusCode::SERVICE_UNAVAILABLE) };
    match connected {
        Ok((application, descriptors)) => {
            process.metrics.connected(Direction::Inbound.as_str(), began.elapsed());
            Ok(Neighbour { arrival, admitted, application, record, _descriptors: descriptors })
        }
        Err(error) => {
            let status = error.status();
            record.close(Err(&error));
            Err(status)
        }
    }
}

/// A record whose connection is being made. Dropped meanwhile, the client left.
struct Opening(Option<ConnectionRecord>);

impl Opening {
    fn end(mut self) -> Option<ConnectionRecord> {
        self.0.take()
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if let Some(record) = self.0.take() {
            record.close(Err(&InboundError::ClientLeft));
        }
    }
}

impl Neighbour {
    /// Copies until both sides are done, or one breaks, and writes the application's record. `cut`: the
    /// client may go on no longer. What is returned is how the client's tunnel would see the end.
    pub(crate) async fn carry(
        self,
        client: TcpStream,
        counters: &ByteCounters,
        cut: impl Future<Output = ()>,
    ) -> Result<(), StreamError> {
        let Self { arrival, admitted, application, record, _descriptors } = self;
        let limits = arrival.worker.process.config.limits;
        let mut cut_by = None;
        let any = async {
            cut_by = Some(tokio::select! {
                () = arrival.until_cut(&admitted.subject) => CutBy::Pod,
                () = deleted(&arrival.pod) => CutBy::Deletion,
                () = cut => CutBy::Client,
            });
        };
        let counters = [counters, record.counters()];
        let done = stream::relay(client, application, &counters, limits, any).await;
        let reset = || StreamError::Reset(Reason::CONNECT_ERROR);
        let (done, seen) = match (done, cut_by) {
            (Ok(()), _) => (Ok(()), Ok(())),
            // The record says it, as that of any connection of the pod.
            (Err(StreamError::Cut), Some(CutBy::Deletion)) => return Err(reset()),
            // As if the client's tunnel had ended.
            (Err(StreamError::Cut), Some(CutBy::Client)) => (Err(reset().into()), Err(StreamError::Cut)),
            (Err(error), _) => {
                let seen = seen_from_afar(&error);
                let ended = arrival.ended(error);
                count_if_revoked(&arrival.worker.process, &ended);
                (Err(ended), Err(seen))
            }
        };
        record.close(done.as_ref().copied().map_err(|error| error as _));
        seen
    }
}

fn count_if_revoked(process: &ProcessContext, error: &InboundError) {
    if let InboundError::Revoked = error {
        process.metrics.crl.rejected(Direction::Inbound);
    }
}

/// What ends a connection before its ends do.
#[derive(Clone, Copy, Debug)]
enum CutBy {
    /// The pod may not be reached any more.
    Pod,
    Deletion,
    Client,
}

/// Resolves when the pod was deleted. One that only left the mesh keeps its connections.
async fn deleted(pod: &ServedPod) {
    pod.stop.cancelled().await;
    pod.deleted().await;
}

/// An end at one side of a tunnel, as its other side sees it.
fn seen_from_afar(error: &StreamError) -> StreamError {
    match error {
        StreamError::Socket(error) => StreamError::Socket(io::Error::from(error.kind())),
        StreamError::HalfClosed(limit) => StreamError::HalfClosed(*limit),
        StreamError::Idle(limit) => StreamError::Idle(*limit),
        StreamError::Reset(_) | StreamError::Tunnel(_) | StreamError::Cut => {
            StreamError::Reset(Reason::CONNECT_ERROR)
        }
    }
}
