//! DNS queries of pods: to the tunnel's port on the loopback, and answers shown as the resolver's own.
//!
//! Connected sockets, TCP or UDP, are redirected by [`crate::connect`]; a datagram with an address of its own is by
//! `sendmsg`, and what is received by `recvmsg`. For IPv4 destinations of IPv6 sockets the kernel calls the IPv4
//! program of `sendmsg` and the IPv6 one of `recvmsg`; addresses in mapped form make both speak of the same.

use adit_ebpf_common::{
    address::{Address, UNSPECIFIED, is_loopback, is_unspecified, is_v4},
    flows::Destination,
    pods::{CgroupInfo, ListenerKey, OUTBOUND, flag},
    settings::Settings,
    trace::{Hook, Rule},
};
use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};

use crate::{
    address::{from_v4_word, from_words, same, to_words},
    decide::{self, NOWHERE},
    maps,
    original_dst::{show_original_v4, show_original_v6},
    trace,
};

/// The only value that recvmsg programs may return; for sendmsg it means that the datagram may go.
const GO_ON: i32 = 1;

pub const PORT: u16 = 53;

/// `::ffff:127.0.0.1` and `::1`.
const LOOPBACK_V4: Address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 0, 0, 1];
const LOOPBACK_V6: Address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// Where a query to `resolver` goes instead, port 0 meaning nowhere. First rule that holds wins:
///
/// 1. the pod's queries are not captured, or its traffic is not the tunnel's: leave
/// 2. no tunnel is ready for it: leave. DNS is no security boundary: a name that the tunnel does not tell the outer world's
///    resolver does, and the connection that follows meets the pod's fail mode
/// 3. the resolver is the pod's own (loopback) or on the link, or the socket is bound to a device, from where the
///    loopback is out of reach: leave
/// 4. excluded by port or CIDR: leave
/// 5. some resolvers are named, and it is none of them: leave, the tunnel would ask others
/// 6. the tunnel does not serve DNS in this netns: leave, as 2
/// 7. who was asked cannot be recorded, so the answer would come from somebody else: leave
/// 8. redirect to the tunnel
#[inline(always)]
pub fn redirect(
    settings: &Settings,
    info: &CgroupInfo,
    socket: *mut bpf_sock,
    resolver: &Destination,
) -> Destination {
    let wanted = flag::IN_MESH | flag::NAMES | flag::READY;
    let foreign = flag::TUNNEL | flag::SIDECAR;
    if info.flags & wanted != wanted || (info.flags | info.detected) & foreign != 0 || settings.tunnel_up == 0
    {
        return NOWHERE;
    }
    let to = &resolver.address;
    if is_loopback(to) || is_unspecified(to) || is_link_local(to) || is_bound(socket) {
        return NOWHERE;
    }
    if maps::is_port_excluded(info.policy_id, resolver.port, OUTBOUND)
        || maps::is_cidr_excluded(info.policy_id, to)
        || !is_captured(settings, to)
    {
        return NOWHERE;
    }
    let (address, family) = if is_v4(to) { (LOOPBACK_V4, 4) } else { (LOOPBACK_V6, 6) };
    // The tunnel listens for TCP once it serves UDP too.
    let port = u32::from(settings.names_port);
    if !maps::is_listening(ListenerKey { netns_cookie: info.netns_cookie, port, family }) {
        return NOWHERE;
    }
    let Some(state) = maps::state_or_new(socket) else { return NOWHERE };
    let redirect = Destination { address, port: settings.names_port, pad: 0 };
    state.original = *resolver;
    state.redirect = redirect;
    redirect
}

#[inline(always)]
fn is_captured(settings: &Settings, resolver: &Address) -> bool {
    let named = &settings.resolvers;
    same(&named[0], &UNSPECIFIED)
        || same(&named[0], resolver)
        || same(&named[1], resolver)
        || same(&named[2], resolver)
}

/// fe80::/10.
#[inline(always)]
fn is_link_local(address: &Address) -> bool {
    address[0] == 0xfe && address[1] & 0xc0 == 0x80
}

#[inline(always)]
fn is_bound(socket: *mut bpf_sock) -> bool {
    // SAFETY: the context's socket, which the kernel holds.
    !socket.is_null() && unsafe { (&raw const (*socket).bound_dev_if).read_volatile() } != 0
}

#[cgroup_sock_addr(sendmsg4)]
pub fn adit_sendmsg4(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    // SAFETY: the context of a sendmsg4 program; every field is read and written by its own width.
    unsafe {
        let address = from_v4_word((&raw const (*ctx).user_ip4).read_volatile());
        let to = captured(ctx, address, Hook::Sendmsg4);
        if to.port != 0 {
            (&raw mut (*ctx).user_ip4).write_volatile(to_words(&to.address)[3]);
            (&raw mut (*ctx).user_port).write_volatile(u32::from(to.port.to_be()));
        }
    }
    GO_ON
}

#[cgroup_sock_addr(sendmsg6)]
pub fn adit_sendmsg6(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    // SAFETY: as in `adit_sendmsg4`.
    unsafe {
        let word = |index: usize| (&raw const (*ctx).user_ip6[index]).read_volatile();
        let address = from_words([word(0), word(1), word(2), word(3)]);
        let to = captured(ctx, address, Hook::Sendmsg6);
        if to.port != 0 {
            let words = to_words(&to.address);
            (&raw mut (*ctx).user_ip6[0]).write_volatile(words[0]);
            (&raw mut (*ctx).user_ip6[1]).write_volatile(words[1]);
            (&raw mut (*ctx).user_ip6[2]).write_volatile(words[2]);
            (&raw mut (*ctx).user_ip6[3]).write_volatile(words[3]);
            (&raw mut (*ctx).user_port).write_volatile(u32::from(to.port.to_be()));
        }
    }
    GO_ON
}

/// # Safety
/// `ctx` is the program's context.
#[inline(always)]
unsafe fn captured(ctx: *mut bpf_sock_addr, address: Address, hook: Hook) -> Destination {
    // SAFETY: the caller's.
    let (port, socket) = unsafe {
        let port = (&raw const (*ctx).user_port).read_volatile();
        (u16::from_be(port as u16), (&raw const (*ctx).__bindgen_anon_1.sk).read_volatile())
    };
    if port != PORT {
        return NOWHERE;
    }
    let Some(settings) = maps::settings() else { return NOWHERE };
    let Some(info) = maps::caller() else { return NOWHERE };
    let resolver = Destination { address, port, pad: 0 };
    let to = redirect(settings, info, socket, &resolver);
    if to.port != 0 && settings.debug != 0 {
        trace::outbound(settings, hook, Rule::Names, &decide::own_address(Some(info), &address), &resolver);
    }
    to
}

/// An answer comes from whom its socket asked last. One that asks several resolvers at once cannot tell which of them
/// it was; that it was one of them is true, and all that resolvers' libraries check.
#[cgroup_sock_addr(recvmsg4)]
pub fn adit_recvmsg4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the program's context.
    unsafe { show_original_v4(ctx.sock_addr) }
    GO_ON
}

#[cgroup_sock_addr(recvmsg6)]
pub fn adit_recvmsg6(ctx: SockAddrContext) -> i32 {
    // SAFETY: the program's context.
    unsafe { show_original_v6(ctx.sock_addr) }
    GO_ON
}
