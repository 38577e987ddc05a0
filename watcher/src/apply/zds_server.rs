//! Handing pods to tunnels: the serving side of ZDS (Istio's protocol between node agent and tunnel).
//!
//! A unix seqpacket socket, one protobuf message per packet. The tunnel says hello; then every message of
//! ours is answered by an acknowledgement, in their order: first all pods (`add`, each with the fd of its
//! netns), then `snapshot_sent`, then changes as they come. Several tunnels may be connected, as during an
//! upgrade.
//!
//! Istio's node agent waits for each answer before it says the next thing. We say a number of things at once: a label
//! may be about a whole node, and for each of its pods two processes would have to be woken in turn.
//!
//! This file speaks the protocol; what is said is decided by [`crate::agent`], which gets [`Event`]s and
//! gives each tunnel [`Command`]s.

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
use socket2::{SockRef, Socket, Type};
use tokio::{
    io::unix::AsyncFd,
    sync::{mpsc, oneshot},
    task::{JoinHandle, JoinSet},
    time::timeout,
};
use tracing::{debug, warn};
use ztunnel_api::zds::{
    AddWorkload, DelWorkload, SnapshotSent, Version, WorkloadInfo, WorkloadRequest, WorkloadResponse,
    ZdsHello, workload_request::Payload as Request, workload_response::Payload as Response,
};

use crate::{
    observe::processes,
    plan::Workload,
    sys::pollable,
    unix_socket::{Bound, SocketFile},
};

/// The protocol's limit for one packet.
const MAX_PACKET: usize = 1024;
/// Messages that wait for their answers. Few enough for both sides' socket buffers, whatever they are about.
const AT_ONCE: usize = 64;
/// A tunnel that does not answer for so long is taken for dead.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// A tunnel's connection.
pub type Conn = u64;

/// What happens on the tunnels' connections.
#[derive(Debug)]
pub enum Event {
    /// A tunnel is there. Dropping `welcome` turns it away.
    Hello { conn: Conn, pid: i32, welcome: oneshot::Sender<Welcome> },
    /// It took the pod, or said why not.
    Added { conn: Conn, offer: OfferId, error: Option<String> },
    /// It let go of the pod, or never had it.
    Withdrawn { conn: Conn, serial: u64 },
    /// It knows all pods.
    SnapshotTaken { conn: Conn },
    /// The connection ended.
    Gone { conn: Conn, reason: String },
}

/// What a tunnel gets at the start, and where it gets more from.
#[derive(Debug)]
pub struct Welcome {
    pub snapshot: Vec<Command>,
    pub commands: mpsc::UnboundedReceiver<Command>,
}

/// Which offer of which pod: the same uid may be offered, withdrawn and offered again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferId {
    pub uid: String,
    pub serial: u64,
}

/// What a tunnel is told.
#[derive(Clone, Debug)]
pub enum Command {
    /// With the pod's netns, where it is open already; else it is found through the pod's processes.
    Add(OfferId, Workload, Option<Arc<OwnedFd>>),
    Del(OfferId),
}

/// Serves tunnels until it is dropped.
#[derive(Debug)]
pub struct Server {
    accepting: JoinHandle<()>,
    _file: SocketFile,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Ends the connections too: their tasks belong to this one.
        self.accepting.abort();
    }
}

impl Server {
    /// Listens at `path`.
    pub fn bind(path: &Path, events: mpsc::UnboundedSender<Event>) -> io::Result<Self> {
        let (socket, file) = Bound::new(path, Type::SEQPACKET)?.into_parts();
        let listener = pollable(socket.into())?;
        Ok(Self { accepting: tokio::spawn(accept(listener, events)), _file: file })
    }
}

async fn accept(listener: AsyncFd<OwnedFd>, events: mpsc::UnboundedSender<Event>) {
    let mut connections = JoinSet::new();
    let mut next: Conn = 1;
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = accept_one(&listener) => match accepted {
                Ok(socket) => {
                    connections.spawn(connection(next, socket, events.clone()));
                    next += 1;
                }
                Err(error) => {
                    // Out of fds, most likely: trying again at once would spin.
                    warn!(%error, "cannot accept a tunnel");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            },
        }
    }
}

async fn accept_one(listener: &AsyncFd<OwnedFd>) -> io::Result<Socket> {
    loop {
        let mut guard = listener.readable().await?;
        if let Ok(accepted) = guard.try_io(|listener| SockRef::from(listener).accept()) {
            let (socket, _) = accepted?;
            socket.set_nonblocking(true)?;
            return Ok(socket);
        }
    }
}

async fn connection(conn: Conn, socket: Socket, events: mpsc::UnboundedSender<Event>) {
    let reason = match serve(conn, socket, &events).await {
        Ok(()) => "closed by the tunnel".to_owned(),
        Err(error) => error.to_string(),
    };
    debug!(conn, reason, "tunnel connection ended");
    let _ = events.send(Event::Gone { conn, reason });
}

async fn serve(conn: Conn, socket: Socket, events: &mpsc::UnboundedSender<Event>) -> io::Result<()> {
    let pid = getsockopt(&socket, PeerCredentials)?.pid();
    let peer = Peer { socket: pollable(socket.into())? };
    let hello = timeout(ANSWER_WITHIN, peer.receive()).await.map_err(|_| invalid("no hello in time"))??;
    let Some(hello) = hello else { return Ok(()) };
    let hello =
        ZdsHello::decode(hello.as_slice()).map_err(|error| invalid(&format!("not a hello: {error}")))?;
    if hello.version() != Version::V1 {
        return Err(invalid(&format!("speaks version {}, expected {}", hello.version, Version::V1 as i32)));
    }
    let (welcome, welcomed) = oneshot::channel();
    let _ = events.send(Event::Hello { conn, pid, welcome });
    let Ok(Welcome { snapshot, mut commands }) = welcomed.await else {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "turned away"));
    };
    let mut first: VecDeque<Told> =
        snapshot.into_iter().map(Told::Command).chain([Told::SnapshotSent]).collect();
    let mut waiting = Waiting::default();
    loop {
        let next = async {
            match first.pop_front() {
                Some(told) => Some(told),
                None => commands.recv().await.map(Told::Command),
            }
        };
        tokio::select! {
            // What is answered first, so that `waiting` stays short.
            biased;
            answer = peer.receive() => match answer? {
                Some(answer) => {
                    let asked = waiting.0.pop_front().map(|(asked, _)| asked);
                    let asked = asked.ok_or_else(|| invalid("sent something without being asked"))?;
                    let _ = events.send(asked.answered(conn, error_in(&answer)?)?);
                }
                None => return Ok(()),
            },
            told = next, if waiting.0.len() < AT_ONCE => match told {
                Some(Told::SnapshotSent) => {
                    peer.tell(Request::SnapshotSent(SnapshotSent {}), None).await?;
                    waiting.add(Asked::Snapshot);
                }
                Some(Told::Command(Command::Del(offer))) => {
                    peer.tell(Request::Del(DelWorkload { uid: offer.uid.clone() }), None).await?;
                    waiting.add(Asked::Del(offer));
                }
                Some(Told::Command(Command::Add(offer, workload, netns))) => match open(&workload, netns) {
                    // Closed right after: an fd keeps a netns alive that its pod has left.
                    Ok(netns) => {
                        peer.tell(add(&offer.uid, workload), Some(netns)).await?;
                        waiting.add(Asked::Add(offer));
                    }
                    Err(error) => {
                        let _ = events.send(Event::Added { conn, offer, error: Some(error.to_string()) });
                    }
                },
                None => return Ok(()),
            },
            () = waiting.overdue() => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "no acknowledgement in time"));
            }
        }
    }
}

fn open(workload: &Workload, netns: Option<Arc<OwnedFd>>) -> io::Result<Arc<OwnedFd>> {
    match netns {
        Some(netns) => Ok(netns),
        None => processes::open_netns(&workload.pod_cgroup, workload.netns).map(Arc::new),
    }
}

/// What is still to be said.
enum Told {
    Command(Command),
    SnapshotSent,
}

/// What was said.
enum Asked {
    Add(OfferId),
    Del(OfferId),
    Snapshot,
}

impl Asked {
    /// What it means that the tunnel took it, or refused with `error`.
    fn answered(self, conn: Conn, error: Option<String>) -> io::Result<Event> {
        Ok(match self {
            Self::Add(offer) => Event::Added { conn, offer, error },
            Self::Del(offer) => {
                if let Some(error) = error {
                    warn!(uid = offer.uid, error, "the tunnel refused to let go of a pod");
                }
                Event::Withdrawn { conn, serial: offer.serial }
            }
            Self::Snapshot => match error {
                None => Event::SnapshotTaken { conn },
                Some(error) => return Err(invalid(&format!("refused the snapshot: {error}"))),
            },
        })
    }
}

/// What has not been answered yet, and since when, the oldest first.
#[derive(Default)]
struct Waiting(VecDeque<(Asked, Instant)>);

impl Waiting {
    fn add(&mut self, asked: Asked) {
        self.0.push_back((asked, Instant::now()));
    }

    /// Until the tunnel has to be taken for dead.
    async fn overdue(&self) {
        match self.0.front() {
            Some((_, since)) => tokio::time::sleep_until((*since + ANSWER_WITHIN).into()).await,
            None => std::future::pending().await,
        }
    }
}

/// What an acknowledgement says to be wrong.
fn error_in(answer: &[u8]) -> io::Result<Option<String>> {
    let answer = WorkloadResponse::decode(answer)
        .map_err(|error| invalid(&format!("not an acknowledgement: {error}")))?;
    match answer.payload {
        Some(Response::Ack(ack)) => Ok((!ack.error.is_empty()).then_some(ack.error)),
        None => Err(invalid("an answer without acknowledgement")),
    }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

struct Peer {
    socket: AsyncFd<OwnedFd>,
}

impl Peer {
    async fn tell(&self, request: Request, netns: Option<Arc<OwnedFd>>) -> io::Result<()> {
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

fn add(uid: &str, workload: Workload) -> Request {
    Request::Add(AddWorkload {
        uid: uid.to_owned(),
        workload_info: Some(WorkloadInfo {
            name: workload.name,
            namespace: workload.namespace,
            service_account: workload.service_account,
        }),
    })
}
