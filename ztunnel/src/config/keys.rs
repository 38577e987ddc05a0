//! Every configuration key in one table: its name in the file, the environment variable that
//! overrides it (the one of Istio's tunnel, where that has it), its type, its default and its
//! meaning.
//!
//! To add a key, add a row here and read it in [`super::resolve`]. Checks, suggestions for misspelt
//! keys, `ztunnel config print` and the table in `docs/configuration.md` follow from the row.

use std::time::Duration;

/// One key.
#[derive(Debug)]
pub(crate) struct ConfigKey {
    /// Name in the file, dotted: `pool.idle` is `idle` of section `pool`.
    pub name: &'static str,
    /// Environment variable that overrides the file. For a map, the prefix of the variables of its
    /// entries.
    pub variable: &'static str,
    /// Another variable for it, which counts where the first one is not set.
    pub else_variable: Option<&'static str>,
    /// What a value may be.
    pub kind: ValueKind,
    /// The value when the key is not set.
    pub default: DefaultValue,
    /// One line for the documentation.
    pub about: &'static str,
}

/// The value of a key that is not set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DefaultValue {
    /// This text, as it would be written.
    Is(&'static str),
    /// Computed from other settings; described in words.
    Depends(&'static str),
    /// No value.
    Nothing,
}

/// What a value may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ValueKind {
    /// Any text.
    Text,
    /// A path.
    Path,
    /// A text that is never shown.
    Secret,
    /// `true` or `false`.
    Bool,
    /// One of these words, in any case.
    Choice(&'static [&'static str]),
    /// Decimal, or hexadecimal after `0x`.
    Number {
        /// Smallest value.
        min: u32,
        /// Largest value.
        max: u32,
    },
    /// With a unit, as Go writes them.
    Duration {
        /// Shortest value.
        min: Duration,
    },
    /// The same; a bare number is in seconds.
    DurationOrSeconds,
    /// `IP:port` or `localhost:port`.
    Address,
    /// A number of threads: absolute, in percent of the cores, or 0 for all cores.
    Workers,
    /// Names and values. The values are never shown.
    Map,
}

use DefaultValue::{Depends, Is, Nothing};
use ValueKind::{
    Address, Bool, Choice, Duration as Lasts, DurationOrSeconds, Map, Number, Path, Secret, Text, Workers,
};

/// RFC 9113 §6.5.2: a window is at most 2^31-1.
const WINDOW: ValueKind = Number { min: 1, max: (1 << 31) - 1 };
const MEMORY: ValueKind = Number { min: 1 << 20, max: u32::MAX };
const ANY: ValueKind = Number { min: 0, max: u32::MAX };
const TIME: ValueKind = Lasts { min: Duration::ZERO };

const fn key(
    name: &'static str,
    variable: &'static str,
    kind: ValueKind,
    default: DefaultValue,
    about: &'static str,
) -> ConfigKey {
    ConfigKey { name, variable, else_variable: None, kind, default, about }
}

impl ConfigKey {
    const fn or(self, variable: &'static str) -> Self {
        Self { else_variable: Some(variable), ..self }
    }

    /// Its variables; the first one that is set counts.
    pub(super) fn variables(&self) -> impl Iterator<Item = &'static str> + use<> {
        std::iter::once(self.variable).chain(self.else_variable)
    }
}

/// In the order in which the documentation lists them.
#[rustfmt::skip]
pub(crate) const KEYS: &[ConfigKey] = &[
    key("mode", "PROXY_MODE", Choice(&["shared", "dedicated"]), Is("shared"), "what one process serves: all pods that the node agent hands over, or one workload in its own netns"),
    key("workload", "PROXY_WORKLOAD_INFO", Text, Nothing, "the workload of a dedicated tunnel: `namespace/name/service-account`"),
    key("workers", "ZTUNNEL_WORKER_THREADS", Workers, Depends("all cores that the cgroup allows, at most 16"), "threads that carry traffic"),

    key("node.name", "NODE_NAME", Text, Is(""), "name of this node"),
    key("node.instance_ip", "INSTANCE_IP", Text, Nothing, "address of the tunnel, sent to the control plane"),
    key("node.network", "NETWORK", Text, Is(""), "network of this node; workloads in other networks are reached through gateways"),
    key("node.cluster", "ISTIO_META_CLUSTER_ID", Text, Is("Kubernetes"), "cluster id of this node: only workloads of this cluster are its pods").or("CLUSTER_ID"),
    key("node.cluster_domain", "CLUSTER_DOMAIN", Text, Is("cluster.local"), "DNS suffix of the cluster, for service names"),
    key("node.trust_domain", "TRUST_DOMAIN", Text, Is("cluster.local"), "trust domain of workloads for which the control plane or the mesh file tells none"),
    key("node.trust_domain_aliases", "TRUST_DOMAIN_ALIASES", Text, Nothing, "trust domains that are this mesh besides a workload's own, separated by commas: their peers are accepted, and policies mean them too. While a mesh is renamed, list the old and the new one on all nodes"),
    key("node.mesh_config", "MESH_CONFIG_PATH", Path, Is("./etc/istio/config/mesh"), "Istio's mesh configuration (key `mesh` of its ConfigMap), if it is mounted: `trustDomainAliases` are more aliases. Reloaded when the file changes"),
    key("node.accepted_trust_domains", "TRUST_DOMAINS_PATH", Path, Nothing, "file with trust domains, one on each line, or `*` for all: their clients are accepted too, but are not this mesh for policies. Istio's control plane writes it (ConfigMap `istio-trust-domains`). Reloaded when the file changes: connections of clients that are no longer accepted end"),

    key("own.pod", "POD_NAME", Text, Nothing, "the tunnel's own pod. With namespace and service account, its metrics are also served over HBONE on port 15008 of its own netns, subject to policy"),
    key("own.namespace", "POD_NAMESPACE", Text, Nothing, "namespace of that pod"),
    key("own.service_account", "SERVICE_ACCOUNT", Text, Nothing, "service account of that pod"),

    key("zds.socket", "INPOD_UDS", Path, Is("/var/run/ztunnel/ztunnel.sock"), "socket on which the node agent (our watcher, or istio-cni) hands over pods"),
    key("zds.port_reuse", "INPOD_PORT_REUSE", Bool, Is("true"), "lets two tunnels listen in a pod at the same time, so that an upgrade loses no connection"),

    key("mesh.file", "LOCAL_XDS_PATH", Path, Nothing, "workloads, services and policies from a file, reloaded when it changes"),
    key("mesh.inline", "LOCAL_XDS", Text, Nothing, "the same document as text instead of a file"),

    key("xds.address", "XDS_ADDRESS", Text, Depends("`https://istiod.istio-system.svc:15012` inside Kubernetes unless `mesh.file` or `mesh.inline` is set or the variable is set and empty, else none"), "address of the control plane for workloads, services and policies: https, or a socket on this node as `unix:/path`"),
    key("xds.root", "XDS_ROOT_CA", Text, Is("./var/run/secrets/istio/root-cert.pem"), "CA that the control plane's certificate must chain to: a file, PEM text, or `SYSTEM`; not used with a socket"),
    key("xds.alt_name", "ALT_XDS_HOSTNAME", Text, Nothing, "another name that the control plane's certificate may have"),
    key("xds.headers", "XDS_HEADER_", Map, Nothing, "extra gRPC metadata"),
    key("xds.on_demand", "XDS_ON_DEMAND", Bool, Is("false"), "subscribe to workloads and services when a connection needs them, not to all at start; requires `dns.enabled: false`"),
    key("xds.state_dir", "XDS_STATE_DIR", Path, Nothing, "folder in which what the control plane told last is kept, so that a tunnel that starts while the control plane is away goes on with that. It belongs to the tunnels of one node; the tunnel makes it private. Not set: nothing is kept, and such a tunnel waits"),
    key("xds.forget_state", "XDS_FORGET_STATE", Bool, Is("false"), "remove what any tunnel has kept in `xds.state_dir`, at the start and at the end, and keep nothing: before an uninstall"),
    key("xds.metadata", "ISTIO_META_", Map, Nothing, "further node metadata for the control plane, as text"),
    key("xds.metadata_json", "ISTIO_METAJSON_", Map, Nothing, "further node metadata for the control plane, as JSON"),

    key("ca.address", "CA_ADDRESS", Text, Depends("`https://istiod.istio-system.svc:15012` inside Kubernetes, else none"), "address of the certificate service: https, or a socket on this node as `unix:/path`"),
    key("ca.root", "CA_ROOT_CA", Text, Is("./var/run/secrets/istio/root-cert.pem"), "CA that the service's certificate must chain to: a file, PEM text, or `SYSTEM`; not used with a socket"),
    key("ca.token", "AUTH_TOKEN", Secret, Is("./var/run/secrets/tokens/istio-token"), "token that authenticates the tunnel: a file (any value with a slash) or the token itself; while the file is missing, calls carry no token"),
    key("ca.alt_name", "ALT_CA_HOSTNAME", Text, Nothing, "another name that the service's certificate may have"),
    key("ca.headers", "CA_HEADER_", Map, Nothing, "extra gRPC metadata"),
    key("ca.development", "FAKE_CA", Bool, Is("false"), "use a CA inside the process. Not for production: every node holds the root key"),
    key("ca.development_dir", "DEVELOPMENT_CA_DIR", Path, Is("/var/lib/adit/development-ca"), "folder of that CA; nodes that share it trust each other. Setting it enables that CA"),
    key("ca.secret_ttl", "SECRET_TTL", Lasts { min: Duration::from_secs(10) }, Is("24h"), "requested lifetime of certificates; they are renewed after half of it"),

    key("tls.tls12", "TLS12_ENABLED", Bool, Is("false"), "allow TLS 1.2 besides 1.3"),
    key("tls.compliance", "COMPLIANCE_POLICY", Choice(&["none", "pqc"]), Is("none"), "`pqc`: only X25519MLKEM768 key exchange, so that peers without it cannot connect"),
    key("tls.crl", "CRL_PATH", Path, Nothing, "certificate revocation lists, PEM or DER, reloaded when the file changes: peers with a revoked certificate are refused, and disconnected if connected"),

    key("socket.mark", "PACKET_MARK", ANY, Depends("1337 in shared mode, else none"), "`SO_MARK` of the tunnel's sockets"),
    key("socket.ipv6", "IPV6_ENABLED", Bool, Is("true"), "also listen on IPv6, if the kernel has it"),
    key("socket.original_source", "ENABLE_ORIG_SRC", Bool, Depends("if the capability is there"), "applications see the client's address as the source"),
    key("socket.keepalive.enabled", "KEEPALIVE_ENABLED", Bool, Is("true"), "TCP keepalive on every socket"),
    key("socket.keepalive.time", "KEEPALIVE_TIME", TIME, Is("180s"), "idle time before the first keepalive probe"),
    key("socket.keepalive.interval", "KEEPALIVE_INTERVAL", TIME, Is("180s"), "time between keepalive probes"),
    key("socket.keepalive.retries", "KEEPALIVE_RETRIES", Number { min: 1, max: 127 }, Is("9"), "unanswered probes after which the connection is closed"),
    key("socket.user_timeout", "USER_TIMEOUT_ENABLED", Bool, Is("false"), "set `TCP_USER_TIMEOUT` to time + retries × interval of keepalive"),

    key("pool.max_streams", "POOL_MAX_STREAMS_PER_CONNECTION", Number { min: 1, max: u32::MAX }, Is("100"), "streams per pooled HBONE connection; more open another connection"),
    key("pool.idle", "POOL_UNUSED_RELEASE_TIMEOUT", TIME, Is("5m"), "an unused HBONE connection is closed after this time"),
    key("h2.stream_window_bytes", "HTTP2_STREAM_WINDOW_SIZE", WINDOW, Is("4194304"), "largest HTTP/2 flow control window of a stream, in bytes. A window begins at 262144 and grows while the application takes what arrives; with many streams in a tunnel it is smaller, down to 65536"),
    key("h2.connection_window_bytes", "HTTP2_CONNECTION_WINDOW_SIZE", WINDOW, Depends("200 times the largest stream window, at most 2147483647, so that streams whose data is not read never block the others"), "HTTP/2 flow control window of a connection, in bytes"),
    key("h2.frame_bytes", "HTTP2_FRAME_SIZE", Number { min: 1 << 14, max: (1 << 24) - 1 }, Is("1048576"), "largest HTTP/2 DATA frame, in bytes"),
    key("memory.pod_bytes", "POD_STREAM_MEMORY", MEMORY, Is("134217728"), "what the streams of one pod may make the tunnel hold for applications that do not read, in bytes. Beyond it each further stream has a window of 65536"),
    key("memory.total_bytes", "STREAM_MEMORY", MEMORY, Depends("a quarter of the memory that the process may use, at most 1073741824"), "the same for all pods together, in bytes"),
    key("stream.half_closed_limit", "HALF_CLOSED_LIMIT", Lasts { min: Duration::from_secs(1) }, Is("1h"), "a half-closed connection without traffic is closed after this time; the default equals kube-proxy's conntrack timeout"),
    key("stream.idle_limit", "IDLE_LIMIT", Lasts { min: Duration::from_secs(1) }, Nothing, "a connection without traffic is closed after this time; without a value, never"),
    key("hbone.response_baggage", "ENABLE_RESPONSE_BAGGAGE", Bool, Is("true"), "describe the server's workload in CONNECT responses, and use what peers send there for metric labels"),
    key("hbone.application_tunnel_loopback", "LOCALHOST_APP_TUNNEL", Bool, Is("true"), "connect to applications that accept the PROXY protocol on loopback, else on the pod's address"),

    key("hbone.same_node_direct", "SAME_NODE_DIRECT", Bool, Is("true"), "connect the pods of this node to each other without HBONE: the tunnel is at both ends, so it asks both policies itself, writes both records, and connects the application, for as long as a handshake over HBONE between the two succeeds. `false`: through mutual TLS, as between nodes"),
    key("hbone.answer_limit", "CONNECT_ANSWER_LIMIT", Lasts { min: Duration::from_secs(1) }, Is("15s"), "how long a peer may take to answer a CONNECT request; it answers when it has connected to the application"),

    key("budget.pod_descriptors", "POD_DESCRIPTORS", Number { min: 16, max: u32::MAX }, Depends("as many as are free, so that a pod alone gets half of all"), "file descriptors that the connections of one pod may hold. A connection takes two at most. Beyond it, new ones are refused"),
    key("budget.reserved_descriptors", "RESERVED_DESCRIPTORS", ANY, Depends("a sixteenth of the limit of open files, at least 256"), "file descriptors that connections leave for the control plane, certificates and the node agent"),
    key("budget.pod_handshakes", "POD_HANDSHAKES", Number { min: 2, max: 1 << 20 }, Is("256"), "TLS handshakes of peers with one pod at the same time; others wait. While more than half of them are taken, one peer address gets an eighth of them at most"),
    key("budget.pod_dials", "POD_DIALS", Number { min: 2, max: 1 << 20 }, Is("1024"), "connects to the applications of one pod at the same time, for peers and plaintext clients; others wait, with the same share for one address"),

    key("budget.metric_label_sets", "METRIC_LABEL_SETS", Number { min: 1, max: u32::MAX }, Is("20000"), "label sets of a metric whose labels are names of workloads and services. Beyond it connections count in a set named `overflow`. A set that was not used for an hour goes"),

    key("dns.enabled", "ISTIO_META_DNS_CAPTURE", Bool, Is("true"), "answer the pods' DNS queries for services of the mesh"),
    key("dns.address", "ISTIO_META_DNS_PROXY_ADDR", Address, Is("localhost:15053"), "where the DNS proxy listens in each pod's netns; with an IPv4 loopback address it also listens on IPv6 loopback").or("DNS_PROXY_ADDR"),
    key("dns.preferred_namespace", "PREFERED_SERVICE_NAMESPACE", Text, Nothing, "namespace preferred among services with the same name, after the client's own"),
    key("dns.upstream", "DNS_UPSTREAM", Text, Depends("the resolvers of `/etc/resolv.conf`"), "resolvers for queries of which it is not known whom the pod asked: `IP:port` or `IP`, separated by commas"),

    key("drain.grace_period", "TERMINATION_GRACE_PERIOD_SECONDS", DurationOrSeconds, Nothing, "the pod's `terminationGracePeriodSeconds`, after which the kubelet kills the tunnel"),
    key("drain.deadline", "CONNECTION_TERMINATION_DEADLINE", TIME, Depends("5 s before the grace period ends (1 s, if that is 10 s or less), else `5s`"), "how long open connections may continue after the shutdown signal"),

    key("admin.address", "ADMIN_ADDR", Address, Is("127.0.0.1:15000"), "admin endpoints; must be loopback"),
    key("stats.address", "STATS_ADDR", Address, Depends("port 15020 on every address"), "metrics endpoint"),
    key("readiness.address", "READINESS_ADDR", Address, Depends("port 15021 on every address"), "readiness endpoint"),
    key("log.format", "LOG_FORMAT", Choice(&["text", "plain", "json"]), Is("text"), "`plain` means `text`"),
    key("log.filter", "RUST_LOG", Text, Is("info"), "log filter, such as `info,access=off`; can be changed at run time"),
];

/// The row of `name`.
///
/// # Panics
/// If the table has no such row: keys are constants of this program.
pub(crate) fn row(name: &str) -> &'static ConfigKey {
    let found = KEYS.iter().find(|key| key.name == name);
    found.unwrap_or_else(|| panic!("{name} has no row in config/keys.rs"))
}

impl ValueKind {
    /// What a value must be, for errors and the documentation.
    pub(crate) fn expectation(self) -> String {
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
