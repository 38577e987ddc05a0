//! What operators ask the process: readiness, metrics, and on loopback only its state and its end.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use axum::{
    Router,
    extract::{Query, State},
    http::{HeaderMap, StatusCode, header},
    response::{Html, IntoResponse, Response},
    routing::{get, post},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{
    config::Config,
    identity::{Certificates, Known},
    logging::Logging,
    mesh::Store,
    metrics::Metrics,
};

/// What has to be done before this process counts as ready, by name.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<&'static str, usize>>>);

impl Readiness {
    /// Not ready, until the guard says so or is dropped. Tasks may share a name: then all of them count.
    pub fn task(&self, name: &'static str) -> ReadyGuard {
        let mut guard = ReadyGuard { readiness: self.clone(), name, pending: false };
        guard.pending();
        guard
    }

    /// What is still to be done, in order. Nothing: ready.
    pub fn pending(&self) -> Vec<&'static str> {
        self.tasks().keys().copied().collect()
    }

    fn tasks(&self) -> MutexGuard<'_, BTreeMap<&'static str, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One task of [`Readiness`].
#[derive(Debug)]
pub struct ReadyGuard {
    readiness: Readiness,
    name: &'static str,
    pending: bool,
}

impl ReadyGuard {
    pub fn ready(&mut self) {
        if std::mem::take(&mut self.pending) {
            let mut tasks = self.readiness.tasks();
            if let Some(count) = tasks.get_mut(self.name) {
                *count -= 1;
                if *count == 0 {
                    tasks.remove(self.name);
                }
            }
        }
    }

    pub fn pending(&mut self) {
        if !std::mem::replace(&mut self.pending, true) {
            *self.readiness.tasks().entry(self.name).or_default() += 1;
        }
    }
}

impl Drop for ReadyGuard {
    fn drop(&mut self) {
        self.ready();
    }
}

/// What the admin server shows and does.
#[derive(Clone)]
pub struct Admin {
    pub config: Arc<Config>,
    pub store: Arc<Store>,
    pub certificates: Arc<Certificates>,
    pub logging: Logging,
    pub metrics: Arc<Metrics>,
    pub readiness: Readiness,
    /// The pods served, for the dump.
    pub workload_state: Arc<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// Ends the process in order.
    pub quit: CancellationToken,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").field("config", &self.config).finish_non_exhaustive()
    }
}

/// An address that is not to be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for {purpose}")]
pub struct BindError {
    pub purpose: &'static str,
    pub address: SocketAddr,
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
    /// Before anything else starts: an address in use is a reason not to start.
    pub async fn bind(config: &Config) -> Result<Self, BindError> {
        Ok(Self {
            admin: bind("admin", config.admin_address).await?,
            stats: bind("metrics", config.stats_address).await?,
            readiness: bind("readiness", config.readiness_address).await?,
        })
    }

    /// Where the admin, stats and readiness servers listen.
    pub fn addresses(&self) -> io::Result<[SocketAddr; 3]> {
        Ok([self.admin.local_addr()?, self.stats.local_addr()?, self.readiness.local_addr()?])
    }

    /// Until `stop`.
    pub async fn serve(self, admin: Admin, stop: CancellationToken) -> io::Result<()> {
        let stats = Router::new()
            .route("/metrics", get(metrics))
            .route("/stats/prometheus", get(metrics))
            .with_state(Arc::clone(&admin.metrics));
        let readiness = Router::new().route("/healthz/ready", get(ready)).with_state(admin.readiness.clone());
        let admin = Router::new()
            .route("/", get(index))
            .route("/config_dump", get(config_dump))
            .route("/logging", post(logging))
            .route("/quitquitquit", post(quit))
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
    match metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, content_type)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn index() -> Html<&'static str> {
    Html(
        "<!DOCTYPE html><title>Adit ztunnel</title><h1>Adit ztunnel</h1><ul>\
         <li><a href=\"config_dump\">config_dump</a>: workloads, services, policies, certificates, pods\
         <li>POST logging: the log's filter; <code>?level=debug</code> sets, <code>?reset</code> resets it\
         <li>POST quitquitquit: drain and exit</ul>\n",
    )
}

/// The parts of Istio's dump that exist here, under their names there.
async fn config_dump(State(admin): State<Arc<Admin>>) -> Response {
    let mesh = admin.store.snapshot();
    let services: Vec<_> = mesh
        .services()
        .map(|service| {
            let endpoints: Vec<_> =
                mesh.endpoints(&service.key()).iter().map(|end| &end.workload.uid).collect();
            json!({ "service": service, "endpoints": endpoints })
        })
        .collect();
    let dump = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "config": &*admin.config,
        "workloads": mesh.workloads().collect::<Vec<_>>(),
        "services": services,
        "policies": mesh.policies().collect::<Vec<_>>(),
        "certificates": admin.certificates.known().iter().map(CertificateDump::from).collect::<Vec<_>>(),
        "workloadState": (admin.workload_state)(),
    });
    match serde_json::to_string_pretty(&dump) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CertificateDump {
    identity: String,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    cert_chain: Vec<OneCertificate>,
    root_certs: Vec<OneCertificate>,
}

/// Base64 of the PEM, as Istio's tunnel shows it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct OneCertificate {
    pem: String,
    serial_number: String,
    valid_from: String,
    expiration_time: String,
}

impl From<&Known> for CertificateDump {
    fn from(known: &Known) -> Self {
        let credentials = known.credentials.as_deref();
        let state = match (credentials, &known.error) {
            (Some(credentials), _) if credentials.not_after < SystemTime::now() => "Expired",
            (Some(_), _) => "Available",
            (None, Some(_)) => "Unavailable",
            (None, None) => "Initializing",
        };
        let shown =
            |certs: Option<&[_]>| certs.unwrap_or_default().iter().filter_map(OneCertificate::new).collect();
        Self {
            identity: known.identity.to_string(),
            state,
            error: known.error.clone(),
            cert_chain: shown(credentials.map(crate::identity::Credentials::chain)),
            root_certs: shown(credentials.map(crate::identity::Credentials::roots)),
        }
    }
}

impl OneCertificate {
    fn new(cert: &rustls::pki_types::CertificateDer<'static>) -> Option<Self> {
        let (_, parsed) = x509_parser::parse_x509_certificate(cert).ok()?;
        let body = BASE64_STANDARD.encode(cert);
        let mut pem = "-----BEGIN CERTIFICATE-----\n".to_owned();
        for line in body.as_bytes().chunks(64) {
            pem.push_str(&String::from_utf8_lossy(line));
            pem.push('\n');
        }
        pem.push_str("-----END CERTIFICATE-----\n");
        Some(Self {
            pem: BASE64_STANDARD.encode(pem),
            serial_number: parsed.raw_serial_as_string().replace(':', ""),
            valid_from: parsed.validity().not_before.to_rfc2822().ok()?,
            expiration_time: parsed.validity().not_after.to_rfc2822().ok()?,
        })
    }
}

#[derive(Deserialize)]
struct LoggingQuery {
    level: Option<String>,
    reset: Option<String>,
}

async fn logging(State(admin): State<Arc<Admin>>, Query(query): Query<LoggingQuery>) -> Response {
    let changed = match (&query.level, &query.reset) {
        (_, Some(_)) => admin.logging.reset(),
        (Some(level), None) => admin.logging.set(level),
        (None, None) => Ok(()),
    };
    match changed.and_then(|()| admin.logging.current()) {
        Ok(filter) => format!("current log level is {filter}\n").into_response(),
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}

async fn quit(State(admin): State<Arc<Admin>>) -> &'static str {
    info!("asked to quit");
    admin.quit.cancel();
    "shutdown now\n"
}

#[cfg(test)]
mod tests;
