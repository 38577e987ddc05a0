//! Reads the environment into [`Config`].

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroUsize,
    sync::Arc,
    time::Duration,
};

use super::{
    Ca, CaService, Config, ConfigError, H2, Headers, Keepalive, LocalState, LogFormat, Pool, Ports,
    ProxyMode, RootSource, Token, value::Vars,
};

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
