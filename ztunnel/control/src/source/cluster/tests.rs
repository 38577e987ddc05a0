//! What follows from changes: one snapshot of exactly what differs.

use std::net::IpAddr;

use super::*;
use crate::{
    objects::{
        Labels,
        peer_authentication::Mode,
        policy::{Action, Content},
    },
    report::PolicyKind,
    snapshot::ResourceType,
};

fn key(namespace: &str, name: &str) -> ObjectKey {
    ObjectKey { namespace: namespace.to_owned(), name: name.to_owned() }
}

fn pod(name: &str, address: &str) -> Pod {
    let addresses = vec![address.parse::<IpAddr>().unwrap()];
    Pod { name: name.to_owned(), addresses, node: "a".to_owned(), ..Pod::default() }
}

fn listed<T>(all: Vec<(ObjectKey, T)>) -> Update<T> {
    Update::Listed(all.into_iter().collect())
}

/// Everything was listed; there are two pods.
fn cluster() -> Cluster {
    let mut cluster = Cluster::new(MeshSettings::default());
    let pods = vec![(key("demo", "p"), pod("p", "10.0.0.1")), (key("other", "q"), pod("q", "10.0.0.2"))];
    cluster.apply(Change::Pods(listed(pods)));
    cluster.apply(Change::Nodes(listed(vec![])));
    cluster.apply(Change::Services(listed(vec![])));
    cluster.apply(Change::Slices(listed(vec![])));
    cluster.apply(Change::Distributions(listed(vec![])));
    cluster.apply(Change::AuthorizationPolicies(listed(vec![])));
    cluster.apply(Change::AccessPolicies(listed(vec![])));
    assert_eq!(cluster.listed(), KINDS - 1);
    cluster.apply(Change::PeerAuthentications(listed(vec![])));
    assert_eq!(cluster.listed(), KINDS);
    cluster
}

fn next(cluster: &mut Cluster) -> Option<Snapshot> {
    cluster.snapshot(Instant::now())
}

fn names(snapshot: &Snapshot, of: ResourceType) -> Vec<&str> {
    snapshot.all(of).map(|resource| resource.name()).collect()
}

const P: &str = "Kubernetes//Pod/demo/p";
const Q: &str = "Kubernetes//Pod/other/q";

#[test]
fn a_snapshot_has_everything_and_the_next_one_shares_what_stays() {
    let mut cluster = cluster();
    let first = next(&mut cluster).unwrap();
    assert_eq!(names(&first, ResourceType::Address), [P, Q]);
    assert!(next(&mut cluster).is_none(), "nothing changed");

    cluster.apply(Change::Pods(Update::One(key("demo", "p"), Some(pod("p", "10.0.0.1")))));
    assert!(next(&mut cluster).is_none(), "the same again");
    cluster.apply(Change::Pods(Update::One(key("demo", "p"), Some(pod("p", "10.0.0.9")))));
    let second = next(&mut cluster).unwrap();
    let difference = second.since(&first, ResourceType::Address);
    assert_eq!(difference.changed.iter().map(|one| one.name()).collect::<Vec<_>>(), [P]);
    assert!(difference.removed.is_empty() && second.number > first.number);
    assert!(Arc::ptr_eq(&first.namespaces["other"], &second.namespaces["other"]));

    cluster.apply(Change::Pods(Update::One(key("demo", "p"), None)));
    let third = next(&mut cluster).unwrap();
    let difference = third.since(&second, ResourceType::Address);
    assert_eq!((difference.changed.len(), &difference.removed), (0, &vec![P.to_owned()]));
    assert!(!third.namespaces.contains_key("demo"));
}

#[test]
fn what_a_new_list_lacks_is_gone() {
    let mut cluster = cluster();
    next(&mut cluster);
    cluster.apply(Change::Pods(listed(vec![(key("other", "q"), pod("q", "10.0.0.2"))])));
    assert_eq!(names(&next(&mut cluster).unwrap(), ResourceType::Address), [Q]);
}

#[test]
fn a_node_that_gets_a_zone_moves_its_pods() {
    let mut cluster = cluster();
    let first = next(&mut cluster).unwrap();
    let locality = NodeLocality { zone: "z".to_owned(), ..NodeLocality::default() };
    cluster.apply(Change::Nodes(Update::One(key("", "b"), Some(locality.clone()))));
    assert!(next(&mut cluster).is_none(), "nobody runs there");
    cluster.apply(Change::Nodes(Update::One(key("", "a"), Some(locality))));
    let second = next(&mut cluster).unwrap();
    assert_eq!(second.since(&first, ResourceType::Address).changed.len(), 2);
}

#[test]
fn a_policy_of_the_root_namespace_is_named_everywhere() {
    let mut cluster = cluster();
    let first = next(&mut cluster).unwrap();
    let labels: Labels = [("app".to_owned(), "web".to_owned())].into();
    cluster.apply(Change::Pods(Update::One(
        key("demo", "p"),
        Some(Pod { labels: labels.clone(), ..pod("p", "10.0.0.1") }),
    )));
    let policy = AuthorizationPolicy {
        name: "r".to_owned(),
        selector: Some(labels),
        content: Content::Rules { action: Action::Deny, rules: vec![] },
        ..AuthorizationPolicy::default()
    };
    cluster.apply(Change::AuthorizationPolicies(Update::One(key("adit-system", "r"), Some(policy))));
    let second = next(&mut cluster).unwrap();
    assert_eq!(names(&second, ResourceType::Authorization), ["adit-system/r"]);
    assert_eq!(second.since(&first, ResourceType::Address).changed[0].name(), P);
    assert_eq!(cluster.unenforceable(), 0);
}

#[test]
fn the_fixed_strict_policy_comes_and_goes_with_the_peer_authentications() {
    let mut cluster = cluster();
    next(&mut cluster);
    let peer =
        PeerAuthentication { name: "s".to_owned(), mode: Mode::Strict, ..PeerAuthentication::default() };
    cluster.apply(Change::PeerAuthentications(Update::One(key("demo", "s"), Some(peer))));
    let strict = next(&mut cluster).unwrap();
    let fixed = "adit-system/istio_converted_static_strict";
    assert_eq!(names(&strict, ResourceType::Authorization), [fixed]);
    cluster.apply(Change::PeerAuthentications(Update::One(key("demo", "s"), None)));
    let after = next(&mut cluster).unwrap();
    assert_eq!(names(&after, ResourceType::Authorization), [""; 0]);
}

#[test]
fn a_policy_that_is_not_understood_is_counted_until_it_is() {
    let mut cluster = cluster();
    next(&mut cluster);
    let policy =
        |content| AuthorizationPolicy { name: "x".to_owned(), content, ..AuthorizationPolicy::default() };
    let unreadable = policy(Content::Unreadable("why".to_owned()));
    cluster.apply(Change::AuthorizationPolicies(Update::One(key("demo", "x"), Some(unreadable))));
    next(&mut cluster).unwrap();
    assert_eq!(cluster.unenforceable(), 1);
    let readable = policy(Content::Rules { action: Action::Allow, rules: vec![] });
    cluster.apply(Change::AuthorizationPolicies(Update::One(key("demo", "x"), Some(readable))));
    next(&mut cluster).unwrap();
    assert_eq!(cluster.unenforceable(), 0);
}

#[test]
fn ten_thousand_policies_are_all_told_and_one_that_changes_alone() {
    let mut cluster = cluster();
    let policy = |number: u32, action| {
        let selector = Labels::from([("app".to_owned(), format!("app-{}", number % 100))]);
        let (name, content) = (format!("p{number}"), Content::Rules { action, rules: vec![] });
        AuthorizationPolicy { name, selector: Some(selector), content, ..AuthorizationPolicy::default() }
    };
    let of = |number: u32| key(&format!("ns-{}", number / 200), &format!("p{number}"));
    let all = (0..10_000).map(|number| (of(number), policy(number, Action::Allow)));
    cluster.apply(Change::AuthorizationPolicies(listed(all.collect())));
    let pods = (0..1_000_u32).map(|number| {
        let [a, b] = [number / 250, number % 250];
        let labels = Labels::from([("app".to_owned(), format!("app-{}", number % 100))]);
        let name = format!("web-{number}");
        (key(&format!("ns-{}", number / 20), &name), Pod { labels, ..pod(&name, &format!("10.1.{a}.{b}")) })
    });
    cluster.apply(Change::Pods(listed(pods.collect())));
    let began = Instant::now();
    let first = next(&mut cluster).unwrap();
    assert!(began.elapsed().as_secs() < 30, "{:?}", began.elapsed());
    assert_eq!(names(&first, ResourceType::Authorization).len(), 10_000);

    cluster.apply(Change::AuthorizationPolicies(Update::One(of(7), Some(policy(7, Action::Deny)))));
    let second = next(&mut cluster).unwrap();
    let changed = &second.since(&first, ResourceType::Authorization).changed;
    assert_eq!(changed.iter().map(|one| one.name()).collect::<Vec<_>>(), ["ns-0/p7"]);
    assert!(second.since(&first, ResourceType::Address).changed.is_empty());
    assert!(Arc::ptr_eq(&first.namespaces["ns-1"], &second.namespaces["ns-1"]));
}

#[test]
fn a_status_is_reported_until_it_is_written_and_changes_no_resource() {
    let mut cluster = cluster();
    next(&mut cluster);
    let custom = |conditions| AuthorizationPolicy {
        name: "x".to_owned(),
        generation: 3,
        conditions,
        content: Content::Rules { action: Action::Custom, rules: vec![] },
        ..AuthorizationPolicy::default()
    };
    cluster.apply(Change::AuthorizationPolicies(Update::One(key("demo", "x"), Some(custom(vec![])))));
    next(&mut cluster).unwrap();
    let reports = cluster.reports().unwrap();
    let [unreported] = &reports[..] else { panic!("{reports:?}") };
    assert_eq!((unreported.report.is_attached, unreported.report.generation), (true, 3));
    assert!(unreported.report.message.contains("CUSTOM"), "{unreported:?}");
    assert_eq!(cluster.reports(), None, "nothing changed since");

    let written = Some(custom(unreported.conditions("now".to_owned())));
    cluster.apply(Change::AuthorizationPolicies(Update::One(key("demo", "x"), written)));
    assert!(next(&mut cluster).is_none());
    assert_eq!(cluster.reports(), Some(vec![]));
    cluster.apply(Change::AuthorizationPolicies(Update::One(key("demo", "x"), None)));
    next(&mut cluster).unwrap();
    assert_eq!(cluster.reports(), None);
}

/// Where both kinds are installed, namesakes are two policies.
#[test]
fn an_access_policy_is_sent_under_a_name_of_its_own() {
    let mut cluster = cluster();
    let policy = |kind| {
        let selector = Some(Labels::new());
        Some(AuthorizationPolicy { kind, name: "x".to_owned(), selector, ..AuthorizationPolicy::default() })
    };
    let (istio, own) = (policy(PolicyKind::Authorization), policy(PolicyKind::Access));
    cluster.apply(Change::AuthorizationPolicies(Update::One(key("demo", "x"), istio)));
    cluster.apply(Change::AccessPolicies(Update::One(key("demo", "x"), own)));
    let snapshot = next(&mut cluster).unwrap();
    assert_eq!(names(&snapshot, ResourceType::Authorization), ["demo/access_policy_x", "demo/x"]);
}

/// 5,000 nodes with 30 pods each. `--nocapture` shows what it costs.
#[test]
fn in_a_large_cluster_a_change_costs_as_much_as_its_namespace() {
    let memory = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1000
    };
    let mut cluster = cluster();
    let before = memory();
    let large = |number: u32| {
        let name = format!("web-7d9c6b5f4-{number}");
        let [a, b, c] = [number / 62_500, number / 250 % 250, number % 250];
        let labels =
            Labels::from([("app".to_owned(), "web".to_owned()), ("version".to_owned(), "v1".to_owned())]);
        let node = format!("node-{}", number % 5000);
        (
            key(&format!("ns-{}", number % 500), &name),
            Pod { node, labels, ..pod(&name, &format!("10.{a}.{b}.{c}")) },
        )
    };
    cluster.apply(Change::Pods(listed((0..150_000).map(large).collect())));
    let began = Instant::now();
    let first = next(&mut cluster).unwrap();
    let whole = began.elapsed();
    let bytes: usize = first.all(ResourceType::Address).map(|resource| resource.entry().len()).sum();

    let (name, mut changed) = large(77);
    changed.healthy = true;
    let began = Instant::now();
    cluster.apply(Change::Pods(Update::One(name, Some(changed))));
    let second = next(&mut cluster).unwrap();
    let one = began.elapsed();
    let began = Instant::now();
    assert_eq!(second.since(&first, ResourceType::Address).changed.len(), 1);
    let compared = began.elapsed();
    println!(
        "{} MB more, {bytes} bytes for a new tunnel; first snapshot {whole:?}, a change {one:?}, for each tunnel {compared:?}",
        memory() - before
    );
    assert!(one < whole / 20, "{one:?} of {whole:?}");
}
