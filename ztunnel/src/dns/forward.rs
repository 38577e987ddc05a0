//! Forwards queries to the upstream resolvers, from the pod's netns: with the pod's address and
//! under its network policy.
//!
//! The query is forwarded unchanged except for its id, so signatures, options and additional
//! records stay. The id and the port are random, so that an attacker who did not see the query
//! cannot guess them (RFC 5452).

use std::{io, net::SocketAddr, time::Duration};

use hickory_proto::op::ResponseCode;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{Instant, timeout, timeout_at},
};

use super::{
    message::{self, Transport},
    sockets,
};
use crate::{pod::ServedPod, socket};

/// Limit for all attempts together. The C library's resolver gives up an attempt after the same
/// time.
const TOTAL: Duration = Duration::from_secs(5);
/// Time after which a datagram is sent again: it, or its answer, may be lost.
const AGAIN: Duration = Duration::from_secs(2);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ForwardError {
    #[error("no resolver is configured that pods could reach")]
    NoResolver,
    #[error("{resolver} did not answer in time")]
    TimedOut { resolver: SocketAddr },
    #[error("cannot ask {resolver}")]
    Io { resolver: SocketAddr, source: io::Error },
    #[error("{resolver} answered another question")]
    OtherQuestion { resolver: SocketAddr },
}

/// Queries `resolvers` in order until one answers, over the protocol that the client used. An error
/// reply of the last one counts as an answer.
pub(super) async fn ask(
    pod: &ServedPod,
    resolvers: &[SocketAddr],
    query: &[u8],
    transport: Transport,
) -> Result<Vec<u8>, ForwardError> {
    let mut own = query.to_vec();
    let mut last = Err(ForwardError::NoResolver);
    let share = TOTAL / u32::try_from(resolvers.len().max(1)).unwrap_or(1);
    for &resolver in resolvers {
        own[..2].copy_from_slice(&rand::random::<[u8; 2]>());
        let answered = match transport {
            Transport::Udp => by_udp(pod, resolver, &own, share).await,
            Transport::Tcp => {
                timeout(share, by_tcp(pod, resolver, &own)).await.map_err(io::Error::from).flatten()
            }
        };
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
async fn by_udp(pod: &ServedPod, to: SocketAddr, query: &[u8], within: Duration) -> io::Result<Vec<u8>> {
    let socket = sockets::connected(pod, to)?;
    let end = Instant::now() + within;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        socket.send(query).await?;
        let again = end.min(Instant::now() + AGAIN);
        loop {
            let Ok(received) = timeout_at(again, socket.recv(&mut buffer)).await else { break };
            let length = received?;
            if message::answers(query, &buffer[..length]) {
                buffer.truncate(length);
                return Ok(buffer);
            }
        }
        if Instant::now() >= end {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

async fn by_tcp(pod: &ServedPod, to: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = socket::connect(&pod.netns, to, None, &pod.socket).await?;
    stream.write_all(&framed(query)?).await?;
    let length = stream.read_u16().await?;
    let mut reply = vec![0; usize::from(length)];
    stream.read_exact(&mut reply).await?;
    Ok(reply)
}

/// A message in the TCP format (RFC 1035 §4.2.2).
pub(super) fn framed(message: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    Ok(framed)
}
