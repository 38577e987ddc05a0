//! Whether a pod can be enrolled, and if not, why.

use std::{path::Path, sync::Arc};

use crate::{
    model::{
        pod::{Pod, Selection},
        reason::{Reason, ReasonCode},
    },
    observe::{Observed, ObservedNetns, netns::NetnsFacts},
};

use super::claims::Claims;

/// Whether a pod can be enrolled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Eligibility {
    /// It is left alone; the reason if there is more to say than that no label enrolls it.
    Plain(Option<Reason>),
    /// It shall be enrolled and something is not there yet. Its cgroup is closed until then.
    Waiting(Reason),
    /// It shall be enrolled and cannot be.
    Refused {
        /// Why.
        reason: Reason,
        /// The cgroup is certainly the pod's own: what runs in it follows the pod's fail mode, so
        /// that a mistake does not send its traffic in plaintext.
        keeps_closed: bool,
    },
    /// It can be enrolled, in this netns and with these addresses.
    Eligible(NetnsFacts),
}

impl Eligibility {
    /// The netns and addresses of an eligible pod.
    #[must_use]
    pub(crate) fn facts(&self) -> Option<&NetnsFacts> {
        match self {
            Self::Eligible(facts) => Some(facts),
            Self::Plain(_) | Self::Waiting(_) | Self::Refused { .. } => None,
        }
    }

    /// Whether the result may change when another pod releases something.
    #[must_use]
    pub(crate) fn is_blocked(&self) -> bool {
        matches!(self, Self::Refused { reason, .. } if reason.code.is_claim_conflict())
    }
}

/// A pod: its specification, what was observed of it, and whether it can be enrolled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodView {
    /// What the source says.
    pub pod: Arc<Pod>,
    /// What was seen on the node.
    pub observed: Observed,
    /// What follows from both.
    pub eligibility: Eligibility,
}

impl PodView {
    /// `namespace/name`.
    #[must_use]
    pub(crate) fn full_name(&self) -> String {
        format!("{}/{}", self.pod.namespace, self.pod.name)
    }
}

/// Evaluates `pod` by what was observed of it. Its earlier claims are released first.
///
/// `attached` is the cgroup that the programs are attached to. `current` is the cookie of the netns
/// that the pod is enrolled with. The pod stays in that netns as long as one of its processes does;
/// otherwise any process could leave the mesh by `unshare`.
pub(crate) fn evaluate(
    pod: &Pod,
    observed: &Observed,
    attached: &Path,
    current: Option<u64>,
    claims: &mut Claims,
) -> Eligibility {
    claims.release(&pod.uid);
    let refused = |reason: Reason| Eligibility::Refused { keeps_closed: reason.code.keeps_closed(), reason };
    let outside = observed.dir.as_ref().filter(|dir| !dir.starts_with(attached) || *dir == attached);
    if outside.is_none()
        && let Some(dir) = &observed.dir
        && let Err(reason) = claims.claim_cgroup(pod, dir)
    {
        return refused(reason);
    }
    match &pod.selection {
        Selection::Enrolled => {}
        Selection::Plain => return Eligibility::Plain(None),
        Selection::LeftAlone(reason) => return Eligibility::Plain(Some(reason.clone())),
    }
    if let Some(dir) = outside {
        let text = format!(
            "cgroup {} is not below {}, where the programs are attached",
            dir.display(),
            attached.display()
        );
        return refused(Reason::new(ReasonCode::CgroupOutside, text));
    }
    if observed.cgroups.is_empty() {
        return match &pod.cgroup {
            Some(dir) => refused(Reason::new(
                ReasonCode::CgroupGone,
                format!("cgroup {} does not exist", dir.display()),
            )),
            None => Eligibility::Waiting(Reason::new(
                ReasonCode::NoCgroup,
                format!("no cgroup under {} matches the pod uid yet", attached.display()),
            )),
        };
    }
    match netns_of(pod, observed, current).and_then(|facts| claims.claim_netns(pod, facts)) {
        Ok(facts) => Eligibility::Eligible(facts),
        Err(reason) if reason.code.awaits_start() => Eligibility::Waiting(reason),
        Err(reason) => refused(reason),
    }
}

/// The netns that all processes of the pod are in, with those of its addresses that are the pod's.
fn netns_of(pod: &Pod, observed: &Observed, current: Option<u64>) -> Result<NetnsFacts, Reason> {
    let own =
        |seen: &ObservedNetns| matches!(seen, ObservedNetns::Pod(facts) if Some(facts.cookie) == current);
    let found = match observed
        .netns
        .iter()
        .find(|seen| own(seen))
        .map_or(observed.netns.as_slice(), |seen| std::slice::from_ref(seen))
    {
        [] => {
            return Err(Reason::new(ReasonCode::NoProcess, "no process in its cgroup"));
        }
        [ObservedNetns::Host] => {
            return Err(Reason::new(
                ReasonCode::HostNetns,
                "its processes are in the node's own network namespace",
            ));
        }
        [ObservedNetns::Unreadable(problem)] => {
            return Err(Reason::new(
                ReasonCode::NetnsUnreadable,
                format!("cannot read its netns: {problem}"),
            ));
        }
        [ObservedNetns::Pod(facts)] => facts,
        several => {
            let text = format!("its processes are in {} different network namespaces", several.len());
            return Err(Reason::new(ReasonCode::NetnsDisagree, text));
        }
    };
    let missing: Vec<String> =
        pod.addresses.iter().filter(|a| !found.addresses.contains(a)).map(ToString::to_string).collect();
    if !missing.is_empty() {
        let held: Vec<String> = found.addresses.iter().map(ToString::to_string).collect();
        let text = format!(
            "netns {} does not have address {}, it has {}",
            found.id.inode,
            missing.join(", "),
            if held.is_empty() { "none".to_owned() } else { held.join(", ") }
        );
        return Err(Reason::new(ReasonCode::AddressNotHeld, text));
    }
    let mut facts = found.clone();
    if !pod.addresses.is_empty() {
        facts.addresses.retain(|address| pod.addresses.contains(address));
    }
    if facts.addresses.is_empty() {
        return Err(Reason::new(
            ReasonCode::NoAddress,
            format!("netns {} has no address yet", facts.id.inode),
        ));
    }
    Ok(facts)
}
