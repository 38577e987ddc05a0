//! Reads the node: cgroups, the processes in them, and their network namespaces.
//!
//! * [`cgroups`]: the cgroup2 tree
//! * `cgroup_path`: which pod and container a cgroup's path names
//! * `processes`: which netns the processes of a pod are in
//! * `budget`: how much of one pod is looked at
//! * `netns`: enters a netns and reads its cookie and addresses
//! * `guests`: what lies behind a pod's netns
//! * `nftables`: the rules of a netns
//! * `kubelet`: the kubelet's cgroup
//! * `listeners`: what listens in a netns
//! * `reserved_ports`: who uses the tunnel's ports there
//! * [`connections`]: the connections of a netns, and cutting them
//! * `routes`: what leaves by certain interfaces of a netns
//! * `user_ns`: how a pod numbers users and groups
//! * [`events`]: what changed, as soon as it does

use std::{collections::BTreeMap, path::PathBuf};

use crate::model::reason::Reason;

use self::{cgroups::CgroupId, netns::NetnsFacts};

pub(crate) mod budget;
pub(crate) mod cgroup_path;
pub mod cgroups;
pub mod connections;
pub mod events;
pub(crate) mod guests;
pub(crate) mod kubelet;
pub(crate) mod listeners;
pub(crate) mod netlink;
pub(crate) mod netns;
pub(crate) mod nftables;
pub(crate) mod processes;
pub(crate) mod reserved_ports;
pub(crate) mod routes;
pub(crate) mod user_ns;

/// What a pod has on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The pod's cgroup directory: from its source, or found by the uid.
    pub dir: Option<PathBuf>,
    /// That cgroup and cgroups below it, as many as are looked at; empty: it does not exist.
    pub cgroups: BTreeMap<PathBuf, CgroupId>,
    /// The netns that is certainly the pod's; else every one that a process of the pod is in.
    pub(crate) netns: Vec<ObservedNetns>,
    /// Why this is not all that there is. Then nothing follows from what is missing here.
    pub(crate) gap: Option<Gap>,
}

impl Observed {
    /// A pod that was not observed, and why. `dir` is its cgroup, where that is known.
    pub(crate) fn not_known(dir: Option<PathBuf>, reason: Reason) -> Self {
        Self { dir, gap: Some(Gap::NotKnown(reason)), ..Self::default() }
    }

    /// Why the pod could not be observed: neither what is there nor what is gone is known.
    pub(crate) fn unknown(&self) -> Option<&Reason> {
        match &self.gap {
            Some(Gap::NotKnown(reason)) => Some(reason),
            Some(Gap::OverBudget(_)) | None => None,
        }
    }
}

/// Why an observation is not whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Gap {
    /// An error, or a lack of time. What was known before holds.
    NotKnown(Reason),
    /// The pod has more than is looked at, and what was looked at does not decide.
    OverBudget(Reason),
}

/// A netns that a process of a pod is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ObservedNetns {
    /// The node's own.
    Host,
    /// Another one.
    Pod(NetnsFacts),
}
