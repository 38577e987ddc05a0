//! What follows from changes: one snapshot of exactly what differs.

use std::net::IpAddr;

use super::*;
use crate::{
    objects::{
        Labels,
        peer_authentication::Mode,
        policy::{Action, Content},
    },
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
    cluster.apply(Change::Policies(listed(vec![])));
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
    assert_eq!((difference.changed.len(), difference.removed), (0, vec![P.to_owned()]));
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
        dry_run: false,
        selector: Some(labels),
        content: Content::Rules { action: Action::Deny, rules: vec![] },
    };
    cluster.apply(Change::Policies(Update::One(key("adit-system", "r"), Some(policy))));
    let second = next(&mut cluster).unwrap();
    assert_eq!(names(&second, ResourceType::Authorization), ["adit-system/r"]);
    assert_eq!(second.since(&first, ResourceType::Address).changed[0].name(), P);
    assert_eq!(cluster.unenforceable(), 0);
}

#[test]
fn the_fixed_strict_policy_comes_and_goes_with_the_peer_authentications() {
    let mut cluster = cluster();
    next(&mut cluster);
    let peer = PeerAuthentication {
        name: "s".to_owned(),
        created: 0,
        selector: None,
        mode: Mode::Strict,
        ports: BTreeMap::new(),
        unreadable: None,
    };
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
        |content| AuthorizationPolicy { name: "x".to_owned(), dry_run: false, selector: None, content };
    let unreadable = policy(Content::Unreadable("why".to_owned()));
    cluster.apply(Change::Policies(Update::One(key("demo", "x"), Some(unreadable))));
    next(&mut cluster).unwrap();
    assert_eq!(cluster.unenforceable(), 1);
    let readable = policy(Content::Rules { action: Action::Allow, rules: vec![] });
    cluster.apply(Change::Policies(Update::One(key("demo", "x"), Some(readable))));
    next(&mut cluster).unwrap();
    assert_eq!(cluster.unenforceable(), 0);
}
