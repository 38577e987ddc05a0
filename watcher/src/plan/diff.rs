//! From plans and what is applied to steps, in the order in which they are done.
//!
//! What leaves goes first, from the outside in: new connections must bypass the tunnel before it
//! stops serving the pod. A pod that comes gets its map entries before its netns is touched, so
//! that it is closed from the first moment on; tunnels receive it last.
//!
//! The entry of a cgroup names its netns only while that is steered. Until then the programs drop
//! what arrives for the pod, as nothing in its netns decides about it.
//!
//! Exclusion lists are no steps: [`crate::apply::maps`] writes them before all steps, since an
//! entry that names a list has to find it whole. Lists that no pod needs any more go last.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use adit_ebpf_common::{
    address::Address,
    enrolment::{CgroupInfo, NetnsInfo, PodRecord, flag},
    lifecycle::Name,
};

use crate::{model::exclusions::Exclusions, observe::cgroups::CgroupId};

use super::{Plan, PodNetns, PodPlan, PodWorkload, cgroup_info};

/// How many netns are prepared side by side. After each batch the tunnel gets its pods, so that it
/// works while the next batch is prepared.
const NETNS_BATCH: usize = 16;

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ApplyStep {
    /// Done by [`crate::apply::maps`].
    Map(MapWrite),
    /// Done by [`crate::apply::netns`].
    Netns(NetnsStep),
    /// Done by [`crate::apply::tunnels`].
    Tunnel(TunnelStep),
}

/// A change of a kernel map's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MapWrite {
    RemoveCgroup(CgroupId),
    RemoveAddress(Address),
    SetExpected(Name, CgroupInfo),
    SetCgroup(CgroupId, CgroupInfo),
    SetAddress(Address, PodRecord),
    SetArrivals(u64, NetnsInfo),
    RemoveArrivals(u64),
    RemoveExclusions(u32),
    RemoveExpected(Name),
}

impl MapWrite {
    /// The pod, by uid, whose entry this writes.
    pub(crate) fn pod<'a>(&self, plan: &'a Plan) -> Option<&'a str> {
        let writes = |pod: &PodPlan| match self {
            Self::SetCgroup(id, _) => pod.cgroups.contains_key(id),
            Self::SetAddress(address, _) => pod.addresses.contains_key(address),
            Self::SetArrivals(cookie, _) => pod.arrivals.contains_key(cookie),
            Self::SetExpected(name, _) => pod.expected.contains_key(name),
            _ => false,
        };
        plan.iter().find(|(_, pod)| writes(pod)).map(|(uid, _)| uid.as_str())
    }
}

/// A change of netns, which are named by their cookies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NetnsStep {
    /// Stop steering their inbound connections. All at once: it takes one wait for the kernel.
    Unsteer(BTreeSet<u64>),
    /// Undo the preparation once no connection needs it any more.
    Release(u64),
    /// Steer each, then prepare side by side those that are to be served.
    Steer(Vec<(u64, PodNetns)>),
}

/// A change of what tunnels serve, by the pod's uid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TunnelStep {
    /// Tunnels let go of the pod.
    Withdraw(String),
    /// Tunnels serve the pod.
    Offer(String, PodWorkload),
}

/// What the maps hold for pods and tunnels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MapContents {
    /// Exclusion lists by id.
    pub exclusions: BTreeMap<u32, Arc<Exclusions>>,
    /// Entries that cgroups get as they are made, by name.
    pub expected: BTreeMap<Name, CgroupInfo>,
    /// Entries by cgroup id.
    pub cgroups: BTreeMap<CgroupId, CgroupInfo>,
    /// Entries by address.
    pub addresses: BTreeMap<Address, PodRecord>,
    /// What holds for arrivals, by netns cookie.
    pub arrivals: BTreeMap<u64, NetnsInfo>,
}

/// Everything that is applied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Applied<'a> {
    /// The maps' contents.
    pub maps: &'a MapContents,
    /// Prepared and steered netns, by cookie.
    pub netns: &'a BTreeMap<u64, PodNetns>,
    /// What tunnels were offered, by uid.
    pub workloads: &'a BTreeMap<String, PodWorkload>,
}

/// What of the applied entries is compared.
#[derive(Clone, Copy, Debug)]
pub(crate) enum DiffScope<'a> {
    /// Everything: what no plan names is removed, except for the entries of the tunnels' own
    /// cgroups.
    All {
        /// The cgroups of tunnels.
        tunnels: &'a BTreeSet<CgroupId>,
    },
    /// Only entries that these earlier plans name, by uid.
    Pods {
        /// Earlier plans of the pods that are compared, and of pods that are gone.
        before: &'a [(String, PodPlan)],
        /// The ids of the exclusion lists that any pod uses: equal lists of several pods are one.
        lists: &'a BTreeSet<u32>,
    },
}

/// The steps from `applied` to `plan`, within `scope`.
pub(crate) fn steps(applied: &Applied<'_>, scope: DiffScope<'_>, plan: &Plan) -> Vec<ApplyStep> {
    let tunnel = cgroup_info(flag::TUNNEL, 0, &[]);
    let mut wanted = Entries::of(plan.iter());
    let none = BTreeSet::new();
    let (before, lists) = match scope {
        DiffScope::All { tunnels } => {
            wanted.cgroups.extend(tunnels.iter().map(|id| (id, &tunnel)));
            (None, &none)
        }
        DiffScope::Pods { before, lists } => {
            (Some(Entries::of(before.iter().map(|(uid, plan)| (uid, plan)))), lists)
        }
    };
    let before = before.as_ref();
    let Applied { maps, netns, workloads } = *applied;
    let cgroups = gone(&maps.cgroups, before.map(|before| &before.cgroups), &wanted.cgroups);
    let addresses = gone(&maps.addresses, before.map(|before| &before.addresses), &wanted.addresses);
    let arrivals = gone(&maps.arrivals, before.map(|before| &before.arrivals), &wanted.arrivals);
    let left = gone(netns, before.map(|before| &before.netns), &wanted.netns);
    let withdrawn = gone(workloads, before.map(|before| &before.workloads), &wanted.workloads);
    let mut exclusions = gone(&maps.exclusions, before.map(|before| &before.exclusions), &wanted.exclusions);
    exclusions.retain(|id| !lists.contains(id));
    let expected = gone(&maps.expected, before.map(|before| &before.expected), &wanted.expected);

    let mut steps = Vec::new();
    // While a netns is known as enrolled and closed, its pod's connections are refused without an
    // entry. So it is open before the entries of a pod go that leaves.
    let known = arrivals.iter().filter_map(|cookie| Some((*cookie, maps.arrivals.get(cookie)?)));
    let leaving = known.map(|(cookie, info)| (cookie, NetnsInfo { flags: flag::FAIL_OPEN, ..*info }));
    let (opening, closing): (Vec<_>, Vec<_>) =
        changed(&maps.arrivals, &wanted.arrivals).partition(|(_, info)| info.flags & flag::FAIL_OPEN != 0);
    let set_arrivals = |(cookie, info)| ApplyStep::Map(MapWrite::SetArrivals(cookie, info));
    steps.extend(leaving.chain(opening).map(set_arrivals));
    steps.extend(cgroups.into_iter().map(MapWrite::RemoveCgroup).map(ApplyStep::Map));
    steps.extend(addresses.into_iter().map(MapWrite::RemoveAddress).map(ApplyStep::Map));
    if !left.is_empty() {
        steps.push(ApplyStep::Netns(NetnsStep::Unsteer(left.iter().copied().collect())));
    }
    // Only now: a steered netns that nothing is known of is closed.
    steps.extend(arrivals.into_iter().map(MapWrite::RemoveArrivals).map(ApplyStep::Map));
    steps.extend(withdrawn.into_iter().map(TunnelStep::Withdraw).map(ApplyStep::Tunnel));
    steps.extend(left.into_iter().map(NetnsStep::Release).map(ApplyStep::Netns));

    let set = |write| ApplyStep::Map(write);
    steps.extend(
        changed(&maps.expected, &wanted.expected).map(|(name, info)| set(MapWrite::SetExpected(name, info))),
    );
    let at_first = wanted.cgroups.iter().map(|(id, info)| (**id, entry_before_steering(info, netns)));
    steps.extend(
        at_first
            .filter(|(id, info)| maps.cgroups.get(id) != Some(info))
            .map(|(id, info)| set(MapWrite::SetCgroup(id, info))),
    );
    steps.extend(
        changed(&maps.addresses, &wanted.addresses).map(|(at, record)| set(MapWrite::SetAddress(at, record))),
    );
    steps.extend(closing.into_iter().map(set_arrivals));
    let named = wanted.cgroups.iter().filter(|(_, info)| entry_before_steering(info, netns) != ***info);
    steps.extend(enter(
        &changed(netns, &wanted.netns).collect::<Vec<_>>(),
        named.map(|(id, info)| (**id, **info)).collect(),
        changed(workloads, &wanted.workloads).collect(),
    ));

    steps.extend(exclusions.into_iter().map(MapWrite::RemoveExclusions).map(ApplyStep::Map));
    // Last: the cgroup, if that is the reason, has its own entry by now.
    steps.extend(expected.into_iter().map(MapWrite::RemoveExpected).map(ApplyStep::Map));
    steps
}

/// The entry that a cgroup has until the netns that `info` names is steered.
fn entry_before_steering(info: &CgroupInfo, steered: &BTreeMap<u64, PodNetns>) -> CgroupInfo {
    let is_steered = info.netns_cookie == 0 || steered.contains_key(&info.netns_cookie);
    if is_steered { *info } else { info.without_netns() }
}

/// Netns in batches, each followed by the entries that name it and the offers of its pods; then the
/// offers that need no new netns.
fn enter(
    netns: &[(u64, PodNetns)],
    mut entries: Vec<(CgroupId, CgroupInfo)>,
    mut offers: Vec<(String, PodWorkload)>,
) -> Vec<ApplyStep> {
    let set = |(id, info)| ApplyStep::Map(MapWrite::SetCgroup(id, info));
    let offer = |(uid, workload)| ApplyStep::Tunnel(TunnelStep::Offer(uid, workload));
    let mut steps = Vec::new();
    for batch in netns.chunks(NETNS_BATCH) {
        steps.push(ApplyStep::Netns(NetnsStep::Steer(batch.to_vec())));
        let in_batch = |cookie: u64| batch.iter().any(|(other, _)| *other == cookie);
        steps.extend(entries.extract_if(.., |(_, info)| in_batch(info.netns_cookie)).map(set));
        steps.extend(offers.extract_if(.., |(_, workload)| in_batch(workload.cookie)).map(offer));
    }
    steps.extend(offers.into_iter().map(offer));
    steps
}

/// The entries of several plans, by kind.
#[derive(Default)]
struct Entries<'a> {
    exclusions: BTreeMap<&'a u32, &'a Arc<Exclusions>>,
    expected: BTreeMap<&'a Name, &'a CgroupInfo>,
    cgroups: BTreeMap<&'a CgroupId, &'a CgroupInfo>,
    addresses: BTreeMap<&'a Address, &'a PodRecord>,
    arrivals: BTreeMap<&'a u64, &'a NetnsInfo>,
    netns: BTreeMap<&'a u64, &'a PodNetns>,
    workloads: BTreeMap<&'a String, &'a PodWorkload>,
}

impl<'a> Entries<'a> {
    fn of(plans: impl Iterator<Item = (&'a String, &'a PodPlan)>) -> Self {
        let mut entries = Self::default();
        for (uid, plan) in plans {
            entries.exclusions.extend(plan.exclusions.iter().map(|(id, list)| (id, list)));
            entries.expected.extend(&plan.expected);
            entries.cgroups.extend(&plan.cgroups);
            entries.addresses.extend(&plan.addresses);
            entries.arrivals.extend(&plan.arrivals);
            entries.netns.extend(&plan.netns);
            entries.workloads.extend(plan.workload.iter().map(|workload| (uid, workload)));
        }
        entries
    }
}

/// Keys that are applied and not wanted any more: of all, or of those that `before` names.
fn gone<K: Ord + Clone, V>(
    applied: &BTreeMap<K, V>,
    before: Option<&BTreeMap<&K, &V>>,
    wanted: &BTreeMap<&K, &V>,
) -> Vec<K> {
    let is_gone = |key: &&K| applied.contains_key(*key) && !wanted.contains_key(*key);
    match before {
        None => applied.keys().filter(is_gone).cloned().collect(),
        Some(before) => before.keys().copied().filter(is_gone).cloned().collect(),
    }
}

/// Wanted entries that are not applied as they should be.
fn changed<K: Ord + Clone, V: PartialEq + Clone>(
    applied: &BTreeMap<K, V>,
    wanted: &BTreeMap<&K, &V>,
) -> impl Iterator<Item = (K, V)> {
    wanted
        .iter()
        .filter(|(key, value)| applied.get(**key) != Some(**value))
        .map(|(key, value)| ((*key).clone(), (*value).clone()))
}
