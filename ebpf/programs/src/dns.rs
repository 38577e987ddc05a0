//! DNS queries of pods: to the tunnel's port on the loopback, with answers shown as the resolver's
//! own.
//!
//! [`crate::connect`] redirects connected sockets, TCP or UDP. A datagram with an address of its
//! own is redirected by `sendmsg`, and `recvmsg` corrects the address of what is received. For IPv4
//! destinations of IPv6 sockets the kernel calls the IPv4 program of `sendmsg` and the IPv6 one of
//! `recvmsg`; with addresses in mapped form both speak of the same.

use adit_ebpf_common::{
    address::Address,
    decide,
    flows::Destination,
    trace::{Hook, Rule},
};
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    context::{SockAddr, verdict::PROCEED},
    maps::{self, facts::Caller},
    original_dst::{show_original_v4, show_original_v6},
    trace,
};

#[cgroup_sock_addr(sendmsg4)]
pub fn adit_sendmsg4(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(ctx);
    let to = captured(&call, call.address_v4(), Hook::Sendmsg4);
    if to.is_somewhere() {
        call.set_v4(&to);
    }
    PROCEED
}

#[cgroup_sock_addr(sendmsg6)]
pub fn adit_sendmsg6(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(ctx);
    let to = captured(&call, call.address_v6(), Hook::Sendmsg6);
    if to.is_somewhere() {
        call.set_v6(&to);
    }
    PROCEED
}

#[inline(always)]
fn captured(ctx: &SockAddr, address: Address, hook: Hook) -> Destination {
    let resolver = Destination::new(address, ctx.port());
    if resolver.port != decide::DNS_PORT {
        return Destination::NOWHERE;
    }
    let Some(settings) = maps::settings() else { return Destination::NOWHERE };
    let own = maps::caller();
    let caller = Caller::new(settings, ctx.netns_cookie(), ctx.socket(), own);
    let to = decide::dns_redirect(&caller, &resolver);
    if !caller.is_current() {
        return Destination::NOWHERE;
    }
    if to.is_somewhere() && settings.debug != 0 {
        trace::outbound(settings, hook, Rule::DnsRedirect, own.map(|entry| entry.info), &resolver);
    }
    to
}

/// An answer shows the resolver that its socket queried last. If a socket queries several at once,
/// the answer may be another one's; it was one of them, and that is all that resolver libraries
/// check.
#[cgroup_sock_addr(recvmsg4)]
pub fn adit_recvmsg4(ctx: SockAddrContext) -> i32 {
    show_original_v4(&SockAddr::new(ctx));
    PROCEED
}

#[cgroup_sock_addr(recvmsg6)]
pub fn adit_recvmsg6(ctx: SockAddrContext) -> i32 {
    show_original_v6(&SockAddr::new(ctx));
    PROCEED
}
