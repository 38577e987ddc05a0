//! HTTP for operators and the kubelet: readiness and metrics.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{metrics::Metrics, source::Snapshots};

/// What this process waits for before tunnels may call it.
#[derive(Clone, Debug)]
pub struct Readiness {
    root: Arc<AtomicBool>,
    snapshots: Snapshots,
    stop: CancellationToken,
}

impl Readiness {
    /// Not ready: there is no root, and no snapshot. After `stop` it is never ready again.
    #[must_use]
    pub fn new(snapshots: Snapshots, stop: CancellationToken) -> Self {
        Self { root: Arc::default(), snapshots, stop }
    }

    /// There is a root.
    pub fn set_root(&self) {
        self.root.store(true, Ordering::Relaxed);
    }

    /// What is missing.
    #[must_use]
    pub fn pending(&self) -> Vec<&'static str> {
        let mut pending = Vec::new();
        if self.stop.is_cancelled() {
            pending.push("shutting down");
        }
        if !self.root.load(Ordering::Relaxed) {
            pending.push("root");
        }
        if self.snapshots.borrow().is_none() {
            pending.push("objects of the API server");
        }
        pending
    }
}

#[derive(Clone)]
struct Shown {
    readiness: Readiness,
    metrics: Arc<Metrics>,
}

/// Serves at `listener` until `stop`.
///
/// # Errors
/// The server fails.
pub async fn serve(
    listener: TcpListener,
    readiness: Readiness,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) -> io::Result<()> {
    let router = Router::new()
        .route("/healthz/ready", get(ready))
        .route("/metrics", get(encoded))
        .with_state(Shown { readiness, metrics });
    axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await
}

async fn ready(State(shown): State<Shown>) -> Response {
    let pending = shown.readiness.pending();
    if pending.is_empty() {
        return "ready\n".into_response();
    }
    let text = format!("not ready, pending: {}\n", pending.join(", "));
    (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
}

async fn encoded(State(shown): State<Shown>) -> Response {
    match shown.metrics.encode() {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
