//! What an operator wants to see first: is it ready, which pods, which connections, which certificates, what failed.
//! Served as JSON by `/status`, shown by `ztunnel status` and, for browsers, by [`page`](super::page).

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use serde::Serialize;

use super::{Admin, dump::state};
use crate::{
    identity::CertificateInfo,
    metrics::{failures::FailedConnection, open::ConnectionView},
    reason::FailureReason,
};

/// More connections than these are counted, not listed.
const CONNECTIONS: usize = 500;

/// All of it, at one moment.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Overview {
    pub version: &'static str,
    pub node: String,
    pub up_secs: u64,
    pub ready: bool,
    /// Why it is not ready.
    pub pending: Vec<&'static str>,
    pub pods: Vec<PodOverview>,
    pub connections_open: usize,
    /// Of these, the first.
    pub connections: Vec<ConnectionView>,
    /// HBONE connections to peers' tunnels, held for reuse, and the streams in them.
    pub tunnels: i64,
    pub streams: i64,
    pub certificates: Vec<CertificateOverview>,
    /// Since the start, the most frequent first.
    pub failures: Vec<FailureCount>,
    /// The latest first.
    pub last_failures: Vec<LastFailure>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodOverview {
    pub namespace: String,
    pub name: String,
    pub service_account: String,
    /// `Up`, or `Pending`: handed over, and its listeners could not be opened yet.
    pub state: String,
    pub inbound: usize,
    pub outbound: usize,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateOverview {
    pub identity: String,
    /// `Available`, `Initializing`, `Unavailable`, `Expired`.
    pub state: &'static str,
    /// How long it holds; `None` where there is none.
    pub expires_in_secs: Option<u64>,
    pub error: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FailureCount {
    pub direction: &'static str,
    pub reason: FailureReason,
    pub count: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LastFailure {
    pub seconds_ago: u64,
    #[serde(flatten)]
    pub failed: FailedConnection,
}

impl Overview {
    pub fn new(admin: &Admin) -> Self {
        let now = SystemTime::now();
        let metrics = &admin.metrics;
        let (all, connections_open) = metrics.open.views(usize::MAX);
        let pods = pods(&(admin.workload_state)(), &all);
        let counts = metrics.failed_connections.counts();
        let mut failures: Vec<_> = counts
            .into_iter()
            .map(|((direction, reason), count)| FailureCount { direction, reason, count })
            .collect();
        failures.sort_by_key(|failure| std::cmp::Reverse(failure.count));
        let last =
            |failed: FailedConnection| LastFailure { seconds_ago: since(now, failed.at).as_secs(), failed };
        let pending = admin.readiness.pending();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            node: admin.config.node.to_string(),
            up_secs: since(now, admin.started).as_secs(),
            ready: pending.is_empty(),
            pending,
            pods,
            connections_open,
            connections: all.into_iter().take(CONNECTIONS).collect(),
            tunnels: metrics.pool.connections.get(),
            streams: metrics.pool.streams.get(),
            certificates: admin.certificates.list().iter().map(|known| certificate(known, now)).collect(),
            failures,
            last_failures: metrics.failed_connections.last().into_iter().map(last).collect(),
        }
    }
}

fn pods(state: &serde_json::Value, connections: &[ConnectionView]) -> Vec<PodOverview> {
    let mut open: HashMap<(&str, &str, &str), usize> = HashMap::new();
    for view in connections {
        *open.entry((&view.pod.0, &view.pod.1, view.direction)).or_default() += 1;
    }
    let mut pods: Vec<_> = state
        .as_object()
        .into_iter()
        .flat_map(serde_json::Map::values)
        .map(|pod| {
            let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
            let (namespace, name) = (text(&pod["info"]["namespace"]), text(&pod["info"]["name"]));
            let count = |direction| open.get(&(&*namespace, &*name, direction)).copied().unwrap_or(0);
            PodOverview {
                inbound: count("inbound"),
                outbound: count("outbound"),
                service_account: text(&pod["info"]["serviceAccount"]),
                state: text(&pod["state"]),
                namespace,
                name,
            }
        })
        .collect();
    pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    pods
}

fn certificate(known: &CertificateInfo, now: SystemTime) -> CertificateOverview {
    let not_after = known.credentials.as_ref().map(|credentials| credentials.not_after);
    CertificateOverview {
        identity: known.identity.to_string(),
        state: state(known),
        expires_in_secs: not_after.map(|end| since(end, now).as_secs()),
        error: known.error.clone(),
    }
}

fn since(later: SystemTime, earlier: SystemTime) -> Duration {
    later.duration_since(earlier).unwrap_or_default()
}
