//! Workloads: pods, and endpoints that are none.

use std::collections::{HashMap, HashSet};

use ztunnel_api::workload::{
    Locality, NetworkMode, Port, PortList, TunnelProtocol, Workload, WorkloadStatus, WorkloadType,
};

use super::{Surroundings, address::octets, peer_authentication, policy};
use crate::{
    objects::{
        Labels, NamespaceObjects,
        endpoints::{Endpoint, EndpointSlice},
        pod::{Accepts, Pod},
        selects,
        service::{Service, Target},
    },
    settings::MeshSettings,
};

/// What the pods of a namespace may be attached to, found once for all of them.
pub(super) struct Attached<'a> {
    selecting: Vec<&'a Service>,
    /// Services without a selector, by a pod (name, uid) that is listed as their endpoint.
    listed: HashMap<(&'a str, &'a str), Vec<&'a Service>>,
    /// Selector and key of policies that select pods, by key.
    policies: Vec<(&'a Labels, String)>,
    plaintext: peer_authentication::Rules<'a>,
}

impl<'a> Attached<'a> {
    pub(super) fn new(around: &Surroundings<'a>, namespace: &'a str, objects: &'a NamespaceObjects) -> Self {
        let mut listed: HashMap<_, Vec<&Service>> = HashMap::new();
        for slice in objects.slices.values() {
            let service = objects.services.get(&slice.service);
            let Some(service) = service.filter(|service| service.selector.is_empty()) else { continue };
            for endpoint in &slice.endpoints {
                if let Endpoint::Pod { name, uid } = endpoint {
                    let services = listed.entry((name.as_str(), uid.as_str())).or_default();
                    // One slice for each address family.
                    if services.iter().all(|known| known.name != service.name) {
                        services.push(service);
                    }
                }
            }
        }
        let root_namespace = around.settings.root_namespace.as_str();
        let mut policies = Vec::new();
        let mut add = |namespace: &str, objects: &'a NamespaceObjects| {
            for written in objects.policies() {
                if let Some(selector) = written.selector.as_ref().filter(|_| policy::is_sent(written)) {
                    policies.push((selector, format!("{namespace}/{}", written.sent_name())));
                }
            }
        };
        add(namespace, objects);
        if namespace != root_namespace {
            add(root_namespace, around.root);
        }
        policies.sort_by(|one, other| one.1.cmp(&other.1));
        let selecting = objects.services.values().filter(|service| !service.selector.is_empty());
        Self {
            selecting: selecting.collect(),
            listed,
            policies,
            plaintext: peer_authentication::Rules::new(around, namespace, objects),
        }
    }

    fn services(&self, pod: &Pod) -> Vec<&'a Service> {
        let selecting = self.selecting.iter().filter(|service| selects(&service.selector, &pod.labels));
        let listed = self.listed.get(&(pod.name.as_str(), pod.uid.as_str())).into_iter().flatten();
        selecting.chain(listed).copied().collect()
    }

    fn policies(&self, pod: &Pod) -> Vec<String> {
        let selecting = self.policies.iter().filter(|(selector, _)| selects(selector, &pod.labels));
        selecting.map(|(_, key)| key.clone()).chain(self.plaintext.policy_for(&pod.labels)).collect()
    }
}

pub(super) fn of_pod(
    around: &Surroundings<'_>,
    namespace: &str,
    pod: &Pod,
    attached: &Attached<'_>,
) -> Workload {
    let settings = around.settings;
    let label = |keys: [&str; 3]| keys.iter().find_map(|key| pod.labels.get(*key)).cloned();
    let services = attached.services(pod).into_iter().map(|service| {
        let ports = service.ports.iter().filter_map(|port| {
            let target = match &port.target {
                Target::Number(number) => *number,
                // A pod without such a port does not serve it.
                Target::Name(name) => pod.port_named(name)?,
            };
            Some(Port { service_port: port.number.into(), target_port: target.into(), ..Port::default() })
        });
        (settings.service_key(namespace, &service.name), PortList { ports: ports.collect() })
    });
    let status = if pod.healthy { WorkloadStatus::Healthy } else { WorkloadStatus::Unhealthy };
    let tunnel = match pod.accepts {
        Accepts::Plaintext => TunnelProtocol::None,
        Accepts::Hbone | Accepts::NativeHbone => TunnelProtocol::Hbone,
    };
    let network = if pod.host_network { NetworkMode::HostNetwork } else { NetworkMode::Standard };
    Workload {
        uid: format!("{}//Pod/{namespace}/{}", settings.cluster_id, pod.name),
        name: pod.name.clone(),
        namespace: namespace.to_owned(),
        addresses: pod.addresses.iter().copied().map(octets).collect(),
        network: settings.network.clone(),
        tunnel_protocol: tunnel.into(),
        native_tunnel: pod.accepts == Accepts::NativeHbone,
        trust_domain: settings.sent_trust_domain(),
        service_account: pod.service_account.clone(),
        node: pod.node.clone(),
        canonical_name: label(["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
            .unwrap_or_else(|| pod.workload_name.clone()),
        canonical_revision: label([
            "service.istio.io/canonical-revision",
            "app.kubernetes.io/version",
            "version",
        ])
        .unwrap_or_else(|| "latest".to_owned()),
        // Istio's control plane says so of all of them.
        workload_type: WorkloadType::Pod.into(),
        workload_name: pod.workload_name.clone(),
        authorization_policies: attached.policies(pod),
        status: status.into(),
        cluster_id: settings.cluster_id.clone(),
        services: services.collect(),
        locality: around.nodes.get(&pod.node).map(|node| Locality {
            region: node.region.clone(),
            zone: node.zone.clone(),
            subzone: node.subzone.clone(),
        }),
        network_mode: network.into(),
        ..Workload::default()
    }
}

/// The endpoints of a slice that are no pods. Nothing is known of them but their addresses, which
/// others may have too: so they count as addresses of a host.
pub(super) fn of_slice(
    settings: &MeshSettings,
    namespace: &str,
    slice: &EndpointSlice,
    objects: &NamespaceObjects,
) -> Vec<Workload> {
    let Some(service) = objects.services.get(&slice.service) else { return Vec::new() };
    let ports = slice.ports.iter().filter_map(|(name, target)| {
        let port = service.ports.iter().find(|port| port.name == *name)?;
        Some(Port { service_port: port.number.into(), target_port: (*target).into(), ..Port::default() })
    });
    let ports = PortList { ports: ports.collect() };
    let mut seen = HashSet::new();
    let workload = |endpoint: &Endpoint| {
        let Endpoint::Other { addresses, ready } = endpoint else { return None };
        let first = addresses.first().filter(|address| seen.insert(**address))?;
        let status = if *ready { WorkloadStatus::Healthy } else { WorkloadStatus::Unhealthy };
        let cluster = &settings.cluster_id;
        Some(Workload {
            uid: format!("{cluster}/discovery.k8s.io/EndpointSlice/{namespace}/{}/{first}", slice.name),
            name: slice.name.clone(),
            namespace: namespace.to_owned(),
            addresses: addresses.iter().copied().map(octets).collect(),
            network: settings.network.clone(),
            trust_domain: settings.sent_trust_domain(),
            status: status.into(),
            cluster_id: cluster.clone(),
            services: [(settings.service_key(namespace, &service.name), ports.clone())].into(),
            network_mode: NetworkMode::HostNetwork.into(),
            ..Workload::default()
        })
    };
    slice.endpoints.iter().filter_map(workload).collect()
}
