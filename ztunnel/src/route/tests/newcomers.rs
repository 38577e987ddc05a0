//! A source that is not told yet: its connections go on unless their way depends on more of it.

use super::*;

/// The client, of which only the node agent has told. It has neither addresses nor services.
fn routed_new(mesh: &Mesh, to: &str, namespace: &str) -> Result<OutboundDecision, RouteError> {
    let new = but(workload("client", "10.0.9.9"), |common| common.namespace = namespace.into());
    let new = Source::newcomer(Workload { addresses: [].into(), ..new });
    let mut rng = StdRng::seed_from_u64(7);
    let to = to.parse().unwrap();
    super::super::outbound(&MeshView::complete(mesh), &new, to, &Avoid::default(), &mut rng)
}

#[test]
fn services_pods_and_strangers_are_reached_as_by_any_other() {
    let mesh = mesh(unchanged, ["10.0.0.1"]);
    for to in ["10.96.0.1:80", "10.0.0.1:8080", "1.1.1.1:443"] {
        let OutboundDecision::Route(new) = routed_new(&mesh, to, "default").unwrap() else { panic!("{to}") };
        let told = routed(&mesh, to).unwrap();
        assert_eq!((new.target, new.via), (told.target, told.via), "{to}");
    }
}

#[test]
fn a_waypoint_that_it_may_be_is_waited_for() {
    let behind = |gateway: &str| {
        let web = Service { waypoint: Some(at(gateway)), ..service("web", "10.96.0.1") };
        let mesh = mesh_with(web, |_, pod| pod.waypoint = Some(at(gateway)), ["10.0.0.1"]);
        let gate = service("gate", "10.96.0.9");
        let mut pod = workload("gate-0", "10.0.0.9");
        pod.services.insert(gate.key(), Arc::new([(15008, 15008)].into()));
        mesh.with([crate::mesh::MeshChange::PutService(gate), crate::mesh::MeshChange::PutWorkload(pod)])
    };
    for gateway in ["/10.96.0.9", "default/gate.default.svc.cluster.local", "/10.0.0.77"] {
        for to in ["10.96.0.1:80", "10.0.0.1:8080"] {
            let own = routed_new(&behind(gateway), to, "default");
            assert!(matches!(own, Err(RouteError::Untold)), "{gateway} {to}: {own:?}");
        }
    }
    // It cannot be one of the pods of a service of another namespace, nor one that is told.
    for (gateway, namespace) in [("/10.96.0.9", "shop"), ("/10.0.0.9", "default")] {
        let OutboundDecision::Route(route) = routed_new(&behind(gateway), "10.96.0.1:80", namespace).unwrap()
        else {
            panic!("{gateway}")
        };
        assert_eq!(request_of(&route).0, "10.0.0.9:15008");
    }
}

#[test]
fn the_gateway_of_another_network_is_asked_by_who_is_told() {
    let far = |_: usize, pod: &mut Workload| {
        pod.network = "far".into();
        pod.network_gateway = Some(at("far/192.0.2.1"));
    };
    let gateway = but(workload("gate-0", "192.0.2.1"), |common| common.network = "far".into());
    let mesh = mesh(far, ["10.0.0.1"]).with([crate::mesh::MeshChange::PutWorkload(gateway)]);
    assert!(matches!(routed(&mesh, "10.96.0.1:80").unwrap().via, Via::Gateway { .. }));
    let new = routed_new(&mesh, "10.96.0.1:80", "default");
    assert!(matches!(new, Err(RouteError::Untold)), "{new:?}");
}
