//! Every key of the configuration, in one table: the name in the file, the environment variable that overrides it
//! (Istio's, so that our tunnel can take the place of Istio's), what it may be, its default and what it is for.
//!
//! To add a key, add a row here and read it in [`super::resolve`]. Checks, suggestions for misspelt keys,
//! `ztunnel config print` and the table in `docs/configuration.md` follow from the row.

use std::time::Duration;

/// One key.
#[derive(Debug)]
pub struct ConfigKey {
    /// In the file, dotted: `pool.idle` is `idle` of section `pool`.
    pub name: &'static str,
    /// Overrides the file. For a map, the prefix of all variables that make it up.
    pub variable: &'static str,
    pub kind: ValueKind,
    /// As it would be written, or in words where it depends on something else.
    pub default: DefaultValue,
    pub about: &'static str,
}

/// What a key is when nobody sets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefaultValue {
    Is(&'static str),
    /// Decided by what reads it; said in words.
    Depends(&'static str),
    /// Nothing.
    Nothing,
}

/// What a value may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueKind {
    Text,
    Path,
    /// Never shown.
    Secret,
    /// `true` or `false`.
    Bool,
    Choice(&'static [&'static str]),
    /// Decimal, or hexadecimal after `0x`.
    Number {
        min: u32,
        max: u32,
    },
    /// With a unit, as Go writes them.
    Duration {
        min: Duration,
    },
    /// The same; a bare number counts seconds.
    DurationOrSeconds,
    /// `IP:port` or `localhost:port`.
    Address,
    /// A count of threads: a number, a share of the cores in percent, or 0 for all.
    Workers,
    /// Names and values; the values are never shown.
    Map,
}

use DefaultValue::{Depends, Is, Nothing};
use ValueKind::{
    Address, Bool, Choice, Duration as Lasts, DurationOrSeconds, Map, Number, Path, Secret, Text, Workers,
};

/// RFC 9113 §6.5.2: a window is at most 2^31-1.
const WINDOW: ValueKind = Number { min: 1, max: (1 << 31) - 1 };
const ANY: ValueKind = Number { min: 0, max: u32::MAX };
const TIME: ValueKind = Lasts { min: Duration::ZERO };

const fn key(
    name: &'static str,
    variable: &'static str,
    kind: ValueKind,
    default: DefaultValue,
    about: &'static str,
) -> ConfigKey {
    ConfigKey { name, variable, kind, default, about }
}

/// In the order in which the documentation lists them.
#[rustfmt::skip]
pub const KEYS: &[ConfigKey] = &[
    key("mode", "PROXY_MODE", Choice(&["shared", "dedicated"]), Is("shared"), "whom one process serves: every pod that the node agent hands over, or one workload in its own netns"),
    key("workload", "PROXY_WORKLOAD_INFO", Text, Nothing, "whom a dedicated tunnel serves: `namespace/name/service-account`"),
    key("workers", "ZTUNNEL_WORKER_THREADS", Workers, Depends("all cores that the cgroup allows, at most 16"), "threads that carry traffic"),

    key("node.name", "NODE_NAME", Text, Is(""), "this node"),
    key("node.instance_ip", "INSTANCE_IP", Text, Nothing, "the tunnel's own address, for the control plane to know it by"),
    key("node.network", "NETWORK", Text, Is(""), "its network; others are reached through gateways"),
    key("node.cluster", "CLUSTER_ID", Text, Is("Kubernetes"), "its cluster"),
    key("node.cluster_domain", "CLUSTER_DOMAIN", Text, Is("cluster.local"), "the suffix of the cluster's service names"),
    key("node.trust_domain", "TRUST_DOMAIN", Text, Is("cluster.local"), "whose identities are ours"),

    key("own.pod", "POD_NAME", Text, Nothing, "the tunnel's own pod. With namespace and service account its metrics are also served over HBONE, port 15008 of its own netns, under policy"),
    key("own.namespace", "POD_NAMESPACE", Text, Nothing, "that pod's namespace"),
    key("own.service_account", "SERVICE_ACCOUNT", Text, Nothing, "that pod's service account"),

    key("zds.socket", "INPOD_UDS", Path, Is("/var/run/ztunnel/ztunnel.sock"), "where the node agent (our watcher, or istio-cni) hands pods over"),
    key("zds.port_reuse", "INPOD_PORT_REUSE", Bool, Is("true"), "two tunnels may listen in a pod side by side, so that an upgrade loses nothing"),

    key("mesh.file", "LOCAL_XDS_PATH", Path, Nothing, "workloads, services and policies from a file (watched)"),
    key("mesh.inline", "LOCAL_XDS", Text, Nothing, "the same, as text in place of a file"),

    key("xds.address", "XDS_ADDRESS", Text, Depends("`https://istiod.istio-system.svc:15012` inside Kubernetes unless `mesh.file` or `mesh.inline` is set or the variable is set and empty, else none"), "the control plane that tells of workloads, services and policies; https"),
    key("xds.root", "XDS_ROOT_CA", Text, Is("./var/run/secrets/istio/root-cert.pem"), "whom to trust as that: a file, PEM text, or `SYSTEM`"),
    key("xds.alt_name", "ALT_XDS_HOSTNAME", Text, Nothing, "a name that its certificate may bear instead of the address' own"),
    key("xds.headers", "XDS_HEADER_", Map, Nothing, "extra gRPC metadata"),
    key("xds.on_demand", "XDS_ON_DEMAND", Bool, Is("false"), "ask for workloads and services when a connection needs them, instead of for all at once; not beside `dns.enabled`"),
    key("xds.metadata", "ISTIO_META_", Map, Nothing, "what else it is told of this node, as text"),
    key("xds.metadata_json", "ISTIO_METAJSON_", Map, Nothing, "the same, as JSON"),

    key("ca.address", "CA_ADDRESS", Text, Depends("`https://istiod.istio-system.svc:15012` inside Kubernetes, else none"), "the certificate service; https"),
    key("ca.root", "CA_ROOT_CA", Text, Is("./var/run/secrets/istio/root-cert.pem"), "whom to trust as that: a file, PEM text, or `SYSTEM`"),
    key("ca.token", "AUTH_TOKEN", Secret, Is("./var/run/secrets/tokens/istio-token"), "how we prove ourselves: a file (anything with a slash) or the token itself"),
    key("ca.alt_name", "ALT_CA_HOSTNAME", Text, Nothing, "a name that its certificate may bear instead of the address' own"),
    key("ca.headers", "CA_HEADER_", Map, Nothing, "extra gRPC metadata"),
    key("ca.development", "FAKE_CA", Bool, Is("false"), "certificates from a CA inside the process. Not for production: every node holds the root's key"),
    key("ca.development_dir", "DEVELOPMENT_CA_DIR", Path, Is("/var/lib/adit/development-ca"), "that CA's folder; nodes that share it trust each other. Setting it asks for that CA"),
    key("ca.secret_ttl", "SECRET_TTL", Lasts { min: Duration::from_secs(10) }, Is("24h"), "life to ask certificates for; they are renewed at half of it"),

    key("tls.tls12", "TLS12_ENABLED", Bool, Is("false"), "TLS 1.2 beside 1.3"),
    key("tls.compliance", "COMPLIANCE_POLICY", Choice(&["none", "pqc"]), Is("none"), "`pqc`: no key exchange but X25519MLKEM768, so no peer without it"),
    key("tls.crl", "CRL_PATH", Path, Nothing, "revocation lists, PEM or DER (watched): what they list is refused, and cut where it is connected"),

    key("socket.mark", "PACKET_MARK", ANY, Depends("1337 in shared mode, else none"), "`SO_MARK` of the tunnel's sockets"),
    key("socket.ipv6", "IPV6_ENABLED", Bool, Is("true"), "listen on IPv6 too, where the kernel has it"),
    key("socket.original_source", "ENABLE_ORIG_SRC", Bool, Depends("if the capability is there"), "applications see the client's address"),
    key("socket.keepalive.enabled", "KEEPALIVE_ENABLED", Bool, Is("true"), "TCP keepalive on every socket"),
    key("socket.keepalive.time", "KEEPALIVE_TIME", TIME, Is("180s"), "silence before the first probe"),
    key("socket.keepalive.interval", "KEEPALIVE_INTERVAL", TIME, Is("180s"), "between probes"),
    key("socket.keepalive.retries", "KEEPALIVE_RETRIES", Number { min: 1, max: 127 }, Is("9"), "unanswered probes that end a connection"),
    key("socket.user_timeout", "USER_TIMEOUT_ENABLED", Bool, Is("false"), "`TCP_USER_TIMEOUT` of time + retries × interval of keepalive"),

    key("pool.max_streams", "POOL_MAX_STREAMS_PER_CONNECTION", Number { min: 1, max: u32::MAX }, Is("100"), "streams per pooled tunnel; above, another one is opened"),
    key("pool.idle", "POOL_UNUSED_RELEASE_TIMEOUT", TIME, Is("5m"), "an unused tunnel is closed after this"),
    key("h2.stream_window_bytes", "HTTP2_STREAM_WINDOW_SIZE", WINDOW, Is("4194304"), "flow control window of a stream, in bytes"),
    key("h2.connection_window_bytes", "HTTP2_CONNECTION_WINDOW_SIZE", WINDOW, Depends("200 times that of a stream, at most 2147483647: streams that nobody reads never hold up the others"), "of a tunnel, in bytes"),
    key("h2.frame_bytes", "HTTP2_FRAME_SIZE", Number { min: 1 << 14, max: (1 << 24) - 1 }, Is("1048576"), "largest DATA frame, in bytes"),
    key("stream.half_closed_limit", "HALF_CLOSED_LIMIT", Lasts { min: Duration::from_secs(1) }, Is("1h"), "a connection with one direction ended that lies still for so long is cut; the default is what kube-proxy gives it in conntrack"),
    key("stream.idle_limit", "IDLE_LIMIT", Lasts { min: Duration::from_secs(1) }, Nothing, "a connection that lies still for so long is cut; without it, it may for ever"),
    key("hbone.response_baggage", "ENABLE_RESPONSE_BAGGAGE", Bool, Is("true"), "CONNECT replies tell about the server's workload, and what peers tell is believed for labels"),
    key("hbone.application_tunnel_loopback", "LOCALHOST_APP_TUNNEL", Bool, Is("true"), "an application that takes PROXY headers is dialled on loopback, else on the pod's address"),

    key("dns.enabled", "ISTIO_META_DNS_CAPTURE", Bool, Is("true"), "answer the pods' DNS queries for services of the mesh"),
    key("dns.address", "DNS_PROXY_ADDR", Address, Is("localhost:15053"), "where, in each pod's netns; a loopback address of IPv4 brings that of IPv6 with it"),
    key("dns.preferred_namespace", "PREFERED_SERVICE_NAMESPACE", Text, Nothing, "of services with one name, this namespace's are preferred after the client's own"),
    key("dns.upstream", "DNS_UPSTREAM", Text, Depends("the resolvers of `/etc/resolv.conf`"), "who is asked for all other names: `IP:port` or `IP`, several separated by commas"),

    key("drain.grace_period", "TERMINATION_GRACE_PERIOD_SECONDS", DurationOrSeconds, Nothing, "the pod's `terminationGracePeriodSeconds`: past it the kubelet kills us"),
    key("drain.deadline", "CONNECTION_TERMINATION_DEADLINE", TIME, Depends("5 s before the grace period ends (1 s, if that is 10 s or less), else `5s`"), "how long open connections may finish at the end"),

    key("admin.address", "ADMIN_ADDR", Address, Is("127.0.0.1:15000"), "admin endpoints; must be loopback"),
    key("stats.address", "STATS_ADDR", Address, Depends("port 15020 on every address"), "metrics"),
    key("readiness.address", "READINESS_ADDR", Address, Depends("port 15021 on every address"), "readiness"),
    key("log.format", "LOG_FORMAT", Choice(&["text", "plain", "json"]), Is("text"), "`plain` means `text`"),
    key("log.filter", "RUST_LOG", Text, Is("info"), "which records are written, such as `info,access=off`; can be changed while running"),
];

/// The row of `name`, which must be there.
///
/// # Panics
/// If no row has that name: a mistake in this program.
pub fn row(name: &str) -> &'static ConfigKey {
    let found = KEYS.iter().find(|key| key.name == name);
    found.unwrap_or_else(|| panic!("{name} has no row in config/keys.rs"))
}

impl ValueKind {
    /// What a reader is told that a value must be.
    pub fn expectation(self) -> String {
        match self {
            Text | Secret => "text".to_owned(),
            Path => "a path".to_owned(),
            Bool => "true or false".to_owned(),
            Choice(names) => names.join(" or "),
            Number { min: 0, max: u32::MAX } => "a number of 32 bits".to_owned(),
            Number { min, max: u32::MAX } => format!("a number from {min}"),
            Number { min, max } => format!("a number from {min} to {max}"),
            Lasts { min: Duration::ZERO } => "a duration such as 500ms, 30s, 5m or 1h30m".to_owned(),
            Lasts { min } => format!("a duration of at least {}s, such as 30s, 5m or 1h30m", min.as_secs()),
            DurationOrSeconds => "a number of seconds, or a duration such as 30s".to_owned(),
            Address => "an address and port such as 127.0.0.1:15000".to_owned(),
            Workers => "a number up to 1024, a percentage such as 50%, or 0 for all cores".to_owned(),
            Map => "names and values".to_owned(),
        }
    }
}
