//! `/metrics` and `/healthz/ready` over HTTP (`--metrics-address`).

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::{net::TcpListener, task::JoinHandle};
use tracing::{info, warn};

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

/// At `address`; `[::]` on a kernel without IPv6 is `0.0.0.0`.
async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error)
            if error.raw_os_error() == Some(libc::EAFNOSUPPORT) && address.ip() == Ipv6Addr::UNSPECIFIED =>
        {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}

impl AdminServer {
    /// Listens at `address` and serves `metrics`.
    ///
    /// # Errors
    /// The address cannot be listened at.
    pub(crate) async fn bind(address: SocketAddr, metrics: Arc<Metrics>) -> io::Result<Self> {
        let listener = listen(address).await?;
        #[expect(clippy::disallowed_methods, reason = "`AdminServer` keeps the handle")]
        let serving = tokio::spawn(serve(listener, metrics));
        Ok(Self { serving })
    }

    /// The same as soon as `address` is free. The watcher before this one may have it, in the same
    /// netns, or whoever took it from that: nothing but the metrics waits for it.
    pub(crate) fn bind_when_free(address: SocketAddr, metrics: Arc<Metrics>) -> Self {
        const PAUSE: Duration = Duration::from_millis(200);
        let bind = async move {
            let mut said = false;
            loop {
                match listen(address).await {
                    Ok(listener) => return serve(listener, metrics).await,
                    Err(error) if !said => {
                        warn!(%address, %error, "cannot serve metrics yet; trying again until it works");
                        said = true;
                    }
                    Err(_) => {}
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        #[expect(clippy::disallowed_methods, reason = "`AdminServer` keeps the handle")]
        let serving = tokio::spawn(bind);
        Self { serving }
    }
}

async fn serve(listener: TcpListener, metrics: Arc<Metrics>) -> io::Result<()> {
    let address = listener.local_addr()?;
    info!(%address, "metrics served");
    let routes = Router::new()
        .route("/metrics", get(text))
        .route("/healthz/ready", get(readiness))
        .with_state(metrics);
    axum::serve(listener, routes).await
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
