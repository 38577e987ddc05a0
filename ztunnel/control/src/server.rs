//! The gRPC server: TLS with a certificate from our own root, HTTP/2, two services.
//!
//! Whoever reaches the port can open connections, so handshakes and connections have a budget.

use std::{
    fmt, io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::Stream;
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tracing::{debug, error, warn};
use ztunnel_api::ca::istio_certificate_service_server::IstioCertificateServiceServer;

use crate::{
    authority::{Authority, AuthorityError, CurrentAuthority},
    certificates::CertificateService,
    connection::{Connection, Peer},
    discovery::{DiscoveryService, wire::DiscoveryServer},
    shares::Shares,
};

/// Open connections. A cluster has one or two for each node.
const CONNECTIONS: usize = 20_000;
const HANDSHAKES: usize = 256;
/// Connections of one address, which is a tunnel's pod or node.
const OF_ADDRESS: usize = 128;
/// How long a connection stays without a call that was accepted.
const FIRST_CALL: Duration = Duration::from_secs(20);
const HANDSHAKE: Duration = Duration::from_secs(10);
/// After an accept that failed: most often there are no descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Of the server's own certificate. It is renewed at half of it.
const CERTIFICATE_LIFE: Duration = Duration::from_hours(24);
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Streams of one connection: a tunnel has one for discovery and some for certificates.
const STREAMS: u32 = 256;
/// Bytes.
const LARGEST_CERTIFICATE_REQUEST: usize = 64 << 10;
/// Bytes that a tunnel may send before anybody reads them: those of many wait at a time.
const WINDOW: u32 = 64 << 10;
/// How long calls may go on after the stop.
const DRAIN: Duration = Duration::from_secs(5);

/// The services.
#[derive(Debug)]
pub struct Services {
    /// Discovery.
    pub discovery: DiscoveryService,
    /// Certificates.
    pub certificates: CertificateService,
}

/// Serves at `listener` until `stop`, with a certificate of `authority` for `names`.
///
/// # Errors
/// No certificate can be made for the names, or the server fails.
pub async fn serve(
    listener: TcpListener,
    authority: CurrentAuthority,
    names: Vec<String>,
    services: Services,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let certificate = OwnCertificate::new(authority, names)?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(certificate));
    config.alpn_protocols = vec![b"h2".to_vec()];
    let (sender, accepted) = mpsc::channel(HANDSHAKES);
    let mut accepting = JoinSet::new();
    accepting.spawn(accept(listener, TlsAcceptor::from(Arc::new(config)), sender, stop.clone()));

    let certificates = IstioCertificateServiceServer::new(services.certificates)
        .max_decoding_message_size(LARGEST_CERTIFICATE_REQUEST);
    let serving = Server::builder()
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(WINDOW)
        .add_service(DiscoveryServer::new(services.discovery))
        .add_service(certificates)
        .serve_with_incoming_shutdown(Accepted(accepted), stop.clone().cancelled_owned());
    let late = async {
        stop.cancelled().await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        served = serving => served?,
        () = late => warn!("calls still open after the deadline"),
    }
    accepting.shutdown().await;
    Ok(())
}

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    sender: mpsc::Sender<Connection>,
    stop: CancellationToken,
) {
    let (places, handshaking) = (Arc::new(Semaphore::new(CONNECTIONS)), Arc::new(Semaphore::new(HANDSHAKES)));
    let addresses = Shares::default();
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await.ok()?;
            let turn = Arc::clone(&handshaking).acquire_owned().await.ok()?;
            Some((place, turn, listener.accept().await))
        };
        let Some(Some((place, turn, accepted))) = stop.run_until_cancelled(next).await else { break };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                error!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(of_address) = addresses.take(address.ip(), OF_ADDRESS) else {
            debug!(%address, "refused: its address has {OF_ADDRESS} connections already");
            continue;
        };
        let (acceptor, sender) = (acceptor.clone(), sender.clone());
        handshakes.spawn(async move {
            let _ = stream.set_nodelay(true);
            let peer = Peer::new(address);
            match timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let _ = sender.send(Connection::new(stream, peer.clone(), (place, of_address))).await;
                }
                Ok(Err(error)) => return debug!(%address, %error, "TLS handshake failed"),
                Err(_) => return debug!(%address, "TLS handshake timed out"),
            }
            drop(turn);
            tokio::time::sleep(FIRST_CALL).await;
            if !peer.is_proven() {
                debug!(%address, "cut: no call of it was accepted");
                peer.cut.cancel();
            }
        });
    }
    // The listener closes: new calls go to another replica.
}

/// Connections as they arrive.
struct Accepted(mpsc::Receiver<Connection>);

impl Stream for Accepted {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|connection| connection.map(Ok))
    }
}

/// The server's certificate, renewed when somebody connects.
struct OwnCertificate {
    authority: CurrentAuthority,
    names: Vec<String>,
    held: Mutex<Held>,
}

struct Held {
    issued: Instant,
    by: Arc<Authority>,
    key: Arc<CertifiedKey>,
}

impl fmt::Debug for OwnCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnCertificate").field("names", &self.names).finish_non_exhaustive()
    }
}

/// Why there is no server certificate.
#[derive(Debug, thiserror::Error)]
enum OwnCertificateError {
    #[error("cannot make a server certificate for {names}")]
    Sign { names: String, source: AuthorityError },
    #[error("cannot use the server certificate")]
    Key(#[from] rustls::Error),
}

impl OwnCertificate {
    fn new(authority: CurrentAuthority, names: Vec<String>) -> Result<Self, OwnCertificateError> {
        let by = Arc::clone(&authority.borrow());
        let held = Mutex::new(Held { issued: Instant::now(), key: Self::issue(&by, &names)?, by });
        Ok(Self { authority, names, held })
    }

    fn issue(authority: &Authority, names: &[String]) -> Result<Arc<CertifiedKey>, OwnCertificateError> {
        let issued = authority.serve_as(names, CERTIFICATE_LIFE);
        let (chain, key) =
            issued.map_err(|source| OwnCertificateError::Sign { names: names.join(", "), source })?;
        Ok(Arc::new(CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider())?))
    }
}

impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let by = Arc::clone(&self.authority.borrow());
        if held.issued.elapsed() >= CERTIFICATE_LIFE / 2 || !Arc::ptr_eq(&by, &held.by) {
            match Self::issue(&by, &self.names) {
                Ok(key) => *held = Held { issued: Instant::now(), by, key },
                Err(error) => error!(%error, "the server certificate is not renewed"),
            }
        }
        Some(Arc::clone(&held.key))
    }
}
