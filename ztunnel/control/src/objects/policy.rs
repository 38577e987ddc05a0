//! Istio's `AuthorizationPolicy`, and our `AccessPolicy`, which says the same, as written.
//!
//! The resource may be newer than this code. What is not known is kept by name, so that nobody takes
//! a policy for a laxer one.

use std::collections::BTreeMap;

use kube::core::DynamicObject;
use serde::Deserialize;
use serde_json::Value;

use super::{Labels, Reported, api_version, conditions};
use crate::report::PolicyKind;

const DRY_RUN: &str = "istio.io/dry-run";

/// A policy.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct AuthorizationPolicy {
    pub kind: PolicyKind,
    /// Of the API.
    pub version: String,
    pub name: String,
    /// Of its spec.
    pub generation: i64,
    /// What its status says.
    pub conditions: Vec<Value>,
    /// On trial: it decides nothing.
    pub dry_run: bool,
    /// The pods that it protects; `None`: all of its namespace.
    pub selector: Option<Labels>,
    pub content: Content,
}

/// What a policy says.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Content {
    Rules {
        action: Action,
        rules: Vec<Rule>,
    },
    /// It is for a waypoint, and not for tunnels.
    ForWaypoint,
    /// It cannot be read, and why.
    Unreadable(String),
}

/// What a policy does with what it matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) enum Action {
    #[default]
    #[serde(rename = "ALLOW")]
    Allow,
    #[serde(rename = "DENY")]
    Deny,
    #[serde(rename = "AUDIT")]
    Audit,
    #[serde(rename = "CUSTOM")]
    Custom,
}

/// Fields that are not known here, by name.
pub(crate) type Unknown = BTreeMap<String, Value>;

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    selector: Option<Selector>,
    target_ref: Option<Value>,
    target_refs: Vec<Value>,
    action: Action,
    /// Whom a custom policy asks.
    provider: Option<Value>,
    rules: Vec<Rule>,
    #[serde(flatten)]
    unknown: Unknown,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub(super) struct Selector {
    pub(super) match_labels: Labels,
}

/// A rule: any of `from`, any of `to`, all of `when`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Rule {
    pub from: Vec<From>,
    pub to: Vec<To>,
    pub when: Vec<Condition>,
    #[serde(flatten)]
    pub unknown: Unknown,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct From {
    pub source: Source,
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Fields of layer 7 are among the unknown ones: layer 4 knows nothing of them.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Source {
    pub principals: Vec<String>,
    pub not_principals: Vec<String>,
    pub namespaces: Vec<String>,
    pub not_namespaces: Vec<String>,
    pub service_accounts: Vec<String>,
    pub not_service_accounts: Vec<String>,
    pub ip_blocks: Vec<String>,
    pub not_ip_blocks: Vec<String>,
    #[serde(flatten)]
    pub unknown: Unknown,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct To {
    pub operation: Operation,
    #[serde(flatten)]
    pub unknown: Unknown,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Operation {
    pub ports: Vec<String>,
    pub not_ports: Vec<String>,
    #[serde(flatten)]
    pub unknown: Unknown,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Condition {
    pub key: String,
    pub values: Vec<String>,
    pub not_values: Vec<String>,
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl Default for Content {
    fn default() -> Self {
        Self::Rules { action: Action::Allow, rules: Vec::new() }
    }
}

impl Reported for AuthorizationPolicy {
    fn conditions(&mut self) -> &mut Vec<Value> {
        &mut self.conditions
    }
}

impl AuthorizationPolicy {
    /// The name that tunnels are told. One of ours cannot be taken for one of Istio's: none of theirs
    /// has such a name.
    pub(crate) fn sent_name(&self) -> String {
        match self.kind {
            PolicyKind::Authorization => self.name.clone(),
            PolicyKind::Access | PolicyKind::Peer => format!("access_policy_{}", self.name),
        }
    }

    /// Always something: what cannot be read must not look like no policy.
    pub(crate) fn read(kind: PolicyKind, object: &DynamicObject) -> Self {
        let annotations = object.metadata.annotations.as_ref();
        let dry_run = annotations.and_then(|annotations| annotations.get(DRY_RUN));
        let mut policy = Self {
            kind,
            version: api_version(object, kind),
            generation: object.metadata.generation.unwrap_or_default(),
            conditions: conditions(object),
            name: object.metadata.name.clone().unwrap_or_default(),
            // As Go reads a truth; anything else is none.
            dry_run: dry_run
                .is_some_and(|text| matches!(text.as_str(), "1" | "t" | "T" | "true" | "TRUE" | "True")),
            selector: None,
            content: Content::default(),
        };
        let spec = object.data.get("spec").unwrap_or(&Value::Null);
        if spec.is_null() {
            return policy;
        }
        // Whom it protects may be readable where the rest is not.
        let selector = spec.get("selector").filter(|selector| !selector.is_null());
        policy.selector = selector.and_then(|selector| labels(Selector::deserialize(selector).ok()?));
        policy.content = match Spec::deserialize(spec) {
            Ok(spec) if spec.target_ref.is_some() || !spec.target_refs.is_empty() => Content::ForWaypoint,
            Ok(spec) => match spec.unknown.keys().next() {
                Some(field) => Content::Unreadable(format!("spec.{field} is not known here")),
                None => Content::Rules { action: spec.action, rules: spec.rules },
            },
            Err(error) => Content::Unreadable(format!("spec: {error}")),
        };
        policy
    }
}

/// A selector without labels selects all pods.
pub(super) fn labels(selector: Selector) -> Option<Labels> {
    (!selector.match_labels.is_empty()).then_some(selector.match_labels)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(spec: &Value) -> AuthorizationPolicy {
        let object = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p", "namespace": "demo"}, "spec": spec});
        AuthorizationPolicy::read(PolicyKind::Authorization, &serde_json::from_value(object).unwrap())
    }

    #[test]
    fn a_policy_without_a_spec_allows_nobody() {
        let nobody = Content::Rules { action: Action::Allow, rules: vec![] };
        for spec in [json!(null), json!({})] {
            assert_eq!(read(&spec).content, nobody);
        }
    }

    #[test]
    fn whom_it_protects_is_known_although_the_rest_is_not() {
        let selector = json!({"matchLabels": {"app": "web"}});
        for spec in [
            json!({"selector": selector, "action": "REVIEW"}),
            json!({"selector": selector, "rules": "none"}),
            json!({"selector": selector, "surprise": true}),
        ] {
            let policy = read(&spec);
            assert_eq!(policy.selector, Some([("app".to_owned(), "web".to_owned())].into()));
            assert!(matches!(policy.content, Content::Unreadable(_)), "{policy:?}");
        }
        let all = read(&json!({"selector": {"matchExpressions": []}}));
        assert!(all.selector.is_none() && matches!(all.content, Content::Unreadable(_)));
        assert_eq!(read(&json!({"selector": {}})).selector, None);
    }

    #[test]
    fn a_policy_with_a_target_is_a_waypoints() {
        let target = json!({"kind": "Service", "name": "web"});
        for spec in [json!({"targetRefs": [target]}), json!({"targetRef": target})] {
            assert_eq!(read(&spec).content, Content::ForWaypoint);
        }
    }

    #[test]
    fn unknown_fields_are_kept_by_name() {
        let spec = json!({"rules": [{"to": [{"operation": {"methods": ["GET"], "ports": ["80"]}}]}]});
        let Content::Rules { rules, .. } = read(&spec).content else { panic!() };
        let operation = &rules[0].to[0].operation;
        assert_eq!(operation.ports, ["80"]);
        assert_eq!(operation.unknown.keys().collect::<Vec<_>>(), ["methods"]);
    }
}
