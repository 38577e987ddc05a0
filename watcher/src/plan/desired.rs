//! From an eligible pod to its plan: the map entries, the netns, and what tunnels receive.

use std::net::IpAddr;

use adit_ebpf_common::{
    enrolment::{CgroupInfo, PodRecord, flag},
    lifecycle::Name,
};

use crate::{
    model::pod::{FailMode, Selection},
    observe::netns::NetnsFacts,
};

use super::{Eligibility, PodNetns, PodPlan, PodView, PodWorkload, address16, cgroup_info};

/// What [`pod_plan`] needs to know besides the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Circumstances {
    /// The fail mode of pods that do not choose one.
    pub fail_mode: FailMode,
    /// Whether DNS queries go to the tunnel, for pods that do not choose.
    pub dns_capture: bool,
    /// Whether a connected tunnel acknowledged the pod with its present netns.
    pub ready: bool,
    /// Whether the pod ran in plaintext until now. It continues to do so until a tunnel serves it,
    /// since a label put on a running pod must not fail a single connection.
    pub in_grace: bool,
    /// The id of the pod's exclusions; 0: it has none.
    pub exclusion_id: u32,
    /// Possible names of the cgroup of a pod that has none yet.
    pub cgroup_names: Vec<Name>,
}

/// What the node should hold for the pod of `view`.
#[must_use]
pub(crate) fn pod_plan(view: &PodView, circumstances: &Circumstances) -> PodPlan {
    let PodView { pod, observed, eligibility } = view;
    let fail_open = pod.fail_mode.unwrap_or(circumstances.fail_mode) == FailMode::Open;
    let closed = flag::IN_MESH | if fail_open { flag::FAIL_OPEN } else { 0 };
    let mut plan = PodPlan::default();
    if pod.selection == Selection::Enrolled && observed.cgroups.is_empty() {
        let info = cgroup_info(closed, 0, &[]);
        plan.expected = circumstances.cgroup_names.iter().map(|name| (*name, info)).collect();
    }
    let info = match eligibility {
        Eligibility::Plain(_) | Eligibility::Refused { keeps_closed: false, .. } => return plan,
        Eligibility::Waiting(_) | Eligibility::Refused { keeps_closed: true, .. } => {
            cgroup_info(closed, 0, &[])
        }
        Eligibility::Eligible(facts) => {
            let in_grace = circumstances.in_grace && !circumstances.ready;
            let flags = closed
                | if circumstances.ready { flag::READY } else { 0 }
                | if in_grace { flag::FAIL_OPEN } else { 0 };
            enroll(&mut plan, view, facts, flags, circumstances)
        }
    };
    plan.cgroups = observed.cgroups.values().map(|id| (*id, info)).collect();
    plan
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
        plan.exclusions = Some((exclusion_id, pod.exclusions.clone()));
    }
    let record = PodRecord { netns_cookie: facts.cookie, flags, exclusion_id };
    plan.addresses = facts.addresses.iter().map(|address| (address16(*address), record)).collect();
    let pod_cgroup = observed.dir.clone().unwrap_or_default();
    let netns = PodNetns {
        id: facts.id,
        pod_cgroup: pod_cgroup.clone(),
        uid: pod.uid.clone(),
        v6: facts.addresses.iter().any(IpAddr::is_ipv6),
    };
    plan.netns = Some((facts.cookie, netns));
    plan.workload = Some(PodWorkload {
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        service_account: pod.service_account.clone(),
        cookie: facts.cookie,
        netns: facts.id,
        pod_cgroup,
    });
    let captures_dns = pod.dns_capture.unwrap_or(circumstances.dns_capture);
    let dns = if captures_dns { flag::DNS_CAPTURE } else { 0 };
    CgroupInfo { netns_cookie: facts.cookie, ..cgroup_info(flags | dns, exclusion_id, &facts.addresses) }
}
