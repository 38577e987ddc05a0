//! Whether a pod can be enrolled, and if not, why.

use std::{collections::BTreeMap, net::IpAddr, path::Path, sync::Arc};

use crate::{
    model::{
        pod::{Pod, Selection},
        reason::{Reason, ReasonCode},
    },
    observe::{
        Gap, Observed, ObservedNetns, budget,
        netns::{NetnsFacts, NetnsId},
    },
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
    /// Netns of a pod that is kept closed, by cookie: nothing may arrive there either.
    pub closed_netns: BTreeMap<u64, Option<NetnsId>>,
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
        Selection::ObjectGone => {
            let reason =
                Reason::new(ReasonCode::ObjectGone, "its source does not name it, and processes of it run");
            return Eligibility::Refused { reason, keeps_closed: true };
        }
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
    match &observed.gap {
        // Not gone, and not allowed: closed until more is known.
        Some(Gap::NotKnown(reason)) => return Eligibility::Waiting(reason.clone()),
        Some(Gap::OverBudget(reason)) => return refused(reason.clone()),
        None => {}
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
    let found = netns_of(pod, observed, current).map(|facts| with_spare_addresses(pod, facts, claims));
    match found.and_then(|facts| claims.claim_netns(pod, facts)) {
        Ok(facts) => Eligibility::Eligible(facts),
        Err(reason) if reason.code.awaits_start() => Eligibility::Waiting(reason),
        Err(reason) => refused(reason),
    }
}

/// At most so many netns of a pod that cannot be enrolled are closed.
const MOST_CLOSED: usize = 8;

/// The netns of a pod that is kept closed, as far as they are certainly its own: those that its
/// processes are in, and `current`, the one that it was enrolled with. The node's own and those of
/// other pods never are.
#[must_use]
pub(crate) fn closed_netns(
    pod: &Pod,
    observed: &Observed,
    eligibility: &Eligibility,
    current: Option<u64>,
    claims: &mut Claims,
) -> BTreeMap<u64, Option<NetnsId>> {
    if !matches!(eligibility, Eligibility::Waiting(_) | Eligibility::Refused { keeps_closed: true, .. }) {
        return BTreeMap::new();
    }
    let alone = observed.netns.len() == 1;
    let seen = observed.netns.iter().filter_map(|seen| match seen {
        // Of several, one without addresses receives nothing.
        ObservedNetns::Pod(facts) if alone || !facts.addresses.is_empty() => {
            Some((facts.cookie, Some(facts.id)))
        }
        _ => None,
    });
    let mut closed: BTreeMap<u64, Option<NetnsId>> =
        current.map(|cookie| (cookie, None)).into_iter().collect();
    closed.extend(seen.take(MOST_CLOSED));
    closed.retain(|cookie, _| claims.claim_closed_netns(pod, *cookie));
    closed
}

/// Which of several netns is the pod's own. Programs give their children netns of their own: a
/// browser its renderers, docker in docker its containers. The addresses tell: those that the pod's
/// source names; before it names any, that only one netns has addresses at all.
fn the_pods_own<'a>(pod: &Pod, several: &'a [ObservedNetns]) -> Option<&'a NetnsFacts> {
    let has_all = |facts: &NetnsFacts| pod.addresses.iter().all(|address| facts.addresses.contains(address));
    let is_own = |facts: &&NetnsFacts| !facts.addresses.is_empty() && has_all(facts);
    let is_unclear = |seen: &ObservedNetns| !matches!(seen, ObservedNetns::Pod(_));
    if pod.addresses.is_empty() && several.iter().any(is_unclear) {
        return None;
    }
    let mut own = several
        .iter()
        .filter_map(|seen| match seen {
            ObservedNetns::Pod(facts) => Some(facts),
            ObservedNetns::Host => None,
        })
        .filter(is_own);
    own.next().filter(|_| own.next().is_none())
}

/// `found` with those addresses besides that its source does not tell and that no other pod has: of
/// a second interface, or of a family that the cluster does not use. What the pod dials from there
/// is redirected to them. They come last, so that they are the first of a family only where no other
/// one is.
fn with_spare_addresses(
    pod: &Pod,
    (mut facts, untold): (NetnsFacts, Vec<IpAddr>),
    claims: &Claims,
) -> NetnsFacts {
    let is_spare = |address: &IpAddr| !claims.is_taken(address) && !pod.addresses.contains(address);
    facts.addresses.extend(untold.into_iter().filter(is_spare).take(budget::SPARE_ADDRESSES));
    facts
}

/// The netns that the processes of the pod are in, with those of its addresses that are the pod's;
/// and the others.
fn netns_of(
    pod: &Pod,
    observed: &Observed,
    current: Option<u64>,
) -> Result<(NetnsFacts, Vec<IpAddr>), Reason> {
    let found = match only_netns(&observed.netns, current) {
        [] => {
            return Err(Reason::new(ReasonCode::NoProcess, "no process in its cgroup"));
        }
        [ObservedNetns::Host] => {
            return Err(Reason::new(
                ReasonCode::HostNetns,
                "its processes are in the node's own network namespace",
            ));
        }
        [ObservedNetns::Pod(facts)] => facts,
        several if let Some(facts) = the_pods_own(pod, several) => facts,
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
    let mut untold = Vec::new();
    if !pod.addresses.is_empty() {
        let is_told = |address: &IpAddr| pod.addresses.contains(address);
        (facts.addresses, untold) = facts.addresses.into_iter().partition(is_told);
    }
    untold.extend(&facts.link_local_v4);
    if facts.addresses.is_empty() {
        return Err(Reason::new(
            ReasonCode::NoAddress,
            format!("netns {} has no address yet", facts.id.inode),
        ));
    }
    Ok((facts, untold))
}

/// Of `seen` the netns that the pod is enrolled with, else all.
fn only_netns(seen: &[ObservedNetns], current: Option<u64>) -> &[ObservedNetns] {
    let is_current =
        |seen: &&ObservedNetns| matches!(seen, ObservedNetns::Pod(facts) if Some(facts.cookie) == current);
    seen.iter().find(is_current).map_or(seen, std::slice::from_ref)
}
