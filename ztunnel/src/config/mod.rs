//! What the tunnel is told at start, by the environment variables that Istio's DaemonSet sets.
//!
//! Read once, checked as a whole, passed down by section. A variable that Istio's tunnel honours and this one
//! does not is refused where ignoring it would weaken security, and ignored where it would not.
//!
//! * [`value`]: one variable → one typed value, or an error that names key, value and expectation

mod value;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroUsize,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use serde::Serialize;

pub use value::ConfigError;
use value::{Vars, seconds};

/// Everything that is decided before the first connection.
#[expect(clippy::struct_excessive_bools, reason = "each is a switch that operators know")]
#[derive(Clone, Debug, Serialize)]
pub struct Config {
    /// Where the node agent hands us pods (`INPOD_UDS`).
    pub zds_socket: PathBuf,
    pub mode: ProxyMode,
    pub ports: Ports,
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
    pub local_state: Option<LocalState>,
    pub ca: Ca,
    /// Life time to ask certificates for.
    #[serde(serialize_with = "seconds")]
    pub secret_ttl: Duration,
    pub workers: NonZeroUsize,
    pub pool: Pool,
    pub h2: H2,
    pub keepalive: Option<Keepalive>,
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
    /// Policy decisions are logged at info instead of debug (`AUTHZ_POLICY_INFO_LOGGING`).
    pub policy_info_logging: bool,
    pub log_format: LogFormat,
    /// A `RUST_LOG` filter.
    pub log_filter: String,
}

/// Whom one process serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum ProxyMode {
    /// Every pod that the node agent hands over.
    Shared,
    /// One workload, in whose netns the process runs (`PROXY_WORKLOAD_INFO=ns/name/sa`).
    Dedicated { namespace: Arc<str>, name: Arc<str>, service_account: Arc<str> },
}

/// Fixed: peers and captured traffic count on them.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ports {
    pub outbound: u16,
    pub inbound: u16,
    pub hbone: u16,
}

impl Default for Ports {
    fn default() -> Self {
        Self { outbound: 15001, inbound: 15006, hbone: 15008 }
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
pub enum Ca {
    Service(CaService),
    /// A CA inside this process whose root is kept in `folder`. For demonstrations and tests.
    Development {
        folder: PathBuf,
    },
}

/// Istio's certificate service.
#[derive(Clone, Debug, Serialize)]
pub struct CaService {
    /// Always `https://`.
    pub address: String,
    pub root: RootSource,
    #[serde(skip)]
    pub token: Token,
    pub cluster_id: Arc<str>,
    /// A name that the service's certificate may bear instead of the address' own.
    pub alt_name: Option<String>,
    /// `CA_HEADER_*`: extra gRPC metadata.
    #[serde(skip)]
    pub headers: Headers,
    /// Whether certificates are asked for in the name of others (shared mode).
    pub impersonate: bool,
}

/// Whom to trust as the certificate service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum RootSource {
    File(PathBuf),
    Pem(String),
    /// The system's bundle.
    System,
}

/// How we authenticate to the certificate service.
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

/// HBONE tunnels kept for reuse.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Pool {
    /// Streams above it open another tunnel.
    pub max_streams: u32,
    /// A tunnel unused for so long is closed.
    #[serde(serialize_with = "seconds")]
    pub idle: Duration,
}

/// HTTP/2 flow control, in bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct H2 {
    pub stream_window: u32,
    pub connection_window: u32,
    pub frame: u32,
}

/// TCP keepalive of every socket.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Keepalive {
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

/// Past this many workers, more of them only add listening sockets to every pod.
const MAX_DEFAULT_WORKERS: usize = 16;

const DEVELOPMENT_CA_FOLDER: &str = "/var/lib/adit/development-ca";

/// Variables of Istio's tunnel that cannot be ignored without weakening or breaking something.
const NOT_SUPPORTED: [(&str, &str); 5] = [
    ("XDS_ADDRESS", "discovery from a control plane is not supported; use LOCAL_XDS_PATH or LOCAL_XDS"),
    (
        "CRL_PATH",
        "revocation lists are not supported, and without one revoked certificates would be accepted",
    ),
    ("TLS12_ENABLED", "only TLS 1.3 is supported"),
    ("COMPLIANCE_POLICY", "compliance policies are not supported"),
    ("ENABLE_PROXY", "the tunnel without its HBONE proxy is not supported"),
];

impl Config {
    /// From the environment of this process.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::from_vars(std::env::vars())
    }

    /// From any set of variables. An empty value counts as absent.
    pub fn from_vars(vars: impl IntoIterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        let vars = Vars::new(vars);
        refuse_unsupported(&vars)?;
        let mode = proxy_mode(&vars)?;
        let cluster_id = vars.text("CLUSTER_ID", "Kubernetes");
        let ipv6 = vars.bool("IPV6_ENABLED", true)? && ipv6_available();
        let any = if ipv6 { IpAddr::from(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
        let keepalive = keepalive(&vars)?;
        Ok(Self {
            zds_socket: vars.path("INPOD_UDS", "/var/run/ztunnel/ztunnel.sock"),
            ports: Ports::default(),
            packet_mark: match vars.number("PACKET_MARK")? {
                None if mode == ProxyMode::Shared => Some(1337),
                mark => mark,
            },
            port_reuse: vars.bool("INPOD_PORT_REUSE", true)?,
            ipv6,
            original_source: vars.optional_bool("ENABLE_ORIG_SRC")?,
            network: vars.text("NETWORK", ""),
            node: vars.text("NODE_NAME", ""),
            cluster_domain: vars.text("CLUSTER_DOMAIN", "cluster.local"),
            trust_domain: vars.text("TRUST_DOMAIN", "cluster.local"),
            local_state: local_state(&vars)?,
            ca: ca(&vars, &mode, &cluster_id)?,
            secret_ttl: secret_ttl(&vars)?,
            workers: workers(&vars)?,
            pool: Pool {
                max_streams: vars.positive("POOL_MAX_STREAMS_PER_CONNECTION", 100, u32::MAX)?,
                idle: vars.duration("POOL_UNUSED_RELEASE_TIMEOUT", Duration::from_mins(5))?,
            },
            h2: h2(&vars)?,
            user_timeout: match (&keepalive, vars.bool("USER_TIMEOUT_ENABLED", false)?) {
                (Some(k), true) => Some(k.time + k.interval * k.retries),
                _ => None,
            },
            keepalive,
            drain_deadline: drain_deadline(&vars)?,
            admin_address: admin_address(&vars)?,
            stats_address: vars.address("STATS_ADDR", SocketAddr::new(any, 15020))?,
            readiness_address: vars.address("READINESS_ADDR", SocketAddr::new(any, 15021))?,
            response_baggage: vars.bool("ENABLE_RESPONSE_BAGGAGE", true)?,
            policy_info_logging: vars.bool("AUTHZ_POLICY_INFO_LOGGING", false)?,
            log_format: vars.one_of(
                "LOG_FORMAT",
                &[("text", LogFormat::Text), ("plain", LogFormat::Text), ("json", LogFormat::Json)],
            )?,
            log_filter: vars.get("RUST_LOG").unwrap_or("info").to_owned(),
            cluster_id,
            mode,
        })
    }

    /// An address on every interface, in the widest family that this node has.
    pub fn any_address(&self, port: u16) -> SocketAddr {
        let any = if self.ipv6 { IpAddr::from(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
        SocketAddr::new(any, port)
    }
}

fn refuse_unsupported(vars: &Vars) -> Result<(), ConfigError> {
    for (key, reason) in NOT_SUPPORTED {
        // What asks for nothing asks for nothing special: `TLS12_ENABLED=false`, `ENABLE_PROXY=true`.
        let harmless = if key == "ENABLE_PROXY" { "true" } else { "false" };
        if let Some(value) = vars.get(key)
            && value != harmless
        {
            return Err(ConfigError::NotSupported { key, value: value.to_owned(), reason });
        }
    }
    Ok(())
}

fn proxy_mode(vars: &Vars) -> Result<ProxyMode, ConfigError> {
    let dedicated = vars.one_of("PROXY_MODE", &[("shared", false), ("dedicated", true)])?;
    if !dedicated {
        return Ok(ProxyMode::Shared);
    }
    let key = "PROXY_WORKLOAD_INFO";
    let expected = "namespace/name/service-account, since PROXY_MODE is dedicated";
    let info = vars.get(key).ok_or(ConfigError::Missing { key, expected })?;
    match info.split('/').collect::<Vec<_>>()[..] {
        [namespace, name, service_account] if ![namespace, name, service_account].contains(&"") => {
            Ok(ProxyMode::Dedicated {
                namespace: namespace.into(),
                name: name.into(),
                service_account: service_account.into(),
            })
        }
        _ => Err(ConfigError::invalid(key, info, expected)),
    }
}

fn local_state(vars: &Vars) -> Result<Option<LocalState>, ConfigError> {
    match (vars.get("LOCAL_XDS_PATH"), vars.get("LOCAL_XDS")) {
        (Some(path), Some(_)) => {
            Err(ConfigError::invalid("LOCAL_XDS_PATH", path, "only one of LOCAL_XDS_PATH and LOCAL_XDS"))
        }
        (Some(path), None) => Ok(Some(LocalState::Path(path.into()))),
        (None, Some(document)) => Ok(Some(LocalState::Inline(document.to_owned()))),
        (None, None) => Ok(None),
    }
}

/// `CA_ADDRESS` decides, except that `FAKE_CA=true` always means the development CA. Inside Kubernetes nobody gets
/// the development CA without asking for it: there the default is Istio's own, as for its tunnel.
fn ca(vars: &Vars, mode: &ProxyMode, cluster_id: &Arc<str>) -> Result<Ca, ConfigError> {
    let fake = vars.bool("FAKE_CA", false)?;
    let asked_for_development = fake || vars.get("DEVELOPMENT_CA_DIR").is_some();
    let address = match vars.get("CA_ADDRESS") {
        Some(address) if !fake => address,
        None if !asked_for_development && vars.get("KUBERNETES_SERVICE_HOST").is_some() => {
            "https://istiod.istio-system.svc:15012"
        }
        _ => return Ok(Ca::Development { folder: vars.path("DEVELOPMENT_CA_DIR", DEVELOPMENT_CA_FOLDER) }),
    };
    let address = match address.split_once("://") {
        None => format!("https://{address}"),
        Some(("https", _)) => address.to_owned(),
        Some(_) => return Err(ConfigError::invalid("CA_ADDRESS", address, "an https address")),
    };
    let root = match vars.get("CA_ROOT_CA").unwrap_or("./var/run/secrets/istio/root-cert.pem") {
        "SYSTEM" => RootSource::System,
        pem if pem.contains("-----BEGIN") => RootSource::Pem(pem.to_owned()),
        path => RootSource::File(path.into()),
    };
    // The alphabet of a JWT (RFC 7515, base64url) has no slash.
    let token = match vars.get("AUTH_TOKEN").unwrap_or("./var/run/secrets/tokens/istio-token") {
        path if path.contains('/') => Token::File(path.into()),
        literal => Token::Literal(literal.to_owned()),
    };
    Ok(Ca::Service(CaService {
        address,
        root,
        token,
        cluster_id: Arc::clone(cluster_id),
        alt_name: vars.get("ALT_CA_HOSTNAME").map(str::to_owned),
        headers: Headers(vars.with_prefix("CA_HEADER_")),
        impersonate: *mode == ProxyMode::Shared,
    }))
}

fn secret_ttl(vars: &Vars) -> Result<Duration, ConfigError> {
    let key = "SECRET_TTL";
    let ttl = vars.duration(key, Duration::from_hours(24))?;
    // Shorter ones would be renewed faster than peers' clocks agree.
    if ttl < Duration::from_secs(10) {
        return Err(ConfigError::invalid(key, vars.get(key).unwrap_or_default(), "at least 10s"));
    }
    Ok(ttl)
}

/// A number, `N%` of the cores, or 0 for all of them. The default is all cores that the cgroup allows us,
/// up to [`MAX_DEFAULT_WORKERS`].
fn workers(vars: &Vars) -> Result<NonZeroUsize, ConfigError> {
    let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let key = "ZTUNNEL_WORKER_THREADS";
    let Some(text) = vars.get(key) else {
        return Ok(cores.min(const { NonZeroUsize::new(MAX_DEFAULT_WORKERS).unwrap() }));
    };
    let invalid = || ConfigError::invalid(key, text, "a number up to 1024, a percentage such as 50%, or 0");
    let count = match text.strip_suffix('%') {
        Some(percent) => {
            let percent: usize = percent.parse().map_err(|_| invalid())?;
            if !(1..=100).contains(&percent) {
                return Err(invalid());
            }
            (cores.get() * percent).div_ceil(100)
        }
        None => text.parse().map_err(|_| invalid())?,
    };
    if count > 1024 {
        return Err(invalid());
    }
    Ok(NonZeroUsize::new(count).unwrap_or(cores))
}

fn h2(vars: &Vars) -> Result<H2, ConfigError> {
    // RFC 9113 §6.5.2: a window is at most 2^31-1, a frame 2^14..2^24-1.
    const MAX_WINDOW: u32 = (1 << 31) - 1;
    let key = "HTTP2_FRAME_SIZE";
    let frame = vars.positive(key, 1 << 20, (1 << 24) - 1)?;
    if frame < 1 << 14 {
        return Err(ConfigError::invalid(key, vars.get(key).unwrap_or_default(), "16384 to 16777215"));
    }
    Ok(H2 {
        stream_window: vars.positive("HTTP2_STREAM_WINDOW_SIZE", 4 << 20, MAX_WINDOW)?,
        connection_window: vars.positive("HTTP2_CONNECTION_WINDOW_SIZE", 16 << 20, MAX_WINDOW)?,
        frame,
    })
}

fn keepalive(vars: &Vars) -> Result<Option<Keepalive>, ConfigError> {
    let keepalive = Keepalive {
        time: vars.duration("KEEPALIVE_TIME", Duration::from_mins(3))?,
        interval: vars.duration("KEEPALIVE_INTERVAL", Duration::from_mins(3))?,
        retries: vars.positive("KEEPALIVE_RETRIES", 9, 127)?,
    };
    Ok(vars.bool("KEEPALIVE_ENABLED", true)?.then_some(keepalive))
}

/// Before the kubelet kills us, with some time left to end in order.
fn drain_deadline(vars: &Vars) -> Result<Duration, ConfigError> {
    let default = match vars.duration_or_seconds("TERMINATION_GRACE_PERIOD_SECONDS")? {
        Some(grace) if grace <= Duration::from_secs(10) => grace.saturating_sub(Duration::from_secs(1)),
        Some(grace) => grace.saturating_sub(Duration::from_secs(5)),
        None => Duration::from_secs(5),
    };
    vars.duration("CONNECTION_TERMINATION_DEADLINE", default)
}

fn admin_address(vars: &Vars) -> Result<SocketAddr, ConfigError> {
    let key = "ADMIN_ADDR";
    let address = vars.address(key, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 15000))?;
    if !address.ip().is_loopback() {
        // It can stop the process and shows the whole mesh.
        return Err(ConfigError::invalid(key, vars.get(key).unwrap_or_default(), "a loopback address"));
    }
    Ok(address)
}

fn ipv6_available() -> bool {
    std::path::Path::new("/proc/net/if_inet6").exists()
}

#[cfg(test)]
mod tests;
