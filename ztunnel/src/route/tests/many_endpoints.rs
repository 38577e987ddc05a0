//! The choice by what was prepared is the choice by a look at all endpoints: the same endpoints are
//! eligible, with the same shares.

use std::{collections::BTreeMap, hint::black_box, time::Instant};

use proptest::prelude::*;

use super::*;
use crate::{
    mesh::services::{IpFamilies, LbScope},
    route::{avoid::FailedEndpoints, balance},
};

/// An endpoint, as a test draws it.
#[expect(clippy::struct_excessive_bools, reason = "each is drawn for itself")]
#[derive(Clone, Copy, Debug)]
struct Drawn {
    zone: bool,
    region: bool,
    node: bool,
    near: bool,
    healthy: bool,
    has_v4: bool,
    has_port: bool,
    weight: u32,
    failed: bool,
    tried: bool,
}

fn drawn() -> impl Strategy<Value = Drawn> {
    let place = (any::<bool>(), any::<bool>(), any::<bool>(), prop::bool::weighted(0.8));
    let state = (prop::bool::weighted(0.8), prop::bool::weighted(0.8), prop::bool::weighted(0.9));
    let avoided = (prop::bool::weighted(0.2), prop::bool::weighted(0.1));
    (place, state, prop::sample::select(vec![0, 1, 1, 3]), avoided).prop_map(
        |((zone, region, node, near), (healthy, has_v4, has_port), weight, (failed, tried))| Drawn {
            zone,
            region,
            node,
            near,
            healthy,
            has_v4,
            has_port,
            weight,
            failed,
            tried,
        },
    )
}

fn endpoint(n: usize, drawn: Drawn, web: &Service) -> Workload {
    let mut pod = workload(&format!("web-{n}"), "10.0.0.1");
    let (v4, v6) = (format!("10.0.0.{}", n + 1), format!("fd00::{:x}", n + 1));
    pod.addresses = if drawn.has_v4 { [ip(&v4), ip(&v6)].into() } else { [ip(&v6)].into() };
    (pod.healthy, pod.capacity) = (drawn.healthy, drawn.weight);
    if !drawn.node {
        pod.node = "elsewhere".into();
    }
    let ports = if drawn.has_port { [(80, 8080)].into() } else { [].into() };
    pod.services.insert(web.key(), Arc::new(ports));
    let other = |is_same: bool| if is_same { "" } else { "other" };
    pod.locality.zone = other(drawn.zone).into();
    pod.locality.region = other(drawn.region).into();
    pod.network = other(drawn.near).into();
    pod
}

const DRAWS: u32 = 4000;

/// How often each was chosen.
fn shares(mut choose: impl FnMut() -> Option<String>) -> BTreeMap<Option<String>, u32> {
    let mut shares = BTreeMap::new();
    for _ in 0..DRAWS {
        *shares.entry(choose()).or_default() += 1;
    }
    shares
}

fn candidate<'a>(
    endpoint: &'a Endpoint,
    client: &Workload,
    web: &Service,
    original: SocketAddr,
) -> Option<Candidate<Reach<'a>>> {
    let rank = balance::rank(client, &endpoint.workload, &web.load_balancing)?;
    let way = Reach::of(endpoint, client, web, original)?;
    let at = if let Reach::Here(at) = way { at } else { NOWHERE };
    Some(Candidate { rank, at, way })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn what_was_prepared_chooses_as_a_look_at_all(
        all in prop::collection::vec(drawn(), 0..24),
        mode in prop::sample::select(vec![LbMode::Standard, LbMode::Strict, LbMode::Failover]),
        preferences in prop::sample::subsequence(
            vec![LbScope::Region, LbScope::Zone, LbScope::Node, LbScope::Network],
            0..=3,
        ),
        allows_unhealthy in any::<bool>(),
        families in prop::sample::select(vec![IpFamilies::Any, IpFamilies::IPv4]),
        named_port in any::<bool>(),
    ) {
        let health_policy = if allows_unhealthy { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
        let web = Service {
            ports: [(80, if named_port { 0 } else { 8080 })].into(),
            ip_families: families,
            load_balancing: LoadBalancing { preferences, mode, health_policy },
            ..service("web", "10.96.0.1")
        };
        let pods = all.iter().enumerate().map(|(n, drawn)| endpoint(n, *drawn, &web));
        let mesh = Mesh::new(pods.collect::<Vec<_>>(), [web.clone()], []);
        let web = mesh.service(&web.key()).unwrap();
        let (client, original) = (workload("client", "10.0.9.9"), "10.96.0.1:80".parse::<SocketAddr>().unwrap());
        let failed = FailedEndpoints::default();
        let mut tried = Vec::new();
        for (n, drawn) in all.iter().enumerate() {
            for ip in [format!("10.0.0.{}", n + 1), format!("fd00::{:x}", n + 1)] {
                let at = SocketAddr::new(ip.parse().unwrap(), 8080);
                if drawn.failed {
                    failed.add(at);
                }
                if drawn.tried {
                    tried.push(at);
                }
            }
        }
        let asked = Question {
            service: web,
            client: &client,
            port: 80,
            is_ipv4: true,
            purpose: Purpose::Server,
        };
        let endpoints = mesh.endpoints(&web.key());
        let mut rng = StdRng::seed_from_u64(11);
        for tried in [&[][..], &tried] {
            let avoid = Avoid { tried, failed: Some(&failed) };
            let name = |(endpoint, _): (&Endpoint, _)| endpoint.workload.name.to_string();
            let of = |endpoint| candidate(endpoint, &client, web, original);
            let by_look = shares(|| balance::pick_of_all(endpoints, of, &avoid, &mut rng).map(name));
            let prepared = shares(|| balance::pick(endpoints, &asked, of, &avoid, &mut rng).map(name));
            let who = |shares: &BTreeMap<_, u32>| shares.keys().cloned().collect::<Vec<Option<String>>>();
            prop_assert_eq!(who(&by_look), who(&prepared));
            for (who, share) in &by_look {
                // Six standard deviations, of both.
                prop_assert!(share.abs_diff(prepared[who]) < 280, "{:?} {:?}", by_look, prepared);
            }
        }
    }
}

/// Prints what a route to a service costs, by how many endpoints the service has.
#[test]
fn a_service_with_many_endpoints_costs_what_one_with_few_does() {
    const ROUNDS: u32 = 2000;
    let (client, mut rng) = (workload("client", "10.0.9.9"), StdRng::seed_from_u64(7));
    let source = Source::told(client.into());
    let original: SocketAddr = "10.96.0.1:80".parse().unwrap();
    let mut nanos = |count: usize, weights: u32| {
        let web = Service {
            load_balancing: LoadBalancing {
                mode: LbMode::Failover,
                preferences: vec![LbScope::Region, LbScope::Zone],
                ..LoadBalancing::default()
            },
            ..service("web", "10.96.0.1")
        };
        let pods = (0..count).map(|n| {
            let mut pod = workload(&format!("web-{n}"), &format!("10.{}.{}.1", 1 + n / 250, n % 250));
            pod.capacity = 1 + u32::try_from(n).unwrap() % weights;
            pod.services.insert(web.key(), Arc::new([].into()));
            pod
        });
        let mesh = Mesh::new(pods.collect::<Vec<_>>(), [web.clone()], []);
        let failed = FailedEndpoints::default();
        let avoid = Avoid { tried: &[], failed: Some(&failed) };
        let fastest = (0..5).map(|_| {
            let began = Instant::now();
            for _ in 0..ROUNDS {
                let view = MeshView::complete(&mesh);
                black_box(super::super::outbound(&view, &source, original, &avoid, &mut rng).unwrap());
            }
            began.elapsed() / ROUNDS
        });
        fastest.min().unwrap().as_nanos()
    };
    println!("endpoints  same weights  different weights");
    for count in [2, 10, 100, 1000, 10_000] {
        println!("{count:9} {:10} ns {:14} ns", nanos(count, 1), nanos(count, 3));
    }
    let (few, many) = (nanos(10, 3), nanos(10_000, 3));
    assert!(many < 5 * few, "{few} ns for 10 endpoints, {many} ns for 10,000");
}
