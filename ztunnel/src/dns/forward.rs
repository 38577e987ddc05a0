//! Forwards queries to the resolver that the pod asked, from the pod's netns: with the pod's address
//! and under its network policy. Where it is not known whom the pod asked, to the configured
//! resolvers.
//!
//! The query is forwarded unchanged except for its id, so signatures, options and additional
//! records stay. The id and the port are random, so that an attacker who did not see the query
//! cannot guess them (RFC 5452).

use std::{cell::RefCell, io, net::SocketAddr, slice, time::Duration};

use hickory_proto::op::ResponseCode;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UdpSocket,
    time::{Instant, timeout, timeout_at},
};

use super::{
    health::ResolverHealth,
    message::{self, Transport},
    sockets,
};
use crate::{pod::ServedPod, socket::Dialler};

/// Limit for all attempts together. The C library's resolver gives up an attempt after the same
/// time.
const TOTAL: Duration = Duration::from_secs(5);
/// Time after which a datagram is sent again: it, or its answer, may be lost.
const AGAIN: Duration = Duration::from_secs(2);

/// Bytes that are kept of an answer. A client that has room for more asks again by TCP.
const MOST_KEPT: usize = 4096;

/// The resolver that a pod asked.
#[derive(Debug)]
pub(super) struct AskedResolver {
    pub address: SocketAddr,
    /// Connected to it, if it was found by such a socket.
    pub socket: Option<UdpSocket>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ForwardError {
    #[error("no resolver is configured that pods could reach")]
    NoResolver,
    #[error("the pod holds as many file descriptors as one pod may (budget.pod_descriptors)")]
    NoDescriptors,
    #[error("{resolver} did not answer in time")]
    TimedOut { resolver: SocketAddr },
    #[error("{resolver} has not answered for a while")]
    Away { resolver: SocketAddr },
    #[error("cannot ask {resolver}")]
    Io { resolver: SocketAddr, source: io::Error },
    #[error("{resolver} answered another question")]
    OtherQuestion { resolver: SocketAddr },
}

/// How a pod's queries are forwarded.
#[derive(Debug)]
pub(super) struct Forwarder<'a> {
    pub pod: &'a ServedPod,
    pub health: &'a ResolverHealth,
    /// Where it is not known whom the pod asked.
    pub configured: &'a [SocketAddr],
    pub scratch: &'a RefCell<Box<[u8]>>,
}

/// Asks the resolver that the pod asked, or the configured ones in order until one answers, over the
/// protocol that the client used. An error reply of the last one counts as an answer.
pub(super) async fn ask(
    Forwarder { pod, health, configured, scratch }: Forwarder<'_>,
    asked: Option<AskedResolver>,
    query: &[u8],
    transport: Transport,
) -> Result<Vec<u8>, ForwardError> {
    let Some(_descriptors) = pod.budget.descriptors.take(1) else {
        return Err(ForwardError::NoDescriptors);
    };
    let mut own = query.to_vec();
    let mut last = Err(ForwardError::NoResolver);
    let (one, mut socket) = asked.map_or((None, None), |asked| (Some(asked.address), asked.socket));
    let resolvers = one.as_ref().map_or(configured, slice::from_ref);
    let share = TOTAL / u32::try_from(resolvers.len().max(1)).unwrap_or(1);
    for &resolver in resolvers {
        if !health.may_ask(resolver) {
            last = Err(ForwardError::Away { resolver });
            continue;
        }
        own[..2].copy_from_slice(&rand::random::<[u8; 2]>());
        let answered = match transport {
            Transport::Udp => match socket.take().map_or_else(|| sockets::connected(pod, resolver), Ok) {
                Ok(socket) => by_udp(&socket, &own, share, scratch).await,
                Err(error) => Err(error),
            },
            Transport::Tcp => {
                timeout(share, by_tcp(pod, resolver, &own)).await.map_err(io::Error::from).flatten()
            }
        };
        match &answered {
            Ok(_) => health.answered(resolver),
            Err(_) => health.lost(resolver),
        }
        last = match answered {
            Ok(reply) if !message::answers(&own, &reply) => Err(ForwardError::OtherQuestion { resolver }),
            Ok(mut reply) => {
                reply[..2].copy_from_slice(&query[..2]);
                // Another resolver may have an answer.
                if !matches!(message::code(&reply), ResponseCode::ServFail | ResponseCode::Refused) {
                    return Ok(reply);
                }
                Ok(reply)
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Err(ForwardError::TimedOut { resolver }),
            Err(source) => Err(ForwardError::Io { resolver, source }),
        };
    }
    last
}

/// Sends the query, repeats it after a while, and waits for its answer. Other datagrams are
/// dropped.
async fn by_udp(
    socket: &UdpSocket,
    query: &[u8],
    within: Duration,
    scratch: &RefCell<Box<[u8]>>,
) -> io::Result<Vec<u8>> {
    let end = Instant::now() + within;
    loop {
        socket.send(query).await?;
        let again = end.min(Instant::now() + AGAIN);
        loop {
            let Ok(readable) = timeout_at(again, socket.readable()).await else { break };
            readable?;
            let mut scratch = scratch.borrow_mut();
            let reply = match socket.try_recv(&mut scratch) {
                Ok(length) => &scratch[..length],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
            };
            if !message::answers(query, reply) {
                continue;
            }
            if reply.len() <= MOST_KEPT {
                return Ok(reply.to_vec());
            }
            return message::truncated(reply).ok_or_else(|| io::ErrorKind::InvalidData.into());
        }
        if Instant::now() >= end {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

async fn by_tcp(pod: &ServedPod, to: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let dialler = Dialler { netns: &pod.netns, options: &pod.socket, ready: None };
    let mut stream = dialler.connect(to, None).await?;
    stream.write_all(&framed(query)?).await?;
    let length = stream.read_u16().await?;
    read_message(&mut stream, length).await
}

/// Reads a message of `length` bytes, with no more memory than has arrived.
pub(super) async fn read_message(
    stream: &mut (impl AsyncReadExt + Unpin),
    length: u16,
) -> io::Result<Vec<u8>> {
    let mut message = Vec::new();
    stream.take(length.into()).read_to_end(&mut message).await?;
    if message.len() < length.into() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(message) }
}

/// A message in the TCP format (RFC 1035 §4.2.2).
pub(super) fn framed(message: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    Ok(framed)
}
