//! What operators count, and whether the watcher is ready.
//!
//! To add a metric, add a row to `METRICS`, register it in [`Metrics::new`] and count where it
//! happens. The watcher's table in `docs/metrics.md` follows from the row; a test compares the rows
//! with the registry.
//!
//! No pod, address or uid is a label: a node makes thousands of pods in its life.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
};

use adit_ebpf_common::trace::Rule;
use adit_ebpf_loader::VerdictCounts;
use error_reporter::Report;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Metric, Registry, Unit},
};
use tracing::warn;

use crate::{model::state::State, observe::events::SourceKind};

/// What every name begins with.
const PREFIX: &str = "adit_watcher";

/// A metric as the documentation shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MetricRow {
    /// Its name, without prefix, unit and `_total`.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// Base unit; it becomes the end of the name.
    pub unit: Option<&'static str>,
    /// Its labels and their values.
    pub labels: &'static str,
    /// What it counts.
    pub help: &'static str,
}

const PODS: MetricRow = MetricRow {
    name: "pods",
    kind: "gauge",
    unit: None,
    labels: "`state`: `open`, `closed`, `bypassed`, `refused`, `plain`",
    help: "Pods by the state of their traffic, as in `watcher status`",
};
const EVENTS: MetricRow = MetricRow {
    name: "events",
    kind: "counter",
    unit: None,
    labels: "`source`: `lifecycle`, `connector`, `scan`",
    help: "Events received from the source of events",
};
const EVENTS_LOST: MetricRow = MetricRow {
    name: "events_lost",
    kind: "counter",
    unit: None,
    labels: "",
    help: "Events that were lost because a buffer was full; a scan of everything follows",
};
const CORRECTIONS: MetricRow = MetricRow {
    name: "corrections",
    kind: "counter",
    unit: None,
    labels: "",
    help: "Differences that a scan found although no event reported them",
};
const CONNECTIONS_CUT: MetricRow = MetricRow {
    name: "connections_cut",
    kind: "counter",
    unit: None,
    labels: "",
    help: "Connections that pods made in plaintext before the first watcher ran, and that were cut",
};
const CONNECTIONS_IN_CLEAR: MetricRow = MetricRow {
    name: "connections_in_clear",
    kind: "counter",
    unit: None,
    labels: "",
    help: "Connections that scans found at pods in fail mode `closed` after they were enrolled, and that no tunnel carries: always 0, unless something is wrong; the log names them",
};
const CONNECTIONS_NOT_AUDITED: MetricRow = MetricRow {
    name: "connections_not_audited",
    kind: "counter",
    unit: None,
    labels: "",
    help: "Connections that scans found the same way at pods that guard a group, and whose process was not found: a guard may leave them alone",
};
const RESERVED_PORT_USES: MetricRow = MetricRow {
    name: "reserved_port_uses",
    kind: "gauge",
    unit: None,
    labels: "`port`: `outbound`, `inbound`, `hbone`, `dns`",
    help: "Pods with an application that listens on that port of the tunnel, or tried to; `watcher status` names pod and process",
};
const VERDICTS: MetricRow = MetricRow {
    name: "verdicts",
    kind: "counter",
    unit: None,
    labels: "`rule`: as `watcher trace` prints it",
    help: "Connections and DNS queries of enrolled pods, by the rule that decided; `watcher status verdicts` has them by pod",
};
const TUNNELS: MetricRow =
    MetricRow { name: "tunnels", kind: "gauge", unit: None, labels: "", help: "Connected tunnels" };
const ENROLMENT_DURATION: MetricRow = MetricRow {
    name: "enrolment_duration",
    kind: "histogram",
    unit: Some("seconds"),
    labels: "",
    help: "Time from the first observation of a pod that is to be enrolled until a tunnel carries its traffic",
};

/// Every metric of the watcher.
#[cfg(test)]
pub(crate) const METRICS: &[MetricRow] = &[
    PODS,
    EVENTS,
    EVENTS_LOST,
    CORRECTIONS,
    CONNECTIONS_CUT,
    CONNECTIONS_IN_CLEAR,
    CONNECTIONS_NOT_AUDITED,
    RESERVED_PORT_USES,
    VERDICTS,
    TUNNELS,
    ENROLMENT_DURATION,
];

#[cfg(test)]
impl MetricRow {
    /// The name on `/metrics`; of a histogram, the name that its parts begin with.
    pub(crate) fn full_name(&self) -> String {
        let unit = self.unit.map(|unit| format!("_{unit}")).unwrap_or_default();
        let total = if self.kind == "counter" { "_total" } else { "" };
        format!("{PREFIX}_{}{unit}{total}", self.name)
    }
}

fn register<M: Metric + Clone>(registry: &mut Registry, row: &MetricRow, metric: M) -> M {
    match row.unit {
        None => registry.register(row.name, row.help, metric.clone()),
        Some(unit) => {
            registry.register_with_unit(row.name, row.help, Unit::Other(unit.to_owned()), metric.clone());
        }
    }
    metric
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabel {
    source: SourceKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PortLabel {
    port: &'static str,
}

/// In the order of [`crate::plan::RESERVED_PORTS`].
const PORT_LABELS: [PortLabel; 4] = [
    PortLabel { port: "outbound" },
    PortLabel { port: "inbound" },
    PortLabel { port: "hbone" },
    PortLabel { port: "dns" },
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RuleLabel {
    rule: &'static str,
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

/// Written by the watcher's loop, read by [`crate::admin_http`].
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pods: Family<StateLabel, Gauge>,
    events: Family<SourceLabel, Counter>,
    lost: Counter,
    corrections: Counter,
    cut: Counter,
    in_clear: Counter,
    not_audited: Counter,
    reserved_ports: Family<PortLabel, Gauge>,
    verdicts: Family<RuleLabel, Counter>,
    /// Where `verdicts` come from, once the programs are loaded.
    counted_by: OnceLock<Arc<VerdictCounts>>,
    tunnels: Gauge<i64, AtomicI64>,
    enrolment: Histogram,
    ready: AtomicBool,
    standing_by: AtomicBool,
}

impl Metrics {
    /// Everything at 0.
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let pods = Family::<StateLabel, Gauge>::default();
        for state in State::ALL {
            // There from the start, with 0.
            drop(pods.get_or_create(&StateLabel { state }));
        }
        let pods = register(&mut registry, &PODS, pods);
        let events = register(&mut registry, &EVENTS, Family::<SourceLabel, Counter>::default());
        let lost = register(&mut registry, &EVENTS_LOST, Counter::<u64, AtomicU64>::default());
        let corrections = register(&mut registry, &CORRECTIONS, Counter::<u64, AtomicU64>::default());
        let cut = register(&mut registry, &CONNECTIONS_CUT, Counter::<u64, AtomicU64>::default());
        let in_clear = register(&mut registry, &CONNECTIONS_IN_CLEAR, Counter::<u64, AtomicU64>::default());
        let not_audited =
            register(&mut registry, &CONNECTIONS_NOT_AUDITED, Counter::<u64, AtomicU64>::default());
        let reserved_ports = Family::<PortLabel, Gauge>::default();
        for label in &PORT_LABELS {
            drop(reserved_ports.get_or_create(label));
        }
        let reserved_ports = register(&mut registry, &RESERVED_PORT_USES, reserved_ports);
        let verdicts = register(&mut registry, &VERDICTS, Family::<RuleLabel, Counter>::default());
        let tunnels = register(&mut registry, &TUNNELS, Gauge::<i64, AtomicI64>::default());
        let enrolment = Histogram::new(exponential_buckets(0.0005, 2.0, 16));
        let enrolment = register(&mut registry, &ENROLMENT_DURATION, enrolment);
        let ready = AtomicBool::new(false);
        Self {
            registry,
            pods,
            events,
            lost,
            corrections,
            cut,
            in_clear,
            not_audited,
            reserved_ports,
            verdicts,
            counted_by: OnceLock::new(),
            tunnels,
            enrolment,
            ready,
            standing_by: AtomicBool::new(false),
        }
    }

    /// A pod's state changed; `None`: it was not known, or is not any more.
    pub(crate) fn pod(&self, before: Option<State>, after: Option<State>) {
        if before != after {
            before.map(|state| self.pods.get_or_create(&StateLabel { state }).dec());
            after.map(|state| self.pods.get_or_create(&StateLabel { state }).inc());
        }
    }

    /// The source of events reported something.
    pub(crate) fn event_received(&self, source: SourceKind) {
        self.events.get_or_create(&SourceLabel { source }).inc();
    }

    /// So many events were lost.
    pub(crate) fn lost(&self, count: u64) {
        self.lost.inc_by(count);
    }

    /// A scan found a difference that no event reported.
    pub(crate) fn corrected(&self) {
        self.corrections.inc();
    }

    /// So many connections were cut that pods made in clear.
    pub(crate) fn connections_cut(&self, count: u64) {
        self.cut.inc_by(count);
    }

    /// So many connections were found in clear that should not be.
    pub(crate) fn connections_in_clear(&self, count: u64, not_audited: u64) {
        self.in_clear.inc_by(count);
        self.not_audited.inc_by(not_audited);
    }

    /// So many pods have applications on each of the tunnel's ports.
    pub(crate) fn set_reserved_port_uses(&self, pods: [usize; 4]) {
        for (label, count) in PORT_LABELS.iter().zip(pods) {
            self.reserved_ports.get_or_create(label).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Says who counts verdicts.
    pub(crate) fn set_verdicts(&self, counted_by: &Arc<VerdictCounts>) {
        let _ = self.counted_by.set(Arc::clone(counted_by));
    }

    /// Takes over what the programs have counted by now.
    fn read_verdicts(&self) {
        let Some(counted_by) = self.counted_by.get() else { return };
        match counted_by.total() {
            Ok(total) => total.used().for_each(|(rule, count)| self.set_verdict(rule, count)),
            Err(error) => warn!(error = %Report::new(&error), "cannot read how often each rule decided"),
        }
    }

    fn set_verdict(&self, rule: Rule, count: u64) {
        let label = RuleLabel { rule: rule.as_str() };
        self.verdicts.get_or_create(&label).inner().store(count, Ordering::Relaxed);
    }

    /// So many tunnels are connected now.
    pub(crate) fn set_tunnels(&self, count: usize) {
        self.tunnels.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// A tunnel carries a pod's traffic, so many seconds after the pod was first observed.
    pub(crate) fn enrolled_after(&self, seconds: f64) {
        self.enrolment.observe(seconds);
    }

    /// Says whether this watcher waits for another one of this node to end.
    pub(crate) fn set_standing_by(&self, standing_by: bool) {
        self.standing_by.store(standing_by, Ordering::Relaxed);
    }

    /// Whether this watcher waits for another one of this node to end.
    pub(crate) fn is_standing_by(&self) -> bool {
        self.standing_by.load(Ordering::Relaxed)
    }

    /// Says whether every pod of the node has been observed.
    pub(crate) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// As set last.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// In the text format of OpenMetrics 1.0.
    pub(crate) fn encode(&self) -> String {
        self.read_verdicts();
        let mut text = String::new();
        // Writing to a `String` does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    #[test]
    fn names_and_values_are_as_dashboards_expect_them() {
        let metrics = Metrics::new();
        metrics.pod(None, Some(State::Closed));
        metrics.pod(Some(State::Closed), Some(State::Open));
        metrics.event_received(SourceKind::Scan);
        metrics.lost(3);
        metrics.corrected();
        metrics.set_verdict(Rule::Redirect, 7);
        metrics.set_tunnels(1);
        metrics.enrolled_after(0.002);
        let text = metrics.encode();
        for line in [
            "adit_watcher_pods{state=\"open\"} 1",
            "adit_watcher_pods{state=\"closed\"} 0",
            "adit_watcher_events_total{source=\"scan\"} 1",
            "adit_watcher_events_lost_total 3",
            "adit_watcher_corrections_total 1",
            "adit_watcher_verdicts_total{rule=\"redirect to the tunnel\"} 7",
            "adit_watcher_tunnels 1",
            "adit_watcher_enrolment_duration_seconds_count 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in:\n{text}");
        }
    }

    #[test]
    fn the_registry_holds_exactly_the_rows() {
        let metrics = Metrics::new();
        // A family without a label set yet is not encoded.
        metrics.event_received(SourceKind::Scan);
        metrics.set_verdict(Rule::Redirect, 1);
        let text = metrics.encode();
        let registered: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let rows: Vec<String> = METRICS
            .iter()
            .map(|row| format!("{} {}", row.full_name().trim_end_matches("_total"), row.kind))
            .collect();
        assert_eq!(registered, rows);
        for row in METRICS {
            let help = format!("# HELP {} {}.", row.full_name().trim_end_matches("_total"), row.help);
            assert!(text.lines().any(|line| line == help), "{help} in:\n{text}");
        }
    }

    /// Made from the rows: `UPDATE_DOCS=1 cargo test -p watcher documentation`.
    #[test]
    fn the_documentation_has_a_line_for_every_metric() {
        let mut table = "| metric | type | labels | meaning |\n|---|---|---|---|\n".to_owned();
        for row in METRICS {
            let labels = if row.labels.is_empty() { "–" } else { row.labels };
            let _ = writeln!(table, "| `{}` | {} | {labels} | {} |", row.full_name(), row.kind, row.help);
        }
        let made_from = "watcher metrics: made from watcher/src/metrics.rs";
        testbed::doc_table::assert_current("docs/metrics.md", made_from, &table);
    }
}
