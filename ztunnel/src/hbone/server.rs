//! Accepts the CONNECT requests of one tunnel.

use std::{
    future::{Future, poll_fn},
    io,
    sync::Arc,
    time::Duration,
};

use h2::{Reason, RecvStream, server::SendResponse};
use http::{Request, Response, StatusCode};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;

pub(crate) use super::tls_buffers::TlsIo;
use super::{HANDSHAKE_TIMEOUT, keepalive, read_ahead::ReadAhead, server_settings, tls_buffers::TLS_WRITE};
use crate::{
    config::H2Config,
    memory::{SendData, StreamMemory, TunnelChange, TunnelMemory},
    stream::HboneStream,
};

/// A tunnel without streams is closed after this time. Clients close theirs earlier, but one that
/// died cannot, and a tunnel without streams is not asked whether its client lives.
const UNUSED: Duration = Duration::from_mins(10);
/// The same after a GOAWAY: so long its client has to read it and to close. Without this, one that is
/// gone without a word, such as with its netns, would keep a tunnel that is to end.
const FAREWELL: Duration = Duration::from_secs(10);

/// A CONNECT request and the handle to answer it.
#[derive(Debug)]
pub(crate) struct ConnectRequest {
    pub request: Request<RecvStream>,
    respond: SendResponse<SendData>,
    memory: StreamMemory,
}

/// The peer does not wait for the answer any more: it reset the stream, or the tunnel is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Abandoned;

impl ConnectRequest {
    /// Does `work` for the request, unless the peer gives it up first. h2 does not count a stream
    /// that was reset, so whatever is done for it until the answer must be within this.
    pub(crate) async fn while_wanted<T, E: From<Abandoned>>(
        &mut self,
        work: impl AsyncFnOnce(&Request<RecvStream>) -> Result<T, E>,
    ) -> Result<T, E> {
        let Self { request, respond, .. } = self;
        tokio::select! {
            biased;
            _ = poll_fn(|cx| respond.poll_reset(cx)) => Err(Abandoned.into()),
            done = work(request) => done,
        }
    }

    /// Answers 200; from now on the stream carries the connection.
    pub(crate) fn accept(mut self, headers: http::HeaderMap) -> Result<HboneStream, h2::Error> {
        let mut response = Response::new(());
        *response.headers_mut() = headers;
        let send = self.respond.send_response(response, false)?;
        Ok(HboneStream::new(send, self.request.into_body(), self.memory))
    }

    /// Answers with only `status`. Fails only if the tunnel is gone, which its owner notices
    /// anyway.
    pub(crate) fn refuse(mut self, status: StatusCode) {
        let mut response = Response::new(());
        *response.status_mut() = status;
        let _ = self.respond.send_response(response, true);
    }
}

/// The server's half of the TLS handshake.
pub(crate) async fn tls(
    socket: TcpStream,
    config: Arc<rustls::ServerConfig>,
) -> io::Result<TlsStream<ReadAhead<TcpStream>>> {
    match timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(config).accept(ReadAhead::new(socket))).await {
        Ok(done) => done.map(|mut tls| {
            tls.get_mut().1.set_buffer_limit(Some(TLS_WRITE));
            tls
        }),
        Err(_) => {
            Err(io::Error::new(io::ErrorKind::TimedOut, format!("not done within {HANDSHAKE_TIMEOUT:?}")))
        }
    }
}

/// Runs `handle` for every request until the peer closes the tunnel. As many run at once as the peer
/// may have streams; those of streams that ended count until they are done. After `stop` it sends GOAWAY,
/// and open streams finish. Dropping the future ends all of them.
/// `memory`: the tunnel's part of the pod's.
pub(crate) async fn serve<T, F>(
    io: T,
    h2: &H2Config,
    memory: TunnelMemory,
    stop: CancellationToken,
    handle: impl Fn(ConnectRequest) -> F,
) -> Result<(), h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = ()> + 'static,
{
    let (io, activity) = keepalive::observed(io);
    let settings = server_settings(h2, memory.initial_window());
    let handshake = timeout(HANDSHAKE_TIMEOUT, settings.handshake::<_, SendData>(io)).await;
    let mut connection = handshake.unwrap_or_else(|_| Err(Reason::SETTINGS_TIMEOUT.into()))?;
    let dead = activity.until_dead(connection.ping_pong(), memory.clone());
    let unused_for = |limit| {
        let memory = memory.clone();
        async move {
            sleep(limit).await;
            memory.unused_for(limit).await;
        }
    };
    let mut unused = Box::pin(unused_for(UNUSED));
    tokio::pin!(dead);
    let mut streams = JoinSet::new();
    let (mut leaving, mut result) = (false, Ok(()));
    loop {
        let has_room = streams.len() < H2Config::STREAMS as usize;
        tokio::select! {
            // Without room for another one, it still moves the bytes of those that there are.
            next = poll_fn(|cx| {
                if has_room {
                    connection.poll_accept(cx)
                } else {
                    connection.poll_closed(cx).map(|ended| ended.err().map(Err))
                }
            }) => match next {
                Some(Ok((request, respond))) => {
                    let memory = memory.stream();
                    streams.spawn_local(handle(ConnectRequest { request, respond, memory }));
                }
                Some(Err(error)) => {
                    result = Err(error);
                    break;
                }
                None => break,
            },
            Some(_) = streams.join_next() => {}
            change = memory.changed() => match change {
                TunnelChange::Window(window) => {
                    memory.announced(window, connection.set_initial_window_size(window).is_ok());
                }
                TunnelChange::Leave => {
                    leaving = true;
                    connection.graceful_shutdown();
                    unused.set(unused_for(FAREWELL));
                }
            },
            () = &mut unused => {
                if leaving {
                    break; // it did not even answer the GOAWAY
                }
                leaving = true;
                connection.graceful_shutdown();
                unused.set(unused_for(FAREWELL));
            }
            () = stop.cancelled(), if !leaving => {
                leaving = true;
                connection.graceful_shutdown();
                unused.set(unused_for(FAREWELL));
            }
            () = &mut dead => {
                connection.abrupt_shutdown(Reason::NO_ERROR);
                result = Err(Reason::NO_ERROR.into());
                break;
            }
        }
    }
    drop(connection); // what the streams still wait for will not come
    while streams.join_next().await.is_some() {}
    result
}

#[cfg(test)]
mod tests;
