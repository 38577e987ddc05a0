//! What tunnels are told of policies: nothing laxer than what is written.

#![expect(clippy::needless_pass_by_value, reason = "`json!` makes values, which tests hand over as they are")]

use kube::core::DynamicObject;
use serde_json::{Value, json};

use super::*;
use crate::report::PolicyKind;

fn convert(spec: Value) -> (Option<Authorization>, Vec<String>) {
    in_namespace("demo", spec)
}

fn in_namespace(namespace: &str, spec: Value) -> (Option<Authorization>, Vec<String>) {
    let object: DynamicObject = serde_json::from_value(json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "p", "namespace": namespace}, "spec": spec}))
    .unwrap();
    policy("adit-system", namespace, &AuthorizationPolicy::read(PolicyKind::Authorization, &object))
}

/// The rules of a policy about `rule` alone, and whether something is noted.
fn rules(action: &str, rule: Value) -> (Vec<SentRule>, bool) {
    let (policy, notes) = convert(json!({"action": action, "rules": [rule]}));
    (policy.unwrap().rules, !notes.is_empty())
}

fn exact(text: &str) -> StringMatch {
    StringMatch { match_type: Some(MatchType::Exact(text.to_owned())) }
}

fn one(matches: Vec<Match>) -> Vec<SentRule> {
    vec![SentRule { clauses: vec![Clause { matches }] }]
}

#[test]
fn the_scope_follows_from_selector_and_namespace() {
    let scope = |namespace: &str, spec| in_namespace(namespace, spec).0.unwrap().scope();
    let selector = json!({"selector": {"matchLabels": {"app": "web"}}});
    assert_eq!(scope("demo", json!({})), Scope::Namespace);
    assert_eq!(scope("adit-system", json!({})), Scope::Global);
    assert_eq!(scope("demo", selector.clone()), Scope::WorkloadSelector);
    assert_eq!(scope("adit-system", selector), Scope::WorkloadSelector);
}

#[test]
fn a_policy_without_rules_keeps_its_meaning() {
    let (policy, notes) = convert(json!({}));
    let policy = policy.unwrap();
    assert_eq!((policy.action(), policy.rules.len(), notes.len()), (SentAction::Allow, 0, 0));
    // An empty rule matches everything.
    assert_eq!(rules("ALLOW", json!({})), (vec![SentRule::default()], false));
}

#[test]
fn every_field_of_layer_4_arrives() {
    let rule = json!({
        "from": [{"source": {
            "principals": ["cluster.local/ns/a/sa/b", "*"], "notPrincipals": ["*/sa/x"], "namespaces": ["a*"],
            "notNamespaces": ["b"], "serviceAccounts": ["web", "other/web"], "notServiceAccounts": ["x"],
            "ipBlocks": ["10.0.0.0/8", "fd00::1"], "notIpBlocks": ["10.1.2.3"]}}],
        "to": [{"operation": {"ports": ["80"], "notPorts": ["81"]}}],
        "when": [
            {"key": "source.ip", "values": ["192.0.2.0/24"]}, {"key": "source.namespace", "notValues": ["c"]},
            {"key": "source.principal", "values": ["p"]}, {"key": "destination.ip", "values": ["10.0.0.1"]},
            {"key": "destination.port", "notValues": ["9090"]}],
    });
    let (rules, noted) = rules("ALLOW", rule);
    assert!(!noted);
    let [SentRule { clauses }] = &rules[..] else { panic!("{rules:?}") };
    assert_eq!(clauses.len(), 2 + 5);
    let of = |at: usize| clauses[at].matches[0].clone();
    let account = |namespace: &str, name: &str| ServiceAccountMatch {
        namespace: namespace.to_owned(),
        service_account: name.to_owned(),
    };
    let kind = |kind| StringMatch { match_type: Some(kind) };
    let range = |address: &[u8], length| Address { address: address.to_vec(), length };
    assert_eq!(
        of(0),
        Match { destination_ports: vec![80], not_destination_ports: vec![81], ..Match::default() }
    );
    let mut last = [0; 16];
    (last[0], last[15]) = (0xfd, 1);
    assert_eq!(
        of(1),
        Match {
            principals: vec![exact("cluster.local/ns/a/sa/b"), kind(MatchType::Presence(()))],
            not_principals: vec![kind(MatchType::Suffix("/sa/x".to_owned()))],
            namespaces: vec![kind(MatchType::Prefix("a".to_owned()))],
            not_namespaces: vec![exact("b")],
            service_accounts: vec![account("demo", "web"), account("other", "web")],
            not_service_accounts: vec![account("demo", "x")],
            source_ips: vec![range(&[10, 0, 0, 0], 8), range(&last, 128)],
            not_source_ips: vec![range(&[10, 1, 2, 3], 32)],
            ..Match::default()
        }
    );
    assert_eq!(of(2).source_ips, [range(&[192, 0, 2, 0], 24)]);
    assert_eq!(of(3).not_namespaces, [exact("c")]);
    assert_eq!(of(4).principals, [exact("p")]);
    assert_eq!(of(5).destination_ips, [range(&[10, 0, 0, 1], 32)]);
    assert_eq!(of(6).not_destination_ports, [9090]);
}

#[test]
fn an_allow_rule_that_asks_for_more_allows_nobody() {
    for rule in [
        json!({"to": [{"operation": {"methods": ["GET"]}}]}),
        json!({"to": [{"operation": {"ports": ["80"]}}, {"operation": {"notPaths": ["/admin"]}}]}),
        json!({"from": [{"source": {"requestPrincipals": ["*"]}}]}),
        json!({"from": [{"source": {"principals": ["a"], "trustDomains": ["b"]}}]}),
        json!({"when": [{"key": "request.headers[x]", "values": ["y"]}]}),
        json!({"surprise": true}),
        // Values that cannot be read: without them a field would restrict less.
        json!({"from": [{"source": {"ipBlocks": ["10.0.0.0/33"]}}]}),
        json!({"from": [{"source": {"notIpBlocks": ["10.0.0.1", "nowhere"]}}]}),
        json!({"to": [{"operation": {"ports": ["http"]}}]}),
    ] {
        assert_eq!(rules("ALLOW", rule.clone()), (vec![], true), "{rule}");
    }
}

#[test]
fn a_deny_rule_that_asks_for_more_denies_without_asking() {
    let everything = vec![SentRule::default()];
    let port = |port| Match { destination_ports: vec![port], ..Match::default() };
    for (rule, expected) in [
        (json!({"to": [{"operation": {"methods": ["DELETE"]}}]}), everything.clone()),
        (json!({"when": [{"key": "request.headers[x]", "values": ["y"]}]}), everything.clone()),
        (json!({"surprise": true}), everything.clone()),
        (json!({"from": [{"source": {"ipBlocks": ["nowhere"]}}]}), everything.clone()),
        (json!({"from": [{"source": {"notIpBlocks": ["nowhere"]}}]}), everything.clone()),
        (json!({"to": [{"operation": {"methods": ["GET"], "ports": ["80"]}}]}), one(vec![port(80)])),
        // One of two alternatives cannot be seen: either may be it.
        (
            json!({"to": [{"operation": {"ports": ["80"]}}, {"operation": {"methods": ["GET"]}}]}),
            everything.clone(),
        ),
        (
            json!({"to": [{"operation": {"methods": ["GET"]}}], "from": [{"source": {"namespaces": ["a"]}}]}),
            one(vec![Match { namespaces: vec![exact("a")], ..Match::default() }]),
        ),
    ] {
        assert_eq!(rules("DENY", rule.clone()), (expected, true), "{rule}");
    }
    // To a tunnel an empty match would match nothing.
    assert_eq!(rules("DENY", json!({"from": [{"source": {}}]})), (everything, false));
}

#[test]
fn actions_that_a_tunnel_does_not_have() {
    let (policy, notes) = convert(json!({"action": "CUSTOM", "provider": {"name": "x"}, "rules": [{}]}));
    assert_eq!((policy.unwrap().action(), notes.len()), (SentAction::Deny, 1));
    assert_eq!(convert(json!({"action": "AUDIT", "rules": [{}]})), (None, vec![]));
    assert_eq!(convert(json!({"targetRefs": [{"kind": "Service", "name": "x"}], "rules": [{}]})).0, None);
}

#[test]
fn what_cannot_be_read_denies_everybody() {
    for spec in [json!({"action": "REVIEW"}), json!({"rules": 7}), json!({"surprise": 1})] {
        let (policy, notes) = convert(spec.clone());
        let policy = policy.unwrap();
        assert_eq!(
            (policy.action(), &policy.rules),
            (SentAction::Deny, &vec![SentRule::default()]),
            "{spec}"
        );
        assert!(notes[0].contains("everybody is denied"), "{notes:?}");
    }
}
