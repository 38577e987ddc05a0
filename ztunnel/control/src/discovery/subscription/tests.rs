//! What a tunnel is told, from its requests and two snapshots.

use std::time::Instant;

use ztunnel_api::workload::{NetworkAddress, PortList, Service, Workload};

use super::*;
use crate::snapshot::{NamespaceResources, Resources};

const WEB: &str = "demo/web.demo.svc";

fn workload(uid: &str, address: u8, node: &str, service: Option<&str>) -> Resource {
    Resource::workload(Workload {
        uid: uid.to_owned(),
        addresses: vec![vec![10, 0, 0, address]],
        node: node.to_owned(),
        services: service.map(|key| (key.to_owned(), PortList::default())).into_iter().collect(),
        ..Workload::default()
    })
}

fn web() -> Resource {
    Resource::service(Service {
        namespace: "demo".to_owned(),
        hostname: "web.demo.svc".to_owned(),
        addresses: vec![NetworkAddress { address: vec![10, 96, 0, 1], ..NetworkAddress::default() }],
        ..Service::default()
    })
}

fn snapshot(number: u64, resources: Vec<Resource>) -> Arc<Snapshot> {
    let addresses: Resources =
        resources.into_iter().map(|one| (one.name().to_owned(), Arc::new(one))).collect();
    let namespace = NamespaceResources { addresses, ..NamespaceResources::default() };
    let namespaces = [("demo".to_owned(), Arc::new(namespace))].into();
    Arc::new(Snapshot::new(number, Instant::now(), namespaces))
}

fn request(subscribe: &[&str], unsubscribe: &[&str]) -> DeltaDiscoveryRequest {
    let texts = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    DeltaDiscoveryRequest {
        resource_names_subscribe: texts(subscribe),
        resource_names_unsubscribe: texts(unsubscribe),
        ..DeltaDiscoveryRequest::default()
    }
}

fn first(mut request: DeltaDiscoveryRequest) -> Subscription {
    Subscription::first(ResourceType::Address, "a".to_owned(), &mut request).unwrap()
}

/// Names of what is changed and removed.
fn told(subscription: &mut Subscription, snapshot: &Arc<Snapshot>) -> Option<(Vec<String>, Vec<String>)> {
    let Difference { changed, mut removed } = subscription.next(snapshot)?;
    let mut changed: Vec<String> = changed.iter().map(|one| one.name().to_owned()).collect();
    changed.sort();
    removed.sort();
    Some((changed, removed))
}

/// As [`told`] has them.
fn names(changed: &[&str], removed: &[&str]) -> (Vec<String>, Vec<String>) {
    let texts = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    (texts(changed), texts(removed))
}

#[test]
fn everything_and_then_only_changes() {
    let mut all = first(request(&[], &[]));
    let one = snapshot(1, vec![workload("p", 1, "a", None), workload("q", 2, "b", None)]);
    assert_eq!(told(&mut all, &one), Some(names(&["p", "q"], &[])));
    assert_eq!(told(&mut all, &one), None);
    let two = snapshot(2, vec![workload("p", 9, "a", None), workload("r", 3, "b", None)]);
    assert_eq!(told(&mut all, &two), Some(names(&["p", "r"], &["q"])));
}

#[test]
fn whoever_comes_back_is_told_what_differs() {
    let one = snapshot(1, vec![workload("p", 1, "a", None), workload("q", 2, "b", None)]);
    let version = |name: &str| one.addresses_named(name)[0].version().to_owned();
    let versions = [("p", version("p")), ("q", "old".to_owned()), ("gone", "1".to_owned())];
    let mut back = request(&[], &[]);
    back.initial_resource_versions =
        versions.into_iter().map(|(name, version)| (name.to_owned(), version)).collect();
    assert_eq!(told(&mut first(back), &one), Some(names(&["q"], &["gone"])));

    // A first response is sent in any case: the tunnel waits for it.
    let mut back = request(&[], &[]);
    back.initial_resource_versions =
        ["p", "q"].into_iter().map(|name| (name.to_owned(), version(name))).collect();
    let mut back = first(back);
    assert_eq!(told(&mut back, &one), Some(names(&[], &[])));
    assert_eq!(told(&mut back, &one), None);
}

#[test]
fn on_demand_is_what_was_asked_for_and_the_own_node() {
    let mut some = first(request(&["*"], &["*"]));
    let one = snapshot(1, vec![web(), workload("p", 1, "a", None), workload("q", 2, "b", Some(WEB))]);
    assert_eq!(told(&mut some, &one), Some(names(&["p"], &[])));

    // By address of the service: the service and its endpoints.
    assert!(some.change(&mut request(&["/10.96.0.1"], &[])).unwrap());
    assert_eq!(told(&mut some, &one), Some(names(&[WEB, "q"], &[])));
    // What nobody has is answered as gone, each time that it is asked for.
    for _ in 0..2 {
        some.change(&mut request(&["/10.0.0.77"], &[])).unwrap();
        assert_eq!(told(&mut some, &one), Some(names(&[], &["/10.0.0.77"])));
    }
    assert_eq!(told(&mut some, &one), None);

    // It appears, and another endpoint leaves.
    let two = snapshot(2, vec![web(), workload("p", 1, "a", None), workload("late", 77, "b", None)]);
    assert_eq!(told(&mut some, &two), Some(names(&["late"], &["q"])));
    assert!(!some.change(&mut request(&[], &["/10.0.0.77"])).unwrap());
    assert_eq!(told(&mut some, &two), Some(names(&[], &["late"])));
}

/// While one pod ends and another gets its address, both have it.
#[test]
fn two_workloads_with_one_address_are_both_told_until_one_is_gone() {
    let mut some = first(request(&["*"], &["*"]));
    let both = || snapshot(1, vec![workload("old", 7, "b", None), workload("new", 7, "c", None)]);
    some.change(&mut request(&["/10.0.0.7"], &[])).unwrap();
    assert_eq!(told(&mut some, &both()), Some(names(&["new", "old"], &[])));
    let one = snapshot(2, vec![workload("new", 7, "c", None)]);
    assert_eq!(told(&mut some, &one), Some(names(&[], &["old"])));
}

#[test]
fn everything_can_be_had_later_and_given_up() {
    let one = snapshot(1, vec![workload("p", 1, "a", None), workload("q", 2, "b", None)]);
    let mut some = first(request(&["*"], &["*"]));
    assert_eq!(told(&mut some, &one), Some(names(&["p"], &[])));
    assert!(some.change(&mut request(&["*"], &[])).unwrap());
    assert_eq!(told(&mut some, &one), Some(names(&["q"], &[])));
    some.change(&mut request(&[], &["*"])).unwrap();
    assert_eq!(told(&mut some, &one), Some(names(&[], &["q"])));
}

#[test]
fn names_have_a_budget() {
    let mut all = first(request(&[], &[]));
    let long = "x".repeat(LONGEST_NAME + 1);
    assert_eq!(all.change(&mut request(&[&long], &[])), Err(TooMuch));
    let names = (0..=MOST_NAMES).map(|number| number.to_string()).collect();
    let mut many =
        DeltaDiscoveryRequest { resource_names_subscribe: names, ..DeltaDiscoveryRequest::default() };
    assert_eq!(all.change(&mut many), Err(TooMuch));
}

/// So Istio's tunnel comes back: what it asked for is named among what it has, and nowhere else.
#[test]
fn what_a_tunnel_has_it_goes_on_wanting() {
    let elsewhere = || workload("Kubernetes//Pod/demo/far", 9, "b", None);
    let mut request = request(&["*"], &["*"]);
    let held =
        [elsewhere().name(), "Kubernetes//Pod/demo/never"].map(|name| (name.to_owned(), String::new()));
    request.initial_resource_versions = held.into();
    let mut subscription = first(request);
    let now = snapshot(1, vec![elsewhere(), workload("Kubernetes//Pod/demo/other", 8, "b", None)]);
    let (changed, removed) = told(&mut subscription, &now).unwrap();
    assert_eq!(changed, [elsewhere().name()]);
    assert_eq!(removed, ["Kubernetes//Pod/demo/never"]);
    let (_, removed) = told(&mut subscription, &snapshot(2, vec![])).unwrap();
    assert_eq!(removed, [elsewhere().name()]);
}

/// Whatever happens in whatever order, what a tunnel is told adds up to what it wants, as if that
/// were found anew each time.
#[test]
fn what_is_told_of_names_adds_up() {
    let mut random = 1_u32;
    let mut random = |below: u32| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 16) % below
    };
    for round in 0..200 {
        let mut some = first(request(&["*"], &["*"]));
        let mut names = BTreeSet::new();
        let mut held: BTreeMap<String, String> = BTreeMap::new();
        let mut at = snapshot(0, vec![]);
        for number in 1..30 {
            if random(2) == 0 {
                let mut all = Vec::new();
                for pod in 0..6 {
                    let (node, service) = (random(2), (random(2) == 0).then_some(WEB));
                    let address = u8::try_from(random(4)).unwrap();
                    if random(3) > 0 {
                        all.push(workload(&format!("p{pod}"), address, ["a", "b"][node as usize], service));
                    }
                }
                if random(2) == 0 {
                    all.push(web());
                }
                at = snapshot(number, all);
            }
            let asked = ["p1", "p2", WEB, "/10.96.0.1", "/10.0.0.1", "/10.0.0.3", "nobody"];
            for _ in 0..random(3) {
                let name = asked[random(7) as usize];
                if random(3) > 0 {
                    names.insert(name.to_owned());
                    some.change(&mut request(&[name], &[])).unwrap();
                } else {
                    names.remove(name);
                    some.change(&mut request(&[], &[name])).unwrap();
                }
            }
            if let Some(difference) = some.next(&at) {
                for gone in difference.removed {
                    held.remove(&gone);
                }
                let changed = difference.changed.iter();
                held.extend(changed.map(|one| (one.name().to_owned(), one.version().to_owned())));
            }
            let wanted = Wanted { of: ResourceType::Address, names: &names, node: "a" };
            let (_, expected) = Named::new(wanted, &at);
            let expected: BTreeMap<String, String> =
                expected.values().map(|one| (one.name().to_owned(), one.version().to_owned())).collect();
            assert_eq!(held, expected, "round {round}, step {number}, {names:?}");
        }
    }
}

/// Found anew with each name, this would be a thousand million look-ups: minutes.
#[test]
fn a_tunnel_that_has_met_many_names_costs_no_more_with_each() {
    let all: Vec<Resource> = (0..40_000).map(|number| workload(&number.to_string(), 1, "b", None)).collect();
    let one = snapshot(1, all);
    let mut some = first(request(&["*"], &["*"]));
    let began = Instant::now();
    some.next(&one);
    for number in 0..40_000 {
        some.change(&mut request(&[&number.to_string()], &[])).unwrap();
        assert_eq!(told(&mut some, &one), Some(names(&[&number.to_string()], &[])));
    }
    assert!(began.elapsed().as_secs() < 30, "{:?}", began.elapsed());
}
