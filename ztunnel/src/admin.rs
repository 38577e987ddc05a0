//! HTTP servers for operators: readiness, metrics, and on loopback the admin server.
//!
//! * [`overview`]: pods, connections, certificates and failures at a glance, as JSON; [`page`]: the
//!   same for a browser
//! * [`dump`]: the whole state, under Istio's names
//! * [`profile`]: CPU and heap profiles
//! * [`scrape`]: answers to scrapes of the metrics
//! * [`server`]: limits on connections and time
//!
//! The servers have threads of their own: nothing that a client does delays control, and readiness is
//! answered however many scrape.

mod dump;
mod overview;
mod page;
mod profile;
mod scrape;
mod server;

pub use overview::{CertificateOverview, FailureCount, LastFailure, Overview, PodOverview};

use std::{
    convert::Infallible,
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    thread,
    time::{Duration, SystemTime},
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Query, Request, State},
    http::{HeaderValue, StatusCode, Uri, header, uri::Authority},
    middleware::{self, Next},
    response::{Html, IntoResponse, Response},
    routing::{get, post},
};
use futures_util::StreamExt as _;
use serde::Deserialize;
use tokio::{
    net::TcpListener,
    runtime::Builder,
    sync::{Semaphore, oneshot},
};
use tokio_util::sync::CancellationToken;
use tower_http::compression::CompressionLayer;
use tracing::{info, warn};

use crate::{
    config::Config, discovery::last_state::Status, identity::Certificates, logging::Logging, mesh::Store,
    metrics::Metrics, readiness::Readiness,
};

use scrape::Scrapes;
use server::Limits;

/// Answers that each server computes at once.
const BLOCKING_THREADS: usize = 2;
/// Bytes. A client that reads slowly holds little more of an answer than this for itself.
const PIECE: usize = 64 << 10;

/// State and handles of the admin server.
#[derive(Clone)]
pub struct Admin {
    /// The configuration.
    pub config: Arc<Config>,
    /// The mesh.
    pub store: Arc<Store>,
    /// The certificates.
    pub certificates: Arc<Certificates>,
    /// The log's filter.
    pub logging: Logging,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// Readiness.
    pub readiness: Readiness,
    /// The pods served, for the dump.
    pub workload_state: Arc<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// Cancelled to shut the process down.
    pub quit: CancellationToken,
    /// What is kept of the control plane's state, if it is.
    pub last_state: Option<Arc<Status>>,
    /// When the process started.
    pub started: SystemTime,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").field("config", &self.config).finish_non_exhaustive()
    }
}

/// An address that cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for {purpose}")]
pub struct BindError {
    /// Which server.
    pub purpose: &'static str,
    /// The address.
    pub address: SocketAddr,
    /// The cause.
    pub source: io::Error,
}

/// The three servers, listening.
#[derive(Debug)]
pub struct Servers {
    admin: TcpListener,
    stats: TcpListener,
    readiness: TcpListener,
}

impl Servers {
    /// Binds all three. Call it before anything else starts, since an address in use must prevent
    /// the start.
    ///
    /// # Errors
    /// [`BindError`] names the address.
    pub async fn bind(config: &Config) -> Result<Self, BindError> {
        Ok(Self {
            admin: bind("admin", config.admin_address).await?,
            stats: bind("metrics", config.stats_address).await?,
            readiness: bind("readiness", config.readiness_address).await?,
        })
    }

    /// Addresses of the admin, metrics and readiness servers.
    ///
    /// # Errors
    /// The kernel cannot name the address of a socket.
    pub fn addresses(&self) -> io::Result<[SocketAddr; 3]> {
        Ok([self.admin.local_addr()?, self.stats.local_addr()?, self.readiness.local_addr()?])
    }

    /// Serves until `stop`.
    ///
    /// # Errors
    /// A server stopped.
    pub async fn serve(self, admin: Admin, stop: CancellationToken) -> io::Result<()> {
        let stats = Router::new()
            .route("/metrics", get(scrape::metrics))
            .route("/stats/prometheus", get(scrape::metrics))
            .with_state(Arc::new(Scrapes::new(Arc::clone(&admin.metrics))));
        let readiness = Router::new().route("/healthz/ready", get(ready)).with_state(admin.readiness.clone());
        let admin = Router::new()
            .route("/", get(index))
            .route("/status", get(status))
            .route("/config_dump", get(config_dump))
            .route("/logging", post(logging))
            .route("/quitquitquit", post(quit))
            .route("/debug/pprof/profile", get(profile::cpu))
            .route("/debug/pprof/heap", get(profile::heap))
            .route("/debug/pprof/heap/profiling", get(profile::heap_state).post(profile::heap_profiling))
            .layer(CompressionLayer::new())
            .layer(middleware::from_fn(refuse_other_sites))
            .with_state(Arc::new(admin));
        let profiles = Limits { answer: Duration::from_secs(330), ..Limits::DEFAULT };
        let admin = start("admin", self.admin, admin, profiles, &stop)?;
        let stats = start("metrics", self.stats, stats, Limits::DEFAULT, &stop)?;
        let readiness = start("readiness", self.readiness, readiness, Limits::DEFAULT, &stop)?;
        // A thread that panics drops its end, too.
        let _ = tokio::join!(admin, stats, readiness);
        Ok(())
    }
}

/// Serves on a thread of its own until `stop`. What is returned resolves when the thread ends.
fn start(
    name: &str,
    listener: TcpListener,
    router: Router,
    limits: Limits,
    stop: &CancellationToken,
) -> io::Result<oneshot::Receiver<()>> {
    let runtime =
        Builder::new_current_thread().enable_all().max_blocking_threads(BLOCKING_THREADS).build()?;
    let (listener, stop) = (listener.into_std()?, stop.clone());
    let (alive, ended) = oneshot::channel::<()>();
    thread::Builder::new().name(format!("{name}-server")).spawn(move || {
        let _alive = alive;
        runtime.block_on(async {
            match TcpListener::from_std(listener) {
                Ok(listener) => server::serve(listener, router, limits, stop).await,
                Err(error) => warn!(%error, "a server cannot use its listener"),
            }
        });
        // What it computes at this moment is for nobody.
        runtime.shutdown_background();
    })?;
    Ok(ended)
}

async fn bind(purpose: &'static str, address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError { purpose, address, source })
}

async fn ready(State(readiness): State<Readiness>) -> (StatusCode, String) {
    match readiness.pending()[..] {
        [] => (StatusCode::OK, "ready\n".to_owned()),
        ref pending => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("not ready, pending: {}\n", pending.join(", ")))
        }
    }
}

/// An answer that is given piece by piece. `held` is dropped when the client has taken nearly all of
/// it, or has left.
fn whole_body<T: Send + 'static>(bytes: Bytes, held: T) -> Response {
    let length = HeaderValue::from(bytes.len());
    let pieces = futures_util::stream::unfold((bytes, held), |(mut bytes, held)| async {
        let piece = bytes.split_to(PIECE.min(bytes.len()));
        (!piece.is_empty()).then_some((Ok::<_, Infallible>(piece), (bytes, held)))
    });
    // What compresses it asks again after the end.
    let mut response = Response::new(Body::from_stream(pieces.fuse()));
    response.headers_mut().insert(header::CONTENT_LENGTH, length);
    response
}

/// Runs `work`, which may be long for a large mesh, on a blocking thread: other clients of the server
/// share this one.
async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Response> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response())
}

async fn index(State(admin): State<Arc<Admin>>) -> Result<Html<String>, Response> {
    off_thread(move || Html(page::page(&Overview::new(&admin)).into_string())).await
}

async fn status(State(admin): State<Arc<Admin>>) -> Result<Json<Overview>, Response> {
    off_thread(move || Json(Overview::new(&admin))).await
}

async fn config_dump(State(admin): State<Arc<Admin>>) -> Response {
    static DUMPS: Semaphore = Semaphore::const_new(2);
    let Ok(held) = DUMPS.try_acquire() else {
        let busy = "two dumps are being read already; try again when one has ended\n";
        return (StatusCode::SERVICE_UNAVAILABLE, busy).into_response();
    };
    match off_thread(move || dump::dump(&admin)).await {
        Ok(Ok(text)) => {
            let mut response = whole_body(text.into(), held);
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(header::CONTENT_TYPE, json);
            response
        }
        Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        Err(failed) => failed,
    }
}

/// Refuses requests that a browser sends from another site. It marks them with `Origin`, or with
/// `Sec-Fetch-Site` if they change nothing; other clients send neither. A site whose name was made to
/// point at loopback sends its own name as `Host`.
async fn refuse_other_sites(request: Request, next: Next) -> Response {
    let own = |origin: &HeaderValue| {
        let uri = origin.to_str().ok().and_then(|origin| origin.parse::<Uri>().ok());
        uri.and_then(|uri| uri.host().map(is_loopback)).unwrap_or(false)
    };
    let headers = request.headers();
    let own_host = |host: &HeaderValue| {
        let authority = host.to_str().ok().and_then(|host| host.parse::<Authority>().ok());
        authority.is_some_and(|authority| is_loopback(authority.host()))
    };
    let from_here = |site: &HeaderValue| matches!(site.as_bytes(), b"same-origin" | b"none");
    if headers.get(header::ORIGIN).is_some_and(|origin| !own(origin))
        || headers.get("sec-fetch-site").is_some_and(|site| !from_here(site))
        || headers.get(header::HOST).is_some_and(|host| !own_host(host))
    {
        return (StatusCode::FORBIDDEN, "requests from other sites are refused\n").into_response();
    }
    next.run(request).await
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

#[derive(Deserialize)]
struct LoggingQuery {
    level: Option<String>,
    reset: Option<String>,
}

async fn logging(State(admin): State<Arc<Admin>>, Query(query): Query<LoggingQuery>) -> Response {
    let changed = match (query.level.as_deref(), &query.reset) {
        (level, Some(_)) => admin.logging.reset().and_then(|()| admin.logging.add(level.unwrap_or(""))),
        (Some(level), None) => admin.logging.add(level),
        (None, None) => Ok(()),
    };
    match changed.and_then(|()| admin.logging.current()) {
        Ok(filter) => format!("current log level is {filter}\n").into_response(),
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}

async fn quit(State(admin): State<Arc<Admin>>) -> &'static str {
    info!("shutdown requested by POST /quitquitquit");
    admin.quit.cancel();
    "shutdown now\n"
}

#[cfg(test)]
mod tests;
