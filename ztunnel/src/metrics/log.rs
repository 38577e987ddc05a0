//! Log lines that were dropped.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter},
};
use tracing_appender::non_blocking::ErrorCounter;

/// Counts log lines dropped because the queue was full. Read at each scrape.
#[derive(Clone, Debug)]
pub struct LostLogLines(pub(crate) ErrorCounter);

impl Collector for LostLogLines {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let counter = ConstCounter::new(u64::try_from(self.0.dropped_lines()).unwrap_or(u64::MAX));
        let help = "Log lines lost since writing them could not keep up";
        let name = "ztunnel_log_lines_lost";
        counter.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)
    }
}
