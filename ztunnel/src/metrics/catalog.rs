//! Every metric of the tunnel in one table, for `docs/metrics.md`. A test compares it with the
//! registry.

/// One metric family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MetricRow {
    /// As scraped: with the suffix of its unit, and `_total` for a counter.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// In the order of exposition. Regions and zones are left out where they are not known.
    pub labels: &'static [&'static str],
    /// One line for the documentation.
    pub meaning: &'static str,
}

const NONE: &[&str] = &[];

/// Istio's labels of a connection.
const TRAFFIC: &[&str] = &[
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
    "source_region",
    "source_zone",
    "destination_region",
    "destination_zone",
];

const DNS: &[&str] =
    &["request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision"];

const ON_DEMAND_DNS: &[&str] = &[
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_cluster",
    "hostname",
];

const fn row(
    name: &'static str,
    kind: &'static str,
    labels: &'static [&'static str],
    meaning: &'static str,
) -> MetricRow {
    MetricRow { name, kind, labels, meaning }
}

/// In the order of the documentation.
#[rustfmt::skip]
pub(crate) const METRICS: &[MetricRow] = &[
    row("istio_tcp_connections_opened_total", "counter", TRAFFIC, "connections opened"),
    row("istio_tcp_connections_closed_total", "counter", TRAFFIC, "connections closed"),
    row("istio_tcp_connections_failed_total", "counter", TRAFFIC, "connections that failed, before or after they were opened"),
    row("istio_tcp_received_bytes_total", "counter", TRAFFIC, "bytes from the client, at both reporters"),
    row("istio_tcp_sent_bytes_total", "counter", TRAFFIC, "bytes to the client, at both reporters"),
    row("istio_tcp_sockets_open", "gauge", &["reporter"], "connections open now"),
    row("istio_on_demand_dns_total", "counter", ON_DEMAND_DNS, "lookups of workloads that have a host name and no address"),
    row("istio_dns_requests_total", "counter", DNS, "DNS requests of the pods"),
    row("istio_dns_upstream_requests_total", "counter", DNS, "DNS requests forwarded to an upstream resolver"),
    row("istio_dns_upstream_failures_total", "counter", DNS, "forwarded DNS requests without an answer"),
    row("istio_dns_upstream_request_duration_seconds", "histogram", DNS, "time until the upstream resolver answered"),
    row("istio_xds_connection_terminations_total", "counter", &["reason"], "control plane streams that ended; `reason`: `ConnectionError`, `Error`, `Reconnect` or `Complete`"),
    row("istio_xds_message_total", "counter", &["url"], "messages from the control plane by resource type"),
    row("istio_xds_message_bytes_total", "counter", &["url"], "bytes of these messages"),
    row("ztunnel_xds_refused_resources", "gauge", &["url"], "resources of the control plane whose last version was refused, by resource type; the log has the reasons"),
    row("ztunnel_xds_last_state_age_seconds", "gauge", NONE, "how long ago the control plane told what is in force, while that is the [last state](architecture.md#control-plane) from disk; absent while it is the control plane's own word"),
    row("ztunnel_xds_last_state_bytes", "gauge", NONE, "bytes of the last state that is kept on disk; 0: none is"),
    row("ztunnel_xds_last_state_failures_total", "counter", NONE, "how often the last state could not be kept on disk; the log and `ztunnel status` have the reason"),
    row("istio_crl_policy_rejections_total", "counter", &["reporter"], "peers refused or disconnected because their certificate is revoked"),
    row("istio_crl_untracked_connections_total", "counter", &["reporter"], "connections whose peer certificate has no readable issuer and serial number, so that no revocation list applies"),
    row("istio_build", "gauge", &["component", "tag"], "always 1; the labels name program and version"),
    row("workload_manager_active_proxy_count", "gauge", NONE, "pods served"),
    row("workload_manager_pending_proxy_count", "gauge", NONE, "pods handed over by the node agent and not served yet"),
    row("workload_manager_proxies_started_total", "counter", NONE, "pods whose serving began"),
    row("workload_manager_proxies_stopped_total", "counter", NONE, "pods whose serving ended"),
    row("ztunnel_connection_failures_total", "counter", &["direction", "reason"], "failed connections by [reason](reasons.md)"),
    row("ztunnel_connect_retries_total", "counter", &["reason"], "connections tried at another endpoint of their service, by the [reason](reasons.md) why the one before failed"),
    row("ztunnel_connect_duration_seconds", "histogram", &["direction"], "time from the routing decision until the destination was connected"),
    row("ztunnel_tls_handshake_duration_seconds", "histogram", &["direction"], "duration of TLS handshakes, failed ones too; `inbound`: begun by a peer"),
    row("ztunnel_pool_connections", "gauge", NONE, "HBONE connections to peers held for reuse"),
    row("ztunnel_pool_streams", "gauge", NONE, "streams open in these connections"),
    row("ztunnel_stream_window_bytes", "gauge", NONE, "bytes that the windows of open streams allow peers to send; limited by `memory.total_bytes`"),
    row("ztunnel_stream_held_bytes", "gauge", NONE, "bytes that streams have received and slow applications have not taken yet, or that applications have sent and the tunnel to a peer has not taken"),
    row("ztunnel_certificate_expiration_timestamp_seconds", "gauge", &["identity"], "when the certificate of an identity expires, in seconds since 1970"),
    row("ztunnel_panics_total", "counter", NONE, "panics in the tunnel. Each ended a connection or a query, or the process"),
    row("ztunnel_log_lines_lost_total", "counter", NONE, "log lines dropped because writing was too slow"),
    row("process_open_fds", "gauge", NONE, "open file descriptors"),
    row("process_max_fds", "gauge", NONE, "limit of open file descriptors"),
    row("process_resident_memory_bytes", "gauge", NONE, "resident memory"),
    row("process_cpu_seconds_total", "counter", NONE, "user and system CPU time"),
    row("tokio_num_workers", "gauge", NONE, "worker threads"),
    row("tokio_num_alive_tasks", "gauge", NONE, "tasks alive on all workers"),
    row("tokio_global_queue_depth", "gauge", NONE, "tasks scheduled and not taken by a worker yet"),
    row("tokio_worker_total_busy_duration_seconds_total", "counter", &["worker"], "time that the worker was not idle"),
    row("tokio_worker_park_count", "gauge", &["worker"], "how often the worker went to sleep"),
    row("tokio_worker_park_unpark_count", "gauge", &["worker"], "how often the worker went to sleep or woke up"),
];

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        fmt::Write as _,
        sync::Arc,
        time::{Duration, SystemTime},
    };

    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{
        config::Config,
        direction::Direction,
        discovery::last_state::{LastState, LastStateMetrics, Origin},
        identity::Certificates,
        mesh::Workload,
        metrics::{
            EndLabels, Metrics, TrafficLabels, certificates::CertificateExpiry, dns::DnsLabels,
            failures::FailedConnection, log::LostLogLines, xds::Termination,
        },
        reason::FailureReason,
    };

    /// A registry in which every family has a sample.
    async fn scraped() -> String {
        let mut metrics = Metrics::default();
        let folder = tempfile::tempdir().unwrap();
        let ca = folder.path().display().to_string();
        let config = Config::from_vars([("DEVELOPMENT_CA_DIR".to_owned(), ca)]).unwrap();
        let certificates = Certificates::new(&config, Arc::default()).unwrap();
        let fetching = tokio::spawn(Arc::clone(&certificates).run(CancellationToken::new()));
        let _lease = certificates.lease("demo".into(), "web".into());
        certificates.get(&"spiffe://cluster.local/ns/demo/sa/web".parse().unwrap()).await.unwrap();
        fetching.abort();
        metrics.collect(Box::new(CertificateExpiry(certificates)));
        let (writer, _guard) = tracing_appender::non_blocking(std::io::sink());
        metrics.collect(Box::new(LostLogLines(writer.error_counter())));
        metrics.runtimes.add(tokio::runtime::Handle::current().metrics());
        let end = EndLabels { region: "r".into(), zone: "z".into(), ..EndLabels::default() };
        let labels = TrafficLabels { source: end.clone(), destination: end, ..TrafficLabels::default() };
        metrics.traffic(labels.clone()).opened.inc();
        let failed = FailedConnection {
            at: SystemTime::now(),
            direction: "outbound",
            reason: FailureReason::Cut,
            src: "10.0.0.1:1".parse().unwrap(),
            dst: "10.0.0.2:2".parse().unwrap(),
            error: String::new(),
        };
        metrics.failed(&labels, failed);
        metrics.retried(FailureReason::Connect);
        metrics.connected("outbound", Duration::ZERO);
        metrics.tls_handshake("outbound", Duration::ZERO);
        metrics.on_demand_dns(&Workload::default(), &"host".into());
        let dns = metrics.dns.get(DnsLabels::new("A", "udp", None));
        for counter in [&dns.requests, &dns.upstream_requests, &dns.upstream_failures] {
            counter.inc();
        }
        dns.upstream_duration.observe(0.0);
        let last_state = LastState::start(&folder.path().join("xds"), Origin::default()).unwrap();
        last_state.set_in_force(Some(SystemTime::now()));
        metrics.collect(Box::new(LastStateMetrics(Arc::clone(last_state.status()))));
        metrics.xds.terminated(Termination::Complete);
        metrics.xds.received("url", 1);
        metrics.xds.refused("url", 1);
        metrics.crl.rejected(Direction::Inbound);
        metrics.crl.untracked(Direction::Inbound);
        metrics.encode().unwrap()
    }

    /// Name → kind and labels, of the families in the text format of OpenMetrics.
    fn families(text: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
        let mut found: BTreeMap<String, (String, BTreeSet<String>)> = BTreeMap::new();
        let mut current = String::new();
        for line in text.lines() {
            if let Some((family, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
                current = if kind == "counter" { format!("{family}_total") } else { family.to_owned() };
                found.insert(current.clone(), (kind.to_owned(), BTreeSet::new()));
            } else if !line.starts_with('#') {
                let labels =
                    line.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(labels, _)| labels);
                let names = labels.into_iter().flat_map(|labels| labels.split(','));
                let names = names.filter_map(|pair| pair.split_once('=')).map(|(name, _)| name.to_owned());
                let (_, all) = found.get_mut(&current).expect("a family before its samples");
                all.extend(names.filter(|name| name != "le"));
            }
        }
        found
    }

    #[tokio::test]
    async fn the_table_lists_what_is_scraped() {
        let scraped = families(&scraped().await);
        let table: BTreeMap<_, _> = METRICS
            .iter()
            .map(|row| {
                let labels = row.labels.iter().map(|label| (*label).to_owned()).collect();
                (row.name.to_owned(), (row.kind.to_owned(), labels))
            })
            .collect();
        assert_eq!(table.len(), METRICS.len(), "a name stands twice in the table");
        assert_eq!(table, scraped);
    }

    /// The table in the documentation is made from the rows: `UPDATE_DOCS=1 cargo test
    /// documentation`.
    #[test]
    fn the_documentation_has_a_line_for_every_metric() {
        let mut table = "| metric | type | labels | meaning |\n|---|---|---|---|\n".to_owned();
        for row in METRICS {
            let labels = match row.labels {
                TRAFFIC => "[of a connection](#labels-of-a-connection)".to_owned(),
                [] => "–".to_owned(),
                labels => labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", "),
            };
            let _ = writeln!(table, "| `{}` | {} | {labels} | {} |", row.name, row.kind, row.meaning);
        }
        let page = include_str!("../../../docs/metrics.md");
        for label in TRAFFIC {
            assert!(page.contains(&format!("`{label}`")), "docs/metrics.md does not explain {label}");
        }
        testbed::doc_table::assert_current(
            "docs/metrics.md",
            "metrics: made from ztunnel/src/metrics/catalog.rs",
            &table,
        );
    }
}
