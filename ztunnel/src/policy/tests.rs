use std::collections::HashSet;

use super::*;
use crate::mesh::{
    MeshChange,
    policies::{Clause, Match, PolicyScope, Rule, ServiceAccountMatch, StringMatch},
    tests::{ip, workload},
};

fn exact(text: &str) -> Vec<StringMatch> {
    vec![StringMatch::Exact(text.to_owned())]
}

fn account(namespace: &str, service_account: &str) -> Vec<ServiceAccountMatch> {
    vec![ServiceAccountMatch { namespace: namespace.to_owned(), service_account: service_account.to_owned() }]
}

fn nets(text: &str) -> Vec<ipnet::IpNet> {
    vec![text.parse().unwrap()]
}

fn policy(name: &str, scope: PolicyScope, action: Action, rules: Vec<Vec<Vec<Match>>>) -> Policy {
    let rules =
        rules.into_iter().map(|clauses| Rule(clauses.into_iter().map(Clause).collect())).collect::<Vec<_>>();
    let key = PolicyKey { namespace: "default".into(), name: name.into() };
    Policy { key, scope, action, rules, dry_run: false, stand_in: false }
}

/// A global policy whose only rule is one match.
fn only(action: Action, one: Match) -> Policy {
    policy("p", PolicyScope::Global, action, vec![vec![vec![one]]])
}

/// What protects `workload` in a mesh without aliases.
fn protection(mesh: &Mesh, workload: &Workload) -> Protection {
    Protection::of(mesh, workload, &MeshTrust::default())
}

/// From `spiffe://cluster.local/ns/shop/sa/web` at 10.0.0.1, or plaintext from there, to
/// 10.0.0.2:8080.
fn checked(policies: Vec<Policy>, plaintext: bool) -> Result<(), Denied> {
    let mesh = Mesh::new([workload("db", "10.0.0.2")], [], policies);
    let source = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    let connection = InboundConnection {
        source_ip: ip("10.0.0.1"),
        source: (!plaintext).then_some(&source),
        destination: "10.0.0.2:8080".parse().unwrap(),
    };
    protection(&mesh, mesh.workload_by_address("", ip("10.0.0.2")).unwrap()).check(&connection)
}

fn matches(one: Match) -> bool {
    checked(vec![only(Action::Allow, one)], false).is_ok()
}

fn matches_plaintext(one: Match) -> bool {
    checked(vec![only(Action::Allow, one)], true).is_ok()
}

#[test]
fn each_kind_of_match_accepts_its_own_refuses_others_and_negates() {
    type Set<T> = fn(Vec<T>) -> Match;
    fn table<T: Clone>(right: &[Vec<T>], wrong: &[Vec<T>], wanted: Set<T>, unwanted: Set<T>) {
        for values in right {
            assert!(matches(wanted(values.clone())), "{:?}", wanted(values.clone()));
            assert!(!matches(unwanted(values.clone())), "{:?}", unwanted(values.clone()));
        }
        for values in wrong {
            assert!(!matches(wanted(values.clone())), "{:?}", wanted(values.clone()));
            assert!(matches(unwanted(values.clone())), "{:?}", unwanted(values.clone()));
        }
    }
    let (prefix, suffix) = (
        |text: &str| vec![StringMatch::Prefix(text.to_owned())],
        |text: &str| vec![StringMatch::Suffix(text.to_owned())],
    );
    table(
        &[
            exact("shop"),
            prefix("sh"),
            suffix("op"),
            vec![StringMatch::Presence],
            [exact("x"), exact("shop")].concat(),
        ],
        &[exact("sho"), prefix("hop"), suffix("sho"), exact("web")],
        |namespaces| Match { namespaces, ..Match::default() },
        |not_namespaces| Match { not_namespaces, ..Match::default() },
    );
    table(
        &[
            exact("cluster.local/ns/shop/sa/web"),
            prefix("cluster.local/ns/shop/"),
            suffix("/sa/web"),
            prefix(""),
        ],
        &[exact("spiffe://cluster.local/ns/shop/sa/web"), prefix("spiffe://"), suffix("/sa/db"), exact("")],
        |principals| Match { principals, ..Match::default() },
        |not_principals| Match { not_principals, ..Match::default() },
    );
    table(
        &[account("shop", "web")],
        &[account("shop", "db"), account("default", "web")],
        |service_accounts| Match { service_accounts, ..Match::default() },
        |not_service_accounts| Match { not_service_accounts, ..Match::default() },
    );
    table(
        &[nets("10.0.0.1/32"), nets("10.0.0.0/8"), nets("0.0.0.0/0")],
        &[nets("10.0.0.2/32"), nets("::/0")],
        |source_ips| Match { source_ips, ..Match::default() },
        |not_source_ips| Match { not_source_ips, ..Match::default() },
    );
    table(
        &[nets("10.0.0.2/32"), [nets("192.168.0.0/16"), nets("10.0.0.0/24")].concat()],
        &[nets("10.0.0.1/32")],
        |destination_ips| Match { destination_ips, ..Match::default() },
        |not_destination_ips| Match { not_destination_ips, ..Match::default() },
    );
    table(
        &[vec![8080], vec![80, 8080]],
        &[vec![80], vec![15008]],
        |destination_ports| Match { destination_ports, ..Match::default() },
        |not_destination_ports| Match { not_destination_ports, ..Match::default() },
    );
}

#[test]
fn plaintext_has_no_identity_that_could_match() {
    for one in [
        Match { namespaces: vec![StringMatch::Presence], ..Match::default() },
        Match { namespaces: vec![StringMatch::Prefix(String::new())], ..Match::default() },
        Match { principals: exact(""), ..Match::default() },
        Match { principals: vec![StringMatch::Suffix(String::new())], ..Match::default() },
        Match { service_accounts: account("shop", "web"), ..Match::default() },
    ] {
        assert!(!matches_plaintext(one.clone()), "{one:?}");
    }
    assert!(matches_plaintext(Match { source_ips: nets("10.0.0.1/32"), ..Match::default() }));
    assert!(matches_plaintext(Match { not_principals: exact("x"), ..Match::default() }));
}

#[test]
fn strict_mtls_as_the_control_plane_writes_it_denies_only_plaintext() {
    let strict =
        || only(Action::Deny, Match { not_principals: vec![StringMatch::Presence], ..Match::default() });
    assert_eq!(checked(vec![strict()], false), Ok(()));
    assert!(matches!(checked(vec![strict()], true), Err(Denied::ByPolicy(_))));
}

#[test]
fn kinds_in_a_match_are_all_needed() {
    let both = |port| Match { namespaces: exact("shop"), destination_ports: vec![port], ..Match::default() };
    assert!(matches(both(8080)));
    assert!(!matches(both(80)));
    let except = Match { namespaces: exact("shop"), not_source_ips: nets("10.0.0.1/32"), ..Match::default() };
    assert!(!matches(except));
}

#[test]
fn rules_are_alternatives_clauses_are_all_needed_matches_are_alternatives() {
    let yes = || Match { destination_ports: vec![8080], ..Match::default() };
    let no = || Match { destination_ports: vec![80], ..Match::default() };
    for (rules, expected) in [
        (vec![], false),
        (vec![vec![]], true),
        (vec![vec![vec![]]], true),
        (vec![vec![vec![Match::default()]]], false),
        (vec![vec![vec![Match::default(), yes()]]], true),
        (vec![vec![vec![no(), yes()]]], true),
        (vec![vec![vec![yes()], vec![no()]]], false),
        (vec![vec![vec![yes()], vec![]]], true),
        (vec![vec![vec![no()]], vec![vec![yes()]]], true),
        (vec![vec![vec![no()]], vec![vec![no()]]], false),
    ] {
        let allow = policy("p", PolicyScope::Global, Action::Allow, rules.clone());
        assert_eq!(checked(vec![allow], false).is_ok(), expected, "{rules:?}");
    }
}

#[test]
fn deny_beats_allow_and_without_allow_policies_all_is_allowed() {
    let everybody = || vec![vec![]];
    let nobody = Vec::new;
    let of = |name, action, rules| policy(name, PolicyScope::Global, action, rules);
    let by_deny = Denied::ByPolicy("default/deny".parse().unwrap());
    assert_eq!(by_deny.to_string(), "explicitly denied by: default/deny");
    for (policies, expected) in [
        (vec![], Ok(())),
        (vec![of("deny", Action::Deny, nobody())], Ok(())),
        (vec![of("allow", Action::Allow, nobody())], Err(Denied::NotAllowed)),
        (vec![of("allow", Action::Allow, everybody())], Ok(())),
        (vec![of("a", Action::Allow, nobody()), of("b", Action::Allow, everybody())], Ok(())),
        (vec![of("allow", Action::Allow, everybody()), of("deny", Action::Deny, everybody())], Err(by_deny)),
    ] {
        assert_eq!(checked(policies.clone(), false), expected, "{policies:?}");
    }
    assert_eq!(Denied::NotAllowed.to_string(), "allow policies exist, but none allowed");
}

#[test]
fn a_policy_on_trial_decides_nothing() {
    let trial = |action, rules| Policy { dry_run: true, ..policy("t", PolicyScope::Global, action, rules) };
    assert_eq!(checked(vec![trial(Action::Deny, vec![vec![]])], false), Ok(()));
    assert_eq!(checked(vec![trial(Action::Allow, vec![])], false), Ok(()));
    // Neither does it allow what another one refuses.
    let none = policy("none", PolicyScope::Global, Action::Allow, vec![]);
    assert_eq!(checked(vec![none, trial(Action::Allow, vec![vec![]])], false), Err(Denied::NotAllowed));
}

/// Unknown is neither gone nor allowed.
#[test]
fn a_named_policy_that_was_never_heard_of_allows_nothing_and_a_removed_one_is_none() {
    let mut named = workload("named", "10.0.0.1");
    named.policies = vec!["default/late".parse().unwrap()];
    let connection = InboundConnection {
        source_ip: ip("10.0.0.9"),
        source: None,
        destination: "10.0.0.1:80".parse().unwrap(),
    };
    let decided = |mesh: &Mesh| {
        protection(mesh, mesh.workload_by_address("", ip("10.0.0.1")).unwrap()).check(&connection)
    };
    let late: PolicyKey = "default/late".parse().unwrap();
    let allow = policy("all", PolicyScope::Global, Action::Allow, vec![vec![]]);
    let mesh = Mesh::new([named.clone()], [], [allow]);
    assert_eq!(decided(&mesh), Err(Denied::Unheard(late.clone())));
    assert_eq!(decided(&mesh.with([MeshChange::RemovePolicy(late.clone())])), Ok(()));
    // What is certain is said first.
    let deny = policy("deny", PolicyScope::Global, Action::Deny, vec![vec![]]);
    let by_deny = Err(Denied::ByPolicy(deny.key.clone()));
    assert_eq!(decided(&mesh.with([MeshChange::PutPolicy(deny)])), by_deny);
    let arrived = policy("late", PolicyScope::WorkloadSelector, Action::Deny, vec![vec![]]);
    assert_eq!(decided(&mesh.with([MeshChange::PutPolicy(arrived)])), Err(Denied::ByPolicy(late)));
}

/// Istio's control plane names some for good that it never sends.
#[test]
fn a_converted_peer_authentication_that_was_never_heard_of_refuses_nobody_with_an_identity() {
    let mut named = workload("named", "10.0.0.1");
    let missing: PolicyKey = "default/converted_peer_authentication_ports".parse().unwrap();
    named.policies = vec![missing.clone()];
    let source = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    let decided = |named: &Workload, source: Option<&Identity>, policies: Vec<Policy>| {
        let mesh = Mesh::new([named.clone()], [], policies);
        let connection = InboundConnection {
            source_ip: ip("10.0.0.9"),
            source,
            destination: "10.0.0.1:80".parse().unwrap(),
        };
        protection(&mesh, mesh.workload_by_address("", ip("10.0.0.1")).unwrap()).check(&connection)
    };
    assert_eq!(decided(&named, Some(&source), vec![]), Ok(()));
    assert_eq!(decided(&named, None, vec![]), Err(Denied::Unheard(missing)));
    // Other policies count as ever, those that were never heard of too.
    let nobody = policy("nobody", PolicyScope::Global, Action::Allow, vec![]);
    assert_eq!(decided(&named, Some(&source), vec![nobody]), Err(Denied::NotAllowed));
    let late: PolicyKey = "default/late".parse().unwrap();
    named.policies.push(late.clone());
    assert_eq!(decided(&named, Some(&source), vec![]), Err(Denied::Unheard(late)));
}

#[test]
fn a_policy_protects_its_scope() {
    let deny = |scope| policy("deny", scope, Action::Deny, vec![vec![]]);
    let mut named = workload("named", "10.0.0.1");
    named.policies = vec!["default/deny".parse().unwrap(), "default/gone".parse().unwrap()];
    let gone = MeshChange::RemovePolicy("default/gone".parse().unwrap());
    let mut elsewhere = workload("elsewhere", "10.0.0.3");
    elsewhere.namespace = "shop".into();
    let workloads = [named, workload("plain", "10.0.0.2"), elsewhere];
    let denied = |scope| -> HashSet<String> {
        let mesh = Mesh::new(workloads.clone(), [], [deny(scope)]).with([gone.clone()]);
        let connection = InboundConnection {
            source_ip: ip("10.0.0.9"),
            source: None,
            destination: "10.0.0.1:80".parse().unwrap(),
        };
        let refused =
            mesh.workloads().filter(|workload| protection(&mesh, workload).check(&connection).is_err());
        refused.map(|workload| workload.name.to_string()).collect()
    };
    let only = |those: &[&str]| those.iter().map(ToString::to_string).collect::<HashSet<_>>();
    assert_eq!(denied(PolicyScope::Global), only(&["named", "plain", "elsewhere"]));
    assert_eq!(denied(PolicyScope::Namespace), only(&["named", "plain"]));
    assert_eq!(denied(PolicyScope::WorkloadSelector), only(&["named"]));
}

#[test]
fn an_address_counts_in_either_of_its_forms() {
    let deny = only(Action::Deny, Match { source_ips: nets("10.0.0.1/32"), ..Match::default() });
    let mesh = Mesh::new([workload("db", "10.0.0.2")], [], [deny]);
    let connection = InboundConnection {
        source_ip: ip("::ffff:10.0.0.1"),
        source: None,
        destination: "[::ffff:10.0.0.2]:80".parse().unwrap(),
    };
    let db = mesh.workload_by_address("", ip("10.0.0.2")).unwrap();
    protection(&mesh, db).check(&connection).unwrap_err();
}

/// Policies of a mesh that was renamed, or that writes `cluster.local` for itself, as Istio's do.
#[test]
fn a_principal_may_be_written_with_any_trust_domain_of_the_mesh() {
    let trust = MeshTrust::of_aliases(["old.example".into()].into());
    let matches = |source: &str, one: Match| {
        let mut db = workload("db", "10.0.0.2");
        db.trust_domain = "new.example".into();
        let mesh = Mesh::new([db], [], [only(Action::Allow, one)]);
        let source = source.parse().unwrap();
        let connection = InboundConnection {
            source_ip: ip("10.0.0.1"),
            source: Some(&source),
            destination: "10.0.0.2:8080".parse().unwrap(),
        };
        let db = mesh.workload_by_address("", ip("10.0.0.2")).unwrap();
        Protection::of(&mesh, db, &trust).check(&connection).is_ok()
    };
    let by = |principals: Vec<StringMatch>| Match { principals, ..Match::default() };
    let but = |not_principals: Vec<StringMatch>| Match { not_principals, ..Match::default() };
    for own in ["spiffe://new.example/ns/shop/sa/web", "spiffe://old.example/ns/shop/sa/web"] {
        for written in ["new.example", "old.example", "cluster.local"] {
            let principal = format!("{written}/ns/shop/sa/web");
            assert!(matches(own, by(exact(&principal))), "{own} {principal}");
            assert!(!matches(own, but(exact(&principal))), "{own} {principal}");
            assert!(matches(own, by(vec![StringMatch::Prefix(format!("{written}/ns/shop/"))])));
        }
        assert!(!matches(own, by(exact("foreign.example/ns/shop/sa/web"))));
        assert!(!matches(own, by(exact("new.example/ns/shop/sa/db"))));
    }
    let foreign = "spiffe://foreign.example/ns/shop/sa/web";
    assert!(matches(foreign, by(exact("foreign.example/ns/shop/sa/web"))));
    for mesh in ["new.example", "old.example", "cluster.local"] {
        assert!(!matches(foreign, by(exact(&format!("{mesh}/ns/shop/sa/web")))), "{mesh}");
    }
}

/// Everything that is not about the policies of a pod leaves its connections asleep.
#[tokio::test]
async fn only_a_change_of_what_protects_a_pod_wakes_its_connections() {
    let of_namespace = |namespace: &str, name: &str| {
        let mut policy = policy(name, PolicyScope::Namespace, Action::Deny, vec![]);
        policy.key.namespace = namespace.into();
        policy
    };
    let store = Arc::new(Store::new(Mesh::new([workload("db", "10.0.0.2")], [], [])));
    let pod = Arc::new(PodProtection::default());
    let find =
        |_: &PodProtection, mesh: &Mesh| mesh.workloads().find(|workload| &*workload.name == "db").cloned();
    let follow =
        PodProtection::follow(Arc::clone(&store), Arc::default(), Arc::downgrade(&pod), |pod| pod, find);
    let following = tokio::spawn(follow);
    tokio::task::yield_now().await;
    let mut connection = pod.subscribe();
    let mut woken_by = async |changes: Vec<MeshChange>| {
        store.apply(changes);
        // The follower was woken before, so it runs before this task goes on.
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        let woken = connection.has_changed().unwrap();
        connection.mark_unchanged();
        woken
    };
    let moved = workload("db", "10.0.0.3");
    let mut naming = moved.clone();
    naming.policies = vec!["default/late".parse().unwrap()];
    let late = policy("late", PolicyScope::WorkloadSelector, Action::Deny, vec![]);
    for (change, wakes) in [
        (MeshChange::PutWorkload(workload("web", "10.0.0.9")), false),
        (MeshChange::PutWorkload(moved), false),
        (MeshChange::PutPolicy(of_namespace("shop", "other")), false),
        (MeshChange::PutPolicy(of_namespace("default", "own")), true),
        (MeshChange::RemovePolicy("shop/other".parse().unwrap()), false),
        (MeshChange::PutWorkload(naming), true),
        (MeshChange::PutPolicy(late), true),
        (MeshChange::RemoveWorkload("uid-db".into()), false),
        (MeshChange::RemovePolicy("default/own".parse().unwrap()), false),
        (MeshChange::PutWorkload(workload("db", "10.0.0.3")), true),
    ] {
        let what = format!("{change:?}");
        assert_eq!(woken_by(vec![change]).await, wakes, "{what}");
    }
    // It ends with the pod.
    drop((pod, connection));
    store.replace(Mesh::default());
    following.await.unwrap();
}
