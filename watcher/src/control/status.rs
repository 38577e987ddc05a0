//! What a running watcher tells of itself. Both ends of the control socket use these types.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    model::{pod::FailMode, reason::Reason, state::State},
    observe::events::SourceKind,
};

/// The whole of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub node: String,
    pub pid: u32,
    /// Where the pods' programs are attached.
    pub attached: PathBuf,
    pub fail_mode: FailMode,
    pub source: SourceStatus,
    pub events: EventsStatus,
    /// Whether every pod that was there at the start has been looked at.
    pub ready: bool,
    pub tunnels: Vec<TunnelStatus>,
    /// Why the last tunnel that was turned away was.
    pub turned_away: Option<Reason>,
    pub pods: Vec<PodStatus>,
    /// Netns of pods that left, kept prepared for the connections that they still have.
    pub lingering: Vec<LingeringStatus>,
    /// What the watcher could not do for the node as a whole, and tries again.
    pub problems: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// What it is, such as `pods file /etc/pods.yaml`.
    pub name: String,
    /// Whether it has told of all pods at least once.
    pub synced: bool,
    /// Why it cannot be used at present; what it told last holds.
    pub error: Option<String>,
    /// Since when it has been so, in seconds since 1970.
    pub since_unix_secs: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventsStatus {
    /// Where events come from; `None`: not decided yet.
    pub source: Option<SourceKind>,
    pub told: u64,
    pub lost: u64,
    /// What a scan found to be otherwise than events had told, and put right.
    pub corrections: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelStatus {
    pub pid: i32,
    pub cgroup: PathBuf,
    pub cgroup_id: u64,
    /// How many pods it serves.
    pub pods: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    pub uid: Option<String>,
    pub name: Option<String>,
    pub namespace: Option<String>,
    pub service_account: Option<String>,
    pub state: State,
    /// Why it is not open.
    pub reason: Option<Reason>,
    pub fail_mode: Option<FailMode>,
    pub addresses: Vec<IpAddr>,
    pub netns: Option<NetnsStatus>,
    /// The pod's cgroup and every container's below it, with their ids.
    pub cgroups: BTreeMap<PathBuf, u64>,
    /// What in its entry is wrong and was ignored.
    pub notes: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetnsStatus {
    pub inode: u64,
    pub cookie: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LingeringStatus {
    pub netns: NetnsStatus,
    /// The uid of the pod that left.
    pub uid: String,
    /// What is waited for.
    pub waits_for: String,
}
