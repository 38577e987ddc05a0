//! Authorization policies as written: who may connect to whom. [`crate::policy`] applies them.

use std::{
    cell::OnceCell,
    collections::{BTreeMap, HashMap},
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

use ipnet::IpNet;
use serde::{
    Serialize, Serializer,
    ser::{SerializeMap as _, SerializeSeq as _},
};

use super::InvalidKey;
use crate::identity::{Identity, TrustDomains};

/// The key of a policy, written `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyKey {
    /// Namespace. Empty for Istio's converted global policies.
    pub namespace: Arc<str>,
    /// Name. Never empty.
    pub name: Arc<str>,
}

impl PolicyKey {
    /// Whether it was made from a `PeerAuthentication`, whatever it says: it denies nobody who has
    /// proven an identity. No object of the API can have such a name.
    pub(crate) fn is_peer_authentication(&self) -> bool {
        self.name.starts_with("converted_peer_authentication_")
    }
}

impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for PolicyKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, name)) if !name.is_empty() => {
                Ok(Self { namespace: namespace.into(), name: name.into() })
            }
            _ => Err(InvalidKey::new("policy", text, "namespace/name")),
        }
    }
}

impl Serialize for PolicyKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// An authorization policy (Istio's `AuthorizationPolicy`, as the control plane sends it).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// Shown as its namespace and its name.
    #[serde(flatten, serialize_with = "namespace_and_name")]
    pub(crate) key: PolicyKey,
    pub(crate) scope: PolicyScope,
    pub(crate) action: Action,
    /// The policy matches if any rule matches. Without rules it matches nothing.
    pub rules: Vec<Rule>,
    /// Dry run: the result is only logged.
    pub dry_run: bool,
    /// The control plane sent something that this tunnel does not understand. This is what is left
    /// of it: stricter than it can have been.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stand_in: bool,
}

fn namespace_and_name<S: Serializer>(key: &PolicyKey, serializer: S) -> Result<S::Ok, S::Error> {
    let mut shown = serializer.serialize_map(Some(2))?;
    shown.serialize_entry("namespace", &key.namespace)?;
    shown.serialize_entry("name", &key.name)?;
    shown.end()
}

/// The workloads that a policy protects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum PolicyScope {
    /// All workloads.
    Global,
    /// The workloads of its own namespace.
    Namespace,
    /// The workloads that name it.
    WorkloadSelector,
}

/// The effect of a policy on connections that match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Action {
    /// Allow them; with an allow policy, connections that match none are denied.
    Allow,
    /// Deny them.
    Deny,
}

/// A rule matches if all of its clauses match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Rule(pub Vec<Clause>);

/// A clause matches if any of its matches does. An empty clause matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Clause(pub Vec<Match>);

/// Every kind that has values must match: at least one of its values, and none of its `not_*`
/// values. A match without any value matches nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Match {
    pub(crate) namespaces: Vec<StringMatch>,
    pub(crate) not_namespaces: Vec<StringMatch>,
    pub(crate) principals: Vec<StringMatch>,
    pub(crate) not_principals: Vec<StringMatch>,
    pub(crate) service_accounts: Vec<ServiceAccountMatch>,
    pub(crate) not_service_accounts: Vec<ServiceAccountMatch>,
    pub(crate) source_ips: Vec<IpNet>,
    pub(crate) not_source_ips: Vec<IpNet>,
    pub(crate) destination_ips: Vec<IpNet>,
    pub(crate) not_destination_ips: Vec<IpNet>,
    pub(crate) destination_ports: Vec<u16>,
    pub(crate) not_destination_ports: Vec<u16>,
}

/// How a text is compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum StringMatch {
    /// Equal.
    Exact(String),
    /// Begins with.
    Prefix(String),
    /// Ends with.
    Suffix(String),
    /// Any text that is not empty. Shown as an object, as the others are.
    #[serde(serialize_with = "empty")]
    Presence,
}

fn empty<S: Serializer>(serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_seq(Some(0))?.end()
}

impl StringMatch {
    /// Whether `text` matches.
    #[must_use]
    pub fn accepts(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => text == exact,
            Self::Prefix(prefix) => text.starts_with(prefix.as_str()),
            Self::Suffix(suffix) => text.ends_with(suffix.as_str()),
            Self::Presence => !text.is_empty(),
        }
    }
}

/// A service account of a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceAccountMatch {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub service_account: String,
}

/// The trust domain by which policies mean the mesh that they are in, whatever its name is.
const THIS_MESH: &str = "cluster.local";

/// The connection that a policy is evaluated for.
#[derive(Clone, Debug)]
pub struct ConnectionFacts<'a> {
    source_ip: IpAddr,
    /// `None` for plaintext, which has no namespace and no principal: matches on these fail.
    source: Option<&'a Identity>,
    destination: SocketAddr,
    domains: &'a TrustDomains,
    /// How policies may write the principal. Made when the first one asks.
    principals: OnceCell<Vec<String>>,
}

impl<'a> ConnectionFacts<'a> {
    /// From `source_ip`, which has proved to be `source`, to `destination` in the mesh of `domains`.
    #[must_use]
    pub fn new(
        source_ip: IpAddr,
        source: Option<&'a Identity>,
        destination: SocketAddr,
        domains: &'a TrustDomains,
    ) -> Self {
        Self { source_ip, source, destination, domains, principals: OnceCell::new() }
    }

    /// Without the scheme (Istio: `cluster.local/ns/a/sa/b`). A workload of this mesh may be written
    /// with any of the mesh's trust domains, and with [`THIS_MESH`].
    fn principals(&self) -> &[String] {
        self.principals.get_or_init(|| {
            let Some(Identity { trust_domain, namespace, service_account }) = self.source else {
                return Vec::new();
            };
            let in_domain = |domain: &str| format!("{domain}/ns/{namespace}/sa/{service_account}");
            if !self.domains.contains(trust_domain) {
                return vec![in_domain(trust_domain)];
            }
            let this_mesh = (!self.domains.contains(THIS_MESH)).then_some(THIS_MESH);
            self.domains.names().map(|name| &**name).chain(this_mesh).map(in_domain).collect()
        })
    }
}

impl Policy {
    /// Whether any rule matches.
    pub fn matches(&self, facts: &ConnectionFacts<'_>) -> bool {
        let clause =
            |Clause(matches): &Clause| matches.is_empty() || matches.iter().any(|one| one.matches(facts));
        self.rules.iter().any(|Rule(clauses)| clauses.iter().all(clause))
    }
}

impl Match {
    fn matches(&self, facts: &ConnectionFacts<'_>) -> bool {
        let namespace = |m: &StringMatch| facts.source.is_some_and(|id| m.accepts(&id.namespace));
        let principal = |m: &StringMatch| facts.principals().iter().any(|known| m.accepts(known));
        let account = |m: &ServiceAccountMatch| {
            facts
                .source
                .is_some_and(|id| *id.namespace == *m.namespace && *id.service_account == *m.service_account)
        };
        let within = |ip: IpAddr, net: &IpNet| net.contains(&ip.to_canonical());
        self != &Self::default()
            && holds(&self.namespaces, &self.not_namespaces, namespace)
            && holds(&self.principals, &self.not_principals, principal)
            && holds(&self.service_accounts, &self.not_service_accounts, account)
            && holds(&self.source_ips, &self.not_source_ips, |net| within(facts.source_ip, net))
            && holds(&self.destination_ips, &self.not_destination_ips, |net| {
                within(facts.destination.ip(), net)
            })
            && holds(&self.destination_ports, &self.not_destination_ports, |&p| p == facts.destination.port())
    }
}

/// Whether one of `wanted` accepts (if there are any) and none of `unwanted` does.
fn holds<T>(wanted: &[T], unwanted: &[T], accepts: impl Fn(&T) -> bool) -> bool {
    (wanted.is_empty() || wanted.iter().any(&accepts)) && !unwanted.iter().any(&accepts)
}

/// What is known of a policy that somebody names.
#[derive(Clone, Copy, Debug)]
pub enum PolicyKnowledge<'a> {
    /// It is this.
    Held(&'a Arc<Policy>),
    /// It was removed, or its source said that there is none.
    Removed,
    /// No word of it yet. It may forbid anything.
    Unheard,
}

/// Removed policies that are remembered as such. Workloads name a removed policy for a moment only,
/// so the number covers any burst; what is forgotten counts as unheard, which is stricter.
const REMEMBERED: usize = 4096;

/// All policies. There are few compared with workloads, so a change copies the lists.
#[derive(Clone, Debug, Default)]
pub(super) struct Policies {
    all: BTreeMap<PolicyKey, Arc<Policy>>,
    global: Vec<Arc<Policy>>,
    by_namespace: HashMap<Arc<str>, Vec<Arc<Policy>>>,
    /// With the order of their removal.
    removed: BTreeMap<PolicyKey, u64>,
    removals: u64,
}

impl Policies {
    pub(super) fn get(&self, key: &PolicyKey) -> PolicyKnowledge<'_> {
        match self.all.get(key) {
            Some(policy) => PolicyKnowledge::Held(policy),
            None if self.removed.contains_key(key) => PolicyKnowledge::Removed,
            None => PolicyKnowledge::Unheard,
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.all.values()
    }

    pub(super) fn by_scope(&self, namespace: &str) -> impl Iterator<Item = &Arc<Policy>> {
        self.global.iter().chain(self.by_namespace.get(namespace).into_iter().flatten())
    }

    pub(super) fn put(&mut self, policy: Policy) {
        self.take(&policy.key);
        self.removed.remove(&policy.key);
        let policy = Arc::new(policy);
        if let Some(scope) = self.scope(&policy) {
            let place = scope.partition_point(|other| other.key < policy.key);
            scope.insert(place, Arc::clone(&policy));
        }
        self.all.insert(policy.key.clone(), policy);
    }

    /// Also remembers that it was removed, whether or not it was there.
    pub(super) fn remove(&mut self, key: &PolicyKey) {
        self.take(key);
        self.removals += 1;
        self.removed.insert(key.clone(), self.removals);
        if self.removed.len() > REMEMBERED
            && let Some(oldest) = self.removed.iter().min_by_key(|(_, order)| **order)
        {
            let oldest = oldest.0.clone();
            self.removed.remove(&oldest);
        }
    }

    fn take(&mut self, key: &PolicyKey) {
        let Some(policy) = self.all.remove(key) else { return };
        if let Some(scope) = self.scope(&policy) {
            scope.retain(|other| other.key != *key);
        }
        if self.by_namespace.get(&policy.key.namespace).is_some_and(Vec::is_empty) {
            self.by_namespace.remove(&policy.key.namespace);
        }
    }

    /// The list for this scope, in order of the keys. `None` for policies that workloads name.
    fn scope(&mut self, policy: &Policy) -> Option<&mut Vec<Arc<Policy>>> {
        match policy.scope {
            PolicyScope::Global => Some(&mut self.global),
            PolicyScope::Namespace => {
                Some(self.by_namespace.entry(Arc::clone(&policy.key.namespace)).or_default())
            }
            PolicyScope::WorkloadSelector => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(name: &str) -> Policy {
        let key = PolicyKey { namespace: "demo".into(), name: name.into() };
        let (scope, action) = (PolicyScope::Global, Action::Deny);
        Policy { key, scope, action, rules: Vec::new(), dry_run: false, stand_in: false }
    }

    /// `istioctl` reads no text where it expects an object.
    #[test]
    fn a_policy_is_shown_as_istios_tunnel_shows_it() {
        let identity = vec![StringMatch::Presence, StringMatch::Exact("a".to_owned())];
        let one = Match { not_principals: identity, ..Match::default() };
        let shown =
            serde_json::to_value(Policy { rules: vec![Rule(vec![Clause(vec![one])])], ..policy("p") });
        let shown = shown.unwrap();
        assert_eq!(
            (&shown["namespace"], &shown["name"], &shown["key"]),
            (&"demo".into(), &"p".into(), &().into())
        );
        let identity = &shown["rules"][0][0][0]["notPrincipals"];
        assert_eq!(*identity, serde_json::json!([{"Presence": []}, {"Exact": "a"}]));
    }

    #[test]
    fn unheard_removed_and_held_are_told_apart() {
        let mut policies = Policies::default();
        let key = policy("a").key;
        assert!(matches!(policies.get(&key), PolicyKnowledge::Unheard));
        policies.put(policy("a"));
        assert!(matches!(policies.get(&key), PolicyKnowledge::Held(_)));
        policies.remove(&key);
        assert!(matches!(policies.get(&key), PolicyKnowledge::Removed));
        policies.put(policy("a"));
        assert!(matches!(policies.get(&key), PolicyKnowledge::Held(_)));
        // Its source may say that there is none before it ever said that there is one.
        let never = policy("never").key;
        policies.remove(&never);
        assert!(matches!(policies.get(&never), PolicyKnowledge::Removed));
    }

    #[test]
    fn the_oldest_removals_are_forgotten() {
        let mut policies = Policies::default();
        for number in 0..=REMEMBERED {
            policies.remove(&policy(&number.to_string()).key);
        }
        assert!(matches!(policies.get(&policy("0").key), PolicyKnowledge::Unheard));
        assert!(matches!(policies.get(&policy("1").key), PolicyKnowledge::Removed));
        assert_eq!(policies.removed.len(), REMEMBERED);
    }
}
