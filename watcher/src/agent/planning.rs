//! From the table of pods to plans and states: asks each pod's circumstances of the owners that
//! know them.

use std::{collections::BTreeSet, ffi::OsString, os::unix::ffi::OsStrExt as _, path::Path, time::Instant};

use adit_ebpf_common::lifecycle::{Name, name};

use crate::{
    apply::Applier,
    control::answers,
    model::{
        pod::Pod,
        reason::{Reason, ReasonCode},
        reserved_port::ReservedPortUse,
        state::State,
    },
    observe::cgroup_path,
    plan::{
        Plan, PodPlan,
        desired::{Circumstances, pod_plan},
        pod_state::{PodProgress, pod_state},
    },
};

use super::{
    config::AgentConfig, kept_pods::KeptPods, pod_entry::PodEntry, pod_entry::UntilFound, pods::PodTable,
};

/// The plans of pods, and the earlier plans that name what may have to be removed.
#[derive(Debug, Default)]
pub(super) struct Planned {
    /// By uid.
    pub plan: Plan,
    /// Earlier plans of these pods, and plans of pods that are gone, by uid.
    pub before: Vec<(String, PodPlan)>,
}

/// Plans the pods `uids`.
pub(super) fn plan_pods(
    uids: &BTreeSet<String>,
    pods: &mut PodTable,
    applier: &Applier,
    kept: &KeptPods,
    config: &AgentConfig,
    now: Instant,
) -> Planned {
    let mut planned = Planned { plan: Plan::new(), before: pods.take_gone() };
    let closed = &applier.maps.contents().cgroups;
    for uid in uids {
        let (exclusion_id, exclusions) = pods.exclusions(uid);
        let Some(entry) = pods.get_mut(uid) else { continue };
        let is_closed = entry.view.observed.cgroups.values().any(|id| closed.contains_key(id));
        // How it was treated so far is known only once it was observed.
        if entry.is_observed() {
            entry.admit(
                is_closed || entry.until_found != UntilFound::AsItWas,
                !applier.tunnels.is_empty(),
                now,
            );
        }
        let facts = entry.view.eligibility.facts();
        // The programs of an earlier build know one port.
        let spread = facts.is_some_and(|facts| applier.kernel.is_steering(facts.cookie));
        let ready =
            facts.is_some_and(|facts| applier.is_served(uid, facts.cookie) || kept.is_ready(facts.cookie));
        if ready {
            entry.end_grace();
        }
        let steered = applier.netns.all_of_pod(uid);
        let is_served = steered.values().any(|netns| netns.prepared);
        let leaving = entry.leave(is_served, config.leave_grace, now);
        let circumstances = Circumstances {
            leaving,
            has_sidecar: entry.sidecar.is_some(),
            fail_mode: config.fail_mode,
            dns_capture: config.dns_capture,
            ready,
            spread,
            in_grace: entry.in_grace(now),
            exclusion_id,
            exclusions,
            steered,
            cgroup_names: cgroup_names(&entry.view.pod, &config.attach),
        };
        let plan = pod_plan(&entry.view, &circumstances);
        if plan.expects_more_than(&entry.plan) {
            // Its cgroup may have been made just before it was expected.
            entry.next_observation = Some(now);
        }
        planned.before.push((uid.clone(), std::mem::replace(&mut entry.plan, plan.clone())));
        planned.plan.insert(uid.clone(), plan);
    }
    planned
}

/// Possible names of the cgroup of `pod`.
fn cgroup_names(pod: &Pod, attached: &Path) -> Vec<Name> {
    let given = pod.cgroup.as_ref().and_then(|dir| dir.file_name());
    let names = match given {
        Some(given) => vec![given.to_owned()],
        None => cgroup_path::names(&pod.uid, attached).into_iter().map(OsString::from).collect(),
    };
    names.iter().filter_map(|given| name(given.as_bytes())).collect()
}

/// What happens to the pod's traffic now, and why it is not open.
pub(super) fn state_of(entry: &PodEntry, applier: &Applier, config: &AgentConfig) -> (State, Option<Reason>) {
    let progress = PodProgress {
        info: answers::applied_info(&entry.view, applier),
        fail_mode: config.fail_mode,
        tunnel_up: applier.settings.tunnel_up(),
        connected: !applier.tunnels.is_empty(),
        problem: entry.problem.as_ref(),
        refusal: applier.tunnels.refusal(&entry.view.pod.uid),
    };
    if entry.runs_elsewhere(Instant::now()) {
        let attached = config.attach.display();
        let text = format!(
            "the API says that it runs, and no process of it is in a cgroup of its uid below {attached}"
        );
        return (State::Bypassed, Some(Reason::new(ReasonCode::RunsElsewhere, text)));
    }
    if let Some(guest) = entry.view.eligibility.facts().and_then(|facts| facts.guest.as_ref()) {
        let text = format!("its netns has a guest ({guest}), whose traffic passes by the tunnel");
        return (State::Bypassed, Some(Reason::new(ReasonCode::GuestBehindPod, text)));
    }
    if let (Some(about), Some(_)) = (entry.sidecar, entry.view.eligibility.facts()) {
        let text = format!("a sidecar of {about} listens in it, which carries its traffic");
        return (State::Plain, Some(Reason::new(ReasonCode::Sidecar, text)));
    }
    let (state, reason) = pod_state(&entry.view, &progress);
    let is_explained =
        |reason: &Reason| !matches!(reason.code, ReasonCode::TunnelRefused | ReasonCode::NotAcknowledged);
    if !entry.ports.using.is_empty() && !reason.as_ref().is_some_and(is_explained) {
        let uses: Vec<String> = entry.ports.using.iter().map(ReservedPortUse::describe).collect();
        let text = format!("{}, which the tunnel needs in the pod", uses.join("; "));
        return (state, Some(Reason::new(ReasonCode::ReservedPort, text)));
    }
    let leaving = || {
        let text = "its label is off; peers that have not heard of it yet may still connect by HBONE";
        Reason::new(ReasonCode::Leaving, text)
    };
    let reason = reason.or_else(|| entry.leaves_at().map(|_| leaving()));
    let gone = || Reason::new(ReasonCode::ObjectGone, "its source does not name it, and processes of it run");
    (state, reason.or_else(|| entry.object_gone.then(gone)))
}
