//! Where discovery and certificates come from, and how this tunnel proves who it is there.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use serde::Serialize;

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
