//! Whether a pod can be enrolled, and if not, why.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    desired::{Pod, Selection},
    observed::{Observed, Seen, netns::NetnsFacts},
    reason::Reason,
};

/// What is to be done with a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is left alone; a reason where there is more to say than that no label asks for it.
    Plain(Option<Reason>),
    /// It shall be enrolled and is in order, but not there yet; its cgroup is closed meanwhile.
    Waiting(Reason),
    /// It shall be enrolled and cannot be. `keeps_closed`: its cgroup is surely its own, and what runs in
    /// it follows the pod's fail mode, rather than pass in clear because of a mistake.
    Refused { reason: Reason, keeps_closed: bool },
    /// It can be enrolled, with these addresses in this netns.
    Verified(NetnsFacts),
}

/// A pod and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    pub pod: Arc<Pod>,
    pub observed: Observed,
    pub verdict: Verdict,
}

/// What earlier entries of the list hold already.
#[derive(Default)]
struct Claims {
    uids: BTreeSet<String>,
    cgroups: BTreeMap<PathBuf, String>,
    cookies: BTreeMap<u64, String>,
    addresses: BTreeMap<IpAddr, String>,
}

/// Judges `pods` in their order: of two that claim the same, the first one holds it, so that adding a
/// wrong entry to the end of a list never disturbs a pod that is in order.
///
/// `attached` is the cgroup that the programs are attached to. `current` is the cookie of the netns that
/// a uid is enrolled with: a pod stays with it as long as one of its processes does, or any process
/// could leave the mesh by `unshare`.
pub fn judge(
    pods: Vec<(Arc<Pod>, Observed)>,
    attached: &Path,
    current: &BTreeMap<String, u64>,
) -> Vec<Judged> {
    let mut claims = Claims::default();
    pods.into_iter()
        .map(|(pod, observed)| {
            let verdict = verdict(&pod, &observed, attached, current, &mut claims);
            Judged { pod, observed, verdict }
        })
        .collect()
}

fn verdict(
    pod: &Pod,
    observed: &Observed,
    attached: &Path,
    current: &BTreeMap<String, u64>,
    claims: &mut Claims,
) -> Verdict {
    let refused = |reason| Verdict::Refused { reason, keeps_closed: false };
    let outside = observed.dir.as_ref().filter(|dir| !dir.starts_with(attached) || *dir == attached);
    if outside.is_none()
        && let Err(reason) = claims.place(pod, observed.dir.as_deref())
    {
        return refused(reason);
    }
    match &pod.selection {
        Selection::Enrolled => {}
        Selection::Plain => return Verdict::Plain(None),
        Selection::LeftAlone(reason) => return Verdict::Plain(Some(reason.clone())),
    }
    if let Some(dir) = outside {
        let text = format!(
            "cgroup {} is not below {}, where the programs are attached",
            dir.display(),
            attached.display()
        );
        return refused(Reason::new("cgroup_outside", text));
    }
    if observed.cgroups.is_empty() {
        return match &pod.cgroup {
            Some(dir) => {
                refused(Reason::new("cgroup_gone", format!("cgroup {} does not exist", dir.display())))
            }
            None => Verdict::Waiting(Reason::new(
                "no_cgroup",
                format!("no cgroup below {} is called by its uid yet", attached.display()),
            )),
        };
    }
    match netns(pod, observed, current.get(&pod.uid).copied()).and_then(|facts| claims.netns(pod, facts)) {
        Ok(facts) => Verdict::Verified(facts),
        Err(reason) if matches!(reason.code.as_str(), "no_process" | "no_address") => {
            Verdict::Waiting(reason)
        }
        // Cutting off what runs in the node's own netns could cut off the node.
        Err(reason) => Verdict::Refused { keeps_closed: reason.code != "host_netns", reason },
    }
}

/// The netns that the pod's processes agree on, with the addresses that are the pod's.
fn netns(pod: &Pod, observed: &Observed, current: Option<u64>) -> Result<NetnsFacts, Reason> {
    let own = |seen: &Seen| matches!(seen, Seen::Pod(facts) if Some(facts.cookie) == current);
    let found = match observed
        .netns
        .iter()
        .find(|seen| own(seen))
        .map_or(observed.netns.as_slice(), |seen| std::slice::from_ref(seen))
    {
        [] => {
            return Err(Reason::new("no_process", "no process in its cgroup"));
        }
        [Seen::Host] => {
            return Err(Reason::new("host_netns", "its processes are in the node's own network namespace"));
        }
        [Seen::Unreadable(problem)] => {
            return Err(Reason::new("netns_unreadable", format!("cannot look into its netns: {problem}")));
        }
        [Seen::Pod(facts)] => facts,
        several => {
            let text = format!("its processes are in {} different network namespaces", several.len());
            return Err(Reason::new("netns_disagree", text));
        }
    };
    let missing: Vec<String> =
        pod.addresses.iter().filter(|a| !found.addresses.contains(a)).map(ToString::to_string).collect();
    if !missing.is_empty() {
        let held: Vec<String> = found.addresses.iter().map(ToString::to_string).collect();
        let text = format!(
            "netns {} does not hold {}, it holds {}",
            found.id.inode,
            missing.join(", "),
            if held.is_empty() { "none".to_owned() } else { held.join(", ") }
        );
        return Err(Reason::new("address_not_held", text));
    }
    let mut facts = found.clone();
    if !pod.addresses.is_empty() {
        facts.addresses.retain(|address| pod.addresses.contains(address));
    }
    if facts.addresses.is_empty() {
        return Err(Reason::new("no_address", format!("netns {} has no address yet", facts.id.inode)));
    }
    Ok(facts)
}

impl Claims {
    /// Claims the uid and the cgroup.
    fn place(&mut self, pod: &Pod, dir: Option<&Path>) -> Result<(), Reason> {
        if self.uids.contains(&pod.uid) {
            return Err(Reason::new("duplicate_uid", format!("uid {} is an earlier pod's", pod.uid)));
        }
        let Some(dir) = dir else {
            self.uids.insert(pod.uid.clone());
            return Ok(());
        };
        if let Some(other) = self.cgroups.get(dir) {
            let text = format!("cgroup {} is that of pod {other}", dir.display());
            return Err(Reason::new("duplicate_cgroup", text));
        }
        let above = dir.ancestors().find_map(|above| self.cgroups.get_key_value(above));
        // Paths sort by component, so what lies below a directory follows it directly.
        let below = self.cgroups.range(dir.to_owned()..).next().filter(|(below, _)| below.starts_with(dir));
        if let Some((taken, other)) = above.or(below) {
            let text = format!("cgroup {} overlaps {} of pod {other}", dir.display(), taken.display());
            return Err(Reason::new("cgroup_overlaps", text));
        }
        self.uids.insert(pod.uid.clone());
        self.cgroups.insert(dir.to_owned(), full_name(pod));
        Ok(())
    }

    /// Claims the netns and the addresses.
    fn netns(&mut self, pod: &Pod, facts: NetnsFacts) -> Result<NetnsFacts, Reason> {
        if let Some(other) = self.cookies.get(&facts.cookie) {
            return Err(Reason::new(
                "netns_taken",
                format!("netns {} is that of pod {other}", facts.id.inode),
            ));
        }
        if let Some((address, other)) =
            facts.addresses.iter().find_map(|address| self.addresses.get_key_value(address))
        {
            return Err(Reason::new("address_taken", format!("address {address} is that of pod {other}")));
        }
        self.cookies.insert(facts.cookie, full_name(pod));
        self.addresses.extend(facts.addresses.iter().map(|address| (*address, full_name(pod))));
        Ok(facts)
    }
}

fn full_name(pod: &Pod) -> String {
    format!("{}/{} ({})", pod.namespace, pod.name, pod.uid)
}
