//! `PeerAuthentication` as policies: strict means that whoever has no identity is denied.
//!
//! Of several for the same pods the oldest counts: one for pods with certain labels before one for
//! their namespace before one for the mesh. Workloads name what is in force for them: one fixed
//! policy where everything is strict, or one made for the resource where ports are exceptions.

use ztunnel_api::security::{
    Action, Authorization, Clause, Match, Rule, Scope, StringMatch, string_match::MatchType,
};

use super::{Surroundings, policy::UNSUPPORTED};
use crate::{
    objects::{
        Labels, NamespaceObjects,
        peer_authentication::{Mode, PeerAuthentication},
        selects,
    },
    report::{PolicyKind, PolicyObject, Report},
};

/// The policy of whoever is strict without exception. No object of the API can have such a name.
const STATIC_STRICT: &str = "istio_converted_static_strict";

/// What holds in one namespace.
pub(super) struct Rules<'a> {
    namespace: &'a str,
    root_namespace: &'a str,
    strict: bool,
    /// For pods with certain labels, oldest first.
    selecting: Vec<&'a PeerAuthentication>,
}

/// What is in force for some pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Permissive,
    Strict,
    /// Strict but for these ports, or permissive but for these ports.
    Exceptions {
        strict: bool,
    },
}

impl<'a> Rules<'a> {
    pub(super) fn new(around: &Surroundings<'a>, namespace: &'a str, objects: &'a NamespaceObjects) -> Self {
        let root_namespace = around.settings.root_namespace.as_str();
        let is_root = namespace == root_namespace;
        let root = if is_root { objects } else { around.root };
        let own = if is_root { Mode::Unset } else { general(objects) };
        let mode = if own == Mode::Unset { general(root) } else { own };
        let all = objects.peer_authentications.values();
        // In the root namespace there is none for certain pods.
        let mut selecting: Vec<_> = all.filter(|one| one.selector.is_some() && !is_root).collect();
        selecting.sort_by(|one, other| age(one).cmp(&age(other)));
        Self { namespace, root_namespace, strict: mode == Mode::Strict, selecting }
    }

    /// The key of the policy for pods with these labels.
    pub(super) fn policy_for(&self, labels: &Labels) -> Option<String> {
        let chosen = |one: &&&PeerAuthentication| {
            one.selector.as_ref().is_some_and(|selector| selects(selector, labels))
        };
        let chosen = self.selecting.iter().find(chosen);
        let everywhere = if self.strict { Effect::Strict } else { Effect::Permissive };
        match (chosen.map_or(everywhere, |one| self.effect(one)), chosen) {
            (Effect::Permissive, _) => None,
            (Effect::Exceptions { .. }, Some(one)) => Some(format!("{}/{}", self.namespace, name(one))),
            (Effect::Strict | Effect::Exceptions { .. }, _) => {
                Some(format!("{}/{STATIC_STRICT}", self.root_namespace))
            }
        }
    }

    fn effect(&self, one: &PeerAuthentication) -> Effect {
        let strict = match one.mode {
            Mode::Strict => true,
            Mode::Permissive | Mode::Disable => false,
            Mode::Unset => self.strict,
        };
        let is_exception = |mode: &Mode| match mode {
            Mode::Strict => !strict,
            Mode::Permissive => strict,
            // As with Istio: by itself it does not open a port that is strict from above.
            Mode::Disable => one.mode == Mode::Strict,
            Mode::Unset => false,
        };
        if one.ports.values().any(is_exception) {
            Effect::Exceptions { strict }
        } else if strict {
            Effect::Strict
        } else {
            Effect::Permissive
        }
    }
}

/// The policies of a namespace that workloads may name.
pub(super) fn policies(
    around: &Surroundings<'_>,
    namespace: &str,
    objects: &NamespaceObjects,
) -> Vec<Authorization> {
    let rules = Rules::new(around, namespace, objects);
    let mut policies = Vec::new();
    if namespace == rules.root_namespace && around.peer_authentication {
        policies.push(policy(
            namespace,
            STATIC_STRICT.to_owned(),
            vec![Rule { clauses: vec![clause(anonymous())] }],
        ));
    }
    for one in &rules.selecting {
        let Effect::Exceptions { strict } = rules.effect(one) else { continue };
        policies.push(policy(namespace, name(one), exceptions(one, strict)));
    }
    policies
}

fn exceptions(one: &PeerAuthentication, strict: bool) -> Vec<Rule> {
    let ports = |wanted: &'static [Mode]| {
        one.ports.iter().filter(move |(_, mode)| wanted.contains(mode)).map(|(port, _)| *port)
    };
    if strict {
        // Denied: no identity, and none of these ports. In Istio's order.
        let open = ports(&[Mode::Permissive, Mode::Disable])
            .map(|port| clause(Match { not_destination_ports: vec![port.into()], ..Match::default() }));
        let mut clauses: Vec<Clause> = open.collect();
        let place = if one.mode == Mode::Strict { 0 } else { clauses.len() };
        clauses.insert(place, clause(anonymous()));
        vec![Rule { clauses }]
    } else {
        // Denied: no identity at one of these ports.
        let closed = |port: u16| Match { destination_ports: vec![port.into()], ..anonymous() };
        ports(&[Mode::Strict]).map(|port| Rule { clauses: vec![clause(closed(port))] }).collect()
    }
}

/// Whoever has no identity.
fn anonymous() -> Match {
    let presence = StringMatch { match_type: Some(MatchType::Presence(())) };
    Match { not_principals: vec![presence], ..Match::default() }
}

fn clause(one: Match) -> Clause {
    Clause { matches: vec![one] }
}

fn policy(namespace: &str, name: String, rules: Vec<Rule>) -> Authorization {
    Authorization {
        name,
        namespace: namespace.to_owned(),
        scope: Scope::WorkloadSelector.into(),
        action: Action::Deny.into(),
        rules,
        dry_run: false,
    }
}

/// Of the policy that is made for `one`, which no object of the API can have.
fn name(one: &PeerAuthentication) -> String {
    format!("converted_peer_authentication_{}", one.name)
}

/// What holds for all pods of a namespace.
fn general(objects: &NamespaceObjects) -> Mode {
    oldest(objects).map_or(Mode::Unset, |one| one.mode)
}

/// Of those for all pods of a namespace, the one that counts.
fn oldest(objects: &NamespaceObjects) -> Option<&PeerAuthentication> {
    let all = objects.peer_authentications.values().filter(|one| one.selector.is_none());
    all.min_by(|one, other| age(one).cmp(&age(other)))
}

/// What is said of `one` in its status.
pub(super) fn report(
    root_namespace: &str,
    namespace: &str,
    objects: &NamespaceObjects,
    one: &PeerAuthentication,
) -> Report {
    let report = |is_attached, reason, message: String| {
        let (kind, version) = (PolicyKind::Peer, one.version.clone());
        let (namespace, name) = (namespace.to_owned(), one.name.clone());
        let object = PolicyObject { kind, version, namespace, name };
        Report { object, generation: one.generation, is_attached, reason, message }
    };
    if one.selector.is_some() && namespace == root_namespace {
        let message = "in the root namespace it has no effect with a selector".to_owned();
        return report(false, UNSUPPORTED, message);
    }
    if let Some(older) = oldest(objects).filter(|older| one.selector.is_none() && older.name != one.name) {
        return report(
            false,
            "Conflicted",
            format!("{} is older, and decides for the namespace", older.name),
        );
    }
    if let Some(reason) = &one.unreadable {
        let strict = if one.mode == Mode::Strict { "; plaintext is refused" } else { "" };
        return report(true, UNSUPPORTED, format!("{reason}{strict}"));
    }
    let is_disabled = |mode: &Mode| *mode == Mode::Disable;
    if one.mode == Mode::Unset && one.ports.values().any(is_disabled) {
        let message = "DISABLE of a port opens it only where the mode beside it is STRICT".to_owned();
        return report(true, UNSUPPORTED, message);
    }
    if is_disabled(&one.mode) || one.ports.values().any(is_disabled) {
        let message = "DISABLE: mTLS is accepted all the same, as with PERMISSIVE".to_owned();
        return report(true, UNSUPPORTED, message);
    }
    report(true, "Accepted", "attached to ztunnel".to_owned())
}

fn age(one: &PeerAuthentication) -> (i64, &str) {
    (one.created, &one.name)
}

#[cfg(test)]
mod tests;
