//! Answers to commands, from what the watcher knows and what is applied.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use adit_ebpf_common::{enrolment::CgroupInfo, verdicts::Verdicts};
use error_reporter::Report;
use ipnet::IpNet;

use crate::{
    apply::Applier,
    model::{
        pod::{BadEntry, FailMode},
        reason::Reason,
        state::State,
    },
    plan::PodView,
};

use super::{
    explain::{self, Explanation},
    lists,
    status::{DrainingStatus, NetnsStatus, PodStatus, TunnelStatus, VerdictStatus},
};

/// The one pod among `pods` with this uid, name or namespace/name.
///
/// # Errors
/// There is none, or several: a sentence for the user.
pub(crate) fn find<'a>(pods: impl Iterator<Item = &'a PodView>, named: &str) -> Result<&'a PodView, String> {
    let fits = |view: &&PodView| view.pod.uid == named || view.pod.name == named || view.full_name() == named;
    let found: Vec<&PodView> = pods.filter(fits).collect();
    match found.as_slice() {
        [one] => Ok(one),
        [] => Err(format!("no pod \"{named}\", expected a uid, name or namespace/name")),
        several => Err(format!("{} pods match \"{named}\"; use the uid of one", several.len())),
    }
}

/// The applied map entry of the pod's own cgroup.
#[must_use]
pub(crate) fn applied_info<'a>(view: &PodView, applier: &'a Applier) -> Option<&'a CgroupInfo> {
    let id = view.observed.cgroups.get(view.observed.dir.as_ref()?)?;
    applier.maps.contents().cgroups.get(id)
}

/// A pod in `watcher status`, with its state and the reason for it.
#[must_use]
pub(crate) fn pod_status(
    view: &PodView,
    (state, reason): (State, Option<Reason>),
    default: FailMode,
) -> PodStatus {
    let (pod, facts) = (&view.pod, view.eligibility.facts());
    PodStatus {
        uid: Some(pod.uid.clone()),
        name: Some(pod.name.clone()),
        namespace: Some(pod.namespace.clone()),
        service_account: Some(pod.service_account.clone()),
        state,
        reason,
        fail_mode: Some(pod.fail_mode.unwrap_or(default)),
        addresses: facts.map(|facts| facts.addresses.clone()).unwrap_or_default(),
        netns: facts.map(|facts| NetnsStatus { inode: facts.id.inode, cookie: facts.cookie }),
        not_observed: None,
        cgroups: view.observed.cgroups.clone(),
        notes: pod.notes.to_vec(),
        reserved_ports: Vec::new(),
        verdicts: Vec::new(),
    }
}

/// How often rules decided in that netns. Nothing where it is not counted apart, or cannot be read.
#[must_use]
pub(crate) fn verdicts(applier: &Applier, netns_cookie: u64) -> Vec<VerdictStatus> {
    let counts = applier.kernel.verdicts().of(netns_cookie).ok().flatten();
    let counts = counts.iter().flat_map(Verdicts::used);
    counts.map(|(rule, count)| VerdictStatus { rule: rule.as_str().to_owned(), count }).collect()
}

/// An entry of the source that is not used, in `watcher status`.
#[must_use]
pub(crate) fn rejected_status(entry: &BadEntry, reason: &Reason) -> PodStatus {
    PodStatus {
        uid: entry.uid.clone(),
        name: entry.name.clone(),
        namespace: None,
        service_account: None,
        state: State::Refused,
        reason: Some(reason.clone()),
        fail_mode: None,
        addresses: Vec::new(),
        netns: None,
        not_observed: None,
        cgroups: BTreeMap::new(),
        notes: Vec::new(),
        reserved_ports: Vec::new(),
        verdicts: Vec::new(),
    }
}

/// The connected tunnels.
#[must_use]
pub(crate) fn tunnels(applier: &Applier) -> Vec<TunnelStatus> {
    let status = |tunnel: &crate::apply::tunnels::ConnectedTunnel| TunnelStatus {
        pid: tunnel.pid,
        cgroup: tunnel.cgroup.clone(),
        cgroup_id: tunnel.cgroup_id,
        pods: tunnel.pods(),
    };
    applier.tunnels.iter().map(status).collect()
}

/// The netns of pods that left.
#[must_use]
pub(crate) fn draining(applier: &Applier) -> Vec<DrainingStatus> {
    let all = applier.draining.iter();
    all.map(|(cookie, draining)| DrainingStatus {
        netns: NetnsStatus { inode: draining.netns.id.inode, cookie },
        uid: draining.netns.uid.clone(),
        waits_for: draining.waits_for(),
    })
    .collect()
}

/// Which rules decide about a connection of `view` to `destination`. `pods` are all pods of this
/// node.
///
/// `routes` are the ranges that the pod's routes send out of excluded interfaces. `container` and `ids`
/// say which process of the pod it is: the latter as of [`explain::explain`].
///
/// # Errors
/// There is no such container, or a map cannot be read: a sentence for the user.
pub(crate) fn explanation<'a>(
    view: &PodView,
    mut pods: impl Iterator<Item = &'a PodView>,
    container: Option<&str>,
    ids: [Option<u32>; 2],
    routes: &[IpNet],
    destination: SocketAddr,
    applier: &Applier,
) -> Result<Explanation, String> {
    let own = view.observed.dir.as_ref().and_then(|dir| view.observed.cgroups.get(dir)).copied();
    let cgroup = match container {
        None => own,
        Some(name) => {
            let found = container_cgroup(view, name).ok_or_else(|| format!("no container \"{name}\""))?;
            // Without an entry of its own, that of the pod decides.
            Some(found).filter(|id| applier.maps.contents().cgroups.contains_key(id)).or(own)
        }
    };
    let address = destination.ip().to_canonical();
    let has_it = |other: &PodView| {
        let facts = other.eligibility.facts().filter(|facts| facts.addresses.contains(&address))?;
        Some(facts.cookie)
    };
    let arrives_in = pods.find_map(has_it);
    let to = SocketAddr::new(address, destination.port());
    let because = |rule| lists::because(rule, to, &view.pod.levels, routes);
    explain::explain(&applier.kernel, view.full_name(), cgroup, ids, destination, because, arrives_in)
        .map_err(|error| Report::new(&error).to_string())
}

/// The cgroup of a container, by its name, if its id is known, or by that of its directory.
fn container_cgroup(view: &PodView, name: &str) -> Option<u64> {
    let is_it = |path: &PathBuf| {
        let directory = path.file_name().and_then(|directory| directory.to_str());
        directory.is_some_and(|directory| match view.pod.containers.get(name) {
            Some(id) => directory.contains(id.as_str()),
            None => directory == name,
        })
    };
    let mut below =
        view.observed.cgroups.iter().filter(|(path, _)| path.parent() == view.observed.dir.as_deref());
    below.find(|(path, _)| is_it(path)).map(|(_, id)| *id)
}
