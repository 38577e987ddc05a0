//! A tunnel inside a stream of another, for connections through the gateway of another network. The
//! gateway carries the inner tunnel and cannot read it.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes};
use h2::Reason;
use http::{Request, Response, StatusCode};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    task::spawn_local,
    time::timeout,
};

use super::{
    client::{self, ConnectError},
    pool::StreamLease,
};
use crate::{
    config::Config,
    identity::{CertificateChain, Identity},
    memory::MemoryBudget,
    stream::HboneStream,
};

/// Bytes per DATA frame; TLS writes in pieces of about this size.
const CHUNK: usize = 256 << 10;

/// The inner stream, and the identity that the server proved.
#[derive(Debug)]
pub(crate) struct NestedStream {
    pub response: Response<()>,
    pub stream: HboneStream,
    pub identity: Option<Identity>,
    pub chain: CertificateChain,
}

/// Opens a tunnel inside `outer` and sends `request` through it. The tunnel carries this one stream
/// and ends with it; it keeps `lease` until then.
pub(crate) async fn open(
    outer: HboneStream,
    lease: StreamLease,
    peer: std::net::SocketAddr,
    tls: Arc<rustls::ClientConfig>,
    config: &Config,
    budget: &Arc<MemoryBudget>,
    request: Request<()>,
) -> Result<NestedStream, ConnectError> {
    let tunnel = client::handshake(Pipe::new(outer), peer, tls, &config.h2, budget).await?;
    let (driver, identity, chain, memory) = (tunnel.driver, tunnel.identity, tunnel.chain, tunnel.memory);
    // The task ends with its only stream, or with the gateway's connection, so it needs no owner.
    // It outlives the stream only to send the last frames.
    #[expect(clippy::disallowed_methods, reason = "it ends with its only stream")]
    spawn_local(async move {
        if let Err(error) = driver.await {
            tracing::debug!(%peer, %error, "tunnel through a gateway ended");
        }
        drop(lease);
    });
    let failed = |source| ConnectError::Stream { peer, source };
    let answered = async {
        let mut requests = tunnel.requests.ready().await?;
        let (response, send) = requests.send_request(request, false)?;
        Ok((response.await?, send))
    };
    let limit = config.pool.answer_limit;
    let answered = timeout(limit, answered).await.map_err(|_| ConnectError::NoAnswer { peer, limit })?;
    let (response, send) = answered.map_err(failed)?;
    let (head, recv) = response.into_parts();
    if head.status != StatusCode::OK {
        return Err(ConnectError::Status(head.status));
    }
    Ok(NestedStream {
        response: Response::from_parts(head, ()),
        stream: HboneStream::new(send, recv, memory.stream()),
        identity,
        chain,
    })
}

/// A stream as a byte stream. If dropped before shutdown, it is reset.
struct Pipe {
    stream: HboneStream,
    /// Received data that is not read yet.
    rest: Bytes,
}

impl Pipe {
    fn new(stream: HboneStream) -> Self {
        Self { stream, rest: Bytes::new() }
    }
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let pipe = &mut *self;
        let (_, recv) = pipe.stream.halves();
        while pipe.rest.is_empty() {
            match std::task::ready!(recv.poll_data(cx)) {
                Some(data) => pipe.rest = data.map_err(io_error)?,
                None => return Poll::Ready(Ok(())),
            }
        }
        let n = pipe.rest.len().min(into.remaining());
        into.put_slice(&pipe.rest[..n]);
        pipe.rest.advance(n);
        pipe.stream.taken(n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let queue = self.stream.queue().clone();
        let room = std::task::ready!(queue.poll_room(cx));
        let (send, _) = self.stream.halves();
        let wanted = data.len().min(CHUNK).min(room);
        send.reserve_capacity(wanted);
        // `poll_capacity` reports only changes, not capacity that exists already.
        while send.capacity() == 0 {
            match std::task::ready!(send.poll_capacity(cx)) {
                Some(granted) => granted.map_err(io_error)?,
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            };
        }
        let n = wanted.min(send.capacity());
        send.send_data(queue.data(Bytes::copy_from_slice(&data[..n]), n), false).map_err(io_error)?;
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(())) // the outer tunnel's task sends
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.stream.end().map_err(io_error))
    }
}

fn io_error(error: h2::Error) -> io::Error {
    match error.reason() {
        Some(Reason::CANCEL | Reason::NO_ERROR | Reason::CONNECT_ERROR) => {
            io::Error::new(io::ErrorKind::ConnectionReset, error)
        }
        _ => io::Error::other(error),
    }
}
