use std::collections::BTreeMap;

use super::*;

/// A healthy workload in namespace `default` with service account `NAME`, reached by HBONE.
pub(crate) fn workload(name: &str, ip: &str) -> Workload {
    let account = name.split('-').next().unwrap_or(name);
    let common = workloads::Common {
        namespace: "default".into(),
        service_account: account.into(),
        trust_domain: "cluster.local".into(),
        network: "".into(),
        cluster_id: "Kubernetes".into(),
        protocol: Protocol::Hbone,
        canonical_name: account.into(),
        canonical_revision: "".into(),
        workload_name: account.into(),
        workload_type: "deployment".into(),
        locality: workloads::Locality::default(),
        services: BTreeMap::new(),
        policies: Vec::new(),
        host_network: false,
        native_tunnel: false,
        waypoint: None,
        network_gateway: None,
        hostname: None,
        application_tunnel: None,
    };
    Workload {
        uid: format!("uid-{name}").into(),
        name: name.into(),
        node: "node-a".into(),
        addresses: [ip.parse().unwrap()].into(),
        capacity: 1,
        healthy: true,
        common: Arc::new(common),
    }
}

/// The names of the pod that [`workload`] with the same name makes, on `node-a`.
pub(crate) fn local_pod(name: &str) -> LocalPod {
    LocalPod {
        cluster_id: "Kubernetes".into(),
        node: "node-a".into(),
        namespace: "default".into(),
        name: name.into(),
        service_account: name.split('-').next().unwrap_or(name).into(),
    }
}

/// The same but for what `change` does.
pub(crate) fn but(mut workload: Workload, change: impl FnOnce(&mut workloads::Common)) -> Workload {
    change(&mut workload);
    workload
}

/// `NAME.default.svc.cluster.local` on one address, port 80 to 8080.
pub(crate) fn service(name: &str, vip: &str) -> Service {
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

pub(crate) fn ip(text: &str) -> IpAddr {
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
    let host = |name| but(workload(name, "192.168.0.1"), |common| common.host_network = true);
    let mesh = Mesh::new([host("a"), host("b")], [], []);
    assert!(mesh.workload_by_address("", ip("192.168.0.1")).is_none());
    assert!(mesh.workload_of(&local_pod("a")).is_some());
}

/// An entry may name the address of a pod, or of a machine that has another entry.
#[test]
fn an_address_is_a_pods_before_it_is_an_entrys_and_one_in_the_mesh_comes_before_others() {
    let of = |uid: &str, protocol| {
        let mut workload = but(workload(uid, "10.0.0.1"), |common| common.protocol = protocol);
        workload.uid = uid.into();
        workload
    };
    let pod = of("Kubernetes//Pod/default/web-1", Protocol::Tcp);
    let entry = of("Kubernetes/networking.istio.io/ServiceEntry/default/e/10.0.0.1", Protocol::Tcp);
    let machine = of("Kubernetes/networking.istio.io/WorkloadEntry/default/m", Protocol::Hbone);
    let found = |known: [&Workload; 2]| {
        let mesh = Mesh::new([known[0].clone()], [], []).with([MeshChange::PutWorkload(known[1].clone())]);
        mesh.workload_by_address("", ip("10.0.0.1")).unwrap().uid.clone()
    };
    for (first, second) in [(&pod, &entry), (&pod, &machine), (&machine, &entry)] {
        assert_eq!(found([first, second]), first.uid, "{} told last", second.uid);
        assert_eq!(found([second, first]), first.uid, "{} told first", second.uid);
    }
}

#[test]
fn a_pod_is_found_by_name_only_with_its_service_account() {
    let mesh = Mesh::new([workload("web-1", "10.0.0.1")], [], []);
    let named = local_pod("web-1");
    assert!(mesh.workload_of(&named).is_some());
    assert!(mesh.workload_of(&LocalPod { service_account: "admin".into(), ..named.clone() }).is_none());
    assert!(mesh.workload_of(&LocalPod { namespace: "shop".into(), ..named }).is_none());
}

/// One node name in every cluster, as `kind` and many installers give them.
#[test]
fn a_pod_is_not_its_namesake_of_another_cluster() {
    let of = |uid: &str, cluster: &str, node: &str| {
        let mut workload = but(workload("web-1", "10.0.0.1"), |common| common.cluster_id = cluster.into());
        (workload.uid, workload.node) = (uid.into(), node.into());
        workload
    };
    let ours = of("Kubernetes//Pod/default/web-1", "Kubernetes", "node-a");
    let moved = of("Kubernetes//Pod/default/web-1", "Kubernetes", "node-b");
    let machine = of("Kubernetes/networking.istio.io/WorkloadEntry/default/web-1", "Kubernetes", "");
    let others = || (0..8).map(|n| of(&format!("c{n}//Pod/default/web-1"), &format!("c{n}"), "node-a"));
    let found = |known: Vec<Workload>| {
        let mesh = Mesh::new(known, [], []);
        mesh.workload_of(&local_pod("web-1"))
            .map(|workload| (workload.uid.to_string(), workload.node.to_string()))
    };
    let uid = || "Kubernetes//Pod/default/web-1".to_owned();
    let with = |more: &[&Workload]| others().chain(more.iter().map(|one| (*one).clone())).collect::<Vec<_>>();
    assert_eq!(found(with(&[&ours])), Some((uid(), "node-a".to_owned())));
    assert_eq!(found(with(&[&ours, &machine])), Some((uid(), "node-a".to_owned())));
    assert_eq!(found(with(&[&moved, &machine])), Some((uid(), "node-b".to_owned())), "its cluster, at least");
    assert_eq!(found(with(&[])), None, "unknown is not somebody else");
}

/// A StatefulSet's pod keeps its uid in the mesh when it comes back, with whatever address is free.
#[test]
fn an_address_is_of_who_got_it_last_whether_new_or_back_under_its_name() {
    let at = |mesh: &Mesh, address| mesh.workload_by_address("", ip(address)).unwrap().name.to_string();
    let put = |name, addresses: &[&str]| {
        let mut workload = workload(name, addresses[0]);
        workload.addresses = addresses.iter().map(|address| ip(address)).collect();
        MeshChange::PutWorkload(workload)
    };
    let first = Mesh::default().with([put("db-0", &["10.0.0.1"]), put("web-1", &["10.0.0.2"])]);
    // web-1 is going, and the control plane has not said so yet.
    let back = first.with([put("db-0", &["10.0.0.2"])]);
    assert_eq!(at(&back, "10.0.0.2"), "db-0");
    // What else is said of the stale owner moves no address, not even another one that it gets.
    let updated = back.with([put("web-1", &["10.0.0.2"]), put("web-1", &["10.0.0.2", "fd00::2"])]);
    assert_eq!((at(&updated, "10.0.0.2"), at(&updated, "fd00::2")), ("db-0".to_owned(), "web-1".to_owned()));
    assert_eq!(at(&updated.with([MeshChange::RemoveWorkload("uid-web-1".into())]), "10.0.0.2"), "db-0");
    assert_eq!(at(&updated.with([MeshChange::RemoveWorkload("uid-db-0".into())]), "10.0.0.2"), "web-1");
}

#[test]
fn the_mapping_of_the_workload_wins_and_a_named_port_needs_one() {
    let mut web = service("web", "10.96.0.1");
    web.ports = [(80, 8080), (81, 0), (82, 8082)].into();
    let endpoint = |name, ip, ports: &[(u16, u16)]| {
        let mut workload = workload(name, ip);
        workload.services.insert(web.key(), Arc::new(ports.iter().copied().collect()));
        workload
    };
    let key = web.key();
    let workloads = [
        endpoint("a", "10.0.0.1", &[(80, 9090), (81, 9191), (99, 9999)]),
        endpoint("b", "10.0.0.2", &[(82, 0)]),
        workload("c", "10.0.0.3"),
    ];
    let mesh = Mesh::new(workloads, [web.clone()], []);
    let [a, b] = &mesh.endpoints(&key)[..] else { panic!("c is no endpoint") };
    assert_eq!(
        [80, 81, 82, 99].map(|port| a.target_port(&web, port)),
        [Some(9090), Some(9191), Some(8082), None]
    );
    assert_eq!([80, 81, 82].map(|port| b.target_port(&web, port)), [Some(8080), None, Some(8082)]);
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

#[test]
fn of_ranges_that_hold_an_address_the_narrowest_counts_and_an_address_of_its_own_before_all() {
    let ranged = |name: &str, vip: &str, ranges: &[&str]| Service {
        cidr_vips: ranges.iter().map(|range| ("".into(), range.parse().unwrap())).collect(),
        ..service(name, vip)
    };
    let services = [
        ranged("wide", "192.0.2.1", &["10.0.0.0/8", "fd00::/8"]),
        ranged("narrow", "192.0.2.2", &["10.1.0.0/16", "fd00:1::/32"]),
        service("one", "10.1.2.3"),
    ];
    let mesh = Mesh::new([], services, []);
    let found = |network, text| mesh.service_by_vip(network, ip(text)).map(|service| &*service.name);
    for (text, name) in [
        ("10.2.0.1", Some("wide")),
        ("10.1.0.1", Some("narrow")),
        ("::ffff:10.1.0.1", Some("narrow")),
        ("10.1.2.3", Some("one")),
        ("fd00:2::1", Some("wide")),
        ("fd00:1::1", Some("narrow")),
        ("11.0.0.1", None),
        ("2001:db8::1", None),
    ] {
        assert_eq!(found("", text), name, "{text}");
    }
    assert_eq!(found("east", "10.1.0.1"), None);
}

#[test]
fn what_changes_is_all_that_changes_and_a_moved_address_is_its_last_owners() {
    let mesh = Mesh::new(
        [workload("z-old", "10.0.0.1"), workload("b", "10.0.0.2")],
        [service("s", "10.96.0.1")],
        [],
    );
    let updated = mesh.with([
        MeshChange::PutWorkload(workload("a-new", "10.0.0.1")),
        MeshChange::RemoveService(service("s", "10.96.0.1").key()),
    ]);
    let owner =
        |mesh: &Mesh| mesh.workload_by_address("", ip("10.0.0.1")).map(|found| found.name.to_string());
    assert_eq!((owner(&mesh).as_deref(), owner(&updated).as_deref()), (Some("z-old"), Some("a-new")));
    assert!(updated.service_by_vip("", ip("10.96.0.1")).is_none());
    // Sent again, the old one does not become the new one.
    let again = updated.with([MeshChange::PutWorkload(workload("z-old", "10.0.0.1"))]);
    assert_eq!(owner(&again).as_deref(), Some("a-new"));
    let left = again.with([MeshChange::RemoveWorkload("uid-a-new".into())]);
    assert_eq!(owner(&left).as_deref(), Some("z-old"));
    assert_eq!(left.workloads().count(), 2);
}
