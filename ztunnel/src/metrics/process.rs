//! `process_*`: descriptors, memory and CPU time of this process, read at each scrape.

use std::fmt;

use procfs::process::{Process, Stat};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

/// Registered once.
#[derive(Debug)]
pub(super) struct ProcessMetrics;

impl Collector for ProcessMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut gauge = |name, help, unit: Option<&Unit>, value: Option<u64>| {
            let Some(value) = value.and_then(|value| i64::try_from(value).ok()) else { return Ok(()) };
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, unit, gauge.metric_type())?)
        };
        gauge("process_open_fds", "Number of open file descriptors", None, open_fds())?;
        gauge("process_max_fds", "Maximum number of open file descriptors", None, max_fds())?;
        let Ok(stat) = Process::myself().and_then(|process| process.stat()) else { return Ok(()) };
        gauge("process_resident_memory", "Resident memory", Some(&Unit::Bytes), resident_bytes(&stat))?;
        let cpu = ConstCounter::new(cpu_seconds(&stat));
        let help = "User and system CPU time spent";
        cpu.encode(encoder.encode_descriptor("process_cpu", help, Some(&Unit::Seconds), cpu.metric_type())?)
    }
}

/// Read from the directory, since `procfs` counts differently before and after Linux 6.2.
fn open_fds() -> Option<u64> {
    // One of them is the listing's own.
    u64::try_from(std::fs::read_dir("/proc/self/fd").ok()?.count()).ok()?.checked_sub(1)
}

fn max_fds() -> Option<u64> {
    let (soft, _hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).ok()?;
    Some(soft)
}

fn resident_bytes(stat: &Stat) -> Option<u64> {
    stat.rss.checked_mul(procfs::page_size())
}

#[expect(clippy::cast_precision_loss, reason = "2^53 clock ticks are a million years")]
fn cpu_seconds(stat: &Stat) -> f64 {
    (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64
}
