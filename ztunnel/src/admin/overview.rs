//! The state at a glance: readiness, pods, connections, certificates, failures. Served as JSON by
//! `/status`, shown by `ztunnel status` and, for browsers, by [`page`](super::page).

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use serde::Serialize;

use super::{Admin, dump::state};
use crate::{
    discovery::last_state::LastStateView,
    identity::CertificateInfo,
    metrics::{failures::FailedConnection, open::ConnectionView},
    reason::FailureReason,
};

/// Number of connections listed; all are counted.
const CONNECTIONS: usize = 500;

/// The state at one moment.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Overview {
    /// Version of the tunnel.
    pub version: &'static str,
    /// Name of the node.
    pub node: String,
    /// Seconds since the start.
    pub up_secs: u64,
    /// Whether it is ready.
    pub ready: bool,
    /// Why it is not ready.
    pub pending: Vec<&'static str>,
    /// What is kept of the control plane's state for the next tunnel, and whether this one goes on
    /// with what another has kept. `None`: nothing is kept.
    pub last_state: Option<LastStateView>,
    /// Pods handed over.
    pub pods: Vec<PodOverview>,
    /// Number of open connections.
    pub connections_open: usize,
    /// The first of them.
    pub(crate) connections: Vec<ConnectionView>,
    /// HBONE connections to peers' tunnels, held for reuse, and the streams in them.
    pub tunnels: i64,
    /// Streams in these connections.
    pub streams: i64,
    /// Certificates of the pods.
    pub certificates: Vec<CertificateOverview>,
    /// Failures since the start, the most frequent first.
    pub failures: Vec<FailureCount>,
    /// The last failures, newest first.
    pub last_failures: Vec<LastFailure>,
}

/// A pod, and the number of its connections.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodOverview {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its service account.
    pub service_account: String,
    /// `Up`, or `Pending`: handed over, and its listeners could not be opened yet.
    pub state: String,
    /// Open connections to it.
    pub inbound: usize,
    /// Open connections from it.
    pub outbound: usize,
}

/// The certificate of an identity.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateOverview {
    /// SPIFFE id.
    pub identity: String,
    /// `Available`, `Initializing`, `Unavailable`, `Expired`.
    pub state: &'static str,
    /// Seconds until it expires; `None` without a certificate.
    pub expires_in_secs: Option<u64>,
    /// The last error.
    pub error: Option<String>,
}

/// How often connections failed for one reason.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FailureCount {
    /// `inbound` or `outbound`.
    pub direction: &'static str,
    /// Why.
    pub reason: FailureReason,
    /// How often.
    pub count: u64,
}

/// One of the last failures.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LastFailure {
    /// Seconds since it failed.
    pub seconds_ago: u64,
    /// The connection.
    #[serde(flatten)]
    pub(crate) failed: FailedConnection,
}

impl Overview {
    /// Reads the current state.
    #[must_use]
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
            last_state: admin.last_state.as_ref().map(|status| status.view()),
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
