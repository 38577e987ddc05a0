//! [`RawSettings`] → [`Config`]: combines the settings, and refuses those that contradict each
//! other.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroUsize,
    path::Path,
    sync::Arc,
    time::Duration,
};

use ztunnel_api::names::is_trust_domain;

use super::{
    BudgetConfig, CaConfig, Config, ConfigError, ControlPlaneAddress, ControlPlaneConfig, DnsConfig,
    H2Config, Headers, KeepaliveConfig, LocalState, LogFormat, MemoryConfig, OwnPod, PoolConfig, PortsConfig,
    ProxyMode, ProxyTo, RootSource, SameNode, StreamConfig, TlsConfig, Token, TrustFiles, XdsConfig,
    available_memory::available_memory, settings::RawSettings, value,
};

/// Default limit: each worker adds listening sockets to every pod.
const MAX_DEFAULT_WORKERS: usize = 16;

/// Variables of Istio's tunnel that must not be ignored, and why they are refused.
const NOT_SUPPORTED: [(&str, &str); 1] =
    [("ENABLE_PROXY", "the tunnel without its HBONE proxy is not supported")];

impl Config {
    /// Reads `file`, if given, and the environment of this process, which overrides it.
    ///
    /// # Errors
    /// Everything that is wrong, each with the expected value: [`ConfigError`].
    #[expect(clippy::disallowed_methods, reason = "the one place where the tunnel reads it")]
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        Self::from_file_and_vars(file, std::env::vars())
    }

    /// Reads variables only.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_vars(vars: impl IntoIterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        Self::from_file_and_vars(None, vars)
    }

    /// Reads a file and variables. An empty value counts as not set.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_file_and_vars(
        file: Option<&Path>,
        vars: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let (empty, vars): (Vec<_>, Vec<_>) = vars.into_iter().partition(|(_, value)| value.is_empty());
        refuse_unsupported(&vars)?;
        let in_kubernetes = vars.iter().any(|(key, _)| key == "KUBERNETES_SERVICE_HOST");
        // The one variable whose empty value has a meaning: no control plane, even inside
        // Kubernetes.
        let without_xds = empty.iter().any(|(key, _)| key == "XDS_ADDRESS");
        let settings = RawSettings::read(file, vars)?;
        resolve(&settings, in_kubernetes, without_xds)
    }

    /// `[::]:port`, or `0.0.0.0:port` on a node without IPv6.
    #[must_use]
    pub fn any_address(&self, port: u16) -> SocketAddr {
        let any = if self.ipv6 { IpAddr::from(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
        SocketAddr::new(any, port)
    }
}

fn resolve(settings: &RawSettings, in_kubernetes: bool, without_xds: bool) -> Result<Config, ConfigError> {
    let mode = proxy_mode(settings)?;
    let cluster_id = settings.text("node.cluster");
    let ipv6 = settings.bool("socket.ipv6")? && ipv6_available();
    let any = if ipv6 { IpAddr::from(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
    let keepalive = keepalive(settings)?;
    let stream_window: u32 = settings.number("h2.stream_window_bytes")?;
    // With room for the windows of all streams, streams whose data is not read never block the
    // others.
    let all_windows = stream_window.saturating_mul(H2Config::STREAMS).min(H2Config::LARGEST_WINDOW);
    Ok(Config {
        zds_socket: settings.path("zds.socket"),
        ports: PortsConfig::default(),
        packet_mark: match settings.optional_number("socket.mark")? {
            None if mode == ProxyMode::Shared => Some(1337),
            mark => mark,
        },
        port_reuse: settings.bool("zds.port_reuse")?,
        ipv6,
        original_source: settings.optional_bool("socket.original_source")?,
        same_node: if settings.bool("hbone.same_node_direct")? { SameNode::Direct } else { SameNode::Hbone },
        network: settings.text("node.network"),
        node: settings.text("node.name"),
        cluster_domain: settings.text("node.cluster_domain"),
        trust_domain: settings.text("node.trust_domain"),
        trust_domain_aliases: trust_domain_aliases(settings)?,
        trust_files: TrustFiles {
            mesh_config: Some(settings.path("node.mesh_config")),
            accepted: settings.get("node.accepted_trust_domains").map(Into::into),
        },
        own_pod: own_pod(settings),
        xds: xds(settings, &cluster_id, in_kubernetes && !without_xds)?,
        local_state: local_state(settings)?,
        ca: ca(settings, &mode, &cluster_id, in_kubernetes)?,
        tls: tls(settings)?,
        crl: settings.get("tls.crl").map(Into::into),
        secret_ttl: settings.duration("ca.secret_ttl")?,
        workers: workers(settings),
        pool: PoolConfig {
            max_streams: settings.number("pool.max_streams")?,
            idle: settings.duration("pool.idle")?,
            answer_limit: settings.duration("hbone.answer_limit")?,
        },
        budget: BudgetConfig {
            pod_descriptors: settings.optional_number("budget.pod_descriptors")?,
            reserved_descriptors: settings.optional_number("budget.reserved_descriptors")?,
            pod_handshakes: settings.number("budget.pod_handshakes")?,
            pod_dials: settings.number("budget.pod_dials")?,
            metric_label_sets: settings.number("budget.metric_label_sets")?,
        },
        dns: dns(settings)?,
        h2: H2Config {
            stream_window,
            connection_window: settings.optional_number("h2.connection_window_bytes")?.unwrap_or(all_windows),
            frame: settings.number("h2.frame_bytes")?,
        },
        memory: MemoryConfig {
            pod_bytes: settings.number("memory.pod_bytes")? as usize,
            total_bytes: settings
                .optional_number("memory.total_bytes")?
                .map_or_else(stream_memory, |bytes| bytes as usize),
        },
        limits: StreamConfig {
            half_closed: settings.duration("stream.half_closed_limit")?,
            idle: settings.optional_duration("stream.idle_limit")?,
        },
        user_timeout: match (&keepalive, settings.bool("socket.user_timeout")?) {
            (Some(k), true) => Some(k.time + k.interval * k.retries),
            _ => None,
        },
        keepalive,
        drain_deadline: drain_deadline(settings)?,
        admin_address: admin_address(settings)?,
        stats_address: settings.address("stats.address")?.unwrap_or_else(|| SocketAddr::new(any, 15020)),
        readiness_address: settings
            .address("readiness.address")?
            .unwrap_or_else(|| SocketAddr::new(any, 15021)),
        response_baggage: settings.bool("hbone.response_baggage")?,
        proxy_to: if settings.bool("hbone.application_tunnel_loopback")? {
            ProxyTo::Loopback
        } else {
            ProxyTo::PodAddress
        },
        log_format: match settings.choice("log.format")? {
            "json" => LogFormat::Json,
            _ => LogFormat::Text,
        },
        log_filter: settings.text("log.filter").to_string(),
        cluster_id,
        mode,
        effective: settings.effective().into(),
    })
}

fn refuse_unsupported(vars: &[(String, String)]) -> Result<(), ConfigError> {
    for (key, reason) in NOT_SUPPORTED {
        // The value that changes nothing is accepted: `ENABLE_PROXY=true`.
        let harmless = if key == "ENABLE_PROXY" { "true" } else { "false" };
        if let Some((_, value)) = vars.iter().find(|(name, _)| name == key)
            && value != harmless
        {
            return Err(ConfigError::NotSupported { key, value: value.clone(), reason });
        }
    }
    Ok(())
}

fn proxy_mode(settings: &RawSettings) -> Result<ProxyMode, ConfigError> {
    if settings.choice("mode")? == "shared" {
        return Ok(ProxyMode::Shared);
    }
    let key = "workload";
    let expected = "namespace/name/service-account, since the mode is dedicated";
    let missing = || ConfigError::Missing { key: settings.written_as(key), expected };
    let info = settings.get(key).ok_or_else(missing)?;
    match info.split('/').collect::<Vec<_>>()[..] {
        [namespace, name, service_account] if ![namespace, name, service_account].contains(&"") => {
            Ok(ProxyMode::Dedicated {
                namespace: namespace.into(),
                name: name.into(),
                service_account: service_account.into(),
            })
        }
        _ => Err(settings.invalid(key, expected)),
    }
}

fn trust_domain_aliases(settings: &RawSettings) -> Result<Arc<[Arc<str>]>, ConfigError> {
    let key = "node.trust_domain_aliases";
    let alias = |text: &str| {
        let expected = "trust domains such as old.example.org, separated by commas";
        if is_trust_domain(text) { Ok(Arc::from(text)) } else { Err(settings.invalid(key, expected)) }
    };
    settings.get(key).into_iter().flat_map(|text| text.split(',')).map(str::trim).map(alias).collect()
}

/// `None` unless all three are set: Istio's DaemonSet sets all of them, others may set `POD_NAME`
/// for other purposes.
fn own_pod(settings: &RawSettings) -> Option<OwnPod> {
    Some(OwnPod {
        name: settings.get("own.pod")?.into(),
        namespace: settings.get("own.namespace")?.into(),
        service_account: settings.get("own.service_account")?.into(),
    })
}

fn local_state(settings: &RawSettings) -> Result<Option<LocalState>, ConfigError> {
    match (settings.get("mesh.file"), settings.get("mesh.inline")) {
        (Some(_), Some(_)) => Err(settings
            .invalid("mesh.file", "only one of mesh.file (LOCAL_XDS_PATH) and mesh.inline (LOCAL_XDS)")),
        (Some(path), None) => Ok(Some(LocalState::Path(path.into()))),
        (None, Some(document)) => Ok(Some(LocalState::Inline(document.to_owned()))),
        (None, None) => Ok(None),
    }
}

/// With an address, the certificate service; `ca.development` overrides it. Without one, Istio's
/// service inside Kubernetes, so that a cluster never uses the development CA by accident, and the
/// development CA elsewhere.
fn ca(
    settings: &RawSettings,
    mode: &ProxyMode,
    cluster_id: &Arc<str>,
    in_kubernetes: bool,
) -> Result<CaConfig, ConfigError> {
    let development = settings.bool("ca.development")?;
    let asked_for_development = development || settings.get("ca.development_dir").is_some();
    let address = match settings.get("ca.address") {
        Some(address) if !development => address,
        None if !asked_for_development && in_kubernetes => "https://istiod.istio-system.svc:15012",
        _ => return Ok(CaConfig::Development { folder: settings.path("ca.development_dir") }),
    };
    let service = control_plane(settings, "ca", address, cluster_id)?;
    Ok(CaConfig::Service { service, impersonate: *mode == ProxyMode::Shared })
}

/// From the keys of `section`: `ca` or `xds`.
fn control_plane(
    settings: &RawSettings,
    section: &'static str,
    address: &str,
    cluster_id: &Arc<str>,
) -> Result<ControlPlaneConfig, ConfigError> {
    let [address_key, root, alt_name, headers] = match section {
        "ca" => ["ca.address", "ca.root", "ca.alt_name", "ca.headers"],
        _ => ["xds.address", "xds.root", "xds.alt_name", "xds.headers"],
    };
    let address = match (address.strip_prefix("unix:"), address.split_once("://")) {
        (Some(path), _) => {
            let path = path.strip_prefix("//").unwrap_or(path);
            if !path.starts_with('/') {
                return Err(settings.invalid(address_key, "unix: and an absolute path"));
            }
            ControlPlaneAddress::Socket(path.into())
        }
        (None, None) => ControlPlaneAddress::Https(format!("https://{address}")),
        (None, Some(("https", _))) => ControlPlaneAddress::Https(address.to_owned()),
        (None, Some(_)) => return Err(settings.invalid(address_key, "an https address, or unix:/path")),
    };
    let root = match &*settings.text(root) {
        "SYSTEM" => RootSource::System,
        pem if pem.contains("-----BEGIN") => RootSource::Pem(pem.to_owned()),
        path => RootSource::File(path.into()),
    };
    // The alphabet of a JWT (RFC 7515, base64url) has no slash.
    let token = match &*settings.text("ca.token") {
        path if path.contains('/') => Token::File(path.into()),
        literal => Token::Literal(literal.to_owned()),
    };
    Ok(ControlPlaneConfig {
        address,
        root,
        token,
        cluster_id: Arc::clone(cluster_id),
        alt_name: settings.get(alt_name).map(str::to_owned),
        headers: Headers(settings.map(headers)),
    })
}

/// The mesh has one source. Inside Kubernetes it is Istio's control plane, unless a file is given.
fn xds(
    settings: &RawSettings,
    cluster_id: &Arc<str>,
    by_default: bool,
) -> Result<Option<XdsConfig>, ConfigError> {
    let local = settings.get("mesh.file").or_else(|| settings.get("mesh.inline"));
    let address = match (settings.get("xds.address"), local) {
        (Some(_), Some(_)) => {
            let expected = "no control plane besides mesh.file (LOCAL_XDS_PATH) or mesh.inline (LOCAL_XDS)";
            return Err(settings.invalid("xds.address", expected));
        }
        (Some(address), None) => address,
        (None, None) if by_default => "https://istiod.istio-system.svc:15012",
        (None, _) => return Ok(None),
    };
    let service = control_plane(settings, "xds", address, cluster_id)?;
    let of = |key| settings.get(key).unwrap_or_default();
    let (pod, namespace) = (of("own.pod"), of("own.namespace"));
    let ip = settings.get("node.instance_ip").unwrap_or("1.1.1.1");
    let node_id = format!("ztunnel~{ip}~{pod}.{namespace}~{namespace}.svc.cluster.local");
    let text = |text: &str| serde_json::Value::String(text.to_owned());
    let mut metadata = BTreeMap::from([
        ("NAME".to_owned(), text(pod)),
        ("NAMESPACE".to_owned(), text(namespace)),
        ("INSTANCE_IPS".to_owned(), text(ip)),
        ("NODE_NAME".to_owned(), text(of("node.name"))),
        ("CLUSTER_ID".to_owned(), text(cluster_id)),
    ]);
    for (key, value) in settings.map("xds.metadata") {
        metadata.insert(key, serde_json::Value::String(value));
    }
    for (key, value) in settings.map("xds.metadata_json") {
        let value = serde_json::from_str(&value)
            .map_err(|_| settings.invalid("xds.metadata_json", "values in JSON"))?;
        metadata.insert(key, value);
    }
    let on_demand = settings.bool("xds.on_demand")?;
    if on_demand && settings.bool("dns.enabled")? {
        // The DNS proxy looks names up among all services, so it needs all of them.
        let expected = "false, unless dns.enabled (ISTIO_META_DNS_CAPTURE) is false";
        return Err(settings.invalid("xds.on_demand", expected));
    }
    let state_dir = settings.get("xds.state_dir").map(Into::into);
    let forget_state = settings.bool("xds.forget_state")?;
    Ok(Some(XdsConfig { service, node_id, metadata, on_demand, state_dir, forget_state }))
}

fn tls(settings: &RawSettings) -> Result<TlsConfig, ConfigError> {
    let only_post_quantum = settings.choice("tls.compliance")? == "pqc";
    let tls12 = settings.bool("tls.tls12")?;
    if tls12 && only_post_quantum {
        // TLS 1.2 has no such key exchange.
        return Err(settings.invalid("tls.tls12", "false, since tls.compliance (COMPLIANCE_POLICY) is pqc"));
    }
    Ok(TlsConfig { tls12, only_post_quantum })
}

fn workers(settings: &RawSettings) -> NonZeroUsize {
    let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let configured = settings.get("workers").and_then(|text| value::workers(text, cores.get()));
    let default = cores.min(const { NonZeroUsize::new(MAX_DEFAULT_WORKERS).unwrap() });
    configured.and_then(NonZeroUsize::new).unwrap_or(default)
}

fn keepalive(settings: &RawSettings) -> Result<Option<KeepaliveConfig>, ConfigError> {
    let keepalive = KeepaliveConfig {
        time: settings.duration("socket.keepalive.time")?,
        interval: settings.duration("socket.keepalive.interval")?,
        retries: settings.number("socket.keepalive.retries")?,
    };
    Ok(settings.bool("socket.keepalive.enabled")?.then_some(keepalive))
}

/// Leaves some time to shut down before the kubelet kills the process.
fn drain_deadline(settings: &RawSettings) -> Result<Duration, ConfigError> {
    let default = match settings.optional_duration("drain.grace_period")? {
        Some(grace) if grace <= Duration::from_secs(10) => grace.saturating_sub(Duration::from_secs(1)),
        Some(grace) => grace.saturating_sub(Duration::from_secs(5)),
        None => Duration::from_secs(5),
    };
    Ok(settings.optional_duration("drain.deadline")?.unwrap_or(default))
}

fn admin_address(settings: &RawSettings) -> Result<SocketAddr, ConfigError> {
    let key = "admin.address";
    let address =
        settings.address(key)?.unwrap_or_else(|| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 15000));
    if !address.ip().is_loopback() {
        // The admin server can stop the process and shows the whole mesh.
        return Err(settings.invalid(key, "a loopback address"));
    }
    Ok(address)
}

fn dns(settings: &RawSettings) -> Result<DnsConfig, ConfigError> {
    let key = "dns.upstream";
    let resolver = |text: &str| {
        let with_port = text.parse().map(|ip: IpAddr| SocketAddr::new(ip, 53)).or_else(|_| text.parse());
        with_port.map_err(|_| settings.invalid(key, "addresses as IP or IP:port, separated by commas"))
    };
    let upstream = settings.get(key).map_or(Ok(Vec::new()), |text| {
        text.split(',').map(str::trim).map(resolver).collect::<Result<_, _>>()
    })?;
    Ok(DnsConfig {
        enabled: settings.bool("dns.enabled")?,
        address: settings
            .address("dns.address")?
            .unwrap_or_else(|| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 15053)),
        preferred_namespace: settings.get("dns.preferred_namespace").map(Into::into),
        upstream,
    })
}

/// What all streams may hold, unless it is configured.
fn stream_memory() -> usize {
    (available_memory() / 4).min(1 << 30)
}

fn ipv6_available() -> bool {
    Path::new("/proc/net/if_inet6").exists()
}
