//! A pod as its source describes it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{exclusions::Exclusions, lists::Lists, notes::Notes, reason::Reason};

/// What happens to an enrolled pod's traffic while no tunnel serves it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum FailMode {
    /// It is refused.
    #[default]
    Closed,
    /// It passes in plaintext.
    Open,
}

/// Whether a pod is enrolled, as its source decided.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Selection {
    /// Its traffic belongs into the mesh.
    Enrolled,
    /// No label enrols it.
    #[default]
    Plain,
    /// Its source does not name it any more, and an earlier watcher, of a version that recorded no
    /// more, enrolled it: all that is known are processes that still run. They stay closed until
    /// they end.
    ObjectGone,
    /// A label would enrol it, and a sidecar or the host's network excludes it.
    LeftAlone(Reason),
}

impl Selection {
    /// Whether its processes concern the watcher.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        matches!(self, Self::Enrolled | Self::ObjectGone)
    }
}

/// A pod, from whatever source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// As in the name of the pod's cgroup.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Becomes, with the namespace, its identity.
    pub service_account: String,
    /// The pod's directory in the cgroup2 tree; its containers' are below. `None`: found by the
    /// uid, as kubelets name the directories ([`crate::observe::cgroup_path`]).
    pub cgroup: Option<PathBuf>,
    /// Whether it is enrolled.
    pub selection: Selection,
    /// `None`: the node's default.
    pub fail_mode: Option<FailMode>,
    /// Whether its DNS queries go to the tunnel while that answers DNS. `None`: the node's default.
    pub dns_capture: Option<bool>,
    /// Addresses that the pod's netns must have; empty: any.
    pub addresses: BTreeSet<IpAddr>,
    /// Interfaces whose arriving traffic the tunnel should carry as the pod's own, which it cannot.
    pub virtual_interfaces: Vec<String>,
    /// What the pod itself excludes and includes.
    pub lists: Arc<Lists>,
    /// Who says what, from the narrowest to the widest: those that say anything.
    pub levels: Vec<Level>,
    /// Traffic that bypasses the tunnel, by the pod's lists and the wider ones. Shared: lists may be
    /// long.
    pub exclusions: Arc<Exclusions>,
    /// The ids of its containers by name, by which the container runtime names their cgroups; as far as
    /// they are needed and known.
    pub containers: BTreeMap<String, String>,
    /// Whether its source says that containers of it run. False: that is not known.
    pub is_running: bool,
    /// Whether its source tells others that it is in the mesh, as far as the source knows.
    pub is_announced: bool,
    /// Invalid values that were ignored.
    pub notes: Notes,
}

/// What a pod, its namespace or the mesh excludes and includes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Level {
    /// Where it is written, such as `annotations of namespace demo`.
    pub origin: String,
    /// The lists.
    pub lists: Arc<Lists>,
}

impl Level {
    /// Those of `all` that say anything.
    #[must_use]
    pub fn of(all: [(String, &Arc<Lists>); 3]) -> Vec<Self> {
        let says = |(_, lists): &(String, &Arc<Lists>)| ***lists != Lists::default();
        let levels = all.into_iter().filter(says);
        levels.map(|(origin, lists)| Self { origin, lists: Arc::clone(lists) }).collect()
    }
}

/// Who an enrolled pod is, and how it is treated: enough to keep it in the mesh without its source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodIdentity {
    /// Its name.
    pub name: String,
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
    /// As in [`Pod`].
    #[serde(default)]
    pub fail_mode: Option<FailMode>,
    /// As in [`Pod`].
    #[serde(default)]
    pub dns_capture: Option<bool>,
    /// As in [`Pod`].
    #[serde(default)]
    pub addresses: BTreeSet<IpAddr>,
}

impl PodIdentity {
    /// Of `pod`.
    #[must_use]
    pub fn of(pod: &Pod) -> Self {
        Self {
            name: pod.name.clone(),
            namespace: pod.namespace.clone(),
            service_account: pod.service_account.clone(),
            fail_mode: pod.fail_mode,
            dns_capture: pod.dns_capture,
            addresses: pod.addresses.clone(),
        }
    }
}

/// What a source has about one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// It can be used.
    Pod(Arc<Pod>),
    /// It cannot.
    Bad(BadEntry),
}

/// An entry that cannot be used, with what is needed to name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadEntry {
    /// Position in the list, from 0, where the source is a list.
    pub index: Option<usize>,
    /// Its uid, where that can be read.
    pub uid: Option<String>,
    /// Its name, where that can be read.
    pub name: Option<String>,
    /// The key and what is wrong with it.
    pub problem: String,
}

/// What a source sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// Every pod of this node; all others are gone. The first update of a source is one, and the
    /// watcher is not ready before it. Of two entries with the same claim the first holds it.
    All(Vec<Entry>),
    /// What changed, by uid; `None`: gone. One message is one batch, applied as a whole.
    Changed(Vec<(String, Option<Entry>)>),
    /// The source, or a part of it, is unavailable, and why. Nothing else changes. It lasts until
    /// the next `All`, or `Usable`.
    Unusable(String),
    /// The source is available again, and nothing was missed.
    Usable,
}
