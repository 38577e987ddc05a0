//! What happens to a pod's traffic now, and why it is not open.

use adit_ebpf_common::enrolment::{CgroupInfo, flag};

use crate::model::{pod::FailMode, state::State};

use super::{Eligibility, PodView, Reason, ReasonCode};

/// What [`pod_state`] needs to know besides the pod: what is applied, and what tunnels
/// acknowledged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PodProgress<'a> {
    /// The applied map entry of the pod's cgroup.
    pub info: Option<&'a CgroupInfo>,
    /// The fail mode of pods that do not choose one.
    pub fail_mode: FailMode,
    /// Whether the programs send traffic to a tunnel at all.
    pub tunnel_up: bool,
    /// Whether any tunnel is connected.
    pub connected: bool,
    /// What the watcher could not do for the pod.
    pub problem: Option<&'a Reason>,
    /// The tunnel's error, if it refused the pod.
    pub refusal: Option<&'a str>,
}

/// What happens to the traffic of the pod of `view`; the reason if it is not [`State::Open`].
#[must_use]
pub(crate) fn pod_state(view: &PodView, progress: &PodProgress<'_>) -> (State, Option<Reason>) {
    let fail_open = view.pod.fail_mode.unwrap_or(progress.fail_mode) == FailMode::Open;
    // Without a cgroup it has no traffic yet; its first connection will meet this entry.
    let expected = flag::IN_MESH | if fail_open { flag::FAIL_OPEN } else { 0 };
    let no_cgroup = view.observed.cgroups.is_empty();
    let flags = progress.info.map_or(if no_cgroup { expected } else { 0 }, |info| info.flags);
    match &view.eligibility {
        Eligibility::Plain(reason) => (State::Plain, reason.clone()),
        Eligibility::Refused { reason, .. } => (State::Refused, Some(reason.clone())),
        Eligibility::Waiting(reason) => (unserved(flags), Some(reason.clone())),
        Eligibility::Eligible(_) if flags & flag::READY != 0 && progress.tunnel_up => (State::Open, None),
        Eligibility::Eligible(_) => (unserved(flags), Some(why_unserved(progress))),
    }
}

/// What happens to the traffic of a pod that no tunnel serves.
fn unserved(flags: u32) -> State {
    let refused = flags & flag::IN_MESH != 0 && flags & flag::FAIL_OPEN == 0;
    if refused { State::Closed } else { State::Bypassed }
}

fn why_unserved(progress: &PodProgress<'_>) -> Reason {
    if let Some(reason) = progress.problem {
        return reason.clone();
    }
    if !progress.connected {
        return Reason::new(ReasonCode::NoTunnel, "no tunnel is connected");
    }
    match progress.refusal {
        Some(error) => Reason::new(ReasonCode::TunnelRefused, format!("the tunnel refused the pod: {error}")),
        None => Reason::new(ReasonCode::NotAcknowledged, "the tunnel has not acknowledged the pod yet"),
    }
}
