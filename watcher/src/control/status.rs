//! What a running watcher reports about itself. Both ends of the control socket use these types.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    model::{pod::FailMode, reason::Reason, reserved_port::ReservedPortUse, state::State},
    observe::events::SourceKind,
};

/// Everything that `watcher status` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The node's name.
    pub node: String,
    /// The watcher's process.
    pub pid: u32,
    /// The cgroup that the pods' programs are attached to.
    pub attached: PathBuf,
    /// The fail mode of pods that do not choose one.
    pub fail_mode: FailMode,
    /// Where pods come from.
    pub source: SourceStatus,
    /// Where events come from.
    pub events: EventsStatus,
    /// Whether every pod that was there at the start has been observed.
    pub ready: bool,
    /// Connected tunnels.
    pub tunnels: Vec<TunnelStatus>,
    /// Why the last tunnel that was rejected was; `None` once one was admitted.
    pub rejected_tunnel: Option<Reason>,
    /// Every pod of the node.
    pub pods: Vec<PodStatus>,
    /// How often rules decided about connections of pods that have no counts of their own, such as
    /// those whose netns is not known yet.
    #[serde(default)]
    pub other_verdicts: Vec<VerdictStatus>,
    /// Netns of pods that left, kept prepared for the connections that they still have.
    pub draining: Vec<DrainingStatus>,
    /// What the watcher could not do for the node as a whole, and tries again.
    pub problems: Vec<String>,
}

/// The source of pods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// What it is, such as `pods file /etc/pods.yaml`.
    pub name: String,
    /// Whether it has sent all pods at least once.
    pub synced: bool,
    /// Why it cannot be used at present; the pods that it sent last stay in force.
    pub error: Option<String>,
    /// Since when it has been so, in seconds since 1970.
    pub since_unix_secs: u64,
}

/// The source of events.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventsStatus {
    /// Which one is used.
    pub source: Option<SourceKind>,
    /// How many events were received.
    pub received: u64,
    /// How many were lost.
    pub lost: u64,
    /// What scans found otherwise than events had said, and corrected.
    pub corrections: u64,
}

/// A connected tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelStatus {
    /// Its process.
    pub pid: i32,
    /// Its cgroup directory.
    pub cgroup: PathBuf,
    /// The id of that.
    pub cgroup_id: u64,
    /// How many pods it serves.
    pub pods: usize,
}

/// A pod, or an entry of the source that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    /// Its uid.
    pub uid: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// Its Kubernetes namespace.
    pub namespace: Option<String>,
    /// Its service account.
    pub service_account: Option<String>,
    /// What happens to its traffic.
    pub state: State,
    /// Why it is not open; or, of an open one, that its source does not name it any more.
    pub reason: Option<Reason>,
    /// What happens to its traffic while no tunnel serves it.
    pub fail_mode: Option<FailMode>,
    /// Its addresses; empty unless it can be enrolled.
    pub addresses: Vec<IpAddr>,
    /// Its netns; `None` unless it can be enrolled.
    pub netns: Option<NetnsStatus>,
    /// Why it could not be observed the last time. What was known of it before holds.
    #[serde(default)]
    pub not_observed: Option<Reason>,
    /// The pod's cgroup and cgroups below it, as many as are looked at, with their ids.
    pub cgroups: BTreeMap<PathBuf, u64>,
    /// What in its entry is wrong and was ignored.
    pub notes: Vec<String>,
    /// Its applications that use ports of the tunnel.
    #[serde(default)]
    pub reserved_ports: Vec<ReservedPortUse>,
    /// How often rules decided about its connections, since it is steered.
    #[serde(default)]
    pub verdicts: Vec<VerdictStatus>,
}

/// How often a rule decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerdictStatus {
    /// As `watcher trace` prints it.
    pub rule: String,
    /// So often.
    pub count: u64,
}

/// A netns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetnsStatus {
    /// Its inode number, as `ls -L /proc/PID/ns/net` shows it.
    pub inode: u64,
    /// Its cookie, which is not reused before a reboot.
    pub cookie: u64,
}

/// A netns that its pod left, and that is still prepared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainingStatus {
    /// Which one.
    pub netns: NetnsStatus,
    /// The uid of the pod that left.
    pub uid: String,
    /// What has to happen before it is restored.
    pub waits_for: String,
}
