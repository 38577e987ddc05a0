//! An `AuthorizationPolicy` or `AccessPolicy` at layer 4.
//!
//! A tunnel sees addresses, ports and identities. What a policy says beyond that makes it stricter:
//! an ALLOW rule that asks for more never matches, and is left out; of a DENY rule, what cannot be
//! seen is left out, so that it matches more. The same goes for values and fields that are not known.

use std::net::IpAddr;

use ipnet::IpNet;
use ztunnel_api::security::{
    Action as SentAction, Address, Authorization, Clause, Match, Rule as SentRule, Scope,
    ServiceAccountMatch, StringMatch, string_match::MatchType,
};

use super::address::octets;
use crate::{
    objects::policy::{Action, AuthorizationPolicy, Condition, Content, Operation, Rule, Source, Unknown},
    report::{PolicyObject, Report},
};

/// As Istio's control plane says it.
pub(super) const UNSUPPORTED: &str = "UnsupportedValue";

/// What is said of `written` in its status. `None`: it is none of a tunnel's business.
pub(super) fn report(namespace: &str, written: &AuthorizationPolicy, notes: &[String]) -> Option<Report> {
    let AuthorizationPolicy { kind, version, name, .. } = written;
    let object = PolicyObject {
        kind: *kind,
        version: version.clone(),
        namespace: namespace.to_owned(),
        name: name.clone(),
    };
    let report = |is_attached, reason, message| {
        Some(Report { object, generation: written.generation, is_attached, reason, message })
    };
    match written.content {
        Content::ForWaypoint => None,
        Content::Rules { action: Action::Audit, .. } => {
            report(false, UNSUPPORTED, "ztunnel does not support the AUDIT action".to_owned())
        }
        _ if notes.is_empty() => report(true, "Accepted", "attached to ztunnel".to_owned()),
        _ => {
            let notes = notes.join("; ");
            report(true, UNSUPPORTED, format!("this policy is stricter than it is written: {notes}"))
        }
    }
}

/// Whether tunnels are told of `written` at all.
pub(super) fn is_sent(written: &AuthorizationPolicy) -> bool {
    !matches!(written.content, Content::ForWaypoint | Content::Rules { action: Action::Audit, .. })
}

/// What tunnels are told of `written`, and what of it cannot be enforced as written.
pub(super) fn policy(
    root_namespace: &str,
    namespace: &str,
    written: &AuthorizationPolicy,
) -> (Option<Authorization>, Vec<String>) {
    let mut notes = Vec::new();
    if !is_sent(written) {
        return (None, notes);
    }
    let (action, rules) = match &written.content {
        Content::Rules { action, rules } => {
            let action = match action {
                Action::Custom => {
                    notes.push("action CUSTOM: a tunnel asks nobody, it denies what matches".to_owned());
                    SentAction::Deny
                }
                Action::Allow => SentAction::Allow,
                Action::Deny | Action::Audit => SentAction::Deny,
            };
            let rules = rules.iter().filter_map(|rule| converted(action, namespace, rule, &mut notes));
            (action, rules.collect())
        }
        // It may allow some and deny some.
        Content::Unreadable(reason) => {
            notes.push(format!("{reason}; everybody is denied"));
            (SentAction::Deny, vec![SentRule::default()])
        }
        Content::ForWaypoint => return (None, notes),
    };
    let scope = match written.selector {
        Some(_) => Scope::WorkloadSelector,
        None if namespace == root_namespace => Scope::Global,
        None => Scope::Namespace,
    };
    notes.dedup();
    let policy = Authorization {
        name: written.sent_name(),
        namespace: namespace.to_owned(),
        scope: scope.into(),
        action: action.into(),
        rules,
        dry_run: written.dry_run,
    };
    (Some(policy), notes)
}

/// `None`: left out.
fn converted(action: SentAction, namespace: &str, rule: &Rule, notes: &mut Vec<String>) -> Option<SentRule> {
    let mut reader = Reader { namespace, unseen: Vec::new() };
    reader.unknown("rules", &rule.unknown);
    let mut clauses = Vec::new();
    if !rule.to.is_empty() {
        let to = rule.to.iter().map(|to| {
            reader.unknown("rules.to", &to.unknown);
            reader.operation(&to.operation)
        });
        clauses.push(Clause { matches: to.collect() });
    }
    if !rule.from.is_empty() {
        let from = rule.from.iter().map(|from| {
            reader.unknown("rules.from", &from.unknown);
            reader.source(&from.source)
        });
        clauses.push(Clause { matches: from.collect() });
    }
    clauses.extend(rule.when.iter().map(|when| Clause { matches: vec![reader.condition(when)] }));
    let unseen = reader.unseen;
    match action {
        SentAction::Allow if !unseen.is_empty() => {
            notes.push(format!("{}: an ALLOW rule with it allows nobody", unseen.join(", ")));
            None
        }
        SentAction::Allow => Some(SentRule { clauses }),
        SentAction::Deny => {
            if !unseen.is_empty() {
                notes.push(format!("{}: a DENY rule denies without asking for it", unseen.join(", ")));
            }
            // To a tunnel, a match without a value matches nothing. Here it stands for everything.
            clauses.retain(|clause| clause.matches.iter().all(|one| *one != Match::default()));
            Some(SentRule { clauses })
        }
    }
}

/// Reads the parts of one rule, and notes what a tunnel cannot see.
struct Reader<'a> {
    namespace: &'a str,
    unseen: Vec<String>,
}

impl Reader<'_> {
    fn unknown(&mut self, at: &str, fields: &Unknown) {
        self.unseen.extend(fields.keys().map(|field| format!("{at}.{field}")));
    }

    /// None of `values` if one cannot be read: for DENY, the field then restricts nothing.
    fn values<T>(&mut self, at: &str, values: &[String], read: impl Fn(&str) -> Option<T>) -> Vec<T> {
        let mut readable = Vec::with_capacity(values.len());
        for value in values {
            let Some(read) = read(value) else {
                self.unseen.push(format!("{at} {value:?}"));
                return Vec::new();
            };
            readable.push(read);
        }
        readable
    }

    fn operation(&mut self, operation: &Operation) -> Match {
        self.unknown("rules.to.operation", &operation.unknown);
        Match {
            destination_ports: self.values("ports", &operation.ports, port),
            not_destination_ports: self.values("notPorts", &operation.not_ports, port),
            ..Match::default()
        }
    }

    fn source(&mut self, source: &Source) -> Match {
        self.unknown("rules.from.source", &source.unknown);
        let namespace = self.namespace;
        let account = |text: &str| {
            let (namespace, name) = text.split_once('/').unwrap_or((namespace, text));
            Some(ServiceAccountMatch { namespace: namespace.to_owned(), service_account: name.to_owned() })
        };
        Match {
            principals: self.values("principals", &source.principals, string),
            not_principals: self.values("notPrincipals", &source.not_principals, string),
            namespaces: self.values("namespaces", &source.namespaces, string),
            not_namespaces: self.values("notNamespaces", &source.not_namespaces, string),
            service_accounts: self.values("serviceAccounts", &source.service_accounts, account),
            not_service_accounts: self.values("notServiceAccounts", &source.not_service_accounts, account),
            source_ips: self.values("ipBlocks", &source.ip_blocks, range),
            not_source_ips: self.values("notIpBlocks", &source.not_ip_blocks, range),
            ..Match::default()
        }
    }

    fn condition(&mut self, condition: &Condition) -> Match {
        let Condition { key, values, not_values, unknown } = condition;
        self.unknown("rules.when", unknown);
        let mut read = Match::default();
        match key.as_str() {
            "source.ip" => {
                read.source_ips = self.values(key, values, range);
                read.not_source_ips = self.values(key, not_values, range);
            }
            "source.namespace" => {
                read.namespaces = self.values(key, values, string);
                read.not_namespaces = self.values(key, not_values, string);
            }
            "source.principal" => {
                read.principals = self.values(key, values, string);
                read.not_principals = self.values(key, not_values, string);
            }
            "destination.ip" => {
                read.destination_ips = self.values(key, values, range);
                read.not_destination_ips = self.values(key, not_values, range);
            }
            "destination.port" => {
                read.destination_ports = self.values(key, values, port);
                read.not_destination_ports = self.values(key, not_values, port);
            }
            _ => self.unseen.push(format!("rules.when {key:?}")),
        }
        read
    }
}

fn port(text: &str) -> Option<u32> {
    text.parse::<u16>().ok().map(u32::from)
}

#[expect(clippy::unnecessary_wraps, reason = "the other kinds of values can be unreadable")]
fn string(text: &str) -> Option<StringMatch> {
    let kind = if text == "*" {
        MatchType::Presence(())
    } else if let Some(suffix) = text.strip_prefix('*') {
        MatchType::Suffix(suffix.to_owned())
    } else if let Some(prefix) = text.strip_suffix('*') {
        MatchType::Prefix(prefix.to_owned())
    } else {
        MatchType::Exact(text.to_owned())
    };
    Some(StringMatch { match_type: Some(kind) })
}

fn range(text: &str) -> Option<Address> {
    let net: IpNet = match text.parse() {
        Ok(net) => net,
        Err(_) => text.parse::<IpAddr>().ok()?.into(),
    };
    Some(Address { address: octets(net.addr()), length: net.prefix_len().into() })
}

#[cfg(test)]
mod tests;
