//! The two decision lists. In each the first rule that holds wins.
//!
//! *Ready*: a tunnel is connected and has acknowledged the pod. A pod that is not ready follows its fail
//! mode: open passes in clear, closed is refused. So does one whose tunnel's listener is gone, which needs no
//! watcher to tell.

use adit_ebpf_common::{
    address::{Address, UNSPECIFIED, is_loopback, is_unspecified, is_v4},
    flows::{Destination, Flow},
    pods::{CgroupInfo, INBOUND, ListenerKey, OUTBOUND, PodRecord, flag},
    settings::Settings,
    trace::Rule,
};
use aya_ebpf::bindings::bpf_sock;

use crate::{address::same, maps};

/// No redirect. A value of its own and no `None`: on older kernels the verifier refuses programs that read stack which
/// they never wrote (5.10 does), and the compiler makes such a read of a payload that is not there.
pub const NOWHERE: Destination = Destination { address: UNSPECIFIED, port: 0, pad: 0 };

/// A call of connect(2).
pub struct Connect {
    pub is_tcp: bool,
    pub socket: *mut bpf_sock,
    pub destination: Destination,
}

/// What becomes of a connect.
pub enum Outbound {
    Leave(Rule),
    Refuse(Rule),
    Redirect(Destination),
}

/// What becomes of an outbound connection:
///
/// 1. not TCP (MPTCP counts as TCP): leave
/// 2. to loopback, which 0.0.0.0 and :: mean too: leave; but refuse an enrolled, ready pod the tunnel's ports
/// 3. the caller is a tunnel: leave, else its own traffic would come back to it
/// 4. the caller is not enrolled, or a sidecar carries its traffic: leave
/// 5. to the pod's own address: leave; but refuse the tunnel's ports
/// 6. excluded by port or by CIDR: leave
/// 7. the pod is not ready: as its fail mode says
/// 8. the pod has no address of this family, so nothing to redirect to: refuse
/// 9. the tunnel's listener is gone: as its fail mode says
/// 10. the original destination cannot be recorded, so the tunnel could not tell it: refuse
/// 11. redirect to the tunnel
///
/// `info` is what is known of the caller's cgroup; loopback to another port never asks.
#[inline(always)]
pub fn outbound(call: &Connect, settings: &Settings, info: Option<&CgroupInfo>) -> Outbound {
    if !call.is_tcp {
        return Outbound::Leave(Rule::NotTcp);
    }
    let to = &call.destination;
    let local = is_loopback(&to.address) || is_unspecified(&to.address);
    if local && !is_reserved(settings, to.port) {
        return Outbound::Leave(Rule::Loopback);
    }
    let Some(info) = info else {
        return Outbound::Leave(if local { Rule::Loopback } else { Rule::NotEnrolled });
    };
    if info.flags & flag::TUNNEL != 0 {
        return Outbound::Leave(Rule::Tunnel);
    }
    if info.flags & flag::IN_MESH == 0 || (info.flags | info.detected) & flag::SIDECAR != 0 {
        return Outbound::Leave(Rule::NotEnrolled);
    }
    let ready = is_ready(settings, info.flags);
    if local || same(&to.address, &info.v4) || same(&to.address, &info.v6) {
        return if ready && is_reserved(settings, to.port) {
            Outbound::Refuse(Rule::DropReserved)
        } else {
            Outbound::Leave(if local { Rule::Loopback } else { Rule::OwnAddress })
        };
    }
    if maps::is_port_excluded(info.policy_id, to.port, OUTBOUND) {
        return Outbound::Leave(Rule::ExcludedPort);
    }
    if maps::is_cidr_excluded(info.policy_id, &to.address) {
        return Outbound::Leave(Rule::ExcludedCidr);
    }
    if !ready {
        return leave_or_refuse(info);
    }
    let tunnel = if is_v4(&to.address) { info.redirect_v4 } else { info.redirect_v6 };
    if same(&tunnel, &UNSPECIFIED) {
        return Outbound::Refuse(Rule::NoAddress);
    }
    if !has_listener(info, is_v4(&to.address)) {
        return leave_or_refuse(info);
    }
    let redirect = Destination { address: tunnel, port: info.redirect_port, pad: 0 };
    let Some(state) = maps::state_or_new(call.socket) else {
        return Outbound::Refuse(Rule::NotRecorded);
    };
    // Always overwritten: one socket may connect, dissolve and connect again.
    state.original = *to;
    state.redirect = redirect;
    Outbound::Redirect(redirect)
}

/// What becomes of a connect while the tunnel is away.
#[inline(always)]
fn leave_or_refuse(info: &CgroupInfo) -> Outbound {
    if info.flags & flag::FAIL_OPEN != 0 {
        Outbound::Leave(Rule::FailOpen)
    } else {
        Outbound::Refuse(Rule::FailClosed)
    }
}

/// A connection that arrives at a pod's netns.
pub struct Arrival {
    /// As its opener sees it: its `remote` is the pod.
    pub flow: Flow,
    pub is_v4: bool,
}

/// What becomes of an arrival.
pub enum Inbound {
    Pass(Rule),
    /// The opener sees a reset.
    Drop(Rule),
    /// To the tunnel's listener of this key, if it is registered, else as the fail mode says.
    Steer {
        to: ListenerKey,
        rule: Rule,
        fail_open: bool,
    },
}

/// What becomes of an inbound TCP connection:
///
/// 1. from loopback, or from the address that it goes to: pass, the pod talks to itself
/// 2. to an address that belongs to no enrolled pod: pass
/// 3. opened by the tunnel in this very netns: pass, this is how it reaches the application
/// 4. to the tunnel's outbound or inbound port: drop, only redirected connections belong there
/// 5. the port is excluded: pass
/// 6. the pod is not ready: as its fail mode says
/// 7. to the HBONE port: steer to the tunnel's HBONE listener
/// 8. steer to the tunnel's plaintext listener; but if that is there and nobody listens on the port, drop: as
///    without a tunnel in between ([`steered`])
#[inline(always)]
pub fn inbound(arrival: &Arrival, settings: &Settings) -> Inbound {
    let flow = &arrival.flow;
    if is_loopback(&flow.local) || same(&flow.local, &flow.remote) {
        return Inbound::Pass(Rule::SameHost);
    }
    let Some(pod) = maps::pod(&flow.remote) else {
        return Inbound::Pass(Rule::Unknown);
    };
    if maps::tunnel_flow(flow) == Some(pod.netns_cookie) {
        return Inbound::Pass(Rule::NotedFlow);
    }
    let port = flow.remote_port;
    if port == settings.outbound_port || port == settings.inbound_port {
        return Inbound::Drop(Rule::DropReserved);
    }
    if maps::is_port_excluded(pod.policy_id, port, INBOUND) {
        return Inbound::Pass(Rule::ExcludedPort);
    }
    if !is_ready(settings, pod.flags) {
        return without_tunnel(pod.flags & flag::FAIL_OPEN != 0);
    }
    if port == settings.hbone_port {
        steer(pod, arrival, port, Rule::SteerHbone)
    } else {
        steer(pod, arrival, settings.inbound_port, Rule::SteerPlain)
    }
}

/// What becomes of an arrival that the tunnel's listener in its netns would take.
#[inline(always)]
pub fn steered(arrival: &Arrival, netns_cookie: u64, rule: Rule) -> Inbound {
    let key = listener(netns_cookie, arrival, arrival.flow.remote_port);
    if rule as u16 != Rule::SteerPlain as u16 || maps::may_be_listened(key) {
        Inbound::Pass(rule)
    } else {
        Inbound::Drop(Rule::NotListening)
    }
}

/// What becomes of an arrival whose tunnel is away.
#[inline(always)]
pub fn without_tunnel(fail_open: bool) -> Inbound {
    if fail_open { Inbound::Pass(Rule::FailOpen) } else { Inbound::Drop(Rule::FailClosed) }
}

#[inline(always)]
fn steer(pod: &PodRecord, arrival: &Arrival, port: u16, rule: Rule) -> Inbound {
    let fail_open = pod.flags & flag::FAIL_OPEN != 0;
    Inbound::Steer { to: listener(pod.netns_cookie, arrival, port), rule, fail_open }
}

#[inline(always)]
fn listener(netns_cookie: u64, arrival: &Arrival, port: u16) -> ListenerKey {
    let family = if arrival.is_v4 { 4 } else { 6 };
    ListenerKey { netns_cookie, port: u32::from(port), family }
}

#[inline(always)]
fn is_ready(settings: &Settings, flags: u32) -> bool {
    settings.tunnel_up != 0 && flags & flag::READY != 0
}

/// Whether the tunnel's outbound listener is there. One of IPv6 may serve IPv4 as well.
#[inline(always)]
fn has_listener(info: &CgroupInfo, is_v4: bool) -> bool {
    let port = u32::from(info.redirect_port);
    let key = |family| ListenerKey { netns_cookie: info.netns_cookie, port, family };
    is_v4 && maps::is_listening(key(4)) || maps::is_listening(key(6))
}

#[inline(always)]
fn is_reserved(settings: &Settings, port: u16) -> bool {
    port == settings.outbound_port || port == settings.inbound_port || port == settings.hbone_port
}

/// The pod's address of the family of `destination`, for the trace.
#[inline(always)]
pub fn own_address(info: Option<&CgroupInfo>, destination: &Address) -> Address {
    match info {
        Some(info) if is_v4(destination) => info.v4,
        Some(info) => info.v6,
        None => UNSPECIFIED,
    }
}
