//! Panics, read at each scrape.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::counter::ConstCounter,
};

use crate::supervision;

/// `ztunnel_panics_total`.
#[derive(Debug)]
pub(super) struct Panics;

impl Collector for Panics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let counter = ConstCounter::new(supervision::panics());
        let help = "Panics, each of which ended a connection, a query or the process";
        counter.encode(encoder.encode_descriptor("ztunnel_panics", help, None, counter.metric_type())?)
    }
}
