//! Whether a pod can be enrolled, and if not, why.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    model::{
        pod::{Pod, Selection},
        reason::{Reason, ReasonCode},
    },
    observe::{Observed, Seen, netns::NetnsFacts},
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

/// What pods hold that no two may: directories, netns, addresses. Whoever holds something keeps it until it is
/// released, so that a wrong entry never disturbs a pod that is in order.
#[derive(Debug, Default)]
pub struct Claims {
    cgroups: BTreeMap<PathBuf, Holder>,
    cookies: BTreeMap<u64, Holder>,
    addresses: BTreeMap<IpAddr, Holder>,
    held: BTreeMap<String, Held>,
}

#[derive(Clone, Debug)]
struct Holder {
    uid: String,
    full_name: String,
}

/// What one pod holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    cgroup: Option<PathBuf>,
    cookie: Option<u64>,
    addresses: Vec<IpAddr>,
}

impl Held {
    /// Whether this is something that `later` does not hold any more, so that others may have it.
    pub fn frees(&self, later: &Self) -> bool {
        (self.cgroup.is_some() && self.cgroup != later.cgroup)
            || (self.cookie.is_some() && self.cookie != later.cookie)
            || self.addresses.iter().any(|address| !later.addresses.contains(address))
    }
}

/// Whether another pod's giving something up may change this verdict.
pub fn is_blocked(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Refused { reason, .. } if reason.code.is_claim_conflict())
}

impl Claims {
    /// Judges `pod` by what was observed of it, in place of how it was judged before.
    ///
    /// `attached` is the cgroup that the programs are attached to. `current` is the cookie of the netns that
    /// the pod is enrolled with: it stays with it as long as one of its processes does, or any process
    /// could leave the mesh by `unshare`.
    pub fn judge(
        &mut self,
        pod: &Pod,
        observed: &Observed,
        attached: &Path,
        current: Option<u64>,
    ) -> Verdict {
        self.release(&pod.uid);
        verdict(pod, observed, attached, current, self)
    }

    /// What `uid` holds.
    pub fn held(&self, uid: &str) -> Held {
        self.held.get(uid).cloned().unwrap_or_default()
    }

    /// `uid` holds nothing any more.
    pub fn release(&mut self, uid: &str) {
        let Some(held) = self.held.remove(uid) else { return };
        if let Some(dir) = held.cgroup {
            self.cgroups.remove(&dir);
        }
        if let Some(cookie) = held.cookie {
            self.cookies.remove(&cookie);
        }
        for address in held.addresses {
            self.addresses.remove(&address);
        }
    }

    /// The pod in whose directory `path` is.
    pub fn owner(&self, path: &Path) -> Option<&str> {
        path.ancestors().find_map(|dir| self.cgroups.get(dir)).map(|holder| holder.uid.as_str())
    }
}

fn verdict(
    pod: &Pod,
    observed: &Observed,
    attached: &Path,
    current: Option<u64>,
    claims: &mut Claims,
) -> Verdict {
    let refused = |reason: Reason| Verdict::Refused { keeps_closed: reason.code.keeps_closed(), reason };
    let outside = observed.dir.as_ref().filter(|dir| !dir.starts_with(attached) || *dir == attached);
    if outside.is_none()
        && let Some(dir) = &observed.dir
        && let Err(reason) = claims.place(pod, dir)
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
        return refused(Reason::new(ReasonCode::CgroupOutside, text));
    }
    if observed.cgroups.is_empty() {
        return match &pod.cgroup {
            Some(dir) => refused(Reason::new(
                ReasonCode::CgroupGone,
                format!("cgroup {} does not exist", dir.display()),
            )),
            None => Verdict::Waiting(Reason::new(
                ReasonCode::NoCgroup,
                format!("no cgroup below {} is called by its uid yet", attached.display()),
            )),
        };
    }
    match netns(pod, observed, current).and_then(|facts| claims.netns(pod, facts)) {
        Ok(facts) => Verdict::Verified(facts),
        Err(reason) if reason.code.awaits_start() => Verdict::Waiting(reason),
        Err(reason) => refused(reason),
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
            return Err(Reason::new(ReasonCode::NoProcess, "no process in its cgroup"));
        }
        [Seen::Host] => {
            return Err(Reason::new(
                ReasonCode::HostNetns,
                "its processes are in the node's own network namespace",
            ));
        }
        [Seen::Unreadable(problem)] => {
            return Err(Reason::new(
                ReasonCode::NetnsUnreadable,
                format!("cannot look into its netns: {problem}"),
            ));
        }
        [Seen::Pod(facts)] => facts,
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
            "netns {} does not hold {}, it holds {}",
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

impl Claims {
    /// Claims the cgroup.
    fn place(&mut self, pod: &Pod, dir: &Path) -> Result<(), Reason> {
        if let Some(other) = self.cgroups.get(dir) {
            let text = format!("cgroup {} is that of pod {}", dir.display(), other.full_name);
            return Err(Reason::new(ReasonCode::DuplicateCgroup, text));
        }
        let above = dir.ancestors().find_map(|above| self.cgroups.get_key_value(above));
        // Paths sort by component, so what lies below a directory follows it directly.
        let below = self.cgroups.range(dir.to_owned()..).next().filter(|(below, _)| below.starts_with(dir));
        if let Some((taken, other)) = above.or(below) {
            let (dir, taken, other) = (dir.display(), taken.display(), &other.full_name);
            let text = format!("cgroup {dir} overlaps {taken} of pod {other}");
            return Err(Reason::new(ReasonCode::CgroupOverlaps, text));
        }
        self.cgroups.insert(dir.to_owned(), holder(pod));
        self.held.entry(pod.uid.clone()).or_default().cgroup = Some(dir.to_owned());
        Ok(())
    }

    /// Claims the netns and the addresses.
    fn netns(&mut self, pod: &Pod, facts: NetnsFacts) -> Result<NetnsFacts, Reason> {
        if let Some(other) = self.cookies.get(&facts.cookie) {
            let text = format!("netns {} is that of pod {}", facts.id.inode, other.full_name);
            return Err(Reason::new(ReasonCode::NetnsTaken, text));
        }
        if let Some((address, other)) =
            facts.addresses.iter().find_map(|address| self.addresses.get_key_value(address))
        {
            let text = format!("address {address} is that of pod {}", other.full_name);
            return Err(Reason::new(ReasonCode::AddressTaken, text));
        }
        let held = self.held.entry(pod.uid.clone()).or_default();
        held.cookie = Some(facts.cookie);
        held.addresses.clone_from(&facts.addresses);
        self.cookies.insert(facts.cookie, holder(pod));
        self.addresses.extend(facts.addresses.iter().map(|address| (*address, holder(pod))));
        Ok(facts)
    }
}

fn holder(pod: &Pod) -> Holder {
    let full_name = format!("{}/{} ({})", pod.namespace, pod.name, pod.uid);
    Holder { uid: pod.uid.clone(), full_name }
}
