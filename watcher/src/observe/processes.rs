//! Which netns the processes of a pod are in.
//!
//! A pid alone may be another process a moment later. So each is pinned by an fd of its `/proc/PID`
//! directory ([`Process`] holds one), which never leads to another process, *before* the cgroup's members are read again: a pid
//! that is still a member then is a process of this pod, and what is opened through the fd is its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use procfs::{Current as _, ProcResult, Uptime, process::Process};

use super::{
    Observed, ObservedNetns,
    cgroup_path::{self, Below},
    cgroups::{self, CgroupId},
    netns::{self, NetnsId, Visitor},
};

/// The processes in `cgroups`, all at or below `pod_dir`, pinned. CRI-O's conmon is left out: it is in the
/// pod's cgroup, but in the node's own netns.
fn members(cgroups: &BTreeMap<PathBuf, CgroupId>, pod_dir: &Path) -> io::Result<Vec<Process>> {
    let is_conmon = |dir: &Path| {
        let name = dir.strip_prefix(pod_dir).ok().and_then(|below| below.iter().next());
        name.is_some_and(|name| cgroup_path::below(name) == Below::Conmon)
    };
    let list = || -> io::Result<BTreeSet<i32>> {
        let mut pids = BTreeSet::new();
        for dir in cgroups.keys().filter(|dir| !is_conmon(dir)) {
            pids.extend(cgroups::processes(dir)?);
        }
        Ok(pids)
    };
    let pinned: Vec<Process> = list()?.into_iter().filter_map(|pid| Process::new(pid).ok()).collect();
    if pinned.is_empty() {
        return Ok(pinned);
    }
    let still = list()?;
    Ok(pinned.into_iter().filter(|process| still.contains(&process.pid)).collect())
}

/// A container runtime puts a new process into its cgroup before it puts it into its namespaces. So the netns
/// of a process younger than this counts only when a second observation, after [`SETTLED_AFTER`], agrees.
const YOUNG: Duration = Duration::from_millis(500);
const SETTLED_AFTER: Duration = Duration::from_millis(20);
/// Every process starts in the node's own netns, so that netns counts only after this long.
const AT_HOME_AFTER: Duration = Duration::from_secs(2);

/// The netns of young processes, and since when they are in it. By pid and start time, since pids are reused.
pub(crate) type NetnsHistory = BTreeMap<(i32, u64), (NetnsId, Instant)>;

/// The result of observing a pod.
#[derive(Debug, Default)]
pub(crate) struct PodObservation {
    /// What the pod has.
    pub observed: Observed,
    /// Its open netns by cookie, for immediate use. Kept open, they would outlive their pods.
    pub opened: BTreeMap<u64, OwnedFd>,
    /// For the next observation.
    pub history: NetnsHistory,
}

/// Observes the pod whose directory is `cgroup` and whose netns must have `addresses`. Each netns is entered
/// every time: its id and addresses must not be cached, since both are reused by other pods.
///
/// # Errors
/// The cgroup tree or a netns cannot be read.
pub(crate) fn observe_pod(
    visitor: &Visitor,
    cgroup: &Path,
    addresses: &BTreeSet<IpAddr>,
    host: &BTreeSet<NetnsId>,
    earlier: &NetnsHistory,
) -> io::Result<PodObservation> {
    let cgroups: BTreeMap<PathBuf, CgroupId> = cgroups::tree(cgroup)?;
    let mut found: BTreeMap<NetnsId, ObservedNetns> = BTreeMap::new();
    let mut observation = PodObservation::default();
    for process in members(&cgroups, cgroup)? {
        // A process that ended, or a zombie, has no netns any more.
        let Ok(netns) = open_own_netns(&process) else { continue };
        let id = netns::id(netns.as_fd())?;
        if found.contains_key(&id) {
            continue;
        }
        let is_host = host.contains(&id);
        let seen = if is_host {
            ObservedNetns::Host
        } else {
            match netns::facts(visitor, netns.as_fd()) {
                Ok(facts) => ObservedNetns::Pod(facts),
                Err(error) => ObservedNetns::Unreadable(format!("process {}: {error}", process.pid)),
            }
        };
        // No other netns has the pod's own addresses. That proves it at once, in the usual case.
        let proven = matches!(&seen, ObservedNetns::Pod(facts) if !addresses.is_empty()
            && addresses.iter().all(|address| facts.addresses.contains(address)));
        if !proven && !is_settled(&process, id, is_host, earlier, &mut observation.history) {
            continue;
        }
        if let ObservedNetns::Pod(facts) = &seen {
            observation.opened.insert(facts.cookie, netns);
        }
        found.insert(id, seen);
    }
    let netns = found.into_values().collect();
    observation.observed = Observed { dir: Some(cgroup.to_owned()), cgroups, netns };
    Ok(observation)
}

fn open_own_netns(process: &Process) -> ProcResult<OwnedFd> {
    Ok(process.open_relative("ns/net")?.into())
}

/// Whether `process` will stay in the netns that it is in, as far as one can tell.
fn is_settled(
    process: &Process,
    id: NetnsId,
    is_host: bool,
    earlier: &NetnsHistory,
    history: &mut NetnsHistory,
) -> bool {
    let Some((ticks, started)) = started(process) else { return false };
    let age = uptime().saturating_sub(started);
    if age > if is_host { AT_HOME_AFTER } else { YOUNG } {
        return true;
    }
    let now = Instant::now();
    let since = match earlier.get(&(process.pid, ticks)) {
        Some((before, since)) if *before == id => *since,
        _ => now,
    };
    history.insert((process.pid, ticks), (id, since));
    !is_host && now.duration_since(since) >= SETTLED_AFTER
}

/// When `process` was started: in the kernel's ticks, and since boot. `None`: it has ended.
fn started(process: &Process) -> Option<(u64, Duration)> {
    let ticks = process.stat().ok()?.starttime;
    Some((ticks, Duration::from_millis(ticks * 1000 / procfs::ticks_per_second())))
}

/// How long the machine has been up; zero, and every process young, where that cannot be read.
fn uptime() -> Duration {
    Uptime::current().map(|uptime| uptime.uptime_duration()).unwrap_or_default()
}

/// Opens netns `id` through a process of the pod whose directory is `cgroup`.
///
/// # Errors
/// `NotFound`: no process of the pod is in that netns any more.
pub(crate) fn open_netns(cgroup: &Path, id: NetnsId) -> io::Result<OwnedFd> {
    let cgroups = cgroups::tree(cgroup)?;
    members(&cgroups, cgroup)?
        .into_iter()
        .filter_map(|process| open_own_netns(&process).ok())
        .find(|netns| netns::id(netns.as_fd()).is_ok_and(|found| found == id))
        .ok_or_else(|| {
            let message = format!("no process of {} is in netns {} any more", cgroup.display(), id.inode);
            io::Error::new(io::ErrorKind::NotFound, message)
        })
}
