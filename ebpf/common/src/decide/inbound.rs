//! The list for connections that arrive in a pod's netns.

use super::{ArrivalFacts, is_ready};
use crate::{
    address::{is_loopback, same},
    enrolment::flag,
    exclusions::{INBOUND, Listed},
    flows::Flow,
    listeners::ListenerKey,
    trace::Rule,
};

/// A connection that arrives at a pod's netns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// As its opener sees it: `remote` is the pod.
    pub flow: Flow,
    /// The family of the packet.
    pub is_v4: bool,
}

/// The verdict about an arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inbound {
    /// It goes to the listener that it was steered to, else to the pod's own.
    Pass(Rule),
    /// The opener sees a reset.
    Drop(Rule),
}

impl Inbound {
    /// The rule that decided.
    #[inline(always)]
    #[must_use]
    pub const fn rule(&self) -> Rule {
        match self {
            Self::Pass(rule) | Self::Drop(rule) => *rule,
        }
    }
}

/// Decides about an inbound TCP connection, whichever address of the netns it goes to:
///
/// 1. from the address that it goes to, and redirected by connect(2): steer to the tunnel's outbound
///    listener; drop, if that went away since
/// 2. from loopback, or from the address that it goes to: pass, the pod talks to itself
/// 3. the netns is not known as a pod's, so nobody can say what its policy is: drop
/// 4. opened by the tunnel in this very netns: pass, this is how it reaches the application
/// 5. to the tunnel's outbound or inbound port: drop, only redirected connections belong there
/// 6. the port is excluded, or there are inclusion lists and none has it: pass
/// 7. opened by the kubelet, and not to the HBONE port: pass, whatever the tunnel and policy. It
///    decides about the pod's life, and what it sends is no traffic of the mesh
/// 8. the pod is not ready: by its fail mode
/// 9. to the HBONE port: steer to the tunnel's HBONE listener; without one, by the pod's fail mode
/// 10. the tunnel has no plaintext listener: by the pod's fail mode
/// 11. no application listens on the port: drop, as without a tunnel in between
/// 12. steer to the tunnel's plaintext listener
#[inline(always)]
pub fn inbound(facts: &impl ArrivalFacts, arrival: &Arrival) -> Inbound {
    let flow = &arrival.flow;
    let is_own = same(&flow.local, &flow.remote);
    if is_own && facts.is_redirected(flow) {
        // Never to the pod's own listener of that port, which it did not dial.
        let to = ListenerKey::new(facts.arrival_netns(), facts.settings().outbound_port, arrival.is_v4);
        return if steer(facts, to) {
            Inbound::Pass(Rule::SteerOutbound)
        } else {
            Inbound::Drop(Rule::ListenerGone)
        };
    }
    if is_own || is_loopback(&flow.local) {
        return Inbound::Pass(Rule::SameHost);
    }
    let Some(pod) = facts.netns() else {
        return Inbound::Drop(Rule::UnknownNetns);
    };
    if facts.tunnel_flow(flow) == Some(facts.arrival_netns()) {
        return Inbound::Pass(Rule::NotedFlow);
    }
    let settings = facts.settings();
    let port = flow.remote_port;
    if port == settings.outbound_port || port == settings.inbound_port {
        return Inbound::Drop(Rule::DropReserved);
    }
    let listed = facts.port_listed(pod.exclusion_id, port, INBOUND);
    if listed == Listed::EXCLUDED {
        return Inbound::Pass(Rule::ExcludedPort);
    }
    if listed == Listed::OUTSIDE {
        return Inbound::Pass(Rule::NotIncluded);
    }
    let is_hbone = port == settings.hbone_port;
    if !is_hbone && facts.is_of_kubelet(flow) {
        return Inbound::Pass(Rule::Kubelet);
    }
    let tunnel_port = if is_hbone { port } else { settings.inbound_port };
    let to = ListenerKey::new(facts.arrival_netns(), tunnel_port, arrival.is_v4);
    if !is_ready(settings, pod.flags) || !steer(facts, to) {
        return if pod.flags & flag::FAIL_OPEN != 0 {
            Inbound::Pass(Rule::FailOpen)
        } else {
            Inbound::Drop(Rule::FailClosed)
        };
    }
    if is_hbone {
        return Inbound::Pass(Rule::SteerHbone);
    }
    // What is dropped goes to no socket, also when it was steered before.
    if may_listen(facts, ListenerKey::new(facts.arrival_netns(), port, arrival.is_v4)) {
        Inbound::Pass(Rule::SteerPlain)
    } else {
        Inbound::Drop(Rule::NotListening)
    }
}

/// Steers to the tunnel's listener `to`. A listener of IPv6 serves IPv4 too, where there is no
/// other.
#[inline(always)]
fn steer(facts: &impl ArrivalFacts, to: ListenerKey) -> bool {
    facts.steer(&to) || to.family == 4 && facts.steer(&to.v6())
}

/// Whether an application may have the listener `key`: where not every listener is known, it may.
#[inline(always)]
fn may_listen(facts: &impl ArrivalFacts, key: ListenerKey) -> bool {
    facts.has_app_listener(&key)
        // A socket of IPv6 may serve IPv4 too.
        || key.family == 4 && facts.has_app_listener(&key.v6())
        || !facts.knows_all_app_listeners(key.netns_cookie)
}
