//! The metrics of the tunnel. Names and labels are those of Istio's tunnel where it has them, since
//! dashboards rely on them.
//!
//! To add a metric, add a row to `catalog` and either a field here, registered in a `register_*`,
//! if connections count it, or a [`Collector`], given to [`Metrics::collect`], if it is read at
//! each scrape.
//!
//! * `catalog`: the table of all metrics, which `docs/metrics.md` shows
//! * [`traffic`]: counters of connections, and their labels; `label_sets` limits how many there are
//! * `open`, `failures`: the connections that are open now, and the last ones that failed
//! * `dns`, `xds`, [`crl`]: DNS requests, messages of the control plane, revoked peers
//! * [`certificates`], [`log`], [`process`], [`runtime`]: read at each scrape

#[cfg(test)]
mod catalog;
pub mod certificates;
mod crl;
pub(crate) mod dns;
pub(crate) mod failures;
mod label_sets;
pub mod log;
pub(crate) mod open;
mod panics;
mod process;
mod runtime;
mod traffic;
pub(crate) mod xds;

pub use crl::CrlMetrics;

use std::{
    fmt,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use crate::{memory::MemoryMetrics, mesh::Workload, reason::FailureReason};
use failures::{FailedConnection, FailedConnections};
pub(crate) use label_sets::LabelSet;
use label_sets::LabelSets;
use open::OpenConnections;
pub use runtime::Runtimes;
pub use traffic::{EndLabels, Traffic, TrafficLabels};
use traffic::{OnDemandDns, OnDemandDnsLabels, TrafficSets};

type U64Counter = Counter<u64, AtomicU64>;

/// Latencies from half a millisecond to 16 s.
fn latency() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 16))
}

/// The registry and every family in it. Shared by all workers.
pub struct Metrics {
    registry: Registry,
    /// By what peers, pods and the control plane say.
    traffic: Arc<TrafficSets>,
    /// By reporter.
    sockets_open: [(&'static str, Gauge); 2],
    failures: Family<FailureLabels, U64Counter>,
    retries: Family<RetryLabels, U64Counter>,
    on_demand_dns: Arc<OnDemandDns>,
    connect: Family<DirectionLabels, Histogram, fn() -> Histogram>,
    tls_handshake: Family<DirectionLabels, Histogram, fn() -> Histogram>,
    /// Pods served, pods still to be served, and their coming and going.
    pub pods: PodMetrics,
    /// HBONE connections held for reuse.
    pub pool: PoolMetrics,
    /// What streams have received and their sockets have not taken.
    pub memory: MemoryMetrics,
    /// DNS requests.
    pub(crate) dns: Arc<dns::DnsMetrics>,
    /// The control plane.
    pub(crate) xds: xds::XdsMetrics,
    /// Revoked peers.
    pub crl: CrlMetrics,
    /// The workers' runtimes.
    pub runtimes: Runtimes,
    /// The connections that are open now.
    pub(crate) open: OpenConnections,
    /// The connections that failed.
    pub(crate) failed_connections: FailedConnections,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// `workload_manager_*`.
#[derive(Clone, Debug, Default)]
pub struct PodMetrics {
    /// Pods served.
    pub active: Gauge,
    /// Pods not served yet.
    pub pending: Gauge,
    /// Pods whose serving began.
    pub started: U64Counter,
    /// Pods whose serving ended.
    pub stopped: U64Counter,
}

/// HBONE tunnels held for reuse, and what goes through them.
#[derive(Clone, Debug, Default)]
pub struct PoolMetrics {
    /// Connections held.
    pub connections: Gauge,
    /// Streams in them.
    pub streams: Gauge,
}

/// The end of a connection that counts it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReporterLabels {
    reporter: &'static str,
}

/// The reason of a failure, more specific than `response_flags`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    direction: &'static str,
    reason: &'static str,
}

/// Why the endpoint before failed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RetryLabels {
    reason: &'static str,
}

/// `inbound` or `outbound`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    direction: &'static str,
}

/// Label sets of a family unless configured otherwise.
const LABEL_SETS: usize = 20_000;

impl Default for Metrics {
    fn default() -> Self {
        Self::new(LABEL_SETS)
    }
}

impl Metrics {
    /// Registers all families; collectors are added by [`collect`](Self::collect). `label_sets`: how
    /// many a family may have whose labels are names.
    pub fn new(label_sets: usize) -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            traffic: Arc::new(LabelSets::new(label_sets)),
            sockets_open: Default::default(),
            failures: Family::default(),
            retries: Family::default(),
            on_demand_dns: Arc::new(LabelSets::new(label_sets)),
            connect: Family::new_with_constructor(latency),
            tls_handshake: Family::new_with_constructor(latency),
            pods: PodMetrics::default(),
            pool: PoolMetrics::default(),
            memory: MemoryMetrics::default(),
            dns: Arc::new(LabelSets::new(label_sets)),
            xds: xds::XdsMetrics::default(),
            crl: CrlMetrics::default(),
            runtimes: Runtimes::default(),
            open: OpenConnections::default(),
            failed_connections: FailedConnections::default(),
        };
        metrics.register_traffic();
        metrics.register_tunnels();
        metrics.register_process();
        metrics.xds.register(&mut metrics.registry);
        metrics.crl.register(&mut metrics.registry);
        metrics
    }

    fn register_traffic(&mut self) {
        self.registry.register_collector(Box::new(Arc::clone(&self.traffic)));
        self.registry.register_collector(Box::new(Arc::clone(&self.on_demand_dns)));
        self.registry.register_collector(Box::new(Arc::clone(&self.dns)));
        let sockets = Family::<ReporterLabels, Gauge>::default();
        self.sockets_open = ["source", "destination"]
            .map(|reporter| (reporter, sockets.get_or_create_owned(&ReporterLabels { reporter })));
        self.registry.register(
            "istio_tcp_sockets_open",
            "The current number of open TCP sockets (unstable)",
            sockets,
        );
        let failures = self.failures.clone();
        self.registry.register("ztunnel_connection_failures", "Failed connections by reason", failures);
    }

    fn register_tunnels(&mut self) {
        let ours = self.registry.sub_registry_with_prefix("ztunnel");
        let (connect, handshake) = (self.connect.clone(), self.tls_handshake.clone());
        let help = "From the decision where to until the destination was connected";
        ours.register_with_unit("connect_duration", help, Unit::Seconds, connect);
        let help = "TLS handshakes that came to an end, by who began: inbound ones are a peer's";
        ours.register_with_unit("tls_handshake_duration", help, Unit::Seconds, handshake);
        let help = "Connections tried at another endpoint, by the reason of the failure before";
        ours.register("connect_retries", help, self.retries.clone());
        let PoolMetrics { connections, streams } = self.pool.clone();
        ours.register("pool_connections", "HBONE connections held for reuse", connections);
        ours.register("pool_streams", "Streams open in them", streams);
        let MemoryMetrics { promised, held } = self.memory.clone();
        let help = "What the windows of open streams allow peers to send";
        ours.register_with_unit("stream_window", help, Unit::Bytes, promised);
        let help = "What waits in streams for slow applications, or for the tunnel to a peer";
        ours.register_with_unit("stream_held", help, Unit::Bytes, held);
    }

    fn register_process(&mut self) {
        let build = Family::<Vec<(&'static str, &'static str)>, Gauge>::default();
        let labels = vec![("component", "ztunnel"), ("tag", env!("CARGO_PKG_VERSION"))];
        build.get_or_create(&labels).set(1);
        self.registry.register("istio_build", "Istio component build info", build);
        self.registry.register_collector(Box::new(process::ProcessMetrics));
        self.registry.register_collector(Box::new(panics::Panics));
        self.registry.register_collector(Box::new(self.runtimes.clone()));

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

    /// The counters of a label set.
    pub(crate) fn traffic(&self, labels: TrafficLabels) -> Arc<LabelSet<TrafficLabels, Traffic>> {
        self.traffic.get(labels)
    }

    /// The connections open now, as `reporter` sees them.
    pub(crate) fn sockets_open(&self, reporter: &'static str) -> Gauge {
        let found = self.sockets_open.iter().find(|(of, _)| *of == reporter);
        found.map(|(_, gauge)| gauge.clone()).unwrap_or_default()
    }

    /// Counts a failure. Rare, so that it needs no handle.
    pub(crate) fn failed(&self, labels: &TrafficLabels, failed: FailedConnection) {
        let FailedConnection { direction, reason, .. } = failed;
        self.traffic(labels.clone()).failed.inc();
        self.failures.get_or_create(&FailureLabels { direction, reason: reason.code() }).inc();
        self.failed_connections.add(failed);
    }

    /// Counts a connection that was refused before anything was known of it. Costs little, since
    /// there may be many of them.
    pub(crate) fn refused(&self, direction: &'static str, reason: FailureReason) {
        self.failures.get_or_create(&FailureLabels { direction, reason: reason.code() }).inc();
    }

    /// Counts a connection that was tried at another endpoint, because of `reason`.
    pub(crate) fn retried(&self, reason: FailureReason) {
        self.retries.get_or_create(&RetryLabels { reason: reason.code() }).inc();
    }

    /// Counts a look-up of `hostname` for a connection of `source`.
    pub fn on_demand_dns(&self, source: &Workload, hostname: &Arc<str>) {
        self.on_demand_dns.get(OnDemandDnsLabels::new(source, hostname)).inc();
    }

    /// Counts a connection whose destination took `lasted` to connect.
    pub fn connected(&self, direction: &'static str, lasted: Duration) {
        self.connect.get_or_create(&DirectionLabels { direction }).observe(lasted.as_secs_f64());
    }

    /// Counts a TLS handshake, be it with success or not.
    pub fn tls_handshake(&self, direction: &'static str, lasted: Duration) {
        self.tls_handshake.get_or_create(&DirectionLabels { direction }).observe(lasted.as_secs_f64());
    }

    /// Reads `collector` at each scrape.
    pub fn collect(&mut self, collector: Box<dyn Collector>) {
        self.registry.register_collector(collector);
    }

    /// The registry, for families of other modules.
    pub fn registry_mut(&mut self) -> &mut Registry {
        &mut self.registry
    }

    /// All metrics, in the text format of OpenMetrics, which Prometheus' own parser reads too.
    ///
    /// # Errors
    /// A collector failed to write its samples.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        self.open.count();
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beyond_the_limit_connections_count_without_names() {
        let metrics = Metrics::new(2);
        for n in 0..100 {
            let source = EndLabels { workload: format!("job-{n}").into(), ..EndLabels::default() };
            metrics.traffic(TrafficLabels { source, ..labels() }).opened.inc();
        }
        let text = metrics.encode().unwrap();
        let samples: Vec<&str> =
            text.lines().filter(|line| line.starts_with("istio_tcp_connections_opened_total{")).collect();
        assert_eq!(samples.len(), 3, "{samples:?}");
        let rest = samples.iter().find(|line| line.contains("source_workload=\"overflow\"")).unwrap();
        assert!(rest.contains("reporter=\"source\"") && rest.ends_with(" 98"), "{rest}");
        assert!(!rest.contains("source_zone"), "{rest}");
    }

    fn labels() -> TrafficLabels {
        let source = EndLabels { workload: "web".into(), zone: "a".into(), ..EndLabels::default() };
        TrafficLabels { reporter: "source", source, response_flags: "-", ..TrafficLabels::default() }
    }

    #[test]
    fn a_line_has_istios_names_and_all_its_labels() {
        let metrics = Metrics::default();
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
        let metrics = Metrics::default();
        metrics.traffic(labels()).sent.inc_by(1);
        metrics.traffic(labels()).sent.inc_by(2);
        metrics.traffic(TrafficLabels { mutual_tls: true, ..labels() }).sent.inc_by(4);
        assert_eq!(metrics.traffic(labels()).sent.get(), 3);
    }

    #[test]
    fn the_process_and_the_build_are_described() {
        let metrics = Metrics::default();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        metrics.runtimes.add(runtime.metrics());
        let text = metrics.encode().unwrap();
        for name in [
            "istio_build{component=\"ztunnel\"",
            "process_open_fds ",
            "process_max_fds ",
            "process_cpu_seconds_total ",
            "process_resident_memory_bytes ",
            "tokio_num_workers 1",
            "tokio_worker_park_count{worker=\"0\"} ",
            "tokio_worker_total_busy_duration_seconds_total{worker=\"0\"} ",
            "ztunnel_pool_connections 0",
            "workload_manager_active_proxy_count 0",
            "workload_manager_proxies_started_total 0",
        ] {
            assert!(text.contains(&format!("\n{name}")), "{name} in {text}");
        }
    }

    #[test]
    fn latencies_fall_into_buckets_by_direction() {
        let metrics = Metrics::default();
        metrics.connected("outbound", Duration::from_millis(3));
        metrics.tls_handshake("inbound", Duration::from_mins(1));
        let text = metrics.encode().unwrap();
        for line in [
            "ztunnel_connect_duration_seconds_bucket{le=\"0.002\",direction=\"outbound\"} 0",
            "ztunnel_connect_duration_seconds_bucket{le=\"0.004\",direction=\"outbound\"} 1",
            "ztunnel_tls_handshake_duration_seconds_bucket{le=\"16.384\",direction=\"inbound\"} 0",
            "ztunnel_tls_handshake_duration_seconds_count{direction=\"inbound\"} 1",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
