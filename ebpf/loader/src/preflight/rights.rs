//! Capabilities (capabilities(7)), by name.

use aya::util::KernelVersion;
use caps::{CapSet, Capability, CapsHashSet};

use super::Check;

/// What each is for. CAP_SYS_ADMIN, which entering a netns takes, includes CAP_BPF and CAP_PERFMON.
const NEEDED: [(Capability, &str); 4] = [
    (Capability::CAP_NET_ADMIN, "attaching programs, routes and rules"),
    (Capability::CAP_SYS_PTRACE, "looking at the pods' processes"),
    (Capability::CAP_SYS_ADMIN, "loading programs, entering the pods' netns"),
    (Capability::CAP_SYS_RESOURCE, "memory of maps, which before Linux 5.11 counts as locked"),
];

/// Whether this process has the capabilities that the watcher needs.
pub(super) fn capabilities() -> Check {
    let locks = KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(5, 11, 0));
    let wanted = if locks { &NEEDED[..] } else { &NEEDED[..3] };
    judge(caps::read(None, CapSet::Effective).ok().as_ref(), wanted)
}

fn judge(effective: Option<&CapsHashSet>, wanted: &[(Capability, &str)]) -> Check {
    let needed: Vec<String> = wanted.iter().map(|(name, what)| format!("{name} ({what})")).collect();
    let (name, needed) = ("capabilities", needed.join(", "));
    let Some(effective) = effective else {
        return Check::warn(name, &needed, "unknown", "the kernel does not report them: see capget(2)");
    };
    let names = |wanted: &mut dyn Iterator<Item = Capability>| {
        wanted.map(|capability| capability.to_string()).collect::<Vec<_>>().join(", ")
    };
    let all = || wanted.iter().map(|(capability, _)| *capability);
    let missing = names(&mut all().filter(|capability| !effective.contains(capability)));
    if missing.is_empty() {
        return Check::ok(name, &needed, names(&mut all()));
    }
    let advice = format!("run as root, or give the container {missing} (securityContext.capabilities.add)");
    Check::fail(name, &needed, format!("missing: {missing}"), &advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_ones_are_named() {
        let mut effective = caps::all();
        assert!(!judge(Some(&effective), &NEEDED).failed());
        effective.remove(&Capability::CAP_SYS_PTRACE);
        effective.remove(&Capability::CAP_SYS_ADMIN);
        let check = judge(Some(&effective), &NEEDED);
        assert!(check.failed() && check.found == "missing: CAP_SYS_PTRACE, CAP_SYS_ADMIN", "{check:?}");
        assert!(!check.advice.contains("NET_ADMIN"));
        assert_eq!(judge(None, &NEEDED).level, crate::preflight::Level::Warn);
    }
}
