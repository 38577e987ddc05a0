use std::collections::HashMap;

use rand::{SeedableRng, rngs::StdRng};

use super::*;
use crate::mesh::{
    GatewayAddress,
    services::LoadBalancing,
    tests::{ip, service, workload},
};

/// Endpoints of service `web` at 10.96.0.1:80 → 8080; `change` turns plain ones into what a test needs.
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
        endpoint.services.insert(web.key(), [].into());
        change(n, &mut endpoint);
        endpoint
    });
    Mesh::new(endpoints.collect::<Vec<_>>(), [web], [])
}

fn routed(mesh: &Mesh, to: &str) -> Result<OutboundRoute, RouteError> {
    let mut rng = StdRng::seed_from_u64(7);
    outbound(mesh, &workload("client", "10.0.9.9"), to.parse().unwrap(), &mut rng)
}

fn waypoint() -> GatewayAddress {
    GatewayAddress { destination: "/10.0.8.8".parse().unwrap(), hbone_mtls_port: 15008 }
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
        mesh(|_, pod| pod.addresses.clear(), ["10.0.0.1"]),
        mesh_with(
            Service { ports: [(80, 0)].into(), ..service("web", "10.96.0.1") },
            unchanged, // and so without a mapping of the named port
            ["10.0.0.1"],
        ),
    ] {
        let error = routed(&none, "10.96.0.1:80").unwrap_err();
        assert!(error.to_string().starts_with("no healthy upstream"), "{error}");
        assert_eq!(error.reason(), "no_healthy_upstream");
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
    let both = |_: usize, pod: &mut Workload| pod.addresses = vec![ip("10.0.0.1"), ip("fd00::1")];
    let mut web = service("web", "10.96.0.1");
    web.vips.push(("".into(), ip("fd96::1")));
    let mesh = mesh_with(web.clone(), both, ["10.0.0.1"]);
    assert_eq!(routed(&mesh, "10.96.0.1:80").unwrap().target.ip(), ip("10.0.0.1"));
    assert_eq!(routed(&mesh, "[fd96::1]:80").unwrap().target.ip(), ip("fd00::1"));
    let only_v6 = Service { ip_families: crate::mesh::services::IpFamilies::IPv6, ..web };
    let mesh = mesh_with(only_v6, both, ["10.0.0.1"]);
    assert_eq!(routed(&mesh, "10.96.0.1:80").unwrap().target.ip(), ip("fd00::1"));
}

#[test]
fn what_needs_a_waypoint_fails_instead_of_going_around_it() {
    let mesh = mesh(|_, pod| pod.waypoint = Some(Box::new(waypoint())), ["10.0.0.1"]);
    assert!(matches!(routed(&mesh, "10.0.0.1:80"), Err(RouteError::Waypoint { .. })));
    // Traffic to a service never uses a workload's waypoint.
    routed(&mesh, "10.96.0.1:80").unwrap();
    let web = Service { waypoint: Some(waypoint()), ..service("web", "10.96.0.1") };
    let mesh = mesh_with(web, unchanged, ["10.0.0.1"]);
    assert!(matches!(routed(&mesh, "10.96.0.1:80"), Err(RouteError::Waypoint { .. })));
}

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
    assert!(matches!(error, RouteError::RemoteNetwork { .. }), "{error}");
    // The same address here is another host.
    assert_eq!(routed(&both, "10.0.0.1:80").unwrap().via, Via::Plain);
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
