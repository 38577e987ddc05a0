//! What operators see of the last state: whether it is in force, how old it is, whether it is kept.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::SystemTime,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};
use serde::Serialize;

/// Shared by the client, the thread that writes, and those who show it.
#[derive(Debug, Default)]
pub struct Status {
    /// Bytes of responses that wait to be written.
    pub(super) queued: AtomicU64,
    /// Whether one was left out since the thread looked last.
    pub(super) is_lost: AtomicBool,
    /// Whether the next stream shall tell everything.
    pub(super) wants_all: AtomicBool,
    /// Of the file that is kept; 0: there is none.
    pub(super) bytes: AtomicU64,
    failures: AtomicU64,
    /// Why it is not kept.
    error: Mutex<Option<String>>,
    /// When what is in force was told; `None`: it is the control plane's own word.
    in_force: Mutex<Option<SystemTime>>,
}

/// The last state, for people and programs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LastStateView {
    /// Seconds since the control plane told what is in force, if it has not answered since this
    /// tunnel started.
    pub in_force_age_secs: Option<u64>,
    /// Bytes of the file that is kept for the next tunnel.
    pub kept_bytes: u64,
    /// Why nothing is kept.
    pub error: Option<String>,
}

impl Status {
    /// What there is to see.
    #[must_use]
    pub fn view(&self) -> LastStateView {
        let in_force = *self.in_force.lock().unwrap_or_else(PoisonError::into_inner);
        LastStateView {
            in_force_age_secs: in_force.map(|told_at| told_at.elapsed().unwrap_or_default().as_secs()),
            kept_bytes: self.bytes.load(Ordering::Relaxed),
            error: self.error.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// What was told at that time is in force; `None`: the control plane has told everything itself.
    pub(super) fn set_in_force(&self, told_at: Option<SystemTime>) {
        *self.in_force.lock().unwrap_or_else(PoisonError::into_inner) = told_at;
    }

    /// It cannot be kept. Whether that is new.
    pub(super) fn fails(&self, error: &str) -> bool {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let mut held = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        held.replace(error.to_owned()).is_none()
    }

    /// It is kept.
    pub(super) fn works(&self) {
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Read at each scrape.
#[derive(Clone, Debug)]
pub struct LastStateMetrics(pub Arc<Status>);

impl Collector for LastStateMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let LastStateView { in_force_age_secs, kept_bytes, .. } = self.0.view();
        let gauge = |value: u64| ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        // OpenMetrics does not allow a family without samples.
        if let Some(age) = in_force_age_secs {
            let help = "How long ago the control plane told what is in force, as it has not answered since";
            let name = "ztunnel_xds_last_state_age_seconds";
            gauge(age).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        let (name, help) =
            ("ztunnel_xds_last_state_bytes", "What is kept of the control plane's state on disk");
        gauge(kept_bytes).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        let name = "ztunnel_xds_last_state_failures";
        let help = "How often the control plane's state could not be kept on disk";
        let failures = ConstCounter::new(self.0.failures.load(Ordering::Relaxed));
        failures.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)
    }
}
