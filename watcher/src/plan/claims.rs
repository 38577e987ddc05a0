//! What no two pods may own: cgroup directories, netns, addresses.
//!
//! The first owner keeps what it has until it is released, so that a wrong entry never disturbs a
//! pod that is in order.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::{Path, PathBuf},
};

use crate::{
    model::{
        pod::Pod,
        reason::{Reason, ReasonCode},
    },
    observe::netns::NetnsFacts,
};

/// Who owns what.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    cgroups: BTreeMap<PathBuf, Owner>,
    cookies: BTreeMap<u64, Owner>,
    addresses: BTreeMap<IpAddr, Owner>,
    by_uid: BTreeMap<String, Claimed>,
    /// Pods that lost an address to the pod that it is told of.
    evicted: BTreeSet<String>,
}

#[derive(Clone, Debug)]
struct Owner {
    uid: String,
    full_name: String,
    /// The addresses that its source tells.
    told: BTreeSet<IpAddr>,
}

impl Owner {
    fn new(pod: &Pod) -> Self {
        let full_name = format!("{}/{} ({})", pod.namespace, pod.name, pod.uid);
        Self { uid: pod.uid.clone(), full_name, told: pod.addresses.clone() }
    }
}

/// What one pod owns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Claimed {
    cgroup: Option<PathBuf>,
    cookies: BTreeSet<u64>,
    addresses: Vec<IpAddr>,
}

impl Claimed {
    /// Whether it owns nothing.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether `later` lacks something of this, so that others may claim it.
    #[must_use]
    pub(crate) fn frees(&self, later: &Self) -> bool {
        (self.cgroup.is_some() && self.cgroup != later.cgroup)
            || !self.cookies.is_subset(&later.cookies)
            || self.addresses.iter().any(|address| !later.addresses.contains(address))
    }
}

impl Claims {
    /// What `uid` owns.
    #[must_use]
    pub(crate) fn of(&self, uid: &str) -> Claimed {
        self.by_uid.get(uid).cloned().unwrap_or_default()
    }

    /// Takes everything from `uid`.
    pub(crate) fn release(&mut self, uid: &str) {
        let Some(claimed) = self.by_uid.remove(uid) else { return };
        if let Some(dir) = claimed.cgroup {
            self.cgroups.remove(&dir);
        }
        for cookie in claimed.cookies {
            self.cookies.remove(&cookie);
        }
        for address in claimed.addresses {
            self.addresses.remove(&address);
        }
    }

    /// The uid of the pod in whose directory `path` is.
    #[must_use]
    pub(crate) fn owner(&self, path: &Path) -> Option<&str> {
        path.ancestors().find_map(|dir| self.cgroups.get(dir)).map(|owner| owner.uid.as_str())
    }

    /// Gives `pod` the cgroup directory `dir`.
    ///
    /// # Errors
    /// Another pod owns it, or a directory above or below it.
    pub(crate) fn claim_cgroup(&mut self, pod: &Pod, dir: &Path) -> Result<(), Reason> {
        if let Some(other) = self.cgroups.get(dir) {
            let text = format!("cgroup {} belongs to pod {}", dir.display(), other.full_name);
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
        self.cgroups.insert(dir.to_owned(), Owner::new(pod));
        self.by_uid.entry(pod.uid.clone()).or_default().cgroup = Some(dir.to_owned());
        Ok(())
    }

    /// Whether a pod has `address`.
    #[must_use]
    pub(crate) fn is_taken(&self, address: &IpAddr) -> bool {
        self.addresses.contains_key(address)
    }

    /// Gives `pod` the netns and the addresses of `facts`. An address that its source tells is the
    /// pod's, also if another pod claimed it before that has it without having been told so:
    /// whoever may change its own netns may add any address there.
    ///
    /// # Errors
    /// Another pod owns the netns or one of the addresses.
    pub(crate) fn claim_netns(&mut self, pod: &Pod, facts: NetnsFacts) -> Result<NetnsFacts, Reason> {
        if let Some(other) = self.cookies.get(&facts.cookie) {
            let text = format!("netns {} belongs to pod {}", facts.id.inode, other.full_name);
            return Err(Reason::new(ReasonCode::NetnsTaken, text));
        }
        let is_usurped = |(address, owner): &(&IpAddr, &Owner)| {
            pod.addresses.contains(address) && !owner.told.contains(address)
        };
        let taken = facts.addresses.iter().filter_map(|address| self.addresses.get_key_value(address));
        let (usurped, taken): (Vec<_>, Vec<_>) = taken.partition(is_usurped);
        if let Some((address, other)) = taken.first() {
            let text = format!("address {address} belongs to pod {}", other.full_name);
            return Err(Reason::new(ReasonCode::AddressTaken, text));
        }
        let evicted: BTreeSet<String> = usurped.iter().map(|(_, owner)| owner.uid.clone()).collect();
        for uid in &evicted {
            if let Some(claimed) = self.by_uid.get_mut(uid) {
                claimed.addresses.retain(|address| !facts.addresses.contains(address));
            }
        }
        self.evicted.extend(evicted);
        let claimed = self.by_uid.entry(pod.uid.clone()).or_default();
        claimed.cookies.insert(facts.cookie);
        claimed.addresses.clone_from(&facts.addresses);
        self.cookies.insert(facts.cookie, Owner::new(pod));
        self.addresses.extend(facts.addresses.iter().map(|address| (*address, Owner::new(pod))));
        Ok(facts)
    }

    /// Gives `pod` the netns `cookie` alone, to refuse what arrives there; whether it is the pod's
    /// now.
    pub(crate) fn claim_closed_netns(&mut self, pod: &Pod, cookie: u64) -> bool {
        if self.cookies.get(&cookie).is_some_and(|other| other.uid != pod.uid) {
            return false;
        }
        self.cookies.insert(cookie, Owner::new(pod));
        self.by_uid.entry(pod.uid.clone()).or_default().cookies.insert(cookie);
        true
    }

    /// Whether pods lost an address since [`Self::take_evicted`].
    #[must_use]
    pub(crate) fn has_evicted(&self) -> bool {
        !self.evicted.is_empty()
    }

    /// Those pods, which have to be evaluated again.
    pub(crate) fn take_evicted(&mut self) -> BTreeSet<String> {
        std::mem::take(&mut self.evicted)
    }
}
