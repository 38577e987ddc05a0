//! What happens to TCP sockets between the calls.
//!
//! The original destination travels from the application's socket to the tunnel's in three steps, none
//! of which can come too late for the next: connect(2) writes it into the application socket's state;
//! the connect callback, before the SYN leaves and with the source port chosen, publishes it under the
//! flow; the established callback, before accept(2) can return, moves it into the accepted socket's state.
//!
//! Which cgroup's programs run is decided by the cgroup that a socket was created in: the tunnel's
//! sockets stay with the tunnel, wherever their netns is. Where its cgroup lies below the pods', both
//! programs run on a socket; each acts only on states that the other never makes.

use adit_ebpf_common::{
    address::is_loopback,
    flows::{Destination, Flow},
    pods::ListenerKey,
};
use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB, BPF_TCP_CLOSE, bpf_sock, bpf_sock_ops,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_sock_ops_cb_flags_set},
    macros::{cgroup_sock, sock_ops},
    programs::{SockContext, SockOpsContext},
};

use crate::{
    address::{from_v4_word, from_words, same},
    maps,
    tunnel_mark::clear_mark,
};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
/// What these programs return is not looked at, unless a callback asks for a value; none of ours does.
const DONE: u32 = 1;

/// Pods' sockets: publishes original destinations, withdraws what nobody took, notes who listens.
#[sock_ops]
pub fn adit_pods_ops(ctx: SockOpsContext) -> u32 {
    let op = ctx.op();
    if op == BPF_SOCK_OPS_TCP_LISTEN_CB {
        note_listener(ctx.ops);
        return DONE;
    }
    if op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_STATE_CB {
        return DONE;
    }
    let ops = ctx.ops;
    let Some(state) = maps::state(socket(ops)) else { return DONE };
    // A flow on the loopback, as DNS is, is no key: every pod has the same addresses there. Nobody asks for it.
    if state.original.port == 0 || state.redirect.port == 0 || is_loopback(&state.redirect.address) {
        return DONE;
    }
    // SAFETY: the program's context.
    let Some(flow) = (unsafe { flow(ops) }) else { return DONE };
    if flow.remote_port != state.redirect.port || !same(&flow.remote, &state.redirect.address) {
        return DONE;
    }
    if op == BPF_SOCK_OPS_TCP_CONNECT_CB {
        maps::publish_original(&flow, &state.original);
        tell_of_close(ops);
    } else if is_closing(&ctx) {
        maps::withdraw_original(&flow);
    }
    DONE
}

/// The tunnel's sockets: registers listeners, notes the flows that it opens, takes over original
/// destinations for those that it accepts, counts those that need the pod's netns prepared.
#[sock_ops]
pub fn adit_tunnel_ops(ctx: SockOpsContext) -> u32 {
    let ops = ctx.ops;
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => note(ops),
        BPF_SOCK_OPS_TCP_LISTEN_CB => register(ops),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ops),
        // Not before the end of the flow: with SYN cookies the ACK looks the listener up once more. And
        // not after it: another process's connection that reuses the ports must not pass.
        BPF_SOCK_OPS_STATE_CB if is_closing(&ctx) => {
            // SAFETY: the program's context.
            if let Some(flow) = unsafe { flow(ops) } {
                maps::forget_tunnel_flow(&flow);
            }
            if let Some(state) = maps::state(socket(ops))
                && state.delivers == 1
            {
                state.delivers = 0;
                maps::uncount_delivery(state.netns_cookie);
            }
        }
        _ => (),
    }
    DONE
}

/// A pod's socket was bound, as those that listen are: notes its netns, as below. One that listens without it is found
/// by the watcher.
#[cgroup_sock(post_bind4)]
pub fn adit_post_bind4(ctx: SockContext) -> i32 {
    note_netns(&ctx)
}

#[cgroup_sock(post_bind6)]
pub fn adit_post_bind6(ctx: SockContext) -> i32 {
    note_netns(&ctx)
}

#[inline(always)]
fn note_netns(ctx: &SockContext) -> i32 {
    const ALLOW: i32 = 1;
    const SOCK_STREAM: u32 = 1;
    // SAFETY: the program's context.
    let (kind, cookie) =
        unsafe { ((&raw const (*ctx.sock).type_).read_volatile(), bpf_get_netns_cookie(ctx.sock.cast())) };
    if kind == SOCK_STREAM
        && let Some(state) = maps::state_or_new(ctx.sock)
    {
        state.netns_cookie = cookie;
    }
    ALLOW
}

/// The tunnel creates a socket: notes its netns, which no sock_ops program can ask for before Linux 5.15.
#[cgroup_sock(sock_create)]
pub fn adit_sock_create(ctx: SockContext) -> i32 {
    // SAFETY: the program's context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.sock.cast()) };
    if let Some(state) = maps::state_or_new(ctx.sock) {
        state.netns_cookie = cookie;
    }
    // The socket may be created; without a state its listener stays unregistered and the pod closed.
    1
}

#[inline(always)]
fn note(ops: *mut bpf_sock_ops) {
    let Some(state) = maps::state(socket(ops)) else { return };
    // SAFETY: the program's context.
    let Some(flow) = (unsafe { flow(ops) }) else { return };
    if state.netns_cookie == 0 {
        return;
    }
    let noted = maps::note_tunnel_flow(&flow, state.netns_cookie).is_ok();
    // Of a pod that is leaving no address is known any more: then every connection counts.
    let own = maps::pod(&flow.local).is_some_and(|pod| pod.netns_cookie == state.netns_cookie);
    let delivers = !own && !is_loopback(&flow.local) && maps::count_delivery(state.netns_cookie);
    state.delivers = u32::from(delivers);
    if noted || delivers {
        tell_of_close(ops);
    }
}

#[inline(always)]
fn note_listener(ops: *mut bpf_sock_ops) {
    let Some(state) = maps::state(socket(ops)) else { return };
    // SAFETY: the program's context. Both families' words before it is known which count: see `flow`.
    let (port, family, local) = unsafe {
        let port = (&raw const (*ops).local_port).read_volatile();
        let family = (&raw const (*ops).family).read_volatile();
        let v4 = (&raw const (*ops).local_ip4).read_volatile();
        let word = |index: usize| (&raw const (*ops).local_ip6[index]).read_volatile();
        let v6 = [word(0), word(1), word(2), word(3)];
        (port, family, if family == AF_INET { from_v4_word(v4) } else { from_words(v6) })
    };
    // Who listens on loopback cannot be dialled from outside.
    if state.netns_cookie != 0 && !is_loopback(&local) {
        let family = if family == AF_INET { 4 } else { 6 };
        maps::note_listened(&ListenerKey { netns_cookie: state.netns_cookie, port, family });
    }
}

#[inline(always)]
fn register(ops: *mut bpf_sock_ops) {
    let Some(settings) = maps::settings() else { return };
    // SAFETY: the program's context.
    let (port, is_v4) = unsafe {
        let port = (&raw const (*ops).local_port).read_volatile();
        (port as u16, (&raw const (*ops).family).read_volatile() == AF_INET)
    };
    let ours = [settings.outbound_port, settings.inbound_port, settings.hbone_port, settings.names_port];
    if port != ours[0] && port != ours[1] && port != ours[2] && port != ours[3] {
        return;
    }
    let Some(state) = maps::state(socket(ops)) else { return };
    if state.netns_cookie != 0 {
        let family = if is_v4 { 4 } else { 6 };
        let key = ListenerKey { netns_cookie: state.netns_cookie, port: u32::from(port), family };
        maps::register_listener(ops, key);
        // What it accepts would inherit the mark.
        // SAFETY: the program's context.
        unsafe { clear_mark(ops.cast()) };
    }
}

/// The tunnel is about to accept.
#[inline(always)]
fn accepted(ops: *mut bpf_sock_ops) {
    let Some(settings) = maps::settings() else { return };
    // SAFETY: the program's context.
    let Some(accepted) = (unsafe { flow(ops) }) else { return };
    if accepted.local_port == settings.outbound_port {
        take_over(ops, &accepted);
    } else {
        count_arrival(ops, &accepted);
    }
}

/// From the pod: where it wanted to go.
#[inline(always)]
fn take_over(ops: *mut bpf_sock_ops, accepted: &Flow) {
    let opened = Flow {
        local: accepted.remote,
        remote: accepted.local,
        local_port: accepted.remote_port,
        remote_port: accepted.local_port,
    };
    let Some(original) = maps::published_original(&opened) else { return };
    if let Some(state) = maps::state_or_new(socket(ops)) {
        state.original = original;
        // This end was not redirected: getpeername shows what it always did.
        state.redirect = Destination { address: [0; 16], port: 0, pad: 0 };
    }
    maps::withdraw_original(&opened);
}

/// To the pod: the tunnel is going to dial the application for it, in the client's name, maybe only when the pod has
/// left.
#[inline(always)]
fn count_arrival(ops: *mut bpf_sock_ops, accepted: &Flow) {
    // Dialled at the pod's address, whatever the port; not the tunnel's own servers.
    let Some(pod) = maps::pod(&accepted.local) else { return };
    let Some(state) = maps::state_or_new(socket(ops)) else { return };
    state.netns_cookie = pod.netns_cookie;
    if maps::count_delivery(state.netns_cookie) {
        state.delivers = 1;
        tell_of_close(ops);
    }
}

#[inline(always)]
fn is_closing(ctx: &SockOpsContext) -> bool {
    ctx.arg(1) == BPF_TCP_CLOSE
}

/// Has the close callback called for this socket, whatever else it is called for.
#[inline(always)]
fn tell_of_close(ops: *mut bpf_sock_ops) {
    // SAFETY: the program's context.
    unsafe {
        let flags = (&raw const (*ops).bpf_sock_ops_cb_flags).read_volatile() | BPF_SOCK_OPS_STATE_CB_FLAG;
        let _ = bpf_sock_ops_cb_flags_set(ops, flags as i32);
    }
}

/// Null while there is only half a socket.
#[inline(always)]
fn socket(ops: *mut bpf_sock_ops) -> *mut bpf_sock {
    // SAFETY: the program's context.
    unsafe { (&raw const (*ops).__bindgen_anon_2.sk).read_volatile() }
}

/// # Safety
/// `ops` is the program's context.
#[inline(always)]
unsafe fn flow(ops: *mut bpf_sock_ops) -> Option<Flow> {
    // SAFETY: the caller's. The local port is in host byte order, the remote one in the upper half of a
    // big-endian word.
    unsafe {
        let local_port = (&raw const (*ops).local_port).read_volatile() as u16;
        let remote_port = u32::from_be((&raw const (*ops).remote_port).read_volatile()) as u16;
        let family = (&raw const (*ops).family).read_volatile();
        // Both families' words are read before it is known which count. Read in branches, the compiler
        // would make one load at a computed offset of them, which the verifier refuses.
        let local_v4 = (&raw const (*ops).local_ip4).read_volatile();
        let remote_v4 = (&raw const (*ops).remote_ip4).read_volatile();
        let ours = |index: usize| (&raw const (*ops).local_ip6[index]).read_volatile();
        let theirs = |index: usize| (&raw const (*ops).remote_ip6[index]).read_volatile();
        let local_v6 = [ours(0), ours(1), ours(2), ours(3)];
        let remote_v6 = [theirs(0), theirs(1), theirs(2), theirs(3)];
        let (local, remote) = match family {
            AF_INET => (from_v4_word(local_v4), from_v4_word(remote_v4)),
            AF_INET6 => (from_words(local_v6), from_words(remote_v6)),
            _ => return None,
        };
        Some(Flow { local, remote, local_port, remote_port })
    }
}
