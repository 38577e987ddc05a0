//! A pod, and what its source says of it.

use std::{collections::BTreeSet, net::IpAddr, path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{exclusions::Exclusions, reason::Reason};

/// What happens to an enrolled pod's traffic while no tunnel serves it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum FailMode {
    /// It is refused.
    #[default]
    Closed,
    /// It passes in clear.
    Open,
}

/// Whether a pod is enrolled, as its source decided by labels and whatever else it knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Selection {
    Enrolled,
    /// Its labels ask for nothing.
    #[default]
    Plain,
    /// Left alone for a reason that users may want to see, such as a sidecar or the host's network.
    LeftAlone(Reason),
}

/// A pod, by whatever source it became known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    /// The pod's directory in the cgroup2 tree; its containers' are below. `None`: found by the pod's uid,
    /// as kubelets name the directories ([`crate::observe::cgroup_path`]).
    pub cgroup: Option<PathBuf>,
    pub selection: Selection,
    /// `None`: the node's default.
    pub fail_mode: Option<FailMode>,
    /// Whether its DNS queries go to the tunnel, while that answers any. `None`: the node's default.
    pub dns_capture: Option<bool>,
    /// Addresses that the pod's netns must hold; empty: whatever it holds.
    pub addresses: BTreeSet<IpAddr>,
    pub exclusions: Exclusions,
    /// What was wrong with the pod's wishes and is therefore ignored.
    pub notes: Vec<String>,
}

/// What a source says of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    Pod(Arc<Pod>),
    Bad(BadEntry),
}

/// An entry that could not be read, with as much of it as is needed to name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadEntry {
    /// Position in the list, from 0, where the source is a list.
    pub index: Option<usize>,
    pub uid: Option<String>,
    pub name: Option<String>,
    /// The key and what is wrong with it.
    pub problem: String,
}

/// What a source tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// Every pod of this node; whoever is not named has gone. The first update of a source is one, and
    /// only from then on the watcher can be ready. Of two entries that claim the same the first holds it.
    All(Vec<Entry>),
    /// What changed, by uid; `None`: gone. One message is one batch: it is acted on as a whole.
    Changed(Vec<(String, Option<Entry>)>),
    /// The source cannot be used at present: why. Nothing else changes.
    Unusable(String),
}
