//! `process_*`: what the kernel says of this process, asked when somebody asks us.

use std::fmt;

use nix::unistd::{SysconfVar, sysconf};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

/// Registered once.
#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut gauge = |name, help, unit: Option<&Unit>, value: Option<u64>| {
            let Some(value) = value.and_then(|value| i64::try_from(value).ok()) else { return Ok(()) };
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, unit, gauge.metric_type())?)
        };
        gauge("process_open_fds", "Number of open file descriptors", None, open_fds())?;
        gauge("process_max_fds", "Maximum number of open file descriptors", None, max_fds())?;
        let memory = resident_bytes();
        gauge("process_resident_memory", "Resident memory", Some(&Unit::Bytes), memory)?;
        let Some(seconds) = cpu_seconds() else { return Ok(()) };
        let cpu = ConstCounter::new(seconds);
        let help = "User and system CPU time spent";
        cpu.encode(encoder.encode_descriptor("process_cpu", help, Some(&Unit::Seconds), cpu.metric_type())?)
    }
}

fn open_fds() -> Option<u64> {
    // One of them is the listing's own.
    u64::try_from(std::fs::read_dir("/proc/self/fd").ok()?.count()).ok()?.checked_sub(1)
}

fn max_fds() -> Option<u64> {
    let (soft, _hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).ok()?;
    Some(soft)
}

fn configured(value: SysconfVar) -> Option<u64> {
    sysconf(value).ok()??.try_into().ok()
}

/// proc(5): the second field of `statm`, in pages.
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    pages.checked_mul(configured(SysconfVar::PAGE_SIZE)?)
}

/// proc(5): fields 14 and 15 of `stat`, in clock ticks. The second field, the name, may hold spaces.
#[expect(clippy::cast_precision_loss, reason = "2^53 clock ticks are a million years")]
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let mut rest = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    let ticks: u64 = rest.next()?.parse::<u64>().ok()? + rest.next()?.parse::<u64>().ok()?;
    Some(ticks as f64 / configured(SysconfVar::CLK_TCK)? as f64)
}
