//! Reads the node: cgroups, the processes in them, and their network namespaces.
//!
//! * [`cgroups`]: the cgroup2 tree
//! * `cgroup_path`: which pod and container a cgroup's path names
//! * `processes`: which netns the processes of a pod are in
//! * `netns`: enters a netns and reads its cookie and addresses
//! * `listeners`: what listens in a netns
//! * [`events`]: what changed, as soon as it does

use std::{collections::BTreeMap, path::PathBuf};

use self::{cgroups::CgroupId, netns::NetnsFacts};

pub(crate) mod cgroup_path;
pub mod cgroups;
pub mod events;
pub(crate) mod listeners;
pub(crate) mod netlink;
pub(crate) mod netns;
pub(crate) mod processes;

/// What a pod has on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The pod's cgroup directory: from its source, or found by the uid.
    pub dir: Option<PathBuf>,
    /// That cgroup and all below it; empty: it does not exist.
    pub cgroups: BTreeMap<PathBuf, CgroupId>,
    /// Every netns that a process of the pod is in.
    pub(crate) netns: Vec<ObservedNetns>,
}

/// A netns that a process of a pod is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ObservedNetns {
    /// The node's own.
    Host,
    /// Another one.
    Pod(NetnsFacts),
    /// It could not be entered or queried.
    Unreadable(String),
}
