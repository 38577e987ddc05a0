//! Accepts the CONNECT requests of one tunnel.

use std::{future::Future, io};

use bytes::Bytes;
use h2::{Reason, RecvStream, server::SendResponse};
use http::{Request, Response, StatusCode};
use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;

use super::{
    HANDSHAKE_TIMEOUT,
    client::{TLS_READ, TLS_WRITE},
    keepalive::ActivityIo,
    server_settings,
};
use crate::{config::H2Config, stream::HboneStream};

/// A CONNECT request and the handle to answer it.
#[derive(Debug)]
pub(crate) struct ConnectRequest {
    pub request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
}

impl ConnectRequest {
    /// Answers 200; from now on the stream carries the connection.
    pub(crate) fn accept(mut self, headers: http::HeaderMap) -> Result<HboneStream, h2::Error> {
        let mut response = Response::new(());
        *response.headers_mut() = headers;
        let send = self.respond.send_response(response, false)?;
        Ok(HboneStream::new(send, self.request.into_body()))
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
    config: std::sync::Arc<rustls::ServerConfig>,
) -> io::Result<TlsStream<BufReader<TcpStream>>> {
    let socket = BufReader::with_capacity(TLS_READ, socket);
    match timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(config).accept(socket)).await {
        Ok(done) => done.map(|mut tls| {
            tls.get_mut().1.set_buffer_limit(Some(TLS_WRITE));
            tls
        }),
        Err(_) => {
            Err(io::Error::new(io::ErrorKind::TimedOut, format!("not done within {HANDSHAKE_TIMEOUT:?}")))
        }
    }
}

/// Runs `handle` for every request until the peer closes the tunnel. After `stop` it sends GOAWAY,
/// and open streams finish. Dropping the future ends all of them.
pub(crate) async fn serve<T, F>(
    io: T,
    h2: &H2Config,
    stop: CancellationToken,
    handle: impl Fn(ConnectRequest) -> F,
) -> Result<(), h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = ()> + 'static,
{
    let (io, activity) = ActivityIo::new(io);
    let handshake = timeout(HANDSHAKE_TIMEOUT, server_settings(h2).handshake::<_, Bytes>(io)).await;
    let mut connection = handshake.unwrap_or_else(|_| Err(Reason::SETTINGS_TIMEOUT.into()))?;
    let dead = activity.until_dead(connection.ping_pong());
    tokio::pin!(dead);
    let mut streams = JoinSet::new();
    let (mut leaving, mut result) = (false, Ok(()));
    loop {
        tokio::select! {
            next = connection.accept() => match next {
                Some(Ok((request, respond))) => {
                    streams.spawn_local(handle(ConnectRequest { request, respond }));
                }
                Some(Err(error)) => {
                    result = Err(error);
                    break;
                }
                None => break,
            },
            Some(_) = streams.join_next() => {}
            () = stop.cancelled(), if !leaving => {
                leaving = true;
                connection.graceful_shutdown();
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
