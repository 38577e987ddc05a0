//! A service.

use std::net::IpAddr;

use k8s_openapi::{api::core::v1 as api, apimachinery::pkg::util::intstr::IntOrString};
use ztunnel_api::workload::AppProtocol;

use super::Labels;

const DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";

/// A service that has addresses or endpoints of its own: any but an alias of an external name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Service {
    pub name: String,
    /// Empty: its endpoints are written by hand.
    pub selector: Labels,
    /// Empty for a headless service.
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// How many address families, and whether the only one is IPv4.
    pub families: Families,
    /// Only endpoints of the client's own node.
    pub node_local: bool,
    pub distribution: Option<Distribution>,
    pub publish_not_ready: bool,
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServicePort {
    pub name: String,
    pub number: u16,
    pub target: Target,
    pub protocol: AppProtocol,
}

/// The port of an endpoint that a service's port leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Number(u16),
    /// Each pod has its own number for it.
    Name(String),
}

/// The address families of a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Families {
    #[default]
    Unsaid,
    V4,
    V6,
    Both,
}

/// Which endpoints are preferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Distribution {
    SameZone,
    SameNode,
}

impl Distribution {
    /// From the field of a service. `None` for a value that is not known.
    fn from_field(value: &str) -> Option<Self> {
        match value {
            "PreferClose" | "PreferSameZone" => Some(Self::SameZone),
            "PreferSameNode" => Some(Self::SameNode),
            _ => None,
        }
    }

    /// From the annotation of a service or namespace, in any case of letters.
    pub(crate) fn from_annotations(annotations: Option<&Labels>) -> Option<Self> {
        match annotations?.get(DISTRIBUTION)?.to_ascii_lowercase().as_str() {
            "preferclose" | "prefersamezone" => Some(Self::SameZone),
            "prefersamenode" => Some(Self::SameNode),
            _ => None,
        }
    }
}

impl Service {
    /// `None` for an alias of an external name, which DNS alone resolves.
    pub(crate) fn read(service: &api::Service) -> Option<Self> {
        let spec = service.spec.as_ref()?;
        if spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let listed = spec.cluster_ips.iter().flatten();
        let listed: Vec<&String> =
            if spec.cluster_ips.is_some() { listed.collect() } else { spec.cluster_ip.iter().collect() };
        let families: Vec<&str> = spec.ip_families.iter().flatten().map(String::as_str).collect();
        let from_field = spec.traffic_distribution.as_deref().and_then(Distribution::from_field);
        let from_annotation = || Distribution::from_annotations(service.metadata.annotations.as_ref());
        Some(Self {
            name: service.metadata.name.clone()?,
            selector: spec.selector.clone().unwrap_or_default(),
            // A headless service has the address `None`.
            addresses: listed.into_iter().filter_map(|address| address.parse().ok()).collect(),
            ports: ports(spec.ports.as_deref().unwrap_or_default()),
            families: match families[..] {
                [] => Families::Unsaid,
                ["IPv4"] => Families::V4,
                [_] => Families::V6,
                _ => Families::Both,
            },
            node_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            distribution: from_field.or_else(from_annotation),
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or_default(),
        })
    }
}

/// A port of UDP is left out where TCP has the same number: it could have another target.
fn ports(listed: &[api::ServicePort]) -> Vec<ServicePort> {
    let is_tcp = |port: &api::ServicePort| matches!(port.protocol.as_deref(), None | Some("TCP"));
    let hidden = |port: &api::ServicePort| {
        !is_tcp(port) && listed.iter().any(|other| other.port == port.port && is_tcp(other))
    };
    let read = |port: &api::ServicePort| {
        let number = u16::try_from(port.port).ok()?;
        let target = match &port.target_port {
            None | Some(IntOrString::Int(0)) => Target::Number(number),
            Some(IntOrString::Int(target)) => Target::Number(u16::try_from(*target).ok()?),
            Some(IntOrString::String(name)) => Target::Name(name.clone()),
        };
        let protocol = app_protocol(port);
        Some(ServicePort { name: port.name.clone().unwrap_or_default(), number, target, protocol })
    };
    listed.iter().filter(|port| !hidden(port)).filter_map(read).collect()
}

/// Ports whose protocol Istio does not guess at where nothing names it: SMTP, DNS, MySQL, MongoDB.
const WELL_KNOWN: [i32; 4] = [25, 53, 3306, 27017];

/// The application's protocol, from the field for it or from the first word of the port's name.
fn app_protocol(port: &api::ServicePort) -> AppProtocol {
    if port.protocol.as_deref() == Some("UDP") {
        return AppProtocol::Unknown;
    }
    let said = port.app_protocol.as_deref();
    match said {
        Some("kubernetes.io/h2c") => return AppProtocol::Http2,
        Some("kubernetes.io/ws") => return AppProtocol::Http11,
        Some("kubernetes.io/wss") => return AppProtocol::Tls,
        _ => {}
    }
    let name = said.or(port.name.as_deref()).unwrap_or_default().to_ascii_lowercase();
    if name.starts_with("grpc-web") {
        return AppProtocol::Unknown;
    }
    match name.split('-').next().unwrap_or_default() {
        "http" => AppProtocol::Http11,
        "http2" => AppProtocol::Http2,
        "grpc" => AppProtocol::Grpc,
        "tcp" => AppProtocol::Tcp,
        "tls" | "https" => AppProtocol::Tls,
        // Known to Istio, which has no word for them at layer 4.
        "udp" | "http_proxy" | "mongo" | "redis" | "mysql" => AppProtocol::Unknown,
        _ if WELL_KNOWN.contains(&port.port) => AppProtocol::Tcp,
        _ => AppProtocol::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[expect(
        clippy::needless_pass_by_value,
        reason = "`json!` makes values, which tests hand over as they are"
    )]
    fn service(spec: Value) -> Option<Service> {
        let service = json!({"metadata": {"name": "web", "namespace": "demo"}, "spec": spec});
        Service::read(&serde_json::from_value(service).unwrap())
    }

    #[test]
    fn addresses_are_those_of_the_cluster() {
        let addresses = |spec| service(spec).unwrap().addresses.len();
        assert_eq!(addresses(json!({"clusterIP": "10.96.0.1"})), 1);
        assert_eq!(addresses(json!({"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::1"]})), 2);
        assert_eq!(addresses(json!({"clusterIP": "None", "clusterIPs": ["None"]})), 0);
        assert_eq!(service(json!({"type": "ExternalName", "externalName": "example.com"})), None);
    }

    #[test]
    fn targets_are_numbers_or_names_and_default_to_the_port() {
        let ports = json!([
            {"name": "a", "port": 80, "targetPort": 8080},
            {"name": "b", "port": 81, "targetPort": "http"},
            {"name": "c", "port": 82},
            {"name": "d-udp", "port": 80, "protocol": "UDP", "targetPort": 5353},
            {"name": "e", "port": 70000},
        ]);
        let read = service(json!({"ports": ports})).unwrap().ports;
        let read: Vec<_> = read.into_iter().map(|port| (port.number, port.target)).collect();
        let name = Target::Name("http".to_owned());
        assert_eq!(read, [(80, Target::Number(8080)), (81, name), (82, Target::Number(82))]);
    }

    #[test]
    fn the_protocol_is_said_or_shows_in_the_name() {
        let protocol = |port: Value| service(json!({"ports": [port]})).unwrap().ports[0].protocol;
        for (name, said, expected) in [
            ("http", None, AppProtocol::Http11),
            ("http2-api", None, AppProtocol::Http2),
            ("GRPC-x", None, AppProtocol::Grpc),
            ("grpc-web", None, AppProtocol::Unknown),
            ("web", None, AppProtocol::Unknown),
            ("tcp-db", None, AppProtocol::Tcp),
            ("https", None, AppProtocol::Tls),
            ("web", Some("kubernetes.io/h2c"), AppProtocol::Http2),
            ("http", Some("tcp"), AppProtocol::Tcp),
        ] {
            let port = json!({"name": name, "port": 80, "appProtocol": said});
            assert_eq!(protocol(port), expected, "{name} {said:?}");
        }
        assert_eq!(protocol(json!({"name": "http", "port": 80, "protocol": "UDP"})), AppProtocol::Unknown);
        for (name, expected) in
            [("dns-tcp", AppProtocol::Tcp), ("http", AppProtocol::Http11), ("mysql", AppProtocol::Unknown)]
        {
            assert_eq!(protocol(json!({"name": name, "port": 53})), expected, "{name} on a well-known port");
        }
    }

    #[test]
    fn preferences_come_from_the_field_before_the_annotation() {
        let distribution = |field: Value, annotation: &str| {
            let service = json!({
                "metadata": {"name": "a", "annotations": {"networking.istio.io/traffic-distribution": annotation}},
                "spec": {"trafficDistribution": field}});
            Service::read(&serde_json::from_value(service).unwrap()).unwrap().distribution
        };
        assert_eq!(distribution(json!("PreferClose"), "prefersamenode"), Some(Distribution::SameZone));
        assert_eq!(distribution(json!("PreferSameNode"), ""), Some(Distribution::SameNode));
        assert_eq!(distribution(Value::Null, "PREFERCLOSE"), Some(Distribution::SameZone));
        assert_eq!(distribution(Value::Null, "nearby"), None);
    }
}
