//! HTTP servers for operators: readiness, metrics, and on loopback the admin server.
//!
//! * [`overview`]: pods, connections, certificates and failures at a glance, as JSON; [`page`]: the
//!   same for a browser
//! * [`dump`]: the whole state, under Istio's names
//! * [`profile`]: CPU and heap profiles

mod dump;
mod overview;
mod page;
mod profile;

pub use overview::{CertificateOverview, FailureCount, LastFailure, Overview, PodOverview};

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::SystemTime,
};

use axum::{
    Json, Router,
    extract::{Query, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header, uri::Authority},
    middleware::{self, Next},
    response::{Html, IntoResponse, Response},
    routing::{get, post},
};
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower_http::compression::CompressionLayer;
use tracing::info;

use crate::{
    config::Config, discovery::last_state::Status, identity::Certificates, logging::Logging, mesh::Store,
    metrics::Metrics, readiness::Readiness,
};

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
            .route("/metrics", get(metrics))
            .route("/stats/prometheus", get(metrics))
            .layer(CompressionLayer::new())
            .with_state(Arc::clone(&admin.metrics));
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
        let serve = |listener, router: Router| {
            let stopped = stop.clone().cancelled_owned();
            axum::serve(listener, router).with_graceful_shutdown(stopped).into_future()
        };
        tokio::try_join!(
            serve(self.admin, admin),
            serve(self.stats, stats),
            serve(self.readiness, readiness)
        )?;
        Ok(())
    }
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

async fn metrics(State(metrics): State<Arc<Metrics>>, headers: HeaderMap) -> Response {
    let accepts = |kind| {
        let mut accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
        accepted.any(|value| value.contains(kind))
    };
    let content_type = if accepts("application/openmetrics-text") {
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    } else {
        "text/plain; charset=utf-8"
    };
    match off_thread(move || metrics.encode()).await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, content_type)], text).into_response(),
        Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        Err(failed) => failed,
    }
}

/// Runs `work`, which may be long for a large mesh, on a blocking thread: readiness and the ZDS
/// client share this one.
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
    match off_thread(move || dump::dump(&admin)).await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
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
