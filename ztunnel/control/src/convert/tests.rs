//! Pods, services and slices of a namespace as tunnels are told of them.

#![expect(clippy::needless_pass_by_value, reason = "`json!` makes values, which tests hand over as they are")]

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::{core::v1 as api, discovery::v1::EndpointSlice as ApiSlice};
use prost::Message as _;
use serde_json::{Value, json};
use ztunnel_api::workload::{
    Address, IpFamilies, Locality, NetworkMode, Port, PortList, Service, TunnelProtocol, Workload,
    WorkloadStatus, WorkloadType,
    address::Type,
    load_balancing::{HealthPolicy, Mode, Scope},
};

use super::*;
use crate::{
    objects::{endpoints, pod, policy::AuthorizationPolicy, service},
    report::PolicyKind,
    snapshot::ResourceType,
};

const WEB: &str = "demo/web.demo.svc.cluster.local";

/// As a tunnel reads it.
fn sent(resource: &Resource) -> ztunnel_api::discovery::Resource {
    let mut response = ztunnel_api::discovery::DeltaDiscoveryResponse::decode(resource.entry()).unwrap();
    response.resources.pop().unwrap()
}

#[derive(Default)]
struct Namespace {
    objects: NamespaceObjects,
    settings: MeshSettings,
    root: NamespaceObjects,
}

impl Namespace {
    fn pod(mut self, name: &str, labels: Value, more: Value) -> Self {
        let mut object = json!({
            "metadata": {"name": name, "namespace": "demo", "uid": format!("uid-{name}"), "labels": labels},
            "spec": {"nodeName": "a", "serviceAccountName": "sa",
                "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {"podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]}});
        for (pointer, value) in more.as_object().into_iter().flatten() {
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            object.pointer_mut(parent).unwrap()[key] = value.clone();
        }
        let object: api::Pod = serde_json::from_value(object).unwrap();
        self.objects.pods.insert(name.to_owned(), pod::Pod::read(&object).unwrap());
        self
    }

    fn service(mut self, spec: Value) -> Self {
        let object = json!({"metadata": {"name": "web", "namespace": "demo"}, "spec": spec});
        let object: api::Service = serde_json::from_value(object).unwrap();
        self.objects.services.insert("web".to_owned(), service::Service::read(&object).unwrap());
        self
    }

    fn slice(mut self, name: &str, ports: Value, endpoints: Value) -> Self {
        let object = json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": ports, "endpoints": endpoints});
        let object: ApiSlice = serde_json::from_value(object).unwrap();
        self.objects.slices.insert(name.to_owned(), endpoints::EndpointSlice::read(&object).unwrap());
        self
    }

    fn resources(&self) -> NamespaceResources {
        let nodes = HashMap::from([(
            "a".to_owned(),
            NodeLocality { region: "r".to_owned(), zone: "z".to_owned(), subzone: String::new() },
        )]);
        let around = Surroundings {
            settings: &self.settings,
            root: &self.root,
            nodes: &nodes,
            peer_authentication: false,
        };
        namespace(&around, "demo", &self.objects).resources
    }

    fn address(&self, name: &str) -> Option<Type> {
        let resources = self.resources();
        let sent = sent(resources.addresses.get(name)?).resource.unwrap();
        assert_eq!(sent.type_url, ResourceType::Address.url());
        Address::decode(&*sent.value).unwrap().r#type
    }

    fn workload(&self, name: &str) -> Workload {
        match self.address(&format!("Kubernetes//Pod/demo/{name}")) {
            Some(Type::Workload(workload)) => workload,
            other => panic!("{other:?}"),
        }
    }

    fn web(&self) -> Service {
        match self.address(WEB) {
            Some(Type::Service(service)) => service,
            other => panic!("{other:?}"),
        }
    }
}

fn port(service_port: u32, target_port: u32) -> Port {
    Port { service_port, target_port, app_protocol: 0 }
}

#[test]
fn a_pod_is_a_workload() {
    let labels = json!({"app": "web", "version": "v2"});
    let annotations = json!({"ambient.istio.io/redirection": "enabled"});
    let more = json!({"/metadata/annotations": annotations});
    let demo = Namespace::default().pod("web-1", labels, more);
    let expected = Workload {
        uid: "Kubernetes//Pod/demo/web-1".to_owned(),
        name: "web-1".to_owned(),
        namespace: "demo".to_owned(),
        addresses: vec![vec![10, 0, 0, 1]],
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        service_account: "sa".to_owned(),
        node: "a".to_owned(),
        canonical_name: "web".to_owned(),
        canonical_revision: "v2".to_owned(),
        workload_type: WorkloadType::Pod.into(),
        workload_name: "web-1".to_owned(),
        status: WorkloadStatus::Healthy.into(),
        cluster_id: "Kubernetes".to_owned(),
        locality: Some(Locality { region: "r".to_owned(), zone: "z".to_owned(), subzone: String::new() }),
        ..Workload::default()
    };
    assert_eq!(demo.workload("web-1"), expected);
    let resource = &demo.resources().addresses["Kubernetes//Pod/demo/web-1"];
    assert_eq!(sent(resource).aliases, ["/10.0.0.1"]);
}

#[test]
fn names_come_from_labels_in_order() {
    for (labels, name, revision) in [
        (json!({}), "p", "latest"),
        (json!({"app": "a", "version": "1"}), "a", "1"),
        (
            json!({"app": "a", "app.kubernetes.io/name": "b", "version": "1", "app.kubernetes.io/version": "2"}),
            "b",
            "2",
        ),
        (
            json!({"app": "a", "service.istio.io/canonical-name": "c", "service.istio.io/canonical-revision": "3"}),
            "c",
            "3",
        ),
    ] {
        let workload = Namespace::default().pod("p", labels, json!({})).workload("p");
        assert_eq!((&*workload.canonical_name, &*workload.canonical_revision), (name, revision));
    }
}

#[test]
fn a_pod_of_the_host_and_one_that_is_not_ready() {
    let more = json!({"/spec/hostNetwork": true, "/status/conditions": []});
    let workload = Namespace::default().pod("p", json!({}), more).workload("p");
    assert_eq!(workload.network_mode(), NetworkMode::HostNetwork);
    assert_eq!(workload.status(), WorkloadStatus::Unhealthy);
    assert_eq!(workload.tunnel_protocol(), TunnelProtocol::None);
}

#[test]
fn the_cluster_has_names_of_its_own() {
    let mut demo = Namespace::default().pod("p", json!({}), json!({"/status/podIP": "fd00::1"}));
    demo.settings.trust_domain = "example.org".to_owned();
    demo.settings.network = "east".to_owned();
    let workload = demo.workload("p");
    assert_eq!((&*workload.trust_domain, &*workload.network), ("example.org", "east"));
    let resource = &demo.resources().addresses["Kubernetes//Pod/demo/p"];
    assert_eq!(sent(resource).aliases, ["east/fd00::1"]);
}

#[test]
fn a_service_has_addresses_ports_and_families() {
    let spec = json!({
        "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"],
        "ports": [{"name": "http", "port": 80, "targetPort": 8080}, {"name": "web", "port": 81, "targetPort": "http"}]});
    let demo = Namespace::default().service(spec);
    let web = demo.web();
    assert_eq!((&*web.name, &*web.hostname, web.canonical), ("web", "web.demo.svc.cluster.local", true));
    assert_eq!(web.addresses.iter().map(|address| address.address.len()).collect::<Vec<_>>(), [4, 16]);
    assert_eq!(web.ip_families(), IpFamilies::Dual);
    let ports: Vec<_> = web.ports.iter().map(|port| (port.service_port, port.target_port)).collect();
    assert_eq!(ports, [(80, 8080), (81, 0)]);
    assert_eq!(web.load_balancing, None);
    assert_eq!(sent(&demo.resources().addresses[WEB]).aliases, ["/10.96.0.1", "/fd00::1"]);
    // A headless one has its name.
    assert!(Namespace::default().service(json!({"clusterIP": "None"})).web().addresses.is_empty());
}

#[test]
fn preferences_and_health_rules_of_services() {
    let near = [Scope::Network, Scope::Region, Scope::Zone];
    for (spec, mode, scopes, health) in [
        (
            json!({"internalTrafficPolicy": "Local"}),
            Mode::Strict,
            &[Scope::Node][..],
            HealthPolicy::OnlyHealthy,
        ),
        (json!({"trafficDistribution": "PreferClose"}), Mode::Failover, &near[..], HealthPolicy::OnlyHealthy),
        (
            json!({"trafficDistribution": "PreferSameZone", "publishNotReadyAddresses": true}),
            Mode::Failover,
            &near[..],
            HealthPolicy::AllowAll,
        ),
        (json!({"publishNotReadyAddresses": true}), Mode::UnspecifiedMode, &[][..], HealthPolicy::AllowAll),
        (
            json!({"internalTrafficPolicy": "Local", "trafficDistribution": "PreferClose"}),
            Mode::Strict,
            &[Scope::Node][..],
            HealthPolicy::OnlyHealthy,
        ),
    ] {
        let balancing = Namespace::default().service(spec.clone()).web().load_balancing.unwrap();
        assert_eq!(balancing.routing_preference().collect::<Vec<_>>(), scopes, "{spec}");
        assert_eq!((balancing.mode(), balancing.health_policy()), (mode, health), "{spec}");
    }
    let mut inherited = Namespace::default().service(json!({}));
    inherited.objects.distribution = [("demo".to_owned(), service::Distribution::SameNode)].into();
    assert_eq!(inherited.web().load_balancing.unwrap().routing_preference.len(), 5);
}

#[test]
fn pods_serve_the_ports_of_services_that_select_them() {
    let spec = json!({"selector": {"app": "web"}, "ports": [
        {"name": "a", "port": 80, "targetPort": 8080}, {"name": "b", "port": 81, "targetPort": "http"},
        {"name": "c", "port": 82, "targetPort": "nowhere"}]});
    let demo = Namespace::default()
        .service(spec)
        .pod("yes", json!({"app": "web", "more": "x"}), json!({}))
        .pod("no", json!({"app": "db"}), json!({}));
    let ports = PortList { ports: vec![port(80, 8080), port(81, 8080)] };
    assert_eq!(demo.workload("yes").services, BTreeMap::from([(WEB.to_owned(), ports)]));
    assert_eq!(demo.workload("no").services, BTreeMap::new());
}

#[test]
fn slices_tell_the_endpoints_of_services_without_a_selector() {
    let demo = Namespace::default()
        .service(json!({"ports": [{"name": "a", "port": 80, "targetPort": 8080}]}))
        .pod("yes", json!({}), json!({}))
        .pod("no", json!({}), json!({}))
        .slice(
            "web-1",
            json!([{"name": "a", "port": 9000, "protocol": "TCP"}]),
            json!([
                {"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "name": "yes", "uid": "uid-yes"}},
                // Of a pod of the same name that was there before.
                {"addresses": ["10.0.0.2"], "targetRef": {"kind": "Pod", "name": "no", "uid": "other"}},
                {"addresses": ["192.0.2.1"]}, {"addresses": ["192.0.2.1"]},
                {"addresses": ["192.0.2.2"], "conditions": {"ready": false}},
            ]),
        );
    let of_pod = PortList { ports: vec![port(80, 8080)] };
    assert_eq!(demo.workload("yes").services, BTreeMap::from([(WEB.to_owned(), of_pod)]));
    assert!(demo.workload("no").services.is_empty());
    let uid = |ip: &str| format!("Kubernetes/discovery.k8s.io/EndpointSlice/demo/web-1/{ip}");
    let Some(Type::Workload(first)) = demo.address(&uid("192.0.2.1")) else { panic!() };
    assert_eq!(first.services[WEB].ports, [port(80, 9000)]);
    assert_eq!((first.network_mode(), first.status()), (NetworkMode::HostNetwork, WorkloadStatus::Healthy));
    let Some(Type::Workload(second)) = demo.address(&uid("192.0.2.2")) else { panic!() };
    assert_eq!(second.status(), WorkloadStatus::Unhealthy);
    assert_eq!(demo.resources().addresses.len(), 2 + 1 + 2);
}

#[test]
fn pods_name_the_policies_that_select_them() {
    let policy = |name: &str, namespace: &str, spec: Value| {
        let object = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": name, "namespace": namespace}, "spec": spec});
        (
            name.to_owned(),
            AuthorizationPolicy::read(PolicyKind::Authorization, &serde_json::from_value(object).unwrap()),
        )
    };
    let selector = json!({"matchLabels": {"app": "web"}});
    let mut demo = Namespace::default().pod("p", json!({"app": "web"}), json!({}));
    demo.objects.authorization_policies = [
        policy("selects", "demo", json!({"selector": selector})),
        policy("all", "demo", json!({})),
        policy("other", "demo", json!({"selector": {"matchLabels": {"app": "db"}}})),
        policy("waypoint", "demo", json!({"selector": selector, "targetRefs": [{"name": "x"}]})),
    ]
    .into();
    demo.root.authorization_policies = [policy("root", "adit-system", json!({"selector": selector}))].into();
    assert_eq!(demo.workload("p").authorization_policies, ["adit-system/root", "demo/selects"]);
    let policies = demo.resources().policies;
    assert_eq!(policies.keys().collect::<Vec<_>>(), ["demo/all", "demo/other", "demo/selects"]);
}

#[test]
fn equal_objects_have_equal_versions() {
    let demo = |ready: &str| {
        let more = json!({"/status/conditions": [{"type": "Ready", "status": ready}]});
        let demo = Namespace::default().pod("p", json!({"app": "web"}), more);
        demo.resources().addresses["Kubernetes//Pod/demo/p"].version().to_owned()
    };
    assert_eq!(demo("True"), demo("True"));
    assert_ne!(demo("True"), demo("False"));
    assert_eq!(demo("True").len(), 32);
}
