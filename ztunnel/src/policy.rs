//! Whether a connection may reach a workload: deny first, then allow.
//!
//! * [`Protection`]: what protects one workload, and what it decides
//! * [`PodProtection`]: the same of a served pod, as it changes

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Weak},
};

use tokio::sync::watch;

use crate::{
    identity::{Identity, MeshTrust, TrustDomains},
    mesh::{
        Mesh, Policy, PolicyKey, PolicyKnowledge, PolicySet, Store, Workload,
        policies::{Action, ConnectionFacts},
    },
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

/// Why a connection is not allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denied {
    #[error("explicitly denied by: {0}")]
    ByPolicy(PolicyKey),
    #[error(
        "denied: policy {0} was refused, so what it allows is not known; the tunnel's log has the reason"
    )]
    ByStandIn(PolicyKey),
    #[error("allow policies exist, but none allowed")]
    NotAllowed,
    #[error("the workload names policy {0}, of which the control plane has said nothing")]
    Unheard(PolicyKey),
}

/// What protects one workload: the policies of the whole mesh, of its namespace, and those that it
/// names.
#[derive(Clone, Debug, Default)]
pub(crate) struct Protection {
    in_force: Vec<Arc<Policy>>,
    /// On trial (`dry_run`): they decide nothing.
    trial: Vec<Arc<Policy>>,
    /// Named, and never heard of.
    unheard: Vec<PolicyKey>,
    /// The mesh that the workload is in.
    domains: TrustDomains,
}

impl Protection {
    /// What protects `workload`, in the mesh of its trust domain. A named policy that was removed is
    /// none: the workload will soon name it no longer.
    pub(crate) fn of(mesh: &Mesh, workload: &Workload, trust: &MeshTrust) -> Self {
        let domains = trust.domains(&workload.trust_domain);
        let mut all = Self { domains, ..Self::default() };
        for policy in mesh.policies_by_scope(&workload.namespace) {
            all.add(policy);
        }
        for key in &workload.policies {
            match mesh.policy(key) {
                PolicyKnowledge::Held(policy) => all.add(policy),
                PolicyKnowledge::Removed => {}
                PolicyKnowledge::Unheard => all.unheard.push(key.clone()),
            }
        }
        all
    }

    fn add(&mut self, policy: &Arc<Policy>) {
        let list = if policy.dry_run { &mut self.trial } else { &mut self.in_force };
        list.push(Arc::clone(policy));
    }

    /// Whether `other` is the same policies: then it decides the same, too.
    fn is(&self, other: &Self) -> bool {
        let same = |these: &[Arc<Policy>], those: &[Arc<Policy>]| {
            these.len() == those.len() && these.iter().zip(those).all(|(this, that)| Arc::ptr_eq(this, that))
        };
        same(&self.in_force, &other.in_force)
            && same(&self.trial, &other.trial)
            && self.unheard == other.unheard
            && self.domains == other.domains
    }

    /// Whether the workload names a policy that was never heard of.
    pub(crate) fn names_unheard(&self) -> bool {
        !self.unheard.is_empty()
    }

    /// First rule that holds wins:
    ///
    /// 1. a deny policy matches: denied
    /// 2. a policy was never heard of: not allowed, since it may be one that denies. Of those made from
    ///    a `PeerAuthentication` it is known that they deny nobody with an identity
    /// 3. no allow policy protects the workload: allowed
    /// 4. an allow policy matches: allowed
    /// 5. denied
    ///
    /// Policies on trial take no part.
    pub(crate) fn check(&self, connection: &InboundConnection<'_>) -> Result<(), Denied> {
        decide(&self.in_force, &self.unheard, connection, &self.domains)
    }

    /// What the policies on trial alone would do.
    pub(crate) fn try_out(&self, connection: &InboundConnection<'_>) -> Result<(), Denied> {
        decide(&self.trial, &[], connection, &self.domains)
    }
}

/// What protects a served pod, for its open connections. A mesh changes all the time, and very few
/// changes are about the policies of one pod: only those wake anybody.
#[derive(Debug, Default)]
pub(crate) struct PodProtection(watch::Sender<Arc<Protection>>);

impl PodProtection {
    /// Starts with what holds now.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Protection>> {
        self.0.subscribe()
    }

    /// Follows what `store` says of the workload that `find` finds, until the pod is gone: `of` is
    /// its handle. A workload that is no longer known keeps what it had.
    pub(crate) async fn follow<P>(
        store: Arc<Store>,
        trust: Arc<MeshTrust>,
        pod: Weak<P>,
        of: impl Fn(&P) -> &Self,
        find: impl Fn(&P, &Mesh) -> Option<Arc<Workload>>,
    ) {
        let (mut changes, mut domains) = (store.subscribe(), trust.subscribe());
        let mut last: Option<(Arc<Workload>, PolicySet)> = None;
        loop {
            changes.mark_unchanged();
            {
                let Some(pod) = pod.upgrade() else { return };
                let mesh = store.snapshot();
                let unchanged = |workload: &Arc<Workload>| {
                    last.as_ref()
                        .is_some_and(|(seen, set)| Arc::ptr_eq(seen, workload) && mesh.has_policies(set))
                };
                if let Some(workload) = find(&pod, &mesh).filter(|workload| !unchanged(workload)) {
                    of(&pod).set(Protection::of(&mesh, &workload, &trust));
                    last = Some((workload, mesh.policy_set()));
                }
            }
            tokio::select! {
                still_told = changes.changed() => if still_told.is_err() { return },
                () = domains.changed() => last = None,
            }
        }
    }

    fn set(&self, now: Protection) {
        self.0.send_if_modified(|held| {
            let changed = !held.is(&now);
            if changed {
                *held = Arc::new(now);
            }
            changed
        });
    }
}

fn decide(
    policies: &[Arc<Policy>],
    unheard: &[PolicyKey],
    connection: &InboundConnection<'_>,
    domains: &TrustDomains,
) -> Result<(), Denied> {
    if policies.is_empty() && unheard.is_empty() {
        return Ok(());
    }
    let InboundConnection { source_ip, source, destination } = *connection;
    let facts = ConnectionFacts::new(source_ip, source, destination, domains);
    let by = |action| policies.iter().filter(move |policy| policy.action == action);
    if let Some(deny) = by(Action::Deny).find(|policy| policy.matches(&facts)) {
        let key = deny.key.clone();
        return Err(if deny.stand_in { Denied::ByStandIn(key) } else { Denied::ByPolicy(key) });
    }
    // Istio's control plane names some for good that it does not send (converted, with a port that is
    // strict in a mesh that is strict, of a workload that is not).
    let may_deny = |key: &&PolicyKey| source.is_none() || !key.is_peer_authentication();
    if let Some(key) = unheard.iter().find(may_deny) {
        return Err(Denied::Unheard(key.clone()));
    }
    let mut allows = by(Action::Allow).peekable();
    if allows.peek().is_none() || allows.any(|policy| policy.matches(&facts)) {
        return Ok(());
    }
    // A policy that is known to the letter comes before what stands in for another.
    match by(Action::Allow).all(|policy| policy.stand_in).then(|| by(Action::Allow).next()).flatten() {
        Some(stand_in) => Err(Denied::ByStandIn(stand_in.key.clone())),
        None => Err(Denied::NotAllowed),
    }
}

#[cfg(test)]
mod tests;
