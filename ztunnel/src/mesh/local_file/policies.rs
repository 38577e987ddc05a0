//! Policies as written, and the checks on each.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, de::IgnoredAny};

use super::{LocalFileError, check::from_text, invalid};
use crate::mesh::{
    Policy, PolicyKey,
    policies::{Action, Clause, Match, PolicyScope, Rule, ServiceAccountMatch, StringMatch},
};

/// A policy as it is written.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct PolicyEntry {
    name: String,
    namespace: String,
    scope: ScopeEntry,
    action: ActionEntry,
    #[serde(default)]
    rules: Vec<Vec<Vec<MatchEntry>>>,
    #[serde(default)]
    dry_run: bool,
}

#[derive(Deserialize)]
enum ScopeEntry {
    Global,
    Namespace,
    WorkloadSelector,
}

#[derive(Deserialize)]
enum ActionEntry {
    Allow,
    Deny,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct MatchEntry {
    namespaces: Vec<StringEntry>,
    not_namespaces: Vec<StringEntry>,
    principals: Vec<StringEntry>,
    not_principals: Vec<StringEntry>,
    service_accounts: Vec<ServiceAccountEntry>,
    not_service_accounts: Vec<ServiceAccountEntry>,
    source_ips: Vec<String>,
    not_source_ips: Vec<String>,
    destination_ips: Vec<String>,
    not_destination_ips: Vec<String>,
    destination_ports: Vec<u16>,
    not_destination_ports: Vec<u16>,
}

/// `{Exact: text}` and similar; plain text means an exact match.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text, or one of Exact, Prefix, Suffix and Presence")]
enum StringEntry {
    Exact(String),
    Tagged(TaggedStringEntry),
}

#[derive(Deserialize)]
enum TaggedStringEntry {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Presence(IgnoredAny),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ServiceAccountEntry {
    namespace: String,
    service_account: String,
}

impl PolicyEntry {
    pub(super) fn check(self) -> Result<Policy, LocalFileError> {
        let object = format!("policy {}/{}", self.namespace, self.name);
        if self.name.is_empty() {
            return Err(invalid(object, "name", "may not be empty"));
        }
        let clause = |matches: Vec<MatchEntry>| {
            matches.into_iter().map(|one| one.check(&object)).collect::<Result<_, _>>().map(Clause)
        };
        let rule = |clauses: Vec<_>| clauses.into_iter().map(clause).collect::<Result<_, _>>().map(Rule);
        Ok(Policy {
            rules: self.rules.into_iter().map(rule).collect::<Result<_, LocalFileError>>()?,
            scope: match self.scope {
                ScopeEntry::Global => PolicyScope::Global,
                ScopeEntry::Namespace => PolicyScope::Namespace,
                ScopeEntry::WorkloadSelector => PolicyScope::WorkloadSelector,
            },
            action: match self.action {
                ActionEntry::Allow => Action::Allow,
                ActionEntry::Deny => Action::Deny,
            },
            dry_run: self.dry_run,
            stand_in: false,
            key: PolicyKey { namespace: self.namespace.into(), name: self.name.into() },
        })
    }
}

impl MatchEntry {
    fn check(self, object: &str) -> Result<Match, LocalFileError> {
        let nets = |texts: Vec<String>, key| -> Result<Vec<_>, _> {
            texts.iter().map(|text| net(object, key, text)).collect()
        };
        let strings = |entries: Vec<StringEntry>| entries.into_iter().map(StringMatch::from).collect();
        let accounts = |entries: Vec<ServiceAccountEntry>| {
            let account = |entry: ServiceAccountEntry| ServiceAccountMatch {
                namespace: entry.namespace,
                service_account: entry.service_account,
            };
            entries.into_iter().map(account).collect()
        };
        Ok(Match {
            namespaces: strings(self.namespaces),
            not_namespaces: strings(self.not_namespaces),
            principals: strings(self.principals),
            not_principals: strings(self.not_principals),
            service_accounts: accounts(self.service_accounts),
            not_service_accounts: accounts(self.not_service_accounts),
            source_ips: nets(self.source_ips, "sourceIps")?,
            not_source_ips: nets(self.not_source_ips, "notSourceIps")?,
            destination_ips: nets(self.destination_ips, "destinationIps")?,
            not_destination_ips: nets(self.not_destination_ips, "notDestinationIps")?,
            destination_ports: self.destination_ports,
            not_destination_ports: self.not_destination_ports,
        })
    }
}

impl From<StringEntry> for StringMatch {
    fn from(entry: StringEntry) -> Self {
        match entry {
            StringEntry::Exact(text) | StringEntry::Tagged(TaggedStringEntry::Exact(text)) => {
                Self::Exact(text)
            }
            StringEntry::Tagged(TaggedStringEntry::Prefix(text)) => Self::Prefix(text),
            StringEntry::Tagged(TaggedStringEntry::Suffix(text)) => Self::Suffix(text),
            StringEntry::Tagged(TaggedStringEntry::Presence(IgnoredAny)) => Self::Presence,
        }
    }
}

/// A CIDR, or one address.
fn net(object: &str, key: &'static str, text: &str) -> Result<IpNet, LocalFileError> {
    match text.parse::<IpAddr>() {
        Ok(ip) => Ok(ip.into()),
        Err(_) => from_text(object, key, text),
    }
}
