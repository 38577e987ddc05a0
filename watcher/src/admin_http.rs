//! `/metrics` and `/healthz/ready` over HTTP (`--metrics-address`).

use std::{io, net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::{net::TcpListener, task::JoinHandle};
use tracing::info;

use crate::metrics::Metrics;

/// Serves until it is dropped.
#[derive(Debug)]
pub(crate) struct AdminServer {
    serving: JoinHandle<io::Result<()>>,
}

impl Drop for AdminServer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl AdminServer {
    /// Listens at `address` and serves `metrics`.
    ///
    /// # Errors
    /// The address cannot be listened at.
    pub(crate) async fn bind(address: SocketAddr, metrics: Arc<Metrics>) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        info!(%address, "metrics served");
        let routes = Router::new()
            .route("/metrics", get(text))
            .route("/healthz/ready", get(readiness))
            .with_state(metrics);
        #[expect(clippy::disallowed_methods, reason = "`AdminServer` keeps the handle")]
        let serving = tokio::spawn(async move { axum::serve(listener, routes).await });
        Ok(Self { serving })
    }
}

async fn text(State(metrics): State<Arc<Metrics>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], metrics.encode())
}

async fn readiness(State(metrics): State<Arc<Metrics>>) -> impl IntoResponse {
    if metrics.is_standing_by() {
        // Ready to take over: a rolling update ends the old one only when the new one is ready.
        (StatusCode::OK, "standing by: another watcher works for this node\n")
    } else if metrics.is_ready() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not all pods of this node have been observed yet\n")
    }
}
