//! What operators count, and whether the watcher is ready, over HTTP (`--metrics-address`).
//!
//! No pod, address or uid is a label: a node makes thousands of pods in its life.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
};

use axum::{
    Router,
    extract::State as Shared,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};
use tokio::{net::TcpListener, task::JoinHandle};
use tracing::info;

use crate::{model::state::State, observe::events::SourceKind};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabel {
    source: SourceKind,
}

impl EncodeLabelValue for State {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&self.as_str(), encoder)
    }
}

impl EncodeLabelValue for SourceKind {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&self.as_str(), encoder)
    }
}

/// Written by the node's loop, read by whoever asks.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    pods: Family<StateLabel, Gauge>,
    events: Family<SourceLabel, Counter>,
    lost: Counter,
    corrections: Counter,
    tunnels: Gauge<i64, AtomicI64>,
    enrolment: Histogram,
    ready: AtomicBool,
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("adit_watcher");
        let pods = Family::<StateLabel, Gauge>::default();
        for state in State::ALL {
            // There from the start, with 0.
            drop(pods.get_or_create(&StateLabel { state }));
        }
        registry.register("pods", "Pods by what becomes of their traffic", pods.clone());
        let events = Family::<SourceLabel, Counter>::default();
        registry.register("events", "What a source of events told", events.clone());
        let lost = Counter::<u64, AtomicU64>::default();
        registry.register("events_lost", "Events that found no room", lost.clone());
        let corrections = Counter::<u64, AtomicU64>::default();
        registry.register(
            "corrections",
            "What a scan found otherwise than events had told",
            corrections.clone(),
        );
        let tunnels = Gauge::<i64, AtomicI64>::default();
        registry.register("tunnels", "Tunnels that are connected", tunnels.clone());
        let enrolment = Histogram::new(exponential_buckets(0.0005, 2.0, 16));
        registry.register_with_unit(
            "enrolment_duration",
            "From the first look at a pod that is to be enrolled until a tunnel carries its traffic",
            Unit::Seconds,
            enrolment.clone(),
        );
        let ready = AtomicBool::new(false);
        Self { registry, pods, events, lost, corrections, tunnels, enrolment, ready }
    }

    /// A pod's state changed; `None`: it was not known, or is not any more.
    pub fn pod(&self, before: Option<State>, after: Option<State>) {
        if before != after {
            before.map(|state| self.pods.get_or_create(&StateLabel { state }).dec());
            after.map(|state| self.pods.get_or_create(&StateLabel { state }).inc());
        }
    }

    pub fn told(&self, source: SourceKind) {
        self.events.get_or_create(&SourceLabel { source }).inc();
    }

    pub fn lost(&self, count: u64) {
        self.lost.inc_by(count);
    }

    pub fn corrected(&self) {
        self.corrections.inc();
    }

    pub fn set_tunnels(&self, count: usize) {
        self.tunnels.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    pub fn enrolled_after(&self, seconds: f64) {
        self.enrolment.observe(seconds);
    }

    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Serves until it is dropped.
#[derive(Debug)]
pub struct Server {
    serving: JoinHandle<io::Result<()>>,
    pub address: SocketAddr,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Server {
    pub async fn bind(address: SocketAddr, metrics: Arc<Metrics>) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        info!(%address, "metrics served");
        let routes = Router::new()
            .route("/metrics", get(text))
            .route("/healthz/ready", get(readiness))
            .with_state(metrics);
        let serving = tokio::spawn(async move { axum::serve(listener, routes).await });
        Ok(Self { serving, address })
    }
}

async fn text(Shared(metrics): Shared<Arc<Metrics>>) -> impl IntoResponse {
    let mut text = String::new();
    // Writing to a `String` does not fail.
    let _ = encode(&mut text, &metrics.registry);
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
}

async fn readiness(Shared(metrics): Shared<Arc<Metrics>>) -> impl IntoResponse {
    if metrics.ready.load(Ordering::Relaxed) {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not all pods of this node have been looked at yet\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_are_as_dashboards_expect_them() {
        let metrics = Metrics::new();
        metrics.pod(None, Some(State::Closed));
        metrics.pod(Some(State::Closed), Some(State::Open));
        metrics.told(SourceKind::Scan);
        metrics.lost(3);
        metrics.corrected();
        metrics.set_tunnels(1);
        metrics.enrolled_after(0.002);
        let mut text = String::new();
        encode(&mut text, &metrics.registry).unwrap();
        for line in [
            "adit_watcher_pods{state=\"open\"} 1",
            "adit_watcher_pods{state=\"closed\"} 0",
            "adit_watcher_events_total{source=\"scan\"} 1",
            "adit_watcher_events_lost_total 3",
            "adit_watcher_corrections_total 1",
            "adit_watcher_tunnels 1",
            "adit_watcher_enrolment_duration_seconds_count 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in:\n{text}");
        }
    }
}
