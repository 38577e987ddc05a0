//! What the watcher was told to do.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use crate::{model::pod::FailMode, observe::events::SourceKind};

/// All that the watcher is told.
#[derive(Clone, Debug)]
pub struct Config {
    pub node: String,
    pub zds_socket: PathBuf,
    pub status_socket: PathBuf,
    /// Where this node's maps and links are pinned.
    pub pins: PathBuf,
    pub cgroup_root: PathBuf,
    /// Where the pods' programs are attached.
    pub attach: PathBuf,
    /// This node's run directory.
    pub run_dir: PathBuf,
    pub fail_mode: FailMode,
    /// The source of events; `None`: the best that works.
    pub events: Option<SourceKind>,
    /// Whether the pods' DNS queries go to the tunnel, unless a pod asks otherwise.
    pub dns_capture: bool,
    /// Only queries to these, three at most. None: all.
    pub dns_resolvers: Vec<IpAddr>,
    /// Where metrics and readiness are served.
    pub metrics_address: Option<SocketAddr>,
    /// How often everything is scanned, which makes up for lost events and for what others did to our maps, and finds
    /// ports that nobody listens on any more.
    pub rescan: Duration,
    /// Undo everything at the end.
    pub detach: bool,
}
