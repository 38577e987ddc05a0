//! Desired × observed × applied → steps. Pure: no kernel, no clock, no socket.
//!
//! 1. [`judge`](crate::plan::eligibility::judge) says of each pod whether it can be enrolled, and if not, why
//! 2. [`wanted`] derives what the maps, the netns and the tunnels should hold
//! 3. [`steps`] compares that with what they do hold

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
};

use adit_ebpf_common::{
    address::{Address, UNSPECIFIED, mapped},
    lifecycle::Name,
    pods::{CgroupInfo, PodRecord, flag},
};

use crate::{
    model::{
        exclusions::Exclusions,
        pod::{FailMode, Pod, Selection},
    },
    observe::{cgroups::CgroupId, netns::NetnsId},
};

pub use self::eligibility::{Judged, Verdict};
pub use crate::model::reason::{Reason, ReasonCode};

pub mod eligibility;

/// Where the tunnel takes outbound connections, inside each pod's netns (Istio's number).
pub const OUTBOUND_PORT: u16 = 15001;
/// Where it takes inbound connections in clear.
pub const INBOUND_PORT: u16 = 15006;
/// Where it takes HBONE.
pub const HBONE_PORT: u16 = 15008;
/// Where tunnels answer DNS, on the loopback of each pod.
pub const NAMES_PORT: u16 = 15053;

/// What the maps, netns and tunnels hold, or should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub policies: BTreeMap<u32, Exclusions>,
    /// Names of cgroups that are closed as they are made.
    pub expected: BTreeMap<Name, CgroupInfo>,
    pub cgroups: BTreeMap<CgroupId, CgroupInfo>,
    pub addresses: BTreeMap<Address, PodRecord>,
    /// Prepared and steered netns, by cookie.
    pub netns: BTreeMap<u64, Netns>,
    /// Handed over to the tunnels, by uid.
    pub workloads: BTreeMap<String, Workload>,
}

/// Which entries of a [`Plan`] are a pod's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keys {
    policies: BTreeSet<u32>,
    expected: BTreeSet<Name>,
    cgroups: BTreeSet<CgroupId>,
    addresses: BTreeSet<Address>,
    netns: BTreeSet<u64>,
    workloads: BTreeSet<String>,
}

impl Keys {
    /// Whether cgroups are expected that `earlier` did not name.
    pub fn expects_more_than(&self, earlier: &Self) -> bool {
        !self.expected.is_subset(&earlier.expected)
    }

    pub fn add_cgroup(&mut self, id: CgroupId) {
        self.cgroups.insert(id);
    }

    pub fn extend(&mut self, other: Self) {
        self.policies.extend(other.policies);
        self.expected.extend(other.expected);
        self.cgroups.extend(other.cgroups);
        self.addresses.extend(other.addresses);
        self.netns.extend(other.netns);
        self.workloads.extend(other.workloads);
    }
}

impl Plan {
    pub fn keys(&self) -> Keys {
        Keys {
            policies: self.policies.keys().copied().collect(),
            expected: self.expected.keys().copied().collect(),
            cgroups: self.cgroups.keys().copied().collect(),
            addresses: self.addresses.keys().copied().collect(),
            netns: self.netns.keys().copied().collect(),
            workloads: self.workloads.keys().cloned().collect(),
        }
    }

    /// With everything of `other`, which is about other pods.
    pub fn extend(&mut self, other: Self) {
        self.policies.extend(other.policies);
        self.expected.extend(other.expected);
        self.cgroups.extend(other.cgroups);
        self.addresses.extend(other.addresses);
        self.netns.extend(other.netns);
        self.workloads.extend(other.workloads);
    }

    /// Only the entries of `keys`, as far as they are there.
    #[must_use]
    pub fn part(&self, keys: &Keys) -> Self {
        Self {
            policies: part(&self.policies, &keys.policies),
            expected: part(&self.expected, &keys.expected),
            cgroups: part(&self.cgroups, &keys.cgroups),
            addresses: part(&self.addresses, &keys.addresses),
            netns: part(&self.netns, &keys.netns),
            workloads: part(&self.workloads, &keys.workloads),
        }
    }
}

fn part<K: Ord + Clone, V: Clone>(of: &BTreeMap<K, V>, keys: &BTreeSet<K>) -> BTreeMap<K, V> {
    keys.iter()
        .filter_map(|key| of.get_key_value(key))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// A pod's netns, and how to find it again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netns {
    pub id: NetnsId,
    pub pod_cgroup: PathBuf,
    /// The uid of its pod.
    pub uid: String,
    /// Whether the pod has an IPv6 address, so that IPv6 must work there.
    pub v6: bool,
}

/// What a tunnel is told of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    pub cookie: u64,
    pub netns: NetnsId,
    pub pod_cgroup: PathBuf,
}

/// What [`wanted`] needs to know besides the pods.
pub struct Circumstances<'a> {
    pub default_fail_mode: FailMode,
    pub default_dns_capture: bool,
    /// Whether a connected tunnel acknowledged this uid's netns, by cookie.
    pub ready: &'a dyn Fn(&str, u64) -> bool,
    /// Whether the pod ran in clear until now: it goes on so until the tunnel has it, since a label put on a
    /// running pod must not fail a single connection.
    pub lenient: &'a dyn Fn(&str) -> bool,
    /// The policy id of a pod that has exclusions; 0: none.
    pub policy: &'a dyn Fn(&str) -> u32,
    /// What the cgroup of a pod that has none yet may be called.
    pub names: &'a dyn Fn(&Pod) -> Vec<Name>,
    /// The cgroups of tunnels.
    pub tunnels: &'a BTreeSet<CgroupId>,
}

impl std::fmt::Debug for Circumstances<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Circumstances").field("tunnels", &self.tunnels).finish_non_exhaustive()
    }
}

/// `address` as the maps have it.
pub fn address16(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// What everything should hold, as far as it is about `judged` and the tunnels named in `circumstances`.
pub fn wanted<'a>(judged: impl IntoIterator<Item = &'a Judged>, circumstances: &Circumstances<'_>) -> Plan {
    let mut plan = Plan::default();
    for Judged { pod, observed, verdict } in judged {
        let pod_cgroup = || observed.dir.clone().unwrap_or_default();
        let fail_open = pod.fail_mode.unwrap_or(circumstances.default_fail_mode) == FailMode::Open;
        let closed = flag::IN_MESH | if fail_open { flag::FAIL_OPEN } else { 0 };
        if pod.selection == Selection::Enrolled && observed.cgroups.is_empty() {
            let info = cgroup_info(closed, 0, &[]);
            plan.expected.extend((circumstances.names)(pod).into_iter().map(|name| (name, info)));
        }
        let info = match verdict {
            Verdict::Plain(_) | Verdict::Refused { keeps_closed: false, .. } => continue,
            Verdict::Waiting(_) | Verdict::Refused { keeps_closed: true, .. } => cgroup_info(closed, 0, &[]),
            Verdict::Verified(facts) => {
                let ready = (circumstances.ready)(&pod.uid, facts.cookie);
                let lenient = !ready && (circumstances.lenient)(&pod.uid);
                let flags =
                    closed | if ready { flag::READY } else { 0 } | if lenient { flag::FAIL_OPEN } else { 0 };
                let captures = pod.dns_capture.unwrap_or(circumstances.default_dns_capture);
                let names = if captures { flag::NAMES } else { 0 };
                let policy_id = (circumstances.policy)(&pod.uid);
                if policy_id != 0 {
                    plan.policies.insert(policy_id, pod.exclusions.clone());
                }
                let record = PodRecord { netns_cookie: facts.cookie, flags, policy_id };
                plan.addresses.extend(facts.addresses.iter().map(|address| (address16(*address), record)));
                plan.netns.insert(
                    facts.cookie,
                    Netns {
                        id: facts.id,
                        pod_cgroup: pod_cgroup(),
                        uid: pod.uid.clone(),
                        v6: facts.addresses.iter().any(IpAddr::is_ipv6),
                    },
                );
                plan.workloads.insert(
                    pod.uid.clone(),
                    Workload {
                        name: pod.name.clone(),
                        namespace: pod.namespace.clone(),
                        service_account: pod.service_account.clone(),
                        cookie: facts.cookie,
                        netns: facts.id,
                        pod_cgroup: pod_cgroup(),
                    },
                );
                CgroupInfo {
                    netns_cookie: facts.cookie,
                    ..cgroup_info(flags | names, policy_id, &facts.addresses)
                }
            }
        };
        plan.cgroups.extend(observed.cgroups.values().map(|id| (*id, info)));
    }
    let tunnel = cgroup_info(flag::TUNNEL, 0, &[]);
    plan.cgroups.extend(circumstances.tunnels.iter().map(|id| (*id, tunnel)));
    plan
}

/// The map's value; the first address of each family is the one that the pod is redirected to.
pub fn cgroup_info(flags: u32, policy_id: u32, addresses: &[IpAddr]) -> CgroupInfo {
    let first = |v4: bool| {
        addresses
            .iter()
            .find(|address| address.is_ipv4() == v4)
            .map_or(UNSPECIFIED, |address| address16(*address))
    };
    let (v4, v6) = (first(true), first(false));
    CgroupInfo {
        v4,
        v6,
        redirect_v4: v4,
        redirect_v6: v6,
        netns_cookie: 0,
        flags,
        detected: 0,
        policy_id,
        redirect_port: OUTBOUND_PORT,
        pad: 0,
    }
}

/// One change, in the order in which they are done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    RemoveCgroup(CgroupId),
    RemoveAddress(Address),
    /// All at once: the kernel is asked once who listens there.
    Unsteer(BTreeSet<u64>),
    /// Tell the tunnels to let go of this uid.
    Withdraw(String),
    /// Take the preparation back once nothing needs it any more.
    Release(u64),
    SetPolicy(u32, Exclusions),
    SetExpected(Name, CgroupInfo),
    SetCgroup(CgroupId, CgroupInfo),
    SetAddress(Address, PodRecord),
    Prepare(u64, Netns),
    Steer(u64, Netns),
    Offer(String, Workload),
    ClearPolicy(u32),
    RemoveExpected(Name),
}

/// Netns that are prepared side by side.
const AT_ONCE: usize = 16;

/// The steps from `applied` to `wanted`.
///
/// Whoever leaves goes first, from the outside in: new connections must find the way past the tunnel
/// before the tunnel stops serving. Whoever comes gets its entries before its netns is touched, so that
/// a new pod is closed from the first moment on, and is offered to the tunnel last.
pub fn steps(applied: &Plan, wanted: &Plan) -> Vec<Step> {
    let mut steps = Vec::new();
    steps.extend(gone(&applied.cgroups, &wanted.cgroups).map(|id| Step::RemoveCgroup(*id)));
    steps.extend(gone(&applied.addresses, &wanted.addresses).map(|address| Step::RemoveAddress(*address)));
    let unsteered: BTreeSet<u64> = gone(&applied.netns, &wanted.netns).copied().collect();
    steps.extend((!unsteered.is_empty()).then_some(Step::Unsteer(unsteered)));
    steps.extend(gone(&applied.workloads, &wanted.workloads).map(|uid| Step::Withdraw(uid.clone())));
    steps.extend(gone(&applied.netns, &wanted.netns).map(|cookie| Step::Release(*cookie)));
    steps.extend(changed(&applied.policies, &wanted.policies).map(|(id, lists)| Step::SetPolicy(id, lists)));
    steps.extend(changed(&applied.expected, &wanted.expected).map(|(at, info)| Step::SetExpected(at, info)));
    steps.extend(changed(&applied.cgroups, &wanted.cgroups).map(|(id, info)| Step::SetCgroup(id, info)));
    steps.extend(
        changed(&applied.addresses, &wanted.addresses).map(|(at, record)| Step::SetAddress(at, record)),
    );
    // Several at once, so that they can be done side by side; and then the next, so that the tunnel has something to do
    // meanwhile.
    let netns: Vec<_> = changed(&applied.netns, &wanted.netns).collect();
    let mut offers: Vec<_> = changed(&applied.workloads, &wanted.workloads).collect();
    for some in netns.chunks(AT_ONCE) {
        steps.extend(some.iter().map(|(cookie, netns)| Step::Prepare(*cookie, netns.clone())));
        steps.extend(some.iter().map(|(cookie, netns)| Step::Steer(*cookie, netns.clone())));
        let are_of = |workload: &Workload| some.iter().any(|(cookie, _)| *cookie == workload.cookie);
        let theirs = offers.extract_if(.., |(_, workload)| are_of(workload));
        steps.extend(theirs.map(|(uid, workload)| Step::Offer(uid, workload)));
    }
    steps.extend(offers.into_iter().map(|(uid, workload)| Step::Offer(uid, workload)));
    steps.extend(gone(&applied.policies, &wanted.policies).map(|id| Step::ClearPolicy(*id)));
    // Only now: its cgroup, if that is why, has its own entry.
    steps.extend(gone(&applied.expected, &wanted.expected).map(|name| Step::RemoveExpected(*name)));
    steps
}

fn gone<'a, K: Ord, V>(applied: &'a BTreeMap<K, V>, wanted: &BTreeMap<K, V>) -> impl Iterator<Item = &'a K> {
    applied.keys().filter(|key| !wanted.contains_key(key))
}

fn changed<K: Ord + Clone, V: PartialEq + Clone>(
    applied: &BTreeMap<K, V>,
    wanted: &BTreeMap<K, V>,
) -> impl Iterator<Item = (K, V)> {
    wanted
        .iter()
        .filter(|(key, value)| applied.get(key) != Some(value))
        .map(|(key, value)| (key.clone(), value.clone()))
}

#[cfg(test)]
mod tests;
