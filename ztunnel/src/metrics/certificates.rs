//! Expiry of the valid certificates, one gauge per identity.

use std::{
    fmt,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
};

use crate::identity::Certificates;

/// Read at each scrape.
#[derive(Debug)]
pub struct CertificateExpiry(pub Arc<Certificates>);

impl Collector for CertificateExpiry {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let valid: Vec<_> = self.0.list().into_iter().filter(|known| known.credentials.is_some()).collect();
        if valid.is_empty() {
            return Ok(()); // OpenMetrics does not allow a family without samples
        }
        let help = "When the certificate of an identity ends, in seconds since 1970";
        let name = "ztunnel_certificate_expiration_timestamp_seconds";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for known in valid {
            let Some(credentials) = known.credentials else { continue };
            let labels = [("identity", known.identity.to_string())];
            ConstGauge::new(unix(credentials.not_after)).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

fn unix(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}
