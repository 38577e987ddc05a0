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

mod available_memory;
pub(crate) mod keys;
mod resolve;
mod settings;
mod value;

use std::{
    collections::BTreeMap, net::SocketAddr, num::NonZeroUsize, path::PathBuf, sync::Arc, time::Duration,
};

use serde::Serialize;

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

/// Who signs the workloads' certificates.
#[derive(Clone, Debug, Serialize)]
pub enum CaConfig {
    /// A certificate service, such as Istio's.
    Service {
        /// How to call it.
        #[serde(flatten)]
        service: ControlPlaneConfig,
        /// Whether requests name the workload that the certificate is for (shared mode).
        impersonate: bool,
    },
    /// A CA inside this process. For demonstrations and tests.
    Development {
        /// Where its root is kept.
        folder: PathBuf,
    },
}

/// How long a connection may be open without traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StreamConfig {
    /// While one direction has ended.
    #[serde(serialize_with = "seconds")]
    pub half_closed: Duration,
    /// While both directions are open. `None`: without limit.
    pub idle: Option<Duration>,
}

impl StreamConfig {
    /// The limit of a half-closed connection: the shorter of both.
    #[must_use]
    pub fn half_closed(self) -> Duration {
        self.idle.map_or(self.half_closed, |idle| idle.min(self.half_closed))
    }
}

/// Discovery from a control plane (xDS).
#[derive(Clone, Debug, Serialize)]
pub struct XdsConfig {
    /// How to call the control plane.
    #[serde(flatten)]
    pub service: ControlPlaneConfig,
    /// `ztunnel~<address>~<pod>.<namespace>~<namespace>.svc.cluster.local`.
    pub node_id: String,
    /// Node metadata sent to the control plane.
    #[serde(skip)]
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Subscribes to workloads and services when a connection needs them, not to all at start.
    pub on_demand: bool,
    /// Where what was told last is kept.
    pub state_dir: Option<PathBuf>,
    /// Nothing is kept there any more, and what there is is removed.
    pub forget_state: bool,
}

/// How to call a control plane.
#[derive(Clone, Debug, Serialize)]
pub struct ControlPlaneConfig {
    /// Where it is.
    pub address: ControlPlaneAddress,
    /// CA that its certificate must chain to.
    pub root: RootSource,
    /// Authenticates this tunnel.
    #[serde(skip)]
    pub token: Token,
    /// Sent as metadata `clusterid`.
    pub cluster_id: Arc<str>,
    /// Another name that its certificate may have.
    pub alt_name: Option<String>,
    /// `CA_HEADER_*`, `XDS_HEADER_*`: extra gRPC metadata.
    #[serde(skip)]
    pub headers: Headers,
}

/// Where a control plane is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlPlaneAddress {
    /// `https://host:port`.
    Https(String),
    /// A Unix socket on this node. No TLS: who may open the socket is a matter of the node.
    Socket(PathBuf),
}

impl std::fmt::Display for ControlPlaneAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Https(address) => f.write_str(address),
            Self::Socket(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Serialize for ControlPlaneAddress {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// TLS between tunnels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TlsConfig {
    /// TLS 1.2 besides 1.3 (`TLS12_ENABLED`).
    pub tls12: bool,
    /// Only X25519MLKEM768 key exchange (`COMPLIANCE_POLICY=pqc`).
    pub only_post_quantum: bool,
}

/// The CA that a control plane's certificate must chain to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum RootSource {
    /// A PEM file, read again when it changes.
    File(PathBuf),
    /// PEM text.
    Pem(String),
    /// The system's bundle.
    System,
}

/// The token that authenticates this tunnel to the control plane.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// A file, read at each call because the kubelet rotates it.
    File(PathBuf),
    /// The token itself.
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

/// Names and values of gRPC metadata. The values may be secret.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(pub BTreeMap<String, String>);

impl std::fmt::Debug for Headers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Where to connect to an application that accepts the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum ProxyTo {
    /// On loopback, where only the tunnel can reach it.
    Loopback,
    /// On the pod's address.
    PodAddress,
}

/// HBONE connections kept for reuse.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PoolConfig {
    /// Streams per connection; more open another connection.
    pub max_streams: u32,
    /// An unused connection is closed after this time.
    #[serde(serialize_with = "seconds")]
    pub idle: Duration,
    /// How long the peer may take to answer a request.
    #[serde(serialize_with = "seconds")]
    pub answer_limit: Duration,
}

/// What one pod, and what others do to it, may take of this process.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BudgetConfig {
    /// Descriptors that the connections of a pod may hold. `None`: as many as are free.
    pub pod_descriptors: Option<u32>,
    /// Descriptors that connections leave to others. `None`: a share of the limit of open files.
    pub reserved_descriptors: Option<u32>,
    /// Handshakes of peers under way.
    pub pod_handshakes: u32,
    /// Connects to applications under way.
    pub pod_dials: u32,
    /// Label sets of a metric.
    pub metric_label_sets: u32,
}

/// What streams may make the process hold, in bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct MemoryConfig {
    /// Those of one pod.
    pub pod_bytes: usize,
    /// Those of all pods.
    pub total_bytes: usize,
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

/// HTTP/2 flow control, in bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct H2Config {
    /// Largest receive window of a stream.
    pub stream_window: u32,
    /// Receive window of a connection.
    pub connection_window: u32,
    /// Largest DATA frame.
    pub frame: u32,
}

impl H2Config {
    /// Streams that a peer may have open in one connection, as in Istio's tunnel.
    pub const STREAMS: u32 = 200;
    /// Largest window, RFC 9113 §6.9.1.
    pub const LARGEST_WINDOW: u32 = (1 << 31) - 1;
}

/// TCP keepalive of every socket.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct KeepaliveConfig {
    /// Idle time before the first probe.
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
    /// Time between probes.
    #[serde(serialize_with = "seconds")]
    pub interval: Duration,
    /// Unanswered probes after which the connection is closed.
    pub retries: u32,
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
