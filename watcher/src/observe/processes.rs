//! Which netns the processes of a pod are in.
//!
//! A pid alone may be another process a moment later. So a process is pinned by an fd of its
//! `/proc/PID` directory ([`Process`] holds one), which never leads to another process, *before*
//! the cgroup's members are read again: a pid that is still a member then is a process of this pod,
//! and what is opened through the fd is its own.
//!
//! Processes are looked at one after the other, and no descriptor is held longer than that takes:
//! the netns of a process that is not pinned is read by stat(2), and only one that is new is worth
//! a pin. The first process that proves the pod's netns ends the search.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use procfs::{Current as _, ProcError, Uptime, process::Process};

use crate::model::reason::{Reason, ReasonCode};

use super::{
    Gap, Observed, ObservedNetns, budget,
    cgroup_path::{self, Below},
    cgroups,
    netns::{self, NetnsId, NetnsReading, Visitor},
};

/// A container runtime puts a new process into its cgroup before it puts it into its namespaces. So
/// the netns of a process younger than this counts only when a second observation, after
/// [`SETTLED_AFTER`], agrees.
const YOUNG: Duration = Duration::from_millis(500);
const SETTLED_AFTER: Duration = Duration::from_millis(20);
/// Every process starts in the node's own netns, so that netns counts only after this long.
const AT_HOME_AFTER: Duration = Duration::from_secs(2);

/// The netns of young processes, and since when they are in it. By pid and start time, since pids
/// are reused.
type NetnsHistory = BTreeMap<(i32, u64), (NetnsId, Instant)>;

/// What an observation leaves to the next one of the same pod.
#[derive(Clone, Debug, Default)]
pub(crate) struct Memory {
    history: NetnsHistory,
    /// The process that proved the pod's netns, and its cgroup: it is asked first.
    witness: Option<Member>,
}

/// A process of a pod, by its pid: it may have ended.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Member {
    pid: i32,
    cgroup: PathBuf,
}

/// A pod that is to be observed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject<'a> {
    /// Its cgroup directory.
    pub dir: &'a Path,
    /// Addresses that its netns has; empty: not known.
    pub addresses: &'a BTreeSet<IpAddr>,
    /// The cookie of the netns that it is enrolled with.
    pub current: Option<u64>,
    /// What the last observation left.
    pub memory: &'a Memory,
}

/// The result of observing a pod.
#[derive(Debug, Default)]
pub(crate) struct PodObservation {
    /// What the pod has.
    pub observed: Observed,
    /// Its netns, open, with the cookie, for immediate use. Kept open, it would outlive its pod.
    pub opened: Option<(u64, OwnedFd)>,
    /// For the next observation.
    pub memory: Memory,
}

/// Observes a pod. `host` are the netns of the node itself. Each netns is entered every time: its
/// id and addresses must not be cached, since both are reused by other pods.
pub(crate) fn observe_pod(
    visitor: &Visitor,
    subject: Subject<'_>,
    host: &BTreeSet<NetnsId>,
) -> PodObservation {
    let mut search = Search {
        visitor,
        subject,
        host,
        deadline: budget::deadline(),
        known: BTreeMap::new(),
        tried: BTreeMap::new(),
        settled: BTreeSet::new(),
        opened: None,
        excess: None,
        memory: Memory::default(),
    };
    let (cgroups, gap) = search.run();
    let Search { mut known, settled, opened, mut memory, .. } = search;
    let observed = match gap {
        Some(Gap::NotKnown(reason)) => {
            memory = subject.memory.clone();
            Observed { cgroups, ..Observed::not_known(Some(subject.dir.to_owned()), reason) }
        }
        gap => {
            let netns = settled.iter().filter_map(|id| known.remove(id)).collect();
            Observed { dir: Some(subject.dir.to_owned()), cgroups, netns, gap }
        }
    };
    let opened = opened.filter(|_| observed.netns.len() == 1);
    PodObservation { observed, opened, memory }
}

/// Why a search ends early.
enum Stop {
    /// The pod's netns is proven.
    Proven,
    /// It is not decided.
    Gap(Gap),
}

/// An error on the way is an error of the look, never of the pod.
impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        not_known(ReasonCode::NotObserved, format!("cannot read the pod's cgroup or processes: {error}"))
    }
}

fn not_known(code: ReasonCode, text: String) -> Stop {
    Stop::Gap(Gap::NotKnown(Reason::new(code, text)))
}

fn over_budget(text: String) -> Stop {
    Stop::Gap(Gap::OverBudget(Reason::new(ReasonCode::OverBudget, text)))
}

/// One observation.
struct Search<'a> {
    visitor: &'a Visitor,
    subject: Subject<'a>,
    host: &'a BTreeSet<NetnsId>,
    deadline: Instant,
    /// The netns that were looked at.
    known: BTreeMap<NetnsId, ObservedNetns>,
    /// How many processes of each were asked whether they will stay.
    tried: BTreeMap<NetnsId, usize>,
    /// Those in which processes will stay.
    settled: BTreeSet<NetnsId>,
    /// The first one of these that is not the node's.
    opened: Option<(u64, OwnedFd)>,
    /// What was more than is read. It counts unless the pod's netns is proven otherwise.
    excess: Option<String>,
    memory: Memory,
}

impl Search<'_> {
    /// The pod's cgroups, and why the rest is not all.
    fn run(&mut self) -> (BTreeMap<PathBuf, cgroups::CgroupId>, Option<Gap>) {
        let dir = self.subject.dir;
        let tree = match cgroups::tree(dir, budget::CGROUPS) {
            Ok(tree) => tree,
            Err(error) => {
                let text = format!("cannot read cgroup {}: {error}", dir.display());
                let gap = Gap::NotKnown(Reason::new(ReasonCode::NotObserved, text));
                // Its id needs no descriptor, and is enough to close it.
                let own = cgroups::id(dir).map(|id| (dir.to_owned(), id)).into_iter().collect();
                return (own, Some(gap));
            }
        };
        let gap = match self.look_at_all(&tree) {
            Ok(()) | Err(Stop::Proven) => None,
            Err(Stop::Gap(gap)) => Some(gap),
        };
        (tree.cgroups, gap)
    }

    fn look_at_all(&mut self, tree: &cgroups::Tree) -> Result<(), Stop> {
        if let Some(witness) = &self.subject.memory.witness {
            self.look_at(witness)?;
        }
        let (members, is_whole) = members(tree, self.subject.dir)?;
        for member in &members {
            if Instant::now() > self.deadline {
                let (number, netns) = (members.len(), self.known.len());
                let text =
                    format!("no time to look at {number} processes in {netns} network namespaces or more");
                return Err(not_known(ReasonCode::OverBudget, text));
            }
            self.look_at(member)?;
        }
        match self.excess.take() {
            Some(text) => Err(over_budget(text)),
            None if is_whole => Ok(()),
            None => Err(over_budget(format!(
                "none of the first {} processes in the first {} cgroups proves which netns is the pod's",
                members.len(),
                tree.cgroups.len()
            ))),
        }
    }

    /// Looks at one process, unless its netns is known to be one that counts.
    fn look_at(&mut self, member: &Member) -> Result<(), Stop> {
        let Some(listed) = netns_of(member.pid)? else { return Ok(()) };
        let tried = self.tried.get(&listed).copied().unwrap_or(0);
        if self.settled.contains(&listed) || tried >= budget::YOUNG_PROCESSES {
            return Ok(());
        }
        let Some(process) = pin(member)? else { return Ok(()) };
        let Some(netns) = open_own_netns(&process)? else { return Ok(()) };
        let id = netns::id(netns.as_fd())?;
        *self.tried.entry(id).or_default() += 1;
        let proven = self.enter(&process, id, &netns)?;
        if !proven && !self.is_settled(&process, id)? {
            return Ok(());
        }
        let seen = self.known.get(&id);
        let current = self.subject.current;
        let is_current = matches!(seen, Some(ObservedNetns::Pod(facts)) if Some(facts.cookie) == current);
        // The pod stays in its netns as long as one of its processes does: otherwise a process
        // could take it out of the mesh by `unshare`. So what else has its addresses counts only
        // when none does.
        if is_current || (proven && current.is_none()) {
            self.settled.clear();
            self.opened = None;
            self.memory.witness = Some(member.clone());
        }
        if let Some(ObservedNetns::Pod(facts)) = self.known.get(&id) {
            let cookie = facts.cookie;
            self.opened.get_or_insert((cookie, netns));
        }
        self.settled.insert(id);
        if is_current || (proven && current.is_none()) { Err(Stop::Proven) } else { Ok(()) }
    }

    /// Enters the netns `id`, unless it is known. Whether it has all the pod's addresses: no other
    /// one has them, in the usual case.
    fn enter(&mut self, process: &Process, id: NetnsId, netns: &OwnedFd) -> Result<bool, Stop> {
        let wanted = self.subject.addresses;
        let has_all =
            |held: &[IpAddr]| !wanted.is_empty() && wanted.iter().all(|address| held.contains(address));
        if let Some(seen) = self.known.get(&id) {
            return Ok(matches!(seen, ObservedNetns::Pod(facts) if has_all(&facts.addresses)));
        }
        if self.known.len() == budget::NETNS {
            return Err(over_budget(format!(
                "its processes are in more than {} network namespaces, and none of these proves to be the pod's",
                budget::NETNS
            )));
        }
        if self.host.contains(&id) {
            self.known.insert(id, ObservedNetns::Host);
            return Ok(false);
        }
        let NetnsReading { mut facts, is_whole } =
            netns::facts(self.visitor, netns.as_fd()).map_err(|error| {
                let text = format!("cannot read the netns of process {}: {error}", process.pid);
                not_known(ReasonCode::NetnsUnreadable, text)
            })?;
        let proven = has_all(&facts.addresses);
        if proven {
            // Of others, those that count as the pod's too.
            let mut others = 0..budget::SPARE_ADDRESSES;
            facts.addresses.retain(|address| wanted.contains(address) || others.next().is_some());
            facts.link_local_v4.truncate(budget::SPARE_ADDRESSES);
            let kept: BTreeSet<IpAddr> =
                facts.addresses.iter().chain(&facts.link_local_v4).copied().collect();
            facts.devices.retain(|address, _| kept.contains(address));
        } else if !is_whole {
            let text = format!("netns {} has more than {} addresses", id.inode, budget::ADDRESSES);
            self.excess.get_or_insert(text);
        }
        self.known.insert(id, ObservedNetns::Pod(facts));
        Ok(proven)
    }

    /// Whether `process` will stay in the netns that it is in, as far as one can tell.
    fn is_settled(&mut self, process: &Process, id: NetnsId) -> Result<bool, Stop> {
        let is_host = self.host.contains(&id);
        let Some((ticks, started)) = started(process)? else { return Ok(false) };
        let age = uptime()?.saturating_sub(started);
        if age > if is_host { AT_HOME_AFTER } else { YOUNG } {
            return Ok(true);
        }
        let now = Instant::now();
        let since = match self.subject.memory.history.get(&(process.pid, ticks)) {
            Some((before, since)) if *before == id => *since,
            _ => now,
        };
        self.memory.history.insert((process.pid, ticks), (id, since));
        Ok(!is_host && now.duration_since(since) >= SETTLED_AFTER)
    }
}

/// The processes in `tree`, all at or below `pod_dir`, as many as are looked at, and whether these
/// are all. CRI-O's conmon is left out: it is in the pod's cgroup, but in the node's own netns.
///
/// The first ones of each cgroup come first, so that no container hides another one; among them by
/// pid, so that what started first, as the sandbox does, comes first.
fn members(tree: &cgroups::Tree, pod_dir: &Path) -> io::Result<(Vec<Member>, bool)> {
    const FIRST: usize = budget::PROCESSES / budget::CGROUPS;
    let is_conmon = |dir: &Path| {
        let name = dir.strip_prefix(pod_dir).ok().and_then(|below| below.iter().next());
        name.is_some_and(|name| cgroup_path::below(name) == Below::Conmon)
    };
    let (mut members, mut others, mut is_whole) = (Vec::new(), Vec::new(), tree.is_whole);
    for dir in tree.cgroups.keys().filter(|dir| !is_conmon(dir)) {
        let limit = FIRST.max(budget::PROCESSES.saturating_sub(members.len() + others.len()));
        let mut pids = cgroups::processes(dir, limit + 1)?;
        is_whole &= pids.len() <= limit;
        pids.truncate(limit);
        let member = |pid: &i32| Member { pid: *pid, cgroup: dir.clone() };
        let (first, rest) = pids.split_at(pids.len().min(FIRST));
        members.extend(first.iter().map(member));
        others.extend(rest.iter().map(member));
    }
    members.sort_unstable_by_key(|member| member.pid);
    others.sort_unstable_by_key(|member| member.pid);
    members.append(&mut others);
    is_whole &= members.len() <= budget::PROCESSES;
    members.truncate(budget::PROCESSES);
    Ok((members, is_whole))
}

/// The process, pinned, if it is a process of its cgroup.
fn pin(member: &Member) -> io::Result<Option<Process>> {
    let Some(process) = unless_gone(Process::new(member.pid))? else { return Ok(None) };
    let is_member = cgroups::has_process(&member.cgroup, member.pid, budget::PROCESSES)?;
    Ok(is_member.then_some(process))
}

/// The netns of the process that has this pid at the moment.
fn netns_of(pid: i32) -> io::Result<Option<NetnsId>> {
    match std::fs::metadata(format!("/proc/{pid}/ns/net")) {
        Ok(found) => Ok(Some(NetnsId { dev: found.dev(), inode: found.ino() })),
        Err(error) if is_ended(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A process that ended, or a zombie, has no netns any more.
fn open_own_netns(process: &Process) -> io::Result<Option<OwnedFd>> {
    unless_gone(process.open_relative("ns/net").map(OwnedFd::from))
}

fn is_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// `None`: the process has ended.
fn unless_gone<T>(result: Result<T, ProcError>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(ProcError::NotFound(_)) => Ok(None),
        Err(ProcError::Io(error, _)) => Err(error),
        Err(error @ ProcError::PermissionDenied(_)) => {
            Err(io::Error::new(io::ErrorKind::PermissionDenied, error))
        }
        Err(error) => Err(io::Error::other(error)),
    }
}

/// When `process` was started: in the kernel's ticks, and since boot. `None`: it has ended.
fn started(process: &Process) -> io::Result<Option<(u64, Duration)>> {
    let Some(stat) = unless_gone(process.stat())? else { return Ok(None) };
    let ticks = stat.starttime;
    Ok(Some((ticks, Duration::from_millis(ticks * 1000 / procfs::ticks_per_second()))))
}

/// How long the machine has been up.
fn uptime() -> io::Result<Duration> {
    Uptime::current().map(|uptime| uptime.uptime_duration()).map_err(io::Error::other)
}

/// Opens netns `id` through a process of the pod whose directory is `cgroup`.
///
/// # Errors
/// `NotFound`: no process of the pod is in that netns any more.
pub(crate) fn open_netns(cgroup: &Path, id: NetnsId) -> io::Result<OwnedFd> {
    let tree = cgroups::tree(cgroup, budget::CGROUPS)?;
    for member in members(&tree, cgroup)?.0 {
        if netns_of(member.pid)? != Some(id) {
            continue;
        }
        let Some(process) = pin(&member)? else { continue };
        if let Some(netns) = open_own_netns(&process)?
            && netns::id(netns.as_fd())? == id
        {
            return Ok(netns);
        }
    }
    let message = format!("no process of {} is in netns {} any more", cgroup.display(), id.inode);
    Err(io::Error::new(io::ErrorKind::NotFound, message))
}
