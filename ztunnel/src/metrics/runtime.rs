//! `tokio_*`: statistics of the workers' runtimes, as in Istio's tunnel, which has one runtime with
//! many workers where this one has many runtimes with one worker each.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};
use tokio::runtime::RuntimeMetrics;

/// The runtimes known so far, in the order of the workers.
#[derive(Clone, Debug, Default)]
pub struct Runtimes(Arc<Mutex<Vec<RuntimeMetrics>>>);

impl Runtimes {
    /// Called once for each worker.
    pub fn add(&self, runtime: RuntimeMetrics) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(runtime);
    }
}

impl Collector for Runtimes {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let runtimes = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let sum = |of: fn(&RuntimeMetrics) -> usize| runtimes.iter().map(of).sum::<usize>();
        for (name, help, value) in [
            ("tokio_num_workers", "Number of worker threads", runtimes.len()),
            (
                "tokio_global_queue_depth",
                "Number of tasks scheduled and not taken by a worker yet",
                sum(RuntimeMetrics::global_queue_depth),
            ),
            ("tokio_num_alive_tasks", "Number of tasks alive", sum(RuntimeMetrics::num_alive_tasks)),
        ] {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        let busy = |runtime: &RuntimeMetrics| runtime.worker_total_busy_duration(0).as_secs_f64();
        let help = "Time that the worker was not idle";
        let mut family = encoder.encode_descriptor(
            "tokio_worker_total_busy_duration",
            help,
            Some(&Unit::Seconds),
            MetricType::Counter,
        )?;
        for (worker, runtime) in runtimes.iter().enumerate() {
            let labels = [("worker", worker)];
            ConstCounter::new(busy(runtime)).encode(family.encode_family(&labels)?)?;
        }
        for (name, help, of) in [
            (
                "tokio_worker_park_count",
                "How often the worker went to sleep",
                RuntimeMetrics::worker_park_count as fn(&RuntimeMetrics, usize) -> u64,
            ),
            (
                "tokio_worker_park_unpark_count",
                "How often the worker went to sleep and woke up",
                RuntimeMetrics::worker_park_unpark_count,
            ),
        ] {
            // Gauges by type, since a counter's name would end in `_total`, and Istio's does not.
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (worker, runtime) in runtimes.iter().enumerate() {
                let labels = [("worker", worker)];
                let count = i64::try_from(of(runtime, 0)).unwrap_or(i64::MAX);
                ConstGauge::new(count).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
