//! What a rule looks up and does not find is noted, so that it can be requested.

use super::*;

/// What is missing to route a connection to `to`.
fn missed(mesh: &Mesh, to: &str) -> Vec<String> {
    let (view, mut rng) = (MeshView::on_demand(mesh), StdRng::seed_from_u64(7));
    let _ = super::super::outbound(
        &view,
        &Source::told(workload("client", "10.0.9.9").into()),
        to.parse().unwrap(),
        &Avoid::default(),
        &mut rng,
    );
    view.into_missed()
}

#[test]
fn of_an_empty_mesh_the_destination_is_missed() {
    for (to, name) in
        [("1.1.1.1:443", "/1.1.1.1"), ("[::ffff:1.1.1.1]:443", "/1.1.1.1"), ("[fd00::1]:1", "/fd00::1")]
    {
        assert_eq!(missed(&Mesh::default(), to), [name]);
    }
}

#[test]
fn what_is_known_as_a_whole_is_not_missed() {
    let mesh = mesh(unchanged, ["10.0.0.1"]);
    for to in ["10.0.0.1:80", "10.96.0.1:80", "10.96.0.1:81"] {
        assert!(missed(&mesh, to).is_empty(), "{to}");
    }
    // Hidden is not unknown.
    let hidden = Service {
        visibility: Visibility::Namespace,
        namespace: "shop".into(),
        ..service("web", "10.96.0.1")
    };
    assert!(missed(&Mesh::new([], [hidden], []), "10.96.0.1:80").is_empty());
}

#[test]
fn a_waypoint_is_missed_by_each_way_to_it() {
    let weighted = |name: &str, weight| WeightedWaypoint { destination: at(name), weight };
    let web = Service {
        weighted_waypoints: vec![weighted("/10.0.8.1", 0), weighted("/10.0.8.2", 1)],
        waypoint: Some(at("default/waypoint.example")),
        ..service("web", "10.96.0.1")
    };
    let mut pod = workload("web-0", "10.0.0.1");
    pod.waypoint = Some(at("/10.0.8.3"));
    let mesh = Mesh::new([pod], [web], []);
    assert_eq!(missed(&mesh, "10.96.0.1:80"), ["/10.0.8.1", "/10.0.8.2", "default/waypoint.example"]);
    assert_eq!(missed(&mesh, "10.0.0.1:80"), ["/10.0.8.3"]);
}

#[test]
fn the_gateway_of_the_chosen_endpoint_is_missed() {
    for name in ["east/192.0.2.9", "default/gone.example"] {
        assert_eq!(missed(&two_networks(Some(name), ["10.0.0.1"]), "10.96.0.1:80"), [name]);
    }
    for known in ["east/192.0.2.1", "/10.96.7.7", "default/gateway.default.svc.cluster.local"] {
        assert!(missed(&two_networks(Some(known), ["10.0.0.1"]), "10.96.0.1:80").is_empty(), "{known}");
    }
}
