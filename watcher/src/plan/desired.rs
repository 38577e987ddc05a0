//! From an eligible pod to its plan: the map entries, the netns, and what tunnels receive.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use adit_ebpf_common::{
    enrolment::{CgroupInfo, NetnsInfo, PodRecord, flag},
    lifecycle::Name,
};

use crate::{
    model::{
        exclusions::Exclusions,
        pod::{FailMode, Pod, PodIdentity, Selection},
    },
    observe::{
        Observed,
        cgroups::CgroupId,
        netns::{NetnsFacts, NetnsId},
    },
};

use super::{Eligibility, PodNetns, PodPlan, PodView, PodWorkload, address16, cgroup_info};

/// What [`pod_plan`] needs to know besides the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is answered by another owner")]
pub(crate) struct Circumstances {
    /// The fail mode of pods that do not choose one.
    pub fail_mode: FailMode,
    /// Whether DNS queries go to the tunnel, for pods that do not choose.
    pub dns_capture: bool,
    /// Whether a connected tunnel acknowledged the pod with its present netns.
    pub ready: bool,
    /// Whether the programs that spread redirects over ports are attached to its netns.
    pub spread: bool,
    /// Whether the pod ran in plaintext until now. It continues to do so until a tunnel serves it,
    /// since a label put on a running pod must not fail a single connection.
    pub in_grace: bool,
    /// Whether a sidecar was found in it, which carries its traffic.
    pub has_sidecar: bool,
    /// Whether its HBONE listener is served although no label enrols it any more.
    pub leaving: bool,
    /// The pod's exclusions, with the node's numbers of users and groups.
    pub exclusions: Arc<Exclusions>,
    /// The id of those; 0: they take no entries.
    pub exclusion_id: u32,
    /// Netns that are steered for the pod, by cookie.
    pub steered: BTreeMap<u64, PodNetns>,
    /// Possible names of the cgroup of a pod that has none yet.
    pub cgroup_names: Vec<Name>,
}

/// What the node should hold for the pod of `view`.
#[must_use]
pub(crate) fn pod_plan(view: &PodView, circumstances: &Circumstances) -> PodPlan {
    let PodView { pod, observed, eligibility, .. } = view;
    let fail_open = pod.fail_mode.unwrap_or(circumstances.fail_mode) == FailMode::Open;
    let closed = flag::IN_MESH | if fail_open { flag::FAIL_OPEN } else { 0 };
    let mut plan = PodPlan::default();
    if pod.selection == Selection::Enrolled && observed.cgroups.is_empty() {
        let info = cgroup_info(closed, 0, &[]);
        plan.expected = circumstances.cgroup_names.iter().map(|name| (*name, info)).collect();
    }
    let info = match eligibility {
        Eligibility::Plain(_) if circumstances.leaving => {
            leave(&mut plan, view, &circumstances.steered);
            return plan;
        }
        Eligibility::Plain(_) | Eligibility::Refused { keeps_closed: false, .. } => return plan,
        Eligibility::Waiting(_) | Eligibility::Refused { keeps_closed: true, .. } => {
            close(&mut plan, view, closed, &circumstances.steered)
        }
        Eligibility::Eligible(_) if circumstances.has_sidecar => {
            CgroupInfo { detected: flag::SIDECAR, ..cgroup_info(closed, 0, &[]) }
        }
        Eligibility::Eligible(facts) => {
            let in_grace = circumstances.in_grace && !circumstances.ready;
            let flags = closed
                | if circumstances.ready { flag::READY } else { 0 }
                | if in_grace { flag::FAIL_OPEN } else { 0 };
            enroll(&mut plan, view, facts, flags, circumstances)
        }
    };
    let has_guards = matches!(eligibility, Eligibility::Eligible(_));
    let guarded = |path: &Path| {
        // The pod's own directory is no container's, whatever it is called.
        let is_container = observed.dir.as_deref() != Some(path);
        let flags = if has_guards && is_container && is_guarded(pod, path) { flag::GUARDED } else { 0 };
        CgroupInfo { flags: info.flags | flags, ..info }
    };
    plan.cgroups = entered(observed).map(|(path, id)| (*id, guarded(path))).collect();
    plan
}

/// Closes the netns of a pod that is kept closed; returns the entry of its cgroups.
fn close(plan: &mut PodPlan, view: &PodView, flags: u32, steered: &BTreeMap<u64, PodNetns>) -> CgroupInfo {
    for (netns_cookie, id) in &view.closed_netns {
        let before = || steered.get(netns_cookie).map(|before| before.id);
        let Some(id): Option<NetnsId> = id.or_else(before) else { continue };
        let netns = PodNetns {
            id,
            pod_cgroup: view.observed.dir.clone().unwrap_or_default(),
            uid: view.pod.uid.clone(),
            pod: None,
            v6: false,
            devices: BTreeSet::new(),
            prepared: false,
        };
        plan.netns.insert(*netns_cookie, netns);
        plan.arrivals.insert(*netns_cookie, arrivals(view, flags, 0));
    }
    // The netns of its next process may be another one: a sandbox that is made anew has one of its own.
    let Observed { netns, gap, .. } = &view.observed;
    if netns.is_empty() && gap.is_none() {
        return cgroup_info(flags, 0, &[]);
    }
    // Of several nobody knows which one is the pod's: its processes are closed in all of them.
    let mut cookies = plan.netns.keys().copied();
    let only = cookies.next().filter(|_| cookies.next().is_none());
    CgroupInfo { netns_cookie: only.unwrap_or(0), ..cgroup_info(flags, 0, &[]) }
}

/// Leaves a pod alone whose label is off, but for the tunnel's HBONE listener: what arrives passes,
/// to that listener too, and the tunnel goes on to serve those who dial it.
fn leave(plan: &mut PodPlan, view: &PodView, steered: &BTreeMap<u64, PodNetns>) {
    let Some((cookie, netns)) = steered.iter().find(|(_, netns)| netns.prepared) else { return };
    let mut netns = netns.clone();
    if let Some(dir) = &view.observed.dir {
        // What an earlier watcher left does not say where its pod is.
        netns.pod_cgroup.clone_from(dir);
    }
    plan.arrivals = [(*cookie, arrivals(view, flag::IN_MESH | flag::FAIL_OPEN, 0))].into();
    plan.workload = Some(workload(&view.pod, *cookie, netns.id, netns.pod_cgroup.clone()));
    plan.netns = [(*cookie, netns)].into();
}

/// What tunnels receive of `pod`.
fn workload(pod: &Pod, cookie: u64, netns: NetnsId, pod_cgroup: PathBuf) -> PodWorkload {
    PodWorkload {
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        service_account: pod.service_account.clone(),
        cookie,
        netns,
        pod_cgroup,
    }
}

/// What holds for arrivals in a netns of the pod of `view`.
fn arrivals(view: &PodView, flags: u32, exclusion_id: u32) -> NetnsInfo {
    let own = view.observed.dir.as_ref().and_then(|dir| view.observed.cgroups.get(dir));
    NetnsInfo { cgroup_id: own.copied().unwrap_or(0), flags, exclusion_id }
}

/// The cgroups of a pod that have entries: its own, and those right below it, which are its
/// containers. The programs find the entry of any other one by walking up, and what a pod makes
/// below may not fill the map. An entry of a container's own spares an event for each exec in it.
fn entered(observed: &Observed) -> impl Iterator<Item = (&PathBuf, &CgroupId)> {
    const CONTAINERS: usize = 32;
    let dir = observed.dir.as_deref();
    let own = dir.and_then(|dir| observed.cgroups.get_key_value(dir));
    let below = observed.cgroups.iter().filter(move |(path, _)| path.parent() == dir);
    own.into_iter().chain(below.take(CONTAINERS))
}

/// Whether the cgroup at `path` is that of a container whose processes are left alone. Container
/// runtimes name it by the container's id, with something before and behind it.
#[must_use]
pub(crate) fn is_guarded(pod: &Pod, path: &Path) -> bool {
    let Some(directory) = path.file_name().and_then(|name| name.to_str()) else { return false };
    pod.exclusions.guards.containers.iter().any(|name| {
        name == directory || pod.containers.get(name).is_some_and(|id| directory.contains(id.as_str()))
    })
}

/// Fills in what only an eligible pod has; returns the entry of its cgroups.
fn enroll(
    plan: &mut PodPlan,
    view: &PodView,
    facts: &NetnsFacts,
    flags: u32,
    circumstances: &Circumstances,
) -> CgroupInfo {
    let PodView { pod, observed, .. } = view;
    let exclusion_id = circumstances.exclusion_id;
    if exclusion_id != 0 {
        plan.exclusions = Some((exclusion_id, Arc::clone(&circumstances.exclusions)));
    }
    let record = |address: &IpAddr| {
        let device = facts.devices.get(address).copied().unwrap_or(0);
        PodRecord { netns_cookie: facts.cookie, flags, device }
    };
    plan.addresses = facts.addresses.iter().map(|address| (address16(*address), record(address))).collect();
    let pod_cgroup = observed.dir.clone().unwrap_or_default();
    plan.arrivals = [(facts.cookie, arrivals(view, flags, exclusion_id))].into();
    let netns = PodNetns {
        id: facts.id,
        pod_cgroup: pod_cgroup.clone(),
        uid: pod.uid.clone(),
        pod: Some(PodIdentity::of(pod)),
        v6: facts.addresses.iter().any(IpAddr::is_ipv6),
        devices: facts.devices.values().copied().collect(),
        prepared: true,
    };
    plan.netns = [(facts.cookie, netns)].into();
    plan.workload = Some(workload(pod, facts.cookie, facts.id, pod_cgroup));
    let captures_dns = pod.dns_capture.unwrap_or(circumstances.dns_capture);
    let dns = if captures_dns { flag::DNS_CAPTURE } else { 0 };
    let spread = if circumstances.spread { flag::SPREAD } else { 0 };
    let guards_ids = exclusion_id != 0 && circumstances.exclusions.guards.has_ids();
    let guards = if guards_ids { flag::GUARDS_IDS } else { 0 };
    let excludes_devices = exclusion_id != 0 && !circumstances.exclusions.devices.is_empty();
    let devices = if excludes_devices { flag::EXCLUDES_DEVICES } else { 0 };
    let flags = flags | dns | spread | guards | devices;
    CgroupInfo { netns_cookie: facts.cookie, ..cgroup_info(flags, exclusion_id, &facts.addresses) }
}
