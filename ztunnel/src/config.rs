//! What the tunnel is told at start: by a file, and by the environment variables that Istio's DaemonSet sets, which
//! override it.
//!
//! Read once, checked as a whole, passed down by section. A variable that Istio's tunnel honours and this one
//! does not is refused where ignoring it would weaken security, and ignored where it would not.
//!
//! * [`resolve`]: what the keys come to together
//! * [`settings`]: what was set and where; unknown keys and bad values are refused
//! * [`keys`]: the table of all keys
//! * [`value`]: text → one typed value

pub mod keys;
mod resolve;
mod settings;
mod value;

use std::{
    collections::BTreeMap, net::SocketAddr, num::NonZeroUsize, path::PathBuf, sync::Arc, time::Duration,
};

use serde::Serialize;

pub use settings::{ConfigError, Effective, Origin};
use value::seconds;

/// Everything that is decided before the first connection.
#[derive(Clone, Debug, Serialize)]
pub struct Config {
    /// Where the node agent hands us pods (`INPOD_UDS`).
    pub zds_socket: PathBuf,
    pub mode: ProxyMode,
    pub ports: PortsConfig,
    /// `SO_MARK` of the tunnel's own sockets (`PACKET_MARK`): 1337 in shared mode, none in dedicated mode.
    pub packet_mark: Option<u32>,
    /// Several processes may listen side by side during an upgrade (`INPOD_PORT_REUSE`).
    pub port_reuse: bool,
    /// Whether listeners bind `[::]` (`IPV6_ENABLED`, and the kernel has it).
    pub ipv6: bool,
    /// Whether the last hop keeps the client's address (`ENABLE_ORIG_SRC`). `None`: if the capability is there.
    pub original_source: Option<bool>,
    pub network: Arc<str>,
    pub node: Arc<str>,
    pub cluster_id: Arc<str>,
    pub cluster_domain: Arc<str>,
    pub trust_domain: Arc<str>,
    pub own_pod: Option<OwnPod>,
    pub local_state: Option<LocalState>,
    /// In place of that.
    pub xds: Option<XdsConfig>,
    pub ca: CaConfig,
    pub tls: TlsConfig,
    /// Revocation lists (`CRL_PATH`).
    pub crl: Option<PathBuf>,
    /// Life time to ask certificates for.
    #[serde(serialize_with = "seconds")]
    pub secret_ttl: Duration,
    pub workers: NonZeroUsize,
    pub pool: PoolConfig,
    pub h2: H2Config,
    pub limits: StreamConfig,
    pub dns: DnsConfig,
    pub keepalive: Option<KeepaliveConfig>,
    /// `TCP_USER_TIMEOUT` of every socket (`USER_TIMEOUT_ENABLED`).
    pub user_timeout: Option<Duration>,
    /// How long open connections may finish by themselves before they are cut.
    #[serde(serialize_with = "seconds")]
    pub drain_deadline: Duration,
    pub admin_address: SocketAddr,
    pub stats_address: SocketAddr,
    pub readiness_address: SocketAddr,
    /// Whether CONNECT replies tell about the server's workload, and the peer's telling is believed.
    pub response_baggage: bool,
    /// Where an application that takes PROXY headers is dialled.
    pub proxy_to: ProxyTo,
    pub log_format: LogFormat,
    /// A `RUST_LOG` filter.
    pub log_filter: String,
    /// Every key of the file with its value and where that comes from; for `config print` and the start's log.
    #[serde(skip)]
    pub effective: Arc<[Effective]>,
}

/// Whom one process serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum ProxyMode {
    /// Every pod that the node agent hands over.
    Shared,
    /// One workload, in whose netns the process runs (`PROXY_WORKLOAD_INFO=ns/name/sa`).
    Dedicated { namespace: Arc<str>, name: Arc<str>, service_account: Arc<str> },
}

/// The pod that this process runs in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OwnPod {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
}

/// Fixed: peers and captured traffic count on them.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PortsConfig {
    pub outbound: u16,
    pub inbound: u16,
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
    pub fn is_own(&self, port: u16) -> bool {
        // 15080: where Istio's tunnel may offer SOCKS.
        [self.outbound, self.inbound, self.hbone, 15080].contains(&port)
    }
}

/// Workloads, services and policies from a document in place of a control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum LocalState {
    /// Watched: edits apply while running (`LOCAL_XDS_PATH`).
    Path(PathBuf),
    /// The document itself (`LOCAL_XDS`).
    Inline(String),
}

/// Who signs the workloads' certificates.
#[derive(Clone, Debug, Serialize)]
pub enum CaConfig {
    Service {
        #[serde(flatten)]
        service: ControlPlaneConfig,
        /// Whether certificates are asked for in the name of others (shared mode).
        impersonate: bool,
    },
    /// A CA inside this process whose root is kept in `folder`. For demonstrations and tests.
    Development { folder: PathBuf },
}

/// How long a connection may lie still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StreamConfig {
    /// With one direction ended.
    #[serde(serialize_with = "seconds")]
    pub half_closed: Duration,
    /// At all. `None`: as long as both ends like.
    pub idle: Option<Duration>,
}

impl StreamConfig {
    pub fn half_closed(self) -> Duration {
        self.idle.map_or(self.half_closed, |idle| idle.min(self.half_closed))
    }
}

/// Discovery from a control plane (xDS).
#[derive(Clone, Debug, Serialize)]
pub struct XdsConfig {
    #[serde(flatten)]
    pub service: ControlPlaneConfig,
    /// `ztunnel~<address>~<pod>.<namespace>~<namespace>.svc.cluster.local`.
    pub node_id: String,
    /// What the control plane is told of this node.
    #[serde(skip)]
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Workloads and services are asked for when a connection needs them, instead of all at once.
    pub on_demand: bool,
}

/// A control plane, and how it is called.
#[derive(Clone, Debug, Serialize)]
pub struct ControlPlaneConfig {
    /// Always `https://`.
    pub address: String,
    pub root: RootSource,
    #[serde(skip)]
    pub token: Token,
    pub cluster_id: Arc<str>,
    /// A name that its certificate may bear instead of the address' own.
    pub alt_name: Option<String>,
    /// `CA_HEADER_*`, `XDS_HEADER_*`: extra gRPC metadata.
    #[serde(skip)]
    pub headers: Headers,
}

/// What is spoken between tunnels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TlsConfig {
    /// TLS 1.2 beside 1.3 (`TLS12_ENABLED`).
    pub tls12: bool,
    /// No key exchange but X25519MLKEM768 (`COMPLIANCE_POLICY=pqc`).
    pub only_post_quantum: bool,
}

/// Whom to trust as the control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum RootSource {
    File(PathBuf),
    Pem(String),
    /// The system's bundle.
    System,
}

/// How we authenticate to the control plane.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// Read again at each call, since the kubelet rotates it.
    File(PathBuf),
    Literal(String),
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Literal(_) => f.write_str("Literal(..)"),
        }
    }
}

/// Names and values of headers. The values may be secret.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(pub BTreeMap<String, String>);

impl std::fmt::Debug for Headers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Where an application that takes PROXY headers is dialled: nobody but the tunnel can reach it on loopback.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum ProxyTo {
    Loopback,
    PodAddress,
}

/// HBONE tunnels kept for reuse.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PoolConfig {
    /// Streams above it open another tunnel.
    pub max_streams: u32,
    /// A tunnel unused for so long is closed.
    #[serde(serialize_with = "seconds")]
    pub idle: Duration,
}

/// The DNS proxy.
#[derive(Clone, Debug, Serialize)]
pub struct DnsConfig {
    pub enabled: bool,
    /// In each pod's netns.
    pub address: SocketAddr,
    pub preferred_namespace: Option<Arc<str>>,
    /// Who is asked for what is not ours. Empty: the resolvers of /etc/resolv.conf.
    pub upstream: Vec<SocketAddr>,
}

/// HTTP/2 flow control, in bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct H2Config {
    pub stream_window: u32,
    pub connection_window: u32,
    pub frame: u32,
}

impl H2Config {
    /// More streams than these no peer may have open in one tunnel, as with Istio's.
    pub const STREAMS: u32 = 200;
    /// RFC 9113 §6.9.1.
    pub const LARGEST_WINDOW: u32 = (1 << 31) - 1;
}

/// TCP keepalive of every socket.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct KeepaliveConfig {
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
    #[serde(serialize_with = "seconds")]
    pub interval: Duration,
    pub retries: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum LogFormat {
    Text,
    Json,
}

#[cfg(test)]
mod tests;
