use super::*;

/// A healthy workload in namespace `default` with service account `NAME`, reached by HBONE.
pub fn workload(name: &str, ip: &str) -> Workload {
    let account = name.split('-').next().unwrap_or(name);
    Workload {
        uid: format!("uid-{name}").into(),
        name: name.into(),
        namespace: "default".into(),
        service_account: account.into(),
        trust_domain: "cluster.local".into(),
        network: "".into(),
        node: "node-a".into(),
        cluster_id: "Kubernetes".into(),
        addresses: vec![ip.parse().unwrap()],
        protocol: Protocol::Hbone,
        canonical_name: account.into(),
        canonical_revision: "".into(),
        workload_name: account.into(),
        workload_type: "deployment".into(),
        locality: workloads::Locality::default(),
        services: BTreeMap::new(),
        policies: Vec::new(),
        healthy: true,
        host_network: false,
        capacity: 1,
        native_tunnel: false,
        waypoint: None,
        network_gateway: None,
        hostname: None,
        application_tunnel: None,
    }
}

/// `NAME.default.svc.cluster.local` on one address, port 80 to 8080.
pub fn service(name: &str, vip: &str) -> Service {
    Service {
        name: name.into(),
        namespace: "default".into(),
        hostname: format!("{name}.default.svc.cluster.local").into(),
        vips: vec![("".into(), vip.parse().unwrap())],
        cidr_vips: Vec::new(),
        ports: [(80, 8080)].into(),
        app_protocols: BTreeMap::new(),
        subject_alt_names: Vec::new(),
        ip_families: services::IpFamilies::Any,
        canonical: false,
        load_balancing: services::LoadBalancing::default(),
        waypoint: None,
        weighted_waypoints: Vec::new(),
        visibility: services::Visibility::Public,
    }
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_workload_is_found_by_network_and_address_in_either_form() {
    let mut other = workload("other", "10.0.0.1");
    other.network = "east".into();
    let mesh = Mesh::new([workload("web", "10.0.0.1"), other], [], []);
    assert_eq!(&*mesh.workload_by_address("", ip("10.0.0.1")).unwrap().name, "web");
    assert_eq!(&*mesh.workload_by_address("", ip("::ffff:10.0.0.1")).unwrap().name, "web");
    assert_eq!(&*mesh.workload_by_address("east", ip("10.0.0.1")).unwrap().name, "other");
    assert!(mesh.workload_by_address("west", ip("10.0.0.1")).is_none());
    assert!(mesh.workload_by_address("", ip("10.0.0.2")).is_none());
}

#[test]
fn host_network_workloads_are_never_found_by_address() {
    let host = |name| Workload { host_network: true, ..workload(name, "192.168.0.1") };
    let mesh = Mesh::new([host("a"), host("b")], [], []);
    assert!(mesh.workload_by_address("", ip("192.168.0.1")).is_none());
    assert!(mesh.workload_by_name("default", "a", "a").is_some());
}

#[test]
fn a_pod_is_found_by_name_only_with_its_service_account() {
    let mesh = Mesh::new([workload("web-1", "10.0.0.1")], [], []);
    assert!(mesh.workload_by_name("default", "web-1", "web").is_some());
    assert!(mesh.workload_by_name("default", "web-1", "admin").is_none());
    assert!(mesh.workload_by_name("shop", "web-1", "web").is_none());
}

#[test]
fn the_mapping_of_the_workload_wins_and_a_named_port_needs_one() {
    let mut web = service("web", "10.96.0.1");
    web.ports = [(80, 8080), (81, 0), (82, 8082)].into();
    let endpoint = |name, ip, ports: &[(u16, u16)]| {
        let mut workload = workload(name, ip);
        workload.services.insert(web.key(), ports.iter().copied().collect());
        workload
    };
    let key = web.key();
    let workloads = [
        endpoint("a", "10.0.0.1", &[(80, 9090), (81, 9191), (99, 9999)]),
        endpoint("b", "10.0.0.2", &[(82, 0)]),
        workload("c", "10.0.0.3"),
    ];
    let mesh = Mesh::new(workloads, [web], []);
    let [a, b] = mesh.endpoints(&key) else { panic!("c is no endpoint") };
    assert_eq!([80, 81, 82, 99].map(|port| a.target_port(port)), [Some(9090), Some(9191), Some(8082), None]);
    assert_eq!([80, 81, 82].map(|port| b.target_port(port)), [Some(8080), None, Some(8082)]);
}

#[test]
fn of_several_services_with_one_name_the_own_namespace_wins_then_the_canonical_one() {
    let named = |namespace: &str, canonical| Service {
        namespace: namespace.into(),
        hostname: "api.example".into(),
        canonical,
        ..service("api", "10.96.0.1")
    };
    let mesh = Mesh::new([], [named("a", false), named("b", true), named("c", false)], []);
    let found = |namespace| &*mesh.service_by_hostname("api.example", namespace).unwrap().namespace;
    assert_eq!([found("c"), found("x")], ["c", "b"]);
    assert!(mesh.service_by_hostname("other.example", "a").is_none());
}
