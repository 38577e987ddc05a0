//! The counters. Names begin with `ztunnel_control_`.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use crate::snapshot::{ResourceType, Snapshot};

/// All counters, and the registry that shows them.
#[derive(Debug)]
pub struct Metrics {
    registry: Mutex<Registry>,
    streams: Gauge,
    pushes: Family<TypeLabels, Counter>,
    push_seconds: Histogram,
    nacks: Family<TypeLabels, Counter>,
    unacknowledged: Counter,
    resources: Family<TypeLabels, Gauge>,
    build_seconds: Histogram,
    unenforceable: Gauge,
    watch_failures: Family<ResourceLabels, Counter>,
    unauthenticated: Family<ReasonLabels, Counter>,
    root_ends: Gauge,
    root_usable: Gauge,
    trusted_roots: Gauge,
    revoked: Gauge,
    signed: Counter,
    refused: Family<ReasonLabels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TypeLabels {
    r#type: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResourceLabels {
    resource: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

fn label(of: ResourceType) -> TypeLabels {
    TypeLabels {
        r#type: match of {
            ResourceType::Address => "address",
            ResourceType::Authorization => "authorization",
        },
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Mutex::new(Registry::with_prefix("ztunnel_control")),
            streams: Gauge::default(),
            pushes: Family::default(),
            // 1 ms to 16 s.
            push_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            nacks: Family::default(),
            unacknowledged: Counter::default(),
            resources: Family::default(),
            // 0.1 ms to 1.6 s.
            build_seconds: Histogram::new(exponential_buckets(0.0001, 2.0, 15)),
            unenforceable: Gauge::default(),
            watch_failures: Family::default(),
            unauthenticated: Family::default(),
            root_ends: Gauge::default(),
            root_usable: Gauge::default(),
            trusted_roots: Gauge::default(),
            revoked: Gauge::default(),
            signed: Counter::default(),
            refused: Family::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    #[rustfmt::skip]
    fn register(&self) {
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        registry.register("streams", "Open discovery streams, one for each tunnel", self.streams.clone());
        registry.register("pushes", "Discovery responses sent", self.pushes.clone());
        registry.register("push_seconds", "Time from a change at the API server to the response that tells it", self.push_seconds.clone());
        registry.register("nacks", "Discovery responses that a tunnel refused", self.nacks.clone());
        registry.register("unacknowledged", "Tunnels that were disconnected because they did not answer", self.unacknowledged.clone());
        registry.register("resources", "Resources that tunnels are told of", self.resources.clone());
        registry.register("build_seconds", "Time to make a snapshot", self.build_seconds.clone());
        registry.register("unenforceable_policies", "Policies that are stricter than they are written; the log names them", self.unenforceable.clone());
        registry.register("watch_failures", "Failed lists and watches at the API server", self.watch_failures.clone());
        registry.register("unauthenticated", "Callers that were turned away", self.unauthenticated.clone());
        registry.register("root_expiration_timestamp_seconds", "When the root, or what leads to it, ends", self.root_ends.clone());
        registry.register("root_usable", "1: what the root's Secret holds is in use; 0: the last good root is", self.root_usable.clone());
        registry.register("trusted_roots", "Roots that tunnels are to trust: two during a rotation", self.trusted_roots.clone());
        registry.register("revoked_certificates", "Certificates that tunnels are to refuse", self.revoked.clone());
        registry.register("certificates_signed", "Certificates signed", self.signed.clone());
        registry.register("certificates_refused", "Requests for certificates that were refused", self.refused.clone());
    }

    /// A stream began. It ends with the guard.
    pub(crate) fn stream(&self) -> OpenStream {
        self.streams.inc();
        OpenStream(self.streams.clone())
    }

    /// A response was sent; `changed`: since when it was due, unless it is the first of its stream.
    pub(crate) fn pushed(&self, of: ResourceType, changed: Option<Instant>) {
        self.pushes.get_or_create(&label(of)).inc();
        if let Some(changed) = changed {
            self.push_seconds.observe(changed.elapsed().as_secs_f64());
        }
    }

    pub(crate) fn nacked(&self, of: ResourceType) {
        self.nacks.get_or_create(&label(of)).inc();
    }

    pub(crate) fn unacknowledged(&self) {
        self.unacknowledged.inc();
    }

    pub(crate) fn built(&self, took: Duration, snapshot: &Snapshot, unenforceable: usize) {
        self.build_seconds.observe(took.as_secs_f64());
        self.unenforceable.set(unenforceable.try_into().unwrap_or(i64::MAX));
        for of in [ResourceType::Address, ResourceType::Authorization] {
            let count = snapshot.all(of).count().try_into().unwrap_or(i64::MAX);
            self.resources.get_or_create(&label(of)).set(count);
        }
    }

    pub(crate) fn watch_failed(&self, resource: &'static str) {
        self.watch_failures.get_or_create(&ResourceLabels { resource }).inc();
    }

    pub(crate) fn unauthenticated(&self, reason: &'static str) {
        self.unauthenticated.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// `usable`: what the Secret holds is in use. `ends`: of the root in use, seconds since 1970.
    pub(crate) fn root(&self, usable: bool, trusted: usize, ends: i64) {
        self.root_usable.set(usable.into());
        self.trusted_roots.set(trusted.try_into().unwrap_or(i64::MAX));
        self.root_ends.set(ends);
    }

    pub(crate) fn revoked(&self, count: usize) {
        self.revoked.set(count.try_into().unwrap_or(i64::MAX));
    }

    pub(crate) fn signed(&self) {
        self.signed.inc();
    }

    pub(crate) fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// In the text format of Prometheus.
    ///
    /// # Errors
    /// Never in practice: writing to a text does not fail.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry.lock().unwrap_or_else(PoisonError::into_inner))?;
        Ok(text)
    }
}

/// An open stream.
#[derive(Debug)]
pub(crate) struct OpenStream(Gauge);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_has_a_row_for_every_metric() {
        let metrics = Metrics::default();
        let snapshot = Snapshot::new(1, Instant::now(), std::collections::BTreeMap::new());
        metrics.built(Duration::ZERO, &snapshot, 0);
        for of in [ResourceType::Address, ResourceType::Authorization] {
            metrics.pushed(of, Some(Instant::now()));
            metrics.nacked(of);
        }
        metrics.watch_failed("pods");
        metrics.unauthenticated("no_token");
        metrics.refused("no_token");
        let text = metrics.encode().unwrap();
        let page = include_str!("../../../docs/control-plane.md");
        let families = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        let mut count = 0;
        for (name, kind) in families {
            let total = if kind == "counter" { "_total" } else { "" };
            let row = format!("| `{name}{total}` | {kind} |");
            assert!(page.contains(&row), "docs/control-plane.md has no row {row}");
            count += 1;
        }
        assert_eq!(count, 16, "{text}");
    }

    #[test]
    fn an_open_stream_is_counted_until_it_ends() {
        let metrics = Metrics::default();
        let shown = || metrics.encode().unwrap().contains("ztunnel_control_streams 1");
        let stream = metrics.stream();
        assert!(shown());
        drop(stream);
        assert!(!shown());
    }
}
