use std::collections::HashMap;

use rand::{SeedableRng, rngs::StdRng};

use super::*;
use crate::mesh::{
    GatewayAddress, Mesh,
    gateways::WeightedWaypoint,
    services::{HealthPolicy, LbMode, LoadBalancing, Visibility},
    tests::{but, ip, service, workload},
};

mod many_endpoints;
mod newcomers;
mod on_demand;
mod waypoints;

/// Endpoints of service `web` at 10.96.0.1:80 → 8080; `change` turns plain ones into what a test
/// needs.
fn mesh<const N: usize>(change: impl Fn(usize, &mut Workload), addresses: [&str; N]) -> Mesh {
    mesh_with(service("web", "10.96.0.1"), change, addresses)
}

fn mesh_with<const N: usize>(
    web: Service,
    change: impl Fn(usize, &mut Workload),
    addresses: [&str; N],
) -> Mesh {
    let endpoints = addresses.iter().enumerate().map(|(n, address)| {
        let mut endpoint = workload(&format!("web-{n}"), address);
        endpoint.services.insert(web.key(), Arc::new([].into()));
        change(n, &mut endpoint);
        endpoint
    });
    Mesh::new(endpoints.collect::<Vec<_>>(), [web], [])
}

fn routed(mesh: &Mesh, to: &str) -> Result<OutboundRoute, RouteError> {
    let mut rng = StdRng::seed_from_u64(7);
    outbound(mesh, &workload("client", "10.0.9.9"), to.parse().unwrap(), &mut rng)
}

/// As most tests want it: to somebody whose address is known.
fn outbound(
    mesh: &Mesh,
    source: &Workload,
    original: SocketAddr,
    rng: &mut impl Rng,
) -> Result<OutboundRoute, RouteError> {
    let source = Source::told(Arc::new(source.clone()));
    super::outbound(&MeshView::complete(mesh), &source, original, &Avoid::default(), rng).map(|outbound| {
        match outbound {
            OutboundDecision::Route(route) => route,
            OutboundDecision::Unlocated(unlocated) => panic!("{unlocated:?}"),
        }
    })
}

fn at(destination: &str) -> GatewayAddress {
    GatewayAddress { destination: destination.parse().unwrap(), hbone_mtls_port: 15008 }
}

/// The peer that is dialled, the `:authority` and the identity that is expected.
fn request_of(route: &OutboundRoute) -> (String, &str, String) {
    let Via::Hbone { peer, authority, expected } = &route.via else { panic!("{:?}", route.via) };
    (peer.to_string(), authority, expected.iter().map(ToString::to_string).collect())
}

fn unchanged(_: usize, _: &mut Workload) {}

#[test]
fn an_unknown_destination_is_passed_through() {
    let route = routed(&Mesh::default(), "1.1.1.1:443").unwrap();
    assert_eq!((route.target, route.via), ("1.1.1.1:443".parse().unwrap(), Via::Plain));
    assert!(route.service.is_none() && route.workload.is_none());
}

#[test]
fn a_pod_is_reached_through_its_tunnel_or_plainly() {
    let mesh = mesh(|n, pod| pod.protocol = [Protocol::Hbone, Protocol::Tcp][n], ["10.0.0.1", "10.0.0.2"]);
    let route = routed(&mesh, "10.0.0.1:9999").unwrap();
    assert_eq!(route.target, "10.0.0.1:9999".parse().unwrap());
    assert_eq!(
        route.via,
        Via::Hbone {
            peer: "10.0.0.1:15008".parse().unwrap(),
            authority: "10.0.0.1:9999".to_owned(),
            expected: vec!["spiffe://cluster.local/ns/default/sa/web".parse().unwrap()],
        }
    );
    assert!(route.service.is_none());
    assert_eq!(&*route.workload.unwrap().name, "web-0");
    let mapped = routed(&mesh, "[::ffff:10.0.0.2]:80").unwrap();
    assert_eq!((mapped.target, mapped.via), ("10.0.0.2:80".parse().unwrap(), Via::Plain));
}

#[test]
fn a_service_leads_to_the_target_port_of_an_endpoint_that_may_be_named_by_the_service() {
    let other: Identity = "spiffe://cluster.local/ns/default/sa/other".parse().unwrap();
    let web = Service { subject_alt_names: vec![other.clone()], ..service("web", "10.96.0.1") };
    let mesh = mesh_with(web, unchanged, ["fd00::1"]);
    let route = routed(&mesh, "10.96.0.1:80").unwrap();
    assert_eq!(route.target, "[fd00::1]:8080".parse().unwrap());
    let Via::Hbone { peer, authority, expected } = route.via else { panic!("{:?}", route.via) };
    assert_eq!((peer, authority.as_str()), ("[fd00::1]:15008".parse().unwrap(), "[fd00::1]:8080"));
    assert_eq!(expected, [other, route.workload.unwrap().identity()]);
    assert_eq!(&*route.service.unwrap().name, "web");
}

#[test]
fn endpoints_are_chosen_by_their_capacity() {
    let mesh = mesh(|n, pod| pod.capacity = [1, 3, 0][n], ["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    let mut rng = StdRng::seed_from_u64(1);
    let client = workload("client", "10.0.9.9");
    let mut count = HashMap::new();
    for _ in 0..4000 {
        let route = outbound(&mesh, &client, "10.96.0.1:80".parse().unwrap(), &mut rng).unwrap();
        *count.entry(route.target.ip()).or_insert(0) += 1;
    }
    assert!((900..1100).contains(&count[&ip("10.0.0.1")]), "{count:?}");
    assert_eq!(count.len(), 2, "{count:?}");
}

#[test]
fn capacities_that_are_all_zero_exclude_nobody() {
    let mesh = mesh(|_, pod| pod.capacity = 0, ["10.0.0.1"]);
    routed(&mesh, "10.96.0.1:80").unwrap();
}

#[test]
fn without_a_healthy_endpoint_there_is_no_way() {
    for none in [
        mesh(|_, pod| pod.healthy = false, ["10.0.0.1"]),
        mesh(unchanged, []),
        mesh(|_, pod| pod.addresses = [].into(), ["10.0.0.1"]),
        mesh_with(
            Service { ports: [(80, 0)].into(), ..service("web", "10.96.0.1") },
            unchanged, // and so without a mapping of the named port
            ["10.0.0.1"],
        ),
    ] {
        let error = routed(&none, "10.96.0.1:80").unwrap_err();
        assert!(error.to_string().starts_with("no healthy upstream"), "{error}");
        assert_eq!(error.reason(), FailureReason::NoHealthyUpstream);
    }
    let web = Service {
        load_balancing: LoadBalancing { health_policy: HealthPolicy::AllowAll, ..LoadBalancing::default() },
        ..service("web", "10.96.0.1")
    };
    routed(&mesh_with(web, |_, pod| pod.healthy = false, ["10.0.0.1"]), "10.96.0.1:80").unwrap();
}

#[test]
fn a_port_that_the_service_has_not_is_an_error() {
    let error = routed(&mesh(unchanged, ["10.0.0.1"]), "10.96.0.1:81").unwrap_err();
    assert_eq!(
        error,
        RouteError::NoPort { service: "default/web.default.svc.cluster.local".to_owned(), port: 81 }
    );
}

#[test]
fn the_dialled_family_is_preferred_and_the_service_may_force_one() {
    let both = |_: usize, pod: &mut Workload| pod.addresses = [ip("10.0.0.1"), ip("fd00::1")].into();
    let mut web = service("web", "10.96.0.1");
    web.vips.push(("".into(), ip("fd96::1")));
    let mesh = mesh_with(web.clone(), both, ["10.0.0.1"]);
    assert_eq!(routed(&mesh, "10.96.0.1:80").unwrap().target.ip(), ip("10.0.0.1"));
    assert_eq!(routed(&mesh, "[fd96::1]:80").unwrap().target.ip(), ip("fd00::1"));
    let only_v6 = Service { ip_families: IpFamilies::IPv6, ..web };
    let mesh = mesh_with(only_v6, both, ["10.0.0.1"]);
    assert_eq!(routed(&mesh, "10.96.0.1:80").unwrap().target.ip(), ip("fd00::1"));
}

/// A mesh with service `web` of pod 10.0.0.1, a pod `waypoint-0` at 10.0.8.8 and its service at
/// 10.96.8.8.
#[test]
fn an_endpoint_of_another_network_serves_nobody_here() {
    let east = |n: usize, pod: &mut Workload| {
        if n == 0 {
            pod.network = "east".into();
        }
    };
    let both = mesh(east, ["10.0.0.1", "10.0.0.2"]);
    for _ in 0..20 {
        assert_eq!(routed(&both, "10.96.0.1:80").unwrap().target.ip(), ip("10.0.0.2"));
    }
    let error = routed(&mesh(east, ["10.0.0.1"]), "10.96.0.1:80").unwrap_err();
    assert!(matches!(error, RouteError::NoGateway { .. }), "{error}");
    // The same address here is another host.
    assert_eq!(routed(&both, "10.0.0.1:80").unwrap().via, Via::Plain);
}

/// Endpoints 0 in network `east`, with the gateway that `gateway` names, and 1 here.
fn two_networks<const N: usize>(gateway: Option<&str>, endpoints: [&str; N]) -> Mesh {
    let other: Identity = "spiffe://cluster.local/ns/default/sa/other".parse().unwrap();
    let web = Service { subject_alt_names: vec![other], ..service("web", "10.96.0.1") };
    let mut pods: Vec<_> = endpoints
        .iter()
        .enumerate()
        .map(|(n, address)| {
            let mut pod = workload(&format!("web-{n}"), address);
            pod.services.insert(web.key(), Arc::new([].into()));
            if n == 0 {
                pod.network = "east".into();
                pod.addresses = [].into(); // as a control plane sums up another network
                pod.network_gateway = gateway.map(at);
            }
            pod
        })
        .collect();
    let mut gate = workload("gateway-0", "192.0.2.1");
    gate.network = "east".into();
    let mut entry = service("gateway", "10.96.7.7");
    entry.ports = [(15008, 15443)].into();
    gate.services.insert(entry.key(), Arc::new([].into()));
    pods.push(gate);
    Mesh::new(pods, [web, entry], [])
}

#[test]
fn another_network_is_reached_through_its_gateway_by_the_services_name() {
    for (name, peer) in [
        ("east/192.0.2.1", "192.0.2.1:15008"),
        ("/10.96.7.7", "192.0.2.1:15443"),
        ("default/gateway.default.svc.cluster.local", "192.0.2.1:15443"),
    ] {
        let route = routed(&two_networks(Some(name), ["10.0.0.1"]), "10.96.0.1:80").unwrap();
        assert_eq!(
            route.via,
            Via::Gateway {
                peer: peer.parse().unwrap(),
                authority: "web.default.svc.cluster.local:80".to_owned(),
                expected: vec!["spiffe://cluster.local/ns/default/sa/gateway".parse().unwrap()],
                inner_expected: ["other", "web"]
                    .map(|name| format!("spiffe://cluster.local/ns/default/sa/{name}").parse().unwrap())
                    .into(),
            },
            "{name}"
        );
        assert_eq!(&*route.workload.unwrap().name, "gateway-0");
    }
}

#[test]
fn another_network_is_the_last_resort() {
    let both = two_networks(Some("east/192.0.2.1"), ["10.0.0.1", "10.0.0.2"]);
    for _ in 0..20 {
        assert_eq!(routed(&both, "10.96.0.1:80").unwrap().target.ip(), ip("10.0.0.2"));
    }
}

#[test]
fn a_gateway_that_is_not_known_is_an_error() {
    let error = routed(&two_networks(None, ["10.0.0.1"]), "10.96.0.1:80").unwrap_err();
    assert_eq!(error.reason(), FailureReason::NoGateway, "{error}");
    let error = routed(&two_networks(Some("east/192.0.2.9"), ["10.0.0.1"]), "10.96.0.1:80").unwrap_err();
    assert_eq!(error.reason(), FailureReason::UnknownGateway, "{error}");
}

#[test]
fn a_service_that_is_passed_through_keeps_the_dialled_address() {
    let passed = |vip: &str| Service {
        load_balancing: LoadBalancing { mode: LbMode::Passthrough, ..LoadBalancing::default() },
        ..service("web", vip)
    };
    // To a pod's own address: by HBONE, whatever ports the service names.
    let mesh = mesh_with(passed("10.0.0.2"), unchanged, ["10.0.0.1", "10.0.0.2"]);
    let route = routed(&mesh, "10.0.0.2:9999").unwrap();
    assert_eq!(
        request_of(&route),
        ("10.0.0.2:15008".into(), "10.0.0.2:9999", route.workload.as_ref().unwrap().identity().to_string())
    );
    assert_eq!(&*route.service.unwrap().name, "web");
    // To nobody's: plainly.
    let mesh = mesh_with(passed("203.0.113.1"), unchanged, ["10.0.0.1"]);
    let route = routed(&mesh, "203.0.113.1:443").unwrap();
    assert_eq!((route.target, route.via), ("203.0.113.1:443".parse().unwrap(), Via::Plain));
}

#[test]
fn a_service_of_another_namespace_alone_is_not_there() {
    let hidden = Service { visibility: Visibility::Namespace, ..service("web", "10.96.0.1") };
    let mesh = mesh_with(hidden, unchanged, ["10.0.0.1"]);
    assert!(routed(&mesh, "10.96.0.1:80").unwrap().service.is_some());
    let stranger = but(workload("client", "10.0.9.9"), |common| common.namespace = "shop".into());
    let mut rng = StdRng::seed_from_u64(7);
    let route = outbound(&mesh, &stranger, "10.96.0.1:80".parse().unwrap(), &mut rng).unwrap();
    assert!(route.service.is_none() && route.via == Via::Plain);
}

#[test]
fn a_host_network_pod_is_an_endpoint_but_its_address_is_the_nodes() {
    let host = |_: usize, pod: &mut Workload| {
        pod.host_network = true;
        pod.protocol = Protocol::Tcp;
    };
    let mesh = mesh(host, ["192.168.0.1"]);
    assert!(routed(&mesh, "192.168.0.1:80").unwrap().workload.is_none());
    assert_eq!(routed(&mesh, "10.96.0.1:80").unwrap().target, "192.168.0.1:8080".parse().unwrap());
}

#[test]
fn an_endpoint_known_by_name_alone_is_to_be_looked_up() {
    let named = |_: usize, pod: &mut Workload| {
        pod.addresses = [].into();
        pod.hostname = Some("db.example".into());
    };
    let mesh = mesh(named, ["10.0.0.1"]);
    let (client, mut rng) = (workload("client", "10.0.9.9"), StdRng::seed_from_u64(7));
    let found = super::outbound(
        &MeshView::complete(&mesh),
        &Source::told(client.into()),
        "10.96.0.1:80".parse().unwrap(),
        &Avoid::default(),
        &mut rng,
    )
    .unwrap();
    let OutboundDecision::Unlocated(unlocated) = found else { panic!("{found:?}") };
    assert_eq!(&*unlocated.hostname, "db.example");
    let route = unlocated.located(ip("192.0.2.7"));
    assert_eq!(request_of(&route).0, "192.0.2.7:15008");
    assert_eq!(request_of(&route).1, "192.0.2.7:8080");
}
