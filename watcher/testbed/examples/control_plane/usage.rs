//! Processor time and memory of a process, as the kernel counts them.

use std::{fs, time::Duration};

use testbed::process::KillOnDrop;

/// `USER_HZ`, which is 100 on every architecture that we build for (`proc(5)`).
const TICKS: u64 = 100;

/// What a process used.
pub struct Usage {
    pid: u32,
    counted: Duration,
}

impl Usage {
    /// From now on.
    pub fn of(process: &KillOnDrop) -> Self {
        let mut usage = Self { pid: process.0.id(), counted: Duration::ZERO };
        usage.processor();
        usage
    }

    /// Since this was asked last.
    pub fn processor(&mut self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).expect("a process");
        let (_, fields) = stat.rsplit_once(')').expect("its name");
        let ticks =
            fields.split_whitespace().skip(11).take(2).map(|text| text.parse::<u64>().expect("ticks"));
        let all = Duration::from_millis(ticks.sum::<u64>() * 1000 / TICKS);
        let since = all.saturating_sub(self.counted);
        self.counted = all;
        since
    }

    /// Resident, in MB.
    pub fn memory(&self) -> f64 {
        self.status("VmRSS:")
    }

    /// The most that was ever resident, in MB.
    pub fn peak(&self) -> f64 {
        self.status("VmHWM:")
    }

    fn status(&self, key: &str) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).expect("a process");
        let line = status.lines().find_map(|line| line.strip_prefix(key)).expect("a line");
        let kibibytes: f64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
        kibibytes * 1024.0 / 1e6
    }
}
