//! The ZDS client: receives the pods to serve from the node agent (`ztunnel/api/proto/zds.proto`).
//!
//! Every message is answered, in order. If the agent disappears, the served pods stay. After the
//! next snapshot, pods that it does not name are removed.

use std::{
    collections::HashSet,
    io::{self, IoSliceMut},
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg, send,
    socket,
};
use prost::Message as _;
use tokio::{io::unix::AsyncFd, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use ztunnel_api::zds::{
    AddWorkload, Version, WorkloadRequest, WorkloadResponse, ZdsHello, workload_request::Payload,
    workload_response,
};

use super::{ServedPods, sys};
use crate::backoff::Backoff;
use crate::pod::PodInfo;
use crate::readiness::ReadyGuard;

/// Maximum size of a message.
const PACKET: usize = 1024;
/// Maximum pause between connection attempts. New pods wait for it after the agent returns. An
/// attempt is cheap, because the agent is on this node; Istio's tunnel waits up to 15 s.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Interval between warnings that there is no agent.
const SAY_AGAIN: Duration = Duration::from_secs(15);
/// One descriptor is expected. There is space for as many as the kernel passes on (`SCM_MAX_FD`):
/// with less, those that did arrive could not be closed.
const DESCRIPTORS: usize = 253;

/// Follows the node agent at `path` until `stop`. `ready` is set while the agent is connected and
/// all its pods are served.
pub async fn run(path: &Path, pods: &mut ServedPods, ready: &mut ReadyGuard, stop: &CancellationToken) {
    let mut backoff = Backoff::up_to(LONGEST_PAUSE);
    let mut warned: Option<Instant> = None;
    loop {
        let session = async {
            let link = Link::open(path)?;
            link.send(&ZdsHello { version: Version::V1.into() }.encode_to_vec()).await?;
            info!(path = %path.display(), "node agent connected");
            backoff.reset();
            warned = None;
            serve(&link, pods, ready).await
        };
        tokio::select! {
            () = stop.cancelled() => return,
            Err(error) = session => {
                if warned.is_none_or(|at| at.elapsed() > SAY_AGAIN) {
                    warned = Some(Instant::now());
                    warn!(path = %path.display(), %error, "no node agent");
                } else {
                    debug!(path = %path.display(), %error, "no node agent");
                }
            }
        }
        ready.pending();
        let mut pause = std::pin::pin!(sleep(backoff.delay()));
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = &mut pause => break,
                () = pods.upkeep() => {}
            }
        }
    }
}

/// Runs one session, up to the first error, such as a disconnected agent.
async fn serve(
    link: &Link,
    pods: &mut ServedPods,
    ready: &mut ReadyGuard,
) -> io::Result<std::convert::Infallible> {
    let mut session = Session { seen: HashSet::new(), snapshot: false };
    ready.pending();
    loop {
        let handled = tokio::select! {
            packet = link.receive() => Some(session.handle(packet?, pods)),
            () = pods.upkeep() => None,
        };
        // Before the agent is answered: who knows the answer finds the readiness that belongs to it.
        if session.snapshot && pods.complete() {
            ready.ready();
        } else {
            ready.pending();
        }
        let Some(handled) = handled else { continue };
        let error = handled.err().unwrap_or_default();
        if !error.is_empty() {
            warn!(error, "message of the node agent refused");
        }
        let ack = workload_response::Payload::Ack(ztunnel_api::zds::Ack { error });
        link.send(&WorkloadResponse { payload: Some(ack) }.encode_to_vec()).await?;
    }
}

struct Session {
    /// Pods that this session has named.
    seen: HashSet<String>,
    snapshot: bool,
}

impl Session {
    /// Handles one message. The error is the text of the negative acknowledgement.
    fn handle(&mut self, packet: Packet, pods: &mut ServedPods) -> Result<(), String> {
        if packet.truncated {
            return Err(format!("message longer than {PACKET} bytes"));
        }
        let message = decode(&packet.data)?;
        debug!(?message, descriptors = packet.descriptors.len(), "node agent says");
        let (uid, info) = match message {
            ZdsMessage::Add { uid, info } => (uid, info),
            _ if !packet.descriptors.is_empty() => return Err("only add carries a descriptor".into()),
            ZdsMessage::Keep { uid } => {
                if self.snapshot {
                    return Err("keep after the snapshot".into());
                }
                if !pods.knows(&uid) {
                    return Err(format!("keep of unknown pod {uid}"));
                }
                self.seen.insert(uid);
                return Ok(());
            }
            ZdsMessage::Del { uid } => {
                self.seen.remove(&uid);
                pods.remove(&uid);
                return Ok(());
            }
            ZdsMessage::SnapshotSent => {
                self.snapshot = true;
                pods.keep_only(&self.seen);
                return Ok(());
            }
        };
        let count = packet.descriptors.len();
        let [netns] = <[OwnedFd; 1]>::try_from(packet.descriptors)
            .map_err(|_| format!("add of {uid} must carry one netns descriptor, has {count}"))?;
        self.seen.insert(uid.clone());
        pods.add(&uid, info, netns).map_err(|error| format!("cannot serve {uid}, trying on: {error}"))
    }
}

/// A message of the node agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ZdsMessage {
    /// Serve this pod; the netns comes with the packet.
    Add {
        /// The pod.
        uid: String,
        /// Its names.
        info: PodInfo,
    },
    /// The pod is still there; only in a snapshot.
    Keep {
        /// The pod.
        uid: String,
    },
    /// Serve it no longer.
    Del {
        /// The pod.
        uid: String,
    },
    /// All pods were sent.
    SnapshotSent,
}

/// Decodes one packet, except its descriptors.
///
/// # Errors
/// The text of the negative acknowledgement.
pub fn decode(packet: &[u8]) -> Result<ZdsMessage, String> {
    let request = WorkloadRequest::decode(packet).map_err(|e| format!("not a WorkloadRequest: {e}"))?;
    Ok(match request.payload.ok_or("message without a known payload")? {
        Payload::Add(add) => {
            let (uid, info) = valid(add)?;
            ZdsMessage::Add { uid, info }
        }
        Payload::Keep(keep) => ZdsMessage::Keep { uid: keep.uid },
        Payload::Del(del) => ZdsMessage::Del { uid: del.uid },
        Payload::SnapshotSent(_) => ZdsMessage::SnapshotSent,
    })
}

fn valid(add: AddWorkload) -> Result<(String, PodInfo), String> {
    let AddWorkload { uid, workload_info } = add;
    if uid.is_empty() {
        return Err("add without uid".into());
    }
    let info = workload_info.ok_or_else(|| format!("add of {uid} without workload_info"))?;
    let info = PodInfo {
        name: info.name.into(),
        namespace: info.namespace.into(),
        service_account: info.service_account.into(),
    };
    if info.namespace.is_empty() || info.service_account.is_empty() || info.name.is_empty() {
        return Err(format!("workload_info of {uid} lacks name, namespace or service account"));
    }
    Ok((uid, info))
}

struct Packet {
    data: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    truncated: bool,
}

/// A seqpacket connection: one message per packet.
struct Link(AsyncFd<OwnedFd>);

impl Link {
    fn open(path: &Path) -> io::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        sys::register(fd).map(Self)
    }

    async fn send(&self, message: &[u8]) -> io::Result<()> {
        let write = |fd: &OwnedFd| Ok(send(fd.as_raw_fd(), message, MsgFlags::MSG_NOSIGNAL)?);
        self.0.async_io(tokio::io::Interest::WRITABLE, write).await.map(|_| ())
    }

    async fn receive(&self) -> io::Result<Packet> {
        self.0.async_io(tokio::io::Interest::READABLE, receive).await
    }
}

fn receive(fd: &OwnedFd) -> io::Result<Packet> {
    let mut data = vec![0; PACKET];
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; DESCRIPTORS]);
    let mut slices = [IoSliceMut::new(&mut data)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(fd.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = part {
            descriptors.extend(sys::own(received));
        }
    }
    let truncated = message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
    let length = message.bytes;
    // This protocol has no empty message: zero bytes mean the end.
    if length == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the node agent closed the connection"));
    }
    data.truncate(length);
    Ok(Packet { data, descriptors, truncated })
}
