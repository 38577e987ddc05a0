//! One tunnel to a peer: TCP from the pod's netns, mutual TLS as the pod, HTTP/2.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use h2::client::SendRequest;
use http::StatusCode;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_rustls::TlsConnector;

use super::{
    HANDSHAKE_TIMEOUT, client_settings, keepalive,
    read_ahead::ReadAhead,
    tls_buffers::{TLS_WRITE, TlsIo},
};
use crate::{
    config::H2Config,
    identity::{CertificateChain, Identity, IdentityError, NoIdentity, first_expiry, peer_identity},
    memory::{MemoryBudget, SendData, TunnelChange, TunnelMemory},
    reason::FailureReason,
};

/// Why no stream to a peer came to be.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No TCP connection.
    #[error("connection failed")]
    Tcp {
        /// The address that was dialled.
        peer: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// The pod has no certificate.
    #[error("no certificate to speak with")]
    Identity(#[source] IdentityError),
    /// The peer was not proved to be who it must be, or did not speak TLS.
    #[error("tls handshake error")]
    Tls {
        /// The address that was dialled.
        peer: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// The session was resumed, and the peer's certificate has expired since it began.
    #[error("the session with {peer} was resumed, and its certificate has expired")]
    Expired {
        /// The address that was dialled.
        peer: SocketAddr,
    },
    /// The revocation list names the peer's certificate.
    #[error("the certificate of {peer} is revoked")]
    Revoked {
        /// The address that was dialled.
        peer: SocketAddr,
    },
    /// The peer does not speak HTTP/2.
    #[error("http2 handshake with {peer} failed")]
    Http {
        /// The address that was dialled.
        peer: SocketAddr,
        /// The cause.
        source: h2::Error,
    },
    /// The CONNECT was not answered.
    #[error("http stream to {peer} failed")]
    Stream {
        /// The address that was dialled.
        peer: SocketAddr,
        /// The cause.
        source: h2::Error,
    },
    /// The peer did not answer the CONNECT in time.
    #[error("{peer} did not answer within {limit:?}")]
    NoAnswer {
        /// The address that was dialled.
        peer: SocketAddr,
        /// `hbone.answer_limit`.
        limit: Duration,
    },
    /// The CONNECT was refused with this status.
    #[error("http status: {0}")]
    Status(StatusCode),
    /// In the tunnel within the gateway's.
    #[error("behind the gateway, to {authority}")]
    Inner {
        /// The destination beyond the gateway.
        authority: String,
        /// What failed there.
        source: Box<Self>,
    },
    /// Another connection dialled the tunnel, and ended before it was done.
    #[error("the tunnel's task ended before it was connected")]
    Abandoned,
}

impl ConnectError {
    /// For logs and metrics.
    pub fn reason(&self) -> FailureReason {
        match self {
            Self::Tcp { .. } => FailureReason::Connect,
            Self::Identity(_) => FailureReason::Identity,
            Self::Tls { .. } | Self::Expired { .. } => FailureReason::Tls,
            Self::Revoked { .. } => FailureReason::Revoked,
            Self::Http { .. } => FailureReason::H2Handshake,
            Self::Stream { .. } | Self::Abandoned => FailureReason::H2Stream,
            Self::NoAnswer { .. } => FailureReason::NoAnswer,
            Self::Status(_) => FailureReason::RefusedByPeer,
            Self::Inner { source, .. } => source.reason(),
        }
    }

    /// Whether it is this peer that cannot be reached, or, if the application `is_behind` it, cannot
    /// reach that. Others may. A waypoint or gateway that answers is not to blame for what is behind.
    pub(crate) fn is_of_peer(&self, is_behind: bool) -> bool {
        match self {
            Self::Tcp { source, .. } => is_of_peer(source),
            Self::Tls { .. }
            | Self::Expired { .. }
            | Self::Revoked { .. }
            | Self::Http { .. }
            | Self::Stream { .. } => true,
            Self::NoAnswer { .. } => is_behind,
            // Any other status is an answer, such as that policy forbids it.
            Self::Status(status) => is_behind && status.is_server_error(),
            Self::Inner { .. } | Self::Identity(_) | Self::Abandoned => false,
        }
    }

    /// Istio's flags for it.
    pub fn response_flags(&self) -> &'static str {
        match self {
            Self::Tcp { .. } => "CONNECT",
            Self::Identity(_) => "IDENTITY_ERROR",
            Self::Tls { .. } | Self::Expired { .. } => "TLS_FAILURE",
            Self::Revoked { .. } => "CERT_REVOKED",
            Self::Http { .. } => "H2_HANDSHAKE_FAILURE",
            Self::Status(StatusCode::UNAUTHORIZED) => "DENY",
            Self::Inner { source, .. } => source.response_flags(),
            Self::Stream { .. } | Self::Abandoned | Self::NoAnswer { .. } | Self::Status(_) => "-",
        }
    }
}

/// Whether a connect failed at the other end, and not for lack of something here.
pub(crate) fn is_of_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut};
    let kinds = [ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut];
    kinds.contains(&error.kind())
}

/// A tunnel that was just opened. It lives as long as `driver` is polled, which ends when every
/// clone of `requests` and every stream are gone, or when the peer is.
pub struct PeerTunnel {
    /// Opens streams.
    pub requests: SendRequest<SendData>,
    /// Who the peer proved to be.
    pub identity: Option<Identity>,
    /// By which certificates.
    pub chain: CertificateChain,
    /// When the first certificate of the two ends expires. New streams need another tunnel then.
    pub end: Option<SystemTime>,
    /// What its streams may make this process hold.
    pub(crate) memory: TunnelMemory,
    /// Moves the bytes of all streams.
    pub driver: Pin<Box<dyn Future<Output = Result<(), h2::Error>>>>,
}

impl std::fmt::Debug for PeerTunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerTunnel").field("requests", &self.requests).finish_non_exhaustive()
    }
}

/// TLS and HTTP/2 over a connection to `peer`. `budget`: the pod's.
///
/// # Errors
/// A handshake failed or took too long, or the peer's certificate is revoked.
pub async fn handshake<S>(
    socket: S,
    peer: SocketAddr,
    tls: Arc<rustls::ClientConfig>,
    h2: &H2Config,
    budget: &Arc<MemoryBudget>,
) -> Result<PeerTunnel, ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    // No name is checked or sent: the peer is who its SPIFFE id says. Sessions are kept by this
    // name, and one replica cannot resume those of another.
    let name = ServerName::IpAddress(peer.ip().to_canonical().into());
    let tls = TlsConnector::from(tls).connect(name, ReadAhead::new(socket));
    let late = || io::Error::new(io::ErrorKind::TimedOut, format!("not done within {HANDSHAKE_TIMEOUT:?}"));
    let tls = timeout(HANDSHAKE_TIMEOUT, tls).await.unwrap_or_else(|_| Err(late()));
    let mut tls = tls.map_err(|source| ConnectError::Tls { peer, source })?;
    tls.get_mut().1.set_buffer_limit(Some(TLS_WRITE));
    let certificates = tls.get_ref().1.peer_certificates();
    let chain = CertificateChain::of(certificates);
    let identity = peer_identity(certificates).map_err(|error| match error {
        NoIdentity::Expired => ConnectError::Expired { peer },
        NoIdentity::Missing => ConnectError::Tls { peer, source: io::Error::other(error) },
    })?;
    let end = first_expiry(certificates);
    let memory = TunnelMemory::new(budget, h2.stream_window);
    let io = TlsIo::new(tls, &memory);
    Ok(PeerTunnel { identity: Some(identity), chain, end, ..http(io, peer, h2, memory).await? })
}

/// HTTP/2 alone. The client's half of the handshake does not wait for the server's.
pub(super) async fn http<T>(
    io: T,
    peer: SocketAddr,
    h2: &H2Config,
    memory: TunnelMemory,
) -> Result<PeerTunnel, ConnectError>
where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let (io, activity) = keepalive::observed(io);
    let handshake = client_settings(h2, memory.initial_window()).handshake::<_, SendData>(io).await;
    let (requests, mut connection) = handshake.map_err(|source| ConnectError::Http { peer, source })?;
    let alive = activity.until_dead(connection.ping_pong(), memory.clone());
    let state = memory.clone();
    let driver = Box::pin(async move {
        tokio::pin!(alive);
        loop {
            tokio::select! {
                ended = &mut connection => return ended,
                () = &mut alive => return Ok(()),
                change = state.changed() => match change {
                    TunnelChange::Window(window) => {
                        state.announced(window, connection.set_initial_window_size(window).is_ok());
                    }
                    // The pool opens no more streams here. The connection ends after the last one.
                    TunnelChange::Leave => {}
                },
            }
        }
    });
    Ok(PeerTunnel { requests, identity: None, chain: CertificateChain::default(), end: None, memory, driver })
}
