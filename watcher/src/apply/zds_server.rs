//! Handing pods to tunnels: the server side of ZDS (Istio's protocol between node agent and
//! tunnel).
//!
//! A unix seqpacket socket, one protobuf message per packet. The tunnel sends a hello; then it
//! answers every message of ours with an acknowledgement, in order: first all pods (`add`, each
//! with the fd of its netns), then `snapshot_sent`, then changes as they come. Several tunnels may
//! be connected, as during an upgrade.
//!
//! Istio's node agent waits for each answer before it sends the next message. We send a number of
//! messages at once: a label may enroll a whole node, and two processes would have to be woken in
//! turn for each pod.
//!
//! This file speaks the protocol. What is sent is decided by [`crate::agent`], which receives
//! [`ZdsEvent`]s and gives each tunnel [`ZdsCommand`]s.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::socket::{
    ControlMessage, MsgFlags, UnixAddr, getsockopt, recv, sendmsg, sockopt::PeerCredentials,
};
use prost::Message as _;
use socket2::{Socket, Type};
use tokio::{
    io::unix::AsyncFd,
    sync::{mpsc, oneshot},
    time::timeout,
};
use tracing::{debug, warn};
use ztunnel_api::zds::{
    AddWorkload, DelWorkload, SnapshotSent, Version, WorkloadInfo, WorkloadRequest, WorkloadResponse,
    ZdsHello, workload_request::Payload as Request, workload_response::Payload as Response,
};

use crate::{
    observe::processes,
    plan::PodWorkload,
    sys::pollable,
    unix_socket::{Bound, Serving},
};

/// The protocol's limit for one packet, in bytes.
const MAX_PACKET: usize = 1024;
/// Messages that wait for their acknowledgements. Few enough for both sides' socket buffers.
const MAX_PENDING: usize = 64;
/// A tunnel that acknowledges nothing for so long counts as dead.
const ACK_TIMEOUT: Duration = Duration::from_secs(30);

/// A tunnel's connection.
pub(crate) type ConnId = u64;

/// What happens on the tunnels' connections.
#[derive(Debug)]
pub(crate) enum ZdsEvent {
    /// A tunnel connected. Dropping `admission` rejects it.
    Hello { conn: ConnId, pid: i32, admission: oneshot::Sender<Admission> },
    /// It serves the pod, or refused it with `error`.
    Added { conn: ConnId, offer: OfferId, error: Option<String> },
    /// It let go of the pod, or never had it.
    Withdrawn { conn: ConnId, serial: u64 },
    /// It has received all pods.
    SnapshotTaken,
    /// The connection ended.
    Gone { conn: ConnId, reason: String },
}

/// What an admitted tunnel gets at the start, and where more comes from.
#[derive(Debug)]
pub(crate) struct Admission {
    /// All pods.
    pub snapshot: Vec<ZdsCommand>,
    /// Changes.
    pub commands: mpsc::UnboundedReceiver<ZdsCommand>,
}

/// Which offer of which pod: the same uid may be offered, withdrawn and offered again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OfferId {
    /// The pod's uid.
    pub uid: String,
    /// Counts all offers and withdrawals of this run.
    pub serial: u64,
}

/// What is sent to a tunnel.
#[derive(Clone, Debug)]
pub(crate) enum ZdsCommand {
    /// With the pod's netns if it is open already; otherwise it is opened through the pod's
    /// processes.
    Add(OfferId, PodWorkload, Option<Arc<OwnedFd>>),
    /// Let go of the pod.
    Del(OfferId),
}

/// Serves tunnels until it is dropped.
#[derive(Debug)]
pub(crate) struct ZdsServer(Serving);

impl ZdsServer {
    /// Listens at `path`.
    ///
    /// # Errors
    /// As of [`Bound::new`].
    pub(crate) fn bind(path: &Path, events: mpsc::UnboundedSender<ZdsEvent>) -> io::Result<Self> {
        let bound = Bound::new(path, Type::SEQPACKET)?;
        bound.serve("tunnels", move |conn, socket| connection(conn, socket, events.clone())).map(Self)
    }

    /// Resolves with the cause when serving ended, which it does only by a fault.
    pub(crate) async fn failed(&mut self) -> String {
        self.0.failed().await
    }
}

async fn connection(conn: ConnId, socket: Socket, events: mpsc::UnboundedSender<ZdsEvent>) {
    let reason = match serve(conn, socket, &events).await {
        Ok(()) => "closed by the tunnel".to_owned(),
        Err(error) => error.to_string(),
    };
    debug!(conn, reason, "tunnel connection ended");
    let _ = events.send(ZdsEvent::Gone { conn, reason });
}

async fn serve(conn: ConnId, socket: Socket, events: &mpsc::UnboundedSender<ZdsEvent>) -> io::Result<()> {
    let pid = getsockopt(&socket, PeerCredentials)?.pid();
    let peer = Peer { socket: pollable(socket.into())? };
    let hello = timeout(ACK_TIMEOUT, peer.receive()).await.map_err(|_| invalid("no hello in time"))??;
    let Some(hello) = hello else { return Ok(()) };
    let hello =
        ZdsHello::decode(hello.as_slice()).map_err(|error| invalid(&format!("not a hello: {error}")))?;
    if hello.version() != Version::V1 {
        return Err(invalid(&format!("speaks version {}, expected {}", hello.version, Version::V1 as i32)));
    }
    let (admission, admitted) = oneshot::channel();
    let _ = events.send(ZdsEvent::Hello { conn, pid, admission });
    let Ok(Admission { snapshot, mut commands }) = admitted.await else {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "rejected"));
    };
    let mut first: VecDeque<Outgoing> =
        snapshot.into_iter().map(Outgoing::Command).chain([Outgoing::SnapshotSent]).collect();
    let mut pending = PendingAcks::default();
    loop {
        let next = async {
            match first.pop_front() {
                Some(outgoing) => Some(outgoing),
                None => commands.recv().await.map(Outgoing::Command),
            }
        };
        tokio::select! {
            // Acknowledgements first, so that `pending` stays short.
            biased;
            answer = peer.receive() => match answer? {
                Some(answer) => {
                    let ack = pending.pop().ok_or_else(|| invalid("sent an unexpected message"))?;
                    let _ = events.send(ack.received(conn, error_in(&answer)?)?);
                }
                None => return Ok(()),
            },
            outgoing = next, if pending.len() < MAX_PENDING => match outgoing {
                Some(Outgoing::SnapshotSent) => {
                    peer.request(Request::SnapshotSent(SnapshotSent {}), None).await?;
                    pending.push(PendingAck::Snapshot);
                }
                Some(Outgoing::Command(ZdsCommand::Del(offer))) => {
                    peer.request(Request::Del(DelWorkload { uid: offer.uid.clone() }), None).await?;
                    pending.push(PendingAck::Del(offer));
                }
                Some(Outgoing::Command(ZdsCommand::Add(offer, workload, netns))) => {
                    match open(&workload, netns) {
                        // Closed right after: an fd keeps a netns alive that its pod has left.
                        Ok(netns) => {
                            peer.request(add(&offer.uid, workload), Some(netns)).await?;
                            pending.push(PendingAck::Add(offer));
                        }
                        Err(error) => {
                            let error = Some(error.to_string());
                            let _ = events.send(ZdsEvent::Added { conn, offer, error });
                        }
                    }
                }
                None => return Ok(()),
            },
            () = pending.overdue() => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "no acknowledgement in time"));
            }
        }
    }
}

fn open(workload: &PodWorkload, netns: Option<Arc<OwnedFd>>) -> io::Result<Arc<OwnedFd>> {
    match netns {
        Some(netns) => Ok(netns),
        None => processes::open_netns(&workload.pod_cgroup, workload.netns).map(Arc::new),
    }
}

/// What is still to be sent.
enum Outgoing {
    Command(ZdsCommand),
    SnapshotSent,
}

/// What was sent and not acknowledged yet.
enum PendingAck {
    Add(OfferId),
    Del(OfferId),
    Snapshot,
}

impl PendingAck {
    /// What it means that the tunnel acknowledged it, or refused it with `error`.
    fn received(self, conn: ConnId, error: Option<String>) -> io::Result<ZdsEvent> {
        Ok(match self {
            Self::Add(offer) => ZdsEvent::Added { conn, offer, error },
            Self::Del(offer) => {
                if let Some(error) = error {
                    warn!(uid = offer.uid, error, "the tunnel refused to let go of a pod");
                }
                ZdsEvent::Withdrawn { conn, serial: offer.serial }
            }
            Self::Snapshot => match error {
                None => ZdsEvent::SnapshotTaken,
                Some(error) => return Err(invalid(&format!("refused the snapshot: {error}"))),
            },
        })
    }
}

/// Since when each message waits for its acknowledgement, the oldest first.
#[derive(Default)]
struct PendingAcks(VecDeque<(PendingAck, Instant)>);

impl PendingAcks {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn push(&mut self, ack: PendingAck) {
        self.0.push_back((ack, Instant::now()));
    }

    fn pop(&mut self) -> Option<PendingAck> {
        self.0.pop_front().map(|(ack, _)| ack)
    }

    /// Resolves when the tunnel counts as dead.
    async fn overdue(&self) {
        match self.0.front() {
            Some((_, since)) => tokio::time::sleep_until((*since + ACK_TIMEOUT).into()).await,
            None => std::future::pending().await,
        }
    }
}

/// The error in an acknowledgement.
fn error_in(answer: &[u8]) -> io::Result<Option<String>> {
    let answer = WorkloadResponse::decode(answer)
        .map_err(|error| invalid(&format!("not an acknowledgement: {error}")))?;
    match answer.payload {
        Some(Response::Ack(ack)) => Ok((!ack.error.is_empty()).then_some(ack.error)),
        None => Err(invalid("a response without acknowledgement")),
    }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

struct Peer {
    socket: AsyncFd<OwnedFd>,
}

impl Peer {
    async fn request(&self, request: Request, netns: Option<Arc<OwnedFd>>) -> io::Result<()> {
        let packet = WorkloadRequest { payload: Some(request) }.encode_to_vec();
        self.send(&packet, netns.as_deref()).await
    }

    async fn send(&self, packet: &[u8], fd: Option<&OwnedFd>) -> io::Result<()> {
        let fds: Vec<i32> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
        let control: &[ControlMessage<'_>] =
            if fds.is_empty() { &[] } else { &[ControlMessage::ScmRights(&fds)] };
        loop {
            let mut guard = self.socket.writable().await?;
            let sent = guard.try_io(|socket| {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                Ok(sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(packet)], control, flags, None)?)
            });
            if let Ok(sent) = sent {
                return sent.map(drop);
            }
        }
    }

    /// The next packet; `None`: the tunnel closed.
    async fn receive(&self) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = [0; MAX_PACKET + 1];
        loop {
            let mut guard = self.socket.readable().await?;
            if let Ok(received) =
                guard.try_io(|socket| Ok(recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?))
            {
                return match received {
                    Ok(0) => Ok(None),
                    Ok(length) if length > MAX_PACKET => Err(invalid("a packet of more than 1024 bytes")),
                    Ok(length) => Ok(Some(buffer[..length].to_vec())),
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
                    Err(error) => Err(error),
                };
            }
        }
    }
}

fn add(uid: &str, workload: PodWorkload) -> Request {
    Request::Add(AddWorkload {
        uid: uid.to_owned(),
        workload_info: Some(WorkloadInfo {
            name: workload.name,
            namespace: workload.namespace,
            service_account: workload.service_account,
        }),
    })
}
