//! What happens to TCP sockets between the calls.
//!
//! The original destination travels from the application's socket to the tunnel's in three steps,
//! none of which can come too late for the next:
//!
//! 1. connect(2) writes it into the state of the application's socket
//! 2. the connect callback, before the SYN leaves and with the source port chosen, publishes it
//!    under the flow
//! 3. the established callback, before accept(2) can return, moves it into the state of the
//!    accepted socket
//!
//! The cgroup that a socket was created in decides which programs run: the tunnel's sockets stay
//! with the tunnel, wherever their netns is. Where the tunnel's cgroup lies below the pods' cgroup,
//! both programs run on a socket; each acts only on states that the other never makes.

use adit_ebpf_common::{
    address::{is_loopback, same},
    flows::{Destination, Flow},
    listeners::ListenerKey,
};
use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB,
    },
    macros::{cgroup_sock, sock_ops},
    programs::{SockContext, SockOpsContext},
};

use crate::{
    context::{
        SockOps, SocketEvent,
        verdict::{ALLOW, IGNORED},
    },
    maps::{self, flows, pods},
};

/// Sockets of pods: publishes original destinations, withdraws those that nobody took, records who
/// listens.
#[sock_ops]
pub fn adit_pods_ops(ctx: SockOpsContext) -> u32 {
    let ops = SockOps::new(ctx);
    match ops.op() {
        BPF_SOCK_OPS_TCP_LISTEN_CB => record_app_listener(&ops),
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            if let Some((flow, original)) = redirected(&ops) {
                flows::publish_original(&flow, &original);
                ops.watch_close();
            }
        }
        BPF_SOCK_OPS_STATE_CB if ops.is_closing() => {
            if let Some((flow, _)) = redirected(&ops) {
                flows::withdraw_original(&flow);
            }
        }
        _ => (),
    }
    IGNORED
}

/// The tunnel's sockets: registers listeners, records the flows that it opens, moves original
/// destinations to the sockets that it accepts, counts those that need the pod's netns prepared.
#[sock_ops]
pub fn adit_tunnel_ops(ctx: SockOpsContext) -> u32 {
    let ops = SockOps::new(ctx);
    match ops.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => record_tunnel_flow(&ops),
        BPF_SOCK_OPS_TCP_LISTEN_CB => register(&ops),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => {
            if let Some(flow) = ops.flow() {
                flows::shorten_tunnel_flow(&flow);
            }
        }
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(&ops),
        BPF_SOCK_OPS_STATE_CB if ops.is_closing() => closed(&ops),
        _ => (),
    }
    IGNORED
}

/// The kubelet's sockets: records the connections that it opens.
#[sock_ops]
pub fn adit_kubelet_ops(ctx: SockOpsContext) -> u32 {
    let ops = SockOps::new(ctx);
    let op = ops.op();
    if op == BPF_SOCK_OPS_STATE_CB && !ops.is_closing() {
        return IGNORED;
    }
    let Some(flow) = ops.flow() else { return IGNORED };
    match op {
        BPF_SOCK_OPS_TCP_CONNECT_CB => record_kubelet_flow(&ops, &flow),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => flows::shorten_kubelet_flow(&flow),
        BPF_SOCK_OPS_STATE_CB => flows::forget_kubelet_flow(&flow),
        _ => (),
    }
    IGNORED
}

/// A pod's socket is bound, as sockets that listen are: records its netns, for the listen callback.
/// The watcher finds a socket that listens without being bound.
#[cgroup_sock(post_bind4)]
pub fn adit_post_bind4(ctx: SockContext) -> i32 {
    record_netns_of_stream(&SocketEvent::new(ctx));
    ALLOW
}

#[cgroup_sock(post_bind6)]
pub fn adit_post_bind6(ctx: SockContext) -> i32 {
    record_netns_of_stream(&SocketEvent::new(ctx));
    ALLOW
}

/// The tunnel creates a socket: records its netns, which sock_ops programs cannot read before Linux
/// 5.15.
#[cgroup_sock(sock_create)]
pub fn adit_sock_create(ctx: SockContext) -> i32 {
    record_netns(&SocketEvent::new(ctx));
    ALLOW
}

#[inline(always)]
fn record_netns_of_stream(event: &SocketEvent) {
    if event.is_stream() {
        record_netns(event);
    }
}

/// Without a state the socket works all the same; a listener then stays unregistered, and the pod
/// follows its fail mode.
#[inline(always)]
fn record_netns(event: &SocketEvent) {
    let cookie = event.netns_cookie();
    if let Some(state) = maps::state_or_new(event.socket()) {
        state.netns_cookie = cookie;
    }
}

/// The flow of a socket that connect(2) redirected, with the destination that it wanted.
#[inline(always)]
fn redirected(ops: &SockOps) -> Option<(Flow, Destination)> {
    let state = maps::state(ops.socket())?;
    // A flow on the loopback, such as DNS, is no key: every pod has the same addresses there.
    // Nothing looks it up.
    if !state.original.is_somewhere()
        || !state.redirect.is_somewhere()
        || is_loopback(&state.redirect.address)
    {
        return None;
    }
    let flow = ops.flow()?;
    let is_redirect = flow.remote_port == state.redirect.port && same(&flow.remote, &state.redirect.address);
    is_redirect.then_some((flow, state.original))
}

#[inline(always)]
fn record_tunnel_flow(ops: &SockOps) {
    let Some(state) = maps::state(ops.socket()) else { return };
    let Some(flow) = ops.flow() else { return };
    if state.netns_cookie == 0 {
        return;
    }
    let recorded = flows::record_tunnel_flow(&flow, state.netns_cookie).is_ok();
    // No address of a pod that is leaving is known any more: then every connection counts.
    let own = pods::owner(&flow.local).is_at(state.netns_cookie, 0);
    let pins = !own && !is_loopback(&flow.local) && flows::count_pinned_connection(state.netns_cookie);
    state.pins_netns = u32::from(pins);
    if recorded || pins {
        ops.watch_close();
    }
}

/// On the loopback every netns has the same addresses. No probe of a pod goes there.
#[inline(always)]
fn record_kubelet_flow(ops: &SockOps, flow: &Flow) {
    if !is_loopback(&flow.remote) && flows::record_kubelet_flow(flow).is_ok() {
        ops.watch_close();
    }
}

#[inline(always)]
fn record_app_listener(ops: &SockOps) {
    let Some(state) = maps::state(ops.socket()) else { return };
    let local = ops.local();
    // A listener on the loopback cannot be reached from outside.
    if state.netns_cookie != 0 && !is_loopback(&local.address) {
        maps::record_app_listener(&ListenerKey::new(state.netns_cookie, local.port, local.is_v4));
    }
}

#[inline(always)]
fn register(ops: &SockOps) {
    let Some(settings) = maps::settings() else { return };
    let local = ops.local();
    let port = local.port;
    if port != settings.outbound_port
        && port != settings.inbound_port
        && port != settings.hbone_port
        && port != settings.dns_port
    {
        return;
    }
    let Some(state) = maps::state(ops.socket()) else { return };
    if state.netns_cookie != 0 {
        maps::register_tunnel_listener(ops, ListenerKey::new(state.netns_cookie, port, local.is_v4));
        // The sockets that it accepts would inherit the mark.
        ops.clear_mark();
    }
}

/// The tunnel is about to accept.
#[inline(always)]
fn accepted(ops: &SockOps) {
    let Some(accepted) = ops.flow() else { return };
    // A connection of the pod to its own address comes here by a redirect only.
    if same(&accepted.local, &accepted.remote) {
        move_original(ops, &accepted);
    } else {
        count_arrival(ops, &accepted);
    }
}

/// From the pod: moves where it wanted to go to the accepted socket.
#[inline(always)]
fn move_original(ops: &SockOps, accepted: &Flow) {
    let opened = accepted.reversed();
    let Some(original) = flows::published_original(&opened) else { return };
    if let Some(state) = maps::state_or_new(ops.socket()) {
        state.original = original;
        // This end was not redirected: getpeername shows what it always did.
        state.redirect = Destination::NOWHERE;
    }
    flows::withdraw_original(&opened);
}

/// To the pod: the tunnel is going to dial the application from the client's address, maybe only
/// when the pod has left.
#[inline(always)]
fn count_arrival(ops: &SockOps, accepted: &Flow) {
    // The client dialled the pod's address, whatever the port; not one of the tunnel's own servers.
    let netns_cookie = pods::owner(&accepted.local).netns_cookie;
    if netns_cookie == 0 {
        return;
    }
    let Some(state) = maps::state_or_new(ops.socket()) else { return };
    state.netns_cookie = netns_cookie;
    if flows::count_pinned_connection(state.netns_cookie) {
        state.pins_netns = 1;
        ops.watch_close();
    }
}

#[inline(always)]
fn closed(ops: &SockOps) {
    if let Some(flow) = ops.flow() {
        flows::forget_tunnel_flow(&flow);
    }
    if let Some(state) = maps::state(ops.socket())
        && state.pins_netns == 1
    {
        state.pins_netns = 0;
        flows::uncount_pinned_connection(state.netns_cookie);
    }
}
