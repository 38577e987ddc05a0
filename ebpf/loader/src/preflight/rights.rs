//! Capabilities (capabilities(7)), by name.

use std::fs;

use aya::util::KernelVersion;

use super::Check;

/// What each is for. CAP_SYS_ADMIN, which entering a netns takes, includes CAP_BPF and CAP_PERFMON.
const NEEDED: [(u32, &str, &str); 4] = [
    (12, "CAP_NET_ADMIN", "attaching programs, routes and rules"),
    (19, "CAP_SYS_PTRACE", "looking at the pods' processes"),
    (21, "CAP_SYS_ADMIN", "loading programs, entering the pods' netns"),
    (24, "CAP_SYS_RESOURCE", "memory of maps, which before Linux 5.11 counts as locked"),
];

pub fn capabilities() -> Check {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let locks = KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(5, 11, 0));
    judge(effective(&status), if locks { &NEEDED } else { &NEEDED[..3] })
}

fn judge(effective: Option<u64>, wanted: &[(u32, &str, &str)]) -> Check {
    let needed: Vec<String> = wanted.iter().map(|(_, name, what)| format!("{name} ({what})")).collect();
    let (name, needed) = ("capabilities", needed.join(", "));
    let Some(effective) = effective else {
        return Check::warn(name, &needed, "unknown", "/proc/self/status cannot be read: mount /proc");
    };
    let missing: Vec<&str> =
        wanted.iter().filter(|(number, ..)| effective >> number & 1 == 0).map(|(_, name, _)| *name).collect();
    if missing.is_empty() {
        let names: Vec<&str> = wanted.iter().map(|(_, name, _)| *name).collect();
        return Check::ok(name, &needed, names.join(", "));
    }
    let missing = missing.join(", ");
    let advice = format!("run as root, or give the container {missing} (securityContext.capabilities.add)");
    Check::fail(name, &needed, format!("missing: {missing}"), &advice)
}

/// The effective set, as `/proc/self/status` shows it.
fn effective(status: &str) -> Option<u64> {
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_ones_are_named() {
        let all = effective("Name:\tx\nCapEff:\t000001ffffffffff\n").unwrap();
        assert!(!judge(Some(all), &NEEDED).failed());
        let check = judge(Some(all & !(1 << 19 | 1 << 21)), &NEEDED);
        assert!(check.failed() && check.found == "missing: CAP_SYS_PTRACE, CAP_SYS_ADMIN", "{check:?}");
        assert!(!check.advice.contains("NET_ADMIN"));
        assert_eq!(judge(None, &NEEDED).level, crate::preflight::Level::Warn);
    }
}
