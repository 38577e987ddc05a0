//! Whether a connection may reach a workload: deny first, then allow.

use tracing::{debug, info};

use crate::{
    identity::Identity,
    mesh::{
        Mesh, Policy, PolicyKey, Workload,
        policies::{Action, ConnectionFacts},
    },
};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// An inbound connection, as policies see it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InboundConnection<'a> {
    pub source_ip: IpAddr,
    /// Proven by mutual TLS. `None` for plaintext.
    pub source: Option<&'a Identity>,
    /// The application's address and port, never the tunnel's own 15008.
    pub destination: SocketAddr,
}

/// Why a connection is denied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denied {
    #[error("explicitly denied by: {0}")]
    ByPolicy(PolicyKey),
    #[error("allow policies exist, but none allowed")]
    NotAllowed,
}

/// First rule that holds wins:
///
/// 1. a deny policy matches: denied
/// 2. no allow policy protects the workload: allowed
/// 3. an allow policy matches: allowed
/// 4. denied
///
/// Policies on trial (`dry_run`) take no part; what they would have denied is logged.
pub(crate) fn check(
    mesh: &Mesh,
    workload: &Workload,
    connection: &InboundConnection<'_>,
) -> Result<(), Denied> {
    let (trial, in_force): (Vec<_>, Vec<_>) =
        protecting(mesh, workload).into_iter().partition(|policy| policy.dry_run);
    let facts = ConnectionFacts {
        source_ip: connection.source_ip,
        source: connection.source,
        destination_ip: connection.destination.ip(),
        destination_port: connection.destination.port(),
    };
    if !trial.is_empty()
        && let Err(denied) = decide(&trial, &facts)
    {
        info!(dst.workload = &*workload.name, source_ip = %connection.source_ip, %denied, "dry-run: would deny");
    }
    decide(&in_force, &facts)
}

fn decide(policies: &[&Arc<Policy>], facts: &ConnectionFacts<'_>) -> Result<(), Denied> {
    let by = |action| policies.iter().filter(move |policy| policy.action == action);
    if let Some(deny) = by(Action::Deny).find(|policy| policy.matches(facts)) {
        return Err(Denied::ByPolicy(deny.key.clone()));
    }
    let mut allows = by(Action::Allow).peekable();
    if allows.peek().is_none() || allows.any(|policy| policy.matches(facts)) {
        return Ok(());
    }
    Err(Denied::NotAllowed)
}

/// The policies of the whole mesh, of the workload's namespace, and those that the workload names.
/// A named policy that is unknown is skipped, as in Istio's tunnel: it may have been deleted since.
fn protecting<'a>(mesh: &'a Mesh, workload: &Workload) -> Vec<&'a Arc<Policy>> {
    let named = workload.policies.iter().filter_map(|key| {
        let policy = mesh.policy(key);
        if policy.is_none() {
            debug!(policy = %key, workload = &*workload.name, "a policy that the workload names is unknown");
        }
        policy
    });
    mesh.policies_by_scope(&workload.namespace).chain(named).collect()
}

#[cfg(test)]
mod tests;
