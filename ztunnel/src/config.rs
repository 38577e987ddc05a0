//! The configuration: a file, overridden by the environment variables that Istio's DaemonSet sets.
//!
//! It is read once at start, validated as a whole, and passed down by section. A variable that
//! Istio's tunnel supports and this one does not is refused if ignoring it would weaken security,
//! else ignored.
//!
//! * [`resolve`]: raw settings → [`Config`], with the checks across keys
//! * [`settings`]: the values that were set, and where; refuses unknown keys and invalid values
//! * `keys`: the table of all keys
//! * [`value`]: text → one typed value
//! * `available_memory`: how much memory there is
//! * `control_plane`, `limits`: sections of [`Config`]; the others are here

mod available_memory;
mod control_plane;
pub(crate) mod keys;
mod limits;
mod resolve;
mod settings;
mod value;

use std::{net::SocketAddr, num::NonZeroUsize, path::PathBuf, sync::Arc, time::Duration};

use serde::Serialize;

pub use control_plane::{
    CaConfig, ControlPlaneAddress, ControlPlaneConfig, Headers, RootSource, Token, XdsConfig,
};
pub use limits::{BudgetConfig, H2Config, KeepaliveConfig, MemoryConfig, PoolConfig, StreamConfig};
pub use settings::{ConfigError, Effective, Origin};
use value::seconds;

/// All settings, resolved and validated.
#[derive(Clone, Debug, Serialize)]
pub struct Config {
    /// Socket of the node agent, which hands over pods (`INPOD_UDS`).
    pub zds_socket: PathBuf,
    /// Which workloads this process serves.
    pub mode: ProxyMode,
    /// Ports in each pod's netns.
    pub ports: PortsConfig,
    /// `SO_MARK` of the tunnel's own sockets (`PACKET_MARK`): 1337 in shared mode, none in
    /// dedicated mode.
    pub packet_mark: Option<u32>,
    /// Several processes may listen side by side during an upgrade (`INPOD_PORT_REUSE`).
    pub port_reuse: bool,
    /// Whether listeners bind `[::]` (`IPV6_ENABLED`, and the kernel has it).
    pub ipv6: bool,
    /// Whether applications see the client's address (`ENABLE_ORIG_SRC`). `None`: if the process
    /// has the capability.
    pub original_source: Option<bool>,
    /// How pods of this node reach each other.
    pub same_node: SameNode,
    /// Network of this node; empty if there is one network only.
    pub network: Arc<str>,
    /// Name of this node.
    pub node: Arc<str>,
    /// Cluster of this node.
    pub cluster_id: Arc<str>,
    /// DNS suffix of service names.
    pub cluster_domain: Arc<str>,
    /// Trust domain of workloads for which nobody tells one.
    pub trust_domain: Arc<str>,
    /// Other trust domains that are this mesh, such as the one before a migration.
    pub trust_domain_aliases: Arc<[Arc<str>]>,
    /// Where the control plane tells of more trust domains.
    pub trust_files: TrustFiles,
    /// The pod of this process. `None`: its metrics are not served over HBONE.
    pub own_pod: Option<OwnPod>,
    /// The mesh from a document.
    pub local_state: Option<LocalState>,
    /// The mesh from a control plane. Never together with `local_state`.
    pub xds: Option<XdsConfig>,
    /// Source of certificates.
    pub ca: CaConfig,
    /// TLS between tunnels.
    pub tls: TlsConfig,
    /// File with revocation lists (`CRL_PATH`).
    pub crl: Option<PathBuf>,
    /// Requested lifetime of certificates.
    #[serde(serialize_with = "seconds")]
    pub secret_ttl: Duration,
    /// Threads that carry traffic.
    pub workers: NonZeroUsize,
    /// HBONE connections kept for reuse.
    pub pool: PoolConfig,
    /// What one pod may take of what all share.
    pub budget: BudgetConfig,
    /// HTTP/2 flow control.
    pub h2: H2Config,
    /// What streams may hold.
    pub memory: MemoryConfig,
    /// Idle limits of connections.
    pub limits: StreamConfig,
    /// The DNS proxy.
    pub dns: DnsConfig,
    /// TCP keepalive; `None`: off.
    pub keepalive: Option<KeepaliveConfig>,
    /// `TCP_USER_TIMEOUT` of every socket (`USER_TIMEOUT_ENABLED`).
    pub user_timeout: Option<Duration>,
    /// How long open connections may continue after the shutdown signal before they are closed.
    #[serde(serialize_with = "seconds")]
    pub drain_deadline: Duration,
    /// Where the admin server listens. Always loopback.
    pub admin_address: SocketAddr,
    /// Where metrics are served.
    pub stats_address: SocketAddr,
    /// Where readiness is served.
    pub readiness_address: SocketAddr,
    /// Whether CONNECT responses describe the server's workload, and the peer's description is used
    /// for labels.
    pub response_baggage: bool,
    /// Where to connect to applications that accept the PROXY protocol.
    pub proxy_to: ProxyTo,
    /// Format of log records.
    pub log_format: LogFormat,
    /// A `RUST_LOG` filter.
    pub log_filter: String,
    /// Every key with its effective value and its origin, for `config print` and `/config_dump`.
    #[serde(skip)]
    pub effective: Arc<[Effective]>,
}

/// How pods of one node reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum SameNode {
    /// The tunnel connects the application.
    Direct,
    /// Through mutual TLS, as between nodes.
    Hbone,
}

/// Files of the control plane about trust domains. One that does not exist says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TrustFiles {
    /// Istio's mesh configuration, which names aliases of the mesh's trust domain.
    pub mesh_config: Option<PathBuf>,
    /// Trust domains whose clients are accepted (`TRUST_DOMAINS_PATH`).
    pub accepted: Option<PathBuf>,
}

/// Which workloads one process serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum ProxyMode {
    /// Every pod that the node agent hands over.
    Shared,
    /// One workload, in whose netns the process runs (`PROXY_WORKLOAD_INFO=ns/name/sa`).
    Dedicated {
        /// Namespace of the workload.
        namespace: Arc<str>,
        /// Name of the workload.
        name: Arc<str>,
        /// Service account of the workload.
        service_account: Arc<str>,
    },
}

/// The pod that this process runs in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OwnPod {
    /// Its name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its service account.
    pub service_account: Arc<str>,
}

/// Ports in each pod's netns. Fixed, since peers and redirected traffic rely on them.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PortsConfig {
    /// Takes redirected connections of the pod.
    pub outbound: u16,
    /// Takes plaintext connections to the pod.
    pub inbound: u16,
    /// Takes HBONE from peers.
    pub hbone: u16,
}

impl Default for PortsConfig {
    fn default() -> Self {
        Self { outbound: 15001, inbound: 15006, hbone: 15008 }
    }
}

impl PortsConfig {
    /// Whether `port` is the tunnel's own in every netns: traffic to it through the tunnel would
    /// go in circles.
    #[must_use]
    pub fn is_own(&self, port: u16) -> bool {
        // 15053: DNS. 15080: where Istio's tunnel may offer SOCKS.
        [self.outbound, self.inbound, self.hbone, 15053, 15080].contains(&port)
    }
}

/// Workloads, services and policies from a document instead of a control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum LocalState {
    /// A file, reloaded when it changes (`LOCAL_XDS_PATH`).
    Path(PathBuf),
    /// The document itself (`LOCAL_XDS`).
    Inline(String),
}

/// TLS between tunnels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TlsConfig {
    /// TLS 1.2 besides 1.3 (`TLS12_ENABLED`).
    pub tls12: bool,
    /// Only X25519MLKEM768 key exchange (`COMPLIANCE_POLICY=pqc`).
    pub only_post_quantum: bool,
}

/// Where to connect to an application that accepts the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum ProxyTo {
    /// On loopback, where only the tunnel can reach it.
    Loopback,
    /// On the pod's address.
    PodAddress,
}

/// The DNS proxy.
#[derive(Clone, Debug, Serialize)]
pub struct DnsConfig {
    /// Whether it runs.
    pub enabled: bool,
    /// Where it listens in each pod's netns.
    pub address: SocketAddr,
    /// Namespace preferred among services with the same name, after the client's own.
    pub preferred_namespace: Option<Arc<str>>,
    /// Resolvers for names outside the mesh. Empty: those of `/etc/resolv.conf`.
    pub upstream: Vec<SocketAddr>,
}

/// Format of log records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum LogFormat {
    /// One line of text per record.
    Text,
    /// One JSON object per record.
    Json,
}

#[cfg(test)]
mod tests;
