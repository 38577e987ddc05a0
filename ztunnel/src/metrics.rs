//! The counters that operators see: names and labels as Istio's tunnel has them, since dashboards rely on them.

use std::{
    collections::HashMap,
    fmt,
    hash::{BuildHasher, RandomState},
    sync::{Arc, PoisonError, RwLock, atomic::AtomicU64},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabel, EncodeLabelSet, EncodeMetric, LabelSetEncoder},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
    },
    registry::Registry,
};

type U64Counter = Counter<u64, AtomicU64>;

/// The registry and every family in it. Shared by all workers.
pub struct Metrics {
    registry: Registry,
    opened: Family<TrafficLabels, U64Counter>,
    closed: Family<TrafficLabels, U64Counter>,
    failed: Family<TrafficLabels, U64Counter>,
    received: Family<TrafficLabels, U64Counter>,
    sent: Family<TrafficLabels, U64Counter>,
    sockets_open: Family<ReporterLabels, Gauge>,
    failures: Family<FailureLabels, U64Counter>,
    /// One handle per label set, by the hash of the labels: see [`Metrics::traffic`].
    handles: RwLock<HashMap<u64, Vec<Arc<Traffic>>>>,
    hasher: RandomState,
    /// Pods served, pods still to be served, and their coming and going.
    pub pods: PodMetrics,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// `workload_manager_*`.
#[derive(Clone, Debug, Default)]
pub struct PodMetrics {
    pub active: Gauge,
    pub pending: Gauge,
    pub started: U64Counter,
    pub stopped: U64Counter,
}

/// Istio's traffic labels. Empty values show as `unknown`, except the localities, which are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct TrafficLabels {
    pub reporter: &'static str,
    pub source: EndLabels,
    pub destination: EndLabels,
    pub destination_service: Arc<str>,
    pub destination_service_namespace: Arc<str>,
    pub destination_service_name: Arc<str>,
    pub response_flags: &'static str,
    pub mutual_tls: bool,
}

/// What is known of one end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct EndLabels {
    pub workload: Arc<str>,
    pub canonical_service: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub namespace: Arc<str>,
    pub principal: Arc<str>,
    pub cluster: Arc<str>,
    pub region: Arc<str>,
    pub zone: Arc<str>,
}

impl EncodeLabelSet for TrafficLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let Self { source, destination, .. } = self;
        let policy = if self.mutual_tls { "mutual_tls" } else { "unknown" };
        let all: [(&str, &str); 23] = [
            ("reporter", self.reporter),
            ("source_workload", &source.workload),
            ("source_canonical_service", &source.canonical_service),
            ("source_canonical_revision", &source.canonical_revision),
            ("source_workload_namespace", &source.namespace),
            ("source_principal", &source.principal),
            ("source_app", &source.canonical_service),
            ("source_version", &source.canonical_revision),
            ("source_cluster", &source.cluster),
            ("destination_service", &self.destination_service),
            ("destination_service_namespace", &self.destination_service_namespace),
            ("destination_service_name", &self.destination_service_name),
            ("destination_workload", &destination.workload),
            ("destination_canonical_service", &destination.canonical_service),
            ("destination_canonical_revision", &destination.canonical_revision),
            ("destination_workload_namespace", &destination.namespace),
            ("destination_principal", &destination.principal),
            ("destination_app", &destination.canonical_service),
            ("destination_version", &destination.canonical_revision),
            ("destination_cluster", &destination.cluster),
            ("request_protocol", "tcp"),
            ("response_flags", self.response_flags),
            ("connection_security_policy", policy),
        ];
        for (key, value) in all {
            let value = if value.is_empty() { "unknown" } else { value };
            (key, value).encode(encoder.encode_label())?;
        }
        let localities = [
            ("source_region", &source.region),
            ("source_zone", &source.zone),
            ("destination_region", &destination.region),
            ("destination_zone", &destination.zone),
        ];
        for (key, value) in localities.into_iter().filter(|(_, value)| !value.is_empty()) {
            (key, &**value).encode(encoder.encode_label())?;
        }
        Ok(())
    }
}

/// Which end of a connection counts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReporterLabels {
    reporter: &'static str,
}

/// Why connections fail, in finer grain than `response_flags`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    direction: &'static str,
    reason: &'static str,
}

/// The counters of one label set.
#[derive(Debug)]
pub struct Traffic {
    labels: TrafficLabels,
    pub opened: U64Counter,
    pub closed: U64Counter,
    /// Bytes from the client: Istio's convention, at both reporters.
    pub received: U64Counter,
    /// Bytes to the client.
    pub sent: U64Counter,
    pub sockets_open: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            opened: Family::default(),
            closed: Family::default(),
            failed: Family::default(),
            received: Family::default(),
            sent: Family::default(),
            sockets_open: Family::default(),
            failures: Family::default(),
            handles: RwLock::default(),
            hasher: RandomState::new(),
            pods: PodMetrics::default(),
        };
        metrics.register_traffic();
        metrics.register_process();
        metrics
    }

    fn register_traffic(&mut self) {
        let mut tcp = |name: &str, help: &str, family: &Family<TrafficLabels, U64Counter>| {
            self.registry.register(format!("istio_tcp_{name}"), help, family.clone());
        };
        tcp("connections_opened", "The total number of TCP connections opened", &self.opened);
        tcp("connections_closed", "The total number of TCP connections closed", &self.closed);
        tcp("connections_failed", "The total number of TCP connections that failed (unstable)", &self.failed);
        tcp("received_bytes", "The total number of bytes received from clients", &self.received);
        tcp("sent_bytes", "The total number of bytes sent to clients", &self.sent);
        let sockets = self.sockets_open.clone();
        self.registry.register(
            "istio_tcp_sockets_open",
            "The current number of open TCP sockets (unstable)",
            sockets,
        );
        let failures = self.failures.clone();
        self.registry.register("ztunnel_connection_failures", "Failed connections by reason", failures);
    }

    fn register_process(&mut self) {
        let build = Family::<Vec<(&'static str, &'static str)>, Gauge>::default();
        let labels = vec![("component", "ztunnel"), ("tag", env!("CARGO_PKG_VERSION"))];
        build.get_or_create(&labels).set(1);
        self.registry.register("istio_build", "Istio component build info", build);
        self.registry.register_collector(Box::new(FileDescriptors));

        let manager = self.registry.sub_registry_with_prefix("workload_manager");
        let PodMetrics { active, pending, started, stopped } = self.pods.clone();
        manager.register("active_proxy_count", "The number of pods served", active);
        manager.register(
            "pending_proxy_count",
            "The number of pods that are to be served and are not yet",
            pending,
        );
        manager.register("proxies_started", "The total number of pods whose serving began", started);
        manager.register("proxies_stopped", "The total number of pods whose serving ended", stopped);
    }

    /// The counters of a label set. The five families are asked once per set, so that a connection costs one hash of
    /// its labels and a read lock.
    pub fn traffic(&self, labels: TrafficLabels) -> Arc<Traffic> {
        let hash = self.hasher.hash_one(&labels);
        let of_hash = |handles: &HashMap<u64, Vec<Arc<Traffic>>>| {
            handles.get(&hash)?.iter().find(|traffic| traffic.labels == labels).cloned()
        };
        if let Some(known) = of_hash(&self.handles.read().unwrap_or_else(PoisonError::into_inner)) {
            return known;
        }
        let mut handles = self.handles.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = of_hash(&handles) {
            return known;
        }
        let reporter = ReporterLabels { reporter: labels.reporter };
        let traffic = Arc::new(Traffic {
            opened: self.opened.get_or_create_owned(&labels),
            closed: self.closed.get_or_create_owned(&labels),
            received: self.received.get_or_create_owned(&labels),
            sent: self.sent.get_or_create_owned(&labels),
            sockets_open: self.sockets_open.get_or_create_owned(&reporter),
            labels,
        });
        handles.entry(hash).or_default().push(Arc::clone(&traffic));
        traffic
    }

    /// Counts a failure. Rare, so that it needs no handle.
    pub fn failed(&self, labels: &TrafficLabels, direction: &'static str, reason: &'static str) {
        self.failed.get_or_create(labels).inc();
        self.failures.get_or_create(&FailureLabels { direction, reason }).inc();
    }

    /// Everything, in the text format of OpenMetrics, which Prometheus' own parser reads too.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// `process_open_fds` and `process_max_fds`, counted when somebody asks.
#[derive(Debug)]
struct FileDescriptors;

impl Collector for FileDescriptors {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut gauge = |name, help, value: Option<u64>| {
            let Some(value) = value.and_then(|value| i64::try_from(value).ok()) else { return Ok(()) };
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
        };
        gauge("process_open_fds", "Number of open file descriptors", open_fds())?;
        gauge("process_max_fds", "Maximum number of open file descriptors", max_fds())
    }
}

fn open_fds() -> Option<u64> {
    // One of them is the listing's own.
    u64::try_from(std::fs::read_dir("/proc/self/fd").ok()?.count()).ok()?.checked_sub(1)
}

fn max_fds() -> Option<u64> {
    let (soft, _hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).ok()?;
    Some(soft)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels() -> TrafficLabels {
        let source = EndLabels { workload: "web".into(), zone: "a".into(), ..EndLabels::default() };
        TrafficLabels { reporter: "source", source, response_flags: "-", ..TrafficLabels::default() }
    }

    #[test]
    fn a_line_has_istios_names_and_all_its_labels() {
        let metrics = Metrics::new();
        metrics.traffic(labels()).opened.inc();
        let expected = "istio_tcp_connections_opened_total{reporter=\"source\",source_workload=\"web\",\
            source_canonical_service=\"unknown\",source_canonical_revision=\"unknown\",\
            source_workload_namespace=\"unknown\",source_principal=\"unknown\",source_app=\"unknown\",\
            source_version=\"unknown\",source_cluster=\"unknown\",destination_service=\"unknown\",\
            destination_service_namespace=\"unknown\",destination_service_name=\"unknown\",\
            destination_workload=\"unknown\",destination_canonical_service=\"unknown\",\
            destination_canonical_revision=\"unknown\",destination_workload_namespace=\"unknown\",\
            destination_principal=\"unknown\",destination_app=\"unknown\",destination_version=\"unknown\",\
            destination_cluster=\"unknown\",request_protocol=\"tcp\",response_flags=\"-\",\
            connection_security_policy=\"unknown\",source_zone=\"a\"} 1\n";
        let text = metrics.encode().unwrap();
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn equal_labels_share_their_counters() {
        let metrics = Metrics::new();
        metrics.traffic(labels()).sent.inc_by(1);
        metrics.traffic(labels()).sent.inc_by(2);
        metrics.traffic(TrafficLabels { mutual_tls: true, ..labels() }).sent.inc_by(4);
        assert_eq!(metrics.traffic(labels()).sent.get(), 3);
    }

    #[test]
    fn the_process_and_the_build_are_described() {
        let text = Metrics::new().encode().unwrap();
        for name in [
            "istio_build{component=\"ztunnel\"",
            "process_open_fds ",
            "process_max_fds ",
            "workload_manager_active_proxy_count 0",
            "workload_manager_proxies_started_total 0",
        ] {
            assert!(text.contains(&format!("\n{name}")), "{name} in {text}");
        }
    }
}
