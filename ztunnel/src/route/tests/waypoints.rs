//! Destinations that have a waypoint, or that one answers for.

use super::*;

fn with_waypoint(change: impl Fn(&mut Service, &mut Workload)) -> Mesh {
    let (mut web, mut pod) = (service("web", "10.96.0.1"), workload("web-0", "10.0.0.1"));
    pod.services.insert(web.key(), Arc::new([].into()));
    change(&mut web, &mut pod);
    let mut gateway = service("waypoint", "10.96.8.8");
    gateway.ports = [(15008, 15008)].into();
    Mesh::new([pod, waypoint_pod()], [web, gateway], [])
}

fn waypoint_pod() -> Workload {
    let mut waypoint = workload("waypoint-0", "10.0.8.8");
    waypoint.services.insert(service("waypoint", "10.96.8.8").key(), Arc::new([].into()));
    waypoint
}

const WAYPOINT: &str = "spiffe://cluster.local/ns/default/sa/waypoint";
const NAMES: [&str; 3] = ["/10.0.8.8", "/10.96.8.8", "default/waypoint.default.svc.cluster.local"];

#[test]
fn a_pods_waypoint_is_asked_for_the_pods_address() {
    for name in NAMES {
        let mesh = with_waypoint(|_, pod| pod.waypoint = Some(at(name)));
        let route = routed(&mesh, "10.0.0.1:9999").unwrap();
        assert_eq!(request_of(&route), ("10.0.8.8:15008".into(), "10.0.0.1:9999", WAYPOINT.into()), "{name}");
        assert_eq!(&*route.workload.unwrap().name, "waypoint-0");
        assert!(route.service.is_none());
    }
}

#[test]
fn a_services_waypoint_is_asked_for_the_services_address() {
    for name in NAMES {
        let mesh = with_waypoint(|web, _| web.waypoint = Some(at(name)));
        let route = routed(&mesh, "10.96.0.1:80").unwrap();
        assert_eq!(request_of(&route), ("10.0.8.8:15008".into(), "10.96.0.1:80", WAYPOINT.into()), "{name}");
        assert_eq!(&*route.service.unwrap().name, "web");
        // The pod itself has none.
        let direct = routed(&mesh, "10.0.0.1:80").unwrap();
        assert_eq!(request_of(&direct).0, "10.0.0.1:15008");
    }
}

#[test]
fn a_waypoint_may_be_a_workload_with_a_host_name() {
    let mut pod = workload("web-0", "10.0.0.1");
    pod.waypoint = Some(at("default/waypoint.example"));
    let named = but(waypoint_pod(), |common| common.hostname = Some("waypoint.example".into()));
    let mesh = Mesh::new([pod, named], [], []);
    assert_eq!(request_of(&routed(&mesh, "10.0.0.1:80").unwrap()).0, "10.0.8.8:15008");
}

#[test]
fn traffic_to_a_service_never_uses_a_pods_waypoint() {
    let mesh = with_waypoint(|_, pod| pod.waypoint = Some(at("/10.0.8.8")));
    let route = routed(&mesh, "10.96.0.1:80").unwrap();
    assert_eq!(request_of(&route).0, "10.0.0.1:15008");
}

#[test]
fn what_a_waypoint_sends_is_not_sent_back_to_it() {
    for name in NAMES {
        let mesh = with_waypoint(|web, pod| {
            web.waypoint = Some(at(name));
            pod.waypoint = Some(at(name));
        });
        let mut rng = StdRng::seed_from_u64(7);
        let mut from = |source: &Workload, to: &str| {
            request_of(&outbound(&mesh, source, to.parse().unwrap(), &mut rng).unwrap()).0
        };
        for to in ["10.0.0.1:8080", "10.96.0.1:80"] {
            assert_eq!(from(&waypoint_pod(), to), "10.0.0.1:15008", "{name}");
            // Another pod with the waypoint's service account is an ordinary client.
            let mut same_account = workload("waypoint-imitator", "10.0.8.9");
            assert_eq!(same_account.identity(), waypoint_pod().identity());
            same_account.services.clear();
            assert_eq!(from(&same_account, to), "10.0.8.8:15008", "{name}");
        }
    }
}

#[test]
fn waypoints_share_by_weight_and_without_weights_the_single_one_takes_all() {
    let (a, b) = (workload("a", "10.0.8.1"), workload("b", "10.0.8.2"));
    let weighted = |name: &str, weight| WeightedWaypoint { destination: at(name), weight };
    let route_to = |weights: [u32; 2], single: Option<&str>| {
        let web = Service {
            weighted_waypoints: vec![weighted("/10.0.8.1", weights[0]), weighted("/10.0.8.2", weights[1])],
            waypoint: single.map(at),
            ..service("web", "10.96.0.1")
        };
        let mesh = Mesh::new([a.clone(), b.clone()], [web], []);
        let mut rng = StdRng::seed_from_u64(3);
        let mut count = HashMap::new();
        for _ in 0..2000 {
            let to = "10.96.0.1:80".parse().unwrap();
            let key = match outbound(&mesh, &workload("client", "10.0.9.9"), to, &mut rng) {
                Ok(route) => request_of(&route).0,
                Err(error) => error.reason().to_string(),
            };
            *count.entry(key).or_insert(0_u32) += 1;
        }
        count
    };
    let shared = route_to([1, 3], None);
    assert!(shared["10.0.8.1:15008"].abs_diff(500) < 80, "{shared:?}");
    assert_eq!(shared.len(), 2, "{shared:?}");
    assert_eq!(route_to([0, 1], None)["10.0.8.2:15008"], 2000);
    assert_eq!(route_to([0, 0], Some("/10.0.8.2"))["10.0.8.2:15008"], 2000);
    assert_eq!(route_to([0, 0], None)["no_waypoint"], 2000);
}

#[test]
fn a_waypoint_that_is_not_there_is_never_passed_by() {
    for name in ["/10.0.7.7", "default/nobody.example", "east/10.0.8.8"] {
        let mesh = with_waypoint(|web, pod| {
            web.waypoint = Some(at(name));
            pod.waypoint = Some(at(name));
        });
        for to in ["10.96.0.1:80", "10.0.0.1:80"] {
            let error = routed(&mesh, to).unwrap_err();
            assert_eq!(error.reason(), FailureReason::NoWaypoint, "{error}");
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}

#[test]
fn a_waypoint_of_another_network_is_out_of_reach() {
    for name in ["east/10.0.8.8", NAMES[1], NAMES[2]] {
        let mut pod = workload("web-0", "10.0.0.1");
        pod.waypoint = Some(at(name));
        let far = but(waypoint_pod(), |common| common.network = "east".into());
        let near = but(workload("waypoint-1", "10.0.8.9"), |common| {
            common.services = waypoint_pod().services.clone();
        });
        let mesh = |waypoints: &[&Workload]| {
            let pods = waypoints.iter().map(|waypoint| (*waypoint).clone()).chain([pod.clone()]);
            Mesh::new(pods, [service("waypoint", "10.96.8.8")], [])
        };
        // Its address is another host's here.
        let error = routed(&mesh(&[&far]), "10.0.0.1:80").unwrap_err();
        assert_eq!(error.reason(), FailureReason::NoWaypoint, "{name}");
        if !name.starts_with("east") {
            let route = routed(&mesh(&[&far, &near]), "10.0.0.1:80").unwrap();
            assert_eq!(request_of(&route).0, "10.0.8.9:15008", "{name}");
        }
    }
}
