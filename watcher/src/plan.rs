//! What the node should hold for its pods, and how to get there. Pure: no kernel, no clock, no
//! socket.
//!
//! 1. [`eligibility`] decides whether a pod can be enrolled; [`claims`] settles who owns what
//! 2. [`desired`] turns an eligible pod into its [`PodPlan`]
//! 3. [`diff`] compares plans with what is applied; the result is a list of steps
//! 4. [`pod_state`] says what happens to a pod's traffic now, and why

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
};

use adit_ebpf_common::{
    address::{Address, UNSPECIFIED, mapped},
    enrolment::{CgroupInfo, NetnsInfo, PodRecord, flag},
    lifecycle::Name,
};

use crate::{
    model::{exclusions::Exclusions, pod::PodIdentity},
    observe::{cgroups::CgroupId, netns::NetnsId},
};

pub(crate) use self::eligibility::{Eligibility, PodView};
pub(crate) use crate::model::reason::{Reason, ReasonCode};

pub(crate) mod claims;
pub(crate) mod desired;
pub(crate) mod diff;
pub(crate) mod eligibility;
pub(crate) mod pod_state;

/// The port of the tunnel's outbound listener, inside each pod's netns (Istio's number).
pub(crate) const OUTBOUND_PORT: u16 = 15001;
/// The port of its listener for plaintext inbound connections.
pub(crate) const INBOUND_PORT: u16 = 15006;
/// The port of its HBONE listener.
pub(crate) const HBONE_PORT: u16 = 15008;
/// The port of its DNS listeners, on the loopback of each pod.
pub(crate) const DNS_PORT: u16 = 15053;

/// All of them: what nobody else may have in an enrolled pod's netns.
pub(crate) const RESERVED_PORTS: [u16; 4] = [OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT, DNS_PORT];

/// The plans of pods, by uid.
pub(crate) type Plan = BTreeMap<String, PodPlan>;

/// What the maps, the netns and the tunnels should hold for one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PodPlan {
    /// Its exclusions and the id by which its entries refer to them. The id is never 0.
    pub exclusions: Option<(u32, Arc<Exclusions>)>,
    /// Names of cgroups that the programs close as they are made.
    pub expected: BTreeMap<Name, CgroupInfo>,
    /// Its cgroup and its containers' right below it.
    pub cgroups: BTreeMap<CgroupId, CgroupInfo>,
    /// Its addresses, IPv4 in mapped form.
    pub addresses: BTreeMap<Address, PodRecord>,
    /// What holds for arrivals in its netns, by cookie.
    pub arrivals: BTreeMap<u64, NetnsInfo>,
    /// Its netns, by cookie: to be steered. More than one only if the pod is closed.
    pub netns: BTreeMap<u64, PodNetns>,
    /// What tunnels receive.
    pub workload: Option<PodWorkload>,
}

impl PodPlan {
    /// The same while its exclusion list is not in the kernel: the pod stays in the mesh, and new
    /// connections follow its fail mode. Without the list, excluded traffic would be carried; with
    /// half of it, nobody could say which.
    #[must_use]
    pub(crate) fn without_exclusions(&self) -> Self {
        let mut plan = Self { exclusions: None, ..self.clone() };
        for info in plan.cgroups.values_mut() {
            (info.flags, info.exclusion_id) = (info.flags & !flag::READY, 0);
        }
        for record in plan.addresses.values_mut() {
            record.flags &= !flag::READY;
        }
        for info in plan.arrivals.values_mut() {
            (info.flags, info.exclusion_id) = (info.flags & !flag::READY, 0);
        }
        plan
    }

    /// Whether it names cgroups to come that `earlier` did not name.
    #[must_use]
    pub(crate) fn expects_more_than(&self, earlier: &Self) -> bool {
        self.expected.keys().any(|name| !earlier.expected.contains_key(name))
    }
}

/// A pod's netns, and how to find it again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodNetns {
    /// Its device and inode, valid while something holds it.
    pub id: NetnsId,
    /// The cgroup directory of its pod.
    pub pod_cgroup: PathBuf,
    /// The uid of its pod.
    pub uid: String,
    /// Who that is; `None`: not known, or it does not matter, since the pod is only closed.
    pub pod: Option<PodIdentity>,
    /// Whether the pod has an IPv6 address, so that IPv6 must work there.
    pub v6: bool,
    /// The numbers of the interfaces that have its addresses, where applications may listen.
    pub devices: BTreeSet<u32>,
    /// Whether it has what connections from the tunnel need. A netns that is only closed does not.
    pub prepared: bool,
}

/// What a tunnel learns about a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodWorkload {
    /// The pod's name.
    pub name: String,
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Its service account, the last part of its identity.
    pub service_account: String,
    /// The cookie of its netns.
    pub cookie: u64,
    /// Its netns, to open it through one of the pod's processes.
    pub netns: NetnsId,
    /// Its cgroup directory.
    pub pod_cgroup: PathBuf,
}

/// `address` as the maps store it: 16 bytes, IPv4 in mapped form.
#[must_use]
pub(crate) fn address16(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// A cgroup's map entry. Connections are redirected to the first address of each family.
#[must_use]
pub(crate) fn cgroup_info(flags: u32, exclusion_id: u32, addresses: &[IpAddr]) -> CgroupInfo {
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
        netns_cookie: 0,
        flags,
        detected: 0,
        exclusion_id,
        redirect_port: OUTBOUND_PORT,
        pad: 0,
    }
}

#[cfg(test)]
mod tests;
