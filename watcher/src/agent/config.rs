//! What the watcher is configured to do.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ztunnel_api::names::ServiceAccount;

use crate::{model::pod::FailMode, observe::events::SourceKind};

/// The options of `watcher run`, checked.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// This node's name.
    pub node: String,
    /// Where tunnels connect.
    pub zds_socket: PathBuf,
    /// Service accounts of pods that a tunnel may run in.
    pub tunnel_accounts: BTreeSet<ServiceAccount>,
    /// Where commands connect.
    pub status_socket: PathBuf,
    /// Where this node's maps and links are pinned.
    pub pins: PathBuf,
    /// Where cgroup2 is mounted.
    pub cgroup_root: PathBuf,
    /// The cgroup above all pods, which the pods' programs are attached to.
    pub attach: PathBuf,
    /// This node's run directory.
    pub run_dir: PathBuf,
    /// What happens to an enrolled pod's traffic while no tunnel serves it, unless the pod chooses.
    pub fail_mode: FailMode,
    /// The source of events; `None`: the best that works.
    pub events: Option<SourceKind>,
    /// Whether the pods' DNS queries go to the tunnel, unless the pod chooses.
    pub dns_capture: bool,
    /// Only queries to these are captured, three at most. Empty: all.
    pub dns_resolvers: Vec<IpAddr>,
    /// Where metrics and readiness are served.
    pub metrics_address: Option<SocketAddr>,
    /// How often everything is scanned. A scan makes up for lost events and for maps that others
    /// changed, and finds ports that no application listens on any more.
    pub rescan: Duration,
    /// For how long peers may still connect by HBONE to a pod whose label is off, after the source
    /// has ceased to tell them that they should.
    pub leave_grace: Duration,
    /// The port of the node's kubelet, whose connections pass to pods; `None`: nobody's do.
    pub kubelet_port: Option<u16>,
    /// Whether a pod is left alone whose listeners look like those of a known sidecar.
    pub detect_sidecars: bool,
    /// Undo everything at the end.
    pub detach: bool,
}
